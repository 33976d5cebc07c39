"""Queries and keys with the structure that attention of a video has, made up: what a choice of blocks is judged by.

Random weights make attention nearly even, and then every choice of a quarter of the blocks keeps a quarter of the mass.
These heads look at something. What is known of trained video transformers went into them, as kinds and not as numbers,
since no trained weights are at hand here:

- Smooth in space and time: a head sees by place (a Gaussian of the distance, with a head's own lengths: around a token,
  through time at one place, within one picture) and by content (a smooth field of directions over the clip, so that
  what is alike attends to each other wherever it is).
- Heavy-tailed: each query and key is blurred by noise whose size is Student's t with 4 degrees of freedom, and a key's
  length by a factor whose logarithm is.
- With sinks: a few keys, some of them in the first frame, that all queries look at; they hold a tenth of the mass
  between them.

`statistics` says how concentrated the result is, and tests/engine/test_block_choice.py holds it to that. How much of
the mass a density keeps depends on just this: of heads that see twice as many keys, less.

Shape suffixes: H heads, T tokens, K channels of a head, A axes (frames, rows, columns), S sampled queries, N blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.ops import BLOCK_TOKENS


class HeadKind(NamedTuple):
    """Lengths (frames, rows, columns) by which places are told apart; how much place and content weigh in logits."""

    lengths: tuple[float, float, float]
    place: float
    content: float


KINDS = (
    HeadKind((2.0, 3.0, 3.0), 7.2, 2.7),
    HeadKind((12.0, 2.0, 2.0), 7.2, 2.7),
    HeadKind((0.7, 12.0, 12.0), 7.2, 2.7),
    HeadKind((4.0, 8.0, 8.0), 2.7, 7.2),
)
CONTENT_LENGTHS = (4.0, 5.0, 5.0)
CONTENT_DIRECTIONS, CONTENT_WAVES = 8, 64
# A quarter of a head's channels is for the directions of content.
MIN_CHANNELS = 4 * CONTENT_DIRECTIONS
SINK_CHANNELS = 4
SINK_SHARE = 0.1
TOKENS_A_SINK = 4000
NOISE, NOISE_LIMIT = 0.3, 4.0
LENGTH_SPREAD = 0.1
DEGREES_OF_FREEDOM = 4
SAMPLE = 384


@dataclass(frozen=True, eq=False)
class StructuredHeads:
    """Queries and keys (1, H, T, K) of a clip's tokens in raster order, float32, ready for softmax(q k / sqrt(K))."""

    size: tuple[int, int, int]
    q_BHTK: Tensor
    k_BHTK: Tensor


def structured_heads(size: tuple[int, int, int], *, channels: int, seed: int) -> StructuredHeads:
    """One head of each kind for a clip of (frames, rows, columns) latents; `channels` is at least MIN_CHANNELS."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.meshgrid(*(torch.arange(count) for count in size), indexing="ij")
    places_TA = torch.stack([axis.flatten() for axis in grid], dim=1).float()
    heads = [_head(kind, places_TA, size, channels, generator) for kind in KINDS]
    q_HTK, k_HTK = (torch.stack(each) for each in zip(*heads, strict=True))
    return StructuredHeads(size, q_HTK[None], k_HTK[None])


def _head(
    kind: HeadKind, places_TA: Tensor, size: tuple[int, int, int], channels: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    content_channels = channels // 4
    place_TK = _place_features(places_TA, kind.lengths, channels - content_channels - SINK_CHANNELS, generator)
    basis_KD = torch.linalg.qr(torch.randn(content_channels, CONTENT_DIRECTIONS, generator=generator))[0]
    content_TK = _smooth_directions(places_TA, generator) @ basis_KD.T
    seen_TK = torch.cat((place_TK * math.sqrt(kind.place), content_TK * math.sqrt(kind.content)), dim=1)
    q_TK, k_TK = (_blurred(seen_TK, math.sqrt(kind.place + kind.content), generator) for _ in range(2))
    num_tokens = len(places_TA)
    k_TK = k_TK * torch.exp(LENGTH_SPREAD * _student(num_tokens, generator).clamp(-4, 4))[:, None]
    q_TK, k_TK = _with_sinks(q_TK, k_TK, size, generator)
    # What softmax divides by.
    scale = channels**0.25
    return q_TK * scale, k_TK * scale


def _place_features(places_TA: Tensor, lengths: tuple[float, ...], count: int, generator: torch.Generator) -> Tensor:
    """Unit rows whose products are about exp(-distance^2 / 2) in units of the lengths (random Fourier features)."""
    waves_KA = torch.randn(count // 2, 3, generator=generator) / torch.tensor(lengths)
    angle_TK = places_TA @ waves_KA.T
    return torch.cat((angle_TK.cos(), angle_TK.sin()), dim=1) / math.sqrt(count // 2)


def _smooth_directions(places_TA: Tensor, generator: torch.Generator) -> Tensor:
    """A unit vector for each token that turns slowly from token to token: a sum of waves of many lengths."""
    waves_NA = torch.randn(CONTENT_WAVES, 3, generator=generator) / torch.tensor(CONTENT_LENGTHS)
    waves_NA = waves_NA * torch.exp(0.5 * torch.randn(CONTENT_WAVES, 1, generator=generator))
    phase_N = torch.rand(CONTENT_WAVES, generator=generator) * 2 * math.pi
    amplitude_ND = torch.randn(CONTENT_WAVES, CONTENT_DIRECTIONS, generator=generator)
    field_TD = torch.cos(places_TA @ waves_NA.T + phase_N) @ amplitude_ND
    return field_TD / field_TD.norm(dim=1, keepdim=True)


def _blurred(x_TK: Tensor, length: float, generator: torch.Generator) -> Tensor:
    size_T1 = _student(len(x_TK), generator).abs().clamp(max=NOISE_LIMIT)[:, None] * NOISE * length
    return x_TK + size_T1 * torch.randn(x_TK.shape, generator=generator) / math.sqrt(x_TK.shape[1])


def _student(count: int, generator: torch.Generator) -> Tensor:
    chi_square = torch.randn(count, DEGREES_OF_FREEDOM, generator=generator).square().mean(dim=1)
    return torch.randn(count, generator=generator) / chi_square.sqrt()


def _with_sinks(
    q_TK: Tensor, k_TK: Tensor, size: tuple[int, int, int], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Channels in which all queries are alike and only sinks have anything, as much as gives them their share."""
    num_tokens, count = len(q_TK), max(2, len(q_TK) // TOKENS_A_SINK)
    in_first_frame = torch.randint(size[1] * size[2], (count,), generator=generator)
    anywhere = torch.randint(num_tokens, (count,), generator=generator)
    sinks = torch.cat((in_first_frame, anywhere)).unique()
    sample = torch.randperm(num_tokens, generator=generator)[:SAMPLE]
    total = (q_TK[sample] @ k_TK.T).logsumexp(dim=1).mean().item()
    in_q_TK, in_k_TK = torch.zeros(num_tokens, SINK_CHANNELS), torch.zeros(num_tokens, SINK_CHANNELS)
    in_q_TK[:, 0] = 1
    in_k_TK[sinks, 0] = total + math.log(SINK_SHARE / (1 - SINK_SHARE) / len(sinks))
    return torch.cat((q_TK, in_q_TK), dim=1), torch.cat((k_TK, in_k_TK), dim=1)


def sampled_queries(heads: StructuredHeads) -> Tensor:
    """Some tokens, in rising order: judging all of 32,640 would take minutes."""
    num_tokens = heads.q_BHTK.shape[2]
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randperm(num_tokens, generator=generator)[:SAMPLE].sort().values


class Statistics(NamedTuple):
    """Of each head: keys that a query sees (exp of the entropy) as a part of all; mass of its top hundredth of keys."""

    effective_keys_H: Tensor
    top_hundredth_H: Tensor


def statistics(heads: StructuredHeads) -> Statistics:
    """Means over sampled queries."""
    weights_HST = _weights(heads.q_BHTK[0][:, sampled_queries(heads)], heads.k_BHTK[0])
    entropy_HS = torch.special.entr(weights_HST).sum(dim=-1)
    num_keys = weights_HST.shape[-1]
    top_HS = weights_HST.topk(max(1, num_keys // 100), dim=-1).values.sum(dim=-1)
    return Statistics(entropy_HS.exp().mean(dim=1) / num_keys, top_HS.mean(dim=1))


def kept_mass(q_BHTK: Tensor, k_BHTK: Tensor, seen_BHQN: Tensor, queries_S: Tensor) -> Tensor:
    """The part of each query's softmax that lies in the blocks its own block sees: (H, S)."""
    weights_HST = _weights(q_BHTK[0][:, queries_S], k_BHTK[0])
    padding = -weights_HST.shape[-1] % BLOCK_TOKENS
    by_block_HSN = torch.nn.functional.pad(weights_HST, (0, padding)).unflatten(-1, (-1, BLOCK_TOKENS)).sum(dim=-1)
    return by_block_HSN.gather(2, seen_BHQN[0][:, queries_S // BLOCK_TOKENS].long()).sum(dim=-1)


def _weights(q_HSK: Tensor, k_HTK: Tensor) -> Tensor:
    return torch.softmax(q_HSK @ k_HTK.transpose(1, 2) / math.sqrt(q_HSK.shape[-1]), dim=-1)
