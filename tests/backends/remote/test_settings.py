"""Options of the remote backend, as a user gives them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gpa_codecs.errors import BackendError, CheckpointError
from gpa_engines.backend_choice import choose_backend
from gpa_engines.backends.remote.local_model import LocalModel, expected_fingerprint
from gpa_engines.backends.remote.settings import FleetSettings
from gpa_engines.fingerprint import FILE, Fingerprint
from gpa_engines.registry import BACKENDS, backend_options, create_engine
from gpa_engines.servers.key import read_key
from tests.engines.test_fingerprint import made


def settings(**options: Any) -> FleetSettings:
    usual = {
        "url": "http://a:1",
        "key_file": None,
        "verify": True,
        "ca_file": None,
        "served_name": None,
        "dtype": "auto",
        "expect": "auto",
        "timeouts": {},
        "recheck": 5.0,
        "tries": 3,
    }
    return FleetSettings.of(**{**usual, **options})


@pytest.mark.parametrize(
    "url", ["http://a:1, https://b/x/v1/", ["http://a:1", "https://b/x"], ("http://a:1,https://b/x/",)]
)
def test_several_servers_are_a_list_or_have_commas_between_them(url: Any) -> None:
    assert [server.url for server in settings(url=url).servers] == ["http://a:1", "https://b/x"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": None}, "needs the servers' addresses: --url http://host:8000"),
        ({"url": []}, "needs the servers' addresses"),
        ({"url": " , "}, "needs the servers' addresses"),
        ({"url": [7]}, r"url is \[7\]"),
        ({"url": "http://a,http://a/v1"}, "url http://a is given twice"),
        ({"verify": "no"}, "verify is 'no'; expected true or false"),
        ({"verify": False, "ca_file": "x.pem"}, "both ca_file and verify=false"),
        ({"ca_file": "/nowhere.pem"}, "ca_file /nowhere.pem: there is no such file"),
        ({"dtype": "fp8"}, "dtype 'fp8' is unknown; expected one of auto, float32"),
        ({"tries": 0}, "tries is 0; expected at least 1"),
        ({"recheck": -1}, "recheck is -1"),
        ({"key_file": "/nowhere"}, "key_file /nowhere: No such file"),
        ({"timeouts": {"stall_timeout": -1}}, "stall_timeout is -1"),
    ],
)
def test_what_cannot_be_used_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BackendError, match=message):
        settings(**options)


def test_the_key_is_a_files_or_the_environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_key(None) is None
    monkeypatch.setenv("GPA_REMOTE_KEY", "from outside")
    assert read_key(None) == "from outside"
    file = tmp_path / "key"
    file.write_text("  from a file\n")
    assert read_key(file) == "from a file"
    found = settings(key_file=file)
    assert found.servers[0].key == "from a file"
    assert "from a file" not in repr(found)
    file.write_text("\n")
    with pytest.raises(BackendError, match="is empty; set GPA_REMOTE_KEY"):
        read_key(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(BackendError, match="it is not text"):
        read_key(file)


def test_the_addresses_may_be_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPA_REMOTE_URL", "http://a:1,http://b:2")
    assert [server.url for server in settings(url=None).servers] == ["http://a:1", "http://b:2"]
    assert [server.url for server in settings(url="http://c:3").servers] == ["http://c:3"]


def test_no_option_takes_a_key_in_clear_and_nothing_chooses_this_backend(folder: Path) -> None:
    assert "key" not in backend_options("remote")
    with pytest.raises(BackendError, match="has no option 'key'"):
        create_engine("remote", folder, key="x")
    assert BACKENDS["remote"].own_format
    assert choose_backend(folder).name != "remote"


def test_the_folder_says_which_ids_end_and_what_they_are_called(folder: Path) -> None:
    local = LocalModel.read(folder)
    assert local.end_ids == {50, 51, 52}
    assert len(local.names) == 8
    assert (local.names[40], local.names[99]) == ("<|40|>", "<|99|>")
    (folder / "tokenizer.json").unlink()
    assert LocalModel.read(folder).names == {}
    (folder / "tokenizer.json").write_text('{"added_tokens": [{"id": 1}]}')
    with pytest.raises(CheckpointError, match="added_tokens cannot be read"):
        LocalModel.read(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        LocalModel.read(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: No such file"):
        LocalModel.read(folder)


def test_what_the_servers_are_compared_with(folder: Path, tmp_path: Path) -> None:
    assert expected_fingerprint(folder, "auto") is None, "no weights, no file"
    made().write(folder / FILE)
    assert expected_fingerprint(folder, "auto") == Fingerprint.read(folder / FILE)
    assert expected_fingerprint(folder, "none") is None
    made(0.2).write(tmp_path / "other.json")
    other = expected_fingerprint(folder, str(tmp_path / "other.json"))
    assert other is not None
    assert other.tops == made(0.2).tops
    with pytest.raises(CheckpointError, match="No such file"):
        expected_fingerprint(folder, "typo")


def test_weights_in_the_folder_are_asked_where_torch_is(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="needs torch")
    found = expected_fingerprint(tiny_checkpoint, "auto")
    assert found is not None
    assert (found.source, found.dtype, found.vocab_size) == ("torch on cpu", "float32", 5141)
    monkeypatch.setattr("gpa_engines.backends.remote.local_model.find_spec", lambda name: None)
    assert expected_fingerprint(tiny_checkpoint, "auto") is None
