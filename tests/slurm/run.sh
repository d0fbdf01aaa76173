#!/usr/bin/env bash
# bash tests/slurm/run.sh: start a Slurm on this machine, run the workflow through it, stop it. About half an hour on two
# cores. Needs root, `apt-get install slurm-wlm munge` and `bash workflow/setup.sh test cluster`; nothing is skipped.
set -euo pipefail
cd "$(dirname "$0")/../.."

python=${PYTHON:-.venv/bin/python}
if ! "$python" -c 'import snakemake_executor_plugin_slurm' 2>/dev/null; then
  echo "slurm tests: $python has no snakemake-executor-plugin-slurm; bash workflow/setup.sh test cluster" >&2
  exit 1
fi
trap 'bash tests/slurm/cluster.sh stop' EXIT
bash tests/slurm/cluster.sh start
"$python" -m pytest tests/slurm/slurm_checks.py "$@"
