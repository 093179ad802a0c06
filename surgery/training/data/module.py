"""`HealingData`: files in, batches out, as a LightningDataModule."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from ...errors import SurgeryError
from .corpus import Corpus, OnError, open_corpora
from .loader import HealingLoader
from .order import ChosenDomains, Draws, MixedRows, Order, ShuffledRows
from .rows import Packing, Rows, ranges_of, some, split


class HealingData(LightningDataModule):
    """Rows of tokens to heal a model on, and others to validate on, cut from files and data sets.

    A fit that was interrupted anywhere goes on behind the last batch that was trained on, on any number of processes,
    also with workers: no row is lost or repeated. (The trainer counts an epoch's batches once. So that later epochs
    have their full length after going on with other processes or batches: `reload_dataloaders_every_n_epochs=1`.) See
    `Rows` for what a batch holds, `HealingLoader` for its order, and `open_corpora` for the cache of tokens.

    data: files and data sets (`FileSource`, `HubSource`), or corpora that were opened before. validation: likewise;
        without, a hundredth of the data is held out, at most 64 rows, which is also the most that is used of these.
    tokenizer, vocab_size, column, eos, on_error, cache: see `open_corpora`.
    sequence_length: tokens of a row. batch_size: rows of a batch of one process. packing: "documents", within which
        attention stays, or "stream".
    by_domain: cut rows within domains, so that they can be drawn by domain. domains: which are drawn, see `Draws`; or a
        function from the number of a batch to the domain of all its rows. None: every row once an epoch, shuffled. May
        be set until the dataloader is made, as its probabilities may need `sizes`.
    count: batches of a pass, in place of an epoch. num_workers: of each process.
    progress: draw a bar while text becomes tokens. report: see `open_corpora`.

    Raises:
        SurgeryError: what is wrong with the data, once it is read.

    Example::

        data = HealingData(["wiki.jsonl.gz", "hf:org/name:train"], tokenizer, sequence_length=1024, batch_size=8)
        # in training_step: self.model(**model_inputs(batch)).loss
        lightning.Trainer(max_epochs=1).fit(module, datamodule=data)
    """

    def __init__(
        self,
        data: Sequence[str | os.PathLike[str] | Corpus],
        tokenizer: Any = None,
        *,
        sequence_length: int,
        batch_size: int = 1,
        packing: Packing = "documents",
        validation: Sequence[str | os.PathLike[str] | Corpus] = (),
        vocab_size: int | None = None,
        column: str = "text",
        eos: int | None = None,
        on_error: OnError = "raise",
        cache: str | os.PathLike[str] | None = None,
        by_domain: bool = False,
        domains: Draws | Callable[[int], int] | None = None,
        seed: int = 0,
        count: int | None = None,
        num_workers: int = 0,
        progress: bool = True,
        report: Callable[[str], Any] = warnings.warn,
    ) -> None:
        super().__init__()
        if packing not in ("documents", "stream"):
            raise SurgeryError(f"unknown packing {packing!r}: choose documents or stream")
        self.data, self.validation, self.tokenizer = list(data), list(validation), tokenizer
        self.sequence_length, self.batch_size, self.packing = sequence_length, batch_size, packing
        self.by_domain, self.domains, self.seed, self.count = by_domain, domains, seed, count
        self.num_workers = num_workers
        self._opening: dict[str, Any] = {
            "vocab_size": vocab_size, "column": column, "eos": eos, "on_error": on_error, "cache": cache,
            "progress": progress, "report": report,
        }  # fmt: skip
        self.train: Dataset | None = None
        self.held: Dataset | None = None
        self._loader: HealingLoader | None = None
        self._state: dict[str, Any] | None = None

    def prepare_data(self) -> None:
        """Tokenise, in one process of each machine, so that the others find it done."""
        for sources in filter(None, (self.data, self.validation)):
            open_corpora(sources, self.tokenizer, **{**self._opening, "report": lambda line: None})

    def setup(self, stage: str | None = None) -> None:
        if self.train is not None:
            return
        rows = self._rows(self.data, self.by_domain)
        self.train, self.held = (rows, some(self._rows(self.validation))) if self.validation else split(rows)

    @property
    def rows(self) -> int:
        """To train on."""
        self.setup()
        return len(self.train)  # type: ignore[arg-type]

    @property
    def sizes(self) -> list[int]:
        """Rows to train on, of each domain."""
        self.setup()
        return [len(own) for own in ranges_of(self.train)]  # type: ignore[arg-type]

    def train_dataloader(self) -> HealingLoader:
        """Of the trainer's process; alone, without one. Goes on where the one before, or a checkpoint, got to."""
        self.setup()
        trainer: Any = self.trainer
        state = self._state or (None if self._loader is None else self._loader.state_dict())
        rank, world = (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
        self._loader = HealingLoader(
            self.train,  # type: ignore[arg-type]
            self._order(self.batch_size * world),
            self.batch_size,
            count=self.count,
            rank=rank,
            world=world,
            num_workers=self.num_workers,
            pin_memory=trainer is not None and trainer.strategy.root_device.type == "cuda",
            unfinished=self._unfinished,
        )
        if state is not None:
            self._loader.load_state_dict(state)
        self._state = None
        return self._loader

    def val_dataloader(self) -> DataLoader:
        self.setup()
        # with a generator, lest it takes from the random numbers of the training
        how: dict[str, Any] = {"num_workers": self.num_workers, "generator": torch.Generator()}
        return DataLoader(self.held, self.batch_size, **how)  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Any]:
        # lightning keeps the loader's state as well, but forgets it at the end of an epoch
        return {} if self._loader is None else self._loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict

    def _rows(self, sources: Sequence[str | os.PathLike[str] | Corpus], by_domain: bool = False) -> Rows:
        corpora = open_corpora(sources, self.tokenizer, **self._opening)
        return Rows(corpora, self.sequence_length, self.packing, by_domain=by_domain)

    def _order(self, rows_per_batch: int) -> Order:
        if self.domains is None:
            return ShuffledRows(self.rows, self.seed)
        if not self.by_domain:
            raise SurgeryError(
                "rows are drawn by domain only if they are cut by domain: give HealingData by_domain=True"
            )
        ranges, draws = ranges_of(self.train), self.domains  # type: ignore[arg-type]
        if callable(draws):
            draws = ChosenDomains(draws, len(ranges), rows_per_batch)
        return MixedRows(ranges, draws, self.seed)

    def _unfinished(self) -> bool:
        """Whether the trainer has a batch that it did not come to the end of, as after an exception."""
        if self.trainer is None:
            return False
        progress = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return progress.ready > progress.processed
