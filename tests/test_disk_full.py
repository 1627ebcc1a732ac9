"""A full disk: the checkpoint before stays, the run continues, and no line of a log is torn."""

import errno
import json
import os
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compare import assert_same_run
from harness import assert_ok, run_trainer

import train_sdxl_lora as trainer


class FullDisk:
    """Lets `budget` writing calls through, then fails `failures` of them as a full disk does."""

    def __init__(self, budget, failures=10**9):
        self.budget, self.failures, self.calls = budget, failures, []

    def guard(self, name, original, fault):
        def function(*args, **kwargs):
            self.calls.append(name)
            if self.budget < len(self.calls) <= self.budget + self.failures:
                raise fault
            return original(*args, **kwargs)

        return function

    def install(self, module):
        full = OSError(errno.ENOSPC, "No space left on device")
        for owner, name in ((os, "fsync"), (os, "replace"), (os, "rename"), (os, "mkdir")):
            setattr(owner, name, self.guard(name, getattr(owner, name), full))
        # what torch 2.15 raises on a real full disk
        of_torch = RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 576 vs 534")
        torch.save = self.guard("torch.save", torch.save, of_torch)
        module.open = module.data.open = self.guard("open", open, full)


def save_on_full_disk(original, disk, module, *args):
    """original(*args) on that disk."""
    patched = os.fsync, os.replace, os.rename, os.mkdir, torch.save
    disk.install(module)
    try:
        return original(*args)
    finally:
        os.fsync, os.replace, os.rename, os.mkdir, torch.save = patched
        del module.open, module.data.open


def fill_disk(step, budget, failures, module):
    """At the checkpoint of `step` the disk takes `budget` writes and fails the next `failures`."""
    original = module.save_checkpoint

    def save_checkpoint(run, last):
        disk = FullDisk(budget if run.progress.step == step else 10**9, failures)
        return save_on_full_disk(original, disk, module, run, last)

    module.SAVE_PAUSE = 0.1
    module.save_checkpoint = save_checkpoint


def fill_disk_at_every_write(note, module):
    """Tries the checkpoint of step 2 with room for 0, 1, 2, … writes, then for all but the last; then gives it up."""
    original = module.save_checkpoint

    def save_checkpoint(run, last):
        if run.progress.step != 2:
            return original(run, last)
        tries, output_dir = [], Path(run.args.output_dir)
        for budget in range(100):
            disk = FullDisk(budget)
            save_on_full_disk(original, disk, module, run, last)
            saved = run.pending_checkpoint.result() is None
            found = [(p.name, module.verify_checkpoint(p)) for p in output_dir.glob("*checkpoint-*")]
            tries.append([saved, disk.calls, found])
            if saved:
                break
        Path(note).write_text(json.dumps(tries))
        shutil.rmtree(output_dir / "checkpoint-2")

    module.save_checkpoint = save_checkpoint


def test_a_full_disk_at_every_write_of_a_checkpoint_leaves_the_one_before_and_the_run_goes_on(flags, tmp_path):
    argv = [*flags, "--train_text_encoder", "--checkpointing_steps", 1, "--max_train_steps", 3]
    whole = assert_ok(run_trainer(argv, tmp_path / "whole"))
    hook = partial(fill_disk_at_every_write, tmp_path / "tries")
    result = assert_ok(run_trainer(argv, tmp_path / "run", setup=hook))
    *failed, last = json.loads((tmp_path / "tries").read_text())
    assert {"open", "fsync", "replace", "rename", "mkdir", "torch.save"} == {
        c for _, calls, _ in failed for c in calls
    }
    assert len(failed) > 15 and last[0] is True
    for number, (saved, calls, found) in enumerate(failed):
        assert saved is False and len(calls) > number
        assert ["checkpoint-1", None] in found and all(fault is None for _, fault in found), calls[-1]
        assert len(found) == 1 or calls.count("rename") == 1  # nothing half-written beside it
    assert result.output.count("checkpoint-2 was not written") == len(failed)
    assert_same_run(whole, result, step=3)


def test_a_disk_that_is_full_at_the_end_is_tried_again_or_the_lora_is_elsewhere(flags, tmp_path, monkeypatch):
    argv = [*flags, "--checkpointing_steps", 2]
    result = assert_ok(run_trainer(argv, tmp_path / "run", setup=partial(fill_disk, 4, 3, 2)))
    assert "checkpoint-4 was not written" in result.output
    assert trainer.verify_checkpoint(tmp_path / "run/checkpoint-4") is None
    result = run_trainer(argv, tmp_path / "both-full", setup=partial(fill_disk, 4, 3, 8))
    assert result.codes == [1]
    assert re.search(r"\S+/lora-step-4-\S+ could not hold the LoRA either", result.output)
    result = run_trainer(argv, tmp_path / "full", setup=partial(fill_disk, 4, 3, 4))
    assert result.codes == [1]
    folder = re.search(r"the LoRA is in (\S+);", result.output)[1]
    reference = (tmp_path / "run/pytorch_lora_weights.safetensors").read_bytes()
    assert (Path(folder) / "pytorch_lora_weights.safetensors").read_bytes() == reference
    shutil.rmtree(folder)
    assert trainer.verify_checkpoint(tmp_path / "full/checkpoint-2") is None


class HalfFull:
    """A file on a disk with room for ten more characters."""

    def __init__(self, path, mode, **kwargs):
        self.file = open(path, mode, **kwargs)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, text):
        self.file.write(text[:10])
        self.file.flush()
        raise OSError(errno.ENOSPC, "No space left on device")


def test_rows_wait_for_room_on_the_disk_and_none_is_torn(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    tracker = trainer.JsonlTracker(path)
    tracker.log({"loss": 1.0}, step=1)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "open", HalfFull, raising=False)
        for step in (2, 3):
            with pytest.raises(OSError, match="No space"):
                tracker.log({"loss": 1.0}, step=step)
            assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1]
    tracker.log({"loss": 1.0}, step=4)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a filesystem of its own, 2 MB large."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs root, to mount a small filesystem: sudo make test")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_on_a_disk_that_really_is_full_the_newest_whole_checkpoint_loads(flags, small_disk, tmp_path):
    argv = [*flags, "--rank", 4, "--checkpointing_steps", 1, "--max_train_steps", 12, "--cache_dir", tmp_path]
    result = run_trainer(argv, small_disk / "run", env={"TMPDIR": str(tmp_path)})
    found = sorted(int(p.name.split("-")[1]) for p in (small_disk / "run").glob("checkpoint-*"))
    assert 1 <= len(found) < 12 and result.codes == [1]
    assert all(trainer.verify_checkpoint(small_disk / f"run/checkpoint-{step}") is None for step in found)
    where = re.search(r"the LoRA is in (\S+);", result.output)
    assert where and Path(where[1], "pytorch_lora_weights.safetensors").exists()
    shutil.rmtree(small_disk / f"run/checkpoint-{found[0]}")
    shutil.rmtree(small_disk / f"run/checkpoint-{found[1]}")
    argv += ["--resume_from_checkpoint", "latest", "--checkpoints_total_limit", 1]
    whole = assert_ok(run_trainer(argv, tmp_path / "whole"))
    assert_same_run(whole, assert_ok(run_trainer(argv, small_disk / "run")), step=12)


# ---- asked first


def leave_free(size, module):
    """The disk has `size` bytes left."""
    module.shutil.disk_usage = lambda path: SimpleNamespace(free=size)


@pytest.mark.parametrize(
    "more", [[], ["--optimizer", "prodigy", "--learning_rate", 1, "--train_text_encoder"], ["--use_dora"]]
)
def test_a_disk_too_small_for_one_checkpoint_is_said_before_anything_is_read(flags, tmp_path, more):
    argv = [*flags, *more, "--rank", 8, "--max_train_steps", 2]
    whole = assert_ok(run_trainer(argv, tmp_path / "whole"))
    size = sum(path.stat().st_size for path in (whole.output_dir / "checkpoint-2").iterdir())
    result = run_trainer(argv, tmp_path / "small", setup=partial(leave_free, 0.5 * size))
    assert result.codes == [1]
    said = re.search(r"--output_dir: ([\d.]+) GB are free .* a checkpoint takes ([\d.]+) GB; free some", result.output)
    assert said and not (tmp_path / "small/index").exists() and "index of" not in result.output
    assert_ok(run_trainer(argv, tmp_path / "enough", setup=partial(leave_free, 1.1 * size)))


def test_a_layer_that_does_not_exist_is_said_before_anything_is_read(flags, tmp_path):
    result = run_trainer([*flags, "--lora_target_modules", "to_x"], tmp_path / "run")
    assert result.codes == [1] and "--lora_target_modules: no layer" in result.output
    assert "index of" not in result.output


def test_asking_for_the_disk_leaves_no_trace_in_the_random_numbers(flags, tmp_path):
    args = trainer.parse_args([str(word) for word in [*flags, "--output_dir", tmp_path]])
    torch.manual_seed(3)
    expected = torch.get_rng_state()
    trainer.check_disk(args, trainer.load_shapes(args, torch.float32, 1).trained)
    assert torch.equal(torch.get_rng_state(), expected)
