# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "tyro==1.0.17", "wandb==0.31.0", "tqdm==4.70.1", "tokenizers==0.23.3",
#     "safetensors[numpy]==0.8.0", "huggingface-hub==2.4.0", "jinja2==3.1.6",
# ]
# ///
r"""GRPO: group relative policy optimization for language models (Shao et al., 2024).

The policy π writes G completions o_1 … o_G of each prompt q, and a function gives each of them a
reward r_i. The advantage Â_i of a completion is its reward relative to those of its group, so no
value network is needed. The loss is PPO's clipped objective, with the same Â_i for all tokens of a
completion. Equation numbers refer to DeepSeekMath, arXiv 2402.03300:

    Â_i = (r_i − mean r) / std r                             over the G completions of a prompt
    ρ_it = π(o_it | q, o_i<t) / π_old(o_it | q, o_i<t)                       of token t
    J = E[ 1/G Σ_i 1/|o_i| Σ_t (min(ρ_it Â_i, clip(ρ_it, 1−ε, 1+ε) Â_i) − β k3_it) ]   (3)
    k3_it = u − log u − 1 with u = π_ref/π of token t; it estimates KL(π‖π_ref)        (4)

--preset grpo is this, except for [C3] and [C4]. The default is simpler: Â_i = r_i − mean r; β = 0,
so there is no reference policy π_ref; and the mean is over all tokens of the batch, 1 / Σ_i |o_i|
instead of 1/G Σ_i 1/|o_i|. ρ is clipped to [0.8, 1.28], if there are several updates per batch.

Read train first, then generate_batch and update. Implementation choices:
[C1] --preset selects a variant. "mean": over all tokens of the batch; over the tokens of each
     completion, then over completions; or "constant", the sum over the tokens of a completion
     divided by C, whatever its length, then the mean over completions (token_weight).
                scale          loss type  mean        ratio     ε       ε_high  β     arXiv
       default  none           dapo       tokens      token     0.2     0.28    0
       grpo     group          grpo       completion  token     0.2     0.2     0.04  2402.03300
       dr_grpo  none           dr_grpo    constant    token     0.2     0.2     0     2503.20783
       dapo     group          dapo       tokens      token     0.2     0.28    0     2503.14476
       gspo     group          grpo       completion  sequence  0.0003  0.0004  0     2507.18071
       cispo    group          cispo      tokens      token     –       4       0     2506.13585
       rloo     leave-one-out  dr_grpo    constant    token     0.2     0.2     0     2402.14740
     "scale" says what r − mean r is divided by (group_advantage). Division by std enlarges the
     advantages of prompts that are nearly always or nearly never solved, so the default does
     without. Other parts of these papers are left out.
[C2] π_old is π before the first update on a batch. With one update per batch, the default, π is
     still π_old. So ρ = 1, nothing is clipped, and the value of the loss says nothing about
     progress. But the gradient is not 0: ∇ρ = ρ ∇log π = ∇log π. So the gradient of a token's loss
     is −Â ∇log π, as in REINFORCE with a baseline. The clip range, "cispo" and the ratio of a
     sequence matter only with --num-iterations > 1. The trainer computes log π_old itself.
[C3] The KL term is ρ k3. o_t comes from π_old, so the mean of ρ k3 is that of k3 over tokens of π:
     KL(π‖π_ref) of this token, given those before it. The gradient is that of this KL, too. The
     paper leaves out ρ: with π = π_old the value is the same, but the gradient is that of
     KL(π_ref‖π), another divergence. How a token changes the KL of later ones is left out in both.
[C4] Groups with equal rewards have Â = 0. They are skipped, also in the KL term, and are left out
     of the number of rows and tokens by which the loss is divided.
[C5] Means are over the whole batch, so for given completions the gradient does not depend on
     --micro-batch-size or on the number of processes.
[C6] The stop token is part of the completion and is trained on. The prompt is not.
[C7] π is softmax(logits / temperature), both in sampling and in the loss.
[C8] The prompts of a batch are drawn at random from all, without epochs. One may occur twice.

Shapes: B prompts of this process, G completions of each, R rows (B G, or those of a micro-batch) of
L + 1 tokens, which are L inputs and L targets; C tokens of the longest possible completion, V
vocabulary size, D hidden size, K trained tokens, E size of an attention head, S cached tokens.

    python grpo.py                                              a tiny GPT learns to add
    python grpo.py --model Qwen/Qwen2.5-0.5B-Instruct --data questions.jsonl

A row of --data is a JSON object, and reaches the reward as a dict. `prompt` is a text, which the
model continues, or a list of chat messages. The default reward also needs `answer`:

    {"prompt": [{"role": "user", "content": "What is 7 * 8? Put the answer in \\boxed{}."}],
     "answer": "56"}

Memory in bytes per parameter; activations and the cache come on top:
    16    weights, gradients and AdamW; 4 with LoRA
     2    a copy that generates, with --bf16; else 4 with --compile or torchrun, 0 without
     4    the reference policy, if β > 0; with LoRA and one process 0, as the weights are shared
torchrun divides this among the processes, except the gradients, the copy that generates and the
embeddings of the reference policy.

Results of five seeds on two cores. Greedy accuracy on held-out sums, before -> after:
    default: 0.337 -> 0.999 (lowest 0.996), 41 s
    a step of SmolLM2-135M in float32, 16 completions of 32 tokens: 8 s, 3.5 GiB
"""

import contextlib
import functools
import gzip
import json
import math
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from fractions import Fraction
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
    """The defaults here are those of the tiny GPT; default_args applies --model and --preset."""

    model: str = ""  # Hugging Face folder or hub id: Llama, Qwen2, Qwen3; default: a tiny GPT
    data: str = ""  # JSON lines or a JSON array, may be .gz, see above; needs --model
    skip_bad_rows: bool = False  # leave out rows that cannot be used, and print how many
    chat_template_kwargs: str = "{}"  # JSON for the chat template: '{"enable_thinking": false}'
    seed: int = 1
    max_steps: int = 300  # batches to generate and learn from
    batch_size: int = 128  # prompts per batch, over all processes; with --model 32
    num_generations: int = 8  # G: completions per prompt
    max_completion_length: int = 4  # C: tokens per completion; with --model 256
    max_length: int = 1024  # tokens of prompt and completion; longer prompts are left out
    temperature: float = 1.0  # sampling temperature [C7]
    learning_rate: float = 3e-4  # of AdamW; with --model 2e-6, and with LoRA 1e-4
    warmup_ratio: float = 0.0  # share of the batches in which the rate grows; with --model 0.1
    max_grad_norm: float = 1.0  # clip the gradient norm to this
    preset: str = "default"  # a row of the table [C1]; gives the next six flags their defaults
    scale_rewards: Literal["group", "batch", "none", "leave-one-out"] = "none"  # how to scale [C1]
    loss_type: Literal["grpo", "dapo", "dr_grpo", "cispo"] = "dapo"  # objective and averaging [C1]
    importance_sampling_level: Literal["token", "sequence"] = "token"  # a ratio per token or row
    epsilon: float = 0.2  # the ratio is clipped to at least 1 - epsilon
    epsilon_high: float = 0.28  # the ratio is clipped to at most 1 + epsilon_high
    beta: float = 0.0  # coefficient of the KL divergence from the initial model
    num_iterations: int = 1  # updates per batch
    mask_truncated_completions: bool = False  # do not learn from completions without stop token
    pretrain_steps: int = 500  # supervised steps of the tiny GPT before GRPO
    eval_every: int = 20  # batches between evaluations; 0: automatic, about 10 % of the time
    eval_prompts: int = 256  # held-out prompts, at most about a tenth of the data, at least one
    micro_batch_size: int = 1024  # rows per forward and backward pass; changes only memory [C5]
    sampling_batch_size: int = 1024  # rows to generate at a time: memory
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory
    lora_rank: int = 0  # train LoRA adapters of this rank instead of the weights
    bf16: bool = False  # compute in bfloat16, keep the weights in float32
    compile: bool = False  # torch.compile the transformer blocks
    stop_at: float | None = None  # stop when the mean reward on held-out prompts reaches this
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # default: the GPU, if any
    run_dir: str = ""  # output folder; default: runs/<script>-<task>-<seed>-<time>
    resume: str = ""  # continue the run in this folder; its flags are the defaults
    checkpoint_seconds: float = 600.0  # time between checkpoints; 0: after every batch
    track: bool = False  # log to Weights & Biases
    wandb_project: str = "policy-gradients"


def group_advantage(reward, scale_rewards):
    """Compute how much better each completion is than its group, (B, G), from rewards (B, G).

    std is that of a sample, with G − 1 in the denominator; the small number avoids division by 0.
    """
    advantage = reward - reward.mean(1, keepdim=True)
    if scale_rewards == "none":
        return advantage
    if scale_rewards == "leave-one-out":  # equals r minus the mean of the other completions
        return advantage * reward.shape[1] / (reward.shape[1] - 1)
    # "batch": of all groups, of all processes
    std = all_gather(reward).std() if scale_rewards == "batch" else reward.std(1, keepdim=True)
    return advantage / (std + 1e-4)


def importance_ratio(logprob, old_logprob, mask, level):
    """Compute ρ of each token, (R, L), or at level "sequence" one for each row, (R, 1)."""
    log_ratio = logprob - old_logprob
    if level == "sequence":  # the geometric mean over the tokens
        log_ratio = (log_ratio * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return log_ratio.exp()


def policy_loss(ratio, logprob, advantage, loss_type, epsilon, epsilon_high):
    """Compute the loss of each token, (R, L), from logprob (R, L) and advantage (R,).

    With the ratio of a sequence, (R, 1), a clipped loss is (R, 1), too: that of each of its tokens.
    """
    advantage = advantage.unsqueeze(1)
    if loss_type == "cispo":  # the clipped ratio is only a weight: every token keeps its gradient
        clipped_ratio = ratio.clamp(max=1 + epsilon_high).detach()
        return -clipped_ratio * advantage * logprob
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon_high)
    return -torch.min(ratio * advantage, clipped * advantage)                 # (3), minimized


def kl_estimate(logprob, old_logprob, ref_logprob):
    """Compute ρ k3 of each token, (R, L); its mean is KL(π‖π_ref). old_logprob is for ρ."""
    log_ratio = ref_logprob - logprob
    k3 = log_ratio.exp() - log_ratio - 1                                      # (4)
    ratio = (logprob - old_logprob).exp()  # per token, even if the loss has one for each row
    return ratio * k3                                                         # [C3]


def token_weight(mask, loss_type, num_rows, num_tokens, max_completion_length):
    """Compute the weight of each token in the loss, (R, L), from mask (R, L).

    The loss is the sum of the tokens' losses with these weights. mask is True at tokens to learn
    from. num_rows and num_tokens count the rows and tokens to learn from in the whole batch, over
    all micro-batches and processes [C5].
    """
    if loss_type == "grpo":  # mean over the tokens of each completion, then over completions
        return mask / mask.sum(1, keepdim=True).clamp(min=1) / num_rows
    if loss_type == "dr_grpo":  # a constant: tokens of long and short completions count the same
        return mask / (num_rows * max_completion_length)
    return mask / num_tokens  # "dapo" and "cispo": mean over all tokens


def grpo_loss(logprob, old_logprob, ref_logprob, advantage, mask, weight, *, loss_type="dapo",
              level="token", epsilon=0.2, epsilon_high=0.28, beta=0.0):
    """Compute the loss of R rows, a scalar.

    logprob, old_logprob and ref_logprob are log π, log π_old and log π_ref of the tokens, (R, L);
    ref_logprob is not used if beta is 0. advantage is (R,). mask (R, L) is True at tokens to learn
    from, weight (R, L) is their token_weight.
    """
    ratio = importance_ratio(logprob, old_logprob, mask, level)
    loss = policy_loss(ratio, logprob, advantage, loss_type, epsilon, epsilon_high)
    if beta:
        loss = loss + beta * kl_estimate(logprob, old_logprob, ref_logprob)
    return (loss * weight).sum()


def chunk_logprobs(hidden, output_weight, targets, temperature):
    """Compute log π of targets (K,), float32, from hidden states (K, D) and weight (V, D)."""
    logits = F.linear(hidden, output_weight).float() / temperature            # (K, V)
    return -F.cross_entropy(logits, targets, reduction="none")


def token_logprobs(hidden, output_weight, targets, mask, temperature=1.0, chunk_size=1024):
    """Compute log π of the targets where mask is True, 0 elsewhere; (R, L), like targets and mask.

    hidden (R, L, D) are the last hidden states of the model, output_weight (V, D) gives the logits.
    For a model of transformers these are model.base_model(inputs).last_hidden_state and
    model.get_output_embeddings().weight, unless it caps, scales or shifts its logits; rows padded
    at the end need no attention mask.

    This equals (logits / temperature).log_softmax(-1).gather(-1, targets), but the logits are
    computed in chunks of tokens, and again in the backward pass: those of all tokens, (K, V), would
    be the largest tensor by far.
    """
    hidden, output_weight = hidden[mask], output_weight.to(hidden.dtype)      # (K, D), (V, D)
    chunks = zip(hidden.split(chunk_size), targets[mask].split(chunk_size))
    logprobs = [checkpoint(chunk_logprobs, hidden_chunk, output_weight, target_chunk, temperature,
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


class Completion(NamedTuple):
    """A sampled completion of a prompt."""

    prompt: list  # token ids
    tokens: list  # token ids, the stop token included
    logprobs: list  # log π of each token, as the sampler computed it; for metrics only
    finished: bool  # False if it was cut at C tokens


def generate(sampler, tokenizer, examples, args, greedy=False):
    """Sample G completions of each example's prompt, or return one greedy completion of each."""
    G, temperature = (1, 0.0) if greedy else (args.num_generations, args.temperature)
    prompts = [encode_prompt(example["prompt"], tokenizer) for example in examples]
    completions, size = [], max(args.sampling_batch_size // G, 1)
    for start in range(0, len(prompts), size):
        completions += sample(sampler, prompts[start:start + size], G, args.max_completion_length,
                              temperature, tokenizer.stop_ids)
    return completions


class Batch(NamedTuple):
    """R rows of prompt and completion: those to learn from first, longer before shorter ones."""

    inputs: torch.Tensor  # (R, L) token ids
    targets: torch.Tensor  # (R, L): the tokens that follow
    mask: torch.Tensor  # (R, L): True at targets to learn from
    sampled_logprob: torch.Tensor  # (R, L): log π of the completion's tokens when sampled, else 0
    advantage: torch.Tensor  # (R,)
    micro_batches: list  # pairs of slices: of rows, and of columns that are not all padding


def generate_batch(sampler, tokenizer, examples, reward, args):
    """Sample and reward G completions of each example's prompt. Returns a Batch and metrics."""
    G = args.num_generations
    completions = generate(sampler, tokenizer, examples, args)
    rewards = torch.tensor([float(reward(completion_text(completion, tokenizer), examples[i // G]))
                            for i, completion in enumerate(completions)]).view(-1, G)  # (B, G)
    advantage = group_advantage(rewards, args.scale_rewards).flatten()            # (R,)
    equal_rewards = (rewards == rewards[:, :1]).all(1).repeat_interleave(G)       # (R,)  [C4]
    finished = torch.tensor([completion.finished for completion in completions])
    trained = ~equal_rewards
    if args.mask_truncated_completions:
        trained &= finished
    batch = make_batch(completions, advantage, trained, args)
    logprobs = torch.tensor([x for completion in completions for x in completion.logprobs])
    metrics = {"reward": rewards.mean(), "equal_groups": equal_rewards.float().mean(),
               "truncated": 1 - finished.float().mean(),
               "length": torch.tensor(len(logprobs) / len(completions)),
               "entropy": -logprobs.mean()}  # an estimate, from the sampled tokens
    return batch, {name: all_gather(mean.view(1)).mean() for name, mean in metrics.items()}


def update(model, reference, optimizer, batch, args):
    """Take --num-iterations gradient steps on the batch. Returns metrics."""
    num_rows = all_reduce_sum(batch.mask.any(1).sum())  # with something to learn from
    num_tokens = all_reduce_sum(batch.mask.sum())
    weight = token_weight(batch.mask, args.loss_type, num_rows, num_tokens,
                          args.max_completion_length)                             # (R, L)
    logprobs = torch.zeros_like(weight)      # log π of each token
    old_logprobs = torch.zeros_like(weight)  # log π_old
    ref_logprobs = torch.zeros_like(weight)  # log π_ref
    mean_loss = torch.zeros((), device=weight.device)  # over the iterations
    for iteration in range(args.num_iterations):
        optimizer.zero_grad()
        for rows, columns in batch.micro_batches:  # slices of the tensors (R, L)
            part = rows, columns
            inputs, targets, mask = batch.inputs[part], batch.targets[part], batch.mask[part]
            hidden = model(inputs)  # first, as only then FSDP has the whole output weight
            logprob = token_logprobs(hidden, model.output_weight(), targets, mask, args.temperature)
            logprobs[part] = logprob.detach()
            if iteration == 0:  # π is still π_old, so that needs no forward pass of its own [C2]
                old_logprobs[part] = logprob.detach()
            if iteration == 0 and reference:  # its parameters are frozen, so no_grad is not needed
                ref_logprobs[part] = token_logprobs(
                    reference(inputs), reference.output_weight(), targets, mask, args.temperature)
            loss = grpo_loss(logprob, old_logprobs[part], ref_logprobs[part],
                             batch.advantage[rows], mask, weight[part], loss_type=args.loss_type,
                             level=args.importance_sampling_level, epsilon=args.epsilon,
                             epsilon_high=args.epsilon_high, beta=args.beta)
            set_gradient_sync(model, is_last=part == batch.micro_batches[-1])
            loss.backward()
            mean_loss += loss.detach() / args.num_iterations
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm,
                                             error_if_nonfinite=True)
        optimizer.step()
    metrics = update_metrics(batch, logprobs, old_logprobs, num_tokens, args)
    return {"loss": all_reduce_sum(mean_loss), "grad_norm": full_tensor(grad_norm)} | metrics


def train(args, reward=None):
    """Train a model. Return it and the score: its mean reward on held-out prompts, greedy.

    reward: a function of a completion (text) and its example (dict); default: default_reward.
    """
    device = setup(args)
    reward = reward or (default_reward if args.model else exact_match)
    config, weights, tokenizer = load_model(args) if args.model else pretrain(args, device)
    sample_example, heldout = load_examples(args, tokenizer, config, reward)
    eval_every = plan_evaluations(len(heldout), args)
    model = make_model(config, weights, device, args)
    reference = make_reference(model, weights, device, args) if args.beta else None
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(params, args.learning_rate, weight_decay=0.0, fused=True)
    pretrained = None if args.model else weights  # for checkpoints; a --model can be read again
    del weights
    with Logger(args, model, optimizer, pretrained) as log:  # --resume: loads model and optimizer
        sampler = make_sampler(model, args)
        log.score, transcripts = evaluate(sampler, tokenizer, heldout, reward, args)
        print_evaluation(log.step, log.score, transcripts)
        while not log.stopped() and log.step < args.max_steps:
            start = time.perf_counter()
            warmup = min((log.step + 1) / max(args.warmup_ratio * args.max_steps, 1), 1)
            optimizer.param_groups[0]["lr"] = args.learning_rate * warmup
            rng = random.Random(f"{args.seed} {log.step}")  # the same in all processes
            examples = [sample_example(rng) for _ in range(args.batch_size)]      # [C8]
            torch.manual_seed(rng.randrange(2**31) + get_rank())  # each process samples its own
            batch, metrics = generate_batch(sampler, tokenizer, local_rows(examples), reward, args)
            sampled_at = time.perf_counter()
            metrics |= update(model, reference, optimizer, batch, args)
            update_sampler(sampler, model)
            metrics |= tokens_per_second(metrics, start, sampled_at, args)
            log.step += 1
            if log.step % eval_every == 0 or log.step == args.max_steps:
                log.score, transcripts = evaluate(sampler, tokenizer, heldout, reward, args)
                log.write_transcripts(transcripts)
            log.write(**metrics)
    if args.model:  # Ctrl-C does not get here: Logger.__exit__ raises SystemExit
        save_model(log.dir / "model", model, tokenizer)
    print_evaluation(log.step, log.score, transcripts)
    end_processes()
    return model, log.score


# --- The algorithm ends here. Below: batches, sampling, decoder, data, reward, flags, logging. ---


# --- Micro-batches and metrics ---


def make_batch(completions, advantage, trained, args):
    """Pad R completions to a Batch; trained (R,) says which to learn from, advantage is (R,)."""
    lengths = [len(completion.prompt) + len(completion.tokens) for completion in completions]
    # Rows to learn from come first, so that the others can be left out. Longer rows come before
    # shorter ones, so that a micro-batch needs little padding.
    order = sorted(range(len(lengths)), key=lambda i: (not trained[i], -lengths[i]))
    rows, device = [completions[i] for i in order], args.device
    inputs, targets, completion_mask = pad_batch([(row.prompt, row.tokens) for row in rows], device)
    sampled_logprob = pad_sequence(
        [torch.tensor([0.0] * len(row.prompt) + row.logprobs) for row in rows], batch_first=True)
    mask = completion_mask & trained[order].unsqueeze(1).to(device)
    # FSDP: each process must run the same number of micro-batches. Those with fewer rows to learn
    # from also run some of the other rows, whose mask is empty.
    max_rows = int(all_gather(trained.sum().view(1)).max())
    micro_batches = []
    for start in range(0, max_rows, args.micro_batch_size):
        stop = min(start + args.micro_batch_size, max_rows)
        # Its first row is the longest to learn from. Columns beyond it are left out.
        num_columns = lengths[order[start]] - 1
        micro_batches.append((slice(start, stop), slice(0, num_columns)))
    return Batch(inputs, targets, mask, sampled_logprob[:, 1:].to(device),
                 advantage[order].to(device), micro_batches)


def update_metrics(batch, logprobs, old_logprobs, num_tokens, args):
    """Compute means over the tokens to learn from; NaN if there are none.

    approx_kl (of π_old and π) and clip_fraction (the share of ratios outside the clip range) are
    those before the last step, so with one update per batch they are 0. sampler_gap is the
    difference between log π_old of the trainer and log π of the sampler: rounding error, unless
    something is wrong.
    """
    log_ratio = logprobs - old_logprobs
    ratio = importance_ratio(logprobs, old_logprobs, batch.mask, args.importance_sampling_level)
    outside = ratio > 1 + args.epsilon_high
    if args.loss_type != "cispo":  # which has no lower bound
        outside |= ratio < 1 - args.epsilon
    gap = (old_logprobs - batch.sampled_logprob).abs() * batch.mask
    values = {"approx_kl": log_ratio.exp() - 1 - log_ratio, "clip_fraction": outside * batch.mask,
              "sampler_gap_mean": gap}
    metrics = {name: all_reduce_sum(value.sum()) / num_tokens for name, value in values.items()}
    return metrics | {"sampler_gap_max": all_gather(gap.max().view(1)).max(),
                      "trained_tokens": num_tokens}


def tokens_per_second(metrics, start, sampled_at, args):
    """Return the speed of sampling and of the update, which begin at these times."""
    num_sampled = metrics["length"] * args.batch_size * args.num_generations
    num_trained = metrics["trained_tokens"] * args.num_iterations
    return {"sample_tokens_per_second": num_sampled / (sampled_at - start),
            "update_tokens_per_second": num_trained / (time.perf_counter() - sampled_at)}


# --- Sampling ---


@torch.no_grad()
def sample(model, prompts, num_generations, max_completion_length, temperature, stop_ids):
    """Sample G completions of each prompt, a list of token ids; temperature 0 is greedy.

    Returns a list of B G Completions; those of a prompt are next to each other.
    """
    device = model.output_weight().device
    stop_ids = torch.tensor(stop_ids, device=device)
    prompt_length = torch.tensor([len(prompt) for prompt in prompts], device=device)
    prompt_tokens = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)
    cache = Cache(model, prompt_length, prompt_tokens.shape[1] + max_completion_length)
    hidden = model(prompt_tokens.to(device), cache)
    # Each prompt is computed once. Its completions start from copies of its last hidden state.
    prompt_of_row = torch.arange(len(prompts), device=device).repeat_interleave(num_generations)
    hidden = hidden[prompt_of_row, prompt_length[prompt_of_row] - 1]              # (R, D)
    cache.select(prompt_of_row)

    num_rows = len(prompt_of_row)
    tokens = torch.zeros(num_rows, max_completion_length, dtype=torch.long, device=device)
    logprobs = torch.zeros(num_rows, max_completion_length, device=device)
    finished = torch.zeros(num_rows, dtype=torch.bool, device=device)
    active = torch.arange(num_rows, device=device)  # rows that are still computed
    for t in range(max_completion_length):
        logits = F.linear(hidden, model.output_weight()).float()
        logprob = (logits / (temperature or 1.0)).log_softmax(-1)                 # [C7]
        token = choose_token(logprob, temperature)
        tokens[active, t] = token
        logprobs[active, t] = logprob.gather(1, token.unsqueeze(1)).squeeze(1)
        finished[active] |= torch.isin(token, stop_ids)
        if t % 16 == 15 and finished[active].any():  # seldom, as this waits for the GPU
            keep = (~finished[active]).nonzero().squeeze(1)
            active, token = active[keep], token[keep]
            cache.select(keep)
        if t + 1 == max_completion_length or len(active) == 0:
            break
        hidden = model(token.unsqueeze(1), cache)[:, 0]
    # Cut off what follows the first stop token, which argmax finds. There may be some tokens, as
    # finished rows are dropped only every 16 tokens.
    first_stop = torch.isin(tokens, stop_ids).int().argmax(1)
    length = torch.where(finished, first_stop + 1, max_completion_length)
    rows = zip(*(x.tolist() for x in (prompt_of_row, tokens, logprobs, length, finished)))
    return [Completion(prompts[i], row[:n], logprob[:n], done)
            for i, row, logprob, n, done in rows]


def completion_text(completion, tokenizer):
    """Return the text of a Completion, without the stop token."""
    return tokenizer.decode(completion.tokens[:-1] if completion.finished else completion.tokens)


def choose_token(logprob, temperature):
    """Draw a token for each row, (R,), from logprob (R, V)."""
    if temperature == 0:
        return logprob.argmax(-1)
    # The first token at which the cumulative probability reaches a uniform random number. On CPUs
    # torch.multinomial is slower, as it draws a random number for each of the V tokens.
    cumulative = logprob.exp().cumsum(-1)                                         # (R, V)
    uniform = 1 - torch.rand_like(cumulative[:, :1])  # above 0
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:]).squeeze(1)


class Cache:
    """Keys and values of all layers while completions are generated.

    The first columns belong to the right-padded prompts, the next ones to the completions. Padding
    is masked and does not count in positions. length (R,): tokens of each prompt. num_columns:
    columns to reserve.
    """

    def __init__(self, model, length, num_columns):
        config = model.config
        self.keys = torch.zeros(
            config["num_hidden_layers"], len(length), config["num_key_value_heads"], num_columns,
            config["head_dim"], device=length.device, dtype=model.output_weight().dtype)
        self.values = torch.zeros_like(self.keys)
        self.prompt_length = length
        self.num_prompt_columns = int(length.max())
        self.used = 0  # number of filled columns

    def select(self, rows):
        """Keep these rows (R',), in this order; a row may occur several times."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.prompt_length = self.prompt_length[rows]

    def attend(self, layer, q, k, v):
        """Store k and v (R, heads, L, E) and return the attention of q to all that is stored."""
        start, end = self.used, self.used + k.shape[2]
        self.keys[layer, :, :, start:end] = k
        self.values[layer, :, :, start:end] = v
        if start == 0:  # prompts
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        # One token per row. The query heads that share keys become one head with several queries:
        # on CUDA enable_gqa with a mask would take a slow kernel.
        if layer == 0:  # all layers use the same mask
            column, length = torch.arange(end, device=k.device), self.prompt_length.unsqueeze(1)
            self.visible = (column < length) | (column >= self.num_prompt_columns)    # (R, S)
        y = F.scaled_dot_product_attention(
            q.reshape(len(q), k.shape[1], -1, q.shape[3]), self.keys[layer, :, :, :end],
            self.values[layer, :, :, :end], self.visible[:, None, None])
        return y.reshape(q.shape)


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

    def __init__(self, config, layer, rank):
        super().__init__()
        width, self.head_dim, self.layer = config["hidden_size"], config["head_dim"], layer
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

    def forward(self, x, cos, sin, cache=None):
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))           # (R, heads, L, E)
        qk = torch.cat([self.q_norm(q.float()), self.k_norm(k.float())], 1)  # fewer kernels
        left, right = qk.chunk(2, -1)  # rotate the halves; cos and sin are (1 or R, 1, L, E/2)
        qk = torch.cat([left * cos - right * sin, right * cos + left * sin], -1).to(v.dtype)
        q, k = qk.split([q.shape[1], k.shape[1]], 1)
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            y = cache.attend(self.layer, q, k, v)
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

    def __init__(self, config, layer, rank):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.self_attn = Attention(config, layer, rank)
        self.post_attention_layernorm = nn.RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.mlp = MLP(config, rank)

    def forward(self, x, cos, sin, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
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
            Block(config, layer, rank) for layer in range(config["num_hidden_layers"]))
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

    def forward(self, tokens, cache=None):
        """Compute the last hidden states (R, L, D) of right-padded rows of tokens (R, L).

        With a cache, the first call takes the prompts, each later one the next token of each row.
        """
        position = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        if cache and cache.used:  # the next token: tokens of the prompt and the completion so far
            position = (cache.prompt_length + cache.used - cache.num_prompt_columns).unsqueeze(1)
        frequency = frequencies(self.config, tokens.device)
        angle = position[:, None, :, None] * frequency                            # (., 1, L, E/2)
        cos, sin = angle.cos(), angle.sin()
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.bf16):
            x = self.model.embed_tokens(tokens).float()
            for block in self.model.layers:
                x = (checkpoint(block, x, cos, sin, use_reentrant=False)
                     if self.checkpointing and not cache else block(x, cos, sin, cache))
            x = self.model.norm(x)
        if cache:
            cache.used += tokens.shape[1]
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


def make_model(config, weights, device, args, is_reference=False):
    """Make a Decoder with these weights (name -> tensor), sharded if there are several processes.

    The weights of files are memory-mapped. Each block becomes float32 just before it is sharded, so
    that no process ever holds all of a sharded model.
    """
    with torch.device("meta"):
        rank = 0 if is_reference else args.lora_rank
        model = Decoder(config, rank, args.bf16, args.gradient_checkpointing)
    if is_reference:
        model.requires_grad_(False)
    elif not (args.lora_rank or dist.is_initialized()):  # copied, as the optimizer writes into them
        weights = {name: weight.to(device, torch.float32, copy=True)
                   for name, weight in weights.items()}
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


def make_reference(model, weights, device, args):
    """Make the policy π_ref, which has the initial weights and is not trained."""
    if args.lora_rank and not dist.is_initialized():  # share those that LoRA does not train
        weights = dict(model.named_parameters())
    return make_model(model.config, weights, device, args, is_reference=True)


def set_gradient_sync(model, is_last):
    """Let the next backward pass add up the gradients of all processes, if it is the last one.

    Until then each process adds up its own.
    """
    if dist.is_initialized():
        model.set_requires_gradient_sync(is_last)


def make_sampler(model, args):
    """Return the model that generates: the model itself or, where needed, a copy of it.

    Generating with a sharded model is slow, and with float32 weights slower than with bfloat16. A
    compiled model would be compiled again as the cache grows.
    """
    if not (args.bf16 or args.compile or dist.is_initialized()):
        return model
    with torch.device("meta"):
        sampler = Decoder(model.config, args.lora_rank, args.bf16)
    weights = {}
    for name, param in model.named_parameters():
        dtype = torch.bfloat16 if args.bf16 and "norm" not in name else torch.float32
        weights[name] = full_tensor(param).to(dtype, copy=True)
    sampler.load_state_dict(weights, assign=True)
    return sampler


@torch.no_grad()
def update_sampler(sampler, model):
    """Copy the weights that are trained to the sampler."""
    if sampler is not model:
        for copy, param in zip(sampler.parameters(), model.parameters()):
            if param.requires_grad:
                copy.copy_(full_tensor(param))


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


def encode_prompt(prompt, tokenizer):
    """Return the token ids of a text, or of chat messages through the chat template.

    If the last message is the assistant's, the model continues it.
    """
    check_part("prompt", prompt)
    if isinstance(prompt, str):
        return tokenizer.encode(prompt, add_special_tokens=True)
    if prompt[-1]["role"] != "assistant":
        return tokenizer.encode(tokenizer.render(prompt, add_generation_prompt=True))
    last = prompt[-1] | {"content": prompt[-1]["content"] + "<end of message> "}
    text, mark, rest = tokenizer.render([*prompt[:-1], last], False).rpartition("<end of message>")
    if not mark:
        raise ValueError("the last message cannot be continued: the chat template changes it")
    # If the space after the mark is gone, the template strips messages.
    return tokenizer.encode(text if rest.startswith(" ") else text.rstrip())


def load_examples(args, tokenizer, config, reward):
    """Return a function that draws an example to learn from, and the held-out examples.

    An example is a row of --data. No prompt is in both parts.
    """
    context = config["max_position_embeddings"]
    room = min(args.max_length, context) - args.max_completion_length
    if room < 1:
        raise SystemExit(f"--max-completion-length {args.max_completion_length}: no room for a "
                         f"prompt in --max-length {args.max_length} or a context of {context}")
    if not args.data:
        rng = random.Random("held out")
        return addition, [addition(rng, held_out=True) for _ in range(args.eval_prompts)]

    def check(row):
        if reward is default_reward:
            check_answer(row.get("answer"), tokenizer, args.max_completion_length)
        length = len(encode_prompt(row.get("prompt"), tokenizer))
        if length == 0:
            raise ValueError("`prompt` has no tokens")
        return row if length <= room else None

    # split_hash is random, but equal for equal prompts. Sorted by it, held-out rows come first.
    rows = sorted(read_rows(args.data, check, args.skip_bad_rows),
                  key=lambda row: split_hash(row["prompt"]))
    num_heldout = max(min(args.eval_prompts, len(rows) // 10), 1)
    # Equal prompts stay together.
    limit = max((split_hash(row["prompt"]) for row in rows[:num_heldout]), default=0.0)
    heldout = [row for row in rows if split_hash(row["prompt"]) <= limit]
    train_rows = rows[len(heldout):]
    if not train_rows:
        raise SystemExit(f"--data {args.data}: needs two different prompts, as one is held out")
    if get_rank() == 0:
        print(f"{len(train_rows)} prompts to learn from, {len(heldout)} held out")
        prompt = encode_prompt(train_rows[0]["prompt"], tokenizer)
        print(f"A prompt as the model sees it:\n{tokenizer.decode(prompt, False)}")
    return lambda rng: rng.choice(train_rows), heldout


def check_answer(answer, tokenizer, max_completion_length):
    """Raise ValueError unless a completion can contain the answer that default_reward looks for."""
    if not isinstance(answer, (str, int, float)):
        raise ValueError("`answer` must be a text or a number; another reward may do without it")
    length = len(tokenizer.encode(final_answer(str(answer))[0]))
    if not 0 < length <= max_completion_length:
        raise ValueError(f"`answer` has {length} tokens; 1 to {max_completion_length} are possible")


def plan_evaluations(num_heldout, args):
    """Return the number of batches between evaluations, and print what is planned."""
    # A batch takes about 2.5 times as long as generating its completions. For 10 % of the time:
    # num_heldout = 0.1 * 2.5 * eval_every * batch_size * num_generations
    eval_every = args.eval_every or math.ceil(
        num_heldout / (0.1 * 2.5 * args.batch_size * args.num_generations))
    if get_rank() == 0:
        print(f"{args.max_steps} batches of {args.batch_size} prompts, an evaluation on "
              f"{num_heldout} held-out prompts every {eval_every} batches")
    return eval_every


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


# --- The reward ---


def default_reward(completion, example):
    """Return 1.0 if the final answer of a completion, a text, is example["answer"], else 0.0.

    The final answer is the content of the last \\boxed{}, else the line after the last ####; it
    must be the answer, or contain one number with its value, as in "x = 5 km", but no formula. Else
    the last number counts.
    """
    gold, _ = final_answer(str(example["answer"]))
    answer, is_marked = final_answer(completion)
    numbers = NUMBER.findall(answer)
    is_formula = is_marked and (len(numbers) > 1 or FORMULA.search(answer))
    if parse_number(gold) is None or not numbers or is_formula:
        return float(answer == gold)
    return float(parse_number(numbers[-1]) == parse_number(gold))


def exact_match(completion, example):
    """Return 1.0 if the completion is the answer, else 0.0: the reward of the tiny GPT."""
    return float(completion == example["answer"])


NUMBER = re.compile(r"(?:(?<![A-Za-z0-9)])-)?"  # a minus, but not that of 10-5
                    r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:[.][0-9]+)?"  # 1,000.50
                    r"|[0-9]*[.][0-9]+|[0-9]+)(?:/[0-9]+)?")  # .5, 18, 5/2
# Signs of a formula: those in \sqrt{2}, x^2, H_2O, x > 5; x5, x - 5; 5x, 5 - x.
FORMULA = re.compile(r"[\\^_{}<>]|\b[A-Za-z] ?[-+*/]? ?[0-9]|[0-9](?: ?[-+*/] ?)?[A-Za-z]\b")


def final_answer(text):
    """Return the marked answer in a text, see default_reward, and True; or the text and False."""
    text = re.sub(r"\\?[$%]|\^\{?\\circ\}?", "", text)  # $, % and degrees do not count
    text = re.sub("[\u2212\u2013]", "-", text).replace("{,}", ",").replace(",\\!", ",")  # 1{,}000
    text = re.sub(r"\\text\{([^{}]*)\}", r" \1", text)
    text = re.sub(r"(?<!\d)\\[dt]?frac\{(-?[0-9]+)\}\{([0-9]+)\}", r"\1/\2", text)
    boxed, open_braces = None, []  # where the content of each open brace begins
    for match in re.finditer(r"\\boxed\{|[{}]", text):
        if match[0] != "}":
            open_braces.append((match[0], match.end()))
        elif open_braces:
            brace, start = open_braces.pop()
            boxed = text[start:match.start()] if brace != "{" else boxed
    if boxed is not None:
        return boxed.strip(), True
    if "####" in text:
        return text.rpartition("####")[2].strip().partition("\n")[0].strip(), True
    return text.strip(), False


def parse_number(text):
    """Return the value of a number, such as -1,000.50 or 5/2, as a Fraction; None if it is none."""
    try:
        is_number = len(text) <= 30 and NUMBER.fullmatch(text)
        return Fraction(text.replace(",", "")) if is_number else None
    except (ValueError, ZeroDivisionError):  # such as 1.5/2 and 5/0
        return None


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

    Returns the same as load_model. A resumed run takes the weights from the checkpoint.
    """
    tokenizer = Characters()
    config = read_config(tiny_config(len(tokenizer.symbols)), "tiny")
    if args.resume:
        return config, load_checkpoint(args.resume)["pretrained"], tokenizer
    model = Decoder(config).to(device)
    for param in model.parameters():
        if param.dim() == 2:
            nn.init.normal_(param, std=0.1)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.95), fused=True)
    rng = random.Random(f"pretrain {args.seed}")
    num_steps = args.pretrain_steps
    for step in tqdm(range(num_steps), "pretraining", leave=False, disable=get_rank() > 0 or None):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 30, 3 * (1 - step / num_steps))
        examples = [addition(rng) for _ in range(256)]
        rows = [(tokenizer.encode(example["prompt"]),
                 tokenizer.encode(example["pretrain_answer"]) + tokenizer.stop_ids)
                for example in examples]
        inputs, targets, mask = pad_batch(rows, device)
        logprob = token_logprobs(model(inputs), model.output_weight(), targets, mask)
        loss = -logprob.sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return config, model.state_dict(), tokenizer


# --- Flags and processes ---


PRESETS = {  # the rows of table [C1], as differences from Args
    "default": {},
    "grpo": {"scale_rewards": "group", "loss_type": "grpo", "epsilon_high": 0.2, "beta": 0.04},
    "dr_grpo": {"loss_type": "dr_grpo", "epsilon_high": 0.2},
    "dapo": {"scale_rewards": "group"},
    "gspo": {"scale_rewards": "group", "loss_type": "grpo", "epsilon": 3e-4, "epsilon_high": 4e-4,
             "importance_sampling_level": "sequence"},
    "cispo": {"scale_rewards": "group", "loss_type": "cispo", "epsilon_high": 4.0},
    "rloo": {"scale_rewards": "leave-one-out", "loss_type": "dr_grpo", "epsilon_high": 0.2},
}


def default_args(model="", preset="default", lora_rank=0, **overrides):
    """Return the flags for the tiny GPT or for a --model, and for a row of table [C1]."""
    if preset not in PRESETS:
        raise SystemExit(f"--preset {preset}: must be one of {', '.join(PRESETS)}")
    values = {"model": model, "preset": preset, "lora_rank": lora_rank} | PRESETS[preset]
    if model:
        is_cuda = torch.device(overrides.get("device", Args.device)).type == "cuda"
        bf16 = is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        values |= {"batch_size": 32, "max_completion_length": 256, "bf16": bf16,
                   "micro_batch_size": 8 if bf16 else 4, "warmup_ratio": 0.1, "eval_every": 0,
                   "learning_rate": 1e-4 if lora_rank else 2e-6}
    return Args(**values | overrides)


def parse_args():
    """Parse the command line; the defaults depend on some flags, or on the run to continue."""
    # A first pass finds these flags; --help is left to the second pass.
    first = tyro.cli(Args, args=[arg for arg in sys.argv[1:] if arg not in ("-h", "--help")])
    if not first.resume:
        return tyro.cli(Args, default=default_args(
            first.model, first.preset, first.lora_rank, device=first.device))
    try:
        saved = Args(**load_checkpoint(first.resume)["args"])
    except Exception as error:  # a missing or damaged file, or another script's
        raise SystemExit(f"{first.resume}: not a run of this script: {error!r:.150}") from error
    args = tyro.cli(Args, default=saved)
    if (args.model, args.preset, args.lora_rank) != (saved.model, saved.preset, saved.lora_rank):
        raise SystemExit(f"--resume {first.resume}: --model, --preset, --lora-rank cannot change")
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
    lowest = min(args.num_iterations, args.eval_prompts, args.temperature)
    if lowest <= 0 or args.num_generations < 2:
        raise SystemExit("--num-generations must be at least 2, --temperature, --num-iterations "
                         "and --eval-prompts above 0")
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


def all_reduce_sum(tensor):
    """Return the sum of the tensors of all processes."""
    return all_gather(tensor.unsqueeze(0)).sum(0).to(tensor.device)


def local_rows(rows):
    """Return this process's share of rows that are the same in all processes."""
    return rows[dist.get_rank()::dist.get_world_size()] if dist.is_initialized() else rows


# --- Evaluation and logging ---


def evaluate(sampler, tokenizer, examples, reward, args):
    """Return the mean reward of a greedy completion of each example, and some of them (dicts)."""
    examples = local_rows(examples)
    completions = generate(sampler, tokenizer, examples, args, greedy=True)
    texts = [completion_text(completion, tokenizer) for completion in completions]
    rewards = [float(reward(text, example)) for text, example in zip(texts, examples)]
    transcripts = [{"prompt": example["prompt"], "completion": text, "reward": value}
                   for example, text, value in zip(examples, texts, rewards)]
    return all_gather(torch.tensor(rewards)).mean().item(), transcripts[:3]


def print_evaluation(step, mean_reward, transcripts):
    """Print the result of evaluate."""
    if get_rank() == 0:
        print(f"after {step} batches: mean reward {mean_reward:.3f} on held-out prompts (greedy)")
        for transcript in transcripts:
            print(f"  {transcript['prompt']!r}: {transcript['completion']!r:.300}")
        if mean_reward == 0:
            print("Warning: all rewards are 0. GRPO learns only from prompts whose completions "
                  "differ in reward.")


def load_checkpoint(folder):
    """Load what Logger.save wrote; weights_only, so that the file cannot run code."""
    return torch.load(Path(folder) / "checkpoint.pt", "cpu", weights_only=True, mmap=True)


# The attributes of Logger that a checkpoint keeps, as they are at the start.
PROGRESS = {"step": 0, "seconds": 0.0, "score": math.nan, "csv_size": 0, "wandb_id": None}


class Logger:
    """Writes the run's folder (args.json, metrics.csv, transcripts.jsonl, checkpoint.pt), the
    progress bar and wandb.

    With --resume it loads the model, the optimizer and the progress. pretrained: the weights before
    GRPO, for the checkpoint.
    """

    def __init__(self, args, model, optimizer, pretrained):
        self.args, self.model, self.optimizer, self.pretrained = args, model, optimizer, pretrained
        self.wandb, self.interrupted = None, False
        vars(self).update(PROGRESS)
        name = f"{Path(__file__).stem}-{Path(args.data).stem or 'addition'}-{args.seed}"
        name += f"-{datetime.now():%Y%m%d-%H%M%S-%f}"  # process 0 decides
        self.dir = Path(args.resume or args.run_dir or f"runs/{all_gather_object(name)[0]}")
        if args.resume:
            self.load()
        self.start, self.saved_at = time.perf_counter() - self.seconds, time.perf_counter()
        self.bar = tqdm(total=args.max_steps, initial=self.step, unit=" batches",
                        disable=get_rank() > 0 or None)
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

    def interrupt(self, *_):
        """Stop after this batch, at Ctrl-C; a second Ctrl-C stops at once."""
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def stopped(self):
        """Whether --stop-at is reached, or Ctrl-C was pressed in any process; the same in all."""
        reached = self.args.stop_at is not None and self.score >= self.args.stop_at
        return any(all_gather_object(self.interrupted)) or reached

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

    def write_transcripts(self, transcripts):
        """Add some completions of an evaluation to transcripts.jsonl."""
        if get_rank() == 0:
            with (self.dir / "transcripts.jsonl").open("a", encoding="utf-8") as file:
                for transcript in transcripts:
                    row = {"step": self.step} | transcript
                    print(json.dumps(row, ensure_ascii=False), file=file)

    def save(self):
        """Write checkpoint.pt: what is trained, and the tiny GPT's weights before GRPO.

        All processes must take part, as the weights may be sharded.
        """
        options = dcp.StateDictOptions(
            full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        # Before the first step the optimizer has no state, and dcp would take a step to create it.
        optimizers = [self.optimizer] if self.optimizer.state else []
        weights, optimizer = dcp.get_state_dict(self.model, optimizers, options=options)
        state = {"args": asdict(self.args), "model": weights, "optimizer": optimizer,
                 "progress": {name: getattr(self, name) for name in PROGRESS},
                 "pretrained": self.pretrained}
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
        # After an error in one process, the others are still in a batch, and saving needs them all.
        # With several updates per batch, some may be done.
        is_whole = not dist.is_initialized() and self.args.num_iterations == 1
        if kind is None or (issubclass(kind, Exception) and is_whole):
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
