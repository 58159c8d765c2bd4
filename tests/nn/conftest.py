"""timm, whose modules vitfast.nn must match, is importable."""

import libraries  # noqa: F401
