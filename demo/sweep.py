"""The demo of the sweep: 8 trials on the demo data, compared with the trainer's defaults at the same number of steps.

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
BATCH_SIZE = 36  # images per forward pass of the evaluation
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


def run(script, flags, trainer_flags=None):
    """Prints and runs a script; `trainer_flags` come after --."""
    words = [script, *to_words(flags)]
    if trainer_flags is not None:
        words += ["--", *to_words(trainer_flags)]
    print("$ python", shlex.join(words), flush=True)
    subprocess.run([sys.executable, ROOT / script, *words[1:]], check=True)


def sweep(folder):
    """Runs the sweep. Returns the rows of trials.csv."""
    (folder / "search_space.yaml").write_text(yaml.safe_dump(SEARCH_SPACE, sort_keys=False))
    (folder / "evaluation.yaml").write_text(yaml.safe_dump(evaluation_file()))
    flags = {
        "--output_dir": folder,
        "--n_trials": TRIALS,
        "--trial_steps": STEPS,
        "--startup_trials": 3,
        "--search_space": folder / "search_space.yaml",
        "--prompts": HERE / "panel.jsonl",
        "--seeds": SEEDS,
        "--evaluation": folder / "evaluation.yaml",
        "--workers": 2,
    }
    run("hpo_sweep.py", flags, TRAINING)
    with open(folder / "trials.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def evaluation_file():
    """{flag without dashes: value} of the flags of evaluate.py that hpo_sweep.py does not set itself."""
    flags = {"batch_size": BATCH_SIZE}
    for flag, value in EVALUATION.items():
        if flag not in ("--prompts", "--resolution", "--pretrained_model_name_or_path"):
            flags[flag.removeprefix("--")] = str(value) if isinstance(value, Path) else value
    return flags


def score_defaults(folder):
    """Trains with the trainer's defaults for as many steps as a trial. Returns the score."""
    training = dict(TRAINING)
    training["--max_train_steps"] = STEPS
    training["--report_to"] = "none"
    training["--seed"] = 0
    training["--output_dir"] = folder / "defaults"
    training["--resume_from_checkpoint"] = "latest"
    run("train_sdxl_lora.py", training)

    evaluation = dict(EVALUATION)
    evaluation["--batch_size"] = BATCH_SIZE
    evaluation["--seeds"] = SEEDS
    evaluation["--lora"] = folder / "defaults"
    evaluation["--output_dir"] = folder / "defaults-evaluation"
    evaluation["--images_dir"] = folder / "images"
    run("evaluate.py", evaluation)
    metrics = json.loads((folder / "defaults-evaluation/metrics.json").read_text())
    return metrics["models"]["defaults"]["score"]["mean"]


def main(folder):
    start = time.time()
    if not (HERE / "data/manifests/train_species.csv").exists():
        training, validation = make_dataset(HERE / "data")
        print(f"drew {training} training and {validation} validation images")
    folder.mkdir(parents=True, exist_ok=True)
    trials = sweep(folder)
    swept = time.time()
    score = score_defaults(folder)

    pruned = [trial for trial in trials if trial["state"] == "pruned"]
    best = max((trial for trial in trials if trial["score"]), key=lambda trial: float(trial["score"]))
    chosen = ", ".join(f"{name} {best[name][:8]}" for name in SEARCH_SPACE)
    print(f"{len(trials)} trials, {len(pruned)} pruned. Best: trial {best['trial']} with score "
          f"{float(best['score']):.3f}: {chosen}")  # fmt: skip
    print(f"The trainer's defaults with the same {STEPS} steps: {score:.3f}")
    print(f"The sweep took {swept - start:.0f} s, the defaults {time.time() - swept:.0f} s. See {folder}/report.html")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=HERE / "output/sweep", metavar="DIR")
    main(parser.parse_args().output_dir)
