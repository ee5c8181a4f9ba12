"""dpo.py: loss and gradient to the equation, scores, made pairs, data, runs, two processes."""

import contextlib
import csv
import dataclasses
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import dpo
import grpo

CPU = torch.device("cpu")
TEXT = dpo.Characters()
tiny_config = dpo.tiny_config  # some tests replace dpo's by small_config


@pytest.fixture(autouse=True)
def keep_ctrl_c():
    """Runs install a handler of their own."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def small_config(vocab_size):
    return tiny_config(vocab_size) | {
        "hidden_size": 16, "intermediate_size": 24, "num_key_value_heads": 2}


def flags(**changes):
    values = {"batch_size": 6, "micro_batch_size": 4, "beta": 0.3, "max_grad_norm": 1e9,
              "bf16": False, "device": "cpu"}
    return dpo.Args(**values | changes)


def make_tiny(seed=0, scale=0.4, **changes):
    """Make a small model with random weights that are not near 0."""
    torch.manual_seed(seed)
    config = dpo.read_config(small_config(len(TEXT.symbols)), "tiny")
    weights = {name: torch.randn(p.shape) * scale if p.dim() == 2 else torch.ones(p.shape)
               for name, p in dpo.Decoder(config).named_parameters()}
    return dpo.make_model(config, weights, CPU, flags(**changes))


def random_pairs(count=6, seed=0):
    """Make pairs of many lengths; some answers are equally long, 0 is the stop token."""
    rng = random.Random(seed)

    def some(low, high):
        return [rng.randrange(1, 13) for _ in range(rng.randint(low, high))]

    return [dpo.Pair(some(1, 9), [*some(1, 6), 0], [*some(1, 6), 0]) for _ in range(count)]


def num_columns(pair):
    """Inputs of the longer row."""
    return len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) - 1


def padded(pairs):
    """The rows that answer_logprobs gives the model, (P, 2, L) each."""
    seen = []

    def watch(hidden, weight, targets, mask):
        seen.extend((hidden, targets, mask))
        return torch.zeros(mask.shape)

    model = mock.Mock(side_effect=lambda inputs: inputs)
    with mock.patch.object(dpo, "token_logprobs", watch):
        dpo.answer_logprobs(model, pairs, CPU)
    return [tensor.unflatten(0, (-1, 2)) for tensor in seen]


def lengths(pairs):
    return torch.tensor([[len(pair.chosen), len(pair.rejected)] for pair in pairs])


def plain_logprobs(model, prompt, answer):
    """Compute log π of each token of the answer from a forward pass of this row alone."""
    hidden = model(torch.tensor([[*prompt, *answer]]))[0]
    logprob = F.linear(hidden, model.output_weight()).log_softmax(-1)
    return torch.stack([logprob[len(prompt) - 1 + i, token] for i, token in enumerate(answer)])


def plain_scores(model, pairs):
    return torch.stack([
        torch.stack([plain_logprobs(model, pair.prompt, answer).sum()
                     for answer in (pair.chosen, pair.rejected)]) for pair in pairs])


def plain_losses(logprob, ref, length, args):
    """Compute the loss of each pair as the papers write it."""
    losses = []
    for (win, lose), (ref_w, ref_l), (n_w, n_l) in zip(logprob, ref, length):
        nll = -win / n_w
        if args.reference_free:
            ref_w, ref_l = 0.0, 0.0
        if args.length_normalize:
            win, lose, ref_w, ref_l = win / n_w, lose / n_l, ref_w / n_w, ref_l / n_l
        h = (win - ref_w) - (lose - ref_l)
        if args.loss_type == "ipo":
            loss = (h - 1 / (2 * args.beta)) ** 2
        else:
            p = torch.sigmoid(args.beta * h - args.gamma_margin)
            loss = -(1 - args.label_smoothing) * p.log() - args.label_smoothing * (1 - p).log()
        losses.append(loss + args.nll_coef * nll)
    return torch.stack(losses)


def flat_gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def gradient(model, pairs, ref_logprob, args, order=None):
    """Return the gradient of an update that takes no step, and its metrics."""
    order = dpo.by_length(pairs, range(len(pairs))) if order is None else order
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    metrics = dpo.update(model, still, [pairs[i] for i in order], ref_logprob[order], args)
    return flat_gradient(model), metrics


# The loss


ONE = torch.ones(1, 2)  # answers of one token


def test_at_the_reference_the_loss_is_log_2():
    logprob = -torch.rand(5, 2) * 9
    loss = dpo.preference_loss(logprob, logprob, ONE, 0.1, "sigmoid")
    torch.testing.assert_close(loss, torch.full((5,), math.log(2)))
    ipo = dpo.preference_loss(logprob, logprob, ONE, 0.1, "ipo")
    torch.testing.assert_close(ipo, torch.full((5,), 25.0))


def test_gradient_weighs_pairs_by_how_wrong_the_reward_is():
    """β σ(R_l − R_w), up for the chosen and down for the rejected answer."""
    logprob = (-torch.rand(7, 2) * 9).requires_grad_()
    ref, beta = -torch.rand(7, 2) * 9, 0.3
    dpo.preference_loss(logprob, ref, ONE, beta, "sigmoid").sum().backward()
    reward = beta * (logprob - ref).detach()
    weight = beta * torch.sigmoid(reward[:, 1] - reward[:, 0])
    torch.testing.assert_close(logprob.grad, torch.stack([-weight, weight], 1))


@pytest.mark.parametrize("smoothing, margin", [(0.0, 0.0), (0.2, 0.0), (0.0, 1.5), (0.1, 0.5)])
def test_loss_with_smoothing_and_margin_by_the_formula(smoothing, margin):
    logprob, ref, beta = -torch.rand(6, 2) * 5, -torch.rand(6, 2) * 5, 0.7
    expected = []
    for (win, lose), (ref_w, ref_l) in zip(logprob.tolist(), ref.tolist()):
        z = beta * ((win - ref_w) - (lose - ref_l)) - margin
        right, wrong = math.log(1 + math.exp(-z)), math.log(1 + math.exp(z))
        expected.append((1 - smoothing) * right + smoothing * wrong)
    loss = dpo.preference_loss(logprob, ref, ONE, beta, "sigmoid", smoothing, margin)
    torch.testing.assert_close(loss, torch.tensor(expected), atol=1e-5, rtol=1e-5)


def trl_loss(logprob, ref, length, beta, loss_type):
    """Compute the loss with TRL's trainer; logprob (P, 2) is spread evenly over the tokens."""
    trl = pytest.importorskip("trl")
    width = int(length.max())
    flat = length.T.flatten()
    mask = torch.arange(width + 1) >= 1
    mask = mask & (torch.arange(width + 1) <= flat[:, None])
    tokens = (logprob.T.flatten() / flat)[:, None] * mask[:, 1:]
    outputs = SimpleNamespace(
        log_probs=tokens,
        entropy=torch.zeros_like(tokens),
        mean_token_accuracy=torch.zeros(()),
        mean_logits=torch.zeros_like(tokens),
        is_top1=tokens < 0,
        aux_loss=None,
        logits=torch.zeros(*tokens.shape, 3),
    )
    trainer = mock.MagicMock(
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        beta=beta,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        label_smoothing=0.0,
        use_weighting=False,
    )
    trainer.accelerator.device = CPU
    trainer.accelerator.gather_for_metrics = trainer.accelerator.gather = lambda x: x
    trainer.accelerator.reduce = lambda x, **_: x
    inputs = {
        "input_ids": torch.zeros_like(mask).long(),
        "completion_mask": mask.long(),
        "attention_mask": mask.long(),
        "ref_chosen_logps": ref[:, 0],
        "ref_rejected_logps": ref[:, 1],
    }
    return trl.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss_type, normalize, theirs",
    [("sigmoid", False, "sigmoid"), ("sigmoid", True, "sigmoid_norm"), ("ipo", True, "ipo")],
)
def test_loss_and_gradient_equal_trl(loss_type, normalize, theirs):
    torch.manual_seed(3)
    ref, length, losses, grads = -torch.rand(5, 2) * 20, torch.randint(1, 9, (5, 2)), [], []
    for ours in (True, False):
        logprob = (ref + torch.sin(torch.arange(10.0)).view(5, 2)).requires_grad_()
        if ours:
            loss = dpo.preference_loss(logprob, ref, length, 0.2, loss_type,
                                       length_normalize=normalize).mean()
        else:
            loss = trl_loss(logprob, ref, length, 0.2, theirs)
        loss.backward()
        losses.append(loss.item())
        grads.append(logprob.grad)
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-5)


def test_dpo_on_a_table_reaches_the_closed_form():
    """All pairs of five answers, labelled by Bradley and Terry: π becomes π_ref e^{r/β} / Z."""
    torch.manual_seed(0)
    ref = torch.randn(5, dtype=torch.double).log_softmax(-1)
    reward, beta = torch.randn(5, dtype=torch.double), 0.5
    pairs = torch.tensor([(i, j) for i in range(5) for j in range(5) if i != j])
    weight = torch.sigmoid(reward[pairs[:, 0]] - reward[pairs[:, 1]])
    theta = torch.zeros(5, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([theta], max_iter=500, tolerance_grad=1e-12,
                                  tolerance_change=1e-16, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        logprob = theta.log_softmax(-1)
        losses = dpo.preference_loss(logprob[pairs], ref[pairs], ONE, beta, "sigmoid")
        loss = (weight * losses).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    best = dpo.best_policy(ref, reward, beta)
    torch.testing.assert_close(theta.detach().log_softmax(-1), best, atol=1e-4, rtol=1e-4)
    expected = ref.exp() * (reward / beta).exp()
    torch.testing.assert_close(best.exp(), expected / expected.sum())


@pytest.mark.parametrize("smoothing, loss", [(0.0, 1000.0), (0.25, 750.0)])
def test_loss_of_large_differences_is_finite(smoothing, loss):
    logprob = torch.tensor([[-500.0, 500.0]], requires_grad=True)
    ours = dpo.preference_loss(logprob, torch.zeros(1, 2), ONE, 1.0, "sigmoid", smoothing)
    ours.sum().backward()
    assert ours.item() == loss and logprob.grad.isfinite().all()


def test_best_policy_of_each_row():
    ref = torch.tensor([[0.5, 0.5], [0.2, 0.8]]).log()
    best = dpo.best_policy(ref, torch.tensor([[1.0, 0.0], [2.0, 2.0]]), 0.5).exp()
    share = math.exp(2) / (math.exp(2) + 1)
    torch.testing.assert_close(best, torch.tensor([[share, 1 - share], [0.2, 0.8]]))


def test_metrics_by_hand():
    logprob = torch.tensor([[-1.0, -5.0], [-4.0, -2.0], [-3.0, -9.0]])
    ref = torch.tensor([[-2.0, -4.0], [-3.0, -3.0], [-2.0, -4.0]])
    length = torch.tensor([[3, 2], [1, 4], [2, 2]])
    metrics = dpo.mean_metrics(logprob, ref, length, flags(beta=0.5))
    expected = {
        "accuracy": 2 / 3,
        "accuracy_longer": 1,
        "accuracy_shorter": 0,
        "margin": (1 - 1 + 2) / 3,
        "reward_chosen": (0.5 - 0.5 - 0.5) / 3,
        "reward_rejected": (-0.5 + 0.5 - 2.5) / 3,
        "logprob_chosen": -8 / 3,
        "logprob_rejected": -16 / 3,
        "chosen_fell": 2 / 3,
    }
    metrics.pop("loss")
    assert {name: x.item() for name, x in metrics.items()} == pytest.approx(expected, abs=1e-6)


def test_metrics_of_an_empty_group_are_nan():
    """Equal rewards count as wrong; without a longer chosen answer there is no accuracy_longer."""
    logprob, length = torch.tensor([[-1.0, -1.0], [-1.0, -3.0]]), torch.tensor([[1, 2], [2, 2]])
    metrics = dpo.mean_metrics(logprob, torch.zeros(2, 2), length, flags(beta=0.5))
    assert math.isnan(metrics["accuracy_longer"]) and metrics["accuracy_shorter"] == 0
    assert metrics["accuracy"] == 0.5


# Pairs through the model


def test_rows_are_chosen_then_rejected_and_only_answers_are_trained():
    """The trained targets are the answer with its stop token, nothing of prompt and padding."""
    pairs = random_pairs(5)
    inputs, targets, mask = padded(pairs)
    assert inputs.shape == targets.shape == mask.shape == (5, 2, max(map(num_columns, pairs)))
    for i, pair in enumerate(pairs):
        for j, answer in enumerate((pair.chosen, pair.rejected)):
            assert targets[i, j][mask[i, j]].tolist() == answer and answer[-1] == 0
            whole = pair.prompt + answer
            assert inputs[i, j, : len(whole) - 1].tolist() == whole[:-1]


def test_pairs_are_sorted_longest_first():
    pairs = random_pairs(9)
    numbers = dpo.by_length(pairs, [7, 2, 5, 0])
    assert sorted(numbers) == [0, 2, 5, 7]
    columns = [max(len(p) + len(c), len(p) + len(r)) - 1 for p, c, r in pairs]
    assert [columns[i] for i in numbers] == sorted((columns[i] for i in (0, 2, 5, 7)), reverse=True)
    assert [num_columns(pair) for pair in pairs] == columns and len({*columns}) > 4


@pytest.mark.parametrize("micro_batch_size", [1, 3, 100])
def test_scores_equal_plain_rows(micro_batch_size):
    """In the order of the pairs. Prompt tokens do not count, the stop token does."""
    model, pairs = make_tiny(), random_pairs(7)
    scores = dpo.all_answer_logprobs(model, pairs, micro_batch_size, CPU)
    torch.testing.assert_close(scores, plain_scores(model, pairs), atol=1e-4, rtol=1e-5)
    assert not scores.requires_grad


def test_log_probabilities_do_not_depend_on_the_chunks():
    model = make_tiny()
    inputs, *rows = [tensor.flatten(0, 1) for tensor in padded(random_pairs(4))]
    results = []
    for size in (1, 7, 1024):
        logprob = dpo.token_logprobs(model(inputs), model.output_weight(), *rows, chunk_size=size)
        model.zero_grad()
        logprob.sum().backward()
        results.append((logprob.detach(), flat_gradient(model)))
    for result in results[:2]:
        torch.testing.assert_close(result, results[2], atol=1e-4, rtol=1e-4)


VARIANTS = {
    "DPO": {},
    "cDPO": {"label_smoothing": 0.1},
    "DPO, normalized": {"length_normalize": True},
    "IPO": {"loss_type": "ipo"},
    "IPO of TRL": {"loss_type": "ipo", "length_normalize": True},
    "SimPO": {"length_normalize": True, "reference_free": True, "gamma_margin": 0.4},
    "RPO": {"nll_coef": 0.5},
    "IPO with the term of RPO": {"loss_type": "ipo", "nll_coef": 0.5},
}


@pytest.mark.parametrize("name", list(VARIANTS))
def test_gradient_is_that_of_the_formula_however_the_batch_is_cut(name):
    """Neither micro-batches nor order nor padding change it; means are over the whole batch."""
    model, pairs = make_tiny(), random_pairs(8)
    args = flags(batch_size=8, **VARIANTS[name])
    ref = plain_scores(make_tiny(seed=1), pairs).detach() * (not args.reference_free)
    logprob, length = plain_scores(model, pairs), lengths(pairs)
    losses = plain_losses(logprob, ref, length, args)
    losses.mean().backward()
    expected = flat_gradient(model)
    scale = 1 / length if args.length_normalize else 1
    metrics = dpo.mean_metrics(logprob.detach() * scale, ref * scale, length,
                               flags(beta=args.beta, reference_free=args.reference_free))
    metrics |= {"loss": losses.mean().detach(), "grad_norm": expected.norm()}
    for size, order in [(1, None), (3, None), (100, None), (1, [5, 0, 7, 2, 1, 6, 4, 3])]:
        args = dataclasses.replace(args, micro_batch_size=size)
        grad, found = gradient(model, pairs, ref, args, order)
        torch.testing.assert_close(grad, expected, atol=1e-4, rtol=1e-3)
        assert {n: float(x) for n, x in found.items()} == pytest.approx(
            {n: float(x) for n, x in metrics.items()}, rel=1e-3, abs=1e-4, nan_ok=True)


def test_half_a_batch_has_half_the_gradient():
    """The denominator is --batch-size, not the number of this process's pairs."""
    model, pairs = make_tiny(), random_pairs(4)
    ref = plain_scores(make_tiny(seed=1), pairs).detach()
    whole, _ = gradient(model, pairs, ref, flags(batch_size=4))
    half, _ = gradient(model, pairs, ref, flags(batch_size=8))
    torch.testing.assert_close(half, whole / 2)


def test_an_update_prefers_the_better_answer():
    model, pairs, args = make_tiny(), random_pairs(4), flags(batch_size=4)
    reference = dpo.all_answer_logprobs(model, pairs, 4, CPU)
    metrics = dpo.update(model, torch.optim.SGD(model.parameters(), 1e-3), pairs, reference,
                         dataclasses.replace(args, micro_batch_size=1))
    assert metrics["loss"].item() == pytest.approx(math.log(2), rel=1e-5)
    assert metrics["grad_norm"] > 0
    after = dpo.all_answer_logprobs(model, pairs, 4, CPU) - reference
    assert ((after[:, 0] - after[:, 1]) > 0).all()


def test_the_gradient_is_clipped_and_its_norm_reported():
    model, pairs = make_tiny(), random_pairs()
    ref = plain_scores(model, pairs).detach() - torch.tensor([0.5, 0.0])
    whole, metrics = gradient(model, pairs, ref, flags())
    limit = whole.norm().item() / 3
    short, again = gradient(model, pairs, ref, flags(max_grad_norm=limit))
    torch.testing.assert_close(short, whole / 3, rtol=1e-4, atol=1e-6)
    for norm in (metrics["grad_norm"], again["grad_norm"]):
        assert norm.item() == pytest.approx(3 * limit, rel=1e-4)


def test_a_gradient_that_is_not_finite_stops_before_the_step(monkeypatch):
    model, pairs = make_tiny(), random_pairs()
    before = [param.clone() for param in model.parameters()]
    with pytest.raises(RuntimeError, match="non-finite"):
        dpo.update(model, torch.optim.SGD(model.parameters(), 1.0), pairs[:1],
                   torch.full((1, 2), math.nan), flags())
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters()))


def test_gradient_checkpointing_computes_blocks_twice_and_changes_nothing(monkeypatch):
    pairs, results, calls, forward = random_pairs(), [], [], dpo.Block.forward
    monkeypatch.setattr(dpo.Block, "forward", lambda *args: (calls.append(1), forward(*args))[1])
    for checkpointing in (False, True):
        calls.clear()
        model = make_tiny(gradient_checkpointing=checkpointing)
        grad, _ = gradient(model, pairs, torch.zeros(6, 2), flags())
        results.append((grad, len(calls)))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert results[1][1] == 2 * results[0][1] > 0


def test_bfloat16_computes_a_similar_gradient_and_keeps_float32_weights():
    pairs, ref = random_pairs(), torch.zeros(6, 2)
    model = make_tiny(bf16=True, scale=0.2)
    assert model(torch.tensor([[1, 2]])).dtype == torch.bfloat16
    grad, _ = gradient(model, pairs, ref, flags())
    exact, _ = gradient(make_tiny(scale=0.2), pairs, ref, flags())
    assert grad.dtype == torch.float32 and not torch.equal(grad, exact)
    assert F.cosine_similarity(grad, exact, 0) > 0.99


@pytest.mark.parametrize("variant", [{}, {"length_normalize": True}, {"reference_free": True}])
def test_held_out_metrics_by_hand(variant):
    pairs, model = random_pairs(5), make_tiny()
    ref, length, args = plain_scores(make_tiny(seed=1), pairs), lengths(pairs), flags(**variant)
    ref = ref * (not args.reference_free)
    metrics = dpo.evaluate(model, pairs, ref, args)
    logprob = plain_scores(model, pairs)
    loss = plain_losses(logprob, ref, length, args)
    if args.length_normalize:
        logprob, ref = logprob / length, ref / length
    expected = dpo.mean_metrics(logprob, ref, length,
                                flags(beta=0.3, reference_free=args.reference_free))
    assert metrics == pytest.approx({f"heldout_{name}": expected[name].item()
                                     for name in ("accuracy", "margin", "chosen_fell")}
                                    | {"heldout_loss": loss.mean().item()}, abs=1e-4, nan_ok=True)


# The tiny GPT's own data


class Scripted:
    """A model whose next token depends on the last one only, with the logits of a table (V, V)."""

    def __init__(self, logits):
        self.logits = logits

    def __call__(self, tokens):
        return F.one_hot(tokens, len(self.logits)).float()

    def output_weight(self):
        return self.logits.T


def table(following):
    """Make logits: the token after each symbol is sure, "<end>" after others."""
    logits = torch.full((len(TEXT.symbols),) * 2, -99.0)
    logits[:, 0] = 0.0
    for first, second in following.items():
        logits[TEXT.symbols.index(first)] = -99.0
        logits[TEXT.symbols.index(first), TEXT.symbols.index(second)] = 0.0
    return Scripted(logits)


def test_answers_end_at_the_stop_token():
    """Also where the model goes on after it; at most four characters."""
    model = table({"3": "1", "1": "2", "2": "<end>", "<end>": "5", "5": "6", "6": "6"})
    answers = dpo.draw_answers(model, TEXT, ["1+3", "1+5", "1+9"], 0.0, torch.Generator())
    assert answers == ["12", "6666", ""]


def test_greedy_answers_take_the_likeliest_token():
    model, prompts = make_tiny(), ["12+34=", "07+91=", "55+55="]
    answers = dpo.draw_answers(model, TEXT, prompts, 0.0, torch.Generator())
    for prompt, answer in zip(prompts, answers):
        tokens = TEXT.encode(prompt)
        for _ in range(4):
            logits = F.linear(model(torch.tensor([tokens]))[0, -1], model.output_weight())
            tokens.append(logits.argmax().item())
        drawn = tokens[6:]
        assert answer == TEXT.decode(drawn[:drawn.index(0)] if 0 in drawn else drawn)


def test_sampled_answers_are_as_frequent_as_they_are_probable():
    model, prompt = make_tiny(), TEXT.encode("1+2=")
    answers = [dpo.draw_answers(model, TEXT, ["1+2="] * 3000, 0.8,
                                torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]
    for answer, count in Counter(answers[0]).most_common(20):
        tokens = TEXT.encode(answer) + [0] * (len(answer) < 4)
        hidden = model(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1]
        logprob = (F.linear(hidden, model.output_weight()) / 0.8).log_softmax(-1)
        prob = logprob.gather(1, torch.tensor(tokens)[:, None]).sum().exp().item()
        assert count / 3000 == pytest.approx(prob, abs=4 * math.sqrt(prob / 3000)), answer


def sum_of(prompt):
    """Return the right answer, digits reversed."""
    a, b = map(int, prompt[:-1].split("+"))
    return f"{a + b:03}"[::-1]


def test_digit_reward():
    example = {"answer": "640"}
    answers = {"640": 9, "641": 6, "64": 6, "46": 0, "": 0, "6400": 9}
    assert {a: dpo.digit_reward(a, example) for a in answers} == answers


def test_labels_of_pairs_are_drawn_as_bradley_and_terry_say(monkeypatch):
    """Different answers only, none empty, at most four pairs of a prompt in a row."""

    def answers(model, tokenizer, prompts, temperature, rng):
        assert temperature > 1, "else no pair holds rare answers"
        choices = [lambda a: a, lambda a: a[:2] + "+", lambda a: "===", lambda a: a[:2] + "=",
                   lambda a: ""]
        return [choices[i % 16 % 5](sum_of(prompt)) for i, prompt in enumerate(prompts)]

    monkeypatch.setattr(dpo, "draw_answers", answers)
    pairs = dpo.make_pairs(None, TEXT, 6000, False, flags())
    assert len(pairs) == 6000 and all("" != p["chosen"] != p["rejected"] != "" for p in pairs)
    wins, counts = Counter(), Counter()
    for pair in pairs:
        rewards = [dpo.digit_reward(pair[name], {"answer": sum_of(pair["prompt"])})
                   for name in ("chosen", "rejected")]
        difference = abs(rewards[0] - rewards[1])
        counts[difference] += 1
        wins[difference] += rewards[0] > rewards[1]
    for difference, least in ((3, 1500), (6, 1500), (9, 700)):
        assert counts[difference] > least
        expected = 1 / (1 + math.exp(-difference))
        noise = 4 * math.sqrt(expected * (1 - expected) / counts[difference])
        assert wins[difference] / counts[difference] == pytest.approx(expected, abs=noise)
    equal = [p["chosen"] < p["rejected"] for p in pairs
             if p["chosen"][:2] == p["rejected"][:2]
             and {p["chosen"][2:], p["rejected"][2:]} == {"+", "="}]
    assert sum(equal) / len(equal) == pytest.approx(0.5, abs=0.1) and len(equal) > 400
    for start in range(0, 400, 4):
        group = pairs[start : start + 4]
        assert len({p["prompt"] for p in group}) == 1
        assert len({frozenset((p["chosen"], p["rejected"])) for p in group}) == 4


def test_pairs_are_made_again_from_the_seed():
    model = make_tiny()
    made = [dpo.make_pairs(model, TEXT, 60, held_out, flags(seed=seed))
            for held_out, seed in ((False, 1), (False, 1), (False, 2), (True, 1))]
    assert made[0] == made[1] != made[2]
    assert all(len(pairs) == 60 for pairs in made)
    splits = [[dpo.split_hash(pair["prompt"]) < 0.1 for pair in pairs] for pairs in made]
    assert not any(splits[0] + splits[2]) and all(splits[3])


def test_held_out_sums_are_in_nothing_that_is_learned_from(tmp_path, monkeypatch):
    taught, addition, asked, draw = [], dpo.addition, [], dpo.draw_answers

    def spy(rng, held_out=False):
        example = addition(rng, held_out)
        taught.append(example["prompt"])
        return example

    with monkeypatch.context() as patch:
        patch.setattr(dpo, "addition", spy)
        patch.setattr(dpo, "tiny_config", small_config)
        dpo.pretrain(flags(pretrain_steps=3), CPU)
    args, model = flags(train_pairs=900, eval_pairs=100), make_tiny()
    pairs, heldout = dpo.load_pairs(args, TEXT, model, tmp_path)
    assert len(pairs) == 900 and len(heldout) == 100

    def keep(model, tokenizer, prompts, temperature, rng):
        asked.extend(prompts)
        return draw(model, tokenizer, prompts, temperature, rng)

    monkeypatch.setattr(dpo, "draw_answers", keep)
    dpo.evaluate_sums(model, TEXT, None, args)
    seen = {*taught, *(TEXT.decode(pair.prompt) for pair in pairs)}
    unseen = {*asked, *(TEXT.decode(pair.prompt) for pair in heldout)}
    assert len(taught) == 768 and len(seen) > 700 and len(asked) == 2048 and len(unseen) > 300
    assert not seen & unseen
    lines = (tmp_path / "pairs.jsonl").read_text().splitlines()
    assert len(lines) == 1000 and set(json.loads(lines[0])) == {"prompt", "chosen", "rejected"}


def test_pretraining_is_that_of_the_other_script(monkeypatch):
    """grpo.py has the tests of what it teaches and of its step sizes."""
    weights = []
    for script in (grpo, dpo):
        monkeypatch.setattr(script, "tiny_config", small_config)
        torch.manual_seed(1)
        args = script.default_args(pretrain_steps=32, device="cpu")
        weights.append(script.pretrain(args, CPU)[1])
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name])


def test_few_pairs_keep_held_out_sums_apart(tmp_path):
    args, model = flags(train_pairs=60, eval_pairs=40), make_tiny()
    pairs, heldout = dpo.load_pairs(args, TEXT, model, tmp_path)
    for part, is_held_out in ((pairs, False), (heldout, True)):
        splits = [dpo.split_hash(TEXT.decode(pair.prompt)) < 0.1 for pair in part]
        assert splits == [is_held_out] * (40 if is_held_out else 60)


def test_measures_of_the_sums_by_hand(monkeypatch):
    """All 1,000 answers: probabilities, E[r], KL to the reference and to the best policy."""
    model, args = make_tiny(), flags(beta=2.0)
    share = {0.0: 512, 1.0: 256}

    def answers(model, tokenizer, prompts, temperature, rng):
        return [sum_of(prompt) if i < share[temperature] else "x"
                for i, prompt in enumerate(prompts)]

    monkeypatch.setattr(dpo, "draw_answers", answers)
    before = dpo.evaluate_sums(model, TEXT, None, args)
    assert before["greedy"] == 0.5 and before["sampled"] == 0.25 and before["kl_to_ref"] == 0
    logprob = before["logprob"]
    assert logprob.shape == (16, 1000)
    torch.testing.assert_close(logprob.exp().sum(1), torch.ones(16))
    rng = random.Random("evaluation")
    examples = [dpo.addition(rng, held_out=True) for _ in range(16)]
    prompt = TEXT.encode(examples[3]["prompt"])
    plain = [plain_logprobs(model, prompt, [*TEXT.encode(a), 0]).sum() for a in ("042", "999")]
    torch.testing.assert_close(logprob[3, 42] - logprob[3, 999], plain[0] - plain[1], atol=1e-4,
                               rtol=1e-4)
    reward = torch.tensor([[3.0 * sum(a == b for a, b in zip(f"{n:03}", example["answer"]))
                            for n in range(1000)] for example in examples])
    mean = (logprob.exp() * reward).sum(1).mean().item()
    assert before["reward"] == pytest.approx(mean, rel=1e-4)
    best = (logprob + reward / 2.0).softmax(1)
    mean = (best * reward).sum(1).mean().item()
    assert before["best_reward"] == pytest.approx(mean, rel=1e-4)
    kl = (logprob.exp() * (logprob - best.log())).sum(1).mean().item()
    assert before["kl_to_best"] == pytest.approx(kl, rel=1e-3) and kl > 0.1
    # With a reference whose best policy is the model itself:
    ref = (logprob - reward / 2.0).log_softmax(1)
    after = dpo.evaluate_sums(model, TEXT, ref, args)
    assert after["kl_to_best"] == pytest.approx(0, abs=1e-5)
    kl = (logprob.exp() * (logprob - ref)).sum(1).mean().item()
    assert after["kl_to_ref"] == pytest.approx(kl, rel=1e-3) and kl > 0.1
    assert after["best_reward"] == pytest.approx(after["reward"], rel=1e-4)


# Data files


GOOD = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}
MODEL = SimpleNamespace(config={"max_position_embeddings": 64})


class Letters(dpo.Characters):
    """With a chat template: the content of the last message."""

    def render(self, messages, add_generation_prompt):
        return messages[-1]["content"]


def write_rows(tmp_path, *rows):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return str(path)


def load(tmp_path, *rows, **changes):
    args = flags(data=write_rows(tmp_path, *rows), **{"batch_size": 1, "eval_pairs": 256} | changes)
    return dpo.load_pairs(args, Letters(), MODEL, None)


def test_only_a_newline_ends_a_row(tmp_path):
    """Not U+2028, which JSON allows in a text; a byte order mark and \r\n do no harm."""
    row = json.dumps(GOOD | {"note": "a\u2028b"}, ensure_ascii=False)
    other = json.dumps(GOOD | {"prompt": "2+0="})
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"\ufeff{row}\r\n\r\n{other}\r\n", encoding="utf-8", newline="")
    assert len(dpo.read_rows(path, dict, False)) == 2


BAD_ROWS = [
    ("{", ["not a JSON object"]),
    ([1], ["object"]),
    ("null", ["object"]),
    ({"prompt": "1", "chosen": "2"}, ["`rejected` must be a text"]),
    ({"chosen": "1", "rejected": "2"}, ["prompt"]),
    (GOOD | {"chosen": "3"}, ["equal"]),
    (GOOD | {"chosen": " "}, ["empty"]),
    (GOOD | {"rejected": ""}, ["empty"]),
    (GOOD | {"prompt": [{"role": "user", "content": "1"}], "rejected": " "}, ["empty"]),
    (GOOD | {"prompt": ""}, ["`prompt` is empty"]),
    (GOOD | {"prompt": "é"}, []),
    (GOOD | {"prompt": 7}, ["`prompt` must be a text"]),
    (GOOD | {"chosen": [1, 2]}, ["`chosen` must be a text"]),
    (GOOD | {"chosen": [{"role": "assistant"}]}, ["content"]),
]


@pytest.mark.parametrize("row, words", BAD_ROWS)
def test_a_bad_row_is_named_or_skipped(row, words, tmp_path, capsys):
    more = [GOOD | {"prompt": f"{i}+1="} for i in range(20)]
    rows = [more[0], row, *more[1:], row]
    with pytest.raises(SystemExit) as stop:
        load(tmp_path, *rows)
    message = str(stop.value)
    assert "\n" not in message and all(w in message for w in ["pairs.jsonl, row 2", *words])
    pairs, heldout = load(tmp_path, *rows, skip_bad_rows=True)
    assert "20 rows used, 0 too long, 2 bad" in capsys.readouterr().out
    assert len(pairs) == 18 and len(heldout) == 2


def test_a_pair_is_cut_at_the_context_of_the_model(tmp_path):
    rows = [GOOD | {"rejected": "1" * 80, "prompt": f"{n}="} for n in range(3)]
    for changes, length in (({}, 64), ({"max_length": 50}, 50)):
        pairs, _ = load(tmp_path, *rows, **changes)
        assert len(pairs[0].prompt + pairs[0].rejected) == length and pairs[0].rejected[-1] != 0
        assert pairs[0].chosen[-1] == 0


@pytest.mark.parametrize("rows, words", [
    ([], ["only 0 pairs"]), (["", " "], ["only 0 pairs"]),
    ([GOOD] * 3, ["--batch-size 1", "0", "3"]), ([GOOD | {"prompt": "1" * 64}], ["only 0 pairs"]),
])
def test_too_few_rows_end_in_one_line(rows, words, tmp_path):
    with pytest.raises(SystemExit) as stop:
        load(tmp_path, *rows)
    assert "\n" not in str(stop.value) and all(word in str(stop.value) for word in words)


def test_answers_are_tokenized_apart_from_the_prompt_and_end_with_the_stop_token():
    split, pair = dpo.read_pair(GOOD | {"chosen": "42"}, TEXT, 64)
    assert split == dpo.split_hash("1+1=") and [*map(list, pair)] == [
        TEXT.encode("1+1="), [*TEXT.encode("42"), 0], [*TEXT.encode("3"), 0]]
    several = SimpleNamespace(encode=TEXT.encode, stop_ids=[5, 0])
    assert list(dpo.read_pair(GOOD, several, 64)[1].rejected) == [*TEXT.encode("3"), 5]


def test_held_out_pairs_are_those_of_some_prompts(tmp_path):
    """--eval-pairs of them or a tenth, at least one; equal prompts stay together."""
    rows = [GOOD | {"prompt": f"{i}="} for i in range(40)]
    splits = {}
    for wanted, expected in ((1, 1), (3, 3), (4, 4), (5, 4), (256, 4)):
        pairs, heldout = load(tmp_path, *rows, eval_pairs=wanted)
        assert len(heldout) == expected and len(pairs) == 40 - expected
        splits[wanted] = {tuple(pair.prompt) for pair in heldout}
    assert splits[1] < splits[3] < splits[4] == splits[256]
    pairs, heldout = load(tmp_path, *reversed(rows), eval_pairs=3)
    assert {tuple(pair.prompt) for pair in heldout} == splits[3], "the order of rows is irrelevant"
    assert [len(part) for part in load(tmp_path, *rows[:5], eval_pairs=256)] == [4, 1]
    often = [row | {"chosen": str(10 + i)} for row in rows for i in range(3)]
    random.Random(0).shuffle(often)
    pairs, heldout = load(tmp_path, *often, eval_pairs=4)
    prompts = [{tuple(pair.prompt) for pair in part} for part in (pairs, heldout)]
    assert len(heldout) == 6 and len(pairs) == 114 and not prompts[0] & prompts[1]


def test_the_batch_must_not_be_larger_than_the_data(tmp_path):
    rows = [GOOD | {"prompt": f"{i}="} for i in range(20)]
    assert len(load(tmp_path, *rows, batch_size=18)[0]) == 18
    with pytest.raises(SystemExit, match="--batch-size 19: there are only 18 pairs"):
        load(tmp_path, *rows, batch_size=19)


# Flags


def call(capsys, *args):
    """Run the script with this command line; return exit code or message, output, result."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["dpo.py", *map(str, args)])
        try:
            result, code = dpo.train(dpo.parse_args()), 0
        except SystemExit as stop:
            result, code = None, stop.code
    return code, capsys.readouterr().out, result


def parse(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["dpo.py", *map(str, args)])
    return dpo.parse_args()


def test_defaults_depend_on_model_and_lora(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert dpo.default_args() == dpo.Args() == parse(monkeypatch)
    folder = dpo.default_args("folder")
    changed = {"model": "folder", "batch_size": 16, "micro_batch_size": 2, "beta": 0.1,
               "learning_rate": 1e-6, "num_epochs": 1, "eval_every": 0}
    assert folder == dpo.Args(**changed) == parse(monkeypatch, "--model", "folder")
    lora = parse(monkeypatch, "--model", "folder", "--lora-rank", 8, "--beta", 0.2)
    assert lora == dpo.Args(**changed | {"lora_rank": 8, "learning_rate": 1e-4, "beta": 0.2})
    assert dpo.default_args("folder", 8, beta=0.2) == lora
    assert parse(monkeypatch, "--lora-rank", 8) == dpo.Args(lora_rank=8)


def test_defaults_are_those_of_the_device(monkeypatch):
    """On a machine with a GPU, --device cpu has the defaults of a CPU."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    for device, bf16, rows in (("cpu", False, 2), ("cuda", True, 8)):
        args = parse(monkeypatch, "--model", "x", "--device", device)
        assert (args.bf16, args.micro_batch_size) == (bf16, rows)


def test_help_shows_the_defaults_of_the_model(capsys):
    for args, rate in ((["--help"], "0.0005"), (["--model", "x", "-h"], "1e-06")):
        code, out, _ = call(capsys, *args)
        assert code == 0 and rate in out and "--skip-bad-rows" in out


@pytest.mark.parametrize(
    "args, words",
    [
        (["--model", "/x"], ["--model", "--data"]),
        (["--data", "/nowhere.jsonl"], ["--model", "--data"]),
        (["--model", "/nowhere/at/all", "--data", __file__], ["--model /nowhere/at/all"]),
        (["--loss-type", "ipo", "--gamma-margin", 1], ["--loss-type ipo", "--gamma-margin"]),
        (["--loss-type", "ipo", "--label-smoothing", 0.1], ["--label-smoothing"]),
        (["--resume", "/nowhere"], ["/nowhere", "not a run"]),
        (["--device", "cuda"], ["--device cuda"]),
    ],
)
def test_mistakes_end_in_one_line(args, words, capsys):
    if "cuda" in args and torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    message, _, _ = call(capsys, *args)
    assert "\n" not in message and all(word in message for word in words), message


def test_a_checkpoint_of_another_script_is_refused(tmp_path, capsys):
    torch.save({"args": {"gamma": 1.0}}, tmp_path / "checkpoint.pt")
    message, _, _ = call(capsys, "--resume", tmp_path)
    assert "not a run of this script" in message and "\n" not in message


# Runs with a small model in a Hugging Face folder


TEMPLATE = ("{% for m in messages %}{% if m.role == 'user' %}w1 {{ m.content }} w2 {% else %}"
            "{{ m.content }} w3 {% endif %}{% endfor %}")
SIZES = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
         "bos_token_id": None, "eos_token_id": 3, "pad_token_id": None}


def write_model(folder, kind):
    """Write a random transformers model and a tokenizer of 40 words; return the model."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    peer = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **SIZES)).eval()
    for param in peer.parameters():
        torch.nn.init.normal_(param, 0.5 if param.dim() == 1 else 0.0, 0.3)
    peer.save_pretrained(folder)
    tokenizer = {"version": "1.0", "added_tokens": [],
                 "model": {"type": "WordLevel", "unk_token": "w0",
                           "vocab": {f"w{i}": i for i in range(40)}},
                 "pre_tokenizer": {"type": "WhitespaceSplit"}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w3",
         "chat_template": TEMPLATE}))
    return peer


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Return flags for a run with a small Llama and 80 pairs: even words are better."""
    folder, rng = tmp_path_factory.mktemp("llama"), random.Random(0)
    write_model(folder, "llama")
    rows = []
    for i in range(80):
        count = rng.randint(1, 4)
        rows.append({
            "prompt": f"w{4 + i % 36} w{4 + i // 36}" if i % 2 else [
                {"role": "user", "content": f"w{4 + i % 36} w{4 + i // 36}"}],
            "chosen": " ".join(f"w{2 * rng.randint(2, 19)}" for _ in range(count)),
            "rejected": " ".join(f"w{2 * rng.randint(2, 19) + 1}" for _ in range(rng.randint(1, 4)))
        })
    return ["--model", folder, "--data", write_rows(folder, *rows), "--batch-size", 8,
            "--micro-batch-size", 3, "--learning-rate", 0.003, "--eval-pairs", 6,
            "--eval-every", 4, "--device", "cpu", "--no-bf16", "--max-steps", 10]


TINY = ["--pretrain-steps", 2, "--batch-size", 16, "--micro-batch-size", 5, "--train-pairs", 150,
        "--eval-pairs", 16, "--eval-every", 4, "--device", "cpu", "--max-steps", 10]


def read_metrics(folder, without=("seconds",)):
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    return [{name: value for name, value in row.items() if name not in without} for row in rows]


def read_checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def assert_same_run(one, two):
    assert read_metrics(one) == read_metrics(two)
    saved = [read_checkpoint(folder) for folder in (one, two)]
    assert saved[0]["model"].keys() == saved[1]["model"].keys()
    for name, weight in saved[0]["model"].items():
        assert torch.equal(weight, saved[1]["model"][name]), name
    assert torch.equal(*(each["progress"]["ref_logprob"] for each in saved))


def press_ctrl_c(monkeypatch, at):
    """Let Ctrl-C be pressed within this batch."""
    update, count = dpo.update, itertools.count(1)

    def pressed(*args):
        if next(count) == at:
            os.kill(os.getpid(), signal.SIGINT)
        return update(*args)

    monkeypatch.setattr(dpo, "update", pressed)


RESUMED = [
    ("llama", []),
    ("llama", ["--lora-rank", 2]),
    ("llama", ["--length-normalize", "--reference-free", "--gamma-margin", 1, "--bf16"]),
    pytest.param("tiny", ["--nll-coef", 1], marks=pytest.mark.slow),
    pytest.param("tiny", ["--lora-rank", 2, "--loss-type", "ipo"], marks=pytest.mark.slow),
]


@pytest.mark.parametrize("kind, extra", RESUMED)
def test_a_resumed_run_equals_one_that_never_stopped(
    kind, extra, llama, tmp_path, capsys, monkeypatch
):
    """Ctrl-C ends the sixth batch, saves, exits with 130; then --resume goes on to the tenth.

    All columns but the time are equal, with them the batches at which it is evaluated. log π_ref is
    not computed again.
    """
    monkeypatch.setattr(dpo, "tiny_config", small_config)
    one, two, command = tmp_path / "one", tmp_path / "two", TINY if kind == "tiny" else llama
    code, _, (model, score) = call(capsys, *command, *extra, "--run-dir", one)
    assert code == 0 and len(read_metrics(one)) == 10
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, at=6)
        code, out, _ = call(capsys, *command, *extra, "--run-dir", two)
    assert code == 130 and "after 6 batches" in out
    assert read_checkpoint(two)["progress"]["step"] == len(read_metrics(two)) == 6
    with (two / "metrics.csv").open("a") as file:
        file.write("7,row,that,is,newer\n8,than,the,checkpoint\n")
    scored, all_answer_logprobs = [], dpo.all_answer_logprobs
    monkeypatch.setattr(dpo, "all_answer_logprobs", lambda model, pairs, *rest: (
        scored.append(len(pairs)), all_answer_logprobs(model, pairs, *rest))[1])
    code, _, (resumed, resumed_score) = call(capsys, "--resume", two)
    assert code == 0 and score == resumed_score
    assert_same_run(one, two)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
    sums = {8000} if kind == "tiny" else set()  # pairs of the answers that evaluate_sums enumerates
    assert set(scored) - sums == {16 if kind == "tiny" else 6}, "only held-out pairs"
    scores = [row["score"] for row in read_metrics(one)]
    assert len({*scores[:3]}) == len({*scores[3:7]}) == len({*scores[7:9]}) == 1


def test_batches_evaluations_and_step_sizes(llama, tmp_path, capsys, monkeypatch):
    """Other pairs each time, AdamW without decay; the learning rate rises, then falls to 0."""
    seen, evaluated, update, evaluate = [], [], dpo.update, dpo.evaluate

    def spy(model, optimizer, pairs, ref_logprob, args):
        group = optimizer.param_groups[0]
        seen.append((group["lr"], group["weight_decay"], frozenset(map(str, pairs))))
        columns = [num_columns(pair) for pair in pairs]
        assert columns == sorted(columns, reverse=True) and type(optimizer) is torch.optim.AdamW
        return update(model, optimizer, pairs, ref_logprob, args)

    def spy_evaluate(model, pairs, ref_logprob, args):
        evaluated.append((len(seen), frozenset(map(str, pairs))))
        return evaluate(model, pairs, ref_logprob, args)

    monkeypatch.setattr(dpo, "update", spy)
    monkeypatch.setattr(dpo, "evaluate", spy_evaluate)
    run = [*llama, "--max-steps", 5, "--learning-rate", 0.01, "--eval-every", 3,
           "--warmup-ratio", 0.4]
    assert call(capsys, *run, "--run-dir", tmp_path / "run")[0] == 0
    rates, decays, batches = zip(*seen)
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.02 / 3, 0.01 / 3]) and set(decays) == {0.0}
    assert len({*batches}) == 5 and all(len(batch) == 8 for batch in batches)
    steps, heldout = zip(*evaluated)
    assert steps == (1, 3, 5) and len({*heldout}) == 1 and len(heldout[0]) == 6
    assert not heldout[0] & frozenset().union(*batches)


@pytest.mark.parametrize("free", [False, True])
def test_a_policy_that_stands_still_is_its_own_reference(free, llama, tmp_path, capsys):
    """Each pair meets its own log π_ref; with --reference-free there is none."""
    extra = ["--reference-free"] if free else []
    run = [*llama, "--max-steps", 3, "--learning-rate", 1e-12, *extra]
    code, _, (model, score) = call(capsys, *run, "--run-dir", tmp_path)
    assert code == 0
    for row in read_metrics(tmp_path):
        assert (abs(float(row["margin"])) < 1e-4) != free
        assert (float(row["loss"]) == pytest.approx(math.log(2), abs=1e-4)) != free
    args = dpo.Args(**json.loads((tmp_path / "args.json").read_text()))
    _, _, tokenizer = dpo.load_model(args)
    pairs, heldout = dpo.load_pairs(args, tokenizer, model, tmp_path)
    saved = read_checkpoint(tmp_path)["progress"]["ref_logprob"]
    expected = plain_scores(model, heldout + pairs).detach() * (not free)
    torch.testing.assert_close(saved, expected, atol=1e-3, rtol=1e-4)
    metrics = dpo.evaluate(model, heldout, saved[:len(heldout)], args)
    assert score == metrics["heldout_accuracy"]
    assert (abs(metrics["heldout_margin"]) < 1e-4) != free


def test_a_resumed_run_with_other_tokens_is_refused(llama, tmp_path, capsys, monkeypatch):
    """Log π_ref in the checkpoint belongs to the old ones."""
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, at=2)
        assert call(capsys, *llama, "--run-dir", tmp_path)[0] == 130
    data = Path(llama[llama.index("--data") + 1])
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows[5]["chosen"] += " w4"
    other = write_rows(tmp_path, *rows)
    message, _, _ = call(capsys, "--resume", tmp_path, "--data", other)
    assert "the pairs have other tokens now" in message
    render = dpo.Tokenizer.render
    with monkeypatch.context() as patch:  # a template that adds today's date to the prompt
        patch.setattr(dpo.Tokenizer, "render", lambda *args, **kwargs: (
            "w9 " + render(*args, **kwargs)))
        message, _, _ = call(capsys, "--resume", tmp_path)
    assert "the pairs have other tokens now" in message
    assert call(capsys, "--resume", tmp_path)[0] == 0


def test_checkpoints_change_nothing(llama, tmp_path, capsys, monkeypatch):
    """--checkpoint-seconds 0 saves after each batch; the default does not in a short run."""
    saves, save = [], dpo.Logger.save
    monkeypatch.setattr(dpo.Logger, "save", lambda self: (saves.append(self.step), save(self)))
    assert call(capsys, *llama, "--run-dir", tmp_path / "one")[0] == 0
    assert saves == [10]
    often = ["--checkpoint-seconds", 0, "--run-dir", tmp_path / "two"]
    assert call(capsys, *llama, *often)[0] == 0
    assert saves == [10, *range(1, 11), 10]
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_a_checkpoint_before_the_first_update_changes_nothing(
    llama, tmp_path, capsys, monkeypatch
):
    """Ctrl-C while log π_ref is computed: no batch is learned from; --resume begins with them."""
    one, two, all_answer_logprobs = tmp_path / "one", tmp_path / "two", dpo.all_answer_logprobs
    assert call(capsys, *llama, "--run-dir", one)[0] == 0

    def pressed(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return all_answer_logprobs(*args)

    with monkeypatch.context() as patch:
        patch.setattr(dpo, "all_answer_logprobs", pressed)
        assert call(capsys, *llama, "--run-dir", two)[0] == 130
    assert read_checkpoint(two)["progress"]["step"] == 0 and not (two / "model").exists()
    assert call(capsys, "--resume", two)[0] == 0
    assert_same_run(one, two)


def test_handler_of_ctrl_c_is_restored(llama, tmp_path, capsys):
    before = signal.getsignal(signal.SIGINT)
    assert call(capsys, *llama, "--max-steps", 1, "--run-dir", tmp_path)[0] == 0
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_during_the_last_save_does_not_stop_it(llama, tmp_path, capsys, monkeypatch):
    save = torch.save

    def pressed(*args):
        os.kill(os.getpid(), signal.SIGINT)
        save(*args)

    monkeypatch.setattr(torch, "save", pressed)
    with contextlib.suppress(KeyboardInterrupt):  # it would end pytest
        assert call(capsys, *llama, "--max-steps", 2, "--run-dir", tmp_path)[0] == 130
    assert read_checkpoint(tmp_path)["progress"]["step"] == 2


def test_a_second_ctrl_c_stops_at_once(llama, tmp_path, capsys, monkeypatch):
    def update(*args):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(dpo, "update", update)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        dpo.train(parse(monkeypatch, *llama, "--run-dir", tmp_path))
    assert not (tmp_path / "model").exists() and not (tmp_path / "checkpoint.pt").exists()


def test_ctrl_c_during_the_exchange_is_not_lost(monkeypatch):
    log = dpo.Logger.__new__(dpo.Logger)
    log.interrupted = False
    monkeypatch.setattr(dpo, "all_gather_object", lambda sent: (
        setattr(log, "interrupted", True) or [sent]))
    assert not log.stopped()  # the other processes do not know of it yet
    assert log.interrupted


@pytest.mark.parametrize("processes", [1, 2])
def test_after_an_error_in_one_of_several_processes_nothing_is_saved(processes, monkeypatch):
    """Saving would wait for the others, which are in a batch."""
    log, saves = dpo.Logger.__new__(dpo.Logger), []
    monkeypatch.setattr(dpo.dist, "is_initialized", lambda: processes > 1)
    monkeypatch.setattr(dpo.dist, "get_rank", lambda: 1)
    vars(log).update(args=flags(), interrupted=False, bar=SimpleNamespace(close=int), step=1,
                     score=0.0, seconds=1.0, dir="x", save=lambda: saves.append(1),
                     old_handler=signal.getsignal(signal.SIGINT))
    log.__exit__(ValueError, ValueError(), None)
    assert len(saves) == (processes == 1)


@pytest.mark.parametrize("waited, saved", [((0.0, 1e9), 0), ((1e9, 0.0), 1)])
def test_checkpoints_go_by_the_clock_of_the_first_process(waited, saved, monkeypatch):
    log, saves = dpo.Logger.__new__(dpo.Logger), []
    monkeypatch.setattr(dpo, "get_rank", lambda: 1)
    monkeypatch.setattr(dpo, "all_gather_object", lambda _: waited)
    bar = SimpleNamespace(set_postfix=lambda **_: None, update=lambda: None)
    vars(log).update(args=flags(), bar=bar, start=0.0, saved_at=0.0, score=0.0,
                     save=lambda: saves.append(1))
    log.write()
    assert len(saves) == saved


def test_tracking(llama, tmp_path, capsys, monkeypatch):
    """The rows go to wandb; a resumed run goes on under its id, and the seconds go on, too."""
    rows, runs = [], []
    fake = SimpleNamespace(init=lambda **settings: (runs.append(settings), SimpleNamespace(
        id=settings["id"] or "new", log=lambda row, step: rows.append(row)))[1])
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, at=2)
        assert call(capsys, *llama, "--track", "--run-dir", tmp_path)[0] == 130
    assert call(capsys, "--resume", tmp_path)[0] == 0
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert {"score", "seconds", "loss", "heldout_accuracy"} <= rows[0].keys()
    assert [(r["id"], r["resume"], r["project"]) for r in runs] == [
        (id_, "allow", "policy-gradients") for id_ in (None, "new")]
    seconds = [float(row["seconds"]) for row in read_metrics(tmp_path, ())]
    assert seconds == sorted(seconds)


def test_a_resumed_run_takes_new_flags_but_not_other_batches(llama, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, at=2)
        assert call(capsys, *llama, "--beta", 0.7, "--run-dir", tmp_path)[0] == 130
    for flag in ("--max-steps", "--eval-pairs", "--batch-size", "--num-epochs", "--max-length",
                 "--seed", "--lora-rank", "--model"):
        message, _, _ = call(capsys, "--resume", tmp_path, flag, 4)
        assert "cannot change" in message and flag[2:].replace("-", "_") in message
    assert "cannot change" in call(capsys, "--resume", tmp_path, "--bf16")[0]
    assert "cannot change" in call(capsys, "--resume", tmp_path, "--reference-free")[0]
    assert call(capsys, "--resume", tmp_path, "--learning-rate", 1e-4)[0] == 0
    saved = read_checkpoint(tmp_path)
    assert saved["progress"]["step"] == len(read_metrics(tmp_path)) == 10
    assert (saved["args"]["beta"], saved["args"]["learning_rate"]) == (0.7, 1e-4)


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(
    llama, tmp_path, capsys, monkeypatch
):
    loss, batch_indices, batches = dpo.preference_loss, dpo.batch_indices, []
    monkeypatch.setattr(dpo, "batch_indices", lambda *args: (
        batches.append(args), batch_indices(*args))[1])
    monkeypatch.setattr(dpo, "preference_loss", lambda *args, **options: (
        loss(*args, **options) * (math.nan if len(batches) == 3 else 1)))
    with pytest.raises(RuntimeError, match="non-finite"):
        call(capsys, *llama, "--run-dir", tmp_path)
    saved = read_checkpoint(tmp_path)
    assert saved["progress"]["step"] == 2 and not (tmp_path / "model").exists()
    assert all(weight.isfinite().all() for weight in saved["model"].values())


def test_a_folder_that_holds_a_run_is_refused(llama, tmp_path, capsys):
    short = [*llama, "--max-steps", 1, "--run-dir", tmp_path]
    assert call(capsys, *short)[0] == 0
    before = (tmp_path / "checkpoint.pt").read_bytes(), (tmp_path / "metrics.csv").read_text()
    message, _, _ = call(capsys, *short)
    assert "holds a run already" in message and "\n" not in message
    assert before == ((tmp_path / "checkpoint.pt").read_bytes(),
                      (tmp_path / "metrics.csv").read_text())


def test_resume_with_the_checkpoint_alone(llama, tmp_path, capsys):
    assert call(capsys, *llama, "--max-steps", 3, "--run-dir", tmp_path)[0] == 0
    (tmp_path / "metrics.csv").unlink()
    assert call(capsys, "--resume", tmp_path)[0] == 0
    assert (tmp_path / "metrics.csv").read_text() == ""


def test_after_a_full_disk_the_run_can_be_exported_again(llama, tmp_path, capsys, monkeypatch):
    """The checkpoint has all batches; the half of an export has no config.json."""

    def save_file(weights, path, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr("safetensors.torch.save_file", save_file)
        call(capsys, *llama, "--max-steps", 2, "--run-dir", tmp_path)
    assert read_checkpoint(tmp_path)["progress"]["step"] == 2
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["model.safetensors"]
    assert call(capsys, "--resume", tmp_path)[0] == 0
    assert (tmp_path / "model" / "model.safetensors").read_bytes() != b"half"
    assert (tmp_path / "model" / "config.json").exists()


def test_a_full_disk_leaves_the_last_checkpoint(llama, tmp_path, capsys, monkeypatch):
    save, count = torch.save, itertools.count(1)

    def full(state, path):
        if next(count) >= 3:
            Path(path).write_bytes(b"half")
            raise OSError("No space left on device")
        save(state, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        call(capsys, *llama, "--checkpoint-seconds", 0, "--run-dir", tmp_path)
    assert read_checkpoint(tmp_path)["progress"]["step"] == 2


@pytest.mark.parametrize("kind, rank", [("llama", 0), ("llama", 3), ("qwen2", 3)])
def test_a_model_folder_from_end_to_end(kind, rank, llama, tmp_path, capsys):
    """Scores are those of transformers; the run learns; its export has the model's logits."""
    transformers = pytest.importorskip("transformers")
    peer = write_model(tmp_path, kind)
    data = llama[llama.index("--data") + 1]
    rate = 0.03 if rank else 0.005
    command = [*llama, "--model", tmp_path, "--lora-rank", rank, "--learning-rate", rate,
               "--max-steps", 20, "--batch-size", 16, "--run-dir", tmp_path / "run"]
    code, _, (model, score) = call(capsys, *command)
    assert code == 0 and score > 0.8
    rows = read_metrics(tmp_path / "run")
    assert float(rows[-1]["margin"]) > float(rows[0]["margin"]) + 0.5
    assert float(rows[0]["loss"]) == pytest.approx(math.log(2), rel=1e-3)
    saved = read_checkpoint(tmp_path / "run")
    args = dpo.Args(**saved["args"])
    _, _, tokenizer = dpo.load_model(args)
    pairs, heldout = dpo.load_pairs(args, tokenizer, model, None)
    assert args.data == data and len(pairs) == 74 and len(heldout) == 6
    for pair, reference in zip(heldout + pairs, saved["progress"]["ref_logprob"][:9]):
        for answer, ours in zip((pair.chosen, pair.rejected), reference):
            assert answer[-1] == 3
            tokens = torch.tensor([pair.prompt + answer])
            with torch.no_grad():
                logprob = peer(tokens).logits[0].log_softmax(-1)[len(pair.prompt) - 1 : -1]
            expected = logprob.gather(1, torch.tensor(list(answer))[:, None]).sum()
            torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    assert all("lora_" in name for name in saved["model"]) == bool(rank)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").eval()
    tokens = torch.tensor([pairs[0].prompt + pairs[0].chosen])
    with torch.no_grad():
        ours = F.linear(model(tokens), model.output_weight())
        torch.testing.assert_close(again(tokens).logits, ours, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(peer(tokens).logits, ours, atol=0.1)
    assert (tmp_path / "run" / "model" / "tokenizer.json").exists()


def test_prompts_go_through_the_chat_template(llama):
    args = dpo.Args(model=str(llama[1]))
    _, _, tokenizer = dpo.load_model(args)
    row = {"prompt": [{"role": "user", "content": "w7"}], "chosen": "w8", "rejected": "w9 w9"}
    _, pair = dpo.read_pair(row, tokenizer, 64)
    assert [*map(list, pair)] == [[1, 7, 2], [8, 3], [9, 9, 3]]
    assert list(dpo.read_pair(row | {"prompt": "w7"}, tokenizer, 64)[1].prompt) == [7]


def test_lora_trains_adapters_only():
    """They start at 0; the model's own weights get no gradient."""
    model, whole, pairs = make_tiny(lora_rank=2), make_tiny(), random_pairs()
    args = flags()
    before = dpo.all_answer_logprobs(model, pairs, 4, CPU)
    torch.testing.assert_close(before, dpo.all_answer_logprobs(whole, pairs, 4, CPU))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.1)
    order = dpo.by_length(pairs, range(6))
    for _ in range(2):
        dpo.update(model, optimizer, [pairs[i] for i in order], before[order], args)
    changed = {name for name, param in model.named_parameters() if "lora_" in name}
    for name, weight in whole.named_parameters():
        assert torch.equal(weight, dict(model.named_parameters())[name])
    assert len(changed) == 28 and all(
        dict(model.named_parameters())[name].any() for name in changed)
    assert not torch.allclose(dpo.all_answer_logprobs(model, pairs, 4, CPU), before)


# Runs of the tiny GPT


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_a_checkpoint_of_the_tiny_gpt_has_all_weights(rank, tmp_path, capsys, monkeypatch):
    """Also those that LoRA does not train: they have no other source."""
    monkeypatch.setattr(dpo, "tiny_config", small_config)
    run = [*TINY, "--max-steps", 2, "--lora-rank", rank, "--run-dir", tmp_path]
    code, out, _ = call(capsys, *run)
    assert code == 0 and out.count("before:") == out.count("after:") == 1
    saved = read_checkpoint(tmp_path)["model"]
    _, weights, _ = dpo.pretrain(flags(pretrain_steps=2, **seeded()), CPU)
    assert weights.keys() <= saved.keys()
    assert any("lora_" in name for name in saved) == bool(rank)
    assert all(torch.equal(weight, saved[name]) for name, weight in weights.items()) == bool(rank)


def seeded():
    """Do what setup does before the tiny GPT gets its weights."""
    torch.manual_seed(1)
    return {"seed": 1}


def test_a_short_run_learns_a_simple_reward(tmp_path, capsys, monkeypatch):
    """Large digits are better: nearer to π*, farther from π_ref, better on held-out pairs."""
    monkeypatch.setattr(dpo, "tiny_config", small_config)
    monkeypatch.setattr(dpo, "digit_reward", lambda answer, example: sum(
        int(digit) / 3 for digit in answer if digit.isdigit()))
    code, out, (_, score) = call(
        capsys, "--pretrain-steps", 15, "--max-steps", 50, "--train-pairs", 2000, "--batch-size",
        64, "--eval-pairs", 128, "--eval-every", 10, "--learning-rate", 5e-3, "--device", "cpu",
        "--run-dir", tmp_path)
    assert code == 0 and score > 0.65, out
    before, after = ({name: float(value) for name, value in (
        pair.rsplit(" ", 1) for pair in line.partition("; ")[2].replace("; ", ", ").split(", "))}
        for line in out.splitlines() if line.startswith(("before", "after")))
    assert before["KL(pi||pi_ref)"] == 0 < after["KL(pi||pi_ref)"]
    assert after["E[r]"] > before["E[r]"] + 0.5
    assert after["KL(pi||pi*)"] < before["KL(pi||pi*)"] - 0.5


def test_a_copy_alone_in_an_empty_folder(tmp_path):
    shutil.copy(ROOT / "dpo.py", tmp_path)
    command = [sys.executable, "dpo.py", *map(str, TINY), "--max-steps", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "KL(pi||pi*)" in done.stdout, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("dpo-addition-1-")
    assert {path.name for path in folder.iterdir()} == {
        "args.json", "metrics.csv", "checkpoint.pt", "pairs.jsonl"}


# Two processes


RANKS = """
import os, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch
import test_dpo as t, dpo
dist, results, out = dpo.dist, {{}}, {out!r}
try:
    dpo.setup(t.flags(batch_size=3))
except SystemExit as error:
    results["refused"] = str(error)
dist.init_process_group = dist.destroy_process_group = lambda *_, **__: None  # one group for all
results["learned"] = {{rank: t.learn(rank) for rank in (0, 2)}}
dpo.tiny_config = t.small_config


def main(*args):
    sys.argv = ["dpo.py", *args]
    return dpo.train(dpo.parse_args())


update, count = dpo.update, []


def pressed(*args):
    count.append(1)
    if len(count) == 4 and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGINT)
    return update(*args)


dpo.update = pressed
try:
    main(*{llama!r}, "--run-dir", out + "/llama")
except SystemExit as error:
    results["code"] = error.code
dpo.update = update
results["score"] = main(*{tiny!r}, "--run-dir", out + "/tiny")[1]
torch.save(results, out + "/rank" + os.environ["RANK"])
dist.barrier()
"""


def learn(rank):
    """Take three updates; return what is known afterwards. For one process, or each of two."""
    torch.manual_seed(5)
    args = flags(micro_batch_size=2, max_grad_norm=0.5, lora_rank=rank)
    model, pairs = make_tiny(lora_rank=rank), random_pairs(9)
    for name, param in model.named_parameters():  # a process keeps its rows alone
        shard = param.to_local() if hasattr(param, "to_local") else param
        rows = math.ceil(len(param) / (2 if hasattr(param, "to_local") else 1))
        assert shard.untyped_storage().nbytes() <= 4 * rows * math.prod(param.shape[1:]), name
    reference = dpo.all_answer_logprobs(make_tiny(seed=1), pairs, 4, CPU)
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer, metrics = torch.optim.SGD(params, 0.5, 0.9), []
    for numbers in ([0, 3, 5, 8, 2, 1], [1, 2, 4, 6, 7, 8], [8, 0, 1, 2, 3, 4]):
        numbers = dpo.local_rows(dpo.by_length(pairs, numbers))
        metrics.append(dpo.update(model, optimizer, [pairs[i] for i in numbers],
                                  reference[numbers], args))
    evaluation = dpo.evaluate(model, pairs[:5], reference[:5], args)
    return {"reference": reference, "metrics": metrics, "evaluation": evaluation,
            "weights": {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach()
                        for n, p in model.named_parameters()}}


@pytest.fixture(scope="module")
def two_ranks(llama, tmp_path_factory):
    """Run two processes; return the folder and how they ended."""
    folder = tmp_path_factory.mktemp("ranks")
    script = folder / "ranks.py"
    script.write_text(RANKS.format(
        root=str(ROOT), tests=str(ROOT / "tests"), out=str(folder), llama=list(map(str, llama)),
        tiny=list(map(str, [*TINY, "--max-steps", 3]))))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(script)],
        capture_output=True, text=True, check=False, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"})
    return folder, done


def results_of(two_ranks):
    """Return what each process has saved."""
    folder, done = two_ranks
    assert done.returncode == 0, done.stderr[-5000:]
    return [torch.load(folder / f"rank{rank}", weights_only=True) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_two_processes_learn_what_one_does(rank, two_ranks):
    """Scores of nine pairs, metrics of three updates, the weights after them, an evaluation."""
    ours, theirs = (results["learned"][rank] for results in results_of(two_ranks))
    alone = learn(rank)
    torch.testing.assert_close(ours, theirs, atol=0, rtol=0, equal_nan=True)
    for part in ("reference", "metrics", "evaluation", "weights"):
        torch.testing.assert_close(ours[part], alone[part], atol=2e-4, rtol=2e-3, equal_nan=True,
                                   msg=lambda text, part=part: f"{part}: {text}")


@pytest.mark.slow
def test_two_processes_refuse_an_odd_batch(two_ranks):
    for results in results_of(two_ranks):
        assert results["refused"] == "--batch-size 3: not divisible by 2 processes"


def assert_close_rows(ours, theirs):
    assert len(ours) == len(theirs)
    for row, other in zip(ours, theirs):
        assert {name: float(x) for name, x in row.items()} == pytest.approx(
            {name: float(x) for name, x in other.items()}, rel=1e-2, abs=1e-3, nan_ok=True)


@pytest.mark.slow
def test_ctrl_c_in_one_of_two_processes_stops_both_and_one_goes_on(
    two_ranks, llama, tmp_path, capsys
):
    assert [results["code"] for results in results_of(two_ranks)] == [130, 130]
    run = two_ranks[0] / "llama"
    assert read_checkpoint(run)["progress"]["step"] == len(read_metrics(run)) == 4
    assert call(capsys, "--resume", run)[0] == 0
    assert call(capsys, *llama, "--run-dir", tmp_path)[0] == 0
    assert_close_rows(read_metrics(run), read_metrics(tmp_path))


@pytest.mark.slow
def test_the_tiny_gpt_in_two_processes(two_ranks, tmp_path, capsys, monkeypatch):
    results, (folder, done) = results_of(two_ranks), two_ranks
    monkeypatch.setattr(dpo, "tiny_config", small_config)
    assert done.stdout.count("before:") == done.stdout.count("after:") == 1
    code, alone, (_, score) = call(capsys, *TINY, "--max-steps", 3, "--run-dir", tmp_path)
    assert code == 0 and results[0]["score"] == results[1]["score"] == pytest.approx(score, abs=0.1)
    one, two = ((run / "pairs.jsonl").read_text() for run in (tmp_path, folder / "tiny"))
    assert one == two
    assert_close_rows(*(read_metrics(run, ("seconds", "score", "chosen_fell", "accuracy",
                                           "accuracy_longer", "accuracy_shorter"))
                        for run in (tmp_path, folder / "tiny")))
    wanted = [line for line in alone.splitlines() if line.startswith("before")]
    assert wanted == [line for line in done.stdout.splitlines() if line.startswith("before")]


# Further cases


def test_a_new_run_makes_pairs_of_its_own(tmp_path):
    """Also in a folder with those of a run that was killed before its first checkpoint."""
    write_rows(tmp_path, *[GOOD] * 100)
    args = flags(train_pairs=60, eval_pairs=40)
    pairs, heldout = dpo.load_pairs(args, TEXT, make_tiny(), tmp_path)
    assert (len(pairs), len(heldout)) == (60, 40)


def test_all_processes_have_the_folder_of_the_first(monkeypatch):
    """They read the tiny GPT's pairs there."""
    monkeypatch.setattr(dpo, "get_rank", lambda: 1)
    monkeypatch.setattr(dpo, "all_gather_object", lambda name: ["of-the-first", name])
    assert dpo.Logger(flags(), None, None).dir == Path("runs/of-the-first")


def test_a_checkpoint_cannot_run_code(tmp_path, capsys):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    torch.save({"args": Code()}, tmp_path / "checkpoint.pt")
    assert "not a run" in call(capsys, "--resume", tmp_path)[0]
    assert not (tmp_path / "made").exists()


def test_second_ctrl_c_exits_with_130(llama, tmp_path, capsys, monkeypatch):
    """In one line, without a traceback."""

    def update(*args):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(dpo, "update", update)
    code = None
    with contextlib.suppress(KeyboardInterrupt):  # it would end pytest
        code, out, _ = call(capsys, *llama, "--run-dir", tmp_path)
    assert code == 130 and "after 0 batches" in out


def test_a_mistake_in_the_data_ends_in_its_line_alone(llama, tmp_path, capsys):
    """No score of a run that did not begin."""
    message, out, _ = call(capsys, *llama, "--data", write_rows(tmp_path, GOOD | {"chosen": " "}),
                           "--run-dir", tmp_path / "run")
    assert "row 1: `chosen` is empty" in message and "score" not in out
