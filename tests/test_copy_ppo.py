"""docs/copy.md: a shared trunk, action masks and an LSTM in copies of ppo.py."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from test_copy import changed, imported


class Masked(gym.Env):
    """Two of four actions are valid in each step; the larger of them earns 1.

    The observation does not show the mask. No action is valid in the terminal state.
    """

    observation_space = gym.spaces.Box(0, 1, (1,), np.float32)
    action_space = gym.spaces.Discrete(4)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.ones(1, np.float32), {"action_mask": self.new_mask()}

    def step(self, action):
        assert self.mask[action], "a masked action was taken"
        reward = float(not self.mask[action + 1:].any())
        self.t += 1
        mask = self.new_mask() if self.t < 7 else np.zeros(4, np.int8)
        return np.ones(1, np.float32), reward, self.t == 7, False, {"action_mask": mask}

    def new_mask(self):
        self.mask = self.np_random.permutation([1, 1, 0, 0]).astype(np.int8)
        return self.mask


class Cue(gym.Env):
    """The first observation shows a cue, and the last action must match it.

    Episodes last 4 to 6 steps and end in a terminal state. With max_steps 5, some end at this time
    limit instead.
    """

    observation_space = gym.spaces.Box(-1, 2, (2,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.cue = 0, int(self.np_random.integers(2))
        self.length = int(self.np_random.integers(4, 7))
        return np.array([2 * self.cue - 1, 0], np.float32), {}

    def step(self, action):
        self.t += 1
        last = self.t == self.length
        obs = np.array([0, 1 + (self.t == self.length - 1)], np.float32)
        return obs, float(last and action == self.cue), last, False, {}


@pytest.fixture(autouse=True)
def environments(monkeypatch):
    monkeypatch.setattr(gym.envs.registration, "registry", dict(gym.registry))
    gym.register("Masked-v0", Masked)
    gym.register("Cue-v0", Cue)
    gym.register("CutCue-v0", Cue, max_episode_steps=5)


def broken(path, right, wrong):
    """Import the script after one piece of it is replaced."""
    source = path.read_text()
    assert source.count(right) == 1, right
    path.write_text(source.replace(right, wrong))
    return imported(path)


def no_step(script, agent, batch, **flags):
    """Return the metrics of an update with learning rate 0."""
    args = script.Args(update_epochs=1, **flags)
    return script.update(agent, torch.optim.SGD(agent.parameters(), lr=0.0), batch, args)


def test_shared_trunk(tmp_path):
    """Both losses train the trunk; it learns CartPole, and has no second network."""
    script = imported(tmp_path / changed("trunk", tmp_path))
    agent = script.Agent((3,), gym.spaces.Discrete(2), script.Args())
    agent.obs_moments.update(torch.randn(100, 3))
    pi, value = agent(torch.randn(8, 3))
    for output in pi.log_prob(torch.zeros(8, 1)).sum(), value.sum():
        gradients = torch.autograd.grad(output, list(agent.trunk.parameters()), retain_graph=True)
        assert all(gradient.any() for gradient in gradients)
    assert sum(param.numel() for param in agent.actor.parameters()) == 64 * 2 + 2
    assert sum(param.numel() for param in agent.critic.parameters()) == 64 + 1
    _, score = script.train(script.Args(total_timesteps=40_960, run_dir=str(tmp_path / "run")))
    assert score > 100


def check_masks(script, folder):
    """Log-probabilities agree, and no masked action is taken in training or evaluation."""
    args = script.Args(env_id="Masked-v0", num_envs=8, total_timesteps=512, eval_episodes=8,
                       run_dir=str(folder / "run"))
    torch.manual_seed(0)
    envs = script.Envs(args, 8, "cpu")
    agent = script.Agent(envs.obs_shape, envs.single_action_space, args)
    torch.nn.init.normal_(agent.actor[-1].weight)  # far from uniform
    valid = torch.ones(8, dtype=torch.bool)
    obs, valid, _ = script.collect(envs, agent, envs.reset(seed=0), valid, 20)
    rollout = script.collect(envs, agent, obs, valid, 20)[2]
    batch = {name: column[rollout["valid"]] for name, column in rollout.items()}
    assert 0 < len(batch["obs"]) < 160
    assert batch["mask"].gather(1, batch["action"]).all()
    assert (batch["mask"].sum(1) == 2).all()
    probs = agent(batch["obs"], batch["mask"])[0].parts[0].probs
    assert (probs[~batch["mask"]] == 0).all() and (probs[batch["mask"]] > 0).all()
    chosen = probs.gather(1, batch["action"]).squeeze(1).log()
    torch.testing.assert_close(chosen, batch["logprob"])
    batch |= {"advantage": torch.randn(len(chosen)), "target": torch.randn(len(chosen))}
    metrics = no_step(script, agent, batch)
    assert abs(metrics["approx_kl"]) < 1e-6 and metrics["clip_fraction"] == 0
    script.train(args)  # Masked-v0 raises an error at a masked action


def test_masked_actions(tmp_path):
    check_masks(imported(tmp_path / changed("masks", tmp_path)), tmp_path)


@pytest.mark.parametrize("right, wrong", [
    ("self.actor(features).where(mask, -1e8)", "self.actor(features)"),
    ("where(mask, -1e8)", "where(mask, -torch.inf)"),
    ('"mask": mask})', '"mask": envs.mask})'),
    ('agent(rows["obs"], rows["mask"])', 'agent(rows["obs"], rows["mask"] | True)'),
    ("agent(obs, envs.mask)[0].mode", "agent(obs, envs.mask | True)[0].mode"),
    ('info["action_mask"], dtype=torch.bool, device=self.device)\n        return',
     "np.ones((self.num_envs, 4)), dtype=torch.bool)\n        return"),
], ids=["not applied", "infinite", "of the next state", "not in the update", "not in evaluation",
        "not at a reset"])
def test_broken_masks(right, wrong, tmp_path):
    script = broken(tmp_path / changed("masks", tmp_path), right, wrong)
    with pytest.raises((AssertionError, RuntimeError)):
        check_masks(script, tmp_path)


def test_learning_with_masks(tmp_path):
    """The best policy prefers larger actions, and gets 1 in each of seven steps."""
    script = imported(tmp_path / changed("masks", tmp_path))
    _, score = script.train(
        script.Args(env_id="Masked-v0", total_timesteps=20_480, run_dir=str(tmp_path / "run")))
    assert score > 6.5


def two_rollouts(script, env_id):
    """Return an agent and two rollouts of 12 steps, joined along time, and both apart."""
    args = script.Args(env_id=env_id, norm_obs=False)
    torch.manual_seed(0)
    envs = script.Envs(args, 6, "cpu")
    agent = script.Agent(envs.obs_shape, envs.single_action_space, args)
    for layer in agent.actor[-1], agent.critic[-1]:
        torch.nn.init.normal_(layer.weight)
    obs, valid = envs.reset(seed=0), torch.ones(6, dtype=torch.bool)
    obs, valid, first = script.collect(envs, agent, obs, valid, 12)
    second = script.collect(envs, agent, obs, valid, 12)[2]
    return agent, {name: torch.cat([first[name], second[name]]) for name in first}, second


def check_episodes(script, env_id):
    """Values and log-probabilities are those of an LSTM that sees each episode alone."""
    agent, rollout, _ = two_rollouts(script, env_id)
    count = 0
    for n in range(6):
        ends = (~rollout["valid"][:, n]).nonzero().flatten().tolist()
        for start, end in zip([0, *(t + 1 for t in ends)], ends):
            steps = slice(start, end + 1)  # with the last observation, which the reset follows
            every = torch.ones(end + 1 - start, 1, dtype=torch.bool)
            pi, value, _ = agent(rollout["obs"][steps, n:n + 1], every, torch.zeros(1, 128), every)
            torch.testing.assert_close(value, rollout["value"][steps, n])
            torch.testing.assert_close(value[1:], rollout["next_value"][start:end, n])
            logprob = pi.log_prob(rollout["action"][steps, n])
            torch.testing.assert_close(logprob, rollout["logprob"][steps, n])
            count += start < 12 < end
    assert count >= 3, "episodes that both rollouts share"


def check_update(script):
    """With learning rate 0, probabilities stay the same. Losses are those of valid rows."""
    agent, _, batch = two_rollouts(script, "Cue-v0")
    assert not batch["valid"].all()
    batch["advantage"] = torch.randn(12, 6)
    batch["target"] = torch.where(batch["valid"], batch["value"] + 2, 1e3)
    metrics = no_step(script, agent, batch, num_minibatches=3)
    assert abs(metrics["approx_kl"]) < 1e-6 and metrics["clip_fraction"] == 0
    assert metrics["value_loss"] == pytest.approx(4)


def check_training(script, folder, monkeypatch):
    """Means and variances of a training run are those of valid rows."""
    update, update_moments = script.update, script.RunningMoments.update
    batches, merged = [], []

    def record_batch(agent, optimizer, batch, args):
        batches.append(batch)
        return update(agent, optimizer, batch, args)

    def record_rows(moments, rows):
        merged.append(rows)
        update_moments(moments, rows)

    monkeypatch.setattr(script, "update", record_batch)
    monkeypatch.setattr(script.RunningMoments, "update", record_rows)
    script.train(
        script.Args(env_id="Cue-v0", total_timesteps=2_048, run_dir=str(folder / "run")))
    (batch,) = batches
    advantage = batch["advantage"][batch["valid"]]
    assert advantage.mean().abs() < 1e-6
    assert advantage.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert torch.equal(merged[-1], batch["obs"][batch["valid"]])
    target, value = (batch[name][batch["valid"]] for name in ("target", "value"))
    header, row = (folder / "run" / "metrics.csv").read_text().splitlines()
    logged = dict(zip(header.split(","), row.split(",")))
    explained = 1 - (target - value).var() / target.var()
    assert float(logged["explained_variance"]) == pytest.approx(explained.item(), abs=1e-4)


def check_lstm(script, folder, monkeypatch):
    check_episodes(script, "Cue-v0")
    check_episodes(script, "CutCue-v0")
    check_update(script)
    check_training(script, folder, monkeypatch)


def test_lstm(tmp_path, monkeypatch):
    check_lstm(imported(tmp_path / changed("lstm", tmp_path)), tmp_path, monkeypatch)


@pytest.mark.parametrize("right, wrong", [
    (" * valid[t].unsqueeze(-1)", ""),
    ("memory = envs.memory\n", "memory = torch.zeros_like(envs.memory)\n"),
    ('rows["memory"][0]', '0 * rows["memory"][0]'),
    ("valid[None], envs.memory, 0)", "valid[None], 0 * envs.memory, 0)"),
    ('moments(batch["advantage"][rollout["valid"]])', 'moments(batch["advantage"].flatten())'),
    ('moments(batch["target"][rollout["valid"]])', 'moments(batch["target"].flatten())'),
    ('update(batch["obs"][rollout["valid"]])', 'update(batch["obs"].flatten(0, 1))'),
], ids=["not cleared", "forgotten", "update starts without", "value at the end",
        "advantages of resets", "targets of resets", "observations of resets"])
def test_broken_lstm(right, wrong, tmp_path, monkeypatch):
    script = broken(tmp_path / changed("lstm", tmp_path), right, wrong)
    with pytest.raises(AssertionError):
        check_lstm(script, tmp_path, monkeypatch)


def test_gradient_reaches_earlier_steps(tmp_path):
    script = imported(tmp_path / changed("lstm", tmp_path))
    agent = script.Agent((2,), gym.spaces.Discrete(2), script.Args(norm_obs=False))
    obs = torch.randn(5, 1, 2, requires_grad=True)
    _, value, _ = agent(obs, torch.tensor([[1], [0], [1], [1], [1]]), torch.zeros(1, 128), 4)
    value.sum().backward()
    assert obs.grad.abs().sum((1, 2)).gt(0).tolist() == [False, False, True, True, True]


@pytest.mark.slow
def test_lstm_remembers(tmp_path, capsys):
    """ppo.py guesses the cue; with the LSTM it knows it, in evaluation too."""
    import ppo

    script = imported(tmp_path / changed("lstm", tmp_path))
    scores = {}
    for name, module in {"ppo": ppo, "lstm": script}.items():
        args = module.Args(env_id="Cue-v0", total_timesteps=24_576, eval_episodes=64,
                           run_dir=str(tmp_path / name))
        scores[name] = module.train(args)[1]
    assert scores["ppo"] < 0.7 and scores["lstm"] > 0.9
    assert "greedy evaluation: mean return 1.0" in capsys.readouterr().out
