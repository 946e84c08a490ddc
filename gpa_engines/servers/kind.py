"""What a server is: its kind, which module has the engine for it, and what every such engine can be asked."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from gpa_codecs.errors import BackendError
from gpa_engines.engine import Engine
from gpa_engines.servers.http_server import HttpServer, MalformedAnswer, ServerRefused

KINDS = {"vllm": "gpa_engines.servers.vllm_server", "sglang": "gpa_engines.servers.sglang_server"}
"""Kind of server -> the module whose `open_engine(server, kind, expected)` makes an engine of one."""


@dataclass(frozen=True, slots=True)
class ServerKind:
    """name: of `KINDS`. version: as the server says it, "" where it does not."""

    name: str
    version: str


@dataclass(frozen=True, slots=True)
class ExpectedModel:
    """What the local folder and the caller know of the model that a server is to have.

    vocab_size, max_context: of config.json. end_ids: the model's own end ids, which a server may add to ours. dtype:
    what the servers are said to compute in, or "auto". folder: where the model is here; its weights, if it has them,
    turn hidden states into logits. served_name: under which servers have the model, None for the only one.
    """

    vocab_size: int
    max_context: int
    end_ids: frozenset[int]
    dtype: str
    folder: Path
    served_name: str | None = None


@runtime_checkable
class ServerEngine(Engine, Protocol):
    """An Engine over one server. Everything raises ServerError where the server fails."""

    async def busy(self) -> int:
        """Requests that run or wait on the server, whoever sent them. Fails where the server is not healthy."""
        ...

    async def top_scores(self, ids: Sequence[int], count: int) -> dict[int, float]:
        """The `count` best ids after `ids` with their logits or log-probabilities, so up to a constant."""
        ...

    async def token_names(self, ids: Sequence[int]) -> list[str] | None:
        """How the server's own tokenizer writes each of the ids; None where it does not say."""
        ...


OpenEngine = Callable[[HttpServer, ServerKind, ExpectedModel], Awaitable[ServerEngine]]


async def find_kind(server: HttpServer) -> ServerKind:
    """Ask the server what it is. Raises BackendError for one of another kind, ServerError for none that answers."""
    seen: list[str] = []
    models = await _asked(server, "/v1/models", seen)
    for path in ("/get_model_info", "/model_info"):
        info = await _asked(server, path, seen)
        if isinstance(info, dict) and "model_path" in info:
            return ServerKind("sglang", await _sglang_version(server))
    version = await _asked(server, "/version", seen)
    if isinstance(version, dict) and isinstance(version.get("version"), str) and _owner(models) == "vllm":
        return ServerKind("vllm", version["version"])
    owner = _owner(models)
    found = f"its models are owned by {owner!r}" if owner else "; ".join(seen) or "it has no models"
    raise BackendError(
        f"{server.url} is neither a vLLM nor an SGLang server ({found}); start one with the model's folder, as "
        "docs/serving_many_machines.md says, and give its url"
    )


async def open_server(server: HttpServer, expected: ExpectedModel) -> ServerEngine:
    """The engine for a server of any kind. Raises BackendError for one that cannot be used, ServerError as above."""
    kind = await find_kind(server)
    opened: OpenEngine = import_module(KINDS[kind.name]).open_engine
    return await opened(server, kind, expected)


async def _asked(server: HttpServer, path: str, seen: list[str]) -> Any:
    """The JSON at `path`, or None for a server that has something else there, which is noted in `seen`."""
    try:
        return await server.get_json(path)
    except ServerRefused as error:
        if error.status in (401, 403):
            raise
        seen.append(f"{path} has status {error.status}")
    except MalformedAnswer:
        seen.append(f"{path} is not JSON")
    return None


async def _sglang_version(server: HttpServer) -> str:
    for path in ("/server_info", "/get_server_info"):
        info = await _asked(server, path, [])
        if isinstance(info, dict) and isinstance(info.get("version"), str):
            return info["version"]
    return ""


def _owner(models: Any) -> str:
    """Who owns the first of the models that an OpenAI-like server lists, "" for none."""
    listed = models.get("data") if isinstance(models, dict) else None
    first = listed[0] if isinstance(listed, list) and listed else None
    owner = first.get("owned_by") if isinstance(first, dict) else None
    return owner if isinstance(owner, str) else ""
