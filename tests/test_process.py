"""The process of a run: what the flags hand to Accelerate, PyTorch and the trackers."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import LoggerType

import train_sdxl_lora as trainer


@pytest.fixture
def make(flags, tmp_path, monkeypatch):
    """make_accelerator() of some more flags, on a stand-in: what Accelerator and PyTorch were given."""
    calls = {}

    def make_stand_in(**options):
        calls.update(options)
        return SimpleNamespace(
            num_processes=1, mixed_precision=options["mixed_precision"], device=torch.device("cuda")
        )

    monkeypatch.setattr(trainer, "Accelerator", make_stand_in)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda name: calls.update(matmul=name))
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda mode: calls.update(deterministic=mode))
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    fill = torch.utils.deterministic.fill_uninitialized_memory
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", fill)  # put back afterwards

    def run(*words):
        calls.clear()
        args = trainer.parse_args([str(word) for word in [*flags, "--output_dir", tmp_path / "run", *words]])
        trainer.make_accelerator(args)
        return dict(calls)

    with torch._inductor.config.patch(deterministic=False):  # put back afterwards
        yield run


def test_tf32_and_deterministic_kernels_are_asked_for(make):
    assert make()["deterministic"] is True and "matmul" not in make()
    assert "deterministic" not in make("--no-deterministic")
    assert make("--allow_tf32")["matmul"] == "high"


def test_precision_and_accumulation_are_those_of_the_flags(make):
    found = make("--mixed_precision", "fp16", "--gradient_accumulation_steps", 3)
    assert (found["mixed_precision"], found["gradient_accumulation_steps"]) == ("fp16", 3)


def test_logs_go_where_logging_dir_says(make, tmp_path):
    assert make("--logging_dir", "journal")["project_config"].logging_dir == str(tmp_path / "run/journal")


@pytest.mark.parametrize(
    "asked, expected",
    [("none", []), ("wandb", ["wandb"]), ("comet_ml", ["comet_ml"]), ("all", ["tensorboard", "comet_ml"])],
)
def test_report_to_names_the_trackers_beside_metrics_jsonl(make, monkeypatch, asked, expected):
    installed = [LoggerType.TENSORBOARD, LoggerType.COMETML]
    if asked == "wandb":
        installed.append(LoggerType.WANDB)
    monkeypatch.setattr(trainer, "get_available_trackers", lambda: installed)
    *trackers, last = make("--report_to", asked)["log_with"]
    assert trackers == expected and isinstance(last, trainer.JsonlTracker)
