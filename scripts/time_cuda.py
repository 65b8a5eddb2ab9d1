"""Time the Triton kernels on a GPU, one product at a time.

python scripts/time_cuda.py --json times.json
python scripts/time_cuda.py --formats int4 --kernels triton-pdl --json times.json

The times are of Llama-3-8B's largest weight [28672, 4096] and 1 to 2048 rows of x, replayed in a
CUDA graph over several copies of the weight, so that none is in the cache; beside each the same
product of a plain bf16 weight by the library, timed in turns. Where x is quantized, that is done
before. First every format runs once in a process of its own, `--jobs` at a time, which fills
Triton's cache.
"""

import argparse
import copy
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from errors import Parser, write_json
from kernels import choice
from kernels.formats import FORMATS
from kernels.linear import FEW_ROWS, Linear, QuantizedLinear
from measure import read_bandwidth
from scripts.check_cuda import make
from scripts.cuda_units import graph_of, in_processes, judged, overlaps

TIMED = ("bf16", "int8", "int8dq", "int4", "int8dq-int4", "float8", "float8dq-row", "fp6", "uint3",
         "int4-sparse24", "w4a8", "codebook4")  # fmt: skip
ROWS = (1, 2, 8, 16, 32, 64, 128, 256, 512, 2048)
WARM_UP = 0.3  # seconds: the clock of an idle GPU takes its time to rise


def module_of(name: str, n: int, k: int) -> torch.nn.Module:
    """A layer of random weights, ready to run."""
    if name not in FORMATS:
        return Linear(k, n, bias=False, device="cuda", dtype=torch.bfloat16)
    module = make(name, n, k, torch.bfloat16)
    module.repack()
    return module


def inputs(rows: int, k: int) -> torch.Tensor:
    return torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)


def products(modules: list[torch.nn.Module], x: torch.Tensor) -> list[Callable]:
    """The product of each of some equal layers with x, which is made ready once for all."""
    if not isinstance(modules[0], QuantizedLinear):
        return [partial(m, x) for m in modules]
    if len(x) > FEW_ROWS and getattr(modules[0], "has_scaled_mm", lambda: False)():
        q, scale = modules[0].quantize_input(x)
        return [partial(m.scaled_mm, q, scale, x.dtype) for m in modules]
    q, scale = modules[0].triton_input(x)
    q = modules[0].packed.arranged(q)
    if scale is not None:
        scale = scale.float().expand(len(x), 1).flatten().contiguous()
    return [partial(m.packed.product, q, None, scale, x.dtype) for m in modules]


def run_once(name: str, n: int, k: int) -> float:
    """Compile what `time_format` runs."""
    module = module_of(name, n, k)
    for rows in ROWS:
        module(inputs(rows, k))
    torch.cuda.synchronize()
    return 0.0


def times(graphs: list[tuple[torch.cuda.CUDAGraph, int]], repeats: int) -> list[list[float]]:
    """Seconds a call of each graph (graph, calls in it), in turns."""
    found: list[list[float]] = [[] for _ in graphs]
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    warm = time.perf_counter() + WARM_UP
    while time.perf_counter() < warm:
        for graph, _ in graphs:
            graph.replay()
        torch.cuda.synchronize()
    for _ in range(repeats):
        for (graph, calls), mine in zip(graphs, found, strict=True):
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            mine.append(begin.elapsed_time(end) / 1e3 / calls)
    return found


def time_format(name: str, n: int, k: int, read: float, repeats: int) -> list[dict]:
    """A row for each number of rows: the time, its part of the read bandwidth, bf16's time."""
    base, module = [module_of("bf16", n, k) for _ in range(2)], module_of(name, n, k)
    size = module.weight_bytes() if name in FORMATS else n * k * 2
    copies = [module, *(copy.deepcopy(module) for _ in range(max(1, 2**28 // size)))]
    rounds = 8  # of all copies in a graph, whose start costs some microseconds too
    result = []
    for rows in ROWS:
        x = inputs(rows, k)
        ours = graph_of(products(copies, x) * rounds)
        weights = [b.weight for b in base]
        plain = graph_of([partial(torch.nn.functional.linear, x, w) for w in weights * rounds])
        mine, other = times([(ours, len(copies) * rounds), (plain, len(base) * rounds)], repeats)
        second, bf16 = statistics.median(mine), statistics.median(other)
        result.append({
            "format": name, "rows": rows, "shape": [n, k], "seconds": second, "bytes": size,
            "percent_of_read_bandwidth": 100 * size / second / read, "bf16_seconds": bf16,
            "spread": statistics.pstdev(mine) / statistics.fmean(mine),
        })  # fmt: skip
    return result


def print_times(rows: list[dict]) -> None:
    for r in rows:
        noisy = "  (noisy)" if r["spread"] > 0.05 else ""
        print(
            f"{r['format']:<16}{r['rows']:>5} rows {r['seconds'] * 1e6:9.1f} us "
            f"{r['percent_of_read_bandwidth']:6.1f}% of the read bandwidth, "
            f"{r['bf16_seconds'] / r['seconds']:5.2f} times bf16 by the library{noisy}",
            flush=True,
        )


def main() -> int:
    """Compile in parallel, then time in turns; exit code 1 if a format does not run."""
    parser = Parser(description="Time the Triton kernels on a GPU.")
    parser.add_argument("--formats", default=",".join(TIMED), help="comma-separated")
    parser.add_argument("--kernels", choices=("triton", "triton-pdl"), default="triton")
    parser.add_argument("--shape", type=int, nargs=2, default=(28672, 4096), metavar=("N", "K"))
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="that compile")
    parser.add_argument("--limit", type=float, default=300, help="seconds of one of them")
    parser.add_argument("--check", metavar="UNIT", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    names = [name for name in args.formats.split(",") if name]
    if unknown := [name for name in names if name not in ("bf16", *FORMATS)]:
        parser.error(f"--formats {unknown[0]}: take bf16, {', '.join(FORMATS)}")
    if not torch.cuda.is_available():
        print("error: no GPU here", file=sys.stderr)
        return 2
    if args.kernels == "triton-pdl" and not overlaps():
        parser.error("--kernels triton-pdl needs compute capability 9.0")
    choice.choose(args.kernels)
    choice.load_triton()
    torch.set_grad_enabled(False)
    if args.check:  # "KERNELS FORMAT N K"
        kernels, name, n, k = args.check.split()
        choice.choose(kernels)
        write_json(
            args.json, {"checks": [judged(name, 1, partial(run_once, name, int(n), int(k)))]}
        )
        return 0
    read = read_bandwidth("cuda")
    figures = {"device": torch.cuda.get_device_name(), "torch": torch.__version__,
               "command": sys.argv, "kernels": args.kernels, "read_bandwidth_bytes_per_s": read,
               "failed": [], "times": []}  # fmt: skip
    units = [f"{args.kernels} {name} {args.shape[0]} {args.shape[1]}" for name in names]
    for found in in_processes(__file__, units, args.jobs, args.limit):
        figures["failed"] += [c["what"] for c in found if not c["ok"]]
    print(f"{figures['device']} reads {read / 1e9:.0f} GB/s; weight {list(args.shape)}")
    for name in names:
        try:
            rows = time_format(name, *args.shape, read, args.repeats)
        except Exception as failure:  # the other formats are timed all the same
            figures["failed"].append(f"{name}: {type(failure).__name__}: {failure}")
            continue
        print_times(rows)
        figures["times"] += rows
        write_json(args.json, figures)
    for failure in figures["failed"]:
        print(f"FAILED {failure}")
    return 1 if figures["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
