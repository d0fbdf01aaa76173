"""What a predictions' manifest says of a benchmark."""

import math

import pandas as pd
import pytest

from grace.benchmarks.protocols import PROTOCOLS, spec
from grace.results.predictions import summary


def test_the_error_of_a_score_counts_images_and_is_none_for_one():
    protocol, name = next((p, n) for p, specs in PROTOCOLS.items() for n in specs if spec(p, n).metric == "exact_match")
    scores = [1.0, 0.0, 1.0, 1.0, 0.0]
    rows = pd.DataFrame({"score": scores, "image_id": list("abcde")})
    twice = pd.concat([rows, rows])
    plain = pd.Series(scores).std(ddof=1) / math.sqrt(5)
    for each in (rows, twice):
        assert summary(protocol, spec(protocol, name), each)["stderr"] == pytest.approx(plain, rel=1e-12)
    assert summary(protocol, spec(protocol, name), rows.assign(image_id="a"))["stderr"] is None
