"""Bandits over domains: their lemma, their estimators, and their regret beside each other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from surgery import SurgeryError
from surgery.training.bandits import RANGE, BanditMix, hedge, log_barrier, magnitude_reduced

few = settings(derandomize=True, max_examples=40, deadline=None)


def losses_of(seed: int, rounds: int, arms: int, scale: float, sign: float) -> np.ndarray:
    random = np.random.default_rng(seed)
    drawn = random.normal(0, scale, (rounds, arms)) * np.exp(random.normal(0, 2, (rounds, arms)))
    return sign * np.abs(drawn) if sign else drawn


@few
@given(st.lists(st.floats(-1e8, 1e8), min_size=2, max_size=12), st.floats(1e-3, 10))
def test_the_log_barrier_step_is_optimal(cumulative, eta):
    """At a minimum on the simplex, η L - 1/p is the same for all arms."""
    losses = np.array(cumulative)
    p = log_barrier(losses, eta)
    assert p.sum() == pytest.approx(1, abs=1e-12) and (p > 0).all()
    gradient = eta * (losses - losses.min()) - 1 / p
    assert gradient == pytest.approx(np.full(len(p), gradient[0]), rel=1e-6, abs=1e-6 * max(1 / p))


def sides(leader, penalty, losses: np.ndarray, eta: float) -> tuple[float, float]:
    """Regret against an arm almost always drawn, and its bound Ψ(y) - Ψ(p_1) over η, plus η Σ_t Σ_a p_t(a) l_t(a)²."""
    arms = losses.shape[1]
    cumulative, spent, local = np.zeros(arms), 0.0, 0.0
    for loss in losses:
        p = leader(cumulative, eta)
        spent, local, cumulative = spent + p @ loss, local + p @ loss**2, cumulative + loss
    best = np.full(arms, 0.1 / arms)
    best[cumulative.argmin()] += 0.9
    return spent - best @ cumulative, (penalty(best) - penalty(np.full(arms, 1 / arms))) / eta + eta * local


def barrier(p: np.ndarray) -> float:
    return -np.log(p).sum()


def negative_entropy(p: np.ndarray) -> float:
    return p @ np.log(p)


@few
@example(0, 8, 40, 1e8, 0.1, -1.0)
@given(
    st.integers(0, 999),
    st.integers(2, 8),
    st.integers(1, 40),
    st.sampled_from([1e-2, 1.0, 1e3, 1e8]),
    st.sampled_from([0.01, 0.1, 1.0]),
    st.sampled_from([-1.0, 0.0, 1.0]),
)
def test_refined_lemma(seed, arms, rounds, scale, eta, sign):
    """The log barrier's bound holds for losses of any sign and size."""
    losses = losses_of(seed, rounds, arms, scale, sign)
    left, right = sides(log_barrier, barrier, losses, eta)
    assert left <= right + 1e-9 * max(abs(right), np.abs(losses).sum())


def test_negative_entropy_breaks_the_lemma_on_a_large_negative_loss():
    """It asks for η l >= -1: an arm as good as given up that gains much is paid for by nothing."""
    losses = np.array([[-30.0, 0.0], [0.0, -1e5]])
    left, right = sides(hedge, negative_entropy, losses, 1.0)
    assert left > 10 * right
    left, right = sides(log_barrier, barrier, losses, 1.0)
    assert left < right


def one_hot(arm: int, arms: int) -> np.ndarray:
    return np.eye(arms)[arm]


@few
@given(st.integers(0, 999), st.integers(2, 20), st.integers(1, 6))
def test_the_magnitude_reduced_estimate_is_unbiased_and_never_far_below_zero(seed, arms, rank):
    random = np.random.default_rng(seed)
    features = np.column_stack([random.normal(size=(arms, rank)), np.ones(arms)])
    truth = features @ random.normal(size=rank + 1)
    truth = (truth - truth.min()) / (np.ptp(truth) + 1e-9) * RANGE  # in [0, H], and linear still
    p = random.dirichlet(np.ones(arms)) * 0.9 + 0.1 / arms
    estimates = [magnitude_reduced(features, p, one_hot(arm, arms), truth, RANGE) for arm in range(arms)]
    assert p @ np.array(estimates) == pytest.approx(truth, abs=1e-6)
    c = features @ np.linalg.pinv(features.T * p @ features, rcond=1e-12) @ features.T
    offset = RANGE * np.minimum(c, 0) @ p
    assert min((estimate - offset).min() for estimate in estimates) >= -1e-6
    # by definition, term by term
    arm = int(random.integers(arms))
    by_hand = [
        c[a, arm] * truth[arm] - RANGE * min(c[a, arm], 0) + RANGE * sum(p[b] * min(c[a, b], 0) for b in range(arms))
        for a in range(arms)
    ]
    assert estimates[arm] == pytest.approx(by_hand, abs=1e-5)


def test_the_mean_of_many_draws_is_the_truth():
    random = np.random.default_rng(0)
    features = np.column_stack([random.normal(size=(8, 3)), np.ones(8)])
    truth = np.clip(features @ np.array([0.2, -0.1, 0.1, 1.0]), 0, RANGE)
    truth = features @ np.linalg.lstsq(features, truth, rcond=None)[0]
    p = random.dirichlet(np.ones(8))
    drawn = random.choice(8, 200_000, p=p)
    each = np.array([magnitude_reduced(features, p, one_hot(arm, 8), truth, RANGE) for arm in range(8)])[drawn]
    error = each.std(0) / np.sqrt(len(drawn))
    assert (np.abs(each.mean(0) - truth) <= 3 * error).all()


def test_a_round_of_many_draws_is_the_mean_of_rounds_of_one():
    features = np.random.default_rng(1).normal(size=(4, 2))
    for policy, known in (("logbarrier", None), ("mr-linear", features)):
        together = BanditMix(4, policy, features=known)
        losses = np.array([0.3, -0.2, 0.9, 0.0])
        together.update(losses, np.array([2, 1, 1, 0]))
        singles = []
        for arm in (0, 0, 1, 2):
            alone = BanditMix(4, policy, features=known)
            alone.update(losses, one_hot(arm, 4))
            singles.append(np.array(alone.state_dict()["cumulative"]))
        assert np.array(together.state_dict()["cumulative"]) == pytest.approx(np.mean(singles, 0))


def play(bandit: BanditMix, losses: np.ndarray, seed: int) -> float:
    """Regret against the best arm in hindsight, of what was expected to be drawn."""
    uniform, spent = np.random.default_rng(seed).random(len(losses)), 0.0
    for loss, value in zip(losses, uniform, strict=True):
        p = bandit.probabilities
        arm = min(int(np.searchsorted(p.cumsum(), value)), len(p) - 1)
        spent += p @ loss
        bandit.update(np.where(one_hot(arm, len(p)), loss, 0), one_hot(arm, len(p)))
    return spent - losses.sum(0).min()


def test_log_barrier_beats_exp3_on_signed_rewards():
    """Every domain's loss falls, one's faster: losses of arms in [-1, 0]. Both at the step sizes of their theory."""
    rounds, arms = 3000, 8
    regrets: dict[str, list[float]] = {"exp3": [], "logbarrier": []}
    for seed in range(6):
        random = np.random.default_rng(seed)
        losses = -random.random((rounds, arms))
        losses[:, random.integers(arms)] = -np.sqrt(random.random(rounds))
        for policy, eta in (
            ("exp3", np.sqrt(2 * np.log(arms) / (arms * rounds))),
            ("logbarrier", np.sqrt(arms * np.log(rounds) / rounds)),
        ):
            regrets[policy].append(play(BanditMix(arms, policy, eta=eta), losses, seed))
    assert np.mean(regrets["logbarrier"]) <= 0.8 * np.mean(regrets["exp3"])


class Standard(BanditMix):
    """The estimate that magnitude reduction reduces: l̂(a) = c(a, a_t) l."""

    def update(self, losses, draws, total=None):
        features, p = self._features, self.probabilities
        c = features @ np.linalg.pinv(features.T * p @ features, hermitian=True) @ features.T
        self._cumulative += c @ (draws * (losses + 1))
        self._rounds += 1


def test_shared_features_pay():
    """64 arms in five dimensions: at most half of EXP3's regret, and no more than the standard estimate's."""
    rounds, arms = 1200, 64
    regrets: dict[str, list[float]] = {"exp3": [], "standard": [], "reduced": []}
    for seed in range(4):
        random = np.random.default_rng(seed)
        features = random.normal(size=(arms, 5))
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        theta = random.normal(size=5)
        losses = 0.5 * features @ theta / np.linalg.norm(theta) + random.normal(0, 0.1, (rounds, arms))
        losses = losses.clip(-1, 1)
        for name, bandit in (
            ("exp3", BanditMix(arms, "exp3", eta=0.01)),
            ("standard", Standard(arms, "mr-linear", eta=0.1, features=features)),
            ("reduced", BanditMix(arms, "mr-linear", eta=0.1, features=features)),
        ):
            regrets[name].append(play(bandit, losses, seed))
    assert np.mean(regrets["reduced"]) <= 0.5 * np.mean(regrets["exp3"])
    assert np.mean(regrets["reduced"]) <= np.mean(regrets["standard"])


def test_rewards_are_drops_of_the_loss():
    """The domain whose loss falls is drawn more; the first loss of a domain is only where it begins."""
    bandit = BanditMix(3, eta=1.0)
    bandit.observe([3.0, 3.0, 9.0], [4, 4, 0])
    assert bandit.probabilities == pytest.approx([1 / 3] * 3)
    bandit.observe([2.0, 3.5, 3.0], [4, 2, 2])
    # importance weighted by the share of draws over the probability
    assert bandit.state_dict()["cumulative"] == pytest.approx([-1 * (4 / 8) * 3, 0.5 * (2 / 8) * 3, 0])
    assert bandit.probabilities[0] > bandit.probabilities[2] > bandit.probabilities[1]


@few
@given(st.sampled_from(["exp3", "logbarrier", "mr-linear"]), st.integers(2, 6), st.integers(0, 99), st.booleans())
def test_probabilities_sum_to_one_and_stay_above_the_floor(policy, arms, seed, scheduled):
    random = np.random.default_rng(seed)
    floor = 0.0 if scheduled else 0.5 / arms
    features = random.normal(size=(arms, 3)) if policy == "mr-linear" else None
    bandit = BanditMix(arms, policy, eta=None if scheduled else 1.0, floor=floor, features=features)
    for t in range(1, 12):
        p = bandit.probabilities
        assert p.sum() == pytest.approx(1)
        if policy == "exp3" and scheduled:  # online data mixing's
            floor = min(1 / arms, np.sqrt(np.log(arms) / (arms * t)))
        assert (p >= floor - 1e-12).all()
        bandit.update(random.normal(0, 30, arms), random.multinomial(4, p / p.sum()))


def test_exp3_is_online_data_mixing():
    """p_i = (1 - K ε_t) softmax(ε_{t-1} R̂)_i + ε_t, R̂ the rewards over their probabilities."""
    arms, total = 3, np.zeros(3)
    bandit = BanditMix(arms, "exp3")
    epsilon = [min(1 / arms, np.sqrt(np.log(arms) / (arms * t))) for t in range(1, 9)]
    random = np.random.default_rng(0)
    for t in range(7):
        weights = np.exp(epsilon[max(t - 1, 0)] * total)
        expected = (1 - arms * epsilon[t]) * weights / weights.sum() + epsilon[t]
        assert bandit.probabilities == pytest.approx(expected)
        arm, reward = int(random.integers(arms)), random.random()
        total[arm] += reward / expected[arm]
        bandit.update(-reward * one_hot(arm, arms), one_hot(arm, arms))


@pytest.mark.parametrize("policy", ["exp3", "logbarrier", "mr-linear"])
def test_state_goes_on_to_the_bit(policy):
    features = np.random.default_rng(3).normal(size=(4, 2)) if policy == "mr-linear" else None
    random = np.random.default_rng(4)
    whole, part = (BanditMix(4, policy, features=features) for _ in range(2))
    feed = [(random.random(4) + 2, random.integers(0, 3, 4)) for _ in range(8)]
    for losses, drawn in feed[:4]:
        whole.observe(losses, drawn)
        part.observe(losses, drawn)
    resumed = BanditMix(4, policy, features=features)
    resumed.load_state_dict(part.state_dict())
    for losses, drawn in feed[4:]:
        whole.observe(losses, drawn)
        resumed.observe(losses, drawn)
    assert np.array_equal(whole.probabilities, resumed.probabilities)
    assert len(set(whole.probabilities)) > 1
    with pytest.raises(SurgeryError, match="mixes 4 domains, this run 3"):
        BanditMix(3).load_state_dict(whole.state_dict())


def test_mistakes_are_named():
    with pytest.raises(SurgeryError, match="nothing to mix"):
        BanditMix(1)
    with pytest.raises(SurgeryError, match="exp3, logbarrier, mr-linear, not 'ucb'"):
        BanditMix(2, "ucb")
    with pytest.raises(SurgeryError, match="between 0 and 1/2, not at 0.6"):
        BanditMix(2, floor=0.6)
    with pytest.raises(SurgeryError, match=r"shape \[2, d\], not \[0\]"):
        BanditMix(2, "mr-linear")
    with pytest.raises(SurgeryError, match="for the policy mr-linear alone"):
        BanditMix(2, features=np.ones((2, 1)))
    with pytest.raises(SurgeryError, match="loss of domain 1 is nan"):
        BanditMix(2).observe([1.0, float("nan")], [1, 1])
