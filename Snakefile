# GRACE, from images to tables: `snakemake --cores all` builds the experiment that config.yaml describes,
# `snakemake --configfile workflow/experiments/small.yaml` another one. Outputs go to results/{experiment}/.

import os
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.utils import min_version

from grace.cluster.start import recover
from grace.config.constraints import Constraints
from grace.config.frozen import Frozen
from grace.config.job_requests import JobRequests
from grace.config.load import load_experiment
from grace.config.plan import Plan
from grace.config.preflight import missing
from grace.config.trials import Trials
from grace.config.unapplied_trials import unapplied
from grace.config.yaml_file import read_yaml
from grace.errors import GraceError
from grace.precision import INTEGER_PATTERN, PRECISION_PATTERN

min_version("9.27")


# A file named on the command line replaces config.yaml; Snakemake alone would mix the two.
if not workflow.overwrite_configfiles:

    configfile: "config.yaml"


try:
    for file in workflow.configfiles:
        # Snakemake's own reading is silent about a key that is given twice.
        read_yaml(file)
    plan = Plan(load_experiment(config, " + ".join(map(str, workflow.configfiles))))
except GraceError as error:
    raise WorkflowError(str(error)) from None

# What the rules ask of an experiment: which file feeds which job, for what alone a rule is there, what is frozen for
# the jobs, what they may use, and the trials of `tuning`.
only = Constraints(plan.experiment)
frozen = Frozen(plan)
jobs = JobRequests(plan.experiment.resources)
trials = Trials(plan)

# Jobs find `grace` beside the Python that runs Snakemake, whether its environment is activated or not.
os.environ.update(
    PATH=os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
)

# What a killed run left is put in order; after a clone and a `dvc pull`, results that match their records are as good
# as built here.
if workflow.is_main_process:
    try:
        recover(plan.folder, frozen.content)
    except GraceError as error:
        raise WorkflowError(str(error)) from None


# What is not in place is said before the first job, all of it at once; a dry run says it too, and shows its plan.
lacking = (
    missing(plan.experiment, Path(plan.folder)) if workflow.is_main_process else []
)
for problem in lacking:
    print(f"not ready: {problem.sentence}", file=sys.stderr)


# A choice that was made and is not in the configuration is easily forgotten.
for sentence in unapplied(plan.experiment) if workflow.is_main_process else []:
    print(f"note: {sentence}", file=sys.stderr)


# What Slurm would refuse, or would keep Snakemake waiting for ever, is said before anything is submitted.
onstart:
    waiting = list(workflow.dag.needrun_jobs())
    kinds = {job.rule.name: job.resources.get("kind") for job in waiting}  # by rule
    if stops := [problem.sentence for problem in lacking if problem.rule in kinds]:
        raise WorkflowError(
            "nothing was started, for this is missing:\n" + "\n".join(stops)
        )
    if workflow.executor_plugin.name == "local":
        # Snakemake's limit of jobs per second looks at every waiting job once a second, and once more for each that
        # ended.
        workflow.scheduler.job_rate_limiter = None
        # Snakemake would lower a job's threads to the cores there are, and a CPU's sums depend on its threads.
        cores = workflow.resource_settings.cores
        if cores and (short := jobs.short_of_cores(kinds.values(), cores)):
            raise WorkflowError("\n".join(short))
    if workflow.executor_plugin.name == "slurm":
        from collections import Counter
        from grace.cluster.retry import retry_by_kind
        from grace.cluster.slurm import check_arrays, check_submission

        settings = workflow.executor_settings
        try:
            check_submission(
                kinds.values(),
                plan.experiment.resources,
                settings.status_command or "sacct",
            )
            check_arrays(
                Counter(job.rule.name for job in waiting),
                settings.array_jobs,
                workflow.resource_settings.nodes,
            )
        except GraceError as error:
            raise WorkflowError(str(error)) from None
        jobs.retry_request = retry_by_kind(kinds)


wildcard_constraints:
    experiment=only.where(True),
    precision=PRECISION_PATTERN,
    seed=r"\d+",
    shard=r"\d{5}",
    trial=r"\d+",
    subcommand=r"[a-z0-9+_-]+",


include: "rules/data.smk"
include: "rules/teacher.smk"
include: "rules/student.smk"
include: "rules/pack.smk"
include: "rules/bench.smk"
include: "rules/eval.smk"
include: "rules/tune.smk"
include: "rules/report.smk"
include: "rules/versions.smk"
include: "rules/plan.smk"


# Everything that the tables, figures and the page are made of, and those themselves.
rule all:
    default_target: True
    input:
        f"{plan.folder}/tables/manifest.json",
        f"{plan.folder}/figures/manifest.json",
        f"{plan.folder}/metrics.json",
        f"{plan.folder}/speed/manifest.json",
        f"{plan.folder}/report/index.html",
        plan.packed,
