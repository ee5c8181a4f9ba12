"""PPO: advantages, the clipped loss, minibatches, and what reset-only steps must not do."""

import pytest
import torch
from conftest import OneUpdate

import ppo


@pytest.mark.parametrize("seed", range(20))
def test_gae_is_the_double_sum(seed):
    generator = torch.Generator().manual_seed(seed)
    steps, num_envs, gamma, lam = 12, 3, 0.9, 0.7
    reward = torch.randn(steps, num_envs, generator=generator, dtype=torch.float64)
    value = torch.randn(steps + 1, num_envs, generator=generator, dtype=torch.float64)
    terminated = torch.rand(steps, num_envs, generator=generator) < 0.2
    done = terminated | (torch.rand(steps, num_envs, generator=generator) < 0.2)
    tensors = (reward, value[:-1], value[1:], terminated, done)
    inputs = [tensor.clone() for tensor in tensors]
    advantage = ppo.gae(*tensors, gamma, lam)
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
    for before, after in zip(inputs, tensors):
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
    agent = ppo.Agent((3,), [2], 1)
    obs, action = torch.randn(rows, 3), torch.randint(2, (rows, 1))
    logprob, _, value = (column.detach() for column in agent(obs, action))
    advantage, target = torch.randn(rows), torch.randn(rows) * scale
    batch = ppo.Batch(obs, action, logprob, value, advantage, target)
    return agent, torch.optim.Adam(agent.parameters(), lr=0.01), batch


def run_update(agent, optimizer, batch, **flags):
    """One update with some flags of a preset; returns its report."""
    flags = {"num_minibatches": 1, "update_epochs": 1, "ent_coef": 0.0, "clip_coef": 0.2} | flags
    return ppo.update(agent, optimizer, batch, ppo.objective, 0.2, ppo.Args(**flags))


def gradient(agent):
    return torch.cat([param.grad.flatten() for param in agent.parameters()])


@pytest.mark.parametrize("clip_vloss", [False, True])
def test_first_step_of_an_update(clip_vloss):
    """One minibatch, one epoch: ratio 1, and all of (9) with the signs it should have."""
    agent, optimizer, batch = make_batch()
    report = run_update(agent, optimizer, batch, ent_coef=0.1, vf_coef=0.3, max_grad_norm=1e9,
                        clip_vloss=clip_vloss)
    assert report["approx_kl"] < 1e-9 and report["clip_fraction"] == 0
    twin, _, _ = make_batch()
    logprobs = twin.actor(batch.obs).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1).mean()
    loss = (
        -(batch.advantage * logprobs.gather(-1, batch.action).squeeze(-1)).mean()
        + 0.3 * (twin.critic(batch.obs).squeeze(-1) - batch.target).pow(2).mean()
        - 0.1 * entropy
    )
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(twin.parameters()))])
    torch.testing.assert_close(gradient(agent), expected, atol=1e-6, rtol=1e-4)


def test_gradient_is_clipped_as_one():
    agent, optimizer, batch = make_batch(scale=1e6)
    run_update(agent, optimizer, batch, max_grad_norm=0.5)
    assert gradient(agent).norm().item() == pytest.approx(0.5, rel=1e-4)


def test_gradients_do_not_add_up_over_minibatches():
    """At learning rate 0 the last of five steps has the gradient of the first."""
    grads = []
    for epochs in (1, 5):
        agent, optimizer, batch = make_batch()
        optimizer.param_groups[0]["lr"] = 0.0
        run_update(agent, optimizer, batch, update_epochs=epochs, max_grad_norm=1e9)
        grads.append(gradient(agent))
    torch.testing.assert_close(*grads)


def test_target_kl_ends_an_update_before_the_step():
    agent, optimizer, batch = make_batch()
    taken, step = [], optimizer.step
    optimizer.step = lambda: (taken.append(1), step())
    run_update(agent, optimizer, batch, update_epochs=50, target_kl=1e-9)
    assert len(taken) == 1, "the first step has KL 0, the second must not be taken"
    run_update(agent, optimizer, batch, update_epochs=50)
    assert len(taken) == 51


@pytest.mark.parametrize(
    "value, loss, slope",
    [
        (0.1, 0.81, -1.8),  # within ε of the old value 0: the plain squared error to the target 1
        (0.5, 0.64, 0.0),  # gone too far towards the target: the error of 0.2, and no slope
        (-0.5, 2.25, -3.0),  # gone away from it: the larger error is the plain one
    ],
)
def test_clipped_value_loss(value, loss, slope):
    value = torch.tensor([value], requires_grad=True)
    error = ppo.value_error(value, torch.zeros(1), torch.ones(1), 0.2)
    error.backward()
    assert error.item() == pytest.approx(loss) and value.grad.item() == pytest.approx(slope)
    assert ppo.value_error(value, torch.zeros(1), torch.ones(1)) == (value - 1).square()


@pytest.mark.parametrize("clip_vloss", [False, True])
def test_the_flag_for_clipped_values_reaches_the_loss(clip_vloss):
    agent, _, batch = make_batch()
    part = batch._replace(value=batch.value + 5, target=batch.value - 1)
    _, report = ppo.objective(agent, part, 0.2, clip_vloss, 0.5, 0.0)
    assert report[1].item() == pytest.approx(5.8**2 if clip_vloss else 1.0, rel=1e-4)


def test_advantages_are_normalised():
    advantage = torch.randn(50, dtype=torch.float64) * 3 + 2
    normal = ppo.normalize(advantage)
    assert normal.mean().item() == pytest.approx(0, abs=1e-9)
    assert normal.std().item() == pytest.approx(1, abs=1e-6)


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
    assert run.parts["optimizer"].param_groups[0]["eps"] == 1e-5


def test_sums_of_rewards_across_batches():
    reward = torch.tensor([[1.0, 1.0], [2.0, 1.0], [0.0, 1.0], [4.0, 1.0]])
    done = torch.tensor([[False, False], [True, False], [False, False], [False, True]])
    sums, carried = ppo.running_sums(reward, done, torch.tensor([10.0, 0.0]), 1.0)
    assert sums[done].tolist() == [13.0, 4.0] and carried.tolist() == [4.0, 0.0]
    sums, carried = ppo.running_sums(reward, done, torch.tensor([10.0, 0.0]), 0.5)
    assert sums[:, 0].tolist() == [6.0, 5.0, 0.0, 4.0] and carried.tolist() == [4.0, 0.0]
    assert sums[:, 1].tolist() == [1.0, 1.5, 1.75, 1.875]


def test_weights_start_orthogonal():
    """[C7]: gain √2, the last layers 0.01 and 1; biases 0; and the CNN likewise."""
    for shape in [(5,), (4, 84, 84)]:
        agent = ppo.Agent(shape, [3], 1)
        for name, param in agent.named_parameters():
            if name.endswith("bias"):
                assert not param.any()
                continue
            last = name.split(".")[0] in ("actor", "critic") and len(param) in (1, 3)
            gain = (0.01 if name.startswith("actor") else 1.0) if last else 2**0.5
            weight = param.flatten(1)
            square = weight @ weight.T if len(weight) <= weight.shape[1] else weight.T @ weight
            torch.testing.assert_close(square, gain**2 * torch.eye(len(square)), atol=1e-4, rtol=0)
    box = ppo.Agent((5,), [], 2, log_std=-1.5)
    assert box.log_std.tolist() == [-1.5, -1.5]
