"""Layers that are chosen on data, for `surgery layers` and `surgery convert`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoModelForCausalLM, PreTrainedModel

from ..errors import loading
from ..recipe import AutoLayers, Recipe
from ..sensitivity import LayerChoice, choose_layers
from .run import Run, write_text
from .stages import Calibrate
from .text import StageData, config_of, tokenizer_of

if TYPE_CHECKING:
    from .convert import Options


def layers_of(model: str, recipe: Recipe, rows: StageData, run: Run, cpu: bool) -> list[int] | None:
    """The layers that a run converts, if its recipe leaves them to data: chosen once, and kept beside what the stages
    learned. None: as the recipe says."""
    path = run.folder / "layers.json"
    if not isinstance(recipe.layers, AutoLayers):
        return None
    if not path.exists():
        write_text(path, json.dumps(_choose(model, recipe, recipe.layers, rows, cpu).to_dict(), indent=1))
    return json.loads(path.read_text(encoding="utf-8"))["convert"]


def measured_layers(model: str, recipe: Recipe, data: Sequence[str | Path], options: Options) -> LayerChoice:
    """`choose_layers` of a folder or hub name, on the first rows of files; one that keeps its softmax, if the recipe
    does not say how many."""
    auto = recipe.layers if isinstance(recipe.layers, AutoLayers) else AutoLayers(auto=1)
    rows = StageData(data, (), tokenizer_of(model), config_of(model), options, lambda line: None)
    return _choose(model, recipe, auto, rows, options.cpu)


def _choose(model: str, recipe: Recipe, auto: AutoLayers, rows: StageData, cpu: bool) -> LayerChoice:
    data = rows.at(Calibrate(tokens=auto.tokens, sequence_length=auto.sequence_length))
    data.count = -(-auto.tokens // auto.sequence_length)
    with loading("model", model):
        network: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    return choose_layers(
        network.to("cpu" if cpu else "cuda"), recipe.model_copy(update={"layers": auto}), data.train_dataloader()
    )
