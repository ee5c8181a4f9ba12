"""benchmarks/gpu.py runs on the CPU with tiny sizes, and its comparisons notice errors."""

import importlib
import importlib.util
import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import ROOT
from test_device import Generator, VirtualGPU

import dpo
import grpo


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("gpu", ROOT / "benchmarks" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu"] = module  # for its dataclass
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checks(gpu):
    return importlib.import_module("gpu_checks")


@pytest.fixture
def run(gpu, tmp_path):
    return gpu.Run(part=0, out=tmp_path, device="cpu", quick=True, work=tmp_path)


def test_a_wrong_gradient_is_noticed(checks):
    right = checks.dpo_update("cpu")
    assert checks.difference(right, right) == 0
    for name, gradient in right.items():
        for wrong in (1.01 * gradient, -gradient, gradient + float("nan")):
            changed = checks.difference(right | {name: wrong}, right)
            # Gradients that are nearly 0 count less.
            assert changed > (1e-4 if gradient.norm() > 0.1 else 1e-6), name
    with pytest.raises(ValueError, match="loss"):
        checks.difference({name: right[name] for name in right if name != "loss"}, right)


@pytest.mark.parametrize("name", ["reinforce", "reinforce_baseline", "actor_critic", "ppo vectors",
                                  "grpo", "dpo"])
def test_updates_have_gradients(checks, name):
    result = checks.UPDATES[name]("cpu")
    assert all(gradient.abs().sum() > 0 for gradient in result.values())


def test_a_check_holds_up_to_its_limit(gpu, run):
    for value in (1.0, 1.1, float("nan")):
        run.check("name", value, 1.0)
    assert [row["holds"] for row in gpu.read_results(run.out)] == [True, False, False]


def test_wrong_frequencies_are_noticed(checks):
    probs = torch.tensor([0.2, 0.3, 0.5])
    tokens = probs.multinomial(100_000, replacement=True)
    assert checks.frequency_error(tokens, probs) < 5
    assert checks.frequency_error(tokens, torch.tensor([0.21, 0.29, 0.5])) > 5


def test_a_part_is_cut_off_left_out_or_fails(gpu, run, monkeypatch):
    gpu.run_part(run, seconds=0.2)
    monkeypatch.setitem(gpu.PARTS, 1, (gpu.right, 90, ("gymnasium", "no_such_package")))
    gpu.run_part(replace(run, part=1), seconds=90)
    gpu.run_part(replace(run, part=6, device="no_such_device"), seconds=90)
    cut_off, left_out, failed = gpu.read_results(run.out)
    assert cut_off["cut_off_after_seconds"] == 0
    assert left_out["left_out"] == "not installed: no_such_package"
    assert "no_such_device" in failed["failed"]
    assert gpu.table([left_out]).endswith("| 1 | part | left_out not installed: no_such_package |")


@pytest.fixture
def virtual(monkeypatch):
    """A virtual GPU; bfloat16 does not work there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**20)
    monkeypatch.setattr(torch, "Generator", Generator)
    for script in (grpo, dpo):
        monkeypatch.setattr(script, "default_args", partial(without_bf16, script.default_args))
    with VirtualGPU() as mode:
        yield mode


def without_bf16(default_args, **flags):
    return default_args(**flags | {"bf16": False})


@pytest.mark.slow
def test_part_1_on_a_virtual_gpu(gpu, checks, run, virtual, monkeypatch):
    brief = {name: checks.BRIEF[name] for name in ("grpo", "ppo")}
    monkeypatch.setattr(checks, "BRIEF", brief)
    monkeypatch.setattr(checks, "LONGER", {"ppo": checks.LONGER["ppo"]})
    run = replace(run, device="cuda")
    checks.check_sampling(run)
    checks.check_updates(run, "float32", checks.UPDATES, 0)
    checks.check_runs(run)
    assert all(row["holds"] for row in gpu.read_results(run.out))


def test_an_error_does_not_stop_the_others(gpu, checks, run, monkeypatch):
    monkeypatch.setitem(checks.UPDATES, "dpo", lambda device: 1 / 0)
    checks.check_updates(run, "float32", ["dpo", "grpo"], 1e-4)
    failed, right = gpu.read_results(run.out)
    assert failed["name"] == "dpo update, float32" and "ZeroDivision" in failed["failed"]
    assert right["holds"]


def test_speeds_on_a_virtual_gpu(gpu, run, virtual):
    run = replace(run, device="cuda")
    sizes = {"prompts": 1, "prompt_length": 6, "generations": 2, "length": 4, "steps": 2}
    gpu.grpo_speed(run, "grpo", sizes, [gpu.random_text(random.Random(0), 6)])
    pair = {name: gpu.random_text(random.Random(name), 5) for name in dpo.Pair._fields}
    gpu.dpo_speed(run, "dpo", sizes | {"pairs": 1}, [pair])
    gpu.ppo_speed(run, "CartPole-v1", "cuda")
    language = gpu.read_results(run.out)[:2]
    assert [row["peak_mib"] for row in language] == [3, 3]


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_all_parts_on_the_cpu(gpu, tmp_path):
    folder, out = tmp_path / "empty", tmp_path / "out"
    folder.mkdir()
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--out", out, "--device", "cpu",
               "--quick"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    results = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(folder.iterdir())
    assert {row["part"] for row in results} == set(gpu.PARTS)
    assert not [row for row in results if "cut_off_after_seconds" in row or "failed" in row]
    checks = [row for row in results if row["part"] == 1]
    assert all(row["holds"] for row in checks)
    for script in ("reinforce", "reinforce_baseline", "actor_critic", "ppo", "grpo", "dpo"):
        names = [row["name"] for row in checks if row["name"].split()[0] == script]
        assert any("update" in name for name in names), script
        assert any("run twice" in name for name in names), script
    for row in results:
        if "compiled_graphs" in row:
            assert (row["compiled_graphs"] > 0) == ("compiled" in row["name"]), row
    for row in results:  # the table is complete
        assert f"| {row['part']} | {row['name']} |" in done.stdout
    again = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert again.returncode == 1 and "holds results already" in again.stderr
