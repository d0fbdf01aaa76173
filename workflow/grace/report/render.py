"""A table as data, and its three written forms: Markdown, CSV and LaTeX."""

import csv
import io
import math
from dataclasses import dataclass, field


@dataclass
class Cell:
    """A number with its error, the paper's number, and how it stands out: "", "best", "second" or "significant"."""

    value: float | None = None
    stderr: float | None = None
    paper: float | None = None
    mark: str = ""
    text: str | None = None  # shown instead of a number
    digits: int = 1
    signed: bool = False


@dataclass
class Line:
    """A row: leading texts, then cells; `group` starts a block of rows that are ranked together."""

    heads: list[str]
    cells: list[Cell]
    group: str = ""
    run: str = ""


@dataclass
class Table:
    """What is written.

    Attributes:
        name: file name without ending.
        title: one sentence.
        heads, columns: names of the leading texts and of the cells.
        lines: the rows.
        notes: footnotes, each a sentence or two.
    """

    name: str
    title: str
    heads: list[str]
    columns: list[str]
    lines: list[Line] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def number(value: float | None, digits: int = 1) -> str:
    """A number for people; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{round(value, digits) + 0.0:,.{digits}f}".replace("-", "−")  # + 0.0: no minus before a zero


def _shown(cell: Cell) -> str:
    plus = "+" if cell.signed and cell.value is not None and round(cell.value, cell.digits) >= 0 else ""
    return plus + number(cell.value, cell.digits) + ("*" if cell.mark == "significant" else "")


def cell_texts(cell: Cell) -> tuple[str, str, str]:
    """Number, ` ± error` and `paper number` as texts; the last two may be empty."""
    if cell.text is not None:
        return cell.text, "", ""
    error = f" ± {number(cell.stderr, cell.digits)}" if cell.stderr is not None and math.isfinite(cell.stderr) else ""
    return _shown(cell), error, "" if cell.paper is None else f"paper {number(cell.paper, _digits(cell.paper))}"


def p_text(p: float) -> str:
    """A p value for people."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}" if p < 0.1 else f"p = {p:.2f}"


def markdown(table: Table) -> str:
    """GitHub's Markdown, title and footnotes included."""
    header = [*table.heads, *table.columns, "Run"]
    lines = [f"# {table.title}", ""]
    if table.lines:
        lines += [_md_line(header), _md_line(["---"] * len(table.heads) + ["---:"] * len(table.columns) + ["---"])]
    group = ""
    for line in table.lines:
        if line.group and line.group != group:
            lines.append(_md_line([f"*{line.group}*"] + [""] * (len(header) - 1)))
        group = line.group
        lines.append(_md_line([*line.heads, *map(_md_cell, line.cells), line.run]))
    lines += ["", *(f"{number}. {note}" for number, note in enumerate(table.notes, 1))]
    return "\n".join(lines).rstrip() + "\n"


def _md_line(texts: list[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"


def _md_cell(cell: Cell) -> str:
    shown, error, paper = cell_texts(cell)
    shown = {"best": f"**{shown}**", "second": f"<u>{shown}</u>"}.get(cell.mark, shown)
    return f"{shown}{error}" + (f"<br>{paper}" if paper else "")


def _digits(paper: float) -> int:
    """As many as the paper gives: none for sizes, one for scores, two for ratios."""
    return 2 if round(paper, 1) != paper else 0 if paper >= 1000 and paper == int(paper) else 1


def comma_separated(table: Table) -> str:
    """CSV: for each column its value, standard error and the paper's value; numbers as they are, not rounded for show."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    header = ["group", *table.heads]
    for column in table.columns:
        header += [column, f"{column} stderr", f"{column} paper", f"{column} mark"]
    writer.writerow([*header, "run"])
    for line in table.lines:
        fields = [line.group, *line.heads]
        for cell in line.cells:
            value = cell.text if cell.text is not None else _exact(cell.value)
            fields += [value, _exact(cell.stderr), _exact(cell.paper), cell.mark]
        writer.writerow([*fields, line.run])
    return out.getvalue()


def _exact(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.6g}"


_LATEX = {
    "&": r"\&",
    "%": r"\%",
    "_": r"\_",
    "#": r"\#",
    "$": r"\$",
    "±": r"$\pm$",
    "−": "$-$",
    "–": "--",
    "×": r"$\times$",
}
_LATEX |= {
    "<": "$<$",
    ">": "$>$",
    "²": "$^2$",
    "α": r"$\alpha$",
    "Δ": r"$\Delta$",
    "≥": r"$\ge$",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def latex(table: Table) -> str:
    """A `table` environment in booktabs style; needs \\usepackage{booktabs}."""
    header = [*table.heads, *table.columns, "Run"]
    columns = "l" * len(table.heads) + "r" * len(table.columns) + "l"
    lines = [
        r"\begin{table*}[t]",
        r"\centering\scriptsize",
        rf"\caption{{{_tex(table.title)}}}",
        rf"\label{{tab:{table.name}}}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        " & ".join(map(_tex, header)) + r" \\",
        r"\midrule",
    ]
    group = ""
    for line in table.lines:
        if line.group and line.group != group:
            rule = [r"\midrule"] if group else []
            lines += [*rule, rf"\multicolumn{{{len(header)}}}{{l}}{{\emph{{{_tex(line.group)}}}}} \\"]
        group = line.group
        lines.append(" & ".join([*map(_tex, line.heads), *map(_tex_cell, line.cells), _tex(line.run)]) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    lines += [rf"\par\smallskip\raggedright {number}. {_tex(note)}" for number, note in enumerate(table.notes, 1)]
    return "\n".join([*lines, r"\end{table*}"]) + "\n"


def _tex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def _tex_cell(cell: Cell) -> str:
    if cell.text is not None:
        return _tex(cell.text)
    shown = _tex(_shown(cell))
    shown = {"best": rf"\textbf{{{shown}}}", "second": rf"\underline{{{shown}}}"}.get(cell.mark, shown)
    if cell.stderr is not None and math.isfinite(cell.stderr):
        shown += rf"\,{{\tiny$\pm${number(cell.stderr, cell.digits)}}}"
    return shown if cell.paper is None else rf"{shown} [{number(cell.paper, _digits(cell.paper))}]"
