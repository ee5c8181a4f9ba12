"""Environments with fixed steps, single and in batches, for test_ppo_envs.py."""

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Text, Tuple
from gymnasium.vector import SyncVectorEnv

LENGTHS = [3, 1, 5, 2, 4, 1, 1, 6]  # of the episodes of Scripted, repeated


def observed(episode, t):
    """Two numbers that differ in every step."""
    return np.array([np.sin(1.7 * episode + t), np.cos(episode + 2.3 * t)], dtype=np.float32)


def rewarded(episode, t):
    """Return the reward of the step from observation t."""
    return float(np.sin(5.1 * episode + 3.7 * t))


class Scripted(gym.Env):
    """Actions change nothing. Even episodes terminate, odd ones meet a time limit."""

    observation_space, action_space = Box(-1, 1, (2,), np.float32), Discrete(2)
    episode = -1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return observed(self.episode, 0), {}

    def step(self, action):
        reward, self.t = rewarded(self.episode, self.t), self.t + 1
        end = self.t == LENGTHS[self.episode % len(LENGTHS)]
        even = self.episode % 2 == 0
        return observed(self.episode, self.t), reward, end and even, end and not even, {}


class Garbage(SyncVectorEnv):
    """Scripted with rewards in reset-only steps, which must have no effect."""

    amount = 0.0

    def step(self, actions):
        reset_only = self._autoreset_envs.copy()
        obs, reward, *rest = super().step(actions)
        return obs, np.where(reset_only, self.amount, reward), *rest


class Spaces(gym.Env):
    """Episodes of five steps with the spaces in kwargs. Checks each action."""

    def __init__(self, obs, action):
        self.observation_space, self.action_space = SPACES[obs], SPACES[action]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.t = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action), (self.action_space, action)
        self.t += 1
        return self.observation_space.sample(), 1.0, self.t == 5, False, {}


SPACES = {
    "discrete": Discrete(3),
    "from5": Discrete(3, start=5),
    "multi": MultiDiscrete([2, 5, 3]),
    "grid": MultiDiscrete([[2, 3], [4, 2]]),
    "multifrom": MultiDiscrete([2, 3], start=[1, -4]),
    "binary": MultiBinary(4),
    "switches": MultiBinary([2, 2]),
    "box": Box(-1, 1, (2,), np.float32),
    "table": Box(-2, 2, (2, 3), np.float32),
    "whole": Box(0, 20, (3,), np.int64),
    "dict": Dict({"a": Box(-1, 1, (2, 2), np.float32), "b": Discrete(3), "c": MultiBinary(2)}),
    "text": Dict({"a": Box(-1, 1, (2,), np.float32), "said": Text(4)}),
    "nested": Dict({"in": Dict({"a": Box(-1, 1, (2,), np.float32), "said": Text(4)}),
                    "n": Discrete(3)}),
    "mixed": Dict({"a": Box(-1, 1, (2,), np.float32), "pair": Tuple([Discrete(2), Text(4)])}),
    "picture": Dict({"image": Box(0, 255, (40, 36, 3), np.uint8), "said": Text(4)}),
    "both": Dict({"image": Box(0, 255, (40, 36, 3), np.uint8), "a": Box(-1, 1, (2,), np.float32)}),
    "tuple": Tuple([Discrete(2), MultiDiscrete([2, 3]), Box(-1, 1, (1,), np.float32)]),
    "first": Box(0, 255, (3, 40, 36), np.uint8),
    "last": Box(0, 255, (40, 36, 3), np.uint8),
    "stack": Box(0, 255, (4, 40, 36, 3), np.uint8),
    "gray": Box(0, 255, (40, 36), np.uint8),
    "tiny": Box(0, 255, (7, 7, 3), np.uint8),
    "board": Box(0, 3, (40, 40), np.uint8),
    "floats": Box(0, 1, (40, 36, 3), np.float32),
    "far": Box(16, 30, (2,), np.float32),
    "fine": Box(-0.1, 0.1, (2,), np.float64),
    "unbounded": Box(-np.inf, np.inf, (2,), np.float32),
    "number": Box(-1, 1, (), np.float32),
    "sides": Box(np.float32([-1, 0, -np.inf, -1e7]), np.float32([1, 4, 1, 2])),
    "deep": Box(0, 255, (40, 36, 12), np.uint8),
}
for name in SPACES:
    gym.register(f"Sees-{name}-v0", Spaces, kwargs={"obs": name, "action": "discrete"})
    gym.register(f"Does-{name}-v0", Spaces, kwargs={"obs": "box", "action": name})
gym.register("Drives-v0", Spaces, kwargs={"obs": "last", "action": "box"})
gym.register("Scripted-v0", Scripted)
gym.register(
    "Garbage-v0", Scripted, vector_entry_point=lambda num_envs: Garbage([Scripted] * num_envs)
)
