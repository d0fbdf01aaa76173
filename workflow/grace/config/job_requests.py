"""What a job may use: cores, memory, GPUs and time, under Snakemake's names."""

from collections.abc import Iterable
from typing import Any

from grace.config.resources import TRAININGS, Job, Resources

COMPUTED: tuple[Job, ...] = (*TRAININGS, "cache", "quantize", "evaluate")  # kinds of jobs that compute with floats


class JobRequests:
    """What each kind of job asks for; `resources` is that section of the configuration."""

    def __init__(self, resources: dict[Job, Resources]) -> None:
        self._asked = resources

    def threads(self, job: Job) -> int:
        """Processor cores of one such job."""
        return self._request(job).cpus

    def resources(self, job: Job) -> dict[str, Any]:
        """Kind, memory, GPUs and time of one such job, under the names that Snakemake and its Slurm plugin know.

        What a job that is sent again (`retries` in the Slurm profile) asks for, `retry_request` says.
        The plugin counts `gpu` over all machines of a job and `gres` on each. Without GPUs it asks for `tasks`, one if
        nothing is said. `grace train` starts a process for each `gpu`, which a machine limits to those it has, or on
        each machine `processes`, which is ours.
        """
        asked = self._request(job)
        named: dict[str, Any] = {
            "kind": job,
            "mem_mb": lambda wildcards, attempt: self.retry_request(asked, attempt, job, wildcards).mem_mb,
            "runtime": lambda wildcards, attempt: self.retry_request(asked, attempt, job, wildcards).runtime,
            "gpu": asked.gpus,
            "nodes": asked.nodes,
            "processes": 0,
        }
        if asked.nodes > 1 and asked.gpus:
            named |= {"gpu": 0, "gres": f"gpu:{asked.gpus}", "processes": asked.gpus}
        elif asked.nodes > 1:
            named["tasks"] = asked.nodes
        if asked.partition:
            named["slurm_partition"] = asked.partition
        if asked.account:
            named["slurm_account"] = asked.account
        return named

    @staticmethod
    def retry_request(asked: Resources, attempt: int, kind: str, wildcards: Iterable[str]) -> Resources:
        """What the `attempt`-th try of such a job asks for; on a cluster the Snakefile puts one here that asks it."""
        return asked.model_copy(update={"mem_mb": attempt * asked.mem_mb, "runtime": attempt * asked.runtime})

    def short_of_cores(self, jobs: Iterable[str], cores: int) -> list[str]:
        """A sentence for each of these kinds of jobs whose numbers fewer threads would change;
        GPUs do not ask for threads.
        """
        return [
            f"resources.{job}.cpus is {asked.cpus} and --cores {cores}: on fewer threads a CPU's results differ in "
            "their last digits; give --cores at least that, or lower cpus, which makes it another result"
            for job in COMPUTED
            if job in jobs and not (asked := self._request(job)).gpus and asked.cpus > cores
        ]

    def _request(self, job: Job) -> Resources:
        return self._asked.get(job, Resources())
