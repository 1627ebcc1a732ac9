"""The demo of the sweep: 8 trials on the demo's dataset, compared with the trainer's defaults at the same budget.

make sweep-demo        # python demo/sweep.py --output_dir demo/output/sweep
"""

import argparse
import csv
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import yaml
from run import EVALUATION, HERE, ROOT, to_words
from world import make_dataset

STEPS = 80
TRIALS = 8
SEEDS = (0, 1)
TRAINING = {  # of every trial, and of the run with the defaults
    "--pretrained_model_name_or_path": HERE / "sdxl",
    "--train_shards": HERE / "data/data/train",
    "--val_shards": HERE / "data/data/val",
    "--resolution": 64,
    "--train_batch_size": 16,
    "--validation_steps": 20,
    "--mixed_precision": "no",
    "--dataloader_num_workers": 0,
    "--train_text_encoder": None,
}
SEARCH_SPACE = {  # a small model needs other learning rates than SDXL
    "learning_rate": {"low": 1e-4, "high": 2e-2, "log": True},
    "rank": {"choices": [4, 8, 16, 32]},
    "text_encoder_lr_scale": {"choices": [0.1, 0.3, 1.0]},
    "noise_offset": {"choices": [0.0, 0.1, 0.2]},
}


def run(command):
    print("$", shlex.join(map(str, command)), flush=True)
    subprocess.run([sys.executable, *map(str, command[1:])], check=True)


def main(folder):
    start = time.time()
    if not (HERE / "data/manifests/train_species.csv").exists():
        print("drew {} training and {} validation images".format(*make_dataset(HERE / "data")))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "search_space.yaml").write_text(yaml.safe_dump(SEARCH_SPACE, sort_keys=False))
    own = {k: str(v) if isinstance(v, Path) else v for k, v in EVALUATION.items()} | {"--batch_size": 36}
    shared = ("--prompts", "--resolution", "--pretrained_model_name_or_path")
    evaluation = {flag.removeprefix("--"): value for flag, value in own.items() if flag not in shared}
    (folder / "evaluation.yaml").write_text(yaml.safe_dump(evaluation))
    sweep = {"--output_dir": folder, "--n_trials": TRIALS, "--trial_steps": STEPS, "--startup_trials": 3}
    sweep |= {"--search_space": folder / "search_space.yaml", "--prompts": HERE / "panel.jsonl", "--seeds": SEEDS}
    sweep |= {"--evaluation": folder / "evaluation.yaml", "--workers": 2}
    run(["python", ROOT / "hpo_sweep.py", *to_words(sweep), "--", *to_words(TRAINING)])
    swept = time.time() - start

    defaults = folder / "defaults"
    training = TRAINING | {"--max_train_steps": STEPS, "--report_to": "none", "--seed": 0, "--output_dir": defaults}
    run(["python", ROOT / "train_sdxl_lora.py", *to_words(training | {"--resume_from_checkpoint": "latest"})])
    scoring = own | {"--seeds": SEEDS, "--lora": defaults, "--output_dir": folder / "defaults-evaluation"}
    run(["python", ROOT / "evaluate.py", *to_words(scoring | {"--images_dir": folder / "images"})])
    metrics = json.loads((folder / "defaults-evaluation/metrics.json").read_text())["models"]["defaults"]
    with open(folder / "trials.csv", newline="", encoding="utf-8") as file:
        trials = list(csv.DictReader(file))
    best = max((t for t in trials if t["score"]), key=lambda t: float(t["score"]))
    chosen = ", ".join(f"{name} {best[name][:8]}" for name in SEARCH_SPACE)
    print(f"{len(trials)} trials, {sum(t['state'] == 'pruned' for t in trials)} pruned. Best, trial {best['trial']}: "
          f"score {float(best['score']):.3f} with {chosen}")  # fmt: skip
    print(f"The trainer's defaults with the same {STEPS} steps: {metrics['score']['mean']:.3f}")
    print(f"The sweep took {swept:.0f} s, the defaults {time.time() - start - swept:.0f} s. Read {folder}/report.html")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=HERE / "output/sweep", metavar="DIR")
    main(parser.parse_args().output_dir)
