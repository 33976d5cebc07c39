"""What the machine can do at a model's sizes, measured in the same run as what is held against it.

Products and attention of random numbers (zeros run at another clock), and a copy. A time below the count of operations
at the best of these rates is an error of the measurement.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import reference
from kernels.ops import device_ops, fused_ops
from kernels.rows import ScaledRows
from pipeline.bench.timing import least_s

# Fewer rows than this are a toy's, and its calls cost more than its products.
_MIN_TOKENS = 1024
_BACKENDS = {
    "cuda": (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION),
    "cpu": (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH),
}


@dataclass(frozen=True)
class Ceilings:
    """Of one device at one number of tokens. Products are (tokens, width) by (width, width) and by (width, 4 width)."""

    num_tokens: int
    bf16_gemm_tflops: tuple[float, float]
    fp8_gemm_tflops: tuple[float, float]
    attention_tflops: dict[str, float]
    # What torch takes when nobody chooses.
    default_attention: str
    copy_tb_per_s: float

    def floor_s(self, flops: float, *, in_float8: bool) -> float:
        """Seconds below which so many operations cannot take. Float8 is not faster than bfloat16 on every device."""
        rates = [*self.bf16_gemm_tflops, *self.attention_tflops.values()]
        return flops / max(rates + list(self.fp8_gemm_tflops) * in_float8) / 1e12

    def percentages(self, tflops: float) -> dict[str, float]:
        """A rate in percent of the best product in each precision and of the best attention."""
        return {
            "percent_of_bf16_gemm": 100 * tflops / max(self.bf16_gemm_tflops),
            "percent_of_fp8_gemm": 100 * tflops / max(self.fp8_gemm_tflops),
            "percent_of_attention": 100 * tflops / max(self.attention_tflops.values()),
        }

    def as_facts(self) -> dict[str, Any]:
        return asdict(self)


def judged(seconds: float, floor_s: float) -> dict[str, str]:
    """An entry that names the error of a measurement that cannot be; none if it can."""
    if seconds >= floor_s:
        return {}
    return {"error": f"median_s must be at least {floor_s:.6g}, the count at the measured ceiling, got {seconds:.6g}; "
                     "measure again with nothing else on the device"}  # fmt: skip


@torch.inference_mode()
def measure_ceilings(num_tokens: int, num_heads: int, head_dim: int, device: str) -> Ceilings:
    """Of products, attention and copies of so many tokens, `num_heads * head_dim` wide."""
    num_tokens = max(_MIN_TOKENS, num_tokens)
    width = num_heads * head_dim
    x_MD = torch.randn(num_tokens, width, device=device, dtype=torch.bfloat16)
    products = [_products(x_MD, factor * width, device) for factor in (1, 4)]
    q, k, v = (torch.randn(1, num_heads, num_tokens, head_dim, device=device, dtype=torch.bfloat16) for _ in range(3))
    return Ceilings(
        num_tokens=num_tokens,
        bf16_gemm_tflops=(products[0][0], products[1][0]),
        fp8_gemm_tflops=(products[0][1], products[1][1]),
        attention_tflops=dict(_attention(q, k, v, device)),
        default_attention=SDPBackend(torch._fused_sdp_choice(q, k, v)).name,
        copy_tb_per_s=_copy_tb_per_s(8 * num_tokens * width, device),
    )


def _products(x_MD: Tensor, width_out: int, device: str) -> tuple[float, float]:
    """TFLOP/s of a linear layer in bfloat16, and in float8 with one scale a row."""
    num_tokens, width = x_MD.shape
    weight_ND = torch.randn(width_out, width, device=device, dtype=torch.bfloat16) / width**0.5
    bias_N = torch.randn(width_out, device=device, dtype=torch.bfloat16)
    tflop = 2 * num_tokens * width * width_out / 1e12
    plain_s = least_s(partial(nn.functional.linear, x_MD, weight_ND, bias_N), device)
    values, scale = reference.quantise_rows(x_MD)
    rows = ScaledRows(values[None], scale[None], x_MD.dtype)
    float8_s = least_s(
        partial(device_ops(device).fp8_linear, rows, *reference.quantise_rows(weight_ND), bias_N), device
    )
    return tflop / plain_s, tflop / float8_s


def _attention(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, device: str) -> Iterator[tuple[str, float]]:
    """TFLOP/s of each way that torch has here, by its name, and of ours."""
    _, num_heads, num_tokens, head_dim = q_BHTK.shape
    tflop = 4 * num_heads * num_tokens**2 * head_dim / 1e12
    for backend in _BACKENDS[device]:
        with sdpa_kernel(backend):
            seconds = least_s(
                partial(nn.functional.scaled_dot_product_attention, q_BHTK, k_BHTK, v_BHTK), device, repeats=8
            )
        yield backend.name, tflop / seconds
    # Perhaps a library that torch does not know.
    attend = partial(fused_ops(device).attention, q_BHTK, k_BHTK, v_BHTK, None)
    yield "FUSED_OPERATIONS", tflop / least_s(attend, device, repeats=8)


def _copy_tb_per_s(num_elements: int, device: str) -> float:
    """Bytes read and written."""
    source = torch.randn(num_elements, device=device, dtype=torch.bfloat16)
    return 2 * source.nbytes / least_s(partial(torch.empty_like(source).copy_, source), device) / 1e12
