"""sagemaker/entry.py in hand-made containers: folders for /opt/ml, hosts on loopback, a test that plays SageMaker."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import boto3
import moto
import pytest
from compare import assert_same_run
from harness import ROOT, SDXL, Result, assert_ok, rows, run_trainer, trainers

spec = importlib.util.spec_from_file_location("entry", ROOT / "sagemaker/entry.py")
entry = importlib.util.module_from_spec(spec)
spec.loader.exec_module(entry)

STEPS = 60


class Job:
    """A training job: one container per host, whose /opt/ml is a folder; `s3` holds its checkpoints."""

    def __init__(self, folder, s3, world, hosts):
        self.s3, self.roots = s3, [folder / f"host-{n}" for n in range(hosts)]
        names = [f"127.0.0.{n + 1}" for n in range(hosts)]
        for root, name in zip(self.roots, names):
            (root / "input/config").mkdir(parents=True)
            # SageMaker's order is no order
            config = {"hosts": names[::-1], "current_host": name, "network_interface_name": "lo"}
            (root / "input/config/resourceconfig.json").write_text(json.dumps(config))
            for channel, source in {
                "train": world / "data/train",
                "base": SDXL,
                "tables": world / "manifests",
            }.items():
                (root / "input/data").mkdir(exist_ok=True)
                (root / "input/data" / channel).symlink_to(source)
            shutil.copytree(s3, root / "checkpoints") if s3.exists() else None

    def start(self, mode, words, **env):
        self.children = []
        for root in self.roots:
            own = {"ML_ROOT": root, "SM_NUM_GPUS": 0, "OMP_NUM_THREADS": 1, "HF_HUB_OFFLINE": 1} | env
            own |= {"SM_MODEL_DIR": root / "model", "SM_OUTPUT_DATA_DIR": root / "output/data"}
            command = [sys.executable, ROOT / "sagemaker/entry.py", mode, *words]
            with open(root.with_suffix(".log"), "w") as stream:
                self.children.append(subprocess.Popen(
                    [str(word).replace("ML_ROOT", str(root)) for word in command], stdout=stream, stderr=stream,
                    env=os.environ | {name: str(value) for name, value in own.items()}, start_new_session=True,
                ))  # fmt: skip
        return self

    def wait(self, seconds=240):
        """Exit codes of all; then every host's checkpoints are in S3."""
        codes = [child.wait(seconds) for child in self.children]
        for root in self.roots:
            shutil.copytree(root / "checkpoints", self.s3, dirs_exist_ok=True)
        return codes

    def log(self):
        return "\n".join(root.with_suffix(".log").read_text(errors="replace") for root in self.roots)

    def wait_until(self, condition, seconds=120):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end and None in [child.poll() for child in self.children], self.log()[-3000:]
            time.sleep(0.02)


WORDS = [
    *("--pretrained_model_name_or_path", "ML_ROOT/input/data/base", "--train_shards", "ML_ROOT/input/data/train"),
    *("--species_csv", "ML_ROOT/input/data/tables/train_species.csv", "--resolution", 64, "--train_batch_size", 2),
    *("--seed", 7, "--logging_steps", 1, "--learning_rate", 1e-3, "--rank", 2, "--mixed_precision", "no"),
    *("--max_train_steps", STEPS, "--checkpointing_steps", 1000, "--dataloader_num_workers", 0),
    *("--validation_prompt", 'it\'s "Aquafin" $HOME', "--num_validation_images", 1, "--validation_steps", STEPS),
]


@pytest.mark.slow
@pytest.mark.parametrize("hosts", [1, 2])
def test_a_job_that_is_stopped_goes_on_in_the_next_and_hands_over_what_a_local_run_makes(world, tmp_path, hosts):
    s3 = tmp_path / "s3"
    first = Job(tmp_path / "first", s3, world, hosts).start("train", WORDS, COPY_CHANNELS="train", TMPDIR=tmp_path)
    run = first.roots[0] / "checkpoints"
    first.wait_until(lambda: rows(run) > 3)
    for child in first.children:
        child.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    assert first.wait() == [0] * hosts, first.log()[-3000:]
    assert time.monotonic() - sent < 30  # SageMaker waits 120 s
    assert not [process for root in first.roots for process in trainers(root / "checkpoints")]
    (saved,) = s3.glob("checkpoint-*/progress.json")
    assert 3 <= json.loads(saved.read_text())["step"] < STEPS
    assert not list(s3.glob(".checkpoint-*"))  # of a second host, whose folder is its own
    assert not [root for root in first.roots if (root / "output/failure").exists()]
    assert (tmp_path / "channels/train").is_dir() and "channels/train" in first.log()

    second = Job(tmp_path / "second", s3, world, hosts).start("train", WORDS)
    assert second.wait() == [0] * hosts, second.log()[-3000:]
    assert f"resumed from {second.roots[0] / 'checkpoints' / saved.parent.name}" in second.log()
    local = [*WORDS, "--checkpointing_steps", 1000]
    local = [str(word).replace("ML_ROOT", str(second.roots[0])) for word in local]
    whole = assert_ok(run_trainer(local, tmp_path / "whole", hosts))
    assert_same_run(whole, Result([0], [second.log()], second.roots[0] / "checkpoints"), step=STEPS)

    model, reports = second.roots[0] / "model", second.roots[0] / "output/data"
    for name in ("pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors"):
        assert (model / name).read_bytes() == (whole.output_dir / name).read_bytes()
    assert {"README.md", "config.yaml", "samples"} <= {path.name for path in model.iterdir()}
    assert rows(reports) == rows(whole.output_dir) and (reports / "run.json").exists()
    assert list((model / "samples").rglob("*.png"))
    for root in second.roots[1:]:
        assert not (root / "model").exists() and not (root / "output/data").exists()


@pytest.mark.slow
def test_a_failure_says_why_where_sagemaker_looks(world, tmp_path):
    job = Job(tmp_path / "job", tmp_path / "s3", world, 1).start(
        "train", [*WORDS, "--train_shards", "ML_ROOT/nowhere"]
    )
    assert job.wait() == [1]
    reason = (job.roots[0] / "output/failure").read_text()
    assert reason.startswith("train_sdxl_lora.py on 127.0.0.1, exit 1: ") and "error: --train_shards: " in reason
    assert "nowhere" in reason and len(reason.splitlines()) == 1
    assert not (job.roots[0] / "model").exists()


@pytest.mark.slow
def test_evaluation_and_sweep_copy_their_reports(world, tmp_path):
    panel = tmp_path / "panel.jsonl"
    panel.write_text("".join((ROOT / "demo/panel.jsonl").read_text().splitlines(keepends=True)[:2]))
    clip = f"local-dir:{ROOT / 'demo/clip'}"
    words = ["--pretrained_model_name_or_path", "ML_ROOT/input/data/base", "--prompts", panel, "--seeds", 0]
    words += ["--resolution", 64, "--num_inference_steps", 2, "--aesthetic_clip_model", clip, "--clip_model", clip]
    words += ["--aesthetic_head", ROOT / "demo/aesthetic-linearMSE.pth"]
    job = Job(tmp_path / "evaluate", tmp_path / "s3-evaluate", world, 1).start("evaluate", words)
    assert job.wait() == [0], job.log()[-3000:]
    assert {path.name for path in (job.roots[0] / "output/data").iterdir()} >= {"metrics.json", "report.html"}

    words = ["--objective", "val_loss", "--n_trials", 1, "--trial_steps", 2, "--accelerate_config"]
    words += ["accelerate_configs/ddp.yaml", "--", *WORDS[:-6], "--val_shards", "ML_ROOT/input/data/train"]
    words = [word for word in words if word not in ("--max_train_steps", STEPS)]
    job = Job(tmp_path / "sweep", tmp_path / "s3-sweep", world, 1).start("hpo", words)
    assert job.wait() == [0], job.log()[-3000:]
    assert (job.roots[0] / "model/best_params.yaml").exists()
    assert {path.name for path in (job.roots[0] / "output/data").iterdir()} >= {"trials.csv", "report.html"}


# ---- the parts


def test_hosts_are_ranked_by_name_and_come_from_the_variable_or_the_file(tmp_path, monkeypatch):
    config = {"hosts": ["algo-2", "algo-1"], "current_host": "algo-2", "network_interface_name": "eth0"}
    monkeypatch.setenv("SM_RESOURCE_CONFIG", json.dumps(config))
    hosts, host, interface = entry.find_hosts()
    assert (hosts, host, interface) == (["algo-1", "algo-2"], "algo-2", "eth0")
    words = entry.make_command("train", ["--x", "it's"], hosts, host, 8)
    at = {flag: words[words.index(flag) + 1] for flag in words if flag.startswith("--") and flag != "--x"}
    assert (at["--num_machines"], at["--num_processes"], at["--machine_rank"]) == ("2", "16", "1")
    assert at["--main_process_ip"] == "algo-1" and at["--resume_from_checkpoint"] == "latest"
    assert at["--config_file"] == str(ROOT / "accelerate_configs/ddp.yaml")
    assert words[-4:] == ["--x", "it's", "--resume_from_checkpoint", "latest"]
    monkeypatch.delenv("SM_RESOURCE_CONFIG")
    monkeypatch.setattr(entry, "ML", tmp_path)
    (tmp_path / "input/config").mkdir(parents=True)
    (tmp_path / "input/config/resourceconfig.json").write_text(json.dumps({"hosts": ["a"], "current_host": "a"}))
    assert entry.find_hosts() == (["a"], "a", None)


@pytest.fixture
def channel(tmp_path, monkeypatch):
    monkeypatch.setattr(entry, "ML", tmp_path)
    folder = tmp_path / "input/data/train"
    folder.mkdir(parents=True)
    for name in ("a.tar", "b.tar"):
        (folder / name).write_bytes(bytes(1500))
    assert entry.size_of(tmp_path) == 3000
    return folder


@pytest.mark.parametrize("free, fits", [(119e9, False), (120e9, True)])
def test_channels_are_copied_only_when_they_fit_one_and_a_half_times(channel, tmp_path, monkeypatch, free, fits):
    monkeypatch.setattr(entry, "size_of", lambda folder: 80e9)
    monkeypatch.setattr(entry.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    if fits:
        assert entry.copy_channels(["train"], tmp_path / "to") == {channel: tmp_path / "to/train"}
        assert sorted(path.name for path in (tmp_path / "to/train").iterdir()) == ["a.tar", "b.tar"]
        return
    with pytest.raises(entry.Failed) as error:
        entry.copy_channels(["train"], tmp_path / "to")
    assert "train: copying 80.0 GB needs 120.0 GB of free space" in str(error.value)
    assert "--volume_gb" in str(error.value) and not list((tmp_path / "to").iterdir())


def test_a_channel_that_is_not_there_is_named(channel, tmp_path):
    with pytest.raises(entry.Failed, match="--copy: there is no channel val"):
        entry.copy_channels(["val"], tmp_path / "to")


SECRETS = {"plain": "s3cr3t\n", "one": '{"key": "s3cr3t"}', "named": '{"other": "x", "WANDB_API_KEY": "s3cr3t"}'}


@pytest.mark.parametrize("name", SECRETS)
def test_secrets_reach_the_scripts_environment_alone(monkeypatch, capfd, name):
    monkeypatch.setattr(entry, "read_secret", lambda name, region: SECRETS[name])
    monkeypatch.setenv("SECRET_IDS", json.dumps({"WANDB_API_KEY": name}))
    env = entry.make_environment(0, None)
    assert env["WANDB_API_KEY"] == "s3cr3t" and "WANDB_API_KEY" not in os.environ
    assert "s3cr3t" not in "".join(capfd.readouterr())


def test_a_secret_that_cannot_be_read_fails_without_its_value(monkeypatch):
    monkeypatch.setenv("SECRET_IDS", '{"WANDB_API_KEY": "two"}')
    monkeypatch.setattr(entry, "read_secret", lambda name, region: '{"a": "s3cr3t", "b": "s3cr3t"}')
    with pytest.raises(entry.Failed) as error:
        entry.read_secrets()
    assert str(error.value) == "--secret WANDB_API_KEY=two: the secret has no entry WANDB_API_KEY"

    def refuse(name, region):
        raise RuntimeError("not allowed")

    monkeypatch.setattr(entry, "read_secret", refuse)
    with pytest.raises(entry.Failed, match="--secret WANDB_API_KEY=two: RuntimeError: not allowed"):
        entry.read_secrets()


def test_secrets_are_read_of_secrets_manager(monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    monkeypatch.setenv("SECRET_IDS", '{"WANDB_API_KEY": "prod/wandb"}')
    with moto.mock_aws():
        client = boto3.client("secretsmanager", region_name="eu-west-1")
        client.create_secret(Name="prod/wandb", SecretString="s3cr3t")
        assert entry.read_secrets() == {"WANDB_API_KEY": "s3cr3t"}


def test_the_run_in_wandb_is_the_trainers_own(monkeypatch):
    env = entry.make_environment(0, "eth0")
    assert env["WANDB_SAGEMAKER_DISABLE"] == "true"
    assert env["ACCELERATE_USE_CPU"] == "true" and env["NCCL_SOCKET_IFNAME"] == "eth0"
    assert "ACCELERATE_USE_CPU" not in entry.make_environment(4, None)


REASONS = {
    "Traceback\nValueError: a\ntrain_sdxl_lora.py: error: --x: bad\nSignalException: Error: later": "--x: bad",
    "step 1\rstep 2\nRuntimeError: no\nmore": "RuntimeError: no",
    "Killed": "Killed",
    "": "no output",
}


@pytest.mark.parametrize("output", REASONS)
def test_the_reason_is_the_scripts_own_last_word(output):
    assert entry.find_reason(output).endswith(REASONS[output])


def test_a_signal_before_the_script_runs_ends_the_job_without_failure(tmp_path):
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT / "sagemaker")!r})
import entry
entry.Stop()
os.kill(os.getpid(), signal.SIGTERM)
sys.exit(7)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
