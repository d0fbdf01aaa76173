"""Recompute the tables of scores from the Parquet files, without the pipeline's code.

`python tests/helpers/recompute_table.py results/demo` prints, per table, how many numbers were computed again and the
largest deviation: scores, differences and detectable differences of `table1` to `table4`, `outliers` and `pairs`, the
paired differences of `claims`, MME's score and POPE's F1 of `measures`, and the ratios of `deployment`. For experiments
whose benchmarks are all scored by the mean over questions (the demo's are).

Rows are found by what the tables themselves say: the model's name, its precision, and the seeds in column `run`.
"""

import json
import re
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

TABLES = ("table1", "table2", "table3", "table4", "outliers")
PARTS = ("gdkd", "rcka", "ib")


@cache
def read(folder: Path, benchmarks: tuple[str, ...]) -> pd.DataFrame:
    """Scores in points of one model: a column per seed, a row per question (benchmark, sample_id, image_id)."""
    seeds = {}
    for path in [folder / "predictions"] if folder.name == "teacher" else sorted(folder.glob("seed*/predictions")):
        parts = [pd.read_parquet(path / f"{name}.parquet").assign(benchmark=name) for name in benchmarks]
        frame = pd.concat(parts).set_index(["benchmark", "sample_id", "image_id"])["score"].sort_index()
        seeds["teacher" if folder.name == "teacher" else int(path.parent.name.removeprefix("seed"))] = 100 * frame
    return pd.DataFrame(seeds)


def aggregate(scores: pd.DataFrame) -> dict[str, float]:
    """Mean of means; variance from the images, and the two parts (between, chance) of the variance from the seeds."""
    by = scores.groupby("benchmark")
    deviation = (scores - by.transform("mean")) / by.transform("size").to_frame().to_numpy() / by.ngroups
    pull = deviation.groupby("image_id").sum()
    images, seeds = pull.shape
    means = by.mean().mean()
    found = {"value": means.mean(), "images": images, "seeds": seeds, "between": 0.0, "chance": 0.0}
    found["questions"] = images / (images - 1) * (pull.mean(axis=1) ** 2).sum()
    if seeds > 1:
        off = pull.sub(pull.mean(axis=1), axis=0)
        found["chance"] = images / (images - 1) * (off**2).to_numpy().sum() / seeds / (seeds - 1)
        found["between"] = means.var() / seeds
    return found


def stderr(found: dict[str, float]) -> float:
    return float(np.sqrt(found["questions"] + max(0.0, found["between"] - found["chance"])))


def detectable(found: dict[str, float]) -> float:
    """The difference found with 80% power at 5%: the larger of those of the two t tests."""
    total, between = stderr(found) ** 2, found["between"]
    spread = found["questions"] ** 2 / (found["images"] - 1) + between**2 / max(found["seeds"] - 1, 1)
    tests = [(total, max(total**2 / spread, 1.0) if spread else np.inf)]
    if found["seeds"] > 1:
        tests.append((between, found["seeds"] - 1))
    return max((stats.t.isf(0.025, df) + stats.t.isf(0.2, df)) * variance**0.5 for variance, df in tests)


def difference(a: pd.DataFrame, b: pd.DataFrame) -> dict[str, float]:
    """A less B, by the seeds that both have; a teacher against every seed."""
    shared = [seed for seed in a.columns if seed in b.columns]
    if shared:
        return aggregate(a[shared] - b[shared])
    found = aggregate((a.mean(axis=1) - b.mean(axis=1)).to_frame())
    several = max((aggregate(side) for side in (a, b)), key=lambda each: each["seeds"])
    return found | {key: several[key] for key in ("between", "chance", "seeds")}


def role(about: dict) -> str:
    """A recipe's part in the paper, from its configuration."""
    kd = about.get("kd") or "none"
    if about.get("post_training"):
        return about["post_training"]
    if kd not in ("none", "plain", "gated"):
        return "variant"
    on = [p for p, used in zip(PARTS, (kd == "gated", about.get("rcka"), about.get("controller")), strict=True) if used]
    if len(on) == len(PARTS):
        return "grace"
    return "+".join(["kd", *on] if kd == "plain" and "ib" not in on else on) or "none"


class Experiment:
    """Where the rows of the tables lie, by the names that the tables give them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = json.loads((folder / "config" / "experiment.json").read_text())
        self.names = tuple(self.config["evaluation"]["benchmarks"])
        self.recipes: dict[
            str, str
        ] = {}  # role -> recipe; where two share one, the first run that changes no constants
        run = {name for runs in self.config["runs"] for name in runs["recipes"]}
        recipes = self.config["recipes"].items()
        for name, about in sorted(recipes, key=lambda item: (item[0] not in run, self._changes(item[1]))):
            self.recipes.setdefault(role(about), name)

    @staticmethod
    def _changes(about: dict) -> bool:
        changed = [value for part in ("method", "train") for value in (about.get(part) or {}).values()]
        return (
            any(value is not None for value in changed)
            or bool(about.get("constants"))
            or about.get("scale", "maxabs") != "maxabs"
        )

    def scores(self, label: str, precision: str, seeds: tuple[int, ...] = ()) -> pd.DataFrame | None:
        """Of the row with this name in tables; None where the name is not one of ours."""
        recipe = {"Teacher": "teacher", "Baseline": "baseline"}.get(label)
        named = {about.get("label"): name for name, about in self.config["recipes"].items() if about.get("label")}
        recipe = recipe or named.get(label) or self.recipes.get(self._role(label)) or label
        below = "teacher" if recipe == "teacher" else f"students/{recipe}/{precision}"
        if not (self.folder / below).is_dir():
            return None
        found = read(self.folder / below, self.names)
        return found[list(seeds)] if seeds and recipe != "teacher" else found

    @staticmethod
    def _role(label: str) -> str:
        plain = {"Fine-tuning": "none", "QAT": "none", "Fine-tuning + KD": "kd", "QAT + KD": "kd"}
        return plain.get(label) or label.lower().replace(" + ", "+")


def seeds_of(run: str) -> tuple[int, ...]:
    """The seeds that column `run` names: `seed 0`, `seeds 0-4`, `seeds 0, 3`."""
    found = re.search(r"; seeds? ([\d, -]+)", run)
    if not found:
        return ()
    seeds: list[int] = []
    for part in found[1].strip(" ,").split(","):
        first, _, last = part.strip().partition("-")
        seeds += range(int(first), int(last or first) + 1)
    return tuple(seeds)


class Deviations:
    """The largest deviation and the count of what was compared."""

    def __init__(self) -> None:
        self.count, self.largest = 0, 0.0

    def compare(self, written: object, found: float) -> None:
        """Hold one number of a table (6 significant digits) against one that is computed here."""
        if isinstance(written, str) and not re.match(r"^-?[\d.]", written):
            return  # reference, dash
        if pd.isna(written):
            return
        self.count += 1
        self.largest = max(self.largest, abs(float(written) - found) / max(1.0, abs(found) / 1000))


def score_table(experiment: Experiment, table: pd.DataFrame) -> Deviations:
    """One of TABLES."""
    done, references = Deviations(), {}
    outliers = "-outliers" if (table["group"].astype(str).str.contains("outlier")).any() else ""

    def of(line: pd.Series) -> pd.DataFrame | None:
        bits = line["Bits"] + (outliers if line["Bits"] != "bf16" else "")
        return experiment.scores(line["Model"], bits, seeds_of(line["run"]))

    for _, line in table.iterrows():
        if line["Δ average"] == "reference":
            references[line["group"] if "table4" in table.attrs["name"] else ""] = line
    for _, line in table.iterrows():
        own = of(line)
        if own is None:
            raise SystemExit(f"{table.attrs['name']}: no predictions of {line['Model']} {line['Bits']}")
        for column in [*experiment.names, "average"]:
            found = aggregate(own if column == "average" else own.loc[[column]])
            key = next(key for key in line.index if key.split(" (")[0] == column)
            done.compare(line[key], found["value"])
            done.compare(line[f"{key} stderr"], stderr(found))
        reference = references.get(line["group"] if "table4" in table.attrs["name"] else "")
        base = experiment.scores("Baseline", "bf16", seeds_of(line["run"]) if line["Model"] != "Teacher" else ())
        if reference is not None:
            base = of(reference)
        if base is None or line["Δ average"] in ("reference", "–"):
            continue
        found = difference(own, base)
        done.compare(line["Δ average"], found["value"])
        done.compare(line["Δ average stderr"], stderr(found))
        done.compare(line["detectable Δ"], detectable(found))
    return done


def sides(experiment: Experiment, text: str, outliers: bool) -> list[pd.DataFrame]:
    """The two models of `GRACE int4 − QAT int4`."""
    found = []
    for side in text.split(" − "):
        label, _, precision = side.rpartition(" ")
        scores = experiment.scores(label, precision + ("-outliers" if outliers and precision != "bf16" else ""))
        if scores is None:
            raise SystemExit(f"no predictions of {side}")
        found.append(scores)
    return found


def pairs_table(experiment: Experiment, table: pd.DataFrame) -> Deviations:
    """Differences and detectable differences, benchmark by benchmark."""
    done = Deviations()
    seen: dict[str, int] = {}
    for _, line in table.iterrows():
        if line["Points"] == "difference":
            seen[line["Compared"]] = seen.get(line["Compared"], 0) + 1
        a, b = sides(experiment, line["Compared"], outliers=seen[line["Compared"]] > 1)
        for column in [*experiment.names, "average"]:
            key = next(key for key in line.index if key.split(" (")[0] == column)
            found = difference(a, b) if column == "average" else difference(a.loc[[column]], b.loc[[column]])
            done.compare(line[key], found["value"] if line["Points"] == "difference" else detectable(found))
            if line["Points"] == "difference":
                done.compare(line[f"{key} stderr"], stderr(found))
    return done


def claims_table(experiment: Experiment, table: pd.DataFrame) -> Deviations:
    """The measured differences of the averages."""
    done = Deviations()
    for _, line in table[table["Compared"].str.contains(" − ")].iterrows():
        found = difference(*sides(experiment, line["Compared"], "under outliers" in line["Claim"]))
        done.compare(line["here"], found["value"])
        done.compare(line["here stderr"], stderr(found))
    return done


def measures_table(experiment: Experiment, table: pd.DataFrame) -> Deviations:
    """POPE's F1 of the answer yes and MME's score; their errors are a jackknife's and stay unchecked."""
    done = Deviations()
    for _, line in table.iterrows():
        recipe = {"Teacher": "teacher", "Baseline": "baseline"}.get(line["Model"])
        recipe = recipe or experiment.recipes.get(experiment._role(line["Model"]), line["Model"])
        below = experiment.folder / ("teacher" if recipe == "teacher" else f"students/{recipe}/{line['Bits']}")
        folders = [below] if recipe == "teacher" else sorted(below.glob("seed*"))
        for column in [key for key in table.columns if key.endswith((" F1", " score"))]:
            name, _, kind = column.rpartition(" ")
            frames = [pd.read_parquet(folder / "predictions" / f"{name}.parquet") for folder in folders]
            done.compare(line[column], float(np.mean([f1(rows) if kind == "F1" else mme(rows) for rows in frames])))
    return done


def f1(rows: pd.DataFrame) -> float:
    said, right = rows["extracted"].str.lower() == "yes", rows["target"].str.lower() == "yes"
    return 200 * (said & right).sum() / (said.sum() + right.sum()) if said.sum() + right.sum() else 0.0


def mme(rows: pd.DataFrame) -> float:
    """Per sub-task 100 x (share right + share of images whose questions are all right), summed."""
    tasks = [part for _, part in rows.groupby(rows["group"].fillna(""))]
    return sum(100 * (p["score"].mean() + (p.groupby("image_id")["score"].min() >= 1).mean()) for p in tasks)


def deployment_table(experiment: Experiment, table: pd.DataFrame) -> Deviations:
    """Ratios over the bf16 baseline at the same batch, from bench/decode.csv."""
    done, path = Deviations(), experiment.folder / "bench" / "decode.csv"
    if not path.is_file():
        return done
    decode = pd.read_csv(path)
    decode = decode[decode.get("cache", pd.Series(16, decode.index)) == 16]
    dense = decode[decode["model"].str.startswith("baseline/")].set_index("batch")
    for _, line in table[(table["group"] == "Decoding") & (table["Bits"] == "int4")].iterrows():
        recipe = experiment.recipes.get(experiment._role(line["Model"]), line["Model"])
        own = decode[(decode["batch"] == line["batch"]) & decode["model"].str.startswith(f"{recipe}/int4/")].iloc[0]
        done.compare(line["× throughput"], own["tokens_per_second"] / dense.at[own["batch"], "tokens_per_second"])
        done.compare(line["× memory"], own["peak_mib"] / dense.at[own["batch"], "peak_mib"])
    return done


def deviations(results: Path) -> dict[str, Deviations]:
    """Of every table that is there, by its name."""
    read.cache_clear()
    experiment = Experiment(results)
    rules = dict.fromkeys(TABLES, score_table) | {
        "pairs": pairs_table, "claims": claims_table, "measures": measures_table, "deployment": deployment_table,
    }  # fmt: skip
    found = {}
    for name, rule in rules.items():
        table = pd.read_csv(results / ("speed" if name == "deployment" else "tables") / f"{name}.csv")
        table.attrs["name"] = name
        found[name] = rule(experiment, table) if len(table) else Deviations()
    return found


if __name__ == "__main__":
    for name, each in deviations(Path(sys.argv[1])).items():
        print(f"{name:12} {each.count:5} numbers, largest deviation {each.largest:.2g}")
