"""The shipped experiment qwen2vl_2b through Snakemake, raw data to tables, with small models of Qwen2-VL's form."""

from pathlib import Path

import pytest
from family_run import check_whole, run


@pytest.mark.slow
def test_from_raw_data_to_tables(tmp_path: Path) -> None:
    check_whole(run(tmp_path, "qwen2vl_2b", "qwen2_vl"))
