"""The stages of the recipe, what each needs, and running one of them."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from demo_training.provenance import commit
from demo_training.recipe import Recipe, Report
from gpa_codecs.errors import GpaError
from gpa_codecs.files import write_atomically


@dataclass(frozen=True, slots=True)
class Stage:
    """needs: stages that come before. entry: "module:function" of what runs. result: what it leaves, inside the run's
    folder; a stage whose result is there is done. alone: it has the threads of all that could run beside it.
    """

    name: str
    needs: tuple[str, ...]
    entry: str
    result: str
    about: str
    alone: bool = False

    def is_done(self, out: Path) -> bool:
        return (out / self.result).exists()


STAGES = {
    stage.name: stage
    for stage in (
        Stage("corpus", (), "corpus_stage:make_corpus", "stages/corpus.npz", "configuration and recordings"),
        Stage("semantic", ("corpus",), "semantic:train_semantic", "stages/semantic.safetensors", "semantic codes"),
        Stage("glm", ("corpus",), "glm:train_glm", "stages/glm.safetensors", "GLM codes"),
        Stage("tokens", ("semantic", "glm"), "tokens:make_tokens", "stages/tokens.npz", "corpus of codes"),
        Stage("voice", ("semantic",), "voice:train_voice", "stages/voice.safetensors", "global codes"),
        Stage("lm", ("tokens", "voice"), "lm:train_lm", "stages/lm.safetensors", "language model"),
        Stage("generator", ("voice",), "generator:train_generator", "stages/generator.safetensors", "wave generator"),
        Stage("echo", ("tokens", "generator"), "echo:make_echo", "stages/echo.npz", "codes of what the codec speaks"),
        Stage(
            "tuning", ("lm", "echo"), "lm:tune_lm", "stages/tuning.safetensors", "language model, longer", alone=True
        ),
        Stage("export", ("tuning",), "export:export", "checkpoint/model.safetensors", "released layout"),
        Stage("domain", ("export",), "domain:write_domain", "checkpoint/speech_domain.json", "held-out recordings"),
        Stage("listen", ("export",), "gates:listen", "stages/gates-listen.json", "gates: stt, codec, vc"),
        Stage("speak", ("export",), "gates:speak", "stages/gates-speak.json", "gates: tts-a"),
        Stage("gates", ("domain", "listen", "speak"), "gates:conclude", "checkpoint/gates.json", "verdict"),
    )
}
"""In an order in which they can run one after the other."""


def run_stage(stage: Stage, recipe: Recipe, show: Report) -> None:
    """Run one stage here, and keep its log in `logs/NAME.jsonl` and a summary in `logs/NAME.json`.

    show: told of the progress too. Raises GpaError where a stage before it is not done.
    """
    if missing := [name for name in stage.needs if not STAGES[name].is_done(recipe.out)]:
        raise GpaError(f"stage {stage.name!r} needs stage {missing[0]!r}, which is not done in {recipe.out}")
    for folder in ("stages", "work", "logs"):
        (recipe.out / folder).mkdir(parents=True, exist_ok=True)
    log = recipe.out / "logs" / f"{stage.name}.jsonl"
    code = commit()
    began = time.perf_counter()
    begin_cpu = time.process_time()
    last: dict[str, float] = {}

    def report(done: int, total: int, figures: dict[str, float]) -> None:
        nonlocal last
        last = figures or last
        line = {"done": done, "total": total, "seconds": round(time.perf_counter() - began, 1)}
        rounded = {name: round(value, 4) for name, value in figures.items()}
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line | rounded) + "\n")
        show(done, total, figures)

    module, _, function = stage.entry.partition(":")
    run: Callable[[Recipe, Report], None] = getattr(importlib.import_module(f"demo_training.{module}"), function)
    run(recipe, report)
    summary = {
        "commit": code,
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(time.process_time() - begin_cpu, 1),
        "figures": {name: round(value, 4) for name, value in last.items()},
    }
    write_atomically(recipe.out / "logs" / f"{stage.name}.json", (json.dumps(summary, indent=2) + "\n").encode())
