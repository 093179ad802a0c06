"""One path for every architecture whose attention goes through transformers' AttentionInterface.

The model's own forward keeps making q, k and v (rotation, norms, biases, fused projections, LoRA, quantised weights).
The module's class is swapped in place for a subclass that withholds the cache and hands what a mixer needs to the
attention function `surgery`, chosen by a copy of the config that only this layer sees.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from ..cache import Chunk, RecurrentLayer, recurrent_layer
from ..errors import SurgeryError
from ..mixers.base import AttentionContext, AttentionShape, Mixer
from ..sharding import Shards, differentiated
from .families import Family
from .masks import both_sides_mask, padding_mask, read_both_sides, read_documents, read_padding

IMPLEMENTATION = "surgery"
BIDIRECTIONAL = "surgery_bidirectional"
"""Under this name encoders ask for masks."""
CACHE_ARGUMENTS = ("past_key_values", "layer_past", "cache")
"""Names under which versions and families of transformers hand the cache to their attention."""

TransferLoss = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Switch:
    """What all converted layers of one model share: how they act now, and where losses of `transfer` mode go.

    shards: of the mixers, by layer, while a model that FSDP2 shards is in `transfer` mode.
    """

    mode: str = "student"
    implementation: str = "sdpa"
    transfer_loss: TransferLoss | None = None
    cross_entropy: float = 0.0
    projected_l2: float = 0.0
    losses: dict[int, Tensor] = field(default_factory=dict)
    shards: dict[int, Shards] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        # losses hold graphs, which cannot be copied, and belong to the model that ran
        return {**vars(self), "losses": {}, "shards": {}}


@dataclass(frozen=True)
class Site:
    """One attention module that can be converted, with everything architecture-specific that a conversion needs.

    mixin: what steers it, a subclass of `Surgical`; None: `Surgical` itself.
    """

    path: str
    module: nn.Module
    family: Family
    shape: AttentionShape
    mixin: type | None = None

    @property
    def patcher(self) -> str:
        """The module that says how the attention is taken apart."""
        own = self.mixin or self.family.forward or type(self.family)
        return own.__module__.removeprefix(f"{__package__}.")


@dataclass
class Call:
    """What one forward of a converted attention knows before q, k and v exist."""

    cache: RecurrentLayer | None
    hidden_states: Tensor
    position_ids: Tensor | None
    cu_seqlens: Tensor | None
    used: bool = False


class Passing:
    """Stands in for the cache inside of a converted attention: keeps nothing, and knows how many tokens came before."""

    def __init__(self, layer: RecurrentLayer):
        self.layer = layer

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int | Tensor:
        return self.layer.seen


class Capture:
    """Forward hook that keeps the output of one projection until the attention function takes it."""

    def __init__(self, owner: nn.Module, name: str):
        self.owner, self.name = owner, name

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if self.owner.surgery_switch.mode != "teacher":
            self.owner.surgery_raw[self.name] = output


class Surgical:
    """Mixin put before an attention class by `surgical_class`; its state lives in the module's `__dict__`.

    mixer: the Mixer. surgery_site_family, surgery_shape, surgery_switch: see `swap`. surgery_raw: outputs of the
    projections during a call. surgery_hooks: projection name -> (module, handle).
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        switch: Switch = self.surgery_switch
        if switch.mode == "teacher":
            return super().forward(*args, **kwargs)
        self._surgery_hook()
        cache = _take_cache(kwargs)
        if switch.mode == "transfer":
            _refuse_continuation(cache)
            cache = None
        causal = self.surgery_shape.causal
        layer = recurrent_layer(cache, self.layer_idx) if causal and cache is not None else None
        if layer is not None:
            kwargs[next(name for name in CACHE_ARGUMENTS if name in kwargs)] = Passing(layer)
        call = Call(
            cache=layer,
            hidden_states=args[0] if args else kwargs["hidden_states"],
            # an encoder's softmax does not start documents where positions do
            position_ids=kwargs.get("position_ids") if causal else None,
            cu_seqlens=kwargs.get("cu_seq_lens_q"),
        )
        if self.surgery_family.forward is not None:
            attend = functools.partial(surgery_attention, surgery=call)
            return self.surgery_family.forward(self, attend, *args, **kwargs)
        return super().forward(*args, surgery=call, **kwargs)

    def _surgery_hook(self) -> None:
        """Follow the projections: an adapter that wraps one after conversion must be what is captured."""
        names = raw_projections(self.surgery_family, self.mixer.needs)
        for name in names:
            projection = getattr(self, name)
            hooked, handle = self.surgery_hooks.get(name, (None, None))
            if hooked is not projection:
                if handle is not None:
                    handle.remove()
                self.surgery_hooks[name] = (projection, projection.register_forward_hook(Capture(self, name)))

    def surgery_context(self, q: Tensor, k: Tensor, v: Tensor, scaling: float, call: Call) -> AttentionContext:
        raw_q, raw_k = self._surgery_raw_qk()
        batch, length, missing = q.shape[0], q.shape[2], q.shape[-1] - v.shape[-1]
        return AttentionContext(
            q=q.transpose(1, 2),
            k=k.transpose(1, 2),
            v=(v if missing == 0 else nn.functional.pad(v, (0, missing))).transpose(1, 2),
            scaling=scaling,
            raw_q=raw_q,
            raw_k=raw_k,
            hidden_states=call.hidden_states if "hidden_states" in self.mixer.needs else None,
            segments=read_documents(call.position_ids, call.cu_seqlens, batch, length),
        )

    def _surgery_raw_qk(self) -> tuple[Tensor | None, Tensor | None]:
        family, raw, found = self.surgery_family, self.surgery_raw, []
        for need, name, read in (("raw_q", family.q, family.raw_q), ("raw_k", family.k, family.raw_k)):
            flat = raw[name] if need in self.mixer.needs else None
            if flat is not None:
                flat = flat if read is None else read(flat, self)
                flat = flat.unflatten(-1, (-1, self.surgery_shape.head_dim))
            found.append(flat)
        raw.clear()
        return found[0], found[1]

    def __reduce_ex__(self, protocol: int) -> tuple:
        _, _, *rest = super().__reduce_ex__(protocol)
        return _rebuild, (original_class(type(self)), type(self).__mro__[1]), *rest


def _rebuild(cls: type, mixin: type = Surgical) -> nn.Module:
    generated = surgical_class(cls, mixin)
    return generated.__new__(generated)


@functools.cache
def surgical_class(cls: type, mixin: type = Surgical) -> type:
    """The subclass of an attention class that `Surgical`, or a subclass of it, steers; one per class."""
    return type(f"Surgical{cls.__name__}", (mixin, cls), {"__module__": __name__, "__doc__": cls.__doc__})


def original_class(cls: type) -> type:
    """What `surgical_class` was given."""
    return cls.__mro__[cls.__mro__.index(Surgical) + 1]


def raw_projections(family: Family, needs: frozenset[str]) -> list[str]:
    """Names of the projections whose output is to be captured."""
    names = [name for need, name in (("raw_q", family.q), ("raw_k", family.k)) if need in needs]
    return list(dict.fromkeys(names))


def _take_cache(kwargs: dict[str, Any]) -> Cache | None:
    """Take the cache out of a call's arguments, so that the original forward leaves it alone."""
    given = {name: kwargs[name] for name in CACHE_ARGUMENTS if name in kwargs}
    kwargs.update(dict.fromkeys(given))
    cache = next((cache for cache in given.values() if cache is not None), None)
    if cache is not None and not isinstance(cache, Cache):
        raise SurgeryError(
            f"continuous batching keeps paged keys and values ({type(cache).__name__}), which a converted model does "
            "not have: use model.generate, with a batch, instead"
        )
    return cache


def _refuse_continuation(cache: Any) -> None:
    if cache is not None and int(cache.get_seq_length()):
        raise SurgeryError("transfer mode trains on whole sequences: call the model without a filled cache")


def surgery_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    surgery: Call | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of converted layers: [B, H, T, D] in, [B, T, H, D] out, no weights."""
    if surgery is None:
        raise SurgeryError(
            f"{type(module).__name__} was called around its converted forward (an instance-level `forward` hides it): "
            "remove the patch, or apply surgery after it"
        )
    if surgery.used:
        raise SurgeryError(
            f"{type(module).__name__} calls attention several times in one forward, over one state: this architecture "
            "cannot be converted"
        )
    surgery.used = True
    if key.shape[2] != query.shape[2]:
        raise SurgeryError(
            f"{type(module).__name__} attends to {key.shape[2]} keys by {query.shape[2]} queries: it takes them from "
            "elsewhere (another layer, or an encoder), which a recurrence cannot follow"
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    context = module.surgery_context(query, key, value, scaling, surgery)
    cache, window = surgery.cache, kwargs.get("sliding_window")
    if module.surgery_shape.causal:
        real = read_padding(attention_mask, query.shape[2], 0 if cache is None else cache.seen, window)
        # positions jump at padding too; a padded batch is never packed
        segments = context.segments if real is None else None
    else:
        real, blocks = read_both_sides(attention_mask, query.shape[2])
        segments = context.segments if blocks is None else blocks
    context = replace(context, segments=segments)
    if module.surgery_switch.mode == "transfer":
        return _transfer(
            module, (query, key, value, attention_mask), scaling, kwargs, Chunk(module.mixer, context, real)
        )
    if cache is not None:
        output = cache.step(module.mixer, context, real)
    else:
        output = Chunk(module.mixer, context, real).run(None, return_state=False)[0]
    return output[..., : value.shape[-1]].contiguous(), None


def _transfer(module: nn.Module, inputs: tuple, scaling: float, kwargs: dict, chunk: Chunk) -> tuple[Tensor, None]:
    """Pass the teacher's output on; record how far the student is from it, on the same q, k and v."""
    switch: Switch = module.surgery_switch
    source = sys.modules[original_class(type(module)).__module__]
    eager = getattr(source, "eager_attention_forward", ALL_ATTENTION_FUNCTIONS["sdpa"])
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(switch.implementation, eager)
    query, key, value, mask = inputs
    if not hasattr(module, "num_key_value_groups"):
        # what attention functions ask, to share keys and values among heads
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    with torch.no_grad():
        teacher = attention(module, query, key, value, mask, scaling=scaling, **kwargs)[0].detach()
    record_transfer(module, teacher, chunk)
    return teacher, None


def record_transfer(module: nn.Module, teacher: Tensor, chunk: Chunk) -> None:
    """Note how far the mixer is from its teacher's output [B, T, H, D], as the switch of `module` says."""
    switch: Switch = module.surgery_switch
    chunk = Chunk(chunk.mixer, chunk.context.map(lambda tensor: tensor.detach()), chunk.real)
    student = chunk.run(None, return_state=False)[0][..., : teacher.shape[-1]]
    loss = switch.transfer_loss(*_select(student, teacher, chunk.real))
    if switch.cross_entropy:
        loss = loss + switch.cross_entropy * chunk.cross_entropy()
    if switch.projected_l2:
        loss = loss + switch.projected_l2 * _projected_l2(module, student, teacher, chunk.real)
    if switch.shards:
        loss = differentiated(loss, module.mixer, switch.shards[module.surgery_shape.layer])
    switch.losses[module.surgery_shape.layer] = loss


def _projected_l2(module: nn.Module, student: Tensor, teacher: Tensor, real: Tensor | None) -> Tensor:
    """Mean over the real tokens of ‖h_t - h_s‖ / √C between hidden states after the output projection (RADLADS)."""
    if module.surgery_family.o is None:
        raise SurgeryError(f"projected_l2 compares after the output projection, which {type(module).__name__} lacks")
    project = module.get_submodule(module.surgery_family.o)
    with torch.no_grad():
        wanted = project(teacher.flatten(2))
    frozen = {name: p.detach() for name, p in project.named_parameters() if p.requires_grad}
    found = torch.func.functional_call(project, frozen, student.flatten(2))
    errors = (found - wanted).float().norm(dim=-1) / wanted.shape[-1] ** 0.5
    return (errors if real is None else errors[real]).mean()


def _select(student: Tensor, teacher: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
    return (student, teacher) if real is None else (student[real], teacher[real])


AttentionInterface.register(IMPLEMENTATION, surgery_attention)
AttentionMaskInterface.register(IMPLEMENTATION, padding_mask)
AttentionInterface.register(BIDIRECTIONAL, surgery_attention)
AttentionMaskInterface.register(BIDIRECTIONAL, both_sides_mask)


def swap(site: Site, mixer: Mixer, switch: Switch) -> None:
    """Convert one attention in place. Nothing can fail in here that was not checked before."""
    module = site.module
    state = {
        "surgery_path": site.path,
        "surgery_family": site.family,
        "surgery_shape": site.shape,
        "surgery_switch": switch,
        "surgery_raw": {},
        "surgery_hooks": {},
    }
    if site.mixin is None:
        state["surgery_config"] = module.config
    module.__dict__.update(state)
    module.__class__ = surgical_class(type(module), site.mixin or Surgical)
    module.mixer = mixer
    if site.mixin is not None:
        module._surgery_hook()  # before anything is compiled, which cannot add hooks
    _rebind_forward(module)
    use_implementation(module, IMPLEMENTATION)


def unswap(module: nn.Module) -> None:
    """Undo `swap`."""
    for _, handle in module.surgery_hooks.values():
        handle.remove()
    use_implementation(module, None)
    for name in [name for name in module.__dict__ if name.startswith("surgery_")]:
        del module.__dict__[name]
    del module.mixer
    module.__class__ = original_class(type(module))
    _rebind_forward(module)


def use_implementation(module: nn.Module, implementation: str | None) -> None:
    """Choose this layer's attention function; None: the model's own. Layers outside of transformers have no choice."""
    if "surgery_config" not in module.__dict__:
        return
    module.config = module.surgery_config
    if implementation is not None:
        module.config = copy.copy(module.surgery_config)
        module.config._attn_implementation_internal = implementation


def use_masks(model: nn.Module, implementation: str | None) -> None:
    """Choose by which attention function a converted model makes its masks; None: those of converted attention."""
    for module in converted_layers(model).values():
        own = IMPLEMENTATION if module.surgery_shape.causal else BIDIRECTIONAL
        module.surgery_config._attn_implementation_internal = implementation or own


def _rebind_forward(module: nn.Module) -> None:
    # accelerate keeps the bound forward of the class it saw; point it at the class we have now
    if "_old_forward" in module.__dict__:
        module._old_forward = type(module).forward.__get__(module)


def converted_layers(model: nn.Module) -> dict[str, Any]:
    """Converted attention modules by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Surgical)}
