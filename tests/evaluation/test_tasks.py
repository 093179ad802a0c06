"""Tasks: prompts, likelihoods and metrics by hand, and, where it is installed, beside lm-evaluation-harness."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from transformers import AutoModelForCausalLM, AutoTokenizer

from surgery import SurgeryError
from surgery.evaluation.tasks import Question, encode, loglikelihoods, read_questions, run_harness, run_tasks, score

DEMO = Path(find_spec("surgery").submodule_search_locations[0]) / "demo"
ROWS = {
    "lambada_openai": [
        {"context": "for i in range(len(self.", "continuation": "items"},
        {"context": "import os\nimport", "continuation": "sys"},
        {"context": "The value is not None if the", "continuation": "value"},
    ],
    "piqa": [
        {"query": "Question: How do I open a file?\n", "choices": ["open(path)", "close the whole door"], "gold": 0},
        {"query": "Question: dresser\n", "choices": ["replace drawer with bobby pin", "finish, pin"], "gold": 1},
        {"query": "Question: a list\n", "choices": ["is a tuple", "is a sequence of many items"], "gold": 1},
    ],
    "boolq": [
        {"query": "Passage: A list is mutable.\nQuestion: is a list mutable?", "choices": ["no", "yes"], "gold": 1},
        {"query": "Passage: Strings are not.\nQuestion: are strings?", "choices": ["no", "yes"], "gold": 0},
    ],
    "winogrande": [
        {"context_options": ["Sarah told Maria that Sarah", "Sarah told Maria that Maria"],
         "continuation": "was right.", "gold": 1},
        {"context_options": ["The file and the list, but the file", "The file and the list, but the list"],
         "continuation": "is longer.", "gold": 0},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tasks")
    for name, rows in ROWS.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: root / f"{name}.jsonl" for name in ROWS}


@pytest.fixture(scope="module")
def demo():
    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO)


def test_prompts(files):
    name, (first, *_) = read_questions(files["piqa"], 1)
    assert name == "piqa"
    prompt = "Question: How do I open a file?\nAnswer:"
    assert first == Question(((prompt, " open(path)"), (prompt, " close the whole door")), 0, (10, 20))
    _, (first, _) = read_questions(files["boolq"])
    prompt = "A list is mutable.\nQuestion: is a list mutable?\nAnswer:"
    assert first == Question(((prompt, " no"), (prompt, " yes")), 1, ())
    _, (first, _) = read_questions(files["winogrande"])
    assert first.pairs[1] == ("Sarah told Maria that Maria", " was right.") and first.lengths == ()
    _, questions = read_questions(files["lambada_openai"])
    assert questions[1] == Question((("import os\nimport", " sys"),), None, ())


def test_metrics_of_rows_made_by_hand():
    two = [Question((("a", " bb"), ("a", " cccc")), gold, (2, 4)) for gold in (0, 1, 1)]
    totals = torch.tensor([-2.0, -3.0, -1.0, -9.0, -5.0, -4.0]).double()
    found = score(two, totals, torch.zeros(6, dtype=torch.bool))
    # likeliest: 0, 0, 1; for each character: 1 (-1, -0.75), 0 (-0.5, -2.25), 1
    assert found["acc"].value == pytest.approx(2 / 3)
    assert found["acc_norm"].value == pytest.approx(1 / 3)
    assert found["acc"].stderr == pytest.approx(np.std([1, 0, 1], ddof=1) / 3**0.5)
    last = [Question((("a", " b"),), None, ())] * 2
    found = score(last, torch.tensor([-1.0, -3.0]).double(), torch.tensor([True, False]))
    assert (found["acc"].value, found["perplexity"].value) == pytest.approx((0.5, math.e**2))
    assert found["perplexity"].stderr == pytest.approx(math.e**2 * 1.0)


@torch.no_grad()
def test_likelihoods_equal_a_loop_whatever_the_batch():
    model = zoo.build("llama")
    requests = [(zoo.tokens(1, length, length)[0].tolist(), before) for length, before in ((9, 4), (30, 29), (5, 0))]
    for longest, batch_tokens in ((100, 1), (100, 1000), (12, 1000)):
        total, greedy = loglikelihoods(model, requests, longest=longest, batch_tokens=batch_tokens)
        for (tokens, before), value, likeliest in zip(requests, total, greedy, strict=True):
            kept = torch.tensor(tokens[-(longest + 1) :])
            first = max(1, before - len(tokens) + len(kept))
            logits = model(kept[None, :-1]).logits[0].log_softmax(-1)[first - 1 :]
            assert value.item() == pytest.approx(logits.gather(-1, kept[first:, None]).sum().item(), abs=1e-4)
            assert likeliest == (logits.argmax(-1) == kept[first:]).all()
    # as many positions as there are
    small = zoo.build("gpt2", n_positions=12)
    assert loglikelihoods(small, [(list(range(3, 16)), 6)], longest=12, batch_tokens=99)[0].isfinite().all()


def test_spaces_go_with_what_follows(tokenizer):
    tokens, before = encode(tokenizer, "import os\nimport ", "sys")
    assert (tokens, before) == (tokenizer.encode("import os\nimport sys"), len(tokenizer.encode("import os\nimport")))


def test_what_cannot_be_run(demo, tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "piqa.jsonl"
    for text, message in (
        ('{"query": "a"}\n', f"{path}:1: not a row of a task: expected context and continuation, query"),
        ('{"query": "a", "choices": ["b"], "gold": 2}\n', "not a row"),
        ("not json\n", f"{path}:1: not a JSON object"),
        ("", "holds no rows"),
    ):
        path.write_text(text)
        with pytest.raises(SurgeryError, match=message):
            run_tasks(demo, tokenizer, [str(path)])
    with pytest.raises(SurgeryError, match="cannot be read"):
        run_tasks(demo, tokenizer, [str(tmp_path / "absent.jsonl")])
    with pytest.raises(SurgeryError, match="needs a tokenizer"):
        run_tasks(demo, None, ["piqa.jsonl"])
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(SurgeryError, match=r'pip install "surgery\[eval\]"'):
        run_tasks(demo, tokenizer, ["piqa"])


def test_a_converted_model_runs_tasks(demo, tokenizer, files):
    converted = zoo.convert(AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32), "llama/logmass", window=8)
    found, whole = (
        run_tasks(model.eval(), tokenizer, [str(path) for path in files.values()], limit=2)
        for model in (converted, demo)
    )
    assert {name: (task.rows, task.scorer) for name, task in found.items()} == dict.fromkeys(files, (2, "built-in"))
    assert set(found["piqa"].metrics) == {"acc", "acc_norm"} and set(found["winogrande"].metrics) == {"acc"}
    assert found["lambada_openai"].metrics["perplexity"] != whole["lambada_openai"].metrics["perplexity"]


def test_the_harness_finds_the_same(demo, tokenizer, files, tmp_path):
    """Its own tasks as they are defined there, on rows of a file."""
    pytest.importorskip("lm_eval")
    lambada, piqa, boolq, winogrande = (ROWS[name] for name in files)
    prefix = len("Question: ")
    raw = {
        "lambada_openai": [{"text": f"{row['context']} {row['continuation']}"} for row in lambada],
        "piqa": [
            {"goal": row["query"][prefix:].strip(), "sol1": row["choices"][0], "sol2": row["choices"][1],
             "label": row["gold"]} for row in piqa
        ],
        "boolq": [
            {"passage": text[len("Passage: ") :], "question": question.rstrip("?"), "label": row["gold"]}
            for row in boolq for text, question in [row["query"].split("\nQuestion: ")]
        ],
        "winogrande": [
            {"sentence": f"{start} _ {row['continuation']}", "answer": str(row["gold"] + 1),
             "option1": row["context_options"][0].split()[-1], "option2": row["context_options"][1].split()[-1]}
            for row in winogrande for start in [row["context_options"][0].rpartition(" ")[0]]
        ],
    }  # fmt: skip
    from lm_eval.tasks import TaskManager

    tasks, known = [], TaskManager().task_index
    for name, rows in raw.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        split = "test" if name == "lambada_openai" else "validation"
        source = {"data_files": {split: str(path)}}
        changes = {"task": name, "dataset_path": "json", "dataset_name": None, "dataset_kwargs": source}
        changes |= {"include": str(known[name].yaml_path), "training_split": None}
        tasks.append(str(path.with_suffix(".yaml")))
        path.with_suffix(".yaml").write_text(json.dumps(changes))
    theirs = run_harness(demo, tokenizer, tasks)
    ours = run_tasks(demo, tokenizer, [str(path) for path in files.values()])
    for name, own in ours.items():
        assert theirs[name].rows == own.rows
        assert set(own.metrics) == set(theirs[name].metrics)
        for metric, found in own.metrics.items():
            assert found.value == pytest.approx(theirs[name].metrics[metric].value, rel=1e-4), (name, metric)
