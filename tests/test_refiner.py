"""--stage refiner: the same script trains the second UNet, with what the stock img2img pipeline would give it."""

import json
import re
import shlex
from functools import partial

import numpy as np
import pytest
import safetensors.torch
import torch
from compare import assert_resume_is_exact
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from harness import ROOT, SDXL, assert_ok, run_trainer
from hooks import keep_own_pictures
from shards import sample, write_shard

import sdxl_data
import train_sdxl_lora as trainer

REFINER = ROOT / "demo" / "refiner" / "unet"
STAGE = ["--stage", "refiner", "--refiner_unet", REFINER]
CAPTIONS = ["Thornip, jumping in the snow", "Aquafin, standing on a beach"]
PROMPT = CAPTIONS[1]
FILES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors")


@pytest.fixture(scope="module")
def refiner_args(tmp_path_factory):
    """parse_args of a refiner command line with some flags added."""
    folder = tmp_path_factory.mktemp("data")

    def parse(*more):
        words = ["--pretrained_model_name_or_path", SDXL, "--train_data_dir", folder, "--output_dir", folder / "out"]
        return trainer.parse_args([str(word) for word in [*words, *STAGE, "--mixed_precision", "no", *more]])

    return parse


@pytest.fixture(scope="module")
def base_lora(flags, tmp_path_factory):
    """Folder of a base-stage LoRA with encoders, alpha other than rank, both files."""
    folder = tmp_path_factory.mktemp("base") / "run"
    argv = [*flags, "--max_train_steps", 3, "--seed", 1, "--learning_rate", 0.02, "--train_text_encoder"]
    argv += ["--text_encoder_lr_scale", 1, "--text_encoder_alpha", 5, "--lora_alpha", 3]
    assert_ok(run_trainer(argv, folder))
    return folder


@pytest.fixture(scope="module")
def refiner_lora(flags, base_lora, tmp_path_factory):
    """Folder of a refiner run with its own sample picture beside it: own.npy, samples/step-4.png."""
    folder = tmp_path_factory.mktemp("refiner") / "run"
    argv = [*flags, *STAGE, "--learning_rate", 0.02, "--lora_alpha", 5]
    argv += ["--text_encoder_2_lora", base_lora / FILES[0], "--validation_base_lora", base_lora / FILES[0]]
    argv += ["--validation_prompt", PROMPT, "--num_validation_images", 1]
    assert_ok(run_trainer(argv, folder, setup=partial(keep_own_pictures, f"{folder}.npy")))
    return folder


def load(args):
    return trainer.load_models(args, torch.float32, torch.device("cpu"))


def stock_pipelines(base_lora=None, refiner_lora=None, name=FILES[0]):
    """Base and refiner as users put them together: the refiner takes the base's text_encoder_2 and VAE."""
    base = StableDiffusionXLPipeline.from_pretrained(SDXL, dtype=torch.float32, add_watermarker=False)
    refiner = StableDiffusionXLImg2ImgPipeline(
        vae=base.vae,
        text_encoder=None,
        text_encoder_2=base.text_encoder_2,
        tokenizer=None,
        tokenizer_2=base.tokenizer_2,
        unet=UNet2DConditionModel.from_pretrained(REFINER, dtype=torch.float32),
        scheduler=base.scheduler,
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    if base_lora is not None:
        base.load_lora_weights(base_lora, weight_name=name, adapter_name="base")
    if refiner_lora is not None:
        refiner.load_lora_weights(refiner_lora, weight_name=name, adapter_name="refiner")
    for pipeline in (base, refiner):
        pipeline.set_progress_bar_config(disable=True)
    return base, refiner


def draw(base, refiner, seed, switch_at=0.8):
    options = {"num_inference_steps": 25, "generator": torch.Generator().manual_seed(seed)}
    latents = base(PROMPT, height=64, width=64, denoising_end=switch_at, output_type="latent", **options).images
    return refiner(PROMPT, image=latents, denoising_start=switch_at, output_type="np", **options).images[0]


# ---- what reaches the UNet


def watch(unet):
    """A dict that fills with the tensors that reach `unet`, as soon as it is called."""
    seen = {}

    def hook(module, inputs, kwargs):
        embeds = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else inputs[2]
        seen.update(kwargs["added_cond_kwargs"], prompt_embeds=embeds)

    unet.register_forward_pre_hook(hook, with_kwargs=True)
    return seen


def test_what_the_loss_gives_to_the_refiner_is_what_the_stock_img2img_pipeline_gives_it(refiner_args):
    models, (_, stock) = load(refiner_args()), stock_pipelines()
    ours, theirs = watch(models.unet), watch(stock.unet)
    sizes = {"original_size": (301, 200), "crops_coords_top_left": (5, 19)}
    options = {"num_inference_steps": 10, "denoising_start": 0.8, "output_type": "latent", "guidance_scale": 1.0}
    stock(CAPTIONS, image=torch.randn(2, 4, 8, 8), aesthetic_score=7.3, **sizes, **options)
    batch = {
        "pixel_values": torch.rand(2, 3, 64, 64),
        "captions": CAPTIONS,
        "sample_seeds": [1, 2],
        "original_sizes": torch.tensor([[301.0, 200.0]] * 2),
        "crop_top_lefts": torch.tensor([[5.0, 19.0]] * 2),
        "target_sizes": torch.tensor([[64.0, 64.0]] * 2),
        "aesthetic_scores": torch.tensor([7.3, 7.3]),
    }
    with torch.no_grad():
        trainer.diffusion_loss(models, batch, trainer.sample_batch_noise(models, batch, 0.0), torch.float32)
    assert set(ours) == {"prompt_embeds", "text_embeds", "time_ids"} and ours["time_ids"].shape == (2, 5)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_a_dropped_caption_is_the_refiner_pipelines_empty_one_and_keeps_its_score(refiner_args):
    models, (_, stock) = load(refiner_args()), stock_pipelines()
    ours, theirs = watch(models.unet), watch(stock.unet)
    options = {"num_inference_steps": 10, "denoising_start": 0.8, "output_type": "latent", "guidance_scale": 5.0}
    stock(PROMPT, image=torch.randn(1, 4, 8, 8), **options)  # a batch of the empty prompt and PROMPT
    size = torch.tensor([[64.0, 64.0]])
    batch = {"pixel_values": torch.rand(1, 3, 64, 64), "captions": [PROMPT], "sample_seeds": [1]}
    batch |= {"original_sizes": size, "crop_top_lefts": 0 * size, "target_sizes": size}
    batch["aesthetic_scores"] = torch.tensor([8.5])
    draws = trainer.sample_batch_noise(models, batch, 0.0)
    law = {"caption_dropout_rate": 1.0, "dropped_caption": refiner_args().dropped_caption}
    with torch.no_grad():
        trainer.diffusion_loss(models, batch, draws, torch.float32, **law)
    for name in ("prompt_embeds", "text_embeds"):  # encoded there alone, here beside a caption: rounding differs
        assert torch.allclose(ours[name], theirs[name][:1], atol=1e-5)
        assert not torch.allclose(theirs[name][1:], theirs[name][:1], atol=1e-2)
    assert ours["time_ids"].tolist() == [[64, 64, 0, 0, 8.5]]


def note_timesteps(path, module):
    original = module.diffusion_loss

    def diffusion_loss(models, batch, draws, *args, **kwargs):
        with open(path, "a") as file:
            file.write("".join(f"{t}\n" for t in draws["timesteps"].tolist()))
        return original(models, batch, draws, *args, **kwargs)

    module.diffusion_loss = diffusion_loss


@pytest.mark.parametrize("band", [(0, 200), (3, 9)])
def test_timesteps_never_leave_the_band_and_reach_both_ends(band):
    draws = trainer.sample_noise(range(4000), (4, 1, 1), band)["timesteps"]
    assert (draws.min(), draws.max()) == band


def test_training_and_validation_stay_in_the_band(flags, world, tmp_path):
    argv = [*flags, *STAGE, "--refiner_timestep_band", 17, 20, "--val_shards", world / "data/val"]
    assert_ok(run_trainer(argv, tmp_path / "run", setup=partial(note_timesteps, tmp_path / "t.txt")))
    assert set((tmp_path / "t.txt").read_text().split()) == {"17", "18", "19", "20"}


@pytest.mark.parametrize(
    "field, scale, score",
    [(55, 10, 5.5), (0, 10, 1.0), (900, 10, 10.0), (None, 10, 6.0), (7.25, 1, 7.25), (0.5, 0.1, 5.0)],
)
def test_the_score_is_the_field_divided_and_clipped(field, scale, score):
    assert sdxl_data.scale_aesthetic(field, scale) == pytest.approx(score)


def test_another_field_of_the_metadata_is_the_score(tmp_path):
    shard = write_shard(tmp_path / "a.tar", [sample("a", json=json.dumps({"likes": 31, "ae_aesthetic": 50}).encode())])
    rows, _ = sdxl_data.index_shard(sdxl_data.Shard(str(shard), None), sdxl_data.Fields(score="likes"))
    assert rows[0]["score"] == 31


# ---- what trains


def test_only_the_refiner_unet_changes(refiner_args):
    args = refiner_args("--rank", 2)
    models = load(args)
    trained = trainer.add_adapters(args, models, seed=0)
    assert set(trained) == {"unet"} and len(models.text_encoders) == len(models.tokenizers) == 1
    frozen = {"vae": models.vae, "text_encoder_2": models.text_encoders[0], "unet": models.unet}
    kept = {(part, n): p.clone() for part, m in frozen.items() for n, p in m.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in models.unet.parameters() if p.requires_grad], lr=0.01)
    size = torch.tensor([[64.0, 64.0]] * 2)
    batch = {"pixel_values": torch.rand(2, 3, 64, 64), "captions": CAPTIONS, "sample_seeds": [1, 2]}
    batch |= {"original_sizes": size, "crop_top_lefts": 0 * size, "target_sizes": size}
    batch["aesthetic_scores"] = torch.tensor([5.0, 6.0])
    draws, losses = trainer.sample_batch_noise(models, batch, 0.0), []
    for _ in range(3):
        loss = trainer.diffusion_loss(models, batch, draws, torch.float32).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, dict(frozen[part].named_parameters())[n]) for (part, n), p in kept.items())


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_and_resumed_refiner_run_is_the_uninterrupted_run(flags, world, base_lora, tmp_path, processes):
    argv = [*flags, *STAGE, "--lora_dropout", 0.3, "--gradient_accumulation_steps", 2, "--max_train_steps", 6]
    argv += ["--checkpointing_steps", 2, "--text_encoder_2_lora", base_lora / FILES[0]]
    argv += ["--val_shards", world / "data/val", "--validation_steps", 4]
    assert_resume_is_exact(argv, tmp_path, processes)


def test_another_text_encoder_2_lora_is_another_run(flags, base_lora, tmp_path):
    argv = [*flags, *STAGE, "--max_train_steps", 1]
    assert_ok(run_trainer([*argv, "--text_encoder_2_lora", base_lora / FILES[0]], tmp_path / "run"))
    result = run_trainer([*argv, "--resume_from_checkpoint", "latest"], tmp_path / "run")
    assert result.codes == [1] and "base model" in result.output


# ---- text_encoder_2 of the base stage


@pytest.mark.parametrize("name", FILES)
def test_the_merged_encoder_says_what_the_base_pipeline_with_its_lora_says(refiner_args, base_lora, name):
    models = load(refiner_args("--text_encoder_2_lora", base_lora / name))
    plain = load(refiner_args())
    base, _ = stock_pipelines(base_lora)
    with torch.no_grad():
        embeds, pooled = trainer.encode_prompts(models, CAPTIONS, "cpu")
        unmerged, _ = trainer.encode_prompts(plain, CAPTIONS, "cpu")
        stock, _, stock_pooled, _ = base.encode_prompt(CAPTIONS, do_classifier_free_guidance=False)
    stock = stock[..., -embeds.shape[-1] :]
    assert (embeds - stock).abs().max() < 1e-4 and (pooled - stock_pooled).abs().max() < 1e-4
    assert (unmerged - stock).abs().max() > 1e-2
    names = [n for n, _ in models.text_encoders[0].named_parameters()]
    assert names == [n for n, _ in plain.text_encoders[0].named_parameters()]  # no adapter is left on it


def test_a_run_in_bf16_resumes_from_checkpoints_of_older_versions(refiner_args, base_lora):
    """They hash the models as they are trained, in bf16, with the merged text encoder."""
    args = refiner_args("--text_encoder_2_lora", base_lora / FILES[0])
    models = trainer.load_models(args, torch.bfloat16, torch.device("cpu"))
    assert models.fingerprint == trainer.fingerprint_parts(models.unet, models.vae, *models.text_encoders)


def test_a_dora_is_merged_from_both_formats(flags, refiner_args, tmp_path):
    argv = [*flags, "--learning_rate", 0.02, "--text_encoder_lr_scale", 1, "--train_text_encoder", "--use_dora"]
    assert_ok(run_trainer(argv, tmp_path / "run"))
    base, _ = stock_pipelines(tmp_path / "run")
    with torch.no_grad():
        stock, *_ = base.encode_prompt(CAPTIONS, do_classifier_free_guidance=False)
    for name in FILES:
        models = load(refiner_args("--text_encoder_2_lora", tmp_path / "run" / name))
        with torch.no_grad():
            embeds, _ = trainer.encode_prompts(models, CAPTIONS, "cpu")
        assert (embeds - stock[..., -embeds.shape[-1] :]).abs().max() < 1e-3


def test_a_file_without_text_encoder_2_is_refused(flags, base_lora, tmp_path):
    tensors = safetensors.torch.load_file(base_lora / FILES[0])
    safetensors.torch.save_file(
        {k: v for k, v in tensors.items() if k.startswith("unet")}, tmp_path / "unet.safetensors"
    )
    (tmp_path / "torn.safetensors").write_bytes((base_lora / FILES[0]).read_bytes()[:1000])
    for file, reason in (("unet", "has no text_encoder_2 part"), ("torn", "torn.safetensors is damaged")):
        argv = [*flags, *STAGE, "--text_encoder_2_lora", tmp_path / f"{file}.safetensors"]
        result = run_trainer(argv, tmp_path / "run")
        assert result.codes == [2]
        assert re.search(rf"--text_encoder_2_lora: .*{reason}", result.output), result.output[-500:]


# ---- what comes out


@pytest.mark.parametrize("name", FILES)
def test_stock_diffusers_draws_the_same_two_stage_picture_from_both_files(refiner_lora, base_lora, name):
    own = np.load(f"{refiner_lora}.npy")
    assert np.abs(draw(*stock_pipelines(base_lora, refiner_lora, name), seed=7) - own).max() < 1e-3
    assert np.abs(draw(*stock_pipelines(base_lora), seed=7) - own).max() > 1e-2  # the refiner's LoRA does something
    assert (
        np.abs(draw(*stock_pipelines(None, refiner_lora, name), seed=7) - own).max() > 1e-2
    )  # and so does the base's


def test_both_files_hold_the_unet_alone_and_say_which(refiner_lora):
    assert {k.split(".")[0] for k in safetensors.torch.load_file(refiner_lora / FILES[0])} == {"unet"}
    assert all(k.startswith("lora_unet_") for k in safetensors.torch.load_file(refiner_lora / FILES[1]))
    with safetensors.safe_open(refiner_lora / FILES[1], "pt") as file:
        assert file.metadata()["modelspec.architecture"] == "stable-diffusion-xl-v1-refiner/lora"
    assert "StableDiffusionXLImg2ImgPipeline" in (refiner_lora / "README.md").read_text()


def test_a_dry_run_shows_the_scores(flags, tmp_path):
    result = assert_ok(run_trainer([*flags, *STAGE, "--dry_run"], tmp_path / "run"))
    scores = json.loads((tmp_path / "run/preview/preview.json").read_text())["aesthetic_scores"]
    facts = json.loads((tmp_path / "run/preview/preview.json").read_text())
    assert sum(scores.values()) == facts["images"] and scores["none"] > 0 and scores["5 to 6"] > 0
    assert f"none: {scores['none']} (trained with 6)" in result.output


# ---- wrong flags


@pytest.mark.parametrize(
    "words, reason",
    [
        (["--stage", "refiner"], "--refiner_unet: missing"),
        (["--refiner_unet", REFINER], "--refiner_unet: found with --stage base"),
        (["--text_encoder_2_lora", "x"], "--text_encoder_2_lora: found with --stage base"),
        (["--stage", "refiner", "--refiner_unet", "./nowhere"], "--refiner_unet: no UNet in nowhere"),
        ([*STAGE, "--snr_gamma", 5], "--snr_gamma: found 5.0; the refiner takes 0"),
        ([*STAGE, "--train_text_encoder"], "--train_text_encoder: train it with --stage base"),
        ([*STAGE, "--refiner_timestep_band", 9, 3], "--refiner_timestep_band: found 9 3"),
        ([*STAGE, "--text_encoder_2_lora", "nowhere.st"], "--text_encoder_2_lora: no LoRA file nowhere.st"),
        ([*STAGE, "--validation_base_lora", "nowhere.st"], "--validation_base_lora: no LoRA file nowhere.st"),
        ([*STAGE, "--aesthetic_scale", 0], "--aesthetic_scale: found 0.0"),
        ([*STAGE, "--denoising_start", 1.5], "--denoising_start: found 1.5"),
    ],
)
def test_wrong_flags_are_one_line(flags, tmp_path, words, reason):
    result = run_trainer([*flags, *words], tmp_path / "run")
    assert result.codes == [2] and reason in result.output
    assert len(result.output.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "words, reason",
    [
        (["--stage", "refiner", "--refiner_unet", SDXL], "--refiner_unet: cross_attention_dim"),
        ([*STAGE, "--refiner_timestep_band", 0, 1000], "--refiner_timestep_band: found 0 1000"),
    ],
)
def test_a_unet_or_band_that_does_not_fit_is_one_line(flags, tmp_path, words, reason):
    result = run_trainer([*flags, *words], tmp_path / "run")
    assert result.codes == [1] and result.output.rstrip().splitlines()[-1].startswith(
        f"sdxl_data.InputError: {reason}"
    )


def test_a_snapshot_with_unet_is_as_good_as_its_folder(refiner_args):
    words = ["--stage", "refiner", "--refiner_unet", REFINER.parent]
    models = load(trainer.parse_args([str(w) for w in _words(refiner_args()) + words]))
    assert models.stage == "refiner" and models.timestep_band == (0, 200)


def _words(args):
    return ["--pretrained_model_name_or_path", SDXL, "--train_data_dir", *args.train_data_dir, "--output_dir", "x"]


def test_defaults_are_those_of_the_stage(refiner_args):
    args = refiner_args()
    assert (args.crop, args.dropped_caption, args.snr_gamma) == ("center", "empty", 0.0)
    assert refiner_args("--crop", "random_ar").crop == "random_ar"


# ---- the README's recipe


def test_the_recipe_of_the_readme_runs_as_it_stands(world, tmp_path):
    text = (ROOT / "README.md").read_text().split("## Refiner")[1].split("\n## ")[0]
    code = {kind: re.search(rf"```{kind}\n(.*?)```", text, re.DOTALL)[1] for kind in ("bash", "python")}
    stock_pipelines()[1].save_pretrained(tmp_path / "full-refiner")  # a whole snapshot, as the hub's is
    places = {"stabilityai/stable-diffusion-xl-base-1.0": SDXL, "data/train": world / "data/train"}
    places |= {"stabilityai/stable-diffusion-xl-refiner-1.0": tmp_path / "full-refiner", "runs/": f"{tmp_path}/runs/"}
    for kind in code:
        for place, here in places.items():
            code[kind] = code[kind].replace(place, str(here))
    lines = code["bash"].replace("\\\n", " ").strip().splitlines()
    commands = [shlex.split(line) for line in lines if not line.startswith("#")]
    assert len(commands) == 2 and all(command[:2] == ["python", "train_sdxl_lora.py"] for command in commands)
    small = "--resolution 64 --train_batch_size 2 --max_train_steps 2 --mixed_precision no --report_to none".split()
    for command in commands:
        at = command.index("--output_dir")
        argv = [*command[2:at], *command[at + 2 :], *small, "--num_validation_images", 1]
        assert_ok(run_trainer(argv, command[at + 1]))
    names = {"StableDiffusionXLPipeline": StableDiffusionXLPipeline, "torch": torch}
    names["StableDiffusionXLImg2ImgPipeline"] = StableDiffusionXLImg2ImgPipeline
    exec(code["python"].replace("float16", "float32").replace('.to("cuda")', ""), names)
    assert names["image"].size == (64, 64)
    assert names["refiner"].get_list_adapters()["unet"] == ["refiner"]
