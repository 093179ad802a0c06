"""Probabilities of domains by temperature, their scalarised twin, Cooldown, and drawing by what is shared."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from surgery import SurgeryError, load_recipe
from surgery.training.mixing import (
    Cooldown,
    DomainSampler,
    SharedProbabilities,
    TemperatureMix,
    temperature_probabilities,
)

MC4 = (2733e9, 162e9, 39e9, 1e9)
"""Tokens of English, Italian, Chinese and Swahili (Upsample or Upweight?)."""

few = settings(derandomize=True, max_examples=30, deadline=None)


def test_probabilities_of_the_paper():
    assert temperature_probabilities(MC4, 5) == pytest.approx([0.4543, 0.2582, 0.1942, 0.0933], abs=1e-4)
    ratios = [TemperatureMix(MC4, tau).variance_ratio() for tau in (1, 2, 3.33, 5, 100)]
    assert ratios == pytest.approx([1, 2.25, 10.98, 29.83, 174.5], rel=1e-3)


@few
@given(st.lists(st.floats(1, 1e12), min_size=1, max_size=8), st.floats(0.3, 50), st.floats(1, 50))
def test_a_higher_temperature_is_flatter(sizes, tau, more):
    mix = TemperatureMix(sizes, tau)
    p = mix.probabilities
    assert p.sum() == pytest.approx(1) and (p >= 0).all()
    assert (np.argsort(p, kind="stable")[-1] == np.argmax(sizes)) or p.max() == pytest.approx(p[np.argmax(sizes)])
    flatter = temperature_probabilities(sizes, tau * more)
    assert flatter.max() <= p.max() + 1e-12
    assert temperature_probabilities(sizes, math.inf) == pytest.approx(np.full(len(sizes), 1 / len(sizes)))
    assert temperature_probabilities(sizes, 1) == pytest.approx(np.array(sizes) / sum(sizes))
    for sampled in (1.0, math.inf):
        assert temperature_probabilities(sizes, sampled) @ mix.loss_weights(sampled) == pytest.approx(1)


@pytest.mark.parametrize("sampled", [1.0, math.inf], ids=["proportional", "uniform"])
def test_scalarisation_has_the_same_expected_gradient(sampled):
    torch.manual_seed(0)
    sizes, weight = (40, 10, 4), torch.randn(5, dtype=torch.float64, requires_grad=True)
    data = [torch.randn(n, 5, dtype=torch.float64) for n in sizes]
    mix, drawn = TemperatureMix(sizes, 5), temperature_probabilities(sizes, sampled)

    def gradient(probabilities, scale) -> Tensor:
        losses = torch.stack([(rows @ weight).sin().mean() for rows in data])
        return torch.autograd.grad((torch.from_numpy(probabilities * scale) * losses).sum(), weight)[0]

    expected = gradient(mix.probabilities, np.ones(3))
    assert torch.allclose(gradient(drawn, mix.loss_weights(sampled)), expected, rtol=0, atol=1e-12)
    assert not torch.allclose(gradient(drawn, np.ones(3)), expected, atol=1e-3)


def test_cooldown_is_one_hard_step():
    half = Cooldown()
    assert [half.tau(step, 60_000) for step in (0, 29_999, 30_000, 59_999)] == [5, 5, 1, 1]
    assert [Cooldown(3.0, 2.0, at=7).tau(step, 100) for step in (6, 7)] == [3, 2]
    assert Cooldown(at=0.0).tau(0, 10) == 1 and Cooldown(at=1).tau(0, 10) == 5


def test_cooldown_on_a_plateau_waits_and_never_warms_up_again():
    cooldown, seen = Cooldown(at="plateau", patience=2), []
    for loss in (3.0, 2.0, 2.1, 1.9, 2.0, 1.9, 1.0, 0.5):
        cooldown.validated(loss)
        seen.append(cooldown.tau(0, 1))
    assert seen == [5, 5, 5, 5, 5, 1, 1, 1]
    again = Cooldown(at="plateau", patience=2)
    again.load_state_dict(cooldown.state_dict())
    assert again == cooldown


def test_what_makes_no_sense_is_refused():
    for at in (-1, 1.5, -0.1, "platau"):
        with pytest.raises(SurgeryError, match="a fraction of the steps, at a step, or at 'plateau'"):
            Cooldown(at=at)
    with pytest.raises(SurgeryError, match="none of them empty"):
        TemperatureMix([3, 0])
    with pytest.raises(SurgeryError, match="positive: not 0"):
        TemperatureMix([3, 1], 0)
    with pytest.raises(SurgeryError, match=r"sizes \[3.0, 1.0\], this run \[3.0, 2.0\]"):
        TemperatureMix([3, 2]).load_state_dict(TemperatureMix([3, 1]).state_dict())
    with pytest.raises(SurgeryError, match="mixes 3 domains, this run 2"):
        SharedProbabilities(np.full(2, 0.5)).load_state_dict(SharedProbabilities(np.full(3, 1 / 3)).state_dict())


def test_draws_follow_the_probabilities():
    p = temperature_probabilities(MC4, 5)
    sampler = DomainSampler(SharedProbabilities(p), 8)
    for _ in range(100_000):
        next(sampler)
    expected = p * 100_000
    # 16.27: the chi-square with three degrees of freedom exceeds it once in a thousand
    assert ((np.array(sampler.counts) - expected) ** 2 / expected).sum() < 16.27


def draws(sampler: DomainSampler, count: int) -> list[tuple[int, int]]:
    return [next(sampler) for _ in range(count)]


@few
@given(st.integers(0, 60), st.integers(1, 7), st.integers(1, 3), st.integers(0, 2**40))
def test_a_sampler_resumes_anywhere(killed_at, per_step, world, seed):
    """Probabilities change while it draws; places count up within each domain."""

    def make() -> tuple[SharedProbabilities, DomainSampler]:
        shared = SharedProbabilities(np.array([0.5, 0.3, 0.2]))
        shared.publish(np.array([0.1, 0.1, 0.8]), step=4)
        return shared, DomainSampler(shared, per_step, seed=seed, rank=world - 1, world=world)

    whole = draws(make()[1], 80)
    shared, first = make()
    begun = draws(first, killed_at)
    resumed_shared, resumed = make()
    resumed_shared.load_state_dict(shared.state_dict())
    resumed.load_state(first.state())
    assert begun + draws(resumed, 80 - killed_at) == whole
    for domain in range(3):
        places = [place for found, place in whole if found == domain]
        assert places == list(range(len(places)))


def test_processes_draw_differently_and_together_like_one():
    p = np.array([0.7, 0.3])
    alone = [domain for domain, _ in draws(DomainSampler(SharedProbabilities(p), 4), 40)]
    ranks = [DomainSampler(SharedProbabilities(p), 4, rank=rank, world=2) for rank in range(2)]
    found = [[domain for domain, _ in draws(sampler, 20)] for sampler in ranks]
    assert [domain for pair in zip(*found, strict=True) for domain in pair] == alone
    assert found[0] != found[1]


def test_two_versions_hold_from_their_steps_on():
    shared = SharedProbabilities(np.array([1.0, 0.0]))
    shared.publish(np.array([0.0, 1.0]), step=3)
    assert [shared.at(step)[1] for step in range(5)] == [0, 0, 0, 1, 1]
    shared.publish(np.array([0.5, 0.5]), step=5)
    assert [shared.at(step)[1] for step in (3, 4, 5, 6)] == [1, 1, 0.5, 0.5]
    shared.publish(np.array([1.0, 0.0]), step=5)
    assert shared.at(5)[1] == 0


class Domains(IterableDataset):
    """The domains that a worker draws."""

    def __init__(self, sampler: DomainSampler, count: int) -> None:
        self.sampler, self.count = sampler, count

    def __iter__(self):
        return (next(self.sampler)[0] for _ in range(self.count))


def test_a_spawned_worker_sees_a_change_within_what_it_has_prefetched():
    shared = SharedProbabilities(np.array([1.0, 0.0]))
    loader = DataLoader(
        Domains(DomainSampler(shared, 4), 80),
        batch_size=4,
        num_workers=1,
        prefetch_factor=2,
        multiprocessing_context="spawn",
    )
    seen = []
    for step, batch in enumerate(loader):
        seen.append(batch.tolist())
        if step == 5:
            shared.publish(np.array([0.0, 1.0]))
    assert seen[:6] == [[0] * 4] * 6
    # two were ready, and one may have been begun
    assert seen[9:] == [[1] * 4] * 11


def test_a_step_ahead_makes_prefetching_irrelevant():
    """With a forked worker or without: the change falls on the same row."""

    def run(workers: int) -> list[list[int]]:
        shared = SharedProbabilities(np.array([0.9, 0.1]))
        found = []
        context = "fork" if workers else None
        dataset = Domains(DomainSampler(shared, 4), 80)
        loader = DataLoader(dataset, batch_size=4, num_workers=workers, multiprocessing_context=context)
        for step, batch in enumerate(loader):
            found.append(batch.tolist())
            if step == 5:
                shared.publish(np.array([0.1, 0.9]), step=6 + 4)
        return found

    assert run(1) == run(0)


def test_the_first_change_is_not_written_over_what_workers_read():
    shared = SharedProbabilities(np.array([0.9, 0.1]))
    read = int(shared.table[:, 0].argmax())
    before = shared.table[read].clone()
    shared.publish(np.array([0.1, 0.9]), step=10)
    assert torch.equal(shared.table[read], before)
    assert np.array_equal(shared.at(9), [0.9, 0.1]) and np.array_equal(shared.at(10), [0.1, 0.9])


def test_recipes_can_ask_for_mixing():
    recipe = load_recipe("llama/logmass")
    found = recipe.override({"stages.0.mixing": {"kind": "temperature", "at": 1000}}).stages[0].mixing
    assert (found.tau, found.end, found.at) == (5, 1, 1000)
    assert recipe.override({"stages.0.mixing": {"kind": "bandit"}}).stages[0].mixing.policy == "logbarrier"
    for mixing, problem in (
        ({"kind": "temprature"}, "did you mean 'temperature'"),
        ({"kind": "bandit", "polcy": "exp3"}, r"mixing\.polcy: unknown key; did you mean 'policy'"),
        ({"kind": "temperature", "at": 1.5}, "expected a fraction between 0 and 1, a whole step"),
        ({"kind": "temperature", "at": "platau"}, "did you mean 'plateau'"),
    ):
        with pytest.raises(SurgeryError, match=problem):
            recipe.override({"stages.0.mixing": mixing})


# two languages of their own symbols, a large and a small one


SYMBOLS = 16


def language(length: int, seed: int) -> Tensor:
    """[length - 2, 3]: two symbols and the next of a random second-order Markov chain."""
    random = np.random.default_rng(seed)
    bounds = random.dirichlet(np.full(SYMBOLS, 0.05), (SYMBOLS, SYMBOLS)).cumsum(-1)
    bounds[..., -1] = 1
    text = [0, 0]
    for value in random.random(length):
        text.append(int(np.searchsorted(bounds[text[-2], text[-1]], value)))
    tokens = torch.tensor(text) + SYMBOLS * seed
    return torch.stack([tokens[:-2], tokens[1:-1], tokens[2:]], 1)


class Trigram(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(2 * SYMBOLS, 16)
        self.head = nn.Sequential(nn.Linear(32, 96), nn.ReLU(), nn.Linear(96, 2 * SYMBOLS))

    def loss(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        losses = nn.functional.cross_entropy(
            self.head(self.embed(rows[:, :2]).flatten(1)), rows[:, 2], reduction="none"
        )
        return (losses if weights is None else losses * weights).mean()


@pytest.fixture(scope="module")
def languages() -> tuple[list[Tensor], list[Tensor]]:
    """Held-out rows and training rows, of both."""
    large, small = language(60_000, 0), language(10_000, 1)
    return [large[:4000], small[:4000]], [large[4000:], small[4000:]]


def train(rows: list[Tensor], steps: int, mix: TemperatureMix, cooldown=None, weights=None) -> Trigram:
    torch.manual_seed(0)
    model, size = Trigram(), 64
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    shared = SharedProbabilities(mix.probabilities)
    sampler = DomainSampler(shared, size)
    for step in range(steps):
        if cooldown is not None:
            mix.tau = cooldown.tau(step, steps)
            shared.publish(mix.probabilities, step)
        drawn = draws(sampler, size)
        batch = torch.stack([rows[domain][place % len(rows[domain])] for domain, place in drawn])
        optimizer.zero_grad()
        model.loss(batch, None if weights is None else weights[[domain for domain, _ in drawn]]).backward()
        optimizer.step()
    return model


@torch.no_grad()
def measured(model: Trigram, held: list[Tensor]) -> list[float]:
    return [model.loss(rows).item() for rows in held]


def test_upsampling_learns_the_small_language_sooner_than_upweighting(languages):
    held, (large, small) = languages
    rows = [large, small[:1200]]
    sizes = [len(domain) for domain in rows]
    mix = TemperatureMix(sizes, 5)
    drawn = measured(train(rows, 300, mix), held)
    weights = torch.from_numpy(mix.loss_weights()).float()
    weighted = measured(train(rows, 300, TemperatureMix(sizes, 1), weights=weights), held)
    assert drawn[1] < weighted[1] - 0.1


def test_cooldown_keeps_the_large_language_and_learns_the_small_one(languages):
    held, (large, small) = languages
    rows = [large, small[:2800]]
    sizes = [len(domain) for domain in rows]
    proportional = measured(train(rows, 600, TemperatureMix(sizes, 1)), held)
    cooled = measured(train(rows, 600, TemperatureMix(sizes), Cooldown()), held)
    assert cooled[0] < 1.03 * proportional[0]
    assert cooled[1] < proportional[1] - 0.3
