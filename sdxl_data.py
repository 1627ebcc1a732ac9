"""Read captioned images for SDXL: shards, folders and tables become an index, a plan and batches.

The sections, in the order data flows; each calls only what is above it:
     1 Shared by the scripts   errors, the flag parser, hashes, atomic files, checkpoint folders
     2 Sources                 shard patterns, class counts, prompts; the bytes of a shard, wherever it is stored
     3 Index                   one pass over the tar headers makes a table: one row per sample
     4 Plan                    which rows make up which batch: a pure function of the step
     5 Images and batches      decode, resize, crop; the dataset and its loader
     6 Encoding cache          latents and text embeddings on disk
     7 Preview                 the pictures and charts of --dry_run
train_sdxl_lora.py, evaluate.py and hpo_sweep.py import this file; it imports none of them. Functions that need torch,
datasets or matplotlib import them: loading them takes seconds, and flags are checked before that.
"""

import argparse
import csv
import difflib
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import tarfile
import time
import unicodedata
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import configargparse
import filelock
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet
import safetensors
from braceexpand import braceexpand
from PIL import ExifTags, Image, ImageOps

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # mean "save and exit" to the scripts
LORA_FILE = "pytorch_lora_weights.safetensors"  # in diffusers' format
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp")
MAX_IMAGE_PIXELS = 178_956_970  # larger images are refused by their header: PIL's own limit for decompression bombs
MAX_OPEN_SHARDS = 4096  # shards, or images of a folder, that a process keeps open
IO_ATTEMPTS = 7  # tries of a read over the network, half a minute in all, before the run ends
IO_THREADS = 16  # simultaneous reads over the network per process
READ_AHEAD = 1 << 17  # bytes that indexing reads at once
HEADER_BYTES = 1 << 16  # bytes read of each image to get its size; the full file is read if they are not enough
STAMP_SECONDS = 60  # how often a remote shard is checked for changes
INDEX_VERSION = 3  # part of the index cache's key: raise it when a column changes
IN_TABLE = "row of the dataset"  # instead of a path: the bytes are in a table of --dataset_name
UNLABELLED_ACCEPTANCE = 0.1  # probability that an image without a label is accepted when classes are balanced
MAX_EMPTY_EPOCHS = 10_000  # without one accepted sample before the plan gives up
MAX_DAMAGED_IN_A_ROW = 100  # damaged images replaced one after another before the run ends
BUCKET_STEP = 64  # px; sides of --crop bucket are multiples of it, as in SDXL's training (arXiv:2307.01952, app. I)
AESTHETIC_SCORE = 6.0  # of an image without one: the stock refiner pipeline's default
CACHE_ROWS = 64  # samples in a file of --cache_latents or --cache_text_embeddings
MAX_OPEN_CACHES = 256  # cache files that a process keeps open
CJK_FONTS = ("Noto Sans CJK JP", "Noto Sans JP", "IPAGothic", "IPAexGothic", "Hiragino Sans", "MS Gothic")


# -----------------------------------------------------------------------------
# 1 Shared by the scripts
# -----------------------------------------------------------------------------


class InputError(ValueError):
    """Bad input. The message names the flag or the file, what was found and what to do."""


class HelpFormatter(argparse.HelpFormatter):
    """Adds "(default: …)" to flags that have a default, and shows switches as --[no-]flag."""

    def _format_action_invocation(self, action):
        if isinstance(action, argparse.BooleanOptionalAction):
            return action.option_strings[0].replace("--", "--[no-]", 1)
        return super()._format_action_invocation(action)

    def _get_help_string(self, action):
        text = action.help.replace(" (default: %(default)s)", "")
        if action.default in (None, False, [], argparse.SUPPRESS) or "default" in text:
            return text
        shown = action.default if isinstance(action.default, list) else [action.default]
        return f"{text} (default: {' '.join(map(str, shown))})"


class Parser(configargparse.ArgParser):
    """Argument parser that reports an error in one line, `prog: error: --flag: …`, and exits with status 2."""

    def error(self, message):
        message = " ".join(message.split()).removeprefix("argument ")
        kind, _, words = message.partition(": ")
        flag = words.split(" ")[0].split("=")[0]
        if kind == "unrecognized arguments":
            near = difflib.get_close_matches(flag, self._option_string_actions, 1)
            message = f"{flag}: there is no such flag; " + (f"did you mean {near[0]}?" if near else "see --help")
        elif kind == "the following arguments are required":
            message = f"{words}: missing; see --help"
        elif "config file" in message:
            message = f"--config: {message}"
        self.exit(2, f"{self.prog}: error: {message}\n")


def make_base_parser(usage, description):
    """Returns a parser for a script to add its flags to. It reads YAML files and takes no abbreviated flags."""
    return Parser(
        usage=usage, description=description, config_file_parser_class=configargparse.YAMLConfigFileParser,
        formatter_class=lambda prog: HelpFormatter(prog, max_help_position=34, width=118),
        allow_abbrev=False, add_config_file_help=False, add_env_var_help=False,
    )  # fmt: skip


# Each use of random numbers has its own number. A draw is a hash of (use, seed, what it is drawn for), so none depends
# on the process count, worker count, prefetching or the clock.
ORDER, ACCEPT, LABEL, CROP, FLIP, REPLACE, SUBSET, SAMPLE, DROPOUT_MASK, BUCKET = range(10)


def hash64(*parts):
    """Returns a uint64 hash of integers, or of arrays, element by element: splitmix64 (Steele et al., OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        state = np.uint64(0x9E3779B97F4A7C15)
        for part in parts:
            state = (state ^ np.asarray(part).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def uniform(*parts):
    """Returns random numbers in [0, 1), float64, that depend only on the arguments (see hash64)."""
    return (hash64(*parts) >> np.uint64(11)) * 2.0**-53


def torch_seed(*parts):
    """Returns a seed for torch.Generator that depends only on the arguments (see hash64)."""
    return int(hash64(*parts) >> np.uint64(1))


def hash_text(text):
    """Returns a uint64 hash of a string. It is the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def write_file(path, *parts):
    """Writes bytes atomically: the file is never seen half-written, and is on the disk when this returns."""
    partial = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.partial")
    with open(partial, "wb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_safetensors(path, tensors, metadata):
    """Writes a safetensors file atomically. The header is sorted, so equal tensors give equal files."""
    import safetensors.torch

    raw = safetensors.torch.save(tensors, {"format": "pt", **metadata})
    size = int.from_bytes(raw[:8], "little")
    header = json.dumps(json.loads(raw[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    write_file(path, len(header).to_bytes(8, "little"), header, memoryview(raw)[8 + size :])  # a view: no copy


def list_checkpoints(output_dir):
    """Returns a list of (step, folder), one for each checkpoint in `output_dir`, lowest step first."""
    found = [(re.fullmatch(r"checkpoint-(\d+)", p.name), p) for p in Path(output_dir).glob("checkpoint-*")]
    return sorted((int(match[1]), path) for match, path in found if match)


# -----------------------------------------------------------------------------
# 2 Sources
# -----------------------------------------------------------------------------


def is_remote(path):
    """Returns whether `path` is a URL or a pipe, not a local file."""
    return re.match(r"[a-z][a-z0-9]+:", path) is not None


def looks_like_path(name):
    """Returns whether `name` must be a local folder. A name such as user/model can also be a hub id."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def expand_pattern(pattern):
    """Returns the shards that one pattern of --train_shards stands for. They need not exist."""
    if Path(pattern).is_dir():
        return sorted(map(str, Path(pattern).glob("*.tar")))
    if pattern.startswith("pipe:") and "{" not in pattern:
        return [pattern]
    is_bucket = is_remote(pattern) and not pattern.startswith(("pipe:", "http"))
    if is_bucket and "." not in Path(pattern).name:  # a folder in a bucket
        filesystem, folder = fsspec.url_to_fs(pattern)
        return [filesystem.unstrip_protocol(p) for p in sorted(filesystem.glob(folder.rstrip("/") + "/*.tar"))]
    return [path for part in pattern.split("::") for path in braceexpand(part)]  # a::b is webdataset's notation


def expand_shards(patterns):
    """Returns the shards of a list of patterns: .tar files, folders, brace patterns, folders in a bucket, pipes.

    Raises ValueError if a pattern gives no shard or names a local file that does not exist.
    """
    shards = []
    for pattern in patterns:
        found = expand_pattern(pattern)
        if not found:
            raise ValueError(f"no .tar file in {pattern}")
        missing = [p for p in found if not is_remote(p) and not Path(p).is_file()]
        if missing:
            raise ValueError(f"{pattern}: no file {missing[0]}; {len(missing)} of {len(found)} missing")
        shards += found
    return shards


def read_species_csv(path):
    """Returns {label in lower case: count}. Raises ValueError if a column is missing or a count is wrong."""
    counts = Counter()
    with open(path, newline="", encoding="utf-8-sig") as file:  # spreadsheets write a byte order mark
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        name = next((c for c in ("pokemon", "species") if c in columns), None)
        if name is None or "count" not in columns:
            found = ", ".join(columns) or "(none)"
            raise ValueError(f"{path} has columns {found}; expected pokemon (or species) and count")
        for row in reader:
            try:
                count = float(row["count"])
            except (TypeError, ValueError):
                count = -1
            if not 0 <= count < math.inf:
                raise ValueError(f"{path} line {reader.line_num}: count {row['count']!r} is not a number of 0 or more")
            counts[(row[name] or "").strip().casefold()] += count
    if not sum(counts.values()):
        raise ValueError(f"{path} has no count above 0")
    return counts


def retry(action, path):
    """Returns action(), tried up to IO_ATTEMPTS times. Raises OSError if no try succeeds or the file is missing."""
    import aiohttp  # takes 0.2 s, and only remote shards need it

    for attempt in range(1, IO_ATTEMPTS + 1):
        try:
            return action()
        except (FileNotFoundError, PermissionError) as error:
            raise type(error)(f"{path}: {error}") from error
        except (OSError, aiohttp.ClientError) as error:
            if attempt == IO_ATTEMPTS or 400 <= getattr(error, "status", 0) < 500:
                raise OSError(f"{path}: {error!r} after {attempt} tries") from error
            time.sleep(0.25 * 2**attempt)


def copy_shard(path, stamp, cache_dir):
    """Copies a shard from a URL or a pipe to `cache_dir`, unless it is there. Returns the path of the copy."""
    folder = Path(cache_dir) / "shards"
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / f"{hash_text(f'{path} {stamp}'):016x}.tar"
    partial = copy.with_suffix(".partial")

    def download():
        with open(partial, "wb") as file:
            if path.startswith("pipe:"):
                command = ["bash", "-o", "pipefail", "-c", path.removeprefix("pipe:")]
                status = subprocess.run(command, stdout=file).returncode
                if status:
                    raise OSError(f"exit status {status}")
            else:
                with urllib.request.urlopen(path, timeout=60) as response:
                    shutil.copyfileobj(response, file, 1 << 20)
        expected = stamp.split()[0]  # "None" for a pipe
        if expected not in ("None", str(partial.stat().st_size)):
            raise OSError(f"{partial.stat().st_size} bytes, expected {expected}")

    with filelock.FileLock(copy.with_suffix(".lock")):  # another process may be copying it
        if not copy.exists():
            retry(download, path)
            os.replace(partial, copy)
    return str(copy)


class Shard:
    """A shard or a single image file to read from. Pipes, and files that a server sends only whole, are copied first.

    `stamp` identifies the version of a file: its size and modification time, or its size and ETag for a URL. It never
    changes for a pipe. Each process must make its own Shard, because connections do not survive a fork.
    """

    def __init__(self, path, cache_dir):
        self.path = path
        self.block = (0, b"")  # (offset, bytes) read last by peek()
        self.checked = time.monotonic()
        self.copied = path.startswith("pipe:")
        self.stamp = "None"
        if not self.copied:
            self.filesystem, self.url = fsspec.url_to_fs(path)
            self.stamp = self.current_stamp()
            if path.startswith("http"):
                self.copied = not retry(self.allows_ranges, path)
        if self.copied:
            self.filesystem, self.url = fsspec.url_to_fs(copy_shard(path, self.stamp, cache_dir))
            self.size = self.filesystem.size(self.url)

    def allows_ranges(self):
        """Returns whether the web server answers range requests."""
        request = urllib.request.Request(self.path, headers={"Range": "bytes=0-0"})
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status == 206

    def current_stamp(self):
        if self.copied:
            return self.stamp
        self.filesystem.invalidate_cache()
        info = retry(lambda: self.filesystem.info(self.url), self.path)
        self.size = info["size"]
        times = [info.get(name) for name in ("ETag", "LastModified", "Last-Modified", "mtime")]
        return f"{self.size} {next(filter(None, times), None)}"

    def check_stamp(self, expected):
        """Raises OSError if the shard has changed since indexing. Looks at a remote shard only once a minute."""
        if is_remote(self.path) and time.monotonic() - self.checked < STAMP_SECONDS:
            return
        self.stamp = self.current_stamp()
        self.checked = time.monotonic()
        if expected is not None and self.stamp != expected:
            raise OSError(f"{self.path}: changed during the run; start again to index it again")

    def read_once(self, offset, size):
        data = self.filesystem.cat_file(self.url, start=offset, end=offset + size)
        if len(data) != size:
            raise OSError(f"{self.path}: {len(data)} bytes at {offset}, expected {size}; changed since indexing?")
        return data

    def read(self, offset, size):
        """Returns `size` bytes, starting at `offset`. Raises OSError if the file is too short or cannot be read."""
        if is_remote(self.path):
            return retry(lambda: self.read_once(offset, size), self.path)
        return self.read_once(offset, size)

    def peek(self, offset, size):
        """Like read(), but for many small reads in a row: reads READ_AHEAD bytes at once and keeps them."""
        start, block = self.block
        if not start <= offset <= offset + size <= start + len(block):
            block = self.read(offset, max(size, min(READ_AHEAD, self.size - offset)))
            start = offset
            self.block = (start, block)
        return block[offset - start : offset - start + size]


# -----------------------------------------------------------------------------
# 3 Index
# -----------------------------------------------------------------------------

INDEX_SCHEMA = pa.schema({
    "key": pa.string(), "image_id": pa.string(), "caption": pa.string(), "labels": pa.list_(pa.string()),
    "width": pa.int32(), "height": pa.int32(), "score": pa.float32(),
    "path": pa.string(), "offset": pa.int64(), "size": pa.int64(),
})  # fmt: skip


@dataclass(frozen=True)
class Fields:
    """Where the parts of a sample are: names of a table's columns or of the fields in a shard's JSON files."""

    image: str = "image"
    caption: str = "text"
    labels: str = "species_list"
    score: str = "ae_aesthetic"


def iter_tar_members(shard, report):
    """Yields (name, offset, size, first bytes) of each file in a tar. Verifies the checksums of the tar headers.

    At a damaged place, calls report(reason), yields None and goes on at the next valid header. Does not stop at blocks
    of zeros: they end a tar, but are also found in damaged tars and in black images.
    """
    position = zero_blocks = 0
    long_name = None
    lost = False  # between a damaged header and the next valid one
    while position + 512 <= shard.size:
        block = shard.peek(position, 512)
        position += 512
        try:
            member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.EOFHeaderError:
            zero_blocks += 1
            continue
        except tarfile.HeaderError:
            if not lost:
                report(f"bad tar header: at byte {position - 512}")
                yield None
            lost = True
            zero_blocks = 0
            continue
        if zero_blocks and not lost:
            report(f"zero blocks: before byte {position - 512}")
            yield None
        lost = False
        zero_blocks = 0
        if position + member.size > shard.size:
            report(f"shard cut short: inside {long_name or member.name}")
            return
        if member.type == tarfile.GNUTYPE_LONGNAME:
            long_name = shard.peek(position, member.size).rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif member.type == tarfile.XHDTYPE:  # pax: lines "LENGTH key=value"
            found = re.search(rb"^\d+ path=(.*)$", shard.peek(position, member.size), re.MULTILINE)
            long_name = found[1].decode("utf-8", "surrogateescape") if found else None
        elif member.isreg():
            head = shard.peek(position, min(member.size, HEADER_BYTES))
            yield long_name or member.name, position, member.size, head
            long_name = None
        position += -(-member.size // 512) * 512
    if zero_blocks < 2:
        report("shard cut short: no end-of-archive mark")


def group_members(members):
    """Yields (key, {extension: member}) for each sample. The key is the path up to the first dot of the file name.

    A sample next to a damaged place gets an extra extension, "damage", because one of its files may be lost.
    """
    current = None
    sample = {}
    beside_damage = False
    for member in members:
        if member is None:
            beside_damage = True
            sample["damage"] = None
            continue
        name, *place = member
        folder, _, filename = name.rpartition("/")
        stem, _, extension = filename.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        extension = extension.lower()
        if key != current or extension in sample:
            if current is not None:
                yield current, sample
            current = key
            sample = {"damage": None} if beside_damage else {}
        sample[extension] = tuple(place)
        beside_damage = False
    if current is not None:
        yield current, sample


def read_labels(metadata, name):
    """Returns a sample's labels in lower case. Raises ValueError if they are no list and no comma-separated string."""
    labels = metadata.get(name) or []
    labels = labels.split(",") if isinstance(labels, str) else labels
    if not isinstance(labels, list):
        raise ValueError(f"{name} is {labels!r}, not a list or a text")
    names = [str(label).strip().casefold() for label in labels if label is not None]
    return list(dict.fromkeys(name for name in names if name))


def number_or_none(value):
    """Returns `value` if it is a number between -2³¹ and 2³¹. Returns None for anything else."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and abs(value) < 2**31 else None


def oriented_size(image):
    """Returns an image's (height, width) after EXIF rotation. Raises ValueError for a decompression bomb."""
    width, height = image.size
    if width * height > MAX_IMAGE_PIXELS:
        raise ValueError(f"decompression bomb: {width}x{height} px is too large")
    # a PNG's EXIF may come after the pixels, and Pillow would decode them to look for it
    has_exif = image.format != "PNG" or {"exif", "Raw profile type exif"} & image.info.keys()
    is_turned = has_exif and image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    return (width, height) if is_turned else (height, width)


def measure_image(head, read_all=None):
    """Returns an image's (height, width), from its first bytes or, if those are not enough, from read_all().

    Raises ValueError if the image cannot be decoded or has more than MAX_IMAGE_PIXELS.
    """
    try:
        return oriented_size(Image.open(io.BytesIO(head)))
    except Exception:  # Pillow wants all of a WebP, and of a JPEG with long EXIF
        data = read_all() if read_all is not None else head
    try:
        return oriented_size(Image.open(io.BytesIO(data)))
    except ValueError:
        raise
    except Exception as error:  # decoders raise all kinds of errors for damaged files
        raise ValueError(f"cannot decode image: {error}") from None


def read_member(shard, member):
    """Returns all bytes of a file in a shard. `member` is the file's (offset, size, first bytes)."""
    offset, size, head = member
    return head if len(head) == size else shard.read(offset, size)


def index_sample(shard, key, members, fields):
    """Returns a sample's row of the index. Raises ValueError if a part of the sample is missing, empty or damaged."""
    image = next((e for e in IMAGE_EXTENSIONS if e in members), None)
    if image is None:
        raise ValueError("no image")
    offset, size, head = members[image]
    if size == 0:
        raise ValueError("image of zero bytes")
    if "txt" not in members:
        raise ValueError("no caption")
    if "damage" in members and "json" not in members:
        raise ValueError("no .json, beside a damaged header")
    try:
        caption = read_member(shard, members["txt"]).decode("utf-8").strip()
    except UnicodeDecodeError:
        raise ValueError("caption is not UTF-8") from None
    if not caption:
        raise ValueError("empty caption")
    try:
        metadata = json.loads(read_member(shard, members["json"])) if "json" in members else {}
    except ValueError:
        raise ValueError("bad JSON") from None
    if not isinstance(metadata, dict):
        raise ValueError("JSON is not an object")
    image_id = str(metadata.get("image_id") or f"{shard.path.rpartition('/')[2]}/{key}")
    if not image_id.isprintable():  # a lone surrogate, for instance
        raise ValueError("image_id is not text")
    height, width = measure_image(head, lambda: read_member(shard, members[image]))
    return {
        "key": key, "image_id": image_id, "caption": caption, "labels": read_labels(metadata, fields.labels),
        "width": width, "height": height, "score": number_or_none(metadata.get(fields.score)),
        "path": shard.path, "offset": offset, "size": size,
    }  # fmt: skip


def index_shard(shard, fields):
    """Returns two lists: the shard's index rows, and a {"shard", "key", "reason"} for each damaged place or sample."""
    rows, damage = [], []
    seen = set()

    def report(reason, key=None):
        damage.append({"shard": shard.path, "key": key, "reason": reason})

    for key, members in group_members(iter_tar_members(shard, report)):
        if key in seen:
            report("duplicate key", key)
            continue
        seen.add(key)
        try:
            rows.append(index_sample(shard, key, members, fields))
        except ValueError as error:
            report(str(error), key)
    return rows, damage


def cached_index_shard(path, cache_dir, fields):
    """Returns a shard's index as a table. Reads the shard only if `cache_dir` has no table for its current stamp."""
    shard = Shard(path, cache_dir.parent)
    name = path if is_remote(path) else os.path.abspath(path)
    cache_key = f"{INDEX_VERSION} {name} {shard.stamp} {fields.labels} {fields.score}"
    cached = cache_dir / f"{hash_text(cache_key):016x}.parquet"
    if not cached.exists():
        rows, damage = index_shard(shard, fields)
        notes = {"damage": json.dumps(damage), "stamp": json.dumps({path: shard.stamp})}
        table = pa.Table.from_pylist(rows, INDEX_SCHEMA).replace_schema_metadata(notes)
        partial = cached.with_suffix(f".{os.getpid()}.tmp")
        pa.parquet.write_table(table, partial)
        os.replace(partial, cached)  # atomic: another process may have made the same file
    return pa.parquet.read_table(cached)


def load_table(flag, source, fields, config_name=None, cache_dir=None):
    """Loads the table that --train_data_dir or --dataset_name gives, without decoding its images.

    Raises InputError naming the flag if the table does not load, lacks a column, or its image column has no images.
    """
    import datasets

    try:
        if flag == "--train_data_dir":
            table = datasets.load_dataset("imagefolder", data_dir=source, split="train", cache_dir=cache_dir)
        elif (Path(source) / "dataset_info.json").exists() or (Path(source) / "dataset_dict.json").exists():
            table = datasets.load_from_disk(source)
            table = table["train"] if isinstance(table, datasets.DatasetDict) else table
        else:
            table = datasets.load_dataset(source, config_name, split="train", cache_dir=cache_dir)
    except Exception as error:  # the libraries below raise all kinds of errors
        raise InputError(f"{flag}: {source}: {error}") from error
    for column_flag, column in (("--image_column", fields.image), ("--caption_column", fields.caption)):
        if column not in table.column_names:
            raise InputError(f"{column_flag}: {source} has columns {', '.join(table.column_names)}; found no {column}")
    if not isinstance(table.features[fields.image], datasets.Image):
        raise InputError(f"--image_column: {fields.image} of {source} holds no images")
    return table.cast_column(fields.image, datasets.Image(decode=False))


def index_table(table, source, is_folder, fields):
    """Returns two lists: the table's index rows, and a {"shard", "key", "reason"} for each damaged row."""
    rows, damage = [], []
    for number, row in enumerate(table):
        image = row[fields.image] or {}
        caption = row[fields.caption]
        if isinstance(caption, list):
            caption = next(iter(caption), None)
        caption = str(caption or "").strip()
        path = image.get("path")
        data = image.get("bytes")
        name = os.path.relpath(path, source) if is_folder else f"row {number}"
        place = {"path": IN_TABLE, "offset": number, "size": -1}
        try:
            if not caption:
                raise ValueError("no caption")
            if data is None:
                data = Path(path).read_bytes()
                place = {"path": path, "offset": 0, "size": len(data)}
            height, width = measure_image(data)
            labels = read_labels(row, fields.labels)
        except (ValueError, TypeError, OSError) as error:
            damage.append({"shard": source, "key": name, "reason": str(error)})
            continue
        rows.append({
            "key": name, "image_id": str(row.get("image_id") or name), "caption": caption, "labels": labels,
            "width": width, "height": height, "score": number_or_none(row.get(fields.score)), **place,
        })  # fmt: skip
    return rows, damage


@dataclass(frozen=True)
class Index:
    """All usable samples, one row each. Row i has the labels label_codes[label_starts[i]:label_starts[i + 1]]."""

    table: pa.Table
    damage: list  # [{"shard", "key", "reason"}]
    total: int  # all samples found, including damaged ones and those that --max_train_samples leaves out
    id_hashes: np.ndarray  # (N,) uint64
    label_names: list
    label_codes: np.ndarray  # (M,) int32, into label_names
    label_starts: np.ndarray  # (N + 1,) int64
    buckets: np.ndarray  # (N,) int64, into bucket_sizes
    bucket_sizes: tuple = ()  # [(height, width)] of --crop bucket; empty for the one square bucket of other crops
    stamps: dict = field(default_factory=dict)  # {shard: Shard.stamp when it was indexed}
    images: object = None  # datasets.Dataset that holds the bytes of rows at IN_TABLE
    image_column: str = "image"

    def __len__(self):
        return len(self.id_hashes)

    def row(self, i):
        return {name: self.table.column(name)[int(i)].as_py() for name in self.table.column_names}

    def sizes(self):
        """Returns the (height, width) of all image files in px, (N, 2) float64."""
        return np.stack([self.table.column(side).to_numpy() for side in ("height", "width")], axis=1).astype(float)

    def scales(self, resolution):
        """Returns the crop size of each image divided by its full size, (N, 2): for height and for width."""
        return np.array(self.bucket_sizes or [(resolution, resolution)])[self.buckets] / self.sizes()

    def label_weights(self, choice):
        """Returns three arrays with one entry per label: its row, code and weight. "first" skips further labels."""
        counts = np.diff(self.label_starts)
        if choice == "first":
            rows = np.flatnonzero(counts)
            return rows, self.label_codes[self.label_starts[rows]], np.ones(len(rows))
        return np.repeat(np.arange(len(self)), counts), self.label_codes, np.repeat(1 / np.maximum(counts, 1), counts)

    def fingerprint(self):
        """Returns a hash of all ids, captions, labels and scores, whatever the order of the samples."""
        columns = [self.table.column(name).to_pylist() for name in ("image_id", "caption", "labels", "score")]
        digest = np.bitwise_xor.reduce([np.uint64(hash_text(repr(row))) for row in zip(*columns)])
        return f"{len(self)}-{int(digest):016x}"


def damage_kind(entry):
    """Returns the kind of a damage entry: its reason up to the first colon, such as "bad tar header"."""
    return entry["reason"].partition(":")[0]


def count_damaged(damage):
    """Returns the number of damaged samples. A damaged shard in which no damaged sample is known counts as one."""
    named = {(d["shard"], d["key"]) for d in damage if d["key"] is not None}
    cut_shards = {d["shard"] for d in damage} - {shard for shard, _ in named}
    return len(named) + len(cut_shards)


def drop_duplicates(table, damage):
    """Keeps the first row of each image_id. Returns the table, and `damage` with the removed rows added."""
    ids = np.array([hash_text(i) for i in table.column("image_id").to_pylist()], dtype=np.uint64)
    kept = np.sort(np.unique(ids, return_index=True)[1])
    dropped = table.take(np.setdiff1d(np.arange(len(ids)), kept)).to_pylist()
    for row in dropped:
        reason = f"duplicate image_id: {row['image_id']}"
        damage = [*damage, {"shard": row["path"], "key": row["key"], "reason": reason}]
    return table.take(kept) if dropped else table, damage


def make_index(table, damage, total=None, stamps=None, images=None, image_column="image"):
    """Returns the Index of a table that has INDEX_SCHEMA's columns. Without `total`, counts all rows and damage."""
    table = table.combine_chunks()
    labels = table.column("labels").combine_chunks()
    names = sorted(set(labels.flatten().to_pylist()))
    codes = pa.compute.index_in(labels.flatten(), pa.array(names, pa.string()))
    if total is None:
        total = len(table) + count_damaged(damage)
    return Index(
        table, damage, total, stamps=stamps or {}, images=images, image_column=image_column,
        id_hashes=np.array([hash_text(i) for i in table.column("image_id").to_pylist()], dtype=np.uint64),
        label_names=names,
        label_codes=codes.to_numpy(zero_copy_only=False).astype(np.int32),
        label_starts=labels.offsets.to_numpy().astype(np.int64),
        buckets=np.zeros(len(table), dtype=np.int64),
    )  # fmt: skip


# -----------------------------------------------------------------------------
# 4 Plan
# -----------------------------------------------------------------------------


# Seam: which samples are trained on. Contract: acceptance(step) has a number in [0, 1] per label and one for no label.
class SpeciesMix:
    """Class probabilities p = (1 - m) · uniform + m · data. The weight m changes with the optimizer step.

    Let a(s) be the share of class s among labelled samples, and c the smallest a / p. A sample of class s is accepted
    with probability c · p(s) / a(s). Accepted samples then follow p. Unlabelled ones are accepted at a fixed rate.
    """

    def __init__(self, index, choice, csv_counts=None, start=0.2, end=0.95, steps=6000, schedule="linear"):
        self.start, self.end, self.steps, self.schedule = start, end, steps, schedule
        self.names = index.label_names
        _, codes, weights = index.label_weights(choice)
        arrivals = np.bincount(codes, weights=weights, minlength=len(self.names))
        self.support = arrivals > 0  # with `first`, a label may never come first
        self.arrival = arrivals / max(arrivals.sum(), 1)
        counts = csv_counts or dict(zip(self.names, arrivals))
        self.absent = sorted(set(counts) - {name for name, arrives in zip(self.names, self.support) if arrives})
        data = np.where(self.support, [counts.get(name, 0.0) for name in self.names], 0.0)
        if self.support.any() and data.sum() == 0:
            raise InputError("--species_csv: none of its species is in the data; check --species_key and the spelling")
        self.data = data / max(data.sum(), 1e-300)
        self.uniform = self.support / max(self.support.sum(), 1)

    def weight_of_data(self, step):
        """Returns the weight m at an optimizer step, counted from 0."""
        progress = min(step / self.steps, 1.0) if self.steps else 1.0
        if self.schedule == "cosine":
            progress = 0.5 - 0.5 * math.cos(math.pi * progress)
        return self.start + (self.end - self.start) * progress

    def target(self, step):
        """Returns the class probabilities p at an optimizer step, (K,)."""
        m = self.weight_of_data(step)
        return (1 - m) * self.uniform + m * self.data

    def acceptance(self, step):
        """Returns the acceptance probability of each class and, last, of samples without a label, (K + 1,)."""
        if not self.support.any():
            return np.ones(1)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(self.support, self.target(step) / self.arrival, 0.0)
        return np.append(ratio / ratio.max(), UNLABELLED_ACCEPTANCE)


class SamplePlan:
    """Chooses the rows of each global batch. The choice depends only on the data, the mix, the seed and the step.

    A batch has rows of one bucket. A bucket's probability is its share of the accepted samples. In an epoch, each row
    of a bucket comes up once, in random order, and is accepted or skipped at random. Over all buckets, the classes
    follow the mix. The state to save is `step`, `samples` and `cursors`, an [epoch, position] for each bucket.
    """

    def __init__(self, index, mix, choice, seed, global_batch, step=0, cursors=None, samples=None):
        bucket_count = max(1, len(index.bucket_sizes))
        self.index = index
        self.mix = mix
        self.choice = choice
        self.seed = seed
        self.global_batch = global_batch
        self.step = step
        self.samples = step * global_batch if samples is None else samples  # delivered so far
        self.cursors = [list(cursor) for cursor in cursors or [(0, 0)] * bucket_count]  # [epoch, position]
        self.members = [np.flatnonzero(index.buckets == bucket) for bucket in range(bucket_count)]
        self.epochs = {}  # bucket → (its epoch, what begin_epoch returned for it)
        self.arrivals = np.zeros((bucket_count, len(mix.names) + 1))  # per epoch, of each class and last of no class
        rows, codes, weights = index.label_weights(choice)
        np.add.at(self.arrivals, (index.buckets[rows], codes), weights)
        unlabelled = index.buckets[np.diff(index.label_starts) == 0]
        self.arrivals[:, -1] = np.bincount(unlabelled, minlength=bucket_count)

    def begin_epoch(self, bucket, epoch):
        """Returns a bucket's rows in the epoch's order, their labels (-1: none), and random numbers in [0, 1)."""
        rows = self.members[bucket]
        rows = rows[np.argsort(hash64(ORDER, self.seed, epoch, self.index.id_hashes[rows]), kind="stable")]
        ids = self.index.id_hashes[rows]
        starts = self.index.label_starts[rows]
        counts = self.index.label_starts[rows + 1] - starts
        # one of each row's labels: the first, or one drawn anew in every epoch
        pick = np.zeros(len(ids)) if self.choice == "first" else uniform(LABEL, self.seed, epoch, ids)
        at = starts + np.minimum((pick * counts).astype(np.int64), np.maximum(counts - 1, 0))
        codes = np.append(self.index.label_codes, -1)
        labels = np.where(counts > 0, codes[np.minimum(at, len(codes) - 1)], -1)
        return rows, labels, uniform(ACCEPT, self.seed, epoch, ids)

    def bucket_weights(self, step):
        """Returns the probability of each bucket at an optimizer step, (buckets,)."""
        accepted = self.arrivals @ self.mix.acceptance(step)
        return accepted / accepted.sum()

    def next_batch(self):
        """Returns the rows and labels of the next global batch, and advances by one step."""
        draw = uniform(BUCKET, self.seed, self.step)
        bucket = int(np.searchsorted(np.cumsum(self.bucket_weights(self.step))[:-1], draw, side="right"))
        acceptance = self.mix.acceptance(self.step)
        # Only the ratios matter: scale them so that the likeliest class of this bucket is always accepted.
        acceptance = acceptance / acceptance[self.arrivals[bucket] > 0].max()
        cursor = self.cursors[bucket]
        rows, labels = [], []
        epochs = 0
        while len(rows) < self.global_batch:
            if bucket not in self.epochs or self.epochs[bucket][0] != cursor[0]:
                self.epochs[bucket] = (cursor[0], self.begin_epoch(bucket, cursor[0]))
            order, order_labels, draws = self.epochs[bucket][1]
            if cursor[1] >= len(order):
                cursor[:] = [cursor[0] + 1, 0]
                epochs += 1
                if epochs > MAX_EMPTY_EPOCHS:
                    raise RuntimeError(f"--species_mix: no sample was accepted in {MAX_EMPTY_EPOCHS} epochs")
                continue
            arriving = slice(cursor[1], cursor[1] + 65536)
            accepted = np.flatnonzero(draws[arriving] < acceptance[order_labels[arriving]])
            accepted = cursor[1] + accepted[: self.global_batch - len(rows)]
            rows.extend(order[accepted])
            labels.extend(order_labels[accepted])
            if len(rows) == self.global_batch:
                cursor[1] = int(accepted[-1]) + 1
            else:
                cursor[1] = min(arriving.stop, len(order))
        self.step += 1
        self.samples += self.global_batch
        return np.array(rows), np.array(labels)


@dataclass
class MicroBatches:
    """Yields one rank's micro-batches: lists of requests (row, label, step, position), as ImageDataset takes them.

    The plan is ahead of training, because loaders prefetch. `states[n]` keeps the plan's cursors after n steps.
    """

    plan: SamplePlan
    last_step: int
    batch_size: int
    rank: int
    world: int
    states: dict = field(default_factory=dict)

    def __iter__(self):
        while self.plan.step < self.last_step:
            step = self.plan.step
            first = self.plan.samples
            rows, labels = self.plan.next_batch()
            self.states[self.plan.step] = [tuple(cursor) for cursor in self.plan.cursors]
            stride = self.batch_size * self.world
            for start in range(self.rank * self.batch_size, len(rows), stride):
                places = range(start, start + self.batch_size)
                yield [(int(rows[i]), int(labels[i]), step, first + i) for i in places]


# -----------------------------------------------------------------------------
# 5 Images and batches
# -----------------------------------------------------------------------------


def open_image(data, cover=None):
    """Returns an image as RGB, upright and on white, and the (height, width) of its file.

    Decodes a JPEG at 1/2, 1/4 or 1/8 of its size if the result has at least the size `cover`, (height, width). That is
    four times as fast. Raises ValueError if the image is damaged, cut short or a decompression bomb.
    """
    try:
        image = Image.open(io.BytesIO(data))
        original_size = oriented_size(image)
        if cover is not None:
            is_turned = original_size != (image.height, image.width)
            image.draft(None, cover if is_turned else cover[::-1])
        image.load()
        if image.format == "PNG":
            original_size = oriented_size(image)  # now with the EXIF from behind the pixels
        ImageOps.exif_transpose(image, in_place=True)  # without in_place an upright image would be copied
        if image.mode.startswith("I"):  # 16 bits per pixel: Pillow would clip, not scale
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    except Exception as error:  # decoders raise all kinds of errors for damaged files
        raise ValueError(f"cannot decode image: {error}") from None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB"), original_size


# Seam: buckets. Contract: (height, width) in multiples of BUCKET_STEP px; a row keeps its bucket for the whole run.
def make_buckets(resolution):
    """Returns the (height, width) of each bucket in px: aspect ratios from 1:4 to 4:1, area at most resolution²."""
    shorts = range(-(-resolution // 2 // BUCKET_STEP) * BUCKET_STEP, resolution + 1, BUCKET_STEP)
    tall = {(resolution**2 // short // BUCKET_STEP * BUCKET_STEP, short) for short in shorts if short}
    return sorted(tall | {(short, long) for long, short in tall})


def nearest_buckets(sizes, buckets):
    """Returns the index of the bucket nearest in aspect ratio, for each (height, width) in `sizes` (N, 2)."""
    ratios = np.log([height / width for height, width in buckets])
    own_ratios = np.log(sizes[:, 0] / sizes[:, 1])
    return np.abs(own_ratios[:, None] - ratios).argmin(axis=1)


def assign_buckets(index, resolution):
    """Returns a copy of the Index in which every row has a bucket."""
    bucket_sizes = make_buckets(resolution)
    return replace(index, bucket_sizes=bucket_sizes, buckets=nearest_buckets(index.sizes(), bucket_sizes))


# Seam: crops. Contract: (top, left) of a window inside the image. ImageDataset.crop_window calls the one of --crop.
def random_ar_crop(height, width, resolution, u):
    """Returns (top, left) of a square crop near the middle. Above 2:1, it is in the middle or at the top or left."""
    long = max(height, width)
    ratio = long / min(height, width)
    margin = long - resolution
    if ratio > 2:
        offset = margin / 2 if u < 0.5 else 0.0
    else:
        jitter = 0.06 + 0.12 * min(max((ratio - 1) / 0.7, 0.0), 1.0)
        offset = margin / 2 + (2 * u - 1) * jitter * margin
    offset = int(round(offset))
    return (offset, 0) if height > width else (0, offset)


def center_crop(height, width, bucket):
    """Returns (top, left) of a crop with the size `bucket` in the middle of the image."""
    return int(round((height - bucket[0]) / 2)), int(round((width - bucket[1]) / 2))


def scale_aesthetic(value, scale):
    """Returns value / scale, clamped to [1, 10]. Returns AESTHETIC_SCORE if `value` is None."""
    return AESTHETIC_SCORE if value is None else min(max(value / scale, 1.0), 10.0)


class ImageDataset:
    """Decodes and crops images. A request is (row, label, step, position); position counts the samples of the run."""

    def __init__(
        self, index, seed, resolution, crop, random_flip, interpolation, cache_dir=None, aesthetic_scale=10.0
    ):
        self.index, self.seed, self.cache_dir, self.aesthetic_scale = index, seed, cache_dir, aesthetic_scale
        self.resolution, self.crop, self.random_flip = resolution, crop, random_flip
        self.interpolation = Image.Resampling[interpolation.removesuffix("_exact").upper()]
        self.bucket_sizes = index.bucket_sizes or [(resolution, resolution)]
        self.shards = {}  # (process, path) → Shard

    def bucket_size(self, i):
        """Returns the (height, width) to which row i is cropped."""
        return self.bucket_sizes[self.index.buckets[i]]

    def read(self, row):
        """Returns the bytes of a row's image file. Raises OSError if its shard has changed or cannot be read."""
        if row["path"] == IN_TABLE:
            return self.index.images[row["offset"]][self.index.image_column]["bytes"]
        place = (os.getpid(), row["path"])
        shard = self.shards.get(place)
        if shard is None:
            if len(self.shards) >= MAX_OPEN_SHARDS:
                self.shards.pop(list(self.shards)[0], None)
            shard = Shard(row["path"], self.cache_dir)
            self.shards[place] = shard
        shard.check_stamp(self.index.stamps.get(row["path"]))
        return shard.read(row["offset"], row["size"])

    def open(self, row, bucket):
        """Returns a row's image and the (height, width) of its file. Raises ValueError if the image is damaged."""
        image, original_size = open_image(self.read(row), bucket)
        if len(self.bucket_sizes) > 1 and original_size != (row["height"], row["width"]):
            raise ValueError("EXIF behind the pixels turns the image: wrong bucket")
        return image, original_size

    def is_flipped(self, row, step):
        return self.random_flip and bool(uniform(FLIP, self.seed, hash_text(row["image_id"]), step) < 0.5)

    def crop_window(self, row, bucket, step, flipped):
        """Returns a row's crop: pixels (3, H, W) uint8, original size, crop offset and target size."""
        import torch

        image, original_size = self.open(row, bucket)
        height, width = bucket
        image = ImageOps.cover(image, (width, height), self.interpolation)
        if flipped:
            image = ImageOps.mirror(image)
        if self.crop == "random_ar":
            u = float(uniform(CROP, self.seed, hash_text(row["image_id"]), step))
            top, left = random_ar_crop(image.height, image.width, height, u)
        else:
            top, left = center_crop(image.height, image.width, bucket)
        image = image.crop((left, top, left + width, top + height))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        sizes = {"original_sizes": original_size, "crop_top_lefts": (top, left), "target_sizes": bucket}
        return {"pixels": pixels, **sizes}

    def load(self, row, bucket, step):
        """Returns a row's crop, as crop_window() does. The step decides its position and whether it is mirrored."""
        return self.crop_window(row, bucket, step, self.is_flipped(row, step))

    def flips(self, rows):
        """Returns a list: the crop of rows[0] and, with random_flip, its mirror image. Returns a reason if damaged."""
        bucket = self.bucket_size(rows[0])
        try:
            return [self.crop_window(self.index.row(rows[0]), bucket, 0, flip) for flip in range(1 + self.random_flip)]
        except ValueError as error:
            return str(error)

    def replacement(self, i, label, tried, same_bucket=False):
        """Returns a row to use instead of damaged row i. It has the same class and bucket if possible."""
        in_bucket = self.index.buckets == self.index.buckets[i]
        of_class = np.zeros(len(self.index), dtype=bool)
        if label >= 0:
            owners = np.repeat(np.arange(len(self.index)), np.diff(self.index.label_starts))
            of_class[owners[self.index.label_codes == label]] = True
        choices = (in_bucket & of_class, in_bucket, np.ones_like(in_bucket))
        for allowed in choices[:2] if same_bucket else choices:
            allowed[tried] = False
            rows = np.flatnonzero(allowed)
            if len(rows):
                return int(rows[int(hash64(REPLACE, self.seed, self.index.id_hashes[i], len(tried))) % len(rows)])
        raise ValueError(f"{self.index.row(i)['path']}: every image is damaged")

    def first_intact(self, i, label, load, same_bucket=False):
        """Loads row i, or a replacement if row i is damaged. Returns the row used, its data, and the damage found."""
        tried, damage = [i], []
        while len(tried) <= MAX_DAMAGED_IN_A_ROW:
            row = self.index.row(tried[-1])
            try:
                return row, load(row), damage
            except ValueError as error:
                damage.append({"shard": row["path"], "key": row["key"], "reason": str(error)})
            tried.append(self.replacement(i, label, tried, same_bucket))
        shard, key = damage[0]["shard"], damage[0]["key"]
        raise ValueError(f"{shard}: {MAX_DAMAGED_IN_A_ROW} damaged images in a row, first {key}")

    def make_item(self, request, load, same_bucket=False):
        """Returns the sample for a request. load(row, bucket, step) gives its pixels or its encodings."""
        i, label, step, position = request
        bucket = self.bucket_size(i)
        row, loaded, damage = self.first_intact(i, label, lambda row: load(row, bucket, step), same_bucket)
        return {
            **loaded,
            "captions": row["caption"],
            "aesthetic_scores": scale_aesthetic(row["score"], self.aesthetic_scale),
            "species": self.index.label_names[label] if label >= 0 else None,
            "keys": row["key"],
            "sample_seeds": torch_seed(SAMPLE, self.seed, position),
            "positions": position,
            "replaced": bool(damage),
            "skipped": damage,
        }

    def __getitem__(self, request):
        return self.make_item(request, self.load)

    def __getitems__(self, requests):
        """Returns the samples for a list of requests, loaded in parallel if a shard is remote."""
        with ThreadPoolExecutor(IO_THREADS if any(map(is_remote, self.index.stamps)) else 1) as pool:
            return list(pool.map(self.__getitem__, requests))


class EncodedDataset:
    """Wraps the ImageDataset `images`, but reads latents, text embeddings or both from an EncodingCache."""

    def __init__(self, images, latents=None, embeddings=None):
        self.images = images
        self.index = images.index
        self.latents = latents
        self.embeddings = embeddings

    def load(self, row, bucket, step):
        if self.latents is not None:
            loaded = self.latents.read(row["image_id"], self.images.is_flipped(row, step))
        else:
            loaded = self.images.load(row, bucket, step)
        if self.embeddings is not None:
            loaded |= self.embeddings.read(row["image_id"])
        return loaded

    def __getitem__(self, request):
        # latents have the shape of their own bucket
        return self.images.make_item(request, self.load, same_bucket=self.latents is not None)

    __getitems__ = ImageDataset.__getitems__


def collate(samples):
    """Joins samples into a batch. Stacks tensors, e.g. pixels (B, 3, H, W) uint8. Sizes and scores become float32."""
    import torch

    batch = {name: [sample[name] for sample in samples] for name in samples[0]}
    batch = {name: torch.stack(values) if torch.is_tensor(values[0]) else values for name, values in batch.items()}
    for name in ("original_sizes", "crop_top_lefts", "target_sizes", "aesthetic_scores"):
        batch[name] = torch.tensor(batch[name], dtype=torch.float32)
    batch["skipped"] = [entry for entries in batch["skipped"] for entry in entries]
    return batch


def ignore_signals(_worker):
    """Makes a DataLoader worker ignore stop signals, because the trainer needs the worker to finish the step."""
    signal.set_wakeup_fd(-1)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def make_loader(dataset, batch_sampler, workers, pin_memory):
    """Returns a DataLoader. `workers` processes prepare batches in advance; if 0, this process makes them itself."""
    from torch.utils.data import DataLoader

    return DataLoader(
        dataset,
        batch_sampler=batch_sampler,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
        worker_init_fn=ignore_signals,
    )


# -----------------------------------------------------------------------------
# 6 Encoding cache
# -----------------------------------------------------------------------------


class EncodingCache:
    """Encoded samples on disk, in files of up to CACHE_ROWS samples.

    A file's name is a hash of all that its content depends on: `settings` and the `cache_keys` of its rows. So a file
    made from other images, flags or encoders is never read. A cache key is a list that begins with the image id.
    """

    def __init__(self, folder, flag, settings, cache_keys, groups):
        self.flag = flag
        self.rows, self.paths = {}, {}  # path → its rows; image id → path
        self.files = {}  # (process, path) → what open() returns
        for group in groups:
            for start in range(0, len(group), CACHE_ROWS):
                rows = group[start : start + CACHE_ROWS]
                text = json.dumps([settings, [cache_keys[i] for i in rows]])
                path = Path(folder) / f"{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}.safetensors"
                self.rows[path] = rows
                self.paths |= {cache_keys[i][0]: path for i in rows}

    def open(self, path):
        """Returns an open file and its notes, {image id: note}. Raises OSError if the file is damaged or renamed."""
        place = (os.getpid(), path)
        if place not in self.files:
            if len(self.files) >= MAX_OPEN_CACHES:
                self.files.pop(next(iter(self.files)))
            try:
                file = safetensors.safe_open(path, "pt")
                notes = file.metadata()
                if notes["name"] != path.name:
                    raise ValueError(f"it holds {notes['name']}")
                self.files[place] = (file, json.loads(notes["samples"]))
            except Exception as error:  # the library raises all kinds of errors for damaged files
                raise OSError(f"{self.flag}: {path}: {error}; delete it and start again") from error
        return self.files[place]

    def write(self, path, samples):
        """Writes a file. `samples` maps an image id to a list with a dict per flip, or to a text if it is damaged."""
        import torch

        tensors, notes = {}, {}
        for image_id, variants in samples.items():
            if isinstance(variants, str):
                notes[image_id] = variants
                continue
            notes[image_id] = []
            for number, fields in enumerate(variants):
                names = [name for name, value in fields.items() if torch.is_tensor(value)]
                for name in names:
                    tensors[f"{image_id}/{number}/{name}"] = fields[name].to("cpu", copy=True)
                numbers = {name: value for name, value in fields.items() if name not in names}
                notes[image_id].append([names, numbers])
        write_safetensors(path, tensors, {"name": path.name, "samples": json.dumps(notes)})

    def read(self, image_id, variant=0):
        """Returns a sample's {name: tensor or number}. Raises ValueError if its image was damaged."""
        file, notes = self.open(self.paths[image_id])
        if isinstance(notes[image_id], str):
            raise ValueError(notes[image_id])
        names, numbers = notes[image_id][int(variant)]
        return {name: file.get_tensor(f"{image_id}/{int(variant)}/{name}") for name in names} | numbers


# -----------------------------------------------------------------------------
# 7 Preview
# -----------------------------------------------------------------------------


def describe_data(dataset, plan, steps, caption_tokens):
    """Returns the statistics for preview.json: the dataset, and how a run of `steps` steps will sample it."""
    index = dataset.index
    last = max(steps - 1, 0)
    scales = index.scales(dataset.resolution)
    cut = 1 - scales.min(axis=1) / scales.max(axis=1)
    bucket_images = np.bincount(index.buckets, minlength=len(dataset.bucket_sizes))
    columns = zip(plan.arrivals[:, :-1].sum(axis=0), plan.mix.data, plan.mix.target(0), plan.mix.target(last))
    species = [dict(zip(("images", "data", "at_start", "at_end"), map(float, row))) for row in columns]
    columns = zip(dataset.bucket_sizes, bucket_images, plan.bucket_weights(0), plan.bucket_weights(last))
    buckets = [{"size": size, "images": int(n), "at_start": start, "at_end": end} for size, n, start, end in columns]
    fields = index.table.column("score").to_pylist()
    scores = Counter(int(scale_aesthetic(value, dataset.aesthetic_scale)) for value in fields if value is not None)
    scores[9] += scores.pop(10, 0)
    return {
        "images": len(index),
        "damaged": dict(Counter(map(damage_kind, index.damage))),
        "damaged_samples": index.damage[:100],
        "unlabelled": int(plan.arrivals[:, -1].sum()),
        "species": dict(zip(plan.mix.names, species)),
        "buckets": buckets,
        "cut_off": {"median": float(np.median(cut)), "most": float(cut.max())},
        "scaled_up": {"images": int((scales.max(axis=1) > 1).sum()), "most": float(scales.max())},
        "aesthetic_scores": {f"{n} to {n + 1}": scores[n] for n in range(1, 10)} | {"none": fields.count(None)},
        "caption_tokens": {f"{p}%": int(np.percentile(caption_tokens, p)) for p in (0, 25, 50, 75, 95, 100)},
        "captions_over_75_tokens": int((np.array(caption_tokens) > 75).sum()),
    }


@cache
def label_fonts():
    """Returns the fonts for figures, and the set of characters that they have."""
    from matplotlib import font_manager, ft2font

    installed = {entry.name: entry.fname for entry in font_manager.fontManager.ttflist}
    families = ["DejaVu Sans", *[name for name in CJK_FONTS if name in installed][:1]]
    return families, frozenset().union(*(ft2font.FT2Font(installed[name]).get_charmap() for name in families))


def make_label(text, length):
    """Returns text on one line, cut to `length`. Spells out characters that no font has: ピカ → "[pi][ka]"."""
    words = [c if ord(c) in label_fonts()[1] else f"[{unicodedata.name(c, '?').split(' ')[-1].lower()}]" for c in text]
    text = " ".join("".join(words).replace("$", "\\$").split())  # a $ would begin a formula
    return text if len(text) <= length else text[: length - 1] + "…"


def draw_contact_sheet(dataset, requests, columns=4):
    """Returns a matplotlib Figure that shows samples with their crop window, class and caption."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    rows = -(-len(requests) // columns)
    figure = Figure(figsize=(2.8 * columns, 3.3 * rows), layout="constrained")
    for axes in figure.subplots(rows, columns, squeeze=False, subplot_kw={"anchor": "NW"}).flat:
        axes.set_axis_off()
    for axes, request in zip(figure.axes, requests):
        i, label, step, _ = request
        item = dataset[request]
        height, width = bucket = item["target_sizes"]
        top, left = item["crop_top_lefts"]
        row, (image, original), _ = dataset.first_intact(i, label, lambda row, b=bucket: dataset.open(row, b))
        if dataset.is_flipped(row, step):
            image = ImageOps.mirror(image)
        image.thumbnail((280, 280))
        axes.imshow(image, extent=(0, original[1], original[0], 0))
        # the crop is in px of the image scaled to cover the bucket; `scale` takes it back to px of the file
        scale = 1 / max(height / original[0], width / original[1])
        axes.add_patch(Rectangle((left * scale, top * scale), width * scale, height * scale, fill=False, color="red"))
        sizes = f"{original[1]} x {original[0]} px, cropped to {width} x {height}"
        lines = [f"{item['species'] or 'no label'}, step {step + 1}", sizes, item["captions"]]
        labels = [make_label(line, 48) for line in lines]
        axes.set_title("\n".join(labels), fontsize=7, loc="left", family=label_fonts()[0])
    return figure


def draw_species(species, most=60):
    """Returns a matplotlib Figure of class probabilities. Shows only the commonest and rarest if there are many."""
    from matplotlib.figure import Figure

    names = sorted(species, key=lambda name: -species[name]["data"])
    if len(names) > most:
        names = names[: most // 2] + names[-most // 2 :]
    figure = Figure(figsize=(9, 1.2 + 0.32 * len(names)), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(names))
    kinds = {"data": "share of the data", "at_start": "sampled at step 1", "at_end": "sampled at the last step"}
    for n, (kind, title) in enumerate(kinds.items()):
        colour = ("#b8b8b8", "#2a7fd4", "#e08a1e")[n]
        axes.barh(places + 0.27 * (n - 1), [species[name][kind] for name in names], 0.25, color=colour, label=title)
    labels = [f"{make_label(name, 26)} ({species[name]['images']:.0f})" for name in names]
    axes.set_yticks(places, labels, family=label_fonts()[0])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel("probability (number of images in brackets)")
    axes.legend(loc="lower right", frameon=False)
    return figure
