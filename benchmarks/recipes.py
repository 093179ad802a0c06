"""Every shipped recipe on one model, briefly, with and without a calibrated start.

    python -m benchmarks.recipes MODEL TOKENS OUT [--budget 2_000_000] [--jobs 4] [--minutes 30]
    python -m benchmarks.recipes --show benchmarks/results/recipes.json

MODEL and TOKENS (a folder of *.train.* and *.val.*) are as for `benchmarks.quality`, which runs the rows: one that is
done is not repeated, and a killed one goes on where it was. All stages that train share the budget evenly, in batches
of 8 x 1,024 tokens, and warm up for a tenth of their steps at most; the rest is as the recipe has it. The controls,
which only adapt, have what the adapters of others have. There is one row where nothing could be calibrated, and none of
what is for encoders. Speeds are those of as many rows at once as ran.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from benchmarks.quality import Row, main
from surgery.mixers.base import AttentionShape, Calibrated
from surgery.recipe import Recipe, list_recipes, load_recipe
from surgery.training.stages import Calibrate

LENGTH, BATCH = 1024, 8
CALIBRATION = Calibrate(tokens=4096, sequence_length=LENGTH)


def rows(budget: int) -> list[Row]:
    """Controls first, then each recipe, calibrated after plain."""
    found = []
    for name in list_recipes():
        recipe = load_recipe(name)
        if not recipe.causal:
            continue
        found.append(row(name, recipe, budget, calibrated=False))
        if calibrates(recipe):
            found.append(row(name, recipe, budget, calibrated=True))
    return found


def row(name: str, recipe: Recipe, budget: int, *, calibrated: bool) -> Row:
    """One conversion within the budget; a recipe's own calibration is kept, or left out."""
    own = [stage for stage in recipe.stages if isinstance(stage, Calibrate)] or [CALIBRATION]
    stages = [stage.model_dump(mode="json") for stage in [*own, *recipe.training]][0 if calibrated else len(own) :]
    control, count = name.startswith("control/"), len(recipe.training)
    changes: dict[str, Any] = {"stages": stages}
    for index in range(len(stages) - count, len(stages)):
        tokens, schedule = budget // (2 if control else count), stages[index]["schedule"]
        if schedule.get("warmup"):
            changes[f"stages.{index}.schedule.warmup"] = min(schedule["warmup"], tokens // (10 * BATCH * LENGTH))
        changes |= {f"stages.{index}.{key}": value for key, value in (
            ("tokens", tokens), ("epochs", None), ("batch_size", BATCH),
            ("accumulate", 1), ("sequence_length", LENGTH),
        )}  # fmt: skip
    return Row(name.replace("/", "-") + ("-calibrated" if calibrated else ""), name, changes)


def calibrates(recipe: Recipe) -> bool:
    """Whether a mixer of it has parts that set themselves."""
    if recipe.mixer is None:
        return False
    layers = [AttentionShape(4, 2, 64, 256, layer, 4) for layer in range(4)]
    return any(isinstance(part, Calibrated) for shape in layers for part in recipe.build(shape).children())


def run(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--budget", type=int, default=2_000_000, help="tokens of a row")
    chosen, others = parser.parse_known_args(sys.argv[1:] if given is None else given)
    main(others, rows=rows(chosen.budget), about=__doc__)


if __name__ == "__main__":
    run()
