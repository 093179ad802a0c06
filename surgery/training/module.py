"""The LightningModule of `surgery convert`: one stage of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from transformers import PreTrainedModel

from ..callbacks import AttentionTransfer
from ..sharding import shard
from .data.rows import model_inputs
from .delta import learned
from .distillation import distillation_loss
from .head import head_of, teach
from .losses import cross_entropy
from .rates import rate_factor
from .stages import BanditMixing, LoRA, Plateau, TrainingStage


class HealingModule(LightningModule):
    """Trains what the stage's callbacks left trainable, on batches of `HealingData`.

    steps: optimizer steps of the whole stage. transfer: the callback that computes the loss in an attention-transfer
    stage. shards: share the model out over the devices of lightning's ModelParallelStrategy.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        stage: TrainingStage,
        *,
        steps: int,
        transfer: AttentionTransfer | None = None,
        shards: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.stage, self.steps, self.transfer = model, stage, steps, transfer
        self.shards = shards
        # checkpoints hold what learns; the rest is loaded from where the model came from
        self.strict_loading = False
        self.plateau: ReduceLROnPlateau | None = None
        self.learning = 0
        self._resumed: dict[str, Any] | None = None

    def configure_model(self) -> None:
        if self.shards:
            assert self.device_mesh is not None
            shard(self.model, self.device_mesh["data_parallel"])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor | dict[str, Tensor]:
        if self.transfer is not None:
            return self._run(batch)
        asked = isinstance(self.stage.mixing, BanditMixing)
        result = self._losses_by_domain(batch) if asked else {"loss": self._language_loss(batch)}
        self.log("loss", result["loss"].detach(), prog_bar=True)
        return result if asked else result["loss"]

    def _run(self, batch: dict[str, Tensor]) -> Tensor:
        """The layers alone: in transfer mode nobody looks at the logits."""
        hidden = self.model.base_model(**model_inputs(batch, labels=False)).last_hidden_state
        return hidden.new_zeros(())

    def _language_loss(self, batch: dict[str, Tensor]) -> Tensor:
        return self._losses(batch)(...)

    def _losses_by_domain(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss, in which rows weigh alike, and as `domain_losses` [B] that of each row's domain."""
        domains, losses = batch["domains"], self._losses(batch)
        each = torch.zeros(len(domains), device=domains.device)
        total = each.sum()
        for domain in domains.unique().tolist():
            own = domains == domain
            loss = losses(own)
            total = total + loss * own.float().mean()
            each[own] = loss.detach().float()
        return {"loss": total, "domains": domains, "domain_losses": each}

    def _losses(self, batch: dict[str, Tensor]) -> Callable[[Any], Tensor]:
        """Run the batch; returns what makes the loss of some of its rows, or with `...` of all."""
        assert isinstance(self.stage, LoRA)
        weights, inputs, labels = self.stage.loss, model_inputs(batch, labels=False), batch["labels"]
        if not weights.kl:
            logits = self.model(**inputs).logits
            return lambda rows: weights.cross_entropy * cross_entropy(logits[rows], labels[rows])
        decoder: Any = self.model.get_decoder()
        hidden, head = decoder(**inputs)[0], head_of(self.model)
        teacher, teacher_head = teach(self.model, (), inputs)
        how: dict[str, Any] = weights.model_dump(include={"divergence", "temperature", "top_k"})

        def loss(rows: Any) -> Tensor:
            found = weights.kl * distillation_loss(hidden[rows], teacher[rows], head, teacher_head, **how)
            if weights.cross_entropy:
                found = found + weights.cross_entropy * cross_entropy(head(hidden[rows]), labels[rows])
            return found

        return loss

    def validation_loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The transfer loss, or nats per token."""
        if self.transfer is not None:
            return self.transfer.transfer(self, lambda: self._run(batch))[1]
        return self.nll(batch)

    def nll(self, batch: dict[str, Tensor]) -> Tensor:
        """Nats per token of the converted model, whatever the stage trains."""
        return cross_entropy(self.model(**model_inputs(batch, labels=False)).logits, batch["labels"])

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
        return lambda step: rate_factor(schedule, rate, step, self.steps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {f"model.{name}": tensor for name, tensor in learned(self.model).items()}
        checkpoint["plateau"] = None if self.plateau is None else self.plateau.state_dict()
        own = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if self._on_gpu else None}
        everyone: list[Any] = [own]
        if self.trainer.world_size > 1:
            everyone = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(everyone, own)
        checkpoint["random"] = everyone

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._resumed = {"random": checkpoint["random"], "plateau": checkpoint["plateau"]}

    def on_train_start(self) -> None:
        rank, resumed = self.trainer.global_rank, self._resumed
        if resumed is None or rank >= len(resumed["random"]):
            if rank:  # other dropout in every process
                torch.manual_seed(torch.initial_seed() + rank)
        else:
            own = resumed["random"][rank]
            torch.set_rng_state(own["cpu"])
            if self._on_gpu and own["cuda"] is not None:
                torch.cuda.set_rng_state(own["cuda"])
        if resumed is not None and self.plateau is not None and resumed["plateau"] is not None:
            self.plateau.load_state_dict(resumed["plateau"])
        self._resumed = None

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"
