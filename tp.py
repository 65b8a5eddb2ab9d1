"""Tensor parallelism: torchrun --standalone --nproc_per_node=N generate.py ...

Each of N ranks holds its share of the heads, of the feed-forward columns and of the vocabulary, and
reads only that from disk (Shoeybi et al. 2019, Megatron-LM, arXiv 1909.08053):

    wqkv, w13    cut by rows (each of their parts): no communication
    wo, w2       cut by columns where the format allows it: the products are partial sums, one
                 all-reduce of [B, T, C]. Otherwise cut by rows: the input is gathered first, and
                 the output after: two all-gathers
    embedding    cut by rows of the vocabulary: one all-reduce of [B, T, C]
    output       cut by rows of the vocabulary: the logits are gathered

Packed codes are cut as they lie (sharding.py says where): nothing is dequantized, and what is
computed is what one process computes, but for the order in which the partial sums of an all-reduce
are added, in the model's dtype.

Collectives are torch's functional ones, which torch.compile traces: gloo on CPU, NCCL on CUDA. Only
rank 0 prints. When a rank ends, torchrun ends the others.
"""

import atexit
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import errors
from checkpoint import Checkpoint, build_model, check_specs, repack, tensor_names
from checkpoint_quantizer import linear_names
from config import ModelConfig
from graphs import release_graphs
from kernels.linear import Linear, QuantizedLinear
from model import Transformer
from modes import Mode, head_mode, quantize_linear
from sharding import Cut, Sharding, Source, local_layer, local_tensor, piece, sizes

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Who we are among how many, and the process group's name for functional collectives."""

    rank: int
    size: int
    group: str = ""

    def reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x."""
        ops = torch.ops._c10d_functional
        return ops.wait_tensor(ops.all_reduce(x.contiguous(), "sum", self.group))

    def gather(self, x: Tensor, sizes: list[int]) -> Tensor:
        """All ranks' x [..., sizes[rank]] side by side: [..., sum(sizes)]."""
        x, ops = F.pad(x, (0, max(sizes) - x.shape[-1])).contiguous(), torch.ops._c10d_functional
        y = ops.wait_tensor(ops.all_gather_into_tensor(x, self.size, self.group))
        parts = y.view(self.size, *x.shape)
        return torch.cat([parts[r][..., :n] for r, n in enumerate(sizes)], -1)


def start(device: str) -> Ranks | None:
    """Join the ranks that torchrun started; None in a process of its own."""
    if errors.processes() == 1:
        return None
    if not dist.is_initialized():
        if missing := [n for n in ("RANK", "LOCAL_RANK", "MASTER_ADDR") if n not in os.environ]:
            raise errors.UserError(f"no {missing[0]}: start several processes with torchrun")
        if device.startswith("cuda"):
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))  # of a chat, whose user thinks
        atexit.register(leave)
        if dist.get_rank():
            errors.mute(f"rank {dist.get_rank()}: ")
    return Ranks(dist.get_rank(), dist.get_world_size(), dist.group.WORLD.group_name)


def leave() -> None:
    """Leave the other ranks, at the process's end."""
    release_graphs()
    dist.destroy_process_group()


def from_rank_0(make: Callable[[], T]) -> T:
    """What rank 0 makes, on every rank: its user's input, or a decision that rests on the clock."""
    if not dist.is_initialized():
        return make()
    box = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, 0, device=torch.device("cpu"))
    return box[0]


class ReducedLinear(nn.Module):
    """A layer cut by columns: x [..., K / N] -> [..., C], the sum of all ranks' products."""

    def __init__(self, linear: nn.Module, ranks: Ranks):
        super().__init__()
        self.linear, self.ranks = linear, ranks
        self.bias, linear.bias = linear.bias, None  # to be added once

    def forward(self, x: Tensor) -> Tensor:
        y = self.ranks.reduce(self.linear(x))
        return y if self.bias is None else y + self.bias


class GatheredLinear(nn.Module):
    """A layer cut by rows. Its input is whole, or `inputs` columns a rank, gathered first.

    x [..., K] or [..., inputs[rank]] -> [..., N], from the ranks' `outputs` rows each.
    """

    def __init__(self, linear: nn.Module, ranks: Ranks, outputs: list[int], inputs=None):
        super().__init__()
        self.linear, self.ranks, self.outputs, self.inputs = linear, ranks, outputs, inputs

    def forward(self, x: Tensor) -> Tensor:
        if self.inputs is not None:
            x = self.ranks.gather(x, self.inputs)
        return self.ranks.gather(self.linear(x), self.outputs)


class ShardedEmbedding(nn.Module):
    """Rows `first` .. of the table: a rank looks up the tokens that it has, the others give 0."""

    def __init__(self, weight: Tensor, first: int, ranks: Ranks):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.first, self.ranks = first, ranks

    def forward(self, tokens: Tensor) -> Tensor:
        row = tokens - self.first
        inside = (row >= 0) & (row < self.weight.shape[0])
        x = F.embedding(row.clamp(0, self.weight.shape[0] - 1), self.weight)
        return self.ranks.reduce(torch.where(inside[..., None], x, torch.zeros_like(x)))


def wrap(
    name: str, layer: nn.Module, local: nn.Module, sharding: Sharding, ranks: Ranks
) -> nn.Module:
    """The local share of `layer` with its communication around it."""
    if name == "tok_embeddings":
        return ShardedEmbedding(local.weight, sharding.vocab[ranks.rank].start, ranks)
    if name == "output":
        return GatheredLinear(local, ranks, sizes(sharding.vocab))
    if name.endswith(("wo", "w2")):
        if sharding.by_columns(name, layer):
            return ReducedLinear(local, ranks)
        return GatheredLinear(local, ranks, sizes(sharding.width), sizes(sharding.inputs(name)))
    return local


class QuantizedSource:
    """Quantizes layers of a source as they are asked for, and hands out pieces of them."""

    def __init__(self, source: Source, modes: dict[str, Mode], tied: bool, dtype: torch.dtype):
        self.source, self.modes, self.tied, self.dtype = source, modes, tied, dtype
        self.name, self.state = "", {}

    def tensor(
        self, name: str, rows: list[slice] | None = None, columns: slice | None = None
    ) -> Tensor:
        """A part of a tensor; its layer is quantized when first asked for."""
        module, _, attribute = name.rpartition(".")
        if module not in self.modes:
            return self.source.tensor(name, rows, columns)
        if module != self.name:
            stored = "tok_embeddings" if module == "output" and self.tied else module
            weight = self.source.tensor(f"{stored}.weight").to(self.dtype)
            linear = Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            self.name = module
            self.state = quantize_linear(linear, self.modes[module]).state_dict()
        if attribute == "bias":
            return self.source.tensor(name, rows)
        return piece(self.state[attribute], rows, columns)


class RandomSource:
    """Random weights of true shape, drawn layer by layer in the order of `random_model`."""

    def __init__(self, config: ModelConfig, device: str, dtype: torch.dtype):
        torch.manual_seed(0)
        self.shapes = {n: t.shape for n, t in build_model(config, {}, dtype).state_dict().items()}
        self.options, self.tied = {"device": device, "dtype": dtype}, config.tied_head
        self.name, self.weight, self.table = "", None, None

    def tensor(
        self, name: str, rows: list[slice] | None = None, columns: slice | None = None
    ) -> Tensor:
        """A part of a random tensor; every process draws them all, in the same order."""
        if len(self.shapes[name]) == 1:
            fill = torch.zeros if name.endswith("bias") else torch.ones
            return piece(fill(self.shapes[name], **self.options), rows, columns)
        if name == "tok_embeddings.weight" and self.table is not None:
            return piece(self.table, rows, columns)
        if name != self.name:
            self.name = name
            self.weight = torch.randn(self.shapes[name], **self.options) * 0.02
            if name == "tok_embeddings.weight" and self.tied:
                self.table = self.weight
        return piece(self.weight, rows, columns)


def load_sharded(
    source: Source,
    config: ModelConfig,
    layers: dict[str, dict],
    stored_dtype: torch.dtype,
    ranks: Ranks,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
) -> Transformer:
    """This rank's share of a model, ready to run: as checkpoint.load_model, but cut.

    Args:
        layers: the settings of the quantized layers, as in a checkpoint's header.
        dtype: of what is not quantized; None: stored_dtype.
    """
    model, dtype = build_model(config, layers, stored_dtype), dtype or stored_dtype
    if hasattr(source, "spec"):
        check_specs(source, model, tensor_names(model))
    sharding, names = Sharding(model, ranks.rank, ranks.size), set(tensor_names(model))
    for name, layer in list(model.named_modules()):
        own = [n for n in layer.state_dict() if "." not in n and f"{name}.{n}" in names]
        if isinstance(layer, (nn.Embedding, nn.Linear, QuantizedLinear)):
            cut = sharding.cut(name, layer)
            local = local_layer(layer, cut, dtype)
        else:
            cut, local = Cut(), layer
        for attribute in own:
            tensor = local_tensor(source, f"{name}.{attribute}", layer, cut).to(device)
            if isinstance(local, QuantizedLinear):
                setattr(local, attribute, tensor.to(dtype) if attribute == "bias" else tensor)
            else:
                parameter = nn.Parameter(tensor.to(dtype), requires_grad=False)
                setattr(local, attribute, parameter)
        if name == "output" and not own:  # tied: the same rows of the vocabulary
            local.weight = model.tok_embeddings.weight
        if local is not layer:
            model.set_submodule(name, wrap(name, layer, local, sharding, ranks))
    heads, kv_heads = config.n_heads // ranks.size, config.n_kv_heads // ranks.size
    for layer in model.layers:
        layer.attention.heads, layer.attention.kv_heads = heads, kv_heads
    model.config = replace(config, n_heads=heads, n_kv_heads=kv_heads)  # caches are of these
    repack(model)
    return model.eval()


def load_ranked(
    ranks: Ranks, checkpoint: Checkpoint | None, config: ModelConfig, mode: Mode | None,
    device: str, dtype: torch.dtype | None,
) -> Transformer:  # fmt: skip
    """This rank's share of a checkpoint, or of random weights (None), `mode` applied on load."""
    if checkpoint is not None and mode is None:
        layers = checkpoint.header.get("layers", {})
        return load_sharded(checkpoint, config, layers, checkpoint.dtype, ranks, device, dtype)
    dtype = dtype or (checkpoint.dtype if checkpoint else torch.bfloat16)
    source = checkpoint or RandomSource(config, device, dtype)
    modes = {}
    if mode is not None:
        modes = dict.fromkeys(linear_names(config), mode)
        modes["output"] = head_mode(mode, None)
        source = QuantizedSource(source, modes, config.tied_head, dtype)
    layers = {name: m.settings for name, m in modes.items()}
    return load_sharded(source, config, layers, dtype, ranks, device, dtype)
