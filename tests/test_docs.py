"""The pages: formulas that code hosts display, every equation and choice, links."""

import ast
import importlib
import re

import pytest
from conftest import ROOT, SCRIPTS

PAGES = sorted(path.stem for path in (ROOT / "docs").glob("*.md"))
TAG = re.compile(r"\(\d{1,2}(?:\.\d+)?\)")
INLINE = re.compile(r"\$`([^`]+)`\$|\$([^$]+)\$")
NOT_ALLOWED = r"\\operatorname|\\begin|\\newcommand|\\def\b"  # by code hosts or by the built site


def text_of(page):
    return (ROOT / "docs" / f"{page}.md").read_text()


def without_code(text):
    """A page without its fenced blocks and inline code, $`...`$ excepted."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"(?<!\$)`[^`\n]+`(?!\$)", "", text)


def complaints(text):
    """Yield what a code host would display wrongly: it reads $...$ as Markdown first."""
    for match in INLINE.finditer(text):
        quoted, plain = match.groups()
        before, after = text[match.start() - 1], text[match.end():match.end() + 1]
        if not re.match(r"[\s(|]", before) or not re.match(r"[\s.,;:)?!|]|$", after):
            yield f"{match[0]} touches {before!r} or {after!r}"
        if "\n" in match[0]:
            yield f"{match[0]} spans lines"
        if "|" in (quoted or plain) and "|" in text[text.rfind("\n", 0, match.start()) + 1]:
            yield f"{match[0]} ends a table's cell"
        if plain and re.search(r"\\[^A-Za-z]|[*<>]|[})\]]_|\]\(", plain):
            yield f"{match[0]} has characters with a meaning in Markdown: write $`...`$"
        if re.search(NOT_ALLOWED, match[0]):
            yield f"{match[0]} has a macro that is not supported everywhere"


@pytest.mark.parametrize("page", PAGES)
def test_formulas_are_written_for_code_hosts(page):
    text = text_of(page)
    assert not list(complaints(without_code(text)))
    assert "$$" not in text, "use ```math: within $$ a code host drops the backslash of \\,"
    for block in re.findall(r"^```math\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE):
        assert block.count("\n") == 1 and not re.search(NOT_ALLOWED, block), block
        assert block.count("{") == block.count("}") and block.count("\\tag") <= 1, block


@pytest.mark.parametrize("text, wrong", [
    ("so $a_t$, and", 0), (r"so $`a\, b`$, and", 0), (r"so $a\, b$, and", 1),
    ("an $n$-th", 1), ("so $a <b$, and", 1), (r"so $\hat{a}_\mu$, and", 1),
    (r"so $`\operatorname{a}`$, and", 1), ("so $a\nb$, and", 1), ("\n| $|a|$ |\n", 1),
])
def test_wrong_formulas_are_found(text, wrong):
    assert len(list(complaints(text))) == wrong


def test_equation_numbers_of_a_page_start_at_1_without_gaps():
    for page in PAGES:
        numbers = [int(n) for n in re.findall(r"\\tag\{(\d+)", text_of(page))]
        assert numbers == list(range(1, len(numbers) + 1)), page


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_equation_and_choice_of_a_script_is_on_its_page(name):
    source, page = (ROOT / f"{name}.py").read_text(), text_of(name)
    promised = ast.get_docstring(ast.parse(source))
    shown = set(re.findall(rf"<!-- line {name} (\(.*?\)) -->", page))
    assert set(TAG.findall(promised)) == shown
    for tag in shown:  # each beside an equation with that number
        number = re.escape(tag.strip("()"))
        assert re.search(rf"\\tag\{{\d+, [A-Z]+ {number}\}}", page), f"no equation says {tag}"
    listed = page[page.index("\n## Choices"):page.index("\n## Results")]
    letters = {int(n) for n in re.findall(r"\[C(\d+)\]", promised)}
    told = {int(n) for n in re.findall(r"^- \*\*\[C(\d+)\]", listed, re.MULTILINE)}
    for first, last in re.findall(r"^- \*\*\[C(\d+)\] to \[C(\d+)\]", listed, re.MULTILINE):
        told |= set(range(int(first), int(last) + 1))
    assert told == letters
    for part in ("choices", "results"):
        assert f"<!-- {part} {name} -->" in page


@pytest.mark.parametrize("page", [*SCRIPTS, "theorem"])
def test_page_begins_with_its_goal_and_ends_with_symptoms(page):
    text = text_of(page)
    assert re.search(r"\A# .*\n\n(`.*\n\n)?After this page you know:\n\n- ", text)
    last = text[text.rindex("\n## "):]
    assert last.startswith("\n## What goes wrong and how it looks in the log\n\n"
                           "| symptom | cause | remedy |\n|---|---|---|\n| ")


@pytest.mark.parametrize("name", SCRIPTS)
def test_columns_and_flags_in_symptoms_exist(name):
    """A name in backticks in the last table is a flag, a column of metrics.csv or in the script."""
    source, text = (ROOT / f"{name}.py").read_text(), text_of(name)
    table = text[text.rindex("\n## "):]
    for code in re.findall(r"`([^`]+)`", table.replace("$`", "").replace("`$", "")):
        word = code.removeprefix("--").removeprefix("no-").split()[0].replace("-", "_")
        word = word.removeprefix("heldout_")  # the script adds this prefix to some columns
        assert re.search(rf"\b{word}\b", source), code


SHORT = {
    "grpo": {"pretrain_steps": 1, "max_steps": 1, "batch_size": 8, "eval_prompts": 4},
    "dpo": {"pretrain_steps": 1, "max_steps": 1, "batch_size": 8, "train_pairs": 20,
            "eval_pairs": 4},
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_page_names_the_columns_of_metrics(name, tmp_path):
    script = importlib.import_module(name)
    flags = SHORT.get(name, {"total_timesteps": 2_500})
    script.train(script.Args(run_dir=str(tmp_path), device="cpu", **flags))
    header = (tmp_path / "metrics.csv").read_text().split("\n")[0].split(",")
    section = text_of(name).split("\n## Columns of metrics.csv\n")[1].split("\n## ")[0]
    assert set(re.findall(r"`(\w+)`", section)) == set(header)


def anchor(heading):
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def test_links_have_targets():
    headings = {page: {anchor(h) for h in re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE)}
                for page in PAGES}
    for page in PAGES:
        text = without_code(text_of(page))
        for target, place in re.findall(r"\]\(([\w./]*)(?:#([\w-]+))?\)", text):
            assert not target or (ROOT / "docs" / target).exists(), (page, target)
            other = target.removesuffix(".md") or page
            assert not place or place in headings[other], (page, target, place)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_of_the_top_folder_have_targets(name):
    text = without_code((ROOT / name).read_text())
    links = re.findall(r"\]\((?!http)([\w./]+)(?:#([\w-]+))?\)", text)
    for target, place in links:
        assert (ROOT / target).exists(), target
        if place:
            headings = re.findall(r"^#+ (.*)$", (ROOT / target).read_text(), re.MULTILINE)
            assert place in map(anchor, headings), (target, place)


def test_functions_to_copy_exist():
    section = text_of("copy").split("\n## One function")[1].split("\n## ")[0]
    table = re.findall(r"^\| (`.*?) \| .* \|$", section, re.MULTILINE)
    assert table
    for cell in table:
        script = None
        for name in re.findall(r"`([\w.]+)`", cell):
            *prefix, name = name.split(".")
            script = prefix[0] if prefix else script
            assert hasattr(importlib.import_module(script), name), f"{script}.{name}"
