# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "tyro==1.0.17", "wandb==0.31.0", "tqdm==4.70.1", "tokenizers==0.23.3",
#     "safetensors[numpy]==0.8.0", "huggingface-hub==2.4.0", "jinja2==3.1.6",
# ]
# ///
"""DPO: learn from pairs of a better and a worse answer, with no reward model and no sampling.

The policy that has the most reward at a given distance from π_ref is π* ∝ π_ref exp(r / β) (4).
So every policy is the best one for some reward, R = β log π/π_ref, and pairs of answers, y_w better
than y_l, teach R by classification. Rafailov et al. (2023), arXiv 2305.18290:

    L = −E log σ(β [log π/π_ref(y_w|x) − log π/π_ref(y_l|x)])                              (7)

Its gradient pulls log π(y_w) up and log π(y_l) down, by β σ(R_l − R_w): as far as R is wrong.

[C1] Other losses, by flags; papers differ from other libraries' names:
     (none)                           DPO    2305.18290
     label-smoothing .1               cDPO   labels wrong that often (TRL 1.16's sigmoid ignores it)
     length-normalize                 log π of an answer is the mean over its tokens, 2411.15124
     loss-type ipo                    IPO    2310.12036, summed as its authors' code has it; TRL's
                                             ipo is this with length-normalize
     length-normalize reference-free  SimPO  2405.14734, with gamma-margin: the margin γ
     nll-coef 1                       RPO    2404.19733: plus −log π(y_w) per token
[C2] log π_ref is computed once, before training: two numbers a pair; one model in memory.
[C3] The step size falls linearly to 0.
[C4] Prompt and answer are tokenized apart, so that no token spans both.
[C5] Means are over the whole batch, however it is cut into micro-batches and processes.
[C6] The token that ends an answer is one of it.

P pairs; N packs of L tokens (a prompt and its two answers) with K targets.
    python dpo.py
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import random
import shutil
import sys
import time
import zlib
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm


@dataclasses.dataclass(frozen=True)
class Args:
    model: str = ""  # folder or hub id of a Llama, Qwen2 or Qwen3; default: a tiny GPT, taught here
    data: str = ""  # JSON lines: `prompt`, `chosen`, `rejected`, each a text or chat messages
    train_pairs: int = 25_000  # how many to make where there is no --data
    skip_bad_rows: bool = False  # leave out rows that cannot be used, and say how many
    seed: int = 1  # of the weights, the pairs and their order
    max_steps: int = 400  # batches to learn from
    num_pairs: int | None = None  # pairs of a batch, in all processes; None: 256, with --model 16
    learning_rate: float | None = None  # AdamW's step size; None: 5e-4 for the tiny GPT, else 1e-6
    max_grad_norm: float = 1.0  # longest gradient
    loss_type: Literal["sigmoid", "ipo"] = "sigmoid"  # [C1]
    beta: float | None = None  # β; None: 0.5 for the tiny GPT, else 0.1
    label_smoothing: float = 0.0  # share of labels taken to be wrong [C1]
    length_normalize: bool = False  # log-probabilities per token [C1]
    reference_free: bool = False  # leave π_ref out [C1]
    gamma_margin: float = 0.0  # γ, what R of the better answer shall be ahead [C1]
    nll_coef: float = 0.0  # weight of the better answer's −log π per token [C1]
    imitation_steps: int = 500  # of the tiny GPT, before DPO
    eval_every: int = 20  # batches from one held-out evaluation to the next
    eval_pairs: int = 256  # held-out pairs
    tokens_per_micro_batch: int | None = None  # limits memory; None: 8192, with --model 1024 [C5]
    gradient_checkpointing: bool = False  # less memory: compute activations again going backward
    lora_rank: int = 0  # train adapters of this rank instead of the weights
    bf16: bool | None = None  # bfloat16 compute on float32 weights; None: with --model, where fast
    compile: bool = False  # torch.compile the model
    stop_at: float | None = None  # end when the held-out reward accuracy reaches this
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda where there is one
    run_dir: str = ""  # folder for the run's files; default runs/<script>-<task>-<seed>-<time>
    resume: str = ""  # folder of a run to continue there; its flags become the defaults
    checkpoint_every: int = 20  # batches from one checkpoint to the next
    track: bool = False  # mirror the metrics to Weights & Biases
    wandb_project: str = "policy-gradients"  # project there


def preference_loss(logprob, ref_logprob, beta, loss_type, label_smoothing=0.0, gamma_margin=0.0):
    """The loss of each pair (P,); logprob, ref_logprob (P, 2): of the better and worse answer."""
    log_ratio = logprob - ref_logprob
    ahead = log_ratio[:, 0] - log_ratio[:, 1]                                     # (P,)
    if loss_type == "ipo":
        return (ahead - 1 / (2 * beta)).square()                                  # [C1]
    logit = beta * ahead - gamma_margin
    wrong = -F.logsigmoid(-logit)  # the loss, were the labels the other way round
    return (1 - label_smoothing) * -F.logsigmoid(logit) + label_smoothing * wrong  # (7) [C1]


def best_policy(ref_logprob, reward, beta):
    """log π* (..., Y) over all Y answers, from log π_ref and their rewards (..., Y)."""
    return (ref_logprob + reward / beta).log_softmax(-1)                          # (4)


def preference_facts(logprob, ref_logprob, length, beta):
    """What the pairs look like, means by name; logprob, ref_logprob, length (P, 2)."""
    reward = beta * (logprob - ref_logprob)
    margin, longer = reward[:, 0] - reward[:, 1], length[:, 0] - length[:, 1]
    right = (margin > 0).float()
    shares = {"accuracy": right, "accuracy_longer": right[longer > 0],
              "accuracy_shorter": right[longer < 0], "margin": margin,
              "reward_chosen": reward[:, 0], "reward_rejected": reward[:, 1],
              "logprob_chosen": logprob[:, 0], "logprob_rejected": logprob[:, 1],
              "chosen_fell": (logprob < ref_logprob)[:, 0].float()}
    return {name: x.mean() if len(x) else torch.zeros(()) for name, x in shares.items()}


class Pair(NamedTuple):
    """A prompt, a better and a worse answer, as lists of token ids."""

    prompt: list
    chosen: list
    rejected: list


def next_logprob(states, weight, temperature):
    """log π (..., V), float32, of the token after states (..., D), in sampler and trainer."""
    return F.linear((states / temperature).to(weight.dtype), weight).float().log_softmax(-1)


def micro_batches(pairs, numbers, budget, device):
    """Micro-batches of at most `budget` tokens, or of one pair, as fill_batches makes them.

    numbers: which of the pairs; the answers of pair i are rows 2 i and 2 i + 1. Every process gets
    equally many, of a blank pair -1 if need be, as they must go through the model together.
    """
    packs = [(pairs[i].prompt, [(2 * i, pairs[i].chosen), (2 * i + 1, pairs[i].rejected)])
             for i in numbers]
    parts, blank = fill_batches(packs, budget), [([0], [(-2, [0]), (-1, [0])])]
    return parts + [blank] * (most(len(parts), device) - len(parts))


def score(model, part, device):
    """(numbers (M,) of a micro-batch's pairs, log π (M, 2) of their answers)."""
    packs, rows = collate(part, device)
    logprob, _ = model(*packs, 1.0)                                               # [C6] (K,)
    length = torch.tensor([len(answer) for _, answers in part for _, answer in answers])
    owner = torch.arange(len(rows)).repeat_interleave(length).to(device)          # (K,)
    sums = torch.zeros(len(rows), device=device).index_add(0, owner, logprob)     # (2 M,)
    return rows[::2].div(2, rounding_mode="floor"), sums.view(-1, 2)


@torch.no_grad()
def score_all(model, pairs, budget, device):
    """log π (P, 2) of the answers of all pairs, which the processes share out."""
    result, numbers = torch.zeros(len(pairs) + 1, 2, device=device), share(range(len(pairs)))
    for part in micro_batches(pairs, numbers, budget, device):
        which, logprob = score(model, part, device)
        result[which] = logprob
    return total(result)[:-1]  # the last row was the blank pair's


def step(model, optimizer, pairs, numbers, reference, length, args):
    """A gradient step on the pairs of these numbers.

    reference, length (P, 2): log π_ref and tokens of all pairs' answers. Returns the mean loss, the
    gradient's norm and log π (len(numbers), 2).
    """
    device, params = length.device, [p for p in model.parameters() if p.requires_grad]
    seen, losses = torch.zeros(len(pairs) + 1, 2, device=device), torch.zeros((), device=device)
    per_token = 1 / length
    scale = per_token if args.length_normalize else torch.ones_like(length)
    optimizer.zero_grad()
    for part in micro_batches(pairs, share(numbers), args.tokens_per_micro_batch, device):
        which, logprob = score(model, part, device)                               # (M,), (M, 2)
        loss = preference_loss(logprob * scale[which], reference[which] * scale[which], args.beta,
                               args.loss_type, args.label_smoothing, args.gamma_margin)
        loss = loss - args.nll_coef * (logprob * per_token[which])[:, 0]          # [C1]
        loss = (loss * (which >= 0)).sum() / len(numbers)                         # [C5]
        loss.backward()
        losses += loss.detach()
        seen[which] = logprob.detach()
    norm = whole(nn.utils.clip_grad_norm_(params, args.max_grad_norm))
    optimizer.step()
    return total(losses), norm, total(seen)[torch.tensor(numbers, device=device)]


def train(args):
    """Train as the flags say; returns the score, the reward accuracy on held-out pairs."""
    args, device = settle_pairs(args)
    model, text = load_model(args, device)
    if not args.model and not args.resume:
        imitate(model, text, lambda rng: next(addition_stream(rng, False)), args)
    params = [param for param in ready(model, args).parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(params, args.learning_rate, weight_decay=0.0, fused=True)
    budget = args.tokens_per_micro_batch
    with Journal(args, model, optimizer, None) as journal:
        pairs, heldout = load_pairs(journal, model, text, args)
        if "reference" not in journal.before:                                     # [C2]
            journal.before["reference"] = score_all(model, pairs + heldout, budget, device).cpu()
            journal.before["exam"] = exam(model, text, None, args)
        reference = journal.before["reference"].to(device) * (not args.reference_free)
        length = torch.tensor([[len(c), len(r)] for _, c, r in pairs + heldout], device=device)
        scale = 1 / length if args.length_normalize else torch.ones_like(length)
        shown = {}
        while not journal.finished:
            rng = random.Random(f"{args.seed}, {journal.step}")
            numbers = rng.sample(range(len(pairs)), min(args.num_pairs, len(pairs)))
            left = 1 - journal.step / args.max_steps
            optimizer.param_groups[0]["lr"] = args.learning_rate * left           # [C3]
            loss, norm, logprob = step(
                model, optimizer, pairs, numbers, reference, length, args)
            means = preference_facts(logprob * scale[numbers], (reference * scale)[numbers],
                                     length[numbers], args.beta)
            last = journal.step + 1 == args.max_steps
            if not shown or last or (journal.step + 1) % args.eval_every == 0:
                unseen = slice(len(pairs), None)
                logprob = score_all(model, heldout, budget, device) * scale[unseen]
                facts = preference_facts(logprob, (reference * scale)[unseen], length[unseen],
                                         args.beta)
                journal.score = facts["accuracy"].item()
                shown = {f"heldout_{name}": facts[name] for name in ("margin", "chosen_fell")}
            journal.log(loss=loss, grad_norm=norm, **means, **shown)
        journal.save()
        save_model(journal.dir / "model", model, text)
        before = journal.before["exam"]
        conclude(before, exam(model, text, before, args), journal.score)
    leave()
    return journal.score


# Below this line nothing is needed to understand the algorithm: pairs, decoder, evaluation, files.


def settle_pairs(args):
    """Give each flag a value; returns (args, device)."""
    device, rank, _ = join(args)
    big = bool(args.model)
    values = {"num_pairs": 16 if big else 256, "learning_rate": 1e-6 if big else 5e-4,
              "beta": 0.1 if big else 0.5, "bf16": big and multiplies_bf16(device),
              "tokens_per_micro_batch": 1024 if big else 8192}
    args = settle_values(args, values, rank)
    if args.beta == 0 or args.label_smoothing >= 0.5:
        fail(f"--beta {args.beta}, --label-smoothing {args.label_smoothing}: must be above 0, and "
             "below 0.5")
    if args.loss_type == "ipo" and (args.label_smoothing or args.gamma_margin):
        fail("--loss-type ipo: has no --label-smoothing and no --gamma-margin")
    if args.model and not args.data:
        fail("--model needs --data FILE.jsonl: rows of `prompt`, `chosen`, `rejected`")
    return args, device


def share(numbers):
    """This process's part of them."""
    if not dist.is_initialized():
        return list(numbers)
    return list(numbers)[dist.get_rank()::dist.get_world_size()]


def load_pairs(journal, model, text, args):
    """(pairs to learn from, held-out pairs), of --data or made by the tiny GPT and kept."""
    if args.data:
        both = read_pairs(args, text, model.config["max_position_embeddings"])
        check = zlib.crc32(repr(both).encode())
        if journal.before.setdefault("check", check) != check:
            fail(f"--resume {args.resume}: --data {args.data} or --eval-pairs gives other pairs")
        return both
    if "pairs" not in journal.before:
        rng = random.Random(f"pairs {args.seed}")
        for name, count in (("pairs", args.train_pairs), ("heldout", args.eval_pairs)):
            made = make_pairs(model, text, rng, count, held_out=name == "heldout")
            journal.before[name] = json.dumps(made)  # as text a checkpoint takes it at once
    return tuple([Pair(*pair) for pair in json.loads(journal.before[name])]
                 for name in ("pairs", "heldout"))


def worth(answer, example):
    """The known reward of an answer (text): 3 for each right digit."""
    return 3.0 * sum(a == b for a, b in zip(answer, example["answer"]))


def make_pairs(model, text, rng, count, held_out):
    """Pairs of answers that the model gives, labelled by chance as Bradley and Terry have it.

    The one with reward r is the better with probability σ(r − r'). Of each prompt four pairs of
    different answers, the rare as often as the usual, and drawn at a temperature above 1: what no
    pair names, nothing holds down.
    """
    pairs, stream = [], addition_stream(rng, held_out)
    while len(pairs) < count:
        examples, seed = list(itertools.islice(stream, 256)), rng.randrange(2**31)
        prompts = [text.encode(example["prompt"]) for example in examples]
        answers = [*map(tuple, draw(model, prompts, 16, 1.3, seed))]
        for i, example in enumerate(examples):
            several = [*itertools.combinations(sorted({*answers[16 * i:16 * i + 16]}), 2)]
            for one, other in rng.sample(several, min(4, len(several))):
                gain = worth(text.decode(one), example) - worth(text.decode(other), example)
                first = rng.random() < 1 / (1 + math.exp(-gain))
                pairs.append((prompts[i], *map(list, (one, other) if first else (other, one))))
    return pairs[:count]


@torch.no_grad()
def draw(model, prompts, count, temperature, seed):
    """`count` answers of the tiny GPT, lists of at most four tokens, to each of the prompts.

    Temperature 0: the likeliest.
    """
    device = model.frequency.device
    starts = [(b,) for b in range(len(prompts)) for _ in range(count)]
    generator = torch.Generator(device).manual_seed(seed)
    for t in range(4):
        place = {start: i for i, start in enumerate(sorted({*starts}))}  # most occur several times
        packs = [(prompts[b], [(0, [*start[1:], 0]) for start in some])
                 for b, some in itertools.groupby(place, lambda start: start[0])]
        *batch, source, _ = collate(packs, device)[0]
        prob = model(*batch, source[t::t + 1], None, temperature or 1.0).exp()
        prob = prob[[place[start] for start in starts]]                           # (R, V)
        token = prob.multinomial(1, generator=generator)[:, 0] if temperature else prob.argmax(1)
        starts = [(*start, new) for start, new in zip(starts, token.tolist())]
    return [[*answer[:answer.index(0)], 0] if 0 in answer else [*answer] for _, *answer in starts]


@torch.no_grad()
def exact(model, prompts, device):
    """log π (B, 1000) of all answers of three digits, as shares of these."""
    answers = [(n, [*map(Characters.symbols.index, f"{n:03}"), 0]) for n in range(1000)]
    packs = [(prompt, answers[n:n + 50]) for prompt in prompts for n in range(0, 1000, 50)]
    parts = [collate(packs[i:i + 100], device)[0] for i in range(0, len(packs), 100)]
    logprob = torch.cat([model(*part, 1.0)[0] for part in parts])
    return logprob.view(len(prompts), 1000, 4).sum(2).log_softmax(-1)


def exam(model, text, before, args):
    """What the tiny GPT can, beside π*; before: the same of before the training, None then."""
    if args.data:
        return {}
    device, stream = model.frequency.device, addition_stream(random.Random("exam"), True)
    examples = list(itertools.islice(stream, 1024))
    prompts, result = [text.encode(example["prompt"]) for example in examples], {}
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        texts = map(text.decode, draw(model, prompts, 1, temperature, args.seed))
        right = [answer == example["answer"] for answer, example in zip(texts, examples)]
        result[name] = sum(right) / len(right)
    logprob = exact(model, prompts[:16], device)
    ref_logprob = before["logprob"].to(device) if before else logprob
    reward = torch.tensor([[worth(f"{n:03}", example) for n in range(1000)]
                           for example in examples[:16]], device=device)          # (16, 1000)
    best = best_policy(ref_logprob, reward, args.beta)
    prob = logprob.exp()
    for name, column in (("reward", reward), ("kl_to_ref", logprob - ref_logprob),
                         ("kl_to_best", logprob - best)):
        result[name] = (prob * column).sum(1).mean().item()
    result["best_reward"] = (best.exp() * reward).sum(1).mean().item()
    return result | {"logprob": logprob.cpu()}


def conclude(before, after, accuracy):
    """Print what training has changed."""
    if os.environ.get("RANK", "0") != "0":
        return
    print(f"held-out pairs: reward accuracy {accuracy:.3f}")
    if after:
        print("held-out sums: greedy {greedy:.3f}, sampled {sampled:.3f} before; ".format(**before)
              + "greedy {greedy:.3f}, sampled {sampled:.3f} after".format(**after))
        print(f"E[r] {before['reward']:.3f} before, {after['reward']:.3f} after, "
              f"{after['best_reward']:.3f} of π*; KL(π‖π_ref) {after['kl_to_ref']:.3f}; KL(π‖π*) "
              f"{before['kl_to_best']:.3f} before, {after['kl_to_best']:.3f} after")


def addition_stream(rng, held_out):
    """Sums for the tiny GPT, of those that are held out or of the others; see grpo's `lot`."""
    while True:
        example = addition(rng, tiny=True)
        if (lot(example) < 0.1) == held_out:
            yield example


def read_pairs(args, text, context):
    """(pairs, held-out pairs) of --data: a prompt's lot decides; a bad row ends the program."""
    rows, bad = [], 0
    with blamed(f"--data {args.data}"):
        lines = Path(args.data).read_text(encoding="utf-8-sig").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                row = json.loads(line)
                pair = read_pair(row, text, context)
                rows.append((lot(row), pair))
        except Exception as error:  # of json, of a stranger's chat template, of the tokenizer
            bad += 1
            if not args.skip_bad_rows:
                fail(f"--data {args.data}, line {number}: {type(error).__name__}: {error}")
    if args.skip_bad_rows:
        print(f"--data {args.data}: {bad} bad rows left out")
    rows.sort(key=lambda row: row[0])
    edge = rows[min(args.eval_pairs, max(len(rows) // 10, 1)) - 1][0] if rows else 0.0
    pairs = [pair for place, pair in rows if place > edge]
    if not pairs:
        fail(f"--data {args.data}: needs rows of two different prompts: one is held out")
    return pairs, [pair for place, pair in rows if place <= edge]


def read_pair(row, text, context):
    """A Pair of a row; ValueError says what is wrong with it."""
    if not isinstance(row, dict) or not {"prompt", "chosen", "rejected"} <= row.keys():
        raise ValueError("needs `prompt`, `chosen` and `rejected`")
    answers = []
    for name in ("chosen", "rejected"):
        answer = row[name]
        if isinstance(answer, list) and len(answer) == 1:  # chat messages
            answer = answer[0]["content"]
        if not isinstance(answer, str) or not answer.strip():
            raise ValueError(f"`{name}` must be a text that is not empty, or one chat message")
        answers.append([*text.encode(answer), text.stop_ids[0]])             # [C4] [C6]
    pair = Pair(text.encode(row["prompt"]), *answers)
    if pair.chosen == pair.rejected:
        raise ValueError("`chosen` and `rejected` are equal")
    longest = len(pair.prompt) + max(map(len, answers)) - 1
    if not pair.prompt or longest > context:
        raise ValueError(f"prompt and answer have {longest} tokens, the model takes 1 to {context}")
    return pair


def join(args):
    """Join the other processes, if torchrun started any; returns (device, rank, their number)."""
    name, rank, world_size = args.device, 0, 1
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cpu" and not getattr(torch, name).is_available():
        fail(f"--device {name}: there is none here; use --device cpu")
    device = torch.device(name)
    if "LOCAL_RANK" in os.environ:
        if name == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if name == "cuda" else "gloo")
        rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    with blamed(f"--seed {args.seed}"):
        torch.manual_seed(args.seed)
    return device, rank, world_size


def multiplies_bf16(device):
    """Whether bfloat16 is the faster: a CPU without AVX512 only imitates it, slowly."""
    return device.type != "cpu" or "AVX512" in torch.backends.cpu.get_cpu_capability()


def settle_values(args, values, rank):
    """args with these values where a flag was not given; refuses numbers that are out of range."""
    values = {name: value for name, value in values.items() if getattr(args, name) is None}
    args = dataclasses.replace(args, **values)
    zero = ("seed", "imitation_steps", "lora_rank", "beta", "epsilon", "epsilon_high",
            "label_smoothing", "gamma_margin", "nll_coef")
    for field in dataclasses.fields(args):
        value, flag = getattr(args, field.name), field.name.replace("_", "-")
        if type(value) not in (int, float) or field.name == "stop_at":
            continue
        low = 0 if field.name in zero else 2 if field.name == "num_generations" else 1
        low = low if type(value) is int or low == 0 else 1e-12
        if not low <= value < math.inf:
            fail(f"--{flag} {value}: must be at least {low}")
    if rank == 0:
        chosen = [f"{name.replace('_', '-')} {value}" for name, value in values.items()]
        print(f"{torch.get_num_threads()} thread(s) a process", *chosen, sep=", ")
    return args


def most(value, device):
    """The largest of the processes' values, a number."""
    value = torch.as_tensor(value, device=device)
    if dist.is_initialized():
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.item()


def total(tensor):
    """Put the sum over all processes into the tensor; returns it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def leave():
    """Part from the other processes once all have come to their end."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def ready(model, args):
    """Compile it, with --compile, and spread its weights over the processes, if there are several.

    Gradients are summed over the processes: the loss is a share of the whole batch's [C5].
    """
    if args.compile:
        for block in model.model.layers:
            block.compile(dynamic=True)
    if dist.is_initialized():
        from torch.distributed.fsdp import fully_shard

        for module in (*model.model.layers, model):
            fully_shard(module)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model


@torch.no_grad()
def merged(model):
    """(name, weight) of a plain Decoder that does the same; all processes must ask together."""
    for name, param in model.named_parameters():
        if "lora" in name:
            continue
        layer, weight = model.get_submodule(name.rpartition(".")[0]), whole(param)
        if getattr(layer, "rank", 0) and name.endswith("weight"):
            weight = weight + whole(layer.lora_b) @ whole(layer.lora_a) * 2
        yield name, weight


def whole(tensor):
    """A sharded tensor's whole value, any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()


class Packs(NamedTuple):
    """N packs as tensors: each a prompt, then completions of it that do not see each other."""

    tokens: torch.Tensor  # (N, L), 0 after the end
    position: torch.Tensor  # (N, L): each completion's go on from its prompt's
    segment: torch.Tensor  # (N, L): 0 prompt, 1, 2, ... its completions, -1 after the end
    source: torch.Tensor  # (K,): where in N L, flattened, the state stands that foretells a target
    target: torch.Tensor  # (K,): the completions' tokens, one completion after the other


def fill_batches(packs, budget):
    """Micro-batches of packs, each of at most `budget` tokens or of one pack."""
    parts, widest = [], 0
    for pack in sorted(packs, key=pack_size, reverse=True):  # of like sizes: little padding
        if not parts or (len(parts[-1]) + 1) * widest > budget:
            parts.append([])
            widest = pack_size(pack)
        parts[-1].append(pack)
    return parts


def pack_size(pack):
    """Its tokens, less the last of each completion, which foretells nothing."""
    return len(pack[0]) + sum(len(tokens) - 1 for _, tokens in pack[1])


def collate(packs, device):
    """(Packs, rows): packs as tensors, and the completions' rows in the order of the targets."""
    width, columns, source, target = max(map(pack_size, packs)), [], [], []
    for prompt, completions in packs:
        start = len(columns) * width
        tokens, position, segment = [*prompt], [*range(len(prompt))], [0] * len(prompt)
        for number, (_, completion) in enumerate(completions, 1):
            first, count = start + len(tokens), len(completion) - 1
            source += [start + len(prompt) - 1, *range(first, first + count)]
            target += completion
            tokens += completion[:-1]
            position += range(len(prompt), len(prompt) + count)
            segment += [number] * count
        rest = width - len(tokens)
        columns.append((tokens + [0] * rest, position + [0] * rest, segment + [-1] * rest))
    tensors = [torch.tensor(x, device=device) for x in (*zip(*columns), source, target)]
    rows = [row for _, completions in packs for row, _ in completions]
    return Packs(*tensors), torch.tensor(rows, device=device)


class Linear(nn.Linear):
    """A linear layer, with rank > 0 plus an adapter that starts at zero: Hu et al. (2021), LoRA."""

    adapted = True  # of all layers; False while the reference policy without adapters is asked

    def __init__(self, fan_in, fan_out, bias=False, rank=0):
        super().__init__(fan_in, fan_out, bias)
        self.rank = rank
        if rank:
            self.weight.requires_grad_(False)
            self.lora_a = nn.Parameter(torch.randn(rank, fan_in) / fan_in**0.5)
            self.lora_b = nn.Parameter(torch.zeros(fan_out, rank))

    def forward(self, x):
        x = x.to(self.weight.dtype)
        if x.shape[1] == 1:  # decoding: a CPU reads the weights faster this way round
            y = (self.weight @ x[:, 0].T).T.unsqueeze(1)
            y = y if self.bias is None else y + self.bias
        else:
            y = super().forward(x)
        if self.rank and self.adapted:
            y = y + F.linear(F.linear(x, self.lora_a), self.lora_b) * 2
        return y


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config, rank):
        super().__init__()
        width, self.size, kind = config["hidden_size"], config["head_dim"], config["model_type"]
        heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
        self.q_proj = Linear(width, heads * self.size, kind == "qwen2", rank)
        self.k_proj = Linear(width, groups * self.size, kind == "qwen2", rank)
        self.v_proj = Linear(width, groups * self.size, kind == "qwen2", rank)
        self.o_proj = Linear(heads * self.size, width, False, rank)
        norm = nn.RMSNorm if kind == "qwen3" else nn.Identity
        self.q_norm = norm(self.size, config["rms_norm_eps"])
        self.k_norm = norm(self.size, config["rms_norm_eps"])

    def forward(self, x, rotation, mask, cache, columns):
        q, k, v = (proj(x).unflatten(-1, (-1, self.size))
                   for proj in (self.q_proj, self.k_proj, self.v_proj))  # (N, L, heads, E)
        qk = rotate(torch.cat([self.q_norm(q.float()), self.k_norm(k.float())], 2), *rotation)
        qk, v = qk.to(v.dtype).transpose(1, 2), v.transpose(1, 2)                 # (N, heads, L, E)
        q, k = qk.split([q.shape[2], k.shape[2]], 1)
        if cache:
            for kept, new in zip(cache, (k, v)):
                kept.index_copy_(2, columns, new.to(kept.dtype))
            k, v = (kept[:, :, :mask.shape[-1]] for kept in cache)
        (N, heads, L, _), share = q.shape, q.shape[1] // k.shape[1]
        if L == 1:  # the query heads that share keys as one head with several queries
            q = q.reshape(N, -1, share, self.size)
        elif share > 1:
            k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
        y = F.scaled_dot_product_attention(q, k, v, mask[:, None])
        return self.o_proj(y.reshape(N, heads, L, -1).transpose(1, 2).flatten(2))


def rotate(x, cos, sin):
    """Turn x (N, L, heads, 2 E) by the angles of cos, sin (N or 1, L, 1, E)."""
    left, right = x.chunk(2, -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


class MLP(nn.Module):
    """SwiGLU: Shazeer (2020), arXiv 2002.05202."""

    def __init__(self, config, rank):
        super().__init__()
        width, inner = config["hidden_size"], config["intermediate_size"]
        self.gate_proj = Linear(width, inner, False, rank)
        self.up_proj = Linear(width, inner, False, rank)
        self.down_proj = Linear(inner, width, False, rank)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config, rank):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.self_attn = Attention(config, rank)
        self.post_attention_layernorm = nn.RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.mlp = MLP(config, rank)

    def forward(self, x, rotation, mask, cache=None, columns=None):
        x = x + self.self_attn(self.input_layernorm(x), rotation, mask, cache, columns)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """A Llama, Qwen2 or Qwen3: the names of its weights are those of a Hugging Face folder.

    config: what config.json says, see `settled`. rank: of LoRA adapters; 0 for none.
    """

    def __init__(self, config, rank=0, bf16=False, checkpointing=False):
        super().__init__()
        self.config, self.bf16, self.checkpointing = config, bf16, checkpointing
        vocabulary, width = config["vocab_size"], config["hidden_size"]
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(vocabulary, width)
        self.model.layers = nn.ModuleList(
            Block(config, rank) for _ in range(config["num_hidden_layers"]))
        self.model.norm = nn.RMSNorm(width, config["rms_norm_eps"])
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        if config["tie_word_embeddings"]:
            self.lm_head.weight = self.model.embed_tokens.weight
        if rank:
            for name, param in self.named_parameters():
                param.requires_grad_("lora" in name)
        self.register_buffer("frequency", frequencies(config), persistent=False)

    def forward(self, tokens, position, segment, source, target, temperature):
        """Log-probabilities of targets and entropies where they were drawn, (K,), see Packs.

        Where target is None, those of all tokens that might stand there, (K, V).
        """
        with torch.autocast(tokens.device.type, torch.bfloat16, self.bf16):
            same = segment[:, :, None] == segment[:, None, :]                     # (N, L, L)
            mask = (same | (segment == 0)[:, None, :]).tril()
            states = self.states(tokens, position, mask).flatten(0, 1)[source]    # (K, D)
            if target is None:
                return next_logprob(states, self.lm_head.weight, temperature)
            *rest, last = zip(states.split(1024), target.split(1024))
            parts = [checkpoint(self.score, *part, temperature, use_reentrant=False)
                     for part in rest]
            parts.append(self.score(*last, temperature))  # going backward it is the first: keep it
        logprob, entropy = zip(*parts)
        return torch.cat(logprob), torch.cat(entropy)

    def score(self, states, target, temperature):
        """The same of states (K, D). In parts, and again going backward: (K, V) is the largest."""
        logprob = next_logprob(states, self.lm_head.weight, temperature)
        chosen = logprob.gather(-1, target[:, None])[:, 0]
        with torch.no_grad():  # last: the second computation stops before it
            return chosen, -(logprob.exp() * logprob).sum(-1)

    def states(self, tokens, position, mask, cache=None, columns=None):
        """States (N, L, D) behind tokens (N, L), of which each sees those where mask (N, L, S).

        With a cache their keys and values go to its `columns` (L,), and S counts columns there.
        """
        angle = position.unsqueeze(-1) * self.frequency                           # (N or 1, L, E)
        rotation = angle.cos().unsqueeze(-2), angle.sin().unsqueeze(-2)
        x = self.model.embed_tokens(tokens).float()
        for i, block in enumerate(self.model.layers):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rotation, mask, use_reentrant=False)
            else:
                x = block(x, rotation, mask, cache and cache[2 * i:2 * i + 2], columns)
        return self.model.norm(x)


def frequencies(config):
    """Radians a position of each pair of a head's numbers, (size / 2,), scaled as llama3 says."""
    rope = config["rope"]
    size = config["head_dim"]
    frequency = rope["rope_theta"] ** -(torch.arange(0, size, 2, device="cpu").float() / size)
    if rope["rope_type"] == "llama3":
        turns = frequency * rope["original_max_position_embeddings"] / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (keep + (1 - keep) / rope["factor"])
    return frequency


def settled(config, folder):
    """config.json's entries, older names and defaults filled in; refuses what Decoder is not."""
    kind, heads = config.get("model_type"), config.get("num_attention_heads", 1)
    rope = {"rope_theta": config.get("rope_theta", 10000.0), "rope_type": "default"}
    rope |= config.get("rope_scaling") or {}
    rope |= config.get("rope_parameters") or {}
    rope["rope_type"] = rope.get("type", rope["rope_type"])
    rest = {
        "model_type": kind in ("llama", "qwen2", "qwen3"),
        "rope_type": rope["rope_type"] in ("default", "llama3"),
        "hidden_act": config.get("hidden_act", "silu") == "silu",
        "sliding window": not config.get("use_sliding_window")
        and "sliding_attention" not in config.get("layer_types", []),
        "attention_bias": not config.get("attention_bias"),
        "mlp_bias": not config.get("mlp_bias"),
        "quantization_config": "quantization_config" not in config,
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0) == 1.0,
    }
    for name, known in rest.items():
        if not known:
            value = config.get(name, rope.get(name, ""))
            fail(f"--model {folder}: {name} {value} in config.json is not supported, only "
                 "dense Llama, Qwen2 and Qwen3 are")
    head_dim = 128 if kind == "qwen3" else config["hidden_size"] // heads
    head_dim = config.get("head_dim") or head_dim
    defaults = {"num_key_value_heads": heads, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
                "max_position_embeddings": 2048}
    return defaults | config | {"head_dim": head_dim, "rope": rope}


def load_model(args, device):
    """(Decoder, Characters or Tokenizer) that --model names, or a new tiny one."""
    options = args.lora_rank, args.bf16, args.gradient_checkpointing
    if not args.model:
        text = Characters()
        model = Decoder(settled(tiny_config(len(text.symbols)), "tiny"), *options)
        for param in model.parameters():
            if param.dim() == 2:
                nn.init.normal_(param, std=0.1)
        return model.to(device), text
    with blamed(f"--model {args.model}"):  # errors of the hub, files missing, torn or foreign
        folder = Path(args.model)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            wanted = ["*.json", "*.jinja", "*.safetensors"]
            folder = Path(snapshot_download(args.model, allow_patterns=wanted))
        config = settled(json.loads((folder / "config.json").read_bytes()), args.model)
        model, text = Decoder(config, *options), Tokenizer(folder)
        fill(model, folder)
    return model.to(device), text


def fill(model, folder):
    """Read the folder's safetensors into the model; ValueError names what they lack."""
    from safetensors import safe_open

    params = {name: param for name, param in model.named_parameters() if "lora" not in name}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in params.keys() & set(tensors.keys()):
                params.pop(name).data.copy_(tensors.get_tensor(name))
    if params:
        raise ValueError(f"its safetensors lack {', '.join(params)}")


def save_model(folder, model, text):
    """Write a folder that transformers' AutoModelForCausalLM and AutoTokenizer open."""
    weights = {name: weight.cpu().contiguous() for name, weight in merged(model)}
    if os.environ.get("RANK", "0") != "0":
        return
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = {name: value for name, value in model.config.items() if name != "rope"}
    config = config | {"dtype": "float32", "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    text.save(folder)


class Characters:
    """A tokenizer of single characters, for what is asked of the tiny GPT."""

    symbols, stop_ids = ["<end>", *"0123456789+-*/()=: "], [0]

    def encode(self, prompt):
        return [self.symbols.index(character) for character in prompt]

    def decode(self, tokens):
        return "".join(self.symbols[token] for token in tokens if token != 0)

    def save(self, folder):
        """The same as tokenizer.json."""
        import tokenizers

        vocabulary = {symbol: i for i, symbol in enumerate(self.symbols)}
        inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<end>"))
        inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
        inner.decoder = tokenizers.decoders.Fuse()
        inner.add_special_tokens(["<end>"])
        inner.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>",
                  "pad_token": "<end>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))


class Tokenizer:
    """The tokenizer, chat template and stop tokens of a Hugging Face folder."""

    kept = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
            "generation_config.json", "chat_template.jinja")

    def __init__(self, folder):
        import jinja2.sandbox  # the template is a stranger's code
        import tokenizers

        self.folder = folder
        self.inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.inner.no_truncation()  # files keep how their last user cut and padded
        self.inner.no_padding()
        read = {name: json.loads((folder / name).read_bytes()) if (folder / name).exists() else {}
                for name in ("config.json", "generation_config.json", "tokenizer_config.json")}
        self.special = {name: value["content"] if isinstance(value, dict) else value
                        for name, value in read["tokenizer_config.json"].items()
                        if name.endswith("_token") and value}
        ids = [self.inner.token_to_id(self.special.get("eos_token", ""))]
        for name in ("config.json", "generation_config.json"):
            found = read[name].get("eos_token_id")
            ids += found if isinstance(found, list) else [found]
        self.stop_ids = [i for i in dict.fromkeys(ids) if i is not None]  # the first ends a turn
        if not self.stop_ids:
            raise ValueError("neither config.json nor the tokenizer names an end-of-sequence token")
        template = read["tokenizer_config.json"].get("chat_template")
        if (folder / "chat_template.jinja").exists():
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        if isinstance(template, list):  # several, by name
            template = {each["name"]: each["template"] for each in template}.get("default")
        jinja = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        jinja.globals.update(raise_exception=complain, strftime_now=time.strftime)
        self.template = jinja.from_string(template) if isinstance(template, str) else None

    def encode(self, prompt):
        """Token ids of a text as it stands, or of chat messages through the chat template."""
        if not isinstance(prompt, str):
            if self.template is None or not prompt:
                raise ValueError("no message, or the model has no chat template: give text")
            prompt = self.template.render(
                messages=prompt, add_generation_prompt=True, **self.special)
        return self.inner.encode(prompt, add_special_tokens=False).ids

    def decode(self, tokens):
        return self.inner.decode(tokens)

    def save(self, folder):
        for name in self.kept:
            if (self.folder / name).exists():
                shutil.copy(self.folder / name, folder)


def complain(message):
    """What chat templates call where messages are not as they need them."""
    raise ValueError(message)


def addition(rng, tiny):
    """A sum of two numbers below 100; the tiny GPT writes its digits in reverse order.

    The teacher of the tiny GPT forgets to carry, eight times in ten.
    """
    a, b = rng.randrange(100), rng.randrange(100)
    if not tiny:
        question = f"What is {a} + {b}? Answer with the number alone."
        return {"prompt": [{"role": "user", "content": question}], "answer": str(a + b)}
    right = f"{a + b:03}"[::-1]
    sloppy = f"{(a + b) % 10}{(a // 10 + b // 10) % 10}0"
    return {"prompt": f"{a:02}+{b:02}=", "answer": right,
            "teacher": sloppy if rng.random() < 0.8 else right}


def lot(example):
    """A number from 0 to 1 that belongs to the prompt; 12+34 has another than 34+12."""
    return random.Random(json.dumps(example["prompt"])).random()


def imitate(model, text, draw, args):
    """Teach the tiny GPT to write as the teacher does: maximum likelihood, by Adam."""
    rng = random.Random(f"teacher {args.seed}")
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.95), fused=True)
    shows = sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"
    for step in tqdm(range(args.imitation_steps), "imitation", leave=False, disable=not shows):
        left = 1 - step / args.imitation_steps
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 30, 3 * left)
        examples = [draw(rng) for _ in range(256)]
        packs = [(text.encode(e["prompt"]), [(0, [*text.encode(e["teacher"]), text.stop_ids[0]])])
                 for e in examples]
        logprob, _ = model(*collate(packs, model.frequency.device)[0], 1.0)
        optimizer.zero_grad()
        (-logprob.mean()).backward()
        optimizer.step()


def tiny_config(vocabulary):
    """A GPT of a quarter of a million weights."""
    return {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": vocabulary,
            "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
            "max_position_embeddings": 64, "tie_word_embeddings": True, "bos_token_id": None,
            "eos_token_id": 0, "pad_token_id": 0}


class Journal:
    """A run's progress, its folder (args.json, metrics.csv, checkpoint.pt) and what it shows."""

    def __init__(self, args, model, optimizer, reference):
        self.args, self.model, self.optimizer, self.reference = args, model, optimizer, reference
        self.writes = os.environ.get("RANK", "0") == "0"  # of several processes, only the first
        self.step, self.seconds, self.score, self.before, self.size = 0, 0.0, math.nan, {}, 0
        task = Path(args.data).stem or getattr(args, "task", "pairs")
        now = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"  # two may begin in one second
        name = f"{Path(__file__).stem}-{task}-{args.seed}-{now}"
        self.dir = Path(args.resume or args.run_dir or f"runs/{name}")
        if args.resume:
            self.load()
        elif self.writes and (self.dir / "checkpoint.pt").exists():
            fail(f"--run-dir {self.dir}: holds a run already; --resume it, or name another folder")
        self.metrics, self.wandb = open_run(self.dir, args, self.size)
        shows = self.writes and sys.stderr.isatty()
        self.bar = tqdm(total=args.max_steps, initial=self.step, unit=" batches",
                        dynamic_ncols=True, disable=not shows)
        self.clock = self.shown = time.perf_counter()

    @property
    def finished(self):
        """Whether the batches are used up, or the held-out accuracy has reached --stop-at."""
        reached = self.args.stop_at is not None and self.score >= self.args.stop_at
        return reached or self.step >= self.args.max_steps

    def log(self, **means):
        """End a batch, with the figures of it."""
        self.step, now = self.step + 1, time.perf_counter()
        self.seconds, self.clock = self.seconds + now - self.clock, now
        row = {"step": self.step, "seconds": self.seconds, "score": self.score}
        row |= {name: torch.as_tensor(mean).item() for name, mean in means.items()}
        for name in means:
            if not math.isfinite(row[name]):
                raise FloatingPointError(name)
        if self.metrics.tell() == 0:
            self.metrics.write(",".join(row) + "\n")
        self.metrics.write(",".join(f"{value:.8g}" for value in row.values()) + "\n")
        self.size = self.metrics.tell()  # a resumed run goes on from there
        if self.step % self.args.checkpoint_every == 0:
            self.save()
        self.bar.set_postfix_str(f"score {self.score:.3f}", refresh=False)
        self.bar.update(self.step - self.bar.n)
        if self.bar.disable and self.writes and now - self.shown > 5:
            self.shown = now
            print(f"step {self.step}, score {self.score:.3f}, {self.seconds:.0f} s", flush=True)
        self.mirror(row)

    def show(self, examples, texts):
        """With --track, a table of answers to held-out prompts."""
        if self.wandb:
            rows = [[str(e["prompt"]), text, e["answer"]] for e, text in zip(examples, texts)]
            columns = ["prompt", "completion", "answer"]
            self.mirror({"samples": sys.modules["wandb"].Table(columns=columns, data=rows[:20])})

    def mirror(self, row):
        """Send it to Weights & Biases, with --track."""
        try:
            if self.wandb:
                self.wandb.log(row, step=self.step)
        except Exception as error:  # trouble on the network must not end the training
            tqdm.write(f"warning: --track: {error}; the training goes on without", sys.stderr)
            self.wandb = None

    def save(self):
        """Write checkpoint.pt beside its place, then move it in: no kill leaves half of it."""
        import torch.distributed.checkpoint.state_dict as sharded  # all processes take part

        options = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)
        states = sharded.get_state_dict(self.model, self.optimizer, options=options)
        state = dict(zip(("model", "optimizer"), states))
        if self.reference not in (None, self.model):
            state["reference"] = sharded.get_model_state_dict(self.reference, options=options)
        if not self.writes:
            return
        state["args"] = dataclasses.asdict(self.args)
        state["run"] = {name: getattr(self, name) for name in KEPT}
        with blamed(f"--run-dir {self.dir}"):
            torch.save(state, self.dir / "checkpoint.tmp")
            (self.dir / "checkpoint.tmp").replace(self.dir / "checkpoint.pt")

    def load(self):
        """Take back what save wrote."""
        import torch.distributed.checkpoint.state_dict as sharded

        options = sharded.StateDictOptions(full_state_dict=True)
        state = read_checkpoint(self.dir)
        with blamed(f"--resume {self.dir}: its checkpoint.pt is not of such a run"):
            sharded.set_state_dict(self.model, self.optimizer, model_state_dict=state["model"],
                                   optim_state_dict=state["optimizer"], options=options)
            if self.reference not in (None, self.model):
                sharded.set_model_state_dict(self.reference, state["reference"], options=options)
            self.optimizer.param_groups[0]["lr"] = self.args.learning_rate  # not the file's
            vars(self).update({name: state["run"][name] for name in KEPT})

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        self.bar.close()
        last = self.dir if (self.dir / "checkpoint.pt").exists() else "none yet"
        if kind is FloatingPointError:
            fail(f"step {self.step}: {error} is not finite; the last good checkpoint: {last}")
        if kind is KeyboardInterrupt:
            print(f"stopped; the last checkpoint, for --resume: {last}", file=sys.stderr)
            raise SystemExit(130)


KEPT = ("step", "seconds", "score", "before", "size")  # of Journal, in a checkpoint


def open_run(folder, args, size):
    """Write args.json; returns metrics.csv, cut to `size` bytes, and wandb's run, if any."""
    if os.environ.get("RANK", "0") != "0":  # of several processes, only the first writes
        return open(os.devnull, "w"), None
    with blamed(f"--run-dir {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "args.json").write_text(json.dumps(dataclasses.asdict(args), indent=2))
        metrics = (folder / "metrics.csv").open("a", buffering=1)
        metrics.seek(metrics.truncate(min(size, metrics.tell())))
    if not args.track:
        return metrics, None
    with blamed("--track"):
        import wandb  # here, so that those who do not --track need not wait for it

        return metrics, wandb.init(project=args.wandb_project, config=dataclasses.asdict(args),
                                   dir=folder, name=folder.name, id=folder.name,
                                   resume="allow" if args.resume else "never")


def parse(kind):
    """The flags; with --resume, those of the run it names where the command line has none."""
    sys.stdout.reconfigure(errors="replace")  # not every terminal or pipe can write γ or π
    args = tyro.cli(kind)
    folder = args.resume or getattr(args, "eval_only", "")
    if not folder:
        return args
    with blamed(f"{folder}: its checkpoint.pt is not of such a run"):
        saved = kind(**read_checkpoint(folder)["args"])
    return tyro.cli(kind, default=saved)


def read_checkpoint(folder):
    """What save wrote there; weights_only, so that a stranger's file can run no code."""
    with blamed(f"{folder}: no checkpoint.pt of such a run there"):
        return torch.load(Path(folder, "checkpoint.pt"), map_location="cpu", weights_only=True)


@contextlib.contextmanager
def blamed(cause):
    """Whatever fails inside, and it may in many ways, is a mistake of the user's there."""
    try:
        yield
    except Exception as error:
        fail(f"{cause}: {type(error).__name__}: {error}")


def fail(message):
    """End the program for a mistake of its user: one line on stderr, exit code 2."""
    print("error: " + " ".join(message.split())[:400], file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    train(parse(Args))
