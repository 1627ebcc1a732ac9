"""Make the demo's weights: a small SDXL, a refiner UNet, a CLIP and an aesthetic head.

    python demo/pretrain.py --output_dir demo                    # all stages, about 75 minutes on 2 CPU cores
    python demo/pretrain.py --output_dir demo --stages clip      # some of STAGES

Classes, folder layout and conditioning are those of SDXL; only the sizes differ. The small SDXL (tokenizers, VAE,
encoders, both UNets) never sees the species marked `pretrained=False` in world.py. The CLIP and the aesthetic head,
which score images, are trained on all species.
"""

import argparse
import colorsys
import copy
import json
import multiprocessing
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from world import BODY_BOX, PRETRAINED, SPECIES, aesthetic_of, draw_scene, sample_canvas, sample_scene

RESOLUTION = 64  # px
LATENT_SIZE = RESOLUTION // 8
REFINER_BAND = 200  # the refiner is trained on timesteps 0 to 200, like SDXL's
UNSEEN_CONDITIONING = 0.1  # fraction of captions dropped, for classifier-free guidance
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # SDXL's
TEXT_WIDTHS = (64, 96)  # hidden sizes of text_encoder and text_encoder_2


def cosine_lr(step, steps, warmup=50):
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + np.cos(np.pi * step / steps))


def optimize(parameters, loss_at, steps, lr, name, ema_of=()):
    """Minimises loss_at(step) by AdamW with a cosine schedule; models in `ema_of` become their moving averages."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=1e-4, fused=True)
    averages = [copy.deepcopy(model) for model in ema_of]
    start = time.time()
    running = None
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * cosine_lr(step, steps)
        loss = loss_at(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(0.998, (step + 1) / (step + 10))
        with torch.no_grad():
            for model, average in zip(ema_of, averages):
                torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 100 == 0:
            print(
                f"{name}: step {step + 1}/{steps} loss {running:.4f} {(time.time() - start) / (step + 1):.3f} s/step",
                flush=True,
            )
    for model, average in zip(ema_of, averages):
        model.load_state_dict(average.state_dict())


# ------------------------------------------------------------------------------------------------ images


def random_species(rng):
    """A species with random looks: the VAE is trained on these, so that it is equally good for all species."""
    hues = rng.random(2)
    values = rng.uniform(0.3, 1.0, 2)
    colours = [
        tuple(int(255 * c) for c in colorsys.hsv_to_rgb(h, rng.uniform(0.4, 1), v)) for h, v in zip(hues, values)
    ]
    pick = lambda options: options[rng.integers(len(options))]  # noqa: E731
    return replace(
        SPECIES[0],
        name="nobody",
        body=pick(tuple(BODY_BOX)),
        colour=colours[0],
        accent=colours[1],
        pattern=pick(("plain", "belly", "stripes", "spots")),
        ears=pick(("none", "round", "pointed", "long", "horns", "antennae", "crest")),
        tail=pick(("none", "thin", "bushy", "flame", "fin", "leaf", "wings")),
    )


def resize_and_crop(image, rng):
    """((64, 64, 3) uint8, (top, left)): the short side becomes 64 px, then a square near the middle is cropped."""
    scale = RESOLUTION / min(image.size)
    image = image.resize([max(RESOLUTION, round(side * scale)) for side in image.size], 1)
    margins = image.size[0] - RESOLUTION, image.size[1] - RESOLUTION
    left, top = (int(round(margin * (0.5 + rng.uniform(-0.12, 0.12)))) for margin in margins)
    return np.asarray(image.crop((left, top, left + RESOLUTION, top + RESOLUTION))), (top, left)


def draw_one(n, seed, species):
    """(image (64, 64, 3) uint8, scene, (height, width, top, left), score): depends on `seed` and `n` only."""
    rng = np.random.default_rng((seed, n))
    if species is None:
        creature = random_species(rng)
        scene = replace(sample_scene(rng, creature), creatures=(creature,))
    else:
        scene = sample_scene(rng, species[n % len(species)], species)
    width, height = sample_canvas(rng)
    image, crop = resize_and_crop(draw_scene(scene, rng, width, height), rng)
    return image, scene, (height, width, *crop), aesthetic_of(scene, rng)


def draw_many(count, seed, species=PRETRAINED):
    """(images (n, 3, 64, 64) uint8, captions, scenes, (n, 4) of height, width, top, left, scores (n,))."""
    with multiprocessing.get_context("fork").Pool() as pool:
        jobs = ((n, seed, species) for n in range(count))
        pixels, scenes, ids, scores = zip(*pool.starmap(draw_one, jobs, chunksize=100))
    pixels = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    captions = [scene.caption() for scene in scenes]
    return pixels, captions, scenes, torch.tensor(ids, dtype=torch.float32), torch.tensor(scores)


def to_pixel_values(pixels):
    return pixels.float() / 127.5 - 1


# ------------------------------------------------------------------------------------------------ stages


def make_tokenizer(captions, folder, pad_token, vocab_size=700):
    """Trains a CLIP tokenizer (byte pairs) with a small vocabulary on `captions` and saves it in `folder`."""
    start = "<|startoftext|>"
    end = "<|endoftext|>"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(unk_token=None, end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    bpe.train_from_iterator(
        [caption.lower() for caption in captions],
        trainers.BpeTrainer(
            vocab_size=vocab_size, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
        ),
    )
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = (
        ["!"] + [a for a in alphabet if a != "!"] + [a + "</w>" for a in alphabet] + ["".join(pair) for pair in merges]
    )
    tokens = list(dict.fromkeys(tokens)) + [start, end]
    tokenizer = CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges,
        bos_token=start,
        eos_token=end,
        unk_token=end,
        pad_token=pad_token,
        model_max_length=77,
    )
    tokenizer.save_pretrained(folder)


def tokenize(tokenizer, captions):
    return tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids


def train_tokenizers(output_dir):
    captions = [sample_scene(np.random.default_rng((11, n)), None, PRETRAINED).caption() for n in range(4000)]
    make_tokenizer(captions, output_dir / "sdxl/tokenizer", "<|endoftext|>")
    make_tokenizer(captions, output_dir / "sdxl/tokenizer_2", "!")


def reconstruction_loss(y, x):
    """L1 + squared error + L1 of the red-green and blue-yellow differences, without which red is not learned."""
    opponent = torch.tensor([[1.0, -1.0, 0.0], [-0.5, -0.5, 1.0]])
    colour = torch.einsum("oc,bchw->bohw", opponent, y - x)
    return F.l1_loss(y, x) + F.mse_loss(y, x) + 2 * colour.abs().mean()


def optimize_vae(vae, loss, steps, lr, permute=False, batch_size=16):
    """Trains `vae` in place on species with random looks; the loss is loss(reconstruction, image) + 1e-5 KL.

    With `permute`, the colour channels of each image are in random order, so that all colours count the same.
    """
    pixels = draw_many(5000, seed=101, species=None)[0]

    def loss_at(step):
        x = to_pixel_values(pixels[torch.randint(len(pixels), (batch_size,))])
        if permute:
            orders = torch.rand(batch_size, 3).argsort(dim=1)[:, :, None, None].expand_as(x)
            x = x.gather(1, orders)
        posterior = vae.encode(x).latent_dist
        kl = posterior.kl().mean() / (RESOLUTION * RESOLUTION)
        return loss(vae.decode(posterior.sample()).sample, x) + 1e-5 * kl

    optimize(list(vae.parameters()), loss_at, steps, lr, "vae", ema_of=[vae])


def save_vae(vae, output_dir):
    with torch.no_grad():
        held_out = to_pixel_values(draw_many(256, seed=102)[0])
        posterior = vae.encode(held_out).latent_dist
        vae.register_to_config(scaling_factor=round(1 / posterior.sample().std().item(), 5))
        error = F.mse_loss(vae.decode(posterior.mode()).sample, held_out).item()
    decibels = 10 * np.log10(4 / error)
    print(f"vae: PSNR on unseen drawings {decibels:.1f} dB, scaling factor {vae.config.scaling_factor}", flush=True)
    vae.half().save_pretrained(output_dir / "sdxl/vae")


def train_vae(output_dir):
    torch.manual_seed(1)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=RESOLUTION,
    )
    optimize_vae(vae, lambda y, x: F.l1_loss(y, x) + F.mse_loss(y, x), steps=2400, lr=2e-3)
    save_vae(vae, output_dir)


def train_vae_colour(output_dir):
    """Continues with the VAE. It had lost red and green, because most backgrounds are between blue and yellow."""
    torch.manual_seed(6)
    vae = load_frozen(output_dir, AutoencoderKL, "vae").requires_grad_(True).train()
    optimize_vae(vae, reconstruction_loss, steps=1500, lr=2.5e-3, permute=True)
    save_vae(vae, output_dir)


def make_text_encoder(tokenizer, width, projected):
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=3,
        num_attention_heads=width // 16,
        hidden_act="gelu" if projected else "quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def make_unet(channels, cross_attention_dim, ids):
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=channels,
        layers_per_block=1,
        transformer_layers_per_block=[1, 1],
        attention_head_dim=[2, 4],  # number of heads per level, in spite of the name, as in SDXL's config
        norm_num_groups=16,
        cross_attention_dim=cross_attention_dim,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=TEXT_WIDTHS[1] + ids * 32,
        use_linear_projection=True,
    )


def encode_latents(vae, pixels):
    """Scaled means and standard deviations of the posteriors of `pixels`, each (n, 4, 8, 8)."""
    with torch.no_grad():
        dists = [vae.encode(to_pixel_values(chunk)).latent_dist for chunk in pixels.split(64)]
    scale = vae.config.scaling_factor
    return torch.cat([d.mean for d in dists]) * scale, torch.cat([d.std for d in dists]) * scale


def reconstruct(vae, pixels):
    """`pixels` (n, 3, 64, 64) uint8, encoded and decoded again."""
    with torch.no_grad():
        decoded = [
            vae.decode(vae.encode(to_pixel_values(chunk)).latent_dist.mode()).sample for chunk in pixels.split(64)
        ]
    return ((torch.cat(decoded).clamp(-1, 1) + 1) * 127.5).round().byte()


def load_frozen(output_dir, model_class, name):
    return (
        model_class.from_pretrained(output_dir / "sdxl" / name, torch_dtype=torch.float32).requires_grad_(False).eval()
    )


def prepare_latents(output_dir, count, seed):
    """((mean, std) of the latents, tokenizers, token ids for each, sizes and crops (n, 4), scores 1 to 10 (n,))."""
    vae = load_frozen(output_dir, AutoencoderKL, "vae")
    tokenizers = [CLIPTokenizer.from_pretrained(output_dir / "sdxl" / name) for name in ("tokenizer", "tokenizer_2")]
    pixels, captions, _, ids, scores = draw_many(count, seed)
    return encode_latents(vae, pixels), tokenizers, [tokenize(t, captions) for t in tokenizers], ids, scores / 10


def noisy_batch(scheduler, latents, rows, low, high):
    mean, std = (part[rows] for part in latents)
    clean = mean + std * torch.randn_like(mean)
    noise = torch.randn_like(clean)
    timesteps = torch.randint(low, high, (len(rows),))
    return scheduler.add_noise(clean, noise, timesteps), noise, timesteps


def make_ddpm():
    return DDPMScheduler(**BETAS)


def optimize_base(output_dir, unet, text_encoders, steps, lr, batch_size=64):
    """Trains the UNet and both text encoders in place on the denoising loss, and saves them."""
    latents, tokenizers, token_ids, ids, _ = prepare_latents(output_dir, 9000, seed=201)
    scheduler = make_ddpm()
    target_size = torch.full((batch_size, 2), float(RESOLUTION))

    def loss_at(step):
        rows = torch.randint(len(ids), (batch_size,))
        noisy, noise, timesteps = noisy_batch(scheduler, latents, rows, 0, 1000)
        outputs = [e(t[rows], output_hidden_states=True) for e, t in zip(text_encoders, token_ids)]
        kept = (torch.rand(batch_size, 1) >= UNSEEN_CONDITIONING).float()
        prompt_embeds = torch.cat([o.hidden_states[-2] for o in outputs], dim=-1) * kept[:, None]
        time_ids = torch.cat([ids[rows], target_size], dim=1)
        conditions = {"text_embeds": outputs[1].text_embeds * kept, "time_ids": time_ids}
        return F.mse_loss(unet(noisy, timesteps, prompt_embeds, added_cond_kwargs=conditions).sample, noise)

    trained = [unet, *text_encoders]
    optimize([p for m in trained for p in m.parameters()], loss_at, steps, lr, "base", ema_of=trained)
    for model, name in zip(trained, ("unet", "text_encoder", "text_encoder_2")):
        model.half().save_pretrained(output_dir / "sdxl" / name)
    pipeline = StableDiffusionXLPipeline(
        vae=load_frozen(output_dir, AutoencoderKL, "vae"),
        text_encoder=text_encoders[0],
        text_encoder_2=text_encoders[1],
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=unet,
        scheduler=EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipeline.scheduler.save_pretrained(output_dir / "sdxl/scheduler")
    pipeline.save_config(output_dir / "sdxl")


def train_base(output_dir):
    torch.manual_seed(2)
    tokenizers = [CLIPTokenizer.from_pretrained(output_dir / "sdxl" / name) for name in ("tokenizer", "tokenizer_2")]
    text_encoders = [make_text_encoder(t, w, i == 1) for i, (t, w) in enumerate(zip(tokenizers, TEXT_WIDTHS))]
    optimize_base(output_dir, make_unet((48, 96), sum(TEXT_WIDTHS), 6), text_encoders, steps=4800, lr=1e-3)


def train_base_colour(output_dir):
    """Continues with the base model in the latent space of the second VAE."""
    torch.manual_seed(7)
    parts = ((UNet2DConditionModel, "unet"), (CLIPTextModel, "text_encoder"))
    parts += ((CLIPTextModelWithProjection, "text_encoder_2"),)
    unet, *text_encoders = (load_frozen(output_dir, c, name).requires_grad_(True).train() for c, name in parts)
    optimize_base(output_dir, unet, text_encoders, steps=1500, lr=1e-3)


def train_refiner(output_dir, steps=800, batch_size=64):
    torch.manual_seed(3)
    latents, tokenizers, token_ids, ids, scores = prepare_latents(output_dir, 4000, seed=301)
    text_encoder = load_frozen(output_dir, CLIPTextModelWithProjection, "text_encoder_2")
    unet = make_unet((48, 96), TEXT_WIDTHS[1], 5)
    scheduler = make_ddpm()
    empty = tokenize(tokenizers[1], [""])[0]

    def loss_at(step):
        rows = torch.randint(len(ids), (batch_size,))
        noisy, noise, timesteps = noisy_batch(scheduler, latents, rows, 0, REFINER_BAND + 1)
        kept = torch.rand(batch_size, 1) >= UNSEEN_CONDITIONING
        with torch.no_grad():
            output = text_encoder(torch.where(kept, token_ids[1][rows], empty), output_hidden_states=True)
        conditions = {"text_embeds": output.text_embeds, "time_ids": torch.cat([ids[rows], scores[rows, None]], dim=1)}
        return F.mse_loss(unet(noisy, timesteps, output.hidden_states[-2], added_cond_kwargs=conditions).sample, noise)

    optimize(list(unet.parameters()), loss_at, steps, 1e-3, "refiner", ema_of=[unet])
    unet.half().save_pretrained(output_dir / "refiner/unet")


CLIP_CONFIG = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": RESOLUTION, "layers": 4, "width": 128, "patch_size": 8, "head_width": 32},
    "text_cfg": {"context_length": 40, "width": 64, "heads": 4, "layers": 2, "hf_tokenizer_name": "."},
}


def shortened(rng, caption):
    """The species and a random part of the rest of a caption: the CLIP must understand short prompts too."""
    species, *scene, quality = caption.split(", ")
    phrases = [phrase for phrase in scene if rng.random() < 0.5]
    if rng.random() < 0.8:
        phrases.append(quality)
    return ", ".join([species, *phrases])


def train_clip(output_dir, steps=1300, batch_size=128):
    torch.manual_seed(4)
    folder = output_dir / "clip"
    pixels, captions, *_ = draw_many(8000, seed=401, species=SPECIES)
    through_vae = reconstruct(load_frozen(output_dir, AutoencoderKL, "vae"), pixels)
    make_tokenizer(captions, folder, "!", vocab_size=800)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    config = copy.deepcopy(CLIP_CONFIG)
    config["text_cfg"]["vocab_size"] = len(tokenizer)
    mean = std = [0.5, 0.5, 0.5]
    model = open_clip.CLIP(**config)
    rng = np.random.default_rng(4)

    def encode_text(texts):
        ids = tokenizer(texts, padding="max_length", max_length=40, truncation=True, return_tensors="pt").input_ids
        return model.encode_text(ids, normalize=True)

    def loss_at(step):
        rows = torch.randint(len(pixels), (batch_size,))
        # every second batch was encoded and decoded by the VAE, like the images that the CLIP will score
        batch = to_pixel_values((through_vae if step % 2 else pixels)[rows])
        shifted = torch.roll(batch, tuple(rng.integers(-3, 4, 2)), (2, 3))
        images = model.encode_image(shifted + 0.02 * torch.randn_like(shifted), normalize=True)
        texts = [shortened(rng, captions[i]) for i in rows]
        logits = model.logit_scale.exp().clamp(max=100) * images @ encode_text(texts).T
        same = torch.tensor([[a == b for b in texts] for a in texts]).float()
        target = same / same.sum(dim=1, keepdim=True)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    optimize(list(model.parameters()), loss_at, steps, 1e-3, "clip", ema_of=[model])
    state = {k: v.half().contiguous() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    preprocess = {"mean": mean, "std": std, "interpolation": "bicubic", "resize_mode": "shortest"}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=2) + "\n"
    )

    model.eval()
    pixels, _, scenes, *_ = draw_many(1600, seed=402, species=SPECIES)
    with torch.no_grad():
        classes = encode_text([s.name for s in SPECIES])
        images = torch.cat([model.encode_image(to_pixel_values(chunk), normalize=True) for chunk in pixels.split(200)])
    truth = torch.tensor([SPECIES.index(scene.creatures[0]) for scene in scenes])
    single = torch.tensor([len(set(scene.creatures)) == 1 for scene in scenes])
    right = ((images @ classes.T).argmax(dim=1) == truth)[single].float().mean()
    print(f"clip: names {right:.1%} of {int(single.sum())} fresh one-species drawings of 16 species, zero-shot")


class AestheticHead(nn.Module):
    """LAION's improved-aesthetic-predictor (sac+logos+ava1-l14-linearMSE.pth) for a smaller embedding."""

    def __init__(self, width):
        super().__init__()
        sizes = (width, 1024, 128, 64, 16, 1)
        linear = [nn.Linear(a, b) for a, b in zip(sizes, sizes[1:])]
        drop = [nn.Dropout(p) for p in (0.2, 0.2, 0.1)]
        self.layers = nn.Sequential(linear[0], drop[0], linear[1], drop[1], linear[2], drop[2], linear[3], linear[4])

    def forward(self, embeddings):
        return self.layers(embeddings)


def train_aesthetic(output_dir, steps=6000, batch_size=256):
    torch.manual_seed(5)
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{output_dir / 'clip'}")
    model.eval()
    pixels, _, _, _, scores = draw_many(5000, seed=501, species=SPECIES)
    with torch.no_grad():
        embeddings = torch.cat(
            [model.encode_image(to_pixel_values(chunk), normalize=True) for chunk in pixels.split(200)]
        )
    scores = scores[:, None].float() / 10
    train = slice(0, 4500)
    held_out = slice(4500, None)
    head = AestheticHead(embeddings.shape[1])
    head.layers[-1].bias.data.fill_(scores.mean().item())

    def loss_at(step):
        rows = torch.randint(4500, (batch_size,))
        return F.mse_loss(head(embeddings[train][rows]), scores[rows])

    optimize(list(head.parameters()), loss_at, steps, 3e-3, "aesthetic")
    head.eval()
    with torch.no_grad():
        pair = torch.cat([head(embeddings[held_out]), scores[held_out]], dim=1).T
    print(f"aesthetic: correlation with the world's own score on unseen drawings {torch.corrcoef(pair)[0, 1]:.3f}")
    torch.save(head.state_dict(), output_dir / "aesthetic-linearMSE.pth")


STAGES = {
    "tokenizers": train_tokenizers,
    "vae": train_vae,
    "base": train_base,
    "vae_colour": train_vae_colour,
    "base_colour": train_base_colour,
    "refiner": train_refiner,
    "clip": train_clip,
    "aesthetic": train_aesthetic,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("demo"), metavar="DIR")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    args = parser.parse_args()
    for stage in args.stages:
        start = time.time()
        STAGES[stage](args.output_dir)
        print(f"{stage}: done in {(time.time() - start) / 60:.1f} min", flush=True)
