"""The demo world: frozen weights that generate, a judge that can be trusted, and a LoRA that teaches."""

import csv
import hashlib
import json
import subprocess
import sys
import tarfile

import numpy as np
import open_clip
import pytest
import run as demo
import safetensors.torch
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from harness import ROOT, assert_ok, run_trainer
from PIL import Image
from pretrain import AestheticHead, draw_many, to_pixel_values
from transformers import CLIPTextModelWithProjection, CLIPTokenizer
from world import PRETRAINED, SPECIES, UNSEEN

import evaluate

DEMO = ROOT / "demo"
# Frozen before any LoRA result was read.
WEIGHTS = {
    "aesthetic-linearMSE.pth": "fb3cb9e28b28e50d",
    "clip/open_clip_model.safetensors": "52c57bfe8d9557ca",
    "refiner/unet/diffusion_pytorch_model.safetensors": "1dafdaf6eff8284f",
    "sdxl/text_encoder/model.safetensors": "0308dce422f1c252",
    "sdxl/text_encoder_2/model.safetensors": "4fd2cb33b4cc09f8",
    "sdxl/unet/diffusion_pytorch_model.safetensors": "937779fe9538f94b",
    "sdxl/vae/diffusion_pytorch_model.safetensors": "5c317f9c63a6305b",
}


def test_the_weights_are_the_frozen_ones():
    found = {
        str(path.relative_to(DEMO)): hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for pattern in ("sdxl/**/*.safetensors", "refiner/**/*.safetensors", "clip/*.safetensors", "*.pth")
        for path in DEMO.glob(pattern)
    }
    assert found == WEIGHTS
    assert sum((DEMO / name).stat().st_size for name in WEIGHTS) <= 20e6


def test_the_dataset_is_long_tailed_and_as_irregular_as_the_real_one(world, tmp_path):
    from world import make_dataset

    make_dataset(tmp_path, seed=0, val_per_species=1)
    with open(tmp_path / "manifests/train_species.csv") as file:
        counts = {row["pokemon"]: int(row["count"]) for row in csv.DictReader(file)}
    assert len(counts) >= 12 and len(UNSEEN) >= 4
    assert max(counts.values()) >= 20 * min(counts.values())
    metadata, extensions = [], set()
    for shard in (tmp_path / "data/train").glob("*.tar"):
        with tarfile.open(shard) as tar:
            for member in tar:
                extensions.add(member.name.rsplit(".", 1)[1])
                if member.name.endswith(".json"):
                    metadata.append(json.load(tar.extractfile(member)))
    assert extensions == {"jpg", "png", "webp", "bmp", "txt", "json"}
    labels = [len(m["species_list"]) for m in metadata]
    assert set(labels) == {0, 1, 2}
    assert any(m["width"] is None for m in metadata) and any(m["ae_aesthetic"] is None for m in metadata)
    ratios = [max(m["width"], m["height"]) / min(m["width"], m["height"]) for m in metadata if m["width"]]
    assert max(ratios) > 2


def test_the_judge_names_fresh_drawings():
    pixels, _, scenes, *_ = draw_many(480, seed=90210, species=SPECIES)
    alone = [i for i, scene in enumerate(scenes) if len(set(scene.creatures)) == 1]
    clip = evaluate.Clip(demo.CLIP, "cpu")
    embeddings = clip.embed_images([Image.fromarray(pixels[i].permute(1, 2, 0).numpy()) for i in alone])
    named = evaluate.name_classes(embeddings, [s.name for s in SPECIES], clip)
    right = np.mean([SPECIES[n] == scenes[i].creatures[0] for n, i in zip(named, alone)])
    assert right >= 0.95


def test_the_base_draws_its_pretraining_species_and_not_the_unseen_ones(tmp_path):
    words = demo.to_words(demo.EVALUATION | {"--seeds": (0, 1, 2), "--batch_size": 54})
    assert_ok(run_trainer(words, tmp_path / "evaluation", script="evaluate"))
    by_tag = json.loads((tmp_path / "evaluation/metrics.json").read_text())["by_tag"]
    right = {group: by_tag[group]["base model"]["right"] for group in ("pretrained", "unseen")}
    assert right["pretrained"]["count"] == 3 * len(PRETRAINED) and right["unseen"]["count"] == 15 * len(UNSEEN)
    assert right["pretrained"]["mean"] >= 0.8
    assert right["unseen"]["mean"] <= 0.35


def test_the_refiner_knows_its_band_and_its_own_conditioning():
    unet = UNet2DConditionModel.from_pretrained(DEMO / "refiner/unet", dtype=torch.float32).eval()
    text = CLIPTextModelWithProjection.from_pretrained(DEMO / "sdxl/text_encoder_2", dtype=torch.float32).eval()
    vae = AutoencoderKL.from_pretrained(DEMO / "sdxl/vae", dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(DEMO / "sdxl/tokenizer_2")
    assert unet.config.projection_class_embeddings_input_dim == text.config.projection_dim + 5 * 32
    assert unet.config.cross_attention_dim == text.config.hidden_size
    pixels, captions, _, ids, scores = draw_many(64, seed=77)
    scheduler = DDPMScheduler.from_pretrained(DEMO / "sdxl/scheduler")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        latents = vae.encode(to_pixel_values(pixels)).latent_dist.mode() * vae.config.scaling_factor
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(50, 201, (64,), generator=generator)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        tokens = tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        output = text(tokens.input_ids, output_hidden_states=True)
        added = {"text_embeds": output.text_embeds, "time_ids": torch.cat([ids, scores[:, None] / 10], dim=1)}
        guess = unet(noisy, timesteps, output.hidden_states[-2], added_cond_kwargs=added).sample
        error = (guess - noise).square().mean()
    assert error < 0.5  # guessing nothing scores 1


def test_the_aesthetic_head_has_the_laion_layers():
    state = torch.load(DEMO / "aesthetic-linearMSE.pth", weights_only=True)
    layers = {0: (1024, 64), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    assert {k: tuple(v.shape) for k, v in state.items() if k.endswith("weight")} == {
        f"layers.{i}.weight": shape for i, shape in layers.items()
    }
    AestheticHead(64).load_state_dict(state)


def test_the_aesthetic_head_agrees_with_the_world():
    head = AestheticHead(64).eval()
    head.load_state_dict(torch.load(DEMO / "aesthetic-linearMSE.pth", weights_only=True))
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{DEMO / 'clip'}")
    model.eval()
    pixels, _, _, _, scores = draw_many(320, seed=4321, species=SPECIES)
    with torch.no_grad():
        guessed = head(model.encode_image(to_pixel_values(pixels), normalize=True))[:, 0]
    assert np.corrcoef(guessed, scores)[0, 1] > 0.5


@pytest.mark.slow
def test_the_demo_teaches_the_unseen_species_and_keeps_the_others(tmp_path):
    subprocess.run([sys.executable, ROOT / "demo/run.py", "--output_dir", tmp_path], check=True)
    metrics = json.loads((tmp_path / "evaluation/metrics.json").read_text())
    unseen, pretrained = (metrics["by_tag"][group] for group in ("unseen", "pretrained"))
    assert unseen["lora"]["right"]["count"] >= 200
    assert unseen["base model"]["right"]["mean"] <= 0.35
    assert unseen["lora"]["right"]["mean"] >= 0.85
    assert unseen["lora"]["vs_base"]["right"]["low"] > 0 and unseen["lora"]["vs_base"]["adherence"]["low"] > 0
    assert pretrained["lora"]["vs_base"]["right"]["mean"] >= -0.05
    assert not metrics["models"]["lora"]["flagged"]
    assert (tmp_path / "evaluation/report.html").exists() and (tmp_path / "before_after.png").exists()
    assert safetensors.torch.load_file(tmp_path / "lora/pytorch_lora_weights.safetensors")
