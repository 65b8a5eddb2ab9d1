"""What runs as one: torch.compile's graphs, and CUDA graphs."""

import gc
import hashlib
import sys
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

from errors import UserError
from kernels import native

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
COMPILE_MODE = "reduce-overhead"  # what the command lines take by default
GRAPH_MODES = ("reduce-overhead", "max-autotune")  # that capture a CUDA graph


def operators_tag() -> str:
    """A hash of our operators' signatures.

    Torch keeps compiled graphs on disk. Without this in their key, those of an earlier version
    would call operators with arguments that they no longer have.
    """
    schemas = torch._C._jit_get_all_schemas()
    own = sorted(str(schema) for schema in schemas if schema.name.startswith("flatllama::"))
    return hashlib.sha256("\n".join(own).encode()).hexdigest()


def one_graph(step: Callable, mode: str | None, dynamic: bool = False) -> Callable:
    """`step` through torch.compile.

    Torch's limit of recompilations is lifted for the whole process: each engine compiles its steps
    anew.
    """
    torch._dynamo.config.recompile_limit = 2**20
    if (tag := operators_tag()) not in torch.compiler.config.cache_key_tag:
        torch.compiler.config.cache_key_tag += tag
    return torch.compile(step, mode=mode, fullgraph=True, dynamic=dynamic)


_captured: weakref.WeakSet = weakref.WeakSet()


class Captured:
    """A function of tensors as a CUDA graph for each set of their shapes: one launch for the host.

    Called with new shapes it runs, and then is captured; from the next call on the graph is
    replayed. A result is written over by the next call. The graphs read the tensors that `model`
    has when they are captured, until its `revision` changes.
    """

    def __init__(self, f: Callable[..., Tensor], model: nn.Module):
        self.f, self.model, self.revision = f, model, model.revision
        self.graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}
        self.held: list[Tensor] = []  # what the graphs read lives as long as they
        _captured.add(self)

    def __call__(self, *inputs: Tensor) -> Tensor:
        if self.revision != self.model.revision:
            self.revision, self.graphs = self.model.revision, {}
        shapes = tuple(t.shape for t in inputs)
        if shapes not in self.graphs:
            result = self.f(*inputs)  # compiles, and allocates, what must not be while capturing
            self.graphs[shapes] = self.capture([t.clone() for t in inputs])
            return result
        graph, own, result = self.graphs[shapes]
        for mine, given in zip(own, inputs, strict=True):
            mine.copy_(given)
        graph.replay()
        return result

    def capture(self, inputs: list[Tensor]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        """The graph that replays the function on these inputs, they, and where its result lies."""
        self.held = [*self.model.parameters(), *self.model.buffers()]
        graph = torch.cuda.CUDAGraph()
        # They never run at once: one's memory serves all.
        pool = next((graph.pool() for graph, _, _ in self.graphs.values()), None)
        # cuBLAS's workspace has to lie in the graph's own memory, not in that of another's.
        torch._C._cuda_clearCublasWorkspaces()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = self.f(*inputs)
        torch._C._cuda_clearCublasWorkspaces()
        return graph, inputs, result


def release_graphs() -> None:
    """Give up all CUDA graphs: NCCL waits at its end for those that hold its launches."""
    for captured in _captured:
        captured.graphs.clear()
    if trees := sys.modules.get("torch._inductor.cudagraph_trees"):
        trees.reset_cudagraph_trees()
    gc.collect()


def configure_compiler(device: str | torch.device) -> None:
    """Inductor settings for decoding; called by each command line, never by an import.

    UserError where it has no C++ compiler for the CPU.
    """
    import torch._inductor.config as config

    if torch.device(device).type == "cpu":
        if (compiler := native.find_compiler()) is None:
            raise UserError("torch.compile needs a C++ compiler: install g++, or do not compile")
        config.cpp.cxx = (compiler,)
    config.coordinate_descent_tuning = True
    config.size_asserts = False  # checks between kernels, every step
    config.triton.unique_kernel_names = True
    torch.set_float32_matmul_precision("high")


def compiled_graphs() -> int:
    """How many graphs torch.compile has made so far: a difference of 0 is no recompilation."""
    if "torch._dynamo" not in sys.modules:  # importing it takes 2 s
        return 0
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def skipped_graphs() -> int:
    """How many compiled graphs torch left out of CUDA graphs, though the mode asked for them."""
    if "torch._dynamo" not in sys.modules:
        return 0
    return torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
