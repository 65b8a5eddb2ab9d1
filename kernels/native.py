"""The C++ kernels of the CPU: built at first use, cached, loaded as `torch.ops.flatllama.*`.

`load()` compiles `cpu/*.cpp` with the system's C++ compiler into torch's extension cache
(`TORCH_EXTENSIONS_DIR`, else `~/.cache/torch_extensions`), in a folder named after a hash of the
sources, the flags and the versions. Kernels are compiled once per level (portable, AVX2, AVX-512
with VNNI); the level that this CPU has is chosen at load. Importing this file does nothing.

Environment: `CXX` names the compiler; `FLATLLAMA_CPU=portable|avx2|avx512` forces a level;
`FLATLLAMA_EXACT=1` keeps activations unrounded in the weight-only products.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

SOURCES = Path(__file__).parent / "cpu"
LEVEL_FILES = ("float", "int8", "int4", "attention", "level")  # compiled once per level
SHARED_FILES = ("linear_ops", "attention_ops")  # compiled once: no CPU flags, torch's headers
LEVELS = {"portable": []}
if platform.machine() in ("x86_64", "AMD64"):
    LEVELS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    LEVELS["avx512"] = [*LEVELS["avx2"], *(f"-mavx512{x}" for x in ("f", "bw", "vl", "dq", "vnni"))]
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fopenmp", "-w"]

_loaded: bool | None = None  # None: not tried yet
_exact = os.environ.get("FLATLLAMA_EXACT", "0") not in ("", "0")


def loaded() -> bool:
    """Whether the operators are there. Builds nothing."""
    return bool(_loaded)


def exact_activations(flag: bool | None = None) -> bool:
    """Whether weight-only products use activations as they are; `flag` sets it.

    By default int8 and int4 products round activations to int8 in blocks of 64 columns (the
    largest divisor of the group size up to 64), each with its own fp32 scale.
    """
    global _exact
    if flag is not None:
        _exact = flag
    return _exact


def load() -> bool:
    """Build (once) and load the operators. False, with one line on stderr, without a compiler."""
    global _loaded
    if _loaded is None:
        compiler = find_compiler()
        if compiler is None:
            _say("no C++ compiler (g++ or clang++): products run through ATen, slower")
        else:
            torch.ops.load_library(build(compiler))
            _register_fakes()
            torch.ops.flatllama.set_cpu_level(os.environ.get("FLATLLAMA_CPU") or "best")
        _loaded = compiler is not None
    return _loaded


def find_compiler() -> str | None:
    """The path of the C++ compiler: $CXX, g++ or clang++."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def _say(line: str) -> None:
    print(f"flatllama: {line}", file=sys.stderr, flush=True)


def _jobs(compiler: str, folder: Path) -> list[list[str]]:
    """One compiler command per object file."""
    torch_dir = Path(torch.__file__).parent / "include"
    shared = [f"-I{torch_dir}", f"-I{torch_dir / 'torch/csrc/api/include'}"]
    jobs = []
    for name in SHARED_FILES:
        jobs.append([*shared, str(SOURCES / f"{name}.cpp"), "-o", str(folder / f"{name}.o")])
    for level, flags in LEVELS.items():
        for name in LEVEL_FILES:
            out = str(folder / f"{name}.{level}.o")
            jobs.append([*flags, f"-DCPU_LEVEL={level}", str(SOURCES / f"{name}.cpp"), "-o", out])
    return [[compiler, *FLAGS, "-c", *job] for job in jobs]


def _key(compiler: str) -> str:
    """A hash of everything that the library depends on."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    digest = hashlib.sha256(f"{torch.__version__} {version.stdout} {_jobs('', Path())}".encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def build(compiler: str) -> Path:
    """The path of the built library. Two processes at once both build; the last rename stays."""
    default = Path.home() / ".cache" / "torch_extensions"
    cache = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or default) / "flatllama"
    library = cache / _key(compiler) / "flatllama.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    _say("building the CPU kernels, once, about a minute ...")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=library.parent) as name:
        jobs = _jobs(compiler, Path(name))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, jobs))
        lib = Path(torch.__file__).parent / "lib"
        parts = [job[-1] for job in jobs]
        links = [f"-L{lib}", "-ltorch", "-ltorch_cpu", "-lc10", "-fopenmp"]
        _run([compiler, "-shared", *parts, *links, "-o", f"{name}/flatllama.so"])
        os.replace(f"{name}/flatllama.so", library)
    _say(f"built in {time.monotonic() - began:.0f} s")
    return library


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")


def set_cpu_level(level: str) -> str:
    """Run the kernels of `level` (best, avx512, avx2, portable); returns the level's name."""
    return torch.ops.flatllama.set_cpu_level(level)


def read_bandwidth(size: int = 256 << 20, threads: int | None = None) -> float:
    """Bytes per second of a plain stream of reads, by torch's or by `threads` threads."""
    return torch.ops.flatllama.read_bandwidth(size, threads)


def _register_fakes() -> None:
    """Tell torch.compile and torch.export the shapes of the results."""

    def rows(x: Tensor, n: int) -> Tensor:
        return x.new_empty((*x.shape[:-1], n))

    def tiles(count: int, size: int, like: Tensor) -> Tensor:
        return like.new_empty((-(-count // 16), size), dtype=torch.uint8)

    fake = {
        "float_linear": lambda x, weight, bias: rows(x, weight.shape[0]),
        "int8_repack": lambda codes: tiles(codes.shape[0], -(-codes.shape[1] // 4) * 64, codes),
        "int8_linear": lambda x, tiles, scales, bias, N, K, exact: rows(x, N),
        "int8dq_linear": lambda x, tiles, scales, bias, N, K: rows(x, N),
        "int4_repack": lambda codes, scales, zeros, K, groupsize: tiles(
            codes.shape[0], (-(-K // 8) - (-K // groupsize)) * 64, codes
        ),
        "int4_linear": lambda x, tiles, bias, N, K, groupsize, exact: rows(x, N),
        "attention": lambda q, k_cache, v_cache, start, k_scale=None, v_scale=None, softmax_scale=None: (  # noqa: E501
            q.new_empty(q.shape)
        ),
    }
    for name, function in fake.items():
        torch.library.register_fake(f"flatllama::{name}", function)
