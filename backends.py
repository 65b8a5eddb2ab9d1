"""The user's side of `--device` and `--kernels`: checked before anything is loaded."""

import torch
from torch import nn

from errors import UserError, check_device
from kernels import aten, native
from kernels.choice import choose, chosen, interpreting, load_triton, triton_on
from kernels.linear import QuantizedLinear


def use_device(device: str) -> None:
    """Make a GPU the current one, where Triton launches its kernels; UserError: there is none."""
    check_device(device)
    if ":" in device:
        torch.cuda.set_device(device)


def choose_kernels(name: str, device: str) -> None:
    """Set which kernels run (kernels/choice.py); a UserError where they cannot run on `device`."""
    on_gpu = name in ("aten", "triton-pdl") or (name == "triton" and not interpreting())
    if device == "cpu" and on_gpu:
        hint = " (TRITON_INTERPRET=1 interprets them, very slowly)" if name == "triton" else ""
        raise UserError(
            f"--kernels {name} needs a GPU; on the CPU there are auto and inductor{hint}"
        )
    if name == "triton-pdl" and torch.cuda.get_device_capability(device) < (9, 0):
        raise UserError(f"--kernels {name} needs compute capability 9.0: take triton")
    choose(name)
    if device == "cpu" and name == "auto":
        try:
            native.load()
        except ValueError as error:
            raise UserError(str(error)) from None
    if triton_on(torch.device(device)):
        if device != "cpu" and torch.cuda.get_device_capability(device) < (8, 0):
            hint = "take --kernels inductor, or --device cpu"
            raise UserError(f"the Triton kernels need compute capability 8.0: {hint}")
        try:
            load_triton()
        except RuntimeError as error:
            raise UserError(str(error)) from None


def check_layers(model: nn.Module) -> None:
    """A UserError if the model has a layer that the chosen kernels cannot multiply."""
    if chosen() == "aten":
        for name, layer in model.named_modules():
            if isinstance(layer, QuantizedLinear) and (reason := aten.refusal(layer)):
                raise UserError(f"--kernels aten, layer {name}: {reason}")
