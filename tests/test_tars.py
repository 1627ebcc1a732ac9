"""Tars and pictures as people have them: names, marks, profiles, odd shapes; and tars damaged at random."""

import gzip
import io
import json
import multiprocessing
import resource
import tarfile

import numpy as np
import pytest
from harness import SDXL, assert_ok, run_trainer
from PIL import Image, ImageCms, PngImagePlugin
from shards import encode, index_of_folder, index_shard, load_index, noise_image, open_image, sample, write_shard
from tar_fuzz import fuzz

import sdxl_data


def write_tar(path, files, **options):
    """A tar of {name: bytes}, in this order."""
    with tarfile.open(path, "w", **options) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def read(path):
    """({key: captions}, {key: reason}) of a tar."""
    rows, damage = index_shard(path)
    return {row["key"]: row["captions"] for row in rows}, {entry["key"]: entry["reason"] for entry in damage}


def image(n):
    return encode(noise_image(n))


# ---- names


def test_what_a_mac_adds_to_a_tar_is_no_sample(tmp_path):
    files = {"._a.jpg": b"\0\5\x16\7", "a.jpg": image(1), "._a.txt": b"\0\5", "a.txt": b"a", ".DS_Store": b"Bud1"}
    files |= {"__MACOSX/._a.jpg": b"\0\5", "dir/._b.png": b"\0", "dir/b.png": image(2), "dir/b.txt": b"b"}
    assert read(write_tar(tmp_path / "a.tar", files)) == ({"a": ["a"], "dir/b": ["b"]}, {})


def test_a_folder_of_tars_leaves_out_what_a_mac_adds(tmp_path):
    write_shard(tmp_path / "0.tar", [sample("a")])
    (tmp_path / "._0.tar").write_bytes(b"\0\5\x16\7")
    assert sdxl_data.expand_shards([str(tmp_path)]) == [str(tmp_path / "0.tar")]


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_with_dots_are_samples_of_their_own(tmp_path, tar_format):
    names = ["v1.0 a", "v1.1 a", "v1", "x/v2.5", "photo.final", "photo.draft", "long name " * 20 + "1.5"]
    files = {f"{name}{end}": data for name in names for end, data in ((".jpg", image(1)), (".txt", name.encode()))}
    found, left_out = read(write_tar(tmp_path / "a.tar", files, format=tar_format))
    assert found == {name: [name] for name in names} and left_out == {}


def test_each_image_of_dotted_names_without_caption_is_reported(tmp_path):
    files = {"v1.0 a.jpg": image(1), "v1.1 a.jpg": image(2), "v1.2 a.jpg": image(3), "v1.2 a.txt": b"c"}
    found, left_out = read(write_tar(tmp_path / "a.tar", files))
    assert found == {"v1.2 a": ["c"]} and left_out == {"v1.0 a": "no caption", "v1.1 a": "no caption"}


def test_a_dotted_name_beside_a_sample_of_the_plain_key_is_reported_too(tmp_path):
    files = {"v1.1 a.jpg": image(1), "v1.jpg": image(2), "v1.txt": b"v"}
    assert read(write_tar(tmp_path / "a.tar", files)) == ({"v1": ["v"]}, {"v1.1 a": "no caption"})


def test_fields_of_webdataset_beside_an_image_are_no_samples(tmp_path):
    files = {"a.jpg": image(1), "a.mask.png": image(2), "a.seg.npy": b"x", "a.txt": b"a", "a.json": b"{}"}
    assert read(write_tar(tmp_path / "a.tar", files)) == ({"a": ["a"]}, {})


@pytest.mark.parametrize(
    "name", ["全\u3000角", "narrow\u202fspace", "ピカチュウ", "Flabébé", "ก็", "שלום", "zero\u200bwidth", "😀"]
)
def test_characters_of_every_language_are_names(tmp_path, name):
    path = write_tar(tmp_path / "a.tar", {f"{name}.png": image(1), f"{name}.txt": name.encode()})
    rows, damage = index_shard(path)
    assert damage == [] and [row["key"] for row in rows] == [name] and name in rows[0]["image_id"]


def test_names_in_another_encoding_are_names_too(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"caf\udce9.png": image(1), "caf\udce9.txt": b"x"}, format=tarfile.GNU_FORMAT)
    assert read(path) == ({"caf\\xe9": ["x"]}, {})


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("kind", [tarfile.DIRTYPE, tarfile.SYMTYPE])
def test_the_long_name_of_a_folder_or_link_is_not_that_of_the_next_file(tmp_path, tar_format, kind):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tar_format) as tar:
        entry = tarfile.TarInfo("x" * 150)
        entry.type, entry.linkname = kind, "y" * 150
        tar.addfile(entry)
        for name, data in (("a.png", image(1)), ("a.txt", b"a"), ("b.png", image(2)), ("b.txt", b"b")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert read(str(path))[0] == {"a": ["a"], "b": ["b"]}


def test_a_link_in_a_tar_is_reported(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"a.png": image(1), "a.txt": b"a", "b.png": image(2)})
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("b.txt")
        link.type, link.linkname = tarfile.LNKTYPE, "a.txt"
        tar.addfile(link)
    found, left_out = read(path)
    assert found == {"a": ["a"]} and "b.txt" in left_out[None] and left_out["b"] == "no caption"


def test_a_tar_whose_files_lie_in_any_order_is_read(tmp_path):
    names = [f"{n}{end}" for n in range(8) for end in (".jpg", ".txt", ".json")]
    contents = {".jpg": image(1), ".txt": b"x", ".json": b'{"species_list": ["mew"]}'}
    orders = [sorted(names, key=lambda name: name[::-1])]
    orders += [list(np.random.default_rng(seed).permutation(names)) for seed in range(5)]
    for order in orders:
        path = write_tar(tmp_path / "a.tar", {str(name): contents["." + name.split(".")[1]] for name in order})
        rows, damage = index_shard(path)
        assert damage == [] and sorted(row["key"] for row in rows) == [str(n) for n in range(8)]
        assert all(row["labels"] == ["mew"] for row in rows)


def test_heads_that_are_not_kept_are_read_again(tmp_path, monkeypatch):
    path = write_shard(tmp_path / "a.tar", [sample(key) for key in "abc"])
    whole = index_shard(path)
    monkeypatch.setattr(sdxl_data, "MAX_KEPT_BYTES", 0)
    assert index_shard(path) == whole


def test_shards_of_the_same_name_in_two_folders_are_different_images(tmp_path):
    shards = []
    for n, folder in enumerate(("x", "y")):
        (tmp_path / folder).mkdir()
        files = {
            f"00000000{k}{end}": data for k in range(4) for end, data in ((".jpg", image(10 * n + k)), (".txt", b"x"))
        }
        shards.append(write_tar(tmp_path / folder / "00000.tar", files))
    index = load_index(shards, tmp_path)
    assert len(index) == 8 and index.damage == []


def test_other_files_in_a_tar_are_named_but_no_damage(tmp_path):
    files = {
        "README.md": b"x",
        "LICENSE": b"x",
        "a.jpg": image(1),
        "a.png": image(2),
        "a.txt": b"a",
        "metadata.jsonl": b"",
    }
    rows, damage = index_shard(write_tar(tmp_path / "a.tar", files))
    assert [row["key"] for row in rows] == ["a"] and sdxl_data.count_damaged(damage) == 0
    assert sorted(entry["key"] for entry in damage) == ["LICENSE", "README", "a.png", "metadata"]


def test_samples_of_a_whole_tar_that_lack_json_never_end_the_run(tmp_path):
    samples = [sample(f"s{n}", json=None) if n < 2 else sample(f"s{n}") for n in range(20)]
    _, damage = index_shard(write_shard(tmp_path / "a.tar", samples))
    assert len(damage) == 2 and sdxl_data.count_damaged(damage) == 0


def test_a_compressed_tar_is_called_so(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"a.jpg": image(1), "a.txt": b"a"})
    packed = tmp_path / "b.tar"
    packed.write_bytes(gzip.compress(open(path, "rb").read()))
    rows, damage = index_shard(packed)
    assert rows == [] and damage[0]["reason"].startswith("compressed, not a tar")


@pytest.mark.parametrize(
    "labels, names", [(3, ["3"]), (0, ["0"]), ([0, 1], ["0", "1"]), (None, []), (float("nan"), [])]
)
def test_numbers_are_labels_too(labels, names):
    assert sdxl_data.read_labels({"label": labels}, "label") == names


# ---- captions and labels


def test_a_byte_order_mark_is_no_part_of_a_caption_or_of_json(tmp_path):
    mark = b"\xef\xbb\xbf"
    parts = {"txt": mark + b"a mew", "json": mark + b'{"species_list": ["mew"]}'}
    rows, damage = index_shard(write_shard(tmp_path / "a.tar", [sample("a", **parts)]))
    assert damage == [] and rows[0]["captions"] == ["a mew"] and rows[0]["labels"] == ["mew"]


def test_a_tar_without_json_is_fine_even_when_cut(tmp_path):
    samples = [sample(key, json=None) for key in "abcd"]
    path = write_shard(tmp_path / "a.tar", samples)
    assert list(read(path)[0]) == list("abcd")
    with open(path, "rb+") as file:
        file.truncate(tarfile.open(path).getmembers()[-1].offset_data + 512)
    assert list(read(path)[0]) == list("abcd")


def test_a_shard_cut_before_the_json_of_a_sample_loses_that_sample(tmp_path):
    files = {f"{key}.{name}": sample(key)[name] for key in "abcd" for name in ("png", "txt", "json")}
    for cut in (512, 500, 100, 0, -5):  # bytes before the contents of the last .json
        path = write_tar(tmp_path / "a.tar", files)
        last = tarfile.open(path).getmembers()[-1]
        with open(path, "rb+") as file:
            file.truncate(last.offset_data - cut)
        found, left_out = read(path)
        assert list(found) == list("abc") and left_out["d"] == "lost .json: beside a damaged place"


@pytest.mark.parametrize(
    "caption, reason",
    [
        (bytes(20), "control characters"),
        (tarfile.TarInfo("b.png").tobuf()[:300], "control characters"),
        (b'{"image_id": "other", "species_list": ["mew"]}', "JSON in the caption"),
        (b"a mew\x07", "control characters"),
    ],
)
def test_a_caption_that_is_a_piece_of_another_file_is_damage(tmp_path, caption, reason):
    path = write_shard(tmp_path / "a.tar", [sample("a"), sample("b", txt=caption)])
    found, left_out = read(path)
    assert list(found) == ["a"] and reason in left_out["b"]


def test_what_fills_the_last_block_of_a_file_must_be_zeros(tmp_path):
    path = write_shard(tmp_path / "a.tar", [sample(key) for key in "abc"])
    member = next(m for m in tarfile.open(path).getmembers() if m.name == "b.txt")
    with open(path, "rb+") as file:
        file.seek(member.offset_data + member.size)
        file.write(b"x")
    found, left_out = read(path)
    assert list(found) == ["a", "c"] and left_out["b"] == "blocks of another file: at the end of .txt"


@pytest.mark.parametrize("seed", [1, 2])
def test_a_thousand_tars_damaged_at_random_lose_nothing_in_silence_and_give_nothing_wrong(tmp_path, seed):
    total, faults = fuzz(500, seed, tmp_path)
    print(f"seed {seed}: {dict(total)}")
    assert faults == []
    assert total["right"] > 4000 and total["reported"] > 300


# ---- pictures


@pytest.mark.parametrize("kind, extension", [("AVIF", "avif"), ("TIFF", "tif"), ("GIF", "gif"), ("JPEG", "jfif")])
def test_more_kinds_of_images_are_read(tmp_path, kind, extension):
    data = encode(noise_image(1, 40, 30), kind)
    rows, damage = index_shard(write_shard(tmp_path / "a.tar", [sample("a", **{"png": None, extension: data})]))
    assert damage == [] and (rows[0]["height"], rows[0]["width"]) == (30, 40)
    assert open_image(data).size == (40, 30)


def make_profile(red=(0.68, 0.32), gamma=2.2):
    """A matrix profile with primaries near Display P3's, written by hand: Pillow makes no wide-gamut profile."""

    def xyz(x, y, luminance):
        return np.array([x * luminance / y, luminance, (1 - x - y) * luminance / y])

    def fixed(value):
        return int(round(value * 65536)).to_bytes(4, "big", signed=True)

    white = xyz(0.3457, 0.3585, 1.0)
    primaries = np.stack([xyz(x, y, 1.0) for x, y in (red, (0.265, 0.69), (0.15, 0.06))], axis=1)
    primaries = primaries * np.linalg.solve(primaries, white)
    curve = b"curv" + bytes(4) + (1).to_bytes(4, "big") + int(gamma * 256).to_bytes(2, "big") + bytes(2)
    text = b"wide gamut\0"
    tags = {b"desc": b"desc" + bytes(4) + len(text).to_bytes(4, "big") + text + bytes(80)}
    tags |= {b"wtpt": b"XYZ " + bytes(4) + b"".join(map(fixed, white))}
    for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries.T):
        tags[name] = b"XYZ " + bytes(4) + b"".join(map(fixed, column))
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    body, table = b"", len(tags).to_bytes(4, "big")
    offset = 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + (offset + len(body)).to_bytes(4, "big") + len(data).to_bytes(4, "big")
        body += data
    header = bytes(4) + (0x02400000).to_bytes(4, "big") + b"mntrRGB XYZ " + bytes(12) + b"acsp" + bytes(28)
    header += b"".join(map(fixed, (0.9642, 1.0, 0.8249)))
    header += bytes(124 - len(header))
    size = 4 + len(header) + len(table) + len(body)
    return size.to_bytes(4, "big") + header + table + body


WIDE = make_profile()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_a_colour_profile_is_converted_to_srgb(kind):
    colour = (200, 60, 60)
    data = encode(Image.new("RGB", (32, 32), colour), kind, icc_profile=WIDE)
    with_profile = np.array(open_image(data)).mean(axis=(0, 1))
    assert with_profile[0] > 210 and with_profile[1] < 56  # the same red is further out in sRGB
    plain = np.array(open_image(encode(Image.new("RGB", (32, 32), colour), kind))).mean(axis=(0, 1))
    assert np.abs(plain - colour).max() < 4


def test_profiles_of_grey_transparent_and_palette_images(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert open_image(encode(Image.new("RGB", (4, 4), (9, 99, 199)), icc_profile=srgb)).getpixel((0, 0)) == (
        9,
        99,
        199,
    )
    half = Image.new("RGBA", (4, 4), (200, 60, 60, 0))
    assert open_image(encode(half, icc_profile=WIDE)).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("RGB", (4, 4), (200, 60, 60)).quantize(4)
    assert open_image(encode(palette, icc_profile=WIDE)).getpixel((0, 0))[0] > 210
    cmyk = Image.new("CMYK", (16, 16), (0, 200, 200, 0))
    red, green, _ = open_image(encode(cmyk, "JPEG")).getpixel((0, 0))
    assert red > 200 > 90 > green


def test_a_linear_profile_is_converted_whatever_its_name():
    linear = make_profile(red=(0.64, 0.33), gamma=1.0)
    for profile in (linear, linear.replace(b"wide gamut", b"sRGB linea")):
        shown = open_image(encode(Image.new("RGB", (8, 8), (60, 60, 60)), icc_profile=profile)).getpixel((0, 0))
        assert min(shown) > 120


@pytest.mark.parametrize("kind", ["TIFF", "JPEG", "PNG", "WEBP"])
def test_turned_images_have_the_size_that_is_seen(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(noise_image(1, 40, 20), kind, exif=exif)
    picture, original_size, _ = sdxl_data.open_image(data)
    assert picture.size == (20, 40) and original_size == (40, 20) == sdxl_data.measure_image(data)


@pytest.mark.parametrize("profile", [b"no profile at all" * 20, WIDE[:200], WIDE[:16] + b"CMYK" + WIDE[20:]])
def test_a_broken_profile_is_ignored_and_counted_but_is_no_damage(tmp_path, profile):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for n in range(4):
        noise_image(n, 80, 70).save(folder / f"{n}.png", icc_profile=profile if n == 0 else None)
        (folder / f"{n}.txt").write_text("x")
    index = index_of_folder(folder)
    item = sdxl_data.ImageDataset(index, 0, 64, "center", False, "box")[0, -1, 0, 0]
    assert not item["replaced"] and item["skipped"][0]["reason"].startswith("colour profile ignored")
    argv = ["--pretrained_model_name_or_path", SDXL, "--train_data_dir", folder, "--resolution", 64, "--rank", 2]
    argv += ["--train_batch_size", 4, "--max_train_steps", 2, "--max_bad_fraction", 0, "--report_to", "none"]
    argv += ["--mixed_precision", "no", "--logging_steps", 1, "--crop", "center"]
    for name, words in (("plain", []), ("cached", ["--cache_latents"])):
        run = assert_ok(run_trainer([*argv, *words], tmp_path / name))
        assert run.metrics()[0]["skipped/colour profile ignored"] >= 1
        rows = [json.loads(line) for line in (run.output_dir / "skipped.jsonl").read_text().splitlines()]
        assert [(row["key"], row["reason"].partition(":")[0]) for row in rows] == [("0.png", "colour profile ignored")]


def test_megabytes_of_text_in_a_png_are_no_damage(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", json.dumps(["node"] * 500_000))
    info.add_text("prompt", "x" * 3_000_000, zip=True)
    data = encode(noise_image(1, 40, 30), pnginfo=info)
    assert len(data) > 3_000_000
    rows, damage = index_shard(write_shard(tmp_path / "a.tar", [sample("a", png=data)]))
    assert damage == [] and rows[0]["width"] == 40
    assert open_image(data).size == (40, 30)


SPACERS = [(1920, 1), (1, 1920), (4000, 3), (1, 1)]


@pytest.mark.parametrize("size", SPACERS)
@pytest.mark.parametrize("crop", ["random_ar", "center", "bucket"])
def test_a_spacer_is_cropped_like_any_other_image(tmp_path, size, crop):
    dataset = spacer_dataset(tmp_path, size, crop)
    for step in range(4):
        pixels = dataset[0, -1, step, step]["pixels"]
        assert (pixels == pixels.new_tensor([10, 200, 30])[:, None, None]).all()


def spacer_dataset(folder, size, crop):
    (folder / "a.png").write_bytes(encode(Image.new("RGB", size, (10, 200, 30))))
    (folder / "a.txt").write_text("x")
    index = index_of_folder(folder)
    if crop == "bucket":
        index = sdxl_data.assign_buckets(index, 512)
    return sdxl_data.ImageDataset(index, 0, 512, crop, True, "lanczos")


def load_and_measure(folder, size, crop, grown):
    """Puts the growth of this process's peak memory in KB into `grown`."""
    dataset = spacer_dataset(folder, (64, 64), crop)
    dataset[0, -1, 0, 0]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    spacer_dataset(folder, size, crop)[0, -1, 0, 0]
    grown.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def test_a_spacer_takes_no_more_memory_than_another_image(tmp_path):
    context = multiprocessing.get_context("spawn")  # a new process, whose peak nothing else has raised
    grown = context.Queue()
    child = context.Process(target=load_and_measure, args=(tmp_path, (1920, 1), "center", grown))
    child.start()
    assert grown.get(timeout=120) < 100_000  # scaled as a whole it would be 1.5 GB
    child.join()


def test_the_preview_draws_any_shape_and_every_character(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for n, size in enumerate([(1920, 1), (1, 1920), (3000, 20), (80, 70)]):
        noise_image(n, *size).save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text("ピカチュウ, Flabébé ♀ $x$ 😀")
    argv = ["--pretrained_model_name_or_path", SDXL, "--train_data_dir", folder, "--resolution", 64, "--dry_run"]
    run = assert_ok(run_trainer([*argv, "--train_batch_size", 2, "--max_train_steps", 4], tmp_path / "run"))
    assert (run.output_dir / "preview/contact_sheet.png").stat().st_size > 1000
    assert "missing from font" not in run.output
