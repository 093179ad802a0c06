"""How far a student's next-token distribution is from a teacher's, without ever holding the logits of either.

The LM head and the divergence are one operation over blocks of tokens and of the vocabulary, which also makes the
gradients; in the backward pass they are only scaled.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from ..errors import SurgeryError
from .head import Calls, Head, head_of, teach

Divergence = Literal["kl", "reverse_kl", "js"]

TOKENS, COLUMNS = 1024, 8192
"""Of one block of logits: 32 MiB in fp32."""
EMPTY = -1e30
"""log 0, but finite, so that differences are."""


class Spec(NamedTuple):
    """What to compute. top_k: the teacher's distribution is that of its k likeliest tokens; None: of all. gradients:
    whether anything may be differentiated."""

    divergence: Divergence = "kl"
    temperature: float = 1.0
    top_k: int | None = None
    gradients: bool = True


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    head: Head,
    teacher_head: Head | None = None,
    *,
    divergence: Divergence = "kl",
    temperature: float = 1.0,
    top_k: int | None = None,
) -> Tensor:
    """T² D(softmax(t / T), softmax(s / T)) with the logits s and t that the heads give, the mean over tokens (fp32).

    student, teacher: hidden states [..., C] before the LM head. teacher_head: None: that of the student.
    divergence: kl is KL(teacher ‖ student), reverse_kl the other way round, js half of both against their mean.
    temperature: T; the factor T² keeps gradients of one size. top_k: only with kl.
    Gradients flow to `student` and the parameters of `head`, none to the teacher. Sums are in fp32; products of hidden
    states and weights in their dtype, or that of autocast.

    Raises:
        SurgeryError: an unknown divergence, a temperature that is not positive, or top_k without kl.
    """
    if divergence not in get_args(Divergence):
        raise SurgeryError(f"there is no divergence {divergence!r}: choose one of {', '.join(get_args(Divergence))}")
    if not temperature > 0 or (top_k is not None and (divergence != "kl" or top_k < 1)):
        raise SurgeryError(
            f"distillation with {divergence}, temperature {temperature}, top_k {top_k}: the temperature is positive, "
            "and top_k, at least 1, leaves the teacher no weight elsewhere, which only kl can compare with"
        )
    other = head if teacher_head is None else teacher_head
    device = student.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else student.dtype
    spec = Spec(divergence, temperature, top_k, torch.is_grad_enabled())
    with torch.autocast(device, enabled=False):
        return _Distillation.apply(
            student.flatten(0, -2), head.weight, head.bias, teacher.detach().flatten(0, -2), head, other, spec, dtype
        )


def distill(
    model: PreTrainedModel,
    hidden: Tensor,
    *args: Any,
    divergence: Divergence = "kl",
    temperature: float = 1.0,
    top_k: int | None = None,
    **inputs: Any,
) -> Tensor:
    """`distillation_loss` of a converted model against the same weights as the softmax teacher, which runs here.

    hidden: [B, T, C], what `model.get_decoder()(*args, **inputs)[0]` gave, with gradients. A two-dimensional
    `attention_mask` among the inputs leaves padding out of the mean.
    """
    calls = Calls([(args, inputs)], [hidden])
    return distill_calls(model, calls, divergence=divergence, temperature=temperature, top_k=top_k)


def distill_calls(model: PreTrainedModel, calls: Calls, **how: Any) -> Tensor:
    """As `distill`, over the tokens of all `calls` together."""
    students, teachers, head = [], [], head_of(model)
    teacher_head = head
    for hidden, (args, inputs) in zip(calls.hidden, calls.inputs, strict=True):
        teacher, teacher_head = teach(model, args, inputs)
        mask = inputs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            hidden, teacher = hidden[mask.bool()], teacher[mask.bool()]
        students.append(hidden.flatten(0, -2))
        teachers.append(teacher.flatten(0, -2))
    return distillation_loss(torch.cat(students), torch.cat(teachers), head, teacher_head, **how)


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher: Tensor,
        head: Head,
        teacher_head: Head,
        spec: Spec,
        dtype: torch.dtype,
    ) -> Tensor:
        blocks = Blocks(student, teacher, head, teacher_head, spec, dtype)
        loss, center = blocks.loss()
        wanted = tuple(spec.gradients and needed for needed in ctx.needs_input_grad[:3])
        ctx.dtype, ctx.gradients = student.dtype, blocks.gradients(center, wanted)
        return loss.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "the gradients of a distillation are scaled in place, so there is only one backward pass"
            )
        # a copy would be as large as the LM head
        hidden, weight, bias = (None if x is None else x.mul_(grad) for x in ctx.gradients)
        ctx.gradients = None
        return None if hidden is None else hidden.to(ctx.dtype), weight, bias, *[None] * 5


class Blocks:
    """Student and teacher over N tokens and V words, a block of both at a time."""

    def __init__(
        self, student: Tensor, teacher: Tensor, head: Head, teacher_head: Head, spec: Spec, dtype: torch.dtype
    ) -> None:
        self.student, self.teacher, self.head, self.teacher_head = student, teacher, head, teacher_head
        self.spec, self.dtype = spec, dtype
        self.tokens, self.words = student.shape[0], head.weight.shape[0]
        self.log_q, self.log_p = self._full(EMPTY), self._full(EMPTY)  # the normalisers
        self.threshold = None if spec.top_k is None else self._threshold(min(spec.top_k, self.words))

    def loss(self) -> tuple[Tensor, Tensor]:
        """Of every token [N], and what a gradient subtracts there [N]."""
        kind, scale = self.spec.divergence, self.spec.temperature**2
        mean = self._full(0.0)
        for columns, rows in self._blocks():
            s, t = self._student(rows, columns), self._teacher(rows, columns)
            difference = t - s if kind == "kl" else s - t
            if self.threshold is not None:
                outside = t < self.threshold[rows, None]
                difference, t = difference.masked_fill(outside, 0), t.masked_fill(outside, EMPTY)
            # a running mean of the difference under the distribution of those words that came so far
            weights, total = (t, self.log_p) if kind == "kl" else (s, self.log_q)
            before = total[rows].clone()
            self.log_q[rows] = torch.logaddexp(self.log_q[rows], s.logsumexp(-1))
            self.log_p[rows] = torch.logaddexp(self.log_p[rows], t.logsumexp(-1))
            after = total[rows]
            new = ((weights - after[:, None]).exp() * difference).sum(-1)
            mean[rows] = mean[rows] * (before - after).exp() + new
        if kind == "kl":
            return scale * (mean - self.log_p + self.log_q), mean
        if kind == "reverse_kl":
            loss = mean - self.log_q + self.log_p
            return scale * loss, loss
        return self._jensen_shannon()

    def gradients(self, center: Tensor, wanted: tuple[bool, ...]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of the mean loss, for the student's hidden states [N, C] in fp32, weight [V, C] and bias [V]."""
        head = self.head
        hidden = torch.zeros_like(self.student, dtype=torch.float32) if wanted[0] else None
        weight = torch.empty_like(head.weight) if wanted[1] else None
        bias = torch.empty_like(head.bias) if wanted[2] and head.bias is not None else None
        for start in range(0, self.words if any(wanted) else 0, COLUMNS):
            columns = slice(start, start + COLUMNS)
            part = head.weight[columns].to(self.dtype)
            sums, total = torch.zeros_like(part, dtype=torch.float32), part.new_zeros(len(part), dtype=torch.float32)
            for first in range(0, self.tokens, TOKENS):
                rows = slice(first, first + TOKENS)
                raw = self._gradient(rows, columns, center[rows, None])
                low = raw.to(self.dtype)  # not divided by N yet: fp16 would not hold that
                if hidden is not None:
                    hidden[rows] += low @ part
                if weight is not None:
                    sums += low.mT @ self.student[rows].to(self.dtype)
                total += raw.sum(0)
            if weight is not None:
                weight[columns] = sums.div_(self.tokens)
            if bias is not None:
                bias[columns] = total / self.tokens
        return None if hidden is None else hidden.div_(self.tokens), weight, bias

    def _gradient(self, rows: slice, columns: slice, center: Tensor) -> Tensor:
        """Of the summed loss, for the products of hidden states and weights in one block, in fp32."""
        s, slope = self.head.logits(self.student[rows], columns, self.dtype, slope=True)
        log_q = s / self.spec.temperature - self.log_q[rows, None]
        t = self._teacher(rows, columns)
        log_p = t - self.log_p[rows, None]
        if self.spec.divergence == "kl":
            p = log_p.exp()
            gradient = log_q.exp() - (p if self.threshold is None else p * (t >= self.threshold[rows, None]))
        elif self.spec.divergence == "reverse_kl":
            gradient = log_q.exp() * (log_q - log_p - center)
        else:
            gradient = 0.5 * log_q.exp() * (log_q - _log_mean(log_p, log_q) - center)
        return gradient * slope * self.spec.temperature

    def _jensen_shannon(self) -> tuple[Tensor, Tensor]:
        to_q, to_p = self._full(0.0), self._full(0.0)
        for columns, rows in self._blocks():
            log_q = self._student(rows, columns) - self.log_q[rows, None]
            log_p = self._teacher(rows, columns) - self.log_p[rows, None]
            log_m = _log_mean(log_p, log_q)
            to_q[rows] += (log_q.exp() * (log_q - log_m)).sum(-1)
            to_p[rows] += (log_p.exp() * (log_p - log_m)).sum(-1)
        return self.spec.temperature**2 * (to_q + to_p) / 2, to_q

    def _threshold(self, k: int) -> Tensor:
        """The k-th largest of the teacher's logits: [N]."""
        best = self.teacher.new_full((self.tokens, k), float("-inf"), dtype=torch.float32)
        for columns, rows in self._blocks():
            seen = torch.cat([best[rows], self._teacher(rows, columns)], 1)
            best[rows] = seen.topk(k, dim=1).values
        return best[:, -1]

    def _student(self, rows: slice, columns: slice) -> Tensor:
        return self.head.logits(self.student[rows], columns, self.dtype)[0] / self.spec.temperature

    def _teacher(self, rows: slice, columns: slice) -> Tensor:
        return self.teacher_head.logits(self.teacher[rows], columns, self.dtype)[0] / self.spec.temperature

    def _full(self, value: float) -> Tensor:
        return self.student.new_full((self.tokens,), value, dtype=torch.float32)

    def _blocks(self) -> Iterator[tuple[slice, slice]]:
        for start in range(0, self.words, COLUMNS):
            for first in range(0, self.tokens, TOKENS):
                yield slice(start, start + COLUMNS), slice(first, first + TOKENS)


def _log_mean(log_p: Tensor, log_q: Tensor) -> Tensor:
    return torch.logaddexp(log_p, log_q) - 0.6931471805599453
