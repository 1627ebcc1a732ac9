"""One training step: what the flags hand to the loss, and how the gradients are clipped."""

from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from harness import ALONE, assert_ok, run_trainer

import sdxl_data
import train_sdxl_lora as trainer


@pytest.fixture(scope="module")
def parse(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("args")
    return lambda *words: trainer.parse_args([str(word) for word in [*flags, "--output_dir", folder, *words]])


@pytest.fixture(scope="module")
def batch(parse):
    dataset, _, _ = trainer.make_data(ALONE, parse(), seed=1)
    loader = sdxl_data.make_loader(dataset, [[(0, -1, 0, 0), (1, -1, 0, 1)]], workers=0, pin_memory=False)
    return trainer.move_batch(next(iter(loader)), "cpu")


@pytest.fixture(scope="module")
def accelerator():
    yield Accelerator(cpu=True, mixed_precision="no")
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def make_run(accelerator):
    """A function of the flags that makes what train_step needs, with fresh models and plain gradient descent."""

    def make(args):
        models = trainer.load_models(args, torch.float32, "cpu")
        trained = trainer.add_adapters(args, models, seed=0)
        parameters = [p for model in trained.values() for p in model.parameters() if p.requires_grad]
        return SimpleNamespace(
            args=args,
            accelerator=accelerator,
            models=models,
            optimizer=torch.optim.SGD(parameters, lr=1.0),
            weight_dtype=torch.float32,
            progress=trainer.Progress(seed=1),
        )

    return make


def test_the_flags_of_the_loss_reach_it(parse, batch, make_run, monkeypatch):
    seen = {}

    def sample_batch_noise(models, batch, noise_offset):
        seen["noise_offset"] = noise_offset
        return {}

    def diffusion_loss(models, batch, draws, weight_dtype, snr_gamma, caption_dropout_rate, dropped_caption):
        seen["snr_gamma"] = snr_gamma
        seen["caption_dropout_rate"] = caption_dropout_rate
        seen["dropped_caption"] = dropped_caption
        return sum(p.sum() for p in models.unet.parameters() if p.requires_grad).expand(2)

    monkeypatch.setattr(trainer, "sample_batch_noise", sample_batch_noise)
    monkeypatch.setattr(trainer, "diffusion_loss", diffusion_loss)
    words = ["--snr_gamma", 2, "--noise_offset", 0.05, "--caption_dropout_rate", 0.3, "--dropped_caption", "empty"]
    trainer.train_step(make_run(parse(*words)), batch)
    assert seen == {"snr_gamma": 2, "noise_offset": 0.05, "caption_dropout_rate": 0.3, "dropped_caption": "empty"}


def take_step(run, batch):
    """(norm that train_step gives back, all gradients, how far plain gradient descent moves the weights)."""
    (group,) = run.optimizer.param_groups
    before = torch.cat([p.detach().flatten().clone() for p in group["params"]])
    _, norm = trainer.train_step(run, batch)
    gradient = torch.cat([p.grad.flatten().clone() for p in group["params"]])
    run.optimizer.step()
    after = torch.cat([p.detach().flatten() for p in group["params"]])
    return norm.item(), gradient, before - after


def test_gradients_are_scaled_to_max_grad_norm_and_the_norm_before_that_is_told(parse, batch, make_run):
    norm, gradient, _ = take_step(make_run(parse("--max_grad_norm", 1e9)), batch)
    assert norm == pytest.approx(gradient.norm().item(), rel=1e-5)
    limit = norm / 10
    norm_of_clipped, clipped, moved = take_step(make_run(parse("--max_grad_norm", limit)), batch)
    assert norm_of_clipped == pytest.approx(norm, rel=1e-5)
    assert torch.allclose(clipped, gradient * limit / norm, rtol=1e-4, atol=0)
    assert moved.norm().item() == pytest.approx(limit, rel=1e-3)


def test_the_logged_grad_norm_is_the_one_before_clipping(flags, trained, tmp_path):
    clipped = assert_ok(run_trainer([*flags, "--max_grad_norm", 1e-9], tmp_path / "run"))
    assert clipped.metrics()[0]["grad_norm"] == trained.metrics()[0]["grad_norm"] > 1e-6
    # Adam divides by the gradient plus epsilon, 1e-8: so small a gradient hardly moves the weights
    name = "pytorch_lora_weights.safetensors"
    files = [safetensors.torch.load_file(run.output_dir / name) for run in (clipped, trained)]
    small, usual = (max(t.abs().max().item() for k, t in file.items() if "lora_B" in k) for file in files)
    assert 0 < small < usual / 10


@pytest.mark.parametrize("rate, same", [(0.0, True), (0.5, False)])
def test_lora_dropout_changes_the_gradient_as_the_sample_says(parse, batch, make_run, rate, same):
    gradients = []
    for position in (0, 1):
        _, gradient, _ = take_step(make_run(parse("--lora_dropout", rate)), batch | {"positions": [position]})
        gradients.append(gradient)
    assert torch.equal(*gradients) == same
