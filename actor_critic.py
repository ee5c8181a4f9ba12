# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "gymnasium==1.4.0", "tyro==1.0.17", "wandb==0.31.0", "tqdm==4.70.1",
# ]
# ///
"""Online actor-critic with eligibility traces (Sutton & Barto, sections 13.5 and 13.6).

Learn after every step instead of after whole episodes. The critic v̂(s; w) estimates the return
from a state. The TD error δ is positive if a step went better than the critic expected. If δ > 0,
the update raises v̂(S) and makes the action more likely under the policy π(a|s; θ), the actor; if
δ < 0, the reverse. Eligibility traces z give earlier states and actions a share of δ, multiplied by
γλ for each step back. Equation numbers refer to Sutton & Barto, Reinforcement Learning (2nd ed.,
2018):

    δ = R + γ v̂(S'; w) − v̂(S; w)             (12.6)         with v̂(terminal state) = 0
    z_w ← γλ z_w + ∇v̂(S; w)                  (12.5)         trace of the critic
    z_θ ← γλ z_θ + I ∇log π(A|S; θ)          (box of 13.5)  trace of the actor, I = γ^t [C1]
    w ← w + α_w δ z_w,   θ ← θ + α_θ δ z_θ   (12.7)         after every step

With --continuing the policy maximizes the average reward, which R̄ estimates. Then γ = I = 1, and

    δ = R − R̄ + v̂(S'; w) − v̂(S; w)           (10.10)
    R̄ ← R̄ + α_R δ                            (box of 13.6)

Implementation choices:
[C1] I = γ^t, with t the step in its episode, is the book's factor for E[Σ_t γ^t R_{t+1}]. Most
     implementations drop it, as --no-exact-discount does; late steps then count in full.
[C2] N environments step together, each with its own traces. The update is the mean of δ z over
     the valid steps (see step_envs). Both traces decay with the same λ.
[C3] The book's step is α δ z. Adam, which minimizes, gets −δ z as the gradient, and its step is not
     proportional to it.
[C4] A terminal state has value 0. At a time limit δ bootstraps from v̂(S'). Both end the episode:
     the next step, which only resets the environment, clears z, and I is 1 again.
[C5] With --continuing a terminal state does not end anything. The step that resets the environment
     after it is learned from like any other. Only time limits interrupt the task. The score is
     the mean reward per step. Use smaller step sizes: the results below have 1e-3 and 3e-3.
[C6] Box actions: the environment gets the sampled action scaled from [-1, 1] to its bounds and
     clipped. log π is that of the sample.

Shapes: N environments, O observation size, A action size, P parameters of both networks.

    python actor_critic.py --env-id CartPole-v1

Results, ten seeds (flags and raw rows in benchmarks/, seconds of training on two cores):
    CartPole-v1 to 475: 10 of 10 seeds, median 108,544 steps, 8 s
    Acrobot-v1 to -100: 7 of 10 seeds, median 123,392 steps, 16 s
    CartPole-v1, continuing, to 0.99: 10 of 10 seeds, median 271,360 steps, 22 s
"""

import json
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.spaces import Box, Discrete, flatdim
from torch import nn
from torch.distributions import Categorical, Independent, Normal
from torch.func import functional_call, grad, vmap
from tqdm import tqdm


@dataclass(frozen=True)
class Args:
    env_id: str = "CartPole-v1"  # gymnasium environment; "module:Env-v0" imports the module first
    seed: int = 1
    total_timesteps: int = 500_000  # environment steps
    learning_rate: float = 2e-3  # Adam step size of the policy
    value_learning_rate: float = 1e-2  # Adam step size of the critic
    num_envs: int = 64  # environments stepped together
    gamma: float = 0.99  # discount factor
    trace_lambda: float = 0.9  # trace decay: 0 is one-step actor-critic, 1 uses whole returns
    exact_discount: bool = True  # weight step t of the policy's update by gamma^t [C1]
    continuing: bool = False  # maximize the average reward, without discounting [C5]
    average_reward_rate: float = 1e-3  # step size of the average reward
    log_every: int = 32  # updates per row of metrics.csv
    max_episode_steps: int = 0  # in evaluation; 0: environment's limit, or 10000 if none
    stop_at: float | None = None  # stop when the score, a mean of 100, reaches this
    eval_episodes: int = 0  # greedy episodes after training, rounded up to whole batches
    device: str = "cpu"  # "cuda" works, but networks this small are faster on the CPU
    run_dir: str = ""  # output folder; default: runs/<script>-<env>-<seed>-<time>
    track: bool = False  # log to Weights & Biases
    wandb_project: str = "policy-gradients"


def td_error(reward, value, next_value, terminated, gamma, average_reward):
    """Compute δ (N,) from tensors (N,). A time limit does not count as terminated.

    With --continuing average_reward is R̄ and gamma is 1, otherwise average_reward is 0.
    """
    return reward - average_reward + gamma * next_value * ~terminated - value   # (12.6) (10.10)


def per_env_gradients(model, obs, action, discount):
    """Compute I ∇log π(A|S; θ) and ∇v̂(S; w), (N, P): a row for each environment.

    A row has first the columns of θ, then those of w, in the order of model.parameters(). Both are
    in the gradient of the sum I log π + v̂, since θ and w share no parameter. discount (N,) is I.
    """
    def objective(params, obs, action, discount):
        logprob, value = functional_call(model, params, (obs, action))
        return discount * logprob + value

    params = dict(model.named_parameters())
    gradients = vmap(grad(objective), in_dims=(None, 0, 0, 0))(params, obs, action, discount)
    return torch.cat([gradient.flatten(1) for gradient in gradients.values()], dim=1)


def mlp(input_size, output_size):
    """Two hidden layers of 64 tanh units. Weights start orthogonal, outputs near 0."""
    net = nn.Sequential(nn.Linear(input_size, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(),
                        nn.Linear(64, output_size))
    for layer, gain in (net[0], 2**0.5), (net[2], 2**0.5), (net[4], 0.01):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return net


class Policy(nn.Module):
    """π(a|s; θ): Categorical for Discrete actions, Gaussian with state-independent std for Box."""

    def __init__(self, obs_space, action_space):
        super().__init__()
        discrete = isinstance(action_space, Discrete)
        size = flatdim(action_space)  # number of actions or, for Box, of an action's dimensions
        self.net = mlp(flatdim(obs_space), size)
        # The mean starts near 0 and the standard deviation at 0.6; the actions' range is [-1, 1].
        self.log_std = None if discrete else nn.Parameter(torch.full((size,), -0.5))

    def forward(self, obs):
        """Return the action distribution, batch shape (...), for observations (..., O)."""
        output = self.net(obs)
        if self.log_std is None:
            return Categorical(logits=output, validate_args=False)  # validation is slow
        # Independent sums log-probabilities and entropies over the action's dimensions.
        return Independent(Normal(output, self.log_std.exp(), validate_args=False), 1)


class Value(nn.Module):
    """v̂(s; w): estimate of the return from a state."""

    def __init__(self, obs_space):
        super().__init__()
        self.net = mlp(flatdim(obs_space), 1)

    def forward(self, obs):
        """Return the values (...) of observations (..., O)."""
        return self.net(obs).squeeze(-1)


class ActorCritic(nn.Module):
    """The policy (actor) and the value (critic)."""

    def __init__(self, obs_space, action_space):
        super().__init__()
        self.policy = Policy(obs_space, action_space)
        self.value = Value(obs_space)

    def forward(self, obs, action):
        """Return log π(A|S) and v̂(S), both (...)."""
        return self.policy(obs).log_prob(action), self.value(obs)


def step_envs(envs, obs, action, valid, continuing):
    """Step all N environments.

    Returns a dict of obs and next_obs (N, O), action (N,) or (N, A), and reward, terminated, done
    and valid (N,). done: the episode ends here, terminated or at a time limit, and next_obs is its
    last observation. With continuing, terminated is always False, and done only at a time limit.

    The step after done only resets the environment: it ignores the action and returns the first
    observation of the next episode. Nothing can be learned from it. valid, which the caller
    passes, is False for such a step.
    """
    next_obs, reward, terminated, truncated, _ = envs.step(to_env_action(action, envs))  # [C6]
    terminated = terminated & (not continuing)                                  # [C5]
    return {"obs": obs, "action": action, "next_obs": to_tensor(next_obs, obs.device),
            "reward": torch.tensor(reward, dtype=torch.float32, device=obs.device),
            "terminated": torch.tensor(terminated, device=obs.device),
            "done": torch.tensor(terminated | truncated, device=obs.device), "valid": valid}


def learn(model, z, step, discount, gamma, trace_lambda, average_reward):
    """Compute the update for one step of all environments; store its negative in .grad.

    step comes from step_envs, z (N, P) holds the traces, discount (N,) is I. Returns δ (N,), the
    traces for the next step (N, P) and the norm of the update. Raises an error if that norm is not
    finite.
    """
    value, next_value = model.value(step["obs"]), model.value(step["next_obs"])
    delta = td_error(step["reward"], value, next_value, step["terminated"], gamma, average_reward)
    gradient = per_env_gradients(model, step["obs"], step["action"], discount)  # (N, P)
    # A step that only resets is not valid: it has no δ, adds nothing to z and clears it.
    delta = step["valid"] * delta
    z = step["valid"].unsqueeze(1) * (gamma * trace_lambda * z + gradient)      # (12.5) [C4]
    update = delta @ z / step["valid"].sum().clamp(min=1)                       # (12.7) [C2]
    norm = nn.utils.get_total_norm([update], error_if_nonfinite=True)
    params = list(model.parameters())  # in the same order as the columns of z
    for param, part in zip(params, update.split([param.numel() for param in params])):
        param.grad = -part.view_as(param)  # replaces the last one                # [C3]
    return delta, z, norm


@torch.no_grad()  # torch.func.grad works inside it, and nothing else needs gradients
def train(args):
    """Train a policy. Return it and the score.

    The score is the mean return of the last 100 episodes, with --continuing the mean reward per
    step in the last 100 rows of the log.
    """
    setup(args)
    envs = make_envs(args.env_id, args.num_envs, args.seed)
    if envs.metadata.get("autoreset_mode") != gym.vector.AutoresetMode.NEXT_STEP:
        raise SystemExit(f"--env-id {args.env_id}: needs autoreset mode NEXT_STEP")
    model = ActorCritic(envs.single_observation_space, envs.single_action_space).to(args.device)
    optimizer = torch.optim.Adam(model.policy.parameters(), args.learning_rate, fused=True)
    optimizer.add_param_group({"params": model.value.parameters(), "lr": args.value_learning_rate})
    gamma, r_bar_rate = (1.0, args.average_reward_rate) if args.continuing else (args.gamma, 0.0)
    obs = to_tensor(envs.reset()[0], args.device)  # (N, O)
    valid = torch.ones(args.num_envs, dtype=torch.bool, device=args.device)
    # z_θ and z_w side by side, (N, P)
    z = torch.zeros(args.num_envs, sum(p.numel() for p in model.parameters()), device=args.device)
    discount = torch.ones(args.num_envs, device=args.device)                    # I
    r_bar = torch.zeros((), device=args.device)                                 # R̄
    episode_return = torch.zeros(args.num_envs, device=args.device)
    with Logger(args, model.policy) as log:
        while log.step < args.total_timesteps and not log.reached(args.stop_at):
            scores = []
            for _ in range(args.log_every):  # one update in each turn; grouped only for the log
                pi = model.policy(obs)
                step = step_envs(envs, obs, pi.sample(), valid, args.continuing)
                delta, z, norm = learn(model, z, step, discount, gamma, args.trace_lambda, r_bar)
                if valid.any():  # with gradient 0, Adam would still move by its momentum
                    optimizer.step()
                # The box of 13.6. Without --continuing r_bar_rate is 0, and R̄ stays 0.
                r_bar += r_bar_rate * delta.sum() / valid.sum().clamp(min=1)
                reward, done = step["reward"], step["done"]
                if args.exact_discount:  # 1 in the first step of an episode, then γ, γ², ...
                    discount = torch.where(done | ~valid, 1, gamma * discount)  # [C1] [C4]
                episode_return += reward * valid
                scores.append(reward[valid] if args.continuing else episode_return[done])
                episode_return[done] = 0
                obs, valid = step["next_obs"], ~done  # the step after done only resets
            scores = torch.cat(scores)
            scores = scores.mean(0, keepdim=True) if args.continuing and len(scores) else scores
            # The metrics are those of the last step, where δ is 0 for a reset.
            log.write(args.log_every * args.num_envs, scores, average_reward=r_bar, grad_norm=norm,
                      squared_td_error=delta.square().mean(), entropy=pi.entropy().mean())
        envs.close()
        if args.eval_episodes:
            evaluate(args, model.policy)
    return model.policy, log.score


# --- The algorithm ends here. Below: environments, evaluation, logging. ---


def setup(args):
    """Check the device and seed all random number generators."""
    if not torch.get_device_module(args.device).is_available():
        raise SystemExit(f"--device {args.device}: not available here; use --device cpu")
    random.seed(args.seed)  # some environments draw from the global generators
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # networks this small are slower with two


def make_envs(env_id, num_envs, seed):
    """Return num_envs seeded environments that step together; exit if they are not supported."""
    try:
        envs = gym.make_vec(env_id, num_envs)
    except gym.error.Error as error:
        raise SystemExit(f"--env-id {env_id}: {error}") from error
    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    float_box = isinstance(action_space, Box) and np.issubdtype(action_space.dtype, np.floating)
    if not isinstance(obs_space, Box) or not (float_box or isinstance(action_space, Discrete)):
        raise SystemExit(f"--env-id {env_id}: needs Box observations and Discrete or float Box "
                         f"actions, has {obs_space} and {action_space}; ppo.py takes more")
    envs.reset(seed=seed)  # later resets continue these random generators
    return envs


def to_tensor(obs, device):
    """Copy observations (N, ...) into a float tensor (N, O)."""
    return torch.tensor(obs, dtype=torch.float32, device=device).reshape(len(obs), -1)


def to_env_action(action, envs):
    """Convert sampled actions to what the environments expect.

    Discrete actions count from space.start. Box actions are scaled from [-1, 1] to the bounds, then
    clipped. Dimensions with a bound that is infinite, or beyond 1e6, are not scaled.
    """
    action, space = action.detach().cpu().numpy(), envs.single_action_space
    if isinstance(space, Discrete):
        return (action + space.start).astype(space.dtype)
    bounded = np.maximum(-space.low, space.high).astype(np.float64) <= 1e6
    # low = -1 and high = 1 leave the action as it is
    low, high = np.where(bounded, space.low, -1), np.where(bounded, space.high, 1)
    action = (high + low) / 2 + (high - low) / 2 * action.reshape(-1, *space.shape)
    return action.astype(space.dtype).clip(space.low, space.high)


def evaluate(args, policy):
    """Play --eval-episodes episodes or more with the most likely actions; print the mean return."""
    # A seed far from those of training, so that the episodes are new.
    envs = make_envs(args.env_id, min(args.num_envs, args.eval_episodes), args.seed + 2**30)
    max_steps = args.max_episode_steps or envs.spec.max_episode_steps or 10_000
    returns = []
    while len(returns) < args.eval_episodes:
        obs, _ = envs.reset()
        running, episode_return = np.ones(envs.num_envs, dtype=bool), np.zeros(envs.num_envs)
        for _ in range(max_steps):
            action = policy(to_tensor(obs, args.device)).mode
            obs, reward, terminated, truncated, _ = envs.step(to_env_action(action, envs))
            episode_return += np.where(running, reward, 0)
            running = running & ~(terminated | truncated)
            if not running.any():
                break
        else:  # no break: some episodes are not over
            gym.logger.warn(f"cut episodes after {max_steps:,} steps")
        returns += episode_return.tolist()
    envs.close()
    tqdm.write(f"greedy evaluation: mean return {np.mean(returns):.1f} in {len(returns)} episodes")


class Logger:
    """Writes the run's folder (args.json, metrics.csv, policy.pt), progress bar and wandb."""

    def __init__(self, args, policy):
        self.policy, self.start, self.step = policy, time.perf_counter(), 0
        self.returns, self.score, self.wandb = [], np.nan, None
        name = f"{Path(__file__).stem}-{args.env_id}-{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
        name = f"{name}-{time.time_ns() % 10**9}".replace("/", "-").replace(":", "-")
        self.dir = Path(args.run_dir or f"runs/{name}")
        if (self.dir / "metrics.csv").exists():
            raise SystemExit(f"--run-dir {self.dir}: holds a run already; choose another folder")
        if args.track:
            import wandb

            self.wandb = wandb.init(project=args.wandb_project, name=name, config=asdict(args))
        self.dir.mkdir(parents=True, exist_ok=True)
        (self.dir / "args.json").write_text(json.dumps(asdict(args), indent=2))
        self.csv = (self.dir / "metrics.csv").open("w", buffering=1)
        self.bar = tqdm(total=args.total_timesteps, unit=" steps", unit_scale=True, disable=None)

    def reached(self, goal):
        """Whether goal is not None, 100 episodes have ended, and the score is at least goal."""
        return goal is not None and len(self.returns) == 100 and self.score >= goal

    def write(self, steps, returns, **metrics):
        """Log one row: number of environment steps, returns of the episodes, and metrics."""
        self.step += int(steps)
        self.returns = (self.returns + returns.tolist())[-100:]
        self.score = torch.tensor(self.returns).mean().item()
        row = {"step": self.step, "seconds": time.perf_counter() - self.start, "score": self.score}
        row |= {name: value.item() for name, value in metrics.items()}
        if self.csv.tell() == 0:
            print(*row.keys(), sep=",", file=self.csv)  # header
        print(*row.values(), sep=",", file=self.csv)
        self.bar.set_postfix(score=f"{self.score:.1f}", refresh=False)
        self.bar.update(int(steps))
        if self.wandb:
            self.wandb.log(row, step=self.step)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        self.bar.close()
        torch.save(self.policy.state_dict(), self.dir / "policy.pt")  # also on an error
        print(f"score {self.score:.1f} after {self.step:,} steps; files in {self.dir}")
        if kind is KeyboardInterrupt:
            raise SystemExit(130)


if __name__ == "__main__":
    train(tyro.cli(Args))
