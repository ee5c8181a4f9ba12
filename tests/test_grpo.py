"""grpo.py: the algorithm against its equations and TRL, sampling, data, runs, two processes."""

import contextlib
import csv
import dataclasses
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from itertools import count
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, pretrain_once
from torch.optim.optimizer import register_optimizer_step_pre_hook

import grpo

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def restored_sigint():
    """Logger sets a handler of its own; the next test shall not have it."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def tiny(vocabulary=11, seed=0, rank=0, **changes):
    """Return a small model with large random weights; the query heads share keys."""
    torch.manual_seed(seed)
    config = (
        grpo.tiny_config(vocabulary)
        | {"hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 2}
        | changes
    )
    model = grpo.Decoder(grpo.read_config(config, "tiny"), rank)
    for param in model.parameters():
        if param.dim() == 2:
            torch.nn.init.normal_(param, std=0.4)
    return model


def frozen(**changes):
    """Return another such model, as a reference policy."""
    return tiny(seed=1, **changes).requires_grad_(False)


def flags(**changes):
    values = {"max_completion_length": 6, "learning_rate": 0.01, "num_generations": 4,
              "max_grad_norm": 1e9, "bf16": False, "device": "cpu"}
    return grpo.default_args(**values | changes)


def plain_logprobs(model, prompt, completion, temperature=1.0):
    """Log-probabilities of the completion's tokens: one row, all logits, no cache, no padding."""
    tokens = torch.tensor([[*prompt, *completion]])
    logits = F.linear(model(tokens)[0], model.output_weight()) / temperature
    rows = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return rows.gather(1, torch.tensor(completion)[:, None])[:, 0]


def recorded_batch(prompts, completions, rewards, args, sampled=None, finished=None):
    """What generate_batch makes of recorded completions, G of each prompt. Returns what it does."""
    sampled = sampled or [[0.0] * len(tokens) for tokens in completions]
    finished = finished or [True] * len(completions)
    share = len(completions) // max(len(prompts), 1)
    rows = [grpo.Completion(prompts[i // share], *row)
            for i, row in enumerate(zip(completions, sampled, finished))]
    args = dataclasses.replace(args, num_generations=share)
    tokenizer, values = SimpleNamespace(decode=str), iter(rewards)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "generate", lambda *_: rows)
        return grpo.generate_batch(None, tokenizer, prompts, lambda *_: next(values), args)


def random_rows(seed=0, num_prompts=3, generations=4):
    """Prompts, completions and rewards; completions of other prompts have other lengths."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(11) for _ in range(rng.randint(1, 9))] for _ in range(num_prompts)]
    completions = [[rng.randrange(1, 11) for _ in range(rng.randint(1, 6))]
                   for _ in range(num_prompts * generations)]
    completions[0] = [1, 2, 3, 4, 5, 0]
    return prompts, completions, [rng.random() for _ in completions]


class Still(torch.optim.SGD):
    """Takes no step, so that gradients can be looked at."""

    def __init__(self, params):
        super().__init__(params, lr=0.0)


def flat_gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def gradient(model, batch, args, reference=None):
    model.zero_grad()
    metrics = grpo.update(model, reference, Still(model.parameters()), batch, args)
    return flat_gradient(model), metrics


# The algorithm


def test_presets_equal_the_table_of_the_docstring():
    rows = [line.split() for line in grpo.__doc__.splitlines()
            if line.split() and line.split()[0] in grpo.PRESETS]
    assert [name for name, *_ in rows] == list(grpo.PRESETS)
    means = {"grpo": "completion", "dr_grpo": "constant", "dapo": "tokens", "cispo": "tokens"}
    for name, advantage, loss_type, mean, level, epsilon, epsilon_high, beta, *_ in rows:
        args = grpo.default_args(preset=name)
        assert mean == means[loss_type] and (epsilon == "–") == (loss_type == "cispo")
        low = 0.2 if epsilon == "–" else float(epsilon)  # not used by "cispo"
        shown = (advantage, loss_type, level, low, float(epsilon_high), float(beta))
        assert shown == (args.scale_rewards, args.loss_type, args.importance_sampling_level,
                         args.epsilon, args.epsilon_high, args.beta)


def test_advantages_by_hand():
    reward = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    plain = torch.tensor([[0.75, -0.25, -0.25, -0.25], [0.5, 0.5, -0.5, -0.5]])
    std = torch.tensor([[0.5], [3**-0.5]])
    expected = {
        "none": plain,
        "group": plain / (std + 1e-4),
        "batch": plain / (reward.std() + 1e-4),
        "leave-one-out": plain * 4 / 3,
    }
    for name, advantage in expected.items():
        torch.testing.assert_close(grpo.group_advantage(reward, name), advantage)
    others = reward[0, 1:].mean()
    assert grpo.group_advantage(reward, "leave-one-out")[0, 0] == pytest.approx(1 - others.item())


@pytest.mark.parametrize(
    "advantage, ratio, slope",
    [
        (1.0, 1.5, 0.0),
        (-1.0, 0.5, 0.0),  # has moved far enough in the direction of the advantage
        (1.0, 0.5, 1.0),
        (-1.0, 1.5, 1.0),
        (1.0, 1.25, 1.0),  # epsilon_high is larger than epsilon
        (-1.0, 0.75, 0.0),
    ],
)
def test_clip_regions(advantage, ratio, slope):
    logprob = torch.tensor([[ratio]], dtype=torch.float64).log().requires_grad_()
    advantage = torch.tensor([advantage], dtype=torch.float64)
    loss = grpo.policy_loss(logprob.exp(), logprob, advantage, "dapo", 0.2, 0.28)
    gradient = torch.autograd.grad(loss.sum(), logprob)[0]
    assert gradient.item() == pytest.approx(-slope * ratio * advantage.item())


def test_cispo_clips_a_weight():
    """Every token keeps its gradient: the clipped ratio times the advantage."""
    logprob = torch.tensor([[0.1, 2.0, -3.0]], dtype=torch.float64, requires_grad=True)
    loss = grpo.policy_loss(logprob.exp(), logprob, torch.tensor([0.5]), "cispo", 0.2, 4.0)
    gradient = torch.autograd.grad(loss.sum(), logprob)[0]
    torch.testing.assert_close(gradient, -0.5 * logprob.detach().exp().clamp(max=5))


def test_token_weights_by_hand():
    """Two rows of a batch of 5 rows, 10 tokens, at most 4 per completion."""
    mask = torch.tensor([[True, True, False, False], [True, False, False, False]])
    expected = {
        "grpo": [[0.1, 0.1, 0, 0], [0.2, 0, 0, 0]],
        "dapo": [[0.1, 0.1, 0, 0], [0.1, 0, 0, 0]],
        "cispo": [[0.1, 0.1, 0, 0], [0.1, 0, 0, 0]],
        "dr_grpo": [[0.05, 0.05, 0, 0], [0.05, 0, 0, 0]],
    }
    for loss_type, weight in expected.items():
        ours = grpo.token_weight(mask, loss_type, torch.tensor(5), torch.tensor(10), 4)
        torch.testing.assert_close(ours, torch.tensor(weight))


def trl_loss(logprob, old, advantage, mask, ref, loss_type, level, epsilon, epsilon_high, beta):
    """The loss as TRL's trainer computes it from these log-probabilities."""
    trl = pytest.importorskip("trl")
    trainer = SimpleNamespace(
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        beta=beta,
        loss_type=loss_type,
        epsilon_low=epsilon,
        epsilon_high=epsilon_high,
        use_vllm=False,
        max_completion_length=9,
        model=torch.nn.Linear(1, 1),
        args=SimpleNamespace(use_bias_correction_kl=True, delta=None, steps_per_generation=1),
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, device=CPU, reduce=lambda x, **_: x
        ),
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *a, **k: (
            logprob,
            torch.zeros_like(logprob),
            None,
        ),
    )
    inputs = {
        "prompt_ids": torch.zeros(len(mask), 2),
        "prompt_mask": torch.ones(len(mask), 2),
        "completion_ids": mask.long(),
        "completion_mask": mask.long(),
        "advantages": advantage,
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
        "num_items_in_batch": mask.sum(),
    }
    return trl.GRPOTrainer._compute_loss(trainer, None, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize(
    "loss_type, level",
    [
        ("grpo", "token"),
        ("dapo", "token"),
        ("dr_grpo", "token"),
        ("cispo", "token"),
        ("grpo", "sequence"),
    ],
)
def test_loss_and_gradient_equal_trl(loss_type, level, beta):
    if level == "sequence" and beta:
        pytest.skip("TRL weighs the KL by the sequence's ratio there, grpo.py by the token's")
    torch.manual_seed(1)
    mask = torch.arange(7) < torch.tensor([7, 3, 1, 5])[:, None]
    old, ref = -torch.rand(4, 7) * 3, -torch.rand(4, 7) * 3
    advantage, losses, grads = torch.randn(4), [], []
    for ours in (True, False):
        logprob = (old + 0.4 * torch.sin(torch.arange(28.0)).view(4, 7)).requires_grad_()
        if ours:
            weight = grpo.token_weight(mask, loss_type, 4, mask.sum(), 9)
            loss = grpo.grpo_loss(logprob, old, ref, advantage, mask, weight, loss_type=loss_type,
                                  level=level, epsilon_high=0.3, beta=beta)
        else:
            high = 1.3 if loss_type == "cispo" else 0.3  # TRL's is the bound itself there
            loss = trl_loss(logprob, old, advantage, mask, ref, loss_type, level, 0.2, high, beta)
        loss.backward()
        losses.append(loss.item())
        grads.append(logprob.grad)
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-5)


def test_gradient_of_the_kl_term_by_enumeration():
    """Over all five tokens the gradient of ρ k3 is that of KL(π‖π_ref), that of k3 is not."""
    torch.manual_seed(0)
    theta = torch.randn(5, requires_grad=True)
    ref = torch.randn(5).log_softmax(-1)
    logprob = theta.log_softmax(-1)
    old, prob = logprob.detach(), logprob.detach().exp()
    k3 = (ref - logprob).exp() - (ref - logprob) - 1
    forward, reverse, ours, biased = (
        torch.autograd.grad(value.sum(), theta, retain_graph=True)[0]
        for value in (
            logprob.exp() * (logprob - ref),
            ref.exp() * (ref - logprob),
            prob * grpo.kl_estimate(logprob, old, ref),
            prob * k3,
        )
    )
    torch.testing.assert_close(ours, forward)
    torch.testing.assert_close(biased, reverse)
    assert not torch.allclose(forward, reverse, atol=0.01)
    value = (prob * grpo.kl_estimate(old, old, ref)).sum()
    assert value.item() == pytest.approx((prob * (old - ref)).sum().item(), rel=1e-5)


# From completions to the gradient


def test_pad_batch_by_hand():
    """The first completion token is predicted from the last prompt token; the stop token counts."""
    inputs, targets, mask = grpo.pad_batch([([1, 2, 3], [4, 9]), ([5], [6, 7, 9])], CPU)
    assert inputs.tolist() == [[1, 2, 3, 4], [5, 6, 7, 9]]
    assert targets.tolist() == [[2, 3, 4, 9], [6, 7, 9, 0]]
    assert mask.tolist() == [[False, False, True, True], [True, True, True, False]]


def test_one_update_is_reinforce_with_the_group_mean_as_baseline():
    """At ratio 1 the loss is 0 and the gradient that of the mean of −Â log π over all tokens."""
    model, prompts = tiny(), [[1, 2, 3], [7, 5, 4, 4, 8, 2]]
    completions = [[3, 4, 0], [5, 0], [2, 2, 0], [9, 8, 1, 7, 0], [1, 0], [6, 2, 2, 0], [0], [3, 0]]
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 3.0, 1.0, 0.5]])
    args = flags(temperature=0.8, micro_batch_size=3)
    batch, _ = recorded_batch(prompts, completions, rewards.flatten().tolist(), args)
    grad, metrics = gradient(model, batch, args)
    assert metrics["loss"].item() == pytest.approx(
        -(rewards - rewards.mean(1, keepdim=True)).flatten().dot(
            torch.tensor([3.0, 2, 3, 5, 2, 4, 1, 2])).item() / 22, abs=1e-6)
    assert metrics["clip_fraction"] == 0 and metrics["approx_kl"].abs() < 1e-6
    model.zero_grad()
    advantage = (rewards - rewards.mean(1, keepdim=True)).flatten().tolist()
    loss = sum(-a * plain_logprobs(model, prompts[i // 4], c, 0.8).sum()
               for i, (a, c) in enumerate(zip(advantage, completions))) / 22
    loss.backward()
    torch.testing.assert_close(grad, flat_gradient(model), atol=5e-6, rtol=1e-4)
    assert grad.norm() > 0.01 and metrics["grad_norm"].item() == pytest.approx(grad.norm().item())


def test_loss_is_zero_where_all_completions_are_equally_long():
    args = flags()
    completions = [[1, 0], [2, 0], [3, 0], [4, 0]]
    batch, _ = recorded_batch([[5, 6]], completions, [1.0, 0.0, 0.0, 0.0], args)
    grad, metrics = gradient(tiny(), batch, args)
    assert metrics["loss"].abs() < 1e-6 and grad.norm() > 0.01


def test_gradient_is_clipped_and_its_norm_logged():
    model = tiny()
    batch, _ = recorded_batch(*random_rows(), flags())
    whole, metrics = gradient(model, batch, flags())
    limit = whole.norm().item() / 3
    short, again = gradient(model, batch, flags(max_grad_norm=limit))
    torch.testing.assert_close(short, whole / 3, rtol=1e-4, atol=1e-6)
    for norm in (metrics["grad_norm"], again["grad_norm"]):
        assert norm.item() == pytest.approx(3 * limit, rel=1e-4)


def test_kl_term_is_added_to_the_loss():
    """Without advantages the gradient is β times that of the mean of ρ k3, by hand."""
    model, reference, completions = tiny(), frozen(), [[3, 4, 0], [5, 1, 2, 0]]
    args = flags(beta=0.3, temperature=1.2)
    batch, _ = recorded_batch([[1, 2, 3]], completions, [0.0, 1.0], args)
    batch = batch._replace(advantage=torch.zeros(2))
    grad, metrics = gradient(model, batch, args, reference)
    model.zero_grad()
    loss = 0
    for completion in completions:
        logprob = plain_logprobs(model, [1, 2, 3], completion, 1.2)
        ref = plain_logprobs(reference, [1, 2, 3], completion, 1.2).detach()
        loss = loss + 0.3 * grpo.kl_estimate(logprob, logprob.detach(), ref).sum() / 7
    loss.backward()
    torch.testing.assert_close(grad, flat_gradient(model), atol=5e-6, rtol=1e-4)
    assert metrics["loss"].item() == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize("name", list(grpo.PRESETS))
def test_gradient_does_not_depend_on_how_the_batch_is_cut(name):
    """Micro-batches of one row, of some, of all; prompts in another order; more padding."""
    model, reference = tiny(), frozen()
    prompts, completions, rewards = random_rows()
    grads = []
    for size in (1, 2, 5, 1024):
        args = flags(preset=name, micro_batch_size=size, beta=0.1)
        batch, _ = recorded_batch(prompts, completions, rewards, args)
        assert len(batch.micro_batches) == -(-12 // size)
        grads.append(gradient(model, batch, args, reference)[0])
    order = [2, 0, 1]
    rows = [4 * i + j for i in order for j in (1, 3, 0, 2)]
    moved, _ = recorded_batch([prompts[i] for i in order], [completions[row] for row in rows],
                              [rewards[row] for row in rows], args)
    grads.append(gradient(model, moved, args, reference)[0])
    wide = [F.pad(x, (0, 5)) for x in batch[:4]]
    padded = grpo.Batch(*wide, batch.advantage, [(slice(0, 7), slice(None)),
                                                 (slice(7, None), slice(None))])
    grads.append(gradient(model, padded, args, reference)[0])
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0], atol=2e-6, rtol=1e-4)


def three_groups(**changes):
    """Of three prompts the second has equal rewards; a completion of the third was cut."""
    completions = [[7, 0], [8, 0], [7, 0], [6, 0], [8, 7, 5], [7, 0]]
    args = flags(max_completion_length=3, **changes)
    return recorded_batch([[1], [2], [3]], completions, [1.0, 0, 1, 1, 0, 1], args,
                          finished=[True, True, True, True, False, True])


def learned(batch):
    """Prompt, trained tokens and advantage of each row that is learned from."""
    return sorted((row[0].item(), target[mask].tolist(), round(advantage.item(), 4))
                  for row, target, mask, advantage in zip(*batch[:3], batch.advantage)
                  if mask.any())


def test_groups_with_equal_rewards_are_left_out():
    batch, metrics = three_groups()
    assert learned(batch) == [(1, [7, 0], 0.5), (1, [8, 0], -0.5),
                              (3, [7, 0], 0.5), (3, [8, 7, 5], -0.5)]
    assert batch.mask.sum() == 9 and batch.micro_batches == [(slice(0, 4), slice(0, 3))]
    shown = {name: round(value.item(), 4) for name, value in metrics.items()}
    assert shown == {"reward": 0.6667, "equal_groups": 0.3333, "truncated": 0.1667,
                     "length": 2.1667, "entropy": 0.0}
    batch, _ = recorded_batch([[1]], [[7, 0], [8, 0], [9, 0]], [0.0, 0.5, 1.0], flags())
    assert (1, [8, 0], 0.0) in learned(batch)  # its reward is the mean, but not that of all


def test_left_out_groups_do_not_change_the_gradient():
    """They count in no mean and have no KL term."""
    model, reference, args = tiny(), frozen(), flags(beta=0.1)
    prompts, completions, rewards = random_rows(num_prompts=2)
    batch, _ = recorded_batch(prompts, completions, rewards, args)
    equal = [[1, 0], [2, 3, 4, 5, 6, 0], [3, 0], [1, 1, 0]]
    more, _ = recorded_batch([*prompts, [4, 4]], completions + equal, rewards + [1.0] * 4, args)
    for size in (3, 1024):
        args = dataclasses.replace(args, micro_batch_size=size)
        torch.testing.assert_close(gradient(model, more, args, reference)[0],
                                   gradient(model, batch, args, reference)[0])


def test_truncated_completions_can_be_masked():
    """They are still part of the mean of their group."""
    batch, _ = three_groups(mask_truncated_completions=True)
    assert learned(batch) == [(1, [7, 0], 0.5), (1, [8, 0], -0.5), (3, [7, 0], 0.5)]


def test_sampled_logprobs_stay_with_their_tokens():
    sampled = [[-1.0, -2.0], [-3.0, -4.0, -5.0]]
    batch, metrics = recorded_batch([[1, 1]], [[7, 0], [8, 9, 0]], [1.0, 0.0], flags(), sampled)
    for row, mask in zip(batch.sampled_logprob, batch.mask):
        assert row[mask].tolist() in sampled and (row[~mask] == 0).all()
    assert metrics["entropy"] == 3
    pairs = {tuple(t[m].tolist()): row[m].tolist()
             for t, m, row in zip(batch.targets, batch.mask, batch.sampled_logprob)}
    assert pairs == {(7, 0): sampled[0], (8, 9, 0): sampled[1]}


def test_a_row_without_trained_tokens_has_ratio_one():
    """Such rows fill up micro-batches. 0 / 0 would make the loss NaN."""
    zeros, mask = torch.zeros(2, 3), torch.tensor([[True, True, False], [False, False, False]])
    ratio = grpo.importance_ratio(mask * 0.3, zeros, mask, "sequence")
    torch.testing.assert_close(ratio, torch.tensor([[math.exp(0.3)], [1.0]]))


@pytest.mark.parametrize("loss_type, clipped", [("dapo", 2), ("cispo", 1)])
def test_metrics_of_ratios_by_hand(loss_type, clipped):
    """The loss cispo has no lower bound."""
    ratios, zeros = torch.tensor([[0.5, 2.0, 1.1, 1.0]]), torch.zeros(1, 4)
    batch = grpo.Batch(None, None, torch.tensor([[True, True, True, False]]), zeros, None, None)
    args = flags(loss_type=loss_type, epsilon=0.2, epsilon_high=0.5)
    metrics = grpo.update_metrics(batch, ratios.log(), zeros, torch.tensor(3), args)
    assert metrics["clip_fraction"].item() == pytest.approx(clipped / 3)
    kl = sum(ratio - 1 - math.log(ratio) for ratio in (0.5, 2, 1.1)) / 3
    assert metrics["approx_kl"].item() == pytest.approx(kl, abs=1e-6)


def test_gap_between_trainer_and_sampler_by_hand():
    model, args, completions = tiny(), flags(), [[7, 0], [8, 9, 0]]
    sampled = [plain_logprobs(model, [1, 1], c).tolist() for c in completions]
    sampled[1][1] += 0.5
    batch, _ = recorded_batch([[1, 1]], completions, [1.0, 0.0], args, sampled)
    metrics = gradient(model, batch, args)[1]
    assert metrics["sampler_gap_mean"].item() == pytest.approx(0.1, abs=1e-4)
    assert metrics["sampler_gap_max"].item() == pytest.approx(0.5, abs=1e-4)


def test_deviation_of_the_batch_is_over_all_processes(monkeypatch):
    """Another process had four groups in which all are right or all are wrong."""
    others = torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    monkeypatch.setattr(
        grpo, "all_gather", lambda rows: torch.cat([rows, others]) if rows.dim() == 2 else rows)
    batch, _ = three_groups(scale_rewards="batch")
    std = torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1]).std()
    assert batch.advantage.max().item() == pytest.approx(0.5 / (std.item() + 1e-4))


def test_several_updates_per_batch_clip():
    """After the first update the ratio leaves 1; it is relative to the policy that sampled."""
    model, args = tiny(), flags(num_iterations=4, micro_batch_size=5)
    batch, _ = recorded_batch(*random_rows(), args)
    before = model.model.embed_tokens.weight.clone()
    metrics = grpo.update(model, None, torch.optim.SGD(model.parameters(), 0.5), batch, args)
    assert metrics["approx_kl"] > 0.01 and metrics["clip_fraction"] > 0
    assert not torch.equal(before, model.model.embed_tokens.weight)


@pytest.mark.parametrize("name", list(grpo.PRESETS))
def test_two_updates_per_batch_by_hand(name):
    """The second update has the first one's log-probabilities as π_old and π_ref."""
    args = flags(num_iterations=2, preset=name, micro_batch_size=5, temperature=0.8)
    prompts, completions, rewards = random_rows()
    rewards[4:8] = [0.5] * 4  # left out
    kept = [i for i in range(12) if i // 4 != 1]
    batch, _ = recorded_batch(prompts, completions, rewards, args)
    model, by_hand = tiny(), tiny()
    reference = frozen() if args.beta else None
    metrics = grpo.update(model, reference, torch.optim.SGD(model.parameters(), 0.3), batch, args)
    advantage = grpo.group_advantage(
        torch.tensor(rewards).view(3, 4), args.scale_rewards).flatten()
    num_tokens = sum(len(completions[i]) for i in kept)
    low, high = 1 - args.epsilon, 1 + args.epsilon_high
    optimizer, old, losses = torch.optim.SGD(by_hand.parameters(), 0.3), {}, []
    for _ in range(2):
        loss = 0
        for i in kept:
            row = [prompts[i // 4], completions[i], 0.8]
            logprob, a = plain_logprobs(by_hand, *row), advantage[i]
            old.setdefault(i, logprob.detach())
            ratio = token_ratio = (logprob - old[i]).exp()
            if name == "gspo":
                ratio = (logprob - old[i]).mean().exp().expand(len(logprob))
            term = -torch.min(ratio * a, ratio.clamp(low, high) * a)
            if name == "cispo":
                term = -ratio.clamp(max=high).detach() * a * logprob
            if args.beta:
                log_ratio = plain_logprobs(reference, *row).detach() - logprob
                term = term + args.beta * token_ratio * (log_ratio.exp() - log_ratio - 1)
            count = {"grpo": 8 * len(logprob), "dr_grpo": 8 * 6}.get(args.loss_type, num_tokens)
            loss = loss + term.sum() / count
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert metrics["loss"].item() == pytest.approx(sum(losses) / 2, rel=1e-3, abs=1e-5)
    for mine, theirs in zip(model.parameters(), by_hand.parameters()):
        torch.testing.assert_close(mine, theirs, atol=5e-4, rtol=1e-3)


def test_batch_of_equal_groups_changes_nothing():
    model = tiny()
    batch, metrics = recorded_batch([[1]], [[2, 0], [3, 0]], [1.0, 1.0], flags())
    before = [p.clone() for p in model.parameters()]
    grpo.update(model, None, torch.optim.AdamW(model.parameters(), 1.0), batch, flags())
    assert all(map(torch.equal, before, model.parameters()))
    assert batch.micro_batches == [] and metrics["equal_groups"] == 1


def test_non_finite_gradient_stops_before_the_step():
    model, args = tiny(), flags()
    batch, _ = recorded_batch(*random_rows(), args)
    batch.advantage[3] = float("nan")
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="non-finite"):
        grpo.update(model, None, torch.optim.AdamW(model.parameters(), 1.0), batch, args)
    assert all(map(torch.equal, before, model.parameters()))


# Log-probabilities


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("changes", [{}, {"model_type": "qwen2", "tie_word_embeddings": False},
                                     {"model_type": "qwen3"}])
def test_token_logprobs_equal_plain_full_logits(changes, temperature):
    """Values and gradients, with chunks that do not divide the number of tokens."""
    model = tiny(**changes)
    prompts, completions, _ = random_rows()
    rows = [(prompts[i // 4], c) for i, c in enumerate(completions)]
    inputs, targets, mask = grpo.pad_batch(rows, CPU)
    scale, grads = torch.sin(torch.arange(float(mask.sum()))), []
    for chunk_size in (1, 7, 1024):
        model.zero_grad()
        ours = grpo.token_logprobs(model(inputs), model.output_weight(), targets, mask, temperature,
                                   chunk_size)
        assert ours.shape == mask.shape and (ours[~mask] == 0).all()
        (ours[mask] * scale).sum().backward()
        grads.append(flat_gradient(model))
    model.zero_grad()
    expected = torch.cat([plain_logprobs(model, *row, temperature) for row in rows])
    (expected * scale).sum().backward()
    torch.testing.assert_close(ours[mask], expected, atol=1e-5, rtol=1e-4)
    for grad in grads:
        torch.testing.assert_close(grad, flat_gradient(model), atol=1e-4, rtol=1e-4)


def test_logits_of_all_tokens_are_never_in_memory(monkeypatch):
    """The largest tensor that is multiplied with the output weight has chunk_size rows."""
    sizes, linear = [], F.linear

    def watch(x, weight, *bias):
        if len(weight) == 11:  # the vocabulary
            sizes.append(len(x))
        return linear(x, weight, *bias)

    monkeypatch.setattr(F, "linear", watch)
    inputs, targets, mask = grpo.pad_batch([([1], [2, 3, 4, 5, 0])] * 5, CPU)
    model = tiny()
    logprob = grpo.token_logprobs(model(inputs), model.output_weight(), targets, mask, 1.0, 10)
    logprob.sum().backward()
    assert sizes == [10, 10, 5, 5, 10, 10] or sorted(sizes) == [5, 5, 10, 10, 10, 10]


def test_gradient_checkpointing_changes_nothing():
    model = tiny()
    batch, _ = recorded_batch(*random_rows(), flags())
    expected = gradient(model, batch, flags())[0]
    blocks = []
    for block in model.model.layers:
        block.register_forward_pre_hook(lambda *_: blocks.append(1))
    model.checkpointing = True
    torch.testing.assert_close(gradient(model, batch, flags())[0], expected)
    assert len(blocks) == 4  # each block once more in the backward pass


def test_bf16_gradient_is_close():
    model = tiny()
    batch, _ = recorded_batch(*random_rows(), flags())
    expected = gradient(model, batch, flags())[0]
    model.bf16 = True
    grad = gradient(model, batch, flags())[0]
    assert F.cosine_similarity(grad, expected, 0) > 0.99 and not torch.equal(grad, expected)
    assert grad.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_compile_changes_nothing():
    plain, args = tiny(num_hidden_layers=1), flags(compile=True)
    batch, _ = recorded_batch(*random_rows(), args)
    weights = {name: x.clone() for name, x in plain.state_dict().items()}
    model = grpo.make_model(plain.config, weights, CPU, args)
    for size in (2, 1024):  # several shapes
        args = dataclasses.replace(args, micro_batch_size=size)
        batch, _ = recorded_batch(*random_rows(), args)
        expected = gradient(plain, batch, args)[0]
        torch.testing.assert_close(gradient(model, batch, args)[0], expected, atol=1e-5, rtol=1e-3)
    assert all(block._compiled_call_impl is not None for block in model.model.layers)
    sampler = grpo.make_sampler(model, args)
    rows, others = (seeded_sample(1, m, [[1, 2, 3], [4]], 3, 20, 1.0, [0])
                    for m in (sampler, plain))
    assert [row.tokens for row in rows] == [row.tokens for row in others]


# Sampling


def seeded_sample(seed, *args):
    torch.manual_seed(seed)
    return grpo.sample(*args)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_sampled_logprobs_equal_the_full_forward(kind):
    """Ragged prompts, shared key heads, rows that finish early and are dropped, 40 tokens."""
    model, temperature = tiny(vocabulary=23, model_type=kind), 0.9
    prompts = [[1, 2, 3, 4, 5, 6, 7], [3], [9, 9, 1]]
    rows = seeded_sample(3, model, prompts, 20, 40, temperature, [0, 7])
    lengths = [len(row.tokens) for row in rows]
    assert len(rows) == 60 and min(lengths) < 16 < sorted(lengths)[-3]
    assert {row.tokens[-1] for row in rows if row.finished} == {0, 7}
    for i, (prompt, tokens, logprobs, finished) in enumerate(rows):
        assert prompt == prompts[i // 20] and len(logprobs) == len(tokens)
        stops = [token in (0, 7) for token in tokens]
        assert stops[-1] == finished and not any(stops[:-1])
        assert finished or len(tokens) == 40
        expected = plain_logprobs(model, prompt, tokens, temperature)
        torch.testing.assert_close(torch.tensor(logprobs), expected, atol=1e-5, rtol=1e-4)


def test_finished_rows_are_computed_no_further(monkeypatch):
    """Every 16 tokens the rows that have finished are dropped; without any left it ends."""
    model, sizes, forward = tiny(), [], grpo.Decoder.forward
    monkeypatch.setattr(grpo.Decoder, "forward", lambda self, tokens, cache=None: (
        sizes.append(len(tokens)), forward(self, tokens, cache))[1])
    rows = seeded_sample(1, model, [[1, 2], [3]], 16, 64, 1.0, [0, 7, 8])
    lengths = [len(row.tokens) for row in rows]
    assert 16 < max(lengths) < 48  # so it ends early
    steps = -(-max(lengths) // 16) * 16
    # Of the rows that run at a step: those that had not finished at the last multiple of 16.
    assert sizes == [2, *(sum(n > t // 16 * 16 for n in lengths) for t in range(1, steps))]


def test_greedy_sampling_takes_the_likeliest_token():
    model, prompts = tiny(), [[1, 2, 3], [5]]
    for row in grpo.sample(model, prompts, 1, 20, 0.0, [0]):
        expected = []
        while len(expected) < 20 and (not expected or expected[-1] != 0):
            tokens = torch.tensor([[*row.prompt, *expected]])
            expected.append(F.linear(model(tokens)[0, -1], model.output_weight()).argmax().item())
        assert row.tokens == expected


def test_sampling_frequencies_follow_the_softmax():
    model, n = tiny(), 40_000
    rows = seeded_sample(5, model, [[4, 2]], n, 1, 0.8, [0])
    share = torch.bincount(torch.tensor([row.tokens[0] for row in rows]), minlength=11) / n
    expected = torch.stack([plain_logprobs(model, [4, 2], [t], 0.8)[0].exp() for t in range(11)])
    assert ((share - expected).abs() < 4.5 * (expected * (1 - expected) / n).sqrt()).all()


def test_tokens_with_no_probability_are_never_drawn():
    logprob = torch.tensor([0.0, 0.625, 0.0, 0.375, 0.0]).log().expand(10_000, 5)
    torch.manual_seed(1)
    token = grpo.choose_token(logprob, 1.0)
    share = torch.bincount(token, minlength=5) / 10_000
    assert set(token.tolist()) == {1, 3} and abs(share[1] - 0.625) < 0.02


def test_sampling_depends_on_the_seed_alone():
    def draw(seed):
        model = tiny()
        return seeded_sample(seed, model, [[1], [2, 3]], 4, 8, 1.0, [0])

    assert draw(1) == draw(1) and draw(1) != draw(2)
    groups = draw(1)[:4]
    assert len({tuple(row.tokens) for row in groups}) > 1


def test_sampling_batch_size_changes_only_how_many_run_at_once(monkeypatch):
    text, model = grpo.Characters(), tiny(vocabulary=13)
    examples = [{"prompt": prompt} for prompt in ("1+2=", "3", "44+", "5=", "6+6")]
    sizes, sample, results = [], grpo.sample, []
    monkeypatch.setattr(grpo, "sample", lambda model, prompts, *rest: (
        sizes.append(len(prompts)), sample(model, prompts, *rest))[1])
    for size in (1, 4, 1024):
        args = flags(sampling_batch_size=size)
        results.append(grpo.generate(model, text, examples, args, greedy=True))
    assert sizes == [1, 1, 1, 1, 1, 4, 1, 5]
    tokens = [[(row.prompt, row.tokens) for row in rows] for rows in results]
    assert tokens[0] == tokens[1] == tokens[2] and len(tokens[0]) == 5


def test_generate_passes_on_what_the_flags_say(monkeypatch):
    asked = []
    monkeypatch.setattr(grpo, "sample", lambda model, prompts, *rest: asked.append(rest) or [])
    tokenizer = SimpleNamespace(encode=lambda *_, **__: [1], stop_ids=[3, 5])
    for greedy in (False, True):
        grpo.generate(None, tokenizer, [{"prompt": "a"}], flags(temperature=0.7), greedy)
    assert asked == [(4, 6, 0.7, [3, 5]), (1, 6, 0.0, [3, 5])]


def test_a_token_beyond_the_vocabulary_is_never_drawn(monkeypatch):
    """Also where the probabilities add up to less than the random number."""
    monkeypatch.setattr(torch, "rand_like", torch.zeros_like)  # the largest uniform number is 1
    logprob = torch.tensor([[0.5, 0.4999]]).log()
    assert grpo.choose_token(logprob, 1.0).tolist() == [1]


def moved(model, args, rows):
    """Log-probabilities of the rows' completions, in one vector."""
    inputs, targets, mask = grpo.pad_batch(rows, CPU)
    with torch.no_grad():
        logprob = grpo.token_logprobs(model(inputs), model.output_weight(), targets, mask,
                                      args.temperature)
    return logprob[mask]


def test_bf16_sampler_follows_small_lora_adapters():
    """After ten small steps its log-probabilities have moved as the trainer's have."""
    torch.manual_seed(0)
    args = flags(lora_rank=8, bf16=True, learning_rate=1e-4)
    base = tiny(vocabulary=40, hidden_size=64, intermediate_size=96)
    weights = {name: x.detach() / 3 for name, x in base.state_dict().items()}
    model = grpo.make_model(base.config, weights, CPU, args)
    sampler = grpo.make_sampler(model, args)
    assert sampler.model.embed_tokens.weight.dtype == torch.bfloat16
    prompts, completions, rewards = random_rows(num_prompts=8, generations=8)
    rows = [(prompts[i // 8], c) for i, c in enumerate(completions)]
    batch, _ = recorded_batch(prompts, completions, rewards, args)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
    before = [moved(m, args, rows) for m in (model, sampler)]
    for _ in range(10):
        grpo.update(model, None, optimizer, batch, args)
        grpo.update_sampler(sampler, model)
    change = [moved(m, args, rows) - start for m, start in zip((model, sampler), before)]
    assert torch.corrcoef(torch.stack(change))[0, 1] > 0.9
    assert change[0].std() < 0.1  # small indeed


@pytest.mark.parametrize("extra", [{}, {"bf16": True}, {"lora_rank": 2, "bf16": True},
                                   {"compile": True}])
def test_sampler_is_a_copy_where_needed_and_gets_the_new_weights(extra):
    base, args = tiny(), flags(**extra)
    model = grpo.make_model(base.config, base.state_dict(), CPU, args)
    sampler = grpo.make_sampler(model, args)
    assert (sampler is model) == (extra == {})
    for param in model.parameters():
        if param.requires_grad:
            param.data += 1
    grpo.update_sampler(sampler, model)
    names = [name for name, _ in model.named_parameters()]
    assert [name for name, _ in sampler.named_parameters()] == names
    for mine, theirs in zip(model.parameters(), sampler.parameters()):
        torch.testing.assert_close(mine, theirs.float(), rtol=0.01, atol=0.01)
        assert sampler is model or mine.data_ptr() != theirs.data_ptr()


# The models of a run


def test_trained_weights_are_a_copy_and_frozen_ones_are_shared():
    base = tiny()
    weights = {name: x.detach() for name, x in base.state_dict().items()}

    def shared(model):
        return [name for name, param in model.named_parameters()
                if name in weights and param.data_ptr() == weights[name].data_ptr()]

    assert shared(grpo.make_model(base.config, weights, CPU, flags())) == []
    lora = grpo.make_model(base.config, weights, CPU, flags(lora_rank=2))
    reference = grpo.make_model(base.config, weights, CPU, flags(), is_reference=True)
    assert set(shared(lora)) == set(shared(reference)) == set(weights)
    assert not any(param.requires_grad for param in reference.parameters())


def seen_in_train(monkeypatch, function, args, reward=None):
    """Run train; return the arguments of every call of one of its functions, and its metrics."""
    real, calls = getattr(grpo, function), []

    def watch(*arguments, **named):
        calls.append(arguments)
        return real(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(grpo, function, watch)
        grpo.train(args, reward or judge)
    rows = list(csv.DictReader(open(f"{args.run_dir}/metrics.csv")))
    return calls, [{name: float(value) for name, value in row.items()} for row in rows]


def judge(text, example):
    """Give rewards that differ even for a model that knows nothing."""
    return sum(map(ord, text)) % 5 / 4


SMALL = {"pretrain_steps": 2, "batch_size": 8, "eval_prompts": 16, "eval_every": 2,
         "device": "cpu", "bf16": False}


@pytest.fixture
def folder(tmp_path):
    """A random Llama of transformers' with a tokenizer and a file of data; returns the flags."""
    from test_decoder import write

    write(tmp_path / "base", "qwen2")
    rows = [{"prompt": f"w{i % 30 + 5} w{i % 7 + 5}", "answer": i} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"model": str(tmp_path / "base"), "data": str(tmp_path / "rows.jsonl"),
            "max_completion_length": 5, "learning_rate": 1e-3, "num_generations": 4}


@pytest.mark.parametrize("kind", ["tiny", "folder", "lora"])
def test_reference_policy_is_the_initial_model_and_stays_so(kind, folder, monkeypatch, tmp_path):
    """It is the policy at first, moves with no step, and the KL grows. With LoRA it shares."""
    extra = {} if kind == "tiny" else folder | {"lora_rank": 2 * (kind == "lora")}
    args = grpo.default_args(**SMALL | extra | {"run_dir": str(tmp_path / "run"), "max_steps": 4,
                                                "beta": 0.1, "learning_rate": 0.01})
    states, real = [], grpo.update

    def watch(model, reference, *rest):
        states.append([{name: param.detach().clone() for name, param in part.named_parameters()}
                       for part in (model, reference)])
        return real(model, reference, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(grpo, "update", watch)
        calls, _ = seen_in_train(monkeypatch, "kl_estimate", args)
    (first, reference), (last, again) = states[0], states[-1]
    for name in reference:
        assert torch.equal(first[name], reference[name])
        assert torch.equal(reference[name], again[name])
    assert any(not torch.equal(first[name], last[name]) for name in first)
    logprob, _, ref = calls[0]
    torch.testing.assert_close(logprob, ref, atol=1e-5, rtol=1e-4)
    logprob, _, ref = calls[-1]
    assert (logprob - ref).abs().max() > 1e-3


def test_reference_shares_the_frozen_weights_of_a_lora_model(folder, monkeypatch, tmp_path):
    args = grpo.default_args(**SMALL | folder | {"run_dir": str(tmp_path / "run"), "max_steps": 1,
                                                 "beta": 0.1, "lora_rank": 2})
    (model, reference, *_), = seen_in_train(monkeypatch, "update", args)[0]
    mine = dict(model.named_parameters())
    for name, param in reference.named_parameters():
        assert param.data_ptr() == mine[name].data_ptr() and not param.requires_grad
    assert not any("lora_" in name for name, _ in reference.named_parameters())


def test_without_beta_there_is_no_reference(monkeypatch, tmp_path):
    args = grpo.default_args(**SMALL | {"run_dir": str(tmp_path / "run"), "max_steps": 1})
    assert seen_in_train(monkeypatch, "update", args)[0][0][1] is None


def test_processes_get_different_prompts_and_random_numbers(monkeypatch, tmp_path):
    seen, local_rows = [], grpo.local_rows

    class Enough(Exception):
        pass

    def stop(sampler, tokenizer, examples, reward, args):
        seen.append((examples, torch.initial_seed()))
        raise Enough

    def share(rows):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(grpo.dist, "is_initialized", lambda: True)
            patch.setattr(grpo.dist, "get_world_size", lambda: 2)
            patch.setattr(grpo.dist, "get_rank", lambda: rank)
            return local_rows(rows)

    for rank in (0, 1):
        monkeypatch.setattr(grpo, "get_rank", lambda: rank)  # noqa: B023
        monkeypatch.setattr(grpo, "local_rows", share)
        monkeypatch.setattr(grpo, "generate_batch", stop)
        with pytest.raises(Enough):
            grpo.train(grpo.default_args(**SMALL | {"run_dir": str(tmp_path / str(rank))}))
    (prompts, seed), (others, other) = seen
    assert seed != other and len(prompts) == len(others) == 4
    assert not {e["prompt"] for e in prompts} & {e["prompt"] for e in others}


def test_seeds_and_batches_have_prompts_and_random_numbers_of_their_own(monkeypatch, tmp_path):
    """Those of a seed are not those of the next seed one batch earlier, either."""
    seen, real = [], grpo.generate_batch

    def watch(sampler, tokenizer, examples, *rest):
        seen.append((str([example["prompt"] for example in examples]), torch.initial_seed()))
        return real(sampler, tokenizer, examples, *rest)

    monkeypatch.setattr(grpo, "generate_batch", watch)
    for seed in (1, 2):
        grpo.train(grpo.default_args(**SMALL | {"run_dir": str(tmp_path / str(seed)), "seed": seed,
                                                "max_steps": 4}), judge)
    prompts, seeds = zip(*seen)
    assert len(set(prompts)) == len(set(seeds)) == 8
    assert min(abs(a - b) for a, b in itertools.combinations(seeds, 2)) > 100  # of processes


def test_what_train_asks_of_its_parts(monkeypatch, tmp_path):
    """AdamW without weight decay; evaluations before, during and after training."""
    args = grpo.default_args(**SMALL | {"run_dir": str(tmp_path / "run"), "max_steps": 4})
    updates, rows = seen_in_train(monkeypatch, "update", args)
    assert [call[2].param_groups[0]["weight_decay"] for call in updates] == [0.0] * 4
    assert [len(call[3].inputs) for call in updates] == [64] * 4
    assert max(row["sampler_gap_max"] for row in rows) < 1e-4
    scores = [row["score"] for row in rows]
    assert 0 <= scores[0] <= 1 and scores[0] != scores[1] == scores[2]
    args = dataclasses.replace(args, run_dir=str(tmp_path / "again"))
    evaluations, _ = seen_in_train(monkeypatch, "evaluate", args)
    assert len(evaluations) == 3 and all(len(call[2]) == 16 for call in evaluations)
    generations, _ = seen_in_train(monkeypatch, "generate", dataclasses.replace(
        args, run_dir=str(tmp_path / "greedy")))
    greedy = [len(call[2]) == 16 for call in generations]
    assert greedy == [True, False, False, True, False, False, True]
    batches, _ = seen_in_train(monkeypatch, "generate_batch",
                               dataclasses.replace(args, run_dir=str(tmp_path / "third")))
    assert len({json.dumps(call[2]) for call in batches}) == 4


def test_sampler_of_a_bf16_run_has_the_newest_weights(monkeypatch, tmp_path):
    args = grpo.default_args(**SMALL | {"run_dir": str(tmp_path / "run"), "max_steps": 3,
                                        "bf16": True, "learning_rate": 0.05})
    seen = {"generate_batch": [], "update": []}

    def watch(name, real):
        def watched(model, *rest):
            seen[name].append(model.model.embed_tokens.weight.detach().bfloat16().clone())
            return real(model, *rest)

        monkeypatch.setattr(grpo, name, watched)

    for name in seen:
        watch(name, getattr(grpo, name))
    grpo.train(args, judge)
    assert all(map(torch.equal, seen["generate_batch"], seen["update"]))
    assert len(seen["update"]) == 3 and not torch.equal(seen["update"][0], seen["update"][2])


def test_stop_at_ends_the_run(tmp_path, monkeypatch):
    scores = iter((0.1, 0.5, 0.9))
    monkeypatch.setattr(grpo, "evaluate", lambda *_: (next(scores), []))
    args = grpo.default_args(**SMALL | {"run_dir": str(tmp_path / "run"), "stop_at": 0.5})
    assert grpo.train(args, judge)[1] == 0.5
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 3
    # Good enough before training.
    args = dataclasses.replace(args, run_dir=str(tmp_path / "good"), stop_at=0.0)
    assert grpo.train(args, judge)[1] == 0.9
    assert (tmp_path / "good" / "metrics.csv").read_text() == ""


# Rewards and data


def test_tiny_gpt_must_give_the_exact_text():
    assert [grpo.exact_match(text, {"answer": "081"}) for text in ("081", "81", "0810", "")] == [
        1, 0, 0, 0]


def test_teacher_forgets_to_carry():
    rng, wrong, carries = random.Random(0), 0, 0
    for _ in range(3000):
        row = grpo.addition(rng)
        a, b = map(int, row["prompt"][:-1].split("+"))
        assert int(row["answer"][::-1]) == a + b and len(row["answer"]) == 3
        carry = a % 10 + b % 10 > 9 or a // 10 + b // 10 > 9
        carries += carry
        wrong += row["pretrain_answer"] != row["answer"]
        assert carry or row["pretrain_answer"] == row["answer"]
    assert wrong / carries == pytest.approx(0.8, abs=0.04)


def test_held_out_prompts_are_never_trained_on():
    args = flags(eval_prompts=200)
    draw, heldout = grpo.load_examples(args, grpo.Characters(), CONFIG, grpo.exact_match)
    rng, unseen = random.Random(1), {e["prompt"] for e in heldout}
    assert len(heldout) == 200 and len(unseen) > 150
    assert not unseen & {draw(rng)["prompt"] for _ in range(3000)}
    assert grpo.load_examples(args, grpo.Characters(), CONFIG, grpo.exact_match)[1] == heldout


@pytest.mark.slow
def test_pretraining_follows_the_teacher_with_warmup_and_decay(monkeypatch):
    rates, rng = [], random.Random(1)
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    config, weights, text = grpo.pretrain(flags(pretrain_steps=90), CPU)
    hook.remove()
    model = grpo.make_model(config, weights, CPU, flags())
    held = [grpo.addition(rng, held_out=True) for _ in range(50)]
    with torch.no_grad():
        taught = torch.stack([
            plain_logprobs(model, text.encode(e["prompt"]), [*text.encode(e["pretrain_answer"]), 0])
            for e in held]).mean(0)  # of three digits and the stop token
    assert taught[:3].mean() > -2 and taught[3] > -0.1, taught
    assert rates[:3] == pytest.approx([1e-4, 2e-4, 3e-4]) and rates[29:60] == [3e-3] * 31
    assert rates[-3:] == pytest.approx([3e-4, 2e-4, 1e-4])


def test_pretraining_never_sees_the_held_out_sums(monkeypatch):
    seen, real = [], grpo.addition
    monkeypatch.setattr(grpo, "addition", lambda *args: (seen.append(real(*args)), seen[-1])[1])
    grpo.pretrain(flags(pretrain_steps=5), CPU)
    assert len(seen) == 5 * 256
    assert all(grpo.split_hash(row["prompt"]) >= 0.1 for row in seen)


def test_score_is_the_mean_over_the_processes(monkeypatch):
    monkeypatch.setattr(grpo, "generate", lambda *_, **__: [
        grpo.Completion([1], [1], [0.0], True) for _ in range(2)])
    monkeypatch.setattr(grpo, "all_gather", lambda x: torch.cat([x, x + 0.5]))
    tokenizer = SimpleNamespace(decode=str)
    examples = [{"prompt": "a"}, {"prompt": "b"}]
    assert grpo.evaluate(None, tokenizer, examples, lambda *_: 0.25, flags())[0] == 0.5


def test_completions_are_judged_by_their_own_example(monkeypatch):
    text = grpo.Characters()
    examples = [{"prompt": f"{i:02}=", "answer": str(i)} for i in range(70)]

    def sample(model, prompts, number, *_):
        """Of each prompt the even completions are right."""
        return [grpo.Completion(p, [*text.encode(f"{int(text.decode(p)[:2]) + n % 2:02}"), 0],
                                [0.0] * 3, True) for p in prompts for n in range(number)]

    monkeypatch.setattr(grpo, "sample", sample)
    seen = []

    def reward(completion, example):
        seen.append(float(int(completion) == int(example["answer"])))
        return seen[-1]

    batch, metrics = grpo.generate_batch(None, text, examples[:5], reward, flags())
    assert seen == [1, 0, 1, 0] * 5 and metrics["reward"] == 0.5
    for row, mask, advantage in zip(batch.inputs, batch.mask, batch.advantage):
        right = text.decode(row.tolist())[:2] == text.decode(row.tolist())[3:5]
        assert advantage == (0.5 if right else -0.5) and mask.sum() == 3
    accuracy, transcripts = grpo.evaluate(None, text, examples, reward, flags())
    assert accuracy == 1 and seen[20:] == [1] * 70
    assert transcripts == [{"prompt": f"0{i}=", "completion": f"0{i}", "reward": 1.0}
                           for i in range(3)]


CONFIG = {"max_position_embeddings": 64}  # all that load_examples needs of it


class Numbers(grpo.Characters):
    """As it prints an example, load_examples needs a little more of a tokenizer of a data file."""


    def decode(self, tokens, skip_special_tokens=True):
        return super().decode(tokens)


def data_file(tmp_path, *rows, **changes):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return flags(data=str(path), **changes)


def test_data_file_is_split_by_prompt(tmp_path):
    rows = [{"prompt": f"{i:02}+01=", "answer": i + 1} for i in range(50)]
    args = data_file(tmp_path, *rows, *rows[:5])
    draw, heldout = grpo.load_examples(args, Numbers(), CONFIG, grpo.default_reward)
    unseen = {row["prompt"] for row in heldout}
    assert 3 <= len(unseen) <= 10
    trained = {draw(random.Random(i))["prompt"] for i in range(1000)}
    assert not unseen & trained and len(unseen | trained) == 50
    few = grpo.load_examples(dataclasses.replace(args, eval_prompts=2), Numbers(), CONFIG, len)[1]
    assert 2 <= len(few) <= 3


def test_equal_prompts_stay_on_one_side_of_the_split(tmp_path):
    """Also where the last held-out prompt occurs many times."""
    rows = [{"prompt": str(i % 4), "answer": i} for i in range(40)]
    draw, heldout = grpo.load_examples(data_file(tmp_path, *rows), Numbers(), CONFIG, len)
    unseen = {row["prompt"] for row in heldout}
    assert len(heldout) == 10 and len(unseen) == 1
    assert not unseen & {draw(random.Random(i))["prompt"] for i in range(200)}


def test_only_a_newline_ends_a_row(tmp_path):
    """Not U+2028, which JSON may hold as it is; a byte order mark and \r\n do no harm."""
    row = json.dumps({"prompt": "1=", "answer": "1", "note": "a\u2028b"}, ensure_ascii=False)
    args = data_file(tmp_path)
    text = f"\ufeff{row}\r\n{row}\r\n"
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8", newline="")
    assert len(grpo.read_rows(args.data, dict, False)) == 2


GOOD = {"prompt": "1+1=", "answer": "2"}


@pytest.mark.parametrize(
    "rows, words",
    [
        (["", "  "], ["two different"]),
        ([GOOD, "{"], ["row 2"]),
        ([GOOD, "", [1]], ["row 3", "not a JSON object"]),
        ([{"prompt": "1"}], ["row 1", "answer"]),
        ([GOOD | {"answer": None}], ["row 1", "answer"]),
        ([GOOD | {"answer": ""}], ["row 1", "answer"]),
        ([{"prompt": "1" * 59, "answer": "1"}], ["two different"]),
        ([{"prompt": "", "answer": "1"}], ["row 1", "`prompt` is empty"]),
        ([GOOD, {"prompt": "é", "answer": "1"}], ["row 2"]),
        ([GOOD, GOOD], ["two different"]),
    ],
)
def test_bad_data_ends_in_one_line(rows, words, tmp_path):
    with pytest.raises(SystemExit) as stop:
        grpo.load_examples(data_file(tmp_path, *rows), Numbers(), CONFIG, grpo.default_reward)
    message = stop.value.code
    assert "\n" not in message and all(word in message for word in ["rows.jsonl", *words]), message


def test_prompt_may_take_all_the_room(tmp_path):
    args = data_file(tmp_path, GOOD, {"prompt": "1" * 58, "answer": "1"})
    draw, heldout = grpo.load_examples(args, Numbers(), CONFIG, grpo.default_reward)
    assert "1" * 58 in {heldout[0]["prompt"], draw(random.Random())["prompt"]}


# Runs


def call(capsys, *args, reward=judge):
    """Run the script with these flags. Returns exit code or message, output, and train's result."""
    result, code = None, 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["grpo.py", "--device", "cpu", *map(str, args)])
        try:
            result = grpo.train(grpo.parse_args(), reward)
        except SystemExit as stop:
            code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err, result


@pytest.mark.parametrize(
    "args, words",
    [
        (["--preset", "ppo"], ["--preset ppo", "dapo"]),
        (["--model", "/nowhere/at/all"], ["--model", "--data"]),
        (["--model", "/nowhere/at/all", "--data", __file__], ["--model /nowhere/at/all"]),
        (["--model", "/nowhere/at/all", "--data", "x"], ["--model /nowhere/at/all"]),
        (["--num-generations", 1], ["--num-generations"]),
        (["--temperature", 0], ["--temperature"]),
        (["--num-iterations", 0], ["--num-iterations"]),
        (["--eval-prompts", 0], ["--eval-prompts"]),
        (["--data", "/nowhere.jsonl"], ["--data", "--model"]),
        (["--resume", "/nowhere"], ["/nowhere", "not a run"]),
        (["--max-completion-length", 64, "--pretrain-steps", 0], ["--max-completion-length 64"]),
        (["--device", "cuda"], ["--device cuda"]),
    ],
)
def test_mistakes_end_in_one_line(args, words, capsys, monkeypatch):
    if "cuda" in args and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = call(capsys, *args)[0]
    assert isinstance(message, str) and "\n" not in message
    assert all(word in message for word in words), message


def test_resume_of_a_foreign_file_ends_in_one_line(tmp_path, capsys):
    for content in (b"no", b""):
        (tmp_path / "checkpoint.pt").write_bytes(content)
        message = call(capsys, "--resume", tmp_path)[0]
        assert isinstance(message, str) and "\n" not in message and str(tmp_path) in message


def test_defaults_depend_on_model_and_preset(monkeypatch):
    words = ["--model", "x", "--preset", "grpo", "--beta", "0.5", "--lora-rank", "4"]
    monkeypatch.setattr(sys, "argv", ["grpo.py", *words])
    args = grpo.parse_args()
    assert (args.learning_rate, args.max_completion_length, args.beta) == (1e-4, 256, 0.5)
    assert (args.loss_type, args.scale_rewards) == ("grpo", "group")
    assert grpo.default_args(model="x", device="cpu") == grpo.Args(
        model="x", device="cpu", batch_size=32, max_completion_length=256, micro_batch_size=4,
        warmup_ratio=0.1, eval_every=0, learning_rate=2e-6)
    assert grpo.default_args() == grpo.Args()


def test_defaults_are_those_of_the_device(monkeypatch):
    """On a machine with a GPU, --device cpu has the defaults of a CPU."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    for device, bf16, rows in (("cpu", False, 4), ("cuda", True, 8)):
        monkeypatch.setattr(sys, "argv", ["grpo.py", "--model", "x", "--device", device])
        args = grpo.parse_args()
        assert (args.bf16, args.micro_batch_size) == (bf16, rows)


def test_flags_that_a_resumed_run_cannot_change(tmp_path, capsys):
    assert call(capsys, *SHORT, "--max-steps", 1, "--run-dir", tmp_path)[0] == 0
    for words in (["--preset", "grpo"], ["--lora-rank", 2], ["--model", "x"]):
        message = call(capsys, "--resume", tmp_path, "--max-steps", 2, *words)[0]
        assert "cannot change" in message and "\n" not in message


def test_a_copied_folder_is_continued_in_its_place(tmp_path, capsys):
    one, two = tmp_path / "one", tmp_path / "two"
    assert call(capsys, *SHORT, "--max-steps", 1, "--run-dir", one)[0] == 0
    shutil.copytree(one, two)
    assert call(capsys, "--resume", two, "--max-steps", 2)[0] == 0
    assert (len(metrics(one)), len(metrics(two))) == (1, 2)


SHORT = ["--pretrain-steps", 2, "--batch-size", 8, "--eval-prompts", 16, "--eval-every", 2]


def saved(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)


def weights(run):
    return torch.cat([x.flatten() for x in saved(run)["model"].values()])


def metrics(run):
    """All columns but those of time."""
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    return [{name: x for name, x in row.items() if "second" not in name} for row in rows]


def model_flags(folder):
    return [word for name, value in folder.items()
            for word in ("--" + name.replace("_", "-"), value)]


@pytest.mark.parametrize("kind", ["tiny", "grpo", "lora", "bf16"])
def test_resumed_run_equals_an_uninterrupted_one(kind, folder, tmp_path, capsys):
    """Ten batches, or six and four more: the same metrics and the same weights, to the bit."""
    extra = {"tiny": [], "grpo": ["--preset", "grpo", "--num-iterations", 2], "bf16": ["--bf16"],
             "lora": [*model_flags(folder), "--lora-rank", 2, "--beta", 0.1]}[kind]
    one, two = tmp_path / "one", tmp_path / "two"
    flags = [*SHORT, *extra, "--eval-every", 3]
    assert call(capsys, *flags, "--max-steps", 10, "--run-dir", one)[0] == 0
    assert call(capsys, *flags, "--max-steps", 6, "--run-dir", two)[0] == 0
    assert not torch.equal(weights(one), weights(two))
    assert call(capsys, "--resume", two, "--max-steps", 10)[0] == 0
    assert torch.equal(weights(one), weights(two))
    assert metrics(one) == metrics(two) and len(metrics(one)) == 10
    if kind == "lora":
        assert all("lora_" in name for name in saved(one)["model"])
        assert saved(one)["pretrained"] is None


def test_learning_rate_of_a_resumed_run_can_be_changed(tmp_path, capsys):
    call(capsys, *SHORT, "--max-steps", 1, "--run-dir", tmp_path)
    before = weights(tmp_path)
    call(capsys, "--resume", tmp_path, "--max-steps", 3, "--learning-rate", 0.0)
    assert torch.equal(weights(tmp_path), before) and len(metrics(tmp_path)) == 3


def test_rows_newer_than_the_checkpoint_are_dropped(tmp_path, capsys):
    call(capsys, *SHORT, "--max-steps", 2, "--run-dir", tmp_path)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("3,1,2,3\n")
    call(capsys, "--resume", tmp_path, "--max-steps", 3)
    assert [row["step"] for row in metrics(tmp_path)] == ["1", "2", "3"]
    assert None not in metrics(tmp_path)[2].values()


def test_resume_with_the_checkpoint_alone(tmp_path, capsys):
    call(capsys, *SHORT, "--max-steps", 2, "--run-dir", tmp_path)
    (tmp_path / "metrics.csv").unlink()
    assert call(capsys, "--resume", tmp_path, "--max-steps", 3)[0] == 0
    assert [row["step"] for row in metrics(tmp_path)] == ["3"]


def test_an_error_in_an_evaluation_leaves_no_row_twice(tmp_path, capsys):
    """The batch was learned from, so it is saved, but it has no row."""
    calls = count()

    def reward(text, example):
        if next(calls) == 16 + 2 * 64 + 5:  # in the evaluation after the second batch
            raise ZeroDivisionError("the user's own")
        return judge(text, example)

    with pytest.raises(ZeroDivisionError):
        call(capsys, *SHORT, "--max-steps", 5, "--run-dir", tmp_path, reward=reward)
    assert saved(tmp_path)["progress"]["step"] == 2
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("3,1,2,3\n")
    call(capsys, "--resume", tmp_path, "--max-steps", 4)
    assert [row["step"] for row in metrics(tmp_path)] == ["1", "3", "4"]


@pytest.mark.parametrize("updates", [1, 2])
def test_an_error_between_two_updates_does_not_save_half_a_batch(updates, tmp_path, capsys):
    calls = count()

    def reward(text, example):
        if next(calls) == 16 + 64 + 5:  # in the second batch
            raise ZeroDivisionError("the user's own")
        return judge(text, example)

    with pytest.raises(ZeroDivisionError):
        call(capsys, *SHORT, "--max-steps", 5, "--run-dir", tmp_path, "--num-iterations", updates,
             reward=reward)
    assert (tmp_path / "checkpoint.pt").exists() == (updates == 1)


def test_run_killed_before_its_first_checkpoint_can_begin_again(tmp_path, capsys):
    (tmp_path / "metrics.csv").write_text("step,seconds\n1,2\n2,3\n")
    assert call(capsys, *SHORT, "--max-steps", 2, "--run-dir", tmp_path)[0] == 0
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines[0].startswith("step,seconds,score,reward") and len(lines) == 3


def test_folder_that_holds_a_run_is_refused(tmp_path, capsys):
    assert call(capsys, *SHORT, "--max-steps", 1, "--run-dir", tmp_path)[0] == 0
    before = (tmp_path / "checkpoint.pt").read_bytes()
    message = call(capsys, *SHORT, "--max-steps", 1, "--run-dir", tmp_path)[0]
    assert "--run-dir" in message and "\n" not in message
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_checkpoints_do_not_change_the_training(tmp_path, capsys):
    """Also one before the first real update: in the first two batches all rewards are equal."""
    for name, seconds in (("never", 1e9), ("always", 0)):
        calls = count()
        call(capsys, *SHORT, "--max-steps", 5, "--run-dir", tmp_path / name, "--checkpoint-seconds",
             seconds, reward=lambda text, example: (
                 judge(text, example) * (next(calls) >= 16 + 2 * 64 + 16)))  # noqa: B023
    one, two = metrics(tmp_path / "never"), metrics(tmp_path / "always")
    assert [row["equal_groups"] for row in one][:2] == ["1.0", "1.0"] and str(one) == str(two)
    assert float(one[2]["equal_groups"]) < 1
    assert torch.equal(weights(tmp_path / "never"), weights(tmp_path / "always"))


def test_checkpoints_are_written_while_the_run_goes_on(tmp_path, capsys, monkeypatch):
    steps, save = [], grpo.Logger.save
    monkeypatch.setattr(grpo.Logger, "save", lambda self: (steps.append(self.step), save(self)))
    call(capsys, *SHORT, "--max-steps", 3, "--run-dir", tmp_path / "a", "--checkpoint-seconds", 0)
    assert steps == [1, 2, 3, 3]
    steps.clear()
    call(capsys, *SHORT, "--max-steps", 3, "--run-dir", tmp_path / "b")
    assert steps == [3]


def test_exported_folder_is_the_trained_model(folder, tmp_path, capsys):
    """Adapters are merged. transformers and --model open it; the checkpoint has adapters alone."""
    transformers = pytest.importorskip("transformers")
    flags = [*SHORT, *model_flags(folder | {"learning_rate": 0.1}), "--lora-rank", 4]
    code, *_, result = call(capsys, *flags, "--max-steps", 2, "--run-dir", tmp_path / "run")
    assert code == 0
    trained = result[0]
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").eval()
    args = grpo.default_args(model=str(tmp_path / "run" / "model"), bf16=False, device="cpu")
    config, state, tokenizer = grpo.load_model(args)
    again = grpo.make_model(config, state, CPU, args)
    assert tokenizer.encode("w5 w1") == [5, 1] and tokenizer.stop_ids == [3]
    tokens = torch.tensor([[5, 9, 30, 2, 7]])
    logits = [F.linear(m(tokens), m.output_weight()) for m in (trained, again)]
    torch.testing.assert_close(logits[0], peer(tokens).logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)
    adapters = saved(tmp_path / "run")["model"]
    assert len(adapters) == 2 * 7 * 2 and all("lora_" in name for name in adapters)
    assert adapters["model.layers.0.mlp.up_proj.lora_b"].abs().max() > 0


def test_ctrl_c_finishes_the_batch_saves_and_exits_with_130(tmp_path, capsys):
    """And the run continues as if nothing had happened."""
    calls = count()

    def reward(text, example):
        if next(calls) == 2 * 16 + 70:  # in the second batch
            signal.raise_signal(signal.SIGINT)
        return judge(text, example)

    code, out, *_ = call(capsys, *SHORT, "--max-steps", 5, "--run-dir", tmp_path / "a",
                         reward=reward)
    assert code == 130 and "after 2 batches" in out
    assert saved(tmp_path / "a")["progress"]["step"] == len(metrics(tmp_path / "a")) == 2
    assert call(capsys, "--resume", tmp_path / "a")[0] == 0
    call(capsys, *SHORT, "--max-steps", 5, "--run-dir", tmp_path / "b")
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")


def test_handler_of_ctrl_c_is_restored(tmp_path, capsys):
    before = signal.getsignal(signal.SIGINT)
    assert call(capsys, *SHORT, "--max-steps", 1, "--run-dir", tmp_path)[0] == 0
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_during_the_last_save_does_not_stop_it(tmp_path, capsys, monkeypatch):
    save = torch.save

    def pressed(*args):
        signal.raise_signal(signal.SIGINT)
        save(*args)

    monkeypatch.setattr(torch, "save", pressed)
    with contextlib.suppress(KeyboardInterrupt):  # it would end pytest
        assert call(capsys, *SHORT, "--max-steps", 2, "--run-dir", tmp_path)[0] == 130
    assert saved(tmp_path)["progress"]["step"] == 2


def test_second_ctrl_c_stops_at_once(tmp_path, capsys):
    calls = count()

    def reward(text, example):
        if next(calls) in (100, 101):
            signal.raise_signal(signal.SIGINT)
        return judge(text, example)

    code = call(capsys, *SHORT, "--max-steps", 5, "--run-dir", tmp_path, reward=reward)[0]
    assert code == 130 and not (tmp_path / "checkpoint.pt").exists()


def test_the_export_of_a_bf16_run_is_not_rounded(folder, tmp_path, capsys):
    from safetensors.torch import load_file

    flags = [*SHORT, *model_flags(folder), "--bf16", "--max-steps", 2, "--run-dir", tmp_path]
    assert call(capsys, *flags)[0] == 0
    weight = load_file(tmp_path / "model" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(weight, saved(tmp_path)["model"]["model.embed_tokens.weight"])
    assert not torch.equal(weight, weight.bfloat16().float())


def test_error_in_the_reward_keeps_its_traceback_and_what_was_learned(tmp_path, capsys):
    calls = count()

    def reward(text, example):
        if next(calls) == 16 + 2 * 64 + 16 + 5:  # in the third batch
            raise ZeroDivisionError("the user's own")
        return judge(text, example)

    with pytest.raises(ZeroDivisionError, match="own") as error:
        call(capsys, *SHORT, "--max-steps", 5, "--run-dir", tmp_path, reward=reward)
    assert error.traceback[-1].name == "reward"
    assert saved(tmp_path)["progress"]["step"] == 2 and saved(tmp_path)["optimizer"]


def test_ctrl_c_during_the_exchange_is_not_lost(monkeypatch):
    log = grpo.Logger.__new__(grpo.Logger)
    log.interrupted, log.score, log.args = False, float("nan"), flags()
    monkeypatch.setattr(grpo, "all_gather_object", lambda sent: (
        setattr(log, "interrupted", True) or [sent]))
    assert not log.stopped()  # the other processes do not know of it yet
    assert log.interrupted


def test_ctrl_c_in_one_process_stops_all(monkeypatch):
    log = grpo.Logger.__new__(grpo.Logger)
    log.interrupted, log.score, log.args = False, float("nan"), flags()
    monkeypatch.setattr(grpo, "all_gather_object", lambda sent: [sent, True])
    assert log.stopped()


@pytest.mark.parametrize("processes", [1, 2])
def test_after_an_error_in_one_of_several_processes_nothing_is_saved(processes, monkeypatch):
    """Saving would wait for the others, which are in a batch."""
    log, saves = grpo.Logger.__new__(grpo.Logger), []
    monkeypatch.setattr(grpo.dist, "is_initialized", lambda: processes > 1)
    monkeypatch.setattr(grpo.dist, "get_rank", lambda: 1)
    vars(log).update(args=flags(), interrupted=False, bar=SimpleNamespace(close=int), step=1,
                     score=0.0, seconds=1.0, dir="x", save=lambda: saves.append(1),
                     old_handler=signal.getsignal(signal.SIGINT))
    log.__exit__(ValueError, ValueError(), None)
    assert len(saves) == (processes == 1)


def test_non_finite_reward_ends_the_run_and_keeps_the_weights(tmp_path, capsys):
    calls = count()
    with pytest.raises(RuntimeError, match="non-finite"):
        call(capsys, *SHORT, "--max-steps", 5, "--run-dir", tmp_path, reward=lambda text, example: (
            judge(text, example) / (next(calls) != 16 + 2 * 64 + 16 + 5 or float("nan"))))
    assert saved(tmp_path)["progress"]["step"] == 2 and weights(tmp_path).isfinite().all()


def test_summary_compares_before_and_after(tmp_path, capsys):
    out = call(capsys, *SHORT, "--max-steps", 1, "--run-dir", tmp_path)[1]
    assert re.search(r"after 0 batches: mean reward [0-9.]+ on held-out prompts", out)
    assert "after 1 batches: mean reward" in out
    assert len(re.findall("  '[0-9]+.[0-9]+=': '", out)) == 6
    assert "all rewards are 0" not in out
    code, out, *_ = call(capsys, *SHORT, "--max-steps", 1, "--run-dir", tmp_path / "none",
                         reward=lambda text, example: 0.0)
    assert code == 0 and "Warning: all rewards are 0" in out


def test_transcripts_of_evaluations_are_kept(tmp_path, capsys):
    assert call(capsys, *SHORT, "--max-steps", 4, "--run-dir", tmp_path)[0] == 0
    rows = [json.loads(line) for line in (tmp_path / "transcripts.jsonl").open()]
    assert [row["step"] for row in rows] == [2, 2, 2, 4, 4, 4]
    assert all(row["reward"] == judge(row["completion"], row) for row in rows)
    assert rows[0]["prompt"] == rows[3]["prompt"]


def test_step_size_grows_at_the_beginning(tmp_path, monkeypatch):
    rates, update = [], grpo.update
    monkeypatch.setattr(grpo, "update", lambda *args: (
        rates.append(args[2].param_groups[0]["lr"]), update(*args))[1])
    args = grpo.default_args(**SMALL | {"run_dir": str(tmp_path), "max_steps": 6,
                                        "warmup_ratio": 0.5, "learning_rate": 0.3})
    grpo.train(args, judge)
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.3, 0.3, 0.3])


def test_speed_is_logged_in_tokens_per_second(tmp_path, capsys):
    call(capsys, *SHORT, "--max-steps", 2, "--run-dir", tmp_path)
    for row in csv.DictReader((tmp_path / "metrics.csv").open()):
        tokens = 64 * float(row["length"])
        times = [tokens / float(row[f"{part}_tokens_per_second"]) for part in ("sample", "update")]
        assert 0 < sum(times) < float(row["seconds"])


def test_ctrl_c_works_after_a_run_that_wandb_refuses(tmp_path, capsys, monkeypatch):
    def refuse(**_):
        raise RuntimeError("not logged in")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refuse))
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError, match="not logged in"):
        call(capsys, *SHORT, "--max-steps", 1, "--track", "--run-dir", tmp_path)
    assert signal.getsignal(signal.SIGINT) is before
    assert call(capsys, *SHORT, "--max-steps", 1, "--run-dir", tmp_path)[0] == 0


def test_the_stop_token_does_not_belong_to_the_text():
    """Also if the tokenizer does not know that it is special."""
    tokenizer = SimpleNamespace(decode=lambda tokens: "".join("ab|"[token] for token in tokens))
    for tokens, finished, text in (([0, 1, 2], True, "ab"), ([0, 1, 0], False, "aba")):
        completion = grpo.Completion([0], tokens, [0.0] * 3, finished)
        assert grpo.completion_text(completion, tokenizer) == text


def test_tracking(tmp_path, capsys, monkeypatch):
    """The rows go to wandb; a resumed run goes on under its id."""
    rows, runs = [], []
    fake = SimpleNamespace(init=lambda **settings: (runs.append(settings), SimpleNamespace(
        id=settings["id"] or "new", log=lambda row, step: rows.append(row)))[1])
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run = tmp_path / "run"
    assert call(capsys, *SHORT, "--max-steps", 2, "--track", "--run-dir", run)[0] == 0
    assert call(capsys, "--resume", run, "--max-steps", 3)[0] == 0
    assert [row["step"] for row in rows] == [1, 2, 3] and "reward" in rows[0]
    assert [(r["id"], r["resume"], r["project"]) for r in runs] == [
        (id_, "allow", "policy-gradients") for id_ in (None, "new")]


def test_short_run_learns_and_one_without_steps_does_not(tmp_path, capsys, monkeypatch):
    pretrain_once(grpo, monkeypatch)
    gains = []
    for rate, steps in ((3e-4, 40), (1e-11, 2)):
        out = call(capsys, "--pretrain-steps", 220, "--max-steps", steps, "--eval-every", 40,
                   "--learning-rate", rate, "--run-dir", tmp_path / str(rate),
                   reward=grpo.default_reward)[1]
        before, after = re.findall(r"batches: mean reward ([0-9.]+)", out)
        gains.append(float(after) - float(before))
    assert gains[0] > 0.3 and abs(gains[1]) < 0.02
    assert max(float(row["sampler_gap_max"]) for row in metrics(tmp_path / "0.0003")) < 1e-4


def test_copy_alone_in_an_empty_folder(tmp_path):
    shutil.copy(ROOT / "grpo.py", tmp_path)
    command = [sys.executable, "grpo.py", *map(str, SHORT), "--max-steps", "2", "--device", "cpu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "held-out prompts" in done.stdout, done.stderr
    assert "Traceback" not in done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("grpo-addition-1-")
    assert {"args.json", "checkpoint.pt", "metrics.csv", "transcripts.jsonl"} == {
        path.name for path in run.iterdir()}


# More than one process

CASES = {  # model and flags
    "tied": ({}, {"beta": 0.1, "loss_type": "dapo", "scale_rewards": "batch"}),
    "untied": ({"tie_word_embeddings": False, "model_type": "qwen2"},
               {"beta": 0.1, "loss_type": "grpo", "gradient_checkpointing": True}),
    "lora": ({"tie_word_embeddings": False}, {"beta": 0.1, "lora_rank": 3}),
    "bf16": ({}, {"bf16": True, "num_iterations": 1}),
    "equal": ({}, {}),  # all groups of the second process have equal rewards
}


def recorded_updates(name, rank=0, world_size=1):
    """Take three updates with a recorded batch, one in bfloat16; return weights and metrics."""
    changes, extra = CASES[name]
    args = flags(**{"micro_batch_size": 3, "max_grad_norm": 0.3, "num_iterations": 2} | extra)
    prompts, completions, rewards = random_rows(num_prompts=6)
    for row in range(4 * 6):
        if row // 4 % 2 and (name == "equal" or row // 4 == 3):  # unequal shares of the work
            rewards[row] = 1.0
    own = range(rank, 6, world_size)
    batch, means = recorded_batch(
        [prompts[i] for i in own], [c for i in own for c in completions[4 * i : 4 * i + 4]],
        [r for i in own for r in rewards[4 * i : 4 * i + 4]], args)
    base = tiny(**changes)
    state = {key: value.detach().clone() for key, value in base.state_dict().items()}
    torch.manual_seed(5)  # of the adapters
    model = grpo.make_model(base.config, state, CPU, args)
    reference = None
    if args.beta:
        if args.lora_rank and world_size == 1:
            state = dict(model.named_parameters())
        reference = grpo.make_model(base.config, state, CPU, args, is_reference=True)
    for key, param in model.named_parameters():  # a process keeps its rows alone
        shard = param.to_local() if world_size > 1 else param
        rows = math.ceil(len(param) / world_size)
        assert shard.untyped_storage().nbytes() <= 4 * rows * math.prod(param.shape[1:]), key
    sampler = grpo.make_sampler(model, args)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5, 0.9)
    for _ in range(1 if args.bf16 else 3):
        means |= grpo.update(model, reference, optimizer, batch, args)
    grpo.update_sampler(sampler, model)
    weights = {key: grpo.full_tensor(x).clone() for key, x in model.named_parameters()}
    for key, copy in sampler.named_parameters():
        assert torch.equal(copy, weights[key].to(copy.dtype)), key
    return weights, means


def leave():
    """End this process. After FSDP on CPUs a plain exit sometimes aborts in threads of gloo."""
    grpo.dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


RANKS = """
import os, sys, torch
sys.path[:0] = [{root!r}, {tests!r}]
import test_grpo as t
rank = int(os.environ["RANK"])
t.grpo.dist.init_process_group("gloo")
torch.set_num_threads(1)
torch.save({{name: t.recorded_updates(name, rank, 2) for name in t.CASES}}, {path!r} + str(rank))
t.leave()
"""


def torchrun(*command):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", *map(str, command)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        out, err = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its workers
        process.communicate(timeout=60)
        raise
    assert process.returncode == 0, err[-3000:]
    return out


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path):
    """A recorded batch, its groups spread unequally: the same weights, to rounding."""
    path, script = str(tmp_path / "rank"), tmp_path / "ranks.py"
    script.write_text(RANKS.format(root=str(ROOT), tests=str(ROOT / "tests"), path=path))
    torchrun(script)
    ours, theirs = (torch.load(path + r) for r in "01")
    for name in CASES:
        alone, means = recorded_updates(name)
        start = tiny(**CASES[name][0]).state_dict()
        for key, weight in alone.items():
            both, other = ours[name][0][key], theirs[name][0][key]
            assert torch.equal(both, other), (name, key)
            if name != "bf16":
                torch.testing.assert_close(both, weight, atol=1e-5, rtol=1e-4)
            else:  # up to rounding
                change = [(x - start[key]).flatten() for x in (both, weight)]
                assert F.cosine_similarity(*change, 0) > 0.98, key
        for key in means:
            assert ours[name][1][key] == theirs[name][1][key]
            if name != "bf16" and "gap" not in key:
                expected = pytest.approx(float(means[key]), rel=1e-3, abs=1e-5)
                assert float(ours[name][1][key]) == expected, (name, key)


RUNS = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import grpo, test_grpo
grpo.dist.init_process_group("gloo")
grpo.dist.init_process_group = grpo.dist.destroy_process_group = lambda *_, **__: None
for flags in {calls!r}:
    sys.argv = ["grpo.py", "--device", "cpu", *flags]
    grpo.train(grpo.parse_args(), test_grpo.judge)
test_grpo.leave()
"""


@pytest.mark.slow
def test_runs_of_two_processes(folder, tmp_path, capsys):
    """They train, write once, resume, export; one process can go on with their checkpoint."""
    run, lora = tmp_path / "run", tmp_path / "lora"
    model = [*model_flags(folder), "--batch-size", 4, "--eval-prompts", 6, "--beta", 0.1, "--bf16"]
    calls = [
        [*SHORT, "--preset", "grpo", "--max-steps", 2, "--run-dir", run],
        ["--resume", run, "--max-steps", 3],
        [*model, "--lora-rank", 2, "--max-steps", 2, "--run-dir", lora],
        [*model, "--gradient-checkpointing", "--max-steps", 2, "--run-dir", tmp_path / "full"],
    ]
    script = tmp_path / "runs.py"
    calls = [[str(word) for word in call] for call in calls]
    script.write_text(RUNS.format(root=str(ROOT), tests=str(ROOT / "tests"), calls=calls))
    out = torchrun(script)
    assert out.count("batches: mean reward") == 8 and out.count("files in") == 4
    assert call(capsys, "--resume", run, "--max-steps", 4)[0] == 0
    assert [row["step"] for row in metrics(run)] == ["1", "2", "3", "4"]
    assert all("lora_" in name for name in saved(lora)["model"])
    transformers = pytest.importorskip("transformers")
    for name in ("lora", "full"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name / "model")
        assert max(float(row["sampler_gap_mean"]) for row in metrics(tmp_path / name)) < 0.1


def test_batch_that_processes_cannot_share_is_refused(monkeypatch):
    monkeypatch.setattr(grpo.dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(grpo.dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(grpo.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(grpo.dist, "get_world_size", lambda: 3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(SystemExit) as stop:
        grpo.setup(flags())
    assert "--batch-size 128" in stop.value.code and "\n" not in stop.value.code


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_begin_with_the_same_seed(rank, monkeypatch):
    """Then pretraining and adapters give all of them the same weights."""
    monkeypatch.setattr(grpo.dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(grpo.dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(grpo.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(grpo.dist, "get_rank", lambda: rank)
    monkeypatch.setattr(grpo.dist, "get_world_size", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    threads = torch.get_num_threads()
    grpo.setup(flags(seed=7))
    torch.set_num_threads(threads)
    assert torch.initial_seed() == 7


# Further cases


def test_gradient_checkpointing_does_not_change_sampling():
    plain, model = tiny(), tiny()
    model.checkpointing = True
    rows, others = (seeded_sample(1, m, [[1, 2, 3], [4]], 3, 8, 1.0, [0]) for m in (plain, model))
    assert rows == others


def test_the_last_batch_is_evaluated(tmp_path, monkeypatch):
    """Also if its number is no multiple of --eval-every."""
    scores = iter((0.1, 0.2, 0.9))  # before training, after 2 and after 3 batches
    monkeypatch.setattr(grpo, "evaluate", lambda *_: (next(scores), []))
    args = grpo.default_args(**SMALL | {"run_dir": str(tmp_path / "run"), "max_steps": 3})
    assert grpo.train(args, judge)[1] == 0.9


def test_reward_without_one_of_the_users(folder, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(grpo, "evaluate", lambda *rest: (seen.append(rest[3]), (0.0, []))[1])
    for extra in ({}, folder):
        grpo.train(grpo.default_args(**SMALL | extra | {
            "run_dir": str(tmp_path / f"run{len(seen)}"), "stop_at": 0.0}))
    assert seen == [grpo.exact_match, grpo.default_reward]


def test_a_checkpoint_cannot_run_code(tmp_path, capsys):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    torch.save({"args": Code()}, tmp_path / "checkpoint.pt")
    assert "not a run" in call(capsys, "--resume", tmp_path)[0]
    assert not (tmp_path / "made").exists()


def test_clip_fraction_of_sequences_by_hand():
    """The geometric mean of the ratios is 1, so nothing is clipped."""
    ratios, zeros = torch.tensor([[0.5, 2.0, 1.0]]), torch.zeros(1, 3)
    batch = grpo.Batch(None, None, torch.tensor([[True, True, False]]), zeros, None, None)
    args = flags(importance_sampling_level="sequence", epsilon=0.2, epsilon_high=0.5)
    metrics = grpo.update_metrics(batch, ratios.log(), zeros, torch.tensor(2), args)
    assert metrics["clip_fraction"] == 0


def test_a_later_batch_of_equal_groups_changes_nothing():
    """Also when AdamW has momentum."""
    model, args = tiny(), flags()
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    grpo.update(model, None, optimizer, recorded_batch(*random_rows(), args)[0], args)
    before = [p.clone() for p in model.parameters()]
    batch, _ = recorded_batch([[1]], [[2, 0], [3, 0]], [1.0, 1.0], args)
    grpo.update(model, None, optimizer, batch, args)
    assert all(map(torch.equal, before, model.parameters()))


def test_held_out_prompts_count_the_same_in_unequal_shares(monkeypatch):
    """This process has two, another has one."""
    monkeypatch.setattr(grpo, "generate", lambda *_, **__: [
        grpo.Completion([1], [1], [0.0], True) for _ in range(2)])
    monkeypatch.setattr(grpo, "all_gather", lambda x: torch.cat([x, torch.ones(1)]))
    tokenizer, examples = SimpleNamespace(decode=str), [{"prompt": "a"}, {"prompt": "b"}]
    assert grpo.evaluate(None, tokenizer, examples, lambda *_: 0.25, flags())[0] == 0.5


def test_sampling_batch_size_counts_completions(monkeypatch):
    sizes, tokenizer = [], SimpleNamespace(encode=lambda *_, **__: [1], stop_ids=[3])
    monkeypatch.setattr(grpo, "sample", lambda model, prompts, number, *_: (
        sizes.append(len(prompts) * number) or []))
    grpo.generate(None, tokenizer, [{"prompt": "a"}] * 7, flags(sampling_batch_size=9))
    grpo.generate(None, tokenizer, [{"prompt": "a"}] * 2, flags(sampling_batch_size=3))
    assert sizes == [8, 8, 8, 4, 4, 4]


def test_norms_of_a_bf16_sampler_stay_in_float32():
    base, args = tiny(model_type="qwen3"), flags(bf16=True)
    model = grpo.make_model(base.config, base.state_dict(), CPU, args)
    dtypes = {("norm" in name, param.dtype)
              for name, param in grpo.make_sampler(model, args).named_parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}


@pytest.mark.parametrize("waited, count", [((0.0, 1e9), 0), ((1e9, 0.0), 1)])
def test_checkpoints_go_by_the_clock_of_the_first_process(waited, count, monkeypatch):
    """Saving needs all processes, so all must decide the same."""
    log, saves = grpo.Logger.__new__(grpo.Logger), []
    monkeypatch.setattr(grpo, "get_rank", lambda: 1)
    monkeypatch.setattr(grpo, "all_gather_object", lambda _: waited)
    bar = SimpleNamespace(set_postfix=lambda **_: None, update=lambda: None)
    vars(log).update(args=flags(), bar=bar, start=0.0, saved_at=0.0, score=0.0,
                     save=lambda: saves.append(1))
    log.write()
    assert len(saves) == count


def test_the_seconds_of_a_resumed_run_go_on(tmp_path, capsys):
    assert call(capsys, *SHORT, "--max-steps", 1, "--run-dir", tmp_path)[0] == 0
    state = saved(tmp_path)
    state["progress"]["seconds"] = 5000.0
    torch.save(state, tmp_path / "checkpoint.pt")
    assert call(capsys, "--resume", tmp_path, "--max-steps", 2)[0] == 0
    *_, last = csv.DictReader((tmp_path / "metrics.csv").open())
    assert float(last["seconds"]) > 5000


def test_gradients_are_exchanged_once_per_update(monkeypatch):
    """After the last micro-batch: not after each, which would cost as much traffic each time."""
    model, last, args = tiny(), [], flags(micro_batch_size=5)
    monkeypatch.setattr(grpo, "set_gradient_sync", lambda model, is_last: last.append(is_last))
    gradient(model, recorded_batch(*random_rows(), args)[0], args)
    assert last == [False, False, True]
