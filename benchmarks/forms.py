"""The form search: which mix, gate, rotation, loss and stage split gives most, each row beside its own control.

    python -m benchmarks.forms MODEL TOKENS OUT [--only NAME ...] [--jobs 4]    # TOKENS: *.train.*, *.val.* files
    python -m benchmarks.forms --show benchmarks/results/forms.json

Rows of `benchmarks.quality`, which runs them. Budgets are those of the reference conversions: steps of 16 x 1,024
tokens, 150 of attention transfer and 250 of language modelling, or 400 of the latter where nothing is transferred.
"""

from __future__ import annotations

from typing import Any

from benchmarks.quality import Row, main

STEP = 16 * 1024
TRANSFER, LANGUAGE, ALL = 150 * STEP, 250 * STEP, 400 * STEP
COMMON = {"batch_size": 8, "accumulate": 2, "epochs": None, "sequence_length": 1024}
KL = {"loss": {"kl": 1}}


def stage(index: int, tokens: int, **more: Any) -> dict[str, Any]:
    """Changes that give a stage its budget."""
    return {f"stages.{index}.{key}": value for key, value in ({**COMMON, "tokens": tokens} | more).items()}


def two(**more: Any) -> dict[str, Any]:
    return stage(0, TRANSFER) | stage(1, LANGUAGE) | more


def kl(**more: Any) -> dict[str, Any]:
    return two(**{"stages.1.loss": {"kl": 1}, **more})


def paper(recipe: str) -> dict[str, Any]:
    """Budgets as above, everything else as the recipe has it, the plateau looking as often as 400 steps allow."""
    plateau = {f"stages.{i}.schedule.every": 25 for i in range(1 if recipe.endswith("gla") else 2)}
    plateau |= {f"stages.{i}.schedule.patience": 2 for i in range(len(plateau))}
    return plateau | (stage(0, ALL) if recipe.endswith("gla") else two())


LOGMASS, LIGER = "llama/logmass", "llama/liger-gla"
LIGER_LIKE = stage(0, ALL, rank=16, alpha=32, targets=["q", "k", "v", "o"], lr=3e-4, trains=["mixer"], mixer_lr=3e-3)
LIGER_LIKE |= {"stages.0.loss": {"kl": 1}, "stages.0.schedule": {"kind": "cosine", "warmup": 20}}
ROWS = [
    Row("softmax-ce", "control/softmax-lora", stage(0, LANGUAGE)),
    Row("window-ce", "control/window-lora", stage(0, LANGUAGE)),
    Row("window-kl", "control/window-lora", stage(0, LANGUAGE, **KL)),
    # the papers' own, and what lacks their branch
    Row("lolcats", "llama/lolcats", paper("llama/lolcats"), "window-lolcats"),
    Row("window-lolcats", "control/window-lora", stage(0, LANGUAGE, rank=8, alpha=16, lr=1e-4)
        | {"stages.0.schedule": {"kind": "plateau", "every": 25, "patience": 2, "min_lr": 1e-5}}),
    Row("liger-gla", LIGER, paper(LIGER), "window-liger"),
    Row("window-liger", "control/window-lora", stage(0, ALL, rank=8, alpha=8, targets=["q", "k", "v"], lr=1e-3)
        | {"stages.0.schedule": {"kind": "plateau", "every": 25, "patience": 2, "min_lr": 1e-5}}),
    # the reference conversions: every row with the adapters and rates of the controls
    Row("joint", LOGMASS, two(**{"mixer.mix": {"kind": "joint"}, "mixer.state": "head",
        "stages.0.loss": {"normalized_mse": 1}, "stages.1.trains": []})),
    Row("logmass", LOGMASS, two()),
    Row("logmass-kl", LOGMASS, kl(), "window-kl"),
    # one thing at a time, from logmass-kl
    Row("mse-transfer", LOGMASS, kl(**{"stages.0.loss": {"normalized_mse": 1}}), "window-kl"),
    Row("ce-transfer", LOGMASS, kl(**{"stages.0.loss": {"cross_entropy": 1}}), "window-kl"),
    Row("no-transfer", LOGMASS, stage(0, STEP) | stage(1, ALL, **KL), "window-kl-400"),
    Row("window-kl-400", "control/window-lora", stage(0, ALL, **KL)),
    Row("raw", LOGMASS, kl(**{"mixer.rope": "raw"}), "window-kl"),
    Row("per-head", LOGMASS, kl(**{"mixer.state": "head"}), "window-kl"),
    Row("exp-map", LOGMASS, kl(**{"mixer.feature_map.kind": "exp"}), "window-kl"),
    Row("features-128", LOGMASS, kl(**{"mixer.feature_map.features": 128}), "window-kl"),
    Row("sinks", LOGMASS, kl(**{"mixer.window.sinks": 4}), "window-sinks-kl"),
    Row("window-sinks-kl", "control/window-lora", stage(0, LANGUAGE, **KL) | {"mixer.window.sinks": 4}),
    Row("terraced", LOGMASS, kl(**{"mixer.window.layout": "terraced"}), "window-terraced-kl"),
    Row("window-terraced-kl", "control/window-lora", stage(0, LANGUAGE, **KL) | {"mixer.window.layout": "terraced"}),
    Row("fast-mixer", LOGMASS, kl(**{"stages.1.mixer_lr": 3e-3}), "window-kl"),
    Row("joint-kl", LOGMASS, kl(**{"mixer.mix": {"kind": "joint"}}), "window-kl"),
    Row("average-kl", LOGMASS, kl(**{"mixer.mix": {"kind": "average"},
        "stages.0.loss": {"normalized_mse": 1}}), "window-kl"),
    # gates, all with the same adapters, rates and loss
    Row("gate-key", LIGER, LIGER_LIKE | {"stages.0.trains": []}, "window-kl-400"),
    Row("gate-low-rank", LIGER, LIGER_LIKE | {"mixer.gate": {"kind": "low_rank"}}, "window-kl-400"),
    Row("gate-constant", LIGER, LIGER_LIKE | {"mixer.gate": {"kind": "constant"}}, "window-kl-400"),
    Row("gate-low-rank-rotated", LIGER, LIGER_LIKE | {"mixer.gate": {"kind": "low_rank"},
        "mixer.rope": "rotated"}, "window-kl-400"),
    # the same again from other seeds, where a difference decides something
    Row("softmax-ce-1", "control/softmax-lora", stage(0, LANGUAGE), seed=1),
    Row("window-ce-1", "control/window-lora", stage(0, LANGUAGE), seed=1),
    Row("lolcats-1", "llama/lolcats", paper("llama/lolcats"), "window-lolcats", seed=1),
    Row("liger-gla-1", LIGER, paper(LIGER), "window-liger", seed=1),
    Row("logmass-1", LOGMASS, two(), "window-ce-1", seed=1),
    Row("logmass-kl-1", LOGMASS, kl(), "window-kl", seed=1),
]  # fmt: skip


if __name__ == "__main__":
    main(rows=ROWS, about=__doc__)
