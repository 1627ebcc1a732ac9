"""What the index of a shard or of an image folder holds, and when it is read again."""

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from shards import KEYS, encode, index_of, index_shard, load_index, noise_image, sample, write_shard

import sdxl_data


@pytest.fixture
def shard(tmp_path):
    return Path(write_shard(tmp_path / "a.tar", [sample(key) for key in KEYS]))


def test_a_whole_shard_is_indexed_without_damage(shard):
    rows, damage = index_shard(shard)
    assert damage == []
    assert [row["key"] for row in rows] == KEYS
    data = shard.read_bytes()
    for row in rows:
        assert data[row["offset"] : row["offset"] + row["size"]] == sample(row["key"])["png"]
        assert row["captions"][0] == f"a drawing of {row['key']}"


@pytest.mark.parametrize(
    "keys", [["é1", "è1"], ["k" * 130 + "1", "k" * 130 + "2"], ["folder/" + "k" * 90, "folder2/" + "k" * 90]]
)
def test_long_and_foreign_names_are_kept_apart(tmp_path, keys):
    shard = write_shard(
        tmp_path / "a.tar", [sample(keys[0]), sample(keys[1], png=None, jpg=encode(noise_image(1), "JPEG"))]
    )
    rows, damage = index_shard(shard)
    assert [(row["key"], row["captions"][0]) for row in rows] == [(key, f"a drawing of {key}") for key in keys]
    assert damage == []


def test_the_long_names_of_gnu_tar_are_read(tmp_path):
    key = "k" * 150
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for extension, data in list(sample(key).items())[1:]:
            member = tarfile.TarInfo(f"{key}.{extension}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    rows, damage = index_shard(tmp_path / "a.tar")
    assert [row["key"] for row in rows] == [key] and damage == []


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


def test_the_index_is_read_from_its_cache_until_the_shard_changes(shard, tmp_path, monkeypatch):
    calls = []
    original = sdxl_data.index_shard
    monkeypatch.setattr(sdxl_data, "index_shard", lambda *a: calls.append(a) or original(*a))
    first = sdxl_data.cached_index_shard(str(shard), tmp_path, sdxl_data.Fields())
    assert sdxl_data.cached_index_shard(str(shard), tmp_path, sdxl_data.Fields()).equals(first, check_metadata=True)
    assert len(calls) == 1
    sdxl_data.cached_index_shard(str(shard), tmp_path, sdxl_data.Fields(labels="other_key"))
    assert len(calls) == 2
    stat = os.stat(shard)
    write_shard(shard, [sample(key.replace("s", "t")) for key in KEYS])
    assert os.stat(shard).st_size == stat.st_size
    changed = sdxl_data.cached_index_shard(str(shard), tmp_path, sdxl_data.Fields())
    assert changed.column("key").to_pylist()[0] == "t0"


def test_extensions_may_be_in_upper_case(tmp_path):
    parts = {name.upper() if name != "__key__" else name: part for name, part in sample("a").items()}
    rows, damage = index_shard(write_shard(tmp_path / "a.tar", [parts]))
    assert damage == [] and rows[0]["captions"][0] == "a drawing of a" and rows[0]["labels"] == ["mew"]


def test_max_train_samples_takes_the_same_samples_whatever_the_shards(tmp_path):
    shards = [write_shard(tmp_path / f"{n}.tar", [sample(key) for key in KEYS[5 * n : 5 * n + 5]]) for n in (0, 1)]
    chosen = [
        load_index(order, tmp_path, max_train_samples=4).table.column("key").to_pylist()
        for order in (shards, shards[::-1])
    ]
    assert len(chosen[0]) == 4
    assert set(chosen[0]) == set(chosen[1])
    other = load_index(shards, tmp_path, seed=2, max_train_samples=4).table.column("key").to_pylist()
    assert set(other) != set(chosen[0])


def test_the_fingerprint_depends_on_the_samples_and_not_on_their_order():
    labels, ids = [["a"], ["b"], []], ["1", "2", "3"]
    fingerprint = index_of(labels, ids).fingerprint()
    assert index_of(labels[::-1], ids[::-1]).fingerprint() == fingerprint
    assert index_of([["a"], ["a"], []], ids).fingerprint() != fingerprint
    assert index_of(labels, ["1", "2", "4"]).fingerprint() != fingerprint
    assert index_of(labels[:2], ids[:2]).fingerprint() != fingerprint
