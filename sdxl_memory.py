"""What a training step needs of its device: memory and time, known before any weights are loaded.

Models on the meta device have shapes but no data, and their tensors have lifetimes. So a whole step can be run there,
forward and backward, in two to four seconds for SDXL, while the bytes of all tensors that exist are counted.

The sections; each calls only what is above it:
     1 Simulation  bytes and operations of a step, of encoding and decoding an image
     2 Device      free memory and speed
     3 Plan        which --gradient_checkpointing fits, and which --train_batch_size
"""

import time
import weakref
from argparse import Namespace
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import sdxl_speed
from sdxl_data import InputError

CHECKPOINTING = ["none", "blocks", "full"]  # from fast and large to slow and small
MOMENT_BYTES = {"adamw": 8, "adamw8bit": 2, "prodigy": 16}  # of the optimizer's state, per trained parameter
QUANTIZED_BYTES = {"nf4": 0.56, "int8": 1.0}  # per weight of a linear layer, with its scales
# Free memory must exceed the simulated bytes by this factor and this many bytes, for fragmentation and the libraries'
# workspaces. A guess, because nothing was measured on a GPU yet.
MARGIN = (1.05, 0.3e9)

# -----------------------------------------------------------------------------
# 1 Simulation
# -----------------------------------------------------------------------------


class PeakMemory(TorchDispatchMode):
    """Context manager that counts the bytes of all new tensors. `peak` is their maximum; views are not counted."""

    def __init__(self):
        super().__init__()
        self.sizes = {}
        self.now = 0
        self.peak = 0

    def add(self, storage):
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key)

    def drop(self, key):
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        inputs = {tensor.untyped_storage()._cdata for tensor in tree_leaves(args) if isinstance(tensor, torch.Tensor)}
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in inputs:
                self.add(tensor.untyped_storage())
        return output


@contextmanager
def fused_attention():
    """Context manager for a fused attention kernel. Without it, the meta device computes and keeps all scores."""

    def attention(query, key, value, **options):
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]

    with mock.patch.object(F, "scaled_dot_product_attention", attention):
        yield


def run_forward(unet, text_encoders, time_ids, batch_size, resolution, chunks=1):
    """Returns the UNet's output on the meta device. `text_encoders` are only those with adapters.

    `time_ids` is the number of values in add_time_ids, and `chunks` the number of caption chunks of 77 tokens.
    """
    config = unet.config
    side = resolution // 8
    with torch.device("meta"):
        tokens = torch.empty(batch_size * chunks, 77, dtype=torch.long)
        latents = torch.empty(batch_size, config.in_channels, side, side, dtype=unet.dtype)
        prompt_embeds = torch.empty(batch_size, 77 * chunks, config.cross_attention_dim, dtype=unet.dtype)
        pooled = config.projection_class_embeddings_input_dim - time_ids * config.addition_time_embed_dim
        conditions = {"text_embeds": torch.empty(batch_size, pooled, dtype=unet.dtype)}
        conditions["time_ids"] = torch.empty(batch_size, time_ids)
        timesteps = torch.empty(batch_size)
    for encoder in text_encoders:  # the sum connects it to the UNet, as its embeddings do
        hidden_states = encoder(tokens, output_hidden_states=True).hidden_states[-2]
        prompt_embeds = prompt_embeds + hidden_states.unflatten(0, (-1, chunks)).flatten(1, 2).mean(-1, keepdim=True)
    return unet(latents, timesteps, prompt_embeds, added_cond_kwargs=conditions).sample


def run_step(unet, text_encoders, *shape):
    """Runs forward and backward of a training step on the meta device, as run_forward() does."""
    run_forward(unet, text_encoders, *shape).float().square().mean().backward()
    for model in (unet, *text_encoders):
        model.zero_grad()


def step_memory(unet, text_encoders, *shape, backend="sdpa"):
    """Returns the bytes that run_step() needs at most beside the weights: activations and gradients."""
    attention = nullcontext() if backend == "math" else fused_attention()
    with attention, PeakMemory() as memory:
        run_step(unet, text_encoders, *shape)
    return memory.peak


def step_flop(unet, text_encoders, *shape):
    """Returns the number of floating-point operations in run_step()."""
    with fused_attention(), FlopCounterMode(display=False) as counter:
        run_step(unet, text_encoders, *shape)
    return counter.get_total_flops()


def inference_memory(unet, *shape):
    """Returns the bytes that the UNet needs to denoise, beside its weights."""
    with torch.no_grad(), fused_attention(), PeakMemory() as memory:
        run_forward(unet, [], *shape)
    return memory.peak


def vae_costs(vae, resolution):
    """Returns three numbers for an image: bytes to encode it, FLOP to encode it, and bytes to decode it."""
    with torch.device("meta"):
        pixel_values = torch.empty(1, vae.config.in_channels, resolution, resolution, dtype=vae.dtype)
        latents = torch.empty(1, vae.config.latent_channels, resolution // 8, resolution // 8, dtype=vae.dtype)
    with torch.no_grad(), fused_attention():
        with PeakMemory() as encoding, FlopCounterMode(display=False) as counter:
            vae.encode(pixel_values)
        with PeakMemory() as decoding:
            vae.decode(latents)
    return encoding.peak, counter.get_total_flops(), decoding.peak


def weight_bytes(model, precision="auto"):
    """Returns the bytes of a model's frozen weights when its linear layers have --base_precision `precision`."""
    size = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    if precision != "auto":
        linears = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear) and not m.weight.requires_grad]
        saved = model.dtype.itemsize - QUANTIZED_BYTES[precision]
        size -= int(saved * sum(weight.numel() for weight in linears))
    return size


# -----------------------------------------------------------------------------
# 2 Device
# -----------------------------------------------------------------------------


def free_memory(device):
    """Returns the bytes of free memory on a CUDA device, or None for other devices."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def measure_matmul(device, dtype):
    """Measures the FLOP/s of a large matrix product, an upper bound for the speed of training."""
    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device).to(dtype)
    (a @ a @ a)[0, 0].item()  # warm-up
    start = time.perf_counter()
    count = 0
    while count < 2 or time.perf_counter() - start < 0.3:
        (a @ a)[0, 0].item()  # waits for the result
        count += 1
    return 2 * side**3 * count / (time.perf_counter() - start)


# -----------------------------------------------------------------------------
# 3 Plan
# -----------------------------------------------------------------------------


@dataclass
class Shapes:
    """Models on the meta device, and what else a step's memory depends on."""

    unet: torch.nn.Module
    text_encoders: list
    vae: torch.nn.Module
    samplers: list  # models that are used for sample images only
    trained: dict  # of the UNet and the text encoders, those with adapters, by name
    time_ids: int  # numbers in add_time_ids
    chunks: int  # of 77 tokens, per caption
    images_at_once: int  # that the VAE encodes
    processes: int


@dataclass
class Needs:
    """Bytes that a process needs on its device. `step`, `encoding` and `samples` are never needed at the same time."""

    frozen_weights: int
    adapters: int  # with the optimizer's state, and with gradients if they are kept from one backward to the next
    step: int  # activations and gradients
    encoding: int  # of images by the VAE
    samples: int  # sample images: decoding, and models that wait on the CPU otherwise

    @property
    def always(self):
        return self.frozen_weights + self.adapters

    @property
    def peak(self):
        return self.always + max(self.step, self.encoding, self.samples)

    def fits(self, free):
        """Returns whether training fits with a margin, and drawing sample images without."""
        return self.with_margin <= free and self.always + self.samples <= free

    @property
    def with_margin(self):
        return MARGIN[0] * (self.always + max(self.step, self.encoding)) + MARGIN[1]


def estimate_samples(args, shapes):
    """Returns the bytes that sample images need at most, beside the models that training uses as well."""
    if not args.validation_prompt and not args.validation_prompts:
        return 0
    _, _, decoding = vae_costs(shapes.vae, args.resolution)
    denoising = inference_memory(shapes.unet, shapes.time_ids, 2, args.resolution)  # 2: guided and unguided
    denoising += sum(map(weight_bytes, shapes.samplers))
    if args.cache_text_embeddings:
        denoising += sum(map(weight_bytes, shapes.text_encoders))
    vae = weight_bytes(shapes.vae) if args.cache_latents else 0
    return max(denoising, decoding) + vae


def estimate_needs(args, shapes, mode):
    """Returns the Needs of a run with --gradient_checkpointing `mode`."""
    sdxl_speed.set_checkpointing(shapes.trained, mode, args.lora_dropout > 0)
    frozen = weight_bytes(shapes.unet, args.base_precision)
    encoding = 0
    if not args.cache_latents:
        frozen += weight_bytes(shapes.vae)
        encoding = vae_costs(shapes.vae, args.resolution)[0] * min(args.train_batch_size, shapes.images_at_once)
    if not args.cache_text_embeddings:
        frozen += sum(map(weight_bytes, shapes.text_encoders))
    keeps_gradients = shapes.processes > 1 or args.gradient_accumulation_steps > 1
    per_parameter = 4 + MOMENT_BYTES[args.optimizer] + 4 * keeps_gradients
    count = sum(p.numel() for model in shapes.trained.values() for p in model.parameters() if p.requires_grad)
    encoders = [model for name, model in shapes.trained.items() if name != "unet"]
    size = (shapes.time_ids, args.train_batch_size, args.resolution, shapes.chunks)
    return Needs(
        frozen_weights=frozen,
        adapters=count * per_parameter,
        step=step_memory(shapes.unet, encoders, *size, backend=args.attention_backend),
        encoding=encoding,
        samples=estimate_samples(args, shapes),
    )


def smaller_batch(args, shapes, mode, free):
    """Returns the flags for the largest batch that fits and keeps the global batch, or None if there is none."""
    images = args.train_batch_size * args.gradient_accumulation_steps
    for batch_size in range(args.train_batch_size - 1, 0, -1):
        if images % batch_size == 0:
            flags = {"train_batch_size": batch_size, "gradient_accumulation_steps": images // batch_size}
            if estimate_needs(Namespace(**vars(args) | flags), shapes, mode).fits(free):
                return " ".join(f"--{name} {value}" for name, value in flags.items())
    return None


def refuse(args, shapes, mode, need, free):
    """Raises InputError because a run does not fit in `free` bytes. The message says what does."""
    available = f"{free / 1e9:.2f} GB of device memory are free"
    drawing = need.always + need.samples
    if need.always <= free < drawing:
        found = f"drawing sample images needs {drawing / 1e9:.2f} GB (simulated), {available}"
        raise InputError(f"--validation_prompt: {found}; leave the prompts out")
    smaller = smaller_batch(args, shapes, mode, free)
    remedies = [f"give {smaller}"] if smaller else ["not even one image fits; give a smaller --rank or --resolution"]
    if args.gradient_checkpointing in ("none", "blocks"):
        remedies.insert(0, "give --gradient_checkpointing auto")
    if not smaller:
        flags = {"cache_latents": True, "cache_text_embeddings": True, "use_8bit_adam": True, "base_precision": "nf4"}
        remedies += [f"--{name}{'' if value is True else ' ' + value}" for name, value in flags.items()
            if getattr(args, name) != value]  # fmt: skip
    found = f"{need.peak / 1e9:.2f} GB (simulated; {need.with_margin / 1e9:.2f} GB with a margin), {available}, "
    found += f"--gradient_checkpointing is {mode}"
    raise InputError(f"--train_batch_size: {args.train_batch_size} images need {found}; {', or '.join(remedies)}")


def choose_checkpointing(args, shapes, free):
    """Returns the --gradient_checkpointing mode to train with, and a line that says why.

    auto is the fastest mode that fits in `free` bytes of device memory; if that is not known (None), it is "none".
    Raises InputError if nothing fits, with a batch size that does.
    """
    asked = args.gradient_checkpointing
    if free is None:
        return ("none" if asked == "auto" else asked), None
    sizes = []
    for mode in CHECKPOINTING if asked == "auto" else [asked]:
        need = estimate_needs(args, shapes, mode)
        sizes.append(f"{mode} needs {need.peak / 1e9:.2f} GB")
        if need.fits(free):
            break
    if need.peak > free or (asked == "auto" and not need.fits(free)):
        refuse(args, shapes, mode, need, free)
    found = f"{', '.join(sizes)} of device memory (simulated, without a margin); {free / 1e9:.2f} GB are free"
    return mode, f"--gradient_checkpointing {mode}: {found}"
