"""What a run left behind, compared bit by bit."""

import signal
from functools import partial

import safetensors.torch
import torch
from harness import assert_ok, run_trainer
from hooks import die_in_micro_step


def flatten(name, value):
    """(name, tensor) of every number and tensor in nested dicts and lists."""
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flatten(f"{name}.{key}", inner)
    elif isinstance(value, (int, float, torch.Tensor)):
        yield name, torch.as_tensor(value)


def tensors_of(folder):
    """All that a checkpoint holds of adapters and optimizer, by name."""
    adapters = safetensors.torch.load_file(folder / "pytorch_lora_weights.safetensors")
    return adapters | dict(flatten("optimizer", torch.load(folder / "optimizer.bin", weights_only=True)))


def assert_same_run(a, b, step):
    first, second = tensors_of(a.output_dir / f"checkpoint-{step}"), tensors_of(b.output_dir / f"checkpoint-{step}")
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different
    assert a.metrics() == b.metrics()


def assert_resume_is_exact(argv, folder, processes=1):
    """A run of 6 steps of 2 micro-steps each, killed in mid-update after checkpoint 4 and resumed, is a whole run."""
    whole = assert_ok(run_trainer(argv, folder / "whole", processes))
    argv = [*argv, "--resume_from_checkpoint", "latest"]
    killed = run_trainer(argv, folder / "killed", processes, setup=partial(die_in_micro_step, 9), timeout=120)
    assert -signal.SIGKILL in killed.codes and not (folder / "killed/checkpoint-6").exists()
    assert_same_run(whole, assert_ok(run_trainer(argv, folder / "killed", processes)), step=6)
    files = list((folder / "whole").glob("pytorch_lora_weights*.safetensors"))
    assert len(files) == 2 and all(path.read_bytes() == (folder / "killed" / path.name).read_bytes() for path in files)
