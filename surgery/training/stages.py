"""What a recipe can say about healing a converted model: its stages, as data. No training library is imported."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)
from typing_extensions import Self

from ..errors import SurgeryError
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


class WindowDropping(Config):
    """Switch the windows of all layers off, at random, with a probability that goes from `begin` to `end` over the
    stage, so that the linear branch learns to do without."""

    begin: float = Field(0.9, ge=0, le=1)
    end: float = Field(0.0, ge=0, le=1)
    shape: Literal["linear", "cosine"] = "linear"


class TemperatureMixing(Config):
    """Draw rows of domains by size^(1/tau), and by size^(1/end) from `at` on (Cooldown).

    at: a fraction of the stage, an optimizer step, or "plateau": once the validation loss of the smallest domain has
    not improved `patience` times. end: null keeps `tau`.
    """

    kind: Literal["temperature"] = "temperature"
    tau: PositiveFloat = 5.0
    end: PositiveFloat | None = 1.0
    at: float | int | Literal["plateau"] = 0.5
    patience: PositiveInt = 3

    @field_validator("at")
    @classmethod
    def _a_moment(cls, at: float | int | str) -> float | int | str:
        if not isinstance(at, str) and (at < 0 or (isinstance(at, float) and at > 1)):
            raise ValueError(f"expected a fraction between 0 and 1, a whole step, or 'plateau', found {at}")
        return at


class BanditMixing(Config):
    """Draw rows of the domains whose loss falls, decided every `every` optimizer steps; in `lora` stages.

    policy, eta, floor, scale: see `surgery.training.bandits.BanditMix`.
    """

    kind: Literal["bandit"] = "bandit"
    policy: Literal["exp3", "logbarrier"] = "logbarrier"
    eta: PositiveFloat | None = None
    floor: Fraction = 0.01
    scale: PositiveFloat = 1.0
    every: PositiveInt = 10


Mixing = Annotated[TemperatureMixing | BanditMixing, Field(discriminator="kind")]


class Stage(Config):
    """What all stages share: how long, on which batches, with which AdamW.

    tokens, epochs: the length of the stage; exactly one of the two.
    batch_size: sequences in one forward pass; `accumulate` such passes make one optimizer step. Several devices share
        them out (`on`), so that a step is the same on any number.
    temperature: cool the feature maps down on the way. window_dropout: leave windows out now and then.
    mixing: how often rows of each domain come; null: as often as they are in the data.
    packing: what a sequence is, "stream" whatever was cut from the text, or "documents" with no attention, window or
    state across their ends.
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
    window_dropout: WindowDropping | None = None
    mixing: Mixing | None = None
    packing: Literal["stream", "documents"] = "stream"

    @model_validator(mode="after")
    def _one_length(self) -> Stage:
        if (self.tokens is None) == (self.epochs is None):
            raise ValueError("a stage needs exactly one of `tokens` and `epochs`, to know when it ends")
        return self

    def on(self, devices: int) -> Self:
        """The stage as each of so many devices runs it: they share out the passes of a step, then the rows of a pass.

        Raises:
            SurgeryError: that leaves some with more than others.
        """
        passes = math.gcd(self.accumulate, devices)
        rows, rest = divmod(self.batch_size, devices // passes)
        if rest or not rows:
            raise SurgeryError(
                f"{devices} devices cannot share out a step of {self.accumulate} passes of {self.batch_size} rows: "
                f"give the stage an accumulate or a batch_size that is a multiple of {devices}"
            )
        return self.model_copy(update={"batch_size": rows, "accumulate": self.accumulate // passes})


class TransferLoss(Config):
    """Weights of the terms between the teacher's and the student's attention; at least one is not zero.

    mse: mean squared error of the outputs, per head, before the output projection; LoLCATs takes 1000. normalized_mse:
    the same divided by the variance of the teacher's output, so that layers weigh alike. cross_entropy: between the
    attention weights. projected_l2: mean distance after the output projection over the root of its width (RADLADS).
    """

    mse: NonNegativeFloat = 0.0
    normalized_mse: NonNegativeFloat = 0.0
    cross_entropy: NonNegativeFloat = 0.0
    projected_l2: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _some_term(self) -> TransferLoss:
        if not any(getattr(self, name) for name in type(self).model_fields):
            names = ", ".join(type(self).model_fields)
            raise ValueError(f"no term has a weight: give at least one of {names}, as in {{mse: 1}}")
        return self


class AttentionTransfer(Stage):
    """Train new parameters to imitate each layer's softmax attention, all layers at once, the rest frozen.

    branch: what imitates it, both branches as the mixer mixes them, or the linear one alone over all keys.
    blockwise: blocks of so many converted layers train one after the other, or on several devices one each, from hidden
    states on disk; null: all layers together. Only schedules that follow a loss know the difference: a block's own.
    """

    kind: Literal["attention_transfer"] = "attention_transfer"
    loss: TransferLoss = TransferLoss(normalized_mse=1.0)
    trains: list[Part] = Field(["mixer"], min_length=1)
    branch: Literal["linear", "both"] = "both"
    blockwise: PositiveInt | None = None

    @model_validator(mode="after")
    def _no_norm_over_blocks(self) -> Self:
        if self.blockwise is not None and self.grad_clip is not None:
            raise ValueError("blockwise trains blocks of layers apart, and grad_clip needs all gradients: take one out")
        return self


class LanguageLoss(Config):
    """Weights of the terms of a language model's loss; at least one is not zero. Both are means per token.

    cross_entropy: of the next token. kl: how far its distribution is from that of the softmax model.
    divergence, temperature, top_k: of the latter, see `surgery.training.distillation.distillation_loss`.
    """

    cross_entropy: NonNegativeFloat = 0.0
    kl: NonNegativeFloat = 0.0
    divergence: Literal["kl", "reverse_kl", "js"] = "kl"
    temperature: PositiveFloat = 1.0
    top_k: PositiveInt | None = None

    @model_validator(mode="after")
    def _some_term(self) -> LanguageLoss:
        if not (self.cross_entropy or self.kl):
            raise ValueError("no term has a weight: give at least one of cross_entropy, kl, as in {cross_entropy: 1}")
        if self.top_k is not None and self.divergence != "kl":
            raise ValueError(
                f"top_k leaves the teacher no weight elsewhere, which {self.divergence} cannot compare with"
            )
        return self


class Adapting(Stage):
    """Train low-rank adapters on the attention projections.

    trains: parts of the mixer that go on learning beside the adapters, with the rate `mixer_lr` (None: `lr`).
    """

    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0
    dropout: Fraction = 0.0
    targets: list[Projection] = Field(["q", "k", "v", "o"], min_length=1)
    trains: list[Part] = []
    mixer_lr: PositiveFloat | None = None


class LoRA(Adapting):
    """Adapters with a language modelling loss."""

    kind: Literal["lora"] = "lora"
    loss: LanguageLoss = LanguageLoss(cross_entropy=1.0)


class DenoisingLoss(Config):
    """Weights of the terms of a denoiser's loss (LinFusion); at least one is not zero.

    task: the module's own, such as the error of the noise. output: mean squared error against the softmax model's
    output. layers: between its attention and ours, layer by layer.
    """

    task: NonNegativeFloat = 1.0
    output: NonNegativeFloat = 0.5
    layers: TransferLoss | None = TransferLoss(mse=0.5)

    @model_validator(mode="after")
    def _some_term(self) -> DenoisingLoss:
        if not (self.task or self.output or self.layers):
            raise ValueError("no term has a weight: give at least one of task, output, layers, as in {task: 1}")
        return self


class Denoising(Adapting):
    """Adapters and mixers of a denoiser of images, in a Trainer of your own. tokens: positions in latents."""

    kind: Literal["denoising"] = "denoising"
    trains: list[Part] = ["mixer"]
    loss: DenoisingLoss = DenoisingLoss()


class Calibrate(Config):
    """Before any training: let mixers set themselves by closed forms on so many tokens (`surgery.calibrate`).

    sequence_length: rows as long as in later use tell gates most. batch_size, seed, packing: as for other stages.
    """

    kind: Literal["calibrate"] = "calibrate"
    tokens: PositiveInt = 4096
    batch_size: PositiveInt = 1
    sequence_length: PositiveInt = 1024
    seed: NonNegativeInt = 0
    packing: Literal["stream", "documents"] = "stream"

    mixing: ClassVar[None] = None


TrainingStage = AttentionTransfer | LoRA | Denoising
StageConfig = Annotated[Calibrate | AttentionTransfer | LoRA | Denoising, Field(discriminator="kind")]
