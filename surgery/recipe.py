"""Recipe: the validated description of one conversion, found by name, path, dict or object."""

from __future__ import annotations

import os
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, PositiveInt, Tag, field_validator, model_validator

from .errors import RecipeError, SurgeryError
from .mixers import MixerConfig
from .mixers.base import AttentionShape, Config, Mixer
from .training.stages import AttentionTransfer, Calibrate, Denoising, StageConfig, TrainingStage
from .validation import Document, closest, parse_yaml, short, validate


class AutoLayers(Config):
    """All layers are converted but those that suffer most from it, on data: see `surgery.choose_layers`.

    auto: how many keep their softmax. tokens: to measure on, in rows of `sequence_length`. by: what is measured, one
    layer converted alone, or one restored in a model converted in all others.
    """

    auto: PositiveInt
    tokens: PositiveInt = 4096
    sequence_length: PositiveInt = 1024
    by: Literal["convert", "restore"] = "convert"


def _kind_of_layers(value: Any) -> str:
    return "<auto>" if isinstance(value, Mapping | AutoLayers) else "<listed>"


Layers = Annotated[
    Annotated[list[int], Field(min_length=1), Tag("<listed>")] | Annotated[AutoLayers, Tag("<auto>")],
    Discriminator(_kind_of_layers),
]


class Recipe(Config):
    """One conversion: which mixer replaces the attention of which layers, and how the result is healed.

    mixer: what takes the place of softmax attention; None: nothing does, as in controls that train the model as it is.
    layers: the attention layers to convert, by index, negative ones from the end; {auto: N}: all but N that are chosen
        on data; None: all of them.
    stages: what follows, in order: a calibration, if any, then training; empty: nothing.
    """

    description: str = ""
    mixer: MixerConfig | None
    layers: Layers | None = None
    stages: list[StageConfig] = []

    @field_validator("layers")
    @classmethod
    def _no_repeats(cls, layers: list[int] | AutoLayers | None) -> list[int] | AutoLayers | None:
        listed = layers if isinstance(layers, list) else []
        repeated = sorted({layer for layer in listed if listed.count(layer) > 1})
        if repeated:
            raise ValueError(f"lists {', '.join(map(str, repeated))} more than once")
        return layers

    @model_validator(mode="after")
    def _stages_fit_the_mixer(self) -> Recipe:
        for index, stage in enumerate(self.stages):
            if isinstance(stage, Calibrate) and (self.mixer is None or index):
                raise ValueError(
                    f"stages[{index}] calibrates a mixer before it is trained: "
                    + ("make it the first stage" if index else "remove the stage, or name a mixer")
                )
            if isinstance(stage, Denoising) and self.causal:
                raise ValueError(
                    f"stages[{index}] heals a denoiser, whose mixers see all tokens of an image: take the mixer "
                    "bidirectional, as in diffusion/linfusion, or another kind of stage"
                )
            if not isinstance(stage, AttentionTransfer):
                continue
            if self.mixer is None:
                raise ValueError(
                    f"stages[{index}] transfers attention to a mixer, but mixer is null: remove the stage, or name one"
                )
            if stage.loss.cross_entropy and not self.mixer.has_weights:
                raise ValueError(
                    f"stages[{index}].loss.cross_entropy compares attention weights, and mixer {self.mixer.kind} has "
                    "none that sum to one: use mse or normalized_mse"
                )
        return self

    @property
    def training(self) -> list[TrainingStage]:
        """The stages that train, without a calibration."""
        return [stage for stage in self.stages if not isinstance(stage, Calibrate)]

    @property
    def causal(self) -> bool:
        """Whether it is for decoders; else for encoders."""
        return self.mixer is None or self.mixer.causal

    def build(self, shape: AttentionShape) -> Mixer:
        """The mixer of one layer.

        Raises:
            SurgeryError: the recipe has no mixer.
        """
        if self.mixer is None:
            raise SurgeryError(
                "this recipe has no mixer and converts nothing: it trains a model as it is, with `surgery convert`"
            )
        return self.mixer.build(shape)

    @classmethod
    def resolve(cls, recipe: Recipe | str | os.PathLike[str] | Mapping[str, Any]) -> Recipe:
        """The same as `load_recipe`."""
        return load_recipe(recipe)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON or YAML; `load_recipe` makes an equal recipe of it."""
        return self.model_dump(mode="json")

    def override(self, changes: Mapping[str, Any]) -> Recipe:
        """A copy with the values at dotted paths replaced: `override({"mixer.window.size": 32, "stages.0.lr": 1e-3})`.

        Another `kind` starts that part of the recipe afresh, as its other keys belong to the old kind.

        Raises:
            RecipeError: a path leads nowhere, or the result is not a valid recipe.
        """
        document = Document(self.to_dict(), "override")
        for key, value in changes.items():
            problem = _set(document.data, key.split("."), value)
            if problem:
                document.report((key,), problem)
        return validate(Recipe, document)


def load_recipe(recipe: Recipe | str | os.PathLike[str] | Mapping[str, Any]) -> Recipe:
    """Make a recipe of a shipped name ("llama/lolcats"), a path to a YAML file, a dict, or a `Recipe`.

    Raises:
        RecipeError: there is no such recipe, or it has mistakes; all of them are listed, each with its place.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return validate(Recipe, Document(dict(recipe), "recipe"))
    if not isinstance(recipe, str | os.PathLike):
        raise RecipeError(f"a recipe is a shipped name, a path, a dict or a Recipe; not {type(recipe).__name__}")
    path = recipe_path(recipe)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as a recipe: {error}") from None
    document = parse_yaml(text, str(path))
    if not isinstance(document.data, dict):
        found = "nothing" if document.data is None else short(document.data)
        raise RecipeError(f"{path}: expected a mapping with at least the key `mixer`, found {found}")
    return validate(Recipe, document)


def recipe_path(name: str | os.PathLike[str]) -> Path:
    """The file of a shipped recipe, or the path itself if it names a file.

    Raises:
        RecipeError: neither; it says which name comes closest.
    """
    shipped = _shipped()
    if isinstance(name, str) and name in shipped:
        return shipped[name]
    path = Path(name)
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml") or not isinstance(name, str):
        raise RecipeError(f"no recipe file {os.fspath(name)!r}; `surgery recipes` lists those that need no file")
    same_method = [repr(known) for known in shipped if known.rpartition("/")[2] == name]
    guess = closest(name, shipped)
    guesses = same_method or ([repr(guess)] if guess else [])
    hint = f"; did you mean {' or '.join(guesses)}?" if guesses else ";"
    raise RecipeError(f"no recipe named {name!r}{hint} `surgery recipes` lists all {len(shipped)}")


def list_recipes() -> list[str]:
    """Names of the recipes that come with this package."""
    return list(_shipped())


def _shipped() -> dict[str, Path]:
    # a wheel carries the recipes inside the package; a checkout, also one installed with -e, has them beside it
    package = Path(__file__).resolve().parent
    root = next(folder for folder in (package / "_recipes", package.parent / "recipes") if folder.is_dir())
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.yaml"))}


def _set(data: Any, steps: list[str], value: Any) -> str | None:
    """Set one value inside plain data; says what stands in the way, if anything."""
    here: Any = steps[0]
    if isinstance(data, list):
        if not here.isdigit() or int(here) >= len(data):
            return f"there is no item {here!r} in this list of {len(data)} (counted from 0)"
        here = int(here)
    elif not isinstance(data, dict):
        return f"leads into {short(data)}, which has no parts"
    if len(steps) > 1:
        if isinstance(data, dict) and data.get(here) is None:
            data[here] = {}
        return _set(data[here], steps[1:], value)
    if here == "kind" and data.get(here) != value:
        data.clear()
    data[here] = deepcopy(value)
    return None
