"""Command lines of diffusers' script; the hub, W&B and the network, asked before a run begins."""

import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from harness import ROOT, SDXL, assert_ok, run_trainer

import sdxl_lora
import train_sdxl_lora as trainer


def diffusers_flags():
    lines = (ROOT / "tests/diffusers_flags.txt").read_text().splitlines()
    return dict(line.split() for line in lines if not line.startswith("#"))


def test_every_flag_of_diffusers_script_is_accepted(world, tmp_path):
    values = {"str": "x", "int": "1", "float": "0.5"}
    chosen = {
        "--pretrained_model_name_or_path": SDXL,
        "--pretrained_vae_model_name_or_path": SDXL / "vae",
        "--train_data_dir": world,
        "--resolution": 64,
        "--lr_scheduler": "linear",
        "--report_to": "tensorboard",
        "--mixed_precision": "bf16",
        "--prediction_type": "epsilon",
        "--image_interpolation_mode": "bilinear",
        "--output_dir": tmp_path / "run",
        "--resume_from_checkpoint": "latest",
    }
    flags = diffusers_flags()
    assert len(flags) > 50 and chosen.keys() <= flags.keys()
    words = []
    for flag, kind in flags.items():
        if flag != "--dataset_name":  # instead of --train_data_dir
            words += [flag] if kind == "switch" else [flag, chosen.get(flag, values[kind])]
    args = trainer.parse_args([str(word) for word in words])
    assert args.attention_backend == "xformers" and args.optimizer == "adamw8bit" and args.crop == "center"
    plain = trainer.parse_args([*map(str, words), "--no-enable_xformers_memory_efficient_attention"])
    assert plain.attention_backend == "sdpa"


def test_flags_without_effect_are_named(flags, tmp_path):
    words = ["--local_rank", 0, "--debug_loss", "--enable_npu_flash_attention", "--lr_num_cycles", 2, "--lr_power", 2]
    result = assert_ok(run_trainer([*flags, *words, "--dry_run"], tmp_path / "run"))
    for word in words:
        assert (f"{word}: has no effect here" in result.output) == str(word).startswith("--")
    result = assert_ok(run_trainer([*flags, "--lr_scheduler", "polynomial", "--lr_power", 2], tmp_path / "with"))
    assert "has no effect" not in result.output


def test_prodigys_step_size_is_logged(flags, tmp_path):
    argv = [*flags, "--optimizer", "prodigy", "--learning_rate", 1, "--lr_scheduler", "linear", "--lr_warmup_steps", 0]
    argv += ["--max_train_steps", 25]
    rows = assert_ok(run_trainer(argv, tmp_path / "run")).metrics()
    assert all(row["effective_lr"] == row["d"] * row["lr"] and row["d"] > 0 for row in rows)
    assert rows[-1]["d"] != rows[0]["d"] and rows[-1]["lr"] < rows[0]["lr"]
    assert "effective_lr" not in assert_ok(run_trainer(flags, tmp_path / "adam")).metrics()[0]


class Hub:
    """What a run does to the hub, in place of huggingface_hub.HfApi."""

    calls = None

    def __init__(self, token=None):
        pass

    def create_repo(self, repo_id, **options):
        Hub.calls.append(options)
        return SimpleNamespace(repo_id=repo_id)

    def repo_info(self, repo_id):
        return SimpleNamespace(private=repo_id != "public")

    def upload_folder(self, **options):
        Hub.calls.append(options)
        if options["repo_id"] == "read-only":
            raise OSError("403 Forbidden")


def test_only_the_files_of_the_lora_are_uploaded(flags, tmp_path, monkeypatch):
    argv = [*flags, "--cache_latents", "--cache_text_embeddings", "--crop", "center", "--checkpointing_steps", 2]
    argv += ["--validation_prompt", "Aquafin", "--num_validation_images", 1]
    folder = tmp_path / "run"
    assert_ok(run_trainer(argv, folder))
    written = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    assert any(name.startswith("encodings/") for name in written) and "checkpoint-2/progress.json" in written
    Hub.calls = []
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    args = trainer.make_parser().parse_args([*map(str, flags), "--output_dir", str(folder), "--hub_private_repo"])
    trainer.push_to_hub(args)
    created, uploaded = Hub.calls
    assert created == {"exist_ok": True, "private": True}
    patterns = {name: uploaded[name] for name in ("allow_patterns", "ignore_patterns")}
    sent = sorted(huggingface_hub.utils.filter_repo_objects(written, **patterns))
    expected = [trainer.LORA_FILE, sdxl_lora.KOHYA_FILE, "README.md", "config.yaml", "samples/step-4.png"]
    assert sent == sorted(expected)
    args.hub_model_id = "read-only"
    with pytest.raises(trainer.TrainingError, match="403 Forbidden; the LoRA is in .*run; `hf upload` sends it"):
        trainer.push_to_hub(args)
    Hub.calls = Hub.calls[:2]
    args.hub_model_id = "public"
    with pytest.raises(trainer.InputError, match="--hub_private_repo: public exists and is public"):
        trainer.push_to_hub(args)
    assert len(Hub.calls) == 3  # nothing was uploaded


def refuse(module):
    class HfApi:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, exist_ok):
            raise OSError("401 Client Error: Unauthorized")

    sys.modules["huggingface_hub"].HfApi = HfApi


def test_a_hub_that_refuses_is_heard_before_anything_is_read(flags, tmp_path):
    result = run_trainer([*flags, "--push_to_hub"], tmp_path / "run", setup=refuse)
    assert result.codes == [1] and "--push_to_hub: the hub says: 401 Client Error: Unauthorized" in result.output
    assert not (tmp_path / "run/index").exists()


def test_wandb_without_a_login_is_heard_before_anything_is_read(flags, tmp_path):
    argv = [*flags, "--report_to", "wandb"]
    empty = {"HOME": str(tmp_path), "WANDB_MODE": "online", "NETRC": str(tmp_path / "none")}
    result = run_trainer(argv, tmp_path / "run", env=empty)
    assert result.codes == [1] and "--report_to: W&B has no login on this machine; run `wandb login`" in result.output
    assert not (tmp_path / "run/index").exists()


def offline(module):
    sys.modules["huggingface_hub"].constants.HF_HUB_OFFLINE = True


@pytest.mark.parametrize("flag", ["--pretrained_model_name_or_path", "--pretrained_vae_model_name_or_path"])
def test_a_model_that_is_not_here_is_named_at_once_when_offline(flags, tmp_path, flag):
    result = run_trainer([*flags, flag, "somebody/model"], tmp_path / "run", setup=offline)
    assert result.codes == [1]
    expected = "cannot get somebody/model from the hub: it is not on this machine and HF_HUB_OFFLINE is set"
    assert f"{flag}: {expected}" in result.output
    assert not (tmp_path / "run/index").exists()


@pytest.mark.parametrize("name", ["my model", "illustrious--xl", "nowhere/"])
def test_a_name_that_no_model_can_have_is_an_error_in_one_line(flags, tmp_path, name):
    result = run_trainer([*flags, "--pretrained_model_name_or_path", name], tmp_path / "run", setup=offline)
    assert result.codes == [1] and f"InputError: --pretrained_model_name_or_path: cannot get {name}" in result.output


def no_network(note, module):
    class HfApi:
        def model_info(self, name, revision, timeout):
            Path(note).write_text(json.dumps([name, revision, timeout]))
            raise OSError("Name or service not known")

    sys.modules["huggingface_hub"].constants.HF_HUB_OFFLINE = False
    sys.modules["huggingface_hub"].HfApi = HfApi


def test_without_a_network_a_model_of_the_hub_is_an_error_and_not_a_wait(flags, tmp_path):
    argv = [*flags, "--pretrained_model_name_or_path", "somebody/model", "--revision", "abc"]
    result = run_trainer(argv, tmp_path / "run", setup=partial(no_network, tmp_path / "asked"))
    assert result.codes == [1]
    assert "cannot get somebody/model from the hub: Name or service not known" in result.output
    assert json.loads((tmp_path / "asked").read_text()) == ["somebody/model", "abc", 20]


def in_the_cache(module):
    no_network("/dev/null", module)
    sys.modules["huggingface_hub"].try_to_load_from_cache = lambda name, file, **options: "/somewhere/config.json"


def test_without_a_network_a_model_in_the_cache_is_used_if_the_user_says_so(flags, tmp_path):
    argv = [*flags, "--pretrained_model_name_or_path", "somebody/model"]
    result = run_trainer(argv, tmp_path / "run", setup=in_the_cache)
    assert result.codes == [1]
    assert "Name or service not known; set HF_HUB_OFFLINE=1 to use the copy on this machine" in result.output
