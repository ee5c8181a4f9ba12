# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "gymnasium==1.4.0", "tyro==1.0.17", "wandb==0.31.0", "tqdm==4.70.1",
# ]
# ///
"""REINFORCE: Monte Carlo policy gradient (Williams, 1992).

Play whole episodes with the policy π(a|s; θ), then make each action more likely in proportion to
the return that followed it. This is gradient ascent on the expected return
J(θ) = E[Σ_t γ^t R_{t+1}]. There is no baseline; reinforce_baseline.py adds one. Equation numbers
refer to Sutton & Barto, Reinforcement Learning (2nd ed., 2018):

    G_t = R_{t+1} + γ G_{t+1}                  (3.9)   return from step t on
    θ ← θ + α Σ_t γ^t G_t ∇log π(A_t|S_t; θ)   (13.8)  times γ^t [C1], mean over episodes

Implementation choices:
[C1] The book has γ^t in its algorithm box but not in (13.8). With γ^t the expected gradient is
     exactly ∇J. Most implementations drop it, as --no-exact-discount does; the update is then no
     longer the gradient of J. No effect at the default γ = 1.
[C2] One Adam step on the mean over N episodes. The book takes one SGD step per time step.
[C3] A time limit, the environment's or --max-episode-steps, counts as the end of the episode: no
     value is added for what might have followed.
[C4] Box actions: the environment gets the sampled action scaled from [-1, 1] to its bounds and
     clipped. log π is that of the sample.

Shapes: T steps in the longest episode, N environments, O observation size, A action size.

    python reinforce.py --env-id CartPole-v1

Results, ten seeds (flags and raw rows in benchmarks/, seconds of training on two cores):
    CartPole-v1 to 475: 10 of 10 seeds, median 161,280 steps, 1 s
    Acrobot-v1 to -100: 7 of 10 seeds, median 197,217 steps, 12 s
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
from tqdm import tqdm


@dataclass(frozen=True)
class Args:
    env_id: str = "CartPole-v1"  # gymnasium environment; "module:Env-v0" imports the module first
    seed: int = 1
    total_timesteps: int = 500_000  # environment steps to learn from, not counting padding
    learning_rate: float = 7e-3  # Adam step size
    num_envs: int = 32  # episodes per update, played in parallel
    gamma: float = 1.0  # discount factor
    exact_discount: bool = True  # weight step t by gamma^t [C1]
    max_episode_steps: int = 0  # cut episodes here; 0: environment's limit, or 10000 if none
    stop_at: float | None = None  # stop when the mean return of 100 episodes reaches this
    eval_episodes: int = 0  # greedy episodes after training, rounded up to whole batches
    device: str = "cpu"  # "cuda" works, but networks this small are faster on the CPU
    run_dir: str = ""  # output folder; default: runs/<script>-<env>-<seed>-<time>
    track: bool = False  # log to Weights & Biases
    wandb_project: str = "policy-gradients"


def discounted_returns(reward, gamma):
    """Compute G_t for every step, (T, N); row t of reward (T, N) is R_{t+1}, 0 in the padding."""
    returns = torch.zeros_like(reward)
    G = torch.zeros_like(reward[0])
    for t in reversed(range(len(reward))):
        G = reward[t] + gamma * G                                             # (3.9)
        returns[t] = G
    return returns


def policy_gradient_loss(logprob, weight, mask):
    """Sum over steps, mean over episodes. log π, the weight of each step and mask are (T, N)."""
    return -(weight * logprob * mask).sum(0).mean()                           # (13.8), negated


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


@torch.no_grad()
def play_episodes(envs, policy, max_steps, device, greedy=False):
    """Play one episode in each of the N environments.

    Returns a dict with obs (T, N, O), action (T, N) or (T, N, A), reward (T, N) and mask (T, N).
    All environments step together until every episode has ended. Gymnasium resets those that end
    earlier; their further steps are padding, with mask False and reward 0.
    """
    next_obs, _ = envs.reset()
    running = np.ones(envs.num_envs, dtype=bool)
    steps = []
    while running.any() and len(steps) < max_steps:                           # [C3]
        obs = torch.tensor(next_obs, dtype=torch.float32, device=device).reshape(len(next_obs), -1)
        pi = policy(obs)
        action = pi.mode if greedy else pi.sample()
        next_obs, reward, terminated, truncated, _ = envs.step(to_env_action(action, envs))  # [C4]
        reward = torch.tensor(np.where(running, reward, 0), dtype=torch.float32, device=device)
        mask = torch.tensor(running, device=device)
        # A step that ends an episode still counts, so running changes after it is stored.
        steps.append({"obs": obs, "action": action, "reward": reward, "mask": mask})
        running = running & ~(terminated | truncated)                         # [C3]
    if running.any():
        gym.logger.warn(f"cut episodes after {max_steps:,} steps")
    return {name: torch.stack([step[name] for step in steps]) for name in steps[0]}


def train(args):
    """Train a policy. Return it and the score, the mean return of the last 100 episodes."""
    setup(args)
    envs = make_envs(args.env_id, args.num_envs, args.seed)
    max_steps = args.max_episode_steps or envs.spec.max_episode_steps or 10_000
    policy = Policy(envs.single_observation_space, envs.single_action_space).to(args.device)
    optimizer = torch.optim.Adam(policy.parameters(), args.learning_rate)
    with Logger(args, policy) as log:
        while log.step < args.total_timesteps and not log.reached(args.stop_at):
            batch = play_episodes(envs, policy, max_steps, args.device)
            weight = discounted_returns(batch["reward"], args.gamma)          # G_t, (T, N)
            if args.exact_discount:
                t = torch.arange(len(weight), device=weight.device).unsqueeze(1)  # (T, 1)
                weight = args.gamma**t * weight                               # [C1]
            pi = policy(batch["obs"])  # again, as play_episodes has no gradients
            loss = policy_gradient_loss(pi.log_prob(batch["action"]), weight, batch["mask"])
            optimizer.zero_grad()
            loss.backward()
            # max_norm inf clips nothing; a norm that is not finite raises an error before the step
            norm = nn.utils.clip_grad_norm_(policy.parameters(), np.inf, error_if_nonfinite=True)
            optimizer.step()                                                  # [C2]
            log.write(steps=batch["mask"].sum(), returns=batch["reward"].sum(0), loss=loss,
                      grad_norm=norm, entropy=pi.entropy()[batch["mask"]].mean())
        envs.close()
        if args.eval_episodes:
            evaluate(args, policy, max_steps)
    return policy, log.score


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


def evaluate(args, policy, max_steps):
    """Play --eval-episodes episodes or more with the most likely actions; print the mean return."""
    # A seed far from those of training, so that the episodes are new.
    envs = make_envs(args.env_id, min(args.num_envs, args.eval_episodes), args.seed + 2**30)
    returns = []
    while len(returns) < args.eval_episodes:
        batch = play_episodes(envs, policy, max_steps, args.device, greedy=True)
        returns += batch["reward"].sum(0).tolist()
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
