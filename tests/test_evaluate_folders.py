"""evaluate.py on folders of training images, and the sweep on folders with --val_fraction."""

import csv
import json

import numpy as np
import pytest
import yaml
from harness import ROOT, SDXL, assert_ok, run_trainer
from PIL import Image
from shards import encode, noise_image, write_shard

import hpo_sweep
import sdxl_data

DEMO = ROOT / "demo"


@pytest.fixture
def words(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"id": "a", "prompt": "Aquafin, standing", "class": "Aquafin"}\n')
    return [
        *("--pretrained_model_name_or_path", SDXL, "--prompts", tmp_path / "prompts.jsonl", "--seeds", 0),
        *("--resolution", 64, "--num_inference_steps", 2, "--clip_model", f"local-dir:{DEMO / 'clip'}"),
        *("--aesthetic_head", "none"),
    ]


@pytest.fixture
def pictures(tmp_path):
    """Six pictures as a folder, of which one has no caption, and as a shard."""
    samples = []
    for n in range(6):
        data = encode(noise_image(n, 64, 64))
        (tmp_path / "pictures").mkdir(exist_ok=True)
        (tmp_path / f"pictures/{n}.png").write_bytes(data)
        if n:
            (tmp_path / f"pictures/{n}.txt").write_text("x")
        metadata = json.dumps({"image_id": f"{n}.png"}).encode()
        samples.append({"__key__": str(n), "png": data, "txt": b"x", "json": metadata})
    return tmp_path / "pictures", write_shard(tmp_path / "a.tar", samples)


def evaluate(words, folder, *more, processes=1):
    assert_ok(run_trainer([*words, *more], folder, processes, script="evaluate"))
    return json.loads((folder / "metrics.json").read_text())


def test_copies_of_a_folder_are_found_as_those_of_shards(words, pictures, tmp_path):
    folder, shard = pictures
    of_folder = evaluate(words, tmp_path / "folder", "--train_data_dir", folder)
    of_shard = evaluate(words, tmp_path / "shard", "--train_shards", shard, processes=2)
    assert of_folder["held_out"] == pytest.approx(of_shard["held_out"])
    assert of_folder["held_out"]["images"] == 6
    assert "by_class" in of_folder and (tmp_path / "folder/report.html").stat().st_size > 1000
    Image.fromarray(np.zeros((64, 64, 3), dtype=np.uint8)).save(folder / "0.png")
    changed = evaluate(words, tmp_path / "folder", "--train_data_dir", folder)
    assert changed["held_out"] != pytest.approx(of_folder["held_out"])


def test_images_that_the_trainer_held_out_are_no_training_images(words, pictures, tmp_path):
    folder, _ = pictures
    metrics = evaluate(words, tmp_path / "eval", "--train_data_dir", folder, "--val_fraction", 0.4)
    held = sdxl_data.is_held_out([f"{n}.png" for n in range(6)], 0.4)
    assert 0 < held.sum() < 6 and metrics["held_out"]["images"] == held.sum()
    assert metrics["held_out"]["copy_similarity"] < 0.99  # none of them is among the training images


@pytest.mark.parametrize(
    "more, found",
    [
        (["--train_data_dir", "nowhere"], "--train_data_dir: no folder nowhere"),
        (["--val_fraction", 0.1], "--val_fraction: found without --train_shards or --train_data_dir"),
        (["--train_data_dir", ".", "--val_fraction", 1.5], "--val_fraction: found 1.5"),
        (["--train_data_dir", ".", "--train_shards", "x.tar"], "x.tar"),
    ],
)
def test_wrong_flags_are_named(words, tmp_path, more, found):
    result = run_trainer([*words, *more], tmp_path / "out", script="evaluate")
    assert result.codes == [2] and found in result.output


def test_a_sweep_takes_folders_and_a_fraction_for_its_validation_loss(pictures, tmp_path):
    folder, _ = pictures
    own = ["--output_dir", tmp_path / "sweep", "--objective", "val_loss", "--n_trials", 1, "--trial_steps", 2]
    words = ["--pretrained_model_name_or_path", SDXL, "--train_data_dir", folder, "--resolution", 64]
    words += ["--instance_prompt", "x", "--mixed_precision", "no", "--train_batch_size", 2]
    sweep = hpo_sweep.parse_args([str(word) for word in [*own, "--", *words, "--val_fraction", 0.3]])
    assert sweep.prunes and sweep.trainer_flags["train_data_dir"] == [str(folder)]
    with pytest.raises(SystemExit):
        hpo_sweep.parse_args([str(word) for word in [*own, "--", *words]])


@pytest.mark.slow
def test_a_sweep_trains_on_a_folder_and_ranks_trials_by_what_it_held_out(pictures, tmp_path):
    folder, _ = pictures
    own = ["--objective", "val_loss", "--n_trials", 2, "--trial_steps", 2, "--startup_trials", 1]
    words = ["--pretrained_model_name_or_path", SDXL, "--train_data_dir", folder, "--resolution", 64]
    words += ["--instance_prompt", "x", "--mixed_precision", "no", "--train_batch_size", 2, "--val_fraction", 0.3]
    env = {"ACCELERATE_USE_CPU": "true"}
    run = run_trainer([*own, "--", *words], tmp_path / "sweep", script="hpo_sweep", env=env)
    assert_ok(run)
    best = yaml.safe_load((tmp_path / "sweep/best_params.yaml").read_text())
    assert best["train_data_dir"] == [str(folder)] and best["val_fraction"] == 0.3
    with open(tmp_path / "sweep/trials.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 and {row["state"] for row in rows} <= {"complete", "pruned"}
    assert min(float(row["val_loss"]) for row in rows if row["state"] == "complete") > 0


def test_a_search_space_may_use_the_older_names_of_flags(pictures, tmp_path):
    folder, _ = pictures
    (tmp_path / "space.yaml").write_text("species_choice: {choices: [first, random]}\n")
    own = ["--output_dir", tmp_path / "sweep", "--n_trials", 1, "--search_space", tmp_path / "space.yaml"]
    words = ["--pretrained_model_name_or_path", SDXL, "--train_data_dir", folder, "--resolution", 64]
    sweep = hpo_sweep.parse_args([str(word) for word in [*own, "--", *words]])
    assert [parameter.flag for parameter in sweep.space] == ["class_choice"]
