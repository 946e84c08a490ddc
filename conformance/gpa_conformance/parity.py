"""Parity of one kind of hardware, as tox and CI run it: `python -m gpa_conformance.parity cuda --out DIR`.

Makes a baseline where none is given, runs the suite in every dtype that the hardware is used with, writes each report
as JSON, Markdown and HTML, and the matrix of all. Where the hardware, its package or its backend is missing, it prints
"skipped: reason" and ends with status 0; else with that of the runs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from gpa_engines.registry import BACKENDS, backend_status

FAILED = 1


@dataclass(frozen=True, slots=True)
class Hardware:
    """device: "" leaves the choice to the backend. dtypes: none runs the backend's own once."""

    backend: str
    device: str = ""
    dtypes: tuple[str, ...] = ()


HARDWARE = {
    "cpu": Hardware("torch", "cpu", ("float32", "bfloat16")),
    "cuda": Hardware("torch", "cuda", ("float32", "bfloat16", "float16")),
    "ascend": Hardware("ascend"),
    "mlx": Hardware("mlx"),
    "llama-cpp": Hardware("llama-cpp"),
    "onnx": Hardware("onnx"),
    "vllm": Hardware("vllm"),
    "sglang": Hardware("sglang"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one hardware's parity and return the exit status."""
    parser = argparse.ArgumentParser("gpa_conformance.parity", description="the suite on one kind of hardware")
    parser.add_argument("hardware", choices=HARDWARE)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for reports and baseline")
    parser.add_argument("--model", default="tiny-random", help="checkpoint folder, hub id, or tiny-random")
    parser.add_argument("--baseline", metavar="DIR", help="made in --out where it is not given")
    parser.add_argument("--cases", metavar="A,B", help="families or case ids")
    parser.add_argument("--known-failures", metavar="FILE", help="a case id and a reason per line")
    given = parser.parse_args(arguments)
    hardware = HARDWARE[given.hardware]
    if reason := unavailable(hardware):
        print(f"skipped: {reason}")
        return 0
    given.out.mkdir(parents=True, exist_ok=True)
    baseline = given.baseline or str(given.out / "baseline")
    chosen = _options(cases=given.cases)
    if given.baseline is None and not Path(baseline).exists():
        status = _conformance("baseline", "--model", given.model, "--out", baseline, *chosen)
        if status:
            return status
    chosen += _options(known_failures=given.known_failures, device=hardware.device or None)
    worst, reports = 0, []
    for dtype in hardware.dtypes or (None,):
        name = f"{given.hardware}-{dtype}" if dtype else given.hardware
        outputs = {kind: str(given.out / f"{name}.{kind}") for kind in ("json", "html", "markdown")}
        target = ("--model", given.model, "--backend", hardware.backend, "--baseline", baseline, *_options(dtype=dtype))
        status = _conformance("run", *target, *chosen, *_options(**outputs))
        worst = max(worst, status)
        reports += [outputs["json"]] if status <= FAILED else []
    if len(reports) > 1:
        matrix = _options(html=str(given.out / f"{given.hardware}.html"))
        worst = max(worst, _conformance("compare", *reports, *matrix))
    return worst


def unavailable(hardware: Hardware) -> str:
    """Why the hardware cannot be tested here, or ""."""
    status = backend_status(BACKENDS[hardware.backend])
    if status.state == "planned":
        return f"backend {hardware.backend!r} is {status.detail}"
    if status.state == "missing":
        return f"backend {hardware.backend!r} {status.detail}: {status.remedy}"
    if hardware.device == "cuda" and not import_module("torch").cuda.is_available():
        return "torch sees no CUDA device"
    return ""


def _options(**values: str | None) -> tuple[str, ...]:
    """The command line's form of the options that have a value."""
    pairs = ((f"--{name.replace('_', '-')}", value) for name, value in values.items() if value is not None)
    return tuple(word for pair in pairs for word in pair)


def _conformance(*arguments: str) -> int:
    """`gpa-conformance`, in a process of its own as a user would start it."""
    return subprocess.run([sys.executable, "-m", "gpa_conformance.cli", *arguments], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
