import math
import sys
from types import SimpleNamespace

import pytest
import torch

from sdxl_data import InputError
from train_sdxl_lora import Progress, make_lr_schedule, make_optimizer, make_parameter_groups, update_weights

FLAGS = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_weight_decay": 0.03, "adam_epsilon": 1e-7}


def make(name, scales=(1.0, 0.3), learning_rate=1e-3):
    parameters = [torch.nn.Parameter(torch.ones(96, 96)) for _ in scales]
    groups = [{"params": [p], "lr": learning_rate * scale} for p, scale in zip(parameters, scales)]
    return make_optimizer(SimpleNamespace(optimizer=name, **FLAGS), groups, learning_rate), parameters


def step(optimizer, parameters, steps=1):
    """How far each parameter has moved after `steps` steps along a constant gradient."""
    before = [p.detach().clone() for p in parameters]
    for _ in range(steps):
        for p in parameters:
            p.grad = torch.full_like(p, 0.5)
        optimizer.step()
    return [(b - p.detach()).mean().item() for b, p in zip(before, parameters)]


def test_the_default_is_fused_adamw_with_the_flags_and_rates_of_the_groups():
    optimizer, parameters = make("adamw")
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["fused"] is True
    for group, rate in zip(optimizer.param_groups, (1e-3, 3e-4)):
        assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (rate, (0.8, 0.95), 0.03, 1e-7)
    decayed = [rate * (1 + 0.03) for rate in (1e-3, 3e-4)]  # Adam's first step is the rate, decay comes on top
    assert step(optimizer, parameters) == pytest.approx(decayed, rel=1e-3)


def test_prodigy_finds_its_own_step():
    optimizer, parameters = make("prodigy", scales=(1.0,), learning_rate=1.0)
    group = optimizer.param_groups[0]
    assert type(optimizer).__name__ == "Prodigy"
    assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (1.0, (0.8, 0.95), 0.03, 1e-7)
    first = step(optimizer, parameters)[0]
    assert 0 < first < step(optimizer, parameters, steps=20)[0] / 20


def test_prodigy_trains_the_encoders_too():
    optimizer, parameters = make("prodigy", scales=(1.0, 0.3), learning_rate=1.0)
    assert min(step(optimizer, parameters)) > 0


def test_adamw8bit_takes_a_step_or_says_which_flag_is_at_fault():
    try:
        optimizer, parameters = make("adamw8bit")
    except InputError as error:
        assert "--optimizer" in str(error)
        return
    assert type(optimizer).__name__ == "AdamW8bit"
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 3e-4]
    assert step(optimizer, parameters) == pytest.approx([1e-3, 3e-4], rel=0.05)


def test_a_missing_package_is_an_error_that_names_the_flag(monkeypatch):
    for name, package in (("adamw8bit", "bitsandbytes"), ("prodigy", "prodigyopt")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(InputError, match=f"--optimizer: {name}"):
            make(name)


WARM_UP, STEPS = 10, 110
DECAYED = {  # after half and 99 % of the way from the end of the warm-up to the last step
    "linear": (0.5, 0.01),
    "cosine": (0.5, 0.5 + 0.5 * math.cos(0.99 * math.pi)),
    "cosine_with_restarts": (0.5, 0.5 + 0.5 * math.cos(0.99 * math.pi)),
    "polynomial": (0.5, 0.01),
    "constant_with_warmup": (1, 1),
}


@pytest.mark.parametrize("name", DECAYED)
def test_a_schedule_rises_over_the_warm_up_and_reaches_its_end_with_the_last_step(name):
    factor = make_lr_schedule(name, WARM_UP, STEPS)
    assert [factor(0), factor(5), factor(WARM_UP)] == pytest.approx([0, 0.5, 1])
    assert [factor(60), factor(STEPS - 1)] == pytest.approx(DECAYED[name], abs=1e-6)
    assert [factor(s) for s in (60, 5)] == [make_lr_schedule(name, WARM_UP, STEPS)(s) for s in (60, 5)]


def test_the_constant_schedule_is_one_from_the_start():
    factor = make_lr_schedule("constant", WARM_UP, STEPS)
    assert [factor(s) for s in (0, 5, 60, STEPS - 1)] == [1] * 4


@pytest.mark.parametrize("name", DECAYED)
def test_without_warm_up_the_first_step_has_the_full_rate(name):
    assert make_lr_schedule(name, 0, STEPS)(0) == 1


def test_cycles_and_power_shape_their_schedules():
    two = make_lr_schedule("cosine_with_restarts", 0, 100, num_cycles=2)
    assert [two(0), two(25), two(49), two(50)] == pytest.approx([1, 0.5, 0, 1], abs=1e-2)
    square = make_lr_schedule("polynomial", 0, 100, power=2.0)
    assert [square(0), square(50)] == pytest.approx([1, 0.25], abs=1e-4)


def test_the_factor_multiplies_the_peak_of_each_group():
    trained = {"unet": torch.nn.Linear(2, 2), "text_encoder": torch.nn.Linear(2, 2)}
    groups = make_parameter_groups(trained, 1e-3, 0.3)
    optimizer = make_optimizer(SimpleNamespace(optimizer="adamw", **FLAGS), groups, 1e-3)
    batches = SimpleNamespace(plan=SimpleNamespace(global_batch=2), states={1: [], 2: []})
    run = SimpleNamespace(optimizer=optimizer, lr_schedule=lambda step: (0.5, 0.25)[step], progress=Progress())
    run.args, run.accelerator, run.batches = (
        SimpleNamespace(on_nonfinite="stop"),
        SimpleNamespace(scaler=None),
        batches,
    )
    update_weights(run)
    update_weights(run)
    assert run.progress.step == 2 and run.progress.samples == 4
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([2.5e-4, 7.5e-5])
