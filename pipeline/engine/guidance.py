"""Guidance: several predictions of one step combined into one. Pure tensor functions.

Which predictions a step needs and how strongly each pushes is the recipe's (`pipeline/config/guidance.py`); whether
they are clean latents or velocities is the caller's choice.

Shapes: B batch, T tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pipeline.config.guidance import ISOLATED, NEGATIVE, PERTURBED, POSITIVE, StreamGuidance


def guided(predictions: Mapping[str, Tensor], scales: StreamGuidance, *, cfg_star: bool = False) -> Tensor:
    """The positive prediction (B,T,C), pushed away from each of the others that is there.

    LTX-2 and LTX-Video: p + (cfg-1)(p - negative) + stg (p - perturbed) + (modality-1)(p - isolated), then scaled so
    that `rescale` of the change in spread (unbiased, over the whole tensor) is taken back.
    """
    positive = result = predictions[POSITIVE]
    if NEGATIVE in predictions:
        negative = predictions[NEGATIVE]
        if cfg_star:
            negative = _projected(positive, negative)
        result = result + (scales.cfg - 1) * (positive - negative)
    if PERTURBED in predictions:
        result = result + scales.stg * (positive - predictions[PERTURBED])
    if ISOLATED in predictions:
        result = result + (scales.modality - 1) * (positive - predictions[ISOLATED])
    if scales.rescale and len(predictions) > 1:
        result = result * (scales.rescale * positive.std() / result.std() + 1 - scales.rescale)
    return result


def _projected(positive_BTC: Tensor, negative_BTC: Tensor) -> Tensor:
    """The multiple of the negative prediction that is nearest to the positive one, sample by sample."""
    product_B11 = (positive_BTC * negative_BTC).sum(dim=(1, 2), keepdim=True)
    # The small number is the reference's, against a prediction of zeros.
    return negative_BTC * (product_B11 / (negative_BTC.square().sum(dim=(1, 2), keepdim=True) + 1e-8))
