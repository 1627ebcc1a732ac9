"""Does evaluate.py tell good LoRAs from bad ones? It scores LoRAs of known quality on the demo's dataset.

    python benchmarks/evaluation.py            # forty minutes on two cores

- trained: as `make demo` trains one; it must beat the base model on unseen species.
- shuffled: the same run on shards with shuffled captions; it must not.
- overfitted: 4 images of one species, 2,000 steps; it must be flagged as copying them.
- sound: the same 2,000 steps on 400 such images; with the same prompts, it must not be flagged.

The images of the last two are cropped at random, and captions do not tell how: without crops, drawings with the same
caption are so similar that a copy looks like a new one. They show daylight, since the toy VAE is bad at dark images.
"""

import argparse
import io
import itertools
import json
import os
import re
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

import numpy as np
from PIL import Image
from run import EVALUATION, HERE, TRAINING, to_words
from world import DATASET, UNSEEN, encode_image, make_sample, write_shards

import evaluate
import sdxl_data
import train_sdxl_lora as trainer

OVERFITTING = TRAINING | {
    "--learning_rate": 2e-3,  # 6e-3 diverges after 600 steps
    "--lora_target_modules": (*TRAINING["--lora_target_modules"], "conv1", "conv2", "conv_shortcut", "time_emb_proj"),
}


def train(flags, shards, output_dir, steps):
    """Trains a LoRA unless its folder has one; returns the folder."""
    flags = flags | {"--train_shards": shards, "--max_train_steps": steps, "--class_mix": (0.0, 0.1, steps)}
    flags |= {"--pretrained_model_name_or_path": HERE / "sdxl", "--output_dir": output_dir, "--train_batch_size": 16}
    flags |= {"--checkpointing_steps": steps, "--train_text_encoder": None, "--resume_from_checkpoint": "latest"}
    if not (output_dir / sdxl_data.LORA_FILE).exists():
        trainer.main(to_words(flags))
    return output_dir


def make_cropped(part, count):
    """[sample] of the first unseen species, in daylight and well drawn, each cropped at random."""
    drawn = (((5, part, n), make_sample((5, part, n), UNSEEN[0])) for n in itertools.count())
    fit = ((seed, s) for seed, s in drawn if re.search("(meadow|beach|snow).*(masterpiece|art)", s["txt"]))
    return [crop_randomly(sample, np.random.default_rng((*seed, 99))) for seed, sample in itertools.islice(fit, count)]


def crop_randomly(sample, rng):
    """The sample with a random square of its image, at 96 px."""
    extension = next(name for name in sample if name not in ("__key__", "txt", "json"))
    image = Image.open(io.BytesIO(sample.pop(extension))).convert("RGB")
    side = int(min(image.size) * rng.uniform(0.55, 0.95))
    left, top = (int(rng.integers(0, length - side + 1)) for length in image.size)
    image = image.resize((96, 96), Image.Resampling.LANCZOS, (left, top, left + side, top + side))
    return sample | {"png": encode_image(image, "png"), "json": sample["json"] | {"width": 96, "height": 96}}


def make_shards(folder):
    """{name: shard}; also writes four.jsonl, whose prompts are the captions of the four images."""
    wanted = [species for species in DATASET for _ in range(species.count)]
    samples = [make_sample((5, 0, n), species) for n, species in enumerate(wanted)]
    order = np.random.default_rng(6).permutation(len(samples))
    shuffled = [s | {"txt": samples[i]["txt"], "json": samples[i]["json"]} for s, i in zip(samples, order)]
    fresh = [make_sample((5, 4, n), wanted[n]) for n in range(0, len(wanted), 4)]
    four, many, held_out = (make_cropped(part, count) for part, count in ((1, 4), (3, 400), (2, 400)))
    shards = {"right": samples, "shuffled": shuffled, "fresh": fresh, "four": four, "many": many, "held-out": held_out}
    for name, members in shards.items():
        write_shards(members, str(folder / f"{name}-%05d.tar"), per_shard=len(members) + 1)
    prompts = [{"id": f"four-{n}", "prompt": s["txt"], "species": UNSEEN[0].name} for n, s in enumerate(four)]
    (folder / "four.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    return {name: folder / f"{name}-00000.tar" for name in shards}


def evaluate_loras(loras, train_shard, held_out, output_dir, seeds, **flags):
    """What metrics.json of the evaluation holds."""
    flags = {f"--{name}": value for name, value in flags.items()} | {"--lora": tuple(loras)}
    flags |= {"--seeds": tuple(range(seeds)), "--num_inference_steps": 12, "--batch_size": 24}
    flags |= {"--train_shards": train_shard, "--val_shards": held_out, "--output_dir": output_dir}
    return evaluate.main(to_words(EVALUATION | flags))


def show(title, entries, names):
    for name, entry in entries.items():
        found = {m: [round(entry[m][k], 3) for k in ("mean", "low", "high")] for m in names if m in entry}
        change = {m: [round(entry["vs_base"][m][k], 3) for k in ("mean", "low", "high")] for m in entry["vs_base"]}
        print(title, name, "FLAGGED" if entry.get("flagged") else "", json.dumps(found))
        print("    vs base", json.dumps({m: change[m] for m in names if m in change}))


def main(folder, steps, overfit_steps):
    folder.mkdir(parents=True, exist_ok=True)
    shards = make_shards(folder)
    trained = train(TRAINING, shards["right"], folder / "trained", steps)
    shuffled = train(TRAINING, shards["shuffled"], folder / "shuffled", steps)
    overfitted = train(OVERFITTING, shards["four"], folder / "overfitted", overfit_steps)
    sound = train(OVERFITTING, shards["many"], folder / "sound", overfit_steps)
    learned = evaluate_loras([trained, shuffled], shards["right"], shards["fresh"], folder / "learned", 4)
    prompts = folder / "four.jsonl"
    held_out = shards["held-out"]
    copied = evaluate_loras([overfitted], shards["four"], held_out, folder / "copied", 16, prompts=prompts)
    not_copied = evaluate_loras([sound], shards["many"], held_out, folder / "not-copied", 16, prompts=prompts)
    show("unseen species:", learned["by_tag"]["unseen"], ("adherence", "right"))
    for title, facts in (("all:", learned), ("overfitted:", copied), ("sound:", not_copied)):
        print(title, "held out", json.dumps(facts["held_out"]))
        show(title, facts["models"], ("nearest_similarity", "copy_similarity", "copy", "diversity"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "demo/output/evaluation", metavar="DIR")
    parser.add_argument("--steps", type=int, default=320, metavar="STEPS")
    parser.add_argument("--overfit_steps", type=int, default=2000, metavar="STEPS")
    args = parser.parse_args()
    main(args.output_dir, args.steps, args.overfit_steps)
