#!/usr/bin/env bash
# Style, then all tests. Needs no GPU.
set -euo pipefail
source "$(dirname "$0")/setup.sh" requirements-dev.txt
ruff check .
ruff format --check .
python -m pytest "$@"
