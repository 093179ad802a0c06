"""The benchmark of encoders, on a random BERT; and what it compares embeddings by."""

from __future__ import annotations

import json
import lzma

import pytest
import torch
from torch import nn

from benchmarks import encoders

STORY = "The cat sat on the mat. It was a very good cat! Did the dog {0} see it there? No, said the {0} dog to them."

WORDS = ["big", "small", "red", "green", "old", "young", "kind", "shy"]


@pytest.fixture
def files(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(STORY.format(word) for word in WORDS))
    (tmp_path / "b.jsonl.xz").write_bytes(lzma.compress(json.dumps({"x": "One more sentence of six words."}).encode()))
    rows = [f"a {word} film\t{label}" for word, label in [("good", 1), ("bad", 0), ("fine", 1), ("dull", 0)]]
    (tmp_path / "task.tsv").write_text("\n".join(["sentence\tlabel", *rows]))
    task = str(tmp_path / "task.tsv")
    return ["--text", str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl.xz"), "--sst2", task, task]


def test_quick_run_measures_both(files, tmp_path):
    torch.manual_seed(0)
    found = encoders.main(["--quick", *files, "--out", str(tmp_path)])
    names = [row["name"] for row in found["embeddings"]]
    assert names == ["untrained", "after attention transfer", "after both stages"]
    assert all(-1 <= row[key] <= 1 for row in found["embeddings"] for key in ("cosine", "spearman"))
    healed = {row["name"]: row["cosine"] for row in found["embeddings"]}
    assert len(set(healed.values())) == 3
    assert json.loads((tmp_path / "encoders.json").read_text()) == found
    assert len((tmp_path / "encoders.md").read_text().splitlines()) == 2 + 2 + 3 + 1 + 2 + 3


def test_sentences_are_different_and_of_all_files(files):
    found = encoders.sentences([encoders.Path(files[1]), encoders.Path(files[2])])
    assert len(found) == len(set(found)) == 2 + 2 * len(WORDS) + 1
    assert found == encoders.sentences([encoders.Path(files[2]), encoders.Path(files[1])])


def test_batches_hold_texts_of_like_length():
    texts = ["word " * (1 + i % 8) for i in range(64)]
    encode = lambda some: {"length": torch.tensor([len(text) for text in some])}  # noqa: E731
    found = encoders.batches(encode, texts, torch.arange(64), 8, 11)
    assert len(found) == 11 and all(len(set(batch["length"].tolist())) == 1 for batch in found)
    assert sorted(i for batch in found[:8] for i in batch["target"].tolist()) == list(range(64))
    assert all(len(texts[i]) == n for b in found for i, n in zip(b["target"], b["length"], strict=True))


def test_likeness():
    torch.manual_seed(0)
    theirs = nn.functional.normalize(torch.randn(20, 8), dim=-1)
    same = encoders.likeness(theirs, theirs)
    assert same["cosine"] == pytest.approx(1) and same["spearman"] == pytest.approx(1)
    turned = theirs @ torch.linalg.qr(torch.randn(8, 8)).Q  # other places, same distances
    found = encoders.likeness(turned, theirs)
    assert found["spearman"] == pytest.approx(1) and found["cosine"] < 0.9
