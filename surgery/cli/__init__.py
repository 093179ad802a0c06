"""The command line of `surgery`: one function a command.

Nothing heavy is imported before a command needs it, so that `surgery --help` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from ..errors import SurgeryError, loading
from .common import ColumnOption, Commands, DataOption, ModelOption, RecipeOption, SetOption, make_console, show
from .exchange import export_model, import_model

if TYPE_CHECKING:
    from ..recipe import Recipe


app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

DEMO_OUT = Path("demo-output")
USUAL = ("llama/lolcats", "bert/hedgehog")
"""Recipes for decoders and for encoders."""


def _read_recipe(name: str, changes: list[str] | None) -> Recipe:
    from ..recipe import load_recipe
    from ..validation import parse_changes

    values = parse_changes(changes or [], "mixer.window.size=32")
    recipe = load_recipe(name)
    return recipe.override(values) if values else recipe


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        typer.echo(f"surgery {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Swap the softmax attention of pretrained models for linear recurrences."""


@app.command()
def recipes(name: Annotated[str | None, typer.Argument(help="Show this one in full.")] = None) -> None:
    """List the recipes that come with this package, or show one."""
    from ..recipe import list_recipes, load_recipe, recipe_path

    if name is None:
        table = Table("recipe", "what it is")
        for known in list_recipes():
            table.add_row(known, load_recipe(known).description)
        show(table)
        return
    path = recipe_path(name)
    load_recipe(path)
    console, text = make_console(), path.read_text(encoding="utf-8")
    if console.is_terminal:
        from rich.syntax import Syntax

        console.print(Syntax(text, "yaml", background_color="default", word_wrap=True))
    else:
        typer.echo(text, nl=False)


@app.command()
def inspect(
    model: Annotated[str | None, typer.Argument(help="A local folder or a hub name.")] = None,
    model_: Annotated[str | None, typer.Option("--model", "-m", metavar="MODEL", help="The same.")] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", "-r", help=f"By default {USUAL[0]}, or {USUAL[1]} for an encoder."),
    ] = None,
    set_: SetOption = None,
    layers: Annotated[str | None, typer.Option(help="Layers to convert, as in 0,1,-1; all by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Say whether a model is supported, and what a recipe would do to it. Only its config is read or downloaded."""
    if (model is None) == (model_ is None):
        raise SurgeryError("name one model, a local folder or a hub name, as in `surgery inspect PATH`")
    name, indices = model or model_ or "", _read_layers(layers)
    report, problem = None, None
    for known in USUAL if recipe is None else (recipe,):
        try:
            report = _inspect(name, _read_recipe(known, set_), indices)
            break
        except SurgeryError as error:
            problem = problem or error
    if report is None:
        raise problem or SurgeryError("there is no recipe")
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        show(report.table())


def _read_layers(text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise SurgeryError(f"--layers {text}: expected numbers separated by commas, as in --layers 0,1,-1") from None


def _inspect(name: str, recipe: Recipe, layers: list[int] | None) -> Any:
    import torch
    from transformers import AutoConfig

    import surgery

    from ..denoisers import skeleton
    from ..hub import auto_class

    with loading("model", name):
        denoiser = skeleton(name)
        if denoiser is not None:
            return surgery.inspect(denoiser, recipe, layers=layers)
        config = AutoConfig.from_pretrained(name)
    with torch.device("meta"):
        return surgery.inspect(auto_class(config, recipe.causal).from_config(config), recipe, layers=layers)


@app.command()
def layers(
    model: ModelOption,
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="A shipped name or the path of a YAML file.")],
    data: DataOption,
    set_: SetOption = None,
    keep: Annotated[int | None, typer.Option(min=1, help="Layers that keep softmax; 1 unless the recipe says.")] = None,
    column: ColumnOption = "text",
    as_json: Annotated[bool, typer.Option("--json", help="Print the measurements as JSON.")] = False,
) -> None:
    """Measure what converting each layer costs, and propose which keep softmax (--set layers.tokens=8192: on more)."""
    chosen = _read_recipe(recipe, [*(set_ or ()), *([] if keep is None else [f"layers.auto={keep}"])])
    from ..training.convert import Options
    from ..training.layers import measured_layers

    found = measured_layers(model, chosen, data, Options(column=column))
    if as_json:
        return typer.echo(json.dumps(found.to_dict(), indent=2))
    show(found.table())
    typer.echo(f"surgery convert --set 'layers={list(found)}' converts the others")


@app.command()
def plan(
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="A shipped name or the path of a YAML file.")],
    model: Annotated[str | None, typer.Option("--model", "-m", help="A local folder or a name on the hub.")] = None,
    shape: Annotated[str | None, typer.Option(help="In place of a model, a Llama 3 of 1b, 8b, 70b or 405b.")] = None,
    set_: SetOption = None,
    gpus: Annotated[int, typer.Option(min=1)] = 1,
    gpu: Annotated[str, typer.Option(help="h100, h200 or a100.")] = "h100",
    gpu_memory: Annotated[float, typer.Option(help="GiB of each.")] = 80.0,
    strategy: Annotated[str, typer.Option(help="single, ddp, fsdp or blockwise.")] = "single",
    block_layers: Annotated[int, typer.Option(min=1, help="Layers a device has at a time, blockwise.")] = 9,
    tokens_per_batch: Annotated[
        int | None, typer.Option(min=1, help="Of one forward pass of one device; by default as the recipe says.")
    ] = None,
    data_tokens: Annotated[int, typer.Option(min=1, help="Of one epoch, for stages that last epochs.")] = 10_000_000,
    precision: Annotated[str, typer.Option(help="bf16-mixed or 32-true.")] = "bf16-mixed",
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Show what a conversion would take: memory of each GPU, time, disk. Only the model's config is read."""
    chosen = _read_recipe(recipe, set_)
    from ..planning import Request
    from ..planning import plan as make
    from ..planning.report import headline, tables
    from ..planning.shapes import load_config

    request = Request(gpus, gpu, gpu_memory, tokens_per_batch, data_tokens, strategy, block_layers, precision)
    found = make(load_config(model, shape), chosen, request)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
        return
    make_console().print(headline(found))
    for table in tables(found):
        show(table)
    for assumption in found.assumptions:
        make_console().print(f"assumed: {assumption}")


@app.command()
def convert(
    model: ModelOption,
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="A shipped name or the path of a YAML file.")],
    data: DataOption,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The folder to make; OUT.run holds the run until it is done.")
    ],
    set_: SetOption = None,
    validation: Annotated[
        list[Path] | None, typer.Option("--validation", help="Like --data; by default a hundredth is held out.")
    ] = None,
    seed: int = 0,
    precision: Annotated[str, typer.Option(help="auto, 32-true, bf16-mixed or bf16-true.")] = "auto",
    accelerator: Annotated[str, typer.Option(help="auto, cpu or gpu.")] = "auto",
    save_every: Annotated[int, typer.Option(min=1, help="Optimizer steps between two checkpoints.")] = 50,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Less memory for more time.")] = False,
    column: ColumnOption = "text",
    skip_broken: Annotated[bool, typer.Option("--skip-broken", help="Leave out rows that cannot be used.")] = False,
    devices: Annotated[
        int | None, typer.Option(min=1, help="Of this host, 1 by default; leave it to torchrun under torchrun.")
    ] = None,
    nodes: Annotated[
        int, typer.Option(min=1, help="Hosts that run this command; they share a disk, and need MASTER_ADDR.")
    ] = 1,
    strategy: Annotated[
        Literal["auto", "ddp", "fsdp"], typer.Option(help="A model on each device, or shares.")
    ] = "auto",
) -> None:
    """Convert a model, heal it on text by the recipe's stages, and save it. Repeat it to resume a killed run.

    A step is the same on any number of devices: they share out its rows.
    """
    chosen = _read_recipe(recipe, set_)
    import logging

    from ..training.convert import Options
    from ..training.convert import convert as run
    from ..training.processes import joined, start

    if (devices or 1) * nodes > 1 and not joined():
        raise typer.Exit(start([sys.executable, "-m", "surgery.cli", *sys.argv[1:]], devices or 1, nodes))

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # it introduces itself before every stage
    on_error: Literal["raise", "skip"] = "skip" if skip_broken else "raise"
    bar = sys.stdout.isatty()
    options = Options(
        seed,
        precision,
        accelerator,
        save_every,
        gradient_checkpointing,
        bar,
        column,
        on_error,
        devices,
        nodes,
        strategy,
    )
    run(model, chosen, data, out, validation=validation or (), options=options, say=typer.echo)
    if int(os.environ.get("RANK", 0)) == 0:  # of several processes one speaks
        typer.echo(f"surgery generate --model {out} --prompt ... continues a text with it")


@app.command()
def generate(
    model: ModelOption,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The text to continue.")],
    recipe: RecipeOption = None,
    set_: SetOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0, max=1, help="Sample from the likeliest tokens of this total mass.")
    ] = 1.0,
    seed: int = 0,
    device: Annotated[str | None, typer.Option(help="cuda if there is one, by default.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Continue a text with a converted model, or with one that --recipe converts while it is loaded."""
    import torch
    from transformers import AutoTokenizer, TextStreamer, set_seed

    import surgery

    chosen = None if recipe is None else _read_recipe(recipe, set_)
    if recipe is None and set_:
        raise SurgeryError("--set changes a recipe: name it with --recipe")
    with loading("tokenizer", model):
        tokenizer = AutoTokenizer.from_pretrained(model)
    with loading("model", model):
        network = surgery.from_pretrained(model, recipe=chosen, dtype=dtype)
    network.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    set_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(network.device)
    network.generate(**inputs, **sampling, max_new_tokens=max_new_tokens, streamer=TextStreamer(tokenizer))


app.command("import")(import_model)
app.command("export")(export_model)


@app.command()
def evaluate(
    model: Annotated[str | None, typer.Argument(help="A local folder or a name on the Hugging Face hub.")] = None,
    model_: Annotated[str | None, typer.Option("--model", "-m", hidden=True)] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", "-d", help="Text, .jsonl, .parquet, .npy or .u16, also .gz or .xz; one domain a file."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option("--against", "--softmax", help="The softmax model: a model, or the JSON of an earlier run."),
    ] = None,
    control: Annotated[
        list[str] | None,
        typer.Option("--control", "--controls", help="A matched control: a model, or the JSON of an earlier run."),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="A .jsonl of rows, or a task that lm-evaluation-harness knows; repeatable."),
    ] = None,
    task_rows: Annotated[int | None, typer.Option(min=1, help="The first so many rows of each task; all.")] = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 1024,
    windows: Annotated[int | None, typer.Option(min=1, help="The first so many windows of each domain; all.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    copy_tokens: Annotated[int, typer.Option(min=0, help="Tokens of a piece that is written twice; 0: none.")] = 400,
    probes: Annotated[bool, typer.Option(help="Recall of pairs and needles, decoding, speed and branches.")] = True,
    quick: Annotated[bool, typer.Option("--quick", help="A little of everything, for a CPU.")] = False,
    out: Annotated[str, typer.Option(help="Folder, or prefix of the files to write.")] = "evaluation",
    device: Annotated[str | None, typer.Option(help="cuda if there is one, by default.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Measure a model beside its softmax model and its controls: loss, recall, tasks, history, memory and speed."""
    model = model or model_
    if model is None:
        raise SurgeryError("no model: surgery evaluate MODEL, a folder or a name on the Hugging Face hub")
    from ..evaluation import Probes
    from ..evaluation.comparison import write_json
    from ..evaluation.plot import plot
    from ..evaluation.report import markdown, remarks, tables
    from ..evaluation.run import Settings, evaluate_folders, output_files
    from ..training.run import write_text

    amounts = Probes() if probes else Probes(recall_rows=0, parity_rows=0, speed_runs=0, branch_rows=0)
    chosen = replace(amounts, tasks=tuple(tasks or ()), task_rows=task_rows)
    settings = Settings(length, batch_size, copy_tokens, windows, chosen, device, dtype)
    settings = settings.quick() if quick else settings
    found = evaluate_folders(model, data or (), softmax=against, controls=control or (), settings=settings)
    for table in tables(found):
        show(table)
    for remark in remarks(found.result):
        make_console().print(remark)
    numbers, text, picture = output_files(out)
    write_json(found, numbers)
    write_text(text, markdown(found))
    plot(found, picture)
    for path in (numbers, text, picture):
        typer.echo(f"wrote {path}")


@app.command()
def doctor() -> None:
    """Show versions and hardware, then compare every kernel with its reference on this machine."""
    from ..doctor import check_kernels, environment, warnings

    versions = Table("what", "version")
    for what, version in environment().items():
        versions.add_row(what, version)
    show(versions)
    for warning in warnings():
        typer.echo(warning)
    kernels, wrong = Table("op", "backend", "device", "dtype", "error", "gradient", "allowed", "speed", "verdict"), 0
    for check in check_kernels():
        wrong += not check.right
        verdict = "right" if check.right else f"WRONG{': ' + check.note if check.note else ''}"
        error, gradient = ("–" if x is None else f"{x:.1e}" for x in (check.error, check.gradient))
        speed = "–" if check.speedup is None else f"{check.speedup:.1f} × chunked"
        cells = (check.op, check.backend, check.device, check.dtype, error, gradient, f"{check.allowed:.0e}", speed)
        kernels.add_row(*cells, verdict)
    if kernels.row_count:
        show(kernels)
    typer.echo(f"{kernels.row_count - wrong} of {kernels.row_count} kernel checks right")
    if wrong:
        raise typer.Exit(1)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write; replaces an earlier demo.")] = DEMO_OUT,
) -> None:
    """Convert the model that comes along, heal it a little, and measure it beside what a GPU made of it. Offline."""
    from ..showcase import run_demo

    run_demo(out, show, progress=sys.stdout.isatty())


def main() -> None:
    """The console script."""
    app()
