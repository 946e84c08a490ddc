"""Which files a model is made of: the backend that is chosen, the codec that it gets, and what does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from gpa_codecs.errors import BackendError, CheckpointError
from gpa_codecs.vocabulary import TokenSpace
from gpa_engines import backend_choice
from gpa_engines.backend_choice import choose_backend
from gpa_engines.checkpoint import PARTS, Checkpoint
from gpa_engines.engine import EngineInfo
from gpa_engines.registry import BACKENDS, Backend, BackendStatus
from gpa_engines.speech import codec_files
from gpa_engines.speech.codec_files import OnnxCodecFiles, TorchCodecFiles, find_codec_files
from gpa_engines.speech.loading import check_vocabulary, find_model, model_folder


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The packages that seem to be installed; none at first."""
    packages: set[str] = set()

    def status(backend: Backend) -> BackendStatus:
        if backend.module and packages.issuperset(backend.packages):
            return BackendStatus(backend, "ready", "")
        return BackendStatus(backend, "missing", "not here", f"pip install 'gpa-engines[{backend.extra}]'")

    def require(name: str) -> Backend:
        if status(BACKENDS[name]).state != "ready":
            raise BackendError(f"backend {name!r} is not installed")
        return BACKENDS[name]

    monkeypatch.setattr(backend_choice, "backend_status", status)
    monkeypatch.setattr(backend_choice, "require_backend", require)
    monkeypatch.setattr(codec_files, "find_spec", lambda package: package if package in packages else None)
    return packages


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model's folder, empty."""
    folder = tmp_path / "model"
    folder.mkdir()
    return folder


def touch(path: Path, content: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def test_auto_takes_the_fastest_installed_backend_of_the_formats_that_are_there(
    model: Path, installed: set[str]
) -> None:
    touch(model / "model.safetensors")
    touch(model / "model-Q8_0.gguf")
    touch(model / "onnx" / "lm" / "manifest.json")
    installed |= {"torch", "llama_cpp", "onnxruntime", "mlx"}
    assert choose_backend(model).name == "llama-cpp"
    installed.remove("llama_cpp")
    assert choose_backend(model).name == "torch"
    installed.remove("torch")
    assert choose_backend(model).name == "onnx"
    installed.remove("onnxruntime")
    choice = choose_backend(model)
    assert (choice.name, choice.reason) == ("mlx", "it is installed and reads this model")
    installed.clear()
    with pytest.raises(BackendError) as refusal:
        choose_backend(model)
    for remedy in ("gpa-engines[torch]", "gpa-engines[llama-cpp]", "gpa-engines[onnx]", "gpa-engines[mlx]"):
        assert remedy in str(refusal.value)


def test_auto_knows_the_accelerators(model: Path, installed: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    touch(model / "model.safetensors")
    touch(model / "gguf" / "model.gguf")
    installed |= {"torch", "llama_cpp", "mlx"}
    rules = {rule.reason: rule for rule in backend_choice.RULES}
    cuda = next(rule for reason, rule in rules.items() if "CUDA" in reason)
    apple = next(rule for reason, rule in rules.items() if "Apple" in reason)
    for rule, name in ((cuda, "torch"), (apple, "mlx")):
        here = type(rule)(rule.backend, rule.format, rule.reason)
        monkeypatch.setattr(backend_choice, "RULES", (here, *rules.values()))
        assert choose_backend(model) == backend_choice.Choice(name, rule.reason)


def test_auto_follows_the_format(model: Path, installed: set[str]) -> None:
    installed |= {"torch", "llama_cpp", "mlx"}
    file = touch(model / "any.gguf")
    assert choose_backend(file).name == "llama-cpp"
    installed.remove("llama_cpp")
    with pytest.raises(BackendError, match="llama-cpp"):
        choose_backend(file)
    file.unlink()
    touch(model / "model.safetensors")
    touch(model / "config.json", json.dumps({"quantization": {"bits": 8}}))
    assert choose_backend(model).name == "mlx"
    touch(model / "tokenizer.json")
    (model / "BiCodec").mkdir()
    with pytest.raises(CheckpointError, match="quantised for MLX, which only backend 'mlx' can read"):
        find_model(model, backend="torch")


def test_an_empty_folder_is_left_to_the_checkpoints_own_checks(model: Path) -> None:
    touch(model / "notes.txt")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        find_model(model)


@pytest.mark.parametrize(
    ("packages", "prefer_torch", "kind"),
    [
        ({"torch", "onnxruntime"}, True, TorchCodecFiles),
        ({"torch", "onnxruntime"}, False, OnnxCodecFiles),
        ({"torch"}, False, TorchCodecFiles),
        ({"onnxruntime"}, True, OnnxCodecFiles),
    ],
)
def test_the_codec_is_torch_beside_torch_and_exported_elsewhere(
    model: Path, installed: set[str], packages: set[str], prefer_torch: bool, kind: type
) -> None:
    installed |= packages
    (model / "BiCodec").mkdir()
    manifest = touch(model / "onnx" / "codec" / "manifest.json")
    found = find_codec_files(model, prefer_torch=prefer_torch)
    assert isinstance(found, kind)
    if isinstance(found, OnnxCodecFiles):
        assert found == OnnxCodecFiles(manifest.parent, "auto")


def test_an_exported_codec_is_found_by_each_of_its_folders(model: Path, installed: set[str]) -> None:
    installed.add("onnxruntime")
    manifest = touch(model / "onnx" / "codec" / "manifest.json", json.dumps({"format": "gpa-onnx-codec"}))
    for home in (model, model / "onnx", model / "onnx" / "codec"):
        assert find_codec_files(home, prefer_torch=True) == OnnxCodecFiles(manifest.parent, "auto")


def test_a_codec_without_its_package_says_what_to_do(model: Path, installed: set[str]) -> None:
    (model / "BiCodec").mkdir()
    with pytest.raises(BackendError, match=r"gpa-engines\[torch\].*to_onnx.*carry the folder onnx"):
        find_codec_files(model, prefer_torch=False)
    touch(model / "onnx" / "codec" / "manifest.json")
    with pytest.raises(BackendError, match=r"gpa-engines\[onnx\]"):
        find_codec_files(model, prefer_torch=False)


def test_a_precision_needs_an_exported_codec(model: Path, installed: set[str]) -> None:
    installed.add("torch")
    (model / "BiCodec").mkdir()
    with pytest.raises(CheckpointError, match=r"no precision to choose.*to_onnx"):
        find_codec_files(model, prefer_torch=True, precision="int8")
    with pytest.raises(BackendError, match=r"--codec-precision .* cannot be combined with --bicodec"):
        find_codec_files(model, prefer_torch=True, precision="int8", bicodec=model)


def test_the_codec_may_lie_elsewhere(tiny_checkpoint: Path, tmp_path: Path) -> None:
    alone = tmp_path / "lm"
    alone.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_checkpoint / name, alone)
    found = find_model(alone, backend="torch", codec=tiny_checkpoint, parts=PARTS)
    assert found.checkpoint.tokenizer_file == tiny_checkpoint / "tokenizer.json"
    assert found.codec == TorchCodecFiles(tiny_checkpoint / "BiCodec", tiny_checkpoint / "glm-4-voice-tokenizer")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        find_model(alone, backend="torch")


def test_a_gguf_file_stands_for_its_folder(tmp_path: Path) -> None:
    assert model_folder(touch(tmp_path / "m" / "a.gguf")) == tmp_path / "m"
    assert model_folder(touch(tmp_path / "m" / "gguf" / "a.gguf")) == tmp_path / "m"
    with pytest.raises(CheckpointError, match=r"a\.gguf is a GGUF file, which backend 'torch' cannot read"):
        find_model(tmp_path / "m" / "a.gguf", backend="torch")


def test_a_model_converted_with_another_tokenizer_is_refused(tiny_checkpoint: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint)
    space = TokenSpace.from_file(checkpoint.tokenizer_file)
    info = EngineInfo("llama-cpp", "cpu", "q8_0", space.vocab_size, 2048, frozenset())
    check_vocabulary(info, checkpoint, space)
    fitting = checkpoint.fingerprint()["tokenizer/tokenizer.json"]
    check_vocabulary(EngineInfo(*_fields(info), tokenizer_sha256=fitting), checkpoint, space)
    with pytest.raises(CheckpointError, match=f"sha256 000000000000.*{fitting[:12]}.*--codec FOLDER or --tokenizer"):
        check_vocabulary(EngineInfo(*_fields(info), tokenizer_sha256="0" * 64), checkpoint, space)
    small = EngineInfo("llama-cpp", "cpu", "q8_0", space.vocab_size - 1, 2048, frozenset())
    with pytest.raises(CheckpointError, match="do not belong together"):
        check_vocabulary(small, checkpoint, space)


def _fields(info: EngineInfo) -> tuple:
    return info.backend, info.device, info.dtype, info.vocab_size, info.max_context, info.capabilities
