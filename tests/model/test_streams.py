"""Each distinct timestep is embedded once; what outlasts a step is computed once; samples are independent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from pipeline.model.denoiser import AudioVideoDenoiser
from pipeline.model.modulation import TimestepModulation
from pipeline.model.streams import DistinctTimesteps, Perturbation, TokenStream, attention_bias, text_bias

Golden = Callable[[str], Any]


def rows_computed(denoiser: AudioVideoDenoiser, video: TokenStream, audio: TokenStream) -> dict[str, int]:
    """Input rows of the widest linear layer of each timestep module during one call."""
    rows: dict[str, int] = {}
    handles = []
    for name, module in denoiser.named_modules():
        if isinstance(module, TimestepModulation):
            handles.append(
                module.rows.register_forward_hook(
                    lambda _m, args, _out, name=name: rows.update({name: rows.get(name, 0) + args[0][..., 0].numel()})
                )
            )
    denoiser(video, audio)
    for handle in handles:
        handle.remove()
    return rows


def test_modulation_rows_computed_equal_the_number_of_distinct_timesteps(
    av_denoiser: AudioVideoDenoiser, golden: Golden
) -> None:
    case = golden("dit_ltx2_0/case_i2v")
    # Batch of one: video has the values 0, 0.18125 and 0.725, audio 0.3625 and 0.725.
    assert rows_computed(av_denoiser, case.video, case.audio) == {
        "video.adaln": 3,
        "video.exchange_adaln": 3,
        "video.exchange_gate_adaln": 1,
        "audio.adaln": 2,
        "audio.exchange_adaln": 2,
        "audio.exchange_gate_adaln": 1,
    }


def test_uniform_timesteps_compute_one_row_a_sample_and_gather_nothing(
    av_denoiser: AudioVideoDenoiser, golden: Golden
) -> None:
    case = golden("dit_ltx2_0/case_t2v")
    batch_size = case.video.tokens_BTC.shape[0]
    assert case.video.timesteps.index_BT is None
    assert set(rows_computed(av_denoiser, case.video, case.audio).values()) == {batch_size}


def test_one_row_a_token_gives_what_distinct_rows_give(av_denoiser: AudioVideoDenoiser, golden: Golden) -> None:
    case = golden("dit_ltx2_0/case_i2v")
    num_tokens = case.video.tokens_BTC.shape[1]
    every_token = DistinctTimesteps(case.video.timesteps.per_token(num_tokens), torch.arange(num_tokens)[None])
    expected, _ = av_denoiser(case.video, case.audio)
    got, _ = av_denoiser(replace(case.video, timesteps=every_token), case.audio)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_distinct_timesteps_give_back_the_timestep_of_each_token() -> None:
    timesteps_BT = torch.tensor([[0.5, 0.0, 0.5, 0.25], [1.0, 1.0, 1.0, 1.0]])
    distinct = DistinctTimesteps.from_tokens(timesteps_BT)
    assert distinct.values_BK.shape == (2, 3)
    assert torch.equal(distinct.per_token(4), timesteps_BT)


def test_scaled_denoise_mask_is_mask_times_sigma_to_the_bit() -> None:
    mask_BT, sigma_B = torch.rand(2, 7), torch.rand(2)
    scaled = DistinctTimesteps.from_tokens(mask_BT).scaled(sigma_B)
    assert torch.equal(scaled.per_token(7), mask_BT * sigma_B[:, None])


def test_uniform_timesteps_are_the_noise_level_for_every_token() -> None:
    sigma_B = torch.tensor([0.3, 0.9])
    distinct = DistinctTimesteps.uniform(sigma_B)
    assert distinct.index_BT is None
    assert torch.equal(distinct.per_token(3), sigma_B[:, None].expand(2, 3))
    assert DistinctTimesteps.from_tokens(sigma_B[:, None].expand(2, 3)).index_BT is None


def test_several_values_without_an_index_are_refused() -> None:
    with pytest.raises(ValueError, match="one column when there is no index, got 2"):
        DistinctTimesteps(torch.zeros(1, 2))


def test_conditioning_prepared_once_serves_every_step(av_denoiser: AudioVideoDenoiser, golden: Golden) -> None:
    case = golden("dit_ltx2_0/case_masked")
    conditioning = av_denoiser.prepare(case.video, case.audio)
    later = replace(
        case.video,
        tokens_BTC=case.video.tokens_BTC * 0.5,
        timesteps=case.video.timesteps.scaled(torch.tensor([0.5, 0.1])),
    )
    for video in (case.video, later):
        for got, expected in zip(
            av_denoiser(video, case.audio, conditioning), av_denoiser(video, case.audio), strict=True
        ):
            assert torch.equal(got, expected)


def test_conditioning_for_other_tokens_is_refused(av_denoiser: AudioVideoDenoiser, golden: Golden) -> None:
    small, large = golden("dit_ltx2_0/case_i2v"), golden("dit_ltx2_0/case_t2v")
    with pytest.raises(ValueError, match="prepared for 60 tokens, got 36"):
        av_denoiser(large.video, large.audio, av_denoiser.prepare(small.video, small.audio))
    with pytest.raises(ValueError, match="prepared for 9 tokens, got None"):
        av_denoiser(large.video, large.audio, av_denoiser.prepare(large.video, None))


def test_positions_shared_by_all_samples_may_be_given_once(av_denoiser: AudioVideoDenoiser, golden: Golden) -> None:
    case = golden("dit_ltx2_0/case_t2v")
    once = [replace(stream, positions_BAT2=stream.positions_BAT2[:1]) for stream in (case.video, case.audio)]
    for got, expected in zip(av_denoiser(*once), av_denoiser(case.video, case.audio), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_perturbed_sample_is_the_same_alone_and_in_a_batch(av_denoiser: AudioVideoDenoiser, golden: Golden) -> None:
    # Alone, skipped attention is not computed at all; in a batch it is computed and masked out.
    case = golden("dit_ltx2_0/case_stg")
    together = av_denoiser(case.video, case.audio, perturbations=case.perturbations)
    for i, perturbation in enumerate(case.perturbations):
        alone = av_denoiser(_sample(case.video, i), _sample(case.audio, i), perturbations=(perturbation,))
        for got, expected in zip(alone, together, strict=True):
            torch.testing.assert_close(got, expected[i : i + 1], rtol=0, atol=1e-5)


def _sample(stream: TokenStream, i: int) -> TokenStream:
    return replace(
        stream,
        tokens_BTC=stream.tokens_BTC[i : i + 1],
        timesteps=DistinctTimesteps(stream.timesteps.values_BK[i : i + 1]),
        sigma_B=stream.sigma_B[i : i + 1],
        positions_BAT2=stream.positions_BAT2[i : i + 1],
        text_BSD=stream.text_BSD[i : i + 1],
    )


def test_calls_that_make_no_sense_are_refused(
    av_denoiser: AudioVideoDenoiser, video_only_denoiser: AudioVideoDenoiser, golden: Golden
) -> None:
    case = golden("dit_ltx2_0/case_t2v")
    with pytest.raises(ValueError, match="got neither"):
        av_denoiser(None, None)
    with pytest.raises(ValueError, match="video-only"):
        video_only_denoiser(case.video, case.audio)
    with pytest.raises(ValueError, match="one entry for each of \\[2\\], got 1"):
        av_denoiser(case.video, case.audio, perturbations=(Perturbation(),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hidden_positions_get_the_most_negative_finite_bias(dtype: torch.dtype) -> None:
    bias = attention_bias(torch.tensor([[[1.0, 0.0], [0.5, 1.0]]]), dtype)
    assert bias.shape == (1, 1, 2, 2)
    assert bias[0, 0, 0].tolist() == [0.0, torch.finfo(dtype).min]
    assert bias[0, 0, 1, 0].item() == pytest.approx(-0.6931, abs=3e-3)
    dropped = text_bias(torch.tensor([[1, 0]]), dtype)
    assert dropped.flatten().tolist() == [0.0, torch.finfo(dtype).min]
