"""Shards and indexes made by hand, for tests of sdxl_data.py."""

import io
import json
import tarfile
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import webdataset as wds
from harness import ALONE
from PIL import Image

import sdxl_data
import train_sdxl_lora as trainer

KEYS = [f"s{i}" for i in range(10)]


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
    rows = [
        {"repeats": 1, "key": i, "image_id": i, "captions": [i], "labels": list(row)} for i, row in zip(ids, labels)
    ]
    return sdxl_data.make_index(pa.Table.from_pylist(rows, sdxl_data.INDEX_SCHEMA), [])


def index_shard(path, species_key="species_list"):
    return sdxl_data.index_shard(sdxl_data.Shard(str(path), None), sdxl_data.Fields(labels=species_key))


def open_image(data):
    return sdxl_data.open_image(data)[0]


def index_of_shard(path):
    rows, damage = index_shard(path)
    return sdxl_data.make_index(pa.Table.from_pylist(rows, sdxl_data.INDEX_SCHEMA), damage)


def index_of_folder(*folders, **fields):
    rows, damage, stamps = sdxl_data.index_folders(list(map(str, folders)), sdxl_data.Fields(**fields))
    return sdxl_data.make_index(pa.Table.from_pylist(rows, sdxl_data.INDEX_SCHEMA), damage, stamps=stamps)


def load_index(shards, tmp_path, seed=1, **flags):
    unset = "max_train_samples cache_dir instance_prompt min_image_size trigger_word val_fraction".split()
    flags = dict.fromkeys(unset) | {"max_bad_fraction": 0.05, "output_dir": tmp_path} | flags
    fields = {"image_column": "image", "caption_column": "text", "class_key": "species_list"}
    args = SimpleNamespace(train_shards=[str(s) for s in shards], aesthetic_key="ae_aesthetic", **fields, **flags)
    return trainer.load_index(ALONE, args, "--train_shards", seed)[0]


def edit_shard(source, target, edit):
    """Copies a shard; edit(name, bytes) returns the new bytes of each member, or None to leave it out."""
    with tarfile.open(source) as old, tarfile.open(target, "w") as new:
        for member in old.getmembers():
            data = edit(member.name, old.extractfile(member).read())
            if data is not None:
                member.size = len(data)
                new.addfile(member, io.BytesIO(data))
    return target
