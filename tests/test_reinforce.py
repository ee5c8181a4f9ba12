"""REINFORCE and its baseline against the exact gradient, by enumeration of every trajectory.

In a small MDP each transition flips a fair coin. One environment plays each sequence of actions and
coins, so the mean over environments is the expectation under a uniform policy. Weighting each
trajectory by π / uniform makes it the expectation under π.
"""

import importlib
import itertools
import math
import types

import numpy as np
import pytest
import torch
from conftest import FakeLogger
from gymnasium.spaces import Box, Discrete

HORIZON, STATES = 4, 3
NEXT = torch.tensor(
    [[[1, 0], [2, 1]], [[0, 2], [3, 1]], [[3, 3], [1, 2]]]
)  # [state, action, coin]; 3 ends
REWARD = torch.tensor(
    [[1.0, -2.0], [0.5, 3.0], [4.0, -1.0]], dtype=torch.float64
)  # [state, action]
SCRIPTS = ["reinforce", "reinforce_baseline"]


class AllTrajectories:
    """A vector environment in which environment i plays the i-th sequence of (action, coin)."""

    single_observation_space, single_action_space = Box(0, 1, (STATES,)), Discrete(2)
    spec = types.SimpleNamespace(max_episode_steps=None)

    def __init__(self):
        pairs = list(itertools.product(range(2), range(2)))
        plan = torch.tensor(list(itertools.product(pairs, repeat=HORIZON)))
        self.actions, self.coins = plan[..., 0].T, plan[..., 1].T  # (HORIZON, N)
        self.num_envs = len(plan)

    def observe(self):
        return torch.eye(STATES + 1, dtype=torch.float64)[self.state][:, :STATES].numpy()

    def reset(self, seed=None):
        self.t, self.state = 0, torch.zeros(self.num_envs, dtype=torch.long)
        return self.observe(), {}

    def step(self, action):
        action = torch.tensor(action)
        assert torch.equal(action, self.actions[self.t])
        ended = self.state == STATES
        here = self.state.clamp(max=STATES - 1)
        reward = torch.where(ended, 1000.0, REWARD[here, action])
        self.state = torch.where(ended, 0, NEXT[here, action, self.coins[self.t]])
        self.t += 1
        truncated = np.full(self.num_envs, self.t == HORIZON)
        return self.observe(), reward.numpy(), (self.state == STATES).numpy(), truncated, {}

    def close(self):
        pass


def true_objective(policy, gamma):
    """J(θ) by dynamic programming, differentiable."""
    probs = policy.net(torch.eye(STATES, dtype=torch.float64)).softmax(-1)  # (S, 2)
    value = torch.zeros(STATES + 1, dtype=torch.float64)
    for _ in range(HORIZON):
        action_value = REWARD + gamma * value[NEXT].mean(-1)  # (S, 2)
        value = torch.cat([(probs * action_value).sum(-1), torch.zeros(1)])
    return value[0]


@pytest.fixture
def double(monkeypatch):
    """Compute in float64, even if a script asks for float32."""
    single = torch.float32
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(torch, "float32", torch.float64)
    yield
    torch.set_default_dtype(single)


def train_on_all_trajectories(script, monkeypatch, on_policy=True, **flags):
    """Run one update of train(). Return the policy with its .grad, and recorded values.

    on_policy: weight each trajectory by π / uniform.
    """
    envs, logger = AllTrajectories(), FakeLogger()
    seen = {"logger": logger, "envs": envs}

    class Planned(torch.distributions.Categorical):
        def sample(self):
            return envs.actions[envs.t]

    class Uneven(script.Policy):
        def __init__(self, *spaces):
            super().__init__(*spaces)
            torch.nn.init.orthogonal_(self.net[-1].weight, 1.0)  # a policy far from uniform

    loss = script.policy_gradient_loss

    def keep_and_weight(logprob, weight, mask):
        seen.update(weight=weight, mask=mask)
        ratio = ((logprob.detach() + math.log(2)) * mask).sum(0).exp() if on_policy else 1.0
        return loss(logprob, weight * ratio, mask)

    monkeypatch.setattr(script, "make_envs", lambda *args: envs)
    monkeypatch.setattr(script, "Logger", logger)
    monkeypatch.setattr(script, "Categorical", Planned)
    monkeypatch.setattr(script, "Policy", Uneven)
    monkeypatch.setattr(script, "policy_gradient_loss", keep_and_weight)
    if hasattr(script, "Value"):
        kind = script.Value
        monkeypatch.setattr(script, "Value", lambda space: seen.setdefault("value", kind(space)))
        flags = {"value_learning_rate": 0.0} | flags
    flags = {"learning_rate": 0.0, "num_envs": 4**HORIZON} | flags
    policy, _ = script.train(script.Args(**flags))
    return policy, seen


def assert_gradient_is_exact(policy, gamma):
    exact = torch.autograd.grad(true_objective(policy, gamma), list(policy.net.parameters()))
    for param, expected in zip(policy.net.parameters(), exact):
        torch.testing.assert_close(-param.grad, expected, atol=1e-6, rtol=1e-6)
    assert max(gradient.abs().max() for gradient in exact) > 0.1


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_mean_update_is_the_exact_gradient(name, gamma, double, monkeypatch):
    script = importlib.import_module(name)
    policy, _ = train_on_all_trajectories(script, monkeypatch, gamma=gamma)
    assert_gradient_is_exact(policy, gamma)


@pytest.mark.parametrize("name", SCRIPTS)
def test_mean_update_without_gamma_to_the_t_is_another(name, double, monkeypatch):
    script = importlib.import_module(name)
    policy, _ = train_on_all_trajectories(script, monkeypatch, gamma=0.8, exact_discount=False)
    exact = torch.autograd.grad(true_objective(policy, 0.8), policy.net[-1].weight)[0]
    assert (policy.net[-1].weight.grad + exact).abs().max() > 0.01


@pytest.mark.parametrize("name", SCRIPTS)
def test_steps_and_returns_count_first_episodes_only(name, double, monkeypatch):
    _, seen = train_on_all_trajectories(importlib.import_module(name), monkeypatch)
    steps, returns, _ = seen["logger"].rows[0]
    assert returns.abs().max() < 100, "rewards after an environment's first episode were counted"
    assert 4**HORIZON < steps < 4**HORIZON * HORIZON
    assert steps == seen["mask"].sum()


def test_baseline_learns_from_raw_returns(double, monkeypatch):
    script = importlib.import_module("reinforce_baseline")
    policy, seen = train_on_all_trajectories(script, monkeypatch, gamma=0.8)
    value = seen["value"]
    batch = script.play_episodes(seen["envs"], policy, 100, "cpu")
    expected, count = 0.0, 0
    for n in range(seen["envs"].num_envs):
        length = int(batch["mask"][:, n].sum())
        for t in range(length):
            total = sum(0.8 ** (k - t) * batch["reward"][k, n] for k in range(t, length))
            expected = expected + (total - value(batch["obs"][t, n])) ** 2 / 2
            count += 1
    gradient = torch.autograd.grad(expected / count, value.net[-1].weight)[0]
    torch.testing.assert_close(value.net[-1].weight.grad, gradient)


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("exact_discount", [True, False])
def test_what_the_policy_learns_from_by_hand(name, exact_discount, double, monkeypatch):
    """The return, minus the baseline if there is one.

    The mean gradient does not depend on the baseline's sign, or on a constant. What is logged is
    without padding, and the returns are without γ.
    """
    script = importlib.import_module(name)
    policy, seen = train_on_all_trajectories(script, monkeypatch, gamma=0.8,
                                             exact_discount=exact_discount)
    batch = script.play_episodes(seen["envs"], policy, 100, "cpu")
    for n in range(0, seen["envs"].num_envs, 17):
        length = int(batch["mask"][:, n].sum())
        for t in range(length):
            expected = sum(0.8 ** (k - t) * batch["reward"][k, n] for k in range(t, length))
            if "value" in seen:
                expected = expected - seen["value"](batch["obs"][t, n])
            if exact_discount:
                expected = 0.8**t * expected
            torch.testing.assert_close(seen["weight"][t, n], expected)
    _, returns, metrics = seen["logger"].rows[0]
    torch.testing.assert_close(returns, batch["reward"].sum(0))
    entropy = policy(batch["obs"]).entropy()[batch["mask"]].mean()
    torch.testing.assert_close(metrics["entropy"], entropy)
    gradient = torch.cat([param.grad.flatten() for param in policy.parameters()])
    torch.testing.assert_close(metrics["grad_norm"], gradient.norm())


def test_the_baseline_has_its_own_learning_rate(monkeypatch):
    import reinforce_baseline as script

    rates, step = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda adam: rates.append(
        [group["lr"] for group in adam.param_groups]) or step(adam))
    monkeypatch.setattr(script, "Logger", FakeLogger())
    script.train(script.Args(num_envs=2, learning_rate=0.1, value_learning_rate=0.2))
    assert rates == [[0.1, 0.2]]


def test_variance_falls_with_the_baseline(double, monkeypatch):
    """Per-trajectory gradients under the uniform policy, with v̂ the true value and with v̂ = 0."""
    script = importlib.import_module("reinforce_baseline")
    policy, seen = train_on_all_trajectories(script, monkeypatch)
    batch = script.play_episodes(seen["envs"], policy, 100, "cpu")
    reward, mask, action = batch["reward"], batch["mask"], batch["action"]
    logits = torch.zeros(STATES, 2, requires_grad=True)
    returns = script.discounted_returns(reward, 1.0)
    true_value = torch.zeros(HORIZON + 1, STATES + 1)
    for left in range(1, HORIZON + 1):
        true_value[left, :STATES] = (REWARD + true_value[left - 1][NEXT].mean(-1)).mean(-1)
    state = batch["obs"].argmax(-1)
    to_go = (HORIZON - torch.arange(HORIZON)).unsqueeze(-1)

    def spread(baseline):
        columns = []
        for n in range(reward.shape[1]):
            logprob = logits.log_softmax(-1)[state[:, n], action[:, n]]
            weight = (returns[:, n] - baseline[:, n]).unsqueeze(-1)
            loss = -(weight * logprob.unsqueeze(-1) * mask[:, n].unsqueeze(-1)).sum(0).mean()
            columns.append(torch.autograd.grad(loss, logits)[0].flatten())
        columns = torch.stack(columns)
        return columns.mean(0), columns.var(0).sum()

    mean_without, without = spread(torch.zeros_like(returns))
    mean_with, with_it = spread(true_value[to_go, state])
    torch.testing.assert_close(mean_with, mean_without)
    assert with_it < 0.7 * without


@pytest.mark.parametrize("name", SCRIPTS)
def test_padding_has_no_gradient(name):
    script = importlib.import_module(name)
    logprob = torch.randn(4, 2, requires_grad=True)
    mask = torch.tensor([[True, True], [True, False], [True, False], [False, False]])
    weight = torch.randn(4, 2)
    script.policy_gradient_loss(logprob, weight, mask).backward()
    torch.testing.assert_close(logprob.grad, -weight * mask / 2)


def test_padding_is_not_in_the_value_loss():
    script = importlib.import_module("reinforce_baseline")
    value, returns = torch.randn(4, 2, requires_grad=True), torch.randn(4, 2)
    mask = torch.tensor([[True, True], [True, False], [True, False], [False, False]])
    script.value_loss(value, returns, mask).backward()
    torch.testing.assert_close(value.grad, (value - returns).detach() * mask / 4)


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_update_plays_other_episodes(name, monkeypatch):
    script = importlib.import_module(name)
    firsts, play = [], script.play_episodes

    def watched(*args, **kwargs):
        batch = play(*args, **kwargs)
        firsts.append(batch["obs"][0])
        return batch

    monkeypatch.setattr(script, "play_episodes", watched)
    monkeypatch.setattr(script, "Logger", FakeLogger(updates=3))
    script.train(script.Args(num_envs=2, seed=5))
    assert len(torch.cat(firsts).unique(dim=0)) == 6, "no two episodes begin alike"


@pytest.mark.parametrize("name", SCRIPTS)
def test_return_counts_rewards_from_each_step_on(name):
    script = importlib.import_module(name)
    reward = torch.tensor([[1.0, 0.0], [2.0, 1.0], [4.0, 0.0]])
    returns = script.discounted_returns(reward, 0.5)
    assert returns.tolist() == [[3.0, 0.5], [4.0, 1.0], [4.0, 0.0]]
    assert reward.tolist() == [[1.0, 0.0], [2.0, 1.0], [4.0, 0.0]]


@pytest.mark.parametrize("name", SCRIPTS)
def test_gradient_depends_on_its_batch_only(name, monkeypatch):
    """The test computes the gradient again from the arguments of the loss."""
    script, seen, models = importlib.import_module(name), [], []
    loss, step = script.policy_gradient_loss, torch.optim.Adam.step
    monkeypatch.setattr(script, "policy_gradient_loss",
                        lambda *columns: seen.append(loss(*columns)) or seen[-1])
    backward = torch.Tensor.backward

    def watched(loss_of_batch, *args):
        models.append(torch.autograd.grad(seen[-1], PARAMS, retain_graph=True))
        return backward(loss_of_batch, *args)

    policy = script.Policy

    def made(*spaces):
        PARAMS[:] = list((net := policy(*spaces)).parameters())
        return net

    PARAMS = []
    monkeypatch.setattr(script, "Policy", made)
    monkeypatch.setattr(torch.Tensor, "backward", watched)
    grads = []
    monkeypatch.setattr(torch.optim.Adam, "step", lambda adam: grads.append(
        [param.grad.clone() for param in PARAMS]) or step(adam))
    monkeypatch.setattr(script, "Logger", FakeLogger(updates=3))
    script.train(script.Args(num_envs=2))
    for expected, actual in zip(models, grads):
        for one, other in zip(expected, actual):
            torch.testing.assert_close(one, other)
    assert len(grads) == 3


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_batch_has_the_sampled_actions(name):
    """The clipped ones have another log π."""
    script = importlib.import_module(name)
    envs = script.make_envs("scripted:Does-box-v0", 64, 0)
    policy = script.Policy(envs.single_observation_space, envs.single_action_space)
    assert script.play_episodes(envs, policy, 100, "cpu")["action"].abs().max() > 1


def test_the_log_has_the_loss_of_the_baseline(double, monkeypatch):
    script = importlib.import_module("reinforce_baseline")
    policy, seen = train_on_all_trajectories(script, monkeypatch)
    batch = script.play_episodes(seen["envs"], policy, 100, "cpu")
    returns, value = script.discounted_returns(batch["reward"], 1.0), seen["value"](batch["obs"])
    expected = (returns - value.detach())[batch["mask"]].square().mean() / 2
    torch.testing.assert_close(seen["logger"].rows[0][2]["value_loss"], expected)
