"""The demo: draw a dataset, train a LoRA on species the toy SDXL has never seen, score images before and after.

    make demo        # python demo/run.py --output_dir demo/output

It prints the two commands it runs, so that you can run and change them. OUTPUT/lora holds the training run,
OUTPUT/evaluation the report: the demo's own CLIP names the species of every image, zero-shot over 16 species. This
CLIP was trained on drawings of all of them; the SDXL has never seen five.
"""

import argparse
import csv
import importlib
import json
import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from world import FACINGS, PLACES, POSES, PRETRAINED, UNSEEN, Scene, draw_scene, make_dataset

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PROCESSES = 2  # one core each: the toy's layers are too small to be split over cores
GLOBAL_BATCH = 16
TRAINING = {
    "--resolution": 64,
    "--max_train_steps": 280,
    "--learning_rate": 6e-3,
    "--rank": 32,
    "--lora_target_modules": ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
    "--text_encoder_rank": 16,
    "--text_encoder_lr_scale": 1.0,
    "--class_mix": (0.0, 0.1, 280),
    "--caption_dropout_rate": 0.1,
    "--noise_offset": 0.2,  # without it, yellow creatures turn red in bright places
    "--checkpointing_steps": 140,
    "--validation_steps": 280,
    "--mixed_precision": "no",
    "--report_to": "none",
    "--seed": 0,
}
CLIP = f"local-dir:{HERE / 'clip'}"
EVALUATION = {
    "--pretrained_model_name_or_path": HERE / "sdxl",
    "--prompts": HERE / "panel.jsonl",
    "--resolution": 64,
    "--num_inference_steps": 6,
    "--guidance_scale": 2.5,
    "--dtype": "fp32",
    "--clip_model": CLIP,
    "--aesthetic_clip_model": CLIP,
    "--aesthetic_head": HERE / "aesthetic-linearMSE.pth",
}


def to_words(flags):
    """A command line of {flag: value, values, or None for a switch}."""
    words = []
    for flag, value in flags.items():
        words.append(flag)
        if isinstance(value, tuple):
            words += map(str, value)
        elif value is not None:
            words.append(str(value))
    return words


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def launch(commands):
    """Runs [(script, flags)] one after the other on PROCESSES processes, as the printed commands would.

    The processes run all scripts, which saves importing torch twice. Errors: SystemExit when a process fails; the
    other one is killed.
    """
    for script, flags in commands:
        words = ["accelerate", "launch", "--config_file", str(ROOT / "accelerate_configs/ddp.yaml")]
        words += ["--num_processes", str(PROCESSES), str(ROOT / script), *to_words(flags)]
        print("$ ACCELERATE_USE_CPU=true", shlex.join(words), flush=True)
    plan = json.dumps([(script.removesuffix(".py"), to_words(flags), free_port()) for script, flags in commands])
    world = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(PROCESSES), "ACCELERATE_USE_CPU": "true"}
    world |= {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // PROCESSES)), "PYTHONPATH": str(ROOT)}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(PROCESSES)]
    command = [sys.executable, __file__, "--work", plan]
    running = [subprocess.Popen(command, env=os.environ | world | rank) for rank in ranks]
    try:
        while any(process.poll() is None for process in running) and not any(p.returncode for p in running):
            time.sleep(0.1)
    finally:
        for process in running:
            process.kill()
            process.wait()
    if any(process.returncode for process in running):
        sys.exit("the demo failed")


def work(plan):
    """Runs the scripts of `plan` in this process, which is one of PROCESSES."""
    from accelerate.state import AcceleratorState

    for script, words, port in plan:
        os.environ["MASTER_PORT"] = port
        importlib.import_module(script).main(words)
        AcceleratorState._reset_state(reset_partial_state=True)


def training_flags(output_dir):
    return {
        "--pretrained_model_name_or_path": HERE / "sdxl",
        "--train_shards": HERE / "data/data/train",
        "--val_shards": HERE / "data/data/val",
        "--class_csv": HERE / "data/manifests/train_species.csv",
        "--output_dir": output_dir,
        **TRAINING,
        "--train_batch_size": GLOBAL_BATCH // PROCESSES,
        "--train_text_encoder": None,
        "--overwrite_output_dir": None,
    }


def evaluation_flags(lora, output_dir):
    shards = {"--train_shards": HERE / "data/data/train", "--val_shards": HERE / "data/data/val"}
    flags = {"--lora": lora, "--seeds": tuple(range(8)), "--batch_size": 48, "--output_dir": output_dir}
    return EVALUATION | shards | flags


def draw_before_after(evaluation, path, tile=96, margin=76, header=18, gap=8):
    """Draws a column per species: a drawing of it, two images by the base, and the same two with the LoRA."""
    with open(evaluation / "per_image.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if int(row["seed"]) < 2]
    columns = [*UNSEEN, *PRETRAINED[:3]]
    labels = ["drawn", "base", "", "with LoRA", ""]
    tops = [header + r * tile + gap * (r + 1) // 2 for r in range(len(labels))]
    sheet = Image.new("RGB", (margin + len(columns) * tile, tops[-1] + tile), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((6, 3), "* never seen", fill="gray")
    for top, label in zip(tops, labels):
        pen.text((6, top + tile // 2 - 6), label, fill="black")
    for column, species in enumerate(columns):
        left = margin + column * tile
        pen.text((left + 4, 3), species.name + ("" if species.pretrained else " *"), fill="black")
        own = [row for row in rows if row["prompt_id"] == f"{species.name.lower()}-1"]
        scene = [next(o for o in options if o in own[0]["prompt"]) for options in (PLACES, POSES, FACINGS)]
        drawn = draw_scene(Scene((species,), *scene, finish=0.9), np.random.default_rng(0), tile, tile)
        images = [drawn, *(Image.open(evaluation / row["file"]) for row in own)]
        for top, image in zip(tops, images):
            sheet.paste(image.resize((tile - 2, tile - 2), Image.Resampling.BICUBIC), (left, top))
    sheet.save(path)


def main(output_dir):
    start = time.time()
    if not (HERE / "data/manifests/train_species.csv").exists():
        print("drew {} training and {} validation images".format(*make_dataset(HERE / "data")))
    lora = output_dir / "lora"
    evaluation = output_dir / "evaluation"
    commands = [("train_sdxl_lora.py", training_flags(lora)), ("evaluate.py", evaluation_flags(lora, evaluation))]
    launch(commands)
    draw_before_after(evaluation, output_dir / "before_after.png")
    metrics = json.loads((evaluation / "metrics.json").read_text())
    for group in ("unseen", "pretrained"):
        before, after = (entry["right"] for entry in metrics["by_tag"][group].values())
        shares = [f"{100 * e['mean']:.1f} % ({100 * e['low']:.1f}–{100 * e['high']:.1f} %)" for e in (before, after)]
        print(f"{group:>10} species, named right of {after['count']}: base {shares[0]}  →  with LoRA {shares[1]}")
    print(f"The demo took {time.time() - start:.0f} s. Read {evaluation / 'report.html'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=HERE / "output", metavar="DIR")
    parser.add_argument("--work", type=json.loads, metavar="PLAN", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work)
    else:
        main(args.output_dir)
