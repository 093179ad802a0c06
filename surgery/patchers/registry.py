"""Which classes of plain PyTorch are attention, and where their heads and projections are.

What goes through transformers' AttentionInterface is in `families.py` instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import SurgeryError, UnsupportedModelError
from ..mixers.base import AttentionShape, Mixer
from .families import Family, Read, _grouped_keys, _grouped_queries

if TYPE_CHECKING:
    from .interface import Site

Size = int | str | Callable[[Any], int]
"""A number, the attribute of the module that holds it ("n_head", "config.n_head"), or what reads it off the module."""


@dataclass(frozen=True)
class Registration:
    """What `register` was told of one class."""

    family: Family
    heads: Size
    kv_heads: Size | None = None
    head_dim: Size | None = None
    hidden_size: Size | None = None

    def shape(self, path: str, module: nn.Module, layer: int, layers: int) -> AttentionShape:
        """Raises: UnsupportedModelError: a size cannot be read off the module, or sizes do not fit together."""

        def read(name: str) -> Any:
            size = getattr(self, name)
            try:
                value: Any = reduce(getattr, size.split("."), module) if isinstance(size, str) else size
                return value(module) if callable(value) else value
            except AttributeError as error:
                raise UnsupportedModelError(f"{path} was registered with {name}={size!r}, but {error}") from None

        heads, head_dim, hidden = read("heads"), read("head_dim"), read("hidden_size")
        hidden = hidden or getattr(getattr(module, self.family.q or "", None), "in_features", None)
        if not heads or not (head_dim or hidden):
            raise UnsupportedModelError(
                f"{path} does not tell the size of its heads: add head_dim= to "
                f"surgery.patchers.register({self.family.attention}, ...)"
            )
        head_dim = head_dim or hidden // heads
        kv_heads = read("kv_heads") or heads
        if heads % kv_heads:
            raise UnsupportedModelError(f"{path} was registered with {heads} heads, which {kv_heads} do not divide")
        return AttentionShape(heads, kv_heads, head_dim, hidden or heads * head_dim, layer, layers)


_REGISTERED: dict[type, Registration] = {
    nn.MultiheadAttention: Registration(
        Family("MultiheadAttention", q="q", k="k", v="v", o="out_proj"), "num_heads", None, "head_dim", "embed_dim"
    )
}


def register(
    cls: type[nn.Module],
    *,
    heads: Size,
    kv_heads: Size | None = None,
    head_dim: Size | None = None,
    hidden_size: Size | None = None,
    qkv: str | None = None,
    q: str | None = None,
    k: str | None = None,
    v: str | None = None,
    o: str | None = None,
    raw_q: Read | None = None,
    raw_k: Read | None = None,
) -> None:
    """Let `surgery.apply` convert the attention modules of a class (and of its subclasses) that is your own.

    Its forward must call `torch.nn.functional.scaled_dot_product_attention` once, on q [B, H, T, D] and k, v
    [B, H_kv, T, D] (or repeated to H, each H / H_kv times in a row), with is_causal=True or a causal mask. That call is
    what a mixer takes over; projections, norms and rotation stay the module's own.

    heads, kv_heads (by default heads), head_dim (by default the width over heads), hidden_size: a number, the name of
    an attribute ("config.n_head"), or a function of the module. q, k, v, o: names of the projections, which LoRA adapts
    and mixers with gates read; qkv: that of a fused one, which puts out all queries, then all keys, then all values.
    raw_q, raw_k: (its output [B, T, C], module) -> queries, keys [B, T, H·D], where its layout is another.

    Raises:
        SurgeryError: `cls` is not a class of modules.

    Example::

        surgery.patchers.register(
            CausalSelfAttention,
            heads="n_head",
            qkv="c_attn",
            o="c_proj",
        )
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise SurgeryError(f"register takes a class of torch modules, and {cls!r} is none")
    if qkv is not None:
        family = Family.fused(cls.__name__, qkv, raw_q or _grouped_queries, raw_k or _grouped_keys)
    else:
        family = Family(cls.__name__, q=q or "", k=k or "", v=v or "", raw_q=raw_q, raw_k=raw_k)
    family = Family(**{**vars(family), "o": o})
    _REGISTERED[cls] = Registration(family, heads, kv_heads, head_dim, hidden_size)


def registration(cls: type) -> Registration | None:
    """Of a class, or of the nearest one it inherits from; None: it is not registered."""
    return next((_REGISTERED[base] for base in cls.__mro__ if base in _REGISTERED), None)


def check_needs(site: Site, mixer: Mixer) -> None:
    """Raises: SurgeryError: the mixer reads the output of projections that were not named."""
    projections = {"raw_q": site.family.q, "raw_k": site.family.k}
    missing = [need for need, name in projections.items() if need in mixer.needs and not name]
    if missing:
        raise SurgeryError(
            f"{mixer.describe()} reads queries and keys as their projections give them, and those of {site.path} are "
            f"not known: add qkv=, or q= and k=, to surgery.patchers.register({site.family.attention}, ...)"
        )


def how_to_register(model: nn.Module) -> str | None:
    """One sentence with the lines to write for the first module that looks like attention; None: none does."""

    def calls(module: nn.Module) -> bool:
        code = getattr(type(module).forward, "__code__", None)
        return "scaled_dot_product_attention" in getattr(code, "co_names", ())

    def named(module: nn.Module) -> bool:
        return "attention" in type(module).__name__.lower()

    modules = [(path, each) for looks in (calls, named) for path, each in model.named_modules() if looks(each)]
    path, module = next(iter(modules), (None, None))
    if module is None:
        return None
    names = ("n_head", "num_heads", "n_heads", "num_attention_heads", "heads")
    lines = [f'heads="{next((name for name in names if hasattr(module, name)), names[0])}"']
    linear = [name for name, child in module.named_children() if hasattr(child, "in_features")]
    roles = {2: ("qkv", "o"), 4: ("q", "k", "v", "o")}.get(len(linear), ())
    lines += [f'{role}="{name}"' for role, name in zip(roles, linear, strict=False)] or ["head_dim=..."]
    call = "".join(f"    {line},\n" for line in [type(module).__name__, *lines])
    return (
        f"no Hugging Face model found in {type(model).__name__}, and its attention {path or type(module).__name__} is "
        f"of a class that is not registered: write, once, with the names of yours,\nsurgery.patchers.register(\n{call})"
    )
