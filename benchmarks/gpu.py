"""Do the scripts compute the right thing on a GPU, do they learn there, and how fast are they?

    python benchmarks/gpu.py --out DIR                         all parts, at most eight minutes
    python benchmarks/gpu.py --out DIR --device cpu --quick    the same code with tiny sizes

Each part runs in a process of its own with its own time limit, in this order:

    1  Right: loss and gradients of an update compared with those of the CPU; the distribution of
       samples; checkpoints moved between CPU and GPU; the same run twice. See gpu_checks.py.
    4  Speed of grpo.py: a model with the shapes of Qwen2.5-0.5B and random weights, 32 prompts of
       100 tokens by 8 completions of 256, beside TRL's GRPOTrainer if TRL is installed.
    5  Speed of dpo.py: the same model, 16 pairs of 512 tokens, beside TRL's DPOTrainer.
    3  Speed of ppo.py: steps per second on CartPole, HalfCheetah and Breakout.
    2  Learning: ppo.py solves CartPole, the default runs of grpo.py and dpo.py reach their goals.
    6  Learning curve of Breakout, in the time that is left.

DIR/results.jsonl gets a line for each result at once, so nothing is lost if a part is cut off.
What a part prints goes to DIR/part-N.log. The table at the end shows all lines. The exit code is 1
if a check does not hold or a part fails. Parts whose packages are missing are left out.
"""

import argparse
import gc
import importlib
import importlib.util
import itertools
import json
import os
import platform
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch._dynamo

ROOT = Path(__file__).resolve().parent.parent
# The scripts are found first, as this folder has files of the same names.
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from gpu_checks import BRIEF, SMALL_QWEN, fast_agent, right  # noqa: E402

START, TOTAL_SECONDS = time.perf_counter(), 480

QWEN = SMALL_QWEN | {  # Qwen2.5-0.5B
    "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14}


@dataclass(frozen=True)
class Run:
    """What a part has to know, and where it writes its results."""

    part: int
    out: Path
    device: str
    quick: bool
    work: Path = Path()  # for files that are deleted in the end

    def write(self, name, **figures):
        """Append a line to results.jsonl."""
        row = {"part": self.part, "name": name} | figures
        with (self.out / "results.jsonl").open("a") as file:
            print(json.dumps(row, ensure_ascii=False), file=file)
        print(f"after {time.perf_counter() - START:.1f} s: {row}", flush=True)  # into the log

    def check(self, name, value, limit):
        """Write a value that must not be above the limit; NaN is above it."""
        self.write(name, value=float(value), limit=limit, holds=bool(value <= limit))

    def attempt(self, name, function, *args, **kwargs):
        """Call a function; an error is written, and does not keep the rest from being measured."""
        try:
            function(self, *args, **kwargs)
        except Exception as error:
            self.write(name, failed=f"{error!r:.200}")
            traceback.print_exc()

    def synchronize(self):
        """Wait until the GPU has finished."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def seconds_of(self, function, *args):
        """Call a function. Return its result and the seconds it took."""
        self.synchronize()
        start = time.perf_counter()
        result = function(*args)
        self.synchronize()
        return result, time.perf_counter() - start

    def reset(self):
        """Forget the last measurement: its memory, the peak, and compiled code."""
        gc.collect()
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        # After too many recompilations torch.compile would silently do nothing.
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def write_speed(self, name, tokens, **seconds):
        """Write the seconds of a step's parts, the tokens per second and the peak memory."""
        peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # of the process
        if self.device == "cuda":
            peak_mib = torch.cuda.max_memory_allocated() / 2**20
        self.write(name, tokens_per_second=tokens / sum(seconds.values()), **seconds,
                   peak_mib=round(peak_mib), compiled_graphs=self.compiled_graphs())

    def compiled_graphs(self):
        """Return how many graphs torch.compile has made since reset."""
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def available(run, name, *packages):
    """Return whether the packages are installed; write a line if some are not."""
    missing = [package for package in packages if not importlib.util.find_spec(package)]
    if missing:
        run.write(name, left_out=f"not installed: {', '.join(missing)}")
    return not missing


# --- Parts 4 and 5: speed of the language scripts ---


def model_folder(run):
    """Make a Hugging Face folder, unless an earlier part has: random weights, words as tokens."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers

    import grpo

    folder, shapes = run.work / "model", SMALL_QWEN if run.quick else QWEN
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(exist_ok=True)
    with torch.device("meta"):
        names = grpo.Decoder(grpo.read_config(shapes, "random")).state_dict()
    tensors = {}
    for name, empty in names.items():
        tensor = 0.02 * torch.randn(empty.shape, device=run.device)
        tensors[name] = (tensor + ("norm" in name)).to("cpu", torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    words = {f"w{i}": i for i in range(shapes["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w0", "pad_token": "w1"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps(shapes))  # last: the folder is complete
    return folder


TRL = ("trl", "transformers", "datasets")


def random_text(rng, num_words):
    return " ".join(f"w{rng.randrange(2, 500)}" for _ in range(num_words))


def load(script, args):
    """Return model, optimizer and tokenizer of a folder, made by grpo.py or dpo.py."""
    config, tensors, tokenizer = script.load_model(args)
    model = script.make_model(config, tensors, torch.device(args.device), args)
    return model, torch.optim.AdamW(model.parameters(), 1e-6, fused=True), tokenizer


def text_reward(text):
    """Return a reward that differs within every group, so that all rows are learned from."""
    return zlib.crc32(text.encode()) / 2**32


def grpo_speed(run, name, sizes, prompts, **flags):
    """Measure grpo.py's sampling and update; the first step is not counted."""
    import grpo

    run.reset()
    args = grpo.default_args(
        model=str(model_folder(run)), device=run.device, bf16=run.device == "cuda",
        num_generations=sizes["generations"], max_completion_length=sizes["length"], **flags)
    model, optimizer, tokenizer = load(grpo, args)
    sampler = grpo.make_sampler(model, args)
    examples = [{"prompt": prompt, "answer": ""} for prompt in prompts]
    torch.manual_seed(0)
    sampling, update = [], []

    def learn(batch):
        grpo.update(model, None, optimizer, batch, args)
        grpo.update_sampler(sampler, model)

    for _ in range(sizes["steps"]):
        (batch, _), seconds = run.seconds_of(
            grpo.generate_batch, sampler, tokenizer, examples,
            lambda text, example: text_reward(text), args)
        sampling.append(seconds)
        _, seconds = run.seconds_of(learn, batch)
        update.append(seconds)
    tokens = len(prompts) * sizes["generations"] * sizes["length"]
    run.write_speed(name, tokens, sampling_seconds=statistics.median(sampling[1:]),
                    update_seconds=statistics.median(update[1:]))


def train_trl(run, trainer, config, rows, **settings):
    """Train with a trainer of TRL; return the median seconds of a step without the first."""
    from datasets import Dataset
    from transformers import TrainerCallback

    stamps = []

    class Watch(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            run.synchronize()
            stamps.append(time.perf_counter())

        def on_train_end(self, *args, **kwargs):
            self.on_step_begin()

    run.reset()
    config = config(
        output_dir=str(run.work / "trl"), use_cpu=run.device == "cpu", bf16=run.device == "cuda",
        report_to=[], save_strategy="no", logging_strategy="no", gradient_checkpointing=False,
        model_init_kwargs={"dtype": "float32"}, disable_tqdm=True, **settings)
    trainer(model=str(model_folder(run)), args=config, callbacks=[Watch()],
            train_dataset=Dataset.from_list(rows)).train()
    return statistics.median(b - a for a, b in itertools.pairwise(stamps[1:]))


def speed_of_grpo(run):
    sizes = {"prompts": 32, "prompt_length": 100, "generations": 8, "length": 256, "steps": 3}
    if run.quick:
        sizes = {"prompts": 2, "prompt_length": 6, "generations": 4, "length": 8, "steps": 2}
    rng = random.Random(0)
    prompts = [random_text(rng, sizes["prompt_length"]) for _ in range(sizes["prompts"])]
    cases = {"grpo.py": {}, "TRL's GRPOTrainer": {}, "grpo.py, compiled": {"compile": True},
             "grpo.py, 32 rows together": {"micro_batch_size": 32}}
    for name, flags in cases.items():
        if "TRL" not in name:
            run.attempt(name, grpo_speed, name, sizes, prompts, **flags)
        elif available(run, name, *TRL):
            run.attempt(name, grpo_speed_of_trl, name, sizes, prompts)


def grpo_speed_of_trl(run, name, sizes, prompts):
    from trl import GRPOConfig, GRPOTrainer

    def reward(completions, **_):
        return [text_reward(text) for text in completions]

    rows = len(prompts) * sizes["generations"]
    seconds = train_trl(
        run, partial(GRPOTrainer, reward_funcs=reward), GRPOConfig,
        [{"prompt": prompt} for prompt in prompts], per_device_train_batch_size=8,
        gradient_accumulation_steps=rows // 8, num_generations=sizes["generations"],
        max_completion_length=sizes["length"], max_steps=sizes["steps"], temperature=1.0)
    run.write_speed(name, rows * sizes["length"], step_seconds=seconds)


def tokens_of_pairs(sizes):
    return 2 * sizes["pairs"] * (sizes["prompt_length"] + sizes["length"])


def dpo_speed(run, name, sizes, rows, **flags):
    """Measure dpo.py's reference log-probabilities and update; the first step is not counted."""
    import dpo

    run.reset()
    args = dpo.default_args(model=str(model_folder(run)), device=run.device,
                            bf16=run.device == "cuda", batch_size=len(rows), **flags)
    model, optimizer, tokenizer = load(dpo, args)
    pairs = [dpo.Pair(*(tokenizer.encode(row[name]) for name in ("prompt", "chosen", "rejected")))
             for row in rows]
    reference, update = [], []
    for _ in range(sizes["steps"]):
        ref_logprob, seconds = run.seconds_of(dpo.all_answer_logprobs, model, pairs,
                                              args.micro_batch_size, args.device)
        reference.append(seconds)
        _, seconds = run.seconds_of(dpo.update, model, optimizer, pairs, ref_logprob, args)
        update.append(seconds)
    run.write_speed(name, tokens_of_pairs(sizes), update_seconds=statistics.median(update[1:]),
                    reference_seconds=statistics.median(reference[1:]))


def speed_of_dpo(run):
    sizes = {"pairs": 16, "prompt_length": 256, "length": 256, "steps": 4}
    if run.quick:
        sizes = {"pairs": 2, "prompt_length": 6, "length": 8, "steps": 2}
    rng = random.Random(0)
    rows = [{"prompt": random_text(rng, sizes["prompt_length"]),
             "chosen": random_text(rng, sizes["length"]),
             "rejected": random_text(rng, sizes["length"])} for _ in range(sizes["pairs"])]
    cases = {"dpo.py": {}, "dpo.py, 8 pairs together": {"micro_batch_size": 8},
             "TRL's DPOTrainer": {}, "dpo.py, compiled": {"compile": True, "micro_batch_size": 8}}
    for name, flags in cases.items():
        if "TRL" not in name:
            run.attempt(name, dpo_speed, name, sizes, rows, **flags)
        elif available(run, name, *TRL):
            run.attempt(name, dpo_speed_of_trl, name, sizes, rows)


def dpo_speed_of_trl(run, name, sizes, rows):
    from trl import DPOConfig, DPOTrainer

    seconds = train_trl(run, DPOTrainer, DPOConfig, rows, max_steps=sizes["steps"],
                        per_device_train_batch_size=sizes["pairs"], max_length=2048)
    run.write_speed(name, tokens_of_pairs(sizes), step_seconds=seconds)


# --- Parts 3 and 6: ppo.py ---


class Stopwatch:
    """Measures ppo.train from outside: the seconds in some functions, and when to stop."""

    def __init__(self, run, seconds, warmup):
        self.run, self.limit, self.warmup = run, seconds, warmup
        self.iteration, self.parts = 0, Counter()

    def timed(self, name, function):
        """Return the function with its seconds added to parts[name]."""
        def wrapper(*args):
            result, seconds = self.run.seconds_of(function, *args)
            self.parts[name] += seconds
            return result
        return wrapper

    def reached(self, log, goal):
        """Stand in for Logger.reached, which ppo.train calls before each iteration."""
        now, self.iteration = time.perf_counter(), self.iteration + 1
        if self.iteration == self.warmup + 1:  # start here
            self.start, self.first_step = now, log.step
            self.parts.clear()
        if self.iteration <= self.warmup + 1 or now - self.start < self.limit:
            return False
        self.seconds, self.steps = now - self.start, log.step - self.first_step
        return True


def ppo_speed(run, env_id, device, num_envs=None, compile=False, bf16=False):
    """Measure ppo.train on an environment for some seconds after the first iterations."""
    import ppo

    run.reset()
    sizes = {"num_envs": num_envs} if num_envs else {}
    if run.quick:
        sizes = {"num_envs": 4, "num_steps": 8, "num_minibatches": 2, "update_epochs": 1}
    clock = Stopwatch(replace(run, device=device), 0.1 if run.quick else 2.5, warmup=2)
    with tempfile.TemporaryDirectory(dir=run.work) as folder, ExitStack() as patches:
        args = ppo.default_args(env_id, device=device, run_dir=f"{folder}/run",
                                total_timesteps=10**9, **sizes)
        for owner, name, replacement in (
                (ppo, "Agent", fast_agent(compile, bf16)),
                (ppo, "collect", clock.timed("collect", ppo.collect)),
                (ppo, "update", clock.timed("update", ppo.update)),
                (ppo.Envs, "step", clock.timed("environment", ppo.Envs.step)),
                (ppo.Logger, "reached", lambda log, goal: clock.reached(log, goal))):
            patches.enter_context(mock.patch.object(owner, name, replacement))
        ppo.train(args)
    share = {name: round(seconds / clock.seconds, 3) for name, seconds in clock.parts.items()}
    name = [env_id, f"{args.num_envs} environments", device]
    name += ["compiled"] * compile + ["bf16"] * bf16
    run.write(", ".join(name), steps_per_second=clock.steps / clock.seconds,
              environment=share["environment"], policy=share["collect"] - share["environment"],
              update=share["update"], compiled_graphs=run.compiled_graphs())


def speed_of_ppo(run):
    """Measure all cases, the most important ones first; the last ones may be cut off."""
    breakout = [("ALE/Breakout-v5", run.device, num_envs, compile, bf16)
                for compile, bf16 in ((False, False), (False, True), (True, False))
                for num_envs in ((128,) if run.quick else (128, 8, 32))]
    vectors = [(env_id, device, None, compile, False)
               for compile, device in ((False, "cpu"), (False, run.device), (True, run.device))
               for env_id in ("CartPole-v1", "HalfCheetah-v5")]
    packages = {"ALE/Breakout-v5": "ale_py", "HalfCheetah-v5": "mujoco"}
    for case in dict.fromkeys(breakout[:3] + vectors + breakout[3:]):  # on the CPU two are equal
        if available(run, case[0], packages.get(case[0], "gymnasium")):
            run.attempt(", ".join(map(str, case)), ppo_speed, *case)


def breakout(run):
    """Train on Breakout for two million steps and write the curve."""
    import ppo

    steps, every = (512, 128) if run.quick else (2_000_000, 50_000)
    # More environments than by default, but the same number of steps per iteration.
    args = ppo.default_args("ALE/Breakout-v5", device=run.device, num_envs=32, num_steps=32,
                            total_timesteps=steps, run_dir=str(run.work / "breakout"))
    if run.quick:
        args = replace(args, num_envs=4, num_steps=16)
    write = ppo.Logger.write

    def write_both(log, *rest, **metrics):
        before = log.step
        write(log, *rest, **metrics)
        if before // every != log.step // every:
            run.write("ALE/Breakout-v5", steps=log.step, score=log.score, seconds=log.seconds)

    with mock.patch.object(ppo.Logger, "write", write_both):
        ppo.train(args)


# --- Part 2: does it learn? ---


def learns(run):
    """Train with the default flags until the goals are reached."""
    for name, goal in {"ppo": 475, "grpo": 0.97, "dpo": 0.9}.items():
        run.attempt(name, learn, name, goal)


def learn(run, name, goal):
    script = importlib.import_module(name)
    goal, flags = (0.0, BRIEF[name]) if run.quick else (goal, {})
    if name != "dpo":  # which has no such flag
        flags = flags | {"stop_at": goal}
    args = script.Args(device=run.device, run_dir=str(run.work / name), **flags)
    start = time.perf_counter()
    model, score = script.train(args)
    seconds = time.perf_counter() - start
    if name == "dpo":  # its score is that of pairs; the goal is for sums that are right
        run.write("dpo, accuracy on held-out pairs", score=score)
        score = script.evaluate_sums(model, script.Characters(), None, args)["greedy"]
    run.write(f"{name}, default flags", score=score, goal=goal, seconds=seconds,
              holds=score >= goal)


# --- The parts as processes ---


def output_of(*command):
    """Return what a command prints, nothing if there is no such command."""
    if not shutil.which(command[0]):
        return ""
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def machine(run):
    """Write the card, its driver and the versions."""
    found = {"cores": os.cpu_count(), "python": platform.python_version(),
             "torch": torch.__version__, "commit": output_of("git", "rev-parse", "HEAD"),
             "date": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    if run.device == "cuda":
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found |= {"card": torch.cuda.get_device_name(), "cuda": torch.version.cuda,
                  "driver": output_of(*query)}
    run.write("machine", **found)


CONTROL = ("gymnasium", "tyro", "tqdm")
LANGUAGE = ("tyro", "tqdm", "tokenizers", "safetensors", "jinja2")
PARTS = {  # number: (function, seconds, packages), in the order in which they run
    0: (machine, 30, ()),
    1: (right, 90, CONTROL),
    4: (speed_of_grpo, 110, LANGUAGE),
    5: (speed_of_dpo, 70, LANGUAGE),
    3: (speed_of_ppo, 110, CONTROL),
    2: (learns, 60, CONTROL),
    6: (breakout, TOTAL_SECONDS, (*CONTROL, "ale_py")),
}


def run_part(run, seconds):
    """Run a part in a process of its own; write a line if it is left out, fails or is cut off."""
    if not available(run, "part", *PARTS[run.part][2]):
        return
    command = [sys.executable, __file__, "--out", run.out, "--device", run.device,
               "--part", run.part, "--work", run.work, *["--quick"] * run.quick]
    log = run.out / f"part-{run.part}.log"
    with log.open("w") as file:
        process = subprocess.Popen([str(word) for word in command], cwd=run.out, stdout=file,
                                   stderr=subprocess.STDOUT, start_new_session=True)
        try:
            if process.wait(max(seconds, 0)):
                lines = log.read_text().splitlines()
                run.write("part", failed=lines[-1] if lines else process.returncode)
        except subprocess.TimeoutExpired:
            run.write("part", cut_off_after_seconds=round(seconds))
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # and the processes that it has started
                process.wait()


def read_results(out):
    path = out / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(results):
    """Return a Markdown table of the results."""
    lines = ["| part | what | result |", "|---|---|---|"]
    for result in results:
        figures = [f"{name} {value:.4g}" if type(value) is float else f"{name} {value}"
                   for name, value in result.items() if name not in ("part", "name")]
        lines.append(f"| {result['part']} | {result['name']} | {', '.join(figures)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the code")
    parser.add_argument("--part", type=int, choices=PARTS, help="run this part in this process")
    parser.add_argument("--work", type=Path, help="folder for large files")
    args = parser.parse_args()
    if not torch.get_device_module(args.device).is_available():
        parser.error(f"--device {args.device}: not available here")
    args.out.mkdir(parents=True, exist_ok=True)
    run = Run(args.part, args.out.resolve(), args.device, args.quick, args.work)
    if args.part is not None:
        PARTS[args.part][0](run)
        return
    if read_results(run.out):
        sys.exit(f"--out {args.out}: holds results already; choose another folder")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # print the table then, too
    end = time.monotonic() + TOTAL_SECONDS
    try:
        with tempfile.TemporaryDirectory() as work:
            for part, (_, seconds, _) in PARTS.items():
                print(f"part {part}", flush=True)
                run_part(replace(run, part=part, work=Path(work)),
                         min(seconds, end - time.monotonic()))
    finally:
        results = read_results(run.out)
        print(table(results), flush=True)
    sys.exit(any("failed" in result or not result.get("holds", True) for result in results))


if __name__ == "__main__":
    main()
