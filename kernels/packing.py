"""Codes of 1 to 8 bits packed along the last dimension, exactly n bits each.

A row is one little-endian bit stream: code k takes bits k*n .. k*n + n - 1, counted from the
lowest bit of byte 0. For 4 bits the even column is thus the low nibble of its byte. Each row ends
on a byte boundary, so a row of K codes takes ceil(K * n / 8) bytes.
"""

import torch
from torch import Tensor

AT_ONCE = 2**22  # elements of a weight that are worked on at a time


def row_chunks(rows: int, columns: int, unit: int = 1) -> list[slice]:
    """The rows of a weight in pieces of about AT_ONCE elements, each of whole `unit`s of rows."""
    step = max(1, AT_ONCE // (max(columns, 1) * unit)) * unit
    return [slice(i, min(i + step, rows)) for i in range(0, rows, step)]


def packed_size(length: int, bits: int) -> int:
    """Bytes that a row of `length` codes of `bits` bits takes."""
    return (length * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes [..., K], integers in [0, 2**bits), into uint8 [..., ceil(K * bits / 8)]."""
    if not 1 <= bits <= 8:
        raise ValueError(f"cannot pack {bits}-bit codes: 1 to 8 bits")
    if bits == 8:
        return codes.to(torch.uint8)
    codes = codes.to(torch.uint8)
    if pad := -codes.shape[-1] % 8:  # 8 codes fill `bits` whole bytes
        codes = torch.cat([codes, codes.new_zeros(*codes.shape[:-1], pad)], dim=-1)
    codes = codes.unflatten(-1, (-1, 8)).to(torch.int64)  # [..., K/8, 8]
    word = (codes << (torch.arange(8, device=codes.device) * bits)).sum(-1, keepdim=True)
    shifts = torch.arange(bits, device=codes.device) * 8
    packed = ((word >> shifts) & 255).to(torch.uint8).flatten(-2)  # [..., K/8 * bits]
    length = codes.shape[-2] * 8 - pad
    return packed[..., : packed_size(length, bits)].contiguous()


def unpack(packed: Tensor, bits: int, length: int) -> Tensor:
    """Undo `pack`: uint8 [..., ceil(length * bits / 8)] -> uint8 codes [..., length]."""
    if packed.shape[-1] != packed_size(length, bits):
        raise ValueError(f"{packed.shape[-1]} bytes do not hold {length} codes of {bits} bits")
    if bits == 8:
        return packed
    if bits == 4:  # the common case, without 64-bit words
        return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)[..., :length]
    if pad := -packed.shape[-1] % bits:
        packed = torch.cat([packed, packed.new_zeros(*packed.shape[:-1], pad)], dim=-1)
    words = packed.unflatten(-1, (-1, bits)).to(torch.int64)  # [..., K/8, bits]
    word = (words << (torch.arange(bits, device=words.device) * 8)).sum(-1, keepdim=True)
    shifts = torch.arange(8, device=words.device) * bits
    codes = ((word >> shifts) & (2**bits - 1)).to(torch.uint8).flatten(-2)
    return codes[..., :length]
