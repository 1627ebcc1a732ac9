import argparse
import ast
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import yaml
from harness import SDXL, run_trainer

import evaluate
import hpo_sweep
import train_sdxl_lora
from sdxl_data import expand_shards, read_class_csv
from train_sdxl_lora import default_workers, make_parser, parse_args, read_prompts

# The flags of diffusers' train_text_to_image_lora_sdxl.py and their defaults, written out from its parser.
DIFFUSERS = {
    "pretrained_model_name_or_path": None,
    "pretrained_vae_model_name_or_path": None,
    "revision": None,
    "variant": None,
    "dataset_name": None,
    "dataset_config_name": None,
    "train_data_dir": None,
    "image_column": "image",
    "caption_column": "text",
    "validation_prompt": None,
    "num_validation_images": 4,
    "validation_epochs": 1,
    "max_train_samples": None,
    "output_dir": "sd-model-finetuned-lora",
    "cache_dir": None,
    "seed": None,
    "resolution": 1024,
    "center_crop": False,
    "random_flip": False,
    "train_text_encoder": False,
    "train_batch_size": 16,
    "num_train_epochs": 100,
    "max_train_steps": None,
    "checkpointing_steps": 500,
    "checkpoints_total_limit": None,
    "resume_from_checkpoint": None,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": "auto",  # False there: here it has kinds, and turns itself on where memory asks for it
    "learning_rate": 1e-4,
    "scale_lr": False,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 500,
    "snr_gamma": None,
    "allow_tf32": False,
    "dataloader_num_workers": 0,
    "use_8bit_adam": False,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_weight_decay": 1e-2,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "push_to_hub": False,
    "hub_token": None,
    "hub_model_id": None,
    "prediction_type": None,
    "logging_dir": "logs",
    "report_to": "tensorboard",
    "mixed_precision": None,
    "noise_offset": 0,
    "rank": 4,
    "image_interpolation_mode": "lanczos",
    "local_rank": -1,
    "enable_xformers_memory_efficient_attention": False,
    "enable_npu_flash_attention": False,
    "debug_loss": False,
}
OURS = {"lr_scheduler": "cosine", "lr_warmup_steps": None, "snr_gamma": 5.0}


@pytest.fixture
def folder(tmp_path):
    """A folder with everything a command line can point to."""
    for name in ("a.tar", "shards/b-000.tar", "shards/b-001.tar", "shards/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for name in ("images", "empty", "used/checkpoint-20", "no_unet"):
        (tmp_path / name).mkdir(parents=True)
    for part in ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"):
        (tmp_path / "no_unet" / part).mkdir()
    texts = {
        "columns.csv": "name,number\nmew,3\n",
        "count.csv": "pokemon,count\nmew,many\n",
        "negative.csv": "pokemon,count\nmew,5\npichu,-3\n",
        "nan.csv": "pokemon,count\nmew,5\npichu,nan\n",
        "blank.txt": "\n  \n",
        "no_prompt.jsonl": '{"text": "mew"}\n',
        "number.jsonl": '{"prompt": 7}\n',
        "broken.yaml": "rank: [8\n",
        "list.yaml": "- rank\n- 8\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.fixture
def parse(folder, monkeypatch):
    """parse_args on words, with the least flags that make a run; a word `@name` is a path in the folder."""
    monkeypatch.chdir(folder)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    base = ["--pretrained_model_name_or_path", str(SDXL), "--train_shards", "a.tar", "--output_dir", "out"]

    def run(words, without=()):
        kept = [w for i, w in enumerate(base) if base[i - i % 2] not in without]
        return parse_args(kept + ["--mixed_precision", "no", *words.split()])

    return run


def config(folder, text):
    (folder / "flags.yaml").write_text(text)
    return "--config flags.yaml "


def refusal(capsys, parse, words, without=()):
    with pytest.raises(SystemExit) as stop:
        parse(words, without)
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.out == ""
    assert printed.err.count("\n") == 1 and printed.err.endswith("\n"), printed.err
    return printed.err


def test_every_flag_of_diffusers_keeps_its_name_and_default(parse):
    args = vars(parse(""))
    given = {"pretrained_model_name_or_path", "output_dir", "mixed_precision", "dataloader_num_workers"}
    expected = {name: value for name, value in (DIFFUSERS | OURS).items() if name not in given}
    assert {name: args[name] for name in expected} == expected
    defaults = vars(make_parser().parse_args(["--pretrained_model_name_or_path", "x"]))
    for name in ("output_dir", "mixed_precision"):
        assert defaults[name] == DIFFUSERS[name]


def test_a_command_line_of_diffusers_runs_unchanged(parse):
    words = (
        "--train_data_dir images --image_column picture --caption_column text --resolution 512 --center_crop "
        "--random_flip --train_batch_size 1 --num_train_epochs 2 --checkpointing_steps 500 --learning_rate 1e-04 "
        "--lr_scheduler constant --lr_warmup_steps 0 --seed 42 --output_dir lora --validation_prompt dragon "
        "--report_to wandb --train_text_encoder --snr_gamma 5.0 --max_train_steps 10 --gradient_checkpointing "
        "--gradient_accumulation_steps 4 --use_8bit_adam --rank 8 --allow_tf32 --dataloader_num_workers 0 --scale_lr"
    )
    args = parse(words, without=["--train_shards"])
    assert args.lr_scheduler == "constant" and args.lr_warmup_steps == 0 and args.dataloader_num_workers == 0
    assert args.crop == "center" and args.optimizer == "adamw8bit" and args.train_text_encoder and args.scale_lr


def test_the_number_of_workers_comes_from_the_machine(parse, monkeypatch):
    workers = {}
    for cores, processes in ((1, 1), (8, 1), (8, 2), (64, 1), (4, 8)):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        workers[cores, processes] = default_workers(processes)
    assert workers == {(1, 1): 0, (8, 1): 7, (8, 2): 3, (64, 1): 8, (4, 8): 0}
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert parse("").dataloader_num_workers == 3


def test_groups_follow_the_sections():
    titles = [
        group.title for group in make_parser()._action_groups if group.title not in ("positional arguments", "options")
    ]
    sections = ["Models and LoRA", "Data", "Encoding", "Loss", "Optimizer", "Checkpoints", "Validation", "Run"]
    assert titles == sections


def test_every_flag_has_a_help_and_every_boolean_a_no():
    actions = [a for a in make_parser()._actions if a.dest != "help"]
    assert [a.dest for a in actions if not a.help] == []
    booleans = [a for a in actions if isinstance(a.default, bool)]
    assert len(booleans) > 10
    assert [a.dest for a in booleans if f"--no-{a.dest}" not in a.option_strings] == []
    assert [a.dest for a in actions if isinstance(a, (argparse._StoreTrueAction, argparse._StoreFalseAction))] == []


def test_defaults_follow_other_flags(parse):
    args = parse("--rank 8")
    assert (args.lora_alpha, args.text_encoder_rank, args.text_encoder_alpha) == (8, 8, 8)
    args = parse("--rank 8 --text_encoder_rank 2")
    assert (args.lora_alpha, args.text_encoder_rank, args.text_encoder_alpha) == (8, 2, 2)
    args = parse("--rank 8 --lora_alpha 1.5 --text_encoder_alpha 3")
    assert (args.lora_alpha, args.text_encoder_rank, args.text_encoder_alpha) == (1.5, 8, 3)
    assert (args.crop, args.dropped_caption, args.optimizer) == ("random_ar", "zeros", "adamw")
    assert parse("--snr_gamma 0").snr_gamma == 0


def test_a_config_file_gives_flags_and_the_command_line_wins(parse, folder):
    text = "rank: 8\nlearning_rate: 1e-3\nclass_mix: [0.1, 0.9, 50]\nlora_target_modules: [to_q]\nrandom_flip: true\n"
    args = parse(config(folder, text))
    assert (args.rank, args.learning_rate, args.class_mix) == (8, 1e-3, [0.1, 0.9, 50])
    assert args.lora_target_modules == ["to_q"] and args.random_flip is True
    args = parse(config(folder, text) + "--rank 2 --species_mix 0 1 2 --lora_target_modules to_k to_v")
    assert (args.rank, args.class_mix, args.lora_target_modules) == (2, [0, 1, 2], ["to_k", "to_v"])
    assert args.learning_rate == 1e-3


def test_a_true_of_the_file_is_undone_by_the_no_flag_and_a_false_by_the_flag(parse, folder):
    assert parse(config(folder, "random_flip: true\n")).random_flip is True
    assert parse(config(folder, "random_flip: true\n") + "--no-random_flip").random_flip is False
    assert parse(config(folder, "random_flip: false\n")).random_flip is False
    assert parse(config(folder, "random_flip: false\n") + "--random_flip").random_flip is True


def test_flags_written_as_yaml_are_the_same_flags_again(parse, folder):
    words = "--random_flip --species_mix 0.25 0.75 1e4 --adam_epsilon 1e-9 --rank 7 --center_crop --optimizer prodigy"
    args = vars(parse(words))
    args["validation_prompt"] = '-1: "Flabébé" # not a comment'
    text = yaml.safe_dump({k: v for k, v in args.items() if v is not None}, allow_unicode=True)
    again = vars(
        parse(config(folder, text), without=["--pretrained_model_name_or_path", "--train_shards", "--output_dir"])
    )
    assert again.pop("config") == "flags.yaml"
    assert again == {k: v for k, v in args.items() if k != "config"}


@pytest.mark.parametrize("key", ["ranks: 8", "ran: 8", "randomflip: true"])
def test_an_unknown_key_of_the_file_is_refused(capsys, parse, folder, key):
    assert f"--{key.split(':')[0]}" in refusal(capsys, parse, config(folder, key + "\n"))


@pytest.mark.parametrize("words", ["--ran 8", "--random", "--no-random", "--train_batch 4"])
def test_flags_are_not_abbreviated(capsys, parse, words):
    assert words.split()[0] in refusal(capsys, parse, words)


REFUSED = [
    ("--rank 0", "rank", "above 0"),
    ("--rank -3", "rank", "found -3"),
    ("--rank four", "rank", "four"),
    ("--lora_alpha 0", "lora_alpha", "above 0"),
    ("--train_batch_size 0", "train_batch_size", "above 0"),
    ("--max_train_steps 0", "max_train_steps", "above 0"),
    ("--resolution 100", "resolution", "found 100"),
    ("--lora_dropout 1.5", "lora_dropout", "between 0 and 1"),
    ("--caption_dropout_rate -0.1", "caption_dropout_rate", "between 0 and 1"),
    ("--max_bad_fraction 5", "max_bad_fraction", "between 0 and 1"),
    ("--species_mix 0.2 1.2 100", "species_mix", "1.2"),
    ("--species_mix -1 0.5 100", "species_mix", "-1"),
    ("--species_mix 0.2 0.5 -100", "species_mix", "-100"),
    ("--species_mix 0.2 nan 100", "species_mix", "nan"),
    ("--species_mix 0.2 0.5", "species_mix", "3 arguments"),
    ("--center_crop --crop random_ar", "center_crop", "contradicts --crop random_ar"),
    ("--use_8bit_adam --optimizer prodigy", "use_8bit_adam", "contradicts"),
    ("--crop bucket --resolution 72", "resolution", "multiples of 64 px"),
    ("--stage refiner", "refiner_unet", "missing"),
    ("--pretrained_model_name_or_path ./nowhere", "pretrained_model_name_or_path", "no folder nowhere"),
    ("--pretrained_model_name_or_path ./no_unet", "pretrained_model_name_or_path", "has no unet;"),
    ("--train_shards missing.tar", "train_shards", "no file missing.tar"),
    ("--train_shards a.tar missing.tar", "train_shards", "no file missing.tar"),
    ("--train_shards empty", "train_shards", "no .tar file in empty"),
    ("--train_shards shards/c-{000..004}.tar", "train_shards", "shards/c-000.tar; 5 of 5 missing"),
    ("--train_shards shards/b-{000..002}.tar", "train_shards", "no file shards/b-002.tar"),
    ("--val_shards missing.tar", "val_shards", "no file missing.tar"),
    ("--species_csv missing.csv", "species_csv", "missing.csv"),
    ("--species_csv columns.csv", "species_csv", "name, number"),
    ("--species_csv count.csv", "species_csv", "line 2: count 'many'"),
    ("--validation_prompts missing.txt", "validation_prompts", "missing.txt"),
    ("--validation_prompts blank.txt", "validation_prompts", "empty"),
    ("--validation_prompts no_prompt.jsonl", "validation_prompts", "prompt"),
    ("--resume_from_checkpoint empty", "resume_from_checkpoint", "no checkpoint"),
    ("--resume_from_checkpoint nowhere", "resume_from_checkpoint", "no checkpoint"),
    ("--resume_from_checkpoint checkpoint-7 --output_dir used", "resume_from_checkpoint", "no checkpoint"),
    ("--output_dir a.tar", "output_dir", "is a file"),
    ("--hub_token secret --report_to wandb", "hub_token", "hf auth login"),
    ("--species_csv negative.csv", "species_csv", "-3"),
    ("--species_csv nan.csv", "species_csv", "nan"),
    ("--validation_prompts number.jsonl", "validation_prompts", "prompt"),
    ("--hub_token secret --report_to all", "hub_token", "hf auth login"),
    ("--hub_token secret --report_to mlflow", "hub_token", "hf auth login"),
    ("--hub_token secret --report_to comet_ml", "hub_token", "hf auth login"),
    ("--lr_num_cycles 0", "lr_num_cycles", "above 0"),
    ("--lr_power -1", "lr_power", "above 0"),
    (
        "--enable_xformers_memory_efficient_attention --attention_backend math",
        "enable_xformers_memory_efficient_attention",
        "contradicts",
    ),
    ("--config missing.yaml", "config", "missing.yaml"),
    ("--config broken.yaml", "config", "broken.yaml"),
    ("--config list.yaml", "config", "list.yaml"),
    ("--snr_gamma -1", "snr_gamma", "-1"),
    ("--learning_rate -1", "learning_rate", "-1"),
    ("--learning_rate nan", "learning_rate", "nan"),
    ("--adam_beta1 1.5", "adam_beta1", "1.5"),
    ("--dataloader_num_workers -1", "dataloader_num_workers", "-1"),
    ("--lr_warmup_steps -1", "lr_warmup_steps", "-1"),
    ("--max_grad_norm -1", "max_grad_norm", "-1"),
    ("--text_encoder_lr_scale -1", "text_encoder_lr_scale", "-1"),
    ("--report_to nonsense", "report_to", "nonsense"),
    (f"--seed {2**70}", "seed", str(2**70)),
    ("--learning_rte 3", "learning_rte", "no such flag; did you mean --learning_rate?"),
    ("--train_shard=a.tar", "train_shard", "did you mean --train_shards?"),
    ("--xyzzy", "xyzzy", "no such flag; see --help"),
    ("--learning_rate x", "learning_rate", "invalid float value: 'x'"),
]


@pytest.mark.parametrize("words, flag, found", REFUSED)
def test_a_wrong_value_ends_with_one_line_that_names_the_flag(capsys, parse, words, flag, found):
    line = refusal(capsys, parse, words)
    assert re.search(rf"error: --{flag}[ :]", line), line
    assert found in line


def test_a_flag_that_must_be_given_is_named(capsys, parse):
    line = refusal(capsys, parse, "", without=["--pretrained_model_name_or_path"])
    assert "error: --pretrained_model_name_or_path: missing; see --help" in line


def test_exactly_one_data_source_is_wanted(capsys, parse):
    neither = refusal(capsys, parse, "", without=["--train_shards"])
    assert "--train_shards" in neither and "--train_data_dir" in neither
    both = refusal(capsys, parse, "--train_data_dir images")
    assert "found --train_shards and --train_data_dir" in both
    assert "no folder nowhere" in refusal(capsys, parse, "--train_data_dir nowhere", without=["--train_shards"])
    assert parse("--train_data_dir images", without=["--train_shards"]).train_data_dir == ["images"]


def test_an_output_dir_with_checkpoints_names_both_ways_out(capsys, parse):
    line = refusal(capsys, parse, "--output_dir used")
    assert "--output_dir: used" in line
    assert "--resume_from_checkpoint latest" in line and "--overwrite_output_dir" in line
    assert parse("--output_dir used --resume_from_checkpoint latest").output_dir == "used"
    assert parse("--output_dir used --overwrite_output_dir").output_dir == "used"
    assert parse("--resume_from_checkpoint latest").resume_from_checkpoint == "latest"


def test_fp16_wants_a_gpu(flags, tmp_path):
    result = run_trainer([*flags, "--mixed_precision", "fp16"], tmp_path / "run")
    assert result.codes == [1] and "--mixed_precision: fp16 needs a CUDA device" in result.output


def test_a_tracker_that_is_not_installed_is_named(flags, tmp_path):
    result = run_trainer([*flags, "--report_to", "aim"], tmp_path / "run")
    assert result.codes == [1] and "--report_to: aim is not installed; choose from all, none, " in result.output


def test_a_whole_snapshot_is_accepted_and_one_part_less_is_not(capsys, parse, folder):
    shutil.copytree(SDXL, folder / "snapshot", ignore=shutil.ignore_patterns("*.safetensors"))
    assert parse("--pretrained_model_name_or_path ./snapshot")
    shutil.rmtree(folder / "snapshot/tokenizer_2")
    assert "has no tokenizer_2;" in refusal(capsys, parse, "--pretrained_model_name_or_path ./snapshot")


def test_shards_are_files_folders_and_brace_patterns(parse):
    parse("")  # moves into the folder
    b = ["shards/b-000.tar", "shards/b-001.tar"]
    assert expand_shards(["shards"]) == b
    assert expand_shards(["shards/b-{000..001}.tar"]) == b
    assert expand_shards(["a.tar", "shards"]) == ["a.tar", *b]


def test_a_species_csv_is_read_casefolded_and_summed(tmp_path):
    path = tmp_path / "species.csv"
    path.write_text("species,count,fraction\nMr. Mime,3,0.3\n mr. mime ,4,0.4\nFlabÉbÉ,2.5,0.3\n", encoding="utf-8")
    assert read_class_csv(path) == {"mr. mime": 7, "flabébé": 2.5}
    path.write_text("count,pokemon\n3,Mew\n")
    assert read_class_csv(path) == {"mew": 3}


def test_a_species_csv_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "species.csv"
    path.write_text("pokemon,count\nMew,3\n", encoding="utf-8-sig")
    assert read_class_csv(path) == {"mew": 3}


def test_a_path_below_the_home_folder_is_found_also_where_no_shell_expands_it(parse, folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    home = str(folder)
    words = "--cache_dir=~/c --output_dir=~/run --train_shards ~/a.tar"
    args = parse(words + " " + config(folder, "logging_dir: ~/logs\n"))
    found = [args.cache_dir, args.output_dir, args.train_shards, args.logging_dir]
    assert found == [home + "/c", home + "/run", [home + "/a.tar"], home + "/logs"]
    assert parse("--tag_separator ~").tag_separator == "~"


def test_prompts_come_from_the_flag_then_from_the_file(parse, folder):
    (folder / "p.txt").write_text(" a mew \n\na pichu\n")
    (folder / "p.jsonl").write_text(json.dumps({"prompt": "a mew", "seed": 1}) + "\n\n")
    assert read_prompts(parse("--validation_prompts p.txt --validation_prompt first")) == ["first", "a mew", "a pichu"]
    assert read_prompts(parse("--validation_prompts p.jsonl")) == ["a mew"]
    assert read_prompts(parse("")) == []


# ---- every flag has an effect, and a test of it

# flag → the test that fails when the flag has no effect
TRAINER_FLAGS = {
    "pretrained_model_name_or_path": "test_resume.py::test_another_base_model_is_refused",
    "pretrained_vae_model_name_or_path": "test_models.py::test_another_vae_is_loaded_from_its_own_folder",
    "revision": "test_models.py::test_revision_variant_and_cache_dir_are_asked_for_with_every_part",
    "variant": "test_models.py::test_revision_variant_and_cache_dir_are_asked_for_with_every_part",
    "init_lora": "test_init_lora.py::test_a_learning_rate_of_0_writes_the_lora_it_was_given",
    "merge_lora": "test_init_lora.py::test_a_merged_lora_changes_what_is_trained_and_stays_out_of_the_files",
    "single_file_config": "test_checkpoint_files.py::test_a_file_trains_to_the_same_bits_as_its_snapshot",
    "rescale_betas_zero_snr": "test_checkpoint_files.py::test_v_prediction_and_zero_snr_are_read_from_the_file",
    "lr_num_cycles": "test_optimizer.py::test_cycles_and_power_shape_their_schedules",
    "lr_power": "test_optimizer.py::test_cycles_and_power_shape_their_schedules",
    "hub_private_repo": "test_services.py::test_only_the_files_of_the_lora_are_uploaded",
    "local_rank": "test_services.py::test_flags_without_effect_are_named",
    "enable_xformers_memory_efficient_attention": "test_services.py::test_every_flag_of_diffusers_script_is_accepted",
    "enable_npu_flash_attention": "test_services.py::test_flags_without_effect_are_named",
    "debug_loss": "test_services.py::test_flags_without_effect_are_named",
    "stage": "test_refiner.py::test_only_the_refiner_unet_changes",
    "refiner_unet": "test_refiner.py::test_a_snapshot_with_unet_is_as_good_as_its_folder",
    "text_encoder_2_lora": "test_refiner.py::test_the_merged_encoder_says_what_the_base_pipeline_with_its_lora_says",
    "rank": "test_models.py::test_rank_alpha_and_rslora_make_the_scale",
    "lora_alpha": "test_models.py::test_rank_alpha_and_rslora_make_the_scale",
    "lora_dropout": "test_models.py::test_lora_dropout_is_on_every_adapter",
    "lora_target_modules": "test_models.py::test_an_unknown_target_is_an_error_that_names_the_flag_and_the_target",
    "use_dora": "test_checkpoints.py::test_a_dora_kohya_file_has_dora_scale",
    "use_rslora": "test_models.py::test_rank_alpha_and_rslora_make_the_scale",
    "train_text_encoder": "test_models.py::test_the_last_layer_of_text_encoder_alone_has_no_adapter",
    "text_encoder_rank": "test_models.py::test_rank_alpha_and_rslora_make_the_scale",
    "text_encoder_alpha": "test_models.py::test_rank_alpha_and_rslora_make_the_scale",
    "vae_precision": "test_models.py::test_adapters_are_fp32_whatever_the_base_is",
    "base_precision": "test_speed.py::test_the_flags_of_models_and_loader_are_in_effect_at_the_first_step",
    "gradient_checkpointing": "test_speed.py::test_the_flags_of_models_and_loader_are_in_effect_at_the_first_step",
    "attention_backend": "test_speed.py::test_the_flags_of_models_and_loader_are_in_effect_at_the_first_step",
    "compile": "test_speed.py::test_without_a_compiler_a_run_goes_on_uncompiled_and_says_so",
    "train_shards": "test_sources.py::test_every_source_gives_the_stream_of_the_local_files",
    "val_shards": "test_validation.py::test_a_run_is_validated_every_so_many_steps_or_epochs_and_at_the_end",
    "val_fraction": "test_captions.py::test_a_fraction_is_held_out_and_validated_on",
    "train_data_dir": "test_folders.py::test_a_kohya_folder_trains_like_the_same_images_as_shards",
    "instance_prompt": "test_folders.py::test_a_run_without_captions_ends_with_three_ways_to_give_them",
    "trigger_word": "test_captions.py::test_the_trigger_word_reaches_captions_card_and_both_files",
    "shuffle_tags": "test_captions.py::test_the_flags_of_tags_reach_the_captions",
    "tag_dropout": "test_captions.py::test_the_flags_of_tags_reach_the_captions",
    "keep_tags": "test_captions.py::test_the_flags_of_tags_reach_the_captions",
    "tag_separator": "test_captions.py::test_the_flags_of_tags_reach_the_captions",
    "min_image_size": "test_captions.py::test_small_images_are_left_out_and_listed",
    "dataset_name": "test_sources.py::test_a_dataset_enters_the_same_stream",
    "dataset_config_name": "test_data_flags.py::test_the_configuration_of_a_dataset_is_asked_for_by_name",
    "image_column": "test_sources.py::test_a_dataset_enters_the_same_stream",
    "caption_column": "test_sources.py::test_a_dataset_enters_the_same_stream",
    "max_train_samples": "test_index.py::test_max_train_samples_takes_the_same_samples_whatever_the_shards",
    "max_bad_fraction": "test_damage.py::test_too_many_damaged_samples_end_the_run_and_name_the_flag",
    "cache_dir": "test_models.py::test_revision_variant_and_cache_dir_are_asked_for_with_every_part",
    "resolution": "test_data_flags.py::test_a_flag_changes_the_data_that_it_is_about",
    "crop": "test_data_flags.py::test_a_flag_changes_the_data_that_it_is_about",
    "center_crop": "test_data_flags.py::test_a_flag_changes_the_data_that_it_is_about",
    "random_flip": "test_data_flags.py::test_a_flag_changes_the_data_that_it_is_about",
    "image_interpolation_mode": "test_data_flags.py::test_a_flag_changes_the_data_that_it_is_about",
    "class_csv": "test_data_flags.py::test_a_flag_changes_the_data_that_it_is_about",
    "class_key": "test_data_flags.py::test_a_flag_changes_the_data_that_it_is_about",
    "class_choice": "test_data_flags.py::test_a_flag_changes_the_data_that_it_is_about",
    "class_mix": "test_data_flags.py::test_a_flag_changes_the_data_that_it_is_about",
    "class_mix_schedule": "test_data_flags.py::test_a_flag_changes_the_data_that_it_is_about",
    "aesthetic_key": "test_data_flags.py::test_a_flag_changes_the_data_that_it_is_about",
    "aesthetic_scale": "test_data_flags.py::test_a_flag_changes_the_data_that_it_is_about",
    "train_batch_size": "test_train.py::test_the_samples_of_a_step_depend_on_the_global_batch_alone",
    "dataloader_num_workers": "test_speed.py::test_the_flags_of_models_and_loader_are_in_effect_at_the_first_step",
    "cache_latents": "test_speed.py::test_pictures_of_a_cached_run_are_those_of_an_uncached_one",
    "caption_dropout_rate": "test_train_step.py::test_the_flags_of_the_loss_reach_it",
    "long_captions": "test_speed.py::test_the_flags_of_models_and_loader_are_in_effect_at_the_first_step",
    "dropped_caption": "test_train_step.py::test_the_flags_of_the_loss_reach_it",
    "cache_text_embeddings": "test_speed.py::test_pictures_of_a_cached_run_are_those_of_an_uncached_one",
    "snr_gamma": "test_train_step.py::test_the_flags_of_the_loss_reach_it",
    "prediction_type": "test_models.py::test_the_noise_scheduler_is_ddpm_with_the_betas_of_the_snapshot",
    "noise_offset": "test_train_step.py::test_the_flags_of_the_loss_reach_it",
    "refiner_timestep_band": "test_refiner.py::test_training_and_validation_stay_in_the_band",
    "optimizer": "test_optimizer.py::test_prodigy_finds_its_own_step",
    "use_8bit_adam": "test_arguments.py::test_a_command_line_of_diffusers_runs_unchanged",
    "learning_rate": "test_train.py::test_the_learning_rate_ends_at_zero_on_two_processes_with_accumulation",
    "text_encoder_lr_scale": "test_speed.py::test_the_flags_of_models_and_loader_are_in_effect_at_the_first_step",
    "scale_lr": "test_train.py::test_command_lines_of_diffusers_users_run_unchanged",
    "lr_scheduler": "test_train.py::test_command_lines_of_diffusers_users_run_unchanged",
    "lr_warmup_steps": "test_train.py::test_the_learning_rate_ends_at_zero_on_two_processes_with_accumulation",
    "adam_beta1": "test_optimizer.py::test_the_default_is_fused_adamw_with_the_flags_and_rates_of_the_groups",
    "adam_beta2": "test_optimizer.py::test_the_default_is_fused_adamw_with_the_flags_and_rates_of_the_groups",
    "adam_weight_decay": "test_optimizer.py::test_the_default_is_fused_adamw_with_the_flags_and_rates_of_the_groups",
    "adam_epsilon": "test_optimizer.py::test_the_default_is_fused_adamw_with_the_flags_and_rates_of_the_groups",
    "max_grad_norm": "test_train_step.py::test_gradients_are_scaled_to_max_grad_norm_and_the_norm_before_that_is_told",
    "on_nonfinite": "test_nonfinite.py::test_steps_without_a_finite_loss_are_skipped_when_asked_but_not_for_ever",
    "max_train_steps": "test_train.py::test_latest_without_a_checkpoint_starts_fresh",
    "num_train_epochs": "test_train.py::test_command_lines_of_diffusers_users_run_unchanged",
    "gradient_accumulation_steps": "test_process.py::test_precision_and_accumulation_are_those_of_the_flags",
    "output_dir": "test_checkpoints.py::test_the_oldest_checkpoints_are_pruned",
    "overwrite_output_dir": "test_train.py::test_checkpoints_in_the_way_are_refused_or_overwritten",
    "checkpointing_steps": "test_checkpoints.py::test_no_checkpoint_before_checkpointing_after_steps",
    "checkpointing_after_steps": "test_checkpoints.py::test_no_checkpoint_before_checkpointing_after_steps",
    "checkpoints_total_limit": "test_checkpoints.py::test_the_oldest_checkpoints_are_pruned",
    "resume_from_checkpoint": "test_checkpoints.py::test_a_checkpoint_is_also_found_by_its_name_as_in_diffusers",
    "allow_batch_change": "test_resume.py::test_another_global_batch_is_refused_or_goes_on_in_the_same_pass",
    "push_to_hub": "test_train.py::test_push_to_hub_uploads_without_the_token_in_any_file",
    "hub_token": "test_train.py::test_push_to_hub_uploads_without_the_token_in_any_file",
    "hub_model_id": "test_train.py::test_push_to_hub_uploads_without_the_token_in_any_file",
    "validation_prompt": "test_validation.py::test_sample_pictures_are_made_as_the_flags_say",
    "validation_prompts": "test_validation.py::test_sample_pictures_are_made_as_the_flags_say",
    "num_validation_images": "test_validation.py::test_sample_pictures_are_made_as_the_flags_say",
    "validation_steps": "test_validation.py::test_a_run_is_validated_every_so_many_steps_or_epochs_and_at_the_end",
    "validation_epochs": "test_validation.py::test_a_run_is_validated_every_so_many_steps_or_epochs_and_at_the_end",
    "validation_base_lora": "test_refiner.py::test_stock_diffusers_draws_the_same_two_stage_picture_from_both_files",
    "denoising_start": "test_validation.py::test_sample_pictures_are_made_as_the_flags_say",
    "val_max_batches": "test_validation.py::test_the_validation_loss_ends_after_val_max_batches",
    "config": "test_arguments.py::test_a_config_file_gives_flags_and_the_command_line_wins",
    "seed": "test_checkpoints.py::test_files_depend_on_neither_path_nor_workers",
    "mixed_precision": "test_process.py::test_precision_and_accumulation_are_those_of_the_flags",
    "allow_tf32": "test_process.py::test_tf32_and_deterministic_kernels_are_asked_for",
    "deterministic": "test_process.py::test_tf32_and_deterministic_kernels_are_asked_for",
    "report_to": "test_process.py::test_report_to_names_the_trackers_beside_metrics_jsonl",
    "logging_dir": "test_process.py::test_logs_go_where_logging_dir_says",
    "logging_steps": "test_train.py::test_latest_without_a_checkpoint_starts_fresh",
    "dry_run": "test_validation.py::test_a_dry_run_counts_the_adapters_that_training_saves",
}
EVALUATION_FLAGS = {
    "prompts": "test_evaluate.py::test_prompts_of_one_species_without_an_aesthetic_head_are_scored_too",
    "seeds": "test_evaluate.py::test_all_outputs_are_there_and_agree",
    "pretrained_model_name_or_path": "test_evaluate.py::test_all_outputs_are_there_and_agree",
    "single_file_config": "test_checkpoint_files.py::test_evaluate_and_the_sweep_take_files_too",
    "prediction_type": "test_checkpoint_files.py::test_evaluate_and_the_sweep_take_files_too",
    "rescale_betas_zero_snr": "test_checkpoint_files.py::test_evaluate_and_the_sweep_take_files_too",
    "revision": "test_pictures.py::test_revision_variant_cache_and_precision_are_asked_for",
    "variant": "test_pictures.py::test_revision_variant_cache_and_precision_are_asked_for",
    "lora": "test_evaluate.py::test_all_outputs_are_there_and_agree",
    "checkpoints": "test_evaluate.py::test_checkpoints_are_plotted_over_steps",
    "merge_lora": ("test_init_lora.py::test_sample_pictures_evaluation_and_the_cards_code_draw_with_the_merged_lora"),
    "lora_scale": "test_pictures.py::test_a_lora_has_the_strength_of_lora_scale",
    "refiner_unet": "test_pictures.py::test_the_refiner_takes_over_where_denoising_start_says",
    "refiner_lora": "test_evaluate.py::test_a_refined_image_is_the_stock_pipelines_with_both_loras",
    "denoising_start": "test_pictures.py::test_the_refiner_takes_over_where_denoising_start_says",
    "resolution": "test_pictures.py::test_size_steps_guidance_and_negative_prompt_are_those_of_the_flags",
    "num_inference_steps": "test_pictures.py::test_size_steps_guidance_and_negative_prompt_are_those_of_the_flags",
    "guidance_scale": "test_pictures.py::test_size_steps_guidance_and_negative_prompt_are_those_of_the_flags",
    "negative_prompt": "test_pictures.py::test_size_steps_guidance_and_negative_prompt_are_those_of_the_flags",
    "dtype": "test_pictures.py::test_revision_variant_cache_and_precision_are_asked_for",
    "batch_size": "test_evaluate.py::test_a_killed_evaluation_continues_and_makes_no_image_twice",
    "clip_model": "test_evaluate.py::test_scores_are_those_of_open_clip_and_of_laions_own_head",
    "class_prompt": "test_pictures.py::test_clip_reads_the_species_in_the_words_of_species_prompt",
    "aesthetic_clip_model": "test_evaluate.py::test_scores_are_those_of_open_clip_and_of_laions_own_head",
    "aesthetic_head": "test_evaluate.py::test_scores_are_those_of_open_clip_and_of_laions_own_head",
    "score_weights": "test_pictures.py::test_the_score_is_weighted_as_score_weights_say",
    "train_data_dir": "test_evaluate_folders.py::test_copies_of_a_folder_are_found_as_those_of_shards",
    "val_fraction": "test_evaluate_folders.py::test_images_that_the_trainer_held_out_are_no_training_images",
    "train_shards": "test_pictures.py::test_held_out_images_are_those_of_val_shards_and_training_images_without_them",
    "val_shards": "test_pictures.py::test_held_out_images_are_those_of_val_shards_and_training_images_without_them",
    "config": "test_pictures.py::test_flags_may_come_from_a_config_file_and_the_command_line_wins",
    "output_dir": "test_evaluate.py::test_all_outputs_are_there_and_agree",
    "images_dir": "test_pictures.py::test_the_score_is_weighted_as_score_weights_say",
    "cache_dir": "test_pictures.py::test_copies_of_shards_are_kept_in_cache_dir",
    "report_to": "test_evaluate.py::test_wandb_gets_a_table_of_the_images",
}
SWEEP_FLAGS = {
    "config": "test_study.py::test_flags_may_come_from_a_config_file_and_the_command_line_wins",
    "output_dir": "test_sweep.py::test_the_trainer_accepts_trial_yaml_and_best_params_yaml",
    "n_trials": "test_sweep.py::test_a_finished_study_takes_more_trials_even_after_a_torn_journal",
    "objective": "test_sweep.py::test_val_loss_needs_no_images",
    "search_space": "test_sweep.py::test_conditions_hold_in_every_trial",
    "seed": "test_study.py::test_the_sampler_draws_at_random_until_startup_trials_are_there",
    "startup_trials": "test_study.py::test_the_sampler_draws_at_random_until_startup_trials_are_there",
    "storage": "test_study.py::test_the_study_lies_in_the_database_of_storage",
    "study_name": "test_study.py::test_the_study_lies_in_the_database_of_storage",
    "trial_steps": "test_sweep.py::test_the_trainer_accepts_trial_yaml_and_best_params_yaml",
    "pruner": "test_study.py::test_the_pruner_is_the_one_of_the_flag",
    "pruning_warmup": "test_study.py::test_a_hopeless_trial_is_ended_after_the_warm_up_once_there_are_others",
    "keep_trials": "test_sweep.py::test_only_the_best_trials_keep_their_weights",
    "prompts": "test_study.py::test_the_panel_its_seeds_and_other_flags_reach_evaluate",
    "seeds": "test_study.py::test_the_panel_its_seeds_and_other_flags_reach_evaluate",
    "evaluation": "test_study.py::test_the_panel_its_seeds_and_other_flags_reach_evaluate",
    "workers": "test_study.py::test_each_worker_gets_its_share_of_the_gpus_and_the_same_words",
    "processes_per_trial": "test_study.py::test_a_trial_runs_on_its_processes_under_its_accelerate_config",
    "accelerate_config": "test_study.py::test_a_trial_runs_on_its_processes_under_its_accelerate_config",
}


def all_tests():
    """ "test_file.py::test_name" of every test in this folder."""
    found = set()
    for path in Path(__file__).parent.glob("test_*.py"):
        functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        found |= {f"{path.name}::{function.name}" for function in functions if function.name.startswith("test_")}
    return found


@pytest.mark.parametrize(
    "script, table", [(train_sdxl_lora, TRAINER_FLAGS), (evaluate, EVALUATION_FLAGS), (hpo_sweep, SWEEP_FLAGS)]
)
def test_every_flag_has_a_test_of_its_effect(script, table):
    flags = {action.dest for action in script.make_parser()._actions} - {"help"}
    assert flags - table.keys() == set(), "no entry for these flags"
    assert table.keys() - flags == set(), "these flags are gone"
    assert set(table.values()) - all_tests() == set(), "there is no such test"
