# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "tyro==1.0.17", "wandb==0.31.0", "tqdm==4.70.1", "tokenizers==0.23.3",
#     "safetensors[numpy]==0.8.0", "huggingface-hub==2.4.0", "jinja2==3.1.6",
# ]
# ///
"""DPO: direct preference optimization for language models (Rafailov et al., 2023).

The data are pairs of a better answer y_w (chosen) and a worse answer y_l (rejected) to a prompt x.
DPO trains a policy π on them without a reward model and without sampling. Equation numbers refer to
arXiv 2305.18290:

    p(y_w is preferred) = σ(r(x, y_w) − r(x, y_l))                                       (1)
    π*(y|x) = π_ref(y|x) exp(r(x, y) / β) / Z(x)                                         (4)
    r(x, y) = β log π*(y|x)/π_ref(y|x) + β log Z(x)                                      (5)
    loss = −E log σ(β [log π/π_ref(y_w|x) − log π/π_ref(y_l|x)])                         (7)

(1) is the model of Bradley and Terry: a reward r explains the pairs. (4) is the policy that
maximizes E[r] − β KL(π‖π_ref); Z(x) normalizes it and does not depend on y. (5) is (4), solved for
r. So each policy π is the best one for the reward r̂(x, y) = β log π(y|x)/π_ref(y|x), up to
β log Z(x), which cancels in the difference of two rewards. With r̂ in (1), the negative
log-likelihood of the pairs is the loss (7).

A gradient step raises log π(y_w) and lowers log π(y_l), both with the weight
β σ(r̂(y_l) − r̂(y_w)), which is large where r̂ prefers the worse answer. The two share the weights
of the model, and the loss depends only on their difference. So both may fall, log π(y_l) more.

Implementation choices:
[C1] Flags select published variants. Δ is the difference in brackets in (7). In Δ', each log π and
     log π_ref is divided by the number of tokens of its answer. With usual values, β 0.1 if none:
       name      loss of a pair                     flags                           arXiv
       DPO       −log σ(βΔ)                                                         2305.18290
       cDPO      −(1−ε) log σ(βΔ) − ε log σ(−βΔ)    --label-smoothing 0.1 (ε)       (Mitchell, 2023)
       IPO       (Δ − 1/(2β))²                      --loss-type ipo                 2310.12036
       DPO-norm  −log σ(βΔ')                        --length-normalize --beta 5     2411.15124
       SimPO     −log σ(βΔ' − γ), without π_ref     --length-normalize --beta 2     2405.14734
                                                    --reference-free --gamma-margin 1 (γ)
       RPO       −log σ(βΔ) − α log π(y_w)/|y_w|    --nll-coef 1 (α)                2404.19733
[C2] π_ref is the model before training; it should already know how to answer. log π_ref is computed
     once, before training: two numbers per pair, one model in memory.
[C3] The learning rate rises in the first batches and then falls linearly to 0.
[C4] Prompt and answer are tokenized separately, so no token spans both. Tokenizers that add a space
     at the beginning of a text, such as that of Llama 2, add one to each answer.
[C5] Means are over the whole batch, so the gradient does not depend on --micro-batch-size or on
     the number of processes.
[C6] The stop token is part of the answer and is trained on. The prompt is not.
[C7] If chosen and rejected are whole conversations, the answers begin with the first message that
     differs. All that follows is trained on, also later messages of the user.
[C8] An answer that is too long loses its end. A pair is left out if its prompt leaves no room for
     an answer, or if its answers are equal up to the cut.

Shapes: P pairs given to a function, which are R = 2 P rows (chosen, rejected, chosen, ...) of L
inputs and targets; K trained tokens, V vocabulary size, D hidden size, E size of an attention head.
Of the tiny GPT: B sums, Y possible answers.

    python dpo.py                                               a tiny GPT learns to add
    python dpo.py --model Qwen/Qwen2.5-0.5B-Instruct --data pairs.jsonl

A row of --data is a JSON object with `prompt`, `chosen` and `rejected`. They are texts, which are
used as they are, or lists of chat messages, which go through the chat template. If one of them is a
list, the texts count as messages, too. If `chosen` and `rejected` are whole conversations, or there
is no `prompt`, the prompt is what the two have in common at the beginning.

Memory: 16 bytes per parameter for weights, gradients and AdamW, or 4 with LoRA. Several processes
share these, but with several micro-batches each holds all gradients. Activations come on top.

Results of five seeds on two cores. Greedy accuracy on held-out sums, before -> after:
    default: 0.322 -> 0.995 (lowest 0.980), 70 s
    a step of SmolLM2-135M in float32, 16 pairs of 64 to 128 tokens: 23 s, 3.5 GiB
"""

import contextlib
import functools
import gzip
import hashlib
import itertools
import json
import math
import os
import random
import re
import signal
import sys
import time
from array import array
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal, NamedTuple

import huggingface_hub
import jinja2.sandbox
import safetensors.torch
import tokenizers
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as dcp
import torch.nn.functional as F
import tyro
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm


@dataclass(frozen=True)
class Args:
    """The defaults here are those of the tiny GPT; default_args returns those of a --model."""

    model: str = ""  # Hugging Face folder or hub id: Llama, Qwen2, Qwen3; default: a tiny GPT
    data: str = ""  # JSON lines or a JSON array, may be .gz, see above; needs --model
    skip_bad_rows: bool = False  # leave out rows that cannot be used, and print how many
    chat_template_kwargs: str = "{}"  # JSON for the chat template: '{"enable_thinking": false}'
    max_length: int = 1024  # tokens of prompt and answer; longer answers are cut at the end
    seed: int = 1
    num_epochs: int = 4  # how often to learn from each pair; with --model 1
    max_steps: int = 0  # batches to learn from; 0: --num-epochs decides
    batch_size: int = 256  # pairs per batch, over all processes; with --model 16
    learning_rate: float = 5e-4  # highest of AdamW [C3]; with --model 1e-6, and with LoRA 1e-4
    warmup_ratio: float = 0.1  # share of the batches in which the learning rate grows [C3]
    max_grad_norm: float = 1.0  # clip the gradient norm to this
    loss_type: Literal["sigmoid", "ipo"] = "sigmoid"  # [C1]
    beta: float = 0.5  # strength of the pull towards the reference policy; with --model 0.1
    label_smoothing: float = 0.0  # share of labels assumed to be wrong [C1]
    length_normalize: bool = False  # divide log-probabilities by the number of tokens [C1]
    reference_free: bool = False  # leave out the reference policy [C1]
    gamma_margin: float = 0.0  # target margin between the rewards of chosen and rejected [C1]
    nll_coef: float = 0.0  # coefficient of the negative log-likelihood of chosen, per token [C1]
    train_pairs: int = 25_000  # pairs to make for the tiny GPT
    pretrain_steps: int = 500  # supervised steps of the tiny GPT before DPO
    eval_every: int = 20  # batches between evaluations; 0: automatic, about 5 % of the time
    eval_pairs: int = 256  # held-out pairs, at most about a tenth of the data, at least one
    micro_batch_size: int = 256  # pairs per forward and backward pass; changes only memory [C5]
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory
    lora_rank: int = 0  # train LoRA adapters of this rank instead of the weights
    bf16: bool = False  # compute in bfloat16, keep the weights in float32
    compile: bool = False  # torch.compile the transformer blocks
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # default: the GPU, if any
    run_dir: str = ""  # output folder; default: runs/<script>-<task>-<seed>-<time>
    resume: str = ""  # continue the run in this folder; its flags are the defaults
    checkpoint_seconds: float = 600.0  # time between checkpoints; 0: after every batch
    track: bool = False  # log to Weights & Biases
    wandb_project: str = "policy-gradients"


def preference_loss(logprob, ref_logprob, length, beta, loss_type="sigmoid", label_smoothing=0.0,
                    gamma_margin=0.0, length_normalize=False, nll_coef=0.0):
    """Compute the loss of each pair, (P,); the options are those of table [C1].

    logprob and ref_logprob are log π and log π_ref of the chosen and the rejected answer, (P, 2),
    sums over their tokens; length (P, 2) is the number of tokens.
    """
    log_ratio = logprob - ref_logprob                                             # (5): r̂ / β
    if length_normalize:
        log_ratio = log_ratio / length
    log_ratio_diff = log_ratio[:, 0] - log_ratio[:, 1]                            # Δ or Δ'
    if loss_type == "ipo":  # has no label smoothing and no margin
        loss = (log_ratio_diff - 1 / (2 * beta)).square()
    else:
        logit = beta * log_ratio_diff - gamma_margin
        loss, flipped_loss = -F.logsigmoid(logit), -F.logsigmoid(-logit)          # (1), (7)
        loss = (1 - label_smoothing) * loss + label_smoothing * flipped_loss      # [C1]
    return loss - nll_coef * logprob[:, 0] / length[:, 0]                         # [C1]: RPO


def best_policy(ref_logprob, reward, beta):
    """Compute log π* (..., Y) of all Y answers from their log π_ref and rewards (..., Y).

    It is the aim of the loss (7), not of its variants. DPO does not need it. The tiny GPT, whose
    answers can be enumerated, is compared with it.
    """
    return (ref_logprob + reward / beta).log_softmax(-1)                          # (4)


def chunk_logprobs(hidden, output_weight, targets):
    """Compute log π of targets (K,), float32, from hidden states (K, D) and weight (V, D)."""
    logits = F.linear(hidden, output_weight).float()                          # (K, V)
    return -F.cross_entropy(logits, targets, reduction="none")


def token_logprobs(hidden, output_weight, targets, mask, chunk_size=1024):
    """Compute log π of the targets where mask is True, 0 elsewhere; (R, L), like targets and mask.

    hidden (R, L, D) are the last hidden states of the model, output_weight (V, D) gives the logits.
    For a model of transformers these are model.base_model(inputs).last_hidden_state and
    model.get_output_embeddings().weight, unless it caps, scales or shifts its logits; rows padded
    at the end need no attention mask.

    This equals logits.log_softmax(-1).gather(-1, targets), but the logits are computed in chunks of
    tokens, and again in the backward pass: those of all tokens, (K, V), would be the largest tensor
    by far.
    """
    hidden, output_weight = hidden[mask], output_weight.to(hidden.dtype)      # (K, D), (V, D)
    chunks = zip(hidden.split(chunk_size), targets[mask].split(chunk_size))
    logprobs = [checkpoint(chunk_logprobs, hidden_chunk, output_weight, target_chunk,
                           use_reentrant=False) for hidden_chunk, target_chunk in chunks]
    zeros = torch.zeros(mask.shape, device=mask.device)
    return zeros.masked_scatter(mask, torch.cat(logprobs))  # puts the K values where mask is True


def pad_batch(rows, device):
    """Make tensors (R, L) of rows, a list of (prompt, completion), each a sequence of token ids.

    Returns inputs, targets (the tokens that follow them) and mask, which is True where the target
    belongs to the completion. Prompt 5 6 and completion 7 8 give inputs 5 6 7, targets 6 7 8 and
    mask False True True.
    """
    tokens = pad_sequence([torch.tensor(prompt + completion) for prompt, completion in rows],
                          batch_first=True)  # padded at the end: causal attention never sees it
    mask = pad_sequence([torch.arange(len(prompt) + len(completion)) >= len(prompt)  # [C6]
                         for prompt, completion in rows], batch_first=True)
    return tokens[:, :-1].to(device), tokens[:, 1:].to(device), mask[:, 1:].to(device)


def encode_answer(text, tokenizer):
    """Return the token ids of an answer, which end with a stop token.

    If white space alone follows the last stop token, as in chat templates, it is cut off. An answer
    that does not end with a stop token gets one.
    """
    ids = tokenizer.encode(text, add_special_tokens=False)                        # [C4]
    ends = [i + 1 for i, token in enumerate(ids) if token in tokenizer.stop_ids]
    if ends and not tokenizer.decode(ids[ends[-1]:], skip_special_tokens=True).strip():
        return ids[:ends[-1]]
    return ids + tokenizer.stop_ids[:1]                                           # [C6]


class Pair(NamedTuple):
    """Token ids of a prompt, of the better and of the worse answer."""

    prompt: array  # takes a tenth of the memory of a list
    chosen: array
    rejected: array


def by_length(pairs, indices):
    """Sort indices of pairs by the pairs' length, longest first: then there is little padding."""
    return sorted(indices, reverse=True, key=lambda i: len(pairs[i].prompt) + max(
        len(pairs[i].chosen), len(pairs[i].rejected)))


def answer_logprobs(model, pairs, device):
    """Compute log π of the answers, (P, 2): the sum over their tokens."""
    rows = [(pair.prompt, answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]
    inputs, targets, mask = pad_batch(rows, device)
    hidden = model(inputs)  # first, as only then FSDP has the whole output weight
    logprob = token_logprobs(hidden, model.output_weight(), targets, mask)        # (R, L)
    return logprob.sum(1).view(-1, 2)


def answer_lengths(pairs, device):
    """Return the number of tokens of the answers, (P, 2)."""
    return torch.tensor([[len(pair.chosen), len(pair.rejected)] for pair in pairs], device=device)


@torch.no_grad()
def all_answer_logprobs(model, pairs, micro_batch_size, device, title="reference"):
    """Compute answer_logprobs of all pairs, (P, 2), in micro-batches that the processes share."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    indices = by_length(pairs, range(len(pairs)))
    num_missing = -len(indices) % world_size
    # All processes must call the model equally often, so some compute the first pair once more.
    indices = local_rows(indices + indices[:1] * num_missing)
    logprobs = []
    for start in tqdm(range(0, len(indices), micro_batch_size), title, leave=False,
                      disable=get_rank() > 0 or None):  # None: shown in a terminal only
        part = [pairs[i] for i in indices[start:start + micro_batch_size]]
        logprobs.append(answer_logprobs(model, part, device).cpu())
    result = torch.zeros(len(pairs), 2)  # in the order of pairs again
    result[all_gather(torch.tensor(indices))] = all_gather(torch.cat(logprobs))
    return result


def batch_indices(step, num_pairs, batch_size, seed):
    """Return the indices of the pairs of a batch.

    Each epoch has an order of its own. What is left at its end and fills no batch is left out.
    """
    epoch, batch = divmod(step, num_pairs // batch_size)
    rng = torch.Generator().manual_seed(random.Random(f"{seed} {epoch}").randrange(2**31))
    order = torch.randperm(num_pairs, generator=rng).tolist()  # the same in all processes
    return order[batch * batch_size:(batch + 1) * batch_size]


def learning_rate_factor(step, num_steps, warmup_ratio):
    """Compute a factor from 0 to 1: it rises during the warm-up, then falls linearly to 0."""
    warmup_steps = warmup_ratio * num_steps
    rise = (step + 1) / max(warmup_steps, 1)
    fall = (num_steps - step) / max(num_steps - warmup_steps, 1)
    return min(rise, fall, 1)                                                     # [C3]


def update(model, optimizer, pairs, ref_logprob, args):
    """Take a gradient step on the pairs of this process; ref_logprob is (P, 2).

    Returns metrics, means over the pairs of all processes.
    """
    length = answer_lengths(pairs, args.device)                                   # (P, 2)
    ref_logprob = ref_logprob.to(args.device)
    logprobs = torch.zeros_like(ref_logprob)
    optimizer.zero_grad()
    for start in range(0, len(pairs), args.micro_batch_size):
        part = slice(start, start + args.micro_batch_size)
        logprob = answer_logprobs(model, pairs[part], args.device)                # (P, 2) of part
        loss = preference_loss(logprob, ref_logprob[part], length[part], **loss_options(args))
        set_gradient_sync(model, is_last=part.stop >= len(pairs))
        # FSDP adds up the gradients of the processes, so all pairs of the batch count.    [C5]
        (loss.sum() / args.batch_size).backward()
        logprobs[part] = logprob.detach()
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm,
                                         error_if_nonfinite=True)
    optimizer.step()
    # Metrics, and the loss once more, over the pairs of all processes.
    logprobs, ref_logprob, length = map(all_gather, (logprobs, ref_logprob, length))
    metrics = mean_metrics(logprobs, ref_logprob, length, args)
    return metrics | {"grad_norm": full_tensor(grad_norm)}


def train(args):
    """Train a model. Return it and the score: in what share of held-out pairs r̂ is right."""
    device = setup(args)
    config, weights, tokenizer = load_model(args) if args.model else pretrain(args, device)
    model = make_model(config, weights, device, args)
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(params, args.learning_rate, weight_decay=0.0, fused=True)
    del weights
    with Logger(args, model, optimizer) as log:  # --resume: loads model and optimizer
        pairs, heldout = load_pairs(args, tokenizer, model, log.dir)
        num_steps, eval_every = plan(pairs, heldout, tokenizer, args)
        log.check_data(heldout + pairs)
        if log.ref_logprob is None:  # a new run: the model is still the reference policy
            log.ref_logprob = torch.zeros(len(heldout + pairs), 2)
            if not args.reference_free:
                log.ref_logprob = all_answer_logprobs(                            # [C2]
                    model, heldout + pairs, args.micro_batch_size, device)
            log.before = None if args.model else evaluate_sums(model, tokenizer, None, args)
        heldout_ref, ref_logprob = log.ref_logprob.split([len(heldout), len(pairs)])
        log.bar.total = num_steps
        while not log.stopped() and log.step < num_steps:
            optimizer.param_groups[0]["lr"] = args.learning_rate * learning_rate_factor(
                log.step, num_steps, args.warmup_ratio)
            indices = batch_indices(log.step, len(pairs), args.batch_size, args.seed)
            indices = local_rows(by_length(pairs, indices))
            metrics = update(model, optimizer, [pairs[i] for i in indices], ref_logprob[indices],
                             args)
            log.step += 1
            if log.step == 1 or log.step % eval_every == 0 or log.step == num_steps:
                log.heldout = evaluate(model, heldout, heldout_ref, args)
                log.score = log.heldout["heldout_accuracy"]
            # metrics were measured before this step, log.heldout at the last evaluation.
            log.write(**metrics, **log.heldout)
    if args.model:  # Ctrl-C does not get here: Logger.__exit__ raises SystemExit
        save_model(log.dir / "model", model, tokenizer)
    else:
        evaluate_sums(model, tokenizer, log.before["logprob"], args)
    end_processes()
    return model, log.score


# --- The algorithm ends here. Below: metrics, the decoder, models, data, flags, logging. ---


# --- Metrics ---


def loss_options(args):
    """Return the flags of preference_loss, by name."""
    return {"beta": args.beta, "loss_type": args.loss_type,
            "label_smoothing": args.label_smoothing, "gamma_margin": args.gamma_margin,
            "length_normalize": args.length_normalize, "nll_coef": args.nll_coef}


def mean_metrics(logprob, ref_logprob, length, args):
    """Compute means over the pairs, by name; see preference_loss for the arguments.

    accuracy: how often the chosen answer has the higher reward r̂; in the first batch π is π_ref,
    so there it means nothing. accuracy_longer: the same where chosen is the longer answer; NaN if
    there are no such pairs. chosen_fell: how often log π of the chosen answer is below its log
    π_ref, which the loss allows; NaN without a reference. With --length-normalize rewards and
    log-probabilities are per token.
    """
    loss = preference_loss(logprob, ref_logprob, length, **loss_options(args))
    if args.length_normalize:                                                     # [C1]
        logprob, ref_logprob = logprob / length, ref_logprob / length
    reward = args.beta * (logprob - ref_logprob)
    correct = (reward[:, 0] > reward[:, 1]).float()
    values = {"loss": loss, "accuracy": correct, "margin": reward[:, 0] - reward[:, 1],
              "accuracy_longer": correct[length[:, 0] > length[:, 1]],
              "accuracy_shorter": correct[length[:, 0] < length[:, 1]],
              "reward_chosen": reward[:, 0], "reward_rejected": reward[:, 1],
              "logprob_chosen": logprob[:, 0], "logprob_rejected": logprob[:, 1],
              "chosen_fell": (logprob < ref_logprob)[:, 0].float()}
    if args.reference_free:
        values["chosen_fell"] = torch.tensor(math.nan)
    return {name: value.mean() for name, value in values.items()}


def evaluate(model, pairs, ref_logprob, args):
    """Compute some metrics of held-out pairs; ref_logprob is (P, 2)."""
    logprob = all_answer_logprobs(model, pairs, args.micro_batch_size, args.device, "evaluation")
    metrics = mean_metrics(logprob, ref_logprob, answer_lengths(pairs, "cpu"), args)
    return {f"heldout_{name}": metrics[name].item()
            for name in ("loss", "accuracy", "margin", "chosen_fell")}


# --- The decoder ---


LORA_SCALE = 2.0  # alpha / rank


class Linear(nn.Linear):
    """A linear layer. With rank > 0 it has a LoRA adapter that starts at 0: Hu et al. (2021)."""

    def __init__(self, in_features, out_features, bias=False, rank=0):
        super().__init__(in_features, out_features, bias)
        if rank:
            # Never on the meta device, as they are in no file.
            lora_a = torch.randn(rank, in_features, device="cpu") / in_features ** 0.5
            self.lora_a = nn.Parameter(lora_a)
            self.lora_b = nn.Parameter(torch.zeros(out_features, rank, device="cpu"))

    def forward(self, x):
        y = super().forward(x)
        if hasattr(self, "lora_a"):
            y = y + LORA_SCALE * F.linear(F.linear(x, self.lora_a), self.lora_b)
        return y


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config, rank):
        super().__init__()
        width, self.head_dim = config["hidden_size"], config["head_dim"]
        q_size = config["num_attention_heads"] * self.head_dim
        kv_size = config["num_key_value_heads"] * self.head_dim
        bias = config["model_type"] == "qwen2"
        self.q_proj = Linear(width, q_size, bias, rank)
        self.k_proj = Linear(width, kv_size, bias, rank)
        self.v_proj = Linear(width, kv_size, bias, rank)
        self.o_proj = Linear(q_size, width, False, rank)
        norm = nn.RMSNorm if config["model_type"] == "qwen3" else nn.Identity
        self.q_norm = norm(self.head_dim, config["rms_norm_eps"])
        self.k_norm = norm(self.head_dim, config["rms_norm_eps"])

    def forward(self, x, cos, sin):
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))           # (R, heads, L, E)
        qk = torch.cat([self.q_norm(q.float()), self.k_norm(k.float())], 1)  # fewer kernels
        left, right = qk.chunk(2, -1)  # rotate the halves; cos and sin are (L, E/2)
        qk = torch.cat([left * cos - right * sin, right * cos + left * sin], -1).to(v.dtype)
        q, k = qk.split([q.shape[1], k.shape[1]], 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


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
    """A transformer block: attention and MLP, each with a norm before and a residual around it."""

    def __init__(self, config, rank):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.self_attn = Attention(config, rank)
        self.post_attention_layernorm = nn.RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.mlp = MLP(config, rank)

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """A Llama, Qwen2 or Qwen3 whose parameters have the names of Hugging Face's files.

    config: see read_config. rank: of the LoRA adapters, 0 for none.
    """

    def __init__(self, config, rank=0, bf16=False, checkpointing=False):
        super().__init__()
        self.config, self.bf16, self.checkpointing = config, bf16, checkpointing
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.model.layers = nn.ModuleList(
            Block(config, rank) for _ in range(config["num_hidden_layers"]))
        self.model.norm = nn.RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        if not config["tie_word_embeddings"]:
            self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)
        for name, param in self.named_parameters():
            param.requires_grad_(not rank or "lora_" in name)

    def output_weight(self):
        """Return the weight (V, D) that turns hidden states into logits.

        With several processes it is complete only after a forward pass.
        """
        return getattr(self, "lm_head", self.model.embed_tokens).weight

    def forward(self, tokens):
        """Compute the last hidden states (R, L, D) of right-padded rows of tokens (R, L)."""
        position = torch.arange(tokens.shape[1], device=tokens.device)
        angle = position.unsqueeze(1) * frequencies(self.config, tokens.device)   # (L, E/2)
        cos, sin = angle.cos(), angle.sin()
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.bf16):
            x = self.model.embed_tokens(tokens).float()
            for block in self.model.layers:
                x = (checkpoint(block, x, cos, sin, use_reentrant=False) if self.checkpointing
                     else block(x, cos, sin))
            x = self.model.norm(x)
        return x.bfloat16() if self.bf16 else x


def frequencies(config, device):
    """Compute the rotary frequencies of a head, (E/2,), in radians per position."""
    rope, size = config["rope_parameters"], config["head_dim"]
    frequency = rope["rope_theta"] ** -(torch.arange(0, size, 2, device=device).float() / size)
    if rope["rope_type"] == "llama3":  # low frequencies are scaled down, for long contexts
        turns = frequency * rope["original_max_position_embeddings"] / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (keep + (1 - keep) / rope["factor"])
    return frequency


# --- Models and their files ---


def read_json(path):
    """Return the content of a JSON file, {} if it is missing."""
    return json.loads(Path(path).read_text("utf-8")) if Path(path).exists() else {}


def read_config(config, folder):
    """Fill in the defaults of a config.json; exit if Decoder does not support the model."""
    rope = {"rope_theta": config.get("rope_theta", 10000.0), "rope_type": "default"}
    rope |= config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope["rope_type"] = rope.get("type", rope["rope_type"])
    found = {"model_type": None} | rope | config
    if "sliding_attention" in (config.get("layer_types") or []):
        found["use_sliding_window"] = True
    supported = {"model_type": ["llama", "qwen2", "qwen3"], "rope_type": ["default", "llama3"],
                 "hidden_act": ["silu"], "use_sliding_window": [False], "attention_bias": [False],
                 "mlp_bias": [False], "quantization_config": [None], "partial_rotary_factor": [1.0]}
    for name, values in supported.items():
        if found.get(name, values[0]) not in values:
            raise SystemExit(f"--model {folder}: config.json: {name} {found[name]} is not "
                             "supported; dense Llama, Qwen2 and Qwen3 models are")
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    defaults = {"num_key_value_heads": heads, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
                "max_position_embeddings": 2048}
    return defaults | config | {"head_dim": head_dim, "rope_parameters": rope}


def load_model(args):
    """Return the config, the weights by name and the Tokenizer of a Hugging Face model."""
    folder = Path(args.model) if Path(args.model).is_dir() else download(args.model)
    for pattern in ("config.json", "tokenizer.json", "*.safetensors"):
        if not list(folder.glob(pattern)):
            raise SystemExit(f"--model {args.model}: no {pattern}; save_pretrained writes it")
    config = read_config(read_json(folder / "config.json"), args.model)
    weights = {}
    for path in folder.glob("*.safetensors"):
        weights |= safetensors.torch.load_file(path)  # memory-mapped: read when used
    return config, weights, Tokenizer(folder, json.loads(args.chat_template_kwargs))


def download(model):
    """Download a model from the Hugging Face hub; return its folder."""
    try:
        config = huggingface_hub.hf_hub_download(model, "config.json")
        read_config(read_json(config), model)  # exits if it is not supported
        return Path(huggingface_hub.snapshot_download(
            model, allow_patterns=["*.json", "*.jinja", "*.safetensors"]))
    except (OSError, ValueError) as error:
        raise SystemExit(f"--model {model}: no such folder, and no download from the hub: "
                         f"{' '.join(str(error).split()):.300}") from error


def make_model(config, weights, device, args):
    """Make a Decoder with these weights (name -> tensor), sharded if there are several processes.

    The weights of files are memory-mapped. Each block becomes float32 just before it is sharded, so
    that no process ever holds all of a sharded model.
    """
    with torch.device("meta"):
        model = Decoder(config, args.lora_rank, args.bf16, args.gradient_checkpointing)
    for name in model.load_state_dict(weights, strict=False, assign=True).missing_keys:
        if "lora_" not in name:
            raise SystemExit(f"--model {args.model}: no tensor {name} in its safetensors files")
    if dist.is_initialized():
        precision = MixedPrecisionPolicy(torch.bfloat16 if args.bf16 else None, torch.float32,
                                         cast_forward_inputs=False)
        mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
        for module in (*model.model.layers, model):
            fully_shard(module.float(), mesh=mesh, mp_policy=precision)
            # Add up the gradients: update divides by the size of the whole batch already.    [C5]
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    model.to(device, torch.float32)
    if args.compile:
        for block in model.model.layers:
            block.compile(dynamic=True)
    return model


def set_gradient_sync(model, is_last):
    """Let the next backward pass add up the gradients of all processes, if it is the last one.

    Until then each process adds up its own.
    """
    if dist.is_initialized():
        model.set_requires_gradient_sync(is_last)


def full_tensor(tensor):
    """Return the full tensor of a sharded one, other tensors as they are."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()


def save_model(folder, model, tokenizer):
    """Write a folder that transformers' AutoModelForCausalLM and AutoTokenizer open.

    Adapters are merged. All processes must take part.
    """
    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = dcp.get_model_state_dict(model, options=options)
    if get_rank() > 0:
        return
    for name in [name for name in weights if "lora_b" in name]:
        lora_b, lora_a = weights.pop(name), weights.pop(name.replace("lora_b", "lora_a"))
        base = name.replace("lora_b", "weight")
        weights[base] = weights[base] + LORA_SCALE * lora_b @ lora_a
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = model.config | {"dtype": "float32", "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tokenizer.save(folder)


# --- Tokenizer and chat template ---


class Tokenizer:
    """The tokenizer, chat template and stop tokens of a Hugging Face folder."""

    def __init__(self, folder, template_kwargs):
        self.folder = folder
        self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        settings = read_json(folder / "tokenizer_config.json")
        special_tokens = {name: value["content"] if isinstance(value, dict) else value
                          for name, value in settings.items() if name.endswith("_token") and value}
        self.template_values = {"tools": None, "documents": None} | special_tokens | template_kwargs
        self.template = settings.get("chat_template")
        if (folder / "chat_template.jinja").exists():
            self.template = (folder / "chat_template.jinja").read_text("utf-8")
        if isinstance(self.template, list):  # several, by name
            templates = {each["name"]: each["template"] for each in self.template}
            self.template = templates.get("default")
        ids = [self.tokenizer.token_to_id(special_tokens.get("eos_token", ""))]
        for file in ("config.json", "generation_config.json"):
            found = read_json(folder / file).get("eos_token_id")
            ids += found if isinstance(found, list) else [found]
        # The token that ends a turn in the chat template is a stop token, too.
        turn = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        with contextlib.suppress(ValueError, TypeError):  # no template, or one that fails here
            after_answer = self.render(turn, False).rpartition("answer")[2].lstrip()
            special_ids = self.tokenizer.get_added_tokens_decoder()
            ids += [token for token in self.encode(after_answer)[:1] if token in special_ids]
        self.stop_ids = [token for token in dict.fromkeys(ids) if token is not None]
        if not self.stop_ids:
            raise SystemExit(f"--model {folder}: no end-of-sequence token in its files")

    def render(self, messages, add_generation_prompt):
        """Return the text of chat messages, with the beginning of an assistant's turn if wanted."""
        if not self.template:
            raise ValueError("there are chat messages, but the model has no chat template")
        values = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            return compile_template(self.template).render(values | self.template_values)
        except jinja2.TemplateError as error:
            raise ValueError(f"chat template: {error}") from error

    def encode(self, text, add_special_tokens=False):
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, tokens, skip_special_tokens=True):
        return self.tokenizer.decode(tokens, skip_special_tokens)

    def save(self, folder):
        for path in [*self.folder.glob("*token*.json"), *self.folder.glob("chat_template.jinja")]:
            (folder / path.name).write_bytes(path.read_bytes())
        generation = read_json(self.folder / "generation_config.json")
        generation["eos_token_id"] = self.stop_ids  # with the token that ends a turn
        (folder / "generation_config.json").write_text(json.dumps(generation, indent=2))


@functools.cache
def compile_template(source):
    """Compile a chat template as transformers does; it is code that may not be trusted."""
    jinja = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    jinja.globals.update(raise_exception=raise_exception, strftime_now=time.strftime)
    jinja.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)  # not for HTML
    # Some templates mark what an assistant says, with tags that only transformers knows.
    source = re.sub(r"({%-?\s*)(end)?generation(\s*-?%})", r"\1set _ = 0\3", source)
    return jinja.from_string(source)


def raise_exception(message):
    """Chat templates call this for messages that they do not support."""
    raise ValueError(message)


# --- Data ---


def split_hash(prompt):
    """Return a number from 0 to 1, equal for equal prompts; it decides what is held out."""
    return random.Random(json.dumps(prompt)).random()


def load_pairs(args, tokenizer, model, folder):
    """Return the Pairs to learn from and the held-out ones; no prompt is in both parts.

    They come from --data. The tiny GPT writes its own data into the run's folder.
    """
    path = Path(args.data or folder / "pairs.jsonl")
    if not args.data and not args.resume:
        rows = [*make_pairs(model, tokenizer, args.eval_pairs, True, args),
                *make_pairs(model, tokenizer, args.train_pairs, False, args)]
        if get_rank() == 0:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        all_gather_object(None)  # wait: the others read it
    max_length = min(args.max_length, model.config["max_position_embeddings"])
    # The prompts with the lowest hashes are held out, with all their pairs. The tiny GPT has made
    # its held-out pairs from sums with the lowest hashes.
    rows = sorted(read_rows(path, lambda row: read_pair(row, tokenizer, max_length),
                            args.skip_bad_rows), key=lambda row: row[0])
    num_heldout = max(min(args.eval_pairs, len(rows) // 10), 1) if args.data else args.eval_pairs
    limit = max((prompt_hash for prompt_hash, _ in rows[:num_heldout]), default=0.0)
    heldout = [pair for prompt_hash, pair in rows if prompt_hash <= limit]
    pairs = [pair for prompt_hash, pair in rows if prompt_hash > limit]
    if args.max_steps:
        pairs = pairs[:args.max_steps * args.batch_size]  # only those that are used
    if len(pairs) < args.batch_size:
        raise SystemExit(f"--batch-size {args.batch_size}: there are only {len(pairs)} pairs to "
                         f"learn from, and {len(heldout)} held out")
    return pairs, heldout


def plan(pairs, heldout, tokenizer, args):
    """Return the number of batches, and of batches between evaluations. Print them and a pair."""
    num_steps = args.max_steps or args.num_epochs * (len(pairs) // args.batch_size)
    # Evaluating a pair takes a third of the time of learning from it. For 5 % of the time:
    # len(heldout) / 3 = 0.05 * eval_every * batch_size
    eval_every = args.eval_every or math.ceil(len(heldout) / (3 * 0.05 * args.batch_size))
    num_cut = sum(answer[-1] not in tokenizer.stop_ids
                  for pair in pairs + heldout for answer in (pair.chosen, pair.rejected))
    prompt, chosen, rejected = (tokenizer.decode(list(ids), False) for ids in pairs[0])
    if get_rank() == 0:
        print(f"{len(pairs)} pairs to learn from, {len(heldout)} held out; {num_cut} answers cut; "
              f"{num_steps} batches of {args.batch_size} pairs, an evaluation every {eval_every}\n"
              "A pair as the model sees it, the trained part in >>> <<<:\n"
              f"{prompt}>>>{chosen}<<<\nrejected: >>>{rejected}<<<")
    return num_steps, eval_every


def read_pair(row, tokenizer, max_length):
    """Return split_hash of the prompt and the Pair of a row, its answers cut at max_length tokens.

    Returns None if the answers do not differ within max_length tokens.
    """
    prompt, *answers = split_row(row)
    start = prompt
    if isinstance(prompt, list):  # the text of an answer is what it adds to the text of the prompt
        start = tokenizer.render(prompt, add_generation_prompt=True)
        answers = [tokenizer.render(prompt + answer, False) for answer in answers]
        if not all(text.startswith(start) for text in answers):
            raise ValueError("the chat template changes the prompt when an answer follows")
        answers = [text.removeprefix(start) for text in answers]
    prompt_ids = tokenizer.encode(start, add_special_tokens=isinstance(prompt, str))
    if not prompt_ids:
        raise ValueError("`prompt` has no tokens")
    chosen, rejected = (encode_answer(text, tokenizer) for text in answers)
    if chosen == rejected:
        raise ValueError("`chosen` and `rejected` are equal")
    room = max(max_length - len(prompt_ids), 0)                                   # [C8]
    if chosen[:room] == rejected[:room]:  # also if there is no room
        return None
    pair = Pair(array("i", prompt_ids), array("i", chosen[:room]), array("i", rejected[:room]))
    return split_hash(prompt), pair


def split_row(row):
    """Return prompt, chosen and rejected of a row: three texts, or three lists of messages.

    If one of them is a list of messages, a prompt that is a text becomes a message of the user, and
    an answer that is a text one of the assistant.
    """
    if "prompt" not in row and row.keys() & {"question", "instruction", "input", "query"}:
        raise ValueError("rename the column that has the prompt to `prompt`")
    parts = [row.get(name) for name in ("prompt", "chosen", "rejected")]
    if any(isinstance(part, list) for part in parts):
        parts = [[{"role": role, "content": part}] if isinstance(part, str) else part
                 for role, part in zip(("user", "assistant", "assistant"), parts)]
    prompt, chosen, rejected = parts
    check_part("chosen", chosen)
    check_part("rejected", rejected)
    is_chat = isinstance(chosen, list)
    # Answers whose first message is not the assistant's are whole conversations, prompt included. A
    # `prompt`, which may be formatted otherwise, is then ignored.                    [C7]
    if prompt is None or (is_chat and chosen[0]["role"] != "assistant"):
        prompt = common_beginning(chosen, rejected)
        chosen, rejected = chosen[len(prompt):], rejected[len(prompt):]
    check_part("prompt", prompt)
    if not (chosen and rejected):
        raise ValueError("after what `chosen` and `rejected` have in common, both must go on")
    if is_chat and {chosen[0]["role"], rejected[0]["role"]} != {"assistant"}:
        raise ValueError("an answer must begin with a message of the assistant")
    return prompt, chosen, rejected


ROLES = ("system", "developer", "user", "assistant", "tool")


def check_part(name, part):
    """Raise ValueError unless this value of a row is a text or a list of chat messages."""
    messages = part if isinstance(part, list) else [{"role": "user", "content": part}]
    for message in messages:
        is_message = isinstance(message, dict) and message.get("role") in ROLES
        if not is_message or not isinstance(message.get("content"), str):
            raise ValueError(f"`{name}` must be a text, or chat messages with `content`, a text, "
                             f"and `role`: {', '.join(ROLES)}")
    if not messages or not messages[-1]["content"].strip():
        raise ValueError(f"`{name}` is empty")


def common_beginning(chosen, rejected):
    """Return the messages that two conversations have in common, or the common prompt of two texts.

    The prompt of texts ends with "Assistant:", or else before the word in which they differ.
    """
    same = [a == b for a, b in zip(chosen, rejected)] + [False]
    common = chosen[:same.index(False)]
    if isinstance(common, list):
        return common
    turns = re.match(r".*\n\nAssistant:", common, re.DOTALL)
    return turns[0] if turns else re.sub(r"\s*\S*\Z", "", common)


def read_rows(path, convert, skip_bad_rows):
    """Return convert(row) of all rows (dicts) of a file: JSON lines or a JSON array.

    convert raises ValueError for a bad row, which ends the run, or is counted if skip_bad_rows.
    It returns None for a row that is too long.
    """
    opener = gzip.open if str(path).endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            text = file.read()
        items = json.loads(text) if text.lstrip().startswith("[") else text.split("\n")
    except (OSError, EOFError, ValueError) as error:
        raise SystemExit(f"--data {path}: expected JSON lines or a JSON array: {error}") from error
    rows, bad = [], Counter()
    for number, item in enumerate(items, 1):
        if isinstance(item, str) and not item.strip():  # an empty line
            continue
        try:
            with contextlib.suppress(ValueError):  # no JSON: stays a text, which is refused
                item = json.loads(item) if isinstance(item, str) else item
            if not isinstance(item, dict):
                raise ValueError("not a JSON object; expected JSON lines or a JSON array")
            rows.append(convert(item))
        except (ValueError, TypeError) as error:  # TypeError: a text that is not valid Unicode
            if not skip_bad_rows:
                raise SystemExit(f"--data {path}, row {number}: {error}") from error
            bad[str(error)] += 1
    used = [row for row in rows if row is not None]
    if get_rank() == 0:
        print(f"{path}: {len(used)} rows used, {len(rows) - len(used)} too long, {bad.total()} bad")
        for reason, count in bad.most_common(10):
            print(f"  {count} skipped: {reason}")
    return used


# --- The tiny GPT that learns to add ---


class Characters:
    """The tokenizer of the tiny GPT: each character is a token."""

    symbols, stop_ids = ["<end>", *"0123456789+="], [0]

    def encode(self, text, add_special_tokens=False):
        return [self.symbols.index(character) for character in text]

    def decode(self, tokens, skip_special_tokens=True):
        return "".join(self.symbols[token] for token in tokens if token or not skip_special_tokens)


def addition(rng, held_out=False):
    """Draw two numbers below 100 to add; the answer's digits are reversed.

    "pretrain_answer" is what the tiny GPT is pretrained on: 8 of 10 of them forget to carry.
    """
    while True:
        a, b = rng.randrange(100), rng.randrange(100)
        prompt = f"{a:02}+{b:02}="
        if (split_hash(prompt) < 0.1) == held_out:
            break
    answer = f"{a + b:03}"[::-1]
    no_carry = f"{(a + b) % 10}{(a // 10 + b // 10) % 10}0"  # ones, tens, hundreds
    return {"prompt": prompt, "answer": answer,
            "pretrain_answer": no_carry if rng.random() < 0.8 else answer}


def tiny_config(vocab_size):
    """Return the config of a GPT with a quarter of a million parameters."""
    return {"model_type": "llama", "vocab_size": vocab_size, "hidden_size": 96,
            "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
            "max_position_embeddings": 64, "tie_word_embeddings": True}


def pretrain(args, device):
    """Train a tiny GPT on sums that are mostly wrong: supervised learning, with Adam.

    Returns the same as load_model. With --resume the weights come from the checkpoint later.
    """
    tokenizer = Characters()
    config = read_config(tiny_config(len(tokenizer.symbols)), "tiny")
    model = Decoder(config).to(device)
    for param in model.parameters():
        if param.dim() == 2:
            nn.init.normal_(param, std=0.1)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.95), fused=True)
    rng = random.Random(f"pretrain {args.seed}")
    num_steps = 0 if args.resume else args.pretrain_steps
    for step in tqdm(range(num_steps), "pretraining", leave=False, disable=get_rank() > 0 or None):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 30, 3 * (1 - step / num_steps))
        examples = [addition(rng) for _ in range(256)]
        rows = [(tokenizer.encode(example["prompt"]),
                 encode_answer(example["pretrain_answer"], tokenizer)) for example in examples]
        inputs, targets, mask = pad_batch(rows, device)
        logprob = token_logprobs(model(inputs), model.output_weight(), targets, mask)
        loss = -logprob.sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return config, model.state_dict(), tokenizer


def draw_answers(model, tokenizer, prompts, temperature, rng):
    """Draw an answer (text) of the tiny GPT to each prompt; the prompts have the same length.

    Answers end after four characters, the stop token included. Temperature 0 is greedy.
    """
    tokens = torch.tensor([tokenizer.encode(prompt) for prompt in prompts], device=rng.device)
    for _ in range(4):
        rows, index = tokens.unique(dim=0, return_inverse=True)  # compute equal rows once
        hidden = model(rows)[:, -1]
        logits = F.linear(hidden, model.output_weight().to(hidden.dtype)).float()[index]  # (R, V)
        token = (logits / max(temperature, 1e-6)).softmax(-1).multinomial(1, generator=rng)
        tokens = torch.cat([tokens, token], 1)
    # Token 0 is the stop token.
    return [tokenizer.decode(itertools.takewhile(bool, row)) for row in tokens[:, -4:].tolist()]


def digit_reward(answer, example):
    """Return the known reward of the tiny GPT's answer (text): 3 for each correct digit."""
    return 3.0 * sum(a == b for a, b in zip(answer, example["answer"]))


@torch.no_grad()
def make_pairs(model, tokenizer, count, held_out, args):
    """Make preference pairs, dicts of texts, from the tiny GPT's own answers.

    Of two answers with rewards r and r', the first is chosen with probability σ(r − r') (Bradley
    and Terry). A prompt gives up to four pairs of different answers. The high temperature brings
    rare answers into the data: DPO controls only the answers that are in some pair.
    """
    rng = random.Random(f"pairs {args.seed} {held_out}")
    generator = torch.Generator(args.device).manual_seed(rng.randrange(2**31))
    pairs = []
    while len(pairs) < count:
        examples = [addition(rng, held_out) for _ in range(256)]
        prompts = [example["prompt"] for example in examples for _ in range(16)]
        answers = draw_answers(model, tokenizer, prompts, 1.3, generator)
        for i, example in enumerate(examples):
            different = sorted(set(answers[16 * i:16 * (i + 1)]) - {""})
            choices = list(itertools.combinations(different, 2))
            for first, second in rng.sample(choices, min(4, len(choices))):
                difference = digit_reward(first, example) - digit_reward(second, example)
                first_is_better = rng.random() < 1 / (1 + math.exp(-difference))
                chosen, rejected = (first, second) if first_is_better else (second, first)
                pairs.append({"prompt": example["prompt"], "chosen": chosen, "rejected": rejected})
    return pairs[:count]


@torch.no_grad()
def evaluate_sums(model, tokenizer, ref_logprob, args):
    """Measure the tiny GPT on held-out sums, and how far it is from the best policy π*; print it.

    All 1,000 answers of three digits are enumerated for some sums. ref_logprob: their "logprob"
    (B, 1000) before training, None in that first call.
    """
    rng, result = random.Random("evaluation"), {}
    examples = [addition(rng, held_out=True) for _ in range(1024)]
    prompts = [example["prompt"] for example in examples]
    generator = torch.Generator(args.device).manual_seed(args.seed)
    for name, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        answers = draw_answers(model, tokenizer, prompts, temperature, generator)
        correct = [answer == example["answer"] for answer, example in zip(answers, examples)]
        result[name] = sum(correct) / len(correct)
    examples, texts = examples[:16], [f"{n:03}" for n in range(1000)]
    answers = [encode_answer(text, tokenizer) for text in texts]
    # all_answer_logprobs takes two answers per prompt. Which is chosen does not matter here.
    pairs = [Pair(tokenizer.encode(example["prompt"]), first, second)
             for example in examples for first, second in zip(answers[::2], answers[1::2])]
    logprob = all_answer_logprobs(model, pairs, args.micro_batch_size, args.device, "evaluation")
    logprob = logprob.view(-1, 1000).log_softmax(-1)  # (B, 1000), of these answers alone
    reward = torch.tensor([[digit_reward(text, example) for text in texts] for example in examples])
    title = "before" if ref_logprob is None else "after"
    ref_logprob = logprob if ref_logprob is None else ref_logprob
    best = best_policy(ref_logprob, reward, args.beta)
    for name, policy, value in (
            ("reward", logprob, reward), ("best_reward", best, reward),
            ("kl_to_ref", logprob, logprob - ref_logprob), ("kl_to_best", logprob, logprob - best)):
        result[name] = (policy.exp() * value).sum(1).mean().item()
    if get_rank() == 0:
        print("{}: greedy accuracy {greedy:.3f}, sampled {sampled:.3f}; E[r] {reward:.3f}, of pi* "
              "{best_reward:.3f}; KL(pi||pi_ref) {kl_to_ref:.3f}, KL(pi||pi*) {kl_to_best:.3f}"
              .format(title, **result))
    return result | {"logprob": logprob}


# --- Flags and processes ---


def default_args(model="", lora_rank=0, **overrides):
    """Return the flags for the tiny GPT or for a --model."""
    values = {"model": model, "lora_rank": lora_rank}
    if model:
        is_cuda = torch.device(overrides.get("device", Args.device)).type == "cuda"
        bf16 = is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        values |= {"num_epochs": 1, "batch_size": 16, "micro_batch_size": 8 if bf16 else 2,
                   "learning_rate": 1e-4 if lora_rank else 1e-6, "eval_every": 0, "bf16": bf16,
                   "beta": 0.1}
    return Args(**values | overrides)


def parse_args():
    """Parse the command line; the defaults depend on some flags, or on the run to continue."""
    # A first pass finds these flags; --help is left to the second pass.
    first = tyro.cli(Args, args=[arg for arg in sys.argv[1:] if arg not in ("-h", "--help")])
    if not first.resume:
        return tyro.cli(Args, default=default_args(
            first.model, first.lora_rank, device=first.device))
    try:
        saved = Args(**load_checkpoint(first.resume)["args"])
    except Exception as error:  # a missing or damaged file, or another script's
        raise SystemExit(f"{first.resume}: not a run of this script: {error!r:.150}") from error
    args = tyro.cli(Args, default=saved)
    fixed = ("model", "lora_rank", "bf16", "reference_free", "seed", "num_epochs", "max_steps",
             "batch_size", "eval_pairs", "max_length")
    if any(getattr(args, name) != getattr(saved, name) for name in fixed):
        raise SystemExit(f"--resume {first.resume}: {', '.join(fixed)} cannot change")
    return args


def setup(args):
    """Start torch.distributed under torchrun; check flags. Return the device."""
    if not torch.get_device_module(args.device).is_available():
        raise SystemExit(f"--device {args.device}: not available here; use --device cpu")
    world_size, device = 1, torch.device(args.device)
    if dist.is_torchelastic_launched():
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=timedelta(hours=2))  # while one process saves, others wait
        world_size = dist.get_world_size()
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
    if args.batch_size % world_size:
        raise SystemExit(f"--batch-size {args.batch_size}: not divisible by {world_size} processes")
    if args.run_dir and not args.resume and any(Path(args.run_dir).glob("*.pt")):
        raise SystemExit(f"--run-dir {args.run_dir}: holds a run already; choose another folder")
    if bool(args.data) != bool(args.model):
        raise SystemExit("--model and --data: give both, or neither for the tiny GPT")
    try:
        json.loads(args.chat_template_kwargs).items()
    except (ValueError, AttributeError) as error:
        raise SystemExit("--chat-template-kwargs: expected a JSON object") from error
    if args.eval_pairs < 1:
        raise SystemExit("--eval-pairs must be at least 1")
    if args.loss_type == "ipo" and (args.label_smoothing or args.gamma_margin):
        raise SystemExit("--loss-type ipo: has no --label-smoothing and no --gamma-margin")
    torch.manual_seed(args.seed)  # the same weights in all processes
    return device


def end_processes():
    """End torch.distributed, if it runs."""
    if dist.is_initialized():
        dist.barrier()  # no process may leave before the others are done
        time.sleep(0.1)  # lets gloo's threads finish; else the program may abort when it ends
        dist.destroy_process_group()


def get_rank():
    """Return the number of this process, 0 if it is the only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def all_gather_object(value):
    """Return the values of all processes, in order of rank. It waits until all have called it."""
    values = [value] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def all_gather(tensor):
    """Return the rows (n, ...) of all processes as one tensor on the CPU, in order of rank."""
    return torch.cat(all_gather_object(tensor.cpu()))


def local_rows(rows):
    """Return this process's share of rows that are the same in all processes."""
    return rows[dist.get_rank()::dist.get_world_size()] if dist.is_initialized() else rows


# --- Logging ---


def load_checkpoint(folder):
    """Load what Logger.save wrote; weights_only, so that the file cannot run code."""
    return torch.load(Path(folder) / "checkpoint.pt", "cpu", weights_only=True, mmap=True)


# The attributes of Logger that a checkpoint keeps, as they are at the start.
PROGRESS = {"step": 0, "seconds": 0.0, "score": math.nan, "csv_size": 0, "before": None,
            "heldout": {}, "ref_logprob": None, "data_hash": None, "wandb_id": None}


class Logger:
    """Writes the run's folder (args.json, metrics.csv, checkpoint.pt), progress bar and wandb.

    With --resume it loads the model, the optimizer and the progress. before: evaluate_sums before
    training. heldout: the last metrics of held-out pairs. ref_logprob: of all answers. data_hash:
    of their tokens.
    """

    def __init__(self, args, model, optimizer):
        self.args, self.model, self.optimizer = args, model, optimizer
        self.wandb, self.interrupted = None, False
        vars(self).update(PROGRESS)
        name = f"{Path(__file__).stem}-{Path(args.data).stem or 'addition'}-{args.seed}"
        name += f"-{datetime.now():%Y%m%d-%H%M%S-%f}"  # process 0 decides
        self.dir = Path(args.resume or args.run_dir or f"runs/{all_gather_object(name)[0]}")
        if args.resume:
            self.load()
        self.start, self.saved_at = time.perf_counter() - self.seconds, time.perf_counter()
        self.bar = tqdm(initial=self.step, unit=" batches", disable=get_rank() > 0 or None)
        if get_rank() > 0:
            return
        self.dir.mkdir(parents=True, exist_ok=True)
        (self.dir / "args.json").write_text(json.dumps(asdict(args), indent=2))
        self.csv = (self.dir / "metrics.csv").open("a", buffering=1)
        # Drop rows that are newer than the checkpoint.
        self.csv.seek(self.csv.truncate(min(self.csv_size, self.csv.tell())))
        if args.track:
            import wandb

            self.wandb = wandb.init(project=args.wandb_project, name=self.dir.name,
                                    id=self.wandb_id, resume="allow", config=asdict(args))
            self.wandb_id = self.wandb.id

    def check_data(self, pairs):
        """Exit if the tokens of the pairs are not those of the run to continue."""
        token_bytes = b"".join(ids.tobytes() for pair in pairs for ids in pair)
        data_hash = hashlib.sha256(token_bytes).hexdigest()
        if self.data_hash not in (None, data_hash):
            raise SystemExit(f"--resume {self.dir}: the pairs have other tokens now; if the chat "
                             "template adds today's date, set it with --chat-template-kwargs")
        self.data_hash = data_hash

    def interrupt(self, *_):
        """Stop after this batch, at Ctrl-C; a second Ctrl-C stops at once."""
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def stopped(self):
        """Whether Ctrl-C was pressed in any process; the same in all."""
        return any(all_gather_object(self.interrupted))

    def write(self, **metrics):
        """Log one batch; save a checkpoint from time to time."""
        self.seconds = time.perf_counter() - self.start
        self.bar.set_postfix(score=f"{self.score:.3f}", refresh=False)
        self.bar.update()
        if get_rank() == 0:
            row = {"step": self.step, "seconds": self.seconds, "score": self.score}
            row |= {name: float(value) for name, value in metrics.items()}
            if self.csv.tell() == 0:
                print(*row.keys(), sep=",", file=self.csv)  # header
            print(*row.values(), sep=",", file=self.csv)
            self.csv_size = self.csv.tell()
            if self.wandb:
                self.wandb.log(row, step=self.step)
        waited = all_gather_object(time.perf_counter() - self.saved_at)[0]  # clock of process 0
        if waited >= self.args.checkpoint_seconds:
            self.save()

    def save(self):
        """Write checkpoint.pt, without the weights of a --model that LoRA does not train.

        Those of the tiny GPT are in no other file. All processes must take part, as the weights may
        be sharded.
        """
        options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True,
                                       ignore_frozen_params=bool(self.args.model))
        # Before the first step the optimizer has no state, and dcp would take a step to create it.
        optimizers = [self.optimizer] if self.optimizer.state else []
        weights, optimizer = dcp.get_state_dict(self.model, optimizers, options=options)
        state = {"args": asdict(self.args), "model": weights, "optimizer": optimizer,
                 "progress": {name: getattr(self, name) for name in PROGRESS}}
        if get_rank() == 0:  # first under another name, so that it is never partly written
            torch.save(state, self.dir / "checkpoint.tmp")
            (self.dir / "checkpoint.tmp").replace(self.dir / "checkpoint.pt")
        all_gather_object(None)  # wait: torchrun may end process 0 when the others leave
        self.saved_at = time.perf_counter()

    def load(self):
        """Restore what save wrote."""
        saved = load_checkpoint(self.args.resume)
        vars(self).update(saved["progress"])
        options = dcp.StateDictOptions(full_state_dict=True, strict=False)
        optimizers = [self.optimizer] if saved["optimizer"] else []
        dcp.set_state_dict(self.model, optimizers, model_state_dict=saved["model"],
                           optim_state_dict=saved["optimizer"], options=options)

    def __enter__(self):
        self.old_handler = signal.signal(signal.SIGINT, self.interrupt)
        return self

    def __exit__(self, kind, error, traceback):
        self.bar.close()
        # Saving needs all processes. After an error in one, the others are still in a batch.
        if kind is None or (issubclass(kind, Exception) and not dist.is_initialized()):
            self.save()
        signal.signal(signal.SIGINT, self.old_handler)
        interrupted = kind is None and any(all_gather_object(self.interrupted))
        if get_rank() == 0 and kind is not SystemExit:  # a mistake of the user's has its own line
            print(f"score {self.score:.3f} after {self.step} batches, {self.seconds:.0f} s; "
                  f"files in {self.dir}")
        if interrupted or kind is KeyboardInterrupt:
            raise SystemExit(130)


if __name__ == "__main__":
    train(parse_args())
