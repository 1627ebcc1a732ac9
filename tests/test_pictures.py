"""evaluate.py, on the way to an image and its scores: the noise, the strength of the LoRA, what each flag is for."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from harness import ROOT, SDXL
from PIL import Image

import evaluate
import sdxl_lora
import train_sdxl_lora as trainer

CLIP = f"local-dir:{ROOT / 'demo/clip'}"
CPU = torch.device("cpu")
PROMPTS = [
    evaluate.Prompt("a", "Aquafin in a cave", "Aquafin", "Aquafin", ()),
    evaluate.Prompt("b", "Pebblor on a beach", "Pebblor", "Pebblor", ()),
]


@pytest.fixture(scope="module")
def parse(tmp_path_factory):
    """Flags of the smallest evaluation with some more."""
    folder = tmp_path_factory.mktemp("evaluation")
    panel = folder / "panel.jsonl"
    panel.write_text("".join(json.dumps(vars(prompt) | {"tags": []}) + "\n" for prompt in PROMPTS))
    words = ["--pretrained_model_name_or_path", SDXL, "--prompts", panel, "--seeds", 0, "--resolution", 64]
    words += ["--num_inference_steps", 1, "--dtype", "fp32", "--output_dir", folder / "eval"]
    words += ["--clip_model", CLIP, "--aesthetic_clip_model", CLIP]
    words += ["--aesthetic_head", ROOT / "demo/aesthetic-linearMSE.pth"]
    return lambda *more: evaluate.parse_args([str(word) for word in [*words, *more]])


class Recorder:
    """A pipeline that notes with what it is called."""

    def __init__(self, pipeline):
        self.pipeline = pipeline
        self.calls = []

    def __getattr__(self, name):
        return getattr(self.pipeline, name)

    def __call__(self, texts, **options):
        self.calls.append(options)
        return self.pipeline(texts, **options)


def make_generator(args):
    generator = evaluate.ImageGenerator(args, CPU)
    generator.base = Recorder(generator.base)
    return generator


# ---- the noise


@pytest.fixture(scope="module")
def generator(parse):
    return make_generator(parse())


def noise_of(generator, prompts, seeds):
    generator.generate(prompts, seeds)
    return generator.base.calls[-1]["latents"]


def test_two_prompts_with_the_same_seed_start_from_different_noise(generator):
    one, two = noise_of(generator, PROMPTS, (0, 0))
    assert one.shape == (4, 8, 8) and abs(one.std() - 1) < 0.2
    assert abs(torch.corrcoef(torch.stack([one.flatten(), two.flatten()]))[0, 1]) < 0.3


def test_the_noise_depends_on_the_prompts_id_and_the_seed_alone(generator):
    first, second = PROMPTS
    together = noise_of(generator, PROMPTS, (0, 0))
    torch.manual_seed(99)
    assert torch.equal(noise_of(generator, [second], (0,))[0], together[1])
    assert torch.equal(noise_of(generator, [second, first], (0, 0)), together.flip(0))
    reworded = evaluate.Prompt("a", "another text", "another text", None, ("tag",))
    assert torch.equal(noise_of(generator, [reworded], (0,))[0], together[0])
    renamed = evaluate.Prompt("c", first.prompt, first.clip_prompt, first.class_name, first.tags)
    assert not torch.equal(noise_of(generator, [renamed], (0,))[0], together[0])
    assert not torch.equal(noise_of(generator, [first], (1,))[0], together[0])


# ---- what the pipelines get


def test_size_steps_guidance_and_negative_prompt_are_those_of_the_flags(parse):
    words = ["--resolution", 72, "--num_inference_steps", 2, "--guidance_scale", 3.5, "--negative_prompt", "blurry"]
    generator = make_generator(parse(*words))
    image, _ = generator.generate(PROMPTS, (0, 0))
    assert image.size == (72, 72)
    (asked,) = generator.base.calls
    assert (asked["num_inference_steps"], asked["guidance_scale"]) == (2, 3.5)
    assert asked["negative_prompt"] == ["blurry", "blurry"] and asked["denoising_end"] is None


def test_the_refiner_takes_over_where_denoising_start_says(parse):
    words = ["--refiner_unet", ROOT / "demo/refiner/unet", "--denoising_start", 0.5, "--num_inference_steps", 4]
    generator = make_generator(parse(*words))
    generator.refiner = Recorder(generator.refiner)
    generator.generate(PROMPTS[:1], (0,))
    assert generator.base.calls[0]["denoising_end"] == generator.refiner.calls[0]["denoising_start"] == 0.5


def test_a_lora_has_the_strength_of_lora_scale(parse, flags, tmp_path):
    args = trainer.parse_args([str(word) for word in [*flags, "--output_dir", tmp_path]])
    models = trainer.load_models(args, torch.float32, CPU)
    adapters = trainer.add_adapters(args, models, 0)
    for name, write in sdxl_lora.lora_files(adapters, "base", None, 64, models.noise_scheduler.config).items():
        write(tmp_path / name)
    scales = {}
    for strength in (1.0, 0.25):
        generator = evaluate.ImageGenerator(parse("--lora_scale", strength), CPU)
        generator.use(evaluate.Model("x", lora=evaluate.find_lora(tmp_path)))
        layers = [m for m in generator.base.unet.modules() if "lora" in getattr(m, "scaling", ())]
        scales[strength] = [layer.scaling["lora"] for layer in layers]
    assert scales[1.0] and scales[0.25] == [0.25 * scale for scale in scales[1.0]]


@pytest.mark.parametrize("dtype, expected", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_revision_variant_cache_and_precision_are_asked_for(parse, tmp_path, monkeypatch, dtype, expected):
    asked = {}

    def from_pretrained(path, **options):
        asked.update(options)
        raise OSError("not really there")

    monkeypatch.setattr(evaluate.StableDiffusionXLPipeline, "from_pretrained", from_pretrained)
    words = ["--revision", "v1", "--variant", "fp16", "--cache_dir", tmp_path, "--dtype", dtype]
    with pytest.raises(evaluate.InputError, match="not really there"):
        evaluate.ImageGenerator(parse(*words), CPU)
    assert (asked["revision"], asked["variant"], asked["cache_dir"]) == ("v1", "fp16", str(tmp_path))
    assert asked["dtype"] == expected


def test_flags_may_come_from_a_config_file_and_the_command_line_wins(parse, tmp_path):
    (tmp_path / "flags.yaml").write_text("guidance_scale: 2.0\nbatch_size: 3\nnegative_prompt: blurry\n")
    args = parse("--config", tmp_path / "flags.yaml", "--batch_size", 5)
    assert (args.guidance_scale, args.batch_size, args.negative_prompt) == (2.0, 5, "blurry")


# ---- what the scores are made of


@pytest.fixture
def score(parse, tmp_path):
    """Runs score_all() on images in --images_dir, with some more flags."""
    state = SimpleNamespace(process_index=0, num_processes=1, is_main_process=True, device=CPU)
    state.wait_for_everyone = lambda: None
    model = evaluate.Model("base model")

    def run(*words):
        args = parse("--images_dir", tmp_path / "images", "--output_dir", tmp_path / "eval", *words)
        (tmp_path / "eval").mkdir(exist_ok=True)
        jobs = evaluate.list_jobs(args, [model], PROMPTS)
        for number, job in enumerate(jobs):
            assert job.path.is_relative_to(tmp_path / "images")
            job.path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(job.path)
        return evaluate.score_all(args, state, [model], PROMPTS, jobs)

    return run


def test_the_score_is_weighted_as_score_weights_say(score):
    for row in score("--score_weights", 0.9, 0.2).rows:
        assert row["score"] == pytest.approx(0.9 * row["adherence"] + 0.02 * row["aesthetic"], abs=1e-6)


def test_clip_reads_the_species_in_the_words_of_species_prompt(score, monkeypatch):
    read = []
    embed_texts = evaluate.Clip.embed_texts

    def note_texts(clip, texts):
        read.append(list(texts))
        return embed_texts(clip, texts)

    monkeypatch.setattr(evaluate.Clip, "embed_texts", note_texts)
    score("--species_prompt", "a toy of {}, from above")
    assert ["a toy of Aquafin, from above", "a toy of Pebblor, from above"] in read


def test_held_out_images_are_those_of_val_shards_and_training_images_without_them(score, world):
    scores = score("--train_shards", world / "data/train", "--val_shards", world / "data/val")
    assert len(scores.reference.names) > scores.held_out["images"] > 0
    scores = score("--train_shards", world / "data/train")
    assert len(scores.reference.names) == scores.held_out["images"]


def test_copies_of_shards_are_kept_in_cache_dir(score, world, tmp_path):
    (shard,) = (world / "data/val").glob("*.tar")
    score("--train_shards", f"pipe:cat {shard}", "--cache_dir", tmp_path / "cache")
    assert list((tmp_path / "cache").rglob("*.tar"))
