"""The simulated memory of a step: it is what a real step takes, it chooses --gradient_checkpointing, it refuses.

At SDXL's own size, the README's commands and its table are checked against the cards that they name.
"""

import json
import re
import shlex
import shutil
from functools import partial

import pytest
import torch
from compare import assert_same_run
from harness import ROOT, assert_ok, run_trainer
from transformers import CLIPTextConfig

import sdxl_memory
import sdxl_single_file
import train_sdxl_lora as trainer

CUDA_BYTES = 1e9  # that CUDA itself takes of a card's memory


# ---- beside a real step


def measure_steps(path, module):
    """Writes the most bytes that tensors took in a step, forward and backward, beside those before it."""
    original, peaks = module.train_step, []

    def train_step(run, batch):
        with sdxl_memory.PeakMemory() as memory:
            result = original(run, batch)
        peaks.append(memory.peak)
        path.write_text(json.dumps(peaks))
        return result

    module.train_step = train_step


@pytest.mark.parametrize("mode", ["none", "blocks", "full"])
@pytest.mark.parametrize("more", [[], ["--train_text_encoder", "--rank", 8]], ids=["unet", "text encoders"])
def test_the_simulation_is_what_a_step_takes(flags, tmp_path, parse, mode, more):
    argv = ["--crop", "center", "--cache_latents", "--train_batch_size", 8, "--resolution", 128, *more]
    argv += ["--gradient_checkpointing", mode, "--max_train_steps", 2]
    assert_ok(run_trainer([*flags, *argv], tmp_path / "run", setup=partial(measure_steps, tmp_path / "peaks")))
    measured = json.loads((tmp_path / "peaks").read_text())[0]
    args = parse(*argv)
    need = sdxl_memory.estimate_needs(args, trainer.load_shapes(args, torch.float32, 1), mode)
    # the demo's text encoders are large beside its UNet, and the copies of their embeddings are not simulated
    assert need.step == pytest.approx(measured, rel=0.2 if more else 0.03)


def test_what_stays_in_memory_is_counted_with_its_flags(parse):
    def needs(*words, processes=1):
        args = parse("--crop", "center", *words)
        return sdxl_memory.estimate_needs(args, trainer.load_shapes(args, torch.float32, processes), "none")

    shapes = trainer.load_shapes(parse(), torch.float32, 1)
    unet, vae = (sdxl_memory.weight_bytes(model) for model in (shapes.unet, shapes.vae))
    encoders = sum(map(sdxl_memory.weight_bytes, shapes.text_encoders))
    plain, count = needs(), sum(p.numel() for p in shapes.unet.parameters() if p.requires_grad)
    assert plain.frozen_weights == unet + vae + encoders and plain.adapters == count * 12 and plain.samples == 0
    assert needs("--cache_latents").frozen_weights == unet + encoders and needs("--cache_latents").encoding == 0
    assert needs("--cache_text_embeddings").frozen_weights == unet + vae
    assert needs("--use_8bit_adam").adapters == count * 6
    assert needs("--gradient_accumulation_steps", 2).adapters == needs(processes=2).adapters == count * 16
    assert needs("--base_precision", "int8").frozen_weights < plain.frozen_weights
    prompt = ["--validation_prompt", "x"]
    cached = needs("--cache_latents", "--cache_text_embeddings", *prompt)
    assert cached.samples >= needs(*prompt).samples + vae > vae
    refiner = parse("--stage", "refiner", "--refiner_unet", ROOT / "demo/sdxl/unet", *prompt)
    with pytest.MonkeyPatch.context() as patch:  # the demo has no refiner; its size does not matter here
        patch.setattr(trainer, "load_unet", lambda *args, **options: shapes.unet)
        patch.setattr(trainer, "add_adapters", lambda *args, **options: {"unet": shapes.unet})
        samplers = trainer.load_shapes(refiner, torch.float32, 1).samplers
    assert len(samplers) == 3 and all(p.is_meta for model in samplers for p in model.parameters())


@pytest.mark.parametrize(
    "words",
    [
        ["--use_dora", "--train_text_encoder"],
        ["--lora_target_modules", "to_q", "ff.net.0.proj", "conv1", "conv_shortcut", "--lora_dropout", 0.1],
        ["--base_precision", "nf4", "--optimizer", "prodigy", "--long_captions", "chunk"],
    ],
    ids=["DoRA", "convolutions", "quantized"],
)
@pytest.mark.parametrize("mode", ["none", "full"])
def test_every_kind_of_adapter_can_be_simulated(parse, words, mode):
    args = parse(*words)
    need = sdxl_memory.estimate_needs(args, trainer.load_shapes(args, torch.bfloat16, 1), mode)
    assert need.step > 1e5 and need.adapters > 1e4


def test_attention_scores_are_counted_where_they_are_kept(parse):
    args = parse("--resolution", 256, "--attention_backend", "math")
    shapes = trainer.load_shapes(args, torch.float32, 1)
    fused = sdxl_memory.estimate_needs(parse("--resolution", 256), shapes, "none").step
    assert sdxl_memory.estimate_needs(args, shapes, "none").step > 1.2 * fused


# ---- the choice

CACHED = ["--cache_latents", "--crop", "center", "--resolution", 128]  # the demo's VAE would need more than its UNet


def have_free(free, module):
    """Each rank of a run sees that many bytes of free device memory."""
    rank = int(module.os.environ.get("RANK", 0))
    module.sdxl_memory.free_memory = lambda device: free[rank % len(free)]


@pytest.fixture(scope="module")
def sizes(parse):
    """--gradient_checkpointing → bytes that fit it, for 8 images of 128 px."""
    args = parse(*CACHED, "--train_batch_size", 8, "--rank", 2)
    shapes = trainer.load_shapes(args, torch.float32, 1)
    needs = {mode: sdxl_memory.estimate_needs(args, shapes, mode) for mode in sdxl_memory.CHECKPOINTING}
    return {mode: 1.06 * need.peak + 0.3e9 for mode, need in needs.items()}


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("mode", ["none", "blocks", "full"])
def test_auto_takes_the_fastest_that_fits_on_every_device(flags, tmp_path, sizes, mode, processes):
    free = [int(sizes[mode]), int(80e9)][:processes][::-1]  # the last rank has the least
    argv = [*flags, *CACHED, "--train_batch_size", 8, "--max_train_steps", 1]
    run = assert_ok(run_trainer(argv, tmp_path / "run", processes, setup=partial(have_free, free)))
    (line,) = [line for line in run.outputs[0].splitlines() if line.startswith("--gradient_checkpointing")]
    assert line.startswith(f"--gradient_checkpointing {mode}: none needs 0."), line
    assert f"{free[-1] / 1e9:.2f} GB are free" in line
    assert run.outputs[0].index(line) < run.outputs[0].index("images of")  # before the data are read


def test_a_run_resumed_with_less_memory_is_the_same_run(flags, tmp_path, sizes):
    argv = [*flags, *CACHED, "--train_batch_size", 8, "--checkpointing_steps", 2, "--lora_dropout", 0.2]
    whole = assert_ok(run_trainer(argv, tmp_path / "run", setup=partial(have_free, [80e9])))
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again/checkpoint-4")
    argv += ["--resume_from_checkpoint", "latest"]
    again = assert_ok(run_trainer(argv, tmp_path / "again", setup=partial(have_free, [sizes["full"] + 5e6])))
    assert "--gradient_checkpointing none:" in whole.output and "--gradient_checkpointing full:" in again.output
    assert_same_run(whole, again, step=4)


def test_what_fits_in_no_way_is_refused_with_the_batch_that_does(flags, tmp_path, sizes):
    argv = [*flags, *CACHED, "--max_train_steps", 1]
    setup = partial(have_free, [int(sizes["full"] - 1e6)])
    refused = run_trainer([*argv, "--train_batch_size", 64], tmp_path / "run", setup=setup)
    assert refused.codes == [1] and "images of" not in refused.output
    found = r"--train_batch_size: 64 images need 0\.\d\d GB \(simulated; 0\.\d\d GB with a margin\), 0\.\d\d GB of "
    remedy = re.search(found + r".*give (--train_batch_size (\d+) --gradient_accumulation_steps (\d+))$",
        refused.output, re.MULTILINE)  # fmt: skip
    assert remedy, refused.output
    assert int(remedy[2]) * int(remedy[3]) == 64 and 4 <= int(remedy[2]) < 64
    assert_ok(run_trainer([*argv, *remedy[1].split()], tmp_path / "again", setup=setup))


@pytest.mark.parametrize(
    "words, free, message",
    [
        ([], 1e8, "not even one image fits; give a smaller --rank or --resolution, or --cache_latents, or"),
        (["--gradient_checkpointing", "none"], 1e8, "give --gradient_checkpointing auto, or not even one image fits"),
        (["--validation_prompt", "x"], 1e6, "--train_batch_size: 64 images need"),  # not even the weights fit
        ([], 1e6, "--train_batch_size: 64 images need"),
        (["--validation_prompt", "x", "--resolution", 512, "--cache_latents", "--crop", "center"], 1e8,
         "--validation_prompt: drawing sample images needs"),
    ],
)  # fmt: skip
def test_the_remedy_is_for_what_is_too_large(flags, tmp_path, words, free, message):
    argv = [*flags, "--train_batch_size", 64, *words]
    refused = run_trainer(argv, tmp_path / "run", setup=partial(have_free, [free]))
    assert refused.codes == [1] and message in refused.output, refused.output


def test_a_dry_run_shows_every_mode_and_refuses_too(flags, tmp_path, sizes):
    argv = [*flags, *CACHED, "--train_batch_size", 8, "--dry_run"]
    dry = assert_ok(run_trainer(argv, tmp_path / "dry", setup=partial(have_free, [int(sizes["blocks"])])))
    facts = json.loads((tmp_path / "dry/preview/preview.json").read_text())
    peaks = facts["memory_by_checkpointing"]
    assert list(peaks) == ["none", "blocks", "full"] and peaks["none"] > peaks["blocks"] > peaks["full"]
    assert facts["gradient_checkpointing"] == "blocks" and facts["memory_bytes"]["together"] == peaks["blocks"]
    assert re.search(r"with --gradient_checkpointing none 0\.\d\d GB, blocks 0\.\d\d GB, full", dry.output)
    assert run_trainer(argv, tmp_path / "small", setup=partial(have_free, [1e6])).codes == [1]


# ---- precision


@pytest.mark.parametrize(
    "flag, launched, has_gpu, uses_cpu, has_bf16, expected",
    [
        (None, None, False, False, False, "no"),
        (None, None, True, False, True, "bf16"),
        (None, None, True, False, False, "fp16"),  # T4, V100, RTX 20: bf16 is only emulated
        (None, "no", True, False, True, "bf16"),  # accelerate launch says "no" when it was told nothing
        (None, "fp16", True, False, True, "fp16"),
        ("no", "bf16", True, False, True, "no"),
        ("fp16", None, True, False, True, "fp16"),
        (None, None, True, True, True, "no"),
    ],
)
def test_without_a_flag_the_precision_is_the_best_that_the_gpu_has(
    parse, monkeypatch, flag, launched, has_gpu, uses_cpu, has_bf16, expected
):
    def is_bf16_supported(including_emulation=True):
        return has_bf16 or including_emulation

    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    for name, value in (("ACCELERATE_MIXED_PRECISION", launched), ("ACCELERATE_USE_CPU", uses_cpu and "true")):
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    args = parse()
    args.mixed_precision = flag
    assert trainer.choose_precision(args) == expected


# ---- at SDXL's size, on the cards that the README names


@pytest.fixture
def full_size(monkeypatch):
    """Function from words of a command to its flags and Shapes for the SDXL models."""

    def load_part(args, loader, subfolder, flag="--pretrained_model_name_or_path", **options):
        config = sdxl_single_file.SDXL_CONFIGS[subfolder or "vae"]
        if flag == "--refiner_unet":
            sizes = {"cross_attention_dim": 1280, "projection_class_embeddings_input_dim": 2560}
            return config | sdxl_single_file.REFINER_UNET | sizes
        return CLIPTextConfig(**config) if "text_encoder" in subfolder else config

    def load(words, processes=1):
        args = trainer.parse_args(words)
        precision = args.mixed_precision or "bf16"  # what such a card has
        return args, trainer.load_shapes(args, trainer.weight_dtype_of(precision), processes)

    monkeypatch.setattr(trainer, "load_part", load_part)
    monkeypatch.setattr(trainer, "check_model_paths", lambda parser, args: None)
    monkeypatch.setattr(trainer, "check_data_paths", lambda parser, args: None)
    return load


def read_commands():
    """(card in GB, words after train_sdxl_lora.py or after -- of hpo_sweep.py) of each command in the README."""
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL):
        lines = re.sub(r"\\\n", " ", block).splitlines()
        card = None
        for line in lines:
            if line.startswith("#"):
                card = int(re.search(r"(\d+) GB", line)[1])
            elif re.match(r"python (train_sdxl_lora|hpo_sweep)\.py", line) and "--config" not in line:
                words = shlex.split(line)[2:]
                words = [*words[words.index("--") + 1 :], "--output_dir", "x"] if "--" in words else words
                yield pytest.param(card, words, id=f"{line.split()[1]} {card} GB")


def read_table():
    """(card in GB, words, mode, GB) of each row of the README's table of memory."""
    section = (ROOT / "README.md").read_text().partition("## Memory and time")[2].partition("\n## ")[0]
    always = re.search(r"with `(--cache_latents[^`]*)`", section.replace("\n", " "))[1].split()
    for row in re.findall(r"^\| (\d+) GB \| `([^`]+)` \| `?(\w+)`? \| ([\d.]+) GB", section, flags=re.MULTILINE):
        yield pytest.param(int(row[0]), [*row[1].split(), *always], row[2], float(row[3]), id=f"{row[0]} GB")


@pytest.mark.slow
@pytest.mark.parametrize("card, words", read_commands())
def test_each_command_of_the_readme_fits_the_card_that_it_names(full_size, card, words):
    assert card, "the line above the command names no card"
    free = card * 1e9 - CUDA_BYTES
    args, shapes = full_size(words)
    mode, _ = sdxl_memory.choose_checkpointing(args, shapes, free)
    assert sdxl_memory.estimate_needs(args, shapes, mode).fits(free)


@pytest.mark.slow
def test_the_default_batch_fits_the_card_that_the_readme_names(full_size):
    card = re.search(r"The default batch of 16 fits on (\d+) GB", (ROOT / "README.md").read_text())
    args, shapes = full_size(["--pretrained_model_name_or_path", "x", "--train_shards", "x"])
    assert args.train_batch_size == 16
    sdxl_memory.choose_checkpointing(args, shapes, int(card[1]) * 1e9 - CUDA_BYTES)  # raises if nothing fits


@pytest.mark.slow
@pytest.mark.parametrize("card, words, mode, size", read_table())
def test_each_row_of_the_memory_table_is_what_the_simulation_says(full_size, card, words, mode, size):
    args, shapes = full_size(
        [*words, "--pretrained_model_name_or_path", "x", "--train_shards", "x", "--crop", "center"]
    )
    chosen, _ = sdxl_memory.choose_checkpointing(args, shapes, card * 1e9 - CUDA_BYTES)
    need = sdxl_memory.estimate_needs(args, shapes, chosen)
    assert chosen == mode and need.peak / 1e9 == pytest.approx(size, abs=0.06)


def test_the_readme_names_cards_from_8_to_80_gb():
    assert {8, 12, 16, 24, 80} <= {row.values[0] for row in read_table()}
    assert len(list(read_commands())) >= 4 and all(row.values[0] for row in read_commands())
