"""Saving and loading of converted denoisers of diffusers, alone or in a pipeline.

Weights go into files of a variant of their own, so that what knows nothing of a conversion finds none, instead of
loading a softmax model around mixers that it drops. The recipe travels in the config, as plain data.
"""

from __future__ import annotations

import functools
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig

from . import adapters
from .errors import SurgeryError
from .patchers.diffusion import PARTS, PREFIX, denoiser_of

if TYPE_CHECKING:
    from .recipe import Recipe

VARIANT = "surgery"


class SurgicalDenoiser:
    """Mixin of generated model classes; `config.surgery` holds {"format", "recipe", "layers", "base"}."""

    def fuse_qkv_projections(self) -> None:
        """Raises: SurgeryError: always."""
        raise SurgeryError(
            f"fuse_qkv_projections would put softmax back into this {type(self).__name__}: converted attention keeps "
            "its projections apart"
        )

    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        save_function: Any = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        **kwargs: Any,
    ) -> None:
        """As diffusers saves it, mixers included; `surgery.from_pretrained` reads it.

        Raises:
            SurgeryError: there are adapters, which diffusers saves apart.
        """
        if names := adapters.names(self):
            raise SurgeryError(
                f"adapters ({', '.join(names)}) are saved apart: call surgery.adapters.merge(model) to add them to the "
                "weights, or save_lora_adapter and unload them first"
            )
        save = super().save_pretrained
        save(save_directory, is_main_process, save_function, safe_serialization, _variant(variant), **kwargs)

    @classmethod
    def from_pretrained(
        cls, name: Any, variant: str | None = None, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """As diffusers loads a model, with its mixers.

        Raises:
            SurgeryError: the checkpoint lacks weights of them.
        """
        load = super().from_pretrained
        model, info = load(name, variant=_variant(variant), output_loading_info=True, **kwargs)
        if missing := sorted(key for key in info["missing_keys"] if ".mixer." in key):
            raise SurgeryError(
                f"the checkpoint lacks {len(missing)} mixer weights (e.g. {missing[0]}): it was not saved whole"
            )
        return (model, info) if output_loading_info else model

    @classmethod
    def from_config(cls, config: Any, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        from .hub import read_settings
        from .operate import install
        from .recipe import load_recipe

        settings = read_settings(config)
        plain = {key: value for key, value in config.items() if key != "surgery"}
        found = original(cls).from_config(plain, return_unused_kwargs, **kwargs)
        model = found[0] if return_unused_kwargs else found
        install(model, load_recipe(settings["recipe"]), tuple(settings["layers"]))
        model.config.surgery.update(settings)
        return found


def _variant(variant: str | None) -> str:
    return VARIANT if variant is None else f"{VARIANT}-{variant}"


def __getattr__(name: str) -> Any:
    # pipelines and pickles look classes up in here by their names; pipelines also what all models are
    if name == "ModelMixin":
        return _diffusers().ModelMixin
    if name.startswith(PREFIX) and hasattr(_diffusers(), name.removeprefix(PREFIX)):
        return surgical_class(getattr(_diffusers(), name.removeprefix(PREFIX)))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def surgical_class(cls: Any) -> type:
    """What a denoiser of this class is while it is converted."""
    keep = [*(cls._keep_in_fp32_modules or []), "mixer"]
    own = {"__module__": __name__, "__doc__": cls.__doc__, "_keep_in_fp32_modules": keep}
    return type(f"{PREFIX}{cls.__name__}", (SurgicalDenoiser, cls), own)


def original(cls: type) -> type:
    """What `surgical_class` was given."""
    return cls.__mro__[cls.__mro__.index(SurgicalDenoiser) + 1]


def convert_class(model: Any, recipe: Recipe, layers: tuple[int, ...], version: int) -> None:
    """Swap the class of a live denoiser for the generated one, and note the recipe in its config."""
    model.__class__ = surgical_class(type(model))
    model.register_to_config(surgery={"format": version, "recipe": recipe.to_dict(), "layers": list(layers)})


def register(pipeline: Any) -> None:
    """Let a pipeline know of what class its denoiser is now, which it writes down when it is saved."""
    denoiser = denoiser_of(pipeline)
    for part in PARTS:
        if denoiser is not pipeline and getattr(pipeline, part, None) is denoiser:
            setattr(pipeline, part, denoiser)


def read_index(name: Any, **where: Any) -> dict[str, Any] | None:
    """What a checkpoint of diffusers, a model or a pipeline, says of itself; None: it is none of diffusers."""
    for file in ("config.json", "model_index.json"):
        with suppress(OSError):
            index, _ = PreTrainedConfig.get_config_dict(name, _configuration_file=file, **where)
            if index:
                return index if "_diffusers_version" in index else None
    return None


def skeleton(name: Any) -> Any:
    """The denoiser of a checkpoint of diffusers as it is before a conversion, without weights; None: it is none."""
    index = read_index(name)
    part = next((part for part in PARTS if part in (index or {})), None)
    config = index if part is None else read_index(name, subfolder=part)
    if config is None:
        return None
    with torch.device("meta"):
        plain = {key: value for key, value in config.items() if key != "surgery"}
        return getattr(_diffusers(), config["_class_name"].removeprefix(PREFIX)).from_config(plain)


def load(index: dict[str, Any], name: Any, recipe: Any, layers: Any, where: Any, kwargs: dict[str, Any]) -> Any:
    """See `surgery.from_pretrained`; `index` is what `read_index(name, **where)` gave."""
    from .operate import apply

    diffusers = _diffusers()
    cls = getattr(diffusers, index["_class_name"].removeprefix(PREFIX))
    is_pipeline = issubclass(cls, diffusers.DiffusionPipeline)
    part = next((part for part in PARTS if part in index), None) if is_pipeline else None
    known = (read_index(name, **{**where, "subfolder": part}) if part else index) or {}
    if recipe is not None:
        if "surgery" in known:
            raise SurgeryError(f"{name} is already converted: load it without a recipe, or convert the original")
        return apply(cls.from_pretrained(name, **kwargs), recipe, layers=layers)
    if "surgery" not in known:
        raise SurgeryError(f"{name} is not a converted checkpoint: say which recipe to convert it with")
    denoiser = surgical_class(getattr(diffusers, known["_class_name"].removeprefix(PREFIX)))
    if part is None:
        return denoiser.from_pretrained(name, **kwargs)
    dtype = {key: kwargs[key] for key in ("dtype", "torch_dtype") if key in kwargs}
    loaded = denoiser.from_pretrained(name, **{**where, **dtype, "subfolder": part})
    pipeline = cls.from_pretrained(name, **{**kwargs, part: loaded})
    pipeline.surgery = loaded.surgery
    return pipeline


def _diffusers() -> Any:
    try:
        import diffusers
    except ModuleNotFoundError:
        raise SurgeryError(
            "this checkpoint is one of diffusers, which is not installed: pip install 'surgery[diffusion]'"
        ) from None
    return diffusers


def restore_class(model: Any) -> None:
    """Undo `convert_class`."""
    model.__class__ = original(type(model))
    kept = {key: value for key, value in model.config.items() if key != "surgery"}
    model._internal_dict = type(model.config)(kept)
