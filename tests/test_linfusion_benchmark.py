"""The benchmark of denoisers, on a toy."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'surgery[diffusion]'")

from benchmarks import linfusion
from benchmarks.shapes import COLORS, SHAPES, draw_batch


def test_quick_run_writes_what_it_measured(tmp_path):
    result = linfusion.main(["--quick", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "linfusion.json").read_text()) == result
    softmax, converted, distilled = (result["models"][name] for name in ("softmax", "converted", "distilled"))
    assert softmax["output"] == 0 < converted["output"] and converted["output"] != distilled["output"]
    assert all(0 <= found["right"] <= 1 and found["frechet"] > 0 for found in (softmax, converted, distilled))
    assert result["models"]["real"]["frechet"] > 0 and result["saved whole"]
    assert result["steps"] == {"softmax": 2, "distillation": 2}
    assert [row["tokens"] for row in result["seconds"]] == [64, 256]
    with linfusion.Image.open(tmp_path / "linfusion.png") as image:
        assert image.size == (3 * 8 * 4, 3 * 8 * 4)


def test_shapes_have_their_colours():
    images, labels = draw_batch(256, 64, torch.device("cpu"), torch.Generator().manual_seed(0))
    assert images.shape == (256, 3, 64, 64) and images.abs().max() <= 1
    assert labels.unique(dim=0).shape[0] == len(SHAPES) * len(COLORS)
    for image, (_, color) in zip(images, labels, strict=True):
        brightest = image.flatten(1)[:, image.amax(0).argmax()]
        paint = torch.tensor(list(COLORS.values())[color])
        assert torch.allclose(brightest, paint, atol=0.05)
