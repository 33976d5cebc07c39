"""Checkpoints are loaded whole or refused with one message that lists everything that is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kernels.ops import reference_ops
from pipeline.errors import CheckpointMismatch, UsageError
from pipeline.model.checkpoint import (
    DENOISER_PREFIX,
    CheckpointFile,
    build_on_meta,
    denoiser_names,
    denoiser_tensors,
    fill_module,
    load_denoiser,
    tensors_to_place,
)
from pipeline.model.denoiser import AudioVideoDenoiser
from pipeline.model.fitting import TensorSpec, differences
from pipeline.model.hparams import DenoiserHparams

Rewrite = Callable[[Callable[[dict[str, Tensor]], object]], Path]


@pytest.fixture
def published(fixtures: Path) -> Path:
    return fixtures / "dit_ltx2_0" / "model.safetensors"


@pytest.fixture
def rewritten(published: Path, tmp_path: Path) -> Rewrite:
    """Writes the published tiny model again after a change to its tensors."""

    def rewrite(change: Callable[[dict[str, Tensor]], object]) -> Path:
        tensors = load_file(published)
        change(tensors)
        path = tmp_path / "changed.safetensors"
        save_file(tensors, path, metadata={"config": json.dumps(CheckpointFile(published).config)})
        return path

    return rewrite


def load(path: Path) -> AudioVideoDenoiser:
    return load_denoiser(CheckpointFile(path), reference_ops(), "cpu")


def test_every_tensor_arrives_at_its_place_as_stored(published: Path) -> None:
    denoiser = load(published)
    stored = load_file(published)
    names = denoiser_names(denoiser.state_dict(), stored)
    state = denoiser.state_dict()
    assert len(names) == len(state) == len(stored)
    assert all(torch.equal(state[place], stored[name]) for name, place in names.items())
    assert not any(parameter.requires_grad for parameter in denoiser.parameters())
    assert not denoiser.training


def test_dtype_asked_for_is_the_dtype_of_every_weight(published: Path) -> None:
    denoiser = load_denoiser(CheckpointFile(published), reference_ops(), "cpu", torch.bfloat16)
    assert {parameter.dtype for parameter in denoiser.parameters()} == {torch.bfloat16}


def test_loaded_weights_do_not_depend_on_the_file_any_more(rewritten: Rewrite) -> None:
    path = rewritten(lambda tensors: None)
    denoiser = load(path)
    before = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\xff" * (path.stat().st_size // 2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in denoiser.state_dict().items())


def test_tensors_are_read_one_by_one_and_once_each(published: Path) -> None:
    reads: list[str] = []

    class Watched(CheckpointFile):
        def read(self, name: str, *how: Any) -> Tensor:
            reads.append(name)
            return super().read(name, *how)

    checkpoint = Watched(published)
    load_denoiser(checkpoint, reference_ops(), "cpu")
    assert sorted(reads) == sorted(checkpoint.tensor_specs())


def test_one_error_lists_absent_extra_and_misshapen_tensors(rewritten: Rewrite) -> None:
    block = DENOISER_PREFIX + "transformer_blocks.1."

    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[block + "attn1.to_q.weight"]
        del tensors[DENOISER_PREFIX + "audio_proj_out.bias"]
        tensors[block + "attn1.to_gate_logits.weight"] = torch.zeros(4, 64)
        tensors[block + "ff.net.2.bias"] = torch.zeros(63)

    path = rewritten(change)
    with pytest.raises(CheckpointMismatch) as caught:
        load(path)
    assert str(caught.value).splitlines() == [
        f"{path}: tensors of the denoiser must be exactly those of the model its metadata describes, "
        "got 4 differences; use the published file of this model",
        f"  missing: {DENOISER_PREFIX}audio_proj_out.bias",
        f"  missing: {block}attn1.to_q.weight",
        f"  unexpected: {block}attn1.to_gate_logits.weight",
        f"  wrong shape: {block}ff.net.2.bias must be [64], got [63]",
    ]


def test_long_lists_are_cut_but_counted_in_full(rewritten: Rewrite) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".attn1." in name or ".attn2." in name]:
            del tensors[name]

    with pytest.raises(CheckpointMismatch, match="got 40 differences") as caught:
        load(rewritten(change))
    assert str(caught.value).endswith("\n  and 20 more")
    assert str(caught.value).count("missing: ") == 20


def test_tensors_of_other_parts_are_none_of_the_denoisers_business(rewritten: Rewrite) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[DENOISER_PREFIX + "video_embeddings_connector.learnable_registers"] = torch.zeros(2, 2)
        tensors[DENOISER_PREFIX + "audio_embeddings_connector.learnable_registers"] = torch.zeros(2, 2)
        tensors["vae.encoder.conv_in.bias"] = torch.zeros(2)

    load(rewritten(change))


def test_absent_file_is_a_usage_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.safetensors: checkpoint must be an existing file"):
        CheckpointFile(tmp_path / "none.safetensors")
    with pytest.raises(UsageError, match="must be an existing file"):
        CheckpointFile(tmp_path)


@pytest.mark.parametrize("num_bytes", [0, 5, 5_000, -1])
def test_truncated_file_is_refused(num_bytes: int, published: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(published.read_bytes()[:num_bytes])
    with pytest.raises(
        CheckpointMismatch, match=r"cut\.safetensors: checkpoint must be a complete safetensors file, got"
    ):
        CheckpointFile(path)


def test_file_of_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "page.safetensors"
    path.write_text("<html>not found</html>" * 100)
    with pytest.raises(CheckpointMismatch, match="must be a complete safetensors file, got 2200 bytes"):
        CheckpointFile(path)


@pytest.mark.parametrize(
    ("metadata", "got"),
    [
        (None, r"got only \[\]"),
        ({"format": "pt"}, r"got only \['format'\]"),
        ({"config": "{"}, "not JSON"),
        ({"config": "[1]"}, "got a list"),
    ],
)
def test_metadata_without_a_configuration_is_refused(metadata: dict | None, got: str, tmp_path: Path) -> None:
    path = tmp_path / "bare.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata=metadata)
    with pytest.raises(CheckpointMismatch, match=got):
        CheckpointFile(path)


def test_checkpoint_without_a_denoiser_section_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "vae.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata={"config": '{"vae": {}}'})
    with pytest.raises(CheckpointMismatch, match=r"must have a section 'transformer', got \['vae'\]"):
        load(path)


DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn}


@pytest.mark.parametrize(
    ("name", "num_tensors", "num_parameters", "num_others"),
    [
        # Others under the denoiser's prefix: the text connectors.
        ("ltx-2-19b-dev", 3510, 18_876_174_592, 58),
        ("ltx-2-19b-dev-fp8", 3510, 18_876_174_592, 58),
        ("ltx-2.3-22b-dev", 4186, 18_988_838_144, 258),
        ("ltx-2.3-22b-dev-fp8", 4186, 18_988_838_144, 258),
        ("ltxv-13b-0.9.8-dev", 1215, 13_042_569_344, 0),
        ("ltxv-2b-0.9.8-distilled", 715, 1_923_385_472, 0),
    ],
)
def test_published_checkpoint_fits_name_by_name_and_shape_by_shape(
    name: str, num_tensors: int, num_parameters: int, num_others: int, fixtures: Path
) -> None:
    inventory = json.loads((fixtures / "inventory" / f"{name}.json").read_text())
    denoiser = build_on_meta(
        DenoiserHparams.from_config(inventory["metadata"]["config"]["transformer"]), reference_ops()
    )
    specs = {key: TensorSpec(tuple(shape), DTYPES[kind]) for key, (shape, kind) in inventory["tensors"].items()}
    specs = {key: spec for key, spec in specs.items() if key.startswith(DENOISER_PREFIX)}
    placed, places = tensors_to_place(specs), denoiser.state_dict()
    assert differences(places, specs, denoiser_names(places, placed)) == []
    assert len(placed) == len(places) == num_tensors
    assert len(specs) - len(denoiser_tensors(specs)) == num_others
    assert sum(tensor.numel() for tensor in places.values()) == num_parameters
    quantised = sum(spec.dtype == torch.float8_e4m3fn for spec in specs.values())
    assert len(denoiser_tensors(specs)) - len(placed) == 2 * quantised
    assert (quantised > 0) == name.endswith("fp8")


class Part(nn.Module):
    """A module such as a library might bring: a parameter, a counting buffer, a buffer that files do not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 3)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("window", torch.ones(4), persistent=False)


PART_NAMES = {"part.w": "inner.weight", "part.b": "inner.bias", "part.n": "count", "part.win": "window"}


@pytest.fixture
def part_file(tmp_path: Path) -> CheckpointFile:
    path = tmp_path / "part.safetensors"
    tensors = {
        "part.w": torch.randn(3, 2),
        "part.b": torch.randn(3),
        "part.n": torch.tensor(7),
        "part.win": torch.randn(4),
    }
    save_file(tensors, path, metadata={"config": "{}"})
    return CheckpointFile(path)


def meta_part() -> Part:
    with torch.device("meta"):
        return Part()


def test_any_module_can_be_filled_and_whole_numbers_keep_their_type(part_file: CheckpointFile) -> None:
    part = meta_part()
    fill_module(part, part_file, PART_NAMES, device="cpu", dtype=torch.float16, what="the part")
    assert torch.equal(part.inner.weight, part_file.read("part.w").half())
    assert part.count.dtype == torch.int64 and part.count.item() == 7
    assert part.window.dtype == torch.float16
    assert isinstance(part.inner.bias, nn.Parameter) and not part.inner.bias.requires_grad


def test_module_tensor_without_a_source_is_refused_even_if_it_is_not_in_the_state_dict(
    part_file: CheckpointFile,
) -> None:
    names = {"part.w": "inner.weight", "part.n": "count", "part.b": "nowhere"}
    part = meta_part()
    with pytest.raises(CheckpointMismatch) as caught:
        fill_module(part, part_file, names, device="cpu", dtype=None, what="the part")
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
        "missing: inner.bias",
        "missing: window",
        "unexpected: part.b",
    ]
    assert part.inner.weight.is_meta, "nothing is read before everything is known to fit"


def test_two_tensors_for_one_place_are_refused(part_file: CheckpointFile) -> None:
    names = PART_NAMES | {"part.b": "inner.bias", "part.win": "inner.bias"}
    with pytest.raises(CheckpointMismatch, match=r"missing: window\n  unexpected: part\.b\n"):
        fill_module(meta_part(), part_file, names, device="cpu", dtype=None, what="the part")


def test_reading_a_tensor_that_is_not_there_names_file_and_tensor(part_file: CheckpointFile) -> None:
    with pytest.raises(KeyError, match=r"part\.safetensors has no tensor part\.x"):
        part_file.read("part.x")
