"""Fill in the parts of docs/ that come from scripts, mutants and CSVs, and write docs/lines.md.

    python docs/generate.py            rewrite the parts between their markers
    python docs/generate.py --check    exit code 1 if a page is out of date

A generated part begins with one of these and ends with <!-- end -->:

    <!-- line ppo (7) -->                        the lines of code with this equation number
    <!-- choices ppo -->                         the lines of code with the letter of a choice
    <!-- diff reinforce to reinforce_baseline -->           the diff of the algorithms
    <!-- diff grpo policy_loss train to dpo preference_loss train -->     ... of these functions
    <!-- shared grpo dpo -->                     names of the functions that are identical in both
    <!-- ablation ppo -->                        measurements of its choices
    <!-- results ppo -->                         its tables and pictures
"""

import argparse
import ast
import csv
import difflib
import html
import importlib
import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "mutants")]
ablations, cartpole, curves, dpo, grpo, mutants, ppo, readme, tasks = map(importlib.import_module, (
    "ablations", "cartpole", "curves", "dpo", "grpo", "run", "ppo", "readme", "tasks"))

LADDER = ["reinforce", "reinforce_baseline", "actor_critic", "ppo", "grpo", "dpo"]
BELOW = re.compile(r"\n# --- The algorithm ends here")
# A line of code and its tag; a shape may come before the tag.
TAGGED = re.compile(r"\s*(.*\S)\s{2,}# (?:\([A-Z], ?\) +)?((?:\(\d|\[C).*)")
INTRO = """# Bug list

After this page you know:

- which single lines decide whether an implementation is correct,
- which test finds each bug.

Each entry is a bug that occurred in some implementation, or that follows from an equation or from
the behavior of the environments. It shows the line of the script (`-`), the broken line (`+`) and
the test that fails. `python tests/mutants/run.py` inserts each bug into a copy of its script and
runs the tests. {figure}

Lines with the number of an equation or the letter of a choice are listed even if they have no
broken copy.
"""
EFFECT = """
Some entries end with two scores, with the bug and without it. Both come from training with the same
ten seeds, on CartPole-v1 for 100,000 steps or on the addition task (`benchmarks/lines.csv` has the
flags). Each score is an interquartile mean at the end of training. {harmless} of {shown} broken
copies reach at least 95 % of the score without the bug. A learning curve does not show these bugs,
so they need a test.{notes}
"""


def fail(message):
    raise SystemExit(f"docs/generate.py: {message}")


def read_script(name):
    return (ROOT / f"{name}.py").read_text()


def algorithm(name, to_the_end=False):
    """(number, line) of a script's lines from the first function to the end of train, or of all."""
    source = read_script(name)
    lines = (source if to_the_end else source[:BELOW.search(source).start()]).rstrip().split("\n")
    first = next(i for i, line in enumerate(lines) if line.startswith("def "))
    return list(enumerate(lines, 1))[first:]


def blocks(name):
    """{name: lines} of the top-level functions and classes of a script, with decorators."""
    source, kinds = read_script(name), (ast.FunctionDef, ast.ClassDef)
    lines, found = source.split("\n"), {}
    for node in ast.parse(source).body:
        if isinstance(node, kinds):
            first = min([node.lineno, *(part.lineno for part in node.decorator_list)])
            found[node.name] = lines[first - 1:node.end_lineno]
    return found


def cell(code):
    """Code as a cell of a Markdown table, on one line. A bar would end the cell."""
    code = " ".join(code.split())
    if "|" not in code:
        return f"`{code}`"
    return f"<code>{html.escape(code).replace('|', '&#124;')}</code>"


def prose(text):
    """Text of a mutant or a CSV for Markdown."""
    return html.escape(text, quote=False).replace("*", "\\*")


def line(name, *tag):
    """The code beside an equation."""
    tag, found = " ".join(tag), []
    for number, text in algorithm(name):
        if (match := TAGGED.fullmatch(text)) and tag in match[2]:
            found += [f"# {name}.py, line {number}", match[1]]
    return "\n".join(["```python", *(found or [fail(f"{name}.py has no line {tag}")]), "```"])


def choices(name):
    """A table of the lines with the letter of a choice, sorted by letter."""
    rows = []
    for number, text in algorithm(name, to_the_end=True):
        if (match := TAGGED.fullmatch(text)) and (letters := re.findall(r"\[C(\d+)\]", match[2])):
            shown = " ".join(f"[C{letter}]" for letter in letters)
            rows.append((int(letters[0]), number, f"| {shown} | {number} | {cell(match[1])} |"))
    letters = re.findall(r"^\[C\d+\]", read_script(name).split('"""')[1], re.MULTILINE)
    rest = [letter for letter in letters if not any(letter in row for *_, row in rows)]
    note = f"Choices that are not one line: {', '.join(rest)}. " if rest else ""
    return "\n".join([
        "| choice | line | code |", "|---|---|---|", *(row for *_, row in sorted(rows)), "",
        f"{note}The [bug list](lines.md#{name}py) has broken versions of most of these lines."])


def diff(*words):
    """The diff of the algorithms of two scripts, or of some of their functions; folded."""
    texts, names = [], []
    for part in " ".join(words).split(" to "):
        name, *functions = part.split()
        found = blocks(name)
        if missing := set(functions) - set(found):
            fail(f"{name}.py has no {', '.join(sorted(missing))}")
        whole = [text for _, text in algorithm(name)]
        texts.append([text for function in functions for text in [*found[function], "", ""]]
                     or whole)
        names.append(f"{name}.py")
    lines = list(difflib.unified_diff(*texts, *names, n=1, lineterm=""))
    plus, minus = (sum(text.startswith(sign) for text in lines) - 1 for sign in "+-")
    return "\n".join([
        f"<details markdown><summary>Show the diff: {plus} lines added, {minus} removed</summary>",
        "",
        "```diff", *lines, "```", "", "</details>"])


def shared(one, other):
    """Names of the functions and classes that are identical in both scripts."""
    blocks_of_one, blocks_of_other = blocks(one), blocks(other)
    same = [name for name, text in blocks_of_one.items() if blocks_of_other.get(name) == text]
    return ", ".join(f"`{name}`" for name in same) + "."


def read(name):
    """Rows of a CSV in benchmarks/; none if there is no such file."""
    path = ROOT / "benchmarks" / name
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def rows_of(table, *names):
    """Head of a Markdown table, and the rows whose first cell has one of the names as a word."""
    head, rule, *rows = table.split("\n")
    words = re.compile(rf"(?<![\w-])(?:{'|'.join(names)})(?:\.py)?(?![\w-])")
    return "\n".join([head, rule, *(row for row in rows if words.search(row.split("|")[1]))])


def of_commands(table):
    """A table whose first column has commands; pages.css makes it wider."""
    return f'<div class="commands" markdown>\n\n{table}\n\n</div>'


def task_note(name):
    """What tasks.json says about the rows of a script, in brackets."""
    notes = {cartpole.note("tasks.json", f"{name} {task}") for task, *_ in tasks.TASKS} - {""}
    return f" ({'; '.join(sorted(notes))})" if notes else ""


def ablation(name):
    """The table of a script's choices, and what is special about its measurement."""
    part = f"{'sums' if name == 'grpo' else 'control'} {name}"
    note = cartpole.note("ablations.json", part)
    return ablations.table(name) + (f"\n\n*Note: {note}.*" if note else "")


def language_results(name):
    """The tables of grpo.py or dpo.py."""
    module, note = {"grpo": grpo, "dpo": dpo}[name], cartpole.note(f"{name}.json", "default")
    return ["The table shows the default runs with the seeds 11 to 15. It has the accuracy on "
            f"held-out sums before and after training{f' ({note})' if note else ''}.",
            module.default_table(),
            "The next table compares one training step of SmolLM2-135M with the same step of "
            "TRL's trainer, on two CPU cores.", module.speed_table()]


def control_results(name):
    """The tables of one of the other scripts."""
    before = LADDER[:LADDER.index(name) + 1][-2:]
    solved = cartpole.solve_table(cartpole.read_rows(ROOT / "benchmarks" / "cartpole.csv"))
    parts = ["A run on CartPole-v1 stops when it is solved: the mean return of the last 100 "
             "episodes has reached 475. The table shows medians over the seeds 11 to 20, and in "
             "brackets the ratio to `ppo.py`.", rows_of(solved, *before),
             "A run on the next tasks stops when its score reaches the goal, or when the steps are "
             f"used up. The seeds are 11 to 20{task_note(name)}.",
             of_commands(rows_of(tasks.table(), name))]
    if name == "ppo":
        notes = {task: cartpole.note("ppo.json", task) for task, *_ in ppo.TASKS}
        parts += ["In the next table a run uses all its steps, and the score is that at the end. "
                  "A goal does not stop a run here; it only shows how good a score is, so it may "
                  "be stricter than in the table above. The seeds are 11 to 20, or 11 to 13. The "
                  "interquartile mean is that of the middle half of the seeds, the interval a "
                  "bootstrap interval.",
                  of_commands(ppo.score_table()),
                  *(f"*{text}.*" for text in cartpole.grouped_notes(notes))]
    return parts


def results(name):
    """The tables and pictures of a script."""
    if name in ("grpo", "dpo"):
        parts, pictures = language_results(name), {"grpo": grpo, "dpo": dpo}[name].PICTURES
    else:
        parts, pictures = control_results(name), curves.PICTURES[name]
    sources = f"{name if name in ('grpo', 'dpo') else 'curves'}.json"
    for picture, (text, part) in pictures.items():
        if (ROOT / "docs" / picture).exists():
            note = cartpole.note(sources, part)
            parts += [f"![{text}]({picture})", f"*{text}{f' ({note})' if note else ''}.*"]
    return "\n\n".join(parts)


def places(source):
    """{line: name of its function or class} and {line: (first, last line of its statement)}."""
    tree, inside, statement = ast.parse(source), {}, {}

    def visit(node, name):
        for child in ast.iter_child_nodes(node):
            named = isinstance(child, (ast.FunctionDef, ast.ClassDef))
            inner = ".".join(filter(None, [name, child.name])) if named else name
            if isinstance(child, ast.stmt):
                last = child.body[0].lineno - 1 if hasattr(child, "body") else child.end_lineno
                for number in range(child.lineno, max(child.lineno, last) + 1):
                    statement[number] = child.lineno, max(child.lineno, last)
            if named:
                inside.update(dict.fromkeys(range(child.lineno, child.end_lineno + 1), inner))
            visit(child, inner)

    visit(tree, "")
    return inside, statement


def changed(source, mutant):
    """(first line, lines as they are, lines as they are in the broken copy), whole lines."""
    start = source.index(mutant["line"])
    end = start + len(mutant["line"])
    first, last = source.rfind("\n", 0, start) + 1, source.find("\n", end)
    was = source[first:last]
    broken = source[first:start] + mutant["broken"] + source[end:last]
    lines = textwrap.dedent("\n".join([was, broken])).split("\n")
    was, broken = lines[:was.count("\n") + 1], lines[was.count("\n") + 1:]
    while min(len(was), len(broken)) > 1 and was[-1] == broken[-1]:
        was, broken = was[:-1], broken[:-1]
    return source[:first].count("\n") + 1, was, broken


def bare(text):
    """A line of code without its tag."""
    match = TAGGED.fullmatch(text)
    return text[:match.end(1)] if match else text


def bug(source, mutant, statement, caught, effect):
    """(line, entry) of a mutant for docs/lines.md."""
    number, was, broken = changed(source, mutant)
    first, last = statement.get(number, (number, number))
    texts = source.split("\n")[first - 1:max(last, number + len(was) - 1)]
    bears = [match[2] for text in texts if (match := TAGGED.fullmatch(text))]
    what = dict.fromkeys(re.findall(r"\(\d[\d.]*\)|\[C\d+\]", " ".join(bears)))
    lines = [*(f"- {bare(text)}" for text in was), *(f"+ {bare(text)}" for text in broken)]
    notice = f"`{caught}`" if caught else "*no test yet*" if caught == "" else "*not run yet*"
    learns = ""
    if effect:
        scores = (f"{x:.0f}" if max(effect) > 1 else f"{x:.2f}" for x in effect)
        learns = " Score with this bug: {}; without it: {}.".format(*scores)
    head = " ".join([f"**{number}**", *what]) + f" · {prose(mutant['bug'])}"
    if mutant["source"] not in what:
        head += f" · *{prose(mutant['source'])}*"
    return number, "\n".join(
        [head, "", "```diff", *lines, "```", "", f"Caught by {notice}.{learns}", ""])


def elsewhere(script, name):
    """Why a line has no broken copy of its own."""
    mine = blocks(script)[name]
    for other in LADDER[:LADDER.index(script)]:
        if blocks(other).get(name) == mine:
            return f"The same code as in [{other}.py](#{other}py): see there."
    return "No broken copy."


def script_lines(script, caught, effects):
    """The part of docs/lines.md that is about one script."""
    source = read_script(script)
    inside, statement = places(source)
    entries, broken = [], set()
    for mutant in mutants.load([script]):
        key = script, mutant["bug"]
        number, text = bug(source, mutant, statement, caught.get(key), effects.get(key))
        entries.append((number, text))
        first, last = statement.get(number, (number, number))
        broken.update(range(first, max(last, number + mutant["line"].count("\n")) + 1))
    marked = [(number, match) for number, text in algorithm(script)
              if (match := TAGGED.fullmatch(text))]
    for number, match in marked:
        if number not in broken:
            entries.append((number, f"**{number}** {match[2]}\n\n```python\n{match[1]}\n```\n\n"
                            f"{elsewhere(script, inside[number].split('.')[0])}\n"))
    parts, place = [f"## {script}.py\n"], None
    for number, text in sorted(entries, key=lambda entry: entry[0]):
        if inside.get(number) != place:
            place = inside.get(number)
            parts.append(f"### `{place}`\n")
        parts.append(text)
    covered = sum(number in broken for number, _ in marked)
    return "\n".join(parts), f"{len(marked)} | {covered}"


def lines():
    """docs/lines.md."""
    caught = {(row["script"], row["bug"]): row["caught_by"] for row in read("mutants.csv")}
    scores = {(row["script"], row["bug"], row["flags"]): float(row["score"])
              for row in read("lines.csv")}
    effects = {key[:2]: (score, scores[key[0], "", key[2]]) for key, score in scores.items()
               if key[1] and (key[0], "", key[2]) in scores}
    parts = [INTRO.format(figure=readme.mutants())]
    if effects:
        harmless = sum(broken >= 0.95 * right for broken, right in effects.values())
        notes = [f"\nThe scores of `{name}.py` were {note}." for name in LADDER
                 if (note := cartpole.note("ablations.json", f"lines {name}"))]
        parts[0] += EFFECT.format(harmless=harmless, shown=len(effects), notes="".join(notes))
    table = ["| script | bugs | caught | lines with a number or a letter "
             "| of these with a broken copy |", "|---|---|---|---|---|"]
    for script in LADDER:
        text, counts = script_lines(script, caught, effects)
        mine = [key for key in caught if key[0] == script]
        table.append(f"| [{script}.py](#{script}py) | {len(mine)} "
                     f"| {sum(bool(caught[key]) for key in mine)} | {counts} |")
        parts.append(text)
    return "\n".join([parts[0], *table, "", *parts[1:]])


def render(text):
    """A page with its generated parts replaced."""
    make = {"line": line, "choices": choices, "diff": diff, "shared": shared,
            "ablation": ablation, "results": results}

    def fill(match):
        what, *names = match[1].split()
        return f"<!-- {match[1]} -->\n{make[what](*names)}\n<!-- end -->"

    marked = rf"<!-- ((?:{'|'.join(make)}) [^\n]+) -->\n.*?<!-- end -->"
    return re.sub(marked, fill, text, flags=re.DOTALL)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if out of date")
    args = parser.parse_args()
    pages = {path: render(path.read_text()) for path in sorted((ROOT / "docs").glob("*.md"))}
    pages[ROOT / "docs" / "lines.md"] = lines()
    for path, text in pages.items():
        if args.check and (not path.exists() or path.read_text() != text):
            raise SystemExit(f"{path.name} is out of date: run python docs/generate.py")
        path.write_text(text)


if __name__ == "__main__":
    main()
