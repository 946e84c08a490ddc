"""What verification may find."""

from __future__ import annotations

from gpa_codecs.errors import GpaError


class ConversionFault(GpaError):
    """The converted folder is not what it should be: a defect of the converter, of MLX or of the disk."""
