"""Check every Triton kernel on a GPU against its reference, then time them.

python scripts/check_cuda.py --json cuda.json

Checking comes first: every format, rows of every kernel, ragged and regular shapes, against the
canonical weight's product in fp64; attention against its reference; a whole step as one operator
against the modules, and with overlapping kernels, which must change no bit. Nearly all of that
time is Triton's, which compiles over a thousand kernels, so each format is checked in a process of
its own, `--jobs` at a time; a crash ends those checks alone. The times are of Llama-3-8B's
largest weight [28672, 4096], replayed in a CUDA graph over several copies of the weight, so that
none is in the cache; beside each the same product of a plain bf16 weight by the library, timed in
turns. Exit code 1 if a kernel is wrong.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kernels import choice
from kernels.attention import attention, attention_reference
from kernels.formats import FORMATS
from kernels.linear import Linear
from measure import read_bandwidth
from model import ModelConfig, Transformer

ROWS = (1, 2, 7, 16, 17, 64, 100, 600)
SHAPES = ((4096, 512), (576, 130), (203, 35))  # K, N
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 2e-3}
ROUNDED_TO_BF16 = ("int8dq-", "float8dq-")  # formats whose many rows pass through bf16
TIMED_ROWS = (1, 2, 8, 16, 32, 64, 128, 256, 512, 2048)
ATTENTION = [  # B, H, Hkv, T, S, D, start
    (1, 32, 8, 1, 4096, 128, [4000]), (2, 9, 3, 1, 700, 64, [650, 0]), (1, 8, 1, 5, 200, 80, [33]),
    (1, 32, 8, 128, 300, 128, [100]),
]  # fmt: skip
STEPS = [  # formats and caches
    ("bf16", "bf16"), ("int8", "int8"), ("int4", "bf16"), ("fp6", "int8"), ("int8dq", "bf16"),
    ("w4a8", "bf16"), ("float8dq-row", "bf16"), ("int4-sparse24", "bf16"),
]  # fmt: skip
STEP_CONFIG = ModelConfig(1024, 4, 16, 4, 2816, 4096, 64, max_positions=512)


def make(name: str, n: int, k: int, dtype: torch.dtype, device: str = "cuda"):
    """A module of random weights, not yet repacked."""
    cls = FORMATS[name]
    w = torch.randn(n, k, device=device) * 0.05
    with torch.device(device):
        grid = cls(k, n, dtype=dtype).grid()
        params = grid.fit(w)
        codes = grid.round_to_nearest(w, params)
    return cls.from_codes(codes, {**params, **grid.shared()}, None, dtype)


def relative(y: torch.Tensor, want: torch.Tensor) -> float:
    return ((y.double() - want).norm() / want.norm()).item()


def check_format(name: str) -> list[dict]:
    """One entry for each shape, type and number of rows."""
    found = []
    for dtype, tolerance in TOLERANCE.items():
        for k, n in SHAPES:
            module = make(name, n, k, dtype)
            weight = module.dequantize().double()
            module.repack()
            for rows in ROWS:
                x = torch.randn(rows, k, device="cuda").to(dtype)
                error = relative(module(x), module.rounded_input(x) @ weight.t())
                limit = tolerance
                if rows > 16 and name.startswith(ROUNDED_TO_BF16):
                    limit = TOLERANCE[torch.bfloat16]
                what = f"{name} [{n}, {k}] {dtype}, {rows} rows"
                found.append({"what": what, "error": error, "ok": error < limit})
    return found


def check_apart(unit: str) -> list[dict]:
    """`check` in a process of its own; one that fails counts as wrong."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "checks.json"
        command = [sys.executable, __file__, "--check", unit, "--json", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if out.exists():
            return json.loads(out.read_text())["checks"]
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return [{"what": f"{unit}: {last}", "error": float("nan"), "ok": False}]


def check_float() -> list[dict]:
    found = []
    for dtype, tolerance in TOLERANCE.items():
        for k, n in SHAPES:
            linear = Linear(k, n, bias=True, device="cuda", dtype=dtype).requires_grad_(False)
            for rows in (1, 2, 16):
                x = torch.randn(rows, k, device="cuda").to(dtype)
                want = x.double() @ linear.weight.double().t() + linear.bias.double()
                error = relative(linear(x), want)
                what = f"{dtype} [{n}, {k}], {rows} rows"
                found.append({"what": what, "error": error, "ok": error < tolerance})
    return found


def check_attention() -> list[dict]:
    """Attention of several shapes, caches of both kinds, against its reference."""
    found = []
    for dtype, tolerance in TOLERANCE.items():
        for b, h, hkv, t, s, d, start in ATTENTION:
            q, start = torch.randn(b, h, t, d, device="cuda").to(dtype), torch.tensor(start).cuda()
            shape = (b, hkv, s, d)
            k, v = (torch.randn(shape, device="cuda").to(dtype) for _ in range(2))
            codes = [torch.randint(-127, 128, shape, device="cuda").to(torch.int8) for _ in "kv"]
            scales = [torch.rand(b, hkv, s, 1, device="cuda").to(dtype) / 100 for _ in "kv"]
            for cache in ((k, v, start), (*codes, start, *scales)):
                want = attention_reference(q.float(), *cache)
                error = relative(attention(q, *cache), want.double())
                kind = "int8" if len(cache) > 3 else str(dtype)
                what = f"attention {[b, h, hkv, t, s, d]} {dtype}, {kind} cache"
                found.append({"what": what, "error": error, "ok": error < tolerance})
    return found


def step_model(name: str, cache: str, batch: int) -> Transformer:
    """A small model whose caches hold noise."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Transformer(STEP_CONFIG).to(torch.bfloat16)
    for path, layer in list(model.named_modules()):
        if isinstance(layer, Linear) and name in FORMATS:
            module = make(name, *layer.weight.shape, torch.bfloat16)
            module.repack()
            model.set_submodule(path, module)
    model.setup_cache(batch, 512, cache)
    for layer in model.layers:
        for buffer in layer.attention.kv_cache.buffers():
            if buffer.dtype == torch.int8:
                buffer.random_(-127, 128)
            else:
                buffer.copy_(torch.rand(buffer.shape, device="cuda") / 40)
    return model


def wrong_rounds(model: Transformer, batch: int, t: int, kernels: str) -> int:
    """Of 25 rounds, how many differ in some bit from the same steps one at a time.

    A round replays a graph of four steps at different positions, whose inputs are new each time, so
    that what a kernel reads too early is not what it would have read in time.
    """
    inputs = [
        (torch.zeros(batch, t, dtype=torch.int64, device="cuda"),
         torch.arange(300 + 20 * i, 300 + 20 * i + batch, device="cuda")) for i in range(4)
    ]  # fmt: skip
    choice.kernels(kernels)
    outputs = []
    graph = graph_of([lambda pair=pair: outputs.append(model(*pair)) for pair in inputs])
    wrong = 0
    for _ in range(25):
        for tokens, _start in inputs:
            tokens.random_(STEP_CONFIG.vocab_size)
        graph.replay()
        found = [output.clone() for output in outputs[-4:]]
        choice.kernels("triton")
        for output, pair in zip(found, inputs, strict=True):
            torch.cuda.synchronize()
            if not torch.equal(output, model(*pair)):
                wrong += 1
                break
    return wrong


def check_step(name: str, cache: str) -> list[dict]:
    """A step as one operator against the modules, and with overlapping kernels against itself.

    A kernel that does not wait for the one in front would sooner or later change some bit.
    """
    found = []
    for batch, t in ((1, 1), (2, 8), (3, 1)):
        model = step_model(name, cache, batch)
        tokens = torch.randint(0, STEP_CONFIG.vocab_size, (batch, t), device="cuda")
        start = torch.arange(300, 300 + batch, device="cuda")
        want = model(tokens, start).double()
        model.fuse()
        error = relative(model(tokens, start), want)
        what = f"step of {name}, {cache} cache, {batch} x {t}"
        found.append({"what": what, "error": error, "ok": error < 0.05})
        for kernels in ("triton", "triton-pdl")[: 1 + overlaps()]:
            wrong = wrong_rounds(model, batch, t, kernels)
            what = f"step of {name}, {cache} cache, {batch} x {t}, {kernels}: rounds that differ"
            found.append({"what": what, "error": wrong, "ok": wrong == 0})
    return found


def check(unit: str) -> list[dict]:
    """The checks of a unit: a format, "float", "attention" or "step FORMAT CACHE"."""
    if unit in FORMATS:
        return check_format(unit)
    if unit.startswith("step "):
        return check_step(*unit.split()[1:])
    return {"float": check_float, "attention": check_attention}[unit]()


def overlaps() -> bool:
    """Whether this GPU launches a kernel while the one in front of it runs."""
    return torch.cuda.get_device_capability() >= (9, 0)


def graph_of(calls: list[Callable]) -> torch.cuda.CUDAGraph:
    """The calls, warmed up and captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:3]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def times(graphs: list[tuple[torch.cuda.CUDAGraph, int]], repeats: int) -> list[list[float]]:
    """Seconds a call of each graph (graph, calls in it), in turns."""
    found: list[list[float]] = [[] for _ in graphs]
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for turn in range(3 + repeats):
        for (graph, calls), mine in zip(graphs, found, strict=True):
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn >= 3:
                mine.append(begin.elapsed_time(end) / 1e3 / calls)
    return found


def time_format(name: str, n: int, k: int, read: float, repeats: int) -> list[dict]:
    """A row for each number of rows: the time, its part of the read bandwidth, bf16's time."""
    base = [Linear(k, n, bias=False, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    module = make(name, n, k, torch.bfloat16) if name in FORMATS else base[0]
    if name in FORMATS:
        module.repack()
        size = module.weight_bytes()
    else:
        size = n * k * 2
    copies = [module, *(copy.deepcopy(module) for _ in range(max(1, 2**28 // size)))]
    rounds = 8  # of all copies in a graph, whose start costs some microseconds too
    result = []
    for rows in TIMED_ROWS:
        x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
        ours = graph_of([partial(m, x) for m in copies * rounds])
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
            f"{r['bf16_seconds'] / r['seconds']:5.2f} times bf16 by the library{noisy}"
        )


def main() -> int:
    """Check, then time; exit code 1 if a kernel is wrong."""
    parser = argparse.ArgumentParser(description="Check the Triton kernels on a GPU, time them.")
    parser.add_argument("--formats", help="comma-separated; default: all")
    parser.add_argument("--timed", default="bf16,int8,int8dq,int4,int8dq-int4,float8,float8dq-row,"
                        "fp6,uint3,codebook4,int4-sparse24,w4a8")  # fmt: skip
    parser.add_argument("--kernels", choices=("triton", "triton-pdl"), default="triton",
                        help="of the timed products")  # fmt: skip
    parser.add_argument("--shape", type=int, nargs=2, default=(28672, 4096), metavar=("N", "K"))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="formats at a time")
    parser.add_argument("--check", metavar="UNIT", help="check this alone, here, and stop")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no GPU here; tests/test_cuda.py checks what can be without", file=sys.stderr)
        return 2
    if args.kernels == "triton-pdl" and not overlaps():
        parser.error("--kernels triton-pdl needs compute capability 9.0")
    choice.kernels("triton")
    choice.load_triton()
    torch.set_grad_enabled(False)
    figures = {"device": torch.cuda.get_device_name(), "torch": torch.__version__,
               "command": sys.argv}  # fmt: skip

    def keep(**more) -> None:
        """Write what is known so far: a later crash loses nothing."""
        figures.update(more)
        if args.json:
            args.json.write_text(json.dumps(figures, indent=1))

    if args.check:
        keep(checks=check(args.check))
        return 0
    units = ["float", "attention", *(f"step {name} {cache}" for name, cache in STEPS)]
    units += args.formats.split(",") if args.formats else list(FORMATS)
    checks = []
    with ThreadPoolExecutor(args.jobs) as pool:
        for found in pool.map(check_apart, units):
            checks += found
            keep(checks=checks)
    wrong = [c for c in checks if not c["ok"]]
    for c in wrong:
        print(f"WRONG {c['what']}: error {c['error']:.2e}")
    print(f"{len(checks) - len(wrong)} of {len(checks)} products right")
    read = read_bandwidth("cuda")
    keep(checks=checks, read_bandwidth_bytes_per_s=read)
    shape = f"[{args.shape[0]}, {args.shape[1]}]"
    print(f"{figures['device']} reads {read / 1e9:.0f} GB/s; weight {shape}")
    rows = []
    choice.kernels(args.kernels)
    for name in filter(None, args.timed.split(",")):
        mine = time_format(name, *args.shape, read, args.repeats)
        print_times(mine)
        rows += mine
        keep(times=rows)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
