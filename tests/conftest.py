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


@pytest.fixture(params=["ppo"])
def script(request):
    """ppo.py as a module."""
    return importlib.import_module(request.param)


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


class FakeLogger:
    """Stands in for Logger of the simple scripts: writes nothing, ends after `updates` rows."""

    def __init__(self, updates=1):
        self.updates, self.step, self.score, self.rows = updates, 0, 0.0, []

    def __call__(self, args, policy):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False

    def reached(self, goal):
        return len(self.rows) >= self.updates

    def write(self, steps, returns, **metrics):
        self.step += int(steps)
        metrics = {name: value.detach().clone() for name, value in metrics.items()}
        self.rows.append((int(steps), returns, metrics))


class OneUpdate:
    """Stands in for Run of ppo.py: writes nothing, ends after `updates`."""

    def __init__(self, updates=1):
        self.updates, self.step, self.iteration, self.score, self.rows = updates, 0, 0, 0.0, []
        self.dir = "nowhere"

    def __call__(self, args, threshold, **parts):
        self.parts = parts
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False

    @property
    def finished(self):
        return self.iteration >= self.updates

    def save(self):
        pass

    def log(self, steps, returns, **means):
        self.step, self.iteration = self.step + int(steps), self.iteration + 1
        self.rows.append((int(steps), returns, means))
