"""The numbered statements of docs/theorem.md, on random problems small enough to be solved."""

import pytest
import torch

STATES, ACTIONS = 4, 3
EYE = torch.eye(STATES, dtype=torch.float64)


@pytest.fixture(params=range(3))
def problem(request):
    """Logits (S, A) that want a gradient, transitions (S, A, S) that sum to 1, rewards (S, A)."""
    draw = torch.Generator().manual_seed(request.param)
    shape, kind = (STATES, ACTIONS), {"generator": draw, "dtype": torch.float64}
    transition = torch.rand(*shape, STATES, **kind)
    transition = transition / transition.sum(-1, keepdim=True)
    return torch.randn(shape, **kind).requires_grad_(), transition, torch.randn(shape, **kind)


def solve(logits, transition, reward, gamma):
    """π (S, A), v (S,), q (S, A) and the chain under π (S, S), all differentiable in the logits."""
    policy = logits.softmax(-1)
    chain = torch.einsum("sa,sax->sx", policy, transition)
    value = torch.linalg.solve(EYE - gamma * chain, (policy * reward).sum(-1))
    return policy, value, reward + gamma * transition @ value, chain


def theorem(weight, policy, q, logits):
    """Σ_s weight(s) Σ_a q(s, a) ∇π(a|s), where q counts as a number."""
    return torch.autograd.grad((weight.detach()[:, None] * q.detach() * policy).sum(), logits)[0]


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_episodes(problem, gamma):
    """(6) to (8): a tenth of each transition ends; visits at time t count γ^t."""
    logits, transition, reward = problem
    policy, value, q, chain = solve(logits, 0.9 * transition, reward, gamma)
    exact = torch.autograd.grad(value[0], logits, retain_graph=True)[0]
    visits, now = torch.zeros(STATES, dtype=torch.float64), EYE[0]
    for k in range(1000):
        visits, now = visits + gamma**k * now, now @ chain.detach()
    torch.testing.assert_close(theorem(visits, policy, q, logits), exact)
    if gamma == 1.0:
        length = torch.linalg.solve(EYE - chain, torch.ones(STATES, dtype=torch.float64))[0]
        assert visits.sum().item() == pytest.approx(length.item()), "(7): the mean length"
        assert length.item() == pytest.approx(10)


def test_without_the_factor_it_is_another_direction(problem):
    logits, transition, reward = problem
    policy, value, q, chain = solve(logits, 0.9 * transition, reward, 0.5)
    exact = torch.autograd.grad(value[0], logits, retain_graph=True)[0].flatten()
    visits = torch.linalg.solve(EYE - chain.T, EYE[0])
    dropped = theorem(visits, policy, q, logits).flatten()
    assert torch.cosine_similarity(exact, dropped, dim=0) < 0.99


def test_a_baseline_changes_the_noise_and_not_the_mean(problem):
    """(9) to (11), and that v makes less noise than a number far from it."""
    logits, transition, reward = problem
    policy, value, q, _ = solve(logits, 0.9 * transition, reward, 1.0)
    score = EYE[:ACTIONS, :ACTIONS] - policy.detach()[0]  # ∇log π of each action, in its logits

    def gradient(baseline):
        sample = (q.detach()[0] - baseline)[:, None] * score  # (A, A): a row for each action
        mean = policy.detach()[0] @ sample
        return mean, (policy.detach()[0] @ (sample - mean).square()).sum()

    plain, noise = gradient(100.0)
    with_value, less = gradient(value.detach()[0])
    torch.testing.assert_close(plain, with_value)
    torch.testing.assert_close(plain, theorem(EYE[0], policy, q, logits)[0])
    assert less < noise


def test_continuing(problem):
    """(13) to (15): the mean reward, by the stationary distribution and differential values."""
    logits, transition, reward = problem
    policy = logits.softmax(-1)
    chain = torch.einsum("sa,sax->sx", policy, transition)
    ones = torch.ones(STATES, STATES, dtype=torch.float64)
    stationary = torch.linalg.solve((EYE - chain + ones).T, ones[0])
    mean = (stationary[:, None] * policy * reward).sum()
    exact = torch.autograd.grad(mean, logits, retain_graph=True)[0]
    gains = (policy * reward).sum(-1) - mean
    value = torch.linalg.lstsq((EYE - chain).detach(), gains.detach()[:, None]).solution[:, 0]
    q = reward - mean.detach() + transition @ value
    torch.testing.assert_close(theorem(stationary, policy, q, logits), exact)


def test_the_error_of_one_step_is_the_advantage(problem):
    """(16), and by how much it is wrong where the value is."""
    logits, transition, reward = problem
    _, value, q, _ = solve(logits, 0.9 * transition, reward, 0.95)
    delta = reward + 0.95 * (0.9 * transition) @ value - value[:, None]
    torch.testing.assert_close(delta, q - value[:, None])
    wrong = value + torch.tensor([1.0, 0.0, 0.0, 0.0])
    biased = reward + 0.95 * (0.9 * transition) @ wrong - value[:, None]
    torch.testing.assert_close(biased - delta, 0.95 * 0.9 * transition[:, :, 0])


def test_sums_of_errors():
    """(17): λ = 0 is one step, λ = 1 the return less the value."""
    import ppo

    reward, value = torch.randn(7, 1), torch.randn(8, 1)
    ends = torch.zeros(7, 1, dtype=torch.bool)
    ends[-1] = True
    inputs = reward, value[:-1], value[1:], ends, ends, 0.9
    one_step = reward + 0.9 * value[1:] * ~ends - value[:-1]
    torch.testing.assert_close(ppo.gae(*inputs, 0.0), one_step)
    returns = [sum(0.9 ** (k - t) * reward[k] for k in range(t, 7)) for t in range(7)]
    torch.testing.assert_close(ppo.gae(*inputs, 1.0), torch.stack(returns) - value[:-1])
