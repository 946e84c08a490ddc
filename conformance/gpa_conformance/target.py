"""The engine under test: a backend of the registry by name, or anyone's factory by its import path."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from gpa_codecs.errors import BackendError, GpaError
from gpa_engines.engine import Engine, EngineInfo
from gpa_engines.lm_config import LMConfig
from gpa_engines.registry import create_engine, require_backend

MEMBERS = ("info", "generate", "logits", "close")
"""What an object needs to be an Engine."""


@dataclass(frozen=True, slots=True)
class Target:
    """How to open the engine under test.

    kind: "backend" takes `name` from the registry; "factory" imports it: `package.module:factory`, called as
    `factory(model_dir, **options) -> Engine`, async or not. options: what was given on the command line, nothing else.
    """

    kind: Literal["backend", "factory"]
    name: str
    model_dir: Path
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"--backend {self.name}" if self.kind == "backend" else f"--engine {self.name}"

    async def open(self) -> Engine:
        """Load the engine. Raises BackendError for whatever is wrong with the target, CheckpointError for its model."""
        if self.kind == "backend":
            engine: object = create_engine(self.name, self.model_dir, **self.options)
        else:
            engine = await self._call_factory(load_attribute("--engine", self.name))
        return check_engine(engine, str(self), LMConfig.from_file(self.model_dir / "config.json").vocab_size)

    async def _call_factory(self, factory: Callable[..., object]) -> object:
        self._check_options(factory)
        try:
            made = factory(self.model_dir, **self.options)
            return await made if isinstance(made, Awaitable) else made
        except GpaError:
            raise
        except Exception as error:
            raise BackendError(
                f"{self}: the factory failed for {self.model_dir} with {type(error).__name__}: {error}"
            ) from error

    def _check_options(self, factory: Callable[..., object]) -> None:
        try:
            parameters = list(inspect.signature(factory).parameters.values())
        except (TypeError, ValueError):  # some builtins have no signature
            return
        if any(each.kind is each.VAR_KEYWORD for each in parameters):
            return
        positional = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
        if not positional and not any(each.kind is each.VAR_POSITIONAL for each in parameters):
            raise BackendError(f"{self}: the factory takes no argument; expected factory(model_dir, **options)")
        known = [each.name for each in parameters[1:] if each.kind in (each.KEYWORD_ONLY, each.POSITIONAL_OR_KEYWORD)]
        for option in self.options:
            if option not in known:
                raise BackendError(f"{self} has no option {option!r}; its options: {', '.join(known) or 'none'}")


def make_target(
    model_dir: Path, *, backend: str | None = None, engine: str | None = None, options: Mapping[str, Any]
) -> Target:
    """The target of a command line, with what can be checked before anything is loaded. Raises BackendError."""
    if (backend is None) == (engine is None):
        raise BackendError("name what to test with either --backend NAME or --engine package.module:factory")
    if backend is not None:
        return Target("backend", require_backend(backend).name, model_dir, dict(options))
    assert engine is not None
    split_path("--engine", engine)
    return Target("factory", engine, model_dir, dict(options))


def split_path(flag: str, path: str) -> tuple[str, str]:
    """(module, attribute) of `package.module:attribute`. Raises BackendError for another form."""
    module, separator, attribute = path.partition(":")
    parts = (*module.split("."), *attribute.split("."))
    if not separator or not all(part.isidentifier() for part in parts):
        raise BackendError(f"{flag} {path!r}: expected package.module:factory, for example my_engine.torch:create")
    return module, attribute


def load_attribute(flag: str, path: str) -> Callable[..., Any]:
    """What `package.module:attribute` names; modules of the working directory are found too. Raises BackendError."""
    module_name, attribute = split_path(flag, path)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise BackendError(
                f"{flag} {path}: there is no module {error.name!r}; install it, or run in the folder that holds it"
            ) from error
        raise BackendError(f"{flag} {path}: importing {module_name} needs {error.name!r}: install it") from error
    except Exception as error:
        raise BackendError(f"{flag} {path}: importing {module_name} failed: {type(error).__name__}: {error}") from error
    for name in attribute.split("."):
        if not hasattr(found, name):
            public = ", ".join(each for each in dir(found) if not each.startswith("_"))
            raise BackendError(f"{flag} {path}: {module_name} has no {attribute!r}; it has: {public or 'nothing'}")
        found = getattr(found, name)
    if not callable(found):
        raise BackendError(f"{flag} {path} is {found!r}; expected something to call with the model's folder")
    return found


def check_engine(engine: object, target: str, vocab_size: int) -> Engine:
    """The object as an Engine of the checkpoint. Raises BackendError naming the member or the value that is wrong."""
    missing = [name for name in MEMBERS if not hasattr(type(engine), name) and not hasattr(engine, name)]
    if missing:
        raise BackendError(
            f"{target} gave {type(engine).__name__}, which is not an Engine: it has no {', '.join(missing)} "
            "(see gpa_engines.engine.Engine)"
        )
    try:
        info: object = engine.info  # pyright: ignore[reportAttributeAccessIssue]
    except Exception as error:
        raise BackendError(f"{target}: asking for info failed with {type(error).__name__}: {error}") from error
    if not isinstance(info, EngineInfo):
        raise BackendError(f"{target}: info is {type(info).__name__}; expected a gpa_engines.engine.EngineInfo")
    if info.vocab_size != vocab_size:
        raise BackendError(
            f"{target}: the engine's vocabulary has {info.vocab_size} ids, the checkpoint's {vocab_size}: "
            "it is another model, or its embedding was cut or padded; info.vocab_size and the width of the logits "
            "must be config.json's vocab_size"
        )
    return cast(Engine, engine)
