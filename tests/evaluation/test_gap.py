"""Gap closed: the formula, its error, and what cannot be compared."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from evaluation_cases import made_up

from surgery import SurgeryError
from surgery.evaluation import Evaluation, gap_closed
from surgery.evaluation.comparison import compare, read_result, write_json


def losses(seed: int, mean: float, count: int) -> list[float]:
    noise = torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (mean + 0.1 * noise).tolist()


@pytest.fixture(scope="module")
def three() -> tuple[Evaluation, Evaluation, Evaluation]:
    counts = {"books": 20, "code": 30, "short": 3}
    softmax = {domain: losses(i, 2.0 + i, count) for i, (domain, count) in enumerate(counts.items())}
    control = {d: [x + 0.4 + 0.1 * i + 0.01 * (j % 3) for j, x in enumerate(softmax[d])] for i, d in enumerate(counts)}
    result = {d: [x + 0.1 * (i + 1) + 0.02 * (j % 5) for j, x in enumerate(softmax[d])] for i, d in enumerate(counts)}
    return made_up(result, "mine"), made_up(control, "window"), made_up(softmax, "teacher")


def test_formula(three):
    result, control, softmax = three
    gap = gap_closed(*three)
    by_hand = {
        domain: (control.domains[domain].nll - result.domains[domain].nll)
        / (control.domains[domain].nll - softmax.domains[domain].nll)
        for domain in result.domains
    }
    assert {domain: ratio.value for domain, ratio in gap.domains.items()} == pytest.approx(by_hand)
    assert gap.mean.value == pytest.approx((by_hand["books"] + by_hand["code"]) / 2)
    assert gap.of_mean.value == pytest.approx((control.nll - result.nll) / (control.nll - softmax.nll))
    assert (gap.control, gap.softmax) == ("window", "teacher")
    assert gap_closed(control, control, softmax).of_mean.value == 0
    assert gap_closed(softmax, control, softmax).of_mean.value == pytest.approx(1)
    assert gap_closed(softmax, control, softmax).of_mean.stderr == pytest.approx(0, abs=1e-12)


def test_errors_agree_with_a_bootstrap(three):
    rng = np.random.default_rng(0)

    def samples(model, domain, rows):
        return np.array(model.domains[domain].window_nll)[rows].mean(-1)

    drawn = {d: rng.integers(0, n, (4000, n)) for d, n in (("books", 20), ("code", 30))}
    means = [{d: samples(model, d, rows) for d, rows in drawn.items()} for model in three]
    ratios = {d: (means[1][d] - means[0][d]) / (means[1][d] - means[2][d]) for d in drawn}
    totals = [m["books"] + m["code"] for m in means]
    gap = gap_closed(*three)
    for domain, values in ratios.items():
        assert gap.domains[domain].stderr == pytest.approx(values.std(), rel=0.1)
    assert gap.mean.stderr == pytest.approx(((ratios["books"] + ratios["code"]) / 2).std(), rel=0.1)
    assert gap.of_mean.stderr == pytest.approx(((totals[1] - totals[0]) / (totals[1] - totals[2])).std(), rel=0.1)


def test_no_gap_is_no_number(three):
    result, _, softmax = three
    gap = gap_closed(result, softmax, softmax)
    assert set(gap.domains.values()) == {None}
    assert (gap.mean, gap.of_mean) == (None, None)
    lone = [made_up({"a": [value]}, "lone") for value in (2.5, 3.0, 2.0)]
    assert gap_closed(*lone).domains["a"].value == pytest.approx(0.5)
    assert (gap_closed(*lone).domains["a"].stderr, gap_closed(*lone).mean) == (None, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: replace(e, length=64), "windows of 1024 and of 64 tokens"),
        (lambda e: replace(e, domains={"books": e.domains["books"]}), "domains books, code, short and books"),
        (lambda e: made_up({d: r.window_nll[1:] for d, r in e.domains.items()}, "x"), "20 and 19 windows of books"),
        (lambda e: made_up({d: r.window_nll for d, r in e.domains.items()}, "x", "other"), "books hold other tokens"),
    ],
)
def test_refuses_what_was_measured_elsewhere(three, change, message):
    result, control, softmax = three
    for others in ((change(control), softmax), (control, change(softmax))):
        with pytest.raises(SurgeryError, match=message):
            gap_closed(result, *others)


def test_files_hold_the_comparison(three, tmp_path):
    result, control, softmax = three
    comparison = compare(result, softmax, [control])
    path = tmp_path / "new" / "evaluation.json"
    write_json(comparison, path)
    assert [file.name for file in path.parent.iterdir()] == ["evaluation.json"]
    data = json.loads(path.read_text())
    assert data["gap_closed"][0]["mean"]["value"] == comparison.gaps[0].mean.value
    assert read_result(path) == result
    assert compare(result, None, [control]).gaps == ()


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"result": null}', '{"result": {"format": 1}}'])
def test_other_files_are_no_evaluations(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    for file in (path, tmp_path / "absent.json"):
        with pytest.raises(SurgeryError, match=f"{file}: cannot be read as an evaluation: "):
            read_result(file)
