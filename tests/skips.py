"""Records which tests a session did not run, and lists at the end those that no session ran.

As a pytest plugin it writes the record of the session to the file named by TEST_RECORD. As a script,
`python tests/skips.py FILE …` prints one line per reason; if FAIL_ON_SKIP=1 is set, it also names every test that
should have run, and exits with 1. It does not import torch: the environment of the SageMaker SDK has none.
"""

import json
import os
import sys
from collections import defaultdict
from pathlib import Path

import pytest

MARKERS = ("gpu", "sagemaker", "slow")  # the first of these that a deselected test has is the reason


def pytest_configure(config):
    config.pluginmanager.register(Recorder(config), "recorder")


class Recorder:
    """What one session did: the set `ran`, and `not_run` as {test or file: {"reason", "skipped", "gpu"}}."""

    def __init__(self, config):
        self.config = config
        self.ran = set()
        self.not_run = {}

    def pytest_deselected(self, items):
        descriptions = dict(line.partition(": ")[::2] for line in self.config.getini("markers"))
        for item in items:
            marker = next(filter(item.get_closest_marker, MARKERS), None)
            reason = descriptions.get(marker, "deselected on the command line")
            self.not_run[item.nodeid] = {"reason": reason, "skipped": False, "gpu": marker == "gpu"}

    def pytest_collectreport(self, report):
        self.note_skip(report)

    def pytest_runtest_logreport(self, report):
        self.note_skip(report, gpu="gpu" in report.keywords)
        if report.when == "call":
            self.ran.add(report.nodeid)

    def note_skip(self, report, gpu=False):
        if not report.skipped:
            return
        if hasattr(report, "wasxfail"):
            reason = f"expected to fail: {report.wasxfail}"
        else:
            reason = report.longrepr[2].removeprefix("Skipped: ")
        self.not_run[report.nodeid] = {"reason": reason, "skipped": True, "gpu": gpu}

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node):
        """Takes over what a worker of pytest-xdist deselected: the process that reports collects nothing itself."""
        self.not_run |= getattr(node, "workeroutput", {}).get("not_run", {})  # a worker that crashed sends nothing

    def pytest_sessionfinish(self):
        if hasattr(self.config, "workerinput"):
            self.config.workeroutput["not_run"] = self.not_run
        elif os.environ.get("TEST_RECORD"):
            path = Path(os.environ["TEST_RECORD"])
            path.parent.mkdir(parents=True, exist_ok=True)
            ran = sorted(self.ran - self.not_run.keys())
            path.write_text(json.dumps({"ran": ran, "not_run": self.not_run}, indent=1))


def find_missing(sessions):
    """{test: entry} of what ran in no session. A skip is a better reason than a deselection in another session."""
    ran = {test for session in sessions for test in session["ran"]}
    ran |= {test.partition("::")[0] for test in ran}  # a file skipped here ran if its tests ran elsewhere
    missing = {}
    for session in sessions:
        for test, entry in session["not_run"].items():
            if test not in ran and (test not in missing or entry["skipped"]):
                missing[test] = entry
    return missing


def main(paths):
    sessions = [json.loads(Path(path).read_text()) for path in paths]
    missing = find_missing(sessions)
    if not missing:
        print("Every test ran.")
        return 0
    tests = defaultdict(list)
    for test, entry in missing.items():
        tests[entry["reason"]].append(test)
    print("Tests that did not run, and what they need:")
    for reason, names in tests.items():
        files = sorted({name.partition("::")[0] for name in names})
        print(f"{len(names):4}  {reason}  ({', '.join(files)})")
    unexpected = [test for test, entry in missing.items() if not entry["gpu"]]
    if os.environ.get("FAIL_ON_SKIP") != "1" or not unexpected:
        return 0
    print("FAIL_ON_SKIP=1, and these should have run:", *sorted(unexpected), sep="\n  ")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
