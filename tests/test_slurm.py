"""accelerate_configs/*.sbatch, as shipped, on a real SLURM: what interrupts a run neither ends nor changes it."""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from compare import assert_same_run
from harness import ROOT, SDXL, Result, assert_ok, rows, run_trainer
from slurm_cluster import call, cluster, why_not
from test_sweep import trials_of

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=why_not() or "")]
STEPS = 1000


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with cluster(tmp_path_factory.mktemp("slurm")):
        yield


def submit(script, argv, log, *options):
    """Job id of a shipped batch script, submitted from the repository with the environment that pytest runs in."""
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    env |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    words = ["sbatch", "--parsable", f"--output={log}", *options, ROOT / "accelerate_configs" / script, *argv]
    done = subprocess.run([*map(str, words)], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def state(job):
    """(state, restarts) of a job."""
    shown = call("scontrol", "show", "job", "-o", job)
    return re.search(r"JobState=(\w+)", shown)[1], int(re.search(r"Restarts=(\d+)", shown)[1])


def read(log):
    """Text of a log, in which the progress bars of two processes cut each other short."""
    return log.read_text(errors="replace") if log.exists() else ""


def wait_for(condition, log, seconds=180):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, read(log)[-4000:]
        time.sleep(0.2)


def wait_for_restart(job, number, log):
    """Waits until a job was queued again, and lets it start without SLURM's pause of two minutes."""
    wait_for(lambda: state(job) == ("PENDING", number), log)
    # not within the second of its end: its nodes would take it for the one that has ended, and kill it
    call("scontrol", "update", f"JobId={job}", "StartTime=now+5")
    wait_for(lambda: state(job) == ("RUNNING", number), log)


def steps_saved(run):
    return sorted(json.loads(path.read_text())["step"] for path in run.glob("checkpoint-*/progress.json"))


def test_time_limit_signal_and_preemption_leave_the_run_as_if_nothing_had_been(slurm, flags, tmp_path):
    argv = [*flags, "--max_train_steps", STEPS, "--checkpointing_steps", 10 * STEPS]
    run, log = tmp_path / "run", tmp_path / "log"
    job = submit("slurm.sbatch", ["--output_dir", run, *argv], log, "--nodes=2", "--cpus-per-task=1")
    wait_for(lambda: rows(run) > 3, log)
    call("scontrol", "update", f"JobId={job}", "TimeLimit=2")  # the signal is due, and comes within half a minute
    wait_for_restart(job, 1, log)
    first = steps_saved(run)
    call("scontrol", "update", f"JobId={job}", "TimeLimit=60")

    before = rows(run)
    wait_for(lambda: rows(run) > before + 3, log)
    call("scancel", "--batch", "--signal=USR1", job)
    wait_for_restart(job, 2, log)

    before = rows(run)
    wait_for(lambda: rows(run) > before + 3, log)
    call("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 3")
    wait_for_restart(job, 3, log)

    wait_for(lambda: state(job)[0] == "COMPLETED", log, 300)
    told = read(log)
    assert state(job) == ("COMPLETED", 3) and told.count("saved; queued again") == 3, told[-4000:]
    assert told.count("resumed from") == 3 and told.count("of 2 processes") == 4 and told.count(" USR1\n") == 2
    saved = steps_saved(run)
    assert len(first) == 1 and 0 < first[0] < saved[1] < saved[2] < saved[-1] == STEPS
    assert not list(Path(tempfile.gettempdir()).glob(f"preempted-{job}*"))
    whole = assert_ok(run_trainer(argv, tmp_path / "whole", processes=2))
    assert_same_run(whole, Result([0], [told], run), step=STEPS)


def test_what_a_user_cancels_stays_cancelled(slurm, flags, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    argv = ["--output_dir", run, *flags, "--max_train_steps", 10 * STEPS]
    job = submit("slurm.sbatch", argv, log, "--nodes=2", "--cpus-per-task=1")
    wait_for(lambda: rows(run) > 3, log)
    call("scancel", job)
    wait_for(lambda: state(job)[0] == "CANCELLED", log)
    time.sleep(5)
    assert state(job) == ("CANCELLED", 0)
    assert len(steps_saved(run)) == 1  # the work until then is not lost


def test_workers_of_a_sweep_are_an_array_and_each_can_be_interrupted_alone(slurm, world, tmp_path):
    folder, log = tmp_path / "sweep", tmp_path / "log-%a"
    argv = ["--output_dir", folder, "--objective", "val_loss", "--n_trials", 2, "--trial_steps", 300]
    argv += ["--", "--pretrained_model_name_or_path", SDXL, "--train_shards", world / "data/train", "--resolution", 64]
    argv += ["--val_shards", world / "data/val", "--train_batch_size", 2, "--mixed_precision", "no"]
    job = submit("slurm_sweep.sbatch", argv, log, "--array=1-2", "--cpus-per-task=1")
    logs = {worker: tmp_path / f"log-{worker}" for worker in (1, 2)}
    trials = [folder / f"trial-{number:04d}" for number in (0, 1)]
    wait_for(lambda: all(rows(trial) for trial in trials), logs[1])
    call("scancel", "--batch", "--signal=USR1", f"{job}_2")
    wait_for_restart(f"{job}_2", 1, logs[2])
    wait_for(lambda: [state(f"{job}_{worker}")[0] for worker in logs] == ["COMPLETED"] * 2, logs[2], 300)
    assert [state(f"{job}_{worker}")[1] for worker in logs] == [0, 1]
    assert [read(logs[worker]).count("saved; queued again") for worker in logs] == [0, 1]
    assert [trial.state.name for trial in trials_of(folder)] == ["COMPLETE", "COMPLETE"]
    told = [(trial / "log.txt").read_text(errors="replace").count("resumed from") for trial in trials]
    assert sorted(told) == [0, 1], told
