"""The simple scripts: action distributions, actions of the environment, observations."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

OBS = Box(-1, 1, (3,))


def envs_with(action_space):
    """The part of a vector environment that to_env_action needs."""
    return type("Envs", (), {"single_action_space": action_space})()


def sent(script, action, space):
    """Return what the environment gets for sampled actions."""
    return script.to_env_action(torch.tensor(action), envs_with(space))


def test_discrete_distribution(simple):
    policy, obs = simple.Policy(OBS, Discrete(4)), torch.randn(5, 7, 3)
    pi, logprobs = policy(obs), policy.net(obs).log_softmax(-1)
    action = pi.sample()
    assert action.shape == (5, 7) and set(action.unique().tolist()) <= {0, 1, 2, 3}
    expected = logprobs.gather(-1, action.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(pi.log_prob(action), expected)
    torch.testing.assert_close(pi.entropy(), -(logprobs.exp() * logprobs).sum(-1))
    assert torch.equal(pi.mode, logprobs.argmax(-1))


def test_box_distribution_is_a_product_over_dimensions(simple):
    policy, obs = simple.Policy(OBS, Box(-1, 1, (2, 1))), torch.randn(5, 7, 3)
    with torch.no_grad():
        policy.log_std.copy_(torch.tensor([-1.0, 0.3]))
    pi, mean, std = policy(obs), policy.net(obs), policy.log_std.exp()
    action = pi.sample()
    assert action.shape == (5, 7, 2)
    density = (-((action - mean) / std) ** 2 / 2).exp() / (std * (2 * torch.pi) ** 0.5)
    torch.testing.assert_close(pi.log_prob(action).exp(), density.prod(-1))
    torch.testing.assert_close(pi.mode, mean)
    spread = policy(torch.zeros(100_000, 3)).sample().std(0)
    torch.testing.assert_close(spread, std, atol=0.02, rtol=0.02)


def test_entropy_of_box_actions_falls_with_the_deviation(simple):
    policy = simple.Policy(OBS, Box(-1, 1, (2,)))
    before = policy(torch.zeros(3)).entropy()
    with torch.no_grad():
        policy.log_std -= 0.5
    torch.testing.assert_close(policy(torch.zeros(3)).entropy(), before - 2 * 0.5)


def test_discrete_actions_count_from_start(simple):
    space = Discrete(3, start=5, dtype=np.int32)
    actions = sent(simple, [0, 2], space)
    assert actions.tolist() == [5, 7] and all(space.contains(action) for action in actions)


@pytest.mark.parametrize("low, high", [(16, 30), (-2000, 2000), (-2, 2), (0, 1)])
def test_box_actions_are_scaled_to_the_bounds(simple, low, high):
    space = Box(low, high, (1,), np.float32)
    actions = sent(simple, [[-1.0], [0.0], [1.0], [0.5], [-7.0], [7.0]], space)
    middle, quarter = (low + high) / 2, (low + 3 * high) / 4
    np.testing.assert_allclose(actions[:, 0], [low, middle, high, quarter, low, high], rtol=1e-6)
    assert actions.dtype == np.float32


def test_unbounded_dimensions_are_not_scaled(simple):
    low = np.array([-np.inf, -np.inf, 0, -1e7, -2], dtype=np.float32)
    high = np.array([np.inf, 5, np.inf, 1e7, 2], dtype=np.float32)
    with np.errstate(all="raise"):
        actions = sent(simple, [[1.25, 7.5, -3.5, 1.125, 0.5]], Box(low, high))
        half = sent(simple, [[1.25]], Box(-np.inf, np.inf, (1,), np.float16))
    assert actions.tolist() == [[1.25, 5.0, 0.0, 1.125, 1.0]] and half.tolist() == [[1.25]]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_actions_are_inside_the_bounds_of_their_own_type(simple, dtype):
    space = Box(-0.1, 0.1, (2,), dtype)
    action = sent(simple, [[9.0, -9.0]], space)[0]
    assert action.dtype == dtype and space.contains(action)
    assert action.tolist() == [space.high[0], space.low[0]]


def test_actions_have_the_shape_of_their_space(simple):
    assert sent(simple, [[1.0, 2, 3, 4, 5, 6]], Box(-9, 9, (2, 3))).shape == (1, 2, 3)
    assert sent(simple, [[1.0], [2.0]], Box(-9, 9, ())).shape == (2,)


def test_batch_has_the_sampled_action_before_clipping(simple):
    action = torch.tensor([[5.0], [-0.5]])
    simple.to_env_action(action, envs_with(Box(-2, 2, (1,))))
    assert action.tolist() == [[5.0], [-0.5]]


def test_integer_actions_are_refused_with_a_hint(simple):
    with pytest.raises(SystemExit, match=r"ppo\.py takes more"):
        simple.make_envs("scripted:Does-whole-v0", 2, 0)


@pytest.mark.parametrize("env", ["Does-table", "Sees-number", "Does-from5", "Sees-gray"])
def test_shapes_of_spaces(simple, env, tmp_path):
    """Tables and single numbers, actions that begin at 5, pixels; Spaces checks each action."""
    steps = 40 if simple.__name__ == "actor_critic" else 20
    simple.train(simple.Args(env_id=f"scripted:{env}-v0", num_envs=2, total_timesteps=steps,
                             run_dir=str(tmp_path)))


@pytest.mark.parametrize("space", ["Sees-dict", "Does-multi", "Does-binary"])
def test_other_spaces_are_refused(simple, space):
    with pytest.raises(SystemExit, match="needs Box observations and Discrete or float Box"):
        simple.make_envs(f"scripted:{space}-v0", 2, 0)


def test_seed_determines_the_episodes(simple):
    first, again, other = (simple.make_envs("CartPole-v1", 3, seed).reset()[0]
                           for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert len(np.unique(first, axis=0)) == 3, "the environments of a batch must differ"


class Reusing(gym.vector.VectorEnv):
    """Returns the same arrays in every step. The observation is the step's number."""

    single_observation_space, single_action_space = Box(-9, 9, (1,), np.float32), Discrete(2)
    metadata = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(self, num_envs, **kwargs):
        self.num_envs, self.obs = num_envs, np.zeros((num_envs, 1), np.float32)
        self.reward, self.no = np.zeros(num_envs), np.zeros(num_envs, bool)
        self.end = np.zeros(num_envs, bool)

    def reset(self, *, seed=None, options=None):
        self.obs[:] = 0
        self.end[:] = False
        return self.obs, {}

    def step(self, actions):
        reset = self.end[0]
        self.obs[:] = 0 if reset else self.obs + 1
        self.reward[:] = 0 if reset else self.obs[:, 0]
        self.end[:] = self.obs[:, 0] == 4
        return self.obs, self.reward, self.end, self.no, {}


gym.register("Reusing-v0", vector_entry_point=Reusing)


def test_observations_of_a_reused_array_are_copied(simple):
    envs = simple.make_envs("Reusing-v0", 2, 0)
    policy = simple.Policy(envs.single_observation_space, envs.single_action_space)
    if simple.__name__ != "actor_critic":
        batch = simple.play_episodes(envs, policy, 100, "cpu")
        assert batch["obs"][:, 0, 0].tolist() == [0, 1, 2, 3]
        assert batch["reward"][:, 1].tolist() == [1, 2, 3, 4]
        assert batch["mask"].all()
        return
    obs, valid = simple.to_tensor(envs.reset()[0], "cpu"), torch.ones(2, dtype=torch.bool)
    first = simple.step_envs(envs, obs, torch.zeros(2), valid, False)
    second = simple.step_envs(envs, first["next_obs"], torch.zeros(2), valid, False)
    assert first["obs"][0] == 0 and first["next_obs"][0] == 1 and second["next_obs"][0] == 2
    assert first["reward"][0] == 1 and second["reward"][0] == 2
    last = [simple.step_envs(envs, obs, torch.zeros(2), valid, False) for _ in range(2)][-1]
    simple.step_envs(envs, obs, torch.zeros(2), valid, False)
    assert last["done"].all() and last["terminated"].all()


def test_networks_start_orthogonal_with_outputs_near_zero(simple):
    net = simple.mlp(5, 3)
    for layer, gain in zip(net[::2], (2**0.5, 2**0.5, 0.01), strict=True):
        weight = layer.weight.detach()
        weight = weight if weight.shape[0] <= weight.shape[1] else weight.T
        torch.testing.assert_close(weight @ weight.T, gain**2 * torch.eye(len(weight)),
                                   rtol=0, atol=1e-5)
        assert not layer.bias.any()
    assert net(torch.randn(100, 5)).abs().max() < 0.1


def test_the_deviation_of_box_actions_is_learned(simple, monkeypatch):
    from conftest import FakeLogger

    monkeypatch.setattr(simple, "Logger", FakeLogger())
    policy, _ = simple.train(simple.Args(env_id="scripted:Does-box-v0", num_envs=2))
    assert (policy.log_std != -0.5).all()


def test_box_actions_start_with_a_deviation_of_0_6(simple):
    deviation = simple.Policy(OBS, Box(-1, 1, (2,))).log_std.exp()
    torch.testing.assert_close(deviation, torch.full((2,), 0.6065), atol=1e-3, rtol=0)
