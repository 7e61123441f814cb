"""File formats and conventions of other projects; modules of other packages are imported when they are used."""

__all__: list[str] = []
