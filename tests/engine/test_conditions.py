"""Pictures that a clip is held to, against the reference's coordinates."""

from __future__ import annotations

import pytest
import torch

from pipeline.engine.conditions import HeldPicture, append_tokens, drop_appended, hold_to, num_appended_tokens
from pipeline.engine.latents import Tokens, patchify_video
from pipeline.geometry import LatentShape


@pytest.fixture(scope="module")
def coords(golden):
    return golden("coords/case_coords")


@pytest.mark.parametrize("index", [1, 2])
def test_trap_19_first_frame_and_appended_keyframe_are_the_references(coords, index):
    spec = coords.params["video"][index]
    given = spec["conditioning"]
    shape = LatentShape(spec["f"], spec["h"], spec["w"], 1, spec["fps"])
    picture = coords[f"in.video{index}.cond_latent"]
    frames = (0, given["keyframe_frame_idx"])
    strengths = (given["first_frame_strength"], given["keyframe_strength"])
    own = Tokens(patchify_video(coords[f"in.video{index}.latent"]), None)
    tokens = append_tokens(own, num_appended_tokens(frames, shape))
    hold = hold_to([HeldPicture(picture, *each) for each in zip(frames, strengths, strict=True)], tokens, shape)
    name = f"out.video{index}.conditioned"
    coords.assert_close(f"{name}.latent", tokens.video_BTC)
    coords.assert_close(f"{name}.denoise_mask", hold.mask_BT[..., None])
    batch = coords[f"{name}.positions"].shape[0]
    coords.assert_close(f"{name}.positions", hold.positions_B3T2.expand(batch, -1, -1, -1))
    # Where the mask is 1 the reference keeps the start, which blending never looks at.
    held = hold.mask_BT < 1
    assert torch.equal(hold.clean_BTC[held], coords[f"{name}.clean_latent"][held])
    assert torch.equal(drop_appended(tokens, shape).video_BTC, own.video_BTC)


def test_trap_16_blending_holds_tokens_by_their_mask(golden):
    case = golden("schedulers/case_steps")
    mask, clean = case["in.denoise_mask"], case["in.uncond_denoised"]
    hold = hold_to(
        [HeldPicture(torch.zeros(2, 5, 1, 1, 1), 0, 1.0)], Tokens(clean, None), LatentShape(7, 1, 1, 1, 24.0)
    )
    hold = type(hold)(clean, mask[..., 0], hold.positions_B3T2)
    case.assert_close("out.post_process", hold.blend(case["in.denoised"]))


SHAPE = LatentShape(3, 2, 2, 1, 24.0)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (HeldPicture(torch.zeros(1, 4, 1, 2, 2), 17, 1.0), "frame must be 0 to 16, got 17"),
        (HeldPicture(torch.zeros(1, 4, 1, 2, 3), 0, 1.0), r"must have \(1, 2, 2\) latents, got \(1, 2, 3\)"),
    ],
)
def test_picture_that_does_not_fit_the_clip_is_refused(picture, message):
    with pytest.raises(ValueError, match=message):
        hold_to([picture], Tokens(torch.zeros(1, 16, 4), None), SHAPE)


def test_no_pictures_hold_nothing():
    assert hold_to([], Tokens(torch.zeros(1, 12, 4), None), SHAPE) is None
