#!/usr/bin/env bash
# The main job on the default model: install, fetch, quantize to int4 with GPTQ, generate.
set -euo pipefail
source "$(dirname "$0")/setup.sh" requirements.txt
model=checkpoints/smollm2-135m-instruct
echo "== fetching the default model"
[ -d "$model" ] || python scripts/download.py
echo "== quantizing to int4-gptq (a few minutes)"
python quantize.py --mode int4-gptq
echo "== generating"
compile=--compile  # which wants a C++ compiler on a CPU
command -v "${CXX:-g++}" clang++ > /dev/null || compile=
python generate.py $compile --checkpoint_path "$model/model_int4-gptq.g64.safetensors"
