"""Move the probabilities of domains while the model trains, by a schedule of the temperature or by a bandit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import SurgeryError
from ..training.bandits import BanditMix
from ..training.mixing import Cooldown, SharedProbabilities, TemperatureMix
from ..training.stages import BanditMixing, Mixing
from .base import HealingCallback

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class DomainMixing(HealingCallback):
    """Sets `shared`, the probabilities by which `DomainSampler`s draw, in worker processes too, after optimizer steps.

    mix: a `TemperatureMix`, which `cooldown` cools, or a `BanditMix`, which every `every` steps hears the mean losses.
    For the bandit, the batch or what `training_step` returns holds `domains`: one index for the whole batch, whose loss
    is the step's; or one a row, when the step also returns `domain_losses`, one a row.
    delay: steps from a decision until it takes effect. 0: at once, also in the middle of what the workers have ahead;
    as many as they are ahead, and a resumed run draws the same rows.
    monitor: the validation loss of the smallest domain, for `Cooldown(at="plateau")`; read whenever the trainer has
    validated. A loop of your own calls `validated`. start, stop: see `HealingCallback`.
    Logs `domain_0`, `domain_1` …, the probabilities, when they change.

    Example::

        mixing = DomainMixing(TemperatureMix([9_000_000, 100_000]), cooldown=Cooldown(at=0.5))
        sampler = DomainSampler(mixing.shared, per_step=32)  # for your dataset
        trainer = Trainer(callbacks=[mixing])
    """

    needs_conversion = False

    def __init__(
        self,
        mix: TemperatureMix | BanditMix,
        *,
        cooldown: Cooldown | None = None,
        every: int = 10,
        delay: int = 0,
        monitor: str = "val_loss",
        start: int = 0,
        stop: int | None = None,
    ) -> None:
        super().__init__(start, stop)
        if every < 1 or delay < 0 or (isinstance(mix, BanditMix) and delay > every):
            raise SurgeryError(
                f"DomainMixing(every={every}, delay={delay}): a bandit needs 0 <= delay <= every, every >= 1"
            )
        if isinstance(mix, BanditMix) and cooldown is not None:
            raise SurgeryError(
                "a bandit has no temperature to cool: give DomainMixing a TemperatureMix, or no cooldown"
            )
        if isinstance(mix, TemperatureMix) and cooldown is not None:
            mix.tau = cooldown.tau(0, 1)
        self.mix, self.cooldown, self.every, self.delay, self.monitor = mix, cooldown, every, delay, monitor
        self.shared = SharedProbabilities(mix.probabilities)
        self._sums = torch.zeros(2, mix.domains, dtype=torch.float64)  # losses and draws since the last decision
        self._step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.world_size > 1:
            self.shared.part()  # each process tells its own workers

    def validated(self, loss: float) -> None:
        """Tell a validation loss to a cooldown on a plateau."""
        if self.cooldown is not None:
            self.cooldown.validated(loss)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or self.cooldown is None or self.cooldown.at != "plateau":
            return
        if self.monitor not in trainer.callback_metrics:
            raise SurgeryError(
                f"the cooldown waits for a plateau of {self.monitor!r}, which validation does not log: it logs "
                f"{', '.join(trainer.callback_metrics) or 'nothing'}; name one as monitor"
            )
        self.validated(float(trainer.callback_metrics[self.monitor]))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if isinstance(self.mix, BanditMix) and self.active(self._step) and outputs:
            self._collect(outputs, batch, trainer.accumulate_grad_batches)
        if trainer.global_step == self._step:
            return  # still accumulating
        self._step = trainer.global_step
        if self.active(self._step) and self._decide(trainer, pl_module, self._step):
            self.shared.publish(self.mix.probabilities, self._step + self.delay)
            for domain, probability in enumerate(self.mix.probabilities.tolist()):
                pl_module.log(f"domain_{domain}", probability)

    def state_dict(self) -> dict[str, Any]:
        cooldown = None if self.cooldown is None else self.cooldown.state_dict()
        return {
            "mix": self.mix.state_dict(),
            "cooldown": cooldown,
            "shared": self.shared.state_dict(),
            "sums": self._sums.cpu(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.mix.load_state_dict(state_dict["mix"])
        if self.cooldown is not None and state_dict["cooldown"] is not None:
            self.cooldown.load_state_dict(state_dict["cooldown"])
        self.shared.load_state_dict(state_dict["shared"])
        self._sums = state_dict["sums"].clone()

    def _decide(self, trainer: Trainer, pl_module: LightningModule, step: int) -> bool:
        """Whether the probabilities of the steps from `step` on are others."""
        step -= self.start
        if isinstance(self.mix, TemperatureMix):
            if self.cooldown is None:
                return False
            last = int(trainer.estimated_stepping_batches) if self.stop is None else self.stop
            before, self.mix.tau = self.mix.tau, self.cooldown.tau(step, last - self.start)
            return self.mix.tau != before
        if step % self.every:
            return False
        # every process learns from the losses of all, so that all draw by the same probabilities
        sums = trainer.strategy.reduce(self._sums.to(pl_module.device), reduce_op="sum")
        losses, draws = sums.cpu().numpy()
        self.mix.observe(losses / draws.clip(min=1), draws)
        self._sums.zero_()
        return True

    def _collect(self, outputs: Any, batch: Any, accumulated: int) -> None:
        """Add up the losses and the draws of one batch, without waiting for the device."""
        domains, losses = _drawn(outputs, batch, accumulated)
        self._sums = self._sums.to(losses.device)
        domains = domains.reshape(-1).to(losses.device)
        self._sums[0].index_add_(0, domains, losses.detach().reshape(-1).double())
        self._sums[1].index_add_(0, domains, torch.ones_like(domains, dtype=torch.float64))


def _drawn(outputs: Any, batch: Any, accumulated: int) -> tuple[Tensor, Tensor]:
    """Domains and losses of a batch: [n], twice."""
    own: Mapping[str, Any] = outputs if isinstance(outputs, Mapping) else {"loss": outputs}
    domains = own.get("domains", batch.get("domains") if isinstance(batch, Mapping) else None)
    if domains is None:
        raise SurgeryError(
            "DomainMixing asks a bandit, which must know whose losses it sees: let the batch, or what training_step "
            "returns, hold `domains`"
        )
    domains = torch.as_tensor(domains)
    # lightning has divided the loss by the number of accumulated batches
    losses = own["domain_losses"] if "domain_losses" in own else own["loss"] * accumulated
    if domains.numel() != losses.numel():
        raise SurgeryError(
            f"a batch of {domains.numel()} domains has {losses.numel()} losses: return `domain_losses`, one a row, "
            "from training_step, or make each batch of one domain"
        )
    return domains, losses


def domain_mixing(config: Mixing, sizes: Sequence[float], start: int = 0, stop: int | None = None) -> DomainMixing:
    """What a recipe says about mixing, for domains of these sizes."""
    if isinstance(config, BanditMixing):
        bandit = BanditMix(len(sizes), config.policy, eta=config.eta, floor=config.floor, scale=config.scale)
        # trainers take a batch before they are done with the one before
        return DomainMixing(bandit, every=config.every, delay=1, start=start, stop=stop)
    mix = TemperatureMix(sizes, config.tau)
    if config.end is None:
        return DomainMixing(mix, start=start, stop=stop)
    cooldown = Cooldown(config.tau, config.end, config.at, config.patience)
    return DomainMixing(mix, cooldown=cooldown, start=start, stop=stop)
