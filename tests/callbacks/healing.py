"""User-written modules, fits of them, and the loop that anyone would write by hand instead."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import lightning
import torch
import zoo
from torch import Tensor, nn
from torch.utils.data import DataLoader

LENGTH = 20


class Module(lightning.LightningModule):
    """A user's own: a training step and an optimizer, nothing of ours."""

    adam = True

    def __init__(self, model: nn.Module, as_dict: bool = False, lr: float = 1e-2) -> None:
        super().__init__()
        self.net, self.as_dict, self.lr = model, as_dict, lr

    def training_step(self, batch: Tensor, index: int):
        loss = self.net(input_ids=batch, labels=batch).loss
        return {"loss": loss, "more": 1} if self.as_dict else loss

    def configure_optimizers(self):
        if self.adam:
            return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.0)
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Plain(Module):
    """With SGD, under which rounding stays small: AdamW moves what has hardly any gradient by as much as others."""

    adam = False


def model(family: str = "llama", recipe: str = "llama/logmass", **changes) -> nn.Module:
    return zoo.convert(zoo.build(family, **changes), recipe, window=4).train()


def rows(count: int, batch: int = 2) -> list[Tensor]:
    return [zoo.tokens(batch, LENGTH, seed=i) for i in range(count)]


def trainer(callbacks: list, steps: int, **kwargs) -> lightning.Trainer:
    settings = dict(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    return lightning.Trainer(max_steps=steps, callbacks=callbacks, **{**settings, **kwargs})


def fit(module: nn.Module, callbacks: list, batches: list, steps: int | None = None, **kwargs) -> lightning.Trainer:
    used = trainer(callbacks, len(batches) if steps is None else steps, **kwargs)
    used.fit(module, DataLoader(batches, batch_size=None))
    return used


def by_hand(
    network: nn.Module,
    batches: list[Tensor],
    loss: Callable[[int, Tensor], Tensor],
    learning: Callable[[int], Iterable[nn.Parameter]] | None = None,
    lr: float = 1e-2,
) -> None:
    """Step after step: what learns, its loss, backward, SGD with momentum, as `Plain` has it."""
    named = dict(network.named_parameters())
    optimizer = torch.optim.SGD(named.values(), lr=lr, momentum=0.9)
    for step, batch in enumerate(batches):
        chosen = {id(p) for p in (named.values() if learning is None else learning(step))}
        for parameter in named.values():
            parameter.requires_grad_(id(parameter) in chosen)
        optimizer.zero_grad()
        loss(step, batch).backward()
        optimizer.step()


def parameters(network: nn.Module, *parts: str) -> list[nn.Parameter]:
    """Those with one of these in their names."""
    return [p for name, p in network.named_parameters() if any(part in name for part in parts)]


def same(found: nn.Module, expected: nn.Module, tolerance: float = 1e-6) -> bool:
    found, expected = found.state_dict(), expected.state_dict()
    return found.keys() == expected.keys() and all((found[k] - expected[k]).abs().max() <= tolerance for k in expected)
