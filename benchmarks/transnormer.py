"""Whether early layers should look near and late ones far: `python -m benchmarks.transnormer --data FILE [--out DIR]`.

TransNormer (arXiv 2210.10340) has softmax in blocks (`diag`) in the first half of its layers and normed linear
attention (`norm`) in the second. Small language models, Llamas but for their attention, learn the same tokens in the
same order from scratch, for each order of the two and for each alone, from several seeds; what they are worth is the
loss on the windows that end the file. --data: tokens (.npy, .u16), or text with --model naming a tokenizer's folder.
Writes transnormer.json, .md and .png; `--quick` runs a toy on any machine, without --data on random tokens.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import surgery
from benchmarks.scratch import learn
from surgery.doctor import environment
from surgery.evaluation.comparison import replacing
from surgery.evaluation.losses import token_nll
from surgery.evaluation.provenance import source
from surgery.mixers.recurrent import HeadNorm
from surgery.training.data.tokens import read_corpora

ROOT = Path(__file__).resolve().parents[1]
NORM = {"kind": "norm", "feature_map": {"kind": "elu1"}, "eps": 1e-5}
GAIN = 0.1
"""What norms start with: at one their outputs drown embeddings of Llama's initial size, and models that begin with them
learn how frequent tokens are and no more, so that not the order but the scale would be compared."""
Row = dict[str, Any]


def orders(block: int) -> dict[str, dict[str, Any] | None]:
    """What stands in the layers; None: softmax over everything."""
    diag = {"kind": "diag", "window": {"size": block, "layout": "block"}}
    return {
        "diag, then norm": {"kind": "by_depth", "mixers": [diag, NORM]},
        "norm, then diag": {"kind": "by_depth", "mixers": [NORM, diag]},
        "norm": NORM,
        "diag": diag,
        "softmax": None,
    }


def build(mixer: dict[str, Any] | None, chosen: argparse.Namespace, vocabulary: int) -> nn.Module:
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=chosen.hidden, intermediate_size=3 * chosen.hidden,
        num_hidden_layers=chosen.layers, num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True,
        max_position_embeddings=chosen.length, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    if mixer is not None:
        surgery.apply(model, {"mixer": mixer})
    for module in model.modules():
        if isinstance(module, HeadNorm):
            nn.init.constant_(module.gain, GAIN)
    return model.requires_grad_(True)


def batches(windows: Tensor, rows: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids and labels, all windows [N, T] again and again, each time in another order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for chosen in torch.randperm(len(windows), generator=generator).split(rows):
            ids = windows[chosen.to(windows.device)]
            yield ids, ids[:, 1:]


def run(name: str, seed: int, windows: Tensor, held: Tensor, chosen: argparse.Namespace) -> Row:
    began, vocabulary = time.perf_counter(), int(max(windows.max(), held.max())) + 1
    torch.manual_seed(seed)
    model = build(orders(chosen.block)[name], chosen, vocabulary).to(windows.device)
    losses = learn(model, batches(windows, chosen.rows, seed), chosen.rate, chosen.steps)
    with torch.no_grad():
        nll = torch.cat([token_nll(model, ids).mean(1) for ids in held.split(chosen.rows)])
    return {
        "order": name,
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "nll": nll.mean().item(),
        "window_nll": [round(value, 4) for value in nll.tolist()],
        "losses": [round(fmean(losses[i : i + 10]), 4) for i in range(0, len(losses), 10)],
        "seconds": time.perf_counter() - began,
    }


def read(chosen: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Windows [N, T] to learn, and those held out."""
    if chosen.data is None:
        if not chosen.quick:
            raise SystemExit("--data names the tokens to learn: give a file of them, or --quick to run a toy")
        tokens = np.random.default_rng(0).integers(0, 50, 40 * chosen.length)
    else:
        tokenizer = None if chosen.model is None else AutoTokenizer.from_pretrained(chosen.model)
        tokens = np.concatenate(list(read_corpora(chosen.data, tokenizer).values()))
    count = len(tokens) // chosen.length
    windows = torch.from_numpy(tokens[: count * chosen.length].astype(np.int64)).view(count, chosen.length)
    return windows[: -chosen.held], windows[-chosen.held :]


def means(rows: list[Row]) -> dict[str, tuple[float, float | None, int]]:
    """Of each order, over its seeds: loss, the deviation between seeds, and how many there were."""
    found = {}
    for name in dict.fromkeys(row["order"] for row in rows):
        values = [row["nll"] for row in rows if row["order"] == name]
        found[name] = fmean(values), stdev(values) if len(values) > 1 else None, len(values)
    return found


def claim(rows: list[Row]) -> str:
    """Whether near-then-far beats far-then-near and far alone, seed by seed, by what this run measured."""
    own = {(row["order"], row["seed"]): row["nll"] for row in rows}
    said = []
    for other in ("norm, then diag", "norm"):
        gains = [own[other, seed] - nll for (name, seed), nll in own.items()
                 if name == "diag, then norm" and (other, seed) in own]  # fmt: skip
        if gains:
            holds = "holds" if min(gains) > 0 else "does not hold"
            said.append(f"`diag, then norm` beats `{other}` by {fmean(gains):.4f} nats ({len(gains)} seeds): {holds}")
    return "; ".join(said) + "." if said else "The orders to compare were not run."


def report(result: dict[str, Any]) -> str:
    heads = ["layers", "held-out nll", "between seeds", "seeds", "parameters"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    sizes = {row["order"]: row["parameters"] for row in result["rows"]}
    for name, (nll, deviation, count) in means(result["rows"]).items():
        spread = "–" if deviation is None else f"{deviation:.4f}"
        lines.append(f"| {name} | {nll:.4f} | {spread} | {count} | {sizes[name]:,} |")
    setup = ", ".join(f"{name} {value}" for name, value in result["setup"].items())
    versions = ", ".join(f"{name} {value}" for name, value in result["environment"].items())
    return "\n\n".join(["\n".join(lines), claim(result["rows"]), setup, f"{result['source']}; {versions}"]) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in means(result["rows"]):
        curves = [row["losses"] for row in result["rows"] if row["order"] == name]
        axes.plot(10 * np.arange(1, len(curves[0]) + 1), np.mean(curves, 0), label=name)
    axes.set_xlabel("steps")
    axes.set_ylabel("training loss, nats a token")
    axes.legend(frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def write(result: dict[str, Any], out: Path) -> None:
    for suffix, text in ((".json", json.dumps(result) + "\n"), (".md", report(result))):
        with replacing(out / f"transnormer{suffix}") as temporary:
            temporary.write_text(text, encoding="utf-8")
    plot(result, out / "transnormer.png")


def main(given: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="*", type=Path)
    parser.add_argument("--model", type=Path, help="folder of a tokenizer, for text")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--only", nargs="*", default=list(orders(1)))
    parser.add_argument("--rate", type=float, default=3e-3)
    sizes = {"layers": 4, "hidden": 64, "length": 256, "block": 32, "rows": 8, "steps": 400, "held": 64, "seeds": 1}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--quick", action="store_true", help="a toy, to see that all of this runs")
    chosen = parser.parse_args(given)
    if chosen.quick:
        chosen.hidden, chosen.length, chosen.block, chosen.rows, chosen.steps, chosen.held = 16, 32, 8, 2, 3, 2
    windows, held = (part.to("cuda" if torch.cuda.is_available() else "cpu") for part in read(chosen))
    setup = {name: getattr(chosen, name) for name in [*sizes, "rate"]}
    setup |= {"data": [path.name for path in chosen.data or []], "windows": len(windows)}
    result: dict[str, Any] = {"environment": environment(), "source": source(), "setup": setup, "rows": []}
    for seed, name in product(range(chosen.seeds), chosen.only):
        row = run(name, seed, windows, held, chosen)
        result["rows"].append(row)
        print(f"{name}, seed {seed}: {row['nll']:.4f} ({row['seconds']:.0f} s)", flush=True)
        write(result, chosen.out)
    return result


if __name__ == "__main__":
    main()
