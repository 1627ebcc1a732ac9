"""Rooms 7 and 9, what a run survives: signals, kills, full disks, lost processes, damaged files, lost numbers."""

import errno
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import harness
import pytest
import torch
from harness import ROOT, assert_ok, free_port, run_trainer, start_trainer
from test_checkpoints import assert_same_run, die_in_micro_step, tensors_of
from test_train import lose_a_number, note_samples, samples_by_step

import train_sdxl_lora as trainer

sys.path.append(str(ROOT / "benchmarks"))
from soak import KINDS, soak  # noqa: E402

STEPS = 6


@pytest.fixture(scope="module")
def busy_flags(flags, world):
    """A run with everything in it that a signal can meet."""
    argv = [*flags, "--max_train_steps", STEPS, "--val_shards", world / "data/val", "--validation_steps", 3]
    argv += ["--validation_prompt", "Aquafin", "--num_validation_images", 2, "--gradient_accumulation_steps", 2]
    return [*argv, "--checkpointing_steps", 1000, "--resume_from_checkpoint", "latest", "--lora_dropout", 0.2]


@pytest.fixture(scope="module", params=[1, 2])
def whole(request, busy_flags, tmp_path_factory):
    """(processes, the uninterrupted run)."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return request.param, assert_ok(run_trainer(busy_flags, folder, request.param))


def rank_of(module):
    return int(os.environ.get("RANK", 0))


def signal_at(name, call, number, ranks, note, module):
    """Sends `number` to the process itself as it enters the `call`-th call of a function, on some ranks."""
    original, calls = getattr(module, name), []

    def function(*args, **kwargs):
        calls.append(1)
        if len(calls) == call and rank_of(module) in ranks:
            Path(note).write_text(repr(time.time()))
            os.kill(os.getpid(), number)
            time.sleep(0.2)  # for the thread that hears it
        return original(*args, **kwargs)

    setattr(module, name, function)


MOMENTS = {
    "index building": ("cached_index_shard", 1),
    "model loading": ("load_models", 1),
    "the first step": ("train_step", 1),
    "a micro-step": ("train_step", 4),
    "validation": ("validation_requests", 1),
    "sampling": ("generate_image", 1),
    "the save of a checkpoint": ("complete_checkpoint", 1),
    "the last step": ("send_report", STEPS),
    "the last validation": ("validate", 2),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_at_any_moment_saves_leaves_and_resumes_identically(busy_flags, whole, tmp_path, moment):
    processes, reference = whole
    argv, (function, call), marker = list(busy_flags), MOMENTS[moment], tmp_path / "preempted"
    if moment == "the save of a checkpoint":
        argv += ["--checkpointing_steps", 2]
    one_of_them = {processes - 1} if moment in ("a micro-step", "validation", "index building") else {0, 1}
    number = signal.SIGUSR1 if moment == "a micro-step" else signal.SIGTERM
    if moment == "the save of a checkpoint":
        one_of_them = {0}  # only the main process does that
    hook = partial(signal_at, function, call, number, one_of_them, tmp_path / "sent")
    result = run_trainer(argv, tmp_path / "run", processes, env={"PREEMPT_FILE": str(marker)}, setup=hook, timeout=90)
    assert time.time() - float((tmp_path / "sent").read_text()) < 10
    assert_ok(result)
    assert marker.exists()
    early = moment in ("index building", "model loading") or (moment == "the first step" and processes == 1)
    assert bool(list((tmp_path / "run").glob("checkpoint-*"))) != early
    assert_same_run(reference, assert_ok(run_trainer(argv, tmp_path / "run", processes)), step=STEPS)


def send_many(module):
    """Two kinds of signal, many times, to the process and its loader processes."""
    original, calls = module.train_step, []

    def train_step(run, batch):
        calls.append(1)
        for number in [signal.SIGTERM, signal.SIGUSR1] * 5 if len(calls) == 5 else ():
            os.kill(os.getpid(), number)
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            for child in map(int, children):
                os.kill(child, number)
        if len(calls) == 5:
            time.sleep(0.3)
        return original(run, batch)

    module.train_step = train_step


def test_many_signals_also_to_the_loader_processes_are_one_stop(busy_flags, tmp_path):
    argv = [*busy_flags, "--dataloader_num_workers", 2]
    reference = assert_ok(run_trainer(argv, tmp_path / "whole"))
    assert_ok(run_trainer(argv, tmp_path / "run", setup=send_many))
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]
    assert_same_run(reference, assert_ok(run_trainer(argv, tmp_path / "run")), step=STEPS)


def test_signals_are_the_callers_own_again_after_main():
    handlers = [signal.getsignal(number) for number in trainer.StopSignal.NUMBERS]
    for _ in range(2):
        with trainer.stop_signals():
            trainer.stop.begun = trainer.stop.patient = True
            os.kill(os.getpid(), signal.SIGUSR1)
            deadline = time.monotonic() + 5
            while not trainer.stop and time.monotonic() < deadline:
                time.sleep(0.01)
            assert trainer.stop
            with trainer.stop_signals():  # main() within a script that listens already
                pass
            assert signal.getsignal(signal.SIGTERM) is not handlers[0]
        assert not trainer.stop
        assert [signal.getsignal(number) for number in trainer.StopSignal.NUMBERS] == handlers
        assert signal.set_wakeup_fd(-1) == -1


def command(argv, output_dir, launcher=(), processes=1):
    words = [sys.executable]
    if launcher:
        words += ["-m", "accelerate.commands.launch", *launcher, "--num_processes", processes]
        words += ["--main_process_port", free_port()]
    return [str(word) for word in [*words, ROOT / "train_sdxl_lora.py", *argv, "--output_dir", output_dir]]


def start_command(words, log, **env):
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"} | env
    with open(log, "w") as stream:
        return subprocess.Popen(words, env=env, stdout=stream, stderr=stream, start_new_session=True)


def wait_until(condition, seconds=120):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline, "what was waited for never came"
        time.sleep(0.02)


def rows(output_dir):
    path = Path(output_dir) / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def trainers(output_dir):
    """Processes of this machine whose command line names `output_dir`, launchers and loader processes included."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(output_dir) in path.read_text().split("\0"):
                found.append(int(path.parent.name))
        except OSError:
            pass
    return found


LAUNCHERS = {
    "none": (),
    "plain": ("--mixed_precision", "no", "--num_machines", "1", "--dynamo_backend", "no"),
    "ddp.yaml": ("--config_file", ROOT / "accelerate_configs/ddp.yaml"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher, processes, number",
    [
        ("none", 1, signal.SIGINT),
        ("plain", 1, signal.SIGTERM),
        ("ddp.yaml", 1, signal.SIGTERM),
        ("ddp.yaml", 2, signal.SIGTERM),
        ("ddp.yaml", 2, signal.SIGUSR1),
        ("ddp.yaml", 2, signal.SIGKILL),
    ],
)
def test_a_signal_to_the_launcher_saves_within_ten_seconds_and_resumes_identically(
    flags, tmp_path, launcher, processes, number
):
    argv = [*flags, "--max_train_steps", 60, "--checkpointing_steps", 1000, "--resume_from_checkpoint", "latest"]
    run = tmp_path / "run"
    process = start_command(command(argv, run, LAUNCHERS[launcher], processes), tmp_path / "log")
    wait_until(lambda: rows(run) >= 3 or process.poll() is not None)
    sent = time.time()
    process.send_signal(number)
    wait_until(lambda: not trainers(run), 60)
    took = time.time() - sent
    print(f"{launcher}, {processes} processes, {signal.Signals(number).name}: gone after {took:.1f} s")
    assert took < 10, (tmp_path / "log").read_text()[-3000:]
    process.wait()
    saved = [int(p.name.split("-")[1]) for p in run.glob("checkpoint-*")]
    assert len(saved) == 1 and 3 <= saved[0] < 60, (tmp_path / "log").read_text()[-3000:]
    result = assert_ok(run_trainer(argv, run, processes))
    assert_same_run(assert_ok(run_trainer(argv, tmp_path / "whole", processes)), result, step=60)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("moment", ["index building", "validation", "sampling"])
def test_a_signal_to_the_launcher_in_the_midst_of_other_work_is_obeyed_too(flags, world, tmp_path, moment, processes):
    argv = [*flags, "--max_train_steps", 3, "--checkpointing_steps", 1000, "--resume_from_checkpoint", "latest"]
    shard, run = next((world / "data/train").glob("*.tar")), tmp_path / "run"
    if moment == "index building":
        argv[argv.index("--train_shards") + 1] = f"pipe:sleep 4; cat {shard}"
    if moment == "validation":
        argv += ["--val_shards", world / "data/train", "--validation_steps", 1]
    if moment == "sampling":
        argv += ["--validation_prompt", "Aquafin", "--num_validation_images", 12, "--validation_steps", 1]
    process = start_command(command(argv, run, LAUNCHERS["ddp.yaml"], processes), tmp_path / "log")
    wait_until((run / "shards").exists if moment == "index building" else lambda: rows(run))
    time.sleep(0.3)
    sent = time.time()
    process.terminate()
    wait_until(lambda: not trainers(run), 60)
    assert time.time() - sent < 10, (tmp_path / "log").read_text()[-3000:]
    process.wait()
    saved = [json.loads(path.read_text()) for path in run.glob("checkpoint-*/progress.json")]
    if moment == "index building":
        assert saved == []
    else:
        assert [(p["step"], p["validation_due"]) for p in saved] == [(1, True)]
    result = assert_ok(run_trainer(argv, run, processes))
    assert_same_run(assert_ok(run_trainer(argv, tmp_path / "whole", processes)), result, step=3)


def test_a_signal_while_torch_is_imported_leaves_the_marker_and_exit_code_0(flags, tmp_path):
    marker = tmp_path / "preempted"
    process = start_command(command(flags, tmp_path / "run"), tmp_path / "log", PREEMPT_FILE=str(marker))
    time.sleep(1.5)
    process.terminate()
    assert process.wait(10) == 0 and marker.exists()
    assert not (tmp_path / "run").exists()


def interrupt_twice(seconds, module):
    original, calls = module.train_step, []

    def train_step(run, batch):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(seconds)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        return original(run, batch)

    module.train_step = train_step


def test_ctrl_c_twice_stops_at_once_but_a_launchers_echo_of_the_first_does_not(flags, tmp_path):
    argv = [*flags, "--resume_from_checkpoint", "latest"]
    stopped = run_trainer(argv, tmp_path / "twice", setup=partial(interrupt_twice, 1.2))
    assert stopped.codes == [130] and not list((tmp_path / "twice").glob("checkpoint-*"))
    assert_ok(run_trainer(argv, tmp_path / "echo", setup=partial(interrupt_twice, 0.1)))
    assert [p.name for p in (tmp_path / "echo").glob("checkpoint-*")] == ["checkpoint-3"]


def hang(rank, module):
    module.STOP_SECONDS = 3
    original, calls = module.train_step, []

    def train_step(run, batch):
        calls.append(1)
        if len(calls) == 3 and rank_of(module) == rank:
            os.kill(os.getpid(), signal.SIGSTOP)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(run, batch)

    module.train_step = train_step


def test_a_process_whose_peer_hangs_ends_with_the_reason_after_a_signal(flags, tmp_path):
    children = start_trainer(flags, tmp_path / "run", 2, setup=partial(hang, 1))
    children[0][0].join(60)
    os.kill(children[1][0].pid, signal.SIGKILL)
    children[1][0].join()
    assert children[0][0].exitcode == 1
    assert "SIGTERM: no step has ended for 3 s" in Path(children[0][1]).read_text()


def be_impatient(module):
    module.STOP_SECONDS = 2


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_process_whose_peers_never_come_leaves_after_a_signal(flags, tmp_path, rank):
    marker = tmp_path / "preempted"
    env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    env |= {"MASTER_PORT": str(free_port()), "PREEMPT_FILE": str(marker)}
    ((child, _),) = start_trainer(flags, tmp_path / "run", env=env, setup=be_impatient)
    child.join(20)  # for the import of torch, if this is the first test
    os.kill(child.pid, signal.SIGTERM)
    child.join(10)
    assert child.exitcode == 0
    assert marker.exists() == (rank == "0")  # else a main process that failed would be requeued for ever


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_runs_killed_at_random_instants_end_as_if_they_had_not_been(world, tmp_path, kind):
    report = soak(world, tmp_path, 10, 2, *KINDS[kind], seed=1)
    assert report["kills"] >= 10 and report["while_saving"] >= 2
    assert report["identical"] == report["runs"] > 0


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


@pytest.mark.parametrize("processes", [1, 4])
def test_a_checkpoint_of_two_processes_goes_on_with_the_same_samples_on_any_number(flags, tmp_path, processes):
    argv = [*flags, "--train_batch_size", 2, "--checkpointing_steps", 2, "--resume_from_checkpoint", "latest"]
    for name in ("expected", "found"):
        (tmp_path / name).mkdir()
    assert_ok(run_trainer(argv, tmp_path / "whole", 2, setup=partial(note_samples, tmp_path / "expected")))
    hook = partial(note_samples, tmp_path / "found")
    assert_ok(run_trainer([*argv, "--max_train_steps", 2], tmp_path / "run", 2, setup=hook))
    argv += ["--train_batch_size", 4 // processes]
    again = assert_ok(run_trainer(argv, tmp_path / "run", processes, setup=hook))
    assert re.search(r"resumed with another --train_batch_size: '2' then, '[14]' now", again.output)
    expected = samples_by_step(tmp_path / "expected")
    assert len(expected) == 4 and all(len(keys) == 4 for keys in expected.values())
    assert samples_by_step(tmp_path / "found") == expected


def test_another_global_batch_is_refused_or_goes_on_in_the_same_pass(flags, tmp_path):
    first = [a for a in flags if a not in ("--species_csv",) and not str(a).endswith("train_species.csv")]
    first += ["--species_mix", 1, 1, 0, "--max_train_samples", 24, "--train_batch_size", 2, "--max_train_steps", 5]
    (tmp_path / "found").mkdir()
    hook, argv = partial(note_samples, tmp_path / "found"), [*first, "--resume_from_checkpoint", "latest"]
    argv += ["--train_batch_size", 7, "--max_train_steps", 7]
    assert_ok(run_trainer(first, tmp_path / "run", setup=hook))
    refused = run_trainer(argv, tmp_path / "run")
    assert refused.codes == [1] and "global batch: 2 then, 7 now" in refused.output
    assert "--allow_batch_change" in refused.output
    assert_ok(run_trainer([*argv, "--allow_batch_change"], tmp_path / "run", setup=hook))
    delivered = [line.split()[0] for lines in samples_by_step(tmp_path / "found").values() for line in lines]
    assert len(delivered) == 24 and len(set(delivered)) == 24  # one pass: nothing lost, nothing twice
    progress = json.loads((tmp_path / "run/checkpoint-7/progress.json").read_text())
    assert progress["samples"] == 24


def test_another_base_model_is_refused(flags, tmp_path):
    import safetensors.torch

    other = tmp_path / "other"
    shutil.copytree(flags[1], other)
    weights = next((other / "unet").glob("*.safetensors"))
    tensors = safetensors.torch.load_file(weights)
    tensors["conv_in.bias"] = tensors["conv_in.bias"] + 1
    safetensors.torch.save_file(tensors, weights, {"format": "pt"})
    argv = [*flags, "--max_train_steps", 1, "--resume_from_checkpoint", "latest"]
    assert_ok(run_trainer(argv, tmp_path / "run"))
    refused = run_trainer([*argv, "--pretrained_model_name_or_path", other], tmp_path / "run")
    assert refused.codes == [1] and "base model: " in refused.output


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory):
    """Output folder of a finished run with one checkpoint."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    return assert_ok(run_trainer([*flags, "--max_train_steps", 2, "--train_text_encoder"], folder)).output_dir


def test_every_flipped_bit_of_a_checkpoint_is_detected_before_it_is_loaded(finished, tmp_path):
    folder, rng = tmp_path / "checkpoint-2", random.Random(5)
    shutil.copytree(finished / "checkpoint-2", folder)
    assert trainer.verify_checkpoint(folder) is None
    files = sorted(folder.iterdir())
    assert {"checksums.json", "progress.json", "optimizer.bin"} < {path.name for path in files}
    places = [(path, rng.randrange(path.stat().st_size)) for path in files for _ in range(40)]
    places += [(files[0], at) for at in range(files[0].stat().st_size)]  # all of checksums.json
    assert len(places) >= 200 and files[0].name == "checksums.json"
    for path, at in places:
        data = bytearray(path.read_bytes())
        data[at] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        assert trainer.verify_checkpoint(folder) is not None, (path.name, at)
        data = bytearray((finished / "checkpoint-2" / path.name).read_bytes())
        path.write_bytes(data)
    assert trainer.verify_checkpoint(folder) is None


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_a_checkpoint_with_code_in_it_is_not_executed(flags, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, tmp_path / "run")
    folder = tmp_path / "run/checkpoint-2"
    torch.save(
        {"state": {}, "param_groups": [Bomb()]}, folder / "optimizer.bin", pickle_protocol=pickle.DEFAULT_PROTOCOL
    )
    names = [p.name for p in folder.iterdir() if p.name != "checksums.json"]
    (folder / "checksums.json").write_text(trainer.make_checksums(folder, names))
    argv = [*flags, "--max_train_steps", 4, "--train_text_encoder", "--resume_from_checkpoint", "latest"]
    result = run_trainer(argv, tmp_path / "run")
    assert result.codes == [1] and "weights_only" in result.output.lower()
    assert not (tmp_path / "exploded").exists()


def test_a_checkpoint_of_another_version_is_an_error_that_says_what_to_do(flags, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    folder = tmp_path / "run/checkpoint-2"
    progress = json.loads((folder / "progress.json").read_text())
    (folder / "progress.json").write_text(json.dumps(progress | {"from_the_future": 1}))
    names = [p.name for p in folder.iterdir() if p.name != "checksums.json"]
    (folder / "checksums.json").write_text(trainer.make_checksums(folder, names))
    argv = [*flags, "--max_train_steps", 4, "--train_text_encoder", "--resume_from_checkpoint", "latest"]
    result = run_trainer(argv, tmp_path / "run")
    assert result.codes == [1] and "from_the_future" in result.output


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
        module.open = self.guard("open", open, full)


def save_on_full_disk(original, disk, module, *args):
    """original(*args) on that disk."""
    patched = os.fsync, os.replace, os.rename, os.mkdir, torch.save
    disk.install(module)
    try:
        return original(*args)
    finally:
        os.fsync, os.replace, os.rename, os.mkdir, torch.save = patched
        del module.open


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
            saved = run.saving.result() is None
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
    assert re.search(r"nor could \S+/lora-step-4-\S+ take the LoRA", result.output)
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
            assert [row["step"] for row in trainer.read_jsonl(path)] == [1]
    tracker.log({"loss": 1.0}, step=4)
    assert [row["step"] for row in trainer.read_jsonl(path)] == [1, 2, 3, 4]


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
    assert result.codes[1 - rank] == 1 and "another process of this run is gone" in result.outputs[1 - rank]
    assert result.codes[rank] == (1 if kind == "exception" else -signal.SIGKILL)
    assert (kind == "exception") == ("a fault in rank one" in result.outputs[rank])
    assert trainer.verify_checkpoint(tmp_path / "run/checkpoint-2") is None


def test_steps_without_a_finite_loss_are_left_out_when_asked_until_there_are_too_many(flags, tmp_path):
    argv = [*flags, "--on_nonfinite", "skip", "--checkpointing_steps", 1, "--max_train_steps", 5]
    result = assert_ok(run_trainer(argv, tmp_path / "run", 2, setup=partial(lose_a_number, (1, 2), 1)))
    assert [row["nonfinite_steps"] for row in result.metrics()] == [0, 1, 2, 2, 2]
    assert ["loss" in row for row in result.metrics()] == [True, False, False, True, True]
    assert "step left out: loss is nan" in result.output and "at step 2, samples " in result.output
    kept = [(tmp_path / f"run/checkpoint-{n}/pytorch_lora_weights.safetensors").read_bytes() for n in (1, 2, 3, 4)]
    assert kept[0] == kept[1] == kept[2] != kept[3]
    argv += ["--resume_from_checkpoint", "latest", "--max_train_steps", 50, "--checkpointing_steps", 50]
    hopeless = run_trainer(argv, tmp_path / "run", 2, setup=partial(lose_a_number, range(5, 99), 0), timeout=120)
    assert hopeless.codes == [1, 1] and "(31 steps in a row)" in hopeless.output


def test_fp16_leaves_out_the_steps_its_scaler_skips_and_gives_up_after_many_in_a_row(caplog):
    accelerator = SimpleNamespace(scaler=object())
    args, progress = SimpleNamespace(on_nonfinite="stop"), trainer.Progress()
    run = SimpleNamespace(args=args, accelerator=accelerator, progress=progress)
    norm, losses = torch.tensor(float("inf")), torch.tensor([0.1, float("nan")])
    for step in range(trainer.MAX_NONFINITE_STEPS):
        trainer.count_lost_step(run, trainer.Report(step, None, None, norm, losses, ["a", "b"], []), float("nan"))
    assert progress.nonfinite_steps == progress.nonfinite_in_a_row == trainer.MAX_NONFINITE_STEPS
    with pytest.raises(trainer.TrainingError, match=r"at step 99, samples b \(31 steps in a row\)"):
        trainer.count_lost_step(run, trainer.Report(99, None, None, norm, losses, ["a", "b"], []), float("nan"))
    accelerator.scaler = None
    with pytest.raises(trainer.TrainingError, match="at step 100, samples a, b; no checkpoint holds it"):
        trainer.count_lost_step(run, trainer.Report(100, None, None, norm, losses, ["a", "b"], []), 0.1)


def scale_gradients(module):
    """A loss scaler as fp16 has it, on the CPU, which loses the fourth step."""
    lose_a_number((3,), 0, module)
    make_accelerator = module.make_accelerator

    def with_scaler(args):
        accelerator = make_accelerator(args)
        accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        return accelerator

    module.make_accelerator = with_scaler
    module.weight_dtype_of = lambda name: torch.float32


def test_with_a_loss_scaler_skip_and_stop_are_the_same(flags, tmp_path):
    argv = [*flags, "--train_batch_size", 4, "--max_train_steps", 6, "--checkpointing_steps", 6, "--logging_steps", 1]
    stop = assert_ok(run_trainer(argv, tmp_path / "stop", setup=scale_gradients))
    skip = assert_ok(run_trainer([*argv, "--on_nonfinite", "skip"], tmp_path / "skip", setup=scale_gradients))
    assert "step left out: loss is nan" in skip.output and skip.metrics()[-1]["nonfinite_steps"] == 1
    assert_same_run(stop, skip, step=6)


def test_the_error_of_a_lost_loss_comes_before_any_checkpoint_of_it(flags, tmp_path):
    argv = [*flags, "--max_train_steps", 8, "--logging_steps", 100, "--checkpointing_steps", 3]
    result = run_trainer(argv, tmp_path / "run", 2, setup=partial(lose_a_number, (2,), 1), timeout=60)
    assert result.codes == [1, 1] and "at step 3, samples " in result.output
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def run_out_of_memory(module):
    def diffusion_loss(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    module.diffusion_loss = diffusion_loss


def test_out_of_memory_names_the_flags_that_help_in_order(flags, tmp_path):
    result = run_trainer(flags, tmp_path / "run", setup=run_out_of_memory)
    assert result.codes == [1]
    helpful = ["--gradient_checkpointing", "--train_batch_size", "--gradient_accumulation_steps", "--use_8bit_adam"]
    line = [line for line in result.output.splitlines() if "out of GPU memory; try" in line][-1].split("; try")[1]
    places = [line.index(flag) for flag in helpful]
    assert places == sorted(places)


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


def test_an_output_dir_that_cannot_be_written_is_one_line(flags, tmp_path):
    words = command(flags, "/proc/nowhere/run")
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 1
    assert "error: --output_dir: cannot write there" in done.stderr and "Traceback" not in done.stderr


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
