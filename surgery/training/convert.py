"""`surgery convert`: apply a recipe, run its stages, save the result; a run that was killed goes on when repeated."""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from .. import adapters, hub
from ..callbacks import AttentionTransfer
from ..callbacks.lora_unfreezing import ADAPTER
from ..callbacks.recipes import stage_callbacks
from ..errors import SurgeryError, loading
from ..patchers.sites import projections
from ..recipe import Recipe
from .batches import split, steps_of
from .card import model_card
from .delta import load_delta, save_delta
from .module import HealingModule
from .run import Run, digest, write_csv, write_text
from .stages import LoRA, Plateau, StageConfig
from .text import read_corpora, windows
from .watch import Checkpoints, Validation, Watch

Say = Callable[[str], None]

MERGE_TOLERANCE = 0.1
"""More than the rounding of merged bf16 weights can move logits."""


@dataclass(frozen=True)
class Options:
    """How to run, as far as it is not the recipe's to say.

    seed: of mixers, adapters and the order of the data. precision: lightning's name; "auto": bf16 autocast on a GPU,
    none on a CPU. accelerator: lightning's. save_every: optimizer steps between checkpoints. checkpointing: recompute
    activations instead of keeping them. progress: draw a bar.
    """

    seed: int = 0
    precision: str = "auto"
    accelerator: str = "auto"
    save_every: int = 50
    checkpointing: bool = False
    progress: bool = False


@dataclass
class StageResult:
    """What one stage did. losses: validation, (step, loss) each."""

    kind: str
    steps: int
    tokens: int
    seconds: float
    parameters: int
    losses: list[tuple[int, float]] = field(default_factory=list)


def convert(
    model: str | Path,
    recipe: Recipe,
    data: Sequence[str | Path],
    out: str | Path,
    *,
    validation: Sequence[str | Path] = (),
    options: Options | None = None,
    say: Say = lambda line: None,
) -> Path:
    """Convert a checkpoint by a recipe, heal it on text, and save it to the folder `out`.

    model: a local folder or a hub name. data, validation: see `read_corpora`; without validation files a hundredth of
    the data is held out. Returns `out`. The same call resumes after any interruption and ends with the same weights.

    Raises:
        SurgeryError: the request makes no sense, or `out` or its run folder belongs to something else.
    """
    options, out = options or Options(), Path(out)
    files, held = [Path(file) for file in data], [Path(file) for file in validation]
    if not recipe.stages:
        raise SurgeryError("the recipe has no stages, so there is nothing to run: surgery.apply alone converts a model")
    request = {"model": str(model), "recipe": recipe.to_dict(), "seed": options.seed, "precision": options.precision}
    request |= {"data": digest(_existing(files)), "validation": digest(_existing(held))}
    if out.exists() and any(out.iterdir()):
        raise SurgeryError(
            f"{out} exists: a finished run is not repeated; give another --out, or delete it to run again"
        )
    run = Run(out)
    if run.begin(request):
        say(f"going on with {run.folder}")

    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # mixers compute in fp32: training affords tf32, measuring does not
    torch.manual_seed(options.seed)
    network, tokenizer = _load(str(model), recipe), _tokenizer(str(model))
    rows = Rows(files, held, tokenizer, network.config.get_text_config().vocab_size)
    results = []
    for index, stage in enumerate(recipe.stages):
        say(f"stage {index + 1} of {len(recipe.stages)}: {stage.kind}")
        results.append(_stage(network, index, stage, rows, run, options, say))
    if options.accelerator != "cpu" and torch.cuda.is_available():
        network.to("cuda")  # lightning leaves it on the cpu
    return _finish(network, tokenizer, recipe, results, run, request, rows, say)


class Rows:
    """The text as rows of tokens, for every stage at its own length."""

    def __init__(self, files: list[Path], held: list[Path], tokenizer: Any, vocabulary: int) -> None:
        self.corpora = read_corpora(files, tokenizer, vocab_size=vocabulary)
        self.held = read_corpora(held, tokenizer, vocab_size=vocabulary) if held else {}
        self.tokens = sum(len(tokens) for tokens in self.corpora.values())

    def at(self, length: int) -> tuple[Tensor, Tensor]:
        """Training and validation rows: [N, length], [n, length]."""
        train = windows(np.concatenate(list(self.corpora.values())), length)
        if not self.held:
            if len(train) < 2:
                raise SurgeryError(
                    f"the data is one window of {length} tokens, and one is held out for validation: give more text, "
                    "validation files of its own, or a shorter sequence_length"
                )
            return split(train)
        held = windows(np.concatenate(list(self.held.values())), length)
        return train, held[torch.linspace(0, len(held) - 1, min(len(held), 64)).long()]


def _existing(files: list[Path]) -> list[Path]:
    for file in files:
        if not file.is_file():
            raise SurgeryError(f"no file {file}: --data and --validation name text, jsonl or token files")
    return files


def _load(model: str, recipe: Recipe) -> PreTrainedModel:
    with loading("model", model):
        if recipe.mixer is not None:
            return hub.from_pretrained(model, recipe, dtype="auto")
        return AutoModelForCausalLM.from_pretrained(model, dtype="auto")


def _tokenizer(model: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError):
        return None  # pre-tokenised data needs none


def adapter_of(stage: LoRA, network: PreTrainedModel) -> dict[str, Any]:
    """Arguments of `adapters.inject` for a stage."""
    targets = projections(network, stage.targets)
    return {"name": ADAPTER, "targets": targets, "rank": stage.rank, "alpha": stage.alpha, "dropout": stage.dropout}


def _stage(
    network: PreTrainedModel, index: int, stage: StageConfig, rows: Rows, run: Run, options: Options, say: Say
) -> StageResult:
    """Run one stage, or go on with it, or load what it learned."""
    delta, checkpoint = run.delta(index), run.checkpoint(index)
    summary = delta.with_suffix(".json")
    if delta.exists() and summary.exists():
        load_delta(network, delta)
        say("  done before")
        return StageResult(**_json(summary))
    train, held = rows.at(stage.sequence_length)
    steps = steps_of(stage.tokens, stage.epochs, train, stage.batch_size * stage.accumulate)
    start = 0
    if checkpoint.exists():
        start = int(torch.load(checkpoint, weights_only=True, map_location="cpu")["global_step"])
    torch.manual_seed(options.seed + 1000 * (index + 1))
    callbacks = stage_callbacks(stage)
    transfer = next((c for c in callbacks if isinstance(c, AttentionTransfer)), None)
    module = HealingModule(network, stage, train, steps=steps, start=start, seed=options.seed, transfer=transfer)
    every = stage.schedule.every if isinstance(stage.schedule, Plateau) else max(1, steps // 10)
    validation = Validation(held, every)
    watch = Watch(validation, None if options.progress else say, max(1, min(10, steps // 50)))
    trainer = _trainer(stage, steps, run, index, options)
    # in this order: what validation found is logged, and what was logged is flushed before a checkpoint is written
    trainer.callbacks += [*callbacks, validation, watch, Checkpoints(checkpoint, options.save_every)]
    began = time.monotonic()
    _fit(trainer, module, checkpoint, options)

    tokens = steps * stage.batch_size * stage.accumulate * stage.sequence_length
    result = StageResult(
        stage.kind, steps, tokens, round(time.monotonic() - began, 1), module.learning, validation.history
    )
    write_text(summary, _dump(asdict(result)))
    save_delta(network, delta, adapter_of(stage, network) if isinstance(stage, LoRA) else None)
    checkpoint.unlink(missing_ok=True)
    return result


def _fit(trainer: Trainer, module: HealingModule, checkpoint: Path, options: Options) -> None:
    """Train to the end of the stage, from its checkpoint if there is one."""
    network = module.model
    network.train()
    if options.checkpointing:
        network.gradient_checkpointing_enable({"use_reentrant": False})
    trainer.fit(module, ckpt_path=checkpoint if checkpoint.exists() else None, weights_only=True)
    if options.checkpointing:
        network.gradient_checkpointing_disable()
    network.eval()
    if trainer.global_step < module.steps:
        raise SurgeryError(
            f"the {module.stage.kind} stage stopped at step {trainer.global_step} of {module.steps}: repeat the "
            "command to resume"
        )


def _trainer(stage: StageConfig, steps: int, run: Run, index: int, options: Options) -> Trainer:
    cuda = options.accelerator != "cpu" and torch.cuda.is_available()
    precision: Any = ("bf16-mixed" if cuda else "32-true") if options.precision == "auto" else options.precision
    logs, attempt = run.folder / "logs", run.attempt(index)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*|.*GPU available.*")
        return Trainer(
            accelerator=options.accelerator,
            devices=1,
            precision=precision,
            max_steps=steps,
            limit_train_batches=steps * stage.accumulate,
            accumulate_grad_batches=stage.accumulate,
            gradient_clip_val=stage.grad_clip,
            logger=[CSVLogger(logs, "csv", attempt), TensorBoardLogger(logs, "tensorboard", attempt)],
            log_every_n_steps=0,
            callbacks=[RichProgressBar()] if options.progress else [],
            enable_progress_bar=options.progress,
            enable_checkpointing=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )


def _finish(
    network: PreTrainedModel,
    tokenizer: Any,
    recipe: Recipe,
    results: list[StageResult],
    run: Run,
    request: dict[str, Any],
    rows: Rows,
    say: Say,
) -> Path:
    """Merge the adapters, write everything into a folder, and let that appear as a whole."""
    out, sample = run.out, rows.at(recipe.stages[-1].sequence_length)[1][:1].to(network.device)
    adapter = next((adapter_of(stage, network) for stage in reversed(recipe.stages) if isinstance(stage, LoRA)), None)
    with hub.replace_folder(out) as folder:
        save_delta(network, folder / "delta.safetensors", adapter)
        drift = _merge(network, sample)
        network.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_csv(folder / "metrics.csv", run.metrics())
        write_text(folder / "healing.json", _dump({**request, "stages": [asdict(r) for r in results], "merge": drift}))
        write_text(folder / "README.md", model_card(request["model"], recipe, results, request, drift))
        if (run.folder / "logs" / "tensorboard").is_dir():
            shutil.copytree(run.folder / "logs" / "tensorboard", folder / "tensorboard")
    shutil.rmtree(run.folder)
    say(f"saved {out}")
    return out


@torch.no_grad()
def _merge(network: PreTrainedModel, sample: Tensor) -> float:
    """Merge all adapters; returns by how much that moved the logits, relative to the largest.

    Raises:
        SurgeryError: by so much that it cannot be rounding.
    """
    network.eval()
    before = network(input_ids=sample, use_cache=False).logits.float()
    adapters.merge(network)
    after = network(input_ids=sample, use_cache=False).logits.float()
    drift = float((after - before).abs().max() / before.abs().max())
    if not drift < MERGE_TOLERANCE:
        raise SurgeryError(
            f"merging the adapters moved the logits by {drift:.0%} of the largest: the base weights are in "
            f"{network.dtype}, too coarse to take them; load the model in a wider dtype"
        )
    return drift


def _dump(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
