"""What converting an encoder costs: its sentence embeddings and a classifier made of it, beside the softmax model's.

    python -m benchmarks.encoders MODEL --text FILE ... --sst2 TRAIN DEV [--out FOLDER]

MODEL is a BERT-like folder whose mean over tokens is a sentence embedding, as all-MiniLM-L6-v2. It is converted by
`bert/hedgehog` and healed by its two stages: features learn the attention weights, then adapters keep the embedding
where the softmax model has it. Sentences of FILE (.txt, .jsonl, also .xz) that were held out are embedded by both. Then
both are trained on SST-2 alike, all weights (lines of sentence TAB label). Writes encoders.json and encoders.md;
`--quick` runs a random model on anything.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import re
import time
import warnings
from collections.abc import Callable, Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

import surgery
from surgery import adapters
from surgery.callbacks import StageRunner
from surgery.callbacks.base import HealingCallback
from surgery.doctor import environment
from surgery.evaluation.provenance import source
from surgery.training.rates import rate_factor
from surgery.training.stages import Linear, StageConfig

ROOT = Path(__file__).resolve().parents[1]
RECIPE, LENGTH = "bert/hedgehog", 32
"""Tokens of a sentence, nominally: they only turn steps into the tokens that stages count by."""
SHORT = {"stages.1.lr": 2e-3, "stages.1.mixer_lr": 2e-3, "stages.1.rank": 32, "stages.1.alpha": 64}
"""Changes to the recipe, whose rates and adapters are for a hundred times the tokens."""
Batch = dict[str, Tensor]
Encode = Callable[[list[str]], Batch]


def lines(path: Path) -> list[str]:
    """Of a text file; of a .jsonl, every value's; also packed as .xz."""
    data = path.read_bytes()
    found = (lzma.decompress(data) if path.suffix == ".xz" else data).decode().splitlines()
    if ".jsonl" not in path.suffixes:
        return found
    return [line for row in found for value in json.loads(row).values() for line in str(value).splitlines()]


def sentences(paths: Iterable[Path]) -> list[str]:
    """Different sentences of 4 to 40 words, in an order that seed 0 draws."""
    found: set[str] = set()
    for line in (line for path in paths for line in lines(path)):
        parts = (part.strip() for part in re.split(r"(?<=[.!?])\s+", line))
        found |= {part for part in parts if 4 <= len(part.split()) <= 40 and not part.startswith("=")}
    return random.Random(0).sample(sorted(found), len(found))


def labelled(path: Path) -> list[tuple[str, int]]:
    rows = (line.rsplit("\t", 1) for line in lines(path)[1:])
    return [(text.strip(), int(label)) for text, label in rows]


def batches(encode: Encode, texts: list[str], targets: Tensor, size: int, count: int) -> list[Batch]:
    """`count` batches, each of texts of about the same length."""
    if len(texts) < size:
        raise SystemExit(f"{len(texts)} texts do not fill a batch of {size}: give more")
    generator, rows = random.Random(0), list[list[int]]()
    while len(rows) < count:
        order = generator.sample(range(len(texts)), len(texts))
        for begin in range(0, len(order) - size + 1, 32 * size):
            pool = sorted(order[begin : begin + 32 * size], key=lambda i: len(texts[i]))
            some = [pool[i : i + size] for i in range(0, len(pool) - size + 1, size)]
            rows += generator.sample(some, len(some))
    return [{**encode([texts[i] for i in row]), "target": targets[row]} for row in rows[:count]]


def hidden_of(model: nn.Module, batch: Batch) -> Tensor:
    """[B, T, C] fp32 at every token."""
    given = {name: x for name, x in batch.items() if name != "target"}
    hidden: Tensor = model(**given).last_hidden_state.float()
    return hidden


def pooled(hidden: Tensor, batch: Batch) -> Tensor:
    """[B, C] of length one: the mean over tokens."""
    mask = batch["attention_mask"].unsqueeze(-1)
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def embed(model: nn.Module, batch: Batch) -> Tensor:
    return pooled(hidden_of(model, batch), batch)


@torch.no_grad()
def embed_all(model: nn.Module, encode: Encode, texts: list[str]) -> Tensor:
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    device = "cuda" if torch.cuda.is_available() else "cpu"  # lightning leaves models on the cpu
    found: dict[int, Tensor] = {}
    model.to(device).eval()
    for rows in (order[i : i + 128] for i in range(0, len(order), 128)):
        batch = {name: x.to(device) for name, x in encode([texts[i] for i in rows]).items()}
        found |= dict(zip(rows, embed(model, batch).cpu(), strict=True))
    return torch.stack([found[i] for i in range(len(texts))])


class Imitator(L.LightningModule):
    """Its tokens, and their means, shall be where the softmax model has them, which it holds."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Batch, index: int) -> Tensor:
        with torch.no_grad(), surgery.mode(self.model, "teacher"):
            target = hidden_of(self.model, batch)
        hidden, valid = hidden_of(self.model, batch), batch["attention_mask"].bool()
        apart = (hidden - target)[valid].square().mean() / target[valid].var()
        return apart + (1 - (pooled(hidden, batch) * pooled(target, batch)).sum(-1)).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad])


class Runner(Imitator):
    """Runs the model alone, for stages with a loss of their own."""

    def training_step(self, batch: Batch, index: int) -> Tensor:
        return embed(self.model, batch).sum()


class Classifier(L.LightningModule):
    """Embeddings into two classes, all weights learning alike."""

    def __init__(self, model: nn.Module, steps: int, lr: float) -> None:
        super().__init__()
        width = model.config.hidden_size
        self.model, self.steps, self.lr = model.requires_grad_(True), steps, lr
        self.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(width, 2))
        nn.init.zeros_(self.head[1].weight)

    def forward(self, batch: Batch) -> Tensor:
        return self.head(embed(self.model, batch) * self.model.config.hidden_size**0.5)

    def training_step(self, batch: Batch, index: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch), batch["target"])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        schedule = Linear(warmup=self.steps // 10)
        factor = lambda step: rate_factor(schedule, self.lr, step, self.steps)  # noqa: E731
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, factor), "interval": "step"}]


def fit(module: L.LightningModule, rows: list[Batch], callbacks: list[HealingCallback]) -> float:
    """Train on every batch once, with dropout where the module is in train mode; returns seconds."""
    torch.manual_seed(0)
    began = time.monotonic()
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", ".*does not have many workers.*|.*GPU available.*|.*in eval mode at the start.*"
        )
        L.Trainer(
            max_steps=len(rows), callbacks=callbacks, accelerator="auto", devices=1, precision="bf16-mixed",
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ).fit(module, torch.utils.data.DataLoader(rows, batch_size=None))  # fmt: skip
    return round(time.monotonic() - began, 1)


def heal(model: nn.Module, stage: StageConfig, rows: list[Batch]) -> float:
    """Run a stage of `RECIPE` on every batch once, and merge its adapters; returns seconds."""
    per_step = len(rows[0]["target"]) * LENGTH
    recipe = surgery.load_recipe({"mixer": model.surgery.recipe.to_dict()["mixer"], "stages": [stage.model_dump()]})
    changes = {"stages.0.tokens": len(rows) * per_step, "stages.0.schedule.warmup": len(rows) // 10}
    runner = StageRunner(recipe.override(changes), tokens_per_step=per_step)
    module = Runner if stage.kind == "attention_transfer" else Imitator
    seconds = fit(module(model).eval(), rows, [runner])  # the softmax model is imitated without dropout
    adapters.merge(model)
    return seconds


def ranks(x: Tensor) -> Tensor:
    return x.argsort().argsort().double()


def likeness(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """Cosines of embeddings [N, C] of the same sentences, and how alike both order all pairs of sentences."""
    cosine = (ours * theirs).sum(-1).double()
    above = torch.triu_indices(len(ours), len(ours), 1)
    pairs = torch.stack([ranks((x @ x.T)[above[0], above[1]]) for x in (ours, theirs)])
    return {
        "cosine": float(cosine.mean()),
        "cosine_stderr": float(cosine.std() / len(cosine) ** 0.5),
        "cosine_5th_percentile": float(cosine.quantile(0.05)),
        "spearman": float(torch.corrcoef(pairs)[0, 1]),
    }


def right(module: Classifier, encode: Encode, held: list[tuple[str, int]]) -> Tensor:
    """Whether each sentence is classified rightly."""
    embedding = embed_all(module.model, encode, [text for text, _ in held])
    with torch.no_grad():
        logits = module.head.eval().cpu()(embedding * module.model.config.hidden_size**0.5)
    return (logits.argmax(-1) == torch.tensor([label for _, label in held])).double()


def embeddings(softmax: nn.Module, encode: Encode, texts: list[str], chosen: Any) -> tuple[list[dict], nn.Module]:
    """The rows of the first table, and the healed model."""
    train, held = texts[chosen.held :], texts[: chosen.held]
    first, second = chosen.steps
    data = batches(encode, train, torch.zeros(len(train)), chosen.batch, first + second)
    teacher, rows = embed_all(softmax, encode, held), list[dict]()

    def note(name: str, model: nn.Module, seconds: float) -> None:
        rows.append({"name": name, "seconds": seconds, **likeness(embed_all(model, encode, held), teacher)})
        print(rows[-1], flush=True)

    transfer, lora = surgery.load_recipe(RECIPE).override(SHORT).stages
    model = surgery.apply(deepcopy(softmax), RECIPE)
    note("untrained", model, 0.0)
    note("after attention transfer", model, heal(model, transfer, data[:first]))
    note("after both stages", model, heal(model, lora, data[first:]))
    return rows, model


def classifiers(softmax: nn.Module, healed: nn.Module, encode: Encode, chosen: Any) -> dict[str, Any]:
    train, held = (labelled(path) for path in chosen.sst2)
    texts, labels = [text for text, _ in train], torch.tensor([label for _, label in train])
    found: dict[str, Any] = {"examples": chosen.task_steps * chosen.batch, "held": len(held)}
    hits = {}
    for name, model in (("softmax", softmax), ("hedgehog", healed)):
        data = batches(encode, texts, labels, chosen.batch, chosen.task_steps)
        torch.manual_seed(0)
        module = Classifier(deepcopy(model), chosen.task_steps, chosen.lr)
        found[f"{name}_seconds"] = fit(module.train(), data, [])
        hits[name] = right(module, encode, held)
        found[name] = float(hits[name].mean())
        print(name, found[name], flush=True)
    difference = hits["hedgehog"] - hits["softmax"]
    return found | {"difference_stderr": float(difference.std() / len(difference) ** 0.5)}


def report(result: dict[str, Any]) -> str:
    own = result["settings"]
    first, second = own["steps"]
    lines = [
        f"{result['model']} by `{RECIPE}`: {first} steps of attention transfer, {second} of imitation and "
        f"{own['task_steps']} on SST-2, {own['batch']} sentences each; {own['held']} sentences and the development set "
        "were held out.",
        "",
    ]
    lines += ["| embeddings | cosine | 5th percentile | Spearman of pairs | seconds |", "|---|---|---|---|---|"]
    for row in result["embeddings"]:
        cells = [f"{row['cosine']:.4f} ± {row['cosine_stderr']:.4f}", f"{row['cosine_5th_percentile']:.4f}"]
        lines.append("| " + " | ".join([row["name"], *cells, f"{row['spearman']:.4f}", f"{row['seconds']:.0f}"]) + " |")
    if "sst2" in result:
        task = result["sst2"]
        points, stderr = 100 * (task["hedgehog"] - task["softmax"]), 100 * task["difference_stderr"]
        lines += ["", "| SST-2 | accuracy | seconds |", "|---|---|---|"]
        lines += [f"| {n} | {100 * task[n]:.2f} % | {task[f'{n}_seconds']:.0f} |" for n in ("softmax", "hedgehog")]
        lines += [f"| difference | {points:+.2f} ± {stderr:.2f} points | |"]
    return "\n".join(lines) + "\n"


def toy() -> tuple[nn.Module, Encode]:
    """A random BERT of words of one letter or another."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(**sizes, vocab_size=97, max_position_embeddings=64, initializer_range=0.3)

    def encode(texts: list[str]) -> Batch:
        ids = [torch.tensor([3 + sum(word.encode()) % 94 for word in text.split()]) for text in texts]
        padded = nn.utils.rnn.pad_sequence(ids, batch_first=True)
        return {"input_ids": padded, "attention_mask": (padded > 0).long()}

    return BertModel(config), encode


def load(model: Path) -> tuple[nn.Module, Encode]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    options = {"padding": True, "truncation": True, "max_length": 256, "return_tensors": "pt"}
    return AutoModel.from_pretrained(model, dtype=torch.float32), lambda texts: dict(tokenizer(texts, **options))


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--name", help="of the model, in the report")
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--sst2", type=Path, nargs=2, required=True)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--held", type=int, default=400, help="sentences held out")
    parser.add_argument("--steps", type=int, nargs=2, default=[150, 150], help="of the two stages")
    parser.add_argument("--task-steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=1e-4, help="on the task")
    parser.add_argument("--quick", action="store_true", help="a random model, to see that all of this runs")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> dict[str, Any]:
    chosen = arguments(given)
    if chosen.quick:
        chosen.batch, chosen.held, chosen.steps, chosen.task_steps = 4, 12, [3, 3], 3
    softmax, encode = toy() if chosen.quick else load(chosen.model)
    result: dict[str, Any] = {
        "environment": environment(),
        "source": source(),
        "threads": torch.get_num_threads(),
        "model": "a toy" if chosen.quick else chosen.name or chosen.model.name,
        "settings": {n: getattr(chosen, n) for n in ("batch", "held", "steps", "task_steps", "lr")},
    }
    result["embeddings"], healed = embeddings(softmax, encode, sentences(chosen.text), chosen)
    write(result, chosen.out)
    result["sst2"] = classifiers(softmax, healed, encode, chosen)
    write(result, chosen.out)
    print(report(result))
    return result


def write(result: dict[str, Any], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "encoders.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "encoders.md").write_text(report(result))


if __name__ == "__main__":
    main()
