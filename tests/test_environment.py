"""What surrounds a run: Accelerate's variables, signals, every way to start again, what a failed world says last.

The three tables at the top are complete: each row is run. ENVIRONMENT has every variable with which Accelerate 1.15
changes how an Accelerator trains; SIGNALS every signal that people and machines send; STARTS every way to start again.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from functools import partial
from types import SimpleNamespace

import pytest
import yaml
from compare import assert_same_run, tensors_of
from harness import ROOT, assert_ok, command, free_port, run_trainer, start_command, wait_until
from hooks import die_in_micro_step

import hpo_sweep
import train_sdxl_lora as trainer

# (variables, flags, what happens): the text of the refusal, or what a run of 4 steps says or leaves
REFUSED = [
    ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"}, ["--gradient_accumulation_steps", 4],
     "--gradient_accumulation_steps: found 4, but ACCELERATE_GRADIENT_ACCUMULATION_STEPS is 2; give the same number"),
    ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"}, ["--gradient_accumulation_steps", 1],
     "--gradient_accumulation_steps: found 1, but ACCELERATE_GRADIENT_ACCUMULATION_STEPS is 2"),
    ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto"}, [], "ACCELERATE_GRADIENT_ACCUMULATION_STEPS: found auto"),
    ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "0"}, [], "expected a number above 0"),
    ({"ACCELERATE_MIXED_PRECISION": "fp8"}, [], "ACCELERATE_MIXED_PRECISION: found fp8; give --mixed_precision bf16"),
    ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, [], "ACCELERATE_DYNAMO_BACKEND: found INDUCTOR; unset it"),
    ({"ACCELERATE_USE_DEEPSPEED": "true"}, [], "ACCELERATE_USE_DEEPSPEED: found true; unset it"),
    ({"ACCELERATE_USE_FSDP": "true"}, [], "ACCELERATE_USE_FSDP: found true; unset it"),
    ({"ACCELERATE_USE_MEGATRON_LM": "True"}, [], "ACCELERATE_USE_MEGATRON_LM: found True; unset it"),
    ({"ACCELERATE_USE_PARALLELISM_CONFIG": "1"}, [], "ACCELERATE_USE_PARALLELISM_CONFIG: found 1; unset it"),
]  # fmt: skip
SAME = "the same run"
TAKEN = [
    ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"}, [], {"gradient_accumulation_steps": 2, "global_batch": 4}),
    ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"}, ["--gradient_accumulation_steps", 2], {"global_batch": 4}),
    ({"ACCELERATE_MIXED_PRECISION": "bf16"}, [], {"mixed_precision": "bf16"}),
    ({"ACCELERATE_MIXED_PRECISION": "bf16"}, ["--mixed_precision", "no"], SAME),
    ({"ACCELERATE_MIXED_PRECISION": "fp8"}, ["--mixed_precision", "no"], SAME),
    ({"ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_USE_FSDP": "false"}, ["--mixed_precision", "no"], SAME),
    ({"ACCELERATE_TORCH_DEVICE": "cpu"}, ["--mixed_precision", "no"], SAME),
    ({"ACCELERATE_DEBUG_MODE": "true"}, ["--mixed_precision", "no"], SAME),
    ({"ACCELERATE_CPU_AFFINITY": "1"}, ["--mixed_precision", "no"], SAME),
    ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "FSDP_VERSION": "2", "ACCELERATE_GRADIENT_CLIPPING": "0.01"},
     ["--mixed_precision", "no"], SAME),  # without ACCELERATE_USE_… they are not read
]  # fmt: skip
SIGNALS = [  # (signal, ignored at the start, the run saves and ends with 0, or goes on, or dies)
    (signal.SIGTERM, False, "saves"),
    (signal.SIGUSR1, False, "saves"),
    (signal.SIGINT, False, "saves"),
    (signal.SIGHUP, False, "saves"),
    (signal.SIGHUP, True, "goes on"),  # nohup
    (signal.SIGQUIT, False, "dies"),
    (signal.SIGUSR2, False, "dies"),
    (signal.SIGKILL, False, "dies"),
]
NOTHING, SAME_WEIGHTS = "nothing changes", "the same weights"
# of a finished run with checkpoints 2 and 4: (way, folder, resumed from, flags, exit, checkpoints, set aside, outcome)
STARTS = [
    ("the same", "run", "latest", [], 0, [2, 4], [], NOTHING),
    ("shorter", "run", "latest", ["--max_train_steps", 3], 0, [2, 4], [], NOTHING),
    ("much shorter", "run", "latest", ["--max_train_steps", 2], 0, [2, 4], [], NOTHING),
    ("longer", "run", "latest", ["--max_train_steps", 6], 0, [2, 4, 6], [], "goes on"),
    ("older", "run", "run/checkpoint-2", [], 0, [2, 4], [4], SAME),
    ("older, by its name", "run", "checkpoint-2", [], 0, [2, 4], [4], SAME),
    ("older, keeping one", "run", "run/checkpoint-2", ["--checkpoints_total_limit", 1], 0, [4], [4], SAME),
    ("older, keeping two", "run", "run/checkpoint-2", ["--checkpoints_total_limit", 2], 0, [2, 4], [4], SAME),
    ("another folder", "new", "run/checkpoint-2", [], 0, [4], [], SAME_WEIGHTS),
    ("another folder with checkpoints", "other", "run/checkpoint-2", [], 0, [2, 4], [4], SAME_WEIGHTS),
    ("another folder, latest", "new", "latest", [], 0, [2, 4], [], SAME),  # there is none: a new run
    ("without a flag", "run", None, [], 2, [2, 4], [], NOTHING),
    ("from what is not there", "run", "checkpoint-9", [], 2, [2, 4], [], NOTHING),
    ("starting over", "run", None, ["--overwrite_output_dir"], 0, [2, 4], [], SAME),
]


def without_precision(flags):
    at = flags.index("--mixed_precision")
    return [*flags[:at], *flags[at + 2 :]]


@pytest.mark.parametrize("variables, more, message", REFUSED)
def test_a_variable_that_cannot_be_used_is_refused_by_name(
    flags, tmp_path, monkeypatch, capsys, variables, more, message
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    argv = [str(word) for word in [*without_precision(flags), *more, "--output_dir", tmp_path / "run"]]
    with pytest.raises(SystemExit) as exit_:
        trainer.parse_args(argv)
    assert exit_.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("variables, more, effect", TAKEN)
def test_a_variable_that_can_be_used_is_taken_over_and_noted(flags, trained, tmp_path, variables, more, effect):
    argv = [*without_precision(flags), *more, "--checkpointing_steps", 2]
    run = assert_ok(run_trainer(argv, tmp_path / "run", env=variables))
    (line,) = [line for line in run.output.splitlines() if line.startswith("started: ")]
    assert "from the environment: " in line
    if effect == SAME:
        return assert_same_run(trained, run, step=4)
    progress = json.loads((tmp_path / "run/checkpoint-4/progress.json").read_text())
    signature = progress["law"]
    assert "mixed_precision" not in progress["flags"]  # it is compared with the signature
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    for name, value in effect.items():
        assert (signature | config)[name] == value
    for name, value in variables.items():
        assert f"{name}={value}" in line


def set_disposition(number, ignored):
    if number != signal.SIGKILL:  # a shell that starts a command with & makes it ignore SIGINT and SIGQUIT
        signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)


@pytest.mark.parametrize("number, ignored, outcome", SIGNALS)
def test_each_signal_saves_or_is_survived(flags, trained, tmp_path, number, ignored, outcome):
    argv = [*flags, "--checkpointing_steps", 2, "--max_train_steps", 4, "--resume_from_checkpoint", "latest"]
    argv += ["--dataloader_num_workers", 1]
    words = command(argv, tmp_path / "run")
    words[1:2] = ["-c", SLOW.replace("SCRIPT", str(ROOT / "train_sdxl_lora.py"))]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            words,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
            stdout=log,
            stderr=log,
            preexec_fn=partial(set_disposition, number, ignored),
        )
    wait_until((tmp_path / "run/checkpoint-2").is_dir)
    time.sleep(0.3)
    process.send_signal(number)
    code = process.wait(60)
    text = (tmp_path / "log").read_text()
    found = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    if outcome == "saves":
        assert code == 0 and found == ["checkpoint-2", "checkpoint-3"], text
        assert f"{signal.Signals(number).name}: stopping after this step" in text
    elif outcome == "goes on":
        assert code == 0 and found == ["checkpoint-2", "checkpoint-4"], text
    else:
        assert code == -number and found == ["checkpoint-2"], text
    assert_same_run(trained, assert_ok(run_trainer(argv, tmp_path / "run")), step=4)


# the script as `python train_sdxl_lora.py`, but its third backward pass takes more than a second
SLOW = """
import runpy, sys, time
sys.argv = ["SCRIPT", *sys.argv[1:]]
sys.path.insert(0, "SCRIPT".rpartition("/")[0])
import torch
backward = torch.Tensor.backward
count = []
def slow_backward(*args, **kwargs):
    count.append(1)
    time.sleep(1.5 if len(count) == 3 else 0)
    return backward(*args, **kwargs)
torch.Tensor.backward = slow_backward
runpy.run_path("SCRIPT", run_name="__main__")
"""


# ---- every way to start again


def snapshot(folder):
    """{file: (bytes, time of its last change)} of a run, without the logs and the lock."""
    files = [
        path for path in folder.rglob("*") if path.is_file() and "logs" not in path.parts and path.name != ".lock"
    ]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.fixture
def resume(flags):
    """Function that starts a run of 4 steps again."""

    def start(output_dir, *more, checkpoint="latest", **options):
        argv = [*flags, "--checkpointing_steps", 2, "--resume_from_checkpoint", checkpoint, *more]
        return run_trainer(argv, output_dir, **options)

    return start


def steps_of(folder, prefix="checkpoint-"):
    return sorted(int(path.name[len(prefix) :].partition("-")[0]) for path in folder.glob(f"{prefix}*"))


@pytest.mark.parametrize(
    "way, folder, source, more, code, saved, aside, outcome", STARTS, ids=[row[0] for row in STARTS]
)
def test_each_way_to_start_again(
    flags, trained, own_run, tmp_path, way, folder, source, more, code, saved, aside, outcome
):
    shutil.copytree(own_run, tmp_path / "other")
    before = snapshot(own_run)
    old = tensors_of(own_run / "checkpoint-4")
    if source and source.startswith("run/"):
        source = tmp_path / source
    argv = [*flags, "--checkpointing_steps", 2, *(["--resume_from_checkpoint", source] if source else []), *more]
    run = run_trainer(argv, tmp_path / folder)
    assert run.codes == [code], run.output
    assert steps_of(tmp_path / folder) == saved and steps_of(tmp_path / folder, "set-aside-checkpoint-") == aside
    if folder != "run" or outcome == NOTHING:
        assert snapshot(own_run) == before
    if code == 0 and outcome == NOTHING:
        assert f"the run in {own_run} is finished at step 4; for more, give a larger --max_train_steps" in run.output
    for step in aside:
        assert f"checkpoint-{step} is later than the checkpoint that was resumed; it is now set-aside-" in run.output
        kept = tensors_of(tmp_path / folder / f"set-aside-checkpoint-{step}-1")
        assert all(kept[name].equal(old[name]) for name in old)
    if outcome == SAME:
        assert_same_run(trained, run, step=4)
    if outcome == SAME_WEIGHTS:  # the rows before the checkpoint are in the first folder
        found = tensors_of(tmp_path / folder / "checkpoint-4")
        assert all(found[name].equal(old[name]) for name in old)
    if outcome == "goes on":
        assert [row["step"] for row in run.metrics()] == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_of_two_processes_changes_nothing(resume, own_run):
    before = snapshot(own_run)
    assert "is finished at step 4" in assert_ok(resume(own_run, "--train_batch_size", 1, processes=2)).output
    assert snapshot(own_run) == before


def test_a_finished_run_without_its_lora_files_writes_them_again(resume, own_run, trained):
    for name in ("pytorch_lora_weights.safetensors", "README.md"):
        (own_run / name).unlink()
    assert_ok(resume(own_run))
    expected = (trained.output_dir / "pytorch_lora_weights.safetensors").read_bytes()
    assert (own_run / "pytorch_lora_weights.safetensors").read_bytes() == expected
    assert (own_run / "README.md").exists()


def test_after_going_back_and_a_kill_latest_is_the_new_branch(resume, trained, own_run):
    assert_ok(resume(own_run, "--max_train_steps", 6))
    killed = resume(own_run, "--max_train_steps", 6, checkpoint=own_run / "checkpoint-2",
        setup=partial(die_in_micro_step, 1))  # fmt: skip
    assert killed.codes == [-signal.SIGKILL]
    again = assert_ok(resume(own_run))
    assert "resumed from " in again.output and "checkpoint-2\n" in again.output.partition("resumed from ")[2]
    assert_same_run(trained, again, step=4)
    twice = assert_ok(resume(own_run, checkpoint=own_run / "checkpoint-2"))
    assert "it is now set-aside-checkpoint-4-2" in twice.output


def test_a_damaged_newest_checkpoint_is_set_aside_too(resume, trained, own_run):
    (own_run / "checkpoint-4/optimizer.bin").write_bytes(b"torn")
    assert_same_run(trained, assert_ok(resume(own_run)), step=4)
    assert (own_run / "set-aside-checkpoint-4-1/optimizer.bin").read_bytes() == b"torn"


# ---- what goes wrong, and what is said last


def end_early(module):
    original = module.train

    def train(run):
        run.loader = [batch for _, batch in zip(range(2), run.loader)]
        return original(run)

    module.train = train


def test_data_that_end_early_are_an_error(flags, tmp_path):
    result = run_trainer(flags, tmp_path / "run", setup=end_early)
    assert result.codes == [1] and "the data ended at step 2 of 4" in result.output
    assert not (tmp_path / "run/pytorch_lora_weights.safetensors").exists()


def test_the_advice_to_resume_needs_a_checkpoint(tmp_path, parse):
    args = parse("--output_dir", tmp_path)
    assert trainer.resume_advice(args) == "no checkpoint was saved yet"
    (tmp_path / "checkpoint-3").mkdir()
    assert "--resume_from_checkpoint latest" in trainer.resume_advice(args)


@pytest.mark.parametrize("rank, step", [(1, 2), (0, 0)])
def test_the_last_line_of_a_failed_world_is_the_reason(flags, tmp_path, rank, step):
    for script in ROOT.glob("*.py"):
        shutil.copy(script, tmp_path)
    text = (tmp_path / "train_sdxl_lora.py").read_text()
    place = "\n    draws = sample_batch_noise("
    fault = f"\n    if run.accelerator.process_index == {rank} and run.progress.step == {step}:"
    fault += f"\n        raise InputError('--made_up: a fault of rank {rank}; mend it')"
    assert text.count(place) == 1
    (tmp_path / "train_sdxl_lora.py").write_text(text.replace(place, fault + place))
    words = command(flags, tmp_path / "run", ("--config_file", ROOT / "accelerate_configs/ddp.yaml"), 3)
    words[words.index(str(ROOT / "train_sdxl_lora.py"))] = str(tmp_path / "train_sdxl_lora.py")
    assert start_command(words, tmp_path / "log").wait(120) == 1
    text = (tmp_path / "log").read_text()
    reason = f"--made_up: a fault of rank {rank}; mend it"
    assert text.strip().splitlines()[-2].strip() == f"traceback : {reason}"  # the last is a line of =
    others = [line for line in text.splitlines() if "another process of this run has ended" in line]
    assert all(reason in line for line in others)
    assert "--resume_from_checkpoint" not in text


def differ(module):
    choose = module.choose_precision
    module.choose_precision = lambda args: "bf16" if module.os.environ["RANK"] == "1" else choose(args)


def test_ranks_that_would_choose_different_precisions_are_refused(flags, tmp_path):
    refused = run_trainer(flags, tmp_path / "run", 2, setup=differ)
    assert refused.codes == [1, 1] and "--mixed_precision: found bf16 and no, because the GPUs" in refused.output


def test_one_process_where_several_were_asked_for_is_noticed(flags, tmp_path):
    words = command([*flags, "--max_train_steps", 1], tmp_path / "run", ("--cpu",), 3)
    assert start_command(words, tmp_path / "log", MASTER_PORT=str(free_port())).wait(120) == 0
    assert "only one process was started; for several, use --config_file" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    "states, stopping, status",
    [
        (["FAIL", "PRUNED"], False, 1),
        (["FAIL", "COMPLETE"], False, 0),
        (["FAIL", "RUNNING"], False, 0),  # another worker's: that one will tell
        (["FAIL"], True, 0),  # the same command goes on
        ([], False, 1),
    ],
)
def test_a_sweep_ends_with_1_if_nothing_finished(tmp_path, monkeypatch, states, stopping, status):
    trials = [SimpleNamespace(state=hpo_sweep.TrialState[state], user_attrs={"reason": "why"}) for state in states]
    study = SimpleNamespace(get_trials=lambda deepcopy: trials)
    sweep = SimpleNamespace(args=SimpleNamespace(n_trials=4), folder=tmp_path)
    monkeypatch.setattr(hpo_sweep.stop, "number", signal.SIGTERM if stopping else None)
    assert hpo_sweep.log_end(study, sweep) == status
