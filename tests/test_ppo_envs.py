"""ppo.py and environments: every space, both autoreset modes, Atari, normalisers, evaluation."""

import itertools
import json
import math
import sys

import gymnasium as gym
import numpy as np
import pytest
import scripted
import torch
from conftest import OneUpdate
from gymnasium.spaces import Box
from scripted import LENGTHS, observed, rewarded

import ppo

CPU = torch.device("cpu")


def make(env_id, num_envs=2, **flags):
    return ppo.VectorEnv(ppo.Args(env_id=env_id, **flags), num_envs, CPU)


def agent_for(envs, **kwargs):
    return ppo.Agent(envs.obs_shape, envs.choices, envs.action_size, **kwargs)


# Distributions


@pytest.mark.parametrize("choices", [[4], [2, 5, 3], [2, 2]])
def test_choices_against_torch_distributions(choices):
    agent, obs = ppo.Agent((3,), choices, len(choices)), torch.randn(5, 7, 3)
    torch.nn.init.orthogonal_(agent.actor[-1].weight, 1.0)
    parts = [
        torch.distributions.Categorical(logits=part)
        for part in agent.actor(obs).split(choices, -1)
    ]
    action = torch.stack([part.sample() for part in parts], -1)
    logprob, entropy, value = agent(obs, action)
    expected = sum(part.log_prob(index) for part, index in zip(parts, action.unbind(-1)))
    torch.testing.assert_close(logprob, expected)
    torch.testing.assert_close(entropy, sum(part.entropy() for part in parts))
    torch.testing.assert_close(value, agent.value(obs))
    assert torch.equal(agent.mode(obs), torch.stack([part.probs.argmax(-1) for part in parts], -1))


@pytest.mark.parametrize("choices", [[4], [2, 5, 3], [2, 2]])
def test_choices_by_enumeration(choices):
    """The probabilities of all actions add up to 1, and their share of samples is as it should."""
    torch.manual_seed(0)
    agent, obs = ppo.Agent((3,), choices, len(choices)), torch.randn(1, 3)
    torch.nn.init.orthogonal_(agent.actor[-1].weight, 1.0)
    actions = torch.tensor(list(itertools.product(*map(range, choices))))
    logprob, entropy, _ = agent(obs.expand(len(actions), 3), actions)
    probs = logprob.exp()
    assert probs.sum().item() == pytest.approx(1, abs=1e-6)
    assert -(probs * logprob).sum().item() == pytest.approx(entropy[0].item(), abs=1e-5)
    drawn = agent.sample(obs.expand(200_000, 3))
    share = (drawn.unsqueeze(1) == actions).all(-1).float().mean(0)
    torch.testing.assert_close(share, probs, atol=0.01, rtol=0)


def test_gaussian_against_torch_distributions():
    agent, obs = ppo.Agent((3,), [], 2), torch.randn(5, 7, 3)
    with torch.no_grad():
        agent.log_std.copy_(torch.tensor([-1.0, 0.3]))
    action = torch.randn(5, 7, 2)
    logprob, entropy, _ = agent(obs, action)
    expected = torch.distributions.Normal(agent.actor(obs), agent.log_std.exp())
    torch.testing.assert_close(logprob, expected.log_prob(action).sum(-1))
    torch.testing.assert_close(entropy, expected.entropy().sum(-1))
    torch.testing.assert_close(agent.mode(obs), expected.mean)
    with torch.no_grad():
        drawn = agent.sample(obs[:1, :1].expand(100_000, 1, 3))
    torch.testing.assert_close(drawn.mean((0, 1)), expected.mean[0, 0], atol=0.02, rtol=0)
    torch.testing.assert_close(drawn.std((0, 1)), agent.log_std.exp(), atol=0.02, rtol=0)


@pytest.mark.parametrize("shape", [(3,), (2, 40, 36)])
def test_stored_logprob_is_recomputed(shape):
    """What a minibatch finds again under the same weights is what the whole batch had."""
    torch.manual_seed(0)
    agent = ppo.Agent(shape, [], 2)
    obs = torch.randint(255, (6, 5, *shape)).to(torch.uint8 if len(shape) == 3 else torch.float32)
    action = torch.randn(6, 5, 2)
    logprob, _, value = agent(obs, action)
    rows = torch.randperm(30)[:7]
    again, _, value_again = agent(obs.flatten(0, 1)[rows], action.flatten(0, 1)[rows])
    torch.testing.assert_close(again, logprob.flatten()[rows], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(value_again, value.flatten()[rows], atol=1e-5, rtol=1e-5)


# Spaces


@pytest.mark.parametrize(
    "name",
    ["discrete", "from5", "multi", "grid", "multifrom", "binary", "switches", "box", "table"],
)
def test_actions_reach_the_environment_as_its_space_has_them(name):
    """The scripted environment asserts that its space contains each action."""
    envs = make(f"scripted:Does-{name}-v0")
    agent = agent_for(envs, log_std=2.0)
    obs = envs.reset([0])
    seen, inner = [], envs.envs.step
    envs.envs.step = lambda action: (seen.append(action), inner(action))[1]
    for _ in range(20):
        action = agent.sample(obs).detach()
        kept = action.clone()
        obs, *_ = envs.step(action)
        assert torch.equal(action, kept), "the stored action was changed"
    if isinstance(envs.space, Box):  # [C9]
        assert kept.abs().max() > envs.space.high.max()
        clipped = kept.numpy().reshape(seen[-1].shape).clip(envs.space.low, envs.space.high)
        np.testing.assert_allclose(seen[-1], clipped, rtol=1e-6)


def test_multidimensional_actions_keep_their_order():
    envs = make("scripted:Does-grid-v0", 1)
    envs.reset([0])
    seen, inner = [], envs.envs.step
    envs.envs.step = lambda action: (seen.append(action), inner(action))[1]
    envs.step(torch.tensor([[1, 2, 3, 0]]))
    assert seen[0].tolist() == [[[1, 2], [3, 0]]] and envs.choices == [2, 3, 4, 2]
    envs = make("scripted:Does-multifrom-v0", 1)
    envs.reset([0])
    inner2 = envs.envs.step
    envs.envs.step = lambda action: (seen.append(action), inner2(action))[1]
    envs.step(torch.tensor([[1, 2]]))
    assert seen[1].tolist() == [[2, -2]]


@pytest.mark.parametrize("name", [name for name in scripted.SPACES if name != "last"])
def test_observations_are_flat_numbers_or_images(name):
    space, envs = scripted.SPACES[name], make(f"scripted:Sees-{name}-v0", 3)
    obs = envs.reset([4])
    alone = gym.make(f"scripted:Sees-{name}-v0")
    seed = int(np.random.SeedSequence([4]).generate_state(1)[0]) >> 1
    for n in range(3):
        raw, _ = alone.reset(seed=seed + n)
        if name in ("first", "gray"):
            expected = raw.reshape(-1, 40, 36)
        elif name == "stack":  # (S, H, W, C) to (S·C, H, W)
            expected = np.moveaxis(raw, -1, 1).reshape(12, 40, 36)
        else:
            if name == "text":
                raw, space = raw["a"], space["a"]
            expected = gym.spaces.flatten(space, raw)
        assert obs[n].shape == envs.obs_shape == expected.shape
        np.testing.assert_array_equal(obs[n].numpy(), expected.astype(obs.numpy().dtype))
        space = scripted.SPACES[name]
    image = name in ("first", "stack", "gray")
    assert obs.dtype == (torch.uint8 if image else torch.float32)


def test_channels_last_are_moved():
    envs = make("scripted:Sees-last-v0", 2)
    obs = envs.reset([4])
    raw, _ = gym.make("scripted:Sees-last-v0").reset(
        seed=int(np.random.SeedSequence([4]).generate_state(1)[0]) >> 1
    )
    assert obs.shape == (2, 3, 40, 36)
    np.testing.assert_array_equal(obs[0].numpy(), raw.transpose(2, 0, 1))


@pytest.mark.parametrize("env", ["Sees-last-v0", "Sees-dict-v0", "Does-multi-v0", "Does-table-v0"])
@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_training_runs_on_every_kind(env, vectorization, tmp_path):
    flags = {"num_envs": 2, "num_steps": 8, "num_minibatches": 2, "total_timesteps": 32}
    ppo.train(ppo.Args(env_id=f"scripted:{env}", vectorization=vectorization,
                       run_dir=str(tmp_path), eval_episodes=2, update_epochs=1, **flags))


def test_environments_of_tensors():
    """No numpy on the way, and what the environment writes again later does not change the past."""
    envs = make("scripted:InTensors-v0")
    agent = agent_for(envs, log_std=1.0)
    obs = envs.reset([0])
    obs, action, _, reward, terminated, done, _, valid = ppo.rollout(envs, agent, obs, 10)
    assert obs[:, 0, 0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0]
    assert valid[:, 0].tolist() == [True] * 4 + [False] + [True] * 4 + [False]
    torch.testing.assert_close(reward, action[..., 0].clamp(-1, 1) * valid)
    assert torch.equal(done, terminated) and done[:, 0].nonzero().flatten().tolist() == [3, 8]


# Presets


@pytest.mark.parametrize(
    "env, column",
    [("CartPole-v1", 0), ("scripted:Does-multi-v0", 0), ("Pendulum-v1", 1),
     ("scripted:Does-table-v0", 1), ("scripted:Sees-last-v0", 2)],
)
def test_presets_by_the_spaces(env, column, capsys):
    """Chosen, printed, and every flag that is given stays."""
    args, device, rank, world_size = ppo.settle(ppo.Args(env_id=env, device="cpu"))
    assert (device, rank, world_size) == (CPU, 0, 1)
    printed = capsys.readouterr().out
    for flag, values in ppo.PRESETS.items():
        assert getattr(args, flag) == values[column]
        assert f"{flag.replace('_', '-')} {values[column]}" in printed
    given = {"total_timesteps": 9_000, "learning_rate": 0.5, "num_envs": 12, "num_steps": 40,
             "gamma": 0.7, "num_minibatches": 3, "update_epochs": 2, "clip_coef": 0.4,
             "ent_coef": 0.3, "norm_obs": False, "norm_reward": True, "clip_reward": False}
    assert given.keys() == ppo.PRESETS.keys()
    args, *_ = ppo.settle(ppo.Args(env_id=env, device="cpu", **given))
    assert {flag: getattr(args, flag) for flag in given} == given
    default = ppo.Args()
    unset = {name for name in default.__dataclass_fields__ if getattr(default, name) is None}
    assert unset - {"target_kl", "stop_at"} == set(ppo.PRESETS)


def test_presets_are_saved_and_resumed(tmp_path, monkeypatch):
    ppo.train(ppo.Args(env_id="Pendulum-v1", num_envs=4, num_steps=16, num_minibatches=2,
                       total_timesteps=64, run_dir=str(tmp_path)))
    saved = json.loads((tmp_path / "args.json").read_text())
    assert saved["norm_obs"] is True and saved["gamma"] == 0.99
    monkeypatch.setitem(ppo.PRESETS, "gamma", (0.1, 0.1, 0.1))
    monkeypatch.setattr(sys, "argv", ["x", "--resume", str(tmp_path)])
    assert ppo.parse(ppo.Args).gamma == 0.99, "a new table must not change an old run"


def test_images_are_not_normalised_twice(capsys):
    with pytest.raises(SystemExit) as stop:
        ppo.settle(ppo.Args(env_id="scripted:Sees-last-v0", norm_obs=True))
    assert stop.value.code == 2 and "--norm-obs" in capsys.readouterr().err


# Autoreset: one truth, three ways to it


def batch_of(env_id, num_steps, monkeypatch, **flags):
    """The batch that the first update of a run gets, and the run's agent."""
    caught, update, run = [], ppo.update, OneUpdate()
    monkeypatch.setattr(ppo, "Run", run)
    monkeypatch.setattr(ppo, "update", lambda *args: (caught.append(args), update(*args))[1])
    flags = {"num_envs": 1, "num_minibatches": 1, "norm_reward": False, "norm_obs": False} | flags
    ppo.train(ppo.Args(env_id=env_id, num_steps=num_steps, total_timesteps=10_000,
                       learning_rate=0.0, gamma=0.9, gae_lambda=0.7, **flags))
    (agent, _, batch, *_), returns = caught[0], run.rows[0][1]
    return agent, batch, returns


def plain(agent, num_rows):
    """obs, advantage and target of that many steps, by the definition, one after another."""
    rows = []
    for episode in itertools.count():
        length = min(LENGTHS[episode % len(LENGTHS)], num_rows - len(rows))
        obs = np.array([observed(episode, t) for t in range(length + 1)])
        value = agent.value(torch.tensor(obs))
        if episode % 2 == 0 and length == LENGTHS[episode % len(LENGTHS)]:
            value = torch.cat([value[:-1], torch.zeros(1)])
        delta = [rewarded(episode, t) + 0.9 * value[t + 1] - value[t] for t in range(length)]
        for t in range(length):
            advantage = sum(0.63 ** (k - t) * delta[k] for k in range(t, length))
            rows.append((torch.tensor(observed(episode, t)), advantage, advantage + value[t]))
        if len(rows) == num_rows:
            return [torch.stack(column).detach() for column in zip(*rows)]


@pytest.mark.parametrize("mode", ["Scripted", "SameStep"])
@pytest.mark.parametrize("num_steps", range(50, 62))
def test_both_autoreset_modes_see_what_a_plain_loop_sees(mode, num_steps, monkeypatch):
    """However many steps: a batch may end within an episode, with its last step, or its reset."""
    agent, batch, returns = batch_of(f"scripted:{mode}-v0", num_steps, monkeypatch)
    if mode == "SameStep":
        assert len(batch.obs) == num_steps
    obs, advantage, target = plain(agent, len(batch.obs))
    torch.testing.assert_close(batch.obs, obs)
    torch.testing.assert_close(batch.target, target)
    torch.testing.assert_close(batch.target - batch.value, advantage)
    torch.testing.assert_close(batch.advantage, (advantage - advantage.mean()) / advantage.std())
    expected = [sum(rewarded(e, t) for t in range(LENGTHS[e % 8])) for e in range(len(returns))]
    assert returns.tolist() == pytest.approx(expected, abs=1e-5) and len(returns) >= 10


def test_returns_are_those_of_whole_games(monkeypatch):
    """What ends for the value, a life, does not end a game: its rewards add up to one return."""
    step, run = ppo.VectorEnv.step, OneUpdate()

    def lives(self, action):
        *rest, done, _, valid = step(self, action)
        self.count = getattr(self, "count", 0) + done.long()
        return *rest, done, done & (self.count % 3 == 0), valid

    monkeypatch.setattr(ppo.VectorEnv, "step", lives)
    monkeypatch.setattr(ppo, "Run", run)
    ppo.train(ppo.Args(env_id="scripted:Scripted-v0", num_envs=1, num_steps=60, num_minibatches=1,
                       total_timesteps=10_000))
    sums = [sum(rewarded(e, t) for t in range(LENGTHS[e % 8])) for e in range(9)]
    games = [sum(sums[i : i + 3]) for i in (0, 3, 6)]
    assert run.rows[0][1].tolist()[:3] == pytest.approx(games, abs=1e-5)


def test_reset_only_rows_change_nothing(monkeypatch):
    weights = []
    for amount in (0.0, 1e6):
        monkeypatch.setattr(scripted.Garbage, "amount", amount)
        run = OneUpdate(updates=3)
        monkeypatch.setattr(ppo, "Run", run)
        flags = {"num_envs": 4, "num_steps": 16, "num_minibatches": 2, "norm_obs": True}
        ppo.train(ppo.Args(env_id="scripted:Garbage-v0", total_timesteps=10_000, **flags))
        weights.append(torch.cat([p.flatten() for p in run.parts["agent"].state_dict().values()]))
    assert torch.equal(*weights)


def test_rows_across_batches_are_dropped_too():
    """An episode that ends with the batch: the reset-only step is the first of the next batch."""
    envs = make("scripted:Scripted-v0", 1)
    agent, obs = agent_for(envs), envs.reset([0])
    obs, *_, done, _, valid = ppo.rollout(envs, agent, obs, 3)
    assert done[-1].all() and valid.all()
    *_, valid = ppo.rollout(envs, agent, obs[-1], 3)
    assert valid.flatten().tolist() == [False, True, False]


# Normalisers


def test_normalizer_is_numpy_on_all_rows():
    rng = np.random.default_rng(0)
    batches = [  # their means differ: that, too, is variance of all rows
        rng.normal(mean, 2, (n, 4)).astype(np.float32) * [1, 10, 0.1, 100]
        for mean, n in ((3, 5), (0, 64), (6, 17))
    ]
    normalizer = ppo.Normalizer((4,))
    for batch in batches:
        normalizer.update(torch.tensor(batch, dtype=torch.float32))
    rows = np.concatenate(batches)
    np.testing.assert_allclose(normalizer.mean, rows.mean(0), rtol=1e-4)
    np.testing.assert_allclose(normalizer.var, rows.var(0, ddof=1), rtol=0.05)
    x = torch.tensor(rows, dtype=torch.float32)
    expected = (rows - rows.mean(0)) / rows.std(0)
    np.testing.assert_allclose(normalizer(x), expected, atol=0.15)
    assert normalizer(x * 1e6).abs().max() == 10
    expected = rows / 100 / rows.std(0)
    np.testing.assert_allclose(normalizer(x / 100, center=False), expected, rtol=0.03)


def test_reward_sums_begin_anew_after_every_end(monkeypatch):
    """The scale is the deviation of each episode's own discounted sums, time limits or not."""
    run = OneUpdate()
    monkeypatch.setattr(ppo, "Run", run)
    ppo.train(ppo.Args(env_id="scripted:Scripted-v0", num_envs=1, num_steps=60, num_minibatches=1,
                       total_timesteps=10_000, gamma=0.9, norm_reward=True))
    sums, count = [], 0
    for episode in itertools.count():
        total = 0.0
        for t in range(LENGTHS[episode % 8]):
            total, count = 0.9 * total + rewarded(episode, t), count + 1
            sums.append(total)
        count += 1  # the reset-only step
        if count > 80:
            break
    scale = run.parts["scale"]
    rows = int(scale.count.item())
    assert rows == 45
    assert scale.var.item() == pytest.approx(np.var(sums[:rows], ddof=1), rel=1e-4)


def test_observations_are_normalised_by_the_batches_before(monkeypatch):
    """The first batch as it is, the second by the first; reset-only rows do not count."""
    caught, update, run = [], ppo.update, OneUpdate(updates=2)
    monkeypatch.setattr(ppo, "Run", run)
    monkeypatch.setattr(ppo, "update", lambda *args: (caught.append(args[2]), update(*args))[1])
    ppo.train(ppo.Args(env_id="scripted:Scripted-v0", num_envs=1, num_steps=60, num_minibatches=1,
                       total_timesteps=10_000, norm_obs=True))
    episodes = [[observed(e, t) for t in range(LENGTHS[e % 8])] for e in range(60)]
    rows = torch.tensor(np.array([obs for episode in episodes for obs in episode]))
    first, second = len(caught[0].obs), len(caught[1].obs)
    torch.testing.assert_close(caught[0].obs, rows[:first])
    expected = (rows[first:][:second] - rows[:first].mean(0)) / rows[:first].std(0)
    torch.testing.assert_close(caught[1].obs, expected, atol=1e-4, rtol=1e-4)


def test_actions_are_drawn_from_normalised_observations():
    envs = make("scripted:Scripted-v0", 1)
    agent = ppo.Agent(envs.obs_shape, envs.choices, envs.action_size, norm_obs=True)
    agent.normalizer.update(torch.randn(50, *envs.obs_shape) * 3 + 5)
    seen, sample = [], agent.sample
    agent.sample = lambda obs: (seen.append(obs), sample(obs))[1]
    obs, *_ = ppo.rollout(envs, agent, envs.reset([0]), 5)
    torch.testing.assert_close(torch.stack(seen), agent.normalizer(obs[:-1]))


def test_a_rollout_keeps_actions_as_they_were_drawn():
    """Clipping is the environment's: log π of a clipped action would be that of another one."""
    envs = make("scripted:Does-box-v0")
    agent = agent_for(envs, log_std=2.0)
    drawn, sample = [], agent.sample
    agent.sample = lambda obs: (drawn.append(sample(obs)), drawn[-1].clone())[1]
    _, action, *_ = ppo.rollout(envs, agent, envs.reset([0]), 5)
    assert torch.equal(action, torch.stack(drawn))
    assert (action.abs() > torch.tensor(envs.space.high)).any()


def test_gae_sees_scaled_rewards_and_values_of_normalised_observations(monkeypatch):
    """Also at the ends of episodes, where the successor is the true last observation."""
    caught, played, run = [], [], OneUpdate(updates=2)
    rollout, gae = ppo.rollout, ppo.gae

    def watch(reward, value, next_value, *rest):
        agent, scale = run.parts["agent"], run.parts["scale"]
        obs, raw = played[-1][0], played[-1][3]
        torch.testing.assert_close(value, agent.value(agent.normalizer(obs[:-1])))
        torch.testing.assert_close(next_value, agent.value(agent.normalizer(obs[1:])))
        torch.testing.assert_close(reward, (raw / scale.var.sqrt()).clamp(-10, 10))
        caught.append(agent.normalizer.count.item())
        return gae(reward, value, next_value, *rest)

    monkeypatch.setattr(ppo, "Run", run)
    monkeypatch.setattr(ppo, "gae", watch)
    monkeypatch.setattr(ppo, "rollout", lambda *a: (played.append(rollout(*a)), played[-1])[1])
    with torch.no_grad():
        monkeypatch.setattr(ppo, "update", lambda *args: {})
        ppo.train(ppo.Args(env_id="scripted:Scripted-v0", num_envs=1, num_steps=60,
                           num_minibatches=1, total_timesteps=10_000, norm_obs=True,
                           norm_reward=True))
    assert len(caught) == 2 and caught[1] > 30


# Evaluation


def test_a_loaded_agent_acts_as_the_trained_one_did(tmp_path, monkeypatch, capsys):
    agents, flags = [], ["--eval-episodes", "3", "--run-dir", str(tmp_path / "run")]
    evaluate = ppo.evaluate_agent
    monkeypatch.setattr(
        ppo, "evaluate_agent", lambda args, agent, *rest: (agents.append(agent), evaluate(
            args, agent, *rest))[1])
    command = ["x", "--env-id", "Pendulum-v1", "--num-envs", "4", "--num-minibatches", "4",
               "--total-timesteps", "1024", *flags]
    monkeypatch.setattr(sys, "argv", command)
    ppo.train(ppo.parse(ppo.Args))
    first = [line for line in capsys.readouterr().out.splitlines() if "evaluation" in line]
    (tmp_path / "run" / "args.json").unlink()  # checkpoint.pt alone must do
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    monkeypatch.setattr(sys, "argv", ["x", "--eval-only", str(tmp_path / "run")])
    ppo.train(ppo.parse(ppo.Args))
    second = [line for line in capsys.readouterr().out.splitlines() if "evaluation" in line]
    assert first == second and len(first) == 1
    trained, loaded = (agent.state_dict() for agent in agents)
    assert trained.keys() == loaded.keys() and "normalizer.mean" in trained
    for name, tensor in trained.items():
        assert tensor.numpy().tobytes() == loaded[name].numpy().tobytes(), name
    obs = torch.randn(50, 3) * 5
    assert torch.equal(*(agent.mode(agent.normalizer(obs)) for agent in agents))
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before, "evaluation learned"


def test_evaluation_plays_one_episode_each_with_normalised_observations(monkeypatch):
    args, seen = ppo.Args(env_id="scripted:Scripted-v0"), []
    agent = ppo.Agent((2,), [2], 1, norm_obs=True)
    agent.normalizer.mean += 3.0
    mode = agent.mode
    monkeypatch.setattr(agent, "mode", lambda obs: (seen.append(obs), mode(obs))[1])
    returns = ppo.play(args, agent, CPU, 4)
    assert returns.tolist() == pytest.approx([sum(rewarded(0, t) for t in range(3))] * 4)
    torch.testing.assert_close(seen[0], torch.tensor(observed(0, 0) - 3.0).expand(4, 2))
    assert len(seen) == 3 and agent.normalizer.count == 0
    clock = itertools.count(1)  # now environment n ends with step n + 1, and goes on rewarding

    def step(self, action):
        over = torch.arange(4) < next(clock)
        return torch.zeros(4, 2), None, torch.ones(4), None, None, over, None

    monkeypatch.setattr(ppo.VectorEnv, "step", step)
    assert ppo.play(args, agent, CPU, 4).tolist() == [1, 2, 3, 4]


def test_video_of_an_episode(tmp_path, capsys):
    pytest.importorskip("moviepy")
    pytest.importorskip("pygame")
    ppo.train(ppo.Args(total_timesteps=4_096, run_dir=str(tmp_path), video=True))
    assert (tmp_path / "video-episode-0.mp4").stat().st_size > 1_000


def test_eval_only_refuses_what_is_not_a_run(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        ppo.train(ppo.Args(eval_only=str(tmp_path)))
    assert stop.value.code == 2 and "checkpoint.pt" in capsys.readouterr().err
    ppo.train(ppo.Args(total_timesteps=4_096, run_dir=str(tmp_path)))
    with pytest.raises(SystemExit) as stop:
        ppo.train(ppo.Args(eval_only=str(tmp_path)))
    assert stop.value.code == 2 and "--eval-episodes" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        ppo.train(ppo.Args(env_id="Acrobot-v1", eval_only=str(tmp_path), eval_episodes=1))
    assert stop.value.code == 2 and "--eval-only" in capsys.readouterr().err


# Atari


def atari(monkeypatch, **kwargs):
    ale_py = pytest.importorskip("ale_py")
    spec = gym.spec("ALE/Breakout-v5")
    plain = {"game": "breakout", "repeat_action_probability": 0.0, "noop_max": 0}
    plain |= {"use_fire_reset": False}
    gym.register("ALE/Plain-v5", spec.entry_point, vector_entry_point=spec.vector_entry_point,
                 kwargs=plain | kwargs)
    assert ale_py
    return "ALE/Plain-v5"


def test_atari_frame_by_frame(monkeypatch):
    """ale-py's vector environment as we set it, beside gymnasium's wrappers around one game."""
    pytest.importorskip("cv2")
    envs = make(atari(monkeypatch), 1)
    one = gym.make("ALE/Breakout-v5", frameskip=1, repeat_action_probability=0.0)
    one = gym.wrappers.AtariPreprocessing(one, noop_max=0)
    one = gym.wrappers.FrameStackObservation(one, 4, padding_type="zero")
    obs, (expected, info) = envs.reset([1]), one.reset(seed=1)
    lives, rewards, games = info["lives"], [], 0
    rng = np.random.default_rng(0)
    for step in range(900):
        np.testing.assert_array_equal(obs[0].numpy(), expected, err_msg=f"step {step}")
        action = 1 if step % 20 == 0 else int(rng.integers(4))
        obs, final_obs, reward, terminated, _, over, valid = envs.step(torch.tensor([[action]]))
        expected, true_reward, ended, _, info = one.step(action)
        rewards.append(true_reward)
        assert reward.item() == true_reward, "raw, not clipped"
        assert valid.item(), "no step is lost to a reset"
        assert terminated.item() == (info["lives"] < lives), "a life lost is an end for the value"
        assert over.item() == ended, "but the game goes on"
        lives = info["lives"]
        if ended:
            np.testing.assert_array_equal(final_obs[0].numpy(), expected)
            expected, info = one.reset()
            lives, games = info["lives"], games + 1
    assert games >= 2 and sum(rewards) > 0


def test_atari_rewards_come_raw():
    pytest.importorskip("ale_py")
    envs = make("ALE/SpaceInvaders-v5", 2)
    envs.reset([0])
    rng, rewards = np.random.default_rng(0), []
    for _ in range(150):
        rewards.append(envs.step(torch.tensor(rng.integers(6, size=(2, 1))))[2])
    assert torch.stack(rewards).max() >= 5, "an invader is worth 5 points or more"


def test_atari_rewards_are_clipped_for_learning_alone(monkeypatch):
    pytest.importorskip("ale_py")
    caught, gae, run = [], ppo.gae, OneUpdate()
    monkeypatch.setattr(ppo, "Run", run)
    monkeypatch.setattr(ppo, "gae", lambda *args: (caught.append(args[0]), gae(*args))[1])
    sums = ppo.running_sums
    monkeypatch.setattr(
        ppo, "running_sums", lambda reward, *rest, **kw: (caught.append(reward), sums(
            reward, *rest, **kw))[1])
    step = ppo.VectorEnv.step
    monkeypatch.setattr(ppo.VectorEnv, "step", lambda self, action: [
        column + 7 if i == 2 else column for i, column in enumerate(step(self, action))])
    ppo.train(ppo.Args(env_id="ALE/Breakout-v5", num_envs=4, num_steps=80, num_minibatches=2,
                       update_epochs=1, total_timesteps=320))
    raw, learned = caught
    assert raw.min() >= 7 and (learned == 1).all()


@pytest.mark.slow
def test_atari_through_plain_wrappers_and_resume(tmp_path):
    pytest.importorskip("ale_py")
    pytest.importorskip("cv2")
    flags = {"num_envs": 2, "num_steps": 16, "num_minibatches": 2, "update_epochs": 1}
    for mode in ("auto", "sync"):
        args = {"env_id": "ALE/Pong-v5", "vectorization": mode, **flags}
        ppo.train(ppo.Args(total_timesteps=64, run_dir=str(tmp_path / mode), **args))
        ppo.train(ppo.Args(total_timesteps=96, resume=str(tmp_path / mode), **args))


def test_a_game_that_a_time_limit_cuts_off_counts_once():
    """Its reset-only step is no second end, though the frame number falls there."""
    pytest.importorskip("ale_py")
    pytest.importorskip("cv2")
    import ale_py

    gym.register_envs(ale_py)
    if "ALE/Short-v5" not in gym.registry:
        spec = gym.spec("ALE/Pong-v5")
        gym.register("ALE/Short-v5", spec.entry_point, kwargs=spec.kwargs | {"frameskip": 1},
                     max_episode_steps=40)
    envs = ppo.VectorEnv(ppo.Args(env_id="ALE/Short-v5", vectorization="sync"), 1,
                         torch.device("cpu"))
    envs.reset([1])
    steps = [envs.step(torch.zeros(1, 1, dtype=torch.long))[3:] for _ in range(60)]
    done, over, valid = (torch.cat([step[i] for step in steps]) for i in (1, 2, 3))
    assert done.sum() >= 3 and torch.equal(over, done) and (over & ~valid).sum() == 0


def test_pixels_are_scaled_to_one():
    agent = ppo.Agent((4, 84, 84), [3], 1)
    image = torch.randint(256, (5, 2, 4, 84, 84), dtype=torch.uint8)
    expected = agent.cnn(image.flatten(0, 1).float() / 255).unflatten(0, (5, 2))
    torch.testing.assert_close(agent.features(image), expected)


def test_bf16_is_close(monkeypatch):
    torch.manual_seed(0)
    agent = ppo.Agent((4, 84, 84), [6], 1)
    obs, action = torch.randint(255, (8, 4, 84, 84), dtype=torch.uint8), torch.randint(6, (8, 1))
    exact = agent(obs, action)
    agent.bf16 = True
    rough = agent(obs, action)
    for a, b in zip(exact, rough):
        assert b.dtype == torch.float32
        torch.testing.assert_close(a, b, atol=0.05, rtol=0.05)
    assert not torch.equal(exact[2], rough[2])


@pytest.mark.slow
def test_compiled_is_eager():
    """The same minibatches: the same weights, but for rounding."""
    weights = []
    for compiled in (False, True):
        torch.manual_seed(0)
        agent = ppo.Agent((3,), [2], 1)
        obs, action = torch.randn(64, 3), torch.randint(2, (64, 1))
        logprob, _, value = (column.detach() for column in agent(obs, action))
        batch = ppo.Batch(obs, action, logprob, value, torch.randn(64), torch.randn(64))
        optimizer = torch.optim.Adam(agent.parameters(), lr=0.01)
        function = ppo.compiled(agent, ppo.objective, CPU) if compiled else ppo.objective
        args = ppo.Args(num_minibatches=2, update_epochs=5, ent_coef=0.1)
        report = ppo.update(agent, optimizer, batch, function, 0.2, args)
        weights.append(torch.cat([p.detach().flatten() for p in agent.parameters()]))
        assert agent.sample(obs).shape == (64, 1) and math.isfinite(report["approx_kl"])
    torch.testing.assert_close(*weights, atol=1e-4, rtol=1e-3)


def test_numbers_beyond_float32_are_not_finite():
    envs = object.__new__(ppo.VectorEnv)
    envs.device = torch.device("cpu")
    assert envs.tensor("observation", np.full(2, 1e38)).isfinite().all()
    with pytest.raises(FloatingPointError, match="observation"):
        envs.tensor("observation", np.full(2, 1e39))
