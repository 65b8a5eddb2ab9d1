"""The CUDA libraries that compute nothing: what they count, give back and refuse."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import native

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
REFUSED = 900  # cudaErrorStreamCaptureUnsupported
USE = """
import ctypes, sys
cuda = ctypes.CDLL(sys.argv[1])
device, stream, graph, run = (ctypes.c_void_p() for _ in range(4))
host, one = ctypes.create_string_buffer(b"x" * 8, 8), ctypes.create_string_buffer(b"x", 1)
size = ctypes.c_size_t
assert cuda.cudaMalloc(ctypes.byref(device), size(4096)) == 0
assert cuda.cudaMemcpyAsync(device, host, size(8), 1, None) == 0
assert cuda.cudaMemcpyAsync(host, device, size(8), 2, None) == 0 and host.raw == bytes(8)
assert cuda.cudaMemcpyAsync(one, device, size(1), 2, None) == 0 and one.raw == bytes([1])
assert cuda.cudaStreamBeginCapture(None, 0) == REFUSED
assert cuda.cudaStreamCreate(ctypes.byref(stream)) == 0
assert cuda.cudaStreamBeginCapture(stream, 0) == 0
after = ctypes.c_void_p(device.value + 2048)
assert cuda.cudaMemcpyAsync(after, device, size(8), 3, stream) == 0
assert cuda.cudaMemcpyAsync(host, device, size(8), 2, stream) == REFUSED
assert cuda.ncclAllReduce(device, device, size(8), 0, 0, None, stream) == 0
assert cuda.cudaStreamSynchronize(stream) == cuda.cudaDeviceSynchronize() == REFUSED
assert cuda.cudaStreamEndCapture(stream, ctypes.byref(graph)) == 0
assert cuda.cudaGraphInstantiateWithFlags(ctypes.byref(run), graph, ctypes.c_ulonglong()) == 0
assert cuda.cudaGraphLaunch(run, stream) == cuda.cudaGraphLaunch(run, stream) == 0
assert cuda.cudaDeviceSynchronize() == 0
cuda.ncclCommDestroy(None)  # refused: a graph holds a launch of NCCL's
assert cuda.cudaGraphExecDestroy(run) == cuda.ncclCommDestroy(None) == 0
found = ctypes.c_uint64()
assert cuda.cuPointerGetAttribute(ctypes.byref(found), 3, after) == 0
assert found.value == after.value and cuda.cuPointerGetAttribute(ctypes.byref(found), 3, host) != 0
assert cuda.cudaMalloc(ctypes.byref(graph), size(1 << 40)) == 2  # a GPU's memory ends
assert cuda.cudaFree(device) == 0 and cuda.cudaFree(device) != 0
""".replace("REFUSED", str(REFUSED))


@pytest.mark.skipif(native.find_compiler() is None, reason="no C++ compiler")
def test_what_a_gpu_would_do(tmp_path):
    triton = pytest.importorskip("triton")
    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    sources = [SCRIPTS / "rehearse" / name for name in ("runtime.cpp", "libraries.cpp")]
    library, report = tmp_path / "cuda.so", tmp_path / "report.json"
    subprocess.run(
        [native.find_compiler(), "-std=c++17", "-shared", "-fPIC", f"-I{headers}", *sources, "-o",
         library, "-ldl"], check=True,
    )  # fmt: skip
    environment = {**os.environ, "REHEARSAL_REPORT": str(report)}
    done = subprocess.run(
        [sys.executable, "-c", USE, library], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("a GPU would refuse") == 7
    assert json.loads(report.read_text()) == {
        "launches": {
            "copy from pageable memory to the device": 1,
            "copy from the device to pageable memory": 2,
            "copy from the device to the device": 1, "graph of 2": 2, "ncclAllReduce": 1,
        },
        "graphs": [2],
    }  # fmt: skip


@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch can be rehearsed")
def test_needs_pytorch_for_cuda():
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", SCRIPTS / "rehearse.sh", "-c", "pass"], capture_output=True, text=True,
        env={**os.environ, "PATH": path},
    )  # fmt: skip
    assert done.returncode != 0 and "is no CUDA build" in done.stderr
