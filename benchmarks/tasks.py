"""What the scripts learn besides CartPole, with the flags that do it: ten seeds of each.

    python benchmarks/tasks.py             run all and write tasks.csv (about 15 minutes)
    python benchmarks/tasks.py --only actor_critic --task Acrobot-v1    run these, keep other rows
    python benchmarks/tasks.py --report    print the table from tasks.csv, run nothing

A row of tasks.csv is a run: task, script, flags, seed, goal, solved, steps, seconds, score. It ends
when the mean return of its last 100 episodes reaches the goal (in the continuing task: the mean
reward of 100 stretches of 32 steps), or its steps are used up. tasks.json: of each script commit,
date, machine, versions, command. Two runs share the machine, so the
seconds are no measure of speed; benchmarks/cartpole.py is.
"""

import argparse
import csv
import shlex
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cartpole

HERE = Path(__file__).resolve().parent
COLUMNS = ["task", "script", "flags", "seed", "goal", "solved", "steps", "seconds", "score"]
TASKS = [  # (what, script, flags, goal)
    ("Acrobot-v1", "reinforce", "--num-envs 8 --gamma 0.99 --no-exact-discount "
     "--learning-rate 3e-3", -100),
    ("Acrobot-v1", "reinforce_baseline", "--num-envs 8 --gamma 0.99 --no-exact-discount "
     "--learning-rate 3e-3", -100),
    ("Acrobot-v1", "actor_critic", "--num-envs 32 --learning-rate 5e-4 "
     "--value-learning-rate 2e-3 --trace-lambda 0.8", -100),
    ("Acrobot-v1", "ppo", "", -100),
    ("Pendulum-v1", "ppo", "--total-timesteps 300000", -200),
    ("CartPole-v1", "actor_critic", "--continuing --trace-lambda 0.8 --learning-rate 1e-3 "
     "--value-learning-rate 3e-3", 0.99),
]


def run(job):
    """One run in a fresh process; a row of tasks.csv."""
    (task, script, flags, goal), seed = job
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, HERE.parent / f"{script}.py", "--env-id", task, "--seed", seed,
                   "--stop-at", goal, "--run-dir", f"{folder}/run", *shlex.split(flags)]
        subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
        with open(f"{folder}/run/metrics.csv") as file:
            last = list(csv.DictReader(file))[-1]
    solved = int(float(last["score"]) >= goal)
    print(f"{task}, {script}, seed {seed}: {last['score']} after {last['step']} steps", flush=True)
    return [task, script, flags, seed, goal, solved, int(last["step"]),
            round(float(last["seconds"]), 1), round(float(last["score"]), 4)]


def table():
    """Markdown, from tasks.csv: a line for each task and script."""
    with (HERE / "tasks.csv").open() as file:
        rows = list(csv.DictReader(file))
    lines = ["| command | goal | reached | steps (median) | seconds (median) |",
             "|---|---|---|---|---|"]
    for task, script, flags, goal in TASKS:
        mine = [row for row in rows if (row["task"], row["script"]) == (task, script)]
        solved = sum(row["solved"] == "1" for row in mine)
        steps = statistics.median(int(row["steps"]) for row in mine)
        seconds = statistics.median(float(row["seconds"]) for row in mine)
        command = " ".join(f"python {script}.py --env-id {task} {flags}".split())
        lines.append(f"| `{command}` | {goal} | {solved} of {len(mine)} | {steps:,.0f} "
                     f"| {seconds:.0f} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--report", action="store_true", help="only print the table")
    parser.add_argument("--only", choices=sorted({task[1] for task in TASKS}), help="a script")
    parser.add_argument("--task", help="only this environment's tasks of the script")
    args = parser.parse_args()
    if not args.report:
        source = cartpole.provenance()
        chosen = [task for task in TASKS
                  if args.only in (None, task[1]) and args.task in (None, task[0])]
        if not chosen:
            parser.error(f"--task {args.task}: there is none with these options")
        jobs = [(task, seed) for task in chosen for seed in range(11, 21)]
        with ThreadPoolExecutor(2) as pool:
            rows = list(pool.map(run, jobs))
        measured = [(task[0], task[1]) for task in chosen]
        with (HERE / "tasks.csv").open() as file:
            rows += [row for row in csv.reader(file)
                     if row[0] != "task" and (row[0], row[1]) not in measured]
        with (HERE / "tasks.csv").open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
        scripts = list(dict.fromkeys(f"{task[1]} {task[0]}" for task in chosen))
        cartpole.record("tasks.json", scripts, source)
    print(table())


if __name__ == "__main__":
    main()
