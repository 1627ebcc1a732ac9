"""What is checked before a run resumes: the checkpoint's files, the base model, the batch, the version."""

import json
import os
import pickle
import random
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from harness import assert_ok, run_trainer
from hooks import note_samples, samples_by_step

import train_sdxl_lora as trainer


@pytest.mark.parametrize("processes", [1, 3, 4])
def test_a_checkpoint_of_two_processes_goes_on_with_the_same_samples_on_any_number(flags, tmp_path, processes):
    """The samples and crops are the same to the bit, the weights up to rounding."""
    argv = [*flags, "--train_batch_size", 6, "--checkpointing_steps", 2, "--resume_from_checkpoint", "latest"]
    for name in ("expected", "found"):
        (tmp_path / name).mkdir()
    whole = assert_ok(run_trainer(argv, tmp_path / "whole", 2, setup=partial(note_samples, tmp_path / "expected")))
    hook = partial(note_samples, tmp_path / "found")
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoint-4")
    argv += ["--train_batch_size", 12 // processes]
    again = assert_ok(run_trainer(argv, tmp_path / "run", processes, setup=hook))
    assert f"resumed with another --train_batch_size: '6' in the checkpoint, '{12 // processes}' now" in again.output
    expected = samples_by_step(tmp_path / "expected")
    assert len(expected) == 4 and all(len(keys) == 12 for keys in expected.values())
    assert samples_by_step(tmp_path / "found") == {step: expected[step] for step in (2, 3)}
    weights = [
        safetensors.torch.load_file(run.output_dir / "pytorch_lora_weights.safetensors") for run in (whole, again)
    ]
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=2e-4) for name in weights[0])


def test_another_global_batch_is_refused_or_goes_on_in_the_same_pass(flags, tmp_path):
    first = [a for a in flags if a not in ("--class_csv",) and not str(a).endswith("train_species.csv")]
    first += ["--class_mix", 1, 1, 0, "--max_train_samples", 24, "--train_batch_size", 2, "--max_train_steps", 5]
    (tmp_path / "found").mkdir()
    hook, argv = partial(note_samples, tmp_path / "found"), [*first, "--resume_from_checkpoint", "latest"]
    argv += ["--train_batch_size", 7, "--max_train_steps", 7]
    assert_ok(run_trainer(first, tmp_path / "run", setup=hook))
    refused = run_trainer(argv, tmp_path / "run")
    assert refused.codes == [1] and "global batch: 2 in the checkpoint, 7 now" in refused.output
    assert "--allow_batch_change" in refused.output
    assert_ok(run_trainer([*argv, "--allow_batch_change"], tmp_path / "run", setup=hook))
    delivered = [line.split()[0] for lines in samples_by_step(tmp_path / "found").values() for line in lines]
    assert len(delivered) == 24 and len(set(delivered)) == 24  # one pass: nothing lost, nothing twice
    progress = json.loads((tmp_path / "run/checkpoint-7/progress.json").read_text())
    assert progress["samples"] == 24


# flags that change what is learned, each with a value that is not its default
LEARNED = """
    --rank 3; --lora_alpha 3; --lora_dropout 0.1; --lora_target_modules to_q; --use_dora; --use_rslora;
    --train_text_encoder; --text_encoder_rank 3; --text_encoder_alpha 3; --vae_precision bf16; --base_precision int8;
    --max_train_samples 9; --resolution 128; --crop center; --random_flip; --image_interpolation_mode box;
    --class_key tags; --class_choice first; --class_mix 0 1 5; --class_mix_schedule cosine; --aesthetic_key score;
    --aesthetic_scale 5; --caption_dropout_rate 0.5; --dropped_caption empty; --long_captions chunk; --snr_gamma 1;
    --prediction_type v_prediction; --noise_offset 0.1; --refiner_timestep_band 0 100; --optimizer prodigy;
    --learning_rate 1e-4; --text_encoder_lr_scale 0.5; --scale_lr; --rescale_betas_zero_snr; --lr_num_cycles 2;
    --lr_power 2; --lr_scheduler constant; --lr_warmup_steps 2; --adam_beta1 0.5; --adam_beta2 0.5;
    --adam_weight_decay 0.5; --adam_epsilon 1e-4; --max_grad_norm 2; --mixed_precision bf16
"""
FREE = "--logging_steps 3; --checkpointing_steps 9; --dataloader_num_workers 2; --max_train_steps 99; --compile"


def sign(flags, folder, words):
    """The resume signature of the smallest run with some more flags."""
    args = trainer.parse_args([str(word) for word in [*flags, "--output_dir", folder, *words.split()]])
    accelerator = SimpleNamespace(mixed_precision=args.mixed_precision, num_processes=1)
    index = SimpleNamespace(fingerprint=lambda: "data")
    mix = SimpleNamespace(names=["mew"], data=[1.0])
    return trainer.make_resume_signature(args, accelerator, index, mix)


@pytest.mark.parametrize("words", [words.strip() for words in LEARNED.split(";")])
def test_a_flag_that_changes_what_is_learned_must_not_change_on_resume(flags, tmp_path, words):
    with pytest.raises(trainer.InputError, match=f"{words.split()[0]}: "):
        trainer.check_resume(sign(flags, tmp_path, ""), sign(flags, tmp_path, words))


@pytest.mark.parametrize("words", [words.strip() for words in FREE.split(";")])
def test_other_flags_may_change_on_resume(flags, tmp_path, words):
    trainer.check_resume(sign(flags, tmp_path, ""), sign(flags, tmp_path, words))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_another_base_model_is_refused(flags, own_run, tmp_path, part):
    import safetensors.torch

    other = tmp_path / "other"
    shutil.copytree(flags[1], other)
    weights = next((other / part).glob("*.safetensors"))
    tensors = {name: tensor + 1 for name, tensor in safetensors.torch.load_file(weights).items()}
    safetensors.torch.save_file(tensors, weights, {"format": "pt"})
    argv = [*flags, "--resume_from_checkpoint", "latest", "--pretrained_model_name_or_path", other]
    refused = run_trainer(argv, own_run)
    assert refused.codes == [1] and "base model: " in refused.output


def test_every_flipped_bit_of_a_checkpoint_is_detected_before_it_is_loaded(trained, own_run):
    folder, rng = own_run / "checkpoint-4", random.Random(5)
    assert trainer.verify_checkpoint(folder) is None
    files = sorted(folder.iterdir())
    assert {"checksums.json", "progress.json", "optimizer.bin"} < {path.name for path in files}
    places = [(path, rng.randrange(path.stat().st_size)) for path in files for _ in range(40)]
    places += [(files[0], at) for at in range(files[0].stat().st_size)]  # all of checksums.json
    assert len(places) >= 200 and files[0].name == "checksums.json"
    for path, at in places:
        data = bytearray(path.read_bytes())
        data[at] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        assert trainer.verify_checkpoint(folder) is not None, (path.name, at)
        data = bytearray((trained.output_dir / "checkpoint-4" / path.name).read_bytes())
        path.write_bytes(data)
    assert trainer.verify_checkpoint(folder) is None


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_checkpoint_with_code_in_it_is_not_executed(flags, own_run, tmp_path):
    folder = own_run / "checkpoint-4"
    state = {"state": {}, "param_groups": [Bomb(tmp_path / "exploded")]}
    torch.save(state, folder / "optimizer.bin", pickle_protocol=pickle.DEFAULT_PROTOCOL)
    names = [p.name for p in folder.iterdir() if p.name != "checksums.json"]
    (folder / "checksums.json").write_text(trainer.make_checksums(folder, names))
    result = run_trainer([*flags, "--max_train_steps", 6, "--resume_from_checkpoint", "latest"], own_run)
    assert result.codes == [1] and "weights_only" in result.output.lower()
    assert not (tmp_path / "exploded").exists()


def test_a_checkpoint_of_another_version_is_an_error_that_says_what_to_do(flags, own_run):
    folder = own_run / "checkpoint-4"
    progress = json.loads((folder / "progress.json").read_text())
    (folder / "progress.json").write_text(json.dumps(progress | {"from_the_future": 1}))
    names = [p.name for p in folder.iterdir() if p.name != "checksums.json"]
    (folder / "checksums.json").write_text(trainer.make_checksums(folder, names))
    result = run_trainer([*flags, "--max_train_steps", 6, "--resume_from_checkpoint", "latest"], own_run)
    assert result.codes == [1] and "from_the_future" in result.output


NEWER_FLAGS = (
    "val_fraction",
    "min_image_size",
    "trigger_word",
    "shuffle_tags",
    "tag_dropout",
    "keep_tags",
    "tag_separator",
)


def test_a_checkpoint_from_before_the_flags_were_called_class_goes_on(flags, own_run):
    folder = own_run / "checkpoint-4"
    progress = json.loads((folder / "progress.json").read_text())
    law = {name.replace("class_", "species_"): value for name, value in progress["law"].items()}
    progress["law"] = {name: value for name, value in law.items() if name not in NEWER_FLAGS}
    assert {"species_mix", "species_key", "species_choice", "species_mix_schedule"} < set(progress["law"])
    (folder / "progress.json").write_text(json.dumps(progress))
    names = [p.name for p in folder.iterdir() if p.name != "checksums.json"]
    (folder / "checksums.json").write_text(trainer.make_checksums(folder, names))
    argv = [*flags, "--max_train_steps", 6, "--resume_from_checkpoint", "latest"]
    refused = run_trainer([*argv, "--class_mix", 0.3, 0.95, 6000], own_run)
    assert refused.codes == [1] and "--class_mix: [0.2, 0.95, 6000] in the checkpoint, [0.3, " in refused.output
    refused = run_trainer([*argv, "--trigger_word", "sks"], own_run)
    assert refused.codes == [1] and "--trigger_word: None in the checkpoint, 'sks' now" in refused.output
    assert assert_ok(run_trainer(argv, own_run)).metrics()[-1]["step"] == 6
