# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "tyro==1.0.17", "wandb==0.31.0", "tqdm==4.70.1", "tokenizers==0.23.3",
#     "safetensors[numpy]==0.8.0", "huggingface-hub==2.4.0", "jinja2==3.1.6",
# ]
# ///
"""GRPO: answer each question many times, and do more of what was better than the group's mean.

To each of B prompts q the policy π writes G completions o, each worth a reward r. There is no value
network: the group is the baseline. Shao et al., DeepSeekMath (2024), arXiv 2402.03300:
    J = mean over completions and their tokens of min(ρ Â, clip(ρ, 1−ε, 1+ε) Â) − β KL    (3)
    KL(π‖π_ref) is estimated by k3 = π_ref/π − log(π_ref/π) − 1                           (4)
with ρ_t = π(o_t|q, o_<t) / π_old(o_t|q, o_<t) and Â_i = (r_i − mean r) / std r of the group.

[C1] --preset; where β is 0 there is no reference policy at all:
                advantage      loss     ρ of a    ε       ε_high  β     paper
       default  none           dapo     token     0.2     0.28    0
       grpo     group          grpo     token     0.2     0.2     0.04  2402.03300
       dr_grpo  none           dr_grpo  token     0.2     0.2     0     2503.20783
       dapo     group          dapo     token     0.2     0.28    0     2503.14476
       gspo     group          grpo     sequence  0.0003  0.0004  0     2507.18071
       cispo    group          cispo    token     0.2     4       0     2506.13585
       rloo     leave-one-out  dr_grpo  token     0.2     0.2     0     2402.14740
[C2] With one update per batch ρ is 1: J reads about 0 (a group's Â sum to 0), its gradient is not.
[C3] The KL term is ρ k3: the gradient of k3 alone is, on average, that of the other KL(π_ref‖π).
[C4] A group of equal rewards, all Â 0, is dropped, from the denominators and the KL, too.
[C5] Means are over the whole batch, however it is cut into micro-batches and processes.
[C6] The token that ends a completion is one of it. --temperature divides the logits everywhere.

B prompts, G completions of each, R = B G rows, C tokens of one; N packs of L tokens with K targets:
    python grpo.py
"""

import ast
import contextlib
import copy
import dataclasses
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import time
from fractions import Fraction
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
    task: Literal["addition", "countdown"] = "addition"  # what to ask where there is no --data
    data: str = ""  # JSON lines with `prompt` (text or chat messages) and `answer`
    seed: int = 1  # of the weights, the prompts and the sampling
    max_steps: int = 400  # batches to sample and learn from
    num_prompts: int = 128  # B: prompts of a batch, in all processes
    num_generations: int = 8  # G: completions of each prompt
    max_completion_length: int | None = None  # C: tokens of a completion; None: as the task needs
    temperature: float = 1.0  # of sampling and of the policy that learns [C6]
    learning_rate: float | None = None  # AdamW's step size; None: 3e-4 for the tiny GPT, else 2e-6
    max_grad_norm: float = 1.0  # longest gradient
    preset: str = "default"  # of a new run: a row of table [C1]; the next six flags override it
    scale_rewards: Literal["group", "batch", "none", "leave-one-out"] | None = None  # Â's divisor
    loss_type: Literal["grpo", "dapo", "dr_grpo", "cispo"] | None = None  # the mean; cispo: clip
    importance_sampling_level: Literal["token", "sequence"] | None = None  # what a ratio ρ is of
    epsilon: float | None = None  # ε, how far ρ counts below 1
    epsilon_high: float | None = None  # the same above 1
    beta: float | None = None  # β, weight of KL(π‖π_ref) to the policy before training
    num_iterations: int = 1  # updates with each batch
    mask_truncated_completions: bool = False  # learn nothing from those that did not end
    imitation_steps: int = 500  # of the tiny GPT, before GRPO
    eval_every: int = 20  # batches from one held-out evaluation to the next
    eval_prompts: int = 256  # held-out prompts of an evaluation
    tokens_per_micro_batch: int = 8192  # a limit to memory; changes no gradient [C5]
    gradient_checkpointing: bool = False  # less memory: compute activations again going backward
    lora_rank: int = 0  # train adapters of this rank instead of the weights
    bf16: bool | None = None  # bfloat16 compute on float32 weights; None: with --model, where fast
    compile: bool = False  # torch.compile the model; on a GPU decode with CUDA graphs
    stop_at: float | None = None  # end when the held-out accuracy reaches this
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda where there is one
    run_dir: str = ""  # folder for the run's files; default runs/<script>-<task>-<seed>-<time>
    resume: str = ""  # folder of a run to continue there; its flags become the defaults
    checkpoint_every: int = 10  # batches from one checkpoint to the next
    track: bool = False  # mirror the metrics to Weights & Biases
    wandb_project: str = "policy-gradients"  # project there


def group_advantage(reward, scale_rewards):
    """How much better each completion was than its group, (B, G), from rewards (B, G)."""
    advantage = reward - reward.mean(1, keepdim=True)
    if scale_rewards == "leave-one-out":  # so r minus the mean of the others
        return advantage * reward.shape[1] / (reward.shape[1] - 1)
    if scale_rewards == "none":
        return advantage
    std = reward.std() if scale_rewards == "batch" else reward.std(1, keepdim=True)
    return advantage / (std + 1e-4)


def importance_ratio(logprob, old_logprob, mask, level):
    """ρ of each token, (R, C) as the inputs; (R, 1) of each completion at level "sequence"."""
    log_ratio = logprob - old_logprob
    if level == "sequence":  # the geometric mean of its tokens'
        count = mask.sum(1, keepdim=True).clamp(min=1)
        log_ratio = (log_ratio * mask).sum(1, keepdim=True) / count
    return log_ratio.exp()


def policy_loss(ratio, logprob, advantage, loss_type, epsilon, epsilon_high):
    """Minus the objective, shaped as ratio, (R, C) or (R, 1); logprob (R, C), advantage (R,)."""
    advantage = advantage.unsqueeze(1)
    if loss_type == "cispo":  # the ratio is a weight: no token loses its gradient
        weight = ratio.clamp(max=1 + epsilon_high).detach()
        return -weight * advantage * logprob
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon_high)
    return -torch.min(ratio * advantage, clipped * advantage)         # (3), negated [C2]


def kl_estimate(logprob, old_logprob, ref_logprob):
    """ρ k3 of each token, (R, C) as the inputs: its gradient, too, is that of KL(π‖π_ref)."""
    log_ratio = ref_logprob - logprob
    k3 = log_ratio.exp() - log_ratio - 1                                  # (4)
    return (logprob - old_logprob).exp() * k3                             # [C3]


def drift(logprob, old_logprob, ratio, epsilon, epsilon_high):
    """Of each token: an estimate of KL(π_old‖π), (R, C), whether ρ is beyond 1−ε, 1+ε_high."""
    log_ratio = (logprob - old_logprob).detach()
    return log_ratio.exp() - 1 - log_ratio, (ratio < 1 - epsilon) | (ratio > 1 + epsilon_high)


def token_weight(mask, loss_type, num_rows, num_tokens, max_completion_length):
    """What each token counts in the mean over the whole batch, (R, C), from mask (R, C).

    num_rows and num_tokens are those of all micro-batches and processes together.
    """
    if loss_type == "grpo":  # mean over each completion's tokens, then over completions
        return mask / mask.sum(1, keepdim=True).clamp(min=1) / num_rows   # [C5]
    if loss_type == "dr_grpo":  # a constant: else long wrong answers would cost less per token
        return mask / (num_rows * max_completion_length)                  # [C5]
    return mask / num_tokens                                              # [C5]


def reward(completion, example):
    """What a completion (text) is worth: put your own here. example: a row of the data, a dict."""
    answer, text = example["answer"].strip(), completion.strip()
    if example.get("task") == "countdown":  # of the numbers, each at most once
        value, used = calculate(text.split("\n")[-1])
        allowed = all(used.count(number) <= example["numbers"].count(number) for number in used)
        return float(value == example["target"] and allowed)
    numbers = re.findall(r"-?[0-9]+(?:[.][0-9]+)?", text.replace(",", ""))
    return float(text == answer or numbers[-1:] == [answer.replace(",", "")])  # or its last number


def next_logprob(states, weight, temperature):
    """log π (..., V), float32, of the token after states (..., D), in sampler and trainer."""
    return F.linear((states / temperature).to(weight.dtype), weight).float().log_softmax(-1)


def choose(logprob, temperature, draw):
    """Tokens (R, 1) from logprob (R, V), by random numbers; temperature 0: the likeliest."""
    if not temperature:
        return logprob.argmax(-1, keepdim=True)
    exact = torch.float if draw.device.type == "mps" else torch.double  # which mps does not have
    sums = logprob.to(exact).exp().cumsum(-1)  # its last is 1 but for rounding
    point = torch.rand(len(logprob), 1, generator=draw, device=draw.device, dtype=exact)
    token = torch.searchsorted(sums, point * sums[:, -1:], right=True)
    return token.clamp(max=logprob.shape[1] - 1)  # the first where the sum exceeds the number


@torch.no_grad()
def sample(model, prompts, num_generations, max_length, temperature, stop_ids, seed):
    """Draw G completions of each of the prompts (lists of token ids); temperature 0: the likeliest.

    Returns, R = B G rows, a prompt's rows next to each other: tokens (R, C), length (R,) with the
    stop token counted [C6], ended (R,), False where max_length cut it off, and logprob (R, C).
    """
    device = model.frequency.device
    draw = torch.Generator(device).manual_seed(seed)
    stop_ids, width = torch.tensor(stop_ids, device=device), max(map(len, prompts))
    length = torch.tensor([len(prompt) for prompt in prompts], device=device)
    padded = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts])
    columns = torch.arange(width + max_length, device=device)
    cache = make_cache(model, len(prompts), width + max_length)
    causal = torch.ones(1, width, width, dtype=torch.bool, device=device).tril()
    states = model.states(padded.to(device), columns[:width], causal, cache, columns[:width])
    states = states[torch.arange(len(prompts), device=device), length - 1]          # (B, D)

    states, length = (x.repeat_interleave(num_generations, 0) for x in (states, length))  # (R, ..)
    cache = [x.repeat_interleave(num_generations, 0) for x in cache]
    seen, row = columns < length[:, None], torch.arange(len(length), device=device)
    tokens = torch.zeros(len(row), max_length, dtype=torch.long, device=device)
    logprobs, ended = torch.zeros_like(tokens, dtype=torch.float), torch.zeros_like(row).bool()
    for t in range(max_length):
        logprob = next_logprob(states, model.lm_head.weight, temperature or 1.0)  # (rows left, V)
        token = choose(logprob, temperature, draw)                                # (rows left, 1)
        tokens[row, t], logprobs[row, t] = token[:, 0], logprob.gather(1, token)[:, 0]
        ended[row] |= torch.isin(token[:, 0], stop_ids)
        if t + 1 == max_length:
            break
        if t % 16 == 15:  # seldom: to look means to wait for the device
            going = (~ended[row]).nonzero()[:, 0]
            if len(going) == 0:
                break
            if len(going) <= 0.75 * len(row):
                row, token, seen, length = row[going], token[going], seen[going], length[going]
                cache = [x[going] for x in cache]
        seen[:, width + t] = True
        states = decode(model, token, (length + t)[:, None], seen, columns[width + t].view(1),
                        cache, reach=min(-(-(width + t + 1) // 64) * 64, len(columns)))  # (.., D)
    stops = torch.isin(tokens, stop_ids).int().argmax(1)  # the first
    return tokens, torch.where(ended, stops + 1, max_length), ended, logprobs


class Answers(NamedTuple):
    """What an update learns from. The last of the rows is blank: some process may have no other."""

    prompts: list  # B lists of token ids
    completions: list  # as plan takes them, without those of which nothing is learned
    mask: torch.Tensor  # (R+1, C), True at the tokens of these
    sampled: torch.Tensor  # (R+1, C): their log-probabilities when they were drawn
    advantage: torch.Tensor  # (R+1,)


def ask(sampler, text, examples, seed, args):
    """Sample and judge G completions of each example's prompt.

    Returns Answers and, (R, 4), reward, whether the group's are equal, length, whether cut off.
    """
    G, prompts = args.num_generations, [text.encode(example["prompt"]) for example in examples]
    tokens, length, ended, sampled = sample(
        sampler, prompts, G, args.max_completion_length, args.temperature, text.stop_ids, seed)
    rows = [row[:n] for row, n in zip(tokens.tolist(), length.tolist())]          # R
    worth = [reward(text.decode(row), examples[i // G]) for i, row in enumerate(rows)]
    rewards = torch.tensor(worth, dtype=torch.float, device=sampled.device).view(-1, G)  # (B, G)
    equal = (rewards == rewards[:, :1]).all(1).repeat_interleave(G)               # [C4] (R,)
    used = ~equal & (ended | (not args.mask_truncated_completions))
    mask = used[:, None] & (torch.arange(tokens.shape[1], device=used.device) < length[:, None])
    advantage = group_advantage(gather(rewards), args.scale_rewards)              # of all processes
    advantage = mine(advantage, len(rewards)).flatten().to(mask.device)           # (R,)
    completions = [(i // G, i, rows[i]) for i in used.nonzero()[:, 0].tolist()]
    tensors = [torch.cat([x, torch.zeros_like(x[:1])]) for x in (mask, sampled, advantage)]
    return Answers(prompts, completions, *tensors), torch.stack(
        [rewards.flatten(), equal, length, ~ended], 1)


def improve(model, reference, optimizer, batch, args):
    """--num-iterations gradient steps on the batch; returns what happened, means over tokens."""
    device, mask = batch.mask.device, batch.mask
    parts = plan(batch.prompts, batch.completions, args.tokens_per_micro_batch)
    blank = [([0], [(len(mask) - 1, [0])])]
    parts += [blank] * (most(len(parts), device) - len(parts))  # the processes go on together
    num_rows, num_tokens = total(torch.stack([mask.any(1).sum(), mask.sum()]))
    weight = token_weight(mask, args.loss_type, num_rows, num_tokens, args.max_completion_length)
    params = [param for param in model.parameters() if param.requires_grad]
    old, ref = torch.zeros_like(batch.sampled), torch.zeros_like(batch.sampled)   # (R+1, C)
    sums, norm = torch.zeros(4, device=device), torch.zeros((), device=device)
    for iteration in range(args.num_iterations if parts else 0):
        optimizer.zero_grad()
        for packs, rows in (collate(part, device) for part in parts):
            used = mask[rows]                                                     # (rows, C)
            logprob, entropy = (spread(x, used) for x in model(*packs, args.temperature))
            if iteration == 0:
                old[rows] = logprob.detach()  # π_old; the sampler's own differ by rounding, see gap
            if iteration == 0 and reference:
                ref[rows] = spread(score_frozen(reference, packs, args.temperature), used)
            ratio = importance_ratio(logprob, old[rows], used, args.importance_sampling_level)
            loss = policy_loss(ratio, logprob, batch.advantage[rows], args.loss_type,
                               args.epsilon, args.epsilon_high)
            if reference:
                loss = loss + args.beta * kl_estimate(logprob, old[rows], ref[rows])
            loss = (loss * weight[rows]).sum()
            loss.backward()
            kl, clipped = drift(logprob, old[rows], ratio, args.epsilon, args.epsilon_high)
            shares = [(x * used).sum() / num_tokens for x in (entropy, kl, clipped)]
            sums += torch.stack([loss, *shares]).detach() / args.num_iterations
        norm = whole(nn.utils.clip_grad_norm_(params, args.max_grad_norm))
        optimizer.step()
    gap = (old - batch.sampled).abs() * mask
    names = ["loss", "entropy", "approx_kl", "clip_fraction", "grad_norm", "gap_mean"]
    sums = total(torch.cat([sums, gap.sum().view(1) / num_tokens.clamp(min=1)]))
    return dict(zip(names, [*sums[:4], norm, sums[4]])) | {"gap_max": most(gap.max(), device)}


def train(args):
    """Train as the flags say; returns the score, the greedy accuracy on held-out prompts."""
    args, device, rank, world_size = settle_flags(args)
    model, text = load_model(args, device)
    draw, heldout = load_examples(args, text, model.config["max_position_embeddings"])
    if not args.model and not args.resume:
        imitate(model, text, draw, args)
    reference = None
    if args.beta:  # with LoRA the model itself, which can turn its adapters off
        reference = model if args.lora_rank else ready(copy.deepcopy(model), args)
    weights = [param for param in ready(model, args).parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(weights, args.learning_rate, weight_decay=0.0, fused=True)
    sampler = make_sampler(model, device, args)
    with Journal(args, model, optimizer, reference) as journal:
        refresh(sampler, model)
        journal.before = journal.before or examine(sampler, text, heldout, args)
        while not journal.finished:
            rng, clock = random.Random(f"{args.seed}, {journal.step}"), [time.perf_counter()]
            examples = [draw(rng) for _ in range(args.num_prompts)]
            seed = rng.randrange(2**31) + rank
            batch, facts = ask(sampler, text, examples[rank::world_size], seed, args)
            clock.append(time.perf_counter())
            means = improve(model, reference, optimizer, batch, args)
            refresh(sampler, model)
            clock.append(time.perf_counter())
            if (journal.step + 1) % args.eval_every == 0 or journal.step + 1 == args.max_steps:
                journal.score, texts = answers(sampler, text, heldout, 0.0, args)
                journal.show(heldout[rank::world_size], texts)
            columns = ["reward", "equal_groups", "length", "truncated"]
            journal.log(**dict(zip(columns, gather(facts).mean(0))), **means,
                        sampling_tokens_per_second=facts[:, 2].sum() / (clock[1] - clock[0]),
                        update_tokens_per_second=batch.mask.sum() / (clock[2] - clock[1]))
        journal.save()
        after = examine(sampler, text, heldout, args)
        save_model(journal.dir / "model", model, text)
    if rank == 0:
        verdict(journal.before, after, heldout)
    leave()
    return journal.score


# Below this line nothing is needed to understand the algorithm: decoder, task, evaluation, files.


class Packs(NamedTuple):
    """N packs as tensors: each a prompt, then completions of it that do not see each other."""

    tokens: torch.Tensor  # (N, L), 0 after the end
    position: torch.Tensor  # (N, L): each completion's go on from its prompt's
    segment: torch.Tensor  # (N, L): 0 prompt, 1, 2, ... its completions, -1 after the end
    source: torch.Tensor  # (K,): where in N L, flattened, the state stands that foretells a target
    target: torch.Tensor  # (K,): the completions' tokens, one completion after the other


def plan(prompts, completions, budget):
    """Micro-batches of at most `budget` tokens, or of one completion where that is longer.

    prompts: lists of token ids. completions: (number of the prompt, row, token ids), a prompt's
    next to each other. A micro-batch is a list of packs, a pack (prompt, [(row, token ids), ...]).
    """
    packs = []
    for index, group in itertools.groupby(completions, lambda completion: completion[0]):
        room = 0
        for _, row, tokens in group:
            if len(tokens) > room:  # a new pack computes the prompt once more
                packs.append((prompts[index], []))
                room = budget - len(prompts[index])
            packs[-1][1].append((row, tokens))
            room -= len(tokens)
    return fill_batches(packs, budget)


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


def spread(values, mask):
    """values (K,) at the True places of mask (R, C), row by row; elsewhere 0."""
    return torch.zeros_like(mask, dtype=values.dtype).masked_scatter(mask, values)


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


PRESET_FLAGS = ("scale_rewards", "loss_type", "importance_sampling_level", "epsilon",
                "epsilon_high", "beta")
PRESETS = {  # [C1]
    "default": ("none", "dapo", "token", 0.2, 0.28, 0.0),
    "grpo": ("group", "grpo", "token", 0.2, 0.2, 0.04),
    "dr_grpo": ("none", "dr_grpo", "token", 0.2, 0.2, 0.0),
    "dapo": ("group", "dapo", "token", 0.2, 0.28, 0.0),
    "gspo": ("group", "grpo", "sequence", 3e-4, 4e-4, 0.0),
    "cispo": ("group", "cispo", "token", 0.2, 4.0, 0.0),
    "rloo": ("leave-one-out", "dr_grpo", "token", 0.2, 0.2, 0.0),
}


def settle_flags(args):
    """Give each flag a value; returns (args, device, rank, number of processes)."""
    device, rank, world_size = join(args)
    if args.data and not args.model:
        fail(f"--data {args.data}: needs --model, as the tiny GPT knows only its own two tasks")
    if args.lora_rank and args.beta and not args.model:
        fail(f"--lora-rank {args.lora_rank} with --beta: needs --model, as the tiny GPT's adapters "
             "have learned what the reference policy knows")
    if args.preset not in PRESETS:
        fail(f"--preset {args.preset}: must be one of {', '.join(PRESETS)}")
    length = 256 if args.data else 32 if args.model else 4 if args.task == "addition" else 12
    values = {
        **dict(zip(PRESET_FLAGS, PRESETS[args.preset])),
        "max_completion_length": length,
        "learning_rate": 2e-6 if args.model else 3e-4,
        "bf16": bool(args.model) and multiplies_bf16(device),
    }
    args = settle_values(args, values, rank)
    if args.num_prompts % world_size:
        fail(f"--num-prompts {args.num_prompts}: does not divide by {world_size} processes")
    return args, device, rank, world_size


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


def mine(rows, count):
    """Of the rows of all processes, gathered, the `count` that this one gave."""
    start = dist.get_rank() * count if dist.is_initialized() else 0
    return rows[start:start + count]


def most(value, device):
    """The largest of the processes' values, a number."""
    value = torch.as_tensor(value, device=device)
    if dist.is_initialized():
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.item()


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


def make_sampler(model, device, args):
    """The Decoder that samples: the model itself, or a whole copy of it that `refresh` fills."""
    if not (args.bf16 or args.lora_rank or args.compile or dist.is_initialized()):
        return model
    sampler = Decoder(model.config).to(device).requires_grad_(False)
    for module in sampler.modules():
        if args.bf16 and isinstance(module, (nn.Linear, nn.Embedding)):
            module.to(torch.bfloat16)
        if args.compile and isinstance(module, Block):
            module.compile(dynamic=True)
    if args.compile and device.type == "cuda":
        sampler.recorded = None, None  # decode replays its step as a CUDA graph
    return sampler


def make_cache(model, num_rows, num_columns):
    """Room for keys and values, two tensors (rows, heads, columns, size) of each layer."""
    weight, layers = model.model.layers[0].self_attn.k_proj.weight, len(model.model.layers)
    size = model.config["num_key_value_heads"], num_columns, model.config["head_dim"]
    return [weight.new_zeros(num_rows, *size) for _ in range(2 * layers)]


def decode(model, token, position, seen, column, cache, reach):
    """States (R, D) behind one more token (R, 1); of seen (R, S) only `reach` columns count."""

    def step(token, position, seen, column):
        return model.states(token, position, seen[:, None, :reach], cache, column)[:, 0]

    inputs = token, position, seen, column
    if not hasattr(model, "recorded"):
        return step(*inputs)
    key = (reach, *seen.shape, *(x.data_ptr() for x in cache))
    if model.recorded[0] != key:
        model.recorded = key, record(step, inputs)
    return model.recorded[1](*inputs)


def record(step, inputs):
    """The step as a CUDA graph: a function that replays it on other numbers, of the same shapes."""
    inputs, stream = [x.clone() for x in inputs], torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(*inputs)  # once before, as libraries set themselves up in their first call
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step(*inputs)

    def replay(*others):
        for mine, other in zip(inputs, others):
            mine.copy_(other)
        graph.replay()
        return output

    return replay


@torch.no_grad()
def score_frozen(reference, packs, temperature):
    """Log-probabilities under the reference: with LoRA, the model with its adapters off."""
    Linear.adapted = False
    logprob, _ = reference(*packs, temperature)
    Linear.adapted = True
    return logprob


def total(tensor):
    """Put the sum over all processes into the tensor; returns it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather(rows):
    """The rows (R,) of all processes, one process after another."""
    if not dist.is_initialized():
        return rows
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rows.tolist())
    return torch.tensor([row for part in parts for row in part])


def leave():
    """Part from the other processes once all have come to their end."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def refresh(sampler, model):
    """Give the sampler the model's weights as they are now, adapters merged into them."""
    if sampler is not model:
        params = dict(sampler.named_parameters())
        for name, weight in merged(model):
            params[name].data.copy_(weight)


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


def countdown(rng, tiny):
    """Three numbers and a target that they make; the teacher of the tiny GPT guesses, 7 in 10."""
    numbers, target = [rng.randint(1, 9 if tiny else 50) for _ in range(3)], None
    while target is None or target.denominator > 1 or not 0 < target < 1000:
        answer = expression(rng, numbers)
        target = calculate(answer)[0]
    prompt = f"{' '.join(map(str, numbers))}={target}:"
    if not tiny:
        question = (f"Make {target} of the numbers {numbers}, each at most once, with + - * / and "
                    "brackets. Answer with the expression alone.")
        prompt = [{"role": "user", "content": question}]
    teacher = expression(rng, numbers) if rng.random() < 0.7 else answer
    return {"task": "countdown", "prompt": prompt, "answer": answer, "numbers": numbers,
            "target": int(target), "teacher": teacher}


def expression(rng, numbers):
    """A random expression of all the numbers."""
    terms = [str(number) for number in rng.sample(numbers, len(numbers))]
    while len(terms) > 1:
        i = rng.randrange(len(terms) - 1)
        joined = f"{terms[i]}{rng.choice('+-*/')}{terms[i + 1]}"
        terms[i:i + 2] = [f"({joined})" if len(terms) > 2 else joined]
    return terms[0]


def calculate(text):
    """(value, numbers used) of whole numbers, + − * / and ( ), exact; (None, []) of all else."""
    if not re.fullmatch(r"[0-9+\-*/() ]{1,100}", text):
        return None, []
    try:
        tree = ast.parse(text.strip(), mode="eval")
        numbers = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        return value_of(tree.body), numbers
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None, []


def value_of(node):
    """A Fraction; ValueError where there is more than sums, differences, products, quotients."""
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    operators = {ast.Add: Fraction.__add__, ast.Sub: Fraction.__sub__,
                 ast.Mult: Fraction.__mul__, ast.Div: Fraction.__truediv__}
    if not isinstance(node, ast.BinOp) or type(node.op) not in operators:
        raise ValueError("not supported")
    return operators[type(node.op)](value_of(node.left), value_of(node.right))


def load_examples(args, text, context):
    """(a function of a random generator that draws an example, a list of held-out examples).

    A prompt's own lot decides whether it is held out, so none is on both sides. context: how many
    tokens a prompt and its completion may have together.
    """
    room = context - args.max_completion_length
    if room < 1:
        fail(f"--max-completion-length {args.max_completion_length}: with its prompt the model "
             f"takes {context} tokens")
    if args.data:
        rows = sorted(read_rows(args, text, room), key=lot)
        edge = lot(rows[min(args.eval_prompts, max(len(rows) // 10, 1)) - 1])
        rest = [row for row in rows if lot(row) > edge]
        if not rest:
            fail(f"--data {args.data}: needs two different prompts at least: one is held out")
        return lambda rng: rng.choice(rest), [row for row in rows if lot(row) <= edge]
    make = {"addition": addition, "countdown": countdown}[args.task]

    def stream(rng, held_out):
        while True:
            example = make(rng, tiny=not args.model)
            if (lot(example) < 0.1) == held_out:
                yield example

    heldout = stream(random.Random("held out"), held_out=True)
    return lambda rng: next(stream(rng, False)), list(itertools.islice(heldout, args.eval_prompts))


def lot(example):
    """A number from 0 to 1 that belongs to the prompt; 12+34 has another than 34+12."""
    return random.Random(json.dumps(example["prompt"])).random()


def read_rows(args, text, room):
    """The rows of --data, prompts of at most `room` tokens; a bad row ends the program."""
    rows, fits = [], False
    with blamed(f"--data {args.data}"):
        lines = Path(args.data).read_text(encoding="utf-8-sig").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        with blamed(f"--data {args.data}, line {number}"):
            row = json.loads(line)
            if not isinstance(row, dict) or not {"prompt", "answer"} <= row.keys():
                raise ValueError("needs `prompt` and `answer`")
            if type(row["answer"]) not in (str, int, float) or row["answer"] == "":
                raise ValueError("`answer` must be a text or a number")
            row["answer"] = str(row["answer"])
            length = len(text.encode(row["prompt"]))
            if not 0 < length <= room:
                raise ValueError(f"its prompt has {length} tokens, there is room for 1 to {room}")
            fits |= len(text.encode(row["answer"])) <= args.max_completion_length
            rows.append(row)
    if not rows or not fits:
        fail(f"--data {args.data}: " + ("no answer fits --max-completion-length "
             f"{args.max_completion_length}" if rows else "holds no rows"))
    return rows


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


def answers(sampler, text, examples, temperature, args):
    """(accuracy of the sampler on all examples, its texts for those of this process)."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    mine, texts = examples[rank::world_size], []
    for start in range(0, len(mine), 64):
        prompts = [text.encode(example["prompt"]) for example in mine[start:start + 64]]
        tokens, length, *_ = sample(sampler, prompts, 1, args.max_completion_length, temperature,
                                    text.stop_ids, args.seed + start)
        texts += [text.decode(row[:n]) for row, n in zip(tokens.tolist(), length.tolist())]
    rewards = torch.tensor([reward(*pair) for pair in zip(texts, mine)], dtype=torch.float)
    return gather(rewards).mean().item(), texts


def examine(sampler, text, examples, args):
    """What the verdict compares: accuracies and some transcripts."""
    greedy, texts = answers(sampler, text, examples, 0.0, args)
    sampled, _ = answers(sampler, text, examples, 1.0, args)
    return {"greedy": greedy, "sampled": sampled, "texts": texts[:3]}


def verdict(before, after, examples):
    """Print what training has changed."""
    others = zip([e["answer"] for e in examples], examples[1:] + examples[:1])
    chance = sum(reward(*pair) for pair in others) / len(examples)
    print(f"{len(examples)} held-out prompts: accuracy of another's answer {chance:.3f}; before: "
          f"greedy {before['greedy']:.3f}, sampled {before['sampled']:.3f}; after: greedy "
          f"{after['greedy']:.3f}, sampled {after['sampled']:.3f}")
    mine = examples[::int(os.environ.get("WORLD_SIZE", 1))]
    for example, old, new in zip(mine, before["texts"], after["texts"]):
        asked = example["prompt"]
        asked = asked if isinstance(asked, str) else asked[-1]["content"]
        print(f"  {asked!r}: before {old!r}, after {new!r}, right {example['answer']!r}")


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
