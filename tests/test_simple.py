"""The simple scripts: the command line, the files of a run, and mistakes of the user."""

import csv
import json
import os
import random
import shutil
import subprocess
import sys
import types
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from conftest import ROOT, SIMPLE
from gymnasium.spaces import Box, Discrete

SHORT = {"reinforce": 1_500, "reinforce_baseline": 1_500, "actor_critic": 4_096}


def command(name, *flags, cwd=ROOT, **env):
    return subprocess.run(
        [sys.executable, f"{name}.py", *map(str, flags)], cwd=cwd, text=True, capture_output=True,
        timeout=120, check=False, env={**os.environ, "PYTHONPATH": str(ROOT / "tests"), **env})


def call(script, *flags):
    """Run `python script.py FLAGS` in this process."""
    return script.train(tyro.cli(script.Args, args=[str(flag) for flag in flags]))


def rows(folder):
    with open(folder / "metrics.csv") as file:
        return list(csv.DictReader(file))


# A run and its files


@pytest.mark.parametrize("name", SIMPLE)
def test_a_copy_alone_in_an_empty_folder(name, tmp_path):
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    done = command(name, "--total-timesteps", SHORT[name], "--eval-episodes", 3, "--run-dir", "out",
                   cwd=tmp_path, PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and "\r" not in done.stdout
    assert "greedy evaluation: mean return" in done.stdout and "in 3 episodes" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("score ") and "files in out" in done.stdout
    assert sorted(os.listdir(tmp_path / "out")) == ["args.json", "metrics.csv", "policy.pt"]
    table = rows(tmp_path / "out")
    assert list(table[0])[:3] == ["step", "seconds", "score"]
    assert int(table[-1]["step"]) >= SHORT[name]
    args = json.loads((tmp_path / "out" / "args.json").read_text())
    assert args["total_timesteps"] == SHORT[name] and args["env_id"] == "CartPole-v1"


@pytest.mark.parametrize("name", SIMPLE)
def test_help_explains_every_flag_in_any_encoding(name):
    done = command(name, "--help", COLUMNS="200", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    script = __import__(name)
    for field in script.Args.__dataclass_fields__:
        assert f"--{field.replace('_', '-')}" in done.stdout
    assert "gymnasium environment" in done.stdout


def test_default_folder_names_script_environment_seed_and_time(simple, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call(simple, "--env-id", "toys:Chosen-v0", "--total-timesteps", 40, "--seed", 7)
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith(f"{simple.__name__}-toys-Chosen-v0-7-20")


def test_runs_that_start_in_the_same_second_have_their_own_folders(simple, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(simple.time, "strftime", lambda _: "20270101-000000")
    for _ in range(2):
        call(simple, "--env-id", "toys:Chosen-v0", "--total-timesteps", 40)
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_a_run_that_wandb_refuses_leaves_its_folder_free(simple, tmp_path, monkeypatch):
    def refuse(**_):
        raise RuntimeError("not logged in")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=refuse))
    flags = ["--total-timesteps", 40, "--run-dir", tmp_path]
    with pytest.raises(RuntimeError, match="not logged in"):
        call(simple, "--track", *flags)
    call(simple, *flags)


def test_saved_weights_are_those_of_the_trained_policy(simple, tmp_path):
    policy, score = call(simple, "--total-timesteps", SHORT[simple.__name__], "--run-dir", tmp_path)
    env = gym.make("CartPole-v1")
    loaded = simple.Policy(env.observation_space, env.action_space)
    loaded.load_state_dict(torch.load(tmp_path / "policy.pt", weights_only=True))
    obs = torch.randn(5, 4)
    assert torch.equal(loaded(obs).logits, policy(obs).logits)
    assert float(rows(tmp_path)[-1]["score"]) == pytest.approx(score)


def test_a_run_is_not_overwritten(simple, tmp_path):
    flags = ["--total-timesteps", SHORT[simple.__name__], "--run-dir", tmp_path]
    call(simple, *flags)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SystemExit, match="holds a run already"):
        call(simple, *flags)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_score_is_the_mean_of_the_last_hundred_returns(simple, tmp_path):
    args = simple.Args(run_dir=str(tmp_path))
    policy = simple.Policy(Box(-1, 1, (2,)), Discrete(2))
    log = simple.Logger(args, policy)
    log.write(10, torch.tensor([]))
    assert np.isnan(log.score)
    log.write(10, torch.full((99,), 70.0))
    assert log.score == 70 and not log.reached(60), "99 episodes are too few"
    log.write(10, torch.tensor([70.0]))
    assert log.reached(70) and not log.reached(70.1) and not log.reached(None)
    assert log.reached(0)
    log.write(10, torch.arange(150.0))
    assert log.score == sum(range(50, 150)) / 100
    assert [(row["step"], float(row["score"])) for row in rows(tmp_path)[1:]] == [
        ("20", 70), ("30", 70), ("40", 99.5)]


def test_stop_at_ends_the_run(simple, tmp_path):
    call(simple, "--stop-at", 1, "--run-dir", tmp_path)
    assert int(rows(tmp_path)[-1]["step"]) < 20_000


def test_ctrl_c_saves_the_weights_and_exits_with_130(simple, tmp_path, monkeypatch, capsys):
    write, calls = simple.Logger.write, []

    def interrupted(log, *args, **metrics):
        write(log, *args, **metrics)
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(simple.Logger, "write", interrupted)
    with pytest.raises(SystemExit) as stop:
        call(simple, "--run-dir", tmp_path)
    assert stop.value.code == 130 and len(rows(tmp_path)) == 3
    assert torch.load(tmp_path / "policy.pt", weights_only=True)
    assert capsys.readouterr().out.splitlines()[-1].startswith("score ")


@pytest.mark.parametrize("env", ["Pendulum-v1", "Acrobot-v1"])
def test_environments_without_a_native_vector_version(simple, env, tmp_path):
    call(simple, "--env-id", env, "--num-envs", 4, "--total-timesteps", 1_024, "--run-dir",
         tmp_path)


@pytest.mark.slow
def test_continuing_task_reports_the_mean_reward(tmp_path):
    import actor_critic

    call(actor_critic, "--continuing", "--run-dir", tmp_path, "--total-timesteps", 32_768)
    last = rows(tmp_path)[-1]
    assert 0.9 < float(last["score"]) <= 1
    assert 0.2 < float(last["average_reward"]) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", SIMPLE)
def test_wandb_offline_writes_a_record(name, tmp_path):
    pytest.importorskip("wandb")
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    done = command(name, "--track", "--run-dir", "out", "--total-timesteps", SHORT[name],
                   cwd=tmp_path, WANDB_MODE="offline", WANDB_SILENT="true")
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("*.wandb")), "no offline record was written"


def test_wandb_gets_every_row(simple, tmp_path, monkeypatch):
    logged, begun = [], {}
    run = types.SimpleNamespace(log=lambda row, step: logged.append((step, row)))
    wandb = types.SimpleNamespace(init=lambda **kwargs: begun.update(kwargs) or run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    call(simple, "--track", "--run-dir", tmp_path, "--total-timesteps", SHORT[simple.__name__])
    assert begun["project"] == "policy-gradients" and begun["config"]["track"] is True
    assert [str(step) for step, _ in logged] == [row["step"] for row in rows(tmp_path)]
    assert list(logged[0][1]) == list(rows(tmp_path)[0])


# Evaluation, and episodes that do not end


class Counter(gym.vector.VectorEnv):
    """Environment n ends its episode with step n + 1; every step has reward 1."""

    single_observation_space, single_action_space = Box(-1, 1, (2,), np.float32), Discrete(2)
    metadata = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}  # noqa: RUF012
    spec = types.SimpleNamespace(max_episode_steps=None)

    def __init__(self, num_envs):
        self.num_envs, self.steps = num_envs, 0

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return np.zeros((self.num_envs, 2), np.float32), {}

    def step(self, actions):
        self.steps += 1
        ended, half = np.arange(self.num_envs) < self.steps, np.arange(self.num_envs) % 2 == 0
        obs, reward = np.zeros((self.num_envs, 2), np.float32), np.ones(self.num_envs)
        return obs, reward, ended & half, ended & ~half, {}


def evaluate(script, args):
    policy = script.Policy(Box(-1, 1, (2,)), Discrete(2))
    limit = (args.max_episode_steps or 10_000,) if script.__name__ != "actor_critic" else ()
    with torch.no_grad():
        script.evaluate(args, policy, *limit)


def test_an_evaluation_counts_first_episodes_only(simple, capsys, monkeypatch):
    monkeypatch.setattr(simple, "make_envs", lambda env_id, num_envs, seed: Counter(num_envs))
    evaluate(simple, simple.Args(eval_episodes=4))
    assert "mean return 2.5 in 4 episodes" in capsys.readouterr().out


def test_an_evaluation_plays_in_batches_of_num_envs(simple, capsys, monkeypatch):
    """Seven episodes in three environments are three batches with returns 1, 2 and 3."""
    made = []
    monkeypatch.setattr(simple, "make_envs",
                        lambda env_id, num_envs, seed: made.append(num_envs) or Counter(num_envs))
    evaluate(simple, simple.Args(num_envs=3, eval_episodes=7))
    assert made == [3] and "mean return 2.0 in 9 episodes" in capsys.readouterr().out


def test_each_batch_of_an_evaluation_has_new_episodes(simple, monkeypatch):
    seeds = []

    class Seen(Counter):
        def reset(self, *, seed=None, options=None):
            seeds.append(seed)
            return super().reset(seed=seed)

    monkeypatch.setattr(simple, "make_envs", lambda env_id, num_envs, seed: Seen(num_envs))
    evaluate(simple, simple.Args(num_envs=3, eval_episodes=7))
    assert seeds == [None] * 3


def test_an_evaluation_prints_the_mean(simple, capsys, monkeypatch):
    """Of 1, 3 and 6: no other average."""
    class Growing(Counter):
        def step(self, actions):
            obs, reward, *rest = super().step(actions)
            return obs, reward * self.steps, *rest

    monkeypatch.setattr(simple, "make_envs", lambda env_id, num_envs, seed: Growing(num_envs))
    evaluate(simple, simple.Args(num_envs=3, eval_episodes=3))
    assert "mean return 3.3 in 3 episodes" in capsys.readouterr().out


def test_evaluation_takes_the_most_likely_action(simple, capsys, monkeypatch):
    """Only the more likely action, 1, has a reward. Samples would often be 0."""

    class Rewarding(Counter):
        def step(self, actions):
            obs, _, terminated, truncated, info = super().step(actions)
            return obs, actions.astype(float), terminated, truncated, info

    monkeypatch.setattr(simple, "make_envs", lambda env_id, num_envs, seed: Rewarding(num_envs))
    forward = simple.Policy.forward

    def biased(policy, obs):
        with torch.no_grad():
            policy.net[-1].bias.copy_(torch.tensor([0.0, 0.5]))
        return forward(policy, obs * 0)

    monkeypatch.setattr(simple.Policy, "forward", biased)
    torch.manual_seed(0)
    evaluate(simple, simple.Args(num_envs=16, eval_episodes=16))
    assert "mean return 8.5 in 16" in capsys.readouterr().out


def test_training_environments_are_closed_before_evaluation(simple, tmp_path, monkeypatch):
    made, events = simple.make_envs, []

    def watched(env_id, num_envs, seed):
        envs = made(env_id, num_envs, seed)
        close = envs.close
        events.append(("open", num_envs, seed))
        envs.close = lambda: events.append(("close", num_envs)) or close()
        return envs

    monkeypatch.setattr(simple, "make_envs", watched)
    call(simple, "--total-timesteps", 500, "--num-envs", 4, "--eval-episodes", 6, "--run-dir",
         tmp_path)
    (_, _, first), (_, _, second) = events[0], events[2]
    assert [event[:2] for event in events] == [("open", 4), ("close", 4)] * 2
    assert first != second, "evaluation plays the episodes of training"


class Endless(gym.Env):
    """Never ends; reward 1 for each step."""

    observation_space, action_space = Box(-1, 1, (1,), np.float32), Discrete(2)

    def reset(self, *, seed=None, options=None):
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), 1.0, False, False, {}


gym.register("NoLimit-v0", Endless)
gym.register("Limit30-v0", Endless, max_episode_steps=30)


@pytest.mark.parametrize("name", ["reinforce", "reinforce_baseline"])
def test_training_cuts_episodes_that_never_end(name, tmp_path):
    script = __import__(name)
    with pytest.warns(UserWarning, match="cut episodes after 50 steps"):
        call(script, "--env-id", "NoLimit-v0", "--num-envs", 2, "--max-episode-steps", 50,
             "--total-timesteps", 200, "--run-dir", tmp_path)
    assert [row["step"] for row in rows(tmp_path)] == ["100", "200"]
    assert float(rows(tmp_path)[-1]["score"]) == 50


def test_cutting_episodes_warns_once(tmp_path):
    import reinforce

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        call(reinforce, "--env-id", "NoLimit-v0", "--num-envs", 2, "--max-episode-steps", 5,
             "--total-timesteps", 100, "--run-dir", tmp_path)
    assert len([w for w in caught if "cut episodes" in str(w.message)]) == 1


def test_evaluation_cuts_episodes_that_never_end(simple, capsys, monkeypatch):
    for limit, env in ((40, "NoLimit-v0"), (10_000, "NoLimit-v0"), (30, "Limit30-v0"),
                       (20, "Limit30-v0")):
        args = simple.Args(env_id=env, num_envs=2, eval_episodes=2,
                           max_episode_steps=limit if limit in (20, 40) else 0)
        policy = simple.Policy(Endless.observation_space, Endless.action_space)
        monkeypatch.setattr(simple.Policy, "forward",
                            lambda policy, obs: types.SimpleNamespace(mode=obs[:, 0].long()))
        rest = () if simple.__name__ == "actor_critic" else (limit,)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            simple.evaluate(args, policy, *rest)
        assert f"mean return {limit}.0 in 2" in capsys.readouterr().out
        assert bool(caught) == (limit != 30), "only a cut is worth a warning"


@pytest.mark.parametrize("name", ["reinforce", "reinforce_baseline"])
def test_the_limit_is_the_flag_or_that_of_the_environment_or_10_000(name, monkeypatch):
    from conftest import FakeLogger

    script = __import__(name)
    limits, play = [], script.play_episodes
    monkeypatch.setattr(script, "play_episodes",
                        lambda envs, policy, limit, device: limits.append(limit)
                        or play(envs, policy, 3, device))
    for env, flag in (("NoLimit-v0", 0), ("Limit30-v0", 0), ("Limit30-v0", 7)):
        monkeypatch.setattr(script, "Logger", FakeLogger())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            script.train(script.Args(env_id=env, num_envs=2, max_episode_steps=flag))
    assert limits == [10_000, 30, 7]


# Seeds


class Careless(gym.Env):
    """Draws from the global generators."""

    observation_space, action_space = Box(-1, 1, (1,), np.float32), Discrete(2)

    def reset(self, *, seed=None, options=None):
        return np.random.rand(1).astype(np.float32), {}

    def step(self, action):
        obs = np.random.rand(1).astype(np.float32)
        return obs, random.random() + np.random.rand(), random.random() < 0.1, False, {}


gym.register("Careless-v0", Careless)


def test_environments_may_draw_from_global_generators(simple, tmp_path):
    runs = {}
    for run, seed in (("a", 1), ("b", 1), ("c", 2)):
        call(simple, "--env-id", "Careless-v0", "--num-envs", 4, "--total-timesteps", 300, "--seed",
             seed, "--run-dir", tmp_path / run)
        runs[run] = [row["score"] for row in rows(tmp_path / run)]
    assert runs["a"] == runs["b"] != runs["c"]


# Mistakes


def test_unknown_environment_suggests_a_similar_name(simple):
    with pytest.raises(SystemExit, match=r"--env-id Cart Pole: .*Malformed"):
        simple.make_envs("Cart Pole", 2, 0)
    with pytest.raises(SystemExit, match=r"--env-id CartPol-v1: .*CartPole"):
        call(simple, "--env-id", "CartPol-v1")


def test_missing_extra_is_named(simple, monkeypatch):
    def needs_box2d(*args, **kwargs):
        raise gym.error.DependencyNotInstalled('run `pip install "gymnasium[box2d]"`')

    monkeypatch.setattr(gym, "make_vec", needs_box2d)
    with pytest.raises(SystemExit, match=r"gymnasium\[box2d\]"):
        call(simple, "--env-id", "LunarLander-v3")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_missing_device(simple):
    with pytest.raises(SystemExit, match="--device cuda: not available"):
        call(simple, "--device", "cuda")


def test_mistakes_end_in_one_line_and_code_1():
    done = command("reinforce", "--env-id", "FrozenLake-v1")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("--env-id FrozenLake-v1: needs Box observations")


def test_actor_critic_needs_next_step_autoreset(monkeypatch):
    import actor_critic

    envs = gym.make_vec("CartPole-v1", 2, vectorization_mode="sync",
                        vector_kwargs={"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP})
    monkeypatch.setattr(gym, "make_vec", lambda *args, **kwargs: envs)
    with pytest.raises(SystemExit, match="NEXT_STEP"):
        call(actor_critic)


class Faulty(gym.Env):
    """Raises an error in the part that its keyword names."""

    observation_space, action_space = Box(-1, 1, (1,), np.float32), Discrete(2)

    def __init__(self, where):
        self.where = where
        self.fail("init")

    def fail(self, place):
        if place == self.where:
            np.seterr(divide="raise")
            try:
                np.array([1.0]) / 0.0  # the user's own FloatingPointError
            finally:
                np.seterr(divide="warn")

    def reset(self, *, seed=None, options=None):
        self.fail("reset")
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.fail("step")
        return np.zeros(1, np.float32), 0.0, True, False, {}


for place in ("init", "reset", "step"):
    gym.register(f"Faulty-{place}-v0", Faulty, kwargs={"where": place})


@pytest.mark.parametrize("where", ["init", "reset", "step"])
def test_an_error_in_the_users_environment_keeps_its_traceback(simple, where, tmp_path):
    with pytest.raises(FloatingPointError) as error:
        call(simple, "--env-id", f"Faulty-{where}-v0", "--num-envs", 2, "--run-dir", tmp_path)
    assert any(entry.name == "fail" for entry in error.traceback)


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_a_gradient_that_is_not_finite_stops_the_run(simple, value, tmp_path):
    """After some good updates. The saved weights are the last good ones."""
    steps = []

    class Broken(Endless):
        def reset(self, *, seed=None, options=None):
            self.t = 0
            return super().reset(seed=seed)

        def step(self, action):
            steps.append(1)
            self.t += 1
            reward = value if len(steps) > 3_000 else 1.0
            return np.zeros(1, np.float32), reward, self.t == 7, False, {}

    if "Broken-v0" in gym.registry:
        del gym.registry["Broken-v0"]
    gym.register("Broken-v0", Broken)
    with pytest.raises(RuntimeError, match="non-finite"):
        call(simple, "--env-id", "Broken-v0", "--num-envs", 4, "--run-dir", tmp_path)
    assert len(rows(tmp_path)) >= 1
    for weight in torch.load(tmp_path / "policy.pt", weights_only=True).values():
        assert weight.isfinite().all()


# Further cases


@pytest.mark.parametrize("name", SIMPLE)
def test_the_evaluation_after_training_has_the_limit_of_the_flag(name, tmp_path, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call(__import__(name), "--env-id", "NoLimit-v0", "--num-envs", 2, "--max-episode-steps", 50,
             "--total-timesteps", 100, "--eval-episodes", 2, "--run-dir", tmp_path)
    assert "mean return 50.0 in 2 episodes" in capsys.readouterr().out
