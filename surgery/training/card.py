"""The model card written beside a healed model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..doctor import environment
from ..recipe import Recipe

if TYPE_CHECKING:
    from .run import StageResult

CARD = """---
library_name: transformers
base_model: {base}
tags: [surgery, linear-attention]
---

# {name}, healed by `surgery`

{description}

```python
import surgery
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("FOLDER")  # this one
```

| stage | optimizer steps | tokens | trained parameters | minutes | validation loss |
|---|---|---|---|---|---|
{stages}

The validation loss of an attention-transfer stage is its own loss, that of a calibration the mean error of its layers,
that of others nats per token, before the adapters were merged; merging moved the logits by {drift:.1e} of the largest.
`metrics.csv` has every step, `delta.safetensors` what was learned (mixers and adapters) without the base weights.

Data: {data}

Recipe:

```yaml
{recipe}```

Made with {versions}.
"""


def model_card(base: str, recipe: Recipe, results: list[StageResult], request: dict[str, Any], drift: float) -> str:
    """Markdown."""
    rows = []
    for result in results:
        losses = result.losses
        course = f"{losses[0][1]:.4f} → {losses[-1][1]:.4f}" if losses else "–"
        size = f"{result.steps:,} | {result.tokens:,} | {result.parameters:,} | {result.seconds / 60:.1f}"
        rows.append(f"| {result.kind} | {size} | {course} |")
    found = environment()
    versions = ("python", "torch", "transformers", "peft", "lightning")
    return CARD.format(
        base=base,
        name=Path(base).name,
        description=recipe.description,
        stages="\n".join(rows),
        drift=drift,
        data=", ".join(Path(file).name for file in request["data"]),
        recipe=yaml.safe_dump(recipe.to_dict(), sort_keys=False),
        versions=", ".join(f"{name} {found[name]}" for name in versions),
    )
