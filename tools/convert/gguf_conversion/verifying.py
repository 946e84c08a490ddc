"""Reading a written file again and comparing it with the checkpoint: names, shapes, types, texts, values, logits."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gpa_codecs.errors import GpaError
from gpa_conformance.limits import load_limits
from gpa_engines.backends.llama_cpp.embedding_table import open_table
from gpa_engines.backends.llama_cpp.gguf_model import GgufModel

from .forward import reference_logits
from .plan import QuantizedFile, SimpleFile
from .quantizing import has_llama_cpp
from .source import Source
from .table import Table, differing_rows
from .tensors import decode, row_blocks

ROUNDING = {"F32": 0.0, "F16": 2**-10, "BF16": 2**-8, "Q8_0": 0.025, "Q6_K": 0.05, "Q5_1": 0.1, "Q5_0": 0.1}
ROUNDING |= {"Q5_K": 0.1, "Q4_K": 0.2}
"""Most that a tensor's relative L2 error may be, by type.

F16, BF16: twice what rounding to nearest gives at worst. Q8_0: what a block with one large value has, sqrt(32) / 254.
The others: about three times what normally distributed weights give (Q6_K 0.018, Q5_K 0.035, Q4_K 0.07).
"""

# What llama.cpp makes the weights of a K-quant of; others are those that fell back.
_K_TENSORS = ("Q4_K", "Q5_K", "Q6_K")

_CHILD = Path(__file__).with_name("llama_logits.py")


class VerificationError(GpaError):
    """A written file is not what the checkpoint asks for."""


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison. passed: None where it could not be made."""

    what: str
    passed: bool | None
    detail: str


def verify(source: Source, target: SimpleFile | QuantizedFile | Table, path: Path) -> list[Check]:
    """Compare the file at `path` with the plan and the checkpoint. Raises CheckpointError for a damaged file."""
    if isinstance(target, Table):
        differing = differing_rows(target, path)
        detail = f"{target.embeddings.shape[0] - differing} of {target.embeddings.shape[0]} rows equal"
        return [Check("rows", differing == 0, detail)]
    model = GgufModel.open(path)
    checks = [_metadata(model, target), _tensors(model, target), *_rounding(model, target)]
    if target.gpa.vocab == "full":
        checks.append(_tokens(model, target))
    return [*checks, *_logits(source, model, target)]


def _simple(target: SimpleFile | QuantizedFile) -> SimpleFile:
    return target.intermediate if isinstance(target, QuantizedFile) else target


def _metadata(model: GgufModel, target: SimpleFile | QuantizedFile) -> Check:
    """Every scalar and short array as planned, and the file's type."""
    stored = model.header.metadata
    wrong = [] if model.file_type == target.file_type else ["general.file_type"]
    entries = [entry for entry in _simple(target).metadata if entry.key != "general.file_type"]
    for entry in entries:
        if entry.key.startswith("tokenizer.ggml.") and entry.is_array:
            continue  # compared one by one elsewhere
        value = np.float32(entry.value).item() if isinstance(entry.value, float) else entry.value
        if stored.get(entry.key) != value:
            wrong.append(entry.key)
    return Check("metadata", not wrong, f"differs: {', '.join(wrong)}" if wrong else f"{len(entries) + 1} keys")


def _tensors(model: GgufModel, target: SimpleFile | QuantizedFile) -> Check:
    """Names, shapes and types; of a K-quant, that just the expected weights fell back."""
    stored, planned = model.header.tensors, {each.name: each for each in _simple(target).tensors}
    wrong = sorted(stored.keys() ^ planned.keys())
    for name in stored.keys() & planned.keys():
        tensor, plan = stored[name], planned[name]
        if isinstance(target, QuantizedFile) and len(plan.shape) > 1:
            right = (tensor.type in _K_TENSORS) != (name in target.fell_back)
        else:
            right = tensor.type == plan.type
        if not right or tensor.shape != plan.shape:
            wrong.append(f"{name} ({tensor.type} {list(tensor.shape)})")
    return Check("tensors", not wrong, ", ".join(wrong[:5]) if wrong else f"{len(stored)} names, shapes and types")


def _rounding(model: GgufModel, target: SimpleFile | QuantizedFile) -> list[Check]:
    """Per type, the worst relative L2 error of a tensor against its limit."""
    worst: dict[str, tuple[float, str]] = {}
    counts: dict[str, int] = {}
    for plan in _simple(target).tensors:
        tensor = model.header.tensors[plan.name]
        error = size = 0.0
        at = 0
        for rows in row_blocks(plan.source.shape, plan.rows):
            expected = plan.source.read(rows)
            found = decode(model.path, tensor, range(at, at + len(rows)))
            error += float(np.square(found - expected, dtype=np.float64).sum())
            size += float(np.square(expected, dtype=np.float64).sum())
            at += len(rows)
        relative = np.sqrt(error / size) if size else float(error > 0)
        counts[tensor.type] = counts.get(tensor.type, 0) + 1
        worst[tensor.type] = max(worst.get(tensor.type, (-1.0, "")), (float(relative), plan.name))
    checks = []
    for kind, (error, name) in sorted(worst.items()):
        limit = ROUNDING.get(kind, 0.0)
        detail = f"{counts[kind]} tensors, relative L2 error at most {error:.2e} ({name}), limit {limit:.2e}"
        checks.append(Check(f"values {kind}", error <= limit, detail))
    return checks


def _tokens(model: GgufModel, target: SimpleFile | QuantizedFile) -> Check:
    """All token texts, types and merges."""
    planned = {entry.key: entry.value for entry in _simple(target).metadata if entry.is_array}
    texts = model.header.byte_strings("tokenizer.ggml.tokens")
    merges = model.header.byte_strings("tokenizer.ggml.merges")
    types = model.header.numbers("tokenizer.ggml.token_type").tolist()
    wrong = [
        what
        for what, stored, expected in (
            ("texts", texts, [str(each).encode() for each in _sequence(planned["tokenizer.ggml.tokens"])]),
            ("types", types, list(_sequence(planned["tokenizer.ggml.token_type"]))),
            ("merges", merges, [str(each).encode() for each in _sequence(planned["tokenizer.ggml.merges"])]),
        )
        if stored != expected
    ]
    return Check("tokens", not wrong, f"{', '.join(wrong)} differ" if wrong else f"all {len(texts)} texts and types")


def _sequence(value: object) -> Sequence[object]:
    assert isinstance(value, Sequence)
    return value


def _logits(source: Source, model: GgufModel, target: SimpleFile | QuantizedFile) -> list[Check]:
    """llama.cpp's logits of a short prompt against the checkpoint's, within gpa-conformance's limits for the type."""
    if not has_llama_cpp():
        return [Check("logits", None, "not compared: llama-cpp-python is not installed")]
    ids = _prompt(source)
    prompt = np.asarray(ids, np.int32)
    if target.gpa.embeddings_file:
        shape = (source.config.vocab_size, source.config.hidden_size)
        table = open_table(
            target.path.with_name(target.gpa.embeddings_file),
            shape=shape,
            source_sha256=source.sha256,
            tokenizer_sha256=source.tokenizer_sha256,
        )
        prompt = table[ids].astype(np.float32)
    found = _llama_logits(model.path, prompt)
    if isinstance(found, str):
        return [Check("logits", False, found)]
    expected = reference_logits(source, ids, target.gpa.ids)
    if found.shape != expected.shape:
        return [Check("logits", False, f"{list(found.shape)}; expected {list(expected.shape)}")]
    errors = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    top1 = int((found.argmax(1) == expected.argmax(1)).sum())
    limits = load_limits().for_dtype(target.file_type)
    metrics = {
        "non_finite": float(np.size(found) - np.isfinite(found).sum()),
        "rel_l2": float(np.linalg.norm(found - expected) / np.linalg.norm(expected)),
        "rel_l2_max": float(errors.max()),
    }
    outcomes = limits.checks(metrics)
    detail = ", ".join(f"{each.metric} {each.value:.2e} (limit {each.limit:g})" for each in outcomes)
    return [
        Check(
            "logits", all(each.passed for each in outcomes), f"{detail}; top-1 equal at {top1} of {len(ids)} positions"
        )
    ]


def _prompt(source: Source) -> list[int]:
    """A few ids of every kind: the beginning of a tts-a prompt and of its answer."""
    space, control = source.space, source.space.control
    voice = [space.global_.range[0], space.global_.range[-1]]
    text = [ids[len(ids) // 2] for ids in space.text_ranges[:1]] + [space.text_ranges[-1][-1]]
    speech = [space.semantic.range[0], space.semantic.range[-1], space.glm.range[1]]
    return [
        control.start_global,
        *voice,
        control.end_global,
        control.start_content,
        *text,
        control.end_content,
        *speech,
    ]


def _llama_logits(path: Path, prompt: NDArray[np.generic]) -> NDArray[np.float32] | str:
    """The logits, or why there are none; llama.cpp may end its process, so it gets one of its own."""
    with tempfile.TemporaryDirectory() as folder:
        prompt_file, logits_file = Path(folder) / "prompt.npy", Path(folder) / "logits.npy"
        np.save(prompt_file, prompt)
        command = [sys.executable, str(_CHILD), str(path), str(prompt_file), str(logits_file)]
        child = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if child.returncode:
            words = "; ".join(child.stderr.strip().splitlines()[-3:]) or "it said nothing"
            return f"llama.cpp failed (exit status {child.returncode}): {words}"
        return np.load(logits_file)
