"""What every measurement shares: spread, memory, the machine's name and its read bandwidth."""

import platform
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from engine import Engine
from errors import UserError
from kernels import native
from kernels.linear import QuantizedLinear
from modes import FLOAT_NAMES


def spread(values: Iterable[float]) -> dict[str, float]:
    """mean, std, p50 and p99 of measurements."""
    values = sorted(values)
    if not values:
        return dict.fromkeys(("mean", "std", "p50", "p99"), float("nan"))
    return {
        "mean": statistics.fmean(values),
        "std": statistics.pstdev(values),
        "p50": statistics.median(values),
        "p99": values[len(values) * 99 // 100],
    }


def peak_memory(device: str) -> int:
    """Bytes: the most that was allocated on a GPU, or resident in this process on the CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent held when it started us
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_memory(device: str) -> None:
    """Count `peak_memory` from now on, where the system can (on the CPU: Linux)."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes what is resident now


def free_memory(device: str) -> float:
    """Bytes that can still be taken; infinite where the system does not say."""
    if device.startswith("cuda"):
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # torch keeps it
        return torch.cuda.mem_get_info()[0] + unused
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    free = [int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable:")]
    return free[0] if free else float("inf")


def check_memory(wanted: int, what: str, device: str) -> None:
    """A UserError, before the system ends a process, where `what` wants more than is free."""
    if wanted > (free := free_memory(device)):
        raise UserError(f"{what}: {wanted / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free")


def device_name(device: str) -> str:
    """What the figures were measured on."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def read_bandwidth(device: str) -> float:
    """Bytes per second of a plain streaming read of 512 MB (CUDA: 4 GB), several times over: the
    median of the C++ kernel, the best of torch's sums.

    This is the limit that decoding is compared with: every byte of a buffer far larger than the
    caches read once, by all threads.
    """
    if device == "cpu" and native.loaded():
        return native.read_bandwidth(2**29)
    size, sums = (2**32, 8) if device.startswith("cuda") else (2**29, 1)
    x = torch.ones(size // 4, device=device)
    best = float("inf")
    for _ in range(6):
        if x.is_cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        total = [x.sum() for _ in range(sums)]  # on a GPU the launches hide behind one another
        total[-1].item()
        best = min(best, time.perf_counter() - begin)
    return size * sums / best


def step_bytes(engine: Engine, position: float) -> int:
    """Bytes that one decode step reads: the weights, and the cache filled up to `position`."""
    embedding = engine.model.tok_embeddings.weight
    head = getattr(engine.model.output, "linear", engine.model.output)  # tp.py wraps it
    tied = getattr(head, "weight", None) is embedding
    table = 0 if tied else embedding.numel() * embedding.element_size()
    cache = sum(
        b.numel() * b.element_size()
        for layer in engine.model.layers
        for b in layer.attention.kv_cache.buffers()
    )
    return weight_bytes(engine.model) - table + int(cache * position / engine.slots)


def numerics(model: nn.Module) -> dict:
    """What results depend on: how many layers are of each quantized format, {"int4.g64": 120,
    "int8": 1}, the type of the rest, and whether the C++ kernels of weight-only formats take
    activations as they are (None: they do not run)."""
    table = model.tok_embeddings.weight
    settings = [m.settings() for m in model.modules() if isinstance(m, QuantizedLinear)]
    names = [s["format"] + (f".g{s['groupsize']}" if s.get("groupsize") else "") for s in settings]
    return {
        "layers": dict(Counter(names)), "precision": FLOAT_NAMES[table.dtype],
        "exact_activations": native.exact_activations() if native.serves(table) else None,
    }  # fmt: skip


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the model's weights as they lie in memory, the cache and rotary table left out."""
    caches = {id(b) for layer in model.layers for b in layer.attention.kv_cache.buffers()}
    skip = caches | {id(model.rope_cos), id(model.rope_sin), id(model.cpp_plan)}
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.numel() * t.element_size() for i, t in tensors.items() if i not in skip)
