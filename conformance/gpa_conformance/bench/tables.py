"""The tables that `gpa-bench engine` prints, made from its JSON document."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

GIBIBYTE = 2**30

Cell = Text | str


def print_tables(values: dict[str, Any], console: Console) -> None:
    """Everything that was measured: contenders side by side, the codec's stages, the jobs, the notes."""
    console.print(_heading(values), soft_wrap=True)
    console.print(_contenders(values["contenders"]))
    if values["codec"]:
        console.print(_codec(values["codec"]))
    if values["jobs"]:
        console.print(_jobs(values["jobs"]))
    for note in values["notes"]:
        console.print(f"note: {note}", soft_wrap=True)


def _heading(values: dict[str, Any]) -> str:
    machine, settings, workload = values["machine"], values["settings"], values["settings"]["workload"]
    foreign = machine["foreign_cores"]
    others = "" if foreign is None else f" (other programs used {foreign:.1f})"
    return (
        f"{machine['cpu']}, {machine['usable_cores']} cores{others}, {settings['threads']} threads; "
        f"prompt {workload['prompt_tokens']} tokens, {workload['new_tokens']} new, {workload['repeats']} rounds\n"
        "median (lowest-highest) of the rounds; x: times the yardstick of the matching dtype, same round"
    )


def _contenders(contenders: list[dict[str, Any]]) -> Table:
    table = _table("engines", "", *(contender["name"] for contender in contenders))

    def row(name: str, cell: Callable[[dict[str, Any]], Cell]) -> None:
        table.add_row(name, *(cell(contender) for contender in contenders))

    if any(contender["failed"] for contender in contenders):
        row("", lambda c: Text(f"failed: {c['failed']}", style="red") if c["failed"] else "ok")
    row("import, s", lambda c: _number(c["import_s"], 1))
    row("load, s", lambda c: _number(c["load_s"], 1))
    for key in dict.fromkeys(key for contender in contenders for key in contender["peak_rss"]):
        row(f"peak RSS, GiB: {key.replace('_', ' ')}", lambda c, key=key: _gib(c["peak_rss"].get(key)))
    for wanted in dict.fromkeys(_key(m) for contender in contenders for m in contender["measurements"]):
        name = _label(*wanted)
        row(f"{name}, tok/s", lambda c, wanted=wanted: _rate(_find(c, wanted)))
        row(f"{name}, CPU ms/token", lambda c, wanted=wanted: _cpu(_find(c, wanted)))
        if wanted[0] == "decode" and wanted[1] > 1:
            row(f"{name}, against batch 1", lambda c, wanted=wanted: _times(_find(c, wanted), "scaling"))
    if any(contender["logits"] for contender in contenders):
        row("logits, rel-L2 to torch/float32", lambda c: _percent(c["logits"], "rel_l2"))
        row("logits, worst position", lambda c: _percent(c["logits"], "worst_rel_l2"))
        row("logits, top-1 agreement", lambda c: _percent(c["logits"], "top1_agreement"))
    return table


def _codec(stages: list[dict[str, Any]]) -> Table:
    columns = ("load, s", "wall, s", "CPU, s", "wall s per s of audio", "CPU s per s of audio", "peak RSS, GiB")
    table = _table(f"codec, {stages[0]['audio_s']:g} s of audio, each stage in its own process", "stage", *columns)
    for stage in stages:
        if stage["failed"]:
            table.add_row(stage["stage"], Text(f"failed: {stage['failed']}", style="red"))
            continue
        table.add_row(
            stage["stage"],
            _number(stage["load_s"], 2),
            _spread(stage["wall_s"], 3),
            _spread(stage["cpu_s"], 3),
            _number(stage["wall_s_per_audio_s"], 3),
            _number(stage["cpu_s_per_audio_s"], 3),
            _gib(stage["peak_rss"]),
        )
    return table


def _jobs(jobs: list[dict[str, Any]]) -> Table:
    columns = ("engine", "load, s", "task, s", "CPU, s", "audio, s", "new tokens", "peak RSS, GiB")
    table = _table("jobs, each in its own process", "job", *columns)
    for job in jobs:
        if job["failed"]:
            table.add_row(job["job"], job["name"], Text(f"failed: {job['failed']}", style="red"))
            continue
        seconds = [_number(job[name], 1) for name in ("load_s", "task_s", "cpu_s", "audio_s")]
        table.add_row(job["job"], job["name"], *seconds, str(job["new_tokens"]), _gib(job["peak_rss"]))
    return table


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", show_lines=False)
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    return table


def _key(measurement: dict[str, Any]) -> tuple[str, int, str]:
    return measurement["kind"], measurement["batch"], measurement["head"]


def _label(kind: str, batch: int, head: str) -> str:
    return "prefill" if kind == "prefill" else f"decode, batch {batch}, {head} head"


def _find(contender: dict[str, Any], wanted: tuple[str, int, str]) -> dict[str, Any] | None:
    return next((m for m in contender["measurements"] if _key(m) == wanted), None)


def _rate(measurement: dict[str, Any] | None) -> Cell:
    if measurement is None or measurement["tokens_per_s"] is None:
        return "-"
    ratio = measurement["ratio"]
    text = Text(_spread(measurement["tokens_per_s"], 1))
    return text.append(f"\n{ratio['median']:.2f}x", style="bold") if ratio else text


def _cpu(measurement: dict[str, Any] | None) -> Cell:
    spent = measurement and measurement["cpu_s_per_token"]
    return f"{spent['median'] * 1000:.1f}" if spent else "-"


def _times(measurement: dict[str, Any] | None, name: str) -> Cell:
    times = measurement and measurement[name]
    return f"{times['median']:.2f}x" if times else "-"


def _spread(spread: dict[str, Any], digits: int) -> str:
    return f"{spread['median']:.{digits}f} ({spread['min']:.{digits}f}-{spread['max']:.{digits}f})"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _gib(value: int | None) -> str:
    return "-" if value is None else f"{value / GIBIBYTE:.2f}"


def _percent(logits: dict[str, Any] | None, name: str) -> str:
    return "-" if logits is None else f"{100 * logits[name]:.3g}%"
