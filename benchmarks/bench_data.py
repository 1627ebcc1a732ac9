"""Images per second of one core: this trainer's loader beside a plain webdataset pipeline, alternating.

    python benchmarks/bench_data.py            # 2048 px JPEGs to 1024 px crops, the demo's long-tailed species

Both read the same local shards in one process on one thread and give float batches. The plain pipeline is what
training scripts write: decode with Pillow, Lanczos resize, crop, ToTensor, Normalize; with classes to balance it
accepts or rejects after decoding, since only then the sample is at hand. Each figure is the median of the rounds.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
from PIL import Image
from torchvision import transforms

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]
from world import DATASET, draw_scene, encode_image, sample_scene  # noqa: E402

import train_sdxl_lora as trainer  # noqa: E402

BATCH = 8


def write_shards(folder, images, side):
    """Shards of `images` JPEGs of side x side px, drawn small and enlarged with grain, species long-tailed."""
    counts = np.array([s.count for s in DATASET], dtype=float)
    species = np.random.default_rng(0).choice(len(DATASET), images, p=counts / counts.sum())
    species[: len(DATASET)] = range(len(DATASET))
    with wds.ShardWriter(f"{folder}/train-%05d.tar", maxcount=64, verbose=0) as writer:
        for n, code in enumerate(species):
            rng = np.random.default_rng(n)
            drawn = draw_scene(sample_scene(rng, DATASET[code], DATASET), rng, 256, 256)
            pixels = np.asarray(drawn.resize((side, side), Image.Resampling.BICUBIC), dtype=np.int16)
            noisy = (pixels + rng.integers(-6, 7, (side, side, 1))).clip(0, 255).astype(np.uint8)
            data = {"image_id": f"image {n}", "species_list": [DATASET[code].name]}
            image = encode_image(Image.fromarray(noisy), "jpg")
            writer.write({"__key__": f"{n:06d}", "jpg": image, "txt": f"caption {n}", "json": data})


def make_mix(index, weight):
    return trainer.SpeciesMix(index, "random", None, weight, weight, 0)


def ours(index, weight, resolution, batches):
    """Seconds of `batches` batches."""
    plan = trainer.SamplePlan(index, make_mix(index, weight), "random", 0, BATCH)
    dataset = trainer.ImageDataset(index, 0, resolution, "center", False, "lanczos")
    loader = trainer.make_loader(dataset, trainer.MicroBatches(plan, batches, BATCH, 0, 1), 0, False)
    started = time.perf_counter()
    for batch in loader:
        trainer.move_batch(batch, "cpu")
    return time.perf_counter() - started


def plain(folder, index, weight, resolution, batches):
    """Seconds of `batches` batches of the plain pipeline, which accepts with the same probabilities."""
    acceptance = dict(zip(index.label_names, make_mix(index, weight).acceptance(0)))
    rng = np.random.default_rng(0)
    prepare = transforms.Compose(
        [
            transforms.Resize(resolution, transforms.InterpolationMode.LANCZOS),
            transforms.CenterCrop(resolution),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )
    shards = sorted(map(str, Path(folder).glob("*.tar")))
    pipeline = (
        wds.WebDataset(shards * 1000, shardshuffle=False)
        .decode("pil")
        .select(lambda s: rng.random() < acceptance[s["json"]["species_list"][0].casefold()])
        .to_tuple("jpg", "txt")
        .map_tuple(prepare, str)
        .batched(BATCH)
    )
    started = time.perf_counter()
    for number, _ in enumerate(pipeline, 1):
        if number == batches:
            return time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=192, metavar="N", help="images in the shards")
    parser.add_argument("--side", type=int, default=2048, metavar="PX", help="side of the stored images")
    parser.add_argument("--resolution", type=int, default=1024, metavar="PX", help="side of the crops")
    parser.add_argument("--batches", type=int, default=4, metavar="N", help="batches of 8 per round")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_shards(folder, args.images, args.side)
        rows = [
            row
            for path in sorted(Path(folder).glob("*.tar"))
            for row in trainer.index_shard(trainer.Shard(str(path), None), "species_list")[0]
        ]
        index = trainer.make_index(trainer.pa.Table.from_pylist(rows, trainer.INDEX_SCHEMA), [])
        print("| classes | plain webdataset, img/s | this loader, img/s | ratio |\n|---|---|---|---|")
        for weight, name in ((1.0, "as they come (m = 1)"), (0.2, "balanced (m = 0.2)")):
            seconds = [
                (plain(folder, index, weight, args.resolution, args.batches),
                 ours(index, weight, args.resolution, args.batches))
                for _ in range(args.rounds)
            ]  # fmt: skip
            slow, fast = (BATCH * args.batches / statistics.median(column) for column in zip(*seconds))
            ratio = statistics.median(a / b for a, b in seconds)
            print(f"| {name} | {slow:.1f} | {fast:.1f} | {ratio:.1f} × |", flush=True)


if __name__ == "__main__":
    main()
