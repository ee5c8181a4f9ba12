"""Tables equal the committed CSVs, and plots work."""

import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT


def test_tables_come_from_the_csvs():
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "readme.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_readme_has_the_two_commands():
    text = (ROOT / "README.md").read_text().splitlines()
    assert "pip install -r requirements.txt && python ppo.py --env-id CartPole-v1" in text
    assert "pip install -r tests/requirements.txt && pytest" in text
    assert "sed -n" in (ROOT / ".ci" / "run").read_text(), "CI runs the command as it stands here"


def test_readme_shows_at_most_ten_results():
    text = (ROOT / "README.md").read_text()
    table = text.split("<!-- results -->\n")[1].split("<!-- end -->")[0]
    assert 2 < len(table.splitlines()) <= 12  # with the head


def test_every_table_of_results_says_what_measured_it():
    text = (ROOT / "docs" / "results.md").read_text()
    parts = re.findall(r"<!-- (\w[\w ]*) -->\n(.*?)<!-- end -->", text, flags=re.DOTALL)
    assert len(parts) > 10
    for name, part in parts:
        if name != "mutants" and not name.startswith("ablation "):  # these: "sources of choices"
            assert re.search(r"^- .*`python .*`, commit `\w{7}`", part, re.MULTILINE), name


def test_sources_show_notes_and_group_equal_origins(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import cartpole

    entry = {"commit": "0123456789", "date": "2026-01-02 03:04", "command": "python x.py",
             "machine": {"cpu": "CPU", "cores": 2},
             "versions": {"python": "3.11", "torch": "2", "gymnasium": "1"}}
    parts = {"a": entry, "b": entry, "c": entry | {"note": "an earlier version"}}
    (tmp_path / "x.json").write_text(json.dumps(parts))
    monkeypatch.setattr(cartpole, "HERE", tmp_path)
    lines = cartpole.sources("x.json").splitlines()
    assert len(lines) == 2 and lines[0].startswith("- a; b: ") and "0123456`" in lines[0]
    assert lines[1].startswith("- c: ") and lines[1].endswith("; an earlier version.")
    assert cartpole.sources("x.json", "a").startswith("- `python x.py`")
    assert cartpole.note("x.json", "c") == "an earlier version"
    assert cartpole.note("x.json", "a") == ""


def test_a_new_measurement_drops_what_was_said_about_its_parts(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import cartpole

    path = tmp_path / "x.json"
    path.write_text(json.dumps(dict.fromkeys(["a", "a, ppo", "b", "ab, ppo"], "old")))
    cartpole.record(path, ["a, dpo"], "new")
    assert len(json.loads(path.read_text())) == 5
    cartpole.record(path, ["a"], "new")
    assert json.loads(path.read_text()) == {"a": "new", "b": "old", "ab, ppo": "old"}


@pytest.mark.parametrize("command, words", [
    ("benchmarks/grpo.py --only speed", "--model"),
    ("benchmarks/grpo.py --only curve --model /nowhere", "--model"),
    ("benchmarks/dpo.py", "--model"),
    ("benchmarks/tasks.py --task Nope", "--task Nope"),
    ("benchmarks/curves.py --only pendulum --scripts reinforce", "--scripts"),
    ("benchmarks/ablations.py --only sums --scripts ppo", "nothing to run"),
    ("benchmarks/readme.py --chek", "usage"),
    ("docs/generate.py --nope", "usage"),
    ("tests/mutants/run.py nope --csv benchmarks/mutants.csv", "no such script: nope"),
    ("tests/mutants/run.py --csv nofolder/x.csv", "no such folder"),
    ("benchmarks/all.sh", "usage"),
])
def test_mistakes_change_no_file(command, words):
    name, *flags = command.split()
    paths = [path for kind in ("csv", "json") for path in (ROOT / "benchmarks").glob(f"*.{kind}")]
    before = {path: path.read_bytes() for path in paths}
    program = ["bash"] if name.endswith(".sh") else [sys.executable]
    done = subprocess.run([*program, name, *flags], cwd=ROOT, capture_output=True, text=True,
                          check=False)
    assert done.returncode != 0 and words in done.stderr and "Traceback" not in done.stderr
    assert before == {path: path.read_bytes() for path in paths}


def test_interquartile_mean(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from plot import iqm

    assert iqm([1, 2, 3, 4, 5, 6, 7, 100]) == pytest.approx(4.5)
    assert iqm([0, 10, 20]) == pytest.approx((0.25 * 0 + 10 + 0.25 * 20) / 1.5)
    assert iqm([7]) == 7


def test_plot_of_three_seeds(tmp_path):
    import reinforce

    runs = [tmp_path / f"reinforce-CartPole-v1-{seed}-20260101-000000{process}"
            for seed, process in ((1, ""), (2, "-71"), (3, "-4711"))]
    for seed, run in enumerate(runs, 1):
        reinforce.train(reinforce.Args(seed=seed, total_timesteps=4_000, run_dir=str(run)))

    def plot(*args):
        command = [sys.executable, ROOT / "benchmarks" / "plot.py", *args]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    done = plot(*runs, "--out", "curves.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    missing = plot(tmp_path / "nothing")
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1
    missing = plot(runs[0], "--column", "nothing")
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1
    new = tmp_path / "new"
    new.mkdir()
    (new / "args.json").write_text("{}")
    (new / "metrics.csv").write_text("")
    done = plot(*runs, new, "--out", "others.png")
    assert done.returncode == 0 and "new: left out" in done.stderr, done.stderr
    assert plot(new).returncode == 2
