#!/usr/bin/env bash
# A program for a GPU where there is none: every line of the host's runs, Triton and Inductor compile for
# sm_90, CUDA graphs are captured, kernels are counted but compute nothing. Wants PyTorch's CUDA build:
#     bash scripts/rehearse.sh generate.py --random_weights llama-3-8b --device cuda --compile
# REHEARSAL_DEVICES=N makes it N GPUs (-m torch.distributed.run --nproc_per_node=N generate.py ...);
# REHEARSAL_REPORT=FILE writes what was launched as JSON (of several processes, the last to end writes it);
# REHEARSAL_FOLDER says where the library and the caches go. Texts, perplexities and errors of such a run mean
# nothing; its times are the host's.
set -euo pipefail
here=$(cd "$(dirname "$0")/rehearse" && pwd)
folder=${REHEARSAL_FOLDER:-${XDG_CACHE_HOME:-$HOME/.cache}/flatllama/rehearsal}
found=$(python3 - <<'PYTHON'
import sys
from importlib.util import find_spec
from pathlib import Path
import torch
if torch.version.cuda is None:
    sys.exit(f"error: torch {torch.__version__} is no CUDA build: there is nothing to rehearse")
if find_spec("triton") is None:
    sys.exit("error: a rehearsal needs triton")
print(torch.__version__, Path(torch.__file__).parent / "lib", Path(torch.__file__).parents[1], sep="\n")
PYTHON
)
{ read -r version; read -r torch; read -r site; } <<< "$found"
mkdir -p "$folder/$version/lib"
folder=$(cd "$folder/$version" && pwd)
if [[ $folder == *[[:space:]:]* ]]; then
    echo "error: $folder: libraries are not preloaded from where a path has spaces or colons" >&2
    exit 2
fi
compiler=${CXX:-g++}
command -v "$compiler" > /dev/null || { echo "error: a rehearsal needs a C++ compiler: install g++" >&2; exit 2; }
headers=(-I"$torch/../include")
for include in "$site"/nvidia/cu1*/include "$site"/nvidia/cuda_runtime/include \
    "$site/triton/backends/nvidia/include"; do
    [[ -d $include ]] && headers+=(-I"$include")
done
library=$folder/lib/libcuda.so.1
if [[ ! -e $library || -n $(find "$here" "$here.sh" -newer "$library") ]]; then
    for name in runtime libraries; do
        "$compiler" -O1 -std=c++17 -fPIC "${headers[@]}" -c "$here/$name.cpp" -o "$folder/$name.o"
    done
    nm "$folder"/{runtime,libraries}.o | awk '$2 == "T" {print $3}' | sort -u > "$folder/defined"
    nm -D --undefined-only "$torch"/lib{c10_cuda,torch_cuda,torch_cuda_linalg,torch_python,caffe2_nvrtc}.so |
        awk '{print $2}' | sed 's/@.*//' | grep -E '^(cuda[A-Z]|__cuda|cublas|cusolver|nccl|cu[A-Z])' | sort -u |
        comm -23 - "$folder/defined" | sed 's/.*/extern "C" int &() { return 0; }/' > "$folder/rest.cpp"
    for name in cuInit cuCtxSetCurrent cuCtxGetLimit cuCtxSetLimit cuTensorMapEncodeTiled; do  # Triton's own
        grep -q " $name()" "$folder/rest.cpp" || echo "extern \"C\" int $name() { return 0; }" >> "$folder/rest.cpp"
    done
    "$compiler" -w -O1 -fPIC -c "$folder/rest.cpp" -o "$folder/rest.o"
    "$compiler" -shared "$folder"/{runtime,libraries,rest}.o -Wl,-soname,libcuda.so.1 -o "$library" -ldl
    ln -sf libcuda.so.1 "$folder/lib/libcuda.so"
fi
export LD_LIBRARY_PATH=$folder/lib LIBRARY_PATH=$folder/lib TRITON_LIBCUDA_PATH=$folder/lib
export TRITON_CACHE_DIR=$folder/triton TORCHINDUCTOR_CACHE_DIR=$folder/inductor
LD_PRELOAD=$library exec python3 "$@"
