"""Memory that knows which of its bytes may be touched."""

import numpy as np
import torch

from scripts.ptx.numbers import Array, EmulationError

SHARED_BASE = 1024  # where a block's shared memory starts; swizzled tiles want multiples of 1024
GLOBAL_BASE = 1 << 36  # addresses that 32 bits do not hold
GUARD = 256  # bytes between tensors that nobody may touch
WARP, BANKS = 32, 32  # a bank is 4 bytes wide


class Memory:
    """Bytes from an address on.

    Attributes:
        valid: which of them may be touched.
        wavefronts: cycles that accesses to shared memory have taken.
    """

    def __init__(self, base: int, size: int):
        self.base, self.wavefronts = base, 0
        self.bytes = np.full(size, 0xFF, np.uint8)
        self.valid = np.ones(size, np.bool_)

    def places(self, addresses: Array, size: int) -> Array:
        """Indices [n, size] of `size` bytes at each address. EmulationError where none are."""
        at = addresses.astype(np.int64) - self.base
        if (at % size).any():
            raise EmulationError(f"an address is no multiple of {size}")
        places = at[:, None] + np.arange(size)
        inside = places.size == 0 or (places.min() >= 0 and places.max() < self.bytes.size)
        if not inside or not self.valid[places].all():
            raise EmulationError("an address lies outside of every tensor")
        return places


class Tensors(Memory):
    """Global memory: the storages of a kernel's tensors, guarded."""

    def __init__(self, tensors: list[torch.Tensor]):
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
        self.storages, size = [], GUARD  # pointer, place, bytes
        for pointer, storage in storages.items():
            content = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
            self.storages.append((pointer, size, content))
            size += -(-content.size // GUARD) * GUARD + GUARD
        super().__init__(GLOBAL_BASE, size)
        self.valid[:] = False
        for _, place, content in self.storages:
            self.bytes[place : place + content.size] = content
            self.valid[place : place + content.size] = True

    def address(self, tensor: torch.Tensor) -> int:
        """Where it starts. EmulationError if not at a multiple of 16 bytes, as Triton was told."""
        storage = tensor.untyped_storage().data_ptr()
        place = next(place for pointer, place, _ in self.storages if pointer == storage)
        address = self.base + place + tensor.data_ptr() - storage
        if address % 16:
            raise EmulationError("a tensor does not start at a multiple of 16 bytes")
        return address

    def give_back(self) -> None:
        """What the kernel wrote, into the tensors."""
        for _, place, content in self.storages:
            content[:] = self.bytes[place : place + content.size]


def wavefronts(addresses: Array, active: Array, size: int) -> int:
    """Cycles of shared memory that an access of `size` bytes a thread takes, [threads] of warps.

    As many lanes as ask for 128 bytes are served together. A bank gives one word a cycle, to all
    who want it.
    """
    words = max(1, size // 4)
    word = addresses.reshape(-1, WARP // words)[..., None] // 4 + np.arange(words)
    word = np.where(active.reshape(-1, WARP // words)[..., None], word, -1).reshape(-1, WARP)
    word = np.sort(word, axis=1)
    first = (word >= 0) & (np.diff(word, axis=1, prepend=-2) != 0)
    bank = np.arange(len(word))[:, None] * BANKS + word % BANKS
    counts = np.bincount(bank[first], minlength=len(word) * BANKS)
    return int(counts.reshape(-1, BANKS).max(axis=1).sum())
