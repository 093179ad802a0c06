"""What a calibrated start does to the loss: `python -m benchmarks.calibration --model DIR --data FILE ... [--out DIR]`.

Each mixer that has parts which set themselves is put into the model and measured on held-out windows, as it starts and
calibrated, without any training: the first windows of every file are for measuring, those after them for calibrating.
Also said is the squared error of the layers' outputs on the softmax model's inputs, which is what calibration lowers.
Writes calibration.json and .md; `--quick` runs a toy on any machine.
"""

from __future__ import annotations

import argparse
import json
from copy import deepcopy
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import surgery
from surgery.doctor import environment
from surgery.evaluation.comparison import replacing
from surgery.evaluation.losses import token_nll
from surgery.evaluation.provenance import source
from surgery.training.data.tokens import read_corpora

ROOT = Path(__file__).resolve().parents[1]
AVERAGE = {"window": {"size": 64}, "mix": {"kind": "average"}}
ALONE = {"window": None, "mix": None}
LOW_RANK = {"kind": "low_rank"}
MIXERS: dict[str, dict[str, Any]] = {
    "linear, joint": {"kind": "linear", "window": {"size": 64}, "mix": {"kind": "joint"}},
    "linear, logmass": {"kind": "linear", "window": {"size": 64}, "mix": {"kind": "logmass"}},
    "norm": {"kind": "norm"},
    "norm, average": {"kind": "norm", **AVERAGE},
    "diag, then norm": {"kind": "by_depth", "mixers": [{"kind": "diag"}, {"kind": "norm"}]},
    "lightning": {"kind": "lightning", **AVERAGE},
    "lightning, spread": {"kind": "lightning", "gate": {"kind": "spread"}, **AVERAGE},
    "gated_scalar": {"kind": "gated_scalar", **AVERAGE},
    "gated_scalar, alone": {"kind": "gated_scalar", **ALONE},
    "gated_scalar, mamba2": {"kind": "gated_scalar", "gate": {"kind": "mamba2"}, "normalize": "rms", **AVERAGE},
    "gla, constant": {"kind": "gla", "gate": {"kind": "constant"}, **AVERAGE},
    "gla, low rank": {"kind": "gla", "gate": LOW_RANK, **AVERAGE},
    "gla, low rank, rms": {"kind": "gla", "gate": LOW_RANK, "normalize": "rms", **AVERAGE},
    "hgrn2, low rank": {"kind": "hgrn2", "gate": LOW_RANK, **AVERAGE},
    "gated_delta": {"kind": "gated_delta", **AVERAGE},
    "kda": {"kind": "kda", **AVERAGE},
    "mesa": {"kind": "mesa", **AVERAGE},
}
Row = dict[str, Any]


@torch.no_grad()
def nll(model: nn.Module, held: Tensor) -> Tensor:
    """[N] fp64, of each window."""
    return torch.cat([token_nll(model, ids).mean(1) for ids in held.split(4)])


def measure(name: str, base: nn.Module, held: Tensor, sample: Tensor) -> Row:
    model = surgery.apply(deepcopy(base), {"mixer": MIXERS[name]})
    before = nll(model, held)
    found = surgery.calibrate(model, sample, tokens=sample.numel())
    after = nll(model, held)
    fallen = after - before
    return {
        "mixer": name,
        "before": before.mean().item(),
        "after": after.mean().item(),
        "difference": fallen.mean().item(),
        "stderr": fallen.std().item() / len(fallen) ** 0.5 if len(fallen) > 1 else None,
        "error_before": fmean(layer.before for layer in found.layers),
        "error_after": fmean(layer.after for layer in found.layers),
    }


def read(chosen: argparse.Namespace) -> tuple[nn.Module, Tensor, Tensor]:
    """The model, and windows [N, T] to measure and to calibrate on."""
    length, count = chosen.length, chosen.windows
    if chosen.quick:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
        ids = torch.randint(50, (2 * count, length))
        return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=50, **sizes)), ids[:count], ids[count:]
    model = AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.float32)
    plain = all(set(path.suffixes) & {".npy", ".u16"} for path in chosen.data)
    corpora = read_corpora(chosen.data, None if plain else AutoTokenizer.from_pretrained(chosen.model))
    held, sample = [], []
    for name, tokens in corpora.items():
        if len(tokens) < 2 * count * length:
            raise SystemExit(f"{name} has {len(tokens):,} tokens, too few for {2 * count} windows of {length}")
        ids = torch.from_numpy(tokens[: 2 * count * length].astype(np.int64)).view(2 * count, length)
        held.append(ids[:count])
        sample.append(ids[count:])
    return model, torch.cat(held), torch.cat(sample)


def report(result: dict[str, Any]) -> str:
    heads = ["mixer", "nll, as it starts", "calibrated", "difference", "error of layers", "calibrated"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in result["rows"]:
        cells = [row["mixer"], f"{row['before']:.3f}", f"{row['after']:.3f}"]
        cells.append(f"{row['difference']:+.3f}" + ("" if row["stderr"] is None else f" ± {row['stderr']:.3f}"))
        cells += [f"{row['error_before']:.3f}", f"{row['error_after']:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    risen = [row["mixer"] for row in result["rows"] if row["difference"] > 0]
    said = f"Calibration raised the loss of: {', '.join(risen)}." if risen else "Calibration raised no loss."
    note = f"Softmax: {result['softmax']:.3f}. ± is a standard error over windows of the pairs. {said}"
    setup = ", ".join(f"{name} {value}" for name, value in result["setup"].items())
    versions = ", ".join(f"{name} {value}" for name, value in result["environment"].items())
    return "\n\n".join(["\n".join(lines), note, setup, f"{result['source']}; {versions}"]) + "\n"


def write(result: dict[str, Any], out: Path) -> None:
    for suffix, text in ((".json", json.dumps(result, indent=1) + "\n"), (".md", report(result))):
        with replacing(out / f"calibration{suffix}") as temporary:
            temporary.write_text(text, encoding="utf-8")


def main(given: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", nargs="*", type=Path, default=[])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--only", nargs="*", default=list(MIXERS))
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=4, help="of every file, to measure on, and as many to calibrate")
    parser.add_argument("--quick", action="store_true", help="a toy, to see that all of this runs")
    chosen = parser.parse_args(given)
    if chosen.quick:
        chosen.length, chosen.windows = 80, 2
    elif chosen.model is None or not chosen.data:
        parser.error("give --model and --data, or --quick")
    base, held, sample = read(chosen)
    base = base.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    held, sample = (ids.to(next(base.parameters()).device) for ids in (held, sample))
    setup = {"model": None if chosen.quick else chosen.model.name, "data": [path.name for path in chosen.data]}
    setup |= {"length": chosen.length, "windows": len(held), "tokens to calibrate": sample.numel()}
    result: dict[str, Any] = {"environment": environment(), "source": source(), "setup": setup}
    result |= {"softmax": nll(base, held).mean().item(), "rows": []}
    for name in chosen.only:
        row = measure(name, base, held, sample)
        result["rows"].append(row)
        print(f"{name}: {row['before']:.3f} -> {row['after']:.3f}", flush=True)
        write(result, chosen.out)
    return result


if __name__ == "__main__":
    main()
