"""Check every Triton kernel on a GPU against its reference.

python scripts/check_cuda.py --json checks.json
python scripts/check_cuda.py --checks engine,attention,steps,int4 --json checks.json

Every format, rows of every kernel, ragged and regular shapes, against the canonical weight's
product in fp64; attention against its reference; what lies between products against torch; a whole
step as one operator against the same in fp32, and with overlapping kernels, which must change no
bit; the engine's compiled steps, captured in CUDA graphs. Nearly all of that time is Triton's,
which compiles over a thousand kernels, so each unit is checked in a process of its own, `--jobs` at
a time; a crash, or more than `--limit` seconds, ends that unit alone, and what is known is written
at once. Exit code 1 if a kernel is wrong. scripts/time_cuda.py times them.
"""

import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import CONFIGS, ModelConfig
from engine import Engine
from errors import Parser, write_json
from graphs import configure_compiler, skipped_graphs
from kernels import choice
from kernels.attention import attention, attention_reference, split_counters
from kernels.formats import FORMATS
from kernels.linear import Linear, QuantizedLinear
from model import KV_CACHES, RMSNorm, Transformer, rotate, silu_mul
from modes import parse_mode
from random_weights import random_model
from sampling import Sampling
from scripts.cuda_units import graph_of, in_processes, judged, overlaps

ROWS = (1, 2, 7, 16, 17, 64, 100, 600)
SHAPES = ((4096, 512), (576, 130), (203, 35))  # K, N
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 2e-3}
ROUNDED_TO_BF16 = ("int8dq-", "float8dq-")  # formats whose many rows pass through bf16
ATTENTION = [  # B, H, Hkv, T, S, D, start
    (1, 32, 8, 1, 4096, 128, [4000]), (2, 9, 3, 1, 700, 64, [650, 0]), (1, 8, 1, 5, 200, 80, [33]),
    (1, 32, 8, 128, 300, 128, [100]),
]  # fmt: skip
STEPS = [  # formats and caches
    ("bf16", "bf16"), ("int8", "int8"), ("int4", "bf16"), ("fp6", "int8"), ("int8dq", "bf16"),
    ("w4a8", "bf16"), ("float8dq-row", "bf16"), ("int4-sparse24", "bf16"),
]  # fmt: skip
DEVICE = "cuda"
STEP_CONFIG = ModelConfig(1024, 4, 16, 4, 2816, 4096, 64, max_positions=512)


def make(name: str, n: int, k: int, dtype: torch.dtype, device: str | None = None):
    """A module of random weights, not yet repacked."""
    cls, device = FORMATS[name], device or DEVICE
    w = torch.randn(n, k, device=device) * 0.05
    with torch.device(device):
        grid = cls(k, n, dtype=dtype).grid()
        params = grid.fit(w)
        codes = grid.round_to_nearest(w, params)
    return cls.from_codes(codes, {**params, **grid.shared()}, None, dtype)


def relative(y: torch.Tensor, want: torch.Tensor) -> float:
    return ((y.double() - want).norm() / want.norm()).item()


def check_format(name: str) -> Iterator[dict]:
    """One entry for each shape, type and number of rows."""
    for dtype, tolerance in TOLERANCE.items():
        for k, n in SHAPES:
            module = make(name, n, k, dtype)
            weight = module.dequantize().double()
            module.repack()
            for rows in ROWS:
                x = torch.randn(rows, k, device=DEVICE).to(dtype)
                limit = tolerance
                if rows > 16 and name.startswith(ROUNDED_TO_BF16):
                    limit = TOLERANCE[torch.bfloat16]
                what = f"{name} [{n}, {k}] {dtype}, {rows} rows"
                want = module.rounded_input(x) @ weight.t()
                yield judged(what, limit, lambda x=x, y=want, m=module: relative(m(x), y))


def check_float() -> Iterator[dict]:
    """Float weights, whose kernel serves up to 16 rows."""
    for dtype, tolerance in TOLERANCE.items():
        for k, n in SHAPES:
            linear = Linear(k, n, bias=True, device="cuda", dtype=dtype).requires_grad_(False)
            for rows in (1, 2, 16):
                x = torch.randn(rows, k, device=DEVICE).to(dtype)
                want = x.double() @ linear.weight.double().t() + linear.bias.double()
                what = f"{dtype} [{n}, {k}], {rows} rows"
                yield judged(what, tolerance, lambda x=x, y=want, m=linear: relative(m(x), y))


def check_attention() -> Iterator[dict]:
    """Attention of several shapes, caches of both kinds, against its reference."""
    for dtype, tolerance in TOLERANCE.items():
        for b, h, hkv, t, s, d, start in ATTENTION:
            q, start = torch.randn(b, h, t, d, device="cuda").to(dtype), torch.tensor(start).cuda()
            shape = (b, hkv, s, d)
            k, v = (torch.randn(shape, device="cuda").to(dtype) for _ in range(2))
            codes = [torch.randint(-127, 128, shape, device="cuda").to(torch.int8) for _ in "kv"]
            scales = [torch.rand(b, hkv, s, 1, device="cuda").to(dtype) / 100 for _ in "kv"]
            arrived = split_counters(q.device)
            for cache in ((k, v, start, None, None), (*codes, start, *scales)):
                want = attention_reference(q.float(), *cache).double()
                kind = str(cache[0].dtype)
                what = f"attention {[b, h, hkv, t, s, d]} {dtype}, {kind} cache"
                split = partial(attention, q, *cache, arrived)
                yield judged(what, tolerance, lambda y=want, f=split: relative(f(), y))


def between(given: tuple[torch.Tensor, ...], kind: str) -> list[torch.Tensor]:
    """What modules compute between products: rotated queries, a norm, silu(gate) * up, a cache."""
    qkv, cos, sin, position, x, weight, gate_up = given
    q, k, v = qkv.split([qkv.shape[2] - 4, 2, 2], dim=2)
    cache = KV_CACHES[kind](len(qkv), 2, 300, qkv.shape[3], qkv.dtype, DEVICE)
    cache.update(rotate(k, cos, sin), v, position)
    norm = RMSNorm(len(weight), 1e-5).to(x).requires_grad_(False)
    norm.weight.copy_(weight)
    kept = [cache.k.float(), cache.v.float()]
    if kind == "int8":
        kept = [c * s.float() for c, s in zip(kept, (cache.k_scale, cache.v_scale), strict=True)]
    return [rotate(q, cos, sin), norm(x), silu_mul(gate_up), *kept]


def check_between(t: int = 70, d: int = 128, width: int = 4096) -> Iterator[dict]:
    """What lies between the products of many rows, against torch's operators in fp32."""
    for dtype, tolerance in TOLERANCE.items():
        shapes = (2, t, 12, d), (2 * t, width), (width,), (2 * t, 6 * width)
        qkv, x, weight, gate_up = (torch.randn(s, device=DEVICE).to(dtype) for s in shapes)
        angles = 6 * torch.rand(2, t, 1, d // 2, device=DEVICE)
        position = torch.tensor([[3], [300 - t]], device=DEVICE) + torch.arange(t, device=DEVICE)
        given = qkv, angles.cos(), angles.sin(), position, x, weight, gate_up
        exact = tuple(tensor.float() if tensor.dtype == dtype else tensor for tensor in given)
        for kind in KV_CACHES:
            choice.choose("inductor")
            want = between(exact, kind)
            choice.choose("triton")

            def error(given=given, kind=kind, want=want) -> float:
                pairs = zip(between(given, kind), want, strict=True)
                errors = torch.tensor([relative(y, w.double()) for y, w in pairs])
                return errors.max().item()  # NaN, if there is one

            limit = 2 * tolerance if kind == "bf16" else 2e-2
            yield judged(f"between products, {dtype}, {kind} cache", limit, error)


class ExactLinear(torch.nn.Module):
    """A quantized layer in fp32: its weight dequantized, its inputs rounded as it rounds them."""

    def __init__(self, layer: QuantizedLinear):
        super().__init__()
        self.rounded_input = layer.rounded_input
        self.register_buffer("values", layer.dequantize().double())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.rounded_input(x).double() @ self.values.t()).to(x.dtype)


def step_model(name: str, cache: str, batch: int, exact: bool = False) -> Transformer:
    """A small bf16 model whose caches hold noise; `exact`: the same numbers in fp32."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = Transformer(STEP_CONFIG).to(torch.bfloat16)
    if exact:
        model.float()
    for path, layer in list(model.named_modules()):
        if isinstance(layer, Linear) and name in FORMATS:
            module = make(name, *layer.weight.shape, torch.bfloat16)
            if not exact:
                module.repack()
            model.set_submodule(path, ExactLinear(module) if exact else module)
    model.setup_cache(batch, 512, cache)
    for layer in model.layers:
        for buffer in layer.attention.kv_cache.buffers():
            if buffer.dtype == torch.int8:
                buffer.random_(-127, 128)
            elif buffer.is_floating_point():
                buffer.copy_((torch.rand(buffer.shape, device=DEVICE) / 40).bfloat16())
    return model


def wrong_rounds(model: Transformer, batch: int, t: int, kernels: str) -> tuple[int, float]:
    """Of 25 rounds, how many differ in some bit from the same steps one at a time, and how far.

    A round replays a graph of four steps at different positions, whose inputs are new each time, so
    that what a kernel reads too early is not what it would have read in time. A tiny difference in
    every round is another rounding of the compiler's, a large one in some is a race.
    """
    inputs = [
        (torch.zeros(batch, t, dtype=torch.int64, device=DEVICE),
         torch.arange(300 + 20 * i, 300 + 20 * i + batch, device=DEVICE)) for i in range(4)
    ]  # fmt: skip
    choice.choose(kernels)
    outputs = []
    graph = graph_of([lambda pair=pair: outputs.append(model(*pair)) for pair in inputs])
    wrong, far = 0, 0.0
    for _ in range(25):
        for tokens, _start in inputs:
            tokens.random_(STEP_CONFIG.vocab_size)
        graph.replay()
        found = [output.clone() for output in outputs[-4:]]
        choice.choose("triton")
        same = True
        for output, pair in zip(found, inputs, strict=True):
            torch.cuda.synchronize()
            want = model(*pair)
            if not torch.equal(output, want):
                same, far = False, max(far, relative(output, want.double()))
        wrong += not same
    return wrong, far


def step_error(name: str, cache: str, batch: int, t: int) -> tuple[float, Transformer]:
    """How much further off the fused step is than the modules, both beside fp32: 1 is as far."""
    tokens = torch.randint(0, STEP_CONFIG.vocab_size, (batch, t), device=DEVICE)
    start = torch.arange(300, 300 + batch, device=DEVICE)
    truth = step_model(name, cache, batch, exact=True)(tokens, start).double()
    model = step_model(name, cache, batch)
    modules = relative(model(tokens, start), truth)
    model.fuse()
    return relative(model(tokens, start), truth) / modules, model


def check_step(name: str, cache: str) -> Iterator[dict]:
    """A step as one operator beside the modules, and with overlapping kernels beside itself.

    A kernel that does not wait for the one in front would sooner or later change some bit.
    """
    for batch, t in ((1, 1), (2, 8), (3, 1)):
        what, models = f"step of {name}, {cache} cache, {batch} x {t}", []

        def error(batch=batch, t=t, models=models) -> float:
            ratio, model = step_error(name, cache, batch, t)
            models.append(model)
            return ratio

        yield judged(what, 2.0, error)
        for kernels in ("triton", "triton-pdl")[: 1 + overlaps()]:
            far = []

            def rounds(batch=batch, t=t, kernels=kernels, models=models, far=far) -> float:
                wrong, distance = wrong_rounds(models[0], batch, t, kernels)
                far.append(distance)
                return wrong

            entry = judged(f"{what}, {kernels}: rounds that differ", 1, rounds)
            yield {**entry, "largest_difference": far[0] if far else None}


def check_engine() -> Iterator[dict]:
    """Greedy texts of a tiny fp32 model, compiled and captured, beside the eager modules."""
    configure_compiler(DEVICE)
    torch.set_float32_matmul_precision("highest")  # else some products are of 11 bits, others of 24
    prompt = [[5 + i % 500 for i in range(600)]]  # chunks of two sizes

    def text(kernels: str, **settings) -> list[int]:
        choice.choose(kernels)
        mode = parse_mode("int4", 32)
        model = random_model(CONFIGS["tiny"], mode, DEVICE, torch.float32)
        engine = Engine(model, Sampling(temperature=0), length=700, **settings)
        engine.warm_up(len(prompt[0]))
        return engine.generate(prompt, 64).token_ids[0]

    want = text("triton", fused=False)

    def differing(kernels: str = "triton", **settings) -> float:
        return sum(a != b for a, b in zip(text(kernels, **settings), want, strict=True))

    yield judged("engine, one operator: tokens that differ", 1, differing)
    captured = partial(differing, compile_mode="reduce-overhead")
    yield judged("engine, captured prefill: tokens that differ", 1, captured)
    for kernels in ("triton", *(("triton-pdl",) if overlaps() else ()), "inductor"):
        before = skipped_graphs()
        compiled = partial(captured, kernels, compile_prefill=True)
        yield judged(f"engine, compiled, {kernels}: tokens that differ", 1, compiled)
        skipped = skipped_graphs() - before
        what = f"engine, {kernels}: CUDA graphs skipped"
        yield {"what": what, "error": skipped, "ok": skipped == 0}


def check(unit: str) -> Iterator[dict]:
    """The checks of a unit: a format, "step FORMAT CACHE" or one of UNITS."""
    if unit in FORMATS:
        return check_format(unit)
    if unit.startswith("step "):
        return check_step(*unit.split()[1:])
    return UNITS[unit]()


UNITS = {
    "engine": check_engine, "float": check_float, "attention": check_attention,
    "between": check_between,
}  # fmt: skip


def units_of(checks: str) -> list[str]:
    """The units that --checks asks for, what takes longest first. ValueError: no such unit."""
    wanted = []
    for name in checks.split(","):
        if name not in ("all", "steps", *UNITS, *FORMATS):
            raise ValueError(f"--checks {name}: take all, steps, {', '.join(UNITS)} or a format")
        wanted += [*UNITS, "steps", *FORMATS] if name == "all" else [name]
    units = [unit for unit in wanted if unit != "steps"]
    units += [f"step {name} {cache}" for name, cache in STEPS if "steps" in wanted]
    slow = ("fpx", "uint", "engine", "step", "codebook4")
    return sorted(dict.fromkeys(units), key=lambda unit: not unit.startswith(slow))


def main() -> int:
    """Run the checks; exit code 1 if a kernel is wrong."""
    parser = Parser(description="Check the Triton kernels on a GPU.")
    parser.add_argument("--checks", default="all", help="comma-separated: formats, steps, "
                        f"{', '.join(UNITS)}; default: all")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("--limit", type=float, default=300, help="seconds of one of them")
    parser.add_argument("--check", metavar="UNIT", help="check this alone, here, and stop")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no GPU here; tests/test_cuda.py checks what can be without", file=sys.stderr)
        return 2
    choice.choose("triton")
    choice.load_triton()
    torch.set_grad_enabled(False)
    figures = {"device": torch.cuda.get_device_name(), "torch": torch.__version__,
               "command": sys.argv, "checks": []}  # fmt: skip
    if args.check:
        for found in check(args.check):
            figures["checks"].append(found)
            write_json(args.json, figures)  # what is known so far
        return 0
    try:
        units = units_of(args.checks)
    except ValueError as error:
        parser.error(str(error))
    for found in in_processes(__file__, units, args.jobs, args.limit):
        figures["checks"] += found
        write_json(args.json, figures)
    wrong = [c for c in figures["checks"] if not c["ok"]]
    for c in wrong:
        print(f"WRONG {c['what']}" + ("" if c["error"] is None else f": error {c['error']:.2e}"))
    print(f"{len(figures['checks']) - len(wrong)} of {len(figures['checks'])} right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
