"""Which mixture of domains to heal on: in proportion to their sizes, flatter, flatter and then in proportion, learned.

    python -m benchmarks.mixing MODEL TOKENS OUT [--jobs 8] [--results PREFIX]    # TOKENS: *.train.*, *.val.* files
    python -m benchmarks.mixing --show benchmarks/results/mixing.json

Rows of `benchmarks.quality`, which runs them and goes on where it was. All are one conversion, llama/logmass with the
KL to the softmax model, and differ in how the second stage draws its rows: by size^(1/tau) with tau 1 or 5, with tau 5
for its first half and 1 for its second (Cooldown), or by a bandit that is rewarded for losses that fall. The first
stage draws in proportion in every row.
"""

from __future__ import annotations

from statistics import mean
from typing import Any

from benchmarks.forms import KL, LOGMASS, STEP, stage
from benchmarks.quality import Row, main
from benchmarks.quality_report import evaluations, report

TRANSFER, LANGUAGE = 75 * STEP, 200 * STEP
PROPORTIONAL = {"kind": "temperature", "tau": 1, "end": None}
POLICIES: dict[str, dict[str, Any]] = {
    "tau 1": PROPORTIONAL,
    "tau 5": {"kind": "temperature", "tau": 5, "end": None},
    "cooldown": {"kind": "temperature", "tau": 5, "end": 1, "at": 0.5},
    "bandit": {"kind": "bandit", "policy": "logbarrier", "every": 5, "scale": 0.1, "floor": 0.02},
}
SEEDS = (0, 1)
SMALL = 0.25
"""Of the largest domain: what is smaller counts as a small one."""


def row(policy: str, seed: int) -> Row:
    changes = stage(0, TRANSFER, mixing=PROPORTIONAL) | stage(1, LANGUAGE, mixing=POLICIES[policy], **KL)
    return Row(f"{policy.replace(' ', '-')}-{seed}", LOGMASS, changes, seed=seed)


ROWS = [row(policy, seed) for seed in SEEDS for policy in POLICIES]


def table(result: dict[str, Any]) -> str:
    """Losses by domain, the largest first, as the mean over seeds, and by how much they are above those of `tau 1` with
    the same seeds, seed by seed where there are several."""
    tokens = {name.removesuffix(".train"): count for name, count in result["tokens"].items()}
    domains = sorted(tokens, key=lambda name: -tokens[name])
    large = [name for name in domains if tokens[name] >= SMALL * tokens[domains[0]]]
    groups = {name: [name] for name in domains} | {"large": large, "small": [n for n in domains if n not in large]}
    groups = {name: members for name, members in groups.items() if members}
    found = evaluations(result["rows"])

    def loss(name: str, members: list[str]) -> float:
        held = {domain.removesuffix(".val"): nll.nll for domain, nll in found[name].domains.items()}
        return mean(held[member] for member in members)

    heads = [f"{name}, {tokens[name] / 1e6:.1f} M" if name in tokens else f"mean of {name}" for name in groups]
    lines = ["| rows drawn by | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    for policy in POLICIES:
        own = [(row(policy, s).name, row("tau 1", s).name) for s in SEEDS if row(policy, s).name in found]
        cells = []
        for members in groups.values() if own else ():
            above = [loss(name, members) - loss(other, members) for name, other in own if other in found]
            shown = ", ".join(f"{value:+.4f}" for value in above) if policy != "tau 1" else ""
            cells.append(f"{mean(loss(name, members) for name, _ in own):.4f}" + (f" ({shown})" if shown else ""))
        lines += ["| " + " | ".join([policy, *cells]) + " |"] if own else []
    return "\n".join(lines)


def summary(result: dict[str, Any]) -> str:
    note = "Nats per token, the mean over seeds, and in parentheses what they are above `tau 1` with each of the seeds."
    about = "The mean of several domains weighs domains alike."
    return f"{table(result)}\n\n{note} {about}\n\n{report(result)}"


if __name__ == "__main__":
    main(rows=ROWS, about=__doc__, summary=summary)
