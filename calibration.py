"""What the calibrated algorithms know of a layer: statistics of its inputs on sample text.

`calibration_tokens` picks the text, `CalibrationStream` carries it through the model one block at
a time, and `InputStatistics` sums up the inputs of one linear layer. The blocks before, and the
layers already done within a block, are the quantized ones: each layer sees, and may correct, the
error that really reaches it ("true sequential").
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ModelConfig
from model import KVCache, TransformerBlock, rope_frequencies
from tokenizer import Tokenizer

BUNDLED = Path(__file__).parent / "data" / "calibration.txt"
SAMPLE = 512  # inputs of a layer that its statistics keep as they are
# The linear layers of a block in the order in which they run: each is quantized on the inputs
# that it gets when those before it are quantized already.
LAYERS = ("attention.wqkv", "attention.wo", "feed_forward.w13", "feed_forward.w2")


@dataclass
class InputStatistics:
    """Statistics of one linear layer's inputs x [K], over all calibration tokens; fp32.

    Attributes:
        hessian: [K, K], the mean of x x^T. The squared output error of a weight error D [N, K],
            summed over the rows, is tr(D hessian D^T) per token.
        mean_abs, max_abs: [K], of |x|.
        sample: [S, K], at most SAMPLE of the inputs: some of each batch, most of the latest.
        tokens: how many were seen.
    """

    hessian: Tensor
    mean_abs: Tensor
    max_abs: Tensor
    sample: Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, features: int, device: torch.device | str | None = None) -> "InputStatistics":
        """Statistics of nothing yet."""
        mean_abs, max_abs = torch.zeros(2, features, device=device)
        hessian = torch.zeros(features, features, device=device)
        return cls(hessian, mean_abs, max_abs, torch.zeros(0, features, device=device))

    def add(self, x: Tensor) -> None:
        """Take in the inputs x [..., K]."""
        x = x.detach().reshape(-1, x.shape[-1]).float()  # [T, K]
        if not len(x):  # an expert that no token goes to
            return
        old, self.tokens = self.tokens, self.tokens + len(x)
        keep, share = old / self.tokens, 1 / self.tokens
        self.hessian.addmm_(x.t(), x, beta=keep, alpha=share)
        self.mean_abs.mul_(keep).add_(x.abs().sum(0), alpha=share)
        self.max_abs = torch.maximum(self.max_abs, x.abs().amax(0))
        generator = torch.Generator().manual_seed(self.tokens)
        chosen = torch.randperm(len(x), generator=generator)[: SAMPLE // 8].to(x.device)
        self.sample = torch.cat([self.sample, x[chosen]])
        if len(self.sample) > SAMPLE:
            self.sample = self.sample[::2]


def calibration_tokens(
    tokenizer: Tokenizer, source: str, samples: int, seq_length: int, seed: int = 0
) -> Tensor:
    """Token ids [samples, seq_length] int64 of disjoint windows of a text, chosen by `seed`.

    `source` is "bundled" for the text that ships with the project, or the path of a text file.
    Raises ValueError when the text is too short, OSError when it cannot be read.
    """
    path = BUNDLED if source == "bundled" else Path(source)
    ids = torch.tensor(tokenizer.encode(path.read_text(encoding="utf-8"), allow_special=False))
    windows = len(ids) // seq_length
    if windows < samples:
        raise ValueError(
            f"{path.name} has {len(ids)} tokens, too few for {samples} samples of {seq_length}: "
            "give a longer text, or fewer or shorter samples"
        )
    chosen = torch.randperm(windows, generator=torch.Generator().manual_seed(seed))[:samples]
    return ids[: windows * seq_length].view(windows, seq_length)[chosen]


class CalibrationStream:
    """The hidden states [n, L, C] fp32 of all samples, pushed through the model block by block.

    For each block: `statistics` of its linear layers in the order of `LAYERS`, each replaced by its
    quantized self before the next is asked for; then `advance`. Every layer is computed once.
    """

    def __init__(self, tokens: Tensor, embeddings: Tensor, config: ModelConfig, batch: int = 4):
        length = tokens.shape[1]
        self.states = F.embedding(tokens.to(embeddings.device), embeddings).float()
        self.inputs: list[Tensor] = []  # of the layer asked for last, batch by batch
        self.batch, self.config, self.done = batch, config, 0
        angles = torch.outer(torch.arange(length).float(), rope_frequencies(config))
        angles = angles.to(embeddings.device)[None, :, None]  # [1, L, 1, D / 2]
        self.rope = angles.cos(), angles.sin()

    @torch.no_grad()
    def statistics(self, block: TransformerBlock, name: str) -> InputStatistics:
        """Statistics of the inputs of the block's layer `name`; see the class for the order."""
        if name != LAYERS[self.done]:
            raise ValueError(f"statistics of {name} asked for, {LAYERS[self.done]} is next")
        self.done += 1
        stats = InputStatistics.empty(block.get_submodule(name).in_features, self.states.device)
        inputs = []
        for i, x in enumerate(self.states.split(self.batch)):
            inputs.append(self._next_inputs(block, name, x, i))
            stats.add(inputs[-1])
        self.inputs = inputs if name in ("attention.wo", "feed_forward.w2") else []
        return stats

    def _next_inputs(self, block: TransformerBlock, name: str, x: Tensor, i: int) -> Tensor:
        """Inputs of layer `name` for batch i, whose states x are moved on past attention's end."""
        if name == "attention.wqkv":
            return block.attention_norm(x)
        if name == "attention.wo":
            return self._attend(block, x)
        if name == "feed_forward.w13":
            x += block.attention.wo(self.inputs[i])
            return block.ffn_norm(x)
        feed_forward = block.feed_forward
        return captured_input(feed_forward, feed_forward.w2, block.ffn_norm(x))

    def _attend(self, block: TransformerBlock, x: Tensor) -> Tensor:
        """What attention hands to wo, for states x [b, L, C]."""
        (b, length), config, device = x.shape[:2], self.config, x.device
        attention = block.attention
        attention.kv_cache = KVCache(b, config.n_kv_heads, length, config.head_dim, x.dtype, device)
        position = torch.arange(length, device=device).expand(b, length)
        start = torch.zeros(b, dtype=torch.int64, device=device)
        inputs = (block.attention_norm(x), *self.rope, start, position)
        try:
            return captured_input(attention, attention.wo, *inputs)
        finally:
            attention.kv_cache = None

    @torch.no_grad()
    def advance(self, block: TransformerBlock) -> None:
        """Push the states through the rest of the finished block."""
        if self.done != len(LAYERS):
            raise ValueError(f"advance before the statistics of {LAYERS[self.done]}")
        for i, x in enumerate(self.states.split(self.batch)):
            x += block.feed_forward.w2(self.inputs[i])
        self.inputs, self.done = [], 0


class _Captured(Exception):
    """Carries a layer's input out of a forward pass that need not go on."""


def captured_input(module: nn.Module, layer: nn.Module, *args: Tensor) -> Tensor:
    """The input that `layer` gets when `module` is called with `args`."""

    def stop(_, inputs):
        raise _Captured(inputs[0])

    handle = layer.register_forward_pre_hook(stop)
    try:
        module(*args)
    except _Captured as captured:
        return captured.args[0]
    finally:
        handle.remove()
    raise ValueError("the module never calls that layer")
