"""Measure the images per second that one core loads: this trainer's loader beside two others.

    python benchmarks/bench_data.py            # a quarter of an hour; 1024 px crops

Each makes float batches of the same images, in one process with one thread:
- plain webdataset: Pillow, Lanczos resize, crop, ToTensor, Normalize. To balance classes it accepts each sample with
  the same probability as ours, but only after decoding it;
- diffusers' recipe: the same transforms on image files, without balancing (train_text_to_image_lora_sdxl.py);
- ours: decodes only accepted samples, and JPEGs at a reduced size where that is enough.
Over HTTP, every request takes 50 ms more. They take turns; figures are medians over the rounds.
"""

import argparse
import contextlib
import http.server
import io
import multiprocessing
import os
import re
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

import sdxl_data
import train_sdxl_lora as trainer  # noqa: E402

BATCH = 8


def make_images(images, side, extension):
    """Yields (species, encoded image of side × side px): enlarged drawings with grain; species are long-tailed."""
    counts = np.array([s.count for s in DATASET], dtype=float)
    species = np.random.default_rng(0).choice(len(DATASET), images, p=counts / counts.sum())
    species[: len(DATASET)] = range(len(DATASET))
    for n, code in enumerate(species[:images]):
        rng = np.random.default_rng(n)
        drawn = draw_scene(sample_scene(rng, DATASET[code], DATASET), rng, 256, 256)
        pixels = np.asarray(drawn.resize((side, side), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = (pixels + rng.integers(-6, 7, (side, side, 1))).clip(0, 255).astype(np.uint8)
        yield DATASET[code].name, encode_image(Image.fromarray(noisy), extension)


def write_shards(folder, images, side, extension="jpg"):
    """Writes shards of 64 images, and every image also as a file."""
    with wds.ShardWriter(f"{folder}/train-%05d.tar", maxcount=64, verbose=0) as writer:
        for n, (name, image) in enumerate(make_images(images, side, extension)):
            data = {"image_id": f"image {n}", "species_list": [name]}
            writer.write({"__key__": f"{n:06d}", extension: image, "txt": f"caption {n}", "json": data})
            Path(folder, f"{n:06d}.{extension}").write_bytes(image)


def make_index(shards, cache_dir):
    rows = []
    for path in shards:
        rows += sdxl_data.index_shard(sdxl_data.Shard(path, cache_dir), sdxl_data.Fields())[0]
    return sdxl_data.make_index(trainer.pa.Table.from_pylist(rows, sdxl_data.INDEX_SCHEMA), [])


def make_mix(index, weight):
    return sdxl_data.ClassMix(index, "random", None, weight, weight, 0)


def ours(index, weight, resolution, batches, folder):
    """Seconds that our loader takes for `batches` batches."""
    plan = sdxl_data.SamplePlan(index, make_mix(index, weight), "random", 0, BATCH)
    dataset = sdxl_data.ImageDataset(index, 0, resolution, "center", False, "lanczos", folder)
    dataset.read(index.row(0))  # opens the shard, which in a run is done before the first batch only
    loader = sdxl_data.make_loader(dataset, sdxl_data.MicroBatches(plan, batches, BATCH, 0, 1), 0, False)
    started = time.perf_counter()
    for batch in loader:
        trainer.move_batch(batch, "cpu")
    return time.perf_counter() - started


def prepare(resolution):
    return transforms.Compose(
        [
            transforms.Resize(resolution, transforms.InterpolationMode.LANCZOS),
            transforms.CenterCrop(resolution),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )


def plain_webdataset(shards, acceptance, resolution, batches):
    """Seconds that the plain pipeline takes for `batches` batches; `acceptance` is {species: probability}."""
    rng = np.random.default_rng(0)
    pipeline = (
        wds.WebDataset(shards * 1000, shardshuffle=False)
        .decode("pil")
        .select(lambda s: rng.random() < acceptance[s["json"]["species_list"][0].casefold()])
        .to_tuple("jpg;png;webp", "txt")
        .map_tuple(prepare(resolution), str)
        .batched(BATCH)
    )
    started = time.perf_counter()
    for number, _ in enumerate(pipeline, 1):
        if number == batches:
            return time.perf_counter() - started


def diffusers_recipe(files, resolution, batches):
    """Seconds that the transforms of diffusers' script take for `batches` batches of image files."""
    transform = prepare(resolution)
    started = time.perf_counter()
    for start in range(0, batches * BATCH, BATCH):
        names = [files[i % len(files)] for i in range(start, start + BATCH)]
        torch.stack([transform(Image.open(io.BytesIO(Path(name).read_bytes())).convert("RGB")) for name in names])
    return time.perf_counter() - started


class SlowServer(http.server.SimpleHTTPRequestHandler):
    """Serves a folder over HTTP, with byte ranges; every request waits `delay` seconds first."""

    delay = 0.05
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        time.sleep(self.delay)
        with open(self.translate_path(self.path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            first, last = (int(asked[1]), min(int(asked[2]), size - 1)) if asked else (0, size - 1)
            self.send_response(206 if asked else 200)
            if asked:
                self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
            self.send_header("Content-Length", str(last - first + 1))
            self.end_headers()
            file.seek(first)
            with contextlib.suppress(ConnectionError):  # a pipeline that needs no more closes the connection
                for start in range(first, last + 1, 1 << 20):
                    self.wfile.write(file.read(min(1 << 20, last + 1 - start)))

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def served(folder):
    """Context manager: serves `folder` from another process; its value is the address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: SlowServer(*a, directory=folder))
    process = multiprocessing.get_context("fork").Process(target=server.serve_forever, daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        process.kill()
        server.server_close()


def compare(images, rounds, *timed):
    """(images per second of each, ratios of the last to each other one): medians over rounds; they take turns."""
    seconds = [[run() for run in timed] for _ in range(rounds)]
    speeds = [images / statistics.median(column) for column in zip(*seconds)]
    ratios = [statistics.median(row[i] / row[-1] for row in seconds) for i in range(len(timed) - 1)]
    return speeds, ratios


def bench(source, resolution, batches, rounds, weight=1.0, remote=None):
    """compare() for the shards in the folder `source`; they are read from the address `remote` if there is one."""
    shards = sorted(map(str, Path(source).glob("*.tar")))
    shards = [f"{remote}/{Path(path).name}" for path in shards] if remote else shards
    files = sorted(str(path) for path in Path(source).iterdir() if path.suffix in (".jpg", ".png", ".webp"))
    index = make_index(shards, source)
    acceptance = dict(zip(index.label_names, make_mix(index, weight).acceptance(0)))
    timed = [lambda: plain_webdataset(shards, acceptance, resolution, batches)]
    if weight == 1.0 and not remote:
        timed.append(lambda: diffusers_recipe(files, resolution, batches))
    timed.append(lambda: ours(index, weight, resolution, batches, source))
    return compare(BATCH * batches, rounds, *timed)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="*", default=["jpg", "png", "webp"], metavar="EXTENSION")
    parser.add_argument("--sides", nargs="*", type=int, default=[1024, 2048, 3000], metavar="PX")
    parser.add_argument("--resolution", type=int, default=1024, metavar="PX", help="side of the crops")
    parser.add_argument("--batches", type=int, default=2, metavar="N", help="batches of 8 per round")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| images | plain webdataset, img/s | diffusers' recipe, img/s | this loader, img/s | ratios |")
    print("|---|---|---|---|---|", flush=True)

    def show(name, speeds, ratios):
        middle = f"{speeds[1]:.1f}" if len(speeds) == 3 else "–"
        found = ", ".join(f"{ratio:.1f} ×" for ratio in ratios)
        print(f"| {name} | {speeds[0]:.1f} | {middle} | {speeds[-1]:.1f} | {found} |", flush=True)

    for extension in args.formats:
        for side in args.sides:
            with tempfile.TemporaryDirectory() as folder:
                write_shards(folder, 16, side, extension)
                row = bench(folder, args.resolution, args.batches, args.rounds)
                show(f"{extension} of {side} px", *row)
    with tempfile.TemporaryDirectory() as folder:
        write_shards(folder, 192, 2048)
        many = 2 * args.batches, args.rounds
        show("jpg of 2048 px, classes balanced, m = 0.2", *bench(folder, args.resolution, *many, weight=0.2))
        with served(folder) as remote:
            show("jpg of 2048 px over HTTP, 50 ms", *bench(folder, args.resolution, *many, remote=remote))
            show("the same, m = 0.2", *bench(folder, args.resolution, *many, weight=0.2, remote=remote))


if __name__ == "__main__":
    main()
