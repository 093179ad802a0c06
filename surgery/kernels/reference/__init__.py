"""The operations as their equations read, one token after the other."""

from .bidirectional import bidirectional_attention, bidirectional_cross_entropy
from .delta import delta_attention
from .gated import gated_linear_attention
from .hybrid import hybrid_attention
from .linear import linear_attention
from .mesa import mesa_attention
from .norm import head_norm
from .slots import gated_slot_attention
from .transfer import attention_cross_entropy, output_error
from .window import window_attention

__all__ = [
    "attention_cross_entropy",
    "bidirectional_attention",
    "bidirectional_cross_entropy",
    "delta_attention",
    "gated_linear_attention",
    "gated_slot_attention",
    "head_norm",
    "hybrid_attention",
    "linear_attention",
    "mesa_attention",
    "output_error",
    "window_attention",
]
