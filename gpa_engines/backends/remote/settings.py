"""How servers are reached and judged, from options as a user gives them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpa_codecs.errors import BackendError
from gpa_engines.servers.environment import URL_VARIABLE
from gpa_engines.servers.http_server import ServerAccess
from gpa_engines.servers.key import read_key

DTYPES = ("auto", "float32", "bfloat16", "float16", "int8")


@dataclass(frozen=True, slots=True)
class FleetSettings:
    """See :func:`gpa_engines.backends.remote.create_engine`."""

    servers: tuple[ServerAccess, ...]
    served_name: str | None
    dtype: str
    expect: str
    recheck: float
    tries: int

    @classmethod
    def of(
        cls,
        *,
        url: str | Sequence[str] | None,
        key_file: str | Path | None,
        verify: bool,
        ca_file: str | Path | None,
        served_name: str | None,
        dtype: str,
        expect: str,
        timeouts: Mapping[str, float],
        recheck: float,
        tries: int,
    ) -> FleetSettings:
        """Raises BackendError for a value that cannot be used."""
        if not isinstance(verify, bool):
            raise BackendError(f"verify is {verify!r}; expected true or false")
        if ca_file is not None and not verify:
            raise BackendError("both ca_file and verify=false were given; a certificate is checked or it is not")
        if dtype not in DTYPES:
            raise BackendError(f"dtype {dtype!r} is unknown; expected one of {', '.join(DTYPES)}")
        if type(tries) is not int or tries < 1:
            raise BackendError(f"tries is {tries!r}; expected at least 1")
        if not (isinstance(recheck, int | float) and 0 <= recheck < float("inf")):
            raise BackendError(f"recheck is {recheck!r}; expected seconds, at least 0")
        key = read_key(key_file)
        trust = str(ca_file) if ca_file is not None else verify
        servers = tuple(ServerAccess(each, key, trust, **timeouts) for each in _urls(url))
        for server in servers:
            if sum(each.url == server.url for each in servers) > 1:
                raise BackendError(f"url {server.url} is given twice; expected different servers")
        return cls(servers, served_name, dtype, str(expect), recheck, tries)


def _urls(url: str | Sequence[str] | None) -> list[str]:
    if url is None:
        url = os.environ.get(URL_VARIABLE)
    given = [url] if isinstance(url, str) else list(url or ())
    if any(not isinstance(each, str) for each in given):
        raise BackendError(f"url is {url!r}; expected one or several such as http://host:8000")
    urls = [part.strip() for each in given for part in each.split(",") if part.strip()]
    if not urls:
        raise BackendError(
            "backend 'remote' needs the servers' addresses: --url http://host:8000 for gpa-run, once for every server; "
            f"elsewhere --option url=http://host:8000, or {URL_VARIABLE} in the environment"
        )
    return urls
