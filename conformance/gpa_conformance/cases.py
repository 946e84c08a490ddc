"""The suite's cases: data folders `cases/FAMILY/NAME/case.json`, loaded, selected and explained.

A case.json has `title`, `explanation` (why the case is there, what it catches), `kind` (what the family does with it)
and the options of that kind. A prompt is described, not stored: `Case.prompt` is one of

    {"text": "..."}                                      text ids alone
    {"task": "stt", "clip": "speech"}                    the task's prompt from the codes of a clip
    {"task": "tts-a", "text": "...", "voice": "voice"}
    {"task": "vc", "clip": "speech", "voice": "voice"}
    {"pattern": "spread", "length": 4160, "seed": 1}     ids made by a rule, valid for any vocabulary
    {"case": "logits/ascend-1"}                          that of another case

and `gpa_conformance.prompts` builds the ids for the checkpoint under test, when a baseline is made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from gpa_codecs.errors import GpaError

_DATA = Path(__file__).parent / "cases"

FAMILIES = ("logits", "cache", "batch", "generate", "contract", "sampling", "long", "speech", "codec")
"""Every family, in the order in which they run: the codec last, for which the engine leaves the memory."""


@dataclass(frozen=True, slots=True)
class Case:
    """One case. id: "FAMILY/NAME". explanation: why it is there and what it catches. spec: the rest of case.json."""

    id: str
    family: str
    title: str
    explanation: str
    spec: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """What the family does with the case."""
        return self.spec["kind"]

    @property
    def prompt(self) -> Mapping[str, Any] | None:
        """Description of the case's own prompt, or None for a case without one."""
        return self.spec.get("prompt")

    @property
    def digest(self) -> str:
        """sha256 of the definition: a baseline holds for the cases that it was made with."""
        text = json.dumps([self.id, self.spec], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def prompts(self) -> tuple[str, ...]:
        """Ids of the cases whose prompts this case uses as well."""
        return tuple(self.spec.get("prompts", ()))

    @property
    def references(self) -> tuple[str, ...]:
        """Ids of all cases that this one builds on: `prompts`, `neighbours`, and the case of its own prompt."""
        neighbours = (name for names in self.spec.get("neighbours", ()) for name in names)
        own = (name for name in [(self.prompt or {}).get("case")] if name)
        return tuple(dict.fromkeys((*self.prompts, *neighbours, *own)))


def load_cases() -> list[Case]:
    """Every case that comes with the package, by family and then by name."""
    return list(_packaged_cases())


def select(cases: Sequence[Case], selection: str | None) -> list[Case]:
    """The cases that a comma-separated list of families ("logits,cache") and case ids ("contract/cancel") names.

    None or "all" is every case. The order of `cases` is kept. Raises GpaError for a name that there is not, and for a
    selection of nothing.
    """
    if selection is None or selection.strip() == "all":
        return list(cases)
    names = [name.strip() for name in selection.split(",") if name.strip()]
    if not names:
        raise GpaError(f"--cases {selection!r} selects nothing; families: {', '.join(_families(cases))}")
    known = {case.id for case in cases} | {case.family for case in cases}
    for name in names:
        if name not in known:
            family = name.partition("/")[0]
            siblings = [case.id for case in cases if case.family == family]
            advice = f"cases of {family}: {', '.join(siblings)}" if siblings and "/" in name else ""
            advice = advice or f"families: {', '.join(_families(cases))}"
            raise GpaError(f"there is no case or family {name!r}; {advice} (gpa-conformance cases lists all)")
    return [case for case in cases if case.id in names or case.family in names]


def clip_file(name: str) -> Path:
    """The file of a clip that cases name. Raises GpaError naming the clips that there are."""
    if name not in CLIPS:
        raise GpaError(f"there is no clip {name!r}; the suite has {', '.join(CLIPS)}")
    return _DATA / "clips" / CLIPS[name]


CLIPS: Mapping[str, str] = {
    "voice": "voice.flac",
    "speech": "speech.flac",
    "chinese": "chinese.flac",
    "short": "short.flac",
}
"""Clips that cases name: synthesised speech, from 0.1 s to 4.5 s."""


@cache
def _packaged_cases() -> tuple[Case, ...]:
    root = _DATA
    found = [
        _read(root / family / folder.name / "case.json", family)
        for family in FAMILIES
        for folder in _sorted_folders(root / family)
    ]
    ids = {case.id for case in found}
    for case in found:
        for name in case.references:
            if name not in ids:
                raise ValueError(f"case {case.id} names the case {name!r}, which does not exist")
    return tuple(found)


def _sorted_folders(folder: Path) -> Iterable[Path]:
    return sorted((each for each in folder.iterdir() if each.is_dir()), key=_natural) if folder.is_dir() else ()


def _natural(folder: Path) -> tuple[str, int]:
    """ascend-2 before ascend-10."""
    stem, _, number = folder.name.rpartition("-")
    return (stem, int(number)) if number.isdecimal() else (folder.name, 0)


def _read(path: Path, family: str) -> Case:
    spec = json.loads(path.read_text(encoding="utf-8"))
    for key in ("title", "explanation", "kind"):
        if not isinstance(spec.get(key), str) or not spec[key].strip():
            raise ValueError(f"{path}: {key!r} is {spec.get(key)!r}; expected words")
    rest = {key: value for key, value in spec.items() if key not in ("title", "explanation")}
    return Case(f"{family}/{path.parent.name}", family, spec["title"], spec["explanation"], rest)


def _families(cases: Sequence[Case]) -> list[str]:
    return list(dict.fromkeys(case.family for case in cases))
