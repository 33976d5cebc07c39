"""The one entry of all jobs: command line to typed configuration, errors to exit codes.

Hydra's compose API instead of `@hydra.main`, which ends every composition error with exit 1, makes an `outputs/`
folder at each call and cannot take a path with `=` in it. Values of path keys are taken verbatim.
"""

from __future__ import annotations

import csv
import difflib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from pipeline.config.jobs import BenchJob, RenderJob, ReportJob, StageWeightsJob, SubmitJob
from pipeline.config.recipe import RecipeConfig, Recipes
from pipeline.config.tree import from_tree, leaf_keys, set_verbatim, yaml_text
from pipeline.errors import PipelineError, UsageError
from pipeline.telemetry import log_to_stderr

CONF = Path(__file__).resolve().parent.parent / "conf"
# Taken as they stand, outside Hydra's grammar: paths, and names that only look like numbers.
VERBATIM_KEYS = (
    "manifest", "output", "report", "run", "ids", "run_id",
    "model.folder", "model.checkpoint", "model.text_encoder", "model.spatial_upscaler",
    "address", "submission_id", "folder", "results",
)  # fmt: skip
VERBATIM_GROUPS = ("model.sources.", "model.adapters.", "model.cameras.")
FLAGS = ("--help", "-h", "--cfg")
T = TypeVar("T")
EXIT_BUG = 1
EXIT_USAGE = 2


def compose_job(schema: type[T], name: str, argv: list[str]) -> T:
    """The job `name` as an object of `schema`, from `conf/<name>.yaml` and the overrides in `argv`.

    Raises UsageError, in one line, for whatever cannot be composed. `--help` and `--cfg` print and exit 0.
    """
    with _Hydra(schema):
        _check_keys(name, _settings(argv))
        return _composed(schema, name, argv)


def compose_recipes(name: str, argv: list[str]) -> Recipes:
    """Every recipe of `conf/recipe/` by its name: rows may name another than the job's.

    Under the overrides of a job that was composed before, so the job's own recipe takes them; one that does not is
    unusable in this job. Raises UsageError for a file that is no recipe. Hydra composes once, and each recipe that has
    `defaults`: with each of the others anew it would take a second.
    """
    settings = [argument for argument in _settings(argv) if not _is_verbatim(argument.partition("=")[0])]
    changes = OverridesParser.create().parse_overrides([each for each in settings if each.startswith("recipe.")])
    if any(change.key_or_group == "recipe.name" for change in changes):
        raise UsageError("recipe.name must be left alone, got another one; write a file of that name in conf/recipe/")
    settings = [argument for argument in settings if not argument.startswith("recipe.")]
    recipes = Recipes({}, {})
    with _Hydra(RenderJob):
        tree = _tree(name, settings)
        for member in _members("recipe"):
            tree.recipe = _recipe_tree(name, member, settings)
            try:
                for change in changes:
                    OmegaConf.update(tree, change.key_or_group, change.value())
                recipe = from_tree(tree.recipe)
            except (UsageError, OmegaConfBaseException) as error:
                recipes.unusable[member] = str(error).splitlines()[0]
                continue
            assert isinstance(recipe, RecipeConfig)
            recipes.usable[member] = recipe
    return recipes


def run_job(main: Callable[[list[str]], int]) -> None:
    """Run a job's `main` on the command line and end the process with its exit code."""
    try:
        code = main(sys.argv[1:])
    except PipelineError as error:
        with suppress(OSError):
            sys.stderr.write(f"error: {error}\n")
        code = error.exit_code
    except BrokenPipeError:
        code = 0  # whoever read the text has seen enough of it (`| head`)
    except Exception:  # noqa: BLE001 - the contract's exit code for a bug, with its traceback
        traceback.print_exc()
        code = EXIT_BUG
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    # A worker thread that was given up may still be in the middle of a tensor operation: do not wait for it.
    os._exit(code)


class _Hydra:
    """Hydra with our configuration folder and the schema of one job, for the length of a `with`."""

    def __init__(self, schema: type) -> None:
        schema_name = schema.__name__.removesuffix("Job").lower()
        ConfigStore.instance().store(group="schema", name=schema_name, node=schema, package="_global_")
        self._context = initialize_config_dir(str(CONF), version_base="1.3")

    def __enter__(self) -> None:
        self._context.__enter__()

    def __exit__(self, *exc: object) -> None:
        self._context.__exit__(*exc)


def _tree(name: str, overrides: list[str]) -> DictConfig:
    try:
        return compose(name, overrides)
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(_one_line(error)) from error


def _recipe_tree(name: str, member: str, settings: list[str]) -> DictConfig:
    """A recipe's file as its schema has it, whatever recipe `settings` name."""
    file = f"conf/recipe/{member}.yaml"
    try:
        recipe = OmegaConf.load(CONF / "recipe" / f"{member}.yaml")
        if not isinstance(recipe, DictConfig):
            raise UsageError(f"{file} must be keys and values, got a list; see the files beside it")
        if "defaults" in recipe:
            others = [setting for setting in settings if not setting.startswith("recipe=")]
            recipe = compose(name, [*others, f"recipe={member}"]).recipe
        tree = OmegaConf.merge(RecipeConfig, recipe)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise UsageError(f"{file} must be a recipe: {_one_line(error)}") from error
    assert isinstance(tree, DictConfig)
    if tree.name != member:
        raise UsageError(f"{file} must say name: {member}, got {tree.name!r}; correct it")
    return tree


def _composed(schema: type[T], name: str, argv: list[str]) -> T:
    given = [argument.split("=", 1) for argument in _settings(argv)]
    tree = _tree(name, [f"{key}={value}" for key, value in given if not _is_verbatim(key)])
    for key, value in given:
        if _is_verbatim(key):
            set_verbatim(tree, key, _ids(value) if key == "ids" else value)
    if {"--help", "-h"} & set(argv):
        _exit_after(_help_text(name, tree))
    if "--cfg" in argv:
        _exit_after(yaml_text(tree))
    job = from_tree(tree)
    assert isinstance(job, schema)
    log_to_stderr(level=getattr(job, "log_level", "warning"))
    return job


def _is_verbatim(key: str) -> bool:
    return key in VERBATIM_KEYS or key.startswith(VERBATIM_GROUPS)


def _settings(argv: list[str]) -> list[str]:
    return [argument for argument in argv if argument not in FLAGS]


def _ids(text: str) -> list[str]:
    """The ids in `[a,b]` as they stand: Hydra would read 1_0 as 10 and 1e3 as 1000.0. Quote one that has a comma."""
    if not (text.startswith("[") and text.endswith("]")):
        raise UsageError(f"ids must be a list like [a,b], got {text!r}; put brackets around it")
    return next(csv.reader([text[1:-1]], skipinitialspace=True), [])


def _check_keys(name: str, arguments: list[str]) -> None:
    """Refuse a misspelt key with the nearest valid one; Hydra's own message names no alternative."""
    # A model has keys of its own, such as those of its sources.
    tree = _tree(name, [])
    choices = {f"{group}={member}" for group in _groups() if group in tree for member in _members(group)}
    valid = [*leaf_keys(_tree(name, [argument for argument in arguments if argument in choices])), *_groups()]
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise UsageError(f"arguments must be key=value, got {argument!r}; see --help")
        if key not in valid:
            near = difflib.get_close_matches(key, valid, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}?" if near else "see --help"
            raise UsageError(f"{key!r} is not a setting of jobs.{name}; {hint}")
        if not value and _is_verbatim(key):
            raise UsageError(f"{key} must not be empty, got {argument!r}; is a shell variable unset?")


def _groups() -> Iterator[str]:
    return (path.name for path in sorted(CONF.iterdir()) if path.is_dir() and any(path.glob("*.yaml")))


def _members(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def _one_line(error: Exception) -> str:
    """The innermost reason of a Hydra error, without its hints about Hydra's own flags."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, YAMLError):
        return " ".join(str(cause).split())
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    first = lines[0]
    if "Could not find" in str(cause) and "Available options" in str(cause):
        group, _, wrong = first.split("'")[-2].rpartition("/")
        return f"{group} must be one of {', '.join(_members(group))}, got {wrong!r}; see --help"
    key = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("full_key:")), "")
    return f"{key}: {first}; see --help" if key else f"{first}; see --help"


def _help_text(name: str, tree: DictConfig) -> str:
    lines = [f"python -m jobs.{name} [key=value ...]", "", "Config groups (group=member):"]
    for group in _groups():
        if group in tree:
            lines.append(f"  {group}: {', '.join(_members(group))}")
    lines += ["", "Settings and their values with these arguments (--cfg prints them as YAML):"]
    lines += [f"  {key}={value}" for key, value in leaf_keys(tree).items()]
    return "\n".join(lines)


def _exit_after(text: str) -> None:
    sys.stdout.write(text.rstrip("\n") + "\n")
    raise SystemExit(0)


__all__ = [
    "BenchJob", "RenderJob", "ReportJob", "StageWeightsJob", "SubmitJob", "compose_job", "compose_recipes", "run_job",
]  # fmt: skip
