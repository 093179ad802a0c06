"""Tokens a second of healing, and its memory, beside its peers: `python -m benchmarks.healing [--out FOLDER]`.

A step of each stage of LoLCATs, forward, backward and optimizer, at the shape of Llama-3.2-1B with random weights: by
our kernels, by chunked torch, and by plain PyTorch that computes all T² weights (`benchmarks.quadratic`); for the
second stage also the softmax model under the same adapters, and ours with recomputed activations. bf16 autocast, as
`surgery convert` trains. Beside the peak of memory stands what `surgery plan` says it is. What does not fit is said to.
Writes healing.json and healing.md; `--quick` runs a toy on any machine.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks import quadratic
from surgery import kernels
from surgery.callbacks import AttentionTransfer
from surgery.callbacks.recipes import stage_callbacks
from surgery.doctor import environment
from surgery.evaluation.provenance import source
from surgery.planning import plan
from surgery.planning.hardware import GPUS
from surgery.planning.plan import Request
from surgery.planning.shapes import load_config, with_layers
from surgery.planning.step import Step, stage_batch, stage_loss, stage_model
from surgery.recipe import load_recipe
from surgery.training.losses import cross_entropy
from surgery.training.module import HealingModule

ROOT = Path(__file__).resolve().parents[1]
CHUNKED, TRITON, RECOMPUTED = "ours, chunked torch", "ours, Triton", "ours, Triton, activations recomputed"
QUADRATIC, SOFTMAX = "LoLCATs, quadratic", "softmax"
TOY = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
Row = dict[str, Any]


def loss_of(way: str, step: Step, device: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The model that one way trains, and a step's loss."""
    layers = step.config.num_hidden_layers
    with torch.device(device):
        if way in (CHUNKED, TRITON, RECOMPUTED):
            model = stage_model(step, layers, 0)
        elif step.index:
            model = stage_model(step, 0, layers)
        else:
            config = with_layers(step.config, layers)
            model = AutoModelForCausalLM.from_config(config, dtype=config.dtype).requires_grad_(False)
        batch = stage_batch(step)
    if way == RECOMPUTED:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = {n: torch.randint_like(x, step.config.vocab_size) if x.dtype == torch.long else x for n, x in batch.items()}
    if way != QUADRATIC:
        stage = step.recipe.stages[step.index]
        transfer = next((c for c in stage_callbacks(stage) if isinstance(c, AttentionTransfer)), None)
        module = HealingModule(model, stage, steps=1, transfer=transfer)
        return model, lambda: stage_loss(module, batch)
    own = quadratic.install(model, transfer=step.index == 0)

    def transferred() -> Tensor:
        for layer in own:
            layer.losses = []
        with torch.no_grad() if step.index == 0 else nullcontext():
            model.model(batch["input_ids"])
        return torch.stack([loss for layer in own for loss in layer.losses or []]).mean()

    if step.index == 0:
        return model, transferred
    return model, lambda: cross_entropy(model(batch["input_ids"]).logits, batch["labels"])


def measure(way: str, step: Step, device: str, repeats: int) -> Row:
    """Seconds of a step, and the most memory it takes."""
    cuda = device == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None
    model, loss = loss_of(way, step, device)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-4, fused=cuda)
    spent = []
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with kernels.backend("triton" if cuda and way in (TRITON, RECOMPUTED) else "chunked"):
        for _ in range(2 + repeats):
            wait()
            start = time.perf_counter()
            with torch.autocast(device, torch.bfloat16, enabled=step.autocast):
                value = loss()
            value.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            wait()
            spent.append(time.perf_counter() - start)
    assert all(bool(p.grad is not None) for p in learning) and bool(value.isfinite())
    row: Row = {"seconds": median(spent[2:]), "tokens_per_second": step.batch * step.length / median(spent[2:])}
    return row | {"peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None}


def tried(way: str, step: Step, device: str, repeats: int) -> Row:
    row: Row = {"way": way, "stage": step.recipe.stages[step.index].kind, "batch": step.batch, "length": step.length}
    try:
        row |= measure(way, step, device, repeats)
    except torch.cuda.OutOfMemoryError:
        row["failed"] = f"does not fit in {torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB"
    except RuntimeError as failed:
        row["failed"] = f"{type(failed).__name__}: {str(failed).splitlines()[0][:120]}"
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return row


def planned(step: Step) -> list[dict[str, float]]:
    """GiB of tensors, by `surgery plan`: for each stage, without what driver and allocator keep."""
    stages = plan(step.config, step.recipe, Request(tokens_per_batch=step.batch * step.length, gpu="h100")).stages
    found = [{TRITON: stage.memory, RECOMPUTED: stage.checkpointed} for stage in stages]
    return [{way: (m.total - m.reserved) / 2**30 for way, m in own.items() if m is not None} for own in found]


def cases(config: LlamaConfig, lengths: list[int], tokens: int, autocast: bool) -> Iterator[tuple[list[str], Step]]:
    recipe = load_recipe("llama/lolcats")
    for length in lengths:
        stages = [stage.model_copy(update={"sequence_length": length}) for stage in recipe.stages]
        own = recipe.model_copy(update={"stages": stages})
        for index in range(2):
            step = Step(config, own, index, max(1, tokens // length), length, autocast, False, GPUS["h100"])
            # in attention transfer nothing flows from layer to layer, and activations are kept
            yield [TRITON, *([RECOMPUTED] if index else []), CHUNKED, QUADRATIC, *([SOFTMAX] if index else [])], step


def table(rows: list[Row]) -> str:
    columns = ["stage", "length", "rows", "way", "tokens/s", "of ours, Triton", "peak, GiB", "planned, GiB"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    best = {(r["stage"], r["length"]): r.get("tokens_per_second") for r in rows if r["way"] == TRITON}
    for r in rows:
        head = [r["stage"], r["length"], r["batch"], r["way"]]
        cells = [r.get("failed", ""), "", "", ""]
        if "failed" not in r:
            ours = best.get((r["stage"], r["length"]))
            cells = [f"{r['tokens_per_second']:,.0f}", f"{r['tokens_per_second'] / ours:.2f}" if ours else "–"]
            cells += ["–" if r.get(n) is None else f"{r[n]:.1f}" for n in ("peak_gib", "planned_gib")]
        lines.append("| " + " | ".join(map(str, [*head, *cells])) + " |")
    return "\n".join(lines) + "\n"


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1b")
    parser.add_argument("--lengths", nargs="*", type=int, default=[2048, 8192])
    parser.add_argument("--tokens", type=int, default=8192, help="of a step")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=[TRITON, RECOMPUTED, CHUNKED, QUADRATIC, SOFTMAX])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--quick", action="store_true", help="a toy, to see that all of this runs")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> list[Row]:
    chosen = arguments(given)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = load_config(shape=chosen.shape)
    if chosen.quick:
        config = LlamaConfig(**TOY, vocab_size=97, num_hidden_layers=2)
        chosen.lengths, chosen.tokens, chosen.repeats = [128], 256, 1
        chosen.only = [way for way in chosen.only if way != TRITON or device == "cuda"]
    torch.set_float32_matmul_precision("high")
    rows: list[Row] = []
    plans: dict[int, list[dict[str, float]]] = {}
    chosen.out.mkdir(parents=True, exist_ok=True)
    for ways, step in cases(config, chosen.lengths, chosen.tokens, device == "cuda"):
        for way in (way for way in ways if way in chosen.only):
            # matrices of one row are all that fits
            own = replace(step, batch=1) if way == QUADRATIC and not chosen.quick else step
            row = tried(way, own, device, chosen.repeats)
            if way in (TRITON, RECOMPUTED) and "failed" not in row:
                plans[own.length] = plans.get(own.length) or planned(own)
                row["planned_gib"] = plans[own.length][own.index][way]
            rows.append(row)
            print(table(rows).splitlines()[-1], flush=True)
            result = {"environment": environment(), "source": source(), "shape": chosen.shape, "rows": rows}
            (chosen.out / "healing.json").write_text(json.dumps(result, indent=1) + "\n")
            (chosen.out / "healing.md").write_text(table(rows))
    return rows


if __name__ == "__main__":
    main()
