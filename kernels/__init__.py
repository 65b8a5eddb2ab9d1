"""Weight formats, one file each, what they share, and attention.

formats.py      the registry of formats
linear.py       the base classes: Grid (what values a weight can take), QuantizedLinear (the module)
coded.py        base class of the n-bit formats: a table of values, a scale per group
int8.py int8dq.py int4.py int8dq_int4.py w4a8.py uint.py fpx.py float8.py codebook4.py sparse24.py
affine.py       scales and zero points of groups
packing.py      codes of n bits as bytes
activations.py  how inputs are quantized
attention.py    attention over the cache; decode.py: the whole model on a few tokens, one operator
choice.py       which kernels run (--kernels); native.py builds and loads those of cpu/
aten.py         ATen's own int4 and int8 products
cpu/            C++ kernels; cuda/: Triton kernels
"""
