"""Stands in for the trainer and evaluate.py in tests of the sweep: seconds instead of minutes, no torch.

    fake_run.py train_sdxl_lora.py --config TRIAL.yaml        fake_run.py evaluate.py … --lora DIR --output_dir DIR

It keeps the trainer's promises: a row of metrics.jsonl per validation, SIGTERM saves, the same command goes on. What
it did stands in fake.jsonl of the trial. `rank` chooses the fault: 1 runs out of memory, 2 cannot start, 3 is killed.
"""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import yaml


def note(folder, **row):
    with open(folder / "fake.jsonl", "a") as file:
        file.write(json.dumps(row | {"pid": os.getpid()}) + "\n")


def loss_of(flags, step):
    return 0.1 + 0.02 * abs(math.log10(flags["learning_rate"]) + 3) + 0.1 / (1 + step)


def train(words):
    flags = yaml.safe_load(Path(words[words.index("--config") + 1]).read_text())
    folder, saved = Path(flags["output_dir"]), Path(flags["output_dir"]) / "saved"
    step, told = int(saved.read_text()) if saved.exists() else 0, []
    note(folder, did="start", step=step, group=os.environ.get("WANDB_RUN_GROUP"), name=os.environ.get("WANDB_NAME"))
    signal.signal(signal.SIGTERM, lambda *_: told.append(1))
    if flags["rank"] == 2:
        sys.exit("train_sdxl_lora.py: error: --train_shards: no shard found")
    while step < flags["max_train_steps"] and not told:
        time.sleep(float(os.environ.get("FAKE_STEP_SECONDS", "0.02")))
        step += 1
        if step % flags["validation_steps"] == 0:
            with open(folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": step, "val_loss": loss_of(flags, step)}) + "\n")
        if flags["rank"] == 1 and step > 2:
            print(
                "CUDA out of memory",
                "train_sdxl_lora.py: error: CUDA ran out of memory; see --train_batch_size",
                sep="\n",
            )
            sys.exit(1)
        if flags["rank"] == 3 and step > 2:
            os.kill(os.getpid(), signal.SIGKILL)
    saved.write_text(str(step))
    (folder / f"checkpoint-{step}").mkdir(exist_ok=True)
    (folder / "pytorch_lora_weights.safetensors").write_text("")
    note(folder, did="told to stop" if told else "trained", step=step)


def evaluate(words):
    folder = Path(words[words.index("--output_dir") + 1])
    flags = yaml.safe_load((folder.parent / "trial.yaml").read_text())
    folder.mkdir(exist_ok=True)
    time.sleep(float(os.environ.get("FAKE_STEP_SECONDS", "0.02")) * 5)
    score = 1 - loss_of(flags, flags["max_train_steps"])
    means = {"score": score, "adherence": score, "aesthetic": 10 * math.log10(flags["learning_rate"]) / -3}
    entry = {name: {"mean": mean, "low": mean, "high": mean} for name, mean in means.items()}
    note(folder.parent, did="judged")
    (folder / "metrics.json").write_text(json.dumps({"models": {"base model": {}, "trial": entry}}))


if __name__ == "__main__":
    (train if "train" in sys.argv[1] else evaluate)(sys.argv[2:])
