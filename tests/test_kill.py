"""A run that is killed, or loses one of its processes, resumes from its newest checkpoint."""

import os
import re
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

import harness
import pytest
import torch
from compare import assert_resume_is_exact, assert_same_run, tensors_of
from harness import ROOT, assert_ok, run_trainer, start_trainer, wait_until
from hooks import die_in_micro_step, rank_of

import train_sdxl_lora as trainer

sys.path.append(str(ROOT / "benchmarks"))
from soak import KINDS, soak  # noqa: E402


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_runs_killed_at_random_instants_end_as_if_they_had_not_been(world, tmp_path, kind):
    kills, aimed = (10, 2) if kind in ("no workers", "2 workers", "2 processes") else (5, 1)
    report = soak(world, tmp_path, kills, aimed, *KINDS[kind], seed=1)
    assert report["kills"] >= kills and report["while_saving"] >= aimed
    assert report["identical"] == report["runs"] > 0


@pytest.mark.parametrize("processes", [3, 4])
def test_three_and_four_processes_resume_in_the_middle_of_an_update(flags, tmp_path, processes):
    argv = [*flags, "--train_batch_size", 1, "--gradient_accumulation_steps", 2, "--max_train_steps", 6, "--rank", 8]
    argv += ["--checkpointing_steps", 2, "--train_text_encoder", "--lora_dropout", 0.2, "--crop", "bucket"]
    assert_resume_is_exact(argv, tmp_path, processes)


ARITHMETIC = {
    "bf16": ["--mixed_precision", "bf16"],
    "prodigy": ["--optimizer", "prodigy", "--learning_rate", 1, "--train_text_encoder"],
    "adamw8bit": ["--optimizer", "adamw8bit", "--rank", 64],  # smaller tensors keep 32 bits
    "dora": ["--use_dora"],
}


@pytest.mark.parametrize("kind", [*ARITHMETIC, pytest.param("fp16", marks=pytest.mark.gpu)])
def test_every_arithmetic_resumes_in_the_middle_of_an_update(flags, tmp_path, kind):
    env = {"ACCELERATE_USE_CPU": "false"} if kind == "fp16" else {}
    run_trainer = partial(harness.run_trainer, env=env)
    argv = [
        *flags,
        *ARITHMETIC.get(kind, ["--mixed_precision", kind]),
        "--lora_dropout",
        0.3,
        "--gradient_accumulation_steps",
        2,
    ]
    argv += ["--max_train_steps", 4, "--checkpointing_steps", 2, "--resume_from_checkpoint", "latest"]
    whole = run_trainer(argv, tmp_path / "whole")
    if kind == "adamw8bit" and "--optimizer" in whole.output and whole.codes != [0]:
        pytest.skip("needs bitsandbytes on a CPU or GPU that it supports: pip install -r requirements.txt")
    assert_ok(whole)
    killed = run_trainer(argv, tmp_path / "run", setup=partial(die_in_micro_step, 5))
    assert killed.codes == [-signal.SIGKILL] and (tmp_path / "run/checkpoint-2").is_dir()
    assert_same_run(whole, assert_ok(run_trainer(argv, tmp_path / "run")), step=4)
    if kind == "adamw8bit":
        assert torch.uint8 in {tensor.dtype for tensor in tensors_of(tmp_path / "run/checkpoint-4").values()}
    if kind == "fp16":
        assert (tmp_path / "run/checkpoint-4/scaler.pt").read_bytes() == (
            tmp_path / "whole/checkpoint-4/scaler.pt"
        ).read_bytes()


def fail_on(kind, rank, module):
    """At the third step one rank raises, or is killed."""
    original, calls = module.train_step, []

    def train_step(run, batch):
        calls.append(1)
        if len(calls) == 3 and rank_of(module) == rank:
            if kind == "exception":
                raise ZeroDivisionError("a fault in rank one")
            os.kill(os.getpid(), signal.SIGKILL)
        return original(run, batch)

    module.train_step = train_step


@pytest.mark.parametrize("kind", ["exception", "SIGKILL"])
@pytest.mark.parametrize("rank", [0, 1])
def test_when_one_process_dies_the_other_ends_within_a_minute_and_says_so(flags, tmp_path, kind, rank):
    started = time.time()
    argv = [*flags, "--checkpointing_steps", 1]
    result = run_trainer(argv, tmp_path / "run", 2, setup=partial(fail_on, kind, rank), timeout=60)
    assert time.time() - started < 60
    assert result.codes[1 - rank] == 1 and "another process of this run has ended" in result.outputs[1 - rank]
    assert result.codes[rank] == (1 if kind == "exception" else -signal.SIGKILL)
    assert (kind == "exception") == ("a fault in rank one" in result.outputs[rank])
    assert trainer.verify_checkpoint(tmp_path / "run/checkpoint-2") is None


def hold(folder, module):
    original, calls = module.train_step, []

    def train_step(run, batch):
        calls.append(1)
        if len(calls) == 2:
            Path(folder, "holding").touch()
            while not Path(folder, "go").exists():
                time.sleep(0.02)
        return original(run, batch)

    module.train_step = train_step


@pytest.mark.parametrize("processes", [1, 2])
def test_a_second_run_on_the_same_folder_is_refused_until_the_first_is_gone(flags, tmp_path, processes):
    argv = [*flags, "--dataloader_num_workers", 1, "--checkpointing_steps", 1, "--resume_from_checkpoint", "latest"]
    children = start_trainer(argv, tmp_path / "run", setup=partial(hold, tmp_path))
    wait_until((tmp_path / "holding").exists)
    (tmp_path / "run.0.log").rename(tmp_path / "first.log")
    refused = run_trainer(argv, tmp_path / "run", processes)
    assert refused.codes == [1] * processes
    assert re.search(rf"--output_dir: \S+run is in use by process {children[0][0].pid} on ", refused.output)
    os.kill(children[0][0].pid, signal.SIGKILL)  # its loader process lives on for seconds, the lock does not
    children[0][0].join()
    again = assert_ok(run_trainer([*argv, "--train_batch_size", 2 // processes], tmp_path / "run", processes))
    assert "resumed from" in again.output


def test_tensorboard_has_every_step_once_after_a_kill(flags, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    argv = [*flags, "--report_to", "tensorboard", "--checkpointing_steps", 2, "--resume_from_checkpoint", "latest"]
    killed = run_trainer(argv, tmp_path / "run", setup=partial(die_in_micro_step, 3))
    assert killed.codes == [-signal.SIGKILL]
    assert_ok(run_trainer(argv, tmp_path / "run"))
    steps = []
    for folder in {p.parent for p in (tmp_path / "run/logs").rglob("events.out.tfevents.*")}:
        events = EventAccumulator(str(folder)).Reload()
        steps += [e.step for e in events.Scalars("loss")] if "loss" in events.Tags()["scalars"] else []
    assert sorted(steps) == [1, 2, 3, 4]


# ---- a checkpoint that takes long


def slow_save(folder, module):
    """Checkpoints take a second and a half, of which training waits a twentieth; `folder` notes when what happened."""
    complete, step = module.complete_checkpoint, module.train_step

    def note(text):
        with open(folder / "events", "a") as file:
            file.write(text + "\n")

    def complete_checkpoint(unfinished, final, files):
        note(f"begin {final.name}")
        time.sleep(1.5)
        complete(unfinished, final, files)
        note(f"end {final.name}")

    def train_step(run, batch):
        note(f"step {run.progress.step + 1}")
        return step(run, batch)

    module.SAVE_WAIT, module.complete_checkpoint, module.train_step = 0.05, complete_checkpoint, train_step


def slow_save_and_die(folder, module):
    """The same, and SIGKILL in step 4, while checkpoint-3 is being written."""
    slow_save(folder, module)
    original = module.train_step

    def train_step(run, batch):
        if run.progress.step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(run, batch)

    module.train_step = train_step


@pytest.mark.parametrize("processes", [1, 2])
def test_training_goes_on_while_a_checkpoint_is_written_and_may_die_then(flags, tmp_path, processes):
    argv = [*flags, "--max_train_steps", 5, "--lora_dropout", 0.3, "--logging_steps", 1]
    whole = assert_ok(run_trainer([*argv, "--checkpointing_steps", 100], tmp_path / "whole", processes))
    argv += ["--checkpointing_steps", 3, "--resume_from_checkpoint", "latest"]
    slow = assert_ok(run_trainer(argv, tmp_path / "slow", processes, setup=partial(slow_save, tmp_path)))
    assert_same_run(whole, slow, step=5)
    events = (tmp_path / "events").read_text().splitlines()
    began, ended = events.index("begin checkpoint-3"), events.index("end checkpoint-3")
    assert "step 5" in events[began:ended] and events[-2:] == ["begin checkpoint-5", "end checkpoint-5"]
    # what was written meanwhile is the state of step 3, not of a later one: a run that resumes from it is the same
    shutil.rmtree(tmp_path / "slow/checkpoint-5")
    assert_same_run(whole, assert_ok(run_trainer(argv, tmp_path / "slow", processes)), step=5)

    argv += ["--checkpointing_steps", 1]
    killed = run_trainer(argv, tmp_path / "run", processes, setup=partial(slow_save_and_die, tmp_path), timeout=60)
    assert -signal.SIGKILL in killed.codes
    assert (tmp_path / "run/checkpoint-2").is_dir() and not (tmp_path / "run/checkpoint-3").exists()
    assert_same_run(whole, assert_ok(run_trainer(argv, tmp_path / "run", processes)), step=5)
