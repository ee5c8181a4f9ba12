"""Training runs of seconds on environments with known values and best actions."""

import importlib

import pytest
import torch

FAST = {
    "reinforce_baseline": {"total_timesteps": 6_000, "value_learning_rate": 3e-2, "gamma": 0.5},
    "actor_critic": {"total_timesteps": 30_000, "learning_rate": 1e-3, "gamma": 0.5},
    "ppo": {"total_timesteps": 16_384, "gamma": 0.5, "num_envs": 16, "num_minibatches": 4,
            "norm_obs": False, "norm_reward": False, "ent_coef": 0.0},
}
PLAYERS = {"reinforce": {"total_timesteps": 4_000}, **FAST}


def train(name, env, tmp_path, monkeypatch, **flags):
    """Return functions of a trained script: logits or means, most likely actions, and V."""
    script = importlib.import_module(name)
    args = script.Args(
        env_id=f"toys:{env}-v0", run_dir=str(tmp_path / "run"), **(PLAYERS[name] | flags)
    )
    if name == "ppo":
        agent, _ = script.train(args)
        return (agent.actor, lambda obs: agent(obs)[0].mode,
                lambda number: agent(torch.tensor([[number]]))[1].item())
    values = []
    if name != "reinforce":
        kind = script.Value
        monkeypatch.setattr(script, "Value", lambda space: values.append(kind(space)) or values[0])
    policy, _ = script.train(args)
    return (policy.net, lambda obs: policy(obs).mode,
            lambda number: values[0](torch.tensor([[number]])).item())


@pytest.mark.parametrize("name", FAST)
def test_value_of_a_constant_reward(name, tmp_path, monkeypatch):
    *_, value = train(name, "Constant", tmp_path, monkeypatch)
    assert value(0.0) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("name", FAST)
def test_value_depends_on_the_observation(name, tmp_path, monkeypatch):
    *_, value = train(name, "Observed", tmp_path, monkeypatch)
    assert value(1.0) == pytest.approx(1, abs=0.1) and value(-1.0) == pytest.approx(-1, abs=0.1)


@pytest.mark.parametrize("name", FAST)
def test_value_is_discounted(name, tmp_path, monkeypatch):
    *_, value = train(name, "Delayed", tmp_path, monkeypatch)
    assert value(0.0) == pytest.approx(0.5, abs=0.07) and value(1.0) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("name", PLAYERS)
@pytest.mark.parametrize("env", ["Chosen", "Matching"])
def test_the_rewarded_action_is_chosen(name, env, tmp_path, monkeypatch):
    net, *_ = train(name, env, tmp_path, monkeypatch)
    obs = torch.tensor([[-1.0], [1.0]]) if env == "Matching" else torch.zeros(2, 1)
    probs = net(obs).softmax(-1)
    assert probs[1, 1] > 0.9
    assert probs[0, 0 if env == "Matching" else 1] > 0.9


@pytest.mark.parametrize("name", ["actor_critic", "ppo"])
def test_time_limit_is_not_terminal(name, tmp_path, monkeypatch):
    """V = 1 / (1 - gamma), although each episode stops after ten steps."""
    steps = 60_000 if name == "actor_critic" else 40_000
    *_, value = train(name, "Endless", tmp_path, monkeypatch, gamma=0.9, total_timesteps=steps)
    assert value(0.0) == pytest.approx(10, rel=0.05)


@pytest.mark.parametrize("name", ["actor_critic", "ppo"])
def test_reset_only_rows_are_not_learned_from(name, tmp_path, monkeypatch):
    *_, value = train(name, "Bait", tmp_path, monkeypatch, gamma=0.9, total_timesteps=40_000)
    assert value(0.0) == pytest.approx(1, abs=0.1)
    assert abs(value(1.0)) < 0.1


@pytest.mark.parametrize("name", PLAYERS)
def test_box_actions(name, tmp_path, monkeypatch):
    steps = {"reinforce": 40_000, "reinforce_baseline": 40_000, "actor_critic": 80_000,
             "ppo": 40_000}
    _, mode, _ = train(name, "Target", tmp_path, monkeypatch, total_timesteps=steps[name],
                       learning_rate=1e-3 if "reinforce" in name else 3e-3)
    assert mode(torch.zeros(1, 1)).item() == pytest.approx(0.5, abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", PLAYERS)
def test_box_actions_in_a_range_far_from_zero(name, tmp_path, monkeypatch):
    """The best action is 26.5 of 16 to 30: 0.5 on the policy's scale."""
    steps = {"reinforce": 40_000, "reinforce_baseline": 40_000, "actor_critic": 80_000,
             "ppo": 40_000}
    policy_mode = train(name, "FarTarget", tmp_path, monkeypatch, total_timesteps=steps[name],
                        learning_rate=1e-3 if "reinforce" in name else 3e-3)[1]
    assert policy_mode(torch.zeros(1, 1)).item() == pytest.approx(0.5, abs=0.1)
