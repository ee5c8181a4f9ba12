"""Environments with known values and best actions, registered as "toys:Name-v0"."""

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete, MultiBinary, Text


class Toy(gym.Env):
    """The observation is one number, and there are two actions. Subclasses define the rest."""

    observation_space, action_space = Box(-100, 100, (1,), np.float32), Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.start = 0, float(self.np_random.choice([-1.0, 1.0]))
        return self.see(0.0), {}

    def see(self, number):
        return np.array([number], dtype=np.float32)


class Constant(Toy):
    """One step with reward 1: V = 1."""

    def step(self, action):
        return self.see(0), 1.0, True, False, {}


class Observed(Toy):
    """The reward is the observation, -1 or 1: V(s) = s."""

    def reset(self, **kwargs):
        super().reset(**kwargs)
        return self.see(self.start), {}

    def step(self, action):
        return self.see(0), self.start, True, False, {}


class Delayed(Toy):
    """Two steps, reward 1 on the second: V(0) = gamma, V(1) = 1."""

    def step(self, action):
        self.t += 1
        return self.see(self.t), float(self.t == 2), self.t == 2, False, {}


class Chosen(Toy):
    """One step. Action 1 has reward 1, action 0 has -1."""

    def step(self, action):
        return self.see(0), 2.0 * action - 1, True, False, {}


class Matching(Toy):
    """One step. The reward is 1 if the action's sign is the observation's, otherwise -1."""

    def reset(self, **kwargs):
        super().reset(**kwargs)
        return self.see(self.start), {}

    def step(self, action):
        return self.see(0), self.start * (2.0 * action - 1), True, False, {}


class Endless(Toy):
    """Reward 1 in every step, and only time limits: V = 1 / (1 - gamma)."""

    def step(self, action):
        return self.see(0), 1.0, False, False, {}


class Bait(Toy):
    """An episode of one step from 0 is worth 1, from 1 it is worth 0, and all end in 1.

    So V(1) = 0. Who learns from reset-only rows takes the step from a last observation 1 to the
    next episode's start for a transition, and finds V(1) > 0.
    """

    def reset(self, **kwargs):
        super().reset(**kwargs)
        return self.see(float(self.start > 0)), {}

    def step(self, action):
        return self.see(1), float(self.start < 0), True, False, {}


class Target(Toy):
    """One step with a Box action. The reward is minus the squared distance to 0.5."""

    action_space = Box(-1, 1, (1,), np.float32)

    def step(self, action):
        return self.see(0), -float((action[0] - 0.5) ** 2), True, False, {}


class FarTarget(Toy):
    """The same with actions from 16 to 30. The best one is 26.5."""

    action_space = Box(16, 30, (1,), np.float32)

    def step(self, action):
        return self.see(0), -float(((action[0] - 23) / 7 - 0.5) ** 2), True, False, {}


class BrokenReward(Toy):
    """From step 300 on, the reward is NaN."""

    steps = 0

    def step(self, action):
        BrokenReward.steps += 1
        self.t += 1
        return (
            self.see(0),
            float("nan") if BrokenReward.steps > 300 else 1.0,
            self.t == 5,
            False,
            {},
        )


class BrokenSensor(Toy):
    """From step 300 on, the observation is infinite."""

    steps = 0

    def step(self, action):
        BrokenSensor.steps += 1
        self.t += 1
        return self.see(np.inf if BrokenSensor.steps > 300 else 0), 1.0, self.t == 5, False, {}


class BrokenObservation(Toy):
    """The observation is infinite from the start."""

    def step(self, action):
        return self.see(np.inf), 0.0, True, False, {}


class Switches(Toy):
    """MultiBinary actions of three bits, for ppo.py only. The first and the last bit are best."""

    action_space = MultiBinary(3)

    def step(self, action):
        return self.see(0), float((action == [1, 0, 1]).mean()), True, False, {}


class Speaking(Toy):
    """An action space that no script supports."""

    action_space = Text(5)


class Reading(Toy):
    """An observation space that no script supports."""

    observation_space = Text(5)


for kind in (
    Constant,
    Observed,
    Delayed,
    Chosen,
    Matching,
    Bait,
    Target,
    FarTarget,
    BrokenReward,
    BrokenSensor,
    BrokenObservation,
    Switches,
    Speaking,
    Reading,
):
    gym.register(f"{kind.__name__}-v0", kind)
gym.register("Endless-v0", Endless, max_episode_steps=10)
