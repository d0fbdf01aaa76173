#!/usr/bin/env bash
# bash workflow/setup.sh [test|docs|lmms-eval|cluster|s3|kernels ...]: make .venv with the pipeline's pinned packages, and extras'
# where named.
# Safe to repeat: it installs only when the pins or the package's needs changed, or an extra is new.
set -euo pipefail
cd "$(dirname "$0")/.."

for extra in "$@"; do
  case "$extra" in
    test | docs | lmms-eval | cluster | s3 | kernels) ;;
    *) echo "setup: no extra '$extra'; use test, docs, lmms-eval, cluster, s3 or kernels" >&2; exit 2 ;;
  esac
done

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  echo "setup: needs Python 3.11 or newer as python3; or name one: PYTHON=python3.11 bash workflow/setup.sh" >&2
  exit 1
fi

if [ ! -x .venv/bin/python ]; then
  "$python" -m venv .venv
fi

# What was installed before stays wanted: adding an extra never takes another one away.
wanted=$(printf '%s\n' pipeline "$@" $(cut -s -d' ' -f2- .venv/installed 2>/dev/null || true) | sort -u | sed '/^$/d' | xargs)
stamp="$(cat envs/constraints.txt envs/lmms-eval.txt envs/test-material.txt pyproject.toml | .venv/bin/python -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())') $wanted"
if [ "$(cat .venv/installed 2>/dev/null || true)" = "$stamp" ]; then
  echo "setup: .venv is up to date"
  exit 0
fi

# torch first and by its version alone, so that a build for this machine that is there already (CPU or GPU) is kept.
.venv/bin/python -m pip install --disable-pip-version-check "$(grep '^torch==' envs/constraints.txt)"
.venv/bin/python -m pip install --disable-pip-version-check -c envs/constraints.txt -e ".[${wanted// /,}]"
case " $wanted " in
  *" test "* | *" lmms-eval "*) .venv/bin/python -m pip install --disable-pip-version-check --no-deps -r envs/lmms-eval.txt ;; # says why
esac
case " $wanted " in
  *" test "*) .venv/bin/python -m pip install --disable-pip-version-check --no-deps -r envs/test-material.txt ;;
esac
printf '%s\n' "$stamp" > .venv/installed
echo "setup: .venv is ready"
