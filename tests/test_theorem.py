"""What docs/ derive, on random problems small enough to be solved: numbers are those of the pages.

What is checked elsewhere: the scripts' own gradients (test_reinforce, test_actor_critic, test_ppo),
GRPO's (6) and (7) (test_grpo), DPO's gradient and optimum on a table (test_dpo).
"""

import itertools

import pytest
import torch

STATES, ACTIONS, HORIZON, GAMMA = 4, 3, 3, 0.9
EYE = torch.eye(STATES, dtype=torch.float64)


@pytest.fixture(params=range(3))
def problem(request):
    """Logits (S, A) that want a gradient, transitions (S, A, S) that sum to 1, rewards (S, A)."""
    draw = torch.Generator().manual_seed(request.param)
    shape, kind = (STATES, ACTIONS), {"generator": draw, "dtype": torch.float64}
    transition = torch.rand(*shape, STATES, **kind)
    transition = transition / transition.sum(-1, keepdim=True)
    return torch.randn(shape, **kind).requires_grad_(), transition, torch.randn(shape, **kind)


def other_policy(seed=9):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(STATES, ACTIONS, generator=draw, dtype=torch.float64).softmax(-1)


def solve(logits, transition, reward, gamma):
    """π (S, A), v (S,), q (S, A) and the chain under π (S, S), all differentiable in the logits."""
    policy = logits.softmax(-1)
    chain = torch.einsum("sa,sax->sx", policy, transition)
    value = torch.linalg.solve(EYE - gamma * chain, (policy * reward).sum(-1))
    return policy, value, reward + gamma * transition @ value, chain


def gradient(number, logits):
    return torch.autograd.grad(number, logits, retain_graph=True)[0]


def jacobian(numbers, logits):
    return torch.stack([gradient(number, logits) for number in numbers])


def theorem(weight, policy, q, logits):
    """Σ_s weight(s) Σ_a q(s, a) ∇π(a|s), where q counts as a number."""
    return gradient((weight.detach()[:, None] * q.detach() * policy).sum(), logits)


def visits(chain, gamma):
    """How often each state is visited from state 0 on, a visit at time t counting γ^t."""
    return torch.linalg.solve(EYE - gamma * chain.detach().T, EYE[0])


# The theorem


def test_recursion_of_the_gradient(problem):
    """(4), (5): for every state, with what is left after three steps, and without the rest."""
    logits, transition, reward = problem
    policy, value, q, chain = solve(logits, 0.9 * transition, reward, 1.0)
    exact = jacobian(value, logits)  # (S, S, A)
    phi = jacobian((policy * q.detach()).sum(-1), logits)
    torch.testing.assert_close(phi + torch.tensordot(chain, exact, 1), exact)
    powers = [torch.linalg.matrix_power(chain, k) for k in range(4)]
    unrolled = sum(torch.tensordot(power, phi, 1) for power in powers[:3])
    torch.testing.assert_close(unrolled + torch.tensordot(powers[3], exact, 1), exact)
    assert (unrolled - exact).abs().max() > 0.01


@pytest.mark.parametrize("gamma", [1.0, GAMMA])
def test_gradient_of_episodes(problem, gamma):
    """(6) to (8): a tenth of each transition ends; visits at time t count γ^t."""
    logits, transition, reward = problem
    policy, value, q, chain = solve(logits, 0.9 * transition, reward, gamma)
    exact = gradient(value[0], logits)
    count, now = torch.zeros(STATES, dtype=torch.float64), EYE[0]
    for k in range(1000):
        count, now = count + gamma**k * now, now @ chain.detach()
    torch.testing.assert_close(theorem(count, policy, q, logits), exact)
    torch.testing.assert_close(count, visits(chain, gamma))
    if gamma == 1.0:
        length = torch.linalg.solve(EYE - chain, torch.ones(STATES, dtype=torch.float64))[0]
        assert count.sum().item() == pytest.approx(length.item()), "(7): the mean length"
        assert length.item() == pytest.approx(10)


def test_direction_without_the_discount_factor_differs(problem):
    logits, transition, reward = problem
    policy, value, q, chain = solve(logits, 0.9 * transition, reward, 0.5)
    exact = gradient(value[0], logits).flatten()
    dropped = theorem(visits(chain, 1.0), policy, q, logits).flatten()
    assert torch.cosine_similarity(exact, dropped, dim=0) < 0.99


def test_baseline_changes_the_variance_and_not_the_mean(problem):
    """(9) to (11), and that v makes less noise than a number far from it."""
    logits, transition, reward = problem
    policy, value, q, _ = solve(logits, 0.9 * transition, reward, 1.0)
    score = EYE[:ACTIONS, :ACTIONS] - policy.detach()[0]  # ∇log π of each action, in its logits

    def estimate(baseline):
        sample = (q.detach()[0] - baseline)[:, None] * score  # (A, A): a row for each action
        mean = policy.detach()[0] @ sample
        return mean, (policy.detach()[0] @ (sample - mean).square()).sum()

    plain, noise = estimate(100.0)
    with_value, less = estimate(value.detach()[0])
    torch.testing.assert_close(plain, with_value)
    torch.testing.assert_close(plain, theorem(EYE[0], policy, q, logits)[0])
    assert less < noise


class Paths:
    """All trajectories of three steps from state 0: a column for each, a row for each step."""

    def __init__(self, problem, behaviour):
        logits, transition, reward = problem
        moves = list(itertools.product(range(ACTIONS), range(STATES)))
        plan = torch.tensor(list(itertools.product(moves, repeat=HORIZON)))  # (P, T, 2)
        action, state = plan[..., 0].T, torch.cat([torch.zeros(1, len(plan)).long(),
                                                   plan[..., 1].T])
        self.state, here = state[:-1], (state[:-1], action)
        self.reward, self.logprob = reward[here], logits.log_softmax(-1)[here]
        self.ratio = self.logprob.detach().exp() / behaviour[here]
        self.prob = (behaviour[here] * transition[(*here, state[1:])]).prod(0)
        self.discount = GAMMA ** torch.arange(HORIZON, dtype=torch.float64)[:, None]
        self.logits = logits

    def mean(self, weight):
        """E_μ[Σ_t weight_t ∇log π_t], weight (T, P)."""
        return gradient((self.prob * weight.detach() * self.logprob).sum(), self.logits)

    def to_go(self, reward):
        """Σ_{k ≥ t} γ^{k−t} reward_k."""
        return (self.discount * reward).flip(0).cumsum(0).flip(0) / self.discount


def values(policy, transition, reward):
    """v (T+1, S) and q (T, S, A) with t steps gone, under the policy."""
    value, q = [torch.zeros(STATES, dtype=torch.float64)], []
    for _ in range(HORIZON):
        q.insert(0, reward + GAMMA * transition @ value[0])
        value.insert(0, (policy * q[0]).sum(-1))
    return value, q


def test_earlier_rewards_do_not_change_the_mean(problem):
    """REINFORCE (1), (2): G_t and G_0 have the same mean, though not the same noise."""
    logits, transition, reward = problem
    paths = Paths(problem, logits.softmax(-1).detach())
    exact = gradient(values(logits.softmax(-1), transition, reward)[0][0][0], logits)
    returns = paths.to_go(paths.reward)
    torch.testing.assert_close(paths.mean(paths.discount * returns), exact)
    torch.testing.assert_close(paths.mean(returns[:1].expand_as(returns)), exact)
    before = (paths.discount * paths.reward).cumsum(0) - paths.discount * paths.reward
    torch.testing.assert_close(paths.mean(before), torch.zeros_like(exact))


def test_gradient_from_off_policy_actions(problem):
    """(12) to (14): the product of ratios is exact; one ratio leaves states and values of μ."""
    logits, transition, reward = problem
    policy, behaviour = logits.softmax(-1), other_policy()
    paths, exact = Paths(problem, behaviour), values(policy, transition, reward)[0][0][0]
    product = paths.ratio.cumprod(0)
    total = (paths.prob * (paths.discount * product * paths.reward).sum(0)).sum()
    torch.testing.assert_close(total, exact.detach())
    exact = gradient(exact, logits)
    right = paths.mean(paths.discount * paths.to_go(product * paths.reward))
    torch.testing.assert_close(right, exact)
    one = paths.mean(paths.discount * paths.ratio * paths.to_go(paths.reward))
    assert (one - exact).abs().max() > 0.02
    chain, now, expected = torch.einsum("sa,sax->sx", behaviour, transition), EYE[0], 0
    for t, q in enumerate(values(behaviour, transition, reward)[1]):
        expected, now = expected + theorem(GAMMA**t * now, policy, q, logits), now @ chain
    torch.testing.assert_close(one, expected)


def continuing(logits, transition, reward):
    """π, its chain, stationary distribution, mean reward, and v with the mean 0."""
    policy = logits.softmax(-1)
    chain = torch.einsum("sa,sax->sx", policy, transition)
    ones = torch.ones(STATES, STATES, dtype=torch.float64)
    stationary = torch.linalg.solve((EYE - chain + ones).T, ones[0])
    mean = (stationary[:, None] * policy * reward).sum()
    value = torch.linalg.solve(EYE - chain + stationary, (policy * reward).sum(-1) - mean)
    return policy, chain, stationary, mean, value


def test_gradient_of_a_continuing_task(problem):
    """(15) to (18): the mean reward, by the stationary distribution and differential values."""
    logits, transition, reward = problem
    policy, chain, stationary, mean, value = continuing(logits, transition, reward)
    torch.testing.assert_close(stationary @ chain, stationary)
    q = reward - mean + transition @ value
    torch.testing.assert_close((policy * q).sum(-1), value)  # (16)
    exact, slope = gradient(mean, logits), jacobian(value, logits)
    phi = jacobian((policy * q.detach()).sum(-1), logits)
    torch.testing.assert_close(phi - exact + torch.tensordot(chain, slope, 1), slope)  # (17)
    torch.testing.assert_close(theorem(stationary, policy, q, logits), exact)
    torch.testing.assert_close(theorem(stationary, policy, q + 5, logits), exact)
    behaviour = torch.einsum("sa,sax->sx", other_policy(), transition)
    elsewhere = torch.linalg.matrix_power(behaviour, 100)[0]
    wrong = theorem(elsewhere, policy, q, logits)
    assert (wrong - exact).abs().max() > 1e-3, "with the states of another policy it is none"


def test_mean_td_error_is_the_advantage(problem):
    """(19), and (20): by how much it is wrong where the value is."""
    logits, transition, reward = problem
    _, value, q, _ = solve(logits, 0.9 * transition, reward, 0.95)
    delta = reward + 0.95 * (0.9 * transition) @ value - value[:, None]
    torch.testing.assert_close(delta, q - value[:, None])
    wrong = value + torch.tensor([1.0, -2.0, 0.5, 0.0])
    biased = reward + 0.95 * (0.9 * transition) @ wrong - wrong[:, None]
    bias = 0.95 * (0.9 * transition) @ (wrong - value)
    torch.testing.assert_close(biased, q - wrong[:, None] + bias)


def test_sums_of_td_errors():
    """(21): λ = 0 is one step, λ = 1 the return less the value."""
    import ppo

    reward, value = torch.randn(7, 1), torch.randn(8, 1)
    ends = torch.zeros(7, 1, dtype=torch.bool)
    ends[-1] = True
    inputs = reward, value[:-1], value[1:], ends, ends, 0.9
    one_step = reward + 0.9 * value[1:] * ~ends - value[:-1]
    torch.testing.assert_close(ppo.gae(*inputs, 0.0), one_step)
    returns = [sum(0.9 ** (k - t) * reward[k] for k in range(t, 7)) for t in range(7)]
    torch.testing.assert_close(ppo.gae(*inputs, 1.0), torch.stack(returns) - value[:-1])


# The algorithms


def test_the_best_baseline():
    """Baseline (3), (4): the variance for one parameter, smallest at E[G g²] / E[g²]."""
    draw = torch.Generator().manual_seed(0)
    prob = torch.rand(5, generator=draw, dtype=torch.float64).softmax(-1)
    score = torch.randn(5, generator=draw, dtype=torch.float64)
    score = score - prob @ score  # E[∇log π] = 0
    returns = torch.randn(5, generator=draw, dtype=torch.float64) + 3

    def variance(baseline):
        sample = (returns - baseline) * score
        return prob @ (sample - prob @ sample).square()

    for b in (0.0, 1.0, -4.0):
        formula = prob @ ((returns - b) * score).square() - (prob @ (returns * score)).square()
        torch.testing.assert_close(variance(b), formula)
    best = (prob @ (returns * score.square())) / (prob @ score.square())
    assert all(variance(best) < variance(best + shift) for shift in (-0.1, 0.1))
    assert variance(best) < variance(prob @ returns) < variance(0.0)


def test_off_policy_baseline_needs_the_ratios(problem):
    """Baseline (7): with the product up to its own step the mean is zero, without it is not."""
    paths = Paths(problem, other_policy())
    baseline = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)[paths.state]
    weight = paths.discount * baseline
    zero = paths.mean(paths.ratio.cumprod(0) * weight)
    torch.testing.assert_close(zero, torch.zeros_like(zero))
    assert paths.mean(weight).abs().max() > 0.01


def test_the_difference_between_two_policies(problem):
    """PPO (1), and that (2) with γ^t has ∇J at π_old for its gradient, and no further away."""
    logits, transition, reward = problem
    policy, value, _, chain = solve(logits, transition, reward, GAMMA)
    _, old_value, old_q, old_chain = solve(other_policy().log(), transition, reward, GAMMA)
    advantage = old_q - old_value[:, None]
    gain = (visits(chain, GAMMA)[:, None] * policy * advantage).sum()
    torch.testing.assert_close(gain, value[0] - old_value[0])
    surrogate = (visits(old_chain, GAMMA)[:, None] * policy * advantage).sum()
    assert (surrogate - gain).abs() > 1e-3
    here = other_policy().log().requires_grad_()
    near, near_value, *_ = solve(here, transition, reward, GAMMA)
    surrogate = (visits(old_chain, GAMMA)[:, None] * near * advantage).sum()
    torch.testing.assert_close(gradient(surrogate, here), gradient(near_value[0], here))


def test_the_clipped_objective_is_a_lower_bound():
    """PPO (3): row by row at most ρ Â, and less for some."""
    import ppo

    draw = torch.Generator().manual_seed(0)
    logprob, advantage = (torch.randn(1000, generator=draw) for _ in range(2))
    plain = logprob.exp() * advantage
    clipped = torch.stack([-ppo.ppo_loss(one[None], torch.zeros(1), a[None], 0.2)
                           for one, a in zip(logprob, advantage)])
    assert (clipped <= plain + 1e-6).all() and (clipped < plain - 0.1).any()


def group_gradient(logits, reward, size, scale):
    """E[(1/G) Σ_i Â_i ∇log π(o_i)] over all groups of answers to one question."""
    import grpo

    logprob = logits.log_softmax(-1)
    groups = torch.tensor(list(itertools.product(range(len(logits)), repeat=size)))
    prob = logprob.detach().exp()[groups].prod(1, keepdim=True)
    advantage = grpo.group_advantage(reward[groups], scale)
    return gradient((prob * advantage * logprob[groups]).sum() / size, logits)


def test_group_mean_is_a_baseline_up_to_a_factor():
    """GRPO (1), (2): leaving one out is exact; the mean of all gives (G − 1) / G of it."""
    logits = torch.tensor([0.3, -1.0, 0.7], dtype=torch.float64, requires_grad=True)
    reward = torch.tensor([1.0, 0.0, 0.4], dtype=torch.float64)
    exact = gradient(logits.softmax(-1) @ reward, logits)
    torch.testing.assert_close(group_gradient(logits, reward, 4, "leave-one-out"), exact)
    torch.testing.assert_close(group_gradient(logits, reward, 4, "none"), exact * 3 / 4)


def test_deviation_raises_the_weight_of_easy_and_hard_questions():
    """GRPO (3): beside the gradient without it, more where the answer is nearly always the same."""
    gains = []
    for right in (0.05, 0.5, 0.95):
        logits = torch.tensor([right, 1 - right], dtype=torch.float64).log().requires_grad_()
        reward = torch.tensor([1.0, 0.0], dtype=torch.float64)
        pair = [group_gradient(logits, reward, 8, scale)[0] for scale in ("group", "none")]
        gains.append((pair[0] / pair[1]).item())
    assert min(gains[0], gains[2]) > 1.2 * gains[1]


def test_the_best_policy_in_closed_form():
    """DPO (2) to (4): the identity for any policy, the optimum, and the reward it gives back."""
    import dpo

    draw = torch.Generator().manual_seed(0)
    kind = {"generator": draw, "dtype": torch.float64}
    ref, reward, beta = torch.randn(6, **kind).log_softmax(-1), torch.randn(6, **kind), 0.7
    log_z = (ref + reward / beta).logsumexp(-1)
    best = dpo.best_policy(ref, reward, beta)

    def objective(logprob):
        return (logprob.exp() * (reward - beta * (logprob - ref))).sum()

    for _ in range(20):
        logprob = torch.randn(6, **kind).log_softmax(-1)
        distance = (logprob.exp() * (logprob - best)).sum()
        torch.testing.assert_close(objective(logprob), beta * (log_z - distance))
        assert objective(logprob) < objective(best)
    torch.testing.assert_close(beta * (best - ref) + beta * log_z, reward)
