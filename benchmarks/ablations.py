"""What does each choice do to the learning, and what does each broken line?

    python benchmarks/ablations.py                   run all and write the files
    python benchmarks/ablations.py --only sums       run one part (control, sums, lines)
    python benchmarks/ablations.py --only lines --scripts ppo dpo      of these scripts
    python benchmarks/ablations.py --only lines --new                  those that have no row yet
    python benchmarks/ablations.py --report          print the tables from the files, run nothing

ablations.csv   parts control and sums: a row for each run of a script with one choice changed, by
                a flag or a patched line, seeds 11 to 15: the score at the end (GRPO: held-out
                greedy accuracy).
lines.csv       a row for each mutant of tests/mutants that CartPole-v1 or the sums can show, and
                one for each script as it is, with the flags that show it: the interquartile mean
                of the score at the end, the lowest and the highest, seeds 11 to 20. CartPole-v1:
                100,000 steps. The sums: from the imitators of the scripts as they are; the score
                is held-out accuracy, greedy (grpo) or of pairs (dpo). A run that broke off counts
                with its last score.
ablations.json  for each part: commit, date, machine, versions, command.

Two runs at a time, one thread each: nothing here is timed.
"""

import argparse
import csv
import itertools
import json
import os
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cartpole
from plot import iqm

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.append(str(ROOT / "tests" / "mutants"))
import run as mutants  # noqa: E402

SCRIPTS = ["reinforce", "reinforce_baseline", "actor_critic", "ppo", "grpo", "dpo"]
PARTS = ["control", "sums", "lines"]
SEEDS, LINE_SEEDS = range(11, 16), range(11, 21)
COLUMNS = ["page", "task", "choice", "seed", "score"]
LINE_COLUMNS = ["script", "bug", "flags", "seeds", "score", "lowest", "highest"]
CARTPOLE, LONG = "--total-timesteps 100000", "--total-timesteps 300000"
PENDULUM = "--env-id Pendulum-v1 --total-timesteps 200000"
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
SUMS = "--max-steps 100 --eval-every 100"
LINE_FLAGS = {"grpo": "--max-steps 60 --eval-every 60",
              "dpo": "--max-steps 150 --eval-every 150 --train-pairs 9000"}
TRUNCATION = ("gamma * next_value * ~terminal - value",
              "gamma * next_value * ~(terminal | truncated) - value")
RESET_ROWS = ('batch = {name: column[rollout["valid"]] for name, column in batch.items()}',
              "batch = {name: column.flatten(0, 1) for name, column in batch.items()}")
CHOICES = [  # page, task, choice, script, flags, patch
    ("reinforce", "CartPole, 300,000 steps, γ .99", "γ^t as in the gradient (default)",
     "reinforce", f"{LONG} --gamma 0.99", None),
    ("reinforce", "CartPole, 300,000 steps, γ .99", "γ^t dropped",
     "reinforce", f"{LONG} --gamma 0.99 --no-exact-discount", None),
    ("reinforce_baseline", "CartPole, 300,000 steps", "no baseline (reinforce.py)",
     "reinforce", LONG, None),
    ("reinforce_baseline", "CartPole, 300,000 steps", "baseline (default)",
     "reinforce_baseline", LONG, None),
    *(("actor_critic", "CartPole, 300,000 steps", f"λ {trace}{' (default)' * (trace == 0.9)}",
       "actor_critic", f"{LONG} --trace-lambda {trace}", None) for trace in (0.0, 0.5, 0.9, 1.0)),
    ("actor_critic", "CartPole, 300,000 steps", "γ^t dropped", "actor_critic",
     f"{LONG} --no-exact-discount", None),
    ("ppo", "Pendulum, 200,000 steps", "bootstrap at a time limit (default)",
     "ppo", PENDULUM, None),
    ("ppo", "Pendulum, 200,000 steps", "a time limit counts as an end",
     "ppo", PENDULUM, TRUNCATION),
    ("ppo", "CartPole, 100,000 steps", "as it is (default)", "ppo", CARTPOLE, None),
    ("ppo", "CartPole, 100,000 steps", "rows that only reset are kept",
     "ppo", CARTPOLE, RESET_ROWS),
    ("grpo", "sums, 100 batches", "advantage r − mean (default)", "grpo", SUMS, None),
    ("grpo", "sums, 100 batches", "divided by the group's std", "grpo",
     f"{SUMS} --scale-rewards group", None),
    ("grpo", "sums, 100 batches, 4 updates each", "clip-higher, ε .2 and .28 (default)", "grpo",
     f"{SUMS} --num-iterations 4", None),
    ("grpo", "sums, 100 batches, 4 updates each", "ε .2 on both sides", "grpo",
     f"{SUMS} --num-iterations 4 --epsilon-high 0.2", None),
]


def read(name):
    """Rows of a CSV here; none where it has not been measured."""
    path = HERE / name
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def last_score(folder):
    """The score in the last row of a run's metrics.csv; nan without one."""
    path = folder / "metrics.csv"
    rows = list(csv.DictReader(path.open(newline=""))) if path.exists() else []
    return float(rows[-1]["score"]) if rows else float("nan")


def choice_row(job):
    (page, task, choice, script, flags, patch), seed = job
    with tempfile.TemporaryDirectory() as folder:
        source, run = (ROOT / f"{script}.py").read_text(), Path(folder, "run")
        if patch:
            assert source.count(patch[0]) == 1, patch
            source = source.replace(*patch)
        Path(folder, f"{script}.py").write_text(source)
        subprocess.run([sys.executable, f"{script}.py", *shlex.split(flags),
                        "--seed", str(seed), "--run-dir", str(run)], cwd=folder, check=True,
                       capture_output=True, env=ONE_THREAD)
        score = last_score(run)
    print(f"{page}, {task}, {choice}, seed {seed}: {score:.3f}", flush=True)
    return dict(zip(COLUMNS, [page, task, choice, seed, round(score, 4)]))


def train_seeds(script, folder, flags, imitators):
    """Scores of the script in the folder with each seed; runs in a process of its own.

    imitators: a folder of tiny GPTs, one a seed, that have been taught already, or will be.
    """
    import torch
    import tyro

    sys.path.insert(0, folder)
    module, scores = __import__(script), []

    pretrain = getattr(module, "pretrain", None)

    def pretrain_once(args, device):
        path = Path(imitators, f"{script}-{args.seed}.pt")
        if path.exists():
            weights = torch.load(path, weights_only=True)
            config = module.read_config(module.tiny_config(len(module.Characters.symbols)), "tiny")
            return config, weights, module.Characters()
        config, weights, tokenizer = pretrain(args, device)
        torch.save(weights, path)
        return config, weights, tokenizer

    module.pretrain = pretrain_once
    for seed in LINE_SEEDS:
        run = Path(folder, str(seed))
        args = tyro.cli(module.Args, args=[*shlex.split(flags), "--seed", str(seed), "--run-dir",
                                           str(run)])
        try:
            result = module.train(args)  # the score, or the network and the score
            scores.append(result[1] if isinstance(result, tuple) else result)
        except (Exception, SystemExit) as error:  # broken on purpose
            print(f"seed {seed}: {type(error).__name__}: {error}", file=sys.stderr)
            scores.append(last_score(run))
    print(json.dumps([0.0 if score != score else score for score in scores]))


def line_row(mutant, imitators):
    """mutant: as mutants.load has them; or with no bug, the script as it is."""
    script, flags = mutant["script"], line_flags(mutant)
    with tempfile.TemporaryDirectory() as folder:
        source = (ROOT / f"{script}.py").read_text()
        source = source.replace(mutant["line"], mutant["broken"]) if mutant["bug"] else source
        Path(folder, f"{script}.py").write_text(source)
        call = f"ablations.train_seeds({script!r}, {folder!r}, {flags!r}, {imitators!r})"
        done = subprocess.run([sys.executable, "-c", f"import ablations; {call}"], cwd=HERE,
                              check=True, text=True, capture_output=True, env=ONE_THREAD)
    scores = json.loads(done.stdout.splitlines()[-1])
    print(f"{script} {flags}, {mutant['bug'] or 'as it is'}: {iqm(scores):.2f}", flush=True)
    values = [script, mutant["bug"], flags, len(scores), round(float(iqm(scores)), 3),
              round(min(scores), 3), round(max(scores), 3)]
    return dict(zip(LINE_COLUMNS, values))


def line_flags(mutant):
    """The flags with which a mutant shows, or None where no short run can show it."""
    script = mutant["script"]
    own = mutant.get("sums") if script in LINE_FLAGS else mutant.get("cartpole", "")
    return None if own in (None, False) else f"{LINE_FLAGS.get(script, CARTPOLE)} {own}".strip()


def line_key(row):
    """What tells a row of lines.csv from the others; row: such a one, or a mutant."""
    return row["script"], row["bug"], row.get("flags") or line_flags(row)


def line_rows(pool, names, known):
    """Rows of lines.csv: those known that still hold, then the others, of the scripts named.

    The scripts as they are come first: they teach the imitators.
    """
    have = {line_key(row): row for row in known}
    shown = [mutant for mutant in mutants.load() if line_flags(mutant) is not None]
    wholes = {line_key(mutant | {"bug": ""}): mutant | {"bug": ""} for mutant in shown}
    todo = [m for m in shown if m["script"] in names and line_key(m) not in have]
    again = {line_key(mutant | {"bug": ""}) for mutant in todo}
    keys = [*wholes, *map(line_key, shown)]
    yield from (have[key] for key in keys if key in have and key not in again)
    with tempfile.TemporaryDirectory() as imitators:
        jobs = [wholes[key] for key in sorted(again)]
        first = {job["script"]: job for job in reversed(jobs)}
        rest = [job for job in jobs if first[job["script"]] is not job] + todo
        for some in (list(first.values()), rest):
            yield from pool.map(line_row, some, [imitators] * len(some))


def table(page):
    """Markdown, from ablations.csv: the interquartile mean and the range for each choice."""
    groups = {}
    for row in read("ablations.csv"):
        if row["page"] == page:
            groups.setdefault((row["task"], row["choice"]), []).append(float(row["score"]))
    if not groups:
        return "Not measured yet."
    lines = ["| task | choice | interquartile mean of the score, seeds 11 to 15 "
             "| lowest to highest |", "|---|---|---|---|"]
    for (task, choice), scores in groups.items():
        mean, low, high = (f"{x:.3f}" if abs(max(scores)) <= 1 and page == "grpo" else f"{x:.1f}"
                           for x in (iqm(scores), min(scores), max(scores)))
        shown = task.replace("sums", "addition task")
        lines.append(f"| {shown} | {choice} | {mean} | {low} to {high} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--report", action="store_true", help="only print the tables")
    parser.add_argument("--only", nargs="+", choices=PARTS)
    parser.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=SCRIPTS)
    parser.add_argument("--new", action="store_true", help="of the lines, only those without a row")
    args = parser.parse_args()
    if not args.report:
        parts, source = args.only or PARTS, cartpole.provenance()
        with ThreadPoolExecutor(2) as pool:
            jobs = [(choice, seed) for choice in CHOICES for seed in SEEDS
                    if ("sums" if choice[0] == "grpo" else "control") in parts
                    and choice[0] in args.scripts]
            if not jobs and "lines" not in parts:
                parser.error("--only and --scripts leave nothing to run")
            if jobs:
                pages = {choice[0] for choice, _ in jobs}
                kept = [row for row in read("ablations.csv") if row["page"] not in pages]
                rows = itertools.chain(kept, pool.map(choice_row, jobs))
                cartpole.write_rows(HERE / "ablations.csv", COLUMNS, rows)
            if "lines" in parts:
                known = [row for row in read("lines.csv")
                         if args.new or row["script"] not in args.scripts]
                rows = line_rows(pool, args.scripts, known)
                cartpole.write_rows(HERE / "lines.csv", LINE_COLUMNS, rows)
        measured = sorted({("sums " if choice[0] == "grpo" else "control ") + choice[0]
                           for choice, _ in jobs})
        measured += [f"lines {script}" + ", later" * args.new
                     for script in args.scripts if "lines" in parts]
        cartpole.record("ablations.json", measured, source)
    for page in dict.fromkeys(choice[0] for choice in CHOICES):
        print(f"\n{page}\n{table(page)}")


if __name__ == "__main__":
    main()
