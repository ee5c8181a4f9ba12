"""ppo.py and Stable-Baselines3: equal advantages and gradients for equal weights and batches."""

import gymnasium as gym
import numpy as np
import pytest
import torch

import ppo

sb3 = pytest.importorskip("stable_baselines3")


def test_advantages_equal_stable_baselines3():
    from stable_baselines3.common.buffers import RolloutBuffer

    rng, steps, num_envs = np.random.default_rng(0), 50, 3
    spaces = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2)
    buffer = RolloutBuffer(steps, *spaces, gae_lambda=0.9, gamma=0.97, n_envs=num_envs)
    reward, value = rng.normal(size=(2, steps + 1, num_envs)).astype(np.float32)
    done = rng.random((steps + 1, num_envs)) < 0.1
    for t in range(steps):  # it needs to know which observations begin an episode
        action = np.zeros((num_envs, 1))
        buffer.add(np.zeros((num_envs, 2)), action, reward[t], done[t], torch.tensor(value[t]),
                   torch.zeros(num_envs))
    buffer.compute_returns_and_advantage(torch.tensor(value[steps]), done[steps])
    reward, value, ends = (torch.tensor(array) for array in (reward, value, done))
    advantage = ppo.gae(reward[:-1], value[:-1], value[1:], ends[1:], ends[1:], 0.97, 0.9)
    np.testing.assert_allclose(advantage, buffer.advantages, atol=1e-6)
    np.testing.assert_allclose(advantage + value[:-1], buffer.returns, atol=1e-6)


def copy_weights(policy, agent):
    """Copy the weights of Stable-Baselines3's networks into the agent."""
    with torch.no_grad():
        for theirs, ours in [(policy.mlp_extractor.policy_net, agent.actor),
                             (policy.mlp_extractor.value_net, agent.critic)]:
            for i in (0, 2):
                ours[i].load_state_dict(theirs[i].state_dict())
        agent.actor[4].load_state_dict(policy.action_net.state_dict())
        agent.critic[4].load_state_dict(policy.value_net.state_dict())
        if agent.log_std is not None:
            agent.log_std.copy_(policy.log_std)


@pytest.mark.parametrize("env_id, vf_coef", [("CartPole-v1", 0.3), ("Pendulum-v1", 1e-5)])
def test_losses_and_gradients_equal_stable_baselines3(env_id, vf_coef, monkeypatch):
    """Two epochs, so that the second has ratios that are not 1; plain gradient descent."""
    torch.manual_seed(0)
    peer = sb3.PPO("MlpPolicy", env_id, n_steps=64, batch_size=64, n_epochs=2, ent_coef=0.1,
                   vf_coef=vf_coef, max_grad_norm=1e9, clip_range=0.05, device="cpu", seed=0)
    torch.nn.init.orthogonal_(peer.policy.action_net.weight, 1.0)
    _, callback = peer._setup_learn(64)
    peer.collect_rollouts(peer.env, callback, peer.rollout_buffer, 64)
    peer.policy.optimizer = torch.optim.SGD(peer.policy.parameters(), lr=3.0)
    monkeypatch.setattr(peer, "_update_learning_rate", lambda *args: None)
    envs = ppo.Envs(ppo.Args(env_id=env_id), 1, "cpu")
    args = ppo.Args(norm_obs=False, num_minibatches=1, update_epochs=2, ent_coef=0.1,
                    vf_coef=vf_coef, max_grad_norm=1e9, clip_coef=0.05)
    agent = ppo.Agent(envs.obs_shape, envs.single_action_space, args)
    copy_weights(peer.policy, agent)
    buffer = peer.rollout_buffer
    batch = {name: torch.tensor(array).squeeze(1) for name, array in [
        ("obs", buffer.observations), ("action", buffer.actions), ("logprob", buffer.log_probs),
        ("advantage", buffer.advantages), ("target", buffer.returns)]}
    batch["action"] = batch["action"].long() if agent.choices else batch["action"]
    pi, value = agent(batch["obs"])
    torch.testing.assert_close(pi.log_prob(batch["action"]), batch["logprob"], atol=1e-6, rtol=0)
    values = torch.tensor(buffer.values).squeeze(1)
    torch.testing.assert_close(value, values, atol=1e-6, rtol=0)

    logs = {}
    peer.logger.record = lambda name, value, **kwargs: logs.__setitem__(name, value)
    peer.train()
    optimizer = torch.optim.SGD(agent.parameters(), lr=3.0)
    advantage = batch["advantage"]  # Stable-Baselines3 normalizes in train(), with the unbiased std
    batch["advantage"] = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    report = ppo.update(agent, optimizer, batch, args)
    assert report["clip_fraction"] > 0.1, "the second epoch must have something to clip"
    for ours, theirs in [("policy_loss", "policy_gradient_loss"), ("value_loss", "value_loss"),
                         ("clip_fraction", "clip_fraction"), ("approx_kl", "approx_kl")]:
        if ours != "approx_kl":  # Stable-Baselines3 logs that of the last epoch
            assert report[ours] == pytest.approx(logs[f"train/{theirs}"], abs=1e-6, rel=1e-5)
    twin = ppo.Agent(envs.obs_shape, envs.single_action_space, args)
    copy_weights(peer.policy, twin)  # two steps later
    for ours, theirs in zip(agent.parameters(), twin.parameters()):
        torch.testing.assert_close(ours, theirs, atol=3e-6, rtol=1e-5)
