"""The LightningModule of `surgery convert`: one stage of a recipe."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from transformers import PreTrainedModel

from ..callbacks import AttentionTransfer
from ..callbacks.schedules import between
from ..operate import mode
from .batches import Batches
from .delta import learned
from .losses import cross_entropy, kl_divergence
from .stages import Constant, LoRA, Plateau, StageConfig


class HealingModule(LightningModule):
    """Trains what the stage's callbacks left trainable, on rows of tokens.

    rows: [N, T] int64. steps: optimizer steps of the whole stage; start: those already taken by an earlier process.
    transfer: the callback that computes the loss in an attention-transfer stage.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        stage: StageConfig,
        rows: Tensor,
        *,
        steps: int,
        start: int = 0,
        seed: int = 0,
        transfer: AttentionTransfer | None = None,
    ) -> None:
        super().__init__()
        self.model, self.stage, self.rows = model, stage, rows
        self.steps, self.start, self.seed, self.transfer = steps, start, seed, transfer
        # checkpoints hold what learns; the rest is loaded from where the model came from
        self.strict_loading = False
        self.plateau: ReduceLROnPlateau | None = None
        self.learning = 0
        self._random: dict[str, Any] | None = None

    def train_dataloader(self) -> Batches:
        stage, trainer = self.stage, self.trainer
        return Batches(
            self.rows,
            stage.batch_size,
            self.steps * stage.accumulate,
            start=self.start * stage.accumulate,
            seed=self.seed + stage.seed,
            rank=trainer.global_rank,
            world=trainer.world_size,
        )

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.transfer is not None:
            return self._run(batch)
        loss = self._language_loss(batch)
        self.log("loss", loss.detach(), prog_bar=True)
        return loss

    def _run(self, tokens: Tensor) -> Tensor:
        """The layers alone: in transfer mode nobody looks at the logits."""
        hidden = self.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        return hidden.new_zeros(())

    def _language_loss(self, tokens: Tensor) -> Tensor:
        assert isinstance(self.stage, LoRA)
        weights = self.stage.loss
        logits = self.model(input_ids=tokens, use_cache=False).logits
        loss = logits.new_zeros((), dtype=torch.float32)
        if weights.cross_entropy:
            loss = loss + weights.cross_entropy * cross_entropy(logits, tokens)
        if weights.kl:
            with torch.no_grad(), mode(self.model, "teacher"):
                teacher = self.model(input_ids=tokens, use_cache=False).logits
            loss = loss + weights.kl * kl_divergence(logits, teacher)
        return loss

    def validation_loss(self, tokens: Tensor) -> Tensor:
        """The transfer loss, or nats per token."""
        if self.transfer is not None:
            return self.transfer.transfer(self, lambda: self._run(tokens))[1]
        return cross_entropy(self.model(input_ids=tokens, use_cache=False).logits, tokens)

    def configure_optimizers(self) -> Any:
        stage = self.stage
        own_rate = stage.mixer_lr if isinstance(stage, LoRA) else None
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        self.learning = sum(p.numel() for _, p in named)
        groups: list[dict[str, Any]] = [
            {"params": [p for name, p in named if own_rate is None or ".mixer." not in name]},
            {"params": [p for name, p in named if own_rate is not None and ".mixer." in name], "lr": own_rate},
        ]
        groups = [group for group in groups if group["params"]]
        fused = all(p.device.type == "cuda" for _, p in named)
        optimizer = AdamW(groups, lr=stage.lr, betas=stage.betas, weight_decay=stage.weight_decay, fused=fused)
        if isinstance(stage.schedule, Plateau):
            self.plateau = self._make_plateau(optimizer, stage.schedule)
            return optimizer
        scheduler = LambdaLR(optimizer, [self._factor(group) for group in groups])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @staticmethod
    def _make_plateau(optimizer: Optimizer, schedule: Plateau) -> ReduceLROnPlateau:
        return ReduceLROnPlateau(optimizer, factor=schedule.factor, patience=schedule.patience, min_lr=schedule.min_lr)

    def _factor(self, group: dict[str, Any]) -> Any:
        """Learning rate at a step, as a factor of the group's own."""
        schedule, rate = self.stage.schedule, group.get("lr", self.stage.lr)
        assert not isinstance(schedule, Plateau)

        def factor(step: int) -> float:
            if step < schedule.warmup:
                return (step + 1) / schedule.warmup
            if isinstance(schedule, Constant):
                return 1.0
            progress = (step - schedule.warmup) / max(self.steps - schedule.warmup, 1)
            return between(1.0, min(schedule.min_lr / rate, 1.0), progress, schedule.kind)

        return factor

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {f"model.{name}": tensor for name, tensor in learned(self.model).items()}
        checkpoint["plateau"] = None if self.plateau is None else self.plateau.state_dict()
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        checkpoint["random"] = {"cpu": torch.get_rng_state(), "cuda": cuda}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._random = {**checkpoint["random"], "plateau": checkpoint["plateau"]}

    def on_train_start(self) -> None:
        if self._random is None:
            return
        torch.set_rng_state(self._random["cpu"])
        if self._random["cuda"]:
            torch.cuda.set_rng_state_all(self._random["cuda"])
        if self.plateau is not None and self._random["plateau"] is not None:
            self.plateau.load_state_dict(self._random["plateau"])
        self._random = None
