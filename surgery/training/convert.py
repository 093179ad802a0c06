"""`surgery convert`: apply a recipe, run its stages, save the result; a run that was killed goes on when repeated."""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from .. import adapters, hub
from ..callbacks import AttentionTransfer, BranchMonitor, DomainMixing
from ..callbacks.base import HealingCallback
from ..callbacks.lora_unfreezing import ADAPTER
from ..callbacks.recipes import stage_callbacks
from ..callbacks.schedules import schedule
from ..errors import SurgeryError, loading
from ..folders import replace_folder
from ..patchers.interface import converted_layers
from ..patchers.sites import projections
from ..recipe import Recipe
from ..sharding import units
from .blockwise import Relay, train_blocks
from .calibrate import calibrated
from .card import model_card
from .data.corpus import OnError
from .data.module import HealingData
from .data.sources import open_source
from .delta import load_delta, save_delta
from .layers import layers_of
from .mixing import DomainSampler
from .module import HealingModule
from .processes import Team, join
from .run import Run, StageResult, write_csv, write_text
from .stages import AttentionTransfer as Transfer
from .stages import BanditMixing, Calibrate, LoRA, Plateau, StageConfig, TemperatureMixing, TrainingStage
from .strategy import Sharding, Strategy, sharded
from .text import Say, StageData, config_of, tokenizer_of
from .watch import Checkpoints, Validation, Watch


@dataclass(frozen=True)
class Options:
    """How to run, as far as it is not the recipe's to say.

    seed: of mixers, adapters and the order of the data. precision: lightning's name; "auto": bf16 autocast on a GPU,
    none on a CPU. accelerator: lightning's. save_every: optimizer steps between checkpoints. checkpointing: recompute
    activations instead of keeping them. progress: draw a bar. column: of the text in tables. on_error: what to do with
    rows that cannot be used, "raise" or "skip". devices: of this host (None: as many as torchrun started processes, or
    one), nodes: hosts, which see the same files. strategy: whether each has the whole model ("ddp") or they share it
    out ("fsdp"); "auto": the latter if the weights would take most of a device's memory.
    """

    seed: int = 0
    precision: str = "auto"
    accelerator: str = "auto"
    save_every: int = 50
    checkpointing: bool = False
    progress: bool = False
    column: str = "text"
    on_error: OnError = "raise"
    devices: int | None = None
    nodes: int = 1
    strategy: Strategy = "auto"

    @property
    def cpu(self) -> bool:
        return self.accelerator == "cpu" or not torch.cuda.is_available()


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
    options = options or Options()
    if not recipe.stages:
        raise SurgeryError("the recipe has no stages, so there is nothing to run: surgery.apply alone converts a model")
    if not recipe.causal:
        raise SurgeryError(
            "surgery convert trains on the next token, which an encoder has seen: convert with surgery.apply, and heal "
            "in a Trainer of your own with surgery.callbacks_for(recipe, ...)"
        )
    team = join(options.devices, options.nodes, options.cpu)
    for training in recipe.training:
        _own(training, team)
    say = say if team.leads else lambda line: None
    run = Run(Path(out), team)
    request = team.led(lambda: _begin(run, str(model), recipe, data, validation, options, say))

    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # mixers compute in fp32: training affords tf32, measuring does not
    torch.manual_seed(options.seed)
    tokenizer, config = tokenizer_of(str(model)), config_of(str(model))
    rows = team.in_turn(lambda: StageData(data, validation, tokenizer, config, options, say))
    layers = team.led(lambda: layers_of(str(model), recipe, rows, run, options.cpu))
    network = _load(str(model), recipe, layers)
    results = []
    for index, stage in enumerate(recipe.stages):
        say(f"stage {index + 1} of {len(recipe.stages)}: {stage.kind}")
        results.append(_stage(network, index, stage, rows, run, options, say))
        if units(network) and (team.leads or index + 1 < len(recipe.stages)):  # adapters take a whole model
            network = _load(str(model), recipe, layers)
            load_delta(network, run.delta(index))
    device = "cpu" if options.cpu else "cuda"  # lightning leaves it on the cpu
    team.led(lambda: _finish(network.to(device), tokenizer, recipe, results, run, request, rows, say))
    team.leave()
    return run.out


def _begin(
    run: Run,
    model: str,
    recipe: Recipe,
    data: Sequence[str | Path],
    validation: Sequence[str | Path],
    options: Options,
    say: Say,
) -> dict[str, Any]:
    """Open the folder of the run; returns what it is a run of. How many devices work on it does not matter."""
    request = {"model": model, "recipe": recipe.to_dict(), "seed": options.seed, "precision": options.precision}
    request |= {"data": _digests(data), "validation": _digests(validation)}
    if options.column != "text":
        request["column"] = options.column
    if run.out.exists() and any(run.out.iterdir()):
        raise SurgeryError(
            f"{run.out} exists: a finished run is not repeated; give another --out, or delete it to run again"
        )
    if run.begin(request):
        say(f"going on with {run.folder}")
    return request


def steps_of(stage: TrainingStage, rows: int) -> int:
    """Optimizer steps of a stage that has `rows` rows to train on, at least one."""
    wanted = (stage.epochs or 0) * rows if stage.tokens is None else stage.tokens / stage.sequence_length
    return max(1, round(wanted / (stage.batch_size * stage.accumulate)))


def _digests(sources: Sequence[str | Path]) -> dict[str, str]:
    """Name -> what identifies the content."""
    for source in map(str, sources):
        if not source.startswith("hf:") and not Path(source).is_file():
            raise SurgeryError(f"no file {source}: --data and --validation name files, or data sets as hf:NAME[:SPLIT]")
    return {str(source): open_source(source).digest() for source in sources}


def _load(model: str, recipe: Recipe | None = None, layers: list[int] | None = None) -> PreTrainedModel:
    with loading("model", model):
        if recipe is not None and recipe.mixer is not None:
            return hub.from_pretrained(model, recipe, layers=layers, dtype="auto")
        return AutoModelForCausalLM.from_pretrained(model, dtype="auto")


def adapter_of(stage: LoRA, network: PreTrainedModel) -> dict[str, Any]:
    """Arguments of `adapters.inject` for a stage."""
    targets = projections(network, stage.targets)
    return {"name": ADAPTER, "targets": targets, "rank": stage.rank, "alpha": stage.alpha, "dropout": stage.dropout}


def _stage(
    network: PreTrainedModel, index: int, stage: StageConfig, rows: StageData, run: Run, options: Options, say: Say
) -> StageResult:
    """Run one stage, or go on with it, or load what it learned."""
    delta = run.delta(index)
    summary = delta.with_suffix(".json")
    if delta.exists() and summary.exists():
        load_delta(network, delta)
        say("  done before")
        return StageResult(**_json(summary))
    team = run.team
    if isinstance(stage, Transfer) and stage.blockwise is not None:
        train: Callable[[Relay, float], StageResult] = lambda relay, part: _train(  # noqa: E731
            network, index, stage, rows, run, options, say, relay, part
        )
        result = train_blocks(network, stage.blockwise, run, index, options.save_every, train)
    elif isinstance(stage, Calibrate):
        result = team.led(lambda: calibrated(network, stage, rows.at(stage), options.cpu, say))
    else:
        result = _train(network, index, stage, rows, run, options, say)
    if team.leads:
        write_text(summary, _dump(asdict(result)))
    adapter = adapter_of(stage, network) if isinstance(stage, LoRA) else None
    save_delta(network, delta, adapter, write=team.leads)
    team.wait()
    if isinstance(stage, Calibrate) and not team.leads:
        load_delta(network, delta)
    if team.leads:
        run.checkpoint(index).unlink(missing_ok=True)
    return result


def _own(stage: TrainingStage, team: Team) -> TrainingStage:
    """What this process does of a stage; a block of layers sees all rows."""
    return stage if isinstance(stage, Transfer) and stage.blockwise is not None else stage.on(team.world)


def _train(
    network: PreTrainedModel,
    index: int,
    stage: TrainingStage,
    rows: StageData,
    run: Run,
    options: Options,
    say: Say,
    relay: Relay | None = None,
    part: float = 1.0,
) -> StageResult:
    """Train a stage to its end. relay, part: of a block of layers, which has that part of the loss of all."""
    block = None if relay is None else relay.number
    own, checkpoint = _own(stage, run.team), run.checkpoint(index, block)
    data = rows.at(own)
    steps = steps_of(stage, data.rows)
    data.count = steps * own.accumulate
    torch.manual_seed(options.seed + 1000 * (index + 1))
    callbacks = _callbacks(stage, data, options)
    transfer = next((c for c in callbacks if isinstance(c, AttentionTransfer)), None)
    if transfer is not None:
        transfer.weight = schedule(part)
    shards = relay is None and sharded(options.strategy, network, run.team, options.cpu)
    module = HealingModule(network, own, steps=steps, transfer=transfer, shards=shards)
    every = stage.schedule.every if isinstance(stage.schedule, Plateau) else max(1, steps // 10)
    held = data.val_dataloader()
    validation = Validation(held if relay is None else relay.held(held), every, whole=relay is None)
    # how much of the work the linear branch does; `Watch` looks out for losses that are no number
    monitored = relay is None and converted_layers(network)
    monitor = BranchMonitor(every, guard=False) if monitored else None
    watch = Watch(validation, None if options.progress else say, max(1, min(10, steps // 50)), monitor=monitor)
    trainer = _trainer(module, run, index, block, options)
    # in this order: what validation found is logged, and what was logged is flushed before a checkpoint is written
    callbacks += [] if monitor is None else [monitor]
    trainer.callbacks += [*callbacks, validation, watch, Checkpoints(checkpoint, options.save_every)]
    trainer.callbacks += [] if relay is None else [relay]
    began = time.monotonic()
    _fit(trainer, module, data, checkpoint, options)

    tokens, seconds = steps * stage.batch_size * stage.accumulate * stage.sequence_length, time.monotonic() - began
    return StageResult(
        stage.kind, steps, tokens, round(seconds, 1), module.learning, validation.history, validation.nll
    )


def _callbacks(stage: TrainingStage, data: HealingData, options: Options) -> list[HealingCallback]:
    """Of a stage; what mixes domains also decides which rows come."""
    if stage.mixing is None:
        return stage_callbacks(stage)
    if isinstance(stage.mixing, TemperatureMixing) and stage.mixing.at == "plateau":
        raise SurgeryError(
            "surgery convert cools mixing down at a step or a fraction of the stage: for a plateau, use "
            "surgery.callbacks.DomainMixing and HealingData in a Trainer of your own"
        )
    if isinstance(stage.mixing, BanditMixing) and isinstance(stage, Transfer):
        raise SurgeryError(
            "a bandit hears the loss of each domain, and attention transfer has one of all rows: mix the rows of that "
            "stage by temperature"
        )
    callbacks = stage_callbacks(stage, sizes=data.sizes)
    mixing = next(callback for callback in callbacks if isinstance(callback, DomainMixing))
    per_step = stage.batch_size * stage.accumulate
    data.domains = DomainSampler(mixing.shared, per_step, seed=options.seed + stage.seed)
    return callbacks


def _fit(trainer: Trainer, module: HealingModule, data: HealingData, checkpoint: Path, options: Options) -> None:
    """Train to the end of the stage, from its checkpoint if there is one."""
    network = module.model
    network.train()
    # attention transfer has no backward through the network, and would keep every layer's graph alive
    checkpointing = options.checkpointing and module.transfer is None
    if checkpointing:
        network.gradient_checkpointing_enable({"use_reentrant": False})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*have no `validation_step`.*")  # see `Validation`
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint if checkpoint.exists() else None, weights_only=True)
    if checkpointing:
        network.gradient_checkpointing_disable()
    network.eval()
    if trainer.global_step < module.steps:
        raise SurgeryError(
            f"the {module.stage.kind} stage stopped at step {trainer.global_step} of {module.steps}: repeat the "
            "command to resume"
        )


def _trainer(module: HealingModule, run: Run, index: int, block: int | None, options: Options) -> Trainer:
    team, stage, steps = run.team if block is None else Team(), module.stage, module.steps
    precision: Any = ("32-true" if options.cpu else "bf16-mixed") if options.precision == "auto" else options.precision
    strategy: Any = "auto" if team.world == 1 else Sharding(team) if module.shards else "ddp"
    if block is not None:  # whatever the other processes do
        strategy = SingleDeviceStrategy("cpu" if options.cpu else torch.device("cuda", torch.cuda.current_device()))
    logs, attempt = run.folder / "logs", run.attempt(index, block)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*|.*GPU available.*")
        return Trainer(
            accelerator=options.accelerator,
            devices=team.devices,
            num_nodes=team.hosts,
            strategy=strategy,
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


def _sample(rows: StageData, stage: StageConfig, network: PreTrainedModel) -> Tensor:
    """[1, T]: a row that is not trained on."""
    return next(iter(rows.at(stage).val_dataloader()))["input_ids"][:1].to(network.device)


def _finish(
    network: PreTrainedModel,
    tokenizer: Any,
    recipe: Recipe,
    results: list[StageResult],
    run: Run,
    request: dict[str, Any],
    rows: StageData,
    say: Say,
) -> Path:
    """Merge the adapters, write everything into a folder, and let that appear as a whole."""
    out, sample = run.out, _sample(rows, recipe.stages[-1], network)
    adapter = next((adapter_of(stage, network) for stage in reversed(recipe.stages) if isinstance(stage, LoRA)), None)
    with replace_folder(out) as folder:
        save_delta(network, folder / "delta.safetensors", adapter)
        drift = adapters.merge_checked(network, sample)
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


def _dump(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
