"""Which of the video's tokens belong to which rank. Pure arithmetic, and the slicing that follows from it.

Tokens are cut into equal parts in order; the last ones are filled up with padding, so that all ranks send and receive
tensors of one shape. Padding is always at the end of what a rank, or all ranks of an axis together, hold.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Shards:
    """`num_tokens` over `num_rings` * `num_ulysses` ranks. A ring's chunk is what its ulysses ranks hold together."""

    num_tokens: int
    num_rings: int
    num_ulysses: int

    @property
    def part_len(self) -> int:
        """Tokens of each rank, padding among them."""
        return -(-self.num_tokens // (self.num_rings * self.num_ulysses))

    @property
    def chunk_len(self) -> int:
        """Tokens of each ring's chunk, padding among them."""
        return self.part_len * self.num_ulysses

    @property
    def has_padding(self) -> bool:
        return self.part_len * self.num_rings * self.num_ulysses > self.num_tokens

    def num_in_chunk(self, ring: int) -> int:
        """Tokens of a ring's chunk without padding; 0 if the tokens do not reach that far."""
        return min(max(self.num_tokens - ring * self.chunk_len, 0), self.chunk_len)


def part_of(x: Tensor, dim: int, index: int, length: int) -> Tensor:
    """Part number `index` of x along `dim`, in parts of `length`, filled up with zeros."""
    start = min(index * length, x.shape[dim])
    part = x.narrow(dim, start, min(length, x.shape[dim] - start))
    return padded(part, dim, length)


def padded(x: Tensor, dim: int, length: int) -> Tensor:
    """x with zeros behind it along `dim`, `length` in all."""
    missing = length - x.shape[dim]
    if not missing:
        return x
    return functional.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, missing))
