"""The steps of an engine compiled ahead of time: an AOTInductor package, one .pt2 file.

It holds code only: the decode step and the prefill of each chunk size, for one shape of model, mode
of quantization, batch, cache and device. The weights stay in the checkpoint; at load the code is
pointed at the tensors of the model and of its cache by their names. scripts/export.py writes one,
`generate.py --package` runs it without tracing or compiling anything.
"""

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import torch
from torch import Tensor, nn
from torch._C._aoti import AOTIModelPackageLoader

from engine import BUCKETS, Engine
from errors import UserError
from graphs import Captured
from kernels import native
from kernels.choice import chosen
from kernels.linear import QuantizedLinear
from model import Transformer
from sampling import sample

DECODE = "decode"


class DecodeStep(nn.Module):
    """token [B, 1] at positions start [B] -> logits [B, V]."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, token: Tensor, start: Tensor) -> Tensor:
        return self.model(token, start)[:, -1]


class PrefillStep(DecodeStep):
    """A chunk [B, T] at positions start [B] -> logits [B, V] after its rows last[b]."""

    def forward(self, tokens: Tensor, start: Tensor, last: Tensor) -> Tensor:
        return self.model(tokens, start, last)[:, -1]


def chunk_sizes(slots: int) -> list[int]:
    """The sizes of chunk that an engine with so many cache slots runs."""
    return sorted({min(bucket, slots) for bucket in BUCKETS})


def tensors_of(engine: Engine) -> dict[str, Tensor]:
    """Every tensor that a step reads or writes, by the name that the package knows it by."""
    step = DecodeStep(engine.model)
    named = [
        *step.named_parameters(remove_duplicate=False),
        *step.named_buffers(remove_duplicate=False),
    ]
    return dict(named)


def circumstances(device: torch.device) -> dict[str, str]:
    """What compiled code depends on besides the model; it runs under the same only.

    `layout` counts up when tiles of the same shape get another meaning.
    """
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else
        f"cpu {torch.backends.cpu.get_cpu_capability()}",
        "kernels": chosen() + (", C++" if native.loaded() else ""),
        "exact_activations": str(native.exact_activations()), "layout": "5",
    }  # fmt: skip


def write_package(engine: Engine, path: Path, report: Callable[[str], None]) -> None:
    """Export and compile the steps of `engine` into the file `path`, which appears when whole.

    `report` is called with a line for each step before it is compiled.
    """
    # Two seconds, which those who only run a package shall not wait.
    from torch._inductor.package import package_aoti

    if path.suffix != ".pt2":
        raise UserError(f"{path}: the name of a package ends in .pt2")
    batch, device = engine.batch, engine.device
    start = torch.zeros(batch, dtype=torch.int64, device=device)
    if engine.model.triton_step is not None:  # it means nothing to another process
        engine.model.unfuse()
    examples = {DECODE: (DecodeStep(engine.model), (start[:, None].clone(), start))}
    for size in chunk_sizes(engine.slots):
        tokens = torch.zeros(batch, size, dtype=torch.int64, device=device)
        step = (PrefillStep(engine.model), (tokens, start, start.clone()))
        examples[f"prefill-{size}"] = step
    about = {
        **circumstances(device), "batch": batch, "slots": engine.slots,
        "kv_cache": cache_kind(engine), "tensors": described(tensors_of(engine)),
        "model": described_model(engine.model),
    }  # fmt: skip
    options = {
        "aot_inductor.package": True,
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.metadata": {"flatllama": json.dumps(about)},
    }
    files = {}
    for name, (step, example) in examples.items():
        report(f"compiling {name}")
        files[name] = compile_step(step, example, options)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.pt2")
    try:
        package_aoti(str(temporary), files)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def compile_step(step: nn.Module, example: tuple[Tensor, ...], options: dict) -> list[str]:
    """The files of one step; a UserError where the C++ compiler fails."""
    from torch._inductor import aot_compile
    from torch._inductor.exc import CppCompileError, InductorError

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch about itself
        program = torch.export.export(step, example)
        try:
            return aot_compile(program.module(), example, options=options)
        except (CppCompileError, InductorError) as error:
            if "C++ compile error" not in str(error):
                raise
            raise UserError(compiler_said(str(error))) from None


def compiler_said(text: str) -> str:
    """Its first complaint in one line, and what is often missing."""
    lines = [line.strip() for line in text.splitlines()]
    first = next((line for line in lines if "error:" in line or "cannot find" in line), lines[0])
    hint = ""
    if "cuda" in first:
        hint = "; it needs the headers of the CUDA toolkit (CUDA_HOME) and the driver's libcuda.so"
    return f"the steps do not compile: {first}{hint}"


def cache_kind(engine: Engine) -> str:
    """As --kv_cache names it."""
    return "int8" if engine.model.layers[0].attention.kv_cache.k.dtype == torch.int8 else "bf16"


def described(tensors: dict[str, Tensor]) -> dict[str, list]:
    """Shapes and dtypes, for JSON."""
    return {name: [str(t.dtype), *t.shape] for name, t in sorted(tensors.items())}


def described_model(model: Transformer) -> dict:
    """What code depends on besides its tensors: numbers of the shape, formats of the layers."""
    layers = {
        name: layer.settings()
        for name, layer in model.named_modules()
        if isinstance(layer, QuantizedLinear)
    }
    return json.loads(json.dumps({"config": model.config.to_dict(), "layers": layers}))


def load_step(path: Path, name: str) -> AOTIModelPackageLoader:
    """One compiled step of a package: torch's loader without the 2 s import of its wrapper.

    For one thread: for more it would wait on a GPU until a run has ended before it begins another.
    """
    return AOTIModelPackageLoader(str(path), name, True, 1, -1)


class Package:
    """An opened package: what it was made for, and its steps."""

    def __init__(self, path: Path):
        if not path.is_file():
            raise UserError(f"no package at {path}: scripts/export.py writes one")
        self.path = path
        try:
            if damaged := ZipFile(path).testzip():  # torch's loader would run it
                raise ValueError(f"{damaged} is damaged")
            decode = load_step(path, DECODE)
            self.about = json.loads(decode.get_metadata()["flatllama"])
            names = [f"prefill-{size}" for size in chunk_sizes(self.about["slots"])]
            self.steps = {DECODE: decode, **{name: load_step(path, name) for name in names}}
        except (LookupError, TypeError, ValueError, RuntimeError, OSError, BadZipFile) as error:
            reason = str(error).strip().splitlines()[0]
            if "schema for flatllama" in reason:
                reason = f"--kernels {chosen()} does not load its kernels here: choose others"
                raise UserError(f"{path}: {reason}, or run scripts/export.py again") from None
            raise UserError(f"{path} is no package of scripts/export.py: {reason}") from None

    def check(self, device: torch.device, batch: int, kv_cache: str) -> None:
        """A UserError where the package was made for something else than is asked for."""
        wanted = {**circumstances(device), "batch": batch, "kv_cache": kv_cache}
        for name, value in wanted.items():
            if self.about.get(name) != value:
                raise UserError(
                    f"{self.path} was exported for {name} {self.about.get(name)}, and here it is "
                    f"{value}: run scripts/export.py again"
                )

    def drive(self, engine: Engine) -> None:
        """Make `engine` run the package's steps on its own tensors."""
        model, tensors = engine.model, tensors_of(engine)
        made_for = self.about["tensors"], self.about.get("model")
        if made_for != (described(tensors), described_model(model)):
            raise UserError(f"{self.path} was exported for another model, or another mode of it")
        for step in self.steps.values():
            needed = {name: tensors[name] for name in step.get_constant_fqns()}
            step.load_constants(needed, False, check_full_update=True, user_managed=True)
        revision = model.revision

        def run(name: str, *inputs: Tensor) -> Tensor:
            if model.revision != revision:  # the code would read tensors that are gone
                raise ValueError("the model's weights or cache have changed: drive it again")
            return self.steps[name].boxed_run(list(inputs))[0]

        def decode_step(token: Tensor, start: Tensor, u: Tensor) -> Tensor:
            return sample(run(DECODE, token, start), u, engine.sampling)[:, None]

        def prefill_step(tokens: Tensor, start: Tensor, last: Tensor) -> Tensor:
            return run(f"prefill-{tokens.shape[1]}", tokens, start, last)

        if engine.device.type == "cuda":
            decode_step, prefill_step = Captured(decode_step, model), Captured(prefill_step, model)
        engine.decode_step, engine.prefill_step = decode_step, prefill_step
