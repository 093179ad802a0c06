"""Tiny encoders, weighted so that attention matters to what they put out, and inputs for them."""

from __future__ import annotations

import torch
import transformers as tf
from torch import Tensor
from transformers import PreTrainedModel

SHAPE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, initializer_range=0.3)
TEXT = dict(vocab_size=97, max_position_embeddings=64, pad_token_id=0)
IDS = dict(bos_token_id=1, eos_token_id=2)
IMAGES = dict(image_size=16, patch_size=4)
SEQ2SEQ = dict(
    vocab_size=97, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, init_std=0.3,
    decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, pad_token_id=0, decoder_start_token_id=1, **IDS,
)  # fmt: skip
TOWERS = dict(text_config={**SHAPE, **TEXT, **IDS, "projection_size": 32}, vision_config={**SHAPE, **IMAGES})

MODELS = {
    "bert": (tf.BertModel, tf.BertConfig(**SHAPE, **TEXT)),
    "roberta": (tf.RobertaModel, tf.RobertaConfig(**SHAPE, **TEXT, **IDS)),
    "electra": (tf.ElectraModel, tf.ElectraConfig(**SHAPE, **TEXT, embedding_size=16)),
    "distilbert": (
        tf.DistilBertModel,
        tf.DistilBertConfig(
            vocab_size=97, dim=32, hidden_dim=48, n_layers=3, n_heads=4, pad_token_id=0, initializer_range=0.3
        ),
    ),
    "modernbert": (
        tf.ModernBertModel,
        tf.ModernBertConfig(
            **SHAPE, **TEXT, **IDS, cls_token_id=1, sep_token_id=2, local_attention=8, global_attn_every_n_layers=2
        ),
    ),
    "vit": (tf.ViTModel, tf.ViTConfig(**SHAPE, **IMAGES)),
    "dinov2": (
        tf.Dinov2Model,
        tf.Dinov2Config(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, mlp_ratio=2, **IMAGES),
    ),
    "siglip": (tf.SiglipModel, tf.SiglipConfig(**TOWERS)),
    "siglip-vision": (tf.SiglipVisionModel, tf.SiglipVisionConfig(**SHAPE, **IMAGES)),
    "clip": (tf.CLIPModel, tf.CLIPConfig(**TOWERS, projection_dim=16)),
    "clip-vision": (tf.CLIPVisionModel, tf.CLIPVisionConfig(**SHAPE, **IMAGES)),
    "whisper": (
        tf.WhisperModel,
        tf.WhisperConfig(**SEQ2SEQ, num_mel_bins=8, max_source_positions=20, max_target_positions=32),
    ),
    "bart": (tf.BartModel, tf.BartConfig(**SEQ2SEQ, max_position_embeddings=64)),
}
PADDED = ("bert", "roberta", "electra", "distilbert", "modernbert", "bart")
"""Encoders of text, with padding."""


def build(name: str, cls: type | None = None, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A fresh model, of another class of the same config if asked for."""
    torch.manual_seed(0)
    usual, config = MODELS[name]
    return (cls or usual)(type(config)(**config.to_dict())).eval().to(dtype)


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def inputs(name: str) -> dict[str, Tensor]:
    """Two rows, the first of them padded where there is text."""
    generator, ids = torch.Generator().manual_seed(1), tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[0, 15:] = 0
    text = {"input_ids": ids, "attention_mask": mask}
    pixels = {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    if name in ("siglip", "clip"):
        return text | pixels
    if name == "whisper":
        return {"input_features": torch.randn(2, 8, 40, generator=generator), "decoder_input_ids": ids}
    if name == "bart":
        return text | {"decoder_input_ids": ids}
    return text if name in PADDED else pixels


@torch.no_grad()
def outputs(model: PreTrainedModel, given: dict[str, Tensor]) -> list[Tensor]:
    """Every tensor that the model returns."""
    return [x for x in model(**given).to_tuple() if isinstance(x, Tensor)]


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))
