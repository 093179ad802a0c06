"""Every form of every operation: chunked equals the reference; cutting, padding or packing a call changes nothing."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import FORMS, Call, Shape, difference, gradients

from surgery.kernels import linear_attention

LENGTHS = (1, 15, 63, 65, 200)
GROUPS = (Shape(70, 2, 2, 8), Shape(70, 3, 1, 16), Shape(70, 8, 1, 8), Shape(70, 8, 2, 20))


def both(call: Call, **changes):
    return call.run("chunked", **changes), call.run("reference", **changes)


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("form", FORMS)
def test_chunked_is_the_reference(form, tokens):
    shape = Shape(tokens, batch=1)
    chunked, exact = both(Call.of(form, shape))
    assert difference(chunked, exact) < 1e-10
    single = Call.of(form, shape, torch.float32).run("chunked")
    assert single[0].dtype == torch.float32
    assert difference(single, exact) < 1e-5


@pytest.mark.parametrize("shape", GROUPS, ids=str)
@pytest.mark.parametrize(
    "form",
    [
        "linear-per-head",
        "gated-channel",
        "delta-channel",
        "slots",
        "mesa",
        "window-sinks",
        "joint-sinks",
        "logmass-per-head",
    ],
)
def test_head_layouts(form, shape):
    assert difference(*both(Call.of(form, shape))) < 1e-10


@pytest.mark.parametrize("form", FORMS)
def test_continues_from_a_state(form):
    call = Call.of(form, Shape(150, batch=1))
    state = call.span(0, 80).run("reference")[1]
    rest = call.span(80, 150)
    assert difference(*both(rest, state=state)) < 1e-10


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_the_references(form):
    call = Call.of(form, Shape(70, batch=1))
    state = call.span(0, 20).run("reference")[1]
    rest = call.span(20, 70)
    assert difference(gradients(rest, "chunked", state), gradients(rest, "reference", state)) < 1e-9


@pytest.mark.parametrize(
    "cuts", [(1, 2, 3, 40, 41), (64, 128), (30,), tuple(range(1, 90))], ids=["few", "blocks", "two", "tokens"]
)
@pytest.mark.parametrize("form", FORMS)
def test_any_split_is_one_call(form, cuts):
    call = Call.of(form, Shape(150))
    whole = call.run()
    outputs, state = [], None
    edges = (0, *cuts, 150)
    for start, stop in zip(edges, edges[1:], strict=False):
        y, state = call.span(start, stop).run(state=state)
        outputs.append(y)
    assert difference((torch.cat(outputs, 1), state), whole) < 1e-10


@pytest.mark.parametrize("form", FORMS)
def test_no_state_is_the_empty_state(form):
    call = Call.of(form, Shape(30), torch.float32)
    empty = call.empty_state()
    before = {name: x.clone() for name, x in empty.items()}
    found = call.run(state=empty)
    assert difference(found, call.run()) < 1e-6
    assert {name: (x.shape, x.dtype) for name, x in found[1].items()} == {
        name: (x.shape, x.dtype) for name, x in sorted(empty.items())
    }
    assert all(torch.equal(empty[name], x) for name, x in before.items()), "the incoming state was written to"


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("form", FORMS)
def test_padding_changes_nothing(form, backend):
    lengths = torch.tensor([70, 3, 0, 65])
    call = Call.of(form, Shape(70, batch=4))
    state = call.span(0, 9).run(backend, lengths=torch.tensor([9, 2, 5, 0]))[1]
    for before in (None, state):
        y, after = call.run(backend, state=before, lengths=lengths)
        assert y.isfinite().all()
        for row, length in enumerate(lengths.tolist()):
            own = None if before is None else {name: x[row : row + 1] for name, x in before.items()}
            if length == 0:
                expected = call.empty_state() if own is None else own
                kept = {name: x[row : row + 1] for name, x in after.items()}
                expected = {name: x[:1] for name, x in expected.items()}
                assert difference(kept, expected) < 1e-10
                continue
            single, single_after = call.row(row).span(0, length).run(backend, state=own)
            assert difference(y[row, :length], single[0]) < 1e-10
            assert difference({name: x[row : row + 1] for name, x in after.items()}, single_after) < 1e-10


@pytest.mark.parametrize("form", FORMS)
def test_padding_has_no_gradient(form):
    lengths = torch.tensor([50, 3])
    call = Call.of(form, Shape(70))
    ours = gradients(call, "chunked", lengths=lengths)
    assert difference(ours, gradients(call, "reference", lengths=lengths)) < 1e-9


@pytest.mark.parametrize("form", FORMS)
def test_padding_may_hold_anything(form):
    """Masked softmax elsewhere can leave NaNs at padding: they must not reach outputs, states or gradients."""
    lengths = torch.tensor([50, 3])
    clean = Call.of(form, Shape(70))
    padding = (torch.arange(70) >= lengths[:, None])[:, :, None]
    dirty = clean.map(lambda x: x.masked_fill(padding if x.ndim == 3 else padding[..., None], float("nan")))
    y, state = dirty.run(lengths=lengths)
    expected, expected_state = clean.run(lengths=lengths)
    assert difference((y[:1, :50], y[1:, :3], state), (expected[:1, :50], expected[1:, :3], expected_state)) < 1e-10
    ours = gradients(dirty, "chunked", lengths=lengths)
    assert difference(ours, gradients(clean, "chunked", lengths=lengths)) < 1e-10


DOCUMENTS = {"many": (3, 1, 60, 2, 9, 75), "aligned": (64, 64, 22), "one": (150,)}


@pytest.mark.parametrize("sizes", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("form", FORMS)
def test_packing_is_separate_documents(form, sizes):
    call = Call.of(form, Shape(160, batch=1))
    segments = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))[None]
    state = call.span(150, 160).run()[1]
    call = call.span(0, 150)
    for before in (None, state):
        y, after = call.run(state=before, segments=segments)
        start, outputs, single = 0, [], before
        for index, size in enumerate(sizes):
            piece, single = call.span(start, start + size).run(state=before if index == 0 else None)
            outputs.append(piece)
            start += size
        assert difference((y, after), (torch.cat(outputs, 1), single)) < 1e-10
        assert difference((y, after), call.run("reference", state=before, segments=segments)) < 1e-10


@pytest.mark.parametrize(
    "form",
    [
        "linear",
        "gated-channel",
        "delta-channel",
        "slots",
        "mesa",
        "window-sinks",
        "joint-terraced-sinks",
        "logmass-sliding",
    ],
)
def test_packed_rows_that_differ(form):
    call = Call.of(form, Shape(100, batch=3))
    segments = torch.tensor([[0] * 100, [0] * 7 + [1] * 93, [0] * 64 + [1] * 36])
    for lengths in (None, torch.tensor([100, 80, 60])):
        changes = {"segments": segments, "lengths": lengths}
        y, after = call.run(**changes)
        expected, expected_after = call.run("reference", **changes)
        if lengths is not None:
            y = y * (torch.arange(100) < lengths[:, None])[:, :, None, None]
        assert difference((y, after), (expected, expected_after)) < 1e-10


@pytest.mark.parametrize(
    "form",
    [
        "linear",
        "gated-channel",
        "gated-normalized",
        "delta",
        "delta-channel",
        "slots",
        "mesa",
        "joint-terraced-sinks",
        "logmass-sliding",
    ],
)
def test_packed_gradients(form):
    call = Call.of(form, Shape(90, batch=1))
    segments = torch.tensor([[0] * 5 + [1] * 70 + [2] * 15])
    ours = gradients(call, "chunked", segments=segments)
    assert difference(ours, gradients(call, "reference", segments=segments)) < 1e-9


def test_autocast_does_not_reach_the_mathematics():
    """It rounds what comes in, as it does for torch's own attention, and nothing else."""
    call = Call.of("linear", Shape(40), torch.float32).map(torch.Tensor.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = linear_attention(**call.arguments)
    assert torch.equal(y, linear_attention(**call.arguments)[0])
