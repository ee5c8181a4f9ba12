"""ppo.py and environments: spaces, autoreset, normalization, Atari, evaluation."""

import functools
import itertools
import warnings

import gymnasium as gym
import numpy as np
import pytest
import scripted
import torch
from conftest import FakeLogger
from scripted import LENGTHS, observed, rewarded

import ppo


def make(env_id, num_envs=2, **flags):
    return ppo.Envs(ppo.Args(env_id=env_id, **flags), num_envs, "cpu")


def agent_for(envs, **flags):
    return ppo.Agent(envs.obs_shape, envs.single_action_space,
                     ppo.Args(**{"norm_obs": False} | flags))


def collect(envs, agent, num_steps, seed=0):
    """Return the rollout of num_steps steps after a reset."""
    obs = envs.reset(seed)
    valid = torch.ones(len(obs), dtype=torch.bool)
    return ppo.collect(envs, agent, obs, valid, num_steps)[2]


# Spaces


def sent_actions(envs):
    """Record the actions that reach the environments."""
    seen, step = [], envs.env.step
    envs.env.step = lambda action: (seen.append(action), step(action))[1]
    return seen


@pytest.mark.parametrize(
    "name",
    ["discrete", "from5", "multi", "grid", "multifrom", "binary", "switches", "box", "table",
     "far", "fine", "unbounded"],
)
def test_actions_are_in_the_action_space(name):
    """The scripted environment asserts that its space contains each action."""
    envs = make(f"scripted:Does-{name}-v0")
    rollout = collect(envs, agent_for(envs, log_std=1.0), 20)
    assert len(rollout["action"]) == 20


def test_multidimensional_actions_keep_their_order():
    envs = make("scripted:Does-grid-v0", 1)
    envs.reset(0)
    seen = sent_actions(envs)
    envs.step(torch.tensor([[1, 2, 3, 0]]))
    assert seen[0].tolist() == [[[1, 2], [3, 0]]]
    assert ppo.num_choices(envs.single_action_space) == [2, 3, 4, 2]
    envs = make("scripted:Does-multifrom-v0", 1)
    envs.reset(0)
    seen = sent_actions(envs)
    envs.step(torch.tensor([[1, 2]]))
    assert seen[0].tolist() == [[2, -2]]


def test_box_actions_are_scaled_to_the_bounds():
    envs = make("scripted:Does-far-v0", 3)  # Box(16, 30)
    envs.reset(0)
    seen = sent_actions(envs)
    envs.step(torch.tensor([[-1.0, 1.0], [0.0, 0.5], [-3.0, 3.0]]))
    np.testing.assert_allclose(seen[0], [[16, 30], [23, 26.5], [16, 30]])


def test_unbounded_box_actions_are_not_scaled():
    envs = make("scripted:Does-unbounded-v0", 1)
    envs.reset(0)
    seen = sent_actions(envs)
    envs.step(torch.tensor([[-5.0, 0.25]]))
    assert seen[0].tolist() == [[-5.0, 0.25]]


def test_each_component_of_an_action_has_its_own_bounds():
    """[-1, 1] and [0, 4]; with one infinite or far bound there is no scaling."""
    envs = make("scripted:Does-sides-v0", 2)
    envs.reset(0)
    seen = sent_actions(envs)
    envs.step(torch.tensor([[-1.0, 0.0, -5.0, 0.25], [0.5, 1.0, 5.0, 0.5]]))
    np.testing.assert_allclose(seen[0], [[-1, 2, -5, 0.25], [0.5, 4, 1, 0.5]])


def test_what_the_environments_return_is_copied():
    """Some vector environments write into the same arrays again."""
    envs = make("scripted:Scripted-v0", 2)
    envs.reset(0)
    arrays = [np.zeros((2, 2), np.float32), np.zeros(2), np.zeros(2, bool), np.zeros(2, bool)]
    envs.env.step = lambda action: (*arrays, {})
    returned = envs.step(torch.zeros(2, 1))
    for array in arrays:
        array[:] = 1
    assert not any(tensor.any() for tensor in returned)


def test_rollout_has_the_sampled_action_before_clipping():
    """A clipped action would have another log π."""
    envs = make("scripted:Does-box-v0")
    agent = agent_for(envs, log_std=2.0)
    rollout = collect(envs, agent, 20)
    assert rollout["action"].abs().max() > 1
    with torch.no_grad():
        pi, value = agent(rollout["obs"])
        torch.testing.assert_close(pi.log_prob(rollout["action"]), rollout["logprob"])
        torch.testing.assert_close(value, rollout["value"])


def test_integer_box_actions_are_refused_with_a_hint():
    with pytest.raises(SystemExit, match="MultiDiscrete"):
        make("scripted:Does-whole-v0")


IMAGES = ("first", "stack", "gray", "last", "picture", "deep")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", scripted.SPACES)
def test_observations_are_vectors_or_images(name):
    space, envs = scripted.SPACES[name], make(f"scripted:Sees-{name}-v0", 3)
    obs = envs.reset(4)
    alone = gym.make(f"scripted:Sees-{name}-v0")
    for n in range(3):
        raw, _ = alone.reset(seed=4 + n)
        if name in ("first", "gray"):
            expected = raw.reshape(-1, 40, 36)
        elif name in ("last", "picture", "deep"):  # (H, W, C) to (C, H, W)
            expected = (raw["image"] if name == "picture" else raw).transpose(2, 0, 1)
        elif name == "stack":  # (S, H, W, C) to (S·C, H, W)
            expected = np.moveaxis(raw, -1, 1).reshape(12, 40, 36)
        elif name in ("text", "mixed"):
            expected = raw["a"]
        elif name == "nested":
            expected = np.concatenate([raw["in"]["a"], np.eye(3)[raw["n"]]])
        elif name == "tiny":  # bytes
            expected = raw.flatten() / np.float32(255)
        elif name == "both":
            expected = np.concatenate([raw["a"], raw["image"].flatten() / np.float32(255)])
        else:
            expected = gym.spaces.flatten(space, raw)
        assert obs[n].shape == envs.obs_shape == expected.shape
        np.testing.assert_array_equal(obs[n].numpy(), expected.astype(obs.numpy().dtype))
    assert obs.dtype == (torch.uint8 if name in IMAGES else torch.float32)


@pytest.mark.parametrize(
    "name, words",
    [("text", "said"), ("nested", "said"), ("mixed", "pair"), ("picture", "said"), ("tiny", "36"),
     ("board", "36"), ("floats", "36"), ("both", "36"), ("dict", None), ("box", None),
     ("last", None)],
)
def test_a_warning_says_what_is_left_out_or_flattened(name, words):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make(f"scripted:Sees-{name}-v0")
    told = [str(warning.message) for warning in caught]
    assert any(words in message for message in told) if words else not told


def test_other_spaces_are_refused():
    for name in ("Speaking", "Reading"):
        with pytest.raises(SystemExit, match="not supported"):
            make(f"toys:{name}-v0")


@pytest.mark.parametrize("mode", ["SAME_STEP", "DISABLED", None])
def test_another_autoreset_mode_is_refused(mode, monkeypatch):
    envs = gym.make_vec("CartPole-v1", 2, vectorization_mode="sync")
    envs.metadata = {"autoreset_mode": mode and gym.vector.AutoresetMode[mode]}
    monkeypatch.setattr(gym, "make_vec", lambda *args, **kwargs: envs)
    with pytest.raises(SystemExit, match="NEXT_STEP"):
        make("CartPole-v1")


SMALL = {"num_envs": 2, "num_steps": 8, "num_minibatches": 2, "total_timesteps": 32,
         "update_epochs": 1}


@pytest.mark.parametrize("env", ["Sees-last-v0", "Sees-dict-v0", "Does-multi-v0", "Does-table-v0"])
@pytest.mark.parametrize("async_envs", [False, True])
def test_training_runs_on_every_kind(env, async_envs, tmp_path):
    ppo.train(ppo.Args(env_id=f"scripted:{env}", async_envs=async_envs, run_dir=str(tmp_path),
                       eval_episodes=2, **SMALL))


def test_async_environments_have_their_own_processes():
    envs = make("scripted:Does-table-v0", async_envs=True)
    assert isinstance(envs.unwrapped, gym.vector.AsyncVectorEnv)
    envs.close()
    assert isinstance(make("scripted:Does-table-v0").unwrapped, gym.vector.SyncVectorEnv)
    envs = make("CartPole-v1", async_envs=True)  # which has a native vector environment
    assert isinstance(envs.unwrapped, gym.vector.AsyncVectorEnv)
    envs.close()


# Presets


@pytest.mark.parametrize(
    "env, preset",
    [("CartPole-v1", None), ("scripted:Does-multi-v0", None),
     ("Pendulum-v1", "continuous"), ("scripted:Does-table-v0", "continuous"),
     ("scripted:Sees-last-v0", "image"), ("scripted:Drives-v0", "image")],
)
def test_presets_by_the_spaces(env, preset):
    args = ppo.default_args(env)
    changed = ppo.PRESETS[preset] if preset else {}
    assert args == ppo.Args(**{"env_id": env} | changed) and not args.clip_reward
    assert ppo.default_args(env, gamma=0.5, num_envs=3).gamma == 0.5


# Autoreset


def batch_of(env_id, num_steps, monkeypatch, **flags):
    """Return the agent, the batch of the first update, and the logged returns."""
    caught, update, log = [], ppo.update, FakeLogger()
    monkeypatch.setattr(ppo, "Logger", log)
    monkeypatch.setattr(ppo, "update", lambda *args: (caught.append(args), update(*args))[1])
    flags = {"num_envs": 1, "num_minibatches": 1, "norm_reward": False, "norm_obs": False} | flags
    agent, _ = ppo.train(ppo.Args(env_id=env_id, num_steps=num_steps, total_timesteps=10_000,
                                  learning_rate=0.0, gamma=0.9, gae_lambda=0.7, **flags))
    return agent, caught[0][2], log.rows[0][1]


def plain(agent, num_rows):
    """Compute obs, advantage and target of the steps by definition, in a plain loop."""
    rows = []
    for episode in itertools.count():
        length = min(LENGTHS[episode % len(LENGTHS)], num_rows - len(rows))
        obs = np.array([observed(episode, t) for t in range(length + 1)])
        value = agent(torch.tensor(obs))[1]
        if episode % 2 == 0 and length == LENGTHS[episode % len(LENGTHS)]:
            value = torch.cat([value[:-1], torch.zeros(1)])
        delta = [rewarded(episode, t) + 0.9 * value[t + 1] - value[t] for t in range(length)]
        for t in range(length):
            advantage = sum(0.63 ** (k - t) * delta[k] for k in range(t, length))
            rows.append((torch.tensor(observed(episode, t)), advantage, advantage + value[t]))
        if len(rows) == num_rows:
            return [torch.stack(column).detach() for column in zip(*rows)]


@pytest.mark.parametrize("num_steps", range(50, 62))
def test_batch_equals_that_of_a_plain_loop(num_steps, monkeypatch):
    """The batch may end within an episode, with its last step, or with its reset."""
    agent, batch, returns = batch_of("scripted:Scripted-v0", num_steps, monkeypatch)
    obs, advantage, target = plain(agent, len(batch["obs"]))
    torch.testing.assert_close(batch["obs"], obs)
    torch.testing.assert_close(batch["target"], target)
    normalized = (advantage - advantage.mean()) / advantage.std(correction=0)
    torch.testing.assert_close(batch["advantage"], normalized)
    expected = [sum(rewarded(e, t) for t in range(LENGTHS[e % 8])) for e in range(len(returns))]
    assert returns == pytest.approx(expected, abs=1e-5) and len(returns) >= 10


def test_lost_life_is_terminal_but_does_not_end_the_episode(monkeypatch):
    """The value after a lost life is 0; rewards before and after it add up to one return."""
    step, t = ppo.Envs.step, itertools.count()

    def with_lives(envs, action):
        *rest, life_lost = step(envs, action)
        return *rest, torch.full_like(life_lost, next(t) == 1)  # within the first episode

    monkeypatch.setattr(ppo.Envs, "step", with_lives)
    agent, batch, returns = batch_of("scripted:Scripted-v0", 60, monkeypatch)
    value = agent(batch["obs"])[1]
    delta = [rewarded(0, 0) + 0.9 * value[1] - value[0], rewarded(0, 1) - value[1]]
    assert batch["target"][1].item() == pytest.approx((delta[1] + value[1]).item(), abs=1e-5)
    expected = delta[0] + 0.63 * delta[1] + value[0]
    assert batch["target"][0].item() == pytest.approx(expected.item(), abs=1e-5)
    assert returns[0] == pytest.approx(sum(rewarded(0, t) for t in range(3)), abs=1e-5)


def test_steps_that_only_reset_change_nothing(monkeypatch):
    weights = []
    for amount in (0.0, 1e6):
        monkeypatch.setattr(scripted.Garbage, "amount", amount)
        log = FakeLogger(updates=3)
        monkeypatch.setattr(ppo, "Logger", log)
        flags = {"num_envs": 4, "num_steps": 16, "num_minibatches": 2}
        ppo.train(ppo.Args(env_id="scripted:Garbage-v0", total_timesteps=10_000, **flags))
        weights.append(torch.cat([p.flatten() for p in log.parts["agent"].state_dict().values()]))
    assert torch.equal(*weights)


def test_advantages_are_normalized_with_the_moments_of_all_processes(monkeypatch):
    moments = ppo.moments

    def of_all(rows):
        count, mean, var = moments(rows)
        return 2 * count, mean + 1, 4 * var

    monkeypatch.setattr(ppo, "moments", of_all)
    _, batch, _ = batch_of("scripted:Scripted-v0", 60, monkeypatch)
    assert batch["advantage"].std(correction=0).item() == pytest.approx(0.5, rel=1e-4)
    assert batch["advantage"].mean() < -0.1


def test_an_episode_that_ends_with_the_batch():
    """The step that only resets is the first one of the next batch."""
    envs = make("scripted:Scripted-v0", 1)
    agent, obs = agent_for(envs), envs.reset(0)
    valid = torch.ones(1, dtype=torch.bool)
    obs, valid, rollout = ppo.collect(envs, agent, obs, valid, 3)
    assert rollout["done"][-1].all() and rollout["valid"].all()
    *_, rollout = ppo.collect(envs, agent, obs, valid, 3)
    assert rollout["valid"].flatten().tolist() == [False, True, False]


# Normalization


def test_running_moments_equal_numpy_on_all_rows():
    rng = np.random.default_rng(0)
    batches = [  # their means differ, which adds to the variance of all rows
        rng.normal(mean, 2, (n, 4)).astype(np.float32) * [1, 10, 0.1, 100]
        for mean, n in ((3, 5), (0, 64), (6, 17))
    ]
    moments = ppo.RunningMoments((4,))
    for batch in batches:
        moments.update(torch.tensor(batch, dtype=torch.float32))
    rows = np.concatenate(batches)
    assert moments.count == len(rows)
    np.testing.assert_allclose(moments.mean, rows.mean(0), rtol=1e-4)
    np.testing.assert_allclose(moments.var, rows.var(0), rtol=1e-4)
    x = torch.tensor(rows, dtype=torch.float32)
    np.testing.assert_allclose(moments.scale(x / 100), rows / 100 / rows.std(0), rtol=1e-3)
    assert moments.scale(x * 1e6).abs().max() == 10
    far = torch.tensor(rng.normal(3_000, 1, (500, 1)), dtype=torch.float32)
    moments = ppo.RunningMoments((1,))
    moments.update(far)
    np.testing.assert_allclose(moments.var, far.double().var(0, correction=0), rtol=1e-3)


@pytest.mark.parametrize("num_steps, updates", [(60, 1), (10, 6)])
def test_sums_for_the_reward_scale_start_at_each_episode(num_steps, updates, monkeypatch):
    """Rewards are scaled by the deviation of discounted sums, which restart at time limits too.

    Within an episode they go on from one batch to the next.
    """
    log = FakeLogger(updates)
    monkeypatch.setattr(ppo, "Logger", log)
    ppo.train(ppo.Args(env_id="scripted:Scripted-v0", num_envs=1, num_steps=num_steps,
                       num_minibatches=1,
                       total_timesteps=10_000, gamma=0.9, norm_obs=False))
    sums, count = [], 0
    for episode in itertools.count():
        total = 0.0
        for t in range(LENGTHS[episode % 8]):
            total, count = 0.9 * total + rewarded(episode, t), count + 1
            sums.append(total)
        count += 1  # the step that only resets
        if count > 80:
            break
    moments = log.parts["reward_moments"]
    rows = int(moments.count.item())
    assert rows == 45
    assert moments.var.item() == pytest.approx(np.var(sums[:rows]), rel=1e-4)


def test_gae_gets_scaled_rewards_and_the_agent_normalized_observations(monkeypatch):
    """Earlier batches normalize each batch; a rollout before training normalizes the first."""
    caught, played, log = [], [], FakeLogger(updates=3)
    collect, gae = ppo.collect, ppo.gae

    def watch(reward, value, next_value, *rest):
        agent, moments = log.parts["agent"], log.parts["reward_moments"]
        raw = played[-1][2]
        seen = torch.cat([rollout["obs"][rollout["valid"]] for *_, rollout in played[:-1]])
        normalized = (raw["obs"] - seen.mean(0)) / seen.std(0, correction=0)
        torch.testing.assert_close(value, agent.critic(normalized).squeeze(-1),
                                   atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(reward, (raw["reward"] / moments.var.sqrt()).clamp(-10, 10))
        caught.append(len(seen))
        return gae(reward, value, next_value, *rest)

    monkeypatch.setattr(ppo, "Logger", log)
    monkeypatch.setattr(ppo, "gae", watch)
    monkeypatch.setattr(ppo, "collect", lambda *a: (played.append(collect(*a)), played[-1])[1])
    monkeypatch.setattr(ppo, "update", lambda *args: {})
    with torch.no_grad():
        ppo.train(ppo.Args(env_id="scripted:Scripted-v0", num_envs=1, num_steps=60,
                           num_minibatches=1, total_timesteps=10_000))
    assert len(caught) == 3 and 30 < caught[0] < caught[1] < caught[2]
    # The first batch begins with new episodes.
    first = played[1][2]
    assert first["valid"][0].all() and any(
        np.allclose(first["obs"][0, 0], observed(episode, 0)) for episode in range(10, 40))


def test_the_log_has_raw_returns(monkeypatch):
    *_, returns = batch_of("scripted:Scripted-v0", 60, monkeypatch, norm_reward=True,
                           clip_reward=True)
    assert returns[0] == pytest.approx(sum(rewarded(0, t) for t in range(3)), abs=1e-5)


@pytest.mark.parametrize("norm_reward", [False, True])
def test_clipped_rewards_are_signs(norm_reward, monkeypatch):
    caught, gae = [], ppo.gae
    monkeypatch.setattr(ppo, "gae", lambda *args: (caught.append(args[0]), gae(*args))[1])
    batch_of("scripted:Scripted-v0", 60, monkeypatch, clip_reward=True, norm_reward=norm_reward)
    assert set(caught[0].unique().tolist()) == {-1.0, 0.0, 1.0}


# Evaluation


def saved_agent(folder, agent):
    torch.save({"agent": agent.state_dict()}, folder / "checkpoint.pt")
    return folder


def test_evaluation_plays_the_saved_agent(tmp_path, capsys, monkeypatch):
    """Whole first episodes, with the saved normalization and the most likely action."""
    envs, seen = make("scripted:Scripted-v0", 1), []
    agent = agent_for(envs, norm_obs=True)
    agent.obs_moments.mean += 3.0
    with torch.no_grad():
        agent.actor[-1].bias.copy_(torch.tensor([0.0, 0.2]))
    forward = ppo.Agent.forward
    monkeypatch.setattr(ppo.Agent, "forward", lambda self, obs: (
        seen.append((obs, self.obs_moments.mean.clone())), forward(self, obs))[1])
    actions, step = [], ppo.Envs.step
    monkeypatch.setattr(ppo.Envs, "step", lambda self, action: (
        actions.append(action), step(self, action))[1])
    args = ppo.Args(env_id="scripted:Scripted-v0", num_envs=3, eval_episodes=4)
    ppo.evaluate(args, saved_agent(tmp_path, agent))
    first, second = (sum(rewarded(e, t) for t in range(LENGTHS[e])) for e in (0, 1))
    assert f"mean return {(first + second) / 2:.1f} in 6 episodes" in capsys.readouterr().out
    assert len(seen) == 4 and all(mean.eq(3.0).all() for _, mean in seen)
    assert all(action.eq(1).all() for action in actions)


def test_evaluation_can_be_repeated_and_goes_on_with_new_episodes(tmp_path, monkeypatch):
    seeds, reset = [], ppo.Envs.reset
    monkeypatch.setattr(ppo.Envs, "reset", lambda self, seed=None: (
        seeds.append(seed), reset(self, seed))[1])
    agent = agent_for(make("scripted:Scripted-v0", 1))
    args = ppo.Args(env_id="scripted:Scripted-v0", num_envs=3, eval_episodes=4, norm_obs=False,
                    seed=7)
    ppo.evaluate(args, saved_agent(tmp_path, agent))
    assert len(seeds) == 3 and seeds[0] > 10**6 and seeds[1:] == [None, None]


def test_evaluation_counts_first_episodes_only(tmp_path, capsys, monkeypatch):
    clock = itertools.count(1)  # environment n ends with step n + 1, and goes on with rewards

    def step(self, action):
        done, no = torch.arange(4) < next(clock), torch.zeros(4, dtype=torch.bool)
        return torch.zeros(4, 2), torch.ones(4), done, no, no

    agent = agent_for(make("scripted:Scripted-v0", 1))
    monkeypatch.setattr(ppo.Envs, "step", step)
    args = ppo.Args(env_id="scripted:Scripted-v0", eval_episodes=4, norm_obs=False)
    ppo.evaluate(args, saved_agent(tmp_path, agent))
    assert "mean return 2.5 in 4 episodes" in capsys.readouterr().out


def test_environments_without_a_time_limit_get_one():
    class Never(scripted.Scripted):
        def step(self, action):
            return *super().step(action)[:2], False, False, {}

    gym.register("Never-v0", Never)
    limits = [env for env in wrappers(ppo.make_envs(ppo.Args(env_id="Never-v0"), 1, None).envs[0])
              if isinstance(env, gym.wrappers.TimeLimit)]
    assert len(limits) == 1 and limits[0]._max_episode_steps == 30_000
    limits = [env for env in wrappers(ppo.make_envs(ppo.Args(env_id="Acrobot-v1"), 1, None).envs[0])
              if isinstance(env, gym.wrappers.TimeLimit)]
    assert len(limits) == 1 and limits[0]._max_episode_steps == 500


def wrappers(env):
    while isinstance(env, gym.Wrapper):
        yield env
        env = env.env


@pytest.mark.parametrize("episodes", [0, 2])
def test_video_of_an_episode(episodes, tmp_path, monkeypatch):
    pytest.importorskip("moviepy")
    pytest.importorskip("pygame")
    made, make_envs = [], ppo.make_envs
    monkeypatch.setattr(ppo, "make_envs", lambda *args: (made.append(args), make_envs(*args))[1])
    ppo.train(ppo.Args(total_timesteps=4_096, run_dir=str(tmp_path), video=True,
                       eval_episodes=episodes))
    (video,) = (tmp_path / "video").glob("*.mp4")
    assert video.stat().st_size > 1_000
    _, (_, num_envs, folder) = made
    assert num_envs == 1 and folder == str(tmp_path / "video")


# Atari


@pytest.fixture
def game(monkeypatch):
    """Breakout with fixed starts and no repeated actions."""
    pytest.importorskip("ale_py")
    pytest.importorskip("cv2")
    spec = gym.spec("ALE/Breakout-v5")
    gym.register("ALE/Fixed-v5", spec.entry_point, vector_entry_point=spec.vector_entry_point,
                 kwargs={"game": "breakout", "repeat_action_probability": 0.0, "noop_max": 0})
    return "ALE/Fixed-v5"


def test_native_atari_equals_the_wrappers_frame_by_frame(game, monkeypatch):
    envs = make(game, 1)
    assert envs.obs_shape == (4, 84, 84)
    preprocess = functools.partial(gym.wrappers.AtariPreprocessing, noop_max=0)
    monkeypatch.setattr(gym.wrappers, "AtariPreprocessing", preprocess)  # no random start
    one = ppo.wrap_env(gym.make(
        "ALE/Breakout-v5", frameskip=1, repeat_action_probability=0.0), None)
    obs, (expected, info) = envs.reset(1), one.reset(seed=1)
    lives, rewards, games, over = info["lives"], [], 0, False
    rng = np.random.default_rng(0)
    for step in range(900):
        np.testing.assert_array_equal(obs[0].numpy(), expected, err_msg=f"step {step}")
        action = 1 if step % 20 == 0 else int(rng.integers(4))
        obs, reward, terminated, truncated, life_lost = envs.step(torch.tensor([[action]]))
        if over:  # this step resets the native environment
            expected, info = one.reset()
            lives, over = info["lives"], False
            assert reward.item() == 0 and not life_lost.item() and not terminated.item()
            continue
        expected, true_reward, over, _, info = one.step(action)
        rewards.append(true_reward)
        assert reward.item() == true_reward, "raw, not clipped"
        assert life_lost.item() == (info["lives"] < lives)
        assert terminated.item() == over and not truncated.item()
        lives, games = info["lives"], games + over
    assert games >= 2 and sum(rewards) > 0


@pytest.mark.parametrize("async_envs", [False, True])
def test_atari_native_and_wrapped(async_envs):
    """Both kinds have raw rewards, images and lives."""
    pytest.importorskip("ale_py")
    pytest.importorskip("cv2")
    envs = make("ALE/SpaceInvaders-v5", 2, async_envs=async_envs)
    obs = envs.reset(0)
    assert obs.shape == (2, 4, 84, 84) and obs.dtype == torch.uint8
    rng, rewards, lost = np.random.default_rng(0), [], []
    for _ in range(400):
        _, reward, *_, life_lost = envs.step(torch.tensor(rng.integers(6, size=(2, 1))))
        rewards.append(reward)
        lost.append(life_lost)
    envs.close()
    assert torch.stack(rewards).max() >= 5, "an invader is worth 5 points or more"
    assert 1 <= torch.stack(lost).sum() <= 8


def test_wrapped_atari_games_have_random_starts():
    pytest.importorskip("ale_py")
    pytest.importorskip("cv2")
    env = ppo.make_envs(ppo.Args(env_id="ALE/Pong-v5"), 1, "nowhere").envs[0]
    (preprocessing,) = (each for each in wrappers(env)
                        if isinstance(each, gym.wrappers.AtariPreprocessing))
    assert preprocessing.noop_max == 30


def test_atari_clips_rewards_by_default():
    pytest.importorskip("ale_py")
    args = ppo.default_args("ALE/Pong-v5")
    assert args.clip_reward and args.num_minibatches == 4


# Further cases


@pytest.mark.parametrize("env", ["Sees-last-v0", "Does-box-v0"])
def test_every_parameter_learns(env, monkeypatch):
    """Also the CNN of images and the deviation of Box actions."""
    log, before, update = FakeLogger(), [], ppo.update
    monkeypatch.setattr(ppo, "Logger", log)
    monkeypatch.setattr(ppo, "update", lambda agent, *rest: (before.extend(
        param.detach().clone() for param in agent.parameters()), update(agent, *rest))[1])
    ppo.train(ppo.Args(env_id=f"scripted:{env}", **SMALL))
    for old, (name, new) in zip(before, log.parts["agent"].named_parameters(), strict=True):
        assert not torch.equal(old, new), name


def test_evaluation_goes_on_after_a_lost_life(tmp_path, capsys, monkeypatch):
    clock, no = itertools.count(1), torch.tensor([False])

    def step(self, action):
        t = next(clock)
        return torch.zeros(1, 2), torch.ones(1), torch.tensor([t == 3]), no, torch.tensor([t == 1])

    agent = agent_for(make("scripted:Scripted-v0", 1))
    monkeypatch.setattr(ppo.Envs, "step", step)
    args = ppo.Args(env_id="scripted:Scripted-v0", eval_episodes=1, norm_obs=False)
    ppo.evaluate(args, saved_agent(tmp_path, agent))
    assert "mean return 3.0 in 1 episodes" in capsys.readouterr().out


def test_rounding_errors_of_a_constant_component_stay_small():
    moments = ppo.RunningMoments((1,))
    moments.update(torch.full((64, 1), 0.1))
    assert moments.scale(torch.tensor([1e-7])).abs() < 0.01


def test_scaled_rewards_are_clipped(monkeypatch):
    """One reward in about 400 is not 0: almost 20 standard deviations."""
    monkeypatch.setattr(scripted, "rewarded", lambda episode, t: 1e3 * (episode == 5))
    caught, gae = [], ppo.gae
    monkeypatch.setattr(ppo, "gae", lambda *args: (caught.append(args[0]), gae(*args))[1])
    batch_of("scripted:Scripted-v0", 500, monkeypatch, norm_reward=True)
    assert caught[0].max() == 10


def test_images_are_copied():
    envs = make("scripted:Sees-first-v0", 2)
    envs.reset(0)
    image, no = np.zeros((2, 3, 40, 36), np.uint8), np.zeros(2, bool)
    envs.env.step = lambda action: (image, np.zeros(2), no, no, {})
    obs, *_ = envs.step(torch.zeros(2, 1))
    image[:] = 1
    assert not obs.any()


def test_returns_are_logged_in_the_order_of_time(monkeypatch):
    """Two equal environments end their episodes together."""
    *_, returns = batch_of("scripted:Scripted-v0", 60, monkeypatch, num_envs=2)
    assert returns[0::2] == returns[1::2] and len(set(returns)) > 2


def test_an_evaluation_prints_the_mean(tmp_path, capsys, monkeypatch):
    """Of 1, 3 and 6: no other average."""
    clock, no = itertools.count(1), torch.zeros(3, dtype=torch.bool)

    def step(self, action):
        t = next(clock)
        return torch.zeros(3, 2), torch.full((3,), float(t)), torch.arange(3) < t, no, no

    agent = agent_for(make("scripted:Scripted-v0", 1))
    monkeypatch.setattr(ppo.Envs, "step", step)
    args = ppo.Args(env_id="scripted:Scripted-v0", eval_episodes=3, norm_obs=False)
    ppo.evaluate(args, saved_agent(tmp_path, agent))
    assert "mean return 3.3 in 3 episodes" in capsys.readouterr().out


def test_unbounded_actions_of_half_precision_are_not_scaled(monkeypatch):
    space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float16)
    monkeypatch.setitem(scripted.SPACES, "unbounded", space)
    envs = make("scripted:Does-unbounded-v0", 1)
    assert envs.to_env_action(torch.tensor([[1.25]])).tolist() == [[1.25]]


def test_lives_are_copied():
    envs = make("scripted:Scripted-v0", 1)
    envs.reset(0)
    lives, no = np.array([3]), np.zeros(1, bool)
    envs.is_atari, envs.lives = True, np.array([3])
    envs.env.step = lambda action: (np.zeros((1, 2), np.float32), np.zeros(1), no, no,
                                    {"lives": lives})
    assert not envs.step(torch.zeros(1, 1))[-1].any()
    lives[:] = 2
    assert envs.step(torch.zeros(1, 1))[-1].all()
