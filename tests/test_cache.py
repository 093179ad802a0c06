"""Who may write into the state of a layer: the layer itself, where nobody could ask for what was there."""

from __future__ import annotations

import os

import pytest
import torch
import zoo
from torch import Tensor
from transformers import DynamicCache, StaticCache

from surgery import kernels
from surgery.cache import RecurrentLayer
from surgery.evaluation.history import _changed

RECIPES = ["llama/lolcats", "llama/liger-gla", "llama/logmass", "llama/hedgehog"]
LENGTH = 24
in_kernels = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="in the interpreter")
IDS = zoo.tokens(2, LENGTH)


def model(recipe: str = "llama/lolcats"):
    return zoo.convert(zoo.build("llama", num_hidden_layers=1), recipe, window=4)


def tensors(layer: RecurrentLayer) -> dict[str, int]:
    return {name: x.data_ptr() for name, x in layer.state.items()}


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in state.items()}


def same(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(x, other[name]) for name, x in state.items())


@torch.no_grad()
def prefilled(converted, kind=DynamicCache, tokens: int = 20):
    cache = kind(converted.config, max_cache_len=LENGTH) if kind is StaticCache else kind()
    converted(IDS[:, :tokens], **{zoo.CACHE: cache})
    return cache


def decode(converted, cache, start: int = 20, stop: int = LENGTH) -> Tensor:
    steps = [
        converted(IDS[:, t, None], position_ids=torch.full((2, 1), t), **{zoo.CACHE: cache}) for t in range(start, stop)
    ]
    return torch.cat([step.logits for step in steps], 1)


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@pytest.mark.parametrize("recipe", RECIPES)
def test_generated_tokens_are_written_in_place(recipe, kind):
    converted = model(recipe)
    with torch.no_grad():
        whole = converted(IDS).logits
        cache = prefilled(converted, kind)
        places = tensors(cache.layers[0])
        assert zoo.relative(decode(converted, cache), whole[:, 20:]) <= 1e-5
    assert tensors(cache.layers[0]) == places
    assert int(cache.get_seq_length()) == LENGTH


@in_kernels
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@pytest.mark.parametrize("recipe", RECIPES)
def test_kernels_decode(recipe, kind, monkeypatch):
    from surgery.kernels.triton import mixed_step, steps

    converted, ran = model(recipe), []
    for module in (mixed_step, steps):
        real = module._step
        monkeypatch.setattr(module, "_step", lambda *a, real=real: ran.append(real) or real(*a))
    with torch.no_grad():
        whole, cache = converted(IDS).logits, prefilled(converted, kind)
        with kernels.backend("triton"):
            assert zoo.relative(decode(converted, cache, 20, 22), whole[:, 20:22]) <= 1e-5
    assert len(ran) >= 2


@in_kernels
def test_kernels_decode_in_one_graph():
    torch._dynamo.reset()
    converted = model("llama/logmass")
    compiled = torch.compile(converted, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        whole, cache = converted(IDS).logits, prefilled(converted, StaticCache)
        places = tensors(cache.layers[0])
        with kernels.backend("triton"):
            assert zoo.relative(decode(compiled, cache, 20, 23), whole[:, 20:23]) <= 1e-5
    assert tensors(cache.layers[0]) == places


def test_a_recorded_state_stays_as_it_was():
    converted = model()
    cache = prefilled(converted)
    cache.activate_past_recording()
    layer = cache.layers[0]
    states, before = [], []
    with torch.no_grad():
        for t in range(20, 23):
            states.append(layer.state)
            before.append(copied(layer.state))
            decode(converted, cache, t, t + 1)
    assert all(same(state, kept) for state, kept in zip(states, before, strict=True))
    cache.crop(-3)
    assert same(layer.state, before[0])


def test_a_state_with_a_gradient_stays_as_it_was():
    converted = model()
    cache = prefilled(converted)
    layer = cache.layers[0]
    first, kept = layer.state, copied(layer.state)
    loss = decode(converted, cache, 20, 21).square().sum()
    assert same(first, kept)
    second, kept = layer.state, {name: x.detach().clone() for name, x in layer.state.items()}
    with torch.no_grad():
        decode(converted, cache, 21, 22)
    assert same(second, kept)
    loss.backward()
    assert all(p.grad is not None for name, p in converted.named_parameters() if "mixer" in name)


def test_a_state_of_inference_mode_can_be_continued_outside():
    converted = model()
    with torch.no_grad():
        whole, cache = converted(IDS).logits, DynamicCache()
    with torch.inference_mode():
        converted(IDS[:, :20], **{zoo.CACHE: cache})
        decode(converted, cache, 20, 21)
    with torch.no_grad():
        assert zoo.relative(decode(converted, cache, 21), whole[:, 21:]) <= 1e-5


def test_branches_of_a_cache_do_not_meet():
    """Reordered for beams, or copied to carry another history."""
    converted = model()
    cache = prefilled(converted)
    kept = copied(cache.layers[0].state)
    other = _changed(cache, lambda index, state: state)
    with torch.no_grad():
        decode(converted, other)
        assert same(cache.layers[0].state, kept)
        expected = decode(converted, other := _changed(cache, lambda index, state: state))
        cache.reorder_cache(torch.tensor([0, 0]))
        rows = [converted(IDS[:1, t, None].expand(2, 1), **{zoo.CACHE: cache}).logits for t in range(20, LENGTH)]
    both = torch.cat(rows, 1)
    assert torch.equal(both[0], both[1]) and zoo.relative(both[0], expected[0]) <= 1e-5
