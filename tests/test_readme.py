"""The READMEs: their links lead somewhere, their flags exist, and the main one stays short."""

import os
import re
import shlex
import tarfile
from functools import partial

import pytest
from harness import ROOT, SDXL, assert_ok, run_trainer
from shards import encode, noise_image

READMES = (
    "README.md",
    "accelerate_configs/README.md",
    "benchmarks/README.md",
    "demo/README.md",
    "sagemaker/README.md",
)
SCRIPTS = ("train_sdxl_lora.py", "evaluate.py", "hpo_sweep.py", "sagemaker/submit.py", "benchmarks/bench_train.py")
SCRIPTS += ("tests/tar_fuzz.py",)
# flags of accelerate, sbatch, docker, tar and tensorboard
FOREIGN = set(
    """
    config_file num_processes num_machines machine_rank main_process_ip main_process_port
    account array cpus-per-task gpus-per-node nodes partition signal time
    ipc sort logdir
    """.split()
)


def own_flags():
    sources = [(ROOT / script).read_text() for script in SCRIPTS]
    return {flag for source in sources for flag in re.findall(r'"--([a-z]\w*)"', source)}


def anchors(text):
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", READMES)
def test_every_flag_exists(name):
    named = set(re.findall(r"(?<![-\w])--([a-z][\w-]*)", (ROOT / name).read_text()))
    assert named - own_flags() - FOREIGN - {"help", "no-FLAG", "no-deterministic"} == set()


@pytest.mark.parametrize("name", READMES)
def test_every_link_leads_to_a_file_and_a_heading(name):
    page = ROOT / name
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if link.startswith("https://"):
            continue
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not heading or heading in anchors(target.read_text()), link


def test_the_main_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 300


# ---- the table "what you have", row by row


def put_images(folder, *names, caption=None):
    for n, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise_image(n, 80, 70).save(path)
        if caption:
            path.with_suffix(".txt").write_text(caption)


def make_with_texts(folder):
    put_images(folder / "pictures", "a.png", "b.png", caption="a teapot\na cup")


def make_with_metadata(folder):
    put_images(folder / "pictures", "1_cup/002.png", "1_cup/more/003.png")
    tree = (ROOT / "README.md").read_text().partition("pictures/\n")[2].partition("```")[0]
    rows = [line.strip() for line in tree.splitlines() if line.strip().startswith("{")]
    assert len(rows) == 2
    (folder / "pictures/1_cup/metadata.jsonl").write_text("\n".join(rows))


def make_without_captions(folder):
    put_images(folder / "pictures", "a.png", "b.png")


def make_class_folders(folder):
    put_images(folder / "pictures", "10_cat/a.png", "1_dog/b.png", caption="a pet")


def make_two_folders(folder):
    put_images(folder, "cats/a.png", "dogs/b.png", caption="a pet")


def make_tagged(folder):
    put_images(folder / "pictures", "a.png", "b.png", caption="1girl, red, smile")


def make_tars(folder):
    make_with_texts(folder)
    (folder / "shards").mkdir()
    with tarfile.open(folder / "shards/0.tar", "w") as tar:
        tar.add(folder / "pictures", ".")


def make_table(folder):
    import datasets

    images = [{"bytes": encode(noise_image(n, 80, 70)), "path": None} for n in range(2)]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict({"image": images, "text": ["a", "b"]}, features=features).save_to_disk(folder / "table")


SOURCES = [make_with_texts, make_with_metadata, make_without_captions, make_class_folders, make_two_folders]
SOURCES += [make_tagged, make_tars, make_table]


def source_rows():
    table = (
        (ROOT / "README.md").read_text().partition("| what you have | flags |\n|---|---|\n")[2].partition("\n\n")[0]
    )
    return [re.search(r"\| `(--[^`]*)`[^|]*\|$", row)[1] for row in table.splitlines()]


def go_to(folder, module):
    os.chdir(folder)


@pytest.mark.parametrize("make", SOURCES)
def test_what_people_have_trains_with_the_flags_of_the_table(tmp_path, make):
    assert len(source_rows()) == len(SOURCES)
    make(tmp_path)
    argv = ["--pretrained_model_name_or_path", SDXL, "--resolution", 64, "--rank", 2, "--train_batch_size", 2]
    argv += ["--max_train_steps", 1, "--report_to", "none", "--mixed_precision", "no", "--max_bad_fraction", 0]
    words = shlex.split(source_rows()[SOURCES.index(make)])
    for more, name in ((["--dry_run"], "dry"), ([], "run")):
        result = assert_ok(run_trainer([*argv, *words, *more], tmp_path / name, setup=partial(go_to, tmp_path)))
        assert "2 images of" in result.output
    assert not (tmp_path / "run/skipped.jsonl").exists() or (tmp_path / "run/skipped.jsonl").read_text() == ""
