# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "gymnasium==1.4.0", "tyro==1.0.17", "wandb==0.31.0", "tqdm==4.70.1",
# ]
# ///
"""REINFORCE with baseline: only the part of a return that was not expected moves the policy.

A policy π(a|s, θ) plays whole episodes S_0, A_0, R_1, S_1, ..., R_T, and J(θ) = E[Σ_t γ^t R_{t+1}]
is to grow, as in REINFORCE. From each return a learned estimate v̂(S_t, w) of it is subtracted.
This leaves the gradient's mean as it was, since v̂ does not depend on the action and E[∇log π] = 0,
and as a rule makes its variance smaller. Equation numbers are Sutton & Barto's,
Reinforcement Learning, 2nd edition (2018), incompleteideas.net/book/the-book-2nd.html:

    G_t = R_{t+1} + γ G_{t+1}                             (3.9)   the return from step t on
    ρ_t = π(A_t|S_t) / μ(A_t|S_t)                         (5.3)   one factor of the importance ratio
    w ← w + α_w (G_t − v̂(S_t, w)) ∇v̂(S_t, w)              (9.7)   towards the returns as they came
    θ ← θ + α γ^t (G_t − v̂(S_t, w)) ∇log π(A_t|S_t, θ)    (13.11) summed over the steps t

What the book leaves open, or what is done otherwise here:
[C1] γ^t stands in the book's box but not in its (13.11), which takes γ = 1. With γ^t the mean of it
     is ∇J exactly, so it is the default. Most programs drop it (--no-exact-discount): late steps
     then count in full, and the update is the gradient of no objective. At γ = 1 both are the same.
[C2] One Adam step on the mean over N episodes, where the book takes a plain step after each.
[C3] An episode that a time limit cuts off has ended: nothing is added for what might have followed.
[C4] --epsilon draws actions from μ = (1−ε)π + ε·uniform. Reward k times ρ_0 ρ_1 ... ρ_k keeps the
     gradient unbiased; the ratio of step t alone would not. Its variance grows with the episode.
     The baseline of step t is multiplied by ρ_0 ... ρ_t: then its mean is zero under μ too.
[C5] v̂ learns from the returns as they came, unweighted, by its mean error over all steps: any
     baseline is a right one.

Shapes: T steps of the longest episode, N environments, O numbers an observation, A an action.

    python reinforce_baseline.py --env-id CartPole-v1
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import Literal

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
    total_timesteps: int = 500_000  # environment steps in all
    learning_rate: float = 5e-3  # Adam's step size α
    value_learning_rate: float = 1e-2  # Adam's step size α_w for the baseline
    num_envs: int = 32  # N: episodes per update, all played at once
    gamma: float = 1.0  # discount factor γ
    exact_discount: bool = True  # weight step t by γ^t, as the exact gradient does [C1]
    epsilon: float = 0.0  # share of uniformly random actions, corrected for; Discrete only [C4]
    eval_episodes: int = 0  # episodes of the most probable actions to play after training
    stop_at: float | None = None  # end when the mean return of 100 episodes reaches this
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda where there is one
    run_dir: str = ""  # folder for the run's files; default runs/<script>-<env>-<seed>-<time>
    resume: str = ""  # folder of a run to continue there; its flags become the defaults
    checkpoint_every: int = 10  # iterations from one checkpoint to the next
    track: bool = False  # mirror the metrics to Weights & Biases
    wandb_project: str = "policy-gradients"  # project there


def returns_to_go(reward, gamma):
    """Discounted sum of the rewards from each step on, (T, N), from reward (T, N)."""
    returns, later = torch.zeros_like(reward), torch.zeros_like(reward[0])
    for t in reversed(range(len(reward))):
        returns[t] = later = reward[t] + gamma * later                            # (3.9)
    return returns


def discounts(num_steps, gamma, device):
    """γ^t for t = 0, 1, ..., (T, 1)."""
    return gamma ** torch.arange(num_steps, device=device).unsqueeze(-1)


def importance_weight(logprob, epsilon, num_actions):
    """ρ_0 ρ_1 ... ρ_t for actions drawn from μ, (T, N), from log π of these actions (T, N)."""
    behaviour = (1 - epsilon) * logprob.exp() + epsilon / num_actions             # [C4]
    return (logprob - behaviour.log()).cumsum(0).exp()                            # (5.3)


def policy_gradient_loss(logprob, weight, mask):
    """A scalar with gradient −∇J in expectation; log π(A_t|S_t), its weight and mask are (T, N)."""
    return -(weight * logprob * mask).sum(0).mean()


def value_loss(value, returns, mask):
    """Half the mean squared error of v̂ over the steps that count, a scalar; inputs (T, N)."""
    return ((returns - value).square() * mask).sum() / (2 * mask.sum())           # (9.7), negated


def mlp(sizes, gain):
    """Linear layers of these sizes, tanh between; orthogonal weights, `gain` scales the last's."""
    layers, gains = [], [2**0.5] * (len(sizes) - 2) + [gain]
    for fan_in, fan_out, scale in zip(sizes, sizes[1:], gains):
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
        self.net = mlp([obs_size, 64, 64, self.size], gain=0.01)  # no action favoured
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
        self.net = mlp([obs_size, 64, 64, 1], gain=1.0)

    def forward(self, obs):
        return self.net(obs).squeeze(-1)


def behave(policy, obs, epsilon):
    """Actions (N,) drawn from μ = (1−ε)π + ε·uniform for obs (N, O); from π where epsilon is 0."""
    action = policy.sample(obs)
    if epsilon == 0:
        return action
    explore = torch.rand(action.shape, device=action.device) < epsilon
    return torch.where(explore, torch.randint_like(action, policy.size), action)  # [C4]


@torch.no_grad()
def play_episodes(envs, policy, epsilon, seed):
    """One whole episode in each environment: obs (T, N, O), action, reward (T, N), mask (T, N).

    mask is False after an environment's first end: what it plays on belongs to no episode here.
    """
    obs, steps = envs.reset(seed), []
    mask = torch.ones(len(obs), dtype=torch.bool, device=obs.device)
    while mask.any():
        action = behave(policy, obs, epsilon)
        next_obs, reward, terminated, truncated = envs.step(action)
        steps.append((obs, action, reward * mask, mask))
        obs, mask = next_obs, mask & ~(terminated | truncated)                    # [C3]
    return [torch.stack(column) for column in zip(*steps)]


def train(args):
    """Train as the flags say; returns the score, the mean return of the last 100 episodes."""
    device = prepare(args)
    envs = Envs(args.env_id, args.num_envs, device)
    policy = Policy(envs.obs_size, envs.action_space).to(device)
    if args.epsilon > 0 and not policy.discrete:
        fail(f"--epsilon {args.epsilon}: {args.env_id} has no Discrete actions to draw uniformly")
    value = Value(envs.obs_size).to(device)
    optimizer = torch.optim.Adam([
        {"params": policy.parameters(), "lr": args.learning_rate},
        {"params": value.parameters(), "lr": args.value_learning_rate}], fused=True)
    with Run(args, envs.threshold, policy=policy, value=value, optimizer=optimizer) as run:
        while not run.finished:
            seed = [args.seed, run.iteration]
            obs, action, reward, mask = play_episodes(envs, policy, args.epsilon, seed)
            logprob, entropy = policy(obs, action)                                # (T, N)
            rho = torch.ones_like(reward)
            if args.epsilon > 0:
                rho = importance_weight(logprob.detach(), args.epsilon, policy.size)  # (T, N)
            baseline = value(obs)                                                 # (T, N)
            weight = returns_to_go(rho * reward, args.gamma) - rho * baseline.detach()
            if args.exact_discount:
                weight = weight * discounts(len(weight), args.gamma, device)      # [C1]
            loss = policy_gradient_loss(logprob, weight, mask)                    # (13.11), negated
            loss_v = value_loss(baseline, returns_to_go(reward, args.gamma), mask)  # [C5]
            optimizer.zero_grad()
            (loss + loss_v).backward()  # θ and w share nothing: each loss moves its own
            optimizer.step()                                                      # [C2]
            norm = nn.utils.get_total_norm([param.grad for param in policy.parameters()])
            run.log(mask.sum(), reward.sum(0), loss=loss, entropy=entropy[mask].mean(),
                    grad_norm=norm, value_loss=loss_v)
        run.save()
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
        with blamed(f"--env-id {env_id}"):
            self.envs = gym.make_vec(env_id, num_envs)
        self.device, mode = device, self.envs.metadata.get("autoreset_mode")
        obs_space, self.action_space = (
            self.envs.single_observation_space, self.envs.single_action_space)
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
        return self.tensor("observation", self.envs.reset(seed=seed)[0]).view(-1, self.obs_size)

    def step(self, action):
        """obs (N, O), reward, terminated and truncated (N,), from actions as the policy draws."""
        action = action.cpu().numpy()
        if isinstance(self.action_space, Box):  # clipped for the environment alone
            low, high = self.action_space.low, self.action_space.high
            action = action.reshape(-1, *low.shape).clip(low, high).astype(low.dtype)
        else:
            action = action + self.action_space.start
        obs, reward, *ends, _ = self.envs.step(action)
        terminated, truncated = (torch.tensor(end, device=self.device) for end in ends)
        obs = self.tensor("observation", obs).view(-1, self.obs_size)
        return obs, self.tensor("reward", reward), terminated, truncated

    def tensor(self, name, array):
        tensor = torch.tensor(array, dtype=torch.float32)  # always a copy
        if not tensor.isfinite().all():
            raise FloatingPointError(name)
        return tensor.to(self.device)


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
