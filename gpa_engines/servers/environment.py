"""Environment variables that say where servers are and how to be let in."""

from __future__ import annotations

KEY_VARIABLE = "GPA_REMOTE_KEY"
"""Holds the bearer key."""

URL_VARIABLE = "GPA_REMOTE_URL"
"""Holds the addresses, with commas between them, where no option gives any."""
