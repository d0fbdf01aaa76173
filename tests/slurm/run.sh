#!/usr/bin/env bash
# bash tests/slurm/run.sh: start a Slurm on this machine, run the workflow through it, stop it. Some minutes on two
# cores. Needs `bash workflow/setup.sh test cluster`, root, and slurm-wlm and munge, which it installs by apt-get where
# they are missing; says why where it can't run. One such run at a time; what a killed one left behind is ended first.
set -euo pipefail
cd "$(dirname "$0")/../.."

skip() {
  echo "slurm tests: SKIPPED: $1" >&2
  exit 0
}

installed() {
  local program
  for program in munged slurmctld slurmd sbatch; do command -v "$program" || return 1; done > /dev/null
}

[ "$(id -u)" = 0 ] || skip "slurmd needs root to start jobs as their owners; run in a container or with sudo"
python=${PYTHON:-.venv/bin/python}
if ! "$python" -c 'import snakemake_executor_plugin_slurm, xdist' 2>/dev/null; then
  echo "slurm tests: $python lacks what they need; bash workflow/setup.sh test cluster" >&2
  exit 1
fi
exec 9> /var/tmp/grace-slurm.lock
flock --nonblock 9 || { echo "slurm tests: another run on this machine has to end first"; flock 9; }
made=$(mktemp -d)
export GRACE_SHRUNKEN=$made/shrunken

end_children() { # Snakemake and its jobs, which lead process groups of their own, are known by what they inherited
  local process
  for process in /proc/[0-9]*; do
    if [ "${process#/proc/}" != $$ ] && grep -qsz "^GRACE_SHRUNKEN=$GRACE_SHRUNKEN$" "$process/environ"; then
      kill -KILL "${process#/proc/}" 2>/dev/null || true
    fi
  done
}

clean() {
  bash tests/slurm/cluster.sh stop 9>&- || true
  end_children
  rm -rf "$made"
}
trap clean EXIT
trap 'exit 143' INT TERM

if ! installed; then
  command -v apt-get > /dev/null || skip "slurm-wlm and munge are not installed, and there is no apt-get"
  echo "slurm tests: installing slurm-wlm and munge"
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq slurm-wlm munge; } \
    > "$made/apt.txt" 2>&1 9>&- || skip "apt-get can't install slurm-wlm and munge: $(tail -n 1 "$made/apt.txt")"
  installed || skip "slurm-wlm and munge came without slurmctld, slurmd, sbatch or munged"
fi
mkdir "$GRACE_SHRUNKEN"
echo "slurm tests: building the experiment without Slurm, to compare with"
"$python" -m snakemake --directory "$GRACE_SHRUNKEN" --configfile "$PWD/tests/slurm/config.yaml" \
  --workflow-profile "$PWD/workflow/profiles/default" --quiet all 9>&- > "$made/local.txt" 2>&1 || {
  tail -n 40 "$made/local.txt" >&2
  exit 1
}
bash tests/slurm/cluster.sh stop 9>&- > /dev/null # what a killed run has left
bash tests/slurm/cluster.sh start 9>&-
"$python" -m pytest tests/slurm/slurm_checks.py --noconftest --numprocesses 10 --durations 12 "$@" 9>&-
