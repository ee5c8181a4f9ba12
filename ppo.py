# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "gymnasium==1.4.0", "tyro==1.0.17", "wandb==0.31.0", "tqdm==4.70.1",
# ]
# ///
"""PPO: several gradient steps on one batch, but nothing to gain from moving the policy too far.

N environments play T steps with the policy π_old. A learned value V tells of each action how much
better it did than expected: its advantage Â. Then π goes through the batch several times; once it
has made an action more (or less) probable than π_old did by a ratio r beyond 1 ± ε, it gains no
more. Numbers of Schulman et al., Proximal Policy Optimization Algorithms (2017), arXiv 1707.06347:

    r_t(θ) = π(a_t|s_t) / π_old(a_t|s_t)                                 (6)
    L_clip(θ) = mean of min(r Â, clip(r, 1−ε, 1+ε) Â)                    (7)
    L(θ) = L_clip − c_1 (V(s) − V_target)² + c_2 entropy of π            (9)
    Â_t = δ_t + γλ δ_{t+1} + (γλ)² δ_{t+2} + ...                         (11)
    δ_t = reward_t + γ V(s_{t+1}) − V(s_t)                               (12)

[C1] V of a terminal state is 0, at a time limit that of the true last observation; both end (11).
[C2] A step that only resets its environment is no transition: its row is dropped from everything.
[C3] V_target = Â + the V from before the update. --clip-vloss keeps V near that (rarely a help).
[C4] Advantages get mean 0 and standard deviation 1 over the whole batch.
[C5] The step size, with --anneal-clip also ε, falls linearly to 0. Adam's epsilon is 1e-5. The
     gradient of all parameters together is shortened to --max-grad-norm.
[C6] The KL reported is the mean of r − 1 − log r (http://joschu.net/blog/kl-approx.html). Past 1.5
     times --target-kl the update ends before its next step.
[C7] Orthogonal weights, gain √2, last layers 0.01 (π) and 1 (V). Vectors: a network each for π and
     V; images: one CNN for both. A Gaussian has one log-std for all states, starting at --log-std.
[C8] --norm-obs: (obs − mean) / std over all batches before this one; --norm-reward: rewards / std
     of their running discounted sums; both clipped to ±10. --clip-reward: the sign of rewards.
[C9] Box actions are clipped for the environment alone; what is learned from is the action drawn.
[C10] Under torchrun each process has N / processes environments; gradients are averaged.

T steps, N environments, M rows of a minibatch, A numbers in an action, O in an observation.
    python ppo.py --env-id CartPole-v1
"""

import contextlib
import dataclasses
import importlib
import json
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import tyro
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from torch import nn
from tqdm import tqdm


@dataclasses.dataclass(frozen=True)
class Args:
    env_id: str = "CartPole-v1"  # any registered environment; "module:Env-v0" imports module first
    seed: int = 1  # of the weights, the actions and the environments
    total_timesteps: int | None = None  # environment steps in all; None here and below: see PRESETS
    learning_rate: float | None = None  # Adam's step size at the start
    anneal_lr: bool = True  # let it fall linearly to 0 [C5]
    num_envs: int | None = None  # N: environments stepped together, in all processes
    num_steps: int | None = None  # T: steps of each environment per batch
    gamma: float | None = None  # discount factor γ
    gae_lambda: float = 0.95  # λ: 0 trusts V after one step, 1 sums up rewards to the end
    num_minibatches: int | None = None  # parts into which each epoch cuts the batch
    update_epochs: int | None = None  # passes through the batch
    clip_coef: float | None = None  # ε of the clipped objective
    anneal_clip: bool = False  # let ε fall linearly to 0 [C5]
    clip_vloss: bool = False  # clip the value's change, too [C3]
    ent_coef: float | None = None  # c_2, weight of the entropy
    vf_coef: float = 0.5  # c_1, weight of the value's squared error
    max_grad_norm: float = 0.5  # longest gradient [C5]
    target_kl: float | None = None  # end an update early when the policy has moved too far [C6]
    log_std: float = -1.0  # log standard deviation of Box actions at the start [C7]
    norm_obs: bool | None = None  # normalise observations [C8]
    norm_reward: bool | None = None  # scale rewards [C8]
    clip_reward: bool | None = None  # learn from the sign of rewards [C8]
    vectorization: Literal["auto", "sync", "async"] = "auto"  # auto: gymnasium's native, else sync
    compile: bool = False  # torch.compile for policy and loss, with CUDA graphs on a GPU
    bf16: bool = False  # bfloat16 in the CNN
    eval_episodes: int = 0  # episodes of the most probable actions to play after training
    eval_only: str = ""  # folder of a run: evaluate its checkpoint, train nothing
    video: bool = False  # record an episode of the most probable actions into the run's folder
    stop_at: float | None = None  # end when the mean return of 100 episodes reaches this
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda where there is one
    run_dir: str = ""  # folder for the run's files; default runs/<script>-<env>-<seed>-<time>
    resume: str = ""  # folder of a run to continue there; its flags become the defaults
    checkpoint_every: int = 10  # iterations from one checkpoint to the next
    track: bool = False  # mirror the metrics to Weights & Biases
    wandb_project: str = "policy-gradients"  # project there


def gae(reward, value, next_value, terminated, done, gamma, gae_lambda):
    """Generalised advantage estimates (T, N); all inputs (T, N).

    next_value belongs to the observation that step t led to, which is the true last one where an
    episode has ended there: so a time limit bootstraps from it, and a terminal state does not.
    """
    delta = reward + gamma * next_value * ~terminated - value                     # (12) [C1]
    advantage, later = torch.zeros_like(reward), torch.zeros_like(reward[0])
    for t in reversed(range(len(reward))):
        advantage[t] = later = delta[t] + gamma * gae_lambda * later * ~done[t]   # (11)
    return advantage


def ppo_loss(logprob, old_logprob, advantage, clip_coef):
    """Minus the clipped objective, a scalar to minimise; inputs (M,)."""
    ratio = (logprob - old_logprob).exp()                                         # (6)
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    return -torch.min(ratio * advantage, clipped * advantage).mean()              # (7), negated


def value_error(value, old_value, target, clip_coef=None):
    """Mean squared error of the value, a scalar; inputs (M,). With clip_coef as in [C3]."""
    error = (value - target).square()
    if clip_coef is not None:  # of V and of V kept near the old one, the larger error
        near = old_value + (value - old_value).clamp(-clip_coef, clip_coef)
        error = torch.max(error, (near - target).square())                        # [C3]
    return error.mean()


def policy_change(logprob, old_logprob, clip_coef):
    """Approximate KL(π_old‖π) and the share of ratios that are clipped, scalars; inputs (M,)."""
    log_ratio = (logprob - old_logprob).detach()
    ratio = log_ratio.exp()
    return (ratio - 1 - log_ratio).mean(), ((ratio - 1).abs() > clip_coef).float().mean()  # [C6]


def minibatches(num_rows, update_epochs, num_minibatches, device=None):
    """Random parts of range(num_rows), each row once per epoch; none has fewer than two rows."""
    parts = max(1, min(num_minibatches, num_rows // 2))
    for _ in range(update_epochs):
        yield from torch.randperm(num_rows, device=device).tensor_split(parts)


def running_sums(reward, done, carried, gamma):
    """What each episode has gathered up to each step, earlier rewards discounted, (T, N).

    reward, done (T, N). carried (N,): zeros at first, then what the last call returned as second.
    """
    sums = []
    for t in range(len(reward)):
        sums.append(reward[t] + gamma * carried)
        carried = sums[-1] * ~done[t]  # also at a time limit: the next episode begins from nothing
    return torch.stack(sums), carried


def moments(rows):
    """Number, mean and unbiased variance, over axis 0, of the rows of all processes together."""
    count = total(torch.tensor(float(len(rows)), device=rows.device))
    mean = total(rows.sum(0)) / count
    return count, mean, total((rows - mean).square().sum(0)) / (count - 1)


def normalize(advantage):
    """Mean 0 and standard deviation 1 over (R,), R at least 2."""
    _, mean, var = moments(advantage)
    return (advantage - mean) / (var.sqrt() + 1e-8)                               # [C4]


class Normalizer(nn.Module):
    """Mean and variance of all rows; batches' variances are merged as in Chan et al. (1979)."""

    def __init__(self, shape):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("var", torch.ones(shape))

    def update(self, rows):
        """Take in rows (R, *shape)."""
        count, mean, var = moments(rows)
        weight, shift = count / (self.count + count), mean - self.mean
        self.var.lerp_(var, weight).add_(shift.square() * weight * (1 - weight))
        self.mean.add_(shift * weight)
        self.count.add_(count)

    def forward(self, x, center=True):
        shifted = x - self.mean if center else x
        return (shifted / (self.var + 1e-8).sqrt()).clamp(-10, 10)                # [C8]


def mlp(sizes, gain):
    """Linear layers of these sizes, tanh between; orthogonal weights, `gain` scales the last's."""
    layers, gains = [], [2**0.5] * (len(sizes) - 2) + [gain]
    for fan_in, fan_out, scale in zip(sizes, sizes[1:], gains):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
        nn.init.orthogonal_(layers[-2].weight, scale)
        nn.init.zeros_(layers[-2].bias)
    return nn.Sequential(*layers[:-1])


class Agent(nn.Module):
    """Policy π(a|s) and value V(s), of normalised vectors (..., O) or images (..., C, H, W).

    choices: how many each number of an action has to choose from; [] for a Gaussian, action_size.
    """

    def __init__(self, obs_shape, choices, action_size, log_std=0.0, norm_obs=False, bf16=False):
        super().__init__()
        self.choices, self.bf16, outputs = choices, bf16, sum(choices) or action_size
        self.normalizer = Normalizer(obs_shape) if norm_obs else nn.Identity()
        self.cnn = nature_cnn(*obs_shape) if len(obs_shape) == 3 else None
        sizes = [512] if self.cnn else [*obs_shape, 64, 64]
        self.actor, self.critic = mlp([*sizes, outputs], 0.01), mlp([*sizes, 1], 1.0)  # [C7]
        self.log_std = None if choices else nn.Parameter(torch.full((action_size,), log_std))

    def features(self, obs):
        if self.cnn is None:
            return obs
        with torch.autocast(obs.device.type, torch.bfloat16, self.bf16):
            return self.cnn(obs.flatten(0, -4) / 255).float().unflatten(0, obs.shape[:-3])

    def value(self, obs):
        """V (...) of obs."""
        return self.critic(self.features(obs)).squeeze(-1)

    def sample(self, obs):
        """Actions (N, A) drawn from π: indices of choices, or numbers."""
        output = self.actor(self.features(obs))
        if self.choices:
            parts = output.split(self.choices, -1)
            return torch.cat([part.softmax(-1).multinomial(1) for part in parts], -1)
        return output + self.log_std.exp() * torch.randn_like(output)

    def mode(self, obs):
        """The most probable actions (N, A)."""
        output = self.actor(self.features(obs))
        parts = output.split(self.choices, -1) if self.choices else []
        return torch.stack([part.argmax(-1) for part in parts], -1) if parts else output

    def forward(self, obs, action):
        """log π(action|obs), the entropy of π(·|obs) and V(obs), all (...), action (..., A)."""
        features = self.features(obs)
        output, value = self.actor(features), self.critic(features).squeeze(-1)
        if self.choices:
            logprobs = [part.log_softmax(-1) for part in output.split(self.choices, -1)]
            chosen = [part.gather(-1, index) for part, index in zip(logprobs, action.split(1, -1))]
            entropy = -sum((part.exp() * part).sum(-1) for part in logprobs)
            return torch.cat(chosen, -1).sum(-1), entropy, value
        peak = -self.log_std - math.log(2 * math.pi) / 2  # log-density at the mean, per dimension
        logprob = peak - ((action - output) / self.log_std.exp()).square() / 2
        return logprob.sum(-1), (0.5 - peak).sum().expand(value.shape), value


@torch.no_grad()
def rollout(envs, agent, obs, num_steps):
    """Play T steps on from obs (N, O).

    Returns obs (T+1, N, O), action (T, N, A), final_obs (K, O), the true last observations of the
    episodes that ended, step by step, and reward, terminated, done, over, valid (T, N), of which
    VectorEnv.step tells. Index t is the step out of obs[t].
    """
    observations, actions, finals, outcomes = [obs], [], [], []
    for _ in range(num_steps):
        actions.append(agent.sample(agent.normalizer(observations[-1])))
        next_obs, final_obs, *outcome = envs.step(actions[-1])
        observations.append(next_obs)
        finals.append(final_obs)
        outcomes.append(outcome)
    columns = (torch.stack(column).to(obs.device) for column in zip(*outcomes))
    return torch.stack(observations), torch.stack(actions), torch.cat(finals), *columns


class Batch(NamedTuple):
    """What an update learns from, as rows: obs (R, O), action (R, A), the others (R,)."""

    obs: torch.Tensor
    action: torch.Tensor
    logprob: torch.Tensor  # under π_old
    value: torch.Tensor  # before the update
    advantage: torch.Tensor
    target: torch.Tensor  # of the value


def objective(agent, part, clip_coef, clip_vloss, vf_coef, ent_coef):
    """The loss of a minibatch, a scalar, and a report (5,): its three terms, KL, clip fraction."""
    logprob, entropy, value = agent(part.obs, part.action)                        # (M,)
    policy_loss = ppo_loss(logprob, part.logprob, part.advantage, clip_coef)
    value_loss = value_error(value, part.value, part.target, clip_coef if clip_vloss else None)
    entropy = entropy.mean()
    loss = policy_loss + vf_coef * value_loss - ent_coef * entropy                # (9), negated
    report = [policy_loss, value_loss, entropy, *policy_change(logprob, part.logprob, clip_coef)]
    return loss, torch.stack(report).detach()


def update(agent, optimizer, batch, loss_function, clip_coef, args):
    """Epochs of minibatch steps on the batch; returns the means of what happened in them."""
    params, reports = list(agent.parameters()), []
    num_rows, device = len(batch.obs), batch.obs.device
    for rows in minibatches(num_rows, args.update_epochs, args.num_minibatches, device):
        part = Batch(*(column[rows] for column in batch))
        loss, report = loss_function(
            agent, part, clip_coef, args.clip_vloss, args.vf_coef, args.ent_coef)
        optimizer.zero_grad()
        loss.backward()
        average([*(param.grad for param in params), report])                      # [C10]
        norm = nn.utils.clip_grad_norm_(params, args.max_grad_norm)               # [C5]
        reports.append(torch.cat([report, norm.view(1)]))
        if args.target_kl is not None and report[3] > 1.5 * args.target_kl:
            break                                                                 # [C6]
        optimizer.step()
    names = ["policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction", "grad_norm"]
    return dict(zip(names, torch.stack(reports).mean(0)))


def train(args):
    """Train as the flags say; returns the score, the mean return of the last 100 episodes."""
    args, device, rank, world_size = settle(args)
    envs = VectorEnv(args, args.num_envs // world_size, device)
    sizes = envs.obs_shape, envs.choices, envs.action_size
    agent = Agent(*sizes, args.log_std, args.norm_obs, args.bf16).to(device)
    if args.eval_only:
        return evaluate_saved(args, agent, device)
    scale = Normalizer(()).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), eps=1e-5, fused=True)        # [C5]
    loss_function = compiled(agent, objective, device) if args.compile else objective
    with Run(args, envs.threshold, agent=agent, scale=scale, optimizer=optimizer) as run:
        obs = envs.reset([args.seed, run.iteration, rank]).unsqueeze(0)
        running = discounted = torch.zeros(len(obs[0]), device=device)
        if rank > 0:  # weights alike, actions not
            torch.manual_seed(args.seed + 2**20 * rank + run.iteration)
        while not run.finished:
            remaining = 1 - run.step / args.total_timesteps                       # [C5]
            rate = args.learning_rate * (remaining if args.anneal_lr else 1)
            clip_coef = args.clip_coef * (remaining if args.anneal_clip else 1)
            optimizer.param_groups[0]["lr"] = rate

            obs, action, final_obs, reward, terminated, done, over, valid = rollout(
                envs, agent, obs[-1], args.num_steps)
            returns, running = running_sums(reward, over, running, gamma=1.0)     # (T, N)
            if args.norm_reward:
                sums, discounted = running_sums(reward, done, discounted, args.gamma)
                scale.update(sums[valid])
                reward = scale(reward, center=False)
            if args.clip_reward:
                reward = reward.sign()                                            # [C8]
            seen = agent.normalizer(obs)                                          # (T+1, N, O)
            with torch.no_grad():
                logprob, _, value = agent(seen[:-1], action)                      # (T, N)
                next_value = torch.cat([value[1:], agent.value(seen[-1:])])
                final_value = agent.value(agent.normalizer(final_obs))            # (K,)
            next_value = next_value.masked_scatter(done, final_value)             # [C1]
            advantage = gae(
                reward, value, next_value, terminated, done, args.gamma, args.gae_lambda)
            columns = seen[:-1], action, logprob, value, advantage, advantage + value  # [C3]
            batch = Batch(*(column[valid] for column in columns))                 # [C2]
            unexplained = batch.advantage.var() / (batch.target.var() + 1e-8)
            batch = batch._replace(advantage=normalize(batch.advantage))
            means = update(agent, optimizer, batch, loss_function, clip_coef, args)
            if args.norm_obs:
                agent.normalizer.update(obs[:-1][valid])
            run.log(args.num_envs * args.num_steps, gather(returns[over]),
                    explained_variance=1 - unexplained, learning_rate=rate, **means)
        run.save()
        evaluate_agent(args, agent, device, run.dir)
    leave()
    return run.score


# Below this line nothing is needed to understand the algorithm: environments, evaluation, files.


PRESETS = {  # of a flag that is not given: for choices (Discrete and the like), Box actions, images
    "total_timesteps": (200_000, 1_000_000, 10_000_000),
    "learning_rate": (6e-3, 1e-3, 2.5e-4),
    "num_envs": (64, 8, 8),
    "num_steps": (32, 256, 128),
    "gamma": (0.98, 0.99, 0.99),
    "num_minibatches": (8, 8, 4),
    "update_epochs": (3, 10, 4),
    "clip_coef": (0.2, 0.2, 0.1),
    "ent_coef": (0.0, 0.0, 0.01),
    "norm_obs": (False, True, False),
    "norm_reward": (False, True, False),
    "clip_reward": (False, False, True),
}


def settle(args):
    """Join the other processes, if torchrun started any, and give each flag a value.

    Returns (args, device, rank, number of processes).
    """
    device, rank, world_size = prepare(args), 0, 1
    if "LOCAL_RANK" in os.environ:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        rank, world_size = dist.get_rank(), dist.get_world_size()
    envs = VectorEnv(args, 1, device)  # one, to see what it is
    envs.envs.close()
    kind = 2 if len(envs.obs_shape) == 3 else 0 if envs.choices else 1
    preset = {flag: row[kind] for flag, row in PRESETS.items() if getattr(args, flag) is None}
    args = dataclasses.replace(args, **preset)
    if kind == 2 and args.norm_obs:
        fail("--norm-obs True: for vectors; the CNN scales images itself")
    if kind == 2 and device.type == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))  # a CNN gains by them
    rows = args.num_envs * args.num_steps
    if args.num_envs % world_size:
        fail(f"--num-envs {args.num_envs}: does not divide by {world_size} processes")
    if args.num_steps < 2 or rows < 6 * args.num_minibatches * world_size:
        fail(f"--num-steps {args.num_steps} by --num-envs {args.num_envs}: a batch needs 2 steps, "
             f"and 6 rows for each of --num-minibatches {args.num_minibatches}")
    if args.total_timesteps < rows and not args.eval_only:
        fail(f"--total-timesteps {args.total_timesteps}: less than one batch, {rows} steps")
    if rank == 0 and preset:
        chosen = [f"{flag.replace('_', '-')} {value}" for flag, value in preset.items()]
        print(f"{world_size} process(es) with {torch.get_num_threads()} thread(s) on {device}; "
              f"preset for {('choices', 'Box actions', 'images')[kind]}:", ", ".join(chosen))
    return args, device, rank, world_size


def total(tensor):
    """Put the sum over all processes into the tensor; returns it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def average(tensors):
    """Put the mean over all processes into each of the tensors, by one message."""
    if dist.is_initialized():
        flat = total(torch.cat([tensor.flatten() for tensor in tensors])) / dist.get_world_size()
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(mean.view_as(tensor))


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


def compiled(agent, function, device):
    """The function, compiled, and with it the agent's sampling; on a GPU as CUDA graphs."""
    mode = "reduce-overhead" if device.type == "cuda" else "default"
    sample = torch.compile(agent.sample, mode=mode)
    agent.sample = lambda obs: sample(obs).clone()  # a graph writes into the same place each time
    return torch.compile(function, mode=mode)


def nature_cnn(channels, height, width):
    """512 features (M, 512) of images (M, C, H, W): Mnih et al., Nature 518, 529 (2015)."""
    convolutions = nn.Conv2d(channels, 32, 8, 4), nn.Conv2d(32, 64, 4, 2), nn.Conv2d(64, 64, 3)
    layers = [layer for convolution in convolutions for layer in (convolution, nn.ReLU())]
    layers.append(nn.Flatten())
    size = nn.Sequential(*layers)(torch.zeros(1, channels, height, width)).shape[1]
    layers += [nn.Linear(size, 512), nn.ReLU()]
    for layer in (*convolutions, layers[-2]):
        nn.init.orthogonal_(layer.weight, 2**0.5)                                 # [C7]
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class VectorEnv:
    """N copies of a gymnasium environment stepped together, with tensors in and out.

    Observations: images are uint8 (N, C, H, W), all else float32 vectors (N, O), Discrete ones
    one-hot; parts of a Dict that hold no numbers (a text) are left out. Raises FloatingPointError
    where a value is not finite.
    """

    def __init__(self, args, num_envs, device, video=None):
        self.device, self.envs = device, make_envs(args, num_envs, video)
        self.space, obs_space = self.envs.single_action_space, self.envs.single_observation_space
        if not isinstance(obs_space, Box):
            fail(f"--env-id {args.env_id}: observations {obs_space} are not supported, only Box, "
                 "Discrete, MultiDiscrete, MultiBinary, and Dict and Tuple of these")
        if not isinstance(self.space, (Box, Discrete, MultiDiscrete, MultiBinary)):
            fail(f"--env-id {args.env_id}: actions {self.space} are not supported, only Box, "
                 "Discrete, MultiDiscrete and MultiBinary")
        mode, modes = self.envs.metadata.get("autoreset_mode"), gym.vector.AutoresetMode
        if mode not in (modes.NEXT_STEP, modes.SAME_STEP):
            fail(f"--env-id {args.env_id}: autoreset mode {mode} is not supported, only NEXT_STEP "
                 "and SAME_STEP")
        self.same_step, self.choices = mode == modes.SAME_STEP, category_sizes(self.space)
        self.action_size = math.prod(self.space.shape)
        self.obs_shape, self.channels_last = layout(obs_space)
        self.threshold = self.envs.spec and self.envs.spec.reward_threshold

    def reset(self, seed):
        """Begin new episodes, the same for the same list of integers `seed`; returns obs (N, O)."""
        seed = int(np.random.SeedSequence(seed).generate_state(1)[0]) >> 1  # to fit in 31 bits
        obs, info = self.envs.reset(seed=seed)
        self.gives_tensors = torch.is_tensor(obs)
        self.frame = info.get("episode_frame_number") if self.same_step else None
        self.ended = torch.zeros(len(obs), dtype=torch.bool)
        return self.observe(obs)

    def step(self, action):
        """Take actions (N, A) as the agent draws them.

        Returns obs (N, O), final_obs (K, O), the true last ones of the K episodes that ended, and,
        (N,) each: reward, terminated, done (terminated or truncated), over (a whole game ended,
        not just a life of it), valid (False where the step only reset the environment).
        """
        obs, reward, terminated, truncated, info = self.envs.step(self.act(action))
        reward = self.tensor("reward", reward).float()
        terminated, truncated = self.tensor("", terminated), self.tensor("", truncated)
        done, obs = terminated | truncated, self.observe(obs)
        over = done
        if self.frame is not None:  # native Atari: a life ended, or a game, if frames restart
            frame, self.frame = self.frame, info["episode_frame_number"].copy()
            over = truncated | torch.from_numpy(self.frame < frame)
        valid = torch.ones_like(done) if self.same_step else ~self.ended.to(done.device)
        self.ended, ends = done, done.nonzero().flatten()
        final_obs = obs[ends]
        if self.same_step and len(ends) > 0:
            final_obs = self.observe(np.stack([info["final_obs"][i] for i in ends]))
        return obs, final_obs, reward, terminated, done, over, valid

    def act(self, action):
        """The action that the environments get, as a tensor where they speak in tensors."""
        action = action.reshape(-1, *self.space.shape)
        if self.choices:
            action = action + torch.as_tensor(getattr(self.space, "start", 0), device=action.device)
        else:
            low, high = (torch.as_tensor(bound, dtype=action.dtype, device=action.device)
                         for bound in (self.space.low, self.space.high))
            action = action.clamp(low, high)                                      # [C9]
        return action if self.gives_tensors else action.cpu().numpy().astype(self.space.dtype)

    def observe(self, obs):
        """Observations as the agent takes them, on its device."""
        if self.channels_last:
            obs = obs.movedim(-1, -3) if torch.is_tensor(obs) else np.moveaxis(obs, -1, -3)
        obs = self.tensor("observation", obs).reshape(-1, *self.obs_shape)
        return (obs if len(self.obs_shape) == 3 else obs.float()).to(self.device)

    def tensor(self, name, array):
        tensor = torch.as_tensor(array).clone()  # environments may write to theirs again
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise FloatingPointError(name)
        return tensor


def make_envs(args, num_envs, video=None):
    """The gymnasium vector environment; video: the folder into which to film its first episode."""
    kwargs, mode = {}, None if args.vectorization == "auto" else args.vectorization
    module, _, name = args.env_id.rpartition(":")
    with blamed(f"--env-id {args.env_id}"):
        if module or name.startswith("ALE/"):
            importlib.import_module(module or "ale_py")  # which registers its environments
        spec = gym.spec(name)
        if video:
            mode, kwargs["render_mode"] = "sync", "rgb_array"
        native = spec.vector_entry_point is not None and mode is None
        if spec.namespace == "ALE" and native:  # life_loss_info: an end for the value, not a reset
            kwargs |= {"life_loss_info": True, "reward_clipping": False,
                       "autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
        elif spec.namespace == "ALE":
            kwargs["frameskip"] = 1  # AtariPreprocessing skips
        if not native:
            kwargs |= {"vectorization_mode": mode or "sync",
                       "wrappers": [lambda env: wrapped(env, video)]}
        return gym.make_vec(spec, num_envs, **kwargs)


def wrapped(env, video=None):
    """One environment, with observations that are a Box if they can be."""
    if video:
        env = gym.wrappers.RecordVideo(env, video, lambda episode: episode == 0, None, 0, "video")
    if env.spec.namespace == "ALE":
        env = gym.wrappers.AtariPreprocessing(env)
        env = gym.wrappers.FrameStackObservation(env, 4)
    space = env.observation_space
    if isinstance(space, Dict):
        env = gym.wrappers.FilterObservation(env, [key for key in space if numeric(space[key])])
    if not isinstance(space, Box) and numeric(env.observation_space):
        env = gym.wrappers.FlattenObservation(env)
    return env


def numeric(space):
    """Whether observations of this space flatten to numbers that mean something."""
    if isinstance(space, (Dict, Tuple)):
        return all(map(numeric, space.values() if isinstance(space, Dict) else space))
    return isinstance(space, (Box, Discrete, MultiDiscrete, MultiBinary))


def category_sizes(space):
    """Of how many each number of an action is chosen; [] for Box."""
    if isinstance(space, Discrete):
        return [int(space.n)]
    if isinstance(space, MultiDiscrete):
        return space.nvec.ravel().tolist()
    return [2] * math.prod(space.shape) if isinstance(space, MultiBinary) else []


def layout(space):
    """Shape for the agent, (C, H, W) of images of 36 by 36 and more, else (O,); channels last?"""
    shape = space.shape  # an image's: (H, W), (H, W, C), (C, H, W), (S, H, W, C) or (S, C, H, W)
    if space.dtype != np.uint8 or len(shape) not in (2, 3, 4):
        return (math.prod(shape),), False
    last = len(shape) > 2 and shape[-1] == min(shape[-3:])
    height, width = shape[-3:-1] if last else shape[-2:]
    if min(height, width) < 36:  # the CNN's kernels need that many
        return (math.prod(shape),), False
    return (math.prod(shape) // (height * width), height, width), last


@torch.no_grad()
def play(args, agent, device, num_envs, video=None):
    """Returns (N,) of an episode of the most probable actions in each of N environments."""
    envs = VectorEnv(args, num_envs, device, video)
    obs, total = envs.reset([args.seed, 2**31]), torch.zeros(num_envs)
    alive = torch.ones(num_envs, dtype=torch.bool)
    while alive.any():
        obs, _, reward, _, _, over, _ = envs.step(agent.mode(agent.normalizer(obs)))
        total, alive = total + reward.cpu() * alive, alive & ~over.cpu()
    envs.envs.close()
    return total


def evaluate_agent(args, agent, device, folder):
    """Play --eval-episodes and print their returns' mean; film one more with --video."""
    if os.environ.get("RANK", "0") != "0":  # of several processes, only the first
        return
    if args.eval_episodes > 0:
        total = play(args, agent, device, args.eval_episodes)
        spread = f"± {total.std(correction=0):.1f} ({total.min():.1f} to {total.max():.1f})"
        tqdm.write(f"evaluation: {len(total)} episodes, mean return {total.mean():.1f} {spread}")
    if args.video:
        with blamed("--video"):
            play(args, agent, device, 1, video=str(folder))
        tqdm.write(f"video: in {folder}")


def evaluate_saved(args, agent, device):
    """--eval-only: the same, with the weights of a finished or stopped run."""
    with blamed(f"--eval-only {args.eval_only}: its checkpoint.pt is of another agent"):
        agent.load_state_dict(read_checkpoint(args.eval_only)["agent"])
    if args.eval_episodes == 0 and not args.video:
        fail("--eval-only: add --eval-episodes, or --video")
    return evaluate_agent(args, agent, device, args.eval_only)


class Run:
    """A run's progress, its folder (args.json, metrics.csv, checkpoint.pt) and what it shows.

    parts: what a checkpoint keeps, each with a state_dict; with --resume they get theirs back.
    """

    def __init__(self, args, threshold, **parts):
        self.args, self.threshold, self.parts = args, threshold, parts
        self.writes = os.environ.get("RANK", "0") == "0"  # of several processes, only the first
        self.step, self.iteration, self.seconds = 0, 0, 0.0
        self.window, self.passed = [], ""  # last returns; where the threshold was passed
        self.size = 0  # of metrics.csv
        name = f"{Path(__file__).stem}-{re.sub(r'[^A-Za-z0-9.]+', '-', args.env_id)}-{args.seed}"
        now = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"  # two may begin in one second
        self.dir = Path(args.resume or args.run_dir or f"runs/{name}-{now}")
        if args.resume:
            self.load()
        elif self.writes and (self.dir / "checkpoint.pt").exists():
            fail(f"--run-dir {self.dir}: holds a run already; --resume it, or name another folder")
        self.metrics, self.wandb = open_run(self.dir, args, self.size)
        shows = self.writes and sys.stderr.isatty()
        self.bar = tqdm(total=args.total_timesteps, initial=self.step, unit=" steps",
                        unit_scale=True, dynamic_ncols=True, disable=not shows)
        self.clock = self.shown = time.perf_counter()
        self.save()

    @property
    def score(self):
        """Mean return of the last 100 episodes, NaN before the first has ended."""
        return sum(self.window) / len(self.window) if self.window else math.nan

    def reached(self, goal):
        """Whether there is a goal, and the mean return of 100 episodes is that high."""
        return goal is not None and len(self.window) == 100 and self.score >= goal

    @property
    def finished(self):
        """Whether the steps are used up, or --stop-at has been reached."""
        return self.step >= self.args.total_timesteps or self.reached(self.args.stop_at)

    def log(self, steps, returns, **means):
        """End an iteration: its environment steps, returns of episodes that ended, and means."""
        self.step, self.iteration = self.step + int(steps), self.iteration + 1
        self.window = (self.window + returns.tolist())[-100:]
        now = time.perf_counter()
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
        if not self.passed and self.reached(self.threshold):
            self.passed = f"; {self.threshold:g} passed at {self.step:,}, {self.seconds:.1f} s"
        if self.iteration % self.args.checkpoint_every == 0:
            self.save()
        self.bar.set_postfix_str(f"score {self.score:.1f}", refresh=False)
        self.bar.update(min(self.step, self.bar.total) - self.bar.n)
        if self.bar.disable and self.writes and now - self.shown > 5:
            self.shown = now
            print(f"step {self.step:,}, score {self.score:.1f}, {self.seconds:.0f} s", flush=True)
        if self.wandb:
            try:
                self.wandb.log(row, step=self.step)
            except Exception as error:  # trouble on the network must not end the training
                tqdm.write(f"warning: --track: {error}; the training goes on without", sys.stderr)
                self.wandb = None

    def save(self):
        """Write checkpoint.pt beside its place, then move it in: no kill leaves half of it."""
        if not self.writes:
            return
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state["args"] = dataclasses.asdict(self.args)
        state["run"] = {name: getattr(self, name) for name in KEPT}
        cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []
        state["rng"] = [torch.get_rng_state(), *cuda]
        with blamed(f"--run-dir {self.dir}"):
            torch.save(state, self.dir / "checkpoint.tmp")
            (self.dir / "checkpoint.tmp").replace(self.dir / "checkpoint.pt")

    def load(self):
        """Take back what save wrote."""
        state = read_checkpoint(self.dir)
        with blamed(f"--resume {self.dir}: its checkpoint.pt is not of such a run"):
            for name, part in self.parts.items():
                if isinstance(part, torch.optim.Optimizer):  # the flags, not the file, set its rate
                    state[name]["param_groups"] = part.state_dict()["param_groups"]
                part.load_state_dict(state[name])
            vars(self).update({name: state["run"][name] for name in KEPT})
            torch.set_rng_state(state["rng"][0])
            if torch.cuda.is_initialized() and state["rng"][1:]:
                torch.cuda.set_rng_state(state["rng"][1])

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        self.bar.close()
        if kind is FloatingPointError:
            fail(f"step {self.step}: {error} is not finite; the last good checkpoint: {self.dir}")
        if kind is KeyboardInterrupt:
            print(f"stopped; go on with --resume {self.dir}", file=sys.stderr)
            raise SystemExit(130)
        if kind is None and self.writes:
            took = f"{self.step:,} steps, {self.seconds:.1f} s{self.passed}"
            print(f"score {self.score:.1f} after {took}; files in {self.dir}")


KEPT = ("step", "iteration", "seconds", "window", "passed", "size")  # of Run, in a checkpoint


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


def prepare(args):
    """Refuse numbers out of range, seed torch, set its threads; returns the device."""
    for field in dataclasses.fields(args):
        value, name = getattr(args, field.name), field.name.replace("_", "-")
        high = 1 if name in ("gamma", "gae-lambda", "trace-lambda", "epsilon") else 1e300
        low = 1 if type(value) is int and name not in ("seed", "eval-episodes") else 0
        low = -1e300 if name in ("stop-at", "log-std") else low
        if type(value) in (int, float) and not low <= value <= high:
            fail(f"--{name} {value}: must be at least {low}" + " and at most 1" * (high == 1))
    with blamed(f"--seed {args.seed}"):
        torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # layers this small lose more than they gain by a second thread
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cpu" and not getattr(torch, name).is_available():
        fail(f"--device {name}: there is none here; use --device cpu")
    return torch.device(name)


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
