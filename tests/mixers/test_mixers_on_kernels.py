"""Mixers whose operations have kernels run on them, whole calls and single steps."""

from __future__ import annotations

import os

import pytest
import torch
from mixer_cases import build, close, context, span

from surgery import kernels

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels run on a GPU or in the interpreter", allow_module_level=True)

triton = pytest.importorskip("surgery.kernels.triton")

ON = {
    "liger": "channel_attention",
    "gla-constant": "channel_attention",
    "hgrn2": "channel_attention",
    "gsa": "slot_attention",
    "lightning": "decay_attention",
    "lightning-z": "decay_attention",
    "lizard": "decay_attention",
    "norm": "decay_attention",
    "diag": "mixed_attention",
}


@pytest.mark.parametrize(("name", "kernel"), ON.items())
def test_runs_on_kernels(name, kernel, monkeypatch):
    """Nothing is left to the chunked forms, and what comes out is theirs."""
    module = triton.hybrid if kernel == "mixed_attention" else triton
    run, ran = getattr(module, kernel), []
    mixer, call = build(name, torch.float32), context(12, dtype=torch.float32)
    with torch.no_grad():
        expected, _ = mixer(call)
    monkeypatch.setattr(module, kernel, lambda *a, **k: ran.append(kernel) or run(*a, **k))
    for op in kernels.OPS.values():
        monkeypatch.setattr(op, "chunked", None)
        monkeypatch.setattr(triton.chunked, op.name, None, raising=False)
    with torch.no_grad(), kernels.backend("triton"):
        found, state = mixer(span(call, 0, 11), return_state=True)
        assert ran == [kernel]
        assert close(torch.cat([found, mixer.step(span(call, 11, 12), state)], 1), expected, 1e-4)


@pytest.mark.parametrize("name", ["lightning-learned", "lightning-z", "norm"])
def test_constant_decays_are_not_copied(name, monkeypatch):
    """One number per head, and its gradient."""
    run, gates = triton.decay_attention, []
    monkeypatch.setattr(triton, "decay_attention", lambda *a, **k: gates.append(k["log_decay"].shape) or run(*a, **k))
    mixer, call = build(name, torch.float32, window=None, mix=None), context(12, dtype=torch.float32)
    wanted = [x for x in mixer.gate.parameters() if x.requires_grad]
    found = []
    for backend in ("triton", "chunked"):
        with kernels.backend(backend):
            total = (mixer(call)[0] * call.q).sum()
        found.append(torch.autograd.grad(total, wanted) if wanted else ())
    assert gates == [(mixer.state_heads,)]
    assert close(*found, 1e-4)
