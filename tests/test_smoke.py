"""Each control script learns CartPole in a short run, and the same seed repeats the run."""

import csv
import importlib

import pytest
from conftest import LADDER

# (flags, the score to reach); a policy that never learns stays near 22 on CartPole
BRIEF = {
    "reinforce": ({"total_timesteps": 40_000}, 60),
    "reinforce_baseline": ({"total_timesteps": 40_000}, 60),
    "actor_critic": ({"total_timesteps": 40_000}, 60),
    "ppo": ({"total_timesteps": 40_960}, 100),
}


def rows(folder):
    with open(folder / "metrics.csv") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def score(name, folder, **flags):
    script = importlib.import_module(name)
    return script.train(script.Args(run_dir=str(folder), **flags))[1]


@pytest.mark.parametrize("name", LADDER)
def test_script_learns_and_the_same_seed_repeats_the_run(name, tmp_path):
    flags, goal = BRIEF[name]
    scores = [score(name, tmp_path / run, **flags) for run in "ab"]
    assert scores[0] > goal
    assert scores[0] == scores[1]
    assert rows(tmp_path / "a") == rows(tmp_path / "b")


@pytest.mark.slow
@pytest.mark.parametrize("name", LADDER)
def test_score_stays_low_without_learning(name, tmp_path):
    """So the test above fails for a script that does not learn."""
    flags, goal = BRIEF[name]
    assert score(name, tmp_path, learning_rate=0.0, **flags) < goal / 1.5


@pytest.mark.parametrize("name", LADDER)
def test_another_seed_gives_another_run(name, tmp_path):
    for seed in (1, 2):
        score(name, tmp_path / str(seed), total_timesteps=4_096, seed=seed)
    assert rows(tmp_path / "1") != rows(tmp_path / "2")
