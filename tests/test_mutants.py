"""The mutants fit the scripts, and the pages show their outcome."""

import ast
import functools
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, SCRIPTS

sys.path.append(str(ROOT / "tests" / "mutants"))
import run

MUTANTS = run.load()


def test_every_script_has_mutants():
    assert {mutant["script"] for mutant in MUTANTS} == set(SCRIPTS)
    assert len({(mutant["script"], mutant["bug"]) for mutant in MUTANTS}) == len(MUTANTS) >= 40


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m['script']}-{m['at']}")
def test_mutant_is_a_program_and_its_tests_exist(mutant):
    source = (ROOT / f"{mutant['script']}.py").read_text()
    broken = source.replace(mutant["line"], mutant["broken"])
    assert dump(source) != ast.dump(ast.parse(broken))
    assert mutant["tests"]
    for test in mutant["tests"]:
        file, name = test.split("[")[0].split("::")
        assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text(), test


@functools.cache
def dump(source):
    return ast.dump(ast.parse(source))


def test_only_a_failed_test_counts_as_caught(tmp_path):
    """A test that fails, one that passes, a copy that does not import, a process that ends.

    The tests are slow, which plain pytest leaves out.
    """
    (tmp_path / "tests").mkdir()
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    for name, line in (("fails", "assert False"), ("passes", "pass"), ("breaks", "pass pass"),
                       ("exits", "__import__('os')._exit(1)")):
        (tmp_path / "tests" / f"test_{name}.py").write_text(
            f"import pytest\n\n\n@pytest.mark.slow\ndef test_it():\n    {line}\n")
    assert run.pytest(tmp_path, ["test_fails.py"]) == (1, "test_fails.py::test_it")
    assert run.pytest(tmp_path, ["test_passes.py"])[0] == 0
    assert run.pytest(tmp_path, ["test_breaks.py"])[0] not in (0, 1)
    assert run.pytest(tmp_path, ["test_exits.py"])[0] not in (0, 1)


def test_results_of_other_scripts_are_kept(tmp_path):
    path = tmp_path / "mutants.csv"
    assert run.other_rows(path, {"ppo"}) == []
    path.write_text("script,line,bug\nppo,1,a\ndpo,2,b\n")
    assert run.other_rows(path, {"ppo"}) == [{"script": "dpo", "line": "2", "bug": "b"}]


def test_pages_come_from_scripts_and_csvs():
    command = [sys.executable, ROOT / "docs" / "generate.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not shutil.which("git"), reason="no git")
@pytest.mark.parametrize("edited, scripts", [
    (["ppo.py"], {"ppo"}),
    (["tests/mutants/dpo.toml", "docs/ppo.md"], {"dpo"}),
    (["tests/test_actor_critic.py"], {"actor_critic"}),
    (["tests/conftest.py"], set(SCRIPTS)),
    (["tests/mutants/run.py"], set(SCRIPTS)),
    (["README.md", "benchmarks/ppo.py"], set()),
    ([], set()),
])
def test_changed_scripts(edited, scripts, tmp_path, monkeypatch):
    def git(*command):
        identity = ["-c", "user.name=a", "-c", "user.email=a"]
        subprocess.run(["git", *identity, *command], cwd=tmp_path, check=True, capture_output=True)

    for name in [*edited, "grpo.py"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("before")
    git("init")
    git("add", ".")
    git("commit", "-m", "before")
    for name in edited:
        (tmp_path / name).write_text("after")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    assert run.changed_scripts(MUTANTS, "HEAD") == scripts
