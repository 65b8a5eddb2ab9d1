"""The Triton kernels. All but layout.py and weight.py import Triton: choice.load_triton loads them.

layout.py      weights as the kernels read them
weight.py      a linear layer's weight, what `repack` leaves on a GPU
tiles.py       device functions: a tile of any format's weights, decoded in registers
pairs.py       the same of codes of less than 8 bits, several at a time
lookup.py      the same of 4-bit codes that are indices into a table
products.py    the kernels of the linear layer, one template for all formats
epilogue.py    device functions: from the sums of a product to its result
common.py      device functions that all kernels share
linear.py      block sizes and splits, launches, the operator
attention.py   attention over the filled part of a cache
between.py     norm, rotary embedding, cache and SiLU of many rows, a kernel each
inputs.py      inputs of a product made ready: norm, scale, dynamic quantization
step.py        a whole Transformer on a few tokens
launch.py      a launch as data, to be run or to be compiled without a GPU
"""
