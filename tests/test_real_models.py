"""Pretrained weights and real text: conversion, its way to disk and back, and the teacher's published figures."""

from __future__ import annotations

import lzma
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import surgery

LENGTHS = {512: 1.50, 256: 1.53, 128: 1.59}
"""stories260k: nll per token at a context length, to two digits."""

DOMAINS = {"instructions": 2.483, "stories": 2.425}
"""The teacher in fp32: nll per token over the first twelve windows of 1,024 tokens of a held out domain."""


@pytest.fixture(scope="module")
def stories(data_dir: Path) -> tuple[Path, Tensor]:
    tokens = np.load(data_dir / "stories260k" / "tinystories.tokens.npy").astype(np.int64)
    return data_dir / "stories260k", torch.from_numpy(tokens)


@pytest.fixture(scope="module")
def teacher(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    subprocess.run([sys.executable, data_dir / "unpack_teacher.py", folder], check=True, stdout=subprocess.DEVNULL)
    return folder


def windows(tokens: Tensor, length: int) -> Tensor:
    """[N, length + 1]: every token but the first is predicted once."""
    return tokens.unfold(0, length + 1, length)


def held_out(data_dir: Path, domain: str) -> Tensor:
    """[12 or fewer windows, 1025]."""
    with lzma.open(data_dir / "tokens" / f"{domain}.val.u16.xz") as file:
        tokens = torch.from_numpy(np.frombuffer(file.read(), dtype="<u2").astype(np.int64))
    return windows(tokens, 1024)[:12]


@torch.no_grad()
def nll(model: PreTrainedModel, rows: Tensor) -> float:
    """Mean over the predicted tokens of [N, T + 1] windows."""
    batch = max(1, 4096 // rows.shape[1])
    losses = [model(ids, labels=ids, use_cache=False).loss * len(ids) for ids in rows.split(batch)]
    return float(sum(losses)) / len(rows)


def check_round_trip(model: PreTrainedModel, ids: Tensor, folder: Path) -> None:
    """Generates alike with and without its cache, and comes back from disk bit for bit."""
    generate: Callable[..., Tensor] = lambda m, **kwargs: m.generate(  # noqa: E731
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, **kwargs
    )
    greedy = generate(model)
    assert greedy.shape[1] > ids.shape[1] and torch.equal(generate(model, use_cache=False), greedy)
    model.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert loaded.surgery.recipe == model.surgery.recipe
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert torch.equal(generate(loaded), greedy)


def test_stories_convert_generate_and_reload(stories, tmp_path):
    folder, tokens = stories
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    rows = windows(tokens, 512)[:8]
    before = nll(model, rows)
    surgery.apply(model, "llama/lolcats")
    student = nll(model, rows)
    assert student > before + 0.1  # untrained, it is another model
    check_round_trip(model, rows[:2, :100], tmp_path / "model")
    assert nll(AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval(), rows) == student
    assert nll(surgery.revert(model), rows) == before


def test_stories_in_teacher_mode(stories):
    folder, tokens = stories
    model = surgery.apply(AutoModelForCausalLM.from_pretrained(folder).eval(), "llama/lolcats")
    with surgery.mode(model, "teacher"):
        for length, expected in LENGTHS.items():
            # over the first fifth of the text
            assert nll(model, windows(tokens[: len(tokens) // 5], length)) == pytest.approx(expected, abs=6e-3)


def test_teacher_converts_generates_and_reloads(teacher, data_dir, tmp_path):
    model = surgery.from_pretrained(teacher, "llama/lolcats", dtype=torch.float32).eval()
    check_round_trip(model, held_out(data_dir, "stories")[:2, :100], tmp_path / "model")


def test_teacher_in_teacher_mode(teacher, data_dir):
    model = surgery.from_pretrained(teacher, "llama/lolcats", dtype=torch.float32).eval()
    with surgery.mode(model, "teacher"):
        for domain, expected in DOMAINS.items():
            assert nll(model, held_out(data_dir, domain)) == pytest.approx(expected, abs=1e-3)
