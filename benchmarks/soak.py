"""Kill runs at random moments and check that they end exactly like an uninterrupted run.

    python benchmarks/soak.py                                                        # 200 kills
    python benchmarks/soak.py --kills 60 --kinds "3 processes" "4 processes"         # 6 minutes on two cores

Each run trains the UNet and both text encoders on the demo's dataset, with LoRA dropout, gradient accumulation and
validation, and saves every third step. It is killed with SIGKILL and started again by the same command until it is
done. Some kills come at a random moment after the start; others wait until a checkpoint is being written. Of several
processes, one or all are killed. At the end, adapters, optimizer and rows of metrics are compared bit by bit.
Runs are forked from a process that has imported torch, so the time to recover does not include the imports.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo"), str(ROOT / "tests")]

STEPS = 20
KINDS = {  # name → (loader workers, processes)
    "no workers": (0, 1),
    "2 workers": (2, 1),
    "2 processes": (0, 2),
    "3 processes": (0, 3),
    "4 processes": (1, 4),
}


def make_flags(world, workers, processes):
    """Flags with frequent saves and validations; the global batch is 4, or 2 for each process from three on."""
    from harness import SDXL

    return [
        *("--pretrained_model_name_or_path", SDXL, "--train_shards", world / "data/train"),
        *("--class_csv", world / "manifests/train_species.csv", "--val_shards", world / "data/val"),
        *("--resolution", 64, "--train_batch_size", max(1, 2 // processes), "--seed", 7),
        *("--gradient_accumulation_steps", 2),
        *("--train_text_encoder", "--rank", 4, "--lora_dropout", 0.2, "--random_flip", "--noise_offset", 0.05),
        *("--max_train_steps", STEPS, "--checkpointing_steps", 3, "--checkpoints_total_limit", 2),
        *("--logging_steps", 1, "--validation_steps", 7, "--learning_rate", 1e-3, "--mixed_precision", "no"),
        *("--dataloader_num_workers", workers, "--report_to", "none", "--resume_from_checkpoint", "latest"),
    ]


def note_first_step(path, module):
    """Writes the time at which the run's first forward pass begins."""
    original = module.train_step

    def train_step(run, batch):
        if not os.path.exists(path):
            Path(path).write_text(repr(time.time()))
        return original(run, batch)

    module.train_step = train_step


def final_state(output_dir):
    """(tensors of adapters and optimizer by name, rows of metrics without times, best validation) at the end."""
    from compare import tensors_of

    folder = output_dir / f"checkpoint-{STEPS}"
    tensors = tensors_of(folder)
    lines = map(json.loads, (output_dir / "metrics.jsonl").read_text().splitlines())
    rows = [{k: v for k, v in row.items() if k not in ("time", "images_per_second")} for row in lines]
    return tensors, rows, json.loads((folder / "progress.json").read_text())["best"]


def are_identical(a, b):
    import torch

    same = a[0].keys() == b[0].keys() and all(torch.equal(a[0][name], b[0][name]) for name in a[0])
    return same and a[1:] == b[1:]


def wait_for_instant(children, output_dir, longest, aimed, rng):
    """Waits for the moment to kill: a random one within `longest` seconds, or while a checkpoint is being written."""
    until = time.time() + rng.random() * longest * 0.6  # so early that most runs are killed several times
    while any(child.is_alive() for child, _ in children):
        if time.time() > until and (not aimed or list(output_dir.glob(".checkpoint-*.partial"))):
            time.sleep(rng.random() * 0.02 if aimed else 0)
            return
        time.sleep(0.0005 if aimed else 0.005)


def kill(children, rng):
    """Kills one process or all and waits for the others to end. Returns whether one of the killed was still alive.

    A process that waits for a killed one to connect does not end by itself: it gets SIGTERM, as launchers send it.
    """
    victims = children if rng.random() < 0.5 else [rng.choice(children)]
    met = [child for child, _ in victims if child.is_alive()]
    for child in met:
        os.kill(child.pid, signal.SIGKILL)
    for child, _ in children:
        child.join(5)
        if child.is_alive():
            child.terminate()
        child.join(60)
        if child.is_alive():
            raise RuntimeError("a process still runs a minute after the other one was killed")
    return bool(met)


def count_lost(output_dir):
    """(steps that a resume repeats, bytes of rows and half-written checkpoints that it deletes)."""
    saved = max((int(p.name.split("-")[1]) for p in output_dir.glob("checkpoint-*")), default=0)
    metrics = output_dir / "metrics.jsonl"
    done = saved
    size = 0
    for line in metrics.read_text().splitlines() if metrics.exists() else ():
        step = json.loads(line)["step"] if line.endswith("}") else saved + 1
        done = max(done, step)
        if step > saved:
            size += len(line) + 1
    size += sum(p.stat().st_size for p in output_dir.glob(".*.partial/*"))
    return done - saved, size


def soak(world, folder, kills, aimed, workers, processes, seed=0, tell=print):
    """Counts of at least `kills` kills, at least `aimed` of them while a checkpoint was being written."""
    from harness import assert_ok, run_trainer, start_trainer

    rng = random.Random(seed)
    flags = make_flags(world, workers, processes)
    folder = Path(folder)
    output_dir = folder / "killed"
    first_step = folder / "first_step"
    expected = final_state(assert_ok(run_trainer(flags, folder / "whole", processes)).output_dir)
    started = time.time()
    assert are_identical(final_state(assert_ok(run_trainer(flags, folder / "again", processes)).output_dir), expected)
    longest = time.time() - started
    report = dict.fromkeys(("kills", "while_saving", "runs", "identical", "steps_again", "bytes_lost"), 0)
    report["slowest_recovery"] = 0.0
    while report["kills"] < kills or report["while_saving"] < aimed or output_dir.exists():
        first_step.unlink(missing_ok=True)
        resumes = bool(list(output_dir.glob("checkpoint-*")))
        started = time.time()
        enough = report["kills"] >= kills and report["while_saving"] >= aimed
        children = start_trainer(flags, output_dir, processes, setup=partial(note_first_step, first_step))
        aim = report["while_saving"] < aimed and rng.random() < 0.3
        wait_for_instant(children, output_dir, 1e6 if enough else longest, aim, rng)
        if kill(children, rng):
            report["kills"] += 1
            report["while_saving"] += bool(list(output_dir.glob(".checkpoint-*.partial")))
            steps, size = count_lost(output_dir)
            report["steps_again"] += steps
            report["bytes_lost"] += size
        else:
            if any(child.exitcode for child, _ in children):
                raise RuntimeError("\n".join(Path(log).read_text()[-2000:] for _, log in children))
            report["runs"] += 1
            report["identical"] += are_identical(final_state(output_dir), expected)
            shutil.rmtree(output_dir)
            tell(json.dumps(report))
        if resumes and first_step.exists():
            recovery = float(first_step.read_text()) - started
            report["slowest_recovery"] = max(report["slowest_recovery"], round(recovery, 2))
    return report


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="number of kills")
    parser.add_argument("--aimed", type=int, default=30, help="kills while a checkpoint is being written")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments of the kills")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="loader workers, processes")
    args = parser.parse_args()
    from world import make_dataset

    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder, "world")
        make_dataset(world, seed=3, scale=0.06, val_per_species=1)
        reports = {}
        for n, kind in enumerate(args.kinds):
            share = [len(range(n, amount, len(args.kinds))) for amount in (args.kills, args.aimed)]
            reports[kind] = soak(world, Path(folder, str(n)), *share, *KINDS[kind], args.seed + n)
            print(f"{kind}: {json.dumps(reports[kind])}", flush=True)
    total = {k: sum(r[k] for r in reports.values()) for k in reports[kind]}
    total["slowest_recovery"] = max(r["slowest_recovery"] for r in reports.values())
    print(f"total: {json.dumps(total)}")
    sys.exit(total["identical"] != total["runs"])


if __name__ == "__main__":
    main()
