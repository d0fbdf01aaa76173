"""Measurements of bench/decode.csv with the rows of the tables that they belong to."""

from grace.results.read import BASELINE, Results, Row

DECODE = "bench/decode.csv"


def decode_rows(results: Results) -> list[tuple[Row, dict]]:
    """Each measurement of bench/decode.csv with the row of the tables that it belongs to; others are left out.

    The `model` column is `teacher` or `recipe/precision/seed0`.
    """
    if results.decode is None:
        return []
    found = []
    for record in results.decode.to_dict("records"):
        recipe, _, rest = str(record["model"]).partition("/")
        row = Row(recipe, rest.partition("/")[0] or record["precision"])
        if row in results.seeds:
            found.append((row, record))
    return found


def dense_beside(measured: list[tuple[Row, dict]], record: dict) -> dict | None:
    """The bf16 student measured at the same batch: what ratios are taken against."""
    for row, other in measured:
        if row == BASELINE and all(other[key] == record[key] for key in ("batch", "device")) and other["cache"] == 16:
            return other
    return None
