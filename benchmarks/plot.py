"""Draw the learning curves of runs from their metrics.csv.

    python benchmarks/plot.py runs/ppo-CartPole-v1-* runs/reinforce-CartPole-v1-* --out curves.png

Runs are one group (several seeds) if the names of their folders are equal without seed, time and
the number behind it, and if their args.json are equal except for the flags in IRRELEVANT. If the
name of a folder is only a seed, as in `ppo/seed-11`, the folder above it gives the name. Where
groups have the same name, the legend shows the flags in which they differ.

A group of several seeds has a thin line for each seed, a thick line for the interquartile mean and
a band from the 25th to the 75th percentile. Mean and band end with the shortest run: with fewer
seeds they would show a change that is none of the score. A single run is one line. Rows without a
number, such as the score before the first episode has ended, are left out, and so are runs that
have no number yet.
"""

import argparse
import csv
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

IRRELEVANT = {"seed", "run_dir", "resume", "checkpoint_seconds", "eval_episodes", "track",
              "wandb_project"}  # flags that leave the curve's distribution as it is
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"]
# Okabe and Ito's, that the colour-blind can tell apart: https://jfly.uni-koeln.de/color/


class RunFiles(NamedTuple):
    name: str  # the folder's, without seed and time
    args: dict
    x: np.ndarray
    y: np.ndarray


def iqm(values):
    """Interquartile mean over the first axis: of the middle half of the values, sorted.

    Each of n values holds 1/n of the distribution, and counts with what of it lies between the
    quartiles. Where n is a multiple of 4 that is the mean without the lowest and highest quarter;
    elsewhere such trimming has to round, and for 3 values would leave none out.
    """
    values = np.sort(np.asarray(values, dtype=float), axis=0)
    edges = np.linspace(0, 1, len(values) + 1).clip(0.25, 0.75)
    return np.tensordot(np.diff(edges) / 0.5, values, axes=1).round(9)  # alike on all machines


def common_grid(curves, num_points=400):
    """Points where all curves (x, y) have values, or None; and the curves there, (C, points)."""
    start, end = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    if start >= end:
        return None, None
    grid = np.linspace(start, end, num_points)
    return grid, np.stack([np.interp(grid, x, y) for x, y in curves])


def draw_curves(axes, groups):
    """Draw groups into axes and return the handles of a legend.

    groups: {name: [(x, y), ...]}, one pair of arrays per seed.
    """
    handles = []
    for index, (name, curves) in enumerate(groups.items()):
        colour, several = COLOURS[index % len(COLOURS)], len(curves) > 1
        style = "-" if index < len(COLOURS) else "--"
        for x, y in curves:
            axes.plot(x, y, style, color=colour, linewidth=0.7 if several else 2,
                      alpha=0.35 if several else 1)
        grid, scores = common_grid(curves) if several else (None, None)
        if grid is not None:
            low, high = np.percentile(scores, [25, 75], axis=0)
            axes.fill_between(grid, low, high, color=colour, alpha=0.18, linewidth=0)
            axes.plot(grid, iqm(scores), style, color=colour, linewidth=2.4)
        label = f"{name} ({len(curves)} seeds)" if several else name
        handles.append(Line2D([], [], color=colour, linestyle=style, linewidth=2.4, label=label))
    if axes.get_xlim()[1] > 1000:  # 20k for 20000, but no 500m for half a second
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.margins(x=0.01)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return handles


def draw(groups, out, title="", x_label="step", y_label="score"):
    """Write a picture of groups (see draw_curves), 1000 by 600."""
    figure = Figure(figsize=(8, 4.8), dpi=125, layout="constrained")
    FigureCanvasAgg(figure)  # a picture without a window, and without pyplot's global state
    axes = figure.subplots()
    handles = draw_curves(axes, groups)
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    columns = max(1, min(len(handles), 80 // max(len(h.get_label()) + 6 for h in handles)))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
    figure.savefig(out)


def short_name(folder, args):
    """The folder's name without the time and the seed, as scripts write them at its end."""
    seed = rf"(^|[-_.])(seed|s)?[-_.]?{args.get('seed')}$"
    for part in folder.resolve(), folder.resolve().parent:
        name = re.sub(seed, "", re.sub(r"-\d{8}-\d{6}(-\d+)?$", "", part.name))
        if name:
            return name
    return "run"


def read_run(folder, x_column, column):
    """A run's name, flags and curve, or None if it has no numbers yet.

    Ends the program where a file or a column is missing.
    """
    if not folder.is_dir():
        fail(f"{folder}: no such folder")
    try:
        args = json.loads((folder / "args.json").read_text())
        lines = (folder / "metrics.csv").read_text().splitlines(keepends=True)
    except (OSError, ValueError) as error:
        fail(f"{folder}: not the folder of a run: {error}")
    whole = [line for line in lines if line.endswith("\n")]  # a run that goes on may be writing
    rows = csv.DictReader(whole)
    names = rows.fieldnames or []
    for name in (x_column, column):
        if names and name not in names:
            fail(f"{folder}/metrics.csv: no column {name}; there are {', '.join(names)}")
    try:
        points = np.array([(float(row[x_column]), float(row[column])) for row in rows])
    except (TypeError, ValueError) as error:
        fail(f"{folder}/metrics.csv: {error}")
    points = points.reshape(-1, 2)
    points = points[np.isfinite(points).all(1)]
    if not len(points):
        print(f"{folder}: left out, as column {column} has no number yet", file=sys.stderr)
        return None
    return RunFiles(short_name(folder, args), args, points[:, 0], points[:, 1])


def task(args):
    """What a run was trained on: an environment, a language model, or the sums of the tiny GPT."""
    return str(args.get("env_id") or args.get("model") or "sums")


def group_runs(runs):
    """{legend: [(x, y), ...]}, by the rule at the top of this file."""
    members = {}
    for run in runs:
        flags = {name: value for name, value in run.args.items() if name not in IRRELEVANT}
        members.setdefault((run.name, json.dumps(flags, sort_keys=True)), []).append(run)
    several_tasks = len({task(run.args) for run in runs}) > 1
    groups = {}
    for (name, flags), group in members.items():
        others = [json.loads(other) for label, other in members if label == name]
        own = json.loads(flags)
        differing = [f"{flag} {own.get(flag)}" for flag in own
                     if any(other.get(flag) != own[flag] for other in others)]
        # With one environment the title says it, and the legend need not repeat it.
        slug = "" if several_tasks else re.sub(r"[^\w.-]+", "-", task(own))
        label = ", ".join([name.removesuffix(f"-{slug}") if slug else name, *differing])
        groups.setdefault(label, []).extend((run.x, run.y) for run in group)
    return groups


def fail(message):
    """End the program for a mistake of its user: one line on stderr, exit code 2."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--out", default="curves.png", help="the picture; default curves.png")
    parser.add_argument("--x", choices=["step", "seconds"], default="step")
    parser.add_argument("--column", default="score", help="of metrics.csv; default score")
    args = parser.parse_args()
    found = [read_run(folder, args.x, args.column) for folder in args.run_dirs]
    runs = [run for run in found if run]
    if not runs:
        fail("no run has a number yet")
    control = all("env_id" in run.args for run in runs)
    x_label = "environment steps" if control else "steps"
    if args.x == "seconds":
        x_label = "seconds of training"
    y_label = args.column.replace("_", " ")
    if control and args.column == "score":
        y_label = "mean return of the last 100 episodes"
    title = ", ".join(sorted({task(run.args) for run in runs}))
    try:
        draw(group_runs(runs), args.out, title, x_label, y_label)
    except (OSError, ValueError) as error:
        fail(f"--out {args.out}: {error}")


if __name__ == "__main__":
    main()
