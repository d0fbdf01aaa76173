"""A model's folder made into another: rounded, packed, exported, described."""

import time
from pathlib import Path
from typing import Annotated

import typer

from grace.cli.common import Out, Run, job

commands = typer.Typer()


@commands.command()
def quantize(
    run: Run,
    init: Annotated[Path, typer.Option(help="model folder to round")],
    out: Out,
    data: Annotated[Path | None, typer.Option(help="the experiment's data folder, for AWQ and GPTQ")] = None,
) -> None:
    """Round a model without training it: RTN, AWQ or GPTQ."""
    from grace.quant.commands import quantize as round_model

    with job(out, files=(run,), folders=(init, data), subcommand="quantize"):
        round_model(run, init, data, out)


@commands.command()
def pack(
    model: Annotated[Path, typer.Option(help="quantised model folder")],
    out: Out,
    others: Annotated[
        Path | None, typer.Option(help="results folder whose waiting models are packed too, while that is quick")
    ] = None,
) -> None:
    """Pack a quantised model so that transformers and vLLM load it with no code of ours."""
    from grace.cluster.ahead import packed_ahead, take_over, unpacked, while_quick
    from grace.files import MANIFEST

    def pack_to(one: Path, folder: Path) -> None:
        # imports torch, which a job that takes a packed model over does without
        from grace.quant.pack import pack as pack_model

        pack_model(one, folder)

    since = time.monotonic()
    with job(out, folders=(model,), subcommand="pack"):
        if not take_over(model, out):
            pack_to(model, out)

    def pack_too(one: Path, packed: Path) -> None:
        ahead = packed_ahead(one, packed)
        with job(ahead, packed, folders=(one,), subcommand="pack", wait_s=0):
            if not (packed / MANIFEST).is_file():
                pack_to(one, ahead)

    if others is not None:
        while_quick(unpacked(others), since, pack_too)


@commands.command("import")
def import_(
    released: Annotated[Path, typer.Option(help="folder of a released GRACE checkpoint, with its codes")], out: Out
) -> None:
    """Pack a checkpoint that the authors of GRACE released, code by code."""
    from grace.quant.import_release import import_release

    with job(out, folders=(released,), subcommand="import"):
        import_release(released, out)


@commands.command()
def export(
    packed: Annotated[Path, typer.Option(help="packed folder")],
    format: Annotated[str, typer.Option(help="awq, gptq or gguf")],
    out: Out,
) -> None:
    """Write a packed model's codes in another format, bit for bit."""
    from grace.quant.export import export as convert

    with job(out, folders=(packed,), subcommand="export"):
        convert(packed, format, out)


@commands.command()
def card(
    model: Annotated[Path, typer.Argument(help="packed folder or an export")],
    out: Annotated[Path, typer.Option(help="the README.md to write")],
    license: Annotated[str | None, typer.Option(help="a hub's identifier, such as apache-2.0")] = None,
    base_model: Annotated[str | None, typer.Option(help="hub id of the model that was quantised")] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="hub id of training data; repeat for several")] = None,
    metrics: Annotated[Path | None, typer.Option(help="an experiment's metrics.json")] = None,
    row: Annotated[str, typer.Option(help="whose scores to show")] = "grace.int4",
) -> None:
    """Write a model card with what its folder does not know: licence, base model, data and scores."""
    from grace.files import read_json
    from grace.quant.card import Origin, scores_of, write_card

    scores = scores_of(read_json(metrics), row) if metrics else {}
    write_card(model, Origin(license, base_model, tuple(dataset or ()), scores), out)
