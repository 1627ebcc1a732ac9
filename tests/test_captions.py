"""Captions and tags, the trigger word, and what --val_fraction and --min_image_size leave out."""

import json
import shutil
from collections import Counter

import pytest
import safetensors
from harness import ALONE, SDXL, assert_ok, run_trainer
from shards import encode, index_of_folder, index_shard, load_index, noise_image, sample, write_shard
from test_folders import SMALL, put, write_metadata

import sdxl_data
import train_sdxl_lora as trainer
from sdxl_data import TagAugmentation

RED = "red, round, small, old, shiny, wet"


@pytest.fixture
def folder(tmp_path):
    """Eight images, each with two captions that are lists of tags."""
    folder = tmp_path / "pictures"
    put(folder, *[f"{n}.png" for n in range(8)], size=(80, 70))
    for n in range(8):
        (folder / f"{n}.txt").write_text(f"{n}, {RED}\nseen from afar, {n}\n")
    return folder


def captions_of(dataset, positions=range(200)):
    return [dataset[0, -1, 0, position]["captions"] for position in positions]


# ---- several captions


def test_which_caption_is_used_depends_on_seed_and_position_alone(folder):
    index = index_of_folder(folder)
    first, again, other = (sdxl_data.ImageDataset(index, seed, 8, "center", False, "box") for seed in (1, 1, 2))
    drawn = captions_of(first)
    assert drawn == captions_of(again) != captions_of(other)
    counts = Counter(drawn)
    assert counts.keys() == {f"0, {RED}", "seen from afar, 0"} and min(counts.values()) > 70


def test_shards_and_tables_have_several_captions_too(tmp_path):
    samples = [sample("a", txt=b"one\n\ntwo\n"), sample("b", txt=None, json=b'{"text": ["three", "", "four"]}')]
    rows, damage = index_shard(write_shard(tmp_path / "a.tar", samples))
    assert damage == [] and [row["captions"] for row in rows] == [["one", "two"], ["three", "four"]]


def test_rows_with_one_image_id_and_one_image_are_one_sample_and_with_two_images_damage(tmp_path):
    image, other = (encode(noise_image(n)) for n in (1, 2))
    samples = []
    for n, (data, text) in enumerate([(image, b"one"), (image, b"two"), (other, b"three")]):
        metadata = json.dumps({"image_id": "same", "species_list": ["mew" if n else "pichu"]}).encode()
        samples.append({"__key__": f"k{n}", "png": data, "txt": text, "json": metadata})
    index = load_index([write_shard(tmp_path / "a.tar", samples)], tmp_path, max_bad_fraction=0.5)
    assert len(index) == 1
    assert index.row(0)["captions"] == ["one", "two"] and index.row(0)["labels"] == ["pichu", "mew"]
    assert [(d["key"], d["reason"]) for d in index.damage] == [("k2", "duplicate image_id: same")]


def test_a_table_may_have_a_row_for_each_caption_of_an_image(tmp_path):
    import datasets

    images = [{"bytes": encode(noise_image(n)), "path": None} for n in (1, 1, 2)]
    features = {
        "image": datasets.Image(),
        "text": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["A", "b"]),
    }
    columns = {"image": images, "text": ["one", "two", "three"], "label": [0, 0, 1]}
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    fields = sdxl_data.Fields(labels="label")
    rows, damage = sdxl_data.index_table(table.cast_column("image", datasets.Image(decode=False)), "t", fields)
    assert damage == [] and [row["labels"] for row in rows] == [["a"], ["a"], ["b"]]
    table, damage = sdxl_data.merge_rows(sdxl_data.pa.Table.from_pylist(rows, sdxl_data.INDEX_SCHEMA), damage)
    assert table.column("captions").to_pylist() == [["one", "two"], ["three"]] and damage == []


@pytest.mark.parametrize("processes", [1, 2])
def test_the_cache_holds_every_caption(folder, tmp_path, processes):
    argv = [*SMALL, "--train_data_dir", folder, "--max_train_steps", 4, "--caption_dropout_rate", 0]
    plain = assert_ok(run_trainer(argv, tmp_path / "plain", processes))
    cached = assert_ok(run_trainer([*argv, "--cache_text_embeddings"], tmp_path / "cached", processes))
    for one, other in zip(plain.metrics(), cached.metrics()):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    single = [path.write_text(path.read_text().splitlines()[0]) for path in folder.glob("*.txt")]
    assert len(single) == 8
    first_only = assert_ok(run_trainer(argv, tmp_path / "first", processes))
    assert first_only.metrics()[0]["loss"] != pytest.approx(plain.metrics()[0]["loss"], rel=1e-4)


# ---- tags


def test_tags_are_shuffled_but_for_those_that_are_kept():
    tags = TagAugmentation(kept=2, shuffle=True)
    drawn = [tags.draw(RED, 1, position).split(", ") for position in range(300)]
    assert all(tags[:2] == ["red", "round"] and sorted(tags) == sorted(RED.split(", ")) for tags in drawn)
    assert drawn == [tags.draw(RED, 1, position).split(", ") for position in range(300)]
    firsts = Counter(tags[2] for tags in drawn)
    assert len(firsts) == 4 and min(firsts.values()) > 50


def test_tags_are_left_out_with_the_probability_of_the_flag():
    drawn = [TagAugmentation(kept=1, dropout=0.25).draw(RED, 3, position).split(", ") for position in range(2000)]
    assert all(tags[0] == "red" for tags in drawn)
    left = sum(len(tags) - 1 for tags in drawn) / (2000 * 5)
    assert left == pytest.approx(0.75, abs=0.02)
    assert TagAugmentation(dropout=1.0).draw(RED, 3, 0) == ""


@pytest.mark.parametrize(
    "separator, caption", [("|", "a |b|  c"), (" ", "a b  c"), (" , ", "a , b , c"), ("、", "a、b、c")]
)
def test_any_separator_splits_and_joins(separator, caption):
    drawn = {TagAugmentation(separator, shuffle=True).draw(caption, 1, position) for position in range(100)}
    assert len(drawn) == 6 and all(sorted(c for c in text if c in "abc") == ["a", "b", "c"] for text in drawn)


def test_captions_are_untouched_without_the_flags():
    assert TagAugmentation(kept=1).draw("a ,b,,  c", 1, 1) == "a ,b,,  c"


def drawn_captions(tmp_path, folder, *words):
    """Captions of the contact sheet's samples: what a run with these flags would train on."""
    argv = [*SMALL, "--train_data_dir", folder, "--output_dir", tmp_path / "out", *words]
    args = trainer.parse_args(list(map(str, argv)))
    dataset, _, _ = trainer.make_data(ALONE, args, 7)
    return [dataset[i, -1, 0, 10 * i + n]["captions"] for i in range(len(dataset.index)) for n in range(10)]


def test_the_flags_of_tags_reach_the_captions(folder, tmp_path):
    plain = drawn_captions(tmp_path, folder)
    shuffled = drawn_captions(tmp_path, folder, "--shuffle_tags")
    assert shuffled != plain and [sorted(a) for a in shuffled] == [sorted(a) for a in plain]
    kept = drawn_captions(tmp_path, folder, "--shuffle_tags", "--keep_tags", 1)
    assert [a.split(",")[0] for a in kept] == [a.split(",")[0] for a in plain] and kept != plain
    assert sum(map(len, drawn_captions(tmp_path, folder, "--tag_dropout", 0.5))) < 0.8 * sum(map(len, plain))
    assert drawn_captions(tmp_path, folder, "--shuffle_tags", "--tag_separator", "|") == plain


@pytest.mark.parametrize("words", [["--shuffle_tags"], ["--tag_dropout", "0.1"]])
def test_changing_tags_cannot_be_cached(folder, tmp_path, words):
    argv = [*SMALL, "--train_data_dir", folder, "--cache_text_embeddings", *words]
    result = run_trainer(argv, tmp_path / "run")
    assert result.codes == [2]
    assert f"--cache_text_embeddings: contradicts {words[0]}" in result.output


def test_a_run_that_shuffles_resumes_exactly(folder, tmp_path):
    argv = [*SMALL, "--train_data_dir", folder, "--max_train_steps", 4, "--checkpointing_steps", 2]
    argv += ["--shuffle_tags", "--keep_tags", 1, "--tag_dropout", 0.3, "--trigger_word", "sks", "--val_fraction", 0.3]
    whole = assert_ok(run_trainer(argv, tmp_path / "whole", processes=2))
    partly = tmp_path / "partly"
    shutil.copytree(tmp_path / "whole", partly)
    shutil.rmtree(partly / "checkpoint-4")
    again = assert_ok(run_trainer([*argv, "--resume_from_checkpoint", "latest"], partly, processes=2))
    assert "resumed from" in again.output and again.metrics() == whole.metrics()
    other = [word if word != 0.3 else 0.4 for word in argv]
    refused = run_trainer([*other, "--resume_from_checkpoint", "latest"], partly, processes=2)
    assert refused.codes == [1, 1] and "--tag_dropout: 0.3 in the checkpoint, 0.4 now" in refused.output


# ---- the trigger word


def test_the_trigger_word_comes_once_before_every_caption_and_is_kept_there(folder, tmp_path):
    (folder / "0.txt").write_text("sks, red\nsksy, red\n")
    for words in ([], ["--shuffle_tags"]):
        captions = drawn_captions(tmp_path, folder, "--trigger_word", "sks", *words)
        assert all(caption.startswith("sks, ") for caption in captions)
        assert {"sks, red", "sks, sksy, red"} <= set(captions)
    two = drawn_captions(tmp_path, folder, "--trigger_word", "sks, dog", "--shuffle_tags", "--keep_tags", 1)
    assert all(caption.startswith("sks, dog, ") for caption in two)


def test_the_trigger_word_reaches_captions_card_and_both_files(folder, tmp_path):
    argv = [*SMALL, "--train_data_dir", folder, "--max_train_steps", 1, "--trigger_word", "sks é"]
    run = assert_ok(run_trainer(argv, tmp_path / "run")).output_dir
    card = (run / "README.md").read_text()
    assert 'instance_prompt: "sks \\u00e9"' in card or "instance_prompt: sks é" in card
    assert "`sks é`" in card
    for name in ("pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors"):
        with safetensors.safe_open(run / name, "pt") as file:
            assert file.metadata()["modelspec.trigger_phrase"] == "sks é"


# ---- what is held out and left out


def test_a_fraction_is_held_out_and_validated_on(folder, tmp_path):
    argv = [*SMALL, "--train_data_dir", folder, "--max_train_steps", 2, "--val_fraction", 0.3, "--validation_steps", 1]
    one, two = (assert_ok(run_trainer(argv, tmp_path / str(n), n)) for n in (1, 2))
    losses = [[row["val_loss"] for row in run.metrics() if "val_loss" in row] for run in (one, two)]
    assert len(losses[0]) == len(losses[1]) == 2
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-2)


def test_an_image_is_on_one_side_for_good_whatever_else_is_there():
    def split(names, fraction):
        held = sdxl_data.is_held_out(names, fraction)
        return [{name for name, is_held in zip(names, held) if is_held == side} for side in (False, True)]

    names = [f"image {n}" for n in range(4000)]
    rest, held = split(names, 0.1)
    assert rest | held == set(names) and not rest & held and len(held) == pytest.approx(400, abs=60)
    _, fewer = split(names[:1000], 0.1)
    assert fewer == held & set(names[:1000])
    assert held < split(names, 0.2)[1]
    assert len(split(names[:2], 1e-9)[1]) == 1  # at least one


def test_held_out_images_are_never_trained_on(folder, tmp_path):
    argv = [*SMALL, "--train_data_dir", folder, "--output_dir", tmp_path / "out", "--val_fraction", 0.3]
    args = trainer.parse_args(list(map(str, argv)))
    dataset, _, held = trainer.make_data(ALONE, args, 7)
    ids = [set(part.index.table.column("image_id").to_pylist()) for part in (dataset, held)]
    assert len(ids[0]) + len(ids[1]) == 8 and not ids[0] & ids[1] and ids[1]


@pytest.mark.parametrize(
    "words, flag", [(["--val_fraction", "1.5"], "val_fraction"), (["--val_fraction", "0"], "val_fraction")]
)
def test_an_impossible_fraction_is_refused(folder, tmp_path, words, flag):
    result = run_trainer([*SMALL, "--train_data_dir", folder, *words], tmp_path / "run")
    assert result.codes == [2] and f"--{flag}: found" in result.output


def test_small_images_are_left_out_and_listed(folder, tmp_path):
    put(folder, "tiny.png", size=(300, 20))
    argv = [
        *SMALL,
        "--train_data_dir",
        folder,
        "--max_train_steps",
        1,
        "--min_image_size",
        64,
        "--max_bad_fraction",
        0,
    ]
    run = assert_ok(run_trainer(argv, tmp_path / "run")).output_dir
    rows = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
    assert [(row["key"], row["reason"]) for row in rows] == [("tiny.png", "too small: 300 x 20 px")]
    none = run_trainer([*SMALL, "--train_data_dir", folder, "--min_image_size", 512], tmp_path / "none")
    assert none.codes == [1] and "--min_image_size: no image of --train_data_dir has 512 px" in none.output
    assert len((tmp_path / "none/skipped.jsonl").read_text().splitlines()) == 9


def test_images_without_a_class_fade_and_the_log_says_so(folder, tmp_path):
    put(folder / "cat", "a.png", "b.png", size=(80, 70))
    result = assert_ok(run_trainer([*SMALL, "--train_data_dir", folder, "--dry_run"], tmp_path / "run"))
    assert "8 of 10 images have no class; they are used rarely, with probability 0.1" in result.output
    facts = json.loads((tmp_path / "run/preview/preview.json").read_text())
    assert facts["unlabelled"] == 8 and facts["classes"]["cat"]["images"] == 2


def test_a_flag_with_two_names_is_called_by_the_one_that_was_given(tmp_path):
    for name in ("class_mix", "species_mix"):
        argv = ["--pretrained_model_name_or_path", SDXL, "--train_shards", "x.tar", f"--{name}", 0, 1]
        result = run_trainer(argv, tmp_path / name)
        assert result.codes == [2] and f"error: --{name}: expected 3 arguments" in result.output


def test_metadata_and_instance_prompt_work_together(tmp_path):
    put(tmp_path, "a.png!", "b.png!")
    write_metadata(tmp_path, {"file_name": "a.png", "text": "a"})
    index = index_of_folder(tmp_path, instance_prompt="a dog")
    assert index.table.column("captions").to_pylist() == [["a"], ["a dog"]]
