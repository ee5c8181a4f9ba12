"""ppo.py: advantages, the clipped loss, distributions, networks and the update."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import FakeLogger
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete

import ppo

DISCRETE = Discrete(2)


def make_agent(obs_shape=(3,), action_space=DISCRETE, **flags):
    return ppo.Agent(obs_shape, action_space, ppo.Args(**{"norm_obs": False} | flags))


@pytest.mark.parametrize("seed", range(20))
def test_gae_is_the_double_sum(seed):
    generator = torch.Generator().manual_seed(seed)
    steps, num_envs, gamma, lam = 12, 3, 0.9, 0.7
    reward = torch.randn(steps, num_envs, generator=generator, dtype=torch.float64)
    value = torch.randn(steps + 1, num_envs, generator=generator, dtype=torch.float64)
    terminated = torch.rand(steps, num_envs, generator=generator) < 0.2
    truncated = torch.rand(steps, num_envs, generator=generator) < 0.2
    tensors = (reward, value[:-1], value[1:], terminated, truncated)
    inputs = [tensor.clone() for tensor in tensors]
    advantage = ppo.gae(*tensors, gamma, lam)
    for n in range(num_envs):
        for t in range(steps):
            expected, weight = 0.0, 1.0
            for k in range(t, steps):
                bootstrap = 0.0 if terminated[k, n] else gamma * value[k + 1, n]
                expected += weight * (reward[k, n] + bootstrap - value[k, n])
                weight *= gamma * lam
                if terminated[k, n] or truncated[k, n]:
                    break
            assert advantage[t, n].item() == pytest.approx(float(expected), abs=1e-12)
    for before, after in zip(inputs, tensors):
        assert torch.equal(before, after), "an input was changed in place"


@pytest.mark.parametrize(
    "advantage, ratio, slope",
    [
        (1.0, 1.5, 0.0),
        (-1.0, 0.5, 0.0),  # already beyond the clip in the direction of the advantage
        (1.0, 0.5, 1.0),
        (-1.0, 1.5, 1.0),
        (1.0, 1.1, 1.0),
        (-1.0, 0.9, 1.0),
    ],
)
def test_gradient_in_each_region_of_the_clip(advantage, ratio, slope):
    old = torch.tensor([-1.0], dtype=torch.float64)
    logprob = (old + torch.tensor([ratio], dtype=torch.float64).log()).requires_grad_()
    advantages = torch.tensor([advantage], dtype=torch.float64)
    ppo.ppo_loss(logprob, old, advantages, 0.2).backward()
    assert logprob.grad.item() == pytest.approx(-slope * ratio * advantage)


def test_at_ratio_one_the_gradient_is_the_policy_gradient():
    logprob = torch.randn(50, dtype=torch.float64, requires_grad=True)
    advantage = torch.randn(50, dtype=torch.float64)
    ppo.ppo_loss(logprob, logprob.detach(), advantage, 0.2).backward()
    torch.testing.assert_close(logprob.grad, -advantage / 50)


def test_running_sums_continue_across_batches():
    reward = torch.tensor([[1.0, 1.0], [2.0, 1.0], [0.0, 1.0], [4.0, 1.0]])
    done = torch.tensor([[False, False], [True, False], [False, False], [False, True]])
    last_sum = torch.tensor([10.0, 0.0])
    sums, last = ppo.running_sums(reward, done, last_sum, 1.0)
    assert sums[done].tolist() == [13.0, 4.0] and last.tolist() == [4.0, 0.0]
    sums, last = ppo.running_sums(reward, done, last_sum, 0.5)
    assert sums[:, 0].tolist() == [6.0, 5.0, 0.0, 4.0] and last.tolist() == [4.0, 0.0]
    assert sums[:, 1].tolist() == [1.0, 1.5, 1.75, 1.875]
    assert last_sum.tolist() == [10.0, 0.0], "an input was changed in place"


# Distributions


SPACES = [(Discrete(4), [4]), (MultiDiscrete([2, 5, 3]), [2, 5, 3]), (MultiBinary(2), [2, 2])]


@pytest.mark.parametrize("space, choices", SPACES)
def test_categorical_actions_by_enumeration(space, choices):
    """Probabilities of all actions sum to 1, give the entropy, and are the sample frequencies."""
    torch.manual_seed(0)
    agent, obs = make_agent(action_space=space), torch.randn(1, 3)
    torch.nn.init.orthogonal_(agent.actor[-1].weight, 1.0)
    actions = torch.tensor(list(itertools.product(*map(range, choices))))
    with torch.no_grad():
        pi, _ = agent(obs.expand(len(actions), 3))
        logprob = pi.log_prob(actions)
        assert logprob.exp().sum().item() == pytest.approx(1, abs=1e-6)
        entropy = -(logprob.exp() * logprob).sum()
        torch.testing.assert_close(pi.entropy(), entropy.expand(len(actions)))
        assert torch.equal(pi.mode[0], actions[logprob.argmax()])
        drawn = agent(obs.expand(200_000, 3))[0].sample()
    share = (drawn.unsqueeze(1) == actions).all(-1).float().mean(0)
    torch.testing.assert_close(share, logprob.exp(), atol=0.01, rtol=0)


def test_gaussian_actions():
    agent, obs = make_agent(action_space=Box(-1, 1, (2,))), torch.randn(5, 3)
    with torch.no_grad():
        agent.log_std.copy_(torch.tensor([-1.0, 0.3]))
        pi, value = agent(obs)
        normal = torch.distributions.Normal(agent.actor(obs), agent.log_std.exp())
        action = torch.randn(5, 2)
        torch.testing.assert_close(pi.log_prob(action), normal.log_prob(action).sum(-1))
        torch.testing.assert_close(pi.entropy(), normal.entropy().sum(-1))
        torch.testing.assert_close(pi.mode, normal.mean)
        assert value.shape == (5,)
        drawn = agent(obs[:1].expand(100_000, 3))[0].sample()
    torch.testing.assert_close(drawn.mean(0), normal.mean[0], atol=0.02, rtol=0)
    torch.testing.assert_close(drawn.std(0), agent.log_std.exp(), atol=0.02, rtol=0)


def test_networks_start_orthogonal():
    """[C7]: gain √2, 0.01 and 1 for the outputs, biases 0; the CNN likewise."""
    for shape in [(5,), (4, 84, 84)]:
        for name, param in make_agent(shape, Discrete(3)).named_parameters():
            if name.endswith("bias"):
                assert not param.any()
                continue
            last = name.split(".")[0] in ("actor", "critic") and len(param) in (1, 3)
            gain = (0.01 if name.startswith("actor") else 1.0) if last else 2**0.5
            weight = param.flatten(1)
            square = weight @ weight.T if len(weight) <= weight.shape[1] else weight.T @ weight
            torch.testing.assert_close(square, gain**2 * torch.eye(len(square)), atol=1e-4, rtol=0)
    assert make_agent(action_space=Box(-1, 1, (2,)), log_std=-1.5).log_std.tolist() == [-1.5, -1.5]


def test_pixels_are_scaled_to_one():
    agent = make_agent((4, 84, 84), Discrete(3))
    image = torch.randint(256, (5, 4, 84, 84), dtype=torch.uint8)
    expected = agent.critic(agent.cnn(image.float() / 255)).squeeze(-1)
    torch.testing.assert_close(agent(image)[1], expected)


def test_the_network_for_images_by_hand():
    agent = make_agent((4, 84, 84))
    image = torch.randint(256, (5, 4, 84, 84), dtype=torch.uint8)
    weights = [param for name, param in agent.named_parameters() if name.startswith("cnn")]
    x = image / 255
    for stride, weight, bias in zip((4, 2, 1), weights[0:6:2], weights[1:6:2]):
        x = F.relu(F.conv2d(x, weight, bias, stride))
    x = F.relu(F.linear(x.flatten(1), *weights[6:]))
    pi, value = agent(image)
    torch.testing.assert_close(value, F.linear(x, agent.critic.weight, agent.critic.bias)[:, 0])
    logits = F.linear(x, agent.actor.weight, agent.actor.bias)
    torch.testing.assert_close(pi.parts[0].probs, logits.softmax(-1))
    for output in (value, logits):  # both train the layers that they share
        grads = torch.autograd.grad(output.sum(), weights, retain_graph=True)
        assert all(grad.abs().max() > 0 for grad in grads)


# The update


def make_batch(rows=64, scale=1.0):
    torch.manual_seed(0)
    agent = make_agent()
    obs, action = torch.randn(rows, 3), torch.randint(2, (rows, 1))
    batch = {"obs": obs, "action": action, "logprob": agent(obs)[0].log_prob(action).detach(),
             "advantage": torch.randn(rows), "target": torch.randn(rows) * scale}
    return agent, torch.optim.Adam(agent.parameters(), lr=0.01), batch


def run_update(agent, optimizer, batch, **flags):
    flags = {"num_minibatches": 1, "update_epochs": 1, "ent_coef": 0.0, "clip_coef": 0.2} | flags
    return ppo.update(agent, optimizer, batch, ppo.Args(**flags))


def gradient(agent):
    return torch.cat([param.grad.flatten() for param in agent.parameters()])


def test_first_step_of_an_update():
    """One minibatch, one epoch: ratio 1, and each term of (9) with its sign."""
    agent, optimizer, batch = make_batch()
    metrics = run_update(agent, optimizer, batch, ent_coef=0.1, vf_coef=0.3, max_grad_norm=1e9)
    assert metrics["approx_kl"] < 1e-9 and metrics["clip_fraction"] == 0
    twin, _, _ = make_batch()
    logprobs = twin.actor(batch["obs"]).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1).mean()
    loss = (
        -(batch["advantage"] * logprobs.gather(-1, batch["action"]).squeeze(-1)).mean()
        + 0.3 * (twin.critic(batch["obs"]).squeeze(-1) - batch["target"]).pow(2).mean()
        - 0.1 * entropy
    )
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(twin.parameters()))])
    torch.testing.assert_close(gradient(agent), expected, atol=1e-6, rtol=1e-4)
    assert metrics["entropy"] == pytest.approx(entropy.item(), rel=1e-5)


def test_metrics_of_a_changed_policy():
    agent, optimizer, batch = make_batch(4)
    old = batch["logprob"] - torch.tensor([0.0, 0.1, 0.5, -0.5])
    metrics = run_update(agent, optimizer, batch | {"logprob": old})
    log_ratio = torch.tensor([0.0, 0.1, 0.5, -0.5])
    expected = (log_ratio.exp() - 1 - log_ratio).mean()
    assert metrics["approx_kl"] == pytest.approx(expected.item(), abs=1e-6, rel=1e-4)
    assert metrics["clip_fraction"] == 0.5


def test_the_gradient_is_clipped_by_its_norm():
    agent, optimizer, batch = make_batch(scale=1e6)
    metrics = run_update(agent, optimizer, batch, max_grad_norm=0.5)
    assert gradient(agent).norm().item() == pytest.approx(0.5, rel=1e-4)
    assert metrics["grad_norm"] > 100, "the norm in the log is that before clipping"


def test_gradients_of_minibatches_are_not_summed():
    """With learning rate 0 the last of five steps has the gradient of the first."""
    grads = []
    for epochs in (1, 5):
        agent, optimizer, batch = make_batch()
        optimizer.param_groups[0]["lr"] = 0.0
        run_update(agent, optimizer, batch, update_epochs=epochs, max_grad_norm=1e9)
        grads.append(gradient(agent))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("rows", [64, 65, 97])
def test_every_epoch_uses_each_row_once_in_a_new_order(rows, monkeypatch):
    agent, optimizer, batch = make_batch(rows)
    batch["obs"] = torch.arange(rows).unsqueeze(1).expand(rows, 3).float()
    seen, forward = [], agent.forward
    monkeypatch.setattr(agent, "forward", lambda obs: seen.append(obs[:, 0]) or forward(obs))
    run_update(agent, optimizer, batch, num_minibatches=4, update_epochs=3)
    assert len(seen) == 12
    epochs = [torch.cat(seen[i : i + 4]) for i in (0, 4, 8)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(rows))
    assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[1], epochs[2])


def test_target_kl_stops_an_update_before_the_step():
    agent, optimizer, batch = make_batch()
    taken, step = [], optimizer.step
    optimizer.step = lambda: (taken.append(1), step())
    run_update(agent, optimizer, batch, update_epochs=50, target_kl=1e-9)
    assert len(taken) == 1, "the first step has KL 0, the second must not be taken"
    run_update(agent, optimizer, batch, update_epochs=50)
    assert len(taken) == 51


@pytest.mark.parametrize("times, steps", [(1.6, 0), (1.4, 1)])
def test_an_update_stops_beyond_one_and_a_half_times_the_target(times, steps):
    agent, optimizer, batch = make_batch(4)
    log_ratio = torch.tensor([0.0, 0.1, 0.5, -0.5])
    kl = (log_ratio.exp() - 1 - log_ratio).mean().item()
    taken, step = [], optimizer.step
    optimizer.step = lambda: (taken.append(1), step())
    run_update(agent, optimizer, batch | {"logprob": batch["logprob"] - log_ratio},
               target_kl=kl / times)
    assert len(taken) == steps


def test_a_gradient_that_is_not_finite_stops_before_the_step():
    agent, optimizer, batch = make_batch()
    before = [param.clone() for param in agent.parameters()]
    batch["target"][0] = torch.inf
    with pytest.raises(RuntimeError, match="non-finite"):
        run_update(agent, optimizer, batch)
    for old, new in zip(before, agent.parameters()):
        assert torch.equal(old, new)


@pytest.mark.parametrize("anneal", [True, False])
def test_the_learning_rate_decays_linearly(anneal, monkeypatch):
    log = FakeLogger(updates=3)
    monkeypatch.setattr(ppo, "Logger", log)
    flags = {"num_envs": 4, "num_steps": 4, "num_minibatches": 2, "total_timesteps": 64}
    ppo.train(ppo.Args(**flags, learning_rate=0.1, anneal_lr=anneal))
    rates = [0.1, 0.075, 0.05] if anneal else [0.1] * 3
    logged = [metrics["learning_rate"].item() for *_, metrics in log.rows]
    assert logged == pytest.approx(rates)
    group = log.parts["optimizer"].param_groups[0]
    assert group["lr"] == pytest.approx(rates[-1]) and group["eps"] == 1e-5


# Further cases


def test_a_too_large_kl_ends_the_whole_update(monkeypatch):
    """Only the first of four minibatches exceeds the target; the others are not used either."""
    agent, optimizer, batch = make_batch(4)
    log_ratio = torch.tensor([1.0, 0.0, 0.0, 0.0])
    monkeypatch.setattr(torch, "randperm", lambda *args, **kwargs: torch.arange(4))
    taken, step = [], optimizer.step
    optimizer.step = lambda: (taken.append(1), step())
    run_update(agent, optimizer, batch | {"logprob": batch["logprob"] - log_ratio},
               num_minibatches=4, target_kl=0.1)
    assert not taken


def test_the_policy_trains_the_cnn():
    agent = make_agent((4, 84, 84))
    pi, _ = agent(torch.randint(256, (5, 4, 84, 84), dtype=torch.uint8))
    pi.log_prob(torch.zeros(5, 1, dtype=torch.long)).sum().backward()
    assert all(param.grad is not None and param.grad.any() for param in agent.cnn.parameters())
