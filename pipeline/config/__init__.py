"""Every setting as a typed dataclass, filled once from YAML and plain objects from then on.

Defaults live in these dataclasses; `conf/**/*.yaml` states only what differs. Nothing below knows OmegaConf. Schema
classes are not frozen because OmegaConf treats a frozen one as read-only even while it composes.
"""
