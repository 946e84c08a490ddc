"""config.json is read in the forms of transformers 4 and 5, and a model that is not GPA's is refused by key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gpa_codecs.errors import CheckpointError
from gpa_engines.lm_config import LMConfig


@pytest.fixture
def values(tiny_checkpoint: Path) -> dict[str, Any]:
    return json.loads((tiny_checkpoint / "config.json").read_text())


def test_both_forms_give_the_same_config(values: dict[str, Any]) -> None:
    form4 = LMConfig.from_dict(values)
    theta, dtype = values.pop("rope_theta"), values.pop("dtype")
    del values["rope_scaling"]
    form5 = LMConfig.from_dict(
        values | {"rope_parameters": {"rope_type": "default", "rope_theta": theta}, "torch_dtype": dtype}
    )
    assert form4 == form5
    assert (form4.rope_theta, form4.head_dim, form4.dtype) == (1e6, 32, "bfloat16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"use_sliding_window": True}, "use_sliding_window is true"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has 'sliding_attention'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"hidden_size": "64"}, "hidden_size is '64'; expected a positive integer"),
        ({"num_hidden_layers": None}, "num_hidden_layers is None"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope type is 'yarn'"),
        (
            {"rope_parameters": {"rope_theta": 10000.0}},
            "rope_theta is 1000000.0 but rope_parameters.rope_theta is 10000.0",
        ),
        ({"rope_theta": None}, "neither rope_theta nor rope_parameters.rope_theta"),
    ],
)
def test_what_is_not_gpa_is_refused_by_key(values: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        LMConfig.from_dict(values | change)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "cannot be parsed"), ("[]", "expected keys and values, found list")]
)
def test_a_damaged_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(CheckpointError, match=f"config.json.*{message}"):
        LMConfig.from_file(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: No such file"):
        LMConfig.from_file(tmp_path / "config.json")
