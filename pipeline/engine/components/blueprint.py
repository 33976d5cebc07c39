"""How a part gets its weights: a network on the meta device, and the published name of each of its tensors.

What the parts are lies in the neighbouring modules; reading files and comparing names in
`pipeline/model/checkpoint.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipeline.engine.latents import ChannelStatistics
from pipeline.errors import CheckpointMismatch
from pipeline.model.checkpoint import CheckpointFile, fill_module


@dataclass(frozen=True)
class Blueprint:
    """A network on the meta device and, for each name on disk, the name of the tensor it fills."""

    module: nn.Module
    names: dict[str, str]

    def fill(self, checkpoint: CheckpointFile, *, device: str, dtype: torch.dtype | None, what: str) -> Any:
        """The network with its weights, ready for inference; CheckpointMismatch lists every difference."""
        fill_module(self.module, checkpoint, self.names, device=device, dtype=dtype, what=what)
        return self.module.eval().requires_grad_(False)


class Section(dict[str, Any]):
    """A part of the metadata in which a missing key is the file's fault, not a bug."""

    def __missing__(self, key: str) -> Any:
        raise CheckpointMismatch(f"the checkpoint's metadata lacks {key!r} beside {sorted(self)[:4]}")


def section(config: dict[str, Any], name: str) -> Section:
    """One section of the metadata's `config`; CheckpointMismatch if the file has none."""
    if name not in config:
        raise CheckpointMismatch(f"the checkpoint's metadata has no section {name!r}; use a file that holds this part")
    return Section(config[name])


def statistics_blueprint(prefix: str, *, num_channels: int) -> Blueprint:
    """Channel statistics of `vae` or `audio_vae`."""
    with torch.device("meta"):
        module = ChannelStatistics(num_channels)
    on_disk = f"{prefix}.per_channel_statistics."
    return Blueprint(module, {on_disk + "mean-of-means": "mean", on_disk + "std-of-means": "std"})


def load_statistics(checkpoint: CheckpointFile, prefix: str, *, num_channels: int, device: str) -> ChannelStatistics:
    """Channel statistics of `vae` or `audio_vae`, in float32 whatever the file stores."""
    plan = statistics_blueprint(prefix, num_channels=num_channels)
    statistics: ChannelStatistics = plan.fill(
        checkpoint, device=device, dtype=torch.float32, what=f"the statistics of {prefix}"
    )
    return statistics
