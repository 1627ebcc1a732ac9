"""Runs of the scripts for tests: torch and diffusers are imported once, in a fork server that forks every run."""

import contextlib
import importlib
import json
import multiprocessing
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
SDXL = ROOT / "demo" / "sdxl"
# what section 3 of the trainer needs of an Accelerator, for a single process
ALONE = SimpleNamespace(
    process_index=0,
    num_processes=1,
    is_main_process=True,
    device="cpu",
    reduce=lambda tensor, how: tensor,
    main_process_first=contextlib.nullcontext,
)

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["train_sdxl_lora", "evaluate", "hpo_sweep"])
_fresh = multiprocessing.get_context("spawn")  # a GPU is not to be had in a fork of what has asked for it


@dataclass
class Result:
    """What a run left behind; `codes` and `outputs` have one entry per process."""

    codes: list
    outputs: list
    output_dir: Path

    @property
    def output(self):
        return "\n".join(self.outputs)

    def metrics(self):
        """Rows of metrics.jsonl without what differs from clock to clock."""
        lines = (self.output_dir / "metrics.jsonl").read_text().splitlines()
        timed = ("time", "images_per_second")
        return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


def _child(script, argv, env, log, setup):
    import torch

    os.environ.update(env)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # loader processes as in a run that was not forked itself
    code = 0
    with open(log, "w") as stream, contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        try:
            module = importlib.import_module(script)
            if setup is not None:
                setup(module)
            status = module.main(argv)
            code = status if isinstance(status, int) else 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
            if isinstance(error.code, str):
                print(error.code)
        except BaseException:
            traceback.print_exc()
            code = 1
        stream.flush()
    sys.stdout.flush()
    os._exit(code)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_trainer(argv, output_dir, processes=1, env=None, setup=None, script="train_sdxl_lora"):
    """Starts main([--output_dir …, *argv]) in forks; `setup(module)`, picklable, may change the module first."""
    output_dir = Path(output_dir)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    argv = ["--output_dir", str(output_dir), *map(str, argv)]
    port, children = str(free_port()), []
    for rank in range(processes):
        world = {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", **(env or {})}
        if processes > 1:
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            world |= {k: str(v) for k, v in ranks.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        log = f"{output_dir}.{rank}.log"
        context = _context if world["ACCELERATE_USE_CPU"] == "true" else _fresh
        child = context.Process(target=_child, args=(script, argv, world, log, setup))
        child.start()
        children.append((child, log))
    return children


def run_trainer(argv, output_dir, processes=1, env=None, setup=None, timeout=300, script="train_sdxl_lora"):
    """Result of a whole run; a process that outlives `timeout` seconds is killed and has a negative code."""
    children = start_trainer(argv, output_dir, processes, env, setup, script)
    for child, _ in children:
        child.join(timeout)
        if child.is_alive():
            child.kill()
            child.join()
    outputs = [Path(log).read_text() for _, log in children]
    return Result([child.exitcode for child, _ in children], outputs, Path(output_dir))


def assert_ok(result):
    assert result.codes == [0] * len(result.codes), result.output[-3000:]
    return result


# ---- the script as its own process, as a user starts it


def command(argv, output_dir, launcher=(), processes=1):
    words = [sys.executable]
    if launcher:
        words += ["-m", "accelerate.commands.launch", *launcher, "--num_processes", processes]
        words += ["--main_process_port", free_port()]
    return [str(word) for word in [*words, ROOT / "train_sdxl_lora.py", *argv, "--output_dir", output_dir]]


def start_command(words, log, **env):
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"} | env
    with open(log, "w") as stream:
        return subprocess.Popen(words, env=env, stdout=stream, stderr=stream, start_new_session=True)


def wait_until(condition, seconds=120):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline, "what was waited for never came"
        time.sleep(0.02)


def rows(output_dir):
    path = Path(output_dir) / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def trainers(output_dir):
    """Processes of this machine whose command line names `output_dir`, launchers and loader processes included."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(output_dir) in path.read_text().split("\0"):
                found.append(int(path.parent.name))
        except OSError:
            pass
    return found


# ---- a page in a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FRAME = """<!doctype html><iframe id=f src="page.html" width=WIDTH height=900></iframe><script>
f.onload = () => {
  const page = f.contentDocument
  document.title = [page.documentElement.scrollWidth, MEASURES].join(" ")
}</script>"""


def browse(page, folder, width, *measures):
    """[scroll width, *JavaScript expressions of `page`, the document] of a file shown `width` px wide in Chromium.

    Asserts that the console stays empty and that nothing is asked of the network.
    """
    shutil.copy(page, folder / "page.html")
    (folder / "frame.html").write_text(FRAME.replace("WIDTH", str(width)).replace("MEASURES", ", ".join(measures)))
    quiet = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    quiet += " --disable-component-update --disable-sync --enable-logging=stderr --allow-file-access-from-files"
    own = [f"--user-data-dir={folder / 'profile'}", f"--log-net-log={folder / 'net.json'}", "--timeout=20000"]
    command = [CHROMIUM, *quiet.split(), *own, "--dump-dom", f"file://{folder / 'frame.html'}"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=90)
    title = re.search(r"<title>(.*?)</title>", shown.stdout)
    assert title, shown.stdout[:300]
    assert "CONSOLE" not in shown.stderr
    requests = set(re.findall(r'"url":"((?:https?|wss?)://[^"]+)"', (folder / "net.json").read_text()))
    assert not [url for url in requests if "google" not in url], requests  # Chromium's own, refused, go to Google
    return title[1].split(" ")
