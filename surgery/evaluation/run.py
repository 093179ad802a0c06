"""`surgery evaluate`: folders and files in, a comparison, a JSON file and a picture out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..errors import SurgeryError, loading
from ..progress import showing_progress
from ..training.data.tokens import check_vocabulary, read_corpora
from .comparison import Comparison, compare, read_result
from .measure import evaluate
from .probes import Probes
from .result import Evaluation
from .tasks import MISSING, is_file, read_questions

DEMO = Path(__file__).resolve().parents[1] / "demo"
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Settings:
    """How to measure; see `evaluate`. device: None: cuda if there is one. dtype: of `DTYPES`."""

    length: int = 1024
    batch_size: int = 8
    copy_tokens: int = 400
    max_windows: int | None = None
    probes: Probes = Probes()
    device: str | None = None
    dtype: str = "float32"

    def quick(self) -> Settings:
        """Small enough for a CPU: a look at whether all is well, no result."""
        rows = min(self.probes.task_rows or 20, 20)
        probes = replace(
            self.probes, recall_rows=8, task_rows=rows, parity_rows=2, speed_runs=2, branch_rows=2, tokens=8
        )
        length, copies = min(self.length, 256), min(self.copy_tokens, 100)
        return replace(self, length=length, copy_tokens=copies, max_windows=4, batch_size=4, probes=probes)


def evaluate_folders(
    model: str,
    data: Sequence[str | Path] = (),
    *,
    softmax: str | None = None,
    controls: Sequence[str] = (),
    settings: Settings = Settings(),
) -> Comparison:
    """Evaluate a saved model beside others, each on the same text.

    model: a folder, or a name on the hub. data: files as `read_corpora` reads them, in tokens of the model; none: the
    held-out text of the embedded model, if `model` is that or a conversion of it. softmax, controls: folders, names, or
    the JSON files of earlier runs.

    Raises:
        SurgeryError: a model or a file cannot be read, they do not fit together, or there is no data.
    """
    if settings.dtype not in DTYPES:
        raise SurgeryError(f"unknown dtype {settings.dtype!r}: choose one of {', '.join(DTYPES)}")
    # files first: they are cheap to refuse
    earlier = {name: read_result(Path(name)) for name in (softmax, *controls) if name and name.endswith(".json")}
    config = {name: _config(name) for name in (model, softmax, *controls) if name and name not in earlier}[model]
    tokenizer = _tokenizer(model, config)
    _check_tasks(settings.probes.tasks)
    corpora = read_corpora(data or _default_data(model, config), tokenizer)
    check_vocabulary(corpora, config.get_text_config(decoder=True).vocab_size)

    def measured(name: str) -> Evaluation:
        return earlier[name] if name in earlier else _evaluate_folder(name, corpora, tokenizer, settings)

    result = measured(model)
    return compare(result, None if softmax is None else measured(softmax), [measured(name) for name in controls])


def output_files(out: str) -> tuple[Path, Path, Path]:
    """JSON, Markdown, PNG: `evaluation` in a folder (that exists, or ends with a slash), else with `out` as prefix."""
    path = Path(out)
    if out.endswith("/") or path.is_dir():
        path = path / "evaluation"
    json, markdown, picture = (path.with_name(path.name + end) for end in (".json", ".md", ".png"))
    return json, markdown, picture


def _check_tasks(tasks: Sequence[str]) -> None:
    """Before anything is measured, whether they can be."""
    for task in filter(is_file, tasks):
        read_questions(Path(task), 1)
    if not all(map(is_file, tasks)) and find_spec("lm_eval") is None:
        raise SurgeryError(MISSING)


def _evaluate_folder(name: str, corpora: dict[str, Any], tokenizer: Any, settings: Settings) -> Evaluation:
    from transformers import AutoModelForCausalLM

    with loading("model", name):
        model = AutoModelForCausalLM.from_pretrained(name, dtype=settings.dtype)
    model.to(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    names = ("length", "batch_size", "copy_tokens", "max_windows", "probes")
    sizes = {name: getattr(settings, name) for name in names}
    with showing_progress(Path(name).name) as progress:
        return evaluate(model, corpora, **sizes, tokenizer=tokenizer, name=name, progress=progress)


def _config(name: str) -> Any:
    from transformers import AutoConfig

    with loading("model", name):
        return AutoConfig.from_pretrained(name)


def _tokenizer(name: str, config: Any) -> Any:
    """None if there is none: data may be tokens already."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError):
        return AutoTokenizer.from_pretrained(DEMO) if is_demo(config) else None


def _default_data(name: str, config: Any) -> list[Path]:
    if not is_demo(config):
        raise SurgeryError(f"no text to evaluate {name} on: name files with --data (text, .jsonl, .npy or .u16)")
    return [DEMO / "heldout.jsonl"]


def is_demo(config: Any) -> bool:
    """Whether this is the config of the embedded model or of a conversion of it, by its shape."""
    from transformers import AutoConfig

    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    own = AutoConfig.from_pretrained(DEMO)
    same_type = config.model_type.removeprefix("surgery_") == own.model_type
    return same_type and all(getattr(config, name, None) == getattr(own, name) for name in names)
