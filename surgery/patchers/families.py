"""What the families have of their own: the class of their attention and the names of its projections.

Everything else (heads, rotation, norms, masks, caches) goes through transformers' AttentionInterface and is the same
for all of them, see `interface.py`. A new family is one line in `FAMILIES`; `python -m benchmarks.coverage` checks it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from . import falcon, siglip

Read = Callable[[Tensor, Any], Tensor]
"""Takes the output [B, T, C] of a projection, and the attention module, to the flat raw queries or keys in it."""


@dataclass(frozen=True)
class Family:
    """How one architecture names the parts of its self-attention.

    attention: class name. q, k, v, o: its projections, the same name several times where they are fused; o is None
    where it lies outside of the attention module. raw_q, raw_k: take queries and keys out of what q and k put out; by
    default they put out nothing else. lacks: what its softmax layers have and a conversion leaves out.
    forward: (module, attend, *args, **kwargs), in place of one that does not go through the interface.
    causal: whether a module is, in families whose modules do not say so themselves; these have no cache.
    """

    attention: str
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str | None = "o_proj"
    raw_q: Read | None = None
    raw_k: Read | None = None
    lacks: str = ""
    forward: Callable | None = None
    causal: Callable[[Any], bool] | None = None

    @classmethod
    def fused(cls, attention: str, qkv: str, raw_q: Read, raw_k: Read, o: str = "o_proj", lacks: str = "") -> Family:
        """A family with one projection for queries, keys and values."""
        return cls(attention, q=qkv, k=qkv, v=qkv, o=o, raw_q=raw_q, raw_k=raw_k, lacks=lacks)

    @classmethod
    def latent(cls, attention: str, q: str = "q_b_proj") -> Family:
        """Multi-head latent attention: keys and values come out of one small latent, and heads share rotated parts."""
        return cls(attention, q=q, k="kv_b_proj", v="kv_b_proj", raw_k=_latent_keys)


def size(module: Any, config: Any) -> tuple[int, int, int]:
    """(query heads, key/value heads, head dimension) of an attention module."""
    latent = getattr(module, "qk_head_dim", None)
    dim = latent or _first(module, "head_dim", "head_size", "attention_head_size")
    heads = _first(module, "num_heads", "num_attention_heads", "n_heads") or _first(config, "num_attention_heads")
    groups = getattr(module, "num_key_value_groups", None)
    if latent:
        return heads, heads, dim
    keys = getattr(getattr(module, "k_proj", None), "out_features", None)
    if keys and groups:
        # layers of one model differ in some families, and only the projections know
        return keys // dim * groups, keys // dim, dim
    if groups:
        return heads, heads // groups, dim
    return heads, _first(module, "num_kv_heads") or _first(config, "num_key_value_heads") or heads, dim


def _first(holder: Any, *names: str) -> Any:
    return next((found for name in names if (found := getattr(holder, name, None)) is not None), None)


def _part(index: int, count: int) -> Read:
    """One of `count` equal parts."""
    return lambda fused, module: fused.chunk(count, dim=-1)[index]


def _part_per_head(index: int, count: int) -> Read:
    """One of `count` equal parts of every head."""
    return lambda fused, module: fused.unflatten(-1, (-1, count, module.surgery_shape.head_dim))[..., index, :].flatten(
        -2
    )


def _grouped_queries(fused: Tensor, module: Any) -> Tensor:
    shape = module.surgery_shape
    return fused[..., : shape.heads * shape.head_dim]


def _grouped_keys(fused: Tensor, module: Any) -> Tensor:
    shape = module.surgery_shape
    start = shape.heads * shape.head_dim
    return fused[..., start : start + shape.kv_heads * shape.head_dim]


def _of_shard(index: int) -> Read:
    """CodeGen was trained on 4 shards, each of which holds queries, values and keys."""
    return lambda fused, module: fused.unflatten(-1, (4, 3, -1))[..., index, :].flatten(-2)


def _starcoder_queries(fused: Tensor, module: Any) -> Tensor:
    return (_grouped_queries if module.multi_query else _part_per_head(0, 3))(fused, module)


def _starcoder_keys(fused: Tensor, module: Any) -> Tensor:
    return (_grouped_keys if module.multi_query else _part_per_head(1, 3))(fused, module)


def _latent_keys(fused: Tensor, module: Any) -> Tensor:
    """The part of the keys that is not rotated, and zeros where the rotated part stands."""
    plain = fused.unflatten(-1, (module.surgery_shape.kv_heads, -1))[..., : module.qk_nope_head_dim]
    return nn.functional.pad(plain, (0, module.surgery_shape.head_dim - plain.shape[-1])).flatten(-2)


def _named(**families: str) -> dict[str, Family]:
    return {name: Family(attention) for name, attention in families.items()}


def _bert(attention: str) -> Family:
    return Family(attention, q="query", k="key", v="value", o=None)


def _neox(attention: str) -> Family:
    name = "query_key_value"
    return Family.fused(attention, name, _part_per_head(0, 3), _part_per_head(1, 3), o="dense")


def _bart(attention: str) -> Family:
    return Family(attention, o="out_proj")


# one class for both towers, of which the one for text is causal
_CLIP = Family("CLIPAttention", o="out_proj", causal=lambda module: "Text" in type(module.config).__name__)
_SIGLIP = Family("SiglipAttention", o="out_proj", forward=siglip.forward)
_SINKS = "the sinks of its softmax"
FAMILIES: dict[str, Family] = {
    **_named(
        afmoe="AfmoeAttention",
        apertus="ApertusAttention",
        apertus1p5_text="Apertus1p5TextAttention",
        arcee="ArceeAttention",
        aria_text="AriaTextAttention",
        bamba="BambaAttention",
        beam="BeamAttention",
        bitnet="BitNetAttention",
        cohere="CohereAttention",
        cohere2="Cohere2Attention",
        cohere2_moe="Cohere2MoeAttention",
        cohere_compass_text="CohereCompassAttention",
        cwm="CwmAttention",
        dory="DoryAttention",
        dots1="Dots1Attention",
        ernie4_5="Ernie4_5Attention",
        ernie4_5_moe="Ernie4_5_MoeAttention",
        exaone4="Exaone4Attention",
        exaone_moe="ExaoneMoeAttention",
        flex_olmo="FlexOlmoAttention",
        gemma="GemmaAttention",
        gemma2="Gemma2Attention",
        gemma3_text="Gemma3Attention",
        gemma3n_text="Gemma3nTextAttention",
        gemma4_text="Gemma4TextAttention",
        gemma4_unified_text="Gemma4UnifiedTextAttention",
        glm="GlmAttention",
        glm4="Glm4Attention",
        glm4_moe="Glm4MoeAttention",
        granite="GraniteAttention",
        granitemoe="GraniteMoeAttention",
        granitemoehybrid="GraniteMoeHybridAttention",
        granitemoeshared="GraniteMoeSharedAttention",
        helium="HeliumAttention",
        hunyuan_v1_dense="HunYuanDenseV1Attention",
        hunyuan_v1_moe="HunYuanMoEV1Attention",
        hy_v3="HYV3Attention",
        hyperclovax="HyperCLOVAXAttention",
        jais2="Jais2Attention",
        jamba="JambaAttention",
        kolibri1="Kolibri1Attention",
        laguna="LagunaAttention",
        lara_mini="LaraMiniAttention",
        lfm3="Lfm3Attention",
        llama="LlamaAttention",
        llama4_text="Llama4TextAttention",
        mellum="MellumAttention",
        minimax="MiniMaxAttention",
        minimax_m2="MiniMaxM2Attention",
        minimax_m3_vl_text="MiniMaxM3VLAttention",
        ministral="MinistralAttention",
        ministral3="Ministral3Attention",
        mistral="MistralAttention",
        mixtral="MixtralAttention",
        moshi="MoshiAttention",
        nanochat="NanoChatAttention",
        nemotron="NemotronAttention",
        nemotron_h="NemotronHAttention",
        olmo="OlmoAttention",
        olmo2="Olmo2Attention",
        olmo3="Olmo3Attention",
        olmo_hybrid="OlmoHybridAttention",
        olmoe="OlmoeAttention",
        phimoe="PhimoeAttention",
        qwen2="Qwen2Attention",
        qwen2_5_vl_text="Qwen2_5_VLAttention",
        qwen2_moe="Qwen2MoeAttention",
        qwen2_vl_text="Qwen2VLAttention",
        qwen3="Qwen3Attention",
        qwen3_moe="Qwen3MoeAttention",
        qwen3_vl_text="Qwen3VLTextAttention",
        qwen3_vl_moe_text="Qwen3VLMoeTextAttention",
        seed_oss="SeedOssAttention",
        smollm3="SmolLM3Attention",
        solar_open="SolarOpenAttention",
        stablelm="StableLmAttention",
        starcoder2="Starcoder2Attention",
        vaultgemma="VaultGemmaAttention",
    ),
    # with a learned logit that takes mass away from all keys
    "flint": Family("FlintAttention", lacks=_SINKS),
    "gpt_oss": Family("GptOssAttention", lacks=_SINKS),
    "granite_swa": Family("GraniteSWAAttention", lacks=_SINKS),
    "granitemoe_swa": Family("GraniteMoeSWAAttention", lacks=_SINKS),
    "mimo_v2_flash": Family("MiMoV2FlashAttention", lacks=_SINKS),
    # projections by other names
    "biogpt": _bart("BioGptAttention"),
    "ctrl": Family("MultiHeadAttention", q="Wq", k="Wk", v="Wv", o="dense"),
    "gptj": _bart("GPTJAttention"),
    "lfm2": _bart("Lfm2Attention"),
    "lfm2_moe": _bart("Lfm2MoeAttention"),
    "modernbert-decoder": Family("ModernBertDecoderAttention", o="Wo"),
    "opt": _bart("OPTAttention"),
    "phi": Family("PhiAttention", o="dense"),
    # one projection for all
    "codegen": Family.fused("CodeGenAttention", "qkv_proj", _of_shard(0), _of_shard(2), o="out_proj"),
    "dbrx": Family.fused("DbrxAttention", "Wqkv", _grouped_queries, _grouped_keys, o="out_proj"),
    "gpt2": Family.fused("GPT2Attention", "c_attn", _part(0, 3), _part(1, 3), o="c_proj"),
    "gpt_bigcode": Family.fused("GPTBigCodeAttention", "c_attn", _starcoder_queries, _starcoder_keys, o="c_proj"),
    "gpt_neox": _neox("GPTNeoXAttention"),
    "persimmon": _neox("PersimmonAttention"),
    "phi3": Family.fused("Phi3Attention", "qkv_proj", _grouped_queries, _grouped_keys),
    "phi4_multimodal": Family.fused("Phi4MultimodalAttention", "qkv_proj", _grouped_queries, _grouped_keys),
    # not through the interface
    "falcon": replace(
        Family.fused("FalconAttention", "query_key_value", falcon.queries, falcon.keys, o="dense"),
        forward=falcon.forward,
    ),
    # a gate beside each head's queries
    "qwen3_5_moe_text": Family("Qwen3_5MoeAttention", raw_q=_part_per_head(0, 2)),
    "qwen3_5_text": Family("Qwen3_5Attention", raw_q=_part_per_head(0, 2)),
    "qwen3_next": Family("Qwen3NextAttention", raw_q=_part_per_head(0, 2)),
    # multi-head latent attention
    "axk1": Family.latent("AXK1Attention"),
    "bailing_hybrid": Family.latent("BailingHybridAttention", q="q_proj"),
    "deepseek_v2": Family.latent("DeepseekV2Attention"),
    "deepseek_v3": Family.latent("DeepseekV3Attention"),
    "glm4_moe_lite": Family.latent("Glm4MoeLiteAttention"),
    "kimi_linear": Family.latent("KimiLinearAttention", q="q_proj"),
    "longcat_flash": Family.latent("LongcatFlashMLA"),
    "minicpm3": Family.latent("MiniCPM3Attention"),
    "youtu": Family.latent("YoutuAttention"),
    # encoders that can be decoders
    "bert": _bert("BertSelfAttention"),
    "bert-generation": _bert("BertGenerationSelfAttention"),
    "camembert": _bert("CamembertSelfAttention"),
    "data2vec-text": _bert("Data2VecTextSelfAttention"),
    "electra": _bert("ElectraSelfAttention"),
    "ernie": _bert("ErnieSelfAttention"),
    "roberta": _bert("RobertaSelfAttention"),
    "roberta-prelayernorm": _bert("RobertaPreLayerNormSelfAttention"),
    "xlm-roberta": _bert("XLMRobertaSelfAttention"),
    "xlm-roberta-xl": _bert("XLMRobertaXLSelfAttention"),
    "xmod": _bert("XmodSelfAttention"),
    # encoders alone
    "clip": _CLIP,
    "clip_text_model": _CLIP,
    "clip_vision_model": _CLIP,
    "dinov2": Family("Dinov2Attention"),
    "distilbert": Family("DistilBertSelfAttention", q="q_lin", k="k_lin", v="v_lin", o="out_lin"),
    "modernbert": Family.fused("ModernBertAttention", "Wqkv", _part(0, 3), _part(1, 3), o="Wo"),
    "siglip": _SIGLIP,
    "siglip_text_model": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "vit": Family("ViTAttention"),
    # decoders of encoder-decoders, and their encoders
    "bart": _bart("BartAttention"),
    "blenderbot": _bart("BlenderbotAttention"),
    "blenderbot-small": _bart("BlenderbotSmallAttention"),
    "marian": _bart("MarianAttention"),
    "mbart": _bart("MBartAttention"),
    "pegasus": _bart("PegasusAttention"),
    "plbart": _bart("PLBartAttention"),
    "whisper": _bart("WhisperAttention"),
}
"""Families that are converted and tested, by `config.model_type`."""

WRAPPERS: tuple[str, ...] = (
    "fuyu", "gemma3", "gemma4", "got_ocr2", "llama4", "llava", "llava_next", "mistral3",
    "moss_transcribe_diarize", "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_5_moe", "qwen3_vl",
    "qwen3_vl_moe", "gemma3n", "minimax_m3_vl", "internvl",
)  # fmt: skip
"""Multimodal models, of which the text model is converted when its type is one of `FAMILIES`."""

ALIBI = "all it knows of positions is a bias on softmax scores (ALiBi), which mixers do not have"
_INDEXER = "an indexer chooses the keys of each query, and keeps keys of its own in the cache"
_BIAS = "its scores have a learned term for the distance of query and key"
_SHARED = "its layers are run several times in one forward"
_UNSAVED = "its class belongs to the config of another family, so that a saved conversion could not be loaded"
REFUSED: dict[str, str] = {
    "axk2": _INDEXER,
    "bigbird_pegasus": "its attention does not say that it is causal",
    "bloom": ALIBI,
    "blt": "its layers attend to bytes and to patches of bytes",
    "deberta": _BIAS,
    "deberta-v2": _BIAS,
    "deepseek_v32": _INDEXER,
    "deepseek_v4": _INDEXER,
    "diffllama": "it runs attention twice over the same queries and keys, to subtract one from the other",
    "doge": "its mask depends on the values",
    "dots3_note": _INDEXER,
    "dots3_note_text": _INDEXER,
    "emu3": _UNSAVED,
    "emu3_text_model": _UNSAVED,
    "exaone": _UNSAVED,
    "falcon_h1": "attention and a state-space model share one layer of the cache",
    "gemma4_assistant": "it attends to keys and values of another model",
    "gemma4_unified_assistant": "it attends to keys and values of another model",
    "gemma4_unified": "its masks let tokens of one image see each other",
    "glm_moe_dsa": _INDEXER,
    "hrm_text": _SHARED,
    "hy_v4": _INDEXER,
    "inkling2_loop_text": _BIAS,
    "inkling2_text": _BIAS,
    "inkling_text": _BIAS,
    "internlm3": _UNSAVED,
    "iquestcoder": _UNSAVED,
    "jetmoe": "its queries come from experts",
    "mpt": ALIBI,
    "mt5": _BIAS,
    "paligemma": "its prefix is attended to in both directions",
    "qwen4_exp": _INDEXER,
    "qwen4_exp_text": _INDEXER,
    "longt5": _BIAS,
    "mllama": "some of its layers attend to images alone",
    "mllama_text_model": "some of its layers attend to images alone",
    "recurrent_gemma": "it keeps its past in its modules instead of a cache",
    "roc_bert": "its decoder makes encoder-decoder caches",
    "sarvam_mla": _UNSAVED,
    "sarvam_moe": _UNSAVED,
    "t5": _BIAS,
    "udop": _BIAS,
    "umt5": _BIAS,
    "zamba": _SHARED,
    "zamba2": _SHARED,
    "zaya": "its keys and values come from a convolution that shares their layer of the cache",
}
"""Why families that go through the interface are refused, by `config.model_type`."""
