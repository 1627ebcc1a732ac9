"""What the three scripts answer before they import torch: --help, a wrong flag, a missing file."""

import os
import resource
import subprocess
import sys

import pytest
from harness import ROOT, SDXL

SNAPSHOT = ["--pretrained_model_name_or_path", SDXL]
WRONG = {
    "train_sdxl_lora.py": {
        "--learning_rat: there is no such flag": [*SNAPSHOT, "--train_shards", "x.tar", "--learning_rat", "1e-4"],
        "--rank: found 0": [*SNAPSHOT, "--train_shards", "x.tar", "--rank", "0"],
        "--train_shards: x.tar: no file x.tar": [*SNAPSHOT, "--train_shards", "x.tar"],
        "--train_data_dir: no folder nowhere": [*SNAPSHOT, "--train_data_dir", "nowhere"],
    },
    "evaluate.py": {
        "--lorra: there is no such flag": [*SNAPSHOT, "--output_dir", "out", "--lorra", "x"],
        "--lora: no LoRA file x.safetensors": [*SNAPSHOT, "--lora", "x.safetensors", "--output_dir", "out"],
        "--prompts: ": [*SNAPSHOT, "--prompts", "nowhere.jsonl", "--output_dir", "out"],
    },
    "hpo_sweep.py": {
        "--n_trial: there is no such flag": ["--output_dir", "out", "--n_trial", "3"],
        "--search_space: ": ["--output_dir", "out", "--search_space", "nowhere.yaml", "--", *SNAPSHOT],
    },
}
CASES = [(script, message, words) for script, errors in WRONG.items() for message, words in errors.items()]


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory):
    """A folder whose `torch` ends the process that imports it."""
    folder = tmp_path_factory.mktemp("without_torch")
    (folder / "torch.py").write_text("import os\nos._exit(99)\n")
    return folder


def answer(script, words, folder, without_torch):
    """(exit status, stdout, stderr, seconds of CPU time) of a script that cannot import torch."""
    command = [sys.executable, ROOT / script, *words]
    environment = os.environ | {"PYTHONPATH": str(without_torch)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(list(map(str, command)), env=environment, cwd=folder, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return result.returncode, result.stdout, result.stderr, seconds


@pytest.mark.parametrize("script", WRONG)
def test_help_needs_no_torch_and_less_than_a_second(script, tmp_path, without_torch):
    status, out, _, seconds = answer(script, ["--help"], tmp_path, without_torch)
    assert status == 0 and out.startswith("usage:")
    assert seconds < 1


@pytest.mark.parametrize("script, message, words", CASES, ids=[message for _, message, _ in CASES])
def test_a_wrong_flag_or_a_missing_file_is_named_before_torch_is_imported(
    script, message, words, tmp_path, without_torch
):
    status, out, err, seconds = answer(script, words, tmp_path, without_torch)
    assert status == 2 and out == ""
    assert err.startswith(f"{script}: error: {message}") and err.count("\n") == 1
    assert seconds < 1


@pytest.mark.parametrize("script", WRONG)
def test_the_torch_of_these_tests_cannot_be_imported(script, tmp_path, without_torch):
    words = [*SNAPSHOT, "--train_data_dir", tmp_path, "--output_dir", "out"]
    if script == "evaluate.py":
        words = [*SNAPSHOT, "--output_dir", "out"]
    if script == "hpo_sweep.py":
        words = ["--output_dir", "out", "--", *words]
    assert answer(script, words, tmp_path, without_torch)[0] == 99


ON_WINDOWS = """
import runpy, signal, sys, sysconfig
sysconfig.get_config_vars()
import configargparse, filelock, fsspec, numpy, pyarrow, yaml, PIL.Image, tqdm.auto, safetensors, optuna
sys.platform = "win32"  # only for the scripts: the libraries are imported already
sys.modules["fcntl"] = None
del signal.SIGUSR1
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("script", WRONG)
def test_windows_users_get_help_and_one_line_about_wsl(script, tmp_path, without_torch):
    def run(*words):
        environment = os.environ | {"PYTHONPATH": f"{without_torch}:{ROOT}"}
        command = [sys.executable, "-c", ON_WINDOWS, ROOT / script, *words]
        return subprocess.run(list(map(str, command)), env=environment, cwd=tmp_path, capture_output=True, text=True)

    shown = run("--help")
    assert shown.returncode == 0 and shown.stdout.startswith("usage:"), shown.stderr[-500:]
    refused = run(*SNAPSHOT, "--output_dir", "out")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert refused.stderr.startswith(f"{script}: error: Windows") and "WSL2" in refused.stderr
