"""A table as data, and its three written forms: Markdown, CSV and LaTeX."""

import csv
import io
import math
from dataclasses import dataclass, field, replace

from grace.report.formatting import MARKUP, markdown_text, number

WIDE = 8  # with more columns than that, errors stand under the numbers


@dataclass
class Cell:
    """A number with its error, the paper's number, and how it stands out: "", "best", "second" or "significant".

    `files`: what it is computed from, as paths below the experiment's folder.
    """

    value: float | None = None
    stderr: float | None = None
    paper: float | None = None
    mark: str = ""
    text: str | None = None  # shown instead of the number
    digits: int = 1
    signed: bool = False
    files: tuple[str, ...] = ()


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


@dataclass(frozen=True)
class Texts:
    """A cell as texts, any of which may be empty; with the phantoms, the numbers of a column stand under each other."""

    number: str
    error: str  # without its ±
    star: str
    paper: str
    before_error: str = ""  # phantom digits before the error
    after: str = ""  # phantom text at the end


def cell_texts(cell: Cell) -> Texts:
    """The texts of one cell, without phantoms."""
    paper = "" if cell.paper is None else number(cell.paper, _digits(cell.paper))
    if cell.text is not None:
        return Texts(cell.text, "", "", paper)
    plus = "+" if cell.signed and cell.value is not None and round(cell.value, cell.digits) >= 0 else ""
    error = number(cell.stderr, cell.digits) if cell.stderr is not None and math.isfinite(cell.stderr) else ""
    return Texts(plus + number(cell.value, cell.digits), error, "*" if cell.mark == "significant" else "", paper)


def aligned(table: Table) -> list[list[Texts]]:
    """The texts of every cell [lines][columns], with phantoms."""
    columns = []
    for cells in zip(*(line.cells for line in table.lines), strict=True):
        texts = [cell_texts(cell) for cell in cells]
        widest = max((text.error for text in texts), key=len)
        star = "*" if any(text.star for text in texts) else ""
        tail = (f" ± {widest}" if widest else "") + star
        padded = []
        for cell, text in zip(cells, texts, strict=True):
            if text.error:
                before, after = "0" * (len(widest) - len(text.error)), "" if text.star else star
            else:
                before, after = "", "" if cell.text is not None else tail
            padded.append(replace(text, before_error=before, after=after))
        columns.append(padded)
    return [list(line) for line in zip(*columns, strict=True)]


def markdown(table: Table) -> str:
    """GitHub's Markdown, title and footnotes included."""
    header = [*map(markdown_text, [*table.heads, *table.columns]), "Run"]
    lines = [f"# {table.title}", ""]
    if table.lines:
        lines += [_md_line(header), _md_line(["---"] * len(table.heads) + ["---:"] * len(table.columns) + ["---"])]
    group = ""
    for line in table.lines:
        if line.group and line.group != group:
            lines.append(_md_line([f"*{markdown_text(line.group)}*"] + [""] * (len(header) - 1)))
        group = line.group
        lines.append(_md_line([*map(markdown_text, line.heads), *map(_md_cell, line.cells), markdown_text(line.run)]))
    lines += ["", *(f"{place}. {markdown_text(note, MARKUP)}" for place, note in enumerate(table.notes, 1))]
    return "\n".join(lines).rstrip() + "\n"


def _md_line(texts: list[str]) -> str:
    return "| " + " | ".join(texts) + " |"


def _md_cell(cell: Cell) -> str:
    text = cell_texts(cell)
    number_ = markdown_text(text.number)
    shown = {"best": f"**{number_}**", "second": f"<u>{number_}</u>"}.get(cell.mark, number_)
    error = f" ± {text.error}" if text.error else ""
    return f"{shown}{error}{text.star}" + (f"<br>paper {text.paper}" if text.paper else "")


def _digits(paper: float) -> int:
    """As many as the paper gives: none for sizes, one for scores, two for ratios."""
    return 2 if round(paper, 1) != paper else 0 if paper >= 1000 and paper == int(paper) else 1


def comma_separated(table: Table) -> str:
    """CSV: for each column its value, standard error and the paper's value; numbers as they are,
    not rounded for show.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    header = ["group", *table.heads]
    for column in table.columns:
        header += [column, f"{column} stderr", f"{column} paper", f"{column} mark"]
    writer.writerow([*header, "run"])
    for line in table.lines:
        fields = [line.group, *line.heads]
        for cell in line.cells:
            value = cell.text if cell.text is not None and cell.value is None else _exact(cell.value)
            fields += [value, _exact(cell.stderr), _exact(cell.paper), cell.mark]
        writer.writerow([*fields, line.run])
    return out.getvalue()


def _exact(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.6g}"


_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "&": r"\&",
    "%": r"\%",
    "_": r"\_",
    "#": r"\#",
    "$": r"\$",
    "[": "{[}",  # at the start of a row a bare one would be an argument of the one before
    "*": "{*}",
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
    "“": "``",
    "”": "''",
    "’": "'",
    "→": r"$\to$",
    "✓": r"$\surd$",
}


def latex(table: Table) -> str:
    """A `table*` environment in booktabs style, no wider than the page; needs \\usepackage{booktabs,graphicx}.

    The paper's numbers stand in a row of their own under ours.
    """
    header = [*table.heads, *table.columns, "Run"]
    texts = [_tex_width([line.heads[place] for line in table.lines]) for place in range(len(table.heads))]
    columns = "".join(texts) + "r" * len(table.columns) + _tex_width([line.run for line in table.lines])
    lines = [
        r"\begin{table*}[t]",
        r"\centering\small",
        rf"\caption{{{_tex(table.title.partition(': ')[2] or table.title)}}}",
        rf"\label{{tab:{table.name}}}",
    ]
    if table.lines:
        lines += [
            r"\resizebox{\ifdim\width>\textwidth\textwidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            " & ".join(map(_tex, header)) + r" \\",
            r"\midrule",
            *_tex_lines(table, len(header)),
            r"\bottomrule",
            r"\end{tabular}}",
        ]
    lines += [rf"\par\smallskip\raggedright\footnotesize {place}. {_tex(n)}" for place, n in enumerate(table.notes, 1)]
    return "\n".join([*lines, r"\end{table*}"]) + "\n"


def _tex_width(texts: list[str]) -> str:
    """A column of texts: as wide as they are, or a paragraph where they are long."""
    longest = max(map(len, texts), default=0)
    return "l" if longest <= 24 else rf"p{{{min(longest, 60) // 12 + 1}cm}}"


def _tex_lines(table: Table, width: int) -> list[str]:
    lines, group = [], ""
    wide = len(table.columns) > WIDE
    for line, texts in zip(table.lines, aligned(table), strict=True):
        if line.group != group:
            lines += [r"\midrule"] if lines else []
            lines += [rf"\multicolumn{{{width}}}{{l}}{{\emph{{{_tex(line.group)}}}}} \\"] if line.group else []
        group = line.group
        if wide:
            texts = [replace(text, error="", before_error="", after="") for text in texts]
        cells = [_tex_cell(cell, text) for cell, text in zip(line.cells, texts, strict=True)]
        lines.append(" & ".join([*map(_tex, line.heads), *cells, _tex(line.run)]) + r" \\")
        below = []
        if wide:
            below.append((r"\quad $\pm$", [_tex(cell_texts(cell).error) for cell in line.cells]))
        below.append((r"\quad paper", [_tex_paper(text) for text in texts]))
        for name, found in below:
            if any(found):
                lines.append(" & ".join([name, *[""] * (len(line.heads) - 1), *found, ""]) + r" \\")
    return lines


def _tex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def _tex_cell(cell: Cell, text: Texts) -> str:
    shown = _tex(text.number)
    shown = {"best": rf"\textbf{{{shown}}}", "second": rf"\underline{{{shown}}}"}.get(cell.mark, shown)
    if text.error:
        shown += rf" $\pm$ {_phantom(text.before_error)}{_tex(text.error)}"
    return shown + text.star + _phantom(text.after)


def _tex_paper(text: Texts) -> str:
    if not text.paper:
        return ""
    tail = f" ± {text.before_error}{text.error}{text.star}{text.after}" if text.error else text.after
    return rf"\emph{{{_tex(text.paper)}}}{_phantom(tail)}"


def _phantom(text: str) -> str:
    return rf"\phantom{{{_tex(text)}}}" if text else ""
