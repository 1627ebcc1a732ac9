"""From the bytes of an image to a batch: decoding, cropping, buckets, items."""

import contextlib
import io
import json
import os
import struct
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image, ImageOps
from shards import encode, index_of_shard, noise_image, open_image, sample, write_shard

import sdxl_data
import train_sdxl_lora as trainer

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
    monkeypatch.setattr(sdxl_data, "MAX_IMAGE_PIXELS", 50 * 40)
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
    image, original_size, _ = sdxl_data.open_image(data, (64, 64))
    whole, whole_size, _ = sdxl_data.open_image(data)
    turn = 1 if orientation == 1 else -1
    assert image.size == decoded[::turn] and whole.size == size[::turn]
    assert original_size == whole_size == size[::-turn]
    difference = np.asarray(whole.resize(image.size, Image.Resampling.BOX), float) - np.asarray(image, float)
    assert np.abs(difference).mean() < 2


# ---- crops


@pytest.mark.parametrize("long, jitter", [(64, 0.06), (80, 0.06 + 0.12 * 0.25 / 0.7), (109, 0.18), (128, 0.18)])
def test_random_ar_crops_near_the_middle_up_to_two_to_one(long, jitter):
    margin = long - 64
    offsets = [sdxl_data.random_ar_crop(64, long, 64, u) for u in np.linspace(0, 1, 201)[:-1]]
    assert {top for top, _ in offsets} == {0}
    lefts = np.array([left for _, left in offsets])
    reach = np.linspace(-jitter * margin, jitter * margin, 201)[:-1]
    assert np.abs(np.sort(lefts) - (margin / 2 + reach)).max() <= 0.51
    assert lefts.min() >= 0 and lefts.max() <= margin
    assert [sdxl_data.random_ar_crop(long, 64, 64, u) for u in (0.0, 0.3, 0.9)] == [
        sdxl_data.random_ar_crop(64, long, 64, u)[::-1] for u in (0.0, 0.3, 0.9)
    ]


@pytest.mark.parametrize("long", [129, 150, 300])
def test_random_ar_beyond_two_to_one_takes_the_centre_or_the_start(long):
    lefts = Counter(sdxl_data.random_ar_crop(64, long, 64, u)[1] for u in np.linspace(0, 1, 101)[:-1])
    assert set(lefts) == {0, round((long - 64) / 2)}
    assert set(lefts.values()) == {50}
    assert {sdxl_data.random_ar_crop(long, 64, 64, u) for u in (0.1, 0.9)} == {(0, 0), (round((long - 64) / 2), 0)}


def test_the_centre_crop_is_in_the_middle():
    assert sdxl_data.center_crop(64, 100, (64, 64)) == (0, 18)
    assert sdxl_data.center_crop(100, 64, (64, 64)) == (18, 0)
    assert sdxl_data.center_crop(64, 64, (64, 64)) == (0, 0)
    assert sdxl_data.center_crop(64, 100, (64, 90)) == (0, 5)


@pytest.mark.parametrize("size", [(40, 60), (61, 37), (1000, 7), (16, 16)])
def test_resizing_brings_the_short_side_to_the_resolution(size):
    image = ImageOps.cover(Image.new("RGB", size), (16, 16), Image.Resampling.LANCZOS)
    assert min(image.size) == 16
    assert max(image.size) == pytest.approx(16 * max(size) / min(size), abs=0.5)
    assert (size[0] > size[1]) == (image.size[0] > image.size[1])


# ---- buckets


def test_the_buckets_of_1024_px_are_those_that_sdxl_was_trained_on():
    buckets = sdxl_data.make_buckets(1024)
    # a selection of SDXL's own list, arXiv:2307.01952, appendix I
    assert {(1024, 1024), (1152, 896), (896, 1152), (1216, 832), (1344, 768), (512, 2048), (2048, 512)} <= set(buckets)
    assert all(side % 64 == 0 for bucket in buckets for side in bucket)
    assert all(0.9 * 1024**2 < height * width <= 1024**2 for height, width in buckets)
    assert sorted((width, height) for height, width in buckets) == buckets
    assert sdxl_data.make_buckets(64) == [(64, 64)]


def test_an_image_loses_its_aspect_error_to_its_bucket_and_no_more():
    rng, buckets = np.random.default_rng(0), sdxl_data.make_buckets(1024)
    sizes = np.exp(rng.uniform(np.log(20), np.log(6000), (300, 2))).round()
    for (height, width), chosen in zip(sizes, sdxl_data.nearest_buckets(sizes, buckets)):
        ratio, bucket = height / width, buckets[chosen]
        errors = [min(h / w / ratio, ratio * w / h) for h, w in buckets]  # what is kept of the cropped side
        assert errors[chosen] == pytest.approx(max(errors))
        scale = max(bucket[0] / height, bucket[1] / width)
        kept = bucket[0] * bucket[1] / (height * scale * width * scale)
        assert kept == pytest.approx(errors[chosen])


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("size", [(700, 400), (401, 699), (300, 300), (90, 70)])
def test_a_bucketed_item_is_the_middle_of_the_scaled_image(tmp_path, size, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    smooth = noise_image(1, 5, 5).resize(size, Image.Resampling.BICUBIC)
    data = encode(smooth, "JPEG", quality=95, exif=exif)
    index = index_of_shard(write_shard(tmp_path / "a.tar", [sample("x", png=None, jpg=data)]))
    index = sdxl_data.assign_buckets(index, 192)
    item = sdxl_data.ImageDataset(index, 0, 192, "bucket", False, "lanczos")[0, -1, 0, 0]
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


def looks_like(pixels, expected):
    """Equal up to rounding: only the window is resized, where `expected` was cut from the whole resized image."""
    return (pixels.int() - expected.int()).abs().max() <= 4


def test_an_item_has_the_sizes_after_exif_and_the_offset_in_the_resized_image(turned_shard):
    path, seen = turned_shard
    resized = seen.resize((24, 36), Image.Resampling.LANCZOS)  # above half, where a JPEG is decoded whole
    dataset = sdxl_data.ImageDataset(index_of_shard(path), 3, 24, "random_ar", False, "lanczos")
    tops = set()
    for step in range(40):
        item = dataset[0, 0, step, 100 + step]
        top, left = item["crop_top_lefts"]
        tops.add(top)
        assert item["original_sizes"] == (60, 40) and item["target_sizes"] == (24, 24)
        assert left == 0 and 0 <= top <= 12
        assert item["pixels"].dtype == torch.uint8 and item["pixels"].shape == (3, 24, 24)
        assert looks_like(item["pixels"], as_tensor(resized, top, left, 24))
    assert len(tops) > 1
    assert (item["captions"], item["species"], item["keys"]) == ("a drawing of x", "mew", "x")
    assert item["aesthetic_scores"] == 7.3
    assert item["positions"] == 139 and item["skipped"] == [] and not item["replaced"]


def test_crop_and_flip_are_functions_of_image_and_step_and_the_noise_seed_of_the_position(turned_shard):
    path, seen = turned_shard
    resized = seen.resize((24, 36), Image.Resampling.LANCZOS)
    mirrored = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)

    def make():
        return sdxl_data.ImageDataset(index_of_shard(path), 3, 24, "random_ar", True, "lanczos")

    dataset, flips = make(), 0
    for step in range(40):
        item, again, elsewhere = dataset[0, 0, step, 5], make()[0, 0, step, 5], dataset[0, 0, step, 6]
        assert torch.equal(item["pixels"], again["pixels"]) and item["crop_top_lefts"] == again["crop_top_lefts"]
        assert torch.equal(item["pixels"], elsewhere["pixels"])
        assert item["sample_seeds"] == again["sample_seeds"] != elsewhere["sample_seeds"]
        plain, flipped = (as_tensor(image, *item["crop_top_lefts"], 24) for image in (resized, mirrored))
        assert looks_like(item["pixels"], plain) != looks_like(item["pixels"], flipped)
        flips += looks_like(item["pixels"], flipped)
    assert 8 < flips < 32


def test_the_score_is_six_when_absent_and_stays_on_its_scale(tmp_path):
    scores = {"a": None, "b": 0.0, "c": 55.0, "d": 100.0, "e": "high"}
    samples = [sample(key, json=json.dumps({"ae_aesthetic": score}).encode()) for key, score in scores.items()]
    index = index_of_shard(write_shard(tmp_path / "a.tar", samples))
    dataset = sdxl_data.ImageDataset(index, 0, 8, "center", False, "lanczos")
    assert [dataset[i, -1, 0, 0]["aesthetic_scores"] for i in range(5)] == [6.0, 1.0, 5.5, 10.0, 6.0]
    assert dataset[0, -1, 0, 0]["species"] is None


def test_a_batch_has_pixels_from_minus_one_to_one_and_float_sizes(tmp_path):
    colours = {"black": (0, 0, 0), "white": (255, 255, 255)}
    samples = [sample(key, png=encode(Image.new("RGB", (1365, 9), rgb))) for key, rgb in colours.items()]
    dataset = sdxl_data.ImageDataset(
        index_of_shard(write_shard(tmp_path / "a.tar", samples)), 0, 8, "center", False, "box"
    )
    loader = sdxl_data.make_loader(dataset, [[(0, 0, 0, 0), (1, 0, 0, 1)]], workers=0, pin_memory=False)
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
        rows.append({"key": path, "image_id": path, "captions": ["x"], "repeats": 1, "labels": [], "path": path})
        rows[-1] |= {"offset": 0, "size": len(data)}
    index = sdxl_data.make_index(pa.Table.from_pylist(rows, sdxl_data.INDEX_SCHEMA), [])
    dataset = sdxl_data.ImageDataset(index, 0, 8, "center", False, "box")
    before = len(os.listdir("/proc/self/fd"))
    assert [dataset[i, -1, 0, 0]["keys"] for i in range(40)] == [row["key"] for row in rows]
    assert len(os.listdir("/proc/self/fd")) - before < 20
