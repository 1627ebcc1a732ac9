"""Train base and refiner LoRAs on the demo's dataset and measure what the refiner's LoRA adds, with intervals.

    python benchmarks/refiner.py               # ten minutes on two cores

It trains the base with both encoders as `make demo` does, then the refiner with the base's text_encoder_2, and
measures on the five species that neither UNet was pretrained on:
  - the denoising loss in the refiner's band over new drawings, with the same noise for the refiner with its LoRA,
    without it, and with the stock text encoder;
  - images by the base with its LoRA, and by base and refiner with theirs, from the same noise, scored by evaluate.py:
    the toy CLIP's similarity of image and prompt, and how many images it names right among 16 species.
Intervals are 95 %: over samples for losses (normal), over prompts for images (bootstrap).
"""

import argparse
import csv
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

import numpy as np
import torch
from PIL import Image
from run import EVALUATION, TRAINING, to_words
from run import HERE as DEMO
from world import FACINGS, PLACES, POSES, SPECIES, UNSEEN, Scene, make_dataset, make_sample, write_shards

import evaluate
import sdxl_data
import train_sdxl_lora as trainer

LORA = "pytorch_lora_weights.safetensors"
REFINER_TRAINING = TRAINING | {
    "--stage": "refiner",
    "--refiner_unet": DEMO / "refiner/unet",
    "--learning_rate": 2e-3,
    "--lora_target_modules": (*TRAINING["--lora_target_modules"], "conv1", "conv2"),
    "--noise_offset": 0.0,
}
LORAS = ("base with its LoRA", "then the stock refiner", "then the refiner with its LoRA")


def train(flags, steps, shards, output_dir, switches=()):
    """Trains a LoRA unless its folder has one; returns the file."""
    if (output_dir / LORA).exists():
        return output_dir / LORA
    flags = flags | {"--train_shards": shards, "--output_dir": output_dir, "--train_batch_size": 16}
    flags |= {"--pretrained_model_name_or_path": DEMO / "sdxl", "--max_train_steps": steps}
    trainer.main(to_words(flags | dict.fromkeys(switches) | {"--resume_from_checkpoint": "latest"}))
    return output_dir / LORA


def interval(differences):
    """{"mean", "low", "high"} of paired differences."""
    mean = np.mean(differences)
    half = 1.96 * np.std(differences, ddof=1) / len(differences) ** 0.5
    return {"mean": float(mean), "low": float(mean - half), "high": float(mean + half), "n": len(differences)}


def band_losses(shard, te2_lora=None, refiner_lora=None):
    """(n,) losses of the shard's samples in the band; noise and timestep depend on the sample's id only."""
    words = ["--pretrained_model_name_or_path", DEMO / "sdxl", "--train_shards", shard, "--resolution", 64]
    words += ["--stage", "refiner", "--refiner_unet", DEMO / "refiner/unet", "--mixed_precision", "no"]
    words += ["--text_encoder_2_lora", te2_lora] if te2_lora else []
    args = trainer.parse_args([str(word) for word in [*words, "--output_dir", shard.parent / "scratch"]])
    models = trainer.load_models(args, torch.float32, torch.device("cpu"))
    if refiner_lora:
        models.unet.load_lora_adapter(str(refiner_lora), prefix="unet")
    rows, damage = sdxl_data.index_shard(sdxl_data.Shard(str(shard), None), sdxl_data.Fields())
    index = sdxl_data.make_index(trainer.pa.Table.from_pylist(rows, sdxl_data.INDEX_SCHEMA), damage)
    dataset = sdxl_data.ImageDataset(index, 0, 64, "center", False, "lanczos")
    losses = []
    for requests, size in trainer.validation_requests(index, 50, 0, 1, None):
        batch = trainer.move_batch(sdxl_data.collate(dataset.__getitems__(requests)), torch.device("cpu"))
        with torch.no_grad():
            draws = trainer.sample_batch_noise(models, batch, 0.0)
            losses += trainer.diffusion_loss(models, batch, draws, torch.float32)[:size].tolist()
    return np.array(losses)


def write_prompts(path):
    """Writes prompts: the unseen species in every scene, and one scene of each other, so that CLIP has 16 names."""
    scenes = [(place, pose, facing) for place in PLACES for pose in POSES for facing in FACINGS]
    rows = []
    for species in SPECIES:
        for n, scene in enumerate(scenes[:1] if species.pretrained else scenes):
            caption = Scene((species,), *scene, finish=0.9).caption()
            tags = ["pretrained" if species.pretrained else "unseen"]
            rows.append({"id": f"{species.name}-{n}", "prompt": caption, "species": species.name, "tags": tags})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def generate_and_score(prompts, seeds, folder, base, refiner):
    """{LORAS: {(prompt id, seed): row}} of the unseen species; `refiner` is the file of its LoRA."""
    common = EVALUATION | {"--prompts": prompts, "--num_inference_steps": 20, "--batch_size": 50}
    common |= {"--seeds": seeds, "--lora": base}
    unet = {"--refiner_unet": DEMO / "refiner/unet"}
    rows = {}
    for number, (name, flags) in enumerate(zip(LORAS, ({}, unet, unet | {"--refiner_lora": refiner}))):
        output = folder / f"pictures-{number}"
        evaluate.main(to_words(common | flags | {"--output_dir": output}))
        with open(output / "per_image.csv", newline="", encoding="utf-8") as file:
            found = [row for row in csv.DictReader(file) if row["tags"] == "unseen" and row["model"] != "base model"]
        rows[name] = {(row["prompt_id"], row["seed"]): row | {"file": output / row["file"]} for row in found}
    return rows


def draw_comparison(rows, path, tile=96):
    """Draws a row per kind of image, two columns per species."""
    chosen = [f"{species.name}-{n}" for species in UNSEEN for n in (0, 7)]
    first_seed = min(seed for _, seed in rows[LORAS[0]])
    sheet = Image.new("RGB", (len(chosen) * tile, len(rows) * tile))
    for row, found in enumerate(rows.values()):
        for column, prompt in enumerate(chosen):
            image = Image.open(found[prompt, first_seed]["file"]).resize((tile, tile), Image.Resampling.BICUBIC)
            sheet.paste(image, (column * tile, row * tile))
    sheet.save(path)


def main(output_dir, base_steps, refiner_steps, samples, seeds, first_seed):
    output_dir.mkdir(parents=True, exist_ok=True)
    if not (DEMO / "data/manifests/train_species.csv").exists():
        make_dataset(DEMO / "data")
    shards = DEMO / "data/data/train"
    base_flags = TRAINING | {"--class_csv": DEMO / "data/manifests/train_species.csv"}
    base = train(base_flags, base_steps, shards, output_dir / "base", ["--train_text_encoder"])
    flags = {k: v for k, v in REFINER_TRAINING.items() if not k.startswith("--text_encoder")}
    flags |= {"--text_encoder_2_lora": base, "--class_mix": (0.0, 0.1, refiner_steps)}
    refiner = train(flags, refiner_steps, shards, output_dir / "refiner")

    fresh = output_dir / "unseen-%05d.tar"
    drawn = [make_sample((77, 2, n), UNSEEN[n % len(UNSEEN)]) for n in range(samples)]
    write_shards(drawn, str(fresh), per_shard=samples + 1)
    shard = output_dir / "unseen-00000.tar"
    losses = {
        "stock": band_losses(shard),
        "with the base's text_encoder_2": band_losses(shard, base),
        "with its LoRA too": band_losses(shard, base, refiner),
    }
    trained = losses["with its LoRA too"]
    facts = {"band_loss": {name: float(values.mean()) for name, values in losses.items()}}
    facts["band_loss_change"] = {name: interval(trained - values) for name, values in list(losses.items())[:2]}

    prompts = write_prompts(output_dir / "panel.jsonl")
    rows = generate_and_score(prompts, tuple(range(first_seed, first_seed + seeds)), output_dir, base, refiner)
    for metric, value_of in (("adherence", float), ("right", lambda text: float(text == "True"))):
        values = {name: [value_of(row[metric]) for row in found.values()] for name, found in rows.items()}
        groups = [prompt for prompt, _ in rows[LORAS[0]]]
        facts[metric] = {name: evaluate.bootstrap(values[name], groups) for name in LORAS}
        facts[metric + "_change"] = {
            name: evaluate.bootstrap(np.subtract(values[LORAS[2]], values[name]), groups) for name in LORAS[:2]
        }
    draw_comparison(rows, output_dir / "comparison.png")
    (output_dir / "refiner.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "demo/output/refiner", metavar="DIR")
    parser.add_argument("--base_steps", type=int, default=320, metavar="STEPS")
    parser.add_argument("--refiner_steps", type=int, default=1500, metavar="STEPS")
    parser.add_argument("--samples", type=int, default=600, metavar="N", help="new drawings for the loss in the band")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="images of each of 100 prompts")
    parser.add_argument("--first_seed", type=int, default=0, metavar="N")
    args = parser.parse_args()
    main(args.output_dir, args.base_steps, args.refiner_steps, args.samples, args.seeds, args.first_seed)
