"""kernels/attention.py: the forms in PyTorch's operators against the formula in fp32."""

import pytest
import torch

from kernels.attention import attention_reference, masked_attention, sdpa_filled

CASES = [  # B, H, H_kv, T, S, D, start
    (1, 9, 3, 1, 70, 64, [65]), (2, 4, 4, 1, 40, 20, [0, 39]), (3, 6, 2, 5, 50, 16, [0, 7, 45]),
    (1, 8, 1, 12, 90, 32, [0]), (2, 6, 3, 1, 33, 8, [31, 4]),
]  # fmt: skip


@pytest.mark.parametrize("form", [masked_attention, sdpa_filled])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("int8", [False, True])
def test_forms(form, case, int8):
    b, h, h_kv, t, s, d, start = case
    q, start = torch.randn(b, h, t, d), torch.tensor(start)
    k, v = torch.randn(b, h_kv, s, d), torch.randn(b, h_kv, s, d)
    scales = (None, None)
    if int8:
        k, v = (torch.randint(-127, 128, k.shape, dtype=torch.int8) for _ in range(2))
        scales = torch.rand(2, b, h_kv, s, 1) / 60
    want = attention_reference(q, k, v, start, *scales)
    y = form(q, k, v, start, *scales)
    assert y.shape == want.shape
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)


def test_the_formula_by_hand():
    """Two heads on one key: weights 1 and e over 1 + e for two slots, the third unseen."""
    q = torch.tensor([[[[1.0]], [[0.0]]]])
    k, v = torch.tensor([[[[0.0], [1.0], [9.0]]]]), torch.tensor([[[[2.0], [4.0], [99.0]]]])
    y = attention_reference(q, k, v, torch.tensor([1])).flatten()
    e = torch.e
    torch.testing.assert_close(y, torch.tensor([(2 + 4 * e) / (1 + e), 3.0]))
