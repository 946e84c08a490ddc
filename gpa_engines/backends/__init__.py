"""One module or small package per backend; each imports its own framework and nothing from a sibling."""
