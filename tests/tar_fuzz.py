"""Damages tars at random and compares what would be trained on with what was packed.

    python tests/tar_fuzz.py --tars 5000 --seed 1

A tar's files carry no checksum, so two kinds of damage cannot be seen, and are counted apart: blocks of 512 bytes that
were exchanged for blocks of the same kind of file ("exchanged"), and a few changed letters or digits ("changed").
"""

import argparse
import io
import json
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sdxl_data

BLOCK = 512
WORDS = (
    "red blue pale old small giant mew pichu standing asleep forest river tower night dawn sketch watercolour".split()
)


def make_sample(rng, number):
    """Returns {extension: bytes} of a sample. Captions and JSON are shorter or longer than a block."""
    from PIL import Image

    pixels = rng.integers(0, 256, (int(rng.integers(8, 40)), int(rng.integers(8, 40)), 3), dtype=np.uint8)
    image = io.BytesIO()
    Image.fromarray(pixels).save(image, "PNG")
    caption = f"picture {number}: " + ", ".join(rng.choice(WORDS, int(rng.integers(3, 120))))
    labels = [str(name) for name in rng.choice(["mew", "pichu", "onix"], int(rng.integers(1, 3)), replace=False)]
    metadata = {
        "image_id": f"id{number}",
        "species_list": labels,
        "tags": " ".join(rng.choice(WORDS, rng.integers(1, 90))),
    }
    return {"png": image.getvalue(), "txt": caption.encode(), "json": json.dumps(metadata).encode()}


def pack(samples):
    """Returns the bytes of a tar of {key: {extension: bytes}}."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, parts in samples.items():
            for extension, data in parts.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def flip_bits(rng, data):
    for at in rng.integers(0, len(data), int(rng.integers(1, 9))):
        data[at] ^= 1 << int(rng.integers(8))
    return data


def burst(rng, data):
    at, length = int(rng.integers(len(data))), int(rng.integers(1, 2000))
    data[at : at + length] = rng.bytes(len(data[at : at + length]))
    return data


def cut(rng, data):
    return data[: int(rng.integers(len(data)))]


def hole(rng, data):
    at = int(rng.integers(len(data)))
    del data[at : at + int(rng.integers(1, 3000))]
    return data


def some_blocks(rng, data, most=6):
    """Returns the byte range of a few whole blocks."""
    count = len(data) // BLOCK
    start = int(rng.integers(count))
    return start * BLOCK, min(start + int(rng.integers(1, most)), count) * BLOCK


def zero(rng, data):
    start, end = some_blocks(rng, data)
    data[start:end] = bytes(end - start)
    return data


def swap(rng, data):
    count = len(data) // BLOCK
    length = int(rng.integers(1, 5)) * BLOCK
    first, second = sorted(int(n) * BLOCK for n in rng.integers(0, max(count - 5, 1), 2))
    if second - first >= length:
        data[first : first + length], data[second : second + length] = (
            data[second : second + length],
            data[first : first + length],
        )
    return data


def double(rng, data):
    start, end = some_blocks(rng, data)
    return data[:end] + data[start:end] + data[end:]


def insert(rng, data):
    at = int(rng.integers(len(data) // BLOCK)) * BLOCK
    return data[:at] + rng.bytes(int(rng.integers(1, 5)) * BLOCK) + data[at:]


def delete(rng, data):
    start, end = some_blocks(rng, data)
    del data[start:end]
    return data


DAMAGES = (flip_bits, burst, cut, hole, zero, swap, double, insert, delete)


def blocks_of(samples, extension):
    return {
        parts[extension][at : at + BLOCK]
        for parts in samples.values()
        for at in range(0, len(parts[extension]), BLOCK)
    }


def judge(found, original, others):
    """Returns "right", "exchanged", "changed" or "wrong" for the bytes of a text file that was delivered."""
    if found == original:
        return "right"
    if all(found[at : at + BLOCK] in others for at in range(0, len(found), BLOCK)):
        return "exchanged"
    same = sum(a == b for a, b in zip(found, original))
    return "changed" if len(found) == len(original) and len(found) - same <= 8 else "wrong"


def try_tar(rng, path, count=16):
    """Damages one tar. Returns a Counter of what became of its samples, and what was wrong in words."""
    samples = {f"s{n:02d}": make_sample(rng, n) for n in range(count)}
    whole = pack(samples)
    damage = DAMAGES[int(rng.integers(len(DAMAGES)))]
    data = bytes(damage(rng, bytearray(whole)))
    path.write_bytes(data)
    shard = sdxl_data.Shard(str(path), None)
    rows, reports = sdxl_data.index_shard(shard, sdxl_data.Fields())
    result, faults = Counter(), []
    delivered = set()
    captions, metadata = blocks_of(samples, "txt"), blocks_of(samples, "json")
    members = {}
    for key, files, _ in sdxl_data.group_members(sdxl_data.iter_tar_members(shard, lambda reason: None)):
        members.setdefault(key, files)
    for row in rows:
        try:
            sdxl_data.open_image(shard.read(row["offset"], row["size"]))
        except ValueError:
            result["damaged image"] += 1
            delivered.add(row["key"])
            reports.append(row)
            continue
        delivered.add(row["key"])
        parts = samples.get(row["key"])
        if parts is None:
            result["wrong"] += 1
            faults.append(f"{damage.__name__}: unknown sample {row['key']}")
            continue
        kinds = [judge(row["captions"][0].encode(), parts["txt"], captions)]
        truth = json.loads(parts["json"])
        if (row["image_id"], row["labels"]) != (truth["image_id"], truth["species_list"]):
            file = members[row["key"]].get("json")
            kinds.append(judge(sdxl_data.read_member(shard, file), parts["json"], metadata) if file else "wrong")
        worst = max(kinds, key=("right", "changed", "exchanged", "wrong").index)
        result[worst] += 1
        if worst == "wrong":
            faults.append(f"{damage.__name__}: {row['key']} {row['captions'][0][:80]!r} {row['labels']}")
    lost = samples.keys() - delivered
    named = {report["key"] for report in reports}
    result["reported"] += len(lost & named)
    if lost - named and not reports:
        result["lost in silence"] += len(lost - named)
        faults.append(f"{damage.__name__}: lost {sorted(lost - named)}")
    elif lost - named:
        result["beside a reported place"] += len(lost - named)
    return result, faults


def fuzz(tars, seed, folder):
    """Returns a Counter over the samples of `tars` damaged tars, and the faults as (tar's number, text)."""
    total, faults = Counter(), []
    for number in range(tars):
        result, found = try_tar(np.random.default_rng((seed, number)), Path(folder) / "fuzzed.tar")
        total += result
        faults += [(number, text) for text in found]
    return total, faults


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tars", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        total, faults = fuzz(args.tars, args.seed, folder)
    print(f"seed {args.seed}, {args.tars} tars: {dict(total)}")
    for number, text in faults:
        print(f"  tar {number}: {text}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
