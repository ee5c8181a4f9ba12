"""The mutants fit the scripts as they are, and the pages say what became of them."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT, SCRIPTS

sys.path.append(str(ROOT / "tests" / "mutants"))
import run

MUTANTS = run.load()


def test_there_are_some_of_each_script():
    assert {mutant["script"] for mutant in MUTANTS} == set(SCRIPTS)
    assert len({(mutant["script"], mutant["bug"]) for mutant in MUTANTS}) == len(MUTANTS) >= 40


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m['script']}-{m['at']}")
def test_it_is_a_program_and_its_tests_are_there(mutant):
    source = (ROOT / f"{mutant['script']}.py").read_text()
    broken = source.replace(mutant["line"], mutant["broken"])
    assert ast.dump(ast.parse(source)) != ast.dump(ast.parse(broken))
    assert mutant["tests"]
    for test in mutant["tests"]:
        file, name = test.split("[")[0].split("::")
        assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text(), test


def test_a_survivor_is_told_from_a_catch(tmp_path):
    """A test that fails, one that passes, a copy that does not import, a process that ends."""
    (tmp_path / "tests").mkdir()
    for name, line in (("fails", "assert False"), ("passes", "pass"), ("breaks", "pass pass"),
                       ("exits", "__import__('os')._exit(1)")):
        (tmp_path / "tests" / f"test_{name}.py").write_text(f"def test_it():\n    {line}\n")
    assert run.pytest(tmp_path, ["test_fails.py"]) == (1, "test_fails.py::test_it")
    assert run.pytest(tmp_path, ["test_passes.py"])[0] == 0
    assert run.pytest(tmp_path, ["test_breaks.py"])[0] not in (0, 1)
    assert run.pytest(tmp_path, ["test_exits.py"])[0] not in (0, 1)


def test_pages_come_from_scripts_and_csvs():
    command = [sys.executable, ROOT / "docs" / "generate.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
