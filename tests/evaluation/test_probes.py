"""Recall by association, parity of decoding, speed and branches: against loops, and as a whole."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import wraps

import numpy as np
import pytest
import torch
import zoo
from torch.nn.functional import cross_entropy

from surgery.evaluation import Evaluation, Probes, evaluate
from surgery.evaluation.associative import (
    BEFORE,
    CUE,
    FACT,
    known_words,
    measure_recall,
    needle_sequences,
    pair_sequences,
)
from surgery.evaluation.comparison import compare
from surgery.evaluation.losses import token_scores
from surgery.evaluation.parity import measure_parity
from surgery.evaluation.plot import plot
from surgery.evaluation.probe_report import probe_tables
from surgery.evaluation.report import markdown
from surgery.training import branches

LENGTH = 160
WORDS = torch.arange(3, 90)


# sequences


def test_pairs_ask_every_key_once_and_for_its_value():
    made = {found.size: found for found in pair_sequences(WORDS, LENGTH, 5, 2)}
    assert list(made) == [4, 16]  # 64 pairs need 128 different words
    for size, found in made.items():
        assert found.ids.shape == (5, 1 + 4 * size)
        for row, first, second in zip(found.ids, found.first, found.second, strict=True):
            said = row[1 : 1 + 2 * size].tolist()
            asked = row[1 + 2 * size :].tolist()
            values = dict(zip(said[::2], said[1::2], strict=True))
            assert len(set(said)) == 2 * size and set(said) <= set(WORDS.tolist())
            assert sorted(asked[::2]) == sorted(values)
            assert [values[key] for key in asked[::2]] == asked[1::2] == row[second].tolist() == row[first].tolist()
            assert (row[0], row[second - 1].tolist()) == (2, asked[::2])
    assert [found.size for found in pair_sequences(WORDS, 4 * 16, 1, None)] == [4, 16]
    assert [found.size for found in pair_sequences(WORDS, 4 * 16, 1, 2)] == [4]


def test_needles_come_back_after_their_distance():
    text = zoo.tokens(6, LENGTH)
    made = {found.size: found for found in needle_sequences(WORDS, text, LENGTH, 4, 2)}
    assert list(made) == [64, 128]
    needle = CUE + FACT
    for distance, found in made.items():
        assert found.ids.shape == (4, 1 + BEFORE + distance + needle)
        assert (found.second - found.first).unique().tolist() == [distance]
        at = 1 + BEFORE
        assert torch.equal(found.ids[:, at : at + needle], found.ids[:, at + distance : at + distance + needle])
        assert torch.equal(found.ids.gather(1, found.first), found.ids.gather(1, found.second))
        kept = torch.cat([found.ids[:, 1:at], found.ids[:, at + needle : at + distance]], 1)
        assert torch.equal(kept, text[[0, 1, 3, 5], : kept.shape[1]])
    assert torch.equal(made[64].ids[:, 17:25], made[128].ids[:, 17:25])
    assert [found.size for found in needle_sequences(WORDS, zoo.tokens(2, 1024), 1024, 2, None)][-2:] == [512, 960]
    assert list(needle_sequences(WORDS, text, 60, 4, 2)) == []


def test_sequences_follow_the_seed():
    def ids(seed):
        return next(pair_sequences(WORDS, LENGTH, 3, 2, seed)).ids

    assert torch.equal(ids(0), ids(0))
    assert not torch.equal(ids(0), ids(1))


def test_words_are_those_of_the_text():
    class Tokenizer:
        def convert_ids_to_tokens(self, ids):
            return [f"{'Ġ▁'[i % 2]}{'w' * (i % 7)}" if i % 3 else "ab" for i in ids]

    corpora = {"a": np.array([5, 9, 9, 2]), "b": np.array([7, 5])}
    assert known_words(corpora, {2, None}).tolist() == [5, 7, 9]
    assert known_words(corpora, {2}, Tokenizer()).tolist() == [5, 7, 9]  # too few are words
    twice = np.arange(2000, 4000)
    found = known_words({"a": np.arange(4000), "b": twice}, {2}, Tokenizer())
    assert set(twice[(twice % 3 > 0) & (twice % 7 > 1)].tolist()) < set(found.tolist())
    assert len(found) == 1024 and all(token % 3 and token % 7 > 1 for token in found.tolist())


@torch.no_grad()
def test_recall_equals_a_loop():
    model, made = zoo.build("llama"), list(pair_sequences(WORDS, LENGTH, 3, 2))[1]
    found = measure_recall(made, lambda what, ids: token_scores(model, ids))
    losses, right = [], []
    for ids, second in zip(made.ids, made.second, strict=True):
        logits = model(ids[None]).logits[0, second - 1]
        losses.append(cross_entropy(logits, ids[second]).item())
        right.append((logits.argmax(-1) == ids[second]).double().mean().item())
    assert (found.second.value, found.accuracy.value) == pytest.approx((np.mean(losses), np.mean(right)), abs=1e-5)
    assert found.second.stderr == pytest.approx(np.std(losses, ddof=1) / 3**0.5, rel=1e-3)
    assert (found.kind, found.size, found.first.count) == ("pairs", 16, 3)


def test_a_model_that_copies_recalls_all():
    def scores(what, ids):  # as one that says what followed the same token before
        nll, right = torch.full(ids[:, 1:].shape, 5.0).double(), torch.zeros_like(ids[:, 1:], dtype=torch.bool)
        for row, tokens in enumerate(ids.tolist()):
            followed = {}
            for i, (token, following) in enumerate(zip(tokens, tokens[1:], strict=False)):
                if followed.get(token) == following:
                    nll[row, i], right[row, i] = 0.0, True
                followed[token] = following
        return nll, right

    made = [*pair_sequences(WORDS, LENGTH, 4, None), *needle_sequences(WORDS + 97, zoo.tokens(4, 200), 200, 4, None)]
    for found in (measure_recall(sequences, scores) for sequences in made):
        assert (found.first.value, found.second.value, found.accuracy.value) == (5, 0, 1)


# running


@torch.no_grad()
def test_parity_is_that_of_a_model_and_of_one_that_decodes_otherwise(monkeypatch):
    ids = zoo.tokens(3, 40)
    for model in (zoo.build("llama"), zoo.convert(zoo.build("llama"), "llama/liger-gla", window=8)):
        found = measure_parity(model, ids, 12)
        assert (found.prompt, found.tokens, found.kl.count) == (27, 12, 3)
        assert found.difference < 1e-4 and found.kl.value < 1e-8 and found.agreement.value == 1
        assert abs(found.nll_difference.value) < 1e-5
    whole = model(ids).logits[:, 27:39].double().log_softmax(-1)
    original = model.forward

    @wraps(original)
    def forgets(input_ids, **kwargs):
        return original(input_ids, use_cache=False) if input_ids.shape[1] == 1 else original(input_ids, **kwargs)

    monkeypatch.setattr(model, "forward", forgets)
    found = measure_parity(model, ids, 12)
    alone = torch.cat([original(ids[:, i : i + 1]).logits for i in range(27, 39)], 1).double().log_softmax(-1)
    kl = (whole.exp() * (whole - alone)).sum(-1).mean()
    cost = (whole - alone).gather(-1, ids[:, 28:].unsqueeze(-1)).mean()
    assert found.kl.value == pytest.approx(kl.item(), rel=1e-4)
    assert found.nll_difference.value == pytest.approx(cost.item(), rel=1e-4)
    assert found.agreement.value == pytest.approx((whole.argmax(-1) == alone.argmax(-1)).double().mean().item())


@pytest.fixture(scope="module")
def corpora():
    return {name: zoo.tokens(1, 4 * LENGTH, seed)[0].numpy() for seed, name in enumerate(("books", "code"))}


@pytest.fixture(scope="module")
def probed(corpora) -> dict[str, Evaluation]:
    softmax = zoo.build("llama")
    converted = zoo.convert(zoo.build("llama"), "llama/liger-gla", window=8)
    probes = Probes(recall_rows=3, parity_rows=2, speed_runs=2, branch_rows=2, tokens=5)
    sizes = {"length": LENGTH, "batch_size": 2, "copy_tokens": 0, "max_windows": 2, "probes": probes}
    models = {"softmax": softmax, "converted": converted}
    return {name: evaluate(model, corpora, **sizes, name=name) for name, model in models.items()}


def test_probes_of_a_whole_evaluation(probed, corpora):
    softmax, converted = probed.values()
    assert [domain.windows for domain in converted.domains.values()] == [2, 2]
    assert [(found.kind, found.size) for found in converted.recall] == [
        ("pairs", 4), ("pairs", 16), ("needle", 64), ("needle", 128),
    ]  # fmt: skip
    for one, other in zip(softmax.recall, converted.recall, strict=True):
        assert one.sha256 == other.sha256 and one.second != other.second
    for found in (softmax, converted):
        assert (found.parity.kl.count, found.parity.prompt) == (2, LENGTH - 6)
        assert (found.speed.batch, found.speed.prompt, found.speed.decode.count) == (2, LENGTH, 2)
        assert min(found.speed.prefill.value, found.speed.decode.value) > 0 and found.speed.peak_bytes is None
    rows = [torch.from_numpy(tokens[:LENGTH])[None] for tokens in corpora.values()]
    model = zoo.convert(zoo.build("llama"), "llama/liger-gla", window=8)
    expected = [branches.measure(model, {"input_ids": ids}) for ids in rows]
    assert softmax.branches == {}
    for name in ("linear_gain", "linear_share", "half_life_50"):
        values = [measured[name] for measured in expected]
        assert converted.branches[name].value == pytest.approx(np.mean(values), rel=1e-4, abs=1e-5)
        assert converted.branches[name].count == 2


def test_probes_are_read_back(probed):
    for found in probed.values():
        assert Evaluation.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_tables_show_all_models(probed, tmp_path):
    softmax, converted = probed.values()
    comparison = compare(converted, softmax)
    tables = {table.title.split(":")[0]: table for table in probe_tables(comparison.named)}
    pairs = next(table for title, table in tables.items() if title.startswith("pairs"))
    assert list(pairs.columns[0].cells) == ["the first time", "softmax softmax", "converted converted"]
    shown = markdown(comparison)
    for found in probed.values():
        assert f"{found.speed.decode.value:,.0f} ± {found.speed.decode.stderr:,.0f}" in shown
        assert f"{found.recall[-1].second.value:.3f} ± {found.recall[-1].second.stderr:.3f}" in shown
    assert f"| layer 2 | {converted.branches['linear_share/2'].value:.3f}" in shown
    # sequences that are not the same are not put beside one another
    other = replace(softmax, recall=[replace(found, sha256="other") for found in softmax.recall])
    cells = list(probe_tables(compare(converted, other).named)[0].columns[1].cells)
    assert cells[1] == "–" != cells[2]
    plot(comparison, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
