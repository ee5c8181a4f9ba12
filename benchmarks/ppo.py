"""How well and how fast does ppo.py learn: classic control, Box2D, MuJoCo?

    python benchmarks/ppo.py                    run all and write the files (three hours)
    python benchmarks/ppo.py --only Hopper-v5   run one task, or `speed`, and keep the other rows
    python benchmarks/ppo.py --report           print the tables from the files, run nothing

ppo.csv        a row for each task and seed: score is the mean return of the last 100 episodes when
               the steps are used up, exploration included. Two runs share the machine, one core
               each; seconds are the training's under that condition.
ppo_speed.csv  one process at a time: steps per second of ppo.py and of Stable-Baselines3 with the
               same settings (in `ours` those of ppo.py's presets, in `theirs` those that the peer
               has by default or from RL Baselines3 Zoo), and of the environments alone under
               random actions. The peer's observations and rewards are normalized where ours are.
ppo.json       for each task, and for speed: commit, date, machine, versions, command.
"""

import argparse
import csv
import itertools
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cartpole
import numpy as np
import plot

HERE = Path(__file__).resolve().parent
SCORES = ["task", "flags", "seed", "goal", "steps", "seconds", "score"]
SPEEDS = ["task", "settings", "contestant", "run", "steps", "seconds", "steps_per_second"]
MILLION = "--total-timesteps 1000000"
TASKS = [  # (task, flags beside the presets, goal, seeds)
    ("CartPole-v1", "", 475, 10),
    ("Acrobot-v1", "", -85, 10),
    ("MountainCar-v0", MILLION, -110, 10),
    ("LunarLander-v3", MILLION, 255, 10),
    ("Pendulum-v1", "--total-timesteps 300000", -190, 10),
    ("HalfCheetah-v5", "", 5500, 10),
    ("Hopper-v5", "", 2700, 10),
    ("Walker2d-v5", "", 4000, 10),
    ("Ant-v5", "", "none", 3),
    ("InvertedDoublePendulum-v5", "", "none", 3),
    ("Reacher-v5", "", "none", 3),
    ("BipedalWalker-v3", "", "none", 3),
]
EQUAL = [  # (task, settings, flags of ppo.py, (environments, keywords) of the peer, steps)
    ("CartPole-v1", "ours", "", (64, {"n_steps": 32, "batch_size": 256, "n_epochs": 3,
     "gamma": 0.99, "learning_rate": 2e-3, "ent_coef": 0.01}), 100_000),
    ("CartPole-v1", "theirs", shlex.join(cartpole.SB3_SETTINGS), (8, {"n_steps": 32,
     "batch_size": 256, "n_epochs": 20, "gamma": 0.98, "gae_lambda": 0.8, "learning_rate": 1e-3}),
     50_000),
    ("HalfCheetah-v5", "ours", "", (8, {"n_steps": 256, "batch_size": 64, "gae_lambda": 0.9,
     "learning_rate": 3e-4}), 40_000),
    ("HalfCheetah-v5", "theirs", "--num-envs 1 --num-steps 2048 --num-minibatches 32 "
     "--learning-rate 3e-4", (1, {}), 40_000),
]


def train(task, flags, seed, folder):
    """One run of ppo.py in a fresh process: (steps, seconds, score) from its metrics.csv."""
    command = [sys.executable, HERE.parent / "ppo.py", "--env-id", task, "--seed", seed,
               "--run-dir", f"{folder}/run", *shlex.split(flags)]
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)
    with open(f"{folder}/run/metrics.csv") as file:
        last = list(csv.DictReader(file))[-1]
    return int(last["step"]), float(last["seconds"]), float(last["score"])


def score_row(job):
    """A row of ppo.csv."""
    (task, flags, goal, _), seed = job
    with tempfile.TemporaryDirectory() as folder:
        steps, seconds, score = train(task, flags, seed, folder)
    print(f"{task}, seed {seed}: {score:.1f} after {steps:,} steps, {seconds:.0f} s", flush=True)
    return dict(zip(SCORES, [task, flags, seed, goal, steps, round(seconds, 1), round(score, 2)]))


def train_peer(task, num_envs, keywords, steps, normalize):
    """Stable-Baselines3's PPO in this process; prints its seconds."""
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    torch.set_num_threads(1)
    envs = make_vec_env(task, num_envs, seed=11)
    if normalize:
        envs = VecNormalize(envs)
    model = PPO("MlpPolicy", envs, device="cpu", seed=11, **keywords)
    start = time.perf_counter()
    model.learn(steps)
    print(json.dumps([model.num_timesteps, time.perf_counter() - start]))


def step_alone(task, num_envs, steps):
    """The environments under random actions in this process; prints the seconds."""
    import gymnasium as gym

    envs = gym.make_vec(task, num_envs)
    envs.reset(seed=11)
    actions = [envs.action_space.sample() for _ in range(100)]
    start = time.perf_counter()
    for t in range(steps // num_envs):
        envs.step(actions[t % 100])
    print(json.dumps([steps // num_envs * num_envs, time.perf_counter() - start]))


def speed_rows():
    """Rows of ppo_speed.csv: the contestants follow each other, three times."""
    for run in (1, 2, 3):
        for task, settings, flags, (num_envs, keywords), steps in EQUAL:
            with tempfile.TemporaryDirectory() as folder:
                mine = train(task, f"{flags} --total-timesteps {steps}", 11, folder)[:2]
            results = {"ppo": mine}
            others = {"sb3-ppo": f"train_peer({task!r}, {num_envs}, {keywords!r}, {steps}, "
                                 f"{'--no-norm-obs' not in flags})",
                      "environment alone": f"step_alone({task!r}, {num_envs}, {steps})"}
            for name, call in others.items():
                done = subprocess.run([sys.executable, "-c", f"import ppo; ppo.{call}"], cwd=HERE,
                                      check=True, capture_output=True, text=True)
                results[name] = json.loads(done.stdout.splitlines()[-1])
            for name, (taken, seconds) in results.items():
                print(f"{task}, {settings} settings, {name}: {taken / seconds:,.0f} steps/s",
                      flush=True)
                yield dict(zip(SPEEDS, [task, settings, name, run, taken, round(seconds, 3),
                                        round(taken / seconds, 1)]))


def read(name):
    path = HERE / name
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def interval(scores, level=0.95, draws=10_000):
    """Interquartile mean of the scores and the ends of its bootstrap interval."""
    picked = np.random.default_rng(0).choice(scores, (len(scores), draws))
    tail = (1 - level) / 2
    low, high = np.quantile(plot.iqm(picked), [tail, 1 - tail])
    return float(plot.iqm(scores)), float(low), float(high)


def score_table():
    """Markdown, from ppo.csv: a line for each task."""
    rows, lines = read("ppo.csv"), [
        "| command | seeds | interquartile mean (95% interval) | lowest to highest | goal "
        "| seconds (median) |", "|---|---|---|---|---|---|"]
    for task, flags, goal, _ in TASKS:
        mine = [row for row in rows if (row["task"], row["flags"]) == (task, flags)]
        if mine:
            scores = [float(row["score"]) for row in mine]
            mean, low, high = interval(scores)
            command = " ".join(f"python ppo.py --env-id {task} {flags}".split())
            seconds = statistics.median(float(row["seconds"]) for row in mine)
            # An interval from a few seeds would say no more than the range.
            spread = f" ({low:,.4g} to {high:,.4g})" if len(mine) >= 10 else ""
            lines.append(f"| `{command}` | {len(mine)} | {mean:,.4g}{spread} "
                         f"| {min(scores):,.4g} to {max(scores):,.4g} | {goal} | {seconds:.0f} |")
    return "\n".join(lines)


def speed_table():
    """Markdown, from ppo_speed.csv: medians, and ratios to the peer's."""
    lines = ["| task | settings of | ppo.py, steps/s | Stable-Baselines3, steps/s | ratio "
             "| environment alone, steps/s |", "|---|---|---|---|---|---|"]
    rows = read("ppo_speed.csv")
    for task, settings, *_ in EQUAL:
        speeds = [statistics.median(float(row["steps_per_second"]) for row in rows if
                                    (row["task"], row["settings"], row["contestant"])
                                    == (task, settings, name))
                  for name in ("ppo", "sb3-ppo", "environment alone")]
        owner = {"ours": "ppo.py", "theirs": "Stable-Baselines3"}[settings]
        lines.append(f"| {task} | {owner} | {speeds[0]:,.0f} | {speeds[1]:,.0f} | "
                     f"{speeds[0] / speeds[1]:.1f} | {speeds[2]:,.0f} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--report", action="store_true", help="only print the tables")
    parser.add_argument("--only", nargs="+", choices=[task[0] for task in TASKS] + ["speed"])
    args = parser.parse_args()
    if not args.report:
        tasks = [task for task in TASKS if not args.only or task[0] in args.only]
        parts = [task[0] for task in tasks] + ["speed"] * (not args.only or "speed" in args.only)
        source = cartpole.provenance()
        kept = [row for row in read("ppo.csv") if row["task"] not in [task[0] for task in tasks]]
        if tasks:
            jobs = [(task, 11 + i) for task in tasks for i in range(task[3])]
            with ThreadPoolExecutor(2) as pool:
                rows = itertools.chain(kept, pool.map(score_row, jobs))
                cartpole.write_rows(HERE / "ppo.csv", SCORES, rows)
        if "speed" in parts:
            cartpole.write_rows(HERE / "ppo_speed.csv", SPEEDS, speed_rows())
        cartpole.record("ppo.json", parts, source)
    print(score_table())
    if read("ppo_speed.csv"):
        print("\n" + speed_table())


if __name__ == "__main__":
    main()
