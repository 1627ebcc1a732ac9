"""Folders of images as people have them: --train_data_dir."""

import json
import os
import shutil
import subprocess
import sys
import unicodedata

import numpy as np
import pyarrow as pa
import pytest
from harness import ROOT, SDXL, assert_ok, run_trainer
from PIL import Image
from shards import encode, index_of_folder, noise_image, write_shard

import sdxl_data


def put(folder, *names, size=(10, 8)):
    """Writes images, and beside each a .txt that names it unless the name ends in "!"."""
    for n, name in enumerate(names):
        path = folder / name.removesuffix("!")
        path.parent.mkdir(parents=True, exist_ok=True)
        noise_image(n, *size).save(path, "PNG")
        if not name.endswith("!"):
            path.with_suffix(".txt").write_text(f"a picture of {path.stem}")


def write_metadata(folder, *rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read(*folders, prompt=None, excluded=(), **fields):
    """({key: captions}, {key: reason}) of folders."""
    fields = sdxl_data.Fields(instance_prompt=prompt, **fields)
    rows, damage, _ = sdxl_data.index_folders(list(map(str, folders)), fields, excluded)
    pa.Table.from_pylist(rows, sdxl_data.INDEX_SCHEMA)  # all values have the index's types
    return {row["key"]: row["captions"] for row in rows}, {entry["key"]: entry["reason"] for entry in damage}


# ---- captions, in the order of precedence


def test_metadata_comes_before_a_caption_file_and_that_before_the_instance_prompt(tmp_path):
    put(tmp_path, "a.png", "b.png", "c.png!")
    write_metadata(tmp_path, {"file_name": "a.png", "text": "from metadata"})
    found, left_out = read(tmp_path, prompt="a sks dog")
    assert found == {"a.png": ["from metadata"], "b.png": ["a picture of b"], "c.png": ["a sks dog"]}
    assert left_out == {}


def test_an_image_without_caption_is_damage_and_one_that_metadata_leaves_out_is_named(tmp_path):
    put(tmp_path / "plain", "a.png", "b.png!")
    put(tmp_path / "described", "c.png!", "d.png!")
    write_metadata(tmp_path / "described", {"file_name": "c.png", "text": "c"})
    found, left_out = read(tmp_path)
    assert found == {"plain/a.png": ["a picture of a"], "described/c.png": ["c"]}
    assert left_out["plain/b.png"] == "no caption"
    assert left_out["described/d.png"].startswith("not in the metadata")
    entries = [{"shard": "x", "key": key, "reason": reason} for key, reason in left_out.items()]
    assert sdxl_data.count_damaged(entries) == 1  # what metadata leaves out is left out on purpose


def test_a_row_without_its_image_and_a_row_without_a_name_are_damage(tmp_path):
    put(tmp_path, "a.png!")
    write_metadata(
        tmp_path, {"file_name": "a.png", "text": "a"}, {"file_name": "gone.png", "text": "b"}, {"text": "c"}
    )
    found, left_out = read(tmp_path)
    assert found == {"a.png": ["a"]}
    assert list(left_out.values()) == ["no such image: gone.png", "no such image: None"]
    assert list(left_out) == [f"metadata.jsonl line {n}" for n in (2, 3)]


def write_csv(path, rows):
    lines = ["file_name,text,species_list,ae_aesthetic"]
    lines += [
        f'{row["file_name"]},"{row["text"]}","{", ".join(row["species_list"])}",{row["ae_aesthetic"]}' for row in rows
    ]
    path.with_suffix(".csv").write_text("\ufeff" + "\r\n".join(lines) + "\r\n", encoding="utf-8")


def write_parquet(path, rows):
    pa.parquet.write_table(pa.Table.from_pylist(rows), path.with_suffix(".parquet"))


def write_jsonl(path, rows):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows)
    path.with_suffix(".jsonl").write_text("\ufeff" + text, encoding="utf-8", newline="")


@pytest.mark.parametrize("write", [write_csv, write_parquet, write_jsonl])
def test_metadata_may_be_jsonl_csv_or_parquet_in_any_folder(tmp_path, write):
    put(tmp_path, "sub/a.png!", "sub/deeper/b.png!")
    row = {"file_name": "a.png", "text": "a mew, é", "species_list": ["Mew", "Pichu"], "ae_aesthetic": 55.5}
    write(tmp_path / "sub/metadata", [row, row | {"file_name": "deeper/b.png", "text": "b"}])
    rows, damage, _ = sdxl_data.index_folders([str(tmp_path)], sdxl_data.Fields())
    assert damage == []
    assert [(r["key"], r["captions"], r["labels"], r["score"]) for r in rows] == [
        ("sub/a.png", ["a mew, é"], ["mew", "pichu"], 55.5),
        ("sub/deeper/b.png", ["b"], ["mew", "pichu"], 55.5),
    ]


@pytest.mark.parametrize(
    "name, text", [("metadata.csv", "image,text\na.png,x\n"), ("metadata.jsonl", '{"text": "x"}\n')]
)
def test_metadata_without_file_name_is_an_error_that_says_what_was_found(tmp_path, name, text):
    put(tmp_path, "a.png")
    (tmp_path / name).write_text(text)
    with pytest.raises(sdxl_data.InputError, match=f"--train_data_dir: .*{name} has columns .*expected file_name"):
        read(tmp_path)


def test_damaged_metadata_files_are_errors_that_name_them(tmp_path):
    put(tmp_path, "a.png")
    for name, raw in (("metadata.parquet", b"PAR1 nothing"), ("metadata.jsonl", b'{"file_name": "a.png"}\n[1, 2]\n')):
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(sdxl_data.InputError, match=f"--train_data_dir: .*{name}( line 2: JSON is not an object)?"):
            read(tmp_path)
        (tmp_path / name).unlink()


@pytest.mark.parametrize("caption", [{"en": "a mew"}, 7, True, ["fine", 7]])
def test_a_caption_that_is_no_text_is_damage(tmp_path, caption):
    put(tmp_path, "a.png!", "b.png!")
    write_metadata(tmp_path, {"file_name": "a.png", "text": caption}, {"file_name": "b.png", "text": "b"})
    found, left_out = read(tmp_path)
    assert list(found) == ["b.png"] and left_out["a.png"].startswith("caption is no text")


@pytest.mark.parametrize(
    "raw, captions",
    [
        (b"\xef\xbb\xbfa mew\n", ["a mew"]),
        ("a mew, é".encode("utf-16"), ["a mew, é"]),
        (b"first\r\n\r\n second \r\n", ["first", "second"]),
        (b"one\rtwo\n", ["one", "two"]),
        (b"tab\tinside", ["tab\tinside"]),
        ("寿司\u3000と\u202f茶".encode(), ["寿司\u3000と\u202f茶"]),
    ],
)
def test_a_caption_file_holds_a_caption_per_line(tmp_path, raw, captions):
    put(tmp_path, "a.png!")
    (tmp_path / "a.txt").write_bytes(raw)
    assert read(tmp_path) == ({"a.png": captions}, {})


@pytest.mark.parametrize(
    "raw, reason", [(b"", "empty"), (b" \n\n", "empty"), (b"caf\xe9", "UTF-8"), (b"a\0b", "control")]
)
def test_a_damaged_caption_file_is_named(tmp_path, raw, reason):
    put(tmp_path, "a.png!", "b.png")
    (tmp_path / "a.txt").write_bytes(raw)
    found, left_out = read(tmp_path)
    assert list(found) == ["b.png"] and reason in left_out["a.png"]


def test_an_empty_caption_file_gives_way_to_the_instance_prompt(tmp_path):
    put(tmp_path, "a.png!")
    (tmp_path / "a.txt").write_bytes(b"\n")
    assert read(tmp_path, prompt="a dog") == ({"a.png": ["a dog"]}, {})


def test_a_caption_file_may_end_in_caption_and_in_upper_case(tmp_path):
    put(tmp_path, "a.png!", "b.JPG!", "v1.0 c.png!")
    (tmp_path / "a.caption").write_text("a")
    (tmp_path / "b.TXT").write_text("b")
    (tmp_path / "v1.0 c.txt").write_text("c")
    assert read(tmp_path)[0] == {"a.png": ["a"], "b.JPG": ["b"], "v1.0 c.png": ["c"]}


def test_several_rows_of_one_file_are_its_captions(tmp_path):
    put(tmp_path, "a.png!")
    rows = [{"file_name": "a.png", "text": text} for text in ("one", ["two", "", None, "three"], "one")]
    write_metadata(tmp_path, *rows)
    assert read(tmp_path)[0] == {"a.png": ["one", "two", "three"]}


# ---- names that other loaders trip over


NAMES = [
    *(
        "steam-train-01.png",
        "crash-test.png",
        "dev.png",
        "val.png",
        "test.png",
        "bus/1.png",
        "car/1.png",
        "train/1.png",
    ),
    *("[2024] cats (v1)/x.png", "a*b/c?.png", "100%/{1..3}.png", "Re::Zero.png", "~tilde.png", "sp ace/tab\there.png"),
    *("ピカチュウ\u3000雷.png", "narrow\u202fspace.png", "flabébé.png", "x.y.z.png", "#hash.png", "quote'\".png"),
    *("UPPER.PNG", "a.jpeg", "b.webp", "c.bmp", "d.jfif", "-dash.png", "new\nline.png", "s3:/x.png", "😀.png"),
]


def test_no_name_of_a_file_or_folder_is_lost(tmp_path):
    put(tmp_path, *NAMES)
    found, left_out = read(tmp_path)
    assert sorted(found) == sorted(NAMES) and left_out == {}
    index = index_of_folder(tmp_path)
    dataset = sdxl_data.ImageDataset(index, 0, 8, "center", False, "box")
    items = [dataset[i, -1, 0, i] for i in range(len(index))]
    assert {item["keys"] for item in items} == set(NAMES) and not any(item["replaced"] for item in items)


def test_a_folder_with_any_name_may_be_the_source(tmp_path):
    for name in ("[2024] cats (v1)", "a*b", "train", "with::colons"):
        put(tmp_path / name, "a.png")
        assert read(tmp_path / name)[0] == {"a.png": ["a picture of a"]}


def test_a_mac_writes_é_in_two_characters_and_metadata_in_one(tmp_path):
    split, joined = (unicodedata.normalize(form, "flabébé") for form in ("NFD", "NFC"))
    put(tmp_path, f"{split}.png!", f"2{split}.png!")
    write_metadata(tmp_path, {"file_name": f"{joined}.png", "text": "from metadata"})
    (tmp_path / f"2{joined}.txt").write_text("from a file")
    assert list(read(tmp_path)[0].values()) == [["from a file"], ["from metadata"]]


def test_windows_separators_in_metadata_are_understood(tmp_path):
    put(tmp_path, "sub/a.png!")
    write_metadata(tmp_path, {"file_name": "sub\\a.png", "text": "a"})
    assert read(tmp_path) == ({"sub/a.png": ["a"]}, {})


def test_linked_files_and_folders_are_read_and_circles_end(tmp_path):
    put(tmp_path / "store", "a.png", "deep/b.png")
    folder = tmp_path / "images"
    folder.mkdir()
    os.symlink(tmp_path / "store/a.png", folder / "linked.png")
    os.symlink(tmp_path / "store/a.txt", folder / "linked.txt")
    os.symlink(tmp_path / "store/deep", folder / "more")
    os.symlink(folder, tmp_path / "store/deep/back")
    os.symlink(tmp_path / "nowhere.png", folder / "broken.png")
    found, left_out = read(folder)
    assert found == {"linked.png": ["a picture of a"], "more/b.png": ["a picture of b"]}
    assert list(left_out) == ["broken.png"]


def test_what_systems_leave_behind_is_no_image_and_hidden_images_are_named(tmp_path):
    put(tmp_path, "a.png", ".hidden.png", ".thumbnails/b.png")
    for junk in ("._a.png", ".DS_Store", "Thumbs.db", "__MACOSX/._a.png", "@eaDir/a.png", ".ipynb_checkpoints/a.png"):
        (tmp_path / junk).parent.mkdir(exist_ok=True)
        (tmp_path / junk).write_bytes(b"\0\5\x16\7")
    found, left_out = read(tmp_path)
    assert list(found) == ["a.png"]
    assert set(left_out) == {".hidden.png", ".hidden.txt", ".thumbnails"}
    assert all(reason.startswith("hidden") for reason in left_out.values())


def test_images_that_pillow_cannot_read_are_named(tmp_path):
    put(tmp_path, "a.png")
    (tmp_path / "phone.heic").write_bytes(b"ftypheic")
    (tmp_path / "phone.txt").write_text("a phone")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "empty.txt").write_text("nothing")
    found, left_out = read(tmp_path)
    assert list(found) == ["a.png"]
    assert left_out["phone.heic"].startswith("cannot decode image") and left_out["empty.jpg"] == "image of zero bytes"


def test_a_name_that_is_not_utf8_is_named_too(tmp_path):
    put(tmp_path, "a.png")
    with open(os.fsencode(tmp_path) + b"/caf\xe9.png", "wb") as file:
        file.write(encode(noise_image(1)))
    assert read(tmp_path)[1] == {"caf\\xe9.png": "name is not UTF-8"}


def test_the_output_of_runs_inside_the_folder_is_left_out(tmp_path):
    put(tmp_path, "a.png", "out/samples/step-1.png", "older/samples/step-1.png")
    for name in ("config.yaml", "run.json"):
        (tmp_path / "older" / name).write_text("{}")
    found, left_out = read(tmp_path, excluded=[os.path.realpath(tmp_path / "out")])
    assert list(found) == ["a.png"] and list(left_out) == ["older"]


def test_several_folders_are_one_dataset_and_keep_their_names_apart(tmp_path):
    put(tmp_path / "one/train", "a.png")
    put(tmp_path / "two/train", "a.png", "b.png")
    found, left_out = read(tmp_path / "one/train", tmp_path / "two/train")
    assert sorted(found) == ["one/train/a.png", "two/train/a.png", "two/train/b.png"] and left_out == {}
    again, _ = read(tmp_path / "two", tmp_path / "two/train")  # a folder inside another is read once
    assert sorted(again) == ["train/a.png", "train/b.png"]


# ---- classes


def test_the_first_folder_is_the_class_and_a_number_before_it_its_weight(tmp_path):
    put(tmp_path, "10_Sks Cat/a.png", "10_Sks Cat/deep/b.png", "dog/c.png", "1_/d.png", "top.png", "7_tag/e.png!")
    write_metadata(tmp_path / "7_tag", {"file_name": "e.png", "text": "e", "species_list": ["Named"]})
    rows, _, _ = sdxl_data.index_folders([str(tmp_path)], sdxl_data.Fields())
    found = {row["key"]: (row.get("labels"), row["repeats"]) for row in rows}
    assert found == {
        "10_Sks Cat/a.png": (["sks cat"], 10),
        "10_Sks Cat/deep/b.png": (["sks cat"], 10),
        "dog/c.png": (["dog"], 1),
        "1_/d.png": (["1_"], 1),
        "top.png": ([], 1),
        "7_tag/e.png": (["named"], 1),
    }
    index = index_of_folder(tmp_path)
    assert index.count_repeats("random") == {"sks cat": 20, "dog": 1, "1_": 1, "named": 1}
    mix = sdxl_data.ClassMix(index, "random", index.count_repeats("random"), start=1, end=1)
    assert dict(zip(mix.names, mix.data))["sks cat"] == pytest.approx(20 / 23)


def test_without_numbers_the_images_count(tmp_path):
    put(tmp_path, "cat/a.png", "dog/b.png")
    assert index_of_folder(tmp_path).count_repeats("random") is None


KOHYA = ["10_cat/a.png", "10_cat/b.png", "1_dog/c.png", "1_dog/d.png", "1_dog/e.png"]


@pytest.fixture
def kohya_folder(tmp_path):
    """A folder as kohya's users have it, and the same images as a shard with the counts as CSV."""
    folder = tmp_path / "pictures"
    put(folder, *KOHYA, size=(80, 70))
    samples = []
    for name in KOHYA:
        metadata = {"image_id": name, "species_list": [name.split("/")[0].split("_")[1]]}
        parts = {"png": (folder / name).read_bytes(), "txt": (folder / name).with_suffix(".txt").read_bytes()}
        samples.append({"__key__": name[:-4], "json": json.dumps(metadata).encode(), **parts})
    (tmp_path / "counts.csv").write_text("class,count\ncat,20\ndog,3\n")
    return folder, write_shard(tmp_path / "same.tar", samples)


SMALL = [
    "--pretrained_model_name_or_path",
    SDXL,
    "--resolution",
    64,
    "--train_batch_size",
    2,
    "--seed",
    7,
    "--rank",
    2,
]
SMALL += ["--report_to", "none", "--mixed_precision", "no", "--dataloader_num_workers", 0, "--logging_steps", 1]


@pytest.mark.parametrize("processes, options", [(1, ["--random_flip"]), (2, ["--crop", "center", "--cache_latents"])])
def test_a_kohya_folder_trains_like_the_same_images_as_shards(kohya_folder, tmp_path, processes, options):
    folder, shard = kohya_folder
    argv = [*SMALL, "--max_train_steps", 4, "--class_mix", 0.5, 1, 4, *options]
    of_folder = assert_ok(run_trainer([*argv, "--train_data_dir", folder], tmp_path / "folder", processes))
    words = ["--train_shards", shard, "--class_csv", tmp_path / "counts.csv"]
    of_shards = assert_ok(run_trainer([*argv, *words], tmp_path / "shards", processes))
    assert of_folder.metrics() == of_shards.metrics()
    name = "pytorch_lora_weights.safetensors"
    assert (tmp_path / "folder" / name).read_bytes() == (tmp_path / "shards" / name).read_bytes()
    assert "10_NAME" in of_folder.output and "cat 87.0 %" in of_folder.output


def test_a_run_on_a_folder_resumes_exactly_with_its_output_inside(kohya_folder, tmp_path):
    folder, _ = kohya_folder
    argv = [*SMALL, "--train_data_dir", folder, "--max_train_steps", 4, "--checkpointing_steps", 2, "--random_flip"]
    whole = assert_ok(run_trainer(argv, tmp_path / "whole"))
    inside = folder / "out"
    assert_ok(run_trainer([*argv, "--validation_prompt", "x", "--num_validation_images", 1], inside))
    shutil.rmtree(inside / "checkpoint-4")
    (inside / "pytorch_lora_weights.safetensors").unlink()
    again = assert_ok(run_trainer([*argv, "--resume_from_checkpoint", "latest"], inside))
    assert "resumed from" in again.output
    name = "pytorch_lora_weights.safetensors"
    assert (inside / name).read_bytes() == (whole.output_dir / name).read_bytes()


def test_a_home_that_cannot_be_written_does_not_matter(kohya_folder, tmp_path):
    folder, _ = kohya_folder
    argv = [*SMALL, "--train_data_dir", folder, "--max_train_steps", 1, "--output_dir", tmp_path / "run"]
    command = [sys.executable, ROOT / "train_sdxl_lora.py", *argv]  # its own process: libraries read HOME on import
    own = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_", "MPL"))}
    own |= {"HOME": "/dev/null/home", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(list(map(str, command)), env=own, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path / "run/pytorch_lora_weights.safetensors").exists()


def test_a_run_without_captions_ends_with_three_ways_to_give_them(tmp_path):
    put(tmp_path / "pictures", "a.png!", "b.png!", "c.png")
    result = run_trainer([*SMALL, "--train_data_dir", tmp_path / "pictures"], tmp_path / "run")
    assert result.codes == [1]
    line = result.output.strip().splitlines()[-1]
    assert "--train_data_dir: 2 of 3 samples are damaged" in line
    assert all(way in line for way in ("metadata.jsonl", ".txt or .caption", "--instance_prompt"))
    listed = [json.loads(row)["key"] for row in (tmp_path / "run/skipped.jsonl").read_text().splitlines()]
    assert listed == ["a.png", "b.png"]
    assert_ok(run_trainer([*SMALL, "--train_data_dir", tmp_path / "pictures", "--instance_prompt", "a dog",
        "--max_train_steps", 1], tmp_path / "prompt"))  # fmt: skip


def test_an_output_dir_that_is_the_data_is_refused(tmp_path):
    put(tmp_path / "pictures", "a.png")
    result = run_trainer([*SMALL, "--train_data_dir", tmp_path / "pictures"], tmp_path / "pictures")
    assert result.codes == [2] and "--output_dir:" in result.output
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["a.png", "a.txt"]


def test_the_stamp_of_an_image_notices_that_it_changed(tmp_path):
    put(tmp_path, "a.png")
    index = index_of_folder(tmp_path)
    dataset = sdxl_data.ImageDataset(index, 0, 8, "center", False, "box")
    Image.fromarray(np.zeros((8, 10, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(OSError, match="changed during the run"):
        dataset[0, -1, 0, 0]


# ---- what a hostile tester brought


def test_images_are_read_whatever_their_extension_and_others_are_named(tmp_path):
    put(tmp_path, "b.tga", "c.jpe", "d", "e.apng", "f.jp2", "g.jpg_large")
    for name in ("photo.cr2", "drawing.svg"):
        (tmp_path / name).write_bytes(b"not for Pillow")
        (tmp_path / name).with_suffix(".txt").write_text("x")
    (tmp_path / "notes.md").write_text("no image")
    os.mkfifo(tmp_path / "pipe.png")
    found, left_out = read(tmp_path, prompt="x")
    assert sorted(found) == ["b.tga", "c.jpe", "d", "e.apng", "f.jp2", "g.jpg_large"]
    assert sorted(left_out) == ["drawing.svg", "photo.cr2", "pipe.png"]
    assert not any("0x" in reason for reason in left_out.values())  # the same text in every process


def test_a_long_number_before_a_folder_is_no_weight(tmp_path):
    put(tmp_path, "20240131123456_cats/a.png", "10_dogs/b.png")
    rows = index_of_folder(tmp_path).table.to_pylist()
    assert {(row["labels"][0], row["repeats"]) for row in rows} == {("20240131123456_cats", 1), ("dogs", 10)}


def test_only_folders_of_weight_0_are_classes_without_weights(tmp_path):
    put(tmp_path, "0_cat/a.png")
    assert index_of_folder(tmp_path).count_repeats("random") is None


def test_a_folder_whose_name_is_not_utf8_and_an_id_that_is_no_text_are_named(tmp_path):
    put(tmp_path, "a.png", "b.png!")
    os.mkdir(os.fsencode(tmp_path) + b"/\xff_dir")
    with open(os.fsencode(tmp_path) + b"/\xff_dir/c.png", "wb") as file:
        file.write(encode(noise_image(1)))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "b", "image_id": "\\ud800"}')
    found, left_out = read(tmp_path)
    assert list(found) == ["a.png"]
    assert left_out == {"b.png": "image_id is not text", "\\xff_dir": "name is not UTF-8"}


@pytest.mark.parametrize(
    "text", ["file_name,text\na.png,a red cat, on a mat\n", 'file_name,text\na.png,"a 5 cat\nb.png,b\n']
)
def test_a_comma_or_quote_out_of_place_in_metadata_is_an_error(tmp_path, text):
    put(tmp_path, "a.png!", "b.png!")
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(sdxl_data.InputError, match="--train_data_dir: .*metadata.csv"):
        read(tmp_path)


def test_metadata_whose_captions_have_another_name_says_so(tmp_path):
    put(tmp_path, "a.png!")
    write_metadata(tmp_path, {"file_name": "a.png", "caption": "x"})
    with pytest.raises(
        sdxl_data.InputError, match="--caption_column: .* has columns file_name, caption; found no text"
    ):
        read(tmp_path, prompt="x")
    assert read(tmp_path, caption="caption")[0] == {"a.png": ["x"]}


def test_metadata_may_hold_labels_only(tmp_path):
    put(tmp_path, "a.png")
    write_metadata(tmp_path, {"file_name": "a.png", "label": 3})
    index = index_of_folder(tmp_path, labels="label")
    assert index.row(0)["captions"] == ["a picture of a"] and index.row(0)["labels"] == ["3"]


def test_the_preview_of_an_earlier_dry_run_is_no_data(tmp_path):
    put(tmp_path, "a.png", "out1/preview/contact_sheet.png!")
    (tmp_path / "out1/preview/preview.json").write_text("{}")
    found, left_out = read(tmp_path, prompt="x")
    assert list(found) == ["a.png"] and list(left_out) == ["out1/preview"]


def test_both_forms_of_é_are_two_images(tmp_path):
    put(tmp_path, *[unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD")])
    assert len(read(tmp_path, prompt="x")[0]) == 2


def test_a_folder_without_images_says_so(tmp_path):
    (tmp_path / "pictures").mkdir()
    result = run_trainer([*SMALL, "--train_data_dir", tmp_path / "pictures"], tmp_path / "run")
    assert result.codes == [1] and "--train_data_dir: found no image in it" in result.output


def test_a_cache_dir_that_is_the_folder_hides_nothing(tmp_path):
    put(tmp_path, "a.png")
    assert list(read(tmp_path, excluded=[os.path.realpath(tmp_path)])[0]) == ["a.png"]
