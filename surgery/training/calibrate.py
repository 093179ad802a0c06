"""The calibration stage of `surgery convert`."""

from __future__ import annotations

import time
from collections.abc import Callable

from transformers import PreTrainedModel

from ..calibration import calibrate
from .data.module import HealingData
from .run import StageResult
from .stages import Calibrate


def calibrated(
    network: PreTrainedModel, stage: Calibrate, data: HealingData, cpu: bool, say: Callable[[str], None]
) -> StageResult:
    """Calibrate the mixers on the data's first rows, on the GPU unless told otherwise; says how close each came."""
    began = time.monotonic()
    data.count = -(-stage.tokens // (stage.batch_size * stage.sequence_length))
    network.to("cpu" if cpu else "cuda")
    found = calibrate(network, data.train_dataloader(), tokens=stage.tokens)
    network.to("cpu")  # where other stages take it from
    for row in found.layers:
        say(f"  {row.path}: error {row.before:.4f} -> {row.after:.4f}")
    count = len(found.layers)
    losses = [(0, sum(row.before for row in found.layers) / count), (0, sum(row.after for row in found.layers) / count)]
    return StageResult(stage.kind, 0, found.tokens, round(time.monotonic() - began, 1), 0, losses)
