#!/usr/bin/env python
"""Searches the hyperparameters of train_sdxl_lora.py with Optuna: each trial is a short run, scored by evaluate.py.

    python hpo_sweep.py --output_dir sweeps/a --n_trials 40 --trial_steps 1000 --prompts prompts.jsonl -- \\
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 --train_shards data/train \\
        --val_shards data/val --resolution 1024 --train_batch_size 4 --mixed_precision bf16 --train_text_encoder

    python train_sdxl_lora.py --config sweeps/a/best_params.yaml --max_train_steps 10000

The flags after -- go to every trial. To resume a study that was interrupted or killed, run the same command again.
`--workers N` splits the GPUs of one machine among N workers. To use several machines, run the same command on each
with the same --output_dir on a shared file system. Open OUTPUT_DIR/report.html at any time to see the results so far.

Sections of this file:
     1 Arguments   2 Search space   3 Sweep   4 Study   5 Processes   6 Trial   7 Report   8 Main
"""

import argparse
import collections
import contextlib
import csv
import ctypes
import functools
import io
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import yaml

import sdxl_data
import sdxl_lora
from sdxl_data import STOP_SIGNALS, InputError
from sdxl_single_file import short_reason

ROOT = Path(__file__).resolve().parent
SCRIPT = str(ROOT / "hpo_sweep.py")  # what --workers starts
POLL_SECONDS = 0.5  # how often a trial's metrics are read
HEARTBEAT_SECONDS = 10  # how often a worker touches its trial's heartbeat file
DEAD_SECONDS = 120  # a worker on another machine counts as dead when its heartbeat is older than this
STOP_SECONDS = 60  # how long a child may take to save and exit before it is killed
MAX_ATTEMPTS = 2  # for a trial whose process was killed from outside, for example by the out-of-memory killer
LOG_TAIL = 20  # lines of a failed trial's log that are stored in the study

logger = logging.getLogger("hpo_sweep")


# -----------------------------------------------------------------------------
# 1 Arguments
# -----------------------------------------------------------------------------

# objective → (directions, metrics of evaluate.py, or None for the trial's own validation loss)
OBJECTIVES = {
    "score": (("maximize",), ("score",)),
    "adherence": (("maximize",), ("adherence",)),
    "aesthetic": (("maximize",), ("aesthetic",)),
    "val_loss": (("minimize",), None),
    "pareto": (("maximize", "maximize"), ("adherence", "aesthetic")),
}


# fmt: off
def make_parser():
    parser = sdxl_data.make_base_parser(
        "%(prog)s --output_dir DIR [--FLAG VALUE]… -- FLAGS OF train_sdxl_lora.py",
        "Search hyperparameters: each trial is a short training run, scored by evaluate.py.",
    )
    add = parser.add_argument_group("Study").add_argument
    add("--config", is_config_file=True, metavar="FILE", help="YAML file of these flags; the command line wins")
    add("--output_dir", required=True, metavar="DIR", help="for trials, best_params.yaml, trials.csv, report.html")
    add("--n_trials", type=int, default=20, metavar="N", help="number of trials in the study, across all workers")
    add("--objective", choices=list(OBJECTIVES), default="score",
        help="what to optimize; pareto finds the best trade-offs between adherence and aesthetic")
    add("--search_space", metavar="FILE", help="YAML file, see README; default: learning rate, ranks, caption dropout")
    add("--seed", type=int, default=0, metavar="N", help="seed of the sampler")
    add("--startup_trials", type=int, default=8, metavar="N", help="random trials before TPE and the pruner start")
    add("--storage", metavar="URL", help="Optuna database; default: a journal file in --output_dir")
    add("--study_name", default="sweep", metavar="NAME", help="name in the database and of the W&B group")

    add = parser.add_argument_group("Trials").add_argument
    add("--trial_steps", type=int, default=1000, metavar="STEPS", help="training steps of each trial")
    add("--pruner", choices=["median", "hyperband", "none"], default="median",
        help="stops trials with a poor validation loss early; needs --val_shards or --val_fraction")
    add("--pruning_warmup", type=int, metavar="STEPS", help="no pruning before; default: half of --trial_steps")
    add("--keep_trials", type=int, default=3, metavar="K", help="keep the weights and images of the K best trials")

    add = parser.add_argument_group("Evaluation").add_argument
    add("--prompts", metavar="FILE", help="JSONL file of prompts, as in evaluate.py")
    add("--seeds", type=int, nargs="+", default=[0, 1], metavar="N", help="each prompt is drawn once per seed")
    add("--evaluation", metavar="FILE", help="YAML file with more flags for evaluate.py")

    add = parser.add_argument_group("Processes").add_argument
    add("--workers", type=int, default=1, metavar="N", help="number of trials that run at once on this machine")
    add("--processes_per_trial", type=int, default=1, metavar="N", help="processes per trial, one GPU each")
    add("--accelerate_config", default=str(ROOT / "accelerate_configs/ddp.yaml"), metavar="FILE",
        help="config file for accelerate launch")
    return parser
# fmt: on


def split_words(argv):
    """Splits the arguments at `--` into the sweep's own and those for the trainer."""
    at = argv.index("--") if "--" in argv else len(argv)
    return argv[:at], argv[at + 1 :]


def read_yaml(flag, path):
    """Reads a YAML file. Raises InputError naming `flag` if the file cannot be read, is empty or is not a mapping."""
    try:
        content = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"--{flag}: cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not content:
        raise InputError(f"--{flag}: {path} contains no flags; expected lines such as `rank: 16`")
    return content


def parse_own_flags(argv):
    """Parses and checks the sweep's own flags. Returns them and the arguments after `--`."""
    own, words = split_words(argv)
    parser = make_parser()
    args = parser.parse_args(own)
    for name in ("n_trials", "trial_steps", "workers", "processes_per_trial"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: found {getattr(args, name)}; expected a number above 0")
    for name in ("startup_trials", "keep_trials", "seed"):
        if getattr(args, name) < 0:
            parser.error(f"--{name}: found {getattr(args, name)}; expected a number of 0 or more")
    if args.pruning_warmup is None:
        args.pruning_warmup = args.trial_steps // 2
    for name in ("accelerate_config", "prompts"):
        path = getattr(args, name)
        if path and not Path(path).expanduser().is_file():
            parser.error(f"--{name}: no file {path}")
    for name in ("search_space", "evaluation"):
        if getattr(args, name):
            try:
                read_yaml(name, getattr(args, name))
            except InputError as error:
                parser.error(str(error))
    return args, words


class Stop:
    """Records a stop signal that this process receives. bool(stop) is False until one arrives."""

    def __init__(self):
        self.number = None

    def __bool__(self):
        return self.number is not None

    def receive(self, number, _frame):
        self.number = number


stop = Stop()
if __name__ == "__main__":
    parse_own_flags(sys.argv[1:])  # answers --help and wrong flags at once: the imports below take several seconds
    for number in STOP_SIGNALS:
        signal.signal(number, stop.receive)

import filelock
import optuna
import psutil
import torch
from matplotlib import artist, category, ticker
from optuna.trial import TrialState
from PIL import Image

import evaluate
import train_sdxl_lora as trainer

# -----------------------------------------------------------------------------
# 2 Search space
# -----------------------------------------------------------------------------

# Seam: what is searched by default, per stage. Contract: {flag of the trainer: row}, in the format of --search_space.
SEARCH_SPACES = {
    "base": {
        "learning_rate": {"low": 1e-4, "high": 8e-4, "log": True},
        "rank": {"choices": [16, 32, 48, 64]},
        "text_encoder_rank": {"choices": [8, 16, 24, 32], "when": {"train_text_encoder": True}},
        "caption_dropout_rate": {"choices": [0.05, 0.10, 0.15]},
    },
    "refiner": {
        "learning_rate": {"low": 5e-5, "high": 3e-4, "log": True},
        "rank": {"choices": [8, 16, 24, 32, 48, 64]},
        "caption_dropout_rate": {"choices": [0.05, 0.10, 0.15]},
    },
}


@dataclass(frozen=True)
class Parameter:
    """A flag to search, over a range of numbers (integers if `whole`) or over a list of choices.

    `when` maps other flags to values. The flag is searched only in trials where they have those values.
    """

    flag: str
    low: float | None = None
    high: float | None = None
    log: bool = False
    whole: bool = False
    choices: tuple = ()
    when: tuple = ()  # ((flag, value), …)

    def describe(self):
        """Returns the fields that are set, which become part of the study's signature."""
        fields = {name: value for name, value in vars(self).items() if value not in (None, (), False)}
        fields["when"] = list(self.when)
        return fields

    def applies(self, flags):
        return all(flags.get(name) == value for name, value in self.when)

    @property
    def stored_as_json(self):
        """True if the study stores choices as JSON, because some are not numbers, strings or booleans."""
        return not all(isinstance(choice, (bool, int, float, str)) for choice in self.choices)

    def suggest(self, trial):
        if self.stored_as_json:
            return json.loads(trial.suggest_categorical(self.flag, [json.dumps(choice) for choice in self.choices]))
        if self.choices:
            return trial.suggest_categorical(self.flag, self.choices)
        if self.whole:
            return trial.suggest_int(self.flag, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(self.flag, self.low, self.high, log=self.log)

    def corners(self):
        """Returns all choices, or both ends of the range. parse_args tries these values on the trainer."""
        if self.choices:
            return list(self.choices)
        if self.whole:
            return [int(self.low), int(self.high)]
        return [self.low, self.high]


def read_parameter(flag, row, whole):
    """Returns the Parameter for a row of --search_space. Raises ValueError saying what is wrong with the row."""
    if not isinstance(row, dict):
        raise ValueError(f"found {row!r}; expected low and high, or choices")
    unknown = set(row) - {"low", "high", "log", "choices", "when"}
    if unknown:
        raise ValueError(f"found {', '.join(sorted(map(str, unknown)))}; expected low, high, log, choices, when")
    when = tuple((row.get("when") or {}).items())
    if "choices" in row:
        if not isinstance(row["choices"], list) or not row["choices"] or "low" in row or "high" in row:
            raise ValueError("expected either a list of choices, or low and high")
        return Parameter(flag, choices=tuple(row["choices"]), when=when)
    if "low" not in row or "high" not in row:
        raise ValueError("expected low and high, or choices")
    low, high = float(row["low"]), float(row["high"])  # YAML reads 1e-4 as a string
    log = bool(row.get("log", False))
    if not low < high:
        raise ValueError(f"found low {low:g} and high {high:g}; expected low below high")
    if log and low <= 0:
        raise ValueError(f"found low {low:g} with log; expected a number above 0")
    if whole and (low % 1 or high % 1):
        raise ValueError(f"found {low:g} to {high:g}; expected whole numbers")
    return Parameter(flag, low, high, log, whole, when=when)


def make_search_space(path, given, trainer_args):
    """Returns the Parameters to search: those in the file `path` or, without a file, the defaults for the stage.

    Leaves out defaults whose flag is given after `--`, and all Parameters whose `when` can never hold. Raises
    InputError naming the file and the flag if a row is wrong.
    """
    rows = read_yaml("search_space", path) if path else SEARCH_SPACES[trainer_args.stage]
    source = f"--search_space: {path or 'the default'}"
    actions = {action.dest: action for action in trainer.make_parser()._actions}
    first_names = {name.removeprefix("--"): a.dest for a in actions.values() for name in a.option_strings[:2]}
    rows = {first_names.get(flag, flag): row for flag, row in rows.items()}  # of flags with two names
    space = []
    for flag, row in rows.items():
        if flag not in actions or flag in ("config", "output_dir", "max_train_steps", "help"):
            raise InputError(f"{source}: {flag} is not a flag of train_sdxl_lora.py that can be searched")
        if path is None and flag in given:
            continue  # a flag given after -- is no longer searched by default
        if flag in given:
            raise InputError(f"{source}: {flag} is also given after --; remove it from one of the two")
        try:
            space.append(read_parameter(flag, row, actions[flag].type is int))
        except (TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{source}: {flag}: {error}") from None
        for name, _ in space[-1].when:
            searched = [p.flag for p in space[:-1]]
            if name not in actions or (name in rows and name not in searched):
                raise InputError(
                    f"{source}: {flag}: `when` names {name}, which is not a flag of the trainer or comes later in "
                    "the search space; check its name, or move it up"
                )
    # A parameter whose condition can never hold is dropped.
    fixed = vars(trainer_args)
    searched = {parameter.flag for parameter in space}
    return [p for p in space if all(n in searched or fixed.get(n) == value for n, value in p.when)]


def corner_values(space):
    """Yields {flag: value} for each corner of each Parameter in turn. All other Parameters have their first corner.

    However, flags named in the Parameter's `when` have the values given there.
    """
    first = {p.flag: p.corners()[0] for p in space}
    for parameter in space:
        for value in parameter.corners():
            values = dict(first)
            values.update(parameter.when)
            values[parameter.flag] = value
            yield values


def suggest_flags(trial, sweep):
    """Returns the {flag: value} that the sampler proposes for a trial.

    Leaves out Parameters whose `when` does not hold.
    """
    fixed = vars(sweep.trainer_args)
    values = {}
    for parameter in sweep.space:
        if parameter.applies(fixed | values):
            values[parameter.flag] = parameter.suggest(trial)
    return values


# -----------------------------------------------------------------------------
# 3 Sweep: the flags of every trial and evaluation
# -----------------------------------------------------------------------------


def has_validation(trainer_args):
    return bool(trainer_args.val_shards or trainer_args.val_fraction)


@dataclass(frozen=True)
class Sweep:
    """A parsed command line: the sweep's own flags, those for the trainer and evaluate.py, and the search space."""

    args: object
    trainer_flags: dict  # the flags given after --, with absolute paths
    trainer_args: object  # all flags of the trainer, parsed, with defaults
    evaluation: dict  # flags of evaluate.py
    space: list  # of Parameter

    @property
    def folder(self):
        return Path(self.args.output_dir).expanduser().resolve()

    @property
    def lock(self):
        """A file lock to hold while claiming or recording a trial. If the holder is killed, the lock is released."""
        return filelock.FileLock(self.folder / ".lock")

    @property
    def directions(self):
        return OBJECTIVES[self.args.objective][0]

    @property
    def metrics(self):
        return OBJECTIVES[self.args.objective][1]

    @property
    def objective_names(self):
        return self.metrics or ("validation loss",)

    @property
    def prunes(self):
        return self.args.pruner != "none" and len(self.directions) == 1 and has_validation(self.trainer_args)

    def signature(self):
        """Returns the settings that must be the same in all commands that work on one study."""
        names = ("objective", "trial_steps", "seed", "startup_trials", "pruner", "pruning_warmup")
        signature = {name: getattr(self.args, name) for name in names}
        signature["trainer"] = self.trainer_flags
        signature["evaluation"] = self.evaluation
        signature["search_space"] = {parameter.flag: parameter.describe() for parameter in self.space}
        return signature


def make_absolute(value):
    """Returns the absolute path if `value` is an existing file or folder, or else `value`."""
    if isinstance(value, list):
        return [make_absolute(item) for item in value]
    if not isinstance(value, str) or value.startswith("/"):
        return value
    path, colon, scale = value.rpartition(":")  # of --merge_lora FILE:SCALE
    if colon and Path(path).exists():
        return f"{Path(path).resolve()}:{scale}"
    return str(Path(value).resolve()) if Path(value).exists() else value


def given_flags(parser, words):
    """Returns {flag: value} for the flags given in `words` or in a --config file. Leaves out all other flags.

    Makes the paths of existing files and folders absolute.
    """
    for action in parser._actions:
        action.default = argparse.SUPPRESS
        action.required = False
    flags = vars(parser.parse_args(words))
    flags.pop("config", None)
    return {name: make_absolute(value) for name, value in flags.items()}


def to_words(flags):
    """Returns {flag: value} as arguments. True becomes --flag and False becomes --no-flag. None is left out."""
    words = []
    for name, value in flags.items():
        if value is True:
            words.append(f"--{name}")
        elif value is False:
            words.append(f"--no-{name}")
        elif isinstance(value, (list, tuple)):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words += [f"--{name}", str(value)]
    return words


def make_evaluation(args, trainer_args):
    """Returns {flag: value} for evaluate.py, with the flags that are the same for every trial.

    Raises InputError if the file of --evaluation cannot be read or has a flag that a sweep does not accept.
    """
    flags = {"resolution": trainer_args.resolution}
    names = "pretrained_model_name_or_path revision variant single_file_config prediction_type rescale_betas_zero_snr"
    for name in [*names.split(), "merge_lora", "cache_dir"]:
        flags[name] = make_absolute(getattr(trainer_args, name))
    if trainer_args.stage == "refiner" and trainer_args.merge_lora and args.objective != "val_loss":
        raise InputError("-- --merge_lora: evaluate.py cannot merge into a refiner; give --objective val_loss")
    if trainer_args.stage == "refiner":
        flags["refiner_unet"] = make_absolute(trainer_args.refiner_unet)
        base = trainer_args.validation_base_lora or trainer_args.text_encoder_2_lora
        if base:
            flags["lora"] = [make_absolute(base)]
    if args.evaluation:
        extra = read_yaml("evaluation", args.evaluation)
        known = {action.dest for action in evaluate.make_parser()._actions}
        for name in extra:
            if name not in known or name in ("output_dir", "config", "report_to", "checkpoints"):
                raise InputError(
                    f"--evaluation: {args.evaluation}: {name} is not a flag of evaluate.py that a sweep accepts"
                )
            flags[name] = make_absolute(extra[name])
    flags["prompts"] = make_absolute(args.prompts)
    flags["seeds"] = args.seeds
    return {name: value for name, value in flags.items() if value is not None}


def refusal_of(flags):
    """Returns the trainer's error message for these flags, or None if the trainer accepts them."""
    with contextlib.redirect_stderr(io.StringIO()) as output:
        try:
            trainer.parse_args(to_words(flags))
        except SystemExit:
            return output.getvalue().partition("error: ")[2].strip()
    return None


def parse_args(argv=None):
    """Returns the Sweep of a command line. Exits if this script, the trainer or evaluate.py refuses a flag."""
    argv = sys.argv[1:] if argv is None else list(map(str, argv))
    args, words = parse_own_flags(argv)
    parser = make_parser()
    gpus = torch.cuda.device_count()
    if gpus and args.workers * args.processes_per_trial > gpus:
        parser.error(
            f"--workers: {args.workers} × {args.processes_per_trial} processes need as many GPUs; found {gpus}"
        )
    flags = given_flags(trainer.make_parser(), words)
    for name in ("output_dir", "max_train_steps", "resume_from_checkpoint", "overwrite_output_dir", "dry_run"):
        if flags.pop(name, None) is not None:
            parser.error(f"-- --{name}: the sweep sets it for each trial; leave it out")
    scratch = {"output_dir": str(Path(args.output_dir) / "trial-0000"), "resume_from_checkpoint": "latest"}
    trainer_args = trainer.parse_args(to_words(flags | scratch))
    if args.objective == "val_loss" and not has_validation(trainer_args):
        parser.error("--objective: val_loss needs --val_shards or --val_fraction after --")
    try:
        fixed = {}  # by the LoRA to start from
        if trainer_args.init_lora and not args.search_space:
            fixed = sdxl_lora.lora_flags(trainer_args.init_lora)
        space = make_search_space(args.search_space, flags | fixed, trainer_args)
        evaluation = make_evaluation(args, trainer_args)
    except InputError as error:
        parser.error(str(error))
    sweep = Sweep(args, flags, trainer_args, evaluation, space)
    for values in corner_values(space):
        refused = refusal_of(flags | scratch | values)
        if refused:
            parser.error(f"--search_space: {args.search_space or 'the default'}: {refused}")
    if sweep.metrics:
        example = {"output_dir": scratch["output_dir"]}
        evaluate.parse_args(to_words(evaluation | example))
    return sweep


# -----------------------------------------------------------------------------
# 4 Study
# -----------------------------------------------------------------------------


def drop_torn_line(journal):
    """Removes an incomplete last line, left by a crash, from the journal. Optuna could not read it."""
    data = journal.read_bytes() if journal.exists() else b""
    if data and not data.endswith(b"\n"):
        os.truncate(journal, data.rfind(b"\n") + 1)


def open_study(sweep):
    """Opens or creates the study. Raises InputError if it does not open or was started with other flags."""
    storage = sweep.args.storage
    if storage is None:
        journal = sweep.folder / "study.journal"
        drop_torn_line(journal)
        lock = filelock.FileLock(f"{journal}.lock")  # after a kill, Optuna's own lock blocks everybody for 30 s
        storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journal), lock))
    try:
        study = optuna.create_study(
            study_name=sweep.args.study_name, storage=storage, directions=sweep.directions, load_if_exists=True
        )
    except Exception as error:  # the database does not answer, or its URL is wrong
        raise InputError(f"--storage: {sweep.args.storage}: {short_reason(error)}") from error
    signature = json.loads(json.dumps(sweep.signature()))
    stored = study.user_attrs.get("law", signature)  # studies have always stored it under this name
    stored = json.loads(json.dumps(stored).replace('"species_', '"class_'))  # names of flags in older studies
    for name, value in signature.items():
        if value != stored[name]:
            flag = "flags after --" if name == "trainer" else f"--{name}"
            found = f"found {json.dumps(value)}, but this study was started with {json.dumps(stored[name])}"
            raise InputError(f"{flag}: {found}; use the same value, or another --output_dir")
    if "law" not in study.user_attrs:
        study.set_user_attr("law", signature)
    return study


def make_sampler(sweep, proposal):
    """Returns a TPE sampler whose seed depends only on --seed and the number `proposal`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(
            seed=sdxl_data.torch_seed(sweep.args.seed, proposal) % 2**32,
            n_startup_trials=sweep.args.startup_trials,
            multivariate=True,
            group=True,  # for parameters that apply only in some trials
            constant_liar=True,  # keeps workers away from the values that others are trying
        )


def make_pruner(sweep):
    if not sweep.prunes:
        return optuna.pruners.NopPruner()
    if sweep.args.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(max(1, sweep.args.pruning_warmup), sweep.args.trial_steps)
    return optuna.pruners.MedianPruner(sweep.args.startup_trials, sweep.args.pruning_warmup)


def worker_id():
    """Returns the host, pid and start time of this process. Another process may get the same pid later."""
    return f"{socket.gethostname()} {os.getpid()} {psutil.Process().create_time():.0f}"


def is_alive(worker, folder):
    """Returns True if a trial's worker still runs. For a worker on another machine, checks its heartbeat file."""
    if worker is None:
        return False
    host, pid, started = worker.split()
    if host == socket.gethostname():
        try:
            return abs(psutil.Process(int(pid)).create_time() - float(started)) < 2
        except psutil.NoSuchProcess:
            return False
    heartbeat = folder / "heartbeat"
    if not heartbeat.exists():
        return False
    # Touch a file to get the time of the shared file system: the clocks of the machines may differ.
    clock = folder.parent / f".clock-{socket.gethostname()}"
    clock.touch()
    return clock.stat().st_mtime - heartbeat.stat().st_mtime < DEAD_SECONDS


def trial_folder(sweep, trial):
    """Returns the folder of a trial. A second attempt uses the folder of the first."""
    return sweep.folder / f"trial-{trial.user_attrs.get('retry_of', trial.number):04d}"


def trial_flags(sweep, folder, searched):
    """Returns {flag: value} for the trainer in a trial. `searched` holds the values from the sampler."""
    steps = sweep.args.trial_steps
    defaults = {
        "report_to": "none",
        "seed": sweep.args.seed,
        "checkpointing_steps": max(1, steps // 4),
        "checkpoints_total_limit": 1,
        "validation_steps": max(1, steps // 8),
        "cache_dir": str(sweep.folder / "cache"),  # all trials share one index of the data
    }
    imposed = {"max_train_steps": steps, "output_dir": str(folder), "resume_from_checkpoint": "latest"}
    return defaults | sweep.trainer_flags | searched | imposed


def write_yaml(path, content):
    sdxl_data.write_file(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode())


# -----------------------------------------------------------------------------
# 5 Processes
# -----------------------------------------------------------------------------


@contextlib.contextmanager
def stop_signals():
    """Context manager that stores signals in `stop`. On exit, restores the caller's handlers and clears `stop`."""
    previous = {number: signal.signal(number, stop.receive) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        stop.number = None


def die_with_parent():
    """Makes Linux send SIGTERM to this child process when the sweep ends, even if the sweep is killed."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # the sweep died before the call
        os._exit(1)


def start_child(command, log, variables):
    """Starts a command in its own session, so that Ctrl-C reaches only the sweep. Returns the process.

    The command gets `variables` in its environment. Its output is appended to the file `log`.
    """
    environment = dict(os.environ)
    environment.pop("PREEMPT_FILE", None)  # only the sweep may ask the batch script to requeue
    environment.update(variables)
    with open(log, "ab") as stream:
        stream.write(f"$ {shlex.join(command)}\n".encode())
        stream.flush()
        return subprocess.Popen(
            command, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL, env=environment, start_new_session=True,
            preexec_fn=die_with_parent,
        )  # fmt: skip


def end_processes(processes):
    """Sends SIGTERM to the first process, which passes it on to the others. After STOP_SECONDS, kills the rest."""
    with contextlib.suppress(psutil.NoSuchProcess):
        processes[0].terminate()
    _, left = psutil.wait_procs(processes, STOP_SECONDS)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, STOP_SECONDS)


def end_child(child):
    """Ends a child and all its descendants."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(child.pid)
        end_processes([parent, *parent.children(recursive=True)])
    child.wait()


def end_leftovers(folder):
    """Ends trainers and evaluations that still run on this machine for the trial in `folder`, whose worker is dead."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or ()
        ours = any(word.endswith(("train_sdxl_lora.py", "evaluate.py")) for word in words)
        if ours and any(word.startswith(f"{folder}/") for word in words):
            with contextlib.suppress(psutil.NoSuchProcess):
                end_processes([process, *process.children(recursive=True)])


def launch(sweep, script, words):
    """Returns the `accelerate launch` command for a script, with --processes_per_trial processes and a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", sweep.args.accelerate_config]
    command += ["--num_processes", str(sweep.args.processes_per_trial), "--main_process_port", str(port)]
    return [*command, str(ROOT / script), *words]


# -----------------------------------------------------------------------------
# 6 Trial
# -----------------------------------------------------------------------------


def take_over_trial(study, sweep):
    """Returns a running trial whose worker is dead, so that it can be continued. Returns None if there is none."""
    for frozen in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        folder = trial_folder(sweep, frozen)
        if not is_alive(frozen.user_attrs.get("worker"), folder):
            end_leftovers(folder)
            study.sampler = make_sampler(sweep, frozen.number)
            return optuna.trial.Trial(study, frozen._trial_id)
    return None


def enqueue_second_attempts(study):
    """Queues each killed trial again in the study, until it has had MAX_ATTEMPTS attempts."""
    trials = study.get_trials(deepcopy=False)
    attempts = {(t.user_attrs.get("retry_of", t.number), t.user_attrs.get("attempt", 1)) for t in trials}
    for trial in trials:
        first = trial.user_attrs.get("retry_of", trial.number)
        attempt = trial.user_attrs.get("attempt", 1)
        killed = trial.state == TrialState.FAIL and trial.user_attrs.get("reason", "").startswith("killed")
        if killed and attempt < MAX_ATTEMPTS and (first, attempt + 1) not in attempts:
            study.enqueue_trial(trial.params, user_attrs={"retry_of": first, "attempt": attempt + 1})


def ask_trial(study, sweep):
    """Returns a queued retry of an earlier trial, or else a new trial, or None if the study has all its trials."""
    enqueue_second_attempts(study)
    waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    proposals = [t for t in study.get_trials(deepcopy=False) if "retry_of" not in t.user_attrs]
    if not waiting and len(proposals) >= sweep.args.n_trials:
        return None
    study.sampler = make_sampler(sweep, len(proposals))
    return study.ask()


def claim_trial(study, sweep):
    """Returns (trial, folder) for this worker, or None if no trial is left. The caller must hold the sweep's lock."""
    trial = take_over_trial(study, sweep)
    if trial is None:
        trial = ask_trial(study, sweep)
    if trial is None:
        return None
    folder = trial_folder(sweep, trial)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "heartbeat").touch()
    trial.set_user_attr("worker", worker_id())
    flags = suggest_flags(trial, sweep)
    if not (folder / "trial.yaml").exists():
        write_yaml(folder / "trial.yaml", trial_flags(sweep, folder, flags))
    return trial, folder


class TrialFailed(Exception):
    """A trial has failed; the message says why. It begins with "killed" if a process was killed from outside."""


def validation_rows(folder):
    """Returns the (step, validation loss) pairs that a run has logged so far, sorted, one pair per step."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    found = {}
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # the trainer may be writing the last line
            row = json.loads(line)
            if row.get("val_loss") is not None:
                found[row["step"]] = row["val_loss"]
    return sorted(found.items())


def read_log(path):
    """Returns the text of a log. Each update of a progress bar becomes a line."""
    return path.read_text(errors="replace").replace("\r", "\n")


def tail_of(log, lines=LOG_TAIL):
    return "\n".join(read_log(log).splitlines()[-lines:])


def read_reason(log, code):
    """Returns why a process failed: its exit code and the last error message in its log.

    If the log has no error message, uses its last line instead.
    """
    text = read_log(log)
    own_errors = r"\w+\.py: error: (.+)"  # first choice, since a launcher adds errors of its own
    any_errors = r".*(?:Error: |OutOfMemory).*"
    any_lines = r".*\S.*"
    for pattern in (own_errors, any_errors, any_lines):
        found = re.findall(pattern, text)
        if found:
            return f"exit {code}: {found[-1].strip()[:500]}"
    return f"exit {code}: the log is empty"


def watch(child, folder, on_poll=lambda: None):
    """Waits for a child process and calls on_poll() every POLL_SECONDS. If on_poll() raises an error, ends the child.

    Also touches the heartbeat file in `folder`. Raises TrialFailed if the child exits with an error, and
    KeyboardInterrupt if the sweep has received a stop signal.
    """
    last_beat = 0.0
    try:
        while child.poll() is None:
            if stop:
                raise KeyboardInterrupt
            if time.monotonic() - last_beat > HEARTBEAT_SECONDS:
                (folder / "heartbeat").touch()
                last_beat = time.monotonic()
            on_poll()
            time.sleep(POLL_SECONDS)
    finally:
        end_child(child)
    if stop:  # SLURM signals the child too, and the child may exit first
        raise KeyboardInterrupt
    if child.returncode == 0:
        return
    reason = read_reason(folder / "log.txt", child.returncode)
    launcher_saw_kill = re.search(r"Signal 9|SIGKILL|exitcode +: -9", tail_of(folder / "log.txt"))
    if launcher_saw_kill or child.returncode == -signal.SIGKILL:
        reason = f"killed, {reason}"
    raise TrialFailed(reason)


def child_environment(sweep, **variables):
    """Returns environment variables for a child process: `variables`, and those that every child gets."""
    variables["WANDB_RUN_GROUP"] = sweep.args.study_name
    variables["PYTHONWARNINGS"] = "ignore"
    if not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        variables["ACCELERATE_USE_CPU"] = "true"
    return variables


def train(sweep, study, trial, folder):
    """Runs the trainer with the flags in trial.yaml, and reports its validation losses to the study.

    Raises TrialPruned if the pruner stops the trial, TrialFailed if the training fails, and KeyboardInterrupt after a
    signal.
    """
    reported = study.get_trials(deepcopy=False)[trial.number].intermediate_values
    checked = set(sorted(reported)[:-1])  # the sweep may have died before it could prune at the last reported step
    sign = -1 if sweep.directions[0] == "maximize" else 1  # the pruner compares in the study's direction

    def report_losses():
        if len(sweep.directions) > 1:
            return  # Optuna takes no intermediate values in a study of several objectives
        for step, loss in validation_rows(folder):
            if step in checked:
                continue
            checked.add(step)
            if step not in reported:
                trial.report(sign * loss, step)
            if sweep.prunes and step < sweep.args.trial_steps and trial.should_prune():
                raise optuna.TrialPruned(f"validation loss {loss:.5f} at step {step}")

    report_losses()
    command = launch(sweep, "train_sdxl_lora.py", ["--config", str(folder / "trial.yaml")])
    environment = child_environment(sweep, WANDB_NAME=folder.name, WANDB_JOB_TYPE="trial")
    watch(start_child(command, folder / "log.txt", environment), folder, report_losses)
    report_losses()  # the rows since the last poll
    if not (folder / f"checkpoint-{sweep.args.trial_steps}").exists():
        raise TrialFailed("killed, stopped from outside before its last step")
    losses = validation_rows(folder)
    if losses and math.isnan(losses[-1][1]):
        raise TrialFailed("the validation loss is not a number")


def score_trial(sweep, folder):
    """Runs evaluate.py on a trial's LoRA. Raises TrialFailed if it fails, and KeyboardInterrupt after a signal."""
    flags = dict(sweep.evaluation)
    flags["output_dir"] = str(folder / "evaluation")
    flags["images_dir"] = str(sweep.folder / "images")
    flags.setdefault("cache_dir", str(sweep.folder / "cache"))  # as the trials: a checkpoint file is converted once
    if sweep.trainer_args.stage == "refiner":
        flags["refiner_lora"] = str(folder)
    else:
        flags["lora"] = [str(folder)]
    command = launch(sweep, "evaluate.py", to_words(flags))
    watch(start_child(command, folder / "log.txt", child_environment(sweep)), folder)


def read_values(sweep, trial, path):
    """Returns the values of the objectives from the metrics.json at `path`. Stores all its metrics in the trial.

    Raises TrialFailed if an objective is missing from the file.
    """
    models = json.loads(path.read_text())["models"]
    entry = list(models.values())[-1]  # the first is the base model
    trial.set_user_attr("metrics", {name: entry[name] for name in evaluate.METRICS if name in entry})
    missing = [name for name in sweep.metrics if name not in entry]
    if missing:
        raise TrialFailed(f"the evaluation has no {missing[0]}; set aesthetic_head in the file of --evaluation")
    return [entry[metric]["mean"] for metric in sweep.metrics]


def run_trial(sweep, study, trial, folder):
    """Runs or continues a trial. Returns (state, values, reason). Raises KeyboardInterrupt after a signal."""
    metrics_file = folder / "evaluation/metrics.json"
    try:
        if not metrics_file.exists():  # it exists when the sweep died before it could record the result
            train(sweep, study, trial, folder)
        if sweep.metrics is None:
            return TrialState.COMPLETE, [validation_rows(folder)[-1][1]], None
        if not metrics_file.exists():
            score_trial(sweep, folder)
        return TrialState.COMPLETE, read_values(sweep, trial, metrics_file), None
    except optuna.TrialPruned as pruned:
        return TrialState.PRUNED, None, str(pruned)
    except TrialFailed as failed:
        return TrialState.FAIL, None, str(failed)


def tell(study, trial, folder, state, values, reason):
    """Records the result of a trial. The caller must hold the sweep's lock."""
    if reason:
        trial.set_user_attr("reason", reason)
    if state == TrialState.FAIL:
        trial.set_user_attr("log", tail_of(folder / "log.txt"))
    study.tell(trial, values, state)


def ranked(study):
    """Returns the completed trials, best first. With two objectives, those on the Pareto front come first."""
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(study.directions) == 1:
        sign = -1 if study.direction == optuna.study.StudyDirection.MAXIMIZE else 1
        return sorted(done, key=lambda t: (sign * t.value, t.number))
    front = {t.number for t in study.best_trials}
    return sorted(done, key=lambda t: (t.number not in front, -t.user_attrs["metrics"]["score"]["mean"], t.number))


def remove_big_files(study, sweep):
    """Deletes weights and images of ended trials, except the best --keep_trials. The caller must hold the lock."""
    ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL))
    busy = study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING))
    kept = [trial_folder(sweep, t) for t in [*ranked(study)[: sweep.args.keep_trials], *busy]]
    for folder in {trial_folder(sweep, t) for t in ended} - set(kept):
        images = folder / "evaluation/per_image.csv"
        if images.exists():
            with open(images, newline="", encoding="utf-8") as file:
                *_, last = csv.DictReader(file)  # the first rows are of the base model, whose images all trials share
            shutil.rmtree((images.parent / last["file"]).parent, ignore_errors=True)
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint, ignore_errors=True)
        for weights in folder.glob("*.safetensors"):
            weights.unlink(missing_ok=True)


# -----------------------------------------------------------------------------
# 7 Report
# -----------------------------------------------------------------------------


def decode_params(sweep, params):
    """Returns a trial's params as {flag: value} for the trainer. Decodes those that are stored as JSON."""
    encoded = {parameter.flag for parameter in sweep.space if parameter.stored_as_json}
    return {name: json.loads(value) if name in encoded else value for name, value in params.items()}


def validation_losses(trial):
    """Returns {step: validation loss} of a trial. Undoes the sign change that train() makes if the study maximizes."""
    return {step: abs(value) for step, value in sorted(trial.intermediate_values.items())}


def format_value(value):
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def format_params(params):
    return ", ".join(f"{name} {format_value(value)}" for name, value in params.items())


def write_best_params(study, sweep):
    """Writes best_params.yaml with the flags of the best trial, for `train_sdxl_lora.py --config`."""
    best = ranked(study)[:1]
    if best:
        flags = {"seed": sweep.args.seed}
        flags.update(sweep.trainer_flags)
        flags.update(decode_params(sweep, best[0].params))
        flags["output_dir"] = str(sweep.folder / "best")
        write_yaml(sweep.folder / "best_params.yaml", flags)


def table_row(sweep, trial):
    """Returns a trial as {column: value}, for trials.csv and the report."""
    names = sweep.metrics or ("val_loss",)
    params = decode_params(sweep, trial.params)
    losses = list(validation_losses(trial).values())
    row = {"trial": trial.number, "folder": trial_folder(sweep, trial).name, "state": trial.state.name.lower()}
    finished = trial.state == TrialState.COMPLETE  # the value of a pruned trial is a loss
    row.update(zip(names, trial.values if finished else [None] * len(names)))
    row.update((parameter.flag, params.get(parameter.flag)) for parameter in sweep.space)
    row["last_val_loss"] = losses[-1] if losses else None
    row["seconds"] = round(trial.duration.total_seconds(), 1) if trial.duration else None
    row["reason"] = trial.user_attrs.get("reason")
    return row


def write_trials_csv(study, sweep):
    """Writes trials.csv, one row per trial."""
    rows = [table_row(sweep, trial) for trial in study.get_trials(deepcopy=False)]
    if rows:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        sdxl_data.write_file(sweep.folder / "trials.csv", text.getvalue().encode())


def label_choices(axes):
    """Cuts the names of choices on the x axis to 24 characters, and slants the names if they would overlap."""
    names = [label.get_text() for label in axes.get_xticklabels()]
    names = [name if len(name) <= 24 else name[:23] + "…" for name in names]
    slanted = max(map(len, names)) * len(names) > 40
    # A choice such as "$_" is not a formula.
    axes.set_xticks(axes.get_xticks(), names, parse_math=False, rotation=20 if slanted else 0)


def restyle(axes):
    """Gives one of Optuna's charts the colours of the page, and text that can be read at a small size."""
    axes.set_title("", loc="center")
    axes.set_title("", loc="left")
    axes.set_facecolor("none")
    axes.grid(False)
    axes.tick_params(colors="black", labelsize=9)
    artist.setp(list(axes.spines.values()), color="black")
    artist.setp(axes.patches, color="tab:blue")  # bars
    artist.setp(axes.lines, alpha=1)
    artist.setp(axes.collections, cmap="cool")  # points, in colours that can be seen on white and on black
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(color="black", fontsize=10)
        if isinstance(axis.get_major_locator(), ticker.MaxNLocator):
            counts = axis.label.get_text() in ("Trial", "step")
            axis.set_major_locator(ticker.MaxNLocator(5, steps=[1, 2, 5, 10], integer=counts, min_n_ticks=1))
    if isinstance(axes.xaxis.get_major_formatter(), category.StrCategoryFormatter):
        label_choices(axes)
    if axes.get_legend():
        axes.get_legend().remove()  # Optuna's legend is outside of the axes and shrinks them
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(frameon=False, fontsize=9)


def draw_chart(study, plot, caption, **options):
    """Calls plot(study, **options), which draws with pyplot. Returns the caption and the chart as SVG text."""
    from matplotlib import pyplot  # here, since an import at the top would delay every start

    pyplot.switch_backend("Agg")  # no window
    style = {"figure.figsize": (4.4, 2.8), "figure.constrained_layout.use": True, "axes.formatter.limits": (-3, 5)}
    with warnings.catch_warnings(), pyplot.rc_context(style):  # Optuna changes the style of the whole process
        warnings.simplefilter("ignore")  # these functions are experimental; with few trials they warn of little data
        figure = plot(study, **options).figure
        for axes in figure.axes:
            restyle(axes)
        figure.set_layout_engine("constrained")  # the history has another one
        chart = evaluate.figure_svg(figure, caption)
    pyplot.close(figure)
    return caption, chart


def plot_validation_losses(study):
    """Plots the validation loss of each trial over its steps. Pruned and failed trials are grey."""
    from matplotlib import pyplot

    _, axes = pyplot.subplots()
    axes.set(xlabel="step", ylabel="validation loss")
    for trial in study.get_trials(deepcopy=False):
        losses = validation_losses(trial)
        color = "tab:grey" if trial.state in (TrialState.PRUNED, TrialState.FAIL) else "tab:blue"
        axes.plot(list(losses), list(losses.values()), color=color, marker=".", markersize=6, linewidth=0.8)
    return axes


def draw_charts(study, sweep):
    """Returns {heading: [(caption, SVG), …]}. Leaves out charts for which there are too few trials."""
    plots = optuna.visualization.matplotlib  # Optuna imports it at this first use
    trials = study.get_trials(deepcopy=False)
    done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    searched = [p.flag for p in sweep.space if any(p.flag in trial.params for trial in done)]
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()  # arXiv:2304.10255
    progress, importance, slices = [], [], []
    targets = [lambda trial: trial.values[0], lambda trial: trial.values[1]]
    if len(sweep.directions) == 1:
        targets = [None]  # only then Optuna draws the best value so far
    for name, target in zip(sweep.objective_names, targets):
        draw = functools.partial(draw_chart, study, target=target, target_name=name)
        if done:
            progress.append(draw(plots.plot_optimization_history, f"{name} of each trial"))
        if searched and len(done) > 1:
            importance.append(draw(plots.plot_param_importances, f"importance for {name}", evaluator=evaluator))
            slices += [draw(plots.plot_slice, f"{name} over {flag}", params=[flag]) for flag in searched]
    if done and len(sweep.directions) > 1:
        caption = "Pareto front: no trial is better in one objective and at least as good in the other"
        progress.append(draw_chart(study, plots.plot_pareto_front, caption, target_names=sweep.objective_names))
    if any(trial.intermediate_values for trial in trials):
        progress.append(draw_chart(study, plot_validation_losses, "validation loss; grey: pruned or failed trials"))
    return {"Progress": progress, "Importance": importance, "Slices": slices}


def read_grid(sweep, trial):
    """Returns the first six rows of a trial's grid.png as a data URI, or None if the trial has no grid.png."""
    path = trial_folder(sweep, trial) / "evaluation/grid.png"
    if not path.exists():
        return None
    with Image.open(path) as grid:
        prompts = len(evaluate.read_prompts(sweep.evaluation.get("prompts")))
        height = grid.height // prompts * min(prompts, 6)
        return evaluate.data_uri(grid.crop((0, 0, grid.width, height)), 768)


BODY = """
<h1>{{ title }}</h1>
<p>Objective: {{ objective }}. Each trial trains for {{ steps }} steps.
Use best_params.yaml as --config of a full run.</p>

<h2>Best trials</h2>
<div class="best">
{% for trial in best %}
<section>
<h3>Trial {{ trial.number }}: {{ trial.values | map("round", 4) | join(", ") }}</h3>
<p>{{ format_params(trial.params) }}</p>
<p><small>
{% for name, found in trial.user_attrs.get("metrics", {}).items() %}
{{ metrics[name] }} {{ found.mean | round(3) }}{% if not loop.last %}, {% endif %}
{% endfor %}
</small></p>
{% set grid = read_grid(trial) %}
{% if grid %}
<figure>
<img src="{{ grid }}" alt="images by the base model and trial {{ trial.number }}">
<figcaption>base model (left) and this trial (right)</figcaption>
</figure>
{% endif %}
</section>
{% else %}
<p>No trial has finished yet.</p>
{% endfor %}
</div>
{% for heading, charts in sections.items() if charts %}
<h2>{{ heading }}</h2>
<div class="plots">
{% for caption, chart in charts %}
<figure>{{ chart }}<figcaption>{{ caption }}</figcaption></figure>
{% endfor %}
</div>
{% endfor %}
<h2>All trials</h2>
<div class="scroll">
<table>
<tr>{% for name in columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in rows %}
<tr>{% for name in columns %}<td>{{ format_value(row[name]) }}</td>{% endfor %}</tr>
{% else %}
<tr><td colspan="{{ columns | length }}">No trial has started yet.</td></tr>
{% endfor %}
</table>
</div>
<h2>How this report was made</h2>
<pre>{{ command }}</pre>
<p><small>{{ versions }}</small></p>
"""


def write_report(study, sweep, argv):
    """Writes report.html, a single file that loads nothing from elsewhere."""
    trials = study.get_trials(deepcopy=False)
    count = collections.Counter(trial.state for trial in trials)
    searched = [parameter.flag for parameter in sweep.space]
    page = evaluate.render_page(
        BODY,
        title=f"Trials: {count[TrialState.COMPLETE]} finished, {count[TrialState.PRUNED]} pruned, "
        f"{count[TrialState.FAIL]} failed, {count[TrialState.RUNNING]} running",
        objective=sweep.args.objective,
        steps=sweep.args.trial_steps,
        best=ranked(study)[: sweep.args.keep_trials],
        metrics=evaluate.METRICS,
        read_grid=functools.partial(read_grid, sweep),
        sections=draw_charts(study, sweep),
        columns=["trial", *(sweep.metrics or ["val_loss"]), *searched, "state", "reason"],
        rows=[table_row(sweep, trial) for trial in trials],
        format_params=format_params,
        format_value=format_value,
        command=shlex.join(["hpo_sweep.py", *argv]),
        versions=f"optuna {optuna.__version__}, torch {torch.__version__}",
    )
    sdxl_data.write_file(sweep.folder / "report.html", page.encode())


def write_outputs(study, sweep, argv):
    """Writes best_params.yaml, trials.csv and report.html. The caller must hold the sweep's lock."""
    write_best_params(study, sweep)
    write_trials_csv(study, sweep)
    write_report(study, sweep, argv)


# -----------------------------------------------------------------------------
# 8 Main
# -----------------------------------------------------------------------------


def log_result(study, sweep, trial, state, values, reason):
    if state == TrialState.COMPLETE:
        found = ", ".join(f"{name} {value:.4f}" for name, value in zip(sweep.objective_names, values))
        reason = f"{found} (best: trial {ranked(study)[0].number})"
    ended = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
    logger.info("trial %d %s: %s", trial.number, ended[state], reason)


def run_trials(sweep, argv):
    """Runs trials until none is left for this worker or a stop signal arrives. Returns the study."""
    with sweep.lock:
        study = open_study(sweep)
    study.pruner = make_pruner(sweep)
    while not stop:
        with sweep.lock:
            claimed = claim_trial(study, sweep)
        if claimed is None:
            break
        trial, folder = claimed
        logger.info("trial %d: %s", trial.number, format_params(trial.params))
        try:
            state, values, reason = run_trial(sweep, study, trial, folder)
        except KeyboardInterrupt:
            break
        with sweep.lock:
            tell(study, trial, folder, state, values, reason)
            remove_big_files(study, sweep)
            write_outputs(study, sweep, argv)
        log_result(study, sweep, trial, state, values, reason)
    with sweep.lock:
        write_outputs(study, sweep, argv)
    return study


def log_end(study, sweep):
    """Logs how many trials have ended in which way. Returns the exit status: 1 if none has finished or is running."""
    trials = study.get_trials(deepcopy=False)
    count = collections.Counter(trial.state for trial in trials)
    ended = (
        f"{count[TrialState.COMPLETE]} finished, {count[TrialState.PRUNED]} pruned, {count[TrialState.FAIL]} failed"
    )
    ended += f", of {sweep.args.n_trials} trials; see {sweep.folder / 'report.html'}"
    if count[TrialState.COMPLETE] or count[TrialState.RUNNING] or stop:
        logger.info("%s", ended)
        return 0
    reasons = [trial.user_attrs["reason"] for trial in trials if "reason" in trial.user_attrs]
    logger.error("error: no trial has finished: %s; the last one: %s", ended, "".join(reasons[-1:]) or "no reason")
    return 1


def split_gpus(visible, workers, each):
    """Returns a list with CUDA_VISIBLE_DEVICES for each worker. Each worker gets `each` of the GPUs in `visible`.

    If there are no GPUs, the list holds None for each worker.
    """
    gpus = [gpu for gpu in visible.split(",") if gpu]
    if not gpus:
        return [None] * workers
    return [",".join(gpus[n * each : (n + 1) * each]) for n in range(workers)]


def run_workers(sweep, argv):
    """Runs --workers copies of this script, each with its GPUs. Returns their highest exit status."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    own, words = split_words(argv)
    command = [sys.executable, SCRIPT, *own, "--workers", "1", "--", *words]
    workers = []
    for gpus in split_gpus(visible, sweep.args.workers, sweep.args.processes_per_trial):
        environment = dict(os.environ)
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = gpus
        workers.append(subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=die_with_parent))
    signalled = False
    while any(worker.poll() is None for worker in workers):
        if stop and not signalled:
            signalled = True
            for worker in workers:
                worker.send_signal(stop.number)
        time.sleep(POLL_SECONDS)
    return max(abs(worker.returncode) for worker in workers)


def main(argv=None):
    """Runs the sweep. Returns the exit status: 130 after Ctrl-C, else the workers' highest: 1 if nothing finished."""
    argv = sys.argv[1:] if argv is None else list(map(str, argv))
    sweep = parse_args(argv)
    logger.handlers = [logging.StreamHandler()]
    logger.propagate = False
    logger.setLevel(logging.INFO)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        sweep.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--output_dir: cannot write there: {error}; choose a folder where you have write access"
        ) from error
    with stop_signals():
        if sweep.args.workers > 1:
            status = run_workers(sweep, argv)
        else:
            status = log_end(run_trials(sweep, argv), sweep)
        if stop and stop.number != signal.SIGINT and os.environ.get("PREEMPT_FILE"):
            Path(os.environ["PREEMPT_FILE"]).touch()  # the batch script requeues the job
        return 130 if stop.number == signal.SIGINT else status


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(1)
