"""Section 7: checkpoints are complete and atomic, and stock diffusers loads the LoRA files."""

import json
import os
import re
import signal
from functools import partial

import numpy as np
import pytest
import safetensors.torch
import torch
from compare import assert_same_run
from diffusers import StableDiffusionXLPipeline
from harness import SDXL, assert_ok, run_trainer
from hooks import die_in_micro_step, keep_own_pictures

import train_sdxl_lora as trainer

PROMPT = "Aquafin, standing on a beach, facing left"
HARD = ["--train_text_encoder", "--lora_dropout", 0.3, "--gradient_accumulation_steps", 2, "--max_train_steps", 6]
HARD += ["--checkpointing_steps", 2, "--logging_steps", 3, "--random_flip", "--noise_offset", 0.05]


def note_shapes(folder, module):
    """Writes the height and width of every micro-step's pictures, one file per rank."""
    original = module.train_step

    def train_step(run, batch):
        with open(f"{folder}/shapes-{run.accelerator.process_index}.txt", "a") as file:
            file.write("{}x{}\n".format(*batch["pixel_values"].shape[-2:]))
        return original(run, batch)

    module.train_step = train_step


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_and_resumed_run_is_the_uninterrupted_run(flags, world, tmp_path, workers):
    argv = [*flags, *HARD, "--val_shards", world / "data/val", "--validation_steps", 4]
    whole = assert_ok(run_trainer([*argv, "--dataloader_num_workers", 0], tmp_path / "whole"))
    argv += ["--dataloader_num_workers", workers, "--resume_from_checkpoint", "latest"]
    killed = run_trainer(argv, tmp_path / "killed", setup=partial(die_in_micro_step, 9))
    assert killed.codes == [-signal.SIGKILL]
    assert (tmp_path / "killed/checkpoint-4").is_dir() and not (tmp_path / "killed/checkpoint-6").exists()
    assert_same_run(whole, assert_ok(run_trainer(argv, tmp_path / "killed")), step=6)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_and_resumed_run_in_buckets_is_the_uninterrupted_run(flags, tmp_path, processes):
    argv = [*flags, *HARD, "--crop", "bucket", "--resolution", 192]
    whole = assert_ok(run_trainer(argv, tmp_path / "whole", processes, setup=partial(note_shapes, tmp_path)))
    argv += ["--resume_from_checkpoint", "latest"]
    killed = run_trainer(argv, tmp_path / "killed", processes, setup=partial(die_in_micro_step, 9), timeout=120)
    assert -signal.SIGKILL in killed.codes and not (tmp_path / "killed/checkpoint-6").exists()
    assert_same_run(whole, assert_ok(run_trainer(argv, tmp_path / "killed", processes)), step=6)
    ranks = [(tmp_path / f"shapes-{rank}.txt").read_text().split() for rank in range(processes)]
    assert all(shapes == ranks[0] for shapes in ranks) and len(set(ranks[0])) > 1
    assert ranks[0][::2] == ranks[0][1::2]  # two micro-steps an update: one size per global batch


def test_the_comparison_would_notice_another_seed(flags, trained, tmp_path):
    other = assert_ok(run_trainer([*flags, "--checkpointing_steps", 4, "--seed", 8], tmp_path / "other"))
    with pytest.raises(AssertionError):
        assert_same_run(trained, other, step=4)


def test_a_checkpoint_is_also_found_by_its_name_as_in_diffusers(flags, own_run):
    weights = own_run / "pytorch_lora_weights.safetensors"
    expected = weights.read_bytes()
    weights.unlink()
    again = assert_ok(run_trainer([*flags, "--resume_from_checkpoint", "checkpoint-2"], own_run))
    assert re.search(r"resumed from .*run/checkpoint-2", again.output)
    assert weights.read_bytes() == expected


def test_files_depend_on_neither_path_nor_workers(flags, trained, tmp_path):
    assert_ok(run_trainer([*flags, "--dataloader_num_workers", 2], tmp_path / "elsewhere"))
    for name in ("pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors"):
        assert (trained.output_dir / name).read_bytes() == (tmp_path / "elsewhere" / name).read_bytes()


def test_a_damaged_checkpoint_is_named_and_passed_over(flags, own_run):
    argv = [*flags, "--checkpointing_steps", 2, "--resume_from_checkpoint", "latest"]
    victim = own_run / "checkpoint-4/pytorch_lora_weights.safetensors"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    (own_run / ".checkpoint-6.partial").mkdir()
    again = assert_ok(run_trainer(argv, own_run))
    assert re.search(r"checkpoint-4 is damaged: pytorch_lora_weights.safetensors", again.output)
    assert "resumed from" in again.output and "checkpoint-2" in again.output
    (own_run / "checkpoint-2/checksums.json").unlink()
    (own_run / "checkpoint-4/checksums.json").unlink()
    hopeless = run_trainer(argv, own_run)
    assert hopeless.codes == [1] and "no intact checkpoint among" in hopeless.output


@pytest.mark.parametrize(
    "change, named",
    [
        (["--rank", 3], "--rank: 2 in the checkpoint, 3 now"),
        (["--train_batch_size", 4], "global batch: 2 in the checkpoint, 4 now"),
        (["--seed", 8], "--seed: 7 in the checkpoint, 8 now"),
        (["--max_train_samples", 20], "--max_train_samples: None in the checkpoint, 20 now"),
    ],
)
def test_resuming_with_other_mathematics_names_the_flag_and_both_values(flags, own_run, change, named):
    result = run_trainer([*flags, "--resume_from_checkpoint", "latest", *change], own_run)
    assert result.codes == [1] and named in result.output


def test_rows_that_a_resume_writes_again_are_deleted(tmp_path):
    rows = [{"step": step, "loss": 0.1} for step in (1, 4, 5)]
    rows[2:2] = [{"step": 4, "val_loss": 0.2}]
    path = tmp_path / "metrics.jsonl"
    for validation_due, kept in ((False, 3), (True, 2)):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 5, "val_l')
        trainer.trim_rows(path, trainer.Progress(step=4, validation_due=validation_due))
        assert list(map(json.loads, path.read_text().splitlines())) == rows[:kept]


def test_a_killed_save_leaves_no_checkpoint_and_nothing_after_the_next_start(tmp_path):
    def die(path):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer.write_checkpoint(tmp_path, 3, {"a.bin": lambda path: path.write_bytes(b"a"), "b.bin": die})
    assert [path.name[0] for path in tmp_path.iterdir()] == ["."]
    trainer.lock_output_dir(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_every_file_is_on_the_disk_before_the_checkpoint_gets_its_name(tmp_path, monkeypatch):
    events = []
    rename, fsync = os.rename, os.fsync
    monkeypatch.setattr(os, "rename", lambda *paths: events.append("rename") or rename(*paths))
    monkeypatch.setattr(os, "fsync", lambda file: events.append(os.readlink(f"/proc/self/fd/{file}")) or fsync(file))
    files = {name: lambda path: path.write_bytes(b"a") for name in ("a.bin", "b.bin")}
    assert trainer.write_checkpoint(tmp_path, 3, files) is None
    before = events[: events.index("rename")]
    unfinished = tmp_path / ".checkpoint-3.partial"
    assert {str(unfinished / "a.bin"), str(unfinished / "b.bin"), str(unfinished)} < set(before)
    assert any("checksums.json" in path for path in before)
    assert events[-1] == str(tmp_path)


def test_the_oldest_checkpoints_are_pruned(flags, tmp_path):
    argv = [*flags, "--checkpointing_steps", 1, "--checkpoints_total_limit", 2, "--checkpointing_after_steps", 2]
    assert_ok(run_trainer(argv, tmp_path / "run"))
    assert sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


def test_the_checkpoint_just_written_is_never_pruned(tmp_path):
    for step in (2, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
    files = {"a": lambda path: path.write_text("a")}
    assert trainer.write_checkpoint(tmp_path, 4, files, keep=1) is None
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


def test_no_checkpoint_before_checkpointing_after_steps(flags, tmp_path):
    assert_ok(run_trainer([*flags, "--checkpointing_steps", 1, "--checkpointing_after_steps", 3], tmp_path / "run"))
    assert sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


def stock_picture(folder, name, seed):
    pipeline = StableDiffusionXLPipeline.from_pretrained(SDXL, dtype=torch.float32, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    if name:
        pipeline.load_lora_weights(folder, weight_name=name)
    generator = torch.Generator().manual_seed(seed)
    return pipeline(PROMPT, height=64, width=64, num_inference_steps=25, generator=generator, output_type="np").images[
        0
    ]


KINDS = {
    "unet only": [],
    "with encoders": ["--train_text_encoder", "--text_encoder_rank", 3],
    "alpha is not rank": ["--train_text_encoder", "--lora_alpha", 5, "--text_encoder_alpha", 1.5],
    "rsLoRA": ["--train_text_encoder", "--use_rslora", "--rank", 4, "--lora_alpha", 3],
    "DoRA": ["--train_text_encoder", "--use_dora"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_stock_diffusers_draws_the_trainers_own_picture_from_both_files(flags, tmp_path, kind):
    argv = [*flags, "--learning_rate", 0.02, "--text_encoder_lr_scale", 1, *KINDS[kind]]
    argv += ["--validation_prompt", PROMPT, "--num_validation_images", 1]
    assert_ok(run_trainer(argv, tmp_path / "run", setup=partial(keep_own_pictures, tmp_path / "own.npy")))
    own = np.load(tmp_path / "own.npy")
    files = ["pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors"][
        : 1 if kind == "DoRA" else 2
    ]
    for name in files:
        assert np.abs(stock_picture(tmp_path / "run", name, seed=7) - own).max() < 1e-4, name
    assert np.abs(stock_picture(tmp_path / "run", None, seed=7) - own).max() > 1e-2  # and the LoRA does something


def test_key_names_of_both_files_are_the_literal_ones(flags, tmp_path):
    argv = [*flags, "--max_train_steps", 1, "--train_text_encoder", "--lora_alpha", 6, "--text_encoder_alpha", 1.5]
    assert_ok(run_trainer(argv, tmp_path / "run"))
    diffusers_file = safetensors.torch.load_file(tmp_path / "run/pytorch_lora_weights.safetensors")
    unet = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    layer = "encoder.layers.0.self_attn"
    for key in (
        f"unet.{unet}.to_q.lora_A.weight",
        f"unet.{unet}.to_out.0.lora_B.weight",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight",
        f"text_encoder.text_model.{layer}.q_proj.lora_A.weight",
        f"text_encoder_2.text_model.{layer}.out_proj.lora_B.weight",
    ):
        assert key in diffusers_file
    kohya = safetensors.torch.load_file(tmp_path / "run/pytorch_lora_weights_kohya.safetensors")
    unet, layer = unet.replace(".", "_"), layer.replace(".", "_")
    for key in (
        f"lora_unet_{unet}_to_q.lora_down.weight",
        f"lora_unet_{unet}_to_out_0.lora_up.weight",
        f"lora_te1_text_model_{layer}_q_proj.lora_down.weight",
        f"lora_te2_text_model_{layer}_out_proj.lora_up.weight",
    ):
        assert key in kohya
    assert kohya[f"lora_unet_{unet}_to_q.alpha"] == 6
    assert kohya[f"lora_te1_text_model_{layer}_q_proj.alpha"] == 1.5
    assert {k.split("_")[1] for k in kohya} == {"unet", "te1", "te2"}
    layers = {"encoder.layers.2." in k for k in diffusers_file if k.startswith("text_encoder.")}
    assert layers == {False}  # its last layer gets no gradient
    with open(tmp_path / "run/pytorch_lora_weights.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    adapters = json.loads(header["__metadata__"]["lora_adapter_metadata"])
    assert (adapters["unet.r"], adapters["unet.lora_alpha"], adapters["text_encoder.lora_alpha"]) == (2, 6, 1.5)


def test_rslora_alpha_in_the_kohya_file_gives_the_same_scale(flags, tmp_path):
    argv = [*flags, "--max_train_steps", 1, "--use_rslora", "--rank", 4, "--lora_alpha", 3]
    assert_ok(run_trainer(argv, tmp_path / "run"))
    kohya = safetensors.torch.load_file(tmp_path / "run/pytorch_lora_weights_kohya.safetensors")
    alphas = {float(v) for k, v in kohya.items() if k.endswith(".alpha")}
    assert alphas == {6.0}  # alpha / sqrt(4) = 6 / 4


def test_a_dora_kohya_file_has_dora_scale(flags, tmp_path):
    assert_ok(run_trainer([*flags, "--max_train_steps", 1, "--use_dora"], tmp_path / "run"))
    kohya = safetensors.torch.load_file(tmp_path / "run/pytorch_lora_weights_kohya.safetensors")
    scales = [k for k in kohya if k.endswith(".dora_scale")]
    assert scales and all(kohya[k].shape[1:] == (1,) for k in scales)
