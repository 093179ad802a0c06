"""Attention of plain PyTorch: a registered module's own forward runs, and its one call of
`scaled_dot_product_attention` goes to the mixer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from ..cache import Chunk
from ..errors import SurgeryError, UnsupportedModelError
from .interface import Call, Site, Surgical, converted_layers, original_class, record_transfer
from .masks import read_causal
from .registry import how_to_register, registration

WRAPPERS = {"LightningModule", "OptimizedModule", "PeftModel", "BaseTuner"}
LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


class Redirect(TorchFunctionMode):
    """Sends the one attention of a forward to the mixer; the module's other functions run as they are."""

    def __init__(self, module: Any, call: Call):
        super().__init__()
        self.module, self.call = module, call

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is scaled_dot_product_attention:
            return self.module.surgery_attend(self.call, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class Plain(Surgical):
    """Mixin put before a registered class; see `Surgical`."""

    surgery_repeats = False
    """Whether keys were seen to be repeated for the queries that share them: looking waits for the device."""

    @property
    def layer_idx(self) -> int:
        return self.surgery_shape.layer

    @property
    def surgery_name(self) -> str:
        name = original_class(type(self)).__name__
        return f"{self.surgery_path} ({name})" if self.surgery_path else name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        original = super(Surgical, self).forward
        if self.surgery_switch.mode == "teacher":
            return original(*args, **kwargs)
        self._surgery_hook()
        hidden: Any = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        call = Call(cache=None, hidden_states=hidden, position_ids=None, cu_seqlens=None)
        with Redirect(self, call):
            output = original(*args, **kwargs)
        if not call.used:
            raise SurgeryError(
                f"{self.surgery_name} ran without torch.nn.functional.scaled_dot_product_attention, so its mixer never "
                "ran: compute its attention by that function, or leave this layer out (layers=...)"
            )
        return output

    def surgery_attend(
        self,
        call: Call,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """In place of `scaled_dot_product_attention`: q [B, H, T, D] and k, v [B, H_kv, T, D] to [B, H, T, D]."""
        self._surgery_check(call, query, key, dropout_p, is_causal or attn_mask is not None)
        call.used = True
        real, segments = read_causal(attn_mask, query.shape[0], self.surgery_name)
        given = query, key, value
        if torch.is_autocast_enabled(query.device.type):
            # as autocast does for the function this stands for
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = (x.to(dtype) for x in given)
        key, value = self._surgery_share(key), self._surgery_share(value)
        scaling = query.shape[-1] ** -0.5 if scale is None else scale
        context = replace(self.surgery_context(query, key, value, scaling, call), segments=segments)
        chunk = Chunk(self.mixer, context, real)
        if self.surgery_switch.mode == "transfer":
            with torch.no_grad():
                teacher = scaled_dot_product_attention(
                    *given, attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
                )
            record_transfer(self, teacher.transpose(1, 2), chunk)
            return teacher
        output, _ = chunk.run(None, return_state=False)
        return output[..., : value.shape[-1]].transpose(1, 2)

    def _surgery_check(self, call: Call, query: Tensor, key: Tensor, dropout: float, causal: bool) -> None:
        name, shape = self.surgery_name, self.surgery_shape
        problem = None
        if call.used:
            problem = (
                "calls scaled_dot_product_attention twice in one forward, and one mixer takes the place of one call"
            )
        elif query.dim() != 4 or (query.shape[1], query.shape[-1]) != (shape.heads, shape.head_dim):
            problem = (
                f"was registered with {shape.heads} heads of {shape.head_dim}, but has queries of shape "
                f"{tuple(query.shape)}: they must be [batch, heads, tokens, head_dim]"
            )
        elif key.shape[1] not in (shape.kv_heads, shape.heads):
            problem = f"was registered with {shape.kv_heads} key/value heads, but has keys of shape {tuple(key.shape)}"
        elif key.shape[2] != query.shape[2]:
            problem = (
                f"attends to {key.shape[2]} keys by {query.shape[2]} queries, from a cache of its own or from elsewhere"
                ": run a converted model on whole sequences, without that cache"
            )
        elif dropout and self.training:
            problem = (
                f"drops attention weights (dropout_p={dropout:g}), which mixers do not have: set its dropout to 0, or "
                "call eval()"
            )
        elif not causal and query.shape[2] > 1:
            problem = "attends in both directions (neither is_causal=True nor a mask), which a recurrence cannot follow"
        if problem:
            raise SurgeryError(f"{name} {problem}")

    def _surgery_share(self, x: Tensor) -> Tensor:
        """[B, H_kv, T, D], of keys or values that may have been repeated for the queries that share them."""
        groups = self.surgery_shape.groups
        if x.shape[1] == self.surgery_shape.kv_heads:
            return x
        shared = x[:, ::groups]
        if self.surgery_repeats or torch.compiler.is_compiling():
            return shared
        if not torch.equal(shared, x[:, groups - 1 :: groups]):
            raise SurgeryError(
                f"{self.surgery_name} was registered with {shared.shape[1]} key/value heads, but attends to "
                f"{x.shape[1]} that differ: register kv_heads={x.shape[1]}"
            )
        self.surgery_repeats = True
        return shared


def registered(model: nn.Module) -> dict[str, Any]:
    """Attention modules of registered classes by path, without those that attend to an encoder."""
    encoders = {id(m.multihead_attn) for m in model.modules() if isinstance(m, nn.TransformerDecoderLayer)}
    modules = {path: each for path, each in model.named_modules() if registration(type(each))}
    return {path: each for path, each in modules.items() if id(each) not in encoders}


def find_model(model: nn.Module) -> nn.Module | None:
    """What holds the attention inside of wrappers and a LightningModule, or was converted; None: there is no attention.

    Raises:
        UnsupportedModelError: several models in `model` are converted.
    """
    converted = converted_layers(model)
    if converted:
        holders = [each for each in model.modules() if hasattr(each.__dict__.get("surgery"), "switch")]
        holders = [each for each in holders if len(converted_layers(each)) == len(converted)]
        if not holders:
            raise UnsupportedModelError(
                f"{type(model).__name__} does not hold one whole converted model: pass the module that surgery.apply "
                "was called on"
            )
        return holders[-1]
    if not registered(model):
        return None
    while WRAPPERS & {cls.__name__ for cls in type(model).__mro__}:
        holding = [each for each in model.children() if registered(each)]
        if len(holding) != 1 or isinstance(holding[0], LISTS) or registration(type(holding[0])):
            break
        model = holding[0]
    return model


def find_sites(model: nn.Module) -> list[Site]:
    """Every registered attention of `model`, in order. Touches nothing.

    Raises:
        UnsupportedModelError: there is none, or one cannot be converted.
    """
    modules = registered(model)
    if not modules:
        raise UnsupportedModelError(how_to_register(model) or f"{type(model).__name__} has no registered attention")
    own = [getattr(each, "layer_idx", None) for each in modules.values()]
    numbered = all(isinstance(index, int) for index in own) and len(set(own)) == len(own)
    return [
        _site(path, module, own[index] if numbered else index, len(modules))
        for index, (path, module) in enumerate(modules.items())
    ]


def _site(path: str, module: nn.Module, layer: int, layers: int) -> Site:
    from .multihead import Multihead, check

    known: Any = registration(type(module))
    multihead = isinstance(module, nn.MultiheadAttention)
    if isinstance(module, nn.MultiheadAttention):
        check(path, module)
    if "forward" in module.__dict__:
        raise UnsupportedModelError(
            f"the forward of {path} was replaced on the instance (by another library?): apply surgery before that patch"
        )
    return Site(path, module, known.family, known.shape(path, module, layer, layers), Multihead if multihead else Plain)


def projections(model: nn.Module, roles: Iterable[str]) -> list[str]:
    """Paths of the projections that play `roles` in registered attention."""
    found = []
    for path, module in registered(model).items():
        family: Any = registration(type(module)).family
        names = [getattr(family, role) for role in roles]
        found += [f"{path}.{name}" for name in names if name and hasattr(module, name)]
    return list(dict.fromkeys(found))
