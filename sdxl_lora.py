"""Write and read LoRA files: diffusers' format, and kohya's for ComfyUI and A1111.

The sections; each calls only what is above it:
     1 Writing    adapters of a training run → both files
     2 Reading    a file in any of the usual formats → what it holds, and PEFT adapters like it
     3 Merging    LoRAs added to frozen weights
train_sdxl_lora.py and evaluate.py import this file. torch, diffusers and peft are slow to import, so functions import
them, after the flags have been checked.
"""

import hashlib
import json
import math
import re
import struct
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import safetensors

import sdxl_data as data
from sdxl_data import LORA_FILE, InputError
from sdxl_single_file import PICKLES, read_header, short_reason

# -----------------------------------------------------------------------------
# 1 Writing
# -----------------------------------------------------------------------------

KOHYA_FILE = "pytorch_lora_weights_kohya.safetensors"  # the same adapters for ComfyUI and A1111; LORA_FILE: diffusers
PEFT_FILE = "adapter_model.safetensors"  # what PEFT's save_pretrained writes
KOHYA_PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}


def adapter_state_dict(trained):
    """Returns fp32 copies of the adapter tensors with diffusers' keys. Keys of text encoders contain `text_model.`."""
    import torch
    from peft import get_peft_model_state_dict

    state = {}
    for name, model in trained.items():
        for key, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items():
            if name != "unet":
                key = "text_model." + key.removeprefix("text_model.")
                # transformers reads DoRA's magnitudes under this name
                key = key.replace("lora_magnitude_vector", "lora_magnitude_vector.weight")
            state[f"{name}.{key}"] = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
    return state


def load_adapter_state_dict(trained, state):
    """Loads tensors from adapter_state_dict into the models. Raises ValueError if a key is missing or unknown."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    for name, model in trained.items():
        own = {k.removeprefix(name + "."): v for k, v in state.items() if k.startswith(name + ".")}
        own = {k.replace("lora_magnitude_vector.weight", "lora_magnitude_vector"): v for k, v in own.items()}
        if not hasattr(model, "text_model"):  # flattened in newer transformers
            own = {k.removeprefix("text_model."): v for k, v in own.items()}
        expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
        if set(own) != expected:
            raise ValueError(f"{name}: adapter tensors differ, e.g. {sorted(set(own) ^ expected)[:2]}")
        set_peft_model_state_dict(model, own)


def adapter_metadata(trained):
    """Returns the adapters' settings, such as rank and alpha, as diffusers expects them in a LoRA file's header."""
    fields = "r lora_alpha rank_pattern alpha_pattern lora_dropout target_modules use_dora use_rslora".split()
    metadata = {}
    for name, model in trained.items():
        for key in [*fields, "layers_to_transform"]:
            value = getattr(model.peft_config["default"], key)
            if value not in (None, {}):
                metadata[f"{name}.{key}"] = sorted(value) if isinstance(value, (set, list)) else value
    return metadata


def adapter_sizes(model):
    """Returns {name of a layer with an adapter: (rank, alpha)}, without the prefix `text_model.`."""
    from peft.tuners.lora import LoraLayer

    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    sizes = {name: (layer.r["default"], layer.lora_alpha["default"]) for name, layer in layers.items()}
    return {name.removeprefix("text_model."): size for name, size in sizes.items()}


def kohya_state_dict(trained, adapters):
    """Returns the tensors of adapter_state_dict under kohya's key names, which ComfyUI and A1111 read.

    Adds an alpha for each layer. These programs scale by alpha / rank, but rsLoRA scales by alpha / sqrt(rank). For
    rsLoRA, alpha * sqrt(rank) is stored instead.
    """
    import torch

    renamed = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
    renamed["lora_magnitude_vector"] = "dora_scale"
    sizes = {name: adapter_sizes(model) for name, model in trained.items()}
    state = {}
    for key, tensor in adapters.items():
        name, _, rest = key.replace("lora_magnitude_vector.weight", "lora_magnitude_vector").partition(".")
        suffix = next(s for s in renamed if rest.endswith(s))
        layer = f"{KOHYA_PREFIXES[name]}_{rest.removesuffix('.' + suffix).replace('.', '_')}"
        rank, alpha = sizes[name][rest.removesuffix("." + suffix).removeprefix("text_model.")]
        if trained[name].peft_config["default"].use_rslora:
            alpha *= math.sqrt(rank)
        if suffix == "lora_magnitude_vector":  # (out, 1) or, of a convolution, (out, 1, 1, 1)
            tensor = tensor[:, None] if tensor.ndim == 1 else tensor.transpose(0, 1)
        state[f"{layer}.{renamed[suffix]}"] = tensor.contiguous()
        state[f"{layer}.alpha"] = torch.tensor(float(alpha))
    return state


def describe_objective(scheduler):
    """Returns the LoRA header entries for v-prediction and zero terminal SNR; empty if neither applies."""
    metadata = {}
    if scheduler.prediction_type == "v_prediction":
        metadata |= {"modelspec.prediction_type": "v", "ss_v_parameterization": "True"}
    if scheduler.rescale_betas_zero_snr:
        metadata["ss_zero_terminal_snr"] = "True"
    return metadata


def lora_files(trained, stage, trigger_word, resolution, scheduler):
    """Copies the adapters. Returns {file name: function that writes the file} for both LoRA files.

    `resolution` is the side of the training images in px, `scheduler` the configuration of the scheduler that noise
    was added with.
    """
    adapters = adapter_state_dict(trained)
    config = trained["unet"].peft_config["default"]
    kohya = {
        "modelspec.architecture": f"stable-diffusion-xl-v1-{stage}/lora",
        "ss_base_model_version": f"sdxl_{stage}_v1-0",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "Dynamic" if config.rank_pattern else str(config.r),
        "ss_network_alpha": "Dynamic" if config.alpha_pattern else str(config.lora_alpha),
    }
    peft = {"lora_adapter_metadata": json.dumps(adapter_metadata(trained), sort_keys=True)}
    for metadata in (kohya, peft):
        metadata["modelspec.resolution"] = f"{resolution}x{resolution}"
        if trigger_word:
            metadata["modelspec.trigger_phrase"] = trigger_word
        metadata |= describe_objective(scheduler)
    return {
        LORA_FILE: partial(data.write_safetensors, tensors=adapters, metadata=peft),
        KOHYA_FILE: partial(data.write_safetensors, tensors=kohya_state_dict(trained, adapters), metadata=kohya),
    }


# -----------------------------------------------------------------------------
# 2 Reading
# -----------------------------------------------------------------------------

# how the name of a tensor ends → what it is in its layer
LORA_TENSORS = {"lora_A": "down", "lora.down": "down", "lora_linear_layer.down": "down", "lora_down": "down"}
LORA_TENSORS |= {"lora_B": "up", "lora.up": "up", "lora_linear_layer.up": "up", "lora_up": "up"}
LORA_TENSORS |= {"alpha": "alpha", "dora_scale": "magnitude", "lora_magnitude_vector": "magnitude"}
# how it begins → the model that it belongs to: diffusers, kohya, PEFT, ComfyUI, a file of one model
LORA_PREFIXES = {"unet.": "unet", "text_encoder.": "text_encoder", "text_encoder_2.": "text_encoder_2"}
LORA_PREFIXES |= {"lora_unet_": "unet", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}
LORA_PREFIXES |= {"base_model.model.": "unet", "diffusion_model.": "unet", "": "unet"}
# diffusers' names in the UNet → those of the original checkpoint
ORIGINAL_RESNET = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1"}
ORIGINAL_RESNET["conv_shortcut"] = "skip_connection"
ORIGINAL_LAYERS = {"conv_in": "input_blocks.0.0", "conv_out": "out.2"}
ORIGINAL_LAYERS |= {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
ORIGINAL_LAYERS |= {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}


@dataclass(frozen=True)
class LoraFile:
    """What the header of a LoRA file says. Layers have the file's names without prefixes, with `_` for every dot."""

    path: Path
    parts: dict  # "unet", "text_encoder" or "text_encoder_2" → layer → "down", "up", "alpha", … → name of the tensor
    shapes: dict  # name of a tensor → shape
    alphas: dict  # name of an alpha → value
    settings: dict  # of the adapters, as diffusers writes them: "unet.lora_alpha" and so on
    resolution: int | None  # side in px of the images that it was trained on, if the header says


def find_lora(path):
    """Returns the LoRA file in `path`, a run or checkpoint, or `path` itself. Raises ValueError if it is missing."""
    if not str(path):
        raise ValueError("the path is empty; give a .safetensors file, a run or a checkpoint")
    path = Path(path).expanduser()
    files = [path / LORA_FILE, path / PEFT_FILE] if path.is_dir() else [path]
    file = next(filter(Path.is_file, files), None)
    if file is None:
        raise ValueError(f"no LoRA file {files[0]}; give a .safetensors file, a run or a checkpoint")
    return file


def read_metadata(path, is_peft):
    """Returns the settings in a LoRA's header, such as "unet.lora_alpha", and the side in px of its training images.

    PEFT keeps the settings in adapter_config.json beside the file. The side is None if the header does not say it.
    """
    with safetensors.safe_open(path, "np") as file:
        metadata = file.metadata() or {}
    settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    if is_peft:
        config = path.with_name("adapter_config.json")
        if not config.is_file():
            raise InputError("does not give its alpha; put PEFT's adapter_config.json beside it")
        settings = json.loads(config.read_text())
    settings = settings if isinstance(settings, dict) else {}
    if "lora_alpha" in settings:  # a file of one model has no prefix
        settings = {f"unet.{name}": value for name, value in settings.items()}
    found = re.findall(r"\d+", metadata.get("modelspec.resolution") or metadata.get("ss_resolution") or "")
    return settings, round(math.sqrt(int(found[0]) * int(found[1]))) if len(found) == 2 else None


def parse_lora_key(key):
    """Returns (model, layer, kind) of a tensor in a LoRA file. Raises InputError if the name is not a LoRA's."""
    name = key.removesuffix(".weight").removesuffix(".default")
    # diffusers before version 0.22
    name = re.sub(r"\.processor\.(to_\w+)_lora\.", r".\1.lora.", name).replace(".to_out.lora.", ".to_out.0.lora.")
    prefix = next(prefix for prefix in LORA_PREFIXES if name.startswith(prefix))
    suffix = next((suffix for suffix in LORA_TENSORS if name.endswith("." + suffix)), None)
    if suffix is None or name.startswith("lora_te_"):
        raise InputError(f"holds {key}; expected a LoRA or DoRA of SDXL and nothing else")
    layer = name[len(prefix) : -len(suffix) - 1].replace(".", "_").removeprefix("text_model_")
    return LORA_PREFIXES[prefix], layer, LORA_TENSORS[suffix]


def read_numbers(path, names):
    """Returns {name: value} of tensors; needs no torch. Raises InputError if one is not a single number above 0."""
    formats = {"F64": "<d", "F32": "<f", "BF16": "<f", "F16": "<e", "I64": "<q", "I32": "<i", "I16": "<h", "U8": "<B"}
    numbers = {}
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        for name in names:
            dtype = header[name]["dtype"]
            start, end = header[name]["data_offsets"]
            file.seek(8 + size + start)
            content = file.read(end - start)
            if dtype == "BF16":  # the upper half of a float32
                content = b"\0\0" + content
            fits = dtype in formats and len(content) == struct.calcsize(formats[dtype])
            numbers[name] = struct.unpack(formats[dtype], content)[0] if fits else math.nan
            if not 0 < numbers[name] < math.inf:
                raise InputError(f"holds {name} = {numbers[name]} ({dtype}); expected one number above 0")
    return numbers


def read_lora_file(path):
    """Returns the LoraFile of a .safetensors file, run or checkpoint. Raises InputError if it cannot be used."""
    try:
        path = find_lora(path)
    except ValueError as error:
        raise InputError(str(error)) from error
    try:
        if path.suffix.lower() in PICKLES:
            raise InputError("is a pickle, which can run any code when it is opened; give a .safetensors file")
        if path.suffix.lower() != ".safetensors":
            raise InputError("is no .safetensors file; give one, a run or a checkpoint")
        header = read_header(path)
        settings, resolution = read_metadata(path, any(key.startswith("base_model.model.") for key in header))
        parts = {}
        for key in header:
            part, layer, kind = parse_lora_key(key)
            parts.setdefault(part, {}).setdefault(layer, {})[kind] = key
        half = [keys for layers in parts.values() for keys in layers.values() if not {"down", "up"} <= keys.keys()]
        if half or not parts:
            found = f"only {', '.join(half[0].values())} of a layer" if half else "no tensors"
            raise InputError(f"holds {found}; expected both matrices of every layer")
        alphas = read_numbers(path, [key for key in header if key.endswith(".alpha")])
    except InputError as error:
        raise InputError(f"{path} {error}") from error
    except (ValueError, struct.error) as error:
        raise InputError(f"{path} is damaged: {short_reason(error)}; download it again") from error
    return LoraFile(path, parts, {key: shape for key, (_, shape) in header.items()}, alphas, settings, resolution)


def check_lora(flag, path, part=None):
    """Raises InputError, which names `flag`, if a LoRA cannot be used or has nothing for the model `part`."""
    if path is None:
        return
    try:
        file = read_lora_file(path)
    except InputError as error:
        raise InputError(f"{flag}: {error}") from error
    if part and part not in file.parts:
        raise InputError(f"{flag}: {path} has no {part} part; train the base with --train_text_encoder")


def layer_size(file, part, layer, use_rslora):
    """Returns (rank, alpha) of a layer; with `use_rslora`, alpha is the value that gives rsLoRA the layer's scale.

    A layer without an alpha has a scale of 1, as in diffusers, kohya's scripts and ComfyUI.
    """
    keys = file.parts[part][layer]
    rank = file.shapes[keys["down"]][0]
    is_rslora = False
    if "alpha" in keys:
        alpha = file.alphas[keys["alpha"]]
    elif file.settings.get(f"{part}.lora_alpha"):
        is_rslora = bool(file.settings.get(f"{part}.use_rslora"))
        patterns = file.settings.get(f"{part}.alpha_pattern") or {}
        name = re.sub(r"^(unet|text_encoder|text_encoder_2|base_model\.model)\.|\.lora.*", "", keys["down"])
        matching = (key for key in patterns if re.match(rf"(.*\.)?({key})$", name))  # as PEFT: the first one counts
        alpha = patterns.get(next(matching, None), file.settings[f"{part}.lora_alpha"])
    else:
        alpha = rank / math.sqrt(rank) if use_rslora else rank
        is_rslora = use_rslora
    if use_rslora != is_rslora:
        alpha = alpha / math.sqrt(rank) if use_rslora else alpha * math.sqrt(rank)
    return rank, float(alpha)


def is_dora(file, part):
    """Returns whether a model's adapters are DoRA. Raises InputError if only some of them are."""
    layers = file.parts[part].values()
    count = sum("magnitude" in keys for keys in layers)
    if 0 < count < len(layers):
        raise InputError(f"{file.path}: {count} of {len(layers)} layers are DoRA; expected all or none")
    return count > 0


def common_size(sizes):
    """Returns the commonest rank and the commonest alpha of layers. `sizes` are pairs from layer_size."""
    rank, alpha = (Counter(values).most_common(1)[0][0] for values in zip(*sizes))
    return rank, alpha


def lora_flags(path, use_rslora=None):
    """Returns {name of a trainer's flag: value} for adapters like those in a LoRA file.

    If `use_rslora` is None, the file decides. Raises InputError if the file cannot be used.
    """
    file = read_lora_file(path)
    if use_rslora is None:
        use_rslora = any(file.settings.get(f"{part}.use_rslora") for part in file.parts)
    flags = {"use_rslora": use_rslora, "use_dora": True in {is_dora(file, part) for part in file.parts}}
    for part, layers in file.parts.items():
        rank, alpha = common_size([layer_size(file, part, layer, use_rslora) for layer in layers])
        if part == "unet":
            flags |= {"rank": rank, "lora_alpha": alpha}
        else:
            flags |= {"train_text_encoder": True, "text_encoder_rank": rank, "text_encoder_alpha": alpha}
    return flags


def original_name(name, layers_per_block, is_attention_block):
    """Returns the original checkpoint's name for a layer of the UNet that diffusers calls `name`.

    is_attention_block[i] says whether the UNet's up block i has attention layers.
    """
    match = re.fullmatch(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.+)", name)
    if match is None:
        return ORIGINAL_LAYERS.get(name, name)
    where, kind, layer = match[1], match[3], ORIGINAL_RESNET.get(match[5], match[5])
    block, number = int(match[2] or 0), int(match[4])
    if where == "mid":
        return f"middle_block.{1 if kind == 'attentions' else 2 * number}.{layer}"
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * (layers_per_block + 1)}.0.op"
    if kind == "upsamplers":
        place = 2 if is_attention_block[block] else 1
        return f"output_blocks.{block * (layers_per_block + 1) + layers_per_block}.{place}.conv"
    place = block * (layers_per_block + 1) + number
    group = f"input_blocks.{place + 1}" if where == "down" else f"output_blocks.{place}"
    return f"{group}.{1 if kind == 'attentions' else 0}.{layer}"


def list_layers(part, model):
    """Returns {name in LoRA files: (module name, weight shape)} of a model's linear and convolution layers."""
    import torch

    layers = {}
    attention = [hasattr(block, "attentions") for block in model.up_blocks] if part == "unet" else []
    for name, module in model.named_modules():
        if ".lora_" in name or name.endswith(".base_layer"):  # parts of a layer that has an adapter already
            continue
        module = getattr(module, "base_layer", module)
        if isinstance(module, torch.nn.Linear):
            shape = (module.out_features, module.in_features)  # a quantized weight has another shape
        elif isinstance(module, torch.nn.Conv2d):
            shape = tuple(module.weight.shape)
        else:
            continue
        layers[name.removeprefix("text_model.").replace(".", "_")] = name, shape
        if part == "unet":
            original = original_name(name, model.config.layers_per_block, attention)
            layers[original.replace(".", "_")] = name, shape
    return layers


def find_layers(file, part, model):
    """Returns {layer of the file: module name}. Raises InputError if the file's layers do not fit the model."""
    known = list_layers(part, model)
    names = {}
    for layer, keys in file.parts[part].items():
        if layer not in known:
            raise InputError(
                f"{file.path} does not fit this {part}, which has no layer {layer}; is it for another model?"
            )
        name, shape = known[layer]
        rank = file.shapes[keys["down"]][0]
        expected = {"down": rank * math.prod(shape[1:]), "up": rank * shape[0], "magnitude": shape[0]}
        for kind in expected.keys() & keys.keys():
            found = file.shapes[keys[kind]]
            # magnitudes per row are (out,), (out, 1, …) or PEFT's (1, out, 1, 1); LyCORIS's (1, in) are per column
            is_row = kind != "magnitude" or len(found) == 1 or found[0] == shape[0] or len(found) == 4
            if math.prod(found) != expected[kind] or not is_row:
                found, own = (" × ".join(map(str, size)) for size in (found, shape))
                raise InputError(f"{file.path} does not fit this {part}: {keys[kind]} is {found}, the layer is {own}")
        names[layer] = name
    if len(set(names.values())) < len(names):
        raise InputError(f"{file.path} has two adapters for one layer")
    return names


def check_parts(flag, file, parts):
    """Raises InputError, which names `flag`, if a LoRA has adapters for a model that is not one of `parts`."""
    unused = sorted(file.parts.keys() - set(parts))
    if unused:
        raise InputError(f"{flag}: {file.path} has adapters of {', '.join(unused)}, which are not used here")


def match_targets(model, names, target_modules, layers_to_transform=None):
    """Returns whether these settings of PEFT's LoraConfig give adapters to exactly the modules in `names`."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    config = LoraConfig(target_modules=target_modules, layers_to_transform=layers_to_transform)
    return {name for name, _ in model.named_modules() if check_target_module_exists(config, name)} == set(names)


def adapter_options(file, part, model, use_rslora):
    """Returns the options for PEFT's LoraConfig that give `model` the adapters of a LoRA file.

    Raises InputError if the file does not fit the model.
    """
    names = find_layers(file, part, model)
    sizes = {name: layer_size(file, part, layer, use_rslora) for layer, name in names.items()}
    rank, alpha = common_size(sizes.values())
    short = {name: name.removeprefix("text_model.") for name in sizes}  # not in all versions of transformers
    options = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {short[name]: size[0] for name, size in sizes.items() if size[0] != rank},
        "alpha_pattern": {short[name]: size[1] for name, size in sizes.items() if size[1] != alpha},
        "use_dora": is_dora(file, part),
        "use_rslora": use_rslora,
    }
    targets = {key: file.settings.get(f"{part}.{key}") for key in ("target_modules", "layers_to_transform")}
    if not isinstance(targets["target_modules"], list) or not match_targets(model, names.values(), **targets):
        targets = {"target_modules": list(names.values())}
    return options | targets


def load_lora(file, part, model, adapter="default"):
    """Copies a model's part of a LoRA file into adapters made with adapter_options. Raises InputError for NaN."""
    with safetensors.safe_open(file.path, "pt") as tensors:
        for layer, name in find_layers(file, part, model).items():
            module = model.get_submodule(name)
            own = {"down": module.lora_A, "up": module.lora_B, "magnitude": module.lora_magnitude_vector}
            keys = file.parts[part][layer]
            for kind in own.keys() & keys.keys():
                weight = own[kind][adapter].weight.data
                weight.copy_(tensors.get_tensor(keys[kind]).reshape(weight.shape))
                if not weight.isfinite().all():
                    raise InputError(f"{file.path}: {keys[kind]} has a NaN or infinite value")


def attach_lora(file, part, model, adapter, scale, dtype=None):
    """Adds a LoRA file's adapters to a model, `scale` times as strong, in the model's dtype or in `dtype`.

    Raises InputError if the file does not fit.
    """
    import peft
    from peft.tuners.lora import LoraLayer

    config = peft.LoraConfig(**adapter_options(file, part, model, use_rslora=False))
    vars(model).pop("peft_config", None)  # of the adapter before; PEFT would warn of it
    peft.inject_adapter_in_model(config, model, adapter)
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and adapter in layer.scaling:
            layer.scaling[adapter] *= scale
            for own in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
                own.to(dtype)
    load_lora(file, part, model, adapter)


def hash_file(path):
    """Returns the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -----------------------------------------------------------------------------
# 3 Merging
# -----------------------------------------------------------------------------


def merge_layers(model):
    """Merges the adapters of a model's layers into their weights, in fp32, and takes the adapters off."""
    from peft.tuners.lora import LoraLayer

    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    for name, layer in layers.items():
        base = layer.get_base_layer()
        dtype = base.weight.dtype
        base.float()
        for adapter in list(layer.scaling):
            layer.merge(adapter_names=[adapter])
            layer.merged_adapters.clear()  # or PEFT would compute the next DoRA's norm without this one
        parent, _, own_name = name.rpartition(".")
        setattr(model.get_submodule(parent), own_name, base.to(dtype))
    del model.peft_config


def merge_into(part, model, merges):
    """Adds LoRAs to the weights of one model. Raises InputError if one does not fit."""
    import torch

    merges = [(file, scale) for file, scale in merges if part in file.parts]
    for file, _ in merges:
        find_layers(file, part, model)
    if not merges or next(model.parameters()).is_meta:
        return
    for number, (file, scale) in enumerate(merges):
        attach_lora(file, part, model, f"merged_{number}", scale, torch.float32)
    merge_layers(model)


def merge_loras(flag, models, merges):
    """Adds LoRAs to the weights of `models`, keyed by "unet" and so on. `merges` are pairs (LoraFile, scale).

    The sum is rounded once, to the dtype of the weights. Models on the meta device are only checked. Raises an
    InputError that names `flag` if a file does not fit.
    """
    for part, model in models.items():
        try:
            merge_into(part, model, merges)
        except InputError as error:
            raise InputError(f"{flag}: {error}") from error


def parse_merge(text):
    """Returns (path, scale) of a --merge_lora value, FILE or FILE:SCALE. Raises ValueError for a scale of 0 or inf."""
    path, colon, scale = text.rpartition(":")
    try:
        scale = float(scale)
    except ValueError:
        return text, 1.0
    if not colon or Path(text).expanduser().exists():
        return text, 1.0
    if scale == 0 or not math.isfinite(scale):
        raise ValueError(f"the scale of {text} is {scale}; expected a finite number other than 0")
    return path, scale


def read_merges(values):
    """Returns a list of (LoraFile, scale) for the values of --merge_lora. Raises InputError, which names the flag."""
    try:
        return [(read_lora_file(path), scale) for path, scale in map(parse_merge, values or ())]
    except ValueError as error:
        raise InputError(f"--merge_lora: {error}") from error


def list_merges(values):
    """Returns [SHA-256, scale] for each value of --merge_lora."""
    return [[hash_file(file.path), scale] for file, scale in read_merges(values)]


def merge_given_loras(values, models):
    """Merges the LoRAs of --merge_lora into `models`. Returns list_merges. Raises InputError if one does not fit."""
    merges = read_merges(values)
    for file, _ in merges:
        check_parts("--merge_lora", file, models)
    merge_loras("--merge_lora", models, merges)
    return list_merges(values)


def merge_code(values):
    """Returns the model card's lines that merge the LoRAs of --merge_lora into a pipeline; "" without any.

    A comment warns of the files that diffusers reads differently: kohya's with DoRA, or with alphas that differ.
    """
    code = ""
    for path, scale in map(parse_merge, values or ()):
        try:
            file = read_lora_file(path)
            if len(set(file.alphas.values())) > 1 or any("dora_scale" in key for key in file.shapes):
                code += "# diffusers reads this file only in part; evaluate.py --merge_lora reads all of it\n"
        except InputError as error:  # it was there when the run began
            code += f"# {error}\n"
        code += f"pipeline.load_lora_weights({json.dumps(path)})\npipeline.fuse_lora(lora_scale={scale})\n"
        code += "pipeline.unload_lora_weights()\n"
    return code
