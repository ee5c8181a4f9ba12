# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "gymnasium==1.4.0", "tyro==1.0.17", "wandb==0.31.0", "tqdm==4.70.1",
# ]
# ///
"""Actor-critic: after every single step, ask a learned value whether it went better than expected.

The critic v̂(s, w) estimates the return to come. Its error δ on one step says how much better that
step was than expected; δ moves the critic towards what it has seen and the actor π(a|s, θ) towards
the action if δ > 0, away from it if δ < 0. Eligibility traces z remember which parameters were
active in earlier steps and give them their share. Numbers and boxes are those of Sutton & Barto,
Reinforcement Learning, 2nd edition (2018), incompleteideas.net/book/the-book-2nd.html:

    δ = R + γ v̂(S', w) − v̂(S, w),  v̂(terminal) = 0     (12.6)  episodic tasks, box of 13.5
    δ = R − R̄ + v̂(S', w) − v̂(S, w),  R̄ ← R̄ + α_R δ     (10.10) continuing tasks, box of 13.6
    z_w ← γ λ z_w + ∇v̂(S, w)                           (12.5)  the critic's trace
    z_θ ← γ λ z_θ + I ∇log π(A|S, θ)                   (12.5)  the actor's; I = γ^t, see [C1]
    w ← w + α_w δ z_w,  θ ← θ + α_θ δ z_θ              (12.7)  after each step

What the book leaves open, or what is done otherwise here:
[C1] I = γ^t is the book's, and makes the updates add up to the gradient of E[Σ γ^t R]. Most
     programs leave it out (--no-exact-discount, I = 1), so that late steps count in full.
[C2] N environments step together, each with traces of its own; the update is the mean of δ z.
     One λ serves both traces, where the book has two.
[C3] Adam takes δ z for its gradient, and the step size falls linearly to 0. In the book the step is
     plain and constant. With Adam the update is no longer proportional to δ z.
[C4] At a time limit the episode stops but the task does not: δ bootstraps from v̂(S'), then the
     traces are cleared. Only a terminal state has value 0.
[C5] --continuing: reaching a terminal state is an ordinary move, and so is the next step, by which
     the environment starts again whatever the action. Only a time limit interrupts the stream.
     The score is then of rewards per step, one mean for each row of the log, not of returns.

Shapes: N environments, O numbers in an observation, A in an action, P parameters of both networks.

    python actor_critic.py --env-id CartPole-v1
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
from torch.func import functional_call, grad, vmap
from tqdm import tqdm


@dataclasses.dataclass(frozen=True)
class Args:
    env_id: str = "CartPole-v1"  # any registered environment; "module:Env-v0" imports module first
    seed: int = 1  # of the weights, the actions and the environments
    total_timesteps: int = 500_000  # environment steps in all
    learning_rate: float = 1e-3  # Adam's step size α_θ for the actor, at the start
    value_learning_rate: float = 3e-3  # Adam's step size α_w for the critic, at the start
    num_envs: int = 64  # N: environments stepped together
    gamma: float = 0.99  # discount factor γ
    trace_lambda: float = 0.9  # λ: 0 is one-step actor-critic, 1 sums up whole returns
    exact_discount: bool = True  # weight the actor's step t by I = γ^t [C1]
    continuing: bool = False  # maximise the mean reward per step, without γ [C5]
    average_reward_rate: float = 1e-3  # α_R, step size of the mean reward R̄
    log_every: int = 32  # updates per row of metrics.csv
    eval_episodes: int = 0  # episodes of the most probable actions to play after training
    stop_at: float | None = None  # end when the mean return of 100 episodes reaches this
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda where there is one
    run_dir: str = ""  # folder for the run's files; default runs/<script>-<env>-<seed>-<time>
    resume: str = ""  # folder of a run to continue there; its flags become the defaults
    checkpoint_every: int = 10  # iterations from one checkpoint to the next
    track: bool = False  # mirror the metrics to Weights & Biases
    wandb_project: str = "policy-gradients"  # project there


def td_error(reward, value, next_value, terminated, gamma, average_reward=0.0):
    """δ (N,), all inputs (N,); for a continuing task gamma is 1 and average_reward is R̄."""
    return reward - average_reward + gamma * next_value * ~terminated - value     # (12.6) (10.10)


def accumulate(trace, gradient, decay, valid):
    """z ← γλ z + ∇, both (N, P); a row that is no transition, valid (N,) False, adds nothing."""
    return decay * trace + valid.unsqueeze(-1) * gradient                         # (12.5)


def per_env_gradient(model, obs, action, discount):
    """What the traces take up: I ∇log π(A|S, θ) and ∇v̂(S, w) side by side, (N, P), for each of N.

    θ and w share no parameter, so one pass through the sum I log π + v̂ yields both.
    """
    def objective(params, obs, action, discount):
        logprob, value = functional_call(model, params, (obs, action))
        return discount * logprob + value

    params = dict(model.named_parameters())
    gradient = vmap(grad(objective), in_dims=(None, 0, 0, 0))(params, obs, action, discount)
    return torch.cat([rows.flatten(1) for rows in gradient.values()], dim=1)


def apply_update(model, update):
    """Leave −update (P,) in the parameters' .grad, for an optimizer that descends."""
    params = list(model.parameters())
    for param, part in zip(params, update.split([p.numel() for p in params])):
        param.grad = -part.view_as(param)


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


class ActorCritic(nn.Module):
    """Actor π(a|s, θ), critic v̂(s, w), and the mean reward R̄ of a continuing task."""

    def __init__(self, obs_size, action_space):
        super().__init__()
        self.policy = Policy(obs_size, action_space)
        self.value = Value(obs_size)
        self.register_buffer("average_reward", torch.zeros(()))

    def forward(self, obs, action):
        """log π(A|S) and v̂(S), both (...)."""
        return self.policy(obs, action)[0], self.value(obs)


class Stream:
    """What each of N environments carries from one step to the next; all begins anew at a reset."""

    def __init__(self, obs, num_params):
        self.obs = obs                                                            # (N, O)
        self.valid = torch.ones(len(obs), dtype=torch.bool, device=obs.device)    # (N,)
        self.discount = torch.ones(len(obs), device=obs.device)                   # I (N,)
        self.trace = torch.zeros(len(obs), num_params, device=obs.device)         # (N, P)


def learn(model, stream, action, reward, next_obs, terminated, done, gamma, trace_lambda,
          exact_discount=True):
    """Leave the update after a step of each environment in .grad; returns δ (N,), update norm ().

    δ is that of the weights before the update. Where stream.valid is False the step only reset
    its environment and changes nothing. A trace is cleared after the last δ has been credited.
    """
    value, next_value = model.value(torch.stack([stream.obs, next_obs]))          # (N,), (N,)
    delta = td_error(reward, value, next_value, terminated, gamma, model.average_reward)
    delta = delta * stream.valid
    gradient = per_env_gradient(model, stream.obs, action, stream.discount)       # (N, P)
    trace = accumulate(stream.trace, gradient, gamma * trace_lambda, stream.valid)  # (N, P)
    update = delta @ trace / stream.valid.sum().clamp(min=1)                      # (12.7) [C2]
    apply_update(model, update)
    if exact_discount:
        discount = torch.where(stream.valid, gamma * stream.discount, stream.discount)
        stream.discount = discount.masked_fill(done, 1.0)                         # [C1]
    stream.obs, stream.valid = next_obs, ~done
    stream.trace = trace * ~done.unsqueeze(-1)                                    # [C4]
    return delta, update.norm()


def running_sums(reward, done, carried, gamma):
    """What each episode has gathered up to each step, earlier rewards discounted, (T, N).

    reward, done (T, N). carried (N,): zeros at first, then what the last call returned as second.
    """
    sums = []
    for t in range(len(reward)):
        sums.append(reward[t] + gamma * carried)
        carried = sums[-1] * ~done[t]  # also at a time limit: the next episode begins from nothing
    return torch.stack(sums), carried


@torch.no_grad()  # torch.func.grad, which makes all gradients here, takes no notice of it
def train(args):
    """Train as the flags say; returns the score, the mean return of the last 100 episodes."""
    device = prepare(args)
    envs = Envs(args.env_id, args.num_envs, device)
    model = ActorCritic(envs.obs_size, envs.action_space).to(device)
    networks = {model.policy: args.learning_rate, model.value: args.value_learning_rate}
    optimizer = torch.optim.Adam([{"params": net.parameters()} for net in networks], fused=True)
    gamma = 1.0 if args.continuing else args.gamma
    threshold = None if args.continuing else envs.threshold  # which is of returns
    with Run(args, threshold, model=model, optimizer=optimizer) as run:
        obs = envs.reset([args.seed, run.iteration])
        stream = Stream(obs, sum(param.numel() for param in model.parameters()))
        running = torch.zeros(args.num_envs, device=device)
        while not run.finished:
            for group, rate in zip(optimizer.param_groups, networks.values()):
                group["lr"] = rate * (1 - run.step / args.total_timesteps)
            steps = []
            for _ in range(args.log_every):
                valid, action = stream.valid, model.policy.sample(stream.obs)
                obs, reward, terminated, truncated = envs.step(action)
                if args.continuing:
                    terminated = torch.zeros_like(terminated)                     # [C5]
                done = terminated | truncated
                delta, norm = learn(model, stream, action, reward, obs, terminated, done, gamma,
                                    args.trace_lambda, args.exact_discount)
                if not norm.isfinite():  # before it can spoil the weights
                    raise FloatingPointError("update")
                if valid.any():  # else Adam would go on by its momentum
                    optimizer.step()                                              # [C3]
                if args.continuing:
                    model.average_reward += args.average_reward_rate * delta.mean()  # (10.10)
                steps.append((reward, done, valid, delta, norm))
            reward, done, valid, delta, norm = (torch.stack(column) for column in zip(*steps))
            sums, running = running_sums(reward, done, running, gamma=1.0)        # (T, N)
            count, returns = valid.sum().clamp(min=1), sums[done]
            if args.continuing:  # the score is the mean reward of a step
                returns = (reward * valid).sum().view(1) / count
            run.log(reward.numel(), returns, squared_td_error=delta.square().sum() / count,
                    entropy=model.policy(obs, action)[1].mean(), grad_norm=norm.mean(),
                    average_reward=model.average_reward)
        run.save()
        if args.eval_episodes > 0:
            evaluate(args, model.policy, device)
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
