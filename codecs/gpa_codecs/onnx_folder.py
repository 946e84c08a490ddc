"""The folder of a codec that was converted to ONNX: its manifest, read, written and checked. Needs no framework.

    OUT/codec/manifest.json    what the folder holds, from which checkpoint, and the settings around the networks
    OUT/codec/NAME.onnx        one graph, and NAME.onnx.data with its weights, which are mapped, not read

A part is one graph, the decoder two: prenet and wave generator. The encoders exist in float32 only, because fewer bits
change tokens; the decoder exists in each precision that was asked for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpa_codecs.bicodec.config import MelConfig
from gpa_codecs.config_file import ConfigFile
from gpa_codecs.errors import BackendError, CheckpointError
from gpa_codecs.glm_tokenizer.config import GlmFeatureConfig
from gpa_codecs.network_codec import PARTS, BiCodecSettings, GlmSettings

FORMAT = "gpa-onnx-codec"
VERSION = 1
CODEC_FOLDER = "codec"
MANIFEST = "manifest.json"

PRECISIONS = ("fp32", "fp16", "int8")
"""In the order of their exactness; which of them a folder has is in its manifest."""

GRAPHS_OF = {"wav2vec2": 1, "semantic": 1, "voice": 1, "decoder": 2, "glm": 1}
"""Graphs of each part; the decoder's are its prenet and its wave generator."""

CONVERT = "python tools/convert/to_onnx.py MODEL_DIR --what codec"


@dataclass(frozen=True, slots=True)
class GraphFile:
    """A file of a graph: its name in the folder, its size in bytes and its sha256."""

    name: str
    size: int
    sha256: str

    def as_dict(self) -> dict[str, Any]:
        """As the manifest has it."""
        return {"name": self.name, "bytes": self.size, "sha256": self.sha256}

    @classmethod
    def of(cls, path: Path) -> GraphFile:
        """Of a file that is there. Raises OSError."""
        with path.open("rb") as file:
            return cls(path.name, path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


@dataclass(frozen=True, slots=True)
class Graph:
    """A graph: the .onnx file, and the file of its weights unless they are inside."""

    files: tuple[GraphFile, ...]


@dataclass(frozen=True, slots=True)
class CodecFolder:
    """What a manifest says.

    parts: graphs of each part by precision, in the order in which they run. opset: of the ONNX operators.
    converter: the programs that wrote it. sources: sha256 of the checkpoint's files, by name.
    geometry: sizes of BiCodec's parts, as in its configuration: what decoding piece by piece needs.
    generator_context: codes on each side of a sample that it depends on in the wave generator.
    """

    root: Path
    bicodec: BiCodecSettings
    glm: GlmSettings
    parts: Mapping[str, Mapping[str, tuple[Graph, ...]]]
    opset: int
    converter: str
    sources: Mapping[str, str]
    geometry: Mapping[str, Any]
    generator_context: int

    @classmethod
    def open(cls, folder: str | Path) -> CodecFolder:
        """Read the manifest in `folder`, or in its codec/ (the converter's --out) or onnx/codec/ (a checkpoint).

        Files that are there are checked for their size; those of a part that is not needed may be absent.
        Raises CheckpointError for a folder that is none, is damaged or has another version.
        """
        root = _find(Path(folder).expanduser())
        manifest = ConfigFile.read(root / MANIFEST)
        if manifest.values.get("format") != FORMAT:
            raise CheckpointError(f"{root / MANIFEST} has no 'format': '{FORMAT}'; make the folder with: {CONVERT}")
        if manifest.values.get("version") != VERSION:
            raise CheckpointError(
                f"{root / MANIFEST} has version {manifest.values.get('version')!r}; this program reads version "
                f"{VERSION}: convert the checkpoint again ({CONVERT} --overwrite)"
            )
        codec = cls(
            root=root,
            bicodec=_bicodec(manifest.section("bicodec")),
            glm=_glm(manifest.section("glm")),
            parts=_parts(manifest),
            opset=manifest.integer("opset"),
            converter=str(manifest.values.get("converter", "")),
            sources=manifest.section("sources").values,
            geometry=manifest.section("geometry").values,
            generator_context=manifest.integer("generator_context"),
        )
        for file in codec._files():
            if (root / file.name).exists():
                codec._check_size(file)
        return codec

    def write(self) -> None:
        """Write the manifest into the folder. Raises OSError."""
        document = {
            "format": FORMAT,
            "version": VERSION,
            "converter": self.converter,
            "opset": self.opset,
            "sources": dict(self.sources),
            "bicodec": asdict(self.bicodec),
            "glm": asdict(self.glm),
            "geometry": dict(self.geometry),
            "generator_context": self.generator_context,
            "parts": {
                part: {
                    precision: [[file.as_dict() for file in graph.files] for graph in graphs]
                    for precision, graphs in precisions.items()
                }
                for part, precisions in self.parts.items()
            },
        }
        (self.root / MANIFEST).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

    @property
    def precisions(self) -> tuple[str, ...]:
        """The decoder's."""
        return tuple(precision for precision in PRECISIONS if precision in self.parts["decoder"])

    def decoder_precision(self, precision: str) -> str:
        """The precision that "auto" stands for (fp32), or the one that is asked for.

        Raises BackendError for one that was not exported, with the command that exports it.
        """
        chosen = "fp32" if precision == "auto" else precision
        if chosen not in PRECISIONS:
            raise BackendError(f"codec precision {precision!r} is unknown; expected auto, {', '.join(PRECISIONS)}")
        if chosen not in self.precisions:
            all_of_them = " ".join(f"--precision {each}" for each in (*self.precisions, chosen))
            raise BackendError(
                f"{self.root} has no decoder in {chosen}: it was exported in {', '.join(self.precisions)}; "
                f"{CONVERT} {all_of_them} --overwrite adds it"
            )
        return chosen

    def graphs(self, part: str, precision: str = "fp32") -> list[Path]:
        """The .onnx files of a part, in the order in which they run.

        Raises CheckpointError where one of their files is missing or has another size than the manifest says.
        """
        graphs = self.parts[part][precision]
        for graph in graphs:
            for file in graph.files:
                self._check_size(file)
        return [self.root / graph.files[0].name for graph in graphs]

    def check(self, parts: Collection[str] = PARTS, *, hashes: bool = False) -> None:
        """Raise CheckpointError unless every file of these parts, in every precision, is there and has its size.

        hashes: read the files and compare their sha256 too; some seconds for a full checkpoint.
        """
        for file in self._files(parts):
            self._check_size(file)
            path = self.root / file.name
            if hashes and GraphFile.of(path).sha256 != file.sha256:
                raise CheckpointError(
                    f"{path} is damaged: its sha256 is not the one in {MANIFEST}; copy it again, or convert the "
                    f"checkpoint again ({CONVERT} --overwrite)"
                )

    def _files(self, parts: Collection[str] = PARTS) -> Iterator[GraphFile]:
        seen = set()
        for part in parts:
            for graphs in self.parts[part].values():
                for file in (file for graph in graphs for file in graph.files if file not in seen):
                    seen.add(file)
                    yield file

    def _check_size(self, file: GraphFile) -> None:
        path = self.root / file.name
        remedy = f"copy it again, or convert the checkpoint again ({CONVERT} --overwrite)"
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, but {MANIFEST} names it; {remedy}")
        if (size := path.stat().st_size) != file.size:
            raise CheckpointError(f"{path} has {size} bytes, but {MANIFEST} says {file.size}: it is damaged; {remedy}")


def is_codec_folder(folder: Path) -> bool:
    """Whether `folder` has a manifest of this format, of any version."""
    try:
        return ConfigFile.read(folder / MANIFEST).values.get("format") == FORMAT
    except CheckpointError:
        return False


def _find(folder: Path) -> Path:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; expected a codec in ONNX (make one with: {CONVERT})")
    places = (folder, folder / CODEC_FOLDER, folder / "onnx" / CODEC_FOLDER)
    found = [place for place in places if (place / MANIFEST).exists()]
    if not found:
        looked_for = ", ".join((place / MANIFEST).relative_to(folder).as_posix() for place in places)
        raise CheckpointError(
            f"{folder} has no codec in ONNX; looked for {looked_for} in it (make one with: {CONVERT})"
        )
    # Where none is right, reading the first says what is wrong with it.
    return next((place for place in found if is_codec_folder(place)), found[0])


def _bicodec(section: ConfigFile) -> BiCodecSettings:
    mel = section.section("mel")
    return BiCodecSettings(
        codebook_size=section.integer("codebook_size"),
        ref_segment_length=section.integer("ref_segment_length"),
        mel=MelConfig(
            sample_rate=mel.integer("sample_rate"),
            n_fft=mel.integer("n_fft"),
            win_length=mel.integer("win_length"),
            hop_length=mel.integer("hop_length"),
            mel_fmin=mel.number("mel_fmin"),
            mel_fmax=mel.number("mel_fmax"),
            num_mels=mel.integer("num_mels"),
        ),
    )


def _glm(section: ConfigFile) -> GlmSettings:
    features = section.section("features")
    return GlmSettings(
        codebook_size=section.integer("codebook_size"),
        features=GlmFeatureConfig(
            feature_size=features.integer("feature_size"),
            n_fft=features.integer("n_fft"),
            hop_length=features.integer("hop_length"),
            block_length=features.integer("block_length"),
        ),
    )


def _parts(manifest: ConfigFile) -> dict[str, dict[str, tuple[Graph, ...]]]:
    section = manifest.section("parts")
    parts = {}
    for name in PARTS:
        precisions = section.section(name)
        if "fp32" not in precisions.values:
            raise CheckpointError(f"{precisions.source}: fp32 is missing; convert the checkpoint again")
        try:
            parts[name] = {
                precision: tuple(Graph(tuple(_file(file) for file in graph)) for graph in graphs)
                for precision, graphs in precisions.values.items()
            }
        except (TypeError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"{precisions.source} is damaged ({error!r}); convert the checkpoint again ({CONVERT} --overwrite)"
            ) from error
        for graphs in parts[name].values():
            if not all(graph.files for graph in graphs) or len(graphs) != GRAPHS_OF[name]:
                raise CheckpointError(
                    f"{precisions.source} has not the {GRAPHS_OF[name]} graph(s) of this part; convert the checkpoint "
                    f"again ({CONVERT} --overwrite)"
                )
    return parts


def _file(entry: dict[str, Any]) -> GraphFile:
    file = GraphFile(str(entry["name"]), int(entry["bytes"]), str(entry["sha256"]))
    if Path(file.name).name != file.name:
        raise ValueError(f"{file.name} is no name of a file in this folder")
    return file
