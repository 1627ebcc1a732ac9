#!/usr/bin/env python
"""Run train_sdxl_lora.py, hpo_sweep.py or evaluate.py as a SageMaker job, with the same flags as elsewhere.

    pip install -r sagemaker/requirements.txt
    python sagemaker/submit.py --run_name pokefa --instance_type ml.g6e.2xlarge --spot \\
        --secret WANDB_API_KEY=wandb --fastfile train=s3://my-bucket/pokefa/train \\
        val=s3://my-bucket/pokefa/val --file base=s3://my-bucket/sdxl -- \\
        --pretrained_model_name_or_path /opt/ml/input/data/base --train_shards /opt/ml/input/data/train \\
        --val_shards /opt/ml/input/data/val --max_train_steps 10000 --report_to wandb

Everything after -- is passed to the script unchanged. In the container, channel NAME is /opt/ml/input/data/NAME.
Checkpoints are kept in s3://BUCKET/RUN_NAME/checkpoints. An interrupted spot job resumes from there by itself; to
resume a run that ended early, run the same command again. --dry_run prints the request and sends nothing.
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
SENT = (
    *SCRIPTS.values(),
    "sdxl_data.py",
    "sdxl_lora.py",
    "sdxl_single_file.py",
    "sdxl_memory.py",
    "sdxl_preview.py",
    "sdxl_speed.py",
    "requirements.txt",
    "accelerate_configs",
    "sagemaker/entry.py",
)
SET_BY_ENTRY = ("--output_dir", "--resume_from_checkpoint", "--overwrite_output_dir")  # flags that entry.py sets
SECRET_NAME = re.compile(r"key|token|secret|password|passwd|credential", re.IGNORECASE)
SECRET_FILE = re.compile(r"^\.env|netrc|credential|secret|\.pem$|\.key$|^id_[a-z0-9]+$", re.IGNORECASE)
MAX_SPOT_WAIT = 2  # a spot job may take this many times --max_run_hours, including the wait for capacity
HOUR = 3600


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        usage="submit.py --run_name NAME --instance_type TYPE [--FLAG VALUE]… -- FLAGS OF THE SCRIPT",
        allow_abbrev=False,
    )
    add = parser.add_argument_group("What").add_argument
    add(
        "--mode",
        choices=("train", "hpo", "evaluate"),
        default="train",
        help="which script to run; default: %(default)s",
    )
    add("--run_name", required=True, metavar="NAME", help="folder in the bucket, and prefix of the job names")
    add("--include", nargs="+", default=[], metavar="FILE",
        help="more files of the project to send; files named by the script's flags are sent anyway")  # fmt: skip
    add = parser.add_argument_group("Machines").add_argument
    add("--instance_type", required=True, metavar="TYPE", help="for example ml.g6e.2xlarge")
    add(
        "--instance_count",
        type=int,
        default=1,
        metavar="N",
        help="number of machines; more than 1 only with --mode train",
    )
    add("--volume_gb", type=int, default=100, metavar="GB", help="disk of each machine; default: %(default)s")
    add(
        "--spot", action="store_true", help="cheaper spare capacity; the run may be interrupted, and resumes by itself"
    )
    add("--max_run_hours", type=float, default=24, metavar="H",
        help="time limit, after which the run saves and ends; default: %(default)s")  # fmt: skip
    add("--max_wait_hours", type=float, metavar="H",
        help="time limit of a spot job, including the wait for capacity; default: 2 × --max_run_hours")  # fmt: skip
    add("--keep_alive_minutes", type=float, default=0, metavar="MIN",
        help="keep the machines ready for the next job; not with --spot")  # fmt: skip
    add = parser.add_argument_group("Data").add_argument
    add(
        "--fastfile",
        nargs="+",
        default=[],
        metavar="NAME=S3URI",
        help="channels that are read as needed, for example shards",
    )
    add(
        "--file",
        nargs="+",
        default=[],
        metavar="NAME=S3URI",
        help="channels that are copied at the start, for example the base model",
    )
    add("--copy", nargs="+", default=[], metavar="NAME",
        help="--fastfile channels to copy to the container's disk first; needs 1.5 times their size free")  # fmt: skip
    add = parser.add_argument_group("Account").add_argument
    add("--role", metavar="ARN", help="IAM role of the job; default: the current one, or the one in the SDK's config")
    add("--bucket", metavar="NAME", help="for code, checkpoints and results; default: SageMaker's own bucket")
    add("--region", metavar="NAME", help="default: the one in AWS's config")
    add("--image", metavar="URI", help="container image; default: AWS's newest PyTorch training image")
    add("--secret", nargs="+", default=[], metavar="VARIABLE=ID",
        help="environment variables read from Secrets Manager in the container, e.g. WANDB_API_KEY=wb")  # fmt: skip
    add("--env", nargs="+", default=[], metavar="VARIABLE=VALUE", help="other environment variables; no secrets")
    add("--tag", nargs="+", default=[], metavar="KEY=VALUE", help="tags of the job")
    add("--subnets", nargs="+", metavar="ID", help="subnets of your VPC; needs --security_groups")
    add("--security_groups", nargs="+", metavar="ID", help="security groups of your VPC; needs --subnets")
    add = parser.add_argument_group("Submission").add_argument
    add("--wait", action=argparse.BooleanOptionalAction, default=True, help="show the log of the job until it ends")
    add("--dry_run", action="store_true", help="print the request and the files that would be sent; send nothing")
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
        expected = "1 or more" if args.mode == "train" else "1, because its processes share a folder"
        parser.error(f"--instance_count: found {args.instance_count}; --mode {args.mode} takes {expected}")
    if args.spot and args.keep_alive_minutes:
        parser.error("--keep_alive_minutes: does not work with --spot; leave one of them out")
    if args.max_wait_hours is not None and (not args.spot or args.max_wait_hours < args.max_run_hours):
        parser.error("--max_wait_hours: needs --spot, and must not be less than --max_run_hours")
    if bool(args.subnets) != bool(args.security_groups):
        parser.error("--subnets and --security_groups: give both or neither")
    for flag in ("fastfile", "file", "secret", "env", "tag"):
        setattr(args, flag, read_pairs(parser, f"--{flag}", getattr(args, flag)))
    for flag, channels in (("--fastfile", args.fastfile), ("--file", args.file)):
        for name, uri in channels.items():
            if not re.fullmatch(r"s3://[^/]+/.+", uri) or name in ("code", "sm_drivers"):
                expected = "NAME=s3://BUCKET/FOLDER, where NAME is not code or sm_drivers"
                parser.error(f"{flag}: found {name}={uri}; expected {expected}")
    for name in args.copy:
        if name not in args.fastfile:
            parser.error(f"--copy: found {name}; expected a channel of --fastfile")
    for variable in args.env:
        if SECRET_NAME.search(variable):
            found = f"{variable} looks like a secret, and the request would contain its value"
            parser.error(f"--env: {found}; use --secret {variable}=ID")


def check_words(parser, script, words):
    """Exits with a one-line error for a flag that the script does not have, before a machine is started."""
    known = set(re.findall(r'"(--[a-z]\w*)"', (PROJECT / script).read_text()))
    for flag in [word.split("=")[0] for word in words if word.startswith("--")]:
        if flag in SET_BY_ENTRY:
            parser.error(f"{flag}: leave it out; the container sets it, see --run_name")
        if flag == "--hub_token":
            parser.error("--hub_token: the request would contain it; use --secret HF_TOKEN=ID")
        if flag.replace("--no-", "--") not in known:
            near = difflib.get_close_matches(flag, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            parser.error(f"{flag}: {script} has no such flag{hint}")


def parse_args(argv=None):
    """(args, the words after --, which are for the script)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    end = argv.index("--") if "--" in argv else len(argv)
    own = argv[:end]
    words = argv[end + 1 :]
    parser = make_parser()
    args = parser.parse_args(own)
    if not words:
        parser.error("--: found no flags of the script; give them after --, e.g. -- --max_train_steps 1000")
    check_args(parser, args)
    split = words.index("--") if "--" in words else len(words)  # of a sweep: its own flags, then the trainer's
    check_words(parser, SCRIPTS[args.mode], words[:split])
    check_words(parser, SCRIPTS["train"], words[split + 1 :])
    args.max_wait_hours = args.max_wait_hours or MAX_SPOT_WAIT * args.max_run_hours
    return args, words


def find_files(args, words):
    """Files to send, relative to the project: the scripts, --include, and files named by the script's flags.

    Errors: ValueError when one is missing, is outside the project, or looks as if it held secrets.
    """
    files = []
    for name in SENT:
        path = PROJECT / name
        files += [p for p in sorted(path.rglob("*")) if p.is_file()] if path.is_dir() else [path]
    for word in words:
        value = word.split("=", 1)[1] if word.startswith("--") and "=" in word else word
        named = [path for path in (PROJECT / value, Path(value)) if path.is_file()]
        files += [path.resolve() for path in named[:1]]
    files += [(PROJECT / name).resolve() for name in args.include]
    for path in files:
        if not path.is_file():
            raise ValueError(f"--include: no file {path}")
        if SECRET_FILE.search(path.name):
            raise ValueError(f"{path}: looks as if it held secrets; use --secret instead")
        if not path.is_relative_to(PROJECT):
            raise ValueError(f"{path}: is outside {PROJECT}; copy it there and give the relative path")
    return sorted({path.relative_to(PROJECT) for path in files})


def stage_files(files, folder):
    """Copies the files to send into an empty folder."""
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(PROJECT / file, folder / file)


def make_environment(args):
    env = dict(args.env)
    if args.secret:
        env["SECRET_IDS"] = json.dumps(args.secret)
    if args.copy:
        env["COPY_CHANNELS"] = ",".join(args.copy)
    return env


def make_channel(name, uri, mode):
    from sagemaker.core.shapes import Channel, DataSource, S3DataSource

    source = S3DataSource(s3_data_type="S3Prefix", s3_uri=uri, s3_data_distribution_type="FullyReplicated")
    return Channel(channel_name=name, data_source=DataSource(s3_data_source=source), input_mode=mode)


def find_image(args, region):
    """URI of AWS's newest PyTorch training image."""
    from sagemaker.core import image_uris
    from sagemaker.core.image_uris import config_for_framework

    versions = config_for_framework("pytorch")["training"]["versions"]
    newest = max(versions, key=lambda version: [int(part) for part in version.split(".")])
    return image_uris.retrieve(
        "pytorch", region, version=newest, py_version=versions[newest]["py_versions"][-1], image_scope="training",
        instance_type=args.instance_type,
    )  # fmt: skip


def make_trainer(args, words, session, code):
    """The SDK's ModelTrainer for the job; `code` is the folder to send."""
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
            # exec: otherwise only the shell gets SIGTERM, and nothing is saved
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
    """Carries the request that --dry_run did not send."""


def block_requests(boto_session, bucket):
    """Sends no request of the session: S3, IAM and STS seem to succeed, CreateTrainingJob raises NothingSent."""
    from botocore.awsrequest import AWSResponse

    def succeed(**_):
        return AWSResponse("", 200, {}, None), {"Buckets": [{"Name": bucket, "CreationDate": datetime.now()}]}

    def refuse(params, **_):
        raise NothingSent(params)

    for service in ("s3", "iam", "sts"):
        boto_session.events.register(f"before-call.{service}", succeed)
    boto_session.events.register("provide-client-params.sagemaker.CreateTrainingJob", refuse)


def make_session(args):
    """SDK session of the account. Errors: ValueError when region or credentials are missing."""
    import boto3
    from sagemaker.core.helper.session_helper import Session

    boto_session = boto3.Session(region_name=args.region)
    if boto_session.region_name is None:
        raise ValueError("--region: missing, also in AWS's config; give e.g. --region us-east-1")
    if args.dry_run:
        if not (args.role and args.bucket):
            raise ValueError("--dry_run: needs --role and --bucket, because it does not ask the account")
        boto_session = boto3.Session("none", "none", region_name=boto_session.region_name)
        block_requests(boto_session, args.bucket)
        os.environ["SAGEMAKER_VALIDATE_ROLE"] = "false"
    elif boto_session.get_credentials() is None:
        raise ValueError("no AWS credentials; run `aws configure` or `aws sso login`, or set AWS_PROFILE")
    return Session(boto_session, default_bucket=args.bucket)


def follow(args, region, name):
    """Text: how to follow a job, stop it, resume it and get its results."""
    of = f"--region {region}"
    return (
        f"follow    aws logs tail /aws/sagemaker/TrainingJobs --follow --log-stream-name-prefix {name} {of}\n"
        f"stop      aws sagemaker stop-training-job --training-job-name {name} {of}   (the run saves)\n"
        f"resume    run the same command again\n"
        f"results   aws s3 cp --recursive s3://{args.bucket}/{args.run_name}/results/{name}/output . {of}"
    )


def main(argv=None):
    """Submits the job and returns its name, or with --dry_run the request. Errors: ValueError saying what to do."""
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
    print(f"started {job.training_job_name}")
    print(follow(args, session.boto_region_name, job.training_job_name), flush=True)
    if args.wait:
        try:
            job.wait(logs=True)
        except KeyboardInterrupt:
            print("the job keeps running; see above how to follow and stop it")
    return job.training_job_name


def run():
    """Runs main() and returns the exit status; an error of the user or of AWS is one line."""
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
