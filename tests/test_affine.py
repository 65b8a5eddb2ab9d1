"""Affine primitives: hand-worked cases of every domain, blocks along any dimension."""

import pytest
import torch

from kernels import affine

INT8 = {"quant_min": -128, "quant_max": 127}
UINT4 = {"quant_min": 0, "quant_max": 15}


def test_symmetric_scale_is_half_the_range():
    x = torch.tensor([[1.0, -2.55], [5.1, 0.0]])
    scale, zero = affine.choose_qparams(x, (1, 2), **INT8, symmetric=True)
    assert scale.flatten().tolist() == pytest.approx([0.02, 0.04])  # 2.55 / 127.5
    assert zero.flatten().tolist() == [0, 0] and zero.dtype == torch.int32
    q = affine.quantize(x, (1, 2), scale, zero, -128, 127)
    assert q.tolist() == [[50, -128], [127, 0]]  # 127.5 rounds to 128 and is clamped
    w = affine.dequantize(q, (1, 2), scale, zero, -128, 127)
    assert torch.allclose(w, torch.tensor([[1.0, -2.56], [5.08, 0.0]]))


def test_asymmetric_integer_zero():
    x = torch.tensor([[-1.0, 0.5, 2.0]])
    scale, zero = affine.choose_qparams(x, (1, 3), **UINT4, symmetric=False)
    assert scale.item() == pytest.approx(0.2) and zero.item() == 5
    q = affine.quantize(x, (1, 3), scale, zero, 0, 15)
    assert q.tolist() == [[0, 7, 15]]  # round(2.5) = 2, ties to even
    w = affine.dequantize(q, (1, 3), scale, zero, 0, 15)
    assert torch.allclose(w, torch.tensor([[-1.0, 0.4, 2.0]]))


def test_preserve_zero_widens_a_one_sided_range():
    x = torch.tensor([[3.0, 6.0]])
    scale, zero = affine.choose_qparams(x, (1, 2), **UINT4, symmetric=False)
    assert (scale.item(), zero.item()) == (pytest.approx(0.4), 0)
    scale, zero = affine.choose_qparams(-x, (1, 2), **UINT4, symmetric=False)
    assert (scale.item(), zero.item()) == (pytest.approx(0.4), 15)


def test_float_zero():
    x = torch.tensor([[1.0, 2.0, 4.0]])
    scale, zero = affine.choose_qparams(
        x, (1, 3), **UINT4, symmetric=False, zero_domain="float", preserve_zero=False
    )
    assert (scale.item(), zero.item()) == (pytest.approx(0.2), pytest.approx(2.6))  # 1 + 8 s
    q = affine.quantize(x, (1, 3), scale, zero, 0, 15, "float")
    assert q.tolist() == [[0, 5, 15]]
    w = affine.dequantize(q, (1, 3), scale, zero, 0, 15, "float")
    assert torch.allclose(w, x)


def test_no_zero():
    x = torch.tensor([[7.5, -3.0]])
    scale, zero = affine.choose_qparams(x, (1, 2), -8, 7, symmetric=True, zero_domain="none")
    assert scale.item() == 1.0 and zero is None
    q = affine.quantize(x, (1, 2), scale, None, -8, 7, "none")
    assert q.tolist() == [[7, -3]]
    assert affine.dequantize(q, (1, 2), scale, None, -8, 7, "none").tolist() == [[7.0, -3.0]]


def test_shrink_clips_the_range_and_eps_bounds_the_scale():
    x = torch.tensor([[10.0, -10.0]])
    scale, _ = affine.choose_qparams(x, (1, 2), **INT8, symmetric=True, shrink=0.51)
    assert scale.item() == pytest.approx(0.04)
    scale, _ = affine.choose_qparams(x * 0, (1, 2), **INT8, symmetric=True, eps=1e-3)
    assert scale.item() == pytest.approx(1e-3)


def test_scale_dtype_rounds_the_scale_before_the_zero():
    x = torch.tensor([[-0.3, 1.0]])
    scale, zero = affine.choose_qparams(
        x, (1, 2), **UINT4, symmetric=False, scale_dtype=torch.bfloat16
    )
    assert scale.dtype == torch.bfloat16 and zero.item() == round(0.3 / scale.item())


@pytest.mark.parametrize("block, shape", [((1, 4), (3, 3)), ((2, 5), (2, 2)), ((3, 10), (1, 1))])
def test_blocks_ragged_ends(block, shape):
    x = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    scale, zero = affine.choose_qparams(x, block, **INT8, symmetric=False)
    assert scale.shape == shape
    for i in range(shape[0]):
        for j in range(shape[1]):
            part = x[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            width = part.max().clamp(min=0) - part.min().clamp(max=0)
            assert scale[i, j].item() == pytest.approx(width.item() / 255, rel=1e-5)
    q = affine.quantize(x, block, scale, zero, -128, 127)
    error = affine.dequantize(q, block, scale, zero, -128, 127) - x
    assert (error.abs() <= affine.block_expand(scale, block, x.shape) * 0.501).all()


def test_block_longer_than_the_dimension():
    scale, _ = affine.choose_qparams(torch.ones(2, 3), (1, 8), **INT8, symmetric=True)
    assert scale.shape == (2, 1)


def test_block_size_must_fit_the_dimensions():
    with pytest.raises(ValueError, match="does not fit"):
        affine.choose_qparams(torch.ones(2, 3), (3,), **INT8, symmetric=True)
