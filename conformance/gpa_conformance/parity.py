"""Parity of one kind of hardware, as tox and CI run it: `python -m gpa_conformance.parity cuda --out DIR`.

Makes a baseline where none is given, converts the model to the formats that the hardware's engine reads, runs the suite
in every dtype that it is used with, writes each report as JSON, Markdown and HTML, and the matrix of all. Where the
hardware, its package or its backend is missing, it prints "skipped: reason" and ends with status 0; else with that of
the runs.

`python -m gpa_conformance.parity reference --out DIR` prepares, where torch is, what the engines without torch need:
the baseline that they are held against, and the codec and language model exported to ONNX. Give them `--reference DIR`.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from gpa_codecs.errors import BackendError
from gpa_engines.hub import resolve_model
from gpa_engines.registry import BACKENDS, backend_status

FAILED, MISUSE = 1, 2

REFERENCE = "reference"

CONVERTERS = Path("tools", "convert")
"""Of the clone in whose folder this runs; the scripts are no part of the installed package."""

LONG = "max_tokens_in_flight=8192"
"""Room for the family "long" where an engine's own default has none."""

CONVERTED = ("*.gguf", "*-embeddings-*.safetensors", "gguf")
"""What to_gguf.py writes beside a checkpoint."""

PRECISIONS = ("fp32", "fp16", "int8")


@dataclass(frozen=True, slots=True)
class Variant:
    """One run of the suite. name: of its reports, and the dtype unless `dtype` says another. options: of the engine."""

    name: str
    dtype: str | None = None
    options: tuple[str, ...] = ()

    @property
    def arguments(self) -> tuple[str, ...]:
        dtype = self.name if self.dtype is None else self.dtype
        return (*_options(dtype=dtype or None), *(word for each in self.options for word in ("--option", each)))


@dataclass(frozen=True, slots=True)
class Hardware:
    """device: "" leaves the choice to the backend. variants: none runs the backend's own dtype once.

    conversions: command lines of scripts in `CONVERTERS`; {model} is the model's folder, {out} that of the reports.
    converted: what they make in the model's folder, if a reference may have it already.
    """

    backend: str
    device: str = ""
    variants: tuple[Variant, ...] = ()
    conversions: tuple[tuple[str, ...], ...] = ()
    converted: str = ""


HARDWARE = {
    "cpu": Hardware("torch", "cpu", (Variant("float32"), Variant("bfloat16"), Variant("int8"))),
    "cuda": Hardware("torch", "cuda", (Variant("float32"), Variant("bfloat16"), Variant("float16"))),
    "ascend": Hardware("ascend", "npu", (Variant("float32"), Variant("bfloat16"), Variant("float16"))),
    "mlx": Hardware(
        "mlx",
        variants=(
            *(Variant(dtype) for dtype in ("float32", "float16", "bfloat16")),
            *(Variant(f"mlx-{bits}bit", options=(f"weights={{out}}/mlx-{bits}bit",)) for bits in (8, 4)),
        ),
        conversions=tuple(
            # Groups that divide the rows of the tiny checkpoint too.
            ("to_mlx.py", "{model}", "--out", f"{{out}}/mlx-{bits}bit", "--bits", str(bits), "--group-size", "32")
            for bits in (8, 4)
        ),
    ),
    "llama-cpp": Hardware(
        "llama-cpp",
        variants=(
            Variant("float32", options=("mode=exact", LONG)),
            Variant("float16", options=("mode=exact", LONG)),
            Variant("float16-fast", "float16", ("mode=fast", LONG)),
            Variant("q8_0", options=(LONG,)),
        ),
        conversions=tuple(("to_gguf.py", "{model}", "--outtype", outtype) for outtype in ("f32", "f16", "q8_0")),
    ),
    "onnx": Hardware(
        "onnx",
        variants=(Variant("float32"), Variant("float16"), Variant("int8")),
        conversions=(
            ("to_onnx.py", "{model}", "--what", "lm", *(word for p in PRECISIONS for word in ("--precision", p))),
        ),
        converted="onnx/lm",
    ),
    "vllm": Hardware("vllm", variants=(Variant("float32"), Variant("bfloat16"))),
    "sglang": Hardware("sglang", variants=(Variant("float32"), Variant("bfloat16"))),
}

EXPORT = ("to_onnx.py", "{model}", "--what", "all", *(word for p in PRECISIONS for word in ("--precision", p)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one hardware's parity, or prepare the reference, and return the exit status."""
    parser = argparse.ArgumentParser("gpa_conformance.parity", description="the suite on one kind of hardware")
    parser.add_argument("hardware", choices=(*HARDWARE, REFERENCE))
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for reports and baseline")
    parser.add_argument("--reference", type=Path, metavar="DIR", help="what the run of `reference` wrote")
    parser.add_argument("--model", default="tiny-random", help="checkpoint folder, hub id, demo or tiny-random")
    parser.add_argument("--baseline", metavar="DIR", help="made in --out where it is not given")
    parser.add_argument("--cases", metavar="A,B", help="families or case ids")
    parser.add_argument("--utterances", metavar="N", help="held-out recordings that the family speech takes")
    parser.add_argument("--known-failures", metavar="FILE", help="a case id and a reason per line")
    given = parser.parse_args(arguments)
    if given.hardware == REFERENCE:
        return _prepare_reference(given)
    hardware = HARDWARE[given.hardware]
    if reason := unavailable(hardware):
        print(f"skipped: {reason}")
        return 0
    given.out.mkdir(parents=True, exist_ok=True)
    if given.reference is not None:
        given.baseline = given.baseline or str(given.reference / "baseline")
        given.model = str(given.reference / "model")
    if hardware.conversions:
        given.model = str(linked_model(given.model, given.out / "model"))
    status, baseline = _baseline(given)
    done = hardware.converted and (Path(given.model) / hardware.converted).exists()
    for command in () if done else hardware.conversions:
        status = status or _convert(command, given)
    return status or _run_all(hardware, given, baseline)


def unavailable(hardware: Hardware) -> str:
    """Why the hardware cannot be tested here, or ""."""
    status = backend_status(BACKENDS[hardware.backend])
    if status.state == "missing":
        return f"backend {hardware.backend!r} {status.detail}: {status.remedy}"
    if hardware.device == "cuda" and not import_module("torch").cuda.is_available():
        return "torch sees no CUDA device"
    if hardware.device == "npu":
        return _without_npu()
    if hardware.backend == "vllm":
        return _without_device_for_vllm()
    return ""


def _without_npu() -> str:
    """What of CANN and the NPU is missing, or "". Imports torch_npu, which must be installed."""
    from gpa_engines.backends.ascend.cards import check_cards
    from gpa_engines.backends.ascend.runtime import load_torch_npu

    try:
        check_cards(load_torch_npu(), (0,))
    except BackendError as error:
        return str(error)
    return ""


def _without_device_for_vllm() -> str:
    """That vLLM finds no device, or "". What is wrong with vLLM itself, the run says."""
    from gpa_engines.backends.vllm.llm import NO_DEVICE, device_type

    try:
        return "" if device_type() else NO_DEVICE
    except BackendError:
        return ""


def unsupported(hardware: Hardware, variant: Variant) -> str:
    """Why the hardware that is here cannot run a variant, or ""."""
    if hardware.device == "npu" and variant.name == "bfloat16":
        from gpa_engines.backends.ascend.runtime import load_torch_npu

        if not load_torch_npu().npu.is_bf16_supported():
            return "the NPU has no bfloat16"
    return ""


def _prepare_reference(given: argparse.Namespace) -> int:
    """OUT/model: the checkpoint with its export beside it. OUT/baseline: the answers of torch in float32."""
    given.out.mkdir(parents=True, exist_ok=True)
    given.model = str(linked_model(given.model, given.out / "model", (*CONVERTED, "onnx")))
    status, _ = _baseline(given)
    if status or (Path(given.model) / "onnx" / "lm").exists():
        return status
    return _convert(EXPORT, given)


def _run_all(hardware: Hardware, given: argparse.Namespace, baseline: str) -> int:
    worst, reports = 0, []
    common = _options(
        cases=given.cases,
        utterances=given.utterances,
        known_failures=given.known_failures,
        device=_device(hardware),
    )
    for variant in hardware.variants or (Variant("", ""),):
        if reason := unsupported(hardware, variant):
            print(f"{variant.name} skipped: {reason}")
            continue
        name = f"{given.hardware}-{variant.name}" if variant.name else given.hardware
        outputs = {kind: str(given.out / f"{name}.{kind}") for kind in ("json", "html", "markdown")}
        target = ("--model", given.model, "--backend", hardware.backend, "--baseline", baseline)
        engine = tuple(word.replace("{out}", str(given.out)) for word in variant.arguments)
        status = _conformance("run", *target, *engine, *common, *_options(**outputs))
        worst = max(worst, status)
        reports += [outputs["json"]] if status <= FAILED else []
    if len(reports) > 1:
        matrix = _options(html=str(given.out / f"{given.hardware}.html"))
        worst = max(worst, _conformance("compare", *reports, *matrix))
    return worst


def _device(hardware: Hardware) -> str | None:
    """What the engine is told. SGLang looks for a GPU unless it is told that there is none."""
    if hardware.backend == "sglang" and not import_module("torch").cuda.is_available():
        return "cpu"
    return hardware.device or None


def _baseline(given: argparse.Namespace) -> tuple[int, str]:
    """(exit status, folder): the given baseline, one that an earlier run left, or a new one."""
    baseline = given.baseline or str(given.out / "baseline")
    if given.baseline is not None or Path(baseline).exists():
        return 0, baseline
    return _conformance(
        "baseline", "--model", given.model, "--out", baseline, *_options(cases=given.cases, utterances=given.utterances)
    ), baseline


def linked_model(model: str, folder: Path, leave_out: Sequence[str] = CONVERTED) -> Path:
    """A folder of links to the model's files: what is converted into it does not land in the model's own folder.

    leave_out: patterns of conversions that get no link, because a converter that replaces a file follows links.
    """
    source = resolve_model(model)
    folder.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        link = folder / path.name
        if any(path.match(pattern) for pattern in leave_out):
            continue
        # A folder of links for exports, so that others can be added beside them.
        if path.name == "onnx" and path.is_dir():
            linked_model(str(path), link)
        elif not link.exists():
            link.symlink_to(path.resolve(), target_is_directory=path.is_dir())
    return folder


def _convert(command: Sequence[str], given: argparse.Namespace) -> int:
    """Run a converter of this clone, writing anew what an earlier run wrote."""
    script, *arguments = (word.replace("{model}", given.model).replace("{out}", str(given.out)) for word in command)
    if not (CONVERTERS / script).is_file():
        print(f"error: there is no {CONVERTERS / script} here; run in the folder of a clone", file=sys.stderr)
        return MISUSE
    if "--out" in arguments:
        # A new folder of this run's own, which its script does not replace.
        shutil.rmtree(arguments[arguments.index("--out") + 1], ignore_errors=True)
    else:
        arguments.append("--overwrite")
    return subprocess.run([sys.executable, str(CONVERTERS / script), *arguments], check=False).returncode


def _options(**values: str | None) -> tuple[str, ...]:
    """The command line's form of the options that have a value."""
    pairs = ((f"--{name.replace('_', '-')}", value) for name, value in values.items() if value is not None)
    return tuple(word for pair in pairs for word in pair)


def _conformance(*arguments: str) -> int:
    """`gpa-conformance`, in a process of its own as a user would start it."""
    return subprocess.run([sys.executable, "-m", "gpa_conformance.cli", *arguments], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
