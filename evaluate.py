#!/usr/bin/env python
"""Score LoRA adapters for Stable Diffusion XL: the same images with and without each, scored by CLIP.

    python evaluate.py --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \\
        --lora runs/a runs/b --train_shards data/train --val_shards data/val --output_dir eval

    accelerate launch --num_processes 8 evaluate.py ...     # N GPUs share the images
    python evaluate.py --checkpoints runs/a ...             # every checkpoint of a run, as a curve

Read OUTPUT_DIR/report.html. To continue an interrupted evaluation, run the same command again: images and their
embeddings are saved as they are made.

Sections, in the order data flows:
     1 Prompts and models    2 Arguments    3 Images    4 Scores    5 Statistics    6 Report    7 Main
"""

import argparse
import base64
import csv
import hashlib
import importlib.metadata
import io
import itertools
import json
import logging
import math
import os
import re
import shlex
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

import sdxl_data
import sdxl_lora
import sdxl_single_file
from sdxl_data import InputError
from sdxl_lora import find_lora, hash_file
from sdxl_single_file import short_reason

AESTHETIC_HEAD = (
    "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth"
)
BOOTSTRAP_SAMPLES = 2000  # resamples of the prompts for each interval
COPY_QUANTILE = 0.99  # of the held-out images' correlation with their nearest training image; a copy has more
COPY_SHARE = 0.05  # a model is flagged if more of its images are copies, by the lower end of the interval
THUMBNAIL = 16  # side in px of the thumbnails that show copies: layout and colours, no detail
EMBEDDING_BATCH = 32  # images; fixed, so that embeddings do not depend on the number of processes

logger = logging.getLogger("evaluate")


# -----------------------------------------------------------------------------
# 1 Prompts and models
# -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """A prompt to evaluate. Its images are compared with `clip_prompt` and should show `class_name`, if set."""

    id: str
    prompt: str
    clip_prompt: str
    class_name: str | None
    tags: tuple


# fmt: off
# Seam: the default prompts. Contract: (id, class, tags, prompt); ids differ.
POKEFA_PROMPTS = [
    ("pikachu-day", "pikachu", "day, single, action", "Pikachu surfing a big wave under a bright midday sun, spray"),
    ("pikachu-night", "pikachu", "night, single", "Pikachu asleep on a mossy roof under a starry night sky"),
    ("eevee-painterly", "eevee", "day, single, painterly",
     "oil painting of Eevee in tall autumn grass, loose brushwork"),
    ("umbreon-night", "umbreon", "night, single, anime",
     "Umbreon on a cliff, rings glowing in moonlight, anime style"),
    ("charizard-action", "charizard", "day, single, action", "Charizard diving through clouds, breathing fire"),
    ("charizard-shiny", "charizard", "shiny, single", "a shiny black Charizard perched on a castle tower at dusk"),
    ("ninetales-alola", "ninetales", "regional, single", "Alolan Ninetales, white fur, walking through falling snow"),
    ("vulpix-pair", "vulpix", "pair, regional, day", "an Alolan Vulpix and a red Vulpix curled up together"),
    ("gengar-night", "gengar", "night, single", "Gengar grinning out of the shadows of a foggy graveyard at night"),
    ("gardevoir-anime", "gardevoir", "single, anime", "Gardevoir dancing in a sunlit ballroom, anime key visual"),
    ("lucario-action", "lucario", "single, action", "Lucario charging an aura sphere between its paws, dynamic pose"),
    ("gyarados-shiny", "gyarados", "shiny, action", "a shiny red Gyarados bursting from a lake in a thunderstorm"),
    ("bulbasaur-day", "bulbasaur", "day, single", "Bulbasaur drinking from a forest stream in morning light"),
    ("squirtle-pair", "squirtle", "pair, day, action", "two Squirtle splashing each other in a rock pool, sunny day"),
    ("snorlax-painterly", "snorlax", "painterly, day", "watercolour of Snorlax asleep beneath a cherry tree in bloom"),
    ("mewtwo-night", "mewtwo", "night, single", "Mewtwo floating above a ruined laboratory at night, purple glow"),
]
# fmt: on


def parse_prompt(line, number):
    """Parses line `number` of a JSONL file. Returns a Prompt. Raises ValueError naming the field that is wrong."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    text = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise ValueError("`prompt` is missing or empty; expected a string")
    clip_prompt = row.get("clip_prompt") or text
    class_name = row.get("class", row.get("species"))
    if not isinstance(clip_prompt, str) or not isinstance(class_name, str | None):
        raise ValueError("`clip_prompt` and `class` must be strings")
    tags = row.get("tags") or []
    if isinstance(tags, str):
        tags = tags.split(",")
    id = str(row.get("id", f"line-{number}"))
    return Prompt(id, text, clip_prompt, class_name, tuple(str(tag).strip() for tag in tags))


def read_prompts(path=None):
    """Returns the Prompts in a JSONL file, or the default prompts if `path` is None.

    Raises ValueError if a line is wrong, the file is empty or two prompts have the same id.
    """
    if path is None:
        return [Prompt(id, text, text, name, tuple(tags.split(", "))) for id, name, tags, text in POKEFA_PROMPTS]
    prompts = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            if line.strip():
                prompts.append(parse_prompt(line, number))
        except ValueError as error:
            raise ValueError(f"{path} line {number}: {error}") from None
    if not prompts:
        raise ValueError(f"{path} is empty; write one JSON object per line")
    for id, count in Counter(prompt.id for prompt in prompts).items():
        if count > 1:
            raise ValueError(f"{path}: {count} prompts have the id {id!r}; ids must differ")
    return prompts


@dataclass(frozen=True)
class Model:
    """What is evaluated: the base model, alone or with LoRAs. `step` is set if the LoRA is a checkpoint of a run."""

    name: str
    lora: Path | None = None
    refiner_lora: Path | None = None
    step: int | None = None


def list_models(args):
    """Returns the Models to compare: the base model, each --lora, and each checkpoint of --checkpoints.

    Raises ValueError if a LoRA file is missing or --checkpoints has no checkpoint.
    """
    refiner_lora = find_lora(args.refiner_lora) if args.refiner_lora else None
    models = {"base model": Model("base model")}

    def add(name, lora, step=None):
        unique = name
        number = 1
        while unique in models:
            number += 1
            unique = f"{name} ({number})"
        models[unique] = Model(unique, lora, refiner_lora, step)

    for file in map(find_lora, args.lora):
        # LoRA files of runs are all called the same; the name of the run tells more.
        add(file.parent.name if file.name == sdxl_data.LORA_FILE else file.stem, file)
    if refiner_lora and not args.lora and not args.checkpoints:
        add(refiner_lora.parent.name, None)
    if args.checkpoints:
        checkpoints = sdxl_data.list_checkpoints(args.checkpoints)
        if not checkpoints:
            raise ValueError(f"no checkpoint-N in {args.checkpoints}; give the --output_dir of a run")
        for step, folder in checkpoints:
            add(f"step {step}", find_lora(folder), step)
    return list(models.values())


# -----------------------------------------------------------------------------
# 2 Arguments
# -----------------------------------------------------------------------------


# fmt: off
def make_parser():
    parser = sdxl_data.make_base_parser(
        "%(prog)s --pretrained_model_name_or_path PATH|ID --lora FILE|DIR … --output_dir DIR [--FLAG VALUE]…",
        "Score LoRA adapters by their images. The groups below follow the sections of the script.",
    )
    add = parser.add_argument_group("Prompts").add_argument
    add("--prompts", metavar="FILE", help="JSONL with `prompt` and optional `id`, `clip_prompt`, `class`, `tags` "
        "(default: 16 prompts for PokeFA)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3], metavar="N", help="one image per seed and prompt")

    add = parser.add_argument_group("Images").add_argument
    add("--pretrained_model_name_or_path", required=True, metavar="PATH|ID",
        help="SDXL snapshot, folder or hub id, or a checkpoint in one .safetensors file")
    add("--revision", metavar="REV", help="hub revision of the snapshot")
    add("--variant", metavar="NAME", help="weight file variant of the snapshot, e.g. fp16")
    add("--single_file_config", metavar="DIR",
        help="snapshot to take configurations and tokenizers from for .safetensors files (default: SDXL's own)")
    add("--prediction_type", choices=["epsilon", "v_prediction"], help="default: the model's own")
    add("--rescale_betas_zero_snr", action=argparse.BooleanOptionalAction, default=None,
        help="noise schedule with zero terminal SNR (default: the model's own)")
    add("--lora", nargs="+", default=[], metavar="FILE|DIR",
        help="LoRA files in diffusers' or kohya's format, runs or checkpoints; the base model is always evaluated too")
    add("--checkpoints", metavar="DIR", help="evaluate every checkpoint of this run")
    add("--merge_lora", nargs="+", metavar="FILE[:SCALE]", help="LoRAs added to the base model, as in the trainer")
    add("--lora_scale", type=float, default=1.0, metavar="X", help="strength of the LoRAs")
    add("--refiner_unet", metavar="PATH|ID", help="refiner that finishes all images; as above")
    add("--refiner_lora", metavar="FILE|DIR",
        help="LoRA of the refiner; used with every model but the base model")
    add("--denoising_start", type=float, default=0.8, metavar="P", help="share of the steps done before the refiner")
    add("--resolution", type=int, metavar="PX", help="width and height of the images (default: the base model's own)")
    add("--num_inference_steps", type=int, default=30, metavar="STEPS", help="denoising steps")
    add("--guidance_scale", type=float, default=7.0, metavar="G", help="classifier-free guidance; 1 turns it off")
    add("--negative_prompt", metavar="TEXT", help="negative prompt of all images (default: the pipeline's)")
    add("--dtype", choices=["fp32", "bf16", "fp16"], help="weight precision (default: bf16 on a GPU, else fp32)")
    add("--batch_size", type=int, default=4, metavar="N", help="images generated at once")

    add = parser.add_argument_group("Scores").add_argument
    add("--clip_model", default="ViT-H-14/laion2b_s32b_b79k", metavar="NAME",
        help="open_clip model: ARCHITECTURE/WEIGHTS, hf-hub:ID or local-dir:FOLDER")
    add("--class_prompt", "--species_prompt", default="{}", metavar="TEXT",
        help="text that CLIP compares for a class; {} is its name")
    add("--aesthetic_clip_model", default="ViT-L-14/openai", metavar="NAME",
        help="open_clip model whose embeddings the aesthetic head takes")
    add("--aesthetic_head", default=AESTHETIC_HEAD, metavar="FILE|URL|none",
        help="in LAION's format, .pth or .safetensors (default: sac+logos+ava1-l14-linearMSE)")
    add("--score_weights", type=float, nargs=2, default=[0.6, 0.4], metavar=("A", "B"),
        help="score = A adherence + B aesthetic / 10")
    add("--train_shards", nargs="+", metavar="TAR", help="training images; the report shows copies of them")
    add("--train_data_dir", nargs="+", metavar="DIR", help="folders of training images, instead of --train_shards")
    add("--val_shards", nargs="+", metavar="TAR",
        help="held-out images: how similar images are without copying (default: the training images)")
    add("--val_fraction", type=float, metavar="P", help="the training images that the trainer held out with this flag")

    add = parser.add_argument_group("Run").add_argument
    add("--config", is_config_file=True, metavar="FILE", help="YAML file with flags; the command line wins")
    add("--output_dir", required=True, metavar="DIR", help="for images, metrics.json, per_image.csv, report.html")
    add("--images_dir", metavar="DIR", help="for images, which several evaluations may share")
    add("--cache_dir", metavar="DIR", help="for downloads and copies of shards")
    add("--report_to", choices=["none", "wandb"], default="none", help="where to send a table of the images")
    return parser
# fmt: on


def parse_args(argv=None):
    """Returns the flags, checked. Exits with a one-line error if one is wrong."""
    parser = make_parser()
    args = parser.parse_args(argv)
    for name in ("resolution", "num_inference_steps", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            parser.error(f"--{name}: found {getattr(args, name)}; expected a number above 0")
    if args.resolution is not None and args.resolution % 8:
        parser.error(f"--resolution: found {args.resolution}; the VAE works on multiples of 8 px")
    if len(set(args.seeds)) < len(args.seeds) or min(args.seeds) < 0:
        parser.error(f"--seeds: found {' '.join(map(str, args.seeds))}; expected different numbers of 0 or more")
    if "{}" not in args.class_prompt:
        parser.error(f"--class_prompt: found {args.class_prompt!r}; expected {{}} where the name goes")
    if not 0 < args.denoising_start < 1:
        parser.error(f"--denoising_start: found {args.denoising_start}; expected a share between 0 and 1")
    if args.refiner_lora and not args.refiner_unet:
        parser.error("--refiner_lora: found without --refiner_unet; give the refiner too")
    try:
        sdxl_single_file.check_model_flags(args)
        sdxl_lora.read_merges(args.merge_lora)
    except InputError as error:
        parser.error(str(error))
    checks = {
        "prompts": lambda: read_prompts(args.prompts),
        "lora": lambda: list(map(sdxl_lora.read_lora_file, args.lora)),
        "checkpoints": lambda: list_models(args),
        "refiner_lora": lambda: sdxl_lora.read_lora_file(args.refiner_lora) if args.refiner_lora else None,
        "train_shards": lambda: sdxl_data.expand_shards(args.train_shards or []),
        "val_shards": lambda: sdxl_data.expand_shards(args.val_shards or []),
    }
    for name, check in checks.items():
        try:
            check()
        except (OSError, ValueError) as error:
            parser.error(f"--{name}: {error}")
    for folder in args.train_data_dir or ():
        if not Path(folder).expanduser().is_dir():
            parser.error(f"--train_data_dir: no folder {folder}")
    if args.train_data_dir and args.train_shards:
        parser.error("--train_data_dir: contradicts --train_shards; give one of them")
    for name in ("val_shards", "val_fraction"):
        if getattr(args, name) and not (args.train_shards or args.train_data_dir):
            parser.error(f"--{name}: found without --train_shards or --train_data_dir, which copies are compared with")
    if args.val_fraction is not None and (args.val_shards or not 0 < args.val_fraction < 1):
        parser.error(f"--val_fraction: found {args.val_fraction}; expected 0 to 1, and no --val_shards")
    return args


if __name__ == "__main__":
    parse_args()  # answers --help and wrong flags at once: the imports below take several seconds

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on import it asks for a package that is not needed here

import diffusers
import jinja2
import matplotlib
import open_clip
import safetensors.torch
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object
from diffusers import AutoencoderKL, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

import train_sdxl_lora as trainer

# -----------------------------------------------------------------------------
# 3 Images: model × prompt × seed
# -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """An image to generate and score, and the path of its file."""

    model: Model
    prompt: Prompt
    seed: int
    path: Path


def short_hash(*parts):
    """Returns a hash of any values, 12 hex digits."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def slug(text):
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40]


# The flags that change the images.
IMAGE_FLAGS = """pretrained_model_name_or_path revision variant lora_scale refiner_unet denoising_start resolution
    num_inference_steps guidance_scale negative_prompt dtype""".split()
NEWER_IMAGE_FLAGS = ("single_file_config", "prediction_type", "rescale_betas_zero_snr")  # not hashed if not given


def list_jobs(args, models, prompts):
    """Returns a Job for every combination of model, prompt and seed.

    An image's path contains hashes of IMAGE_FLAGS, the LoRA files and the prompt. If one of them changes, the image is
    generated again.
    """
    folder = Path(args.images_dir or Path(args.output_dir) / "images")
    newer = [f"{flag} {getattr(args, flag)}" for flag in NEWER_IMAGE_FLAGS if getattr(args, flag) is not None]
    newer += map(repr, sdxl_lora.list_merges(args.merge_lora))
    jobs = []
    for model in models:
        has_lora = model.lora is not None or model.refiner_lora is not None
        values = [getattr(args, flag) for flag in IMAGE_FLAGS if has_lora or flag != "lora_scale"]
        stamp = short_hash(*values, *newer, *(file and hash_file(file) for file in (model.lora, model.refiner_lora)))
        for prompt in prompts:
            name = f"{slug(prompt.id)}-{short_hash(prompt.id, prompt.prompt)}"
            for seed in args.seeds:
                path = folder / f"{slug(model.name)}-{stamp}" / f"{name}-{seed}.png"
                jobs.append(Job(model, prompt, seed, path))
    return jobs


def noise_seed(prompt, seed):
    """Returns the seed of an image's noise. It depends only on the prompt's id and on `seed`, not on the model."""
    return sdxl_data.torch_seed(sdxl_data.hash_text(prompt.id), seed)


def choose_resolution(args, models):
    """Returns the flags with the side of the images filled in. Warns of LoRAs that were trained at another one."""
    if args.resolution is None:
        unet = trainer.load_part(args, UNet2DConditionModel.load_config, "unet")
        vae = trainer.load_part(args, AutoencoderKL.load_config, "vae")
        side = unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)
        args = argparse.Namespace(**vars(args) | {"resolution": side})
    for path in sorted({path for model in models for path in (model.lora, model.refiner_lora) if path}):
        trained = sdxl_lora.read_lora_file(path).resolution
        if trained not in (None, args.resolution):
            logger.warning(
                "--resolution: images are %d px, but %s was trained at %d px", args.resolution, path, trained
            )
    return args


class ImageGenerator:
    """Generates images for one Model at a time, with diffusers' pipelines for SDXL and, if given, the refiner."""

    def __init__(self, args, device):
        self.args = args
        self.device = device
        self.loaded = None
        precision = args.dtype or ("bf16" if device.type == "cuda" else "fp32")
        self.options = {"dtype": trainer.weight_dtype_of(precision), "variant": args.variant}
        self.base = self.load_base()
        self.refiner = self.load_refiner() if args.refiner_unet else None

    def load_base(self):
        load = StableDiffusionXLPipeline.from_pretrained
        base = trainer.load_part(self.args, load, None, add_watermarker=False, **self.options)
        parts = {name: getattr(base, name) for name in ("unet", "text_encoder", "text_encoder_2")}
        sdxl_lora.merge_given_loras(self.args.merge_lora, parts)
        base.scheduler = type(base.scheduler).from_config(trainer.load_scheduler_config(self.args))
        if base.vae.dtype == torch.float16:
            base.vae.to(torch.float32)  # SDXL's own overflows in fp16
        base.vae.enable_slicing()  # decode one by one: in fp32 each image of 1024 px takes 3 GB
        base.set_progress_bar_config(disable=True)
        return base.to(self.device)

    def load_refiner(self):
        """Returns the refiner's pipeline. It has its own UNet and shares all other parts with the base pipeline."""
        folder = None if (Path(self.args.refiner_unet).expanduser() / "config.json").is_file() else "unet"
        load = UNet2DConditionModel.from_pretrained
        unet = trainer.load_part(self.args, load, folder, "--refiner_unet", **self.options)
        refiner = StableDiffusionXLImg2ImgPipeline(
            vae=self.base.vae,
            text_encoder=None,
            text_encoder_2=self.base.text_encoder_2,
            tokenizer=None,
            tokenizer_2=self.base.tokenizer_2,
            unet=unet.to(self.device),
            scheduler=self.base.scheduler,
            requires_aesthetics_score=True,
            force_zeros_for_empty_prompt=False,
            add_watermarker=False,
        )
        refiner.set_progress_bar_config(disable=True)
        return refiner

    def use(self, model):
        """Replaces the loaded LoRAs with those of `model`. Raises InputError if a LoRA does not fit."""
        if model == self.loaded:
            return
        # Unload from both before loading into either: they share text_encoder_2.
        self.base.unload_lora_weights()
        if self.refiner is not None:
            self.refiner.unload_lora_weights()
        if model.lora is not None:
            self.load_lora("--lora", self.base, ("unet", "text_encoder", "text_encoder_2"), model.lora)
        if model.refiner_lora is not None:
            self.load_lora("--refiner_lora", self.refiner, ("unet",), model.refiner_lora)
        self.loaded = model

    def load_lora(self, flag, pipeline, parts, path):
        """Loads a LoRA at the strength --lora_scale. Raises InputError naming `flag` if the LoRA does not fit.

        diffusers' own loader leaves out parts of some kohya files: magnitudes of DoRA, alphas that differ by layer.
        """
        file = sdxl_lora.read_lora_file(path)
        sdxl_lora.check_parts(flag, file, parts)
        name = flag.removeprefix("--")
        try:
            for part in file.parts:
                sdxl_lora.attach_lora(file, part, getattr(pipeline, part), name, self.args.lora_scale)
        except InputError as error:
            raise InputError(f"{flag}: {error}") from error

    def generate(self, prompts, seeds):
        """Returns one PIL image for each pair of a prompt and a seed. The noise is drawn on the CPU."""
        args = self.args
        texts = [prompt.prompt for prompt in prompts]
        side = args.resolution // self.base.vae_scale_factor
        channels = self.base.unet.config.in_channels
        generators = [torch.Generator().manual_seed(noise_seed(p, seed)) for p, seed in zip(prompts, seeds)]
        noise = [torch.randn(channels, side, side, generator=generator) for generator in generators]
        options = {
            "num_inference_steps": args.num_inference_steps,
            "guidance_scale": args.guidance_scale,
            "guidance_rescale": trainer.guidance_rescale(self.base.scheduler),
            "negative_prompt": None if args.negative_prompt is None else [args.negative_prompt] * len(texts),
            "generator": generators,
            "output_type": "latent",
        }
        latents = self.base(
            texts,
            height=args.resolution,
            width=args.resolution,
            latents=torch.stack(noise).to(self.device, self.base.unet.dtype),
            denoising_end=args.denoising_start if self.refiner is not None else None,
            **options,
        ).images
        if self.refiner is not None:
            latents = self.refiner(texts, image=latents, denoising_start=args.denoising_start, **options).images
        return self.decode(latents)

    @torch.no_grad()
    def decode(self, latents):
        """Decodes latents (B, 4, H/8, W/8) to PIL images."""
        vae = self.base.vae
        pixels = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype)).sample.float()
        return self.base.image_processor.postprocess(pixels, output_type="pil")


def write_image(path, image):
    encoded = io.BytesIO()
    image.save(encoded, "png")
    sdxl_data.write_file(path, encoded.getvalue())


def find_files(paths):
    """Returns, for each path, the ranks that see the file: not all do if their machines have separate disks."""
    seen = gather_object([[path.exists() for path in paths]])
    return [[rank for rank, sees in enumerate(row) if sees] for row in zip(*seen)]


def collect_files(state, paths):
    """Copies files that only other ranks can see to the main process's disk."""
    sent = []
    for path, ranks in zip(paths, find_files(paths)):
        if 0 not in ranks and ranks[:1] == [state.process_index]:
            sent.append((path, path.read_bytes()))
    for path, content in gather_object(sent):
        if state.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            sdxl_data.write_file(path, content)
    state.wait_for_everyone()


def generate_images(args, state, jobs):
    """Draws all images that do not exist yet. The processes share the work; the main process gets all images."""
    exists = dict(zip(jobs, find_files([job.path for job in jobs])))
    batches = []
    for _, group in itertools.groupby(jobs, key=lambda job: job.model):
        group = list(group)
        batches += [group[start : start + args.batch_size] for start in range(0, len(group), args.batch_size)]
    mine = batches[state.process_index :: state.num_processes]
    missing = [batch for batch in mine if not all(exists[job] for job in batch)]
    generator = ImageGenerator(args, state.device) if missing else None
    quiet = not state.is_main_process or not missing
    with tqdm(total=sum(map(len, missing)), unit="image", disable=quiet, desc="images") as bar:
        for batch in missing:
            generator.use(batch[0].model)
            images = generator.generate([job.prompt for job in batch], [job.seed for job in batch])
            for job, image in zip(batch, images):
                job.path.parent.mkdir(parents=True, exist_ok=True)
                if not exists[job]:
                    write_image(job.path, image)
            bar.update(len(batch))
    collect_files(state, [job.path for job in jobs])


# -----------------------------------------------------------------------------
# 4 Scores: images → embeddings → scores
# -----------------------------------------------------------------------------


class Clip:
    """An open_clip model for images and texts. Raises InputError naming `flag` if the model does not load."""

    def __init__(self, name, device, flag="--clip_model"):
        architecture = name
        weights = None
        if ":" not in name:
            architecture, _, weights = name.partition("/")
        try:
            model, _, self.preprocess = open_clip.create_model_and_transforms(architecture, pretrained=weights or None)
            self.tokenizer = open_clip.get_tokenizer(architecture)
        except Exception as error:  # no weights in the cache and no network, an unknown name, a damaged file
            reason = short_reason(error, 200)
            raise InputError(f"{flag}: cannot load {name}: {reason}; give a local-dir:FOLDER, or go online") from error
        self.model = model.eval().to(device)
        self.device = device

    @torch.no_grad()
    def embed_images(self, images):
        """Returns the CLIP embeddings of n PIL images as unit vectors, (n, D) float32."""
        pixels = torch.stack([self.preprocess(image.convert("RGB")) for image in images])
        return self.model.encode_image(pixels.to(self.device), normalize=True).float().cpu().numpy()

    @torch.no_grad()
    def embed_texts(self, texts):
        """Returns the CLIP embeddings of n texts as unit vectors, (n, D) float32."""
        tokens = self.tokenizer(list(texts)).to(self.device)
        return self.model.encode_text(tokens, normalize=True).float().cpu().numpy()


def load_head_layers(path):
    """Returns (weight, bias) of each layer of an aesthetic head. Does not run code from the file.

    Raises InputError if the file does not load.
    """
    try:
        if str(path).startswith("http"):
            tensors = torch.hub.load_state_dict_from_url(str(path), map_location="cpu", weights_only=True)
        elif str(path).endswith(".safetensors"):
            tensors = safetensors.torch.load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        names = [name for name in tensors if name.endswith("weight")]
        names.sort(key=lambda name: [int(number) for number in re.findall(r"\d+", name)])  # layer 10 after layer 2
        return [(tensors[name].float(), tensors[name.removesuffix("weight") + "bias"].float()) for name in names]
    except Exception as error:  # no network, a damaged file, something else than tensors by name
        reason = short_reason(error, 200)
        message = f"--aesthetic_head: cannot load {path}: {reason}; give a file in LAION's format, or none"
        raise InputError(message) from error


def score_aesthetic(path, embeddings):
    """Returns LAION's aesthetic scores (n,), about 1 to 10, for CLIP embeddings that are unit vectors (n, D).

    The head is linear, or an MLP without activations (github.com/christophschuhmann/improved-aesthetic-predictor).
    Raises InputError if the file does not load or its layers do not map D inputs to one output.
    """
    layers = load_head_layers(path)
    width = embeddings.shape[1]
    widths = [width, *(len(bias) for _, bias in layers)]
    fitting = [(after, before) for before, after in zip(widths, widths[1:])]
    if not layers or widths[-1] != 1 or [tuple(weight.shape) for weight, _ in layers] != fitting:
        found = " → ".join(f"{weight.shape[1]}×{weight.shape[0]}" for weight, _ in layers) or "no layers"
        raise InputError(f"--aesthetic_head: {path} has {found}; expected {width} inputs and 1 output")
    values = torch.from_numpy(embeddings).float()
    for weight, bias in layers:
        values = values @ weight.T + bias
    return values[:, 0].numpy()


def embed_files(state, clip_name, flag, paths):
    """Returns the CLIP embeddings of n image files, (n, D), in the main process, and None in the others.

    The processes share the work. Each embedding is saved beside its image.
    """
    saved = [path.with_suffix(f".{short_hash(clip_name)}.npy") for path in paths]
    places = find_files(paths)
    missing = [i for i, ranks in enumerate(find_files(saved)) if not ranks]
    mine = [i for n, i in enumerate(missing) if places[i][n % len(places[i])] == state.process_index]
    clip = Clip(clip_name, state.device, flag) if mine else None
    quiet = not state.is_main_process or not mine
    for start in tqdm(range(0, len(mine), EMBEDDING_BATCH), desc=clip_name[:30], unit="batch", disable=quiet):
        batch = mine[start : start + EMBEDDING_BATCH]
        embeddings = clip.embed_images([Image.open(paths[i]) for i in batch])
        for i, embedding in zip(batch, embeddings):
            encoded = io.BytesIO()
            np.save(encoded, embedding)
            sdxl_data.write_file(saved[i], encoded.getvalue())
    collect_files(state, saved)
    return np.stack([np.load(file) for file in saved]) if state.is_main_process else None


# Seam: the score. Contract: {name: (n,) array} with "adherence" and "score"; higher is better.
def score_images(embeddings, prompts, clip, aesthetic=None, weights=(0.6, 0.4)):
    """Returns a dict of arrays (n,): "adherence", "score" and, if given, "aesthetic".

    `embeddings` (n, D) are the images' CLIP embeddings. `aesthetic` (n,) are the aesthetic head's scores. Adherence is
    the cosine similarity of an image and its clip_prompt. The score is weights[0] · adherence + weights[1] · aesthetic
    / 10, or just the adherence without `aesthetic`.
    """
    texts = list(dict.fromkeys(prompt.clip_prompt for prompt in prompts))
    of_text = dict(zip(texts, clip.embed_texts(texts)))
    adherence = np.sum(embeddings * np.stack([of_text[prompt.clip_prompt] for prompt in prompts]), axis=1)
    if aesthetic is None:
        return {"adherence": adherence, "score": adherence}
    score = weights[0] * adherence + weights[1] * aesthetic / 10
    return {"adherence": adherence, "aesthetic": aesthetic, "score": score}


def name_classes(embeddings, classes, clip, template="{}"):
    """Returns the index of the class that CLIP finds most similar to each image, (n,)."""
    return (embeddings @ clip.embed_texts([template.format(name) for name in classes]).T).argmax(axis=1)


def diversity_of(embeddings):
    """Returns the mean cosine distance between the images of a prompt. Returns NaN for a single image."""
    if len(embeddings) < 2:
        return math.nan
    pairs = np.triu_indices(len(embeddings), 1)
    return float(1 - (embeddings @ embeddings.T)[pairs].mean())


# ---- copies of training images


def make_thumbnails(image):
    """Returns thumbnails of the start, middle and end of an image's long side, as unit vectors (3, F).

    Each has its own mean subtracted, so the dot product of two thumbnails is their correlation. Unlike CLIP, the
    correlation distinguishes a copy from another image of the same subject. It misses differently cropped copies.
    """
    side = min(image.size)
    image = image.convert("RGB")
    pixels = []
    for share in (0, 0.5, 1):
        left, top = (round(share * (length - side)) for length in image.size)
        window = (left, top, left + side, top + side)
        small = image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX, window)
        pixels.append(np.asarray(small, dtype=np.float32))
    pixels = np.stack(pixels)  # (3, THUMBNAIL, THUMBNAIL, 3)
    pixels = (pixels - pixels.mean(axis=(1, 2), keepdims=True)).reshape(3, -1)
    return pixels / np.maximum(np.linalg.norm(pixels, axis=1, keepdims=True), 1e-6)


def mirror_thumbnails(thumbnails):
    """Returns the thumbnails (…, F) that the mirrored images would have."""
    shape = (*thumbnails.shape[:-1], THUMBNAIL, THUMBNAIL, 3)
    return thumbnails.reshape(shape)[..., ::-1, :].reshape(thumbnails.shape)


@dataclass
class Reference:
    """All images of a source, training or held-out. `places` says where the file of each image is stored."""

    names: list
    places: list
    embeddings: np.ndarray  # (n, D)
    thumbnails: np.ndarray  # (n, 3, F) float16
    ids: list = ()  # image ids

    def select(self, chosen):
        """Returns the Reference of the images for which `chosen` (n,) is true."""
        names, places, ids = ([x for x, keep in zip(xs, chosen) if keep] for xs in (self.names, self.places, self.ids))
        return Reference(names, places, self.embeddings[chosen], self.thumbnails[chosen], ids)


def embed_samples(samples, clip, quiet):
    """Returns (name, id, place, embedding, thumbnails) for each image in `samples`. Skips damaged images."""
    found = []
    for start in tqdm(range(0, len(samples), EMBEDDING_BATCH), desc="training images", unit="batch", disable=quiet):
        rows = []
        images = []
        for shard, row in samples[start : start + EMBEDDING_BATCH]:
            try:
                images.append(sdxl_data.open_image(shard.read(row["offset"], row["size"]))[0])
                rows.append(row)
            except ValueError:  # damaged: the trainer does not train on it either
                continue
        embeddings = clip.embed_images(images) if images else []
        for row, image, embedding in zip(rows, images, embeddings):
            name = row["key"] if row["path"].endswith(row["key"]) else f"{Path(row['path']).name} {row['key']}"
            place = (row["path"], row["offset"], row["size"])
            found.append((name, row["image_id"], place, embedding, make_thumbnails(image).astype(np.float16)))
    return found


def write_reference(path, found):
    names, ids, places, embeddings, thumbnails = zip(*found)
    arrays = {"embeddings": np.stack(embeddings), "thumbnails": np.stack(thumbnails)}
    encoded = io.BytesIO()
    np.savez(encoded, names=np.array(names), ids=np.array(ids), places=json.dumps(places), **arrays)
    sdxl_data.write_file(path, encoded.getvalue())


def open_source(args, flag):
    """Returns the stamps of the files that `flag` names, and a function that lists their images.

    A stamp changes with its file. The function returns a list of (Shard, index row), one for each image.
    """
    cache_dir = args.cache_dir or args.output_dir
    if flag == "train_data_dir":
        excluded = [os.path.realpath(path) for path in (args.output_dir, args.images_dir, args.cache_dir) if path]
        fields = sdxl_data.Fields(instance_prompt="any")  # captions do not matter here
        rows, _, stamps = sdxl_data.index_folders(args.train_data_dir, fields, excluded)
        return sorted(stamps.items()), lambda: [(sdxl_data.Shard(row["path"], cache_dir), row) for row in rows]
    shards = [sdxl_data.Shard(path, cache_dir) for path in sdxl_data.expand_shards(getattr(args, flag))]
    return [(shard.path, shard.stamp) for shard in shards], lambda: [
        (shard, row) for shard in shards for row in sdxl_data.index_shard(shard, sdxl_data.Fields())[0]
    ]


def embed_source(state, args, flag):
    """In the main process, returns a Reference of the usable images that `flag` names; in the others, None.

    Reads it from --output_dir if it was saved there. Otherwise the processes share the work. Raises InputError if no
    image is usable.
    """
    stamps, list_samples = open_source(args, flag)
    cached = Path(args.output_dir) / f"reference-{short_hash(args.clip_model, THUMBNAIL, stamps)}.npz"
    # One answer for all processes: a network disk may show them the file at different times, or each has its own disk.
    if not broadcast_object_list([cached.exists()])[0]:
        mine = list_samples()[state.process_index :: state.num_processes]
        found = embed_samples(mine, Clip(args.clip_model, state.device), quiet=not state.is_main_process)
        found = sorted(gather_object(found), key=lambda item: item[2])
        if not found:
            raise InputError(f"--{flag}: no usable image in {' '.join(getattr(args, flag))}")
        if state.is_main_process:
            write_reference(cached, found)
    if not state.is_main_process:
        return None
    with np.load(cached) as data:
        places = json.loads(str(data["places"]))
        names, ids = data["names"].tolist(), data["ids"].tolist()
        return Reference(names, places, data["embeddings"], data["thumbnails"], ids)


def embed_training_images(state, args):
    """Returns two References, of the training images and of the held-out images.

    Both are None if no flag names training images, and in other processes than the main one.
    """
    if not args.train_shards and not args.train_data_dir:
        return None, None
    reference = embed_source(state, args, "train_shards" if args.train_shards else "train_data_dir")
    if args.val_fraction and reference is not None:
        held_out = sdxl_data.is_held_out(reference.ids, args.val_fraction)
        if held_out.all():
            raise InputError(f"--val_fraction: {args.val_fraction} of {len(held_out)} images leaves no training image")
        return reference.select(~held_out), reference.select(held_out)
    return reference, embed_source(state, args, "val_shards") if args.val_shards else reference


def find_nearest(vectors, reference, itself=False):
    """Finds the most similar image in `reference` for each of n images. Returns similarities and indices, (n,) each.

    Both inputs have the shape (images, views, F). Two images are as similar as their two most similar views. Set
    `itself` if both inputs are the same images: then no image is matched to itself.
    """
    views = reference.astype(np.float32).reshape(-1, reference.shape[-1])
    similarities = []
    indices = []
    for start in range(0, len(vectors), EMBEDDING_BATCH):
        chunk = vectors[start : start + EMBEDDING_BATCH].astype(np.float32)
        similarity = (chunk @ views.T).reshape(len(chunk), chunk.shape[1], len(reference), -1).max(axis=(1, 3))
        if itself:
            similarity[np.arange(len(chunk)), np.arange(start, start + len(chunk))] = -1
        similarities.append(similarity.max(axis=1))
        indices.append(similarity.argmax(axis=1))
    return np.concatenate(similarities), np.concatenate(indices)


def compare_with_training(embeddings, thumbnails, reference, itself=False):
    """Compares n images with all images in `reference`. Returns a dict of three arrays, (n,) each.

    "nearest_similarity" is the highest CLIP similarity. "copy_similarity" is the highest correlation of thumbnails,
    mirrored ones included. "nearest" is the index of the reference image that gave "copy_similarity".
    """
    similar, _ = find_nearest(embeddings[:, None], reference.embeddings[:, None], itself)
    both = np.stack([thumbnails, mirror_thumbnails(thumbnails)], axis=1)
    correlation, nearest = find_nearest(both, reference.thumbnails, itself)
    return {"nearest_similarity": similar, "copy_similarity": correlation, "nearest": nearest}


def describe_held_out(held_out, reference):
    """Returns how similar held-out images are to training images, and the limit above which an image counts as a copy.

    If there are no held-out images, the caller passes `reference` as `held_out` too. The training images are then
    compared with each other.
    """
    middles = held_out.thumbnails[:, 1]
    found = compare_with_training(held_out.embeddings, middles, reference, itself=held_out is reference)
    return {
        "nearest_similarity": float(found["nearest_similarity"].mean()),
        "copy_similarity": float(found["copy_similarity"].mean()),
        "images": len(middles),
        "copy_limit": float(np.quantile(found["copy_similarity"], COPY_QUANTILE)),
    }


@dataclass
class Scores:
    """The results for the images of all jobs."""

    rows: list  # what per_image.csv holds
    embeddings: np.ndarray  # (models, prompts, seeds, D)
    reference: Reference | None  # training images
    held_out: dict  # from describe_held_out; empty without training images


def list_classes(prompts):
    return sorted({prompt.class_name for prompt in prompts if prompt.class_name})


def add_classes(rows, named):
    """Adds "named", the class that CLIP sees, and "right", whether that is the prompt's class, to each row.

    Both are None if the prompt has no class.
    """
    for row, name in zip(rows, named):
        row["named"] = name if row["class"] else None
        row["right"] = name == row["class"] if row["class"] else None


def add_copies(rows, found, reference, limit):
    """Stores in each image's row how similar it is to the training images.

    Also adds "copy", which is true if "copy_similarity" is above `limit`.
    """
    is_copy = found["copy_similarity"] > limit
    for index, row in enumerate(rows):
        row["nearest_similarity"] = float(found["nearest_similarity"][index])
        row["copy_similarity"] = float(found["copy_similarity"][index])
        row["nearest"] = reference.names[found["nearest"][index]]
        row["copy"] = bool(is_copy[index])


def score_all(args, state, models, prompts, jobs):
    """Scores the images of all jobs. Returns Scores in the main process, None in the others."""
    paths = [job.path for job in jobs]
    embeddings = embed_files(state, args.clip_model, "--clip_model", paths)
    aesthetic = None
    if args.aesthetic_head != "none":
        features = embed_files(state, args.aesthetic_clip_model, "--aesthetic_clip_model", paths)
        aesthetic = trainer.run_on_main(state, lambda: score_aesthetic(args.aesthetic_head, features))
    reference, others = embed_training_images(state, args)
    if not state.is_main_process:
        return None

    clip = Clip(args.clip_model, state.device)
    scores = score_images(embeddings, [job.prompt for job in jobs], clip, aesthetic, args.score_weights)
    rows = []
    for index, job in enumerate(jobs):
        prompt = job.prompt
        row = {"model": job.model.name, "prompt_id": prompt.id, "prompt": prompt.prompt, "seed": job.seed}
        row |= {"class": prompt.class_name, "tags": ", ".join(prompt.tags)}
        rows.append(row | {name: float(values[index]) for name, values in scores.items()})
    classes = list_classes(prompts)
    if len(classes) > 1:
        add_classes(rows, [classes[i] for i in name_classes(embeddings, classes, clip, args.class_prompt)])
    held_out = {}
    if reference is not None:
        held_out = describe_held_out(others, reference)
        thumbnails = np.stack([make_thumbnails(Image.open(path))[1] for path in paths])
        found = compare_with_training(embeddings, thumbnails, reference)
        add_copies(rows, found, reference, held_out["copy_limit"])
    for job, row in zip(jobs, rows):
        row["file"] = os.path.relpath(job.path, args.output_dir)
    shape = (len(models), len(prompts), len(args.seeds), -1)
    return Scores(rows, embeddings.reshape(shape), reference, held_out)


# -----------------------------------------------------------------------------
# 5 Statistics
# -----------------------------------------------------------------------------


def bootstrap(values, groups):
    """Returns the mean of `values` and its 95 % bootstrap interval.

    Resamples whole prompts, keeping all images of a prompt together.
    """
    values = np.asarray(values, dtype=np.float64)
    names, codes = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.bincount(codes, weights=values)
    counts = np.bincount(codes)
    picks = np.random.default_rng(0).integers(len(names), size=(BOOTSTRAP_SAMPLES, len(names)))
    means = sums[picks].sum(axis=1) / counts[picks].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high), "count": len(values)}


METRICS = {
    "adherence": "CLIP adherence",
    "aesthetic": "aesthetic",
    "score": "score",
    "right": "class named right",
    "nearest_similarity": "CLIP similarity to the nearest training image",
    "copy_similarity": "correlation with the nearest training image",
    "copy": "copies",
}


def summarise(models, rows):
    """Returns {model name: {metric: mean and interval}}. "vs_base" has the differences from the base model."""
    of_base = {(row["prompt_id"], row["seed"]): row for row in rows if row["model"] == models[0].name}
    summary = {}
    for model in models:
        entry = {"vs_base": {}}
        if model.step is not None:
            entry["step"] = model.step
        for metric in METRICS:
            own = [row for row in rows if row["model"] == model.name and row.get(metric) is not None]
            if not own:
                continue
            groups = [row["prompt_id"] for row in own]
            values = [float(row[metric]) for row in own]
            entry[metric] = bootstrap(values, groups)
            if model is not models[0]:
                paired = [float(of_base[row["prompt_id"], row["seed"]][metric]) for row in own]
                entry["vs_base"][metric] = bootstrap(np.subtract(values, paired), groups)
        summary[model.name] = entry
    return summary


def add_diversity(summary, prompts, embeddings):
    """Adds "diversity" to each model: the mean distance between images of a prompt. Needs two or more seeds."""
    ids = [prompt.id for prompt in prompts]
    values = [[diversity_of(images) for images in of_model] for of_model in embeddings]
    if any(map(math.isnan, values[0])):  # there is one seed only
        return
    for index, entry in enumerate(summary.values()):
        entry["diversity"] = bootstrap(values[index], ids)
        if index > 0:
            entry["vs_base"]["diversity"] = bootstrap(np.subtract(values[index], values[0]), ids)


def versions():
    packages = ["torch", "diffusers", "transformers", "peft", "open_clip_torch"]
    return {"python": sys.version.split()[0]} | {name: importlib.metadata.version(name) for name in packages}


def make_metrics(args, models, prompts, scores):
    """Returns the content of metrics.json."""
    summary = summarise(models, scores.rows)
    add_diversity(summary, prompts, scores.embeddings)
    for entry in summary.values():
        if "copy" in entry:
            entry["flagged"] = entry["copy"]["low"] > COPY_SHARE
    by_tag = {}
    for tag in dict.fromkeys(tag for prompt in prompts for tag in prompt.tags):
        by_tag[tag] = summarise(models, [row for row in scores.rows if tag in row["tags"].split(", ")])
    by_class = {}
    for name in list_classes(prompts):
        by_class[name] = summarise(models, [row for row in scores.rows if row["class"] == name])
    return {
        "models": summary,
        "by_tag": by_tag,
        "by_class": by_class,
        "held_out": scores.held_out,
        "settings": {name: value for name, value in vars(args).items() if name != "config"},
        "versions": versions(),
    }


# -----------------------------------------------------------------------------
# 6 Report
# -----------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --line: #8884; --accent: light-dark(#086, #4d9); --bad: light-dark(#b30, #f85) }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem }
h1 { font-size: 1.6rem; line-height: 1.2 }
h2 { font-size: 1.3rem; line-height: 1.2; margin: 2.5rem 0 .8rem }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem }
small, .unsure { opacity: .75 }
summary { cursor: pointer }
meter { width: 8rem }
pre { overflow-x: auto; padding: .6rem; border: 1px solid var(--line) }
.sure { color: var(--accent); font-weight: 600 }
.flag { color: var(--bad); display: block }

/* tables; .means: an interval below its mean */
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .3rem .8rem .3rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top }
tr:first-child th { vertical-align: bottom }
td small { white-space: nowrap }
.means small { display: block }
.means th:first-child { min-width: 7rem }

/* grids: figures, sections of the best, images in a row, pairs of images */
.plots, .best, .pairs { display: grid; gap: 1rem 2rem }
.plots, .best, .pairs { grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)) }
.best h3 { margin: 0 }
.row { display: grid; gap: .6rem; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); margin-bottom: .6rem }
.pairs .row { grid-template-columns: 1fr 1fr }

figure { margin: 0 }
figcaption { font-size: .8rem; line-height: 1.35; overflow-wrap: anywhere }
img { max-width: 100%; border-radius: 4px }
.row a:first-child { display: block; aspect-ratio: 1 }
.row img { display: block; width: 100%; aspect-ratio: 1; object-fit: cover }
.plot { display: block; width: 100%; max-width: 36rem; fill: currentColor; stroke-linejoin: round }
.plot text { font-family: inherit !important }

/* <figure id=x><a href=#x><img></a><a class=close href=#_></a></figure>: large while the address ends in #x */
figure[id] { scroll-margin-top: 40vh }
.close { display: none }
:target > .close { display: block; position: fixed; inset: 0; background: #000d; z-index: 1; cursor: zoom-out }
:target > a > img { position: fixed; inset: 0; margin: auto; z-index: 2; pointer-events: none; max-width: none }
:target > a > img { width: 94vw; height: 94vh; height: 94dvh; aspect-ratio: auto; object-fit: contain }
"""

LAYOUT = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
{% include "body" %}
</body>
</html>
"""

# matplotlib's black, white and first colour become colours that follow the reader's light or dark mode.
SVG_COLOURS = {"#000000": "currentColor", "#ffffff": "Canvas", "#1f77b4": "var(--accent)"}


def render_page(body, title, **values):
    """Returns an HTML page. `body` is a Jinja2 template that uses `title` and `values`.

    Escapes values that are not Markup. Raises jinja2.UndefinedError if the template uses a name without a value.
    """
    environment = jinja2.Environment(
        loader=jinja2.DictLoader({"layout": LAYOUT, "body": body}),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("layout").render(title=title, style=Markup(STYLE), **values)


def figure_svg(figure, label):
    """Returns a matplotlib Figure as inline SVG that fills the available width. `label` is for screen readers."""
    encoded = io.StringIO()
    # No date and a fixed salt: equal figures give equal text. Text stays text, so that fonts come from the page.
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(encoded, format="svg", transparent=True, metadata=metadata)
    source = encoded.getvalue()
    view_box = re.search(r'viewBox="([^"]+)"', source)[1]
    # What comes before </defs> is a style that would apply to the rest of the page.
    content = source.partition("</defs>")[2].rpartition("</svg>")[0]
    # Figures call their parts axes_1, text_1 and so on, but the ids of a page must differ.
    prefix = f"svg-{hashlib.sha256((label + source).encode()).hexdigest()[:12]}-"

    def adapt(tag):
        text = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{prefix}", tag[0])
        return re.sub("#[0-9a-f]{6}", lambda colour: SVG_COLOURS.get(colour[0], colour[0]), text)

    root = Markup('<svg class="plot" role="img" aria-label="{}" viewBox="{}">').format(label, view_box)
    return root + Markup(re.sub("<[^>]*>", adapt, content)) + Markup("</svg>")


def data_uri(image, side=None):
    """Returns an image as a data URI, scaled down to at most `side` px if that is given."""
    image = image.convert("RGB")
    if side:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    kind = "png" if max(image.size) <= 128 else "webp"
    encoded = io.BytesIO()
    image.save(encoded, kind, quality=88)
    return f"data:image/{kind};base64," + base64.b64encode(encoded.getvalue()).decode()


REPORT = """
{% macro image(id, row, caption="") %}
<figure id="{{ id }}">
<a href="#{{ id }}"><img src="{{ uris[row.file] }}" alt="{{ row.model }}: {{ row.prompt }}, seed {{ row.seed }}"></a>
<a class="close" href="#_" aria-label="Close"></a>
<figcaption><b>{{ row.model }}</b>{{ caption }}<br>adherence {{ "%.3f" % row.adherence }}
{%- if row.get("aesthetic") is not none %}, aesthetic {{ "%.2f" % row.aesthetic }}{% endif %}
{%- if row.get("named") and not row.right %}, named {{ row.named }}{% endif %}</figcaption>
</figure>
{% endmacro %}
{% macro images(name, rows, with_prompt=False) %}
<div class="row">
{% for row in rows %}{{ image(name ~ loop.index, row, " " ~ row.prompt if with_prompt else "") }}{% endfor %}
</div>
{% endmacro %}
<h1>{{ title }}</h1>
<p>Means with 95 % intervals over prompts. Below them: the paired difference from the base model with the same noise,
in colour if its interval excludes 0. Click an image to enlarge it.</p>
<div class="scroll means"><table>
<tr><th>model</th>{% for label in labels.values() %}<th>{{ label }}</th>{% endfor %}</tr>
{% for name, entry in metrics.models.items() %}
<tr><th>{{ name }}{% if entry.get("flagged") %} <strong class="flag">copies training images</strong>{% endif %}</th>
{% for metric in labels %}{% set change = entry.vs_base.get(metric) %}
<td>{{ interval(entry[metric], metric) if metric in entry else "–" }}
{% if change %}<span class="{{ "sure" if change.low > 0 or change.high < 0 else "unsure" }}">
{{ interval(change, metric, signed=True) }}</span>{% endif %}</td>
{% endfor %}</tr>
{% endfor %}
</table></div>
{% if plots %}<h2>Checkpoints</h2>{% endif %}
<div class="plots">
{% for label, svg in plots.items() %}<figure><figcaption>{{ label }}</figcaption>{{ svg }}</figure>{% endfor %}
</div>
<h2>Images</h2>
{% for prompt in prompts %}
{% set own = rows | selectattr("prompt_id", "equalto", prompt.id) | sort(attribute="seed") %}
{% set first_seeds = [1, 8 // models | length] | max %}
{% set count = first_seeds * models | length %}
<h3>{{ prompt.prompt }}</h3>
{{ images("image-%d-" % loop.index, own[:count]) }}
{% if own | length > count %}
<details><summary>other seeds</summary>{{ images("more-%d-" % loop.index, own[count:]) }}</details>
{% endif %}
{% endfor %}
{% for kind, groups in (("tag", metrics.by_tag), ("class", metrics.by_class)) if groups %}
<h2>By {{ kind }}</h2>
<p>Species named right, and CLIP adherence.</p>
<div class="scroll"><table>
<tr><th></th>{% for name in metrics.models %}<th>{{ name }}</th>{% endfor %}</tr>
{% for group, entries in groups.items() %}
<tr><th>{{ group }}</th>{% for entry in entries.values() %}<td>
{% for metric in ("right", "adherence") if metric in entry %}{{ interval(entry[metric], metric) }}<br>{% endfor %}
</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% endfor %}
{% for name, rows in (("Best", best), ("Worst", worst)) %}
<h2>{{ name }} scores</h2>
{{ images(name ~ "-", rows, with_prompt=True) }}
{% endfor %}
{% if copies %}
<h2>Most similar to a training image</h2>
<p>Similarity is the correlation of thumbnails of {{ thumbnail }} × {{ thumbnail }} px, also mirrored.
{{ held_out.images }} held-out images reach {{ "%.3f" % held_out.copy_similarity }} with their nearest training image
on average, {{ quantile }} % of them less than {{ "%.3f" % held_out.copy_limit }}: an image above counts as a copy.
Their CLIP similarity is {{ "%.3f" % held_out.nearest_similarity }}.</p>
<div class="pairs">
{% for row, training in copies %}<div class="row">
{{ image("copy-%d" % loop.index, row, ", correlation %.3f" % row.copy_similarity) }}
<figure><img src="{{ training }}" alt=""><figcaption>training image {{ row.nearest[:60] }}</figcaption></figure>
</div>{% endfor %}
</div>
{% endif %}
<h2>How this was made</h2>
<pre>{{ command }}</pre>
<p><small>{% for name, version in metrics.versions.items() %}{{ name }} {{ version }} {% endfor %}</small></p>
"""


def format_interval(interval, metric, signed=False):
    """Returns a mean and its interval as Markup. The metrics `right` and `copy` are shown in percent."""
    is_share = metric in ("right", "copy")
    scale = 100 if is_share else 1
    unit = " %" if is_share else ""
    form = ("+" if signed else "") + (".1f" if is_share else ".3f")
    mean, low, high = (format(scale * interval[key], form) for key in ("mean", "low", "high"))
    return Markup("{}{} <small>{} to {}</small>").format(mean, unit, low, high)


def plot_over_steps(models, summary, metric):
    """Plots a metric over the checkpoints' steps, with its 95 % interval, and the base model as a dashed line."""
    steps = [model.step for model in models if model.step is not None]
    entries = [summary[model.name][metric] for model in models if model.step is not None]
    mean, low, high = ([entry[key] for entry in entries] for key in ("mean", "low", "high"))
    figure = Figure(figsize=(5, 2.8), layout="constrained")
    axes = figure.subplots()
    axes.fill_between(steps, low, high, alpha=0.2, linewidth=0)
    axes.vlines(steps, low, high, linewidth=1)
    axes.plot(steps, mean, marker="o", label="mean, 95 % interval")
    axes.axhline(summary[models[0].name][metric]["mean"], color="tab:gray", linestyle="--", label="base model")
    if metric == "right":
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend()
    return figure


def first_of_each(rows, group_of, count):
    """Returns the first row of each group, but at most `count` rows."""
    groups = {}
    for row in rows:
        groups.setdefault(group_of(row), row)
    return list(groups.values())[:count]


def find_copies(args, rows, reference, count=8):
    """Returns (row, training image as a data URI) for the most similar pairs. Shows each training image only once."""
    ranked = sorted(rows, key=lambda row: -row["copy_similarity"])
    copies = []
    for row in first_of_each(ranked, lambda row: row["nearest"], count):
        path, offset, size = reference.places[reference.names.index(row["nearest"])]
        shard = sdxl_data.Shard(path, args.cache_dir or args.output_dir)
        copies.append((row, data_uri(sdxl_data.open_image(shard.read(offset, size))[0], 320)))
    return copies


def write_report(args, models, prompts, scores, metrics, argv):
    """Writes report.html."""
    summary = metrics["models"]
    shown = [*METRICS, "diversity"]
    labels = {metric: METRICS.get(metric, metric) for metric in shown if metric in summary[models[0].name]}
    plots = {}
    for metric in ("score", "right"):
        if metric in labels and any(model.step is not None for model in models):
            label = f"{METRICS[metric]} over steps"
            plots[label] = figure_svg(plot_over_steps(models, summary, metric), label)
    with_lora = [row for row in scores.rows if row["model"] != models[0].name] or scores.rows
    ranked = sorted(with_lora, key=lambda row: row["score"])
    page = render_page(
        REPORT,
        f"{len(models)} models, {len(prompts)} prompts, {len(args.seeds)} seeds",
        metrics=metrics,
        labels=labels,
        interval=format_interval,
        plots=plots,
        models=models,
        prompts=prompts,
        rows=scores.rows,
        uris={row["file"]: data_uri(Image.open(Path(args.output_dir) / row["file"]), 768) for row in scores.rows},
        best=first_of_each(reversed(ranked), lambda row: (row["model"], row["prompt_id"]), 8),
        worst=first_of_each(ranked, lambda row: (row["model"], row["prompt_id"]), 8),
        copies=find_copies(args, with_lora, scores.reference) if scores.reference is not None else [],
        held_out=scores.held_out,
        thumbnail=THUMBNAIL,
        quantile=f"{100 * COPY_QUANTILE:g}",
        command=shlex.join(["evaluate.py", *argv]),
    )
    sdxl_data.write_file(Path(args.output_dir) / "report.html", page.encode())


def write_grid(args, models, prompts, jobs):
    """Writes grid.png: the images of the first seed, with a row for each prompt and a column for each model."""
    paths = {(job.model, job.prompt): job.path for job in jobs if job.seed == args.seeds[0]}
    side = min(args.resolution, 256)
    tiles = []
    for prompt, model in itertools.product(prompts, models):
        image = Image.open(paths[model, prompt]).convert("RGB")
        tiles.append(np.asarray(image.resize((side, side), Image.Resampling.LANCZOS)))
    texts = [prompt.prompt for prompt in prompts for _ in models]
    write_image(Path(args.output_dir) / "grid.png", trainer.draw_grid(np.stack(tiles), texts, len(models)))


def write_csv(args, rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    sdxl_data.write_file(Path(args.output_dir) / "per_image.csv", text.getvalue().encode())


def report_to_wandb(args, rows, summary):
    import wandb

    run = wandb.init(project="train_sdxl_lora", job_type="evaluate", config=vars(args), dir=args.output_dir)
    columns = [name for name in rows[0] if name != "file"]
    table = wandb.Table(columns=["picture", *columns])
    for row in rows:
        table.add_data(wandb.Image(str(Path(args.output_dir) / row["file"])), *(row[name] for name in columns))
    means = {f"{model}/{m}": entry[m]["mean"] for model, entry in summary.items() for m in METRICS if m in entry}
    run.log({"pictures": table, **means})
    run.finish()


# -----------------------------------------------------------------------------
# 7 Main
# -----------------------------------------------------------------------------


def set_up_logging(is_main_process):
    """Sets the log level to INFO in the main process. Other processes and the libraries log only errors."""
    logger.handlers = [logging.StreamHandler()]
    logger.propagate = False
    logger.setLevel(logging.INFO if is_main_process else logging.ERROR)
    for library in (transformers.utils.logging, diffusers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def log_summary(summary):
    for name, entry in summary.items():
        means = ", ".join(
            f"{label} {entry[metric]['mean']:.3f}" for metric, label in METRICS.items() if metric in entry
        )
        logger.info("%-20s %s%s", name, means, "; copies training images" if entry.get("flagged") else "")


def main(argv=None):
    """Generates the images, scores them and writes the report. Returns the metrics, or {} in the other processes."""
    argv = sys.argv[1:] if argv is None else list(map(str, argv))
    args = parse_args(argv)
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=trainer.GROUP_TIMEOUT)])
    trainer.check_world(accelerator)
    state = accelerator.state
    set_up_logging(state.is_main_process)
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    models = list_models(args)
    args = choose_resolution(args, models)
    prompts = read_prompts(args.prompts)
    jobs = list_jobs(args, models, prompts)

    generate_images(args, state, jobs)
    scores = score_all(args, state, models, prompts, jobs)
    if not state.is_main_process:
        return {}
    metrics = make_metrics(args, models, prompts, scores)
    write_csv(args, scores.rows)
    write_grid(args, models, prompts, jobs)
    write_report(args, models, prompts, scores, metrics, argv)
    sdxl_data.write_file(output_dir / "metrics.json", (json.dumps(metrics, indent=1) + "\n").encode())
    if args.report_to == "wandb":
        report_to_wandb(args, scores.rows, metrics["models"])
    log_summary(metrics["models"])
    logger.info("see %s", output_dir / "report.html")
    return metrics


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(1)
