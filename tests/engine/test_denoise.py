"""The loop: what it asks of the denoiser at each step, and what it makes of the answers."""

from __future__ import annotations

import pytest
import torch

from pipeline.config.guidance import GuidanceConfig, StreamGuidance
from pipeline.config.recipe import StageConfig
from pipeline.engine.components.text import TextContext
from pipeline.engine.conditions import HeldPicture, hold_to
from pipeline.engine.denoise import Predictor, Scene, Texts, denoise, denoising
from pipeline.engine.latents import Tokens, seeded_noise
from pipeline.errors import EngineFault
from pipeline.geometry import LatentShape

SHAPE = LatentShape(2, 1, 2, 3, 24.0)
GUIDED = GuidanceConfig(
    video=StreamGuidance(cfg=3.0, stg=1.0, modality=3.0), audio=StreamGuidance(cfg=7.0), stg_blocks=[1]
)


class Recorder:
    """A denoiser that notes every call and answers with a multiple of its text, or with one number."""

    def __init__(self, value=None):
        self.value = value
        self.calls = []
        self.num_prepared = 0

    def prepare(self, video, audio):
        self.num_prepared += 1
        return "prepared"

    def __call__(self, video, audio, conditioning, perturbations):
        assert conditioning == "prepared"
        self.calls.append((video, audio, perturbations))
        return tuple(
            torch.full_like(s.tokens_BTC, self.value)
            if self.value is not None
            else s.text_BSD.mean(dim=(1, 2))[:, None, None] * s.tokens_BTC
            for s in (video, audio)
        )

    @property
    def sigmas(self):
        return [float(video.sigma_B[0]) for video, _, _ in self.calls]


@pytest.fixture
def start():
    return Tokens(torch.ones(1, 4, 4), torch.ones(1, 3, 5))


@pytest.fixture
def scene():
    positive, negative = (TextContext(torch.full((1, 8, 8), x), torch.full((1, 8, 8), -x)) for x in (0.5, 0.25))
    return Scene(SHAPE, Texts(positive, negative))


def no_noise(shape):
    raise AssertionError("Euler draws no noise")


def run(denoiser, start, scene, stage):
    return denoise(denoiser, start, scene, stage, no_noise)


def test_last_step_ends_at_the_predicted_clean_tokens(start, scene):
    stage = StageConfig(sigmas=[1.0, 0.5, 0.0])
    last = list(denoising(Recorder(0.5), start, scene, stage, no_noise))[-1]
    torch.testing.assert_close(last.state.video_BTC, last.clean.video_BTC)
    # A constant velocity moves by itself times the whole way, however the way is cut into steps.
    torch.testing.assert_close(last.state.audio_BTC, start.audio_BTC - 0.5)


def test_denoiser_is_asked_once_a_step_and_prepared_once_a_stage(start, scene):
    denoiser = Recorder(0.0)
    run(denoiser, start, scene, StageConfig(sigmas=[1.0, 0.75, 0.25, 0.0]))
    assert denoiser.sigmas == [1.0, 0.75, 0.25]
    assert denoiser.num_prepared == 1
    for video, audio, perturbations in denoiser.calls:
        assert perturbations is None
        assert video.text_mask_BS is None and audio.text_mask_BS is None
        assert video.timesteps.index_BT is None and float(video.timesteps.values_BK) == float(video.sigma_B)


def test_all_predictions_of_a_step_are_one_call_with_a_sample_each(start, scene):
    denoiser = Recorder(0.0)
    run(denoiser, start, scene, StageConfig(sigmas=[1.0, 0.5, 0.0], guidance=[GUIDED]))
    assert denoiser.num_prepared == 1 and len(denoiser.calls) == 2
    video, audio, perturbations = denoiser.calls[0]
    assert video.text_BSD[:, 0, 0].tolist() == [0.5, 0.25, 0.5, 0.5]
    assert audio.text_BSD[:, 0, 0].tolist() == [-0.5, -0.25, -0.5, -0.5]
    assert video.tokens_BTC.shape == (4, 4, 4) and video.sigma_B.tolist() == [1.0] * 4
    assert [sorted(p.video_self_attention | p.audio_self_attention) for p in perturbations] == [[], [], [1], []]
    assert [p.isolate_streams for p in perturbations] == [False, False, False, True]


def test_predictions_one_by_one_share_what_the_prompts_share(start, scene):
    denoiser = Recorder(0.0)
    run(denoiser, start, scene, StageConfig(sigmas=[1.0, 0.5, 0.0], guidance=[GUIDED], batch_passes=False))
    assert [len(video.sigma_B) for video, _, _ in denoiser.calls] == [1] * 8
    assert denoiser.num_prepared == 2, "once for each of the two prompts"


def test_velocities_count_wherever_they_were_computed(start, scene):
    denoiser, asked = Recorder(0.0), []

    def spread(names, compute):
        asked.append(tuple(names))
        computed = compute(names[:2])
        return computed + [(torch.ones_like(video), torch.ones_like(audio)) for video, audio in computed]

    end = denoise(
        denoiser, start, scene, StageConfig(sigmas=[1.0, 0.5, 0.0], guidance=[GUIDED]), no_noise, spread=spread
    )
    assert asked == [("positive", "negative", "perturbed", "isolated")] * 2
    assert [video.text_BSD[:, 0, 0].tolist() for video, _, _ in denoiser.calls] == [[0.5, 0.25]] * 2
    # Perturbed and isolated velocities of 1 push clean latents up by 1 + 2 times the level.
    torch.testing.assert_close(end.video_BTC, start.video_BTC + 3)


def test_void_predictions_are_not_computed_at_the_levels_where_they_are_void(start, scene):
    denoiser = Recorder(0.0)
    guidance = [
        GuidanceConfig(down_to=1.0),
        GuidanceConfig(down_to=0.5, video=StreamGuidance(cfg=3.0)),
        GuidanceConfig(down_to=0.0, video=StreamGuidance(cfg=3.0, stg=1.0), stg_blocks=[0]),
    ]
    stage = StageConfig(sigmas=[1.0, 0.5, 0.25, 0.0], guidance=guidance)
    run(denoiser, start, scene, stage)
    counts = [len(video.sigma_B) for video, _, _ in denoiser.calls]
    assert counts == [1, 2, 3]
    assert sum(counts) == stage.num_samples(SHAPE.num_video_tokens, has_audio=True), "what the planner counts"


def test_a_level_that_float32_rounds_down_is_still_at_its_own_bound(start, scene):
    """0.9094 is 0.90939999 in float32: the step of that level had the guidance of the levels below."""
    denoiser = Recorder(0.0)
    guidance = [GuidanceConfig(down_to=0.9094, video=StreamGuidance(cfg=3.0)), GuidanceConfig()]
    stage = StageConfig(sigmas=[1.0, 0.9094, 0.5, 0.0], guidance=guidance)
    run(denoiser, start, scene, stage)
    assert [len(video.sigma_B) for video, _, _ in denoiser.calls] == [2, 2, 1]
    assert stage.num_samples(SHAPE.num_video_tokens, has_audio=True) == 5, "what the planner counts"


def test_the_planner_counts_the_second_looks_of_res_2s(start, scene):
    denoiser = Recorder(0.0)
    stage = StageConfig(sigmas=[1.0, 0.5, 0.0], sampler="res_2s", guidance=[GUIDED])
    denoise(denoiser, start, scene, stage, seeded_noise(1))
    assert len(denoiser.calls) == 5
    assert stage.num_samples(SHAPE.num_video_tokens, has_audio=True) == 4 * 5


def test_trap_14_guidance_acts_on_clean_latents_or_velocities_as_the_family_does(start, scene):
    guidance = [GuidanceConfig(video=StreamGuidance(cfg=3.0, rescale=1.0))]
    cleans = {}
    for family in ("ltx2", "ltx_video"):
        tokens = Tokens(torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(1)), start.audio_BTC)
        stage = StageConfig(sigmas=[0.5, 0.0], guidance=guidance, family=family)
        predicted = Predictor(Recorder(), scene, stage).predict(tokens, 0.5).clean.video_BTC
        cleans[family] = (predicted / tokens.video_BTC).mean()
    # The recorder's velocities are 0.5 x and 0.25 x, guided by 3 to x and rescaled to 0.5 x; the clean latents
    # 0.75 x and 0.875 x, guided to 0.5 x and rescaled to 0.75 x.
    assert float(cleans["ltx_video"]) == pytest.approx(1 - 0.5 * 0.5)
    assert float(cleans["ltx2"]) == pytest.approx(0.75)


@pytest.fixture
def held_scene(scene, start):
    """The first latent frame is held to 7: exactly, or by 0.6."""

    def build(strength):
        picture = HeldPicture(torch.full((1, 4, 1, 1, 2), 7.0), 0, strength)
        return Scene(SHAPE, scene.texts, hold_to([picture], start, SHAPE))

    return build


def test_trap_16_held_tokens_have_timestep_0_and_their_clean_latent_at_every_step(start, held_scene):
    denoiser, scene = Recorder(1.0), held_scene(1.0)
    begin = Tokens(scene.hold.blend(start.video_BTC), start.audio_BTC)
    for step in denoising(denoiser, begin, scene, StageConfig(sigmas=[1.0, 0.5, 0.0]), no_noise):
        assert (step.state.video_BTC[:, :2] == 7).all() and (step.clean.video_BTC[:, :2] == 7).all()
    assert [video.timesteps.per_token(4)[0].tolist() for video, _, _ in denoiser.calls] == [
        [0.0, 0.0, 1.0, 1.0],
        [0.0, 0.0, 0.5, 0.5],
    ]
    torch.testing.assert_close(step.state.video_BTC[:, 2:], start.video_BTC[:, 2:] - 1)


def test_a_partly_held_token_has_its_share_of_the_level_in_ltx_2(start, held_scene):
    denoiser, scene = Recorder(1.0), held_scene(0.6)
    predictor = Predictor(denoiser, scene, StageConfig(sigmas=[0.5, 0.0]))
    clean = predictor.predict(start, 0.5).clean.video_BTC
    assert denoiser.calls[0][0].timesteps.per_token(4)[0].tolist() == pytest.approx([0.2, 0.2, 0.5, 0.5])
    assert clean[0, :, 0].tolist() == pytest.approx([7 * 0.6 + 0.8 * 0.4] * 2 + [0.5] * 2)


def test_trap_28_a_partly_held_token_of_ltx_video_stands_still_until_the_level_is_its_own(start, held_scene):
    denoiser, scene = Recorder(1.0), held_scene(0.6)
    stage = StageConfig(sigmas=[0.8, 0.4, 0.2, 0.0], family="ltx_video")
    states = [step.state.video_BTC[0, :, 0] for step in denoising(denoiser, start, scene, stage, no_noise)]
    assert [video.timesteps.per_token(4)[0].tolist() for video, _, _ in denoiser.calls] == [
        pytest.approx([0.4, 0.4, 0.8, 0.8]), pytest.approx([0.4] * 4), pytest.approx([0.2] * 4)
    ]  # fmt: skip
    assert states[0].tolist() == pytest.approx([1.0, 1.0, 0.6, 0.6])
    assert states[2].tolist() == pytest.approx([0.6, 0.6, 0.2, 0.2])


def test_state_stays_in_float32_when_the_denoiser_answers_in_bfloat16(start, scene):
    class Rounded(Recorder):
        def __call__(self, *given):
            return tuple(v.bfloat16() for v in super().__call__(*given))

    state = run(Rounded(0.1), start, scene, StageConfig(sigmas=[1.0, 0.5, 0.0]))
    assert state.video_BTC.dtype == state.audio_BTC.dtype == torch.float32


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_are_a_fault(start, scene, value):
    with pytest.raises(EngineFault, match="video latents"):
        run(Recorder(value), start, scene, StageConfig(sigmas=[1.0, 0.0]))
