#!/usr/bin/env python
"""Search the hyperparameters of train_sdxl_lora.py with Optuna: each trial is a short run, judged by evaluate.py.

    python hpo_sweep.py --output_dir sweeps/a --n_trials 40 --trial_steps 1000 --prompts panel.jsonl -- \\
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 --train_shards data/train \\
        --val_shards data/val --resolution 1024 --train_batch_size 4 --mixed_precision bf16 --train_text_encoder

    python train_sdxl_lora.py --config sweeps/a/best_params.yaml --max_train_steps 10000

What stands after -- goes to every trial. The same command again continues a study that was interrupted or killed;
`--workers N` shares the GPUs of a machine out; several machines that see one --output_dir run the same command. Read
OUTPUT_DIR/report.html while it runs.

The rooms of this file, in the order a study lives:
     1 Arguments    2 Search space    3 Study    4 Processes    5 Trial    6 Report    7 Main
"""

import contextlib
import csv
import ctypes
import html
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
import string
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path


class Stop:
    """Truthy once SIGTERM, SIGUSR1 or Ctrl-C has come."""

    NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self):
        self.number = None

    def __bool__(self):
        return self.number is not None

    def receive(self, number, _frame):
        self.number = number


stop = Stop()
if __name__ == "__main__":
    for number in stop.NUMBERS:  # here, since the imports below take ten seconds
        signal.signal(number, stop.receive)

import filelock
import optuna
import psutil
import torch
import yaml
from optuna.trial import TrialState

import evaluate
import train_sdxl_lora as trainer
from train_sdxl_lora import InputError

ROOT = Path(__file__).resolve().parent
SCRIPT = str(ROOT / "hpo_sweep.py")  # what --workers starts
POLL_SECONDS = 0.5  # between looks at a trial's metrics
HEARTBEAT_SECONDS = 10  # between a worker's signs of life, for other machines
DEAD_SECONDS = 120  # without one, after which a worker on another machine is taken for dead
STOP_SECONDS = 60  # that a child has to save and leave before it is killed
MAX_ATTEMPTS = 2  # of a trial whose process was killed from outside, say for memory
LOG_TAIL = 20  # lines of a failed trial's log that the study keeps

logger = logging.getLogger("hpo_sweep")


# ------------------------------------------------------------------------------
# 1 Arguments
# ------------------------------------------------------------------------------

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
    parser = trainer.Parser(
        usage="%(prog)s --output_dir DIR [--FLAG VALUE]… -- FLAGS OF train_sdxl_lora.py",
        description="Search hyperparameters: each trial is a short run of the trainer, judged by evaluate.py.",
        config_file_parser_class=trainer.configargparse.YAMLConfigFileParser,
        formatter_class=lambda prog: trainer.HelpFormatter(prog, max_help_position=34, width=118),
        allow_abbrev=False, add_config_file_help=False, add_env_var_help=False,
    )
    add = parser.add_argument_group("Study").add_argument
    add("--config", is_config_file=True, metavar="FILE", help="YAML file of any of these flags; the command line wins")
    add("--output_dir", required=True, metavar="DIR", help="trials, best_params.yaml, trials.csv, report.html")
    add("--n_trials", type=int, default=20, metavar="N", help="trials of the whole study, over all workers")
    add("--objective", choices=list(OBJECTIVES), default="score",
        help="what is best; pareto: adherence and aesthetic, a front instead of one best")
    add("--search_space", metavar="FILE", help="YAML, see README; learning rate, ranks and caption dropout by default")
    add("--seed", type=int, default=0, metavar="N", help="seed of the sampler")
    add("--startup_trials", type=int, default=8, metavar="N", help="drawn at random before TPE and the pruner begin")
    add("--storage", metavar="URL", help="database of Optuna; a journal in --output_dir by default")
    add("--study_name", default="sweep", metavar="NAME", help="in that database, and the W&B group")

    add = parser.add_argument_group("Trials").add_argument
    add("--trial_steps", type=int, default=1000, metavar="STEPS", help="the same budget for every trial")
    add("--pruner", choices=["median", "hyperband", "none"], default="median",
        help="ends a trial whose validation loss is hopeless; needs --val_shards")
    add("--pruning_warmup", type=int, metavar="STEPS", help="before a trial can be ended; half the budget by default")
    add("--keep_trials", type=int, default=3, metavar="K", help="keep weights and pictures of the best K")

    add = parser.add_argument_group("Evaluation").add_argument
    add("--prompts", metavar="FILE", help="panel of evaluate.py")
    add("--seeds", type=int, nargs="+", default=[0, 1], metavar="N", help="a picture for each, of every prompt")
    add("--evaluation", metavar="FILE", help="YAML of other flags of evaluate.py")

    add = parser.add_argument_group("Processes").add_argument
    add("--workers", type=int, default=1, metavar="N", help="trials at once on this machine")
    add("--processes_per_trial", type=int, default=1, metavar="N", help="GPUs of a trial")
    add("--accelerate_config", default=str(ROOT / "accelerate_configs/ddp.yaml"), metavar="FILE",
        help="config file for accelerate launch")
    return parser
# fmt: on


@dataclass(frozen=True)
class Sweep:
    """What a study is: the flags, what every trial and evaluation gets, and what is searched."""

    args: object
    trainer_flags: dict  # as given after --, paths absolute
    trainer_args: object  # the same, checked and complete
    evaluation: dict
    space: list

    @property
    def folder(self):
        return Path(self.args.output_dir).expanduser().resolve()

    @property
    def lock(self):
        """Of everything that decides who runs what; the kernel's, so a killed process does not keep it."""
        return filelock.FileLock(self.folder / ".lock")

    @property
    def directions(self):
        return OBJECTIVES[self.args.objective][0]

    @property
    def metrics(self):
        return OBJECTIVES[self.args.objective][1]

    @property
    def prunes(self):
        return self.args.pruner != "none" and len(self.directions) == 1 and bool(self.trainer_args.val_shards)

    def law(self):
        """What must stay the same when a study goes on."""
        names = ("objective", "trial_steps", "seed", "startup_trials", "pruner", "pruning_warmup")
        searched = {p.flag: p.describe() for p in self.space}
        law = {name: getattr(self.args, name) for name in names}
        return law | {"trainer": self.trainer_flags, "evaluation": self.evaluation, "search_space": searched}


def given_flags(parser, words):
    """{flag: value} of what stands on a command line or in its --config, without defaults; paths are made absolute."""
    for action in parser._actions:
        action.default, action.required = trainer.argparse.SUPPRESS, False
    flags = vars(parser.parse_args(words))
    flags.pop("config", None)
    return {name: make_absolute(value) for name, value in flags.items()}


def make_absolute(value):
    """Existing files and folders by their whole path, all else as it is."""
    if isinstance(value, list):
        return [make_absolute(item) for item in value]
    if isinstance(value, str) and not value.startswith("/") and Path(value).exists():
        return str(Path(value).resolve())
    return value


def to_words(flags):
    """A command line of {flag: value}; True and False are switches."""
    words = []
    for name, value in flags.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return words


def read_yaml(flag, path):
    """The mapping in a YAML file. Errors: InputError naming the flag."""
    try:
        content = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"--{flag}: cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not content:
        raise InputError(f"--{flag}: {path} holds no flags; expected lines such as `rank: …`")
    return content


def parse_args(argv=None):
    """Sweep of the flags before and after --, all checked as the trainer and evaluate.py will check them."""
    argv = sys.argv[1:] if argv is None else list(map(str, argv))
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
    if not Path(args.accelerate_config).is_file():
        parser.error(f"--accelerate_config: no file {args.accelerate_config}")
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
    if args.objective == "val_loss" and not trainer_args.val_shards:
        parser.error("--objective: val_loss needs --val_shards after --")
    try:
        space = make_search_space(args.search_space, flags, trainer_args)
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


def refusal_of(flags):
    """What the trainer says against flags, or None when it takes them."""
    with contextlib.redirect_stderr(io.StringIO()) as told:
        try:
            trainer.parse_args(to_words(flags))
        except SystemExit:
            return told.getvalue().partition("error: ")[2].strip()
    return None


def split_words(argv):
    """(words before --, words after)."""
    at = argv.index("--") if "--" in argv else len(argv)
    return argv[:at], argv[at + 1 :]


def make_evaluation(args, trainer_args):
    """Flags of evaluate.py that all trials share."""
    flags = {"resolution": trainer_args.resolution}
    for name in ("pretrained_model_name_or_path", "revision", "variant", "cache_dir"):
        flags[name] = make_absolute(getattr(trainer_args, name))
    if trainer_args.stage == "refiner":
        flags["refiner_unet"] = make_absolute(trainer_args.refiner_unet)
        base = trainer_args.validation_base_lora or trainer_args.text_encoder_2_lora
        flags |= {"lora": [make_absolute(base)]} if base else {}
    if args.evaluation:
        extra = read_yaml("evaluation", args.evaluation)
        known = {action.dest for action in evaluate.make_parser()._actions}
        for name in extra:
            if name not in known or name in ("output_dir", "config", "report_to", "checkpoints"):
                raise InputError(
                    f"--evaluation: {args.evaluation}: {name} is no flag of evaluate.py that a sweep takes"
                )
        flags |= {name: make_absolute(value) for name, value in extra.items()}
    flags |= {"prompts": args.prompts and make_absolute(args.prompts), "seeds": args.seeds}
    return {name: value for name, value in flags.items() if value is not None}


# ------------------------------------------------------------------------------
# 2 Search space
# ------------------------------------------------------------------------------

# Seam: what is searched by default, per stage. Contract: flags of the trainer, in the format of --search_space.
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
    """A flag that is searched: a range of numbers (`whole`: integers), or choices; `when` other flags have values."""

    flag: str
    low: float | None = None
    high: float | None = None
    log: bool = False
    whole: bool = False
    choices: tuple = ()
    when: tuple = ()  # ((flag, value), …)

    def describe(self):
        return {k: v for k, v in vars(self).items() if v not in (None, (), False)} | {"when": list(self.when)}

    def applies(self, flags):
        return all(flags.get(name) == value for name, value in self.when)

    @property
    def plain(self):
        """Whether all choices are values that Optuna keeps; others travel as JSON."""
        return all(isinstance(choice, (bool, int, float, str)) for choice in self.choices)

    def suggest(self, trial):
        if self.choices:
            if self.plain:
                return trial.suggest_categorical(self.flag, self.choices)
            return json.loads(trial.suggest_categorical(self.flag, [json.dumps(c) for c in self.choices]))
        if self.whole:
            return trial.suggest_int(self.flag, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(self.flag, self.low, self.high, log=self.log)

    def corners(self):
        """Values that the trainer must take if it is to take all."""
        if self.choices:
            return list(self.choices)
        return [int(self.low), int(self.high)] if self.whole else [self.low, self.high]


def make_search_space(path, given, trainer_args):
    """[Parameter], those first on which others depend. Errors: InputError naming the file and the flag."""
    rows = read_yaml("search_space", path) if path else SEARCH_SPACES[trainer_args.stage]
    source = f"--search_space: {path or 'the default'}"
    actions = {action.dest: action for action in trainer.make_parser()._actions}
    space = []
    for flag, row in rows.items():
        if flag not in actions or flag in ("config", "output_dir", "max_train_steps", "help"):
            raise InputError(f"{source}: {flag} is no flag of train_sdxl_lora.py that can be searched")
        if path is None and flag in given:
            continue  # given after --: not searched
        if flag in given:
            raise InputError(f"{source}: {flag} is searched and given after --; leave one of them out")
        try:
            space.append(read_parameter(flag, row, actions[flag].type is int))
        except (TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{source}: {flag}: {error}") from None
        for name, _ in space[-1].when:
            searched = [p.flag for p in space[:-1]]
            if name not in actions or name in rows and name not in searched:
                raise InputError(f"{source}: {flag}: `when` names {name}: no flag, or searched below; put it above")
    fixed = vars(trainer_args)
    searched = {parameter.flag for parameter in space}
    return [p for p in space if all(n in searched or fixed.get(n) == value for n, value in p.when)]


def read_parameter(flag, row, whole):
    """Parameter of a row of --search_space. Errors: ValueError saying what is wrong with it."""
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
    low, high, log = float(row["low"]), float(row["high"]), bool(row.get("log", False))  # YAML reads 1e-4 as a text
    if not low < high:
        raise ValueError(f"found low {low:g} and high {high:g}; expected low below high")
    if log and low <= 0:
        raise ValueError(f"found low {low:g} with log; expected a number above 0")
    if whole and (low % 1 or high % 1):
        raise ValueError(f"found {low:g} to {high:g}; the flag takes whole numbers")
    return Parameter(flag, low, high, log, whole, when=when)


def corner_values(space):
    """{flag: value}s in which every parameter takes each of its extremes once, the others their first."""
    first = {p.flag: p.corners()[0] for p in space}
    for parameter in space:
        for value in parameter.corners():
            yield first | dict(parameter.when) | {parameter.flag: value}


def suggest_flags(trial, sweep):
    """{flag: value} of a trial: what the sampler proposes, in the order of the space."""
    fixed, values = vars(sweep.trainer_args), {}
    for parameter in sweep.space:
        if parameter.applies(fixed | values):
            values[parameter.flag] = parameter.suggest(trial)
    return values


# ------------------------------------------------------------------------------
# 3 Study: who runs which trial
# ------------------------------------------------------------------------------


def open_study(sweep):
    """The study; made when it is not there. Errors: InputError when the flags are not those it was begun with."""
    storage = sweep.args.storage
    if storage is None:
        journal = sweep.folder / "study.journal"
        drop_torn_line(journal)
        lock = filelock.FileLock(f"{journal}.lock")  # Optuna's own keeps others out for 30 s after a kill
        storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journal), lock))
    try:
        study = optuna.create_study(
            study_name=sweep.args.study_name, storage=storage, directions=sweep.directions, load_if_exists=True
        )
    except Exception as error:  # a database that does not answer, an unknown URL
        raise InputError(f"--storage: {sweep.args.storage}: {' '.join(str(error).split())[:300]}") from error
    begun, law = study.user_attrs.get("law"), json.loads(json.dumps(sweep.law()))
    for name in law if begun else ():
        if law[name] != begun[name]:
            found = f"found {json.dumps(law[name])}, the study was begun with {json.dumps(begun[name])}"
            raise InputError(f"--{name}: {found}; give that, or another --output_dir")
    if not begun:
        study.set_user_attr("law", law)
    return study


def drop_torn_line(journal):
    """Cuts off a last line that a machine's crash left half-written; Optuna would refuse the whole journal."""
    data = journal.read_bytes() if journal.exists() else b""
    if data and not data.endswith(b"\n"):
        os.truncate(journal, data.rfind(b"\n") + 1)


def make_sampler(sweep, proposal):
    """TPE whose draws depend on the seed and on how many trials were proposed before, not on restarts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(
            seed=trainer.torch_seed(sweep.args.seed, proposal) % 2**32,
            n_startup_trials=sweep.args.startup_trials,
            multivariate=True,
            group=True,  # parameters that apply sometimes
            constant_liar=True,  # other workers' running trials count as bad ones
        )


def make_pruner(sweep):
    args = sweep.args
    if not sweep.prunes:
        return optuna.pruners.NopPruner()
    if args.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(max(1, args.pruning_warmup), args.trial_steps)
    return optuna.pruners.MedianPruner(args.startup_trials, args.pruning_warmup)


def worker_id():
    """ "host pid start" of this process: a pid alone may be another process tomorrow."""
    return f"{socket.gethostname()} {os.getpid()} {psutil.Process().create_time():.0f}"


def is_alive(worker, folder):
    """Whether a trial's process still works on it: asked on this machine, by its signs of life on another."""
    if worker is None:
        return False
    host, pid, begun = worker.split()
    if host == socket.gethostname():
        try:
            return abs(psutil.Process(int(pid)).create_time() - float(begun)) < 2
        except psutil.NoSuchProcess:
            return False
    clock, sign = folder.parent / f".clock-{socket.gethostname()}", folder / "heartbeat"
    clock.touch()  # the shared filesystem's own time
    return sign.exists() and clock.stat().st_mtime - sign.stat().st_mtime < DEAD_SECONDS


def proposals(study):
    """Trials that are no second attempt at another."""
    return [t for t in study.get_trials(deepcopy=False) if "retry_of" not in t.user_attrs]


def claim_trial(study, sweep):
    """(Trial, its folder) for this process to run, or None when all are taken. Call it with the sweep's lock.

    A trial whose worker is gone goes on where it was; then come second attempts, then new proposals.
    """
    for frozen in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        folder = trial_folder(sweep, frozen)
        if not is_alive(frozen.user_attrs.get("worker"), folder):
            end_leftovers(folder)
            study.sampler = make_sampler(sweep, frozen.number)
            trial = optuna.trial.Trial(study, frozen._trial_id)
            break
    else:
        enqueue_second_attempts(study)
        waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        number = len(proposals(study))
        if not waiting and number >= sweep.args.n_trials:
            return None
        study.sampler = make_sampler(sweep, number)
        trial = study.ask()
    folder = trial_folder(sweep, trial)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "heartbeat").touch()
    trial.set_user_attr("worker", worker_id())
    flags = suggest_flags(trial, sweep)
    if not (folder / "trial.yaml").exists():
        write_yaml(folder / "trial.yaml", trial_flags(sweep, folder, flags))
    return trial, folder


def enqueue_second_attempts(study):
    """Queues trials that were killed and have not been tried again."""
    trials = study.get_trials(deepcopy=False)
    attempts = {(t.user_attrs.get("retry_of", t.number), t.user_attrs.get("attempt", 1)) for t in trials}
    for trial in trials:
        first, attempt = trial.user_attrs.get("retry_of", trial.number), trial.user_attrs.get("attempt", 1)
        killed = trial.state == TrialState.FAIL and trial.user_attrs.get("reason", "").startswith("killed")
        if killed and attempt < MAX_ATTEMPTS and (first, attempt + 1) not in attempts:
            study.enqueue_trial(trial.params, user_attrs={"retry_of": first, "attempt": attempt + 1})


def trial_folder(sweep, trial):
    """A second attempt goes on in the folder of the first."""
    return sweep.folder / f"trial-{trial.user_attrs.get('retry_of', trial.number):04d}"


def trial_flags(sweep, folder, searched):
    """Everything a trial gets, in the file of flags that freezes it."""
    steps = sweep.args.trial_steps
    defaults = {
        "report_to": "none",
        "seed": sweep.args.seed,
        "checkpointing_steps": max(1, steps // 4),
        "checkpoints_total_limit": 1,
        "validation_steps": max(1, steps // 8),
        "cache_dir": str(sweep.folder / "cache"),  # one index for all
    }
    imposed = {"max_train_steps": steps, "output_dir": str(folder), "resume_from_checkpoint": "latest"}
    return defaults | sweep.trainer_flags | searched | imposed


def write_yaml(path, content):
    trainer.write_file(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode())


# ------------------------------------------------------------------------------
# 4 Processes
# ------------------------------------------------------------------------------


@contextlib.contextmanager
def stop_signals():
    """Signals mean: let the child save, and leave; outside, they are the caller's again."""
    before = {number: signal.signal(number, stop.receive) for number in stop.NUMBERS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        stop.number = None


def die_with_parent():
    """In a child, on Linux: SIGTERM when the sweep is gone, even by SIGKILL."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def start_child(command, log, extra=None):
    """Popen of a command in a session of its own, so that a Ctrl-C reaches it through the sweep alone."""
    env = {k: v for k, v in os.environ.items() if k != "PREEMPT_FILE"} | (extra or {})
    with open(log, "ab") as stream:
        stream.write(f"$ {shlex.join(command)}\n".encode())
        stream.flush()
        return subprocess.Popen(
            command, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL, env=env, start_new_session=True,
            preexec_fn=die_with_parent,
        )  # fmt: skip


def end_processes(processes):
    """SIGTERM to the first, which passes it on; after STOP_SECONDS SIGKILL to what is left of all."""
    with contextlib.suppress(psutil.NoSuchProcess):
        processes[0].terminate()
    _, left = psutil.wait_procs(processes, STOP_SECONDS)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, STOP_SECONDS)


def end_child(child):
    """Ends a child and all that it started."""
    try:
        parent = psutil.Process(child.pid)
        end_processes([parent, *parent.children(recursive=True)])
    except psutil.NoSuchProcess:
        pass
    child.wait()


def end_leftovers(folder):
    """Ends trainers and evaluations of this machine that still work in a dead worker's trial."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or ()
        ours = any(word.endswith(("train_sdxl_lora.py", "evaluate.py")) for word in words)
        if ours and any(word.startswith(f"{folder}/") for word in words):
            with contextlib.suppress(psutil.NoSuchProcess):
                end_processes([process, *process.children(recursive=True)])


def launch(sweep, script, words):
    """The command that runs a script of the project on a trial's processes, on a port of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", sweep.args.accelerate_config]
    command += ["--num_processes", str(sweep.args.processes_per_trial), "--main_process_port", str(port)]
    return [*command, str(ROOT / script), *words]


# ------------------------------------------------------------------------------
# 5 Trial: train, watch, judge
# ------------------------------------------------------------------------------


class TrialFailed(Exception):
    """A trial that ended with a fault of its own; the message is the reason."""


class TrialKilled(TrialFailed):
    """A trial whose process was killed from outside."""


def validation_rows(folder):
    """[(step, validation loss)] of a run so far, each step once."""
    path, found = folder / "metrics.jsonl", {}
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):  # the last line may be under way
            row = json.loads(line)
            if row.get("val_loss") is not None:
                found[row["step"]] = row["val_loss"]
    return sorted(found.items())


def read_reason(log, code):
    """Why a process failed: the last line that says so, or the last line."""
    text = log.read_text(errors="replace").replace("\r", "\n")
    own = re.findall(r"\w+\.py: error: (.+)", text)  # the scripts' words, before what a launcher adds
    told = re.findall(r".*(?:Error: |OutOfMemory).*", text) or re.findall(r".*\S.*", text) or ["no word"]
    return f"exit {code}: {(own or told)[-1].strip()[:500]}"


def watch(child, folder, look=lambda: None):
    """Waits for a child; ends it when `look` raises.

    Errors: TrialFailed and TrialKilled when it failed, KeyboardInterrupt when the sweep was told to stop.
    """
    beat = 0.0
    try:
        while child.poll() is None:
            if stop:
                raise KeyboardInterrupt
            if time.monotonic() - beat > HEARTBEAT_SECONDS:
                (folder / "heartbeat").touch()
                beat = time.monotonic()
            look()
            time.sleep(POLL_SECONDS)
    finally:
        end_child(child)
    if stop:  # SLURM tells the child too, which may be the first to go
        raise KeyboardInterrupt
    if child.returncode:
        reason = read_reason(folder / "log.txt", child.returncode)
        killed = re.search(r"Signal 9|SIGKILL|exitcode +: -9", tail_of(folder / "log.txt"))
        raise (TrialKilled if child.returncode == -signal.SIGKILL or killed else TrialFailed)(reason)


def tail_of(log, lines=LOG_TAIL):
    return "\n".join(log.read_text(errors="replace").replace("\r", "\n").splitlines()[-lines:])


def child_environment(sweep):
    accelerators = torch.cuda.is_available() or torch.backends.mps.is_available()
    env = {} if accelerators else {"ACCELERATE_USE_CPU": "true"}
    return env | {"WANDB_RUN_GROUP": sweep.args.study_name, "PYTHONWARNINGS": "ignore"}


def train(sweep, study, trial, folder):
    """Runs the trainer on trial.yaml. Errors: TrialPruned when its validation loss is hopeless."""
    reported = study.get_trials(deepcopy=False)[trial.number].intermediate_values
    seen = set(sorted(reported)[:-1])  # a sweep that died may have left the last one undecided
    sign = -1 if sweep.directions[0] == "maximize" else 1  # the pruner follows the study's direction

    def look():
        for step, loss in validation_rows(folder) if len(sweep.directions) == 1 else ():
            if step in seen:
                continue
            seen.add(step)
            if step not in reported:
                trial.report(sign * loss, step)
            if sweep.prunes and step < sweep.args.trial_steps and trial.should_prune():
                raise optuna.TrialPruned(f"validation loss {loss:.5f} at step {step}")

    look()
    command = launch(sweep, "train_sdxl_lora.py", ["--config", str(folder / "trial.yaml")])
    env = child_environment(sweep) | {"WANDB_NAME": folder.name, "WANDB_JOB_TYPE": "trial"}
    watch(start_child(command, folder / "log.txt", env), folder, look)
    look()  # the last rows
    if not (folder / f"checkpoint-{sweep.args.trial_steps}").exists():
        raise TrialKilled("told to stop from outside before its last step")
    last = validation_rows(folder)
    if last and last[-1][1] != last[-1][1]:
        raise TrialFailed("the validation loss is not a number")


def judge(sweep, folder):
    """Runs evaluate.py on what a trial trained."""
    refiner = sweep.trainer_args.stage == "refiner"
    flags = sweep.evaluation | {"output_dir": str(folder / "evaluation"), "images_dir": str(sweep.folder / "images")}
    flags |= {"refiner_lora": str(folder)} if refiner else {"lora": [str(folder)]}
    command = launch(sweep, "evaluate.py", to_words(flags))
    watch(start_child(command, folder / "log.txt", child_environment(sweep)), folder)


def read_values(sweep, trial, path):
    """[value, …] of the objective, of evaluate.py's metrics.json; the trial gets all its metrics."""
    *_, entry = json.loads(path.read_text())["models"].values()
    trial.set_user_attr("metrics", {name: entry[name] for name in evaluate.METRICS if name in entry})
    missing = [name for name in sweep.metrics if name not in entry]
    if missing:
        raise TrialFailed(f"the evaluation has no {missing[0]}; give it an aesthetic_head")
    return [entry[metric]["mean"] for metric in sweep.metrics]


def run_trial(sweep, study, trial, folder):
    """(TrialState, values, reason). Errors: KeyboardInterrupt when told to stop; the trial then stays as it is."""
    verdict = folder / "evaluation/metrics.json"
    try:
        if not verdict.exists():  # else a sweep died before it could tell
            train(sweep, study, trial, folder)
        if sweep.metrics is None:
            return TrialState.COMPLETE, [validation_rows(folder)[-1][1]], None
        if not verdict.exists():
            judge(sweep, folder)
        return TrialState.COMPLETE, read_values(sweep, trial, verdict), None
    except optuna.TrialPruned as pruned:
        return TrialState.PRUNED, None, str(pruned)
    except TrialFailed as failed:
        killed = isinstance(failed, TrialKilled)
        return TrialState.FAIL, None, f"killed, {failed}" if killed else str(failed)


def tell(study, trial, folder, state, values, reason):
    """Records how a trial ended. Call it with the sweep's lock."""
    if reason:
        trial.set_user_attr("reason", reason)
    if state == TrialState.FAIL:
        trial.set_user_attr("log", tail_of(folder / "log.txt"))
    study.tell(trial, values, state)


def ranked(study):
    """Finished trials, the best first; of several objectives those of the front come first."""
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(study.directions) == 1:
        sign = -1 if study.direction == optuna.study.StudyDirection.MAXIMIZE else 1
        return sorted(done, key=lambda t: (sign * t.value, t.number))
    front = {t.number for t in study.best_trials}
    return sorted(done, key=lambda t: (t.number not in front, -t.user_attrs["metrics"]["score"]["mean"], t.number))


def remove_big_files(study, sweep):
    """Weights and pictures of all finished trials but the best --keep_trials. Call it with the sweep's lock."""
    ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL))
    busy = study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING))
    kept = [trial_folder(sweep, t) for t in [*ranked(study)[: sweep.args.keep_trials], *busy]]
    for folder in {trial_folder(sweep, t) for t in ended} - set(kept):
        pictures = folder / "evaluation/per_image.csv"
        if pictures.exists():
            with open(pictures, newline="", encoding="utf-8") as file:
                *_, last = csv.DictReader(file)  # of the trial itself; the base model's are everybody's
            shutil.rmtree((pictures.parent / last["file"]).parent, ignore_errors=True)
        for path in [*folder.glob("checkpoint-*"), *folder.glob("*.safetensors")]:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


# ------------------------------------------------------------------------------
# 6 Report
# ------------------------------------------------------------------------------


def decode_params(sweep, params):
    """{flag: value} as the trainer takes them, of what Optuna holds."""
    coded = {p.flag for p in sweep.space if p.choices and not p.plain}
    return {name: json.loads(value) if name in coded else value for name, value in params.items()}


def finished_values(trial):
    """[value, …] of the objective; none of a pruned trial, whose value is its last validation loss."""
    return trial.values if trial.state == TrialState.COMPLETE else []


def write_best_params(study, sweep):
    """best_params.yaml: the flags after -- and the best trial's, for `train_sdxl_lora.py --config`."""
    best = ranked(study)[:1]
    if best:
        own = {"seed": sweep.args.seed} | sweep.trainer_flags | decode_params(sweep, best[0].params)
        write_yaml(sweep.folder / "best_params.yaml", own | {"output_dir": str(sweep.folder / "best")})


def write_trials_csv(study, sweep):
    """trials.csv: a row per trial."""
    names = sweep.metrics or ("val_loss",)
    rows = []
    for t in study.get_trials(deepcopy=False):
        row = {"trial": t.number, "folder": trial_folder(sweep, t).name, "state": t.state.name.lower()}
        row |= dict(zip(names, finished_values(t) or [None] * len(names)))
        row |= {p.flag: decode_params(sweep, t.params).get(p.flag) for p in sweep.space}
        row["last_val_loss"] = abs(t.intermediate_values[t.last_step]) if t.intermediate_values else None
        row["seconds"] = round(t.duration.total_seconds(), 1) if t.duration else None
        rows.append(row | {"reason": t.user_attrs.get("reason")})
    if rows:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        trainer.write_file(sweep.folder / "trials.csv", text.getvalue().encode())


@dataclass
class Axis:
    """Places values in [0, 1]: numbers along a line, or of a logarithm; others side by side in their order."""

    values: list
    log: bool = False

    def __post_init__(self):
        self.numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in self.values)
        if self.numbers:
            self.low, self.high = self.scale(min(self.values)), self.scale(max(self.values))
        else:
            self.names = sorted(set(map(str, self.values)))

    def scale(self, value):
        return math.log10(value) if self.log else value

    def place(self, value):
        if self.numbers:
            return (self.scale(value) - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return (self.names.index(str(value)) + 0.5) / len(self.names)

    def ticks(self):
        """[(place, label)]."""
        if not self.numbers:
            return [(self.place(name), name) for name in self.names]
        distinct = sorted(set(self.values))
        if len(distinct) > 5:
            distinct = [distinct[0], distinct[-1]]
        return [(self.place(value), f"{value:.4g}") for value in distinct]


def draw_plot(x, y, marks, lines=(), label="", width=420, height=220):
    """SVG of `marks` [(x, y, class, text)] and `lines` [([(x, y), …], class)] on two Axis."""
    left, bottom, top = 56, height - 26, 12

    def at(a, b):
        return left + (width - left - 16) * x.place(a), bottom - (bottom - top) * y.place(b)

    parts = [f"<path class=axis d='M{left} {top}V{bottom}H{width - 8}'/>"]
    for place, name in x.ticks():
        spot = left + (width - left - 16) * place
        parts.append(f"<text x='{spot:.1f}' y='{height - 8}' text-anchor=middle>{html.escape(name)}</text>")
    for place, name in y.ticks()[:: max(1, len(y.ticks()) - 1)]:
        parts.append(f"<text x={left - 6} y='{bottom - (bottom - top) * place + 4:.1f}' text-anchor=end>{name}</text>")
    for points, kind in lines:
        path = " ".join("{:.1f},{:.1f}".format(*at(*point)) for point in points)
        parts.append(f"<polyline class={kind} points='{path}'/>")
    for a, b, kind, text in marks:
        cx, cy = at(a, b)
        parts.append(
            f"<circle class={kind} cx='{cx:.1f}' cy='{cy:.1f}' r=4><title>{html.escape(text)}</title></circle>"
        )
    title = html.escape(label)
    svg = f"<svg viewBox='0 0 {width} {height}' role=img aria-label='{title}'>{''.join(parts)}</svg>"
    return f"<figure><figcaption>{title}</figcaption>{svg}</figure>"


def describe(trial):
    return f"trial {trial.number}: " + ", ".join(f"{k} {format_value(v)}" for k, v in trial.params.items())


def format_value(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def plot_history(done, sweep, index):
    """The objective over trials, and the best so far."""
    best, line = None, []
    better = max if sweep.directions[index] == "maximize" else min
    for trial in done:
        best = trial.values[index] if best is None else better(best, trial.values[index])
        line.append((trial.number, best))
    name = (sweep.metrics or ("validation loss",))[index]
    x, y = Axis([t.number for t in done]), Axis([t.values[index] for t in done])
    marks = [(t.number, t.values[index], "done", describe(t)) for t in done]
    return draw_plot(x, y, marks, [(line, "best")], f"{name} of each trial, and the best so far")


def plot_losses(trials, sign):
    """The validation loss of every trial as it trained; pruned ones are grey."""
    shown = [t for t in trials if t.intermediate_values]
    points = {t.number: [(s, sign * v) for s, v in sorted(t.intermediate_values.items())] for t in shown}
    flat = [point for line in points.values() for point in line]
    if not flat:
        return ""
    x, y = Axis([step for step, _ in flat]), Axis([loss for _, loss in flat])
    kinds = {t.number: "pruned" if t.state == TrialState.PRUNED else "best" for t in shown}
    marks = [
        (*line[-1], kinds[n], f"trial {n}: {line[-1][1]:.5f} at step {line[-1][0]}") for n, line in points.items()
    ]
    lines = [(line, kinds[n]) for n, line in points.items()]
    return draw_plot(x, y, marks, lines, "validation loss over steps; grey: pruned")


def plot_slices(done, sweep, index):
    """The objective over each parameter."""
    name, plots = (sweep.metrics or ("validation loss",))[index], []
    for parameter in sweep.space:
        own = [t for t in done if parameter.flag in t.params]
        if own:
            x = Axis([t.params[parameter.flag] for t in own], parameter.log)
            marks = [(t.params[parameter.flag], t.values[index], "done", describe(t)) for t in own]
            plots.append(
                draw_plot(x, Axis([t.values[index] for t in own]), marks, (), f"{name} over {parameter.flag}")
            )
    return "".join(plots)


def importance_table(study, index):
    """How much of the objective's spread each parameter explains, by PED-ANOVA (arXiv:2304.10255)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = optuna.importance.get_param_importances(
                study, evaluator=optuna.importance.PedAnovaImportanceEvaluator(), target=lambda t: t.values[index]
            )
        except Exception:  # too few trials, or a parameter that is always the same
            return ""
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td><meter value='{share:.3f}'></meter> {100 * share:.0f} %</td></tr>"
        for name, share in found.items()
    )
    return f"<table>{rows}</table>"


def best_section(study, sweep):
    """The best trials: what was set, what came out, pictures."""
    parts = []
    for trial in ranked(study)[: sweep.args.keep_trials]:
        folder = trial_folder(sweep, trial)
        metrics = trial.user_attrs.get("metrics", {})
        shown = ", ".join(f"{evaluate.METRICS[k]} {v['mean']:.3f}" for k, v in metrics.items())
        grid, picture = folder / "evaluation/grid.png", ""
        if grid.exists():
            image, prompts = evaluate.Image.open(grid), len(evaluate.read_panel(sweep.evaluation.get("prompts")))
            first = image.crop((0, 0, image.width, image.height // prompts * min(prompts, 6)))
            picture = f"<img src='{evaluate.data_uri(first, 768)}' alt='base model and trial {trial.number}'>"
        values = ", ".join(f"{value:.4f}" for value in trial.values)
        chosen = html.escape(describe(trial).partition(": ")[2])
        parts.append(f"<section><h3>trial {trial.number}: {values}</h3><p>{chosen}</p>")
        parts.append(f"<p><small>{html.escape(shown)}</small></p>{picture}</section>")
    return "".join(parts)


def trials_table(study, sweep):
    rows, names = [], sweep.metrics or ("validation loss",)
    for t in study.get_trials(deepcopy=False):
        params = decode_params(sweep, t.params)
        cells = [format_value(params.get(p.flag, "–")) for p in sweep.space]
        values = [f"{value:.4f}" for value in finished_values(t)] or ["–"] * len(names)
        state = t.state.name.lower() + (f": {t.user_attrs['reason']}" if "reason" in t.user_attrs else "")
        line = "".join(f"<td>{html.escape(cell)}</td>" for cell in [*values, *cells, state])
        rows.append(f"<tr><th>{t.number}</th>{line}</tr>")
    head = "".join(f"<th>{html.escape(name)}</th>" for name in [*names, *(p.flag for p in sweep.space), "state"])
    return f"<div class=scroll><table><tr><th>trial</th>{head}</tr>{''.join(rows)}</table></div>"


PAGE = string.Template("""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<title>Sweep</title>
<style>
:root { color-scheme: light dark; --line: #8884; --accent: light-dark(#0a6, #4d9) }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem }
h1 { font-size: 1.6rem; line-height: 1.2 } h3 { font-size: 1rem; margin: 0 }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .3rem .8rem .3rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top }
.plots, .best { display: grid; gap: 1rem 2rem }
.plots, .best { grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)) }
figure { margin: 0 } figcaption { font-size: .9rem } img { max-width: 100%; image-rendering: auto }
svg { width: 100%; fill: none } svg text { fill: currentColor; font-size: 12px }
.axis { stroke: #888 } polyline.best { stroke: var(--accent); stroke-width: 1.5 } polyline.pruned { stroke: #888a }
circle.done, circle.best { fill: var(--accent) } circle.pruned { fill: #888 } meter { width: 8rem }
pre { overflow-x: auto; padding: .6rem; border: 1px solid var(--line) }
</style>
<h1>$title</h1>
<p>$intro</p>
<h2>Best trials</h2><div class=best>$best</div>
<h2>How it went</h2><div class=plots>$plots</div>
$importance
<h2>Slices</h2><div class=plots>$slices</div>
<h2>All trials</h2>$trials
<h2>How this was made</h2><pre>$command</pre><p><small>$versions</small></p>
</html>
""")


def write_report(study, sweep, argv):
    """report.html: one file, no request to anywhere."""
    trials = study.get_trials(deepcopy=False)
    done = [t for t in trials if t.state == TrialState.COMPLETE]
    count = {state: sum(t.state == state for t in trials) for state in TrialState}
    title = f"{count[TrialState.COMPLETE]} trials finished, {count[TrialState.PRUNED]} pruned, "
    title += f"{count[TrialState.FAIL]} failed, {count[TrialState.RUNNING]} running"
    objectives = range(len(sweep.directions)) if done else ()  # of pareto there are two
    plots = [plot_history(done, sweep, i) for i in objectives]
    if len(sweep.directions) == 2 and done:
        front = {t.number for t in study.best_trials}
        marks = [(*t.values, "done" if t.number in front else "pruned", describe(t)) for t in done]
        axes = [Axis([t.values[i] for t in done]) for i in (0, 1)]
        line = sorted((tuple(t.values), "") for t in done if t.number in front)
        label = f"{sweep.metrics[1]} over {sweep.metrics[0]}; the line is the front"
        plots.append(draw_plot(*axes, marks, [([point for point, _ in line], "best")], label))
    else:
        plots.append(plot_losses(trials, -1 if sweep.directions[0] == "maximize" else 1))
    importance = "".join(importance_table(study, i) for i in objectives)
    page = PAGE.substitute(
        title=title,
        intro=f"Objective: {html.escape(sweep.args.objective)}, {sweep.args.trial_steps} steps a trial. "
        "best_params.yaml is a --config file for the full run.",
        best=best_section(study, sweep) or "<p>None has finished yet.</p>",
        plots="".join(plots),
        importance=f"<h2>Importance</h2>{importance}" if importance else "",
        slices="".join(plot_slices(done, sweep, i) for i in objectives),
        trials=trials_table(study, sweep),
        command=html.escape(" ".join(["hpo_sweep.py", *map(shlex.quote, argv)])),
        versions=html.escape(f"optuna {optuna.__version__}, torch {torch.__version__}"),
    )
    trainer.write_file(sweep.folder / "report.html", page.encode())


def write_outputs(study, sweep, argv):
    """Call it with the sweep's lock."""
    write_best_params(study, sweep)
    write_trials_csv(study, sweep)
    write_report(study, sweep, argv)


# ------------------------------------------------------------------------------
# 7 Main
# ------------------------------------------------------------------------------


def log_end(study, sweep, trial, state, values, reason):
    told = {TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}.get(state, "finished")
    names = sweep.metrics or ("validation loss",)
    shown = ", ".join(f"{n} {v:.4f}" for n, v in zip(names, values or ()))
    best = ranked(study)[:1]
    so_far = f" (best: trial {best[0].number})" if best and values else ""
    logger.info("trial %d %s: %s%s", trial.number, told, reason or shown, so_far)


def work(sweep, argv):
    """Runs trials until all are taken or a signal says stop."""
    with sweep.lock:
        study = open_study(sweep)
    study.pruner = make_pruner(sweep)
    while not stop:
        with sweep.lock:
            claimed = claim_trial(study, sweep)
        if claimed is None:
            break
        trial, folder = claimed
        logger.info("%s", describe(trial))
        try:
            state, values, reason = run_trial(sweep, study, trial, folder)
        except KeyboardInterrupt:
            break
        with sweep.lock:
            tell(study, trial, folder, state, values, reason)
            remove_big_files(study, sweep)
            write_outputs(study, sweep, argv)
        log_end(study, sweep, trial, state, values, reason)
    with sweep.lock:
        write_outputs(study, sweep, argv)
    return study


def split_gpus(visible, workers, each):
    """[CUDA_VISIBLE_DEVICES of each worker], of the names in this process's own; Nones without GPUs."""
    gpus = [gpu for gpu in visible.split(",") if gpu]
    return [",".join(gpus[n * each : (n + 1) * each]) if gpus else None for n in range(workers)]


def share_out(sweep, argv):
    """Runs --workers processes of this script, each on its share of the GPUs; their worst exit status."""
    own, words = split_words(argv)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    workers = []
    for gpus in split_gpus(visible, sweep.args.workers, sweep.args.processes_per_trial):
        share = {"CUDA_VISIBLE_DEVICES": gpus} if gpus else {}
        command = [sys.executable, SCRIPT, *own, "--workers", "1", "--", *words]
        workers.append(
            subprocess.Popen(command, env=os.environ | share, start_new_session=True, preexec_fn=die_with_parent)
        )
    told = False
    while any(worker.poll() is None for worker in workers):
        if stop and not told:
            told = True
            for worker in workers:
                worker.send_signal(stop.number)
        time.sleep(POLL_SECONDS)
    return max(abs(worker.returncode) for worker in workers)


def main(argv=None):
    """Exit status: 0 when all trials were taken or a scheduler said stop, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else list(map(str, argv))
    sweep = parse_args(argv)
    logger.handlers, logger.propagate = [logging.StreamHandler()], False
    logger.setLevel(logging.INFO)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        sweep.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output_dir: cannot write there: {error}; give a folder you can write to") from error
    with stop_signals():
        if sweep.args.workers > 1:
            status = share_out(sweep, argv)
        else:
            study = work(sweep, argv)
            status = 0
            logger.info("%d of %d trials; see %s", len(study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED,
                TrialState.FAIL))), sweep.args.n_trials, sweep.folder / "report.html")  # fmt: skip
        if stop and stop.number != signal.SIGINT and os.environ.get("PREEMPT_FILE"):
            Path(os.environ["PREEMPT_FILE"]).touch()  # tells a batch script to requeue
        return 130 if stop.number == signal.SIGINT else status


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(1)
