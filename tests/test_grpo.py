"""grpo.py: the algorithm to the equation, sampling, packs, files, tasks, resume, two processes."""

import csv
import dataclasses
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, teach_once
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.optimizer import register_optimizer_step_pre_hook

import grpo

CPU = torch.device("cpu")
VARIANTS = {name: dict(zip(grpo.PRESET_FLAGS, row)) for name, row in grpo.PRESETS.items()}


def tiny(vocabulary=11, seed=0, rank=0, **changes):
    torch.manual_seed(seed)
    config = (
        grpo.tiny_config(vocabulary)
        | {"hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 2}
        | changes
    )
    model = grpo.Decoder(grpo.settled(config, "tiny"), rank)
    for param in model.parameters():
        if param.dim() == 2:
            torch.nn.init.normal_(param, std=0.4)
    return model


def flags(**changes):
    values = (
        VARIANTS["default"]
        | {"max_completion_length": 6, "learning_rate": 0.01, "bf16": False, "num_generations": 4}
        | changes
    )
    return grpo.Args(**values)


def plain_logprobs(model, prompt, completion, temperature=1.0):
    """Log-probabilities of the completion's tokens: one row, no cache, no packs."""
    tokens = torch.tensor([[*prompt, *completion]])
    length = tokens.shape[1]
    mask = torch.ones(1, length, length, dtype=torch.bool).tril()
    states = model.states(tokens, torch.arange(length)[None], mask)[0]
    logits = F.linear(states, model.lm_head.weight) / temperature
    rows = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return rows.gather(1, torch.tensor(completion)[:, None])[:, 0]


def make_answers(prompts, completions, advantage, sampled=None):
    """Answers to learn from: completions a list of (prompt number, tokens)."""
    width = max(len(c) for _, c in completions)
    mask = torch.zeros(len(completions) + 1, width, dtype=torch.bool)
    for row, (_, tokens) in enumerate(completions):
        mask[row, : len(tokens)] = True
    advantage = torch.cat([torch.as_tensor(advantage), torch.zeros(1)])
    sampled = torch.zeros(mask.shape) if sampled is None else sampled
    listed = [(index, row, tokens) for row, (index, tokens) in enumerate(completions)]
    return grpo.Answers(prompts, listed, mask, sampled, advantage)


def random_answers(seed=0, num_prompts=3, generations=4):
    rng = random.Random(seed)
    prompts = [[rng.randrange(11) for _ in range(rng.randint(1, 9))] for _ in range(num_prompts)]
    completions = [
        (i, [rng.randrange(11) for _ in range(rng.randint(1, 6))])
        for i in range(num_prompts)
        for _ in range(generations)
    ]
    completions[0] = (0, [1, 2, 3, 4, 5, 0])
    advantage = [rng.gauss(0, 1) for _ in completions]
    return make_answers(prompts, completions, advantage)


class Still(torch.optim.SGD):
    """Takes no step, so that gradients can be looked at."""

    def __init__(self, params):
        super().__init__(params, lr=0.0)


def gradient(model, batch, args, reference=None):
    model.zero_grad()
    means = grpo.improve(model, reference, Still(model.parameters()), batch, args)
    return torch.cat([p.grad.flatten() for p in model.parameters()]), means


# The algorithm


def test_the_docstring_shows_the_presets():
    rows = [
        line.split()
        for line in grpo.__doc__.splitlines()
        if line.split() and line.split()[0] in grpo.PRESETS
    ]
    shown = {name: (*words[:3], *map(float, words[3:6])) for name, *words in rows}
    assert shown == grpo.PRESETS


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
        (-1.0, 0.5, 0.0),  # gone far enough where Â asks for it
        (1.0, 0.5, 1.0),
        (-1.0, 1.5, 1.0),
        (1.0, 1.25, 1.0),  # ε_high is larger than ε
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
    """No token loses its gradient: it is the clipped ratio times Â, and the ratio has none."""
    logprob = torch.tensor([[0.1, 2.0, -3.0]], dtype=torch.float64, requires_grad=True)
    loss = grpo.policy_loss(logprob.exp(), logprob, torch.tensor([0.5]), "cispo", 0.2, 4.0)
    gradient = torch.autograd.grad(loss.sum(), logprob)[0]
    torch.testing.assert_close(gradient, -0.5 * logprob.exp().clamp(max=5))


def test_token_weights_by_hand():
    """Two rows of a batch of 5 rows, 10 tokens and at most 4 a completion."""
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


def asked(monkeypatch, **changes):
    """What ask makes of four prompts' recorded completions: right, wrong, equal, cut off."""
    rows = torch.tensor([[7, 0, 0], [8, 0, 0], [7, 0, 0], [7, 0, 0], [8, 7, 7], [7, 0, 0]])
    length, ended = torch.tensor([2, 2, 2, 2, 3, 2]), torch.tensor([1, 1, 1, 1, 0, 1]).bool()
    sampled = torch.arange(18.0).view(6, 3)
    monkeypatch.setattr(grpo, "sample", lambda *args: (rows, length, ended, sampled))
    monkeypatch.setattr(grpo, "reward", lambda text, example: float(text == example["answer"]))
    text = SimpleNamespace(
        encode=lambda prompt: [int(prompt)], decode=lambda row: str(row[0]), stop_ids=[0]
    )
    examples = [{"prompt": n, "answer": "7"} for n in "123"]
    args = flags(num_generations=2, max_completion_length=3, **changes)
    return grpo.ask(None, text, examples, 0, args)


def test_of_equal_groups_nothing_is_learned_and_nothing_counted(monkeypatch):
    batch, facts = asked(monkeypatch)
    assert [(i, row) for i, row, _ in batch.completions] == [(0, 0), (0, 1), (2, 4), (2, 5)]
    assert [c for *_, c in batch.completions] == [[7, 0], [8, 0], [8, 7, 7], [7, 0]]
    assert batch.mask.sum(1).tolist() == [2, 2, 0, 0, 3, 2, 0]
    assert batch.advantage.tolist() == [0.5, -0.5, 0, 0, -0.5, 0.5, 0]
    assert facts.T.tolist() == [
        [1, 0, 1, 1, 0, 1], [0, 0, 1, 1, 0, 0], [2, 2, 2, 2, 3, 2], [0, 0, 0, 0, 1, 0]
    ]


def test_truncated_completions_can_be_masked(monkeypatch):
    """They stay in their group's mean all the same."""
    batch, _ = asked(monkeypatch, mask_truncated_completions=True)
    assert [row for _, row, _ in batch.completions] == [0, 1, 5]
    assert batch.mask.sum(1).tolist() == [2, 2, 0, 0, 0, 2, 0]
    assert batch.advantage[5] == 0.5


def test_the_batchs_deviation_is_that_of_all_processes(monkeypatch):
    """Another process has had four groups of which all are right or all wrong."""
    others = torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    monkeypatch.setattr(grpo, "gather", lambda rows: torch.cat([rows, others]))
    batch, _ = asked(monkeypatch, scale_rewards="batch")
    std = torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1]).std()
    assert batch.advantage[0].item() == pytest.approx(0.5 / (std.item() + 1e-4))


class Enough(Exception):
    """Ends train where a test has seen what it wants."""


def start_of_train(monkeypatch, tmp_path, function, rank=0, **changes):
    """The arguments with which train first calls this function of the script."""
    settle, seen = grpo.settle_flags, []

    def stop(*args):
        seen.append(args)
        raise Enough

    monkeypatch.setattr(grpo, "settle_flags", lambda args: (*settle(args)[:2], rank, 2))
    monkeypatch.setattr(grpo, function, stop)
    run = str(tmp_path / f"{function}{rank}")
    args = grpo.Args(imitation_steps=1, num_prompts=4, eval_prompts=4, run_dir=run, **changes)
    with pytest.raises(Enough):
        grpo.train(args)
    return seen[0]


def test_processes_have_other_prompts_and_other_random_numbers(monkeypatch, tmp_path):
    (_, _, prompts, seed, _), (_, _, others, other, _) = (
        start_of_train(monkeypatch, tmp_path, "ask", rank) for rank in (0, 1)
    )
    assert seed != other and len(prompts) == len(others) == 2 and prompts != others


def test_the_reference_is_another_model_and_the_same_policy(monkeypatch, tmp_path):
    model, reference, *_ = start_of_train(monkeypatch, tmp_path, "improve", beta=0.1)
    for mine, theirs in zip(model.parameters(), reference.parameters()):
        assert torch.equal(mine, theirs) and mine.data_ptr() != theirs.data_ptr()
    assert start_of_train(monkeypatch, tmp_path / "none", "improve", beta=0.0)[1] is None


def trl_loss(
    logprob,
    old,
    advantage,
    mask,
    ref=None,
    loss_type="grpo",
    level="token",
    epsilon=0.2,
    epsilon_high=0.2,
    beta=0.0,
):
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
        _metrics={"train": __import__("collections").defaultdict(list)},
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
def test_loss_and_gradient_are_those_of_trl(loss_type, level, beta):
    if level == "sequence" and beta:
        pytest.skip("TRL weighs the KL by the sequence's ratio there, grpo.py by the token's")
    torch.manual_seed(1)
    mask = torch.arange(7) < torch.tensor([7, 3, 1, 5])[:, None]
    old, ref = -torch.rand(4, 7) * 3, -torch.rand(4, 7) * 3
    advantage, losses, grads = torch.randn(4), [], []
    for ours in (True, False):
        logprob = (old + 0.4 * torch.sin(torch.arange(28.0)).view(4, 7)).requires_grad_()
        if ours:
            ratio = grpo.importance_ratio(logprob, old, mask, level)
            loss = grpo.policy_loss(ratio, logprob, advantage, loss_type, 0.2, 0.3)
            loss = loss + beta * grpo.kl_estimate(logprob, old, ref)
            loss = (loss * grpo.token_weight(mask, loss_type, 4, mask.sum(), 9)).sum()
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
    (forward,) = torch.autograd.grad(
        (logprob.exp() * (logprob - ref)).sum(), theta, retain_graph=True
    )
    (reverse,) = torch.autograd.grad((ref.exp() * (ref - logprob)).sum(), theta, retain_graph=True)
    (ours,) = torch.autograd.grad(
        (prob * grpo.kl_estimate(logprob, old, ref)).sum(), theta, retain_graph=True
    )
    k3 = (ref - logprob).exp() - (ref - logprob) - 1
    (biased,) = torch.autograd.grad((prob * k3).sum(), theta)
    torch.testing.assert_close(ours, forward)
    torch.testing.assert_close(biased, reverse)
    value = (prob * grpo.kl_estimate(old, old, ref)).sum()
    assert value.item() == pytest.approx((prob * (old - ref)).sum().item(), rel=1e-5)


def test_one_update_is_reinforce_with_the_groups_mean():
    """At ratio 1 the loss reads 0 and the gradient is that of the mean of −Â log π over tokens."""
    model, reward = tiny(), torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    advantage = grpo.group_advantage(reward, "none").flatten()
    completions = [(0, [3, 4, 0]), (0, [5, 1, 0]), (0, [2, 2, 0]), (0, [9, 8, 0])]
    batch = make_answers([[1, 2, 3]], completions, advantage)
    grad, means = gradient(model, batch, flags(max_grad_norm=1e9))
    assert means["loss"].item() == pytest.approx(0, abs=1e-6) and means["clip_fraction"] == 0
    model.zero_grad()
    loss = (
        sum(
            -a * plain_logprobs(model, [1, 2, 3], c).sum()
            for a, (_, c) in zip(advantage, completions)
        )
        / 12
    )
    loss.backward()
    torch.testing.assert_close(
        grad, torch.cat([p.grad.flatten() for p in model.parameters()]), atol=5e-6, rtol=1e-4
    )
    assert grad.norm() > 0.01


def test_the_gradient_is_shortened_and_its_length_told():
    model, batch = tiny(), random_answers()
    whole, means = gradient(model, batch, flags(max_grad_norm=1e9))
    limit = whole.norm().item() / 3
    short, again = gradient(model, batch, flags(max_grad_norm=limit))
    torch.testing.assert_close(short, whole / 3, rtol=1e-4, atol=1e-6)
    for norm in (means["grad_norm"], again["grad_norm"]):
        assert norm.item() == pytest.approx(3 * limit, rel=1e-4)


def test_the_kl_term_is_added_to_the_loss():
    """Without advantages the gradient is β times that of the mean of ρ k3, by hand."""
    model, reference = tiny(), tiny(seed=1)
    completions = [(0, [3, 4, 0]), (0, [5, 1, 2, 0])]
    batch = make_answers([[1, 2, 3]], completions, [0.0, 0.0])
    grad, means = gradient(model, batch, flags(beta=0.3, max_grad_norm=1e9), reference)
    model.zero_grad()
    loss = 0
    for _, completion in completions:
        logprob = plain_logprobs(model, [1, 2, 3], completion)
        ref = plain_logprobs(reference, [1, 2, 3], completion).detach()
        loss = loss + 0.3 * grpo.kl_estimate(logprob, logprob.detach(), ref).sum() / 7
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(grad, expected, atol=5e-6, rtol=1e-4)
    assert means["loss"].item() == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize("name", list(VARIANTS))
def test_no_way_to_cut_the_batch_changes_the_gradient(name):
    """Micro-batches of one completion, of some, of all; rows in another order; blanks between."""
    model, reference, batch = tiny(), tiny(seed=1), random_answers()
    grads = []
    for budget in (1, 12, 30, 10_000):
        args = flags(**VARIANTS[name], tokens_per_micro_batch=budget, max_grad_norm=1e9)
        args = dataclasses.replace(args, beta=0.1)
        grads.append(gradient(model, batch, args, reference)[0])
        if budget == 12:
            parts = grpo.plan(batch.prompts, batch.completions, budget)
            assert len(parts) > 3
    order = [2, 0, 1]
    rows = [r for i in order for r in range(4 * i, 4 * i + 4)]
    place = {row: place for place, row in enumerate(rows)}
    completions = sorted((order.index(i), place[row], c) for i, row, c in batch.completions)
    pick = torch.tensor([*rows, 12])
    moved = grpo.Answers(
        [batch.prompts[i] for i in order],
        completions,
        batch.mask[pick],
        batch.sampled[pick],
        batch.advantage[pick],
    )
    grads.append(gradient(model, moved, args, reference)[0])
    wide = [F.pad(x, (0, 5)) for x in (batch.mask, batch.sampled)]
    padded = batch._replace(mask=wide[0], sampled=wide[1])
    grads.append(gradient(model, padded, args, reference)[0])
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0], atol=2e-6, rtol=1e-4)


def test_micro_batches_keep_to_their_budget():
    batch = random_answers(num_prompts=9)
    for budget in (1, 20, 50, 200):
        parts = grpo.plan(batch.prompts, batch.completions, budget)
        seen = [row for part in parts for _, cs in part for row, _ in cs]
        assert sorted(seen) == list(range(36))
        for part in parts:
            alone = len(part) == 1 and len(part[0][1]) == 1
            assert alone or len(part) * max(map(grpo.pack_size, part)) <= budget


def test_several_updates_with_one_batch_clip():
    """After the first update the ratio leaves 1, measured from where the batch was sampled."""
    model, batch = tiny(), random_answers()
    before = model.lm_head.weight.clone()
    means = grpo.improve(
        model, None, torch.optim.SGD(model.parameters(), 0.5), batch, flags(num_iterations=4)
    )
    assert means["approx_kl"] > 0 and means["clip_fraction"] > 0
    assert not torch.equal(before, model.lm_head.weight)


def test_nothing_to_learn_changes_nothing():
    model = tiny()
    batch = make_answers([[1]], [(0, [2, 0])], [0.0])._replace(completions=[])
    batch = batch._replace(mask=torch.zeros_like(batch.mask))
    before = [p.clone() for p in model.parameters()]
    grpo.improve(model, None, torch.optim.AdamW(model.parameters(), 1.0), batch, flags())
    assert all(map(torch.equal, before, model.parameters()))


# Packs and the decoder


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_packs_score_what_plain_rows_do(kind, temperature):
    model, batch = tiny(model_type=kind), random_answers()
    part = grpo.plan(batch.prompts, batch.completions, 10_000)[0]
    packs, rows = grpo.collate(part, CPU)
    logprob, entropy = model(*packs, temperature)
    tokens = {row: (batch.prompts[i], c) for i, row, c in batch.completions}
    expected = [plain_logprobs(model, *tokens[row], temperature) for row in rows.tolist()]
    torch.testing.assert_close(logprob, torch.cat(expected), atol=1e-5, rtol=1e-4)
    assert entropy.shape == logprob.shape and entropy.min() > 0


def test_gradient_checkpointing_changes_nothing():
    model, batch = tiny(), random_answers()
    expected = gradient(model, batch, flags())[0]
    model.checkpointing = True
    torch.testing.assert_close(gradient(model, batch, flags())[0], expected)


def test_bf16_is_close():
    model, batch = tiny(), random_answers()
    expected = gradient(model, batch, flags(max_grad_norm=1e9))[0]
    model.bf16 = True
    grad = gradient(model, batch, flags(max_grad_norm=1e9))[0]
    assert F.cosine_similarity(grad, expected, 0) > 0.99 and not torch.equal(grad, expected)
    assert grad.dtype == torch.float32


@pytest.mark.slow
def test_compiled_is_eager():
    batch, grads = random_answers(), []
    prompts = [[1, 2, 3], [4, 5]]
    for compiled in (False, True):
        args, model = flags(compile=compiled), tiny()
        if compiled:
            model = grpo.ready(model, args)
        grads.append(gradient(model, batch, args)[0])
        sampler = grpo.make_sampler(model, CPU, args)
        grpo.refresh(sampler, model)
        grads.append(grpo.sample(sampler, prompts, 3, 20, 1.0, [0], 1)[0])
    torch.testing.assert_close(grads[0], grads[2], atol=1e-5, rtol=1e-3)
    assert torch.equal(grads[1], grads[3])


# Sampling


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_sampled_log_probabilities_are_the_trainers(kind):
    """Ragged prompts, rows that end early, a cache that shrinks: the full forward agrees."""
    model, temperature = tiny(vocabulary=11, model_type=kind), 0.9
    prompts = [[1, 2, 3, 4, 5, 6, 7], [3], [9, 9, 1]]
    tokens, length, ended, sampled = grpo.sample(model, prompts, 30, 40, temperature, [0, 7], 3)
    assert tokens.shape == (90, 40) and length.min() < 16 < length.max()
    for row in range(90):
        kept = tokens[row, : length[row]].tolist()
        stops = [t in (0, 7) for t in kept]
        assert stops[-1] == bool(ended[row]) and not any(stops[:-1])
        assert ended[row] or len(kept) == 40
        expected = plain_logprobs(model, prompts[row // 30], kept, temperature)
        torch.testing.assert_close(sampled[row, : length[row]], expected, atol=1e-5, rtol=1e-4)


def test_greedy_is_the_likeliest_token_each_time():
    model, prompts = tiny(), [[1, 2, 3], [5]]
    tokens, length, *_ = grpo.sample(model, prompts, 1, 20, 0.0, [0], 0)
    for row, prompt in enumerate(prompts):
        expected = []
        while len(expected) < 20 and (not expected or expected[-1] != 0):
            probe = [[*expected, t] for t in range(11)]
            scores = [plain_logprobs(model, prompt, p)[-1].item() for p in probe]
            expected.append(max(range(11), key=scores.__getitem__))
        assert tokens[row, : length[row]].tolist() == expected


def test_samples_follow_the_distribution():
    model = tiny()
    tokens, *_ = grpo.sample(model, [[4, 2]], 40_000, 1, 0.8, [0], 5)
    share = torch.bincount(tokens[:, 0], minlength=11) / 40_000
    expected = torch.stack([plain_logprobs(model, [4, 2], [t], 0.8)[0].exp() for t in range(11)])
    assert (share - expected).abs().max() < 4 * 0.5 / 200


def test_rounding_gives_the_last_token_no_more_than_its_share():
    """Sums of many float32 probabilities miss 1 by a little, here by a lot."""
    logprob = torch.tensor([0.5, 0.3, 1e-30]).log().expand(10_000, 3)
    token = grpo.choose(logprob, 1.0, torch.Generator().manual_seed(1))
    share = torch.bincount(token[:, 0], minlength=3) / 10_000
    assert share[2] == 0 and abs(share[0] - 0.5 / 0.8) < 4 * 0.5 / 100


def test_a_group_sees_its_own_prompt_and_seeds_count():
    model = tiny()
    draw = lambda seed: grpo.sample(model, [[1], [2, 3]], 4, 8, 1.0, [0], seed)[0]  # noqa: E731
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


# Rewards and tasks


@pytest.mark.parametrize(
    "text, value",
    [
        ("1+2*3", 7),
        ("(1+2)*3", 9),
        ("7/2", 3.5),
        ("1-(2-3)", 2),
        (" 4 ", 4),
        ("9**9**9**9", None),
        ("7//2", None),
        ("-3", None),
        ("1/0", None),
        ("1+", None),
        ("(1", None),
        ("٣+٤", None),
        ("", None),
        ("1.5+1", None),
        ("9" * 10_000, None),
        ("(" * 90, None),
        ("3(4)", None),
        ("__import__('os')", None),
        ("1_000", None),
        ("0x10", None),
        ("01+1", None),
        ("1\n+2", None),
        ("1,2", None),
        ("*".join("9" * 50), 9**50),
    ],
)
def test_calculator(text, value):
    start = time.perf_counter()
    assert grpo.calculate(text)[0] == value
    assert time.perf_counter() - start < 0.05


HOSTILE = st.text(st.sampled_from("0123456789+-*/() \n_.,eE'xab[]{}:=\\٣²"), max_size=120)


@settings(max_examples=10_000, deadline=100)
@given(st.one_of(HOSTILE, st.text(max_size=30)))
def test_calculator_never_raises(text):
    value, numbers = grpo.calculate(text)
    assert value is None or (value == value and all(n >= 0 for n in numbers))
    example = {"task": "countdown", "answer": "1", "numbers": [1, 2, 3], "target": 6}
    assert grpo.reward(text, example) in (0.0, 1.0)


def test_rewards():
    count = {"task": "countdown", "numbers": [3, 3, 50], "target": 9, "answer": "3*3"}
    worth = [("3*3", 1), ("I think\n3*3", 1), ("3+3+3", 0), ("50-41", 0), ("9", 0), ("3*3=9", 0)]
    for text, value in worth:
        assert grpo.reward(text, count) == value, text
    long = "So it is 142" + "." * 198
    assert grpo.reward(long, {"answer": "42"}) == 0 and grpo.reward(long, {"answer": "142"}) == 1
    others = {"answer": "7", "numbers": "3 4", "target": 7}  # columns of someone's own
    assert grpo.reward("3+4", others) == 0 and grpo.reward("7", others) == 1
    number = {"answer": "1234"}
    for text, value in [("1234", 1), ("It is 1,234.", 1), ("1234 or 5", 0), ("12345", 0), ("", 0)]:
        assert grpo.reward(text, number) == value, text
    assert (
        grpo.reward(" yes\n", {"answer": "yes"}) == 1
        and grpo.reward("yes!", {"answer": "yes"}) == 0
    )


def test_countdown_is_solvable_and_the_teacher_mostly_wrong():
    rng = random.Random(0)
    rows = [grpo.countdown(rng, tiny=bool(i % 2)) for i in range(300)]
    assert all(grpo.reward(row["answer"], row) == 1 for row in rows)
    right = sum(grpo.reward(row["teacher"], row) for row in rows)
    assert 60 < right < 180
    text = grpo.Characters()
    assert all(len(text.encode(r["answer"])) < 12 for r in rows[1::2])
    assert all(text.decode(text.encode(r["prompt"])) == r["prompt"] for r in rows[1::2])


def test_the_teacher_forgets_to_carry():
    rng, wrong, carries = random.Random(0), 0, 0
    for _ in range(3000):
        row = grpo.addition(rng, tiny=True)
        a, b = map(int, row["prompt"][:-1].split("+"))
        assert int(row["answer"][::-1]) == a + b
        carry = a % 10 + b % 10 > 9 or a // 10 + b // 10 > 9
        carries += carry
        wrong += row["teacher"] != row["answer"]
        assert carry or row["teacher"] == row["answer"]
    assert wrong / carries == pytest.approx(0.8, abs=0.04)


@pytest.mark.parametrize("task", ["addition", "countdown"])
def test_held_out_prompts_are_never_trained_on(task):
    args = flags(task=task, eval_prompts=200)
    draw, heldout = grpo.load_examples(args, grpo.Characters(), 64)
    rng, unseen = random.Random(1), {e["prompt"] for e in heldout}
    assert len(heldout) == 200
    assert not unseen & {draw(rng)["prompt"] for _ in range(3000)}
    assert grpo.load_examples(args, grpo.Characters(), 64)[1] == heldout


def test_imitation_follows_the_teacher_by_steps_that_rise_and_fall():
    text, rates, rng = grpo.Characters(), [], random.Random(1)
    model, held = tiny(vocabulary=len(text.symbols)), [grpo.addition(rng, True) for _ in range(50)]

    def taught():
        with torch.no_grad():
            rows = [plain_logprobs(model, text.encode(e["prompt"]), [*text.encode(e["teacher"]), 0])
                    for e in held]
        return torch.stack(rows).mean(0)  # of three digits and the stop token

    before = taught()
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    grpo.imitate(model, text, lambda rng: grpo.addition(rng, True), flags(imitation_steps=90))
    hook.remove()
    after = taught()
    assert after.mean() > before.mean() + 1 and after[3] > -0.1, (before, after)
    assert rates[:3] == pytest.approx([1e-4, 2e-4, 3e-4]) and rates[29:60] == [3e-3] * 31
    assert rates[-3:] == pytest.approx([3e-4, 2e-4, 1e-4])


def test_each_answer_is_judged_by_its_own_question(monkeypatch):
    text = grpo.Characters()
    examples = [{"prompt": f"{i:02}=", "answer": str(i)} for i in range(70)]

    def sample(model, prompts, count, *_):
        """Of each prompt the even answers are right."""
        rows = [[*text.encode(f"{int(text.decode(p)[:2]) + n % 2:2}"), 0]
                for p in prompts for n in range(count)]
        ended = torch.ones(len(rows), dtype=torch.bool)
        return torch.tensor(rows), 3 * ended, ended, torch.zeros(len(rows), 3)

    monkeypatch.setattr(grpo, "sample", sample)
    _, facts = grpo.ask(None, text, examples[:5], 0, flags())
    assert facts[:, 0].tolist() == [1, 0, 1, 0] * 5
    accuracy, texts = grpo.answers(None, text, examples, 0.0, flags())
    assert accuracy == 1 and [int(t) for t in texts] == [*range(70)]


def test_what_train_asks_of_its_parts(tmp_path, capsys, monkeypatch):
    """AdamW without decay; greedy answers for the score, both kinds before and after."""
    seen, asked, improve, answers = [], [], grpo.improve, grpo.answers

    def learn(model, reference, optimizer, batch, args):
        seen.append((optimizer.param_groups[0]["weight_decay"], len(batch.prompts)))
        return improve(model, reference, optimizer, batch, args)

    def answer(sampler, text, examples, temperature, args):
        asked.append(temperature)
        return answers(sampler, text, examples, temperature, args)

    monkeypatch.setattr(grpo, "improve", learn)
    monkeypatch.setattr(grpo, "answers", answer)
    assert call(capsys, *SHORT, "--max-steps", 4, "--run-dir", tmp_path / "run")[0] == 0
    assert seen == [(0.0, 8)] * 4 and asked == [0, 1, 0, 0, 0, 1]


def rows_of(tmp_path, *rows, **changes):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return flags(data=str(path), **changes)


def test_rows_of_a_file(tmp_path):
    rows = [{"prompt": f"{i:02}+01=", "answer": i + 1} for i in range(50)]
    draw, heldout = grpo.load_examples(rows_of(tmp_path, *rows, *rows[:5]), grpo.Characters(), 64)
    unseen = {row["prompt"] for row in heldout}
    assert 3 <= len(unseen) <= 10 and isinstance(heldout[0]["answer"], str)
    assert not unseen & {draw(random.Random(i))["prompt"] for i in range(300)}


def test_only_a_newline_ends_a_row(tmp_path):
    """Not U+2028, which JSON may hold as it is; a byte order mark and \r\n do no harm."""
    row = json.dumps({"prompt": "1=", "answer": "1", "note": "a\u2028b"}, ensure_ascii=False)
    args = rows_of(tmp_path)
    text = f"\ufeff{row}\r\n{row}\r\n"
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8", newline="")
    assert len(grpo.read_rows(args, grpo.Characters(), 60)) == 2


GOOD = {"prompt": "1+1=", "answer": "2"}


@pytest.mark.parametrize(
    "rows, words",
    [
        (["", "  "], ["no rows"]),
        ([GOOD, "{"], ["line 2"]),
        ([GOOD, "", [1]], ["line 3", "prompt"]),
        ([{"prompt": "1"}], ["line 1", "answer"]),
        ([GOOD | {"answer": None}], ["line 1", "answer"]),
        ([GOOD | {"answer": ""}], ["line 1", "answer"]),
        ([GOOD | {"answer": True}], ["line 1", "answer"]),
        ([GOOD, {"prompt": "1" * 70, "answer": "1"}], ["line 2", "70 tokens"]),
        ([{"prompt": "", "answer": "1"}], ["line 1"]),
        ([GOOD, {"prompt": "é", "answer": "1"}], ["line 2"]),
        ([{"prompt": "1", "answer": "1" * 9}], ["no answer fits"]),
        ([GOOD], ["two different"]),
    ],
)
def test_bad_rows_are_named(rows, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        grpo.load_examples(rows_of(tmp_path, *rows), grpo.Characters(), 64)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1
    assert all(word in err for word in ["rows.jsonl", *words]), err


# Runs


def call(capsys, *args):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["grpo.py", *map(str, args)])
        try:
            score = grpo.train(grpo.parse(grpo.Args))
            code = 0
        except SystemExit as stop:
            code, score = stop.code, None
    captured = capsys.readouterr()
    return code, captured.out, captured.err, score


@pytest.mark.parametrize(
    "args, words",
    [
        (["--preset", "ppo"], ["--preset ppo", "dapo"]),
        (["--num-generations", 1], ["--num-generations 1"]),
        (["--lora-rank", 2, "--beta", 0.1], ["--lora-rank 2", "--model"]),
        (["--temperature", 0], ["--temperature"]),
        (["--model", "/nowhere/at/all"], ["--model"]),
        (["--data", "/nowhere.jsonl"], ["--data", "--model"]),
        (["--resume", "/nowhere"], ["/nowhere", "checkpoint.pt"]),
        (["--learning-rate", "nan"], ["--learning-rate"]),
        (["--device", "cuda"], ["--device cuda"]),
    ],
)
def test_mistakes_end_in_one_line(args, words, capsys, monkeypatch):
    if "cuda" in args and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, _, err, _ = call(capsys, *args)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    assert all(word in err for word in words), err


SHORT = ["--imitation-steps", 2, "--num-prompts", 8, "--eval-prompts", 16, "--eval-every", 2]


@pytest.fixture
def judge(monkeypatch):
    """Rewards that differ even for a model that knows nothing."""
    monkeypatch.setattr(grpo, "reward", lambda text, _: sum(map(ord, text)) % 5 / 4)


def weights(folder):
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    return torch.cat([x.flatten() for x in state["model"].values()])


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["--preset", "grpo", "--num-iterations", 2],
        ["--lora-rank", 2],
        ["--bf16", "True"],
    ],
)
def test_resumed_is_never_stopped(extra, tmp_path, capsys, judge):
    """Four batches, or two and two more after a restart: the same weights to the bit."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert call(capsys, *SHORT, *extra, "--max-steps", 4, "--run-dir", one)[0] == 0
    assert call(capsys, *SHORT, *extra, "--max-steps", 2, "--run-dir", two)[0] == 0
    assert not torch.equal(weights(one), weights(two))
    assert call(capsys, "--resume", two, "--max-steps", 4)[0] == 0
    assert torch.equal(weights(one), weights(two))
    steps = [row["step"] for row in csv.DictReader((two / "metrics.csv").open())]
    assert steps == ["1", "2", "3", "4"]


def test_the_exported_folder_is_the_model(tmp_path, capsys, judge):
    """transformers and --model open it; adapters are merged; the tokenizer is the same."""
    transformers = pytest.importorskip("transformers")
    call(
        capsys,
        *SHORT,
        "--max-steps",
        2,
        "--lora-rank",
        4,
        "--learning-rate",
        0.1,
        "--run-dir",
        tmp_path / "run",
    )
    folder = tmp_path / "run" / "model"
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = grpo.Characters()
    assert tokenizer("12+34=")["input_ids"] == text.encode("12+34=")
    assert tokenizer.decode(text.encode("12+34=")) == "12+34="
    args, *_ = grpo.settle_flags(grpo.Args(model=str(folder), bf16=False))
    model, again = grpo.load_model(args, CPU)
    assert again.encode("12+34=") == text.encode("12+34=") and again.stop_ids == [0]
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["model"]
    trained = grpo.Decoder(model.config, rank=4)
    trained.load_state_dict(saved)
    tokens = torch.tensor([text.encode("12+34=")])
    mask = torch.ones(1, 6, 6, dtype=torch.bool).tril()
    logits = [
        F.linear(m.states(tokens, torch.arange(6)[None], mask), m.lm_head.weight)
        for m in (model, trained)
    ]
    torch.testing.assert_close(logits[0], peer(tokens).logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)
    assert saved["model.layers.0.mlp.up_proj.lora_b"].abs().max() > 0


@pytest.mark.slow
def test_a_short_run_learns_and_one_that_stands_still_does_not(tmp_path, capsys, monkeypatch):
    teach_once(grpo, monkeypatch)
    args = ["--imitation-steps", 220, "--max-steps", 40, "--eval-every", 40]
    gains = []
    for rate in (3e-4, 1e-11):
        out = call(capsys, *args, "--learning-rate", rate, "--run-dir", tmp_path / str(rate))[1]
        before, after = re.findall(r"(?:before|after): greedy ([0-9.]+)", out)
        gains.append(float(after) - float(before))
    assert gains[0] > 0.3 and abs(gains[1]) < 0.02
    rows = list(csv.DictReader((tmp_path / "0.0003" / "metrics.csv").open()))
    assert max(float(row["gap_max"]) for row in rows) < 1e-4


@pytest.mark.slow
def test_a_copy_alone_in_an_empty_folder(tmp_path):
    shutil.copy(ROOT / "grpo.py", tmp_path)
    command = [
        sys.executable,
        "grpo.py",
        *map(str, SHORT),
        "--max-steps",
        "2",
        "--task",
        "countdown",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "held-out prompts" in done.stdout, done.stderr
    assert "Traceback" not in done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("grpo-countdown-1-")
    assert {"args.json", "checkpoint.pt", "metrics.csv", "model"} <= {p.name for p in run.iterdir()}


def test_a_non_finite_loss_ends_the_run(tmp_path, capsys, monkeypatch):
    improve, calls = grpo.improve, itertools.count()
    monkeypatch.setattr(
        grpo,
        "improve",
        lambda *a: improve(*a) | ({"loss": torch.tensor(float("nan"))} if next(calls) == 2 else {}),
    )
    code, _, err, _ = call(
        capsys, *SHORT, "--max-steps", 4, "--checkpoint-every", 1, "--run-dir", tmp_path
    )
    assert code == 2 and "step 3: loss is not finite" in err
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["run"]["step"] == 2


def test_tracking(tmp_path, capsys, monkeypatch):
    """Rows and a table of samples go to wandb; when it raises, the run goes on."""
    rows, table = [], lambda columns, data: ("table", columns, data)
    monkeypatch.setitem(
        sys.modules,
        "wandb",
        SimpleNamespace(
            init=lambda **_: SimpleNamespace(log=lambda row, step: rows.append(row)), Table=table
        ),
    )
    assert call(capsys, *SHORT, "--max-steps", 2, "--track", "--run-dir", tmp_path / "a")[0] == 0
    assert any("samples" in row for row in rows) and any("reward" in row for row in rows)

    def refuse(*_, **__):
        raise RuntimeError("no network")

    monkeypatch.setitem(
        sys.modules,
        "wandb",
        SimpleNamespace(init=lambda **_: SimpleNamespace(log=refuse), Table=table),
    )
    code, _, err, _ = call(capsys, *SHORT, "--max-steps", 2, "--track", "--run-dir", tmp_path / "b")
    assert code == 0 and err.count("no network") == 1


# More than one process

RANKS = """
import os, sys, torch
sys.path[:0] = [{root!r}, {tests!r}]
import test_grpo as t, grpo
rank = int(os.environ.get("RANK", 0))
t.grpo.dist.init_process_group("gloo")
batch, args = t.random_answers(num_prompts=4), t.flags(tokens_per_micro_batch=20, beta=0.1,
    loss_type={loss!r}, max_grad_norm=0.3, num_iterations=2)
own = [c for c in batch.completions if c[0] % 2 == rank]
if rank == 1:
    own = own[:1]  # an unequal share: fewer micro-batches
else:
    own += [c for c in batch.completions if c[0] % 2 == 1][1:]
    own.sort()
mask = torch.zeros_like(batch.mask)
for _, row, _ in own:
    mask[row] = batch.mask[row]
batch = batch._replace(completions=own, mask=mask)
model, reference = grpo.ready(t.tiny(), args), grpo.ready(t.tiny(seed=1), args)
optimizer = torch.optim.SGD(model.parameters(), 0.5, 0.9)
for _ in range(3):
    means = grpo.improve(model, reference, optimizer, batch, args)
sampler = grpo.make_sampler(model, t.CPU, args)
grpo.refresh(sampler, model)
torch.save((sampler.state_dict(), means), {path!r} + str(rank))
grpo.leave()
os._exit(0)
"""


def torchrun(*command):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            *map(str, command),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dapo", "grpo"])
def test_two_processes_learn_what_one_does(loss, tmp_path):
    """A recorded batch, its completions spread unequally: the same weights, to rounding."""
    path, script = str(tmp_path / "rank"), tmp_path / "ranks.py"
    script.write_text(RANKS.format(root=str(ROOT), tests=str(ROOT / "tests"), path=path, loss=loss))
    torchrun(script)
    (ours, means), (theirs, _) = (torch.load(path + r, weights_only=False) for r in "01")
    model, args = tiny(), flags(beta=0.1, loss_type=loss, max_grad_norm=0.3, num_iterations=2)
    optimizer = torch.optim.SGD(model.parameters(), 0.5, 0.9)
    for _ in range(3):
        alone = grpo.improve(model, tiny(seed=1), optimizer, random_answers(num_prompts=4), args)
    for name, weight in model.state_dict().items():
        assert torch.equal(ours[name], theirs[name])
        torch.testing.assert_close(ours[name], weight, atol=1e-5, rtol=1e-4)
    for name in alone:
        assert float(means[name]) == pytest.approx(float(alone[name]), rel=1e-3, abs=1e-6), name


@pytest.mark.slow
def test_a_real_run_of_two_processes(tmp_path, capsys):
    """Trains, writes once, resumes, and one process takes its checkpoint."""
    run = tmp_path / "run"
    out = torchrun(ROOT / "grpo.py", *SHORT, "--max-steps", 2, "--run-dir", run, "--preset", "grpo")
    assert out.count("held-out prompts") == 1 and out.count("thread(s)") == 1
    torchrun(ROOT / "grpo.py", "--resume", run, "--max-steps", 3)
    assert call(capsys, "--resume", run, "--max-steps", 4)[0] == 0
    assert len((run / "metrics.csv").read_text().splitlines()) == 5


def test_what_was_learned_is_kept_when_the_end_goes_wrong(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(grpo, "save_model", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(capsys, *SHORT, "--max-steps", 3, "--run-dir", tmp_path)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["run"]["step"] == 3


def test_a_run_killed_before_its_first_checkpoint_can_begin_again(tmp_path, capsys):
    (tmp_path / "metrics.csv").write_text("step,seconds\n1,2\n2,3\n")
    assert call(capsys, *SHORT, "--max-steps", 2, "--run-dir", tmp_path)[0] == 0
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines[0].startswith("step,seconds,score,reward") and len(lines) == 3
