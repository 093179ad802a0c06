"""Which causal language models of the installed transformers can be converted: `python -m benchmarks.coverage`.

Every class is built tiny, converted and checked (`parity.py`) in a process of its own with a time limit, and
what was found goes to docs/models.md, also when the run is interrupted. Named types alone are checked again, and their
lines replaced: `... coverage llama gpt2`.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

import surgery
from surgery.patchers.families import REFUSED, WRAPPERS
from surgery.patchers.sites import find_family

from .parity import LENGTH, Checker, Wrong, logits, tokens
from .tiny import tiny_model

OUT = Path(__file__).resolve().parent.parent / "docs" / "models.md"
SECONDS = 60
LARGEST = 10_000_000
"""Weights; more is not tiny."""
STATUSES = {
    "true": "converted and parity-true",
    "partly": "converted, parity-true as far as the softmax model itself is consistent",
    "refused": "refused, with the reason",
    "unbuilt": "cannot be built tiny",
    "wrong": "converted and wrong",
}
FEEDING = ("decoding", "prefill and decoding")


@dataclass(frozen=True)
class Finding:
    """What became of one model class. patcher: the attention class that was converted."""

    model_type: str
    name: str
    status: str
    patcher: str = ""
    reason: str = ""

    def row(self) -> str:
        """Its line of the table."""
        cells = (
            f"`{self.model_type}`",
            f"`{self.name}`",
            self.status,
            self.patcher and f"`{self.patcher}`",
            self.reason,
        )
        return "| " + " | ".join(cells) + " |"

    @classmethod
    def read(cls, row: str) -> Finding:
        """What `row` wrote."""
        return cls(*(cell.strip().strip("`") for cell in row.strip().strip("|").split(" | ")))


def read(path: Path) -> dict[str, Finding]:
    """Findings of an earlier run by model type."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {found.model_type: found for line in lines if line.startswith("| `") for found in [Finding.read(line)]}


def model_types() -> dict[str, str]:
    """Class name by model type: all causal language models, and the multimodal ones that are known to hold one."""
    names = (*WRAPPERS, *REFUSED)
    wrappers = {name: MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(name, "") for name in names}
    return {name: cls for name, cls in wrappers.items() if cls} | dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def examine(model_type: str) -> Finding:
    """Build, convert and check one class."""
    name = model_types()[model_type]
    try:
        model = tiny_model(model_type)
        weights = sum(p.numel() for p in model.parameters())
        if weights > LARGEST:
            return Finding(model_type, name, "unbuilt", reason=f"{weights:,} weights at the smallest sizes")
        logits(model, tokens(1, LENGTH))
    except Exception as error:
        if model_type in REFUSED:  # by its name alone
            return Finding(model_type, name, "refused", reason=REFUSED[model_type])
        return Finding(model_type, name, "unbuilt", reason=_line(error))
    family = find_family(model.config)
    patcher = "" if family is None else family.attention
    try:
        checker = Checker(model)
        skipped, note = _check(checker, model_type)
    except surgery.SurgeryError as error:
        return Finding(model_type, name, "refused", reason=_refusal(error))
    except Wrong as wrong:
        return Finding(model_type, name, "wrong", patcher, _line(wrong))
    except Exception as error:
        return Finding(model_type, name, "wrong", patcher, _line(error))
    notes = [note] if note else []
    if family is not None and family.lacks:
        notes.append(f"leaves out {family.lacks}")
    if skipped:
        notes.append(f"not asked, as the softmax model fails it: {', '.join(skipped)}")
    status = "partly" if set(skipped) & set(FEEDING) else "true"
    return Finding(model_type, name, status, patcher, "; ".join(notes))


def _check(checker: Checker, model_type: str) -> tuple[tuple[str, ...], str]:
    try:
        checker.run()
        return checker.skipped, ""
    except Wrong as wrong:
        # large random weights may magnify rounding; a fault of ours would not go away with more digits
        if wrong.error > 1e-3:
            raise
        again = Checker(tiny_model(model_type, dtype=torch.float64), 1e-7)
        again.run()
        return again.skipped, f"to 1e-7 in fp64; in fp32 {wrong}"


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()).replace("|", "/")
    text = text if len(text) <= 120 else f"{text[:117]}..."
    return text if isinstance(error, Wrong) else f"{type(error).__name__}: {text}"


def _refusal(error: surgery.SurgeryError) -> str:
    """The reason alone, without the model's name before and the advice after it."""
    text = " ".join(str(error).split())
    return text.partition("cannot be converted: ")[2].partition("; ")[0] or text


def _send(model_type: str, sender: Any) -> None:
    torch.set_num_threads(1)
    sender.send(examine(model_type))


def isolated(model_type: str, seconds: float = SECONDS) -> Finding:
    """`examine` in a process that may crash or hang."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(model_type, sender), daemon=True)
    process.start()
    sender.close()
    try:
        if receiver.poll(seconds):
            return receiver.recv()
        reason = f"took more than {seconds:.0f} s"
    except EOFError:
        reason = "its process died"
    finally:
        process.kill()
        process.join()
    return Finding(model_type, model_types()[model_type], "unbuilt", reason=reason)


INTRO = """# Models

Made by `python -m benchmarks.coverage` with transformers {version}: all its causal language models, and multimodal
models around one, each built tiny with random weights and converted by `llama/lolcats`. Parity-true means, over five
windows of tokens and to 1e-5 in fp32: the full forward, prefill followed by decoding, chunked prefill and decoding
token by token agree; padding on either side changes nothing; emptying the state is felt; a window over all tokens gives
the softmax model's own logits; saving and loading changes nothing; teacher mode and `revert` give the softmax model
back, bit for bit. Everything else is refused before anything is touched, and so are checkpoints of Gemma 3n and Gemma 4
whose layers share keys and values.

{classes} classes ({types} model types) are parity-true.
"""

ENCODERS = """## Encoders

The mixer `bidirectional` (`bert/hedgehog`) converts attention that sees both sides. tests/test_encoders.py builds these
tiny and checks: padding changes nothing, before text too where positions can be given; teacher mode and `revert` give
the softmax model back, bit for bit; saving and loading changes nothing. Decoders, and attention from them to encoders,
stay as they are.

| encoder | attention converted | notes |
|---|---|---|
| BERT, RoBERTa, ELECTRA | `BertSelfAttention`, `RobertaSelfAttention`, `ElectraSelfAttention` | unless `is_decoder` |
| DistilBERT | `DistilBertSelfAttention` | |
| ModernBERT | `ModernBertAttention` | global layers; those with a window, linear as they are, stay softmax |
| ViT, DINOv2 | `ViTAttention`, `Dinov2Attention` | |
| SigLIP | `SiglipAttention` | both towers |
| CLIP | `CLIPAttention` | the tower for images; that for text is causal and takes causal mixers |
| Whisper, BART | `WhisperAttention`, `BartAttention` | self-attention of the encoder |
| T5 and its kin, DeBERTa | | refused: scores have a learned term for the distance of query and key |

## Denoisers

The mixer `bidirectional`, as in `diffusion/linfusion`, converts self-attention of diffusers' denoisers, alone or in a
pipeline. tests/test_diffusion.py builds these tiny and checks: everything around the mixer is as it was; teacher mode
and `revert` give the softmax model back, bit for bit; saving and loading changes nothing.

| denoiser | notes |
|---|---|
| UNets: `UNet2DConditionModel`, `UNet2DModel`, `ControlNetModel` | make ControlNets of UNets before |
| transformers: `DiTTransformer2DModel`, `PixArtTransformer2DModel` | |
| SD3, Flux and others with joint attention | refused: text and image tokens attend to each other in one softmax |

## Causal language models
"""


def markdown(findings: list[Finding]) -> str:
    """docs/models.md."""
    counts = Counter(finding.status for finding in findings)
    classes = {finding.name for finding in findings if finding.status == "true"}
    lines = [
        INTRO.format(version=transformers.__version__, classes=len(classes), types=counts["true"]),
        ENCODERS,
        "| status | model types | meaning |",
        "|---|---|---|",
        *(f"| {status} | {counts[status]} | {text} |" for status, text in STATUSES.items() if counts[status]),
        "",
        "| model type | class | status | attention converted | notes |",
        "|---|---|---|---|---|",
        *(finding.row() for finding in findings),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_types", nargs="*", help="these alone; all by default")
    parser.add_argument("--out", type=Path, default=OUT, help="file to write, or to change")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    findings = read(arguments.out)
    for model_type in arguments.model_types or sorted(model_types()):
        findings[model_type] = isolated(model_type)
        print(findings[model_type].row(), flush=True)
        kept = [findings[known] for known in sorted(model_types()) if known in findings]
        arguments.out.write_text(markdown(kept), encoding="utf-8")


if __name__ == "__main__":
    main()
