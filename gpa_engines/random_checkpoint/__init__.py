"""Random-weight checkpoints in the released layout: to try, test and measure without the trained weights.

Needs NumPy alone; the same size and seed give the same bytes on every machine.
"""

from gpa_engines.random_checkpoint.configs import SIZES, Size
from gpa_engines.random_checkpoint.folder import (
    MARKER,
    Progress,
    is_random_checkpoint,
    make_checkpoint,
    tiny_random_checkpoint,
)

__all__ = [
    "MARKER",
    "SIZES",
    "Progress",
    "Size",
    "is_random_checkpoint",
    "make_checkpoint",
    "tiny_random_checkpoint",
]
