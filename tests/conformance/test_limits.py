"""The limits that come with the package, and the strictness of their file."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from gpa_codecs.errors import GpaError
from gpa_conformance.limits import METRICS, Limits, load_limits

WANTED = ("float32", "float16", "bfloat16", "int8", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "mlx-8bit", "mlx-4bit")


@pytest.fixture(scope="module")
def limits() -> Limits:
    return load_limits()


def document() -> dict:
    return {
        "schema": "gpa-conformance-limits/1",
        "aliases": {"f32": "float32"},
        "dtypes": {"float32": entry("rel_l2", "<=", 1e-4)},
        "ascend": entry("rel_l2", "<=", 0.01),
        "codec": entry("snr_db", ">=", 60),
        "sampling": entry("significance", ">=", 1e-4),
        "speech": entry("stt_wer_low", "<=", 0.015),
    }


def entry(metric: str, relation: str, value: float) -> dict:
    return {"title": "words", "limits": {metric: {"relation": relation, "value": value, "source": "measured"}}}


def write(tmp_path: Path, content: dict) -> Path:
    file = tmp_path / "limits.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def test_every_dtype_has_the_limits_that_judge_logits(limits: Limits) -> None:
    assert tuple(limits.dtypes) == WANTED
    for name in WANTED:
        for metric in ("non_finite", "rel_l2", "kl_mean", "kl_max", "regret_max", "scale_error_max", "offset_max"):
            assert metric in limits.for_dtype(name), (name, metric)


def test_every_limit_says_where_it_comes_from(limits: Limits) -> None:
    for each in (*limits.dtypes.values(), limits.ascend, limits.codec, limits.sampling, limits.speech):
        for limit in each.limits.values():
            assert len(limit.source.split()) >= 2, (each.name, limit.metric)


def test_a_coarser_dtype_never_has_a_tighter_limit(limits: Limits) -> None:
    """Rather than trust the file's figures: whatever float16 may do, bfloat16 may do too, and so on."""
    ladder = ("float32", "float16", "bfloat16", "q6_k", "q5_k_m", "q4_k_m")
    for finer, coarser in pairwise(ladder):
        for metric, limit in limits.for_dtype(finer).limits.items():
            if limit.relation == "<=":
                assert limit.value <= limits.for_dtype(coarser)[metric].value, (finer, coarser, metric)


def test_the_ascend_reports_four(limits: Limits) -> None:
    found = {name: (limit.relation, limit.value) for name, limit in limits.ascend.limits.items()}
    assert found == {"rel_l2": ("<=", 0.01), "cosine": (">=", 0.99), "top1": (">=", 0.99), "top5": (">=", 4.0)}


def test_codec_and_sampling_families_are_limited(limits: Limits) -> None:
    for metric in ("semantic_agreement", "glm_agreement", "voice_agreement", "snr_db", "log_mel", "stream_error"):
        assert metric in limits.codec
    assert 0 < limits.sampling["significance"].value <= 0.01


@pytest.mark.parametrize(
    ("given", "name"), [("bf16", "bfloat16"), ("torch.float16", "float16"), ("Q8_0", "q8_0"), ("float32", "float32")]
)
def test_a_dtype_is_found_as_engines_name_it(limits: Limits, given: str, name: str) -> None:
    assert limits.for_dtype(given).name == name


def test_an_unknown_dtype_is_refused_with_the_known_ones(limits: Limits) -> None:
    with pytest.raises(GpaError, match="float8") as raised:
        limits.for_dtype("float8")
    assert "bfloat16" in str(raised.value)
    assert "--limits-as" in str(raised.value)


def test_a_metric_without_a_limit_is_refused(limits: Limits) -> None:
    with pytest.raises(GpaError, match="'speed'"):
        limits.for_dtype("float32").check("speed", 1.0)


def test_nan_fails_every_limit(limits: Limits) -> None:
    for each in limits.dtypes.values():
        checks = each.checks(dict.fromkeys(METRICS, math.nan))
        assert len(checks) == len(each.limits)
        assert not any(check.passed for check in checks)


def test_a_check_says_which_set_and_source_it_comes_from(limits: Limits) -> None:
    check = limits.for_dtype("bf16").check("non_finite", 0)
    assert check.passed
    assert check.source.startswith("bfloat16: ")


def test_a_file_of_ones_own_is_read(tmp_path: Path) -> None:
    own = load_limits(write(tmp_path, document()))
    assert own.for_dtype("f32").check("rel_l2", 2e-4).passed is False


def put(*path: str, value: object):
    def change(content: dict) -> None:
        for name in path[:-1]:
            content = content[name]
        content[path[-1]] = value

    return change


def drop(*path: str):
    def change(content: dict) -> None:
        for name in path[:-1]:
            content = content[name]
        del content[path[-1]]

    return change


REL = ("dtypes", "float32", "limits", "rel_l2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("schema", value="other/2"), "other/2"),
        (drop("ascend"), "no 'ascend'"),
        (put("extra", value={}), "unknown keys 'extra'"),
        (put("dtypes", "float32", "note", value="x"), "unknown keys 'note'"),
        (put("dtypes", "float32", "limits", "speed", value={}), "no metric 'speed'"),
        (drop(*REL, "source"), "rel_l2 has no 'source'"),
        (put(*REL, "source", value="  "), "rel_l2.source"),
        (put(*REL, "relation", value="<"), "rel_l2.relation is '<'"),
        (put(*REL, "value", value="1e-4"), "write 1.0e-4"),
        (put(*REL, "value", value=True), "rel_l2.value is True"),
        (put(*REL, "value", value=math.nan), "rel_l2.value is nan"),
        (put(*REL, "unit", value="%"), "unknown keys 'unit'"),
        (put("dtypes", "float32", "title", value=""), "float32.title"),
        (put("dtypes", "float32", "limits", value={}), "expected a mapping"),
        (put("aliases", "f32", value="float64"), "aliases.f32"),
        (put("aliases", "float32", value="float32"), "aliases.float32"),
    ],
)
def test_a_wrong_file_is_refused_where_it_is_wrong(tmp_path: Path, change, message: str) -> None:
    content = document()
    change(content)
    with pytest.raises(GpaError) as raised:
        load_limits(write(tmp_path, content))
    assert message in str(raised.value)
    assert "limits.yaml" in str(raised.value)


def test_a_key_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path, document())
    file.write_text(file.read_text() + "sampling: {}\n")
    with pytest.raises(GpaError, match="'sampling' is given twice"):
        load_limits(file)


@pytest.mark.parametrize("text", ["", "- a\n", "{", "schema: [\n"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "limits.yaml"
    file.write_text(text)
    with pytest.raises(GpaError, match=r"limits\.yaml"):
        load_limits(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(GpaError, match=r"absent\.yaml"):
        load_limits(tmp_path / "absent.yaml")
