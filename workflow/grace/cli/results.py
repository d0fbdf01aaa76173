"""What people read, and where it comes from: report, comparison of versions, provenance."""

from pathlib import Path
from typing import Annotated

import typer

from grace.cli.common import Out, group, job

Results = Annotated[Path, typer.Option(help="the experiment's results folder")]

commands = typer.Typer()
report_commands = group("Tables, figures, metrics and the page.")
records_commands = group("Snakemake's records of how each output was made, kept beside the results.")


def _answers(results: Path) -> tuple[Path, ...]:
    """What stands for everything that tables, figures and metrics are made of."""
    folders = [path for part in ("data", "teacher", "students") for path in (results / part).rglob("manifest.json")]
    return results / "config/experiment.json", results / "overlap.json", *folders


def _timed(results: Path) -> tuple[Path, ...]:
    """The same with what was timed, which may still be going on while the others are made."""
    return *_answers(results), *(results / "bench").glob("*.*")


@report_commands.command("tables")
def report_tables(results: Results, out: Out) -> None:
    """Write the tables as Markdown, CSV and LaTeX, with the paper's values beside."""
    from grace.report.commands import tables

    with job(out, files=_answers(results), subcommand="report-tables"):
        tables(results, out)


@report_commands.command("figures")
def report_figures(results: Results, out: Out) -> None:
    """Draw the figures as SVG and PNG."""
    from grace.report.commands import figures

    with job(out, files=_answers(results), subcommand="report-figures"):
        figures(results, out)


@report_commands.command("metrics")
def report_metrics(results: Results, out: Out) -> None:
    """Write the numbers that versions are compared by."""
    from grace.report.commands import metrics

    with job(out, files=_answers(results), subcommand="report-metrics"):
        metrics(results, out)


@report_commands.command("speed")
def report_speed(results: Results, out: Out) -> None:
    """Write tables, figures and numbers of what was timed."""
    from grace.report.commands import speed

    with job(out, files=_timed(results), subcommand="report-speed"):
        speed(results, out)


@report_commands.command("page")
def report_page(results: Results, out: Out) -> None:
    """Build the self-contained HTML page."""
    from grace.report.commands import page

    with job(out, files=_timed(results), subcommand="report-page"):
        page(results, out)


@commands.command()
def diff(
    a: Annotated[str, typer.Argument(help="the older version: a git revision or a results folder")],
    b: Annotated[str, typer.Argument(help="the newer version")],
    experiment: Annotated[str, typer.Option(help="which folder of results/ to take from a revision")] = "demo",
    repository: Annotated[Path, typer.Option(help="the repository that the revisions are of")] = Path("."),
    markdown: Annotated[Path | None, typer.Option(help="write it for a pull request")] = None,
    page: Annotated[Path | None, typer.Option(help="write it for a browser")] = None,
    fail_on_regression: Annotated[bool, typer.Option(help="exit 1 when a drop is significant")] = False,
    json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables")] = False,
) -> None:
    """Say what changed between two versions of the results, with a paired test for every change."""
    from grace.diff.compare import diff as compare

    compare(a, b, experiment, repository, markdown, page, fail_on_regression, json)


@commands.command()
def merge(
    branch: Annotated[str, typer.Argument(help="the branch to merge into the one that is checked out")],
    repository: Annotated[Path, typer.Option(help="where Snakemake runs")] = Path("."),
) -> None:
    """Merge a branch that built results too, so that nothing is built twice; `dvc repro` and a commit follow."""
    from grace.provenance.merge import merge as unite

    for experiment, taken in unite(branch, repository).items():
        print(f"{experiment}: {len(taken)} outputs taken from {branch}")
    print("now `dvc repro`, `git add -A` and `git commit`")


@commands.command()
def provenance(
    path: Annotated[Path, typer.Argument(help="an output file or folder of results/")],
    cell: Annotated[
        tuple[str, str] | None,
        typer.Option(help="row and column of a table: the predictions, models and parameters behind that number"),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="print JSON instead of a tree")] = False,
    everything: Annotated[bool, typer.Option("--all", help="do not shorten long lists")] = False,
) -> None:
    """Tell what made an output, or one number of a table, back to the data."""
    if cell is not None:
        from grace.provenance.cell import cell as tell_cell

        tell_cell(path, *cell, json)
        return
    from grace.provenance.tree import provenance as tell

    tell(path, json, everything)


@records_commands.command("save")
def records_save(results: Annotated[Path, typer.Argument(help="a results folder")]) -> None:
    """Copy Snakemake's records into the folder's provenance.jsonl, which travels with DVC."""
    from grace.provenance.snakemake_records import save

    print(f"{results}: {save(results)} records saved")


@records_commands.command("restore")
def records_restore(results: Annotated[Path, typer.Argument(help="a results folder")]) -> None:
    """Give Snakemake back the records of outputs that are here unchanged; the Snakefile does so by itself."""
    from grace.provenance.snakemake_records import restore

    print(f"{results}: {restore(results)} records restored")


@commands.command()
def accept(
    reason: Annotated[str, typer.Option(help="why the change leaves every result as it is; kept in the provenance")],
    subcommand: Annotated[
        list[str] | None, typer.Option(help="accept for these alone, such as `train`; repeat the flag")
    ] = None,
    configfile: Annotated[Path, typer.Option(help="the experiment")] = Path("config.yaml"),
) -> None:
    """Accept a change of code that is known to be harmless, so that it re-runs nothing."""
    from grace.provenance.accept import accept_code

    for change in accept_code(configfile, reason, subcommand):
        print(f"{change['subcommand']}: accepted {', '.join(change['changed'])}")


@commands.command()
def verify(results: Annotated[Path, typer.Argument(help="a results folder")]) -> None:
    """Re-hash a results tree and name every file that differs, is missing or is not listed."""
    from grace.provenance.verify import verify as check

    check(results)
