"""ppo.py from the command line: copied alone, with wrong flags, stopped and resumed."""

import csv
import json
import os
import pickle
import shutil
import subprocess
import sys
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, FakeLogger

import ppo

SHORT = {"total_timesteps": 4_096}


def command(*flags, cwd=ROOT, **env):
    return subprocess.run(
        [sys.executable, "ppo.py", *map(str, flags)], cwd=cwd, text=True, capture_output=True,
        timeout=120, check=False, env={**os.environ, "PYTHONPATH": str(ROOT / "tests"), **env})


def call(*flags):
    """Run `python ppo.py FLAGS` in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ppo.py", *map(str, flags)])
        return ppo.train(ppo.parse_args())


def refused(*flags):
    """Return the one-line message of `python ppo.py FLAGS`."""
    with pytest.raises(SystemExit) as stop:
        call(*flags)
    message = stop.value.code
    assert isinstance(message, str) and "\n" not in message.strip()
    return message


def rows(folder):
    with open(folder / "metrics.csv") as file:
        return list(csv.DictReader(file))


def load(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def test_a_copy_alone_in_an_empty_folder(tmp_path):
    shutil.copy(ROOT / "ppo.py", tmp_path)
    done = command("--total-timesteps", 4_096, "--num-envs", 16, "--eval-episodes", 3,
                   "--run-dir", "out", cwd=tmp_path, PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and "in 3 episodes" in done.stdout
    assert "score " in done.stdout and "files in out" in done.stdout
    assert sorted(os.listdir(tmp_path / "out")) == ["args.json", "checkpoint.pt", "metrics.csv"]
    assert list(rows(tmp_path / "out")[0])[:3] == ["step", "seconds", "score"]
    done = command("--eval-only", "out", "--eval-episodes", 2, cwd=tmp_path)
    assert done.returncode == 0 and "in 2 episodes" in done.stdout, done.stderr


def test_help_explains_every_flag_in_any_encoding():
    done = command("--help", COLUMNS="200", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    for field in ppo.Args.__dataclass_fields__:
        assert f"--{field.replace('_', '-')}" in done.stdout
    assert "gymnasium environment" in done.stdout


def test_help_shows_the_preset_of_the_environment():
    done = command("--env-id", "Pendulum-v1", "--help", COLUMNS="200")
    steps = ppo.PRESETS["continuous"]["total_timesteps"]
    assert done.returncode == 0 and f"(default: {steps})" in done.stdout


def test_flags_override_the_preset(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ppo.py", "--env-id", "Pendulum-v1", "--gamma", "0.7"])
    args = ppo.parse_args()
    assert args == ppo.default_args("Pendulum-v1", gamma=0.7)
    assert args.num_steps == ppo.PRESETS["continuous"]["num_steps"]


# The user's mistakes


def test_unknown_environment():
    assert "CartPole" in refused("--env-id", "CartPol-v1")


def test_missing_extra_is_named(monkeypatch):
    def needs_box2d(*args, **kwargs):
        raise gym.error.DependencyNotInstalled('run `pip install "gymnasium[box2d]"`')

    monkeypatch.setattr(gym, "make_vec", needs_box2d)
    assert "gymnasium[box2d]" in refused("--env-id", "LunarLander-v3")


def test_an_error_in_the_users_environment_keeps_its_traceback(tmp_path):
    class Faulty(gym.Env):
        observation_space = gym.spaces.Box(-1, 1, (2,))
        action_space = gym.spaces.Discrete(2)
        count = 0

        def reset(self, *, seed=None, options=None):
            return np.zeros(2, np.float32), {}

        def step(self, action):
            Faulty.count += 1
            if Faulty.count > 3_000:
                raise ZeroDivisionError("my bug")
            return np.zeros(2, np.float32), 1.0, False, False, {}

    gym.register("Faulty-v0", Faulty)
    with pytest.raises(ZeroDivisionError, match="my bug"):
        call("--env-id", "Faulty-v0", "--num-envs", 8, "--num-minibatches", 4, "--run-dir",
             tmp_path)
    assert load(tmp_path)["progress"]["iteration"] == len(rows(tmp_path)) >= 5


def test_a_missing_import_in_the_users_module_keeps_its_traceback(tmp_path, monkeypatch):
    (tmp_path / "my_module.py").write_text("import a_package_that_is_missing\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_missing"):
        call("--env-id", "my_module:My-v0", "--run-dir", tmp_path / "run")
    assert "no_such_module" in refused("--env-id", "no_such_module:My-v0")
    assert "no_such_package" in refused("--env-id", "no_such_package.envs:My-v0")
    monkeypatch.setitem(sys.modules, "ale_py", None)  # not installed
    assert "ale_py" in refused("--env-id", "ALE/Pong-v5")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_missing_device():
    assert "--device cuda" in refused("--device", "cuda")


def test_batches_that_are_too_small():
    assert "--num-minibatches" in refused("--num-envs", 1, "--num-steps", 16,
                                          "--num-minibatches", 9)
    assert "too small" in refused("--num-steps", 1)


def test_the_batch_of_each_process_must_have_rows_for_its_minibatches(monkeypatch):
    monkeypatch.setattr(ppo.dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(ppo.dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(ppo.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(ppo.dist, "get_world_size", lambda: 4)
    args = ppo.Args(num_envs=8, num_steps=4, num_minibatches=4)
    assert ppo.setup(args)[:2] == (0, 4)
    with pytest.raises(SystemExit, match="--num-minibatches 5: the batch is too small"):
        ppo.setup(ppo.Args(num_envs=8, num_steps=4, num_minibatches=5))


def test_processes_of_all_seeds_play_their_own_episodes(monkeypatch):
    class Enough(Exception):
        pass

    def stop(envs, seed=None):
        raise Enough(seed)

    monkeypatch.setattr(ppo.nn.parallel, "DistributedDataParallel", lambda agent: agent)
    monkeypatch.setattr(ppo.Envs, "reset", stop)
    seeds = []
    for seed in (1, 2, 3):
        for rank in (0, 1):
            monkeypatch.setattr(ppo, "setup", lambda _: (rank, 2, torch.device("cpu")))  # noqa: B023
            monkeypatch.setattr(ppo, "Logger", FakeLogger())
            with pytest.raises(Enough) as raised:
                ppo.train(ppo.Args(seed=seed))
            seeds += raised.value.args
    assert len(set(seeds)) == 6


def test_a_run_is_not_overwritten(tmp_path):
    flags = ["--total-timesteps", 2_048, "--run-dir", tmp_path]
    call(*flags)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    assert "--run-dir" in refused(*flags)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_missing_or_foreign_checkpoint(tmp_path, monkeypatch):
    assert "nothing" in refused("--resume", tmp_path / "nothing")
    assert "No such file" in refused("--resume", tmp_path)
    torch.save({"args": {"no_such_flag": 1}}, tmp_path / "checkpoint.pt")
    assert "no_such_flag" in refused("--resume", tmp_path)
    for content in (b"", b"hello", pickle.dumps([1])):
        (tmp_path / "checkpoint.pt").write_bytes(content)
        assert "not a run of this script" in refused("--resume", tmp_path)


class Planted:
    """Code that runs when a file is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("planted",)


def test_checkpoint_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content in (lambda: torch.save(Planted(), "checkpoint.pt"),
                    lambda: (tmp_path / "checkpoint.pt").write_bytes(pickle.dumps(Planted()))):
        content()
        with pytest.raises(SystemExit, match="not a run of this script"):
            call("--resume", tmp_path)
    assert not (tmp_path / "planted").exists(), "loading a checkpoint ran code"


def test_another_environment_or_normalization_cannot_be_resumed(tmp_path):
    ppo.train(ppo.Args(run_dir=str(tmp_path), total_timesteps=2_048))
    for flags in (["--env-id", "Acrobot-v1"], ["--no-norm-obs"]):
        assert "--env-id and --norm-obs must be" in refused("--resume", tmp_path, *flags)


# Logging


def test_the_score_is_the_mean_of_the_last_hundred_returns(tmp_path):
    log = ppo.Logger(ppo.Args(run_dir=str(tmp_path), total_timesteps=10_000), {})
    log.write(10, [])
    assert np.isnan(log.score)
    log.write(10, [70.0] * 99)
    assert log.score == 70 and not log.reached(60.0), "fewer than 100 episodes"
    log.write(10, [70.0])
    assert log.reached(60.0) and not log.reached(71.0) and not log.reached(None)
    assert log.reached(70.0)
    log.write(10, list(map(float, range(150))), loss=torch.tensor(2.5))
    assert log.score == sum(range(50, 150)) / 100
    log.write(10, [0.0] * 60 + [100.0] * 40)
    assert log.score == 40
    table = rows(tmp_path)
    assert [row["score"] for row in table[:3]] == ["nan", "70.0", "70.0"]
    assert [row["step"] for row in table] == ["10", "20", "30", "40", "50"]


def test_stop_at_ends_the_run(tmp_path):
    _, score = call("--stop-at", 25, "--run-dir", tmp_path)
    assert score >= 25 and int(rows(tmp_path)[-1]["step"]) < 50_000


def test_the_default_folder_names_environment_and_seed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call("--env-id", "toys:Chosen-v0", "--total-timesteps", 2_048, "--seed", 7)
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("ppo-toys-Chosen-v0-7-20")


def test_runs_that_start_in_the_same_second_have_their_own_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ppo.time, "strftime", lambda _: "20270101-000000")
    for _ in range(2):
        call("--env-id", "toys:Chosen-v0", "--total-timesteps", 2_048)
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_a_run_that_wandb_refuses_leaves_its_folder_free(tmp_path, monkeypatch):
    def refuse(**_):
        raise RuntimeError("not logged in")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refuse))
    with pytest.raises(RuntimeError, match="not logged in"):
        call("--track", "--run-dir", tmp_path, "--total-timesteps", 2_048)
    call("--run-dir", tmp_path, "--total-timesteps", 2_048)


def test_a_run_that_fails_at_once_leaves_its_folder_free(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ppo, "collect", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            call("--run-dir", tmp_path, "--total-timesteps", 2_048)
    call("--run-dir", tmp_path, "--total-timesteps", 2_048)
    assert len(rows(tmp_path)) == 1


def test_a_folder_of_another_script_is_refused(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,seconds,score\n1,1,1\n")
    with pytest.raises(SystemExit, match="holds a run already"):
        call("--run-dir", tmp_path, "--total-timesteps", 2_048)
    assert (tmp_path / "metrics.csv").read_text() == "step,seconds,score\n1,1,1\n"


def test_a_resumed_run_goes_on_in_its_wandb_run(tmp_path, monkeypatch):
    runs, steps = [], []

    def init(**settings):
        runs.append(settings)
        return SimpleNamespace(id=settings["id"] or f"new{len(runs)}",
                               log=lambda row, step: steps.append((row["step"], step)))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for folder in ("a/run", "b/run"):
        call("--track", "--run-dir", tmp_path / folder, "--total-timesteps", 2_048)
        call("--resume", tmp_path / folder, "--total-timesteps", 4_096)
    assert [settings["id"] for settings in runs] == [None, "new1", None, "new3"]
    assert all(settings["resume"] == "allow" for settings in runs)
    assert steps == [(2_048, 2_048), (4_096, 4_096)] * 2


@pytest.mark.slow
def test_wandb_offline_gets_every_row(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    seen, log = [], wandb.Run.log
    monkeypatch.setattr(
        wandb.Run, "log", lambda run, row, **kw: (seen.append(row), log(run, row, **kw))[1])
    call("--track", "--run-dir", tmp_path / "run", "--total-timesteps", 4_096)
    assert [row["step"] for row in seen] == [2_048, 4_096]
    assert list(tmp_path.rglob("*.wandb")), "no offline record was written"


# Checkpoints


def leaves(state, path=""):
    """Every value in a checkpoint, with the path to it."""
    items = state.items() if isinstance(state, dict) else enumerate(state)
    for key, value in items:
        if isinstance(value, dict | list):
            yield from leaves(value, f"{path}/{key}")
        else:
            yield f"{path}/{key}", value


def test_every_saved_value_is_restored(tmp_path, monkeypatch):
    flags = {"run_dir": str(tmp_path), "num_envs": 16, "total_timesteps": 8_192}
    ppo.train(ppo.Args(**flags))
    saved, caught, init = load(tmp_path), {}, ppo.Logger.__init__

    def spy(log, args, parts):
        init(log, args, parts)
        caught.update({name: part.state_dict() for name, part in parts.items()})
        caught["progress"] = {name: getattr(log, name) for name in ppo.PROGRESS}

    monkeypatch.setattr(ppo.Logger, "__init__", spy)
    monkeypatch.setattr(ppo.Logger, "reached", lambda log, goal: True)  # no iteration
    ppo.train(ppo.Args(**flags, resume=str(tmp_path)))
    del saved["args"]
    expected, restored = dict(leaves(saved)), dict(leaves(caught))
    assert expected.keys() == restored.keys() and len(expected) > 40
    for path, value in expected.items():
        same = torch.equal(value, restored[path]) if torch.is_tensor(value) else (
            value == restored[path])
        assert same, path


def test_a_resumed_run_goes_on(tmp_path):
    ppo.train(ppo.Args(run_dir=str(tmp_path), num_envs=16, total_timesteps=4_096, gamma=0.9))
    call("--resume", tmp_path, "--total-timesteps", 8_192)
    args = json.loads((tmp_path / "args.json").read_text())
    assert args["gamma"] == 0.9 and args["num_envs"] == 16 and args["total_timesteps"] == 8_192
    steps = [int(row["step"]) for row in rows(tmp_path)]
    assert steps == sorted(set(steps)) and steps[-1] == 8_192
    seconds = [float(row["seconds"]) for row in rows(tmp_path)]
    assert seconds == sorted(seconds)


def test_a_resumed_run_plays_other_episodes(tmp_path, monkeypatch):
    seeds, reset = [], ppo.Envs.reset
    monkeypatch.setattr(ppo.Envs, "reset", lambda self, seed=None: (
        seeds.append(seed), reset(self, seed))[1])
    ppo.train(ppo.Args(run_dir=str(tmp_path), num_envs=16, total_timesteps=1_024))
    call("--resume", tmp_path, "--total-timesteps", 2_048)
    first, second = filter(None, seeds)
    assert first != second


def test_a_copied_folder_is_continued_in_its_place(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    ppo.train(ppo.Args(run_dir=str(one), num_envs=16, total_timesteps=1_024))
    shutil.copytree(one, two)
    call("--resume", two, "--total-timesteps", 2_048)
    assert (len(rows(one)), len(rows(two))) == (2, 4)


def test_the_returns_of_the_last_episodes_are_saved(tmp_path, monkeypatch):
    log = ppo.Logger(ppo.Args(run_dir=str(tmp_path)), {})
    log.write(10, list(map(float, range(150))))
    log.save()
    again = ppo.Logger(ppo.Args(resume=str(tmp_path)), {})
    again.write(10, [100.5])
    assert again.score == (sum(range(51, 150)) + 100.5) / 100


def test_the_last_batch_may_go_beyond_the_steps(tmp_path):
    ppo.train(ppo.Args(run_dir=str(tmp_path), total_timesteps=3_000))
    assert [row["step"] for row in rows(tmp_path)] == ["2048", "4096"]


def test_eval_only_has_the_flags_of_the_run(tmp_path, monkeypatch):
    ppo.train(ppo.Args(env_id="Acrobot-v1", run_dir=str(tmp_path), total_timesteps=1_024, seed=3))
    monkeypatch.setattr(sys, "argv", ["ppo.py", "--eval-only", str(tmp_path)])
    args = ppo.parse_args()
    assert (args.env_id, args.seed, args.total_timesteps) == ("Acrobot-v1", 3, 1_024)


def test_rows_after_the_checkpoint_are_dropped(tmp_path):
    """After a kill the checkpoint can be older than the last rows, and the last row incomplete."""
    ppo.train(ppo.Args(run_dir=str(tmp_path), num_envs=16, total_timesteps=4_096))
    before = (tmp_path / "metrics.csv").read_text()
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("4608,9,9\n51")
    call("--resume", tmp_path, "--total-timesteps", 4_608)
    after = (tmp_path / "metrics.csv").read_text()
    assert after.startswith(before) and "4608,9,9" not in after
    assert [int(row["step"]) for row in rows(tmp_path)][-2:] == [4_096, 4_608]
    (tmp_path / "metrics.csv").unlink()  # if the file is lost, the header is written again
    call("--resume", tmp_path, "--total-timesteps", 5_120)
    assert [row["step"] for row in rows(tmp_path)] == ["5120"]


def test_a_kill_during_a_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    ppo.train(ppo.Args(run_dir=str(tmp_path), total_timesteps=2_048, num_envs=16))
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def torn(state, path):
        path.write_bytes(b"half of it")
        raise OSError("killed")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError, match="killed"):
        call("--resume", tmp_path, "--total-timesteps", 4_096)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_checkpoints_are_written_during_the_run(tmp_path, monkeypatch):
    steps, save = [], ppo.Logger.save
    monkeypatch.setattr(ppo.Logger, "save", lambda log: (steps.append(log.iteration), save(log)))
    ppo.train(ppo.Args(run_dir=str(tmp_path), total_timesteps=512 * 24, num_envs=16))
    assert steps == [10, 20, 24]


def test_ctrl_c_saves_the_last_whole_iteration(tmp_path, monkeypatch):
    """The checkpoint has the weights before the interrupted update."""
    update, weights = ppo.update, []

    def interrupted(agent, *rest):
        weights.append([param.detach().clone() for param in agent.parameters()])
        metrics = update(agent, *rest)
        if len(weights) == 4:
            raise KeyboardInterrupt
        return metrics

    monkeypatch.setattr(ppo, "update", interrupted)
    with pytest.raises(SystemExit) as stop:
        ppo.train(ppo.Args(run_dir=str(tmp_path), num_envs=16))
    assert stop.value.code == 130
    saved = load(tmp_path)
    assert saved["progress"]["iteration"] == len(rows(tmp_path)) == 3
    agent = dict(saved["agent"])
    for name in ("obs_moments.count", "obs_moments.mean", "obs_moments.var"):
        del agent[name]
    for old, new in zip(weights[3], agent.values(), strict=True):
        assert torch.equal(old, new)
    monkeypatch.setattr(ppo, "update", update)
    call("--resume", tmp_path, "--total-timesteps", 4_096)
    assert len(rows(tmp_path)) == 8


def test_values_that_are_not_finite_stop_the_run_and_are_not_saved(tmp_path):
    import toys

    toys.BrokenReward.steps = 0
    with pytest.raises(RuntimeError, match="non-finite"):
        call("--env-id", "toys:BrokenReward-v0", "--num-envs", 4, "--num-minibatches", 2,
             "--run-dir", tmp_path, "--no-norm-reward")
    assert all(value.isfinite().all() for value in load(tmp_path)["agent"].values())


def test_an_observation_that_is_not_finite_stops_the_run_before_it_is_saved(tmp_path):
    """The policy gets clipped values, so only the running moments would show it."""
    import toys

    toys.BrokenSensor.steps = 0
    with pytest.raises(AssertionError, match="not finite"):
        call("--env-id", "toys:BrokenSensor-v0", "--num-envs", 4, "--num-minibatches", 2,
             "--run-dir", tmp_path)
    agent = load(tmp_path)["agent"]
    assert agent["obs_moments.count"] > 0
    assert all(value.isfinite().all() for value in agent.values())


def test_rank_variable_without_torchrun_is_ignored(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    ppo.train(ppo.Args(run_dir=str(tmp_path), num_envs=16, **SHORT))
    assert (tmp_path / "checkpoint.pt").exists() and len(rows(tmp_path)) == 8


def test_an_environment_that_must_be_reset_before_it_is_closed(tmp_path):
    class Careful(gym.Env):
        observation_space = gym.spaces.Box(-1, 1, (2,))
        action_space = gym.spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            self.window = "open"
            return np.zeros(2, np.float32), {}

        def step(self, action):
            return np.zeros(2, np.float32), 1.0, True, False, {}

        def close(self):
            assert self.window == "open"

    gym.register("Careful-v0", Careful)
    call("--env-id", "Careful-v0", "--total-timesteps", 2_048, "--run-dir", tmp_path)


def test_global_generators_are_seeded():
    import random

    drawn = []
    for _ in range(2):
        ppo.seed_everything(3, 1, 0)
        drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert drawn[0] == drawn[1]
    ppo.seed_everything(3, 0, 0)
    assert random.random() != drawn[0][0]


# Further cases


def test_the_rank_is_that_among_all_machines(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(ppo.dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(ppo.dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(ppo.dist, "get_rank", lambda: 5)
    monkeypatch.setattr(ppo.dist, "get_world_size", lambda: 8)
    assert ppo.setup(ppo.Args())[:2] == (5, 8)


def test_a_finished_run_keeps_its_score(tmp_path):
    _, score = call("--stop-at", 25, "--run-dir", tmp_path)
    before = len(rows(tmp_path))
    assert call("--resume", tmp_path)[1] == score and len(rows(tmp_path)) == before


def test_wandb_gets_the_flags(tmp_path, monkeypatch):
    begun, run = {}, SimpleNamespace(id="new", log=lambda row, step: None)
    wandb = SimpleNamespace(init=lambda **settings: begun.update(settings) or run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    call("--track", "--run-dir", tmp_path, "--total-timesteps", 2_048, "--gamma", 0.9)
    assert begun["config"]["gamma"] == 0.9 and begun["project"] == "policy-gradients"
