"""docs/copy.md: each change it shows, made to a copy in a folder of its own, runs."""

import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

CHANGES = dict(
    re.findall(
        r"<!-- change (\w+) -->\n```diff\n(.*?)```",
        (ROOT / "docs" / "copy.md").read_text(),
        re.DOTALL,
    )
)
GPT = ["--imitation-steps", "5", "--max-steps", "2", "--eval-prompts", "8"]
ENVIRONMENT = """
import gymnasium as gym
import numpy as np


class MyEnv(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(3, np.float32), {}

    def step(self, action):
        return np.zeros(3, np.float32), float(action), False, False, {}


gym.register("MyEnv-v0", MyEnv, max_episode_steps=20)
"""


def changed(name, folder):
    """A copy of the script that the change names, with the change made."""
    script, *lines = CHANGES[name].splitlines()
    script = script.removeprefix("--- ")
    old = "\n".join(line[1:] for line in lines if line.startswith("-"))
    new = "\n".join(line[1:] for line in lines if line.startswith("+"))
    source = (ROOT / script).read_text()
    assert source.count(old) == 1
    (folder / script).write_text(source.replace(old, new))
    return script


def run(folder, *command):
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_change_is_tested():
    assert set(CHANGES) == {"network", "reward"}


def test_own_environment(tmp_path):
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "envs.py").write_text(ENVIRONMENT)
    (tmp_path / "ppo.py").write_text((ROOT / "ppo.py").read_text())
    run(tmp_path, "ppo.py", "--env-id", "my_package.envs:MyEnv-v0", "--total-timesteps", "40000",
        "--run-dir", "run")
    *_, last = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert float(last.split(",")[2]) > 19, "action 1, twenty times"


def test_own_network(tmp_path):
    script = changed("network", tmp_path)
    run(tmp_path, script, "--total-timesteps", "4096", "--run-dir", "run")


@pytest.mark.slow
def test_own_reward(tmp_path):
    """As many points as sevens: more than one is possible, and nothing else could give them."""
    script = changed("reward", tmp_path)
    run(tmp_path, script, *GPT, "--max-steps", "25", "--imitation-steps", "60", "--run-dir", "run")
    header, first, *_, last = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    column = header.split(",").index("reward")
    assert float(last.split(",")[column]) > float(first.split(",")[column]) + 0.5


@pytest.mark.slow
def test_own_data(tmp_path):
    """The rows of the page, with a model that the default run has written."""
    text = (ROOT / "docs" / "copy.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith('{"prompt"')]
    assert [set(json.loads(row)) for row in rows] == [
        {"prompt", "answer"}, {"prompt", "chosen", "rejected"}
    ]
    for script in ("grpo.py", "dpo.py"):
        (tmp_path / script).write_text((ROOT / script).read_text())
    run(tmp_path, "grpo.py", *GPT, "--run-dir", "tiny")
    own = {"grpo.py": ["--num-prompts", "2", "--max-completion-length", "8"], "dpo.py": []}
    for (script, flags), row in zip(own.items(), rows):
        lines = [json.dumps(json.loads(row) | {"prompt": f"{n:02}+03="}) for n in range(20)]
        (tmp_path / "data.jsonl").write_text("\n".join(lines))
        run(tmp_path, script, "--model", "tiny/model", "--data", "data.jsonl", "--max-steps", "2",
            "--run-dir", f"run-{script}", *flags)
