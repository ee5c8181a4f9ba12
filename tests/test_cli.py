"""Command lines of the language scripts."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.parametrize("name", ["grpo", "dpo"])
def test_help_in_any_encoding(name):
    done = subprocess.run([sys.executable, f"{name}.py", "--help"], cwd=ROOT, text=True,
                          capture_output=True, timeout=120, check=False,
                          env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "--track" in done.stdout, done.stderr
