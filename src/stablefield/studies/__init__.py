"""Studies built on training and evaluation: the variance study (`field`) and the comparison of targets (`compare`)."""

__all__: list[str] = []
