"""What `grace report ...` calls. Paths are folders, `out` of metrics a file and of page an HTML file.

Models whose predictions are not there (yet) are left out, and the tables and the page say which.
"""

from pathlib import Path


def tables(results: Path, out: Path) -> None:
    """Write the tables as Markdown, CSV and LaTeX into the folder `out`."""
    from grace.report.tables.write import write_tables
    from grace.results.read import read_results

    write_tables(read_results(results, partial=True), out)


def figures(results: Path, out: Path) -> None:
    """Draw every figure as SVG and PNG into the folder `out`."""
    from grace.report.figures.write import write_figures
    from grace.results.read import read_results

    write_figures(read_results(results, partial=True), out)


def metrics(results: Path, out: Path) -> None:
    """Write the numbers that `dvc metrics diff` compares to the JSON file `out`."""
    from grace.report.metrics import write_metrics
    from grace.results.read import read_results

    write_metrics(read_results(results, partial=True), out)


def speed(results: Path, out: Path) -> None:
    """Write what is made from what was timed, tables, figures and numbers, into the folder `out`."""
    from grace.report.speed import write_speed
    from grace.results.read import read_results

    write_speed(read_results(results, partial=True), out)


def page(results: Path, out: Path) -> None:
    """Build the self-contained page `out` (index.html)."""
    from grace.report.page.write import write_page
    from grace.results.read import read_results

    write_page(read_results(results, partial=True), out)
