"""Learning curves of the control scripts, all seeds, and the time to solve CartPole-v1.

    python benchmarks/curves.py            run all, write curves.csv, draw docs/img
    python benchmarks/curves.py --only pendulum    run what one picture shows
    python benchmarks/curves.py --only cartpole --scripts ppo      run one script again
    python benchmarks/curves.py --report   draw from the files, run nothing

docs/img/overview.png also shows grpo_curve.csv and dpo_frontier.csv.

curves.csv    a row for each point: picture, contestant, seed, step, score; at most 100 a run.
              No run stops early; the flags are those of tasks.py and ppo.py.
curves.json   for each picture: commit, date, machine, versions, command.

Two runs at a time: nothing here is timed. The time to solve is that of cartpole.csv.
"""

import argparse
import csv
import itertools
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cartpole
import numpy as np
import plot
import tasks
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import dpo
import grpo
import ppo

HERE = Path(__file__).resolve().parent
IMAGES = HERE.parent / "docs" / "img"
COLUMNS = ["picture", "contestant", "seed", "step", "score"]
LADDER = ["reinforce", "reinforce_baseline", "actor_critic", "ppo"]
PPO_FLAGS = {task: flags for task, flags, *_ in ppo.TASKS}
RUNS = [  # picture, task, script, flags, seeds
    *(("cartpole", "CartPole-v1", script, "--total-timesteps 200000", 10) for script in LADDER),
    *(("acrobot", task, script, f"{flags} --total-timesteps 300000", 5)
      for task, script, flags, _ in tasks.TASKS if task == "Acrobot-v1"),
    *((picture, task, "ppo", PPO_FLAGS[task], 5) for picture, task in (
        ("pendulum", "Pendulum-v1"), ("mountain_car", "MountainCar-v0"),
        ("lunar_lander", "LunarLander-v3"), ("half_cheetah", "HalfCheetah-v5"))),
]
TITLES = {picture: task for picture, task, *_ in RUNS}
PICTURES = {  # page: {picture in docs/: (what it shows, entry of curves.json)}
    "reinforce": {"img/cartpole.png": (
        "CartPole-v1, 200,000 steps: a thin line for each of the seeds 11 to 20, a thick line for "
        "their interquartile mean, a band for the middle half", "cartpole")},
    "reinforce_baseline": {"img/acrobot.png": ("Acrobot-v1, 300,000 steps, seeds 11 to 15",
                                               "acrobot")},
    "actor_critic": {"img/solve.png": (
        "Seconds of a whole process until CartPole-v1 is solved, ten seeds; SB3 is "
        "Stable-Baselines3 with tuned settings", "")},
    "ppo": {f"img/{picture}.png": (f"{task}, seeds 11 to 15", picture) for picture, task in (
        ("pendulum", "Pendulum-v1"), ("mountain_car", "MountainCar-v0"),
        ("lunar_lander", "LunarLander-v3"), ("half_cheetah", "HalfCheetah-v5"))},
}


def curve(job):
    """Rows of curves.csv for one run, in a fresh process."""
    (picture, task, script, flags, _), seed = job
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, HERE.parent / f"{script}.py", "--env-id", task, "--seed", seed,
                   "--run-dir", f"{folder}/run", *shlex.split(flags)]
        subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
        with open(f"{folder}/run/metrics.csv") as file:
            points = [(int(row["step"]), float(row["score"])) for row in csv.DictReader(file)]
    points = [point for point in points if point[1] == point[1]]  # before an episode's end: NaN
    points = points[::-(-len(points) // 99)] + points[-1:]
    print(f"{task}, {script}, seed {seed}: {points[-1][1]:.1f}", flush=True)
    return [dict(zip(COLUMNS, [picture, script, seed, step, f"{score:.6g}"]))
            for step, score in points]


def read():
    """Rows of curves.csv; none where it has not been measured."""
    path = HERE / "curves.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def curves_by_picture():
    """{picture: {script: [(steps, scores), ...]}}, from curves.csv."""
    pictures = {}
    for row in read():
        seeds = pictures.setdefault(row["picture"], {}).setdefault(f"{row['contestant']}.py", {})
        seeds.setdefault(row["seed"], []).append((float(row["step"]), float(row["score"])))
    return {picture: {name: [np.array(points).T for points in seeds.values()]
                      for name, seeds in scripts.items()} for picture, scripts in pictures.items()}


def draw():
    """The pictures, as far as there are rows."""
    IMAGES.mkdir(exist_ok=True)
    pictures = curves_by_picture()
    for picture, groups in pictures.items():
        plot.draw(groups, IMAGES / f"{picture}.png", TITLES[picture], "environment steps",
                  "mean return of the last 100 episodes")
    draw_solve()
    draw_overview(pictures)


def draw_overview(pictures):
    """img/overview.png: four panels, from curves.csv, grpo_curve.csv and dpo_frontier.csv."""
    figure = Figure(figsize=(10, 7.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    (cartpole_axes, cheetah_axes), (grpo_axes, dpo_axes) = figure.subplots(2, 2)
    for axes, picture, title in ((cartpole_axes, "cartpole", "CartPole-v1, ten seeds each"),
                                 (cheetah_axes, "half_cheetah", "HalfCheetah-v5, five seeds")):
        handles = plot.draw_curves(axes, pictures[picture])
        names = [handle.get_label().split(" (")[0] for handle in handles]  # without "(10 seeds)"
        axes.legend(handles, names, loc="lower right")
        axes.set(title=title, xlabel="environment steps", ylabel="mean return of 100 episodes")
    grpo.draw_curve(grpo_axes)
    grpo_axes.set_title("grpo.py: SmolLM2-135M learns sums")
    dpo.draw_frontier(dpo_axes)
    dpo_axes.set_title("dpo.py: reward against distance from the reference")
    for axes in (grpo_axes, dpo_axes):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.get_layout_engine().set(hspace=0.06, wspace=0.04)
    figure.savefig(IMAGES / "overview.png")


def draw_solve():
    """img/solve.png, from cartpole.csv; a run that did not solve the task is a cross."""
    groups = cartpole.grouped(cartpole.read_rows(HERE / "cartpole.csv"))
    figure = Figure(figsize=(8, 3.2), dpi=125, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = list(groups)
    for place, name in enumerate(names):
        for row in groups[name]:
            axes.plot(row["process_seconds"], place, "o" if row["solved"] else "x", alpha=0.6,
                      color="#0072B2" if not name.startswith("sb3") else "#D55E00")
    labels = [f"{name}.py" if name in LADDER else name.upper().replace("-", " ") for name in names]
    axes.set(xlabel="seconds, whole process", xscale="log", yticks=range(len(names)),
             yticklabels=labels, title="CartPole-v1 until solved, ten seeds; a cross: not solved")
    ticks = [3, 5, 10, 20, 30]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.invert_yaxis()
    axes.grid(alpha=0.3, axis="x")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(IMAGES / "solve.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--report", action="store_true", help="only draw from the files")
    parser.add_argument("--only", nargs="+", choices=TITLES, help="pictures; keep the others' rows")
    parser.add_argument("--scripts", nargs="+", choices=LADDER, help="keep the others' rows")
    args = parser.parse_args()
    if not args.report:
        pictures, source = args.only or list(dict.fromkeys(TITLES)), cartpole.provenance()
        scripts = args.scripts or LADDER
        jobs = [(run, 11 + i) for run in RUNS if run[0] in pictures and run[2] in scripts
                for i in range(run[4])]
        if not jobs:
            parser.error("no picture of --only shows a script of --scripts")
        pictures = [name for name in pictures if any(name == run[0] for run, _ in jobs)]
        kept = [row for row in read()
                if row["picture"] not in pictures or row["contestant"] not in scripts]
        with ThreadPoolExecutor(2) as pool:
            rows = (row for part in pool.map(curve, jobs) for row in part)
            cartpole.write_rows(HERE / "curves.csv", COLUMNS, itertools.chain(kept, rows))
        parts = [f"{picture}, {', '.join(args.scripts)}" if args.scripts else picture
                 for picture in pictures]
        cartpole.record("curves.json", parts, source)
    draw()


if __name__ == "__main__":
    main()
