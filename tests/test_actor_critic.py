"""Actor-critic: updates by hand, traces against GAE, batches against runs alone, continuing."""

import math

import pytest
import torch
from conftest import OneUpdate
from gymnasium.spaces import Discrete
from torch import nn

import actor_critic


class Linear(nn.Module):
    """v̂(s) = w·s and two actions with logits (θ·s, 0): small enough to differentiate by hand."""

    def __init__(self, theta, w, average_reward=0.0):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))
        self.average_reward = torch.tensor(average_reward, dtype=torch.float64)

    def value(self, obs):
        return obs @ self.w

    def forward(self, obs, action):
        logit = obs @ self.theta
        return nn.functional.logsigmoid(torch.where(action == 0, logit, -logit)), self.value(obs)


def stream_of(obs, num_params):
    stream = actor_critic.Stream(obs, num_params)
    stream.trace, stream.discount = stream.trace.double(), stream.discount.double()
    return stream


def column(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


@torch.no_grad()
def test_three_steps_by_hand():
    gamma, lam, alpha = 0.9, 0.7, 0.1
    model = Linear([0.5], [-0.3])
    optimizer = torch.optim.SGD(model.parameters(), lr=alpha)
    xs, actions, rewards = [1.0, 2.0, -1.0, 0.5], [0, 1, 0], [1.0, -2.0, 3.0]
    stream = stream_of(torch.tensor([[xs[0]]], dtype=torch.float64), 2)
    theta, w, z_theta, z_w, discount = 0.5, -0.3, 0.0, 0.0, 1.0
    for t in range(3):
        terminated = t == 2
        delta, _ = actor_critic.learn(
            model,
            stream,
            torch.tensor([actions[t]]),
            column(rewards[t]),
            column(xs[t + 1]).view(1, 1),
            torch.tensor([terminated]),
            torch.tensor([terminated]),
            gamma,
            lam,
        )
        optimizer.step()
        expected = rewards[t] + (0 if terminated else gamma * w * xs[t + 1]) - w * xs[t]
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
    assert not stream.trace.any(), "the trace outlives its episode"
    assert stream.discount.item() == 1 and not stream.valid.item()


def episode(length, num_envs=1, size=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    obs = torch.randn(length + 1, num_envs, size, generator=generator, dtype=torch.float64)
    action = torch.randint(2, (length, num_envs), generator=generator)
    reward = torch.randn(length, num_envs, generator=generator, dtype=torch.float64)
    return obs, action, reward


@torch.no_grad()
def play(model, obs, action, reward, terminated, done, gamma, lam, **switch):
    """Sum of the updates of a recorded stretch with frozen parameters, (P,): θ, then w."""
    stream, total = stream_of(obs[0], 6), 0
    for t in range(len(action)):
        actor_critic.learn(
            model,
            stream,
            action[t],
            reward[t],
            obs[t + 1],
            terminated[t],
            done[t],
            gamma,
            lam,
            **switch,
        )
        total = total - torch.cat([model.theta.grad, model.w.grad])
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
    advantage = script.returns_to_go(reward, 0.9) - value.detach()
    weight = advantage * script.discounts(6, 0.9, None)
    loss = script.policy_gradient_loss(logprob, weight, torch.ones_like(reward))
    torch.testing.assert_close(total[:3], -torch.autograd.grad(loss, model.theta)[0])


@torch.no_grad()
def test_a_batch_of_environments_is_as_many_runs_alone():
    """Episodes end at different steps, and reset-only steps after them are full of garbage."""
    obs, action, reward = episode(8, num_envs=4, seed=3)
    terminated, truncated = torch.zeros(8, 4, dtype=torch.bool), torch.zeros(8, 4, dtype=torch.bool)
    terminated[2, 0] = truncated[4, 1] = terminated[6, 3] = True
    done = terminated | truncated
    reward[3, 0], reward[5, 1], reward[7, 3] = 1e6, 1e6, 1e6
    model = Linear([0.3, -0.2, 0.5], [0.1, 0.7, -0.4])
    alone, everyone = [], stream_of(obs[0], 6)
    singles = [stream_of(obs[0, n : n + 1], 6) for n in range(4)]
    for t in range(8):
        valid = everyone.valid.clone()
        actor_critic.learn(
            model, everyone, action[t], reward[t], obs[t + 1], terminated[t], done[t], 0.9, 0.8
        )
        together = torch.cat([model.theta.grad, model.w.grad])
        alone = []
        for n, single in enumerate(singles):
            part = slice(n, n + 1)
            actor_critic.learn(
                model,
                single,
                action[t, part],
                reward[t, part],
                obs[t + 1, part],
                terminated[t, part],
                done[t, part],
                0.9,
                0.8,
            )
            alone.append(torch.cat([model.theta.grad, model.w.grad]))
            torch.testing.assert_close(single.trace[0], everyone.trace[n])
        torch.testing.assert_close(together, sum(alone) / valid.sum())
        assert together.abs().max() < 1e3


def test_per_environment_gradients_are_those_of_autograd():
    model = actor_critic.ActorCritic(3, Discrete(2))
    obs, action, discount = (
        torch.randn(4, 3),
        torch.tensor([0, 1, 1, 0]),
        torch.tensor([1.0, 0.5, 0.0, 2.0]),
    )
    rows = actor_critic.per_env_gradient(model, obs, action, discount)
    for n in range(4):
        logprob, value = model(obs[n], action[n])
        grads = torch.autograd.grad(discount[n] * logprob + value, list(model.parameters()))
        torch.testing.assert_close(rows[n], torch.cat([g.flatten() for g in grads]))


def test_apply_update_ascends():
    model = Linear([1.0], [2.0])
    actor_critic.apply_update(model, column(0.5, -0.25))
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert model.theta.item() == 1.5 and model.w.item() == 1.75


class Ring:
    """Stands in for Envs: three states in a ring; action 1 moves on, action 0 stays.

    Arriving in state 2 is terminal three times in ten; the next step then resets to state 0. A
    continuing task must take both for ordinary moves.
    """

    obs_size, action_space, threshold = 3, Discrete(2), None
    stay = torch.tensor([0.0, 1.0, 0.0])
    move = torch.tensor([1.0, 0.0, 3.0])

    def __init__(self, env_id, num_envs, device):
        self.state, self.over = torch.arange(num_envs) % 3, torch.zeros(num_envs, dtype=torch.bool)

    def observe(self):
        return torch.eye(3)[self.state]

    def reset(self, seed):
        return self.observe()

    def step(self, action):
        reward = torch.where(action == 1, self.move[self.state], self.stay[self.state])
        arrived = (self.state + action) % 3
        ends = (arrived == 2) & (
            torch.rand(len(action)) < 0.3
        )  # in state 2: the next step resets to 0
        reward = torch.where(self.over, 0.0, reward)
        self.state = torch.where(self.over, 0, arrived)
        ends = ends & ~self.over
        self.over = ends
        return self.observe(), reward, ends, torch.zeros_like(ends)


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
    system = (torch.eye(3, dtype=torch.float64) - chain)[:, 1:]  # v(0) = 0: its column falls away
    value = torch.linalg.lstsq(system, (gain - mean).unsqueeze(-1)).solution.squeeze(-1)
    return mean, torch.cat([column(0.0), value])


def test_continuing_finds_mean_reward_and_differential_values(one_update, monkeypatch):
    one_update.updates = 60
    monkeypatch.setattr(actor_critic, "Envs", Ring)
    monkeypatch.setattr(actor_critic, "Run", one_update)
    zero_head = actor_critic.Policy.__init__

    def uniform(policy, *args):
        zero_head(policy, *args)
        nn.init.zeros_(policy.net[-1].weight)

    monkeypatch.setattr(actor_critic.Policy, "__init__", uniform)
    actor_critic.train(
        actor_critic.Args(
            continuing=True,
            average_reward_rate=0.01,
            learning_rate=0.0,
            trace_lambda=0.0,
            num_envs=128,
            total_timesteps=128 * 32 * 60,
        )
    )
    model = one_update.parts["model"]
    mean, value = ring_solution()
    assert model.average_reward.item() == pytest.approx(mean.item(), abs=0.02)
    learned = model.value(torch.eye(3)).detach()
    torch.testing.assert_close((learned - learned[0]).double(), value, atol=0.12, rtol=0)


@pytest.mark.parametrize("exact_discount", [True, False])
def test_two_episodes_in_a_row_are_two_episodes(exact_discount):
    """The reset-only step between them leaves nothing behind: no trace, no discount, no δ."""
    obs, action, reward = episode(9)
    model = Linear([0.3, -0.2, 0.5], [0.1, 0.7, -0.4])
    done = torch.zeros(9, 1, dtype=torch.bool)
    done[3] = done[8] = True  # so step 4 is the reset-only one
    switch = {"exact_discount": exact_discount}
    whole = play(model, obs, action, reward, done, done, 0.9, 0.8, **switch)
    first = play(model, obs[:5], action[:4], reward[:4], done[:4], done[:4], 0.9, 0.8, **switch)
    second = play(model, obs[5:], action[5:], reward[5:], done[5:], done[5:], 0.9, 0.8, **switch)
    torch.testing.assert_close(whole, first + second)


@torch.no_grad()
def test_a_reset_only_step_has_no_error():
    obs, action, reward = episode(2)
    model, ended = Linear([0.3, -0.2, 0.5], [0.1, 0.7, -0.4]), torch.tensor([True])
    stream = stream_of(obs[0], 6)
    actor_critic.learn(model, stream, action[0], reward[0], obs[1], ended, ended, 0.9, 0.8)
    delta, norm = actor_critic.learn(
        model, stream, action[1], reward[1], obs[2], ~ended, ~ended, 0.9, 0.8
    )
    assert delta.item() == 0 and norm.item() == 0


def test_step_sizes_fall_linearly(monkeypatch):
    run = OneUpdate(updates=3)
    monkeypatch.setattr(actor_critic, "Run", run)
    rates, step = [], torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam,
        "step",
        lambda adam: rates.append([group["lr"] for group in adam.param_groups]) or step(adam),
    )
    actor_critic.train(
        actor_critic.Args(num_envs=4, log_every=1, total_timesteps=16, learning_rate=0.1)
    )
    assert rates == [[0.1, 3e-3], [0.1 * 0.75, 3e-3 * 0.75], [0.1 * 0.5, 3e-3 * 0.5]]


class Garbage:
    """Stands in for Envs: short episodes; what a reset-only step rewards is up to the test."""

    obs_size, action_space, threshold, garbage = 1, Discrete(2), None, 0.0

    def __init__(self, env_id, num_envs, device):
        self.generator = torch.Generator().manual_seed(0)
        self.num_envs, self.over = num_envs, torch.zeros(num_envs, dtype=torch.bool)

    def random(self):
        return torch.rand(self.num_envs, generator=self.generator)

    def reset(self, seed):
        return self.random().unsqueeze(-1)

    def step(self, action):
        reward = torch.where(self.over, self.garbage, self.random() + action)
        terminated, truncated = self.random() < 0.2, self.random() < 0.2
        terminated, truncated = terminated & ~self.over, truncated & ~self.over
        self.over = terminated | truncated
        return self.random().unsqueeze(-1), reward, terminated, truncated


def test_reset_only_steps_change_nothing(monkeypatch):
    weights = []
    monkeypatch.setattr(actor_critic, "Envs", Garbage)
    for garbage in (0.0, 1e6):
        monkeypatch.setattr(Garbage, "garbage", garbage)
        run = OneUpdate(updates=3)
        monkeypatch.setattr(actor_critic, "Run", run)
        actor_critic.train(actor_critic.Args(num_envs=32, total_timesteps=10_000))
        weights.append(torch.cat([p.flatten() for p in run.parts["model"].parameters()]))
    assert torch.equal(*weights)


class Interrupted(Garbage):
    """The same of a continuing task, which only time limits interrupt."""

    def step(self, action):
        obs, reward, terminated, truncated = super().step(action)
        return obs, reward, torch.zeros_like(terminated), terminated | truncated


def test_the_score_of_a_continuing_task_counts_no_reset(monkeypatch):
    scores = []
    monkeypatch.setattr(actor_critic, "Envs", Interrupted)
    for garbage in (0.0, 1e6):
        monkeypatch.setattr(Garbage, "garbage", garbage)
        run = OneUpdate(updates=3)
        monkeypatch.setattr(actor_critic, "Run", run)
        args = actor_critic.Args(num_envs=32, total_timesteps=10_000, continuing=True)
        actor_critic.train(args)
        scores.append(torch.cat([returns for _, returns, _ in run.rows]))
    assert torch.equal(*scores) and len(scores[0]) == 3
    assert (scores[0] > 0.9).all() and (scores[0] < 1.5).all(), "rewards are from 0 to 2"


def test_a_step_that_only_resets_moves_no_weights(monkeypatch):
    """Not by Adam's momentum either, which is what a lone environment would show."""
    step, moves, run = torch.optim.Adam.step, [], OneUpdate(updates=3)

    def watched(self, *args):
        moves.append(1)
        return step(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    monkeypatch.setattr(actor_critic, "Run", run)
    actor_critic.train(actor_critic.Args(num_envs=1, total_timesteps=10_000))
    steps, ends = sum(row[0] for row in run.rows), sum(len(row[1]) for row in run.rows)
    assert ends > 2 and len(moves) in (steps - ends, steps - ends + 1)  # the last may still reset


def test_episode_returns_across_batches():
    reward = torch.tensor([[1.0, 1.0], [2.0, 1.0], [0.0, 1.0], [4.0, 1.0]])
    done = torch.tensor([[False, False], [True, False], [False, False], [False, True]])
    sums, running = actor_critic.running_sums(reward, done, torch.tensor([10.0, 0.0]), 1.0)
    finished = sums[done]
    assert finished.tolist() == [13.0, 4.0] and running.tolist() == [4.0, 0.0]
