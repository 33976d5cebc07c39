"""The golden data: small, unpacked faithfully, and used."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from tests import golden

TESTS = Path(__file__).parent
LARGEST_MB = 25


def test_fixtures_stay_small() -> None:
    size = sum(path.stat().st_size for path in golden.FIXTURES.rglob("*") if path.is_file())
    assert size < LARGEST_MB * 1e6


def test_every_golden_folder_is_read_by_a_test() -> None:
    sources = "".join(path.read_text() for path in TESTS.rglob("test_*.py") if path != Path(__file__))
    read = {name for name in golden.names() if re.search(rf"""["']{name}["'/]""", sources)}
    assert set(golden.names()) == read


def test_pack_gives_back_every_byte() -> None:
    drawn = golden.normals(7, 16, 64) * np.float32(0.5)
    drawn[::3] = np.nextafter(drawn[::3], np.float32(9))
    drawn[1::3] = np.nextafter(drawn[1::3], np.float32(-9))
    tensors = {
        "drawn": np.append(drawn, np.float32(3)),
        "half": np.arange(5, dtype=np.uint8),
        "long": np.array([-1, 2**40]),
        "plain": np.linspace(-1, 1, 10, dtype=np.float32),
    }
    files = {"a.safetensors": save(tensors, metadata={"config": '{"b": 1}'}), "b.json": b"{}"}
    pack = golden.encode(files, {"a.safetensors": {"drawn": [7, 16, 0.5]}})
    assert golden.decode(pack) == files


def test_drawn_numbers_are_torchs() -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(1234)
    torch.rand(5)
    np.testing.assert_allclose(golden.normals(1234, 5, 4096), torch.randn(4096).numpy(), rtol=0, atol=2e-6)


def test_folder_is_unpacked_when_it_is_first_named(tmp_path: Path) -> None:
    folders = golden.GoldenFolders(tmp_path)
    assert json.loads((folders / "inventory/ltx-2-19b-dev.json").read_text())["tensors"]
    assert (folders / "inventory" / "parts.json.gz").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["inventory"]


def test_unknown_folder_is_named_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="'dit' is not packed; there are audio_vae, coords"):
        golden.GoldenFolders(tmp_path) / "dit" / "model.safetensors"
