"""What a Slurm says before anything is submitted to it: a sentence with the fix instead of jobs that fail or hang."""

import shlex
import shutil
import subprocess
from collections.abc import Iterable, Mapping

from grace.cluster.retry import beyond, limits
from grace.config.resources import Resources
from grace.errors import GraceError


def check_slurm(asked: Mapping[str, Resources], status_command: str | None = None) -> None:
    """Ask the cluster whether it would take each kind of job; nothing is submitted.

    Args:
        asked: what each kind of job asks for, by its name under `resources` in the configuration.
        status_command: how Snakemake will ask after its jobs, `sacct` or `squeue`; None is not checked.

    Raises:
        GraceError: no Slurm, a controller that does not answer, `sacct` without accounting, or one line per kind of job
            that Slurm refuses, with its reason.
    """
    if shutil.which("sbatch") is None:
        raise GraceError("sbatch: not found; run on a machine that submits to Slurm, or without --workflow-profile")
    code, said = _run("scontrol", "show", "config")
    if code:
        raise GraceError(f"scontrol: Slurm does not answer ({said}); see `scontrol ping`, then try again")
    settings = {
        key.strip(): value.strip()
        for key, _, value in (line.partition("=") for line in said.splitlines() if "=" in line)
    }
    storage = settings.get("AccountingStorageType", "")
    if status_command == "sacct" and storage in ("", "(null)", "accounting_storage/none"):
        raise GraceError(
            "sacct: this Slurm keeps no accounting, so that Snakemake would wait for its jobs for ever; "
            "add --slurm-status-command squeue"
        )
    refused = [f"resources.{kind}: {reason}" for kind, request in asked.items() if (reason := _refusal(request))]
    if refused:
        raise GraceError("\n".join(refused))


def check_submission(kinds: Iterable[str | None], resources: Mapping[str, Resources], status_command: str) -> None:
    """`check_slurm` for jobs of these kinds (None: local), with what the configuration says of them."""
    wanted = sorted({kind for kind in kinds if kind})
    check_slurm({kind: resources.get(kind, Resources()) for kind in wanted}, status_command)


def check_arrays(waiting: Mapping[str, int], arrays: str | None, at_once: int | None) -> None:
    """Refuse fewer jobs at once than an array has parts: Snakemake hands out parts up to that number, and its Slurm
    plugin collects them until the array is complete, so that each would wait for the other.

    Args:
        waiting: jobs still to be done of each rule.
        arrays: `--slurm-array-jobs`, names of rules or `all`.
        at_once: `--jobs`; None: no limit.
    """
    chosen = {name.strip() for name in (arrays or "").replace(";", ",").split(",")} - {""}
    for rule, jobs in sorted(waiting.items()):
        if at_once is not None and at_once < jobs and chosen & {rule, "all"}:
            raise GraceError(
                f"--jobs {at_once} is less than the {jobs} jobs of {rule}, which are submitted as one array and would "
                f"wait for ever; give --jobs {jobs} or more, or switch arrays off by --slurm-array-jobs none"
            )


def submission(request: Resources) -> list[str]:
    """The flags of sbatch for a request, as Snakemake's Slurm plugin gives them."""
    flags = [f"--nodes={request.nodes}", f"--cpus-per-task={request.cpus}", f"--mem={request.mem_mb}"]
    flags.append(f"--time={request.runtime}")
    if request.gpus:
        flags.append(f"--gpus={request.gpus}" if request.nodes == 1 else f"--gres=gpu:{request.gpus}")
    else:
        flags.append(f"--ntasks={request.nodes}")
    flags += [f"--partition={request.partition}"] if request.partition else []
    return flags + ([f"--account={request.account}"] if request.account else [])


def _refusal(request: Resources) -> str | None:
    """Why Slurm would not take a job, or would never start it, with the fix; None where it would."""
    if request.partition in limits() and (problem := beyond(request)):
        return problem  # sbatch takes these where EnforcePartLimits is not set
    flags = submission(request)
    code, said = _run("sbatch", "--test-only", *flags, "--wrap", "true")
    if not code:
        return None
    reason = said.splitlines()[-1].split(": ")[-1] if said else "no reason given"
    if "partition" in reason.lower():
        _, known = _run("sinfo", "--noheader", "--format", "%R")
        return f"partition `{request.partition}`: {reason}; this Slurm has {', '.join(dict.fromkeys(known.split()))}"
    if "node configuration" in reason.lower() and _some_node_is_away(request.partition):
        return None  # it may fit a node that is drained or down: Slurm queues the job until that is back
    return f"Slurm refuses {shlex.join(flags)} ({reason}); change it in the configuration; `sinfo -Nl` shows the nodes"


def _some_node_is_away(partition: str | None) -> bool:
    """Whether a node of a partition (of the default one, which sinfo marks by `*`,
    without a name) takes no jobs now.
    """
    _, said = _run("sinfo", "--noheader", "--format", "%P %T")
    rows = [line.split() for line in said.splitlines()]
    states = [state for name, state in rows if (name.rstrip("*") == partition if partition else name.endswith("*"))]
    return any(word in state for state in states for word in ("drain", "down", "maint", "fail", "reboot"))


def _run(*command: str) -> tuple[int, str]:
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, (done.stdout or done.stderr if not done.returncode else done.stderr or done.stdout).strip()
