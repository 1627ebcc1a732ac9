#!/usr/bin/env python
"""Train LoRA adapters for Stable Diffusion XL, base or refiner, on captioned images: WebDataset shards or a folder.

One GPU or a laptop:
    python train_sdxl_lora.py --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \\
        --train_shards data/train --class_csv manifests/train_species.csv --output_dir runs/pokefa \\
        --train_batch_size 4 --rank 32 --max_train_steps 10000

N GPUs, the same flags:
    accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 8 train_sdxl_lora.py ...

To resume an interrupted run, run the same command with --resume_from_checkpoint latest: it continues bit for bit.

The sections, in the order data flows; each calls only what is above it:
     1 Arguments      2 Models and LoRA   3 Data         4 Encoding     5 Loss       6 Optimizer
     7 Checkpoints    8 Validation        9 Train loop  10 Preview     11 Process, log, errors    12 Main
Beside it: sdxl_data.py (shard or folder → index → plan → crops → batches), sdxl_lora.py (LoRA files),
sdxl_single_file.py (checkpoints in one file), sdxl_speed.py (layers and kernels for speed and memory), sdxl_memory.py
(what a step needs), sdxl_preview.py (--dry_run).
To read it: this page, `--help`, main(), train(), diffusion_loss(); then the section you came for.
Lines that begin with "# Seam:" mark the places meant to be edited, each with its contract.
"""

import argparse
import errno
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
import tempfile
import threading
import time
from collections import Counter, deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pyarrow as pa
import yaml
from PIL import Image
from tqdm.auto import tqdm

import sdxl_data as data
import sdxl_lora
import sdxl_single_file
from sdxl_data import LORA_FILE, EncodedDataset, ImageDataset, InputError, expand_shards, torch_seed, write_file
from sdxl_single_file import short_reason

TIME_IDS = {"base": 6, "refiner": 5}  # numbers in add_time_ids
ENCODER_NAMES = {"base": ("text_encoder", "text_encoder_2"), "refiner": ("text_encoder_2",)}
GUIDANCE_RESCALE = 0.7  # of sample images with zero terminal SNR (arXiv:2305.08891, sec. 3.4)
SAMPLE_INFERENCE_STEPS = 25  # denoising steps of a sample image, as in diffusers' training scripts
VAE_PIXELS = 1 << 20  # pixels the VAE encodes at once: in fp32 a 1024 px image briefly takes 2.7 GB
MAX_CAPTION_CHUNKS = 3  # --long_captions chunk reads at most 225 tokens
SAVE_ATTEMPTS = 4  # of the last checkpoint of a run when the disk is full, SAVE_PAUSE seconds apart
SAVE_PAUSE = 2.0
SAVE_WAIT = 1.0  # s that training waits for a checkpoint; a larger one is written while training continues
LOCK_SECONDS = 3  # wait for the output_dir of a run that is just ending
STOP_SECONDS = 25  # after a stop signal without a finished step, the process exits; launchers kill after 30
GROUP_TIMEOUT = timedelta(hours=2)  # the main process may index or download while the others wait for it
START_LINE = "started:"  # begins the first line in logs/rank-N.log of each start
OTHER_ENDED = "another process of this run has ended"
MAX_NONFINITE_STEPS = 30  # in a row, then skipping is hopeless: fp16's loss scale is below 2^-14

logger = logging.getLogger("train_sdxl_lora")


class TrainingError(RuntimeError):
    """Raised when a run cannot continue. The message says why, what has been saved, and what to do next."""


class Preempted(Exception):
    """Raised on all ranks together, during setup or validation, after any rank has received a stop signal."""


@dataclass
class StopRequest:
    """Holds the stop signal that this process has received. bool(stop) is False until a signal arrives.

    SignalListener (section 11) records it, send_report (section 9) tells all ranks, and then train() saves and ends.
    """

    number: int | None = None  # of the signal
    since: float = 0.0  # time.monotonic() when it came
    last_progress: float = 0.0  # time.monotonic() of the newest sign that training advances
    has_step: bool = False  # a step has ended, so there is something to save
    patient: bool = False  # the process may work without a sign of progress, for example while it saves
    listener: object = None  # SignalListener while signals are listened for

    def __bool__(self):
        return self.number is not None

    def note_progress(self):
        self.last_progress = time.monotonic()

    def clear(self):
        for name, value in vars(StopRequest()).items():
            setattr(self, name, value)


stop = StopRequest()


def raise_if_stopping(accelerator):
    """Raises Preempted on all ranks if any rank has received a stop signal. All ranks must call this function."""
    stop.note_progress()
    requested = torch.tensor([float(bool(stop))], device=accelerator.device)
    requested = accelerator.reduce(requested, "sum").item() > 0
    stop.note_progress()
    if requested:
        raise Preempted


def run_on_main(accelerator, action):
    """Calls action() on the main process only. Its result is returned, or its InputError raised, on all ranks."""
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


# -----------------------------------------------------------------------------
# 1 Arguments
# -----------------------------------------------------------------------------

# --flag and --no-flag, so that a file's true can be undone
switch = {"action": argparse.BooleanOptionalAction, "default": False}
open_switch = switch | {"default": None}  # None: --init_lora may decide
TRACKERS = "tensorboard wandb comet_ml aim clearml dvclive mlflow swanlab trackio all none".split()
TARGET_MODULES = ["to_q", "to_k", "to_v", "to_out.0"]  # the attention layers, as in diffusers' script
# diffusers' SchedulerType without the piecewise one, which needs rules that no flag carries
LR_SCHEDULERS = ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]


USE_DDP = "a LoRA needs no sharding of the model; use accelerate_configs/ddp.yaml"
REFUSED_VARIABLES = {  # variables of Accelerate that would change how it trains, and what to do instead
    "ACCELERATE_USE_DEEPSPEED": USE_DDP,
    "ACCELERATE_USE_FSDP": USE_DDP,
    "ACCELERATE_USE_MEGATRON_LM": USE_DDP,
    "ACCELERATE_USE_PARALLELISM_CONFIG": USE_DDP,
    "ACCELERATE_DYNAMO_BACKEND": "give --compile instead",
}


# fmt: off
# Seam: a new flag. Contract: one that changes what is learned is also named in MATHEMATICS (section 7); otherwise a
# resumed run could use another value unnoticed.
def add_model_arguments(parser):
    add = parser.add_argument_group("Models and LoRA").add_argument
    add("--pretrained_model_name_or_path", required=True, metavar="PATH|ID",
        help="SDXL snapshot, folder or hub id, or a checkpoint in one .safetensors file")
    add("--pretrained_vae_model_name_or_path", metavar="PATH|ID",
        help="another VAE, e.g. one fixed for fp16; a folder, hub id or .safetensors file")
    add("--revision", metavar="REV", help="hub revision of the snapshot")
    add("--variant", metavar="NAME", help="weight file variant of the snapshot, e.g. fp16")
    add("--single_file_config", metavar="DIR",
        help="snapshot to take configurations and tokenizers from for .safetensors files (default: SDXL's own)")
    add("--stage", choices=["base", "refiner"], default="base", help="which UNet is trained")
    add("--refiner_unet", metavar="PATH|ID",
        help="refiner: the UNet to train: its folder, a snapshot with unet/, a hub id or a .safetensors file")
    add("--text_encoder_2_lora", metavar="FILE", help="refiner: base-stage LoRA whose text_encoder_2 part is merged")
    add("--init_lora", metavar="FILE|RUN",
        help="start from this LoRA, in diffusers' or kohya's format, or from a run's; rank, alpha, layers and text "
        "encoders are taken from it")
    add("--merge_lora", nargs="+", metavar="FILE[:SCALE]",
        help="add these LoRAs to the frozen weights before training, e.g. a style or a speed-up (default SCALE: 1)")
    add("--rank", type=int, metavar="R", help="LoRA rank of the UNet (default: 4)")
    add("--lora_alpha", type=float, metavar="A", help="the LoRA is scaled by alpha / rank (default: the rank)")
    add("--lora_dropout", type=float, default=0.0, metavar="P", help="dropout on the input of every adapter")
    add("--lora_target_modules", nargs="+", metavar="NAME",
        help=f"UNet layers with an adapter (default: {' '.join(TARGET_MODULES)})")
    add("--use_dora", **open_switch, help="weight-decomposed LoRA (arXiv:2402.09353)")
    add("--use_rslora", **open_switch, help="rank-stabilized LoRA: scaled by alpha / sqrt(rank) (arXiv:2312.03732)")
    add("--train_text_encoder", **open_switch, help="also train LoRA on both text encoders")
    add("--text_encoder_rank", type=int, metavar="R", help="LoRA rank of the text encoders (default: --rank)")
    add("--text_encoder_alpha", type=float, metavar="A", help="LoRA alpha of the text encoders (default: their rank)")
    add("--vae_precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="SDXL's own VAE overflows in fp16")
    add("--base_precision", choices=["auto", "nf4", "int8"], default="auto",
        help="precision of the frozen UNet's linear layers; auto: as --mixed_precision; nf4 needs bitsandbytes")
    modes = ["none", "blocks", "full", "auto"]
    add("--gradient_checkpointing", nargs="?", const="full", default="auto", choices=modes,
        type=lambda mode: {"True": "full", "False": "none"}.get(mode, mode),
        help="recompute activations: less memory, about a third slower. blocks: transformer blocks only; full: the "
        "whole UNet (also the bare flag); auto: the least that fits in the free GPU memory (default)")
    add("--attention_backend", choices=["sdpa", "flash", "efficient", "cudnn", "math", "xformers"], default="sdpa",
        help="attention kernel of the UNet; sdpa lets PyTorch choose")
    add("--enable_xformers_memory_efficient_attention", **switch, help="same as --attention_backend xformers")
    add("--enable_npu_flash_attention", **switch, help="no effect; accepted because diffusers' script has it")
    add("--compile", **switch, help="compile the UNet's transformer blocks, once per batch shape; "
        "if that fails, training continues uncompiled")


def add_data_arguments(parser):
    add = parser.add_argument_group("Data", "one of --train_shards, --train_data_dir, --dataset_name").add_argument
    add("--train_shards", nargs="+", metavar="TAR",
        help="WebDataset shards: .tar files, folders of them, brace patterns; also s3://, https:// and pipe:COMMAND")
    add("--train_data_dir", nargs="+", metavar="DIR",
        help="folders of images with metadata.jsonl, .csv or .parquet, or with a .txt or .caption file per image; "
        "the first folder below DIR names the class (10_NAME: class NAME, weight 10)")
    add("--dataset_name", metavar="PATH|ID", help="dataset on the hub or on disk")
    add("--dataset_config_name", metavar="NAME", help="configuration of --dataset_name")
    add("--val_shards", nargs="+", metavar="TAR", help="shards for the validation loss")
    add("--val_fraction", type=float, metavar="P", help="hold out this fraction of the training images for validation")
    add("--image_column", default="image", metavar="NAME", help="image column of --dataset_name")
    add("--caption_column", default="text", metavar="NAME",
        help="caption column of metadata or a table; of several captions one is drawn each time")
    add("--instance_prompt", metavar="TEXT", help="caption of images without one; not with --train_shards")
    add("--trigger_word", metavar="TEXT", help="put before every caption that does not begin with it")
    add("--shuffle_tags", **switch, help="shuffle the tags of a caption each time it is used")
    add("--tag_dropout", type=float, default=0.0, metavar="P", help="probability of leaving out a tag each time")
    add("--keep_tags", type=int, default=0, metavar="N", help="first N tags that are neither moved nor left out")
    add("--tag_separator", default=",", metavar="TEXT", help="what separates tags")
    add("--max_train_samples", type=int, metavar="N", help="train on only N samples, chosen by --seed")
    add("--max_bad_fraction", type=float, default=0.05, metavar="P", help="stop if a larger fraction is damaged")
    add("--min_image_size", type=int, metavar="PX", help="leave out smaller images; skipped.jsonl lists them")
    add("--cache_dir", metavar="DIR", help="for downloads, shard copies, index and encodings (default: --output_dir)")
    add("--resolution", type=int, default=1024, metavar="PX", help="side of the training crops, a multiple of 8")
    add("--crop", choices=["random_ar", "center", "bucket"],
        help="random_ar: a randomly placed square near the middle; center: the middle square; bucket: aspect-ratio "
        "bucketing, one bucket per batch (default: random_ar, refiner: center)")
    add("--center_crop", **switch, help="same as --crop center")
    add("--random_flip", **switch, help="mirror half of the images")
    modes = ["nearest", "nearest_exact", "box", "bilinear", "hamming", "bicubic", "lanczos"]
    add("--image_interpolation_mode", choices=modes, default="lanczos", help="how images are resized")
    add("--class_csv", "--species_csv", metavar="FILE",
        help="CSV of class counts, with columns class and count (default: counted from the data)")
    add("--class_key", "--species_key", default="species_list", metavar="NAME",
        help="JSON field or column with the class labels")
    add("--class_choice", "--species_choice", choices=["first", "random"], default="random",
        help="which of several labels counts")
    add("--class_mix", "--species_mix", nargs=3, type=float, default=[0.2, 0.95, 6000],
        metavar=("START", "END", "STEPS"), help="p(class) = (1 - m) / classes + m * frequency; m goes from START to "
        "END over STEPS: balanced first, natural later")
    add("--class_mix_schedule", "--species_mix_schedule", choices=["linear", "cosine"], default="linear",
        help="how m goes from START to END")
    add("--aesthetic_key", default="ae_aesthetic", metavar="NAME", help="refiner: field or column with the score")
    add("--aesthetic_scale", type=float, default=10.0, metavar="X", help="refiner: score = field / X, or 6 without it")
    add("--train_batch_size", type=int, default=16, metavar="N", help="images per device and micro-step")
    add("--dataloader_num_workers", type=int, metavar="N", help="decoding processes per device (default: by cores)")
    add("--cache_latents", **switch, help="encode each image once, to CACHE_DIR/encodings; not with --crop random_ar")


def add_encoding_arguments(parser):
    add = parser.add_argument_group("Encoding").add_argument
    add("--caption_dropout_rate", type=float, default=0.1, metavar="P", help="fraction of captions dropped, for CFG")
    add("--long_captions", choices=["truncate", "chunk"], default="truncate",
        help="captions over 75 tokens: cut, or encoded in chunks of 75, up to 225 tokens, and concatenated")
    add("--dropped_caption", choices=["zeros", "empty"],
        help="embedding used for dropped captions (default: zeros, refiner: empty)")
    add("--cache_text_embeddings", **switch,
        help="encode every caption once, into CACHE_DIR/encodings; not with --train_text_encoder")


def add_loss_arguments(parser):
    add = parser.add_argument_group("Loss").add_argument
    add("--snr_gamma", type=float, metavar="G", help="min-SNR (arXiv:2303.09556), 0 = off (default: 5, refiner: 0)")
    add("--prediction_type", choices=["epsilon", "v_prediction"], help="default: the model's own")
    add("--rescale_betas_zero_snr", action=argparse.BooleanOptionalAction, default=None,
        help="noise schedule with zero terminal SNR (arXiv:2305.08891; default: the model's own); with it, min-SNR "
        "gives the last timesteps almost no weight: see --snr_gamma")
    add("--noise_offset", type=float, default=0.0, metavar="X", help="strength of noise constant over each channel")
    add("--refiner_timestep_band", nargs=2, type=int, default=[0, 200], metavar=("LOW", "HIGH"),
        help="refiner: timesteps to train on, both included")


def add_optimizer_arguments(parser):
    add = parser.add_argument_group("Optimizer").add_argument
    add("--optimizer", choices=["adamw", "adamw8bit", "prodigy"], default="adamw", help="prodigy: --learning_rate 1")
    add("--use_8bit_adam", **switch, help="same as --optimizer adamw8bit")
    add("--learning_rate", type=float, default=1e-4, metavar="LR", help="peak learning rate")
    add("--text_encoder_lr_scale", type=float, default=0.3, metavar="X", help="text encoders: LR times X, not prodigy")
    add("--scale_lr", **switch, help="multiply LR by devices x accumulation x batch size")
    add("--lr_scheduler", choices=LR_SCHEDULERS, default="cosine", help="learning-rate schedule")
    add("--lr_num_cycles", type=int, default=1, metavar="N", help="cosine_with_restarts: number of cosine cycles")
    add("--lr_power", type=float, default=1.0, metavar="X", help="polynomial: the power")
    add("--lr_warmup_steps", type=int, metavar="STEPS", help="warm-up steps (default: 3%% of the run)")
    add("--adam_beta1", type=float, default=0.9, metavar="B", help="Adam's first decay rate")
    add("--adam_beta2", type=float, default=0.999, metavar="B", help="Adam's second decay rate")
    add("--adam_weight_decay", type=float, default=1e-2, metavar="W", help="decoupled weight decay")
    add("--adam_epsilon", type=float, default=1e-8, metavar="E", help="Adam's epsilon")
    add("--max_grad_norm", type=float, default=1.0, metavar="G", help="gradients are clipped to this norm")
    add("--on_nonfinite", choices=["stop", "skip"], default="stop",
        help="at a NaN or infinite loss or gradient: stop, or skip the step (adds a GPU sync per step)")
    add("--max_train_steps", type=int, metavar="STEPS", help="optimizer steps; overrides --num_train_epochs")
    add("--num_train_epochs", type=int, default=100, metavar="N", help="of ceil(images / global batch) steps each")
    add("--gradient_accumulation_steps", type=int, metavar="N",
        help="micro-steps per optimizer step (default: the accelerate config's, or 1)")


def add_checkpoint_arguments(parser):
    add = parser.add_argument_group("Checkpoints").add_argument
    add("--output_dir", default="sd-model-finetuned-lora", metavar="DIR", help="everything the run writes")
    add("--overwrite_output_dir", **switch, help="delete existing checkpoints and start over")
    add("--checkpointing_steps", type=int, default=500, metavar="STEPS", help="save a checkpoint every STEPS steps")
    add("--checkpointing_after_steps", type=int, default=0, metavar="STEPS", help="no checkpoint before this step")
    add("--checkpoints_total_limit", type=int, metavar="N", help="keep only the newest N checkpoints")
    add("--resume_from_checkpoint", metavar="latest|DIR", help="continue; `latest` starts fresh if there is none")
    add("--allow_batch_change", **switch, help="resume with another global batch; the current epoch continues")
    add("--push_to_hub", **switch, help="upload the LoRA and its model card")
    add("--hub_token", metavar="TOKEN", help="hub token; never written anywhere")
    add("--hub_private_repo", **switch, help="create the hub repository as private")
    add("--hub_model_id", metavar="ID", help="repository on the hub (default: the name of --output_dir)")


def add_validation_arguments(parser):
    add = parser.add_argument_group("Validation").add_argument
    add("--validation_prompt", metavar="TEXT", help="prompt for sample images")
    add("--validation_prompts", metavar="FILE", help="more prompts: one per line, or JSONL with a `prompt` field")
    add("--num_validation_images", type=int, default=4, metavar="N", help="per prompt, seeds --seed, --seed + 1, …")
    add("--validation_steps", type=int, metavar="STEPS", help="validate every STEPS optimizer steps, and at the end")
    add("--validation_epochs", type=int, default=1, metavar="N", help="every N epochs, without --validation_steps")
    add("--validation_base_lora", metavar="FILE", help="refiner: LoRA of the base model that begins the sample images")
    add("--denoising_start", type=float, default=0.8, metavar="P",
        help="refiner: fraction of the denoising steps run by the base model in sample images")
    add("--val_max_batches", type=int, metavar="N", help="stop the validation loss after N batches")


def add_run_arguments(parser):
    add = parser.add_argument_group("Run").add_argument
    add("--config", is_config_file=True, metavar="FILE", help="YAML file of any of these flags; the command line wins")
    add("--seed", type=int, metavar="N", help="seed of every random draw (default: random, and recorded)")
    add("--mixed_precision", choices=["no", "fp16", "bf16"],
        help="precision of frozen weights and computation; adapters are always fp32 (default: the accelerate "
        "config's, or the best of this GPU; no without a CUDA GPU)")
    add("--allow_tf32", **switch, help="TF32 matrix products on NVIDIA GPUs (already on for convolutions)")
    add("--deterministic", action=argparse.BooleanOptionalAction, default=True,
        help="deterministic kernels; turning them off is faster on a GPU, but resumed runs match only approximately")
    add("--report_to", choices=TRACKERS, default="tensorboard", metavar="NAME", help=f"one of {', '.join(TRACKERS)}")
    add("--logging_dir", default="logs", metavar="DIR", help="TensorBoard and the ranks' logs, inside --output_dir")
    add("--logging_steps", type=int, default=10, metavar="STEPS", help="log metrics every STEPS optimizer steps")
    add("--local_rank", type=int, default=-1, metavar="N", help="no effect; accepted because diffusers' script has it")
    add("--debug_loss", **switch, help="no effect; a non-finite loss or gradient always names its samples")
    add("--dry_run", **switch, help="check everything except the UNet's weights, "
        "write OUTPUT_DIR/preview (crops, classes, captions, memory) and exit")
# fmt: on


def make_parser():
    parser = data.make_base_parser(
        "%(prog)s --pretrained_model_name_or_path PATH|ID --train_shards TAR … --output_dir DIR [--FLAG VALUE]…",
        "Train LoRA adapters for Stable Diffusion XL. The groups below follow the sections of the script.",
    )
    add_model_arguments(parser)
    add_data_arguments(parser)
    add_encoding_arguments(parser)
    add_loss_arguments(parser)
    add_optimizer_arguments(parser)
    add_checkpoint_arguments(parser)
    add_validation_arguments(parser)
    add_run_arguments(parser)
    return parser


def read_prompts(args):
    """Returns the prompts for sample images. Raises OSError or ValueError if the prompt file cannot be used."""
    prompts = [args.validation_prompt] if args.validation_prompt else []
    if not args.validation_prompts:
        return prompts
    lines = Path(args.validation_prompts).read_text(encoding="utf-8").splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    if not lines:
        raise ValueError(f"{args.validation_prompts} is empty; write one prompt per line")
    for line in lines:
        try:
            prompt = json.loads(line)["prompt"] if args.validation_prompts.endswith(".jsonl") else line
        except (KeyError, TypeError, json.JSONDecodeError):
            prompt = None
        if not isinstance(prompt, str):
            raise ValueError(f"{args.validation_prompts}: {line[:60]!r} is not a JSON object with a `prompt` text")
        prompts.append(prompt)
    return prompts


def checkpoint_path(args):
    """Returns the --resume_from_checkpoint folder if it exists, or else the folder of that name in --output_dir."""
    path = Path(args.resume_from_checkpoint)
    return path if path.is_dir() else Path(args.output_dir) / path.name


def default_workers(local_world):
    """Returns the default number of decoding processes: CPU cores per device, minus one, at most 8."""
    return max(0, min(8, (os.cpu_count() or 1) // local_world - 1))


def take_environment(parser, args):
    """Takes over what `accelerate launch` or the shell has set for Accelerate. Exits if it cannot be used."""
    for name, remedy in REFUSED_VARIABLES.items():
        value = os.environ.get(name, "")
        if value.lower() not in ("", "no", "false", "0"):
            parser.error(f"{name}: found {value}; unset it, or change the accelerate config; {remedy}")
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if args.mixed_precision is None and precision not in ("no", "fp16", "bf16"):
        parser.error(f"ACCELERATE_MIXED_PRECISION: found {precision}; give --mixed_precision bf16, fp16 or no")
    name = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"  # Accelerate prefers it to its own argument
    steps = os.environ.get(name)
    if steps is None:
        return
    if not re.fullmatch("[1-9][0-9]*", steps):
        parser.error(f"{name}: found {steps}; expected a number above 0")
    if args.gradient_accumulation_steps not in (None, int(steps)):
        found = f"found {args.gradient_accumulation_steps}, but {name} is {steps}"
        parser.error(f"--gradient_accumulation_steps: {found}; give the same number or unset the variable")
    args.gradient_accumulation_steps = int(steps)


def take_lora_flags(parser, args):
    """Sets rank, alpha and so on as in --init_lora. Exits if the file is unusable or a given flag contradicts it."""
    if args.init_lora is None:
        return
    try:
        flags = sdxl_lora.lora_flags(args.init_lora, args.use_rslora)
    except InputError as error:
        parser.error(f"--init_lora: {error}" + ("; resuming needs it, too" if args.resume_from_checkpoint else ""))
    if args.stage == "refiner" and "train_text_encoder" in flags:
        parser.error(f"--init_lora: {args.init_lora} has adapters of text encoders; a refiner's LoRA has none")
    for name, value in flags.items():
        given = getattr(args, name)
        if given not in (None, value):
            parser.error(f"--{name}: found {given}; --init_lora {args.init_lora} has {value}; leave the flag out")
        setattr(args, name, value)


def set_defaults(args):
    """Fills in the defaults that depend on other flags or on the number of CPU cores."""
    refiner = args.stage == "refiner"
    if args.rank is None:
        args.rank = 4
    if args.lora_target_modules is None and args.init_lora is None:
        args.lora_target_modules = TARGET_MODULES
    defaults = {
        "gradient_accumulation_steps": 1,
        "use_dora": False,
        "use_rslora": False,
        "train_text_encoder": False,
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
    if args.enable_xformers_memory_efficient_attention and args.attention_backend == "sdpa":
        args.attention_backend = "xformers"
    if args.trigger_word is not None:  # the separator behind it is added with it
        args.trigger_word = args.trigger_word.strip().removesuffix(args.tag_separator.strip()).strip() or None


def check_ranges(parser, args):
    """Exits with a one-line error if the number given for a flag is out of range."""
    positive = (
        "rank lora_alpha text_encoder_rank text_encoder_alpha resolution train_batch_size gradient_accumulation_steps "
        "num_train_epochs max_train_steps lr_num_cycles lr_power max_train_samples min_image_size logging_steps "
        "checkpointing_steps checkpoints_total_limit validation_steps validation_epochs num_validation_images "
        "val_max_batches aesthetic_scale"
    )
    fractions = "lora_dropout caption_dropout_rate tag_dropout max_bad_fraction adam_beta1 adam_beta2 denoising_start"
    not_negative = (
        "learning_rate text_encoder_lr_scale adam_weight_decay adam_epsilon max_grad_norm lr_warmup_steps snr_gamma "
        "noise_offset dataloader_num_workers checkpointing_after_steps keep_tags seed"
    )
    for names, is_valid, expected in (
        (positive, lambda x: x > 0, "a number above 0"),
        (fractions, lambda x: 0 <= x <= 1, "a number between 0 and 1"),
        (not_negative, lambda x: 0 <= x < 2**63, "a number of 0 or more"),
    ):
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not is_valid(value):
                parser.error(f"--{name}: found {value}; expected {expected}")


def check_model_flags(parser, args):
    if args.base_precision != "auto" and args.use_dora:
        parser.error(f"--base_precision: {args.base_precision} does not work with --use_dora, which needs the weights")
    if args.use_8bit_adam and args.optimizer == "prodigy":
        parser.error("--use_8bit_adam: contradicts --optimizer prodigy; give one of them")
    if args.cache_text_embeddings and args.train_text_encoder:
        source = "--init_lora, which trains text encoders" if args.init_lora else "--train_text_encoder"
        parser.error(f"--cache_text_embeddings: contradicts {source}; give one of them")
    if args.cache_text_embeddings and (args.shuffle_tags or args.tag_dropout):
        flag = "--shuffle_tags" if args.shuffle_tags else "--tag_dropout"
        parser.error(f"--cache_text_embeddings: contradicts {flag}, which changes captions; give one of them")
    if args.hub_token is not None and args.report_to not in ("tensorboard", "none"):
        remedy = "log in with `hf auth login` instead"
        parser.error(f"--hub_token: --report_to {args.report_to} may record it with the command line; {remedy}")
    if args.enable_xformers_memory_efficient_attention and args.attention_backend != "xformers":
        found = f"contradicts --attention_backend {args.attention_backend}"
        parser.error(f"--enable_xformers_memory_efficient_attention: {found}; give one of them")


def check_stage_flags(parser, args):
    if args.stage == "base":
        for name in ("refiner_unet", "text_encoder_2_lora", "validation_base_lora"):
            if getattr(args, name):
                parser.error(f"--{name}: found with --stage base; give --stage refiner or leave it out")
        return
    if not args.refiner_unet:
        parser.error("--refiner_unet: missing; --stage refiner trains the UNet that it names")
    if args.train_text_encoder:
        parser.error("--train_text_encoder: train it with --stage base; give that LoRA to --text_encoder_2_lora")
    if args.snr_gamma:
        parser.error(f"--snr_gamma: found {args.snr_gamma}; the refiner takes 0: min-SNR would all but erase its loss")
    low, high = args.refiner_timestep_band
    if not 0 <= low <= high:
        parser.error(f"--refiner_timestep_band: found {low} {high}; expected 0 <= LOW <= HIGH")


def check_data_flags(parser, args):
    sources = [f"--{name}" for name in ("train_shards", "train_data_dir", "dataset_name") if getattr(args, name)]
    if len(sources) != 1:
        found = " and ".join(sources) or "none"
        parser.error(f"--train_shards, --train_data_dir or --dataset_name: found {found}; give exactly one")
    if args.instance_prompt and args.train_shards:
        parser.error("--instance_prompt: found with --train_shards, where a missing caption is damage")
    if args.val_fraction is not None and not 0 < args.val_fraction < 1:
        parser.error(f"--val_fraction: found {args.val_fraction}; expected a number between 0 and 1, such as 0.05")
    if args.val_fraction and args.val_shards:
        parser.error("--val_fraction: contradicts --val_shards; give one of them")
    if not args.tag_separator:
        parser.error("--tag_separator: is empty; give the characters between two tags")
    start, end, steps = args.class_mix
    if not (0 <= start <= 1 and 0 <= end <= 1 and steps >= 0):
        parser.error(f"--class_mix: found {start} {end} {steps}; expected START, END in [0, 1] and STEPS 0 or more")
    if args.resolution % 8:
        parser.error(f"--resolution: found {args.resolution}; the VAE works on multiples of 8 px")
    if args.crop == "bucket" and args.resolution % data.BUCKET_STEP:
        parser.error(f"--resolution: found {args.resolution}; --crop bucket needs multiples of {data.BUCKET_STEP} px")
    if args.center_crop and args.crop != "center":
        parser.error(f"--center_crop: contradicts --crop {args.crop}; give one of them")
    if args.cache_latents and args.crop == "random_ar":
        parser.error("--cache_latents: --crop random_ar moves the window at every step; give --crop center or bucket")


def check_model_paths(parser, args):
    """Exits with a one-line error if a flag names a model folder or LoRA file that is missing or incomplete."""
    try:
        sdxl_single_file.check_model_flags(args)
        named = [("--merge_lora", file.path) for file, _ in sdxl_lora.read_merges(args.merge_lora)]
        sdxl_lora.check_lora("--validation_base_lora", args.validation_base_lora)
        sdxl_lora.check_lora("--text_encoder_2_lora", args.text_encoder_2_lora, "text_encoder_2")
    except InputError as error:
        parser.error(str(error))
    for flag, path in [("--init_lora", args.init_lora or os.devnull), *named]:
        if Path(path).resolve().is_relative_to(Path(args.output_dir).resolve()):
            remedy = "continue with --resume_from_checkpoint, or give another --output_dir"
            parser.error(f"{flag}: {path} is in --output_dir; {remedy}")


def check_data_paths(parser, args):
    """Exits with a one-line error if a flag names data or prompts that are missing, unreadable or malformed."""
    for folder in map(os.path.expanduser, args.train_data_dir or ()):
        if not Path(folder).is_dir():
            parser.error(f"--train_data_dir: no folder {folder}")
        if Path(folder).resolve() == Path(args.output_dir).resolve():
            parser.error(f"--output_dir: {folder} is also --train_data_dir; give another folder, it may be inside")
    readers = {
        "train_shards": lambda: expand_shards(args.train_shards or []),
        "val_shards": lambda: expand_shards(args.val_shards or []),
        "class_csv": lambda: data.read_class_csv(args.class_csv) if args.class_csv else None,
        "validation_prompts": lambda: read_prompts(args),
    }
    for name, read in readers.items():
        try:
            read()
        except (OSError, ValueError) as error:
            parser.error(f"--{name}: {error}")


def check_output_paths(parser, args):
    output_dir = Path(args.output_dir)
    resume = args.resume_from_checkpoint
    if output_dir.exists() and not output_dir.is_dir():
        parser.error(f"--output_dir: {output_dir} is a file; give a folder")
    if resume and resume != "latest" and not (checkpoint_path(args) / "progress.json").is_file():
        parser.error(f"--resume_from_checkpoint: {resume} is no checkpoint folder; give one, or `latest`")
    if not resume and not args.overwrite_output_dir and data.list_checkpoints(output_dir):
        parser.error(f"--output_dir: {output_dir} holds checkpoints; continue with --resume_from_checkpoint latest, "
            "or start over with --overwrite_output_dir")  # fmt: skip


def parse_args(argv=None):
    """Returns the flags with all defaults filled in. Exits if a flag is wrong. The result is never modified later."""
    parser = make_parser()
    args = parser.parse_args(argv)
    take_environment(parser, args)
    take_lora_flags(parser, args)
    set_defaults(args)
    check_ranges(parser, args)
    check_stage_flags(parser, args)
    check_model_flags(parser, args)
    check_data_flags(parser, args)
    check_model_paths(parser, args)
    check_data_paths(parser, args)
    check_output_paths(parser, args)
    return args


early_signals = []
if __name__ == "__main__":
    # The imports below take seconds: answer --help and wrong flags first, and keep stop signals for section 11.
    parse_args()
    launcher_pid = os.getppid()
    for number in data.STOP_SIGNALS:
        signal.signal(number, lambda received, _: early_signals.append(received))

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on import it asks for a package that is not needed here

import datasets
import diffusers
import huggingface_hub
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from accelerate import utils as accelerate_utils
from accelerate.tracking import GeneralTracker, get_available_trackers, on_main_process
from accelerate.utils import broadcast_object_list, gather_object, recursively_apply
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from peft import LoraConfig
from peft.tuners import lora
from torch.utils.data import DataLoader
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import sdxl_memory
import sdxl_preview
import sdxl_speed

# -----------------------------------------------------------------------------
# 2 Models and LoRA
# -----------------------------------------------------------------------------


@dataclass
class Models:
    """Holds the models for --stage base or refiner. Only LoRA adapters are trained; all other weights are frozen."""

    tokenizers: list
    text_encoders: list  # [text_encoder, text_encoder_2], for the refiner [text_encoder_2], as are the tokenizers
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    noise_scheduler: DDPMScheduler
    sampling_scheduler: diffusers.SchedulerMixin
    timestep_band: tuple  # (lowest, highest) that are trained on
    stage: str = "base"
    fingerprint: str = ""  # of the weights in the files
    merged_loras: list = field(default_factory=list)  # [SHA-256, scale] of each LoRA that was merged into them
    caption_chunks: int = 1  # chunks of 75 tokens that every caption is encoded in
    empty_prompt: tuple | None = None  # (prompt_embeds, pooled_prompt_embeds) of "", with cached captions
    base_pipeline: object = None  # StableDiffusionXLPipeline, on the CPU, that begins the refiner's sample images


def weight_dtype_of(precision):
    """Returns the torch dtype for "no", "fp32", "bf16" or "fp16"."""
    return {"no": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def load_part(args, loader, subfolder, flag="--pretrained_model_name_or_path", **options):
    """Loads one part, such as the VAE, of the model that `flag` names. Raises InputError if loading fails.

    --revision applies to the base model only. A refiner or VAE with no --variant files falls back to its plain ones.
    """
    name = getattr(args, flag.removeprefix("--"))
    path = sdxl_single_file.find_snapshot(flag, name, args.cache_dir or args.output_dir, args.single_file_config)
    variant = options.pop("variant", None)
    variants = [None] if path != name else [variant]  # what was converted has plain files
    if flag == "--pretrained_model_name_or_path":
        options["revision"] = args.revision
    elif variant:
        variants.append(None)
    for variant in variants:
        chosen = {"variant": variant} if variant else {}
        try:
            return loader(path, subfolder=subfolder, cache_dir=args.cache_dir, **chosen, **options)
        except Exception as error:  # libraries raise all kinds of errors for damaged files
            fault = error
    raise InputError(f"{flag}: cannot load {subfolder or 'the model'} of {name}: {fault}") from fault


def vae_source(args):
    """Returns the subfolder and the flag from which load_part() loads the VAE."""
    if args.pretrained_vae_model_name_or_path:
        return None, "--pretrained_vae_model_name_or_path"
    return "vae", "--pretrained_model_name_or_path"


def load_unet(args, text_encoders, weight_dtype, weights):
    """Loads the UNet, without weights if `weights` is false. Raises InputError if the text encoders do not fit it."""
    flag = "--pretrained_model_name_or_path"
    subfolder = "unet"
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


def load_text_encoders(args, weight_dtype):
    """Loads the tokenizers and text encoders that --stage needs. Merges --text_encoder_2_lora if it is given."""
    suffixes = ("", "_2") if args.stage == "base" else ("_2",)
    tokenizers = [load_part(args, CLIPTokenizer.from_pretrained, f"tokenizer{suffix}") for suffix in suffixes]
    if min(len(tokenizer) for tokenizer in tokenizers) < 10:
        raise InputError("--pretrained_model_name_or_path: one of its tokenizers has no vocabulary")
    classes = {"": CLIPTextModel, "_2": CLIPTextModelWithProjection}
    dtype = torch.float32 if args.text_encoder_2_lora else weight_dtype  # merge in fp32: only the sum is rounded
    text_encoders = []
    for suffix in suffixes:
        loader = classes[suffix].from_pretrained
        encoder = load_part(args, loader, f"text_encoder{suffix}", dtype=dtype, variant=args.variant)
        if args.text_encoder_2_lora:
            file = sdxl_lora.read_lora_file(args.text_encoder_2_lora)
            sdxl_lora.merge_loras("--text_encoder_2_lora", {"text_encoder_2": encoder}, [(file, 1.0)])
        text_encoders.append(encoder.to(weight_dtype))
    return tokenizers, text_encoders


def load_scheduler_config(args):
    """Returns the configuration of the base model's scheduler, changed as the flags say.

    Raises InputError if epsilon prediction is combined with zero terminal SNR.
    """
    config = load_part(args, DDPMScheduler.load_config, "scheduler")
    if args.prediction_type:
        config["prediction_type"] = args.prediction_type
    if args.rescale_betas_zero_snr is not None:
        config["rescale_betas_zero_snr"] = args.rescale_betas_zero_snr
    if config.get("rescale_betas_zero_snr"):
        config["timestep_spacing"] = "trailing"  # sampling begins at the last timestep (arXiv:2305.08891, sec. 3.3)
        if config.get("prediction_type", "epsilon") == "epsilon":
            found = "the last timestep is all noise, so --prediction_type epsilon learns nothing there"
            raise InputError(f"--rescale_betas_zero_snr: {found}; give --prediction_type v_prediction")
    return config


def fingerprint_parts(*parts):
    """Returns a hash that identifies the given models. It reads the first 8 values of every tensor."""
    heads = [tensor.detach().flatten()[:8].float().cpu() for part in parts for tensor in part.state_dict().values()]
    return hashlib.blake2b(torch.cat(heads).numpy().tobytes(), digest_size=8).hexdigest()


def load_models(args, weight_dtype, device, unet_weights=True):
    """Loads all models that --stage needs. Raises InputError, naming the flag, if a part cannot be loaded.

    The VAE uses --vae_precision. The UNet and the text encoders use `weight_dtype`. The VAE and the text encoders are
    moved to `device`, and the UNet stays on the CPU. If `unet_weights` is false, the UNet is created on the meta
    device, without weights.
    """
    tokenizers, text_encoders = load_text_encoders(args, weight_dtype)
    unet = load_unet(args, text_encoders, weight_dtype, unet_weights)
    options = {"dtype": weight_dtype_of(args.vae_precision), "variant": args.variant}
    vae = load_part(args, AutoencoderKL.from_pretrained, *vae_source(args), **options)
    vae.to(memory_format=torch.channels_last)  # its convolutions are a third faster
    # Before merging: merged sums differ in the last bit between machines. The merged files have hashes of their own.
    fingerprint = fingerprint_parts(unet, vae, *text_encoders) if unet_weights else ""
    parts = {"unet": unet, **dict(zip(ENCODER_NAMES[args.stage], text_encoders))}
    merged_loras = sdxl_lora.merge_given_loras(args.merge_lora, parts)
    for model in (vae, *text_encoders):
        model.to(device)
    for model in (vae, unet, *text_encoders):
        model.requires_grad_(False).eval()
    config = load_scheduler_config(args)
    noise_scheduler = DDPMScheduler.from_config(config)  # whatever the snapshot samples with, with the same betas
    last = noise_scheduler.config.num_train_timesteps - 1
    low, high = (0, last) if args.stage == "base" else args.refiner_timestep_band
    if high > last:
        raise InputError(f"--refiner_timestep_band: found {low} {high}; the snapshot's last timestep is {last}")
    return Models(
        tokenizers=tokenizers,
        text_encoders=text_encoders,
        vae=vae,
        unet=unet,
        noise_scheduler=noise_scheduler,
        sampling_scheduler=getattr(diffusers, config["_class_name"]).from_config(config),
        timestep_band=(low, high),
        stage=args.stage,
        merged_loras=merged_loras,
        fingerprint=fingerprint,
    )


def load_base_pipeline(args, models, weight_dtype):
    """Loads the base model, which makes the first denoising steps of a refiner run's sample images."""
    options = {"dtype": weight_dtype, "variant": args.variant, "vae": None, "add_watermarker": False}
    pipeline = load_part(args, diffusers.StableDiffusionXLPipeline.from_pretrained, None, **options)
    pipeline.register_modules(scheduler=models.sampling_scheduler)
    pipeline.set_progress_bar_config(disable=True)
    if args.validation_base_lora:
        try:
            pipeline.load_lora_weights(args.validation_base_lora, use_safetensors=True)
        except Exception as error:  # as in load_part
            raise InputError(f"--validation_base_lora: {args.validation_base_lora}: {short_reason(error)}") from error
    return pipeline


# Seam: which layers get an adapter. Contract: the names exist in the model and get a gradient (both are checked).
def add_adapter(model, flag, target_modules, **options):
    """Adds LoRA adapters with fp32 weights to the layers of `model` whose names end with one of `target_modules`.

    Autocast is off: frozen layers compute in their own dtype, and adapters cast their weights to the dtype of their
    input. Raises InputError, which names `flag`, if a target matches no layer.
    """
    names = [name for name, _ in model.named_modules()]
    for target in target_modules:
        if not any(name == target or name.endswith("." + target) for name in names):
            raise InputError(f"{flag}: no layer of {type(model).__name__} is called {target}")
    try:
        model.add_adapter(LoraConfig(target_modules=list(target_modules), init_lora_weights="gaussian", **options))
    except ValueError as error:
        raise InputError(f"{flag}: {' '.join(target_modules)}: {short_reason(error)}") from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    # PEFT made the layers; only their arithmetic changes, so their class is exchanged
    for layer in (m for m in model.modules() if isinstance(m, lora.LoraLayer)):
        if type(layer) is lora.Linear and not layer.lora_variant:  # DoRA is a variant
            layer.__class__ = sdxl_speed.FusedLora
            continue
        adapters = [*layer.lora_A.values(), *layer.lora_B.values()]
        if all(type(linear) is torch.nn.Linear for linear in adapters):
            layer.cast_input_dtype_enabled = False
            for linear in adapters:
                linear.__class__ = sdxl_speed.CastLinear
    return model.train()  # LoRA dropout and gradient checkpointing depend on it


def adapter_options(args, name, model):
    """Returns the options for the adapters of `model`: the UNet, or the text encoder that `name` names."""
    kind = {"use_dora": args.use_dora, "use_rslora": args.use_rslora}
    if name == "unet":
        targets = args.lora_target_modules or TARGET_MODULES
        return kind | {"r": args.rank, "lora_alpha": args.lora_alpha, "target_modules": targets}
    count = model.config.num_hidden_layers
    if name == "text_encoder":  # SDXL reads its penultimate states: the last layer would get no gradient
        count -= 1
    layers = {"target_modules": ["q_proj", "k_proj", "v_proj", "out_proj"], "layers_to_transform": list(range(count))}
    return kind | {"r": args.text_encoder_rank, "lora_alpha": args.text_encoder_alpha} | layers


def init_lora_options(args, file, name, model):
    """Returns the options for adapters like those in `file`, the LoraFile of --init_lora.

    Raises InputError if the file does not fit the model, or --lora_target_modules does not fit the file.
    """
    try:
        options = sdxl_lora.adapter_options(file, name, model, args.use_rslora)
    except InputError as error:
        raise InputError(f"--init_lora: {error}") from error
    names = sdxl_lora.find_layers(file, name, model).values()
    targets = args.lora_target_modules
    if name == "unet" and targets and not sdxl_lora.match_targets(model, names, targets):
        raise InputError(
            f"--lora_target_modules: {' '.join(targets)} are not the layers of {file.path}; leave out the flag"
        )
    return options


def freeze_last_layer(text_encoder):
    """Freezes adapters in the first text encoder's last layer, which SDXL does not use; kohya's scripts add them."""
    encoder = getattr(text_encoder, "text_model", text_encoder).encoder
    encoder.layers[-1].requires_grad_(False)


def add_adapters(args, models, seed):
    """Adds adapters to the UNet and, with --train_text_encoder, both text encoders. Returns these models by name.

    With --init_lora, they begin with the weights in that file.
    """
    torch.manual_seed(seed)
    file = sdxl_lora.read_lora_file(args.init_lora) if args.init_lora else None
    trained = {"unet": models.unet}
    if args.train_text_encoder:
        trained |= dict(zip(ENCODER_NAMES[args.stage], models.text_encoders))
    for name, model in trained.items():
        flag = "--lora_target_modules" if name == "unet" else "--train_text_encoder"
        is_given = file is not None and name in file.parts
        is_shape = model.device.type == "meta"  # of --dry_run or load_shapes
        if file is not None and not is_given and not is_shape:
            logger.info("--init_lora: %s has nothing for the %s, which gets new adapters", file.path, name)
        options = init_lora_options(args, file, name, model) if is_given else adapter_options(args, name, model)
        add_adapter(model, flag, lora_dropout=args.lora_dropout, **options)
        if is_given and not is_shape:
            sdxl_lora.load_lora(file, name, model)
    if "text_encoder" in trained:
        freeze_last_layer(trained["text_encoder"])
    return trained


def set_speed(args, trained, checkpointing):
    """Applies --attention_backend, --gradient_checkpointing and --compile."""
    sdxl_speed.set_attention(trained["unet"], args.attention_backend)
    if checkpointing != "none":
        sdxl_speed.set_checkpointing(trained, checkpointing, dropout=args.lora_dropout > 0)
    if args.compile:
        sdxl_speed.compile_blocks(trained["unet"])


def load_shapes(args, weight_dtype, processes):
    """Returns the Shapes of a run: its models on the meta device, with sizes but no weights."""
    classes = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    configs = {name: load_part(args, CLIPTextConfig.from_pretrained, name) for name in ENCODER_NAMES[args.stage]}
    vae_config = load_part(args, AutoencoderKL.load_config, *vae_source(args))
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        encoders = [classes[name](config).to(weight_dtype) for name, config in configs.items()]
        unet = load_unet(args, encoders, weight_dtype, weights=False)
        vae = AutoencoderKL.from_config(vae_config).to(weight_dtype_of(args.vae_precision))
        for model in (unet, vae, *encoders):
            model.requires_grad_(False)
        trained = add_adapters(args, SimpleNamespace(unet=unet, text_encoders=encoders), seed=0)
        samplers = []
        if args.stage == "refiner":  # the base model begins its sample images
            samplers = [UNet2DConditionModel.from_config(load_part(args, UNet2DConditionModel.load_config, "unet"))]
            samplers += [classes[name](load_part(args, CLIPTextConfig.from_pretrained, name)) for name in classes]
        for model in samplers:
            model.to(weight_dtype).requires_grad_(False)
    return sdxl_memory.Shapes(
        unet=unet,
        text_encoders=encoders,
        vae=vae,
        samplers=samplers,
        trained=trained,
        time_ids=TIME_IDS[args.stage],
        chunks=MAX_CAPTION_CHUNKS if args.long_captions == "chunk" else 1,
        images_at_once=max(1, VAE_PIXELS // args.resolution**2),
        processes=processes,
    )


# -----------------------------------------------------------------------------
# 3 Data: what this run reads; the reading itself is in sdxl_data.py
# -----------------------------------------------------------------------------


EXPECTED_SAMPLES = {
    "--train_shards": "a sample is an image, a .txt caption and perhaps a .json, with one name and next to each other",
    "--train_data_dir": "captions come from metadata.jsonl, .csv or .parquet, from a .txt or .caption file with the "
    "name of the image, or from --instance_prompt",
    "--dataset_name": "a row has an image in --image_column and a caption in --caption_column",
}  # fmt: skip
EXPECTED_SAMPLES["--val_shards"] = EXPECTED_SAMPLES["--train_shards"]


def index_shards(accelerator, args, flag, fields):
    """Indexes the shards that `flag` names. The ranks share the work.

    Returns the table of images, the list of damaged samples, and a dict from shard to stamp.
    """
    cache_dir = Path(args.cache_dir or args.output_dir) / "index"
    cache_dir.mkdir(parents=True, exist_ok=True)
    shards = expand_shards(args.train_shards if flag == "--train_shards" else args.val_shards)
    mine = shards[accelerator.process_index :: accelerator.num_processes]

    def index(path):
        return None if stop else data.cached_index_shard(path, cache_dir, fields)

    try:
        with ThreadPoolExecutor(data.IO_THREADS if any(map(data.is_remote, shards)) else 1) as pool:
            options = {"leave": False, "unit": "shard", "disable": not accelerator.is_main_process}
            list(tqdm(pool.map(index, mine), f"index of {flag}", len(mine), **options))
        raise_if_stopping(accelerator)
        tables = [data.cached_index_shard(path, cache_dir, fields) for path in shards]
    except OSError as error:
        raise InputError(f"{flag}: {error}") from error
    damage, stamps = [], {}
    for table in tables:
        damage += json.loads(table.schema.metadata[b"damage"])
        stamps |= json.loads(table.schema.metadata[b"stamp"])
    return pa.concat_tables([table.replace_schema_metadata() for table in tables]), damage, stamps


def data_flag(args):
    """Returns the flag that names the training data."""
    return next(f"--{name}" for name in ("train_shards", "train_data_dir", "dataset_name") if getattr(args, name))


def try_write(write):
    """Calls write(). Returns None, or the error message if the disk is full or not writable."""
    try:
        write()
    except OSError as error:
        return str(error)
    except RuntimeError as error:
        if "inline_container" not in str(error):  # torch.save says so when the disk is full
            raise
        return f"torch.save could not write: {error}"
    return None


def append_jsonl(path, rows):
    """Appends rows to a JSONL file. If the disk is full, removes a partly written row and raises OSError."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    except OSError:
        if path.exists():
            os.truncate(path, size)
        raise


def list_skipped(args, entries):
    """Adds entries that are not there yet to skipped.jsonl. Logs an error if the disk is full."""
    path = Path(args.output_dir) / "skipped.jsonl"
    known = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    rows = [entry for entry in entries if entry not in known]
    fault = try_write(lambda: append_jsonl(path, rows))
    if fault:
        logger.error("--output_dir: %d rows of skipped.jsonl are not written yet: %s", len(rows), fault)


def check_bad_fraction(flag, bad, total, limit):
    """Raises InputError if there is no usable sample, or if bad / total is greater than `limit`."""
    if total == 0:
        raise InputError(f"{flag}: found no image in it; {EXPECTED_SAMPLES[flag]}")
    if bad == total:
        raise InputError(f"{flag}: no usable sample; {EXPECTED_SAMPLES[flag]}; see skipped.jsonl in --output_dir")
    if bad > limit * total:
        found = f"{bad} of {total} samples are damaged, more than --max_bad_fraction {limit}"
        remedy = f"see skipped.jsonl; {EXPECTED_SAMPLES[flag]}; repair the data or raise the limit"
        raise InputError(f"{flag}: {found}; {remedy}")


def note_skipped(args, index, progress, entries, write=True):
    """Counts damaged samples and lists them in skipped.jsonl. Raises InputError if --max_bad_fraction is exceeded."""
    for entry in entries:
        reason = data.damage_kind(entry)
        progress.skipped[reason] = progress.skipped.get(reason, 0) + 1
        if entry not in progress.damaged and entry not in index.damage:
            progress.damaged.append(entry)
    if write:
        list_skipped(args, index.damage + progress.damaged)
    bad = data.count_damaged(index.damage + progress.damaged)
    check_bad_fraction(data_flag(args), bad, index.total, args.max_bad_fraction)


def read_source(accelerator, args, flag):
    """Returns the data that `flag` names, as four values.

    They are the table of images, the list of damaged samples, a dict from file to stamp, and the dataset that holds
    the image bytes. The dataset is None unless `flag` is --dataset_name.
    """
    fields = data.Fields(
        args.image_column, args.caption_column, args.class_key, args.aesthetic_key, args.instance_prompt
    )
    if flag in ("--train_shards", "--val_shards"):
        return *index_shards(accelerator, args, flag, fields), None
    if flag == "--train_data_dir":
        excluded = [os.path.realpath(path) for path in (args.output_dir, args.cache_dir) if path]
        found = run_on_main(accelerator, lambda: data.index_folders(args.train_data_dir, fields, excluded))
        return pa.Table.from_pylist(found[0], data.INDEX_SCHEMA), *found[1:], None
    with accelerator.main_process_first():
        images = data.load_table(flag, args.dataset_name, fields, args.dataset_config_name, args.cache_dir)
        rows, damage = data.index_table(images, args.dataset_name, fields)
    return pa.Table.from_pylist(rows, data.INDEX_SCHEMA), damage, {}, images


def make_tag_augmentation(args):
    """Returns the TagAugmentation, which says how the tags of a caption are shuffled and dropped.

    The tags of --trigger_word always stay in place.
    """
    tags = data.TagAugmentation(args.tag_separator, args.keep_tags, args.shuffle_tags, args.tag_dropout)
    return replace(tags, kept=args.keep_tags + len(tags.split(args.trigger_word or "")))


def load_index(accelerator, args, flag, seed):
    """Returns two Indexes: the data that `flag` names, and the images held out by --val_fraction, or None.

    Raises InputError if no sample is usable or too many are damaged. Lists them in skipped.jsonl before that.
    """
    table, damage, stamps, images = read_source(accelerator, args, flag)
    found = len(table) + len(damage)
    table, damage = data.merge_rows(table, damage)
    if len(table) + len(damage) < found:
        logger.info("%s: %d rows are captions of other rows' images", flag, found - len(table) - len(damage))
    bad = data.count_damaged(damage)
    total = len(table) + bad
    if args.min_image_size:
        table, damage = data.leave_out_small(table, damage, args.min_image_size)
    try:
        check_bad_fraction(flag, bad, total, args.max_bad_fraction)
        if len(table) == 0:
            raise InputError(f"--min_image_size: no image of {flag} has {args.min_image_size} px; see skipped.jsonl")
    except InputError:
        if accelerator.is_main_process:
            list_skipped(args, damage)
        raise
    if args.trigger_word:
        table = data.add_trigger_word(table, args.trigger_word, make_tag_augmentation(args).joiner())
    held_out = None
    if flag != "--val_shards" and args.val_fraction:
        sides = data.is_held_out(table.column("image_id").to_pylist(), args.val_fraction)
        table, held_out = table.filter(pa.array(~sides)), table.filter(pa.array(sides))
        if len(table) == 0:
            raise InputError(f"--val_fraction: {args.val_fraction} of {len(held_out)} images leaves none to train on")
    if flag != "--val_shards" and args.max_train_samples:
        ids = np.array([data.hash_text(i) for i in table.column("image_id").to_pylist()], dtype=np.uint64)
        order = np.argsort(data.hash64(data.SUBSET, seed, ids), kind="stable")
        table = table.take(np.sort(order[: args.max_train_samples]))
    options = {"stamps": stamps, "images": images, "image_column": args.image_column}
    index = data.make_index(table, damage, total, **options)
    return index, held_out and data.make_index(held_out, [], **options)


def log_data(index, mix, csv_counts, resolution):
    """Logs the size of the data. Warns about damaged samples, small images and images without a class.

    Also warns if the classes in --class_csv differ from those in the data.
    """
    classes = int(mix.support.sum())
    logger.info("%d images of %d classes, %d damaged", len(index), classes, data.count_damaged(index.damage))
    if index.damage:
        logger.warning("left out: %s", dict(Counter(map(data.damage_kind, index.damage))))
    unlabelled = int((np.diff(index.label_starts) == 0).sum())
    if classes and unlabelled:
        logger.warning("--class_key: %d of %d images have no class; they are used rarely, with probability %g",
            unlabelled, len(index), data.UNLABELLED_ACCEPTANCE)  # fmt: skip
    enlarged = index.scales(resolution).max(axis=1)
    if (enlarged > 1).any():
        logger.warning("--resolution: %d of %d images are smaller and are scaled up, by up to %.1f ×",
            (enlarged > 1).sum(), len(index), enlarged.max())  # fmt: skip
    if csv_counts and mix.absent:
        logger.warning("--class_csv: %d classes are not in the data, e.g. %s",
            len(mix.absent), ", ".join(mix.absent[:5]))  # fmt: skip
    distance = 0.5 * np.abs(mix.data - mix.arrival).sum()
    if csv_counts and distance > 0.1:
        worst = int(np.argmax(np.abs(mix.data - mix.arrival)))
        logger.warning("--class_csv: differs from the data by %.0f %% (%s: %.2f %% there, %.2f %% here); "
            "training follows the CSV",
            100 * distance, mix.names[worst], 100 * mix.data[worst], 100 * mix.arrival[worst])  # fmt: skip


def make_data(accelerator, args, seed):
    """Returns the training dataset, its ClassMix, and the validation dataset or None."""
    index, val_index = load_index(accelerator, args, data_flag(args), seed)
    csv_counts = data.read_class_csv(args.class_csv) if args.class_csv else None
    repeats = index.count_repeats(args.class_choice) if csv_counts is None else None
    start, end, steps = args.class_mix
    counts = csv_counts or repeats
    mix = data.ClassMix(index, args.class_choice, counts, start, end, steps, args.class_mix_schedule)
    if args.crop == "bucket":
        index = data.assign_buckets(index, args.resolution)
    if accelerator.is_main_process:
        log_data(index, mix, csv_counts, args.resolution)
        if repeats:
            shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in zip(mix.names[:20], mix.data))
            logger.info("--train_data_dir: folder names such as 10_NAME weight the classes: %s", shares)
    reading = (args.image_interpolation_mode, args.cache_dir or args.output_dir, args.aesthetic_scale)
    tags = make_tag_augmentation(args)
    dataset = ImageDataset(index, seed, args.resolution, args.crop, args.random_flip, *reading, tags)
    if args.val_shards:
        val_index, _ = load_index(accelerator, args, "--val_shards", seed)
    val_dataset = None
    if val_index is not None:
        val_dataset = ImageDataset(val_index, 0, args.resolution, "center", False, *reading)
    return dataset, mix, val_dataset


def to_pixel_values(pixels):
    """Converts uint8 pixels to float32 in [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1)


def to_device(tensor, device):
    """Copies a tensor to `device`. Copies to a GPU start from pinned memory, so the CPU does not wait for them."""
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def move_batch(batch, device):
    """Moves a batch to `device`. Replaces `pixels` with `pixel_values` (B, 3, H, W), float32 in [-1, 1]."""
    moved = {name: to_device(value, device) if torch.is_tensor(value) else value for name, value in batch.items()}
    if "pixels" in moved:
        moved["pixel_values"] = to_pixel_values(moved.pop("pixels"))
    return moved


# -----------------------------------------------------------------------------
# 4 Encoding: captions and pixels → embeddings and latents; caches
# -----------------------------------------------------------------------------


def tokenize(tokenizer, captions, chunks=1):
    """Returns int64 token ids of shape (B * chunks, 77). Each caption gets `chunks` consecutive rows.

    A row is the begin token, up to 75 caption tokens, the end token, and padding. Tokens that do not fit are dropped.
    """
    length = tokenizer.model_max_length
    if chunks == 1:
        options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
        return tokenizer(captions, **options).input_ids
    ids = tokenizer(captions, add_special_tokens=False).input_ids
    pieces = [row[start * (length - 2) :][: length - 2] for row in ids for start in range(chunks)]
    rows = [[tokenizer.bos_token_id, *piece, tokenizer.eos_token_id] for piece in pieces]
    return torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows])


def count_chunks(tokenizer, captions, mode):
    """Returns three counts: chunks per caption, captions that will be cut, and tokens in the longest caption."""
    length = tokenizer.model_max_length - 2
    captions = [caption for caption in captions if len(caption.encode()) > length]  # a token is at least a byte
    tokens = [len(ids) for ids in tokenizer(captions, add_special_tokens=False).input_ids] if captions else [0]
    chunks = min(max(math.ceil(max(tokens) / length), 1), MAX_CAPTION_CHUNKS) if mode == "chunk" else 1
    return chunks, sum(count > chunks * length for count in tokens), max(tokens)


def set_caption_chunks(args, accelerator, models, index):
    """Sets models.caption_chunks according to --long_captions. Warns if captions will be cut."""
    captions = index.table.column("captions").combine_chunks().flatten().to_pylist()
    models.caption_chunks, cut, longest = count_chunks(models.tokenizers[0], captions, args.long_captions)
    if cut and accelerator.is_main_process:
        logger.warning("--long_captions %s: %d of %d captions are cut: the longest has %d tokens, %d are used",
            args.long_captions, cut, len(captions), longest, 75 * models.caption_chunks)  # fmt: skip


def encode_prompts(models, captions, device):
    """Returns prompt_embeds (B, chunks * 77, D) and pooled_prompt_embeds (B, D2), computed as in SDXL's pipeline.

    prompt_embeds are the next-to-last hidden states of the text encoders, concatenated along the last axis. The
    refiner has only text_encoder_2. pooled_prompt_embeds is text_encoder_2's projection of each caption's first chunk.
    """
    chunks = models.caption_chunks
    embeds = []
    for encoder, tokenizer in zip(models.text_encoders, models.tokenizers):
        output = encoder(to_device(tokenize(tokenizer, captions, chunks), device), output_hidden_states=True)
        embeds.append(output.hidden_states[-2].unflatten(0, (-1, chunks)).flatten(1, 2))
    return torch.cat(embeds, dim=-1), output.text_embeds[::chunks]


def encode_captions(models, batch, device, with_empty=False):
    """Returns the embeddings of a batch's captions, and those of an empty caption or None."""
    if "prompt_embeds" in batch:
        return batch["prompt_embeds"], batch["pooled_prompt_embeds"], models.empty_prompt if with_empty else None
    if not with_empty:
        return *encode_prompts(models, batch["captions"], device), None
    prompt_embeds, pooled = encode_prompts(models, [*batch["captions"], ""], device)
    return prompt_embeds[:-1], pooled[:-1], (prompt_embeds[-1:], pooled[-1:])


def drop_captions(prompt_embeds, pooled_prompt_embeds, dropped, empty=None):
    """Returns both embeddings, with the rows of dropped captions replaced by `empty`, or by zeros if it is None.

    `dropped` has shape (B,) and is true for each dropped caption. Dropped captions are encoded too: if one rank
    skipped its text encoders, the other ranks would hang in DDP.
    """
    if empty is None:
        empty = torch.zeros_like(prompt_embeds), torch.zeros_like(pooled_prompt_embeds)
    return (
        torch.where(dropped[:, None, None], empty[0], prompt_embeds),
        torch.where(dropped[:, None], empty[1], pooled_prompt_embeds),
    )


def encode_moments(vae, pixel_values):
    """Returns mean and standard deviation of the VAE's posterior, stacked in one tensor (B, 2, 4, H / 8, W / 8)."""
    at_once = max(1, VAE_PIXELS // (pixel_values.shape[-2] * pixel_values.shape[-1]))
    with torch.no_grad():
        posteriors = [vae.encode(part.to(vae.dtype)).latent_dist for part in pixel_values.split(at_once)]
        return torch.cat([torch.stack([posterior.mean, posterior.std], dim=1) for posterior in posteriors])


def sample_latents(vae, moments, vae_noise):
    """Returns float32 latents of shape (B, 4, h, w), drawn from the VAE's posterior.

    They are mean + std * vae_noise, multiplied by the VAE's scaling factor.
    """
    mean, std = moments.float().unbind(dim=1)
    return (mean + std * vae_noise) * vae.config.scaling_factor


# ---- caches


def fill_cache(accelerator, cache, encode, title):
    """Writes the files that are missing from a cache. Raises InputError if an existing file is damaged.

    Each rank first writes its share. It then writes any file that it still does not find, which happens if the ranks
    do not share a disk. encode(groups) takes a group of rows per file and yields the samples of one file after
    another.
    """
    paths = list(cache.rows)
    for share in (paths[accelerator.process_index :: accelerator.num_processes], paths):
        for path in filter(Path.exists, share):
            try:
                cache.open(path)
            except OSError as error:
                raise InputError(str(error)) from error
        missing = [path for path in share if not path.exists()]
        encoded = encode([cache.rows[path] for path in missing])
        total = sum(len(cache.rows[path]) for path in missing)
        bar = tqdm(total=total, desc=f"encoding {title}", unit="sample", leave=False, disable=not missing)
        # all ranks take as many rounds as the one with most files, so that they can stop together
        for n in range(max(gather_object([len(missing)]))):
            raise_if_stopping(accelerator)
            if n < len(missing):
                cache.write(missing[n], next(encoded))
                bar.update(len(cache.rows[missing[n]]))
        bar.close()
        accelerator.wait_for_everyone()


def encode_images(models, dataset, device, workers, groups):
    """Yields one dict per group of rows. It maps each image id to a list of encodings.

    The list has one encoding, or two with --random_flip. A damaged image has an error message instead.
    """
    ids = dataset.index.table.column("image_id").to_pylist()
    rows = [int(i) for group in groups for i in group]
    stream = iter(DataLoader(rows, collate_fn=dataset.flips, num_workers=workers, worker_init_fn=data.ignore_signals))
    for group in groups:
        samples = {ids[i]: next(stream) for i in group}
        intact = [window for windows in samples.values() if isinstance(windows, list) for window in windows]
        pixels = [window.pop("pixels") for window in intact]
        if intact:
            moments = encode_moments(models.vae, to_pixel_values(torch.stack(pixels).to(device)))
        for n, window in enumerate(intact):
            window["moments"] = moments[n]
        yield samples


def cache_latents(accelerator, models, dataset, folder, workers):
    """Encodes all images and, with --random_flip, their mirror images. Returns the EncodingCache."""
    index = dataset.index
    settings = [2, "latents", fingerprint_parts(models.vae), str(models.vae.dtype), dataset.crop]
    settings += [dataset.interpolation, dataset.random_flip, index.images and index.images._fingerprint]
    ids, sizes, paths = (index.table.column(name).to_pylist() for name in ("image_id", "size", "path"))
    stamps = [str(index.stamps.get(path)) for path in paths]
    cache_keys = [[ids[i], sizes[i], stamps[i], dataset.bucket_size(i)] for i in range(len(index))]
    groups = [np.flatnonzero(index.buckets == bucket) for bucket in range(len(dataset.bucket_sizes))]
    cache = data.EncodingCache(folder, "--cache_latents", settings, cache_keys, groups)
    fill_cache(accelerator, cache, partial(encode_images, models, dataset, accelerator.device, workers), "latents")
    return cache


def encode_texts(models, ids, captions, device, groups):
    """Yields one dict per group of rows. It maps each image id to a list with the embeddings of each caption."""
    for group in groups:
        texts = [caption for i in group for caption in captions[i]]
        with torch.no_grad():
            size = data.CACHE_ROWS
            parts = [encode_prompts(models, texts[n : n + size], device) for n in range(0, len(texts), size)]
        pairs = (pair for part in parts for pair in zip(*part))
        encoded = (dict(zip(("prompt_embeds", "pooled_prompt_embeds"), pair)) for pair in pairs)
        yield {ids[i]: [next(encoded) for _ in captions[i]] for i in group}


def cache_text_embeddings(accelerator, models, dataset, folder):
    """Encodes all captions. Returns the EncodingCache."""
    ids, captions = (dataset.index.table.column(name).to_pylist() for name in ("image_id", "captions"))
    settings = [1, "text", fingerprint_parts(*models.text_encoders), str(models.text_encoders[0].dtype)]
    settings += [models.stage, models.caption_chunks, *models.merged_loras]
    cache_keys = [[image_id, *texts] for image_id, texts in zip(ids, captions)]
    cache = data.EncodingCache(folder, "--cache_text_embeddings", settings, cache_keys, [np.arange(len(ids))])
    fill_cache(accelerator, cache, partial(encode_texts, models, ids, captions, accelerator.device), "captions")
    return cache


def cache_encodings(accelerator, args, models, image_datasets):
    """Fills the requested caches. Returns datasets that read from them. Moves unused encoders to the CPU."""
    folder = Path(args.cache_dir or args.output_dir) / "encodings"
    folder.mkdir(parents=True, exist_ok=True)
    encoded = []
    for dataset in image_datasets:
        latents, embeddings = None, None
        if args.cache_latents and dataset is not None:
            latents = cache_latents(accelerator, models, dataset, folder, args.dataloader_num_workers)
        if args.cache_text_embeddings and dataset is not None:
            embeddings = cache_text_embeddings(accelerator, models, dataset, folder)
        encoded.append(dataset and EncodedDataset(dataset, latents, embeddings))
    if args.cache_latents:
        models.vae.to("cpu")
    if args.cache_text_embeddings:
        with torch.no_grad():
            models.empty_prompt = encode_prompts(models, [""], accelerator.device)
        for encoder in models.text_encoders:
            encoder.to("cpu")
    if accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
    return encoded


# -----------------------------------------------------------------------------
# 5 Loss
# -----------------------------------------------------------------------------


# Seam: timesteps and noise. Contract: timesteps (B,) int64 within the band, both ends included; noise like the
# latents; all from the samples' own seeds, so that the draw is the same on any number of processes. Add a new draw at
# the end of the loop: one in the middle changes all that follow.
def sample_noise(sample_seeds, latent_shape, timestep_band, noise_offset=0.0):
    """Returns the random draws for a batch. Each sample's draws depend only on its seed.

    The result is a dict. "vae_noise" and "noise" have shape (B, *latent_shape). "timesteps" and "caption_draws" have
    shape (B,).
    """
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
    """Calls sample_noise with a batch's seeds and latent shape. Returns the draws on the device of the batch."""
    if "moments" in batch:
        shape = batch["moments"].shape[2:]
    else:
        config = models.vae.config
        factor = 2 ** (len(config.block_out_channels) - 1)
        shape = (config.latent_channels, *(side // factor for side in batch["pixel_values"].shape[-2:]))
    draws = sample_noise(batch["sample_seeds"], shape, models.timestep_band, noise_offset)
    return move_batch(draws, batch["original_sizes"].device)


# Seam: weighting. Contract: (B,) weights from the (B,) signal-to-noise ratios. Min-SNR: arXiv:2303.09556, sec. 3.4.
def compute_snr_weights(snr, gamma, prediction_type):
    """Returns (B,) loss weights: min(snr, gamma) / snr, or min(snr, gamma) / (snr + 1) for v-prediction."""
    if not gamma:
        return torch.ones_like(snr)
    return torch.clamp(snr, max=gamma) / (snr + 1 if prediction_type == "v_prediction" else snr)


# Seam: the objective. Contract: (B,) losses that depend on nothing but the arguments. Validation calls it too: another
# objective is another val_loss.
def diffusion_loss(
    models, batch, draws, weight_dtype, snr_gamma=0.0, caption_dropout_rate=0.0, dropped_caption="zeros"
):
    """Returns each sample's denoising loss times its min-SNR weight, shape (B,). `draws` comes from sample_noise."""
    scheduler = models.noise_scheduler
    noise = draws["noise"]
    timesteps = draws["timesteps"]

    # Noise the latents.
    moments = batch["moments"] if "moments" in batch else encode_moments(models.vae, batch["pixel_values"])
    latents = sample_latents(models.vae, moments, draws["vae_noise"])  # (B, 4, h, w)
    noisy_latents = scheduler.add_noise(latents, noise, timesteps)

    # Encode the captions, and drop some for classifier-free guidance.
    with_empty = dropped_caption == "empty"
    prompt_embeds, pooled_prompt_embeds, empty = encode_captions(models, batch, timesteps.device, with_empty)
    dropped = draws["caption_draws"] < caption_dropout_rate
    prompt_embeds, pooled_prompt_embeds = drop_captions(prompt_embeds, pooled_prompt_embeds, dropped, empty)

    # SDXL is told each image's size and crop (arXiv:2307.01952, sec. 2.2). Always float32: in bf16 1365 px is 1368.
    last = batch["aesthetic_scores"][:, None] if models.stage == "refiner" else batch["target_sizes"]
    add_time_ids = torch.cat([batch["original_sizes"], batch["crop_top_lefts"], last], dim=1)  # (B, 6), refiner (B, 5)

    model_pred = models.unet(
        noisy_latents.to(weight_dtype),
        timesteps,
        prompt_embeds.to(weight_dtype),
        added_cond_kwargs={"text_embeds": pooled_prompt_embeds.to(weight_dtype), "time_ids": add_time_ids},
    ).sample

    # Compare with the noise or the velocity, weighted by the signal-to-noise ratio.
    prediction_type = scheduler.config.prediction_type
    if prediction_type not in ("epsilon", "v_prediction"):
        raise InputError(f"--prediction_type: the snapshot's is {prediction_type}; expected epsilon or v_prediction")
    target = noise if prediction_type == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
    loss = F.mse_loss(model_pred.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
    return loss * compute_snr_weights(compute_snr(scheduler, timesteps), snr_gamma, prediction_type)


# -----------------------------------------------------------------------------
# 6 Optimizer
# -----------------------------------------------------------------------------


def make_parameter_groups(trained, learning_rate, text_encoder_lr_scale):
    """Returns the optimizer's parameter groups: one per trained model, with its own learning rate."""
    groups = []
    for name, model in trained.items():
        peak = learning_rate * (1.0 if name == "unet" else text_encoder_lr_scale)
        parameters = [p for p in model.parameters() if p.requires_grad]
        groups.append({"params": parameters, "lr": peak, "initial_lr": peak, "name": name})
    return groups


# Seam: the optimizer. Contract: a torch optimizer over the parameter groups, whose "lr" the schedule multiplies.
def make_optimizer(args, groups, learning_rate):
    """Returns the optimizer that --optimizer names. Raises InputError if its package cannot be imported."""
    adam = {"betas": (args.adam_beta1, args.adam_beta2), "weight_decay": args.adam_weight_decay}
    try:
        if args.optimizer == "adamw8bit":
            import bitsandbytes

            return bitsandbytes.optim.AdamW8bit(groups, lr=learning_rate, eps=args.adam_epsilon, **adam)
        if args.optimizer == "prodigy":
            import prodigyopt

            for group in groups:  # Prodigy takes only one learning rate
                group.update(lr=learning_rate, initial_lr=learning_rate)
            return prodigyopt.Prodigy(groups, lr=learning_rate, eps=args.adam_epsilon, safeguard_warmup=True, **adam)
    except ImportError as error:
        raise InputError(f"--optimizer: {args.optimizer} needs a package that does not load here: {error}") from error
    return torch.optim.AdamW(groups, lr=learning_rate, eps=args.adam_epsilon, fused=True, **adam)


# Seam: the schedule. Contract: step, counted from 0 → factor on the peak learning rate; without state.
def make_lr_schedule(name, warmup_steps, max_train_steps, num_cycles=1, power=1.0):
    """Returns a function that maps a step to a factor. The peak learning rate is multiplied by this factor."""
    placeholder = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    options = {"num_warmup_steps": warmup_steps, "num_training_steps": max_train_steps}
    options |= {"num_cycles": num_cycles, "power": power}
    return diffusers.optimization.get_scheduler(name, placeholder, **options).lr_lambdas[0]


# -----------------------------------------------------------------------------
# 7 Checkpoints
# -----------------------------------------------------------------------------

# Flags that change what is learned: they must match when a run is resumed. All others may differ and are then logged.
# Data, base model and global batch are compared by content, so the flags that name them are not listed here.
MATHEMATICS = """
    stage aesthetic_key aesthetic_scale refiner_timestep_band rank lora_alpha lora_dropout lora_target_modules
    use_dora use_rslora train_text_encoder text_encoder_rank text_encoder_alpha vae_precision max_train_samples
    resolution crop random_flip image_interpolation_mode class_key class_choice class_mix class_mix_schedule
    val_fraction min_image_size trigger_word shuffle_tags tag_dropout keep_tags tag_separator caption_dropout_rate
    dropped_caption long_captions snr_gamma prediction_type rescale_betas_zero_snr base_precision noise_offset
    optimizer learning_rate text_encoder_lr_scale scale_lr lr_scheduler lr_num_cycles lr_power lr_warmup_steps
    adam_beta1 adam_beta2 adam_weight_decay adam_epsilon max_grad_norm
""".split()


@dataclass
class Progress:
    """What progress.json stores: everything that a resumed run needs besides weights and optimizer."""

    step: int = 0
    seed: int = 0
    run_id: str = ""
    cursors: list | None = None  # SamplePlan's (epoch, position) of each bucket
    samples: int = 0  # trained on so far
    loss_sum: float = 0.0  # over the optimizer steps since the last row of metrics
    loss_count: int = 0
    nonfinite_steps: int = 0  # skipped because loss or gradient was not finite
    nonfinite_in_a_row: int = 0
    validation_due: bool = False  # at this step: a signal came before or during its validation
    best: dict = field(default_factory=dict)  # lowest val_loss and its step
    skipped: dict = field(default_factory=dict)  # reason → samples replaced because they were damaged
    damaged: list = field(default_factory=list)  # [{"shard", "key", "reason"}] found while decoding
    resume_signature: dict = field(default_factory=dict)  # what must match on resume
    flags: dict = field(default_factory=dict)  # all others, which may differ


STORED_NAMES = {"resume_signature": "law"}  # fields of Progress that progress.json has under an older name
COMPARED_BY_CONTENT = ("global_batch", "dataset", "class_distribution", "base_model")  # not by the flags naming them


def make_resume_signature(args, accelerator, index, mix):
    """Returns the values that must stay the same when a run is resumed.

    They are the flags listed in MATHEMATICS, the precision, the global batch size, the data, and the LoRA files.
    """
    distribution = repr([(name, float(q)) for name, q in zip(mix.names, mix.data)])
    init_lora = sdxl_lora.hash_file(sdxl_lora.find_lora(args.init_lora)) if args.init_lora else None
    signature = {"init_lora": init_lora, "merge_lora": sdxl_lora.list_merges(args.merge_lora) or None}
    signature |= {name: getattr(args, name) for name in MATHEMATICS}
    signature["mixed_precision"] = accelerator.mixed_precision
    signature["global_batch"] = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    signature["dataset"] = index.fingerprint()
    signature["class_distribution"] = f"{data.hash_text(distribution):016x}"
    return json.loads(json.dumps(signature))  # as it will be read back: tuples are lists


def other_flags(args):
    """Returns the flags that a resumed run may change, with their values as text."""
    left_out = (
        "config hub_token resume_from_checkpoint overwrite_output_dir allow_batch_change mixed_precision".split()
    )
    return {k: str(v) for k, v in vars(args).items() if k not in MATHEMATICS and k not in left_out}


def list_differences(saved, current):
    """Returns a line such as "--rank: 4 in the checkpoint, 8 now" for each value that differs.

    If a flag is missing from `saved`, it is newer than the checkpoint. The flag's default value is then compared.
    """
    parser = make_parser()
    older = {name: saved.get(name.replace("class_", "species_"), parser.get_default(name)) for name in current}
    saved = older | saved
    names = {name: name.replace("_", " ") if name in COMPARED_BY_CONTENT else f"--{name}" for name in current}
    different = [name for name, value in current.items() if saved.get(name) != value]
    return [f"{names[name]}: {saved.get(name)!r} in the checkpoint, {current[name]!r} now" for name in different]


def check_resume(saved, current, allow_batch_change=False):
    """Raises InputError if two signatures differ. With `allow_batch_change`, the global batch may differ."""
    compared = {name: value for name, value in current.items() if not (allow_batch_change and name == "global_batch")}
    different = list_differences(saved, compared)
    if different:
        remedy = "give the original values, or another --output_dir"
        if saved.get("global_batch") != compared.get("global_batch"):
            remedy += "; --allow_batch_change continues with another batch"
        raise InputError(f"--resume_from_checkpoint: not the same run: {'; '.join(different)}; {remedy}")


def lora_files(run):
    """Copies the adapters. Returns {file name: function that writes the file} for both LoRA files."""
    scheduler = run.unwrapped.noise_scheduler.config
    return sdxl_lora.lora_files(run.trained, run.args.stage, run.args.trigger_word, run.args.resolution, scheduler)


def save_lora(run, folder):
    """Writes both LoRA files into `folder`, which is created if necessary. Raises OSError if the disk is full."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, write in lora_files(run).items():
        write(Path(folder) / name)


def checkpoint_files(run):
    """Copies all state that a resume needs. Returns {file name: function that writes the file}.

    Training can continue while these functions run; Accelerate's save_state would stop it. Only the main process
    writes, because all ranks have the same weights, and random draws depend only on the seed and the step.
    """
    files = lora_files(run)
    for name, part in {"optimizer.bin": run.optimizer, "scaler.pt": run.accelerator.scaler}.items():
        if part is not None:
            state = recursively_apply(lambda tensor: tensor.detach().to("cpu", copy=True), part.state_dict())
            files[name] = partial(torch.save, state)
    stored = {STORED_NAMES.get(name, name): value for name, value in vars(run.progress).items()}
    progress = json.dumps(stored, indent=1) + "\n"
    return files | {"progress.json": lambda path: write_file(path, progress.encode())}


def load_checkpoint(run, folder):
    """Restores adapters, optimizer and gradient scaler from a checkpoint."""
    sdxl_lora.load_adapter_state_dict(run.trained, safetensors.torch.load_file(folder / LORA_FILE))
    for name, part in {"optimizer.bin": run.optimizer, "scaler.pt": run.accelerator.scaler}.items():
        if part is not None:
            part.load_state_dict(torch.load(folder / name, map_location="cpu", weights_only=True))


def sync(path):
    """Flushes a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def make_checksums(folder, names):
    """Returns the text of checksums.json: a SHA-256 per file. A checkpoint is complete once it has this file."""
    names = sorted(names)
    with ThreadPoolExecutor() as pool:
        return json.dumps(dict(zip(names, pool.map(sdxl_lora.hash_file, [folder / name for name in names]))), indent=1)


def complete_checkpoint(unfinished, final, files):
    """Writes all files of a checkpoint into the folder `unfinished`, then renames the folder to `final`."""
    unfinished.mkdir()
    for name, write in files.items():
        write(unfinished / name)
        sync(unfinished / name)
    write_file(unfinished / "checksums.json", make_checksums(unfinished, files).encode())
    sync(unfinished)
    metrics = final.parent / "metrics.jsonl"
    if metrics.exists():
        sync(metrics)  # its rows up to this step
    shutil.rmtree(final, ignore_errors=True)  # of a try whose last line below failed
    os.rename(unfinished, final)
    sync(final.parent)


def write_checkpoint(output_dir, step, files, keep=None):
    """Writes a checkpoint atomically, then deletes older ones so that only the newest `keep` remain.

    Deletes none if `keep` is None. Returns an error message if writing failed, or else None.
    """
    final = Path(output_dir) / f"checkpoint-{step}"
    unfinished = Path(output_dir) / f".checkpoint-{step}.partial"
    shutil.rmtree(unfinished, ignore_errors=True)
    fault = try_write(lambda: complete_checkpoint(unfinished, final, files))
    if fault is None:
        others = [path for _, path in data.list_checkpoints(output_dir) if path != final]
        for old in others[: len(others) + 1 - keep] if keep else ():
            shutil.rmtree(old, ignore_errors=True)
        logger.info("saved %s", final)
    else:
        shutil.rmtree(unfinished, ignore_errors=True)
        logger.error("--output_dir: checkpoint-%d was not written: %s; earlier ones are intact, free some space",
            step, fault)  # fmt: skip
    return fault


def report_unsaved(run):
    """Raises TrainingError because the disk of output_dir is full.

    First tries to save the LoRA to a temporary folder. The error message names that folder.
    """
    args = run.args
    step = run.progress.step
    message = f"--output_dir: {args.output_dir} is full: checkpoint-{step} was not written, earlier ones are intact; "
    if run.accelerator.is_main_process:
        folder = f"{tempfile.gettempdir()}/lora-step-{step}-{run.progress.run_id}"
        fault = try_write(lambda: save_lora(run, folder))
        message += f"{folder} could not hold the LoRA either ({fault}); " if fault else f"the LoRA is in {folder}; "
    raise TrainingError(broadcast_object_list([message])[0] + "free some space and resume")


def save_checkpoint(run, last):
    """Starts writing a checkpoint in the background.

    If `last` is true, waits until it is written, and raises TrainingError if writing failed.
    """
    args = run.args
    fault = None
    stop.patient = True
    if run.accelerator.is_main_process:
        if run.pending_checkpoint is not None:
            run.pending_checkpoint.result()  # one at a time
        job = (args.output_dir, run.progress.step, checkpoint_files(run), args.checkpoints_total_limit)
        run.pending_checkpoint = run.checkpoint_writer.submit(write_checkpoint, *job)
        wait([run.pending_checkpoint], timeout=None if last else SAVE_WAIT)
        for _ in range(SAVE_ATTEMPTS - 1 if last else 0):
            if run.pending_checkpoint.result() is not None:  # the disk was full
                time.sleep(SAVE_PAUSE)
                run.pending_checkpoint = run.checkpoint_writer.submit(write_checkpoint, *job)
        fault = run.pending_checkpoint.result() if last else None
    if last and broadcast_object_list([fault])[0]:
        report_unsaved(run)
    run.accelerator.wait_for_everyone()
    stop.patient = False
    stop.note_progress()


def verify_checkpoint(folder):
    """Returns None if all files of a checkpoint match its checksums, or else what is wrong."""
    try:
        text = (folder / "checksums.json").read_text()
        sums = json.loads(text)
        found = make_checksums(folder, sums)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return f"incomplete ({error})"
    if found == text:
        return None
    damaged = [name for name, checksum in json.loads(found).items() if checksum != sums[name]]
    return f"damaged: {', '.join(damaged) or 'checksums.json'}"


def find_checkpoint(args):
    """Returns the folder to resume from and its Progress, or (None, None) for a new run. Skips damaged checkpoints.

    Raises InputError if all checkpoints are damaged, or if the chosen one is from another version of the trainer.
    """
    if not args.resume_from_checkpoint:
        return None, None
    if args.resume_from_checkpoint == "latest":
        folders = [path for _, path in reversed(data.list_checkpoints(args.output_dir))]
    else:
        folders = [checkpoint_path(args)]
    for folder in folders:
        fault = verify_checkpoint(folder)
        if fault is not None:
            logger.warning("--resume_from_checkpoint: %s is %s; skipped", folder, fault)
            continue
        saved = json.loads((folder / "progress.json").read_text())
        stored_names = {STORED_NAMES.get(name, name): name for name in vars(Progress())}
        unknown = sorted(saved.keys() ^ stored_names.keys())
        if unknown:
            found = f"{folder} was written by another version of the trainer (progress.json: {', '.join(unknown)})"
            remedy = "resume with the scripts in the run's folder"
            raise InputError(f"--resume_from_checkpoint: {found}; {remedy}")
        return folder, Progress(**{stored_names[name]: value for name, value in saved.items()})
    if folders:
        raise InputError(f"--resume_from_checkpoint: no intact checkpoint among {', '.join(map(str, folders))}")
    return None, None


def trim_rows(path, progress):
    """Removes incomplete rows from a JSONL file, and all rows that were written after the checkpoint.

    The resumed run writes those rows again.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("}\n"):
            continue
        row = json.loads(line)
        step = row.get("step", 0)
        is_repeated = "val_loss" in row and progress.validation_due
        if step < progress.step or (step == progress.step and not is_repeated):
            kept.append(line)
    write_file(path, "".join(kept).encode())


def set_aside_checkpoints(output_dir, step):
    """Renames the checkpoints after `step`, from which the run goes on another way. `latest` does not see them."""
    for later, folder in data.list_checkpoints(output_dir):
        if later > step:
            number = 1
            while (aside := folder.with_name(f"set-aside-{folder.name}-{number}")).exists():
                number += 1
            folder.rename(aside)
            logger.warning("%s is later than the checkpoint that was resumed; it is now %s", folder, aside.name)


def lock_output_dir(output_dir):
    """Locks output_dir and deletes a killed run's partial files. Raises InputError if another run uses the folder."""
    import fcntl  # Windows, where --help works, does not have it

    descriptor = os.open(output_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)  # never closed: closing unlocks
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, not inherited by loader processes
        except (BlockingIOError, PermissionError) as error:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
            if time.monotonic() > deadline:
                remedy = "wait for it, stop it, or give another folder"
                raise InputError(f"--output_dir: {output_dir} is in use by {holder}; {remedy}") from error
            time.sleep(0.2)
            continue
        except OSError as error:
            logger.warning("--output_dir: %s cannot be locked (%s); start no second run on it", output_dir, error)
        break
    os.truncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    for leftover in output_dir.glob(".*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)  # of a checkpoint
        leftover.unlink(missing_ok=True)  # of a single file


def save_run(args, progress, index):
    """Writes config.yaml (for --config) and run.json, and copies the scripts to output_dir."""
    output_dir = Path(args.output_dir)
    leave_out = ("config", "hub_token", "overwrite_output_dir", "resume_from_checkpoint")
    flags = {k: v for k, v in vars(args).items() if v is not None and k not in leave_out}
    flags |= {"seed": progress.seed, "mixed_precision": progress.resume_signature["mixed_precision"]}
    write_file(output_dir / "config.yaml", yaml.safe_dump(flags, sort_keys=False, allow_unicode=True).encode())
    here = Path(__file__).parent
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True)
    packages = ["torch", "accelerate", "diffusers", "transformers", "peft", "webdataset", "datasets", "safetensors"]
    facts = {
        "versions": {"python": sys.version.split()[0]} | {name: importlib.metadata.version(name) for name in packages},
        "git_revision": git.stdout.strip() or None,
        "dataset": index.fingerprint(),
        "images": len(index),
        "run_id": progress.run_id,
    }
    if args.init_lora:
        facts["init_lora"] = {"file": args.init_lora, "sha256": progress.resume_signature["init_lora"]}
    if args.merge_lora:
        rows = zip(args.merge_lora, progress.resume_signature["merge_lora"])
        facts["merge_lora"] = [{"file": file, "sha256": sha256, "scale": scale} for file, (sha256, scale) in rows]
    write_file(output_dir / "run.json", (json.dumps(facts, indent=1) + "\n").encode())
    modules = (data, sdxl_lora, sdxl_single_file, sdxl_speed, sdxl_memory, sdxl_preview)
    for script in map(Path, (__file__, *(module.__file__ for module in modules))):
        if script.resolve().parent != output_dir.resolve():  # it is there if the run's own copy is started
            shutil.copy(script, output_dir)


def scheduler_code(scheduler):
    """Returns the model card's line that sets this scheduler; "" for None, or without v-prediction and zero SNR."""
    if scheduler is None or not sdxl_lora.describe_objective(scheduler):
        return ""
    options = (
        f'prediction_type="{scheduler.prediction_type}", rescale_betas_zero_snr={scheduler.rescale_betas_zero_snr}'
    )
    if scheduler.rescale_betas_zero_snr:
        options += ', timestep_spacing="trailing"'
    return f"pipeline.scheduler = pipeline.scheduler.from_config(pipeline.scheduler.config, {options})\n"


def save_model_card(args, metrics, index, scheduler=None):
    """Writes README.md: how the LoRA was trained, and how to load it. `scheduler` is a noise scheduler's config."""
    samples = sorted((Path(args.output_dir) / "samples").glob("step-*.png"), key=lambda p: int(p.stem.split("-")[1]))
    numbers = ", ".join(f"{k} {v:.4g}" for k, v in metrics.items() if k in ("step", "loss", "val_loss"))
    picture = f"![samples](samples/{samples[-1].name})\n\n" if samples else ""
    flags = "\n".join(f"  {k}: {getattr(args, k)}" for k in MATHEMATICS)
    base_model = args.pretrained_model_name_or_path if args.stage == "base" else args.refiner_unet
    pipeline = "StableDiffusionXLPipeline" if args.stage == "base" else "StableDiffusionXLImg2ImgPipeline"
    parts = ""
    if args.text_encoder_2_lora:
        parts = ", text_encoder_2=base.text_encoder_2"  # of the base pipeline with its LoRA
    on_hub = "" if Path(base_model).expanduser().exists() else f"base_model: {base_model}\n"  # the hub refuses a path
    trigger = f"instance_prompt: {json.dumps(args.trigger_word)}\n" if args.trigger_word else ""
    loader = "from_single_file" if Path(base_model).expanduser().is_file() else "from_pretrained"
    prompt = f"Begin every prompt with `{args.trigger_word}`.\n\n" if args.trigger_word else ""
    more_code = scheduler_code(scheduler) + sdxl_lora.merge_code(args.merge_lora)
    origin = f" Training began with the LoRA `{args.init_lora}`." if args.init_lora else ""
    card = f"""---
{on_hub}{trigger}library_name: diffusers
tags: [text-to-image, diffusers, lora, stable-diffusion-xl]
---
# LoRA for {base_model}

{picture}Trained on {len(index)} captioned images of {len(index.label_names)} classes; {numbers}.{origin}

{prompt}```python
import torch
from diffusers import {pipeline}

pipeline = {pipeline}.{loader}("{base_model}", dtype=torch.float16{parts})
{more_code}pipeline.load_lora_weights("PATH", weight_name="{LORA_FILE}")
pipeline.to("cuda")
```

`{sdxl_lora.KOHYA_FILE}` holds the same adapters for ComfyUI and A1111. Training flags:

```yaml
{flags}
```
"""
    write_file(Path(args.output_dir) / "README.md", card.encode())


def hub_repo(args):
    """Creates the hub repository of --push_to_hub if it does not exist. Returns the API and the repository's id."""
    api = huggingface_hub.HfApi(token=args.hub_token)
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    options = {"private": True} if args.hub_private_repo else {}
    repo_id = api.create_repo(name, exist_ok=True, **options).repo_id
    if args.hub_private_repo and not api.repo_info(repo_id).private:
        raise InputError(f"--hub_private_repo: {repo_id} exists and is public; give another --hub_model_id")
    return api, repo_id


def push_to_hub(args):
    """Uploads the LoRA files, the model card, the samples and config.yaml, and nothing else."""
    api, repo_id = hub_repo(args)
    files = [LORA_FILE, sdxl_lora.KOHYA_FILE, "README.md", "config.yaml"]
    patterns = {
        "allow_patterns": [*files, "samples/step-*.png"],  # no other *, which would match / too: caches are in there
        "ignore_patterns": ["samples/*/*", "checkpoint-*/*", ".checkpoint-*/*"],
    }
    try:
        api.upload_folder(repo_id=repo_id, folder_path=args.output_dir, **patterns)
    except Exception as error:  # of the network, or the hub's refusal
        remedy = f"the LoRA is in {args.output_dir}; `hf upload` sends it"
        raise TrainingError(f"--push_to_hub: the hub says: {short_reason(error)}; {remedy}") from error


# -----------------------------------------------------------------------------
# 8 Validation
# -----------------------------------------------------------------------------


@contextmanager
def evaluating(models):
    """Context manager that sets evaluation mode and turns off gradients and compiled code. Restores all at the end."""
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
    """Returns this rank's validation batches as (requests, size). Requests after the first `size` are padding.

    A request is (row, label, step, position). The position seeds the noise, and is a hash of the image id.
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
    """Returns the mean unweighted validation loss. A sample's noise and timestep are the same at every validation."""
    args = run.args
    accelerator = run.accelerator
    device = accelerator.device
    split = partial(validation_requests, run.val_dataset.index, args.train_batch_size,
        world=accelerator.num_processes, max_batches=args.val_max_batches)  # fmt: skip
    batches = split(rank=accelerator.process_index)
    requests = [requests for requests, _ in batches]
    loader = iter(data.make_loader(run.val_dataset, requests, args.dataloader_num_workers, device.type == "cuda"))
    total = torch.zeros(2, dtype=torch.float64, device=device)  # sum of losses, number of samples
    with evaluating(run.unwrapped):
        for n in range(len(split(rank=0))):  # no rank has more
            raise_if_stopping(accelerator)
            if n >= len(batches):
                continue
            batch = move_batch(next(loader), device)
            size = batches[n][1]
            draws = sample_batch_noise(run.unwrapped, batch, noise_offset=0.0)
            losses = diffusion_loss(run.unwrapped, batch, draws, run.weight_dtype).double()[:size]
            # the replacement of a damaged image would count twice
            counted = to_device(~torch.tensor(batch["replaced"][:size]), device)
            total += torch.stack([torch.where(counted, losses, 0.0).sum(), counted.sum()])
    loss_sum, count = accelerator.reduce(total, "sum").tolist()
    return loss_sum / max(count, 1)


@contextmanager
def stock_forward(*modules):
    """Context manager that removes Accelerate's `forward` wrappers, because diffusers' pipelines cannot use them."""
    wrapped = [(m, m.__dict__.pop("forward")) for m in modules if "forward" in m.__dict__]
    try:
        yield
    finally:
        for module, forward in wrapped:
            module.forward = forward


@contextmanager
def on_device(device, *modules):
    """Context manager that moves modules from the CPU to `device`, and back to the CPU at the end."""
    waiting = [module for module in modules if module.device != device]
    for module in waiting:
        module.to(device)
    try:
        yield
    finally:
        for module in waiting:
            module.to("cpu")


def make_pipeline(models):
    """Returns diffusers' pipeline for sample images, with the sampler of the pretrained model."""
    parts = {"vae": models.vae, "unet": models.unet, "scheduler": models.sampling_scheduler}
    parts |= {"text_encoder_2": models.text_encoders[-1], "tokenizer_2": models.tokenizers[-1]}
    parts["add_watermarker"] = False
    if models.stage == "base":
        text_encoder, tokenizer = models.text_encoders[0], models.tokenizers[0]
        pipeline = diffusers.StableDiffusionXLPipeline(text_encoder=text_encoder, tokenizer=tokenizer, **parts)
    else:  # as in the refiner's own snapshot
        options = {"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False}
        pipeline = diffusers.StableDiffusionXLImg2ImgPipeline(text_encoder=None, tokenizer=None, **options, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def guidance_rescale(scheduler):
    """Returns the pipelines' guidance_rescale: 0, or GUIDANCE_RESCALE if the scheduler has zero terminal SNR."""
    return GUIDANCE_RESCALE if scheduler.config.get("rescale_betas_zero_snr") else 0.0


def generate_image(models, prompt, seed, resolution, num_inference_steps=SAMPLE_INFERENCE_STEPS, switch_at=0.8):
    """Returns a sample image (H, W, 3), float in [0, 1], made with diffusers' own pipelines.

    The noise is made on the CPU, so diffusers gives the same image for the saved LoRA and the same seed. With --stage
    refiner, the base model runs the first fraction `switch_at` of the denoising steps, and the refiner runs the rest.
    """
    pipeline = make_pipeline(models)
    device = models.unet.device
    generator = torch.Generator().manual_seed(seed)
    options = {"num_inference_steps": num_inference_steps, "output_type": "latent", "generator": generator}
    options["guidance_rescale"] = guidance_rescale(models.sampling_scheduler)
    encoders = models.text_encoders
    with evaluating(models), stock_forward(models.unet, *encoders), on_device(device, models.vae):
        with on_device(device, *encoders):
            if models.stage == "base":
                latents = pipeline(prompt, height=resolution, width=resolution, **options).images
            else:
                base = models.base_pipeline.to(device)
                latents = base(prompt, height=resolution, width=resolution, denoising_end=switch_at, **options).images
                base.to("cpu")  # training needs the memory
                latents = pipeline(prompt, image=latents, denoising_start=switch_at, **options).images
        # Text encoders that are not used for training have left the GPU: decoding takes 3 GB in fp32.
        pixels = models.vae.decode((latents / models.vae.config.scaling_factor).to(models.vae.dtype)).sample
    return pipeline.image_processor.postprocess(pixels.float(), output_type="np")[0]


def draw_grid(images, prompts, columns):
    """Returns a PIL image: one row of images per prompt, with the prompt above it. `images` is (n, S, S, 3) uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    zoom = math.ceil(128 / images.shape[1])  # small images are enlarged, so that the prompts are readable
    side = images.shape[1] * zoom
    rows = math.ceil(len(images) / columns)
    figure = Figure(figsize=(columns * side / 100, rows * (side + 16) / 100), dpi=100)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        bottom = (rows - 1 - row) * (side + 16)
        figure.figimage(image.repeat(zoom, axis=0).repeat(zoom, axis=1), column * side, bottom, origin="upper")
        if column == 0:
            label = sdxl_preview.make_label(prompts[i], columns * side // 6)
            y = (bottom + side + 4) / (rows * (side + 16))
            figure.text(0.01, y, label, fontsize=7, family=sdxl_preview.label_fonts()[0])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])


def save_samples(run):
    """Generates sample images on all ranks. Saves them as one grid, samples/step-N.png, and logs it to trackers."""
    args = run.args
    accelerator = run.accelerator
    seeds = range(run.progress.seed, run.progress.seed + args.num_validation_images)
    jobs = [(prompt, seed) for prompt in read_prompts(args) for seed in seeds]
    numbered = []
    for first in range(0, len(jobs), accelerator.num_processes):
        raise_if_stopping(accelerator)
        number = first + accelerator.process_index
        if number < len(jobs):
            prompt, seed = jobs[number]
            image = generate_image(run.unwrapped, prompt, seed, args.resolution, switch_at=args.denoising_start)
            numbered.append((number, (image * 255).round().astype(np.uint8)))
    ordered = [image for _, image in sorted(gather_object(numbered), key=lambda pair: pair[0])]
    if not accelerator.is_main_process:
        return
    grid = draw_grid(np.stack(ordered), [prompt for prompt, _ in jobs], args.num_validation_images)
    encoded = io.BytesIO()
    grid.save(encoded, "png")
    folder = Path(args.output_dir) / "samples"
    folder.mkdir(exist_ok=True)
    write_file(folder / f"step-{run.progress.step}.png", encoded.getvalue())
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": np.asarray(grid)[None]}, step=run.progress.step, **layout)


def log_row(accelerator, row, step):
    """Logs a row of metrics to every tracker. If a tracker cannot write, logs an error, and the run continues."""
    for tracker in accelerator.trackers:
        fault = try_write(lambda tracker=tracker: tracker.log(row, step=step))
        if fault:
            logger.error("--output_dir: %s could not write the row of step %d yet: %s", tracker.name, step, fault)


def validate(run):
    """Computes validation loss and sample images. Returns the metrics. Raises Preempted after a stop signal."""
    progress = run.progress
    best = progress.best
    metrics = {}
    if run.val_dataset is not None:
        val_loss = compute_validation_loss(run)
        if not best or val_loss < best["val_loss"]:
            best = {"val_loss": val_loss, "step": progress.step}
        metrics = {"val_loss": val_loss, "best_val_loss": best["val_loss"], "best_step": best["step"]}
    if run.args.validation_prompt or run.args.validation_prompts:
        fault = try_write(lambda: save_samples(run))
        if fault:
            logger.error("--output_dir: could not write the sample grid of step %d: %s", progress.step, fault)
    progress.best = best
    if metrics:
        log_row(run.accelerator, metrics, progress.step)
        logger.info("step %d: %s", progress.step, metrics)
    return metrics


# -----------------------------------------------------------------------------
# 9 Train loop
# -----------------------------------------------------------------------------


@dataclass
class Run:
    """Holds everything that the train loop needs. make_run() creates it.

    `models` is for training steps: DDP wraps the ones with adapters. `unwrapped` holds the same models without DDP,
    for validation and sample images. `trained` is a dict of only the models with adapters, also without DDP, for
    saving.
    """

    args: argparse.Namespace
    accelerator: Accelerator
    models: Models
    unwrapped: Models
    trained: dict
    optimizer: torch.optim.Optimizer
    lr_schedule: object
    batches: data.MicroBatches
    loader: DataLoader
    val_dataset: ImageDataset | EncodedDataset | None
    weight_dtype: torch.dtype
    progress: Progress
    steps_per_epoch: int
    reports: deque = field(default_factory=deque)  # sent, not yet read
    stopping: bool = False  # all ranks have agreed to stop
    last_log: tuple = (0, 0.0)  # (step, time) of the last row of metrics
    checkpoint_writer: ThreadPoolExecutor | None = None  # on the main process
    pending_checkpoint: Future | None = None  # the newest one


def make_batches(args, accelerator, progress, index, mix):
    """Returns the MicroBatches of all remaining steps, and the number of steps per epoch."""
    global_batch = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    steps_per_epoch = math.ceil(len(index) / global_batch)
    max_train_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    position = (progress.step, progress.cursors, progress.samples)
    plan = data.SamplePlan(index, mix, args.class_choice, progress.seed, global_batch, *position)
    rank, world = accelerator.process_index, accelerator.num_processes
    return data.MicroBatches(plan, max_train_steps, args.train_batch_size, rank, world), steps_per_epoch


def train_step(run, batch):
    """Runs a micro-step. Returns the losses (B,) and, at the end of a step, the gradient norm before clipping."""
    args = run.args
    accelerator = run.accelerator
    grad_norm = None
    draws = sample_batch_noise(run.models, batch, args.noise_offset)
    if args.lora_dropout:
        torch.manual_seed(torch_seed(data.DROPOUT_MASK, run.progress.seed, batch["positions"][0]))
    with accelerator.accumulate(run.models.unet, *run.models.text_encoders):
        losses = diffusion_loss(run.models, batch, draws, run.weight_dtype, args.snr_gamma, args.caption_dropout_rate,
            args.dropped_caption)  # fmt: skip
        accelerator.backward(losses.mean())
        if accelerator.sync_gradients:
            parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
            grad_norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
    return losses.detach(), grad_norm


def check_gradients(trained):
    """Raises InputError if a trainable parameter got no gradient."""
    parameters = [(f"{name}.{n}", p) for name, model in trained.items() for n, p in model.named_parameters()]
    lost = [name for name, p in parameters if p.requires_grad and p.grad is None]
    if lost:
        raise InputError(f"--lora_target_modules: no gradient reaches {', '.join(lost[:3])}; leave such layers out")


@dataclass
class Report:
    """Holds a step's sums over all ranks and this rank's losses. It is read a step late to keep training going."""

    step: int
    sums: torch.Tensor  # (4,) on the CPU, over the ranks: loss, gradient is not finite, stop signal, damaged samples
    arrived: torch.cuda.Event | None  # on a GPU: `sums` is valid after it
    grad_norm: torch.Tensor
    losses: torch.Tensor  # (n,) of this rank, as are the next two
    keys: list
    skipped: list


def send_report(run, losses, grad_norm, keys, skipped):
    """Starts summing a Report over all ranks. A normal step exchanges nothing else except the gradients."""
    on_gpu = losses.device.type == "cuda"
    own = torch.tensor([0.0, 0.0, float(bool(stop)), len(skipped)], dtype=torch.float64)
    own = to_device(own, losses.device)
    own[0] = losses.double().mean()
    own[1] = ~torch.isfinite(grad_norm)
    sums = run.accelerator.reduce(own, "sum").to("cpu", non_blocking=on_gpu)
    arrived = torch.cuda.current_stream().record_event() if on_gpu else None
    run.reports.append(Report(run.progress.step + 1, sums, arrived, grad_norm, losses, keys, skipped))


def count_nonfinite_step(run, report, loss):
    """Counts a step whose loss or gradient is NaN or infinite, and warns that it is skipped.

    Raises TrainingError on all ranks if the step may not be skipped, or after too many such steps in a row. The error
    names the step and the samples.
    """
    progress = run.progress
    progress.nonfinite_steps += 1
    progress.nonfinite_in_a_row += 1
    keys = report.keys
    if not math.isfinite(loss):  # name only the samples to blame
        keys = [key for key, own_loss in zip(keys, report.losses.tolist()) if not math.isfinite(own_loss)]
    samples = ", ".join(gather_object(keys)[:8])
    found = f"loss is {loss}, gradient norm {float(report.grad_norm)} at step {report.step}, samples {samples}"
    may_skip = run.accelerator.scaler is not None or run.args.on_nonfinite == "skip"
    if not may_skip or progress.nonfinite_in_a_row > MAX_NONFINITE_STEPS:
        times = f" ({progress.nonfinite_in_a_row} steps in a row)" if may_skip else ""
        raise TrainingError(
            f"non-finite loss or gradient: {found}{times}; no checkpoint contains it; lower --learning_rate, or use "
            "--mixed_precision bf16 and --vae_precision fp32; --on_nonfinite skip skips single steps"
        )
    logger.warning("step skipped: %s", found)


def read_reports(run, late=0):
    """Reads all reports except the newest `late`, and adds them to run.progress.

    Returns whether the last report that it read has a non-finite loss or gradient. All ranks read the same reports.
    After a stop signal on any rank, it reads every report and sets run.stopping.
    """
    is_nonfinite = False
    while len(run.reports) > (0 if run.stopping else late):
        report = run.reports.popleft()
        if report.arrived:
            report.arrived.synchronize()
        loss, nonfinite_gradients, stop_signals_received, damaged = report.sums.tolist()
        if stop_signals_received > 0:
            run.stopping = True
        is_nonfinite = nonfinite_gradients > 0 or not math.isfinite(loss)
        if is_nonfinite:
            count_nonfinite_step(run, report, loss)
        else:
            run.progress.nonfinite_in_a_row = 0
            run.progress.loss_sum += loss / run.accelerator.num_processes
            run.progress.loss_count += 1
        if damaged:
            entries = gather_object(report.skipped)
            note_skipped(run.args, run.batches.plan.index, run.progress, entries, run.accelerator.is_main_process)
    return is_nonfinite


def log_metrics(run, bar, grad_norm):
    """Logs a row of metrics to all trackers and returns the row. Its loss is the mean since the previous row."""
    progress = run.progress
    step = progress.step
    last_step, last_time = run.last_log
    run.last_log = (step, time.time())
    row = {"loss": progress.loss_sum / progress.loss_count} if progress.loss_count else {}
    row |= {
        "lr": run.optimizer.param_groups[0]["lr"],
        "grad_norm": float(grad_norm),
        "epoch": step / run.steps_per_epoch,
        "class_mix": run.batches.plan.mix.weight_of_data(step - 1),
        "skipped": sum(progress.skipped.values()),
        **{f"skipped/{reason}": count for reason, count in progress.skipped.items()},
        "nonfinite_steps": progress.nonfinite_steps,
    }
    shown_lr = row["lr"]
    if "d" in run.optimizer.param_groups[0]:  # Prodigy's estimate of the best learning rate, which scales lr
        row["d"] = float(run.optimizer.param_groups[0]["d"])
        row["effective_lr"] = shown_lr = row["d"] * row["lr"]
    images = (step - last_step) * run.batches.plan.global_batch
    row["images_per_second"] = images / max(run.last_log[1] - last_time, 1e-9)
    progress.loss_sum, progress.loss_count = 0.0, 0
    speed = f"{row['images_per_second']:.1f}"
    bar.set_postfix(loss=f"{row.get('loss', math.nan):.4f}", lr=f"{shown_lr:.2e}", img_s=speed)
    log_row(run.accelerator, row, step)
    return row


def validate_or_stop(run):
    """Returns the metrics of validate(). After a stop signal, returns {} and leaves validation to the resumed run."""
    run.progress.validation_due = True
    if run.stopping:
        return {}
    try:
        metrics = validate(run)
    except Preempted:
        run.stopping = True
        return {}
    run.progress.validation_due = False
    return metrics


def update_weights(run):
    """Updates the weights, unless --on_nonfinite skips a non-finite step. Advances run.progress by a step."""
    progress = run.progress
    may_skip = run.args.on_nonfinite == "skip" and run.accelerator.scaler is None  # a scaler skips by itself
    skip = read_reports(run) if may_skip else False
    for group in run.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * run.lr_schedule(progress.step)
    if not skip:
        run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    progress.step += 1
    progress.samples += run.batches.plan.global_batch
    progress.cursors = run.batches.states.pop(progress.step)
    stop.has_step = True


def train(run):
    """Trains to the last step or a stop signal. Returns the last metrics. Raises TrainingError if a step fails."""
    args = run.args
    accelerator = run.accelerator
    progress = run.progress
    quiet = not accelerator.is_local_main_process
    bar = tqdm(total=run.batches.last_step, initial=progress.step, disable=quiet, unit="step")
    run.last_log = (progress.step, time.time())
    metrics = validate_or_stop(run) if progress.validation_due else {}
    if run.stopping:
        raise Preempted
    losses, keys, skipped = [], [], []  # of the micro-steps of an update
    for batch in run.loader:
        batch = move_batch(batch, accelerator.device)
        micro_losses, grad_norm = train_step(run, batch)
        stop.note_progress()
        losses.append(micro_losses)
        keys += batch["keys"]
        skipped += batch["skipped"]
        if not accelerator.sync_gradients:
            continue

        # The last micro-step of an update: all ranks share what they saw, then step.
        if progress.step == 0:
            check_gradients(run.trained)
        send_report(run, torch.cat(losses), grad_norm, keys, skipped)
        losses, keys, skipped = [], [], []
        update_weights(run)
        bar.update()

        step = progress.step
        done = step >= run.batches.last_step
        logs = done or step % args.logging_steps == 0
        validates = done or step % (args.validation_steps or args.validation_epochs * run.steps_per_epoch) == 0
        saves = step % args.checkpointing_steps == 0 and step >= args.checkpointing_after_steps
        # A report is read after the next step, so that the GPU never waits for it; but at once where it is needed.
        read_reports(run, late=0 if logs or validates or saves else 1)
        if logs:
            metrics = log_metrics(run, bar, grad_norm)
        if validates:
            metrics |= validate_or_stop(run)
        if saves or done or run.stopping:
            save_checkpoint(run, last=done or run.stopping)
        if done or run.stopping:
            break
    bar.close()
    if progress.step < run.batches.last_step and not run.stopping:
        raise TrainingError(f"the data ended at step {progress.step} of {run.batches.last_step}; this is a bug")
    stop.patient = True  # training is over: nothing for the watchdog to wait for
    done = progress.step >= run.batches.last_step and not progress.validation_due
    return metrics | {"step": progress.step, "preempted": not done}


# -----------------------------------------------------------------------------
# 10 Preview: --dry_run
# -----------------------------------------------------------------------------


def preview(args, accelerator, progress, checkpointing):
    """Runs --dry_run. Writes the folder preview/, logs a summary, and returns the content of preview.json."""
    dataset, mix, _ = make_data(accelerator, args, progress.seed)
    index = dataset.index
    signature = make_resume_signature(args, accelerator, index, mix)
    if progress.resume_signature:
        check_resume(progress.resume_signature, signature, args.allow_batch_change)
    weight_dtype = weight_dtype_of(accelerator.mixed_precision)
    models = load_models(args, weight_dtype, accelerator.device, unet_weights=False)
    set_caption_chunks(args, accelerator, models, index)
    add_adapters(args, models, progress.seed)  # only checks that they fit
    if not accelerator.is_main_process:
        return {}

    batches, steps_per_epoch = make_batches(args, accelerator, progress, index, mix)
    plan = batches.plan
    steps = batches.last_step
    captions = index.table.column("captions").combine_chunks().flatten().to_pylist()
    tokens = [len(ids) for ids in models.tokenizers[0](captions, add_special_tokens=False).input_ids]
    own_images = steps * plan.global_batch // accelerator.num_processes
    facts = sdxl_preview.describe_data(dataset, plan, steps, tokens)
    facts |= {"global_batch": plan.global_batch, "steps": steps, "steps_per_epoch": steps_per_epoch}
    shapes = load_shapes(args, weight_dtype, accelerator.num_processes)
    facts |= sdxl_preview.estimate_resources(args, shapes, checkpointing, accelerator.device, own_images)
    folder = Path(args.output_dir) / "preview"
    folder.mkdir(parents=True, exist_ok=True)
    requests = [request for _, batch in zip(range(24), batches) for request in batch][:24]
    sdxl_preview.draw_contact_sheet(dataset, requests).savefig(folder / "contact_sheet.png")
    if facts["classes"]:
        sdxl_preview.draw_classes(facts["classes"]).savefig(folder / "classes.png")
    write_file(folder / "preview.json", (json.dumps(facts, indent=1, ensure_ascii=False) + "\n").encode())
    sdxl_preview.log_summary(args, facts, len(index.damage))
    logger.info("nothing was trained; see %s", folder)
    return facts


# -----------------------------------------------------------------------------
# 11 Process, log, errors
# -----------------------------------------------------------------------------


def touch_preempt_file():
    """Creates the file $PREEMPT_FILE, so that a batch script queues the job again. Does nothing after Ctrl-C."""
    is_main = os.environ.get("RANK", "0") == "0"  # launchers also send SIGTERM to the others when it has failed
    if os.environ.get("PREEMPT_FILE") and is_main and stop.number != signal.SIGINT:
        Path(os.environ["PREEMPT_FILE"]).touch()


class SignalListener:
    """Thread that records SIGTERM, SIGUSR1, SIGHUP and Ctrl-C in `stop`, even while the main thread is blocked.

    A second Ctrl-C ends the process at once. After any stop signal, the process also ends if no progress is made for
    STOP_SECONDS. A run with one process ends at once if it has no step to save. If the launcher exits, this counts as
    a SIGTERM.
    """

    def __init__(self, launcher_pid):
        self.launcher_pid = launcher_pid
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
        self.previous_handlers = {number: signal.signal(number, lambda *_: None) for number in data.STOP_SIGNALS}
        for number in early_signals:
            self.receive(number)
        threading.Thread(target=self.watch, daemon=True).start()
        stop.listener = self

    def close(self):
        """Ends the thread and restores the signal handlers of the program that called main()."""
        signal.set_wakeup_fd(-1)
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)
        os.close(self.writer)  # ends the thread
        stop.clear()

    def watch(self):
        was_launched = "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
        while True:
            ready, _, _ = select.select([self.reader], [], [], 0.5)
            received = os.read(self.reader, 64) if ready else b""
            if ready and not received:
                os.close(self.reader)
                return
            for number in received:
                if number in data.STOP_SIGNALS:
                    self.receive(number)
            if was_launched and os.getppid() != self.launcher_pid and not stop:
                self.receive(signal.SIGTERM)
            if stop and not stop.patient and time.monotonic() > stop.last_progress + STOP_SECONDS:
                self.give_up()

    def receive(self, number):
        now = time.monotonic()
        if stop.number == number == signal.SIGINT and now > stop.since + 1:  # sooner: a launcher repeats the first
            os._exit(130)
        if not stop:
            stop.number = number
            stop.since = now
            stop.last_progress = now
            when = "stopping after this step" if stop.has_step else "stopping before the first step"
            logger.warning("%s: %s", signal.Signals(number).name, when)
        if not stop.has_step and int(os.environ.get("WORLD_SIZE", 1)) == 1:
            self.exit_without_saving()

    def give_up(self):
        if not stop.has_step:
            self.exit_without_saving()
        name = signal.Signals(stop.number).name
        logger.error("%s: no step has finished for %d s; the newest checkpoint is intact", name, STOP_SECONDS)
        os._exit(1)

    def exit_without_saving(self):
        touch_preempt_file()
        os._exit(0)


@contextmanager
def stop_signals():
    """Context manager in which stop signals mean "save and exit". Restores the previous signal handlers at the end."""
    if stop.listener is not None:
        yield
        return
    listener = SignalListener(os.getppid())
    try:
        yield
    finally:
        listener.close()


class JsonlTracker(GeneralTracker):
    """Tracker that writes metrics.jsonl, one JSON object per line. While the disk is full, it keeps rows in memory."""

    name = "jsonl"
    requires_logging_directory = False

    def __init__(self, path):
        super().__init__()
        self.path = path
        self.unwritten = []

    @property
    def tracker(self):
        return self.path

    @on_main_process
    def store_init_configuration(self, values):
        pass

    @on_main_process
    def log(self, values, step=None, **kwargs):
        self.unwritten.append({"step": step, **values, "time": round(time.time(), 3)})
        append_jsonl(self.path, self.unwritten)
        self.unwritten = []


def check_world(accelerator):
    """Raises InputError if the process group is not what the launcher started, or its ranks differ in precision."""
    expected = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != expected:
        found = f"the launcher started {expected} processes, but each sees {accelerator.num_processes}"
        raise InputError(f"--num_processes: {found}; without a GPU set ACCELERATE_USE_CPU=true")
    precisions = sorted(set(gather_object([accelerator.mixed_precision])))
    if len(precisions) > 1:
        found = f"found {' and '.join(precisions)}, because the GPUs of this run differ"
        raise InputError(f"--mixed_precision: {found}; give one of them")


def list_trackers(report_to):
    """Returns the trackers that --report_to names. Raises InputError if the package is not installed."""
    installed = [str(tracker) for tracker in get_available_trackers()]
    choices = {"all": installed, "none": [], **{name: [name] for name in installed}}
    if report_to not in choices:
        raise InputError(f"--report_to: {report_to} is not installed; choose from {', '.join(choices)}")
    return choices[report_to]


def set_deterministic(attention_backend):
    """Makes PyTorch use deterministic CUDA kernels only. Raises InputError for --attention_backend cudnn."""
    if attention_backend == "cudnn":
        raise InputError("--attention_backend: cudnn is not deterministic; give another, or --no-deterministic")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch._inductor.config.deterministic = True


def choose_precision(args):
    """Returns --mixed_precision; without it, the launcher's choice; without that, the best that the GPU has."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if args.mixed_precision or launched != "no":
        return args.mixed_precision or launched
    if not torch.cuda.is_available() or accelerate_utils.parse_flag_from_env("ACCELERATE_USE_CPU"):
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def make_accelerator(args):
    """Returns an Accelerator with its trackers. Raises InputError if a flag does not work on this machine."""
    output_dir = Path(args.output_dir)
    trackers = list_trackers(args.report_to)
    if args.allow_tf32:
        torch.set_float32_matmul_precision("high")
    if args.deterministic and torch.cuda.is_available():
        set_deterministic(args.attention_backend)
    logging_dir = str(output_dir / args.logging_dir)
    accelerator = Accelerator(
        mixed_precision=choose_precision(args),
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=[*trackers, JsonlTracker(output_dir / "metrics.jsonl")],
        project_config=accelerate_utils.ProjectConfiguration(project_dir=str(output_dir), logging_dir=logging_dir),
        kwargs_handlers=[
            accelerate_utils.AutocastKwargs(enabled=False),  # adapters cast themselves to the frozen models' dtype
            accelerate_utils.DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            accelerate_utils.InitProcessGroupKwargs(timeout=GROUP_TIMEOUT),
        ],
    )
    check_world(accelerator)
    if accelerator.mixed_precision == "fp16" and accelerator.device.type != "cuda":
        raise InputError("--mixed_precision: fp16 needs a CUDA device (a CPU would compute in fp32); use bf16 or no")
    return accelerator


def tell_launcher(error):
    """Writes the error to the file from which torchrun and accelerate launch take the reason that they print last."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        Path(path).write_text(json.dumps({"message": str(error), "timestamp": int(time.time())}))


def resume_advice(args):
    """Returns the end of an error message: whether there is a checkpoint to continue from."""
    if data.list_checkpoints(args.output_dir):
        return "the newest checkpoint is intact; continue with --resume_from_checkpoint latest"
    return "no checkpoint was saved yet"


def find_other_error(args):
    """Returns the error that another rank has logged since its start, or None if it has not logged one in 2 s."""
    folder = Path(args.output_dir) / args.logging_dir
    logs = [folder / f"rank-{rank}.log" for rank in range(int(os.environ.get("WORLD_SIZE", 1)))]
    for _ in range(20):
        for log in filter(Path.exists, logs):
            since_start = log.read_text(encoding="utf-8", errors="replace").rpartition(START_LINE)[2]
            found = re.search(r" ERROR (.*)", since_start)
            if found and OTHER_ENDED not in found[1]:
                return f"{log.stem} has failed: {found[1].partition('error: ')[2] or found[1]}"
        time.sleep(0.1)
    return None


@contextmanager
def readable_errors(args):
    """Context manager that turns known library errors into InputError or TrainingError, which say what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        remedy = "--gradient_checkpointing, then a smaller --train_batch_size with --gradient_accumulation_steps"
        remedy += ", then --base_precision nf4, --use_8bit_adam, a smaller --rank or --resolution"
        raise TrainingError(f"--train_batch_size: out of GPU memory; try {remedy}; {resume_advice(args)}") from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        advice = resume_advice(args)
        raise TrainingError(f"--output_dir: cannot write: {error}; free some space; {advice}") from error
    except RuntimeError as error:
        if "deterministic implementation" in str(error):
            raise InputError(f"--deterministic: {error}; give --no-deterministic") from error
        if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
            raise
        logs = Path(args.output_dir) / args.logging_dir / "rank-N.log"
        reason = find_other_error(args) or f"its {logs} may say why; {resume_advice(args)}"
        raise TrainingError(f"{OTHER_ENDED}; {reason}") from error


def check_hub_model(args, flag):
    """Raises InputError if `flag` names a model on the hub that can be neither downloaded nor found in the cache."""
    name = getattr(args, flag.removeprefix("--"))
    if not name or Path(name).expanduser().exists():
        return
    revision = args.revision if flag == sdxl_single_file.BASE_FLAG else None
    options = {"cache_dir": args.cache_dir, "revision": revision}
    is_cached = False
    try:
        for file in ("model_index.json", "config.json", "unet/config.json"):
            is_cached |= isinstance(huggingface_hub.try_to_load_from_cache(name, file, **options), str)
        if not huggingface_hub.constants.HF_HUB_OFFLINE:
            huggingface_hub.HfApi().model_info(name, revision=revision, timeout=20)
        elif not is_cached:
            raise LookupError("it is not on this machine and HF_HUB_OFFLINE is set")
    except Exception as error:  # of the network, the hub's refusal, or a name that no model can have
        remedy = "set HF_HUB_OFFLINE=1 to use the copy on this machine" if is_cached else "give a folder or another id"
        raise InputError(f"{flag}: cannot get {name} from the hub: {short_reason(error)}; {remedy}") from error


def check_wandb_login():
    """Raises InputError if W&B is in online mode and login fails."""
    import wandb

    if wandb.setup().settings.mode != "online":
        return
    remedy = "run `wandb login`, set WANDB_API_KEY, or WANDB_MODE=offline"
    try:
        logged_in = wandb.login(prompt=False)
    except Exception as error:  # the key is wrong, or the server cannot be reached
        raise InputError(f"--report_to: W&B says: {short_reason(error)}; {remedy}") from error
    if not logged_in:
        raise InputError(f"--report_to: W&B has no login on this machine; {remedy}")


def check_disk(args, trained):
    """Raises InputError if the disk has no space for one checkpoint."""
    count = sum(p.numel() for model in trained.values() for p in model.parameters() if p.requires_grad)
    needed = count * (2 * 4 + sdxl_memory.MOMENT_BYTES[args.optimizer])  # both LoRA files, and the optimizer's state
    free = shutil.disk_usage(args.output_dir).free
    if free < needed:
        found = (
            f"{free / 1e9:.2f} GB are free on the disk of {args.output_dir}; a checkpoint takes {needed / 1e9:.2f} GB"
        )
        raise InputError(f"--output_dir: {found}; free some space or give another folder")


def least_free_memory(accelerator):
    """Returns the free device memory of the rank that has the least, in bytes, or None if it is not known."""
    free = gather_object([sdxl_memory.free_memory(accelerator.device)])
    return None if None in free else min(free)


def check_services(args, trackers):
    """Raises InputError if W&B or the hub cannot be used. With --push_to_hub, creates the repository."""
    if "wandb" in trackers:
        check_wandb_login()
    if args.push_to_hub:
        try:
            hub_repo(args)
        except InputError:
            raise
        except Exception as error:  # of the network, or the hub's refusal
            remedy = "log in with `hf auth login`, or leave out --push_to_hub"
            raise InputError(f"--push_to_hub: the hub says: {short_reason(error)}; {remedy}") from error


def check_needs(args, accelerator, free):
    """Returns the --gradient_checkpointing mode that fits in `free` bytes of device memory, or None if not known.

    Raises InputError if a model, memory, disk space, or access to W&B or the hub is missing.
    """
    for flag in sdxl_single_file.NEEDED_PARTS:
        check_hub_model(args, flag)
    shapes = load_shapes(args, weight_dtype_of(accelerator.mixed_precision), accelerator.num_processes)
    checkpointing, reason = sdxl_memory.choose_checkpointing(args, shapes, free)
    if reason:
        logger.info("%s", reason)
    if not args.dry_run:
        check_disk(args, shapes.trained)
        check_services(args, list(map(str, accelerator.log_with)))
    return checkpointing


def describe_environment(accelerator):
    """Logs what the environment has decided. Warns if the launcher has started fewer processes than it was told to."""
    names = ["GRADIENT_ACCUMULATION_STEPS", "MIXED_PRECISION", "USE_CPU", "TORCH_DEVICE", "DEBUG_MODE", "CPU_AFFINITY"]
    names = [f"ACCELERATE_{name}" for name in names]
    found = [
        f"{name}={os.environ[name]}" for name in names if os.environ.get(name, "no").lower() not in ("no", "false")
    ]
    rank = f"process {accelerator.process_index + 1} of {accelerator.num_processes}"
    logger.info("%s %s on %s, precision %s%s", START_LINE, rank, accelerator.device, accelerator.mixed_precision,
        f"; from the environment: {', '.join(found)}" if found else "")  # fmt: skip
    was_told_more = "ACCELERATE_DYNAMO_BACKEND" in os.environ and "MASTER_ADDR" in os.environ
    if was_told_more and "WORLD_SIZE" not in os.environ:  # `accelerate launch --cpu --num_processes 3` does so
        logger.warning("only one process was started; for several, use --config_file accelerate_configs/ddp.yaml and "
            "--num_processes, and without a GPU ACCELERATE_USE_CPU=true")  # fmt: skip


def warn_of_flags_without_effect(args):
    """Logs a line for each flag that was given and changes nothing."""
    given = {
        "local_rank": args.local_rank != -1,
        "enable_npu_flash_attention": args.enable_npu_flash_attention,
        "debug_loss": args.debug_loss,
        "lr_num_cycles": args.lr_num_cycles != 1 and args.lr_scheduler != "cosine_with_restarts",
        "lr_power": args.lr_power != 1 and args.lr_scheduler != "polynomial",
    }
    for name in filter(given.get, given):
        logger.warning("--%s: has no effect here; see --help", name)


def prepare_output_dir(accelerator, args):
    """Creates output_dir and starts this rank's log file in it. Raises InputError if the folder is not writable."""
    log = Path(args.output_dir) / args.logging_dir / f"rank-{accelerator.process_index}.log"
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
    for library in (datasets.utils.logging, transformers.utils.logging, diffusers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


# -----------------------------------------------------------------------------
# 12 Main
# -----------------------------------------------------------------------------


def claim_output_dir(args):
    """Locks output_dir. Returns the checkpoint folder and its Progress. A new run gets None and a new Progress."""
    if not args.dry_run:
        lock_output_dir(Path(args.output_dir))
    folder, progress = find_checkpoint(args)
    if progress is None:
        seed = args.seed if args.seed is not None else int.from_bytes(os.urandom(4), "little") >> 1
        return None, Progress(seed=seed, run_id=os.urandom(4).hex())
    if args.seed not in (None, progress.seed):
        found = f"{progress.seed} in the checkpoint, {args.seed} now"
        raise InputError(f"--seed: {found}; give the original value or another --output_dir")
    return folder, progress


def load_frozen_models(args, accelerator, progress, signature, index):
    """Loads the frozen models. Raises InputError if the checkpoint was made with other models, data or flags."""
    weight_dtype = weight_dtype_of(accelerator.mixed_precision)
    models = load_models(args, weight_dtype, accelerator.device)
    set_caption_chunks(args, accelerator, models, index)
    signature["base_model"] = models.fingerprint
    if progress.resume_signature:
        check_resume(progress.resume_signature, signature, args.allow_batch_change)
        flags = {name: value for name, value in other_flags(args).items() if name in progress.flags}
        for difference in list_differences(progress.flags, flags) if accelerator.is_main_process else ():
            logger.info("resumed with another %s", difference)
    progress.resume_signature = signature
    progress.flags = other_flags(args)
    return models


def fix_bucket_layout(model):
    """Makes DDP choose its gradient buckets before the first step, by a backward pass whose gradients are discarded.

    Otherwise it would choose them anew after the first step of every start. A resumed run would then add the gradients
    of three or more processes in another order in that step. Also turns off the broadcast of buffers: all are frozen.
    """
    model.forward_sync_buffers = False
    parameters = [p for p in model.parameters() if p.requires_grad]
    with mock.patch.object(model.module, "forward", lambda: torch.stack([p.sum() for p in parameters]).sum()):
        model().backward()
    model.zero_grad()


def prepare_for_training(args, accelerator, models, progress, checkpointing):
    """Adds adapters and DDP. Returns the values of Run.models, Run.trained and Run.optimizer."""
    weight_dtype = weight_dtype_of(accelerator.mixed_precision)
    if args.base_precision != "auto":
        sdxl_speed.quantize_linears(models.unet, args.base_precision, weight_dtype)
    models.unet.to(accelerator.device)
    if args.stage == "refiner" and (args.validation_prompt or args.validation_prompts):
        models.base_pipeline = load_base_pipeline(args, models, weight_dtype)
    raise_if_stopping(accelerator)
    trained = add_adapters(args, models, progress.seed)
    set_speed(args, trained, checkpointing)
    learning_rate = args.learning_rate
    if args.scale_lr:
        learning_rate *= progress.resume_signature["global_batch"]
    groups = make_parameter_groups(trained, learning_rate, args.text_encoder_lr_scale)
    *prepared, optimizer = accelerator.prepare(*trained.values(), make_optimizer(args, groups, learning_rate))
    for model in prepared if accelerator.num_processes > 1 else ():
        fix_bucket_layout(model)
    prepared = dict(zip(trained, prepared))
    encoders = [prepared.get(n, m) for n, m in zip(("text_encoder", "text_encoder_2"), models.text_encoders)]
    return replace(models, unet=prepared["unet"], text_encoders=encoders), trained, optimizer


def make_run(args, accelerator, progress, checkpointing):
    """Builds everything that the train loop needs, and returns it as a Run."""
    dataset, mix, val_dataset = make_data(accelerator, args, progress.seed)
    index = dataset.index
    raise_if_stopping(accelerator)
    signature = make_resume_signature(args, accelerator, index, mix)
    if progress.resume_signature:  # before the models are loaded, which takes long, and again when they are known
        check_resume(progress.resume_signature, signature, args.allow_batch_change)
    unwrapped = load_frozen_models(args, accelerator, progress, signature, index)
    if args.cache_latents or args.cache_text_embeddings:
        dataset, val_dataset = cache_encodings(accelerator, args, unwrapped, [dataset, val_dataset])
    models, trained, optimizer = prepare_for_training(args, accelerator, unwrapped, progress, checkpointing)
    batches, steps_per_epoch = make_batches(args, accelerator, progress, index, mix)
    warmup_steps = round(0.03 * batches.last_step) if args.lr_warmup_steps is None else args.lr_warmup_steps
    steps = (warmup_steps, batches.last_step)
    lr_schedule = make_lr_schedule(args.lr_scheduler, *steps, args.lr_num_cycles, args.lr_power)
    return Run(
        args=args,
        accelerator=accelerator,
        models=models,
        unwrapped=unwrapped,
        trained=trained,
        optimizer=optimizer,
        lr_schedule=lr_schedule,
        batches=batches,
        loader=data.make_loader(dataset, batches, args.dataloader_num_workers, accelerator.device.type == "cuda"),
        val_dataset=val_dataset,
        weight_dtype=weight_dtype_of(accelerator.mixed_precision),
        progress=progress,
        steps_per_epoch=steps_per_epoch,
    )


def restore_output_dir(run, checkpoint):
    """Deletes metrics that were logged after the checkpoint. Writes config.yaml, run.json and the scripts."""
    args = run.args
    output_dir = Path(args.output_dir)
    row_files = [output_dir / "metrics.jsonl", output_dir / "skipped.jsonl"]
    if args.overwrite_output_dir and checkpoint is None:  # only now, when everything is ready to train
        for old in [*(path for _, path in data.list_checkpoints(output_dir)), output_dir / "samples"]:
            shutil.rmtree(old, ignore_errors=True)
        for path in row_files:
            path.unlink(missing_ok=True)
    set_aside_checkpoints(output_dir, run.progress.step)
    for path in row_files:
        trim_rows(path, run.progress)
    note_skipped(args, run.batches.plan.index, run.progress, [])
    save_run(args, run.progress, run.batches.plan.index)


def begin(run, checkpoint):
    """Loads the checkpoint, if any, prepares output_dir, and starts the trackers."""
    args = run.args
    accelerator = run.accelerator
    if checkpoint is not None:
        blind = gather_object([] if checkpoint.is_dir() else [str(accelerator.process_index)])
        if blind:
            remedy = "put it on a filesystem that all machines share"
            raise InputError(f"--output_dir: ranks {', '.join(blind)} do not see {checkpoint}; {remedy}")
        load_checkpoint(run, checkpoint)
        logger.info("resumed from %s", checkpoint)
    if accelerator.is_main_process:
        restore_output_dir(run, checkpoint)
    flags = {k: str(v) for k, v in vars(args).items() if k not in ("config", "hub_token")}
    wandb = {"id": run.progress.run_id, "resume": "allow", "dir": args.output_dir, "name": Path(args.output_dir).name}
    options = {"tensorboard": {"purge_step": run.progress.step + 1}, "wandb": wandb}  # the same runs on resume
    accelerator.init_trackers("train_sdxl_lora", config=flags, init_kwargs=options)


def is_finished(run):
    """Returns whether an earlier start of the run has done everything, and says so in the log."""
    args = run.args
    progress = run.progress
    files = [Path(args.output_dir) / name for name in (LORA_FILE, sdxl_lora.KOHYA_FILE, "README.md")]
    if progress.step < run.batches.last_step or progress.validation_due or not all(file.exists() for file in files):
        return False
    logger.info("the run in %s is finished at step %d; for more, give a larger --max_train_steps", args.output_dir,
        progress.step)  # fmt: skip
    return True


def finish(run, metrics):
    """Writes the LoRA and the model card. With --push_to_hub, uploads them if the run is finished."""
    args = run.args
    index = run.batches.plan.index
    if run.accelerator.is_main_process:
        fault = try_write(lambda: save_lora(run, args.output_dir))
        if fault is None:
            fault = try_write(lambda: save_model_card(args, metrics, index, run.unwrapped.noise_scheduler.config))
        if fault:
            where = f"checkpoint-{run.progress.step} holds the LoRA files"
            raise TrainingError(f"--output_dir: {fault}; {where}; free some space and run the same command again")
        if index.damage or run.progress.damaged:
            kinds = Counter(map(data.damage_kind, index.damage + run.progress.damaged))
            damaged = {kind: count for kind, count in kinds.items() if kind not in data.LEFT_OUT}
            if damaged:
                logger.warning("damaged samples, not trained on and listed in skipped.jsonl: %s", damaged)
            if len(damaged) < len(kinds):
                others = {kind: count for kind, count in kinds.items() if kind in data.LEFT_OUT}
                logger.info("also listed in skipped.jsonl: %s", others)
        if args.push_to_hub and not metrics["preempted"]:
            push_to_hub(args)
    if metrics["preempted"]:
        touch_preempt_file()
    fault = try_write(run.accelerator.end_training)
    if fault:
        logger.error("--output_dir: a tracker could not write its last rows: %s", fault)


def main(argv=None):
    """Trains with the flags in `argv` (None: the command line). Returns the last metrics that were logged."""
    args = parse_args(argv)
    with stop_signals(), readable_errors(args):
        accelerator = make_accelerator(args)
        prepare_output_dir(accelerator, args)
        describe_environment(accelerator)
        warn_of_flags_without_effect(args)
        free = least_free_memory(accelerator)
        checkpointing = run_on_main(accelerator, lambda: check_needs(args, accelerator, free))
        checkpoint, progress = run_on_main(accelerator, lambda: claim_output_dir(args))
        try:
            if args.dry_run:
                return preview(args, accelerator, progress, checkpointing)
            run = make_run(args, accelerator, progress, checkpointing)
            if run_on_main(accelerator, lambda: is_finished(run)):
                if args.push_to_hub and accelerator.is_main_process:
                    push_to_hub(args)
                accelerator.end_training()
                return {"step": progress.step, "preempted": False}
            begin(run, checkpoint)
            with ThreadPoolExecutor(1) as run.checkpoint_writer:  # waits at the end for a pending checkpoint
                metrics = train(run)
        except Preempted:  # before there was anything to save
            touch_preempt_file()
            return {"step": progress.step, "preempted": True}
        finish(run, metrics)
    return metrics


if __name__ == "__main__":
    SignalListener(launcher_pid)
    try:
        main()
    except (InputError, TrainingError) as error:
        logger.error("%s: error: %s", Path(sys.argv[0]).name, error)
        tell_launcher(error)
        sys.exit(1)
    except Exception as error:
        logger.exception("stopped by an unexpected error of the program or a library: %s", short_reason(error))
        tell_launcher(error)
        sys.exit(1)
