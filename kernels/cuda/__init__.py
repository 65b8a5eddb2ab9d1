"""The Triton kernels. Imported where there is a CUDA device or Triton's interpreter is on.

layout.py      weights as the kernels read them
tiles.py       device functions: a tile of any format's weights, decoded in registers
products.py    the kernels of the linear layer, one template for all formats
linear.py      block sizes and splits, launches, the operator
attention.py   attention over the filled part of a cache
step.py        a whole Transformer on a few tokens
weight.py      a linear layer's weight, what `repack` leaves on a GPU
launch.py      a launch as data, to be run or to be compiled without a GPU
"""
