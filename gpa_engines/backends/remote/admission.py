"""What a server has to show before it gets requests: at the start, and when it comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from gpa_codecs.errors import BackendError
from gpa_engines.engine import EngineInfo
from gpa_engines.fingerprint import FILE, Fingerprint
from gpa_engines.servers.kind import ServerEngine

SAME = ("vocab_size", "dtype")


class Admission:
    """Compares servers with what is expected of all of them, and where nothing is, with the first that was let in.

    names: of ids, as the local tokenizer writes them.
    """

    def __init__(self, names: Mapping[int, str], expected: Fingerprint | None) -> None:
        self._names = names
        self._expected = expected
        self._first: EngineInfo | None = None
        self._promised: EngineInfo | None = None

    def promise(self, info: EngineInfo) -> None:
        """From now on a server must have the context and the capabilities of `info`: users have been told so."""
        self._promised = info

    async def admit(self, engine: ServerEngine, info: EngineInfo) -> str:
        """With what its weights were compared, in words. info: the engine's, with a dtype.

        Raises BackendError for a server that has another model, or runs it otherwise than those before.
        """
        await self._check_names(engine)
        self._check_alike(info)
        found = replace(await Fingerprint.take(engine), source=info.device, dtype=info.dtype)
        if self._expected is None:
            self._expected = found
        elif difference := self._expected.difference(found):
            raise BackendError(
                f"{found.source} does not hold the weights of {self._expected.source}: {difference}; start every "
                f"server with the same checkpoint and give that as --model; a {FILE} must have been recorded from it"
            )
        if self._first is None:
            self._first = info
        if self._expected is found:
            return "weights not compared with the checkpoint's"
        return f"weights compared with {self._expected.source}"

    async def _check_names(self, engine: ServerEngine) -> None:
        """The server's tokenizer has no part in the answers, but says which vocabulary its model was made for."""
        written = await engine.token_names(list(self._names))
        for (token, name), other in zip(self._names.items(), written or (), strict=False):
            if name != other:
                raise BackendError(
                    f"{engine.info.device} has another vocabulary: its id {token} is {other!r}, the model folder's is "
                    f"{name!r}; start the server with this checkpoint, or give the folder that it serves as --model"
                )

    def _check_alike(self, info: EngineInfo) -> None:
        first, promised = self._first, self._promised
        if first is None:
            return
        for name in SAME:
            mine, other = getattr(first, name), getattr(info, name)
            if mine != other:
                raise BackendError(
                    f"{info.device} has {name} {other}, {first.device} has {mine}: start all servers alike"
                )
        if promised is None:
            return
        if info.max_context < promised.max_context or not info.capabilities >= promised.capabilities:
            missing = ", ".join(sorted(promised.capabilities - info.capabilities)) or "nothing"
            raise BackendError(
                f"{info.device} has room for {info.max_context} positions and lacks {missing} of what the servers "
                f"before it can do, which have room for {promised.max_context}: start it like them, or all anew"
            )
