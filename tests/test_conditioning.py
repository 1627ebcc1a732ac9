from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from harness import SDXL

from train_sdxl_lora import (
    count_chunks,
    diffusion_loss,
    drop_captions,
    encode_prompts,
    load_models,
    sample_batch_noise,
    tokenize,
)

CAPTIONS = ["Thornip, jumping in the snow, masterpiece", "Aquafin and Inkray " + "in a cave, facing left, " * 30]
SIZES = {"original_size": (301, 200), "crops_coords_top_left": (5, 19), "target_size": (96, 64)}


@pytest.fixture(scope="module")
def pipeline():
    pipe = StableDiffusionXLPipeline.from_pretrained(SDXL, torch_dtype=torch.float32, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def models(parse):
    return load_models(parse(), torch.float32, "cpu")


@pytest.fixture
def seen():
    """Call it with a UNet; the dict that it returns fills with what reaches that UNet while the test runs."""
    handles = []

    def watch(unet):
        tensors = {}

        def hook(module, inputs, kwargs):
            embeds = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else inputs[2]
            tensors.update(kwargs["added_cond_kwargs"], prompt_embeds=embeds)

        handles.append(unet.register_forward_pre_hook(hook, with_kwargs=True))
        return tensors

    yield watch
    for handle in handles:
        handle.remove()


def sample(pipeline, captions, guidance_scale=1.0, **options):
    options = {"height": 64, "width": 64, "num_inference_steps": 1, "output_type": "latent"} | SIZES | options
    with torch.no_grad():
        pipeline(captions, guidance_scale=guidance_scale, **options)


def encode(models, captions):
    with torch.no_grad():
        return encode_prompts(models, captions, "cpu")


def time_ids_of(sizes, count):
    return torch.cat([torch.tensor([size] * count, dtype=torch.float32) for size in sizes.values()], dim=1)


def make_batch(captions, sizes=SIZES):
    names = ("original_sizes", "crop_top_lefts", "target_sizes")
    tensors = {k: torch.tensor([size] * len(captions), dtype=torch.float32) for k, size in zip(names, sizes.values())}
    pixels = torch.rand(len(captions), 3, 64, 64) * 2 - 1
    return {"pixel_values": pixels, "captions": captions, "sample_seeds": list(range(len(captions))), **tensors}


@pytest.mark.parametrize("captions", [CAPTIONS[:1], CAPTIONS[1:], CAPTIONS, [""]])
def test_embeddings_and_time_ids_are_those_of_the_stock_pipeline(pipeline, models, seen, captions):
    stock = seen(pipeline.unet)
    sample(pipeline, captions)
    prompt_embeds, pooled_prompt_embeds = encode(models, captions)
    assert torch.equal(prompt_embeds, stock["prompt_embeds"])
    assert torch.equal(pooled_prompt_embeds, stock["text_embeds"])
    assert torch.equal(time_ids_of(SIZES, len(captions)), stock["time_ids"])


def test_what_the_loss_gives_to_the_unet_is_what_the_pipeline_gives_it(pipeline, models, seen):
    stock, ours = seen(pipeline.unet), seen(models.unet)
    sample(pipeline, CAPTIONS)
    batch = make_batch(CAPTIONS)
    with torch.no_grad():
        diffusion_loss(models, batch, sample_batch_noise(models, batch, 0.0), torch.float32)
    assert set(ours) == {"prompt_embeds", "text_embeds", "time_ids"}
    for name, tensor in ours.items():
        assert torch.equal(tensor, stock[name]), name


def test_dropped_captions_are_what_the_pipeline_uses_without_a_negative_prompt(pipeline, models, seen):
    stock = seen(pipeline.unet)
    sample(pipeline, CAPTIONS, guidance_scale=5.0)
    dropped = drop_captions(*encode(models, CAPTIONS), torch.tensor([True, True]))
    assert torch.equal(dropped[0], stock["prompt_embeds"][:2])
    assert torch.equal(dropped[1], stock["text_embeds"][:2])


def test_the_empty_caption_is_what_the_pipeline_uses_for_an_empty_negative_prompt(pipeline, models, seen):
    stock = seen(pipeline.unet)
    sample(pipeline, CAPTIONS[:1], guidance_scale=5.0, negative_prompt="")
    dropped = drop_captions(*encode(models, CAPTIONS[:1]), torch.tensor([True]), encode(models, [""]))
    assert dropped[0].abs().max() > 0
    assert torch.equal(dropped[0], stock["prompt_embeds"][:1])
    assert torch.equal(dropped[1], stock["text_embeds"][:1])


@pytest.mark.parametrize("with_empty", [False, True])
def test_only_the_dropped_samples_lose_their_caption(models, with_empty):
    embeds, pooled = encode(models, CAPTIONS)
    empty = encode(models, [""]) if with_empty else None
    dropped_embeds, dropped_pooled = drop_captions(embeds, pooled, torch.tensor([False, True]), empty)
    assert torch.equal(dropped_embeds[0], embeds[0]) and torch.equal(dropped_pooled[0], pooled[0])
    assert torch.equal(dropped_embeds[1], empty[0][0] if with_empty else torch.zeros_like(embeds[1]))
    assert torch.equal(dropped_pooled[1], empty[1][0] if with_empty else torch.zeros_like(pooled[1]))


def test_a_dropped_caption_still_gives_the_encoders_a_gradient_tensor(models):
    embeds, pooled = (tensor.clone().requires_grad_() for tensor in encode(models, CAPTIONS))
    dropped = drop_captions(embeds, pooled, torch.tensor([True, True]))
    (dropped[0].sum() + dropped[1].sum()).backward()
    assert embeds.grad.abs().max() == 0 and pooled.grad.abs().max() == 0


def test_time_ids_stay_float32_also_when_the_weights_are_bf16(models, seen):
    sizes = {"original_size": (1365, 2049), "crops_coords_top_left": (341, 0), "target_size": (1024, 1024)}
    ours = seen(models.unet)
    batch = make_batch(CAPTIONS[:1], sizes)
    draws = sample_batch_noise(models, batch, 0.0)
    models.unet.to(torch.bfloat16)
    try:
        with torch.no_grad():
            diffusion_loss(models, batch, draws, torch.bfloat16)
    finally:
        models.unet.to(torch.float32)
    assert ours["prompt_embeds"].dtype == ours["text_embeds"].dtype == torch.bfloat16
    assert ours["time_ids"].dtype == torch.float32
    assert ours["time_ids"].tolist() == [[1365, 2049, 341, 0, 1024, 1024]]


# ---- captions over 75 tokens


def words(count):
    return " ".join(["cave"] * count)


def test_the_first_chunk_is_what_a_truncated_caption_is(models):
    for tokenizer in models.tokenizers:
        cut, chunked = tokenize(tokenizer, CAPTIONS), tokenize(tokenizer, CAPTIONS, 3)
        assert chunked.shape == (6, 77)
        assert torch.equal(chunked[::3], cut)
        assert chunked[4].ne(chunked[3]).any()
        assert torch.equal(chunked[1], chunked[2])  # the short caption has nothing more to say


def test_no_token_is_lost_or_read_twice_between_chunks(models):
    tokenizer = models.tokenizers[0]
    whole = tokenizer([CAPTIONS[1]], add_special_tokens=False).input_ids[0]
    assert 150 < len(whole) < 225
    marks = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    read = [token for token in tokenize(tokenizer, [CAPTIONS[1]], 3).flatten().tolist() if token not in marks]
    assert read == [token for token in whole if token not in marks]


def test_chunks_are_encoded_one_by_one_and_concatenated(models):
    chunked = replace(models, caption_chunks=3)
    with torch.no_grad():
        embeds, pooled = encode_prompts(chunked, CAPTIONS, "cpu")
        first, first_pooled = encode_prompts(models, CAPTIONS, "cpu")
        alone, _ = encode_prompts(chunked, CAPTIONS[1:], "cpu")
    assert embeds.shape == (2, 231, first.shape[-1])
    torch.testing.assert_close(embeds[:, :77], first)
    torch.testing.assert_close(pooled, first_pooled)
    torch.testing.assert_close(alone[0], embeds[1])


@pytest.mark.parametrize(
    "mode, lengths, expected",
    [
        ("truncate", [3, 75], (1, 0, 75)),
        ("truncate", [3, 76, 200], (1, 2, 200)),
        ("chunk", [3, 75], (1, 0, 75)),
        ("chunk", [3, 76], (2, 0, 76)),
        ("chunk", [150, 300], (3, 1, 300)),
    ],
)
def test_long_captions_are_counted(models, mode, lengths, expected):
    tokenizer = models.tokenizers[0]
    per_word = len(tokenizer([words(100)], add_special_tokens=False).input_ids[0]) / 100
    assert per_word == 1
    assert count_chunks(tokenizer, [words(n) for n in lengths], mode) == expected
