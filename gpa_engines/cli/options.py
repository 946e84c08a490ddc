"""What `gpa-run` accepts: every option once, with its help, its default and its name in the program.

Importing this module loads neither the speech model nor NumPy: `--help` stays quick.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from inspect import Parameter, Signature
from typing import Annotated, Any, get_type_hints

from typer import Option

MODEL_VARIABLE = "GPA_MODEL"
"""Environment variable that names the model when --model is not given."""

TASKS = "stt|tts-a|vc|text"

REFERENCE_NAMES = {
    "src_audio_path": "src-audio",
    "ref_audio_path": "ref-audio",
    "gpa_model_path": "model",
    "bicodec_tokenizer_path": "bicodec",
    "tokenizer_path": "glm-tokenizer",
    "text_tokenizer_path": "tokenizer",
    "output_dir": "output-dir",
    "ref_transcript": "ref-transcript",
    "auto_ref_transcript": "auto-ref-transcript",
}
"""Long option names of the reference's gpa_inference.py and what they are called here."""

_MAIN = "Options"
_MODEL = "Model"
_SAMPLING = "Sampling"
_REPORT = "Output"


def _option(*names: str, panel: str, help: str, metavar: str = " ", **more: Any) -> Any:
    """A blank metavar keeps typer from writing <bool> beside a switch."""
    return Option(*names, help=help, metavar=metavar, rich_help_panel=panel, show_default=False, **more)


def _hidden(name: str) -> Any:
    return Option(name, hidden=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """The command line as typed; None is "not given"."""

    task: Annotated[
        str | None,
        _option(
            "--task", panel=_MAIN, metavar=TASKS, help="Transcribe, speak a text, convert a voice, continue a text."
        ),
    ] = None
    text: Annotated[
        str | None,
        _option("--text", panel=_MAIN, metavar="TEXT", help="What to say; - reads standard input."),
    ] = None
    text_file: Annotated[
        str | None,
        _option("--text-file", panel=_MAIN, metavar="FILE", help="What to say, as a file."),
    ] = None
    prompt: Annotated[
        str | None,
        _option("--prompt", panel=_MAIN, metavar="TEXT", help="Text to continue; - reads standard input."),
    ] = None
    src_audio: Annotated[
        str | None,
        _option("--src-audio", panel=_MAIN, metavar="FILE", help="Speech to transcribe or to convert."),
    ] = None
    ref_audio: Annotated[
        str | None,
        _option("--ref-audio", panel=_MAIN, metavar="FILE", help="A clip of the voice to speak in."),
    ] = None
    voice: Annotated[
        str | None,
        _option("--voice", panel=_MAIN, metavar="FILE", help="A voice that --save-voice kept."),
    ] = None
    save_voice: Annotated[
        str | None,
        _option("--save-voice", panel=_MAIN, metavar="FILE", help="Keep the voice of --ref-audio."),
    ] = None
    channel: Annotated[
        str | None,
        _option("--channel", panel=_MAIN, metavar="first|mean|N", help="Channel of audio files (first)."),
    ] = None

    model: Annotated[
        str | None,
        _option(
            "--model",
            panel=_MODEL,
            metavar="NAME",
            help="Folder, .gguf file, AutoArk-AI/GPA (downloads it), demo (spoken digits only) or tiny-random (noise); "
            f"or set {MODEL_VARIABLE} (demo).",
        ),
    ] = None
    backend: Annotated[
        str | None,
        _option("--backend", panel=_MODEL, metavar="NAME", help="Inference engine; auto takes the best one (auto)."),
    ] = None
    device: Annotated[
        str | None,
        _option("--device", panel=_MODEL, metavar="NAME", help="Where it runs, e.g. cpu or cuda:1 (auto)."),
    ] = None
    dtype: Annotated[
        str | None,
        _option("--dtype", panel=_MODEL, metavar="NAME", help="E.g. float32, bfloat16, int8, q8_0 (auto)."),
    ] = None
    threads: Annotated[
        int | None, _option("--threads", panel=_MODEL, metavar="N", help="CPU threads (as the backend chooses).")
    ] = None
    max_tokens_in_flight: Annotated[
        int | None,
        _option("--max-tokens-in-flight", panel=_MODEL, metavar="N", help="Bounds the memory of the cache."),
    ] = None
    url: Annotated[
        list[str] | None,
        _option("--url", panel=_MODEL, metavar="URL", help="A server, for --backend remote; repeat for several."),
    ] = None
    key_file: Annotated[
        str | None,
        _option(
            "--key-file",
            panel=_MODEL,
            metavar="FILE",
            help="Holds the servers' bearer key; or set GPA_REMOTE_KEY.",
        ),
    ] = None
    option: Annotated[
        list[str] | None,
        _option("--option", panel=_MODEL, metavar="KEY=VALUE", help="Another option of the backend; repeat."),
    ] = None
    codec: Annotated[
        str | None,
        _option("--codec", panel=_MODEL, metavar="DIR", help="Folder of the codec, if not the model's."),
    ] = None
    codec_precision: Annotated[
        str | None,
        _option("--codec-precision", panel=_MODEL, metavar="NAME", help="Of an exported decoder: fp32, fp16, int8."),
    ] = None
    bicodec: Annotated[
        str | None, _option("--bicodec", panel=_MODEL, metavar="DIR", help="BiCodec, if not MODEL/BiCodec.")
    ] = None
    glm_tokenizer: Annotated[
        str | None,
        _option("--glm-tokenizer", panel=_MODEL, metavar="DIR", help="If not MODEL/glm-4-voice-tokenizer."),
    ] = None
    tokenizer: Annotated[
        str | None,
        _option("--tokenizer", panel=_MODEL, metavar="PATH", help="tokenizer.json, if not MODEL's."),
    ] = None

    temperature: Annotated[
        float | None,
        _option("--temperature", panel=_SAMPLING, metavar="X", help="0 is greedy (stt, text 0, speech 0.2)."),
    ] = None
    top_k: Annotated[
        int | None, _option("--top-k", panel=_SAMPLING, metavar="N", help="0 is off (stt, text 0, speech 50).")
    ] = None
    top_p: Annotated[float | None, _option("--top-p", panel=_SAMPLING, metavar="X", help="1 is off (1).")] = None
    min_p: Annotated[float | None, _option("--min-p", panel=_SAMPLING, metavar="X", help="0 is off (0).")] = None
    repetition_penalty: Annotated[
        float | None,
        _option("--repetition-penalty", panel=_SAMPLING, metavar="X", help="1 is off (stt, text 1, speech 1.2)."),
    ] = None
    seed: Annotated[
        int | None, _option("--seed", panel=_SAMPLING, metavar="N", help="Repeats a run (a fresh one).")
    ] = None
    max_new_tokens: Annotated[
        int | None,
        _option(
            "--max-new-tokens",
            panel=_SAMPLING,
            metavar="N",
            help="Most per piece; 50 are 1 s of speech (512; text 128).",
        ),
    ] = None
    min_new_tokens: Annotated[
        int | None, _option("--min-new-tokens", panel=_SAMPLING, metavar="N", help="Least per piece (0).")
    ] = None

    output: Annotated[
        str | None,
        _option(
            "--output",
            "-o",
            panel=_REPORT,
            metavar="FILE",
            help="WAV (gpa-output.wav), text file, or report (results_text.json); - is stdout. "
            "An existing file is replaced when the run has succeeded.",
        ),
    ] = None
    stream: Annotated[bool, _option("--stream", panel=_REPORT, help="Write piece by piece; the same in the end.")] = (
        False
    )
    json: Annotated[
        bool,
        _option("--json", panel=_REPORT, help="Report in JSON; with --stream, lines of it."),
    ] = False
    verbose: Annotated[bool, _option("--verbose", "-v", panel=_REPORT, help="Say more; show tracebacks of errors.")] = (
        False
    )

    list_backends: Annotated[
        bool, _option("--list-backends", panel=_MAIN, help="What can run here, what is missing.")
    ] = False
    version: Annotated[bool, _option("--version", panel=_MAIN, help="Print the version.")] = False

    output_dir: Annotated[str | None, _hidden("--output-dir")] = None
    ref_transcript: Annotated[str | None, _hidden("--ref-transcript")] = None
    auto_ref_transcript: Annotated[bool, _hidden("--auto-ref-transcript")] = False

    def given(self) -> set[str]:
        """Names of the fields that were set."""
        return {field.name for field in fields(self) if getattr(self, field.name) not in (None, False, [])}


def signature() -> Signature:
    """The options as keyword parameters, for typer to read."""
    hints = get_type_hints(RunOptions, include_extras=True)
    return Signature(
        [
            Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name])
            for field in fields(RunOptions)
        ]
    )


def flag(name: str) -> str:
    """How a field is written on the command line: "src_audio" -> "--src-audio"."""
    return "--" + name.replace("_", "-")


def normalize(name: str) -> str:
    """An option's name without dashes, the reference's names turned into ours."""
    return REFERENCE_NAMES.get(name, name)


def expand_dash(arguments: list[str], valued: set[str]) -> list[str]:
    """Turn a `-` that stands alone into `--text-file -`; `valued`: the options that a value follows."""
    expanded: list[str] = []
    previous = ""
    for argument in arguments:
        is_value = previous in valued or f"--{normalize(previous.removeprefix('--'))}" in valued
        if argument == "-" and not is_value:
            expanded.append("--text-file")
        expanded.append(argument)
        previous = "" if is_value else argument
    return expanded
