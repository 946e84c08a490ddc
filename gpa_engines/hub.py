"""From what a user names as the model to a path: a local folder or .gguf file, `demo`, `tiny-random`, or a hub id."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from pathlib import Path

from gpa_codecs.errors import CheckpointError
from gpa_engines.demo import DEMO, demo_checkpoint
from gpa_engines.random_checkpoint import tiny_random_checkpoint

GGUF_SUFFIX = ".gguf"

TINY_RANDOM = "tiny-random"
"""Name of the cached checkpoint of random weights."""

PATTERNS = (
    *("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json"),
    *("special_tokens_map.json", "chat_template.jinja", "README.md", "LICENSE*"),
    *("BiCodec/config.yaml", "BiCodec/*.safetensors", "BiCodec/*.safetensors.index.json"),
    *("BiCodec/wav2vec2-large-xlsr-53/*.json", "BiCodec/wav2vec2-large-xlsr-53/*.safetensors"),
    "BiCodec/wav2vec2-large-xlsr-53/pytorch_model*.bin",
    *("glm-4-voice-tokenizer/*.json", "glm-4-voice-tokenizer/*.safetensors"),
)
"""Files of the released layout; nothing else of a repository is downloaded."""

_PART = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
_HUB_ID = re.compile(rf"(?P<repository>{_PART}/{_PART})(?:@(?P<revision>[A-Za-z0-9._/-]+))?")

Progress = Callable[[str], None]
"""Called with one line about what begins and may take long."""


def resolve_model(name: str, *, progress: Progress | None = None) -> Path:
    """The folder (or .gguf file) of the model that a user named.

    name: an existing folder or .gguf file (used as it is, without any network), `demo` (comes with the package),
    `tiny-random` (made and cached on first use), or a hub id `owner/name[@revision]`, whose files of the released
    layout are downloaded into huggingface_hub's cache, with its progress bars on standard error; HF_ENDPOINT, HF_HOME,
    HF_TOKEN and HF_HUB_OFFLINE are respected.
    Raises CheckpointError saying what to do.
    """
    path = Path(name).expanduser()
    if name and (path.is_dir() or (path.is_file() and path.suffix == GGUF_SUFFIX)):
        return path
    if name == DEMO:
        return demo_checkpoint()
    if name == TINY_RANDOM:
        return tiny_random_checkpoint()
    if name and path.exists():
        raise CheckpointError(
            f"{name} is a file; expected the folder of a checkpoint, a {GGUF_SUFFIX} file, a hub id, {DEMO} "
            f"or {TINY_RANDOM}"
        )
    match = _HUB_ID.fullmatch(name)
    if match is None:
        raise CheckpointError(
            f"{name!r}: no such folder; expected the folder of a checkpoint, a hub id such as AutoArk-AI/GPA, "
            f"{DEMO} or {TINY_RANDOM}"
        )
    return _download(match["repository"], match["revision"], progress)


def _download(repository: str, revision: str | None, progress: Progress | None) -> Path:
    from huggingface_hub import snapshot_download

    if progress is not None:
        progress(f"{repository}: looking for it in huggingface_hub's cache, else downloading it")
    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=list(PATTERNS)))
    except Exception as error:  # its network errors differ from version to version and share no base class
        raise CheckpointError(f"{repository}: {_explain(error, repository, revision)}") from error
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{repository}: the repository has no config.json; it is not a GPA checkpoint")
    return folder


def _explain(error: Exception, repository: str, revision: str | None) -> str:
    """What went wrong and what to do about it."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "the hub asks for permission: request access on the model's page, run `hf auth login` and try again"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such folder here, and no such model on the hub (if it is private, run `hf auth login` first)"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the hub has this model, but no revision {revision!r} of it"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; the weights take about 4 GB: free some space, or set HF_HOME to a folder elsewhere"
    by_hand = (
        f"try again, or fetch it by hand (`hf download {repository} --local-dir FOLDER`; GPA is also on ModelScope, "
        "`modelscope download --model AutoArk/GPA --local_dir FOLDER`) and give --model FOLDER"
    )
    cause = error.__cause__ or error
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return f"not downloaded yet, and HF_HUB_OFFLINE forbids to: unset it and {by_hand}"
    what = "not downloaded yet, and the hub cannot be reached"
    if not isinstance(error, errors.LocalEntryNotFoundError):
        what = "the download failed"
    return f"{what} ({_first_line(cause)}): {by_hand}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
