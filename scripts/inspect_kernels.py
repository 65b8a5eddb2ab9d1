"""Compile the Triton kernels for GPUs that are not here, and read what came out of it.

python scripts/inspect_kernels.py --markdown > benchmarks/cuda_aot.md

The kernels are those that a weight [4096, 4096] runs on a card of 132 multiprocessors, in bf16; for
attention the shape of Llama-3-8B over 4096 slots. Registers, spills and shared memory come from
`cuobjdump`, the loads and the instructions of the loop over the columns from `nvdisasm`, both from
Triton's own wheel.

The last columns: how busy the loop keeps a multiprocessor's parts while an H200 reads weights at
4.3e12 bytes/s (18.6 bytes a cycle and multiprocessor). What is over 100% lies in the way. `issue`:
four warps' instructions a cycle. `integer`: two of integers, logic, comparisons and conversions,
and two multiplications (CUDA C++ Programming Guide, arithmetic instructions, 9.0). `shared`: a
wavefront of 128 bytes a cycle, bank conflicts included, counted by the emulator (ptx/). `tensor`:
1.7 cycles for a product 16 x 8 x 16 of bf16 or 16 x 8 x 32 of int8, which an H100 reaches with
mma.sync (Luo et al., arXiv:2402.13499).
"""

import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from errors import Parser
from kernels.choice import load_triton
from kernels.cuda.launch import Card, Launch

N = K = 4096
PROCESSORS = 132  # of an H100 or H200
SHARED = {  # bytes a program, by compute capability
    80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024,
}  # fmt: skip
BYTES_A_CYCLE = 4.3e12 / (PROCESSORS * 1.755e9)  # that a multiprocessor reads at the memory's limit
# opcodes that the integer units run; the others here are floats, loads or uniform
INTEGER = {
    "LOP3", "SHF", "PRMT", "IADD3", "VIADD", "LEA", "ISETP", "SEL", "SGXT", "BMSK", "PLOP3",
    "VIMNMX", "FMNMX", "FSEL", "FSETP", "F2FP", "I2F", "I2FP", "F2F", "F2I", "IABS",
}  # fmt: skip
# name: kind, bits, other fields of Product
FORMATS = {
    "bf16": ("plain", 16, {}),
    "int8": ("int8", 8, {}),
    "int8dq": ("int8", 8, {"dtype": torch.int8}),
    "float8": ("e4m3", 8, {"exponent": 4}),
    "fpx-4-3": ("float", 8, {"exponent": 4}),
    "fp6": ("float", 6, {"exponent": 3}),
    "int4 g64": ("integer", 4, {"group": 64, "zero": "float"}),
    "int8dq-int4 g128": ("integer", 4, {"group": 128}),
    "uint3 g64": ("integer", 3, {"group": 64, "zero": "int"}),
    "uint7 g64": ("integer", 7, {"group": 64, "zero": "int"}),
    "codebook4 g64": ("table", 4, {"group": 64}),
    "w4a8 g128": ("integer", 4, {"group": 128, "inner": True, "dtype": torch.int8}),
}
OF_FEW_ROWS = [name for name in FORMATS if name != "int8dq"]  # whose few rows are int8's


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def planes(bits: int) -> list[torch.Tensor | None]:
    """Storage of a weight [N, K], see kernels/cuda/layout.py."""
    if bits == 16:
        return [empty(N, K), None, None]
    if bits == 8:
        return [empty(N, K, dtype=torch.int8), None, None]
    types = {4: torch.int32, 2: torch.int16, 1: torch.int8}
    return [empty(N, K // 8, dtype=t) if bits & width else None for width, t in types.items()]


def weight_tensors(kind: str, bits: int, rest: dict):
    """planes, scales, row scales, table of a weight [N, K]."""
    group = rest.get("group", 0)
    lines = K // group // (1 if rest.get("zero") else 2) if group else 0
    scales = empty(lines, N, dtype=torch.int32) if group else None
    row_scales = None if kind == "plain" or (group and not rest.get("inner")) else empty(N)
    table = empty(16, dtype=torch.float32) if kind == "table" else None
    return planes(bits), scales, row_scales, table


def product_launch(
    name: str, rows: int, capability: int, dtype: torch.dtype = torch.bfloat16, **between
) -> Launch:
    """What a product of so many rows launches; see linear.Between for the rest."""
    from kernels.cuda.linear import Between, Product, matmul_launch

    kind, bits, rest = FORMATS[name]
    rest = {"dtype": dtype} | rest
    product = Product(rows, N, K, kind=kind, bits=min(bits, 8), **rest)
    x = empty(rows, K, dtype=product.dtype)
    x_scale = empty(rows, dtype=torch.float32) if product.dtype == torch.int8 else None
    tensors, arrived = weight_tensors(kind, bits, rest), empty(N, dtype=torch.int32)
    between, on = Between(**between), Card(PROCESSORS, SHARED[capability])
    out = empty(rows, N // 2 if between.gated else N)
    return matmul_launch(product, x, *tensors, arrived, x_scale, None, out, on, between)


def dequantize_launch(name: str) -> Launch:
    from kernels.cuda import linear

    kind, bits, rest = FORMATS[name]
    product = linear.Product(1024, N, K, torch.bfloat16, kind, bits, **rest)
    return linear.dequantize_launch(product, *weight_tensors(kind, bits, rest), empty(N, K))


def attention_launch(tokens: int, dtype: torch.dtype, fresh: bool = False) -> Launch:
    """Llama-3-8B: 32 heads on 8, of 128. `fresh`: as in a step, rotary embedding and all."""
    from kernels.cuda import attention

    q, cache = empty(1, 32, tokens, 128), empty(1, 8, 4096, 128, dtype=dtype)
    start, scale, new = empty(1, dtype=torch.int64), None, None
    if dtype == torch.int8:
        scale = empty(1, 8, 4096, 1)
    if fresh:
        q, *keys_values = empty(1, 48, tokens, 128).split([32, 8, 8], dim=1)
        table = empty(4096, 64, dtype=torch.float32)
        new = attention.Fresh(*keys_values, table, table)
    out, on = empty(1, 32, tokens, 128), Card(PROCESSORS, 0)
    arrived = empty(1024, dtype=torch.int32)
    return attention.attention_launch(q, cache, cache, start, scale, scale, arrived, out, on, new)


def step_launches(capability: int) -> Iterator[tuple[str, int, Launch]]:
    """What cuda/step.py launches besides: Llama-3-8B, one token."""
    from kernels.cuda.inputs import ready_launch
    from kernels.cuda.step import embed_launch

    norm, squares = empty(K), empty(1, 64, dtype=torch.float32)
    x, position = empty(1, N), empty(1, dtype=torch.int64)
    yield "embedding", 1, embed_launch(position, empty(128256, N), x, squares, norm, empty(1, N))
    for dtype, cache in ((torch.bfloat16, "bf16"), (torch.int8, "int8")):
        for tokens in (1, 16):
            launch = attention_launch(tokens, dtype, fresh=True)
            yield f"attention of a step, {cache} cache", tokens, launch
    out, scale = empty(1, K, dtype=torch.int8), empty(1, dtype=torch.float32)
    launch = ready_launch(x, norm, squares, None, 1e-5, out, scale, "symmetric")
    yield "norm, inputs quantized, symmetric", 1, launch
    for name in ("bf16", "int8", "int4 g64"):
        for rows in (1, 16):
            squares = empty(rows, 64, dtype=torch.float32)
            gated = {"squares": squares, "eps": 1e-5, "gated": True}
            added = {"residual": empty(rows, N), "factor": norm}
            yield f"{name}, normed and gated", rows, product_launch(name, rows, capability, **gated)
            yield f"{name}, residual", rows, product_launch(name, rows, capability, **added)


def between_launches() -> Iterator[tuple[str, int, Launch]]:
    """What cuda/between.py launches for a prompt of 128 tokens: Llama-3-8B."""
    from kernels.cuda.between import rotate_launch, silu_mul_launch, update_cache_launch
    from kernels.cuda.inputs import ready_launch

    q, k, v = empty(1, 128, 48, 128).split([32, 8, 8], dim=2)
    angles, position = empty(128, 64, dtype=torch.float32), empty(128, dtype=torch.int64)
    x, out = empty(128, N), empty(128, N)
    yield "norm", 128, ready_launch(x, empty(N), None, None, 1e-5, out, None, "none")
    for way, dtype in (("symmetric", torch.int8), ("asymmetric", torch.bfloat16),
                       ("float8", torch.bfloat16)):  # fmt: skip
        ready, scale = empty(128, N, dtype=dtype), empty(128, dtype=torch.float32)
        launch = ready_launch(x, None, None, None, 0.0, ready, scale, way)
        yield f"inputs quantized, {way}", 128, launch
    yield "rotary embedding", 128, rotate_launch(q, angles, angles, out)
    for dtype, kind in ((torch.bfloat16, "bf16"), (torch.int8, "int8")):
        cache = empty(1, 8, 4096, 128, dtype=dtype)
        scale = empty(1, 8, 4096, 1) if dtype == torch.int8 else None
        launch = update_cache_launch(k, v, cache, cache, scale, scale, position)
        yield f"into the cache, {kind}", 128, launch
    yield "silu times up", 128, silu_mul_launch(empty(128, 2 * 14336), empty(128, 14336))


def compiles(launch: Launch, capability: int) -> bool:
    """float8 has no conversion before 8.9; there its codes are taken apart as fpx-4-3's are."""
    return capability >= 89 or launch.constants.get("KIND") != "e4m3"


def cases(capability: int) -> Iterator[tuple[str, int, Launch]]:
    """(what, rows, launch) of every kernel and format."""
    for name in FORMATS:
        for rows in (1, 16, 128) if name in OF_FEW_ROWS else (128,):
            yield name, rows, product_launch(name, rows, capability)
    for name in ("int4 g64", "fp6"):
        yield name, 1024, dequantize_launch(name)
    for dtype in (torch.bfloat16, torch.int8):
        cache = str(dtype).removeprefix("torch.").replace("bfloat16", "bf16")
        for tokens in (1, 512):
            yield f"attention, {cache} cache", tokens, attention_launch(tokens, dtype)
    yield from step_launches(capability)
    yield from between_launches()


def tool(name: str, *arguments: str) -> str:
    """The output of one of the programs in Triton's wheel."""
    import triton.backends.nvidia as nvidia

    program = Path(nvidia.__path__[0]) / "bin" / name
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def loop_instructions(sass: list[str]) -> list[str]:
    """The opcodes between a label and the last branch back to it, of the longest such stretch."""
    labels, best = {}, []
    for i, line in enumerate(sass):
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label[1]] = i
        elif (jump := re.search(r"BRA.*`\((\.L\w+)\)", line)) and jump[1] in labels:
            body = opcodes(sass[labels[jump[1]] : i + 1])
            best = max(best, body, key=len) if len(body) > 1 else best
    return best


def opcodes(lines: list[str]) -> list[str]:
    pattern = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
    return [m[1] for line in lines if (m := pattern.match(line)) and m[1] != "NOP"]


def disassemble(cubin: bytes) -> tuple[str, list[str]]:
    """What a kernel uses, and its machine code line by line."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = tool("nvdisasm", "-c", file.name)
        return tool("cuobjdump", "-res-usage", file.name), sass.splitlines()


def class_of(opcode: str) -> str:
    """Which part of a multiprocessor an instruction keeps busy, besides the issue of it."""
    name = opcode.split(".")[0]
    if name in ("HMMA", "IMMA", "HGMMA", "IGMMA"):
        return "tensor"
    if name == "IMAD":
        return "multiplied"
    return "integer" if name in INTEGER else "other"


def loop_wavefronts(launch: Launch, capability: int) -> int:
    """Of shared memory in one turn of the loop over the columns: what two turns more cost."""
    from scripts.ptx.run import emulate

    counts = []
    for turns in (8, 10):
        arguments = {
            k: torch.zeros(v.shape, dtype=v.dtype) if isinstance(v, torch.Tensor) else v
            for k, v in launch.arguments.items()
        }
        # one block, its first columns: every weight here has at least 10 chunks
        longer = {"chunks_per_split": turns, "n_chunks": 10}
        one = replace(launch, arguments=arguments | longer, grid=(1, 1, 1))
        counts.append(emulate(one, capability))
    return (counts[1] - counts[0]) // 2


def busy(launch: Launch, capability: int, loop: list[str]) -> dict[str, float]:
    """How much of a multiprocessor's time one turn of a product's loop takes, see above."""
    c, warps = launch.constants, launch.options["num_warps"]
    planes = [launch.arguments[name] for name in ("fours", "twos", "ones")]
    weights = sum(p.element_size() for p in planes if p is not None) * c["BLOCK_N"] * c["J"]
    kinds = Counter(map(class_of, loop))
    cycles = {
        "issue": warps * len(loop) / 4,
        "integer": warps * max(kinds["integer"], kinds["multiplied"]) / 2,
        "shared": loop_wavefronts(launch, capability),
        "tensor": warps * kinds["tensor"] * 1.7,
    }
    return {name: value * BYTES_A_CYCLE / weights for name, value in cycles.items()}


def inspect(launch: Launch, capability: int) -> dict:
    """Registers, spills and shared memory (bytes), loads of weights, the loop."""
    compiled = launch.compile(capability)
    usage, lines = disassemble(compiled.asm["cubin"])
    numbers = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    every, loop = opcodes(lines), loop_instructions(lines)
    kinds = Counter(op for op in every if op.startswith(("LDG", "LDGSTS", "UTMALDG")))
    tensor = sorted({op for op in every if re.match(r"(HGMMA|IGMMA|HMMA|IMMA)", op)})
    weights = [op for op in kinds if ".EF" in op or "BYPASS" in op]
    c = launch.constants
    per_thread = c.get("BLOCK_N", 0) * c.get("J", 0) * c.get("SLOTS", 0)
    per_thread //= 32 * launch.options["num_warps"]
    return {
        "registers": numbers["REG"],
        "spilled_bytes": numbers["STACK"] + numbers["LOCAL"],
        "shared_bytes": compiled.metadata.shared,
        "weight_loads": sorted(weights) or sorted(kinds),
        "tensor": tensor,
        "loop": loop,
        "per_weight": len(loop) / per_thread if per_thread and loop else None,
    }


PARTS = ("issue", "integer", "shared", "tensor")
COLUMNS = (
    "what", "rows of x", "kernel", "sm", "registers", "spilled", "shared", "loads", "tensor cores",
    "loop instructions a weight and thread", *PARTS,
)  # fmt: skip


def table_row(what: str, rows: int, launch: Launch, capability: int) -> str:
    """One kernel; how busy it keeps what only for products of up to 16 rows on sm_90."""
    r = inspect(launch, capability)
    name, each = launch.kernel.__name__, r["per_weight"]
    parts = ["-"] * len(PARTS)
    if name == "matmul" and rows <= 16 and capability == 90:
        share = busy(launch, capability, r["loop"])
        parts = [f"{share[part]:.0%}" for part in PARTS]
    cells = (
        what, rows, name, capability, r["registers"], r["spilled_bytes"], r["shared_bytes"],
        " ".join(r["weight_loads"]), " ".join(r["tensor"]) or "-",
        f"{each:.1f}" if each else "-", *parts,
    )  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    """Compile the kernels and print what became of them."""
    parser = Parser(description="Compile the Triton kernels without a GPU.")
    parser.add_argument("--capability", type=int, nargs="+", default=[80, 90],
                        choices=SHARED)  # fmt: skip
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--markdown", action="store_true", help="the whole of cuda_aot.md")
    args = parser.parse_args()
    load_triton()
    if args.markdown:
        import triton

        print(f"# The Triton kernels, compiled without a GPU\n\nTriton {triton.__version__}.")
        print(f"\n```\n{__doc__.strip()}\n```\n")
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for capability in args.capability:
        for what, rows, launch in cases(capability):
            if args.only in what and compiles(launch, capability):
                print(table_row(what, rows, launch, capability), flush=True)


if __name__ == "__main__":
    main()
