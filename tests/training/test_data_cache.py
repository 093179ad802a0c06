"""The cache of tokens: whole or absent, and made anew when anything that it depends on is another."""

from __future__ import annotations

import lzma
import os
import pickle
import time

import numpy as np
import pytest
from data_cases import lines
from transformers import AutoTokenizer

from surgery import SurgeryError
from surgery.showcase import DEMO
from surgery.training.data import corpus as corpus_module
from surgery.training.data.corpus import open_corpora
from surgery.training.data.tokens import read_corpora


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO)


class Counting:
    """A tokenizer that counts the texts it was given."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer, self.texts = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __len__(self):
        return len(self.tokenizer)

    def __call__(self, texts, **kwargs):
        self.texts += len(texts)
        return self.tokenizer(texts, **kwargs)


def test_text_is_tokenised_once(tmp_path, tokenizer):
    path = lines(tmp_path / "a.jsonl", {"text": "one"}, {"text": "two", "domain": "b"}, {"text": "three"})
    counting, cache = Counting(tokenizer), tmp_path / "cache"
    first = open_corpora([path], counting, cache=cache)
    again = open_corpora([path], counting, cache=cache)
    assert counting.texts == 3
    for found in (first, again):
        assert [corpus.domain for corpus in found] == ["a", "b"]
        assert all(isinstance(corpus.tokens, np.memmap) and corpus.tokens.dtype == np.uint16 for corpus in found)
        expected = read_corpora([path], tokenizer)
        assert {c.domain: c.tokens.tolist() for c in found} == {name: ids.tolist() for name, ids in expected.items()}
        assert found[0].starts.tolist() == [0, len(tokenizer("one").input_ids) + 1]
    # wherever it lies, and whatever its date
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.jsonl").write_bytes(path.read_bytes())
    open_corpora([tmp_path / "more" / "a.jsonl"], counting, cache=cache)
    assert counting.texts == 3


def test_what_makes_tokens_other_ones_makes_them_anew(tmp_path, tokenizer):
    cache, path = tmp_path / "cache", tmp_path / "a.jsonl"
    row = {"text": "one", "body": "two"}
    other = AutoTokenizer.from_pretrained(DEMO)
    other.add_tokens(["on"])
    chatty = AutoTokenizer.from_pretrained(DEMO)
    chatty.chat_template = "{{ messages }}"

    def entries(*args, **kwargs) -> int:
        open_corpora([path], *args, cache=cache, **kwargs)
        return len(list((cache / "tokens").iterdir()))

    lines(path, row)
    assert entries(tokenizer) == 1
    assert entries(other) == 2
    assert entries(chatty) == 3
    assert entries(tokenizer, column="body") == 4
    assert entries(tokenizer, vocab_size=100_000) == 5
    (found,) = open_corpora([path], tokenizer, vocab_size=100_000, cache=cache)
    assert found.tokens.dtype == np.uint32
    lines(path, row, row)
    os.utime(path, ns=(1, 1))
    assert entries(tokenizer) == 6
    tokenizer(["a", "bb"], padding=True)  # which fast tokenizers keep in mind
    assert entries(tokenizer) == 6


def test_the_cache_is_where_the_environment_says(tmp_path, tokenizer, monkeypatch):
    path = lines(tmp_path / "a.jsonl", {"text": "one"})
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path / "mine"))
    open_corpora([path], tokenizer)
    assert len(list((tmp_path / "mine" / "tokens").iterdir())) == 1
    monkeypatch.delenv("SURGERY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    open_corpora([path], tokenizer)
    assert len(list((tmp_path / "xdg" / "surgery" / "tokens").iterdir())) == 1
    (tmp_path / "file").touch()
    with pytest.raises(SurgeryError, match="tokens cannot be kept here .*SURGERY_CACHE"):
        open_corpora([path], tokenizer, cache=tmp_path / "file")


def test_an_interrupted_build_leaves_nothing(tmp_path, tokenizer, monkeypatch):
    path, cache = lines(tmp_path / "a.jsonl", {"text": "one"}, {"text": "two"}), tmp_path / "cache"
    add = corpus_module._Part.add

    def killed(self, ids, starts):
        add(self, ids, starts)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(corpus_module._Part, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            open_corpora([path], tokenizer, cache=cache)
    assert list((cache / "tokens").iterdir()) == []
    (old := cache / "tokens" / "old.tmp").mkdir()
    (new := cache / "tokens" / "new.tmp").mkdir()
    os.utime(old, (time.time() - 30 * 24 * 3600,) * 2)
    (found,) = open_corpora([path], tokenizer, cache=cache)
    assert len(found.starts) == 2
    assert new.exists() and not old.exists()  # one is long dead, the other may be another process's


def test_two_processes_may_build_at_once(tmp_path, tokenizer, monkeypatch):
    """The second begins and ends while the first writes."""
    path, cache = lines(tmp_path / "a.jsonl", {"text": "one"}, {"text": "two"}), tmp_path / "cache"
    add, second = corpus_module._Part.add, []

    def meanwhile(self, ids, starts):
        if not second:
            second.append(None)
            second.append(open_corpora([path], tokenizer, cache=cache))
        add(self, ids, starts)

    monkeypatch.setattr(corpus_module._Part, "add", meanwhile)
    (first,) = open_corpora([path], tokenizer, cache=cache)
    assert first.tokens.tolist() == second[1][0].tokens.tolist() == read_corpora([path], tokenizer)["a"].tolist()
    assert len(list((cache / "tokens").iterdir())) == 1


@pytest.mark.parametrize("damage", ["0.tokens", "0.starts", "meta.json"])
def test_a_damaged_entry_is_made_again(tmp_path, tokenizer, damage):
    path, cache = lines(tmp_path / "a.jsonl", {"text": "one two three"}), tmp_path / "cache"
    open_corpora([path], tokenizer, cache=cache)
    (entry,) = (cache / "tokens").iterdir()
    (entry / damage).write_bytes((entry / damage).read_bytes()[:-3])
    (found,) = open_corpora([path], tokenizer, cache=cache)
    assert found.tokens.tolist() == read_corpora([path], tokenizer)["a"].tolist()
    assert list((cache / "tokens").iterdir()) == [entry]


def test_broken_rows_are_fatal_or_counted(tmp_path, tokenizer):
    rows = [{"text": "one"}, "{not json\n", {"text": 3}, {"input_ids": [10**9]}, {"text": "two"}]
    path, cache = lines(tmp_path / "a.jsonl", *rows), tmp_path / "cache"
    how = {"cache": cache, "on_error": "skip"}
    with pytest.raises(SurgeryError, match=r"a.jsonl:2: not a JSON object"):
        open_corpora([path], tokenizer, cache=cache)
    said: list[str] = []
    for _ in range(2):  # made, and found again
        (found,) = open_corpora([path], tokenizer, **how, report=said.append)
        assert found.tokens.tolist() == [*tokenizer("one").input_ids, 0, *tokenizer("two").input_ids, 0]
    assert len(said) == 2 and said[0] == said[1]
    assert said[0].startswith(f"{path}: 3 broken rows were skipped, the first is {path}:2: not a JSON object")
    with pytest.warns(UserWarning, match="3 broken rows"):
        open_corpora([path], tokenizer, **how)
    with pytest.raises(SurgeryError, match=r"a.jsonl:2: not a JSON object"):
        open_corpora([path], tokenizer, cache=cache)
    with pytest.raises(SurgeryError, match=r"b.jsonl:1: not a JSON object"):
        open_corpora([lines(tmp_path / "b.jsonl", "{\n")], tokenizer, **how)


def test_files_of_tokens_are_mapped_where_they_are(tmp_path, tokenizer):
    eos, cache = tokenizer.eos_token_id, tmp_path / "cache"
    ids = np.array([5, 6, eos, 7, eos, eos, 8], np.int64)
    np.save(tmp_path / "a.npy", ids)
    (tmp_path / "b.u16").write_bytes(ids.astype("<u2").tobytes())
    plain = open_corpora([tmp_path / "a.npy", tmp_path / "b.u16"], tokenizer, cache=cache)
    assert not cache.exists()
    (tmp_path / "b.u16.xz").write_bytes(lzma.compress(ids.astype("<u2").tobytes()))
    packed = open_corpora([tmp_path / "b.u16.xz"], tokenizer, cache=cache)
    for found in (*plain, *packed):
        assert isinstance(found.tokens, np.memmap)
        assert found.tokens.tolist() == ids.tolist()
        assert found.starts.tolist() == [0, 3, 5, 6]
        again = pickle.loads(pickle.dumps(found))
        assert isinstance(again.tokens, np.memmap) and again.tokens.tolist() == ids.tolist()
        assert len(pickle.dumps(found)) < 1000
    (found,) = open_corpora([tmp_path / "a.npy"], None)
    assert found.starts.tolist() == [0]
    (found,) = open_corpora([tmp_path / "a.npy"], None, eos=7)
    assert found.starts.tolist() == [0, 4]
    with pytest.raises(SurgeryError, match=r"a.npy: token 8 is outside the vocabulary of 8"):
        open_corpora([tmp_path / "a.npy"], None, vocab_size=8)
    with pytest.raises(SurgeryError, match="no data: name at least one file"):
        open_corpora([], tokenizer)
