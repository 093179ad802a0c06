"""The embedded model: it loads offline, stays small, and has the loss its record states."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path(find_spec("surgery").submodule_search_locations[0]) / "demo"
RECORD = json.loads((FOLDER / "training.json").read_text(encoding="utf-8"))
TEXTS = [
    "",
    "def f(x):\n\treturn  x\r\n\n\n    # end  ",
    " na\u00efve \u2014 \u65e5\u672c\u8a9e \U0001f40d\u200d ''it's'' , . 1234567 __init__",
    "\x00\x07\x7f\ufeff",
    "a<|endoftext|>b",
]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def held_out():
    lines = (FOLDER / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_size(model):
    config = model.config
    assert sum(p.numel() for p in model.parameters()) == RECORD["parameters"] <= 3_300_000
    assert (FOLDER / "model.safetensors").stat().st_size <= 8_000_000
    assert config.model_type == "llama"
    assert config.dtype == torch.float32  # what was asked for; the file holds bf16
    assert config.num_attention_heads > config.num_key_value_heads > 1
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_round_trip(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < 4096 for i in ids)


def test_special_token(tokenizer, model):
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    assert tokenizer("a<|endoftext|>b").input_ids.count(0) == 1
    assert tokenizer("a").input_ids[0] != 0  # nothing is added in front
    assert len(tokenizer) == model.config.vocab_size
    generation = model.generation_config
    assert generation.eos_token_id == generation.pad_token_id == 0


def test_held_out_text(held_out, tokenizer):
    assert {row["domain"] for row in held_out} == {"code", "docs"}
    for domain in ("code", "docs"):
        texts = [row["text"] for row in held_out if row["domain"] == domain]
        assert sum(map(len, texts)) > 100_000
        tokens = sum(len(tokenizer(text).input_ids) + 1 for text in texts)
        assert tokens // 1024 == RECORD["evaluation"][domain]["windows"]
    assert 150_000 <= (FOLDER / "heldout.jsonl").stat().st_size <= 300_000


@pytest.mark.parametrize("domain", ["code", "docs"])
def test_loss_of_the_first_window(held_out, tokenizer, model, domain):
    ids = []
    for row in held_out:
        if row["domain"] == domain and len(ids) < 1024:
            ids += [*tokenizer(row["text"]).input_ids, tokenizer.eos_token_id]
    window = torch.tensor([ids[:1024]])
    with torch.no_grad():
        loss = model(window, labels=window).loss.item()
    assert loss < 2.1
    assert loss == pytest.approx(RECORD["evaluation"][domain]["full"]["first_window"], abs=2e-3)


def test_recalls_beyond_a_short_window(held_out, tokenizer, model):
    """the second of two copies is far easier than the first: there is something for a conversion to lose"""
    ids = tokenizer(held_out[-1]["text"]).input_ids[500:700]
    twice = torch.tensor([[tokenizer.eos_token_id, *ids, *ids]])
    with torch.no_grad():
        logits = model(twice).logits[0, :-1]
    nll = torch.nn.functional.cross_entropy(logits, twice[0, 1:], reduction="none")
    assert nll[200:].mean() < 0.7 * nll[:200].mean()


def test_continues_python(tokenizer, model):
    prompt = "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(out[0, ids.shape[1] :]).startswith("        self.items.append(item)\n")
