# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "gymnasium==1.4.0", "tyro==1.0.17", "wandb==0.31.0", "tqdm==4.70.1",
# ]
# ///
"""PPO: proximal policy optimization with the clipped objective (Schulman et al., 2017).

Play T steps in each of N environments. Estimate with a learned value function V how much better
each action did than expected: its advantage Â. Then take several epochs of minibatch gradient steps
on this batch. r_t is the ratio of the new to the old probability of an action. If Â > 0 and
r_t > 1 + ε, or Â < 0 and r_t < 1 − ε, the minimum in (7) is constant: this action no longer changes
the policy. This keeps the policy near the one that played.
Equation numbers refer to arXiv 1707.06347:

    r_t(θ) = π(a_t|s_t; θ) / π_old(a_t|s_t)                              (6)
    L_CLIP(θ) = E[min(r_t Â_t, clip(r_t, 1−ε, 1+ε) Â_t)]                 (7)
    L(θ) = E[L_CLIP − c_1 (V(s_t) − V_target)² + c_2 S[π](s_t)]          (9)   S is the entropy
    Â_t = δ_t + γλ δ_{t+1} + (γλ)² δ_{t+2} + ...                         (11)
    δ_t = reward_t + γ V(s_{t+1}) − V(s_t)                               (12)

Implementation choices:
[C1] In (12), V(s_{t+1}) is 0 if s_{t+1} is terminal. At a time limit it is V of the episode's last
     observation. Either way the sum (11) stops there. It also stops at the end of the batch, where
     V(s_{t+1}) stands for the rest. In Atari games a lost life also counts as terminal in (11) and
     (12); the logged return goes on until the game ends.
[C2] If step t ends an episode, it returns the episode's last observation. Step t + 1 only resets:
     gymnasium ignores its action and returns the first observation of the next episode. Such a
     step is excluded from the batch. The docstring of collect shows an example.
[C3] V_target = Â + V of the network that played, with Â before [C4]. The value loss is not clipped.
[C4] Advantages are normalized over the whole batch.
[C5] The learning rate decays linearly to 0. Adam's epsilon is 1e-5. The gradient norm is clipped.
[C6] With --target-kl the update stops once the approximate KL divergence of a minibatch,
     E[r − 1 − log r], exceeds 1.5 times this target (joschu.net/blog/kl-approx.html). This
     minibatch is no longer learned from.
[C7] Vectors: separate networks for π and V. Images: one CNN for both. Orthogonal initialization
     with gain √2, 0.01 for the output of π, 1 for that of V.
[C8] --norm-obs: observations minus their mean, divided by their standard deviation, clipped to
     ± 10. The statistics are those of all earlier batches: they stay the same while a batch is
     played and learned from. A first batch is played for the statistics only: it is not learned
     from, logged or counted.
     --norm-reward: rewards divided by the standard deviation of the discounted sums
     R_t = reward_t + γ R_{t−1} within an episode, those of this batch included, and clipped to
     ± 10. Their mean is not subtracted.
[C9] Box actions: a component of the sampled action is scaled so that -1 and 1 become its bounds. If
     a bound is beyond ± 1e6, it is not scaled. The environment gets the result clipped to the
     bounds. log π and r_t are those of the sample, before scaling and clipping.
[C10] Under torchrun each process plays in its share of the N environments. Gradients are averaged
     over the processes. The means and variances in [C4], [C6] and [C8] are over the rows of all
     processes.

Shapes: T steps, N environments (of this process), M rows of a minibatch, O observation size, K
components of an action, R any number of rows.

    python ppo.py --env-id CartPole-v1

Results of ten seeds, with --env-id and --total-timesteps alone. The score is the mean return of the
last 100 training episodes. Below: its interquartile mean (the lowest seed), seconds on two cores:
    CartPole-v1, 200,704 steps: 500 (500), 5 s
    Acrobot-v1, 200,704 steps: -83 (-87), 11 s
    MountainCar-v0, 1,001,472 steps: -107 (-110), 30 s
    LunarLander-v3, 1,001,472 steps: 269 (250), 51 s
    Pendulum-v1, 301,056 steps: -150 (-183), 52 s
    HalfCheetah-v5, 1,001,472 steps: 5,848 (4,032), 208 s
    Hopper-v5, 1,001,472 steps: 2,377 (1,420), 234 s
    Walker2d-v5, 1,001,472 steps: 3,720 (1,755), 258 s
"""

import copy
import importlib
import json
import os
import random
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import tyro
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from torch import nn
from torch.distributions import Categorical, Independent, Normal
from tqdm import tqdm


@dataclass(frozen=True)
class Args:
    """The defaults here are those for discrete actions; PRESETS has those of other environments."""

    env_id: str = "CartPole-v1"  # gymnasium environment; "module:Env-v0" imports the module first
    seed: int = 1
    total_timesteps: int = 200_000  # steps of all environments, resets included
    learning_rate: float = 2e-3  # initial Adam step size
    anneal_lr: bool = True  # decay the learning rate linearly to 0 [C5]
    num_envs: int = 64  # N: environments, over all processes
    num_steps: int = 32  # T: steps in each environment per iteration
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # lambda of generalized advantage estimation
    num_minibatches: int = 8  # minibatches per epoch
    update_epochs: int = 3  # epochs over each batch
    clip_coef: float = 0.2  # clip range epsilon
    ent_coef: float = 0.01  # entropy coefficient c_2
    vf_coef: float = 0.5  # value loss coefficient c_1
    max_grad_norm: float = 0.5  # clip the gradient norm to this
    target_kl: float | None = None  # stop an update at 1.5 times this KL divergence [C6]
    log_std: float = -1.0  # initial log standard deviation of Box actions
    norm_obs: bool = True  # normalize vectors [C8]; pixels are always divided by 255
    norm_reward: bool = True  # normalize rewards [C8]
    clip_reward: bool = False  # learn from the sign of the rewards (Atari)
    async_envs: bool = False  # run each environment in its own process
    stop_at: float | None = None  # stop when the mean return of 100 episodes reaches this
    eval_episodes: int = 0  # greedy episodes after training, rounded up to whole batches
    eval_only: str = ""  # evaluate the run in this folder, without training
    video: bool = False  # record a greedy episode after training
    device: str = "cpu"  # "cuda" is the default for images if there is a GPU
    run_dir: str = ""  # output folder; default: runs/<script>-<env>-<seed>-<time>
    resume: str = ""  # continue the run in this folder; its flags are the defaults
    track: bool = False  # log to Weights & Biases
    wandb_project: str = "policy-gradients"


# What differs from Args: for vectors and Box actions, and for images and any actions.
PRESETS = {
    "continuous": {"total_timesteps": 1_000_000, "learning_rate": 3e-4, "num_envs": 8,
                   "num_steps": 256, "gae_lambda": 0.9, "num_minibatches": 32,
                   "update_epochs": 10, "ent_coef": 0.0, "log_std": -0.7},
    "image": {"total_timesteps": 10_000_000, "learning_rate": 2.5e-4, "num_envs": 8,
              "num_steps": 128, "num_minibatches": 4, "update_epochs": 4, "clip_coef": 0.1,
              "norm_reward": False, "device": "cuda" if torch.cuda.is_available() else "cpu"},
}


def gae(reward, value, next_value, terminal, truncated, gamma, gae_lambda):
    """Compute generalized advantage estimates (T, N); all inputs are (T, N).

    next_value[t] is V(s_{t+1}). If step t ended an episode, s_{t+1} is its last observation, not
    the first one of the next episode. Rows of steps that only reset have no meaning, and no effect
    on other rows.
    """
    delta = reward + gamma * next_value * ~terminal - value                       # (12) [C1]
    advantage = torch.zeros_like(reward)
    next_advantage = torch.zeros_like(reward[0])
    for t in reversed(range(len(reward))):
        continues = ~(terminal[t] | truncated[t])  # both end the sum
        advantage[t] = delta[t] + gamma * gae_lambda * next_advantage * continues  # (11)
        next_advantage = advantage[t]
    return advantage


def ppo_loss(logprob, old_logprob, advantage, clip_coef):
    """Compute the negative clipped objective, a scalar, from tensors (M,)."""
    ratio = (logprob - old_logprob).exp()                                         # (6)
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    return -torch.min(ratio * advantage, clipped * advantage).mean()              # (7), negated


def running_sums(reward, done, last_sum, gamma):
    """Compute sum_t = reward_t + gamma * sum_{t-1} within each episode, (T, N).

    reward and done are (T, N), last_sum (N,) is the sum before step 0. Returns the sums and the
    last_sum for the next batch. With gamma 1 a sum is the return of the episode so far.
    """
    sums = torch.zeros_like(reward)
    for t in range(len(reward)):
        sums[t] = reward[t] + gamma * last_sum
        last_sum = sums[t] * ~done[t]
    return sums, last_sum


def all_reduce_sum(tensor):
    """Replace the tensor by its sum over all processes, in place; return it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def moments(rows):
    """Return the number of rows of all processes, and their mean and variance.

    rows: (R, ...), those of this process.
    """
    count = all_reduce_sum(torch.tensor(float(len(rows)), device=rows.device))
    mean = all_reduce_sum(rows.sum(0)) / count
    return count, mean, all_reduce_sum((rows - mean).square().sum(0)) / count


class RunningMoments(nn.Module):
    """Mean and variance of all rows so far; batches are merged as in Chan et al. (1979)."""

    def __init__(self, shape):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("var", torch.ones(shape))

    def update(self, rows):
        """Merge rows (R, *shape); every process must call this, each with its own rows."""
        new_count, new_mean, new_var = moments(rows)
        assert new_var.isfinite().all(), "an observation or a reward is not finite"
        w, delta = new_count / (self.count + new_count), new_mean - self.mean
        self.var += w * (new_var - self.var) + w * (1 - w) * delta**2
        self.mean += w * delta
        self.count += new_count

    def scale(self, x):
        """Divide x by the standard deviation, clip to ± 10; the caller may subtract the mean."""
        return (x / (self.var + 1e-8).sqrt()).clamp(-10, 10)                      # [C8]


def init_layer(layer, gain=2**0.5):
    """Initialize a layer: orthogonal weights, biases 0."""
    nn.init.orthogonal_(layer.weight, gain)                                       # [C7]
    nn.init.zeros_(layer.bias)
    return layer


def mlp(input_size, output_size, output_gain):
    """Two hidden layers of 64 tanh units."""
    return nn.Sequential(
        init_layer(nn.Linear(input_size, 64)), nn.Tanh(), init_layer(nn.Linear(64, 64)), nn.Tanh(),
        init_layer(nn.Linear(64, output_size), output_gain))


def nature_cnn(channels, height, width):
    """512 features of images, after Mnih et al., Nature 518, 529 (2015)."""
    convolutions = nn.Sequential(
        init_layer(nn.Conv2d(channels, 32, 8, 4)), nn.ReLU(),
        init_layer(nn.Conv2d(32, 64, 4, 2)), nn.ReLU(),
        init_layer(nn.Conv2d(64, 64, 3)), nn.ReLU(), nn.Flatten())
    size = convolutions(torch.zeros(1, channels, height, width)).shape[1]
    return nn.Sequential(convolutions, init_layer(nn.Linear(size, 512)), nn.ReLU())


def num_choices(space):
    """Return the number of choices for each component of an action; [] for Box."""
    if isinstance(space, Discrete):
        return [int(space.n)]
    if isinstance(space, MultiDiscrete):
        return space.nvec.flatten().tolist()
    return [2] * gym.spaces.flatdim(space) if isinstance(space, MultiBinary) else []


class MultiCategorical:
    """Independent categorical distributions, one for each of the K components of an action."""

    def __init__(self, logits, sizes):
        # Logits (..., sum of sizes); checking them in each step is slow.
        self.parts = [Categorical(logits=x, validate_args=False) for x in logits.split(sizes, -1)]

    def sample(self):
        return torch.stack([part.sample() for part in self.parts], dim=-1)

    @property
    def mode(self):
        return torch.stack([part.mode for part in self.parts], dim=-1)

    def log_prob(self, action):
        return sum(part.log_prob(x) for part, x in zip(self.parts, action.unbind(-1)))

    def entropy(self):
        return sum(part.entropy() for part in self.parts)


class Agent(nn.Module):
    """Policy π(a|s; θ) and value V(s) of vectors (..., O) or uint8 images (..., C, H, W)."""

    def __init__(self, obs_shape, action_space, args):
        super().__init__()
        # Outputs of the policy: a logit for each choice, or the mean of each Box component.
        self.choices = num_choices(action_space)
        size = sum(self.choices) if self.choices else gym.spaces.flatdim(action_space)
        self.cnn, self.obs_moments = None, None
        if len(obs_shape) == 3:
            self.cnn = nature_cnn(*obs_shape)
            self.actor = init_layer(nn.Linear(512, size), 0.01)
            self.critic = init_layer(nn.Linear(512, 1), 1.0)
        else:
            self.obs_moments = RunningMoments(obs_shape) if args.norm_obs else None
            self.actor = mlp(obs_shape[0], size, 0.01)
            self.critic = mlp(obs_shape[0], 1, 1.0)
        self.log_std = None if self.choices else nn.Parameter(torch.full((size,), args.log_std))

    def features(self, obs):
        """Return what actor and critic get: normalized vectors, or what the CNN makes of images."""
        if self.cnn:  # which takes (R, C, H, W)
            return self.cnn(obs.flatten(0, -4) / 255).unflatten(0, obs.shape[:-3])
        return self.obs_moments.scale(obs - self.obs_moments.mean) if self.obs_moments else obs

    def policy(self, features):
        """Return the distribution of actions (..., K)."""
        output = self.actor(features)
        if self.choices:
            return MultiCategorical(output, self.choices)
        # Independent sums log-probabilities and entropies over the components.
        return Independent(Normal(output, self.log_std.exp(), validate_args=False), 1)

    def forward(self, obs):
        """Return the distribution of actions and V (...)."""
        features = self.features(obs)
        return self.policy(features), self.critic(features).squeeze(-1)


@torch.inference_mode()  # like no_grad, but faster
def collect(envs, agent, obs, valid, num_steps):
    """Take num_steps steps in each environment with the current policy.

    obs (N, ...) are the current observations. valid (N,) is False where the first step only resets.
    Returns both for the next call, and a dict of obs (T, N, ...), action (T, N, K), and (T, N):
        reward: 0 if the step only reset
        terminal: s_{t+1} has value 0: the task ended, or a life was lost [C1]
        truncated: a time limit was reached
        done: the episode ended, so the next step only resets; not yet if a life was lost
        valid: False if this step only reset the environment
        logprob, value: of the policy that played
        next_value: V(s_{t+1}), see gae
    If step 5 is the last of an episode:
        t   obs[t]                        action[t]   done[t]   valid[t]   next_value[t]
        4   s_4                           a_4         False     True       value[5]
        5   s_5                           a_5         True      True       value[6]
        6   s_6, the episode's last one   ignored     False     False      not used
        7   s_0 of the next episode       a_0         False     True       value[8]
    """
    steps = []
    for _ in range(num_steps):
        action = agent.policy(agent.features(obs)).sample()
        next_obs, reward, terminated, truncated, life_lost = envs.step(action)
        done = terminated | truncated
        steps.append({"obs": obs, "action": action, "reward": reward * valid,
                      "terminal": terminated | life_lost, "truncated": truncated,  # [C1]
                      "done": done, "valid": valid})
        obs, valid = next_obs, ~done                                              # [C2]
    rollout = {name: torch.stack([step[name] for step in steps]) for name in steps[0]}
    # The weights are still those that played. One large pass is faster than one in each step.
    pi, value = agent(rollout["obs"])
    _, last_value = agent(obs)
    next_value = torch.cat([value[1:], last_value.unsqueeze(0)])  # also at an episode's end [C2]
    rollout |= {"logprob": pi.log_prob(rollout["action"]), "value": value, "next_value": next_value}
    return obs, valid, rollout


def update(agent, optimizer, batch, args):
    """Take up to update_epochs * num_minibatches gradient steps on the batch, a dict of rows.

    Returns the mean of each metric over the minibatches of this process.
    """
    history, minibatches = [], []  # minibatches of all epochs, so that one break ends the update
    for _ in range(args.update_epochs):
        permutation = torch.randperm(len(batch["obs"]), device=batch["obs"].device)
        minibatches += permutation.tensor_split(args.num_minibatches)
    for row_numbers in minibatches:
        rows = {name: column[row_numbers] for name, column in batch.items()}
        pi, value = agent(rows["obs"])
        logprob = pi.log_prob(rows["action"])                                     # (M,)
        loss_pi = ppo_loss(logprob, rows["logprob"], rows["advantage"], args.clip_coef)
        loss_v = (value - rows["target"]).square().mean()
        entropy = pi.entropy().mean()
        loss = loss_pi + args.vf_coef * loss_v - args.ent_coef * entropy          # (9), negated
        optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(                                     # [C5]
            agent.parameters(), args.max_grad_norm, error_if_nonfinite=True)

        log_ratio = (logprob - rows["logprob"]).detach()
        ratio = log_ratio.exp()
        kl = ratio - 1 - log_ratio                                                # [C6]
        metrics = {"policy_loss": loss_pi, "value_loss": loss_v, "entropy": entropy,
                   "approx_kl": kl.mean(), "grad_norm": grad_norm,
                   "clip_fraction": ((ratio - 1).abs() > args.clip_coef).float().mean()}
        history.append({name: metric.detach() for name, metric in metrics.items()})
        if args.target_kl is not None and moments(kl)[1] > 1.5 * args.target_kl:
            break  # in all processes                                             # [C6]
        optimizer.step()
    return {name: torch.stack([row[name] for row in history]).mean().item() for name in history[0]}


def train(args):
    """Train an agent. Return it and the score, the mean return of the last 100 episodes."""
    rank, world_size, device = setup(args)
    envs = Envs(args, args.num_envs // world_size, device)
    # The networks for vectors are slower with more than one thread.
    torch.set_num_threads(1 if len(envs.obs_shape) == 1 else torch.get_num_threads())
    agent = Agent(envs.obs_shape, envs.single_action_space, args).to(device)
    reward_moments = RunningMoments(()).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), eps=1e-5, fused=True)  # lr: below [C5]
    parts = {"agent": agent, "reward_moments": reward_moments, "optimizer": optimizer}
    # The same network; with several processes, its backward() averages their gradients [C10].
    learner = nn.parallel.DistributedDataParallel(agent) if world_size > 1 else agent
    with Logger(args, parts) as log:
        # Each process, and each resumed run, gets its own episodes and actions.
        obs = envs.reset(seed_everything(args.seed, rank, log.iteration))
        valid = torch.ones(len(obs), dtype=torch.bool, device=device)
        if agent.obs_moments and log.iteration == 0:
            # A batch for the statistics only, then new episodes: no first step only resets.
            *_, rollout = collect(envs, agent, obs, valid, args.num_steps)
            agent.obs_moments.update(rollout["obs"][rollout["valid"]])            # [C8]
            obs = envs.reset()
        # Sums so far of the episodes that have not ended, for the next batch, (N,).
        episode_return, discounted_return = torch.zeros(2, len(obs), device=device)
        while log.step < args.total_timesteps and not log.reached(args.stop_at):
            remaining = 1 - log.step / args.total_timesteps if args.anneal_lr else 1
            optimizer.param_groups[0]["lr"] = args.learning_rate * remaining      # [C5]

            obs, valid, rollout = collect(envs, agent, obs, valid, args.num_steps)
            reward, done = rollout["reward"], rollout["done"]                     # (T, N)
            return_so_far, episode_return = running_sums(reward, done, episode_return, 1.0)
            if args.norm_reward:
                sums, discounted_return = running_sums(reward, done, discounted_return, args.gamma)
                reward_moments.update(sums[rollout["valid"]])
                reward = reward_moments.scale(reward)                             # [C8]
            reward = reward.sign() if args.clip_reward else reward
            advantage = gae(reward, rollout["value"], rollout["next_value"], rollout["terminal"],
                            rollout["truncated"], args.gamma, args.gae_lambda)
            batch = {name: rollout[name] for name in ("obs", "action", "logprob")}
            batch |= {"advantage": advantage, "target": advantage + rollout["value"]}  # [C3]
            # A boolean mask also flattens (T, N, ...) to (rows, ...).              [C2]
            batch = {name: column[rollout["valid"]] for name, column in batch.items()}
            _, mean, advantage_var = moments(batch["advantage"])
            _, _, target_var = moments(batch["target"])
            batch["advantage"] = (batch["advantage"] - mean) / (advantage_var.sqrt() + 1e-8)  # [C4]
            metrics = update(learner, optimizer, batch, args)
            if agent.obs_moments:  # after the update, as this changes what the agent computes
                agent.obs_moments.update(batch["obs"])
            log.write(args.num_envs * args.num_steps, all_gather(return_so_far[done]), **metrics,
                      explained_variance=1 - (advantage_var / target_var).item(),  # Â = target − V
                      learning_rate=args.learning_rate * remaining)
    envs.close()
    if dist.is_initialized():
        dist.barrier()  # no process may leave before the others are done
        time.sleep(0.1)  # lets gloo's threads finish; else the program may abort when it ends
        dist.destroy_process_group()
    if rank == 0 and (args.eval_episodes or args.video):
        evaluate(args, log.dir)
    return agent, log.score


# --- The algorithm ends here. Below: flags, processes, environments with lost lives [C1] and
# scaled actions [C9], evaluation, logging. ---


def default_args(env_id, **overrides):
    """Return the flags for an environment: its preset, changed by the overrides."""
    envs = Envs(Args(env_id=env_id), 1, "cpu")
    envs.reset(seed=0)  # some environments cannot be closed before
    envs.close()
    preset = {} if num_choices(envs.single_action_space) else PRESETS["continuous"]
    if len(envs.obs_shape) == 3:
        preset = PRESETS["image"] | {"clip_reward": envs.is_atari}
    return Args(**{"env_id": env_id} | preset | overrides)


def parse_args():
    """Parse the command line; the defaults depend on the environment, or on the run to continue."""
    # A first pass finds the environment or the folder; --help is left to the second pass.
    given = tyro.cli(Args, args=[arg for arg in sys.argv[1:] if arg not in ("-h", "--help")])
    folder = given.resume or given.eval_only
    if not folder:
        return tyro.cli(Args, default=default_args(given.env_id))
    try:
        saved = Args(**load_checkpoint(folder)["args"])
    except Exception as error:  # a missing, damaged or foreign file
        raise SystemExit(f"{folder}: not a run of this script: {error!r:.150}") from error
    args = tyro.cli(Args, default=saved)
    if (args.env_id, args.norm_obs) != (saved.env_id, saved.norm_obs):
        raise SystemExit(f"{folder}: --env-id and --norm-obs must be those of this run")
    return args


def setup(args):
    """Start torch.distributed under torchrun; check flags. Return rank, processes and device."""
    if not torch.get_device_module(args.device).is_available():
        raise SystemExit(f"--device {args.device}: not available here; use --device cpu")
    rank, world_size, device = 0, 1, torch.device(args.device)
    if dist.is_torchelastic_launched():
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        rank, world_size = dist.get_rank(), dist.get_world_size()
    if args.num_envs % world_size:
        raise SystemExit(f"--num-envs {args.num_envs}: not divisible by {world_size} processes")
    # At worst every second step only resets. Each minibatch needs at least one row.
    if args.num_envs // world_size * (args.num_steps // 2) < args.num_minibatches:
        raise SystemExit(f"--num-minibatches {args.num_minibatches}: the batch is too small")
    torch.manual_seed(args.seed)  # the same weights in all processes
    return rank, world_size, device


def seed_everything(*numbers):
    """Seed all random number generators; return a seed for the environments."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0] >> 1)
    random.seed(seed)  # some environments draw from the global generators
    np.random.seed(seed)
    torch.manual_seed(seed)
    return seed


def all_gather(values):
    """Return the values (R,) of all processes as a list."""
    parts = [values.tolist()]
    if dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, values.tolist())
    return [value for part in parts for value in part]


class Envs(gym.vector.VectorWrapper):
    """N environments with tensors in and out; exits if their spaces are not supported."""

    def __init__(self, args, num_envs, device, video_dir=None):
        super().__init__(make_envs(args, num_envs, video_dir))
        self.device, self.is_atari = device, self.spec.namespace == "ALE"
        obs_space, action_space = self.single_observation_space, self.single_action_space
        float_box = isinstance(action_space, Box) and action_space.dtype.kind == "f"
        if not isinstance(obs_space, Box) or not (float_box or num_choices(action_space)):
            raise SystemExit(f"--env-id {args.env_id}: observations {obs_space} or actions "
                             f"{action_space} not supported; for integers use MultiDiscrete")
        if self.metadata.get("autoreset_mode") != gym.vector.AutoresetMode.NEXT_STEP:
            raise SystemExit(f"--env-id {args.env_id}: needs autoreset mode NEXT_STEP")
        self.obs_shape, self.channels_last = image_layout(obs_space)
        # Parts of vectors with bounds 0 and 255 are divided by 255, as the pixels of images are.
        self.divisor = np.float32(np.where((obs_space.low == 0) & (obs_space.high == 255), 255, 1))
        if float_box:  # -1 and 1 instead of bounds that are infinite, or beyond 1e6: no scaling
            bounded = np.maximum(-action_space.low, action_space.high).astype(np.float64) <= 1e6
            self.low = np.where(bounded, action_space.low, -1)
            self.high = np.where(bounded, action_space.high, 1)

    def reset(self, seed=None):
        """Start new episodes; return the observations (N, ...)."""
        obs, info = self.env.reset(seed=seed)
        self.lives = np.array(info.get("lives"))
        return self.to_tensor(obs)

    def step(self, action):
        """Take actions (N, K).

        Returns the observations (N, ...), and reward, terminated, truncated and life_lost (N,).
        """
        obs, reward, terminated, truncated, info = self.env.step(self.to_env_action(action))
        life_lost = np.full(self.num_envs, self.is_atari and info["lives"] < self.lives)
        self.lives = np.array(info.get("lives"))  # a copy, as the environment may reuse its array
        reward = torch.tensor(reward, dtype=torch.float32, device=self.device)
        flags = [torch.tensor(x, device=self.device) for x in (terminated, truncated, life_lost)]
        return self.to_tensor(obs), reward, *flags

    def to_tensor(self, obs):
        """Copy observations: images stay uint8, all else becomes float32 vectors."""
        if len(self.obs_shape) == 1:
            obs = (obs / self.divisor).astype(np.float32)
        obs = np.moveaxis(obs, -1, -3) if self.channels_last else obs
        return torch.tensor(obs, device=self.device).reshape(-1, *self.obs_shape)

    def to_env_action(self, action):
        """Convert sampled actions to what the environments expect.

        Discrete and MultiDiscrete actions count from space.start. Box actions are scaled from
        [-1, 1] to the bounds, if both are within ± 1e6, then clipped [C9].
        """
        space = self.single_action_space
        action = action.cpu().numpy().reshape(-1, *space.shape)
        if not isinstance(space, Box):
            return (action + getattr(space, "start", 0)).astype(space.dtype)
        action = (self.high + self.low) / 2 + (self.high - self.low) / 2 * action  # [C9]
        return action.astype(space.dtype).clip(space.low, space.high)


def make_envs(args, num_envs, video_dir):
    """Return gymnasium's vector environment; with video_dir, record the first episode there."""
    module, _, env_id = args.env_id.rpartition(":")
    try:
        if module or env_id.startswith("ALE/"):
            importlib.import_module(module or "ale_py")  # registers its environments
        spec = gym.spec(env_id)
        # Native and wrapped Atari games are alike: raw rewards, no FIRE, 4 frames per step.
        if spec.vector_entry_point and not args.async_envs and not video_dir:
            kwargs = {"reward_clipping": False, "use_fire_reset": False}
            return gym.make_vec(spec, num_envs, **kwargs if spec.namespace == "ALE" else {})
        kwargs = {"render_mode": "rgb_array"} if video_dir else {}
        kwargs |= {"frameskip": 1} if spec.namespace == "ALE" else {}
        return gym.make_vec(spec, num_envs, "async" if args.async_envs else "sync",
                            wrappers=[lambda env: wrap_env(env, video_dir)], **kwargs)
    except (gym.error.Error, ModuleNotFoundError) as error:
        if getattr(error, "name", module) not in (module, module.split(".")[0], "ale_py"):
            raise  # an import in the user's code
        raise SystemExit(f"--env-id {args.env_id}: {error}") from error


def wrap_env(env, video_dir):
    """Wrap one environment: video, Atari preprocessing, observations as one Box, a time limit.

    Without a limit an episode, and so an evaluation, might never end.
    """
    if video_dir:
        env = gym.wrappers.RecordVideo(env, video_dir, lambda episode: episode == 0)
    if env.spec.namespace == "ALE":
        env = gym.wrappers.AtariPreprocessing(env)
        env = gym.wrappers.FrameStackObservation(env, 4, padding_type="zero")  # as native ones do
    if env.spec.max_episode_steps is None:  # 30,000 is more than any Atari game takes
        env = gym.wrappers.TimeLimit(env, 30_000)
    space = numeric_part(env.observation_space)
    if isinstance(space, Dict) and len(space) == 1:  # the only part may be an image
        key, space = next(iter(space.items()))
        env = gym.wrappers.TransformObservation(env, lambda obs: obs[key], space)
    if not isinstance(space, Box | None):  # None is refused by Envs
        env = gym.wrappers.TransformObservation(
            env, lambda obs: gym.spaces.flatten(space, obs), gym.spaces.flatten_space(space))
    return env


def numeric_part(space):
    """Return the space without the parts of Dicts that have no numbers; None if nothing is left.

    A Tuple is left out as a whole if one of its parts has none.
    """
    if isinstance(space, Dict):
        parts = {key: numeric_part(part) for key, part in space.items()}
        for key in [key for key in parts if parts[key] is None]:
            warnings.warn(f"the observation {key!r} has no numbers and is left out", stacklevel=2)
            del parts[key]
        return Dict(parts) if parts else None
    if isinstance(space, Tuple):
        return space if all(numeric_part(part) == part for part in space) else None
    return space if isinstance(space, (Box, Discrete, MultiDiscrete, MultiBinary)) else None


def image_layout(space):
    """Return the agent's observation shape, (C, H, W) or (O,), and whether channels come last.

    Images are uint8 with bounds 0 and 255, of 36 by 36 pixels or more (the CNN needs that many):
    (H, W), (H, W, C), (C, H, W), or a stack of these. Stacked frames become channels.
    """
    if len(space.shape) in (2, 3, 4):
        # Channels come last if the last dimension is the smallest.
        last = len(space.shape) > 2 and space.shape[-1] == min(space.shape[-3:])
        height, width = space.shape[-3:-1] if last else space.shape[-2:]
        pixels = space.dtype == np.uint8 and space.low.min() == 0 and space.high.max() == 255
        if pixels and min(height, width) >= 36:
            return (space.low.size // (height * width), height, width), last
    if len(space.shape) > 1 or space.low.size >= 36 * 36:  # also an image beside other parts
        warnings.warn(f"{space} is used as a vector: no uint8 image of 36 by 36", stacklevel=2)
    return (space.low.size,), False


@torch.no_grad()
def evaluate(args, folder):
    """Play --eval-episodes episodes or more with the most likely actions; print the mean return.

    The agent is that of the checkpoint in the folder. With --video, play one episode at a time and
    record the first into its folder `video`.
    """
    num_envs = 1 if args.video else max(min(args.num_envs, args.eval_episodes), 1)
    envs = Envs(args, num_envs, args.device, video_dir=f"{folder}/video" if args.video else None)
    agent = Agent(envs.obs_shape, envs.single_action_space, args).to(args.device)
    agent.load_state_dict(load_checkpoint(folder)["agent"])
    # Training seeds are hashes, so this one is almost surely another.
    obs, returns = envs.reset(args.seed + 2**30), []
    while len(returns) < max(args.eval_episodes, 1):
        running = torch.ones(num_envs, dtype=torch.bool, device=args.device)
        episode_return = torch.zeros(num_envs, device=args.device)
        while running.any():
            obs, reward, terminated, truncated, _ = envs.step(agent(obs)[0].mode)
            episode_return += reward * running
            running = running & ~(terminated | truncated)
        returns += episode_return.tolist()
        obs = envs.reset()
    envs.close()
    tqdm.write(f"greedy evaluation: mean return {np.mean(returns):.1f} in {len(returns)} episodes")


def load_checkpoint(folder):
    """Load what Logger.save wrote; weights_only, so that a stranger's file cannot run code."""
    return torch.load(Path(folder) / "checkpoint.pt", map_location="cpu", weights_only=True)


# The attributes of Logger that a checkpoint keeps.
PROGRESS = ("step", "iteration", "seconds", "csv_size", "returns", "score", "wandb_id")


class Logger:
    """Writes the run's folder (args.json, metrics.csv, checkpoint.pt), progress bar and wandb.

    parts: modules and optimizers by name, which a checkpoint keeps and --resume restores.
    """

    def __init__(self, args, parts):
        self.args, self.parts, self.checkpoint, self.wandb = args, parts, None, None
        self.step, self.iteration, self.seconds, self.csv_size = 0, 0, 0.0, 0
        self.returns, self.score, self.wandb_id = [], np.nan, None  # returns: at most the last 100
        self.is_main = not dist.is_initialized() or dist.get_rank() == 0
        name = f"{Path(__file__).stem}-{args.env_id}-{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
        name = f"{name}-{time.time_ns() % 10**9}".replace("/", "-").replace(":", "-")
        self.dir = Path(args.resume or args.run_dir or f"runs/{name}")
        if args.resume:
            saved = load_checkpoint(args.resume)
            vars(self).update(saved["progress"])
            for name, part in parts.items():
                part.load_state_dict(saved[name])
        elif self.is_main and any(path.stat().st_size for path in self.dir.glob("metrics.csv")):
            raise SystemExit(f"--run-dir {self.dir}: holds a run already; choose another folder")
        self.start = time.perf_counter() - self.seconds
        self.bar = tqdm(total=args.total_timesteps, initial=self.step, unit=" steps",
                        unit_scale=True, disable=None if self.is_main else True)
        if not self.is_main:
            return
        if args.track:
            import wandb

            self.wandb = wandb.init(project=args.wandb_project, name=self.dir.name,
                                    id=self.wandb_id, resume="allow", config=asdict(args))
            self.wandb_id = self.wandb.id
        self.dir.mkdir(parents=True, exist_ok=True)
        (self.dir / "args.json").write_text(json.dumps(asdict(args), indent=2))
        self.csv = (self.dir / "metrics.csv").open("a", buffering=1)
        # Drop rows that are newer than the checkpoint.
        self.csv.seek(self.csv.truncate(min(self.csv_size, self.csv.tell())))

    def reached(self, goal):
        """Whether goal is not None, 100 episodes have ended, and the score is at least goal."""
        return goal is not None and len(self.returns) == 100 and self.score >= goal

    def write(self, steps, returns, **metrics):
        """Log one iteration: its environment steps, returns of the episodes, and metrics."""
        self.step, self.iteration = self.step + steps, self.iteration + 1
        self.seconds = time.perf_counter() - self.start
        self.returns = (self.returns + returns)[-100:]
        self.score = float(np.mean(self.returns)) if self.returns else np.nan
        self.bar.set_postfix(score=f"{self.score:.1f}", refresh=False)
        self.bar.update(steps)
        if not self.is_main:
            return
        row = {"step": self.step, "seconds": self.seconds, "score": self.score, **metrics}
        if self.csv.tell() == 0:
            print(*row.keys(), sep=",", file=self.csv)  # header
        print(*row.values(), sep=",", file=self.csv)
        if self.wandb:
            self.wandb.log(row, step=self.step)
        self.csv_size = self.csv.tell()
        # A copy: the next iteration changes the tensors, and may be interrupted halfway.
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state["progress"] = {name: getattr(self, name) for name in PROGRESS}
        self.checkpoint = copy.deepcopy(state | {"args": asdict(self.args)})
        if self.iteration % 10 == 0:
            self.save()

    def save(self):
        """Write checkpoint.pt, first under another name, so that it is always complete."""
        torch.save(self.checkpoint, self.dir / "checkpoint.tmp")
        (self.dir / "checkpoint.tmp").replace(self.dir / "checkpoint.pt")

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        self.bar.close()
        if self.is_main and self.checkpoint:
            self.save()  # the last whole iteration, also after an error in this process
            print(f"score {self.score:.1f} after {self.step:,} steps; files in {self.dir}")
        if kind is KeyboardInterrupt:
            raise SystemExit(130)


if __name__ == "__main__":
    args = parse_args()
    if args.eval_only:
        setup(args)
        evaluate(args, args.eval_only)
    else:
        train(args)
