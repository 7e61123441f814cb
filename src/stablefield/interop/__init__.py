"""File formats of other projects."""

__all__: list[str] = []
