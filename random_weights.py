"""Models of true shape with random weights: speed and memory without any file."""

import torch
from torch import nn

from checkpoint import repack
from config import ModelConfig
from errors import UserError
from kernels.formats import FORMATS
from model import RMSNorm, Transformer
from modes import Mode, head_mode, quantize_linear


def random_model(
    config: ModelConfig, mode: Mode | None, device: str, dtype: torch.dtype, seed: int = 0
) -> Transformer:
    """A model of true shape with random weights, quantized layer by layer, ready to run."""
    torch.manual_seed(seed)
    if mode is not None and mode.needs_checkpoint:
        raise UserError(f"random weights cannot be calibrated or timed: {mode} is")
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    head = None if mode is None else head_mode(mode, None)
    for name, module in list(model.named_modules()):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            tied = name == "output" and config.tied_head
            if tied:
                weight = model.tok_embeddings.weight
            else:
                weight = torch.randn(module.weight.shape, device=device, dtype=dtype) * 0.02
                weight = nn.Parameter(weight, requires_grad=False)
            module.weight = weight
            if getattr(module, "bias", None) is not None:
                module.bias = nn.Parameter(torch.zeros_like(weight[:, 0]), requires_grad=False)
        elif isinstance(module, RMSNorm):
            ones = torch.ones(module.weight.shape, device=device, dtype=dtype)
            module.weight = nn.Parameter(ones, requires_grad=False)
        layer_mode = head if name == "output" else mode
        if isinstance(module, nn.Linear):
            if layer_mode and layer_mode.format in FORMATS:
                module = quantize_linear(module, layer_mode)
                model.set_submodule(name, module)
            repack(module)
    return model.eval()
