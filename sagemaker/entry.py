#!/usr/bin/env python
"""Run one script of the project in a SageMaker container, on one host or on many.

    exec python sagemaker/entry.py train|hpo|evaluate FLAGS…

The script writes to /opt/ml/checkpoints, which SageMaker copies to S3; a job that finds a run there continues it. At
the end, the LoRA and its card are copied to SM_MODEL_DIR, and the reports to SM_OUTPUT_DATA_DIR. SIGTERM is passed on
to the script, which saves and exits. If the job fails, DescribeTrainingJob shows the reason (/opt/ml/output/failure).
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ML = Path(os.environ.get("ML_ROOT", "/opt/ml"))  # tests move it
PROJECT = Path(__file__).resolve().parent.parent
SCRIPTS = {"train": "train_sdxl_lora.py", "hpo": "hpo_sweep.py", "evaluate": "evaluate.py"}
PORT = 29400
HEADROOM = 1.5  # free bytes needed per byte that is copied
HOSTS_SECONDS = 600  # how long to wait for the names of the other hosts
FAILURE_CHARACTERS = 1024  # SageMaker shows no more
TAIL_BYTES = 65536  # of the output, which are searched for the reason of a failure

# What is copied at the end, by mode: (to SM_MODEL_DIR, to SM_OUTPUT_DATA_DIR), patterns in /opt/ml/checkpoints.
RESULTS = {
    "train": (
        ["*.safetensors", "README.md", "config.yaml", "samples"],
        [
            "metrics.jsonl",
            "run.json",
            "skipped.jsonl",
            "samples",
            "logs",
            "train_sdxl_lora.py",
            "sdxl_data.py",
            "sdxl_lora.py",
            "sdxl_single_file.py",
            "sdxl_memory.py",
            "sdxl_preview.py",
            "sdxl_speed.py",
        ],
    ),
    "hpo": (["best_params.yaml"], ["best_params.yaml", "trials.csv", "report.html", "trial-*/trial.yaml"]),
    "evaluate": ([], ["metrics.json", "per_image.csv", "grid.png", "report.html"]),
}


class Failed(Exception):
    """The job cannot continue. The message is written to /opt/ml/output/failure."""


def find_hosts():
    """(hosts in the order of their ranks, this host, its network interface)."""
    text = os.environ.get("SM_RESOURCE_CONFIG") or (ML / "input/config/resourceconfig.json").read_text()
    config = json.loads(text)
    return sorted(config["hosts"]), config["current_host"], config.get("network_interface_name")


def count_gpus():
    if "SM_NUM_GPUS" in os.environ:
        return int(os.environ["SM_NUM_GPUS"])
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True).stdout
    except OSError:
        return 0
    return sum(line.startswith("GPU ") for line in listed.splitlines())


def wait_for_host(host):
    """Waits until the name of another container resolves. Errors: Failed after HOSTS_SECONDS."""
    end = time.monotonic() + HOSTS_SECONDS
    while True:
        try:
            return socket.getaddrinfo(host, PORT)
        except OSError as error:
            if time.monotonic() > end:
                raise Failed(f"host {host}: no address after {HOSTS_SECONDS} s: {error}") from error
            time.sleep(2)


def size_of(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def copy_channels(names, target):
    """{channel's folder: its copy on this host's disk}. Errors: Failed, before copying, when the disk is too small."""
    folders = {name: ML / "input/data" / name for name in names}
    missing = [name for name, folder in folders.items() if not folder.is_dir()]
    if missing:
        raise Failed(f"--copy: there is no channel {missing[0]}; give it to --fastfile")
    copies = {folder: target / name for name, folder in folders.items()}
    size = sum(map(size_of, copies))
    target.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target).free
    if free < HEADROOM * size:
        found = f"{', '.join(names)}: copying {size / 1e9:.1f} GB needs {HEADROOM * size / 1e9:.1f} GB of free space"
        remedy = "give a larger --volume_gb, or stream the data without --copy"
        raise Failed(f"--copy: {found}, but {target} has {free / 1e9:.1f} GB; {remedy}")
    for folder, copy in copies.items():
        print(f"copying {folder} to {copy}", flush=True)
        shutil.copytree(folder, copy, dirs_exist_ok=True)
    return copies


def read_secret(name, region):
    """The text that Secrets Manager holds under `name`."""
    import boto3

    return boto3.client("secretsmanager", region_name=region).get_secret_value(SecretId=name)["SecretString"]


def read_secrets():
    """{environment variable: value} of the secrets that SECRET_IDS names.

    A secret is a text, or JSON with one entry or with an entry called like the variable. Errors: Failed, which never
    shows a value.
    """
    found = {}
    for variable, name in json.loads(os.environ.get("SECRET_IDS", "{}")).items():
        try:
            text = read_secret(name, os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"))
        except Exception as error:
            raise Failed(f"--secret {variable}={name}: {type(error).__name__}: {error}") from error
        with contextlib.suppress(json.JSONDecodeError):
            entries = json.loads(text)
            if isinstance(entries, dict):
                text = entries.get(variable) or (next(iter(entries.values())) if len(entries) == 1 else None)
        if not isinstance(text, str):
            raise Failed(f"--secret {variable}={name}: the secret has no entry {variable}")
        found[variable] = text.strip()
    return found


def make_command(mode, words, hosts, host, gpus):
    """The command that runs the script with this host's share of the processes."""
    script = [str(PROJECT / SCRIPTS[mode]), "--output_dir", str(ML / "checkpoints"), *words]
    if mode == "hpo":
        return [sys.executable, *script]
    if mode == "train":
        script += ["--resume_from_checkpoint", "latest"]
    launcher = ["--config_file", str(PROJECT / "accelerate_configs/ddp.yaml")]
    launcher += ["--num_machines", len(hosts), "--num_processes", len(hosts) * max(1, gpus)]
    launcher += ["--machine_rank", hosts.index(host), "--main_process_ip", hosts[0], "--main_process_port", PORT]
    return [sys.executable, "-m", "accelerate.commands.launch", *map(str, launcher), *script]


def make_environment(gpus, interface):
    env = os.environ | read_secrets() | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "100"}  # seconds to save after SIGTERM
    # W&B would start a new run for every job, but a resumed job continues the run whose id is in the checkpoint.
    env["WANDB_SAGEMAKER_DISABLE"] = "true"
    if not gpus:
        env["ACCELERATE_USE_CPU"] = "true"
    if interface:
        env |= {"NCCL_SOCKET_IFNAME": interface, "GLOO_SOCKET_IFNAME": interface}
    return env


class Stop:
    """Passes SIGTERM on to the child, which then saves and exits. Before there is a child, this process exits."""

    def __init__(self):
        self.received = False
        self.child = None
        signal.signal(signal.SIGTERM, self.receive)

    def receive(self, *_):
        self.received = True
        if self.child is None:
            sys.exit(0)
        self.child.terminate()


def run(command, env, stop):
    """Runs a command and passes its output on. Returns (exit status, the last TAIL_BYTES of the output)."""
    child = subprocess.Popen(command, env=env, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    stop.child = child
    tail = bytearray()
    while data := child.stdout.read1():  # not by lines: a progress bar has no line ends
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        tail.extend(data)
        del tail[:-TAIL_BYTES]
    return child.wait(), tail.decode(errors="replace")


def find_reason(text):
    """The last error message of the script in its output, else the last error of a library, else the last line."""
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    for mark in (".py: error: ", "Error: ", ""):
        found = [line for line in lines if mark in line]
        if found:
            return found[-1]
    return "no output"


def copy_results(mode):
    """Copies the results from /opt/ml/checkpoints to the folders that SageMaker uploads."""
    model = Path(os.environ.get("SM_MODEL_DIR", ML / "model"))
    reports = Path(os.environ.get("SM_OUTPUT_DATA_DIR", ML / "output/data"))
    for target, patterns in zip((model, reports), RESULTS[mode]):
        for source in [path for pattern in patterns for path in (ML / "checkpoints").glob(pattern)]:
            copy = target / source.relative_to(ML / "checkpoints")
            copy.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, copy, dirs_exist_ok=True)
            else:
                shutil.copy2(source, copy)


def main(argv):
    """Runs the script and copies its results; returns the exit status. Errors: Failed."""
    stop = Stop()
    mode, *words = argv
    hosts, host, interface = find_hosts()
    gpus = count_gpus()
    copied = [name for name in os.environ.get("COPY_CHANNELS", "").split(",") if name]
    for folder, copy in copy_channels(copied, Path(os.environ.get("TMPDIR", "/tmp")) / "channels").items():
        words = [word.replace(str(folder), str(copy)) for word in words]
    env = make_environment(gpus, interface)
    wait_for_host(hosts[0])
    (ML / "checkpoints").mkdir(parents=True, exist_ok=True)
    status, output = run(make_command(mode, words, hosts, host, gpus), env, stop)
    if status and not stop.received:
        raise Failed(f"{SCRIPTS[mode]} on {host}, exit {status}: {find_reason(output)}")
    if host == hosts[0]:
        copy_results(mode)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Failed as failure:
        print(f"entry.py: error: {failure}", file=sys.stderr)
        (ML / "output").mkdir(parents=True, exist_ok=True)
        (ML / "output/failure").write_text(str(failure)[:FAILURE_CHARACTERS])
        sys.exit(1)
