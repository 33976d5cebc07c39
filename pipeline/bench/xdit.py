"""xDiT's LTX-2 denoiser on our weights: diffusers' with its own exchange of heads for tokens, attention by cuDNN.

Every rank is given, and gets, the whole streams. xfuser is imported only when it is asked for.
"""

from __future__ import annotations

from functools import partial

from pipeline.bench import peers
from pipeline.bench.tiers import Built, Weights
from pipeline.parallel.xfuser_usp import start_xfuser
from pipeline.records.parallel import ParallelLayout


def build(weights: Weights, layout: ParallelLayout, *, compiled: bool) -> Built:
    """Their denoiser over the ranks of the layout; collective."""
    start_xfuser(layout)
    from xfuser.model_executor.models.transformers.transformer_ltx2 import xFuserLTX2VideoTransformer3DWrapper

    model = peers.filled(weights, xFuserLTX2VideoTransformer3DWrapper)
    if compiled:
        # As `peers.py` does, but for breaks in a graph: their own runner allows them.
        model.compile_repeated_blocks(dynamic=False)
    return Built(model, partial(peers.bound, model))
