"""What the tests share: the scripts as modules, and a logger that stops after a few updates."""

import importlib
import os
import sys
from pathlib import Path

import pytest

# Two tests run at a time, some of them with two threads, so waiting threads must not use the CPU.
# This is read when torch is loaded, also in the processes that tests start.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import torch

ROOT = Path(__file__).resolve().parent.parent
LADDER = ["reinforce", "reinforce_baseline", "actor_critic", "ppo"]
SIMPLE = LADDER[:3]  # no checkpoints, fewer spaces
SCRIPTS = [name for name in [*LADDER, "grpo", "dpo"] if (ROOT / f"{name}.py").exists()]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


@pytest.fixture(params=SIMPLE)
def simple(request):
    """Return each control script except ppo.py as a module."""
    return importlib.import_module(request.param)


@pytest.fixture(autouse=True)
def one_thread():
    """One thread, as in the scripts, also for tests that call their functions directly."""
    torch.set_num_threads(1)


def pretrain_once(module, monkeypatch):
    """Run pretrain only at the first call; later calls return copies of its result."""
    pretrain, first = module.pretrain, []

    def again(*args):
        first.extend(() if first else pretrain(*args))
        config, weights, tokenizer = first
        return config, {name: x.clone() for name, x in weights.items()}, tokenizer

    monkeypatch.setattr(module, "pretrain", again)


class FakeLogger:
    """Replaces Logger of the control scripts: writes nothing, stops after `updates` rows."""

    def __init__(self, updates=1):
        self.updates, self.step, self.score, self.rows = updates, 0, 0.0, []
        self.dir = "nowhere"

    def __call__(self, args, parts):
        self.parts = parts  # the policy in the simple scripts
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False

    @property
    def iteration(self):
        return len(self.rows)

    def reached(self, goal):
        return len(self.rows) >= self.updates

    def write(self, steps, returns, **metrics):
        self.step += int(steps)
        metrics = {name: torch.as_tensor(value).detach().clone() for name, value in metrics.items()}
        self.rows.append((int(steps), returns, metrics))
