#!/usr/bin/env bash
# bash tests/slurm/run.sh: start a Slurm on this machine, run the workflow through it, stop it. Some minutes on two cores.
# Needs root, `apt-get install slurm-wlm munge` and `bash workflow/setup.sh test cluster`; nothing is skipped.
# GRACE_SHRUNKEN: a folder in which the end-to-end test has built the shrunken experiment; without it, it is built here.
set -euo pipefail
cd "$(dirname "$0")/../.."

python=${PYTHON:-.venv/bin/python}
if ! "$python" -c 'import snakemake_executor_plugin_slurm' 2>/dev/null; then
  echo "slurm tests: $python has no snakemake-executor-plugin-slurm; bash workflow/setup.sh test cluster" >&2
  exit 1
fi
if [ -z "${GRACE_SHRUNKEN:-}" ]; then
  GRACE_SHRUNKEN=$(mktemp -d)
  made=$GRACE_SHRUNKEN
fi
export GRACE_SHRUNKEN
trap 'bash tests/slurm/cluster.sh stop; rm -rf "${made:-}"' EXIT
"$python" -m snakemake --directory "$GRACE_SHRUNKEN" --configfile "$PWD/tests/end_to_end/config.yaml" \
  --workflow-profile "$PWD/workflow/profiles/default" --quiet all
bash tests/slurm/cluster.sh start
timeout 1200 "$python" -m pytest tests/slurm/slurm_checks.py --numprocesses 10 "$@"
