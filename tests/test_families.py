"""Every family under every shipped recipe: one answer, however the tokens are fed."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import zoo
from torch import Tensor
from transformers import PreTrainedModel

import surgery

RECIPES = ["llama/lolcats", "llama/liger-gla", "llama/hedgehog", "llama/logmass"]
CASES = [pytest.param(family, recipe, id=f"{family}-{recipe[6:]}") for family in zoo.FAMILIES for recipe in RECIPES]
# a gate that reads the layer's input, which families hand over in their own ways
CASES += [pytest.param(family, "llama/lizard", id=f"{family}-lizard") for family in ("llama", "gemma3", "gpt2")]
CASES.append(pytest.param("qwen3", "llama/liger-gsa", id="qwen3-liger-gsa"))
WINDOW = 8
LENGTH = 40
TOLERANCE = 1e-5
every_case = pytest.mark.parametrize(("family", "recipe"), CASES)


@functools.lru_cache(maxsize=2)
def converted(family: str, recipe: str) -> PreTrainedModel:
    return zoo.convert(zoo.build(family), recipe, window=WINDOW)


@functools.lru_cache(maxsize=2)
def draft(family: str, recipe: str) -> PreTrainedModel:
    """Guesses often right and often wrong: the same weights with one layer disturbed."""
    model = zoo.convert(zoo.build(family), recipe, window=WINDOW)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.get_output_embeddings().parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=noise))
    return model


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor, **kwargs) -> Tensor:
    return model(ids, **{"use_cache": False, **kwargs}).logits


def feed(model: PreTrainedModel, ids: Tensor, sizes: list[int], cache=None) -> tuple[Tensor, object]:
    """Logits of `ids` fed in chunks of `sizes` tokens."""
    parts = []
    with torch.no_grad():
        for chunk in ids.split(sizes, dim=1):
            output = model(chunk, **{zoo.CACHE: cache}, use_cache=True)
            cache = output[zoo.CACHE]
            parts.append(output.logits)
    return torch.cat(parts, 1), cache


@every_case
def test_state_carries_and_any_chunking_agrees(family, recipe):
    model, ids = converted(family, recipe), zoo.tokens(2, LENGTH)
    whole = logits(model, ids)

    for sizes in ([17, 12, *[1] * 11], [1] * LENGTH, [3, 30, 7]):
        pieces, _ = feed(model, ids, sizes)
        assert zoo.relative(pieces, whole) <= TOLERANCE, sizes
    double = copy.deepcopy(model).double()
    pieces, _ = feed(double, ids, [17, 12, *[1] * 11])
    assert zoo.relative(pieces, logits(double, ids)) <= 1e-12

    # a recurrence that carries nothing would pass the above: emptying its state must be felt
    _, cache = feed(model, ids[:, :30], [30])
    zoo.empty_recurrence(cache)
    rest, _ = feed(model, ids[:, 30:], [10], cache)
    assert zoo.relative(rest, whole[:, 30:]) > 1e-2


@every_case
def test_padding_changes_nothing(family, recipe):
    model = converted(family, recipe)
    rows = [zoo.tokens(1, length, seed=length) for length in (LENGTH, 29, 11)]
    alone = [logits(model, row)[0] for row in rows]
    for side in ("left", "right"):
        ids, mask = zoo.pad(rows, side)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        batch = logits(model, ids, attention_mask=mask, position_ids=positions)
        for row, expected in enumerate(alone):
            assert zoo.relative(batch[row][mask[row].bool()], expected) <= TOLERANCE, side


@every_case
def test_padded_prefill_then_decode(family, recipe):
    model = converted(family, recipe)
    rows = [zoo.tokens(1, length + 6, seed=length) for length in (31, 12)]
    alone = [logits(model, row)[0, -6:] for row in rows]
    for side in ("left", "right"):
        ids, mask = zoo.pad([row[:, :-6] for row in rows], side)
        cache, got = None, []
        with torch.no_grad():
            output = model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0), use_cache=True)
            cache = output[zoo.CACHE]
            for step in range(6):
                new = torch.cat([row[:, row.shape[1] - 6 + step, None] for row in rows])
                mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
                positions = mask.sum(-1, keepdim=True) - 1
                output = model(new, attention_mask=mask, position_ids=positions, **{zoo.CACHE: cache}, use_cache=True)
                got.append(output.logits[:, 0])
        got = torch.stack(got, 1)
        for row, expected in enumerate(alone):
            assert zoo.relative(got[row], expected) <= TOLERANCE, side


@every_case
def test_generation_modes_agree(family, recipe):
    model, prompt = converted(family, recipe), zoo.tokens(2, 26)

    def generate(ids: Tensor, **kwargs) -> Tensor:
        torch.manual_seed(0)
        return model.generate(
            ids, **{"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, **kwargs}
        )

    greedy = generate(prompt, use_cache=False)
    assert greedy.shape == (2, 34)
    assert torch.equal(generate(prompt), greedy)
    assert torch.equal(generate(prompt, cache_implementation="static"), greedy)
    assert torch.equal(generate(prompt, prefill_chunk_size=7), greedy)
    assert torch.equal(generate(prompt[:1], prompt_lookup_num_tokens=3), greedy[:1])
    assert torch.equal(generate(prompt[:1], assistant_model=draft(family, recipe)), greedy[:1])
    assert torch.equal(generate(prompt, num_beams=4), generate(prompt, num_beams=4, use_cache=False))
    sampling = {"do_sample": True, "num_return_sequences": 3}
    assert torch.equal(generate(prompt, **sampling), generate(prompt, **sampling, use_cache=False))

    short = prompt[1:, :15]
    ids, mask = zoo.pad([prompt[:1], short], "left")
    for kind in ("dynamic", "static"):
        padded = generate(ids, attention_mask=mask, cache_implementation=kind)
        assert torch.equal(padded[0], greedy[0]) and torch.equal(padded[1, 26:], generate(short)[0, 15:]), kind

    first = generate(prompt, max_new_tokens=4, return_dict_in_generate=True)
    assert torch.equal(generate(first.sequences, **{zoo.CACHE: first[zoo.CACHE]}, max_new_tokens=4), greedy)


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_rollback_is_exact(family):
    for recipe in RECIPES:
        model, ids = converted(family, recipe), zoo.tokens(1, LENGTH)
        whole = logits(model, ids)
        _, cache = feed(model, ids[:, :20], [20])
        cache.activate_past_recording()
        feed(model, zoo.tokens(1, 9, seed=5), [4, 5], cache)
        cache.crop(-9)
        feed(model, torch.cat([ids[:, 20:23], zoo.tokens(1, 4, seed=6)], 1), [7], cache)
        cache.crop(-4)
        rest, _ = feed(model, ids[:, 23:], [17], cache)
        assert zoo.relative(rest, whole[:, 23:]) <= TOLERANCE
        with pytest.raises(surgery.SurgeryError, match="take back 18 tokens"):
            cache.crop(-18)


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_training_with_default_cache_and_checkpointing(family):
    for recipe in RECIPES:
        model = zoo.convert(zoo.build(family), recipe, window=WINDOW).train()
        ids = zoo.tokens(2, LENGTH)

        def gradients(**kwargs) -> dict[str, Tensor]:
            model.zero_grad()
            model(ids, labels=ids, **kwargs).loss.backward()
            return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

        plain = gradients(use_cache=False)
        missing = [name for name, _ in model.named_parameters() if ".mixer." in name and name not in plain]
        assert not missing
        assert all(torch.isfinite(grad).all() for grad in plain.values())
        for name, grad in gradients().items():
            assert zoo.relative(grad, plain[name]) <= 1e-4, name
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for name, grad in gradients(use_cache=False).items():
            assert zoo.relative(grad, plain[name]) <= 1e-4, name


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mistral"])
def test_packed_documents_do_not_meet(family, recipe):
    model = converted(family, recipe)
    rows = [zoo.tokens(1, length, seed=length) for length in (13, 27, 1, 9)]
    apart = torch.cat([logits(model, row) for row in rows], 1)
    ids, positions = torch.cat(rows, 1), torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
    for use_cache in (False, True):
        packed = logits(model, ids, position_ids=positions, use_cache=use_cache)
        assert zoo.relative(packed, apart) <= TOLERANCE
    bounds = torch.tensor([0, 13, 40, 41, 50], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 27, "max_length_k": 27}
    assert zoo.relative(logits(model, ids, position_ids=positions, **lengths), apart) <= TOLERANCE


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_some_layers_keep_softmax(family, recipe):
    model = zoo.convert(zoo.build(family), recipe, window=WINDOW, layers=[0, -1])
    assert model.surgery.layers == (0, 2)
    ids = zoo.tokens(2, LENGTH)
    whole = logits(model, ids)
    pieces, _ = feed(model, ids, [17, 12, *[1] * 11])
    assert zoo.relative(pieces, whole) <= TOLERANCE
    padded, mask = zoo.pad([ids[:1], ids[1:, :25]], "left")
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    batch = logits(model, padded, attention_mask=mask, position_ids=positions)
    assert zoo.relative(batch[0], whole[0]) <= TOLERANCE
    assert zoo.relative(batch[1, -25:], whole[1, :25]) <= TOLERANCE
    greedy = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False, cache_implementation="static"), greedy)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False), greedy)


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_raw_keys_are_the_projections_own_output(family):
    """In bf16, before norms and rotation, also once an adapter has wrapped the projection."""
    from peft import LoraConfig, inject_adapter_in_model

    model = zoo.convert(zoo.build(family, dtype=torch.bfloat16), "llama/liger-gla", window=WINDOW)
    attention = zoo.attentions(model)[1]
    for adapter in (False, True):
        if adapter:
            names = {attention.surgery_family.q, attention.surgery_family.k}
            inject_adapter_in_model(LoraConfig(r=2, target_modules=list(names), init_lora_weights=False), model)
        seen = {}
        attention.mixer.register_forward_pre_hook(lambda _, args: seen.update(context=args[0]))
        projection = getattr(attention, attention.surgery_family.k)
        projection.register_forward_hook(lambda _, args, output: seen.update(output=output))
        logits(model, zoo.tokens(2, 9))
        expected = zoo.raw_keys(attention, seen["output"])
        assert seen["context"].raw_k.dtype == torch.bfloat16
        assert torch.equal(seen["context"].raw_k.flatten(2), expected)
