"""Running on shapes alone, and writing down what it would take: bytes alive, operations, seconds of a GPU."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .hardware import BANDWIDTH_EFFICIENCY, GPU, KERNEL_FLOPS, KERNEL_WORKSPACE, MATMUL_EFFICIENCY

CAUSAL = 0.5
"""Share of the pairs that causal attention computes."""


class Recorder(TorchDispatchMode):
    """Sees every operation inside the block, of real or of fake tensors, backward passes included.

    live, peak: bytes of what was made inside and is alive, now and at most. wide: those alive in tensors whose last
    dimension is `width`. flops: of all products. ops: operations that do more than look at a tensor in another way.
    seconds: Σ over them of the longer of computing and moving.
    """

    def __init__(self, gpu: GPU, width: int = 0) -> None:
        super().__init__()
        self.gpu, self.width = gpu, width
        self.live = self.wide = 0
        self.peak = 0.0
        self.flops = self.seconds = 0.0
        self.ops = 0
        self._known: dict[int, weakref.ref] = {}  # storages alive, by address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # questions that fake tensors ask about themselves
            return func(*args, **kwargs)
        given = _tensors((args, kwargs))
        for tensor in given:
            self._note(tensor, counts=False)  # there before, unless it was seen being made
        out = func(*args, **kwargs)
        made = _tensors(out)
        if sum([self._note(tensor, counts=True) for tensor in made]) or func._schema.is_mutable:
            self._charge(func, args, kwargs, out, given, made)
        return out

    def _note(self, tensor: Tensor, counts: bool) -> bool:
        """Whether the tensor has a storage that was not known yet."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._known:
            return False
        size = storage.nbytes() if counts else 0
        wide = size if tensor.shape[-1:] == (self.width,) else 0
        self._known[address] = weakref.ref(storage, lambda _: self._free(address, size, wide))
        self.live += size
        self.wide += wide
        self.peak = max(self.peak, self.live)
        return True

    def _free(self, address: int, size: int, wide: int) -> None:
        self.live -= size
        self.wide -= wide
        self._known.pop(address, None)

    def _charge(self, func: Any, args: Any, kwargs: Any, out: Any, given: list[Tensor], made: list[Tensor]) -> None:
        moved = sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in (*given, *made))
        flops = _flops(func, args, kwargs, out)
        if func.namespace == "surgery":
            flops = float(KERNEL_FLOPS * moved)
            self.peak = max(self.peak, self.live + KERNEL_WORKSPACE * moved)
        narrow = bool(given) and given[0].element_size() <= 2
        computing = flops / ((self.gpu.flops16 if narrow else self.gpu.flops32) * MATMUL_EFFICIENCY)
        self.seconds += max(computing, moved / (self.gpu.bandwidth * BANDWIDTH_EFFICIENCY))
        self.flops += flops
        self.ops += 1


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> float:
    packet = func.overloadpacket
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        return CAUSAL * _pairs(args[0], args[1]) * 4
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        # the scores again, and four products for the gradients
        return CAUSAL * _pairs(args[1], args[2]) * 10
    if packet is torch.ops.aten._grouped_mm:  # each row meets the weights of one expert
        return 2.0 * args[0].numel() * out.shape[-1]
    count = flop_registry.get(packet)
    return 0.0 if count is None else float(count(*args, **kwargs, out_val=out))


def _pairs(q: Tensor, k: Tensor) -> int:
    """[B, H, T, D], [B, H_kv, S, D] -> B·H·T·S·D."""
    return q.numel() * k.shape[2]
