"""What a run left behind, compared bit by bit."""

import safetensors.torch
import torch


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
