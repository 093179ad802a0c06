"""Schedules: their values by hand, their spelling, and what a plateau remembers."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import surgery
from surgery.callbacks.schedules import SCHEDULES, Constant, Cosine, Hard, Linear, Plateau, Steps, schedule


def test_values_by_hand():
    over = lambda s, steps=4: [s(step, steps) for step in range(6)]  # noqa: E731
    assert over(Constant(2.0)) == [2.0] * 6
    assert over(Linear(4.0, 0.0)) == [4.0, 3.0, 2.0, 1.0, 0.0, 0.0]
    cosine = [0.5 + 0.5 * math.cos(math.pi * min(step / 4, 1)) for step in range(6)]
    assert over(Cosine(1.0, 0.0)) == pytest.approx(cosine)
    assert over(Hard(5.0, 1.0)) == [5.0, 5.0, 1.0, 1.0, 1.0, 1.0]
    assert over(Hard(5.0, 1.0, at=3)) == [5.0, 5.0, 5.0, 1.0, 1.0, 1.0]
    assert over(Steps(0.9, [(1, 0.75), (0.75, 0.5)])) == [0.9, 0.75, 0.75, 0.5, 0.5, 0.5]
    assert over(Linear(1.0, 0.0), math.inf) == [1.0] * 6
    assert Linear(1.0, 0.0)(-3, 4) == 1.0


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from([Linear, Cosine, Hard]), begin=st.floats(-9, 9), end=st.floats(-9, 9), steps=st.integers(1, 99)
)
def test_they_go_from_one_value_to_the_other_and_never_back(kind, begin, end, steps):
    values = [kind(begin, end)(step, steps) for step in range(steps + 2)]
    assert values[0] == pytest.approx(begin)
    assert values[-1] == pytest.approx(end)
    rising = sorted(values)
    assert values in (rising, rising[::-1])


def test_a_plateau_waits_and_its_state_goes_on():
    plateau = Plateau(5.0, 1.0, patience=2)
    for loss in (3.0, 2.0, 2.5):
        plateau.observe(loss)
        assert plateau(0, 1) == 5.0
    again = Plateau(5.0, 1.0, patience=2)
    again.load_state_dict(plateau.state_dict())
    for each in (plateau, again):
        each.observe(2.0)
        assert each(0, 1) == 1.0
        each.observe(0.0)
        assert each(0, 1) == 1.0


def test_they_are_spelled_by_name():
    assert set(SCHEDULES) == {"constant", "linear", "cosine", "hard", "steps", "plateau"}
    assert schedule(3) == Constant(3.0)
    assert schedule({"kind": "cosine", "begin": 1, "end": 2}) == Cosine(1, 2)
    assert schedule({"kind": "plateau", "begin": 1, "end": 2, "every": 5}) == Plateau(1, 2, every=5)
    given = Hard(1, 2)
    assert schedule(given) is given
    for wrong, message in (
        ({"kind": "lineer"}, "no schedule 'lineer': choose one of constant, linear"),
        ({"kind": "hard", "begin": 1, "finish": 0}, "schedule hard takes begin, end, at, not begin, finish"),
        (
            {"kind": "hard", "begin": 1, "end": 0, "at": 1.5},
            "a fraction between 0 and 1 or at a whole step, not at 1.5",
        ),
        ({"kind": "plateau", "begin": 1, "end": 0, "patience": 0}, "patience >= 1"),
    ):
        with pytest.raises(surgery.SurgeryError, match=message):
            schedule(wrong)
