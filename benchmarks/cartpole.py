"""How long does each script take to solve CartPole-v1, and how fast does it go at equal settings?

Every measurement is a whole fresh process, one at a time, and the contestants of one seed follow
each other: where the machine changes its speed, it does so for all of them. Solved means: the mean
return of the last 100 episodes, a full window of them, has reached 475.

    python benchmarks/cartpole.py                 run all of it and write the three files
    python benchmarks/cartpole.py --report        print the tables from the files, run nothing
    python benchmarks/cartpole.py --seeds 11 --only ppo,sb3-ppo --skip-equal --out-dir trial

cartpole.csv        each script with its defaults, and two peers from Stable-Baselines3 with the
                    settings that RL Baselines3 Zoo tuned for CartPole-v1, until solved. `steps` and
                    the seconds of a run that is not solved are what it took to give up.
cartpole_equal.csv  nothing is stopped, score_at_end is the mean of the last 100 episodes. Three
                    tables: `sb3 settings` runs ppo.py and the peer with the same numbers, `cleanrl
                    settings` runs ppo.py with those of CleanRL, `defaults` with its own.
cartpole.json       of each of the two: commit, date, machine, versions, command.

`train_seconds` and `seconds` are the training alone, as the program itself counts it;
`process_seconds` includes the start of Python, the imports and the end. `steps_per_second` is the
quotient of steps and training seconds, but in the table `defaults` it is the steady speed: there
the first tenth of the run is left out.
"""

import argparse
import csv
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from importlib import metadata
from pathlib import Path

# torch and the peers are imported in the measured processes only. Beside the time, it matters for
# peak_mib: Linux counts the size of the process that starts another among that other's peak.

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SCRIPTS = ("reinforce", "reinforce_baseline", "actor_critic", "ppo")
PEERS = ("sb3-ppo", "sb3-a2c")
SOLVED = 475.0
SB3_THREADS = 2  # of 1 and 2 on two cores: 4 % faster for the peer's PPO, no different for its A2C

SB3_SETTINGS = shlex.split(
    "--num-envs 8 --num-steps 32 --num-minibatches 1 --update-epochs 20 --gamma 0.98 "
    "--gae-lambda 0.8 --ent-coef 0 --learning-rate 1e-3 --clip-coef 0.2 --no-norm-obs "
    "--no-norm-reward --total-timesteps 100000")  # the peer's clip range also decays, ours does not
# CleanRL halves the squared error of the value, hence 0.25 for its 0.5. It also clips the change
# of the value, which ppo.py does not.
CLEANRL_SETTINGS = shlex.split(
    "--num-envs 4 --num-steps 128 --num-minibatches 4 --update-epochs 4 --gamma 0.99 "
    "--gae-lambda 0.95 --ent-coef 0.01 --learning-rate 2.5e-4 --clip-coef 0.2 --vf-coef 0.25 "
    "--max-grad-norm 0.5 --no-norm-obs --no-norm-reward --total-timesteps 500000")
EQUAL = {  # table: the flags of each contestant; the peer has its settings built in
    "sb3 settings": {"ppo": SB3_SETTINGS, "sb3-ppo": []},
    "cleanrl settings": {"ppo": CLEANRL_SETTINGS},
    "defaults": {"ppo": []},
}
SOLVE_COLUMNS = ["contestant", "seed", "solved", "steps", "train_seconds", "process_seconds",
                 "peak_mib", "steps_per_second"]
EQUAL_COLUMNS = ["table", "contestant", "seed", "steps", "seconds", "steps_per_second",
                 "score_at_end", "step_of_475"]


def train_peer(name, seed, stop_at):
    """Train with Stable-Baselines3 in this process; print one line of JSON."""
    import torch
    from stable_baselines3 import A2C, PPO
    from stable_baselines3.common.env_util import make_vec_env

    torch.set_num_threads(SB3_THREADS)
    envs = make_vec_env("CartPole-v1", 8, seed=seed)
    if name == "sb3-ppo":
        total_timesteps = 100_000
        model = PPO("MlpPolicy", envs, n_steps=32, batch_size=256, n_epochs=20, gamma=0.98,
                    gae_lambda=0.8, ent_coef=0.0, learning_rate=lambda remaining: 1e-3 * remaining,
                    clip_range=lambda remaining: 0.2 * remaining, device="cpu", seed=seed)
    else:
        total_timesteps = 500_000
        model = A2C("MlpPolicy", envs, ent_coef=0.0, device="cpu", seed=seed)
    window, reached = deque(maxlen=100), []

    def watch(local, _):
        """Called after each step of all environments; False ends the training."""
        ended = [info["episode"]["r"] for info in local["infos"] if "episode" in info]
        window.extend(ended)
        if ended and not reached and len(window) == 100 and sum(window) / 100 >= SOLVED:
            reached.append(model.num_timesteps)
        return not (reached and stop_at)

    start = time.perf_counter()
    model.learn(total_timesteps, callback=watch)
    seconds = time.perf_counter() - start
    score = sum(window) / len(window)
    print(json.dumps({"steps": model.num_timesteps, "seconds": seconds, "score": score,
                      "reached": reached[0] if reached else None}))


def read_metrics(path):
    """The same as a peer's JSON, from a script's metrics.csv, and its steady steps per second."""
    with path.open() as file:
        rows = [{name: float(row[name]) for name in ("step", "seconds", "score")}
                for row in csv.DictReader(file)]
    last, tenth = rows[-1], rows[len(rows) // 10]
    # The file does not say whether the window is full, but a mean of 475 over fewer than the first
    # 100 episodes cannot be: an untrained policy's, some twenty steps long, are among those.
    reached = [int(row["step"]) for row in rows if row["score"] >= SOLVED]
    elapsed = last["seconds"] - tenth["seconds"]
    return {"steps": int(last["step"]), "seconds": last["seconds"], "score": last["score"],
            "reached": reached[0] if reached else None,
            "steady": (last["step"] - tenth["step"]) / elapsed if elapsed else math.nan}


def run_process(command, folder):
    """Run to the end: stdout, seconds by the wall clock, peak memory in MiB; or end the program."""
    with (folder / "out").open("w+") as out, (folder / "err").open("w+") as err:
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=out,
                                   stderr=err)
        _, status, usage = os.wait4(process.pid, 0)  # the one call that tells one child's peak
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if process.returncode:
            print(err.read(), file=sys.stderr)
            raise SystemExit(f"error: exit code {process.returncode} from {shlex.join(command)}")
        unit = 2**20 if sys.platform == "darwin" else 2**10  # of ru_maxrss: bytes, or KiB
        return out.read(), seconds, usage.ru_maxrss / unit


def measure(contestant, seed, flags):
    """One contestant with one seed, in a fresh process and a fresh folder; a dict of results."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if contestant in PEERS:
            command = [str(HERE / "cartpole.py"), "--peer", contestant]
        else:
            command = [str(ROOT / f"{contestant}.py"), "--env-id", "CartPole-v1",
                       "--run-dir", str(folder / "run")]
        command = [sys.executable, *command, "--seed", str(seed), *flags]
        output, process_seconds, peak_mib = run_process(command, folder)
        if contestant in PEERS:
            result = json.loads(output.splitlines()[-1])
        else:
            result = read_metrics(folder / "run" / "metrics.csv")
    speed = result["steps"] / result["seconds"]
    return result | {"process_seconds": process_seconds, "peak_mib": peak_mib, "speed": speed}


def solve_row(contestant, seed):
    """A row of cartpole.csv."""
    result = measure(contestant, seed, ["--stop-at", f"{SOLVED:g}"])
    solved = result["reached"] is not None
    values = [contestant, seed, int(solved), result["steps"], round(result["seconds"], 3),
              round(result["process_seconds"], 3), round(result["peak_mib"], 1),
              round(result["speed"], 1)]
    what = "solved" if solved else "NOT solved"
    print(f"seed {seed}, {contestant}: {what}, {result['steps']:,} steps, "
          f"{result['process_seconds']:.1f} s", flush=True)
    return dict(zip(SOLVE_COLUMNS, values))


def equal_row(table, contestant, seed):
    """A row of cartpole_equal.csv."""
    result = measure(contestant, seed, EQUAL[table][contestant])
    speed = result["steady"] if table == "defaults" else result["speed"]
    reached = "" if result["reached"] is None else result["reached"]
    values = [table, contestant, seed, result["steps"], round(result["seconds"], 3),
              round(speed, 1), round(result["score"], 2), reached]
    print(f"{table}, seed {seed}, {contestant}: {speed:,.0f} steps per second, "
          f"score {result['score']:.1f}", flush=True)
    return dict(zip(EQUAL_COLUMNS, values))


def write_rows(path, columns, rows):
    """Write each row as soon as it is measured, so that an interrupted benchmark leaves its own."""
    with path.open("w", newline="", buffering=1) as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow(row)


def git(*command):
    try:
        return subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True,
                              check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def cpu_model():
    """The processor's name as Linux tells it, elsewhere what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def provenance():
    """What cartpole.json says; uncommitted lists scripts that differ from the commit."""
    packages = ("torch", "gymnasium", "stable-baselines3", "numpy")
    changed = git("diff", "--name-only", "HEAD", "--", "*.py").splitlines()
    return {
        "commit": git("rev-parse", "HEAD"),
        "uncommitted": changed,
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "machine": {"cpu": cpu_model(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version()}
        | {package: metadata.version(package) for package in packages},
        "sb3_threads": SB3_THREADS,
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}",
                               *("FOLDER" if Path(a).is_dir() else a for a in sys.argv[1:])]),
    }


def record(name, parts, source):
    """Note in a .json here that these parts, now measured, come from source, a provenance().

    What was said about a part of these parts, such as "pendulum, ppo" of "pendulum", is dropped.
    """
    path = HERE / name  # name may be a whole path, too
    old = json.loads(path.read_text()) if path.exists() else {}
    within = tuple(f"{part}, " for part in parts)
    old = {part: text for part, text in old.items() if not part.startswith(within)}
    path.write_text(json.dumps(old | dict.fromkeys(parts, source), indent=2) + "\n")


def grouped_notes(notes):
    """Lines "a, b: note" from {what: note}; those with the same note share a line."""
    groups = {}
    for what, text in notes.items():
        if text:
            groups.setdefault(text, []).append(what)
    return [f"{', '.join(names)}: {text}" for text, names in groups.items()]


def note(name, part):
    """What a .json here says about a part that was not measured as usual; "" if nothing."""
    return json.loads((HERE / name).read_text()).get(part, {}).get("note", "")


def sources(name, *parts):
    """Markdown: a line for each origin of these parts of a .json here, by default of all parts."""
    origins = {}
    for part, source in json.loads((HERE / name).read_text()).items():
        if not parts or part in parts:
            versions, machine = source["versions"], source["machine"]
            changed = ", ".join(source.get("uncommitted", []))
            text = (f"`{source['command']}`, commit `{source['commit'][:7]}`"
                    f"{' with changes in ' + changed if changed else ''}, {source['date'][:10]}, "
                    f"{machine['cpu']}, {machine['cores']} cores, Python {versions['python']}, "
                    f"torch {versions['torch']}, gymnasium {versions['gymnasium']}"
                    f"{'; ' + source['note'] if 'note' in source else ''}.")
            origins.setdefault(text, []).append(part)
    if len(origins) == 1:
        return f"- {next(iter(origins))}"
    return "\n".join(f"- {'; '.join(names)}: {text}" for text, names in origins.items())


def benchmark(out_dir, contestants, seeds, skip_equal):
    out_dir.mkdir(parents=True, exist_ok=True)
    files = ["cartpole.csv"] if skip_equal else ["cartpole.csv", "cartpole_equal.csv"]
    record(out_dir / "cartpole.json", files, provenance())
    # The first import compiles the packages and reads them from the disk; no contestant should
    # pay for that on behalf of the others.
    subprocess.run([sys.executable, "-c", "import gymnasium, stable_baselines3, tqdm, tyro"],
                   check=True)
    rows = (solve_row(contestant, seed) for seed in seeds for contestant in contestants)
    write_rows(out_dir / "cartpole.csv", SOLVE_COLUMNS, rows)
    if not skip_equal:
        rows = (equal_row(table, contestant, seed)
                for seed in seeds[:3] for table in EQUAL for contestant in EQUAL[table]
                if contestant in contestants)
        write_rows(out_dir / "cartpole_equal.csv", EQUAL_COLUMNS, rows)


def read_rows(path):
    """Rows as dicts, numbers as floats and an empty field as infinity: not reached."""
    names = ("contestant", "table")
    with path.open(newline="") as file:
        return [{name: text if name in names else float(text or "inf")
                 for name, text in row.items()} for row in csv.DictReader(file)]


def median(rows, column, solved_only=False):
    """The median; where only solved runs count, one that is not solved took for ever."""
    counts = [not solved_only or row["solved"] for row in rows]
    return statistics.median(row[column] if count else math.inf
                             for row, count in zip(rows, counts))


def cell(value, reference, digits):
    """A median and, in brackets, its ratio to that of ppo.py where both are finite."""
    if not math.isfinite(value):
        return "not reached"
    text = f"{value:,.{digits}f}"
    return f"{text} ({value / reference:.2f}×)" if math.isfinite(reference) else text


def grouped(rows):
    """Lists of rows by contestant, in the order of the file."""
    groups = {}
    for row in rows:
        groups.setdefault(row["contestant"], []).append(row)
    return groups


def solve_table(rows):
    """Markdown: until solved."""
    shown = [("steps", 0, True), ("train_seconds", 1, True), ("process_seconds", 1, True),
             ("steps_per_second", 0, False), ("peak_mib", 0, False)]
    lines = ["| contestant | solved | steps | training, s | whole process, s | steps per second "
             "| peak memory, MiB |", "|---|---|---|---|---|---|---|"]
    groups = grouped(rows)
    for name, group in groups.items():
        cells = [name, f"{sum(row['solved'] for row in group):.0f} of {len(group)}"]
        for column, digits, solved_only in shown:
            reference = median(groups["ppo"], column, solved_only) if "ppo" in groups else math.inf
            cells.append(cell(median(group, column, solved_only), reference, digits))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def equal_table(rows):
    """Markdown: without a stop."""
    lines = ["| settings | contestant | runs | steps | training, s | steps per second "
             "| score at end | reached 475 | at step |", "|---|---|---|---|---|---|---|---|---|"]
    for table in EQUAL:
        groups = grouped(row for row in rows if row["table"] == table)
        for name, group in groups.items():
            cells = [table, name, str(len(group)), f"{median(group, 'steps'):,.0f}"]
            for column, digits in [("seconds", 1), ("steps_per_second", 0)]:
                reference = median(groups["ppo"], column) if "ppo" in groups else math.inf
                cells.append(cell(median(group, column), reference, digits))
            reached = sum(math.isfinite(row["step_of_475"]) for row in group)
            cells += [f"{median(group, 'score_at_end'):.1f}", f"{reached} of {len(group)}",
                      cell(median(group, "step_of_475"), math.inf, 0)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(out_dir):
    """Print both tables from the files, medians over the seeds."""
    if not (out_dir / "cartpole.csv").exists():
        fail(f"--out-dir {out_dir}: no cartpole.csv there")
    print("\nUntil the mean return of 100 episodes is 475, median over the seeds "
          "(ratio to ppo.py); an unsolved run counts as longer than any:\n")
    print(solve_table(read_rows(out_dir / "cartpole.csv")))
    if (out_dir / "cartpole_equal.csv").exists():
        print("\nWithout a stop, medians (ratio to ppo.py):\n")
        print(equal_table(read_rows(out_dir / "cartpole_equal.csv")))


def fail(message):
    """End the program for a mistake of its user: one line on stderr, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", help="default 11 to 20; the first three "
                        "also serve the second table")
    parser.add_argument("--only", help="contestants, with commas: " + ",".join(SCRIPTS + PEERS))
    parser.add_argument("--skip-equal", action="store_true", help="without the second table")
    parser.add_argument("--out-dir", type=Path, default=HERE, help="folder of the three files; "
                        "default is this script's, and only a full benchmark may write there")
    parser.add_argument("--report", action="store_true", help="only print the tables")
    for name in ("--peer", "--seed", "--stop-at"):  # how this file starts itself
        parser.add_argument(name, help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    args = parse()
    if args.peer:
        train_peer(args.peer, int(args.seed), args.stop_at)
        return
    contestants = args.only.split(",") if args.only else SCRIPTS + PEERS
    for name in contestants:
        if name not in SCRIPTS + PEERS:
            fail(f"--only {name}: no such contestant; there are {', '.join(SCRIPTS + PEERS)}")
    if not args.report:
        restricted = args.seeds or args.only
        if restricted and args.out_dir.resolve() == HERE:
            fail("--out-dir: a trial needs a folder of its own, the files here are of full runs")
        benchmark(args.out_dir.resolve(), contestants, args.seeds or range(11, 21), args.skip_equal)
    report(args.out_dir)


if __name__ == "__main__":
    main()
