"""The shipped experiment llava15_7b through Snakemake, raw data to tables, with small models of LLaVA-1.5's form."""

from pathlib import Path

import pytest
from family_run import check_whole, run


@pytest.mark.slow
def test_from_raw_data_to_tables(tmp_path: Path) -> None:
    check_whole(run(tmp_path, "llava15_7b", "llava", compute_dtype="bfloat16"))
