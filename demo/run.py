"""The demo: draw a dataset, teach the toy SDXL the species it has never seen, show and count what changed.

    make demo        # python demo/launch.py --output_dir demo/output

It writes OUTPUT/report.html, before_after.png and metrics.json beside the training run in OUTPUT/lora. Every picture
is judged by the demo's own CLIP: which of the 16 species does it show, zero-shot? The judge saw drawings of all of
them; the SDXL under test never saw five.
"""

import argparse
import html
import json
import math
import time
from pathlib import Path

import numpy as np
import open_clip
import psutil
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from diffusers import StableDiffusionXLPipeline
from PIL import Image, ImageDraw
from world import FACINGS, PLACES, POSES, PRETRAINED, SPECIES, UNSEEN, Scene, draw_scene, make_dataset

import train_sdxl_lora

HERE = Path(__file__).resolve().parent
GLOBAL_BATCH = 16
TRAINING = {
    "--resolution": 64,
    "--max_train_steps": 320,
    "--learning_rate": 6e-3,
    "--rank": 32,
    "--lora_target_modules": ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
    "--text_encoder_rank": 16,
    "--text_encoder_lr_scale": 1.0,
    "--species_mix": (0.0, 0.1, 320),
    "--caption_dropout_rate": 0.1,
    "--noise_offset": 0.2,  # without it yellow creatures come out red in bright places
    "--checkpointing_steps": 160,
    "--validation_steps": 320,
    "--mixed_precision": "no",
    "--report_to": "none",
    "--seed": 0,
}
IMAGES_PER_UNSEEN, IMAGES_PER_PRETRAINED = 40, 8
INFERENCE_STEPS, GUIDANCE = 6, 2.5


def make_panel():
    """[(scene, seed)]: single creatures in every kind of scene, the same for every model under test."""
    panel = []
    for number, species in enumerate(SPECIES):
        for i in range(IMAGES_PER_PRETRAINED if species.pretrained else IMAGES_PER_UNSEEN):
            scene = Scene((species,), PLACES[i % 5], POSES[i // 5 % 2], FACINGS[i // 10 % 2], finish=0.9)
            panel.append((scene, 1000 * number + i))
    return panel


def generate(pipeline, panel, batch_size=55):
    """(n, 64, 64, 3) uint8: a picture per entry of the panel, each from its own seed."""
    images = []
    for start in range(0, len(panel), batch_size):
        chunk = panel[start : start + batch_size]
        images += pipeline(
            [scene.caption() for scene, _ in chunk],
            height=64,
            width=64,
            num_inference_steps=INFERENCE_STEPS,
            guidance_scale=GUIDANCE,
            generator=[torch.Generator().manual_seed(seed) for _, seed in chunk],
            output_type="np",
        ).images.tolist()
    return (np.array(images) * 255).round().astype(np.uint8)


class Judge:
    """Names the species of pictures, zero-shot, with the demo's CLIP."""

    def __init__(self, folder=HERE / "clip"):
        self.model, _, self.preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        self.model.eval()
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
        with torch.no_grad():
            self.classes = self.model.encode_text(tokenizer([s.name for s in SPECIES]), normalize=True)

    def name(self, images):
        """Index into SPECIES for each of `images` (n, H, W, 3) uint8."""
        with torch.no_grad():
            pixels = torch.stack([self.preprocess(Image.fromarray(image)) for image in images])
            return (self.model.encode_image(pixels, normalize=True) @ self.classes.T).argmax(dim=1).numpy()


def wilson(right, total, z=1.96):
    """(share, low, high): a 95 % Wilson interval; Wilson 1927."""
    share, z2 = right / total, z * z
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = z / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total))
    return share, max(middle - half, 0.0), min(middle + half, 1.0)


def score(panel, named):
    """{"unseen" | "pretrained" | species: {"right", "images", "share", "low", "high"}}."""
    prompted = [scene.creatures[0] for scene, _ in panel]
    right = np.array([SPECIES[n] is species for n, species in zip(named, prompted)])
    groups = {"unseen": UNSEEN, "pretrained": PRETRAINED} | {s.name: (s,) for s in SPECIES}
    scores = {}
    for group, members in groups.items():
        mask = np.array([species in members for species in prompted])
        share, low, high = wilson(int(right[mask].sum()), int(mask.sum()))
        scores[group] = {
            "right": int(right[mask].sum()),
            "images": int(mask.sum()),
            "share": share,
            "low": low,
            "high": high,
        }
    return scores


def load_pipeline(lora=None):
    pipeline = StableDiffusionXLPipeline.from_pretrained(HERE / "sdxl", dtype=torch.float32, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    return pipeline


def draw_before_after(panel, before, after, path, tile=96, margin=76, header=18, gap=8):
    """A column per species: what it looks like, then two pictures by the base, and the same two with the LoRA."""
    columns = [*UNSEEN, *PRETRAINED[:3]]
    labels = ["drawn", "base", "", "with LoRA", ""]
    tops = [header + r * tile + gap * (r + 1) // 2 for r in range(len(labels))]
    sheet = Image.new("RGB", (margin + len(columns) * tile, tops[-1] + tile), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((6, 3), "* never seen", fill="gray")
    for top, label in zip(tops, labels):
        pen.text((6, top + tile // 2 - 6), label, fill="black")
    for column, species in enumerate(columns):
        left = margin + column * tile
        pen.text((left + 4, 3), species.name + ("" if species.pretrained else " *"), fill="black")
        first, second = [i for i, (scene, _) in enumerate(panel) if scene.creatures[0] is species][:2]
        drawn = draw_scene(panel[first][0], np.random.default_rng(0), tile, tile)
        pictures = [drawn, *(Image.fromarray(images[i]) for images in (before, after) for i in (first, second))]
        for top, picture in zip(tops, pictures):
            sheet.paste(picture.resize((tile - 2, tile - 2), Image.Resampling.BICUBIC), (left, top))
    sheet.save(path)


def percent(s):
    return f"{100 * s['share']:.1f} % ({100 * s['low']:.1f}–{100 * s['high']:.1f} %) of {s['images']}"


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<title>Demo: a LoRA teaches five unseen species</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem;
       color-scheme: light dark }}
h1 {{ font-size: 1.6rem; line-height: 1.2 }} img {{ width: 100% }} table {{ border-collapse: collapse; width: 100% }}
td, th {{ padding: .25rem .6rem; text-align: left; border-bottom: 1px solid #8884 }}
td {{ font-variant-numeric: tabular-nums }} small {{ opacity: .7; white-space: nowrap }}
</style>
<h1>A LoRA teaches the toy SDXL five species it never saw</h1>
<img src="before_after.png" alt="what each species looks like, pictures of the base model, pictures with the LoRA">
<h2>Right pictures</h2>
<p>Share of pictures in which the demo's CLIP names the prompted species among 16, with its 95 % interval.</p>
<table><tr><th>species<th>base<th>with LoRA</tr>{rows}</table>
<h2>The run</h2><p>{facts}</p><pre style="overflow-x:auto">{command}</pre></html>
"""


def write_report(output_dir, before, after, command, facts):
    def cell(s):
        interval = f"{100 * s['low']:.0f}–{100 * s['high']:.0f} % of {s['images']}"
        return f"<td>{100 * s['share']:.0f} % <small>{interval}</small>"

    groups = ["unseen", "pretrained", *(s.name for s in UNSEEN), *(s.name for s in PRETRAINED)]
    rows = "".join(f"<tr><td>{html.escape(g)}{cell(before[g])}{cell(after[g])}</tr>" for g in groups)
    page = PAGE.format(rows=rows, command=html.escape(command), facts=html.escape(facts))
    (output_dir / "report.html").write_text(page, encoding="utf-8")


def training_words(output_dir, processes):
    """The trainer's command line, as a user would give it."""
    flags = {
        "--pretrained_model_name_or_path": HERE / "sdxl",
        "--train_shards": HERE / "data/data/train",
        "--val_shards": HERE / "data/data/val",
        "--species_csv": HERE / "data/manifests/train_species.csv",
        "--output_dir": output_dir / "lora",
        **TRAINING,
        "--train_batch_size": GLOBAL_BATCH // processes,
    }
    words = ["--train_text_encoder", "--overwrite_output_dir"]
    for flag, value in flags.items():
        words += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def merge(shares):
    """The pictures of all processes in the panel's order, of which each process makes every n-th."""
    images = np.zeros((sum(map(len, shares)), 64, 64, 3), np.uint8)
    for rank, share in enumerate(shares):
        images[rank :: len(shares)] = share
    return images


def wait_for(file):
    """The array in `file`, as soon as the process that makes it has finished."""
    while not file.exists():
        time.sleep(0.1)
    return np.load(file)


def main(output_dir):
    state = PartialState(cpu=True)
    rank, world = state.process_index, state.num_processes
    output_dir.mkdir(parents=True, exist_ok=True)
    with state.main_process_first():
        if not (HERE / "data/manifests/train_species.csv").exists():
            print("drawing the dataset: {} training and {} validation images".format(*make_dataset(HERE / "data")))
    panel = make_panel()
    after_files = [output_dir / f"after-{r}.npy" for r in range(world)]
    after_files[rank].unlink(missing_ok=True)
    state.print(f"before: {len(panel)} pictures by the base model", flush=True)
    before_images = merge(gather_object([generate(load_pipeline(), panel[rank::world])]))
    state.print("training the LoRA", flush=True)
    start = time.time()
    words = training_words(output_dir, world)
    train_sdxl_lora.main(words)  # closes the processes' group at its end
    state.print(f"trained in {time.time() - start:.0f} s; after: {len(panel)} pictures with the LoRA", flush=True)
    partial = output_dir / f"partial-{rank}.npy"
    np.save(partial, generate(load_pipeline(output_dir / "lora"), panel[rank::world]))
    partial.replace(after_files[rank])
    if not state.is_main_process:
        return

    after_images = merge([wait_for(file) for file in after_files])
    judge = Judge()
    before, after = score(panel, judge.name(before_images)), score(panel, judge.name(after_images))
    draw_before_after(panel, before_images, after_images, output_dir / "before_after.png")
    launch = f"accelerate launch --num_processes {world}" if world > 1 else "python"
    seconds = time.time() - psutil.Process().create_time()
    facts = f"The demo took {seconds:.0f} s."
    write_report(output_dir, before, after, " ".join([launch, "train_sdxl_lora.py", *words]), facts)
    scores = {"before": before, "after": after, "seconds": seconds}
    (output_dir / "metrics.json").write_text(json.dumps(scores, indent=1) + "\n")
    for group in ("unseen", "pretrained"):
        print(f"{group:>10} species, named right: base {percent(before[group])}  →  with LoRA {percent(after[group])}")
    print(f"{facts} Pictures: {output_dir / 'before_after.png'}  Report: {output_dir / 'report.html'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=HERE / "output", metavar="DIR")
    main(parser.parse_args().output_dir)
