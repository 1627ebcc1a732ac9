"""Writes a diffusers snapshot as one .safetensors file with the original names, as the files on Civitai have them."""

import json
import re

import safetensors.torch
import torch

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0"}
RESNET |= {"conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def load_part(folder):
    (file,) = folder.glob("*.safetensors")
    return safetensors.torch.load_file(file)


def block_name(name, layers, has_attention):
    """The original name of a resnet, an attention, a downsampler or an upsampler."""
    step = layers + 1
    where, i, kind, j, rest = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name).groups()
    i, j = int(i), int(j)
    if kind == "downsamplers":
        return f"input_blocks.{(i + 1) * step}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{i * step + layers}.{2 if has_attention(i) else 1}.{rest}"
    block = f"input_blocks.{1 + i * step + j}" if where == "down" else f"output_blocks.{i * step + j}"
    return f"{block}.{0 if kind == 'resnets' else 1}.{rest}"


def original_unet(folder, prefix="model.diffusion_model."):
    config = json.loads((folder / "config.json").read_text())
    found = {}
    for name, tensor in load_part(folder).items():
        module, _, kind = name.rpartition(".")
        if module in UNET:
            new = f"{UNET[module]}.{kind}"
        elif name.startswith("mid_block."):
            _, group, number, rest = name.split(".", 3)
            new = f"middle_block.{1 if group == 'attentions' else 2 * int(number)}.{rest}"
        else:
            new = block_name(name, config["layers_per_block"], lambda i: "Cross" in config["up_block_types"][i])
        for old, other in RESNET.items():
            if "attentions" not in name:
                new = re.sub(rf"\.{old}\.(weight|bias)$", rf".{other}.\1", new)
        found[prefix + new] = tensor
    return found


def original_vae(folder, prefix="first_stage_model."):
    count = len(json.loads((folder / "config.json").read_text())["block_out_channels"])
    found = {}
    for name, tensor in load_part(folder).items():
        new = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{count - 1 - int(match[1])}", name)
        new = re.sub(r"down_blocks\.(\d+)", r"down.\1", new)
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", new)
        new = re.sub(r"resnets\.(\d)", r"block.\1", new)
        new = new.replace("downsamplers.0.", "downsample.").replace("upsamplers.0.", "upsample.")
        new = new.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        attention = re.fullmatch(r"(.*)mid_block\.attentions\.0\.(.+)\.(weight|bias)", new)
        if attention:
            new = f"{attention[1]}mid.attn_1.{VAE_ATTENTION[attention[2]]}.{attention[3]}"
            if tensor.ndim == 2:
                tensor = tensor[:, :, None, None]  # these were convolutions
        found[prefix + new] = tensor
    return found


def original_clip(folder, prefix="conditioner.embedders.0.transformer.text_model."):
    return {prefix + name.removeprefix("text_model."): tensor for name, tensor in load_part(folder).items()}


def original_open_clip(folder, prefix="conditioner.embedders.1.model."):
    tensors = {name.removeprefix("text_model."): tensor for name, tensor in load_part(folder).items()}
    found = {
        "token_embedding.weight": tensors["embeddings.token_embedding.weight"],
        "positional_embedding": tensors["embeddings.position_embedding.weight"],
        "text_projection": tensors["text_projection.weight"].T,
        "logit_scale": torch.tensor(4.6),
    }
    for name, tensor in tensors.items():
        layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if name.startswith("final_layer_norm"):
            found[name.replace("final_layer_norm", "ln_final")] = tensor
        elif layer and layer[2] in OPEN_CLIP:
            found[f"transformer.resblocks.{layer[1]}.{OPEN_CLIP[layer[2]]}.{layer[3]}"] = tensor
        elif layer and layer[2] == "self_attn.q_proj":
            parts = [tensors[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            found[f"transformer.resblocks.{layer[1]}.attn.in_proj_{layer[3]}"] = torch.cat(parts)
    return {prefix + name: tensor for name, tensor in found.items()}


def original_checkpoint(snapshot):
    """All tensors of a base model's snapshot under their original names."""
    tensors = original_unet(snapshot / "unet") | original_vae(snapshot / "vae")
    return tensors | original_clip(snapshot / "text_encoder") | original_open_clip(snapshot / "text_encoder_2")


def write(path, tensors, **empty):
    """Writes a checkpoint file, with empty tensors of the names in `empty`."""
    markers = {name: torch.tensor([]) for name in empty}
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    safetensors.torch.save_file(tensors | markers, path, {"format": "pt"})
    return path
