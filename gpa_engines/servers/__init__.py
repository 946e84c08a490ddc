"""Engines over inference servers of other projects: one module per kind, over one HTTP client."""
