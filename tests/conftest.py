"""What the tests share: the scripts as modules, and stand-ins for their loggers that soon stop."""

import importlib
import os
import sys
from pathlib import Path

import pytest

# Two tests run at a time, some of them with two threads: a thread that waits shall not spin. Read
# when torch is loaded, and by the processes that tests start.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import torch

ROOT = Path(__file__).resolve().parent.parent
LADDER = ["reinforce", "reinforce_baseline", "actor_critic", "ppo"]
SIMPLE = LADDER[:3]  # no checkpoints, fewer spaces
SCRIPTS = [name for name in [*LADDER, "grpo", "dpo"] if (ROOT / f"{name}.py").exists()]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


@pytest.fixture(params=SIMPLE)
def simple(request):
    """Each control script but PPO in turn, as a module."""
    return importlib.import_module(request.param)


@pytest.fixture(autouse=True)
def one_thread():
    """The scripts set it too; tests that call their functions directly shall be as fast."""
    torch.set_num_threads(1)


def teach_once(module, monkeypatch):
    """Let imitate work the first time; later calls give the weights of the first."""
    teach, weights = module.imitate, {}

    def imitate(model, *rest):
        if not weights:
            teach(model, *rest)
            weights.update({name: x.clone() for name, x in model.state_dict().items()})
        model.load_state_dict(weights)

    monkeypatch.setattr(module, "imitate", imitate)


def pretrain_once(module, monkeypatch):
    """Let pretrain work the first time; later calls give copies of what it returned."""
    pretrain, first = module.pretrain, []

    def again(*args):
        first.extend(() if first else pretrain(*args))
        config, weights, tokenizer = first
        return config, {name: x.clone() for name, x in weights.items()}, tokenizer

    monkeypatch.setattr(module, "pretrain", again)


class FakeLogger:
    """Stands in for Logger of the control scripts: writes nothing, ends after `updates` rows."""

    def __init__(self, updates=1):
        self.updates, self.step, self.score, self.rows = updates, 0, 0.0, []
        self.dir = "nowhere"

    def __call__(self, args, parts):
        self.parts = parts  # of ppo.py; the policy elsewhere
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
