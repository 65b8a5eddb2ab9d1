"""Quantize a checkpoint block by block, in the memory of about one block: quantize.py's files."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import checkpoint as ckpt
from calibration import LAYERS, CalibrationStream
from checkpoint_writer import VERSION, Writer
from config import ModelConfig
from kernels.packing import row_chunks
from model import TransformerBlock
from modes import (
    FLOAT_MODES,
    FLOAT_NAMES,
    Mode,
    check_finite,
    make_grid,
    quantize_linear,
    relative_error,
)


class CheckpointQuantizer:
    """Quantizes a checkpoint block by block: memory for about one block, the output on disk."""

    def __init__(
        self, source: ckpt.Checkpoint, mode: Mode, head: Mode, output: Path,
        device: str = "cpu", stream: CalibrationStream | None = None, options: dict | None = None,
        calibration: dict | None = None, modes: dict[str, Mode] | None = None,
    ):  # fmt: skip
        """`modes` names the mode of each quantized layer; None: `mode`, and `head` for the head."""
        self.source, self.mode, self.head, self.device = source, mode, head, device
        self.stream, self.options, self.report = stream, options or {}, []
        config = source.config
        self.dtype = FLOAT_MODES.get(mode.format, source.dtype)
        if modes is None:
            names = linear_names(config)[:-1] if mode.format not in FLOAT_MODES else []
            modes = dict.fromkeys(names, mode)
            if head.format not in FLOAT_MODES:
                modes["output"] = head
        self.modes = modes
        self.layers = {name: m.settings for name, m in modes.items()}
        target = ckpt.build_model(config, self.layers, self.dtype)
        state = target.state_dict()
        self.specs = {n: (state[n].dtype, list(state[n].shape)) for n in ckpt.tensor_names(target)}
        self.check_source()
        kept = head.format in FLOAT_MODES  # in the dtype of the rest, whichever head_mode names
        self.header = {
            "version": VERSION, "mode": str(mode), "groupsize": mode.groupsize,
            "algorithm": {"name": mode.algorithm or "rtn", **self.options, **(calibration or {})},
            "lm_head": FLOAT_NAMES[self.dtype] if kept else str(head), "layers": self.layers,
            "config": config.to_dict(),
        }  # fmt: skip
        self.writer = Writer(output, self.specs, self.header)

    def check_source(self) -> None:
        """A UserError unless the source holds what its config.json says."""
        model = ckpt.build_model(self.source.config, {}, self.source.dtype)
        ckpt.check_specs(self.source, model, ckpt.tensor_names(model))

    def run(self, progress: Callable[[str], None] = lambda text: None) -> list[dict]:
        """Write the file; returns [{name, format, error}] of the quantized layers."""
        count = self.source.config.n_layers
        with self.writer, torch.no_grad():
            for name in ("tok_embeddings.weight", "norm.weight", "output.weight"):
                if name in self.specs or (name == "output.weight" and "output" in self.layers):
                    progress(f"{name.split('.')[0]}")
                    self.write_rows(name)
            for i in range(count):
                progress(f"block {i + 1} of {count}")
                self.write_block(i)
        return self.report

    def write_rows(self, name: str) -> None:
        """Copy, or quantize, one big tensor of independent rows a chunk at a time."""
        module = name.rpartition(".")[0]
        stored = "tok_embeddings.weight" if self._tied(name) else name
        shape = self.source.spec(stored)[1]
        wrong, total, grid = 0.0, 0.0, None
        if module in self.layers:
            grid = make_grid(self.modes[module], shape[1], self.dtype)
            chunks = row_chunks(*shape)
            grid.learn(self.source.tensor(stored, [r]).to(self.device).float() for r in chunks)
        for rows in row_chunks(shape[0], shape[1] if len(shape) > 1 else 1):
            weight = self.source.tensor(stored, [rows]).to(self.device)
            if module not in self.layers:
                weight = weight.to(self.dtype)
                check_finite(weight, name)
                self.writer.write(name, weight, rows.start)
                continue
            check_finite(weight, name)
            linear = nn.Linear(shape[1], len(weight), bias=False, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            quantized = quantize_linear(linear, self.modes[module], dtype=self.dtype, grid=grid)
            size = weight.double().square().sum().item()
            wrong, total = wrong + relative_error(weight, quantized) ** 2 * size, total + size
            for key, tensor in quantized.state_dict().items():
                if rows.start and key in quantized.shared:
                    continue  # written with the first rows
                self.writer.write(f"{module}.{key}", tensor, rows.start)
        if module in self.layers:
            error = (wrong / total) ** 0.5 if total else 0.0
            format = self.modes[module].format
            self.report.append({"name": module, "format": format, "error": error})

    def _tied(self, name: str) -> bool:
        return name == "output.weight" and self.source.config.tied_head

    def load_block(self, index: int) -> TransformerBlock:
        """The source's block, in its own dtype (fp32 for calibration, which runs it)."""
        dtype = torch.float32 if self.stream else self.source.dtype
        with torch.device("meta"):
            block = TransformerBlock(self.source.config)
        for name in list(block.state_dict()):
            module, _, attribute = name.rpartition(".")
            tensor = self.source.tensor(f"layers.{index}.{name}").to(self.device, dtype)
            setattr(block.get_submodule(module), attribute, nn.Parameter(tensor, False))
        return block

    def write_block(self, index: int) -> None:
        """Quantize one block's linear layers in running order and write the block."""
        block = self.load_block(index)
        for name in LAYERS:
            full_name = f"layers.{index}.{name}"
            if full_name not in self.modes:
                continue
            mode, linear = self.modes[full_name], block.get_submodule(name)
            check_finite(linear.weight, full_name)
            stats = self.stream.statistics(block, name) if self.stream else None
            quantized = quantize_linear(linear, mode, stats, self.dtype, **self.options)
            error = relative_error(linear.weight, quantized)
            self.report.append({"name": full_name, "format": mode.format, "error": error})
            block.set_submodule(name, quantized)
        if self.stream:
            self.stream.advance(block)
        for name, tensor in block.state_dict().items():
            full_name = f"layers.{index}.{name}"
            tensor = tensor.to(self.specs[full_name][0])
            if tensor.dtype in FLOAT_MODES.values():
                check_finite(tensor, full_name)
            self.writer.write(full_name, tensor)


def linear_names(config: ModelConfig) -> list[str]:
    """Every linear layer of the model, the head last."""
    blocks = [f"layers.{i}.{name}" for i in range(config.n_layers) for name in LAYERS]
    return [*blocks, "output"]
