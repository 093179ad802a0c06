"""What the commands share: how errors are said, how tables are shown, and options that several of them take."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..errors import SurgeryError


class Commands(typer.core.TyperGroup):
    """Says our own errors in one clean message, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SurgeryError as error:
            Console(stderr=True, soft_wrap=True, highlight=False).print(str(error), style="red", markup=False)
            raise typer.Exit(2) from None


RecipeOption = Annotated[str | None, typer.Option("--recipe", "-r", help="A shipped name or the path of a YAML file.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change one value: mixer.window.size=32")
]
ModelOption = Annotated[str, typer.Option("--model", "-m", help="A local folder or a name on the Hugging Face hub.")]
DataOption = Annotated[
    list[Path],
    typer.Option("--data", "-d", help="Text, .jsonl, .parquet, .npy, .u16, also .gz or .xz; hf:NAME; repeatable."),
]
ColumnOption = Annotated[str, typer.Option(help="Of the text in .jsonl, .parquet and hf: data.")]


def make_console() -> Console:
    """For people at a terminal; plain, unwrapped text for everything else."""
    return Console() if sys.stdout.isatty() else Console(width=240, highlight=False, color_system=None)


def show(shown: Any) -> None:
    """A line as it is, a table in full, and whatever else rich can print."""
    console = make_console()
    if isinstance(shown, str):
        typer.echo(shown)
        return
    if isinstance(shown, Table) and not console.is_terminal:
        shown.box = None
    console.print(shown)
