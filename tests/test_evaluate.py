"""evaluate.py: images depend on prompt and seed only, scores equal those computed by hand, reports need no network."""

import copy
import csv
import json
import os
import re
import shutil
import signal
from functools import partial
from xml.etree import ElementTree

import jinja2
import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
from diffusers import UNet2DConditionModel
from harness import CHROMIUM, ROOT, SDXL, assert_ok, browse, run_trainer
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from world import draw_scene, sample_scene

import evaluate

CLIP = f"local-dir:{ROOT / 'demo/clip'}"
HEAD = ROOT / "demo/aesthetic-linearMSE.pth"
PROMPTS = ROOT / "demo/panel.jsonl"


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    file.write_text("".join(PROMPTS.read_text().splitlines(keepends=True)[i] for i in (0, 1, 5)))
    return file


@pytest.fixture(scope="module")
def lora(world, tmp_path_factory):
    """A run with checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    argv = ["--pretrained_model_name_or_path", SDXL, "--train_shards", world / "data/train", "--resolution", 64]
    argv += ["--train_batch_size", 2, "--max_train_steps", 4, "--seed", 1, "--learning_rate", 0.02, "--rank", 2]
    argv += ["--checkpointing_steps", 2, "--report_to", "none", "--mixed_precision", "no", "--train_text_encoder"]
    assert_ok(run_trainer(argv, folder))
    return folder


@pytest.fixture(scope="module")
def words(prompts_file):
    """A small evaluation without --lora and --output_dir."""
    return [
        *("--pretrained_model_name_or_path", SDXL, "--prompts", prompts_file, "--seeds", 0, 1, "--resolution", 64),
        *("--num_inference_steps", 3, "--guidance_scale", 2.5, "--dtype", "fp32", "--batch_size", 2),
        *("--clip_model", CLIP, "--aesthetic_clip_model", CLIP, "--aesthetic_head", HEAD),
    ]


def run(argv, output_dir, processes=1, setup=None, ok=True, env=None):
    result = run_trainer(argv, output_dir, processes, env, setup, script="evaluate")
    return assert_ok(result) if ok else result


def images(folder):
    return {
        path.relative_to(folder): np.asarray(Image.open(path)).astype(int) for path in folder.glob("images/*/*.png")
    }


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())["models"]


@pytest.fixture(scope="module")
def evaluation(words, lora, world, tmp_path_factory):
    """Output of an evaluation of a checkpoint and its run, in one process."""
    folder = tmp_path_factory.mktemp("evaluation") / "eval"
    argv = [*words, "--lora", lora / "checkpoint-2", lora, "--train_shards", world / "data/train"]
    run([*argv, "--val_shards", world / "data/val"], folder)
    return folder


def assert_close(a, b, tolerance=1e-6):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_close(a[key], b[key], tolerance)
    elif isinstance(a, float):
        assert a == pytest.approx(b, abs=tolerance, nan_ok=True)
    else:
        assert a == b


# ---- images


def test_two_processes_make_the_same_images_and_scores(evaluation, words, lora, world, tmp_path):
    argv = [*words, "--lora", lora / "checkpoint-2", lora, "--train_shards", world / "data/train"]
    result = run([*argv, "--val_shards", world / "data/val"], tmp_path / "eval", processes=2, setup=count_images)
    assert made(result) == 18 and all("made" in output for output in result.outputs)  # each made a share of them
    one, two = images(evaluation), images(tmp_path / "eval")
    assert one.keys() == two.keys() and len(one) == 3 * 3 * 2
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert_close(metrics(evaluation), metrics(tmp_path / "eval"))


def test_the_batch_size_moves_no_pixel_by_more_than_one(evaluation, words, lora, tmp_path):
    for size in (1, 4):
        run([*words, "--lora", lora, "--batch_size", size], tmp_path / f"of-{size}")
        found, by_twos = images(tmp_path / f"of-{size}"), images(evaluation)
        assert len(found) == 2 * 3 * 2 and found.keys() <= by_twos.keys()
        assert max(np.abs(found[name] - by_twos[name]).max() for name in found) <= 1


def die_before_batch(number, module):
    original = module.ImageGenerator.generate
    calls = []

    def generate(self, *args):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *args)

    module.ImageGenerator.generate = generate


def count_images(module):
    original = module.ImageGenerator.generate

    def generate(self, prompts, seeds):
        print("made", len(prompts), flush=True)
        return original(self, prompts, seeds)

    module.ImageGenerator.generate = generate


def made(result):
    return sum(map(int, re.findall(r"made (\d+)", result.output)))


def test_a_killed_evaluation_continues_and_makes_no_image_twice(words, lora, tmp_path):
    argv = [*words, "--lora", lora]
    killed = run(argv, tmp_path / "eval", setup=partial(die_before_batch, 4), ok=False)
    assert killed.codes == [-signal.SIGKILL] and len(images(tmp_path / "eval")) == 6
    assert made(run(argv, tmp_path / "eval", setup=count_images)) == 6
    run(argv, tmp_path / "uninterrupted")
    one, two = images(tmp_path / "eval"), images(tmp_path / "uninterrupted")
    assert one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)
    assert_close(metrics(tmp_path / "eval"), metrics(tmp_path / "uninterrupted"))
    assert made(run(argv, tmp_path / "eval", setup=count_images)) == 0


def test_another_lora_in_the_same_file_gets_new_images(words, lora, tmp_path):
    argv = [*words, "--lora", tmp_path / "x.safetensors"]
    shutil.copy(lora / "checkpoint-2/pytorch_lora_weights.safetensors", tmp_path / "x.safetensors")
    assert made(run(argv, tmp_path / "eval", setup=count_images)) == 12
    shutil.copy(lora / "pytorch_lora_weights.safetensors", tmp_path / "x.safetensors")
    assert made(run(argv, tmp_path / "eval", setup=count_images)) == 6


def test_an_image_is_the_stock_pipelines_from_the_cpu_noise_of_prompt_and_seed(evaluation, prompts_file, lora):
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(SDXL, dtype=torch.float32, add_watermarker=False)
    pipeline.load_lora_weights(lora)
    prompt = evaluate.read_prompts(prompts_file)[1]
    generator = torch.Generator().manual_seed(evaluate.noise_seed(prompt, 1))
    noise = torch.randn(1, 4, 8, 8, generator=generator)
    options = {"height": 64, "width": 64, "num_inference_steps": 3, "guidance_scale": 2.5}
    stock = pipeline(prompt.prompt, latents=noise, output_type="np", **options).images[0] * 255
    row = next(
        r for r in read_rows(evaluation) if r["model"] == "run" and r["prompt_id"] == prompt.id and r["seed"] == "1"
    )
    own = np.asarray(Image.open(evaluation / row["file"])).astype(float)
    assert np.abs(own - stock).max() <= 1.5


def test_a_refined_image_is_the_stock_pipelines_with_both_loras(words, prompts_file, lora, world, tmp_path):
    """The two pipelines share text_encoder_2: loading one LoRA must not unload the other."""
    from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

    unet = ROOT / "demo/refiner/unet"
    argv = ["--pretrained_model_name_or_path", SDXL, "--stage", "refiner", "--refiner_unet", unet, "--rank", 2]
    argv += ["--train_shards", world / "data/train", "--resolution", 64, "--train_batch_size", 2, "--seed", 1]
    argv += ["--max_train_steps", 3, "--learning_rate", 0.02, "--report_to", "none", "--mixed_precision", "no"]
    assert_ok(run_trainer(argv, tmp_path / "refiner"))
    refined = [*words, "--num_inference_steps", 10, "--refiner_unet", unet, "--refiner_lora", tmp_path / "refiner"]
    run([*refined, "--lora", lora], tmp_path / "eval")
    prompt = evaluate.read_prompts(prompts_file)[1]
    images = {}
    parts = {"dtype": torch.float32, "add_watermarker": False}
    base = StableDiffusionXLPipeline.from_pretrained(SDXL, **parts)
    base.load_lora_weights(lora)
    refiner = StableDiffusionXLImg2ImgPipeline(
        base.vae, None, copy.deepcopy(base.text_encoder_2), None, base.tokenizer_2,
        UNet2DConditionModel.from_pretrained(unet, dtype=torch.float32), base.scheduler,
        requires_aesthetics_score=True, force_zeros_for_empty_prompt=False, add_watermarker=False,
    )  # fmt: skip
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(evaluate.noise_seed(prompt, 1)))
    options = {"num_inference_steps": 10, "guidance_scale": 2.5}
    size = {"height": 64, "width": 64, "denoising_end": 0.8, "output_type": "latent"}
    latents = base(prompt.prompt, latents=noise, **size, **options).images
    for name in ("stock", "with its LoRA"):
        images[name] = refiner(prompt.prompt, image=latents, denoising_start=0.8, output_type="np", **options).images[
            0
        ]
        if name == "stock":
            refiner.load_lora_weights(tmp_path / "refiner", adapter_name="refiner")
    row = next(
        r for r in read_rows(tmp_path / "eval") if (r["model"], r["prompt_id"], r["seed"]) == ("run", prompt.id, "1")
    )
    own = np.asarray(Image.open(tmp_path / "eval" / row["file"])).astype(float)
    assert np.abs(own - 255 * images["with its LoRA"]).max() <= 1.5
    assert np.abs(own - 255 * images["stock"]).max() > 5


# ---- scores


def read_rows(folder):
    with open(folder / "per_image.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_scores_are_those_of_open_clip_and_of_laions_own_head(evaluation, prompts_file):
    model, _, preprocess = open_clip.create_model_and_transforms(CLIP)
    tokenizer = open_clip.get_tokenizer(CLIP)
    model.eval()
    state = torch.load(HEAD, weights_only=True)
    sizes = [64, 1024, 128, 64, 16, 1]
    linears = [torch.nn.Linear(a, b) for a, b in zip(sizes, sizes[1:])]
    layers = [
        *linears[:1],
        torch.nn.Dropout(0.2),
        linears[1],
        torch.nn.Dropout(0.2),
        linears[2],
        torch.nn.Dropout(0.1),
    ]
    head = torch.nn.Module()
    head.layers = torch.nn.Sequential(*layers, linears[3], linears[4])
    head.load_state_dict(state)
    head.eval()
    prompts = {prompt.id: prompt for prompt in evaluate.read_prompts(prompts_file)}
    for row in read_rows(evaluation):
        with torch.no_grad():
            image = model.encode_image(preprocess(Image.open(evaluation / row["file"])).unsqueeze(0))
            image /= image.norm(dim=-1, keepdim=True)
            text = model.encode_text(tokenizer([prompts[row["prompt_id"]].clip_prompt]))
            text /= text.norm(dim=-1, keepdim=True)
            adherence, aesthetic = float(image @ text.T), float(head.layers(image))
        assert float(row["adherence"]) == pytest.approx(adherence, abs=1e-5)
        assert float(row["aesthetic"]) == pytest.approx(aesthetic, abs=1e-4)
        assert float(row["score"]) == pytest.approx(0.6 * adherence + 0.04 * aesthetic, abs=1e-5)


def test_a_linear_head_works_too(tmp_path):
    weight, bias = torch.randn(1, 8), torch.randn(1)
    safetensors.torch.save_file({"weight": weight, "bias": bias}, tmp_path / "linear.safetensors")
    embeddings = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    scores = evaluate.score_aesthetic(tmp_path / "linear.safetensors", embeddings)
    assert np.allclose(scores, embeddings @ weight[0].numpy() + bias.item(), atol=1e-5)


def test_a_head_with_code_in_it_is_not_loaded(tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'pwned'}",)

    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"weight": Evil()}))
    with pytest.raises(evaluate.InputError, match="--aesthetic_head: cannot load"):
        evaluate.score_aesthetic(tmp_path / "evil.pth", np.zeros((1, 8)))
    assert not (tmp_path / "pwned").exists()


def test_copies_are_found_and_new_images_are_not(tmp_path):
    """Copies are blurred, darkened, mirrored, noisy, or cropped from a wide image."""
    rng = np.random.default_rng(0)

    def draw(seed, width=64, height=64):
        return draw_scene(sample_scene(np.random.default_rng(seed)), np.random.default_rng(seed), width, height)

    train = [draw(seed, 96 if seed % 3 == 0 else 64) for seed in range(200)]
    flat = np.zeros((200, 4), np.float32)
    thumbnails = np.stack([evaluate.make_thumbnails(image) for image in train])
    reference = evaluate.Reference([str(n) for n in range(200)], [None] * 200, flat, thumbnails)
    known = evaluate.compare_with_training(flat, thumbnails[:, 1], reference, itself=True)["copy_similarity"]
    limit = np.quantile(known, evaluate.COPY_QUANTILE)

    def share_of_copies(images, of=None):
        middles = np.stack([evaluate.make_thumbnails(image)[1] for image in images])
        found = evaluate.compare_with_training(flat[: len(middles)], middles, reference)
        assert of is None or found["nearest"].tolist() == of
        return (found["copy_similarity"] > limit).mean()

    for change in (
        lambda image: image.filter(ImageFilter.GaussianBlur(1)),
        lambda image: ImageEnhance.Brightness(image).enhance(0.8),
        ImageOps.mirror,
        lambda image: Image.fromarray((np.asarray(image) * 0.9 + rng.normal(0, 4, (64, 64, 3)) + 8).astype(np.uint8)),
    ):
        assert share_of_copies([change(image) for image in train[1:3]], of=[1, 2]) == 1
    assert share_of_copies([train[3].crop((0, 0, 64, 64)), train[6].crop((32, 0, 96, 64))], of=[3, 6]) == 1
    assert share_of_copies([draw(seed) for seed in range(1000, 1200)]) < 0.05


def test_diversity_is_the_mean_distance_of_all_pairs():
    x = np.eye(3)[[0, 1, 0]]
    assert evaluate.diversity_of(x) == pytest.approx(2 / 3)
    assert np.isnan(evaluate.diversity_of(x[:1]))


# ---- statistics


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """Prompts have an effect of their own, with 4 seeds each: an interval over images alone would be too narrow."""
    rng, groups, covered, naive = np.random.default_rng(1), np.repeat(np.arange(25), 4), 0, 0
    for _ in range(200):
        values = np.repeat(rng.normal(size=25), 4) + 0.3 * rng.normal(size=100)
        found = evaluate.bootstrap(values, groups)
        covered += found["low"] <= 0 <= found["high"]
        half = 1.96 * values.std() / 10
        naive += abs(values.mean()) <= half
    assert covered >= 176  # 95 % nominal; a percentile bootstrap of 25 groups reaches about 92 %
    assert naive < 160


def test_means_are_weighted_by_count():
    assert evaluate.bootstrap([1, 1, 1, 5], ["a", "a", "a", "b"])["mean"] == 2


def test_differences_from_the_base_model_are_paired_by_prompt_and_seed():
    models = [evaluate.Model("base model"), evaluate.Model("lora")]
    rows = []
    for n in range(12):
        row = {"prompt_id": f"prompt {n // 2}", "seed": n % 2}
        rows.append({"model": "base model", "score": n * n / 100, **row})
        rows.insert(0, {"model": "lora", "score": n * n / 100 + 0.5, **row})
    found = evaluate.summarise(models, rows)["lora"]
    paired = found["vs_base"]["score"]
    assert [paired[name] for name in ("mean", "low", "high")] == pytest.approx([0.5, 0.5, 0.5])
    assert found["score"]["high"] - found["score"]["low"] > 0.3


# ---- outputs


def test_all_outputs_are_there_and_agree(evaluation):
    rows, summary = read_rows(evaluation), metrics(evaluation)
    assert list(summary) == ["base model", "checkpoint-2", "run"] and len(rows) == 18
    for name, entry in summary.items():
        own = [float(row["score"]) for row in rows if row["model"] == name]
        assert entry["score"]["mean"] == pytest.approx(np.mean(own)) and entry["score"]["count"] == 6
        assert {"adherence", "aesthetic", "right", "copy_similarity", "copy", "diversity"} <= entry.keys()
        assert bool(entry["vs_base"]) == (name != "base model")
    held_out = json.loads((evaluation / "metrics.json").read_text())["held_out"]
    assert 0 < held_out["copy_similarity"] < held_out["copy_limit"] <= 1
    assert f"{held_out['images']} held-out images" in (evaluation / "report.html").read_text()
    assert Image.open(evaluation / "grid.png").size[0] == 3 * 128


def test_the_report_loads_nothing_from_elsewhere(evaluation):
    page = (evaluation / "report.html").read_text()
    assert not re.search(r"(src|href)=['\"]?(?!['\"]?(data:|#))", page)
    assert "url(http" not in page and "@import" not in page and "<script" not in page
    assert str(SDXL) in page  # the command


def test_every_image_of_the_report_can_be_enlarged(evaluation):
    page = (evaluation / "report.html").read_text()
    ids = re.findall(r'<figure id="([^"]+)">', page)
    assert len(ids) == len(set(ids)) >= 18 and ids == re.findall(r'href="#([^"_]+)"', page)
    for row in read_rows(evaluation):
        assert f'alt="{row["model"]}: {row["prompt"]}, seed {row["seed"]}"' in page


def test_text_is_escaped_in_a_report(words, lora, tmp_path):
    name = "a <b>&\" 'c"
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": name, "tags": ["<i>t"], "species": "<u>s"}))
    shutil.copy(lora / "pytorch_lora_weights.safetensors", tmp_path / f"{name}.safetensors")
    argv = [*words, "--prompts", tmp_path / "prompts.jsonl", "--seeds", 0, "--lora", tmp_path / f"{name}.safetensors"]
    run(argv, tmp_path / "eval")
    page = (tmp_path / "eval/report.html").read_text()
    escaped = "a &lt;b&gt;&amp;&#34; &#39;c"
    assert f"<h3>{escaped}</h3>" in page and f"<th>{escaped}" in page and f'alt="{escaped}: {escaped}, seed 0"' in page
    assert "&lt;i&gt;t" in page and "&lt;u&gt;s" in page
    assert name not in page and "<i>t" not in page and "<u>s" not in page and "a <b>&" not in page


def test_a_page_has_a_value_for_every_name():
    page = evaluate.render_page("<p>{{ title }} {{ a }} {{ b }}</p>", "<t>", a="1 < 2", b=Markup("<b>x</b>"))
    assert "<title>&lt;t&gt;</title>" in page and "<p>&lt;t&gt; 1 &lt; 2 <b>x</b></p>" in page
    with pytest.raises(jinja2.UndefinedError):
        evaluate.render_page("{{ c }}", "t")


def make_figure():
    figure = Figure(figsize=(4, 2))
    axes = figure.subplots()
    axes.plot([1, 2], [3, 4], marker="o", label='Flabébé ♀ <b>&" #000000')
    axes.scatter([1], [3], color="black")
    axes.scatter([2], [4], color="white")
    axes.legend()
    return figure


def test_a_figure_is_svg_that_scales_and_has_the_colours_of_the_page():
    svg = evaluate.figure_svg(make_figure(), 'a <b>&"')
    root = ElementTree.fromstring(svg.replace("xlink:href", "href"))
    assert root.attrib.keys() == {"class", "role", "aria-label", "viewBox"}
    assert root.get("role") == "img" and root.get("aria-label") == 'a <b>&"'
    assert "<style" not in svg and "<?xml" not in svg and "date" not in svg
    texts = ["".join(element.itertext()) for element in root.iter("text")]
    assert 'Flabébé ♀ <b>&" #000000' in texts  # as text: every font of the reader's is there
    painted = [element.get("style") for element in root.iter() if "style" in element.attrib]
    for colour, literal in (("currentColor", "#000000"), ("Canvas", "#ffffff"), ("var(--accent)", "#1f77b4")):
        assert any(colour in style for style in painted) and not any(literal in style for style in painted)


def test_equal_figures_are_equal_text_and_their_ids_differ_by_label():
    first, second = evaluate.figure_svg(make_figure(), "a"), evaluate.figure_svg(make_figure(), "b")
    assert first == evaluate.figure_svg(make_figure(), "a")
    ids = re.findall(r' id="([^"]+)"', first + second)
    assert len(ids) == len(set(ids)) > 20
    used = re.findall(r'(?:href="|url\()#([^")]+)', first + second)
    assert used and set(used) <= set(ids)


def test_the_report_shows_the_first_of_each_group():
    rows = [{"prompt": prompt, "rank": rank} for rank, prompt in enumerate("abacab")]
    assert evaluate.first_of_each(rows, lambda row: row["prompt"], 2) == rows[:2]
    assert evaluate.first_of_each(rows, lambda row: row["prompt"], 9) == [rows[0], rows[1], rows[3]]


def test_checkpoints_are_plotted_over_steps(words, lora, tmp_path):
    run([*words, "--checkpoints", lora], tmp_path / "eval")
    assert [entry.get("step") for entry in metrics(tmp_path / "eval").values()] == [None, 2, 4]
    page = (tmp_path / "eval/report.html").read_text()
    assert page.count("<svg") == 2
    assert 'aria-label="score over steps"' in page and 'aria-label="class named right over steps"' in page


def test_prompts_of_one_species_without_an_aesthetic_head_are_scored_too(words, tmp_path):
    (tmp_path / "one.jsonl").write_text(
        '{"prompt": "Aquafin, standing", "species": "Aquafin"}\n{"prompt": "a cave"}\n'
    )
    run([*words, "--prompts", tmp_path / "one.jsonl", "--seeds", 0, "--aesthetic_head", "none"], tmp_path / "eval")
    entry = metrics(tmp_path / "eval")["base model"]
    assert {"adherence", "score"} <= entry.keys() and not {"right", "aesthetic", "diversity"} & entry.keys()
    assert entry["score"] == entry["adherence"]


def test_wandb_gets_a_table_of_the_images(words, tmp_path):
    env = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    run([*words, "--seeds", 0, "--report_to", "wandb"], tmp_path / "eval", env=env)
    tables = list((tmp_path / "eval").glob("wandb/offline-run-*/files/media/table/*.json"))
    table = json.loads(tables[0].read_text())
    assert len(table["data"]) == 3 and table["columns"][0] == "picture" and "adherence" in table["columns"]


def test_the_default_prompts_cover_all_kinds():
    prompts = evaluate.read_prompts()
    tags = {tag for prompt in prompts for tag in prompt.tags}
    assert len(prompts) >= 16 and len({prompt.id for prompt in prompts}) == len(prompts)
    assert {"day", "night", "single", "pair", "action", "regional", "shiny", "painterly", "anime"} <= tags


# ---- wrong input


@pytest.mark.parametrize(
    "lines, reason",
    [
        (['{"id": "a"}'], "line 1: `prompt` is missing or empty"),
        (['{"prompt": "x"}', "nonsense"], "line 2: not JSON"),
        (['{"prompt": "x", "species": 7}'], "line 1: `clip_prompt` and `class` must be strings"),
        (['{"prompt": "x", "id": "a"}'] * 2, "2 prompts have the id 'a'"),
        ([], "is empty"),
    ],
)
def test_a_bad_prompts_file_is_an_error_of_one_line(words, tmp_path, capsys, lines, reason):
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    argv = [*map(str, words), "--output_dir", str(tmp_path / "eval"), "--prompts", str(tmp_path / "p.jsonl")]
    with pytest.raises(SystemExit) as error:
        evaluate.parse_args(argv)
    output = capsys.readouterr().err
    assert error.value.code == 2 and "--prompts: " in output and reason in output and len(output.splitlines()) == 1


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--lora", "./nowhere"], "--lora: no LoRA file nowhere"),
        (["--checkpoints", "./nowhere"], "--checkpoints: no checkpoint-N in ./nowhere"),
        (["--refiner_lora", "x"], "--refiner_lora: "),
        (["--seeds", "1", "1"], "--seeds: found 1 1"),
        (["--val_shards", str(ROOT / "README.md")], "--val_shards: found without --train_shards"),
    ],
)
def test_wrong_flags_are_an_error_of_one_line(words, tmp_path, capsys, flags, reason):
    with pytest.raises(SystemExit) as error:
        evaluate.parse_args([*map(str, words), "--output_dir", str(tmp_path), *flags])
    output = capsys.readouterr().err
    assert error.value.code == 2 and reason in output and len(output.splitlines()) == 1


def test_a_lora_of_another_base_is_an_error_of_one_line(words, lora, tmp_path):
    tensors = safetensors.torch.load_file(lora / "pytorch_lora_weights.safetensors")
    wide = {k: torch.cat([v, v], dim=1) if k.endswith("lora_A.weight") else v for k, v in tensors.items()}
    safetensors.torch.save_file(wide, tmp_path / "wide.safetensors")
    result = run([*words, "--lora", tmp_path / "wide.safetensors"], tmp_path / "eval", ok=False)
    assert result.codes == [1] and re.search(r"InputError: --lora: .*does not fit.*\n$", result.output)


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--clip_model", "ViT-B-32/laion2b_s34b_b79k"], "--clip_model: cannot load ViT-B-32"),
        (["--clip_model", "ViT-nonsense/x"], "--clip_model: cannot load ViT-nonsense"),
        (["--aesthetic_head", "wide.pth"], "--aesthetic_head: .*wide.pth has 65×1; expected 64 inputs and 1 output"),
    ],
)
def test_a_scoring_model_that_does_not_load_or_fit_is_an_error_of_one_line(words, tmp_path, flags, reason):
    torch.save({"weight": torch.zeros(1, 65), "bias": torch.zeros(1)}, tmp_path / "wide.pth")
    flags = [str(tmp_path / flag) if flag == "wide.pth" else flag for flag in flags]
    result = run([*words, "--seeds", 0, *flags], tmp_path / "eval", ok=False)
    assert result.codes == [1] and re.search(rf"InputError: {reason}.*\n$", result.output), result.output[-500:]


# ---- in a browser


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_the_report_without_errors_or_requests(evaluation, tmp_path, width):
    image = "page.querySelector('figure img')"
    box = f"{image}.getBoundingClientRect()"
    click = f"({image}.parentNode.click(), {box}.width)"
    close = f"(page.querySelector('.close').click(), {box}.width)"
    measures = browse(evaluation / "report.html", tmp_path, width, f"{box}.width", f"{box}.right", click, close)
    page_width, image_width, right, enlarged, closed = map(float, measures)
    assert page_width <= width and right <= width
    assert 60 < image_width < 0.6 * width and enlarged == pytest.approx(0.94 * width, abs=20) and closed == image_width
