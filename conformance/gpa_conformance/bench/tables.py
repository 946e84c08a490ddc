"""The tables that `gpa-bench engine` prints, made from its JSON document."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

GIBIBYTE = 2**30


def print_tables(values: dict[str, Any], console: Console) -> None:
    """Everything that was measured: contenders side by side, the codec's stages, the jobs, the notes."""
    console.print(_heading(values), soft_wrap=True)
    console.print(_speed(values["contenders"]))
    console.print(_cpu(values["contenders"]))
    console.print(_costs(values["contenders"]))
    if values["codec"]:
        console.print(_codec(values["codec"]))
    if values["jobs"]:
        console.print(_jobs(values["jobs"]))
    for contender in values["contenders"]:
        if contender["failed"]:
            console.print(Text(f"{contender['name']} failed: {contender['failed']}", style="red"), soft_wrap=True)
    for note in values["notes"]:
        console.print(f"note: {note}", soft_wrap=True)


def _heading(values: dict[str, Any]) -> str:
    machine, settings, workload = values["machine"], values["settings"], values["settings"]["workload"]
    foreign = machine["foreign_cores"]
    others = "" if foreign is None else f" (other programs used {foreign:.1f})"
    return (
        f"{machine['cpu']}, {machine['usable_cores']} cores{others}, {settings['threads']} threads; "
        f"prompt {workload['prompt_tokens']} tokens, {workload['new_tokens']} new, {workload['repeats']} rounds\n"
        "median (lowest-highest) of the rounds"
    )


def _speed(contenders: list[dict[str, Any]]) -> Table:
    wanted = _wanted(contenders)
    title = "tokens per second; x: times the yardstick of the matching dtype; /: times batch 1 of the same head"
    table = _table(title, "engine", *(_label(*key) for key in wanted))
    for contender in contenders:
        table.add_row(contender["name"], *(_rate(_find(contender, key)) for key in wanted), end_section=True)
    return table


def _cpu(contenders: list[dict[str, Any]]) -> Table:
    wanted = _wanted(contenders)
    table = _table("CPU milliseconds per token, all threads", "engine", *(_label(*key) for key in wanted))
    for contender in contenders:
        spent = [(_find(contender, key) or {}).get("cpu_s_per_token") for key in wanted]
        table.add_row(contender["name"], *(f"{s['median'] * 1000:.1f}" if s else "-" for s in spent))
    return table


def _costs(contenders: list[dict[str, Any]]) -> Table:
    batches = sorted({batch for _, batch, _ in _wanted(contenders)})
    peaks = ["loaded", *(f"batch_{batch}" for batch in batches), "race"]
    distances = {"rel-L2": "rel_l2", "worst rel-L2": "worst_rel_l2", "top-1": "top1_agreement"}
    named = [f"peak GiB, {key.replace('_', ' ')}" for key in peaks]
    title = "loading, peak resident memory, logits against torch/float32"
    table = _table(title, "engine", "import, s", "load, s", *named, *distances)
    for contender in contenders:
        table.add_row(
            contender["name"],
            _number(contender["import_s"], 1),
            _number(contender["load_s"], 1),
            *(_gib(contender["peak_rss"].get(key)) for key in peaks),
            *(_percent(contender["logits"], name) for name in distances.values()),
        )
    return table


def _codec(stages: list[dict[str, Any]]) -> Table:
    columns = ("in", "load, s", "wall, s", "CPU, s", "wall s per s of audio", "CPU s per s of audio", "x torch")
    title = f"codec, {stages[0]['audio_s']:g} s of audio, each stage in its own process"
    table = _table(title, "stage", *columns, "peak RSS, GiB")
    for stage in stages:
        if stage["failed"]:
            table.add_row(stage["stage"], stage["kind"], Text(f"failed: {stage['failed']}", style="red"))
            continue
        table.add_row(
            stage["stage"],
            stage["kind"],
            _number(stage["load_s"], 2),
            _spread(stage["wall_s"], 3),
            _spread(stage["cpu_s"], 3),
            _number(stage["wall_s_per_audio_s"], 3),
            _number(stage["cpu_s_per_audio_s"], 3),
            _spread(stage["speed_up"], 2) if stage["speed_up"] else "-",
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
    table = Table(title=title, title_justify="left", show_lines=False, title_style="bold")
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _key(measurement: dict[str, Any]) -> tuple[str, int, str]:
    return measurement["kind"], measurement["batch"], measurement["head"]


def _label(kind: str, batch: int, head: str) -> str:
    return "prefill" if kind == "prefill" else f"batch {batch}, {head}"


def _wanted(contenders: list[dict[str, Any]]) -> list[tuple[str, int, str]]:
    """Every measurement that a contender was to take, in the order of a round."""
    keys = (_key(measurement) for contender in contenders for measurement in contender["measurements"])
    return sorted(dict.fromkeys(keys), key=lambda key: (key[0] != "prefill", key[1], key[2] != "full"))


def _find(contender: dict[str, Any], wanted: tuple[str, int, str]) -> dict[str, Any] | None:
    return next((m for m in contender["measurements"] if _key(m) == wanted), None)


def _rate(measurement: dict[str, Any] | None) -> Text:
    if measurement is None or measurement["tokens_per_s"] is None:
        return Text("-")
    rate, ratio, scaling = measurement["tokens_per_s"], measurement["ratio"], measurement["scaling"]
    text = Text(f"{rate['median']:.1f}\n({rate['min']:.1f}-{rate['max']:.1f})")
    if ratio:
        text.append(f"\n{ratio['median']:.2f}x", style="bold")
    if scaling:
        text.append(f"\n/ {scaling['median']:.2f}", style="bold")
    return text


def _spread(spread: dict[str, Any], digits: int) -> str:
    return f"{spread['median']:.{digits}f} ({spread['min']:.{digits}f}-{spread['max']:.{digits}f})"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _gib(value: int | None) -> str:
    return "-" if value is None else f"{value / GIBIBYTE:.2f}"


def _percent(logits: dict[str, Any] | None, name: str) -> str:
    return "-" if logits is None else f"{100 * logits[name]:.3g}%"
