"""What a job that Slurm sends again asks for: more of what it ran out of, and never more than its partition has."""

import re
import subprocess
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

from grace.config.resources import Resources


class Limits(NamedTuple):
    """The most that a job of a partition may ask for; None: no limit."""

    runtime: int | None  # minutes
    mem_mb: int | None  # of its largest node


@cache
def limits() -> dict[str | None, Limits]:
    """Limits by partition, under None those of the default one; empty where sinfo does not answer."""
    said = _output_of("sinfo", "--noheader", "--Node", "--format", "%P|%l|%m")
    found: dict[str | None, Limits] = {}
    for line in said.splitlines():
        name, time, memory = line.split("|")
        runtime, mem_mb = _minutes(time), int(memory.rstrip("+")) if memory.rstrip("+").isdigit() else None
        for key in [name.rstrip("*"), *([None] if name.endswith("*") else [])]:
            before = found.get(key)
            others = before.mem_mb if before is not None else None
            largest = mem_mb if mem_mb is None or others is None else max(mem_mb, others)
            found[key] = Limits(runtime, largest)
    return found


def _minutes(time: str) -> int | None:
    """Slurm's `[days-][hours:]minutes:seconds`, or a word for no limit, in whole minutes."""
    parts = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", time.strip())
    if parts is None:
        return None
    days, hours, minutes, _ = (int(part or 0) for part in parts.groups())
    return (days * 24 + hours) * 60 + minutes


def beyond(request: Resources) -> str | None:
    """What a request asks for that its partition can never give, with the fix; None where it fits."""
    limit = limits().get(request.partition)
    where = f"partition `{request.partition}`" if request.partition else "the default partition"
    if limit and limit.runtime is not None and request.runtime > limit.runtime:
        return (
            f"runtime {request.runtime} is above the {limit.runtime} minutes of {where}, where the job would wait for "
            "ever; lower it, or name another partition"
        )
    if limit and limit.mem_mb is not None and request.mem_mb > limit.mem_mb:
        return f"mem_mb {request.mem_mb} is above the {limit.mem_mb} MB of the largest node of {where}; lower it"
    return None


def retry_request(asked: Resources, attempt: int, rules: Iterable[str], wildcards: Iterable[str]) -> Resources:
    """What the `attempt`-th try of a job asks for.

    A job that ran out of memory or time asks for `attempt` times as much of it; one that failed otherwise asks for the
    same. Where Slurm no longer knows how it ended, it asks for more of both.

    Args:
        asked: what the configuration says.
        attempt: from 1.
        rules: names that the job's rule may have.
        wildcards: the values of the job's wildcards, in order.
    """
    if attempt == 1:
        return asked
    ended = last_end(rules, wildcards)
    limit = limits().get(asked.partition) or Limits(None, None)
    mem_mb = asked.mem_mb * (attempt if ended in ("memory", None) else 1)
    runtime = asked.runtime * (attempt if ended in ("time", None) else 1)
    mem_mb = max(asked.mem_mb, min(mem_mb, limit.mem_mb or mem_mb))
    runtime = max(asked.runtime, min(runtime, limit.runtime or runtime))
    return asked.model_copy(update={"mem_mb": mem_mb, "runtime": runtime})


def retry_by_kind(kinds: Mapping[str, str | None]) -> Callable[[Resources, int, str, Iterable[str]], Resources]:
    """`retry_request` for a job of which the kind is known and not the rule: (asked, attempt, kind, wildcards) ->
    request.

    Args:
        kinds: the kind of each rule's jobs.
    """

    def request(asked: Resources, attempt: int, kind: str, wildcards: Iterable[str]) -> Resources:
        return retry_request(asked, attempt, [rule for rule in kinds if kinds[rule] == kind], wildcards)

    return request


def last_end(rules: Iterable[str], wildcards: Iterable[str]) -> str | None:
    """How the last ended job of one of these rules and these wildcards ended: memory, time, other; None if unknown."""
    values = "_".join(value.replace("/", "_") for value in wildcards)
    comments = {f"rule_{rule}_wildcards_{values}" if values else f"rule_{rule}" for rule in rules}
    shown = _output_of("scontrol", "--oneliner", "show", "jobs")
    known = [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in shown.splitlines()]
    mine = [job for job in known if job.get("Comment") in comments and job.get("WorkDir") == str(Path.cwd())]
    over = [job for job in mine if job.get("JobState") not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING")]
    if not over:
        return None
    last = max(over, key=lambda job: int(job["JobId"]))
    state, code = last["JobState"], last.get("ExitCode", "")
    killed = state == "OUT_OF_MEMORY" or code.endswith((":9", ":125")) or code.startswith("137:")
    if killed or (state == "FAILED" and _says_out_of_memory(Path(last.get("StdErr", "")))):
        return "memory"
    return "time" if state in ("TIMEOUT", "DEADLINE") else "other"


def _says_out_of_memory(log: Path) -> bool:
    """Whether a job's own words say so, where Slurm calls it failed:
    Snakemake in it outlives the step that was killed.
    """
    try:
        words = log.read_text(errors="replace")[-20000:]
    except OSError:
        return False
    return (
        re.search(r"oom.kill|memory limit|\b(?:_Array)?MemoryError|exit (?:code|status) (?:137|-9)\b|\bKilled\b", words)
        is not None
    )


def _output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
