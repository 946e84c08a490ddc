"""The remote backend: vLLM and SGLang servers on other machines, one or several behind one engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpa_engines.spread_engine import SpreadEngine


def create_engine(
    model_dir: str | Path,
    *,
    url: str | Sequence[str] | None = None,
    key_file: str | Path | None = None,
    verify: bool = True,
    ca_file: str | Path | None = None,
    served_name: str | None = None,
    dtype: str = "auto",
    expect: str = "auto",
    connect_timeout: float = 10.0,
    start_timeout: float = 300.0,
    stall_timeout: float = 60.0,
    recheck: float = 5.0,
    tries: int = 3,
) -> SpreadEngine:
    """Connect to servers that hold the language model of a checkpoint, and see that they do.

    model_dir: needs only config.json and the tokenizer's files of the checkpoint, no weights.
    url: `http://host:port` or https; several as a list or with commas between them. A request goes where the fewest
        run, whoever sent them. None takes the environment variable GPA_REMOTE_URL.
    key_file: a file that holds the bearer key of all servers; None takes the environment variable GPA_REMOTE_KEY.
    verify: whether the servers' TLS certificates are checked. ca_file: authorities that they are checked against, in
        place of the system's.
    served_name: under which the servers have the model; None is the only one that they have.
    dtype: what the servers compute in. "auto" sees it in their logits where they give whole rows, and else takes
        config.json's, which is what a server takes that is not told otherwise.
    expect: what the servers' weights are compared with: a file that `gpa-run fingerprint` wrote, "none" for nothing
        but each other, or "auto": fingerprint.json in the folder, else the folder's own weights where it has some and
        torch is installed, else each other.
    connect_timeout, start_timeout, stall_timeout: seconds until a server is connected or answers a short question,
        until an answer's first byte, which includes its wait behind other requests, and from then on between bytes.
    recheck: seconds after which a server that failed is asked again, as long as requests come.
    tries: servers on which a request may begin that has given nothing yet.
    Raises BackendError for a value that cannot be used and for a server that is none, or has another model;
    ServerError where none can be reached or the key is wrong; CheckpointError for a damaged folder. A server that
    cannot be reached beside one that can is taken in when it comes.
    """
    from gpa_engines.backends.remote.fleet import build_engine
    from gpa_engines.backends.remote.settings import FleetSettings

    settings = FleetSettings.of(
        url=url,
        key_file=key_file,
        verify=verify,
        ca_file=ca_file,
        served_name=served_name,
        dtype=dtype,
        expect=expect,
        timeouts={"connect_timeout": connect_timeout, "start_timeout": start_timeout, "stall_timeout": stall_timeout},
        recheck=recheck,
        tries=tries,
    )
    return build_engine(Path(model_dir), settings)
