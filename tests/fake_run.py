"""Stands in for the trainer and evaluate.py in tests of the sweep. It needs seconds instead of minutes, and no torch.

    fake_run.py train_sdxl_lora.py --config TRIAL.yaml        fake_run.py evaluate.py … --lora DIR --output_dir DIR

Like the trainer, it appends a row to metrics.jsonl at each validation, saves on SIGTERM and resumes with the same
command. It logs what it does in fake.jsonl of the trial. `rank` chooses a fault: 1 runs out of memory, 2 cannot start,
3 is killed, 5 ends with a loss that is not a number.
"""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import yaml


def append_row(path, **row):
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def log_event(folder, event, **details):
    append_row(folder / "fake.jsonl", event=event, pid=os.getpid(), **details)


def loss_of(flags, step):
    if flags["rank"] == 5 and step == flags["max_train_steps"]:
        return math.nan
    return 0.1 + 0.02 * abs(math.log10(flags["learning_rate"]) + 3) + 0.1 / (1 + step)


def train(words):
    flags = yaml.safe_load(Path(words[words.index("--config") + 1]).read_text())
    folder = Path(flags["output_dir"])
    saved = folder / "saved"
    step = int(saved.read_text()) if saved.exists() else 0
    signals = []
    signal.signal(signal.SIGTERM, lambda number, frame: signals.append(number))
    names = {"group": os.environ.get("WANDB_RUN_GROUP"), "name": os.environ.get("WANDB_NAME")}
    log_event(folder, "started", step=step, **names)
    if flags["rank"] == 2:
        sys.exit("train_sdxl_lora.py: error: --train_shards: no shard found")
    while step < flags["max_train_steps"] and not signals:
        time.sleep(float(os.environ.get("FAKE_STEP_SECONDS", "0.02")))
        step += 1
        if step % flags["validation_steps"] == 0:
            append_row(folder / "metrics.jsonl", step=step, val_loss=loss_of(flags, step))
        if flags["rank"] == 1 and step > 2:
            print("CUDA out of memory")
            print("train_sdxl_lora.py: error: CUDA ran out of memory; see --train_batch_size")
            sys.exit(1)
        if flags["rank"] == 3 and step > 2:
            os.kill(os.getpid(), signal.SIGKILL)
    saved.write_text(str(step))
    (folder / f"checkpoint-{step}").mkdir(exist_ok=True)
    (folder / "pytorch_lora_weights.safetensors").write_text("")
    log_event(folder, "stopped" if signals else "trained", step=step)


def evaluate(words):
    folder = Path(words[words.index("--output_dir") + 1])
    flags = yaml.safe_load((folder.parent / "trial.yaml").read_text())
    folder.mkdir(exist_ok=True)
    time.sleep(float(os.environ.get("FAKE_STEP_SECONDS", "0.02")) * 5)
    score = 1 - loss_of(flags, flags["max_train_steps"])
    means = {"score": score, "adherence": score, "aesthetic": 10 * math.log10(flags["learning_rate"]) / -3}
    entry = {name: {"mean": mean, "low": mean, "high": mean} for name, mean in means.items()}
    log_event(folder.parent, "scored")
    (folder / "metrics.json").write_text(json.dumps({"models": {"base model": {}, "trial": entry}}))


if __name__ == "__main__":
    run = train if "train" in sys.argv[1] else evaluate
    run(sys.argv[2:])
