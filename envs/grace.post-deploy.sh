#!/usr/bin/env bash
# Snakemake runs this in the repository's root, once, inside the environment that it made from grace.yaml.
set -euo pipefail
python -m pip install -c envs/constraints.txt -e ".[pipeline]"
