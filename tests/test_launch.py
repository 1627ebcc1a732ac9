"""accelerate_configs/ddp.yaml, unchanged, on one machine and two: topology comes by flags; a wrong one is refused."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from compare import assert_same_run
from harness import ROOT, Result, assert_ok, free_port, run_trainer

CONFIG = ROOT / "accelerate_configs/ddp.yaml"


def launch(folder, argv, machines=1, processes=2, cpu=True):
    """(exit codes, outputs) of one launcher per machine, all on loopback."""
    env = {k: v for k, v in os.environ.items() if k != "ACCELERATE_USE_CPU"}
    env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env |= {"ACCELERATE_USE_CPU": "true"} if cpu else {}
    port, children, logs = free_port(), [], []
    for rank in range(machines):
        words = ["--config_file", CONFIG, "--num_machines", machines, "--num_processes", processes]
        words += ["--machine_rank", rank, "--main_process_ip", "127.0.0.1", "--main_process_port", port]
        words += [ROOT / "train_sdxl_lora.py", *argv]
        command = [sys.executable, "-m", "accelerate.commands.launch", *words]
        logs.append(folder / f"machine-{rank}.log")
        with open(logs[-1], "w") as stream:
            children.append(subprocess.Popen([*map(str, command)], env=env, stdout=stream, stderr=stream))
    end = time.monotonic() + 120
    try:
        codes = [child.wait(max(0, end - time.monotonic())) for child in children]
    finally:
        for child in children:
            child.kill()
    return codes, [log.read_text(errors="replace") for log in logs]


@pytest.mark.slow
@pytest.mark.parametrize("machines", [1, 2])
def test_one_machine_or_two_train_what_two_processes_train(flags, tmp_path, machines):
    argv = [*flags, "--max_train_steps", 8, "--lora_dropout", 0.2]
    codes, outputs = launch(tmp_path, ["--output_dir", tmp_path / "run", *argv], machines)
    assert codes == [0] * machines, outputs
    whole = assert_ok(run_trainer(argv, tmp_path / "whole", processes=2))
    assert_same_run(whole, Result(codes, outputs, tmp_path / "run"), step=8)


@pytest.mark.slow
def test_two_worlds_of_one_where_one_of_two_was_asked_for_are_refused(flags, tmp_path):
    """Without a GPU the launcher starts processes that do not know of each other; each would train and save."""
    codes, outputs = launch(tmp_path, ["--output_dir", tmp_path / "run", *flags], cpu=False)
    assert codes == [1]
    assert "--num_processes: the launcher started 2 processes, but each sees 1" in outputs[0]
    assert "ACCELERATE_USE_CPU=true" in outputs[0]
    assert not list(Path(tmp_path / "run").glob("checkpoint-*")) and not (tmp_path / "run/metrics.jsonl").exists()


def test_the_file_says_nothing_that_differs_from_machine_to_machine():
    """Nor what Accelerate ignores in a file in silence."""
    config = yaml.safe_load(CONFIG.read_text())
    assert config == {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU"}


def test_every_way_to_launch_uses_the_same_file():
    for path in ("accelerate_configs/slurm.sbatch", "sagemaker/entry.py", "hpo_sweep.py", "README.md"):
        assert "accelerate_configs/ddp.yaml" in (ROOT / path).read_text(), path
    assert [path.name for path in (ROOT / "accelerate_configs").glob("*.y*ml")] == ["ddp.yaml"]
