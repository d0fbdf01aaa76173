"""What a job asks for on its next try, and what is said before the first; Slurm's answers are played."""

import pytest

from grace.cluster import retry as module
from grace.cluster.retry import Limits, beyond, last_end, limits, retry_by_kind, retry_request
from grace.cluster.slurm import check_arrays
from grace.config.resources import Resources
from grace.errors import GraceError

WILDCARDS = ["demo", "rtn"]
SINFO = "main*|infinite|32000\nmain*|infinite|64000\nspare|15:00|32000\nlong|2-12:30:00|8000+\n"


@pytest.fixture
def slurm(monkeypatch, tmp_path):
    """Sets what scontrol says of one job's end."""
    monkeypatch.chdir(tmp_path)
    limits.cache_clear()
    jobs: list[str] = []

    def said(*command):
        return SINFO if command[0] == "sinfo" else "\n".join(jobs)

    monkeypatch.setattr(module, "_output_of", said)

    def job(number, state, code="0:0", comment="rule_quantize_wildcards_demo_rtn", folder=tmp_path):
        jobs.append(f"JobId={number} JobState={state} ExitCode={code} WorkDir={folder} Comment={comment}")

    yield job
    limits.cache_clear()


def test_limits_are_those_of_each_partition(slurm):
    assert limits() == {
        "main": Limits(None, 64000), None: Limits(None, 64000), "spare": Limits(15, 32000), "long": Limits(3630, 8000),
    }  # fmt: skip


@pytest.mark.parametrize(
    "state, code, mem_mb, runtime",
    [
        ("OUT_OF_MEMORY", "0:125", 40000, 60), ("FAILED", "0:9", 40000, 60), ("TIMEOUT", "0:0", 20000, 120),
        ("FAILED", "1:0", 20000, 60), ("NODE_FAIL", "0:0", 20000, 60), ("PREEMPTED", "0:0", 20000, 60),
    ],
)  # fmt: skip
def test_more_is_asked_of_what_it_ran_out_of(slurm, state, code, mem_mb, runtime):
    slurm(7, state, code)
    asked = retry_request(Resources(mem_mb=20000, runtime=60), 2, ["quantize"], WILDCARDS)
    assert (asked.mem_mb, asked.runtime) == (mem_mb, runtime)


def test_a_job_of_which_the_kind_is_known_may_be_of_any_rule_of_that_kind(slurm):
    slurm(7, "OUT_OF_MEMORY")
    request = retry_by_kind({"quantize": "pack", "import_released": "pack", "tables": "report", "freeze": None})
    assert request(Resources(mem_mb=20000), 2, "pack", WILDCARDS).mem_mb == 40000
    slurm(8, "TIMEOUT", comment="rule_tables_wildcards_demo_rtn")
    assert request(Resources(mem_mb=20000), 2, "report", WILDCARDS).mem_mb == 20000


def test_never_more_than_there_is(slurm):
    slurm(7, "OUT_OF_MEMORY")
    assert retry_request(Resources(mem_mb=30000), 3, ["quantize"], WILDCARDS).mem_mb == 64000
    slurm(8, "TIMEOUT")
    asked = retry_request(Resources(partition="spare", runtime=10), 2, ["quantize"], WILDCARDS)
    assert (asked.runtime, asked.mem_mb) == (15, Resources().mem_mb)


def test_only_this_job_s_last_end_counts(slurm):
    slurm(5, "OUT_OF_MEMORY")
    slurm(6, "FAILED", "1:0")
    slurm(7, "TIMEOUT", comment="rule_quantize_wildcards_demo_awq")
    slurm(8, "TIMEOUT", folder="/elsewhere")
    slurm(9, "RUNNING")
    assert last_end(["pack", "quantize"], WILDCARDS) == "other"
    assert last_end(["pack"], WILDCARDS) is None


def test_what_a_partition_can_never_give_is_said(slurm):
    assert "runtime 60 is above the 15 minutes of partition `spare`" in beyond(Resources(partition="spare", runtime=60))
    assert "mem_mb 65000 is above the 64000 MB of the largest node" in beyond(Resources(mem_mb=65000))
    assert beyond(Resources(partition="long", runtime=3630, mem_mb=8000)) is None


def test_an_array_that_would_wait_for_ever_is_refused():
    with pytest.raises(GraceError, match=r"--jobs 3 is less than the 8 jobs of write_cache.*give --jobs 8"):
        check_arrays({"write_cache": 8, "pack": 9}, "write_cache", 3)
    check_arrays({"write_cache": 8}, "write_cache", 8)
    check_arrays({"write_cache": 8}, None, 3)
    check_arrays({"write_cache": 8}, "none", 3)
    check_arrays({"write_cache": 8}, "write_cache", None)


@pytest.mark.parametrize(
    "words, memory",
    [
        ("grace: out of memory (MemoryError); lower the batch", True),
        ("numpy._core._exceptions._ArrayMemoryError: Unable to allocate", True),
        ("grace: out of memory (OutOfMemoryError: CUDA out of memory); lower the batch", False),
        ("slurmstepd: error: Detected 1 oom_kill event", True),
        ("ValueError: no", False),
    ],
)
def test_a_gpu_that_is_full_asks_for_no_more_of_the_machine_s_memory(tmp_path, words, memory):
    (tmp_path / "job.log").write_text(f"rule train\n{words}\n")
    assert module._says_out_of_memory(tmp_path / "job.log") is memory
