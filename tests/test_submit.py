"""sagemaker/submit.py: the request it makes, field by field, against moto; what it sends; what it refuses.

The SDK has an environment of its own, and `make test` runs these tests there. Elsewhere most of them are skipped.
"""

import importlib.util
import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.sagemaker
NO_SDK = "needs the SageMaker SDK: make test-sagemaker"
ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("submit", ROOT / "sagemaker/submit.py")
submit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(submit)

ROLE = "arn:aws:iam::123456789012:role/trainer"
IMAGE = "123456789012.dkr.ecr.eu-west-1.amazonaws.com/mine:1"
ACCOUNT = f"--role {ROLE} --bucket models --region eu-west-1 --image {IMAGE} --no-wait".split()
WORDS = {
    "train": ["--max_train_steps", "5", "--train_shards", "/opt/ml/input/data/train", "--validation_prompt"],
    "hpo": ["--n_trials", "3", "--prompts", "demo/panel.jsonl", "--", "--max_train_steps", "5", "--validation_prompt"],
    "evaluate": ["--prompts", "demo/panel.jsonl", "--seeds", "0", "1", "--negative_prompt"],
}
HARD = """it's "quoted", $HOME `id` \\ é\nand a line"""  # a word that shells and JSON like to change


@pytest.fixture
def aws(monkeypatch):
    """An account that moto plays; the requests to create a job, in a list."""
    pytest.importorskip("sagemaker.train", reason=NO_SDK)
    import boto3
    import botocore.client
    import moto

    requests, original = [], botocore.client.BaseClient._make_api_call

    def call(client, operation, params):
        answer = original(client, operation, params)
        if operation == "CreateTrainingJob":
            requests.append(params)
        return answer

    monkeypatch.setattr(botocore.client.BaseClient, "_make_api_call", call)
    monkeypatch.setenv("SAGEMAKER_VALIDATE_ROLE", "false")  # moto does not know how to simulate a policy
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "planted-aws-key")
    monkeypatch.delenv("AWS_DEFAULT_REGION", raising=False)
    with moto.mock_aws():
        where = {"CreateBucketConfiguration": {"LocationConstraint": "eu-west-1"}}
        boto3.client("s3", region_name="eu-west-1").create_bucket(Bucket="models", **where)
        yield requests


def uploads():
    """{key: bytes} of all that lies in the bucket."""
    import boto3

    s3 = boto3.client("s3", region_name="eu-west-1")
    keys = [entry["Key"] for entry in s3.list_objects_v2(Bucket="models").get("Contents", [])]
    return {key: s3.get_object(Bucket="models", Key=key)["Body"].read() for key in keys}


def channel(name, uri, mode):
    place = {"S3DataType": "S3Prefix", "S3Uri": uri, "S3DataDistributionType": "FullyReplicated"}
    return {"ChannelName": name, "DataSource": {"S3DataSource": place}, "InputMode": mode}


@pytest.mark.parametrize("spot", [False, True], ids=["on-demand", "spot"])
@pytest.mark.parametrize("mode, count", [("train", 1), ("train", 4), ("hpo", 1), ("evaluate", 1)])
def test_the_request_field_by_field(aws, mode, count, spot):
    argv = ["--mode", mode, "--run_name", "pokefa", "--instance_type", "ml.g6e.2xlarge", *ACCOUNT]
    argv += ["--instance_count", str(count), "--volume_gb", "250", "--max_run_hours", "30", "--tag", "team=x", "a=b=c"]
    argv += ["--fastfile", "train=s3://data/train", "val=s3://data/val", "--file", "base=s3://data/sdxl"]
    argv += ["--secret", "WANDB_API_KEY=prod/wandb", "--env", "HF_HUB_OFFLINE=1", "--copy", "train"]
    argv += ["--subnets", "subnet-1", "subnet-2", "--security_groups", "sg-1"]
    argv += ["--spot", "--max_wait_hours", "40"] if spot else ["--keep_alive_minutes", "20"]
    name = submit.main([*argv, "--", *WORDS[mode], HARD])

    (request,) = aws
    root, inputs = "s3://models/pokefa", f"s3://models/pokefa/{name}/input"
    machines = {"InstanceType": "ml.g6e.2xlarge", "InstanceCount": count, "VolumeSizeInGB": 250}
    limits = {"MaxRuntimeInSeconds": 108000}
    wanted = {
        "TrainingJobName": name,
        "HyperParameters": {},
        "AlgorithmSpecification": {
            "TrainingInputMode": "File",
            "TrainingImage": IMAGE,
            "ContainerEntrypoint": ["/bin/bash"],
            "ContainerArguments": request["AlgorithmSpecification"]["ContainerArguments"],
        },
        "RoleArn": ROLE,
        "InputDataConfig": [
            channel("train", "s3://data/train", "FastFile"),
            channel("val", "s3://data/val", "FastFile"),
            channel("base", "s3://data/sdxl", "File"),
            channel("code", f"{inputs}/code", "File"),
            channel("sm_drivers", f"{inputs}/sm_drivers", "File"),
        ],
        "OutputDataConfig": {"S3OutputPath": f"{root}/results", "CompressionType": "GZIP"},
        "ResourceConfig": machines if spot else machines | {"KeepAlivePeriodInSeconds": 1200},
        "VpcConfig": {"Subnets": ["subnet-1", "subnet-2"], "SecurityGroupIds": ["sg-1"]},
        "StoppingCondition": limits | {"MaxWaitTimeInSeconds": 144000} if spot else limits,
        "Tags": [{"Key": "team", "Value": "x"}, {"Key": "a", "Value": "b=c"}],
        "EnableManagedSpotTraining": spot,
        "CheckpointConfig": {"S3Uri": f"{root}/checkpoints", "LocalPath": "/opt/ml/checkpoints"},
        "Environment": {
            "HF_HUB_OFFLINE": "1",
            "SECRET_IDS": '{"WANDB_API_KEY": "prod/wandb"}',
            "COPY_CHANNELS": "train",
        },
    }
    assert request == wanted
    assert name.startswith("pokefa-") and "sm_train.sh" in " ".join(
        wanted["AlgorithmSpecification"]["ContainerArguments"]
    )

    sent = {key.removeprefix(f"pokefa/{name}/input/"): body for key, body in uploads().items()}
    code = {key.removeprefix("code/"): body for key, body in sent.items() if key.startswith("code/")}
    named = {"demo/panel.jsonl"} - ({"demo/panel.jsonl"} if mode == "train" else set())
    files = {
        "train_sdxl_lora.py",
        "sdxl_data.py",
        "sdxl_lora.py",
        "sdxl_single_file.py",
        "sdxl_memory.py",
        "sdxl_preview.py",
        "sdxl_speed.py",
        "hpo_sweep.py",
        "evaluate.py",
        "requirements.txt",
        "sagemaker/entry.py",
    } | named
    assert code.keys() == files | {
        f"accelerate_configs/{path.name}" for path in (ROOT / "accelerate_configs").iterdir()
    }
    assert all(body == (ROOT / key).read_bytes() for key, body in code.items())
    (command,) = [line for line in sent["sm_drivers/sm_train.sh"].decode().split("CMD=$(cat") if "entry.py" in line]
    command = command.split("SAGEMAKER_BASE_COMMAND_EOF'\n")[1].split("\nSAGEMAKER_BASE_COMMAND_EOF")[0]
    assert shlex.split(command) == ["exec", "python", "sagemaker/entry.py", mode, *WORDS[mode], HARD]


SMALL = ["--run_name", "a", "--instance_type", "ml.g5.xlarge", *ACCOUNT]


def test_least_flags_ask_for_what_a_user_expects(aws):
    name = submit.main([*SMALL, "--", "--max_train_steps", "5"])
    (request,) = aws
    assert request["ResourceConfig"] == {"InstanceType": "ml.g5.xlarge", "InstanceCount": 1, "VolumeSizeInGB": 100}
    assert request["StoppingCondition"] == {"MaxRuntimeInSeconds": 24 * 3600}
    assert request["CheckpointConfig"]["S3Uri"] == "s3://models/a/checkpoints"
    assert not request.get("Environment") and "VpcConfig" not in request and "Tags" not in request
    assert [entry["ChannelName"] for entry in request["InputDataConfig"]] == ["code", "sm_drivers"]
    time.sleep(1.1)  # the SDK's names are told apart by the second
    again = submit.main([*SMALL, "--spot", "--", "--max_train_steps", "5"])
    assert again != name and aws[1]["CheckpointConfig"] == request["CheckpointConfig"]  # so it resumes
    assert aws[1]["StoppingCondition"] == {"MaxRuntimeInSeconds": 24 * 3600, "MaxWaitTimeInSeconds": 48 * 3600}


def test_the_image_is_by_default_awss_newest_for_pytorch(aws):
    argv = [word for word in SMALL if word not in ("--image", IMAGE)]
    submit.main([*argv, "--", "--max_train_steps", "5"])
    submit.main([*argv, "--instance_type", "ml.c5.xlarge", "--", "--max_train_steps", "5"])
    images = [request["AlgorithmSpecification"]["TrainingImage"] for request in aws]
    assert all(".dkr.ecr.eu-west-1.amazonaws.com/pytorch-training:2." in image for image in images)
    assert "-gpu-" in images[0] and "-cpu-" in images[1]


def test_no_secret_is_in_request_upload_or_log(aws, tmp_path, monkeypatch, capfd, caplog):
    """Secrets in the environment, in files beside the scripts, in version control, outputs and the home folder."""
    project = tmp_path / "project"
    shutil.copytree(ROOT, project, ignore=shutil.ignore_patterns(".git", ".venv", "demo", "tests", "__pycache__"))
    planted = [
        ".env",
        ".netrc",
        "key.pem",
        "notes.txt",
        ".git/config",
        "wandb/run/files/config.yaml",
        "runs/a/run.json",
    ]
    for name in [*planted, "sagemaker/.env", "accelerate_configs/.env", "sagemaker/__pycache__/a.pyc"]:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("planted-in-a-file")
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password planted-netrc")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "planted-in-environment")
    monkeypatch.setattr(submit, "PROJECT", project)
    caplog.set_level(logging.DEBUG, logger="sagemaker")
    argv = [*SMALL, "--secret", "WANDB_API_KEY=wandb", "HF_TOKEN=hf", "--", "--report_to", "wandb"]
    with pytest.raises(ValueError, match=r"accelerate_configs/.env: looks as if it held secrets"):
        submit.main(argv)
    assert aws == [] and uploads() == {}
    (project / "accelerate_configs/.env").unlink()
    submit.main(argv)
    submit.main(["--dry_run", *argv])
    out, err = capfd.readouterr()
    sent = uploads()
    assert len(aws) == 1 and len(sent) > 8
    for text in (json.dumps(aws), out, err, caplog.text, *(body.decode(errors="replace") for body in sent.values())):
        assert "planted" not in text
    assert not [key for key in sent if any(word in key for word in (".git", "wandb/", "runs/", ".env", "notes"))]
    assert json.loads(aws[0]["Environment"]["SECRET_IDS"]) == {"WANDB_API_KEY": "wandb", "HF_TOKEN": "hf"}


def test_a_dry_run_prints_the_request_and_sends_nothing(aws, capsys, monkeypatch):
    argv = [*SMALL, "--spot", "--secret", "WANDB_API_KEY=wandb", "--", "--max_train_steps", "5"]
    submit.main(["--dry_run", *argv])
    assert aws == [] and uploads() == {}
    out, err = capsys.readouterr()
    assert "train_sdxl_lora.py" in err and "python sagemaker/entry.py train --max_train_steps 5" in err
    monkeypatch.delenv("SAGEMAKER_VALIDATE_ROLE", raising=False)
    dry = json.loads(out)
    monkeypatch.setenv("SAGEMAKER_VALIDATE_ROLE", "false")
    name = submit.main(argv)
    assert json.dumps(dry).replace(dry["TrainingJobName"], name) == json.dumps(aws[0])


def test_a_dry_run_needs_neither_credentials_nor_network(tmp_path):
    pytest.importorskip("sagemaker.train", reason=NO_SDK)
    env = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")} | {"HOME": str(tmp_path)}
    env["HTTPS_PROXY"] = env["HTTP_PROXY"] = "http://127.0.0.1:9"  # nobody listens there
    argv = [sys.executable, ROOT / "sagemaker/submit.py", *SMALL, "--dry_run", "--", "--max_train_steps", "5"]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and json.loads(done.stdout)["RoleArn"] == ROLE, done.stderr


def test_what_is_printed_says_how_to_follow_stop_and_continue(aws, capsys):
    name = submit.main([*SMALL, "--", "--max_train_steps", "5"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"started {name}"
    assert [line.split()[0] for line in lines[1:]] == ["follow", "stop", "resume", "results"]
    assert all(name in line and "--region eu-west-1" in line for line in lines if "aws " in line)


REFUSED = [
    (["--run_name", "a_b"], "--run_name: found a_b"),
    (["--mode", "hpo", "--instance_count", "2"], "--instance_count: found 2; --mode hpo takes 1"),
    (["--instance_count", "0"], "--instance_count: found 0"),
    (["--spot", "--keep_alive_minutes", "5"], "--keep_alive_minutes:"),
    (["--max_wait_hours", "5"], "--max_wait_hours: needs --spot"),
    (["--spot", "--max_wait_hours", "5"], "--max_wait_hours: needs --spot, and must not be less"),
    (["--subnets", "s"], "--subnets and --security_groups: give both"),
    (["--fastfile", "train"], "--fastfile: found train; expected NAME=VALUE"),
    (["--fastfile", "train=/data"], "--fastfile: found train=/data; expected NAME=s3://BUCKET/FOLDER"),
    (["--file", "code=s3://a/b"], "where NAME is not code or sm_drivers"),
    (["--copy", "val"], "--copy: found val; expected a channel of --fastfile"),
    (["--env", "WANDB_API_KEY=x"], "--env: WANDB_API_KEY looks like a secret"),
    (["--", "--output_dir", "x"], "--output_dir: leave it out; the container sets it"),
    (["--", "--hub_token=x"], "--hub_token: the request would contain it"),
    (["--", "--learning_rat", "1"], "train_sdxl_lora.py has no such flag; did you mean --learning_rate?"),
    (
        ["--mode", "hpo", "--", "--n_trials", "2", "--", "--n_trials", "2"],
        "--n_trials: train_sdxl_lora.py has no such",
    ),
    (["--"], "--: found no flags of the script"),
]


@pytest.mark.parametrize("words, message", REFUSED, ids=[" ".join(words) for words, _ in REFUSED])
def test_bad_flags_are_one_line_before_anything_is_sent(words, message, capsys):
    own, script = (words[: words.index("--")], words[words.index("--") :]) if "--" in words else (words, None)
    with pytest.raises(SystemExit) as left:
        submit.main([*SMALL, *own, *(script or ["--", "--max_train_steps", "5"])])
    assert left.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


UNFIT = [("{tmp}/panel.jsonl", "is outside"), ("no.jsonl", "no file"), ("{tmp}/key.pem", "looks as if it held")]


@pytest.mark.parametrize("name, message", UNFIT)
def test_files_that_cannot_be_sent_are_named(tmp_path, name, message):
    for file in ("panel.jsonl", "key.pem"):
        (tmp_path / file).write_text("{}")
    argv = [*SMALL, "--include", name.format(tmp=tmp_path), "--", "--max_train_steps", "5"]
    with pytest.raises(ValueError, match=message):
        submit.main(argv)


def test_errors_of_aws_are_one_line(aws, monkeypatch, capsys):
    argv = ["submit.py", *SMALL, "--", "--max_train_steps", "5"]
    argv[argv.index("models")] = "nobody_s bucket"
    monkeypatch.setattr(sys, "argv", argv)
    assert submit.run() == 1
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith("submit.py: error: ") and "nobody_s bucket" in err[-1]
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", "/nonexistent")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert submit.run() == 1
    assert "no AWS credentials; run `aws configure`" in capsys.readouterr().err


def test_the_folder_does_not_shadow_the_sdk():
    """From the repository's root, where `python -m pytest` and `accelerate launch` put themselves on the path."""
    assert not list((ROOT / "sagemaker").rglob("__init__.py"))
    code = "import sagemaker; print(getattr(sagemaker, '__file__', None) or list(sagemaker.__path__))"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path}
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True).stdout
    installed = importlib.util.find_spec("sagemaker.train") is not None
    assert ("site-packages" in shown) == installed, shown
