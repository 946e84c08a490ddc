"""One stage of the recipe in a process of its own; run.py starts it and reads its lines of JSON."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path

import torch

from demo_training.recipe import Recipe
from demo_training.stages import STAGES, run_stage
from gpa_codecs.errors import GpaError


def main() -> int:
    """Exit status: 0; 2 with a message for what the user can mend; 130 when interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--scale", type=float, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Stopping is left to run.py, which the same Ctrl-C reaches.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def show(done: int, total: int, figures: dict[str, float]) -> None:
        print(json.dumps({"done": done, "total": total, "figures": figures}), flush=True)

    try:
        run_stage(STAGES[options.stage], Recipe(options.out, options.seed, options.scale, options.device), show)
    except GpaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
