"""Can evaluate.py be believed? Three LoRAs whose worth is known, judged on the demo world.

    python benchmarks/evaluation.py            # twenty minutes on two cores

- trained: as `make demo` trains one; it must beat the base model on unseen species.
- shuffled: the same run on shards whose captions were dealt out anew; it must not.
- overfitted: 4 pictures of one species, 2,000 steps; it must be flagged as copying them, and `trained`, asked for the
  same captions, must not. Held out are fresh drawings of that species.
"""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

import numpy as np
from run import HERE as DEMO
from run import TRAINING
from world import DATASET, UNSEEN, make_sample, write_shards

import evaluate
import train_sdxl_lora as trainer

CLIP = f"local-dir:{DEMO / 'clip'}"


def train(shards, output_dir, steps, learning_rate=TRAINING["--learning_rate"]):
    """The LoRA's folder; trained unless it was before."""
    flags = {k: v for k, v in TRAINING.items() if k != "--species_mix"} | {"--species_mix": (0.0, 0.1, steps)}
    flags |= {"--pretrained_model_name_or_path": DEMO / "sdxl", "--train_shards": shards, "--max_train_steps": steps}
    flags |= {"--output_dir": output_dir, "--train_batch_size": 16, "--checkpointing_steps": steps}
    flags["--learning_rate"] = learning_rate
    words = ["--train_text_encoder", "--resume_from_checkpoint", "latest"]
    for flag, value in flags.items():
        words += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    if not (output_dir / trainer.LORA_FILE).exists():
        trainer.main(words)
    return output_dir


def make_shards(folder):
    """{name: shard}: the dataset's twin with right captions, with shuffled ones, four pictures, and held-out ones."""
    wanted = [species for species in DATASET for _ in range(species.count)]
    samples = [make_sample((5, 0, n), species) for n, species in enumerate(wanted)]
    order = np.random.default_rng(6).permutation(len(samples))
    shuffled = [s | {"txt": samples[i]["txt"], "json": samples[i]["json"]} for s, i in zip(samples, order)]
    four = [make_sample((5, 1, n), UNSEEN[0]) for n in range(4)]
    held_out = [make_sample((5, 2, n), UNSEEN[0]) for n in range(400)]
    shards = {"right": samples, "shuffled": shuffled, "four": four, "held-out": held_out}
    for name, members in shards.items():
        write_shards(members, str(folder / f"{name}-%05d.tar"), per_shard=len(members) + 1)
    panel = [{"id": f"four-{n}", "prompt": s["txt"], "species": UNSEEN[0].name} for n, s in enumerate(four)]
    (folder / "four.jsonl").write_text("".join(json.dumps(row) + "\n" for row in panel))
    return {name: folder / f"{name}-00000.tar" for name in shards}


def judge(loras, prompts, seeds, train_shard, held_out, output_dir):
    words = ["--pretrained_model_name_or_path", DEMO / "sdxl", "--lora", *loras, "--prompts", prompts]
    words += ["--seeds", *range(seeds), "--resolution", 64, "--num_inference_steps", 12, "--guidance_scale", 2.5]
    words += ["--batch_size", 25, "--clip_model", CLIP, "--aesthetic_clip_model", CLIP]
    words += ["--aesthetic_head", DEMO / "aesthetic-linearMSE.pth", "--train_shards", train_shard]
    words += ["--val_shards", held_out, "--output_dir", output_dir]
    return evaluate.main(words)["models"]


def main(folder, steps, overfit_steps):
    folder.mkdir(parents=True, exist_ok=True)
    shards = make_shards(folder)
    trained, shuffled = (
        train(shards[n], folder / m, steps) for n, m in (("right", "trained"), ("shuffled", "shuffled"))
    )
    overfitted = train(shards["four"], folder / "overfitted", overfit_steps, 2e-3)  # 6e-3 diverges after 600 steps
    panel = DEMO / "panel.jsonl"
    learned = judge([trained, shuffled], panel, 4, shards["right"], shards["held-out"], folder / "learned")
    copied = judge(
        [trained, overfitted], folder / "four.jsonl", 16, shards["four"], shards["held-out"], folder / "copied"
    )
    facts = {"learned": learned, "copied": copied}
    (folder / "evaluation.json").write_text(json.dumps(facts, indent=1) + "\n")
    for part, models in facts.items():
        for name, entry in models.items():
            shown = {
                m: [round(entry[m][k], 3) for k in ("mean", "low", "high")] for m in evaluate.METRICS if m in entry
            }
            change = {m: [round(e[k], 3) for k in ("mean", "low", "high")] for m, e in entry["vs_base"].items()}
            print(part, name, "flagged" if entry["flagged"] else "", json.dumps(shown), "vs base", json.dumps(change))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "demo/output/evaluation", metavar="DIR")
    parser.add_argument("--steps", type=int, default=320, metavar="STEPS")
    parser.add_argument("--overfit_steps", type=int, default=2000, metavar="STEPS")
    args = parser.parse_args()
    main(args.output_dir, args.steps, args.overfit_steps)
