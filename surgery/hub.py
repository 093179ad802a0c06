"""Saving and loading: a converted model is a model type of its own, `surgery_<type>`, that the Auto classes know.

Nothing is executed from a checkpoint: the recipe travels as plain data in `config.surgery`, and the classes are made
here.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import configuration_auto, modeling_auto

from . import adapters, denoisers
from .cache import recurrent_layer
from .errors import SurgeryError
from .folders import replace_folder
from .patchers.diffusion import is_denoiser
from .patchers.families import FAMILIES, WRAPPERS
from .patchers.interface import BIDIRECTIONAL, IMPLEMENTATION, converted_layers
from .patchers.sites import MODEL_TYPE_PREFIX, SEE, find_family, refuse_shares
from .recipe import Recipe, load_recipe

FORMAT = 1
MIXER_KEYS = r"\.mixer\."
WIDE = ("mixer", "lora_A", "lora_B")
"""Modules that stay in fp32 when a model is loaded, whatever the rest is in."""


class SurgicalConfig:
    """Mixin of generated config classes; `surgery` holds {"format", "recipe", "layers"}."""

    def __post_init__(self, *args: Any, **kwargs: Any) -> None:
        super().__post_init__(*args, **kwargs)
        register_models(type(self))

    def __reduce_ex__(self, protocol: int) -> tuple:
        _, _, *rest = super().__reduce_ex__(protocol)
        return _blank_config, (_original(type(self)),), *rest


class SurgicalModel:
    """Mixin of generated model classes: what changes around the attention layers."""

    _keep_in_fp32_modules_strict = list(WIDE)

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        from .operate import install

        settings = read_settings(config)
        if config._attn_implementation in (IMPLEMENTATION, BIDIRECTIONAL):
            # a live model's config: the softmax layers' own choice is asked
            config = copy.copy(config)
            config._attn_implementation_internal = None
        super().__init__(config, *args, **kwargs)
        install(self, load_recipe(settings["recipe"]), tuple(settings["layers"]))
        for name, adapter in settings.get("adapters", {}).items():
            adapters.inject(self, name, **adapter)
        # by these, libraries that quantise while they load know what to leave alone
        self._keep_in_fp32_modules = {*(self._keep_in_fp32_modules or ()), *(rf".*\.{name}" for name in WIDE)}

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers reads the source of the class's module to know
        return _original(cls)._can_set_attn_implementation()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return _original(cls)._can_set_experts_implementation()

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        refuse_shares(model)
        if added := sorted(key for key in info["unexpected_keys"] if adapters.is_adapter(key)):
            raise SurgeryError(
                f"the checkpoint holds adapters (e.g. {added[0]}) and does not say how they were made: load it into "
                "the model that it was saved from, or merge the adapters there"
            )
        missing = sorted(key for key in info["missing_keys"] if ".mixer." in key)
        if missing:
            raise SurgeryError(
                f"the checkpoint lacks {len(missing)} mixer weights (e.g. {missing[0]}): it was not saved whole; to "
                "convert a softmax checkpoint while loading, use surgery.from_pretrained(name, recipe=...)"
            )
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As transformers', but the folder appears complete or not at all; see `replace_folder`.

        Adapters that are not merged come along, and are there again in the model that is loaded.

        Raises:
            SurgeryError: one of them is no plain LoRA.
        """
        described = {} if getattr(self, "_hf_peft_config_loaded", False) else adapters.describe(self)
        self.config.surgery = {key: value for key, value in self.config.surgery.items() if key != "adapters"}
        if described:
            self.config.surgery["adapters"] = described
        if kwargs.get("is_main_process", True) is False:
            return super().save_pretrained(save_directory, *args, **kwargs)
        target = Path(save_directory)
        with replace_folder(target) as folder:
            super().save_pretrained(folder, *args, **{**kwargs, "push_to_hub": False})
        if kwargs.get("push_to_hub"):
            self.push_to_hub(kwargs.get("repo_id") or target.name)
        return None

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any
    ) -> Any:
        result = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        # transformers renamed the argument in 5.24
        cache = model_kwargs.get("cache", model_kwargs.get("past_key_values"))
        if cache is not None and self.surgery.switch.mode == "student":
            decoders = [module for module in converted_layers(self).values() if module.surgery_shape.causal]
            for module in decoders:
                layer = recurrent_layer(cache, module.layer_idx)
                if getattr(generation_config, "is_assistant", False):
                    layer.activate_past_recording()
        return result

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Raises: continuous batching pages keys and values, which a converted model does not have."""
        raise SurgeryError(
            "continuous batching (generate_batch) keeps paged keys and values, which a converted model does not have: "
            "use model.generate with a batch instead"
        )

    init_continuous_batching = generate_batch

    def __reduce_ex__(self, protocol: int) -> tuple:
        _, _, *rest = super().__reduce_ex__(protocol)
        return _blank_model, (_original(type(self)),), *rest


def _blank_config(cls: type) -> Any:
    generated = config_class(cls)
    return generated.__new__(generated)


def _blank_model(cls: type) -> Any:
    generated = model_class(cls)
    return generated.__new__(generated)


@functools.cache
def config_class(cls: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """`SurgeryLlamaConfig` for `LlamaConfig`."""
    body = {"model_type": MODEL_TYPE_PREFIX + cls.model_type, "__module__": __name__, "__doc__": cls.__doc__}
    return type(f"Surgery{cls.__name__}", (SurgicalConfig, cls), body)


@functools.cache
def model_class(cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """`SurgeryLlamaForCausalLM` for `LlamaForCausalLM`."""
    body = {"config_class": config_class(cls.config_class), "__module__": __name__, "__doc__": cls.__doc__}
    return type(f"Surgery{cls.__name__}", (SurgicalModel, cls), body)


def register_configs() -> None:
    """Make AutoConfig know the converted form of every supported family. Cheap: no modeling code is imported."""
    for model_type in (*FAMILIES, *WRAPPERS):
        if model_type in configuration_auto.CONFIG_MAPPING_NAMES:
            original = configuration_auto.CONFIG_MAPPING[model_type]
            AutoConfig.register(MODEL_TYPE_PREFIX + model_type, config_class(original), exist_ok=True)


@functools.cache
def register_models(config_cls: type[PreTrainedConfig]) -> None:
    """Make the Auto classes, checkpoint conversion and peft's default targets know the models of a converted config."""
    from peft.utils import constants
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )

    original = _original(config_cls)
    for auto, models in _auto_classes(original):
        for cls in models:
            if cls.config_class is original:
                auto.register(config_cls, model_class(cls), exist_ok=True)
    conversion = get_checkpoint_conversion_mapping(original.model_type)
    if conversion is not None:
        register_checkpoint_conversion_mapping(config_cls.model_type, conversion, overwrite=True)
    for name, targets in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO") and isinstance(targets, dict) and original.model_type in targets:
            targets.setdefault(config_cls.model_type, targets[original.model_type])


def _auto_classes(config_cls: type[PreTrainedConfig]) -> Iterator[tuple[Any, list[Any]]]:
    """The Auto classes that know a config, each with the models that it makes of it."""
    for auto in vars(modeling_auto).values():
        mapping = getattr(auto, "_model_mapping", None) if isinstance(auto, type) else None
        if mapping is not None and config_cls in mapping:
            models = mapping[config_cls]
            yield auto, list(models) if isinstance(models, (list, tuple)) else [models]


def original_name(model: Any) -> str:
    """Class name without conversion."""
    return _original(type(model)).__name__


def _original(cls: type) -> type:
    """What a generated class was generated from; any other class itself."""
    mro = cls.__mro__
    mixins = SurgicalModel, SurgicalConfig, denoisers.SurgicalDenoiser
    mixin = next((mixin for mixin in mixins if mixin in mro), None)
    return cls if mixin is None else mro[mro.index(mixin) + 1]


def convert_classes(model: Any, recipe: Recipe, layers: tuple[int, ...]) -> None:
    """Swap the classes of a live model and its config for the generated ones, and note the recipe in the config.

    What is neither of transformers nor of diffusers has no config, and is left as it is.
    """
    if is_denoiser(model):
        denoisers.convert_class(model, recipe, layers, FORMAT)
    if not isinstance(model, PreTrainedModel):
        return
    if not isinstance(model.config, SurgicalConfig):
        model.config.__class__ = config_class(type(model.config))
    register_models(type(model.config))
    known = getattr(model.config, "surgery", {})  # a loaded one also has the digest of the base weights
    model.config.surgery = {**known, "format": FORMAT, "recipe": recipe.to_dict(), "layers": list(layers)}
    if not isinstance(model, SurgicalModel):
        model.__class__ = model_class(type(model))
        keep = set(model._keep_in_fp32_modules_strict or ())
        model._keep_in_fp32_modules_strict = keep | set(WIDE)


def restore_classes(model: Any) -> None:
    """Undo `convert_classes`."""
    if isinstance(model, denoisers.SurgicalDenoiser):
        denoisers.restore_class(model)
    if not isinstance(model, PreTrainedModel):
        return
    model.__class__ = _original(type(model))
    model._keep_in_fp32_modules_strict -= set(WIDE)
    del model.config.surgery
    model.config.__class__ = _original(type(model.config))


def softmax_config(model: PreTrainedModel) -> Any:
    """A copy of the config of a converted model, as it was before."""
    config: Any = copy.deepcopy(model.config)
    config.__class__ = _original(type(config))
    del config.surgery
    config._attn_implementation_internal = None
    return config


@torch.no_grad()
def softmax_twin(model: PreTrainedModel) -> PreTrainedModel:
    """A softmax model of its own with the base weights of a converted one, on its device, in eval mode."""
    with torch.device(model.device):
        twin = _original(type(model))._from_config(softmax_config(model), dtype=model.dtype)
    weights = {name: value for name, value in model.state_dict().items() if ".mixer." not in name}
    twin.load_state_dict(weights)
    return twin.eval()


def has_settings(model: Any) -> TypeGuard[PreTrainedModel]:
    """Whether a converted model notes in its config what was done to it."""
    return isinstance(model, (PreTrainedModel, denoisers.SurgicalDenoiser))


def read_settings(config: Any) -> dict[str, Any]:
    """The `surgery` block of a converted config.

    Raises:
        SurgeryError: there is none, or a newer version wrote it.
    """
    settings = config.get("surgery") if isinstance(config, dict) else getattr(config, "surgery", None)
    if not isinstance(settings, dict) or not {"recipe", "layers"} <= settings.keys():
        raise SurgeryError(
            f"the config of type {getattr(config, 'model_type', '?')!r} has no `surgery` block with recipe and layers: "
            "it was not written by surgery, or edited; convert the original model again"
        )
    if settings.get("format", 0) > FORMAT:
        raise SurgeryError(
            f"this checkpoint has format {settings['format']} and this surgery reads up to {FORMAT}: upgrade surgery"
        )
    return settings


def from_pretrained(
    name: str | os.PathLike, recipe: Any = None, *, layers: Any = None, **kwargs: Any
) -> PreTrainedModel:
    """Load a checkpoint as a converted language model, multimodal ones included, as a converted encoder, or as a
    converted denoiser of diffusers, alone or in its pipeline.

    With `recipe`, a softmax checkpoint is converted while it is read: the model is built with its mixers from the start
    and filled from the file, so no second copy of the weights exists. Without, `name` must be a converted checkpoint.
    `kwargs` go to transformers' or diffusers' from_pretrained (dtype, device_map, revision ...).

    Raises:
        RecipeError, UnsupportedModelError, SurgeryError: as `apply`; also a converted checkpoint with a recipe.
    """
    from .operate import _plan, remember_base

    config = kwargs.pop("config", None)
    if config is None and (index := denoisers.read_index(name, **_hub_arguments(kwargs))) is not None:
        return denoisers.load(index, name, recipe, layers, _hub_arguments(kwargs), kwargs)
    config = config or AutoConfig.from_pretrained(name, **_hub_arguments(kwargs))
    if recipe is None:
        if not isinstance(config, SurgicalConfig):
            raise SurgeryError(f"{name} is not a converted checkpoint: say which recipe to convert it with")
        causal = load_recipe(read_settings(config)["recipe"]).causal
        return auto_class(config, causal).from_pretrained(name, config=config, **kwargs)
    if isinstance(config, SurgicalConfig):
        raise SurgeryError(f"{name} is already converted: load it without a recipe, or convert the original checkpoint")
    if find_family(config) is None:
        raise SurgeryError(f"{name} ({config.model_type}) is not supported; {SEE}")
    recipe = load_recipe(recipe)
    with torch.device("meta"):
        plan = _plan(auto_class(config, recipe.causal).from_config(config), recipe, layers)
    config.__class__ = config_class(type(config))
    config.surgery = {"format": FORMAT, "recipe": plan.recipe.to_dict(), "layers": list(plan.chosen)}
    cls = model_class(type(plan.model))
    model = _filling_class(cls).from_pretrained(name, config=config, **kwargs)
    model.__class__ = cls
    model._keys_to_ignore_on_load_missing.discard(MIXER_KEYS)
    for path, module in model.named_modules():
        if ".mixer" in path and hasattr(module, "reset_parameters"):
            module.reset_parameters()
    remember_base(model)
    return model


def auto_class(config: PreTrainedConfig, causal: bool = True) -> Any:
    """The Auto class that makes language models of this config: of text alone where there is one, or multimodal.

    Not causal: that of the encoder, with whatever head the checkpoint has. Where there is no language model: the plain
    model's.
    """
    if not causal:
        saved = (config.architectures or [""])[0]
        found = (auto for auto, models in _auto_classes(type(config)) if saved in [cls.__name__ for cls in models])
        return next(found, modeling_auto.AutoModel)
    if type(config) in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING:
        return modeling_auto.AutoModelForCausalLM
    pictures = type(config) in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return modeling_auto.AutoModelForImageTextToText if pictures else modeling_auto.AutoModel


def _hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "trust_remote_code")
    return {name: kwargs[name] for name in names if name in kwargs}


@functools.cache
def _filling_class(cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class as which a softmax checkpoint is read: mixers are expected to be missing from it."""
    return type(cls.__name__, (cls,), {"_keys_to_ignore_on_load_missing": [MIXER_KEYS], "__module__": __name__})
