"""Hedgehog on a small GPT-2 against an elu+1 map under the same budget, in perplexity: a few minutes on one GPU.

    python -m benchmarks.hedgehog_gpt2 --tokenizer FOLDER --text FILE ... --held FILE [--minutes 5] [--out FOLDER]

A GPT-2 of 12 M parameters with the tokens of FOLDER (vocab.json, merges.txt) learns FILEs of text (.txt, .jsonl, also
.xz) for so many minutes. Then it is converted by `gpt2/hedgehog` and healed by its two stages; elu+1 has nothing to
transfer and learns the language for as many tokens as both stages have; so does the softmax model, under the same
adapters. Perplexities are per token of the held out text, WikiText-2 say, in windows of 512. Beside them stands what
the paper reports (arXiv 2402.04347). Writes hedgehog_gpt2.json and .md; `--quick` runs a toy on any machine.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

import surgery
from benchmarks.encoders import ROOT, fit, lines
from surgery import adapters
from surgery.callbacks import StageRunner
from surgery.doctor import environment
from surgery.evaluation.losses import measuring, token_nll
from surgery.evaluation.provenance import source
from surgery.recipe import Recipe

PAPER = (
    "Hedgehog's authors report 16.7 for GPT-2 of 125 M parameters converted on WikiText-103 (arXiv 2402.04347, "
    "abstract), and, trained from scratch there, 68.6 % of the gap between the best earlier map and softmax closed."
)
SHORT = {"stages.1.lr": 1e-3, "stages.1.mixer_lr": 1e-3}
"""Changes to the recipe, whose rates are for many more steps."""
SIZES = {"n_embd": 192, "n_layer": 6, "n_head": 3, "n_positions": 512}
TOY = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}


def tokens(paths: list[Path], tokenizer: Any) -> Tensor:
    texts = ["\n".join(lines(path)) for path in paths]
    return torch.cat([torch.tensor(tokenizer.encode(text, verbose=False)) for text in texts])


def draw(ids: Tensor, batch: int, length: int, seed: int) -> Tensor:
    """[batch, length] from anywhere in ids."""
    generator = torch.Generator().manual_seed(seed)
    begins = torch.randint(len(ids) - length, (batch, 1), generator=generator)
    return ids[begins + torch.arange(length)]


def pretrain(config: GPT2Config, ids: Tensor, batch: int, seconds: float, lr: float = 2e-3) -> tuple[nn.Module, int]:
    """A model, and how many steps it had in the time; the rate rises for a twentieth of it and falls in a cosine."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    began, step = time.monotonic(), 0
    while (part := (time.monotonic() - began) / seconds) < 1:
        factor = min(1.0, 20 * part) * (0.05 + 0.95 * math.cos(math.pi / 2 * part) ** 2)
        for group in optimizer.param_groups:
            group["lr"] = lr * factor
        rows = draw(ids, batch, config.n_positions, step).to(device)
        with torch.autocast(device, torch.bfloat16):
            loss = model(rows, labels=rows).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
    return model.cpu(), step


class Language(L.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        return self.model(batch["input_ids"], labels=batch["input_ids"]).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


def heal(model: nn.Module, recipe: Recipe, ids: Tensor, batch: int, steps: list[int]) -> float:
    """Run the recipe's stages for so many steps each, and merge adapters; returns seconds."""
    length = model.config.n_positions
    changes = {f"stages.{i}.tokens": count * batch * length for i, count in enumerate(steps)}
    changes |= {f"stages.{i}.schedule.warmup": count // 10 for i, count in enumerate(steps)}
    runner = StageRunner(recipe.override(changes), tokens_per_step=batch * length)
    rows = [{"input_ids": draw(ids, batch, length, 10**6 + step)} for step in range(sum(steps))]
    seconds = fit(Language(model).eval(), rows, [runner])  # without dropout, as it was converted
    adapters.merge(model)
    return seconds


def perplexity(model: nn.Module, ids: Tensor) -> float:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    length = model.config.n_positions
    windows = ids[: len(ids) // length * length].view(-1, length)
    with measuring(model.to(device)):
        nll = torch.cat([token_nll(model, rows.to(device)).flatten() for rows in windows.split(16)])
    model.cpu()
    return float(nll.mean().exp())


def compare(softmax: nn.Module, train: Tensor, held: Tensor, batch: int, steps: list[int]) -> list[dict[str, Any]]:
    """The rows of the table."""
    rows: list[dict[str, Any]] = []

    def note(name: str, model: nn.Module, seconds: float) -> None:
        rows.append({"name": name, "perplexity": perplexity(model, held), "seconds": seconds})
        print(rows[-1], flush=True)

    recipe = surgery.load_recipe("gpt2/hedgehog").override(SHORT)
    lora = {**recipe.to_dict()["stages"][1], "trains": []}
    elu1 = surgery.load_recipe({"mixer": {"kind": "linear", "feature_map": {"kind": "elu1"}}, "stages": [lora]})
    control = surgery.load_recipe({"mixer": None, "stages": [lora]})
    note("softmax", softmax, 0.0)
    model = deepcopy(softmax)
    note("softmax, healed", model, heal(model, control, train, batch, [sum(steps)]))
    for name, own, budget in (("hedgehog", recipe, steps), ("elu+1", elu1, [sum(steps)])):
        model = surgery.apply(deepcopy(softmax), own)
        note(f"{name}, untrained", model, 0.0)
        note(f"{name}, healed", model, heal(model, own, train, batch, budget))
    return rows


def closed(rows: list[dict[str, Any]]) -> float:
    """The part of the gap in log perplexity between elu+1 and softmax that hedgehog closes."""
    loss = {row["name"]: math.log(row["perplexity"]) for row in rows}
    elu1, softmax = loss["elu+1, healed"], loss["softmax, healed"]
    return (elu1 - loss["hedgehog, healed"]) / (elu1 - softmax)


def report(result: dict[str, Any]) -> str:
    rows = result["rows"]
    base = next(row["perplexity"] for row in rows if row["name"] == "softmax, healed")
    lines = ["| attention | perplexity | of softmax, healed | seconds of healing |", "|---|---|---|---|"]
    for row in rows:
        cells = [row["name"], f"{row['perplexity']:.2f}", f"{row['perplexity'] / base:.3f}", f"{row['seconds']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"Of the gap in log perplexity from elu+1 to softmax, hedgehog closes {100 * closed(rows):.1f} %."]
    return "\n".join([*lines, PAPER]) + "\n"


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--held", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=5, help="of pretraining")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, nargs=2, default=[200, 400], help="of the two stages of healing")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--quick", action="store_true", help="a toy, to see that all of this runs")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> dict[str, Any]:
    chosen = arguments(given)
    if chosen.quick:
        chosen.minutes, chosen.batch, chosen.steps = 0.005, 2, [2, 2]
    vocab, merges = (str(chosen.tokenizer / name) for name in ("vocab.json", "merges.txt"))
    tokenizer = GPT2TokenizerFast(vocab=vocab, merges=merges)
    train, held = tokens(chosen.text, tokenizer), tokens([chosen.held], tokenizer)
    config = GPT2Config(vocab_size=len(tokenizer), **(TOY if chosen.quick else SIZES))
    softmax, steps = pretrain(config, train, chosen.batch, 60 * chosen.minutes)
    result = {
        "environment": environment(),
        "source": source(),
        "parameters": sum(p.numel() for p in softmax.parameters()),
        "tokens": {"text": len(train), "held": len(held), "pretraining": steps * chosen.batch * config.n_positions},
        "settings": {name: getattr(chosen, name) for name in ("minutes", "batch", "steps")},
        "rows": compare(softmax, train, held, chosen.batch, chosen.steps),
    }
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "hedgehog_gpt2.json").write_text(json.dumps(result, indent=1) + "\n")
    (chosen.out / "hedgehog_gpt2.md").write_text(report(result))
    print(report(result))
    return result


if __name__ == "__main__":
    main()
