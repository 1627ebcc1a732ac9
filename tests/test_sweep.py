"""hpo_sweep.py survives kills, runs each trial once, makes the same proposals after a restart, ends its processes.

Most tests run the real sweep with a stand-in for the trainer (fake_run.py). The last one runs the real scripts.
"""

import csv
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time

import optuna
import psutil
import pytest
import yaml
from harness import CHROMIUM, ROOT, SDXL, assert_ok, browse, run_trainer, start_trainer
from optuna.trial import TrialState

import hpo_sweep
import train_sdxl_lora as trainer

LEARNING_RATE = {"learning_rate": {"low": 1e-5, "high": 1e-1, "log": True}}


def use_fakes_and_charts(module):
    module.launch = lambda sweep, script, words: [sys.executable, str(ROOT / "tests/fake_run.py"), script, *words]
    module.POLL_SECONDS = 0.05
    module.STOP_SECONDS = 10


def use_fakes(module):
    """Charts take as long as ten fake trials, so most tests write the report without them."""
    use_fakes_and_charts(module)
    module.draw_charts = lambda study, sweep: {}


@pytest.fixture
def words(world, tmp_path):
    """A function that makes a command line without --output_dir; `space` is the search space."""

    def make(*own, space=None, fixed=("--rank", 4)):
        (tmp_path / "space.yaml").write_text(yaml.safe_dump(space or LEARNING_RATE, sort_keys=False))
        trainer_words = ["--pretrained_model_name_or_path", SDXL, "--train_shards", world / "data/train"]
        trainer_words += ["--val_shards", world / "data/val", "--resolution", 64, "--mixed_precision", "no", *fixed]
        common = ["--trial_steps", 16, "--startup_trials", 3, "--search_space", tmp_path / "space.yaml"]
        return [*common, *own, "--", *trainer_words]

    return make


def sweep(argv, folder, ok=True, setup=use_fakes):
    result = run_trainer(argv, folder, script="hpo_sweep", setup=setup)
    if ok:
        assert_ok(result)
    return result


def start(argv, folder, **env):
    return start_trainer(argv, folder, script="hpo_sweep", setup=use_fakes, env=env)[0][0]


def trials_of(folder):
    backend = optuna.storages.journal.JournalFileBackend(str(folder / "study.journal"))
    return optuna.load_study(study_name="sweep", storage=optuna.storages.JournalStorage(backend)).trials


def rows_of(folder, trial):
    """Rows that the stand-ins logged in a trial."""
    path = folder / f"trial-{trial:04d}/fake.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def events_of(folder, trial):
    return [row["event"] for row in rows_of(folder, trial)]


def events_expected(trial):
    return ["started", "stopped"] if trial.state == TrialState.PRUNED else ["started", "trained", "scored"]


def working_in(folder):
    """Command lines of the processes that work on a trial of the folder."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        command = process.info["cmdline"] or []
        works_there = any(str(word).startswith(f"{folder}/trial-") for word in command)
        if works_there and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(command)
    return found


def progress_of(folder):
    """Number of rows that all trials have logged so far: validation losses and events."""
    return sum(path.read_text().count("\n") for path in folder.glob("trial-*/*.jsonl"))


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"nothing happened in {seconds} s"
        time.sleep(0.02)


# ---- interruptions


def test_ten_kills_lose_no_trial_run_none_twice_and_change_no_proposal(words, tmp_path):
    killed = tmp_path / "killed"
    for n in range(10):
        end = progress_of(killed) + 3 + 7 * n % 10
        child = start(words("--n_trials", 12), killed, FAKE_STEP_SECONDS="0.08")
        wait_until(lambda end=end: progress_of(killed) >= end)
        child.kill()
        child.join()
        wait_until(lambda: not working_in(killed))  # the trial's processes end with the sweep
    sweep(words("--n_trials", 12), killed)
    trials = trials_of(killed)
    sweep(words("--n_trials", 12), tmp_path / "undisturbed")
    for trial, same in zip(trials, trials_of(tmp_path / "undisturbed"), strict=True):
        assert (trial.params, trial.state, trial.values) == (same.params, same.state, same.values)
    starts = [[row["step"] for row in rows_of(killed, t.number) if row["event"] == "started"] for t in trials]
    assert len([steps for steps in starts if len(steps) > 1]) >= 4  # kills hit running trials
    assert any(steps[-1] > 0 for steps in starts)  # which then resumed from a checkpoint
    for t in trials:
        times_scored = 1 if t.state == TrialState.COMPLETE else 0
        assert events_of(killed, t.number).count("scored") == times_scored
        # "trained" comes again when the sweep died between training and scoring, but then no step is repeated
        assert all(row["step"] == 16 for row in rows_of(killed, t.number) if row["event"] == "trained")


def die_before_telling(module):
    """The sweep dies once per trial, just before it records the result."""
    use_fakes(module)
    tell = module.tell

    def die_once(study, trial, folder, *how):
        if not (folder / "died").exists():
            (folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        tell(study, trial, folder, *how)

    module.tell = die_once


def test_a_result_that_was_not_recorded_is_recorded_and_the_trial_does_not_run_again(words, tmp_path):
    argv, killed = words("--n_trials", 8), tmp_path / "killed"
    for _ in range(8):
        assert run_trainer(argv, killed, script="hpo_sweep", setup=die_before_telling).codes == [-signal.SIGKILL]
    sweep(argv, killed)
    sweep(argv, tmp_path / "undisturbed")
    for trial, same in zip(trials_of(killed), trials_of(tmp_path / "undisturbed"), strict=True):
        assert (trial.params, trial.state, trial.values) == (same.params, same.state, same.values)
        assert trial.intermediate_values == same.intermediate_values
        assert events_of(killed, trial.number) == events_expected(trial)
    assert TrialState.PRUNED in [t.state for t in trials_of(killed)]


def test_two_workers_on_one_journal_run_each_trial_once(words, tmp_path):
    folder = tmp_path / "sweep"
    children = [start(words("--n_trials", 12), folder) for _ in range(2)]
    for child in children:
        child.join(120)
        assert child.exitcode == 0
    trials = trials_of(folder)
    assert [t.number for t in trials] == list(range(12))
    assert all(t.state in (TrialState.COMPLETE, TrialState.PRUNED) for t in trials)
    assert all(events_of(folder, n).count("started") == 1 for n in range(12))
    assert len({t.user_attrs["worker"] for t in trials}) == 2
    assert len({t.params["learning_rate"] for t in trials}) == 12


def test_one_command_starts_all_workers_and_they_end_with_it(words, tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text(
        f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "import hpo_sweep, test_sweep\n"
        "test_sweep.use_fakes(hpo_sweep)\n"
        "hpo_sweep.SCRIPT = __file__\n"
        "sys.exit(hpo_sweep.main())\n"
    )
    argv = ["--output_dir", tmp_path / "sweep", *words("--n_trials", 40, "--workers", 2)]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "FAKE_STEP_SECONDS": "0.2"}
    parent = subprocess.Popen([sys.executable, driver, *map(str, argv)], env=env)
    wait_until(lambda: len(working_in(tmp_path / "sweep")) == 2, 300)  # three processes import torch
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(60) == 0
    assert not working_in(tmp_path / "sweep")


def test_proposals_depend_on_the_seed_alone(words, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        sweep(words("--n_trials", 8, "--seed", seed), tmp_path / name)
    a, b, c = ([t.params for t in trials_of(tmp_path / name)] for name in "abc")
    assert a == b and a != c


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_trial_and_the_same_command_resumes_it(number, words, tmp_path):
    folder = tmp_path / "sweep"
    child = start(words("--n_trials", 2), folder, FAKE_STEP_SECONDS="0.1", PREEMPT_FILE=str(tmp_path / "preempted"))
    wait_until(lambda: (folder / "trial-0000/metrics.jsonl").exists())
    os.kill(child.pid, number)
    child.join(60)
    assert child.exitcode == (130 if number == signal.SIGINT else 0)
    assert (tmp_path / "preempted").exists() is (number == signal.SIGTERM)
    assert not working_in(folder)
    assert events_of(folder, 0) == ["started", "stopped"]
    assert (folder / "report.html").exists()
    sweep(words("--n_trials", 2), folder)
    assert [t.state for t in trials_of(folder)] == [TrialState.COMPLETE] * 2
    assert events_of(folder, 0) == ["started", "stopped", "started", "trained", "scored"]
    assert rows_of(folder, 0)[2]["step"] == rows_of(folder, 0)[1]["step"] > 0


def test_a_trial_whose_trainer_was_stopped_from_outside_is_tried_again(words, tmp_path):
    folder = tmp_path / "sweep"
    child = start(words("--n_trials", 1), folder, FAKE_STEP_SECONDS="0.1")
    wait_until(lambda: (folder / "trial-0000/metrics.jsonl").exists())
    os.kill(rows_of(folder, 0)[0]["pid"], signal.SIGTERM)  # it saves and exits with 0
    child.join(60)
    stopped, again = trials_of(folder)
    assert stopped.state == TrialState.FAIL and "stopped from outside" in stopped.user_attrs["reason"]
    assert again.state == TrialState.COMPLETE and again.user_attrs["retry_of"] == 0
    assert events_of(folder, 0) == ["started", "stopped", "started", "trained", "scored"]


@pytest.mark.slow
def test_a_signal_during_the_imports_is_not_lost(words, tmp_path):
    argv = [sys.executable, ROOT / "hpo_sweep.py", "--output_dir", tmp_path / "sweep", *words("--n_trials", 40)]
    child = subprocess.Popen([*map(str, argv)], env=os.environ | {"PREEMPT_FILE": str(tmp_path / "preempted")})
    time.sleep(2)
    child.send_signal(signal.SIGTERM)
    assert child.wait(120) == 0
    assert (tmp_path / "preempted").exists() and not trials_of(tmp_path / "sweep")


def test_a_worker_on_another_machine_is_dead_without_a_recent_heartbeat(tmp_path):
    folder = tmp_path / "trial-0000"
    folder.mkdir()
    own = hpo_sweep.worker_id()
    _, pid, started = own.split()
    assert hpo_sweep.is_alive(own, folder)
    assert not hpo_sweep.is_alive(f"{socket.gethostname()} {pid} {float(started) - 60}", folder)  # the pid was reused
    assert not hpo_sweep.is_alive(f"elsewhere {pid} {started}", folder)
    (folder / "heartbeat").touch()
    assert hpo_sweep.is_alive(f"elsewhere {pid} {started}", folder)
    os.utime(folder / "heartbeat", (time.time(), time.time() - hpo_sweep.DEAD_SECONDS - 5))
    assert not hpo_sweep.is_alive(f"elsewhere {pid} {started}", folder)


def test_only_processes_of_this_trial_are_ended(tmp_path):
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    reader = subprocess.Popen([*sleeper, f"{tmp_path}/trial-0000/log.txt"])  # say, a pager
    leftover = subprocess.Popen([*sleeper, "train_sdxl_lora.py", f"{tmp_path}/trial-0000/trial.yaml"])
    other = subprocess.Popen([*sleeper, "train_sdxl_lora.py", f"{tmp_path}/trial-00001/trial.yaml"])
    try:
        hpo_sweep.end_leftovers(tmp_path / "trial-0000")
        assert leftover.poll() is not None and reader.poll() is None and other.poll() is None
    finally:
        for process in (reader, leftover, other):
            process.kill()
            process.wait()


def test_workers_get_gpus_of_their_own():
    assert hpo_sweep.split_gpus("0,1,2,3", 2, 2) == ["0,1", "2,3"]
    assert hpo_sweep.split_gpus("5,GPU-7f", 2, 1) == ["5", "GPU-7f"]
    assert hpo_sweep.split_gpus("", 2, 1) == [None, None]


def test_trials_are_one_group_of_wandb_runs(words, tmp_path):
    sweep(words("--n_trials", 2, "--study_name", "night"), tmp_path / "sweep")
    rows = [rows_of(tmp_path / "sweep", n)[0] for n in range(2)]
    assert [(row["group"], row["name"]) for row in rows] == [("night", "trial-0000"), ("night", "trial-0001")]


def test_another_study_in_the_same_folder_is_refused(words, tmp_path):
    sweep(words("--n_trials", 1), tmp_path / "sweep")
    result = sweep(words("--n_trials", 2, "--seed", 5), tmp_path / "sweep", ok=False)
    assert "--seed: found 5, but this study was started with 0" in result.output
    result = sweep(words("--n_trials", 2, fixed=("--rank", 8)), tmp_path / "sweep", ok=False)
    assert "flags after --: found" in result.output and len(trials_of(tmp_path / "sweep")) == 1


def test_a_finished_study_takes_more_trials_even_after_a_torn_journal(words, tmp_path):
    sweep(words("--n_trials", 2), tmp_path / "sweep")
    with open(tmp_path / "sweep/study.journal", "a") as file:
        file.write('{"op_code": 4, "worker')
    sweep(words("--n_trials", 4), tmp_path / "sweep")
    assert [t.state for t in trials_of(tmp_path / "sweep")][:2] == [TrialState.COMPLETE] * 2
    assert [events_of(tmp_path / "sweep", n).count("started") for n in range(5)] == [1, 1, 1, 1, 0]


# ---- pruned and failed trials


def test_pruning_follows_the_loss_in_a_study_that_maximises(words, tmp_path):
    """The stand-in's loss is lowest at a learning rate of 1e-3, and its score is 1 minus the loss."""
    sweep(words("--n_trials", 12), tmp_path / "sweep")
    trials = trials_of(tmp_path / "sweep")
    distance = {state: [] for state in TrialState}
    for t in trials[3:]:
        distance[t.state].append(abs(math.log10(t.params["learning_rate"]) + 3))
    assert distance[TrialState.PRUNED] and distance[TrialState.COMPLETE]
    assert min(distance[TrialState.PRUNED]) > min(distance[TrialState.COMPLETE])
    for t in trials:
        assert events_of(tmp_path / "sweep", t.number) == events_expected(t)
        assert t.state == TrialState.COMPLETE or t.last_step >= 8  # no pruning in the first half
        assert min(hpo_sweep.validation_losses(t).values()) > 0


def test_a_failed_trial_is_recorded_with_its_reason_and_the_study_continues(words, tmp_path):
    space = LEARNING_RATE | {"rank": {"choices": [1, 2, 4, 5]}}
    sweep(words("--n_trials", 12, "--pruner", "none", space=space, fixed=()), tmp_path / "sweep")
    trials = trials_of(tmp_path / "sweep")
    assert len(trials) == 12
    reasons = {1: "out of memory; see --train_batch_size", 2: "--train_shards: no shard found", 5: "not a number"}
    for t in trials:
        reason = reasons.get(t.params["rank"])
        assert t.state == (TrialState.FAIL if reason else TrialState.COMPLETE)
        if reason:
            assert reason in t.user_attrs["reason"] and "train_sdxl_lora.py" in t.user_attrs["log"]
    assert {t.params["rank"] for t in trials} == {1, 2, 4, 5}
    rows = csv.DictReader((tmp_path / "sweep/trials.csv").read_text().splitlines())
    assert [row["state"] for row in rows] == [t.state.name.lower() for t in trials]
    assert yaml.safe_load((tmp_path / "sweep/best_params.yaml").read_text())["rank"] == 4


def test_a_trial_that_was_killed_is_tried_once_more(words, tmp_path):
    argv = words("--n_trials", 2, space=LEARNING_RATE | {"rank": {"choices": [3]}}, fixed=())
    assert "the last one: killed" in sweep(argv, tmp_path / "sweep", ok=False).output
    trials = trials_of(tmp_path / "sweep")
    assert [t.state for t in trials] == [TrialState.FAIL] * 4
    seconds = {t.user_attrs["retry_of"]: t.params for t in trials if "retry_of" in t.user_attrs}
    assert seconds == {t.number: t.params for t in trials if "retry_of" not in t.user_attrs} and len(seconds) == 2
    assert all(t.user_attrs["reason"].startswith("killed") for t in trials)


def test_pareto_prunes_no_trial_and_reports_the_front(words, tmp_path):
    sweep(words("--n_trials", 6, "--objective", "pareto"), tmp_path / "sweep", setup=use_fakes_and_charts)
    trials = trials_of(tmp_path / "sweep")
    assert all(t.state == TrialState.COMPLETE and len(t.values) == 2 for t in trials)
    assert "Pareto front" in (tmp_path / "sweep/report.html").read_text()


def test_val_loss_needs_no_images(words, tmp_path):
    sweep(words("--n_trials", 4, "--objective", "val_loss"), tmp_path / "sweep")
    trials = [t for t in trials_of(tmp_path / "sweep") if t.state == TrialState.COMPLETE]
    assert all("scored" not in events_of(tmp_path / "sweep", t.number) for t in trials)
    best = yaml.safe_load((tmp_path / "sweep/best_params.yaml").read_text())
    assert best["learning_rate"] == min(trials, key=lambda t: t.value).params["learning_rate"]


def test_only_the_best_trials_keep_their_weights(words, tmp_path):
    sweep(words("--n_trials", 6, "--pruner", "none", "--keep_trials", 2), tmp_path / "sweep")
    best = sorted(trials_of(tmp_path / "sweep"), key=lambda t: -t.value)
    kept = [t.number for t in best if (tmp_path / f"sweep/trial-{t.number:04d}/checkpoint-16").exists()]
    weights = [t.number for t in best if list((tmp_path / f"sweep/trial-{t.number:04d}").glob("*.safetensors"))]
    assert kept == weights == [t.number for t in best[:2]]
    assert all((tmp_path / f"sweep/trial-{n:04d}/metrics.jsonl").exists() for n in range(6))


# ---- errors before anything runs


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"learning_rat": {"low": 1e-4, "high": 1e-3}}, "learning_rat is not a flag of train_sdxl_lora.py"),
        ({"learning_rate": {"low": 1e-3, "high": 1e-4}}, "learning_rate: found low 0.001 and high 0.0001"),
        ({"learning_rate": {"low": 0, "high": 1e-4, "log": True}}, "learning_rate: found low 0 with log"),
        ({"learning_rate": {"low": "little", "high": 1}}, "learning_rate: could not convert"),
        ({"learning_rate": {"from": 1, "to": 2}}, "learning_rate: found from, to"),
        ({"learning_rate": 3}, "learning_rate: found 3; expected low and high, or choices"),
        ({"lora_dropout": {"low": 0, "high": 3}}, "space.yaml: --lora_dropout: found 3.0"),
        ({"crop": {"choices": ["center", "round"]}}, "--crop: invalid choice: 'round'"),
        ({"text_encoder_rank": {"low": 1.5, "high": 8}}, "text_encoder_rank: found 1.5 to 8"),
        ({"rank": {"choices": [4, 8]}}, "rank is also given after --"),
        ({"text_encoder_rank": {"choices": [4], "when": {"no_such": 1}}}, "`when` names no_such"),
        ({"max_train_steps": {"choices": [4, 8]}}, "max_train_steps is not a flag"),
    ],
)
def test_a_bad_search_space_is_refused_in_one_line(space, message, words, tmp_path):
    result = sweep(words(space=space), tmp_path / "sweep", ok=False)
    assert result.codes == [2] and message in result.output and len(result.output.strip().splitlines()) == 1
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("own", "fixed", "message"),
    [
        (("--n_trials", 0), (), "--n_trials: found 0"),
        (("--objective", "luck"), (), "--objective: invalid choice"),
        (("--accelerate_config", "no.yaml"), (), "--accelerate_config: no file no.yaml"),
        ((), ("--max_train_steps", 5), "--max_train_steps: the sweep sets it"),
        ((), ("--no_such_flag", 5), "--no_such_flag: there is no such flag"),
        (("--evaluation", "no.yaml"), (), "--evaluation: cannot read no.yaml"),
        (("--prompts", "no.jsonl"), (), "--prompts: "),
        (("--seeds", 1, 1), (), "--seeds: found 1 1"),
    ],
)
def test_bad_flags_are_refused_in_one_line(own, fixed, message, words, tmp_path):
    result = sweep(words(*own, fixed=fixed), tmp_path / "sweep", ok=False)
    assert result.codes == [2] and message in result.output and len(result.output.strip().splitlines()) == 1
    assert not (tmp_path / "sweep").exists()


# ---- the search space


def parsed(words, tmp_path, *own, **options):
    return hpo_sweep.parse_args(["--output_dir", tmp_path / "sweep", *words(*own, **options)])


def test_conditions_hold_in_every_trial(words, tmp_path):
    space = {
        "optimizer": {"choices": ["adamw", "prodigy"]},
        "learning_rate": {"low": 1e-4, "high": 1e-3, "log": True, "when": {"optimizer": "adamw"}},
        "species_mix": {"choices": [[0.0, 1.0, 100], [0.2, 0.95, 6000]]},
        "text_encoder_rank": {"choices": [4, 8], "when": {"train_text_encoder": True}},
    }
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    found = parsed(words, tmp_path, space=space)
    flags = [hpo_sweep.suggest_flags(study.ask(), found) for _ in range(20)]
    assert all(("learning_rate" in f) == (f["optimizer"] == "adamw") for f in flags)
    assert all(f["class_mix"] in ([0.0, 1.0, 100], [0.2, 0.95, 6000]) for f in flags)
    assert not any("text_encoder_rank" in f for f in flags)  # no text encoder is trained
    found = parsed(words, tmp_path, space=space, fixed=("--rank", 4, "--train_text_encoder"))
    assert all("text_encoder_rank" in hpo_sweep.suggest_flags(study.ask(), found) for _ in range(5))


@pytest.mark.parametrize(("stage", "high"), [("base", 8e-4), ("refiner", 3e-4)])
def test_the_default_space_depends_on_the_stage(stage, high, words, tmp_path):
    extra = ("--stage", "refiner", "--refiner_unet", ROOT / "demo/refiner/unet") if stage == "refiner" else ()
    argv = ["--output_dir", tmp_path / "sweep", *words(fixed=extra)]
    del argv[argv.index("--search_space") : argv.index("--")]
    by_flag = {parameter.flag: parameter for parameter in hpo_sweep.parse_args(argv).space}
    assert by_flag["learning_rate"].high == high and by_flag["learning_rate"].log
    assert set(by_flag["caption_dropout_rate"].choices) == {0.05, 0.10, 0.15}
    assert (8 in by_flag["rank"].choices) == (stage == "refiner")


def test_the_trainer_accepts_trial_yaml_and_best_params_yaml(words, tmp_path):
    sweep(words("--n_trials", 1), tmp_path / "sweep")
    args = trainer.parse_args(["--config", str(tmp_path / "sweep/trial-0000/trial.yaml")])
    assert args.max_train_steps == 16 and args.lora_alpha == args.rank == 4 and args.lr_warmup_steps is None
    assert args.output_dir == str(tmp_path / "sweep/trial-0000") and args.cache_dir == str(tmp_path / "sweep/cache")
    best = trainer.parse_args(["--config", str(tmp_path / "sweep/best_params.yaml"), "--max_train_steps", "10000"])
    assert best.learning_rate == args.learning_rate and best.output_dir == str(tmp_path / "sweep/best")


# ---- the report

SPACE = LEARNING_RATE | {
    "rank": {"choices": [4, 8]},
    "validation_prompt": {"choices": ['<b>&"$_^$', "a heron"]},
    "species_mix": {"choices": [[0.0, 1.0, 100], [0.2, 0.95, 6000]]},
}
MANY = "CPCFCCPRC"  # states of trials: complete, pruned, failed, running


@pytest.fixture
def report(words, tmp_path):
    """A function that writes the report of a study with one trial per letter of `states`, and returns its path."""

    def make(states, *own):
        sweep = parsed(words, tmp_path, *own, space=SPACE, fixed=())
        sweep.folder.mkdir()
        hpo_sweep.write_outputs(make_study(sweep, states), sweep, ["--output_dir", '<b>&"'])
        return sweep.folder / "report.html"

    return make


def make_study(sweep, states):
    study = optuna.create_study(directions=sweep.directions, sampler=optuna.samplers.RandomSampler(seed=0))
    for state in states:
        trial = study.ask()
        loss = abs(math.log10(hpo_sweep.suggest_flags(trial, sweep)["learning_rate"]) + 3)
        if len(sweep.directions) == 1:
            trial.report(-loss - 1, 8)
            trial.report(math.nan if state == "F" else -loss, 16)
        if state == "C":
            trial.set_user_attr("metrics", {"score": {"mean": -loss}, "aesthetic": {"mean": 1 / (1 + loss)}})
            study.tell(trial, [-loss, 1 / (1 + loss)][: len(sweep.directions)])
        elif state != "R":
            trial.set_user_attr("reason", "exit 1: --rank: <i>found</i> 1 & 2")
            study.tell(trial, state=TrialState.PRUNED if state == "P" else TrialState.FAIL)
    return study


@pytest.mark.parametrize(
    ("objective", "states", "charts"),
    [
        ("score", "", 0),
        ("score", "PFR", 1),  # validation losses
        ("score", "C", 2),  # and the history
        ("score", "CC", 2 + 1 + 4),  # and importance, and a slice per flag
        ("score", MANY, 2 + 1 + 4),
        ("val_loss", MANY, 2 + 1 + 4),
        ("pareto", "C", 2 + 1),  # two histories and the front
        ("pareto", MANY, 2 + 1 + 2 * (1 + 4)),
    ],
)
def test_the_report_has_every_chart_for_which_there_are_trials(objective, states, charts, report):
    page = report(states, "--objective", objective).read_text()
    assert page.count("<figure>") == page.count("<svg") == charts
    assert ("Pareto front" in page) is (objective == "pareto")
    assert ("No trial has finished yet." in page) is ("C" not in states)
    assert ("No trial has started yet." in page) is (states == "")
    count = {letter: states.count(letter) for letter in "CPFR"}
    assert "Trials: {C} finished, {P} pruned, {F} failed, {R} running".format(**count) in page


def test_the_report_escapes_what_users_and_trials_wrote(report):
    page = report(MANY).read_text()
    assert "<b>" not in page and "<i>" not in page
    escaped = "&lt;b&gt;&amp;&#34;"
    assert f"validation_prompt {escaped}$_^$" in page  # best trials
    assert f"<td>{escaped}$_^$</td>" in page
    assert f"&#39;{escaped}&#39;" in page  # the command
    assert "exit 1: --rank: &lt;i&gt;found&lt;/i&gt; 1 &amp; 2" in page


def test_charts_leave_the_style_and_the_figures_of_matplotlib_alone(report):
    from matplotlib import pyplot

    style = dict(pyplot.rcParams)
    report(MANY)
    assert dict(pyplot.rcParams) == style and pyplot.get_fignums() == []


def assert_charts_are_not_imported(module):
    assert not [name for name in sys.modules if name.startswith("optuna.visualization")]


def test_charts_are_imported_only_for_a_report(tmp_path):
    sweep(["--help"], tmp_path / "sweep", setup=assert_charts_are_not_imported)


def count(caption, selector):
    """JavaScript that counts the elements in the chart whose caption begins with these words."""
    chart = f"[...page.querySelectorAll('figure')].find(f => f.lastChild.textContent.startsWith('{caption}'))"
    return f"{chart}.querySelectorAll('{selector}').length"


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_the_report_fits_a_screen_and_draws_every_trial(width, report, tmp_path):
    points = count("score over learning_rate", "[id*=PathCollection] use")
    lines = count("validation loss", "[id*=line2d] > path[style*=stroke]")
    bars = count("importance", "[id*=patch] > path[style*=accent]")
    rows = "page.querySelectorAll('tr').length"
    page_width, *found = browse(report(MANY), tmp_path, width, points, lines, bars, rows)
    assert float(page_width) <= width
    assert list(map(int, found)) == [MANY.count("C"), len(MANY), len(SPACE), 1 + len(MANY)]


# ---- the real scripts


@pytest.mark.slow
def test_the_best_params_of_real_trials_train_a_lora(words, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join((ROOT / "demo/panel.jsonl").read_text().splitlines(keepends=True)[:2]))
    clip = f"local-dir:{ROOT / 'demo/clip'}"
    evaluation = {"num_inference_steps": 2, "dtype": "fp32", "clip_model": clip, "aesthetic_clip_model": clip}
    evaluation["aesthetic_head"] = str(ROOT / "demo/aesthetic-linearMSE.pth")
    (tmp_path / "evaluation.yaml").write_text(yaml.safe_dump(evaluation))
    space = {"learning_rate": {"choices": [1e-3, 1e18]}}
    own = ("--n_trials", 3, "--prompts", prompts, "--seeds", 0, "--evaluation", tmp_path / "evaluation.yaml")
    argv = words(*own, space=space)
    argv[argv.index("--trial_steps") + 1] = 4
    argv += ["--train_batch_size", 2, "--dataloader_num_workers", 0]
    folder = tmp_path / "sweep"
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, [ROOT / "hpo_sweep.py", "--output_dir", folder, *argv])]
    killed = subprocess.Popen(command, env=env)
    wait_until(lambda: any("train_sdxl_lora.py" in str(words) for words in working_in(folder)), 300)
    time.sleep(5)  # launcher and trainer are importing torch, or further
    killed.kill()
    killed.wait()
    wait_until(lambda: not working_in(folder), 60)  # the launcher's children too
    subprocess.run(command, check=True, env=env, timeout=500)
    trials = trials_of(folder)
    assert {t.params["learning_rate"] for t in trials} == {1e-3, 1e18}
    for t in trials:
        diverges = t.params["learning_rate"] > 1
        assert t.state == (TrialState.FAIL if diverges else TrialState.COMPLETE)
        assert not diverges or "loss is nan" in t.user_attrs["reason"]
    finished = [t.state for t in trials].count(TrialState.COMPLETE)
    assert len(list((folder / "images").iterdir())) == 1 + finished  # the images of the base model are made once
    assert "data:image" in (folder / "report.html").read_text()
    best = ["--config", folder / "best_params.yaml", "--max_train_steps", 6]
    assert_ok(run_trainer(best, tmp_path / "full"))
    assert (tmp_path / "full/pytorch_lora_weights.safetensors").exists()
