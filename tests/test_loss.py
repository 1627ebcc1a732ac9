import json

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from harness import SDXL

from train_sdxl_lora import (
    add_adapters,
    compute_snr_weights,
    diffusion_loss,
    encode_moments,
    load_models,
    sample_batch_noise,
    sample_latents,
    sample_noise,
)

SCALING_FACTOR = json.loads((SDXL / "vae/config.json").read_text())["scaling_factor"]
CAPTIONS = ["Thornip, jumping in the snow", "Aquafin, standing on a beach", "Inkray in a cave"]


@pytest.fixture
def args(parse):
    return parse("--rank", 2, "--train_text_encoder")


@pytest.fixture
def load(args):
    return lambda **flags: load_models(type(args)(**vars(args) | flags), torch.float32, "cpu")


def make_batch(captions=CAPTIONS, height=64, width=64):
    count, generator = len(captions), torch.Generator().manual_seed(0)
    return {
        "pixel_values": torch.rand(count, 3, height, width, generator=generator) * 2 - 1,
        "captions": list(captions),
        "sample_seeds": [11, 22, 33][:count],
        "original_sizes": torch.tensor([[100.0, 80.0], [64.0, 128.0], [90.0, 90.0]])[:count],
        "crop_top_lefts": torch.tensor([[3.0, 0.0], [0.0, 32.0], [0.0, 0.0]])[:count],
        "target_sizes": torch.tensor([[64.0, 64.0]] * 3)[:count],
    }


def with_timesteps(draws, *timesteps):
    return draws | {"timesteps": torch.tensor(timesteps)}


SNR = torch.tensor([0.01, 0.5, 5.0, 400.0])


def test_min_snr_weights_of_epsilon_never_rise_above_one():
    assert torch.allclose(compute_snr_weights(SNR, 5.0, "epsilon"), torch.tensor([1.0, 1.0, 1.0, 5 / 400]))


def test_min_snr_weights_of_v_prediction_are_divided_by_snr_plus_one():
    expected = torch.tensor([0.01 / 1.01, 0.5 / 1.5, 5 / 6, 5 / 401])
    assert torch.allclose(compute_snr_weights(SNR, 5.0, "v_prediction"), expected)
    assert compute_snr_weights(torch.zeros(1), 5.0, "v_prediction").item() == 0  # zero terminal SNR


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_gamma_zero_weights_nothing(prediction_type):
    assert torch.equal(compute_snr_weights(SNR, 0.0, prediction_type), torch.ones(4))


def test_the_draws_of_a_sample_depend_on_its_seed_alone():
    together = sample_noise([7, 8, 9], (4, 8, 6), (0, 999))
    for place, seed in enumerate([7, 8, 9]):
        torch.manual_seed(place)
        alone = sample_noise([seed], (4, 8, 6), (0, 999))
        for name, draw in alone.items():
            assert torch.equal(draw[0], together[name][place]), name
    assert {name: tuple(draw.shape) for name, draw in together.items()} == {
        "vae_noise": (3, 4, 8, 6),
        "noise": (3, 4, 8, 6),
        "timesteps": (3,),
        "caption_draws": (3,),
    }


def test_the_draws_never_change_silently():
    draws = sample_noise([123], (4, 2, 2), (0, 999))
    found = [draws["timesteps"].item(), draws["caption_draws"].item()]
    found += [draws[name][0, 0, 0, 0].item() for name in ("vae_noise", "noise")]
    assert found == pytest.approx([382, 0.5165623, -0.3035276, -0.1689563], abs=1e-6)


def test_the_draws_are_spread_as_they_should_be():
    n = 2000
    draws = sample_noise(range(n), (4, 2, 2), (0, 999))
    assert draws["timesteps"].dtype == torch.int64
    assert draws["timesteps"].min() >= 0 and 990 < draws["timesteps"].max() < 1000
    assert abs(draws["timesteps"].double().mean() - 499.5) < 5 * 288.7 / n**0.5
    assert abs(draws["caption_draws"].mean() - 0.5) < 5 / (12 * n) ** 0.5
    for name in ("noise", "vae_noise"):
        assert abs(draws[name].mean()) < 5 / (16 * n) ** 0.5
        assert abs(draws[name].std() - 1) < 5 / (32 * n) ** 0.5
    assert abs((draws["noise"] * draws["vae_noise"]).mean()) < 5 / (16 * n) ** 0.5
    assert sample_noise(range(200), (4, 1, 1), (3, 9))["timesteps"].unique().tolist() == list(range(3, 10))


def test_the_noise_offset_is_constant_over_a_channel():
    plain, shifted = (sample_noise([1, 2], (4, 8, 8), (0, 999), offset) for offset in (0.0, 0.1))
    offset = shifted["noise"] - plain["noise"]
    assert torch.allclose(offset, offset[:, :, :1, :1].expand_as(offset), atol=1e-6)
    assert len(offset[:, :, 0, 0].flatten().mul(1e4).round().unique()) == 8
    assert 0.03 < offset[:, :, 0, 0].std() < 0.3
    assert torch.equal(shifted["vae_noise"], plain["vae_noise"])


def test_the_noise_has_the_shape_of_the_latents(load):
    models = load()
    batch = make_batch(height=64, width=96)
    draws = sample_batch_noise(models, batch, 0.0)
    assert (
        draws["noise"].shape
        == sample_latents(models.vae, encode_moments(models.vae, batch["pixel_values"]), draws["vae_noise"]).shape
    )
    assert draws["noise"].shape == (3, 4, 8, 12)


def test_latents_are_samples_of_the_posterior_scaled():
    vae = AutoencoderKL.from_pretrained(SDXL, subfolder="vae", torch_dtype=torch.float32)
    pixels = make_batch()["pixel_values"]
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    expected = posterior.sample(torch.Generator().manual_seed(4)) * SCALING_FACTOR
    vae_noise = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4))
    assert torch.allclose(sample_latents(vae, encode_moments(vae, pixels), vae_noise), expected, rtol=1e-5, atol=1e-6)
    mode = sample_latents(vae, encode_moments(vae, pixels), torch.zeros_like(vae_noise))
    assert torch.allclose(mode, posterior.mode() * SCALING_FACTOR, rtol=1e-5, atol=1e-6)


def test_latents_of_a_bf16_vae_are_fp32():
    vae = AutoencoderKL.from_pretrained(SDXL, subfolder="vae", torch_dtype=torch.bfloat16)
    moments = encode_moments(vae, make_batch()["pixel_values"])
    assert moments.dtype == torch.bfloat16 and moments.shape == (3, 2, 4, 8, 8)
    latents = sample_latents(vae, moments, torch.randn(3, 4, 8, 8))
    assert latents.dtype == torch.float32 and not latents.requires_grad


def reference_loss(batch, draws, prediction_type, gamma):
    """The loss by the formulas of DDPM, v-prediction and min-SNR, with embeddings of the stock pipeline."""
    pipe = StableDiffusionXLPipeline.from_pretrained(SDXL, torch_dtype=torch.float32, add_watermarker=False)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    signal = torch.cumprod(1 - betas, 0)[draws["timesteps"]].float()[:, None, None, None]
    noise = draws["noise"]
    with torch.no_grad():
        posterior = pipe.vae.encode(batch["pixel_values"]).latent_dist
        latents = (posterior.mean + torch.exp(0.5 * posterior.logvar) * draws["vae_noise"]) * SCALING_FACTOR
        noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
        prompt_embeds, _, pooled, _ = pipe.encode_prompt(batch["captions"], do_classifier_free_guidance=False)
        sizes = [batch[name] for name in ("original_sizes", "crop_top_lefts", "target_sizes")]
        added = {"text_embeds": pooled, "time_ids": torch.cat(sizes, 1)}
        predicted = pipe.unet(noisy, draws["timesteps"], prompt_embeds, added_cond_kwargs=added).sample
    velocity = signal.sqrt() * noise - (1 - signal).sqrt() * latents
    target = noise if prediction_type == "epsilon" else velocity
    snr = (signal / (1 - signal)).flatten()
    weight = torch.tensor([min(s, gamma) / (s if prediction_type == "epsilon" else s + 1) for s in snr.tolist()])
    return (predicted - target).pow(2).flatten(1).mean(1) * (weight if gamma else 1)


@pytest.mark.parametrize("gamma", [0.0, 5.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_is_the_one_of_the_formulas(load, prediction_type, gamma):
    models, batch = load(prediction_type=prediction_type), make_batch()
    draws = with_timesteps(sample_batch_noise(models, batch, 0.0), 3, 300, 950)
    with torch.no_grad():
        loss = diffusion_loss(models, batch, draws, torch.float32, snr_gamma=gamma)
    assert loss.shape == (3,)
    assert torch.allclose(loss, reference_loss(batch, draws, prediction_type, gamma), rtol=2e-4)


def test_a_sample_has_the_same_loss_alone_and_in_a_batch(load):
    models, batch = load(), make_batch()
    draws = sample_batch_noise(models, batch, 0.0)
    with torch.no_grad():
        together = diffusion_loss(models, batch, draws, torch.float32, 5.0)
        parts = [[{k: v[i : i + 1] for k, v in whole.items()} for whole in (batch, draws)] for i in range(3)]
        alone = [diffusion_loss(models, *part, torch.float32, 5.0) for part in parts]
    assert torch.allclose(together, torch.cat(alone), rtol=1e-4)


def test_a_dropout_rate_of_one_is_training_on_the_empty_caption(load):
    models, batch = load(), make_batch()
    draws = sample_batch_noise(models, batch, 0.0)

    def loss(captions, rate, dropped_caption):
        with torch.no_grad():
            changed = batch | {"captions": captions}
            return diffusion_loss(models, changed, draws, torch.float32, 0.0, rate, dropped_caption)

    empty, zeros = loss(CAPTIONS, 1.0, "empty"), loss(CAPTIONS, 1.0, "zeros")
    assert torch.allclose(empty, loss([""] * 3, 0.0, "empty"), rtol=1e-4)
    assert torch.equal(zeros, loss(["another caption"] * 3, 1.0, "zeros"))
    assert torch.equal(loss(CAPTIONS, 0.0, "zeros"), loss(CAPTIONS, 0.0, "zeros"))
    for one, other in ((empty, zeros), (empty, loss(CAPTIONS, 0.0, "empty")), (zeros, loss(CAPTIONS, 0.0, "zeros"))):
        assert not torch.allclose(one, other, rtol=1e-3)


@pytest.mark.parametrize("dropped_caption", ["zeros", "empty"])
def test_the_dropout_rate_drops_the_samples_whose_draw_is_below_it(load, dropped_caption):
    models, batch = load(), make_batch()
    draws = sample_batch_noise(models, batch, 0.0) | {"caption_draws": torch.tensor([0.05, 0.1, 0.5])}
    with torch.no_grad():
        kept, some, dropped = (
            diffusion_loss(models, batch, draws, torch.float32, 0.0, rate, dropped_caption) for rate in (0.0, 0.1, 1.0)
        )
    assert torch.allclose(some, torch.stack([dropped[0], kept[1], kept[2]]), rtol=1e-4)
    assert not torch.allclose(kept, dropped, rtol=1e-3)


def test_the_loss_is_finite_and_its_gradient_flows_into_the_adapters_alone(args, load):
    models, batch = load(), make_batch()
    trained = add_adapters(args, models, 0)
    draws = with_timesteps(sample_batch_noise(models, batch, 0.0), 0, 500, 999)
    loss = diffusion_loss(models, batch, draws, torch.float32, 5.0)
    assert torch.isfinite(loss).all() and (loss > 0).all()
    loss.mean().backward()
    parameters = {f"{name}.{k}": p for name, m in trained.items() for k, p in m.named_parameters()}
    parameters |= {f"vae.{k}": p for k, p in models.vae.named_parameters()}
    assert {k for k, p in parameters.items() if p.grad is not None} == {k for k in parameters if "lora_" in k}
    ups = [p.grad for k, p in parameters.items() if "lora_B" in k]
    assert len(ups) > 20 and all(torch.isfinite(g).all() and g.abs().max() > 0 for g in ups)


def test_a_step_against_the_gradient_lowers_the_loss(args, load):
    models, batch = load(), make_batch()
    trained = add_adapters(args, models, 0)
    draws = sample_batch_noise(models, batch, 0.0)
    optimizer = torch.optim.SGD([p for m in trained.values() for p in m.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        loss = diffusion_loss(models, batch, draws, torch.float32).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]


def test_loading_makes_fp32_of_the_committed_weights(load):
    models = load()
    stored = UNet2DConditionModel.from_pretrained(SDXL, subfolder="unet", torch_dtype=torch.float32).state_dict()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in models.unet.state_dict().items())


def test_a_prediction_type_that_is_not_known_is_refused(load):
    models, batch = load(), make_batch()
    models.noise_scheduler.register_to_config(prediction_type="sample")
    with pytest.raises(ValueError, match="prediction_type"):
        diffusion_loss(models, batch, sample_batch_noise(models, batch, 0.0), torch.float32)
