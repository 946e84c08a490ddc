"""How far an engine may be from the baseline: one YAML file, a set of limits per dtype or quantisation.

Every limit says where it comes from. The file is read strictly: an unknown key, an unknown metric or a limit without a
source is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

import yaml

from gpa_codecs.errors import GpaError
from gpa_conformance.results import Check, Relation, make_check

SCHEMA = "gpa-conformance-limits/1"


@dataclass(frozen=True, slots=True)
class Limit:
    """A metric must be `relation` `value`. source: where the figure comes from, in words."""

    metric: str
    relation: Relation
    value: float
    source: str


@dataclass(frozen=True, slots=True)
class DtypeLimits:
    """The limits that hold for one dtype, quantisation or purpose. title: what the set is for, in words."""

    name: str
    title: str
    limits: Mapping[str, Limit]

    def check(self, metric: str, value: float) -> Check:
        """Compare a value with its limit; NaN fails. Raises GpaError for a metric that the set does not limit."""
        limit = self[metric]
        return make_check(metric, value, limit.relation, limit.value, f"{self.name}: {limit.source}")

    def checks(self, metrics: Mapping[str, float]) -> tuple[Check, ...]:
        """A check for every limit whose metric is among `metrics`, in the order of the file."""
        return tuple(self.check(name, metrics[name]) for name in self.limits if name in metrics)

    def __contains__(self, metric: str) -> bool:
        return metric in self.limits

    def __getitem__(self, metric: str) -> Limit:
        if metric not in self.limits:
            raise GpaError(f"limits {self.name!r} have none for {metric!r}; they have {', '.join(self.limits)}")
        return self.limits[metric]


@dataclass(frozen=True, slots=True)
class Limits:
    """All sets of one file. dtypes: by name. ascend: the Ascend report's four. codec, sampling, speech: of those
    families."""

    dtypes: Mapping[str, DtypeLimits]
    aliases: Mapping[str, str]
    ascend: DtypeLimits
    codec: DtypeLimits
    sampling: DtypeLimits
    speech: DtypeLimits
    source: str

    def for_dtype(self, dtype: str) -> DtypeLimits:
        """The limits of a dtype or quantisation as engines name it ("bf16", "torch.bfloat16", "Q8_0").

        Raises GpaError naming the known ones and how to choose.
        """
        name = dtype.lower().removeprefix("torch.").strip()
        name = self.aliases.get(name, name)
        if name not in self.dtypes:
            known = ", ".join(self.dtypes)
            raise GpaError(
                f"there are no limits for dtype {dtype!r}; known: {known}. Choose the nearest with --limits-as bfloat16"
            )
        return self.dtypes[name]


METRICS = frozenset(
    (
        *("non_finite", "rel_l2", "rel_l2_max", "cosine", "cosine_min", "top1", "top5"),
        "parting_in_top5",
        *("kl_mean", "kl_p99", "kl_max", "kl_allowed_mean", "kl_allowed_p99", "kl_allowed_max"),
        *("regret_max", "regret_allowed_max", "delta_logp_max", "scale_error_max", "offset_max"),
        *("semantic_agreement", "voice_agreement", "glm_agreement", "snr_db", "log_mel", "stream_error"),
        *("significance", "wer_room"),
        *("stt_wer_low", "recogniser_wer_excess_low", "own_wer_excess_low", "baseline_wer_excess_low"),
        *("f0_share_high", "duration_off"),
    )
)
"""What a set may limit: partings of answers, `gpa_conformance.metrics`, then the families codec, sampling, speech."""


_FAMILIES = ("ascend", "codec", "sampling", "speech")
"""Sets beside those of the dtypes."""


def load_limits(path: str | Path | None = None) -> Limits:
    """Read the limits that come with the package, or another file. Raises GpaError naming the key that is wrong."""
    source = str(path) if path else "limits.yaml"
    try:
        text = Path(path).read_text(encoding="utf-8") if path else _packaged()
        document = yaml.load(text, Loader=_Loader)
    except OSError as error:
        raise GpaError(f"{source}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeError) as error:
        raise GpaError(f"{source} is not YAML: {error}") from error
    top = _mapping(document, source, required=("schema", "dtypes", "aliases", *_FAMILIES))
    if top["schema"] != SCHEMA:
        raise GpaError(f"{source}: schema is {top['schema']!r}; this program reads {SCHEMA!r}")
    dtypes = {
        str(name): _limit_set(str(name), entry, f"{source}: dtypes.{name}")
        for name, entry in _mapping(top["dtypes"], f"{source}: dtypes").items()
    }
    aliases = {str(key): str(name) for key, name in _mapping(top["aliases"], f"{source}: aliases").items()}
    for alias, name in aliases.items():
        if name not in dtypes or alias in dtypes:
            raise GpaError(
                f"{source}: aliases.{alias} is {name!r}; expected another name of one of {', '.join(dtypes)}"
            )
    others = {name: _limit_set(name, top[name], f"{source}: {name}") for name in _FAMILIES}
    return Limits(dtypes, aliases, **others, source=source)


def _packaged() -> str:
    return (files("gpa_conformance") / "limits.yaml").read_text(encoding="utf-8")


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key that is given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=deep)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{name!r} is given twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def _limit_set(name: str, entry: Any, where: str) -> DtypeLimits:
    values = _mapping(entry, where, required=("title", "limits"))
    if not isinstance(values["title"], str) or not values["title"].strip():
        raise GpaError(f"{where}.title is {values['title']!r}; expected words")
    limits = _mapping(values["limits"], f"{where}.limits")
    return DtypeLimits(
        name, values["title"], {metric: _limit(metric, e, f"{where}.limits.{metric}") for metric, e in limits.items()}
    )


def _limit(metric: str, entry: Any, where: str) -> Limit:
    if metric not in METRICS:
        raise GpaError(f"{where}: there is no metric {metric!r}; known: {', '.join(sorted(METRICS))}")
    values = _mapping(entry, where, required=("relation", "value", "source"))
    relation, value, source = values["relation"], values["value"], values["source"]
    if relation not in get_args(Relation):
        raise GpaError(f"{where}.relation is {relation!r}; expected one of {', '.join(get_args(Relation))}")
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise GpaError(f"{where}.value is {value!r}; expected a number (YAML reads 1e-4 as text: write 1.0e-4)")
    if not isinstance(source, str) or not source.strip():
        raise GpaError(f"{where}.source is {source!r}; expected words that say where the limit comes from")
    return Limit(metric, relation, float(value), " ".join(source.split()))


def _mapping(value: Any, where: str, required: tuple[str, ...] = ()) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        raise GpaError(f"{where} is {value!r}; expected a mapping")
    if missing := [name for name in required if name not in value]:
        raise GpaError(f"{where} has no {', '.join(map(repr, missing))}")
    if required and (unknown := sorted(map(str, value.keys() - set(required)))):
        raise GpaError(f"{where} has unknown keys {', '.join(map(repr, unknown))}; known: {', '.join(required)}")
    return value
