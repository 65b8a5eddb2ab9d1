#!/usr/bin/env bash
# Everything that a GPU has to tell about the kernels, in parts, estimated at ten minutes each on 16
# cores: bash scripts/measure_cuda.sh 1 FOLDER, then 2, 3 and 4 (which tunes). Results appear in FOLDER
# as they come; a command that fails does not keep the next ones from running.
set -u
cd "$(dirname "$0")/.."
part=${1:?1, 2, 3 or 4} out=${2:?a folder for the results}
mkdir -p "$out"
run=(--random_weights llama-3-8b --device cuda --prompt 128)
fill() {  # KERNELS COMPILE_MODE MODE...: compile their steps, four at a time, for `bench` to find in the caches
    local mode flags said
    for mode in "${@:3}"; do
        flags=(--quantization "${mode%:*}")
        [[ $mode == *:* ]] && flags+=(--groupsize "${mode#*:}")
        while (($(jobs -rp | wc -l) >= 4)); do wait -n; done
        {
            said=$(TORCHINDUCTOR_COMPILE_THREADS=2 python3 generate.py "${run[@]}" "${flags[@]}" --kernels "$1" \
                --compile --compile_mode "$2" --max_new_tokens 8 --cache_size 384 --temperature 0 --ignore_eos \
                2>&1 >/dev/null) || echo "$mode was not compiled: ${said##*$'\n'}" >&2
        } &
    done
}
bench() {  # NAME, then flags of bench.py
    python3 bench.py "${run[@]}" --max_new_tokens 256 --repeats 1 --time_limit 200 \
        --json "$out/cuda_$1.json" "${@:2}"
}
case $part in
1)  # whether all is right, then the bars: bf16, int8 and int4, kernels apart and overlapping
    python3 scripts/check_cuda.py --json "$out/cuda_checks.json" --limit 200 --checks \
        engine,float,attention,between,steps,int8,int8dq,int4,int8dq-int4,float8,float8dq-row,fp6,uint3,w4a8
    fill triton reduce-overhead bf16 int4:64 int8
    fill triton-pdl reduce-overhead bf16 int4:64 int8
    wait
    bench triton --modes bf16,int4:64,int8 --kernels triton
    bench triton-pdl --modes bf16,int4:64,int8 --kernels triton-pdl
    ;;
2)  # the other modes of the table, every product at 1 to 2048 rows, a trace
    modes=(int8dq int8dq-int4 float8 float8dq-row w4a8 fp6 uint3 int4-sparse24)
    fill triton reduce-overhead "${modes[@]}"
    wait
    bench modes --modes "$(IFS=, && echo "${modes[*]}")" --kernels triton
    python3 scripts/time_cuda.py --json "$out/cuda_times.json"
    python3 scripts/time_cuda.py --formats int4 --kernels triton-pdl --json "$out/cuda_times_pdl.json"
    python3 generate.py "${run[@]}" --quantization int4 --groupsize 64 --max_new_tokens 256 --compile \
        --temperature 0 --ignore_eos --profile "$out/int4_trace.json.gz"
    ;;
3)  # beside Inductor's own kernels, transformers and torchao, ATen's; torch.compile's modes, and none;
    # the formats that part 1 has not checked
    fill inductor reduce-overhead bf16 int4:64 int8
    fill aten reduce-overhead int4:64
    for mode in default max-autotune-no-cudagraphs max-autotune; do fill triton $mode bf16; done
    wait
    bench inductor --modes bf16,int4:64,int8 --kernels inductor
    python3 scripts/compare_transformers.py "${run[@]}" --json "$out/cuda_transformers.json" \
        --modes bf16,int4:64,int8,int8dq,float8,gemlite:64
    bench aten --modes int4:64 --kernels aten
    for mode in default max-autotune-no-cudagraphs max-autotune; do
        bench $mode --modes bf16 --kernels triton --compile_mode $mode
    done
    bench eager --modes bf16 --kernels triton --no-compile
    rest=$(echo int8dq-int3 float8dq-tensor codebook4 int4-sparse24 uint{1,2,4,5,6,7} \
        fpx-{2-{1,2,3,4,5},3-{1,2,3,4},4-{1,2,3},5-{1,2}})
    python3 scripts/check_cuda.py --json "$out/cuda_checks_rest.json" --checks "${rest// /,}"
    ;;
4)  # other block sizes than those of kernels/cuda/linear.py
    python3 scripts/tune_cuda.py --json "$out/cuda_tune_1.json"
    python3 scripts/tune_cuda.py --rows 16 --formats int8,int4 --json "$out/cuda_tune_16.json"
    ;;
*)  echo "error: part $part: take 1, 2, 3 or 4" >&2; exit 2 ;;
esac
