"""Multiple choice and last words: by lm-evaluation-harness, or by the same rules from rows in a file.

A file (.jsonl, also with .gz or .xz) is named after its task and has one of these rows a line:

    {"context": ..., "continuation": ...}                       LAMBADA: the last word of a text
    {"query": ..., "choices": [...], "gold": index}             PIQA, ARC, BoolQ: which choice follows
    {"context_options": [...], "continuation": ..., "gold": index}    WinoGrande: after which context it follows

Prompts, how they are cut into tokens and what is normalised are the harness's, so that both give the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SurgeryError
from ..progress import Progress
from ..training.data.sources import BrokenRow, FileSource
from .losses import token_scores
from .result import Mean, TaskResult, mean

NORMALISED = ("arc", "hellaswag", "openbookqa", "piqa", "sciq")
"""Tasks whose names begin so also count the choice that is likeliest for each of its characters."""
MISSING = 'tasks by name need lm-evaluation-harness: pip install "surgery[eval]"; or name a .jsonl file of rows'


@dataclass(frozen=True)
class Question:
    """Pairs of context and continuation, of which the one at `gold` is right; None: the only one is."""

    pairs: tuple[tuple[str, str], ...]
    gold: int | None
    lengths: tuple[int, ...]


def is_file(task: str) -> bool:
    """Whether a task is a file of rows, and not a name."""
    return ".jsonl" in task


def read_questions(path: Path, limit: int | None = None) -> tuple[str, list[Question]]:
    """The task's name and the first `limit` (None: all) of its questions.

    Raises:
        SurgeryError: the file cannot be read, is empty, or a row (named) is none of the above.
    """
    source, questions = FileSource(path), list[Question]()
    for document in source.documents():
        if len(questions) == limit:
            break
        if isinstance(document.content, BrokenRow):
            raise document.content
        try:
            questions.append(_question(source.domain, document.content))
        except (KeyError, TypeError, AttributeError, IndexError):
            known = "context and continuation, query, choices and gold, or context_options, continuation and gold"
            raise SurgeryError(f"{document.where}: not a row of a task: expected {known}") from None
    if not questions:
        raise SurgeryError(f"{path}: holds no rows of a task")
    return source.domain, questions


def _question(task: str, row: Any) -> Question:
    if "query" in row:
        prompt = row["query"].removeprefix("Passage: " if task.startswith("boolq") else "").rstrip() + "\nAnswer:"
        pairs = [(prompt, f" {choice}") for choice in row["choices"]]
    elif "context_options" in row:
        pairs = [(context, f" {row['continuation']}") for context in row["context_options"]]
    else:
        return Question(((row["context"], f" {row['continuation']}"),), None, ())
    pairs[row["gold"]]  # is there
    normalised = task.startswith(NORMALISED) and "query" in row
    return Question(tuple(pairs), row["gold"], tuple(len(text) - 1 for _, text in pairs) if normalised else ())


def encode(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], int]:
    """Tokens of both together, and how many of them are of the context; its spaces at the end go with what follows."""
    bare = context.rstrip()
    whole, own = tokenizer.encode(context + continuation), tokenizer.encode(bare)
    return whole, len(own)


def loglikelihoods(
    model: nn.Module,
    requests: Sequence[tuple[list[int], int]],
    *,
    longest: int,
    batch_tokens: int,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Tensor, Tensor]:
    """Of tokens and how many of them come before: the log-likelihood [n] in fp64 of the rest, and whether each of its
    tokens is the likeliest.

    longest: tokens a model is shown at most; of more, the last. batch_tokens: in one batch, padding included.
    """
    total, greedy = torch.zeros(len(requests), dtype=torch.float64), torch.ones(len(requests), dtype=torch.bool)
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i][0]))
    device, done = next(model.parameters()).device, 0
    while done < len(order):
        width = min(len(requests[order[done]][0]), longest + 1)
        batch = order[done : done + max(1, batch_tokens // width)]
        ids = torch.zeros(len(batch), width, dtype=torch.int64)
        asked = torch.zeros(len(batch), width, dtype=torch.bool)
        for row, i in enumerate(batch):
            tokens, before = requests[i]
            kept = tokens[-width:]
            ids[row, : len(kept)] = torch.tensor(kept)
            asked[row, max(1, before - len(tokens) + len(kept)) : len(kept)] = True
        # attention looks back alone, so that what stands after a row changes nothing
        nll, right = token_scores(model, ids.to(device))
        total[batch] = -(nll * asked[:, 1:]).sum(1)
        greedy[batch] = (right | ~asked[:, 1:]).all(1)
        done += len(batch)
        report(done, len(order))
    return total, greedy


def score(questions: Sequence[Question], total: Tensor, greedy: Tensor) -> dict[str, Mean]:
    """Metrics from the log-likelihoods [n] of all pairs in order.

    acc: the right choice is the likeliest, or the only continuation is what the model would say. acc_norm: the same
    with each choice's log-likelihood divided by its characters. perplexity: of the only continuation.
    """
    sizes = [len(question.pairs) for question in questions]
    parts = list(zip(questions, total.split(sizes), strict=True))
    if questions[0].gold is None:
        nll = mean(-total)
        perplexity = torch.tensor(nll.value).double().exp().item()
        error = None if nll.stderr is None else perplexity * nll.stderr
        return {"acc": mean(greedy), "perplexity": Mean(perplexity, error, nll.count)}
    right = {"acc": [values.argmax().item() == question.gold for question, values in parts]}
    if questions[0].lengths:
        shares = ((question, values / torch.tensor(question.lengths)) for question, values in parts)
        right["acc_norm"] = [values.argmax().item() == question.gold for question, values in shares]
    return {name: mean(torch.tensor(values)) for name, values in right.items()}


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_tokens: int = 8192,
    progress: Progress | None = None,
) -> dict[str, TaskResult]:
    """Tasks by file (see above) and by name, which the harness knows and loads.

    limit: the first so many rows of each; None: all. batch_tokens: at once, by files.

    Raises:
        SurgeryError: a file cannot be used, there is no tokenizer, or a name without the harness.
    """
    if tasks and tokenizer is None:
        raise SurgeryError("tasks are text: the model needs a tokenizer in its folder")
    found, longest = {}, getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 2048
    for path in filter(is_file, tasks):
        name, questions = read_questions(Path(path), limit)
        requests = [encode(tokenizer, *pair) for question in questions for pair in question.pairs]

        def report(done: int, total: int, name: str = name) -> None:
            if progress is not None:
                progress(name, done, total)

        scores = loglikelihoods(model, requests, longest=longest, batch_tokens=batch_tokens, report=report)
        found[name] = TaskResult("built-in", len(questions), score(questions, *scores))
    names = [task for task in tasks if not is_file(task)]
    return found | (run_harness(model, tokenizer, names, limit=limit) if names else {})


def run_harness(model: Any, tokenizer: Any, tasks: Sequence[Any], *, limit: int | None = None) -> dict[str, TaskResult]:
    """The same by lm-evaluation-harness, in the way each task is defined there.

    Raises:
        SurgeryError: it is not installed, or does not know a task.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        raise SurgeryError(MISSING) from None
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
    try:
        done = lm_eval.simple_evaluate(model=wrapped, tasks=list(tasks), limit=limit, bootstrap_iters=1000)
    except (KeyError, ValueError, OSError) as error:
        raise SurgeryError(f"lm-evaluation-harness cannot run {', '.join(map(str, tasks))}: {error}") from None
    scorer = f"lm-eval {getattr(lm_eval, '__version__', '')}".strip()
    return {
        task: TaskResult(scorer, done["n-samples"][task]["effective"], _metrics(values, done["n-samples"][task]))
        for task, values in done["results"].items()
        if task in done["n-samples"]
    }


def _metrics(values: dict[str, Any], samples: dict[str, int]) -> dict[str, Mean]:
    found = {}
    for key, value in values.items():
        name, _, kept = key.partition(",")
        if kept and not name.endswith("_stderr"):
            error = values.get(f"{name}_stderr,{kept}")
            found[name] = Mean(value, error if isinstance(error, float) else None, samples["effective"])
    return found
