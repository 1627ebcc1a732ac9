"""hpo_sweep.py: a study that survives kills, runs each trial once, proposes the same again, leaves nothing running.

Most tests run the real sweep on a stand-in for the trainer (fake_run.py); the last ones run everything.
"""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import optuna
import psutil
import pytest
import yaml
from harness import CHROMIUM, ROOT, SDXL, assert_ok, browse, run_trainer, start_trainer
from optuna.trial import TrialState

import hpo_sweep
import train_sdxl_lora as trainer

FAKE = ROOT / "tests/fake_run.py"
LEARNING_RATE = {"learning_rate": {"low": 1e-5, "high": 1e-1, "log": True}}


def use_fakes(module):
    module.launch = lambda sweep, script, words: [sys.executable, str(FAKE), script, *words]
    module.POLL_SECONDS, module.STOP_SECONDS = 0.05, 10


def write_space(folder, space):
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump(space, sort_keys=False))
    return path


@pytest.fixture
def words(world, tmp_path):
    """A function that makes the sweep's words; `space` is what is searched."""

    def make(*own, space=None, fixed=("--rank", 4)):
        space = write_space(tmp_path, space or LEARNING_RATE)
        trainer_words = ["--pretrained_model_name_or_path", SDXL, "--train_shards", world / "data/train"]
        trainer_words += ["--val_shards", world / "data/val", "--resolution", 64, "--mixed_precision", "no", *fixed]
        common = ["--trial_steps", 16, "--startup_trials", 3, "--search_space", space, "--accelerate_config"]
        return [*common, ROOT / "accelerate_configs/ddp.yaml", *own, "--", *trainer_words]

    return make


def sweep(argv, folder, ok=True, **options):
    result = run_trainer(argv, folder, script="hpo_sweep", setup=use_fakes, **options)
    return assert_ok(result) if ok else result


def start(argv, folder, **env):
    (child, log), *_ = start_trainer(argv, folder, script="hpo_sweep", setup=use_fakes, env=env)
    return child


def trials_of(folder):
    backend = optuna.storages.journal.JournalFileBackend(str(folder / "study.journal"))
    return optuna.load_study(study_name="sweep", storage=optuna.storages.JournalStorage(backend)).trials


def done(folder, trial):
    """What the stand-ins noted of a trial."""
    path = folder / f"trial-{trial:04d}/fake.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def working_in(folder):
    """Processes that work on a trial of the folder."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        if any(str(word).startswith(f"{folder}/trial-") for word in process.info["cmdline"] or ()):
            found += [process.info["cmdline"]] if process.info["status"] != psutil.STATUS_ZOMBIE else []
    return found


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def kill(child):
    os.kill(child.pid, signal.SIGKILL)
    child.join()


# ---- a study survives


def test_ten_kills_lose_no_trial_run_none_twice_and_change_no_proposal(words, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    sweep(words("--n_trials", 12), whole)
    expected = {t.number: t.params for t in trials_of(whole)}
    assert len(expected) == 12
    for n in range(10):
        child = start(words("--n_trials", 12), killed, FAKE_STEP_SECONDS="0.08")
        time.sleep(0.4 + 0.17 * (7 * n % 10))
        kill(child)
        wait_until(lambda: not working_in(killed))  # nothing is left behind
    sweep(words("--n_trials", 12), killed)
    trials = trials_of(killed)
    assert {t.number: t.params for t in trials} == expected
    assert [t.state for t in trials] == [t.state for t in trials_of(whole)]
    assert [t.values for t in trials] == [t.values for t in trials_of(whole)]
    starts = [[row["step"] for row in done(killed, t.number) if row["did"] == "start"] for t in trials]
    assert sum(len(s) > 1 for s in starts) >= 4  # the kills met trials under way
    assert any(s[-1] > 0 for s in starts)  # and those went on where they had saved
    for t in trials:
        did = [row["did"] for row in done(killed, t.number)]
        assert did.count("judged") == (t.state == TrialState.COMPLETE)
        # "trained" again when the sweep died between training and judging; then from its last step
        assert all(row["step"] == 16 for row in done(killed, t.number) if row["did"] == "trained")


def die_before_telling(module):
    """The sweep dies each time it first wants to tell how a trial ended."""
    use_fakes(module)
    tell = module.tell

    def die_once(study, trial, folder, *how):
        if not (folder / "died").exists():
            (folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        tell(study, trial, folder, *how)

    module.tell = die_once


def test_what_ended_but_was_not_told_is_told_and_not_run_again(words, tmp_path):
    whole, killed, argv = tmp_path / "whole", tmp_path / "killed", words("--n_trials", 8)
    sweep(argv, whole)
    for _ in range(8):
        assert run_trainer(argv, killed, script="hpo_sweep", setup=die_before_telling).codes == [-signal.SIGKILL]
    sweep(argv, killed)
    trials, expected = trials_of(killed), trials_of(whole)
    assert TrialState.PRUNED in [t.state for t in trials]
    for t, e in zip(trials, expected, strict=True):
        assert (t.state, t.values, t.params) == (e.state, e.values, e.params)
        assert t.intermediate_values == e.intermediate_values
        did = [row["did"] for row in done(killed, t.number)]
        assert did == (["start", "told to stop"] if t.state == TrialState.PRUNED else ["start", "trained", "judged"])


def test_two_workers_on_one_journal_lose_and_double_nothing(words, tmp_path):
    folder = tmp_path / "sweep"
    children = [start(words("--n_trials", 12), folder) for _ in range(2)]
    for child in children:
        child.join(120)
        assert child.exitcode == 0
    trials = trials_of(folder)
    assert [t.number for t in trials] == list(range(12))
    assert all(t.state in (TrialState.COMPLETE, TrialState.PRUNED) for t in trials)
    assert all([row["did"] for row in done(folder, n)].count("start") == 1 for n in range(12))
    assert len({t.user_attrs["worker"] for t in trials}) == 2
    assert len({t.params["learning_rate"] for t in trials}) == 12


def test_workers_are_shared_out_by_one_command_and_end_with_it(words, tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text(
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "import hpo_sweep, test_sweep\n"
        "test_sweep.use_fakes(hpo_sweep)\n"
        "hpo_sweep.SCRIPT = __file__\n"
        "sys.exit(hpo_sweep.main())\n"
    )
    argv = ["--output_dir", tmp_path / "sweep", *words("--n_trials", 40, "--workers", 2)]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "FAKE_STEP_SECONDS": "0.2"}
    parent = subprocess.Popen([sys.executable, driver, *map(str, argv)], env=env)
    wait_until(lambda: len(working_in(tmp_path / "sweep")) == 2, 120)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(30) == 0
    assert not working_in(tmp_path / "sweep")


def test_the_same_seed_proposes_the_same_and_another_seed_does_not(words, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        sweep(words("--n_trials", 8, "--seed", seed), tmp_path / name)
    a, b, c = ([t.params for t in trials_of(tmp_path / name)] for name in "abc")
    assert a == b and a != c


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_trial_and_the_same_command_goes_on(number, words, tmp_path):
    folder = tmp_path / "sweep"
    child = start(words("--n_trials", 2), folder, FAKE_STEP_SECONDS="0.1", PREEMPT_FILE=str(tmp_path / "told"))
    wait_until(lambda: (folder / "trial-0000/metrics.jsonl").exists())
    os.kill(child.pid, number)
    child.join(20)
    assert child.exitcode == (130 if number == signal.SIGINT else 0)
    assert (tmp_path / "told").exists() == (number == signal.SIGTERM)
    assert not working_in(folder)
    assert done(folder, 0)[-1]["did"] == "told to stop"
    assert (folder / "report.html").exists()
    sweep(words("--n_trials", 2), folder)
    assert [t.state for t in trials_of(folder)] == [TrialState.COMPLETE] * 2
    assert [row["did"] for row in done(folder, 0)] == ["start", "told to stop", "start", "trained", "judged"]
    assert done(folder, 0)[2]["step"] == done(folder, 0)[1]["step"] > 0


def test_a_trainer_that_somebody_stopped_has_not_finished_its_trial(words, tmp_path):
    folder = tmp_path / "sweep"
    child = start(words("--n_trials", 1), folder, FAKE_STEP_SECONDS="0.1")
    wait_until(lambda: (folder / "trial-0000/metrics.jsonl").exists())
    os.kill(done(folder, 0)[0]["pid"], signal.SIGTERM)  # it saves and exits with 0
    child.join(20)
    stopped, again = trials_of(folder)
    assert stopped.state == TrialState.FAIL and "told to stop from outside" in stopped.user_attrs["reason"]
    assert again.state == TrialState.COMPLETE and again.user_attrs["retry_of"] == 0
    assert [row["did"] for row in done(folder, 0)] == ["start", "told to stop", "start", "trained", "judged"]


@pytest.mark.slow
def test_a_signal_during_the_imports_is_not_lost(words, tmp_path):
    argv = [sys.executable, ROOT / "hpo_sweep.py", "--output_dir", tmp_path / "sweep", *words("--n_trials", 40)]
    child = subprocess.Popen([*map(str, argv)], env=os.environ | {"PREEMPT_FILE": str(tmp_path / "told")})
    time.sleep(2)
    child.send_signal(signal.SIGTERM)
    assert child.wait(120) == 0
    assert (tmp_path / "told").exists() and not trials_of(tmp_path / "sweep")


def test_a_worker_of_another_machine_is_dead_when_it_gives_no_sign(tmp_path, monkeypatch):
    folder = tmp_path / "trial-0000"
    folder.mkdir()
    own = hpo_sweep.worker_id()
    _, pid, begun = own.split()
    assert hpo_sweep.is_alive(own, folder)
    assert not hpo_sweep.is_alive(f"{socket.gethostname()} {pid} {float(begun) - 60}", folder)  # another process now
    assert not hpo_sweep.is_alive(f"elsewhere {pid} {begun}", folder)
    (folder / "heartbeat").touch()
    assert hpo_sweep.is_alive(f"elsewhere {pid} {begun}", folder)
    os.utime(folder / "heartbeat", (time.time(), time.time() - hpo_sweep.DEAD_SECONDS - 5))
    assert not hpo_sweep.is_alive(f"elsewhere {pid} {begun}", folder)


def test_only_our_own_leftovers_are_ended(tmp_path):
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    reader = subprocess.Popen([*sleeper, f"{tmp_path}/trial-0000/log.txt"])  # say, a pager
    trainer_left = subprocess.Popen([*sleeper, "train_sdxl_lora.py", f"{tmp_path}/trial-0000/trial.yaml"])
    other = subprocess.Popen([*sleeper, "train_sdxl_lora.py", f"{tmp_path}/trial-00001/trial.yaml"])
    try:
        hpo_sweep.end_leftovers(tmp_path / "trial-0000")
        assert trainer_left.poll() is not None and reader.poll() is None and other.poll() is None
    finally:
        for process in (reader, trainer_left, other):
            process.kill()
            process.wait()


def test_workers_get_gpus_of_their_own():
    assert hpo_sweep.split_gpus("0,1,2,3", 2, 2) == ["0,1", "2,3"]
    assert hpo_sweep.split_gpus("5,GPU-7f", 2, 1) == ["5", "GPU-7f"]
    assert hpo_sweep.split_gpus("", 2, 1) == [None, None]


def test_trials_are_one_group_of_wandb_runs(words, tmp_path):
    sweep(words("--n_trials", 2, "--study_name", "night"), tmp_path / "sweep")
    rows = [done(tmp_path / "sweep", n)[0] for n in range(2)]
    assert [(row["group"], row["name"]) for row in rows] == [("night", "trial-0000"), ("night", "trial-0001")]


def test_more_trials_continue_a_finished_study(words, tmp_path):
    sweep(words("--n_trials", 2), tmp_path / "sweep")
    sweep(words("--n_trials", 4), tmp_path / "sweep")
    assert len(trials_of(tmp_path / "sweep")) == 4
    assert sum(row["did"] == "start" for n in range(4) for row in done(tmp_path / "sweep", n)) == 4


def test_another_study_in_the_same_folder_is_refused(words, tmp_path):
    sweep(words("--n_trials", 1), tmp_path / "sweep")
    result = sweep(words("--n_trials", 2, "--seed", 5), tmp_path / "sweep", ok=False)
    assert "--seed: found 5, the study was begun with 0" in result.output
    result = sweep(words("--n_trials", 2, fixed=("--rank", 8)), tmp_path / "sweep", ok=False)
    assert "--trainer: found" in result.output and len(trials_of(tmp_path / "sweep")) == 1


def test_a_journal_that_a_crash_cut_short_is_read_on(words, tmp_path):
    sweep(words("--n_trials", 2), tmp_path / "sweep")
    with open(tmp_path / "sweep/study.journal", "a") as file:
        file.write('{"op_code": 4, "worker')
    sweep(words("--n_trials", 3), tmp_path / "sweep")
    assert [t.state for t in trials_of(tmp_path / "sweep")][:2] == [TrialState.COMPLETE] * 2
    assert len(trials_of(tmp_path / "sweep")) == 3


# ---- hopeless and failed trials


def test_pruning_follows_the_loss_in_a_study_that_maximises(words, tmp_path):
    """The stand-in's loss is lowest at a learning rate of 1e-3; the score is 1 minus it."""
    sweep(words("--n_trials", 12), tmp_path / "sweep")
    trials = trials_of(tmp_path / "sweep")
    distance = {state: [] for state in TrialState}
    for t in trials[3:]:
        distance[t.state].append(abs(trainer.math.log10(t.params["learning_rate"]) + 3))
    assert distance[TrialState.PRUNED] and distance[TrialState.COMPLETE]
    assert min(distance[TrialState.PRUNED]) > min(distance[TrialState.COMPLETE])
    for t in trials:
        did = [row["did"] for row in done(tmp_path / "sweep", t.number)]
        assert did == (["start", "told to stop"] if t.state == TrialState.PRUNED else ["start", "trained", "judged"])
        assert t.state == TrialState.COMPLETE or t.last_step >= 8  # half is warm-up


def test_a_trial_that_fails_is_one_failed_trial_with_its_reason(words, tmp_path):
    space = LEARNING_RATE | {"rank": {"choices": [1, 2, 4]}}
    sweep(words("--n_trials", 12, "--pruner", "none", space=space, fixed=()), tmp_path / "sweep")
    trials = trials_of(tmp_path / "sweep")
    assert len(trials) == 12
    reasons = {1: "CUDA ran out of memory; see --train_batch_size", 2: "--train_shards: no shard found"}
    for t in trials:
        assert t.state == (TrialState.FAIL if t.params["rank"] in reasons else TrialState.COMPLETE)
        if t.state == TrialState.FAIL:
            assert reasons[t.params["rank"]] in t.user_attrs["reason"] and "error" in t.user_attrs["log"]
    assert {t.params["rank"] for t in trials} == {1, 2, 4}
    with open(tmp_path / "sweep/trials.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows] == [t.state.name.lower() for t in trials]
    assert yaml.safe_load((tmp_path / "sweep/best_params.yaml").read_text())["rank"] == 4


def test_a_trial_that_was_killed_is_tried_once_more(words, tmp_path):
    space = LEARNING_RATE | {"rank": {"choices": [3]}}
    sweep(words("--n_trials", 2, space=space, fixed=()), tmp_path / "sweep")
    trials = trials_of(tmp_path / "sweep")
    assert [t.state for t in trials] == [TrialState.FAIL] * 4
    firsts = [t for t in trials if "retry_of" not in t.user_attrs]
    seconds = [t for t in trials if "retry_of" in t.user_attrs]
    assert [t.params for t in firsts] == [t.params for t in seconds] and len(firsts) == 2
    assert all(t.user_attrs["reason"].startswith("killed") for t in trials)


def test_pareto_has_a_front_and_no_pruning(words, tmp_path):
    sweep(words("--n_trials", 6, "--objective", "pareto"), tmp_path / "sweep")
    trials = trials_of(tmp_path / "sweep")
    assert all(t.state == TrialState.COMPLETE and len(t.values) == 2 for t in trials)
    assert "the line is the front" in (tmp_path / "sweep/report.html").read_text()


def test_val_loss_needs_no_pictures(words, tmp_path):
    sweep(words("--n_trials", 4, "--objective", "val_loss"), tmp_path / "sweep")
    trials = [t for t in trials_of(tmp_path / "sweep") if t.state == TrialState.COMPLETE]
    assert all("judged" not in [row["did"] for row in done(tmp_path / "sweep", t.number)] for t in trials)
    best = yaml.safe_load((tmp_path / "sweep/best_params.yaml").read_text())
    assert best["learning_rate"] == min(trials, key=lambda t: t.value).params["learning_rate"]


def test_weights_are_kept_of_the_best_alone(words, tmp_path):
    sweep(words("--n_trials", 6, "--pruner", "none", "--keep_trials", 2), tmp_path / "sweep")
    best = sorted(trials_of(tmp_path / "sweep"), key=lambda t: -t.value)
    kept = [t.number for t in best if (tmp_path / f"sweep/trial-{t.number:04d}/checkpoint-16").exists()]
    weights = [t.number for t in best if list((tmp_path / f"sweep/trial-{t.number:04d}").glob("*.safetensors"))]
    assert kept == weights == [t.number for t in best[:2]]
    assert all((tmp_path / f"sweep/trial-{n:04d}/metrics.jsonl").exists() for n in range(6))


# ---- what is refused before anything runs


@pytest.mark.parametrize(
    ("space", "told"),
    [
        ({"learning_rat": {"low": 1e-4, "high": 1e-3}}, "learning_rat is no flag of train_sdxl_lora.py"),
        ({"learning_rate": {"low": 1e-3, "high": 1e-4}}, "learning_rate: found low 0.001 and high 0.0001"),
        ({"learning_rate": {"low": 0, "high": 1e-4, "log": True}}, "learning_rate: found low 0 with log"),
        ({"learning_rate": {"low": "little", "high": 1}}, "learning_rate: could not convert"),
        ({"learning_rate": {"from": 1, "to": 2}}, "learning_rate: found from, to"),
        ({"learning_rate": 3}, "learning_rate: found 3; expected low and high, or choices"),
        ({"lora_dropout": {"low": 0, "high": 3}}, "space.yaml: --lora_dropout: found 3.0"),
        ({"crop": {"choices": ["center", "round"]}}, "--crop: invalid choice: 'round'"),
        ({"text_encoder_rank": {"low": 1.5, "high": 8}}, "text_encoder_rank: found 1.5 to 8"),
        ({"rank": {"choices": [4, 8]}}, "rank is searched and given after --"),
        ({"text_encoder_rank": {"choices": [4], "when": {"no_such": 1}}}, "`when` names no_such"),
        ({"max_train_steps": {"choices": [4, 8]}}, "max_train_steps is no flag"),
    ],
)
def test_a_bad_search_space_is_refused_in_one_line(space, told, words, tmp_path):
    result = sweep(words(space=space), tmp_path / "sweep", ok=False)
    assert result.codes == [2] and told in result.output and len(result.output.strip().splitlines()) == 1
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("own", "fixed", "told"),
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
def test_bad_flags_are_refused_in_one_line(own, fixed, told, words, tmp_path):
    result = sweep(words(*own, fixed=fixed), tmp_path / "sweep", ok=False)
    assert result.codes == [2] and told in result.output and len(result.output.strip().splitlines()) == 1
    assert not (tmp_path / "sweep").exists()


# ---- the search space


def parsed(words, tmp_path, **options):
    return hpo_sweep.parse_args(["--output_dir", tmp_path / "sweep", *words(**options)])


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
    assert all(f["species_mix"] in ([0.0, 1.0, 100], [0.2, 0.95, 6000]) for f in flags)
    assert not any("text_encoder_rank" in f for f in flags)  # no text encoder is trained
    found = parsed(words, tmp_path, space=space, fixed=("--rank", 4, "--train_text_encoder"))
    assert all("text_encoder_rank" in hpo_sweep.suggest_flags(study.ask(), found) for _ in range(5))


@pytest.mark.parametrize(("stage", "high"), [("base", 8e-4), ("refiner", 3e-4)])
def test_the_default_space_is_that_of_the_design(stage, high, words, tmp_path):
    extra = ("--stage", "refiner", "--refiner_unet", ROOT / "demo/refiner/unet") if stage == "refiner" else ()
    argv = list(words(fixed=extra))
    at = argv.index("--search_space")
    del argv[at : at + 2]
    found = hpo_sweep.parse_args(["--output_dir", tmp_path / "sweep", *argv])
    by_flag = {p.flag: p for p in found.space}
    assert by_flag["learning_rate"].high == high and by_flag["learning_rate"].log
    assert set(by_flag["caption_dropout_rate"].choices) == {0.05, 0.10, 0.15}
    assert (8 in by_flag["rank"].choices) == (stage == "refiner")


def test_a_trial_is_frozen_in_a_file_that_the_trainer_takes(words, tmp_path):
    sweep(words("--n_trials", 1), tmp_path / "sweep")
    flags = tmp_path / "sweep/trial-0000/trial.yaml"
    args = trainer.parse_args(["--config", str(flags)])
    assert args.max_train_steps == 16 and args.lora_alpha == args.rank == 4 and args.lr_warmup_steps is None
    assert args.output_dir == str(tmp_path / "sweep/trial-0000") and args.cache_dir == str(tmp_path / "sweep/cache")
    best = trainer.parse_args(["--config", str(tmp_path / "sweep/best_params.yaml"), "--max_train_steps", "10000"])
    assert best.learning_rate == args.learning_rate and best.output_dir == str(tmp_path / "sweep/best")


# ---- the report


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_the_report_shows_history_importance_slices_and_every_trial(width, words, tmp_path):
    space = LEARNING_RATE | {"rank": {"choices": [1, 4, 8]}}
    sweep(words("--n_trials", 10, space=space, fixed=()), tmp_path / "sweep")
    page_width, plots, circles, trials, meters = browse(
        tmp_path / "sweep/report.html",
        tmp_path,
        width,
        *(f"page.querySelectorAll('{query}').length" for query in ("svg", "circle", "tr > th:first-child", "meter")),
    )
    states = [t.state for t in trials_of(tmp_path / "sweep")]
    finished = states.count(TrialState.COMPLETE)
    shown = sum(bool(t.intermediate_values) for t in trials_of(tmp_path / "sweep"))
    assert float(page_width) <= width
    assert int(plots) == 4 and int(circles) == 3 * finished + shown  # history, losses, two slices
    assert int(meters) == 2 and int(trials) == 1 + 10 + 2  # head, trials, importance of two


# ---- everything, for real


@pytest.mark.slow
def test_a_sweep_of_real_runs_hands_back_a_file_that_trains(words, tmp_path):
    panel = tmp_path / "panel.jsonl"
    panel.write_text("".join((ROOT / "demo/panel.jsonl").read_text().splitlines(keepends=True)[:2]))
    clip = f"local-dir:{ROOT / 'demo/clip'}"
    judged = {"num_inference_steps": 2, "dtype": "fp32", "clip_model": clip, "aesthetic_clip_model": clip}
    (tmp_path / "evaluation.yaml").write_text(
        yaml.safe_dump(judged | {"aesthetic_head": str(ROOT / "demo/aesthetic-linearMSE.pth")})
    )
    space = {"learning_rate": {"choices": [1e-3, 1e18]}}
    own = ("--n_trials", 3, "--prompts", panel, "--seeds", 0, "--evaluation", tmp_path / "evaluation.yaml")
    argv = words(*own, space=space)
    argv[argv.index("--trial_steps") + 1] = 4
    argv += ["--train_batch_size", 2, "--dataloader_num_workers", 0]
    folder = tmp_path / "sweep"
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "hpo_sweep.py", "--output_dir", folder, *argv]
    command = [str(word) for word in command]
    killed = subprocess.Popen(command, env=env)
    wait_until(lambda: any("train_sdxl_lora.py" in str(words) for words in working_in(folder)), 120)
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
        assert not diverges or t.user_attrs["reason"].startswith("exit 1: --learning_rate: loss is nan")
    finished = sum(t.state == TrialState.COMPLETE for t in trials)
    assert len(list((folder / "images").iterdir())) == 1 + finished  # the base model's pictures are made once
    assert "data:image" in (folder / "report.html").read_text()
    best = ["--config", folder / "best_params.yaml", "--max_train_steps", 6]
    result = assert_ok(run_trainer(best, tmp_path / "full"))
    assert Path(result.output_dir / "pytorch_lora_weights.safetensors").exists()
