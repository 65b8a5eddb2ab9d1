"""Find the block sizes of the products' kernels on a GPU, for kernels/cuda/linear.py.

python scripts/tune_cuda.py --formats bf16,int8,int4 --rows 1 --json tune.json

Every candidate (rows of the weight a program, warps, stages) is timed on the four weights of a
Llama-3-8B layer, replayed in CUDA graphs over copies that no cache holds, all candidates in turns.
Beside their times stands what `linear.blocks` chooses now. First all are compiled, `--jobs`
processes at a time; a candidate that does not compile or run is left out.
"""

import copy
import itertools
import os
import statistics
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import CONFIGS
from errors import Parser, write_json
from kernels import choice
from kernels.formats import FORMATS
from scripts.cuda_units import graph_of, in_processes, judged
from scripts.time_cuda import inputs, module_of, products, times

TUNED = ("bf16", "int8", "int4", "int8dq-int4", "w4a8", "float8", "fp6", "uint3")
BLOCK_N, WARPS, STAGES = (32, 64, 128), (1, 2, 4), (3, 4, 5)
COPIES = 2**28  # bytes of weights that a graph goes through
Candidate = tuple[int, int, int]  # BLOCK_N, warps, stages


def shapes() -> list[tuple[int, int]]:
    """N, K of wqkv, wo, w13 and w2 of Llama-3-8B."""
    c = CONFIGS["llama-3-8b"]
    heads = c.n_heads * c.head_dim
    return [
        (heads + 2 * c.n_kv_heads * c.head_dim, c.dim), (c.dim, heads), (2 * c.ffn_dim, c.dim),
        (c.dim, c.ffn_dim),
    ]  # fmt: skip


def candidates() -> list[Candidate]:
    """Those of which a warp has 16 to 64 rows of the weight."""
    every = itertools.product(BLOCK_N, WARPS, STAGES)
    return [(n, warps, stages) for n, warps, stages in every if 16 <= n // warps <= 64]


@contextmanager
def blocks_of(candidate: Candidate | None):
    """Every launch inside takes the candidate's sizes; None: those of linear.py."""
    from kernels.cuda import linear

    own = linear.blocks

    def blocks(*args):
        constants, options = own(*args)
        n, warps, stages = candidate
        constants = constants | {"BLOCK_N": n, "STAGES": stages}
        return constants, options | {"num_warps": warps, "num_stages": stages}

    linear.blocks = own if candidate is None else blocks
    linear.sizes_of.cache_clear()
    try:
        yield
    finally:
        linear.blocks = own
        linear.sizes_of.cache_clear()


def compile_all(name: str, rows: int, n: int, k: int) -> float:
    """Run each candidate once, which fills Triton's cache."""
    module, x = module_of(name, n, k), inputs(rows, k)
    for candidate in [None, *candidates()]:
        with blocks_of(candidate):
            try:
                products([module], x)[0]()
                torch.cuda.synchronize()
            except Exception:  # too much shared memory, for example: `tune` says it
                continue
    return 0.0


def tune(name: str, rows: int, repeats: int) -> list[dict]:
    """Microseconds of each candidate on each weight, what linear.py chooses first."""
    found: dict[Candidate | None, list[float]] = {c: [] for c in [None, *candidates()]}
    for n, k in shapes():
        module, x = module_of(name, n, k), inputs(rows, k)
        size = sum(t.numel() * t.element_size() for t in [*module.buffers(), *module.parameters()])
        modules = [module, *(copy.deepcopy(module) for _ in range(COPIES // size))]
        graphs = {}
        for candidate in list(found):
            with blocks_of(candidate):
                try:
                    graphs[candidate] = graph_of(products(modules, x) * 4), len(modules) * 4
                except Exception as failure:
                    if candidate is None:
                        raise
                    print(f"{name} [{n}, {k}] {candidate} left out: {failure}", file=sys.stderr)
                    del found[candidate]
        for candidate, mine in zip(graphs, times(list(graphs.values()), repeats), strict=True):
            found[candidate].append(statistics.median(mine) * 1e6)
    return [
        {"format": name, "rows": rows, "blocks": candidate, "us": us, "layer_us": sum(us)}
        for candidate, us in found.items()
    ]


def main() -> int:
    """Compile in parallel, time, print the fastest five of each format beside today's choice."""
    parser = Parser(description="Find the block sizes of the products' kernels on a GPU.")
    parser.add_argument("--formats", default=",".join(TUNED), help="comma-separated")
    parser.add_argument("--rows", type=int, default=1, help="of x")
    parser.add_argument("--repeats", type=int, default=20, help="turns; a figure is their median")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="that compile")
    parser.add_argument("--limit", type=float, default=300, help="seconds of one of them")
    parser.add_argument("--check", metavar="UNIT", help="compile this format's candidates and stop")
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args()
    names = [name for name in args.formats.split(",") if name]
    if unknown := [name for name in names if name not in ("bf16", *FORMATS)]:
        parser.error(f"--formats {unknown[0]}: take bf16, {', '.join(FORMATS)}")
    if not torch.cuda.is_available():
        parser.error("no GPU here")
    choice.choose("triton")
    choice.load_triton()
    torch.set_grad_enabled(False)
    if args.check:  # "FORMAT ROWS N K"
        name, *numbers = args.check.split()
        check = judged(args.check, 1, partial(compile_all, name, *map(int, numbers)))
        write_json(args.json, {"checks": [check]})
        return 0
    results, failed = [], []
    units = [f"{name} {args.rows} {n} {k}" for name in names for n, k in shapes()]
    for found in in_processes(__file__, units, args.jobs, args.limit):
        failed += [c["what"] for c in found if not c["ok"]]
    for name in names:
        rows = tune(name, args.rows, args.repeats)
        results += rows
        write_json(args.json, {
            "device": torch.cuda.get_device_name(), "torch": torch.__version__,
            "command": sys.argv, "shapes": shapes(), "failed": failed, "results": results,
        })  # fmt: skip
        print(f"{name}, {args.rows} rows: a layer in {rows[0]['layer_us']:.1f} us as it is")
        for row in sorted(rows[1:], key=lambda r: r["layer_us"])[:5]:
            (n, warps, stages), each = row["blocks"], " ".join(f"{us:.1f}" for us in row["us"])
            sizes = f"{n:>5} rows, {warps} warps, {stages} stages"
            print(f"{sizes}: {row['layer_us']:.1f} us ({each})", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
