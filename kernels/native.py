"""The C++ kernels of the CPU: built at first use, cached, loaded as `torch.ops.flatllama.*`.

`load()` compiles `cpu/*.cpp` with the system's C++ compiler into torch's extension cache
(`TORCH_EXTENSIONS_DIR`, else `~/.cache/torch_extensions`), each file under a hash of the sources,
the flags and the versions, so that an edit rebuilds only what it touches. Kernels are compiled once
per level (portable, AVX2, that with VNNI, AVX-512 with VNNI, that with VBMI, with BF16, with AMX);
the best that this CPU has is chosen at load. Importing this file does nothing.

Environment: `CXX` names the compiler; `FLATLLAMA_CPU` forces a level (portable, avx2, avxvnni,
avx512, avx512vbmi, avx512bf16, amx); `FLATLLAMA_EXACT=1` keeps activations of weight-only products
unrounded.
"""

import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from kernels.choice import chosen

SOURCES = Path(__file__).parent / "cpu"
LEVELS = {"portable": []}
if platform.machine() in ("x86_64", "AMD64"):
    LEVELS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    LEVELS["avxvnni"] = [*LEVELS["avx2"], "-mavxvnni"]
    LEVELS["avx512"] = [*LEVELS["avx2"], *(f"-mavx512{x}" for x in ("f", "bw", "vl", "dq", "vnni"))]
    LEVELS["avx512vbmi"] = [*LEVELS["avx512"], "-mavx512vbmi"]
    LEVELS["avx512bf16"] = [*LEVELS["avx512"], "-mavx512bf16"]
    LEVELS["amx"] = [*LEVELS["avx512bf16"], "-mamx-tile", "-mamx-int8", "-mamx-bf16"]
# What these levels have of their own; the rest is of the levels below.
FILES = {
    "avx512vbmi": ("planes",),
    "avx512bf16": ("float", "halves"),
    "amx": ("amx", "amx_few", "amx_int4"),
}
THEIRS_ALONE = ("halves", "amx", "amx_few", "amx_int4")
FLAGS = ["-std=c++20", "-fPIC", "-fopenmp", "-w"]

_loaded: bool | None = None  # None: not tried yet
_exact = os.environ.get("FLATLLAMA_EXACT", "0") not in ("", "0")


class BuildError(RuntimeError):
    """The compiler does not take a file; the message is its first error."""


def loaded() -> bool:
    """Whether the operators are there. Builds nothing."""
    return bool(_loaded)


def prepare(device: torch.device) -> bool:
    """Whether the C++ operators serve that device; loads, and at first use builds them."""
    return device.type == "cpu" and chosen() == "auto" and load()


def serves(x: Tensor) -> bool:
    """Whether the C++ operators run for x: on the CPU, where they are there and wanted."""
    return bool(_loaded) and x.device.type == "cpu" and chosen() == "auto"


def exact_activations() -> bool:
    """Whether weight-only products use activations as they are.

    By default these round x in blocks of at most 64 columns (the largest divisor of the group size
    up to 64), each with a scale of its own:

        format                        rounded to   from level on   rows of x
        int4                          int8         any             all (a)
        int8                          16 bits      avx2            all (b)
        uint1 .. uint7                16 bits      avx2            16; with AVX-512 all (c)
        int4-sparse24                 16 bits      avx512          all (d)
        codebook4                     16 bits      avxvnni         16 (d, e)
        fpx-2-M, fpx-3-M of 4 bits    16 bits      avxvnni         16 (d, e, f)
            the same of 5 and 6 bits  16 bits      avx512vbmi      16 (d, e, f)

    int4 does so with x of any type, the others with bf16 and fp16. Rows are all of a forward pass,
    padding included. On AMX with bf16: (a) below 256; (b) 16, in the operator of the whole model
    128; (c) 16, in that operator 31; (d) 16. (e) In that operator with AVX-512 128. (f) From BF16
    on with bf16: 2.
    """
    return _exact


def set_exact_activations(flag: bool) -> None:
    """For models that are fused from now on (`Transformer.fuse`); one that is keeps what it has."""
    global _exact
    _exact = flag


def load() -> bool:
    """Build (once) and load the operators. False, with one line on stderr, where that fails.

    ValueError: FLATLLAMA_CPU names a level that there is not, or that this CPU lacks.
    """
    global _loaded
    if _loaded is None:
        compiler, level = find_compiler(), os.environ.get("FLATLLAMA_CPU") or "best"
        if level not in ("best", *LEVELS):
            raise ValueError(f"FLATLLAMA_CPU={level}: take one of {', '.join(LEVELS)}")
        _loaded = False
        if compiler is None:
            _say("no C++ compiler (g++ or clang++): products run through ATen, slower")
            return False
        try:
            library = build(compiler)
        except (BuildError, OSError, subprocess.CalledProcessError) as error:
            _say(f"{compiler} cannot build the kernels ({error}): products run through ATen")
            return False
        torch.ops.load_library(library)
        try:
            set_cpu_level(level)
        except ValueError as error:
            raise ValueError(f"FLATLLAMA_CPU={level}: {str(error).splitlines()[0]}") from None
        _register_fakes()
        _loaded = True
    return _loaded


def find_compiler() -> str | None:
    """The path of the C++ compiler: $CXX, g++ or clang++."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def _say(line: str) -> None:
    print(f"flatllama: {line}", file=sys.stderr, flush=True)


def _with_headers(source: Path) -> set[Path]:
    """A source file and all of our headers that it includes, directly or not."""
    found, new = set(), {source}
    while new:
        found |= new
        texts = [path.read_text() for path in new]
        names = {name for text in texts for name in re.findall(r'#include "(.+)"', text)}
        new = {SOURCES / name for name in names} - found
    return found


def _jobs(compiler: str, folder: Path) -> list[tuple[list[str], Path]]:
    """Compiler commands and their object files, named after a hash of all they depend on.

    `*_ops.cpp` see torch's headers and are compiled once, for any CPU; the others once per level.
    """
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    include = Path(torch.__file__).parent / "include"
    torch_flags = ["-O2", f"-I{include}", f"-I{include / 'torch/csrc/api/include'}"]
    jobs = []
    for source in sorted(SOURCES.glob("*.cpp"), reverse=True):
        variants = [
            ["-O3", *flags, f"-DCPU_LEVEL={level}"]
            for level, flags in LEVELS.items()
            if source.stem in FILES.get(level, ())
            or (level not in FILES and source.stem not in THEIRS_ALONE)
        ]
        for flags in [torch_flags] if source.stem.endswith("_ops") else variants:
            command = [compiler, *FLAGS, *flags, "-c", source.name]
            key = f"{command} {version.stdout} {torch.__version__}".encode()
            texts = b"".join(path.read_bytes() for path in sorted(_with_headers(source)))
            digest = hashlib.sha256(key + texts).hexdigest()[:16]
            jobs.append((command, folder / f"{source.stem}.{digest}.o"))
    # those with torch's headers first: they take longest
    return sorted(jobs, key=lambda job: not job[1].name.split(".")[0].endswith("_ops"))


def _folder() -> Path:
    default = Path.home() / ".cache" / "torch_extensions"
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or default) / "flatllama"


def build(compiler: str) -> Path:
    """The path of the library, built where it is not there. Of two processes the second waits."""
    folder = _folder()
    jobs = _jobs(compiler, folder)
    names = "".join(out.name for _, out in jobs)
    library = folder / f"flatllama.{hashlib.sha256(names.encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(compiler, jobs, library)
    return library


def _compile(compiler: str, jobs: list[tuple[list[str], Path]], library: Path) -> None:
    """Compile the objects that are not cached yet, and link. Files appear whole or not at all."""
    todo = [(command, out) for command, out in jobs if not out.exists()]
    _say(f"building the CPU kernels ({len(todo)} of {len(jobs)} files), once, some minutes ...")
    began = time.monotonic()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: _run(*job), todo))
    lib = Path(torch.__file__).parent / "lib"
    links = [f"-L{lib}", "-ltorch", "-ltorch_cpu", "-lc10", "-fopenmp"]
    _run([compiler, "-shared", *(str(out) for _, out in jobs), *links], library)
    _say(f"built in {time.monotonic() - began:.0f} s")


def _run(command: list[str], out: Path) -> None:
    partial = f"{out}.{os.getpid()}"
    done = subprocess.run([*command, "-o", partial], capture_output=True, text=True, cwd=SOURCES)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or [""]
        raise BuildError(f"{out.name}: {lines[0].strip() or f'exit {done.returncode}'}")
    with open(partial, "rb") as file:  # or a power cut could leave a cut library under that name
        os.fsync(file.fileno())
    os.replace(partial, out)


def set_cpu_level(level: str, emulated: bool = False) -> str:
    """Run the kernels of `level` (best or a key of LEVELS); returns its name.

    A level that this CPU lacks is a ValueError, unless its instructions are `emulated`.
    """
    return torch.ops.flatllama.set_cpu_level(level, emulated)


def read_bandwidth(size: int = 256 << 20, threads: int | None = None) -> float:
    """Bytes per second of a plain stream of reads, by torch's or by `threads` threads."""
    return torch.ops.flatllama.read_bandwidth(size, threads)


def to_huge_pages(module: torch.nn.Module) -> None:
    """Move the matrices of a layer or a cache to huge pages, behind those moved before it."""
    for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
        if tensor.dim() > 1 and serves(tensor):
            tensor.data = torch.ops.flatllama.on_huge_pages(tensor.data)


def _register_fakes() -> None:
    """Tell torch.compile and torch.export the shapes of the results."""

    def rows(x: Tensor, n: int) -> Tensor:
        return x.new_empty((*x.shape[:-1], n))

    def tiles(count: int, size: int, like: Tensor) -> Tensor:
        return like.new_empty((-(-count // 16), size), dtype=torch.uint8)

    fake = {
        "float_linear": lambda x, weight, bias: rows(x, weight.shape[0]),
        "int8_repack": lambda codes: tiles(codes.shape[0], -(-codes.shape[1] // 4) * 64, codes),
        "int8_linear": lambda x, tiles, scales, bias, N, K, exact=False: rows(x, N),
        "int8dq_linear": lambda x, tiles, scales, bias, N, K: rows(x, N),
        "int4_repack": lambda codes, scales, zeros, K, groupsize: tiles(
            codes.shape[0], (-(-K // 8) - (-K // groupsize)) * 64, codes
        ),
        "int4_linear": lambda x, tiles, bias, N, K, groupsize, exact: rows(x, N),
        "int4dq_repack": lambda codes, scales, K, groupsize: tiles(
            codes.shape[0], -(-K // 32) * 256 + -(-K // groupsize) * 64, codes
        ),
        "int4dq_linear": lambda x, tiles, scales, bias, N, K, groupsize: rows(x, N),
        "coded_linear": lambda x, tiles, scales, zeros, positions, table, bias, N, *rest: rows(
            x, N
        ),
        "decode": lambda handle, tokens, embedding, start, last: embedding.new_empty(
            (tokens.shape[0], tokens.shape[1] if last is None else 1, embedding.shape[0])
        ),
        "decode_greedy": lambda handle, tokens, embedding, start: tokens.new_empty(tokens.shape),
        "rms_norm": lambda x, weight, eps: x.new_empty(x.shape),
        "silu_mul": lambda x: rows(x, x.shape[-1] // 2),
        "rotate": lambda x, cos, sin: x.new_empty(x.shape),
        "greedy": lambda logits: logits.new_empty(logits.shape[0], dtype=torch.int64),
        "top_k": lambda logits, k: logits.new_empty((logits.shape[0], k), dtype=torch.int64),
        "attention": lambda q, k_cache, v_cache, start, k_scale=None, v_scale=None: q.new_empty(
            q.shape
        ),
    }
    for name, function in fake.items():
        torch.library.register_fake(f"flatllama::{name}", function)
