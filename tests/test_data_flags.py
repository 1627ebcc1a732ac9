"""The data of a run as its flags say: each flag changes what make_data() makes of the same shards."""

import functools

import datasets
import numpy as np
import pytest
from harness import ALONE

import sdxl_data
import train_sdxl_lora as trainer


@pytest.fixture(scope="module")
def make(flags, tmp_path_factory):
    """make_data() of the smallest run with some more flags, made once for each."""
    folder = tmp_path_factory.mktemp("data")

    @functools.cache
    def run(*words):
        args = trainer.parse_args([str(word) for word in [*flags, "--output_dir", folder, *words]])
        return trainer.make_data(ALONE, args, seed=1)

    return run


def pictures(dataset, mix):
    return [dataset[i, -1, step, 0]["pixels"].numpy().tobytes() for i in range(6) for step in range(3)]


def sides(dataset, mix):
    return {tuple(dataset[i, -1, 0, 0]["pixels"].shape[1:]) for i in range(20)}


def scores(dataset, mix):
    return [dataset[i, -1, 0, 0]["aesthetic_scores"] for i in range(20)]


def labels(dataset, mix):
    return dataset.index.label_names


def acceptance(dataset, mix):
    return [np.round(mix.acceptance(step), 6).tolist() for step in (0, 1500)]


EFFECTS = {
    "--resolution 72": sides,
    "--crop center": pictures,
    "--center_crop": pictures,
    "--crop bucket --resolution 192": sides,
    "--random_flip": pictures,
    "--image_interpolation_mode nearest": pictures,
    "--aesthetic_key ae_relevance": scores,
    "--aesthetic_scale 20": scores,
    "--species_key tags --species_csv {folder}/tags.csv": labels,
    "--species_csv {folder}/other.csv": acceptance,
    "--species_choice first": acceptance,
    "--species_mix 0.4 0.95 6000": acceptance,
    "--species_mix 0.2 0.5 6000": acceptance,
    "--species_mix 0.2 0.95 3000": acceptance,
    "--species_mix_schedule cosine": acceptance,
}


@pytest.fixture(scope="module")
def tables(world, tmp_path_factory):
    """A folder with other counts of the same species and counts of the tags."""
    folder = tmp_path_factory.mktemp("tables")
    _, *rows = (world / "manifests/train_species.csv").read_text().splitlines()
    names = [row.split(",")[0] for row in rows]
    counts = [f"{name},{number + 1}" for number, name in enumerate(names)]
    (folder / "other.csv").write_text("\n".join(["species,count", *counts]))
    (folder / "tags.csv").write_text("species,count\nstanding,3\njumping,2\n")
    return folder


@pytest.mark.parametrize("words", EFFECTS)
def test_a_flag_changes_the_data_that_it_is_about(make, tables, words):
    look = EFFECTS[words]
    dataset, mix, _ = make(*words.format(folder=tables).split())
    plain, plain_mix, _ = make()
    assert look(dataset, mix) != look(plain, plain_mix)
    assert look(plain, plain_mix) == look(plain, plain_mix)  # only the flag makes a difference


def test_the_configuration_of_a_dataset_is_asked_for_by_name(flags, tmp_path, monkeypatch):
    asked = []

    def load_dataset(source, name, split, cache_dir):
        asked.append((source, name, split, cache_dir))
        raise ValueError("not really there")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    words = ["--dataset_name", "someone/some", "--dataset_config_name", "small", "--cache_dir", "downloads"]
    at = flags.index("--train_shards")
    argv = [*flags[:at], *flags[at + 2 :], "--output_dir", tmp_path, *words]
    args = trainer.parse_args(list(map(str, argv)))
    with pytest.raises(sdxl_data.InputError, match="--dataset_name: someone/some: not really there"):
        trainer.load_index(ALONE, args, "--dataset_name", seed=0)
    assert asked == [("someone/some", "small", "train", "downloads")]
