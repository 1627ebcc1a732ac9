"""A base model, a VAE or a refiner in one .safetensors file trains as the snapshot that it was made from."""

import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import original_layout as original
import pytest
import torch
from compare import assert_same_run, tensors_of
from harness import ROOT, SDXL, assert_ok, run_trainer

import evaluate
import hpo_sweep
import sdxl_data
import sdxl_lora
import sdxl_single_file
import train_sdxl_lora as trainer

REFINER = ROOT / "demo/refiner/unet"
BASE, VAE, REFINER_FLAG = sdxl_single_file.NEEDED_PARTS


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return original.write(tmp_path_factory.mktemp("base") / "toy.safetensors", original.original_checkpoint(SDXL))


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Nothing can be downloaded, and nothing has been."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))


def with_file(flags, file, *more):
    argv = [*flags, "--single_file_config", SDXL, *more]
    argv[argv.index(BASE) + 1] = file
    return argv


def tensors_under(folder):
    return {str(p.parent.relative_to(folder)): original.load_part(p.parent) for p in folder.rglob("*.safetensors")}


def assert_equal_tensors(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def test_every_tensor_of_a_base_model_returns_in_its_own_precision(checkpoint, tmp_path):
    folder = Path(sdxl_single_file.find_snapshot(BASE, str(checkpoint), tmp_path, SDXL))
    assert folder.parent == tmp_path / "snapshots"
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        assert_equal_tensors(original.load_part(folder / part), original.load_part(SDXL / part))
    for part in ("tokenizer", "tokenizer_2", "scheduler"):
        for file in (SDXL / part).glob("*"):
            found = (folder / part / file.name).read_text()
            assert json.loads(found) == json.loads(file.read_text()) if file.suffix == ".json" else found


def test_the_scheduler_of_the_config_folder_is_kept(checkpoint, tmp_path):
    config = tmp_path / "config"
    shutil.copytree(SDXL, config, ignore=shutil.ignore_patterns("*.safetensors", "model_index.json"))
    values = json.loads((config / "scheduler/scheduler_config.json").read_text())
    (config / "scheduler/scheduler_config.json").write_text(json.dumps(values | {"_class_name": "DDIMScheduler"}))
    folder = sdxl_single_file.find_snapshot(BASE, str(checkpoint), tmp_path, config)
    pipeline = trainer.diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
    assert type(pipeline.scheduler).__name__ == "DDIMScheduler"


def test_a_vae_and_a_refiner_are_converted_too(tmp_path):
    for prefix in ("", "first_stage_model."):
        file = original.write(tmp_path / f"vae{prefix}.safetensors", original.original_vae(SDXL / "vae", prefix))
        folder = Path(sdxl_single_file.find_snapshot(VAE, str(file), tmp_path, SDXL))
        assert_equal_tensors(original.load_part(folder), original.load_part(SDXL / "vae"))
    shutil.copy(next(REFINER.glob("*.safetensors")), tmp_path / "diffusers.safetensors")  # diffusers' own names
    folder = Path(
        sdxl_single_file.find_snapshot(REFINER_FLAG, str(tmp_path / "diffusers.safetensors"), tmp_path, SDXL)
    )
    assert_equal_tensors(original.load_part(folder / "unet"), original.load_part(REFINER))
    file = original.write(tmp_path / "refiner.safetensors", original.original_unet(REFINER))
    folder = Path(sdxl_single_file.find_snapshot(REFINER_FLAG, str(file), tmp_path, SDXL))
    assert_equal_tensors(original.load_part(folder / "unet"), original.load_part(REFINER))


def test_a_file_trains_to_the_same_bits_as_its_snapshot(flags, checkpoint, tmp_path, offline):
    vae = original.write(tmp_path / "vae.safetensors", original.original_vae(SDXL / "vae", ""))
    argv = [*flags, "--checkpointing_steps", 2]
    expected = assert_ok(run_trainer(argv, tmp_path / "snapshot"))
    found = assert_ok(run_trainer(with_file(argv, checkpoint, VAE, vae, "--variant", "fp16"), tmp_path / "file"))
    assert_same_run(expected, found, step=4)
    assert 'from_single_file("' in (tmp_path / "file/README.md").read_text()
    shutil.rmtree(tmp_path / "file/checkpoint-4")
    resumed = with_file(argv, checkpoint, "--resume_from_checkpoint", "latest")
    assert_same_run(expected, assert_ok(run_trainer(resumed, tmp_path / "file")), step=4)


def test_two_processes_convert_a_file_once(flags, checkpoint, tmp_path):
    argv = with_file(flags, checkpoint, "--cache_dir", tmp_path / "cache")
    found = assert_ok(run_trainer(argv, tmp_path / "file", 2))
    logs = [path.read_text() for path in (found.output_dir / "logs").glob("rank-*.log")]
    assert len(logs) == 2 and "".join(logs).count(f"converting {checkpoint} once") == 1
    assert len([p for p in (tmp_path / "cache/snapshots").iterdir() if p.is_dir()]) == 1
    again = assert_ok(run_trainer([*argv, "--dry_run"], tmp_path / "again"))
    assert "converting" not in again.output


def test_a_killed_conversion_is_done_again_and_two_at_once_are_one(checkpoint, tmp_path, monkeypatch):
    name = sdxl_single_file.snapshot_name(BASE, checkpoint, SDXL)
    (tmp_path / "snapshots" / f"{name}.partial" / "unet").mkdir(parents=True)
    calls = []
    convert = sdxl_single_file.convert_checkpoint
    monkeypatch.setattr(sdxl_single_file, "convert_checkpoint", lambda *words: (calls.append(1), convert(*words)))
    threads = [
        threading.Thread(target=sdxl_single_file.find_snapshot, args=(BASE, str(checkpoint), tmp_path, SDXL))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert sorted(path.name for path in (tmp_path / "snapshots").iterdir()) == [name, f"{name}.lock"]


def test_a_full_disk_leaves_nothing_behind(checkpoint, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sdxl_single_file, "save_part", fail)
    with pytest.raises(sdxl_data.InputError, match=f"{BASE}: .*No space left on device"):
        sdxl_single_file.find_snapshot(BASE, str(checkpoint), tmp_path, SDXL)
    assert [path.suffix for path in (tmp_path / "snapshots").iterdir()] == [".lock"]


def test_another_file_or_configuration_is_another_snapshot(checkpoint, tmp_path):
    names = {
        sdxl_single_file.snapshot_name(BASE, checkpoint, SDXL),
        sdxl_single_file.snapshot_name(BASE, checkpoint, None),
    }
    names.add(sdxl_single_file.snapshot_name(VAE, checkpoint, SDXL))
    copy = tmp_path / "copy.safetensors"
    shutil.copy2(checkpoint, copy)
    assert sdxl_single_file.snapshot_name(BASE, copy, SDXL) in names
    os.utime(copy, (1, 1))
    names.add(sdxl_single_file.snapshot_name(BASE, copy, SDXL))
    config = tmp_path / "config"
    shutil.copytree(SDXL, config)
    (config / "vae/config.json").write_text("{}")
    names.add(sdxl_single_file.snapshot_name(BASE, checkpoint, config))
    assert len(names) == 5


def test_without_a_config_folder_a_file_has_sdxls_own_configurations(tmp_path):
    sdxl_single_file.write_configs(tmp_path, set(), None)
    tokenizers = [trainer.CLIPTokenizer.from_pretrained(tmp_path / name) for name in ("tokenizer", "tokenizer_2")]
    for tokenizer in tokenizers:
        assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
        assert len(tokenizer) == 49408 and tokenizer.model_max_length == 77
    assert [tokenizer.pad_token_id for tokenizer in tokenizers] == [49407, 0]
    with torch.device("meta"):
        config = trainer.UNet2DConditionModel.load_config(tmp_path / "unet")
        unet = trainer.UNet2DConditionModel.from_config(config)
        refiner = trainer.UNet2DConditionModel.from_config(
            config
            | sdxl_single_file.REFINER_UNET
            | {"cross_attention_dim": 1280, "projection_class_embeddings_input_dim": 2560}
        )
        vae = trainer.AutoencoderKL.from_config(trainer.AutoencoderKL.load_config(tmp_path / "vae"))
        encoder = trainer.CLIPTextModel(trainer.CLIPTextModel.config_class.from_pretrained(tmp_path / "text_encoder"))
        kind = trainer.CLIPTextModelWithProjection
        encoder_2 = kind(kind.config_class.from_pretrained(tmp_path / "text_encoder_2"))
    # the sizes of the files in the repositories of Stability AI, e.g. 4.52 GB for the refiner in 16 bits
    sizes = [sum(p.numel() for p in model.parameters()) for model in (unet, refiner, vae, encoder, encoder_2)]
    assert sizes == [2_567_463_684, 2_259_526_660, 83_653_863, 123_060_480, 694_659_840]
    scheduler = trainer.diffusers.EulerDiscreteScheduler.from_pretrained(tmp_path / "scheduler")
    assert float(scheduler.alphas_cumprod[-1]) == pytest.approx(0.0047, rel=0.01)


@pytest.mark.parametrize("text", ["Pikachu, 1girl, don't", "naïve café ポケモン 🎉 (a:1.2) 100%", "x" * 40])
def test_the_tokenizer_is_clips_own(text):
    import open_clip

    tokenizer = sdxl_single_file.make_tokenizer("<|endoftext|>")
    assert tokenizer(text).input_ids[1:-1] == open_clip.SimpleTokenizer().encode(text)


def refusal(capsys, flags, folder, *words):
    with pytest.raises(SystemExit) as ended:
        trainer.parse_args([str(word) for word in [*flags, "--output_dir", folder, *words]])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_what_is_no_checkpoint_is_refused_with_what_to_do(flags, checkpoint, tmp_path, capsys):
    whole = original.original_checkpoint(SDXL)

    def refuse(name, tensors, flag=BASE):
        file = original.write(tmp_path / name, tensors)
        return refusal(capsys, flags, tmp_path / "run", flag, file)

    lora = {"lora_unet_down.lora_up.weight": torch.zeros(2, 2)}
    assert "has no UNet and no VAE and no first text encoder and no" in refuse("lora.safetensors", lora)
    assert "it is a LoRA" in refuse("lora.safetensors", lora)
    without = {name: tensor for name, tensor in whole.items() if "first_stage" not in name}
    assert "has no VAE; found UNet, first text encoder, second text encoder" in refuse("a.safetensors", without)
    without = {name: tensor for name, tensor in whole.items() if "conditioner" not in name}
    assert "has no first text encoder and no second text encoder; found UNet, VAE" in refuse("b.safetensors", without)
    sd1 = without | {"cond_stage_model.transformer.x": torch.zeros(1)}
    assert "found the parts of Stable Diffusion 1 or 2" in refuse("c.safetensors", sd1)
    assert "--pretrained_vae_model_name_or_path: " in refuse("d.safetensors", lora, VAE)
    small = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in whole.items()}
    assert "holds F8_E4M3 weights; give the 16- or 32-bit version" in refuse("e.safetensors", small)
    assert "EDM's noise schedule" in refuse("f.safetensors", whole | {"edm_vpred.sigma_max": torch.zeros(1)})
    (tmp_path / "cut.safetensors").write_bytes(checkpoint.read_bytes()[:-100])
    assert "is damaged or incomplete" in refusal(capsys, flags, tmp_path / "run", BASE, tmp_path / "cut.safetensors")
    for suffix in (".ckpt", ".bin", ".pt"):
        file = tmp_path / f"model{suffix}"
        file.write_bytes(b"x")
        assert "is a pickle" in refusal(capsys, flags, tmp_path / "run", BASE, file)
    missing = refusal(capsys, flags, tmp_path / "run", BASE, "model.safetensors")
    assert "no file model.safetensors; give a snapshot" in missing
    url = refusal(capsys, flags, tmp_path / "run", BASE, "https://civitai.com/a.safetensors")
    assert "is a URL; download the file first" in url
    config = refusal(capsys, flags, tmp_path / "run", "--single_file_config", SDXL)
    assert "no model flag names a .safetensors file" in config
    config = refusal(capsys, flags, tmp_path / "run", BASE, checkpoint, "--single_file_config", tmp_path)
    assert "has no unet, vae, text_encoder, text_encoder_2, tokenizer, tokenizer_2, scheduler" in config


def test_the_command_in_the_refusal_of_a_pickle_converts_it(flags, tmp_path, capsys, checkpoint):
    import subprocess
    import sys

    tensors = original.original_unet(REFINER)
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "my model.ckpt")
    error = refusal(capsys, flags, tmp_path / "run", BASE, tmp_path / "my model.ckpt")
    command = error.strip().partition("convert it: ")[2].replace("python -c", f"{sys.executable} -c")
    subprocess.run(command, shell=True, check=True)
    assert_equal_tensors(trainer.safetensors.torch.load_file(tmp_path / "my model.safetensors"), tensors)


def test_tensors_that_are_missing_or_of_other_sizes_are_an_error_in_one_line(checkpoint, tmp_path):
    with pytest.raises(sdxl_data.InputError, match="if its sizes differ from SDXL's, give --single_file_config"):
        sdxl_single_file.find_snapshot(BASE, str(checkpoint), tmp_path)
    tensors = original.original_checkpoint(SDXL)
    del tensors["model.diffusion_model.middle_block.1.norm.weight"]
    file = original.write(tmp_path / "x.safetensors", tensors)
    with pytest.raises(sdxl_data.InputError, match="tensors of its UNet are missing"):
        sdxl_single_file.find_snapshot(BASE, str(file), tmp_path, SDXL)
    for prefix, part in (("conditioner.embedders.0.", "first"), ("conditioner.embedders.1.", "second")):
        tensors = original.original_checkpoint(SDXL)
        last = max(name for name in tensors if name.startswith(prefix) and name.endswith("weight"))
        del tensors[last]
        file = original.write(tmp_path / f"{part}.safetensors", tensors)
        with pytest.raises(sdxl_data.InputError, match=f"tensors of its {part} text encoder are missing"):
            sdxl_single_file.find_snapshot(BASE, str(file), tmp_path, SDXL)


@pytest.mark.parametrize("field, value", [("modelspec.prediction_type", "v"), ("modelspec.predict_key", "v")])
def test_a_header_that_names_v_prediction_counts_too(tmp_path, field, value):
    for metadata, expected in (({field: value}, {"v_pred"}), ({field: "epsilon"}, set()), (None, set())):
        trainer.safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", metadata)
        assert sdxl_single_file.read_markers(tmp_path / "a.safetensors") == expected


def v_prediction_snapshot(folder):
    shutil.copytree(SDXL, folder)
    path = folder / "scheduler/scheduler_config.json"
    changes = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_v_prediction_and_zero_snr_are_read_from_the_file(flags, tmp_path, offline):
    snapshot = v_prediction_snapshot(tmp_path / "snapshot")
    marked = original.write(tmp_path / "v.safetensors", original.original_checkpoint(SDXL), v_pred=1, ztsnr=1)
    argv = [*flags, "--checkpointing_steps", 2, "--validation_prompt", "Aquafin", "--num_validation_images", 1]
    expected = [*argv]
    expected[expected.index(BASE) + 1] = snapshot
    a = assert_ok(run_trainer(expected, tmp_path / "a"))
    b = assert_ok(run_trainer(with_file(argv, marked), tmp_path / "b"))
    assert_same_run(a, b, step=4)
    assert (tmp_path / "a/samples/step-4.png").read_bytes() == (tmp_path / "b/samples/step-4.png").read_bytes()
    for name in (sdxl_data.LORA_FILE, sdxl_lora.KOHYA_FILE):
        with trainer.safetensors.safe_open(tmp_path / "b" / name, "np") as file:
            metadata = file.metadata()
        assert metadata["modelspec.prediction_type"] == "v" and metadata["ss_zero_terminal_snr"] == "True"
    line = 'from_config(pipeline.scheduler.config, prediction_type="v_prediction", rescale_betas_zero_snr=True, '
    assert line + 'timestep_spacing="trailing")\npipeline.load_lora' in (tmp_path / "b/README.md").read_text()
    words = ["--prediction_type", "v_prediction", "--rescale_betas_zero_snr"]
    given = assert_ok(run_trainer([*argv, *words], tmp_path / "c"))
    assert_equal_tensors(tensors_of(a.output_dir / "checkpoint-4"), tensors_of(given.output_dir / "checkpoint-4"))
    assert a.metrics() == given.metrics()
    words = ["--prediction_type", "epsilon", "--no-rescale_betas_zero_snr"]
    plain = assert_ok(run_trainer(with_file(argv, marked, *words), tmp_path / "d"))
    usual = assert_ok(run_trainer(argv, tmp_path / "e"))
    assert plain.metrics() == usual.metrics() != a.metrics()


def test_images_of_zero_snr_models_rescale_their_guidance(flags, tmp_path, monkeypatch):
    kind = trainer.diffusers.StableDiffusionXLPipeline
    given, original_call = [], kind.__call__

    def call(self, *words, **options):
        given.append(options["guidance_rescale"])
        return original_call(self, *words, **options)

    monkeypatch.setattr(kind, "__call__", call)
    device = torch.device("cpu")
    for words in ([], ["--prediction_type", "v_prediction", "--rescale_betas_zero_snr"]):
        args = trainer.parse_args([str(word) for word in [*flags, "--output_dir", tmp_path, *words]])
        trainer.generate_image(trainer.load_models(args, torch.float32, device), "Aquafin", 0, 64, 1)
        base = ["--pretrained_model_name_or_path", SDXL, "--output_dir", tmp_path, "--resolution", 64, *words]
        args = evaluate.parse_args([str(word) for word in [*base, "--num_inference_steps", 1]])
        evaluate.ImageGenerator(args, device).generate([evaluate.Prompt("a", "Aquafin", "Aquafin", None, ())], (0,))
    assert given == [0.0, 0.0, 0.7, 0.7]


def test_evaluate_and_the_sweep_take_files_too(flags, checkpoint, tmp_path):
    def generate(base, *more):
        words = ["--pretrained_model_name_or_path", base, "--output_dir", tmp_path / "eval", "--resolution", 64]
        words += ["--num_inference_steps", 2, "--dtype", "fp32", "--seeds", 0, *more]
        args = evaluate.parse_args([str(word) for word in words])
        generator = evaluate.ImageGenerator(args, torch.device("cpu"))
        return generator.base.scheduler.config, generator.generate(
            [evaluate.Prompt("a", "Aquafin", "Aquafin", None, ())], (0,)
        )

    config = ("--single_file_config", SDXL)
    _, expected = generate(SDXL)
    assert np.array_equal(generate(checkpoint, *config)[1], expected)
    marked = original.write(tmp_path / "v.safetensors", original.original_checkpoint(SDXL), v_pred=1, ztsnr=1)
    snapshot = v_prediction_snapshot(tmp_path / "snapshot")
    scheduler, other = generate(marked, *config)
    assert scheduler.prediction_type == "v_prediction" and scheduler.timestep_spacing == "trailing"
    assert np.array_equal(generate(snapshot)[1], other) and not np.array_equal(other, expected)
    words = ("--prediction_type", "v_prediction", "--rescale_betas_zero_snr")
    assert np.array_equal(generate(SDXL, *words)[1], other)
    argv = [*with_file(flags, checkpoint), "--validation_prompt", "x"]
    argv += words
    at = argv.index("--max_train_steps")
    del argv[at : at + 2]  # the sweep sets it
    sweep = hpo_sweep.parse_args(["--output_dir", tmp_path / "sweep", "--objective", "score", "--", *argv])
    sent = {name: sweep.evaluation[name] for name in ("single_file_config", "prediction_type")}
    assert sent == {"single_file_config": str(SDXL), "prediction_type": "v_prediction"}
    assert sweep.evaluation["rescale_betas_zero_snr"] is True


def test_noise_prediction_with_zero_terminal_snr_is_refused(flags, tmp_path):
    result = run_trainer([*flags, "--rescale_betas_zero_snr"], tmp_path / "run")
    assert result.codes == [1] and "--rescale_betas_zero_snr: the last timestep is all noise" in result.output
    assert "give --prediction_type v_prediction" in result.output
