"""Logits of whole windows of tokens, a few rows at a time: what eval.py's figures are made of."""

from collections.abc import Iterator

import torch
from torch import Tensor

from errors import UserError
from graphs import one_graph
from kernels.linear import FEW_ROWS
from model import Transformer

ROWS = 256  # tokens of a forward pass: the logits are ROWS x V numbers, never a whole window's


class Scorer:
    """A model with a cache of its own, for the logits of whole windows, a few rows at a time.

    Every forward pass has the shape [batch, chunk], so nothing recompiles.

    Args:
        batch: windows that run together.
        length: of the longest window, in tokens.
        kv_cache: "bf16" (the model's dtype) or "int8"; attention reads keys and values from it.
        compiled: run the forward pass through torch.compile.
        rows: tokens of a forward pass, of all windows together; up to FEW_ROWS run as in decoding.
    """

    def __init__(
        self,
        model: Transformer,
        batch: int = 1,
        length: int = 2048,
        kv_cache: str = "bf16",
        compiled: bool = False,
        rows: int = ROWS,
    ):
        if length > model.config.max_positions:
            limit = model.config.max_positions
            raise UserError(f"windows of {length} tokens: the model's context is {limit}, give a "
                            "shorter --seq_length")  # fmt: skip
        self.batch, self.device = batch, model.tok_embeddings.weight.device
        least = min(rows, FEW_ROWS)
        self.chunk = min(max(rows // batch, least), -(-length // least) * least)
        self.slots = -(-length // self.chunk) * self.chunk
        self.model, self.own_cache = model, model.setup_cache(batch, self.slots, kv_cache)
        if batch * self.chunk <= FEW_ROWS:
            model.fuse()
        self.forward = one_graph(model, None) if compiled else model

    def logits(self, tokens: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Chunks of the logits after each of tokens [b, T] int64, b <= batch, T <= length.

        Yields (positions, logits [b, t, V] fp32). The chunks must be taken in order.
        """
        self.model.check_cache(self.own_cache)
        rows, length = tokens.shape
        padded = torch.zeros(self.batch, -(-length // self.chunk) * self.chunk, dtype=torch.int64)
        padded[:rows, :length] = tokens
        for begin in range(0, length, self.chunk):
            part = slice(begin, min(begin + self.chunk, length))
            with torch.inference_mode():
                start = torch.full((self.batch,), begin, dtype=torch.int64, device=self.device)
                chunk = padded[:, begin : begin + self.chunk].to(self.device)
                logits = self.forward(chunk, start)[:rows, : part.stop - begin]
                yield part, logits.float()
