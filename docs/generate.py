"""Fill in what the pages take from the scripts, the mutants and the CSVs, and make docs/lines.md.

    python docs/generate.py            rewrite the parts between their markers
    python docs/generate.py --check    exit code 1 where a page says something else
"""

import csv
import difflib
import html
import importlib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "mutants")]
ablations, curves, dpo, grpo, mutants, ppo = map(
    importlib.import_module, ("ablations", "curves", "dpo", "grpo", "run", "ppo"))

LADDER = ["reinforce", "reinforce_baseline", "actor_critic", "ppo", "grpo", "dpo"]
BELOW = "\n# Below this line"
INTRO = """# Every line earns its place

Each entry is a bug that was really made somewhere, or that follows from an equation or from how the
environments behave: one line of a script, what stands there in the broken copy, and the test that
notices. `python tests/mutants/run.py` makes all the copies and runs the tests: **{figure}**.
"""
EFFECT = """
Where *learns* has two numbers, the broken copy and the script as it is were trained as well, with
the same seeds (`benchmarks/lines.csv` has the flags): on CartPole-v1 for 100,000 steps, ten seeds,
or on the sums, five; each number is the interquartile mean of the score at the end. {harmless} of
{shown} broken copies end at 95 % of the right one's score or above. That is why such bugs live: the
learning curve does not show them, and a test has to.
"""


def algorithm(name):
    """(number, line) of a script's lines from the first function to the end of train."""
    source = (ROOT / f"{name}.py").read_text()
    lines = source[:source.index(BELOW)].rstrip().split("\n")
    first = next(i for i, line in enumerate(lines) if line.startswith("def "))
    return list(enumerate(lines, 1))[first:]


def cell(code):
    """A piece of code for a Markdown table, on one line; a bar would end the cell."""
    code = " ".join(code.split())
    if "|" not in code:
        return f"`{code}`"
    return f"<code>{html.escape(code).replace('|', '&#124;')}</code>"


def code(name):
    """A table of the lines that bear an equation's number or a choice's letter."""
    rows = ["| line | code | what |", "|---|---|---|"]
    for number, line in algorithm(name):
        if match := re.fullmatch(r"\s*(.*\S)\s{2,}# ((?:\(\d|\[C).*)", line):
            rows.append(f"| {number} | {cell(match[1])} | {match[2]} |")
    return "\n".join(rows)


def diff(one, other):
    """The algorithm's lines that differ between two neighbours, folded."""
    texts = [[line for _, line in algorithm(name)] for name in (one, other)]
    lines = list(difflib.unified_diff(*texts, f"{one}.py", f"{other}.py", n=1, lineterm=""))
    plus, minus = (sum(line.startswith(sign) for line in lines) - 1 for sign in "+-")
    return "\n".join([
        f"<details markdown><summary>{plus} lines more, {minus} lines less</summary>", "",
        "```diff", *lines, "```", "", "</details>"])


def read(name):
    """Rows of a CSV in benchmarks/; none where it has not been measured."""
    path = ROOT / "benchmarks" / name
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def results(name):
    """The tables and pictures of a script."""
    if name in ("grpo", "dpo"):
        module = {"grpo": grpo, "dpo": dpo}[name]
        parts = ["Without arguments, seeds 11 to 15:", module.default_table(),
                 "SmolLM2-135M, beside TRL's trainer:", module.speed_table()]
        pictures = module.PICTURES
    else:
        parts = {"ppo": ["Seeds 11 to 20, or as many as are named, and no stop:",
                         ppo.score_table()]}.get(name, [])
        pictures = curves.PICTURES[name]
    for picture, text in pictures.items():
        if (ROOT / "docs" / picture).exists():
            parts += [f"![{text}]({picture})", f"*{text}.*"]
    return "\n\n".join(parts)


def lines():
    """docs/lines.md."""
    caught = {(row["script"], row["bug"]): row["caught_by"] for row in read("mutants.csv")}
    scores = {(row["script"], row["bug"], row["flags"]): float(row["score"])
              for row in read("lines.csv")}
    effects = {key[:2]: (score, scores[key[0], "", key[2]]) for key, score in scores.items()}
    shown = [pair for (_, bug), pair in effects.items() if bug]
    figure = f"{len(caught)} known bugs, {sum(map(bool, caught.values()))} caught"
    parts = [INTRO.format(figure=figure)]
    if shown:
        harmless = sum(broken >= 0.95 * right for broken, right in shown)
        parts[0] += EFFECT.format(harmless=harmless, shown=len(shown))
    for script in LADDER:
        head, rule = "| line | as it is | broken | the bug | noticed by |", "|---|---|---|---|---|"
        if shown:
            head, rule = f"{head} learns: broken, right |", rule + "---|"
        parts.append("\n".join([f"## {script}.py", "", head, rule]))
        for m in sorted(mutants.load([script]), key=lambda mutant: mutant["at"]):
            row = [str(m["at"]), cell(m["line"]), cell(m["broken"]),
                   f"{m['bug']}; {m['source']}", f"`{caught[script, m['bug']]}`"]
            if shown:
                pair = effects.get((script, m["bug"]), ())
                row.append(", ".join(f"{x:.0f}" if max(pair) > 1 else f"{x:.2f}" for x in pair))
            parts[-1] += f"\n| {' | '.join(row)} |"
    return "\n\n".join(parts) + "\n"


def render(text):
    """A page with each part between <!-- what names --> and <!-- end --> made anew."""
    def fill(match):
        make = {"code": code, "diff": diff, "ablation": ablations.table, "results": results}
        what, *names = match[1].split()
        return f"<!-- {match[1]} -->\n{make[what](*names)}\n<!-- end -->"

    marked = r"<!-- ((?:code|diff|ablation|results) [a-z_ ]+) -->\n.*?<!-- end -->"
    return re.sub(marked, fill, text, flags=re.DOTALL)


def main():
    pages = {path: render(path.read_text()) for path in sorted((ROOT / "docs").glob("*.md"))}
    pages[ROOT / "docs" / "lines.md"] = lines()
    for path, text in pages.items():
        if "--check" in sys.argv and (not path.exists() or path.read_text() != text):
            raise SystemExit(f"{path.name} is not what scripts and CSVs say: docs/generate.py")
        path.write_text(text)


if __name__ == "__main__":
    main()
