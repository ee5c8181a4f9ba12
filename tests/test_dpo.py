"""dpo.py: the loss to the equation, pairs however they are cut, the exact answer, data, resume."""

import csv
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, teach_once
from test_decoder import smollm2 as smollm2
from test_grpo import Still, call, plain_logprobs, tiny, torchrun, weights

import dpo

CPU = torch.device("cpu")


def model_of(**changes):
    """The same weights as tiny's, as dpo.py's own class."""
    twin = tiny(**changes)
    model = dpo.Decoder(twin.config, changes.get("rank", 0))
    model.load_state_dict(twin.state_dict())
    return model


def flags(**changes):
    values = {"num_pairs": 4, "learning_rate": 0.01, "beta": 0.3, "bf16": False,
              "tokens_per_micro_batch": 8192} | changes
    return dpo.Args(**values)


def random_pairs(count=6, seed=0):
    rng = random.Random(seed)

    def some(low, high):
        return [rng.randrange(1, 11) for _ in range(rng.randint(low, high))]

    return [dpo.Pair(some(1, 9), [*some(1, 6), 0], [*some(1, 6), 0]) for _ in range(count)]


def lengths(pairs):
    return torch.tensor([[len(c), len(r)] for _, c, r in pairs])


def plain_scores(model, pairs):
    return torch.stack(
        [
            torch.stack([plain_logprobs(model, p, answer).sum() for answer in (c, r)])
            for p, c, r in pairs
        ]
    )


def gradient(model, pairs, numbers, reference, args):
    model.zero_grad()
    result = dpo.step(
        model, Still(model.parameters()), pairs, numbers, reference, lengths(pairs), args
    )
    return torch.cat([p.grad.flatten() for p in model.parameters()]), *result


# The loss


def test_at_the_reference_the_loss_is_log_2():
    logprob = -torch.rand(5, 2) * 9
    loss = dpo.preference_loss(logprob, logprob, 0.1, "sigmoid")
    torch.testing.assert_close(loss, torch.full((5,), math.log(2)))
    ipo = dpo.preference_loss(logprob, logprob, 0.1, "ipo")
    torch.testing.assert_close(ipo, torch.full((5,), 25.0))


def test_the_gradient_weighs_pairs_by_how_wrong_the_reward_is():
    logprob = (-torch.rand(7, 2) * 9).requires_grad_()
    ref, beta = -torch.rand(7, 2) * 9, 0.3
    dpo.preference_loss(logprob, ref, beta, "sigmoid").sum().backward()
    reward = beta * (logprob - ref).detach()
    weight = beta * torch.sigmoid(reward[:, 1] - reward[:, 0])
    torch.testing.assert_close(logprob.grad, torch.stack([-weight, weight], 1))


@pytest.mark.parametrize("smoothing, margin", [(0.0, 0.0), (0.2, 0.0), (0.0, 1.5), (0.1, 0.5)])
def test_smoothed_and_margin_losses_by_the_formula(smoothing, margin):
    logprob, ref, beta = -torch.rand(6, 2) * 5, -torch.rand(6, 2) * 5, 0.7
    expected = []
    for (w, loser), (rw, rl) in zip(logprob.tolist(), ref.tolist()):
        z = beta * ((w - rw) - (loser - rl)) - margin
        right = -math.log(1 / (1 + math.exp(-z)))
        wrong = -math.log(1 / (1 + math.exp(z)))
        expected.append((1 - smoothing) * right + smoothing * wrong)
    loss = dpo.preference_loss(logprob, ref, beta, "sigmoid", smoothing, margin)
    torch.testing.assert_close(loss, torch.tensor(expected), atol=1e-5, rtol=1e-5)


def trl_loss(logprob, ref, length, beta, loss_type):
    """The loss as TRL's trainer has it; logprob and ref (P, 2), spread evenly over the tokens."""
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
def test_loss_and_gradient_are_those_of_trl(loss_type, normalize, theirs):
    torch.manual_seed(3)
    ref, length, losses, grads = -torch.rand(5, 2) * 20, torch.randint(1, 9, (5, 2)), [], []
    for ours in (True, False):
        logprob = (ref + torch.sin(torch.arange(10.0)).view(5, 2)).requires_grad_()
        if ours:
            scale = 1 / length if normalize else torch.ones_like(length)
            loss = dpo.preference_loss(logprob * scale, ref * scale, 0.2, loss_type).mean()
        else:
            loss = trl_loss(logprob, ref, length, 0.2, theirs)
        loss.backward()
        losses.append(loss.item())
        grads.append(logprob.grad)
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-5)


def test_on_a_table_training_reaches_the_closed_form():
    """All pairs of five answers, labelled by Bradley and Terry: π becomes π_ref e^{r/β} / Z."""
    torch.manual_seed(0)
    ref = torch.randn(5, dtype=torch.double).log_softmax(-1)
    reward, beta = torch.randn(5, dtype=torch.double), 0.5
    pairs = torch.tensor([(i, j) for i in range(5) for j in range(5) if i != j])
    weight = torch.sigmoid(reward[pairs[:, 0]] - reward[pairs[:, 1]])
    theta = torch.zeros(5, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [theta],
        max_iter=500,
        tolerance_grad=1e-12,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        logprob = theta.log_softmax(-1)
        loss = (weight * dpo.preference_loss(logprob[pairs], ref[pairs], beta, "sigmoid")).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    best = dpo.best_policy(ref, reward, beta)
    torch.testing.assert_close(theta.detach().log_softmax(-1), best, atol=1e-4, rtol=1e-4)
    expected = ref.exp() * (reward / beta).exp()
    torch.testing.assert_close(best.exp(), expected / expected.sum())


def test_facts_of_pairs_by_hand():
    logprob = torch.tensor([[-1.0, -5.0], [-4.0, -2.0], [-3.0, -9.0]])
    ref = torch.tensor([[-2.0, -4.0], [-3.0, -3.0], [-2.0, -4.0]])
    length = torch.tensor([[3, 2], [1, 4], [2, 2]])
    facts = dpo.preference_facts(logprob, ref, length, 0.5)
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
    assert {name: x.item() for name, x in facts.items()} == pytest.approx(expected, abs=1e-6)


# Pairs through the model


def test_scores_are_those_of_plain_rows():
    """Prompt tokens are not counted, the stop token is, the answers do not see each other."""
    model, pairs = model_of(), random_pairs(7)
    for budget in (1, 30, 10_000):
        scores = dpo.score_all(model, pairs, budget, CPU)
        torch.testing.assert_close(scores, plain_scores(model, pairs), atol=1e-4, rtol=1e-4)


VARIANTS = [
    {},
    {"loss_type": "ipo"},
    {"length_normalize": True},
    {"nll_coef": 0.5},
    {"label_smoothing": 0.1, "gamma_margin": 0.4},
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_way_to_cut_the_batch_changes_the_gradient(variant):
    model, pairs = model_of(), random_pairs(8)
    reference = plain_scores(model_of(seed=1), pairs).detach()
    numbers, results = [1, 4, 6, 7, 2], []
    for budget in (1, 25, 10_000):
        args = flags(**variant, tokens_per_micro_batch=budget, max_grad_norm=1e9)
        results.append(gradient(model, pairs, numbers, reference, args))
    results.append(gradient(model, pairs, [7, 2, 1, 6, 4], reference, args))
    for grad, loss, *_ in results[1:]:
        torch.testing.assert_close(grad, results[0][0], atol=2e-5, rtol=1e-3)
        assert loss.item() == pytest.approx(results[0][1].item(), rel=1e-4)
    torch.testing.assert_close(results[3][3], results[0][3][[3, 4, 0, 2, 1]])
    model.zero_grad()
    scores, length = plain_scores(model, pairs), lengths(pairs)
    scale = 1 / length if args.length_normalize else torch.ones_like(length)
    loss = dpo.preference_loss(
        (scores * scale)[numbers],
        (reference * scale)[numbers],
        0.3,
        args.loss_type,
        args.label_smoothing,
        args.gamma_margin,
    ).mean()
    loss = loss - args.nll_coef * (scores / length)[numbers, 0].mean()
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(results[0][0], expected, atol=2e-5, rtol=1e-3)


def test_a_step_prefers_the_better_answer():
    model, pairs = model_of(), random_pairs(4)
    reference = dpo.score_all(model, pairs, 999, CPU)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    loss, norm, logprob = dpo.step(
        model, optimizer, pairs, [0, 1, 2, 3], reference, lengths(pairs), flags()
    )
    assert loss.item() == pytest.approx(math.log(2), rel=1e-5) and norm > 0
    torch.testing.assert_close(logprob, reference)
    after = dpo.score_all(model, pairs, 999, CPU) - reference
    assert ((after[:, 0] - after[:, 1]) > 0).all()


def test_exact_probabilities_of_all_answers():
    text = dpo.Characters()
    model = model_of(vocabulary=len(text.symbols))
    prompts = [text.encode("12+34="), text.encode("07+91=")]
    logprob = dpo.exact(model, prompts, CPU)
    assert logprob.shape == (2, 1000)
    torch.testing.assert_close(logprob.exp().sum(1), torch.ones(2))
    plain = [plain_logprobs(model, prompts[1], [*text.encode(a), 0]).sum() for a in ("042", "999")]
    difference = logprob[1, 42] - logprob[1, 999]
    torch.testing.assert_close(difference, plain[0] - plain[1], atol=1e-4, rtol=1e-4)


def test_answers_are_drawn_as_probable_as_they_are():
    text = dpo.Characters()
    torch.manual_seed(0)
    model = model_of(vocabulary=len(text.symbols))
    prompts = [text.encode("1+2="), text.encode("34+5=")]
    answers = dpo.draw(model, prompts, 4000, 0.8, seed=1)
    assert len(answers) == 8000 and dpo.draw(model, prompts, 4000, 0.8, seed=1) == answers
    assert dpo.draw(model, prompts, 4000, 0.8, seed=2) != answers
    for prompt, some in zip(prompts, (answers[:4000], answers[4000:])):
        assert all(len(a) == 4 or a[-1] == 0 for a in some) and all(0 not in a[:-1] for a in some)
        for answer, count in Counter(map(tuple, some)).most_common(20):
            logits = [model(*dpo.collate([(prompt, [(0, [*answer[:t], 0])])], CPU)[0][:3],
                            torch.tensor([len(prompt) + t - 1]), None, 0.8)[0]
                      for t in range(len(answer))]
            prob = math.exp(sum(row[token].item() for row, token in zip(logits, answer)))
            assert count / 4000 == pytest.approx(prob, abs=4 * math.sqrt(prob / 4000)), answer
    likeliest = dpo.draw(model, prompts, 2, 0.0, seed=3)
    assert likeliest[0] == likeliest[1] and likeliest[2] == likeliest[3]
    row, _ = dpo.collate([(prompts[0], [(0, [0])])], CPU)
    first = model(*row[:3], row.source, None, 1.0).argmax()
    assert likeliest[0][0] == first


def test_pairs_are_labelled_by_chance_as_the_reward_says():
    text = dpo.Characters()
    model = model_of(vocabulary=len(text.symbols))

    def answer(model, prompts, count, *_):
        rows = []
        for prompt in prompts:
            a, b = map(int, text.decode(prompt)[:-1].split("+"))
            rows += [
                [*text.encode(f"{a + b:03}"[::-1]), 0],
                *[[1, 1, 1, 0]] * 14,
                [2, 2, 2, 0],
            ]
        return rows

    def gains(pair):
        a, b = map(int, text.decode(pair.prompt)[:-1].split("+"))
        example = {"answer": f"{a + b:03}"[::-1]}
        return [dpo.worth(text.decode(answer), example) for answer in (pair.chosen, pair.rejected)]

    with mock.patch.object(dpo, "draw", answer):
        pairs = [dpo.Pair(*p) for p in dpo.make_pairs(model, text, random.Random(0), 3000, False)]
    assert all(p.chosen != p.rejected for p in pairs)
    once = {(*p.prompt, *map(tuple, sorted([p.chosen, p.rejected]))) for p in pairs}
    assert len(once) > 0.8 * len(pairs), "the fourteen are one answer, not fourteen"
    clear = [p for p in pairs if {0, 9} == set(gains(p))]
    assert sum(gains(p)[0] == 9 for p in clear) / len(clear) > 0.995, "σ(9)"
    close = [p for p in pairs if abs(gains(p)[0] - gains(p)[1]) == 3]
    share = sum(gains(p)[0] > gains(p)[1] for p in close) / len(close)
    assert len(close) > 300 and share == pytest.approx(1 / (1 + math.exp(-3)), abs=0.03)


def test_held_out_sums_are_in_nothing_that_is_learned_from(monkeypatch):
    text, asked = dpo.Characters(), {}
    model, draw = model_of(vocabulary=len(text.symbols)), dpo.draw

    def keep(model, prompts, count, temperature, seed):
        asked.setdefault(temperature, []).extend(map(tuple, prompts))
        return draw(model, prompts, count, temperature, seed)

    def teach(model, text, example_of, args):
        asked["taught"] = [tuple(text.encode(example_of(rng)["prompt"])) for _ in range(2000)]
        raise InterruptedError

    monkeypatch.setattr(dpo, "draw", keep)
    rng, args = random.Random(1), flags(train_pairs=3000, eval_pairs=200)
    pairs, heldout = dpo.load_pairs(SimpleNamespace(before={}), model, text, args)
    assert len(pairs) == 3000 and len(heldout) == 200
    assert min(asked) > 1, "else no pair holds down what is seldom drawn"
    dpo.exam(model, text, None, args)
    assert len(asked[0.0]) == len(asked[1.0]) == 1024
    monkeypatch.setattr(dpo, "imitate", teach)
    with pytest.raises(InterruptedError):
        dpo.train(args)
    seen = {tuple(pair.prompt) for pair in pairs} | {*asked["taught"]}
    unseen = {tuple(pair.prompt) for pair in heldout} | {*asked[0.0], *asked[1.0]}
    assert len(seen) > 1000 and len(unseen) > 300 and not seen & unseen


# Data


GOOD = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}


def data(tmp_path, *rows, **changes):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return flags(data=str(path), **changes)


def test_only_a_newline_ends_a_row(tmp_path):
    """Not U+2028, which JSON may hold as it is; a byte order mark and \r\n do no harm."""
    row = json.dumps(GOOD | {"note": "a\u2028b"}, ensure_ascii=False)
    other, args = json.dumps(GOOD | {"prompt": "2+0="}), data(tmp_path)
    text = f"\ufeff{row}\r\n{other}\r\n"
    (tmp_path / "pairs.jsonl").write_text(text, encoding="utf-8", newline="")
    assert [len(part) for part in dpo.read_pairs(args, dpo.Characters(), 60)] == [1, 1]


@pytest.mark.parametrize(
    "rows, words",
    [
        ([], ["two different"]),
        ([GOOD], ["two different"]),
        ([GOOD, "{"], ["line 2"]),
        ([[1]], ["line 1"]),
        ([GOOD, {"prompt": "1", "chosen": "2"}], ["line 2", "rejected"]),
        ([GOOD | {"chosen": "3"}], ["line 1", "equal"]),
        ([GOOD | {"chosen": " "}], ["line 1", "empty"]),
        ([GOOD | {"rejected": "1" * 64}], ["line 1", "tokens"]),
        ([GOOD | {"prompt": ""}], ["line 1"]),
        ([GOOD | {"prompt": "é"}], ["line 1"]),
        ([GOOD | {"chosen": [1, 2]}], ["line 1", "chosen"]),
    ],
)
def test_bad_rows_are_named_or_counted(rows, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        dpo.read_pairs(data(tmp_path, *rows), dpo.Characters(), 64)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1
    assert all(word in err for word in ["pairs.jsonl", *words]), err
    if len(rows) > 0 and "two different" not in words:
        more = [GOOD | {"prompt": f"{i}+1="} for i in range(9)]
        args = data(tmp_path, *rows, *more, skip_bad_rows=True)
        pairs, heldout = dpo.read_pairs(args, dpo.Characters(), 64)
        assert "1 bad rows left out" in capsys.readouterr().out
        assert len(pairs) + len(heldout) == 9 + len(rows) - 1 and heldout


def test_prompt_and_answer_are_tokenized_apart_and_end(tmp_path):
    rows = [GOOD | {"prompt": f"{i:02}+{j}="} for i in range(20) for j in range(3)]
    rows[0]["chosen"] = [{"role": "assistant", "content": "2"}]
    pairs, heldout = dpo.read_pairs(data(tmp_path, *rows), dpo.Characters(), 64)
    assert len(pairs) + len(heldout) == 60 and 3 <= len(heldout) <= 12
    for pair in pairs + heldout:
        assert pair.chosen == [3, 0] and pair.rejected == [4, 0] and pair.prompt[-1] == 17
    unseen = {tuple(p.prompt) for p in heldout}
    assert not unseen & {tuple(p.prompt) for p in pairs}


# Runs


SHORT = [
    "--imitation-steps",
    2,
    "--num-pairs",
    32,
    "--train-pairs",
    200,
    "--eval-pairs",
    16,
    "--eval-every",
    2,
]


def run(capsys, *args):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("test_grpo.grpo", dpo)
        return call(capsys, *args)


@pytest.mark.parametrize(
    "args, words",
    [
        (["--model", "/x"], ["--model", "--data"]),
        (["--label-smoothing", 0.6], ["--label-smoothing"]),
        (["--loss-type", "ipo", "--gamma-margin", 1], ["--gamma-margin"]),
        (["--beta", 0], ["--beta"]),
        (["--data", "/nowhere.jsonl"], ["--data"]),
        (["--resume", "/nowhere"], ["/nowhere", "checkpoint.pt"]),
        (["--max-steps", 0], ["--max-steps"]),
    ],
)
def test_mistakes_end_in_one_line(args, words, capsys):
    code, _, err, _ = run(capsys, *args, "--imitation-steps", 0)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    assert all(word in err for word in words), err


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["--length-normalize", "--nll-coef", 1],
        ["--lora-rank", 2],
        ["--reference-free", "--gamma-margin", 1],
    ],
)
def test_resumed_is_never_stopped(extra, tmp_path, capsys, monkeypatch):
    """The same weights to the bit; log π_ref is not computed a second time."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(capsys, *SHORT, *extra, "--max-steps", 4, "--run-dir", one)[0] == 0
    log = dpo.Journal.log

    def stop(journal, **means):
        log(journal, **means)
        if journal.step == 3:
            raise KeyboardInterrupt

    with mock.patch.object(dpo.Journal, "log", stop):
        flags = ["--max-steps", 4, "--checkpoint-every", 2, "--run-dir", two]
        assert run(capsys, *SHORT, *extra, *flags)[0] == 130
    assert not torch.equal(weights(one), weights(two))
    scored, score_all = [], dpo.score_all
    monkeypatch.setattr(
        dpo,
        "score_all",
        lambda m, pairs, *a: (scored.append(len(pairs)), score_all(m, pairs, *a))[1],
    )
    assert run(capsys, "--resume", two)[0] == 0
    assert torch.equal(weights(one), weights(two))
    assert set(scored) == {16}, "only held-out pairs"


def test_a_resumed_run_refuses_other_pairs(tmp_path, capsys):
    """log π_ref is kept by the pairs' order: with others it would belong to none of them."""
    rows = [{"prompt": f"{i}+1=", "chosen": str(i), "rejected": "00"} for i in range(1, 40)]
    path = Path(data(tmp_path, *rows).data)
    flags = ["--data", path, "--imitation-steps", 1, "--max-steps", 1]
    assert run(capsys, *flags, "--run-dir", tmp_path / "run")[0] == 0
    again = ["--resume", tmp_path / "run", "--max-steps", 2]
    assert run(capsys, *again)[0] == 0
    for change in (["--eval-pairs", 2], []):
        if not change:
            path.write_text(path.read_text().replace("39+1", "38+2"))
        code, _, err, _ = run(capsys, *again, "--max-steps", 3, *change)
        assert code == 2 and err.count("\n") == 1 and "other pairs" in err


def test_the_step_size_falls_linearly(tmp_path, capsys, monkeypatch):
    rates, step = [], dpo.step

    def spy(model, optimizer, *args):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(model, optimizer, *args)

    monkeypatch.setattr(dpo, "step", spy)
    flags = ["--max-steps", 4, "--learning-rate", 0.01, "--run-dir", tmp_path / "run"]
    assert run(capsys, *SHORT, *flags)[0] == 0
    assert rates == pytest.approx([0.01, 0.0075, 0.005, 0.0025])


@pytest.mark.parametrize("free", [False, True])
def test_what_train_hands_to_its_steps(free, tmp_path, capsys, monkeypatch):
    """Other pairs each time; AdamW without decay; π_ref of these pairs, unless it is left out."""
    seen, step = [], dpo.step

    def spy(model, optimizer, pairs, numbers, reference, *rest):
        decay = optimizer.param_groups[0]["weight_decay"]
        seen.append((frozenset(numbers), bool(reference.any()), decay))
        return step(model, optimizer, pairs, numbers, reference, *rest)

    monkeypatch.setattr(dpo, "step", spy)
    extra = ["--reference-free"] if free else []
    frozen = ["--max-steps", 3, "--learning-rate", 1e-12, "--run-dir", tmp_path / "run"]
    assert run(capsys, *SHORT, *frozen, *extra)[0] == 0
    numbers, references, decays = zip(*seen)
    assert len({*numbers}) == 3 and all(len(some) == 32 and max(some) < 200 for some in numbers)
    assert references == (not free,) * 3 and decays == (0.0,) * 3
    for row in csv.DictReader((tmp_path / "run" / "metrics.csv").open()):
        still = max(abs(float(row[name])) for name in ("margin", "heldout_margin"))
        assert (still < 1e-3) != free, "a policy that stands still is its own reference"


def test_the_gradient_is_shortened_and_its_length_told():
    model, pairs = model_of(), random_pairs()
    reference = plain_scores(model, pairs).detach() - torch.tensor([0.5, 0.0])
    whole, _, norm, _ = gradient(model, pairs, [0, 1, 2], reference, flags(max_grad_norm=1e9))
    limit = whole.norm().item() / 3
    short, _, again, _ = gradient(model, pairs, [0, 1, 2], reference, flags(max_grad_norm=limit))
    torch.testing.assert_close(short, whole / 3, rtol=1e-4, atol=1e-6)
    assert norm.item() == again.item() == pytest.approx(3 * limit, rel=1e-4)


def test_a_run_on_a_file_of_pairs(tmp_path, capsys):
    """The tiny GPT learns which answers are better, and exports."""
    rng = random.Random(0)
    rows = [
        {
            "prompt": f"{rng.randrange(10**6)}=",
            "chosen": str(rng.randrange(50)),
            "rejected": str(rng.randrange(50, 100)),
        }
        for _ in range(300)
    ]
    args = data(tmp_path, *rows)
    code, out, err, score = run(
        capsys,
        "--data",
        args.data,
        "--imitation-steps",
        0,
        "--max-steps",
        60,
        "--num-pairs",
        32,
        "--learning-rate",
        3e-3,
        "--run-dir",
        tmp_path / "run",
    )
    assert code == 0 and score > 0.9, (score, err)
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    assert float(rows[0]["loss"]) == pytest.approx(math.log(2), rel=1e-3)
    assert float(rows[-1]["margin"]) > 1 and "reward accuracy" in out
    peer = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(
        tmp_path / "run" / "model"
    )
    assert peer.config.model_type == "llama"


@pytest.mark.slow
def test_a_short_run_learns_and_one_that_stands_still_does_not(tmp_path, capsys, monkeypatch):
    teach_once(dpo, monkeypatch)
    gains = []
    for rate in (3e-4, 1e-11):
        out = run(
            capsys,
            "--imitation-steps",
            220,
            "--max-steps",
            60,
            "--train-pairs",
            8000,
            "--learning-rate",
            rate,
            "--run-dir",
            tmp_path / str(rate),
        )[1]
        before, after = re.findall(r"sampled ([0-9.]+)", out)
        gains.append(float(after) - float(before))
    assert gains[0] > 0.1 and abs(gains[1]) < 0.03


@pytest.mark.slow
def test_a_copy_alone_in_an_empty_folder(tmp_path):
    shutil.copy(ROOT / "dpo.py", tmp_path)
    command = [sys.executable, "dpo.py", *map(str, SHORT), "--max-steps", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "KL(π‖π*)" in done.stdout, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("dpo-pairs-1-")


RANKS = """
import os, sys, torch
sys.path[:0] = [{root!r}, {tests!r}]
import test_dpo as t, dpo
dpo.dist.init_process_group("gloo")
pairs, args = t.random_pairs(9), t.flags(tokens_per_micro_batch=25, max_grad_norm=0.3)
model = dpo.ready(t.model_of(), args)
reference = dpo.score_all(dpo.ready(t.model_of(seed=1), args), pairs, 25, t.CPU)
optimizer = torch.optim.SGD(model.parameters(), 0.5, 0.9)
for numbers in ([0, 3, 5], [1, 2, 4, 6, 7, 8], [8]):
    results = dpo.step(model, optimizer, pairs, numbers, reference, t.lengths(pairs), args)
torch.save((dict(dpo.merged(model)), reference, *results), {path!r} + os.environ["RANK"])
dpo.leave()
os._exit(0)
"""


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path):
    path, script = str(tmp_path / "rank"), tmp_path / "ranks.py"
    script.write_text(RANKS.format(root=str(ROOT), tests=str(ROOT / "tests"), path=path))
    torchrun(script)
    (ours, ref, *facts), (theirs, *_) = (torch.load(path + r, weights_only=True) for r in "01")
    model, pairs, args = model_of(), random_pairs(9), flags(max_grad_norm=0.3)
    reference = dpo.score_all(model_of(seed=1), pairs, 25, CPU)
    torch.testing.assert_close(ref, reference, atol=1e-5, rtol=1e-5)
    optimizer = torch.optim.SGD(model.parameters(), 0.5, 0.9)
    for numbers in ([0, 3, 5], [1, 2, 4, 6, 7, 8], [8]):
        results = dpo.step(model, optimizer, pairs, numbers, reference, lengths(pairs), args)
    for name, weight in model.named_parameters():
        assert torch.equal(ours[name], theirs[name])
        torch.testing.assert_close(ours[name], weight, atol=1e-5, rtol=1e-4)
    for fact, alone in zip(facts, results):
        torch.testing.assert_close(fact, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_real_run_of_two_processes(tmp_path, capsys):
    folder = tmp_path / "run"
    out = torchrun(ROOT / "dpo.py", *SHORT, "--max-steps", 2, "--run-dir", folder)
    assert out.count("held-out sums") == 1
    torchrun(ROOT / "dpo.py", "--resume", folder, "--max-steps", 3)
    assert run(capsys, "--resume", folder, "--max-steps", 4)[0] == 0
    assert len((folder / "metrics.csv").read_text().splitlines()) == 5


@pytest.mark.slow
def test_a_real_model(smollm2, tmp_path, capsys):
    """Log-probabilities are those of transformers; a short run moves the margin; export opens."""
    folder, peer, tokenizer = smollm2
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is {a} + 5?"}],
            "chosen": f"{a + 5}",
            "rejected": f"I do not know what {a} and 5 make.",
        }
        for a in range(24)
    ]
    args = data(tmp_path, *rows, model=str(folder))
    _, text = dpo.load_model(args, CPU)
    pairs, _ = dpo.read_pairs(args, text, 2048)
    model, _ = dpo.load_model(args, CPU)
    scores = dpo.score_all(model, pairs[:2], 4096, CPU)
    for pair, row in zip(pairs, scores):
        for answer, ours in zip((pair.chosen, pair.rejected), row):
            tokens = torch.tensor([pair.prompt + answer])
            with torch.no_grad():
                logprob = peer(tokens).logits[0].log_softmax(-1)[len(pair.prompt) - 1 : -1]
            expected = logprob.gather(1, torch.tensor(answer)[:, None]).sum()
            assert ours.item() == pytest.approx(expected.item(), abs=2e-3)
            assert tokenizer.decode(answer).endswith("<|im_end|>")
    code, _, err, _ = run(
        capsys,
        "--model",
        folder,
        "--data",
        args.data,
        "--max-steps",
        4,
        "--num-pairs",
        4,
        "--learning-rate",
        1e-5,
        "--run-dir",
        tmp_path / "run",
    )
    assert code == 0, err
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    assert float(rows[-1]["margin"]) > float(rows[0]["margin"]) + 0.05
    import transformers

    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert os.path.exists(tmp_path / "run" / "model" / "tokenizer.json")
    assert F.cosine_similarity(again.model.norm.weight, peer.model.norm.weight, 0) > 0.99


def test_what_was_learned_is_kept_when_the_end_goes_wrong(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dpo, "conclude", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(capsys, *SHORT, "--max-steps", 3, "--run-dir", tmp_path)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["run"]["step"] == 3
    assert (tmp_path / "model" / "model.safetensors").exists()
