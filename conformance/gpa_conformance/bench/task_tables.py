"""The tables that accuracy, speed, memory and full print, made from their JSON documents."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

MEBIBYTE = 2**20


def print_accuracy(values: dict[str, Any], console: Console) -> None:
    """Prompt by prompt as the Ascend report has it, the total, and a verdict line for each of its limits."""
    console.print(_heading("accuracy", values), soft_wrap=True)
    table = _table("last position of each prompt", "prompt", "tokens", "rel_L2", "cosine", "top-1", "top-5", "verdict")
    for row in values["prompts"]:
        last = row["last"]
        if last is None:
            table.add_row(Text(row["text"]), str(row["positions"]), "no logits")
            continue
        table.add_row(
            Text(row["text"]),
            str(row["positions"]),
            _percent(last["rel_l2"]),
            _cosine(last["cosine"]),
            "yes" if last["top1"] == 1 else "no",
            f"{last['top5']:g}/5",
            _word(all(verdict["passed"] for verdict in row["verdicts"])),
        )
    for name, title in (("last", "all last positions"), ("all", "all positions")):
        total = values["total"][name]
        if total is not None:
            table.add_row(
                title,
                str(total["positions"]),
                _percent(total["rel_l2"]),
                _cosine(total["cosine"]),
                f"{total['top1_matches']}/{total['positions']}",
                f"{total['top5']:.2f}/5",
                style="bold",
            )
    console.print(table)
    if values["verdicts"]:
        console.print("as in the Ascend report:")
    for verdict in values["verdicts"]:
        shown = _figure(verdict["metric"], verdict["value"])
        limit = _figure(verdict["metric"], verdict["limit"])
        where = "last positions" if verdict["scope"] == "last" else "all positions"
        line = f" {_NAMES[verdict['metric']]}: {shown} {verdict['relation']} {limit} ({where})"
        console.print(Text.assemble(_word(verdict["passed"]), line), soft_wrap=True)
    if values["checks"]:
        held = sum(check["passed"] for check in values["checks"])
        name, count = values["judged_by"], len(values["checks"])
        line = f" {held} of {count} {name} limits hold (all positions); these decide"
        console.print(Text.assemble(_word(values["passed"]), line), soft_wrap=True)
    _notes(values, console)


def print_speed(values: dict[str, Any], console: Console) -> None:
    """The Ascend report's figures, one a line."""
    console.print(_heading("speed", values), soft_wrap=True)
    settings, latency, memory = values["settings"], values["latency_s"], values["memory"]["after"]
    if latency is not None:
        title = (
            f"{settings['new_tokens']} new tokens after {values['prompt_tokens']}, "
            f"{latency['count']} iterations, {settings['warm_up']} to warm up"
        )
        console.print(title, soft_wrap=True)
        table = _table(None, "figure", "value")
        table.add_row("throughput", f"{values['throughput_tokens_per_s']:.1f} tok/s")
        for name in ("mean", "median", "p99", "min", "max"):
            table.add_row(f"latency, {name}", f"{latency[name]:.3f} s")
        table.add_row("first token, median", f"{values['first_token_s']['median']:.3f} s")
        if memory is not None:
            table.add_row("memory allocated", _mebibytes(memory["allocated"]))
            table.add_row("memory reserved", _mebibytes(memory["reserved"]))
        table.add_row("load time", f"{values['engine']['load_s']:.1f} s")
        console.print(table)
        if memory is not None:
            console.print(f"memory: {memory['source']}", soft_wrap=True)
    _notes(values, console)


def print_memory(values: dict[str, Any], console: Console) -> None:
    """Stage by stage."""
    console.print(_heading("memory", values), soft_wrap=True)
    columns = ("allocated", "reserved", "peak allocated", "peak reserved", "process, now", "process, peak")
    table = _table(
        f"MiB; weights on disk: {_mebibytes(values['checkpoint']['lm_bytes'])}", "stage", "seconds", *columns
    )
    for stage in values["stages"]:
        memory = stage["memory"]
        figures = ("allocated", "reserved", "peak_allocated", "peak_reserved", "host_resident", "host_peak_resident")
        table.add_row(_stage(stage), f"{stage['seconds']:.2f}", *(_mebibytes(memory[name], "") for name in figures))
    console.print(table)
    if values["stages"]:
        since = "each stage" if values["stages"][-1]["peak_since"] == "stage" else "the whole run"
        console.print(f"memory: {values['stages'][-1]['memory']['source']}; peaks are of {since}", soft_wrap=True)
    _notes(values, console)


def print_texts(values: dict[str, Any], console: Console) -> None:
    """Prompts and the beginnings of what followed."""
    table = _table("text", "prompt", "continuation", "tokens", "ended by")
    for result in values["results"]:
        text = result["text"].replace("\n", " ")
        shown = text if len(text) <= 60 else text[:59] + "…"
        table.add_row(Text(result["prompt"]), Text(shown), str(result["new_tokens"]), result["finish_reason"])
    console.print(table)


def print_full(values: dict[str, Any], console: Console) -> None:
    """The tables of all tasks."""
    print_accuracy(values["accuracy"], console)
    print_speed(values["benchmark"], console)
    print_memory(values["memory"], console)
    print_texts(values["text"], console)


_NAMES = {"rel_l2": "rel_L2", "cosine": "cosine", "top1": "top-1", "top5": "top-5"}


def _word(passed: bool) -> Text:
    return Text("PASS", style="green") if passed else Text("FAIL", style="bold red")


def _heading(task: str, values: dict[str, Any]) -> str:
    engine, machine = values["engine"], values["machine"]
    if engine is None:
        return f"{task}: the engine did not load"
    info = engine["info"]
    note = f" ({info['note']})" if info["note"] else ""
    return f"{task}: {info['backend']} on {info['device']} in {info['dtype']}{note}; {machine['cpu']}"


def _notes(values: dict[str, Any], console: Console) -> None:
    for note in values["notes"]:
        console.print(f"note: {note}", soft_wrap=True)


def _stage(stage: dict[str, Any]) -> str:
    if stage["stage"] == "load":
        return "load"
    return f"{stage['stage']}, {stage['prompt_tokens']} + {stage['new_tokens']} tokens"


def _table(title: str | None, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _figure(metric: str, value: float | None) -> str:
    if metric == "cosine":
        return _cosine(value)
    if value is None:
        return "not a number"
    return f"{value:.2f}/5" if metric == "top5" else _percent(value)


def _percent(value: float | None) -> str:
    return "not a number" if value is None else f"{100 * value:.4g}%"


def _cosine(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.6f}"


def _mebibytes(value: int | None, unit: str = " MiB") -> str:
    return "-" if value is None else f"{value / MEBIBYTE:.1f}{unit}"
