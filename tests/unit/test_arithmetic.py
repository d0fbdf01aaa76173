"""Which instructions and threads a CPU computes with is settled before anything computes, and recorded."""

import json
import os
import subprocess
import sys

import pytest

from grace import arithmetic
from grace.config.job_requests import JobRequests
from grace.config.load import load_experiment
from grace.config.yaml_file import read_yaml

SMALL = """
import json, os, sys
sys.argv = ["grace", *sys.argv[1:]]
import grace.cli
try:
    grace.cli.main()
except SystemExit:
    pass
import torch
from grace.environment import environment
print(json.dumps([torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(), environment()["arithmetic"]]))
"""


def _clean(**more):
    unset = (*arithmetic.SETTINGS, arithmetic.THREADS)
    return {name: value for name, value in os.environ.items() if name not in unset} | more


@pytest.mark.parametrize("threads", [None, "2"])
def test_every_subcommand_computes_with_avx2_and_the_threads_it_was_given(threads):
    given = {arithmetic.THREADS: threads} if threads else {}
    found = subprocess.run(
        [sys.executable, "-c", SMALL, "config", "schema"],
        env=_clean(**given),
        capture_output=True,
        text=True,
        check=True,
    )
    capability, count, recorded = json.loads(found.stdout.splitlines()[-1])
    assert count == int(threads or 1)
    assert recorded == {**arithmetic.SETTINGS, arithmetic.THREADS: threads or "1"}
    assert capability in ("AVX2", "DEFAULT")  # DEFAULT: a processor without AVX2


def test_benchmarks_measure_what_the_machine_can_do():
    command = [sys.executable, "-c", SMALL, "bench", "--help"]
    found = subprocess.run(command, env=_clean(), capture_output=True, text=True, check=True)
    assert set(json.loads(found.stdout.splitlines()[-1])[2].values()) == {None}


def test_a_machine_with_a_gpu_or_without_these_instructions_is_left_as_it_is(monkeypatch, tmp_path):
    for name in (*arithmetic.SETTINGS, arithmetic.THREADS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(arithmetic, "_GPUS", tmp_path)
    arithmetic.settle()
    monkeypatch.setattr(arithmetic, "_GPUS", tmp_path / "none")
    monkeypatch.setattr(arithmetic.platform, "machine", lambda: "arm64")
    arithmetic.settle()
    assert set(arithmetic.settled().values()) == {None}


def test_fewer_cores_than_a_job_computes_with_are_refused_and_gpus_are_not_asked():
    config = read_yaml("config.yaml") | {
        "resources": {"finetune": {"cpus": 4}, "distil": {"cpus": 4, "gpus": 1}, "bench": {"cpus": 9}}
    }
    jobs = JobRequests(load_experiment(config, "config.yaml").resources)
    (sentence,) = jobs.short_of_cores({"finetune", "distil", "bench", "pack"}, 2)
    assert sentence.startswith("resources.finetune.cpus is 4 and --cores 2")
    assert not jobs.short_of_cores({"finetune", "distil"}, 4) and not jobs.short_of_cores({"distil"}, 2)
