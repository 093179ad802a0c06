"""docs/models.md: what it says of a few kinds of architecture is found again, and it speaks of every known family."""

from __future__ import annotations

import pytest
import torch
import transformers

import surgery
from benchmarks import coverage, parity
from benchmarks.tiny import tiny_model
from surgery.patchers.families import FAMILIES, REFUSED, WRAPPERS
from surgery.patchers.sites import find_family

WRITTEN = coverage.read(coverage.OUT)
SAMPLE = [
    "bert",  # an encoder used as a decoder, its projections named otherwise
    "deepseek_v3",  # latent attention, values narrower than keys
    "diffllama",  # refused
    "gpt_bigcode",  # one projection, one key/value head
    "gpt_oss",  # sinks, which are left out
    "llama4_text",  # scales that depend on the position in the cache
    "llava",  # a text model inside
    "mamba",  # nothing to convert
    "qwen3_next",  # softmax beside other recurrences, gated queries
]


@pytest.mark.skipif(f"transformers {transformers.__version__}:" not in coverage.OUT.read_text(), reason="other version")
@pytest.mark.parametrize("model_type", SAMPLE)
def test_sample_is_as_written(model_type, monkeypatch):
    # rounding in fp32 differs between machines; whether it is rounding does not
    monkeypatch.setattr(coverage, "_line", lambda error: "")
    found, written = coverage.examine(model_type), WRITTEN[model_type]
    assert (found.status, found.patcher) == (written.status, written.patcher)
    assert found.status in ("true", "refused")
    assert found.status == "true" or found.reason == written.reason


def test_every_family_is_written_and_right():
    assert set(WRITTEN) <= set(coverage.model_types())
    assert not [found for found in WRITTEN.values() if found.status == "wrong"]
    assert len({found.name for found in WRITTEN.values() if found.status == "true"}) >= 90
    converted = {found.model_type for found in WRITTEN.values() if found.status in ("true", "partly")}
    assert not converted & set(REFUSED) and not set(FAMILIES) & set(REFUSED)
    known = (set(FAMILIES) & set(WRITTEN)) | set(WRAPPERS)
    assert not [name for name in known if WRITTEN[name].status == "refused"]


def test_rows_are_read_as_written():
    lines = coverage.OUT.read_text(encoding="utf-8").splitlines()
    assert [found.row() for found in WRITTEN.values()] == [line for line in lines if line.startswith("| `")]
    assert coverage.markdown(list(WRITTEN.values())).splitlines()[-len(WRITTEN) :] == lines[-len(WRITTEN) :]


@pytest.mark.parametrize("fault", ["padding", "state", "queries"])
def test_faults_are_found(fault, monkeypatch):
    from surgery.patchers import interface

    if fault == "padding":
        for name in ("read_padding", "read_documents"):
            monkeypatch.setattr(interface, name, lambda *args: None)
    elif fault == "state":
        step = interface.RecurrentLayer.step

        def forgets(self, mixer, context, real):
            for tensor in (self.state or {}).values():
                tensor.zero_()
            return step(self, mixer, context, real)

        monkeypatch.setattr(interface.RecurrentLayer, "step", forgets)
    else:
        context = interface.Surgical.surgery_context
        wrong = lambda self, q, *rest: context(self, q.roll(1, 1), *rest)  # noqa: E731
        monkeypatch.setattr(interface.Surgical, "surgery_context", wrong)
    with pytest.raises(parity.Wrong):
        parity.Checker(tiny_model("llama")).run()


@pytest.mark.parametrize("model_type", ["deepseek_v3", "gpt_bigcode", "codegen", "qwen3_next", "dbrx", "persimmon"])
def test_raw_queries_and_keys(model_type):
    """What is read out of projections has the heads that attention sees."""
    model = tiny_model(model_type)
    parity.convert(model, "llama/lolcats", 8)
    attention = next(module for module in model.modules() if hasattr(module, "surgery_shape"))
    family, shape = find_family(model.config), attention.surgery_shape
    generator = torch.Generator().manual_seed(0)
    for name, read, heads in ((family.q, family.raw_q, shape.heads), (family.k, family.raw_k, shape.kv_heads)):
        projection = getattr(attention, name)
        out = torch.randn(1, 5, projection.out_features, generator=generator)
        flat = out if read is None else read(out, attention)
        assert flat.shape == (1, 5, heads * shape.head_dim)


@pytest.mark.parametrize(
    "layout",
    [
        {"multi_query": True, "new_decoder_architecture": False},
        {"multi_query": False, "new_decoder_architecture": False, "num_kv_heads": 4},
        {"new_decoder_architecture": True, "num_kv_heads": 2},
    ],
)
def test_layouts_of_falcon(layout):
    model = tiny_model("falcon", **layout)
    parity.Checker(model).run()
    ids = parity.tokens(2, 20)
    before = parity.logits(model, ids)
    parity.convert(model, "control/window-lora", 20)
    with surgery.mode(model, "transfer") as switch:
        assert parity.relative(parity.logits(model, ids), before) <= 1e-5
        # a window over all tokens is the softmax that it imitates
        assert len(switch.losses) == 3 and max(switch.losses.values()) <= 1e-9


@pytest.mark.parametrize("model_type", ["deepseek_v3", "llava", "bart"])
def test_transfer_passes_the_softmax_on(model_type):
    model, ids = tiny_model(model_type), parity.tokens(2, 20)
    before = parity.logits(model, ids)
    parity.convert(model, "control/window-lora", 20)
    with surgery.mode(model, "transfer") as switch:
        assert torch.equal(parity.logits(model, ids), before)
        assert max(switch.losses.values()) <= 1e-9


def test_attention_run_twice_is_refused():
    """Whatever a table says, one state cannot serve two calls."""
    from dataclasses import replace

    from surgery.patchers import families, sites

    sites.FAMILIES["diffllama"] = replace(families.FAMILIES["llama"], attention="DiffLlamaAttention")
    try:
        model = tiny_model("diffllama")
        parity.convert(model, "llama/lolcats", 8)
        with pytest.raises(surgery.SurgeryError, match="calls attention several times"):
            parity.logits(model, parity.tokens(1, 9))
    finally:
        del sites.FAMILIES["diffllama"]
