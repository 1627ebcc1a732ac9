"""--init_lora and --merge_lora: a run starts from the LoRA it was given, and is exact, named and resumed with it."""

import json
import re
import shutil
from functools import partial

import foreign_loras as foreign
import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from compare import assert_resume_is_exact
from diffusers import StableDiffusionXLPipeline
from foreign_loras import change_of, make_lora, select, weights
from harness import ROOT, SDXL, assert_ok, run_trainer
from hooks import keep_own_pictures

import evaluate
import hpo_sweep
import sdxl_lora
from sdxl_data import LORA_FILE
from sdxl_lora import KOHYA_FILE

FILES = [LORA_FILE, KOHYA_FILE]
STRONG = ["--learning_rate", 0.02, "--text_encoder_lr_scale", 1]


@pytest.fixture(scope="module")
def layers():
    return weights(foreign.load_demo())


@pytest.fixture(scope="module")
def plain_flags(flags):
    """`flags` without a rank, which comes from the LoRA."""
    return [word for n, word in enumerate(flags) if "--rank" not in flags[max(n - 1, 0) : n + 1]]


@pytest.fixture(scope="module")
def style(layers, tmp_path_factory):
    """A LoRA to merge: of kohya's scripts, with adapters nearly everywhere."""
    chosen = select(layers, unet="attn|ff", text_encoder="self_attn|mlp", text_encoder_2="self_attn")
    return foreign.write_kohya(tmp_path_factory.mktemp("style") / "style.safetensors", make_lora(chosen, seed=5))


def read(file):
    with safetensors.safe_open(file, "pt") as tensors:
        return {key: tensors.get_tensor(key) for key in list(tensors.keys())}, tensors.metadata()


def assert_equal_tensors(found, expected):
    assert found.keys() == expected.keys()
    different = [key for key in found if not torch.equal(found[key], expected[key].float())]
    assert not different


def keep_learning_rate_zero(argv, output_dir, **options):
    argv = [*argv, "--learning_rate", 0, "--max_train_steps", 1]
    return assert_ok(run_trainer(argv, output_dir, **options)).output_dir


# The weights that a run starts from


@pytest.mark.parametrize(
    "kind",
    [
        ["--lora_alpha", 3],
        ["--use_rslora", "--lora_alpha", 3],
        ["--use_dora"],
        ["--train_text_encoder", "--text_encoder_rank", 3, "--text_encoder_alpha", 5],
        ["--use_dora", "--use_rslora", "--train_text_encoder", "--lora_target_modules", "to_q", "conv1", "proj_in"],
    ],
    ids=["plain", "rslora", "dora", "encoders", "all"],
)
def test_a_learning_rate_of_0_writes_the_lora_it_was_given(flags, plain_flags, tmp_path, kind):
    given = assert_ok(run_trainer([*flags, *STRONG, *kind], tmp_path / "given")).output_dir
    for name in FILES:
        folder = keep_learning_rate_zero([*plain_flags, "--init_lora", given / name], tmp_path / name)
        for file in FILES:
            assert_equal_tensors(read(folder / file)[0], read(given / file)[0])
        for key, tensor in read(given / KOHYA_FILE)[0].items():
            if key.endswith("dora_scale"):
                down = read(given / KOHYA_FILE)[0][key.replace("dora_scale", "lora_down.weight")]
                assert tensor.ndim == down.ndim and len(tensor) == tensor.numel()
        if name == LORA_FILE and "--train_text_encoder" not in kind:
            assert (folder / name).read_bytes() == (given / name).read_bytes()  # the header too
    again = keep_learning_rate_zero([*flags, *kind, "--init_lora", given], tmp_path / "same flags")
    for file in FILES:
        assert (again / file).read_bytes() == (given / file).read_bytes()


@pytest.mark.parametrize("original_names", [False, True])
def test_a_file_of_kohyas_scripts_with_other_ranks_by_layer_is_kept_to_the_bit(
    layers, plain_flags, tmp_path, original_names
):
    everywhere = {"unet": "attn|ff|proj|conv", "text_encoder": "self_attn|mlp", "text_encoder_2": "self_attn|mlp"}
    lora = make_lora(select(layers, **everywhere), ranks=(2, 2, 3, 1), alphas=(1.0, 1.0, 0.25))
    file = foreign.write_kohya(tmp_path / "a.safetensors", lora, original_names)
    folder = keep_learning_rate_zero([*plain_flags, "--init_lora", file], tmp_path / "run")
    expected = foreign.write_kohya(tmp_path / "b.safetensors", lora, dtype=torch.float32)
    assert_equal_tensors(read(folder / KOHYA_FILE)[0], read(expected)[0])
    assert read(folder / KOHYA_FILE)[1]["ss_network_dim"] == "Dynamic"
    again = keep_learning_rate_zero([*plain_flags, "--init_lora", folder / LORA_FILE], tmp_path / "again")
    for name in FILES:
        assert_equal_tensors(read(again / name)[0], read(folder / name)[0])
    assert json.loads(read(folder / LORA_FILE)[1]["lora_adapter_metadata"])["unet.rank_pattern"]


def test_diffusers_draws_the_same_with_other_ranks_by_layer(layers, plain_flags, tmp_path):
    lora = make_lora(
        select(layers, unet="attn", text_encoder="self_attn"), ranks=(2, 2, 3), alphas=(1.0, 1.0, 1.0, 3.0)
    )
    file = foreign.write_kohya(tmp_path / "a.safetensors", lora)
    folder = keep_learning_rate_zero([*plain_flags, "--init_lora", file], tmp_path / "run")
    images = []
    for path in (None, folder / LORA_FILE):
        pipeline = StableDiffusionXLPipeline.from_pretrained(SDXL, dtype=torch.float32, add_watermarker=False)
        if path is None:  # by the formula
            models = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
            for key, weight in select(weights(models), unet="", text_encoder="").items():
                weight.data += change_of(lora[key], weight) if key in lora else 0
        else:
            pipeline.load_lora_weights(str(path))
        generator = torch.Generator().manual_seed(1)
        options = {"num_inference_steps": 3, "height": 64, "width": 64, "output_type": "np", "generator": generator}
        images.append(pipeline("a fox", **options).images)
    assert np.abs(images[0] - images[1]).max() < 1e-3


def test_a_run_goes_on_where_the_other_ended(flags, plain_flags, world, tmp_path):
    """The validation loss before the first real change is the other run's last one."""
    validation = ["--val_shards", world / "data/val"]
    given = assert_ok(run_trainer([*flags, *STRONG, "--train_text_encoder", *validation], tmp_path / "given"))
    argv = [*plain_flags, "--init_lora", given.output_dir, *validation, "--learning_rate", 0, "--max_train_steps", 1]
    again = assert_ok(run_trainer(argv, tmp_path / "run"))
    losses = [[row["val_loss"] for row in run.metrics() if "val_loss" in row] for run in (given, again)]
    assert losses[0][-1] == losses[1][0]


def test_a_fresh_optimizer_and_step_and_new_adapters_beside_the_given_ones(flags, plain_flags, trained, tmp_path):
    argv = [*plain_flags, "--init_lora", trained.output_dir / "checkpoint-2", "--train_text_encoder"]
    result = assert_ok(run_trainer([*argv, "--checkpointing_steps", 1], tmp_path / "run"))
    assert [row["step"] for row in result.metrics() if "loss" in row] == [1, 2, 3, 4]
    optimizer = torch.load(result.output_dir / "checkpoint-1/optimizer.bin", weights_only=True)
    assert {float(state["step"]) for state in optimizer["state"].values()} == {1.0}
    assert "has nothing for the text_encoder_2, which gets new adapters" in result.output
    parts = {key.split(".")[0] for key in read(result.output_dir / LORA_FILE)[0]}
    assert parts == {"unet", "text_encoder", "text_encoder_2"}


def test_the_files_settings_are_written_down(flags, plain_flags, tmp_path):
    kind = ["--rank", 3, "--lora_alpha", 5, "--use_dora", "--train_text_encoder", "--text_encoder_rank", 1]
    given = assert_ok(run_trainer([*flags, *kind, "--max_train_steps", 1], tmp_path / "given")).output_dir
    folder = keep_learning_rate_zero([*plain_flags, "--init_lora", given], tmp_path / "run")
    written = yaml.safe_load((folder / "config.yaml").read_text())
    expected = {"rank": 3, "lora_alpha": 5.0, "use_dora": True, "train_text_encoder": True, "text_encoder_rank": 1}
    assert {name: written[name] for name in expected} == expected
    facts = json.loads((folder / "run.json").read_text())
    assert facts["init_lora"] == {"file": str(given), "sha256": sdxl_lora.hash_file(given / LORA_FILE)}
    assert "merge_lora" not in facts
    again = keep_learning_rate_zero(["--config", folder / "config.yaml"], tmp_path / "again")  # it is a full command
    assert (again / KOHYA_FILE).read_bytes() == (folder / KOHYA_FILE).read_bytes()


@pytest.mark.parametrize(
    "more, found",
    [
        (["--rank", 8], r"--rank: found 8; --init_lora .* has 2; leave the flag out"),
        (["--rank", 0], r"--rank: found 0; --init_lora .* has 2"),
        (["--lora_alpha", 1], r"--lora_alpha: found 1.0; --init_lora .* has 2.0"),
        (["--use_dora"], r"--use_dora: found True; --init_lora .* has False"),
        (["--text_encoder_rank", 9, "--train_text_encoder", "--max_train_steps", 0], r"--max_train_steps"),
        (
            ["--init_lora", "nowhere.safetensors"],
            r"--init_lora: no LoRA file nowhere.safetensors; give a .safetensors",
        ),
        (["--base_precision", "nf4", "--init_lora", "DORA"], r"--base_precision: nf4 does not work with --use_dora"),
        (
            ["--init_lora", "STYLE", "--no-train_text_encoder"],
            r"--train_text_encoder: found False; --init_lora .* True",
        ),
        (["--init_lora", "STYLE", "--cache_text_embeddings"], r"contradicts --init_lora, which trains text encoders"),
        (["--init_lora", "STYLE", "--stage", "refiner"], r"--init_lora: .* has adapters of text encoders; a refiner"),
    ],
)
def test_flags_that_contradict_the_file_are_refused(plain_flags, layers, trained, style, tmp_path, more, found):
    dora = foreign.write_kohya(tmp_path / "dora.safetensors", make_lora(select(layers, unet="attn"), dora=True))
    named = {"STYLE": style, "DORA": dora}
    argv = [*plain_flags, "--init_lora", trained.output_dir, *(named.get(word, word) for word in more)]
    result = run_trainer(argv, tmp_path / "run")
    assert result.codes == [2] and re.search(found, result.output), result.output[-600:]
    assert not (tmp_path / "run").exists()


def test_a_lora_in_the_output_folder_is_refused(plain_flags, own_run):
    for flag, value in (("--init_lora", own_run / "checkpoint-4"), ("--merge_lora", f"{own_run}:0.5")):
        result = run_trainer([*plain_flags, flag, value, "--overwrite_output_dir"], own_run)
        assert result.codes == [2] and f"error: {flag}: {own_run}" in result.output
    assert "is in --output_dir; continue with --resume_from_checkpoint, or give another" in result.output
    assert (own_run / "checkpoint-4").is_dir()


def test_layers_that_differ_from_the_files_are_refused(plain_flags, trained, tmp_path):
    argv = [*plain_flags, "--init_lora", trained.output_dir, "--lora_target_modules", "to_q", "to_k"]
    result = run_trainer(argv, tmp_path / "run")
    assert result.codes == [1]
    assert re.search(r"--lora_target_modules: to_q to_k are not the layers of .*; leave out the flag", result.output)
    argv[-2:] = ["to_q", "to_k", "to_v", "to_out.0"]
    keep_learning_rate_zero(argv, tmp_path / "same")


def test_a_lora_of_another_model_is_refused(plain_flags, layers, tmp_path):
    wide = {key: weight[:, :7] for key, weight in select(layers, unet="attn").items()}
    file = foreign.write_kohya(tmp_path / "a.safetensors", make_lora(wide))
    for more in ([], ["--dry_run"]):
        result = run_trainer([*plain_flags, "--init_lora", file, *more], tmp_path / "run")
        assert result.codes == [1] and re.search(
            r"--init_lora: .*a.safetensors does not fit .* is 2 × 7", result.output
        )


def test_rslora_can_be_asked_of_a_file_that_does_not_say(layers, plain_flags, tmp_path):
    lora = make_lora(select(layers, unet="attn"), ranks=(4,), alphas=(3.0,))
    file = foreign.write_kohya(tmp_path / "a.safetensors", lora)
    folder = keep_learning_rate_zero([*plain_flags, "--init_lora", file, "--use_rslora"], tmp_path / "run")
    assert yaml.safe_load((folder / "config.yaml").read_text())["lora_alpha"] == 1.5  # 3 / sqrt(4)
    assert_equal_tensors(read(folder / KOHYA_FILE)[0], read(file)[0])


# Merged LoRAs


def test_a_merged_lora_changes_what_is_trained_and_stays_out_of_the_files(flags, trained, style, tmp_path):
    result = assert_ok(run_trainer([*flags, "--merge_lora", f"{style}:0.5"], tmp_path / "run"))
    assert [row["loss"] for row in result.metrics()] != [row["loss"] for row in trained.metrics()]
    adapters = read(result.output_dir / LORA_FILE)[0]
    assert adapters.keys() == read(trained.output_dir / LORA_FILE)[0].keys()
    facts = json.loads((result.output_dir / "run.json").read_text())
    assert facts["merge_lora"] == [{"file": f"{style}:0.5", "sha256": sdxl_lora.hash_file(style), "scale": 0.5}]


def test_sample_pictures_evaluation_and_the_cards_code_draw_with_the_merged_lora(flags, style, tmp_path):
    """The same picture by the trainer, by evaluate.py and by the model card's lines."""
    argv = [
        *flags,
        *STRONG,
        "--merge_lora",
        f"{style}:0.5",
        "--validation_prompt",
        "a fox",
        "--num_validation_images",
        1,
    ]
    folder = tmp_path / "run"
    assert_ok(run_trainer(argv, folder, setup=partial(keep_own_pictures, f"{folder}.npy")))
    own = np.load(f"{folder}.npy")
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.S)[1]
    scope = {}
    exec(
        code.replace('"PATH"', repr(str(folder))).replace("float16", "float32").replace('pipeline.to("cuda")', ""),
        scope,
    )
    options = {"num_inference_steps": 25, "height": 64, "width": 64, "output_type": "np"}
    image = scope["pipeline"]("a fox", generator=torch.Generator().manual_seed(7), **options).images[0]
    assert np.abs(image - own).max() < 2e-3

    words = ["--pretrained_model_name_or_path", SDXL, "--output_dir", tmp_path / "eval", "--lora", folder]
    args = [evaluate.parse_args(list(map(str, [*words, *more]))) for more in ((), ("--merge_lora", f"{style}:0.5"))]
    found = []
    for flags_of_one in args:
        base = evaluate.ImageGenerator(flags_of_one, torch.device("cpu")).base
        base.load_lora_weights(str(folder))
        found.append(base("a fox", generator=torch.Generator().manual_seed(7), **options).images[0])
    assert np.abs(found[1] - own).max() < 2e-3 and np.abs(found[0] - own).max() > 1e-2
    jobs = [
        evaluate.list_jobs(one, evaluate.list_models(one), [evaluate.Prompt("a", "a fox", "a fox", None, ())])
        for one in args
    ]
    assert not {job.path for job in jobs[0]} & {job.path for job in jobs[1]}  # no picture is taken for the other's


def test_captions_in_a_cache_are_those_of_this_merge_alone(flags, layers, tmp_path):
    """Even of one that leaves the first row of every weight, which the hash of a model reads, as it is."""
    lora = make_lora(select(layers, text_encoder="self_attn", text_encoder_2="self_attn"))
    for values in lora.values():
        values["up"][0] = 0
    file = foreign.write_kohya(tmp_path / "a.safetensors", lora)
    cached = [*flags, "--crop", "center", "--cache_text_embeddings", "--cache_dir", tmp_path / "cache"]
    assert_ok(run_trainer(cached, tmp_path / "without"))
    found = assert_ok(run_trainer([*cached, "--merge_lora", file], tmp_path / "cached"))
    expected = assert_ok(run_trainer([*flags, "--crop", "center", "--merge_lora", file], tmp_path / "plain"))
    tensors = [read(run.output_dir / LORA_FILE)[0] for run in (expected, found)]
    assert all(torch.allclose(tensors[0][key], tensors[1][key], atol=1e-5) for key in tensors[0])


def test_the_card_warns_of_files_that_diffusers_reads_in_part(layers, tmp_path):
    plain = foreign.write_kohya(tmp_path / "a.safetensors", make_lora(select(layers, unet="attn")))
    mixed = foreign.write_kohya(tmp_path / "b.safetensors", make_lora(select(layers, unet="attn"), alphas=(1.0, 2.0)))
    dora = foreign.write_kohya(tmp_path / "c.safetensors", make_lora(select(layers, unet="attn"), dora=True))
    warned = ["only in part" in sdxl_lora.merge_code([str(file)]) for file in (plain, mixed, dora)]
    assert warned == [False, True, True]
    assert "# no LoRA file" in sdxl_lora.merge_code([str(tmp_path / "gone.safetensors")])


def test_a_sweep_leaves_out_what_the_lora_fixes_and_refuses_a_merge_into_a_refiner(plain_flags, style, tmp_path):
    at = plain_flags.index("--max_train_steps")  # the sweep sets it
    argv = [*plain_flags[:at], *plain_flags[at + 2 :], "--validation_prompt", "x"]
    argv = [word for n, word in enumerate(argv) if "--learning_rate" not in argv[max(n - 1, 0) : n + 1]]
    own = ["--output_dir", tmp_path / "sweep", "--objective", "score", "--"]
    searched = {parameter.flag for parameter in hpo_sweep.parse_args([*own, *argv]).space}
    fixed = {parameter.flag for parameter in hpo_sweep.parse_args([*own, *argv, "--init_lora", style]).space}
    assert "rank" in searched and "rank" not in fixed and "learning_rate" in fixed
    stage = ["--stage", "refiner", "--refiner_unet", ROOT / "demo/refiner/unet", "--merge_lora", style]
    with pytest.raises(SystemExit):
        hpo_sweep.parse_args([*own, *argv, *stage])


def test_a_path_with_a_scale_becomes_absolute_in_a_sweep(style, monkeypatch):
    monkeypatch.chdir(style.parent)
    assert hpo_sweep.make_absolute([f"{style.name}:0.5", style.name]) == [f"{style}:0.5", str(style)]


def test_evaluation_names_a_file_that_is_no_lora_before_it_draws(tmp_path, capsys):
    (tmp_path / "page.safetensors").write_bytes(b"<html>")
    words = ["--pretrained_model_name_or_path", SDXL, "--output_dir", tmp_path / "eval"]
    with pytest.raises(SystemExit):
        evaluate.parse_args([str(word) for word in [*words, "--lora", tmp_path / "page.safetensors"]])
    assert re.search(r"--lora: .*page.safetensors is damaged or incomplete", capsys.readouterr().err)


def test_a_sweep_scores_with_the_merged_lora(plain_flags, style, tmp_path):
    at = plain_flags.index("--max_train_steps")  # the sweep sets it
    argv = [*plain_flags[:at], *plain_flags[at + 2 :], "--validation_prompt", "x", "--merge_lora", f"{style}:0.5"]
    sweep = hpo_sweep.parse_args(["--output_dir", tmp_path / "sweep", "--objective", "score", "--", *argv])
    assert sweep.evaluation["merge_lora"] == [f"{style}:0.5"]


@pytest.mark.parametrize("words", [["--base_precision", "int8"], ["--mixed_precision", "bf16"], ["--dry_run"]])
def test_other_precisions_and_a_dry_run_take_both(plain_flags, trained, style, tmp_path, words):
    argv = [*plain_flags, *words, "--init_lora", trained.output_dir, "--merge_lora", style, "--max_train_steps", 1]
    assert_ok(run_trainer(argv, tmp_path / "run"))


def test_a_refiner_takes_both(flags, plain_flags, layers, tmp_path):
    stage = ["--stage", "refiner", "--refiner_unet", ROOT / "demo/refiner/unet"]
    given = assert_ok(run_trainer([*flags, *stage, *STRONG], tmp_path / "given")).output_dir
    encoder = foreign.write_kohya(
        tmp_path / "te2.safetensors", make_lora(select(layers, text_encoder_2="self_attn"), seed=2)
    )
    argv = [*plain_flags, *stage, "--init_lora", given, "--merge_lora", encoder, given / KOHYA_FILE]
    folder = keep_learning_rate_zero(argv, tmp_path / "run")
    assert_equal_tensors(read(folder / LORA_FILE)[0], read(given / LORA_FILE)[0])
    both = foreign.write_kohya(tmp_path / "a.safetensors", make_lora(select(layers, text_encoder="self_attn")))
    result = run_trainer([*plain_flags, *stage, "--merge_lora", both], tmp_path / "other")
    assert result.codes == [1]
    assert re.search(r"--merge_lora: .* has adapters of text_encoder, which are not used here", result.output)


# Resuming


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_and_resumed_run_with_both_is_the_uninterrupted_run(
    plain_flags, world, layers, style, tmp_path, processes
):
    chosen = select(layers, unet="attn|conv1", text_encoder="self_attn", text_encoder_2="mlp")
    lora = foreign.write_kohya(tmp_path / "a.safetensors", make_lora(chosen, ranks=(2, 3), alphas=(1.0, 2.0, 2.0)))
    argv = [*plain_flags, "--init_lora", lora, "--merge_lora", f"{style}:0.5", "--lora_dropout", 0.3]
    argv += ["--max_train_steps", 6, "--checkpointing_steps", 2, "--gradient_accumulation_steps", 2]
    argv += ["--val_shards", world / "data/val", "--validation_steps", 4]
    assert_resume_is_exact(argv, tmp_path, processes)


def test_resuming_with_another_lora_or_scale_is_refused_by_name(plain_flags, trained, style, tmp_path):
    copy = shutil.copy(style, tmp_path / "copy.safetensors")
    first = [*plain_flags, "--init_lora", trained.output_dir / LORA_FILE, "--merge_lora", f"{style}:0.5"]
    assert_ok(run_trainer([*first, "--max_train_steps", 1], tmp_path / "run"))
    resume = ["--resume_from_checkpoint", "latest", "--max_train_steps", 2]
    for change, found in (
        (["--init_lora", trained.output_dir / "checkpoint-2"], r"--init_lora: '\w+' in the checkpoint, '\w+' now"),
        (["--merge_lora", f"{style}:1"], r"--merge_lora: .*0\.5\]\] in the checkpoint, .*1\.0\]\] now"),
        (["--merge_lora", f"{style}:0.5", f"{style}:0.5"], r"--merge_lora: .* in the checkpoint, .* now"),
    ):
        result = run_trainer([*first, *resume, *change], tmp_path / "run")
        assert result.codes == [1] and re.search(found, result.output), result.output[-800:]
    without = [*plain_flags, *resume, "--init_lora", trained.output_dir / LORA_FILE]
    result = run_trainer(without, tmp_path / "run")
    assert result.codes == [1] and re.search(r"--merge_lora: .*0\.5\]\] in the checkpoint, None now", result.output)
    assert_ok(run_trainer([*first, *resume, "--merge_lora", f"{copy}:0.5"], tmp_path / "run"))  # the same content
    signature = json.loads((tmp_path / "run/checkpoint-2/progress.json").read_text())["law"]
    unmerged = json.loads((trained.output_dir / "checkpoint-2/progress.json").read_text())["law"]
    assert signature["base_model"] == unmerged["base_model"]  # no hash of sums, which differ on other machines
    gone = [*plain_flags, "--init_lora", tmp_path / "gone.safetensors", *resume]
    result = run_trainer(gone, tmp_path / "run")
    assert result.codes == [2] and re.search(r"no LoRA file .*gone.*; resuming needs it, too", result.output)
