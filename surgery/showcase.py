"""`surgery demo`: the embedded model converted, healed a little here, and measured beside what a GPU made of it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed
from transformers.utils import logging as transformers_logging

from . import adapters
from .errors import SurgeryError
from .evaluation import Evaluation, evaluate
from .evaluation.comparison import Comparison, compare, write_json
from .evaluation.plot import MISSING, plot
from .evaluation.report import remarks, tables
from .evaluation.run import DEMO
from .folders import replace_folder
from .operate import apply
from .progress import showing_progress
from .recipe import Recipe, load_recipe
from .training.convert import Options, convert
from .training.data.tokens import read_corpora
from .training.delta import load_delta

Show = Callable[[Any], None]  # takes a line of text, or something that rich can print

RECIPE, CONTROL = "llama/logmass", "control/window-lora"
PROMPT = "class Stack:\n    def __init__(self):\n        self.items = []\n"


@dataclass(frozen=True)
class Size:
    """How much the demo does; by default about five minutes of one core.

    transfer_steps, lora_steps: of healing here, each on `batch_size` rows of `length` tokens, cut from `characters` of
    text. windows: of `length` tokens, measured in each domain. new_tokens: continued after the prompt.
    """

    transfer_steps: int = 24
    lora_steps: int = 12
    batch_size: int = 2
    length: int = 1024
    characters: int = 500_000
    windows: int = 32
    new_tokens: int = 120


class Lineup(Comparison):
    """A comparison whose models go by the names they were measured under."""

    @property
    def named(self) -> dict[str, Evaluation]:
        softmax = [] if self.softmax is None else [self.softmax]
        return {model.model: model for model in (*softmax, *self.controls, self.result)}


def run_demo(out: Path, show: Show = print, *, size: Size | None = None, progress: bool = False) -> list[Path]:
    """Convert, heal, load, measure and continue a text; returns what was written into the folder `out`.

    Files of an earlier demo are replaced, each as a whole and at the end; others in the folder are left alone.
    progress: draw bars.

    Raises:
        SurgeryError: matplotlib or the source of the standard library is missing, or `out` is a file.
    """
    if find_spec("matplotlib") is None:
        raise SurgeryError(MISSING)
    size, began = size or Size(), time.monotonic()
    with _workspace(out) as work, _quiet():
        _introduce(show)
        live = _heal_here(work, size, show, progress)
        healed = _shipped(RECIPE, "healed")
        models = {
            "softmax teacher": _embedded(),
            "window only, trained": _shipped(CONTROL, "control"),
            "converted, untrained": apply(_embedded(), RECIPE),
            "converted, healed here": live,
            "converted, healed on a GPU": healed,
        }
        lineup = _measure(models, size, show)
        for shown in (*tables(lineup), *remarks(lineup.result)):
            show(shown)
        show(f"\n{_continue(healed, size.new_tokens)}\n")
        written = _write(out, work, healed, lineup)
    show(f"done in {time.monotonic() - began:.0f} s; wrote")
    for path in written:
        show(f"  {path}")
    return written


def _introduce(show: Show) -> None:
    model = apply(_embedded(), RECIPE)
    report = model.surgery.report
    parameters = sum(p.numel() for p in model.parameters()) - report.new_parameters
    show(f"The embedded model is a Llama of {parameters:,} parameters, trained on Python's source and documentation.")
    show(f"The recipe {RECIPE} swaps its attention for {load_recipe(RECIPE).description}.")
    show(report.table())


def _embedded() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)


def _shipped(recipe: str, name: str) -> PreTrainedModel:
    """The embedded model with what healing on a GPU learned, adapters merged."""
    model = apply(_embedded(), recipe)
    load_delta(model, DEMO / f"{name}.safetensors")
    adapters.merge(model)
    return model


def _heal_here(work: Path, size: Size, show: Show, progress: bool) -> PreTrainedModel:
    """`surgery convert`, small."""
    text, out = work / "text.jsonl", work / "healed-here"
    files = write_library(text, size.characters)
    show(f"Healing it here, as `surgery convert` does, on {files} files of this Python's standard library:")
    options = Options(accelerator="cpu", progress=progress)
    convert(str(DEMO), live_recipe(size), [text], out, options=options, say=lambda line: _unless_saved(show, line))
    for stage in json.loads((out / "healing.json").read_text(encoding="utf-8"))["stages"]:
        first, last = stage["losses"][0], stage["losses"][-1]
        show(
            f"{stage['kind']}: held-out loss {first[1]:.3f} after step {first[0]}, {last[1]:.3f} after step {last[0]} "
            f"({stage['seconds']:.0f} s)"
        )
    return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)


def _unless_saved(show: Show, line: str) -> None:
    if not line.startswith("saved "):  # it names a folder that is gone at the end
        show(line)


def live_recipe(size: Size) -> Recipe:
    """The default recipe for a minute on two cores."""
    tokens = size.batch_size * size.length
    both = {"batch_size": size.batch_size, "sequence_length": size.length, "schedule.warmup": 3}
    changes = {f"stages.{stage}.{key}": value for stage in (0, 1) for key, value in both.items()}
    changes |= {"stages.0.tokens": tokens * size.transfer_steps, "stages.1.tokens": tokens * size.lora_steps}
    return load_recipe(RECIPE).override({**changes, "stages.1.lr": 1e-3, "stages.1.loss": {"kl": 1}})


def write_library(path: Path, characters: int) -> int:
    """Write whole files of this interpreter's standard library as jsonl; returns how many.

    Those that the held-out text was taken from are left out.

    Raises:
        SurgeryError: the library's source is not there.
    """
    library = Path(sysconfig.get_path("stdlib"))
    rows = (DEMO / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    held = {json.loads(row)["source"] for row in rows}
    lines, total = [], 0
    for file in sorted(library.glob("[a-z]*.py")):
        if f"lib/{file.name}" not in held and total < characters:
            lines.append(json.dumps({"text": file.read_text(encoding="utf-8", errors="replace")}) + "\n")
            total += len(lines[-1])
    if not total:
        raise SurgeryError(f"no Python files in {library} to heal on: this Python came without its library's source")
    path.write_text("".join(lines), encoding="utf-8")
    return len(lines)


def held_out(windows: int, length: int) -> dict[str, np.ndarray]:
    """The first tokens of the shipped held-out text, domain by domain."""
    corpora = read_corpora([DEMO / "heldout.jsonl"], AutoTokenizer.from_pretrained(DEMO))
    return {domain: tokens[: windows * length] for domain, tokens in corpora.items()}


def _measure(models: dict[str, PreTrainedModel], size: Size, show: Show) -> Lineup:
    show(f"\nMeasuring on held-out text, up to {size.windows} windows of {size.length} tokens a domain:")
    corpora, found = held_out(size.windows, size.length), {}
    for name, model in models.items():
        began = time.monotonic()
        with showing_progress(name) as progress:
            found[name] = evaluate(model, corpora, length=size.length, copy_tokens=0, name=name, progress=progress)
        losses = ", ".join(f"{domain} {result.nll:.3f}" for domain, result in found[name].domains.items())
        show(f"  {name}: {losses} nats per token ({time.monotonic() - began:.0f} s)")
    teacher, control, untrained, live, healed = found.values()
    return Lineup(healed, teacher, (control, untrained, live), compare(healed, teacher, [control]).gaps)


def _continue(model: PreTrainedModel, new_tokens: int) -> str:
    """The prompt and what the model makes of it; the same at every run."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    set_seed(0)
    tokens = model.generate(**inputs, do_sample=True, temperature=0.7, top_k=0, max_new_tokens=new_tokens)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def _write(out: Path, work: Path, healed: PreTrainedModel, lineup: Lineup) -> list[Path]:
    numbers, picture, folder = out / "evaluation.json", out / "evaluation.png", out / "healed"
    moved = {work / "text.jsonl": out / "text.jsonl", work / "healed-here" / "metrics.csv": out / "metrics.csv"}
    write_json(lineup, numbers)
    plot(lineup, picture)
    for source, target in moved.items():
        os.replace(source, target)
    with replace_folder(folder) as unfinished:
        healed.save_pretrained(unfinished)
        AutoTokenizer.from_pretrained(DEMO).save_pretrained(unfinished)
        names = sorted(path.name for path in unfinished.iterdir())
    return [picture, numbers, *moved.values(), *(folder / name for name in names)]


@contextmanager
def _workspace(out: Path) -> Iterator[Path]:
    """A folder inside `out` that is gone at the end, also one that a killed run left."""
    work = out / ".unfinished"
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    except (FileExistsError, NotADirectoryError):
        raise SurgeryError(f"{out} is a file: name a folder with --out") from None
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        with suppress(OSError):  # only an empty one goes
            out.rmdir()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what libraries say about themselves out of the demo."""
    logger, bars = logging.getLogger("lightning.pytorch"), transformers_logging.is_progress_bar_enabled()
    level = logger.level
    logger.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.")
            yield
    finally:
        logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()
