"""Who recalls most from a state of one size: `python -m benchmarks.recall [--out FOLDER] [--jobs 6]`.

Multi-query associative recall (arXiv 2312.04927), learned from scratch: key, value, key, value ..., then all keys in
another order, each followed by its value, which alone is learned and asked for. All models are Llamas of two layers. In
the first a token attends to itself and the one before, as short convolutions let it; in the second stands the mixer,
whose state is all that joins a key to its value. States have as many numbers each, up to a normaliser's, softmax's
excepted. Of several learning rates the one counts that ends with the lowest training loss. Writes recall.json, .md and
.png; `--quick` runs a toy on any machine.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

import surgery
from benchmarks.scratch import IGNORED, learn
from surgery.doctor import environment
from surgery.evaluation.associative import Sequences, measure_recall, pair_sequences
from surgery.evaluation.comparison import replacing
from surgery.evaluation.losses import token_scores
from surgery.evaluation.provenance import source
from surgery.patchers.interface import converted_layers

ROOT = Path(__file__).resolve().parents[1]
SOFTMAX = "softmax"
ALONE = {"rope": "raw", "window": None, "mix": None}
NORMED = {**ALONE, "normalize": "rms"}
HIDDEN = {"kind": "low_rank", "source": "hidden"}
MIXERS: dict[str, dict[str, Any]] = {
    "linear": {"kind": "linear", "feature_map": {"kind": "elu1"}, **ALONE},
    "lightning": {**NORMED, "kind": "lightning", "feature_map": {"kind": "silu"},
        "gate": {"kind": "slopes", "by_layer": False}},
    "gated_scalar": {**NORMED, "kind": "gated_scalar", "feature_map": {"kind": "silu"}},
    "gla": {**NORMED, "kind": "gla", "feature_map": {"kind": "identity"}, "gate": HIDDEN},
    "hgrn2": {**NORMED, "kind": "hgrn2", "feature_map": {"kind": "silu"}, "gate": {**HIDDEN, "rank": 128}},
    "gsa": {**ALONE, "kind": "gsa"},
    "delta": {**NORMED, "kind": "delta"},
    "gated_delta": {**NORMED, "kind": "gated_delta"},
    "kda": {**NORMED, "kind": "kda", "gate": HIDDEN},
    "mesa": {**ALONE, "kind": "mesa"},
}  # fmt: skip
"""Each as it is published, without its convolution and output gate. Queries and keys are not rotated."""
KINDS = {"ungated": ["linear"], "gated": ["gated_scalar", "gla", "hgrn2", "gsa"], "delta": ["delta", "gated_delta"]}
"""What the papers' claim is about; `kda` and `mesa` came after it, and `lightning` gates nothing."""
LEARNED_LAST = 100
"""Steps that the training loss is a mean of."""


@dataclass(frozen=True)
class Setup:
    """One task and budget for all. words: that keys are drawn from, and as many others for values; counts: of pairs, in
    turn, in batches of `rows`; held: sequences asked for in the end."""

    hidden: int = 128
    heads: int = 2
    words: int = 256
    counts: tuple[int, ...] = (8, 16, 32, 64)
    rows: int = 64
    steps: int = 4000
    held: int = 256


QUICK = Setup(hidden=16, words=20, counts=(2, 4), rows=4, steps=4, held=4)
Row = dict[str, Any]


def build(name: str, setup: Setup) -> nn.Module:
    """The model; heads of mesa, which has two matrices a head, are half as wide and twice as many, and gsa has half as
    many slots as a head has channels, so that the states of all are of one size."""
    heads = setup.heads * (2 if name == "mesa" else 1)
    config = LlamaConfig(
        vocab_size=2 * setup.words, hidden_size=setup.hidden, intermediate_size=2 * setup.hidden, num_hidden_layers=2,
        num_attention_heads=heads, num_key_value_heads=heads, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    near = {"kind": "window", "window": {"size": 2}}
    if name == SOFTMAX:
        surgery.apply(model, {"mixer": near}, layers=[0])
        return model.requires_grad_(True)
    own = MIXERS[name] | ({"slots": setup.hidden // heads // 2} if name == "gsa" else {})
    surgery.apply(model, {"mixer": {"kind": "by_depth", "mixers": [near, own]}})
    return model.requires_grad_(True)


def state_numbers(model: nn.Module) -> int | None:
    """What the second layer carries; None: keys and values of all tokens."""
    mixers = [module.mixer for module in converted_layers(model).values()]
    return mixers[1].state_bytes(torch.float32) // 4 if len(mixers) > 1 else None


def pairs(setup: Setup, rows: int, seed: int, counts: Sequence[int]) -> Iterator[Sequences]:
    """Keys are words, values are others, so that a token shows which of the two it is."""
    for made in pair_sequences(torch.arange(setup.words), 4 * max(counts), rows, None, seed, counts):
        made.ids[:, 1::2] += setup.words
        yield made


def batches(setup: Setup, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids [B, T] and labels [B, T - 1], all but the values asked for ignored. Seeds from 1: 0 is held out."""
    for step in range(setup.steps):
        found = next(pairs(setup, setup.rows, step + 1, [setup.counts[step % len(setup.counts)]]))
        labels = torch.full_like(found.ids[:, 1:], IGNORED)
        labels.scatter_(1, found.second - 1, found.ids.gather(1, found.second))
        yield found.ids.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def train(name: str, rate: float, setup: Setup) -> Row:
    """One model learned and asked; runs in a process of its own."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    device, began = "cuda" if torch.cuda.is_available() else "cpu", time.perf_counter()
    torch.manual_seed(0)
    model = build(name, setup).to(device)
    curve = learn(model, batches(setup, device), rate, setup.steps)
    with torch.no_grad():
        asked = [
            measure_recall(made, lambda _, ids: token_scores(model, ids.to(device)))
            for made in pairs(setup, setup.held, 0, setup.counts)
        ]
    return {
        "mixer": name,
        "rate": rate,
        "state": state_numbers(model),
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_loss": fmean(curve[-LEARNED_LAST:]),
        "accuracy": {str(found.size): found.accuracy.value for found in asked},
        "stderr": {str(found.size): found.accuracy.stderr for found in asked},
        "nll": {str(found.size): found.second.value for found in asked},
        "losses": [round(fmean(curve[i : i + LEARNED_LAST]), 4) for i in range(0, len(curve), LEARNED_LAST)],
        "seconds": time.perf_counter() - began,
    }


def best(rows: list[Row]) -> dict[str, Row]:
    """The row of each mixer whose training loss is lowest (NaN is highest), in the order of the table."""
    found = {}
    for name in [*MIXERS, SOFTMAX]:
        own = [row for row in rows if row["mixer"] == name and "failed" not in row]
        if own:
            found[name] = min(
                own, key=lambda row: row["training_loss"] if row["training_loss"] == row["training_loss"] else 1e9
            )
    return found


def claim(found: dict[str, Row], count: str) -> str:
    """Whether delta > gated > ungated, by what this run measured."""
    scores = {
        kind: max(((found[n]["accuracy"][count], n) for n in names if n in found), default=None)
        for kind, names in KINDS.items()
    }
    if None in scores.values():
        return "Not all kinds were run, so that the claim delta > gated > ungated was not checked."
    ungated, gated, delta = (scores[kind] for kind in KINDS)
    said = ", ".join(f"{kind} {score:.3f} ({name})" for kind, (score, name) in reversed(scores.items()))
    holds = "holds" if delta[0] > gated[0] > ungated[0] else "does not hold"
    return f"Claim at {count} pairs, delta > gated > ungated, best of each: {said}: {holds}."


def report(result: dict[str, Any]) -> str:
    found = best(result["rows"])
    counts = [str(count) for count in result["setup"]["counts"]]
    heads = ["mixer", "state", "parameters", "rate", "training loss", *(f"{count} pairs" for count in counts)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, row in found.items():
        cells = [
            name,
            f"{row['state']:,}" if row["state"] else "all keys",
            f"{row['parameters']:,}",
            f"{row['rate']:g}",
        ]
        cells += [f"{row['training_loss']:.3f}"]
        cells += [f"{row['accuracy'][count]:.3f} ± {row['stderr'][count] or 0:.3f}" for count in counts]
        lines.append("| " + " | ".join(cells) + " |")
    failed = [f"{row['mixer']} at {row['rate']:g} failed: {row['failed']}" for row in result["rows"] if "failed" in row]
    versions = ", ".join(f"{name} {value}" for name, value in result["environment"].items())
    words = result["setup"]["words"]
    note = f"Accuracy of recalled values; chance is one in {words}. State: numbers that the second layer carries."
    setup = ", ".join(f"{name} {value}" for name, value in result["setup"].items())
    return (
        "\n\n".join(
            ["\n".join(lines), note, claim(found, counts[-1]), *failed, setup, f"{result['source']}; {versions}"]
        )
        + "\n"
    )


def plot(result: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, row in best(result["rows"]).items():
        style = "--" if name == SOFTMAX else "-"
        axes.plot(list(row["accuracy"]), list(row["accuracy"].values()), style, marker="o", label=name)
    axes.set_xlabel("key-value pairs")
    axes.set_ylabel("values recalled")
    axes.legend(frameon=False, fontsize="small", ncols=2)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def write(result: dict[str, Any], out: Path) -> None:
    for suffix, text in ((".json", json.dumps(result, indent=1) + "\n"), (".md", report(result))):
        with replacing(out / f"recall{suffix}") as temporary:
            temporary.write_text(text, encoding="utf-8")
    plot(result, out / "recall.png")


def main(given: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--only", nargs="*", default=[*MIXERS, SOFTMAX])
    parser.add_argument("--rates", nargs="*", type=float, default=[1e-3, 3e-3])
    for name in ("hidden", "words", "rows", "steps"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Setup, name))
    parser.add_argument("--counts", nargs="*", type=int, default=Setup.counts, help="of pairs")
    parser.add_argument("--jobs", type=int, default=6, help="models at once")
    parser.add_argument("--quick", action="store_true", help="a toy, to see that all of this runs")
    chosen = parser.parse_args(given)
    own = {name: getattr(chosen, name) for name in ("hidden", "words", "rows", "steps")}
    setup = QUICK if chosen.quick else Setup(**own, counts=tuple(chosen.counts))
    rates = chosen.rates[:1] if chosen.quick else chosen.rates
    result: dict[str, Any] = {"environment": environment(), "source": source(), "setup": asdict(setup), "rows": []}
    with ThreadPoolExecutor(1) if chosen.quick else ProcessPoolExecutor(chosen.jobs, get_context("spawn")) as pool:
        running = {pool.submit(train, *run, setup): run for run in product(chosen.only, rates)}
        for done in as_completed(running):
            name, rate = running[done]
            try:
                row = done.result()
            except RuntimeError as failed:
                row = {
                    "mixer": name,
                    "rate": rate,
                    "failed": f"{type(failed).__name__}: {str(failed).splitlines()[0][:200]}",
                }
            result["rows"].append(row)
            print(name, rate, row.get("accuracy") or row["failed"], f"{row.get('seconds', 0):.0f} s", flush=True)
            write(result, chosen.out)
    return result


if __name__ == "__main__":
    main()
