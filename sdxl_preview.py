"""What --dry_run of train_sdxl_lora.py finds out and draws.

The sections:
     1 Numbers   of preview.json: the data, and what a run needs
     2 Text      fonts, and labels that they can write
     3 Pictures  contact_sheet.png and classes.png
     4 Log       a summary
"""

import logging
import unicodedata
from collections import Counter
from dataclasses import asdict
from functools import cache

import numpy as np
from PIL import ImageOps

import sdxl_data as data
import sdxl_memory
import sdxl_speed

# the first of these that is installed writes Japanese and Chinese
CJK_FONTS = ("Noto Sans CJK JP", "Noto Sans JP", "IPAGothic", "IPAexGothic", "Hiragino Sans", "MS Gothic")

logger = logging.getLogger("train_sdxl_lora.preview")

# -----------------------------------------------------------------------------
# 1 Numbers
# -----------------------------------------------------------------------------


def simulate_modes(args, shapes, checkpointing):
    """Returns sdxl_memory.Needs by --gradient_checkpointing mode: for auto of all modes, else of `checkpointing`."""
    modes = sdxl_memory.CHECKPOINTING if args.gradient_checkpointing == "auto" else [checkpointing]
    return {mode: sdxl_memory.estimate_needs(args, shapes, mode) for mode in modes}


def count_flop(args, shapes, checkpointing):
    """Returns the floating-point operations of an image: encoding it, then forward and backward through the UNet."""
    sdxl_speed.set_checkpointing(shapes.trained, checkpointing, dropout=False)
    _, encoding, _ = sdxl_memory.vae_costs(shapes.vae, args.resolution)
    return encoding + sdxl_memory.step_flop(shapes.unet, [], shapes.time_ids, 1, args.resolution, shapes.chunks)


def estimate_resources(args, shapes, checkpointing, device, images):
    """Returns the simulated memory of each part, in bytes, and the least time to train on `images` images."""
    needs = simulate_modes(args, shapes, checkpointing)
    flop = count_flop(args, shapes, checkpointing)
    speed = sdxl_memory.measure_matmul(device, shapes.unet.dtype)
    trained = [p.numel() for model in shapes.trained.values() for p in model.parameters() if p.requires_grad]
    return {
        "trained_parameters": sum(trained),
        "gradient_checkpointing": checkpointing,
        "memory_bytes": asdict(needs[checkpointing]) | {"together": needs[checkpointing].peak},
        "memory_by_checkpointing": {mode: need.peak for mode, need in needs.items()},
        "flop_per_image": flop,
        "matmul_flop_per_second": speed,
        "seconds_at_least": flop * images / speed,
    }


def describe_classes(plan, last):
    """Returns each class's images, its share of the data, and its probability in the first and the last step."""
    columns = zip(plan.arrivals[:, :-1].sum(axis=0), plan.mix.data, plan.mix.target(0), plan.mix.target(last))
    rows = [dict(zip(("images", "data", "at_start", "at_end"), map(float, row))) for row in columns]
    return dict(zip(plan.mix.names, rows))


def describe_buckets(dataset, plan, last):
    """Returns a list of the buckets' sizes, numbers of images, and probabilities in the first and the last step."""
    images = np.bincount(dataset.index.buckets, minlength=len(dataset.bucket_sizes))
    columns = zip(dataset.bucket_sizes, images, plan.bucket_weights(0), plan.bucket_weights(last))
    return [{"size": size, "images": int(n), "at_start": start, "at_end": end} for size, n, start, end in columns]


def count_scores(dataset):
    """Returns how many images have an aesthetic score from 1 to 2, from 2 to 3 and so on, and how many have none."""
    fields = dataset.index.table.column("score").to_pylist()
    scores = [int(data.scale_aesthetic(field, dataset.aesthetic_scale)) for field in fields if field is not None]
    counts = Counter(min(score, 9) for score in scores)
    return {f"{n} to {n + 1}": counts[n] for n in range(1, 10)} | {"none": fields.count(None)}


def describe_data(dataset, plan, steps, caption_tokens):
    """Returns the statistics for preview.json: the dataset, and how a run of `steps` steps will sample it."""
    index = dataset.index
    last = max(steps - 1, 0)
    scales = index.scales(dataset.resolution)
    cut = 1 - scales.min(axis=1) / scales.max(axis=1)
    return {
        "images": len(index),
        "damaged": dict(Counter(map(data.damage_kind, index.damage))),
        "damaged_samples": index.damage[:100],
        "unlabelled": int(plan.arrivals[:, -1].sum()),
        "classes": describe_classes(plan, last),
        "buckets": describe_buckets(dataset, plan, last),
        "cut_off": {"median": float(np.median(cut)), "most": float(cut.max())},
        "scaled_up": {"images": int((scales.max(axis=1) > 1).sum()), "most": float(scales.max())},
        "aesthetic_scores": count_scores(dataset),
        "caption_tokens": {f"{p}%": int(np.percentile(caption_tokens, p)) for p in (0, 25, 50, 75, 95, 100)},
        "captions_over_75_tokens": int((np.array(caption_tokens) > 75).sum()),
    }


# -----------------------------------------------------------------------------
# 2 Text
# -----------------------------------------------------------------------------


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


# -----------------------------------------------------------------------------
# 3 Pictures
# -----------------------------------------------------------------------------


def crop_frame(item, original):
    """Returns (left, top, width, height) of an item's crop, in px of a file of `original` (height, width)."""
    height, width = item["target_sizes"]
    top, left = item["crop_top_lefts"]
    # The crop is in px of the image scaled to cover the bucket; `scale` takes it back to px of the file.
    scale = 1 / max(height / original[0], width / original[1])
    return left * scale, top * scale, width * scale, height * scale


def make_title(item, step, original):
    """Returns the lines above a sample: its class and step, its sizes, its caption."""
    height, width = item["target_sizes"]
    sizes = f"{original[1]} x {original[0]} px, cropped to {width} x {height}"
    lines = [f"{item['species'] or 'no label'}, step {step + 1}", sizes, item["captions"]]
    return "\n".join(make_label(line, 48) for line in lines)


def draw_sample(axes, dataset, request):
    """Draws the image that `request` asks for, with a red frame around its crop."""
    from matplotlib.patches import Rectangle

    i, label, step, _ = request
    item = dataset[request]
    bucket = item["target_sizes"]
    row, (image, original, _), _ = dataset.first_intact(i, label, lambda row: dataset.open(row, bucket))
    if dataset.is_flipped(row, step):
        image = ImageOps.mirror(image)
    image.thumbnail((280, 280))
    ratio = original[1] / original[0]
    aspect = min(max(1, ratio / 8), 8 * ratio)  # shown as at most 8:1, so that one can see a spacer
    axes.imshow(image, extent=(0, original[1], original[0], 0), aspect=aspect)
    left, top, width, height = crop_frame(item, original)
    axes.add_patch(Rectangle((left, top), width, height, fill=False, color="red"))
    axes.set_title(make_title(item, step, original), fontsize=7, loc="left", family=label_fonts()[0])


def draw_contact_sheet(dataset, requests, columns=4):
    """Returns a matplotlib Figure that shows samples with their crop window, class and caption."""
    from matplotlib.figure import Figure

    rows = -(-len(requests) // columns)
    figure = Figure(figsize=(2.8 * columns, 3.3 * rows), layout="constrained")
    for axes in figure.subplots(rows, columns, squeeze=False, subplot_kw={"anchor": "NW"}).flat:
        axes.set_axis_off()
    for axes, request in zip(figure.axes, requests):
        draw_sample(axes, dataset, request)
    return figure


def choose_classes(classes, most):
    """Returns the names of the classes to show, the commonest first: all, or the commonest and rarest `most` / 2."""
    names = sorted(classes, key=lambda name: -classes[name]["data"])
    return names if len(names) <= most else names[: most // 2] + names[-most // 2 :]


def draw_classes(classes, most=60):
    """Returns a matplotlib Figure of class probabilities. Shows only the commonest and rarest if there are many."""
    from matplotlib.figure import Figure

    names = choose_classes(classes, most)
    figure = Figure(figsize=(9, 1.2 + 0.32 * len(names)), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(names))
    kinds = {"data": "share of the data", "at_start": "sampled at step 1", "at_end": "sampled at the last step"}
    for n, (kind, title) in enumerate(kinds.items()):
        colour = ("#b8b8b8", "#2a7fd4", "#e08a1e")[n]
        axes.barh(places + 0.27 * (n - 1), [classes[name][kind] for name in names], 0.25, color=colour, label=title)
    labels = [f"{make_label(name, 26)} ({classes[name]['images']:.0f})" for name in names]
    axes.set_yticks(places, labels, family=label_fonts()[0])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel("probability (number of images in brackets)")
    axes.legend(loc="lower right", frameon=False)
    return figure


# -----------------------------------------------------------------------------
# 4 Log
# -----------------------------------------------------------------------------


def list_sizes(sizes):
    """Returns text such as "none 12.13 GB, blocks 7.25 GB" for a dict of bytes."""
    return ", ".join(f"{name.replace('_', ' ')} {size / 1e9:.2f} GB" for name, size in sizes.items())


def log_summary(args, facts, damaged):
    """Logs the most important numbers of preview.json in a few lines."""
    tokens = facts["caption_tokens"]
    memory = dict(facts["memory_bytes"])
    filled = [bucket["images"] for bucket in facts["buckets"] if bucket["images"]]
    logger.info("images      %d of %d classes, %d unlabelled, %d damaged",
        facts["images"], len(facts["classes"]), facts["unlabelled"], damaged)  # fmt: skip
    logger.info("buckets     %d, of which %d have fewer images than a batch; at most %.0f %% of an image is cut off",
        len(filled), sum(n < facts["global_batch"] for n in filled), 100 * facts["cut_off"]["most"])  # fmt: skip
    logger.info("captions    %d to %d tokens, median %d; %d over 75",
        tokens["0%"], tokens["100%"], tokens["50%"], facts["captions_over_75_tokens"])  # fmt: skip
    if args.stage == "refiner":
        histogram = ", ".join(f"{span}: {count}" for span, count in facts["aesthetic_scores"].items())
        logger.info("aesthetic   images by score: %s (trained with %g)", histogram, data.AESTHETIC_SCORE)
    logger.info("steps       {steps} of {global_batch} images, {steps_per_epoch} per epoch".format(**facts))
    logger.info("parameters  %.3g M trained", facts["trained_parameters"] / 1e6)
    together = memory.pop("together")
    logger.info("memory      %.2f GB per device (simulated): %s", together / 1e9, list_sizes(memory))
    logger.info("            with --gradient_checkpointing %s", list_sizes(facts["memory_by_checkpointing"]))
    logger.info("time        at least %.2g h: %.3g TFLOP per image, %.3g TFLOP/s in a matrix product on this device",
        facts["seconds_at_least"] / 3600, facts["flop_per_image"] / 1e12,
        facts["matmul_flop_per_second"] / 1e12)  # fmt: skip
