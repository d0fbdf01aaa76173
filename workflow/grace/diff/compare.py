"""What changed between two versions of an experiment's results, and what of it is more than noise.

Models are compared on the questions that both versions asked (the same sample_id with the same right answer), version
B less version A, seed by seed. The test is about these very models: McNemar's exact test clustered by image for each
benchmark, the paired bootstrap for averages. Holm's correction runs over every comparison whose predictions are not
identical: a test that cannot reject costs the others nothing (Tarone 1990).
"""

from pathlib import Path

import numpy as np

from grace.diff.model import Change, Difference, Flip, Moved
from grace.diff.questions import Reader, answers
from grace.diff.render import to_html, to_json, to_markdown, to_terminal
from grace.diff.revisions import results_of
from grace.errors import GraceError
from grace.files import MANIFEST, sha256, whole_file
from grace.report.tables.scores import AVERAGE
from grace.results.paired import compare, holm
from grace.results.read import Row, read_predictions_manifest
from grace.results.statistics import Scores

FLIPS, FLIPS_OF_ONE = 200, 40  # answers that are kept to be shown: in all, and of one model on one benchmark


def compare_folders(a: Path, b: Path, names: tuple[str, str] | None = None) -> Difference:
    """Compare two results folders. Raises GraceError where they share no model or no benchmark."""
    from grace.diff.context import artifacts, environment, questions, settings, speed

    found = Difference(*(names or (str(a), str(b))))
    models = [_models(side) for side in (a, b)]
    shared = [key for key in models[1] if key in models[0]]
    if not shared:
        raise GraceError(
            f"{a} and {b}: no model has predictions in both; give two versions of one experiment, or pull their "
            "predictions"
        )
    found.only = {
        f"models only in {name}": [f"{row} seed {seed}" for row, seed in side if (row, seed) not in other]
        for name, side, other in (("A", models[0], models[1]), ("B", models[1], models[0]))
    }
    seeds: dict[Row, list[int]] = {}
    for row, seed in shared:
        seeds.setdefault(row, []).append(seed)
    lonely: dict[str, dict[str, list[str]]] = {"A": {}, "B": {}}
    reader = Reader()
    for row, listed in seeds.items():
        _compare_row(found, reader, (a, b), row, tuple(listed), lonely)
    found.only |= {f"benchmarks only in {name}": _lonely(names, len(shared)) for name, names in lonely.items()}
    found.only = {key: value for key, value in found.only.items() if value}
    if not found.changes:
        raise GraceError(
            f"{a} and {b}: no model was asked the same questions in both; compare versions with equal benchmarks"
        )
    changed = [(change, change.comparison) for change in found.changes if change.comparison is not None]
    corrected = holm([comparison.p_questions for _, comparison in changed])
    for (change, _), p in zip(changed, corrected, strict=True):
        change.p = float(p)
    found.flips = _flips(found)
    found.settings, found.environment = settings(a, b), environment(a, b)
    found.artifacts, found.speed = artifacts(a, b), speed(a, b)
    found.questions = questions(b, a, found.flips)
    return found


def _models(folder: Path) -> dict[tuple[Row, int], Path]:
    """Every model with predictions, by row and seed."""
    found = {}
    for manifest in sorted(folder.glob(f"**/predictions/{MANIFEST}")):
        parts = manifest.parent.parent.relative_to(folder).parts
        if parts == ("teacher",):
            found[Row("teacher", "bf16"), 0] = manifest.parent
        elif len(parts) == 4 and parts[0] == "students" and parts[3].removeprefix("seed").isdigit():
            found[Row(parts[1], parts[2]), int(parts[3].removeprefix("seed"))] = manifest.parent
    return found


def _compare_row(
    found: Difference, reader: Reader, sides: tuple[Path, Path], row: Row, seeds: tuple[int, ...], lonely: dict
) -> None:
    folders = [[side / row.folder(seed) / "predictions" for seed in seeds] for side in sides]
    manifests = [[read_predictions_manifest(folder)["benchmarks"] for folder in side] for side in folders]
    names = [set.intersection(*(set(m) for m in side)) for side in manifests]
    for side, other in (("A", 1), ("B", 0)):
        for seed, own, others in zip(seeds, manifests[1 - other], manifests[other], strict=True):
            for benchmark in own.keys() - others.keys():
                lonely[side].setdefault(benchmark, []).append(f"{row} seed {seed}")
    shared = [name for name in manifests[1][0] if name in names[0] & names[1]]
    if all(_same_bytes(folders, benchmark) for benchmark in shared):
        changes = [_unchanged(row, seeds, benchmark, manifests[1]) for benchmark in shared]
        pairs = []
    else:
        compared = [_compare_benchmark(found, reader, folders, row, seeds, benchmark) for benchmark in shared]
        compared = [each for each in compared if each is not None]
        changes, pairs = [change for change, _ in compared], [pair for _, pair in compared]
    found.changes += changes
    if len(changes) > 1:
        before, after = (
            sum(getattr(change, side) for change in changes) / len(changes) for side in ("before", "after")
        )
        average = Change(row, AVERAGE, seeds, before, after, sum(change.shared for change in changes))
        if any(change.comparison is not None for change in changes):
            average.comparison = compare([b for _, b in pairs], [a for a, _ in pairs])
        found.changes.append(average)


def _lonely(names: dict[str, list[str]], models: int) -> list[str]:
    """Benchmarks that only one version asked, with the models where it is not so for all."""
    return [
        benchmark if len(names[benchmark]) == models else f"{benchmark} of {', '.join(names[benchmark])}"
        for benchmark in sorted(names)
    ]


def _same_bytes(folders: list[list[Path]], benchmark: str) -> bool:
    paths = [[folder / f"{benchmark}.parquet" for folder in side] for side in folders]
    return all(
        a.is_file() and b.is_file() and a.stat().st_size == b.stat().st_size and sha256(a) == sha256(b)
        for a, b in zip(*paths, strict=True)
    )


def _unchanged(row: Row, seeds: tuple[int, ...], benchmark: str, manifests: list[dict]) -> Change:
    """A benchmark whose files are the same byte for byte: what the manifests say of it."""
    score = 100 * sum(manifest[benchmark]["score"] for manifest in manifests) / len(manifests)
    return Change(row, benchmark, seeds, score, score, manifests[0][benchmark]["questions"])


def _compare_benchmark(
    found: Difference, reader: Reader, folders: list[list[Path]], row: Row, seeds: tuple[int, ...], benchmark: str
) -> tuple[Change, tuple[Scores, Scores]] | None:
    """One benchmark of one row, over the questions that every seed of both versions has; None where there are none."""
    paths = [[folder / f"{benchmark}.parquet" for folder in side] for side in folders]
    before, after = ([reader.read(path) for path in side] for side in paths)
    both = reader.shared([questions for questions, _ in before], [questions for questions, _ in after])
    if not len(both.samples):
        found.only.setdefault("benchmarks whose questions all differ", []).append(f"{row} {benchmark}")
        return None
    points = np.stack([p[place] for (_, p), place in zip((*before, *after), both.places, strict=True)])
    pair = Scores(points[: len(seeds)], both.images, seeds), Scores(points[len(seeds) :], both.images, seeds)
    change = Change(
        row, benchmark, seeds, float(pair[0].values.mean()), float(pair[1].values.mean()), len(both.samples),
        both.added, both.removed, both.reworded, both.redefined,
    )  # fmt: skip
    moved = pair[0].values != pair[1].values
    if moved.any():
        change.comparison = compare([pair[1]], [pair[0]])
        found.flipped += int(moved.sum())
        found.moved[row, benchmark] = [
            Moved(seed, a, b, both.samples[at], both.targets[at], (new[at] - old[at]) / 100)
            for seed, a, b, at, old, new in zip(seeds, *paths, moved, pair[0].values, pair[1].values, strict=True)
        ]
    return change, pair


def _flips(found: Difference) -> list[Flip]:
    """The flips to show: of the most telling comparisons first, and not all of one."""
    changed = {(c.row, c.benchmark): (c.p, c.comparison.difference) for c in found.changes if c.comparison is not None}
    flips: list[Flip] = []
    for row, benchmark in sorted(found.moved, key=changed.__getitem__):
        left = min(FLIPS_OF_ONE, FLIPS - len(flips))
        seeds = found.moved[row, benchmark]
        for number, moved in enumerate(seeds):
            shown = moved.samples[: -(-left // (len(seeds) - number))]  # each seed its part of what is left
            if not len(shown):
                continue
            left -= len(shown)
            about = (moved.targets[: len(shown)], answers(moved.a, shown), answers(moved.b, shown))
            said = zip(shown, *about, moved.change[: len(shown)], strict=True)
            flips += [
                Flip(row, moved.seed, benchmark, str(sample), str(target), before, after, float(change))
                for sample, target, before, after, change in said
            ]
    return flips


def diff(
    a: str | Path,
    b: str | Path,
    experiment: str = "demo",
    repository: Path = Path("."),
    markdown: Path | None = None,
    page: Path | None = None,
    fail_on_regression: bool = False,
    as_json: bool = False,
) -> Difference:
    """Compare two results folders or git revisions, print what changed, and return it.

    Args:
        a, b: the older and the newer version: a results folder, or a git revision of `repository`.
        experiment: which folder of `results/` to take from a revision.
        markdown, page: files to write for a pull request or a browser.
        fail_on_regression: raise a GraceError when a drop is significant.
        as_json: print JSON instead of tables.
    """
    with results_of(a, experiment, repository) as first, results_of(b, experiment, repository) as second:
        found = compare_folders(first, second, (str(a), str(b)))
    for path, render in ((markdown, to_markdown), (page, to_html)):
        if path is not None:
            with whole_file(path) as part:
                part.write_text(render(found))
    if as_json:
        print(to_json(found))
    else:
        to_terminal(found)
    if fail_on_regression and found.regressions:
        worst, drop = min(
            ((each, each.comparison.difference) for each in found.regressions if each.comparison is not None),
            key=lambda pair: pair[1],
        )
        raise GraceError(
            f"{b}: {len(found.regressions)} significant drops against {a}, the largest {drop:.1f} "
            f"points ({worst.row} on {worst.benchmark}); mend it, or run without --fail-on-regression"
        )
    return found
