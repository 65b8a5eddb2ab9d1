"""What every weight format shares: the grid that algorithms choose codes on, and the module.

A `Grid` says which values a weight can take. An algorithm (round-to-nearest, GPTQ, HQQ, ...) is
written against it and names no format; a format names no algorithm.

A `QuantizedLinear` stands where an nn.Linear stood. Its buffers hold the canonical packed form,
the same on every device; `repack()` turns them, once, into the layout that this device's kernel
reads. The plain `Linear` of bf16, fp16 and fp32 weights is here too: the base line.
"""

from collections.abc import Iterable
from enum import IntEnum

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import native
from kernels.activations import TRITON_WAYS, WAYS
from kernels.choice import eager_triton, load_triton, triton_on
from kernels.cuda.weight import TritonWeight, float_product

Params = dict[str, Tensor]
# A layer as the C++ operators that contain several take it: [weight, bias, input scale, the
# format's own tensors], [kind, N, K, the format's own numbers]; see cpu/product.h.
NativeForm = tuple[list[Tensor | None], list[int]]
# Of x. On a GPU, up to so many, float weights go through our product, formats leave inputs as they
# are (`rounds_few_rows`), and the model is one operator.
FEW_ROWS = 16


class Grid:
    """The values that a weight [N, K] can take, in groups of `groupsize` columns.

    Params are per-group tensors [N, G], G = ceil(K / groupsize); the last group may be shorter.
    What the whole tensor shares (a codebook) is not among them: the grid itself holds it.
    """

    prune_block = 1  # columns of which only some may be nonzero; 1: no sparsity pattern
    free_zero = False  # whether `shift` works: each group has a zero point of its own
    input_way = "none"  # the format's, see QuantizedLinear

    def __init__(self, groupsize: int):
        if groupsize < 1:
            raise ValueError(f"group size {groupsize}: must be at least 1")
        self.groupsize = groupsize

    def fit(self, w: Tensor, shrink: float = 1.0) -> Params:
        """Parameters for every group of w [N, K] fp32, its range scaled by `shrink`."""
        raise NotImplementedError

    def round(self, w: Tensor, params: Params) -> Tensor:
        """Codes [N, C] of the grid points nearest to w [N, C]; params [N, C] or [N, 1]."""
        raise NotImplementedError

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Values [N, C] fp32 that the codes stand for."""
        raise NotImplementedError

    def refit(self, codes: Tensor, target: Tensor, h: Tensor) -> Params | None:
        """One group's params that minimize tr((W_hat - T) H (W_hat - T)^T) for given codes.

        codes [N, g]; target = T H [N, g]; h = H [g, g]. Entries [N, 1], NaN where there is no
        solution; None if the grid has nothing to fit.
        """
        return None

    def learn(self, pieces: Iterable[Tensor]) -> None:
        """Learn what the whole tensor shares from all its rows, given in pieces [n, K] fp32.

        To be called once before `fit` where `fit` sees a part of the rows only.
        """

    def shared(self) -> Params:
        """What `learn` found, for the module's `pack`."""
        return {}

    def keep(self, importance: Tensor) -> Tensor:
        """Which weights may be nonzero, bool [N, C], by importance [N, C] of whole prune blocks.

        A weight that is not kept must be rounded as 0.
        """
        return torch.ones_like(importance, dtype=torch.bool)

    def shift(self, params: Params, offset: Tensor) -> Params:
        """The params of the grid moved by `offset` (per group, in units of the weight), or as near
        to that as the format can store."""
        raise NotImplementedError

    def step(self, params: Params) -> Tensor:
        """Distance of neighbouring values of an evenly spaced grid, per group."""
        code = torch.zeros_like(next(iter(params.values())), dtype=torch.uint8)
        return self.decode(code + 1, params) - self.decode(code, params)

    def columns(self, params: Params, columns: Tensor) -> Params:
        """The parameters of given columns: int64 [C] -> entries [N, C]."""
        groups = columns // self.groupsize
        return {name: p[:, groups] for name, p in params.items()}

    def round_to_nearest(self, w: Tensor, params: Params) -> Tensor:
        """Codes [N, K] of the whole matrix w [N, K]: the plainest algorithm."""
        if self.prune_block > 1:
            w = w * self.keep(w.abs())
        columns = torch.arange(w.shape[1], device=w.device)
        return self.round(w, self.columns(params, columns))

    def decode_all(self, codes: Tensor, params: Params) -> Tensor:
        """What the codes [N, K] of the whole matrix stand for, fp32."""
        columns = torch.arange(codes.shape[1], device=codes.device)
        return self.decode(codes, self.columns(params, columns))


class Kind(IntEnum):
    """What a layer is for the C++ operators that contain it, as in cpu/product.h."""

    ROWS, INT8, INT8DQ, INT4, CODED, INT4DQ = range(6)


class Linear(nn.Linear):
    """y = x W^T + b in the dtype of the weight. [..., K] -> [..., N].

    On the CPU our own operator runs, because the ATen product of one to sixteen rows leaves half of
    the memory bandwidth unused; it hands many rows to ATen where that is faster.
    """

    def forward(self, x: Tensor) -> Tensor:
        if native.serves(x):
            return torch.ops.flatllama.float_linear(x, self.weight, self.bias)
        if triton_on(x.device) and x.numel() <= FEW_ROWS * self.in_features:
            load_triton()
            return float_product(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)

    def native_form(self) -> NativeForm | None:
        """See `QuantizedLinear.native_form`."""
        return [self.weight, self.bias, None], [Kind.ROWS, self.out_features, self.in_features]


class QuantizedLinear(nn.Module):
    """Base of the weight formats: y = x dequantize(W)^T + b. [..., K] -> [..., N].

    A format sets `name` and `bits`, registers its canonical buffers in `__init__`, and defines
    `grid`, `pack`, `stored_weight`, and `repack` / `multiply` where it has a kernel; without one it
    runs in plain PyTorch, far slower. After `repack` the canonical buffers are gone:
    the module runs, but no longer saves or dequantizes. Layers are made on the meta device and
    filled by name from a checkpoint, so a constant tensor is a global or a persistent buffer: a
    plain attribute would stay on meta.

    Any format may have an `input_scale` [K], bf16: x is multiplied by it first, so that the weight
    is the stored one times input_scale, column by column (AWQ, SmoothQuant).
    """

    name: str
    bits: int  # of a code
    default_groupsize: int | None = None  # None: the format has no group size
    groupsizes: tuple[int, ...] = (32, 64, 128, 256)  # that may be asked for; 0: one per row
    shared: tuple[str, ...] = ()  # buffers that are not one entry per output row
    input_way = "none"  # how the product quantizes its inputs: one of activations.WAYS, or not
    rounds_few_rows = True  # whether the Triton kernels do so too, see activations.py

    def __init__(
        self, in_features: int, out_features: int, bias: bool, dtype, device,
        groupsize: int | None = None,
    ):  # fmt: skip
        super().__init__()
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        # As asked for; and columns that share a scale.
        self.groupsize_setting = self.default_groupsize if groupsize is None else groupsize
        self.groupsize = self.groupsize_setting or in_features
        if self.groupsize < 1:
            raise ValueError(f"group size {groupsize}: must be positive, or 0 for one per row")
        self.register_buffer(
            "bias", torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        )
        self.register_buffer("input_scale", None)
        self.packed: TritonWeight | None = None

    def _apply(self, fn, recurse=True):
        """`.to(dtype)` converts the bias only: codes and scales keep what the kernels read."""
        bias = self.bias

        def keep(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return new if new.dtype == tensor.dtype else tensor.to(new.device)

        super()._apply(keep, recurse)
        if bias is not None:
            self.bias = fn(bias)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if self.repacked and not keep_vars:  # torch.export keeps them, and does not save
            raise RuntimeError("a repacked layer no longer saves: quantize_ with repack=False")
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if (metadata := getattr(destination, "_metadata", None)) is not None:
            metadata.setdefault(prefix[:-1], {}).update(self.settings())

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        if self.repacked:
            raise RuntimeError("a repacked layer takes no weights: quantize_ with repack=False")
        own = self.settings()
        if (stored := {k: local_metadata.get(k, v) for k, v in own.items()}) != own:
            raise RuntimeError(f"{prefix[:-1]} is {own}, its weights are {stored}")
        scale = state_dict.get(f"{prefix}input_scale")
        if scale is not None and self.input_scale is None:  # AWQ and SmoothQuant make one
            self.input_scale = torch.empty_like(scale, device=self.weight.device)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    @property
    def repacked(self) -> bool:
        """Whether the canonical buffers have become a kernel's layout."""
        return self.weight is None

    @classmethod
    def from_codes(
        cls, codes: Tensor, params: Params, bias: Tensor | None, dtype: torch.dtype,
        input_scale: Tensor | None = None, **settings,
    ) -> "QuantizedLinear":  # fmt: skip
        """A module that holds codes [N, K] with the params of this format's grid."""
        n, k = codes.shape
        module = cls(k, n, bias is not None, dtype, codes.device, **settings)
        module.pack(codes, params)
        if bias is not None:
            module.bias = bias.to(dtype)
        if input_scale is not None:
            module.input_scale = input_scale.to(torch.bfloat16)
        return module

    def settings(self) -> dict:
        """What the checkpoint's header records so that the loader can rebuild this module.

        The format and, where there is one, the group size: readers of headers know no other.
        """
        rest = {} if self.default_groupsize is None else {"groupsize": self.groupsize_setting}
        return {"format": self.name, **rest}

    def column_bits(self, buffer: str) -> int:
        """Bits that a column takes in a row of `weight`, or of another buffer of codes."""
        return self.bits

    def weight_bytes(self) -> int:
        """Bytes of all buffers: what one decode step reads of this layer."""
        return sum(b.numel() * b.element_size() for b in self.buffers())

    def extra_repr(self) -> str:
        scaled = {} if self.input_scale is None else {"input_scale": True}
        rest = ", ".join(f"{k}={v}" for k, v in {**self.settings(), **scaled}.items())
        return f"in_features={self.in_features}, out_features={self.out_features}, {rest}"

    def grid(self) -> Grid:
        """The values that this module's weight can take."""
        raise NotImplementedError

    def pack(self, codes: Tensor, params: Params) -> None:
        """Fill the canonical buffers from codes [N, K] and the grid's params."""
        raise NotImplementedError

    def stored_weight(self) -> Tensor:
        """What the canonical buffers stand for, [N, K] fp32, without the input scale."""
        raise NotImplementedError

    def dequantize(self) -> Tensor:
        """The weight [N, K] in fp32: the truth that every kernel is tested against."""
        if self.repacked:
            raise RuntimeError("a repacked layer has no such weight: quantize_ with repack=False")
        weight = self.stored_weight()
        return weight if self.input_scale is None else weight * self.input_scale.float()

    def repack(self) -> None:
        """Turn the canonical buffers into the layout of this device's kernel. Idempotent."""

    def native_form(self) -> NativeForm | None:
        """The layer for C++ operators that contain it; None where there are no tiles for them."""
        return None

    def triton_weight(self) -> TritonWeight:
        """The canonical buffers in the layout of the Triton kernels."""
        raise NotImplementedError

    def repack_for_triton(self) -> bool:
        """Move the weight into `packed`, if the Triton kernels serve its device."""
        if self.packed is None and self.weight is not None and triton_on(self.weight.device):
            load_triton()
            self.packed = self.triton_weight()
            for name in self._buffers.keys() - {"bias", "input_scale"}:
                self._buffers[name] = None
        return self.packed is not None

    def quantizes(self, x: Tensor) -> bool:
        """Whether the product that serves the device quantizes its inputs x [..., K]."""
        few = triton_on(x.device) and x.numel() <= FEW_ROWS * self.in_features
        return self.input_way != "none" and (self.rounds_few_rows or not few)

    def quantize_input(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., K] -> codes [..., K] and scales [..., 1], where `input_way` is one."""
        return WAYS[self.input_way](x)

    def rounded_input(self, x: Tensor) -> Tensor:
        """x [..., K] as the product sees it, fp64: what kernels are checked against."""
        if not self.quantizes(x):
            return x.double()
        q, scale = self.quantize_input(x)
        return q.double() * scale.double()

    def triton_input(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [..., K] as the Triton kernels take it, and the scales [..., 1] of its rows, if any."""
        if not self.quantizes(x):
            return x, None
        if self.input_way in TRITON_WAYS and eager_triton(x.device):
            return torch.ops.flatllama.triton_quantize(x, self.input_way)
        q, scale = self.quantize_input(x)
        return q if q.dtype == torch.int8 else q.to(torch.bfloat16), scale

    def forward(self, input: Tensor) -> Tensor:  # named as nn.Linear names it
        x = input if self.input_scale is None else (input * self.input_scale).to(input.dtype)
        return self.multiply(x) if self.packed is None else self.triton_multiply(x)

    def triton_multiply(self, x: Tensor) -> Tensor:
        """`multiply` by the Triton kernels."""
        q, scale = self.triton_input(x)
        return self.packed(q, self.bias, scale, x.dtype)

    def multiply(self, x: Tensor) -> Tensor:
        """x [..., K], scaled already, times the stored weight, plus the bias: [..., N]."""
        weight = self.stored_weight().to(x.dtype)
        return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))
