"""The cache layer of a converted attention: a state of fixed size in place of keys and values, with exact rollback."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, StaticLayer

from .errors import SurgeryError
from .mixers.base import AttentionContext, Mixer, State
from .patchers.masks import compact


@dataclass(frozen=True)
class Chunk:
    """What one call brought to a layer: enough to run it again over its first tokens."""

    mixer: Mixer
    context: AttentionContext
    real: Tensor | None

    @property
    def length(self) -> int:
        return self.context.q.shape[1]

    def first(self, tokens: int) -> Chunk:
        real = None if self.real is None else self.real[:, :tokens]
        return Chunk(self.mixer, self.context.map(lambda tensor: tensor[:, :tokens]), real)

    def cross_entropy(self) -> Tensor:
        """Scalar: the mean over real tokens and heads of `Mixer.cross_entropy`."""
        context, _ = compact(self.context, self.real)
        losses = self.mixer.cross_entropy(context)
        return losses.mean() if self.real is None else losses.sum() / (self.real.sum() * losses.shape[-1])

    def run(self, state: State | None, return_state: bool) -> tuple[Tensor, State | None]:
        context, restore = compact(self.context, self.real)
        output, state = self.mixer(context, state, return_state)
        return restore(output), state

    def step(self, state: State) -> Tensor:
        """`run` of one token, which leaves its state in the tensors of `state`."""
        context, restore = compact(self.context, self.real)
        return restore(self.mixer.step(context, state))


class RecurrentLayer(CacheLayerMixin):
    """Stands in a transformers `Cache` where a key/value layer stood.

    `replaced` is that layer, kept empty: it still answers how long masks are, so that converted and softmax layers can
    share one mask. When `replaced` is static, the state lives in fixed buffers that are written in place, as compiled
    decoding needs. Otherwise states are replaced, but by single tokens, which are written into them where nobody could
    ask for them as they were. While recording (assisted decoding), every call keeps the state before it and its inputs;
    `crop` goes back to the state before the chunk it lands in and runs the accepted tokens again.
    """

    def __init__(self, replaced: CacheLayerMixin):
        super().__init__()
        self.replaced = replaced
        self.static = isinstance(replaced, StaticLayer)
        self.is_sliding = bool(getattr(replaced, "is_sliding", False))
        self.is_compileable = self.static
        self.is_croppable = not self.static
        self.state: State | None = None
        self.length: int | Tensor = torch.tensor(0) if self.static else 0
        self.record_past = False
        self.history: list[tuple[State | None, Chunk]] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the mixer makes the state with the first tokens."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise SurgeryError(
            "this cache was filled by the converted model and holds no keys and values: start from a new cache in "
            "teacher mode, after surgery.revert, or with another model"
        )

    def step(self, mixer: Mixer, context: AttentionContext, real: Tensor | None) -> Tensor:
        """Run `mixer` over the new tokens and keep the state they leave; returns the output [B, T, H, D]."""
        chunk = Chunk(mixer, context, real)
        if self.record_past:
            self.history.append((self.state, chunk))
        if self.static and self.state is None:
            self._allocate(chunk)
        if self.state is not None and chunk.length == 1 and self._may_write(self.state):
            output = chunk.step(self.state)
            self.is_initialized = True
        else:
            output, state = chunk.run(self.state, return_state=True)
            self._write(state)
        self._advance(chunk.length)
        return output

    def _may_write(self, state: State) -> bool:
        """Whether the state may change in place: no gradient and no recorded call needs it, and torch allows it."""
        if self.record_past or torch.is_grad_enabled() or any(x.requires_grad for x in state.values()):
            return False
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return True
        return not any(x.is_inference() for x in state.values())

    def _allocate(self, chunk: Chunk) -> None:
        q = chunk.context.q
        self.state = chunk.mixer.init_state(q.shape[0], device=q.device, dtype=q.dtype)
        self.length = torch.as_tensor(self.length).to(q.device)
        if not torch.compiler.is_compiling():
            for buffer in (*self.state.values(), self.length):
                torch._dynamo.mark_static_address(buffer)

    def _write(self, state: State | None) -> None:
        if not self.static or self.state is None:
            self.state = state
        elif state is not None:
            for name, buffer in self.state.items():
                buffer.copy_(state[name].detach())
        self.is_initialized = True

    def _advance(self, tokens: int) -> None:
        if isinstance(self.length, Tensor):
            self.length.add_(tokens)
            if self.is_sliding:
                self.replaced.cumulative_length_int += tokens
        else:
            self.length += tokens
            if self.is_sliding:
                self.replaced.cumulative_length = self.length

    @property
    def seen(self) -> int | Tensor:
        """Tokens so far, padding included: an int, or a tensor on the device when static."""
        return self.length

    @property
    def batch_size(self) -> int:
        if self.state is None:
            raise AttributeError("batch_size")
        return next(iter(self.state.values())).shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes that this layer holds."""
        return sum(t.numel() * t.element_size() for t in (self.state or {}).values())

    def get_seq_length(self) -> int | Tensor:
        if self.static and self.is_sliding:
            return self.replaced.cumulative_length_int
        return self.length if self.is_initialized else 0

    def get_max_length(self) -> int:
        return self.replaced.get_max_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int | Tensor, int]:
        if self.static or self.is_sliding:
            return self.replaced.get_mask_sizes(query_length)
        return self.length + query_length, 0

    def reset(self) -> None:
        self.history.clear()
        self.is_initialized = False
        self.replaced.reset()
        if isinstance(self.length, Tensor):
            self.length.zero_()
            for buffer in (self.state or {}).values():
                buffer.zero_()
        else:
            self.state, self.length = None, 0

    def _map(self, function: Any) -> None:
        if self.state is not None:
            self.state = {name: function(tensor) for name, tensor in self.state.items()}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda tensor: tensor[indices.to(tensor.device)])

    def offload(self) -> None:
        """The state is small: it stays where it is."""

    def prefetch(self) -> None:
        """See `offload`."""

    def activate_past_recording(self) -> None:
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens, exactly.

        Raises:
            SurgeryError: more tokens than were recorded since `activate_past_recording` and the last `crop`.
        """
        drop = abs(int(tokens_to_remove))  # generate may count on the device
        if tokens_to_remove > 0:
            raise SurgeryError(
                f"crop takes the number of tokens to remove as a negative number, not {tokens_to_remove}"
            )
        if drop > sum(chunk.length for _, chunk in self.history):
            raise SurgeryError(
                f"cannot take back {drop} tokens: a recurrent state only goes back over tokens recorded since the last "
                "crop; call cache.activate_past_recording() before them"
            )
        if drop:
            self._advance(-drop)
        while drop:
            self.state, chunk = self.history.pop()
            drop -= chunk.length
            if drop < 0:
                _, self.state = chunk.first(-drop).run(self.state, return_state=True)
                drop = 0
        self.history.clear()


def recurrent_layer(cache: Cache, index: int) -> RecurrentLayer:
    """The layer `index` of `cache`, put there in place of a key/value layer if that is still empty.

    Raises:
        SurgeryError: the layer already holds keys and values, or the cache is not one that decoders use.
    """
    if type(cache).__name__ == "EncoderDecoderCache":
        raise SurgeryError("encoder-decoder caches are not supported by converted attention: only decoders are")
    grow = getattr(cache, "layer_class_to_replicate", None)
    while grow is not None and len(cache.layers) <= index:
        cache.layers.append(grow())
    layer = cache.layers[index]
    if isinstance(layer, RecurrentLayer):
        return layer
    if layer.is_initialized and int(layer.get_seq_length()):
        raise SurgeryError(
            f"layer {index} of the cache already holds keys and values of a softmax model, which a recurrence cannot "
            "continue: start the converted model from a new cache"
        )
    layer.keys = layer.values = None
    layer.is_initialized = False
    cache.layers[index] = RecurrentLayer(layer)
    return cache.layers[index]
