"""`evaluate`: everything that is measured of one model, domain by domain."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import SurgeryError
from ..patchers.interface import converted_layers
from ..patchers.sites import find_model
from ..progress import Progress
from ..training.data.tokens import check_vocabulary, windows
from . import history, recall
from .losses import check_length, measuring, token_nll
from .memory import measure_memory
from .probes import Probes, run_probes
from .provenance import provenance
from .result import (
    ENOUGH_WINDOWS,
    DomainResult,
    Evaluation,
    HistoryAblation,
    mean,
    mean_stderr,
    position_buckets,
    stderr,
)


def evaluate(
    model: nn.Module,
    corpora: Mapping[str, np.ndarray],
    *,
    length: int = 1024,
    batch_size: int = 8,
    copy_tokens: int = 400,
    copy_pieces: int | None = 64,
    max_windows: int | None = None,
    probes: Probes | None = None,
    tokenizer: Any = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure a causal language model, converted or not, on its own device, in eval mode, without gradients.

    model: a Hugging Face model, alone or inside a PeftModel, a compiled module or a LightningModule.
    corpora: domain -> [N] tokens, as `read_corpora` gives them; cut into windows of `length`, the rest is dropped.
    copy_tokens: length of the pieces that are written twice to see what is recalled; 0: do not.
    copy_pieces: at most this many pieces a domain, spread evenly over it; None: all.
    max_windows: only the first so many of each domain; None: all.
    probes: what to measure beyond losses; by default nothing. tokenizer: the model's, for tasks and, if there is one,
        for the words to recall.
    name: what to call the model; by default, where it was loaded from. progress: see `Progress`.

    Raises:
        SurgeryError: a domain without one window, a token the model does not know, a length it has no positions for,
            or a task that cannot be run.
    """
    inner: Any = find_model(model)
    check_length(inner, length, copy_tokens)
    check_vocabulary(corpora, inner.config.get_text_config(decoder=True).vocab_size)
    rows = {domain: _windows(domain, tokens, length)[:max_windows] for domain, tokens in corpora.items()}
    if not rows:
        raise SurgeryError("no data to evaluate on: corpora is empty")
    start = recall.start_token(inner.config)
    copies = {domain: recall.twice(ids, copy_tokens, copy_pieces, start) for domain, ids in rows.items()}
    report = progress or (lambda what, done, total: None)
    with measuring(inner) as device:
        ablate = history.has_history(inner) and length >= 4
        domains = {}
        for domain, ids in rows.items():
            result = _Measuring(inner, device, batch_size, domain, report)
            domains[domain] = _domain(result, ids, copies[domain], copy_tokens, ablate)
        memory = measure_memory(inner, next(iter(rows.values()))[:1].to(device))
        settings = {"batch_size": batch_size, "tokenizer": tokenizer, "report": report}
        probed = {} if probes is None else run_probes(inner, rows, probes, **settings)
    mean_over = [domain for domain, result in domains.items() if result.windows >= ENOUGH_WINDOWS]
    counted = [domains[domain] for domain in mean_over]
    return Evaluation(
        model=name or inner.config._name_or_path or type(inner).__name__,
        attention=describe_attention(inner),
        length=length,
        domains=domains,
        mean_over=mean_over,
        nll=sum(result.nll for result in counted) / len(counted) if counted else None,
        stderr=mean_stderr(result.stderr for result in counted),
        history_used=_history_used(counted or list(domains.values())) if ablate else None,
        memory=memory,
        provenance=provenance(inner),
        **probed,
    )


def describe_attention(model: nn.Module) -> str:
    """A few words: which mixer, in how many layers."""
    layers = list(converted_layers(model).values())
    if not layers:
        return "softmax"
    mixers = " / ".join(dict.fromkeys(layer.mixer.describe() for layer in layers))
    total = layers[0].surgery_shape.layers
    return mixers if len(layers) == total else f"{mixers} in {len(layers)} of {total} layers"


class _Measuring:
    """One domain's way through the model, batch by batch."""

    def __init__(self, model: nn.Module, device: torch.device, batch_size: int, domain: str, report: Progress):
        self.model, self.device, self.batch_size = model, device, batch_size
        self.domain, self.report = domain, report

    def batches(self, what: str, ids: Tensor, slices: list[slice]) -> Iterator[tuple[slice, Tensor]]:
        done = 0
        for rows in slices:
            self.report(f"{self.domain}: {what}", done, len(ids))
            yield rows, ids[rows].to(self.device)
            done += len(ids[rows])
        self.report(f"{self.domain}: {what}", done, len(ids))

    def losses(self, what: str, ids: Tensor) -> Tensor:
        """[n, T - 1]"""
        slices = [slice(start, start + self.batch_size) for start in range(0, len(ids), self.batch_size)]
        return torch.cat([token_nll(self.model, batch) for _, batch in self.batches(what, ids, slices)])

    def history(self, ids: Tensor) -> HistoryAblation:
        found: dict[str, Tensor] = {}
        for rows, batch in self.batches("history", ids, history.groups(len(ids), self.batch_size)):
            for name, nll in history.ablated_nll(self.model, batch).items():
                found.setdefault(name, torch.empty(len(ids), dtype=nll.dtype))[rows] = nll
        return history.ablation(found)


def _domain(measuring: _Measuring, ids: Tensor, copies: Tensor | None, copy_tokens: int, ablate: bool) -> DomainResult:
    nll = measuring.losses("loss", ids)
    by_window, by_position = nll.mean(1), nll.mean(0)
    ranges = {name: nll[:, where].mean(1) for name, where in position_buckets(ids.shape[1]).items()}
    return DomainResult(
        windows=len(ids),
        tokens_sha256=hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
        nll=by_window.mean().item(),
        stderr=stderr(by_window),
        by_position={name: mean(values) for name, values in ranges.items()},
        window_nll=by_window.tolist(),
        position_nll=[round(value, 4) for value in by_position.tolist()],
        window_by_position={name: [round(value, 5) for value in values.tolist()] for name, values in ranges.items()},
        copy=None if copies is None else recall.copy_recall(measuring.losses("copies", copies), copy_tokens),
        history=measuring.history(ids) if ablate else None,
    )


def _windows(domain: str, tokens: np.ndarray, length: int) -> Tensor:
    try:
        return windows(tokens, length)
    except SurgeryError as error:
        raise SurgeryError(f"{domain}: {error}") from None


def _history_used(results: list[DomainResult]) -> bool:
    found = [result.history for result in results if result.history is not None]
    difference = sum(h.emptied_difference for h in found) / len(found)
    return history.is_used(difference, mean_stderr(h.emptied_stderr for h in found))
