import shutil

import pytest
import torch
from harness import SDXL, assert_ok, run_trainer
from world import make_dataset

pytest_plugins = ["skips"]
pytest.register_assert_rewrite("compare")  # so that a failure shows both sides
torch.set_num_threads(1)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device: pytest -m gpu on a machine that has one")


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Folder with a small drawn dataset: data/train, data/val, manifests/train_species.csv."""
    folder = tmp_path_factory.mktemp("world")
    make_dataset(folder, seed=3, scale=0.06, val_per_species=1)
    return folder


@pytest.fixture(scope="session")
def flags(world):
    """The smallest useful command line, without --output_dir."""
    return [
        *("--pretrained_model_name_or_path", SDXL),
        *("--train_shards", world / "data/train"),
        *("--class_csv", world / "manifests/train_species.csv"),
        *("--resolution", 64, "--train_batch_size", 2, "--max_train_steps", 4, "--seed", 7),
        *("--logging_steps", 1, "--learning_rate", 1e-3, "--rank", 2, "--report_to", "none"),
        *("--mixed_precision", "no", "--dataloader_num_workers", 0),
    ]


@pytest.fixture(scope="session")
def trained(flags, tmp_path_factory):
    """The finished run of `flags`, with checkpoints 2 and 4. Nothing may change it; `own_run` is a copy."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    return assert_ok(run_trainer([*flags, "--checkpointing_steps", 2], folder))


@pytest.fixture
def own_run(trained, tmp_path):
    """tmp_path / "run", a copy of the finished run."""
    return shutil.copytree(trained.output_dir, tmp_path / "run")


@pytest.fixture(scope="session")
def parse(tmp_path_factory):
    """Function from more words to all flags of a run on the demo's model, as the trainer fills them in."""
    import train_sdxl_lora as trainer  # not at the top: a test of the start runs without torch

    folder = tmp_path_factory.mktemp("parse")
    words = ["--pretrained_model_name_or_path", SDXL, "--train_data_dir", folder, "--output_dir", folder / "out"]
    return lambda *more: trainer.parse_args([str(w) for w in [*words, "--mixed_precision", "no", *more]])
