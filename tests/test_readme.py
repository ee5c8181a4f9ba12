"""README's tables are those that the committed CSVs give, and its commands are there."""

import subprocess
import sys

from conftest import ROOT


def test_tables_come_from_the_csvs():
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "readme.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_two_commands_are_there():
    text = (ROOT / "README.md").read_text().splitlines()
    assert "pip install -r requirements.txt && python ppo.py --env-id CartPole-v1" in text
    assert "pip install -r tests/requirements.txt && pytest" in text
    assert "sed -n" in (ROOT / ".ci" / "run").read_text(), "CI runs the command as it stands here"
