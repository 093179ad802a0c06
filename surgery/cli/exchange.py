"""`surgery import` and `surgery export`; nothing heavy is imported before they run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import loading

Options = Annotated[
    list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="An option of the format: window=32")
]


def import_model(
    checkpoint: Annotated[list[Path], typer.Argument(help="Files or folders; of several, later ones win.")],
    model: Annotated[str, typer.Option("--model", "-m", help="The softmax model that it was made from.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to make.")],
    format: Annotated[str, typer.Option("--format", "-f", help="Whose it is: lolcats, liger or fla.")] = "lolcats",
    set_: Options = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Make a converted model of a checkpoint of another project, with its adapters merged."""
    import torch
    from transformers import AutoConfig, AutoTokenizer

    from .. import adapters
    from ..folders import replace_folder
    from ..hub import auto_class
    from ..interchange import import_checkpoint
    from ..validation import parse_changes

    with loading("model", model):
        config = AutoConfig.from_pretrained(model)
        network = auto_class(config).from_pretrained(model, config=config, dtype=dtype)
    import_checkpoint(network, checkpoint, format, **parse_changes(set_ or [], "window=32"))
    network.eval()
    sample = torch.arange(32).remainder(network.config.get_text_config().vocab_size).unsqueeze(0)
    drift = adapters.merge_checked(network, sample)
    with replace_folder(out) as folder:
        network.save_pretrained(folder)
        try:
            AutoTokenizer.from_pretrained(model).save_pretrained(folder)
        except (OSError, ValueError):
            typer.echo(f"{model} has no tokenizer, so {out} has none")
    typer.echo(f"saved {out}; merging adapters moved logits by {drift:.1e} of the largest")


def export_model(
    model: Annotated[str, typer.Argument(help="A folder of a converted model.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to make.")],
    format: Annotated[str, typer.Option("--format", "-f", help="For whom: fla, kimi_linear or lolcats.")] = "fla",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Write a converted model as a checkpoint that another project reads, after comparing its logits."""
    from ..hub import from_pretrained
    from ..interchange import export_checkpoint

    with loading("model", model):
        network = from_pretrained(model, dtype=dtype)
    options = export_checkpoint(network, out, format)
    typer.echo(f"saved {out}" + "".join(f" {name}={value}" for name, value in options.items()))
