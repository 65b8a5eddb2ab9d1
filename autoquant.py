"""Autoquant: time the candidates on this device at the shapes of a real run, pick one per layer.

A sample run records which inputs each linear layer gets: how many rows, how often. For every shape
the candidates are timed in turns, warm, the median taken, over copies of the weight that make up a
WORKING_SET, because a decode step finds no weight in the caches either (a larger L3 asks for more).
A layer gets the candidate of least time, each number of rows weighted by its count. With `min_sqnr`
a candidate is out where it leaves a layer's outputs with a lower signal-to-noise ratio:

    SQNR = 20 log10(|y| / |y - y_hat|) dB      on a sample of the layer's own inputs

Our kernels are opaque to torch.compile, so they are timed as they are; on CUDA in a graph, as the
compiled decode step runs them. The plan is JSON, to be read, edited and used again.
"""

import copy
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backends import choose_kernels
from checkpoint import Checkpoint, load_model, read_json, repack
from engine import Engine
from errors import UserError, written_whole
from modes import FLOAT_MODES, Mode, parse_grouped, quantize_linear
from sampling import Sampling

WORKING_SET = 2**27  # bytes of weights that one timed pass goes through
SAMPLE = 64  # inputs of a layer that its signal-to-noise ratio is measured on


@dataclass
class Plan:
    """Which mode each layer gets, and why.

    Attributes:
        layers: name -> {"mode": "int4:64", "shape": [N, K], "calls": {rows: count}, "sqnr": {mode:
            dB}}; what is not to be quantized has mode "bf16", whatever its float dtype is.
        timings: [{"shape": [N, K], "rows": 1, "seconds": {mode: seconds}}].
        min_sqnr: in dB, or None.
    """

    device: str
    candidates: list[str]
    min_sqnr: float | None
    layers: dict[str, dict]
    timings: list[dict]

    def modes(self) -> dict[str, Mode]:
        """The mode of every layer that is quantized."""
        try:
            parsed = {name: parse_grouped(layer["mode"]) for name, layer in self.layers.items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"the plan's layers are malformed ({error!r})") from None
        for name, mode in parsed.items():
            if mode.needs_checkpoint:
                raise UserError(f"the plan gives {name} {mode}, which is calibrated: take another")
        return {name: mode for name, mode in parsed.items() if mode.format not in FLOAT_MODES}

    def save(self, path: Path) -> None:
        with written_whole(path) as partial:
            partial.write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, path: Path) -> "Plan":
        """Raises UserError when the file is no plan."""
        try:
            plan = cls(**read_json(path))
            if not all(isinstance(c, str) for c in plan.candidates):
                raise TypeError("candidates")
            if not isinstance(plan.min_sqnr, int | float | None):
                raise TypeError("min_sqnr")
        except TypeError as error:
            raise UserError(f"{path} is no plan ({error})") from None
        plan.modes()
        return plan


@dataclass
class Calls:
    """What a layer got in the recorded run: {rows: count}, and up to SAMPLE inputs [S, K]."""

    rows: Counter
    sample: Tensor


def record(linears: dict[str, nn.Linear], run: Callable[[], object]) -> dict[str, Calls]:
    """Call `run` and note the inputs of every layer."""
    calls = {}

    def note(name: str, x: Tensor) -> None:
        x = x.detach().reshape(-1, x.shape[-1])  # [rows, K]
        entry = calls.setdefault(name, Calls(Counter(), x[:0]))
        entry.rows[len(x)] += 1
        if len(entry.sample) < SAMPLE:
            stride = max(1, len(x) // SAMPLE)
            entry.sample = torch.cat([entry.sample, x[::stride]])[:SAMPLE]

    hooks = [
        linear.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
        for name, linear in linears.items()
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    if missing := [name for name in linears if name not in calls]:
        raise UserError(f"the sample run never reaches {missing[0]}")
    return calls


def candidate(linear: nn.Linear, text: str) -> nn.Module:
    """The layer in a candidate's mode, not yet repacked."""
    mode = parse_grouped(text)
    return linear if mode.format in FLOAT_MODES else quantize_linear(linear, mode)


def sqnr(y: Tensor, y_hat: Tensor) -> float:
    """Signal-to-noise ratio of y_hat in dB, at most 300."""
    noise = (y - y_hat).norm().item()
    return 20 * math.log10(max(y.norm().item(), 1e-30) / max(noise, 1e-15 * y.norm().item(), 1e-30))


@torch.no_grad()
def layer_sqnr(linear: nn.Linear, sample: Tensor, candidates: list[str]) -> dict[str, float]:
    """SQNR of the layer's outputs for each candidate that quantizes it."""
    x = sample.float()
    bias = None if linear.bias is None else linear.bias.float()
    y = F.linear(x, linear.weight.float(), bias)
    modules = {c: candidate(linear, c) for c in candidates}
    return {
        c: round(sqnr(y, module(x).float()), 2)
        for c, module in modules.items()
        if module is not linear
    }


def copies(module: nn.Module, working_set: int) -> list[nn.Module]:
    """The module, ready to run, and as many copies as make up a working set."""
    module = copy.deepcopy(module)
    repack(module)
    tensors = [*module.parameters(), *module.buffers()]
    size = sum(t.numel() * t.element_size() for t in tensors)
    count = min(max(1, working_set // max(size, 1)), 1024)
    return [module, *(copy.deepcopy(module) for _ in range(count - 1))]


def timed_pass(modules: list[nn.Module], x: Tensor) -> Callable[[], float]:
    """A function that runs all modules on x once and returns the seconds for each of them."""

    def work():
        for module in modules:
            module(x)

    if x.is_cuda:
        work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        work = graph.replay

    def run() -> float:
        if x.is_cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        if x.is_cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / len(modules)

    return run


@torch.no_grad()
def time_candidates(
    linear: nn.Linear, rows: list[int], candidates: list[str], turns: int, working_set: int
) -> list[dict]:
    """Median seconds of each candidate at each number of rows: [{rows, seconds: {mode: s}}]."""
    sets = {c: copies(candidate(linear, c), working_set) for c in candidates}
    timings = []
    for count in sorted(rows):
        x = torch.randn(count, linear.in_features).to(linear.weight)
        # Many rows compute longer than they read: the caches matter less, fewer copies do.
        most = max(2, 256 // count) if count > 1 else None
        passes = {c: timed_pass(modules[:most], x) for c, modules in sets.items()}
        for run in passes.values():
            run(), run()
        times: dict[str, list[float]] = {c: [] for c in passes}
        for _ in range(turns):
            for c, run in passes.items():
                times[c].append(run())
        timings.append(
            {"rows": count, "seconds": {c: statistics.median(t) for c, t in times.items()}}
        )
    return timings


def make_plan(
    linears: dict[str, nn.Linear],
    run: Callable[[], object],
    candidates: list[str],
    *,
    min_sqnr: float | None = None,
    turns: int = 15,
    working_set: int = WORKING_SET,
    progress: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Record `run`, time every shape, pick a mode for each of the layers.

    Args:
        linears: the unquantized layers by name, as `run` uses them, on the device to time.
        candidates: modes, groups as in "int4:64"; "bf16" leaves a layer as it is.
        min_sqnr: in dB; a layer that no candidate serves stays unquantized.
    """
    calls = record(linears, run)
    shapes: dict[tuple[int, int], list[str]] = {}
    for name, linear in linears.items():
        shapes.setdefault((linear.out_features, linear.in_features), []).append(name)
    plan = Plan(device_of(linears), candidates, min_sqnr, {}, [])
    for shape, names in shapes.items():
        progress(f"timing {shape[0]} x {shape[1]}")
        rows = sorted({r for name in names for r in calls[name].rows})
        timings = time_candidates(linears[names[0]], rows, candidates, turns, working_set)
        plan.timings += [{"shape": list(shape), **t} for t in timings]
        seconds = {t["rows"]: t["seconds"] for t in timings}
        for name in names:
            layer = {"mode": "bf16", "shape": list(shape), "calls": dict(calls[name].rows)}
            if min_sqnr is not None:
                progress(f"signal to noise of {name}")
                layer["sqnr"] = layer_sqnr(linears[name], calls[name].sample, candidates)
            layer["mode"] = fastest(layer, seconds, candidates, min_sqnr)
            plan.layers[name] = layer
    return plan


def fastest(
    layer: dict, seconds: dict[int, dict[str, float]], candidates: list[str],
    min_sqnr: float | None,
) -> str:  # fmt: skip
    """The candidate of least time over all calls, among those that are good enough."""
    noise = layer.get("sqnr", {})
    fit = [c for c in candidates if min_sqnr is None or noise.get(c, math.inf) >= min_sqnr]
    total = {c: sum(n * seconds[int(r)][c] for r, n in layer["calls"].items()) for c in fit}
    return min(total, key=total.get, default="bf16")


def device_of(linears: dict[str, nn.Linear]) -> str:
    """The kind of device that the layers are on."""
    return next(iter(linears.values())).weight.device.type


def read_or_make_plan(
    path: Path | None, source: Checkpoint, names: list[str], candidates: list[str], device: str,
    min_sqnr: float | None, seed: int, progress: Callable[[str], None],
) -> Plan:  # fmt: skip
    """The plan in the file `path`; if there is none, one for these layers, which goes there.

    The sample run is a prompt of 256 random tokens and 128 new ones.
    """
    if path and path.exists():
        plan = Plan.load(path)
        if plan.device != (kind := torch.device(device).type):
            raise UserError(f"{path} was timed on {plan.device}, not {kind}: remove it, or take "
                            f"--device {plan.device}")  # fmt: skip
        if set(plan.layers) != set(names):
            raise UserError(f"{path} is a plan for other layers than those of {source.path}")
        if plan.candidates != candidates or min_sqnr not in (None, plan.min_sqnr):
            raise UserError(
                f"{path} is a plan of {', '.join(plan.candidates)} with --min_sqnr "
                f"{plan.min_sqnr}: ask for the same, or remove it"
            )
        return plan
    choose_kernels("auto", device)
    model = load_model(source, device)
    length = min(384, source.config.max_positions)
    generator = torch.Generator().manual_seed(seed)
    shape = (length * 2 // 3,)
    prompt = torch.randint(source.config.vocab_size, shape, generator=generator).tolist()
    engine = Engine(model, Sampling(temperature=0), length=length, fused=False)
    plan = make_plan(
        {name: model.get_submodule(name) for name in names},
        lambda: engine.generate([prompt], length - len(prompt)),
        candidates, min_sqnr=min_sqnr, progress=progress,
    )  # fmt: skip
    if path:
        plan.save(path)
    return plan
