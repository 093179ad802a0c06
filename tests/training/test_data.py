"""Rows that keep documents apart, and an order of them that resumes exactly on any number of processes."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
import zoo
from data_cases import documents
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import surgery
from surgery import SurgeryError
from surgery.training.data.corpus import Corpus
from surgery.training.data.loader import HealingLoader
from surgery.training.data.module import HealingData
from surgery.training.data.order import ChosenDomains, MixedRows, ShuffledRows
from surgery.training.data.rows import Rows, model_inputs, ranges_of, split
from surgery.training.data.tokens import windows
from surgery.training.mixing import DomainSampler, SharedProbabilities

few = settings(max_examples=25, deadline=None, derandomize=True)


@few
@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.lists(st.integers(1, 9), min_size=1, max_size=5)), min_size=1),
    st.integers(1, 12),
    st.booleans(),
)
def test_rows_are_cut_as_by_hand(parts, length, by_domain):
    corpora = [documents(*lengths, domain=name, seed=seed) for seed, (name, lengths) in enumerate(parts)]
    names = list(dict.fromkeys(corpus.domain for corpus in corpora))
    # [domain, token, whether it starts a document], one a token
    flat = {
        name: [
            (names.index(name), t, i in c.starts) for c in corpora if c.domain == name for i, t in enumerate(c.tokens)
        ]
        for name in names
    }
    streams = list(flat.values()) if by_domain else [sum(flat.values(), [])]
    expected = [s[at : at + length] for s in streams for at in range(0, len(s) - length + 1, length)]
    if not expected or (by_domain and any(len(stream) < length for stream in streams)):
        with pytest.raises(SurgeryError, match="hold no window"):
            Rows(corpora, length, by_domain=by_domain)
        return
    rows, stream = (Rows(corpora, length, packing, by_domain=by_domain) for packing in ("documents", "stream"))
    assert len(rows) == len(stream) == len(expected)
    for index, cut in enumerate(expected):
        row, position = rows[index], -1
        positions, labels = [], []
        for place, (_, token, starts) in enumerate(cut):
            position = 0 if starts or place == 0 else position + 1
            positions.append(position)
            labels.append(-100 if position == 0 else token)
        tokens = [token for _, token, _ in cut]
        assert row["input_ids"].tolist() == stream[index]["input_ids"].tolist() == tokens
        assert (row["position_ids"].tolist(), row["labels"].tolist()) == (positions, labels)
        assert stream[index]["labels"].tolist() == tokens and "position_ids" not in stream[index]
        assert int(row["ids"]) == index and int(row["domains"]) == cut[0][0]
        assert index in rows.ranges[cut[0][0]]
    assert sum(map(len, rows.ranges)) == len(rows)


def test_a_stream_and_its_held_out_rows_are_what_they_were():
    """The windows of all text, a hundredth of them held out, in the order of torch's permutations."""
    corpora = [documents(501, 40, domain="a"), documents(7, domain="b", seed=1), documents(2000, domain="c", seed=2)]
    everything = windows(np.concatenate([corpus.tokens for corpus in corpora]), 7)
    held = torch.linspace(0, len(everything) - 1, 3).long()
    kept = np.delete(np.arange(len(everything)), held)
    data = HealingData(corpora, sequence_length=7, batch_size=4, packing="stream", seed=3, count=150)
    assert torch.equal(torch.cat([batch["input_ids"] for batch in data.val_dataloader()]), everything[held])
    orders = [
        torch.randperm(len(kept), generator=torch.Generator().manual_seed(3 * 1_000_003 + epoch)) for epoch in (0, 1)
    ]
    expected = everything[kept][torch.cat(orders)][:600].view(150, 4, 7)
    assert torch.equal(torch.stack([batch["input_ids"] for batch in data.train_dataloader()]), expected)


def test_held_out_rows_and_their_domains():
    rows = Rows([documents(400, domain="a"), documents(100, domain="b", seed=1)], 1)
    train, held = split(rows)
    assert len(held) == 5 and not set(train.indices) & set(held.indices)
    assert [len(own) for own in ranges_of(train)] == [400 - 4, 100 - 1]
    for domain, own in enumerate(ranges_of(train)):
        assert {int(train[place]["domains"]) for place in own} == {domain}
    with pytest.raises(SurgeryError, match="one window of 500 tokens, and one is held out"):
        split(Rows(rows.corpora, 500))
    with pytest.raises(SurgeryError, match=r"domain 'b': 100 tokens hold no window of 101"):
        Rows(rows.corpora, 101, by_domain=True)
    with pytest.raises(IndexError):
        rows[500]


@pytest.mark.parametrize("kind", ["softmax", "llama/logmass", "llama/liger-gla", "teacher"])
def test_a_packed_document_has_the_loss_that_it_has_alone(kind):
    """Also one that began in the row before, and one of a single token."""
    lengths, length = (13, 1, 9, 22, 3, 30), 26
    ids = zoo.tokens(1, sum(lengths))[0].numpy()
    rows = Rows([Corpus("a", ids, np.cumsum([0, *lengths[:-1]]))], length)
    batch = torch.utils.data.default_collate([rows[index] for index in range(len(rows))])
    model = zoo.build("llama")
    if kind != "softmax":
        model = zoo.convert(model, "llama/logmass" if kind == "teacher" else kind, window=4)

    def losses(**inputs) -> torch.Tensor:
        labels = inputs.pop("labels")
        with torch.no_grad():
            logits = model(**inputs).logits[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none")

    def check() -> None:
        found = losses(**model_inputs(batch)).view(len(rows), -1)
        whole = model(**model_inputs(batch)).loss
        alone = torch.zeros_like(found)
        for row, positions in enumerate(batch["position_ids"].tolist()):
            bounds = [place for place, position in enumerate(positions) if position == 0] + [length]
            for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
                if stop - start > 1:
                    document = batch["input_ids"][row : row + 1, start:stop]
                    alone[row, start : stop - 1] = losses(input_ids=document, labels=document)
        assert (alone > 0).sum() == (batch["labels"][:, 1:] != -100).sum() > 60
        assert (found - alone).abs().max() < 1e-5 * alone.max()
        assert torch.allclose(whole, alone.sum() / (alone > 0).sum(), rtol=1e-5)
        # and the boundaries do matter
        unbounded = losses(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).view(len(rows), -1)
        assert (unbounded - alone).abs().max() > 1e-2

    if kind == "teacher":
        with surgery.mode(model, "teacher"):
            check()
    else:
        check()


worlds = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(0, 9)), min_size=1, max_size=6)
"""Runs one after the other: processes, rows of each one's batch, and batches until it is killed."""


def run_ranks(make, runs) -> list[int]:
    """The rows that all processes saw, run by run, in the order of their batches."""
    state, seen = None, []
    for world, batch_size, batches in runs:
        loaders = [HealingLoader(*make(), batch_size, rank=rank, world=world) for rank in range(world)]
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(state)
        passes = [iter(loader) for loader in loaders]
        for _ in range(batches):
            try:
                seen += [int(row) for own in passes for row in next(own)["ids"]]
            except StopIteration:
                passes = [iter(loader) for loader in loaders]
        states = [loader.state_dict() for loader in loaders]
        assert all(str(other) == str(states[0]) for other in states)
        state = pickle.loads(pickle.dumps(states[0]))
    return seen


@few
@given(st.integers(1, 40), st.integers(0, 3), worlds)
def test_epochs_are_partitions_on_any_processes(count, seed, runs):
    rows = Rows([documents(count)], 1)
    seen = run_ranks(lambda: (rows, ShuffledRows(count, seed)), runs)
    assert seen == ShuffledRows(count, seed).take(len(seen))
    for start in range(0, len(seen) - count + 1, count):
        assert sorted(seen[start : start + count]) == list(range(count))


@few
@given(worlds, st.booleans(), st.integers(0, 3))
def test_mixed_rows_resume_on_any_processes(runs, sampled, seed):
    rows = Rows([documents(size, domain=name) for name, size in (("a", 3), ("b", 17), ("c", 8))], 1)

    def order() -> MixedRows:
        if sampled:
            shared = SharedProbabilities(np.array([0.2, 0.5, 0.3]))
            return MixedRows(rows.ranges, DomainSampler(shared, 4, seed=seed), seed)
        return MixedRows(rows.ranges, ChosenDomains(lambda step: step * step % 3, 3, 2), seed)

    seen = run_ranks(lambda: (rows, order()), runs)
    assert seen == order().take(len(seen))
    for own in rows.ranges:
        drawn = [row for row in seen if row in own]
        for start in range(0, len(drawn) - len(own) + 1, len(own)):
            assert sorted(drawn[start : start + len(own)]) == list(own)
    if not sampled:
        domains = [next(d for d, own in enumerate(rows.ranges) if row in own) for row in seen]
        assert domains == [(place // 2) ** 2 % 3 for place in range(len(seen))]


def test_orders_differ_between_epochs_seeds_and_domains():
    order = ShuffledRows(50, 1)
    epochs = [order.take(50) for _ in range(3)] + [ShuffledRows(50, 2).take(50)]
    assert len({tuple(epoch) for epoch in epochs}) == 4
    mixed = MixedRows([range(50), range(50, 100)], ChosenDomains(lambda step: step % 2, 2))
    rows = mixed.take(200)
    orders = {tuple(row % 50 for row in rows[first::2][start : start + 50]) for first in (0, 1) for start in (0, 50)}
    assert len(orders) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_what_workers_have_ahead_is_not_lost(workers):
    rows = Rows([documents(40)], 1)
    expected = ShuffledRows(40).take(60)

    def loader() -> HealingLoader:
        return HealingLoader(rows, ShuffledRows(40), 3, num_workers=workers)

    def take(loader, batches: int) -> list[int]:
        own = iter(loader)
        return [int(row) for _ in range(batches) for row in next(own)["ids"]]

    first = loader()
    before = torch.get_rng_state()
    seen = take(first, 4)
    state = first.state_dict()
    seen += take(first, 2)  # a second pass over the same loader
    assert seen == expected[:18]
    second = loader()
    second.load_state_dict(state)
    assert len(second) == 14
    seen = seen[:12] + [int(row) for batch in second for row in batch["ids"]]
    assert seen == expected[:42]  # the last batch is filled up from the next epoch
    assert torch.equal(torch.get_rng_state(), before)
    assert take(second, 3) == expected[42:51]


def test_an_order_of_other_data_is_refused():
    state = HealingLoader(Rows([documents(40)], 1), ShuffledRows(40), 3).state_dict()
    other = HealingLoader(Rows([documents(41)], 1), ShuffledRows(41), 3)
    with pytest.raises(SurgeryError, match="the checkpoint was of 40 rows of data, and there are 41 now"):
        other.load_state_dict(state)
    with pytest.raises(SurgeryError, match=r"choose_domain\(0\) is 2, and there are 2 domains"):
        next(ChosenDomains(lambda step: 2, 2))
    with pytest.raises(SurgeryError, match=r"domains \[1\] have no rows to draw"):
        MixedRows([range(3), range(3, 3)], ChosenDomains(lambda step: 0, 2))
