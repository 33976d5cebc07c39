"""Errors cross from worker processes to the driver, which decides by their class."""

from __future__ import annotations

import pickle

import pytest

from pipeline import errors

CLASSES = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.PipelineError)]


@pytest.mark.parametrize("cls", CLASSES)
def test_every_error_survives_pickling(cls: type[errors.PipelineError]) -> None:
    error = cls(("a; b", "c")) if cls is errors.InvalidRequest else cls("the reason")  # type: ignore[arg-type]
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is cls and str(copy) == str(error) and vars(copy) == vars(error)
    assert copy.exit_code == error.exit_code
