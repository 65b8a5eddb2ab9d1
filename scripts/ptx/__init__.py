"""A GPU in NumPy, small enough to read: runs the PTX that Triton makes of a kernel, on the CPU.

Triton's interpreter runs a kernel's Python; this runs what the compiler made of it: the layouts in
registers and shared memory, inline PTX, asynchronous copies and their waits, barriers, the tensor
cores' fragments. Every address must lie in a tensor and be aligned. A block's memory starts as NaN,
its asynchronous copies land at once or as late as their wait allows, blocks come in any order, and
so do warps between barriers, all drawn from a seed: what depends on luck shows.

    numbers.py       bits as numbers and back
    memory.py        tensors, guarded; how often shared memory is asked
    program.py       the text of PTX as instructions
    warps.py         registers and active threads of some warps
    arithmetic.py    the instructions of one thread
    movement.py      loads, stores, asynchronous copies, atomics
    tensor_cores.py  what a warp does together
    run.py           blocks, branches, barriers; `emulate` and `run`

Not modelled: time. Blocks that run at once: the order in which others see their writes, a counter
that is left wrong, a barrier missing in front of an atomic do not show. That wgmma ends late: what
waits for it does nothing. Rounding within the tensor cores, here fp64 rounded once, and in
approximate functions. Forms of instructions that Triton did not make of these kernels: they are
refused.

Semantics: NVIDIA, PTX ISA 8.7, section 9.7; the matrix descriptors of wgmma are in 9.7.15.5.
"""
