"""Random flags, sensible and senseless: each set ends in a run, or in one line and exit code 2."""

import sys
import tempfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ppo

NUMBERS = st.one_of(
    st.integers(-3, 40), st.sampled_from([0.0, 0.5, 0.9, 1.0, 1.5, -0.1, 1e-8, 1e9, "nan", "inf"])
)
INTEGERS = st.one_of(st.integers(-2, 9), st.sampled_from([16, 17, 64, 10**7]))
SWITCH = st.sampled_from(["True", "False", "None"])
VALUES = {
    "env-id": st.sampled_from([
        "CartPole-v1", "Pendulum-v1", "FrozenLake-v1", "Blackjack-v1", "toys:Constant-v0",
        "toys:Switches-v0", "toys:Speaking-v0", "toys:Reading-v0", "scripted:SameStep-v0",
        "scripted:InTensors-v0", "scripted:Sees-gray-v0", "CartPole-v9", "Nothing-v0", "no:Such-v0",
        "", ":", "a b", "ALE/None-v5", "CartPole", "../x",
    ]),
    "seed": INTEGERS,
    "learning-rate": NUMBERS,
    "gamma": NUMBERS,
    "gae-lambda": NUMBERS,
    "num-minibatches": INTEGERS,
    "update-epochs": st.integers(-1, 3),
    "clip-coef": NUMBERS,
    "ent-coef": NUMBERS,
    "vf-coef": NUMBERS,
    "max-grad-norm": NUMBERS,
    "target-kl": NUMBERS,
    "log-std": NUMBERS,
    "norm-obs": SWITCH,
    "norm-reward": SWITCH,
    "clip-reward": SWITCH,
    "vectorization": st.sampled_from(["auto", "sync", "native"]),
    "eval-episodes": st.integers(-1, 2),
    "eval-only": st.sampled_from(["nowhere"]),
    "stop-at": NUMBERS,
    "device": st.sampled_from(["cpu", "auto", "mps", "tpu"]),
    "resume": st.sampled_from(["nowhere", "tests"]),
    "checkpoint-every": INTEGERS,
}
SWITCHES = ["anneal-lr", "no-anneal-lr", "anneal-clip", "clip-vloss", "bf16", "no-such-flag"]


@pytest.mark.slow
@settings(max_examples=300, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    chosen=st.lists(st.sampled_from(sorted(VALUES)), max_size=3, unique=True),
    switches=st.lists(st.sampled_from(SWITCHES), max_size=1),
    num_envs=st.sampled_from([2, 4, 6, 3, 1, 0]),
    num_steps=st.sampled_from([8, 16, 20, 7, 4, 1, 0]),
    batches=st.sampled_from([2, 1, 3, 0]),
    data=st.data(),
)
def test_flags_end_in_a_run_or_in_one_line(
        chosen, switches, num_envs, num_steps, batches, data, capsys):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        steps = num_envs * num_steps * batches
        command = ["ppo.py", "--run-dir", f"{folder}/run", "--num-envs", num_envs, "--num-steps",
                   num_steps, "--total-timesteps", steps, "--num-minibatches", 2,
                   *(f"--{name}" for name in switches)]
        for name in chosen:
            command += [f"--{name}", data.draw(VALUES[name], label=name)]
        patch.setattr(sys, "argv", [str(word) for word in command])
        capsys.readouterr()
        try:
            ppo.train(ppo.parse(ppo.Args))
        except SystemExit as stop:
            out, err = capsys.readouterr()
            assert stop.code == 2
            one_line = err.startswith("error: ") and err.count("\n") == 1
            assert one_line or "For full helptext, run ppo.py --help" in err, err
            assert "Traceback" not in out + err
