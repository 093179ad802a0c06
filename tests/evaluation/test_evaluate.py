"""What is measured: losses, their errors, recall, the use of the history, memory; and that nothing is left changed."""

from __future__ import annotations

import json
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import surgery
from surgery import SurgeryError
from surgery.evaluation import Evaluation, Memory, evaluate
from surgery.evaluation import losses as losses_module
from surgery.evaluation.history import ablated_nll, ablation, groups, has_history, is_used
from surgery.evaluation.losses import new_cache, token_nll
from surgery.evaluation.memory import measure_memory
from surgery.evaluation.provenance import source
from surgery.evaluation.recall import twice
from surgery.evaluation.result import position_buckets, stderr
from surgery.kernels.state import split_state
from surgery.training.data.tokens import read_corpora, windows

ROOT = Path(__file__).resolve().parents[2]
DEMO = Path(find_spec("surgery").submodule_search_locations[0]) / "demo"
LENGTH = 64


def text(windows: int, seed: int = 0, length: int = LENGTH) -> np.ndarray:
    return zoo.tokens(1, windows * length + 3, seed)[0].numpy()


@pytest.fixture(scope="module")
def corpora():
    return {"books": text(17), "code": text(18, seed=1), "notes": text(3, seed=2)}


@pytest.fixture(scope="module")
def softmax_result(corpora) -> Evaluation:
    return evaluate(zoo.build("llama"), corpora, length=LENGTH, batch_size=4, copy_tokens=40)


@pytest.fixture(scope="module")
def converted():
    return zoo.convert(zoo.build("llama"), "llama/liger-gla", window=8)


@pytest.fixture(scope="module")
def converted_result(converted, corpora) -> Evaluation:
    return evaluate(converted, corpora, length=LENGTH, batch_size=4, copy_tokens=40)


# losses


def test_losses_equal_those_of_the_model(softmax_result, corpora):
    model = zoo.build("llama")
    for domain, result in softmax_result.domains.items():
        rows = windows(corpora[domain], LENGTH)
        assert result.windows == len(rows)
        with torch.no_grad():
            expected = [model(row[None], labels=row[None]).loss.item() for row in rows]
        assert result.window_nll == pytest.approx(expected, abs=1e-5)
        assert result.nll == pytest.approx(np.mean(expected), abs=1e-5)
        assert result.stderr == pytest.approx(np.std(expected, ddof=1) / len(rows) ** 0.5, rel=1e-3)


def test_losses_by_position(softmax_result, corpora):
    model = zoo.build("llama")
    rows = windows(corpora["code"], LENGTH)
    with torch.no_grad():
        nll = cross_entropy(model(rows).logits[:, :-1].transpose(1, 2), rows[:, 1:], reduction="none").mean(0)
    result = softmax_result.domains["code"]
    assert result.position_nll == pytest.approx(nll.tolist(), abs=1e-4)
    ((name, found),) = result.by_position.items()
    assert (name, found.count) == ("1-63", result.windows)
    assert (found.value, found.stderr) == pytest.approx((nll.mean().item(), result.stderr), abs=1e-5)


def test_buckets_cover_every_position_once():
    assert list(position_buckets(1024)) == ["1-64", "65-256", "257-1023"]
    assert list(position_buckets(2049)) == ["1-64", "65-256", "257-1024", "1025-2048"]
    assert list(position_buckets(10000))[-2:] == ["4097-8192", "8193-9999"]
    for length in (2, 65, 66, 300, 5000):
        covered = [i for where in position_buckets(length).values() for i in range(where.start, where.stop)]
        assert covered == list(range(length - 1))


def test_the_mean_leaves_short_domains_out(softmax_result):
    books, code = (softmax_result.domains[name] for name in ("books", "code"))
    assert softmax_result.mean_over == ["books", "code"]
    assert softmax_result.nll == pytest.approx((books.nll + code.nll) / 2)
    assert softmax_result.stderr == pytest.approx((books.stderr**2 + code.stderr**2) ** 0.5 / 2)
    lone = evaluate(zoo.build("llama"), {"notes": text(1)}, length=LENGTH, copy_tokens=0)
    assert (lone.mean_over, lone.nll, lone.stderr) == ([], None, None)
    assert (lone.domains["notes"].stderr, lone.domains["notes"].copy) == (None, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_of_logits_change_nothing(monkeypatch, dtype):
    model, ids = zoo.build("llama", dtype=dtype), zoo.tokens(3, 20)
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].float()
        expected = cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        for chunk in (1, 3 * zoo.VOCAB * 7, 2**26):
            monkeypatch.setattr(losses_module, "CHUNK", chunk)
            assert torch.allclose(token_nll(model, ids), expected.double(), atol=1e-6)


def test_the_model_is_left_as_it_was(corpora):
    model = zoo.build("llama").train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    seen = []
    evaluate(model, {"notes": corpora["notes"]}, length=LENGTH, progress=lambda *step: seen.append(step))
    assert [module.training for module in model.modules()] == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert ("notes: loss", 0, 3) in seen and ("notes: loss", 3, 3) in seen


# recall


def test_pieces_are_written_twice():
    rows = twice(torch.arange(1, 11).view(2, 5), 4, None, 0)
    assert rows.tolist() == [[0, 1, 2, 3, 4, 1, 2, 3, 4], [0, 5, 6, 7, 8, 5, 6, 7, 8]]
    assert twice(torch.arange(10).view(2, 5), 4, None, None).shape == (2, 8)
    assert twice(torch.arange(10).view(2, 5), 1, 4, None)[:, 0].tolist() == [0, 3, 6, 9]
    assert twice(torch.arange(3).view(1, 3), 4, None, 0) is None
    assert twice(torch.arange(3).view(1, 3), 0, None, 0) is None


def test_copy_losses_equal_a_loop(softmax_result, corpora):
    model, found = zoo.build("llama"), softmax_result.domains["notes"].copy
    first, second = [], []
    for piece in torch.from_numpy(corpora["notes"][:160]).view(4, 40):
        ids = torch.cat([torch.tensor([2]), piece, piece])
        with torch.no_grad():
            nll = cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
        first.append(nll[:40].mean().item())
        second.append(nll[40:].mean().item())
    assert (found.pieces, found.tokens) == (4, 40)
    assert (found.first, found.second) == pytest.approx((np.mean(first), np.mean(second)), abs=1e-5)
    assert found.second_stderr == pytest.approx(np.std(second, ddof=1) / 2, rel=1e-3)
    assert softmax_result.domains["code"].copy.pieces == 18 * LENGTH // 40


# history


def test_states_are_split_into_window_and_history(converted):
    state = converted.model.layers[0].self_attn.mixer.init_state(1, device="meta", dtype=torch.float32)
    window, history = split_state(state)
    assert set(window) == {"ring_k", "ring_v", "seen"}
    assert set(history) == set(state) - set(window) != set()


@torch.no_grad()
def test_ablation_changes_the_history_and_only_that(converted, corpora):
    ids = windows(corpora["code"], LENGTH)[:4]
    found = ablated_nll(converted, ids)
    plain = token_nll(converted, ids)[:, LENGTH // 2 :].mean(1)
    assert torch.allclose(found["intact"], plain, atol=1e-5)
    for name in ("emptied", "swapped"):
        assert ((found[name] - found["intact"]).abs() > 1e-3).all()
    # by hand
    for name in ("emptied", "swapped"):
        cache = new_cache(converted)
        token_nll(converted, ids[:, : LENGTH // 2], cache)
        if name == "emptied":
            zoo.empty_recurrence(cache)
        else:
            for layer in cache.layers:
                layer.state["S"] = layer.state["S"][[3, 0, 1, 2]]
        assert torch.allclose(token_nll(converted, ids[:, LENGTH // 2 :], cache).mean(1), found[name], atol=1e-6)


def test_every_batch_has_a_window_to_swap_with():
    for count in range(2, 30):
        for batch_size in (1, 2, 3, 8):
            rows = [list(range(count))[part] for part in groups(count, batch_size)]
            assert sorted(sum(rows, [])) == list(range(count))
            assert all(2 <= len(part) <= max(batch_size, 3) for part in rows)
    assert groups(1, 8) == [slice(0, None, 1)]
    first = [list(range(32))[part] for part in groups(32, 8)][0]
    assert first == list(range(0, 32, 4))


def test_history_of_a_whole_evaluation(converted_result, converted, corpora):
    found = converted_result.domains["books"].history
    parts = [ablated_nll(converted, windows(corpora["books"], LENGTH)[rows]) for rows in groups(17, 4)]
    with torch.no_grad():
        expected = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    assert found.emptied_difference == pytest.approx((expected["emptied"] - expected["intact"]).mean().item(), abs=1e-6)
    assert found.emptied_stderr == pytest.approx(stderr(expected["emptied"] - expected["intact"]), abs=1e-6)
    assert found.swapped == pytest.approx(expected["swapped"].mean().item(), abs=1e-6)
    assert isinstance(converted_result.history_used, bool)


def test_a_verdict_needs_a_clear_rise():
    intact = torch.linspace(2, 3, 20, dtype=torch.float64)
    noise = torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat(10)

    def used(change):
        return ablation({"intact": intact, "emptied": intact + change}).history_used

    assert used(0.1 + 0.01 * noise)
    assert not used(-0.1 + 0.01 * noise)
    assert not used(0.1 + noise)
    assert not used(torch.full_like(noise, 0.0005))
    assert not is_used(1.0, None)
    assert ablation({"intact": intact, "emptied": intact}).swapped is None


def test_without_history_there_is_nothing_to_ablate(softmax_result, corpora):
    assert softmax_result.history_used is None
    assert softmax_result.domains["books"].history is None
    control = surgery.apply(zoo.build("llama"), {"mixer": {"kind": "window", "window": {"size": 8}}})
    assert not has_history(control)
    result = evaluate(control, {"notes": corpora["notes"]}, length=LENGTH, copy_tokens=0)
    assert result.history_used is None
    assert "window 8" in result.attention


def test_a_model_with_softmax_layers_left(corpora):
    model = zoo.convert(zoo.build("llama"), "llama/liger-gla", window=8, layers=[1])
    result = evaluate(model, {"notes": corpora["notes"]}, length=LENGTH, batch_size=2, copy_tokens=0)
    assert result.domains["notes"].history.emptied_difference != 0
    assert result.attention.endswith("in 1 of 3 layers")
    assert result.memory.growth == result.memory.softmax_growth * 2 // 3


# memory and provenance


def test_memory_of_softmax_and_of_a_conversion(softmax_result, converted_result, converted):
    per_token = 3 * 2 * 2 * 8 * 4  # layers, keys and values, heads, head_dim, fp32
    whole = per_token * LENGTH
    assert softmax_result.memory == Memory(LENGTH, whole, per_token, whole, per_token)
    assert converted_result.memory == Memory(LENGTH, converted.surgery.report.state_bytes, 0, whole, per_token)
    assert converted_result.memory.at(2 * LENGTH) == (converted.surgery.report.state_bytes, 2 * whole)


def test_a_full_sliding_window_grows_no_more():
    ids = zoo.tokens(1, LENGTH)
    with torch.no_grad():
        plain = measure_memory(zoo.build("mistral"), ids)
        converted = measure_memory(zoo.convert(zoo.build("mistral"), "llama/liger-gla", window=8), ids)
    assert plain.growth == plain.softmax_growth == converted.growth == converted.softmax_growth == 0
    assert converted.softmax == pytest.approx(plain.softmax, rel=0.05)


def test_provenance(softmax_result):
    found = softmax_result.provenance
    assert (found["surgery"], found["torch"]) == (surgery.__version__, torch.__version__)
    assert (found["device"], found["dtype"]) == ("cpu", "float32")
    assert found["source"].startswith(("git ", "sha256 "))


def test_source_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    kind, digest = source().split()
    assert (kind, len(digest)) == ("sha256", 64)


def test_json_round_trip(softmax_result, converted_result):
    for result in (softmax_result, converted_result):
        assert Evaluation.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    data = softmax_result.to_dict()
    for wrong in ({}, [], {**data, "format": 99}, {**data, "more": 1}, {**data, "domains": {"a": {}}}):
        with pytest.raises(SurgeryError, match=r"not an evaluation|newer surgery"):
            Evaluation.from_dict(wrong)


# refusals


def test_refusals(corpora):
    model = zoo.build("llama")
    with pytest.raises(SurgeryError, match=r"notes: 195 tokens hold no window of 200"):
        evaluate(model, {"notes": corpora["notes"]}, length=200)
    with pytest.raises(SurgeryError, match="notes: token 97 is outside the vocabulary of 97 tokens"):
        evaluate(model, {"notes": np.array([97, 3])}, length=2)
    with pytest.raises(SurgeryError, match="no data"):
        evaluate(model, {})
    with pytest.raises(SurgeryError, match="at least 2"):
        evaluate(model, corpora, length=1)
    with pytest.raises(SurgeryError, match="learned 512 positions: two copies of 300 tokens is too much"):
        evaluate(zoo.build("gpt2"), corpora, length=LENGTH, copy_tokens=300)


# the embedded model


@pytest.fixture(scope="module")
def demo():
    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)


@pytest.fixture(scope="module")
def held_out():
    return read_corpora([DEMO / "heldout.jsonl"], AutoTokenizer.from_pretrained(DEMO))


def test_the_embedded_model_has_the_recorded_losses(demo, held_out):
    record = json.loads((DEMO / "training.json").read_text(encoding="utf-8"))["evaluation"]["code"]
    found, expected = evaluate(demo, {"code": held_out["code"]}, copy_tokens=0).domains["code"], record["full"]
    assert found.windows == record["windows"]
    assert found.nll == pytest.approx(expected["nll"], abs=2e-3)
    assert found.stderr == pytest.approx(expected["stderr"], abs=2e-3)
    assert found.window_nll[0] == pytest.approx(expected["first_window"], abs=2e-3)
    for name in ("1-64", "65-256"):
        assert found.by_position[name].value == pytest.approx(expected[f"position_{name}"], abs=2e-3)


def test_the_embedded_model_recalls_as_its_own_script_measures(demo, held_out):
    spec = spec_from_file_location("pretrain_demo", ROOT / "benchmarks" / "pretrain_demo.py")
    script = module_from_spec(spec)
    spec.loader.exec_module(script)
    docs = held_out["docs"][:2100]
    found = evaluate(demo, {"docs": docs}, copy_tokens=200, copy_pieces=None).domains["docs"]
    pieces = torch.from_numpy(docs[:2000].astype(np.int64)).view(10, 200)
    nll = script.token_nll(demo, torch.cat([torch.zeros(10, 1, dtype=torch.int64), pieces, pieces], 1)).mean(0)
    assert (found.windows, found.copy.pieces) == (2, 10)
    assert found.copy.first == pytest.approx(nll[:200].mean().item(), abs=1e-4)
    assert found.copy.second == pytest.approx(nll[200:].mean().item(), abs=1e-4)
    assert found.copy.second < 0.7 * found.copy.first
