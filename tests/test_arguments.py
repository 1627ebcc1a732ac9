import argparse
import json
import os
import re
import shutil

import pytest
import yaml
from harness import SDXL, run_trainer

from sdxl_data import expand_shards, read_species_csv
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
    "gradient_checkpointing": "none",  # False there: here it has kinds
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


def test_groups_are_the_rooms_in_order():
    titles = [
        group.title for group in make_parser()._action_groups if group.title not in ("positional arguments", "options")
    ]
    rooms = ["Models and LoRA", "Data", "Encoding", "Loss", "Optimizer", "Checkpoints", "Validation", "Run"]
    assert titles == rooms


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
    text = (
        "rank: 8\nlearning_rate: 1e-3\nspecies_mix: [0.1, 0.9, 50]\nlora_target_modules: [to_q]\nrandom_flip: true\n"
    )
    args = parse(config(folder, text))
    assert (args.rank, args.learning_rate, args.species_mix) == (8, 1e-3, [0.1, 0.9, 50])
    assert args.lora_target_modules == ["to_q"] and args.random_flip is True
    args = parse(config(folder, text) + "--rank 2 --species_mix 0 1 2 --lora_target_modules to_k to_v")
    assert (args.rank, args.species_mix, args.lora_target_modules) == (2, [0, 1, 2], ["to_k", "to_v"])
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
    assert parse("--train_data_dir images", without=["--train_shards"]).train_data_dir == "images"


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
    assert result.codes == [1] and "--report_to: aim is not installed; found all, none, " in result.output


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
    assert read_species_csv(path) == {"mr. mime": 7, "flabébé": 2.5}
    path.write_text("count,pokemon\n3,Mew\n")
    assert read_species_csv(path) == {"mew": 3}


def test_a_species_csv_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "species.csv"
    path.write_text("pokemon,count\nMew,3\n", encoding="utf-8-sig")
    assert read_species_csv(path) == {"mew": 3}


def test_prompts_come_from_the_flag_then_from_the_file(parse, folder):
    (folder / "p.txt").write_text(" a mew \n\na pichu\n")
    (folder / "p.jsonl").write_text(json.dumps({"prompt": "a mew", "seed": 1}) + "\n\n")
    assert read_prompts(parse("--validation_prompts p.txt --validation_prompt first")) == ["first", "a mew", "a pichu"]
    assert read_prompts(parse("--validation_prompts p.jsonl")) == ["a mew"]
    assert read_prompts(parse("")) == []
