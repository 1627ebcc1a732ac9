"""Convert a checkpoint in one .safetensors file, as on Civitai, to a snapshot in diffusers' layout.

The sections; each calls only what is above it:
     1 Configurations    SDXL's own, and CLIP's tokenizers
     2 Checks            what a file holds, before anything is loaded
     3 Conversion        file → CACHE_DIR/snapshots/HASH, once
train_sdxl_lora.py and evaluate.py import this file; it imports only sdxl_data.py. torch, diffusers and transformers
are slow to import, so functions import them, after the flags have been checked.
"""

import gzip
import importlib.util
import json
import logging
import os
import shlex
import shutil
from pathlib import Path

import filelock
import safetensors

import sdxl_data as data
from sdxl_data import InputError

logger = logging.getLogger("train_sdxl_lora.single_file")

CONVERTER_VERSION = 1  # part of a snapshot's name in the cache: raise it when the conversion changes
PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
CONVERT_PICKLE = (
    "python -c \"import sys, torch, safetensors.torch as s; d = torch.load(sys.argv[1], 'cpu', weights_only=True); "
    "d = d.get('state_dict', d); s.save_file({k: v.clone() for k, v in d.items() if torch.is_tensor(v)}, "
    'sys.argv[2])"'
)
# part of an SDXL checkpoint → what the names of its tensors begin with
PREFIXES = {
    "UNet": "model.diffusion_model.",
    "VAE": "first_stage_model.",
    "first text encoder": "conditioner.embedders.0.transformer.",
    "second text encoder": "conditioner.embedders.1.model.",
}
FOLDERS = {"UNet": "unet", "VAE": "vae", "first text encoder": "text_encoder", "second text encoder": "text_encoder_2"}
SNAPSHOT_PARTS = (*FOLDERS.values(), "tokenizer", "tokenizer_2", "scheduler")
BASE_FLAG = "--pretrained_model_name_or_path"
# flag → parts that its checkpoint file must contain
NEEDED_PARTS = {BASE_FLAG: list(PREFIXES), "--pretrained_vae_model_name_or_path": ["VAE"], "--refiner_unet": ["UNet"]}

# -----------------------------------------------------------------------------
# 1 Configurations
# -----------------------------------------------------------------------------

# The configurations of stabilityai/stable-diffusion-xl-base-1.0: only the values that differ from the classes' own.
CLIP_TOKENS = {
    "vocab_size": 49408,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "max_position_embeddings": 77,
}
SDXL_CONFIGS = {
    "unet": {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 128,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [320, 640, 1280],
        "layers_per_block": 2,
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "cross_attention_dim": 2048,
        "projection_class_embeddings_input_dim": 2816,
    },
    "vae": {
        "_class_name": "AutoencoderKL",
        "sample_size": 1024,
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "scaling_factor": 0.13025,
    },
    "text_encoder": {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
        "hidden_act": "quick_gelu",
        **CLIP_TOKENS,
    },
    "text_encoder_2": {
        "architectures": ["CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
        "hidden_act": "gelu",
        **CLIP_TOKENS,
    },
    "scheduler": {
        "_class_name": "EulerDiscreteScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "interpolation_type": "linear",
        "timestep_spacing": "leading",
        "steps_offset": 1,
    },
}
# what differs in the UNet of stabilityai/stable-diffusion-xl-refiner-1.0
REFINER_UNET = {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [384, 768, 1536, 1536],
    "transformer_layers_per_block": 4,
    "attention_head_dim": [6, 12, 24, 24],
}
MODEL_INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "force_zeros_for_empty_prompt": True,
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def make_tokenizer(pad_token):
    """Returns CLIP's tokenizer, built from the merges that open_clip_torch ships. Raises InputError without them."""
    from transformers import CLIPTokenizer

    package = importlib.util.find_spec("open_clip")
    path = package and Path(package.origin).parent / "bpe_simple_vocab_16e6.txt.gz"
    if not path or not path.is_file():
        raise InputError("CLIP's vocabulary is missing; install open_clip_torch or give --single_file_config")
    lines = gzip.decompress(path.read_bytes()).decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    # the printable bytes stand for themselves, the others for the characters from 256 on
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad_token, model_max_length=77)


def write_json(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1) + "\n")


def write_sdxl_configs(folder):
    """Writes SDXL's own configurations and tokenizers."""
    for part, config in SDXL_CONFIGS.items():
        write_json(folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json"), config)
    for part, pad_token in {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}.items():
        make_tokenizer(pad_token).save_pretrained(folder / part)


def copy_configs(source, folder):
    """Copies a snapshot without its weights."""
    weights = shutil.ignore_patterns("*.safetensors", "*.bin", "*.index.json", "*.msgpack")
    for part in SNAPSHOT_PARTS:
        shutil.copytree(source / part, folder / part, ignore=weights)


def write_configs(folder, markers, config_folder):
    """Writes all of a snapshot but its weights: SDXL's own configurations, or copies from `config_folder`.

    `markers` comes from read_markers and changes the scheduler's configuration.
    """
    if config_folder is None:
        write_sdxl_configs(folder)
    else:
        copy_configs(config_folder, folder)
    path = folder / "scheduler/scheduler_config.json"
    config = json.loads(path.read_text())
    write_json(folder / "model_index.json", MODEL_INDEX | {"scheduler": ["diffusers", config["_class_name"]]})
    if "v_pred" in markers:
        config["prediction_type"] = "v_prediction"
    if "ztsnr" in markers:
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    write_json(path, config)


# -----------------------------------------------------------------------------
# 2 Checks
# -----------------------------------------------------------------------------


def short_reason(error, length=300):
    """Returns the text of an exception on one line, cut to `length` characters."""
    return " ".join(str(error).split())[:length]


def read_header(path):
    """Returns {tensor name: (dtype, shape)} of a .safetensors file. Raises InputError if the file is damaged."""
    try:
        with safetensors.safe_open(path, "np") as file:
            slices = {name: file.get_slice(name) for name in sorted(file.keys())}
            return {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"is damaged or incomplete: {error}; download it again") from error


def read_markers(path):
    """Returns what a checkpoint says of its objective: a set that may hold "v_pred" and "ztsnr".

    They are empty tensors, as ComfyUI and A1111 read them. A header that names v-prediction counts as well.
    """
    with safetensors.safe_open(path, "np") as file:
        markers = {"v_pred", "ztsnr"} & set(file.keys())
        metadata = file.metadata() or {}
    if {metadata.get("modelspec.prediction_type"), metadata.get("modelspec.predict_key")} & {"v", "v_prediction"}:
        markers.add("v_pred")
    return markers


def list_missing_parts(tensors, needed):
    """Returns those of the `needed` parts that a file with these tensors lacks."""
    missing = [part for part in needed if not any(name.startswith(PREFIXES[part]) for name in tensors)]
    if needed == ["VAE"] and any(name.endswith("encoder.conv_in.weight") for name in tensors):
        return []  # a file of a VAE alone has no prefixes
    if needed == ["UNet"] and "conv_in.weight" in tensors:
        return []  # diffusers' own file of a UNet
    return missing


def describe_parts(tensors):
    """Returns in words what a checkpoint file holds."""
    if any(name.startswith("cond_stage_model.") for name in tensors):
        return "the parts of Stable Diffusion 1 or 2"
    parts = [part for part, prefix in PREFIXES.items() if any(name.startswith(prefix) for name in tensors)]
    if "second text encoder" not in parts and "conditioner.embedders.0.model.positional_embedding" in tensors:
        parts.append("the refiner's text encoder")
    return ", ".join(parts) or f"{len(tensors)} tensors such as {min(tensors, default='none')}"


def check_checkpoint_file(flag, path):
    """Raises InputError if a file cannot be used for `flag`. Reads only its header."""
    path = Path(path).expanduser()
    if path.suffix.lower() in PICKLES:
        command = f"{CONVERT_PICKLE} {shlex.quote(str(path))} {shlex.quote(str(path.with_suffix('.safetensors')))}"
        raise InputError(f"is a pickle, which can run any code when it is opened; convert it: {command}")
    if path.suffix.lower() != ".safetensors":
        raise InputError("is not a model file; give a .safetensors file, a snapshot folder or a hub id")
    tensors = read_header(path)
    if flag == BASE_FLAG and any(name.startswith("edm_") for name in tensors):  # CosXL, Playground 2.5
        raise InputError("is trained with EDM's noise schedule, which this trainer does not have; give another base")
    missing = list_missing_parts(tensors, NEEDED_PARTS[flag])
    if missing:
        found = "it is a LoRA" if any("lora" in name for name in tensors) else "found " + describe_parts(tensors)
        raise InputError(f"has no {' and no '.join(missing)}; {found}")
    small = sorted({dtype for dtype, _ in tensors.values() if dtype.startswith(("F8", "F4"))})
    if small:
        raise InputError(f"holds {', '.join(small)} weights; give the 16- or 32-bit version")


def check_config_folder(args, flags):
    """Raises InputError if --single_file_config lacks what converting the checkpoint files of `flags` needs."""
    missing = []
    for flag in flags:
        parts = SNAPSHOT_PARTS if flag == BASE_FLAG else [FOLDERS[part] for part in NEEDED_PARTS[flag]]
        missing += [part for part in parts if not (Path(args.single_file_config).expanduser() / part).is_dir()]
    if missing:
        raise InputError(
            f"--single_file_config: {args.single_file_config} has no {', '.join(missing)}; give the folder of a "
            "snapshot, its weights are not needed"
        )


def check_base_folder(path):
    """Raises InputError if the folder of a base model lacks a part."""
    missing = [part for part in SNAPSHOT_PARTS if not (path / part).is_dir()]
    if missing:
        raise InputError(f"{BASE_FLAG}: {path} has no {', '.join(missing)}; give a full snapshot")


def check_file_or_folder(flag, name):
    """Raises InputError if `name` is neither a hub id nor an existing file or folder that suits `flag`."""
    path = Path(name).expanduser()
    if "://" in name:
        raise InputError(f"{flag}: {name} is a URL; download the file first")
    if path.is_file():
        try:
            check_checkpoint_file(flag, path)
        except InputError as error:
            raise InputError(f"{flag}: {path} {error}") from error
    elif path.is_dir() and flag == BASE_FLAG:
        check_base_folder(path)
    elif path.is_dir() or data.looks_like_path(name) or path.suffix.lower() in (".safetensors", *PICKLES):
        if flag == "--refiner_unet" and not any((path / p).is_file() for p in ("config.json", "unet/config.json")):
            raise InputError(f"{flag}: no UNet in {path}; expected config.json there or in its unet/, or a file")
        if not path.is_dir():
            kind = "file" if path.suffix.lower() in (".safetensors", *PICKLES) else "folder"
            raise InputError(f"{flag}: no {kind} {path}; give a snapshot, a .safetensors file or a hub id")


def check_model_flags(args):
    """Raises InputError, naming the flag, if a flag's model is missing, incomplete or of the wrong kind.

    Checks folders and files; hub ids are not looked up.
    """
    names = {flag: getattr(args, flag.removeprefix("--"), None) for flag in NEEDED_PARTS}
    names = {flag: name for flag, name in names.items() if name}
    for flag, name in names.items():
        check_file_or_folder(flag, name)
    files = [flag for flag, name in names.items() if Path(name).expanduser().is_file()]
    if args.single_file_config and not files:
        raise InputError("--single_file_config: no model flag names a .safetensors file; drop --single_file_config")
    if args.single_file_config:
        check_config_folder(args, files)


# -----------------------------------------------------------------------------
# 3 Conversion
# -----------------------------------------------------------------------------


def unet_config(tensors, config):
    """Returns `config` with the input sizes that the UNet's tensors have, and the refiner's layout if it is one.

    The tensors have their original names or diffusers'.
    """
    shapes = {name.removeprefix(PREFIXES["UNet"]): tensor.shape for name, tensor in tensors.items()}
    first, label = "input_blocks.0.0.weight", "label_emb.0.0.weight"
    if first not in shapes:
        first, label = "conv_in.weight", "add_embedding.linear_1.weight"
    if config["block_out_channels"] == [320, 640, 1280] and shapes[first][0] == 384:
        config = config | REFINER_UNET
    width = next(shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight"))
    return config | {"cross_attention_dim": width, "projection_class_embeddings_input_dim": shapes[label][1]}


def part_dtype(tensors, part):
    """Returns the dtype of a part's largest tensor."""
    named = [tensor for name, tensor in tensors.items() if name.startswith(PREFIXES[part])]
    return max(named or tensors.values(), key=lambda tensor: tensor.numel()).dtype


def load_clip(tensors, part, options):
    """Returns one of the two text encoders of a checkpoint."""
    from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    model_class = CLIPTextModel if part == "first text encoder" else CLIPTextModelWithProjection
    return create_diffusers_clip_model_from_ldm(model_class, tensors, **options)


def read_part(tensors, part, folder):
    """Returns one part of a checkpoint as a model, with the configuration in `folder`.

    Raises ValueError if the checkpoint lacks some of the part's tensors.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel

    options = {"config": str(folder), "torch_dtype": part_dtype(tensors, part), "local_files_only": True}
    try:
        if part == "UNet":
            model = UNet2DConditionModel.from_single_file(tensors, **options)
        elif part == "VAE":
            model = AutoencoderKL.from_single_file(tensors, **options)
        else:
            model = load_clip(tensors, part, options)
    except NotImplementedError as error:  # a parameter that got no value is on the meta device
        raise ValueError(f"tensors of its {part} are missing") from error
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(f"tensors of its {part} are missing")
    return model


def save_part(model, part, folder):
    """Saves a converted part beside its configuration."""
    import safetensors.torch

    if part in ("UNet", "VAE"):
        model.save_pretrained(folder, max_shard_size="2GB")  # it keeps a copy of one shard in memory
    else:  # transformers' save_pretrained() writes nothing on ranks other than 0
        safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})


def read_config(part, config_folder):
    """Returns SDXL's own configuration of a part, or the one in `config_folder`."""
    if config_folder is None:
        return SDXL_CONFIGS[FOLDERS[part]]
    return json.loads((config_folder / FOLDERS[part] / "config.json").read_text())


def convert_checkpoint(flag, path, folder, config_folder=None):
    """Converts the checkpoint file of `flag` and writes it to `folder`: a snapshot, a VAE or a UNet."""
    import safetensors.torch

    tensors = safetensors.torch.load_file(path)  # mapped into memory: read when they are used
    if flag == BASE_FLAG:
        write_configs(folder, read_markers(path), config_folder)
    for part in NEEDED_PARTS[flag]:
        target = folder if flag == "--pretrained_vae_model_name_or_path" else folder / FOLDERS[part]
        config = read_config(part, config_folder)
        if part == "UNet":
            config = unet_config(tensors, config)
        write_json(target / "config.json", config)
        save_part(read_part(tensors, part, target), part, target)


def snapshot_name(flag, path, config_folder):
    """Returns a hash of what a conversion depends on: size, date and header of the file, and the configurations."""
    state = path.stat()
    configs = []
    if config_folder is not None:
        configs = sorted(p for p in config_folder.rglob("*") if p.suffix in (".json", ".txt") and p.is_file())
    described = [(str(p.relative_to(config_folder)), p.read_text(errors="replace")) for p in configs]
    seen = [CONVERTER_VERSION, NEEDED_PARTS[flag], state.st_size, state.st_mtime_ns, read_header(path), described]
    return f"{data.hash_text(json.dumps(seen)):016x}"


def convert_once(flag, path, folder, config_folder):
    """Converts a checkpoint file to `folder`, unless that exists. Other processes that need it wait meanwhile."""
    partial_folder = folder.with_suffix(".partial")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder.with_suffix(".lock")):
        if folder.exists():
            return
        logger.info("%s: converting %s once, to %s", flag, path, folder)
        shutil.rmtree(partial_folder, ignore_errors=True)  # left by a killed process
        try:
            convert_checkpoint(flag, path, partial_folder, config_folder)
            for file in filter(Path.is_file, partial_folder.rglob("*")):
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
            partial_folder.rename(folder)
        finally:
            shutil.rmtree(partial_folder, ignore_errors=True)


def find_snapshot(flag, name, cache_dir, config_folder=None):
    """Returns the folder or hub id of the model that `flag` names. A checkpoint file is first converted to a folder.

    That is done once; the folder is cache_dir/snapshots/HASH. Raises InputError, which names `flag`, if the file
    cannot be used.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        return name
    config_folder = Path(config_folder).expanduser() if config_folder else None
    try:
        check_checkpoint_file(flag, path)
        folder = Path(cache_dir).absolute() / "snapshots" / snapshot_name(flag, path, config_folder)
        convert_once(flag, path, folder, config_folder)
    except (InputError, OSError) as error:
        raise InputError(f"{flag}: {path}: {short_reason(error)}") from error
    except Exception as error:  # the libraries raise all kinds of errors for tensors that do not fit
        remedy = "if its sizes differ from SDXL's, give --single_file_config"
        raise InputError(f"{flag}: {path}: {short_reason(error)}; {remedy}") from error
    return str(folder)
