"""Device functions that the products, attention and the step share."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_for_others(PDL: tl.constexpr):
    """With PDL the kernel in front may still run: only from here on are its results there.

    The kernel behind is let in at once. It, too, waits until all of this one has ended.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def operand(w, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """w as x's type. The interpreter misreads int8 made bf16 at once."""
    if INTERPRET and dtype.is_floating():
        return w.to(tl.float32).to(dtype)
    else:
        return w.to(dtype)


@triton.jit
def dot(a, b, acc, INTEGER: tl.constexpr, INTERPRET: tl.constexpr):
    """acc + a b. The interpreter is silently wrong on bf16, so there the operands become fp32."""
    if INTEGER:
        return tl.dot(a, b, acc, out_dtype=tl.int32)
    elif INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def round_even(x):
    """To the nearest integer, ties to even, int32, for |x| < 2^22.

    Adding 1.5 * 2^23 rounds, and leaves the integer in the low bits of the mantissa.
    """
    return (x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
