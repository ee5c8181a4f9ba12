"""Actor-critic: updates by hand, traces and GAE, batches and single runs, continuing tasks."""

import math
import types

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import FakeLogger
from gymnasium.spaces import Box, Discrete
from torch import nn

import actor_critic


class Linear(nn.Module):
    """v̂(s) = w·s and two actions with logits (θ·s, 0): small enough to differentiate by hand."""

    def __init__(self, theta, w):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))

    def value(self, obs):
        return obs @ self.w

    def forward(self, obs, action):
        logit = obs @ self.theta
        return nn.functional.logsigmoid(torch.where(action == 0, logit, -logit)), self.value(obs)


def column(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


class Learner:
    """The state that train() keeps between calls of learn(), with constant parameters."""

    def __init__(self, model, obs, gamma, lam, exact_discount=True):
        self.model, self.gamma, self.lam, self.exact = model, gamma, lam, exact_discount
        self.obs, self.valid = obs, torch.ones(len(obs), dtype=torch.bool)
        self.discount = torch.ones(len(obs), dtype=torch.float64)
        size = sum(param.numel() for param in model.parameters())
        self.z = torch.zeros(len(obs), size, dtype=torch.float64)

    @torch.no_grad()
    def step(self, action, reward, next_obs, terminated, done):
        """Returns δ, the norm of the update and the update, (P,)."""
        step = {"obs": self.obs, "action": action, "reward": reward, "next_obs": next_obs,
                "terminated": terminated, "done": done, "valid": self.valid}
        delta, self.z, norm = actor_critic.learn(
            self.model, self.z, step, self.discount, self.gamma, self.lam, 0.0)
        if self.exact:
            discount = torch.where(done | ~self.valid, 1, self.gamma * self.discount)
            self.discount = discount
        self.obs, self.valid = next_obs, ~done
        return delta, norm, -torch.cat([param.grad for param in self.model.parameters()])


@torch.no_grad()
def test_three_steps_by_hand():
    gamma, lam, alpha = 0.9, 0.7, 0.1
    model = Linear([0.5], [-0.3])
    optimizer = torch.optim.SGD(model.parameters(), lr=alpha)
    xs, actions, rewards = [1.0, 2.0, -1.0, 0.5], [0, 1, 0], [1.0, -2.0, 3.0]
    learner = Learner(model, column(xs[0]).view(1, 1), gamma, lam)
    theta, w, z_theta, z_w, discount = 0.5, -0.3, 0.0, 0.0, 1.0
    for t in range(3):
        terminated = torch.tensor([t == 2])
        delta, *_ = learner.step(torch.tensor([actions[t]]), column(rewards[t]),
                                 column(xs[t + 1]).view(1, 1), terminated, terminated)
        optimizer.step()
        expected = rewards[t] + (0 if t == 2 else gamma * w * xs[t + 1]) - w * xs[t]
        prob = 1 / (1 + math.exp(-theta * xs[t]))
        z_w = gamma * lam * z_w + xs[t]
        z_theta = (
            gamma * lam * z_theta + discount * ((1 - prob) if actions[t] == 0 else -prob) * xs[t]
        )
        theta, w = theta + alpha * expected * z_theta, w + alpha * expected * z_w
        discount *= gamma
        assert delta.item() == pytest.approx(expected, rel=1e-12)
        assert model.theta.item() == pytest.approx(theta, rel=1e-12)
        assert model.w.item() == pytest.approx(w, rel=1e-12)
    no = torch.tensor([False])
    learner.step(torch.tensor([0]), column(0.0), column(9.0).view(1, 1), no, no)  # only resets
    assert not learner.z.any(), "the trace outlives its episode"


def episode(length, num_envs=1, size=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    obs = torch.randn(length + 1, num_envs, size, generator=generator, dtype=torch.float64)
    action = torch.randint(2, (length, num_envs), generator=generator)
    reward = torch.randn(length, num_envs, generator=generator, dtype=torch.float64)
    return obs, action, reward


def play(model, obs, action, reward, terminated, done, gamma, lam, exact_discount=True):
    """Return the sum of the updates of recorded steps with constant parameters, (P,): θ, then w."""
    learner, total = Learner(model, obs[0], gamma, lam, exact_discount), 0
    for t in range(len(action)):
        *_, update = learner.step(action[t], reward[t], obs[t + 1], terminated[t], done[t])
        total = total + update
    return total


def forward_view(model, obs, action, reward, terminal, gamma, lam, exact_discount=True):
    """Σ_t γ^t GAE_t ∇log π_t and Σ_t GAE_t ∇v̂_t of one episode, by the double sum."""
    length = len(action)
    value = (obs @ model.w).detach()
    delta = [
        reward[t] + gamma * value[t + 1] * (not (terminal and t == length - 1)) - value[t]
        for t in range(length)
    ]
    actor = critic = 0
    for t in range(length):
        gae = sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, length))
        logprob, v = model(obs[t], action[t])
        weight = gamma**t if exact_discount else 1.0
        actor = actor + weight * gae * torch.autograd.grad(logprob, model.theta)[0]
        critic = critic + gae * torch.autograd.grad(v, model.w)[0]
    return torch.cat([actor, critic])


@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("exact_discount", [True, False])
def test_traces_add_up_to_gae(lam, terminal, exact_discount):
    obs, action, reward = episode(5)
    model = Linear([0.3, -0.2, 0.5], [0.1, 0.7, -0.4])
    done = torch.zeros(5, 1, dtype=torch.bool)
    done[-1] = True
    total = play(
        model, obs, action, reward, done & terminal, done, 0.9, lam, exact_discount=exact_discount
    )
    expected = forward_view(
        model, obs[:, 0], action[:, 0], reward[:, 0], terminal, 0.9, lam, exact_discount
    )
    torch.testing.assert_close(total, expected, atol=1e-12, rtol=1e-12)


def test_lambda_one_is_reinforce_with_baseline():
    import reinforce_baseline as script

    obs, action, reward = episode(6)
    model = Linear([0.3, -0.2, 0.5], [0.1, 0.7, -0.4])
    done = torch.zeros(6, 1, dtype=torch.bool)
    done[-1] = True
    total = play(model, obs, action, reward, done, done, 0.9, 1.0)
    logprob, value = model(obs[:-1], action)
    advantage = script.discounted_returns(reward, 0.9) - value.detach()
    weight = advantage * 0.9 ** torch.arange(6).unsqueeze(-1)
    loss = script.policy_gradient_loss(logprob, weight, torch.ones_like(reward))
    torch.testing.assert_close(total[:3], -torch.autograd.grad(loss, model.theta)[0])


def test_batch_of_environments_equals_single_runs():
    """Episodes end at different steps. Reset-only steps have random contents."""
    obs, action, reward = episode(8, num_envs=4, seed=3)
    terminated, truncated = torch.zeros(8, 4, dtype=torch.bool), torch.zeros(8, 4, dtype=torch.bool)
    terminated[2, 0] = truncated[4, 1] = terminated[6, 3] = True
    done = terminated | truncated
    reward[3, 0], reward[5, 1], reward[7, 3] = 1e6, 1e6, 1e6
    model = Linear([0.3, -0.2, 0.5], [0.1, 0.7, -0.4])
    everyone = Learner(model, obs[0], 0.9, 0.8)
    singles = [Learner(model, obs[0, n : n + 1], 0.9, 0.8) for n in range(4)]
    for t in range(8):
        valid = everyone.valid.clone()
        *_, together = everyone.step(action[t], reward[t], obs[t + 1], terminated[t], done[t])
        alone = 0
        for n, single in enumerate(singles):
            one = slice(n, n + 1)
            *_, update = single.step(action[t, one], reward[t, one], obs[t + 1, one],
                                     terminated[t, one], done[t, one])
            alone = alone + update
            torch.testing.assert_close(single.z[0], everyone.z[n])
        torch.testing.assert_close(together, alone / valid.sum())
        assert together.abs().max() < 1e3


def test_per_environment_gradients_equal_autograd():
    model = actor_critic.ActorCritic(Box(-1, 1, (3,)), Discrete(2))
    obs, action, discount = (
        torch.randn(4, 3),
        torch.tensor([0, 1, 1, 0]),
        torch.tensor([1.0, 0.5, 0.0, 2.0]),
    )
    rows = actor_critic.per_env_gradients(model, obs, action, discount)
    for n in range(4):
        logprob, value = model(obs[n], action[n])
        grads = torch.autograd.grad(discount[n] * logprob + value, list(model.parameters()))
        torch.testing.assert_close(rows[n], torch.cat([g.flatten() for g in grads]))


class Stub:
    """Replaces a vector environment."""

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}  # noqa: RUF012
    spec = types.SimpleNamespace(max_episode_steps=None)
    single_action_space = Discrete(2)

    def close(self):
        pass


class Ring(Stub):
    """Three states in a ring; action 1 moves on, action 0 stays.

    Arriving in state 2 is terminal three times in ten; the next step then resets to state 0. A
    continuing task must take both for ordinary moves.
    """

    single_observation_space = Box(0, 1, (3,))
    stay = torch.tensor([0.0, 1.0, 0.0])
    move = torch.tensor([1.0, 0.0, 3.0])

    def __init__(self, env_id, num_envs, seed):
        self.state, self.over = torch.arange(num_envs) % 3, torch.zeros(num_envs, dtype=torch.bool)

    def observe(self):
        return torch.eye(3)[self.state].numpy()

    def reset(self, seed=None):
        return self.observe(), {}

    def step(self, action):
        action = torch.tensor(action)
        reward = torch.where(action == 1, self.move[self.state], self.stay[self.state])
        arrived = (self.state + action) % 3
        ends = (arrived == 2) & (
            torch.rand(len(action)) < 0.3
        )  # in state 2: the next step resets to 0
        reward = torch.where(self.over, 0.0, reward)
        self.state = torch.where(self.over, 0, arrived)
        ends = ends & ~self.over
        self.over = ends
        return (self.observe(), reward.numpy(), ends.numpy(), torch.zeros_like(ends).numpy(), {})


def ring_solution():
    """Mean reward and differential values, with v(0) = 0, of the uniform policy on the Ring."""
    # states 0, 1, 2 and 3 = "2, and the next step only resets"; 2 and 3 look alike to the critic
    move = torch.zeros(4, 4, dtype=torch.float64)
    move[0, 0], move[0, 1] = 0.5, 0.5
    move[1, 1], move[1, 2], move[1, 3] = 0.5, 0.35, 0.15
    move[2, 2], move[2, 3], move[2, 0] = 0.35, 0.15, 0.5
    move[3, 0] = 1.0
    reward = column(0.5, 0.5, 1.5, 0.0)
    matrix = torch.cat(
        [(move.T - torch.eye(4, dtype=torch.float64)), torch.ones(1, 4, dtype=torch.float64)]
    )
    stationary = torch.linalg.lstsq(matrix, column(0, 0, 0, 0, 1).unsqueeze(-1)).solution.squeeze(
        -1
    )
    mean = stationary @ reward
    # the critic sees 2 and 3 as one: aggregate them by their stationary shares
    shares = torch.zeros(3, 4, dtype=torch.float64)
    shares[0, 0] = shares[1, 1] = 1
    shares[2, 2:] = stationary[2:] / stationary[2:].sum()
    seen = torch.zeros(4, 3, dtype=torch.float64)
    seen[0, 0] = seen[1, 1] = seen[2, 2] = seen[3, 2] = 1
    chain, gain = shares @ move @ seen, shares @ reward
    system = (torch.eye(3, dtype=torch.float64) - chain)[:, 1:]  # without the column of v(0) = 0
    value = torch.linalg.lstsq(system, (gain - mean).unsqueeze(-1)).solution.squeeze(-1)
    return mean, torch.cat([column(0.0), value])


@pytest.mark.slow
def test_continuing_task_learns_mean_reward_and_differential_values(monkeypatch):
    logger, models = FakeLogger(updates=60), []
    monkeypatch.setattr(actor_critic, "make_envs", Ring)
    monkeypatch.setattr(actor_critic, "Logger", logger)

    class Uniform(actor_critic.ActorCritic):
        def __init__(self, *spaces):
            super().__init__(*spaces)
            nn.init.zeros_(self.policy.net[-1].weight)
            nn.init.zeros_(self.policy.net[-1].bias)
            models.append(self)

    monkeypatch.setattr(actor_critic, "ActorCritic", Uniform)
    actor_critic.train(actor_critic.Args(
        continuing=True, average_reward_rate=0.01, learning_rate=0.0, value_learning_rate=3e-3,
        trace_lambda=0.0, num_envs=128, total_timesteps=128 * 32 * 60))
    mean, value = ring_solution()
    assert logger.rows[-1][2]["average_reward"].item() == pytest.approx(mean.item(), abs=0.02)
    learned = models[0].value(torch.eye(3)).detach()
    torch.testing.assert_close((learned - learned[0]).double(), value, atol=0.12, rtol=0)


@pytest.mark.parametrize("exact_discount", [True, False])
def test_second_episode_does_not_depend_on_the_first(exact_discount):
    """The reset-only step between them clears the trace and the discount, and has no δ."""
    obs, action, reward = episode(9)
    model = Linear([0.3, -0.2, 0.5], [0.1, 0.7, -0.4])
    done = torch.zeros(9, 1, dtype=torch.bool)
    done[3] = done[8] = True  # so step 4 is the reset-only one
    switch = {"exact_discount": exact_discount}
    whole = play(model, obs, action, reward, done, done, 0.9, 0.8, **switch)
    first = play(model, obs[:5], action[:4], reward[:4], done[:4], done[:4], 0.9, 0.8, **switch)
    second = play(model, obs[5:], action[5:], reward[5:], done[5:], done[5:], 0.9, 0.8, **switch)
    torch.testing.assert_close(whole, first + second)


def test_a_reset_only_step_has_no_error():
    obs, action, reward = episode(2)
    model, ended = Linear([0.3, -0.2, 0.5], [0.1, 0.7, -0.4]), torch.tensor([True])
    learner = Learner(model, obs[0], 0.9, 0.8)
    learner.step(action[0], reward[0], obs[1], ended, ended)
    delta, norm, update = learner.step(action[1], reward[1], obs[2], ~ended, ~ended)
    assert delta.item() == 0 and norm.item() == 0 and not update.any()


def test_the_norm_is_that_of_the_update():
    obs, action, reward = episode(1)
    no = torch.tensor([False])
    learner = Learner(Linear([0.3, -0.2, 0.5], [0.1, 0.7, -0.4]), obs[0], 0.9, 0.8)
    _, norm, update = learner.step(action[0], reward[0], obs[1], no, no)
    torch.testing.assert_close(norm, update.norm())


class Garbage(Stub):
    """Short episodes; the test chooses the reward of a reset-only step."""

    single_observation_space, garbage = Box(0, 1, (1,)), 0.0

    def __init__(self, env_id, num_envs, seed):
        self.generator = np.random.default_rng(0)
        self.num_envs, self.over = num_envs, np.zeros(num_envs, dtype=bool)

    def random(self):
        return self.generator.random(self.num_envs)

    def reset(self, seed=None):
        return self.random()[:, None], {}

    def step(self, action):
        reward = np.where(self.over, self.garbage, self.random() + action)
        terminated, truncated = self.random() < 0.2, self.random() < 0.2
        terminated, truncated = terminated & ~self.over, truncated & ~self.over
        self.over = terminated | truncated
        return self.random()[:, None], reward, terminated, truncated, {}


class Interrupted(Garbage):
    """The same for a continuing task, which has only time limits."""

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, reward, np.zeros_like(terminated), terminated | truncated, info


def train_on(envs, monkeypatch, garbage, **flags):
    """Three rows of the log, and the policy's weights."""
    logger = FakeLogger(updates=3)
    monkeypatch.setattr(actor_critic, "make_envs", envs)
    monkeypatch.setattr(actor_critic, "Logger", logger)
    monkeypatch.setattr(Garbage, "garbage", garbage)
    policy, _ = actor_critic.train(actor_critic.Args(**({"num_envs": 32} | flags)))
    return logger.rows, torch.cat([p.flatten() for p in policy.parameters()])


def test_reset_only_steps_change_nothing(monkeypatch):
    (rows, weights), (other, same) = (train_on(Garbage, monkeypatch, x) for x in (0.0, 1e6))
    assert torch.equal(weights, same)
    for (_, returns, _), (_, again, _) in zip(rows, other):
        assert torch.equal(returns, again) and len(returns) > 100


def test_continuing_score_excludes_reset_steps(monkeypatch):
    scores = []
    for garbage in (0.0, 1e6):
        rows, _ = train_on(Interrupted, monkeypatch, garbage, continuing=True)
        scores.append(torch.cat([returns for _, returns, _ in rows]))
    assert torch.equal(*scores) and len(scores[0]) == 3, "one mean for each row"
    assert (scores[0] > 0.9).all() and (scores[0] < 1.5).all(), "rewards are from 0 to 2"


def test_continuing_score_stays_when_all_environments_reset(monkeypatch):
    """With a row for each step, no reward may have come since the last row."""
    class Together(Interrupted):
        def step(self, action):
            obs, reward, terminated, _, info = super().step(action)
            self.t = getattr(self, "t", 0) + 1
            return obs, reward, terminated, np.full_like(terminated, self.t % 2 == 1), info

    rows, _ = train_on(Together, monkeypatch, 0.0, continuing=True, log_every=1)
    assert [len(returns) for _, returns, _ in rows] == [1, 0, 1]
    assert all(returns.isfinite().all() for _, returns, _ in rows)


def test_average_reward_moves_by_the_mean_error_of_valid_steps(monkeypatch):
    """With step size 1 and values 0, the first update sets it to the mean reward."""
    class Zero(actor_critic.Value):
        def forward(self, obs):
            return super().forward(obs) * 0

    monkeypatch.setattr(actor_critic, "Value", Zero)
    rows, _ = train_on(Interrupted, monkeypatch, 1e6, continuing=True, average_reward_rate=1.0,
                       log_every=1)
    torch.testing.assert_close(rows[0][1][0], rows[0][2]["average_reward"])


def test_returns_are_sums_of_the_rewards_of_an_episode(monkeypatch):
    """Also across rows of the log. A second run with the same actions gives all returns."""
    rows, _ = train_on(Garbage, monkeypatch, 0.0, num_envs=4, log_every=5, learning_rate=0.0)
    envs, totals, expected = Garbage("", 4, 0), np.zeros(4), []
    torch.manual_seed(1)
    model = actor_critic.ActorCritic(Garbage.single_observation_space, Discrete(2))
    obs, _ = envs.reset()
    for _ in range(15):
        with torch.no_grad():
            action = model.policy(torch.tensor(obs, dtype=torch.float32)).sample()
        obs, reward, terminated, truncated, _ = envs.step(action.numpy())
        totals += reward
        expected += totals[terminated | truncated].tolist()
        totals[terminated | truncated] = 0
    seen = torch.cat([returns for _, returns, _ in rows]).tolist()
    assert seen == pytest.approx(expected) and len(seen) > 5


def test_reset_only_step_changes_no_weights(monkeypatch):
    """Adam's momentum does not change them either; one environment shows this."""
    step, moves = torch.optim.Adam.step, []

    def watched(self, *args):
        moves.append(1)
        return step(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    monkeypatch.setattr(actor_critic, "Logger", FakeLogger(updates=3))
    actor_critic.train(actor_critic.Args(num_envs=1))
    logger = actor_critic.Logger
    steps, ends = sum(row[0] for row in logger.rows), sum(len(row[1]) for row in logger.rows)
    assert ends > 2 and len(moves) in (steps - ends, steps - ends + 1)  # the last may still reset


def test_each_network_has_its_own_learning_rate(monkeypatch):
    rates, step = [], torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam,
        "step",
        lambda adam: rates.append([(group["lr"], sum(p.numel() for p in group["params"]))
                                   for group in adam.param_groups]) or step(adam),
    )
    monkeypatch.setattr(actor_critic, "Logger", FakeLogger())
    policy, _ = actor_critic.train(
        actor_critic.Args(num_envs=4, log_every=1, learning_rate=0.1, value_learning_rate=0.2))
    sizes = [sum(p.numel() for p in policy.parameters()), 64 * 5 + 64 * 65 + 65]
    assert rates == [list(zip([0.1, 0.2], sizes))]


@pytest.mark.parametrize("continuing", [False, True])
def test_what_ends_an_episode(continuing):
    """Terminal states and time limits; in a continuing task only time limits."""

    class Ends(Stub):
        def step(self, action):
            ends = np.array([[True, False, False], [False, True, False]])
            return np.zeros((3, 1)), np.ones(3), *ends, {}

    action = torch.zeros(3, dtype=torch.long)
    step = actor_critic.step_envs(Ends(), torch.zeros(3, 1), action, torch.ones(3), continuing)
    assert step["terminated"].tolist() == [not continuing, False, False]
    assert step["done"].tolist() == [not continuing, True, False]


def test_a_time_limit_clears_the_trace():
    obs, action, reward = episode(1)
    no, yes = torch.tensor([False]), torch.tensor([True])
    learner = Learner(Linear([0.3, -0.2, 0.5], [0.1, 0.7, -0.4]), obs[0], 0.9, 0.8)
    learner.step(action[0], reward[0], obs[1], no, yes)
    learner.step(action[0], reward[0], obs[0], no, no)  # only resets
    assert not learner.z.any()


@pytest.mark.parametrize("exact_discount", [True, False])
def test_discount_factor_of_a_step_starts_at_one_in_each_episode(exact_discount, monkeypatch):
    """train() passes I = γ^t to learn(): 1 in the first step of each episode, then γ, γ², ..."""
    seen, learn = [], actor_critic.learn

    def watched(model, z, step, discount, *rest):
        seen.append((discount.clone(), step["valid"], step["done"]))
        return learn(model, z, step, discount, *rest)

    monkeypatch.setattr(actor_critic, "learn", watched)
    train_on(Garbage, monkeypatch, 0.0, num_envs=4, gamma=0.5, exact_discount=exact_discount)
    t, ends = torch.zeros(4), 0
    for discount, valid, done in seen:
        expected = 0.5**t if exact_discount else torch.ones(4)
        assert torch.equal(discount[valid], expected[valid])
        t = torch.where(done | ~valid, 0, t + 1)
        ends += int(done.sum())
    assert ends > 20


def test_what_train_keeps_from_one_step_to_the_next(monkeypatch):
    """In a continuing task: the traces and the average reward; γ is 1, so I stays 1."""
    calls, learn = [], actor_critic.learn

    def watched(model, z, step, discount, *rest):
        result = learn(model, z, step, discount, *rest)
        calls.append((z.clone(), discount.clone(), step["valid"].clone(), result))
        return result

    monkeypatch.setattr(actor_critic, "learn", watched)
    rows, _ = train_on(Interrupted, monkeypatch, 0.0, continuing=True, average_reward_rate=0.1,
                       log_every=1, gamma=0.5)
    average, traces = torch.zeros(()), torch.zeros_like(calls[0][0])
    for (z, discount, valid, (delta, new_traces, _)), (*_, metrics) in zip(calls, rows):
        assert torch.equal(discount, torch.ones(32)) and torch.equal(z, traces)
        traces = new_traces
        average = average + 0.1 * delta[valid].mean()
        torch.testing.assert_close(metrics["average_reward"], average)
        torch.testing.assert_close(metrics["squared_td_error"], (delta**2).mean())
    assert len(rows) == 3 and not valid.all() and traces.any()


def test_episodic_tasks_have_no_average_reward(monkeypatch):
    rows, _ = train_on(Garbage, monkeypatch, 0.0)
    assert all(row[2]["average_reward"] == 0 for row in rows)


def test_the_actor_learns_from_the_sampled_action(monkeypatch):
    """The clipped one has another log π."""
    seen, learn = [], actor_critic.learn
    monkeypatch.setattr(actor_critic, "learn", lambda model, z, step, *rest: (
        seen.append(step["action"]), learn(model, z, step, *rest))[1])
    monkeypatch.setattr(actor_critic, "Logger", FakeLogger())
    actor_critic.train(actor_critic.Args(env_id="scripted:Does-box-v0", num_envs=16))
    assert torch.cat(seen).abs().max() > 1


def test_the_logged_norm_is_that_of_the_update(monkeypatch):
    norms, learn = [], actor_critic.learn

    def watched(*args):
        result = learn(*args)
        norms.append(result[2].item())
        return result

    monkeypatch.setattr(actor_critic, "learn", watched)
    rows, _ = train_on(Garbage, monkeypatch, 0.0, log_every=1)
    assert [metrics["grad_norm"].item() for *_, metrics in rows] == norms
