"""Which part of every module a rank holds under tensor parallelism, and how it is cut out.

Columns of a packed weight can be cut where no group of columns that share a scale, no packed byte
and no block of activations that a kernel rounds together is cut in two. A format that quantizes
the activations of a token together needs the whole token: its columns are never cut.
"""

from dataclasses import dataclass
from itertools import pairwise
from math import lcm
from typing import Protocol

import torch
from torch import Tensor, nn

from errors import UserError
from kernels.linear import Linear, QuantizedLinear
from kernels.packing import pack, unpack
from model import Transformer

ROUNDED = 64  # columns that the kernels of the CPU round together, where a group is longer


def cuts(total: int, count: int, unit: int = 1) -> list[slice]:
    """0 .. total in `count` ranges as equal as whole units allow; the last may end within one."""
    units = -(-total // unit)
    edges = [min(units * i // count * unit, total) for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]


def sizes(ranges: list[slice]) -> list[int]:
    return [r.stop - r.start for r in ranges]


def column_unit(layer: nn.Module) -> int | None:
    """The multiples at which a layer's columns can be cut; None: nowhere."""
    if not isinstance(layer, QuantizedLinear):
        return 1
    if layer.input_way != "none":
        return None
    if layer.groupsize >= layer.in_features:
        return ROUNDED
    return lcm(8, layer.groupsize)  # 8 codes of any width fill whole bytes


@dataclass
class Cut:
    """What a rank holds of a layer: rows (None: all) and columns (None: all)."""

    rows: list[slice] | None = None
    columns: slice | None = None


class Sharding:
    """How every module of a model is cut for one rank of n. `model` is a whole one, on meta."""

    def __init__(self, model: Transformer, rank: int, n: int):
        config = model.config
        if config.n_heads % n or config.n_kv_heads % n:
            fit = [d for d in range(1, config.n_kv_heads + 1)
                   if config.n_kv_heads % d == 0 and config.n_heads % d == 0]  # fmt: skip
            raise UserError(
                f"{n} processes cannot share {config.n_heads} heads, {config.n_kv_heads} of them "
                f"for keys and values: take --nproc_per_node {' or '.join(map(str, fit))}"
            )
        self.config, self.rank = config, rank
        self.vocab, self.width = cuts(config.vocab_size, n), cuts(config.dim, n)
        self.heads = cuts(config.n_heads * config.head_dim, n)
        self.kv = cuts(config.n_kv_heads * config.head_dim, n)
        units = [column_unit(layer.feed_forward.w2) or 1 for layer in model.layers]
        unit = lcm(*units)
        self.ffn = cuts(config.ffn_dim, n, unit if config.ffn_dim >= unit * n else 1)

    def inputs(self, name: str) -> list[slice]:
        """The columns of wo or w2 that each rank's own activations meet."""
        return self.heads if name.endswith("wo") else self.ffn

    def by_columns(self, name: str, layer: nn.Module) -> bool:
        """Whether wo or w2 is cut by columns; see the top of the file."""
        unit = column_unit(layer)
        return unit is not None and all(c.start % unit == 0 for c in self.inputs(name))

    def cut(self, name: str, layer: nn.Module) -> Cut:
        """What this rank holds of the module `name`."""
        r, config = self.rank, self.config
        if name in ("tok_embeddings", "output"):
            return Cut([self.vocab[r]])
        if name.endswith("wqkv"):
            q, kv = self.heads[r], self.kv[r]
            firsts = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
            k = slice(firsts[0] + kv.start, firsts[0] + kv.stop)
            return Cut([q, k, slice(k.start + firsts[1], k.stop + firsts[1])])
        if name.endswith("w13"):
            gate = self.ffn[r]
            return Cut([gate, slice(gate.start + config.ffn_dim, gate.stop + config.ffn_dim)])
        if name.endswith(("wo", "w2")):
            if self.by_columns(name, layer):
                return Cut(None, self.inputs(name)[r])
            return Cut([self.width[r]])
        return Cut()


class Source(Protocol):
    """Where tensors come from: an opened Checkpoint is one."""

    def tensor(
        self, name: str, rows: list[slice] | None = None, columns: slice | None = None
    ) -> Tensor: ...


def piece(tensor: Tensor, rows: list[slice] | None, columns: slice | None) -> Tensor:
    """Ranges of rows, one after the other, and a range of columns, of a tensor in memory."""
    if rows is not None:
        tensor = torch.cat([tensor[r] for r in rows])
    return tensor.clone() if columns is None else tensor[:, columns].clone()


def local_tensor(source: Source, name: str, layer: nn.Module, cut: Cut) -> Tensor:
    """This rank's share of the canonical buffer or parameter `name` of the whole layer `layer`."""
    attribute, columns = name.rpartition(".")[2], cut.columns
    if not isinstance(layer, QuantizedLinear):
        return source.tensor(name, cut.rows, columns if attribute == "weight" else None)
    if attribute in layer.shared or (attribute == "input_scale" and columns is None):
        return source.tensor(name)
    if attribute == "input_scale":
        return source.tensor(name, [columns])
    if columns is None:
        return source.tensor(name, cut.rows)
    if attribute == "bias":
        return source.tensor(name)
    if attribute in ("weight", "positions"):
        bits = layer.column_bits(attribute)
        return source.tensor(
            name, None, slice(columns.start * bits // 8, -(-columns.stop * bits // 8))
        )
    if layer.groupsize >= layer.in_features:
        return source.tensor(name)  # one group: every rank needs its scale
    groups = slice(columns.start // layer.groupsize, -(-columns.stop // layer.groupsize))
    if attribute == "zeros" and layer.zeros.dtype == torch.uint8:  # packed: cut after unpacking
        count = -(-layer.in_features // layer.groupsize)
        return pack(unpack(source.tensor(name), layer.bits, count)[:, groups], layer.bits)
    return source.tensor(name, None, groups)


def local_layer(layer: nn.Module, cut: Cut, dtype: torch.dtype) -> nn.Module:
    """A module of the local shape, on the meta device, to be filled."""
    rows = sum(sizes(cut.rows)) if cut.rows else None
    if isinstance(layer, nn.Embedding):
        return nn.Embedding(rows, layer.embedding_dim, dtype=dtype, device="meta")
    columns = sizes([cut.columns])[0] if cut.columns else layer.in_features
    shape, biased = (columns, rows or layer.out_features), layer.bias is not None
    if not isinstance(layer, QuantizedLinear):
        return Linear(*shape, bias=biased, dtype=dtype, device="meta")
    settings = {k: v for k, v in layer.settings().items() if k != "format"}
    return type(layer)(*shape, bias=biased, dtype=layer.dtype, device="meta", **settings)
