#!/usr/bin/env python
"""Score LoRA adapters for Stable Diffusion XL: the same pictures with and without each, judged by CLIP.

    python evaluate.py --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \\
        --lora runs/a runs/b --train_shards data/train --val_shards data/val --output_dir eval

    accelerate launch --num_processes 8 evaluate.py ...     # N GPUs share the pictures
    python evaluate.py --checkpoints runs/a ...             # every checkpoint of a run, as a curve

Read OUTPUT_DIR/report.html. The same command again goes on where an evaluation was interrupted: pictures and their
embeddings are kept as they are made.

The rooms of this file, in the order data flows:
     1 Arguments    2 Panel    3 Pictures    4 Judges    5 Statistics    6 Report    7 Main
"""

import base64
import csv
import functools
import hashlib
import html
import importlib.metadata
import io
import json
import logging
import math
import os
import re
import shlex
import string
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on import it asks for a package that nobody needs here

import diffusers
import jinja2
import matplotlib
import numpy as np
import open_clip
import safetensors.torch
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from markupsafe import Markup
from PIL import Image
from tqdm.auto import tqdm

import train_sdxl_lora as trainer
from train_sdxl_lora import InputError

AESTHETIC_HEAD = (
    "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth"
)
BOOTSTRAP_SAMPLES = 2000  # resamples of the prompts behind every interval
COPY_QUANTILE = 0.99  # of the held-out images' correlation with their nearest training image: above it is a copy
COPY_SHARE = 0.05  # of a model's pictures above that, at the interval's lower end, flags the model
THUMBNAIL = 16  # side in pixels of what copies are looked for in: where things are and their colours, no detail
EMBEDDING_BATCH = 32  # images; fixed, so that no embedding depends on who computes it

logger = logging.getLogger("evaluate")


# ------------------------------------------------------------------------------
# 1 Arguments
# ------------------------------------------------------------------------------


# fmt: off
def make_parser():
    parser = trainer.Parser(
        usage="%(prog)s --pretrained_model_name_or_path PATH|ID --lora FILE|DIR … --output_dir DIR [--FLAG VALUE]…",
        description="Score LoRA adapters by pictures. The groups below are the rooms of the script.",
        config_file_parser_class=trainer.configargparse.YAMLConfigFileParser,
        formatter_class=lambda prog: trainer.HelpFormatter(prog, max_help_position=34, width=118),
        allow_abbrev=False, add_config_file_help=False, add_env_var_help=False,
    )
    add = parser.add_argument_group("Panel").add_argument
    add("--prompts", metavar="FILE", help="JSONL: `prompt`, and where you have them `id`, `clip_prompt`, `species`, "
        "`tags`; a panel of 16 for PokeFA by default")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3], metavar="N", help="a picture for each, of every prompt")

    add = parser.add_argument_group("Pictures").add_argument
    add("--pretrained_model_name_or_path", required=True, metavar="PATH|ID", help="SDXL snapshot: folder or hub id")
    add("--revision", metavar="REV", help="hub revision of the snapshot")
    add("--variant", metavar="NAME", help="weight file variant of the snapshot, say fp16")
    add("--lora", nargs="+", default=[], metavar="FILE|DIR",
        help="LoRA files of either format, runs or checkpoints; the base model is always shown beside them")
    add("--checkpoints", metavar="DIR", help="every checkpoint of this run")
    add("--lora_scale", type=float, default=1.0, metavar="X", help="strength of every LoRA")
    add("--refiner_unet", metavar="PATH|ID", help="all pictures are finished by this refiner")
    add("--refiner_lora", metavar="FILE|DIR",
        help="LoRA of the refiner, used where a LoRA is, not with the base model")
    add("--denoising_start", type=float, default=0.8, metavar="P", help="share of the steps before the refiner's")
    add("--resolution", type=int, default=1024, metavar="PX", help="side of the pictures")
    add("--num_inference_steps", type=int, default=30, metavar="STEPS", help="denoising steps")
    add("--guidance_scale", type=float, default=7.0, metavar="G", help="classifier-free guidance; 1 is none")
    add("--negative_prompt", metavar="TEXT", help="for all pictures; the pipeline's own by default")
    add("--dtype", choices=["fp32", "bf16", "fp16"], help="precision of the weights; bf16 on a GPU, else fp32")
    add("--batch_size", type=int, default=4, metavar="N", help="pictures made at once")

    add = parser.add_argument_group("Judges").add_argument
    add("--clip_model", default="ViT-H-14/laion2b_s32b_b79k", metavar="NAME",
        help="open_clip model: ARCHITECTURE/WEIGHTS, hf-hub:ID or local-dir:FOLDER")
    add("--species_prompt", default="{}", metavar="TEXT", help="what CLIP reads for a species, {} being its name")
    add("--aesthetic_clip_model", default="ViT-L-14/openai", metavar="NAME", help="what the aesthetic head reads")
    add("--aesthetic_head", default=AESTHETIC_HEAD, metavar="FILE|URL|none",
        help="head in LAION's format, .pth or .safetensors (default: sac+logos+ava1-l14-linearMSE)")
    add("--score_weights", type=float, nargs=2, default=[0.6, 0.4], metavar=("A", "B"),
        help="score = A adherence + B aesthetic / 10")
    add("--train_shards", nargs="+", metavar="TAR", help="training images, to look for copies of them")
    add("--val_shards", nargs="+", metavar="TAR",
        help="held-out images to compare with; each training image with the others by default")

    add = parser.add_argument_group("Run").add_argument
    add("--config", is_config_file=True, metavar="FILE", help="YAML file of any of these flags; the command line wins")
    add("--output_dir", required=True, metavar="DIR", help="pictures, metrics.json, per_image.csv, report.html")
    add("--images_dir", metavar="DIR", help="for the pictures, where several evaluations share the base model's")
    add("--cache_dir", metavar="DIR", help="for downloads and copies of shards")
    add("--report_to", choices=["none", "wandb"], default="none", help="a table of the pictures and the summary")
    return parser
# fmt: on


def parse_args(argv=None):
    """The checked flags, read-only from here on."""
    parser = make_parser()
    args = parser.parse_args(argv)
    for name in ("resolution", "num_inference_steps", "batch_size"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name}: found {getattr(args, name)}; expected a number above 0")
    if args.resolution % 8:
        parser.error(f"--resolution: found {args.resolution}; the VAE works on multiples of 8 px")
    if len(set(args.seeds)) < len(args.seeds) or min(args.seeds) < 0:
        parser.error(f"--seeds: found {' '.join(map(str, args.seeds))}; expected different numbers of 0 or more")
    if "{}" not in args.species_prompt:
        parser.error(f"--species_prompt: found {args.species_prompt!r}; expected {{}} where the name goes")
    if not 0 < args.denoising_start < 1:
        parser.error(f"--denoising_start: found {args.denoising_start}; expected a share between 0 and 1")
    if args.refiner_lora and not args.refiner_unet:
        parser.error("--refiner_lora: found without --refiner_unet; give the refiner too")
    snapshot = Path(args.pretrained_model_name_or_path).expanduser()
    if trainer.looks_like_path(args.pretrained_model_name_or_path) and not snapshot.is_dir():
        parser.error(f"--pretrained_model_name_or_path: no folder {snapshot}; give an SDXL snapshot or a hub id")
    checks = {
        "prompts": lambda: read_panel(args.prompts),
        "lora": lambda: list(map(find_lora, args.lora)),
        "checkpoints": lambda: list_models(args),
        "refiner_lora": lambda: args.refiner_lora and find_lora(args.refiner_lora),
        "train_shards": lambda: trainer.expand_shards(args.train_shards or []),
        "val_shards": lambda: trainer.expand_shards(args.val_shards or []),
    }
    for name, check in checks.items():
        try:
            check()
        except (OSError, ValueError) as error:
            parser.error(f"--{name}: {error}")
    if args.val_shards and not args.train_shards:
        parser.error("--val_shards: found without --train_shards; they are what copies are compared with")
    return args


# ------------------------------------------------------------------------------
# 2 Panel: what is drawn
# ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """A line of the panel. `clip_prompt` is what adherence is measured by; `species` may be None."""

    id: str
    prompt: str
    clip_prompt: str
    species: str | None
    tags: tuple


# Seam: the default panel. Contract: (id, species, tags, prompt); ids differ.
POKEFA_PANEL = [
    ("pikachu-day", "pikachu", "day, single, action", "Pikachu surfing a big wave under a bright midday sun, spray"),
    ("pikachu-night", "pikachu", "night, single", "Pikachu asleep on a mossy roof under a starry night sky"),
    (
        "eevee-painterly",
        "eevee",
        "day, single, painterly",
        "oil painting of Eevee in tall autumn grass, loose brushwork",
    ),
    (
        "umbreon-night",
        "umbreon",
        "night, single, anime",
        "Umbreon on a cliff, rings glowing in moonlight, anime style",
    ),
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


def read_panel(path=None):
    """[Prompt] of a JSONL file, or the default panel. Errors: ValueError naming the line and the field."""
    if path is None:
        return [Prompt(i, text, text, species, tuple(tags.split(", "))) for i, species, tags, text in POKEFA_PANEL]
    panel = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number}: not JSON: {error}") from None
        text = row.get("prompt") if isinstance(row, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{path} line {number}: no field `prompt` with a text")
        fields = {"id": str(row.get("id", f"line-{number}")), "clip_prompt": row.get("clip_prompt") or text}
        species, tags = row.get("species"), row.get("tags") or []
        if not isinstance(fields["clip_prompt"], str) or not isinstance(species, str | None):
            raise ValueError(f"{path} line {number}: `clip_prompt` and `species` are texts")
        tags = tags.split(",") if isinstance(tags, str) else tags
        panel.append(Prompt(prompt=text, species=species, tags=tuple(str(t).strip() for t in tags), **fields))
    if not panel:
        raise ValueError(f"{path} is empty; write one JSON object per line")
    double = [i for i, count in Counter(p.id for p in panel).items() if count > 1]
    if double:
        raise ValueError(f"{path}: the id {double[0]!r} stands twice")
    return panel


# ------------------------------------------------------------------------------
# 3 Pictures: model × prompt × seed
# ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """What is under test: the base model, or it with a LoRA. `step` is a checkpoint's."""

    name: str
    lora: Path | None = None
    refiner_lora: Path | None = None
    step: int | None = None


def find_lora(path):
    """The LoRA file meant by `path`: itself, or the one in a run or checkpoint. Errors: ValueError without one."""
    path = Path(path).expanduser()
    file = path / trainer.LORA_FILE if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"no LoRA file {file}; give a .safetensors file, a run or a checkpoint")
    return file


def list_models(args):
    """[Model]: the base model, each --lora, each checkpoint of --checkpoints; names differ."""
    refiner_lora = find_lora(args.refiner_lora) if args.refiner_lora else None
    models = [Model("base model")]
    for path in map(Path, args.lora):
        name = path.stem if path.is_file() and path.name != trainer.LORA_FILE else find_lora(path).parent.name
        taken = sum(m.name.partition(" (")[0] == name for m in models)
        models.append(Model(f"{name} ({taken + 1})" if taken else name, find_lora(path), refiner_lora))
    if refiner_lora and not args.lora and not args.checkpoints:
        models.append(Model(refiner_lora.parent.name, None, refiner_lora))
    if args.checkpoints:
        found = trainer.list_checkpoints(args.checkpoints)
        if not found:
            raise ValueError(f"no checkpoint-N in {args.checkpoints}; give the --output_dir of a run")
        models += [Model(f"step {step}", find_lora(folder), refiner_lora, step) for step, folder in found]
    return models


@functools.cache
def file_digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digest(*parts):
    """12 hex digits of a hash of values."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def slug(text):
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40]


def image_folder(args, model):
    """Where a model's pictures lie; another folder when anything that shapes them changes."""
    flags = "pretrained_model_name_or_path revision variant lora_scale refiner_unet denoising_start resolution "
    flags += "num_inference_steps guidance_scale negative_prompt dtype"
    if model.lora is None and model.refiner_lora is None:
        flags = flags.replace("lora_scale ", "")
    files = [file and file_digest(file) for file in (model.lora, model.refiner_lora)]
    shaped = digest(*(getattr(args, name) for name in flags.split()), *files)
    return Path(args.images_dir or Path(args.output_dir) / "images") / f"{slug(model.name)}-{shaped}"


def image_path(args, model, prompt, seed):
    return image_folder(args, model) / f"{slug(prompt.id)}-{digest(prompt.id, prompt.prompt)}-{seed}.png"


def noise_seed(prompt, seed):
    """Seed of a picture's CPU noise: of the prompt's id and the seed alone."""
    return trainer.torch_seed(trainer.hash_text(prompt.id), seed)


def resolve_dtype(name, device):
    """torch dtype of --dtype: bf16 on a GPU and fp32 on a CPU unless given."""
    if name is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return trainer.weight_dtype_of(name)


class Painter:
    """The stock pipelines, with one LoRA at a time."""

    def __init__(self, args, device):
        self.args, self.device, self.loaded = args, device, None
        options = {"dtype": resolve_dtype(args.dtype, device), "variant": args.variant}
        load = StableDiffusionXLPipeline.from_pretrained
        base = trainer.load_part(args, load, None, add_watermarker=False, **options)
        if options["dtype"] == torch.float16:
            base.vae.to(torch.float32)  # SDXL's own overflows in fp16
        base.vae.enable_slicing()  # decodes one by one: in fp32 each picture of 1024 px takes 3 GB
        self.base, self.refiner = base.to(device), None
        if args.refiner_unet:
            folder = None if (Path(args.refiner_unet).expanduser() / "config.json").is_file() else "unet"
            load = UNet2DConditionModel.from_pretrained
            unet = trainer.load_part(args, load, folder, "--refiner_unet", **options)
            self.refiner = StableDiffusionXLImg2ImgPipeline(
                vae=base.vae,
                text_encoder=None,
                text_encoder_2=base.text_encoder_2,
                tokenizer=None,
                tokenizer_2=base.tokenizer_2,
                unet=unet.to(device),
                scheduler=base.scheduler,
                requires_aesthetics_score=True,
                force_zeros_for_empty_prompt=False,
                add_watermarker=False,
            )
        for pipeline in filter(None, (self.base, self.refiner)):
            pipeline.set_progress_bar_config(disable=True)

    def use(self, model):
        """Puts the model's LoRA on the pipelines. Errors: InputError when it does not fit."""
        if self.loaded == model:
            return
        parts = [("--lora", self.base, model.lora), ("--refiner_lora", self.refiner, model.refiner_lora)]
        parts = [part for part in parts if part[1] is not None]
        for _, pipeline, _ in parts:  # all before any is loaded: the two share text_encoder_2
            pipeline.unload_lora_weights()
        for flag, pipeline, file in parts:
            if file is None:
                continue
            name = "lora" if flag == "--lora" else "refiner"
            try:
                pipeline.load_lora_weights(str(file), adapter_name=name, use_safetensors=True)
                scaled = pipeline if flag == "--lora" else pipeline.unet
                scaled.set_adapters([name], [self.args.lora_scale])
            except Exception as error:  # libraries raise what they like for a LoRA of another base
                reason = " ".join(str(error).split())[:200]
                raise InputError(f"{flag}: {file} does not fit this snapshot: {reason}") from error
        self.loaded = model

    def paint(self, prompts, seeds):
        """[PIL image] of the prompts, each from its own CPU noise."""
        args, base = self.args, self.base
        side = args.resolution // base.vae_scale_factor
        generators = [torch.Generator().manual_seed(noise_seed(p, s)) for p, s in zip(prompts, seeds)]
        noise = [torch.randn(base.unet.config.in_channels, side, side, generator=g) for g in generators]
        texts = [prompt.prompt for prompt in prompts]
        options = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}
        options |= {
            "generator": generators,
            "negative_prompt": args.negative_prompt and [args.negative_prompt] * len(texts),
        }
        latents = base(
            texts,
            height=args.resolution,
            width=args.resolution,
            latents=torch.stack(noise).to(self.device, base.unet.dtype),
            output_type="latent",
            denoising_end=args.denoising_start if self.refiner else None,
            **options,
        ).images
        if self.refiner:
            start = args.denoising_start
            latents = self.refiner(texts, image=latents, denoising_start=start, output_type="latent", **options).images
        vae = base.vae
        with torch.no_grad():
            pixels = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype)).sample.float()
        return base.image_processor.postprocess(pixels, output_type="pil")


def paint_all(args, state, models, panel):
    """Makes the pictures that are not there yet, batches shared out over the processes."""
    jobs = [(prompt, seed) for prompt in panel for seed in args.seeds]
    batches = [
        (model, jobs[start : start + args.batch_size])
        for model in models
        for start in range(0, len(jobs), args.batch_size)
    ]
    mine = [
        (model, batch)
        for model, batch in batches[state.process_index :: state.num_processes]
        if not all(image_path(args, model, *job).exists() for job in batch)
    ]
    painter = Painter(args, state.device) if mine else None
    total = sum(len(batch) for _, batch in mine)
    with tqdm(total=total, unit="image", disable=not state.is_main_process or not mine, desc="pictures") as bar:
        for model, batch in mine:
            painter.use(model)
            image_folder(args, model).mkdir(parents=True, exist_ok=True)
            pictures = painter.paint(*zip(*batch))
            for job, picture in zip(batch, pictures):
                path = image_path(args, model, *job)
                if not path.exists():
                    encoded = io.BytesIO()
                    picture.save(encoded, "png")
                    trainer.write_file(path, encoded.getvalue())
            bar.update(len(batch))
    state.wait_for_everyone()


# ------------------------------------------------------------------------------
# 4 Judges: pictures → embeddings → scores
# ------------------------------------------------------------------------------


class Clip:
    """An open_clip model. Errors: InputError naming `flag` when it does not load."""

    def __init__(self, name, device, flag="--clip_model"):
        architecture, weights = (name, None) if ":" in name else (name.partition("/")[0], name.partition("/")[2])
        try:
            model, _, self.preprocess = open_clip.create_model_and_transforms(architecture, pretrained=weights or None)
            self.tokenizer = open_clip.get_tokenizer(architecture)
        except Exception as error:  # no weights in the cache and no network, an unknown name, a torn file
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{flag}: cannot load {name}: {reason}; give a local-dir:FOLDER, or go online") from error
        self.model, self.device = model.eval().to(device), device

    @torch.no_grad()
    def embed_images(self, images):
        """(n, D) float32 unit vectors of PIL images."""
        pixels = torch.stack([self.preprocess(image.convert("RGB")) for image in images]).to(self.device)
        return self.model.encode_image(pixels, normalize=True).float().cpu().numpy()

    @torch.no_grad()
    def embed_texts(self, texts):
        """(n, D) float32 unit vectors."""
        return (
            self.model.encode_text(self.tokenizer(list(texts)).to(self.device), normalize=True).float().cpu().numpy()
        )


def load_aesthetic_head(path, width):
    """Function (n, width) unit vectors → (n,) scores of about 1 to 10: LAION's linear head or its MLP.

    The MLP has no activations between its layers (github.com/christophschuhmann/improved-aesthetic-predictor). Errors:
    InputError when the file does not load, without unpickling code, or its layers do not fit.
    """
    flag = "--aesthetic_head"
    try:
        if str(path).startswith("http"):
            state = torch.hub.load_state_dict_from_url(str(path), map_location="cpu", weights_only=True)
        elif str(path).endswith(".safetensors"):
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        names = sorted(
            (k for k in state if k.endswith("weight")), key=lambda k: [int(n) for n in re.findall(r"\d+", k)]
        )
        layers = [(state[k].float(), state[k.removesuffix("weight") + "bias"].float()) for k in names]
    except Exception as error:  # no network, a torn file, something else than tensors by name
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{flag}: cannot load {path}: {reason}; give a file in LAION's format, or none") from error
    widths = [width, *(len(bias) for _, bias in layers)]
    shapes = [(after, before) for before, after in zip(widths, widths[1:])]
    if not layers or widths[-1] != 1 or [tuple(w.shape) for w, _ in layers] != shapes:
        found = " → ".join(f"{w.shape[1]}×{w.shape[0]}" for w, _ in layers) or "no layers"
        raise InputError(f"{flag}: {path} has {found}; expected a head from {width} numbers to 1")

    def head(embeddings):
        values = torch.from_numpy(embeddings).float()
        for weight, bias in layers:
            values = values @ weight.T + bias
        return values[:, 0].numpy()

    return head


def embed_files(state, clip_name, flag, paths, cache_dir=None):
    """(n, D) embeddings of picture files, kept beside them; the processes share the work and all get all."""
    stamp = digest(clip_name)
    missing = [path for path in paths if not path.with_suffix(f".{stamp}.npy").exists()]
    mine = missing[state.process_index :: state.num_processes]
    clip = Clip(clip_name, state.device, flag) if mine else None
    quiet = not state.is_main_process or not mine
    for start in tqdm(range(0, len(mine), EMBEDDING_BATCH), desc=clip_name[:30], unit="batch", disable=quiet):
        chunk = mine[start : start + EMBEDDING_BATCH]
        for path, embedding in zip(chunk, clip.embed_images([Image.open(path) for path in chunk])):
            encoded = io.BytesIO()
            np.save(encoded, embedding)
            trainer.write_file(path.with_suffix(f".{stamp}.npy"), encoded.getvalue())
    state.wait_for_everyone()
    return np.stack([np.load(path.with_suffix(f".{stamp}.npy")) for path in paths])


def score_images(images, prompts, clip, aesthetic=None, weights=(0.6, 0.4)):
    """{"adherence", "aesthetic", "score"}: (n,) each of PIL images or of their (n, D) embeddings by `clip`.

    Adherence is the cosine similarity of picture and `prompts[i].clip_prompt`. `aesthetic` holds (n,) scores of the
    head, or is None: then the score is the adherence alone.
    """
    embeddings = images if isinstance(images, np.ndarray) else clip.embed_images(images)
    texts = list(dict.fromkeys(prompt.clip_prompt for prompt in prompts))
    of_text = dict(zip(texts, clip.embed_texts(texts)))
    adherence = np.sum(embeddings * np.stack([of_text[prompt.clip_prompt] for prompt in prompts]), axis=1)
    if aesthetic is None:
        return {"adherence": adherence, "score": adherence}
    score = weights[0] * adherence + weights[1] * np.asarray(aesthetic) / 10
    return {"adherence": adherence, "aesthetic": np.asarray(aesthetic), "score": score}


def name_species(embeddings, species, clip, template="{}"):
    """(n,) index into `species` of the one that CLIP names, zero-shot."""
    return (embeddings @ clip.embed_texts([template.format(name) for name in species]).T).argmax(axis=1)


def diversity_of(embeddings):
    """Mean cosine distance of all pairs among (n, D) pictures of one prompt; NaN for fewer than two."""
    n = len(embeddings)
    similarity = (embeddings @ embeddings.T)[np.triu_indices(n, 1)]
    return float(1 - similarity.mean()) if n > 1 else math.nan


def make_thumbnails(image):
    """(3, F) float32 unit vectors, F = 3 · THUMBNAIL²: start, middle and end of the long side, less their means.

    Their product is a correlation. CLIP cannot tell a copy from another picture of the same things; this can, unless
    the copy is framed anew.
    """
    side, pixels = min(image.size), []
    for share in (0, 0.5, 1):
        left, top = (round(share * (length - side)) for length in image.size)
        window = (left, top, left + side, top + side)
        small = image.convert("RGB").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX, window)
        pixels.append(np.asarray(small, dtype=np.float32))
    pixels = np.stack(pixels)
    pixels = (pixels - pixels.mean(axis=(1, 2), keepdims=True)).reshape(3, -1)
    return pixels / np.maximum(np.linalg.norm(pixels, axis=1, keepdims=True), 1e-6)


def mirror_thumbnails(thumbnails):
    """The (…, F) thumbnails of the mirrored pictures."""
    shape = (*thumbnails.shape[:-1], THUMBNAIL, THUMBNAIL, 3)
    return thumbnails.reshape(shape)[..., ::-1, :].reshape(thumbnails.shape)


@dataclass
class Reference:
    """Images of shards: "SHARD KEY" each, (shard, offset, size), and what they are compared by."""

    names: list
    places: list
    embeddings: np.ndarray  # (n, D)
    thumbnails: np.ndarray  # (n, 3, F) float16


def embed_shards(state, args, shards):
    """Reference of every usable image in `shards`, kept in output_dir; the processes share the work."""
    paths = trainer.expand_shards(shards)
    opened = [trainer.Shard(path, args.cache_dir or args.output_dir) for path in paths]
    parts = (args.clip_model, THUMBNAIL, [(s.path, s.stamp) for s in opened])
    cached = Path(args.output_dir) / f"shards-{digest(*parts)}.npz"
    if not cached.exists():
        rows = [(shard, row) for shard in opened for row in trainer.index_shard(shard, "species_list")[0]]
        mine, found = rows[state.process_index :: state.num_processes], []
        clip = Clip(args.clip_model, state.device)
        quiet = not state.is_main_process
        for start in tqdm(range(0, len(mine), EMBEDDING_BATCH), desc="images of shards", unit="batch", disable=quiet):
            images, kept = [], []
            for shard, row in mine[start : start + EMBEDDING_BATCH]:
                try:
                    images.append(trainer.open_image(shard.read(row["offset"], row["size"]))[0])
                    kept.append((f"{Path(row['path']).name} {row['key']}", (row["path"], row["offset"], row["size"])))
                except ValueError:  # damaged: the trainer does not train on it either
                    continue
            thumbnails = [make_thumbnails(image).astype(np.float16) for image in images]
            found += zip(*zip(*kept), clip.embed_images(images), thumbnails) if images else []
        found = sorted(gather_object(found), key=lambda item: item[1])
        if not found:
            raise InputError(f"--train_shards: no usable image in {' '.join(shards)}")
        if state.is_main_process:
            names, places, embeddings, thumbnails = zip(*found)
            arrays = {"embeddings": np.stack(embeddings), "thumbnails": np.stack(thumbnails)}
            encoded = io.BytesIO()
            np.savez(encoded, names=np.array(names), places=json.dumps(places), **arrays)
            trainer.write_file(cached, encoded.getvalue())
        state.wait_for_everyone()
    with np.load(cached) as data:
        places = json.loads(str(data["places"]))
        return Reference(data["names"].tolist(), places, data["embeddings"], data["thumbnails"])


def find_nearest(vectors, reference, itself=False):
    """(similarity (n,), index (n,)) of the nearest of `reference` (m, views, F) to each of `vectors` (n, views', F).

    The similarity of two images is that of their most similar views; with `itself`, the two are the same images and
    none is its own nearest.
    """
    views, best = np.float32(reference).reshape(-1, reference.shape[-1]), []
    for start in range(0, len(vectors), EMBEDDING_BATCH):
        chunk = np.float32(vectors[start : start + EMBEDDING_BATCH])
        similarity = (chunk @ views.T).reshape(len(chunk), chunk.shape[1], len(reference), -1).max(axis=(1, 3))
        if itself:
            similarity[np.arange(len(chunk)), np.arange(start, start + len(chunk))] = -1
        best.append((similarity.max(axis=1), similarity.argmax(axis=1)))
    return tuple(map(np.concatenate, zip(*best)))


def compare_with_training(embeddings, thumbnails, reference, itself=False):
    """{"nearest_similarity", "copy_similarity", "nearest"}: (n,) each, of (n, D) and (n, F) of square pictures.

    By CLIP and by correlation of thumbnails, also mirrored; "nearest" is the index by the latter.
    """
    similar, _ = find_nearest(embeddings[:, None], reference.embeddings[:, None], itself)
    both = np.stack([thumbnails, mirror_thumbnails(thumbnails)], axis=1)
    correlation, which = find_nearest(both, reference.thumbnails, itself)
    return {"nearest_similarity": similar, "copy_similarity": correlation, "nearest": which}


# ------------------------------------------------------------------------------
# 5 Statistics
# ------------------------------------------------------------------------------


def bootstrap(values, groups):
    """{"mean", "low", "high", "count"}: 95 % interval of the mean, whole groups (prompts) drawn with replacement."""
    values, groups = np.asarray(values, dtype=np.float64), np.asarray(groups)
    names, codes = np.unique(groups, return_inverse=True)
    sums, counts = np.bincount(codes, weights=values), np.bincount(codes)
    picks = np.random.default_rng(0).integers(len(names), size=(BOOTSTRAP_SAMPLES, len(names)))
    means = sums[picks].sum(axis=1) / counts[picks].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high), "count": len(values)}


METRICS = {
    "adherence": "CLIP adherence",
    "aesthetic": "aesthetic",
    "score": "score",
    "right": "species named right",
    "nearest_similarity": "CLIP similarity to the nearest training image",
    "copy_similarity": "correlation with the nearest training image",
    "copy": "copies",
}
GROUP_METRICS = ("right", "adherence")  # shown of every tag and species


def summarise(models, rows):
    """{model: {metric: bootstrap, "vs_base": {metric: bootstrap of the paired difference}}} of per-image rows."""
    base, summary = {(r["prompt_id"], r["seed"]): r for r in rows if r["model"] == models[0].name}, {}
    for model in models:
        entry = {"vs_base": {}} | ({"step": model.step} if model.step is not None else {})
        for metric in METRICS:
            own = [row for row in rows if row["model"] == model.name and row.get(metric) is not None]
            if not own:
                continue
            groups, values = [row["prompt_id"] for row in own], [float(row[metric]) for row in own]
            entry[metric] = bootstrap(values, groups)
            if model is not models[0]:
                paired = [float(base[row["prompt_id"], row["seed"]][metric]) for row in own]
                entry["vs_base"][metric] = bootstrap(np.subtract(values, paired), groups)
        summary[model.name] = entry
    return summary


def add_diversity(summary, models, panel, embeddings):
    """Adds "diversity" to the summary: over the prompts, the mean distance between its seeds' pictures."""
    values = {m.name: [diversity_of(e) for e in embeddings[m.name]] for m in models}
    ids = [prompt.id for prompt in panel]
    if any(math.isnan(value) for value in values[models[0].name]):
        return
    for model in models:
        summary[model.name]["diversity"] = bootstrap(values[model.name], ids)
        if model is not models[0]:
            change = np.subtract(values[model.name], values[models[0].name])
            summary[model.name]["vs_base"]["diversity"] = bootstrap(change, ids)


# ------------------------------------------------------------------------------
# 6 Report
# ------------------------------------------------------------------------------


def data_uri(image, side=None):
    """The picture as text for a page, at most `side` px wide and high; small ones are not enlarged."""
    image = image.convert("RGB")
    if side:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    image.save(encoded, **({"format": "PNG"} if max(image.size) <= 128 else {"format": "WEBP", "quality": 88}))
    kind = "png" if max(image.size) <= 128 else "webp"
    return f"data:image/{kind};base64," + base64.b64encode(encoded.getvalue()).decode()


def format_interval(interval, metric, signed=False):
    share = metric in ("right", "copy")
    mean, low, high = ((100 if share else 1) * interval[key] for key in ("mean", "low", "high"))
    digits, sign = (1 if share else 3), ("+" if signed else "")
    unit = " %" if share else ""
    return f"{mean:{sign}.{digits}f}{unit} <small>{low:{sign}.{digits}f} to {high:{sign}.{digits}f}</small>"


def summary_table(summary, metrics):
    """Models down, metrics across; under each the paired difference from the base model, bold when it excludes 0."""
    head = "".join(f"<th>{html.escape(label)}</th>" for label in metrics.values())
    rows = []
    for name, entry in summary.items():
        cells = []
        for metric in metrics:
            cell = format_interval(entry[metric], metric) if metric in entry else "–"
            change = entry["vs_base"].get(metric)
            if change:
                sure = change["low"] > 0 or change["high"] < 0
                text = format_interval(change, metric, signed=True)
                cell += f"<br><span class='{'sure' if sure else 'unsure'}'>{text}</span>"
            cells.append(f"<td>{cell}</td>")
        flag = " <strong class=flag>copies training images</strong>" if entry.get("flagged") else ""
        rows.append(f"<tr><th>{html.escape(name)}{flag}</th>{''.join(cells)}</tr>")
    return f"<div class=scroll><table><tr><th>model</th>{head}</tr>{''.join(rows)}</table></div>"


def group_table(title, models, groups):
    """Groups of prompts down, models across: share named right, and adherence."""
    if not groups:
        return ""
    head, lines = "".join(f"<th>{html.escape(model.name)}</th>" for model in models), []
    for group, entries in groups.items():
        shown = [
            [format_interval(entries[m.name][k], k) for k in GROUP_METRICS if k in entries[m.name]] for m in models
        ]
        cells = "".join(f"<td>{'<br>'.join(values)}</td>" for values in shown)
        lines.append(f"<tr><th>{html.escape(group)}</th>{cells}</tr>")
    table = f"<table><tr><th></th>{head}</tr>{''.join(lines)}</table>"
    return f"<h2>{title}</h2><p>Species named right, and CLIP adherence.</p><div class=scroll>{table}</div>"


def figure(row, gallery, caption=""):
    """A small picture that opens large; the large one is in the page once."""
    text = f"adherence {row['adherence']:.3f}"
    text += f", aesthetic {row['aesthetic']:.2f}" if row.get("aesthetic") is not None else ""
    text += f", named {row['named']}" if row.get("named") and not row["right"] else ""
    number = gallery.setdefault(row["file"], len(gallery))
    label = html.escape(f"{row['model']}: {row['prompt']}, seed {row['seed']}")
    return (
        f"<figure><a href='#p{number}' aria-label='{label}'><span class='t t{number}'></span></a>"
        f"<figcaption>{caption}{html.escape(text)}</figcaption></figure>"
    )


def picture_grid(models, panel, rows, seeds, gallery):
    """Prompts down, models across: as many seeds as fit a row of 8 at once, the others behind a summary."""
    by_place = {(row["model"], row["prompt_id"], row["seed"]): row for row in rows}
    sections, at_once = [], max(1, 8 // len(models))
    for prompt in panel:
        blocks = []
        for seed in seeds:
            shown = (
                figure(by_place[m.name, prompt.id, seed], gallery, f"<b>{html.escape(m.name)}</b> ") for m in models
            )
            blocks.append("".join(shown))
        first, rest = (f"<div class=row>{''.join(part)}</div>" for part in (blocks[:at_once], blocks[at_once:]))
        more = f"<details><summary>{len(blocks) - at_once} more seeds</summary>{rest}</details>"
        sections.append(f"<h3>{html.escape(prompt.prompt)}</h3>{first}{more if len(blocks) > at_once else ''}")
    return "".join(sections)


def curve(models, summary, metric, width=640, height=220):
    """SVG of a metric over the checkpoints' steps with its intervals; the base model is the dashed line."""
    points = [(m.step, summary[m.name][metric]) for m in models if m.step is not None and metric in summary[m.name]]
    base = summary[models[0].name][metric]["mean"]
    values = [v for _, e in points for v in (e["low"], e["high"])] + [base]
    low, high = min(values), max(values)
    span, last = (high - low) or 1, max(step for step, _ in points)

    def at(step, value):
        return 50 + (width - 70) * step / last, height - 30 - (height - 50) * (value - low) / span

    line = " ".join("{:.1f},{:.1f}".format(*at(step, e["mean"])) for step, e in points)
    marks = ""
    for step, e in points:
        (x, top), (_, bottom), (_, y) = at(step, e["high"]), at(step, e["low"]), at(step, e["mean"])
        marks += f"<path d='M{x:.1f} {top:.1f}V{bottom:.1f}'/><circle cx='{x:.1f}' cy='{y:.1f}' r='3'/>"
        marks += f"<text x='{x:.1f}' y='{height - 8}' text-anchor='middle'>{step}</text>"
    _, dashed = at(0, base)
    return (
        f"<svg viewBox='0 0 {width} {height}' role=img aria-label='{METRICS[metric]} over steps'>"
        f"<path class=base d='M50 {dashed:.1f}H{width - 20}'/><polyline points='{line}'/>{marks}"
        f"<text x='46' y='24' text-anchor='end'>{high:.3f}</text>"
        f"<text x='46' y='{height - 30}' text-anchor='end'>{low:.3f}</text></svg>"
    )


def first_of_each(rows, group_of, count):
    """The first row of each group, `count` at most: a page of the same picture says no more than one."""
    groups = {}
    for row in rows:
        groups.setdefault(group_of(row), row)
    return list(groups.values())[:count]


def copies_section(rows, reference, held_out, args, gallery, count=8):
    """The outputs most like a training image, beside it."""
    parts = []
    ranked = sorted(rows, key=lambda row: -row["copy_similarity"])
    for row in first_of_each(ranked, lambda row: row["nearest"], count):
        path, offset, size = reference.places[reference.names.index(row["nearest"])]
        shard = trainer.Shard(path, args.cache_dir or args.output_dir)
        image = trainer.open_image(shard.read(offset, size))[0]
        caption = f"{html.escape(row['model'])}, correlation {row['copy_similarity']:.3f}"
        training = f"<figure><img src='{data_uri(image, 320)}' alt='training image'>"
        training += f"<figcaption>training image {html.escape(row['nearest'][:60])}</figcaption></figure>"
        parts.append(f"<div class=row>{figure(row, gallery, caption + '; ')}{training}</div>")
    note = f"Correlation of {THUMBNAIL} × {THUMBNAIL} px thumbnails, also mirrored. {held_out['images']} held-out "
    note += f"images have {held_out['copy_similarity']:.3f} with their nearest training image on average, "
    note += f"{100 * COPY_QUANTILE:g} % of them less than {held_out['copy_limit']:.3f}: more is called a copy. "
    note += f"By CLIP they are {held_out['nearest_similarity']:.3f} alike."
    return f"<h2>Most like a training image</h2><p>{note}</p><div class=pairs>{''.join(parts)}</div>"


# ---- page: what every report shares, hpo_sweep.py's too

STYLE = """
:root { color-scheme: light dark; --line: #8884; --accent: light-dark(#086, #4d9); --bad: light-dark(#b30, #f85) }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem }
h1 { font-size: 1.6rem; line-height: 1.2 }
h2 { font-size: 1.3rem; line-height: 1.2; margin: 2.5rem 0 .8rem }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem }
small { opacity: .75 }
summary { cursor: pointer }
meter { width: 8rem }
pre { overflow-x: auto; padding: .6rem; border: 1px solid var(--line) }

.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .3rem .8rem .3rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top }
td small { white-space: nowrap }
.sure { color: var(--accent); font-weight: 600 }
.unsure { opacity: .75 }
.flag { color: var(--bad); display: block }

.plots, .best { display: grid; gap: 1rem 2rem }
.plots, .best { grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)) }
.best h3 { margin: 0 }
.row { display: grid; gap: .6rem; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); margin-bottom: .6rem }
.pairs { display: grid; gap: .6rem 2rem; grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)) }
.pairs .row { grid-template-columns: 1fr 1fr }

figure { margin: 0 }
figcaption { font-size: .8rem; line-height: 1.35; overflow-wrap: anywhere }
.plots figcaption { font-size: .9rem }
img { max-width: 100%; border-radius: 4px }
.plot { display: block; width: 100%; max-width: 36rem; height: auto; fill: currentColor; stroke-linejoin: round }
.plot text { font-family: inherit !important }

/* A figure with an id enlarges its image while the address ends in #id; the link .close covers the page then. */
.row a:first-child { display: block; aspect-ratio: 1 }
.row img { display: block; width: 100%; aspect-ratio: 1; object-fit: cover }
figure[id] { scroll-margin-top: 40vh }
figure .close { display: none }
figure:target .close { display: block; position: fixed; inset: 0; background: #000d; z-index: 1; cursor: zoom-out }
figure:target img { position: fixed; inset: 0; margin: auto; z-index: 2; pointer-events: none; object-fit: contain }
figure:target img { width: 94vw; height: 94vh; height: 94dvh; max-width: none; aspect-ratio: auto }
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

# What follows the reader's light or dark mode: black, white and matplotlib's first colour.
SVG_COLOURS = {"#000000": "currentColor", "#ffffff": "Canvas", "#1f77b4": "var(--accent)"}


def render_page(body, title, **values):
    """An HTML page of `body`, Jinja2 source that may use `title` and `values`: one file, no request to anywhere.

    Values are escaped unless they are Markup. Errors: jinja2.UndefinedError for a name without a value.
    """
    environment = jinja2.Environment(
        loader=jinja2.DictLoader({"layout": LAYOUT, "body": body}),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("layout").render(title=title, style=Markup(STYLE), **values)


def figure_svg(figure, label):
    """Markup of a matplotlib Figure as inline SVG that is as wide as its place; screen readers read the label.

    Black becomes the colour of the text, white that of the page, and matplotlib's first colour the accent colour.
    """
    encoded = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(encoded, format="svg", transparent=True, metadata=metadata)
    source = encoded.getvalue()
    view_box = re.search(r'viewBox="([^"]+)"', source)[1]
    # Matplotlib's own style would reach the whole page.
    content = source.partition("</defs>")[2].rpartition("</svg>")[0]
    prefix = "f" + digest(label, source)

    def adapt(tag):
        text = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{prefix}-", tag[0])
        return re.sub("#[0-9a-f]{6}", lambda colour: SVG_COLOURS.get(colour[0], colour[0]), text)

    content = Markup(re.sub("<[^>]*>", adapt, content))
    return Markup('<svg class="plot" role="img" aria-label="{}" viewBox="{}">{}</svg>').format(
        label, view_box, content
    )


PAGE = string.Template("""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<title>Evaluation</title>
<style>
:root { color-scheme: light dark; --line: #8884; --accent: light-dark(#0a6, #4d9); --bad: light-dark(#b30, #f85) }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem }
h1 { font-size: 1.6rem; line-height: 1.2 } h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; font-weight: 600 }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .3rem .8rem .3rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top }
small { opacity: .75 } td small { white-space: nowrap }
.sure { color: var(--accent); font-weight: 600 } .unsure { opacity: .7 }
.flag { color: var(--bad); display: block }
.row { display: grid; gap: .6rem; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); margin-bottom: .6rem }
.pairs { display: grid; gap: .6rem 2rem; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)) }
.pairs .row { grid-template-columns: 1fr 1fr }
figure { margin: 0 } figcaption { font-size: .8rem; line-height: 1.35; overflow-wrap: anywhere }
.t, figure img { display: block; width: 100%; aspect-ratio: 1; object-fit: cover; background-size: cover }
.t, figure img { border-radius: 4px }
.large { display: none; position: fixed; inset: 0; background: #000d; place-content: center; z-index: 1 }
.large:target { display: grid } .large span { width: min(94vw, 94vh); aspect-ratio: 1; background-size: cover }
summary { cursor: pointer } pre { overflow-x: auto; padding: .6rem; border: 1px solid var(--line) }
svg { width: 100%; max-width: 44rem; fill: none; stroke: var(--accent); stroke-width: 2 }
svg text { fill: currentColor; stroke: none; font-size: 12px } svg circle { fill: var(--accent) }
svg .base { stroke: #888; stroke-dasharray: 4 4 }
$sources
</style>
<h1>$title</h1>
<p>$intro</p>
$summary
$curves
<h2>Pictures</h2>
$grid
$groups
$extremes
$copies
<h2>How this was made</h2>
<pre>$command</pre><p><small>$versions</small></p>
$large
</html>
""")


def write_report(args, models, panel, rows, facts, reference, argv):
    """report.html of what metrics.json holds (`facts`): one file, no request to anywhere."""
    gallery, summary = {}, facts["models"]
    metrics = {k: v for k, v in {**METRICS, "diversity": "diversity"}.items() if k in summary[models[0].name]}
    trained = [row for row in rows if row["model"] != models[0].name] or rows
    ranked, prompt_of = sorted(trained, key=lambda row: row["score"]), lambda row: (row["model"], row["prompt_id"])
    grid = picture_grid(models, panel, rows, args.seeds, gallery)
    extremes = "".join(
        f"<h2>{title}</h2><div class=row>"
        + "".join(
            figure(row, gallery, f"<b>{html.escape(row['model'])}</b> {html.escape(row['prompt'])}; ")
            for row in chosen
        )
        + "</div>"
        for title, chosen in (
            ("Best scores", first_of_each(ranked[::-1], prompt_of, 8)),
            ("Worst scores", first_of_each(ranked, prompt_of, 8)),
        )
    )
    copies = copies_section(trained, reference, facts["held_out"], args, gallery) if reference is not None else ""
    steps = [model for model in models if model.step is not None]
    curves = "".join(
        f"<h2>{METRICS[m]} over steps</h2>{curve(models, summary, m)}"
        for m in ("score", "right")
        if steps and m in metrics
    )
    uris = [data_uri(Image.open(Path(args.output_dir) / file), 768) for file in gallery]
    page = PAGE.substitute(
        title=html.escape(f"{len(models)} models, {len(panel)} prompts, {len(args.seeds)} seeds"),
        intro="Means with 95 % intervals, prompts drawn with replacement; below them the paired difference from the "
        "base model from the same noise, coloured where its interval excludes 0. Click a picture to enlarge it.",
        summary=summary_table(summary, metrics),
        curves=curves,
        grid=grid,
        groups=group_table("By tag", models, facts["by_tag"]) + group_table("By species", models, facts["by_species"]),
        extremes=extremes,
        copies=copies,
        command=html.escape(" ".join(["evaluate.py", *map(shlex.quote, argv)])),
        versions=html.escape(", ".join(f"{k} {v}" for k, v in versions().items())),
        sources="".join(f".t{n}{{background-image:url({uri})}}" for n, uri in enumerate(uris)),
        large="".join(f"<a class=large id=p{n} href='#_'><span class='t{n}'></span></a>" for n in range(len(uris))),
    )
    trainer.write_file(Path(args.output_dir) / "report.html", page.encode())


def write_grid(args, models, panel):
    """grid.png: the first seed, a row per prompt, a column per model."""
    pictures = [Image.open(image_path(args, m, p, args.seeds[0])).convert("RGB") for p in panel for m in models]
    side = min(args.resolution, 256)
    images = np.stack([np.asarray(picture.resize((side, side), Image.Resampling.LANCZOS)) for picture in pictures])
    sheet = trainer.draw_grid(images, [p.prompt for p in panel for _ in models], len(models))
    encoded = io.BytesIO()
    sheet.save(encoded, "png")
    trainer.write_file(Path(args.output_dir) / "grid.png", encoded.getvalue())


def write_csv(args, rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    trainer.write_file(Path(args.output_dir) / "per_image.csv", text.getvalue().encode())


def versions():
    packages = ["torch", "diffusers", "transformers", "peft", "open_clip_torch"]
    return {"python": sys.version.split()[0]} | {name: importlib.metadata.version(name) for name in packages}


def report_to_wandb(args, rows, metrics):
    import wandb

    run = wandb.init(project="train_sdxl_lora", job_type="evaluate", config=vars(args), dir=args.output_dir)
    columns = [name for name in rows[0] if name != "file"]
    table = wandb.Table(columns=["picture", *columns])
    for row in rows:
        table.add_data(wandb.Image(str(Path(args.output_dir) / row["file"])), *(row[name] for name in columns))
    flat = {
        f"{model}/{metric}": entry[metric]["mean"]
        for model, entry in metrics["models"].items()
        for metric in METRICS
        if metric in entry
    }
    run.log({"pictures": table, **flat})
    run.finish()


# ------------------------------------------------------------------------------
# 7 Main
# ------------------------------------------------------------------------------


def judge_all(args, state, models, panel):
    """(rows, {model: [(seeds, D) embeddings of each prompt]}, Reference or None, what is known of held-out images)."""
    jobs = [(model, prompt, seed) for model in models for prompt in panel for seed in args.seeds]
    paths = [image_path(args, *job) for job in jobs]
    embeddings = embed_files(state, args.clip_model, "--clip_model", paths)
    aesthetic = None
    if args.aesthetic_head != "none":
        features = embed_files(state, args.aesthetic_clip_model, "--aesthetic_clip_model", paths)
        aesthetic = load_aesthetic_head(args.aesthetic_head, features.shape[1])(features)
    reference = embed_shards(state, args, args.train_shards) if args.train_shards else None
    held_out = embed_shards(state, args, args.val_shards) if args.val_shards else reference
    if not state.is_main_process:
        return None, None, None, None
    clip = Clip(args.clip_model, state.device)
    prompts = [prompt for _, prompt, _ in jobs]
    scores = score_images(embeddings, prompts, clip, aesthetic, args.score_weights)
    species = sorted({prompt.species for prompt in panel if prompt.species})
    named = name_species(embeddings, species, clip, args.species_prompt) if len(species) > 1 else None
    similar, known = {}, {}
    if reference is not None:
        thumbnails = np.stack([make_thumbnails(Image.open(path))[1] for path in paths])
        similar = compare_with_training(embeddings, thumbnails, reference)
        similar["nearest"] = [reference.names[i] for i in similar["nearest"]]
        middles = held_out.thumbnails[:, 1]
        alike = compare_with_training(held_out.embeddings, middles, reference, itself=held_out is reference)
        known = {name: float(alike[name].mean()) for name in ("nearest_similarity", "copy_similarity")}
        known |= {"images": len(middles), "copy_limit": float(np.quantile(alike["copy_similarity"], COPY_QUANTILE))}
        similar["copy"] = similar["copy_similarity"] > known["copy_limit"]
        similar = {name: np.asarray(values).tolist() for name, values in similar.items()}
    rows = []
    for i, (model, prompt, seed) in enumerate(jobs):
        row = {"model": model.name, "prompt_id": prompt.id, "prompt": prompt.prompt, "seed": seed}
        row |= {"species": prompt.species, "tags": ", ".join(prompt.tags)}
        row |= {name: float(values[i]) for name, values in scores.items()}
        if named is not None and prompt.species:
            row |= {"named": species[named[i]], "right": species[named[i]] == prompt.species}
        row |= {name: values[i] for name, values in similar.items()}
        rows.append(row | {"file": os.path.relpath(paths[i], args.output_dir)})
    names = dict.fromkeys(name for row in rows for name in row)
    rows = [{name: row.get(name) for name in names} for row in rows]
    shape = (len(models), len(panel), len(args.seeds), -1)
    return rows, dict(zip([m.name for m in models], embeddings.reshape(shape))), reference, known


def main(argv=None):
    """Draws, judges and writes the report; returns what metrics.json holds."""
    argv = sys.argv[1:] if argv is None else list(map(str, argv))
    args = parse_args(argv)
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=trainer.GROUP_TIMEOUT)])
    trainer.check_world(accelerator)
    state = accelerator.state
    logger.handlers, logger.propagate = [logging.StreamHandler()], False
    logger.setLevel(logging.INFO if state.is_main_process else logging.ERROR)
    for library in (transformers.utils.logging, diffusers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    models, panel = list_models(args), read_panel(args.prompts)
    paint_all(args, state, models, panel)
    rows, embeddings, reference, held_out = judge_all(args, state, models, panel)
    if not state.is_main_process:
        return {}
    summary = summarise(models, rows)
    add_diversity(summary, models, panel, embeddings)
    for entry in summary.values():
        if "copy" in entry:
            entry["flagged"] = entry["copy"]["low"] > COPY_SHARE
    settings = {k: v for k, v in vars(args).items() if k != "config"}
    tags = list(dict.fromkeys(tag for prompt in panel for tag in prompt.tags))
    species = sorted({prompt.species for prompt in panel if prompt.species})
    metrics = {
        "models": summary,
        "by_tag": {tag: summarise(models, [r for r in rows if tag in r["tags"].split(", ")]) for tag in tags},
        "by_species": {name: summarise(models, [r for r in rows if r["species"] == name]) for name in species},
        "held_out": held_out,
        "settings": settings,
        "versions": versions(),
    }
    write_csv(args, rows)
    write_grid(args, models, panel)
    write_report(args, models, panel, rows, metrics, reference, argv)
    trainer.write_file(Path(args.output_dir) / "metrics.json", (json.dumps(metrics, indent=1) + "\n").encode())
    if args.report_to == "wandb":
        report_to_wandb(args, rows, metrics)
    for name, entry in summary.items():
        means = ", ".join(f"{METRICS[m]} {entry[m]['mean']:.3f}" for m in METRICS if m in entry)
        logger.info("%-20s %s%s", name, means, "; copies training images" if entry.get("flagged") else "")
    logger.info("see %s", Path(args.output_dir) / "report.html")
    return metrics


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(1)
