"""Put the measured tables into README.md, and what to expect of a run into the docstrings.

    python benchmarks/readme.py            rewrite the tables between their markers, and the lines
                                           after "Results, ten seeds" in the scripts
    python benchmarks/readme.py --check    exit code 1 where something else stands there
"""

import ast
import csv
import io
import re
import statistics
import sys
import tokenize
from pathlib import Path

import cartpole
import tasks

import dpo
import grpo
import ppo

ROOT = Path(__file__).resolve().parent.parent
LADDER = {
    "reinforce": ("REINFORCE ([Williams 1992](https://doi.org/10.1007/BF00992696))", "—"),
    "reinforce_baseline": ("REINFORCE with baseline ([Sutton & Barto, 13.4]"
                           "(http://incompleteideas.net/book/the-book-2nd.html))",
                           "a learned value, subtracted from each return"),
    "actor_critic": ("Actor-critic with eligibility traces, episodic and continuing ([Sutton & "
                     "Barto, 13.5, 13.6](http://incompleteideas.net/book/the-book-2nd.html))",
                     "an update after every step, from the value of the next state"),
    "ppo": ("PPO with GAE ([Schulman et al. 2017](https://arxiv.org/abs/1707.06347))",
            "batches, used several times under a clipped objective; nearly every kind of space"),
}

LANGUAGE = {
    "grpo": ("GRPO and its kin ([Shao et al. 2024](https://arxiv.org/abs/2402.03300))",
             "REINFORCE with the mean of a group of answers as baseline, PPO's clip"),
    "dpo": ("DPO and its kin ([Rafailov et al. 2023](https://arxiv.org/abs/2305.18290))",
            "no sampling: a classification loss whose optimum is the best policy"),
}


def code_lines(source):
    """Numbers of the lines that hold code: no blanks, comments or docstrings."""
    skip, prose, code = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT,
                         tokenize.DEDENT, tokenize.ENDMARKER), set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            prose.update(range(node.lineno, node.end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skip:
            code.update(range(token.start[0], token.end[0] + 1))
    return code - prose


def ladder():
    """Markdown: a line for each script."""
    groups = cartpole.grouped(cartpole.read_rows(ROOT / "benchmarks" / "cartpole.csv"))
    lines = ["| file | method | new in it | code lines; to the end of `train` | CartPole-v1 solved "
             "| median whole process |", "|---|---|---|---|---|---|"]
    for name, (method, new) in LADDER.items():
        rows = groups[name]
        lines.append(
            f"| [`{name}.py`]({name}.py) | {method} | {new} | {sizes(name)} | "
            f"{sum(row['solved'] for row in rows):.0f} of "
            f"{len(rows)} | {cartpole.median(rows, 'process_seconds', True):.1f} s |")
    return "\n".join(lines)


def language():
    """Markdown: a line for each script."""
    lines = ["| file | method | what is new | code lines; to the end of `train` |",
             "|---|---|---|---|"]
    lines += [f"| [`{name}.py`]({name}.py) | {method} | {new} | {sizes(name)} |"
              for name, (method, new) in LANGUAGE.items()]
    return "\n".join(lines)


def mutants():
    """Markdown: how many, and how many of them a test has noticed."""
    with (ROOT / "benchmarks" / "mutants.csv").open(newline="") as file:
        caught = [bool(row["caught_by"]) for row in csv.DictReader(file)]
    return f"**{len(caught)} known bugs, {sum(caught)} caught.**"


def sizes(name):
    """Code lines of a script, and of these down to the end of train."""
    source = (ROOT / f"{name}.py").read_text()
    end = next(node.end_lineno for node in ast.parse(source).body
               if isinstance(node, ast.FunctionDef) and node.name == "train")
    code = code_lines(source)
    return f"{len(code)}; {sum(line <= end for line in code)}"


def render(text):
    """README.md with each table between <!-- name --> and <!-- end --> made anew."""
    folder = ROOT / "benchmarks"
    tables = {
        "ladder": ladder(),
        "solve": cartpole.solve_table(cartpole.read_rows(folder / "cartpole.csv")),
        "equal": cartpole.equal_table(cartpole.read_rows(folder / "cartpole_equal.csv")),
        "ppo": ppo.score_table(),
        "speed": ppo.speed_table(),
        "tasks": tasks.table(),
        "language": language(),
        "grpo": grpo.default_table(),
        "grpo speed": grpo.speed_table(),
        "dpo": dpo.default_table(),
        "dpo speed": dpo.speed_table(),
        "mutants": mutants(),
    }
    for name, table in tables.items():
        before, rest = text.split(f"<!-- {name} -->\n", 1)
        text = f"{before}<!-- {name} -->\n{table}\n<!-- end -->{rest.split('<!-- end -->', 1)[1]}"
    return text


def expected(name):
    """Lines for the docstring of a script: what its runs reach, from cartpole.csv and tasks.csv."""
    rows = cartpole.grouped(cartpole.read_rows(ROOT / "benchmarks" / "cartpole.csv"))[name]
    runs = {"CartPole-v1 to 475": [(row["solved"], row["steps"], row["train_seconds"])
                                   for row in rows]}
    with (ROOT / "benchmarks" / "tasks.csv").open(newline="") as file:
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


def with_results(name, source):
    """The source of a script with today's results in its docstring."""
    lines = "\n".join(expected_of_ppo() if name == "ppo" else expected(name))
    pattern = r'(\nResults, ten seeds.*:\n)[^"]*"""'
    return re.sub(pattern, rf'\g<1>{lines}\n"""', source, count=1)


def main():
    texts = {ROOT / "README.md": render((ROOT / "README.md").read_text())}
    for name in ("reinforce", "reinforce_baseline", "actor_critic", "ppo"):
        path = ROOT / f"{name}.py"
        texts[path] = with_results(name, path.read_text())
    for path, text in texts.items():
        if "--check" in sys.argv and path.read_text() != text:
            raise SystemExit(f"{path.name} is not what the CSVs say")
        path.write_text(text)


if __name__ == "__main__":
    main()
