"""How fast and how well does dpo.py learn, alone, beside TRL's DPOTrainer, and beside the optimum?

    python benchmarks/dpo.py --model FOLDER    run all and write the files (FOLDER: SmolLM2-135M)
    python benchmarks/dpo.py --only default    run one part (default, speed, frontier)
    python benchmarks/dpo.py --report          print the tables from the files, run nothing

dpo.csv           a row for each seed of `python dpo.py`: the whole process in seconds; accuracies,
                  mean reward and distances, before and after.
dpo_speed.csv     one process at a time, in turns: seconds of a step of 16 pairs, prompt and answer
                  of 64 to 128 tokens together, log π_ref of these pairs included, and the process's
                  peak memory. TRL has its defaults but for the sizes.
dpo_frontier.csv  mean reward and KL(π‖π_ref) of dpo.py for several β, and of the best policy π*.
dpo.json          for each of the three: commit, date, machine, versions, command.
"""

import argparse
import csv
import importlib.util
import itertools
import json
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cartpole
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
SEEDS, BETAS = range(11, 16), (0.25, 0.5, 1.0, 2.0, 4.0)
RESULTS = ["seed", "seconds", "pair_accuracy", "greedy_before", "sampled_before", "greedy_after",
           "sampled_after", "reward_before", "reward_after", "reward_best", "kl_to_ref",
           "kl_to_best_before", "kl_to_best_after"]
PICTURES = {  # picture in docs/: what it shows, entry of dpo.json
    "img/dpo_frontier.png": ("Mean reward against KL to the reference, learned and exact",
                             "frontier")}
SPEEDS = ["contestant", "run", "seconds_per_step", "peak_mib"]
FRONTIER = ["policy", "beta", "seed", "kl_to_ref", "reward"]


def script():
    """dpo.py, the script, as a module."""
    spec = importlib.util.spec_from_file_location("script", HERE.parent / "dpo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_of_pairs():
    """16 pairs of text; their answers are of 20 to 80 words of one token each."""
    rng, rows = random.Random(0), []
    words = ("the", "of", "and", "to", "in", "a", "is", "that", "for", "it", "as", "was", "with")
    for _ in range(16):
        answers = [" ".join(rng.choices(words, k=rng.randint(20, 80))) for _ in range(2)]
        prompt = [{"role": "user", "content": " ".join(rng.choices(words, k=15))}]
        rows.append({"prompt": prompt, "chosen": answers[0], "rejected": answers[1]})
    return rows


def step_ours(model, bf16, steps):
    """Seconds of each step of dpo.py's own functions, log π_ref of the pairs included."""
    import torch

    dpo, seconds, device = script(), [], torch.device("cpu")
    args = dpo.default_args(model, device="cpu", bf16=bf16)
    config, weights, tokenizer = dpo.load_model(args)
    policy = dpo.make_model(config, weights, device, args)
    del weights
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-6, weight_decay=0.0, fused=True)
    pairs = [dpo.read_pair(row, tokenizer, 2048)[1] for row in rows_of_pairs()]
    pairs = [pairs[i] for i in dpo.by_length(pairs, range(16))]
    for _ in range(steps):
        start = time.perf_counter()
        ref_logprob = dpo.all_answer_logprobs(policy, pairs, args.micro_batch_size, device)
        dpo.update(policy, optimizer, pairs, ref_logprob, args)
        seconds.append(time.perf_counter() - start)
    return seconds


def step_trl(model, bf16, steps):
    """Seconds of each step of TRL's trainer."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    torch.set_num_threads(2)
    stamps = []

    class Watch(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            stamps.append(time.perf_counter())

        def on_train_end(self, *args, **kwargs):
            stamps.append(time.perf_counter())

    rows = [{"prompt": row["prompt"], "chosen": [{"role": "assistant", "content": row["chosen"]}],
             "rejected": [{"role": "assistant", "content": row["rejected"]}]}
            for row in rows_of_pairs()]
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder, use_cpu=True, bf16=bf16, per_device_train_batch_size=16,
            max_steps=steps, report_to=[], save_strategy="no", logging_strategy="no",
            gradient_checkpointing=False, model_init_kwargs={"dtype": "float32"},
            disable_tqdm=True)
        DPOTrainer(model=model, args=config, callbacks=[Watch()],
                   train_dataset=Dataset.from_list(rows)).train()
    return [b - a for a, b in itertools.pairwise(stamps)]


CONTESTANTS = {  # name: (function, bfloat16)
    "dpo bfloat16": ("step_ours", True),
    "dpo float32": ("step_ours", False),
    "trl float32": ("step_trl", False),
    "trl bfloat16": ("step_trl", True),
}


def measure(contestant, model, steps):
    """Print the median of the steps after the first, and the peak memory; runs in a process."""
    function, bf16 = CONTESTANTS[contestant]
    seconds = globals()[function](model, bf16, steps)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps([statistics.median(seconds[1:]), peak]))


def speed_rows(model):
    for run in (1,):
        for name in CONTESTANTS:
            call = f"import dpo; dpo.measure({name!r}, {model!r}, 2)"
            done = subprocess.run([sys.executable, "-c", call], cwd=HERE, check=True, text=True,
                                  capture_output=True)
            seconds, peak = json.loads(done.stdout.splitlines()[-1])
            print(f"{name}: {seconds:.2f} s a step, {peak:,.0f} MiB", flush=True)
            yield dict(zip(SPEEDS, [name, run, round(seconds, 3), round(peak)]))


def train(*flags):
    """`python dpo.py` in a fresh process: (seconds, figures it prints, in the order of RESULTS)."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, HERE.parent / "dpo.py", *map(str, flags), "--run-dir",
             f"{folder}/run"], check=True, capture_output=True, text=True)
        seconds = time.perf_counter() - start
    lines = {name: [float(figure) for figure in re.findall(r"(?<=[ ])-?[0-9]+[.][0-9]+", line)]
             for name, line in re.findall(r"^(score|before|after)(.*)$", done.stdout, re.M)}
    names = ["greedy", "sampled", "reward", "best_reward", "kl_to_ref", "kl_to_best"]
    before, after = (dict(zip(names, lines[name])) for name in ("before", "after"))
    return seconds, [lines["score"][0], before["greedy"], before["sampled"], after["greedy"],
                     after["sampled"], before["reward"], after["reward"], after["best_reward"],
                     after["kl_to_ref"], before["kl_to_best"], after["kl_to_best"]]


def default_rows():
    for seed in SEEDS:
        seconds, figures = train("--seed", seed)
        print(f"seed {seed}: {seconds:.0f} s, {figures}", flush=True)
        yield dict(zip(RESULTS, [seed, round(seconds, 1), *figures]))


def frontier_rows():
    """Two policies for each β: what dpo.py made, and the best there is."""
    for beta, seed in itertools.product(BETAS, (11, 12)):
        _, figures = train("--seed", seed, "--beta", beta)
        row = dict(zip(RESULTS[2:], figures))
        print(f"beta {beta}, seed {seed}: {row}", flush=True)
        yield dict(zip(FRONTIER, ["dpo", beta, seed, row["kl_to_ref"], row["reward_after"]]))
        # KL(π*‖π_ref) = (E[r] under π* − β log Z) / β and KL(π_ref‖π*) = log Z − E_ref[r] / β
        log_z = row["kl_to_best_before"] + row["reward_before"] / beta
        yield dict(zip(FRONTIER, ["best", beta, seed, round(row["reward_best"] / beta - log_z, 4),
                                  row["reward_best"]]))


def draw_frontier(axes):
    """Draw dpo_frontier.csv into axes."""
    rows = read("dpo_frontier.csv")
    for seed, color in zip(sorted({row["seed"] for row in rows}), ("#0072B2", "#D55E00")):
        for policy, mark, label in (("best", "-", "best policy π*"), ("dpo", "o", "dpo.py")):
            points = sorted((float(row["kl_to_ref"]), float(row["reward"])) for row in rows
                            if (row["policy"], row["seed"]) == (policy, seed))
            axes.plot(*zip(*points), mark, color=color, label=f"{label}, seed {seed}")
    axes.set(xlabel="KL(π‖π_ref)", ylabel="mean reward")
    axes.legend()


def draw():
    """docs/img/dpo_frontier.png, from dpo_frontier.csv."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    draw_frontier(axes)
    axes.set_title("Reward against distance from the reference policy")
    (HERE.parent / "docs" / "img").mkdir(exist_ok=True)
    figure.savefig(HERE.parent / "docs" / "img" / "dpo_frontier.png", dpi=120)


def read(name):
    path = HERE / name
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def default_table():
    """Markdown, from dpo.csv."""
    lines = ["| seed | seconds | greedy before | greedy after | sampled before | sampled after "
             "| E[r] of π* | KL(π‖π*) before | KL(π‖π*) after |",
             "|---|---|---|---|---|---|---|---|---|"]
    for row in read("dpo.csv"):
        lines.append("| {seed} | {seconds} | {greedy_before} | {greedy_after} | {sampled_before} | "
                     "{sampled_after} | {reward_best} | {kl_to_best_before} | {kl_to_best_after} |"
                     .format(**row))
    return "\n".join(lines)


def speed_table():
    """Markdown, from dpo_speed.csv: medians, and what they are of TRL's."""
    rows, medians = read("dpo_speed.csv"), {}
    for name in CONTESTANTS:
        mine = [row for row in rows if row["contestant"] == name]
        medians[name] = [statistics.median(float(row[column]) for row in mine)
                         for column in SPEEDS[2:]]
    lines = ["| contestant | pairs per second | speed relative to TRL, same precision "
             "| peak memory, MiB | memory relative to TRL |", "|---|---|---|---|---|"]
    for name, (seconds, peak) in medians.items():
        peer = medians["trl " + name.split()[1]]
        lines.append(f"| {name} | {16 / seconds:.2f} | {peer[0] / seconds:.1f} | {peak:,.0f} "
                     f"| {peak / peer[1]:.2f} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--report", action="store_true", help="only print the tables")
    parser.add_argument("--only", nargs="+", choices=["default", "speed", "frontier"])
    parser.add_argument("--model", help="folder of SmolLM2-135M-Instruct, for speed")
    args = parser.parse_args()
    if not args.report:
        parts, source = args.only or ["default", "speed", "frontier"], cartpole.provenance()
        if "speed" in parts:
            if not args.model or not Path(args.model).is_dir():
                parser.error("--model: speed needs the folder of a model")
            args.model = str(Path(args.model).resolve())
        if "default" in parts:
            cartpole.write_rows(HERE / "dpo.csv", RESULTS, default_rows())
        if "speed" in parts:
            cartpole.write_rows(HERE / "dpo_speed.csv", SPEEDS, speed_rows(args.model))
        if "frontier" in parts:
            cartpole.write_rows(HERE / "dpo_frontier.csv", FRONTIER, frontier_rows())
        cartpole.record("dpo.json", parts, source)
    if read("dpo_frontier.csv"):
        draw()
    print(default_table())
    if read("dpo_speed.csv"):
        print("\n" + speed_table())


if __name__ == "__main__":
    main()
