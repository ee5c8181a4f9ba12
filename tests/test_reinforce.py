"""REINFORCE and its baseline against the exact gradient, by enumeration of every trajectory.

A small MDP whose transitions flip a fair coin, and actions drawn uniformly (--epsilon 1, where the
behaviour policy is uniform whatever π is): then all sequences of actions and coins are equally
probable, one environment plays each, and the mean over environments is the expectation itself.
"""

import importlib
import itertools
import math

import pytest
import torch
from conftest import OneUpdate
from gymnasium.spaces import Discrete

HORIZON, STATES = 4, 3
NEXT = torch.tensor(
    [[[1, 0], [2, 1]], [[0, 2], [3, 1]], [[3, 3], [1, 2]]]
)  # [state, action, coin]; 3 ends
REWARD = torch.tensor(
    [[1.0, -2.0], [0.5, 3.0], [4.0, -1.0]], dtype=torch.float64
)  # [state, action]


class AllTrajectories:
    """Stands in for Envs: environment i plays the i-th sequence of (action, coin) pairs."""

    obs_size, action_space, threshold = STATES, Discrete(2), None

    def __init__(self, env_id, num_envs, device):
        pairs = list(itertools.product(range(2), range(2)))
        plan = torch.tensor(list(itertools.product(pairs, repeat=HORIZON)))
        self.actions, self.coins = plan[..., 0].T, plan[..., 1].T  # (HORIZON, N)

    def observe(self):
        return torch.eye(STATES + 1, dtype=torch.float64)[self.state][:, :STATES]

    def reset(self, seed):
        self.t, self.state = 0, torch.zeros(self.actions.shape[1], dtype=torch.long)
        return self.observe()

    def behave(self, policy, obs, epsilon):
        return self.actions[self.t]

    def step(self, action):
        ended = self.state == STATES
        here = self.state.clamp(max=STATES - 1)
        reward = torch.where(ended, 1000.0, REWARD[here, action])
        self.state = torch.where(ended, 0, NEXT[here, action, self.coins[self.t]])
        self.t += 1
        truncated = torch.full_like(ended, self.t == HORIZON)
        return self.observe(), reward, self.state == STATES, truncated


def true_objective(policy, gamma):
    """J(θ) by dynamic programming, differentiable."""
    probs = policy.net(torch.eye(STATES, dtype=torch.float64)).softmax(-1)  # (S, 2)
    value = torch.zeros(STATES + 1, dtype=torch.float64)
    for _ in range(HORIZON):
        action_value = REWARD + gamma * value[NEXT].mean(-1)  # (S, 2)
        value = torch.cat([(probs * action_value).sum(-1), torch.zeros(1)])
    return value[0]


def gradient_of_train(script, one_update, monkeypatch, **flags):
    """One update of train() over all trajectories: the policy with its .grad, and the run."""
    torch.set_default_dtype(torch.float64)
    envs = AllTrajectories(None, None, None)
    monkeypatch.setattr(script, "Envs", lambda *args: envs)
    monkeypatch.setattr(script, "Run", one_update)
    monkeypatch.setattr(script, "behave", envs.behave)
    init = script.Policy.__init__

    def uneven(policy, *args):
        init(policy, *args)
        torch.nn.init.orthogonal_(policy.net[-1].weight, 1.0)  # a policy far from uniform

    monkeypatch.setattr(script.Policy, "__init__", uneven)
    try:
        flags = {"learning_rate": 0.0, "epsilon": 1.0, "num_envs": 4**HORIZON} | flags
        script.train(script.Args(**flags))
    finally:
        torch.set_default_dtype(torch.float32)
    return one_update.parts["policy"], one_update


@pytest.mark.parametrize("name", ["reinforce", "reinforce_baseline"])
@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_mean_update_is_the_exact_gradient(name, gamma, one_update, monkeypatch):
    policy, _ = gradient_of_train(
        importlib.import_module(name), one_update, monkeypatch, gamma=gamma
    )
    exact = torch.autograd.grad(true_objective(policy, gamma), list(policy.net.parameters()))
    for param, expected in zip(policy.net.parameters(), exact):
        torch.testing.assert_close(-param.grad, expected, atol=1e-6, rtol=1e-6)
    assert max(gradient.abs().max() for gradient in exact) > 0.1


@pytest.mark.parametrize("name", ["reinforce", "reinforce_baseline"])
@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_so_it_is_on_policy(name, gamma, one_update, monkeypatch):
    """Each trajectory weighted by how much oftener the policy plays it than the uniform one."""
    script = importlib.import_module(name)
    loss = script.policy_gradient_loss

    def as_often_as_played(logprob, weight, mask):
        ratio = ((logprob.detach() + math.log(2)) * mask).sum(0).exp()
        return loss(logprob, weight * ratio, mask)

    monkeypatch.setattr(script, "policy_gradient_loss", as_often_as_played)
    policy, _ = gradient_of_train(script, one_update, monkeypatch, gamma=gamma, epsilon=0.0)
    exact = torch.autograd.grad(true_objective(policy, gamma), list(policy.net.parameters()))
    for param, expected in zip(policy.net.parameters(), exact):
        torch.testing.assert_close(-param.grad, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["reinforce", "reinforce_baseline"])
def test_without_gamma_to_the_t_it_is_not(name, one_update, monkeypatch):
    script = importlib.import_module(name)
    policy, _ = gradient_of_train(script, one_update, monkeypatch, gamma=0.8, exact_discount=False)
    exact = torch.autograd.grad(true_objective(policy, 0.8), policy.net[-1].weight)[0]
    assert (policy.net[-1].weight.grad + exact).abs().max() > 0.01


@pytest.mark.parametrize("name", ["reinforce", "reinforce_baseline"])
def test_steps_and_returns_count_first_episodes_only(name, one_update, monkeypatch):
    _, run = gradient_of_train(importlib.import_module(name), one_update, monkeypatch)
    steps, returns, _ = run.rows[0]
    assert returns.abs().max() < 100, "what follows an environment's first end was counted"
    assert 4**HORIZON < steps < 4**HORIZON * HORIZON


def test_baseline_learns_from_raw_returns(one_update, monkeypatch):
    script = importlib.import_module("reinforce_baseline")
    _, run = gradient_of_train(script, one_update, monkeypatch, gamma=0.8, value_learning_rate=0.0)
    value, envs = run.parts["value"], AllTrajectories(None, None, None)
    policy = run.parts["policy"]
    monkeypatch.setattr(script, "behave", envs.behave)
    obs, _, reward, mask = script.play_episodes(envs, policy, 1.0, [0])
    expected, count = 0.0, 0
    for n in range(reward.shape[1]):
        length = int(mask[:, n].sum())
        for t in range(length):
            total = sum(0.8 ** (k - t) * reward[k, n] for k in range(t, length))
            expected, count = expected + (total - value(obs[t, n])) ** 2 / 2, count + 1
    gradient = torch.autograd.grad(expected / count, value.net[-1].weight)[0]
    torch.testing.assert_close(value.net[-1].weight.grad, gradient)


def test_the_baseline_is_subtracted_weighted_like_its_step(one_update, monkeypatch):
    """What the policy learns from, by hand: the mean gradient does not tell a baseline's sign."""
    script, seen = importlib.import_module("reinforce_baseline"), {}
    loss = script.policy_gradient_loss

    def keep(logprob, weight, mask):
        seen.update(weight=weight, mask=mask)
        return loss(logprob, weight, mask)

    monkeypatch.setattr(script, "policy_gradient_loss", keep)
    _, run = gradient_of_train(script, one_update, monkeypatch, gamma=0.8, value_learning_rate=0.0)
    value, policy, envs = run.parts["value"], run.parts["policy"], AllTrajectories(None, None, None)
    monkeypatch.setattr(script, "behave", envs.behave)
    obs, action, reward, _ = script.play_episodes(envs, policy, 1.0, [0])
    ratio = 2 * policy(obs, action)[0].exp()  # to the uniform behaviour
    for n in range(0, reward.shape[1], 17):
        for t in range(int(seen["mask"][:, n].sum())):
            rho = [ratio[: k + 1, n].prod() for k in range(len(reward))]
            total = sum(0.8 ** (k - t) * rho[k] * reward[k, n] for k in range(t, len(reward)))
            expected = 0.8**t * (total - rho[t] * value(obs[t, n]))
            torch.testing.assert_close(seen["weight"][t, n], expected)


def test_variance_falls_with_the_baseline(monkeypatch):
    """Per-trajectory gradients under the uniform policy, with v̂ the true value and with v̂ = 0."""
    script = importlib.import_module("reinforce_baseline")
    envs = AllTrajectories(None, None, None)
    monkeypatch.setattr(script, "behave", envs.behave)
    obs, action, reward, mask = script.play_episodes(envs, None, 0.0, [0])
    logits = torch.zeros(STATES, 2, dtype=torch.float64, requires_grad=True)
    returns = script.returns_to_go(reward, 1.0)
    true_value = torch.zeros(HORIZON + 1, STATES + 1, dtype=torch.float64)
    for left in range(1, HORIZON + 1):
        true_value[left, :STATES] = (REWARD + true_value[left - 1][NEXT].mean(-1)).mean(-1)
    state = obs.argmax(-1)
    to_go = (HORIZON - torch.arange(HORIZON)).unsqueeze(-1)

    def spread(baseline):
        columns = []
        for n in range(reward.shape[1]):
            logprob = logits.log_softmax(-1)[state[:, n], action[:, n]]
            weight = (returns[:, n] - baseline[:, n]).unsqueeze(-1)
            loss = script.policy_gradient_loss(
                logprob.unsqueeze(-1), weight, mask[:, n].unsqueeze(-1)
            )
            columns.append(torch.autograd.grad(loss, logits)[0].flatten())
        columns = torch.stack(columns)
        return columns.mean(0), columns.var(0).sum()

    mean_without, without = spread(torch.zeros_like(returns))
    mean_with, with_it = spread(true_value[to_go, state])
    torch.testing.assert_close(mean_with, mean_without)
    assert with_it < 0.7 * without


def test_behaviour_policy_is_the_stated_mixture():
    import reinforce

    policy = reinforce.Policy(1, Discrete(3))
    with torch.no_grad():
        policy.net[-1].bias.copy_(torch.tensor([2.0, 0.0, -2.0]))
    obs = torch.zeros(200_000, 1)
    torch.manual_seed(0)
    counts = torch.bincount(reinforce.behave(policy, obs, 0.4), minlength=3) / len(obs)
    probs = policy.net(obs[:1]).softmax(-1)[0]
    torch.testing.assert_close(counts, 0.6 * probs + 0.4 / 3, atol=0.005, rtol=0)
    weight = reinforce.importance_weight(
        probs.log().unsqueeze(-1), 0.4, 3
    )  # (3, 1): a path of 3 steps
    torch.testing.assert_close(weight[:, 0], (probs / (0.6 * probs + 0.4 / 3)).cumprod(0))


@pytest.mark.parametrize("name", ["reinforce", "reinforce_baseline"])
def test_steps_after_the_end_have_no_gradient(name):
    script = importlib.import_module(name)
    logprob = torch.randn(4, 2, requires_grad=True)
    mask = torch.tensor([[True, True], [True, False], [True, False], [False, False]])
    weight = torch.randn(4, 2)
    script.policy_gradient_loss(logprob, weight, mask).backward()
    torch.testing.assert_close(logprob.grad, -weight * mask / 2)


@pytest.mark.parametrize("name", ["reinforce", "reinforce_baseline"])
def test_each_update_plays_other_episodes(name, monkeypatch):
    script = importlib.import_module(name)
    seeds, reset = [], script.Envs.reset
    monkeypatch.setattr(
        script.Envs, "reset", lambda envs, seed: seeds.append(seed) or reset(envs, seed)
    )
    monkeypatch.setattr(script, "Run", OneUpdate(updates=3))
    script.train(script.Args(num_envs=2, seed=5))
    assert len({tuple(seed) for seed in seeds}) == 3 and all(seed[0] == 5 for seed in seeds)
