"""Losses by the number of tokens before, with their errors: of one model, and above another's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import zoo
from evaluation_cases import made_up
from torch.nn.functional import cross_entropy

from surgery import SurgeryError
from surgery.evaluation import Evaluation, evaluate
from surgery.evaluation.comparison import compare
from surgery.evaluation.plot import ranges
from surgery.evaluation.positions import above, by_position
from surgery.training.data.tokens import windows

LENGTH = 100


@pytest.fixture(scope="module")
def corpora():
    return {name: zoo.tokens(1, 17 * LENGTH, seed)[0].numpy() for seed, name in enumerate(("books", "code"))}


@pytest.fixture(scope="module")
def pair(corpora) -> tuple[Evaluation, Evaluation]:
    return tuple(evaluate(zoo.build("llama", seed), corpora, length=LENGTH, copy_tokens=0) for seed in (0, 1))


@torch.no_grad()
def by_hand(seed: int, tokens: np.ndarray) -> np.ndarray:
    """[windows, LENGTH - 1]"""
    rows, model = windows(tokens, LENGTH), zoo.build("llama", seed)
    losses = [cross_entropy(model(row[None]).logits[0, :-1], row[1:], reduction="none") for row in rows]
    return torch.stack(losses).double().numpy()


def test_ranges_of_positions_have_errors_over_windows(pair, corpora):
    found = by_position(pair[0])
    assert list(found) == ["1-64", "65-99"]
    for name, where in (("1-64", slice(64)), ("65-99", slice(64, None))):
        domains = [by_hand(0, tokens)[:, where].mean(1) for tokens in corpora.values()]
        errors = [values.std(ddof=1) / 17**0.5 for values in domains]
        assert found[name].value == pytest.approx(np.mean(domains), abs=1e-5)
        assert found[name].stderr == pytest.approx(np.hypot(*errors) / 2, rel=1e-3)
        assert found[name].count == 34


def test_what_is_above_another_model_pairs_windows(pair, corpora):
    found = above(pair[1], pair[0])
    for name, where in (("1-64", slice(64)), ("65-99", slice(64, None))):
        domains = [(by_hand(1, x) - by_hand(0, x))[:, where].mean(1) for x in corpora.values()]
        errors = [values.std(ddof=1) / 17**0.5 for values in domains]
        assert found[name].value == pytest.approx(np.mean(domains), abs=1e-4)
        assert found[name].stderr == pytest.approx(np.hypot(*errors) / 2, rel=1e-2)


def test_the_picture_shows_each_range_at_its_middle(pair):
    centers, values, errors = ranges(pair[0])
    assert centers == pytest.approx([32.5, 82])
    assert values == pytest.approx([mean.value for mean in by_position(pair[0]).values()])
    assert (errors > 0).all()


def test_what_earlier_versions_wrote_is_read(pair):
    data = pair[0].to_dict() | {"format": 1}
    for domain in data["domains"].values():
        domain["by_position"] = {name: mean["value"] for name, mean in domain["by_position"].items()}
        del domain["window_by_position"]
    old = Evaluation.from_dict(data)
    assert old.nll == pair[0].nll
    assert [(m.value, m.stderr) for m in by_position(old).values()] == [
        (m.value, None) for m in by_position(pair[0]).values()
    ]
    assert above(old, pair[0]) == above(pair[0], old) == {}


def test_a_comparison_is_of_the_same_windows_also_without_controls():
    with pytest.raises(SurgeryError, match="windows of a hold other tokens"):
        compare(made_up({"a": [2.0]}), made_up({"a": [2.0]}, tokens="other"))
