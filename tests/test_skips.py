"""tests/skips.py: what did not run is recorded with its reason, listed with its remedy, and can fail the build."""

import ast
import json
import os
import re
import subprocess
import sys

import pytest
from harness import ROOT
from skips import find_missing

CONFIG = """[pytest]
markers =
    slow: needs minutes: make test-slow
    gpu: needs a CUDA device: pytest -m gpu
"""
TESTS = """
import pytest

def test_plain():
    pass

@pytest.mark.skipif(True, reason="needs a browser: apt-get install browser")
def test_marked():
    pass

def test_called():
    pytest.skip("needs root: sudo make test")

@pytest.fixture
def missing():
    pytest.skip("needs a disk: buy one")

def test_by_its_fixture(missing):
    pass

@pytest.mark.xfail(reason="a bug")
def test_known_bug():
    assert False

@pytest.mark.slow
def test_slow():
    pass

@pytest.mark.slow
@pytest.mark.gpu
def test_gpu():
    pass
"""
MODULE = """
import pytest

pytest.importorskip("not_a_package", reason="needs a package: pip install it")

def test_of_a_file_that_is_not_imported():
    pass
"""


@pytest.fixture
def run(tmp_path):
    """Runs pytest on the files above and returns the record of the session."""
    (tmp_path / "pytest.ini").write_text(CONFIG)
    (tmp_path / "test_a.py").write_text(TESTS)
    (tmp_path / "test_b.py").write_text(MODULE)

    def run(name, *words):
        argv = [sys.executable, "-m", "pytest", "-q", "-p", "skips", *words]
        env = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "TEST_RECORD": str(tmp_path / "records" / name)}
        for name_of_outer_run in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
            env.pop(name_of_outer_run, None)
        done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        return json.loads((tmp_path / "records" / name).read_text())

    return run


def report(folder, *sessions, fail_on_skip="0"):
    """(exit code, output) of the script for the records of some sessions."""
    paths = []
    for number, session in enumerate(sessions):
        paths.append(folder / f"{number}.json")
        paths[-1].write_text(json.dumps(session))
    argv = [sys.executable, ROOT / "tests/skips.py", *paths]
    env = os.environ | {"FAIL_ON_SKIP": fail_on_skip}
    done = subprocess.run(argv, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout


def entry(reason, skipped=True, gpu=False):
    return {"reason": reason, "skipped": skipped, "gpu": gpu}


@pytest.mark.parametrize("processes", [[], ["-n", "2"]], ids=["alone", "xdist"])
def test_a_session_records_what_it_skipped_and_deselected(run, processes):
    session = run("quick.json", "-m", "not slow", *processes)
    assert session["ran"] == ["test_a.py::test_plain"]
    assert session["not_run"] == {
        "test_a.py::test_marked": entry("needs a browser: apt-get install browser"),
        "test_a.py::test_called": entry("needs root: sudo make test"),
        "test_a.py::test_by_its_fixture": entry("needs a disk: buy one"),
        "test_a.py::test_known_bug": entry("expected to fail: a bug"),
        "test_a.py::test_slow": entry("needs minutes: make test-slow", skipped=False),
        "test_a.py::test_gpu": entry("needs a CUDA device: pytest -m gpu", skipped=False, gpu=True),
        "test_b.py": entry("needs a package: pip install it"),
    }


def test_a_test_that_another_session_ran_is_not_listed(run):
    sessions = [run("quick.json", "-m", "not slow"), run("slow.json", "-m", "slow and not gpu")]
    missing = find_missing(sessions)
    assert "test_a.py::test_slow" not in missing and "test_a.py::test_plain" not in missing
    assert missing["test_a.py::test_marked"]["reason"] == "needs a browser: apt-get install browser"
    assert missing["test_a.py::test_gpu"]["gpu"]
    there = {"ran": ["test_b.py::test_of_a_file_that_is_not_imported"], "not_run": {}}
    assert "test_b.py" in missing and "test_b.py" not in find_missing([*sessions, there])


def test_the_reason_of_a_skip_is_kept_whatever_the_order_of_the_sessions():
    slow = {"ran": [], "not_run": {"a::b": entry("needs SLURM: install it")}}
    quick = {"ran": [], "not_run": {"a::b": entry("needs minutes: make test-slow", skipped=False)}}
    for sessions in ([slow, quick], [quick, slow]):
        assert find_missing(sessions) == slow["not_run"]


def test_the_list_has_one_line_per_reason(tmp_path):
    browser, gpu = entry("needs a browser: install it"), entry("needs a GPU: buy it", skipped=False, gpu=True)
    session = {"ran": [], "not_run": {"a.py::x": browser, "b.py::y": browser, "b.py::z": gpu}}
    code, output = report(tmp_path, session)
    assert code == 0
    assert output.splitlines()[1:] == [
        "   2  needs a browser: install it  (a.py, b.py)",
        "   1  needs a GPU: buy it  (b.py)",
    ]
    assert report(tmp_path, {"ran": ["a.py::x"], "not_run": {}}) == (0, "Every test ran.\n")


def test_fail_on_skip_names_what_should_have_run_and_forgives_gpu_tests_alone(tmp_path):
    gpu = {"a.py::on_gpu": entry("needs a GPU: buy it", skipped=False, gpu=True)}
    assert report(tmp_path, {"ran": [], "not_run": gpu}, fail_on_skip="1")[0] == 0
    both = gpu | {"a.py::in_browser": entry("needs a browser: install it")}
    assert report(tmp_path, {"ran": [], "not_run": both}, fail_on_skip="0")[0] == 0
    code, output = report(tmp_path, {"ran": [], "not_run": both}, fail_on_skip="1")
    assert code == 1
    assert output.splitlines()[-2:] == ["FAIL_ON_SKIP=1, and these should have run:", "  a.py::in_browser"]


def find_vague_skips(source):
    """Lines whose skip does not say `needs …: command`. A reason that is not written there is not looked at."""
    found = []
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
            continue
        if call.func.attr not in ("skip", "skipif", "importorskip"):
            continue
        reasons = [keyword.value for keyword in call.keywords if keyword.arg == "reason"]
        if call.func.attr == "skip":
            reasons += call.args
        constants = [reason.value for reason in reasons if isinstance(reason, ast.Constant)]
        if not reasons or not all(re.fullmatch("needs .+: .+", constant) for constant in constants):
            found.append(call.lineno)
    return found


def test_every_skip_says_what_it_needs_and_how_to_get_it():
    assert find_vague_skips("import pytest\npytest.skip('no GPU')\npytest.importorskip('moto')") == [2, 3]
    paths = (ROOT / "tests").glob("*.py")
    assert [f"{path.name}:{line}" for path in paths for line in find_vague_skips(path.read_text())] == []
    settings = (ROOT / "pyproject.toml").read_text()
    described = re.findall(r'^    "(?:slow|sagemaker|gpu): (needs .+: .+)",$', settings, flags=re.M)
    assert len(described) == 3
