"""What a recipe can say about healing a converted model: its stages, as data. No training library is imported."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from ..mixers.base import Config

Fraction = Annotated[float, Field(ge=0, lt=1)]

Part = Literal["mixer", "feature_map", "gate", "mix"]
"""A group of new parameters, named as the recipe names that part of the mixer; `mixer` is all of them."""

Projection = Literal["q", "k", "v", "o"]
"""A projection of the attention by its role, whatever the architecture calls it or fuses it with."""


class Constant(Config):
    """Keep the learning rate, after `warmup` optimizer steps of linear increase."""

    kind: Literal["constant"] = "constant"
    warmup: NonNegativeInt = 0


class Linear(Config):
    """Decrease in a straight line from `lr` to `min_lr` at the end of the stage."""

    kind: Literal["linear"] = "linear"
    warmup: NonNegativeInt = 0
    min_lr: NonNegativeFloat = 0.0


class Cosine(Config):
    """Decrease in half a cosine from `lr` to `min_lr` at the end of the stage."""

    kind: Literal["cosine"] = "cosine"
    warmup: NonNegativeInt = 0
    min_lr: NonNegativeFloat = 0.0


class Plateau(Config):
    """Multiply by `factor` once the validation loss, taken every `every` steps, has not improved `patience` times."""

    kind: Literal["plateau"] = "plateau"
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    patience: NonNegativeInt = 10
    min_lr: NonNegativeFloat = 0.0
    every: PositiveInt = 100


Schedule = Annotated[Constant | Linear | Cosine | Plateau, Field(discriminator="kind")]


class Cooldown(Config):
    """Move the feature maps' temperature from `start` to `end` over the stage; then it goes into their weights."""

    start: PositiveFloat = 1.0
    end: PositiveFloat
    shape: Literal["linear", "cosine"] = "linear"


class Stage(Config):
    """What all stages share: how long, on which batches, with which AdamW.

    tokens, epochs: the length of the stage; exactly one of the two.
    batch_size: sequences in one forward pass of one device; `accumulate` such passes make one optimizer step.
    temperature: cool the feature maps down on the way.
    """

    tokens: PositiveInt | None = None
    epochs: PositiveInt | None = None
    batch_size: PositiveInt = 1
    accumulate: PositiveInt = 1
    sequence_length: PositiveInt = 1024
    lr: PositiveFloat
    schedule: Schedule = Constant()
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    weight_decay: NonNegativeFloat = 0.0
    grad_clip: PositiveFloat | None = None
    seed: NonNegativeInt = 0
    temperature: Cooldown | None = None

    @model_validator(mode="after")
    def _one_length(self) -> Stage:
        if (self.tokens is None) == (self.epochs is None):
            raise ValueError("a stage needs exactly one of `tokens` and `epochs`, to know when it ends")
        return self


class TransferLoss(Config):
    """Weights of the terms between the teacher's and the student's attention; at least one is not zero.

    mse: mean squared error of the outputs, per head, before the output projection. normalized_mse: the same divided by
    the variance of the teacher's output, so that layers weigh alike. cross_entropy: between the attention weights.
    """

    mse: NonNegativeFloat = 0.0
    normalized_mse: NonNegativeFloat = 0.0
    cross_entropy: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _some_term(self) -> TransferLoss:
        if not (self.mse or self.normalized_mse or self.cross_entropy):
            raise ValueError(
                "no term has a weight: give at least one of mse, normalized_mse, cross_entropy, as in {mse: 1}"
            )
        return self


class AttentionTransfer(Stage):
    """Train new parameters to imitate each layer's softmax attention, all layers at once, the rest frozen."""

    kind: Literal["attention_transfer"] = "attention_transfer"
    loss: TransferLoss = TransferLoss(normalized_mse=1.0)
    trains: list[Part] = Field(["mixer"], min_length=1)


class LanguageLoss(Config):
    """Weights of the terms of a language model's loss; at least one is not zero.

    cross_entropy: of the next token. kl: KL(teacher ‖ student) of its distribution, where the teacher is the softmax
    model. Both are means per token.
    """

    cross_entropy: NonNegativeFloat = 0.0
    kl: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _some_term(self) -> LanguageLoss:
        if not (self.cross_entropy or self.kl):
            raise ValueError("no term has a weight: give at least one of cross_entropy, kl, as in {cross_entropy: 1}")
        return self


class LoRA(Stage):
    """Train low-rank adapters on the attention projections with a language modelling loss.

    trains: parts of the mixer that go on learning beside the adapters, with the rate `mixer_lr` (None: `lr`).
    """

    kind: Literal["lora"] = "lora"
    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0
    dropout: Fraction = 0.0
    targets: list[Projection] = Field(["q", "k", "v", "o"], min_length=1)
    trains: list[Part] = []
    mixer_lr: PositiveFloat | None = None
    loss: LanguageLoss = LanguageLoss(cross_entropy=1.0)


StageConfig = Annotated[AttentionTransfer | LoRA, Field(discriminator="kind")]
