"""The READMEs: their links lead somewhere, their flags exist, and the main one stays short."""

import re

import pytest
from harness import ROOT

READMES = (
    "README.md",
    "accelerate_configs/README.md",
    "benchmarks/README.md",
    "demo/README.md",
    "sagemaker/README.md",
)
SCRIPTS = ("train_sdxl_lora.py", "evaluate.py", "hpo_sweep.py", "sagemaker/submit.py", "benchmarks/bench_train.py")
# flags of diffusers' script that this one lacks, as the README says
MISSING = {"enable_xformers_memory_efficient_attention", "enable_npu_flash_attention", "local_rank", "debug_loss"}
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
    assert named - own_flags() - FOREIGN - MISSING - {"help", "no-FLAG", "no-deterministic"} == set()


def test_the_flags_that_the_readme_calls_missing_are_missing():
    assert own_flags() & MISSING == set()


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
