"""xfuser's own sequence-parallel attention (USP), as another way to exchange the video's tokens on CUDA.

xfuser keeps its groups and settings in globals of its own, which are made here from a layout. It cannot be imported
without an accelerator, so it is imported only when it is asked for.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from pipeline.errors import UsageError
from pipeline.parallel.attention import EvenAttentionFn
from pipeline.records.parallel import ParallelLayout


def xfuser_usp(layout: ParallelLayout) -> EvenAttentionFn:
    """USP over the ranks of the layout, attention by cuDNN; see `start_xfuser`."""
    start_xfuser(layout)
    from xfuser.model_executor.layers.usp import USP

    return USP


def start_xfuser(layout: ParallelLayout) -> None:
    """Make xfuser's groups and settings, unless they are there: one layout a process, after it joined, all ranks alike.

    UsageError for a layout with tensor parallelism, whose ranks xfuser takes to be those of the sequence.
    """
    if layout.tensor > 1:
        raise UsageError(f"xfuser needs a layout without tensor parallelism, got {layout.name}; use our own exchange")
    from xfuser.config.args import xFuserArgs
    from xfuser.core.distributed import init_distributed_environment, runtime_state

    if runtime_state.runtime_state_is_initialized():
        return
    init_distributed_environment(
        rank=dist.get_rank(), world_size=dist.get_world_size(), local_rank=torch.cuda.current_device()
    )
    # To xfuser, ranks of other predictions are other data.
    config, _ = xFuserArgs(
        model="",
        data_parallel_degree=layout.guidance,
        ring_degree=layout.ring,
        ulysses_degree=layout.ulysses,
        attention_backend="CUDNN",
    ).create_config()
    # Its public way leads to a state for degree 1 or to a diffusers pipeline.
    runtime_state._RUNTIME = runtime_state.RuntimeState(config)
