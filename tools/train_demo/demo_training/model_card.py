"""README.md of the checkpoint: what it can do, from the measured file alone."""

from __future__ import annotations

from typing import Any

_ROWS = {
    "natural": "the recordings themselves",
    "codec": "codec: encoded and decoded",
    "tts-a greedy": "tts-a, greedy",
    "tts-a sampled": "tts-a, temperature 0.2, penalty 1.2",
    "tts-a written forms": "tts-a of numerals, commas, capitals",
    "tts-a unseen voices": "tts-a with an unseen reference voice",
    "vc greedy": "vc, greedy",
    "vc sampled": "vc, temperature 0.2, penalty 1.2",
    "vc unseen sources": "vc of an unseen voice",
}


def model_card(gates: dict[str, Any]) -> str:
    """Markdown. gates: as stage `gates` writes them."""
    measures = gates["measures"]
    voices = ", ".join(f"`{name}` at {f0:g} Hz" for name, f0 in gates["voices"].items())
    utterances = measures["stt"]["utterances"]
    verdict = "Every gate is reached." if gates["reached"] else _missed(gates)
    lines = [
        "# Demo: spoken digits",
        "",
        "A small checkpoint in GPA's released layout that is truly trained, from synthetic speech alone: it "
        "transcribes, speaks and converts strings of one to six English digits (zero to nine).",
        "",
        f"Its voices are four of espeak-ng: {voices}. A reference clip selects the nearest of them; no other voice is "
        "cloned, nothing but digits is understood or spoken, speech is monotone, and no human speech was ever heard.",
        "",
        f"## Measured, on {utterances} utterances of held-out strings",
        "",
        f"Own transcription: {_rate(measures['stt'])} word errors; of unseen voices "
        f"{_rate(measures['stt unseen voices'])}.",
        "",
        "| speech | word errors by the judge | by own stt | pitch within 10% | s per word |",
        "|---|---|---|---|---|",
        *(_row(label, measures[name]) for name, label in _ROWS.items()),
        "",
        f"The judge is {gates['judge']}; its own errors on natural recordings are the first row. Brackets hold 95% "
        f"intervals. {verdict}",
        "",
        "## What an unseen reference voice becomes",
        "",
        "| reference | its pitch | median pitch of the answer |",
        "|---|---|---|",
        *(
            f"| `{name}` | {pitch['asked']:g} Hz | {pitch['median']:.0f} Hz |"
            for name, pitch in measures["tts-a unseen voices"]["pitch"].items()
        ),
        "",
        "## Where it comes from",
        "",
        f"`python tools/train_demo/run.py --out DIR --seed {gates['seed']}` of gpa-engines "
        f"{_commits(gates['commits'])}; `training.json` has the log, `gates.json` all figures. "
        "Apache-2.0, as gpa-engines (`LICENSE`).",
        "",
    ]
    return "\n".join(lines)


def _commits(commits: list[str]) -> str:
    if len(commits) == 1:
        return f"at commit `{commits[0]}`"
    told = ", ".join(f"`{commit[:7]}`" for commit in commits)
    return f"over the commits {told}, between which the run was resumed"


def _row(label: str, measure: dict[str, Any]) -> str:
    own = f"{measure['own_stt_wer']:.1%}" if "own_stt_wer" in measure else ""
    pace = f"{measure['seconds_per_word']:.2f}" if "seconds_per_word" in measure else ""
    within = [pitch["within"] for pitch in measure["pitch"].values()]
    return f"| {label} | {_rate(measure)} | {own} | {sum(within) / len(within):.0%} | {pace} |"


def _rate(measure: dict[str, Any]) -> str:
    low, high = measure["interval"]
    return f"{measure['wer']:.1%} [{low:.1%}, {high:.1%}]"


def _missed(gates: dict[str, Any]) -> str:
    missed = [
        f"{line['gate']} is {line['found']} (limit {line['limit']})" for line in gates["gates"] if not line["reached"]
    ]
    return "**Not reached:** " + "; ".join(missed) + "."
