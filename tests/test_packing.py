"""Packing of 1 to 8 bits: hand-worked bytes, round trips at odd lengths, wrong sizes."""

import pytest
import torch

from kernels.packing import pack, packed_size, unpack


def test_four_bits_even_column_is_the_low_nibble():
    assert pack(torch.tensor([[1, 2, 15]]), 4).tolist() == [[0x21, 0x0F]]


def test_three_bits_are_one_little_endian_stream():
    # 5 | 3 << 3 | 7 << 6 = 0b1_11_011_101: byte 0 = 0xdd, byte 1 = 1
    assert pack(torch.tensor([[5, 3, 7]]), 3).tolist() == [[0xDD, 0x01]]


def test_one_bit():
    assert pack(torch.tensor([[1, 0, 0, 0, 0, 0, 0, 1, 1]]), 1).tolist() == [[0x81, 0x01]]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 31, 64, 101])
def test_round_trip(bits, length):
    generator = torch.Generator().manual_seed(bits * 1000 + length)
    codes = torch.randint(0, 2**bits, (3, length), generator=generator)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.is_contiguous()
    assert packed.shape == (3, packed_size(length, bits)) == (3, -(-length * bits // 8))
    assert torch.equal(unpack(packed, bits, length).long(), codes)
    assert torch.equal(pack(codes[1:2], bits), packed[1:2])  # rows do not touch


@pytest.mark.parametrize("bits", [0, 9])
def test_pack_refuses_other_widths(bits):
    with pytest.raises(ValueError, match="1 to 8 bits"):
        pack(torch.zeros(1, 4), bits)


def test_unpack_refuses_a_wrong_size():
    with pytest.raises(ValueError, match="do not hold"):
        unpack(torch.zeros(1, 4, dtype=torch.uint8), 4, 9)
