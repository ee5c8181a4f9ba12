"""Write the measured tables into README.md and docs/, and expected results into the docstrings.

    python benchmarks/readme.py            rewrite the tables between their markers, and the lines
                                           after "Results, ... seeds" in the scripts
    python benchmarks/readme.py --check    exit code 1 if a file is out of date
"""

import argparse
import ast
import csv
import io
import re
import statistics
import tokenize
from pathlib import Path

import cartpole
import tasks

import dpo
import grpo
import ppo

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
BOOK = "http://incompleteideas.net/book/the-book-2nd.html"
SCRIPTS = {  # name: (method with its source, what is new in the file)
    "reinforce": ("REINFORCE ([Williams 1992](https://doi.org/10.1007/BF00992696))",
                  "the policy gradient, estimated from whole episodes"),
    "reinforce_baseline": (f"REINFORCE with baseline ([Sutton & Barto, 13.4]({BOOK}))",
                           "a learned value, subtracted from each return"),
    "actor_critic": (f"Actor-critic with eligibility traces ([Sutton & Barto, 13.5, 13.6]({BOOK}))",
                     "an update after every step, from the value of the next state"),
    "ppo": ("PPO with GAE ([Schulman et al. 2017](https://arxiv.org/abs/1707.06347))",
            "several updates with each batch, under a clipped objective"),
    "grpo": ("GRPO and variants ([Shao et al. 2024](https://arxiv.org/abs/2402.03300))",
             "for language models; the mean reward of a group of completions is the baseline"),
    "dpo": ("DPO and variants ([Rafailov et al. 2023](https://arxiv.org/abs/2305.18290))",
            "a classification loss on pairs of answers replaces rewards and sampling"),
}
PEERS = {"grpo": "TRL's GRPOTrainer", "dpo": "TRL's DPOTrainer"}


def code_lines(source):
    """Numbers of the lines with code: no blanks, comments or docstrings."""
    skip, prose, code = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT,
                         tokenize.DEDENT, tokenize.ENDMARKER), set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            prose.update(range(node.lineno, node.end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skip:
            code.update(range(token.start[0], token.end[0] + 1))
    return code - prose


def sizes(name):
    """The number of code lines of a script, and of those up to the end of train."""
    source = (ROOT / f"{name}.py").read_text()
    end = next(node.end_lineno for node in ast.parse(source).body
               if isinstance(node, ast.FunctionDef) and node.name == "train")
    code = code_lines(source)
    return f"{len(code)} ({sum(line <= end for line in code)})"


def mean(rows, column):
    return statistics.mean(float(row[column]) for row in rows)


def median(rows, column):
    return statistics.median(float(row[column]) for row in rows)


def language_rows(name):
    """Rows of grpo.csv or dpo.csv."""
    return {"grpo": grpo, "dpo": dpo}[name].read(f"{name}.csv")


def result(name):
    """What a script reaches, and in how many seconds."""
    if name in PEERS:
        rows = language_rows(name)
        old = "earlier" in cartpole.note(f"{name}.json", "default")
        return (f"addition task: {100 * mean(rows, 'greedy_before'):.1f}% correct before, "
                f"{100 * mean(rows, 'greedy_after'):.1f}% after; {median(rows, 'seconds'):.0f} s"
                + " (earlier version of the script)" * old)
    rows = cartpole.grouped(cartpole.read_rows(BENCHMARKS / "cartpole.csv"))[name]
    solved = sum(row["solved"] for row in rows)
    whole, training = (cartpole.median(rows, column, True)
                       for column in ("process_seconds", "train_seconds"))
    return (f"CartPole-v1 solved by {solved:.0f} of {len(rows)} seeds; {whole:.1f} s, of which "
            f"{training:.1f} s are training")


def files():
    """Markdown for README.md: a line for each script."""
    lines = ["| file | method | new in this file | result | lines of code (algorithm only) |",
             "|---|---|---|---|---|"]
    lines += [f"| [`{name}.py`]({name}.py) | {method} | {new} | {result(name)} | {sizes(name)} |"
              for name, (method, new) in SCRIPTS.items()]
    return "\n".join(lines)


def picture(results_page):
    """Markdown: the caption of docs/img/overview.png, with the panels of earlier versions."""
    parts = {"HalfCheetah": ("curves.json", "half_cheetah"),
             "GRPO": ("grpo.json", "curve"), "DPO": ("dpo.json", "frontier")}
    old = [panel for panel, entry in parts.items() if "earlier" in cartpole.note(*entry)]
    text = ("*The picture shows learning curves of the four control scripts on CartPole, of "
            "`ppo.py` on HalfCheetah (seeds 11 to 15) and of `grpo.py` with the language model "
            "SmolLM2-135M, and the reward of `dpo.py` beside the best possible reward")
    if old:
        text += (f". Measured with earlier versions of the scripts: {', '.join(old)} "
                 f"([details]({results_page}#learning-curves))")
    return f"{text}.*"


def ladder():
    """Markdown for docs/index.md: a line for each page of a script."""
    lines = ["| page | new in this script | result |", "|---|---|---|"]
    lines += [f"| [{method.split(' (')[0]}]({name}.md) | {new} | {result(name)} |"
              for name, (method, new) in SCRIPTS.items()]
    return "\n".join(lines)


def marked(note):
    """A mark for a result with a note; result_notes explains it."""
    return " †" if note else ""


def solve_result():
    """A line of the README's table of results: CartPole-v1 until solved."""
    groups = cartpole.grouped(cartpole.read_rows(BENCHMARKS / "cartpole.csv"))
    seconds = {name: [cartpole.median(groups[name], column, True)
                      for column in ("train_seconds", "process_seconds")]
               for name in ("ppo", "sb3-ppo")}
    solved = sum(row["solved"] for row in groups["ppo"])
    training, whole = seconds["ppo"]
    return ("| CartPole-v1 until solved | `python ppo.py --env-id CartPole-v1 --stop-at 475` "
            f"| solved by {solved:.0f} of {len(groups['ppo'])} seeds | {len(groups['ppo'])} "
            f"| {training:.1f} | {whole:.1f} | Stable-Baselines3 PPO, tuned, same machine: "
            "{:.1f} s of training, {:.1f} s in total |".format(*seconds["sb3-ppo"]))


def control_results():
    """Lines of the README's table of results: the tasks of ppo.csv that have ten seeds."""
    published = {row["task"]: row for row in ppo.read("published.csv")}
    rows = ppo.read("ppo.csv")
    for task, flags, *_ in ppo.TASKS:
        runs = [row for row in rows if (row["task"], row["flags"]) == (task, flags)]
        if len(runs) < 10 or task == "CartPole-v1":  # CartPole-v1 has a line of its own
            continue
        score, low, high = ppo.interval([float(row["score"]) for row in runs])
        peer = published.get(task)
        comparison = "—"
        if peer:
            other = "" if peer["published_task"] == task else f"{peer['published_task']}, "
            comparison = (f"RL Baselines3 Zoo, published: {float(peer['score']):,.4g} "
                          f"({other}{peer['steps']} steps)")
        command = f"python ppo.py --env-id {task} {flags}".strip()
        yield (f"| {task}, {int(runs[0]['steps']):,} steps{marked(cartpole.note('ppo.json', task))}"
               f" | `{command}` | {score:,.4g} (95% interval {low:,.4g} to {high:,.4g}) "
               f"| {len(runs)} | {median(runs, 'seconds'):.0f} | — | {comparison} |")


def language_results():
    """Lines of the README's table of results: the default runs of grpo.py and dpo.py."""
    for name, peer in PEERS.items():
        rows, speed = language_rows(name), grpo.read(f"{name}_speed.csv")
        scores = [float(row["greedy_after"]) for row in rows]
        own, other = (median([row for row in speed if row["contestant"] == f"{who} float32"],
                             "seconds_per_step") for who in (name, "trl"))
        yield (f"| addition task{marked(cartpole.note(f'{name}.json', 'default'))} "
               f"| `python {name}.py` | accuracy {statistics.mean(scores):.3f} "
               f"(range {min(scores):.3f} to {max(scores):.3f}) | {len(rows)} "
               f"| — | {median(rows, 'seconds'):.0f} | for a step of SmolLM2-135M in float32, "
               f"{peer} needs {other / own:.1f} times as long |")


def results():
    """Markdown: the README's table of results, at most ten lines."""
    lines = ["| task | command | result | seeds | training, s | whole process, s "
             "| for comparison |", "|---|---|---|---|---|---|---|"]
    return "\n".join([*lines, solve_result(), *[*control_results()][:7], *language_results()])


def result_notes():
    """Markdown: what is special about the results with a mark."""
    parts = {task: ("ppo.json", task) for task, *_ in ppo.TASKS}
    parts |= {f"addition task, {name}.py": (f"{name}.json", "default") for name in PEERS}
    notes = {what: cartpole.note(*entry) for what, entry in parts.items()}
    shown = results()
    notes = {what: note for what, note in notes.items() if what.split(",")[0] in shown}
    return "\n\n".join(f"† {text}." for text in cartpole.grouped_notes(notes))


def mutants():
    """Markdown: the number of inserted bugs, and how many of them a test finds."""
    with (BENCHMARKS / "mutants.csv").open(newline="") as file:
        found = [bool(row["caught_by"]) for row in csv.DictReader(file)]
    if all(found):
        return f"**The tests find all {len(found)} inserted bugs.**"
    return f"**The tests find {sum(found)} of {len(found)} inserted bugs.**"


def with_sources(table, name, *parts):
    """A table of docs/results.md with the commands that measured it."""
    return f"{table}\n\nMeasured by:\n\n{cartpole.sources(name, *parts)}"


def tables():
    """{file: {name of a marker: its Markdown}}."""
    solve = cartpole.solve_table(cartpole.read_rows(BENCHMARKS / "cartpole.csv"))
    equal = cartpole.equal_table(cartpole.read_rows(BENCHMARKS / "cartpole_equal.csv"))
    scores = [task for task, *_ in ppo.TASKS]
    return {
        "README.md": {"picture": picture("docs/results.md"), "files": files(),
                      "results": results(), "result notes": result_notes(),
                      "mutants": mutants()},
        "docs/index.md": {"ladder": ladder(), "picture": picture("results.md")},
        "docs/results.md": {
            "solve": with_sources(solve, "cartpole.json", "cartpole.csv", "cartpole.csv, ppo"),
            "equal": with_sources(equal, "cartpole.json", "cartpole_equal.csv"),
            "ppo": with_sources(ppo.score_table(), "ppo.json", *scores),
            "speed": with_sources(ppo.speed_table(), "ppo.json", "speed"),
            "tasks": with_sources(tasks.table(), "tasks.json"),
            "grpo": with_sources(grpo.default_table(), "grpo.json", "default"),
            "grpo speed": with_sources(grpo.speed_table(), "grpo.json", "speed"),
            "dpo": with_sources(dpo.default_table(), "dpo.json", "default"),
            "dpo speed": with_sources(dpo.speed_table(), "dpo.json", "speed"),
            "sources of choices": cartpole.sources("ablations.json"),
            "sources of curves": "\n".join([cartpole.sources("curves.json"),
                                        cartpole.sources("grpo.json", "curve"),
                                        cartpole.sources("dpo.json", "frontier")]),
            "mutants": mutants(),
        },
    }


def render(text, parts):
    """A text with each part between <!-- name --> and <!-- end --> replaced."""
    for name, table in parts.items():
        before, rest = text.split(f"<!-- {name} -->\n", 1)
        text = f"{before}<!-- {name} -->\n{table}\n<!-- end -->{rest.split('<!-- end -->', 1)[1]}"
    return text


def expected(name):
    """Lines of expected results for the docstring of a script, from cartpole.csv and tasks.csv."""
    rows = cartpole.grouped(cartpole.read_rows(BENCHMARKS / "cartpole.csv"))[name]
    runs = {"CartPole-v1 to 475": [(row["solved"], row["steps"], row["train_seconds"])
                                   for row in rows]}
    with (BENCHMARKS / "tasks.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["script"] == name:
                kind = ", continuing," * ("--continuing" in row["flags"])
                runs.setdefault(f"{row['task']}{kind} to {row['goal']}", []).append(
                    (row["solved"] == "1", int(row["steps"]), float(row["seconds"])))
    for task, results in runs.items():
        solved, steps, seconds = zip(*results)
        yield (f"    {task}: {sum(solved):.0f} of {len(results)} seeds, median "
               f"{statistics.median(steps):,.0f} steps, {statistics.median(seconds):.0f} s")


def expected_of_ppo():
    """Lines for the docstring of ppo.py, from ppo.csv."""
    rows = ppo.read("ppo.csv")
    for task, flags, *_ in ppo.TASKS:
        runs = [row for row in rows if (row["task"], row["flags"]) == (task, flags)]
        if len(runs) == 10:
            scores = [float(row["score"]) for row in runs]
            seconds = statistics.median(float(row["seconds"]) for row in runs)
            yield (f"    {task}, {int(runs[0]['steps']):,} steps: {ppo.interval(scores)[0]:,.0f} "
                   f"({min(scores):,.0f}), {seconds:.0f} s")


def expected_of_language(name):
    """Lines for the docstring of grpo.py or dpo.py: its default run, and a step of a real model."""
    rows = language_rows(name)
    lowest = min(float(row["greedy_after"]) for row in rows)
    yield (f"    default: {mean(rows, 'greedy_before'):.3f} -> {mean(rows, 'greedy_after'):.3f} "
           f"(lowest {lowest:.3f}), {median(rows, 'seconds'):.0f} s")
    work = {"grpo": "16 completions of 32 tokens", "dpo": "16 pairs of 64 to 128 tokens"}[name]
    with (BENCHMARKS / f"{name}_speed.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["contestant"] == f"{name} float32"]
    yield (f"    a step of SmolLM2-135M in float32, {work}: {median(rows, 'seconds_per_step'):.0f} "
           f"s, {median(rows, 'peak_mib') / 1024:.1f} GiB")


def with_results(name, source):
    """The source of a script with the measured results in its docstring."""
    if name in PEERS:
        lines = "\n".join(expected_of_language(name))
    else:
        lines = "\n".join(expected_of_ppo() if name == "ppo" else expected(name))
    pattern = r'(\nResults(?:,| of) (?:ten|five) seeds[^"]*?:\n)(?: {4}[^"]*)?"""'
    text, found = re.subn(pattern, rf'\g<1>{lines}\n"""', source, count=1)
    assert found, f"{name}.py: no heading of the results in its docstring"
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if out of date")
    args = parser.parse_args()
    texts = {ROOT / name: render((ROOT / name).read_text(), parts)
             for name, parts in tables().items()}
    for name in SCRIPTS:
        path = ROOT / f"{name}.py"
        texts[path] = with_results(name, path.read_text())
    for path, text in texts.items():
        if args.check and path.read_text() != text:
            raise SystemExit(f"{path.name} is out of date: run python benchmarks/readme.py")
        path.write_text(text)


if __name__ == "__main__":
    main()
