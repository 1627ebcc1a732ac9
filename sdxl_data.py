"""Read captioned images for SDXL: shards, folders and tables become an index, a plan and batches.

The sections, in the order data flows; each calls only what is above it:
     1 Shared by the scripts   errors, the flag parser, hashes, atomic files, checkpoint folders
     2 Sources                 shard patterns, class counts, prompts; the bytes of a shard, wherever it is stored
     3 Samples                 the parts of a sample: captions, tags, labels, the size of its image
     4 Index                   shards, folders and tables become one table: a row per image
     5 Plan                    which rows make up which batch: a pure function of the step
     6 Images and batches      decode, crop, resize; the dataset and its loader
     7 Encoding cache          latents and text embeddings on disk
train_sdxl_lora.py, evaluate.py and hpo_sweep.py import this file; it imports none of them. Functions that need torch,
or datasets import them: loading them takes seconds, and flags are checked before that.
"""

import argparse
import codecs
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
import sys
import tarfile
import time
import unicodedata
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
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
from PIL import ExifTags, Image, ImageCms, ImageOps, PngImagePlugin

# Signals that mean "save and exit" to the scripts. Windows has only two. After nohup, SIGHUP stays ignored, but not
# below torchrun: it obeys SIGHUP in spite of nohup, and kills its processes 30 s later.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]
ignores_hangup = hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
if ignores_hangup and "TORCHELASTIC_RUN_ID" not in os.environ:
    STOP_SIGNALS.remove(signal.SIGHUP)
LORA_FILE = "pytorch_lora_weights.safetensors"  # in diffusers' format
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "avif", "jfif", "tif", "tiff", "gif")
UNREADABLE_EXTENSIONS = "heic heif jxl svg raw dng cr2 cr3 nef arw exr hdr".split()  # reported when in a folder
CAPTION_EXTENSIONS = ("txt", "caption")
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zX", b"\x28\xb5\x2f", b"PK\3\4")  # first bytes of gz, bz2, xz, zst, zip
METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
# what systems leave in folders and tars; then: reasons in skipped.jsonl that are not counted as damage
JUNK = re.compile(r"\._|\.DS_Store$|__MACOSX$|Thumbs\.db$|\.ipynb_checkpoints$|@eaDir$")
LEFT_OUT = "not in the metadata,hidden,too small,colour profile ignored,second image,no .json,other file".split(",")
MAX_IMAGE_PIXELS = 178_956_970  # larger images are refused by their header: PIL's own limit for decompression bombs
MAX_OPEN_SHARDS = 4096  # shards, or images of a folder, that a process keeps open
IO_ATTEMPTS = 7  # tries of a read over the network, half a minute in all, before the run ends
IO_THREADS = 16  # simultaneous reads over the network per process
READ_AHEAD = 1 << 17  # bytes that indexing reads at once
MAX_KEPT_BYTES = 1 << 28  # of a shard's files during indexing; more of them are read again
HEADER_BYTES = 1 << 16  # bytes read of each image to get its size; the full file is read if they are not enough
STAMP_SECONDS = 60  # how often a remote shard is checked for changes
INDEX_VERSION = 4  # part of the index cache's key: raise it when a column changes
IN_TABLE = "row of the dataset"  # instead of a path: the bytes are in a table of --dataset_name
UNLABELLED_ACCEPTANCE = 0.1  # probability that an image without a label is accepted when classes are balanced
MAX_EMPTY_EPOCHS = 10_000  # without one accepted sample before the plan gives up
MAX_DAMAGED_IN_A_ROW = 100  # damaged images replaced one after another before the run ends
BUCKET_STEP = 64  # px; sides of --crop bucket are multiples of it, as in SDXL's training (arXiv:2307.01952, app. I)
AESTHETIC_SCORE = 6.0  # of an image without one: the stock refiner pipeline's default
CACHE_ROWS = 64  # samples in a file of --cache_latents or --cache_text_embeddings
MAX_OPEN_CACHES = 256  # cache files that a process keeps open
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = (
    1 << 28
)  # bytes of text; Pillow refuses 1 MB workflows


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
        return super()._format_action_invocation(action).partition(", --species")[0]  # an older, second name

    def _get_help_string(self, action):
        text = action.help.replace(" (default: %(default)s)", "")
        if action.default in (None, False, [], argparse.SUPPRESS) or "default" in text:
            return text
        shown = action.default if isinstance(action.default, list) else [action.default]
        return f"{text} (default: {' '.join(map(str, shown))})"


class Parser(configargparse.ArgParser):
    """Argument parser that reports an error in one line, `prog: error: --flag: …`, and exits with status 2."""

    def parse_known_args(self, args=None, *rest, **options):
        self.words = sys.argv[1:] if args is None else list(args)
        if sys.platform == "win32" and not {"-h", "--help"} & set(self.words):
            self.error("Windows has no POSIX signals and locks, which these scripts need; run them in WSL2")
        # paths in --flag=~/x and in YAML files, which no shell expands
        self.register("type", None, lambda text: os.path.expanduser(text) if text.startswith("~/") else text)
        return super().parse_known_args(args, *rest, **options)

    def error(self, message):
        message = " ".join(message.split()).removeprefix("argument ")
        for action in self._actions:  # call a flag with two names by the one that was given
            first, *others = action.option_strings or [""]
            if others and not others[0].startswith("--no-"):
                given = {word.partition("=")[0] for word in vars(self).get("words", ())}
                name = next((other for other in others if other in given), first)
                message = re.sub(rf"{first}(/{others[0]})?(?!\w)", name, message)
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
    return Parser(usage=usage, description=description, config_file_parser_class=configargparse.YAMLConfigFileParser,
        formatter_class=lambda prog: HelpFormatter(prog, max_help_position=34, width=118),
        allow_abbrev=False, add_config_file_help=False, add_env_var_help=False)  # fmt: skip


# Each use of random numbers has its own number. A draw is a hash of (use, seed, what it is drawn for), so none depends
# on the process count, worker count, prefetching or the clock.
ORDER, ACCEPT, LABEL, CROP, FLIP, REPLACE, SUBSET, SAMPLE, DROPOUT_MASK, BUCKET = range(10)
CAPTION, TAG_ORDER, TAG_DROPOUT, HOLD_OUT = range(10, 14)


def hash64(*parts):
    """Hashes integers, or arrays elementwise, to uint64 with splitmix64 (Steele et al., OOPSLA 2014)."""
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
    if Path(pattern).is_file():
        return [pattern]
    if Path(pattern).is_dir():
        return sorted(str(path) for path in Path(pattern).glob("*.tar") if not JUNK.match(path.name))
    if pattern.startswith("pipe:") and "{" not in pattern:
        return [pattern]
    is_bucket = is_remote(pattern) and not pattern.startswith(("pipe:", "http"))
    if is_bucket and "." not in Path(pattern).name:  # a folder in a bucket
        filesystem, folder = fsspec.url_to_fs(pattern)
        return [filesystem.unstrip_protocol(p) for p in sorted(filesystem.glob(folder.rstrip("/") + "/*.tar"))]
    return [path for part in pattern.split("::") for path in braceexpand(part)]  # a::b is webdataset's notation


def expand_shards(patterns):
    """Returns the shards of all patterns. Raises ValueError if a pattern has no shards or a file is missing."""
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


def read_class_csv(path):
    """Returns {label in lower case: count}. Raises ValueError if a column is missing or a count is wrong."""
    counts = Counter()
    with open(path, newline="", encoding="utf-8-sig") as file:  # spreadsheets write a byte order mark
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        name = next((c for c in ("class", "pokemon", "species") if c in columns), None)
        if name is None or "count" not in columns:
            found = f"{path} has columns {', '.join(columns) or '(none)'}"
            raise ValueError(f"{found}; expected class (or pokemon, species) and count")
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
    """Reads a shard or an image file. Copies it first if it is a pipe or its server has no range requests.

    `stamp` identifies the version of a file: its size and modification time, or its size and ETag for a URL. A pipe's
    stamp never changes. Connections do not survive a fork, so each process makes its own Shard.
    """

    def __init__(self, path, cache_dir):
        self.path = path
        self.block = (0, b"")  # (offset, bytes) read last by peek()
        self.checked = time.monotonic()
        self.copied = path.startswith("pipe:")
        self.stamp = "None"
        if not self.copied:
            # a local name may hold "::" or "*", which mean something in a URL
            self.filesystem, self.url = (
                fsspec.url_to_fs(path) if is_remote(path) else (fsspec.filesystem("file"), path)
            )
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
        """Raises OSError if the shard has changed since indexing. Checks a remote shard at most once a minute."""
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
# 3 Samples
# -----------------------------------------------------------------------------

# control characters except tab and line ends; also lone surrogates, which UTF-8 cannot encode
NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True)
class Fields:
    """Names of the table columns, or of the fields in a shard's JSON files, that hold the parts of a sample."""

    image: str = "image"
    caption: str = "text"
    labels: str = "species_list"
    score: str = "ae_aesthetic"
    instance_prompt: str | None = None  # the caption of images that have none, in folders and tables


def is_text(value):
    """Returns whether `value` is a non-empty string that is valid UTF-8 and has no control characters."""
    return isinstance(value, str) and value != "" and not NO_TEXT.search(value)


def parse_object(text):
    """Parses a JSON object and returns it as a dict. Raises ValueError if `text` is anything else."""
    try:
        value = json.loads(text)
    except ValueError:
        raise ValueError("bad JSON") from None
    if not isinstance(value, dict):
        raise ValueError("JSON is not an object")
    return value


def read_captions(values):
    """Returns the non-empty captions from strings or lists of strings. Raises ValueError for other values."""
    captions = [text for value in values for text in (value if isinstance(value, list) else [value])]
    captions = [caption for caption in captions if caption not in (None, "")]
    for caption in captions:
        if not is_text(caption):
            kind = "control characters in the caption" if isinstance(caption, str) else "caption is no text"
            raise ValueError(f"{kind}: {caption!r:.60}")
    return list(dict.fromkeys(filter(None, map(str.strip, captions))))


def decode_captions(raw):
    """Decodes a .txt or .caption file and returns its captions, one per line. Raises ValueError if it is damaged."""
    has_mark = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = raw.decode("utf-16" if has_mark else "utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("caption is not UTF-8") from None
    return read_captions(re.split(r"\r\n|\r|\n", text))


def choose_caption(captions, seed, position):
    """Returns the index of the caption that a sample uses at its position in the run."""
    return int(uniform(CAPTION, seed, position) * len(captions))


@dataclass(frozen=True)
class TagAugmentation:
    """How a caption's tags are shuffled and dropped each time it is used. The first `kept` tags stay in place."""

    separator: str = ","
    kept: int = 0
    shuffle: bool = False
    dropout: float = 0.0

    def joiner(self):
        return self.separator if self.separator != self.separator.strip() else f"{self.separator} "

    def split(self, caption):
        tags = caption.split(self.separator.strip() or self.separator)
        return [tag.strip() for tag in tags if tag.strip()]

    def draw(self, caption, seed, position):
        """Returns the caption with its tags shuffled and thinned out. The draws depend on seed and position only."""
        if not self.shuffle and not self.dropout:
            return caption
        tags = self.split(caption)
        free = np.arange(self.kept, len(tags))
        if self.dropout:
            free = free[uniform(TAG_DROPOUT, seed, position, free) >= self.dropout]
        if self.shuffle:
            free = free[np.argsort(hash64(TAG_ORDER, seed, position, free), kind="stable")]
        return self.joiner().join(tags[: self.kept] + [tags[i] for i in free])


def read_labels(metadata, name):
    """Returns a sample's labels in lower case. Raises ValueError if they are not a list, a string or a number."""
    labels = metadata.get(name) if metadata.get(name) is not None else []
    if isinstance(labels, str):
        labels = labels.split(",")
    if isinstance(labels, (int, float)):
        labels = [labels]
    if not isinstance(labels, list):
        raise ValueError(f"{name} is {labels!r}, not a list or a text")
    names = [
        str(label).strip().casefold() for label in labels if label not in (None, "") and label == label
    ]  # not NaN
    return list(dict.fromkeys(name for name in names if is_text(name)))


def number_or_none(value):
    """Converts a number or numeric string to a number. Returns None for other values and for numbers beyond ±2³¹."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and abs(value) < 2**31 else None


def oriented_size(image):
    """Returns an image's (height, width) after EXIF rotation. Raises ValueError for a decompression bomb."""
    width, height = image.size
    if width * height > MAX_IMAGE_PIXELS:
        raise ValueError(f"decompression bomb: {width}x{height} px is too large")
    # a PNG may store its EXIF after the pixels, and Pillow would decode all of them to look for it
    has_exif = image.format != "PNG" or {"exif", "Raw profile type exif", "XML:com.adobe.xmp"} & image.info.keys()
    # Pillow turns TIFFs by itself
    is_turned = has_exif and image.format != "TIFF" and image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    return (width, height) if is_turned else (height, width)


def measure_image(head, read_all=None):
    """Returns an image's (height, width). Calls read_all() if `head` is not enough. Raises ValueError for damage."""
    if not head:
        raise ValueError("image of zero bytes")
    try:
        return oriented_size(Image.open(io.BytesIO(head)))
    except Exception as error:  # decoders raise all kinds of errors for damaged files
        if read_all is not None:  # Pillow needs the whole file of a WebP, or of a JPEG with long EXIF
            return measure_image(read_all())
        if isinstance(error, ValueError):
            raise
        raise ValueError(f"cannot decode image: {str(error).partition(' <_io')[0]}") from None  # no address of memory


def hash_image(head, size):
    """Returns a uint64 hash of an image's first bytes and file size (-1 if unknown), to tell images apart."""
    return int.from_bytes(hashlib.blake2b(head, digest_size=8, key=str(size).encode()).digest(), "little")


# -----------------------------------------------------------------------------
# 4 Index
# -----------------------------------------------------------------------------

INDEX_SCHEMA = pa.schema({
    "key": pa.string(), "image_id": pa.string(), "captions": pa.list_(pa.string()), "labels": pa.list_(pa.string()),
    "width": pa.int32(), "height": pa.int32(), "score": pa.float32(),
    "path": pa.string(), "offset": pa.int64(), "size": pa.int64(),
    "repeats": pa.int32(), "digest": pa.uint64(),
})  # fmt: skip


def make_row(key, image_id, captions, labels, score, head, read_all, place):
    """Returns a row of the index. `place` is the image's (path, offset, size). Raises ValueError if it is damaged."""
    if not is_text(image_id):
        raise ValueError("image_id is not text")
    height, width = measure_image(head, read_all)
    path, offset, size = place
    return {
        "key": key, "image_id": image_id, "captions": captions, "labels": labels, "score": number_or_none(score),
        "height": height, "width": width, "path": path, "offset": offset, "size": size, "repeats": 1,
        "digest": hash_image(head, size),
    }  # fmt: skip


def iter_tar_members(shard, report):
    """Yields (name, member) for each file in a tar. A member is (offset, size, first bytes, is_clean).

    Where the tar is damaged, calls report(reason), yields None and goes on at the next valid header. Blocks of zeros
    end a tar, but they also occur in damaged tars and black images, so reading goes on. `is_clean` means that the
    padding after the file is zeros. Any other bytes there come from another file.
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
        name = (long_name or member.name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        if position + member.size > shard.size:
            report(f"shard cut short: inside {name}")
            yield None
            return
        if member.type == tarfile.GNUTYPE_LONGNAME:
            long_name = shard.peek(position, member.size).rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif member.type == tarfile.XHDTYPE:  # pax: lines "LENGTH key=value"
            found = re.search(rb"^\d+ path=(.*)$", shard.peek(position, member.size), re.MULTILINE)
            long_name = found[1].decode("utf-8", "surrogateescape") if found else None
        elif member.isreg():
            head = shard.peek(position, min(member.size, HEADER_BYTES))
            end = position + member.size
            filler = shard.peek(end, min(-member.size % 512, shard.size - end))
            yield name, (position, member.size, head, not filler.strip(b"\0"))
        elif member.islnk() or member.issym():
            report(f"link instead of a file: {name}; pack with tar --dereference --hard-dereference")
            yield None
        if member.type not in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE):
            long_name = None  # it is the name of this member only
        position += -(-member.size // 512) * 512
    if zero_blocks < 2:
        report("shard cut short: no end-of-archive mark")
        yield None


def split_name(name):
    """Splits a file's path into key, inner part and extension: "a/b.mask.PNG" → ("a/b", "mask", "png").

    In webdataset, the key ends at the file name's first dot. The inner part names a field, such as a mask. If it is
    not a valid identifier, it belongs to the key: "v1.0 a.jpg" → ("v1.0 a", "", "jpg").
    """
    folder, _, filename = name.rpartition("/")
    stem, extension = os.path.splitext(filename)
    first, _, inner = stem.partition(".") if not stem.startswith(".") else (stem, "", "")
    if inner and not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", inner):
        first, inner = stem, ""
    return f"{folder}/{first}" if folder else first, inner, extension[1:].lower()


def split_sample(key, parts):
    """Splits the files that share a key into samples. Yields each sample as (key, {extension: member})."""
    for inner, members in parts.items():
        # a part with an image and a caption is a sample of its own; so is every part if no file has the plain key
        is_whole = members.keys() & set(IMAGE_EXTENSIONS) and members.keys() & {*CAPTION_EXTENSIONS, "json"}
        if not inner or is_whole or "" not in parts:
            yield f"{key}.{inner}" if inner else key, members


def group_members(members):
    """Groups a tar's files into samples. Yields each as (key, {extension: member}, is_beside_damage)."""
    current = None
    parts = {}  # {inner part: {extension: member}} of the key `current`
    was_damaged = False  # next to a file of `current`
    beside_damage = False
    for member in members:
        if member is None:
            beside_damage = True
            continue
        name, place = member
        if any(map(JUNK.match, name.split("/"))):
            continue
        key, inner, extension = split_name(name)
        if key != current or extension in parts.get(inner, ()):
            yield from ((*sample, was_damaged or beside_damage) for sample in split_sample(current, parts))
            current = key
            parts = {}
            was_damaged = False
        was_damaged = was_damaged or beside_damage
        beside_damage = False
        parts.setdefault(inner, {})[extension] = place
    yield from ((*sample, was_damaged or beside_damage) for sample in split_sample(current, parts))


def read_member(shard, member):
    """Returns all bytes of a file in a shard. `member` is as in iter_tar_members()."""
    offset, size, head, _ = member
    return head if len(head) == size else shard.read(offset, size)


def read_sample_captions(shard, members, metadata, fields):
    """Returns captions from a .txt or .caption file, or else the JSON. Raises ValueError if none are usable."""
    files = [members[extension] for extension in CAPTION_EXTENSIONS if extension in members]
    captions = []
    for file in files:
        captions = captions or decode_captions(read_member(shard, file))
    captions = captions or read_captions([metadata.get(fields.caption)])
    if not captions:
        raise ValueError("empty caption" if files else "no caption")
    if files and any(f'"{name}":' in caption for name in metadata for caption in captions):
        raise ValueError("JSON in the caption")
    return captions


def index_sample(shard, key, members, fields):
    """Returns a sample's row of the index. Raises ValueError if a part of the sample is missing, empty or damaged."""
    image = next((e for e in IMAGE_EXTENSIONS if e in members), None)
    if image is None:
        raise ValueError("no image")
    offset, size, head, _ = members[image]
    head = head or shard.peek(offset, min(size, HEADER_BYTES))
    for extension in (image, "json", *CAPTION_EXTENSIONS):
        if extension in members and not members[extension][-1]:
            raise ValueError(f"blocks of another file: at the end of .{extension}")
    metadata = parse_object(read_member(shard, members["json"])) if "json" in members else {}
    captions = read_sample_captions(shard, members, metadata, fields)
    image_id = str(metadata.get("image_id") or f"{shard.path.rpartition('/')[2]}/{key}")
    labels = read_labels(metadata, fields.labels)
    score = metadata.get(fields.score)
    place = (shard.path, offset, size)
    return make_row(key, image_id, captions, labels, score, head, lambda: read_member(shard, members[image]), place)


def join_samples(groups, report):
    """Joins the pieces of each sample. Takes and yields (key, {extension: member}, is_beside_damage).

    A plain tar may scatter a sample's files. Then all files with the same key are joined. In a tar where most samples
    are in one piece, a key that occurs again is reported as a duplicate.
    """
    samples, again = {}, []
    kept = 0  # bytes of the files
    for key, members, beside_damage in groups:
        for extension, (*place, head, is_clean) in members.items():
            kept += len(head)
            members[extension] = (*place, head if kept < MAX_KEPT_BYTES else b"", is_clean)
        if key in samples:
            again.append((key, members))
        else:
            samples[key] = [members, beside_damage]
    is_scattered = len({key for key, _ in again}) > len(samples) / 4
    for key, members in again:
        if is_scattered and not samples[key][0].keys() & members.keys():
            samples[key][0] |= members
        else:
            report("duplicate key", key)
    for key, (members, beside_damage) in samples.items():
        yield key, members, beside_damage and not is_scattered


def index_shard(shard, fields):
    """Returns the index rows of a shard, and its damage: a list with a {"shard", "key", "reason"} for each problem."""
    rows, damage, without_json = [], [], []

    def report(reason, key=None):
        damage.append({"shard": shard.path, "key": key, "reason": reason})

    if shard.size and shard.peek(0, min(shard.size, 4)).startswith(COMPRESSED):
        report('compressed, not a tar: unpack it, or give "pipe:zcat FILE"')
        return rows, damage
    for key, members, beside_damage in join_samples(group_members(iter_tar_members(shard, report)), report):
        images = [extension for extension in IMAGE_EXTENSIONS if extension in members]
        if not images and not members.keys() & {*CAPTION_EXTENSIONS, "json"}:
            report("other file: no image, caption or .json", key)
            continue
        try:
            row = index_sample(shard, key, members, fields)
        except ValueError as error:
            report(str(error), key)
            continue
        rows.append(row)
        if len(images) > 1:
            report(f"second image: .{images[1]} beside .{images[0]}", f"{key}.{images[1]}")
        if "json" not in members:
            without_json.append((key, beside_damage))
    # a lack of .json is reported if nearly all other samples have one, or if it is beside damage and others have one
    nearly_all_have_it = len(without_json) <= len(rows) / 8
    none_has_it = len(rows) > 1 and len(without_json) == len(rows)
    lost = {}  # {key: reason}
    for key, beside_damage in without_json:
        if nearly_all_have_it or (beside_damage and not none_has_it):
            lost[key] = "lost .json: beside a damaged place" if beside_damage else "no .json: most have one"
            report(lost[key], key)
    return [row for row in rows if row["key"] not in lost], damage


def cached_index_shard(path, cache_dir, fields):
    """Returns a shard's index as a table. Reads the shard only if `cache_dir` has no table for its current stamp."""
    shard = Shard(path, cache_dir.parent)
    name = path if is_remote(path) else os.path.abspath(path)
    cached = cache_dir / f"{hash_text(f'{INDEX_VERSION} {name} {shard.stamp} {fields}'):016x}.parquet"
    if not cached.exists():
        rows, damage = index_shard(shard, fields)
        notes = {"damage": json.dumps(damage), "stamp": json.dumps({path: shard.stamp})}
        table = pa.Table.from_pylist(rows, INDEX_SCHEMA).replace_schema_metadata(notes)
        partial = cached.with_suffix(f".{os.getpid()}.tmp")
        pa.parquet.write_table(table, partial)
        os.replace(partial, cached)  # atomic: another process may have made the same file
    return pa.parquet.read_table(cached)


def list_folder(folder, excluded, report, above=()):
    """Yields the path of each file in a folder and in all folders below it, following links, in a fixed order.

    Leaves out the paths in `excluded`, hidden files and folders, and folders that a run of the trainer wrote.
    """
    real = os.path.realpath(folder)
    if real in above or (above and real in excluded):  # following a link to a folder above would never end
        return
    try:
        names = sorted(name for name in os.listdir(folder) if not JUNK.match(name))
    except OSError as error:
        report(f"cannot read the folder: {error.strerror}", folder)
        return
    marks = ({"config.yaml", "run.json"}, {"preview.json"}, {"metrics.json", "per_image.csv"})
    if above and any(mark <= set(names) for mark in marks):
        report("hidden: the output of a run", folder)
        return
    folders = []
    for name in names:
        path = os.path.join(folder, name)
        if name.startswith("."):
            report("hidden: its name begins with a dot", path)
        elif not is_text(name):
            report("name is not UTF-8", path)
        elif os.path.isdir(path):
            folders.append(path)
        else:
            yield path
    for path in folders:
        yield from list_folder(path, excluded, report, (*above, real))


def read_metadata(path, fields):
    """Returns the rows of a .jsonl, .csv or .parquet file by place ("line 3"). Raises InputError if it is damaged."""
    rows = {}
    place = ""
    try:
        if path.endswith(".parquet"):
            rows = {f"row {n}": row for n, row in enumerate(pa.parquet.read_table(path).to_pylist())}
        elif path.endswith(".csv"):
            with open(path, newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file, skipinitialspace=True, strict=True)
                rows = {f"line {reader.line_num}": row for row in reader}
            wide = [place for place, row in rows.items() if None in row]
            if wide:
                raise ValueError(f"{wide[0]} has more values than columns; put quotes around a text with commas")
        else:
            for number, line in enumerate(Path(path).read_text(encoding="utf-8-sig").split("\n"), 1):
                place = f"line {number}"
                if line.strip():
                    rows[place] = parse_object(line)
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        raise InputError(f"--train_data_dir: {f'{path} {place}'.strip()}: {error}") from error
    columns = dict.fromkeys(str(name) for row in rows.values() for name in row)
    if columns and "file_name" not in columns:
        raise InputError(f"--train_data_dir: {path} has columns {', '.join(columns)}; expected file_name and others")
    if columns and not columns.keys() & {fields.caption, fields.labels, fields.score, "image_id"}:
        raise InputError(f"--caption_column: {path} has columns {', '.join(columns)}; found no {fields.caption}")
    return rows


def is_image(path):
    """Returns whether Pillow can open a file, whatever its extension."""
    try:
        with Image.open(path):
            return True
    except Exception:  # decoders raise all kinds of errors for other files
        return False


def same_path(path):
    """Returns a path normalized for comparison. macOS writes é as two characters, other systems as one."""
    return unicodedata.normalize("NFC", os.path.normpath(path))


class FolderFiles:
    """The images, caption files and metadata in folders. Keys are paths as same_path() gives them."""

    def __init__(self, sources, fields, excluded, report):
        self.images = {}  # {path: (path on disk, its folder in `sources`)}
        self.captions = {}  # {(path without extension, extension): path on disk}
        self.rows = {}  # {path: [rows of metadata that name this image]}
        self.described = set()  # folders that have metadata
        metadata = []
        for source in sources:
            for path in list_folder(source, excluded, report):
                stem, extension = os.path.splitext(same_path(path))
                extension = extension[1:].lower()
                if os.path.basename(path) in METADATA_FILES:
                    metadata.append((path, source))
                elif extension in CAPTION_EXTENSIONS:
                    self.captions[stem, extension] = path
                elif not os.path.isfile(path):
                    report("cannot read: not a file, or a link to nothing", path)
                elif extension in IMAGE_EXTENSIONS or extension in UNREADABLE_EXTENSIONS or is_image(path):
                    same = same_path(path)
                    is_other = self.images.get(same, (path,))[0] != path  # é in both forms
                    self.images[f"{same}/2" if is_other else same] = (path, source)
        for path, source in metadata:
            self.described.add(same_path(os.path.dirname(path)))
            for place, row in read_metadata(path, fields).items():
                image = self.find_image(os.path.dirname(path), row.get("file_name"))
                if image is None:
                    report(f"no such image: {row.get('file_name')}", path, place)
                else:
                    self.images.setdefault(same_path(image), (image, source))
                    self.rows.setdefault(same_path(image), []).append(row)

    def find_image(self, folder, name):
        """Returns the path of the image that metadata in `folder` calls `name`, or None if there is none."""
        if not isinstance(name, str) or not name:
            return None
        paths = [os.path.join(folder, name), os.path.join(folder, name.replace("\\", "/"))]  # written on Windows
        return next((path for path in paths if same_path(path) in self.images or os.path.isfile(path)), None)

    def find_captions(self, path, fields):
        """Returns an image's captions from any source. Raises ValueError if they are missing or damaged."""
        captions = read_captions([row.get(fields.caption) for row in self.rows.get(path, ())])
        files = [self.captions.get((os.path.splitext(path)[0], extension)) for extension in CAPTION_EXTENSIONS]
        for file in filter(None, files):
            captions = captions or decode_captions(Path(file).read_bytes())
        if not captions and fields.instance_prompt:
            captions = [fields.instance_prompt]
        if not captions and path not in self.rows and self.described & set(map(str, Path(path).parents)):
            raise ValueError("not in the metadata: no row and no caption file")
        if not captions:
            raise ValueError("empty caption" if any(files) else "no caption")
        return captions


def folder_class(path, source):
    """Returns the class and repeats that the first folder below `source` gives an image: "10_cat" → ("cat", 10)."""
    parts = Path(os.path.relpath(path, source)).parts
    if len(parts) < 2 or parts[0] == "..":
        return None, 1
    numbered = re.fullmatch(r"(\d{1,4})_(.+)", parts[0], re.DOTALL)  # a longer number is a date or the like
    repeats, name = numbered.groups() if numbered else (1, parts[0])
    return name.strip().casefold(), int(repeats)


def index_folders(sources, fields, excluded=()):
    """Returns the index rows of all images in folders, a list of the damage, and {path: stamp} of the images.

    Labels come from the metadata, or else from the first folder. Skips the real paths in `excluded`.
    """
    sources = [os.path.abspath(os.path.expanduser(source)) for source in sources]
    root = os.path.commonpath(sources)
    rows, damage, stamps = [], [], {}

    def report(reason, path, place=None):
        key = os.path.relpath(path, root).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        damage.append({"shard": root, "key": f"{key} {place}" if place else key, "reason": reason})

    files = FolderFiles(sources, fields, excluded, report)
    for same, (path, source) in files.images.items():
        try:
            captions = files.find_captions(same, fields)
            described = files.rows.get(same, [])
            labels = list(dict.fromkeys(name for row in described for name in read_labels(row, fields.labels)))
            with open(path, "rb") as file:
                head = file.read(HEADER_BYTES)
                stat = os.fstat(file.fileno())
            key = os.path.relpath(path, root)
            ids = [str(row["image_id"]) for row in described if row.get("image_id")]
            scores = [row[fields.score] for row in described if row.get(fields.score) is not None]
            place = (path, 0, stat.st_size)
            image_id, score = next(iter(ids), key), next(iter(scores), None)
            row = make_row(key, image_id, captions, labels, score, head, Path(path).read_bytes, place)
        except (ValueError, OSError) as error:
            report(str(error), path)
            continue
        name, repeats = folder_class(path, source)
        if name and not labels:
            row |= {"labels": [name], "repeats": repeats}
        rows.append(row)
        stamps[path] = f"{stat.st_size} {stat.st_mtime}"
    return rows, damage, stamps


def load_table(flag, source, fields, config_name=None, cache_dir=None):
    """Loads the table that --dataset_name gives, without decoding images. Raises InputError naming what is wrong."""
    import datasets

    try:
        if (Path(source) / "dataset_info.json").exists() or (Path(source) / "dataset_dict.json").exists():
            table = datasets.load_from_disk(source)
            if isinstance(table, datasets.DatasetDict) and "train" not in table:
                raise ValueError(f"it has the splits {', '.join(table)}, but no train")
            table = table["train"] if isinstance(table, datasets.DatasetDict) else table
        else:
            table = datasets.load_dataset(source, config_name, split="train", cache_dir=cache_dir)
    except Exception as error:  # datasets and its dependencies raise all kinds of errors
        raise InputError(f"{flag}: {source}: {error}") from error
    for column_flag, column in (("--image_column", fields.image), ("--caption_column", fields.caption)):
        is_needed = column_flag == "--image_column" or not fields.instance_prompt
        if is_needed and column not in table.column_names:
            raise InputError(f"{column_flag}: {source} has columns {', '.join(table.column_names)}; found no {column}")
    if not isinstance(table.features[fields.image], datasets.Image):
        raise InputError(f"--image_column: {fields.image} of {source} holds no images")
    return table.cast_column(fields.image, datasets.Image(decode=False))


def index_table(table, source, fields):
    """Returns two lists: the table's index rows, and a {"shard", "key", "reason"} for each damaged row."""
    rows, damage = [], []
    feature = table.features.get(fields.labels)
    names = getattr(getattr(feature, "feature", feature), "names", None)  # of a ClassLabel, or a list of them
    ids = {}  # {hash of an image: image_id}: rows that repeat an image without image_id get the same
    for number, row in enumerate(table):
        image = row[fields.image] or {}
        name = f"row {number}"
        try:
            captions = read_captions([row.get(fields.caption)])
            if not captions and not fields.instance_prompt:
                raise ValueError("no caption")
            if not image.get("bytes") and not image.get("path"):
                raise ValueError("no image")
            data = image.get("bytes")
            place = (IN_TABLE, number, -1)
            if data is None:
                data = Path(image["path"]).read_bytes()
                place = (image["path"], 0, len(data))
            if names is not None:
                codes = row[fields.labels] if isinstance(row[fields.labels], list) else [row[fields.labels]]
                row[fields.labels] = [names[code] for code in codes if code is not None and code >= 0]
            labels = read_labels(row, fields.labels)
            image_id = str(row.get("image_id") or ids.setdefault(hash_image(data, len(data)), name))
            captions = captions or [fields.instance_prompt]
            rows.append(make_row(name, image_id, captions, labels, row.get(fields.score), data, None, place))
        except (ValueError, TypeError, KeyError, OSError) as error:
            damage.append({"shard": source, "key": name, "reason": str(error)})
    return rows, damage


def damage_kind(entry):
    """Returns the kind of a damage entry: its reason up to the first colon, such as "bad tar header"."""
    return entry["reason"].partition(":")[0]


def count_damaged(damage):
    """Returns the number of damaged samples. Counts one sample for each shard whose damage has no keys."""
    damage = [entry for entry in damage if damage_kind(entry) not in LEFT_OUT]
    named = {(d["shard"], d["key"]) for d in damage if d["key"] is not None}
    cut_shards = {d["shard"] for d in damage} - {shard for shard, _ in named}
    return len(named) + len(cut_shards)


def merge_rows(table, damage):
    """Returns the table with duplicates merged, and `damage` plus each row that reuses another image's id."""
    ids = table.column("image_id").to_pylist()
    if len(set(ids)) == len(ids):
        return table, damage
    damage, merged = list(damage), {}
    for row in table.to_pylist():
        was_given = row["image_id"] != f"{row['path'].rpartition('/')[2]}/{row['key']}"
        if not was_given and merged.get(row["image_id"], row)["digest"] != row["digest"]:  # shards of the same name
            row["image_id"] = f"{row['path']}/{row['key']}"
        first = merged.setdefault(row["image_id"], row)
        if row["digest"] != first["digest"]:
            reason = f"duplicate image_id: {row['image_id']}"
            damage.append({"shard": row["path"], "key": row["key"], "reason": reason})
        elif row is not first:
            for name in ("captions", "labels"):
                first[name] = list(dict.fromkeys(first[name] + row[name]))
    return pa.Table.from_pylist(list(merged.values()), INDEX_SCHEMA), damage


def leave_out_small(table, damage, min_size):
    """Removes images with a side below `min_size` px. Returns the table, and `damage` with a note for each."""
    sides = np.minimum(table.column("width").to_numpy(), table.column("height").to_numpy())
    damage = list(damage)
    for row in table.filter(pa.array(sides < min_size)).to_pylist():
        reason = f"too small: {row['width']} x {row['height']} px"
        damage.append({"shard": row["path"], "key": row["key"], "reason": reason})
    return table.filter(pa.array(sides >= min_size)), damage


def add_trigger_word(table, trigger_word, joiner):
    """Returns the table with the trigger word in front of all captions that do not begin with it."""
    begins = re.compile(re.escape(trigger_word) + r"(?!\w)")
    rows = table.column("captions").to_pylist()
    rows = [[text if begins.match(text) else f"{trigger_word}{joiner}{text}" for text in texts] for texts in rows]
    return table.set_column(table.column_names.index("captions"), "captions", [rows])


def is_held_out(image_ids, fraction):
    """Returns a mask, bool (N,), of the images that --val_fraction holds out. Holds out at least one."""
    draws = uniform(HOLD_OUT, np.array([hash_text(i) for i in image_ids], dtype=np.uint64))
    return draws < max(fraction, draws.min() + 1e-12)


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
        """Returns the height and width of every image file in px, (N, 2) float64."""
        return np.stack([self.table.column(side).to_numpy() for side in ("height", "width")], axis=1).astype(float)

    def scales(self, resolution):
        """Returns the cropped height and width of each image, divided by its full height and width, (N, 2)."""
        return np.array(self.bucket_sizes or [(resolution, resolution)])[self.buckets] / self.sizes()

    def label_weights(self, choice):
        """Returns three arrays: each label's row, code and weight. With "first", uses only an image's first label."""
        counts = np.diff(self.label_starts)
        if choice == "first":
            rows = np.flatnonzero(counts)
            return rows, self.label_codes[self.label_starts[rows]], np.ones(len(rows))
        return np.repeat(np.arange(len(self)), counts), self.label_codes, np.repeat(1 / np.maximum(counts, 1), counts)

    def count_repeats(self, choice):
        """Returns {class: number of images, each counted `repeats` times}, or None if all repeats are 1."""
        repeats = self.table.column("repeats").to_numpy()
        if (repeats == 1).all() or not repeats.any():
            return None
        rows, codes, weights = self.label_weights(choice)
        counts = np.bincount(codes, weights=weights * repeats[rows], minlength=len(self.label_names))
        return dict(zip(self.label_names, counts.tolist()))

    def fingerprint(self):
        """Returns a hash of all ids, captions, labels and scores, whatever the order of the samples."""
        columns = [self.table.column(name).to_pylist() for name in ("image_id", "captions", "labels", "score")]
        columns[1] = [texts[0] if len(texts) == 1 else texts for texts in columns[1]]  # as older versions hashed them
        digest = np.bitwise_xor.reduce([np.uint64(hash_text(repr(row))) for row in zip(*columns)])
        return f"{len(self)}-{int(digest):016x}"


def make_index(table, damage, total=None, stamps=None, images=None, image_column="image"):
    """Returns the Index of a table with INDEX_SCHEMA's columns. `total` defaults to the rows plus damaged samples."""
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
# 5 Plan
# -----------------------------------------------------------------------------


# Seam: which samples are trained on. Contract: acceptance(step) has a number in [0, 1] per label and one for no label.
class ClassMix:
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
            raise InputError("--class_csv: none of its classes is in the data; check --class_key and the spelling")
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
                    raise RuntimeError(f"--class_mix: no sample was accepted in {MAX_EMPTY_EPOCHS} epochs")
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
# 6 Images and batches
# -----------------------------------------------------------------------------


@lru_cache(64)
def srgb_transform(profile, mode):
    """Returns a Pillow transform to sRGB, or None if the profile is sRGB. Raises an error if the profile is broken."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode != "RGB":
        return transform
    steps = np.arange(256, dtype=np.uint8)
    probe = np.stack([np.stack([steps, steps, steps], 1), np.stack([steps, steps[::-1], 0 * steps], 1)])
    change = np.abs(probe.astype(int) - np.asarray(ImageCms.applyTransform(Image.fromarray(probe), transform)))
    return None if change.max() <= 3 else transform


def to_srgb(image, profile):
    """Returns an image converted to sRGB, and the reason if its colour profile was ignored, else None."""
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    if image.mode not in ("RGB", "L", "CMYK", "LAB"):
        image = image.convert("L" if image.mode == "LA" else "RGB")
    problem = None
    try:
        transform = srgb_transform(profile, image.mode)
        image = image if transform is None else ImageCms.applyTransform(image, transform)
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        problem = f"colour profile ignored: {' '.join(str(error).split())}"
    if alpha is not None:
        image = image.convert("RGB")
        image.putalpha(alpha)
    return image, problem


def open_image(data, cover=None):
    """Returns an RGB image, upright and on white, the (height, width) of its file, and a profile problem or None.

    Decodes a JPEG at 1/2, 1/4 or 1/8 of its size if that still covers (height, width) `cover`, which is up to four
    times as fast. Raises ValueError for a damaged or truncated image or a decompression bomb.
    """
    try:
        image = Image.open(io.BytesIO(data))
        original_size = oriented_size(image)
        if cover is not None:
            is_turned = original_size != (image.height, image.width)
            image.draft(None, cover if is_turned else cover[::-1])
        image.load()
        profile = image.info.get("icc_profile")
        if image.format == "PNG":
            original_size = oriented_size(image)  # now with the EXIF from behind the pixels
        ImageOps.exif_transpose(image, in_place=True)  # without in_place an upright image would be copied
        if image.mode.startswith("I"):  # 16 bits per pixel: Pillow would clip, not scale
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    except Exception as error:  # decoders raise all kinds of errors for damaged files
        raise ValueError(f"cannot decode image: {str(error).partition(' <_io')[0]}") from None
    image, problem = to_srgb(image, profile) if profile else (image, None)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB"), original_size, problem


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
    """Returns (top, left) of a square crop near the middle. Above 2:1, it is exactly in the middle or at the start."""
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


@dataclass
class ImageDataset:
    """Decodes and crops images. A request is (row, label, step, position); position counts the samples of the run."""

    index: Index
    seed: int
    resolution: int
    crop: str
    random_flip: bool
    interpolation: str  # as --image_interpolation_mode
    cache_dir: object = None
    aesthetic_scale: float = 10.0
    tags: TagAugmentation = TagAugmentation()
    shards: dict = field(default_factory=dict)  # {(process, path): Shard}

    @property
    def bucket_sizes(self):
        return self.index.bucket_sizes or [(self.resolution, self.resolution)]

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
        """Returns what open_image() returns for a row. Raises ValueError if the image is damaged."""
        image, original_size, problem = open_image(self.read(row), bucket)
        if len(self.bucket_sizes) > 1 and original_size != (row["height"], row["width"]):
            raise ValueError("EXIF behind the pixels turns the image: wrong bucket")
        return image, original_size, problem

    def is_flipped(self, row, step):
        return self.random_flip and bool(uniform(FLIP, self.seed, hash_text(row["image_id"]), step) < 0.5)

    def crop_window(self, row, bucket, step, flipped):
        """Returns a row's crop: pixels (3, H, W) uint8, original size, crop offset, target size, problem or None."""
        import torch

        image, original_size, problem = self.open(row, bucket)
        height, width = bucket
        scale = max(height / image.height, width / image.width)
        scaled_height = max(height, round(image.height * scale))
        scaled_width = max(width, round(image.width * scale))
        if self.crop == "random_ar":
            u = float(uniform(CROP, self.seed, hash_text(row["image_id"]), step))
            top, left = random_ar_crop(scaled_height, scaled_width, height, u)
        else:
            top, left = center_crop(scaled_height, scaled_width, bucket)
        # (top, left) are in px of the scaled and mirrored image; only the window is scaled, which bounds the memory
        start = scaled_width - left - width if flipped else left
        across = image.width / scaled_width
        down = image.height / scaled_height
        box = (start * across, top * down, (start + width) * across, (top + height) * down)
        box = np.minimum(box, (image.width, image.height) * 2).tolist()  # rounding may pass the border
        resampling = Image.Resampling[self.interpolation.removesuffix("_exact").upper()]
        image = image.resize((width, height), resampling, box)
        if flipped:
            image = ImageOps.mirror(image)
        return {
            "pixels": torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous(),
            "original_sizes": original_size,
            "crop_top_lefts": (top, left),
            "target_sizes": bucket,
            "problems": problem,
        }

    def load(self, row, request):
        """Returns a row's crop, as crop_window() does. The step decides its position and whether it is mirrored."""
        i, _, step, _ = request
        return self.crop_window(row, self.bucket_size(i), step, self.is_flipped(row, step))

    def flips(self, rows):
        """Returns a list of rows[0]'s crop and, with random_flip, its mirror image, or the reason if it is damaged."""
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
        """Returns the sample for a request. load(row, request) gives its pixels or its encodings."""
        i, label, _, position = request
        row, loaded, damage = self.first_intact(i, label, lambda row: load(row, request), same_bucket)
        replaced = bool(damage)
        problem = loaded.pop("problems")
        if problem:
            damage.append({"shard": row["path"], "key": row["key"], "reason": problem})
        caption = row["captions"][choose_caption(row["captions"], self.seed, position)]
        return {
            **loaded,
            "captions": self.tags.draw(caption, self.seed, position),
            "aesthetic_scores": scale_aesthetic(row["score"], self.aesthetic_scale),
            "species": self.index.label_names[label] if label >= 0 else None,
            "keys": row["key"],
            "sample_seeds": torch_seed(SAMPLE, self.seed, position),
            "positions": position,
            "replaced": replaced,
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

    def load(self, row, request):
        _, _, step, position = request
        if self.latents is not None:
            loaded = self.latents.read(row["image_id"], self.images.is_flipped(row, step))
        else:
            loaded = self.images.load(row, request)
        if self.embeddings is not None:
            caption_number = choose_caption(row["captions"], self.images.seed, position)
            loaded |= self.embeddings.read(row["image_id"], caption_number)
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

    options = {"num_workers": workers, "pin_memory": pin_memory, "prefetch_factor": 4 if workers else None}
    return DataLoader(
        dataset, batch_sampler=batch_sampler, collate_fn=collate, worker_init_fn=ignore_signals, **options
    )


# -----------------------------------------------------------------------------
# 7 Encoding cache
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
        """Writes a file. `samples` maps each image id to a list of dicts, one per flip, or to the damage as text."""
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
