"""The list of all configuration keys: complete, described, and equal to its page in the documentation."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from stablefield.cli import app
from stablefield.config import ConfigError, resolve
from stablefield.config.reference import describe_config, markdown_reference
from stablefield.kinds import BASES, KINDS

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_page_of_all_keys_is_what_the_command_prints():
    wanted = "run: stablefield config --markdown > docs/configuration.md"
    assert PAGE.read_text(encoding="utf-8") == markdown_reference(), wanted


def test_every_kind_of_every_section_is_listed_and_every_key_has_a_meaning():
    entries = describe_config()
    assert {(entry.section, entry.kind) for entry in entries} == {(s, k) for s, kinds in KINDS.items() for k in kinds}
    for entry in entries:
        assert entry.summary
        for key in entry.keys:
            assert len(key.meaning) > len(key.name), (entry.section, entry.kind, key.name)


@pytest.mark.parametrize("section", ["process", "target", "sampler", "training"])
def test_listed_defaults_are_those_of_a_resolved_configuration(section):
    values = dict(resolve({}).sections[section])
    entry = describe_config(f"{section}.{values.pop('kind')}" if section in BASES else section)[0]
    assert {key.name: key.default for key in entry.keys if isinstance(values[key.name], int)} == {
        name: str(value).lower() for name, value in values.items() if isinstance(value, int)
    }
    assert {key.name for key in entry.keys} == values.keys()


def test_the_command_prints_a_section_or_a_kind():
    printed = CliRunner().invoke(app, ["config", "target.stf"]).output
    assert printed.startswith("target.kind=stf: ")
    assert "target.size = 1024  [integer]" in printed
    assert "knn" not in printed
    assert "target.kind=knn" in CliRunner().invoke(app, ["config", "target"]).output
    for place, message in (("tragets", "no section 'tragets'"), ("target.sft", r"no target.kind 'sft'; did you mean")):
        with pytest.raises(ConfigError, match=message):
            raise CliRunner().invoke(app, ["config", place]).exception
