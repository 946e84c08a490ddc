"""Which codec a model gets: the checkpoint's own networks in torch, or their export in ONNX Runtime."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from gpa_codecs.codec import SpeechCodec
from gpa_codecs.errors import BackendError, CheckpointError
from gpa_codecs.onnx_folder import CODEC_FOLDER, CONVERT, FORMAT, MANIFEST, CodecFolder
from gpa_engines.checkpoint.layout import BICODEC, GLM, Part

GRAPHS: Mapping[Part, tuple[str, ...]] = {
    "bicodec": ("voice", "decoder"),
    "wav2vec2": ("wav2vec2", "semantic"),
    "glm": ("glm",),
}
"""The exported networks that stand for a part of the checkpoint; semantic codes need wav2vec2 and BiCodec's encoder."""


@dataclass(frozen=True, slots=True)
class TorchCodecFiles:
    """The codec's networks as the checkpoint has them. bicodec_dir holds wav2vec2's folder."""

    bicodec_dir: Path
    glm_dir: Path

    package = "torch"

    def __str__(self) -> str:
        return "codec: torch"

    def load(self, device: str, threads: int | None) -> SpeechCodec:
        """device: of torch. threads: torch's, of the whole process; None leaves them alone."""
        from gpa_codecs.torch_codec import TorchCodec

        return TorchCodec(self.bicodec_dir, self.glm_dir, device=device, threads=threads)


@dataclass(frozen=True, slots=True)
class OnnxCodecFiles:
    """The codec's networks as tools/convert/to_onnx.py wrote them. folder: of the manifest."""

    folder: Path
    precision: str

    package = "onnxruntime"

    def __str__(self) -> str:
        return f"codec: ONNX Runtime, {self.folder}"

    def check(self, parts: Collection[Part]) -> None:
        """Raise CheckpointError where a graph that stands for one of these parts of the checkpoint is missing or cut
        short, BackendError for a precision that was not exported.
        """
        folder = CodecFolder.open(self.folder)
        folder.decoder_precision(self.precision)
        folder.check([graph for part in parts for graph in GRAPHS.get(part, ())])

    def load(self, device: str, threads: int | None) -> SpeechCodec:
        """It runs on the CPU, whatever the engine's device is. threads: None leaves the choice to ONNX Runtime."""
        from gpa_codecs.onnx_codec import OnnxCodec

        return OnnxCodec(self.folder, precision=self.precision, threads=threads)


CodecFiles = TorchCodecFiles | OnnxCodecFiles


def find_codec_files(
    home: Path,
    *,
    prefer_torch: bool,
    precision: str | None = None,
    bicodec: Path | None = None,
    glm_tokenizer: Path | None = None,
) -> CodecFiles:
    """The codec in the folder `home`: a checkpoint, an export of one, or a checkpoint with its export inside.

    prefer_torch: where both can be used, take torch (which an engine in torch has loaded anyway). precision: of the
    exported decoder; only an export has a choice. bicodec, glm_tokenizer: folders to use instead of the checkpoint's;
    they are for torch. Raises CheckpointError where there is no codec, BackendError where its package is missing.
    """
    exported = next(iter(_exports(home)), None)
    if bicodec is not None or glm_tokenizer is not None:
        if precision is not None:
            raise BackendError(
                "--codec-precision chooses among what was exported; it cannot be combined with --bicodec or "
                "--glm-tokenizer, which name networks of torch"
            )
        return _torch_files(home, bicodec, glm_tokenizer)
    if precision is not None:
        if exported is None:
            raise CheckpointError(
                f"{home} holds no exported codec, so there is no precision to choose: export one with {CONVERT}"
            )
        return OnnxCodecFiles(exported, precision)
    has_torch, has_onnx = (find_spec(package) is not None for package in ("torch", "onnxruntime"))
    own = (home / BICODEC).is_dir()
    if exported is not None and not (own and has_torch and (prefer_torch or not has_onnx)):
        if not has_onnx:
            raise BackendError(f"the codec in {exported} needs onnxruntime: pip install 'gpa-engines[onnx]'")
        return OnnxCodecFiles(exported, "auto")
    if own and not has_torch:
        raise BackendError(
            f"the codec in {home / BICODEC} needs torch: pip install 'gpa-engines[torch]'; or export it where torch "
            f"is, {CONVERT}, and carry the folder onnx here"
        )
    return _torch_files(home, None, None)


def _torch_files(home: Path, bicodec: Path | None, glm_tokenizer: Path | None) -> TorchCodecFiles:
    return TorchCodecFiles(bicodec or home / BICODEC, glm_tokenizer or home / GLM)


def _exports(home: Path) -> Iterator[Path]:
    """Folders of exported codecs that `home` stands for."""
    for folder in (home, home / CODEC_FOLDER, home / "onnx" / CODEC_FOLDER):
        manifest = folder / MANIFEST
        if manifest.is_file() and (folder != home or _calls_itself_codec(manifest)):
            yield folder


def _calls_itself_codec(manifest: Path) -> bool:
    try:
        document = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and document.get("format") == FORMAT
