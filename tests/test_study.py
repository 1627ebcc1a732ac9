"""hpo_sweep.py, without a trial: what each flag does to the study, the sampler, the pruner and the commands."""

from types import SimpleNamespace

import optuna
import pytest
import yaml
from harness import ROOT, SDXL

import hpo_sweep


@pytest.fixture
def parse(world, tmp_path):
    """The sweep of a small command line with some more flags."""
    space = tmp_path / "space.yaml"
    space.write_text(yaml.safe_dump({"learning_rate": {"low": 1e-5, "high": 1e-1, "log": True}}))

    def run(*words):
        trainer_words = ["--pretrained_model_name_or_path", SDXL, "--train_shards", world / "data/train"]
        trainer_words += ["--val_shards", world / "data/val", "--resolution", 64, "--mixed_precision", "no"]
        own = ["--output_dir", tmp_path / "sweep", "--search_space", space, *words]
        sweep = hpo_sweep.parse_args([*own, "--", *trainer_words])
        sweep.folder.mkdir(exist_ok=True)
        return sweep

    return run


def test_flags_may_come_from_a_config_file_and_the_command_line_wins(parse, tmp_path):
    (tmp_path / "flags.yaml").write_text("n_trials: 7\ntrial_steps: 90\n")
    args = parse("--config", tmp_path / "flags.yaml", "--trial_steps", 80).args
    assert (args.n_trials, args.trial_steps) == (7, 80)


def test_the_panel_its_seeds_and_other_flags_reach_evaluate(parse, tmp_path):
    (tmp_path / "panel.jsonl").write_text('{"prompt": "a mew"}\n')
    (tmp_path / "more.yaml").write_text("guidance_scale: 3.0\n")
    words = ["--prompts", tmp_path / "panel.jsonl", "--seeds", 4, 5, "--evaluation", tmp_path / "more.yaml"]
    flags = parse(*words).evaluation
    assert flags["prompts"] == str(tmp_path / "panel.jsonl")
    assert (flags["seeds"], flags["guidance_scale"]) == ([4, 5], 3.0)


def test_a_trial_runs_on_its_processes_under_its_accelerate_config(parse, tmp_path):
    (tmp_path / "own.yaml").write_text((ROOT / "accelerate_configs/ddp.yaml").read_text())
    sweep = parse("--processes_per_trial", 3, "--accelerate_config", tmp_path / "own.yaml")
    command = hpo_sweep.launch(sweep, "evaluate.py", ["--seeds", "1"])
    assert command[command.index("--config_file") + 1] == str(tmp_path / "own.yaml")
    assert command[command.index("--num_processes") + 1] == "3"
    assert command[-3:] == [str(ROOT / "evaluate.py"), "--seeds", "1"]


# ---- the study


def test_the_study_lies_in_the_database_of_storage(parse, tmp_path):
    url = f"sqlite:///{tmp_path}/studies.db"
    hpo_sweep.open_study(parse("--storage", url, "--study_name", "night"))
    assert [study.study_name for study in optuna.get_all_study_summaries(url)] == ["night"]
    assert not (tmp_path / "sweep/study.journal").exists()
    hpo_sweep.open_study(parse())
    assert (tmp_path / "sweep/study.journal").exists()


def propose(sweep, finished):
    """The learning rate that a study with so many finished trials proposes next."""
    study = optuna.create_study(direction="maximize")
    distribution = {"learning_rate": optuna.distributions.FloatDistribution(1e-5, 1e-1, log=True)}
    for n in range(finished):
        rate = 10 ** (-1 - 4 * n / finished)
        study.add_trial(optuna.create_trial(params={"learning_rate": rate}, distributions=distribution, value=n))
    study.sampler = hpo_sweep.make_sampler(sweep, finished)
    return hpo_sweep.suggest_flags(study.ask(), sweep)["learning_rate"]


def test_the_sampler_draws_at_random_until_startup_trials_are_there(parse):
    learned, early, random = (propose(parse("--startup_trials", n), 12) for n in (3, 13, 99))
    assert early == random != learned
    assert propose(parse("--startup_trials", 13, "--seed", 1), 12) != early


def is_hopeless(sweep, step, finished=4):
    """Whether the pruner ends a trial that is worse at `step` than all the finished ones."""
    study = optuna.create_study(direction="maximize", pruner=hpo_sweep.make_pruner(sweep))
    for _ in range(finished):
        study.add_trial(optuna.create_trial(value=-1.0, intermediate_values=dict.fromkeys(range(1, 101), -1.0)))
    trial = study.ask()
    for s in range(1, step + 1):
        trial.report(-9.0, s)
    return trial.should_prune()


def test_a_hopeless_trial_is_ended_after_the_warm_up_once_there_are_others(parse):
    words = ["--trial_steps", 100, "--pruning_warmup", 20, "--startup_trials", 4]
    assert [is_hopeless(parse(*words), step) for step in (10, 30)] == [False, True]
    assert not is_hopeless(parse(*words), 30, finished=3)
    assert not is_hopeless(parse("--trial_steps", 100, "--startup_trials", 4), 30)  # half the budget is warm-up


@pytest.mark.parametrize(
    "name, kind", [("median", "MedianPruner"), ("hyperband", "HyperbandPruner"), ("none", "NopPruner")]
)
def test_the_pruner_is_the_one_of_the_flag(parse, name, kind):
    assert type(hpo_sweep.make_pruner(parse("--pruner", name))).__name__ == kind


@pytest.mark.parametrize("visible, shares", [("0,1,2,3", ["0,1", "2,3"]), ("", [None, None])])
def test_each_worker_gets_its_share_of_the_gpus_and_the_same_words(parse, monkeypatch, visible, shares):
    started = []

    def start(command, env, **options):
        started.append((command, env.get("CUDA_VISIBLE_DEVICES")))
        return SimpleNamespace(poll=lambda: 0, returncode=0)

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    sweep = parse("--workers", 2, "--processes_per_trial", 2)
    monkeypatch.setattr(hpo_sweep.subprocess, "Popen", start)
    hpo_sweep.run_workers(sweep, ["--n_trials", "9", "--", "--rank", "4"])
    assert [gpus or None for _, gpus in started] == shares
    assert all(command[2:] == ["--n_trials", "9", "--workers", "1", "--", "--rank", "4"] for command, _ in started)
