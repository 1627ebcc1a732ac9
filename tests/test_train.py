"""Whole runs of the script."""

import io
import json
import os
import subprocess
import sys
import tarfile
from collections import namedtuple
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import yaml
from harness import SDXL, assert_ok, command, run_trainer
from hooks import note_samples, samples_by_step
from PIL import Image

import train_sdxl_lora as trainer


@pytest.fixture(scope="module")
def samples_of_batch_4(flags, tmp_path_factory):
    """The samples of every step of a run with a global batch of 4."""
    folder = tmp_path_factory.mktemp("reference")
    argv = [*flags, "--train_batch_size", 4]
    assert_ok(run_trainer(argv, folder / "run", setup=partial(note_samples, folder)))
    return samples_by_step(folder)


@pytest.mark.parametrize(
    "processes, batch_size, accumulation, workers", [(1, 2, 2, 0), (1, 4, 1, 2), (2, 2, 1, 0), (2, 1, 2, 1)]
)
def test_the_samples_of_a_step_depend_on_the_global_batch_alone(
    flags, samples_of_batch_4, tmp_path, processes, batch_size, accumulation, workers
):
    argv = [*flags, "--train_batch_size", batch_size, "--gradient_accumulation_steps", accumulation]
    argv += ["--dataloader_num_workers", workers]
    assert_ok(run_trainer(argv, tmp_path / "run", processes=processes, setup=partial(note_samples, tmp_path)))
    assert len(samples_of_batch_4) == 4 and all(len(samples) == 4 for samples in samples_of_batch_4.values())
    assert samples_by_step(tmp_path) == samples_of_batch_4


def test_two_processes_train_the_same_adapters_as_one(flags, tmp_path):
    import safetensors.torch

    argv = [*flags, "--train_text_encoder"]
    assert_ok(run_trainer([*argv, "--train_batch_size", 4], tmp_path / "one"))
    assert_ok(run_trainer([*argv, "--train_batch_size", 2], tmp_path / "two", processes=2))
    files = [tmp_path / n / "pytorch_lora_weights.safetensors" for n in ("one", "two")]
    one, two = map(safetensors.torch.load_file, files)
    # the same gradients up to the order of additions; Adam's first steps divide by them, hence the tolerance
    for name in one:
        assert torch.allclose(one[name], two[name], atol=2e-4), name
    losses = [
        [r["loss"] for r in map(json.loads, (f.parent / "metrics.jsonl").read_text().splitlines())] for f in files
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_learning_rate_ends_at_zero_on_two_processes_with_accumulation(flags, tmp_path):
    argv = [*flags, "--max_train_steps", 8, "--gradient_accumulation_steps", 2, "--lr_warmup_steps", 2]
    rates = [row["lr"] for row in assert_ok(run_trainer(argv, tmp_path / "run", processes=2)).metrics()]
    assert rates[0] == 0 and max(rates) == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1e-3 * 0.067, rel=0.01)  # cosine at 5 / 6 of the decay


@pytest.fixture
def image_folder(tmp_path):
    """Twelve pictures with metadata.jsonl, as datasets' imagefolder wants them."""
    folder = tmp_path / "images"
    folder.mkdir()
    with open(folder / "metadata.jsonl", "w") as file:
        for i in range(12):
            Image.new("RGB", (80 + i, 72), (20 * i, 90, 200)).save(folder / f"{i}.png")
            file.write(json.dumps({"file_name": f"{i}.png", "text": f"picture number {i}"}) + "\n")
    return folder


def test_command_lines_of_diffusers_users_run_unchanged(image_folder, tmp_path):
    argv = f"""--pretrained_model_name_or_path={SDXL} --train_data_dir={image_folder} --caption_column=text
        --resolution=64 --center_crop --random_flip --train_batch_size=2 --num_train_epochs=2
        --gradient_accumulation_steps=2 --checkpointing_steps=2 --checkpoints_total_limit=2 --learning_rate=1e-4
        --lr_scheduler=constant --lr_warmup_steps=0 --scale_lr --max_grad_norm=1 --seed=42 --train_text_encoder
        --mixed_precision=no --report_to=tensorboard --validation_prompt=picture --num_validation_images=1
        --validation_epochs=1 --snr_gamma=5.0 --noise_offset=0.1 --rank=4 --allow_tf32 --gradient_checkpointing
        --adam_beta1=0.9 --adam_weight_decay=1e-2 --dataloader_num_workers=0 --resume_from_checkpoint=latest""".split()
    first = assert_ok(run_trainer(argv, tmp_path / "run"))
    assert sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert first.metrics()[-1]["step"] == 6  # 12 images, 4 a step, 2 epochs
    assert first.metrics()[-1]["lr"] == pytest.approx(4e-4)  # scaled by accumulation x batch size
    assert list((tmp_path / "run/logs").rglob("events.out.tfevents.*"))
    longer = [a for a in argv if "epochs" not in a] + ["--max_train_steps=8"]
    again = assert_ok(run_trainer(longer, tmp_path / "run"))
    assert "resumed from" in again.output and again.metrics()[-1]["step"] == 8


def test_the_written_config_repeats_the_run(flags, tmp_path):
    argv = [*flags, "--train_text_encoder", "--hub_token", "hf_secret"]
    assert_ok(run_trainer(argv, tmp_path / "first"))
    config = tmp_path / "first/config.yaml"
    assert yaml.safe_load(config.read_text())["train_text_encoder"] is True
    assert_ok(run_trainer(["--config", config], tmp_path / "second"))
    name = "pytorch_lora_weights.safetensors"
    assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    leaks = [p for p in (tmp_path / "first").rglob("*") if p.is_file() and b"hf_secret" in p.read_bytes()]
    assert leaks == []


def pretend_hub(path, module):
    class HfApi:
        def __init__(self, token=None):
            self.calls = {"token": token}

        def create_repo(self, repo_id, exist_ok):
            self.calls["repo"] = repo_id
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def upload_folder(self, **kwargs):
            with open(path, "w") as file:
                json.dump(self.calls | {k: str(v) for k, v in kwargs.items()}, file)

    sys.modules["huggingface_hub"].HfApi = HfApi


def test_push_to_hub_uploads_without_the_token_in_any_file(flags, tmp_path):
    argv = [*flags, "--max_train_steps", 1, "--push_to_hub", "--hub_token", "hf_secret", "--hub_model_id", "poke"]
    assert_ok(run_trainer(argv, tmp_path / "run", setup=partial(pretend_hub, tmp_path / "calls.json")))
    calls = json.loads((tmp_path / "calls.json").read_text())
    assert (calls["token"], calls["repo"], calls["repo_id"]) == ("hf_secret", "poke", "me/poke")
    assert "checkpoint-" in calls["ignore_patterns"]
    card = (tmp_path / "run/README.md").read_text()
    assert "base_model:" not in card and "load_lora_weights" in card  # the hub refuses a path there
    leaks = [p for p in (tmp_path / "run").rglob("*") if p.is_file() and b"hf_secret" in p.read_bytes()]
    assert leaks == []


def test_the_model_card_names_a_base_model_of_the_hub_and_the_refiners_text_encoder(tmp_path):
    argv = ["--pretrained_model_name_or_path", "stabilityai/base", "--train_shards", "a.tar", "--output_dir", tmp_path]
    more = ["--stage", "refiner", "--refiner_unet", "stabilityai/refiner", "--text_encoder_2_lora", "base.safetensors"]
    for stage, name in (([], "base"), (more, "refiner")):
        args = trainer.make_parser().parse_args([*map(str, argv), *stage])
        trainer.save_model_card(args, {"step": 1}, namedtuple("Index", "label_names")(["a"]))
        card = (tmp_path / "README.md").read_text()
        assert f"base_model: stabilityai/{name}\n" in card
        assert (f'from_pretrained("stabilityai/{name}", dtype=torch.float16)\n' in card) == (name == "base")
        assert ("text_encoder_2=base.text_encoder_2)" in card) == (name == "refiner")


def test_checkpoints_in_the_way_are_refused_or_overwritten(flags, own_run):
    refused = run_trainer(flags, own_run)
    assert refused.codes == [2]
    assert "--resume_from_checkpoint latest" in refused.output and "--overwrite_output_dir" in refused.output
    argv = [*flags, "--overwrite_output_dir", "--max_train_steps", 2]
    result = assert_ok(run_trainer(argv, own_run))
    assert [p.name for p in own_run.glob("checkpoint-*")] == ["checkpoint-2"]
    assert [row["step"] for row in result.metrics()] == [1, 2]


def test_the_copy_in_a_runs_own_folder_continues_it(flags, own_run):
    argv = [str(word) for word in [*flags, "--max_train_steps", 6, "--resume_from_checkpoint", "latest"]]
    words = [sys.executable, own_run / "train_sdxl_lora.py", *argv, "--output_dir", own_run]
    done = subprocess.run(words, capture_output=True, text=True, cwd=own_run, env=os.environ | {"PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr[-3000:]
    assert (own_run / "checkpoint-6").is_dir()


def test_latest_without_a_checkpoint_starts_fresh(flags, tmp_path):
    result = assert_ok(run_trainer([*flags, "--resume_from_checkpoint", "latest"], tmp_path / "run"))
    assert [row["step"] for row in result.metrics()] == [1, 2, 3, 4]


def test_a_row_has_the_mean_loss_of_the_steps_since_the_last_row(flags, trained, tmp_path):
    losses = [row["loss"] for row in trained.metrics()]
    pairs = assert_ok(run_trainer([*flags, "--logging_steps", 2], tmp_path / "run")).metrics()
    assert [row["loss"] for row in pairs] == pytest.approx([sum(losses[:2]) / 2, sum(losses[2:]) / 2], rel=1e-9)


def test_bf16_trains_and_samples(flags, tmp_path):
    argv = [*flags, "--mixed_precision", "bf16", "--max_train_steps", 2, "--train_batch_size", 1]
    argv += ["--validation_prompt", "Aquafin", "--num_validation_images", 1]
    result = assert_ok(run_trainer(argv, tmp_path / "run"))
    assert (tmp_path / "run/samples/step-2.png").exists()
    assert all(0 < row["loss"] < 10 for row in result.metrics())


def test_a_world_that_the_launcher_did_not_mean_is_refused(flags, tmp_path):
    result = run_trainer(flags, tmp_path / "run", env={"ACCELERATE_USE_CPU": "false", "WORLD_SIZE": "2"})
    assert result.codes == [1] and "2 processes" in result.output and "ACCELERATE_USE_CPU" in result.output


def test_a_target_layer_that_does_not_exist_is_named(flags, tmp_path):
    result = run_trainer([*flags, "--lora_target_modules", "to_q", "to_nowhere"], tmp_path / "run")
    assert result.codes == [1] and "--lora_target_modules" in result.output and "to_nowhere" in result.output


def test_damaged_samples_are_listed_and_too_many_end_the_run(flags, world, tmp_path):
    shard = next((world / "data/train").glob("*.tar"))
    torn = tmp_path / "torn.tar"
    torn.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    argv = [a for a in flags if a != world / "data/train"]
    argv.insert(argv.index("--train_shards") + 1, torn)
    result = assert_ok(run_trainer(argv, tmp_path / "run"))
    rows = [json.loads(line) for line in (tmp_path / "run/skipped.jsonl").read_text().splitlines()]
    assert rows and all(row["shard"] == str(torn) for row in rows)
    assert "damaged" in result.output
    strict = run_trainer([*argv, "--max_bad_fraction", 0, "--overwrite_output_dir"], tmp_path / "run")
    assert strict.codes == [1] and "--max_bad_fraction" in strict.output


@pytest.mark.parametrize("processes", [1, 2])
def test_a_picture_that_cannot_be_decoded_is_counted_by_its_reason_and_named_once(flags, world, tmp_path, processes):
    source = next((world / "data/train").glob("*.tar"))
    with tarfile.open(source) as old, tarfile.open(tmp_path / "torn.tar", "w") as new:
        for number, member in enumerate(old):
            data = old.extractfile(member).read()
            if member.name.endswith((".jpg", ".png")) and number < 60:
                data = data[: len(data) // 2].ljust(len(data), b"\0")  # its header stays whole
            new.addfile(member, io.BytesIO(data))
    argv = [a for a in flags if a != world / "data/train"]
    argv.insert(argv.index("--train_shards") + 1, tmp_path / "torn.tar")
    argv += ["--max_bad_fraction", 0.5, "--max_train_steps", 30, "--train_batch_size", 4 // processes]
    result = assert_ok(run_trainer(argv, tmp_path / "run", processes))
    rows = [json.loads(line) for line in (tmp_path / "run/skipped.jsonl").read_text().splitlines()]
    last = [row for row in result.metrics() if "loss" in row][-1]
    assert rows and len({row["key"] for row in rows}) == len(rows)
    assert last["skipped"] == last["skipped/cannot decode image"] >= len(rows)
    assert (
        f"damaged samples, not trained on and listed in skipped.jsonl: {{'cannot decode image': {len(rows)}}}"
        in result.output
    )


def test_a_resumed_run_goes_on_in_the_same_wandb_run(flags, tmp_path):
    argv = [*flags, "--report_to", "wandb", "--max_train_steps", 2, "--resume_from_checkpoint", "latest"]
    argv += ["--validation_prompt", "Aquafin", "--num_validation_images", 1]
    for steps in (2, 3):
        env = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
        assert_ok(run_trainer([*argv, "--max_train_steps", steps], tmp_path / "run", env=env))
    run_id = json.loads((tmp_path / "run/run.json").read_text())["run_id"]
    runs = [p.name for p in (tmp_path / "run/wandb").glob("offline-run-*")]
    assert len(runs) == 2 and all(name.endswith(run_id) for name in runs)


def run_out_of_memory(module):
    def diffusion_loss(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    module.diffusion_loss = diffusion_loss


def test_out_of_memory_names_the_flags_that_help_in_order(flags, tmp_path):
    result = run_trainer(flags, tmp_path / "run", setup=run_out_of_memory)
    assert result.codes == [1]
    helpful = ["--gradient_checkpointing", "--train_batch_size", "--gradient_accumulation_steps", "--use_8bit_adam"]
    line = [line for line in result.output.splitlines() if "out of GPU memory; try" in line][-1].split("; try")[1]
    places = [line.index(flag) for flag in helpful]
    assert places == sorted(places)


def test_an_output_dir_that_cannot_be_written_is_one_line(flags, tmp_path):
    words = command(flags, "/proc/nowhere/run")
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 1
    assert "error: --output_dir: cannot write there" in done.stderr and "Traceback" not in done.stderr
