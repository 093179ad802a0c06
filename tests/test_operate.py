"""One verb on whatever holds a model; every refusal is one sentence and leaves no trace."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import zoo
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DiffLlamaConfig,
    DynamicCache,
    FalconConfig,
    GPTNeoConfig,
    MambaConfig,
    MptConfig,
    PreTrainedModel,
    StaticCache,
)

import surgery
from surgery.cache import RecurrentLayer
from surgery.mixers.linear import LinearMixer

RECIPES = ["llama/lolcats", "llama/liger-gla", "llama/hedgehog", "llama/logmass"]
IDS = zoo.tokens(2, 30)


def convert(model: nn.Module, recipe: str = "llama/lolcats", **kwargs: Any) -> nn.Module:
    return zoo.convert(model, recipe, window=8, **kwargs)


@torch.no_grad()
def logits(model: nn.Module, **kwargs: Any) -> Tensor:
    return model(IDS, use_cache=False, **kwargs).logits


@contextmanager
def untouched(model: PreTrainedModel) -> Iterator[None]:
    """Whatever is refused inside leaves weights, classes, attributes, configs and outputs as they were."""

    def look() -> tuple:
        modules = {path: (type(module), sorted(vars(module))) for path, module in model.named_modules()}
        hooks = {path: len(module._forward_hooks) for path, module in model.named_modules()}
        return modules, hooks, type(model.config), model.config.to_dict(), model.config._attn_implementation

    before, weights, output = look(), copy.deepcopy(model.state_dict()), logits(model)
    yield
    assert look() == before
    after = model.state_dict()
    assert list(after) == list(weights) and all(torch.equal(after[name], weights[name]) for name in weights)
    assert torch.equal(logits(model), output)


def refusal(model: Any, recipe: Any = "llama/lolcats", **kwargs: Any) -> str:
    with pytest.raises(surgery.SurgeryError) as caught:
        surgery.apply(model, recipe, **kwargs)
    return str(caught.value)


# what can hold a model


@pytest.fixture(scope="module")
def expected() -> Tensor:
    """What every way of converting the same model must give."""
    return logits(convert(zoo.build("llama")))


def test_peft_model(expected):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(zoo.build("llama"), lora).eval()
    assert convert(model) is model
    assert model.surgery is model.get_base_model().surgery and model.surgery.layers == (0, 1, 2)
    other = get_peft_model(convert(zoo.build("llama")), lora).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(model), logits(other))
    assert zoo.relative(logits(model), expected) > 1e-2
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("how", ["wrapped", "in place", "layer by layer"])
def test_compiled_model(how):
    model = original = zoo.build("llama", num_hidden_layers=1)
    before, expected = logits(original), logits(convert(zoo.build("llama", num_hidden_layers=1)))
    if how == "wrapped":
        model = torch.compile(original, backend="eager")
    elif how == "in place":
        original.compile(backend="eager")
    else:
        for index, layer in enumerate(original.model.layers):
            original.model.layers[index] = torch.compile(layer, backend="eager")
    assert torch.equal(logits(model), before)  # what was compiled for softmax must not be run again
    assert convert(model) is model
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(surgery.revert(model)), before)


def test_lightning_module(expected):
    from lightning import LightningModule

    class Task(LightningModule):
        def __init__(self, **models: nn.Module):
            super().__init__()
            for name, model in models.items():
                setattr(self, name, model)
            self.head = nn.Linear(2, 2)

    task = Task(net=zoo.build("llama"))
    assert convert(task) is task
    assert task.surgery is task.net.surgery
    assert torch.equal(logits(task.net), expected)
    surgery.revert(task)
    assert not hasattr(task, "surgery") and torch.equal(logits(task.net), logits(zoo.build("llama")))

    two = Task(student=zoo.build("llama"), teacher=zoo.build("gpt2"))
    with untouched(two.student), untouched(two.teacher):
        assert refusal(two) == (
            "Task holds several models: student (LlamaForCausalLM), teacher (GPT2LMHeadModel); say which by passing it "
            "itself, e.g. surgery.apply(module.student, recipe)"
        )


def test_hooked_forwards_are_rebound(expected, tmp_path):
    """What device_map leaves on a model: an instance-level forward bound to the class as it was."""
    from accelerate import dispatch_model
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Count(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    model, hook = zoo.build("llama"), Count()
    before = logits(model)
    for layer in model.model.layers:
        add_hook_to_module(layer.self_attn, hook)
    convert(model)
    assert torch.equal(logits(model), expected) and hook.calls == 3
    assert torch.equal(logits(surgery.revert(model)), before) and hook.calls == 6

    outside = {f"model.{name}": "cpu" for name in ("embed_tokens", "norm", "rotary_emb")}
    layers = {f"model.layers.{index}": "disk" if index == 1 else "cpu" for index in range(3)}
    devices = {**outside, **layers, "lm_head": "cpu"}
    model = dispatch_model(zoo.build("llama"), devices, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert model.model.layers[1].self_attn.q_proj.weight.is_meta
    convert(model)
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(surgery.revert(model)), before)


@pytest.mark.parametrize("recipe", ["llama/lolcats", "llama/liger-gla"])
def test_copies_are_equal_and_independent(recipe):
    model = convert(zoo.build("llama"), recipe)
    before, original = logits(model), logits(zoo.build("llama"))
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)]
    greedy = model.generate(IDS, max_new_tokens=4, do_sample=False)
    for twin in copies:
        assert type(twin) is type(model) and torch.equal(logits(twin), before)
        assert torch.equal(twin.generate(IDS, max_new_tokens=4, do_sample=False), greedy)
        with surgery.mode(twin, "teacher"):
            assert torch.equal(logits(twin), original) and torch.equal(logits(model), before)
        assert torch.equal(logits(surgery.revert(twin)), original)
    assert torch.equal(logits(model), before)


def test_converted_class_answers_like_the_original():
    """transformers reads the source of a class's module to know what may be set; generated classes have none."""
    model = convert(zoo.build("mixtral"))
    before = logits(model)
    model.set_experts_implementation("batched_mm")
    assert model.config._experts_implementation == "batched_mm"
    assert zoo.relative(logits(model), before) <= 1e-5
    model.set_attn_implementation("eager")
    assert torch.equal(logits(model, attention_mask=torch.ones_like(IDS)), logits(model))
    assert zoo.relative(logits(model), before) <= 1e-5


# what is refused


def test_unknown_recipe():
    model = zoo.build("llama")
    with untouched(model):
        assert refusal(model, "lama/lolcats").startswith(
            "no recipe named 'lama/lolcats'; did you mean 'llama/lolcats'? `surgery recipes` lists all "
        )


def test_recipe_with_three_mistakes():
    model, mix = zoo.build("llama"), {"kind": "joint"}
    mixer = {"kind": "linear", "feature_map": {"kind": "hedgehogg"}, "window": {"sise": 8}, "mix": mix, "state": "hed"}
    with untouched(model):
        assert refusal(model, {"mixer": mixer}).split("\n")[:3] == [
            "recipe: mixer.feature_map.kind: expected 'hedgehog', 'softmax', 'exp', 'relu', 'silu', 'elu1', "
            "'taylor2' or 'identity', found 'hedgehogg'; did you mean 'hedgehog'?",
            "recipe: mixer.state: expected 'kv_head' or 'head', found 'hed'; did you mean 'head'?",
            "recipe: mixer.window.sise: unknown key; did you mean 'size'?",
        ]


SMALL = dict(vocab_size=zoo.VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
SPECIAL = dict(bos_token_id=1, eos_token_id=2)
BY_ITSELF = "it computes attention by itself instead of through transformers' AttentionInterface"
ALIBI = "all it knows of positions is a bias on softmax scores (ALiBi), which mixers do not have"
GLOBAL = [[["global"], 2]]
SEE = "docs/models.md lists the models that are supported"


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            FalconConfig(**SMALL, **SPECIAL, alibi=True),
            f"FalconForCausalLM (falcon) cannot be converted: {ALIBI}; {SEE}",
        ),
        (
            BloomConfig(vocab_size=zoo.VOCAB, hidden_size=32, n_layer=2, n_head=4),
            f"BloomForCausalLM (bloom) cannot be converted: {ALIBI}; {SEE}",
        ),
        (
            MptConfig(vocab_size=zoo.VOCAB, d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
            f"MptForCausalLM (mpt) cannot be converted: {ALIBI}; {SEE}",
        ),
        (
            GPTNeoConfig(vocab_size=zoo.VOCAB, hidden_size=32, num_layers=2, num_heads=4, attention_types=GLOBAL),
            f"GPTNeoForCausalLM (gpt_neo) cannot be converted: {BY_ITSELF}; {SEE}",
        ),
        (
            DiffLlamaConfig(**SMALL, intermediate_size=48, num_key_value_heads=4),
            "DiffLlamaForCausalLM (diffllama) cannot be converted: it runs attention twice over the same queries and "
            f"keys, to subtract one from the other; {SEE}",
        ),
        (
            MambaConfig(vocab_size=zoo.VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4),
            f"MambaForCausalLM (mamba) cannot be converted: it has no attention; {SEE}",
        ),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_other_architectures(config, sentence):
    model = AutoModelForCausalLM.from_config(config).eval()
    with untouched(model):
        assert refusal(model) == sentence


def test_already_converted():
    model = convert(zoo.build("llama"))
    for part, name in ((model, "SurgeryLlamaForCausalLM"), (model.model, "LlamaModel")):
        with untouched(model):
            assert refusal(part, "llama/liger-gla") == (
                f"this {name} is already converted (to linear, hedgehog, sliding window 8, joint): call "
                "surgery.revert(model) first, or load the original again"
            )


def test_what_is_no_model_or_comes_too_late():
    assert refusal("gpt2") == (
        "surgery operates on torch modules, not on str: pass a loaded model, or use "
        "surgery.from_pretrained(name, recipe=...)"
    )
    assert refusal(nn.Linear(2, 2)).startswith("no Hugging Face model found in Linear: ")
    model = zoo.build("llama")
    with untouched(model):
        assert refusal(nn.DataParallel(model)) == (
            "the model is already wrapped by DataParallel: apply surgery before wrapping, so that new parameters are "
            "wrapped too"
        )
        for layers, what in (([7, 0], r"layers \[7\] do not exist"), ([], "no layer was chosen")):
            assert re.match(f"{what}: the model has layers 0 to 2", refusal(model, layers=layers))
    attention = model.model.layers[1].self_attn
    attention.forward = attention.forward  # as libraries do that patch instances
    with untouched(model):
        assert refusal(model) == (
            "the forward of model.layers.1.self_attn was replaced on the instance (by another library?): apply surgery "
            "before that patch"
        )


def test_failing_in_the_middle_of_the_layers(monkeypatch):
    real = LinearMixer.__init__

    def failing(self, config, shape):
        if shape.layer == 1 and torch.get_default_device().type != "meta":
            raise MemoryError("no room for layer 1")
        real(self, config, shape)

    monkeypatch.setattr(LinearMixer, "__init__", failing)
    model = zoo.build("llama")
    with untouched(model), pytest.raises(MemoryError, match="layer 1"):
        convert(model)
    assert not hasattr(model, "surgery")


def test_inspect_touches_nothing():
    model = zoo.build("llama")
    with untouched(model):
        report = surgery.inspect(model, "llama/logmass", layers=[0, 2])
    assert report == surgery.apply(model, "llama/logmass", layers=[0, 2]).surgery.report
    with torch.device("meta"):
        assert surgery.inspect(AutoModelForCausalLM.from_config(zoo.CONFIGS["llama"]), "llama/logmass", layers=[0, 2])


# what a converted model cannot serve


def block_mask() -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, q, k: q >= k, 2, 1, IDS.shape[1], IDS.shape[1], device="cpu")


@pytest.mark.parametrize("layers", [None, [1]], ids=["all", "one"])
def test_masks_that_cannot_be_followed(layers):
    model = convert(zoo.build("llama"), layers=layers)
    ones = torch.ones(2, 1, IDS.shape[1], IDS.shape[1], dtype=torch.bool)
    hole = ones.tril()
    hole[:, :, 20, 4] = False
    with untouched(model):
        if layers is None:  # sdpa layers refuse it themselves
            with pytest.raises(surgery.SurgeryError, match="cannot read a BlockMask: .* attn_implementation='sdpa'"):
                logits(model, attention_mask=block_mask())
        for mask in (ones, ones.tril(3), hole):
            with pytest.raises(surgery.SurgeryError, match="not causal over real tokens, .* usual .* attention_mask"):
                logits(model, attention_mask=mask)
    causal = ones.tril()
    assert zoo.relative(logits(model, attention_mask=causal), logits(model)) <= 1e-6
    additive = torch.zeros(ones.shape).masked_fill(~causal, -1e9)
    assert zoo.relative(logits(model, attention_mask=additive), logits(model)) <= 1e-6


def test_tree_masks_over_a_filled_cache():
    model, cache = convert(zoo.build("llama")), DynamicCache()
    with torch.no_grad():
        model(IDS[:, :26], **{zoo.CACHE: cache})
        mask = torch.ones(2, 1, 4, 30, dtype=torch.bool).tril(26)
        mask[..., 3, 27] = False  # the last token follows another branch
        with pytest.raises(surgery.SurgeryError, match="not causal over real tokens"):
            model(IDS[:, 26:], attention_mask=mask, **{zoo.CACHE: cache})


def test_continuous_batching():
    model = convert(zoo.build("llama"))
    for start in (model.generate_batch, model.init_continuous_batching):
        with pytest.raises(surgery.SurgeryError, match="continuous batching .* use model.generate"):
            start([[3, 4, 5]])
    with pytest.raises(surgery.SurgeryError, match=r"keeps paged keys and values \(object\), .* use model.generate"):
        zoo.attentions(model)[0](hidden_states=torch.zeros(1, 2, 32), cache=object())


# what decoding holds


def allocated(cache: DynamicCache) -> int:
    """Bytes of all storage that the layers of a cache keep alive, be it through a view."""
    storages = {}
    for layer in cache.layers:
        assert isinstance(layer, RecurrentLayer)
        for held in (vars(layer), vars(layer.replaced), layer.state):
            tensors = [value for value in held.values() if isinstance(value, Tensor)]
            storages |= {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_decode_memory_is_what_the_report_says_at_any_length(recipe, dtype):
    model = surgery.apply(zoo.build("llama", dtype=dtype, max_position_embeddings=8192), recipe)
    held = {}
    for length in (64, 4096):
        ids, cache = zoo.tokens(2, length + 2), DynamicCache()
        with torch.no_grad():
            model(ids[:, :length], **{zoo.CACHE: cache}, logits_to_keep=1)
            for step in range(length, length + 2):
                model(ids[:, step, None], **{zoo.CACHE: cache})
        held[length] = allocated(cache)
        assert sum(layer.nbytes for layer in cache.layers) == held[length]
    assert held[64] == held[4096] == 2 * model.surgery.report.state_bytes
    assert model.surgery.report.state_bytes == sum(layer.state_bytes for layer in model.surgery.report.converted) > 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_compiled_decoding_over_a_static_cache(recipe):
    """No graph break, one graph for all steps, no new buffers."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model = convert(zoo.build("llama", num_hidden_layers=1), recipe)
    whole, cache = logits(model), StaticCache(model.config, max_cache_len=40)
    counter = CompileCounterWithBackend("eager")
    step = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        model(IDS[:, :20], **{zoo.CACHE: cache})
        buffers = [tensor.data_ptr() for layer in cache.layers for tensor in layer.state.values()]
        for index in range(20, 30):
            position = torch.full((2, 1), index)
            got = step(IDS[:, index, None], position_ids=position, **{zoo.CACHE: cache}).logits[:, 0]
            assert zoo.relative(got, whole[:, index]) <= 1e-5
    assert counter.frame_count == 1
    assert [tensor.data_ptr() for layer in cache.layers for tensor in layer.state.values()] == buffers
