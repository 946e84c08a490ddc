"""The released checkpoint layout: found, checked without a framework, and explained.

`Checkpoint.open` refuses what cannot work with one clear error; `inspect_checkpoint` goes on and reports everything.
"""

from gpa_engines.checkpoint.folder import Checkpoint
from gpa_engines.checkpoint.layout import PARTS, TASK_PARTS, Layout, Part
from gpa_engines.checkpoint.report import CheckpointReport, Component, Finding, inspect_checkpoint

__all__ = [
    "PARTS",
    "TASK_PARTS",
    "Checkpoint",
    "CheckpointReport",
    "Component",
    "Finding",
    "Layout",
    "Part",
    "inspect_checkpoint",
]
