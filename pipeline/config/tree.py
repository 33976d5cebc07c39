"""OmegaConf trees to the dataclasses and back to plain values."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from pipeline.errors import UsageError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def to_plain(value: object) -> dict[str, object]:
    """A config object as plain dicts and lists, for `run.json` and content keys."""
    return asdict(cast("DataclassInstance", value))


def from_tree(tree: DictConfig) -> object:
    """The dataclass objects of a composed tree; UsageError for a missing or wrong value."""
    try:
        return OmegaConf.to_object(tree)
    except UsageError as error:
        # OmegaConf adds its own lines to what a post-init check of ours says.
        raise UsageError(str(error).splitlines()[0]) from error
    except MissingMandatoryValue as error:
        raise UsageError(f"{error.full_key} must be given; add {error.full_key}=... to the command") from error
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{error.full_key} {reason}; see --help") from error


def set_verbatim(tree: DictConfig, key: str, value: str | list[str]) -> None:
    """Set `key` to `value` as it stands: no override grammar, no interpolation."""

    def escaped(text: str) -> str:
        return text.replace("\\", "\\\\").replace("${", r"\${") if "${" in text else text

    OmegaConf.update(tree, key, [escaped(part) for part in value] if isinstance(value, list) else escaped(value))


def leaf_keys(tree: DictConfig) -> dict[str, object]:
    """Every setting of a composed tree by its dotted name, and the branches above them."""
    keys: dict[str, object] = {}

    def walk(node: object, prefix: str) -> None:
        if isinstance(node, dict):
            for name, child in node.items():
                walk(child, f"{prefix}.{name}" if prefix else str(name))
        else:
            keys[prefix] = node

    walk(OmegaConf.to_container(tree, resolve=True), "")
    return keys


def yaml_text(tree: DictConfig) -> str:
    """The resolved configuration as YAML."""
    return OmegaConf.to_yaml(tree, resolve=True)
