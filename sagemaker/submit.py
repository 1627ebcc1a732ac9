#!/usr/bin/env python
"""Runs train_sdxl_lora.py, hpo_sweep.py or evaluate.py as a SageMaker job, with the same flags as anywhere.

    pip install -r sagemaker/requirements.txt
    python sagemaker/submit.py --run_name pokefa --instance_type ml.g6e.2xlarge --spot \\
        --secret WANDB_API_KEY=wandb --fastfile train=s3://my-bucket/pokefa/train \\
        val=s3://my-bucket/pokefa/val --file base=s3://my-bucket/sdxl -- \\
        --pretrained_model_name_or_path /opt/ml/input/data/base --train_shards /opt/ml/input/data/train \\
        --val_shards /opt/ml/input/data/val --max_train_steps 10000 --report_to wandb

What stands after -- goes to the script as it is; a channel NAME is the folder /opt/ml/input/data/NAME there.
Checkpoints are kept in s3://BUCKET/RUN_NAME/checkpoints: a spot job that is interrupted goes on from there by itself,
and the same command again continues a run that ended early. --dry_run prints the request and sends nothing.
"""

import argparse
import difflib
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
from datetime import datetime
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
SCRIPTS = {"train": "train_sdxl_lora.py", "hpo": "hpo_sweep.py", "evaluate": "evaluate.py"}
SENT = (*SCRIPTS.values(), "report.py", "requirements.txt", "accelerate_configs", "sagemaker/entry.py")
CONTAINERS = ("--output_dir", "--resume_from_checkpoint", "--overwrite_output_dir")  # flags that entry.py gives
SECRET_NAME = re.compile(r"key|token|secret|password|passwd|credential", re.IGNORECASE)
SECRET_FILE = re.compile(r"^\.env|netrc|credential|secret|\.pem$|\.key$|^id_[a-z0-9]+$", re.IGNORECASE)
MAX_SPOT_WAIT = 2  # × max_run that a spot job may take in all, waiting for capacity included
HOUR = 3600


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        usage="submit.py --run_name NAME --instance_type TYPE [--FLAG VALUE]… -- FLAGS OF THE SCRIPT",
        allow_abbrev=False,
    )
    add = parser.add_argument_group("What").add_argument
    add("--mode", choices=("train", "hpo", "evaluate"), default="train", help="which script; default: %(default)s")
    add("--run_name", required=True, metavar="NAME", help="folder in the bucket and beginning of the jobs' names")
    add("--include", nargs="+", default=[], metavar="FILE",
        help="more of the project's files to send; those that the script's flags name are sent anyway")  # fmt: skip
    add = parser.add_argument_group("Machines").add_argument
    add("--instance_type", required=True, metavar="TYPE", help="say ml.g6e.2xlarge")
    add("--instance_count", type=int, default=1, metavar="N", help="only --mode train takes more than 1")
    add("--volume_gb", type=int, default=100, metavar="GB", help="disk of each machine; default: %(default)s")
    add("--spot", action="store_true", help="spare capacity, cheaper; the run is interrupted and goes on by itself")
    add(
        "--max_run_hours",
        type=float,
        default=24,
        metavar="H",
        help="the run saves and ends then; default: %(default)s",
    )
    add(
        "--max_wait_hours",
        type=float,
        metavar="H",
        help="limit for a spot job, waiting included; default: 2 × --max_run_hours",
    )
    add("--keep_alive_minutes", type=float, default=0, metavar="MIN",
        help="keep the machines warm for the next job; not with --spot")  # fmt: skip
    add = parser.add_argument_group("Data").add_argument
    add("--fastfile", nargs="+", default=[], metavar="NAME=S3URI", help="channels read as needed, say shards")
    add("--file", nargs="+", default=[], metavar="NAME=S3URI", help="channels copied at the start, say the base model")
    add("--copy", nargs="+", default=[], metavar="NAME",
        help="--fastfile channels that the container copies to its disk first, if they fit 1.5 times")  # fmt: skip
    add = parser.add_argument_group("Account").add_argument
    add(
        "--role",
        metavar="ARN",
        help="the job's IAM role; default: the one that you work in, or the SDK's configuration",
    )
    add("--bucket", metavar="NAME", help="for code, checkpoints and results; default: SageMaker's of the account")
    add("--region", metavar="NAME", help="default: AWS's configuration")
    add("--image", metavar="URI", help="container image; default: AWS's newest for training with PyTorch")
    add("--secret", nargs="+", default=[], metavar="VARIABLE=ID",
        help="environment variables that the container reads from Secrets Manager, say WANDB_API_KEY=wb")  # fmt: skip
    add("--env", nargs="+", default=[], metavar="VARIABLE=VALUE", help="environment variables that are no secrets")
    add("--tag", nargs="+", default=[], metavar="KEY=VALUE")
    add("--subnets", nargs="+", metavar="ID", help="of your VPC; with --security_groups")
    add("--security_groups", nargs="+", metavar="ID")
    add = parser.add_argument_group("Submission").add_argument
    add("--wait", action=argparse.BooleanOptionalAction, default=True, help="show the job's log until it ends")
    add("--dry_run", action="store_true", help="print the request to SageMaker and what would be sent; send nothing")
    return parser


def read_pairs(parser, flag, words):
    """{name: value} of NAME=VALUE words."""
    for word in words:
        if not re.fullmatch(r"[\w.:/@-]+=.+", word):
            parser.error(f"{flag}: found {word}; expected NAME=VALUE")
    return dict(word.split("=", 1) for word in words)


def check_args(parser, args):
    if not re.fullmatch(r"[a-zA-Z0-9][a-zA-Z0-9-]{0,46}", args.run_name):
        parser.error(f"--run_name: found {args.run_name}; expected up to 47 letters, digits and hyphens")
    if args.instance_count < 1 or (args.instance_count > 1 and args.mode != "train"):
        parser.error(f"--instance_count: found {args.instance_count}; --mode {args.mode} takes "
            + ("1 or more" if args.mode == "train" else "1, its processes share a folder"))  # fmt: skip
    if args.spot and args.keep_alive_minutes:
        parser.error("--keep_alive_minutes: SageMaker keeps no spot machines warm; leave it or --spot out")
    if args.max_wait_hours is not None and (not args.spot or args.max_wait_hours < args.max_run_hours):
        parser.error("--max_wait_hours: needs --spot and at least --max_run_hours")
    if bool(args.subnets) != bool(args.security_groups):
        parser.error("--subnets and --security_groups: give both or neither")
    for flag in ("fastfile", "file", "secret", "env", "tag"):
        setattr(args, flag, read_pairs(parser, f"--{flag}", getattr(args, flag)))
    for flag, channels in (("--fastfile", args.fastfile), ("--file", args.file)):
        for name, uri in channels.items():
            if not re.fullmatch(r"s3://[^/]+/.+", uri) or name in ("code", "sm_drivers"):
                parser.error(
                    f"{flag}: found {name}={uri}; expected NAME=s3://BUCKET/FOLDER, NAME not code or sm_drivers"
                )
    for name in args.copy:
        if name not in args.fastfile:
            parser.error(f"--copy: found {name}; expected a channel of --fastfile")
    for variable in args.env:
        if SECRET_NAME.search(variable):
            parser.error(
                f"--env: {variable} looks like a secret and would stand in the request; use --secret {variable}=ID"
            )


def check_words(parser, script, words):
    """Finds here, not after minutes of a machine's start, which flags a script does not have or may not be given."""
    known = set(re.findall(r'"(--[a-z]\w*)"', (PROJECT / script).read_text()))
    for flag in [word.split("=")[0] for word in words if word.startswith("--")]:
        if flag in CONTAINERS:
            parser.error(f"{flag}: the container gives it, see --run_name; leave it out")
        if flag == "--hub_token":
            parser.error("--hub_token: would stand in the request; use --secret HF_TOKEN=ID")
        if flag.replace("--no-", "--") not in known:
            near = difflib.get_close_matches(flag, known, 1)
            parser.error(f"{flag}: {script} has no such flag" + (f"; did you mean {near[0]}?" if near else ""))


def parse_args(argv=None):
    """(args, the script's words)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    own, words = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = make_parser()
    args = parser.parse_args(own)
    if not words:
        parser.error("--: found no flags of the script; give them after --, say -- --max_train_steps 1000")
    check_args(parser, args)
    split = words.index("--") if "--" in words else len(words)  # a sweep's own flags, and the trainer's
    check_words(parser, SCRIPTS[args.mode], words[:split])
    check_words(parser, SCRIPTS["train"], words[split + 1 :])
    args.max_wait_hours = args.max_wait_hours or MAX_SPOT_WAIT * args.max_run_hours
    return args, words


def find_files(args, words):
    """Files to send, relative to the project: the scripts, --include and those that the script's flags name.

    Errors: ValueError when one is missing, outside of the project, or looks like it holds secrets.
    """
    files = []
    for name in SENT:
        path = PROJECT / name
        files += [p for p in sorted(path.rglob("*")) if p.is_file()] if path.is_dir() else [path]
    for word in words:
        value = word.split("=", 1)[1] if word.startswith("--") and "=" in word else word
        if (PROJECT / value).is_file() or Path(value).is_file():
            files.append((PROJECT / value).resolve() if (PROJECT / value).is_file() else Path(value).resolve())
    files += [(PROJECT / name).resolve() for name in args.include]
    for path in files:
        if not path.is_file():
            raise ValueError(f"--include: no file {path}")
        if SECRET_FILE.search(path.name):
            raise ValueError(f"{path}: looks like it holds secrets; give the container a --secret instead")
        if not path.is_relative_to(PROJECT):
            raise ValueError(f"{path}: lies outside of {PROJECT}; copy it there and give its relative path")
    return sorted({path.relative_to(PROJECT) for path in files})


def stage_files(files, folder):
    """Copies the project's files to send into an empty folder."""
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(PROJECT / file, folder / file)


def make_environment(args):
    env = {"SECRET_IDS": json.dumps(args.secret)} if args.secret else {}
    return args.env | env | ({"COPY_CHANNELS": ",".join(args.copy)} if args.copy else {})


def make_channel(name, uri, mode):
    from sagemaker.core.shapes import Channel, DataSource, S3DataSource

    source = S3DataSource(s3_data_type="S3Prefix", s3_uri=uri, s3_data_distribution_type="FullyReplicated")
    return Channel(channel_name=name, data_source=DataSource(s3_data_source=source), input_mode=mode)


def find_image(args, region):
    """URI of AWS's newest container image for training with PyTorch."""
    from sagemaker.core import image_uris
    from sagemaker.core.image_uris import config_for_framework

    versions = config_for_framework("pytorch")["training"]["versions"]
    newest = max(versions, key=lambda version: [int(part) for part in version.split(".")])
    return image_uris.retrieve(
        "pytorch", region, version=newest, py_version=versions[newest]["py_versions"][-1], image_scope="training",
        instance_type=args.instance_type,
    )  # fmt: skip


def make_trainer(args, words, session, code):
    """ModelTrainer of the job; `code` is the folder that is sent."""
    from sagemaker.core.training.configs import (
        CheckpointConfig,
        Compute,
        Networking,
        OutputDataConfig,
        SourceCode,
        StoppingCondition,
        Tag,
    )  # fmt: skip
    from sagemaker.train import ModelTrainer

    root = f"s3://{session.default_bucket()}/{args.run_name}"
    seconds = int(args.max_run_hours * HOUR)
    compute = {"instance_type": args.instance_type, "instance_count": args.instance_count}
    compute |= {"volume_size_in_gb": args.volume_gb, "enable_managed_spot_training": args.spot}
    if args.keep_alive_minutes:
        compute["keep_alive_period_in_seconds"] = int(args.keep_alive_minutes * 60)
    limit = {"max_wait_time_in_seconds": int(args.max_wait_hours * HOUR)} if args.spot else {}
    network = {"subnets": args.subnets, "security_group_ids": args.security_groups}
    return ModelTrainer(
        sagemaker_session=session,
        role=args.role,
        base_job_name=args.run_name,
        training_image=args.image or find_image(args, session.boto_region_name),
        source_code=SourceCode(
            source_dir=str(code), requirements="requirements.txt",
            # exec: otherwise SIGTERM ends at the shell and nothing is saved
            command="exec python sagemaker/entry.py", args=[args.mode, *words],
        ),
        compute=Compute(**compute),
        stopping_condition=StoppingCondition(max_runtime_in_seconds=seconds, **limit),
        input_data_config=[
            *(make_channel(name, uri, "FastFile") for name, uri in args.fastfile.items()),
            *(make_channel(name, uri, "File") for name, uri in args.file.items()),
        ],
        output_data_config=OutputDataConfig(s3_output_path=f"{root}/results"),
        checkpoint_config=CheckpointConfig(s3_uri=f"{root}/checkpoints", local_path="/opt/ml/checkpoints"),
        environment=make_environment(args),
        networking=Networking(**network) if args.subnets else None,
        tags=[Tag(key=key, value=value) for key, value in args.tag.items()] or None,
    )  # fmt: skip


class NothingSent(Exception):
    """Carries the request that a dry run did not send."""


def keep_from_sending(boto_session, bucket):
    """Lets no request of the session go out: S3 seems to agree, CreateTrainingJob raises NothingSent."""
    from botocore.awsrequest import AWSResponse

    def agree(**_):
        return AWSResponse("", 200, {}, None), {"Buckets": [{"Name": bucket, "CreationDate": datetime.now()}]}

    def refuse(params, **_):
        raise NothingSent(params)

    for service in ("s3", "iam", "sts"):
        boto_session.events.register(f"before-call.{service}", agree)
    boto_session.events.register("provide-client-params.sagemaker.CreateTrainingJob", refuse)


def make_session(args):
    """SDK session of the account. Errors: ValueError when region or credentials are missing."""
    import boto3
    from sagemaker.core.helper.session_helper import Session

    boto_session = boto3.Session(region_name=args.region)
    if boto_session.region_name is None:
        raise ValueError("--region: none given and none in AWS's configuration; say --region us-east-1")
    if args.dry_run:
        if not (args.role and args.bucket):
            raise ValueError("--dry_run: asks nothing of the account; give --role and --bucket")
        boto_session = boto3.Session("none", "none", region_name=boto_session.region_name)
        keep_from_sending(boto_session, args.bucket)
        os.environ["SAGEMAKER_VALIDATE_ROLE"] = "false"
    elif boto_session.get_credentials() is None:
        raise ValueError("no AWS credentials; run `aws configure` or `aws sso login`, or set AWS_PROFILE")
    return Session(boto_session, default_bucket=args.bucket)


def follow(args, region, name):
    """How to look at a job, stop it and get its results."""
    of = f"--region {region}"
    return (
        f"follow    aws logs tail /aws/sagemaker/TrainingJobs --follow --log-stream-name-prefix {name} {of}\n"
        f"stop      aws sagemaker stop-training-job --training-job-name {name} {of}   (the run saves)\n"
        f"go on     the same command again\n"
        f"results   aws s3 cp --recursive s3://{args.bucket}/{args.run_name}/results/{name}/output . {of}"
    )


def main(argv=None):
    """Name of the job, or of a dry run the request. Errors: ValueError with what to do."""
    args, words = parse_args(argv)
    files = find_files(args, words)
    try:
        import sagemaker.train  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{error}; run `pip install -r sagemaker/requirements.txt`") from error
    session = make_session(args)
    args.bucket = session.default_bucket()
    with tempfile.TemporaryDirectory() as folder:
        stage_files(files, Path(folder))
        trainer = make_trainer(args, words, session, folder)
        if args.dry_run:
            try:
                trainer.train(wait=False, logs=False)
            except NothingSent as kept:
                request = kept.args[0]
            print(json.dumps(request, indent=2))
            print("command", shlex.join(["python", "sagemaker/entry.py", args.mode, *words]), file=sys.stderr)
            print("files", *files, sep="\n  ", file=sys.stderr)
            return request
        trainer.train(wait=False, logs=False)
    job = trainer._latest_training_job
    print(
        f"started {job.training_job_name}\n{follow(args, session.boto_region_name, job.training_job_name)}", flush=True
    )
    if args.wait:
        try:
            job.wait(logs=True)
        except KeyboardInterrupt:
            print("the job goes on; see above")
    return job.training_job_name


def run():
    """Exit status of main(); what is wrong is one line."""
    try:
        main()
    except Exception as error:
        if not isinstance(error, ValueError) and not type(error).__module__.startswith(("botocore", "boto3")):
            raise
        print("submit.py: error:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run())
