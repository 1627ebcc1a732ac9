"""Base and refiner LoRAs as one recipe on the demo world: what the refiner's LoRA is worth, with intervals.

    python benchmarks/refiner.py               # ten minutes on two cores

It trains the base with both encoders as `make demo` does, then the refiner with the base's text_encoder_2, and
measures on the five species that neither UNet was pretrained on:
  - the denoising loss in the refiner's band, over fresh drawings, the same noise for the refiner with and without its
    LoRA (and for the stock refiner with the stock encoder);
  - pictures by the base alone with its LoRA, and by base and refiner with theirs, from the same seeds: the toy CLIP's
    cosine similarity of picture and prompt, and how many it names right among 16 species.
Intervals are 95 % of the paired differences, over samples (normal).
"""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

import numpy as np
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, UNet2DConditionModel
from PIL import Image
from run import HERE as DEMO
from run import TRAINING, Judge, load_pipeline, wilson
from world import FACINGS, PLACES, POSES, SPECIES, UNSEEN, Scene, make_dataset, make_sample, write_shards

import train_sdxl_lora as trainer

LORA = "pytorch_lora_weights.safetensors"
REFINER_TRAINING = TRAINING | {
    "--stage": "refiner",
    "--refiner_unet": DEMO / "refiner/unet",
    "--learning_rate": 2e-3,
    "--lora_target_modules": (*TRAINING["--lora_target_modules"], "conv1", "conv2"),
    "--noise_offset": 0.0,
}
IMAGES_PER_SPECIES, INFERENCE_STEPS, GUIDANCE, SWITCH = 60, 20, 2.5, 0.8


def train(flags, steps, shards, output_dir, switches=()):
    """Trains unless it was done before."""
    if (output_dir / LORA).exists():
        return output_dir / LORA
    flags = flags | {"--train_shards": shards, "--output_dir": output_dir, "--train_batch_size": 16}
    flags |= {"--pretrained_model_name_or_path": DEMO / "sdxl", "--max_train_steps": steps}
    words = [*switches, "--resume_from_checkpoint", "latest"]
    for flag, value in flags.items():
        words += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    trainer.main(words)
    return output_dir / LORA


def interval(differences):
    """{"mean", "low", "high"} of paired differences."""
    mean, half = np.mean(differences), 1.96 * np.std(differences, ddof=1) / len(differences) ** 0.5
    return {"mean": float(mean), "low": float(mean - half), "high": float(mean + half), "n": len(differences)}


def band_losses(shard, te2_lora=None, refiner_lora=None):
    """(n,) losses of the shard's samples in the band, each with the noise and timestep of its id."""
    words = ["--pretrained_model_name_or_path", DEMO / "sdxl", "--train_shards", shard, "--resolution", 64]
    words += ["--stage", "refiner", "--refiner_unet", DEMO / "refiner/unet", "--mixed_precision", "no"]
    words += ["--text_encoder_2_lora", te2_lora] if te2_lora else []
    args = trainer.parse_args([str(word) for word in [*words, "--output_dir", shard.parent / "scratch"]])
    models = trainer.load_models(args, torch.float32, torch.device("cpu"))
    if refiner_lora:
        models.unet.load_lora_adapter(str(refiner_lora), prefix="unet")
    rows, damage = trainer.index_shard(trainer.Shard(str(shard), None), args.species_key)
    index = trainer.make_index(trainer.pa.Table.from_pylist(rows, trainer.INDEX_SCHEMA), damage)
    dataset = trainer.ImageDataset(index, 0, 64, "center", False, "lanczos")
    losses = []
    for requests, size in trainer.validation_requests(index, 50, 0, 1, None):
        batch = trainer.move_batch(trainer.collate(dataset.__getitems__(requests)), torch.device("cpu"))
        with torch.no_grad():
            draws = trainer.sample_batch_noise(models, batch, 0.0)
            losses += trainer.diffusion_loss(models, batch, draws, torch.float32)[:size].tolist()
    return np.array(losses)


def make_panel(first_seed):
    """[(scene, seed)] of the unseen species, scenes in turn."""
    scenes = [(place, pose, facing) for place in PLACES for pose in POSES for facing in FACINGS]
    return [
        (Scene((species,), *scenes[i % len(scenes)], finish=0.9), first_seed + 10_000 * SPECIES.index(species) + i)
        for species in UNSEEN
        for i in range(IMAGES_PER_SPECIES)
    ]


def generate(panel, base_lora, te2_lora=None, refiner_lora=None, batch_size=50):
    """(n, 64, 64, 3) uint8 by the base alone, or with `refiner_lora` by both."""
    base = load_pipeline(base_lora.parent)
    refiner = None
    if refiner_lora:
        refiner = StableDiffusionXLImg2ImgPipeline(
            vae=base.vae,
            text_encoder=None,
            text_encoder_2=base.text_encoder_2,
            tokenizer=None,
            tokenizer_2=base.tokenizer_2,
            unet=UNet2DConditionModel.from_pretrained(DEMO / "refiner/unet", dtype=torch.float32),
            scheduler=base.scheduler,
            requires_aesthetics_score=True,
            force_zeros_for_empty_prompt=False,
            add_watermarker=False,
        )
        refiner.set_progress_bar_config(disable=True)
        if refiner_lora != "stock":
            refiner.load_lora_weights(refiner_lora.parent, adapter_name="refiner")
    images = []
    for start in range(0, len(panel), batch_size):
        chunk = panel[start : start + batch_size]
        prompts = [scene.caption() for scene, _ in chunk]
        options = {"num_inference_steps": INFERENCE_STEPS, "guidance_scale": GUIDANCE}
        options["generator"] = [torch.Generator().manual_seed(seed) for _, seed in chunk]
        if refiner is None:
            images.append(base(prompts, height=64, width=64, output_type="np", **options).images)
            continue
        latents = base(prompts, height=64, width=64, denoising_end=SWITCH, output_type="latent", **options).images
        images.append(refiner(prompts, image=latents, denoising_start=SWITCH, output_type="np", **options).images)
    return (np.concatenate(images) * 255).round().astype(np.uint8)


def adherence(judge, panel, images):
    """(n,) cosine similarity of each picture with its prompt."""
    import open_clip

    tokenizer = open_clip.get_tokenizer(f"local-dir:{DEMO / 'clip'}")
    with torch.no_grad():
        pixels = torch.stack([judge.preprocess(Image.fromarray(image)) for image in images])
        texts = judge.model.encode_text(tokenizer([scene.caption() for scene, _ in panel]), normalize=True)
        return (judge.model.encode_image(pixels, normalize=True) * texts).sum(dim=1).numpy()


def draw_comparison(panel, images, path, tile=96):
    """A row per kind of picture, two columns per species."""
    chosen = [i for n in range(len(UNSEEN)) for i in (n * IMAGES_PER_SPECIES, n * IMAGES_PER_SPECIES + 7)]
    sheet = Image.new("RGB", (len(chosen) * tile, len(images) * tile))
    for row, pictures in enumerate(images.values()):
        for column, i in enumerate(chosen):
            picture = Image.fromarray(pictures[i]).resize((tile, tile), Image.Resampling.BICUBIC)
            sheet.paste(picture, (column * tile, row * tile))
    sheet.save(path)


def main(output_dir, base_steps, refiner_steps, samples, panel_seed):
    output_dir.mkdir(parents=True, exist_ok=True)
    if not (DEMO / "data/manifests/train_species.csv").exists():
        make_dataset(DEMO / "data")
    shards = DEMO / "data/data/train"
    base_flags = TRAINING | {"--species_csv": DEMO / "data/manifests/train_species.csv"}
    base = train(base_flags, base_steps, shards, output_dir / "base", ["--train_text_encoder"])
    flags = {k: v for k, v in REFINER_TRAINING.items() if not k.startswith("--text_encoder")}
    flags |= {"--text_encoder_2_lora": base, "--species_mix": (0.0, 0.1, refiner_steps)}
    refiner = train(flags, refiner_steps, shards, output_dir / "refiner")

    fresh = output_dir / "unseen-%05d.tar"
    drawn = [make_sample((77, 2, n), UNSEEN[n % len(UNSEEN)]) for n in range(samples)]
    write_shards(drawn, str(fresh), per_shard=samples + 1)
    shard = output_dir / "unseen-00000.tar"
    losses = {
        "stock": band_losses(shard),
        "with the base's text_encoder_2": band_losses(shard, base),
        "with its LoRA too": band_losses(shard, base, refiner),
    }
    trained = losses["with its LoRA too"]
    facts = {"band_loss": {name: float(values.mean()) for name, values in losses.items()}}
    facts["band_loss_change"] = {name: interval(trained - values) for name, values in list(losses.items())[:2]}

    panel, judge = make_panel(panel_seed), Judge()
    images = {
        "base with LoRA": generate(panel, base),
        "then the stock refiner": generate(panel, base, base, "stock"),
        "then the refiner with LoRA": generate(panel, base, base, refiner),
    }
    scores = {name: adherence(judge, panel, pictures) for name, pictures in images.items()}
    facts["adherence"] = {name: float(values.mean()) for name, values in scores.items()}
    both = scores["then the refiner with LoRA"]
    facts["adherence_change"] = {name: interval(both - values) for name, values in list(scores.items())[:2]}
    prompted = np.array([SPECIES.index(scene.creatures[0]) for scene, _ in panel])
    right = {name: judge.name(pictures) == prompted for name, pictures in images.items()}
    facts["named_right"] = {name: [int(r.sum()), *wilson(int(r.sum()), len(panel))] for name, r in right.items()}
    both = right["then the refiner with LoRA"].astype(float)
    facts["named_right_change"] = {name: interval(both - values) for name, values in list(right.items())[:2]}
    draw_comparison(panel, images, output_dir / "comparison.png")
    (output_dir / "refiner.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "demo/output/refiner", metavar="DIR")
    parser.add_argument("--base_steps", type=int, default=320, metavar="STEPS")
    parser.add_argument("--refiner_steps", type=int, default=1500, metavar="STEPS")
    parser.add_argument("--samples", type=int, default=600, metavar="N", help="fresh drawings for the band's loss")
    parser.add_argument("--panel_seed", type=int, default=1_000_000, metavar="N", help="seed of the first picture")
    args = parser.parse_args()
    main(args.output_dir, args.base_steps, args.refiner_steps, args.samples, args.panel_seed)
