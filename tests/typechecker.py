"""Type checker of the tests: shapes are always checked, and an int is accepted where a float is annotated."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
