"""Some warps of a block that run in step: their registers, and which threads are active."""

from dataclasses import dataclass, field

import numpy as np

from scripts.ptx.memory import Memory, Tensors, wavefronts
from scripts.ptx.numbers import RAW, SIGNED, WIDTH, Array, EmulationError, decode, encode


@dataclass
class Warps:
    """Warps of a block that run in step.

    Attributes:
        r: registers by number, [threads] each.
        parameters: the kernel's, by name, as bits.
        late: asynchronous copies land when they must, not at once.
        mask: which threads are active, None for all.
        copies, groups: copies on their way: those since the last group, and the groups.
        fragments: threads by the line that they have come to.
        barrier: where they wait: its name, and how many threads it wants.
    """

    r: list[Array]
    tensors: Tensors
    shared: Memory
    parameters: dict[str, int]
    late: bool
    mask: Array | None = None
    copies: list[tuple[Array, Array]] = field(default_factory=list)
    groups: list[list] = field(default_factory=list)
    fragments: dict[int, Array | None] = field(default_factory=lambda: {0: None})
    barrier: tuple[str, int] | None = None

    @property
    def threads(self) -> int:
        return self.r[0].size

    def read(self, number: int, kind: str) -> Array:
        """A register as numbers; of a wider one the lowest bits."""
        raw = self.r[number]
        if raw.dtype.itemsize * 8 > WIDTH[kind] > 1:
            raw = raw.astype(RAW[WIDTH[kind]])
        return decode(raw, kind)

    def write(self, number: int, kind: str, value: Array) -> None:
        """Numbers into a register of the active threads, extended to its width."""
        raw, into = encode(value, kind), self.r[number]
        if into.dtype.itemsize > raw.dtype.itemsize:
            width = into.dtype.itemsize * 8
            raw = raw.astype((SIGNED if kind[0] == "s" else RAW)[width])
        np.copyto(into, raw.view(into.dtype), where=True if self.mask is None else self.mask)

    def whole(self) -> None:
        """EmulationError unless all threads are active, as what a warp does together wants it."""
        if self.mask is not None:
            raise EmulationError("a part of a warp where all of it has to take part")

    def active(self, per_thread: Array) -> Array:
        return per_thread if self.mask is None else per_thread[self.mask]

    def space(self, name: str) -> Memory:
        return self.shared if name.startswith("shared") else self.tensors

    def places(self, memory: Memory, addresses: Array, size: int) -> Array:
        """Indices [active threads, size] of `size` bytes at each active thread's address."""
        if memory is self.shared:
            every = np.ones(self.threads, np.bool_) if self.mask is None else self.mask
            memory.wavefronts += wavefronts(addresses, every, size)
        return memory.places(self.active(addresses), size)

    def load(self, memory: Memory, addresses: Array, size: int) -> Array:
        """`size` bytes at each active thread's address, [threads, size], zeros for the others."""
        found = memory.bytes[self.places(memory, addresses, size)]
        if self.mask is None:
            return found
        every = np.zeros((self.threads, size), np.uint8)
        every[self.mask] = found
        return every

    def store(self, memory: Memory, addresses: Array, data: Array) -> None:
        """Bytes [threads, size] of the active threads to their addresses."""
        memory.bytes[self.places(memory, addresses, data.shape[1])] = self.active(data)

    def wait(self, pending: int) -> None:
        """Until no more than so many groups of copies are on their way."""
        while len(self.groups) > pending:
            for places, data in self.groups.pop(0):
                self.shared.bytes[places] = data
