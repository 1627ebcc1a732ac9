import contextlib
import io
import json
import os
import struct
import tarfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
import webdataset as wds
from harness import ALONE
from PIL import Image, ImageOps

import train_sdxl_lora as trainer


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise_image(seed, width=10, height=8):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def sample(key, labels=("mew",), **changes):
    """Bytes of one whole sample by extension; `changes` replace parts, None takes one away."""
    metadata = json.dumps({"image_id": key, "species_list": list(labels)}).encode()
    parts = {"png": encode(noise_image(len(key))), "txt": f"a drawing of {key}".encode(), "json": metadata} | changes
    return {"__key__": key} | {name: data for name, data in parts.items() if data is not None}


def write_shard(path, samples):
    with wds.TarWriter(str(path), encoder=False) as tar:
        for each in samples:
            tar.write(each)
    return str(path)


def index_of(labels, ids=None):
    """An Index of rows with these labels and nothing to read."""
    ids = ids or [f"image {i}" for i in range(len(labels))]
    rows = [{"key": i, "image_id": i, "caption": i, "labels": list(row)} for i, row in zip(ids, labels)]
    return trainer.make_index(pa.Table.from_pylist(rows, trainer.INDEX_SCHEMA), [])


def index_shard(path, species_key="species_list"):
    return trainer.index_shard(trainer.Shard(str(path), None), species_key)


def open_image(data):
    return trainer.open_image(data)[0]


def index_of_shard(path):
    rows, damage = index_shard(path)
    return trainer.make_index(pa.Table.from_pylist(rows, trainer.INDEX_SCHEMA), damage)


# ---- random numbers


def test_streams_never_change_silently():
    assert int(trainer.hash64(1, 2, 3)) == 5246500226706903259
    assert trainer.hash64(0, 7, np.array([1, 2])).tolist() == [1473136314426907213, 10621916401575875798]
    assert float(trainer.uniform(1, 2, 3)) == 0.2844133471870658
    assert trainer.torch_seed(7, 1, 5) == 2311715695230501050
    assert trainer.hash_text("a") == 3405396810240292928
    purposes = "ORDER ACCEPT LABEL CROP FLIP REPLACE SUBSET SAMPLE DROPOUT_MASK".split()
    assert [getattr(trainer, name) for name in purposes] == list(range(9))


def test_uniform_is_uniform_and_its_streams_are_independent():
    n = 100_000
    streams = [trainer.uniform(purpose, seed, np.arange(n)) for purpose in (0, 1) for seed in (0, 1)]
    for u in streams:
        assert u.min() >= 0 and u.max() < 1
        assert abs(u.mean() - 0.5) < 5 / np.sqrt(12 * n)
        counts = np.bincount((u * 100).astype(int), minlength=100)
        assert ((counts - n / 100) ** 2 / (n / 100)).sum() < 99 + 5 * np.sqrt(2 * 99)  # chi-square, 99 degrees
        assert abs(np.corrcoef(u[1:], u[:-1])[0, 1]) < 5 / np.sqrt(n)
    correlations = np.corrcoef(streams)[np.triu_indices(len(streams), 1)]
    assert np.abs(correlations).max() < 5 / np.sqrt(n)


# ---- shards and their damage

KEYS = [f"s{i}" for i in range(10)]


@pytest.fixture
def shard(tmp_path):
    return Path(write_shard(tmp_path / "a.tar", [sample(key) for key in KEYS]))


def members(path):
    with tarfile.open(path) as tar:
        return {member.name: member for member in tar.getmembers()}


def overwrite(path, at):
    data = bytearray(path.read_bytes())
    data[at : at + 512] = np.random.default_rng(0).bytes(512)
    path.write_bytes(data)


def survivors(path):
    rows, damage = index_shard(path)
    assert all(entry["shard"] == str(path) and entry["reason"] for entry in damage)
    return [row["key"] for row in rows], damage


def test_a_whole_shard_is_indexed_without_damage(shard):
    rows, damage = index_shard(shard)
    assert damage == []
    assert [row["key"] for row in rows] == KEYS
    data = shard.read_bytes()
    for row in rows:
        assert data[row["offset"] : row["offset"] + row["size"]] == sample(row["key"])["png"]
        assert row["caption"] == f"a drawing of {row['key']}"


def test_a_shard_cut_inside_an_image_keeps_the_samples_before(shard):
    at = members(shard)["s5.png"].offset_data + 20
    shard.write_bytes(shard.read_bytes()[:at])
    keys, damage = survivors(shard)
    assert keys == KEYS[:5]
    assert any("s5.png" in entry["reason"] for entry in damage)


@pytest.mark.parametrize("inside", [0, 100])
def test_a_shard_cut_at_or_inside_a_header_keeps_the_samples_before_and_is_reported(shard, inside):
    at = members(shard)["s5.json"].offset + inside
    shard.write_bytes(shard.read_bytes()[:at])
    keys, damage = survivors(shard)
    assert keys == KEYS[:5]
    assert damage


def test_bad_bytes_over_a_header_cost_one_sample(shard):
    overwrite(shard, members(shard)["s5.png"].offset_data - 512)
    keys, damage = survivors(shard)
    assert keys == KEYS[:5] + KEYS[6:]
    assert "s5" in {entry["key"] for entry in damage}


def test_bad_bytes_over_an_extended_header_are_reported(shard):
    overwrite(shard, members(shard)["s5.png"].offset)  # webdataset writes one before each member
    keys, damage = survivors(shard)
    assert set(KEYS) - set(keys) <= {"s5"}
    assert damage


def test_black_pixels_after_a_bad_header_do_not_end_the_shard(tmp_path):
    black = encode(Image.new("RGB", (40, 40)), "BMP")
    shard = Path(write_shard(tmp_path / "a.tar", [sample(key, png=None, bmp=black) for key in KEYS]))
    overwrite(shard, members(shard)["s5.bmp"].offset_data - 512)
    keys, damage = survivors(shard)
    assert damage
    assert keys == KEYS[:5] + KEYS[6:]


def test_a_missing_end_of_archive_mark_is_reported(shard):
    last = members(shard)["s9.txt"]
    shard.write_bytes(shard.read_bytes()[: last.offset_data + 512])
    keys, damage = survivors(shard)
    assert keys == KEYS
    assert len(damage) == 1


def test_two_zero_blocks_in_the_middle_are_reported(shard):
    data, at = shard.read_bytes(), members(shard)["s5.json"].offset
    shard.write_bytes(data[:at] + bytes(1024) + data[at:])
    keys, damage = survivors(shard)
    assert keys[:5] == KEYS[:5]
    assert len(keys) == 10 or damage


def test_an_empty_file_is_a_damaged_shard(tmp_path):
    (tmp_path / "a.tar").touch()
    keys, damage = survivors(tmp_path / "a.tar")
    assert keys == [] and damage


@pytest.mark.parametrize(
    "keys", [["é1", "è1"], ["k" * 130 + "1", "k" * 130 + "2"], ["folder/" + "k" * 90, "folder2/" + "k" * 90]]
)
def test_long_and_foreign_names_are_kept_apart(tmp_path, keys):
    shard = write_shard(
        tmp_path / "a.tar", [sample(keys[0]), sample(keys[1], png=None, jpg=encode(noise_image(1), "JPEG"))]
    )
    rows, damage = index_shard(shard)
    assert [(row["key"], row["caption"]) for row in rows] == [(key, f"a drawing of {key}") for key in keys]
    assert damage == []


def test_the_long_names_of_gnu_tar_are_read(tmp_path):
    key = "k" * 150
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for extension, data in list(sample(key).items())[1:]:
            member = tarfile.TarInfo(f"{key}.{extension}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    assert survivors(tmp_path / "a.tar") == ([key], [])


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"txt": None}, "no caption"),
        ({"txt": b" \n"}, "empty caption"),
        ({"txt": b"caf\xe9"}, "UTF-8"),
        ({"json": b'{"image_id": '}, "bad JSON"),
        ({"json": b"\xff\xff"}, "bad JSON"),
        ({"json": b'["mew"]'}, "not an object"),
        ({"png": b""}, "zero bytes"),
        ({"png": None}, "no image"),
        ({"png": None, "gif": b"GIF89a"}, "no image"),
    ],
)
def test_a_damaged_sample_is_named_with_its_reason_and_left_out(tmp_path, changes, reason):
    shard = write_shard(tmp_path / "a.tar", [sample("good"), sample("bad", **changes), sample("fine")])
    keys, damage = survivors(shard)
    assert keys == ["good", "fine"]
    assert [entry["key"] for entry in damage] == ["bad"]
    assert reason in damage[0]["reason"]


@pytest.mark.parametrize(
    "metadata",
    [
        '{"width": 1e999, "height": NaN, "ae_aesthetic": "high"}',
        '{"width": 512.5}',
        '{"species_list": 5}',
        '{"species_list": true}',
        '{"width": 1099511627776}',
        '{"width": 1' + "0" * 400 + "}",
        '{"image_id": "\\ud800"}',
    ],
)
def test_strange_metadata_does_not_end_the_indexing(tmp_path, metadata):
    shard = write_shard(tmp_path / "a.tar", [sample("good"), sample("strange", json=metadata.encode())])
    table = trainer.cached_index_shard(shard, tmp_path, "species_list")
    assert table.column("key").to_pylist()[0] == "good"


@pytest.mark.parametrize(
    "given, labels",
    [
        (["Mew", "PICHU"], ["mew", "pichu"]),
        ("Mew, Pichu", ["mew", "pichu"]),
        (" Mew ,, Mew,MEW", ["mew"]),
        (["STRAẞE"], ["strasse"]),
        ([], []),
        ("", []),
        (None, []),
        ([None], []),
    ],
)
def test_labels_are_a_list_or_a_string_casefolded(tmp_path, given, labels):
    metadata = json.dumps({"species_list": ["wrong"], "kind": given}).encode()
    rows, _ = index_shard(write_shard(tmp_path / "a.tar", [sample("a", json=metadata)]), "kind")
    assert rows[0]["labels"] == labels


def test_a_sample_without_json_or_labels_is_unlabelled_not_damaged(tmp_path):
    shard = write_shard(tmp_path / "a.tar", [sample("a", json=None), sample("b", json=b"{}")])
    rows, damage = index_shard(shard)
    assert damage == []
    assert [(row["image_id"], row["labels"]) for row in rows] == [("a.tar/a", []), ("a.tar/b", [])]


def test_the_index_is_read_from_its_cache_until_the_shard_changes(shard, tmp_path, monkeypatch):
    calls = []
    original = trainer.index_shard
    monkeypatch.setattr(trainer, "index_shard", lambda *a: calls.append(a) or original(*a))
    first = trainer.cached_index_shard(str(shard), tmp_path, "species_list")
    assert trainer.cached_index_shard(str(shard), tmp_path, "species_list").equals(first, check_metadata=True)
    assert len(calls) == 1
    trainer.cached_index_shard(str(shard), tmp_path, "other_key")
    assert len(calls) == 2
    stat = os.stat(shard)
    write_shard(shard, [sample(key.replace("s", "t")) for key in KEYS])
    assert os.stat(shard).st_size == stat.st_size
    changed = trainer.cached_index_shard(str(shard), tmp_path, "species_list")
    assert changed.column("key").to_pylist()[0] == "t0"


def load_index(shards, tmp_path, **flags):
    flags = {"max_bad_fraction": 0.05, "max_train_samples": None, "cache_dir": None, "output_dir": tmp_path} | flags
    args = SimpleNamespace(
        train_shards=[str(s) for s in shards], species_key="species_list", aesthetic_key="ae_aesthetic", **flags
    )
    return trainer.load_index(ALONE, args, "--train_shards", seed=1)


def test_too_many_damaged_samples_end_the_run_and_name_the_flag(tmp_path):
    samples = [sample(key) for key in KEYS[:8]] + [sample(key, txt=b"") for key in KEYS[8:]]
    shard = write_shard(tmp_path / "a.tar", samples)
    assert len(load_index([shard], tmp_path, max_bad_fraction=0.2)) == 8
    with pytest.raises(trainer.InputError, match="2 of 10 .*--max_bad_fraction 0.1"):
        load_index([shard], tmp_path, max_bad_fraction=0.1)


def test_a_sample_with_two_faults_is_one_damaged_sample(shard, tmp_path):
    at = members(shard)["s9.png"].offset_data + 20
    shard.write_bytes(shard.read_bytes()[:at])
    assert len(load_index([shard], tmp_path, max_bad_fraction=0.1)) == 9


def test_nothing_usable_is_an_error_that_names_the_flag(tmp_path):
    shard = write_shard(tmp_path / "a.tar", [sample("a", txt=b"")])
    with pytest.raises(trainer.InputError, match="--train_shards: no usable sample"):
        load_index([shard], tmp_path, max_bad_fraction=1.0)


def test_max_train_samples_takes_the_same_samples_whatever_the_shards(tmp_path):
    shards = [write_shard(tmp_path / f"{n}.tar", [sample(key) for key in KEYS[5 * n : 5 * n + 5]]) for n in (0, 1)]
    chosen = [
        load_index(order, tmp_path, max_train_samples=4).table.column("key").to_pylist()
        for order in (shards, shards[::-1])
    ]
    assert len(chosen[0]) == 4
    assert set(chosen[0]) == set(chosen[1])


def test_the_fingerprint_depends_on_the_samples_and_not_on_their_order():
    labels, ids = [["a"], ["b"], []], ["1", "2", "3"]
    fingerprint = index_of(labels, ids).fingerprint()
    assert index_of(labels[::-1], ids[::-1]).fingerprint() == fingerprint
    assert index_of([["a"], ["a"], []], ids).fingerprint() != fingerprint
    assert index_of(labels, ["1", "2", "4"]).fingerprint() != fingerprint
    assert index_of(labels[:2], ids[:2]).fingerprint() != fingerprint


# ---- the image folder


@pytest.fixture
def image_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()

    def make(*rows):
        folder = tmp_path / "images"
        (folder / "more").mkdir(parents=True)
        for row in rows:
            noise_image(1).save(folder / row["file_name"])
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags = {"train_data_dir": str(folder), "dataset_name": None, "cache_dir": None, "species_key": "species_list"}
        args = SimpleNamespace(**flags, aesthetic_key="ae_aesthetic", image_column="image", caption_column="text")
        return trainer.index_dataset(trainer.load_dataset(args), args)

    return make


def test_an_image_folder_is_indexed_like_a_shard(image_folder, tmp_path):
    first = {"file_name": "a.png", "text": "a mew", "species_list": ["Mew"], "ae_aesthetic": 55.0}
    second = {"file_name": "more/b.png", "text": "two", "species_list": ["Mew", "Pichu"], "ae_aesthetic": None}
    rows, damage = image_folder(first, second)
    assert damage == []
    found = [(r["key"], r["caption"], r["labels"], r["score"]) for r in rows]
    assert found == [("a.png", "a mew", ["mew"], 55), ("more/b.png", "two", ["mew", "pichu"], None)]
    index = trainer.make_index(pa.Table.from_pylist(rows, trainer.INDEX_SCHEMA), damage)
    item = trainer.ImageDataset(index, 0, 8, "center", False, "lanczos")[1, 0, 0, 0]
    assert item["keys"] == "more/b.png" and item["original_sizes"] == (8, 10)


def test_of_a_list_of_captions_the_first_is_taken(image_folder):
    rows, _ = image_folder({"file_name": "a.png", "text": ["first", "second"]})
    assert rows[0]["caption"] == "first"


def test_a_missing_column_is_an_error_that_names_the_flag(image_folder):
    with pytest.raises(trainer.InputError, match="--caption_column.*caption"):
        image_folder({"file_name": "a.png", "caption": "a mew"})


@pytest.mark.parametrize("caption", [None, "", "  ", []])
def test_an_image_of_the_folder_without_caption_is_damage(image_folder, caption):
    good = ["good"] if isinstance(caption, list) else "good"
    rows, damage = image_folder({"file_name": "a.png", "text": good}, {"file_name": "b.png", "text": caption})
    assert [row["key"] for row in rows] == ["a.png"]
    assert [entry["key"] for entry in damage] == ["b.png"]


# ---- which samples: species and plan

SPECIES = 12


def long_tailed_labels():
    """One or two labels a row, the commonest species 40 times the rarest."""
    counts = [round(400 * 0.715**s) for s in range(SPECIES)]
    first = [s for s, count in enumerate(counts) for _ in range(count)]
    return [[f"species {s}"] + [f"species {(s * 5 + 3) % SPECIES}"] * (i % 4 == 0) for i, s in enumerate(first)]


def distribution(labels, choice):
    """How often each label would be drawn if every row arrived once."""
    shares = Counter()
    for row in labels:
        for label in row[:1] if choice == "first" else row:
            shares[label] += 1 if choice == "first" else 1 / len(row)
    return {label: share / sum(shares.values()) for label, share in shares.items()}


def mixture(shares, m):
    return {label: (1 - m) / len(shares) + m * share for label, share in shares.items()}


def deliver(plan, steps):
    """Counter of the names of the labels delivered; every one must belong to its row."""
    index, counts = plan.index, Counter()
    for _ in range(steps):
        for row, label in zip(*plan.next_batch()):
            own = index.label_codes[index.label_starts[row] : index.label_starts[row + 1]].tolist()
            assert label in (own[:1] if plan.choice == "first" else own) or (label == -1 and not own)
            counts[index.label_names[label] if label >= 0 else None] += 1
    return counts


def is_distributed_as(counts, expected):
    """Every count within 4.5 binomial standard deviations."""
    n = sum(counts.values())
    assert set(counts) <= set(expected)
    return all(abs(counts[name] - n * p) < 4.5 * np.sqrt(n * p * (1 - p)) for name, p in expected.items())


@pytest.mark.parametrize("choice", ["first", "random"])
@pytest.mark.parametrize("m", [0.2, 0.6, 0.95])
def test_the_delivered_species_follow_the_target(choice, m):
    labels = long_tailed_labels()
    index = index_of(labels)
    mix = trainer.SpeciesMix(index, choice, start=m, end=m)
    counts = deliver(trainer.SamplePlan(index, mix, choice, seed=5, global_batch=50), 300)
    shares = distribution(labels, choice)
    assert is_distributed_as(counts, mixture(shares, m))
    assert not is_distributed_as(counts, mixture(shares, m - 0.1))


def test_the_two_choices_of_a_label_differ_on_rows_with_two():
    labels = long_tailed_labels()
    index = index_of(labels)
    mix = trainer.SpeciesMix(index, "random", start=0.95, end=0.95)
    counts = deliver(trainer.SamplePlan(index, mix, "random", seed=5, global_batch=50), 300)
    assert not is_distributed_as(counts, mixture(distribution(labels, "first"), 0.95))


def test_the_csv_is_delivered_even_when_the_data_differ():
    labels = long_tailed_labels()
    index = index_of(labels)
    csv = {f"species {s}": 1.0 + s for s in range(SPECIES)}  # the rarest is to be the commonest
    mix = trainer.SpeciesMix(index, "random", csv | {"absent": 50.0}, start=0.8, end=0.8)
    counts = deliver(trainer.SamplePlan(index, mix, "random", seed=5, global_batch=50), 200)
    shares = {name: count / sum(csv.values()) for name, count in csv.items()}
    assert is_distributed_as(counts, mixture(shares, 0.8))
    assert not is_distributed_as(counts, mixture(distribution(labels, "random"), 0.8))
    assert mix.absent == ["absent"]


def test_a_csv_without_any_of_the_species_is_an_error_that_names_the_flag():
    with pytest.raises(trainer.InputError, match="--species_csv"):
        trainer.SpeciesMix(index_of([["mew"], ["pichu"]]), "random", {"nidoran♀": 3.0})


def test_the_mixture_moves_with_the_step_in_which_a_sample_is_used():
    labels, steps = long_tailed_labels(), 300
    index = index_of(labels)
    mix = trainer.SpeciesMix(index, "random", start=0.0, end=1.0, steps=steps)
    plan = trainer.SamplePlan(index, mix, "random", seed=5, global_batch=50)
    thirds = [deliver(plan, steps // 3) for _ in range(3)]
    shares = distribution(labels, "random")
    for i, counts in enumerate(thirds):  # a linear m has its mean in the middle of the third
        assert is_distributed_as(counts, mixture(shares, (i + 0.5) / 3))
        assert not is_distributed_as(counts, mixture(shares, i / 3))


def test_the_mixture_starts_and_ends_as_told():
    index = index_of([["a"], ["b"]])
    linear = trainer.SpeciesMix(index, "random", start=0.2, end=0.95, steps=6000)
    cosine = trainer.SpeciesMix(index, "random", start=0.2, end=0.95, steps=6000, schedule="cosine")
    steps = (0, 1500, 3000, 6000, 9000)
    assert [linear.weight_of_data(s) for s in steps] == pytest.approx([0.2, 0.3875, 0.575, 0.95, 0.95])
    assert [cosine.weight_of_data(s) for s in steps] == pytest.approx([0.2, 0.309835, 0.575, 0.95, 0.95], abs=1e-6)
    assert trainer.SpeciesMix(index, "random", start=0.2, end=0.95, steps=0).weight_of_data(0) == 0.95


@pytest.mark.parametrize("choice", ["first", "random"])
def test_acceptance_is_a_probability_and_as_high_as_can_be(choice):
    mix = trainer.SpeciesMix(index_of(long_tailed_labels()), choice, start=0.0, end=1.0, steps=100)
    for step in (0, 30, 100):
        acceptance = mix.acceptance(step)
        assert acceptance.shape == (SPECIES + 1,)
        assert acceptance.min() >= 0 and acceptance.max() == 1
    assert mix.acceptance(100)[:-1] == pytest.approx(np.ones(SPECIES))


def test_a_label_that_never_comes_first_is_no_target_of_the_first_choice():
    index = index_of([["a", "c"], ["b", "c"]])
    mix = trainer.SpeciesMix(index, "first", start=0.2, end=0.2)
    assert mix.target(0) == pytest.approx([0.5, 0.5, 0.0])
    assert trainer.SpeciesMix(index, "random", start=0.0, end=0.0).target(0) == pytest.approx([1 / 3] * 3)


def test_unlabelled_images_are_taken_at_the_constant_rate():
    labels = [["a"]] * 300 + [[]] * 300
    index = index_of(labels)
    plan = trainer.SamplePlan(index, trainer.SpeciesMix(index, "random"), "random", seed=1, global_batch=33)
    counts = deliver(plan, 300)
    arrived = counts["a"]  # one species only: every labelled image is taken, so as many unlabelled ones arrived
    expected = trainer.UNLABELLED_ACCEPTANCE * arrived
    assert abs(counts[None] - expected) < 5 * np.sqrt(expected)


def test_without_labels_each_image_comes_once_per_pass_in_a_new_order():
    index = index_of([[]] * 37)
    plan = trainer.SamplePlan(index, trainer.SpeciesMix(index, "random"), "random", seed=3, global_batch=5)
    rows = [int(row) for _ in range(15) for row in plan.next_batch()[0]]
    first, second = rows[:37], rows[37:74]
    assert sorted(first) == sorted(second) == list(range(37))
    assert first != second and first != sorted(first)


def test_a_plan_depends_on_the_seed_and_not_on_the_order_of_the_shards():
    ids, labels = [f"image {i}" for i in range(200)], [["ab"[i % 2]] for i in range(200)]

    def delivered(seed, reverse=False):
        step = -1 if reverse else 1
        index = index_of(labels[::step], ids[::step])
        plan = trainer.SamplePlan(index, trainer.SpeciesMix(index, "random"), "random", seed, global_batch=8)
        return [index.row(row)["image_id"] for _ in range(40) for row in plan.next_batch()[0]]

    assert delivered(1) == delivered(1, reverse=True)
    assert delivered(1) != delivered(2)


def micro_batches(index, batch_size=4, rank=0, world=1, accumulation=1, last_step=30, **position):
    mix = trainer.SpeciesMix(index, "random", start=0.0, end=1.0, steps=20)
    plan = trainer.SamplePlan(index, mix, "random", 9, batch_size * accumulation * world, **position)
    return trainer.MicroBatches(plan, last_step, batch_size, rank, world)


def test_a_plan_restarted_from_its_state_continues_identically():
    index = index_of(long_tailed_labels()[::10])
    whole = micro_batches(index)
    batches = list(whole)
    assert whole.states[30][0][0] > 2
    for step in (1, 7, 19, 29):
        again = micro_batches(index, step=step, cursors=whole.states[step])
        assert list(again) == batches[step:]


@pytest.mark.parametrize("batch_size, world, accumulation", [(4, 2, 1), (2, 2, 2), (1, 4, 2), (2, 1, 4)])
def test_at_equal_global_batch_every_layout_sees_the_same_samples(batch_size, world, accumulation):
    index = index_of(long_tailed_labels()[::10])
    alone = list(micro_batches(index, batch_size=8))
    ranks = [list(micro_batches(index, batch_size, rank, world, accumulation)) for rank in range(world)]
    assert [len(batches) for batches in ranks] == [30 * accumulation] * world
    assert all(len(batch) == batch_size for batches in ranks for batch in batches)
    for step, whole in enumerate(alone):
        parts = [r for own in ranks for batch in own[step * accumulation : (step + 1) * accumulation] for r in batch]
        assert sorted(parts) == sorted(whole)
        assert {request[2] for request in parts} == {step}
    positions = [request[3] for batch in alone for request in batch]
    assert positions == list(range(240))


# ---- decoding


def test_alpha_is_composited_on_white():
    half = Image.new("RGBA", (4, 4), (200, 0, 0, 128))
    assert open_image(encode(half)).getpixel((0, 0)) == (227, 127, 127)
    assert open_image(encode(Image.new("LA", (4, 4), (0, 0)))).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([9, 9, 9, 10, 20, 30])
    assert open_image(encode(palette, transparency=1)).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(encode(palette, transparency=0)).getpixel((0, 0)) == (10, 20, 30)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied(kind):
    stored = Image.new("RGB", (32, 16), "black")
    stored.paste("white", (0, 0, 16, 16))  # the left half; turned clockwise it is the upper half
    exif = Image.Exif()
    exif[0x0112] = 6
    image = open_image(encode(stored, kind, exif=exif))
    assert image.size == (16, 32)
    assert image.getpixel((8, 4))[0] > 200 and image.getpixel((8, 28))[0] < 50


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
@pytest.mark.parametrize("share", [0.2, 0.7, 0.97])
def test_a_truncated_image_is_refused(kind, share):
    data = encode(noise_image(0, 64, 48), kind)
    assert open_image(data).size == (64, 48)
    with pytest.raises(ValueError):
        open_image(data[: int(len(data) * share)])


@pytest.mark.parametrize("data", [b"", b"not an image", b"\xff\xd8\xff\xe0", bytes(1000)])
def test_bytes_that_are_no_image_are_refused(data):
    with pytest.raises(ValueError, match="image"):
        open_image(data)


def test_a_bomb_is_refused_by_its_header(monkeypatch):
    monkeypatch.setattr(trainer, "MAX_IMAGE_PIXELS", 50 * 40)
    assert open_image(encode(Image.new("RGB", (50, 40)))).size == (50, 40)
    header = encode(Image.new("RGB", (51, 40)))[:60]  # the pixels are not even there
    with pytest.raises(ValueError, match="51x40 px is too large"):
        open_image(header)


def test_an_image_with_damaged_exif_is_refused_or_turned():
    entries = [(0x0100, 2, 4, b"abc\0"), (0x0112, 3, 1, b"\6\0\0\0")]  # the width is a string
    ifd = struct.pack("<H", 2) + b"".join(struct.pack("<HHI4s", *entry) for entry in entries) + bytes(4)
    data = encode(Image.new("RGB", (8, 6)), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0" + ifd)
    with contextlib.suppress(ValueError):
        assert open_image(data).size == (6, 8)


@pytest.mark.parametrize("value", [0, 64, 128, 255])
def test_sixteen_bit_grey_keeps_its_brightness(value):
    image = Image.fromarray(np.full((4, 4), value * 257, np.uint16))
    assert open_image(encode(image)).getpixel((0, 0)) == (value, value, value)


@pytest.mark.parametrize("size, decoded", [((200, 128), (100, 64)), ((127, 300), (127, 300)), ((520, 512), (65, 64))])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_decoded_small_and_keeps_its_own_size(size, decoded, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    smooth = noise_image(1, 4, 4).resize(size, Image.Resampling.BICUBIC)
    data = encode(smooth, "JPEG", quality=95, exif=exif)
    image, original_size = trainer.open_image(data, (64, 64))
    whole, whole_size = trainer.open_image(data)
    turn = 1 if orientation == 1 else -1
    assert image.size == decoded[::turn] and whole.size == size[::turn]
    assert original_size == whole_size == size[::-turn]
    difference = np.asarray(whole.resize(image.size, Image.Resampling.BOX), float) - np.asarray(image, float)
    assert np.abs(difference).mean() < 2


# ---- crops


@pytest.mark.parametrize("long, jitter", [(64, 0.06), (80, 0.06 + 0.12 * 0.25 / 0.7), (109, 0.18), (128, 0.18)])
def test_random_ar_crops_near_the_middle_up_to_two_to_one(long, jitter):
    margin = long - 64
    offsets = [trainer.random_ar_crop(64, long, 64, u) for u in np.linspace(0, 1, 201)[:-1]]
    assert {top for top, _ in offsets} == {0}
    lefts = np.array([left for _, left in offsets])
    reach = np.linspace(-jitter * margin, jitter * margin, 201)[:-1]
    assert np.abs(np.sort(lefts) - (margin / 2 + reach)).max() <= 0.51
    assert lefts.min() >= 0 and lefts.max() <= margin
    assert [trainer.random_ar_crop(long, 64, 64, u) for u in (0.0, 0.3, 0.9)] == [
        trainer.random_ar_crop(64, long, 64, u)[::-1] for u in (0.0, 0.3, 0.9)
    ]


@pytest.mark.parametrize("long", [129, 150, 300])
def test_random_ar_beyond_two_to_one_takes_the_centre_or_the_start(long):
    lefts = Counter(trainer.random_ar_crop(64, long, 64, u)[1] for u in np.linspace(0, 1, 101)[:-1])
    assert set(lefts) == {0, round((long - 64) / 2)}
    assert set(lefts.values()) == {50}
    assert {trainer.random_ar_crop(long, 64, 64, u) for u in (0.1, 0.9)} == {(0, 0), (round((long - 64) / 2), 0)}


def test_the_centre_crop_is_in_the_middle():
    assert trainer.center_crop(64, 100, (64, 64)) == (0, 18)
    assert trainer.center_crop(100, 64, (64, 64)) == (18, 0)
    assert trainer.center_crop(64, 64, (64, 64)) == (0, 0)
    assert trainer.center_crop(64, 100, (64, 90)) == (0, 5)


@pytest.mark.parametrize("size", [(40, 60), (61, 37), (1000, 7), (16, 16)])
def test_resizing_brings_the_short_side_to_the_resolution(size):
    image = ImageOps.cover(Image.new("RGB", size), (16, 16), Image.Resampling.LANCZOS)
    assert min(image.size) == 16
    assert max(image.size) == pytest.approx(16 * max(size) / min(size), abs=0.5)
    assert (size[0] > size[1]) == (image.size[0] > image.size[1])


# ---- buckets


def test_the_buckets_of_1024_px_are_those_that_sdxl_was_trained_on():
    buckets = trainer.make_buckets(1024)
    # a selection of SDXL's own list, arXiv:2307.01952, appendix I
    assert {(1024, 1024), (1152, 896), (896, 1152), (1216, 832), (1344, 768), (512, 2048), (2048, 512)} <= set(buckets)
    assert all(side % 64 == 0 for bucket in buckets for side in bucket)
    assert all(0.9 * 1024**2 < height * width <= 1024**2 for height, width in buckets)
    assert sorted((width, height) for height, width in buckets) == buckets
    assert trainer.make_buckets(64) == [(64, 64)]


def test_an_image_loses_its_aspect_error_to_its_bucket_and_no_more():
    rng, buckets = np.random.default_rng(0), trainer.make_buckets(1024)
    sizes = np.exp(rng.uniform(np.log(20), np.log(6000), (300, 2))).round()
    for (height, width), chosen in zip(sizes, trainer.nearest_buckets(sizes, buckets)):
        ratio, bucket = height / width, buckets[chosen]
        errors = [min(h / w / ratio, ratio * w / h) for h, w in buckets]  # what is kept of the cropped side
        assert errors[chosen] == pytest.approx(max(errors))
        scale = max(bucket[0] / height, bucket[1] / width)
        kept = bucket[0] * bucket[1] / (height * scale * width * scale)
        assert kept == pytest.approx(errors[chosen])


def bucketed_index(labels):
    """Rows in three buckets, each species with its own share of them: the commonest are wide, the rarest tall."""
    index, rng = index_of(labels), np.random.default_rng(4)
    index.bucket_sizes = [(256, 128), (192, 192), (128, 256)]
    names = [int(row[0].split()[-1]) if row else 0 for row in labels]
    shares = [(0.05 + 0.85 * s / SPECIES, 0.1, 0.85 - 0.85 * s / SPECIES) for s in names]
    index.buckets = np.array([rng.choice(3, p=p) for p in shares])
    return index


@pytest.mark.parametrize("choice", ["first", "random"])
@pytest.mark.parametrize("m", [0.2, 0.9])
def test_the_delivered_species_follow_the_target_over_the_buckets_together(choice, m, monkeypatch):
    labels = long_tailed_labels()
    index = bucketed_index(labels)
    mix, shares = trainer.SpeciesMix(index, choice, start=m, end=m), distribution(labels, choice)

    def clusters(weights=None):
        """Mean and standard error of every species' share over batches of one bucket each."""
        if weights is not None:
            monkeypatch.setattr(trainer.SamplePlan, "bucket_weights", lambda plan, step: weights)
        plan, batches = trainer.SamplePlan(index, mix, choice, seed=5, global_batch=10), []
        for _ in range(3000):
            rows, chosen = plan.next_batch()
            assert len(set(index.buckets[rows].tolist())) == 1
            batches.append(np.bincount(chosen, minlength=len(index.label_names)) / 10)
        return np.mean(batches, axis=0), np.std(batches, axis=0) / np.sqrt(len(batches))

    def distance(result, m):
        expected = np.array([mixture(shares, m)[name] for name in index.label_names])
        return np.abs((result[0] - expected) / result[1]).max()

    delivered = clusters()
    assert distance(delivered, m) < 4.5 < distance(delivered, m - 0.1)
    if m < 0.5:  # far from the data: buckets as often as they have images, as other trainers do, are off
        assert distance(clusters(np.bincount(index.buckets) / len(index)), m) > 4.5


def test_a_bucketed_plan_restarted_from_its_state_continues_identically():
    index = bucketed_index(long_tailed_labels()[::10])
    whole = micro_batches(index)
    batches = list(whole)
    assert all(pass_ > 0 for pass_, _ in whole.states[30])
    for step in (1, 7, 29):
        assert (
            list(micro_batches(index, step=step, cursors=json.loads(json.dumps(whole.states[step])))) == batches[step:]
        )


def test_unlabelled_images_come_at_their_constant_rate_over_the_buckets_too():
    index = index_of([["a"]] * 300 + [[]] * 300)
    index.bucket_sizes, index.buckets = [(256, 128), (128, 256)], np.repeat([0, 1, 1, 1], 150)
    plan = trainer.SamplePlan(index, trainer.SpeciesMix(index, "random"), "random", seed=1, global_batch=1)
    counts = deliver(plan, 6000)
    expected = 6000 * trainer.UNLABELLED_ACCEPTANCE / (1 + trainer.UNLABELLED_ACCEPTANCE)
    assert abs(counts[None] - expected) < 5 * np.sqrt(expected)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("size", [(700, 400), (401, 699), (300, 300), (90, 70)])
def test_a_bucketed_item_is_the_middle_of_the_scaled_image(tmp_path, size, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    smooth = noise_image(1, 5, 5).resize(size, Image.Resampling.BICUBIC)
    data = encode(smooth, "JPEG", quality=95, exif=exif)
    index = index_of_shard(write_shard(tmp_path / "a.tar", [sample("x", png=None, jpg=data)]))
    index.bucket_sizes = trainer.make_buckets(192)
    index.buckets = trainer.nearest_buckets(index.sizes(), index.bucket_sizes)
    item = trainer.ImageDataset(index, 0, 192, "bucket", False, "lanczos")[0, -1, 0, 0]
    seen = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    height, width = item["target_sizes"]
    assert item["pixels"].shape == (3, height, width) and (height, width) in index.bucket_sizes
    assert item["original_sizes"] == (seen.height, seen.width)
    assert (height > width) == (seen.height > 1.42 * seen.width)
    scaled = seen.resize([round(side * max(height / seen.height, width / seen.width)) for side in seen.size])
    top, left = item["crop_top_lefts"]
    assert (top, left) == (round((scaled.height - height) / 2), round((scaled.width - width) / 2)) and min(
        top, left
    ) == 0
    expected = np.asarray(scaled.crop((left, top, left + width, top + height)), float)
    assert np.abs(item["pixels"].permute(1, 2, 0).numpy() - expected).mean() < 2


def test_a_damaged_image_is_replaced_by_one_of_its_species_and_bucket(tmp_path):
    torn = encode(noise_image(3, 40, 20))[:400]
    samples = [sample("bad", png=torn), sample("tall", png=encode(noise_image(1, 20, 40)))]
    samples += [sample("wide", png=encode(noise_image(2, 40, 20))), sample("pichu", labels=["pichu"])]
    index = index_of_shard(write_shard(tmp_path / "a.tar", samples))
    index.bucket_sizes = trainer.make_buckets(192)
    index.buckets = trainer.nearest_buckets(index.sizes(), index.bucket_sizes)
    mew = index.label_names.index("mew")
    keys = {trainer.ImageDataset(index, seed, 192, "bucket", False, "box")[0, mew, 0, 0]["keys"] for seed in range(12)}
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
    index.bucket_sizes = trainer.make_buckets(192)
    index.buckets = trainer.nearest_buckets(index.sizes(), index.bucket_sizes)
    item = trainer.ImageDataset(index, 0, 192, "bucket", False, "box")[0, 0, 0, 0]
    assert item["keys"] == "wide" and "turns the image" in item["skipped"][0]["reason"]


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_index_holds_the_size_that_is_seen_whatever_the_metadata_say(tmp_path, form, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    data = encode(noise_image(1, 50, 30), form, **({} if form == "BMP" else {"exif": exif}))
    metadata = json.dumps({"image_id": "x", "width": 9999, "height": None}).encode()
    whole = sample("x", **{"png": None, "json": metadata, {"JPEG": "jpg"}.get(form, form.lower()): data})
    rows, damage = index_shard(write_shard(tmp_path / "a.tar", [whole]))
    turned = orientation >= 5 and form != "BMP"
    assert damage == [] and [(rows[0]["height"], rows[0]["width"])] == [(50, 30) if turned else (30, 50)]


@pytest.mark.parametrize("workers", [0, 4])
@pytest.mark.parametrize("world", [1, 2])
def test_the_species_that_the_loader_delivers_follow_a_moving_mixture(tmp_path, workers, world):
    """4,000 draws of two species, 95 to 5: an m off by 0.1 shifts the share by 0.045, 5.7 standard errors or more.

    With the limit at 3.5 the chance to miss such an m is P(Z > 2.2) = 1.4 %, of a false alarm 0.05 %.
    """
    picture = encode(noise_image(1))
    samples = [sample(f"{i:03}", ["rare" if i % 20 == 0 else "common"], png=picture) for i in range(400)]
    index, steps = index_of_shard(write_shard(tmp_path / "a.tar", samples)), 250
    expected = sum(16 * (0.5 * (1 - step / steps) + 0.05 * step / steps) for step in range(steps))

    def deviation(shift):
        """Standard errors between what arrives and what is expected, with m off by `shift`."""
        mix, rare = trainer.SpeciesMix(index, "random", start=shift, end=1 + shift, steps=steps), 0
        for rank in range(world):
            plan = trainer.SamplePlan(index, mix, "random", 5, 16)
            batches = trainer.MicroBatches(plan, steps, 16 // world, rank, world)
            dataset = trainer.ImageDataset(index, 5, 8, "center", False, "box")
            for batch in trainer.make_loader(dataset, batches, workers, pin_memory=False):
                rare += batch["species"].count("rare")
        return abs(rare - expected) / np.sqrt(16 * steps * 0.25)

    assert deviation(0) < 3.5 < deviation(-0.1)


# ---- items


@pytest.fixture
def turned_shard(tmp_path):
    """A shard of one JPEG, 60 x 40 px as stored and 40 x 60 as it is to be seen."""
    exif = Image.Exif()
    exif[0x0112] = 6
    metadata = {"image_id": "x", "species_list": ["Mew"], "ae_aesthetic": 73.0, "width": 999, "height": 999}
    data = encode(noise_image(1, 60, 40), "JPEG", exif=exif)
    whole = sample("x", png=None, jpg=data, json=json.dumps(metadata).encode())
    seen = Image.open(io.BytesIO(data)).transpose(Image.Transpose.ROTATE_270)
    return write_shard(tmp_path / "a.tar", [whole]), seen


def as_tensor(image, top, left, side):
    return torch.from_numpy(np.asarray(image)[top : top + side, left : left + side].copy()).permute(2, 0, 1)


def test_an_item_has_the_sizes_after_exif_and_the_offset_in_the_resized_image(turned_shard):
    path, seen = turned_shard
    resized = seen.resize((24, 36), Image.Resampling.LANCZOS)  # above half, where a JPEG is decoded whole
    dataset = trainer.ImageDataset(index_of_shard(path), 3, 24, "random_ar", False, "lanczos")
    tops = set()
    for step in range(40):
        item = dataset[0, 0, step, 100 + step]
        top, left = item["crop_top_lefts"]
        tops.add(top)
        assert item["original_sizes"] == (60, 40) and item["target_sizes"] == (24, 24)
        assert left == 0 and 0 <= top <= 12
        assert item["pixels"].dtype == torch.uint8 and item["pixels"].shape == (3, 24, 24)
        assert torch.equal(item["pixels"], as_tensor(resized, top, left, 24))
    assert len(tops) > 1
    assert (item["captions"], item["species"], item["keys"]) == ("a drawing of x", "mew", "x")
    assert item["aesthetic_scores"] == 7.3
    assert item["positions"] == 139 and item["skipped"] == [] and not item["replaced"]


def test_crop_and_flip_are_functions_of_image_and_step_and_the_noise_seed_of_the_position(turned_shard):
    path, seen = turned_shard
    resized = seen.resize((24, 36), Image.Resampling.LANCZOS)
    mirrored = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)

    def make():
        return trainer.ImageDataset(index_of_shard(path), 3, 24, "random_ar", True, "lanczos")

    dataset, flips = make(), 0
    for step in range(40):
        item, again, elsewhere = dataset[0, 0, step, 5], make()[0, 0, step, 5], dataset[0, 0, step, 6]
        assert torch.equal(item["pixels"], again["pixels"]) and item["crop_top_lefts"] == again["crop_top_lefts"]
        assert torch.equal(item["pixels"], elsewhere["pixels"])
        assert item["sample_seeds"] == again["sample_seeds"] != elsewhere["sample_seeds"]
        plain, flipped = (as_tensor(image, *item["crop_top_lefts"], 24) for image in (resized, mirrored))
        assert torch.equal(item["pixels"], plain) != torch.equal(item["pixels"], flipped)
        flips += torch.equal(item["pixels"], flipped)
    assert 8 < flips < 32


def test_the_score_is_six_when_absent_and_stays_on_its_scale(tmp_path):
    scores = {"a": None, "b": 0.0, "c": 55.0, "d": 100.0, "e": "high"}
    samples = [sample(key, json=json.dumps({"ae_aesthetic": score}).encode()) for key, score in scores.items()]
    index = index_of_shard(write_shard(tmp_path / "a.tar", samples))
    dataset = trainer.ImageDataset(index, 0, 8, "center", False, "lanczos")
    assert [dataset[i, -1, 0, 0]["aesthetic_scores"] for i in range(5)] == [6.0, 1.0, 5.5, 10.0, 6.0]
    assert dataset[0, -1, 0, 0]["species"] is None


def test_a_batch_has_pixels_from_minus_one_to_one_and_float_sizes(tmp_path):
    colours = {"black": (0, 0, 0), "white": (255, 255, 255)}
    samples = [sample(key, png=encode(Image.new("RGB", (1365, 9), rgb))) for key, rgb in colours.items()]
    dataset = trainer.ImageDataset(
        index_of_shard(write_shard(tmp_path / "a.tar", samples)), 0, 8, "center", False, "box"
    )
    loader = trainer.make_loader(dataset, [[(0, 0, 0, 0), (1, 0, 0, 1)]], workers=0, pin_memory=False)
    batch = trainer.move_batch(next(iter(loader)), "cpu")
    assert batch["pixel_values"].flatten(1).tolist() == [[-1.0] * 192, [1.0] * 192]
    assert batch["original_sizes"].dtype == torch.float32 and batch["original_sizes"].tolist() == [[9, 1365]] * 2
    assert batch["target_sizes"].tolist() == [[8, 8]] * 2
    assert batch["keys"] == ["black", "white"] and len(set(batch["sample_seeds"])) == 2


def test_reading_an_image_folder_does_not_keep_every_file_open(tmp_path):
    rows = []
    for i in range(40):
        data = encode(noise_image(i))
        (tmp_path / f"{i}.png").write_bytes(data)
        path = str(tmp_path / f"{i}.png")
        rows.append({"key": path, "image_id": path, "caption": "x", "labels": [], "path": path})
        rows[-1] |= {"offset": 0, "size": len(data)}
    index = trainer.make_index(pa.Table.from_pylist(rows, trainer.INDEX_SCHEMA), [])
    dataset = trainer.ImageDataset(index, 0, 8, "center", False, "box")
    before = len(os.listdir("/proc/self/fd"))
    assert [dataset[i, -1, 0, 0]["keys"] for i in range(40)] == [row["key"] for row in rows]
    assert len(os.listdir("/proc/self/fd")) - before < 20


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
        items = [trainer.ImageDataset(partly_damaged, seed, 8, "center", False, "box")[0, mew, 2, 7] for _ in range(2)]
        assert items[0]["keys"] == items[1]["keys"] and items[0]["keys"] in ("mew 1", "mew 2")
        assert items[0]["captions"] == f"a drawing of {items[0]['keys']}" and items[0]["species"] == "mew"
        assert items[0]["replaced"] and {entry["key"] for entry in items[0]["skipped"]} == {"bad"}
        assert "image" in items[0]["skipped"][0]["reason"] and items[0]["skipped"][0]["shard"].endswith("a.tar")
        replacements.add(items[0]["keys"])
    assert replacements == {"mew 1", "mew 2"}


def test_a_damaged_image_is_reported_once(partly_damaged):
    mew = partly_damaged.label_names.index("mew")
    for seed in range(12):
        item = trainer.ImageDataset(partly_damaged, seed, 8, "center", False, "box")[0, mew, 2, 7]
        assert [entry["key"] for entry in item["skipped"]] == ["bad"]


def test_a_damaged_image_that_is_the_only_one_of_its_species_does_not_end_the_run(partly_damaged):
    pichu = partly_damaged.label_names.index("pichu")
    item = trainer.ImageDataset(partly_damaged, 0, 8, "center", False, "box")[3, pichu, 2, 7]
    assert item["replaced"] and item["keys"] not in ("bad", "only")


def note_skipped(index, output_dir, entries, limit=0.05, progress=None):
    args = SimpleNamespace(output_dir=output_dir, max_bad_fraction=limit)
    trainer.note_skipped(args, index, progress or trainer.Progress(), entries)
    return [json.loads(line) for line in (output_dir / "skipped.jsonl").read_text().splitlines()]


def test_damage_met_in_training_is_written_once_and_counted_against_the_limit(tmp_path):
    index, progress = index_of([[]] * 20), trainer.Progress()
    entries = [{"shard": "a.tar", "key": key, "reason": f"cannot decode image: {key}"} for key in "pqr"]
    assert note_skipped(index, tmp_path, entries[:1], progress=progress) == entries[:1]
    assert note_skipped(index, tmp_path, entries[:1], progress=progress) == entries[:1]
    assert note_skipped(index, tmp_path, entries[:2], limit=0.1, progress=progress) == entries[:2]
    assert progress.skipped == {"cannot decode image": 4} and progress.damaged == entries[:2]
    with pytest.raises(trainer.InputError, match="--max_bad_fraction"):
        note_skipped(index, tmp_path, entries[2:], limit=0.1, progress=progress)


def test_a_sample_skipped_twice_in_one_step_is_one_damaged_sample(tmp_path):
    entry = {"shard": "a.tar", "key": "p", "reason": "cannot decode image"}
    assert note_skipped(index_of([[]] * 20), tmp_path, [entry, entry]) == [entry]


def test_damage_is_counted_against_all_samples_also_with_max_train_samples(tmp_path):
    shard = write_shard(tmp_path / "a.tar", [sample(key) for key in KEYS[:9]] + [sample("bad", txt=b"")])
    index = load_index([shard], tmp_path, max_train_samples=3, max_bad_fraction=0.15)
    assert len(note_skipped(index, tmp_path, [], limit=0.15)) == 1
