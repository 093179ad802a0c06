"""The cross-entropy between softmax weights and those of linear and hybrid attention."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import SINKS, SLIDING, TERRACED_SINKS, Draw, Shape, difference, hybrid, linear
from torch.autograd import gradcheck

from surgery.kernels import Window, attention_cross_entropy, hybrid_attention, linear_attention

FORMS = {
    "linear": lambda d: linear(d) | {"scaling": 0.3},
    "linear-per-head": lambda d: linear(d, True) | {"scaling": 0.3, "limit": 9},
    "joint": lambda d: hybrid(d, SLIDING),
    "joint-terraced": lambda d: hybrid(d, TERRACED_SINKS, softcap=0.8),
    "logmass": lambda d: hybrid(d, SINKS, "logmass"),
    "logmass-raw": lambda d: hybrid(d, SINKS, "logmass", per_head=True, raw=True) | {"limit": 20},
}
every_form = pytest.mark.parametrize("form", FORMS)


def arguments(form: str, tokens: int = 150, dtype: torch.dtype = torch.float64, **shape) -> dict:
    made = FORMS[form](Draw(Shape(tokens, 4, 2, **shape), dtype))
    return {name: x for name, x in made.items() if name != "v"}


@every_form
def test_chunked_is_the_reference(form):
    call = arguments(form)
    extra = {"lengths": torch.tensor([150, 40]), "segments": (torch.arange(150) // 37).expand(2, -1)}
    for more in ({}, extra):
        found = attention_cross_entropy.chunked(**call, **more)
        assert found.dtype == torch.float64
        assert difference(found, attention_cross_entropy.reference(**call, **more)) < 1e-10
    assert (attention_cross_entropy(**call, **extra)[1, 40:] == 0).all()


@every_form
def test_is_the_entropy_of_the_weights_the_attention_uses(form):
    """One-hot values read the weights out of the attention itself."""
    call = arguments(form, 30, batch=1, dim=4)
    values = torch.eye(30, dtype=torch.float64).view(1, 30, 1, 30).expand(1, 30, 2, 30)
    limit = call.pop("limit", None)
    op = hybrid_attention if "window" in call else linear_attention
    weights = op.reference(
        v=values, **({**call} if "window" in call else {k: x for k, x in call.items() if k != "scaling"})
    )[0]
    scores = torch.einsum("bthd,bshd->bhts", call["q"], call["k"].repeat_interleave(2, 2)) * call["scaling"]
    if call.get("softcap"):
        scores = call["softcap"] * torch.tanh(scores / call["softcap"])
    distance = torch.arange(30)[:, None] - torch.arange(30)
    seen = (distance >= 0) & (distance < (limit or 30))
    p = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    expected = -(p * weights.transpose(1, 2).clamp(min=1e-300).log()).sum(-1).transpose(1, 2)
    assert difference(attention_cross_entropy(**call, limit=limit), expected) < 1e-8


@every_form
def test_gradients(form):
    call = arguments(form, 9, batch=1, dim=3)
    for name in ("q", "k"):
        call[name].requires_grad_()
    learned = [
        x for part in ("features_q", "features_k", "mix") for x in call.get(part, ()) if isinstance(x, torch.Tensor)
    ]
    for x in learned:
        x.requires_grad_()
    assert gradcheck(lambda *_: attention_cross_entropy(**call), (call["q"], call["k"], *learned))


def test_the_teachers_own_weights_cost_their_entropy():
    call = arguments("logmass", 40)
    call |= {"window": Window(40)}
    loss = attention_cross_entropy(**call)
    other = attention_cross_entropy(**call | {"window": SINKS})
    scores = torch.einsum("bthd,bshd->bhts", call["q"], call["k"].repeat_interleave(2, 2)) * call["scaling"]
    p = scores.masked_fill(torch.ones(40, 40).triu(1).bool(), float("-inf")).softmax(-1)
    assert difference(loss, torch.special.entr(p).sum(-1).transpose(1, 2)) < 1e-10
    assert (other - loss).min() > -1e-12
    assert (other - loss).max() > 1e-2
