"""A loss or gradient that is not finite: the step is left out or the run ends, and no checkpoint contains it."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from compare import assert_same_run
from harness import assert_ok, run_trainer
from hooks import lose_a_number

import train_sdxl_lora as trainer


def test_a_loss_that_is_not_finite_on_one_rank_ends_both_and_names_step_and_samples(flags, tmp_path):
    argv = [*flags, "--checkpointing_steps", 2]
    result = run_trainer(argv, tmp_path / "run", processes=2, setup=partial(lose_a_number, (2,), 1), timeout=60)
    assert result.codes == [1, 1]
    for output in result.outputs:
        assert "loss is nan" in output and "at step 3, samples " in output
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (tmp_path / "run/pytorch_lora_weights.safetensors").exists()


def test_steps_without_a_finite_loss_are_skipped_when_asked_but_not_for_ever(flags, tmp_path):
    argv = [*flags, "--on_nonfinite", "skip", "--checkpointing_steps", 1, "--max_train_steps", 5]
    result = assert_ok(run_trainer(argv, tmp_path / "run", 2, setup=partial(lose_a_number, (1, 2), 1)))
    assert [row["nonfinite_steps"] for row in result.metrics()] == [0, 1, 2, 2, 2]
    assert ["loss" in row for row in result.metrics()] == [True, False, False, True, True]
    assert "step skipped: loss is nan" in result.output and "at step 2, samples " in result.output
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
        trainer.count_nonfinite_step(run, trainer.Report(step, None, None, norm, losses, ["a", "b"], []), float("nan"))
    assert progress.nonfinite_steps == progress.nonfinite_in_a_row == trainer.MAX_NONFINITE_STEPS
    with pytest.raises(trainer.TrainingError, match=r"at step 99, samples b \(31 steps in a row\)"):
        trainer.count_nonfinite_step(run, trainer.Report(99, None, None, norm, losses, ["a", "b"], []), float("nan"))
    accelerator.scaler = None
    with pytest.raises(trainer.TrainingError, match="at step 100, samples a, b; no checkpoint contains it"):
        trainer.count_nonfinite_step(run, trainer.Report(100, None, None, norm, losses, ["a", "b"], []), 0.1)


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
    assert "step skipped: loss is nan" in skip.output and skip.metrics()[-1]["nonfinite_steps"] == 1
    assert_same_run(stop, skip, step=6)


def test_the_error_of_a_lost_loss_comes_before_any_checkpoint_of_it(flags, tmp_path):
    argv = [*flags, "--max_train_steps", 8, "--logging_steps", 100, "--checkpointing_steps", 3]
    result = run_trainer(argv, tmp_path / "run", 2, setup=partial(lose_a_number, (2,), 1), timeout=60)
    assert result.codes == [1, 1] and "at step 3, samples " in result.output
    assert not list((tmp_path / "run").glob("checkpoint-*"))
