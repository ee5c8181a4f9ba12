# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "gymnasium==1.4.0", "tyro==1.0.17", "wandb==0.31.0", "tqdm==4.70.1",
# ]
# ///
"""PPO: several gradient steps on one batch, but nothing to gain from moving the policy too far.

N environments play T steps with the policy π_old. With the help of a learned value V each action is
told by how much it did better than expected: its advantage Â. Then π goes through the batch several
times. The ratio r says how much more probable π makes an action than π_old did; once r has left
[1−ε, 1+ε] in the direction that Â asks for, the clipped objective pushes no further. Equation
numbers: Schulman et al., Proximal Policy Optimization Algorithms (2017), arXiv 1707.06347:

    r_t(θ) = π(a_t|s_t) / π_old(a_t|s_t)                                 (6)
    L_clip(θ) = mean of min(r Â, clip(r, 1−ε, 1+ε) Â)                    (7)
    L(θ) = L_clip − c_1 (V(s) − V_target)² + c_2 entropy of π            (9)
    Â_t = δ_t + γλ δ_{t+1} + (γλ)² δ_{t+2} + ...                         (11)
    δ_t = r_t + γ V(s_{t+1}) − V(s_t)                                    (12)

What the paper leaves open, or does otherwise:
[C1] A terminal state has value 0. A time limit ends the episode, not what its state is worth: δ
     bootstraps from V of the true last observation, and only the sum (11) is cut.
[C2] The step after an episode's end only resets its environment. It is no transition, and such rows
     are dropped from every loss, mean and standard deviation.
[C3] V_target = Â + V(s) with the V from before the update. Policy and value share no weights.
[C4] Advantages are normalised to mean 0 and standard deviation 1 within each minibatch.
[C5] The step size, and with --anneal-clip ε, falls linearly to 0. Adam's epsilon is 1e-5. The
     gradient of all parameters together is scaled down where it is longer than --max-grad-norm.
[C6] The reported KL is the mean of r − 1 − log r, http://joschu.net/blog/kl-approx.html. With
     --target-kl the update ends before the first step at which it exceeds 1.5 times the target.

Shapes: T steps, N environments, M rows of a minibatch, O numbers in an observation, A in an action.

    python ppo.py --env-id CartPole-v1
"""

import dataclasses
import json
import math
import re
import sys
import time
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.spaces import Box, Discrete
from torch import nn
from tqdm import tqdm


@dataclasses.dataclass(frozen=True)
class Args:
    env_id: str = "CartPole-v1"  # any registered environment; "module:Env-v0" imports module first
    seed: int = 1  # of the weights, the actions and the environments
    total_timesteps: int = 200_000  # environment steps in all
    learning_rate: float = 6e-3  # Adam's step size at the start
    anneal_lr: bool = True  # let it fall linearly to 0 [C5]
    num_envs: int = 64  # N: environments stepped together
    num_steps: int = 32  # T: steps of each environment per batch
    gamma: float = 0.98  # discount factor γ
    gae_lambda: float = 0.95  # λ: 0 trusts V after one step, 1 sums up rewards to the end
    num_minibatches: int = 8  # parts into which each epoch cuts the batch
    update_epochs: int = 3  # passes through the batch
    clip_coef: float = 0.2  # ε of the clipped objective
    anneal_clip: bool = False  # let ε fall linearly to 0 [C5]
    ent_coef: float = 0.0  # c_2, weight of the entropy
    vf_coef: float = 0.5  # c_1, weight of the value's squared error
    max_grad_norm: float = 0.5  # longest gradient [C5]
    target_kl: float | None = None  # end an update early when the policy has moved too far [C6]
    eval_episodes: int = 0  # episodes of the most probable actions to play after training
    stop_at: float | None = None  # end when the mean return of 100 episodes reaches this
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda where there is one
    run_dir: str = ""  # folder for the run's files; default runs/<script>-<env>-<seed>-<time>
    resume: str = ""  # folder of a run to continue; its flags become the defaults
    checkpoint_every: int = 10  # iterations from one checkpoint to the next
    track: bool = False  # mirror the metrics to Weights & Biases
    wandb_project: str = "policy-gradients"  # project there


def gae(reward, value, terminated, done, gamma, gae_lambda):
    """Generalised advantage estimates (T, N) from reward, terminated, done (T, N), value (T+1, N).

    value[t+1] belongs to the observation after step t, which is the true last one where an episode
    has ended there: so a time limit bootstraps from it, and a terminal state does not.
    """
    delta = reward + gamma * value[1:] * ~terminated - value[:-1]                 # (12) [C1]
    advantage, later = torch.zeros_like(reward), torch.zeros_like(reward[0])
    for t in reversed(range(len(reward))):
        advantage[t] = later = delta[t] + gamma * gae_lambda * later * ~done[t]   # (11)
    return advantage


def normalize(advantage):
    """Mean 0 and standard deviation 1 over (M,), M at least 2."""
    return (advantage - advantage.mean()) / (advantage.std() + 1e-8)              # [C4]


def ppo_loss(logprob, old_logprob, advantage, clip_coef):
    """Minus the clipped objective, a scalar to minimise; inputs (M,)."""
    ratio = (logprob - old_logprob).exp()                                         # (6)
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    return -torch.min(ratio * advantage, clipped * advantage).mean()              # (7), negated


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


def mlp(num_inputs, num_outputs, gain):
    """Two hidden layers of 64 tanh units, orthogonal weights; `gain` scales the last layer's."""
    layers, sizes = [], [num_inputs, 64, 64, num_outputs]
    for fan_in, fan_out, scale in zip(sizes, sizes[1:], [2**0.5, 2**0.5, gain]):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
        nn.init.orthogonal_(layers[-2].weight, scale)
        nn.init.zeros_(layers[-2].bias)
    return nn.Sequential(*layers[:-1])


class Policy(nn.Module):
    """π(a|s, θ): softmax for Discrete actions; Gaussian, one log-std for all states, for Box."""

    def __init__(self, obs_size, action_space):
        super().__init__()
        self.discrete = isinstance(action_space, Discrete)
        self.size = int(action_space.n) if self.discrete else math.prod(action_space.shape)
        self.net = mlp(obs_size, self.size, gain=0.01)  # small: no action is favoured at first
        self.log_std = None if self.discrete else nn.Parameter(torch.full((self.size,), -0.5))

    def sample(self, obs):
        """Actions drawn from π, (N,) where Discrete, (N, A) where Box, from obs (N, O)."""
        output = self.net(obs)
        if self.discrete:
            return output.softmax(-1).multinomial(1).squeeze(-1)
        return output + self.log_std.exp() * torch.randn_like(output)

    def mode(self, obs):
        """The most probable actions, shaped like sample's."""
        output = self.net(obs)
        return output.argmax(-1) if self.discrete else output

    def forward(self, obs, action):
        """log π(action|obs) and the entropy of π(·|obs), both (...), from obs (..., O)."""
        output = self.net(obs)
        if self.discrete:
            logprobs = output.log_softmax(-1)
            entropy = -(logprobs.exp() * logprobs).sum(-1)
            return logprobs.gather(-1, action.unsqueeze(-1)).squeeze(-1), entropy
        peak = -self.log_std - math.log(2 * math.pi) / 2  # log-density at the mean, per dimension
        logprob = peak - ((action - output) / self.log_std.exp()).square() / 2
        return logprob.sum(-1), (0.5 - peak).sum().expand(output.shape[:-1])


class Value(nn.Module):
    """v̂(s, w), the return to expect from a state: (...) from obs (..., O)."""

    def __init__(self, obs_size):
        super().__init__()
        self.net = mlp(obs_size, 1, gain=1.0)

    def forward(self, obs):
        return self.net(obs).squeeze(-1)


@torch.no_grad()
def rollout(envs, policy, obs, done, num_steps):
    """Play T steps on from obs (N, O), where done (N,) says whose episode has just ended.

    Returns obs (T+1, N, O) and action, reward, terminated, done, valid (T, N). Index t is the step
    out of obs[t]; valid is False where that step only reset its environment.
    """
    steps = []
    for _ in range(num_steps):
        action = policy.sample(obs)
        next_obs, reward, terminated, truncated = envs.step(action)
        valid, done = ~done, terminated | truncated                               # [C2]
        steps.append((obs, action, reward, terminated, done, valid))
        obs = next_obs
    every_obs, *columns = (torch.stack(column) for column in zip(*steps))
    return torch.cat([every_obs, obs.unsqueeze(0)]), *columns


def episode_returns(reward, done, running):
    """Returns of the episodes that end within reward (T, N), and the sums (N,) still running."""
    finished = []
    for t in range(len(reward)):
        running = running + reward[t]
        finished.append(running[done[t]])
        running = running * ~done[t]
    return torch.cat(finished), running


class Batch(NamedTuple):
    """What an update learns from, as rows: obs (R, O), action (R, ...), the others (R,)."""

    obs: torch.Tensor
    action: torch.Tensor
    logprob: torch.Tensor  # under π_old
    advantage: torch.Tensor
    target: torch.Tensor  # of the value


def update(policy, value, optimizer, batch, clip_coef, args):
    """Epochs of minibatch steps on the batch; returns the means of what happened in them."""
    params = optimizer.param_groups[0]["params"]
    reports = []
    num_rows, device = len(batch.obs), batch.obs.device
    for rows in minibatches(num_rows, args.update_epochs, args.num_minibatches, device):
        part = Batch(*(column[rows] for column in batch))
        logprob, entropy = policy(part.obs, part.action)                          # (M,)
        policy_loss = ppo_loss(logprob, part.logprob, normalize(part.advantage), clip_coef)
        value_loss = (value(part.obs) - part.target).square().mean()
        entropy = entropy.mean()
        loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy  # (9), negated
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(params, args.max_grad_norm)               # [C5]
        kl, clip_fraction = policy_change(logprob, part.logprob, clip_coef)
        reports.append(torch.stack([policy_loss, value_loss, entropy, norm, kl, clip_fraction]))
        if args.target_kl is not None and kl > 1.5 * args.target_kl:
            break                                                                 # [C6]
        optimizer.step()
    names = ["policy_loss", "value_loss", "entropy", "grad_norm", "approx_kl", "clip_fraction"]
    return dict(zip(names, torch.stack(reports).detach().mean(0)))


def train(args):
    """Train as the flags say; returns the score, the mean return of the last 100 episodes."""
    device = prepare(args)
    batch_size = args.num_envs * args.num_steps
    if args.num_steps < 2 or batch_size < max(4, 2 * args.num_minibatches):
        fail(f"--num-steps {args.num_steps} by --num-envs {args.num_envs}: a batch needs 2 steps, "
             f"4 rows, and 2 rows for each of --num-minibatches {args.num_minibatches}")
    if args.total_timesteps < batch_size:
        fail(f"--total-timesteps {args.total_timesteps}: less than one batch, {batch_size} steps")
    envs = Envs(args.env_id, args.num_envs, device)
    policy = Policy(envs.obs_size, envs.action_space).to(device)
    value = Value(envs.obs_size).to(device)
    optimizer = torch.optim.Adam([*policy.parameters(), *value.parameters()], eps=1e-5, fused=True)
    with Run(args, envs.threshold, policy=policy, value=value, optimizer=optimizer) as run:
        obs = envs.reset([args.seed, run.iteration]).unsqueeze(0)
        done = torch.zeros(1, args.num_envs, dtype=torch.bool, device=device)
        running = torch.zeros(args.num_envs, device=device)
        while not run.finished:
            remaining = 1 - run.step / args.total_timesteps                       # [C5]
            rate = args.learning_rate * (remaining if args.anneal_lr else 1)
            clip_coef = args.clip_coef * (remaining if args.anneal_clip else 1)
            optimizer.param_groups[0]["lr"] = rate

            obs, action, reward, terminated, done, valid = rollout(
                envs, policy, obs[-1], done[-1], args.num_steps)
            with torch.no_grad():
                old_value = value(obs)                                            # (T+1, N)
                old_logprob, _ = policy(obs[:-1], action)                         # (T, N)
            advantage = gae(reward, old_value, terminated, done, args.gamma, args.gae_lambda)
            target = advantage + old_value[:-1]                                   # [C3]
            columns = obs[:-1], action, old_logprob, advantage, target
            batch = Batch(*(column[valid] for column in columns))                 # [C2]
            means = update(policy, value, optimizer, batch, clip_coef, args)

            returns, running = episode_returns(reward, done, running)
            unexplained = advantage[valid].var() / (target[valid].var() + 1e-8)
            run.log(batch_size, returns, explained_variance=1 - unexplained, learning_rate=rate,
                    **means)
        if args.eval_episodes > 0:
            evaluate(args, policy, device)
    return run.score


# Below this line nothing is needed to understand the algorithm: environments, evaluation, files.


class Envs:
    """N copies of a gymnasium environment stepped together, with tensors in and out.

    After an episode's end the next step ignores its action and returns the first observation of
    the next episode and reward 0. Raises FloatingPointError where a value is not finite.
    """

    def __init__(self, env_id, num_envs, device):
        try:
            self.envs = gym.make_vec(env_id, num_envs)
        except (gym.error.Error, ImportError) as error:
            fail(f"--env-id {env_id}: {error}")
        self.device, self.action_space = device, self.envs.single_action_space
        obs_space, mode = self.envs.single_observation_space, self.envs.metadata["autoreset_mode"]
        if not isinstance(obs_space, Box) or not isinstance(self.action_space, (Discrete, Box)):
            fail(f"--env-id {env_id}: its observations are {obs_space}, its actions "
                 f"{self.action_space}; supported are Box, and Discrete or Box")
        if mode != gym.vector.AutoresetMode.NEXT_STEP:
            fail(f"--env-id {env_id}: autoreset mode {mode} is not supported, only NEXT_STEP")
        self.obs_size = math.prod(obs_space.shape)
        self.threshold = self.envs.spec.reward_threshold

    def reset(self, seed):
        """Begin new episodes, the same for the same list of integers `seed`; returns obs (N, O)."""
        seed = int(np.random.SeedSequence(seed).generate_state(1)[0]) >> 1  # to fit in 31 bits
        return self.tensor("observation", self.envs.reset(seed=seed)[0]).flatten(1)

    def step(self, action):
        """obs (N, O), reward, terminated and truncated (N,), from actions as the policy draws."""
        action = action.cpu().numpy()
        if isinstance(self.action_space, Box):  # clipped for the environment alone
            low, high = self.action_space.low, self.action_space.high
            action = action.reshape(-1, *low.shape).clip(low, high)
        else:
            action = action + self.action_space.start
        obs, reward, *ends, _ = self.envs.step(action)
        terminated, truncated = (torch.tensor(end, device=self.device) for end in ends)
        obs = self.tensor("observation", obs).flatten(1)
        return obs, self.tensor("reward", reward), terminated, truncated

    def tensor(self, name, array):
        if not np.isfinite(array).all():
            raise FloatingPointError(name)
        return torch.tensor(array, dtype=torch.float32, device=self.device)  # always a copy


@torch.no_grad()
def evaluate(args, policy, device):
    """Play --eval-episodes episodes of the most probable actions; print their returns' mean."""
    envs = Envs(args.env_id, args.eval_episodes, device)
    obs, total = envs.reset([args.seed, 2**31]), torch.zeros(args.eval_episodes, device=device)
    alive = torch.ones_like(total, dtype=torch.bool)
    while alive.any():
        obs, reward, terminated, truncated = envs.step(policy.mode(obs))
        total, alive = total + reward * alive, alive & ~(terminated | truncated)
    spread = f"± {total.std(correction=0):.1f} ({total.min():.1f} to {total.max():.1f})"
    tqdm.write(f"evaluation: {len(total)} episodes, mean return {total.mean():.1f} {spread}")


class Run:
    """A run's progress, its folder (args.json, metrics.csv, checkpoint.pt) and what it shows.

    parts: what a checkpoint keeps, each with a state_dict; with --resume they get theirs back.
    """

    def __init__(self, args, threshold, **parts):
        self.args, self.threshold, self.parts = args, threshold, parts
        self.step, self.iteration, self.seconds, self.window, self.passed = 0, 0, 0.0, [], ""
        name = f"{Path(__file__).stem}-{args.env_id}-{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
        self.dir = Path(args.resume or args.run_dir or "runs/" + re.sub(r"[^\w.-]+", "-", name))
        if args.resume:
            self.load()
        elif (self.dir / "checkpoint.pt").exists():
            fail(f"--run-dir {self.dir}: holds a run already; --resume it, or name another folder")
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            (self.dir / "args.json").write_text(json.dumps(dataclasses.asdict(args), indent=2))
        except OSError as error:
            fail(f"--run-dir {self.dir}: {error}")
        self.metrics = open_metrics(self.dir / "metrics.csv", self.step)
        self.bar = tqdm(total=args.total_timesteps, initial=self.step, unit=" steps",
                        unit_scale=True, dynamic_ncols=True, disable=not sys.stderr.isatty())
        self.wandb = start_wandb(args, self.dir) if args.track else None
        self.clock = self.shown = time.perf_counter()
        self.save()

    @property
    def score(self):
        """Mean return of the last 100 episodes, NaN before the first has ended."""
        return sum(self.window) / len(self.window) if self.window else math.nan

    @property
    def finished(self):
        """Whether the steps are used up, or the last 100 episodes have reached --stop-at."""
        goal, full = self.args.stop_at, len(self.window) == 100
        reached = goal is not None and full and self.score >= goal
        return reached or self.step >= self.args.total_timesteps

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
        if self.iteration == 1:
            self.metrics.write(",".join(row) + "\n")
        self.metrics.write(",".join(f"{value:.8g}" for value in row.values()) + "\n")
        if not self.passed and self.threshold is not None and self.score >= self.threshold:
            self.passed = f"; {self.threshold:g} passed at {self.step:,}, {self.seconds:.1f} s"
        if self.iteration % self.args.checkpoint_every == 0:
            self.save()
        self.bar.set_postfix_str(f"score {self.score:.1f}", refresh=False)
        self.bar.update(min(self.step, self.bar.total) - self.bar.n)
        if self.bar.disable and now - self.shown > 5:
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
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state["run"] = {name: getattr(self, name) for name in KEPT}
        state["rng"] = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
        torch.save(state, self.dir / "checkpoint.tmp")
        (self.dir / "checkpoint.tmp").replace(self.dir / "checkpoint.pt")

    def load(self):
        """Take back what save wrote; weights_only, so that a stranger's file can run no code."""
        try:
            state = torch.load(self.dir / "checkpoint.pt", map_location="cpu", weights_only=True)
            for name, part in self.parts.items():
                if isinstance(part, torch.optim.Optimizer):  # the flags, not the file, set its rate
                    state[name]["param_groups"] = part.state_dict()["param_groups"]
                part.load_state_dict(state[name])
            for name in KEPT:
                setattr(self, name, state["run"][name])
            torch.set_rng_state(state["rng"][0])
            torch.cuda.set_rng_state_all(state["rng"][1:])
        except Exception as error:  # a file that is missing, torn or foreign fails in many ways
            fail(f"--resume {self.dir}: no checkpoint.pt of such a run there: {error}")

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        self.bar.close()
        if kind is FloatingPointError:
            fail(f"step {self.step}: {error} is not finite; the last good checkpoint: {self.dir}")
        if kind is KeyboardInterrupt:
            print(f"stopped; go on with --resume {self.dir}", file=sys.stderr)
            raise SystemExit(130)
        if kind is None:
            self.save()
            took = f"{self.step:,} steps, {self.seconds:.1f} s{self.passed}"
            print(f"score {self.score:.1f} after {took}; files in {self.dir}")


KEPT = ("step", "iteration", "seconds", "window", "passed")  # of Run, in the checkpoint


def open_metrics(path, step):
    """metrics.csv, to append to; lines that a killed run wrote after its checkpoint are dropped."""
    lines = path.read_text().splitlines(keepends=True) if step and path.exists() else []
    whole = [line for line in lines[1:] if line.endswith("\n") and int(line.split(",")[0]) <= step]
    path.write_text("".join(lines[:1] + whole))
    return path.open("a", buffering=1)


def start_wandb(args, folder):
    try:
        import wandb  # here, so that those who do not --track need not wait for it

        return wandb.init(project=args.wandb_project, config=dataclasses.asdict(args), dir=folder,
                          name=folder.name, id=folder.name, resume="allow")
    except Exception as error:  # wandb raises many kinds
        fail(f"--track: {error}")


def prepare(args):
    """Refuse numbers out of range, seed torch, set its threads; returns the device."""
    for field in dataclasses.fields(args):
        value, name = getattr(args, field.name), field.name.replace("_", "-")
        high = 1 if name in ("gamma", "gae-lambda", "trace-lambda", "epsilon") else 1e300
        low = 1 if type(value) is int and name not in ("seed", "eval-episodes") else 0
        if type(value) in (int, float) and name != "stop-at" and not low <= value <= high:
            fail(f"--{name} {value}: must be at least {low}" + " and at most 1" * (high == 1))
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
    args = tyro.cli(kind)
    if not args.resume:
        return args
    try:
        saved = kind(**json.loads(Path(args.resume, "args.json").read_text()))
    except (OSError, TypeError, ValueError) as error:
        fail(f"--resume {args.resume}: its args.json is not of such a run: {error}")
    return tyro.cli(kind, default=saved)


def fail(message):
    """End the program for a mistake of its user: one line on stderr, exit code 2."""
    print("error: " + " ".join(message.split("\n")[0].split()), file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    train(parse(Args))
