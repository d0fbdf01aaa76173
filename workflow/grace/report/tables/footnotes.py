"""The footnotes of the score tables: what a number is, what was tested, and what the paper's number beside it means."""

from grace.benchmarks.question_points import SAID
from grace.report.formatting import number
from grace.report.paper import (
    ARXIV,
    AVERAGE,
    canonical,
    label,
    made_with,
    paper_average,
    paper_family,
    paper_numbers,
    row_role,
    unlike,
)
from grace.report.paper_setup import asked_otherwise
from grace.results.read import TEACHER, Results, Row
from grace.results.statistics import ALPHA, POWER

MISSING_SHOWN = 6


def notes(results: Results, paper_table: str, groups: list, tests) -> list[str]:
    """Footnotes of one table; `groups` and `tests` are its rows and its family of tests."""
    if not groups:
        return [f"The experiment `{results.experiment.experiment}` ran nothing that belongs here."]
    found = [
        _numbers(results),
        *_seeds(results, groups),
        *_paper(results, paper_table),
        *protocols(results),
        *_averages(results, paper_table),
    ]
    found += [*_forms(results), *_tests(tests), *_differences(results, groups)]
    if any(TEACHER in group.rows for group in groups):
        found.append("The teacher is not ranked.")
    return found + _elsewhere(results, paper_table) + gaps(results)


def gaps(results: Results) -> list[str]:
    """What partial results lack."""
    lacking = results.missing
    if not lacking:
        return []
    rest = f" and {len(lacking) - MISSING_SHOWN} more" if len(lacking) > MISSING_SHOWN else ""
    return [
        f"Partial results: {len(lacking)} set{'s' * (len(lacking) > 1)} of predictions "
        f"{'are' if len(lacking) > 1 else 'is'} not here ({', '.join(lacking[:MISSING_SHOWN])}{rest}), and everything "
        "is computed without them."
    ]


def _numbers(results: Results) -> str:
    return (
        "Points, mean over seeds ± standard error. The error is clustered by image and holds the variance between "
        f"seeds where there are several; a single seed's error covers the questions alone. Questions: {sizes(results)}."
    )


def _seeds(results: Results, groups: list) -> list[str]:
    """Which seeds the rows are shown on, where some have others too."""
    partial = [group for group in groups if any(_others(results, group, row) for row in group.rows)]
    if not partial:
        return []
    said = [
        "Rows that are compared are shown on the same seeds, those that they share; what else was run is in column Run."
    ]
    if any(group.apart for group in partial):
        said[0] += " A row that lacks some of these is marked there, and is neither ranked nor compared."
    return said


def _others(results: Results, group, row: Row) -> bool:
    return row != TEACHER and set(results.seeds[row]) != set(group.seeds)


def _paper(results: Results, paper_table: str) -> list[str]:
    experiment = results.experiment
    family, numbers = paper_family(experiment), paper_numbers()
    if family is None or not ((numbers["model"] == family) & (numbers["table"] == paper_table)).any():
        return [
            f"{ARXIV}'s own numbers are not shown: it has none for these models. Its claims stand in the table of "
            "claims."
        ]
    if others := asked_otherwise(experiment):
        return [f"{ARXIV}'s own numbers are not shown, because {' and '.join(others)}."]
    source = "the authors' released run" if family == "Qwen3-VL" else ARXIV
    said = [f"“paper” is the number of {source} for {family}."]
    differing = [
        reason for row in results.rows() for reason in unlike(experiment, row_role(experiment, row), row.precision)
    ]
    if differing:
        said.append(
            f"It does not stand beside students that were made otherwise: {'; '.join(dict.fromkeys(differing))}."
        )
    return said


def protocols(results: Results) -> list[str]:
    """What each column was asked under, and which of the paper's numbers were made so."""
    asked: dict[str, list[str]] = {}
    unknown, other = [], []
    for name in results.benchmarks:
        title = results.mirrors[name]
        found = None if name in results.imitations else made_with(results.experiment, canonical(title))
        if found is None:
            continue
        asked.setdefault(found[1], []).append(title)
        if found[0] is None:
            unknown.append(title)
        elif not found[0]:
            other.append(title)
    if not asked:
        return []
    said = ["Protocols: " + "; ".join(f"{protocol} for {', '.join(names)}" for protocol, names in asked.items()) + "."]
    shown = paper_family(results.experiment) and not asked_otherwise(results.experiment)
    if unknown and shown:
        said.append(f"Which protocol the paper's numbers on {', '.join(unknown)} were made with is not known.")
    if other and shown:
        said.append(f"The paper's numbers on {', '.join(other)} were made under another protocol and are left out.")
    return said


def _averages(results: Results, paper_table: str) -> list[str]:
    left_out = [results.mirrors[name] for name in results.benchmarks if name not in results.averaged]
    what = f"the {len(results.averaged)} benchmarks other than {', '.join(left_out)}" if left_out else "all benchmarks"
    said = f"The average is the plain mean of {what}"
    theirs = [] if asked_otherwise(results.experiment) else paper_average(results.experiment, paper_table)
    if theirs and sorted(theirs) != sorted(canonical(results.mirrors[name]) for name in results.averaged):
        said += f"; the paper's is that of {', '.join(theirs)}"
    return [said + "."]


def _forms(results: Results) -> list[str]:
    """Benchmarks that are not counted by the mean score, and imitations of such."""
    found = {}
    for name in results.benchmarks:
        found.setdefault(results.form(name), name)
    said = [f"{results.mirrors[name]}: {SAID[form]}." for form, name in found.items() if form in SAID]
    return said


def _tests(tests) -> list[str]:
    count = len(tests.shown)
    if not count:
        return []
    return [
        f"Bold: best of its block, underlined: second best after a bold one, each only where it beats the next at "
        f"{ALPHA:.0%} after Holm's correction over this table's {count} test{'s' * (count > 1)} (Δ average included; * "
        "marks its significant ones). One benchmark of right or wrong answers: McNemar's exact test, clustered by "
        "image. All else: paired bootstrap over images. With several seeds also t tests with the variance between "
        "seeds, and the largest p counts; with one seed a mark is about these very models, not the method."
    ]


def _differences(results: Results, groups: list) -> list[str]:
    names = [f"{label(results.experiment, g.reference)} {g.reference.precision}" for g in groups if g.reference]
    if not names:
        return []
    return [
        f"Δ average: difference of the averages from {', '.join(dict.fromkeys(names))}, paired by question and by "
        f"seed, ± its standard error. Detectable Δ: the true difference that this very comparison, with its seeds, "
        f"finds with {POWER:.0%} power at {ALPHA:.0%}, uncorrected."
    ]


def sizes(results: Results) -> str:
    """How many questions each benchmark asks."""
    counts = {}
    for name in results.benchmarks:
        row = next((row for row in results.seeds if results.has(row, name)), None)
        if row is not None:
            counts[name] = results.scores(row, name).values.shape[1]
    if len(set(counts.values())) == 1:
        return f"{next(iter(counts.values())):,} in each benchmark"
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _elsewhere(results: Results, paper_table: str) -> list[str]:
    """Rows of the paper's table that are other people's methods, which this pipeline does not run."""
    numbers = paper_numbers()
    shown = None if asked_otherwise(results.experiment) else paper_family(results.experiment)
    numbers = numbers[numbers["model"] == (shown or "")]
    others = numbers[(numbers["table"] == paper_table) & (numbers["role"] == "") & (numbers["benchmark"] == AVERAGE)]
    listed = ", ".join(f"{row} {number(value)}" for row, value in zip(others["row"], others["value"], strict=True))
    return [f"The paper's table also lists (average): {listed}; these methods are not run here."] if listed else []
