"""What a checkpoint folder holds and what is wrong with it, as data for whoever shows it."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from gpa_codecs.errors import CheckpointError
from gpa_codecs.vocabulary import TokenFamily, TokenSpace
from gpa_codecs.wav2vec2.config import FEATURE_STATES
from gpa_codecs.weights import TensorSpec, weight_files
from gpa_engines.checkpoint.checks import (
    bicodec_config,
    check_sizes,
    checks,
    glm_config,
    key_prefix,
    lm_config,
    optional,
    stored_tensors,
    wav2vec2_config,
)
from gpa_engines.checkpoint.layout import PART_NAMES, PARTS, TASK_PARTS, Layout, Part
from gpa_engines.lm_config import LMConfig
from gpa_engines.random_checkpoint import MARKER

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One result: how bad, which part, the file that it is about (relative to the checkpoint where inside), what."""

    level: Level
    part: Part
    file: str
    text: str


@dataclass(frozen=True, slots=True)
class Component:
    """A part on the disk.

    size: bytes of its weights. parameters: number of stored values, None for a file that only torch can read.
    dtypes: stored values by dtype ("BF16", "F32"...). details: what its configuration says, ready to show.
    key_style: how the names differ from the released ones (prefix) and the form of weight norm, "" where unknown.
    """

    part: Part
    name: str
    folder: str
    size: int
    parameters: int | None
    dtypes: Mapping[str, int]
    details: Mapping[str, str | int]
    key_style: str


@dataclass(frozen=True, slots=True)
class CheckpointReport:
    """All that can be said about a checkpoint folder without loading it.

    families: glm_semantic, bicodec_global and bicodec_semantic with offset and size; control: control token name -> id;
    both empty when the tokenizer cannot be read. context: positions, None when config.json cannot be read.
    random_weights: the marker of a checkpoint made by tools/make_checkpoint.py. missing: per task the parts that stand
    in its way, empty when it can run.
    """

    root: Path
    findings: tuple[Finding, ...]
    components: tuple[Component, ...] = ()
    families: tuple[TokenFamily, ...] = ()
    control: Mapping[str, int] = field(default_factory=dict)
    context: int | None = None
    random_weights: Mapping[str, Any] | None = None
    missing: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether every task can run."""
        return not any(finding.level == "error" for finding in self.findings)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that can run."""
        return tuple(task for task, missing in self.missing.items() if not missing)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "root": str(self.root), "ok": self.ok, "tasks": list(self.tasks)}


def inspect_checkpoint(
    path: str | Path,
    *,
    bicodec: str | Path | None = None,
    glm_tokenizer: str | Path | None = None,
    tokenizer: str | Path | None = None,
) -> CheckpointReport:
    """Examine a checkpoint folder; what is wrong becomes a finding, and the examination goes on.

    The arguments are those of `Checkpoint.open`. Never raises for what is in the folder.
    """
    try:
        layout = Layout.find(path, bicodec=bicodec, glm_tokenizer=glm_tokenizer, tokenizer=tokenizer)
    except CheckpointError as error:
        everything = {task: tuple(PART_NAMES[part] for part in parts) for task, parts in TASK_PARTS.items()}
        return CheckpointReport(Path(path), (Finding("error", "lm", "", str(error)),), missing=everything)
    findings = [_try(check.part, layout, check.file, check.what, check.run) for check in checks(layout)]
    config = optional(lm_config, layout)
    space, token_findings = _examine_tokens(layout, config)
    random_weights = _random_marker(layout)
    findings += [*token_findings, *_notes(layout, config, random_weights)]
    broken = {finding.part for finding in findings if finding.level == "error"}
    return CheckpointReport(
        root=layout.root,
        findings=tuple(findings),
        components=tuple(_component(part, layout) for part in PARTS if layout.folder(part).is_dir()),
        families=(space.glm, space.global_, space.semantic) if space else (),
        control=asdict(space.control) if space else {},
        context=config.max_position_embeddings if config else None,
        random_weights=random_weights,
        missing={
            task: tuple(PART_NAMES[part] for part in parts if part in broken) for task, parts in TASK_PARTS.items()
        },
    )


def _try(part: Part, layout: Layout, file: Path, what: str, run: Callable[[], object]) -> Finding:
    name = _relative(file, layout)
    try:
        run()
    except CheckpointError as error:
        return Finding("error", part, name, str(error))
    return Finding("ok", part, name, f"{PART_NAMES[part]}: {what}")


def _examine_tokens(layout: Layout, config: LMConfig | None) -> tuple[TokenSpace | None, list[Finding]]:
    """The token space, where tokenizer.json has one, and what its sizes say about the models."""
    file = layout.tokenizer_file
    if not file.is_file():
        return None, []  # said already
    try:
        space = TokenSpace.from_file(file)
    except CheckpointError as error:
        return None, [Finding("error", "tokenizer", _relative(file, layout), str(error))]
    codec, glm = optional(bicodec_config, layout), optional(glm_config, layout)

    def check(part: Part, model: object, what: str, run: Callable[[], None]) -> list[Finding]:
        return [] if model is None else [_try(part, layout, file, what, run)]

    return space, [
        *check("tokenizer", config, "ids within the vocabulary", lambda: check_sizes(space, lm=config)),
        *check("bicodec", codec, "as many codes as tokens", lambda: check_sizes(space, bicodec=codec)),
        *check("glm", glm, "as many codes as tokens", lambda: check_sizes(space, glm=glm)),
    ]


def _notes(layout: Layout, config: LMConfig | None, random_weights: Mapping[str, Any] | None) -> list[Finding]:
    """What is no error, but good to know."""
    notes = []
    if random_weights is not None:
        made = ", ".join(f"{key} {value}" for key, value in random_weights.items())
        notes.append(
            Finding("warning", "lm", "config.json", f"the weights are random ({made}): whatever comes out is noise")
        )
    for name in ("tokenizer_config.json", "generation_config.json"):
        if not (layout.root / name).is_file():
            text = f"{name} is missing; gpa-engines does not need it, transformers and vLLM do"
            notes.append(Finding("warning", "tokenizer", name, text))
    dtypes = _dtypes(_tensors(layout.root))
    packed = "U32" in dtypes
    if packed:
        notes.append(Finding("warning", "lm", "", "the weights are quantised for MLX; no other backend reads them"))
    if config is not None and dtypes and not packed:
        most = max(dtypes, key=lambda dtype: dtypes[dtype])
        if _TORCH_DTYPES.get(most, most) != config.dtype:
            text = f"config.json says {config.dtype}, but the weights are stored as {_TORCH_DTYPES.get(most, most)}"
            notes.append(Finding("warning", "lm", "config.json", text))
    return notes


_TORCH_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def _component(part: Part, layout: Layout) -> Component:
    folder = layout.folder(part)
    tensors = None if part == "tokenizer" else _tensors(folder)
    return Component(
        part=part,
        name=PART_NAMES[part],
        folder=_relative(folder, layout),
        size=_size(part, layout),
        parameters=None if tensors is None else sum(math.prod(spec.shape) for spec in tensors.values()),
        dtypes=_dtypes(tensors),
        details=_details(part, layout),
        key_style=_key_style(part, tensors),
    )


def _tensors(folder: Path) -> dict[str, TensorSpec] | None:
    try:
        return stored_tensors(folder)
    except CheckpointError:
        return None


def _dtypes(tensors: Mapping[str, TensorSpec] | None) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for spec in (tensors or {}).values():
        counts[spec.dtype] += math.prod(spec.shape)
    return dict(counts.most_common())


def _size(part: Part, layout: Layout) -> int:
    if part == "tokenizer":
        return layout.tokenizer_file.stat().st_size if layout.tokenizer_file.is_file() else 0
    try:
        return sum(path.stat().st_size for path in weight_files(layout.folder(part)))
    except CheckpointError:
        return 0


# A tensor of each part that every form of its weights has; what precedes this name in the file is the prefix.
_LANDMARKS: Mapping[Part, str] = {
    "lm": "model.embed_tokens.weight",
    "bicodec": "quantizer.codebook.weight",
    "wav2vec2": "feature_projection.projection.weight",
    "glm": "codebook.weight",
}


def _key_style(part: Part, tensors: Mapping[str, TensorSpec] | None) -> str:
    if not tensors:
        return ""
    prefix = key_prefix(tensors, _LANDMARKS[part])
    styles = [f"prefix {prefix!r}" if prefix else "no prefix"]
    if any(name.endswith(".weight_g") for name in tensors):
        styles.append("weight norm as weight_g, weight_v")
    if any(name.endswith("parametrizations.weight.original0") for name in tensors):
        styles.append("weight norm as parametrizations")
    return ", ".join(styles)


def _details(part: Part, layout: Layout) -> dict[str, str | int]:
    if part == "lm" and (lm := optional(lm_config, layout)):
        return {
            "layers": lm.num_hidden_layers,
            "hidden size": lm.hidden_size,
            "heads": f"{lm.num_attention_heads} / {lm.num_key_value_heads} key-value, of {lm.head_dim}",
            "feed-forward": lm.intermediate_size,
            "vocabulary": lm.vocab_size,
            "context": lm.max_position_embeddings,
            "rope theta": f"{lm.rope_theta:,.0f}",
            "embeddings": "tied" if lm.tie_word_embeddings else "separate head",
            "dtype": lm.dtype,
        }
    if part == "bicodec" and (codec := optional(bicodec_config, layout)):
        return {
            "semantic codes": f"{codec.codebook_size} of dimension {codec.quantizer.codebook_dim}",
            "voice": f"{codec.voice_length} codes of {codec.voice_cardinality}",
            "reference clip": f"{codec.ref_segment_length / codec.sample_rate:g} s",
            "mel bins": codec.mel.num_mels,
            "encoder layers": codec.encoder.num_layers,
            "prenet layers": codec.prenet.num_layers,
            "generator channels": codec.generator.channels,
        }
    if part == "wav2vec2" and (features := optional(wav2vec2_config, layout)):
        used = ", ".join(str(state) for state in FEATURE_STATES)
        return {
            "layers": features.num_hidden_layers,
            "hidden size": features.hidden_size,
            "hidden states used": used,
        }
    if part == "glm" and (glm := optional(glm_config, layout)):
        return {
            "codes": glm.codebook_size,
            "layers": glm.num_layers,
            "width": glm.d_model,
            "mel bins": glm.num_mel_bins,
        }
    return {}


def _random_marker(layout: Layout) -> Mapping[str, Any] | None:
    try:
        marker = json.loads((layout.root / "config.json").read_text(encoding="utf-8")).get(MARKER)
    except (OSError, ValueError, AttributeError):
        return None
    return marker if isinstance(marker, dict) else None


def _relative(path: Path, layout: Layout) -> str:
    return path.relative_to(layout.root).as_posix() if path.is_relative_to(layout.root) else str(path)
