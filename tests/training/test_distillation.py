"""The fused divergence is the dense one, in values and gradients, in a fraction of its memory."""

from __future__ import annotations

import weakref

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import surgery
from surgery.training import distillation
from surgery.training.distillation import distill, distillation_loss
from surgery.training.head import Head, Recorder, head_of, teach


def dense(student: Tensor, teacher: Tensor, divergence: str, temperature: float, top_k: int | None) -> Tensor:
    """The definition, on whole logits [N, V]."""
    if top_k is not None:
        smallest = teacher.topk(min(top_k, teacher.shape[1]), 1).values[:, -1:]
        teacher = teacher.masked_fill(teacher < smallest, float("-inf"))
    log_q, log_p = (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        a = log_a.exp()
        return torch.where(a > 0, a * (log_a - log_b), 0.0).sum(-1)

    log_m = ((log_p.exp() + log_q.exp()) / 2).log()
    found = {
        "kl": lambda: kl(log_p, log_q),
        "reverse_kl": lambda: kl(log_q, log_p),
        "js": lambda: (kl(log_p, log_m) + kl(log_q, log_m)) / 2,
    }[divergence]()
    return temperature**2 * found.mean()


CASES = [("kl", None), ("kl", 1), ("kl", 5), ("reverse_kl", None), ("js", None)]


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks that divide neither tokens nor vocabulary."""
    monkeypatch.setattr(distillation, "TOKENS", 5)
    monkeypatch.setattr(distillation, "COLUMNS", 7)


@pytest.mark.usefixtures("small_blocks")
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    case=st.sampled_from(CASES),
    sizes=st.tuples(st.integers(1, 13), st.integers(2, 31), st.integers(1, 6)),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    softcap=st.sampled_from([None, 4.0]),
    bias=st.booleans(),
    seed=st.integers(0, 9),
)
def test_it_is_the_dense_divergence(case, sizes, temperature, softcap, bias, seed):
    (divergence, top_k), (tokens, words, width) = case, sizes
    torch.manual_seed(seed)
    hidden, weight = torch.randn(tokens, width), 2 * torch.randn(words, width)
    given_bias = torch.randn(words) if bias else None
    teacher, teacher_head = torch.randn(tokens, width), Head(torch.randn(words, width), None, 1.5, softcap)

    def both(dtype: torch.dtype, fused: bool) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight, given_bias) if x is not None]
        head = Head(leaves[1], leaves[2] if bias else None, 1.5, softcap)
        other = teacher_head._replace(weight=teacher_head.weight.to(dtype))
        if fused:
            arguments = {"divergence": divergence, "temperature": temperature, "top_k": top_k}
            loss = distillation_loss(leaves[0][None], teacher.to(dtype)[None], head, other, **arguments)
        else:
            loss = dense(head(leaves[0]), other(teacher.to(dtype)), divergence, temperature, top_k)
        return [loss, *torch.autograd.grad(3 * loss, leaves)]

    for found, expected in zip(both(torch.float32, True), both(torch.float64, False), strict=True):
        assert (found - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())


def test_one_head_for_both_and_no_gradient_for_the_teacher():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 3, requires_grad=True), torch.randn(2, 4, 3, requires_grad=True)
    head = Head(torch.randn(11, 3))
    loss = distillation_loss(student, teacher, head)
    expected = dense(head(student).flatten(0, 1), head(teacher).flatten(0, 1), "kl", 1.0, None)
    assert torch.allclose(loss, expected, atol=1e-6)
    loss.backward()
    assert student.grad is not None
    assert teacher.grad is None
    with torch.no_grad():
        assert torch.equal(distillation_loss(student, teacher, head), loss)
    assert distillation_loss(student, student, head).abs() <= 1e-6


@pytest.mark.usefixtures("small_blocks")
def test_in_16_bits_it_is_as_good_as_dense_16_bit_logits():
    torch.manual_seed(0)
    student, teacher, weight = torch.randn(12, 16), torch.randn(12, 16), torch.randn(40, 16)
    exact = student.double().requires_grad_()
    expected = dense(Head(weight.double())(exact), Head(weight.double())(teacher.double()), "kl", 1.0, None)
    (exact_grad,) = torch.autograd.grad(expected, exact)
    low = student.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        plain = dense(*(Head(weight)(x).float() for x in (low, teacher)), "kl", 1.0, None)
        fused = distillation_loss(low, teacher, Head(weight))
    (plain_grad,), (fused_grad,) = torch.autograd.grad(plain, low), torch.autograd.grad(fused, low)
    assert (fused - expected).abs() <= 2 * (plain - expected).abs() + 1e-3
    assert zoo.relative(fused_grad, exact_grad) <= 2 * zoo.relative(plain_grad, exact_grad)
    assert fused_grad.dtype == torch.float32


class Peak(TorchDispatchMode):
    """The most bytes of tensors, made inside, that were alive at once."""

    def __init__(self, *before: Tensor) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen = {tensor.untyped_storage()._cdata for tensor in before}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return
        self.seen.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


@pytest.mark.parametrize(("divergence", "top_k"), [("kl", 64), ("reverse_kl", None), ("js", None)])
def test_8192_tokens_of_128k_words_take_less_than_a_gibibyte(divergence, top_k):
    """With tensors that have sizes but no memory: one copy of dense logits alone would be 4 GiB."""
    with FakeTensorMode():
        student, teacher = torch.empty(4, 2048, 1024, requires_grad=True), torch.empty(4, 2048, 1024)
        head = Head(torch.empty(131_072, 1024))
        with Peak(student, teacher, head.weight) as peak:
            distillation_loss(student, teacher, head, divergence=divergence, top_k=top_k).backward()
        assert 2**27 < peak.most < 2**29
        with Peak(student, teacher, head.weight) as peak:
            dense(head(student).flatten(0, 1), head(teacher).flatten(0, 1), "kl", 1.0, None).backward()
        assert peak.most > 2**34


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt", "gpt_neox"])
def test_hidden_states_and_head_make_the_models_logits(family):
    model, ids = zoo.convert(zoo.build(family), "llama/logmass", window=4), zoo.tokens(2, 12)
    recorder = Recorder(model)
    with recorder.recording() as calls:
        logits = model(ids).logits
    assert torch.equal(head_of(model)(calls.hidden[0]), logits)
    hidden, head = teach(model, *calls.inputs[0])
    with surgery.mode(model, "teacher"):
        assert torch.equal(head(hidden), model(ids).logits)
    recorder.remove()
    assert not model.get_decoder()._forward_hooks


def test_padding_does_not_count():
    model = zoo.convert(zoo.build("llama"), "llama/logmass", window=4)
    ids, mask = zoo.tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0

    def loss(rows: slice, columns: slice, **inputs) -> Tensor:
        inputs = {"input_ids": ids[rows, columns], **inputs}
        return distill(model, model.get_decoder()(**inputs)[0], **inputs)

    padded = loss(slice(0, 2), slice(0, 12), attention_mask=mask)
    apart = (12 * loss(slice(0, 1), slice(0, 12)) + 7 * loss(slice(1, 2), slice(0, 7))) / 19
    assert torch.allclose(padded, apart, atol=1e-5)
    assert padded > 1e-3


def test_what_makes_no_sense_is_refused():
    hidden, head = torch.zeros(2, 3), Head(torch.zeros(5, 3))
    with pytest.raises(surgery.SurgeryError, match="no divergence 'wasserstein': choose one of kl, reverse_kl, js"):
        distillation_loss(hidden, hidden, head, divergence="wasserstein")
    for arguments in ({"temperature": 0.0}, {"divergence": "js", "top_k": 4}, {"top_k": 0}):
        with pytest.raises(surgery.SurgeryError, match="the temperature is positive, and top_k"):
            distillation_loss(hidden, hidden, head, **arguments)
    headless = zoo.build("llama").model
    with pytest.raises(surgery.SurgeryError, match="LlamaModel has no LM head"):
        head_of(headless)
