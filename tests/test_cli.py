"""ppo.py as its user meets it: copied alone, run from the command line, given mistakes."""

import csv
import importlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import types

import pytest
import torch
from conftest import ROOT

SHORT = {"ppo": 4_096}


def command(name, *flags, cwd=ROOT, **env):
    return subprocess.run(
        [sys.executable, f"{name}.py", *map(str, flags)],
        cwd=cwd,
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests"), **env},
    )


def call(script, capsys, *flags):
    """The same in this process: (exit code, stdout, stderr) of `python script.py FLAGS`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, flags)])
        try:
            script.train(script.parse(script.Args))
            code = 0
        except SystemExit as stop:
            code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def one_line(code, out, err, *words):
    assert code == 2, (out, err)
    assert err.startswith("error: ") and err.count("\n") == 1, err
    for word in words:
        assert word in err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo"])
def test_a_copy_alone_in_an_empty_folder(name, tmp_path):
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    done = command(
        name,
        "--total-timesteps",
        SHORT[name],
        "--eval-episodes",
        3,
        "--run-dir",
        "out",
        cwd=tmp_path,
        PYTHONPATH="",
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and "\r" not in done.stdout
    assert "evaluation: 3 episodes, mean return" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("score ") and "files in out" in done.stdout
    assert sorted(os.listdir(tmp_path / "out")) == ["args.json", "checkpoint.pt", "metrics.csv"]
    with open(tmp_path / "out" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:3] == ["step", "seconds", "score"]
    assert int(rows[-1]["step"]) >= SHORT[name]
    assert (
        json.loads((tmp_path / "out" / "args.json").read_text())["total_timesteps"] == SHORT[name]
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo"])
def test_help_explains_every_flag(name):
    done = command(name, "--help", COLUMNS="200")
    assert done.returncode == 0
    for field in importlib.import_module(name).Args.__dataclass_fields__:
        assert f"--{field.replace('_', '-')}" in done.stdout
    assert "any registered environment" in done.stdout


def test_unknown_environment_names_the_near_one(script, capsys, tmp_path):
    one_line(*call(script, capsys, "--env-id", "CartPol-v1"), "--env-id CartPol-v1", "CartPole")


def test_missing_module_of_an_environment(script, capsys):
    one_line(*call(script, capsys, "--env-id", "no_such_module:Env-v0"), "no_such_module")


def test_missing_extra_is_named(script, capsys, monkeypatch):
    import gymnasium

    def needs_box2d(*args, **kwargs):
        raise gymnasium.error.DependencyNotInstalled(
            'Box2D is missing, run `pip install "gymnasium[box2d]"`'
        )

    monkeypatch.setattr(gymnasium, "make_vec", needs_box2d)
    one_line(*call(script, capsys, "--env-id", "LunarLander-v3"), "gymnasium[box2d]")


def test_unsupported_spaces(script, capsys):
    one_line(*call(script, capsys, "--env-id", "toys:Speaking-v0"), "Text(")
    one_line(*call(script, capsys, "--env-id", "toys:Reading-v0"), "Text(")


def test_unsupported_autoreset_mode(script, capsys, monkeypatch):
    import gymnasium

    envs = gymnasium.make_vec(
        "CartPole-v1",
        2,
        vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": gymnasium.vector.AutoresetMode.DISABLED},
    )
    monkeypatch.setattr(gymnasium, "make_vec", lambda *args, **kwargs: envs)
    one_line(*call(script, capsys), "NEXT_STEP")


@pytest.mark.parametrize(
    "flags",
    [
        ["--gamma", "1.5"],
        ["--gamma", "-0.1"],
        ["--gamma", "nan"],
        ["--learning-rate", "-1"],
        ["--learning-rate", "inf"],
        ["--num-envs", "0"],
        ["--total-timesteps", "0"],
        ["--seed", "-1"],
        ["--checkpoint-every", "0"],
        ["--eval-episodes", "-1"],
    ],
)
def test_numbers_out_of_range(script, capsys, flags):
    one_line(*call(script, capsys, *flags), *flags[:1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_missing_device(script, capsys):
    one_line(*call(script, capsys, "--device", "cuda"), "--device cuda")


def test_tyro_refuses_unknown_flags_with_code_2(script, capsys):
    assert call(script, capsys, "--no-such-flag", "1")[0] == 2


def test_ppo_batches_that_do_not_fit(capsys):
    import ppo

    one_line(*call(ppo, capsys, "--total-timesteps", 100), "--total-timesteps 100")
    one_line(
        *call(ppo, capsys, "--num-envs", 1, "--num-steps", 16, "--num-minibatches", 9),
        "--num-minibatches 9",
    )
    one_line(*call(ppo, capsys, "--num-steps", 1), "--num-steps 1")


def test_missing_checkpoint(script, capsys, tmp_path):
    one_line(*call(script, capsys, "--resume", tmp_path / "nothing"), "nothing")
    one_line(*call(script, capsys, "--resume", tmp_path), "No such file")
    torch.save({"args": {"no_such_flag": 1}}, tmp_path / "checkpoint.pt")
    one_line(*call(script, capsys, "--resume", tmp_path), "no_such_flag")
    torch.save({"args": {"env_id": "CartPole-v1"}}, tmp_path / "checkpoint.pt")
    one_line(*call(script, capsys, "--resume", tmp_path), "checkpoint.pt")


class Planted:
    """What a stranger could put into a file that is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("planted",)


def test_foreign_checkpoints_are_refused_and_run_nothing(script, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, _ = call(
        script, capsys, "--total-timesteps", SHORT[script.__name__], "--run-dir", "run"
    )
    assert code == 0
    whole = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    torch.save(Planted(), tmp_path / "planted.pt")
    foreign = {
        "planted": (tmp_path / "planted.pt").read_bytes(),
        "pickle": pickle.dumps(Planted()),
        "torn": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"hello",
    }
    for content in foreign.values():
        (tmp_path / "run" / "checkpoint.pt").write_bytes(content)
        one_line(*call(script, capsys, "--resume", "run"), "checkpoint.pt")
    assert not (tmp_path / "planted").exists(), "loading a checkpoint ran code"
    torch.save({"another": {"weight": torch.zeros(3)}}, tmp_path / "run" / "checkpoint.pt")
    one_line(*call(script, capsys, "--resume", "run"), "checkpoint.pt")


def test_a_run_is_not_overwritten(script, capsys, tmp_path):
    flags = ["--total-timesteps", SHORT[script.__name__], "--run-dir", tmp_path / "run"]
    assert call(script, capsys, *flags)[0] == 0
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    one_line(*call(script, capsys, *flags), "--run-dir", "--resume")
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize(
    "env, name", [("BrokenReward", "reward"), ("BrokenObservation", "observation")]
)
def test_values_that_are_not_finite(script, capsys, tmp_path, env, name):
    import toys

    toys.BrokenReward.steps = 0
    flags = [
        "--env-id",
        f"toys:{env}-v0",
        "--num-envs",
        4,
        "--run-dir",
        tmp_path,
        "--checkpoint-every",
        1,
    ]
    one_line(*call(script, capsys, *flags), name, "not finite", "step")
    script.torch.load(tmp_path / "checkpoint.pt", weights_only=True)


def test_a_loss_that_is_not_finite(script, capsys, tmp_path, monkeypatch):
    kind = script.VectorEnv
    step = kind.step

    def overflowing(envs, action):
        return [
            column * 3e38 if column.dtype == torch.float32 and column.dim() == 1 else column
            for column in step(envs, action)
        ]

    monkeypatch.setattr(kind, "step", overflowing)
    flags = ["--run-dir", tmp_path, "--gamma", 1]
    one_line(*call(script, capsys, *flags), "not finite", "step", str(tmp_path))
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for part in state.values():
        for tensor in part.values() if isinstance(part, dict) else []:
            assert not isinstance(tensor, torch.Tensor) or tensor.isfinite().all()


def test_the_score_is_the_mean_of_the_last_hundred_returns(script, tmp_path):
    args = script.Args(run_dir=str(tmp_path), total_timesteps=10_000, stop_at=60.0)
    run = script.Run(args, 65.0)
    run.log(10, torch.full((99,), 70.0))
    assert run.score == 70 and not run.passed and not run.finished, "of 99 it says little"
    run.log(10, torch.tensor([70.0]))
    assert run.finished and "65 passed at 20," in run.passed
    run.log(10, torch.arange(150.0))
    assert run.score == sum(range(50, 150)) / 100
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [(row["step"], row["score"]) for row in rows] == [
        ("10", "70"), ("20", "70"), ("30", "99.5")
    ]


def test_stop_at_ends_the_run(script, capsys, tmp_path):
    code, _, _ = call(script, capsys, "--stop-at", 1, "--run-dir", tmp_path)
    assert code == 0
    steps = int((tmp_path / "metrics.csv").read_text().splitlines()[-1].split(",")[0])
    assert steps < 20_000


def test_ctrl_c_leaves_a_run_to_continue(script, capsys, tmp_path, monkeypatch):
    log, calls = script.Run.log, []

    def interrupted(run, *args, **means):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        log(run, *args, **means)

    monkeypatch.setattr(script.Run, "log", interrupted)
    code, _, err = call(script, capsys, "--run-dir", tmp_path, "--checkpoint-every", 1)
    assert code == 130 and f"--resume {tmp_path}" in err and err.count("\n") == 1
    monkeypatch.setattr(script.Run, "log", log)
    assert call(script, capsys, "--resume", tmp_path, "--total-timesteps", 4_096)[0] == 0


def test_other_environment_kinds(script, capsys, tmp_path):
    """Box actions on an environment without a native vector version; Discrete likewise."""
    for env in ("Pendulum-v1", "Acrobot-v1"):
        flags = [
            "--env-id",
            env,
            "--num-envs",
            4,
            "--run-dir",
            tmp_path / env,
            "--total-timesteps",
            1_024,
        ]
        small = ["--num-steps", 64, "--num-minibatches", 4]
        code, _, err = call(script, capsys, *flags, *small)
        assert code == 0, err


@pytest.mark.slow
def test_wandb_offline_gets_every_row(capsys, tmp_path, monkeypatch):
    import ppo

    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    rows, log = [], wandb.Run.log
    monkeypatch.setattr(
        wandb.Run, "log", lambda run, row, **kw: (rows.append(row), log(run, row, **kw))[1]
    )
    code, _, err = call(
        ppo, capsys, "--track", "--run-dir", tmp_path / "run", "--total-timesteps", 4_096
    )
    assert code == 0, err
    assert [row["step"] for row in rows] == [2_048, 4_096]
    assert list((tmp_path / "run").rglob("*.wandb")), "no offline record was written"


def test_wandb_that_does_not_start(script, capsys, tmp_path, monkeypatch):
    def refused(**kwargs):
        raise ValueError("no such project")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=refused))
    one_line(*call(script, capsys, "--track", "--run-dir", tmp_path), "--track", "no such project")


def test_a_folder_that_cannot_be(script, capsys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    one_line(*call(script, capsys, "--run-dir", tmp_path / "file"), "--run-dir")


def test_wandb_trouble_is_a_warning(capsys, tmp_path, monkeypatch):
    import ppo

    def broken(*args, **kwargs):
        raise ConnectionError("the network is away")

    run = types.SimpleNamespace(log=broken, finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **kwargs: run))
    code, out, err = call(
        ppo, capsys, "--track", "--run-dir", tmp_path / "run", "--total-timesteps", 4_096
    )
    assert code == 0 and err.count("the network is away") == 1
    assert "score" in out


@pytest.mark.parametrize("name", ["ppo"])
def test_a_failing_evaluation_costs_no_training(name, capsys, tmp_path, monkeypatch):
    script = importlib.import_module(name)
    steps, saved = SHORT[name], tmp_path / "run"

    def broken(*args, **kwargs):
        raise ValueError("no such wrapper")

    monkeypatch.setattr(script, "evaluate_agent", broken)
    flags = ["--total-timesteps", steps, "--run-dir", saved, "--checkpoint-every", 1000]
    with pytest.raises(ValueError):
        call(script, capsys, *flags, "--eval-episodes", 2)
    assert torch.load(saved / "checkpoint.pt", weights_only=True)["run"]["step"] >= steps


def test_runs_begun_in_one_second_have_folders_of_their_own(script, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script.time, "strftime", lambda form: "20260101-000000")
    for pid in (1, 2):
        monkeypatch.setattr(script.os, "getpid", lambda pid=pid: pid)
        assert call(script, capsys, "--total-timesteps", SHORT[script.__name__])[0] == 0
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_metrics_that_are_lost_begin_with_a_header_again(script, capsys, tmp_path):
    steps = SHORT[script.__name__]
    assert call(script, capsys, "--total-timesteps", steps, "--run-dir", tmp_path)[0] == 0
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0]
    (tmp_path / "metrics.csv").unlink()
    assert call(script, capsys, "--resume", tmp_path, "--total-timesteps", 3 * steps)[0] == 0
    assert (tmp_path / "metrics.csv").read_text().splitlines()[0] == header


def test_a_run_stopped_before_its_first_checkpoint_keeps_its_header(
    script, capsys, tmp_path, monkeypatch
):
    """Twice stopped, twice resumed: one header, and the rows of the last."""
    log, calls = script.Run.log, []

    def interrupted(run, *args, **means):
        log(run, *args, **means)
        calls.append(1)
        if len(calls) in (2, 4):
            raise KeyboardInterrupt

    monkeypatch.setattr(script.Run, "log", interrupted)
    assert call(script, capsys, "--run-dir", tmp_path, "--checkpoint-every", 999)[0] == 130
    assert call(script, capsys, "--resume", tmp_path)[0] == 130
    steps = SHORT[script.__name__]
    assert call(script, capsys, "--resume", tmp_path, "--total-timesteps", steps)[0] == 0
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines[0].startswith("step,seconds,score,")
    rows = [int(line.split(",")[0]) for line in lines[1:]]
    assert len(rows) == len(calls) - 4 and rows == sorted(rows)


def test_a_full_disk_ends_in_one_line(script, capsys, tmp_path, monkeypatch):
    save, calls = torch.save, []

    def full(state, path):
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("no space left")
        save(state, path)

    monkeypatch.setattr(torch, "save", full)
    flags = ["--run-dir", tmp_path, "--checkpoint-every", 1, "--total-timesteps", 20_000]
    one_line(*call(script, capsys, *flags), str(tmp_path), "no space left")
    script.torch.load(tmp_path / "checkpoint.pt", weights_only=True)


def test_a_seed_that_torch_does_not_take(script, capsys):
    one_line(*call(script, capsys, "--seed", 10**20), f"--seed {10**20}")


@pytest.mark.parametrize("name", ["ppo", "grpo", "dpo"])
def test_help_where_letters_are_missing(name, tmp_path):
    """As on a pipe of Windows."""
    done = command(name, "--help", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "--track" in done.stdout, done.stderr
