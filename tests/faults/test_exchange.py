"""A short run of tests/fuzz/exchange.py: damaged files between jobs are used, or refused in a sentence."""

from fuzz import exchange


def test_damaged_files_between_jobs_are_no_tracebacks(tmp_path):
    exchange.sound(tmp_path / "whole")
    for number in (*range(12), 2001145, 2001594, 2001640, 4000885):  # the last ones once were failures
        assert exchange.failures(number, tmp_path / "whole", tmp_path) == {}, number
