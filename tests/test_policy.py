"""Distributions of the simpler scripts and what reaches the environment; ppo: test_ppo_envs.py."""

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete


def test_discrete_logprob_and_entropy(simple):
    policy, obs = simple.Policy(3, Discrete(4)), torch.randn(5, 7, 3)
    action = torch.randint(4, (5, 7))
    logprob, entropy = policy(obs, action)
    expected = torch.distributions.Categorical(logits=policy.net(obs))
    torch.testing.assert_close(logprob, expected.log_prob(action))
    torch.testing.assert_close(entropy, expected.entropy())
    assert (policy.mode(obs) == expected.probs.argmax(-1)).all()


def test_box_logprob_and_entropy(simple):
    policy, obs = simple.Policy(3, Box(-1, 1, (2,))), torch.randn(5, 7, 3)
    with torch.no_grad():
        policy.log_std.copy_(torch.tensor([-1.0, 0.3]))
    action = torch.randn(5, 7, 2)
    logprob, entropy = policy(obs, action)
    expected = torch.distributions.Normal(policy.net(obs), policy.log_std.exp())
    torch.testing.assert_close(logprob, expected.log_prob(action).sum(-1))
    torch.testing.assert_close(entropy, expected.entropy().sum(-1))
    torch.testing.assert_close(policy.mode(obs), expected.mean)


def test_samples_follow_the_policy(simple):
    torch.manual_seed(0)
    obs = torch.randn(1, 3).expand(100_000, 3)
    discrete = simple.Policy(3, Discrete(3))
    torch.nn.init.orthogonal_(discrete.net[-1].weight, 1.0)
    share = torch.bincount(discrete.sample(obs), minlength=3) / len(obs)
    torch.testing.assert_close(share, discrete.net(obs[0]).softmax(-1), atol=0.01, rtol=0)
    box = simple.Policy(3, Box(-1, 1, (2,)))
    with torch.no_grad():
        box.log_std.copy_(torch.tensor([-1.0, 0.3]))
        sample = box.sample(obs)
    torch.testing.assert_close(sample.mean(0), box.net(obs[0]), atol=0.02, rtol=0)
    torch.testing.assert_close(sample.std(0), box.log_std.exp(), atol=0.02, rtol=0)


def test_environment_gets_clipped_actions_and_the_policy_keeps_its_own(simple):
    envs = simple.Envs("Pendulum-v1", 2, torch.device("cpu"))
    envs.reset([0])
    seen = []
    inner = envs.envs.step
    envs.envs.step = lambda action: (seen.append(action), inner(action))[1]
    action = torch.tensor([[5.0], [-0.5]])
    envs.step(action)
    np.testing.assert_allclose(seen[0], [[2.0], [-0.5]])
    assert action[0, 0] == 5


def test_discrete_actions_begin_at_start(simple):
    envs = simple.Envs("CartPole-v1", 2, torch.device("cpu"))
    envs.action_space = Discrete(2, start=3)
    seen = []
    envs.envs.step = lambda action: (
        seen.append(action),
        (np.zeros((2, 4)), *np.zeros((3, 2)), {}),
    )[1]
    envs.step(torch.tensor([0, 1]))
    assert seen[0].tolist() == [3, 4]


def test_same_seed_same_episodes_and_another_seed_others(simple):
    envs = simple.Envs("CartPole-v1", 3, torch.device("cpu"))
    first, again, other = (envs.reset(seed) for seed in ([1, 0], [1, 0], [1, 1]))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(first.unique(dim=0)) == 3, "environments of one batch must differ"


def test_observations_are_copies(simple):
    envs = simple.Envs("CartPole-v1", 2, torch.device("cpu"))
    array = np.zeros((2, 4), dtype=np.float32)
    tensor = envs.tensor("observation", array)
    array += 1
    assert not tensor.any()


def test_actions_have_the_type_of_their_space(simple):
    envs = simple.Envs("scripted:Does-whole-v0", 2, torch.device("cpu"))
    envs.reset([0])
    envs.step(torch.tensor([[0.5, 30.0, -2.0], [1.0, 2.0, 3.0]]))  # which asserts it


def test_observations_without_an_axis(simple):
    envs = simple.Envs("scripted:Sees-number-v0", 3, torch.device("cpu"))
    assert envs.reset([0]).shape == envs.step(torch.tensor([0, 1, 0]))[0].shape == (3, 1)


def test_numbers_beyond_float32_are_not_finite(script):
    kind = script.VectorEnv if script.__name__ == "ppo" else script.Envs
    envs = object.__new__(kind)
    envs.device = torch.device("cpu")
    assert envs.tensor("observation", np.full(2, 1e38)).isfinite().all()
    with pytest.raises(FloatingPointError, match="observation"):
        envs.tensor("observation", np.full(2, 1e39))
