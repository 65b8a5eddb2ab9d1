"""Write self-describing safetensors: one file, whose header says everything needed to run it.

The header, JSON in the safetensors metadata, holds the model's shape, the mode with its settings,
the format of each layer, and the writer's version.
"""

import contextlib
import json
import os
from pathlib import Path

import torch
from torch import Tensor

from errors import UserError

VERSION = 1
METADATA_KEY = "flatllama"  # our header, JSON, in the safetensors metadata
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16,
    "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Writer:
    """Writes one safetensors file tensor by tensor, in any order, never holding the file.

    The bytes go to a temporary name beside the target, are fsynced, and get the final name at the
    very end: a killed run leaves no half file under it, and what it leaves cannot be loaded. Use as
    a context manager.
    """

    def __init__(self, path: Path, specs: dict[str, tuple[torch.dtype, list[int]]], header: dict):
        self.path = Path(path).resolve()  # of a link the file, not the link, is replaced
        entries, offset = {"__metadata__": {METADATA_KEY: json.dumps(header), "format": "pt"}}, 0
        for name, (dtype, shape) in specs.items():
            size = torch.Size(shape).numel() * dtype.itemsize
            entries[name] = {
                "dtype": DTYPE_NAMES[dtype], "shape": list(shape),
                "data_offsets": [offset, offset + size],
            }  # fmt: skip
            offset += size
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % 8)
        self.entries, self.start, self.end = entries, 8 + len(text), 8 + len(text) + offset
        self.length = len(text).to_bytes(8, "little")
        self.unwritten = {name: (shape or [1])[0] for name, (_, shape) in specs.items()}
        self.temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
        try:
            self.file = open(self.temporary, "wb")  # noqa: SIM115 (closed in __exit__)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from None
        self.file.write(bytes(8) + text)  # without its length until the end: not to be loaded

    def write(self, name: str, tensor: Tensor, row: int = 0) -> None:
        """Write one tensor, or the rows of it that begin at `row`, as announced."""
        entry, shape = self.entries[name], list(tensor.shape)
        rows, total = (shape[0], entry["shape"][0]) if shape else (1, 1)
        if DTYPE_NAMES[tensor.dtype] != entry["dtype"] or shape[1:] != entry["shape"][1:]:
            raise ValueError(f"{name} is {tensor.dtype} {shape}, announced {entry}")
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        place = self.start + entry["data_offsets"][0] + row * (flat.numel() // max(rows, 1))
        try:
            self.file.seek(place)
            self.file.write(memoryview(flat.numpy()))
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from None
        self.unwritten[name] -= rows
        if not 0 <= self.unwritten[name] <= total:
            raise ValueError(f"{name}: more rows written than announced")

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                if missing := [name for name, rows in self.unwritten.items() if rows]:
                    raise ValueError(f"tensors never written: {missing[:3]}")
                self.file.seek(0)
                self.file.write(self.length)
                self.file.flush()
                os.fsync(self.file.fileno())
                os.replace(self.temporary, self.path)
        except OSError as problem:
            raise UserError(f"cannot write {self.path}: {problem.strerror}") from None
        finally:
            self.temporary.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # a full disk: what is buffered is lost anyway
                self.file.close()
