"""evaluate.py: the side of the images, and processes on machines with separate disks."""

import json
import os
from functools import partial

import pytest
from harness import ROOT, SDXL, assert_ok, run_trainer
from PIL import Image

import sdxl_data

CLIP = f"local-dir:{ROOT / 'demo/clip'}"


@pytest.fixture
def words(tmp_path):
    rows = [{"id": name, "prompt": f"{name}, standing", "class": name} for name in ("Aquafin", "Emberfox")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        *("--pretrained_model_name_or_path", SDXL, "--prompts", tmp_path / "prompts.jsonl", "--seeds", 0, 1, 2),
        *("--resolution", 64, "--num_inference_steps", 2, "--dtype", "fp32", "--batch_size", 1),
        *(
            "--clip_model",
            CLIP,
            "--aesthetic_clip_model",
            CLIP,
            "--aesthetic_head",
            ROOT / "demo/aesthetic-linearMSE.pth",
        ),
    ]


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for model, entry in expected.items():
        for metric, value in entry.items():
            if isinstance(value, dict) and "mean" in value:
                assert found[model][metric]["mean"] == pytest.approx(value["mean"], abs=1e-5), metric


def test_images_have_the_base_models_own_side_and_a_lora_of_another_one_is_told(words, world, tmp_path):
    train = ["--pretrained_model_name_or_path", SDXL, "--train_shards", world / "data/train", "--resolution", 32]
    train += ["--max_train_steps", 1, "--train_batch_size", 1, "--report_to", "none", "--mixed_precision", "no"]
    lora = assert_ok(run_trainer(train, tmp_path / "lora")).output_dir
    at = words.index("--resolution")
    argv = [*words[:at], *words[at + 2 :], "--lora", lora]
    result = assert_ok(run_trainer(argv, tmp_path / "eval", script="evaluate"))
    sizes = {Image.open(path).size for path in (tmp_path / "eval/images").rglob("*.png")}
    assert sizes == {(64, 64)}  # 8 latents of 8 px, by the demo's configuration
    told = f"--resolution: images are 64 px, but {lora / sdxl_data.LORA_FILE} was trained at 32 px"
    assert result.output.count(told) == 1
    same = assert_ok(run_trainer([*argv, "--resolution", 32], tmp_path / "same", script="evaluate"))
    assert "was trained at" not in same.output


def live_on_an_own_disk(folder, module):
    """Each rank has a working directory of its own; rank 1 also has images that rank 0 never saw."""
    own = folder / os.environ.get("RANK", "0")
    own.mkdir(parents=True, exist_ok=True)
    os.chdir(own)


def test_two_ranks_with_separate_disks_give_what_one_gives(words, world, tmp_path):
    argv = [*words, "--train_shards", world / "data/train", "--val_shards", world / "data/val"]
    one = assert_ok(run_trainer(argv, tmp_path / "one", script="evaluate"))
    argv += ["--output_dir", "eval"]
    expected = json.loads((one.output_dir / "metrics.json").read_text())["models"]

    def check(work):
        found = json.loads((tmp_path / "disks/0/eval/metrics.json").read_text())["models"]
        assert_close(found, expected)
        assert work.codes == [0, 0]

    def start():
        setup = partial(live_on_an_own_disk, tmp_path / "disks")
        return run_trainer(argv, tmp_path / "log", 2, setup=setup, timeout=120, script="evaluate")

    check(start())
    # The disks now hold different things, as after a machine was exchanged.
    main, other = tmp_path / "disks/0/eval", tmp_path / "disks/1/eval"
    (main / "report.html").unlink()
    for path in [*main.glob("reference-*"), *list(main.glob("images/*/*.png"))[:2], *main.glob("images/*/*.npy")]:
        path.unlink()
    for path in list(other.glob("images/*/*.npy"))[:1]:
        path.unlink()
    check(start())
    assert (main / "report.html").exists()
