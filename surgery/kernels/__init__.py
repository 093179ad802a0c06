"""Tensors in, tensors out: the operations mixers are made of, each with several implementations behind one name."""

from . import chunked, examples, features, reference
from .dispatch import BACKENDS, Op, backend, in_triton
from .specs import Features, Joint, LogMass, State, Window
from .state import linear_state, mesa_state, slot_state, window_state

linear_attention = Op(
    reference.linear_attention,
    chunked.linear_attention,
    examples.linear,
    in_triton("linear_attention"),
    in_triton("linear_attention_step"),
)
gated_linear_attention = Op(
    reference.gated_linear_attention,
    chunked.gated_linear_attention,
    examples.gated,
    in_triton("gated_linear_attention"),
    in_triton("gated_linear_attention_step"),
)
delta_attention = Op(
    reference.delta_attention,
    chunked.delta_attention,
    examples.delta,
    in_triton("delta_attention", untried=True),
    in_triton("delta_attention_step"),
)
gated_slot_attention = Op(
    reference.gated_slot_attention,
    chunked.gated_slot_attention,
    examples.slots,
    in_triton("gated_slot_attention", untried=True),
    in_triton("gated_slot_attention_step", untried=True),
)
mesa_attention = Op(
    reference.mesa_attention, chunked.mesa_attention, examples.mesa, in_triton("mesa_attention", untried=True)
)
window_attention = Op(
    reference.window_attention,
    chunked.window_attention,
    examples.window,
    in_triton("window_attention"),
    in_triton("window_attention_step"),
)
hybrid_attention = Op(
    reference.hybrid_attention,
    chunked.hybrid_attention,
    examples.hybrid,
    in_triton("hybrid_attention"),
    in_triton("hybrid_attention_step"),
)
bidirectional_attention = Op(
    reference.bidirectional_attention,
    chunked.bidirectional_attention,
    examples.bidirectional,
    in_triton("bidirectional_attention", untried=True),
)
bidirectional_cross_entropy = Op(
    reference.bidirectional_cross_entropy, chunked.bidirectional_cross_entropy, examples.bidirectional_transfer
)
attention_cross_entropy = Op(
    reference.attention_cross_entropy,
    chunked.attention_cross_entropy,
    examples.transfer,
    in_triton("attention_cross_entropy"),
)
head_norm = Op(reference.head_norm, reference.head_norm, examples.heads, in_triton("head_norm", untried=True))
output_error = Op(reference.output_error, reference.output_error, examples.outputs, in_triton("output_error"))

OPS = {
    op.name: op
    for op in (
        linear_attention,
        gated_linear_attention,
        delta_attention,
        gated_slot_attention,
        mesa_attention,
        window_attention,
        hybrid_attention,
        bidirectional_attention,
        bidirectional_cross_entropy,
        attention_cross_entropy,
        head_norm,
        output_error,
    )
}

__all__ = [
    "BACKENDS",
    "OPS",
    "Features",
    "Joint",
    "LogMass",
    "Op",
    "State",
    "Window",
    "attention_cross_entropy",
    "backend",
    "bidirectional_attention",
    "bidirectional_cross_entropy",
    "delta_attention",
    "features",
    "gated_linear_attention",
    "gated_slot_attention",
    "head_norm",
    "hybrid_attention",
    "linear_attention",
    "linear_state",
    "output_error",
    "mesa_attention",
    "mesa_state",
    "slot_state",
    "window_attention",
    "window_state",
]
