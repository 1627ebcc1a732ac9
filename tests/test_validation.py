"""Room 8: a loss that covers every sample once whatever the world, and pictures that are what users will get."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from harness import assert_ok, run_trainer
from PIL import Image

import train_sdxl_lora as trainer


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_every_sample_is_validated_exactly_once(world, batch_size):
    hashes = np.random.default_rng(0).integers(0, 2**63, 23).astype(np.uint64)
    index = SimpleNamespace(id_hashes=hashes)
    seen = Counter()
    for rank in range(world):
        for requests, size in trainer.validation_requests(index, batch_size, rank, world, None):
            assert len(requests) == batch_size
            seen.update(row for row, *_ in requests[:size])
    assert seen == Counter(range(23))


def val_losses(result):
    return [row["val_loss"] for row in result.metrics() if "val_loss" in row]


def test_the_loss_is_the_same_on_two_or_three_processes_and_at_any_batch_size(flags, world, tmp_path):
    argv = [*flags, "--val_shards", world / "data/val", "--max_train_steps", 1]
    argv += ["--lr_scheduler", "linear", "--lr_warmup_steps", 9]  # the first step is at rate 0: the adapters stay
    one = val_losses(assert_ok(run_trainer([*argv, "--train_batch_size", 4], tmp_path / "one")))
    two = val_losses(assert_ok(run_trainer([*argv, "--train_batch_size", 4], tmp_path / "two", processes=2)))
    three = val_losses(assert_ok(run_trainer([*argv, "--train_batch_size", 4], tmp_path / "three", processes=3)))
    odd = val_losses(assert_ok(run_trainer([*argv, "--train_batch_size", 3], tmp_path / "odd")))
    assert len(one) == 1
    assert one == pytest.approx(two, rel=1e-9)
    assert one == pytest.approx(three, rel=1e-9)
    assert one == pytest.approx(odd, rel=1e-6)


def test_two_processes_draw_the_same_grid_as_one(flags, tmp_path):
    (tmp_path / "prompts.txt").write_text("Aquafin, standing in a cave\nPebblor, jumping on a beach\n")
    argv = [*flags, "--validation_prompts", tmp_path / "prompts.txt", "--num_validation_images", 2]
    argv += ["--max_train_steps", 1, "--train_batch_size", 2, "--learning_rate", 1e-12]
    grids = []
    for processes in (1, 2):
        result = assert_ok(run_trainer(argv, tmp_path / str(processes), processes=processes))
        grids.append(np.asarray(Image.open(result.output_dir / "samples/step-1.png")).astype(int))
    assert np.abs(grids[0] - grids[1]).max() <= 1
    assert grids[0].shape == (2 * 144, 2 * 128, 3) and grids[0].std() > 10


def test_stock_forward_takes_off_the_wrapper_and_puts_it_back():
    module = torch.nn.Linear(2, 2)
    wrapped = module.forward = lambda x: "wrapped"
    with trainer.stock_forward(module):
        assert torch.is_tensor(module(torch.zeros(1, 2)))
    assert module.forward is wrapped


def test_evaluating_turns_dropout_off_and_restores_the_mode():
    unet, encoder = torch.nn.Dropout().train(), torch.nn.Dropout().eval()
    models = SimpleNamespace(unet=unet, text_encoders=[encoder])
    with pytest.raises(RuntimeError), trainer.evaluating(models):
        assert not unet.training and not torch.is_grad_enabled()
        raise RuntimeError
    assert unet.training and not encoder.training
