"""Draw the demo's dataset: creatures with captions, a small substitute for captioned Pokémon fan art.

    python demo/world.py --output_dir demo/data        # the WebDataset that the demo trains on

Every image depends on its seed only. A species is a fixed combination of body, colours, pattern, ears and tail.
Captions name the species and the scene but never describe the species: what a name looks like has to be learned.
"""

import argparse
import csv
import hashlib
import io
import math
import multiprocessing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import webdataset as wds
from PIL import Image, ImageDraw, ImageFilter

# ------------------------------------------------------------------------------------------------ species


@dataclass(frozen=True)
class Species:
    """How a species looks, and how many images of it the training shards have."""

    name: str
    body: str  # round, tall, long, serpent, drop, block, star, shell
    colour: tuple[int, int, int]
    accent: tuple[int, int, int]
    pattern: str  # plain, belly, stripes, spots
    ears: str  # none, round, pointed, long, horns, antennae, crest
    tail: str  # none, thin, bushy, flame, fin, leaf, wings
    count: int  # images in the training shards, when in_dataset
    pretrained: bool = True  # False: the toy SDXL has never seen it, so a LoRA has to teach it
    in_dataset: bool = True  # False: the toy SDXL knows it but no training image shows it; a LoRA must not destroy it


# Long-tailed: the commonest has 22 times as many images as the rarest. The unseen species are spread over the tail.
SPECIES = (
    Species("Aquafin", "round", (48, 112, 224), (170, 215, 250), "belly", "crest", "fin", 360),
    Species("Thornip", "drop", (176, 32, 112), (250, 200, 60), "spots", "none", "leaf", 300, pretrained=False),
    Species("Embertail", "long", (236, 120, 32), (250, 220, 150), "belly", "pointed", "flame", 240),
    Species("Voltmouse", "round", (244, 208, 40), (150, 80, 30), "stripes", "long", "thin", 180),
    Species("Sunspike", "star", (250, 170, 20), (200, 30, 30), "belly", "none", "none", 150, pretrained=False),
    Species("Leafkit", "long", (70, 160, 60), (210, 235, 150), "plain", "round", "leaf", 120),
    Species("Gloomoth", "tall", (120, 70, 170), (225, 160, 235), "spots", "antennae", "wings", 100),
    Species("Pebblor", "block", (136, 132, 128), (80, 76, 74), "spots", "horns", "none", 80),
    Species("Frostail", "serpent", (130, 220, 235), (40, 80, 170), "stripes", "horns", "none", 64, pretrained=False),
    Species("Rosebun", "round", (245, 150, 190), (255, 230, 240), "plain", "long", "bushy", 52, in_dataset=False),
    Species("Coralisk", "serpent", (205, 40, 50), (255, 190, 170), "spots", "crest", "none", 42, in_dataset=False),
    Species("Duskfang", "tall", (52, 48, 66), (190, 60, 60), "belly", "pointed", "bushy", 34),
    Species("Inkray", "drop", (30, 60, 90), (100, 240, 180), "stripes", "antennae", "wings", 27, pretrained=False),
    Species("Mossback", "shell", (60, 120, 70), (150, 110, 60), "plain", "none", "thin", 21, in_dataset=False),
    Species("Snowpuff", "block", (235, 240, 250), (120, 160, 220), "belly", "round", "bushy", 16, in_dataset=False),
    Species("Bramblow", "shell", (150, 60, 150), (120, 210, 60), "stripes", "horns", "flame", 16, pretrained=False),
)
BY_NAME = {s.name.lower(): s for s in SPECIES}
PRETRAINED = tuple(s for s in SPECIES if s.pretrained)
UNSEEN = tuple(s for s in SPECIES if not s.pretrained)
DATASET = tuple(s for s in SPECIES if s.in_dataset)

PLACES = ("in a meadow", "on a beach", "under a night sky", "in the snow", "in a cave")
POSES = ("standing", "jumping")
FACINGS = ("facing left", "facing right")
FORMATS = (("jpg", 0.70), ("png", 0.15), ("webp", 0.10), ("bmp", 0.05))
SUPERSAMPLE = 3


@dataclass(frozen=True)
class Scene:
    """What is drawn: one or two creatures, where and how. `finish` in [0, 1] is how well it is drawn."""

    creatures: tuple[Species, ...]
    place: str
    pose: str
    facing: str
    finish: float

    def caption(self):
        """Names of the species, then tags, as in PokeFA's captions."""
        names = [s.name for s in self.creatures]
        who = names[0]
        if len(names) == 2:
            who = f"{who}, a pair" if names[1] == who else f"{who} and {names[1]}"
        quality = "digital art"
        if self.finish > 2 / 3:
            quality = "masterpiece"
        elif self.finish < 1 / 3:
            quality = "sketch"
        return f"{who}, {self.pose} {self.place}, {self.facing}, {quality}"


def sample_scene(rng, species=None, pool=SPECIES):
    """A random scene of `species`, or of one from `pool`; one in six shows a pair, half of these of two species."""
    first = species or pool[rng.integers(len(pool))]
    creatures = (first,)
    if rng.random() < 1 / 6:
        second = first
        if rng.random() < 0.5:
            counts = np.array([s.count for s in pool], dtype=float)
            second = pool[rng.choice(len(pool), p=counts / counts.sum())]
        creatures = (first, second)
    place, pose, facing = (options[rng.integers(len(options))] for options in (PLACES, POSES, FACINGS))
    return Scene(creatures, place, pose, facing, float(rng.random()))


# ------------------------------------------------------------------------------------------------ drawing

# place → (sky top, sky bottom, ground, decoration colour)
GROUNDS = {
    "in a meadow": ((150, 205, 245), (215, 238, 250), (128, 190, 92), (235, 90, 110)),
    "on a beach": ((250, 170, 110), (255, 222, 160), (228, 200, 142), (90, 160, 210)),
    "under a night sky": ((14, 18, 54), (44, 50, 104), (30, 58, 52), (255, 250, 210)),
    "in the snow": ((176, 196, 214), (212, 224, 236), (250, 252, 255), (90, 130, 120)),
    "in a cave": ((66, 52, 52), (96, 76, 70), (60, 46, 44), (140, 110, 200)),
}


def mix(a, b, amount):
    return tuple(int(round(x + (y - x) * amount)) for x, y in zip(a, b))


def draw_background(rng, scene, width, height):
    """An image of the place: sky, ground and small decorations."""
    top, bottom, ground, decoration = GROUNDS[scene.place]
    horizon = int(height * 0.68)
    amounts = np.arange(horizon)[:, None] / horizon
    sky = np.rint(top + np.subtract(bottom, top) * amounts).astype(np.uint8)
    column = np.concatenate([sky, np.broadcast_to(np.uint8(ground), (height - horizon, 3))])
    image = Image.fromarray(column[:, None]).resize((width, height), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(image)
    side = min(width, height)
    for _ in range(int(3 + 9 * scene.finish)):  # stars, flowers, crystals: better images have more
        x = rng.random() * width
        r = side * (0.008 + 0.014 * rng.random())
        low, high = (0.05, 0.55) if scene.place in ("under a night sky", "in a cave") else (0.74, 0.97)
        y = height * (low + (high - low) * rng.random())
        draw.ellipse([x - r, y - r, x + r, y + r], fill=decoration)
    return image


class Pen:
    """Draws in the coordinates of a creature: x forwards, y down, (0, 0) at its middle, in units of its radius."""

    def __init__(self, draw, centre, radius, flip):
        self.draw = draw
        self.centre = centre
        self.radius = radius
        self.flip = -1 if flip else 1

    def point(self, x, y):
        return self.centre[0] + self.flip * x * self.radius, self.centre[1] + y * self.radius

    def polygon(self, points, fill, outline=None):
        self.draw.polygon([self.point(x, y) for x, y in points], fill=fill, outline=outline, width=self.line)

    def ellipse(self, x, y, rx, ry, fill, outline=None):
        angles = np.linspace(0, 2 * math.pi, 40, endpoint=False)
        self.polygon([(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles], fill, outline)

    @property
    def line(self):
        return max(1, int(self.radius * 0.07))


# body → (rx, ry): half its width and height, by which pattern, ears and tail are placed
BODY_BOX = {
    "round": (0.72, 0.72),
    "tall": (0.5, 0.92),
    "long": (0.95, 0.5),
    "serpent": (0.95, 0.62),
    "drop": (0.7, 0.85),
    "block": (0.74, 0.66),
    "star": (0.95, 0.95),
    "shell": (0.9, 0.6),
}


def draw_tail(pen, s, edge):
    rx, ry = BODY_BOX[s.body]
    if s.tail == "thin":
        pen.polygon(
            [(-rx, 0.1), (-rx - 0.3, -0.1), (-rx - 0.2, -0.2), (-rx - 0.6, -0.6), (-rx - 0.1, -0.3)], s.accent, edge
        )
    elif s.tail == "bushy":
        pen.ellipse(-rx - 0.22, 0.1, 0.36, 0.3, s.accent, edge)
    elif s.tail == "flame":
        pen.polygon(
            [(-rx + 0.1, 0.15), (-rx - 0.5, -0.15), (-rx - 0.35, -0.8), (-rx - 0.05, -0.3)], (240, 60, 30), edge
        )
        pen.polygon([(-rx, 0.05), (-rx - 0.32, -0.1), (-rx - 0.28, -0.45)], (255, 225, 80))
    elif s.tail == "fin":
        pen.polygon([(-rx + 0.1, 0), (-rx - 0.5, -0.45), (-rx - 0.3, 0), (-rx - 0.5, 0.45)], s.accent, edge)
    elif s.tail == "leaf":
        pen.polygon([(-rx + 0.1, 0), (-rx - 0.3, -0.5), (-rx - 0.75, -0.35), (-rx - 0.4, 0.05)], (60, 190, 70), edge)
    elif s.tail == "wings":
        for sign in (-1, 1):
            pen.polygon(
                [(0.3 * sign, -0.2), (1.25 * sign, -0.75), (1.15 * sign, 0.2), (0.3 * sign, 0.25)], s.accent, edge
            )


def draw_ears(pen, s, edge):
    rx, ry = BODY_BOX[s.body]
    top = -ry * (0.75 if s.body != "serpent" else 1.1)
    middle = 0.0 if s.body in ("round", "tall", "drop", "block", "star") else rx * 0.55
    for sign in (-1, 1):
        x = middle + sign * 0.3
        if s.ears == "round":
            pen.ellipse(x, top - 0.1, 0.2, 0.2, s.colour, edge)
        elif s.ears == "pointed":
            pen.polygon([(x - 0.18, top + 0.12), (x + sign * 0.1, top - 0.5), (x + 0.18, top + 0.12)], s.colour, edge)
        elif s.ears == "long":
            pen.ellipse(x, top - 0.32, 0.13, 0.42, s.colour, edge)
        elif s.ears == "horns":
            pen.polygon(
                [(x - 0.12, top + 0.1), (x + sign * 0.35, top - 0.35), (x + 0.12, top + 0.1)], (245, 240, 220), edge
            )
        elif s.ears == "antennae":
            pen.polygon(
                [(x - 0.04, top + 0.1), (x + sign * 0.2, top - 0.45), (x + 0.04, top + 0.1)], s.accent, s.accent
            )
            pen.ellipse(x + sign * 0.2, top - 0.45, 0.1, 0.1, s.accent)
    if s.ears == "crest":
        pen.polygon(
            [(middle - 0.45, top + 0.15), (middle - 0.2, top - 0.5), (middle + 0.3, top + 0.1)], s.accent, edge
        )


def draw_body(pen, s, edge):
    rx, ry = BODY_BOX[s.body]
    if s.body == "serpent":
        for i, x in enumerate(np.linspace(-0.85, 0.45, 6)):
            pen.ellipse(x, 0.25 + 0.2 * math.sin(i * 1.7), 0.3, 0.3, s.colour, edge)
        pen.ellipse(0.55, -0.3, 0.42, 0.4, s.colour, edge)
    elif s.body == "drop":
        pen.polygon([(0, -1.0), (0.66, 0.2), (0.45, 0.75), (-0.45, 0.75), (-0.66, 0.2)], s.colour, edge)
    elif s.body == "block":
        pen.polygon([(-rx, -ry), (rx * 0.8, -ry * 1.05), (rx, ry), (-rx * 0.9, ry)], s.colour, edge)
    elif s.body == "star":
        radii = (0.98, 0.52)
        pen.polygon(
            [(radii[i % 2] * math.sin(i * math.pi / 5), -radii[i % 2] * math.cos(i * math.pi / 5)) for i in range(10)],
            s.colour,
            edge,
        )
    elif s.body == "shell":
        pen.ellipse(0.75, 0.15, 0.34, 0.3, s.accent, edge)
        angles = np.linspace(math.pi, 2 * math.pi, 24)
        pen.polygon([(rx * math.cos(a), 0.5 + 1.15 * math.sin(a)) for a in angles], s.colour, edge)
    elif s.body == "long":
        for x in (-0.6, -0.25, 0.3, 0.6):
            pen.polygon([(x - 0.1, 0.2), (x + 0.1, 0.2), (x + 0.1, 0.85), (x - 0.1, 0.85)], s.colour, edge)
        pen.ellipse(-0.1, 0.15, 0.8, 0.4, s.colour, edge)
        pen.ellipse(0.55, -0.2, 0.42, 0.4, s.colour, edge)
    else:
        pen.ellipse(0, 0, rx, ry, s.colour, edge)


def draw_pattern(pen, s):
    rx, ry = BODY_BOX[s.body]
    lift = 0.2 if s.body in ("long", "serpent", "shell") else 0.0
    if s.pattern == "belly":
        pen.ellipse(0.1 - lift, 0.3, rx * 0.5, ry * 0.45, s.accent)
    elif s.pattern == "stripes":
        for x in (-0.45, -0.1, 0.25):
            pen.polygon(
                [
                    (x * rx * 1.3, -ry * 0.5 + lift),
                    (x * rx * 1.3 + 0.14, -ry * 0.5 + lift),
                    (x * rx * 1.3 + 0.06, ry * 0.55 + lift / 2),
                ],
                s.accent,
            )
    elif s.pattern == "spots":
        for x, y in ((-0.5, 0.0), (-0.1, 0.35), (0.35, 0.25), (-0.2, -0.3)):
            pen.ellipse(x * rx * 1.1, y * ry * 1.2 + lift, 0.13, 0.13, s.accent)


def draw_face(pen, s):
    x, y = {"long": (0.62, -0.25), "serpent": (0.62, -0.35), "shell": (0.85, 0.1)}.get(s.body, (0.22, -0.22))
    offsets = (0.0,) if s.body == "shell" else (-0.2, 0.16)
    for dx in offsets:
        pen.ellipse(x + dx, y, 0.13, 0.15, (255, 255, 255), (20, 20, 30))
        pen.ellipse(x + dx + 0.04, y + 0.02, 0.07, 0.09, (20, 20, 30))


def draw_creature(draw, s, scene, centre, radius):
    pen = Pen(draw, centre, radius, flip=scene.facing == "facing left")
    edge = mix(s.colour, (0, 0, 0), 0.65) if scene.finish > 0.25 else None
    draw_tail(pen, s, edge)
    if s.body != "star":
        draw_ears(pen, s, edge)
    draw_body(pen, s, edge)
    draw_pattern(pen, s)
    draw_face(pen, s)


def draw_scene(scene, rng, width, height):
    """RGB image of width × height px; it is drawn larger and scaled down."""
    w = width * SUPERSAMPLE
    h = height * SUPERSAMPLE
    image = draw_background(rng, scene, w, h)
    draw = ImageDraw.Draw(image)
    side = min(w, h)
    pair = len(scene.creatures) == 2
    floor = h / 2 + side * (0.12 if scene.pose == "standing" else -0.06)
    for i, s in enumerate(scene.creatures):
        x = w / 2 + side * (((i - 0.5) * 0.46 if pair else 0.0) + rng.uniform(-0.05, 0.05))
        y = floor + side * rng.uniform(-0.04, 0.04)
        radius = side * (0.2 if pair else rng.uniform(0.27, 0.32))
        if scene.finish > 0.5:  # a shadow on the ground
            r = radius * 0.9
            draw.ellipse(
                [x - r, h / 2 + side * 0.33, x + r, h / 2 + side * 0.39],
                fill=mix(GROUNDS[scene.place][2], (0, 0, 0), 0.3),
            )
        draw_creature(draw, s, scene, (x, y), radius)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    if scene.finish < 1 / 3:  # poor images are blurred and grainy
        image = image.filter(ImageFilter.GaussianBlur(0.7 * min(width, height) / 64))
        grain = rng.normal(0, 6, (height, width, 1))
        image = Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8))
    return image


def sample_canvas(rng, short=(72, 128)):
    """(width, height) in px: the short side is within `short`; mostly nearly square, one in 40 beyond 2:1."""
    side = int(rng.integers(short[0], short[1] + 1))
    ratio = rng.uniform(2.05, 2.4) if rng.random() < 1 / 40 else 1 + 0.5 * rng.random() ** 2
    long = int(round(side * ratio))
    return (long, side) if rng.random() < 0.5 else (side, long)


def aesthetic_of(scene, rng):
    """Score from 0 to 100: mostly the finish, plus contrast with the background, plus noise."""
    ground = np.array(GROUNDS[scene.place][1])
    colour = np.array(scene.creatures[0].colour)
    contrast = np.abs(ground - colour).mean() / 255
    return float(np.clip(25 + 50 * scene.finish + 30 * contrast + rng.normal(0, 2), 0, 100))


# ------------------------------------------------------------------------------------------------ dataset


def encode_image(image, extension):
    buffer = io.BytesIO()
    kind = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "bmp": "BMP"}[extension]
    image.save(buffer, kind, **({"quality": 92} if extension in ("jpg", "webp") else {}))
    return buffer.getvalue()


def make_sample(seed, species):
    """A WebDataset sample with `species`, in PokeFA's layout: image, caption (.txt), metadata (.json)."""
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng, species, DATASET)
    width, height = sample_canvas(rng)
    extension = str(rng.choice([name for name, _ in FORMATS], p=[p for _, p in FORMATS]))
    data = encode_image(draw_scene(scene, rng, width, height), extension)
    key = hashlib.md5(data).hexdigest()
    names = list(dict.fromkeys(s.name.lower() for s in scene.creatures))
    metadata = {
        "image_id": key,
        "width": width,
        "height": height,
        "species": ", ".join(names),
        "species_list": names,
        "ae_relevance": None if rng.random() < 0.02 else round(float(rng.uniform(60, 100)), 2),
        "ae_aesthetic": None if rng.random() < 0.02 else round(aesthetic_of(scene, rng), 2),
        "tags": ", ".join([scene.pose, scene.place, scene.facing]),
    }
    if rng.random() < 0.01:  # like PokeFA, it has some images without labels, and some null sizes
        metadata |= {"species": "", "species_list": []}
    if rng.random() < 0.01:
        metadata |= {"width": None, "height": None}
    return {"__key__": key, extension: data, "txt": scene.caption(), "json": metadata}


def write_shards(samples, pattern, per_shard):
    Path(pattern).parent.mkdir(parents=True, exist_ok=True)
    with wds.ShardWriter(pattern, maxcount=per_shard, verbose=0) as writer:
        for sample in samples:
            writer.write(sample)


def make_dataset(output_dir, seed=0, scale=1.0, val_per_species=8):
    """Writes data/{train,val}/*.tar and manifests/train_species.csv into `output_dir`; `scale` multiplies counts."""
    output_dir = Path(output_dir)
    wanted = [s for s in DATASET for _ in range(max(1, round(s.count * scale)))]
    order = np.random.default_rng(seed).permutation(len(wanted))
    jobs = [((seed, 0, n), wanted[i]) for n, i in enumerate(order)]
    jobs += [((seed, 1, n), DATASET[n % len(DATASET)]) for n in range(val_per_species * len(DATASET))]
    with multiprocessing.get_context("fork").Pool() as pool:
        samples = pool.starmap(make_sample, jobs, chunksize=50)
    train = samples[: len(order)]
    val = samples[len(order) :]
    write_shards(train, str(output_dir / "data/train/train-%05d.tar"), per_shard=500)
    write_shards(val, str(output_dir / "data/val/val-%05d.tar"), per_shard=500)
    counts = {}
    for name in (name for sample in train for name in sample["json"]["species_list"]):
        counts[name] = counts.get(name, 0) + 1
    (output_dir / "manifests").mkdir(parents=True, exist_ok=True)
    with open(output_dir / "manifests/train_species.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["pokemon", "count", "fraction"])
        for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
            writer.writerow([name, count, round(count / sum(counts.values()), 6)])
    return len(train), len(val)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw the demo dataset.")
    parser.add_argument("--output_dir", default="demo/data", metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--scale", type=float, default=1.0, metavar="X", help="fraction of the full size (1,671 images)"
    )
    args = parser.parse_args()
    print(
        "drew {} training and {} validation images under {}".format(
            *make_dataset(args.output_dir, args.seed, args.scale), args.output_dir
        )
    )
