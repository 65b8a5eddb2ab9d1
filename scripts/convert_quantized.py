"""Convert a checkpoint that GPTQ, AWQ or llm-compressor has quantized to 4 bits: it becomes int4.

    python scripts/convert_quantized.py DIRECTORY

writes DIRECTORY/model_int4-gptq.g128.safetensors, for example. Its method is what config.json's
quantization_config says. Of a linear layer [N, K] in groups of g columns, G = K / g, it holds

    gptq                qweight int32 [K / 8, N], qzeros int32 [G, N / 8], scales [G, N], perhaps
                        g_idx [K]; each word of zeros less 0x11111111, but for checkpoint_format
                        "gptq_v2"
    awq                 qweight int32 [K, N / 8], qzeros int32 [G, N / 8], scales [G, N]; the eight
                        rows of a word come in the order 0, 2, 4, 6, 1, 3, 5, 7
    compressed-tensors  weight_packed int32 [N, K / 8], weight_scale [N, G], weight_zero_point int32
                        [N / 8, G] or int8 [N, G] less 8, of symmetric weights none: 8 (format
                        "pack-quantized")

eight codes a word, the first in the lowest bits; w = (code - zero) scale. int4 keeps the codes, and
s = scale and z = (8 - zero) scale of its w = (code - 8) s + z are bf16: rounding them moves no
weight by more than 1 / 16 of a step. What is not quantized stays as it is, the LM head with
`--lm_head keep`.
Sources: the packing code of AutoGPTQ 0.7.1, GPTQModel 7.7.0, AutoAWQ 0.2.9 and compressed-tensors
0.20.0.
"""

import sys
import time
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from calibration import LAYERS
from checkpoint import (
    FLOATS,
    Checkpoint,
    build_model,
    check_specs,
    open_checkpoint,
    read_json,
    tensor_names,
)
from checkpoint_quantizer import CheckpointQuantizer, linear_names
from errors import Parser, UserError, check_outputs, cli, progress
from huggingface import hf_names, part_rows
from kernels.formats import FORMATS
from kernels.int4 import Int4Linear
from model import TransformerBlock
from modes import check_finite, head_mode, parse_mode
from quantize import default_output

MODES = {"gptq": "int4-gptq", "awq": "int4-awq", "compressed-tensors": "int4"}  # by quant_method
TENSORS = ("qweight", "qzeros", "scales", "g_idx", "bias", "weight_packed", "weight_scale",
           "weight_zero_point", "weight_shape", "weight_g_idx")  # fmt: skip
LESS = 0x11111111  # 1 in each of a word's eight places, with borrows: a zero of 0 is 15 in it
IN_ORDER, AWQ_ORDER = tuple(range(8)), (0, 2, 4, 6, 1, 3, 5, 7)


def unpacked(words: Tensor, dim: int, order: tuple[int, ...] = IN_ORDER) -> Tensor:
    """int32 words -> their 4-bit codes, uint8, `dim` eight times as long.

    order[i]: which of a word's eight codes is in its bits 4 i to 4 i + 3.
    """
    codes = [((words >> 4 * order.index(i)) & 15).to(torch.uint8) for i in range(8)]
    return torch.stack(codes, dim + 1).flatten(dim, dim + 1)


def weight_settings(settings: dict) -> dict:
    """What compressed-tensors says of the weights; a UserError if of several kinds, or of more."""
    if settings["format"] != "pack-quantized":
        raise UserError(f"format {settings['format']!r} in config.json: only pack-quantized")
    if len(settings["config_groups"]) != 1:
        raise UserError("config_groups in config.json has several kinds of layers: only 1 is taken")
    (group,) = settings["config_groups"].values()
    if group.get("input_activations") or group.get("output_activations"):
        raise UserError("config.json quantizes activations: int4 leaves them as they are")
    if (settings.get("transform_config") or {}).get("config_groups"):
        raise UserError("config.json has a transform_config: rotations are not supported")
    if (kind := group["weights"].get("type", "int")) != "int":
        raise UserError(f"weights of type {kind!r} in config.json: only int is taken")
    return {**group["weights"], "bits": group["weights"]["num_bits"]}


class Packed:
    """The quantized layers of a directory.

    Raises UserError for what int4 cannot hold: other bits, other groups, columns out of order.
    """

    def __init__(self, source: Checkpoint):
        self.source = source
        try:
            self.take(read_json(source.path / "config.json")["quantization_config"])
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            what = f"config.json has no quantization_config, or a malformed one ({error!r})"
            raise UserError(f"{source.path}: {what}") from None

    def take(self, settings: dict) -> None:
        """Note what matters of a quantization_config."""
        self.method = settings["quant_method"]
        if self.method not in MODES:
            raise UserError(f"quant_method {self.method!r} in config.json: only {', '.join(MODES)}")
        self.packer = settings.get("checkpoint_format", "gptq")
        if self.method == "gptq" and self.packer not in ("gptq", "gptq_v2"):
            raise UserError(f"checkpoint_format {self.packer!r} in config.json: only gptq, gptq_v2")
        if self.method == "awq" and settings.get("version", "gemm").lower() != "gemm":
            raise UserError(f"AWQ's version {settings['version']!r} in config.json: only gemm")
        for name in ("rotation", "activation"):  # GPTQModel's: done again at each product
            if settings.get(name):
                raise UserError(f"{name} {settings[name]!r} in config.json is not supported")
        if self.method == "compressed-tensors":
            settings = weight_settings(settings)
        self.symmetric = settings.get("symmetric", True)  # compressed-tensors
        # g_idx then says which group each column is of
        self.ordered = settings.get("desc_act") or settings.get("actorder") in ("group", "dynamic")
        if settings["bits"] != 4:
            raise UserError(f"{settings['bits']!r} bits in config.json: only 4 are taken")
        self.groupsize = settings["group_size"]
        if type(self.groupsize) is not int or self.groupsize not in Int4Linear.groupsizes:
            sizes = ", ".join(map(str, Int4Linear.groupsizes))
            raise UserError(f"group_size {self.groupsize!r} in config.json: int4 has {sizes}")
        self.mode = parse_mode(MODES[self.method], self.groupsize)

    def parts(self, name: str) -> list[str]:
        """The Hugging Face modules that our layer `name` stacks."""
        return [part.removesuffix(".weight") for part in hf_names(f"{name}.weight")]

    def holds(self, name: str) -> bool:
        """Whether our layer `name` is quantized; a UserError where only some of its parts are."""
        codes = "weight_packed" if self.method == "compressed-tensors" else "qweight"
        found = {f"{part}.{codes}" in self.source.files for part in self.parts(name)}
        if len(found) > 1:
            raise UserError(f"{self.source.path}: only some of {', '.join(self.parts(name))} are "
                            "quantized")  # fmt: skip
        return found.pop()

    def read(self, name: str, dtypes: tuple[torch.dtype, ...], shape: list[int]) -> Tensor:
        """A stored tensor, if it is what it has to be."""
        if name not in self.source.files:
            raise UserError(f"{self.source.path} has no tensor {name!r}: it is incomplete")
        with safe_open(self.source.files[name], "pt") as f:
            stored = f.get_slice(name).get_shape()
            if stored != shape:
                raise UserError(f"{self.source.path}: {name} is {stored}, not {shape}")
            tensor = f.get_tensor(name)
        if tensor.dtype not in dtypes:
            raise UserError(f"{self.source.path}: {name} is {tensor.dtype}")
        return tensor

    def codes(self, part: str, n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Codes uint8 [N, K], scales fp32 [N, G] and zeros uint8 [N, G] of one module."""
        if n % 8 or k % 8:
            raise UserError(f"{part} is {n} x {k}: no whole words")
        groups, int32 = -(-k // self.groupsize), (torch.int32,)
        if self.method == "compressed-tensors":
            self.check_order(f"{part}.weight_g_idx", k)
            self.check_shape(f"{part}.weight_shape", n, k)
            codes = unpacked(self.read(f"{part}.weight_packed", int32, [n, k // 8]), 1)
            scales = self.read(f"{part}.weight_scale", FLOATS, [n, groups])
            return codes, scales.float(), self.zero_points(f"{part}.weight_zero_point", n, groups)
        self.check_order(f"{part}.g_idx", k)
        awq = self.method == "awq"
        order, shape = (AWQ_ORDER, [k, n // 8]) if awq else (IN_ORDER, [k // 8, n])
        codes = unpacked(self.read(f"{part}.qweight", int32, shape), int(awq), order)
        scales = self.read(f"{part}.scales", FLOATS, [groups, n])
        zeros = self.read(f"{part}.qzeros", int32, [groups, n // 8])
        if self.method == "gptq" and self.packer == "gptq":
            zeros = zeros + LESS
        return codes.t(), scales.t().float(), unpacked(zeros, 1, order).t()

    def zero_points(self, name: str, n: int, groups: int) -> Tensor:
        """Those of compressed-tensors, uint8 [N, G]."""
        if self.symmetric and name not in self.source.files:
            return torch.full((n, groups), 8, dtype=torch.uint8)
        try:
            zeros = self.read(name, (torch.int8,), [n, groups]).int() + 8  # earlier versions
        except UserError:
            return unpacked(self.read(name, (torch.int32,), [n // 8, groups]), 0)
        if zeros.min() < 0 or zeros.max() > 15:
            raise UserError(f"{self.source.path}: {name} holds more than 4 bits")
        return zeros.to(torch.uint8)

    def check_order(self, name: str, k: int) -> None:
        """A UserError unless the groups are of neighbouring columns."""
        if self.ordered or name in self.source.files:
            groups = self.read(name, (torch.int32,), [k])
            if not torch.equal(groups, torch.arange(k, dtype=torch.int32) // self.groupsize):
                raise UserError(f"{name}: groups of columns that are no neighbours (desc_act)")

    def check_shape(self, name: str, n: int, k: int) -> None:
        """A UserError if the checkpoint says that the layer has another shape."""
        if name in self.source.files:
            stored = self.read(name, (torch.int64, torch.int32), [2]).tolist()
            if stored != [n, k]:
                raise UserError(f"{self.source.path}: {name} says {stored}, not {[n, k]}")

    def layer(self, name: str, linear: nn.Linear, dtype: torch.dtype) -> Int4Linear:
        """Our layer `name`, of the shape of `linear`."""
        parts, n, k = self.parts(name), linear.out_features, linear.in_features
        rows = [n] if len(parts) == 1 else part_rows(self.source.config, name)
        pieces = [self.codes(part, m, k) for part, m in zip(parts, rows, strict=True)]
        codes, scales, zeros = (torch.cat(piece) for piece in zip(*pieces, strict=True))
        bias = None if linear.bias is None else self.source.tensor(f"{name}.bias")
        for part, m in zip(parts, rows, strict=True):  # AutoGPTQ stores a bias of zeros
            extra = f"{part}.bias"
            if bias is None and extra in self.source.files and self.read(extra, FLOATS, [m]).any():
                raise UserError(f"{self.source.path}: {extra} is there, but config.json says not")
        params = {"scales": scales, "zeros": (8 - zeros.float()) * scales}
        return Int4Linear.from_codes(codes, params, bias, dtype, groupsize=self.groupsize)


class Converter(CheckpointQuantizer):
    """Writes the layers of a `Packed` as int4, and the rest as a CheckpointQuantizer does."""

    def __init__(self, packed: Packed, output: Path, lm_head: str):
        self.packed, source, mode = packed, packed.source, packed.mode
        *names, output_name = linear_names(source.config)
        layer = parse_mode("int4", packed.groupsize)  # AWQ's input scales are in other weights
        modes = {name: layer for name in names if packed.holds(name)}
        if not modes:
            raise UserError(f"{source.path}: no layer of it is quantized")
        if packed.holds(output_name):
            raise UserError(f"{source.path}: its LM head is quantized, which is not supported")
        head = head_mode(mode, lm_head)
        if head.format in FORMATS:
            modes[output_name] = head
        how = {"converted_from": packed.method}
        super().__init__(source, mode, head, output, calibration=how, modes=modes)

    def check_source(self) -> None:
        """Only what is not quantized; the rest when it is read."""
        model = build_model(self.source.config, {}, self.source.dtype)
        held = {name for name in self.modes if name != "output"}
        names = [n for n in tensor_names(model) if n.removesuffix(".weight") not in held]
        parts = [part for name in held for part in self.packed.parts(name)]
        check_specs(
            self.source, model, names, {f"{part}.{kind}" for part in parts for kind in TENSORS}
        )

    def write_block(self, index: int) -> None:
        """Convert what is packed of a block, copy the rest."""
        with torch.device("meta"):
            block = TransformerBlock(self.source.config).to(self.dtype)
        for name in LAYERS:
            full_name = f"layers.{index}.{name}"
            if full_name in self.modes:
                layer = self.packed.layer(full_name, block.get_submodule(name), self.dtype)
                block.set_submodule(name, layer)
        for name, tensor in block.state_dict().items():
            full_name = f"layers.{index}.{name}"
            if tensor.is_meta:  # it was not quantized
                tensor = self.source.tensor(full_name).to(self.dtype)
            if tensor.dtype in FLOATS:
                check_finite(tensor, full_name)
            self.writer.write(full_name, tensor)


def main() -> None:
    """Convert the directory."""
    parser = Parser(description="A checkpoint of GPTQ, AWQ or llm-compressor, 4 bits -> int4.")
    parser.add_argument("source", type=Path, help="a Hugging Face directory")
    parser.add_argument("--output", type=Path, help="file to write; default: model_<mode>... there")
    parser.add_argument("--lm_head", choices=["int8", "keep"], default="int8", help="its format")
    args = parser.parse_args()
    begin = time.perf_counter()
    source = open_checkpoint(args.source)
    if source.header:
        raise UserError(f"{source.path} is a file of quantize.py already")
    packed = Packed(source)
    output = args.output or default_output(source, packed.mode)
    check_outputs(None, replaced=output, inputs=source.own_files())
    job = Converter(packed, output, args.lm_head)
    job.run(lambda text: progress(f"{text}, {time.perf_counter() - begin:.0f} s"))
    progress("")
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    cli(main)
