"""Tokens a second of a converted model beside its softmax original, at growing contexts: `python -m benchmarks.decode`.

The weights are random and the shape is that of a few layers of Llama-3.2-1B, unless flags say otherwise. Nothing is
prefilled: the caches of both are filled with random numbers of the right shape, which costs as much to read. Softmax
attends to its whole static cache by torch's fused attention, without a mask and with shared heads. Each model decodes
one token of every row at a time, eagerly and (on a GPU) as a captured CUDA graph. What does not fit is skipped and said
to. Writes decode.json and decode.md; `--quick` runs a toy on any machine.
"""

from __future__ import annotations

import argparse
import inspect
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

import surgery
from surgery.cache import RecurrentLayer
from surgery.doctor import environment
from surgery.evaluation.provenance import source

ROOT = Path(__file__).resolve().parents[1]
SOFTMAX, WHOLE = "softmax", "whole_cache"
MIB = 2**20
WARM_UP = 4
ROUNDS = 3
Row = dict[str, Any]


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Attention to every column of the cache: [B, H, 1, D] in, [B, 1, H, D] out."""
    groups = query.shape[1] != key.shape[1]
    y = nn.functional.scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=groups)
    return y.transpose(1, 2), None


AttentionInterface.register(WHOLE, attend)
AttentionMaskInterface.register(WHOLE, lambda *args, **kwargs: None)


def build(chosen: argparse.Namespace) -> Any:
    """The softmax model, of random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=chosen.vocab,
        hidden_size=chosen.hidden,
        intermediate_size=chosen.intermediate,
        num_hidden_layers=chosen.layers,
        num_attention_heads=chosen.heads,
        num_key_value_heads=chosen.kv_heads,
        head_dim=chosen.head_dim,
        max_position_embeddings=2 * max(chosen.contexts),
        tie_word_embeddings=True,
    )
    with torch.device(chosen.device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, chosen.dtype)).eval()


def cache_bytes(model: Any, batch: int, context: int) -> int:
    """Of keys and values."""
    c = model.config
    return 2 * c.num_hidden_layers * batch * context * c.num_key_value_heads * c.head_dim * model.dtype.itemsize


def step_of(model: Any, cache: StaticCache, batch: int, context: int) -> Callable[[], Tensor]:
    """One token for every row, at the end of the context."""
    name = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
    ids = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
    positions = torch.full((batch, 1), context, device=model.device)

    @torch.no_grad()
    def step() -> Tensor:
        return model(ids, position_ids=positions, use_cache=True, **{name: cache}).logits

    return step


def fill(cache: StaticCache, context: int, steps: int) -> int:
    """Random numbers for all that the layers hold, room for the steps that follow; returns its bytes."""
    held = 0
    for layer in cache.layers:
        if isinstance(layer, RecurrentLayer):
            for name, x in layer.state.items():
                x.fill_(context) if name == "seen" else x.normal_()
            # sums of positive features
            layer.state.get("z", x.new_empty(0)).abs_().add_(1)
            held += layer.nbytes
        else:
            layer.keys.normal_()
            layer.values.normal_()
            layer.cumulative_length.fill_(context - steps)
            held += 2 * layer.keys.numel() * layer.keys.element_size()
    return held


def captured(step: Callable[[], Tensor]) -> Callable[[], None]:
    """The launches of a step as one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def seconds(step: Callable[[], Any], steps: int) -> float:
    """Of one step, the median of a few rounds."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for _ in range(WARM_UP):
        step()
    spent = []
    for _ in range(ROUNDS):
        wait()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        wait()
        spent.append((time.perf_counter() - start) / steps)
    return median(spent)


def measure(model: Any, name: str, batch: int, context: int, steps: int) -> list[Row]:
    """One row for each way to launch."""
    cuda = model.device.type == "cuda"
    rows = []
    for mode in ("eager", "graph") if cuda else ("eager",):
        row: Row = {"model": name, "batch": batch, "context": context, "mode": mode}
        total = WARM_UP + ROUNDS * steps + 3
        try:
            if cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                wanted = cache_bytes(model, batch, context) if name == SOFTMAX else 0
                free = torch.cuda.mem_get_info()[0]
                if wanted > free:
                    raise torch.cuda.OutOfMemoryError(f"keys and values of {wanted / 2**30:.0f} GiB")
            cache = StaticCache(model.config, max_cache_len=max(context, total + 1))
            step = step_of(model, cache, batch, context)
            step()
            row["cache_mib"] = fill(cache, context, total) / MIB
            spent = seconds(captured(step) if mode == "graph" else step, steps)
            row |= {"ms": spent * 1e3, "tokens_per_second": batch / spent}
            row["peak_mib"] = torch.cuda.max_memory_allocated() / MIB if cuda else None
        except torch.cuda.OutOfMemoryError as full:
            row["skipped"] = f"does not fit: {str(full).splitlines()[0][:120]}"
        rows.append(row)
        print(line(row), flush=True)
        cache = step = None
    return rows


def crossover(rows: list[Row], name: str, batch: int, mode: str) -> str:
    """From which context on the converted model is faster, straight lines between those measured."""
    times = {
        (r["model"], r["context"]): r["ms"] for r in rows if (r["batch"], r["mode"]) == (batch, mode) and "ms" in r
    }
    ours = next((ms for (model, _), ms in times.items() if model == name), None)
    softmax = sorted((context, ms) for (model, context), ms in times.items() if model == SOFTMAX)
    if ours is None or not softmax:
        return "not measured"
    if softmax[0][1] >= ours:
        return f"below {softmax[0][0]}"
    for (c0, t0), (c1, t1) in zip(softmax, softmax[1:], strict=False):
        if t1 >= ours:
            return f"{c0 + (c1 - c0) * (ours - t0) / (t1 - t0):.0f}"
    return f"above {softmax[-1][0]}"


COLUMNS = ["model", "batch", "context", "mode", "ms a step", "tokens/s", "cache, MiB", "peak, MiB"]


def line(row: Row) -> str:
    head = [row["model"], row["batch"], row["context"], row["mode"]]
    if "skipped" in row:
        return "| " + " | ".join(map(str, [*head, row["skipped"], "", "", ""])) + " |"
    peak = "–" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
    cells = [*head, f"{row['ms']:.3f}", f"{row['tokens_per_second']:.0f}", f"{row['cache_mib']:.1f}", peak]
    return "| " + " | ".join(map(str, cells)) + " |"


def table(columns: list[str], lines: list[str]) -> str:
    return "\n".join(["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|", *lines]) + "\n"


def report(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in result["environment"].items())
    shape = ", ".join(f"{name} {value}" for name, value in result["shape"].items())
    crossed = ["| " + " | ".join(map(str, x.values())) + " |" for x in result["crossovers"]]
    return (
        f"{versions}; {result['source']}.\n\n{shape}. Converted models take the same time at any context.\n\n"
        + table(COLUMNS, [line(row) for row in result["rows"]])
        + "\n"
        + table(["model", "batch", "mode", "faster from a context of"], crossed)
    )


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="*", default=["llama/lolcats", "llama/liger-gla", "llama/logmass"])
    parser.add_argument("--contexts", nargs="*", type=int, default=[1024, 4096, 16384, 65536])
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8, 64, 256])
    sizes = {"layers": 4, "hidden": 2048, "intermediate": 8192, "heads": 32, "kv-heads": 8, "head-dim": 64}
    for name, value in (sizes | {"vocab": 128256, "steps": 32}).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--quick", action="store_true", help="a toy model, to see that all of this runs")
    chosen = parser.parse_args(given)
    if chosen.quick:
        toy = {"layers": 1, "hidden": 32, "intermediate": 48, "heads": 4, "kv_heads": 2, "head_dim": 8, "vocab": 97}
        vars(chosen).update(toy | {"contexts": [64, 128], "batches": [1, 2], "steps": 2, "dtype": "float32"})
    return chosen


def main(given: list[str] | None = None) -> dict[str, Any]:
    chosen = arguments(given)
    model, rows = build(chosen), []
    print(table(COLUMNS, []), end="")
    model.set_attn_implementation(WHOLE)
    for batch in chosen.batches:
        for context in chosen.contexts:
            rows += measure(model, SOFTMAX, batch, context, chosen.steps)
    model.set_attn_implementation("sdpa")
    for recipe in chosen.recipes:
        surgery.apply(model, recipe)
        for batch in chosen.batches:
            rows += measure(model, recipe, batch, max(chosen.contexts), chosen.steps)
        surgery.revert(model)
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    crossovers = [
        {"model": recipe, "batch": batch, "mode": mode, "context": crossover(rows, recipe, batch, mode)}
        for recipe in chosen.recipes
        for batch in chosen.batches
        for mode in modes
    ]
    names = ("layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "vocab", "dtype")
    result = {
        "environment": environment(),
        "source": source(),
        "shape": {name: getattr(chosen, name) for name in names},
        "crossovers": crossovers,
        "rows": rows,
    }
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "decode.json").write_text(json.dumps(result, indent=1) + "\n")
    (chosen.out / "decode.md").write_text(report(result))
    return result


if __name__ == "__main__":
    main()
