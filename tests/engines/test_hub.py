"""What a user names as the model becomes a folder; a hub id is downloaded, here from a fake hub on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import pytest

from gpa_codecs.errors import CheckpointError
from gpa_engines.checkpoint import Checkpoint
from gpa_engines.hub import resolve_model
from gpa_engines.random_checkpoint import make_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"

EXTRA = ("optimizer.pt", "checkpoint-100/model.safetensors", "model.gguf", "pytorch_model.bin", "samples/a.wav")
"""Files of a repository that inference never reads."""


class FakeHub(BaseHTTPRequestHandler):
    """The part of the hub's HTTP interface that a snapshot download uses, in the shape of its documentation."""

    files: ClassVar[dict[str, Path | bytes]] = {}
    fetched: ClassVar[list[str]] = []
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.split("?")[0]
        if "/someone/secret" in path:
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo"}, with_body)
        elif "/someone/broken" in path:
            self._send(500, b"{}", {}, with_body)
        elif "/someone/model" not in path:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, with_body)
        elif path == "/api/models/someone/model/revision/no-such-branch":
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, with_body)
        elif path.startswith("/api/models/someone/model/revision/"):
            siblings = [{"rfilename": name} for name in self.files]
            self._send(200, json.dumps({"id": "someone/model", "sha": COMMIT, "siblings": siblings}).encode(), {}, True)
        elif path == f"/api/models/someone/model/tree/{COMMIT}":
            tree = [
                {"type": "file", "path": name, "size": len(self._content(name)), "oid": self._etag(name)}
                for name in self.files
            ]
            self._send(200, json.dumps(tree).encode(), {}, True)
        else:
            name = path.removeprefix(f"/someone/model/resolve/{COMMIT}/")
            headers = {"ETag": f'"{self._etag(name)}"', "X-Repo-Commit": COMMIT}
            if with_body:
                self.fetched.append(name)
            self._send(200, self._content(name), headers, with_body)

    def _content(self, name: str) -> bytes:
        content = self.files[name]
        return content if isinstance(content, bytes) else content.read_bytes()

    def _etag(self, name: str) -> str:
        return hashlib.sha1(self._content(name)).hexdigest()

    def _send(self, status: int, body: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("made") / "tiny", "tiny", 0)


@pytest.fixture
def hub(made: Path) -> Iterator[str]:
    """Address of a fake hub with one model, someone/model, which is the tiny checkpoint and what training left."""
    FakeHub.files = {path.relative_to(made).as_posix(): path for path in made.rglob("*") if path.is_file()}
    FakeHub.files |= dict.fromkeys(EXTRA, b"not for inference")
    FakeHub.fetched = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def resolve(name: str, home: Path, endpoint: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run resolve_model in its own process, as huggingface_hub reads its environment when it is imported."""
    code = (
        "import sys; from gpa_engines.hub import resolve_model; from gpa_codecs.errors import CheckpointError\n"
        "try: print(resolve_model(sys.argv[1]))\n"
        "except CheckpointError as error: sys.exit(f'refused: {error}')"
    )
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_ETAG_TIMEOUT": "2"}
    dropped = ("HF_TOKEN", "HF_HUB_CACHE", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "all_proxy")
    inherited = {name: value for name, value in os.environ.items() if name not in dropped}
    return subprocess.run(
        [sys.executable, "-c", code, name],
        env={**inherited, **settings, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_a_folder_is_used_as_it_is_without_huggingface_hub(made: Path) -> None:
    assert resolve_model(str(made)) == made
    code = (
        f"import sys; from gpa_engines.hub import resolve_model; resolve_model({str(made)!r});"
        "print('huggingface_hub' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_relative_folder_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "AutoArk-AI" / "GPA").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("AutoArk-AI/GPA") == Path("AutoArk-AI/GPA")


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gpa").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert resolve_model("~/gpa") == tmp_path / "gpa"


def test_tiny_random_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPA_ENGINES_CACHE", str(tmp_path))
    folder = resolve_model("tiny-random")
    assert folder.parent == tmp_path
    Checkpoint.open(folder)


@pytest.mark.parametrize(
    "name",
    ["", "GPA", "./owner/name", "../name", "/no/such/folder", "~/nothing-here", "a/b/c", "owner/", "owner/name@"],
)
def test_what_is_no_folder_and_no_hub_id_is_refused_without_the_network(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"no such folder; expected .* hub id .* tiny-random"):
        resolve_model(name)


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="is a file; expected the folder"):
        resolve_model(str(tmp_path / "model.safetensors"))


def test_a_hub_id_is_downloaded_once_and_without_what_inference_never_reads(
    hub: str, made: Path, tmp_path: Path
) -> None:
    done = resolve("someone/model", tmp_path, hub)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert COMMIT in folder.parts
    Checkpoint.open(folder).token_space()
    wanted = {path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file()}
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == wanted
    assert sorted(FakeHub.fetched) == sorted(wanted)
    assert (folder / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()
    FakeHub.fetched.clear()
    assert resolve("someone/model@main", tmp_path, hub).stdout == done.stdout
    assert FakeHub.fetched == []
    offline = resolve("someone/model", tmp_path, hub, HF_HUB_OFFLINE="1")
    assert offline.stdout == done.stdout, offline.stderr


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("someone/nothing", "no such folder here, and no such model on the hub"),
        ("someone/secret", "asks for permission"),
        ("someone/model@no-such-branch", "no revision 'no-such-branch'"),
        ("someone/broken", "hf download someone/broken --local-dir FOLDER"),
    ],
)
def test_what_the_hub_refuses_is_explained(hub: str, tmp_path: Path, name: str, expected: str) -> None:
    done = resolve(name, tmp_path, hub)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert f"refused: {name.split('@')[0]}: " in done.stderr
    assert expected in done.stderr


def test_a_repository_of_something_else_is_refused(hub: str, tmp_path: Path) -> None:
    FakeHub.files = {"weights.gguf": b"x", "data.csv": b"1,2"}
    done = resolve("someone/model", tmp_path, hub)
    assert "the repository has no config.json" in done.stderr


def test_no_network_says_how_to_do_without(tmp_path: Path) -> None:
    done = resolve("AutoArk-AI/GPA", tmp_path, "http://127.0.0.1:9")
    assert "the hub cannot be reached" in done.stderr
    assert "ModelScope" in done.stderr
    assert "--model FOLDER" in done.stderr
    offline = resolve("AutoArk-AI/GPA", tmp_path, "http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE forbids" in offline.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fill_the_disk(*args: object, **options: object) -> str:
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")
        return ""

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fill_the_disk)
    with pytest.raises(CheckpointError, match=r"the disk is full.*HF_HOME"):
        resolve_model("someone/model")


def test_the_user_is_told_before_the_download_begins(hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    said: list[str] = []

    def download(repository: str, **options: object) -> str:
        assert said == ["someone/model: looking for it in huggingface_hub's cache, else downloading it"]
        assert options["revision"] is None
        (tmp_path / "config.json").write_text("{}")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("someone/model", progress=said.append) == tmp_path
