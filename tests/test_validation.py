"""Section 8: the validation loss covers every sample once on any number of processes; sample images."""

import json
import re
import shutil
import tarfile
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import UNet2DConditionModel
from harness import ALONE, SDXL, assert_ok, run_trainer
from PIL import Image
from shards import edit_shard

import sdxl_memory
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


def test_the_noise_of_a_validation_sample_depends_on_its_id_alone():
    hashes = np.random.default_rng(0).integers(0, 2**63, 23).astype(np.uint64)
    orders = [np.arange(23), np.arange(23)[::-1]]
    positions = []
    for order in orders:
        batches = trainer.validation_requests(SimpleNamespace(id_hashes=hashes[order]), 4, 0, 1, None)
        requests = [request for requests, size in batches for request in requests[:size]]
        positions.append({hashes[order][row]: position for row, _, _, position in requests})
    assert positions[0] == positions[1] and len(set(positions[0].values())) == 23


def val_losses(result):
    return [row["val_loss"] for row in result.metrics() if "val_loss" in row]


def test_the_loss_is_the_same_on_two_or_three_processes_and_at_any_batch_size(flags, world, tmp_path):
    argv = [*flags, "--val_shards", world / "data/val", "--max_train_steps", 1]
    argv += ["--lr_scheduler", "linear", "--lr_warmup_steps", 9]  # the first step is at rate 0: the adapters stay
    one = val_losses(assert_ok(run_trainer([*argv, "--train_batch_size", 4], tmp_path / "one")))
    two = val_losses(assert_ok(run_trainer([*argv, "--train_batch_size", 4], tmp_path / "two", processes=2)))
    three = val_losses(assert_ok(run_trainer([*argv, "--train_batch_size", 4], tmp_path / "three", processes=3)))
    odd = val_losses(assert_ok(run_trainer([*argv, "--train_batch_size", 5], tmp_path / "odd")))  # 12 images: padded
    assert len(one) == 1
    assert one == pytest.approx(two, rel=1e-9)
    assert one == pytest.approx(three, rel=1e-9)
    assert one == pytest.approx(odd, rel=1e-6)


def test_a_damaged_validation_image_counts_as_if_it_were_not_there(flags, world, tmp_path):
    (shard,) = (world / "data/val").glob("*.tar")
    with tarfile.open(shard) as members:
        victim = next(name for name in members.getnames() if not name.endswith((".txt", ".json")))
    key = victim.split(".")[0]
    argv = [*flags, "--max_train_steps", 1, "--max_bad_fraction", 0.5]
    argv += ["--lr_scheduler", "linear", "--lr_warmup_steps", 9]  # the adapters stay as they are
    losses = []
    for name, edit in (
        ("cut", lambda name, data: data[: len(data) // 2] if name == victim else data),
        ("without", lambda name, data: None if name.startswith(key) else data),
    ):
        edited = edit_shard(shard, tmp_path / f"{name}.tar", edit)
        losses += val_losses(assert_ok(run_trainer([*argv, "--val_shards", edited], tmp_path / name)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


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


@pytest.mark.parametrize(
    "words, steps",
    [
        (["--validation_steps", 3], [3, 6]),
        (["--validation_epochs", 2, "--max_train_samples", 4], [4, 6]),  # an epoch is two steps
        (["--validation_epochs", 1, "--max_train_samples", 4], [2, 4, 6]),
    ],
)
def test_a_run_is_validated_every_so_many_steps_or_epochs_and_at_the_end(flags, world, tmp_path, words, steps):
    argv = [*flags, "--max_train_steps", 6, "--val_shards", world / "data/val", "--val_max_batches", 1, *words]
    result = assert_ok(run_trainer(argv, tmp_path / "run"))
    assert [row["step"] for row in result.metrics() if "val_loss" in row] == steps


def test_the_validation_loss_ends_after_val_max_batches(flags, tmp_path, monkeypatch):
    asked = []

    def validation_requests(index, batch_size, rank, world, max_batches):
        asked.append((batch_size, max_batches))
        return []

    monkeypatch.setattr(trainer, "validation_requests", validation_requests)
    words = [*flags, "--output_dir", tmp_path, "--val_max_batches", 5]
    models = SimpleNamespace(unet=torch.nn.Dropout(), text_encoders=[])
    dataset = SimpleNamespace(index=None)
    args = trainer.parse_args(list(map(str, words)))
    accelerator = SimpleNamespace(**vars(ALONE) | {"device": torch.device("cpu")})
    run = SimpleNamespace(args=args, accelerator=accelerator, unwrapped=models, val_dataset=dataset)
    trainer.compute_validation_loss(run)
    assert asked == [(2, 5)] * 2


def test_sample_pictures_are_made_as_the_flags_say(flags, tmp_path, monkeypatch):
    asked = []

    def generate_image(models, prompt, seed, resolution, switch_at):
        asked.append((prompt, seed, resolution, switch_at))
        return np.zeros((resolution, resolution, 3))

    monkeypatch.setattr(trainer, "generate_image", generate_image)
    (tmp_path / "prompts.txt").write_text("a pichu\n")
    words = [*flags, "--output_dir", tmp_path, "--validation_prompt", "a mew", "--denoising_start", 0.6]
    words += ["--validation_prompts", tmp_path / "prompts.txt", "--num_validation_images", 2, "--resolution", 136]
    args = trainer.parse_args(list(map(str, words)))
    accelerator = SimpleNamespace(**vars(ALONE), trackers=[])
    run = SimpleNamespace(
        args=args, accelerator=accelerator, unwrapped=None, progress=trainer.Progress(step=2, seed=5)
    )
    trainer.save_samples(run)
    assert asked == [(prompt, seed, 136, 0.6) for prompt in ("a mew", "a pichu") for seed in (5, 6)]
    assert Image.open(tmp_path / "samples/step-2.png").size == (2 * 136, 2 * (136 + 16))


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


def full_size_unet(dtype=torch.bfloat16):
    """SDXL's UNet on the meta device, with its rank-64 adapters."""
    config = {
        "sample_size": 128, "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "use_linear_projection": True,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [320, 640, 1280], "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20], "cross_attention_dim": 2048, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    }  # fmt: skip
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config).requires_grad_(False).to(dtype)
    return trainer.add_adapter(unet, "--x", ["to_q", "to_k", "to_v", "to_out.0"], r=64, lora_alpha=64)


@pytest.mark.slow
def test_the_estimate_for_full_size_sdxl_is_what_was_counted_kernel_by_kernel():
    unet = full_size_unet()
    size = (6, 1, 1024)
    # traces of the kernels with fake tensors: forward and backward, rank 64
    assert sdxl_memory.step_flop(unet, [], *size) == pytest.approx(14.95e12, rel=0.01)
    assert sdxl_memory.step_memory(unet, [], *size) == pytest.approx(5.88e9, rel=0.01)


def test_a_dry_run_shows_the_run_without_the_unets_weights(flags, world, tmp_path):
    snapshot = tmp_path / "snapshot"
    shutil.copytree(SDXL, snapshot, ignore=lambda folder, names: [n for n in names if "unet" in folder and "saf" in n])
    assert not list(snapshot.glob("unet/*.safetensors"))
    argv = [snapshot if a == SDXL else a for a in flags]
    argv += [
        "--crop",
        "bucket",
        "--resolution",
        192,
        "--species_mix",
        0.2,
        0.6,
        4,
        "--train_text_encoder",
        "--dry_run",
    ]
    result = assert_ok(run_trainer(argv, tmp_path / "run"))
    assert "nothing was trained" in result.output
    assert re.search(r"--resolution: \d+ of \d+ images are smaller and are scaled up", result.output)
    assert not list((tmp_path / "run").glob("checkpoint-*")) and not (tmp_path / "run/metrics.jsonl").exists()
    facts = json.loads((tmp_path / "run/preview/preview.json").read_text())
    species = facts["classes"]
    for name, shares in species.items():  # 4 steps: m is 0.2 in the first and 0.5 in the last
        for kind, m in (("at_start", 0.2), ("at_end", 0.5)):
            assert shares[kind] == pytest.approx((1 - m) / len(species) + m * shares["data"]), name
    assert sum(bucket["images"] for bucket in facts["buckets"]) == facts["images"]
    assert sum(bucket["at_end"] for bucket in facts["buckets"]) == pytest.approx(1)
    assert facts["steps_per_epoch"] == -(-facts["images"] // 2) and facts["global_batch"] == 2
    weights = safetensors.torch.load_file(SDXL / "unet/diffusion_pytorch_model.safetensors")
    assert facts["memory_bytes"]["frozen_weights"] > sum(4 * w.numel() for w in weights.values())
    assert facts["seconds_at_least"] > 0 and 0 <= facts["cut_off"]["most"] < 0.5
    sheet = np.asarray(Image.open(tmp_path / "run/preview/contact_sheet.png").convert("RGB")).astype(int)
    assert ((sheet[..., 0] > 220) & (sheet[..., 1:] < 60).all(axis=2)).sum() > 5000  # the windows
    assert Image.open(tmp_path / "run/preview/classes.png").height == 120 + 32 * len(species)


def test_a_dry_run_counts_the_adapters_that_training_saves(flags, trained, tmp_path):
    result = assert_ok(run_trainer([*flags, "--dry_run"], tmp_path / "dry"))
    facts = json.loads((result.output_dir / "preview/preview.json").read_text())
    saved = safetensors.torch.load_file(trained.output_dir / "pytorch_lora_weights.safetensors")
    assert facts["trained_parameters"] == sum(tensor.numel() for tensor in saved.values())


def test_the_best_validation_is_the_one_with_the_lowest_loss(monkeypatch):
    losses = iter([0.3, 0.1, 0.2])
    monkeypatch.setattr(trainer, "compute_validation_loss", lambda run: next(losses))
    run = SimpleNamespace(
        args=SimpleNamespace(validation_prompt=None, validation_prompts=None),
        accelerator=SimpleNamespace(trackers=[]),
        val_dataset=object(),
        progress=trainer.Progress(),
    )
    found = []
    for step in (5, 10, 15):
        run.progress.step = step
        found.append(trainer.validate(run))
    assert [(row["val_loss"], row["best_val_loss"], row["best_step"]) for row in found] == [
        (0.3, 0.3, 5),
        (0.1, 0.1, 10),
        (0.2, 0.1, 10),
    ]
    assert run.progress.best == {"val_loss": 0.1, "step": 10}
