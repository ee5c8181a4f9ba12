"""ppo.py killed and resumed: every saved value comes back."""

import importlib
import os
import sys

import pytest
import torch


def load(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def leaves(state, path=""):
    """Every value in a checkpoint, with the path to it."""
    items = state.items() if isinstance(state, dict) else enumerate(state)
    for key, value in items:
        if isinstance(value, dict | list):
            yield from leaves(value, f"{path}/{key}")
        else:
            yield f"{path}/{key}", value


def assert_same(first, second, but=("/run/seconds", "/run/passed", "/run/size")):
    first, second = dict(leaves(first)), dict(leaves(second))
    assert first.keys() == second.keys()
    for path, value in first.items():
        if path not in but and not path.startswith("/args/"):
            same = (
                torch.equal(value, second[path])
                if isinstance(value, torch.Tensor)
                else value == second[path]
            )
            assert same, path


@pytest.mark.parametrize("name", ["ppo"])
def test_every_saved_value_is_restored(name, tmp_path, monkeypatch):
    script = importlib.import_module(name)
    first = script.Args(run_dir=str(tmp_path), total_timesteps=8_192, num_envs=16)
    script.train(first)
    saved = load(tmp_path)
    seen = {}
    init = script.Run.__init__

    def spy(run, *args, **parts):
        init(run, *args, **parts)
        run.save()
        seen.update(load(run.dir))
        seen["run"]["seconds"] = saved["run"]["seconds"]

    monkeypatch.setattr(script.Run, "__init__", spy)
    args = script.Args(
        run_dir=str(tmp_path), total_timesteps=16_384, num_envs=16, resume=str(tmp_path)
    )
    torch.manual_seed(123)
    script.train(args)
    for state in (seen, saved):  # the step size is the flags' and the schedule's
        for group in state["optimizer"]["param_groups"]:
            del group["lr"]
    assert_same(saved, seen)
    steps = [
        int(line.split(",")[0]) for line in (tmp_path / "metrics.csv").read_text().splitlines()[1:]
    ]
    assert steps == sorted(set(steps)) and steps[-1] >= 16_384
    seconds = [
        float(line.split(",")[1])
        for line in (tmp_path / "metrics.csv").read_text().splitlines()[1:]
    ]
    assert seconds == sorted(seconds)


def test_resume_takes_flags_from_the_run_and_the_command_line(script, tmp_path, monkeypatch):
    steps = 4_096
    script.train(script.Args(run_dir=str(tmp_path), total_timesteps=steps, num_envs=16, gamma=0.9))
    monkeypatch.setattr(sys, "argv", ["x", "--resume", str(tmp_path), "--learning-rate", "0.125"])
    args = script.parse(script.Args)
    assert (args.gamma, args.num_envs, args.learning_rate, args.resume) == (
        0.9,
        16,
        0.125,
        str(tmp_path),
    )


def test_lines_after_the_checkpoint_are_dropped(script, tmp_path):
    path, args = tmp_path / "metrics.csv", script.Args()
    path.write_text("step,seconds,score\n100,1,2\n200,2,3\n300,3,4\n2")
    metrics, _ = script.open_run(tmp_path, args, len("step,seconds,score\n100,1,2\n200,2,3\n"))
    metrics.write("301,4,5\n")
    metrics.close()
    assert path.read_text() == "step,seconds,score\n100,1,2\n200,2,3\n301,4,5\n"
    script.open_run(tmp_path, args, 10**6)[0].close()
    assert path.read_text() == "step,seconds,score\n100,1,2\n200,2,3\n301,4,5\n"
    script.open_run(tmp_path, args, 0)[0].close()
    assert path.read_text() == ""


def test_a_kill_during_save_leaves_the_old_checkpoint(script, tmp_path, monkeypatch):
    script.train(script.Args(run_dir=str(tmp_path), total_timesteps=2_048, num_envs=16))
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def torn(state, path):
        path.write_bytes(b"half of it")
        raise SystemExit("killed")

    monkeypatch.setattr(script.torch, "save", torn)
    with pytest.raises(SystemExit, match="killed"):
        script.train(script.Args(resume=str(tmp_path), total_timesteps=4_096, num_envs=16))
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert os.path.exists(tmp_path / "checkpoint.tmp")


def test_checkpoints_are_written_on_the_way(script, tmp_path, monkeypatch):
    steps, save = [], script.Run.save
    monkeypatch.setattr(script.Run, "save", lambda run: (steps.append(run.iteration), save(run)))
    script.train(script.Args(run_dir=str(tmp_path), total_timesteps=8_192, num_envs=16,
                             checkpoint_every=2))
    assert steps[:3] == [0, 2, 4] and len(steps) >= 4
