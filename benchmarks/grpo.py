"""How fast and how well does grpo.py learn, alone and beside TRL's GRPOTrainer?

    python benchmarks/grpo.py --model FOLDER    run all and write the files (FOLDER: SmolLM2-135M)
    python benchmarks/grpo.py --only default    run one part (default, speed, curve), keep the rest
    python benchmarks/grpo.py --report          print the tables from the files, run nothing

grpo.csv        a row for each seed of `python grpo.py`: the whole process in seconds, accuracies.
grpo_speed.csv  one process at a time, in turns: the median seconds of a step (2 prompts of about 45
                tokens by 8 completions of exactly 32, sampled, scored and learned from) after the
                first three, in which memory is still claimed from the system, and the process's
                peak memory. TRL has its defaults but for the sizes.
grpo_curve.csv  the metrics of one run on sums with the pretrained model.
grpo.json       for each of the three: commit, date, machine, versions, command.
"""

import argparse
import csv
import importlib.util
import itertools
import json
import re
import resource
import shlex
import shutil
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
SEEDS = range(11, 16)
PROMPTS = [[{"role": "user", "content": f"What is {a} + {b}? Answer with the number alone."}]
           for a, b in ((12, 7), (45, 38))]
RESULTS = ["seed", "seconds", "greedy_before", "greedy_after"]
PICTURES = {  # picture in docs/: what it shows, entry of grpo.json
    "img/grpo_curve.png": ("Held-out accuracy of SmolLM2-135M on sums, by batches", "curve")}
SPEEDS = ["contestant", "run", "seconds_per_step", "peak_mib"]
CURVE = "--batch-size 8 --num-generations 8 --max-completion-length 16 --eval-every 10 " \
        "--eval-prompts 128 --learning-rate 5e-6 --max-steps 200"


def worth(completion):
    """A reward that differs within every group, so that no work is skipped."""
    return (sum(map(ord, completion)) % 7) / 7


def step_ours(model, bf16, steps):
    """Seconds of each step of grpo.py's own functions."""
    import torch

    spec = importlib.util.spec_from_file_location("script", HERE.parent / "grpo.py")
    grpo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(grpo)
    device = torch.device("cpu")
    args = grpo.default_args(model, device="cpu", bf16=bf16, max_completion_length=32)
    config, weights, tokenizer = grpo.load_model(args)
    policy = grpo.make_model(config, weights, device, args)
    del weights
    sampler = grpo.make_sampler(policy, args)
    tokenizer.stop_ids = [-1]  # completions of exactly 32 tokens
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-6, fused=True)
    examples, seconds = [{"prompt": prompt} for prompt in PROMPTS], []
    for step in range(steps):
        start = time.perf_counter()
        grpo.update_sampler(sampler, policy)
        torch.manual_seed(step)
        batch, _ = grpo.generate_batch(sampler, tokenizer, examples,
                                       lambda text, example: worth(text), args)
        grpo.update(policy, None, optimizer, batch, args)
        seconds.append(time.perf_counter() - start)
    return seconds


def step_trl(model, bf16, steps):
    """Seconds of each step of TRL's trainer."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(2)
    stamps = []

    class Watch(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            stamps.append(time.perf_counter())

        def on_train_end(self, *args, **kwargs):
            stamps.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, use_cpu=True, bf16=bf16, per_device_train_batch_size=16,
            num_generations=8, max_completion_length=32, max_steps=steps, report_to=[],
            save_strategy="no", logging_strategy="no", gradient_checkpointing=False,
            generation_kwargs={"min_new_tokens": 32}, model_init_kwargs={"dtype": "float32"},
            temperature=1.0, disable_tqdm=True)
        GRPOTrainer(
            model=model, args=config, callbacks=[Watch()],
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
            reward_funcs=lambda completions, **_: [worth(c[0]["content"]) for c in completions],
        ).train()
    return [b - a for a, b in itertools.pairwise(stamps)]


CONTESTANTS = {  # name: (function, bfloat16)
    "grpo bfloat16": ("step_ours", True),
    "grpo float32": ("step_ours", False),
    "trl float32": ("step_trl", False),
    "trl bfloat16": ("step_trl", True),
}


def measure(contestant, model, steps):
    """Print the median of the steps after the third, and the peak memory; runs in a process."""
    function, bf16 = CONTESTANTS[contestant]
    seconds = globals()[function](model, bf16, steps)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps([statistics.median(seconds[3:]), peak]))


def speed_rows(model):
    for run in (1, 2):
        for name in CONTESTANTS:
            call = f"import grpo; grpo.measure({name!r}, {model!r}, 8)"
            done = subprocess.run([sys.executable, "-c", call], cwd=HERE, check=True, text=True,
                                  capture_output=True)
            seconds, peak = json.loads(done.stdout.splitlines()[-1])
            print(f"{name}: {seconds:.2f} s a step, {peak:,.0f} MiB", flush=True)
            yield dict(zip(SPEEDS, [name, run, round(seconds, 3), round(peak)]))


def default_rows():
    """`python grpo.py` as a stranger runs it, with each seed."""
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            done = subprocess.run(
                [sys.executable, HERE.parent / "grpo.py", "--seed", str(seed), "--run-dir",
                 f"{folder}/run"], check=True, capture_output=True, text=True)
            seconds = time.perf_counter() - start
        figures = re.findall(r"batches: mean reward ([0-9.]+)", done.stdout)
        print(f"seed {seed}: {seconds:.0f} s, {figures}", flush=True)
        yield dict(zip(RESULTS, [seed, round(seconds, 1), *map(float, figures)]))


def curve(model, minutes):
    """One run on sums with the pretrained model, ended after the minutes."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "sums.jsonl")
        with data.open("w") as file:
            for a, b in itertools.product(range(100), range(100)):
                question = f"What is {a} + {b}? Answer with the number alone."
                row = {"prompt": [{"role": "user", "content": question}], "answer": str(a + b)}
                print(json.dumps(row), file=file)
        flags = [*shlex.split(CURVE), "--model", model, "--data", str(data), "--run-dir",
                 f"{folder}/run"]
        done = subprocess.Popen([sys.executable, HERE.parent / "grpo.py", *flags])
        try:
            done.wait(minutes * 60)
        except subprocess.TimeoutExpired:
            done.kill()
        shutil.copy(f"{folder}/run/metrics.csv", HERE / "grpo_curve.csv")


def draw_curve(axes):
    """Draw grpo_curve.csv into axes."""
    rows = [{name: float(row[name]) for name in ("step", "seconds", "score", "reward")}
            for row in read("grpo_curve.csv")]
    steps = [row["step"] for row in rows]
    axes.plot(steps, [row["reward"] for row in rows], lw=0.5, label="reward of a batch, sampled")
    marks = [row for row in rows if row["score"] == row["score"] and row["step"] % 10 == 0]
    axes.plot([row["step"] for row in marks], [row["score"] for row in marks], "o-", ms=3,
              label="held-out accuracy, greedy")
    minutes = rows[-1]["seconds"] / 60
    axes.set(xlabel=f"batches, {minutes:.0f} minutes on two cores", ylim=(0, 1))
    axes.legend(loc="lower right")


def draw():
    """docs/img/grpo_curve.png, from grpo_curve.csv."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    draw_curve(axes)
    axes.set_title("SmolLM2-135M learns sums below 200")
    (HERE.parent / "docs" / "img").mkdir(exist_ok=True)
    figure.savefig(HERE.parent / "docs" / "img" / "grpo_curve.png", dpi=120)


def read(name):
    path = HERE / name
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def default_table():
    """Markdown, from grpo.csv."""
    lines = ["| seed | seconds | accuracy before | accuracy after |", "|---|---|---|---|"]
    for row in read("grpo.csv"):
        lines.append("| {seed} | {seconds} | {greedy_before} | {greedy_after} |".format(**row))
    return "\n".join(lines)


def speed_table():
    """Markdown, from grpo_speed.csv: medians, and what they are of TRL's."""
    rows, medians = read("grpo_speed.csv"), {}
    for name in CONTESTANTS:
        mine = [row for row in rows if row["contestant"] == name]
        medians[name] = [statistics.median(float(row[column]) for row in mine)
                         for column in SPEEDS[2:]]
    lines = ["| contestant | seconds per step | speed relative to TRL, same precision "
             "| peak memory, MiB | memory relative to TRL |", "|---|---|---|---|---|"]
    for name, (seconds, peak) in medians.items():
        peer = medians["trl " + name.split()[1]]
        lines.append(f"| {name} | {seconds:.2f} | {peer[0] / seconds:.1f} | {peak:,.0f} "
                     f"| {peak / peer[1]:.2f} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--report", action="store_true", help="only print the tables")
    parser.add_argument("--only", nargs="+", choices=["default", "speed", "curve"])
    parser.add_argument("--model", help="folder of SmolLM2-135M-Instruct, for speed and curve")
    parser.add_argument("--minutes", type=float, default=60, help="for the curve")
    args = parser.parse_args()
    if not args.report:
        parts, source = args.only or ["default", "speed", "curve"], cartpole.provenance()
        if {"speed", "curve"} & set(parts):
            if not args.model or not Path(args.model).is_dir():
                parser.error("--model: speed and the curve need the folder of a model")
            args.model = str(Path(args.model).resolve())
        if "default" in parts:
            cartpole.write_rows(HERE / "grpo.csv", RESULTS, default_rows())
        if "speed" in parts:
            cartpole.write_rows(HERE / "grpo_speed.csv", SPEEDS, speed_rows(args.model))
        if "curve" in parts:
            curve(args.model, args.minutes)
        cartpole.record("grpo.json", parts, source)
    if read("grpo_curve.csv"):
        draw()
    print(default_table())
    if read("grpo_speed.csv"):
        print("\n" + speed_table())


if __name__ == "__main__":
    main()
