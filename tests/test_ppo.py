"""PPO: advantages, the clipped loss, minibatches, and what reset-only steps must not do."""

import pytest
import torch
from conftest import OneUpdate
from gymnasium.spaces import Discrete
from torch import nn

import ppo


@pytest.mark.parametrize("seed", range(20))
def test_gae_is_the_double_sum(seed):
    generator = torch.Generator().manual_seed(seed)
    steps, num_envs, gamma, lam = 12, 3, 0.9, 0.7
    reward = torch.randn(steps, num_envs, generator=generator, dtype=torch.float64)
    value = torch.randn(steps + 1, num_envs, generator=generator, dtype=torch.float64)
    terminated = torch.rand(steps, num_envs, generator=generator) < 0.2
    done = terminated | (torch.rand(steps, num_envs, generator=generator) < 0.2)
    inputs = [tensor.clone() for tensor in (reward, value, terminated, done)]
    advantage = ppo.gae(reward, value, terminated, done, gamma, lam)
    for n in range(num_envs):
        for t in range(steps):
            expected, weight = 0.0, 1.0
            for k in range(t, steps):
                bootstrap = 0.0 if terminated[k, n] else gamma * value[k + 1, n]
                expected += weight * (reward[k, n] + bootstrap - value[k, n])
                weight *= gamma * lam
                if done[k, n]:
                    break
            assert advantage[t, n].item() == pytest.approx(float(expected), abs=1e-12)
    for before, after in zip(inputs, (reward, value, terminated, done)):
        assert torch.equal(before, after), "an input was written to"


@pytest.mark.parametrize(
    "advantage, ratio, slope",
    [
        (1.0, 1.5, 0.0),
        (-1.0, 0.5, 0.0),  # gone far enough where Â asks for it
        (1.0, 0.5, 1.0),
        (-1.0, 1.5, 1.0),
        (1.0, 1.1, 1.0),
        (-1.0, 0.9, 1.0),
    ],
)
def test_clip_regions(advantage, ratio, slope):
    old = torch.tensor([-1.0], dtype=torch.float64)
    logprob = (old + torch.tensor([ratio], dtype=torch.float64).log()).requires_grad_()
    ppo.ppo_loss(logprob, old, torch.tensor([advantage], dtype=torch.float64), 0.2).backward()
    assert logprob.grad.item() == pytest.approx(-slope * ratio * advantage)


def test_at_ratio_one_the_gradient_is_the_policy_gradient():
    logprob = torch.randn(50, dtype=torch.float64, requires_grad=True)
    advantage = torch.randn(50, dtype=torch.float64)
    ppo.ppo_loss(logprob, logprob.detach(), advantage, 0.2).backward()
    torch.testing.assert_close(logprob.grad, -advantage / 50)


@pytest.mark.parametrize("num_rows", [2, 3, 5, 64, 65, 97])
@pytest.mark.parametrize("parts", [1, 4, 32])
def test_each_row_once_an_epoch_and_none_alone(num_rows, parts):
    drawn = list(ppo.minibatches(num_rows, 3, parts))
    assert all(len(rows) >= 2 for rows in drawn)
    per_epoch = len(drawn) // 3
    epochs = [torch.cat(drawn[i * per_epoch : (i + 1) * per_epoch]) for i in range(3)]
    for rows in epochs:
        assert sorted(rows.tolist()) == list(range(num_rows))
    assert num_rows < 10 or not torch.equal(epochs[0], epochs[1]), "the order must change"


def test_policy_change_measures_what_it_says():
    old, new = torch.zeros(4), torch.tensor([0.0, 0.1, 0.5, -0.5])
    kl, clipped = ppo.policy_change(new, old, 0.2)
    assert kl.item() == pytest.approx((new.exp() - 1 - new).mean().item())
    assert clipped.item() == 0.5


def make_batch(rows=64, scale=1.0):
    torch.manual_seed(0)
    policy, value = ppo.Policy(3, Discrete(2)), ppo.Value(3)
    obs, action = torch.randn(rows, 3), torch.randint(2, (rows,))
    batch = ppo.Batch(
        obs, action, policy(obs, action)[0].detach(), torch.randn(rows), torch.randn(rows) * scale
    )
    optimizer = torch.optim.Adam([*policy.parameters(), *value.parameters()], lr=0.01)
    return policy, value, optimizer, batch


def test_first_step_of_an_update():
    """One minibatch, one epoch: ratio 1, and all of (9) with the signs it should have."""
    policy, value, optimizer, batch = make_batch()
    args = ppo.Args(
        num_minibatches=1, update_epochs=1, ent_coef=0.1, vf_coef=0.3, max_grad_norm=1e9
    )
    report = ppo.update(policy, value, optimizer, batch, 0.2, args)
    assert report["approx_kl"] < 1e-9 and report["clip_fraction"] == 0
    policy, value, _, _ = make_batch()
    probs = policy.net(batch.obs).log_softmax(-1)
    advantage = (batch.advantage - batch.advantage.mean()) / batch.advantage.std()
    chosen = probs[torch.arange(64), batch.action]
    entropy = -(probs.exp() * probs).sum(-1).mean()
    loss = (
        -(advantage * chosen).mean()
        + 0.3 * (value(batch.obs) - batch.target).pow(2).mean()
        - 0.1 * entropy
    )
    params = [*policy.parameters(), *value.parameters()]
    for expected, param in zip(
        torch.autograd.grad(loss, params), optimizer.param_groups[0]["params"]
    ):
        torch.testing.assert_close(param.grad, expected, atol=1e-6, rtol=1e-4)


def test_gradient_is_clipped_as_one():
    policy, value, optimizer, batch = make_batch(scale=1e6)
    ppo.update(
        policy,
        value,
        optimizer,
        batch,
        0.2,
        ppo.Args(num_minibatches=1, update_epochs=1, max_grad_norm=0.5),
    )
    grads = torch.cat([p.grad.flatten() for p in optimizer.param_groups[0]["params"]])
    assert grads.norm().item() == pytest.approx(0.5, rel=1e-4)


def test_gradients_do_not_add_up_over_minibatches():
    """At learning rate 0 the last of five steps has the gradient of the first."""
    grads = []
    for epochs in (1, 5):
        policy, value, optimizer, batch = make_batch()
        optimizer.param_groups[0]["lr"] = 0.0
        args = ppo.Args(num_minibatches=1, update_epochs=epochs, max_grad_norm=1e9)
        ppo.update(policy, value, optimizer, batch, 0.2, args)
        grads.append(torch.cat([p.grad.flatten() for p in optimizer.param_groups[0]["params"]]))
    torch.testing.assert_close(*grads)


def test_target_kl_ends_an_update_before_the_step():
    policy, value, optimizer, batch = make_batch()
    taken, step = [], optimizer.step
    optimizer.step = lambda: (taken.append(1), step())
    args = ppo.Args(num_minibatches=1, update_epochs=50, target_kl=1e-9)
    ppo.update(policy, value, optimizer, batch, 0.2, args)
    assert len(taken) == 1, "the first step has KL 0, the second must not be taken"
    ppo.update(policy, value, optimizer, batch, 0.2, ppo.Args(num_minibatches=1, update_epochs=50))
    assert len(taken) == 51


@pytest.mark.parametrize("anneal", [True, False])
def test_schedules_fall_linearly(anneal, monkeypatch):
    run, clips, update = OneUpdate(updates=3), [], ppo.update
    monkeypatch.setattr(ppo, "Run", run)
    monkeypatch.setattr(ppo, "update", lambda *args: clips.append(args[4]) or update(*args))
    flags = {"num_envs": 4, "num_steps": 4, "num_minibatches": 2, "total_timesteps": 64}
    ppo.train(ppo.Args(**flags, learning_rate=0.1, anneal_lr=anneal, anneal_clip=anneal))
    left = [1, 0.75, 0.5] if anneal else [1, 1, 1]
    assert [means["learning_rate"] for *_, means in run.rows] == [0.1 * share for share in left]
    assert clips == [0.2 * share for share in left]
    assert run.parts["optimizer"].param_groups[0]["lr"] == 0.1 * left[-1]


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


@pytest.mark.parametrize("name", ["ppo", "actor_critic"])
def test_reset_only_steps_change_nothing(name, one_update, monkeypatch):
    import importlib

    script, weights = importlib.import_module(name), []
    monkeypatch.setattr(script, "Envs", Garbage)
    for garbage in (0.0, 1e6):
        monkeypatch.setattr(Garbage, "garbage", garbage)
        run = type(one_update)(updates=3)
        monkeypatch.setattr(script, "Run", run)
        script.train(script.Args(num_envs=32, total_timesteps=10_000))
        modules = [part for part in run.parts.values() if isinstance(part, nn.Module)]
        weights.append(torch.cat([p.flatten() for module in modules for p in module.parameters()]))
    assert torch.equal(*weights)


@pytest.mark.parametrize("script_name", ["ppo", "actor_critic"])
def test_episode_returns_across_batches(script_name):
    import importlib

    script = importlib.import_module(script_name)
    reward = torch.tensor([[1.0, 1.0], [2.0, 1.0], [0.0, 1.0], [4.0, 1.0]])
    done = torch.tensor([[False, False], [True, False], [False, False], [False, True]])
    finished, running = script.episode_returns(reward, done, torch.tensor([10.0, 0.0]))
    assert finished.tolist() == [13.0, 4.0] and running.tolist() == [4.0, 0.0]
