"""A checkpoint that is fit to be loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from gpa_codecs.errors import CheckpointError
from gpa_codecs.vocabulary import TokenSpace
from gpa_codecs.weights import weight_files
from gpa_engines.checkpoint.checks import bicodec_config, check_sizes, checks, glm_config, lm_config
from gpa_engines.checkpoint.layout import PARTS, Layout, Part
from gpa_engines.checkpoint.speech_domain import FILE_NAME as SPEECH_DOMAIN
from gpa_engines.lm_config import LMConfig


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Paths of a checkpoint whose required parts are there and fit together."""

    layout: Layout
    parts: frozenset[Part]

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        bicodec: str | Path | None = None,
        glm_tokenizer: str | Path | None = None,
        tokenizer: str | Path | None = None,
        require: Collection[Part] = PARTS,
    ) -> Checkpoint:
        """Check the checkpoint in the folder `path` without reading a tensor.

        bicodec, glm_tokenizer: folders to use instead of the checkpoint's own; tokenizer: a tokenizer.json or its
        folder. require: the parts that must be there and right (`TASK_PARTS` says what each task needs). Raises
        CheckpointError naming the file, what was expected and how to get it.
        """
        if unknown := set(require) - set(PARTS):
            raise ValueError(f"unknown parts {sorted(unknown)}; expected any of {', '.join(PARTS)}")
        layout = Layout.find(path, bicodec=bicodec, glm_tokenizer=glm_tokenizer, tokenizer=tokenizer)
        parts: frozenset[Part] = frozenset(require)
        for check in checks(layout):
            if check.part in parts:
                check.run()
        return cls(layout, parts)

    @property
    def root(self) -> Path:
        """Folder of the language model."""
        return self.layout.root

    @property
    def config(self) -> LMConfig:
        """The language model's configuration. Raises CheckpointError where it was not required and is not there."""
        return lm_config(self.layout)

    @property
    def config_file(self) -> Path:
        """config.json of the language model."""
        return self.layout.root / "config.json"

    @property
    def tokenizer_file(self) -> Path:
        """tokenizer.json."""
        return self.layout.tokenizer_file

    @property
    def bicodec_dir(self) -> Path:
        """Folder of BiCodec, with wav2vec2 inside it."""
        return self.layout.bicodec_dir

    @property
    def wav2vec2_dir(self) -> Path:
        """Folder of wav2vec2."""
        return self.layout.wav2vec2_dir

    @property
    def glm_dir(self) -> Path:
        """Folder of the GLM tokenizer."""
        return self.layout.glm_dir

    def token_space(self) -> TokenSpace:
        """The token families, found by name and checked against the codecs that were required and the LM's vocabulary.

        Raises CheckpointError naming the token, or the sizes that differ.
        """
        space = TokenSpace.from_file(self.tokenizer_file)
        check_sizes(
            space,
            lm=self.config if "lm" in self.parts else None,
            bicodec=bicodec_config(self.layout) if "bicodec" in self.parts else None,
            glm=glm_config(self.layout) if "glm" in self.parts else None,
        )
        return space

    def fingerprint(self) -> dict[str, str]:
        """sha256 of every configuration and weight file of the required parts, by path below the part's folder, and of
        the checkpoint's speech domain, if it has one.

        Reads everything (some seconds for a full checkpoint); unchanged files are not read twice in one process.
        """
        return {name: _sha256(path, *_version(path)) for name, path in sorted(self._files().items())}

    def _files(self) -> dict[str, Path]:
        configs: dict[Part, tuple[str, ...]] = {
            "lm": ("config.json",),
            "tokenizer": (),
            "bicodec": ("config.yaml",),
            "wav2vec2": ("config.json", "preprocessor_config.json"),
            "glm": ("config.json", "preprocessor_config.json"),
        }
        found = {"tokenizer/tokenizer.json": self.tokenizer_file} if "tokenizer" in self.parts else {}
        for part in sorted(self.parts - {"tokenizer"}):
            folder = self.layout.folder(part)
            for path in (*(folder / name for name in configs[part]), *weight_files(folder)):
                found[f"{part}/{path.name}"] = path
        if (domain := self.root / SPEECH_DOMAIN).is_file():
            found[SPEECH_DOMAIN] = domain
        return found


def _version(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


@lru_cache(maxsize=256)
def _sha256(path: Path, size: int, modified: int) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
