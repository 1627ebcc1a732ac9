"""Damaged shards: every damage is named, and no whole sample is lost."""

import io
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import webdataset as wds
from PIL import Image
from shards import KEYS, encode, index_shard, load_index, noise_image, open_image, sample, write_shard

import sdxl_data


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


@pytest.mark.parametrize("lost", ["png", "txt", "json"])
def test_a_sample_that_lost_a_member_to_a_bad_header_is_not_trained_on(tmp_path, lost):
    path = tmp_path / "a.tar"
    write_shard(path, [sample(key) for key in ("a", "b", "c")])
    with tarfile.open(path) as tar:
        at = next(m.offset_data for m in tar if m.name == f"b.{lost}") - 512
    data = bytearray(path.read_bytes())
    data[at : at + 512] = bytes(range(256)) * 2
    path.write_bytes(data)
    rows, damage = index_shard(path)
    assert [row["key"] for row in rows] == ["a", "c"]
    assert {"b", None} == {d["key"] for d in damage}


# ---- damaged samples


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
        ({"png": None, "mp4": b"ftyp"}, "no image"),
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
    table = sdxl_data.cached_index_shard(shard, tmp_path, sdxl_data.Fields())
    assert table.column("key").to_pylist()[0] == "good"


def test_a_duplicate_key_is_reported_and_never_mixed_with_the_first(tmp_path):
    again = sample("s1", txt=b"another caption", json=None)
    rows, damage = index_shard(write_shard(tmp_path / "a.tar", [sample("s1"), sample("s2"), again]))
    assert [(row["key"], row["captions"][0]) for row in rows] == [("s1", "a drawing of s1"), ("s2", "a drawing of s2")]
    assert [(d["key"], d["reason"]) for d in damage] == [("s1", "duplicate key")]


def test_an_image_id_of_two_images_is_reported_and_the_first_kept(tmp_path):
    other = encode(noise_image(77))
    samples = [[sample("a"), sample("b")], [sample("c"), sample("a", png=other)]]
    shards = [write_shard(tmp_path / f"{n}.tar", part) for n, part in enumerate(samples)]
    index = load_index(shards, tmp_path, max_bad_fraction=0.3)
    assert [index.row(i)["key"] for i in range(len(index))] == ["a", "b", "c"]
    assert [(d["shard"], d["key"], d["reason"]) for d in index.damage] == [(shards[1], "a", "duplicate image_id: a")]


def test_the_same_key_in_two_shards_is_two_images_when_no_id_says_otherwise(tmp_path):
    shards = [write_shard(tmp_path / f"{n}.tar", [sample("a", json=None)]) for n in range(2)]
    assert len(load_index(shards, tmp_path)) == 2


# ---- too much damage


def test_too_many_damaged_samples_end_the_run_and_name_the_flag(tmp_path):
    samples = [sample(key) for key in KEYS[:8]] + [sample(key, txt=b"") for key in KEYS[8:]]
    shard = write_shard(tmp_path / "a.tar", samples)
    assert len(load_index([shard], tmp_path, max_bad_fraction=0.2)) == 8
    with pytest.raises(sdxl_data.InputError, match="2 of 10 .*--max_bad_fraction 0.1"):
        load_index([shard], tmp_path, max_bad_fraction=0.1)


def test_a_sample_with_two_faults_is_one_damaged_sample(shard, tmp_path):
    at = members(shard)["s9.png"].offset_data + 20
    shard.write_bytes(shard.read_bytes()[:at])
    assert len(load_index([shard], tmp_path, max_bad_fraction=0.1)) == 9


def test_nothing_usable_is_an_error_that_names_the_flag(tmp_path):
    shard = write_shard(tmp_path / "a.tar", [sample("a", txt=b"")])
    with pytest.raises(sdxl_data.InputError, match="--train_shards: no usable sample"):
        load_index([shard], tmp_path, max_bad_fraction=1.0)


# ---- generated damage

IMAGE_KINDS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}


def cut(rng, data, headers, n):
    start, body, _ = headers[n]
    return data[: int(rng.integers(start, body + 512))], {key for _, _, key in headers[n:]}


def overwrite_header(rng, data, headers, n):
    start, _, key = headers[n]
    return data[:start] + rng.bytes(512) + data[start + 512 :], {key}


def insert_zero_blocks(rng, data, headers, n):
    start, _, _ = headers[n]
    return data[:start] + bytes(1024) + data[start:], set()


# change the n-th member in the bytes of a shard; what comes back is those bytes and the keys that may be lost
BYTE_DAMAGES = {"cut": cut, "header": overwrite_header, "zero blocks": insert_zero_blocks}


def cut_image(rng, samples, victim, kind):
    victim[kind] = victim[kind][: int(len(victim[kind]) * rng.uniform(0.05, 0.9))]


def empty_image(rng, samples, victim, kind):
    victim[kind] = b""


def break_json(rng, samples, victim, kind):
    victim["json"] = [b"{", b"[1]", b"\xff", b"7"][rng.integers(4)]


def break_caption(rng, samples, victim, kind):
    victim["txt"] = [b"", b" \n", b"caf\xe9"][rng.integers(3)]


def repeat_key(rng, samples, victim, kind):
    samples.append(victim | {"txt": b"the second"})


def take_image_away(rng, samples, victim, kind):
    del victim[kind]


# change one sample before the shard is written; `kind` is the extension of its image
SAMPLE_DAMAGES = {
    "image cut": cut_image,
    "image empty": empty_image,
    "json": break_json,
    "caption": break_caption,
    "twice": repeat_key,
    "no image": take_image_away,
}
DAMAGES = [*BYTE_DAMAGES, *SAMPLE_DAMAGES]
PER_DAMAGE = 112  # together a little over a thousand


def damaged_shard(rng, number, damage):
    """(bytes of a shard of five samples with one damage, keys that it may touch, the samples, their image kind)."""
    kind = list(IMAGE_KINDS)[number % 3]
    samples = []
    for i in range(5):
        image = encode(noise_image(1000 * number + i, 24, 20), IMAGE_KINDS[kind])
        samples.append(sample(f"s{i}", **({"png": None} | {kind: image})))
    written = {each["__key__"]: each for each in samples}
    victim = samples[rng.integers(5)]
    if damage in SAMPLE_DAMAGES:
        SAMPLE_DAMAGES[damage](rng, samples, victim, kind)
    buffer = io.BytesIO()
    with wds.TarWriter(buffer, encoder=False) as tar:
        for each in samples:
            tar.write(each)
    if damage in SAMPLE_DAMAGES:
        return buffer.getvalue(), {victim["__key__"]}, written, kind
    with tarfile.open(fileobj=io.BytesIO(buffer.getvalue())) as tar:
        headers = [(m.offset_data - 512, m.offset_data, m.name.split(".")[0]) for m in tar]
    data, touched = BYTE_DAMAGES[damage](rng, buffer.getvalue(), headers, int(rng.integers(len(headers))))
    return data, touched, written, kind


def train_on(path, seed, reports):
    """{key: (decoded image, row)} of what a run would train on in a shard; `reports` gets all that is skipped."""
    rows, damage = index_shard(path)
    reports += damage
    if not rows:
        return {}
    index = sdxl_data.make_index(pa.Table.from_pylist(rows, sdxl_data.INDEX_SCHEMA), damage)
    dataset = sdxl_data.ImageDataset(index, seed, 16, "center", False, "box")
    trained = {}
    for i in range(len(rows)):
        try:
            row, (image, _, _), skipped = dataset.first_intact(i, -1, lambda row: dataset.open(row, (16, 16)))
        except ValueError as error:  # a shard of one damaged image
            reports.append({"key": rows[i]["key"], "reason": str(error)})
            continue
        reports += skipped
        trained.setdefault(row["key"], (image, row))
    return trained


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_thousand_damages_are_each_named_and_none_is_trained_on(tmp_path, damage):
    started = time.process_time()
    for number in range(PER_DAMAGE):
        rng = np.random.default_rng((20261123, DAMAGES.index(damage), number))
        data, touched, samples, kind = damaged_shard(rng, number, damage)
        path, reports = tmp_path / "damaged.tar", []
        path.write_bytes(data)
        trained = train_on(path, number, reports)
        for key, (image, row) in trained.items():
            assert image.tobytes() == open_image(samples[key][kind]).tobytes(), (number, key)
            assert row["captions"][0].encode() == samples[key]["txt"], (number, key)
            assert row["labels"] == ["mew"], (number, key)
        assert reports, number
        if damage in SAMPLE_DAMAGES:
            assert touched <= {report["key"] for report in reports}, number
        assert set(samples) - touched <= set(trained), (number, "a whole sample was lost")
        if damage not in ("twice", "cut", "header"):
            assert not touched & set(trained), number
    assert PER_DAMAGE * len(DAMAGES) >= 1000
    assert time.process_time() - started < 60 / len(DAMAGES)
