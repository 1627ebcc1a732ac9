"""Layers and kernels that make training faster or smaller. Except in section 2, results differ only by rounding.

The sections; each calls only what is above it:
     1 LoRA layers        fp32 adapters in a model of another precision
     2 Quantization       --base_precision nf4 and int8
     3 Attention          --attention_backend
     4 Memory and graphs  --gradient_checkpointing and --compile
train_sdxl_lora.py imports this file after the flags have been checked, because torch is slow to import.
"""

import logging

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from peft.tuners import lora
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdxl_data import InputError
from sdxl_single_file import short_reason

RECOMPILE_LIMIT = 512  # graphs a block may have under --compile: two widths for every shape of --crop bucket

logger = logging.getLogger("train_sdxl_lora.speed")

# -----------------------------------------------------------------------------
# 1 LoRA layers
# -----------------------------------------------------------------------------


class FusedLora(lora.Linear):
    """PEFT's LoRA layer, y = x W^T + b + s (x A^T) B^T (arXiv:2106.09685), with a fused last step.

    One kernel multiplies x A^T by B^T, scales the product by s and adds it to x W^T + b. x has shape (…, in), y has
    shape (…, out). A and B are stored in fp32 and cast to the dtype of x.
    """

    def forward(self, x, *args, **kwargs):
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        (name,) = self.active_adapters
        down = self.lora_A[name].weight.to(x.dtype)  # (rank, in)
        up = self.lora_B[name].weight.to(x.dtype)  # (out, rank)
        hidden = F.linear(self.lora_dropout[name](x), down)
        result = self.base_layer(x, *args, **kwargs)
        flat = torch.addmm(result.flatten(0, -2), hidden.flatten(0, -2), up.t(), alpha=self.scaling[name])
        return flat.view_as(result)


class CastLinear(torch.nn.Linear):
    """Linear layer with fp32 weights. Its forward() casts them to the dtype of the input."""

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


# -----------------------------------------------------------------------------
# 2 Quantization
# -----------------------------------------------------------------------------


class DequantizedProduct(torch.autograd.Function):
    """Computes x W^T + b, where W is stored as int8 with one scale per row. Backward needs W but not x.

    W has shape (out, in) and the scales have shape (out, 1). bitsandbytes' int8 layer would keep x in memory, even
    with checkpointing, and would round x to int8 on CUDA.
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
    """A frozen Linear with int8 weights and one scale per row."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, device="meta")
        weight = linear.weight.detach().float()
        self.register_buffer("scale", weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127)
        self.weight = torch.nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        return DequantizedProduct.apply(x, self.weight, self.scale, self.bias)


def make_nf4_linear(linear, compute_dtype):
    """Converts a linear layer to bitsandbytes' nf4 layer. Raises InputError if bitsandbytes cannot be imported."""
    try:
        import bitsandbytes.nn as bnb
    except ImportError as error:
        raise InputError(f"--base_precision: nf4 needs bitsandbytes, which does not load: {error}") from error
    shape = (linear.in_features, linear.out_features, linear.bias is not None)
    small = bnb.Linear4bit(*shape, compute_dtype=compute_dtype, quant_type="nf4", device="meta")
    small.weight = bnb.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    small.bias = linear.bias
    small.support_avx512bf16_for_cpu = False  # in eval() it would repack the weights permanently, without gradient
    return small


def quantize_linears(model, precision, compute_dtype):
    """Replaces each linear layer of `model` with an "nf4" (arXiv:2305.14314) or "int8" layer, as `precision` says."""
    for parent in list(model.modules()):
        for name, linear in parent.named_children():
            if type(linear) is torch.nn.Linear:
                small = Int8Linear(linear) if precision == "int8" else make_nf4_linear(linear, compute_dtype)
                setattr(parent, name, small)


# -----------------------------------------------------------------------------
# 3 Attention
# -----------------------------------------------------------------------------

SDPA_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH,
}  # fmt: skip


class SdpaAttention(AttnProcessor2_0):
    """diffusers' attention with one chosen PyTorch kernel. Recomputed activations use the same kernel."""

    def __init__(self, backend):
        super().__init__()
        self.backend = backend

    def __call__(self, *args, **kwargs):
        with sdpa_kernel(self.backend):
            return super().__call__(*args, **kwargs)


def set_attention(unet, name):
    """Sets the UNet's attention kernel to `name` and runs a small test. Raises InputError if the test fails."""
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
        found = f"{name} does not run here, on {unet.device.type} in {unet.dtype}"
        raise InputError(f"--attention_backend: {found}: {short_reason(error, 200)}") from error


# -----------------------------------------------------------------------------
# 4 Memory and graphs
# -----------------------------------------------------------------------------


def set_checkpointing(trained, mode, dropout):
    """Sets activation checkpointing in the trained models. With `dropout`, recomputation repeats the dropout masks."""

    def recompute(module, *inputs):
        options = {"use_reentrant": False, "preserve_rng_state": dropout, "determinism_check": "none"}
        return torch.utils.checkpoint.checkpoint(module.__call__, *inputs, **options)

    for name, model in trained.items():
        if name == "unet":
            model.enable_gradient_checkpointing(recompute)
            for module in model.modules():
                if mode == "none" or (mode == "blocks" and not isinstance(module, Transformer2DModel)):
                    module.gradient_checkpointing = False
        elif mode == "none":
            model.activation_checkpointing_disable()
        else:
            model.activation_checkpointing_enable()


def compile_blocks(unet):
    """Compiles the UNet's transformer blocks, separately for each batch shape.

    A kernel then depends only on the batch shape, so a resumed run uses the same kernels as before.
    """
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    torch._dynamo.config.optimize_ddp = False  # it would split blocks whose gradients exceed a DDP bucket
    try:
        torch.compile(lambda x: x.sin() + x.cos())(torch.zeros(8, device=unet.device))
    except Exception as error:  # whatever compilers raise
        logger.warning("--compile: continuing uncompiled: %s", short_reason(error, 200))
        return
    torch._dynamo.config.suppress_errors = True  # a block that fails later runs uncompiled too
    unet.compile_repeated_blocks(dynamic=False)
