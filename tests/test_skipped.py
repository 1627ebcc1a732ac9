"""Images that cannot be decoded in training: what replaces them, and how they are reported."""

import io
import json
from types import SimpleNamespace

import pytest
from PIL import Image, ImageOps
from shards import KEYS, encode, index_of, index_of_shard, load_index, noise_image, sample, write_shard

import sdxl_data
import train_sdxl_lora as trainer


@pytest.fixture
def partly_damaged(tmp_path):
    labels = {"bad": "mew", "mew 1": "mew", "mew 2": "mew", "only": "pichu", "other": "abra"}
    torn = encode(noise_image(3))[:200]  # its header is whole: decoding finds the damage, not the index
    bad = {"bad": {"png": torn}, "only": {"png": torn}}
    samples = [sample(key, labels=[label], **bad.get(key, {})) for key, label in labels.items()]
    index = index_of_shard(write_shard(tmp_path / "a.tar", samples))
    assert index.table.column("key").to_pylist() == list(labels)
    return index


def test_a_damaged_image_is_replaced_by_one_of_its_species_always_the_same(partly_damaged):
    mew = partly_damaged.label_names.index("mew")
    replacements = set()
    for seed in range(12):
        items = [
            sdxl_data.ImageDataset(partly_damaged, seed, 8, "center", False, "box")[0, mew, 2, 7] for _ in range(2)
        ]
        assert items[0]["keys"] == items[1]["keys"] and items[0]["keys"] in ("mew 1", "mew 2")
        assert items[0]["captions"] == f"a drawing of {items[0]['keys']}" and items[0]["species"] == "mew"
        assert items[0]["replaced"] and {entry["key"] for entry in items[0]["skipped"]} == {"bad"}
        assert "image" in items[0]["skipped"][0]["reason"] and items[0]["skipped"][0]["shard"].endswith("a.tar")
        replacements.add(items[0]["keys"])
    assert replacements == {"mew 1", "mew 2"}


def test_a_damaged_image_is_replaced_by_one_of_its_species_and_bucket(tmp_path):
    torn = encode(noise_image(3, 40, 20))[:400]
    samples = [sample("bad", png=torn), sample("tall", png=encode(noise_image(1, 20, 40)))]
    samples += [sample("wide", png=encode(noise_image(2, 40, 20))), sample("pichu", labels=["pichu"])]
    index = index_of_shard(write_shard(tmp_path / "a.tar", samples))
    index = sdxl_data.assign_buckets(index, 192)
    mew = index.label_names.index("mew")
    keys = {
        sdxl_data.ImageDataset(index, seed, 192, "bucket", False, "box")[0, mew, 0, 0]["keys"] for seed in range(12)
    }
    assert keys == {"wide"}


def test_exif_that_stands_behind_a_pngs_pixels_does_not_break_a_bucket(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    data = encode(noise_image(1, 40, 20), exif=exif)
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    late = data[:start] + data[end:-12] + data[start:end] + data[-12:]  # before IEND, where some programs write it
    assert ImageOps.exif_transpose(Image.open(io.BytesIO(late))).size == (20, 40)
    samples = [sample("late", png=late), sample("wide", png=encode(noise_image(2, 40, 20)))]
    index = index_of_shard(write_shard(tmp_path / "a.tar", samples))
    index = sdxl_data.assign_buckets(index, 192)
    item = sdxl_data.ImageDataset(index, 0, 192, "bucket", False, "box")[0, 0, 0, 0]
    assert item["keys"] == "wide" and "turns the image" in item["skipped"][0]["reason"]


def test_a_damaged_image_is_reported_once(partly_damaged):
    mew = partly_damaged.label_names.index("mew")
    for seed in range(12):
        item = sdxl_data.ImageDataset(partly_damaged, seed, 8, "center", False, "box")[0, mew, 2, 7]
        assert [entry["key"] for entry in item["skipped"]] == ["bad"]


def test_a_damaged_image_that_is_the_only_one_of_its_species_does_not_end_the_run(partly_damaged):
    pichu = partly_damaged.label_names.index("pichu")
    item = sdxl_data.ImageDataset(partly_damaged, 0, 8, "center", False, "box")[3, pichu, 2, 7]
    assert item["replaced"] and item["keys"] not in ("bad", "only")


def note_skipped(index, output_dir, entries, limit=0.05, progress=None):
    args = SimpleNamespace(output_dir=output_dir, max_bad_fraction=limit, train_shards=["a.tar"])
    trainer.note_skipped(args, index, progress or trainer.Progress(), entries)
    return [json.loads(line) for line in (output_dir / "skipped.jsonl").read_text().splitlines()]


def test_damage_met_in_training_is_written_once_and_counted_against_the_limit(tmp_path):
    index, progress = index_of([[]] * 20), trainer.Progress()
    entries = [{"shard": "a.tar", "key": key, "reason": f"cannot decode image: {key}"} for key in "pqr"]
    assert note_skipped(index, tmp_path, entries[:1], progress=progress) == entries[:1]
    assert note_skipped(index, tmp_path, entries[:1], progress=progress) == entries[:1]
    assert note_skipped(index, tmp_path, entries[:2], limit=0.1, progress=progress) == entries[:2]
    assert progress.skipped == {"cannot decode image": 4} and progress.damaged == entries[:2]
    with pytest.raises(sdxl_data.InputError, match="--max_bad_fraction"):
        note_skipped(index, tmp_path, entries[2:], limit=0.1, progress=progress)


def test_a_sample_skipped_twice_in_one_step_is_one_damaged_sample(tmp_path):
    entry = {"shard": "a.tar", "key": "p", "reason": "cannot decode image"}
    assert note_skipped(index_of([[]] * 20), tmp_path, [entry, entry]) == [entry]


def test_damage_is_counted_against_all_samples_also_with_max_train_samples(tmp_path):
    shard = write_shard(tmp_path / "a.tar", [sample(key) for key in KEYS[:9]] + [sample("bad", txt=b"")])
    index = load_index([shard], tmp_path, max_train_samples=3, max_bad_fraction=0.15)
    assert len(note_skipped(index, tmp_path, [], limit=0.15)) == 1
