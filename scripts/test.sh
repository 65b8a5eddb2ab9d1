#!/usr/bin/env bash
# Style, then all tests. Needs no GPU.
set -euo pipefail
source "$(dirname "$0")/setup.sh" requirements-dev.txt
ruff check .
ruff format --check .
# As many files at a time as there are cores, each on one thread: half the time of one on all.
export OMP_NUM_THREADS=1
python -m pytest -n auto --maxprocesses 4 --dist loadfile "$@"
