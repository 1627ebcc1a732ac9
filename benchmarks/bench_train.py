"""Measure speed and memory beside diffusers' train_text_to_image_lora_sdxl.py, at equal batch, rank, size, precision.

    python benchmarks/bench_train.py --peer PATH/train_text_to_image_lora_sdxl.py         # demo model
    python benchmarks/bench_train.py --peer PATH/… --model sdxl --precision bf16 --rank 64     # real size, CUDA
    python benchmarks/bench_train.py --variants cached --profile                          # time of each part of a step
    python benchmarks/bench_train.py --checkpoint --model sdxl --rank 64                  # time of a checkpoint
    python benchmarks/bench_train.py --memory --model sdxl --rank 64 --precision bf16     # memory of a step, simulated

Get the peer, diffusers' script, from https://github.com/huggingface/diffusers (examples/text_to_image). Models of the
real size have random weights, because speed does not depend on their values. Each run has its own process, and the
runs take turns. In both scripts a hook of torch notes when each optimizer step ends; the first steps are not counted.
The time to the first step includes imports, index and caches.
"""

import argparse
import atexit
import json
import os
import resource
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo"), str(ROOT / "benchmarks")]

import sdxl_memory
import sdxl_single_file
import sdxl_speed

CACHES = ["--cache_latents", "--cache_text_embeddings"]
VARIANTS = {
    "plain": [],
    "cached": CACHES,
    "cached, compile": [*CACHES, "--compile"],
    "cached, blocks": [*CACHES, "--gradient_checkpointing", "blocks"],
    "cached, full": [*CACHES, "--gradient_checkpointing", "full"],
    "cached, nf4, full": [*CACHES, "--base_precision", "nf4", "--gradient_checkpointing", "full"],
    "cached, int8, full": [*CACHES, "--base_precision", "int8", "--gradient_checkpointing", "full"],
    "cached, 8-bit Adam, full": [*CACHES, "--use_8bit_adam", "--gradient_checkpointing", "full"],
    "cached, flash": [*CACHES, "--attention_backend", "flash"],
    "cached, not deterministic": [*CACHES, "--no-deterministic"],
    "cached, cudnn": [*CACHES, "--no-deterministic", "--attention_backend", "cudnn"],
}
PROFILED = {  # part of a step → (module or class, function) that is timed
    "batch to the device": ("train_sdxl_lora", "move_batch"),
    "noise": ("train_sdxl_lora", "sample_batch_noise"),
    "VAE": ("train_sdxl_lora", "encode_moments"),
    "text encoders": ("train_sdxl_lora", "encode_prompts"),
    "UNet forward": ("diffusers.UNet2DConditionModel", "forward"),
    "backward": ("accelerate.Accelerator", "backward"),
    "clipping": ("accelerate.Accelerator", "clip_grad_norm_"),
    "optimizer": ("accelerate.optimizer.AcceleratedOptimizer", "step"),
}


# ---- in the process of a run


def wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def watch_steps(out, started, warmup, steps):
    """At the end of the process, writes the times of the optimizer steps and the peak memory in bytes to `out`."""
    times = []
    noted = {}

    def note(*_):
        if len(times) in (0, warmup, warmup + steps - 1):
            wait()  # for the GPU, so that everything counted is done
        times.append(time.time() - started)
        on_gpu = torch.cuda.is_available()
        peak = (
            torch.cuda.max_memory_allocated() if on_gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        )
        noted.update(times=times, peak=peak)

    register_optimizer_step_post_hook(note)
    atexit.register(lambda: Path(out).write_text(json.dumps(noted)))


def find_attribute(path):
    """The module or class named by a dotted path."""
    parts = path.split(".")
    found = __import__(parts[0])
    for n, part in enumerate(parts[1:], 2):
        found = getattr(found, part, None) or __import__(".".join(parts[:n]), fromlist=["_"])
    return found


def profile(argv, steps, warmup):
    """Runs the trainer and prints the milliseconds that each part of a step takes."""
    import train_sdxl_lora as trainer

    spent = dict.fromkeys(PROFILED, 0.0)
    calls = []

    def timed(name, function):
        def call(*args, **kwargs):
            wait()
            start = time.perf_counter()
            result = function(*args, **kwargs)
            wait()
            if len(calls) > warmup:
                spent[name] += time.perf_counter() - start
            return result

        return call

    for name, (owner, attribute) in PROFILED.items():
        owner = find_attribute(owner)
        setattr(owner, attribute, timed(name, getattr(owner, attribute)))
    original = trainer.train_step

    def train_step(run, batch):
        calls.append(time.perf_counter())
        return original(run, batch)

    trainer.train_step = train_step
    trainer.main(argv)
    wait()
    count = len(calls) - 1 - warmup
    whole = calls[-1] - calls[warmup]
    spent["the rest: data, logging, Python"] = whole - sum(spent.values())
    print(f"{'part of a step':36} {'ms':>8} {'share':>7}   (of {count} steps, each part waited for)")
    for name, seconds in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"{name:36} {1000 * seconds / count:8.2f} {seconds / whole:7.1%}")


# ---- models and data


def make_sdxl(folder, dtype):
    """Saves a snapshot of SDXL's size with random weights, and the demo's tokenizers and scheduler.

    The configurations are those of stabilityai/stable-diffusion-xl-base-1.0.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    for part in ("tokenizer", "tokenizer_2", "scheduler", "model_index.json"):
        source = ROOT / "demo/sdxl" / part
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / part)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    size = {"vocab_size": len(tokenizer), "max_position_embeddings": 77}
    size |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    configs = sdxl_single_file.SDXL_CONFIGS
    first = CLIPTextConfig(**configs["text_encoder"] | size)
    second = CLIPTextConfig(**configs["text_encoder_2"] | size)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        for name, model in (
            ("text_encoder", lambda: CLIPTextModel(first)),
            ("text_encoder_2", lambda: CLIPTextModelWithProjection(second)),
            ("vae", lambda: AutoencoderKL.from_config(configs["vae"])),
            ("unet", lambda: UNet2DConditionModel.from_config(configs["unet"])),
        ):
            model().to(dtype if name != "vae" else torch.float32).save_pretrained(folder / name)
    torch.cuda.empty_cache()  # the runs are other processes and need the memory


def make_images(folder, count, side):
    """Writes an image folder that both scripts read: JPEGs of side × side px and metadata.jsonl."""
    import bench_data

    folder.mkdir(parents=True)
    rows = []
    for n, (name, image) in enumerate(bench_data.make_images(count, side, "jpg")):
        (folder / f"{n:05d}.jpg").write_bytes(image)
        rows.append(json.dumps({"file_name": f"{n:05d}.jpg", "text": f"{name}, standing in a meadow, number {n}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))


# ---- runs


def command_of(args, name, model, data, folder):
    """(script, its flags) of the peer, or of ours with the flags of a variant."""
    flags = ["--pretrained_model_name_or_path", model, "--train_data_dir", data, "--output_dir", folder]
    flags += ["--resolution", args.resolution, "--train_batch_size", args.batch, "--rank", args.rank]
    flags += ["--max_train_steps", args.warmup + args.steps, "--learning_rate", 1e-4, "--lr_scheduler", "constant"]
    flags += ["--mixed_precision", args.precision, "--seed", 1, "--checkpointing_steps", 1000000]
    flags += ["--dataloader_num_workers", args.workers, "--center_crop", "--cache_dir", f"{folder}-cache"]
    if name == "peer":
        return args.peer, [*map(str, flags), "--caption_column=text"]
    own = ["--report_to", "tensorboard", "--class_mix", 1, 1, 0, "--snr_gamma", 0, *VARIANTS[name]]
    return ROOT / "train_sdxl_lora.py", [*map(str, flags), *map(str, own)]


def run(args, name, model, data, folder):
    """{"first": s, "rate": steps/s, "peak": bytes} of one run; None, with its output printed, if it fails."""
    script, flags = command_of(args, name, model, data, folder)
    out = Path(f"{folder}.json")
    command = [sys.executable, __file__, "--child", out, args.warmup, args.steps, script, *flags]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "BENCH_STARTED": repr(time.time())}
    if not torch.cuda.is_available():
        env |= {"OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run([*map(str, command)], env=env, capture_output=True, text=True)
    if done.returncode or not out.exists():
        print(f"{name}: {done.stderr[-600:]}", flush=True)
        return None
    noted = json.loads(out.read_text())
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(f"{folder}-cache", ignore_errors=True)
    times = noted["times"][args.warmup :]
    return {"first": noted["times"][0], "rate": (len(times) - 1) / (times[-1] - times[0]), "peak": noted["peak"]}


def make_lora_unet(args):
    """The UNet with its LoRA, on the meta device."""
    import diffusers

    import train_sdxl_lora as trainer

    diffusers.logging.set_verbosity_error()
    config = sdxl_single_file.SDXL_CONFIGS["unet"]
    if args.model != "sdxl":
        config = trainer.UNet2DConditionModel.load_config(ROOT / "demo/sdxl/unet")
    with torch.device("meta"):
        unet = trainer.UNet2DConditionModel.from_config(config).to(trainer.weight_dtype_of(args.precision))
        unet.requires_grad_(False)
        trainer.add_adapter(unet, "--rank", ("to_q", "to_k", "to_v", "to_out.0"), r=args.rank, lora_alpha=args.rank)
    return unet


def count_flop(args):
    """(FLOP of one image forward and backward through the UNet with its LoRA, FLOP/s of a matrix product here)."""
    import train_sdxl_lora as trainer

    flop = sdxl_memory.step_flop(make_lora_unet(args), [], 6, 1, args.resolution)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return flop, sdxl_memory.measure_matmul(device, trainer.weight_dtype_of(args.precision))


def measure_checkpoint(args):
    """Prints the seconds that training waits for a checkpoint of adapters and AdamW on this machine's disk."""
    import train_sdxl_lora as trainer

    unet = make_lora_unet(args)
    masters = []
    for module in unet.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad:
                module.register_parameter(name, torch.nn.Parameter(torch.randn(parameter.shape)))
                masters.append(module._parameters[name])
                masters[-1].grad = torch.randn(parameter.shape)
    accelerator = trainer.Accelerator(cpu=True)
    optimizer = accelerator.prepare(torch.optim.AdamW(masters, fused=True))
    optimizer.step()
    run = SimpleNamespace(
        args=SimpleNamespace(stage="base"),
        accelerator=accelerator,
        trained={"unet": unet},
        optimizer=optimizer,
        progress=trainer.Progress(),
    )
    with tempfile.TemporaryDirectory(dir=".") as folder:
        for step in range(1, args.rounds + 1):
            start = time.perf_counter()
            files = trainer.checkpoint_files(run)
            copied = time.perf_counter()
            trainer.write_checkpoint(folder, step, files)
            written = time.perf_counter()
            size = sum(file.stat().st_size for file in Path(folder, f"checkpoint-{step}").iterdir())
            print(f"checkpoint {step}: {size / 1e6:.1f} MB, copied in {copied - start:.2f} s, "
                f"written in {written - copied:.2f} s")  # fmt: skip


def report_memory(args):
    """Prints the simulated memory of a step with cached latents and embeddings: weights, AdamW, forward, backward."""
    unet = make_lora_unet(args)
    parameters = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    fixed = sdxl_memory.weight_bytes(unet) + parameters * (4 + sdxl_memory.MOMENT_BYTES["adamw"])
    for mode in sdxl_memory.CHECKPOINTING:
        sdxl_speed.set_checkpointing({"unet": unet}, mode, dropout=False)
        sizes = {n: fixed + sdxl_memory.step_memory(unet, [], 6, n, args.resolution) for n in sorted({1, args.batch})}
        peaks = ", ".join(f"batch {n}: {size / 1e9:5.2f} GB" for n, size in sizes.items())
        print(f"{args.model}, {args.precision}, rank {args.rank}, {mode:7} {peaks}", flush=True)


def report(args, results):
    flop, speed = count_flop(args)
    print(f"\n{args.model}, {args.resolution} px, batch {args.batch}, rank {args.rank}, {args.precision}, medians of "
        f"{args.rounds} runs of {args.steps} steps, {time.strftime('%Y-%m-%d')}; {flop / 1e12:.3g} TFLOP an image, "
        f"{speed / 1e12:.3g} TFLOP/s in a matrix product")  # fmt: skip
    print(f"{'':26} {'img/s':>8} {'ms/step':>9} {'peak GB':>8} {'utilised':>9} {'first step, s':>14}   speed / peer's")
    for name, runs in results.items():
        whole = [r for r in runs if r]
        if not whole:
            print(f"{name:26} did not run")
            continue
        rate, peak, first = (statistics.median(r[key] for r in whole) for key in ("rate", "peak", "first"))
        pairs = [(a, b) for a, b in zip(runs, results.get("peer", [])) if a and b]
        ratios = sorted(a["rate"] / b["rate"] for a, b in pairs)
        shown = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})" if ratios else ""
        print(f"{name:26} {rate * args.batch:8.2f} {1000 / rate:9.1f} {peak / 1e9:8.2f} "
            f"{rate * args.batch * flop / speed:9.1%} {first:14.1f}   {shown}")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--peer", metavar="FILE",
        help="diffusers' train_text_to_image_lora_sdxl.py; without it, only ours runs")  # fmt: skip
    parser.add_argument("--model", choices=("demo", "sdxl"), default="demo")
    parser.add_argument("--model_dir", metavar="DIR", help="where to keep the full-size snapshot")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["plain", "cached"], metavar="NAME",
        help="variants of ours: %(choices)s")  # fmt: skip
    parser.add_argument("--resolution", type=int, help="default: 64 for demo, 1024 for sdxl")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=4 if torch.cuda.is_available() else 0,
        help="loader processes of each script; default: 4 with a GPU, else 0")  # fmt: skip
    parser.add_argument("--threads", type=int, default=2, help="threads per process without a GPU")
    parser.add_argument("--profile", action="store_true", help="only measure the parts of a step of the first variant")
    parser.add_argument("--memory", action="store_true", help="only simulate the memory of a step; needs no GPU")
    parser.add_argument(
        "--checkpoint", action="store_true", help="only measure how long training waits for a checkpoint"
    )
    args = parser.parse_args()
    if args.images < 12:
        parser.error(
            f"--images: found {args.images}; expected 12 or more, one of each species that bench_data.py draws"
        )
    args.resolution = args.resolution or {"demo": 64, "sdxl": 1024}[args.model]
    if args.checkpoint:
        return measure_checkpoint(args)
    if args.memory:
        return report_memory(args)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_images(folder / "data", args.images, args.resolution)
        model = ROOT / "demo/sdxl"
        if args.model == "sdxl":
            model = Path(args.model_dir or folder / "sdxl")
            if not (model / "unet").is_dir():
                make_sdxl(model, torch.bfloat16 if args.precision == "bf16" else torch.float16)
        if args.profile:
            _, flags = command_of(args, args.variants[0], model, folder / "data", folder / "run")
            return profile(flags, args.steps, args.warmup)
        results = {name: [] for name in (["peer"] if args.peer else []) + args.variants}
        for n in range(args.rounds):
            for name in results:
                found = run(args, name, model, folder / "data", folder / f"{name.replace(', ', '-')}-{n}")
                results[name].append(found)
                speed = f"{found['rate']:.2f} steps/s, first after {found['first']:.1f} s" if found else "failed"
                print(f"round {n + 1}: {name}: {speed}", flush=True)
        report(args, results)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        out, warmup, steps, script, *flags = sys.argv[2:]
        watch_steps(out, float(os.environ["BENCH_STARTED"]), int(warmup), int(steps))
        sys.argv = [script, *flags]
        runpy.run_path(script, run_name="__main__")
    else:
        main()
