"""Which kernels run: the one setting behind `--kernels`, and where Triton is at hand.

    auto       the C++ products on the CPU, the Triton kernels on a GPU
    triton     the Triton kernels; on the CPU only under Triton's interpreter
    triton-pdl the same, each kernel launched while the one in front of it still runs
               (programmatic dependent launch; compute capability 9.0)
    inductor   plain PyTorch forms, for torch.compile to fuse
    aten       ATen's own int4 and int8 products on a GPU; attention and the rest as in `inductor`

What imports Triton is imported by `load_triton` alone (of `kernels/cuda` all but layout.py and
weight.py). The setting decides the layout at `repack`, so it is set before a model is loaded.
"""

import functools
import importlib
import importlib.util
import os

import torch

KERNELS = ("auto", "triton", "triton-pdl", "inductor", "aten")
_setting = "auto"


def chosen() -> str:
    """The setting, one of KERNELS."""
    return _setting


def choose(name: str) -> None:
    """Change the setting. ValueError: `name` is none of KERNELS."""
    global _setting
    if name not in KERNELS:
        raise ValueError(f"kernels {name!r}: known are {', '.join(KERNELS)}")
    _setting = name


def aten_on(device: torch.device) -> bool:
    """Whether ATen's own quantized products are asked for on `device`."""
    return _setting == "aten" and device.type == "cuda"


def interpreting() -> bool:
    """Whether Triton runs its kernels on the CPU, in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def dependent_launch() -> bool:
    """Whether the Triton kernels overlap: each then waits for the one in front of it itself."""
    return _setting == "triton-pdl" and not interpreting()


def triton_on(device: torch.device) -> bool:
    """Whether the Triton kernels serve tensors on `device`, by the setting and by what is there."""
    if device.type == "cuda":
        return _setting in ("auto", "triton", "triton-pdl") and torch.version.hip is None
    return _setting == "triton" and device.type == "cpu" and interpreting()


def eager_triton(device: torch.device) -> bool:
    """Whether what lies between products on `device` runs as Triton kernels, which are then loaded.

    Not while torch.compile traces: it fuses the formulas itself.
    """
    if torch.compiler.is_compiling() or not triton_on(device):
        return False
    _import_kernels()
    return True


def load_triton() -> None:
    """Import the Triton kernels, which registers their operators.

    Nothing while torch.compile traces, which cannot follow an import: load them before.
    """
    if not torch.compiler.is_compiling():
        _import_kernels()


@functools.cache
def _import_kernels() -> None:
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("the Triton kernels need `pip install triton`; or take --kernels aten")
    for name in ("linear", "attention", "step", "between"):
        importlib.import_module(f"kernels.cuda.{name}")
