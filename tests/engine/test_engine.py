"""The engine on the nano model: what it renders, what it reports, what it refuses."""

from __future__ import annotations

import dataclasses
import json
import logging

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels.ops import reference_ops
from pipeline.config.guidance import GuidanceConfig, StreamGuidance
from pipeline.config.model import PrecisionConfig
from pipeline.config.recipe import RecipeConfig, StageConfig
from pipeline.engine import loading, text
from pipeline.engine.components.upsampler import compress_range
from pipeline.engine.decode import CHUNK_LATENT_FRAMES
from pipeline.engine.loading import MemoryBudget, load_engine
from pipeline.engine.memory import RESERVED_BYTES
from pipeline.errors import CheckpointMismatch, EngineFault, OutOfMemory, UsageError
from pipeline.model.checkpoint import CheckpointFile
from tests.engine.pictures import planes_of, rgb_of


def _ignore(stage):
    pass


def _render(engine, recipe, request):
    streams = engine.render(request, recipe, _ignore)
    return planes_of(streams.frames), streams.waveform


def test_clip_has_the_asked_frames_size_and_sound(engine, recipe, request_for):
    request = request_for(width=128, height=64, num_frames=25)
    streams = engine.render(request, recipe, _ignore)
    chunks = list(streams.frames)
    assert [chunk.num_frames for chunk in chunks] == [8 * CHUNK_LATENT_FRAMES, 25 - 8 * CHUNK_LATENT_FRAMES]
    assert all((chunk.height, chunk.width, chunk.planes.dtype) == (64, 128, np.uint8) for chunk in chunks)
    assert all(chunk.planes.flags["C_CONTIGUOUS"] for chunk in chunks)
    num_audio_latents, samples_per_mel_frame = 26, 240
    assert streams.waveform.shape == (2, (4 * num_audio_latents - 3) * samples_per_mel_frame)
    assert streams.waveform.dtype == np.float32
    assert streams.sample_rate_hz == 24000


def test_size_off_the_grid_is_the_middle_of_the_next_size_on_it(engine, recipe, request_for):
    clips = [
        engine.render(request_for(width=width, height=height), recipe, _ignore)
        for width, height in ((128, 128), (100, 66))
    ]
    whole, cropped = (rgb_of(engine, clip) for clip in clips)
    assert np.array_equal(cropped, whole[:, 31 : 31 + 66, 14 : 14 + 100])
    assert np.array_equal(clips[0].waveform, clips[1].waveform)


def test_same_request_renders_the_same_bytes_also_after_others(engine, recipe, request_for):
    first, first_sound = _render(engine, recipe, request_for())
    _render(engine, recipe, request_for(prompt="waves", seed=5, width=128))
    again, again_sound = _render(engine, recipe, request_for())
    assert np.array_equal(first, again)
    assert np.array_equal(first_sound, again_sound)


def test_freshly_loaded_engine_renders_the_same_bytes(nano_model, load, recipe, request_for):
    (frames, sound), (other_frames, other_sound) = (_render(load(nano_model), recipe, request_for()) for _ in range(2))
    assert np.array_equal(frames, other_frames)
    assert np.array_equal(sound, other_sound)


@pytest.mark.parametrize("change", [{"seed": 2}, {"prompt": "waves crash on black rocks"}, {"fps": 12.0}])
def test_seed_prompt_and_rate_each_change_the_picture(engine, recipe, request_for, change):
    frames, sound = _render(engine, recipe, request_for())
    other, other_sound = _render(engine, recipe, request_for(**change))
    assert np.abs(frames.astype(int) - other.astype(int)).mean() > 2
    assert sound.shape != other_sound.shape or np.abs(sound - other_sound).max() > 0.01


def test_stages_are_reported_as_they_begin(engine, recipe, request_for):
    begun = []
    streams = engine.render(request_for(), recipe, begun.append)
    expected = ["text_encode", "denoise", "upsample", "denoise", "decode"]
    assert begun == expected
    list(streams.frames)
    assert begun == expected


def test_nothing_is_decoded_before_the_first_chunk_is_taken(engine, recipe, request_for):
    class Watched:
        takes_noise, can_stream, ops = False, False, reference_ops()
        calls = 0

        def decode(self, latent, **_):
            Watched.calls += 1
            return engine.video_decoder.decode(latent)

    streams = dataclasses.replace(engine, video_decoder=Watched()).render(request_for(), recipe, _ignore)
    assert Watched.calls == 0
    next(streams.frames)
    assert Watched.calls == 1


def test_recipe_of_one_stage_never_upsamples(engine, request_for):
    begun = []
    one_stage = RecipeConfig(name="one", stages=[StageConfig(sigmas=[1.0, 0.5, 0.0])])
    streams = dataclasses.replace(engine, upsampler=None).render(
        request_for(width=96, grid_px=32), one_stage, begun.append
    )
    assert begun == ["text_encode", "denoise", "decode"]
    frames = next(streams.frames)
    assert (frames.num_frames, frames.height, frames.width) == (9, 64, 96)


def test_second_stage_at_the_same_size_starts_from_the_first(engine, request_for):
    begun = []
    stages = [StageConfig(sigmas=[1.0, 0.5, 0.0]), StageConfig(sigmas=[0.5, 0.0])]
    engine.render(request_for(), RecipeConfig(name="again", stages=stages), begun.append)
    assert begun == ["text_encode", "denoise", "denoise", "decode"]


def test_recipe_that_upsamples_needs_an_upscaler(engine, recipe, request_for):
    with pytest.raises(UsageError, match=r"needs model\.spatial_upscaler"):
        dataclasses.replace(engine, upsampler=None).render(request_for(), recipe, _ignore)


def test_perturbed_blocks_the_model_does_not_have_are_refused(engine, request_for):
    guidance = [GuidanceConfig(video=StreamGuidance(stg=1.0), stg_blocks=[1, 2])]
    recipe = RecipeConfig(name="deep", stages=[StageConfig(sigmas=[1.0, 0.0], guidance=guidance)])
    with pytest.raises(UsageError, match=r"must be blocks of the model, 0 to 1, got \[1, 2\]; correct recipe deep"):
        engine.render(request_for(), recipe, _ignore)


def test_frames_of_a_small_stage_are_enlarged_to_the_asked_size(engine, request_for):
    small = RecipeConfig(name="draft", resize=True, stages=[StageConfig(0.5, sigmas=[1.0, 0.5, 0.0])])
    whole = RecipeConfig(name="whole", stages=[StageConfig(sigmas=[1.0, 0.5, 0.0])])
    half, _ = _render(engine, whole, request_for(width=128, height=64))
    frames, _ = _render(engine, small, request_for(width=254, height=128))
    assert frames.shape == (9, 128 * 3 // 2, 254)
    # Enlarging twofold keeps the mean, but for the two columns that are cropped.
    assert frames[:, :128].mean() == pytest.approx(half[:, :64].mean(), abs=1)


def test_negative_prompt_is_encoded_only_where_it_makes_a_difference(engine, request_for):
    asked = []

    class Counting:
        def encode(self, prompts):
            asked.extend(prompts)
            return encoder.encode(prompts)

    encoder = engine.text._encoder
    engine.text._encoder = Counting()
    for cfg, expected in ((1.0, ["a"]), (2.0, ["b", "no fog"]), (2.0, ["c"])):
        guidance = [GuidanceConfig(video=StreamGuidance(cfg=cfg))]
        stage = StageConfig(sigmas=[1.0, 0.0], guidance=guidance)
        asked.clear()
        recipe = RecipeConfig(name="r", negative_prompt="no fog", stages=[stage])
        engine.render(request_for(prompt=expected[0]), recipe, _ignore)
        assert asked == expected


class _Fusions:
    """Notes which adapters are asked for, stage by stage."""

    def __init__(self):
        self.asked = []

    def use(self, adapters):
        self.asked.append(list(adapters))


def test_predictions_of_every_step_go_through_the_spread_of_the_engine(engine, recipe, request_for):
    asked = []

    def spread(names, compute):
        asked.append(tuple(names))
        return compute(names)

    dataclasses.replace(engine, spread=spread).render(request_for(), recipe, _ignore)
    assert asked == [("positive",)] * (8 + 3)


def test_each_stage_has_the_clips_adapters_and_its_own(engine, recipe, request_for):
    fused = _Fusions()
    recipe.stages[1].adapter = "distilled"
    other = dataclasses.replace(engine, fused=fused, adapter_files={"distilled": "d.safetensors"})
    other.render(request_for(), recipe, _ignore, adapters=[("camera.safetensors", 0.8)])
    camera = ("camera.safetensors", 0.8)
    assert fused.asked == [[camera], [camera, ("d.safetensors", 1.0)]]


def test_a_fused_adapter_changes_the_clip_and_the_next_one_is_rendered_without_it(
    engine, recipe, request_for, tmp_path
):
    name = "diffusion_model.transformer_blocks.0.attn1.to_q"
    factors = {"A": torch.full((2, 64), 0.3), "B": torch.full((64, 2), 0.3)}
    path = tmp_path / "adapter.safetensors"
    save_file({f"{name}.lora_{factor}.weight": tensor for factor, tensor in factors.items()}, path)
    plain, _ = _render(engine, recipe, request_for())
    recipe.stages[1].adapter = "distilled"
    adapted, _ = _render(dataclasses.replace(engine, adapter_files={"distilled": str(path)}), recipe, request_for())
    recipe.stages[1].adapter = ""
    again, _ = _render(engine, recipe, request_for())
    assert not np.array_equal(plain, adapted)
    assert np.array_equal(plain, again)


def test_adapter_the_model_has_not_is_refused(engine, recipe, request_for):
    recipe.stages[1].adapter = "styled"
    with pytest.raises(UsageError, match=r"needs model\.adapters\.styled, got \['distilled'\]"):
        engine.render(request_for(), recipe, _ignore)


def test_enhanced_prompt_is_what_is_encoded_and_what_is_told(engine, recipe, request_for):
    request = request_for(prompt="a boat")
    request = dataclasses.replace(request, wishes=dataclasses.replace(request.wishes, enhance_prompt=True))
    written, again = (engine.render(request, recipe, _ignore) for _ in range(2))
    assert written.prompt == again.prompt != "a boat"
    as_written = engine.render(request_for(prompt=written.prompt, seed=request.seed), recipe, _ignore)
    assert np.array_equal(written.waveform, as_written.waveform) and as_written.prompt == written.prompt


def test_parts_that_wait_on_the_host_give_the_same_clip(nano_model, recipe, request_for):
    """The budget of a device that holds one large part at a time."""
    parts = {"text_encode": 0, "denoise": 0, "upsample": 0, "decode": 0}
    engines = []
    for limit_bytes in (10**12, RESERVED_BYTES + 7_200_000):
        budget = MemoryBudget(limit_bytes, [parts])
        engines.append(load_engine(nano_model, PrecisionConfig(), device="cpu", ops=reference_ops(), budget=budget))
    free, tight = engines
    assert not free.residency.waiting and tight.residency.waiting
    full = dataclasses.replace(recipe.stages[1], adapter="distilled")
    recipe.stages[1] = full
    for _ in range(2):  # the second clip finds the adapter of the first one's last stage in its weights
        clips = [engine.render(request_for(), recipe, _ignore) for engine in engines]
        frames = [planes_of(clip.frames) for clip in clips]
        assert np.array_equal(*frames) and np.array_equal(clips[0].waveform, clips[1].waveform)


def test_recipe_of_another_family_is_refused(engine, request_for):
    recipe = RecipeConfig(name="v", stages=[StageConfig(sigmas=[1.0, 0.0], family="ltx_video")])
    with pytest.raises(UsageError, match="recipe v is for models of family ltx_video, this one is ltx2"):
        engine.render(request_for(), recipe, _ignore)


def test_tone_mapping_of_a_recipe_compresses_what_is_decoded(engine, recipe, request_for):
    recipe.decode.tone_map = 0.6
    decoded = []

    class Noting:
        takes_noise, can_stream, ops = False, False, reference_ops()

        def decode(self, latent, **_):
            decoded.append(latent)
            return engine.video_decoder.decode(latent)

    noting = dataclasses.replace(engine, video_decoder=Noting())
    for strength in (0.0, 0.6):
        recipe.decode.tone_map = strength
        _render(noting, recipe, request_for())
    assert torch.equal(decoded[1], compress_range(decoded[0], compression=0.6))


def test_unknown_sampler_is_refused_before_anything_is_computed(engine, recipe, request_for):
    recipe.stages[1].sampler = "heun"
    begun = []
    with pytest.raises(UsageError, match="euler"):
        engine.render(request_for(), recipe, begun.append)
    assert begun == []


def test_single_frame_at_a_rate_that_leaves_no_sound_still_renders(engine, recipe, request_for):
    frames, sound = _render(engine, recipe, request_for(num_frames=1, fps=60.0))
    assert frames.shape == (1, 96, 64)
    assert sound.shape == (2, 240)


class _Fails:
    takes_noise, can_stream, ops = False, False, reference_ops()

    def __init__(self, error):
        self.error = error

    def encode_all(self, *prompts):
        raise self.error

    def decode(self, latent, **_):
        raise self.error


def test_exhausted_memory_is_reported_with_what_was_asked(engine, recipe, request_for):
    full = _Fails(torch.OutOfMemoryError("tried to allocate 80 GiB\nmore"))
    request = request_for(width=100)
    with pytest.raises(OutOfMemory, match=r"128x64, 9 frames does not fit the device: tried to allocate 80 GiB$"):
        dataclasses.replace(engine, text=full).render(request, recipe, _ignore)
    streams = dataclasses.replace(engine, video_decoder=full).render(request, recipe, _ignore)
    with pytest.raises(OutOfMemory, match="128x64, 9 frames"):
        next(streams.frames)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (torch.full((1, 3, 9, 64, 64), float("nan")), "not finite"),
        (torch.zeros(1, 3, 8, 64, 64), "gave 8 frames, expected 9"),
        (torch.zeros(1, 3, 10, 64, 64), r"up to frame 10, expected \(3, 9, 64, 64\)"),
        (torch.zeros(1, 3, 9, 64, 32), r"gave \(3, 9, 64, 32\) values"),
    ],
)
def test_decoder_that_gives_nonsense_is_a_fault(engine, recipe, request_for, video, message):
    class Wrong:
        takes_noise, can_stream, ops = False, False, reference_ops()

        def decode(self, latent, **_):
            return video

    streams = dataclasses.replace(engine, video_decoder=Wrong()).render(request_for(), recipe, _ignore)
    with pytest.raises(EngineFault, match=message):
        list(streams.frames)


def test_value_between_two_bytes_becomes_the_nearer_one(engine, recipe, request_for):
    class Grey:
        takes_noise, can_stream, ops = False, False, reference_ops()

        def decode(self, latent, **_):
            return torch.full((1, 3, 9, 64, 64), 0.3)

    streams = dataclasses.replace(engine, video_decoder=Grey()).render(request_for(), recipe, _ignore)
    frames = next(streams.frames)
    assert (frames.y == 158).all(), "16 + 219 * 0.65 is 158.35"
    assert (frames.u == 128).all() and (frames.v == 128).all()


def test_prompt_seen_before_is_not_encoded_again(engine, monkeypatch):
    monkeypatch.setattr(text, "NUM_CACHED_PROMPTS", 8)
    asked = []

    class Counting:
        def encode(self, prompts):
            asked.extend(prompts)
            return encoder.encode(prompts)

    encoder = engine.text._encoder
    engine.text._encoder = Counting()
    for prompt in ["a", "b", "a", *"cdefgh", "a", "i", "a", "b"]:
        engine.text.encode(prompt)
    # With eight prompts kept, "i" pushes out the one unused for longest, which is "b".
    assert asked == [*"abcdefghi", "b"]


def test_loading_says_how_long_it_took_and_sets_the_threads(nano_model, load, caplog):
    with caplog.at_level(logging.INFO, logger="pipeline.engine"):
        load(nano_model, torch_threads=2)
    assert torch.get_num_threads() == 2
    facts = caplog.records[-1].facts
    assert facts["load_s"] >= facts["text_encoder_s"] > 0
    assert facts["device"] == "cpu"


def test_denoiser_follows_the_models_rule_for_the_streams_timesteps(nano_model, load):
    nano_model.exchange_timesteps = "first"
    assert load(nano_model).denoiser.hparams.exchange_timesteps == "first"


def test_sizes_that_disagree_with_the_checkpoint_are_refused_together(nano_model, load):
    nano_model.size.num_layers, nano_model.size.audio_width = 48, 2048
    with pytest.raises(UsageError) as refusal:
        load(nano_model)
    assert "num_layers must be 2, got 48" in str(refusal.value)
    assert "audio_width must be 32, got 2048" in str(refusal.value)
    assert "video_width" not in str(refusal.value)


@pytest.mark.parametrize("name", ["checkpoint", "text_encoder", "spatial_upscaler"])
def test_missing_file_of_a_model_is_refused_by_name(nano_model, load, name):
    setattr(nano_model, name, "not-there")
    with pytest.raises(UsageError, match="not-there"):
        load(nano_model)


def test_absolute_paths_need_no_folder(nano_model, nano_folder, load):
    for name in ("checkpoint", "text_encoder", "spatial_upscaler"):
        setattr(nano_model, name, str(nano_folder / getattr(nano_model, name)))
    nano_model.folder = "/nowhere"
    load(nano_model)


def test_bfloat16_is_used_throughout_but_for_the_vocoder(nano_model, load, recipe, request_for):
    engine = load(nano_model, dtype="bfloat16")
    assert {p.dtype for p in engine.denoiser.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in engine.vocoder._module.parameters()} == {torch.float32}
    frames, sound = _render(engine, recipe, request_for())
    exact, _ = _render(load(nano_model), recipe, request_for())
    assert np.isfinite(sound).all()
    assert np.abs(frames.astype(int) - exact.astype(int)).mean() < 20


@pytest.fixture
def changed_checkpoint(nano_model, tmp_path):
    """Points the model at a copy of its checkpoint after `change(tensors)`."""

    def apply(change):
        source = CheckpointFile(f"{nano_model.folder}/{nano_model.checkpoint}")
        tensors = load_file(source.path)
        change(tensors)
        path = tmp_path / "changed.safetensors"
        save_file(tensors, path, {"config": json.dumps(source.config)})
        nano_model.checkpoint = str(path)
        return nano_model

    return apply


@pytest.mark.parametrize("name", ["vae.decoder.extra", "surprise.weight", "model.diffusion_model.extra.weight"])
def test_tensor_that_no_part_owns_is_refused(changed_checkpoint, load, name):
    model = changed_checkpoint(lambda tensors: tensors.update({name: torch.zeros(1)}))
    with pytest.raises(CheckpointMismatch, match=name):
        load(model)


def test_statistics_that_no_code_reads_are_no_reason_to_refuse(changed_checkpoint, load):
    unread = ("channel", "mean-of-stds", "mean-of-stds_over_std-of-means")
    names = [f"vae.per_channel_statistics.{name}" for name in unread]
    load(changed_checkpoint(lambda tensors: tensors.update({name: torch.zeros(16) for name in names})))


@pytest.mark.parametrize(
    ("precision", "device", "capability", "message"),
    [
        ({}, "cpu", None, "must leave one of the 2 blocks of nano to fp8, got 3 and 3; use smaller ones"),
        (
            {"keep_last_blocks": 0, "keep_first_blocks": 1},
            "cuda",
            (8, 6),
            "exact on a GPU below compute capability 8.9",
        ),
        (
            {"keep_last_blocks": 0, "keep_first_blocks": 1},
            "cuda",
            (9, 0),
            "precision.dtype must be bfloat16 with fp8 on a GPU, got checkpoint with weights of torch.float32",
        ),
    ],
)
def test_fp8_that_cannot_be_is_refused_before_weights_are_read(
    nano_model, monkeypatch, precision, device, capability, message
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(loading, "load_text_encoder", None)
    with pytest.raises(UsageError) as caught:
        settings = PrecisionConfig(linear="fp8", **precision)
        loading.load_engine(nano_model, settings, device=device, ops=reference_ops())
    assert message in str(caught.value)


def test_fp8_of_one_block_renders_another_clip(nano_model, load, recipe, request_for):
    in_8_bits = load(nano_model, linear="fp8", keep_first_blocks=1, keep_last_blocks=0)
    assert not np.array_equal(_render(in_8_bits, recipe, request_for())[0],
                              _render(load(nano_model), recipe, request_for())[0])  # fmt: skip
