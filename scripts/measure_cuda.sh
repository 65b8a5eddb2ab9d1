#!/usr/bin/env bash
# Everything that a GPU has to tell about the kernels, in three parts, estimated at ten minutes each on
# 16 cores: bash scripts/measure_cuda.sh 1 FOLDER, then 2 and 3. Results appear in FOLDER as they come;
# a command that fails does not keep the next ones from running.
set -u
cd "$(dirname "$0")/.."
part=${1:?1, 2 or 3} out=${2:?a folder for the results}
mkdir -p "$out"
bench() {  # NAME, then flags of bench.py
    python bench.py --random_weights llama-3-8b --device cuda --prompt 128 --max_new_tokens 256 \
        --repeats 1 --time_limit 150 --json "$out/cuda_$1.json" "${@:2}"
}
case $part in
1)  # whether all is right, then the bars: bf16, int8 and int4, kernels apart and overlapping
    python scripts/check_cuda.py --json "$out/cuda_checks.json" --limit 200 --checks \
        engine,float,attention,steps,int8,int8dq,int4,int8dq-int4,float8,float8dq-row,fp6,uint3,w4a8
    bench triton --modes bf16,int4:64,int8
    bench triton-pdl --modes bf16,int4:64,int8 --kernels triton-pdl
    ;;
2)  # every product at 1 to 2048 rows, then the other modes of the table
    python scripts/time_cuda.py --json "$out/cuda_times.json"
    python scripts/time_cuda.py --formats int4 --kernels triton-pdl --json "$out/cuda_times_pdl.json"
    bench modes --modes int8dq,int8dq-int4,float8,float8dq-row,w4a8,fp6,uint3,int4-sparse24
    ;;
3)  # beside Inductor's own kernels, ATen's, eager steps, transformers and torchao; remaining formats
    bench inductor --modes bf16,int8,int4:64 --kernels inductor
    bench aten --modes int8,int4:64 --kernels aten
    for mode in default max-autotune-no-cudagraphs max-autotune; do
        bench $mode --modes bf16,int4:64 --compile_mode $mode
    done
    bench eager --modes bf16,int4:64 --no-compile
    python scripts/compare_transformers.py --random_weights llama-3-8b --device cuda \
        --modes bf16,int8,int8dq,int4:64,gemlite:64,float8 --json "$out/cuda_transformers.json"
    python generate.py --random_weights llama-3-8b --device cuda --quantization int4 --groupsize 64 \
        --prompt 128 --max_new_tokens 256 --compile --ignore_eos --profile "$out/int4_trace.json"
    rest=$(echo int8dq-int3 float8dq-tensor codebook4 int4-sparse24 uint{1,2,4,5,6,7} \
        fpx-{2-{1,2,3,4,5},3-{1,2,3,4},4-{1,2,3},5-{1,2}})
    python scripts/check_cuda.py --json "$out/cuda_checks_rest.json" --checks "${rest// /,}"
    ;;
*)  echo "error: part $part: take 1, 2 or 3" >&2; exit 2 ;;
esac
