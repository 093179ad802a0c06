"""The text of a run as rows of tokens, and what reads it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from ..errors import loading
from .data.corpus import open_corpora
from .data.module import HealingData
from .stages import StageConfig

if TYPE_CHECKING:
    from .convert import Options

Say = Callable[[str], None]


class StageData:
    """The text as rows of tokens, for every stage at its own length."""

    def __init__(
        self,
        data: Sequence[str | Path],
        held: Sequence[str | Path],
        tokenizer: Any,
        config: PreTrainedConfig,
        options: Options,
        say: Say,
    ) -> None:
        config = config.get_text_config()
        eos = config.eos_token_id if tokenizer is None and isinstance(config.eos_token_id, int) else None
        how: dict[str, Any] = {"vocab_size": config.vocab_size, "column": options.column, "eos": eos, "report": say}
        how |= {"on_error": options.on_error, "progress": options.progress}
        self.corpora = open_corpora(data, tokenizer, **how)
        self.held = open_corpora(held, tokenizer, **how) if held else []
        self.seed = options.seed

    def at(self, stage: StageConfig) -> HealingData:
        return HealingData(
            self.corpora,
            validation=self.held,
            sequence_length=stage.sequence_length,
            batch_size=stage.batch_size,
            packing=stage.packing,
            by_domain=stage.mixing is not None,
            seed=self.seed + stage.seed,
        )


def config_of(model: str) -> PreTrainedConfig:
    with loading("model", model):
        return AutoConfig.from_pretrained(model)


def tokenizer_of(model: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError):
        return None  # pre-tokenised data needs none
