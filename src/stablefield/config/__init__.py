"""Configuration: the names of all components, and the way from TOML to them and back.

    [target]
    kind = "stf"
    size = 1024

A section chooses a class by its `kind` (see `stablefield.kinds`); its other keys are the fields of that class, with the
defaults of the class. So a configuration has no defaults of its own, except those that depend on the process, the data
or the kind. Arguments that are known only at run time, such as the pool or the shape of the data, are not configured.
"""

from stablefield.config.classes import Allowed, allowed_names
from stablefield.config.resolution import Config, resolve
from stablefield.config.targets import (
    describe_target,
    floor_target,
    split_settings,
    split_targets,
    target_kind,
    target_section,
)
from stablefield.config.text import (
    CHECKSUM_LINE,
    as_setting,
    is_unedited,
    overlay,
    override,
    read_toml,
    refuse_other_format,
    toml_value,
)
from stablefield.config.training import Training
from stablefield.kinds import ConfigError

__all__ = [
    "CHECKSUM_LINE",
    "Allowed",
    "Config",
    "ConfigError",
    "Training",
    "allowed_names",
    "as_setting",
    "describe_target",
    "floor_target",
    "is_unedited",
    "overlay",
    "override",
    "read_toml",
    "refuse_other_format",
    "resolve",
    "split_settings",
    "split_targets",
    "target_kind",
    "target_section",
    "toml_value",
]
