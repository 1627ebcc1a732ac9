"""LoRA files for the demo's model as other programs write them, and what they do to weights, by the papers' formulas.

A LoRA is a dict from (model, module name) to the layer's tensors: "down", "up", perhaps "alpha" and "magnitude".
"""

import json
import re

import original_layout as original
import safetensors.torch
import torch
from diffusers import UNet2DConditionModel
from harness import SDXL
from transformers import CLIPTextModel, CLIPTextModelWithProjection

UNET_LAYERS = r"attn\d\.to_|ff\.net|proj_in|proj_out"  # of kohya's scripts
CONVOLUTIONS = r"conv|time_emb_proj"  # with conv_dim
ENCODER_LAYERS = r"self_attn|mlp"
KOHYA_PARTS = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}


def load_demo(dtype=torch.float32):
    """The demo's UNet and text encoders."""
    return {
        "unet": UNet2DConditionModel.from_pretrained(SDXL / "unet", torch_dtype=dtype),
        "text_encoder": CLIPTextModel.from_pretrained(SDXL / "text_encoder", dtype=dtype),
        "text_encoder_2": CLIPTextModelWithProjection.from_pretrained(SDXL / "text_encoder_2", dtype=dtype),
    }


def weights(models):
    """{(model, module name without text_model.): weight} of all linear and convolution layers."""
    return {
        (part, name.removeprefix("text_model.")): module.weight
        for part, model in models.items()
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
    }


def make_lora(layers, ranks=(2,), alphas=(2.0,), dora=False, seed=0):
    """Random adapters for {(model, module): weight}. Ranks and alphas take turns; alpha None: the file has none."""
    generator = torch.Generator().manual_seed(seed)
    lora = {}
    for n, (key, weight) in enumerate(layers.items()):
        rank, alpha = ranks[n % len(ranks)], alphas[n % len(alphas)]
        out, *rest = weight.shape
        down = torch.randn(rank, *rest, generator=generator).half()
        up = torch.randn(out, rank, *[1] * (weight.ndim - 2), generator=generator).half()
        lora[key] = {"down": down, "up": 0.05 * up}
        if alpha is not None:
            lora[key]["alpha"] = torch.tensor(alpha)
        if dora:
            norm = weight.float().flatten(1).norm(dim=1)
            lora[key]["magnitude"] = norm * (1 + 0.1 * torch.rand(out, generator=generator))
    return lora


def select(layers, **patterns):
    """Those of `layers` whose module name has a match of the pattern for its model."""
    return {key: value for key, value in layers.items() if re.search(patterns.get(key[0], r"^\b$"), key[1])}


def change_of(tensors, weight, scale=1.0, rslora=False):
    """The change of a weight: scale * alpha / rank * up down, or what DoRA makes of it (arXiv:2402.09353, eq. 5)."""
    rank = tensors["down"].shape[0]
    alpha = float(tensors.get("alpha", rank))
    down, up = tensors["down"].float().flatten(1), tensors["up"].float().flatten(1)
    delta = scale * alpha / (rank**0.5 if rslora else rank) * (up @ down).reshape(weight.shape)
    if "magnitude" not in tensors:
        return delta
    changed = weight.float() + delta
    norm = changed.flatten(1).norm(dim=1)
    return changed * (tensors["magnitude"] / norm).reshape(-1, *[1] * (weight.ndim - 1)) - weight.float()


def original_name(name):
    """The original checkpoint's name of a layer of the demo's UNet."""
    config = json.loads((SDXL / "unet/config.json").read_text())
    if name in original.UNET:
        return original.UNET[name]
    if name.startswith("mid_block."):
        _, group, number, rest = name.split(".", 3)
        name = f"middle_block.{1 if group == 'attentions' else 2 * int(number)}.{rest}"
    else:
        attention = ["Cross" in kind for kind in config["up_block_types"]]
        name = original.block_name(name + ".", config["layers_per_block"], lambda i: attention[i]).rstrip(".")
    if "transformer" not in name and ".1.proj" not in name:
        for old, new in original.RESNET.items():
            name = re.sub(rf"\.{old}$", f".{new}", name)
    return name


def write_kohya(path, lora, original_names=False, dtype=torch.float16):
    """As kohya's scripts: `lora_unet_…` with the original or diffusers' names, an alpha per layer, no other header."""
    tensors = {}
    for (part, name), values in lora.items():
        if part == "unet":
            name = original_name(name) if original_names else name
        else:
            name = f"text_model.{name}"
        layer = f"{KOHYA_PARTS[part]}_{name.replace('.', '_')}"
        tensors[f"{layer}.lora_down.weight"] = values["down"].to(dtype)
        tensors[f"{layer}.lora_up.weight"] = values["up"].to(dtype)
        if "alpha" in values:
            tensors[f"{layer}.alpha"] = values["alpha"].to(dtype)
        if "magnitude" in values:
            tensors[f"{layer}.dora_scale"] = values["magnitude"].reshape(-1, *[1] * (values["down"].ndim - 1))
    safetensors.torch.save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return path


def write_diffusers(path, lora, names=("lora_A.weight", "lora_B.weight"), prefix="{part}.", settings=None):
    """As diffusers; `names` and `prefix` for older versions and other programs, `settings` for the header."""
    tensors = {}
    for (part, name), values in lora.items():
        layer = prefix.format(part=part) + name
        for suffix, kind in zip(names, ("down", "up")):
            tensors[f"{layer}.{suffix}"] = values[kind].contiguous()
        if "magnitude" in values:
            tensors[f"{layer}.lora_magnitude_vector"] = values["magnitude"]
    header = {"format": "pt"} | ({"lora_adapter_metadata": json.dumps(settings)} if settings else {})
    safetensors.torch.save_file(tensors, path, header)
    return path
