"""Decoding a few frames at a time: the whole decode to the bit, in memory that does not grow with the clip."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_ltx2 import PerChannelRMSNorm
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from pipeline.engine.components.streamed_decoder import Manner, can_stream
from pipeline.engine.components.video_vae import DecodeNoise, VideoDecoder, load_video_decoder, video_decoder_blueprint
from pipeline.engine.decode import Delivery, decode_frames
from pipeline.engine.nano import CHECKPOINT
from pipeline.errors import EngineFault
from pipeline.geometry import PixelShape, render_shape
from pipeline.model.checkpoint import CheckpointFile
from tests.engine.live_tensors import LiveTensors
from tests.engine.pictures import planes_of

BOUND = 5e-6
EXACT_BOUND = 1e-12
VAES = ["vae_ltx2_0", "vae_ltx2_3", "vae_ltxv_0_9_8", "nano"]
CHANNELS = 16


@pytest.fixture
def decoder(fixtures, request):
    """By the name of a golden folder, or the nano model's."""

    def load(name, *, is_causal=False):
        path = request.getfixturevalue("nano_folder") / CHECKPOINT if name == "nano" else fixtures / name
        file = CheckpointFile(path if name == "nano" else path / "model.safetensors")
        vae = load_video_decoder(file, device="cpu", dtype=None)
        vae.module.is_causal = is_causal
        return vae

    return load


def noise_for(vae):
    return DecodeNoise(0.05) if vae.takes_noise else None


def streamed(vae, latent, noise=None, **manner):
    return torch.cat(list(in_manner(vae, **manner).stream(latent, noise=noise or noise_for(vae))), dim=2)


def in_manner(vae, **manner):
    other = copy.copy(vae)
    other.manner = Manner(**manner)
    return other


def latent_of(num_frames, height, width):
    return torch.randn(1, CHANNELS, num_frames, height, width, generator=torch.Generator().manual_seed(1))


class FrameByFrame(nn.Module):
    """A layer that sees one frame at a time, or as many as its kernel needs."""

    def __init__(self, layer, size=1):
        super().__init__()
        self.layer, self.size = layer, size

    def forward(self, x):
        windows = [x[:, :, first : first + self.size] for first in range(x.shape[2] - self.size + 1)]
        return torch.cat([self.layer(window.contiguous()) for window in windows], dim=2)


def frame_by_frame(vae):
    """The library's decoder, whole and in its own order, but each layer's sums over one frame at a time."""
    module = copy.deepcopy(vae.module)
    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Conv3d):
                setattr(parent, name, FrameByFrame(layer, layer.kernel_size[0]))
            elif isinstance(layer, PerChannelRMSNorm) or name in ("nonlinearity", "conv_act"):
                setattr(parent, name, FrameByFrame(layer))
    return VideoDecoder(module, vae.statistics, takes_noise=vae.takes_noise)


@pytest.mark.parametrize("name", VAES)
@pytest.mark.parametrize("size", [(1, 2, 3), (2, 2, 2), (3, 3, 5), (6, 4, 6)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_stream_is_to_the_bit_the_librarys_decoder_that_sums_frame_by_frame(decoder, name, size, is_causal):
    vae, latent = decoder(name, is_causal=is_causal), latent_of(*size)
    whole = frame_by_frame(vae).decode(latent, noise=noise_for(vae))
    assert whole.shape == (1, 3, 8 * size[0] - 7, 32 * size[1], 32 * size[2])
    assert torch.equal(streamed(vae, latent), whole)


@pytest.mark.parametrize("name", VAES)
@pytest.mark.parametrize("num_frames", [1, 2, 5])
def test_stream_is_to_the_bit_the_whole_decode_where_frames_fill_vector_registers(decoder, name, num_frames):
    """64 places a frame: elsewhere the CPU sums the last places of a tensor in another order than the others."""
    vae, latent = decoder(name), latent_of(num_frames, 8, 8)
    assert torch.equal(streamed(vae, latent), vae.decode(latent, noise=noise_for(vae)))


@pytest.mark.parametrize("name", VAES)
@pytest.mark.parametrize("size", [(2, 2, 2), (7, 3, 5)])
def test_stream_is_the_whole_decode_but_for_rounding_everywhere(decoder, name, size):
    vae, latent = decoder(name), latent_of(*size)
    whole = vae.decode(latent, noise=noise_for(vae))
    assert (streamed(vae, latent) - whole).abs().max() <= 2 * BOUND * whole.abs().max()


@pytest.mark.parametrize("name", VAES)
@pytest.mark.parametrize("size", [(1, 2, 3), (2, 2, 2), (4, 3, 5)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_stream_that_takes_the_whole_clip_at_once_is_to_the_bit_the_whole_decode(decoder, name, size, is_causal):
    vae, latent = decoder(name, is_causal=is_causal), latent_of(*size)
    whole = vae.decode(latent, noise=noise_for(vae))
    assert torch.equal(streamed(vae, latent, frames_per_convolution=whole.shape[2]), whole)


@pytest.mark.parametrize("name", VAES)
@pytest.mark.parametrize("num_frames", [1, 2, 5])
@pytest.mark.parametrize("frames_per_convolution", [2, 3, 8])
def test_blocks_of_every_size_give_the_whole_decode(decoder, name, num_frames, frames_per_convolution):
    """To the bit where frames fill vector registers, but for rounding elsewhere; whatever is a block's last frame."""
    for size, exact in (((num_frames, 8, 8), True), ((num_frames, 3, 5), False)):
        vae, latent = decoder(name), latent_of(*size)
        whole = vae.decode(latent, noise=noise_for(vae))
        got = streamed(vae, latent, frames_per_convolution=frames_per_convolution)
        assert got.shape == whole.shape and (got - whole).abs().max() <= 2 * BOUND * whole.abs().max()
        assert not exact or torch.equal(got, whole)


class Convolutions(TorchDispatchMode):
    """Of convolutions in three dimensions: the answers' frames, the layouts of what they take and hold, the bias."""

    def __init__(self):
        super().__init__()
        self.num_frames, self.channels_last, self.have_bias = [], [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        answer = func(*args, **(kwargs or {}))
        if "convolution" in func.name() and answer.dim() == 5:
            self.num_frames.append(answer.shape[2])
            self.have_bias.append(args[2] is not None)
            self.channels_last.append([x.is_contiguous(memory_format=torch.channels_last_3d) for x in args[:2]])
        return answer


@pytest.mark.parametrize("name", VAES)
@pytest.mark.parametrize("size", [2, 4, 8])
def test_no_convolution_takes_more_frames_than_it_may_and_nearly_all_take_as_many(decoder, name, size):
    vae, latent = decoder(name), latent_of(40, 2, 2)
    with Convolutions() as seen:
        streamed(vae, latent, frames_per_convolution=size)
    assert max(seen.num_frames) == size
    # Of each layer the first block and those at its end may have fewer.
    assert sum(num < size for num in seen.num_frames) <= 0.2 * len(seen.num_frames)


@pytest.mark.parametrize("name", VAES)
@pytest.mark.parametrize("size", [1, 4])
def test_activations_lie_as_the_weights_do(decoder, name, size):
    vae, latent = decoder(name), latent_of(3, 4, 6)
    expected = streamed(vae, latent, frames_per_convolution=size)
    vae.module.to(memory_format=torch.channels_last_3d)
    with Convolutions() as seen:
        got = streamed(vae, latent, frames_per_convolution=size)
    assert all(all(pair) for pair in seen.channels_last)
    assert (got - expected).abs().max() <= 2 * BOUND * expected.abs().max()


@pytest.fixture
def exact_decoder(decoder):
    """In float64, where a norm over channels that are nearly all 0 does not make much of a rounding."""

    def load(name, *, is_causal=False):
        vae = decoder(name, is_causal=is_causal)
        vae.module.double()
        return vae

    return load


@pytest.mark.parametrize("name", VAES)
@pytest.mark.parametrize("size", [(1, 2, 3), (3, 3, 5)])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("frames_per_convolution", [1, 2, 3, 8, 100])
def test_fused_operations_give_the_stream_of_the_librarys(exact_decoder, name, size, is_causal, frames_per_convolution):
    vae, latent = exact_decoder(name, is_causal=is_causal), latent_of(*size)
    expected = streamed(vae, latent)
    got = streamed(vae, latent, frames_per_convolution=frames_per_convolution, fused=vae.ops)
    assert got.shape == expected.shape and got.dtype == expected.dtype
    assert (got - expected).abs().max() <= EXACT_BOUND * expected.abs().max()


@pytest.mark.parametrize("name", VAES)
def test_fused_operations_give_the_stream_of_the_librarys_of_several_clips_at_once(exact_decoder, name):
    vae, latent = exact_decoder(name), torch.cat([latent_of(3, 2, 3), -latent_of(3, 2, 3)])
    vae.module.to(memory_format=torch.channels_last_3d)
    got = streamed(vae, latent, frames_per_convolution=2, fused=vae.ops)
    expected = torch.cat([streamed(vae, one) for one in latent.split(1)])
    assert (got - expected).abs().max() <= EXACT_BOUND * expected.abs().max()


@pytest.mark.parametrize("name", VAES)
def test_fused_operations_agree_in_float32_too_but_for_rounding(decoder, name):
    vae, latent = decoder(name), latent_of(3, 2, 3)
    expected = streamed(vae, latent)
    assert (streamed(vae, latent, fused=vae.ops) - expected).abs().max() <= 2 * BOUND * expected.abs().max()


@pytest.mark.parametrize("name", VAES)
@pytest.mark.parametrize("size", [1, 4])
def test_fused_convolutions_lack_their_bias_and_take_channels_last(decoder, name, size):
    vae = decoder(name)
    vae.module.to(memory_format=torch.channels_last_3d)
    with Convolutions() as seen:
        streamed(vae, latent_of(3, 4, 6), frames_per_convolution=size, fused=vae.ops)
    assert all(all(pair) for pair in seen.channels_last)
    assert not any(seen.have_bias)


def test_memory_of_fused_operations_does_not_grow_with_the_clip(decoder):
    vae = decoder("vae_ltx2_0")
    vae.module.to(memory_format=torch.channels_last_3d)

    def drain(latent):
        for _ in in_manner(vae, frames_per_convolution=8, fused=vae.ops).stream(latent):
            pass

    short, long = (latent_of(num_frames, 4, 4) for num_frames in (24, 48))
    grown_bytes = 3 * (long.nbytes - short.nbytes)
    assert peak_bytes(lambda: drain(long)) <= peak_bytes(lambda: drain(short)) + grown_bytes


@pytest.mark.parametrize("case", ["vae_ltx2_0/case_decode", "vae_ltx2_3/case_decode", "vae_ltxv_0_9_8/case_decode_t0"])
def test_stream_agrees_with_the_reference(golden, decoder, case):
    record = golden(case)
    vae = decoder(case.partition("/")[0])
    noise = DecodeNoise(record.params["decode_timestep"]) if vae.takes_noise else None
    record.assert_close("out.video", streamed(vae, record["in.latent"], noise), bound=BOUND)


def test_stream_takes_the_noise_of_a_recipe(golden, decoder):
    record = golden("vae_ltxv_0_9_8/case_decode_timestep")
    noise = DecodeNoise(record.params["decode_timestep"], record.params["decode_noise_scale"], record["in.noise"])
    record.assert_close("out.video", streamed(decoder("vae_ltxv_0_9_8"), record["in.latent"], noise), bound=BOUND)


@pytest.mark.parametrize("name", VAES)
@pytest.mark.parametrize("num_frames", [1, 3, 6])
def test_chunks_of_every_length_have_the_same_bytes(decoder, name, num_frames):
    vae, latent = decoder(name), latent_of(num_frames, 2, 3)
    shape = render_shape(PixelShape(8 * num_frames - 7, 64, 90, 24.0), 32)
    of_length = {
        length: list(decode_frames(vae, latent, shape, noise=noise_for(vae), delivery=Delivery(length)))
        for length in (1, 2, 3, 100)
    }
    assert len(of_length[100]) == 1 and of_length[100][0].planes.shape == (8 * num_frames - 7, 64 * 3 // 2, 90)
    for length, chunks in of_length.items():
        assert all(chunk.num_frames == 8 * length for chunk in chunks[:-1])
        assert np.array_equal(planes_of(chunks), of_length[100][0].planes)


@pytest.mark.parametrize("length", [1, 2])
def test_frames_that_nobody_takes_are_counted_and_checked_like_all_others(decoder, length):
    vae, latent = decoder("nano"), latent_of(5, 2, 3)
    shape = render_shape(PixelShape(33, 64, 90, 24.0), 32)
    taken, left = (
        list(decode_frames(vae, latent, shape, delivery=Delivery(length, with_planes=wanted)))
        for wanted in (True, False)
    )
    assert [chunk.num_frames for chunk in left] == [chunk.num_frames for chunk in taken]
    assert all(chunk.nbytes for chunk in taken) and not any(chunk.nbytes for chunk in left)
    latent[:, :, 3] = float("nan")
    with pytest.raises(EngineFault, match="pixels that are not finite"):
        list(decode_frames(vae, latent, shape, delivery=Delivery(length, with_planes=False)))


@pytest.mark.parametrize("name", VAES)
def test_nothing_is_computed_twice(decoder, name):
    vae, latent = decoder(name), latent_of(5, 2, 3)
    counts = []
    for decode in (vae.decode, lambda *args, **noise: list(vae.stream(*args, **noise))):
        with FlopCounterMode(display=False) as counter:
            decode(latent, noise=noise_for(vae))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def peak_bytes(run):
    with LiveTensors() as live:
        run()
    return live.peak_bytes


@pytest.mark.parametrize("name", VAES)
def test_memory_does_not_grow_with_the_clip(decoder, name):
    vae = decoder(name)

    def drain(latent):
        for _ in vae.stream(latent, noise=noise_for(vae)):
            pass

    short, long = (latent_of(num_frames, 4, 4) for num_frames in (24, 48))
    grown_bytes = 3 * (long.nbytes - short.nbytes)
    assert peak_bytes(lambda: drain(long)) <= peak_bytes(lambda: drain(short)) + grown_bytes, (
        "but for the latent itself"
    )
    short_bytes, long_bytes = (peak_bytes(lambda z=z: vae.decode(z, noise=noise_for(vae))) for z in (short, long))
    assert long_bytes > 1.8 * short_bytes, "or nothing is counted"
    assert peak_bytes(lambda: drain(long)) < long_bytes / 6


def test_memory_grows_with_the_frames_of_a_convolution_and_not_with_the_clip(decoder):
    vae = decoder("nano")

    def drain(latent, size):
        for _ in in_manner(vae, frames_per_convolution=size).stream(latent):
            pass

    short, long = (latent_of(num_frames, 4, 4) for num_frames in (24, 48))
    one, two, eight = (peak_bytes(lambda n=n: drain(short, n)) for n in (1, 2, 8))
    assert one < two < eight
    assert peak_bytes(lambda: drain(long, 8)) <= eight + 3 * (long.nbytes - short.nbytes)


def test_memory_grows_with_the_chunk(decoder):
    vae, latent = decoder("nano"), latent_of(33, 4, 4)
    shape = render_shape(PixelShape(257, 128, 128, 24.0), 32)

    def drain(length):
        for _ in decode_frames(vae, latent, shape, delivery=Delivery(length)):
            pass

    one, two, sixteen = (peak_bytes(lambda n=n: drain(n)) for n in (1, 2, 16))
    assert one < two < sixteen
    a_frame_bytes = 3 * 128 * 128 * 4
    assert sixteen - one >= 15 * 8 * a_frame_bytes


def test_frames_come_before_the_clip_is_decoded(decoder):
    vae, latent = decoder("nano"), latent_of(40, 2, 2)
    with FlopCounterMode(display=False) as whole:
        vae.decode(latent)
    with FlopCounterMode(display=False) as first:
        next(vae.stream(latent))
    assert first.get_total_flops() < 0.5 * whole.get_total_flops()


def test_decoder_that_draws_noise_as_it_goes_cannot_stream_and_is_decoded_whole(fixtures, decoder):
    file = CheckpointFile(fixtures / "vae_ltx2_0" / "model.safetensors")
    vae = file.config["vae"]
    vae["decoder_blocks"][0][1]["inject_noise"] = True
    assert not can_stream(video_decoder_blueprint(vae).module)
    whole = decoder("vae_ltx2_0")
    whole.can_stream = False
    whole.stream = None
    frames = list(decode_frames(whole, latent_of(3, 2, 2), render_shape(PixelShape(17, 64, 64, 24.0), 32)))
    assert [chunk.num_frames for chunk in frames] == [16, 1]
