#!/usr/bin/env python
"""Train LoRA adapters for Stable Diffusion XL, base or refiner, on captioned images: WebDataset shards or a folder.

One GPU or a laptop:
    python train_sdxl_lora.py --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \\
        --train_shards data/train --species_csv manifests/train_species.csv --output_dir runs/pokefa \\
        --mixed_precision bf16 --train_batch_size 4 --rank 32 --max_train_steps 10000

N GPUs, the same flags:
    accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 8 train_sdxl_lora.py ...

After an interruption, the same command with --resume_from_checkpoint latest: the resumed run is the interrupted run.

The rooms of this file, in the order data flows; each calls only what stands above it:
     1 Arguments          2 Models and LoRA    3 Data           4 Conditioning    5 Loss
     6 Optimizer          7 Checkpoints        8 Validation     9 Train loop     10 Main
To read it: this page, `--help`, main(), train(), diffusion_loss(); then the room you came for.
Lines that begin with "# Seam:" mark the places meant to be edited, each with its contract.
"""

import argparse
import csv
import difflib
import errno
import fcntl
import hashlib
import importlib.metadata
import io
import json
import logging
import math
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import urllib.request
from collections import Counter, deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from unittest import mock

STOP_SECONDS = 25  # after a signal to stop, without a sign of life from the train loop; launchers kill after 30


class StopSignal:
    """Truthy once SIGTERM, SIGUSR1 or Ctrl-C has come: all ranks then save at a step's edge and leave.

    A thread hears the signals, so that they count while the main thread waits for another rank, and ends the process
    when the wait is in vain. The death of the launcher counts as SIGTERM. A second Ctrl-C ends the process at once.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self):
        self.number, self.since, self.sign_of_life = None, 0.0, 0.0
        self.begun = self.patient = False  # begun: there is a step to save; patient: no watchdog
        self.writer, self.handlers = None, {}  # of the wakeup pipe; {signal: who handled it before}

    def __bool__(self):
        return self.number is not None

    def listen(self):
        """Whether this call took over the process's signals: False when one before it did."""
        if self.writer is not None:
            return False
        reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
        self.handlers = {number: signal.signal(number, lambda *_: None) for number in self.NUMBERS}
        threading.Thread(target=self.watch, args=(reader,), daemon=True).start()
        return True

    def release(self):
        """Gives the signals back to the program that called main()."""
        signal.set_wakeup_fd(-1)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        os.close(self.writer)  # ends the thread
        self.__init__()

    def watch(self, reader):
        launched = "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
        launcher = os.getppid()
        while True:
            ready, _, _ = select.select([reader], [], [], 0.5)
            received = os.read(reader, 64) if ready else b""
            if ready and not received:
                return os.close(reader)
            for number in received:
                if number in self.NUMBERS:
                    self.receive(number)
            if launched and os.getppid() != launcher and not self:
                self.receive(signal.SIGTERM)
            if self and not self.patient and time.monotonic() > self.sign_of_life + STOP_SECONDS:
                self.give_up()

    def receive(self, number):
        now = time.monotonic()
        if self.number == number == signal.SIGINT and now > self.since + 1:  # a launcher passes the same one on
            os._exit(130)
        if not self:
            self.number, self.since, self.sign_of_life = number, now, now
            edge = "stopping at the edge of this step" if self.begun else "stopping before the first step"
            logger.warning("%s: %s", signal.Signals(number).name, edge)
        if not self.begun and int(os.environ.get("WORLD_SIZE", 1)) == 1:
            self.leave()

    def give_up(self):
        if not self.begun:
            self.leave()
        logger.error(
            "%s: no step has ended for %d s: another process is gone or hangs; the newest checkpoint stands",
            signal.Signals(self.number).name, STOP_SECONDS,
        )  # fmt: skip
        os._exit(1)

    def leave(self):
        """Ends the process before the first step, when there is nothing to save."""
        self.mark()
        os._exit(0)

    def mark(self):
        """Tells a batch script, by the file $PREEMPT_FILE, that the run was told to stop and wants to go on.

        The main process alone says so: launchers send SIGTERM to the others too when the main process has failed.
        """
        if os.environ.get("PREEMPT_FILE") and self.number != signal.SIGINT and os.environ.get("RANK", "0") == "0":
            Path(os.environ["PREEMPT_FILE"]).touch()

    def alive(self):
        """The train loop's sign of life to the watchdog."""
        self.sign_of_life = time.monotonic()


logger = logging.getLogger("train_sdxl_lora")
stop = StopSignal()
if __name__ == "__main__":
    stop.listen()  # here, since the imports below take ten seconds
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on import it asks for a package that nobody needs here

import aiohttp
import configargparse
import datasets
import diffusers
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
import yaml
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, get_available_trackers, on_main_process
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
    recursively_apply,
)
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import compute_snr
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from PIL import ExifTags, Image, ImageDraw, ImageOps
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from webdataset.shardlists import expand_urls

SDPA_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
# --gradient_checkpointing → bytes that a 1024 px image's activations take in SDXL's UNet in 16 bits, counted
ACTIVATION_BYTES = {"none": 5.8e9, "blocks": 1.0e9, "full": 0.55e9}
RECOMPILE_LIMIT = 512  # graphs a block may have under --compile: two widths for every shape of --crop bucket
UNLABELLED_ACCEPTANCE = 0.1  # probability that an image without a label is taken when classes are balanced
AESTHETIC_SCORE = 6.0  # of an image without one: what the stock refiner pipeline gives every picture
SAMPLE_INFERENCE_STEPS = 25  # denoising steps of a validation picture, as in diffusers' training scripts
MAX_IMAGE_PIXELS = 178_956_970  # larger images are refused from their header: PIL's own limit against bombs
MAX_SHARDS = 4096  # or images of a folder, whose connection and stamp a worker remembers
IO_ATTEMPTS = 7  # tries of a read over the network, half a minute in all, before the run ends
READ_AHEAD = 1 << 17  # bytes that indexing reads at once
IO_THREADS = 16  # reads over the network that a process keeps under way
STAMP_SECONDS = 60  # how often a shard on the network is asked whether it changed
GROUP_TIMEOUT = timedelta(hours=2)  # the main process may index or download while the others wait for it
CACHE_ROWS = 64  # samples in a file of --cache_latents or --cache_text_embeddings
MAX_OPEN_CACHES = 256  # of these files, memory-mapped, that a process keeps open
VAE_PIXELS = 1 << 20  # that the VAE encodes at once: at 1024 px an image takes 2.7 GB in fp32 for a moment
INDEX_VERSION = 3  # part of the index cache's key: raise it when a column changes
IN_TABLE = "row of the dataset"  # in place of a path: the bytes are in a table of --dataset_name
MAX_CAPTION_CHUNKS = 3  # --long_captions chunk reads 225 tokens at most
HEADER_BYTES = 1 << 16  # of an image, in which indexing finds its size; where they are too few it reads all
SAVE_ATTEMPTS = 4  # of the last checkpoint of a run, SAVE_PAUSE seconds apart, when the disk is full
SAVE_PAUSE = 2.0
SAVE_WAIT = 1.0  # s that training waits for a checkpoint; a larger one is written on while it trains
LOCK_SECONDS = 3  # that a run waits for the output_dir of one that is just ending
MAX_NONFINITE_STEPS = 30  # in a row, after which skipping them is hopeless: fp16's scale is then below 2^-14
BUCKET_STEP = 64  # px; sides of --crop bucket are multiples of it, as SDXL was trained (arXiv:2307.01952, app. I)
TIME_IDS = {"base": 6, "refiner": 5}  # numbers in add_time_ids
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp")


class InputError(ValueError):
    """Bad input found after the flags were read; the message names the flag or the file and what to do."""


class TrainingError(RuntimeError):
    """A run that cannot go on; the message says why, what is safe and what to do."""


class Preempted(Exception):
    """Raised on all ranks together when one was told to stop where there is no step to save."""


def leave_if_told(accelerator):
    """Waits for all ranks. Errors: Preempted, on all together, when one of them was told to stop."""
    stop.alive()
    told = accelerator.reduce(torch.tensor([float(bool(stop))], device=accelerator.device), "sum").item() > 0
    stop.alive()
    if told:
        raise Preempted


# ------------------------------------------------------------------------------
# 1 Arguments
# ------------------------------------------------------------------------------


class HelpFormatter(argparse.HelpFormatter):
    """Adds "(default: …)" where there is a default worth telling, and shows switches as --[no-]flag."""

    def _format_action_invocation(self, action):
        if isinstance(action, argparse.BooleanOptionalAction):
            return action.option_strings[0].replace("--", "--[no-]", 1)
        return super()._format_action_invocation(action)

    def _get_help_string(self, action):
        text = action.help.replace(" (default: %(default)s)", "")
        untold = action.default is None or action.default is False or action.default in ([], argparse.SUPPRESS)
        if untold or "default" in text:
            return text
        shown = " ".join(map(str, action.default)) if isinstance(action.default, list) else "%(default)s"
        return f"{text} (default: {shown})"


# --flag and --no-flag, so that a file's true can be undone
switch = {"action": argparse.BooleanOptionalAction, "default": False}


# fmt: off
# Seam: a new flag. Contract: one that changes what is learned is also named in MATHEMATICS (room 7), or a resume would
# take another value without a word.
def add_model_arguments(parser):
    group = parser.add_argument_group("Models and LoRA")
    add = group.add_argument
    add("--pretrained_model_name_or_path", required=True, metavar="PATH|ID",
        help="SDXL snapshot: a folder or a hub id")
    add("--pretrained_vae_model_name_or_path", metavar="PATH|ID", help="another VAE, say one fixed for fp16")
    add("--revision", metavar="REV", help="hub revision of the snapshot")
    add("--variant", metavar="NAME", help="weight file variant of the snapshot, say fp16")
    add("--stage", choices=["base", "refiner"], default="base", help="which UNet is trained")
    add("--refiner_unet", metavar="PATH|ID",
        help="refiner: the UNet it trains: its folder, a snapshot with unet/, or a hub id")
    add("--text_encoder_2_lora", metavar="FILE",
        help="refiner: base-stage LoRA whose text_encoder_2 part is merged first")
    add("--rank", type=int, default=4, metavar="R", help="LoRA rank on the UNet")
    add("--lora_alpha", type=float, metavar="A", help="LoRA scale is alpha / rank; alpha is the rank by default")
    add("--lora_dropout", type=float, default=0.0, metavar="P", help="dropout on the input of every adapter")
    add("--lora_target_modules", nargs="+", default=["to_q", "to_k", "to_v", "to_out.0"], metavar="NAME",
        help="UNet layers that get an adapter")
    add("--use_dora", **switch, help="weight-decomposed LoRA (arXiv:2402.09353)")
    add("--use_rslora", **switch, help="rank-stabilized LoRA: scale alpha / sqrt(rank) (arXiv:2312.03732)")
    add("--train_text_encoder", **switch, help="adapters on both text encoders too")
    add("--text_encoder_rank", type=int, metavar="R", help="LoRA rank on the encoders; --rank by default")
    add("--text_encoder_alpha", type=float, metavar="A", help="LoRA alpha on the encoders; their rank by default")
    add("--vae_precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="SDXL's own VAE overflows in fp16")
    add("--base_precision", choices=["auto", "nf4", "int8"], default="auto",
        help="precision of the frozen UNet's linear layers; auto follows --mixed_precision; nf4 needs bitsandbytes")
    add("--gradient_checkpointing", nargs="?", const="full", default="none",
        choices=[*ACTIVATION_BYTES, "auto"], type=lambda mode: {"True": "full", "False": "none"}.get(mode, mode),
        help="recompute activations, less memory for a third more time: of the transformer blocks, full (which the "
        "flag alone means), or auto: as little as the GPU's free memory allows")
    add("--attention_backend", choices=["sdpa", *SDPA_BACKENDS, "xformers"], default="sdpa",
        help="attention kernel of the UNet; sdpa lets PyTorch choose")
    add("--compile", **switch, help="compile the UNet's transformer blocks, once per shape of a batch; "
        "where that fails it goes on uncompiled")


def add_data_arguments(parser):
    group = parser.add_argument_group("Data", "one of --train_shards, --train_data_dir, --dataset_name")
    add = group.add_argument
    add("--train_shards", nargs="+", metavar="TAR",
        help="WebDataset shards: .tar files, folders of them, brace patterns; also s3://, https:// and pipe:COMMAND")
    add("--val_shards", nargs="+", metavar="TAR", help="shards for the validation loss")
    add("--train_data_dir", metavar="DIR", help="image folder with metadata.jsonl (datasets' imagefolder layout)")
    add("--dataset_name", metavar="PATH|ID", help="dataset of the hub or a local one")
    add("--dataset_config_name", metavar="NAME", help="configuration of --dataset_name")
    add("--image_column", default="image", metavar="NAME",
        help="column of --train_data_dir or --dataset_name with the image")
    add("--caption_column", default="text", metavar="NAME",
        help="column with the caption; of a list the first is taken")
    add("--max_train_samples", type=int, metavar="N", help="train on N samples only, chosen by --seed")
    add("--max_bad_fraction", type=float, default=0.05, metavar="P",
        help="end the run when a larger share of the samples is damaged")
    add("--cache_dir", metavar="DIR", help="for downloads, shard copies, index and encodings; --output_dir by default")
    add("--resolution", type=int, default=1024, metavar="PX", help="side of the training crops, a multiple of 8")
    add("--crop", choices=["random_ar", "center", "bucket"],
        help="random_ar by default (refiner: center): a square near the middle of the long side; "
        "bucket: the size of about as many pixels whose shape is nearest, one size per step")
    add("--center_crop", **switch, help="same as --crop center")
    add("--random_flip", **switch, help="mirror half of the images")
    modes = ["nearest", "nearest_exact", "box", "bilinear", "hamming", "bicubic", "lanczos"]
    add("--image_interpolation_mode", choices=modes, default="lanczos", help="how images are resized")
    add("--species_csv", metavar="FILE",
        help="class counts: columns pokemon (or species) and count; counted from the data by default")
    add("--species_key", default="species_list", metavar="NAME",
        help="field of the samples' JSON with their class labels")
    add("--species_choice", choices=["first", "random"], default="random",
        help="which label counts when a sample has several")
    add("--species_mix", nargs=3, type=float, default=[0.2, 0.95, 6000], metavar=("START", "END", "STEPS"),
        help="classes are drawn from (1 - m) uniform + m data distribution, with m going from START to END in STEPS")
    add("--species_mix_schedule", choices=["linear", "cosine"], default="linear", help="how m goes from START to END")
    add("--aesthetic_key", default="ae_aesthetic", metavar="NAME",
        help="refiner: field of the samples' JSON with their aesthetic score")
    add("--aesthetic_scale", type=float, default=10.0, metavar="X",
        help="refiner: the score is the field divided by X, clipped to 1-10; 6 without the field")
    add("--train_batch_size", type=int, default=16, metavar="N", help="images per device and micro-step")
    add("--dataloader_num_workers", type=int, metavar="N",
        help="image-decoding processes per device; by the machine's cores by default")
    add("--cache_latents", **switch, help="encode every image once, to CACHE_DIR/encodings; not with --crop random_ar")


def add_conditioning_arguments(parser):
    group = parser.add_argument_group("Conditioning")
    add = group.add_argument
    add("--caption_dropout_rate", type=float, default=0.1, metavar="P",
        help="share of captions dropped, for classifier-free guidance")
    add("--long_captions", choices=["truncate", "chunk"], default="truncate",
        help="captions over 75 tokens: cut, or encoded in chunks of 75, up to 225, and concatenated")
    add("--dropped_caption", choices=["zeros", "empty"],
        help="what stands for a dropped caption; zeros by default (refiner: empty)")
    add("--cache_text_embeddings", **switch,
        help="encode every caption once, to CACHE_DIR/encodings; not with --train_text_encoder")


def add_loss_arguments(parser):
    group = parser.add_argument_group("Loss")
    add = group.add_argument
    add("--snr_gamma", type=float, metavar="G",
        help="min-SNR weighting (arXiv:2303.09556), 0 = off; 5 by default (refiner: 0)")
    add("--prediction_type", choices=["epsilon", "v_prediction"], help="the snapshot's own by default")
    add("--noise_offset", type=float, default=0.0, metavar="X",
        help="strength of noise that is constant over a channel")
    add("--refiner_timestep_band", nargs=2, type=int, default=[0, 200], metavar=("LOW", "HIGH"),
        help="refiner: timesteps it is trained on, both included")


def add_optimizer_arguments(parser):
    group = parser.add_argument_group("Optimizer")
    add = group.add_argument
    add("--optimizer", choices=["adamw", "adamw8bit", "prodigy"], default="adamw",
        help="prodigy wants --learning_rate 1")
    add("--use_8bit_adam", **switch, help="same as --optimizer adamw8bit")
    add("--learning_rate", type=float, default=1e-4, metavar="LR", help="peak learning rate")
    add("--text_encoder_lr_scale", type=float, default=0.3, metavar="X",
        help="the encoders' learning rate is LR times X (not with prodigy)")
    add("--scale_lr", **switch, help="multiply LR by devices x accumulation x batch size")
    add("--lr_scheduler", choices=[s.value for s in SchedulerType if "piecewise" not in s.value], default="cosine",
        help="learning-rate schedule")
    add("--lr_warmup_steps", type=int, metavar="STEPS", help="3%% of the run by default")
    add("--adam_beta1", type=float, default=0.9, metavar="B", help="Adam's first decay")
    add("--adam_beta2", type=float, default=0.999, metavar="B", help="Adam's second decay")
    add("--adam_weight_decay", type=float, default=1e-2, metavar="W", help="decoupled weight decay")
    add("--adam_epsilon", type=float, default=1e-8, metavar="E", help="Adam's epsilon")
    add("--max_grad_norm", type=float, default=1.0, metavar="G", help="gradients are clipped to this norm")
    add("--on_nonfinite", choices=["stop", "skip"], default="stop",
        help="at a loss or gradient that is not finite: stop, or leave the step out (waits for every step's numbers)")
    add("--max_train_steps", type=int, metavar="STEPS", help="optimizer steps; wins over --num_train_epochs")
    add("--num_train_epochs", type=int, default=100, metavar="N",
        help="passes over the data, ceil(images / global batch) steps each")
    add("--gradient_accumulation_steps", type=int, default=1, metavar="N", help="micro-steps per optimizer step")


def add_checkpoint_arguments(parser):
    group = parser.add_argument_group("Checkpoints")
    add = group.add_argument
    add("--output_dir", default="sd-model-finetuned-lora", metavar="DIR", help="everything the run writes")
    add("--overwrite_output_dir", **switch, help="start anew where checkpoints are, deleting them")
    add("--checkpointing_steps", type=int, default=500, metavar="STEPS",
        help="save a checkpoint every so many optimizer steps")
    add("--checkpointing_after_steps", type=int, default=0, metavar="STEPS", help="no checkpoint before this step")
    add("--checkpoints_total_limit", type=int, metavar="N", help="keep only the newest N checkpoints")
    add("--resume_from_checkpoint", metavar="latest|DIR", help="continue; `latest` starts fresh where there is none")
    add("--allow_batch_change", **switch, help="resume with another global batch; the pass goes on where it was")
    add("--push_to_hub", **switch, help="upload the LoRA and its card")
    add("--hub_token", metavar="TOKEN", help="hub token; never written anywhere")
    add("--hub_model_id", metavar="ID", help="repository on the hub; the name of --output_dir by default")


def add_validation_arguments(parser):
    group = parser.add_argument_group("Validation")
    add = group.add_argument
    add("--validation_prompt", metavar="TEXT", help="prompt of the sample pictures")
    add("--validation_prompts", metavar="FILE", help="several: one per line, or JSONL with a `prompt` field")
    add("--num_validation_images", type=int, default=4, metavar="N",
        help="pictures per prompt, seeds 0 to N-1 from --seed")
    add("--validation_steps", type=int, metavar="STEPS", help="validate every so many optimizer steps, and at the end")
    add("--validation_epochs", type=int, default=1, metavar="N",
        help="validate every N epochs when --validation_steps is not given")
    add("--validation_base_lora", metavar="FILE",
        help="refiner: LoRA of the base model, which begins the sample pictures")
    add("--denoising_start", type=float, default=0.8, metavar="P",
        help="refiner: share of the denoising steps that the base model makes of a sample picture")
    add("--val_max_batches", type=int, metavar="N", help="stop the validation loss after N batches")


def add_run_arguments(parser):
    group = parser.add_argument_group("Run")
    add = group.add_argument
    add("--config", is_config_file=True, metavar="FILE", help="YAML file of any of these flags; the command line wins")
    add("--seed", type=int, metavar="N", help="every random draw is a function of it; chosen and noted when not given")
    add("--mixed_precision", choices=["no", "fp16", "bf16"],
        help="precision of the frozen models and of the computation; adapters are always fp32")
    add("--allow_tf32", **switch, help="TF32 matrix products on NVIDIA GPUs (convolutions are by default)")
    add("--deterministic", action=argparse.BooleanOptionalAction, default=True,
        help="kernels that give the same bits every time; without them a GPU is faster and a resumed run nearly equal")
    add("--report_to", default="tensorboard", metavar="NAME",
        help="tensorboard, wandb, comet_ml, all or none; metrics.jsonl is always written")
    add("--logging_dir", default="logs", metavar="DIR",
        help="for TensorBoard and the ranks' logs, inside --output_dir")
    add("--logging_steps", type=int, default=10, metavar="STEPS", help="log metrics every so many optimizer steps")
    add("--dry_run", **switch, help="check everything but the UNet's weights, "
        "write OUTPUT_DIR/preview (samples as the network will see them, species, captions, memory), exit")
# fmt: on


class Parser(configargparse.ArgParser):
    """Ends with one line, `prog: error: --flag: …`; the usage is in --help."""

    def error(self, message):
        message = " ".join(message.split()).removeprefix("argument ")
        kind, _, words = message.partition(": ")
        flag = words.split(" ")[0].split("=")[0]
        if kind == "unrecognized arguments":
            near = difflib.get_close_matches(flag, self._option_string_actions, 1)
            message = f"{flag}: there is no such flag" + (f"; did you mean {near[0]}?" if near else "; see --help")
        elif kind == "the following arguments are required":
            message = f"{words}: missing; see --help"
        elif "config file" in message:
            message = f"--config: {message}"
        self.exit(2, f"{self.prog}: error: {message}\n")


def make_parser():
    parser = Parser(
        usage="%(prog)s --pretrained_model_name_or_path PATH|ID --train_shards TAR … --output_dir DIR [--FLAG VALUE]…",
        description="Train LoRA adapters for Stable Diffusion XL. The groups below are the rooms of the script.",
        config_file_parser_class=configargparse.YAMLConfigFileParser,
        formatter_class=lambda prog: HelpFormatter(prog, max_help_position=34, width=118),
        allow_abbrev=False,
        add_config_file_help=False,
        add_env_var_help=False,
    )
    add_model_arguments(parser)
    add_data_arguments(parser)
    add_conditioning_arguments(parser)
    add_loss_arguments(parser)
    add_optimizer_arguments(parser)
    add_checkpoint_arguments(parser)
    add_validation_arguments(parser)
    add_run_arguments(parser)
    return parser


def is_remote(path):
    """Whether `path` is a URL or a pipe, not a file of this machine."""
    return re.match(r"[a-z][a-z0-9]+:", path) is not None


def expand_shards(patterns):
    """Paths and URLs of the shards meant by `patterns`: files, folders of .tar (also in a bucket), braces, pipes.

    Errors: ValueError when one matches nothing or names a local file that is not there.
    """
    shards = []
    for pattern in patterns:
        if Path(pattern).is_dir():
            found = sorted(map(str, Path(pattern).glob("*.tar")))
        elif is_remote(pattern) and not pattern.startswith(("pipe:", "http")) and "." not in Path(pattern).name:
            filesystem, folder = fsspec.url_to_fs(pattern)
            found = [filesystem.unstrip_protocol(p) for p in sorted(filesystem.glob(folder.rstrip("/") + "/*.tar"))]
        else:
            found = [pattern] if pattern.startswith("pipe:") and "{" not in pattern else expand_urls(pattern)
        if not found:
            raise ValueError(f"no .tar file in {pattern}")
        missing = [p for p in found if not is_remote(p) and not Path(p).is_file()]
        if missing:
            raise ValueError(
                f"{pattern}: no file {missing[0]}" + (f" ({len(missing)} missing)" if len(missing) > 1 else "")
            )
        shards += found
    return shards


def read_species_csv(path):
    """{label: count}, labels casefolded. Errors: ValueError without the columns or with a bad count."""
    with open(path, newline="", encoding="utf-8-sig") as file:  # spreadsheets write a byte order mark
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        name = next((c for c in ("pokemon", "species") if c in columns), None)
        if name is None or "count" not in columns:
            raise ValueError(
                f"{path} has columns {', '.join(columns) or '(none)'}; expected pokemon (or species) and count"
            )
        counts = Counter()
        for row in reader:
            count = row["count"]
            try:
                usable = 0 <= float(count) < math.inf
            except (TypeError, ValueError):
                usable = False
            if not usable:
                raise ValueError(f"{path} line {reader.line_num}: count {count!r} is not a number of 0 or more")
            counts[(row[name] or "").strip().casefold()] += float(count)
    if not sum(counts.values()):
        raise ValueError(f"{path} counts nothing")
    return counts


def read_prompts(args):
    """Prompts of the sample pictures, from --validation_prompt and --validation_prompts."""
    prompts = [args.validation_prompt] if args.validation_prompt else []
    if args.validation_prompts:
        lines = [line.strip() for line in Path(args.validation_prompts).read_text(encoding="utf-8").splitlines()]
        for line in filter(None, lines):
            try:
                prompt = json.loads(line)["prompt"] if args.validation_prompts.endswith(".jsonl") else line
            except (KeyError, TypeError, json.JSONDecodeError):
                prompt = None
            if not isinstance(prompt, str):
                raise ValueError(f"{args.validation_prompts}: {line[:60]!r} is no JSON object with a `prompt` text")
            prompts.append(prompt)
        if not any(lines):
            raise ValueError(f"{args.validation_prompts} is empty; write one prompt per line")
    return prompts


def list_checkpoints(output_dir):
    """[(step, folder)] of the checkpoints in `output_dir`, oldest first."""
    found = [(re.fullmatch(r"checkpoint-(\d+)", p.name), p) for p in Path(output_dir).glob("checkpoint-*")]
    return sorted((int(match[1]), path) for match, path in found if match)


def checkpoint_path(args):
    """Folder named by --resume_from_checkpoint: a path, or as in diffusers' scripts a name inside --output_dir."""
    path = Path(args.resume_from_checkpoint)
    return path if path.is_dir() else Path(args.output_dir) / path.name


def default_workers(local_world):
    """Decoding processes per device: the machine's cores shared out, one left for the trainer, at most 8."""
    return max(0, min(8, (os.cpu_count() or 1) // local_world - 1))


def check_values(parser, args):
    """Ends with one line for a value out of range."""
    positive = (
        "rank lora_alpha text_encoder_rank text_encoder_alpha resolution train_batch_size gradient_accumulation_steps "
        "num_train_epochs max_train_steps max_train_samples checkpointing_steps checkpoints_total_limit logging_steps "
        "validation_steps validation_epochs num_validation_images val_max_batches aesthetic_scale"
    )
    shares = "lora_dropout caption_dropout_rate max_bad_fraction adam_beta1 adam_beta2 denoising_start"
    not_negative = (
        "learning_rate text_encoder_lr_scale adam_weight_decay adam_epsilon max_grad_norm lr_warmup_steps snr_gamma "
        "noise_offset dataloader_num_workers checkpointing_after_steps seed"
    )
    for names, is_valid, expected in (
        (positive, lambda x: x > 0, "a number above 0"),
        (shares, lambda x: 0 <= x <= 1, "a share between 0 and 1"),
        (not_negative, lambda x: 0 <= x < 2**63, "a number of 0 or more"),
    ):
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not is_valid(value):
                parser.error(f"--{name}: found {value}; expected {expected}")


def flag_rules(args):
    """[(flag, whether its rule is broken, what was found and what to do)] of rules among flags."""
    start, end, steps = args.species_mix
    low, high = args.refiner_timestep_band
    base, refiner = args.stage == "base", args.stage == "refiner"
    trackers = [str(tracker) for tracker in get_available_trackers()]
    sources = [f"--{name}" for name in ("train_shards", "train_data_dir", "dataset_name") if getattr(args, name)]
    return [
        ("species_mix", not (0 <= start <= 1 and 0 <= end <= 1 and steps >= 0),
            f"found {start} {end} {steps}; expected START and END in [0, 1] and STEPS of 0 or more"),
        ("resolution", args.resolution % 8, f"found {args.resolution}; the VAE works on multiples of 8 px"),
        ("resolution", args.crop == "bucket" and args.resolution % BUCKET_STEP,
            f"found {args.resolution}; --crop bucket works on multiples of {BUCKET_STEP} px"),
        ("center_crop", args.center_crop and args.crop != "center",
            f"contradicts --crop {args.crop}; give one of them"),
        ("use_8bit_adam", args.use_8bit_adam and args.optimizer == "prodigy",
            "contradicts --optimizer prodigy; give one of them"),
        ("mixed_precision", args.mixed_precision == "fp16" and not torch.cuda.is_available(),
            "fp16 needs a CUDA device (a CPU silently computes in fp32); use bf16 or no"),
        ("report_to", args.report_to not in ["all", "none", *trackers],
            f"{args.report_to} is not installed; found all, none, {', '.join(trackers)}"),
        ("hub_token", args.hub_token is not None and args.report_to in ("wandb", "all"),
            "W&B would record it with the command line; log in with `hf auth login` instead"),
        ("attention_backend", args.attention_backend == "cudnn" and args.deterministic and torch.cuda.is_available(),
            "cudnn sums in any order; give --no-deterministic or another one"),
        ("cache_latents", args.cache_latents and args.crop == "random_ar",
            "--crop random_ar moves the window at every step; give --crop center or bucket"),
        ("cache_text_embeddings", args.cache_text_embeddings and args.train_text_encoder,
            "contradicts --train_text_encoder, whose embeddings change; give one of them"),
        ("base_precision", args.base_precision != "auto" and args.use_dora,
            f"{args.base_precision} has no weights for --use_dora to take the norms of"),
        *((name, base and getattr(args, name), "found with --stage base; give --stage refiner or leave it out")
            for name in ("refiner_unet", "text_encoder_2_lora", "validation_base_lora")),
        ("refiner_unet", refiner and not args.refiner_unet, "missing; --stage refiner trains the UNet that it names"),
        ("train_text_encoder", refiner and args.train_text_encoder, "the refiner's encoder is frozen; train it with "
            "--stage base and give that LoRA to --text_encoder_2_lora"),
        ("snr_gamma", refiner and args.snr_gamma, f"found {args.snr_gamma}; the refiner takes 0: in its band min-SNR "
            "would weigh all by next to nothing (the noise there is weak)"),
        ("refiner_timestep_band", refiner and not 0 <= low <= high,
            f"found {low} {high}; expected 0 <= LOW <= HIGH"),
        ("train_shards, --train_data_dir or --dataset_name", len(sources) != 1,
            f"found {' and '.join(sources) or 'none'}; give exactly one"),
    ]  # fmt: skip


def looks_like_path(name):
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def path_rules(args):
    """As flag_rules, of files and folders that are not there or not what they should be."""
    snapshot = Path(args.pretrained_model_name_or_path).expanduser()
    unet = Path(args.refiner_unet or ".").expanduser()
    parts = ["unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"]
    missing = [part for part in parts if snapshot.is_dir() and not (snapshot / part).is_dir()]
    no_unet = not any(file.is_file() for file in (unet / "config.json", unet / "unet/config.json"))
    output_dir, resume = Path(args.output_dir), args.resume_from_checkpoint
    faults, readers = {}, {
        "train_shards": lambda: expand_shards(args.train_shards or []),
        "val_shards": lambda: expand_shards(args.val_shards or []),
        "species_csv": lambda: read_species_csv(args.species_csv) if args.species_csv else None,
        "validation_prompts": lambda: read_prompts(args),
    }  # fmt: skip
    for name, read in readers.items():
        try:
            read()
        except (OSError, ValueError) as error:
            faults[name] = error
    return [
        ("pretrained_model_name_or_path",
            looks_like_path(args.pretrained_model_name_or_path) and not snapshot.is_dir(),
            f"no folder {snapshot}; give an SDXL snapshot or a hub id"),
        ("pretrained_model_name_or_path", missing,
            f"{snapshot} has no {', '.join(missing)}; give a whole SDXL snapshot"),
        *((name, True, fault) for name, fault in faults.items()),
        ("refiner_unet", args.refiner_unet and looks_like_path(args.refiner_unet) and no_unet,
            f"no UNet in {unet}; expected config.json there or in its unet/"),
        *((name, path and not Path(path).is_file(), f"no file {path}; give a LoRA of the base stage, .safetensors")
            for name in ("text_encoder_2_lora", "validation_base_lora") for path in [getattr(args, name)]),
        ("train_data_dir", args.train_data_dir and not Path(args.train_data_dir).is_dir(),
            f"no folder {args.train_data_dir}"),
        ("output_dir", output_dir.exists() and not output_dir.is_dir(), f"{output_dir} is a file; give a folder"),
        ("resume_from_checkpoint", resume not in (None, "", "latest")
            and not (checkpoint_path(args) / "progress.json").is_file(),
            f"{resume} is no checkpoint folder; give one, or `latest`"),
        ("output_dir", not resume and not args.overwrite_output_dir and list_checkpoints(output_dir),
            f"{output_dir} holds checkpoints; continue with --resume_from_checkpoint latest, or start anew with "
            "--overwrite_output_dir"),
    ]  # fmt: skip


def parse_args(argv=None):
    """The checked flags, read-only from here on; defaults that depend on other flags are filled in."""
    parser = make_parser()
    args = parser.parse_args(argv)
    refiner = args.stage == "refiner"
    defaults = {
        "crop": "center" if args.center_crop or refiner else "random_ar",
        "dropped_caption": "empty" if refiner else "zeros",
        "snr_gamma": 0.0 if refiner else 5.0,
        "dataloader_num_workers": default_workers(int(os.environ.get("LOCAL_WORLD_SIZE", 1))),
        "lora_alpha": float(args.rank),
        "text_encoder_rank": args.rank,
        "text_encoder_alpha": float(args.text_encoder_rank or args.rank),
    }
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.use_8bit_adam and args.optimizer == "adamw":
        args.optimizer = "adamw8bit"
    check_values(parser, args)
    for rules in (flag_rules, path_rules):
        for flag, is_broken, message in rules(args):
            if is_broken:
                parser.error(f"--{flag}: {message}")
    return args


# ------------------------------------------------------------------------------
# 2 Models and LoRA
# ------------------------------------------------------------------------------


@dataclass
class Models:
    """What a stage trains and what it needs for that; only adapters ever train.

    The lists run over (text_encoder, text_encoder_2); the refiner reads the second alone.
    """

    tokenizers: list
    text_encoders: list
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    noise_scheduler: DDPMScheduler
    sampling_scheduler: diffusers.SchedulerMixin
    timestep_band: tuple  # (lowest, highest) that is trained on
    stage: str = "base"
    caption_chunks: int = 1  # pieces of 75 tokens that every caption is encoded in
    empty_prompt: tuple | None = None  # prompt_embeds and pooled_prompt_embeds of "", for cached captions
    base_pipeline: StableDiffusionXLPipeline | None = None  # begins the refiner's sample pictures; waits on the CPU


def weight_dtype_of(precision):
    """torch dtype of "no", "fp32", "bf16" or "fp16"."""
    return {"no": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def load_part(args, loader, subfolder, flag="--pretrained_model_name_or_path", **options):
    """What `loader` makes of the folder named by `flag`. Errors: InputError naming it when that does not load."""
    path = getattr(args, flag.removeprefix("--"))
    if flag != "--refiner_unet":
        options["revision"] = args.revision
    try:
        return loader(path, subfolder=subfolder, cache_dir=args.cache_dir, **options)
    except Exception as error:  # libraries raise what they like for a torn or empty file
        raise InputError(f"{flag}: cannot load {subfolder or 'the model'} of {path}: {error}") from error


def load_unet(args, text_encoders, weight_dtype, weights):
    """The UNet of --stage, without its `weights` on the meta device. Errors: InputError for one of another kind."""
    flag, subfolder = "--pretrained_model_name_or_path", "unet"
    if args.stage == "refiner":
        flag = "--refiner_unet"
        subfolder = None if (Path(args.refiner_unet).expanduser() / "config.json").is_file() else "unet"
    config = load_part(args, UNet2DConditionModel.load_config, subfolder, flag)
    time_ids = TIME_IDS[args.stage] * config.get("addition_time_embed_dim", 0)
    expected = {
        "cross_attention_dim": sum(encoder.config.hidden_size for encoder in text_encoders),
        "projection_class_embeddings_input_dim": text_encoders[-1].config.projection_dim + time_ids,
    }
    for name, value in expected.items():
        if config.get(name) != value:
            found = f"{name} of {getattr(args, flag.removeprefix('--'))} is {config.get(name)}"
            raise InputError(f"{flag}: {found}; a {args.stage} UNet for this snapshot has {value}")
    if weights:
        options = {"dtype": weight_dtype, "variant": args.variant}
        return load_part(args, UNet2DConditionModel.from_pretrained, subfolder, flag, **options)
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config).to(weight_dtype)


def merge_text_encoder_2_lora(text_encoder_2, path):
    """Adds the text_encoder_2 part of a base-stage LoRA, diffusers' or kohya's format, to the encoder's weights.

    Errors: InputError when the file does not load, fit or have such a part.
    """
    flag, loader = "--text_encoder_2_lora", StableDiffusionXLPipeline
    try:
        state, alphas, metadata = loader.lora_state_dict(path, return_lora_metadata=True, use_safetensors=True)
        with safetensors.safe_open(path, "pt") as file:
            if "dora_scale" in " ".join(file.keys()):
                raise ValueError("diffusers cannot read DoRA in kohya's format; give the file in diffusers' format")
        if not any(key.startswith("text_encoder_2.") for key in state):
            raise ValueError("it has no text_encoder_2 part; train the base with --train_text_encoder")
        loader.load_lora_into_text_encoder(state, alphas, text_encoder_2, "text_encoder_2", metadata=metadata)
    except Exception as error:  # libraries raise what they like for a torn or foreign file
        raise InputError(f"{flag}: {path}: {' '.join(str(error).split())[:300]}") from error
    for module in text_encoder_2.modules():
        if isinstance(module, LoraLayer):
            module.merge()
    recurse_remove_peft_layers(text_encoder_2)


def load_models(args, weight_dtype, device, unet_weights=True):
    """Models of --stage, frozen: UNet (still on the CPU) and encoders in `weight_dtype`, VAE in --vae_precision.

    Without `unet_weights` the UNet is made from its configuration on the meta device. Errors: InputError naming the
    flag when a part does not load.
    """
    flag = "--pretrained_model_name_or_path"
    suffixes = ("", "_2") if args.stage == "base" else ("_2",)
    tokenizers = [load_part(args, CLIPTokenizer.from_pretrained, f"tokenizer{suffix}") for suffix in suffixes]
    if min(len(tokenizer) for tokenizer in tokenizers) < 10:
        raise InputError(f"{flag}: a tokenizer of {args.pretrained_model_name_or_path} has no vocabulary")
    classes, text_encoders = {"": CLIPTextModel, "_2": CLIPTextModelWithProjection}, []
    for suffix in suffixes:
        merges = bool(args.text_encoder_2_lora)  # in fp32, so that the sum alone is rounded
        options = {"dtype": torch.float32 if merges else weight_dtype, "variant": args.variant}
        encoder = load_part(args, classes[suffix].from_pretrained, f"text_encoder{suffix}", **options)
        if merges:
            merge_text_encoder_2_lora(encoder, args.text_encoder_2_lora)
        text_encoders.append(encoder.to(weight_dtype))
    unet = load_unet(args, text_encoders, weight_dtype, unet_weights)
    own_vae = "--pretrained_vae_model_name_or_path"
    place = (None, own_vae) if args.pretrained_vae_model_name_or_path else ("vae", flag)
    options = {"dtype": weight_dtype_of(args.vae_precision), "variant": args.variant}
    vae = load_part(args, AutoencoderKL.from_pretrained, *place, **options)
    for model in (vae, *text_encoders):
        model.to(device)
    for model in (vae, unet, *text_encoders):
        model.requires_grad_(False).eval()
    config = load_part(args, DDPMScheduler.load_config, "scheduler")
    if args.prediction_type:
        config["prediction_type"] = args.prediction_type
    noise_scheduler = DDPMScheduler.from_config(config)  # whatever the snapshot samples with, on the same betas
    last = noise_scheduler.config.num_train_timesteps - 1
    low, high = (0, last) if args.stage == "base" else args.refiner_timestep_band
    if high > last:
        raise InputError(f"--refiner_timestep_band: found {low} {high}; the snapshot's last timestep is {last}")
    return Models(
        tokenizers=tokenizers,
        text_encoders=text_encoders,
        vae=vae.to(memory_format=torch.channels_last),  # its convolutions take a third less time
        unet=unet,
        noise_scheduler=noise_scheduler,
        sampling_scheduler=getattr(diffusers, config["_class_name"]).from_config(config),
        timestep_band=(low, high),
        stage=args.stage,
    )


def load_base_pipeline(args, models, weight_dtype):
    """The base model with --validation_base_lora, on the CPU, to begin the refiner's sample pictures."""
    options = {"dtype": weight_dtype, "variant": args.variant, "vae": None, "add_watermarker": False}
    pipeline = load_part(args, StableDiffusionXLPipeline.from_pretrained, None, **options)
    pipeline.register_modules(scheduler=models.sampling_scheduler)
    pipeline.set_progress_bar_config(disable=True)
    if args.validation_base_lora:
        try:
            pipeline.load_lora_weights(args.validation_base_lora, use_safetensors=True)
        except Exception as error:  # as above
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"--validation_base_lora: {args.validation_base_lora}: {reason}") from error
    return pipeline


def fingerprint_parts(*parts):
    """Hash of the first numbers of every tensor of frozen models: other models have another."""
    heads = [tensor.detach().flatten()[:8].float().cpu() for part in parts for tensor in part.state_dict().values()]
    return hashlib.blake2b(torch.cat(heads).numpy().tobytes(), digest_size=8).hexdigest()


class FusedLora(lora.Linear):
    """PEFT's LoRA layer, x W + s x A B (arXiv:2106.09685), with fp32 masters and the arithmetic in the input's dtype.

    The sum is made by the kernel of the product with B, x (…, in) → (…, out); state-dict keys are PEFT's.
    """

    def forward(self, x, *args, **kwargs):
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        (name,) = self.active_adapters
        down, up = (factor[name].weight.to(x.dtype) for factor in (self.lora_A, self.lora_B))
        hidden = F.linear(self.lora_dropout[name](x), down)
        result = self.base_layer(x, *args, **kwargs)
        flat = result.flatten(0, -2), hidden.flatten(0, -2)
        return torch.addmm(*flat, up.t(), alpha=self.scaling[name]).view_as(result)


class CastLinear(torch.nn.Linear):
    """A Linear with fp32 master weights that computes in its input's dtype; state-dict keys and gradients stay."""

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


# Seam: which layers get an adapter. Contract: the names exist in the model and get a gradient (both are checked).
def add_adapter(model, targets, flag, **options):
    """Puts fp32 LoRA masters on the layers of `model` named by `targets`.

    Without autocast the frozen layers compute in their own dtype and the adapters' weights are cast to it: the
    activations are never upcast. Errors: InputError naming `flag` when a target matches no layer.
    """
    names = [name for name, _ in model.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith("." + target) for name in names):
            raise InputError(f"{flag}: no layer of {type(model).__name__} is called {target}")
    try:
        model.add_adapter(LoraConfig(target_modules=list(targets), init_lora_weights="gaussian", **options))
    except ValueError as error:
        raise InputError(f"{flag}: {' '.join(targets)}: not all of these layers can take an adapter") from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for layer in (m for m in model.modules() if isinstance(m, LoraLayer)):
        if type(layer) is lora.Linear and not layer.lora_variant:  # DoRA is one
            layer.__class__ = FusedLora
            continue
        adapters = [*layer.lora_A.values(), *layer.lora_B.values()]
        if all(type(linear) is torch.nn.Linear for linear in adapters):
            layer.cast_input_dtype_enabled = False
            for linear in adapters:
                linear.__class__ = CastLinear
    return model.train()  # LoRA dropout and gradient checkpointing look at this


def add_adapters(args, models, seed):
    """Adapters on the UNet and, with --train_text_encoder, on both encoders; returns the trained models by name."""
    torch.manual_seed(seed)
    kind = {"lora_dropout": args.lora_dropout, "use_dora": args.use_dora, "use_rslora": args.use_rslora}
    add_adapter(
        models.unet, args.lora_target_modules, "--lora_target_modules", r=args.rank, lora_alpha=args.lora_alpha, **kind
    )
    trained = {"unet": models.unet}
    if args.train_text_encoder:
        kind |= {"r": args.text_encoder_rank, "lora_alpha": args.text_encoder_alpha}
        targets = ("q_proj", "k_proj", "v_proj", "out_proj")
        for name, encoder in zip(("text_encoder", "text_encoder_2"), models.text_encoders):
            layers = encoder.config.num_hidden_layers
            if name == "text_encoder":  # SDXL reads its penultimate states: the last layer would get no gradient
                layers -= 1
            add_adapter(encoder, targets, "--train_text_encoder", layers_to_transform=list(range(layers)), **kind)
            trained[name] = encoder
    return trained


# ---- speed and memory: nothing here changes what is computed, beyond rounding


class DequantizedProduct(torch.autograd.Function):
    """x W^T + b of int8 weights with a scale a row, in x's dtype. For the backward it keeps W alone.

    bitsandbytes' layer keeps x too, where checkpointing cannot free it, and rounds x to int8 on CUDA.
    """

    @staticmethod
    def forward(ctx, x, weight, scale, bias):
        ctx.save_for_backward(weight, scale)
        return F.linear(x, weight.to(x.dtype) * scale.to(x.dtype), bias)

    @staticmethod
    def backward(ctx, grad):
        weight, scale = ctx.saved_tensors
        return grad @ (weight.to(grad.dtype) * scale.to(grad.dtype)), None, None, None


class Int8Linear(torch.nn.Linear):
    """A frozen Linear in int8, each row of weights with its own scale."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, device="meta")
        weight = linear.weight.detach().float()
        self.register_buffer("scale", weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127)
        self.weight = torch.nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        return DequantizedProduct.apply(x, self.weight, self.scale, self.bias)


def make_nf4_linear(linear, compute_dtype):
    """bitsandbytes' layer with a Linear's weights; .to(device) quantizes them. Errors: InputError without it."""
    try:
        import bitsandbytes.nn as bnb
    except ImportError as error:
        raise InputError(f"--base_precision: nf4 needs bitsandbytes, which does not load: {error}") from error
    shape = linear.in_features, linear.out_features, linear.bias is not None
    small = bnb.Linear4bit(*shape, compute_dtype=compute_dtype, quant_type="nf4", device="meta")
    small.weight = bnb.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    small.bias = linear.bias
    small.support_avx512bf16_for_cpu = False  # in eval() it would pack the weights anew, for good and without gradient
    return small


def quantize_linears(model, precision, compute_dtype):
    """Replaces the linear layers by ones in "nf4" (arXiv:2305.14314) or "int8"."""
    for parent in list(model.modules()):
        for name, linear in parent.named_children():
            if type(linear) is torch.nn.Linear:
                small = Int8Linear(linear) if precision == "int8" else make_nf4_linear(linear, compute_dtype)
                setattr(parent, name, small)


class SdpaAttention(AttnProcessor2_0):
    """diffusers' attention with one of PyTorch's kernels, also where a checkpointed block computes it again."""

    def __init__(self, backend):
        super().__init__()
        self.backend = backend

    def __call__(self, *args, **kwargs):
        with sdpa_kernel(self.backend):
            return super().__call__(*args, **kwargs)


def set_attention(unet, name):
    """Makes the UNet attend with --attention_backend `name`. Errors: InputError when that cannot run here."""
    if name == "sdpa":
        return
    try:
        if name == "xformers":
            unet.enable_xformers_memory_efficient_attention()
        else:
            unet.set_attn_processor(SdpaAttention(SDPA_BACKENDS[name]))
        options = {"device": unet.device, "dtype": unet.dtype}
        attention = next(m for m in unet.modules() if isinstance(m, Attention) and m.is_cross_attention)
        x = torch.zeros(1, 16, attention.query_dim, requires_grad=True, **options)
        attention(x, torch.zeros(1, 77, attention.cross_attention_dim, **options)).sum().backward()
    except Exception as error:  # whatever the kernels and their packages raise
        where, reason = f"{unet.device.type} in {unet.dtype}", " ".join(str(error).split())[:200]
        raise InputError(f"--attention_backend: {name} does not run here, on {where}: {reason}") from error


def choose_checkpointing(mode, device, dtype, batch_size, resolution, reserved=0):
    """--gradient_checkpointing `mode`, for "auto" the least that leaves a fifth of the GPU's free memory free.

    `reserved` are bytes that are free now and will not be, such as those of a UNet on the meta device.
    """
    if mode != "auto":
        return mode
    if device.type != "cuda":
        return "none"
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(device)[0] - reserved
    needed = batch_size * resolution**2 / 1024**2 * dtype.itemsize / 2
    return next((mode for mode, size in ACTIVATION_BYTES.items() if needed * size < 0.8 * free), "full")


def set_checkpointing(unet, mode, dropout):
    """Recomputes activations in the backward, all or those of the transformer blocks; `dropout` repeats its masks."""

    def recompute(module, *inputs):
        options = {"use_reentrant": False, "preserve_rng_state": dropout, "determinism_check": "none"}
        return checkpoint(module.__call__, *inputs, **options)

    unet.enable_gradient_checkpointing(recompute)
    for module in unet.modules():
        if mode == "blocks" and not isinstance(module, Transformer2DModel):
            module.gradient_checkpointing = False


def compile_blocks(unet):
    """Compiles the transformer blocks, each shape on its own, so that a resumed run computes with the same kernels.

    Where a compiler is missing or fails, a warning is logged and the blocks stay as they are.
    """
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    torch._dynamo.config.optimize_ddp = False  # would split blocks whose gradients exceed a bucket
    try:
        torch.compile(lambda x: x.sin() + x.cos())(torch.zeros(8, device=unet.device))
    except Exception as error:  # whatever compilers raise
        logger.warning("--compile: goes on uncompiled: %s", " ".join(str(error).split())[:200])
        return
    torch._dynamo.config.suppress_errors = True  # a block that fails later goes on uncompiled too
    unet.compile_repeated_blocks(dynamic=False)


def set_speed(args, models, trained, device):
    """Applies --attention_backend, --gradient_checkpointing and --compile to what is trained."""
    set_attention(models.unet, args.attention_backend)
    size = models.unet.dtype, args.train_batch_size, args.resolution
    mode = choose_checkpointing(args.gradient_checkpointing, device, *size)
    if args.gradient_checkpointing == "auto":
        logger.info("--gradient_checkpointing auto: %s", mode)
    if mode != "none":
        set_checkpointing(models.unet, mode, dropout=args.lora_dropout > 0)
        for name in trained.keys() - {"unet"}:
            trained[name].gradient_checkpointing_enable()
    if args.compile:
        compile_blocks(models.unet)


def make_parameter_groups(trained, learning_rate, text_encoder_lr_scale):
    """One optimizer group per trained model; together they hold every trainable parameter once."""
    groups = []
    for name, model in trained.items():
        scale = 1.0 if name == "unet" else text_encoder_lr_scale
        parameters = [p for p in model.parameters() if p.requires_grad]
        peak = learning_rate * scale
        groups.append({"params": parameters, "lr": peak, "initial_lr": peak, "name": name})
    return groups


# ------------------------------------------------------------------------------
# 3 Data: shard → index → plan (accepted rows) → decoded → cropped → batched
# ------------------------------------------------------------------------------

# Purposes of the random numbers: each draw is a hash of (purpose, seed, what it is drawn for), so none depends on
# process count, worker count, prefetching or the clock.
ORDER, ACCEPT, LABEL, CROP, FLIP, REPLACE, SUBSET, SAMPLE, DROPOUT_MASK, BUCKET = range(10)


def hash64(*parts):
    """uint64 hash of integers (arrays broadcast), by chained splitmix64 (Steele et al., OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        state = np.uint64(0x9E3779B97F4A7C15)
        for part in parts:
            state = (state ^ np.asarray(part).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def uniform(*parts):
    """float64 in [0, 1): the top 53 bits of hash64."""
    return (hash64(*parts) >> np.uint64(11)) * 2.0**-53


def torch_seed(*parts):
    """hash64 as a seed that torch.Generator takes."""
    return int(hash64(*parts) >> np.uint64(1))


def hash_text(text):
    """uint64 hash of a string, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def write_file(path, *parts):
    """Bytes, one part after the other, to `path`: there whole or not at all, on the disk when this returns."""
    partial = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.partial")
    with open(partial, "wb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_safetensors(path, tensors, metadata):
    """safetensors with a sorted header, so that equal tensors are equal bytes."""
    raw = safetensors.torch.save(tensors, {"format": "pt", **metadata})
    size = int.from_bytes(raw[:8], "little")
    header = json.dumps(json.loads(raw[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    write_file(path, len(header).to_bytes(8, "little"), header, memoryview(raw)[8 + size :])  # uncopied: it is large


# ---- sources: shards as byte ranges, wherever they lie


def persist(action, path):
    """action(), tried again while the network or the server fails. Errors: OSError naming `path` when that goes on."""
    for attempt in range(IO_ATTEMPTS):
        try:
            return action()
        except (FileNotFoundError, PermissionError) as error:
            raise type(error)(f"{path}: {error}") from error
        except (OSError, aiohttp.ClientError) as error:
            if attempt + 1 == IO_ATTEMPTS or 400 <= getattr(error, "status", 0) < 500:
                raise OSError(f"{path}: {error!r} in {attempt + 1} tries") from error
            time.sleep(0.5 * 2**attempt)


def copy_whole(path, stamp, cache_dir):
    """A copy of a URL's or pipe's bytes in `cache_dir`: made once per machine, there whole or not at all."""
    folder = Path(cache_dir) / "shards"
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / f"{hash_text(f'{path} {stamp}'):016x}.tar"
    partial = copy.with_suffix(".partial")

    def download():
        if path.startswith("pipe:"):
            command = ["bash", "-o", "pipefail", "-c", path.removeprefix("pipe:")]
            with open(partial, "wb") as file:
                status = subprocess.run(command, stdout=file).returncode
            if status:
                raise OSError(f"exit status {status}")
        else:
            with urllib.request.urlopen(path, timeout=60) as response, open(partial, "wb") as file:
                shutil.copyfileobj(response, file, 1 << 20)
        expected = stamp.split()[0]  # of a pipe nobody knows
        if expected not in ("None", str(partial.stat().st_size)):
            raise OSError(f"{partial.stat().st_size} bytes, expected {expected}")

    with open(copy.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be copying it
        if not copy.exists():
            persist(download, path)
            os.replace(partial, copy)
    return str(copy)


class Shard:
    """The bytes of one shard or image file: a local file, a URL read by ranges, or a copy of what gives no ranges.

    `stamp` changes with the content: size and time of a file, size and ETag of a URL; of a pipe it is constant.
    Objects are for the process that made them: the connections do not survive a fork.
    """

    def __init__(self, path, cache_dir):
        self.path, self.block, self.checked = path, (0, b""), time.monotonic()
        self.copied, self.stamp = path.startswith("pipe:"), "None"
        if not self.copied:
            self.filesystem, self.url = fsspec.url_to_fs(path)
            self.stamp = self.current_stamp()
            self.copied = path.startswith("http") and not persist(self.gives_ranges, path)
        if self.copied:
            self.filesystem, self.url = fsspec.url_to_fs(copy_whole(path, self.stamp, cache_dir))
            self.size = self.filesystem.size(self.url)

    def gives_ranges(self):
        """Whether the web server sends the bytes asked for and not the whole file."""
        request = urllib.request.Request(self.path, headers={"Range": "bytes=0-0"})
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status == 206

    def current_stamp(self):
        if self.copied:
            return self.stamp
        self.filesystem.invalidate_cache()
        info = persist(lambda: self.filesystem.info(self.url), self.path)
        self.size = info["size"]
        times = (info.get(name) for name in ("ETag", "LastModified", "Last-Modified", "mtime"))
        return f"{self.size} {next(filter(None, times), None)}"

    def check_stamp(self, expected):
        """Errors: OSError when the shard is not the one that was indexed."""
        if is_remote(self.path) and time.monotonic() - self.checked < STAMP_SECONDS:
            return
        self.stamp, self.checked = self.current_stamp(), time.monotonic()
        if expected is not None and self.stamp != expected:
            raise OSError(f"{self.path}: changed while the run was reading it; start again to index it anew")

    def read(self, offset, size):
        """`size` bytes from `offset`. Errors: OSError when there are fewer, or the network fails for good."""

        def attempt():
            data = self.filesystem.cat_file(self.url, start=offset, end=offset + size)
            if len(data) != size:
                raise OSError(f"{self.path}: {len(data)} bytes at {offset}, expected {size}; changed since indexing?")
            return data

        return persist(attempt, self.path) if is_remote(self.path) else attempt()

    def peek(self, offset, size):
        """read(), through a block of READ_AHEAD bytes: for the small members that lie together between images."""
        start, block = self.block
        if not start <= offset <= offset + size <= start + len(block):
            block = self.read(offset, max(size, min(READ_AHEAD, self.size - offset)))
            start, self.block = offset, (offset, block)
        return block[offset - start : offset - start + size]


# ---- index: one pass over the shards' headers


INDEX_SCHEMA = pa.schema(
    [("key", pa.string()), ("image_id", pa.string()), ("caption", pa.string()), ("labels", pa.list_(pa.string()))]
    + [("width", pa.int32()), ("height", pa.int32()), ("score", pa.float32())]
    + [("path", pa.string()), ("offset", pa.int64()), ("size", pa.int64())]
)


def iter_tar_members(shard, report):
    """(name, offset, size, head) of the regular files in a Shard; verifies the headers' checksums.

    `head` is a file's first HEADER_BYTES, which came with its tar header. Damage is told to report(reason) and stands
    as None among the members; after a bad header the scan goes on at the next block that is a good one, and to the
    end of the file: zero blocks may be an archive's end, damage, or black pixels after a lost header.
    """
    position, long_name, lost, zero_blocks = 0, None, False, 0
    while position + 512 <= shard.size:
        block = shard.peek(position, 512)
        position += 512
        try:
            member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.EOFHeaderError:
            zero_blocks += 1
            continue
        except tarfile.HeaderError:
            if not lost:
                report(f"bad tar header: at byte {position - 512}")
                yield None
            lost, zero_blocks = True, 0
            continue
        if zero_blocks and not lost:
            report(f"zero blocks: before byte {position - 512}")
            yield None
        lost, zero_blocks = False, 0
        if position + member.size > shard.size:
            return report(f"shard cut short: inside {long_name or member.name}")
        if member.type == tarfile.GNUTYPE_LONGNAME:
            long_name = shard.peek(position, member.size).rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif member.type == tarfile.XHDTYPE:  # pax: lines "LENGTH key=value"
            found = re.search(rb"^\d+ path=(.*)$", shard.peek(position, member.size), re.MULTILINE)
            long_name = found[1].decode("utf-8", "surrogateescape") if found else None
        elif member.isreg():
            head = shard.peek(position, min(member.size, HEADER_BYTES))
            yield long_name or member.name, position, member.size, head
            long_name = None
        position += -(-member.size // 512) * 512
    if zero_blocks < 2:
        report("shard cut short: no end-of-archive mark")


def group_members(members):
    """Yields (sample key, {extension: (offset, size, head)}); a sample's key is its members' path up to the first dot.

    A sample beside damage (None among the members) has the extension "damage": a member of it may be lost.
    """
    current, sample, beside_damage = None, {}, False
    for member in members:
        if member is None:
            beside_damage = True
            sample["damage"] = None
            continue
        name, *place = member
        folder, _, filename = name.rpartition("/")
        stem, _, extension = filename.partition(".")
        key, extension = f"{folder}/{stem}" if folder else stem, extension.lower()
        if key != current or extension in sample:
            if current is not None:
                yield current, sample
            current, sample = key, {"damage": None} if beside_damage else {}
        sample[extension] = tuple(place)
        beside_damage = False
    if current is not None:
        yield current, sample


def read_labels(metadata, species_key):
    """Casefolded labels of one sample: a list, or a string "a, b". Errors: ValueError when it is something else."""
    labels = metadata.get(species_key) or []
    labels = labels.split(",") if isinstance(labels, str) else labels
    if not isinstance(labels, list):
        raise ValueError(f"{species_key} is {labels!r}, not a list or a text")
    names = [str(label).strip().casefold() for label in labels if label is not None]
    return list(dict.fromkeys(name for name in names if name))


def number_or_none(value):
    """`value` when it is a number that a column can hold, else None."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and abs(value) < 2**31 else None


def oriented_size(image):
    """(height, width) of a PIL image as its EXIF orientation turns it. Errors: ValueError for a decompression bomb."""
    width, height = image.size
    if width * height > MAX_IMAGE_PIXELS:
        raise ValueError(f"decompression bomb: {width}x{height} px is too large")
    # a PNG's EXIF may stand behind the pixels, and Pillow would decode them to look for it
    has_exif = image.format != "PNG" or {"exif", "Raw profile type exif"} & image.info.keys()
    turned = has_exif and image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    return (width, height) if turned else (height, width)


def measure_image(head, read_all=None):
    """oriented_size from the first bytes of a file, or from all where these are too few.

    Errors: ValueError when it is no image or a decompression bomb.
    """
    try:
        return oriented_size(Image.open(io.BytesIO(head)))
    except Exception:  # Pillow wants the whole of a WebP, and of a JPEG with long EXIF
        data = read_all() if read_all is not None else head
    try:
        return oriented_size(Image.open(io.BytesIO(data)))
    except ValueError:
        raise
    except Exception as error:  # decoders raise what they like on damaged files
        raise ValueError(f"cannot decode image: {error}") from None


def index_sample(shard, key, members, species_key, aesthetic_key):
    """The index row of one sample. Errors: ValueError with what is damaged."""

    def content(extension):
        offset, size, head = members[extension]
        return head if len(head) == size else shard.read(offset, size)

    image = next((e for e in IMAGE_EXTENSIONS if e in members), None)
    if image is None:
        raise ValueError("no image")
    offset, size, head = members[image]
    if size == 0:
        raise ValueError("image of zero bytes")
    if "txt" not in members:
        raise ValueError("no caption")
    if "damage" in members and "json" not in members:
        raise ValueError("no .json, beside a damaged header")
    try:
        caption = content("txt").decode("utf-8").strip()
    except UnicodeDecodeError:
        raise ValueError("caption is not UTF-8") from None
    if not caption:
        raise ValueError("empty caption")
    try:
        metadata = json.loads(content("json")) if "json" in members else {}
    except ValueError:
        raise ValueError("bad JSON") from None
    if not isinstance(metadata, dict):
        raise ValueError("JSON is not an object")
    image_id = str(metadata.get("image_id") or f"{shard.path.rpartition('/')[2]}/{key}")
    if not image_id.isprintable():  # a lone surrogate, say
        raise ValueError("image_id is not text")
    height, width = measure_image(head, lambda: content(image))
    return {
        "key": key,
        "image_id": image_id,
        "caption": caption,
        "labels": read_labels(metadata, species_key),
        "width": width,
        "height": height,
        "score": number_or_none(metadata.get(aesthetic_key)),
        "path": shard.path,
        "offset": offset,
        "size": size,
    }


def index_shard(shard, species_key, aesthetic_key="ae_aesthetic"):
    """(rows, damage) of a Shard: index rows, and [{"shard", "key", "reason"}] of what cannot be used."""
    rows, damage, seen = [], [], set()

    def report(reason, key=None):
        damage.append({"shard": shard.path, "key": key, "reason": reason})

    for key, members in group_members(iter_tar_members(shard, report)):
        if key in seen:
            report("duplicate key", key)
            continue
        seen.add(key)
        try:
            rows.append(index_sample(shard, key, members, species_key, aesthetic_key))
        except ValueError as error:
            report(str(error), key)
    return rows, damage


def cached_index_shard(path, cache_dir, species_key, aesthetic_key="ae_aesthetic"):
    """Index table of one shard, from the cache when its stamp is the shard's; damage and stamp are in its metadata."""
    shard = Shard(path, cache_dir.parent)
    name = path if is_remote(path) else os.path.abspath(path)
    read = f"{INDEX_VERSION} {name} {shard.stamp} {species_key} {aesthetic_key}"
    cached = cache_dir / f"{hash_text(read):016x}.parquet"
    if not cached.exists():
        rows, damage = index_shard(shard, species_key, aesthetic_key)
        notes = {"damage": json.dumps(damage), "stamp": json.dumps({path: shard.stamp})}
        table = pa.Table.from_pylist(rows, INDEX_SCHEMA).replace_schema_metadata(notes)
        partial = cached.with_suffix(f".{os.getpid()}.tmp")
        pa.parquet.write_table(table, partial)
        os.replace(partial, cached)  # appears whole or not at all; another process may have made the same file
    return pa.parquet.read_table(cached)


def load_dataset(args):
    """The table of --train_data_dir (imagefolder) or --dataset_name (hub, folder, save_to_disk), images undecoded.

    Errors: InputError naming the flag when it does not load or a column is missing.
    """
    flag = "--train_data_dir" if args.train_data_dir else "--dataset_name"
    source = args.train_data_dir or args.dataset_name
    try:
        if args.train_data_dir:
            table = datasets.load_dataset("imagefolder", data_dir=source, split="train", cache_dir=args.cache_dir)
        elif (Path(source) / "dataset_info.json").exists() or (Path(source) / "dataset_dict.json").exists():
            table = datasets.load_from_disk(source)
            table = table["train"] if isinstance(table, datasets.DatasetDict) else table
        else:
            table = datasets.load_dataset(source, args.dataset_config_name, split="train", cache_dir=args.cache_dir)
    except Exception as error:  # the libraries below raise what they like
        raise InputError(f"{flag}: {source}: {error}") from error
    for column_flag, column in (("--image_column", args.image_column), ("--caption_column", args.caption_column)):
        if column not in table.column_names:
            raise InputError(f"{column_flag}: {source} has columns {', '.join(table.column_names)}; found no {column}")
    if not isinstance(table.features[args.image_column], datasets.Image):
        raise InputError(f"--image_column: {args.image_column} of {source} holds no images")
    return table.cast_column(args.image_column, datasets.Image(decode=False))


def index_dataset(table, args):
    """(rows, damage) of a table of load_dataset: images are files, or bytes in the row that `offset` says."""
    source, rows, damage = args.train_data_dir or args.dataset_name, [], []
    for i, row in enumerate(table):
        image, caption = row[args.image_column] or {}, row[args.caption_column]
        caption = next(iter(caption), None) if isinstance(caption, list) else caption
        data, path = image.get("bytes"), image.get("path")
        name = os.path.relpath(path, source) if args.train_data_dir else f"row {i}"
        try:
            if not str(caption or "").strip():
                raise ValueError("no caption")
            if data is None:
                data = Path(path).read_bytes()
                place = {"path": path, "offset": 0, "size": len(data)}
            else:
                place = {"path": IN_TABLE, "offset": i, "size": -1}
            height, width = measure_image(data)
            labels = read_labels(row, args.species_key)
        except (ValueError, TypeError, OSError) as error:
            damage.append({"shard": source, "key": name, "reason": str(error)})
            continue
        rows.append(
            {"key": name, "image_id": str(row.get("image_id") or name), "caption": str(caption).strip()}
            | {"labels": labels, "score": number_or_none(row.get(args.aesthetic_key))}
            | {"width": width, "height": height}
            | place
        )
    return rows, damage


@dataclass
class Index:
    """Every usable sample, one row each. `label_codes[label_starts[i]:label_starts[i + 1]]` are row i's labels."""

    table: pa.Table
    damage: list  # [{"shard", "key", "reason"}]
    total: int  # samples there were, damaged ones and those that --max_train_samples leaves out included
    id_hashes: np.ndarray  # (N,) uint64
    label_names: list
    label_codes: np.ndarray  # (M,) int32, into label_names
    label_starts: np.ndarray  # (N + 1,) int64
    buckets: np.ndarray  # (N,) int64, into bucket_sizes
    stamps: dict = field(default_factory=dict)  # {shard: Shard.stamp when it was indexed}
    bucket_sizes: tuple = ()  # [(height, width)] of --crop bucket, else there is one bucket: a square
    images: datasets.Dataset | None = None  # where rows at IN_TABLE have their bytes
    image_column: str = "image"

    def __len__(self):
        return len(self.id_hashes)

    def row(self, i):
        return {name: self.table.column(name)[int(i)].as_py() for name in self.table.column_names}

    def sizes(self):
        """(N, 2) float64: the files' own heights and widths in px."""
        return np.stack([self.table.column(side).to_numpy() for side in ("height", "width")], axis=1).astype(float)

    def scales(self, resolution):
        """(N, 2) float64: what height and width are to be multiplied by; the larger is used, the rest is cut off."""
        return np.array(self.bucket_sizes or [(resolution, resolution)])[self.buckets] / self.sizes()

    def shares(self, choice):
        """(rows, codes, shares): what part of a row's arrivals counts for which of its labels."""
        counts = np.diff(self.label_starts)
        if choice == "first":
            rows = np.flatnonzero(counts)
            return rows, self.label_codes[self.label_starts[rows]], np.ones(len(rows))
        return np.repeat(np.arange(len(self)), counts), self.label_codes, np.repeat(1 / np.maximum(counts, 1), counts)

    def fingerprint(self):
        """Hex digest of what training sees beside the pixels, whatever the shards' paths and order."""
        seen = ("image_id", "caption", "labels", "score")
        rows = zip(*(self.table.column(name).to_pylist() for name in seen))
        digest = np.bitwise_xor.reduce([np.uint64(hash_text(repr(row))) for row in rows])
        return f"{len(self)}-{int(digest):016x}"


def reason_of(entry):
    """The kind of a damage, without what differs from sample to sample."""
    return entry["reason"].partition(":")[0]


def count_damaged(damage):
    """Samples in a list of damage; a sample with two faults is one, and so is a fault that names no sample."""
    named = {(d["shard"], d["key"]) for d in damage if d["key"] is not None}
    cut_shards = {d["shard"] for d in damage} - {shard for shard, _ in named}
    return len(named) + len(cut_shards)


def drop_duplicates(table, damage):
    """(table, damage) with every image_id once; the later ones are reported."""
    ids = np.array([hash_text(i) for i in table.column("image_id").to_pylist()], dtype=np.uint64)
    kept = np.sort(np.unique(ids, return_index=True)[1])
    dropped = table.take(np.setdiff1d(np.arange(len(ids)), kept)).to_pylist()
    found = [
        {"shard": row["path"], "key": row["key"], "reason": f"duplicate image_id: {row['image_id']}"}
        for row in dropped
    ]
    return table.take(kept) if dropped else table, damage + found


def make_index(table, damage, total=None, **sources):
    """Index of a table with INDEX_SCHEMA's columns."""
    table = table.combine_chunks()
    labels = table.column("labels").combine_chunks()
    names = sorted(set(labels.flatten().to_pylist()))
    codes = pa.compute.index_in(labels.flatten(), pa.array(names, pa.string()))
    return Index(
        table=table,
        damage=damage,
        total=len(table) + count_damaged(damage) if total is None else total,
        id_hashes=np.array([hash_text(i) for i in table.column("image_id").to_pylist()], dtype=np.uint64),
        label_names=names,
        label_codes=codes.to_numpy(zero_copy_only=False).astype(np.int32),
        label_starts=labels.offsets.to_numpy().astype(np.int64),
        buckets=np.zeros(len(table), dtype=np.int64),
        **sources,
    )


def check_bad_fraction(flag, bad, total, limit):
    if bad > limit * total:
        raise InputError(
            f"{flag}: {bad} of {total} samples are damaged, more than --max_bad_fraction {limit}; "
            "see skipped.jsonl, mend the data or raise the limit"
        )


def index_shards(accelerator, args, flag):
    """(table, damage, stamps) of --train_shards or --val_shards, each rank indexing its share of the shards first."""
    cache_dir = Path(args.cache_dir or args.output_dir) / "index"
    cache_dir.mkdir(parents=True, exist_ok=True)
    shards = expand_shards(args.train_shards if flag == "--train_shards" else args.val_shards)
    fields = (args.species_key, args.aesthetic_key)
    mine = shards[accelerator.process_index :: accelerator.num_processes]
    with ThreadPoolExecutor(IO_THREADS if any(map(is_remote, shards)) else 1) as pool:

        def index(path):
            return None if stop else cached_index_shard(path, cache_dir, *fields)

        try:
            quiet = not accelerator.is_main_process
            bar = tqdm(pool.map(index, mine), f"index of {flag}", len(mine), leave=False, unit="shard", disable=quiet)
            deque(bar, maxlen=0)
            leave_if_told(accelerator)
            tables = [cached_index_shard(path, cache_dir, *fields) for path in shards]
        except OSError as error:
            raise InputError(f"{flag}: {error}") from error
    damage = [d for t in tables for d in json.loads(t.schema.metadata[b"damage"])]
    stamps = {path: stamp for t in tables for path, stamp in json.loads(t.schema.metadata[b"stamp"]).items()}
    return pa.concat_tables([t.replace_schema_metadata() for t in tables]), damage, stamps


def load_index(accelerator, args, flag, seed):
    """Index of --train_shards, --val_shards, --train_data_dir or --dataset_name.

    Errors: InputError naming the flag when nothing is usable or more than --max_bad_fraction is damaged.
    """
    if flag in ("--train_shards", "--val_shards"):
        table, damage, stamps = index_shards(accelerator, args, flag)
        sources = {"stamps": stamps}
    else:
        with accelerator.main_process_first():
            images = load_dataset(args)
            rows, damage = index_dataset(images, args)
        table = pa.Table.from_pylist(rows, INDEX_SCHEMA)
        sources = {"images": images, "image_column": args.image_column}
    if len(table) == 0:
        raise InputError(
            f"{flag}: no usable sample; expected image, .txt caption and .json (first damage: {damage[:1]})"
        )
    table, damage = drop_duplicates(table, damage)
    index = make_index(table, damage, **sources)
    check_bad_fraction(flag, count_damaged(damage), index.total, args.max_bad_fraction)
    if flag != "--val_shards" and args.max_train_samples:
        chosen = np.argsort(hash64(SUBSET, seed, index.id_hashes), kind="stable")[: args.max_train_samples]
        index = make_index(table.take(np.sort(chosen)), damage, index.total, **sources)
    return index


# ---- plan: which rows make which step


# Seam: which samples are trained on. Contract: acceptance(step) is an array over (labels…, unlabelled) in [0, 1].
class SpeciesMix:
    """Classes delivered as (1 - m) uniform + m data distribution, m depending on the optimizer step alone.

    With arrivals a(s) and target p(s), a sample of class s is taken with probability c p(s) / a(s), c = min a / p:
    what is taken follows p exactly, whatever a is. Rows without a label are taken at UNLABELLED_ACCEPTANCE.
    """

    def __init__(self, index, choice, csv_counts=None, start=0.2, end=0.95, steps=6000, schedule="linear"):
        self.start, self.end, self.steps, self.schedule = start, end, steps, schedule
        self.names = index.label_names
        _, codes, shares = index.shares(choice)
        arrivals = np.bincount(codes, weights=shares, minlength=len(self.names))
        self.support = arrivals > 0  # with `first`, a label may never come first
        self.arrival = arrivals / max(arrivals.sum(), 1)
        counts = csv_counts or dict(zip(self.names, arrivals))
        self.absent = sorted(set(counts) - {n for n, s in zip(self.names, self.support) if s})
        data = np.where(self.support, [counts.get(name, 0.0) for name in self.names], 0.0)
        if self.support.any() and data.sum() == 0:
            raise InputError("--species_csv: none of its species is in the data; check --species_key and the spelling")
        self.data = data / max(data.sum(), 1e-300)
        self.uniform = self.support / max(self.support.sum(), 1)

    def weight_of_data(self, step):
        """m at `step`, counted from 0."""
        progress = min(step / self.steps, 1.0) if self.steps else 1.0
        if self.schedule == "cosine":
            progress = 0.5 - 0.5 * math.cos(math.pi * progress)
        return self.start + (self.end - self.start) * progress

    def target(self, step):
        """(K,) probabilities of the classes at `step`."""
        m = self.weight_of_data(step)
        return (1 - m) * self.uniform + m * self.data

    def acceptance(self, step):
        """(K + 1,) probability that an arriving sample of each class, last of none, is taken at `step`."""
        if not self.support.any():
            return np.ones(1)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(self.support, self.target(step) / self.arrival, 0.0)
        return np.append(ratio / ratio.max(), UNLABELLED_ACCEPTANCE)


class SamplePlan:
    """The rows of every global batch: a pure function of (index, mix, seed, global batch) and the step.

    A batch is of one bucket, which is drawn in proportion to what the acceptance rule takes of each; there is one
    bucket but for --crop bucket. In a bucket each image arrives once per pass, in an order hashed from (image id,
    seed, pass), and meets an acceptance draw of its own, so the classes follow the mix exactly, over the buckets
    together. The state is the step, the samples delivered, and each bucket's (pass, position).
    """

    def __init__(self, index, mix, choice, seed, global_batch, step=0, cursors=None, samples=None):
        self.index, self.mix, self.choice, self.seed, self.global_batch = index, mix, choice, seed, global_batch
        self.samples = step * global_batch if samples is None else samples  # delivered so far
        count = max(1, len(index.bucket_sizes))
        self.step, self.cursors = step, [list(c) for c in cursors or [(0, 0)] * count]
        self.members = [np.flatnonzero(index.buckets == bucket) for bucket in range(count)]
        self.passes = {}  # bucket → (its pass, what begin_pass gave for it)
        self.arrivals = np.zeros((count, len(mix.names) + 1))  # of each class, last of none, in a pass
        rows, codes, shares = index.shares(choice)
        np.add.at(self.arrivals, (index.buckets[rows], codes), shares)
        unlabelled = index.buckets[np.diff(index.label_starts) == 0]
        self.arrivals[:, -1] = np.bincount(unlabelled, minlength=count)

    def begin_pass(self, bucket, pass_):
        """(rows, labels, draws) of a bucket's pass in the order of arrival; label -1 is none."""
        rows = self.members[bucket]
        rows = rows[np.argsort(hash64(ORDER, self.seed, pass_, self.index.id_hashes[rows]), kind="stable")]
        ids, starts = self.index.id_hashes[rows], self.index.label_starts[rows]
        counts = self.index.label_starts[rows + 1] - starts
        pick = np.zeros(len(ids)) if self.choice == "first" else uniform(LABEL, self.seed, pass_, ids)
        at = starts + np.minimum((pick * counts).astype(np.int64), np.maximum(counts - 1, 0))
        codes = np.append(self.index.label_codes, -1)
        labels = np.where(counts > 0, codes[np.minimum(at, len(codes) - 1)], -1)
        return rows, labels, uniform(ACCEPT, self.seed, pass_, ids)

    def bucket_weights(self, step):
        """(buckets,) probability that the step's batch is of each: Σ over classes of target × arrivals' share."""
        taken = self.arrivals @ self.mix.acceptance(step)
        return taken / taken.sum()

    def next_batch(self):
        """(rows, labels), each (global_batch,), of the current step; moves on to the next."""
        draw = uniform(BUCKET, self.seed, self.step)
        bucket = int(np.searchsorted(np.cumsum(self.bucket_weights(self.step))[:-1], draw, side="right"))
        acceptance = self.mix.acceptance(self.step)
        acceptance = acceptance / acceptance[self.arrivals[bucket] > 0].max()  # as many as the bucket's law allows
        cursor = self.cursors[bucket]  # [pass, position]
        rows, labels, passes = [], [], 0
        while len(rows) < self.global_batch:
            if self.passes.get(bucket, (None,))[0] != cursor[0]:
                self.passes[bucket] = cursor[0], self.begin_pass(bucket, cursor[0])
            order, its_labels, draws = self.passes[bucket][1]
            if cursor[1] >= len(order):
                cursor[:] = cursor[0] + 1, 0
                passes += 1
                if passes > 10_000:
                    raise RuntimeError("--species_mix: no sample was accepted in 10,000 passes over the data")
                continue
            arriving = slice(cursor[1], cursor[1] + 65536)
            taken = np.flatnonzero(draws[arriving] < acceptance[its_labels[arriving]])
            taken = cursor[1] + taken[: self.global_batch - len(rows)]
            rows.extend(order[taken])
            labels.extend(its_labels[taken])
            full = len(rows) == self.global_batch
            cursor[1] = int(taken[-1]) + 1 if full else min(arriving.stop, len(order))
        self.step += 1
        self.samples += self.global_batch
        return np.array(rows), np.array(labels)


@dataclass
class MicroBatches:
    """Batch sampler of one rank: yields lists of (row, label, step, position in the run's global order).

    Planning runs ahead of training by what the workers prefetch; `states[n]` is the plan's cursors after n steps.
    """

    plan: SamplePlan
    last_step: int
    batch_size: int
    rank: int
    world: int
    states: dict = field(default_factory=dict)

    def __iter__(self):
        while self.plan.step < self.last_step:
            step, first = self.plan.step, self.plan.samples
            rows, labels = self.plan.next_batch()
            self.states[self.plan.step] = [tuple(cursor) for cursor in self.plan.cursors]
            stride = self.batch_size * self.world
            for start in range(self.rank * self.batch_size, len(rows), stride):
                places = range(start, start + self.batch_size)
                yield [(int(rows[i]), int(labels[i]), step, first + i) for i in places]


# ---- decode, crop, batch


def open_image(data, cover=None):
    """(RGB image, (height, width) of the file): EXIF orientation applied, alpha over white.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size as long as it still covers `cover` (height, width): four times as
    fast at 1024 px from 2048 px. Errors: ValueError when damaged, truncated or a bomb.
    """
    try:
        image = Image.open(io.BytesIO(data))
        original_size = oriented_size(image)
        if cover is not None:
            turned = original_size != (image.height, image.width)
            image.draft(None, cover if turned else cover[::-1])
        image.load()
        if image.format == "PNG":
            original_size = oriented_size(image)  # now with EXIF from behind the pixels
        ImageOps.exif_transpose(image, in_place=True)  # without it a picture that stands upright is copied
        if image.mode.startswith("I"):  # 16 bits a pixel: Pillow would clip, not scale
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    except Exception as error:  # decoders raise what they like on damaged files
        raise ValueError(f"cannot decode image: {error}") from None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB"), original_size


# Seam: crops and buckets. Contract: a bucket is a (height, width) in multiples of BUCKET_STEP px, a row's own for all
# of a run; a crop is the (top, left) of a window of that size inside the image, which was scaled to cover it.
def make_buckets(resolution):
    """[(height, width)] of at most resolution² px each, from 1:4 to 4:1, the sides multiples of BUCKET_STEP."""
    shorts = range(-(-resolution // 2 // BUCKET_STEP) * BUCKET_STEP, resolution + 1, BUCKET_STEP)
    tall = {(resolution**2 // short // BUCKET_STEP * BUCKET_STEP, short) for short in shorts if short}
    return sorted(tall | {(short, long) for long, short in tall})


def nearest_buckets(sizes, buckets):
    """(N,) the bucket whose aspect ratio is nearest to each of `sizes` (N, 2): the least is cut off."""
    ratios, own = np.log([height / width for height, width in buckets]), np.log(sizes[:, 0] / sizes[:, 1])
    return np.abs(own[:, None] - ratios).argmin(axis=1)


def random_ar_crop(height, width, resolution, u):
    """Window near the middle of the long side, u in [0, 1); beyond 2:1 the centre or the start edge, half each."""
    long, short = max(height, width), min(height, width)
    margin, ratio = long - resolution, long / short
    if ratio > 2:
        offset = margin / 2 if u < 0.5 else 0.0
    else:
        jitter = 0.06 + 0.12 * min(max((ratio - 1) / 0.7, 0.0), 1.0)
        offset = margin / 2 + (2 * u - 1) * jitter * margin
    offset = int(round(offset))
    return (offset, 0) if height > width else (0, offset)


def center_crop(height, width, bucket):
    """(top, left) of the middle window of size `bucket`."""
    return int(round((height - bucket[0]) / 2)), int(round((width - bucket[1]) / 2))


def scale_aesthetic(value, scale):
    """Aesthetic score in 1 to 10 of a sample whose field holds `value`, or None."""
    return AESTHETIC_SCORE if value is None else min(max(value / scale, 1.0), 10.0)


class ImageDataset(Dataset):
    """Decoded, cropped samples; an item is asked for by (row, label, step, position in the global order)."""

    def __init__(
        self, index, seed, resolution, crop, random_flip, interpolation, cache_dir=None, aesthetic_scale=10.0
    ):
        self.index, self.seed, self.resolution = index, seed, resolution
        self.bucket_sizes = index.bucket_sizes or [(resolution, resolution)]
        self.crop, self.random_flip, self.cache_dir = crop, random_flip, cache_dir
        self.aesthetic_scale = aesthetic_scale
        self.interpolation = Image.Resampling[interpolation.removesuffix("_exact").upper()]
        self.shards = {}  # (process, path) → Shard
        self.latents = self.embeddings = None  # an EncodingCache each, in place of pixels and captions

    def read(self, row):
        """The bytes of a row's image. Errors: OSError naming the shard when it changed or the network fails."""
        if row["path"] == IN_TABLE:
            return self.index.images[row["offset"]][self.index.image_column]["bytes"]
        place = (os.getpid(), row["path"])
        shard = self.shards.get(place)
        if shard is None:
            if len(self.shards) >= MAX_SHARDS:
                self.shards.pop(list(self.shards)[0], None)
            shard = self.shards[place] = Shard(row["path"], self.cache_dir)
        shard.check_stamp(self.index.stamps.get(row["path"]))
        return shard.read(row["offset"], row["size"])

    def replacement(self, i, label, tried):
        """A row in place of a damaged one, chosen by hash: of its class and bucket, else of its bucket, else any."""
        in_bucket = self.index.buckets == self.index.buckets[i]
        of_class = np.zeros(len(self.index), dtype=bool)
        if label >= 0:
            owners = np.repeat(np.arange(len(self.index)), np.diff(self.index.label_starts))
            of_class[owners[self.index.label_codes == label]] = True
        choices = (in_bucket & of_class, in_bucket, np.ones_like(in_bucket))
        for allowed in choices[: 3 if self.latents is None else 2]:  # latents have the shape of their own bucket
            allowed[tried] = False
            rows = np.flatnonzero(allowed)
            if len(rows):
                return int(rows[int(hash64(REPLACE, self.seed, self.index.id_hashes[i], len(tried))) % len(rows)])
        raise ValueError(f"{self.index.row(i)['path']}: every image is damaged")

    def open(self, row, bucket):
        """(image, (height, width) of its file) of a row. Errors: ValueError when it is damaged."""
        image, original_size = open_image(self.read(row), bucket)
        if len(self.bucket_sizes) > 1 and original_size != (row["height"], row["width"]):
            raise ValueError("EXIF behind the pixels turns the image: not of its bucket")
        return image, original_size

    def crop_window(self, row, bucket, step, flipped):
        """The row's picture as the network sees it at `step`, and the sizes it is told. Errors: as open()."""
        image, original_size = self.open(row, bucket)
        height, width = bucket
        image = ImageOps.cover(image, (width, height), self.interpolation)
        if flipped:
            image = ImageOps.mirror(image)
        if self.crop == "random_ar":
            u = float(uniform(CROP, self.seed, hash_text(row["image_id"]), step))
            top, left = random_ar_crop(image.height, image.width, height, u)
        else:
            top, left = center_crop(image.height, image.width, bucket)
        image = image.crop((left, top, left + width, top + height))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()  # (3, H, W) uint8
        sizes = {"original_sizes": original_size, "crop_top_lefts": (top, left), "target_sizes": bucket}
        return {"pixels": pixels} | sizes

    def windows(self, rows):
        """crop_window of each flip of the one row, for --cache_latents, or a text that says what is damaged."""
        row, bucket = self.index.row(rows[0]), self.bucket_sizes[self.index.buckets[rows[0]]]
        try:
            return [self.crop_window(row, bucket, 0, flipped) for flipped in range(1 + self.random_flip)]
        except ValueError as error:
            return str(error)

    def is_flipped(self, row, step):
        return self.random_flip and bool(uniform(FLIP, self.seed, hash_text(row["image_id"]), step) < 0.5)

    def first_whole(self, i, label, look):
        """(row, look(row), damage) of row i, or of its replacement where look raises ValueError: it is damaged."""
        tried, skipped = [i], []
        while len(tried) <= 100:
            row = self.index.row(tried[-1])
            try:
                return row, look(row), skipped
            except ValueError as error:
                skipped.append({"shard": row["path"], "key": row["key"], "reason": str(error)})
            tried.append(self.replacement(i, label, tried))
        raise ValueError(f"{skipped[0]['shard']}: 100 damaged images in a row, the first {skipped[0]['key']}")

    def __getitems__(self, requests):
        """The items of a batch; over the network they are read at the same time."""
        if self.latents is not None or not any(map(is_remote, self.index.stamps)):
            return [self[request] for request in requests]
        with ThreadPoolExecutor(IO_THREADS) as pool:
            return list(pool.map(self.__getitem__, requests))

    def __getitem__(self, request):
        i, label, step, position = request
        bucket = self.bucket_sizes[self.index.buckets[i]]

        def look(row):
            flipped = self.is_flipped(row, step)
            if self.latents is not None:
                return self.latents.read(row["image_id"], flipped)
            return self.crop_window(row, bucket, step, flipped)

        row, seen, skipped = self.first_whole(i, label, look)
        if self.embeddings is not None:
            seen |= self.embeddings.read(row["image_id"])
        return seen | {
            "captions": row["caption"],
            "aesthetic_scores": scale_aesthetic(row["score"], self.aesthetic_scale),
            "species": self.index.label_names[label] if label >= 0 else None,
            "keys": row["key"],
            "sample_seeds": torch_seed(SAMPLE, self.seed, position),
            "positions": position,
            "replaced": bool(skipped),
            "skipped": skipped,
        }


def collate(samples):
    """Lists of the samples' fields, and stacked tensors: `pixels` (B, 3, H, W) uint8, sizes and scores float32."""
    batch = {name: [sample[name] for sample in samples] for name in samples[0]}
    batch = {name: torch.stack(values) if torch.is_tensor(values[0]) else values for name, values in batch.items()}
    for name in ("original_sizes", "crop_top_lefts", "target_sizes", "aesthetic_scores"):
        batch[name] = torch.tensor(batch[name], dtype=torch.float32)
    batch["skipped"] = [entry for entries in batch["skipped"] for entry in entries]
    return batch


def to_pixel_values(pixels):
    return pixels.float().div_(127.5).sub_(1)


def to_device(tensor, device):
    """The tensor on `device`, from pinned memory: the CPU need not wait for what a GPU has still to do."""
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def move_batch(batch, device):
    """The batch with tensors on `device`; of pixels come `pixel_values` (B, 3, H, W) float32 in [-1, 1]."""
    moved = {k: to_device(v, device) if torch.is_tensor(v) else v for k, v in batch.items()}
    if "pixels" in moved:
        moved["pixel_values"] = to_pixel_values(moved.pop("pixels"))
    return moved


def ignore_signals(_worker):
    """For loader processes: a signal to the whole group is the trainer's to act on, which still needs them."""
    signal.set_wakeup_fd(-1)
    for number in StopSignal.NUMBERS:
        signal.signal(number, signal.SIG_IGN)


def make_loader(dataset, batch_sampler, workers, pin_memory):
    return DataLoader(
        dataset,
        batch_sampler=batch_sampler,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
        worker_init_fn=ignore_signals,
    )


# ---- caches: what frozen encoders make of every sample, kept on disk


class EncodingCache:
    """Tensors by image id, in files of CACHE_ROWS samples that are there whole or not at all.

    A file's name is a hash of everything that its tensors depend on (`settings`, and of each row what `seen` holds):
    those of other images, flags or encoders are never read.
    """

    def __init__(self, folder, flag, settings, seen, groups):
        self.flag = flag
        self.chunks, self.places = {}, {}  # path → rows; image id → path
        self.files = {}  # (process, path) → what open() gives
        for group in groups:
            for start in range(0, len(group), CACHE_ROWS):
                rows = group[start : start + CACHE_ROWS]
                text = json.dumps([settings, [seen[i] for i in rows]])
                path = Path(folder) / f"{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}.safetensors"
                self.chunks[path] = rows
                self.places |= {seen[i][0]: path for i in rows}

    def open(self, path):
        """(file, notes) with the notes of write(). Errors: OSError when it is not what its name says."""
        place = (os.getpid(), path)
        if place not in self.files:
            if len(self.files) >= MAX_OPEN_CACHES:
                self.files.pop(next(iter(self.files)))
            try:
                file = safetensors.safe_open(path, "pt")
                notes = file.metadata()
                if notes["name"] != path.name:
                    raise ValueError(f"it holds {notes['name']}")
                self.files[place] = file, json.loads(notes["samples"])
            except Exception as error:  # of a torn or foreign file, whatever the library raises
                raise OSError(f"{self.flag}: {path}: {error}; delete it and start again") from error
        return self.files[place]

    def write(self, path, samples):
        """Keeps {image id: [{name: tensor or numbers} of each variant], or a text that says what is damaged}."""
        tensors, notes = {}, {}
        for image_id, found in samples.items():
            if isinstance(found, str):
                notes[image_id] = found
            for variant, fields in enumerate(found if isinstance(found, list) else ()):
                own = {name: value for name, value in fields.items() if torch.is_tensor(value)}
                tensors |= {
                    f"{image_id}/{variant}/{name}": tensor.to("cpu", copy=True) for name, tensor in own.items()
                }
                numbers = {name: value for name, value in fields.items() if name not in own}
                notes.setdefault(image_id, []).append([list(own), numbers])
        write_safetensors(path, tensors, {"name": path.name, "samples": json.dumps(notes)})

    def read(self, image_id, variant=0):
        """{name: tensor or numbers} of a sample. Errors: ValueError saying what is damaged."""
        file, notes = self.open(self.places[image_id])
        if isinstance(notes[image_id], str):
            raise ValueError(notes[image_id])
        names, numbers = notes[image_id][int(variant)]
        return {name: file.get_tensor(f"{image_id}/{int(variant)}/{name}") for name in names} | numbers


# ------------------------------------------------------------------------------
# 4 Conditioning
# ------------------------------------------------------------------------------


def tokenize(tokenizer, captions, chunks=1):
    """(B * chunks, 77) int64 token ids: a caption's rows follow each other, its first is what the SDXL pipeline sees.

    Every row holds up to 75 tokens between the begin and end marks, padded; what is beyond the last row is cut.
    """
    length = tokenizer.model_max_length
    if chunks > 1:
        ids = tokenizer(captions, add_special_tokens=False).input_ids
        pieces = [row[start * (length - 2) :][: length - 2] for row in ids for start in range(chunks)]
        rows = [[tokenizer.bos_token_id, *piece, tokenizer.eos_token_id] for piece in pieces]
        return torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows])
    return tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def count_chunks(tokenizer, captions, mode):
    """(chunks every caption is encoded in, captions that are cut, tokens of the longest) under --long_captions `mode`.

    The number is the same for all samples and steps, so that no batch depends on its neighbours.
    """
    length = tokenizer.model_max_length - 2
    captions = [caption for caption in captions if len(caption.encode()) > length]  # a token is a byte at least
    tokens = [len(ids) for ids in tokenizer(captions, add_special_tokens=False).input_ids] if captions else [0]
    chunks = min(max(-(-max(tokens) // length), 1), MAX_CAPTION_CHUNKS) if mode == "chunk" else 1
    return chunks, sum(count > chunks * length for count in tokens), max(tokens)


def encode_prompts(text_encoders, tokenizers, captions, device, chunks=1):
    """prompt_embeds (B, chunks * 77, D1 + D2) and pooled_prompt_embeds (B, D2), as SDXL's pipeline encodes them.

    Embeddings are both encoders' penultimate hidden states, those of the chunks one after the other; pooled is
    text_encoder_2's projection of the first chunk.
    """
    embeds = []
    for encoder, tokenizer in zip(text_encoders, tokenizers):
        output = encoder(to_device(tokenize(tokenizer, captions, chunks), device), output_hidden_states=True)
        embeds.append(output.hidden_states[-2].unflatten(0, (-1, chunks)).flatten(1, 2))
    return torch.cat(embeds, dim=-1), output.text_embeds[::chunks]


def encode_captions(models, batch, device, with_empty=False):
    """prompt_embeds and pooled_prompt_embeds of a batch, encoded or cached, and the empty caption's pair or None."""
    if "prompt_embeds" in batch:
        return batch["prompt_embeds"], batch["pooled_prompt_embeds"], models.empty_prompt if with_empty else None
    encoders = models.text_encoders, models.tokenizers
    prompt_embeds, pooled = encode_prompts(
        *encoders, batch["captions"] + [""] * with_empty, device, models.caption_chunks
    )
    if not with_empty:
        return prompt_embeds, pooled, None
    return prompt_embeds[:-1], pooled[:-1], (prompt_embeds[-1:], pooled[-1:])


def drop_captions(prompt_embeds, pooled_prompt_embeds, dropped, empty=None):
    """Both with the samples where `dropped` (B,) bool replaced by `empty` = (embeds, pooled), or by zeros.

    A torch.where on the result: an encoder that is skipped on one rank would leave DDP waiting.
    """
    empty_embeds, empty_pooled = empty or (torch.zeros_like(prompt_embeds), torch.zeros_like(pooled_prompt_embeds))
    return (
        torch.where(dropped[:, None, None], empty_embeds, prompt_embeds),
        torch.where(dropped[:, None], empty_pooled, pooled_prompt_embeds),
    )


# ------------------------------------------------------------------------------
# 5 Loss
# ------------------------------------------------------------------------------


# Seam: timesteps and noise. Contract: timesteps (B,) int64 within the band, both ends included; noise like the
# latents; all from the samples' own seeds, so that the draw is the same on any number of processes. A new draw comes
# last in the loop: one in the middle changes all that follow.
def sample_noise(sample_seeds, latent_shape, timestep_band, noise_offset=0.0):
    """Per sample, from its seed: vae_noise and noise (B, *latent_shape), timesteps (B,) int64, caption_draws (B,)."""
    draws = {"vae_noise": [], "noise": [], "timesteps": [], "caption_draws": []}
    for seed in sample_seeds:
        generator = torch.Generator().manual_seed(seed)
        draws["timesteps"].append(torch.randint(timestep_band[0], timestep_band[1] + 1, (), generator=generator))
        draws["caption_draws"].append(torch.rand((), generator=generator))
        draws["vae_noise"].append(torch.randn(latent_shape, generator=generator))
        noise = torch.randn(latent_shape, generator=generator)
        offset = torch.randn((latent_shape[0], 1, 1), generator=generator)
        draws["noise"].append(noise + noise_offset * offset)
    return {name: torch.stack(values) for name, values in draws.items()}


def sample_batch_noise(models, batch, noise_offset):
    """sample_noise with the shapes of this batch's latents, on its device."""
    if "moments" in batch:
        shape = batch["moments"].shape[2:]
    else:
        config, factor = models.vae.config, 2 ** (len(models.vae.config.block_out_channels) - 1)
        shape = (config.latent_channels, *(side // factor for side in batch["pixel_values"].shape[-2:]))
    draws = sample_noise(batch["sample_seeds"], shape, models.timestep_band, noise_offset)
    return move_batch(draws, batch["original_sizes"].device)


def encode_moments(vae, pixel_values):
    """(B, 2, 4, H / 8, W / 8) mean and standard deviation of the VAE's posterior, in its dtype."""
    at_once = max(1, VAE_PIXELS // (pixel_values.shape[-2] * pixel_values.shape[-1]))
    with torch.no_grad():
        posteriors = [vae.encode(part.to(vae.dtype)).latent_dist for part in pixel_values.split(at_once)]
        return torch.cat([torch.stack([posterior.mean, posterior.std], dim=1) for posterior in posteriors])


def sample_latents(vae, moments, vae_noise):
    """(B, 4, h, w) float32 latents sampled from the posterior with `vae_noise`, scaled."""
    mean, std = moments.float().unbind(dim=1)
    return (mean + std * vae_noise) * vae.config.scaling_factor


# ---- caches, filled


def fill_cache(accelerator, cache, prepare, title):
    """Writes the files that `cache` lacks: each rank its share, then what its own disk still lacks.

    prepare(rows to come) → encode(rows) → what EncodingCache.write takes. What a killed run had written stays. Errors:
    Preempted on all ranks together; InputError for a file that is not what its name says.
    """
    paths = list(cache.chunks)
    for share in (paths[accelerator.process_index :: accelerator.num_processes], paths):
        for path in filter(Path.exists, share):
            try:
                cache.open(path)
            except OSError as error:
                raise InputError(str(error)) from error
        missing = [path for path in share if not path.exists()]
        rounds = max(gather_object([len(missing)]))
        encode = prepare([int(i) for path in missing for i in cache.chunks[path]])
        total = sum(len(cache.chunks[path]) for path in missing)
        bar = tqdm(total=total, desc=f"encoding {title}", unit="sample", leave=False, disable=not missing)
        for n in range(rounds):
            leave_if_told(accelerator)
            for path in missing[n : n + 1]:
                cache.write(path, encode(cache.chunks[path]))
                bar.update(len(cache.chunks[path]))
        bar.close()
        accelerator.wait_for_everyone()


def cache_latents(accelerator, models, dataset, folder, workers):
    """Gives `dataset` the moments of its images' posteriors, of both flips with random_flip, in place of pixels."""
    index, vae = dataset.index, models.vae
    settings = [1, "latents", fingerprint_parts(vae), str(vae.dtype), dataset.crop, dataset.interpolation.name]
    settings += [dataset.random_flip, index.images and index.images._fingerprint]
    ids, sizes, paths = (index.table.column(name).to_pylist() for name in ("image_id", "size", "path"))
    buckets = [dataset.bucket_sizes[bucket] for bucket in index.buckets]
    seen = [[ids[i], sizes[i], str(index.stamps.get(paths[i])), buckets[i]] for i in range(len(index))]
    groups = [np.flatnonzero(index.buckets == bucket) for bucket in range(len(dataset.bucket_sizes))]
    cache = EncodingCache(folder, "--cache_latents", settings, seen, groups)

    def prepare(rows):
        options = {"num_workers": workers, "worker_init_fn": ignore_signals}
        stream = iter(DataLoader(rows, collate_fn=dataset.windows, **options))

        def encode(rows):
            samples = {ids[i]: next(stream) for i in rows}
            whole = [window for windows in samples.values() if isinstance(windows, list) for window in windows]
            pixels = [window.pop("pixels") for window in whole]
            if whole:
                moments = encode_moments(vae, to_pixel_values(torch.stack(pixels).to(accelerator.device)))
            for n, window in enumerate(whole):
                window["moments"] = moments[n]
            return samples

        return encode

    fill_cache(accelerator, cache, prepare, "latents")
    dataset.latents = cache


def cache_text_embeddings(accelerator, models, dataset, folder):
    """Gives `dataset` the embeddings of its captions."""
    ids, captions = (dataset.index.table.column(name).to_pylist() for name in ("image_id", "caption"))
    settings = [1, "text", fingerprint_parts(*models.text_encoders), str(models.text_encoders[0].dtype)]
    settings += [models.stage, models.caption_chunks]
    names = ("prompt_embeds", "pooled_prompt_embeds")
    seen, everything = list(zip(ids, captions)), np.arange(len(ids))
    cache = EncodingCache(folder, "--cache_text_embeddings", settings, seen, [everything])

    def encode(rows):
        encoders, texts = (models.text_encoders, models.tokenizers), [captions[i] for i in rows]
        with torch.no_grad():
            embeds = encode_prompts(*encoders, texts, accelerator.device, models.caption_chunks)
        return {ids[i]: [dict(zip(names, pair))] for i, pair in zip(rows, zip(*embeds))}

    fill_cache(accelerator, cache, lambda _: encode, "captions")
    dataset.embeddings = cache


def cache_encodings(accelerator, args, models, image_datasets):
    """Fills what --cache_latents and --cache_text_embeddings ask for; the encoders then wait on the CPU."""
    folder = Path(args.cache_dir or args.output_dir) / "encodings"
    folder.mkdir(parents=True, exist_ok=True)
    for dataset in image_datasets:
        if args.cache_latents:
            cache_latents(accelerator, models, dataset, folder, args.dataloader_num_workers)
        if args.cache_text_embeddings:
            cache_text_embeddings(accelerator, models, dataset, folder)
    if args.cache_latents:
        models.vae.to("cpu")
    if args.cache_text_embeddings:
        with torch.no_grad():
            encoders = models.text_encoders, models.tokenizers
            models.empty_prompt = encode_prompts(*encoders, [""], accelerator.device, models.caption_chunks)
        for encoder in models.text_encoders:
            encoder.to("cpu")
    if accelerator.device.type == "cuda":
        torch.cuda.empty_cache()


# ---- the loss


# Seam: weighting. Contract: (B,) weights from the (B,) signal-to-noise ratios.
def compute_snr_weights(snr, gamma, prediction_type):
    """(B,) weights min(snr, gamma) / snr, for v-prediction / (snr + 1); Min-SNR, arXiv:2303.09556, sec. 3.4."""
    if not gamma:
        return torch.ones_like(snr)
    return torch.clamp(snr, max=gamma) / (snr + 1 if prediction_type == "v_prediction" else snr)


# Seam: the objective. Contract: (B,) losses that depend on nothing but the arguments. Validation calls it too: another
# objective is another val_loss.
def diffusion_loss(
    models, batch, draws, weight_dtype, snr_gamma=0.0, caption_dropout_rate=0.0, dropped_caption="zeros"
):
    """(B,) weighted denoising losses of a batch (room 3) with the random `draws` of sample_noise."""
    device, scheduler = batch["original_sizes"].device, models.noise_scheduler
    noise, timesteps = draws["noise"], draws["timesteps"]

    moments = batch["moments"] if "moments" in batch else encode_moments(models.vae, batch["pixel_values"])
    latents = sample_latents(models.vae, moments, draws["vae_noise"])  # (B, 4, h, w)
    noisy_latents = scheduler.add_noise(latents, noise, timesteps)

    with_empty = dropped_caption == "empty"
    prompt_embeds, pooled_prompt_embeds, empty = encode_captions(models, batch, device, with_empty)
    dropped = draws["caption_draws"] < caption_dropout_rate
    prompt_embeds, pooled_prompt_embeds = drop_captions(prompt_embeds, pooled_prompt_embeds, dropped, empty)
    # arXiv:2307.01952, sec. 2.2; float32 whatever the weights are: in bf16 a side of 1365 px would become 1368
    last = batch["aesthetic_scores"][:, None] if models.stage == "refiner" else batch["target_sizes"]
    add_time_ids = torch.cat([batch["original_sizes"], batch["crop_top_lefts"], last], dim=1)  # (B, 6), refiner (B, 5)

    model_pred = models.unet(
        noisy_latents.to(weight_dtype),
        timesteps,
        prompt_embeds.to(weight_dtype),
        added_cond_kwargs={"text_embeds": pooled_prompt_embeds.to(weight_dtype), "time_ids": add_time_ids},
    ).sample

    prediction_type = scheduler.config.prediction_type
    if prediction_type not in ("epsilon", "v_prediction"):
        raise InputError(f"--prediction_type: the snapshot's is {prediction_type}; expected epsilon or v_prediction")
    target = noise if prediction_type == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
    loss = F.mse_loss(model_pred.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
    return loss * compute_snr_weights(compute_snr(scheduler, timesteps), snr_gamma, prediction_type)


# ------------------------------------------------------------------------------
# 6 Optimizer
# ------------------------------------------------------------------------------


# Seam: the optimizer. Contract: a torch optimizer over the parameter groups, whose "lr" the schedule multiplies.
def make_optimizer(args, groups, learning_rate):
    """--optimizer over the groups. Errors: InputError when its package is missing or cannot run here."""
    adam = {"betas": (args.adam_beta1, args.adam_beta2), "weight_decay": args.adam_weight_decay}
    try:
        if args.optimizer == "adamw8bit":
            import bitsandbytes

            return bitsandbytes.optim.AdamW8bit(groups, lr=learning_rate, eps=args.adam_epsilon, **adam)
        if args.optimizer == "prodigy":
            import prodigyopt

            groups = [group | {"lr": learning_rate, "initial_lr": learning_rate} for group in groups]  # takes one only
            return prodigyopt.Prodigy(groups, lr=learning_rate, eps=args.adam_epsilon, safeguard_warmup=True, **adam)
    except ImportError as error:
        raise InputError(f"--optimizer: {args.optimizer} needs a package that does not load here: {error}") from error
    return torch.optim.AdamW(groups, lr=learning_rate, eps=args.adam_epsilon, fused=True, **adam)


# Seam: the schedule. Contract: step, counted from 0 → factor on the peak learning rate; no state, so none to save.
def make_lr_schedule(name, warmup_steps, max_train_steps):
    """Function of the optimizer step; diffusers' schedules by name, over `max_train_steps` on any number of GPUs."""
    placeholder = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    steps = {"num_warmup_steps": warmup_steps, "num_training_steps": max_train_steps}
    return get_scheduler(name, placeholder, **steps).lr_lambdas[0]


def set_learning_rate(optimizer, factor):
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


# ------------------------------------------------------------------------------
# 7 Checkpoints
# ------------------------------------------------------------------------------

LORA_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "pytorch_lora_weights_kohya.safetensors"
KOHYA_PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}

# Flags that change what is learned: they must be the same when a run is resumed. All others may differ, and are listed
# when they do. What the data, the base model and the batch are is compared itself, not the flags that say where.
MATHEMATICS = """
    stage aesthetic_key aesthetic_scale refiner_timestep_band rank lora_alpha lora_dropout lora_target_modules
    use_dora use_rslora train_text_encoder text_encoder_rank text_encoder_alpha vae_precision max_train_samples
    resolution crop random_flip image_interpolation_mode species_key species_choice species_mix
    species_mix_schedule caption_dropout_rate dropped_caption long_captions snr_gamma prediction_type
    base_precision noise_offset optimizer learning_rate text_encoder_lr_scale scale_lr lr_scheduler lr_warmup_steps
    adam_beta1 adam_beta2 adam_weight_decay adam_epsilon max_grad_norm
""".split()


@dataclass
class Progress:
    """All that a resume needs beside adapters and optimizer; progress.json is this."""

    step: int = 0
    seed: int = 0
    run_id: str = ""
    cursors: list | None = None  # SamplePlan's: of each bucket the pass and the position in it
    samples: int = 0  # delivered so far
    loss_sum: float = 0.0  # of the optimizer steps since the last row of metrics
    loss_count: int = 0
    nonfinite_steps: int = 0  # left out because loss or gradient was not finite
    nonfinite_in_a_row: int = 0
    validation_due: bool = False  # of this very step: a signal came before or during it
    best: dict = field(default_factory=dict)  # the lowest val_loss and its step
    skipped: dict = field(default_factory=dict)  # reason → samples replaced because they were damaged
    damaged: list = field(default_factory=list)  # [{"shard", "key", "reason"}] that decoding found
    law: dict = field(default_factory=dict)  # what must match on resume
    flags: dict = field(default_factory=dict)  # all others, which need not


def make_law(args, accelerator, index, mix):
    """What fixes the mathematics of a run beside the base model, compared on resume: flags, data and global batch."""
    law = {name: getattr(args, name) for name in MATHEMATICS}
    law["mixed_precision"] = accelerator.mixed_precision
    law["global_batch"] = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    law["dataset"] = index.fingerprint()
    law["species_distribution"] = f"{hash_text(repr([(n, float(q)) for n, q in zip(mix.names, mix.data)])):016x}"
    return json.loads(json.dumps(law))


def other_flags(args):
    """{flag: value} of those that a resumed run may change."""
    left_out = ("config", "hub_token", "resume_from_checkpoint", "overwrite_output_dir", "allow_batch_change")
    return {k: str(v) for k, v in vars(args).items() if k not in MATHEMATICS and k not in left_out}


def differences(saved, current):
    """["--flag: value then, value now"] of what `current` holds and `saved` holds otherwise."""
    compared_itself = ("global_batch", "dataset", "species_distribution", "base_model")
    names = {k: k.replace("_", " ") if k in compared_itself else f"--{k}" for k in current}
    return [f"{names[k]}: {saved.get(k)!r} then, {v!r} now" for k, v in current.items() if saved.get(k) != v]


def check_law(saved, current, allow_batch_change=False):
    """Errors: InputError naming each flag that differs, with both values."""
    compared = {k: v for k, v in current.items() if not (allow_batch_change and k == "global_batch")}
    different = differences(saved, compared)
    if different:
        remedy = "give the values of then, or another --output_dir"
        if saved.get("global_batch") != compared.get("global_batch"):
            remedy += "; --allow_batch_change goes on with another batch"
        raise InputError(f"--resume_from_checkpoint: not the same run: {'; '.join(different)}; {remedy}")


def adapter_state_dict(trained):
    """{"unet.….lora_A.weight": fp32 tensor}: diffusers' keys, encoders' with the `text_model.` older stacks want."""
    state = {}
    for name, model in trained.items():
        for key, tensor in get_peft_model_state_dict(model).items():
            if name != "unet":
                key = "text_model." + key.removeprefix("text_model.")
                # transformers reads DoRA's magnitudes under this name
                key = key.replace("lora_magnitude_vector", "lora_magnitude_vector.weight")
            state[f"{name}.{key}"] = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
    return state


def load_adapter_state_dict(trained, state):
    """Puts what adapter_state_dict returned back. Errors: ValueError when a tensor is missing or left over."""
    for name, model in trained.items():
        own = {k.removeprefix(name + "."): v for k, v in state.items() if k.startswith(name + ".")}
        own = {k.replace("lora_magnitude_vector.weight", "lora_magnitude_vector"): v for k, v in own.items()}
        if not hasattr(model, "text_model"):  # flattened in newer transformers
            own = {k.removeprefix("text_model."): v for k, v in own.items()}
        expected = set(get_peft_model_state_dict(model))
        if set(own) != expected:
            raise ValueError(f"{name}: adapter tensors differ, e.g. {sorted(set(own) ^ expected)[:2]}")
        set_peft_model_state_dict(model, own)


def adapter_metadata(trained):
    """Rank, alpha and kind per model, as diffusers reads them from the file's header."""
    fields = "r lora_alpha lora_dropout target_modules use_dora use_rslora layers_to_transform".split()
    metadata = {}
    for name, model in trained.items():
        known = {key: getattr(model.peft_config["default"], key) for key in fields}
        for key, value in known.items():
            if value is not None:
                metadata[f"{name}.{key}"] = sorted(value) if isinstance(value, (set, list)) else value
    return metadata


def kohya_state_dict(trained, adapters):
    """What adapter_state_dict gave under kohya's keys for ComfyUI and A1111, with the effective alpha in `.alpha`.

    kohya's scale is alpha / rank: for rsLoRA, whose scale is alpha / sqrt(rank), alpha * sqrt(rank) is written.
    """
    renamed = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
    renamed["lora_magnitude_vector"] = "dora_scale"
    state = {}
    for key, tensor in adapters.items():
        name, _, rest = key.replace("lora_magnitude_vector.weight", "lora_magnitude_vector").partition(".")
        suffix = next(s for s in renamed if rest.endswith(s))
        layer = f"{KOHYA_PREFIXES[name]}_{rest.removesuffix('.' + suffix).replace('.', '_')}"
        config = trained[name].peft_config["default"]
        alpha = config.lora_alpha * (math.sqrt(config.r) if config.use_rslora else 1.0)
        state[f"{layer}.{renamed[suffix]}"] = tensor[:, None] if suffix == "lora_magnitude_vector" else tensor
        state[f"{layer}.alpha"] = torch.tensor(float(alpha))
    return state


def lora_files(trained, stage):
    """{file name: write(path)} of both LoRA files of the unwrapped `trained` models, copied as they are now."""
    adapters, config = adapter_state_dict(trained), trained["unet"].peft_config["default"]
    kohya = {
        "modelspec.architecture": f"stable-diffusion-xl-v1-{stage}/lora",
        "ss_base_model_version": f"sdxl_{stage}_v1-0",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config.r),
        "ss_network_alpha": str(config.lora_alpha),
    }
    peft = {"lora_adapter_metadata": json.dumps(adapter_metadata(trained), sort_keys=True)}
    return {
        LORA_FILE: partial(write_safetensors, tensors=adapters, metadata=peft),
        KOHYA_FILE: partial(write_safetensors, tensors=kohya_state_dict(trained, adapters), metadata=kohya),
    }


def save_lora(trained, folder, stage):
    """Writes both LoRA files into `folder`, which it makes. Errors: OSError."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, write in lora_files(trained, stage).items():
        write(Path(folder) / name)


def checkpoint_files(run):
    """{file name: write(path)} of all that a resume needs, copied as it is now, so that training can go on meanwhile.

    No rank has a state of its own: every draw is a function of the step, and what a rank holds the others hold too.
    Names and formats are those of Accelerate's save_state, during which training would wait.
    """
    files = lora_files(run.trained, run.args.stage)
    for name, part in {"optimizer.bin": run.optimizer, "scaler.pt": run.accelerator.scaler}.items():
        if part is not None:
            state = recursively_apply(lambda tensor: tensor.detach().to("cpu", copy=True), part.state_dict())
            files[name] = partial(torch.save, state)
    progress = json.dumps(vars(run.progress), indent=1) + "\n"
    return files | {"progress.json": lambda path: write_file(path, progress.encode())}


def load_checkpoint(run, folder):
    """Puts what checkpoint_files wrote back, but for progress.json."""
    load_adapter_state_dict(run.trained, safetensors.torch.load_file(folder / LORA_FILE))
    for name, part in {"optimizer.bin": run.optimizer, "scaler.pt": run.accelerator.scaler}.items():
        if part is not None:
            part.load_state_dict(torch.load(folder / name, map_location="cpu", weights_only=True))


def sync(path):
    """Returns when the file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def make_checksums(folder, names):
    """Text of checksums.json, the file that is written last and makes a checkpoint whole."""

    def checksum(name):
        with open(folder / name, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor() as pool:
        return json.dumps(dict(zip(sorted(names), pool.map(checksum, sorted(names)))), indent=1)


def complete_checkpoint(unfinished, final, files):
    """Writes the `files` of checkpoint_files into the folder `unfinished`, which becomes `final` in one rename."""
    unfinished.mkdir()
    for name, write in files.items():
        write(unfinished / name)
        sync(unfinished / name)
    write_file(unfinished / "checksums.json", make_checksums(unfinished, files).encode())
    sync(unfinished)
    metrics = final.parent / "metrics.jsonl"
    if metrics.exists():
        sync(metrics)  # the rows that the checkpoint stands for
    shutil.rmtree(final, ignore_errors=True)  # only ever a damaged one that the resume passed over
    os.rename(unfinished, final)
    sync(final.parent)


def fault_of(write):
    """What kept write() from writing, such as a full disk; None when nothing did."""
    try:
        write()
    except OSError as error:
        return str(error)
    except RuntimeError as error:
        if "inline_container" not in str(error):  # torch.save's way of saying that the disk is full
            raise
        return f"torch.save could not write: {error}"
    return None


def write_checkpoint(output_dir, step, files, keep=None):
    """Writes checkpoint-N whole or not at all, then prunes those before it to `keep`; the fault, or None."""
    final = Path(output_dir) / f"checkpoint-{step}"
    unfinished = Path(output_dir) / f".checkpoint-{step}.partial"
    shutil.rmtree(unfinished, ignore_errors=True)
    fault = fault_of(lambda: complete_checkpoint(unfinished, final, files))
    if fault is None:
        for _, old in list_checkpoints(output_dir)[: -keep if keep else 0]:
            shutil.rmtree(old, ignore_errors=True)
        logger.info("saved %s", final)
    else:
        shutil.rmtree(unfinished, ignore_errors=True)
        logger.error("--output_dir: checkpoint-%d was not written: %s; those before it stand, free some space",
            step, fault)  # fmt: skip
    return fault


def save_checkpoint(run, last):
    """Begins checkpoint-N, and waits SAVE_WAIT s for it; for the `last` one until it stands, in several attempts.

    Errors: TrainingError on every rank when the last one was not written, saying where the LoRA files are.
    """
    args, accelerator, progress, fault = run.args, run.accelerator, run.progress, None
    stop.patient = True
    if accelerator.is_main_process:
        if run.saving is not None:
            run.saving.result()  # one at a time
        job = (args.output_dir, progress.step, checkpoint_files(run), args.checkpoints_total_limit)
        run.saving = run.saver.submit(write_checkpoint, *job)
        wait([run.saving], timeout=None if last else SAVE_WAIT)
        for _ in range(SAVE_ATTEMPTS - 1 if last else 0):
            if run.saving.result() is not None:
                time.sleep(SAVE_PAUSE)
                run.saving = run.saver.submit(write_checkpoint, *job)
        fault = run.saving.result() if last else None
    if last and broadcast_object_list([fault])[0]:
        message = f"--output_dir: {args.output_dir} is full: checkpoint-{progress.step} was not written, "
        message += "those before it stand; "
        if accelerator.is_main_process:
            folder = f"{tempfile.gettempdir()}/lora-step-{progress.step}-{progress.run_id}"
            fault = fault_of(lambda: save_lora(run.trained, folder, args.stage))
            message += f"nor could {folder} take the LoRA ({fault}); " if fault else f"the LoRA is in {folder}; "
        raise TrainingError(broadcast_object_list([message])[0] + "free some space and resume")
    accelerator.wait_for_everyone()
    stop.patient = False
    stop.alive()


def append_jsonl(path, rows):
    """Adds the rows, all or none. Errors: OSError, when the disk is full."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    except OSError:
        if path.exists():
            os.truncate(path, size)
        raise


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def note_skipped(args, index, progress, entries, write=True):
    """Counts replaced samples by reason, and adds the damaged ones to skipped.jsonl, each once.

    Errors: InputError when more than --max_bad_fraction of all samples are damaged.
    """
    for entry in entries:
        reason = reason_of(entry)
        progress.skipped[reason] = progress.skipped.get(reason, 0) + 1
        if entry not in progress.damaged and entry not in index.damage:
            progress.damaged.append(entry)
    if write:
        path = Path(args.output_dir) / "skipped.jsonl"
        known = read_jsonl(path)
        rows = [entry for entry in index.damage + progress.damaged if entry not in known]
        fault = fault_of(lambda: append_jsonl(path, rows))
        if fault:
            logger.error("--output_dir: skipped.jsonl lacks %d rows for now: %s", len(rows), fault)
    bad = count_damaged(index.damage + progress.damaged)
    check_bad_fraction("--train_shards", bad, index.total, args.max_bad_fraction)


def verify_checkpoint(folder):
    """None when every byte of the checkpoint is what was written, else what is wrong with it."""
    try:
        text = (folder / "checksums.json").read_text()
        sums = json.loads(text)
        whole = make_checksums(folder, sums)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return f"incomplete ({error})"
    damaged = [name for name, sum_ in json.loads(whole).items() if sums[name] != sum_]
    return None if text == whole else f"damaged: {', '.join(damaged) or 'checksums.json'}"


def find_checkpoint(args):
    """(folder, Progress) to resume from, or (None, None); damaged checkpoints are named and passed over.

    Errors: InputError when the checkpoint given by path, or every one there is, is damaged, or when another version
    of the script wrote it.
    """
    if not args.resume_from_checkpoint:
        return None, None
    if args.resume_from_checkpoint == "latest":
        folders = [path for _, path in reversed(list_checkpoints(args.output_dir))]
    else:
        folders = [checkpoint_path(args)]
    for folder in folders:
        fault = verify_checkpoint(folder)
        if fault is not None:
            logger.warning("--resume_from_checkpoint: %s is %s; passed over", folder, fault)
            continue
        saved = json.loads((folder / "progress.json").read_text())
        foreign = sorted(saved.keys() ^ vars(Progress()).keys())
        if foreign:
            raise InputError(
                f"--resume_from_checkpoint: {folder} is of another version of the trainer (progress.json: "
                f"{', '.join(foreign)}); resume with the train_sdxl_lora.py that lies in the run's folder"
            )
        return folder, Progress(**saved)
    if folders:
        raise InputError(f"--resume_from_checkpoint: no whole checkpoint among {', '.join(map(str, folders))}")
    return None, None


def trim_rows(path, progress):
    """Cuts the rows from after the checkpoint, and one that was being written, so that a resume writes none twice."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        row = json.loads(line) if line.endswith("}\n") else {"step": math.inf}
        if row.get("step", 0) < progress.step + ("val_loss" not in row or not progress.validation_due):
            kept.append(line)
    write_file(path, "".join(kept).encode())


def lock_output_dir(output_dir):
    """Keeps other runs out of the folder for as long as this process lives, and clears up after one that was killed.

    Errors: InputError when another process holds it.
    """
    descriptor = os.open(output_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)  # never closed: that would unlock
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, not inherited by loader processes
        except (BlockingIOError, PermissionError) as error:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
            if time.monotonic() > deadline:
                found = f"{output_dir} is in use by {holder}"
                raise InputError(f"--output_dir: {found}; wait for it, stop it, or give another folder") from error
            time.sleep(0.2)
            continue
        except OSError as error:
            logger.warning("--output_dir: %s cannot be locked (%s); start no second run on it", output_dir, error)
        break
    os.truncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    for leftover in output_dir.glob(".*.partial"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


# ------------------------------------------------------------------------------
# 8 Validation
# ------------------------------------------------------------------------------


@contextmanager
def evaluating(models):
    """The adapted models in eval mode, no LoRA dropout, no gradients; uncompiled, since that would be other graphs."""
    adapted = [models.unet, *models.text_encoders]
    modes = [model.training for model in adapted]
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for model in adapted:
            model.eval()
        try:
            yield
        finally:
            for model, mode in zip(adapted, modes):
                model.train(mode)


def validation_requests(index, batch_size, rank, world, max_batches):
    """[(requests, size)] of this rank: batches of (row, label, step, position) by id, the last padded beyond `size`.

    The position, which seeds the noise, is a hash of the image id: every run and world size sees the same noise.
    """
    rows = np.argsort(index.id_hashes, kind="stable")
    batches = []
    for start in list(range(0, len(rows), batch_size))[:max_batches][rank::world]:
        chunk = rows[start : start + batch_size]
        padded = np.concatenate([chunk, np.repeat(chunk[-1:], batch_size - len(chunk))])
        requests = [(int(i), -1, 0, int(index.id_hashes[i] >> np.uint64(1))) for i in padded]
        batches.append((requests, len(chunk)))
    return batches


# Seam: the metric to sweep. Contract: a float in metrics.jsonl, lower is better, the same on any number of processes.
def compute_validation_loss(run):
    """Mean of diffusion_loss, unweighted, over every validation sample once, noise and timestep fixed per sample."""
    args, accelerator, models, index = run.args, run.accelerator, run.unwrapped, run.val_dataset.index
    world, device = accelerator.num_processes, accelerator.device
    batches, first = (
        validation_requests(index, args.train_batch_size, rank, world, args.val_max_batches)
        for rank in (accelerator.process_index, 0)
    )
    requests = [requests for requests, _ in batches]
    loader = iter(make_loader(run.val_dataset, requests, args.dataloader_num_workers, device.type == "cuda"))
    total = torch.zeros(2, dtype=torch.float64, device=device)
    with evaluating(models):
        for n in range(len(first)):  # rank 0 has the most batches
            leave_if_told(accelerator)
            if n >= len(batches):
                continue
            batch, size = move_batch(next(loader), device), batches[n][1]
            draws = sample_batch_noise(models, batch, noise_offset=0.0)
            losses = diffusion_loss(models, batch, draws, run.weight_dtype).double()[:size]
            whole = to_device(~torch.tensor(batch["replaced"][:size]), device)
            total += torch.stack([torch.where(whole, losses, 0.0).sum(), whole.sum()])
    loss_sum, count = accelerator.reduce(total, "sum").tolist()
    return loss_sum / max(count, 1)


@contextmanager
def stock_forward(*modules):
    """Without the output conversion that Accelerate puts on `forward`: pipelines expect the weights' dtype back."""
    wrapped = [(m, m.__dict__.pop("forward")) for m in modules if "forward" in m.__dict__]
    try:
        yield
    finally:
        for module, forward in wrapped:
            module.forward = forward


@contextmanager
def on_device(device, *modules):
    """Brings those that wait on the CPU to the device, for as long as this lasts."""
    waiting = [module for module in modules if module.device != device]
    for module in waiting:
        module.to(device)
    try:
        yield
    finally:
        for module in waiting:
            module.to("cpu")


def make_pipeline(models):
    """The stock pipeline of the stage around `models`, with the snapshot's sampler."""
    parts = {"vae": models.vae, "unet": models.unet, "scheduler": models.sampling_scheduler, "add_watermarker": False}
    parts |= {"text_encoder_2": models.text_encoders[-1], "tokenizer_2": models.tokenizers[-1]}
    if models.stage == "base":
        parts |= {"text_encoder": models.text_encoders[0], "tokenizer": models.tokenizers[0]}
        pipeline = StableDiffusionXLPipeline(**parts)
    else:  # as the refiner's own snapshot says
        parts |= {"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False}
        pipeline = StableDiffusionXLImg2ImgPipeline(text_encoder=None, tokenizer=None, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate_image(models, prompt, seed, resolution, num_inference_steps=SAMPLE_INFERENCE_STEPS, switch_at=0.8):
    """(H, W, 3) float in [0, 1]: a picture by the stock pipelines and the snapshot's sampler.

    It is made from CPU noise, so it is the one that diffusers makes from the saved file with that seed. In the
    refiner stage the base model makes the first `switch_at` of the steps, as users run the two.
    """
    pipeline, device = make_pipeline(models), models.unet.device
    options = {"num_inference_steps": num_inference_steps, "output_type": "latent"}
    options["generator"] = torch.Generator().manual_seed(seed)
    encoders = models.vae, *models.text_encoders
    with evaluating(models), stock_forward(models.unet, *models.text_encoders), on_device(device, *encoders):
        if models.stage == "base":
            latents = pipeline(prompt, height=resolution, width=resolution, **options).images
        else:
            base = models.base_pipeline.to(device)
            latents = base(prompt, height=resolution, width=resolution, denoising_end=switch_at, **options).images
            base.to("cpu")  # the training step needs the room
            latents = pipeline(prompt, image=latents, denoising_start=switch_at, **options).images
        pixels = models.vae.decode((latents / models.vae.config.scaling_factor).to(models.vae.dtype)).sample
    return pipeline.image_processor.postprocess(pixels.float(), output_type="np")[0]


def draw_grid(images, prompts, columns):
    """One row of pictures per prompt, the prompt above it; images (n, H, W, 3) uint8."""
    side = max(images.shape[1], 128)
    sheet = Image.new("RGB", (columns * side, (side + 16) * -(-len(images) // columns)), "white")
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        tile = Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST if side > image.shape[1] else None)
        sheet.paste(tile, (column * side, row * (side + 16) + 16))
        if column == 0:
            ImageDraw.Draw(sheet).text((2, row * (side + 16) + 2), prompts[i], fill="black")
    return sheet


def save_samples(run):
    """Writes samples/step-N.png, the pictures made by all ranks together, and gives it to the trackers."""
    args, accelerator, step = run.args, run.accelerator, run.progress.step
    seeds = range(run.progress.seed, run.progress.seed + args.num_validation_images)
    jobs = [(prompt, seed) for prompt in read_prompts(args) for seed in seeds]
    numbered = []
    for first in range(0, len(jobs), accelerator.num_processes):
        leave_if_told(accelerator)
        number = first + accelerator.process_index
        if number < len(jobs):
            picture = generate_image(run.unwrapped, *jobs[number], args.resolution, switch_at=args.denoising_start)
            numbered.append((number, (picture * 255).round().astype(np.uint8)))
    ordered = [image for _, image in sorted(gather_object(numbered), key=lambda pair: pair[0])]
    if not accelerator.is_main_process:
        return
    grid = draw_grid(np.stack(ordered), [prompt for prompt, _ in jobs], args.num_validation_images)
    encoded = io.BytesIO()
    grid.save(encoded, "png")
    folder = Path(args.output_dir) / "samples"
    folder.mkdir(exist_ok=True)
    write_file(folder / f"step-{step}.png", encoded.getvalue())
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": np.asarray(grid)[None]}, step=step, **layout)


def log_row(accelerator, row, step):
    """Gives the row to every tracker; where one cannot write, the others get it and the run goes on."""
    for tracker in accelerator.trackers:
        fault = fault_of(lambda tracker=tracker: tracker.log(row, step=step))
        if fault:
            logger.error("--output_dir: %s lacks the row of step %d for now: %s", tracker.name, step, fault)


def validate(run):
    """{"val_loss": …} and the best one yet (empty without --val_shards); draws the sample grid of the prompts.

    Errors: Preempted, on all ranks together.
    """
    args, progress = run.args, run.progress
    metrics, best = {}, progress.best
    if run.val_dataset is not None:
        val_loss = compute_validation_loss(run)
        if not best or val_loss < best["val_loss"]:
            best = {"val_loss": val_loss, "step": progress.step}
        metrics = {"val_loss": val_loss, "best_val_loss": best["val_loss"], "best_step": best["step"]}
    if args.validation_prompt or args.validation_prompts:
        fault = fault_of(lambda: save_samples(run))
        if fault:
            logger.error("--output_dir: no sample grid of step %d: %s", progress.step, fault)
    progress.best = best
    if metrics:
        log_row(run.accelerator, metrics, progress.step)
        logger.info("step %d: %s", progress.step, metrics)
    return metrics


# ---- preview: what --dry_run finds out and draws


def count_unet(unet, resolution, chunks, stage="base"):
    """(FLOP, bytes kept for the backward) of one image forward and backward through a UNet on the meta device."""
    config, dtype, kept = unet.config, unet.dtype, {}
    weights = {p.untyped_storage()._cdata for p in unet.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    def attention(query, key, value, **options):  # on the meta device PyTorch would keep all scores
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]

    time_ids = TIME_IDS[stage]
    pooled = config.projection_class_embeddings_input_dim - time_ids * config.addition_time_embed_dim
    side = resolution // 8
    with torch.device("meta"):
        latents = torch.empty(1, config.in_channels, side, side, dtype=dtype)
        prompt_embeds = torch.empty(1, 77 * chunks, config.cross_attention_dim, dtype=dtype)
        conditions = {"text_embeds": torch.empty(1, pooled, dtype=dtype), "time_ids": torch.empty(1, time_ids)}
        timesteps = torch.empty(1)
    counter = FlopCounterMode(display=False)
    with counter, mock.patch.object(F, "scaled_dot_product_attention", attention):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = unet(latents, timesteps, prompt_embeds, added_cond_kwargs=conditions).sample
        size = sum(storage.nbytes() for storage in kept.values())
        output.float().mean().backward()
    return counter.get_total_flops(), size


def measure_matmul(device, dtype):
    """FLOP/s of a large matrix product: what no training step can exceed."""
    side, start, count = (8192 if device.type == "cuda" else 1024), 0.0, -2  # two to warm up
    a = torch.randn(side, side, device=device).to(dtype)
    while count < 2 or time.perf_counter() - start < 0.3:
        (a @ a)[0, 0].item()  # waits for the result
        count += 1
        start = time.perf_counter() if count == 0 else start
    return 2 * side**3 * count / (time.perf_counter() - start)


def estimate_resources(args, models, trained, device, images):
    """Memory of a device in bytes, part by part, and the seconds that training on `images` takes at the very least."""
    flop, kept = count_unet(models.unet, args.resolution, models.caption_chunks, args.stage)
    with torch.device("meta"):
        vae, side = AutoencoderKL.from_config(models.vae.config), args.resolution
        pixel_values = torch.empty(1, vae.config.in_channels, side, side)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vae.encode(pixel_values)
    flop += counter.get_total_flops()
    parts = [models.unet]
    parts += [] if args.cache_latents else [models.vae]
    parts += [] if args.cache_text_embeddings else models.text_encoders
    masters = sum(p.numel() for model in trained.values() for p in model.parameters() if p.requires_grad)
    weights = sum(p.numel() * p.element_size() for model in parts for p in model.parameters() if not p.requires_grad)
    if args.base_precision != "auto":
        linears = [m.weight for m in models.unet.modules() if isinstance(m, torch.nn.Linear)]
        saved = models.unet.dtype.itemsize - {"nf4": 0.56, "int8": 1.0}[args.base_precision]  # bytes a weight
        weights -= int(saved * sum(w.numel() for w in linears if not w.requires_grad))
    size = models.unet.dtype, args.train_batch_size, args.resolution
    checkpointing = choose_checkpointing(args.gradient_checkpointing, device, *size, reserved=weights)
    kept = kept * ACTIVATION_BYTES[checkpointing] / ACTIVATION_BYTES["none"]
    moments = {"adamw": 8, "adamw8bit": 2, "prodigy": 16}[args.optimizer]  # bytes a parameter
    memory = {"frozen weights": weights, "adapters, gradients, optimizer": masters * (8 + moments)}
    memory["activations of the UNet"] = kept * args.train_batch_size
    speed = measure_matmul(device, models.unet.dtype)
    return {
        "trained_parameters": masters,
        "memory_bytes": memory | {"together": sum(memory.values())},
        "flop_per_image": flop,
        "matmul_flop_per_second": speed,
        "seconds_at_least": flop * images / speed,
    }


def describe_data(dataset, plan, steps, caption_tokens):
    """{"images", "species", "buckets", …}: what the run of `steps` steps will be given."""
    index, mix, last = dataset.index, plan.mix, max(steps - 1, 0)
    scales = index.scales(dataset.resolution)
    cut = 1 - scales.min(axis=1) / scales.max(axis=1)
    species = zip(mix.names, plan.arrivals[:, :-1].sum(axis=0), mix.data, mix.target(0), mix.target(last))
    counts = np.bincount(index.buckets, minlength=len(dataset.bucket_sizes))
    fields = index.table.column("score").to_pylist()
    scores = Counter(int(scale_aesthetic(value, dataset.aesthetic_scale)) for value in fields if value is not None)
    buckets = zip(dataset.bucket_sizes, counts, plan.bucket_weights(0), plan.bucket_weights(last))
    return {
        "images": len(index),
        "damaged": dict(Counter(map(reason_of, index.damage))),
        "damaged_samples": index.damage[:100],
        "unlabelled": int(plan.arrivals[:, -1].sum()),
        "species": {
            name: {"images": float(count), "data": float(data), "at_start": float(start), "at_end": float(end)}
            for name, count, data, start, end in species
        },
        "buckets": [
            {"size": list(size), "images": int(count), "at_start": float(start), "at_end": float(end)}
            for size, count, start, end in buckets
        ],
        "cut_off": {"median": float(np.median(cut)), "most": float(cut.max())},
        "scaled_up": {"images": int((scales.max(axis=1) > 1).sum()), "most": float(scales.max())},
        "aesthetic_scores": {f"{n} to {n + 1}": scores[n] + (scores[10] if n == 9 else 0) for n in range(1, 10)}
        | {"none": fields.count(None)},
        "caption_tokens": {f"{p}%": int(np.percentile(caption_tokens, p)) for p in (0, 25, 50, 75, 95, 100)},
        "captions_over_75_tokens": int((np.array(caption_tokens) > 75).sum()),
    }


def draw_contact_sheet(dataset, requests, columns=4, side=280):
    """The samples of `requests`: each file's picture with the window that is trained on, and what goes with it."""
    sheet = Image.new("RGB", (columns * side, -(-len(requests) // columns) * (side + 48)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, request in enumerate(requests):
        i, label, step, _ = request
        item = dataset[request]
        (top, left), bucket = item["crop_top_lefts"], item["target_sizes"]
        row, (image, (height, width)), _ = dataset.first_whole(i, label, lambda row, b=bucket: dataset.open(row, b))
        if dataset.is_flipped(row, step):
            image = ImageOps.mirror(image)
        shrink = (side - 8) / max(height, width)
        image = image.resize((max(1, round(width * shrink)), max(1, round(height * shrink))))
        at = shrink / max(bucket[0] / height, bucket[1] / width)  # from px of the scaled image to px of the sheet
        x, y = number % columns * side + 4, number // columns * (side + 48) + 4
        sheet.paste(image, (x, y))
        window = [x + left * at, y + top * at, x + (left + bucket[1]) * at - 1, y + (top + bucket[0]) * at - 1]
        draw.rectangle(window, outline="red", width=2)
        lines = [f"{item['species'] or 'no label'}, step {step + 1}"]
        lines.append(f"{width} x {height} px, cut to {bucket[1]} x {bucket[0]}")
        lines.append(item["captions"].replace("\n", " ")[:80])
        for n, line in enumerate(lines):
            length = next(n for n in range(len(line), -1, -1) if draw.textlength(line[:n]) <= side - 12)
            draw.text((x, y + side - 6 + 13 * n), line if length == len(line) else line[:length] + "…", fill="black")
    return sheet


def draw_species(species, most=60):
    """Bars of every class's share: in the data, at the first step, at the last; the commonest and the rarest."""
    names = sorted(species, key=lambda name: -species[name]["data"])
    names = names if len(names) <= most else names[: most // 2] + names[-most // 2 :]
    colours = {"data": "#b8b8b8", "at_start": "#2a7fd4", "at_end": "#e08a1e"}
    sheet = Image.new("RGB", (900, 30 + 26 * len(names)), "white")
    draw = ImageDraw.Draw(sheet)
    for n, text in enumerate(("share of the data", "drawn at step 1", "drawn at the last step")):
        draw.rectangle([180 + 200 * n, 8, 190 + 200 * n, 18], fill=list(colours.values())[n])
        draw.text((196 + 200 * n, 7), text, fill="black")
    largest = max(species[name][kind] for name in names for kind in colours)
    for row, name in enumerate(names):
        y = 28 + 26 * row
        draw.text((4, y + 5), name[:26], fill="black")
        for n, (kind, colour) in enumerate(colours.items()):
            share = species[name][kind]
            draw.rectangle([180, y + 7 * n, 180 + 620 * share / largest, y + 7 * n + 5], fill=colour)
        draw.text((806, y + 5), f"{species[name]['images']:.0f} images", fill="black")
    return sheet


# ------------------------------------------------------------------------------
# 9 Train loop
# ------------------------------------------------------------------------------


@dataclass
class Run:
    """What the train loop works on, made in make_run()."""

    args: argparse.Namespace
    accelerator: Accelerator
    models: Models  # prepared
    unwrapped: Models  # the same without DDP
    trained: dict  # name → model with adapters, without DDP
    optimizer: torch.optim.Optimizer
    lr_schedule: object
    batches: MicroBatches
    loader: DataLoader
    val_dataset: ImageDataset | None
    weight_dtype: torch.dtype
    progress: Progress
    max_train_steps: int
    steps_per_epoch: int
    reports: deque = field(default_factory=deque)  # sent, not yet read
    stopping: bool = False  # the ranks have agreed to
    saver: ThreadPoolExecutor | None = None  # writes checkpoints on the main process
    saving: Future | None = None  # the newest one


def train_step(run, batch):
    """(B,) losses of one micro-step and, after the last of an update, the gradients' norm before clipping."""
    args, accelerator = run.args, run.accelerator
    grad_norm = None
    draws = sample_batch_noise(run.models, batch, args.noise_offset)
    if args.lora_dropout:
        torch.manual_seed(torch_seed(DROPOUT_MASK, run.progress.seed, batch["positions"][0]))
    with accelerator.accumulate(run.models.unet, *run.models.text_encoders):
        losses = diffusion_loss(
            run.models,
            batch,
            draws,
            run.weight_dtype,
            snr_gamma=args.snr_gamma,
            caption_dropout_rate=args.caption_dropout_rate,
            dropped_caption=args.dropped_caption,
        )
        accelerator.backward(losses.mean())
        if accelerator.sync_gradients:
            parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
            grad_norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
    return losses.detach(), grad_norm


def check_gradients(trained):
    """Errors: InputError naming the trainable parameters that got no gradient."""
    lost = [
        f"{name}.{n}"
        for name, m in trained.items()
        for n, p in m.named_parameters()
        if p.requires_grad and p.grad is None
    ]
    if lost:
        raise InputError(f"--lora_target_modules: no gradient reaches {', '.join(lost[:3])}; leave such layers out")


@dataclass
class Report:
    """What the ranks tell each other about a step; nobody waits for it before it is read."""

    step: int
    sums: torch.Tensor  # (4,) on the CPU, over the ranks: loss, is the gradient lost, told to stop, damaged samples
    arrived: torch.cuda.Event | None  # until then, on a GPU, `sums` is on its way
    grad_norm: torch.Tensor
    losses: torch.Tensor  # (n,) of this rank, as are the next two
    keys: list
    skipped: list


def send_report(run, losses, grad_norm, keys, skipped):
    """Sends the step's Report: the one reduction per optimizer step beside the gradients'."""
    own = torch.tensor([0.0, 0.0, float(bool(stop)), len(skipped)], dtype=torch.float64)
    own, on_gpu = to_device(own, losses.device), losses.device.type == "cuda"
    own[0], own[1] = losses.double().mean(), ~torch.isfinite(grad_norm)
    sums = run.accelerator.reduce(own, "sum").to("cpu", non_blocking=on_gpu)
    arrived = torch.cuda.current_stream().record_event() if on_gpu else None
    run.reports.append(Report(run.progress.step + 1, sums, arrived, grad_norm, losses, keys, skipped))


def count_lost_step(run, report, loss):
    """Counts a step whose loss or gradient is not finite; fp16's scaler or --on_nonfinite skip leaves it out.

    Errors: TrainingError on all ranks together, naming step and samples, without either or after too many in a row.
    """
    args, progress = run.args, run.progress
    progress.nonfinite_steps += 1
    progress.nonfinite_in_a_row += 1
    local = [k for k, l in zip(report.keys, report.losses.tolist()) if math.isfinite(loss) or not math.isfinite(l)]
    samples = ", ".join(gather_object(local)[:8])
    found = f"loss is {loss}, gradient norm {float(report.grad_norm)} at step {report.step}, samples {samples}"
    may_skip = run.accelerator.scaler is not None or args.on_nonfinite == "skip"
    if not may_skip or progress.nonfinite_in_a_row > MAX_NONFINITE_STEPS:
        times = f" ({progress.nonfinite_in_a_row} steps in a row)" if may_skip else ""
        raise TrainingError(
            f"--learning_rate: {found}{times}; no checkpoint holds it; lower the learning rate, or use "
            "--mixed_precision bf16 and --vae_precision fp32; --on_nonfinite skip leaves out the odd one"
        )
    logger.warning("step left out: %s", found)


def read_reports(run, late=0):
    """Whether the last step read is lost; reads all reports but the newest `late`, on every rank the same.

    Counts what they tell into run.progress; sets run.stopping, and then leaves no report unread.
    """
    lost = False
    while len(run.reports) > (0 if run.stopping else late):
        report = run.reports.popleft()
        if report.arrived:
            report.arrived.synchronize()
        loss, nonfinite, told, damaged = report.sums.tolist()
        lost, run.stopping = nonfinite > 0 or not math.isfinite(loss), run.stopping or told > 0
        if lost:
            count_lost_step(run, report, loss)
        else:
            run.progress.nonfinite_in_a_row = 0
            run.progress.loss_sum += loss / run.accelerator.num_processes
            run.progress.loss_count += 1
        if damaged:
            entries = gather_object(report.skipped)
            note_skipped(run.args, run.batches.plan.index, run.progress, entries, run.accelerator.is_main_process)
    return lost


def log_metrics(run, bar, grad_norm, last_log):
    """(row, (step, time)) of metrics.jsonl and the trackers: means since the last row."""
    progress = run.progress
    step, now = progress.step, time.time()
    images = (step - last_log[0]) * run.batches.plan.global_batch
    row = {
        **({"loss": progress.loss_sum / progress.loss_count} if progress.loss_count else {}),
        "lr": run.optimizer.param_groups[0]["lr"],
        "grad_norm": float(grad_norm),
        "epoch": step / run.steps_per_epoch,
        "species_mix": run.batches.plan.mix.weight_of_data(step - 1),
        "skipped": sum(progress.skipped.values()),
        **{f"skipped/{reason}": count for reason, count in progress.skipped.items()},
        "nonfinite_steps": progress.nonfinite_steps,
        "images_per_second": images / max(now - last_log[1], 1e-9),
    }
    progress.loss_sum, progress.loss_count = 0.0, 0
    bar.set_postfix(
        loss=f"{row.get('loss', math.nan):.4f}", lr=f"{row['lr']:.2e}", img_s=f"{row['images_per_second']:.1f}"
    )
    log_row(run.accelerator, row, step)
    return row, (step, now)


def validate_or_stop(run):
    """validate()'s metrics. A validation that a signal forestalls or cuts short is the first thing due on resume."""
    run.progress.validation_due = True
    metrics = {}
    try:
        if not run.stopping:
            metrics = validate(run)
            run.progress.validation_due = False
    except Preempted:
        run.stopping = True
    return metrics


def train(run):
    """Trains to max_train_steps or until told to stop; returns the last metrics.

    Errors: TrainingError when it cannot go on; Preempted when told to stop before there is anything to save.
    """
    args, accelerator, progress = run.args, run.accelerator, run.progress
    quiet = not accelerator.is_local_main_process
    bar = tqdm(total=run.max_train_steps, initial=progress.step, disable=quiet, unit="step")
    metrics, last_log = validate_or_stop(run) if progress.validation_due else {}, (progress.step, time.time())
    if run.stopping:
        raise Preempted
    losses, keys, skipped = [], [], []
    for batch in run.loader:
        batch = move_batch(batch, accelerator.device)
        micro_losses, grad_norm = train_step(run, batch)
        stop.alive()
        losses.append(micro_losses)
        keys += batch["keys"]
        skipped += batch["skipped"]
        if not accelerator.sync_gradients:
            continue

        if progress.step == 0:
            check_gradients(run.trained)
        send_report(run, torch.cat(losses), grad_norm, keys, skipped)
        losses, keys, skipped = [], [], []
        lost = accelerator.scaler is None and args.on_nonfinite == "skip" and read_reports(run)  # a scaler sees to it
        set_learning_rate(run.optimizer, run.lr_schedule(progress.step))
        if not lost:
            run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.samples += run.batches.plan.global_batch
        progress.cursors = run.batches.states.pop(progress.step)
        bar.update()
        stop.begun = True

        done = progress.step >= run.max_train_steps
        logs = done or progress.step % args.logging_steps == 0
        validates = (
            done or progress.step % (args.validation_steps or args.validation_epochs * run.steps_per_epoch) == 0
        )
        saves = progress.step % args.checkpointing_steps == 0 and progress.step >= args.checkpointing_after_steps
        # a step's numbers are read a step late, so that none waits for its own, but before anything rests on them
        read_reports(run, late=0 if logs or validates or saves or done else 1)
        if logs:
            metrics, last_log = log_metrics(run, bar, grad_norm, last_log)
        if validates:
            metrics |= validate_or_stop(run)
        if saves or done or run.stopping:
            save_checkpoint(run, last=done or run.stopping)
        if done or run.stopping:
            break
    bar.close()
    stop.patient = True  # no step is to come that the watchdog could wait for
    done = progress.step >= run.max_train_steps and not progress.validation_due
    return metrics | {"step": progress.step, "preempted": not done}


# ------------------------------------------------------------------------------
# 10 Main
# ------------------------------------------------------------------------------


class JsonlTracker(GeneralTracker):
    """metrics.jsonl: one JSON object per row, in the file as soon as it is logged and the disk has room."""

    name = "jsonl"
    requires_logging_directory = False

    def __init__(self, path):
        super().__init__()
        self.path, self.waiting = path, []

    @property
    def tracker(self):
        return self.path

    @on_main_process
    def store_init_configuration(self, values):
        pass

    @on_main_process
    def log(self, values, step=None, **kwargs):
        self.waiting.append({"step": step, **values, "time": round(time.time(), 3)})
        append_jsonl(self.path, self.waiting)
        self.waiting = []


def check_world(accelerator):
    """Errors: InputError when the launcher's processes do not form one world but work side by side."""
    expected = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != expected:
        raise InputError(
            f"--num_processes: the launcher started {expected} processes but they form a world of "
            f"{accelerator.num_processes}; without a GPU set ACCELERATE_USE_CPU=true"
        )


def make_accelerator(args):
    """Accelerator with our trackers and without autocast; checks that the launcher's world is the one we are in."""
    autocast = AutocastKwargs(enabled=False)  # the frozen models are in the weight dtype, the adapters cast themselves
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)
    output_dir = Path(args.output_dir)
    if args.allow_tf32:
        torch.set_float32_matmul_precision("high")
    if args.deterministic and torch.cuda.is_available():  # a CPU's are
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch._inductor.config.deterministic = True
    names = [] if args.report_to == "none" else [args.report_to]
    if args.report_to == "all":
        names = [str(tracker) for tracker in get_available_trackers()]
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=[*names, JsonlTracker(output_dir / "metrics.jsonl")],
        project_config=ProjectConfiguration(
            project_dir=str(output_dir), logging_dir=str(output_dir / args.logging_dir)
        ),
        kwargs_handlers=[autocast, ddp, InitProcessGroupKwargs(timeout=GROUP_TIMEOUT)],
    )
    check_world(accelerator)
    if accelerator.mixed_precision == "fp16" and accelerator.device.type != "cuda":
        raise InputError(
            "--mixed_precision: fp16 needs a CUDA device (a CPU silently computes in fp32); use bf16 or no"
        )
    return accelerator


@contextmanager
def explained(args):
    """Ends a run that cannot go on with what happened and what helps. Errors: TrainingError in place of others."""
    resume = "the newest checkpoint stands; continue with --resume_from_checkpoint latest"
    try:
        yield
    except torch.OutOfMemoryError as error:
        remedy = "--gradient_checkpointing, then a smaller --train_batch_size with --gradient_accumulation_steps"
        remedy += ", then --base_precision nf4, --use_8bit_adam, a smaller --rank or --resolution"
        raise TrainingError(f"--train_batch_size: out of GPU memory; try {remedy}; {resume}") from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        raise TrainingError(f"--output_dir: cannot write: {error}; make room; {resume}") from error
    except RuntimeError as error:
        if "deterministic implementation" in str(error):
            raise InputError(f"--deterministic: {error}; give --no-deterministic") from error
        if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
            raise
        logs = Path(args.output_dir) / args.logging_dir / "rank-N.log"
        raise TrainingError(f"another process of this run is gone: {logs} of it says why; {resume}") from error


@contextmanager
def stop_signals():
    """Signals mean "save and leave"; those of a program that called main() are its own again afterwards."""
    taken = stop.listen()
    try:
        yield
    finally:
        if taken:
            stop.release()


def prepare_output_dir(accelerator, args):
    """Makes output_dir and starts this rank's log in it. Errors: InputError when nothing can be written there."""
    output_dir = Path(args.output_dir)
    log = output_dir / args.logging_dir / f"rank-{accelerator.process_index}.log"
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(log)
    except OSError as error:
        raise InputError(f"--output_dir: cannot write there: {error}; give a folder you can write to") from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    console = logging.StreamHandler()
    console.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    logger.handlers = [handler, console]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    datasets.utils.logging.disable_progress_bar()
    for library in (datasets.utils.logging, transformers.utils.logging, diffusers.utils.logging):
        library.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()


def decide_on_main(accelerator, action):
    """action()'s value on every rank, from the main process. Errors: its InputError, on all ranks together."""
    answer = None
    if accelerator.is_main_process:
        try:
            answer = action()
        except InputError as error:
            answer = error
    answer = broadcast_object_list([answer])[0]
    if isinstance(answer, InputError):
        raise answer
    return answer


def log_data(index, mix, csv_counts, resolution):
    """Tells what was found: samples, species, damage, small images, where the species CSV and the data disagree."""
    logger.info("%d images of %d species, %d damaged", len(index), int(mix.support.sum()), len(index.damage))
    if index.damage:
        logger.warning("damaged: %s", dict(Counter(map(reason_of, index.damage))))
    enlarged = index.scales(resolution).max(axis=1)
    if (enlarged > 1).any():
        logger.warning("--resolution: %d of %d images are smaller and are scaled up, by up to %.1f ×",
            (enlarged > 1).sum(), len(index), enlarged.max())  # fmt: skip
    if csv_counts and mix.absent:
        logger.warning("--species_csv: %d species never arrive, e.g. %s", len(mix.absent), ", ".join(mix.absent[:5]))
    distance = 0.5 * np.abs(mix.data - mix.arrival).sum()
    if csv_counts and distance > 0.1:
        worst = int(np.argmax(np.abs(mix.data - mix.arrival)))
        logger.warning(
            "--species_csv: differs from the data by %.0f %% (%s: %.2f %% there, %.2f %% here); the CSV holds",
            100 * distance, mix.names[worst], 100 * mix.data[worst], 100 * mix.arrival[worst],
        )  # fmt: skip


def make_data(accelerator, args, seed):
    """(dataset, mix, validation dataset or None); warnings about damage and about the species are logged."""
    flag = "--train_shards" if args.train_shards else "--train_data_dir" if args.train_data_dir else "--dataset_name"
    index = load_index(accelerator, args, flag, seed)
    csv_counts = read_species_csv(args.species_csv) if args.species_csv else None
    start, end, steps = args.species_mix
    mix = SpeciesMix(index, args.species_choice, csv_counts, start, end, steps, args.species_mix_schedule)
    if args.crop == "bucket":
        index.bucket_sizes = make_buckets(args.resolution)
        index.buckets = nearest_buckets(index.sizes(), index.bucket_sizes)
    if accelerator.is_main_process:
        log_data(index, mix, csv_counts, args.resolution)
    look = {"interpolation": args.image_interpolation_mode, "cache_dir": args.cache_dir or args.output_dir}
    look |= {"resolution": args.resolution, "aesthetic_scale": args.aesthetic_scale}
    dataset = ImageDataset(index, seed, crop=args.crop, random_flip=args.random_flip, **look)
    val_dataset = None
    if args.val_shards:
        val_index = load_index(accelerator, args, "--val_shards", seed)
        val_dataset = ImageDataset(val_index, 0, crop="center", random_flip=False, **look)
    return dataset, mix, val_dataset


def save_run(args, progress, index):
    """config.yaml (a --config file, never with the token), run.json and the script itself into output_dir."""
    output_dir = Path(args.output_dir)
    leave_out = ("config", "hub_token", "overwrite_output_dir", "resume_from_checkpoint")
    flags = {k: v for k, v in vars(args).items() if v is not None and k not in leave_out} | {"seed": progress.seed}
    write_file(output_dir / "config.yaml", yaml.safe_dump(flags, sort_keys=False, allow_unicode=True).encode())
    script = Path(__file__)
    revision = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=script.parent, capture_output=True, text=True
    ).stdout.strip()
    packages = ["torch", "accelerate", "diffusers", "transformers", "peft", "webdataset", "datasets", "safetensors"]
    facts = {
        "versions": {"python": sys.version.split()[0]} | {name: importlib.metadata.version(name) for name in packages},
        "git_revision": revision or None,
        "dataset": index.fingerprint(),
        "images": len(index),
        "run_id": progress.run_id,
    }
    write_file(output_dir / "run.json", (json.dumps(facts, indent=1) + "\n").encode())
    shutil.copy(script, output_dir / script.name)


def save_model_card(args, metrics, index):
    """README.md of the LoRA: how it was trained, how to load it, the last sample grid."""
    samples = sorted((Path(args.output_dir) / "samples").glob("step-*.png"), key=lambda p: int(p.stem.split("-")[1]))
    numbers = ", ".join(f"{k} {v:.4g}" for k, v in metrics.items() if k in ("step", "loss", "val_loss"))
    picture = f"![samples](samples/{samples[-1].name})\n\n" if samples else ""
    flags = "\n".join(f"  {k}: {getattr(args, k)}" for k in MATHEMATICS)
    base_model, pipeline, parts = args.pretrained_model_name_or_path, "StableDiffusionXLPipeline", ""
    if args.stage == "refiner":
        base_model, pipeline = args.refiner_unet, "StableDiffusionXLImg2ImgPipeline"
        if args.text_encoder_2_lora:
            parts = ", text_encoder_2=base.text_encoder_2)  # of the base pipeline with its LoRA"
    on_hub = "" if Path(base_model).expanduser().exists() else f"base_model: {base_model}\n"  # the hub takes no path
    card = f"""---
{on_hub}library_name: diffusers
tags: [text-to-image, diffusers, lora, stable-diffusion-xl]
---
# LoRA for {base_model}

{picture}Trained on {len(index)} captioned images of {len(index.label_names)} classes; {numbers}.

```python
pipeline = {pipeline}.from_pretrained("{base_model}"{parts or ")"}
pipeline.load_lora_weights("PATH", weight_name="{LORA_FILE}")
```

`{KOHYA_FILE}` holds the same adapters for ComfyUI and A1111. Training flags:

```yaml
{flags}
```
"""
    write_file(Path(args.output_dir) / "README.md", card.encode())


def push_to_hub(args):
    """Uploads LoRA files, card, samples and config.yaml to --hub_model_id."""
    from huggingface_hub import HfApi

    api = HfApi(token=args.hub_token)
    repo_id = api.create_repo(args.hub_model_id or Path(args.output_dir).resolve().name, exist_ok=True).repo_id
    patterns = ["*.safetensors", "README.md", "config.yaml", "samples/*"]
    ignored = ["checkpoint-*/*", ".checkpoint-*/*"]
    api.upload_folder(repo_id=repo_id, folder_path=args.output_dir, allow_patterns=patterns, ignore_patterns=ignored)


def make_run(args, accelerator, progress):
    """Everything the train loop needs, made in the order of the rooms."""
    dataset, mix, val_dataset = make_data(accelerator, args, progress.seed)
    index = dataset.index
    leave_if_told(accelerator)
    law = make_law(args, accelerator, index, mix)
    if progress.law:  # before the models are loaded, which takes long, and once more when they are known
        check_law(progress.law, law, args.allow_batch_change)

    weight_dtype = weight_dtype_of(accelerator.mixed_precision)
    models = load_models(args, weight_dtype, accelerator.device, unet_weights=not args.dry_run)
    captions = index.table.column("caption").to_pylist()
    models.caption_chunks, cut, longest = count_chunks(models.tokenizers[0], captions, args.long_captions)
    if cut and accelerator.is_main_process:
        logger.warning("--long_captions %s: %d of %d captions are cut, the longest has %d tokens and %d are read",
            args.long_captions, cut, len(captions), longest, 75 * models.caption_chunks)  # fmt: skip
    if not args.dry_run:
        law["base_model"] = fingerprint_parts(models.unet, models.vae, *models.text_encoders)
    if progress.law:
        check_law(progress.law, law, args.allow_batch_change)
        for changed in differences(progress.flags, other_flags(args)) if accelerator.is_main_process else ():
            logger.info("resumed with another %s", changed)
    progress.law, progress.flags = law, other_flags(args)
    if not args.dry_run:
        if args.cache_latents or args.cache_text_embeddings:
            cache_encodings(accelerator, args, models, [d for d in (dataset, val_dataset) if d])
        if args.base_precision != "auto":
            quantize_linears(models.unet, args.base_precision, weight_dtype)
        models.unet.to(accelerator.device)
    if args.stage == "refiner" and (args.validation_prompt or args.validation_prompts) and not args.dry_run:
        models.base_pipeline = load_base_pipeline(args, models, weight_dtype)
    leave_if_told(accelerator)
    trained = add_adapters(args, models, progress.seed)
    if not args.dry_run:
        set_speed(args, models, trained, accelerator.device)

    global_batch = law["global_batch"]
    learning_rate = args.learning_rate * (global_batch if args.scale_lr else 1)
    groups = make_parameter_groups(trained, learning_rate, args.text_encoder_lr_scale)
    prepared_models, optimizer = trained, None
    if not args.dry_run:
        prepared = accelerator.prepare(*trained.values(), make_optimizer(args, groups, learning_rate))
        prepared_models, optimizer = dict(zip(trained, prepared[:-1])), prepared[-1]
    encoders = [prepared_models.get(n, m) for n, m in zip(("text_encoder", "text_encoder_2"), models.text_encoders)]

    steps_per_epoch = math.ceil(len(index) / global_batch)
    max_train_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    warmup_steps = round(0.03 * max_train_steps) if args.lr_warmup_steps is None else args.lr_warmup_steps
    position = (progress.step, progress.cursors, progress.samples)
    plan = SamplePlan(index, mix, args.species_choice, progress.seed, global_batch, *position)
    batches = MicroBatches(
        plan, max_train_steps, args.train_batch_size, accelerator.process_index, accelerator.num_processes
    )
    return Run(
        args=args,
        accelerator=accelerator,
        models=replace(models, unet=prepared_models["unet"], text_encoders=encoders),
        unwrapped=models,
        trained=trained,
        optimizer=optimizer,
        lr_schedule=make_lr_schedule(args.lr_scheduler, warmup_steps, max_train_steps),
        batches=batches,
        loader=make_loader(dataset, batches, args.dataloader_num_workers, accelerator.device.type == "cuda"),
        val_dataset=val_dataset,
        weight_dtype=weight_dtype,
        progress=progress,
        max_train_steps=max_train_steps,
        steps_per_epoch=steps_per_epoch,
    )


def preview(run):
    """--dry_run: writes OUTPUT_DIR/preview and prints the run in a few lines; returns what preview.json holds."""
    args, plan, steps = run.args, run.batches.plan, run.max_train_steps
    captions = plan.index.table.column("caption").to_pylist()
    tokens = [len(ids) for ids in run.models.tokenizers[0](captions, add_special_tokens=False).input_ids]
    facts = describe_data(run.loader.dataset, plan, steps, tokens)
    facts |= {"global_batch": plan.global_batch, "steps": steps, "steps_per_epoch": run.steps_per_epoch}
    own = steps * plan.global_batch // run.accelerator.num_processes
    facts |= estimate_resources(args, run.models, run.trained, run.accelerator.device, own)
    folder = Path(args.output_dir) / "preview"
    folder.mkdir(parents=True, exist_ok=True)
    requests = [request for _, batch in zip(range(24), run.batches) for request in batch][:24]
    draw_contact_sheet(run.loader.dataset, requests).save(folder / "contact_sheet.png")
    if facts["species"]:
        draw_species(facts["species"]).save(folder / "species.png")
    write_file(folder / "preview.json", (json.dumps(facts, indent=1, ensure_ascii=False) + "\n").encode())
    memory, percentiles = facts["memory_bytes"], facts["caption_tokens"]
    filled = [bucket["images"] for bucket in facts["buckets"] if bucket["images"]]
    logger.info("images      %d of %d species, %d unlabelled, %d damaged",
        facts["images"], len(facts["species"]), facts["unlabelled"], len(plan.index.damage))  # fmt: skip
    logger.info("shapes      %d, of which %d have fewer images than a batch; %.0f %% of a picture is cut off at most",
        len(filled), sum(n < plan.global_batch for n in filled), 100 * facts["cut_off"]["most"])  # fmt: skip
    logger.info("captions    %d to %d tokens, median %d; %d over 75",
        percentiles["0%"], percentiles["100%"], percentiles["50%"], facts["captions_over_75_tokens"])  # fmt: skip
    if args.stage == "refiner":
        histogram = ", ".join(f"{span}: {count}" for span, count in facts["aesthetic_scores"].items())
        logger.info("aesthetic   images by score: %s (taken as %g)", histogram, AESTHETIC_SCORE)
    logger.info("steps       %d of %d images, %d per epoch", steps, plan.global_batch, run.steps_per_epoch)
    logger.info("parameters  %.3g M trained", facts["trained_parameters"] / 1e6)
    logger.info("memory      %.2f GB a device at least: %s",
        memory["together"] / 1e9,
        ", ".join(f"{name} {size / 1e9:.2f}" for name, size in memory.items() if name != "together"))  # fmt: skip
    logger.info("time        %.2g h at the very least: %.3g TFLOP an image, %.3g TFLOP/s in a matrix product here",
        facts["seconds_at_least"] / 3600, facts["flop_per_image"] / 1e12,
        facts["matmul_flop_per_second"] / 1e12)  # fmt: skip
    logger.info("nothing was trained; see %s", folder)
    return facts


def claim_output_dir(args):
    """(checkpoint folder or None, its Progress or a fresh one); from here on no other run may write to output_dir.

    Errors: InputError when one does, when no checkpoint is whole, or when --seed is not the checkpoint's.
    """
    if not args.dry_run:
        lock_output_dir(Path(args.output_dir))
    folder, progress = find_checkpoint(args)
    if progress is None:
        seed = args.seed if args.seed is not None else int.from_bytes(os.urandom(4), "little") >> 1
        return None, Progress(seed=seed, run_id=os.urandom(4).hex())
    if args.seed not in (None, progress.seed):
        found = f"{progress.seed} then, {args.seed} now"
        raise InputError(f"--seed: {found}; give the value of then or another --output_dir")
    return folder, progress


def start(run, checkpoint):
    """Loads the checkpoint, if any, brings output_dir to where it was then, and starts the trackers.

    Errors: InputError on all ranks when one of them does not see the checkpoint.
    """
    args, accelerator, progress, index = run.args, run.accelerator, run.progress, run.batches.plan.index
    if checkpoint is not None:
        blind = gather_object([] if checkpoint.is_dir() else [str(accelerator.process_index)])
        if blind:
            found = f"ranks {', '.join(blind)} do not see {checkpoint}"
            raise InputError(f"--output_dir: {found}; put it on a filesystem that all machines share")
        load_checkpoint(run, checkpoint)
        logger.info("resumed from %s", checkpoint)
    if accelerator.is_main_process:
        output_dir = Path(args.output_dir)
        rows = [output_dir / "metrics.jsonl", output_dir / "skipped.jsonl"]
        if args.overwrite_output_dir and checkpoint is None:  # only now, when all is ready to train
            for old in [*(path for _, path in list_checkpoints(output_dir)), output_dir / "samples"]:
                shutil.rmtree(old, ignore_errors=True)
            for path in rows:
                path.unlink(missing_ok=True)
        for path in rows:
            trim_rows(path, progress)
        note_skipped(args, index, progress, [])
        save_run(args, progress, index)
    flags = {k: str(v) for k, v in vars(args).items() if k not in ("config", "hub_token")}
    options = {"tensorboard": {"purge_step": progress.step + 1}}  # a resumed run goes on in the same W&B run
    options["wandb"] = {"id": progress.run_id, "resume": "allow", "name": Path(args.output_dir).name}
    options["wandb"]["dir"] = args.output_dir
    accelerator.init_trackers("train_sdxl_lora", config=flags, init_kwargs=options)


def finish(run, metrics):
    """Writes the LoRA files and the model card, of a preempted run as far as it came; uploads them when asked.

    Errors: TrainingError when the disk is full, saying where the weights are.
    """
    args, accelerator, index = run.args, run.accelerator, run.batches.plan.index
    if accelerator.is_main_process:
        fault = fault_of(lambda: save_lora(run.trained, args.output_dir, args.stage))
        fault = fault or fault_of(lambda: save_model_card(args, metrics, index))
        if fault:
            where = f"checkpoint-{run.progress.step} holds the LoRA files"
            raise TrainingError(f"--output_dir: {fault}; {where}; free some space and run the same command again")
        if index.damage or run.progress.damaged:
            kinds = Counter(map(reason_of, index.damage + run.progress.damaged))
            logger.warning("never trained on, listed in skipped.jsonl: %s", dict(kinds))
        if args.push_to_hub and not metrics["preempted"]:
            push_to_hub(args)
    if metrics["preempted"]:
        stop.mark()
    fault = fault_of(accelerator.end_training)
    if fault:
        logger.error("--output_dir: a tracker could not write its last rows: %s", fault)


def main(argv=None):
    """Trains as the flags say; returns the last metrics."""
    args = parse_args(argv)
    with stop_signals(), explained(args):
        accelerator = make_accelerator(args)
        prepare_output_dir(accelerator, args)
        checkpoint, progress = decide_on_main(accelerator, lambda: claim_output_dir(args))
        try:
            run = make_run(args, accelerator, progress)
            if args.dry_run:
                return preview(run) if accelerator.is_main_process else {}
            start(run, checkpoint)
            with ThreadPoolExecutor(1) as run.saver:  # ends when the checkpoint under way is written
                metrics = train(run)
        except Preempted:  # before there was anything to save
            stop.mark()
            return {"step": progress.step, "preempted": True}
        finish(run, metrics)
    return metrics


if __name__ == "__main__":
    try:
        main()
    except (InputError, TrainingError) as error:
        logger.error("%s: error: %s", Path(sys.argv[0]).name, error)
        sys.exit(1)
    except Exception:
        logger.exception("ended by a fault of the program or of a library")
        sys.exit(1)
