"""What a converted folder says about where it comes from: the `gpa` section of its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpa_codecs.config_file import ConfigFile
from gpa_codecs.errors import CheckpointError
from gpa_codecs.vocabulary import TokenFamily, TokenSpace

KEY = "gpa"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class ConversionRecord:
    """converter: version of gpa-engines. tokenizer_sha256: of the source's tokenizer.json. weights_sha256: of the
    source's weight files, by name. families: glm_semantic, bicodec_global and bicodec_semantic."""

    converter: str
    tokenizer_sha256: str
    weights_sha256: Mapping[str, str]
    families: tuple[TokenFamily, ...]

    @classmethod
    def from_config(cls, config: ConfigFile) -> ConversionRecord | None:
        """What a config.json says, None where it says nothing. Raises CheckpointError for another format."""
        if config.values.get(KEY) is None:
            return None
        section = config.section(KEY)
        number = section.integer("format")
        if number != FORMAT:
            raise CheckpointError(
                f"{section.source}: format is {number}; this version reads {FORMAT}: convert the checkpoint again"
            )
        families = section.section("families")
        return cls(
            converter=_text(section, "converter"),
            tokenizer_sha256=_text(section, "tokenizer_sha256"),
            weights_sha256={name: _text(section.section("weights_sha256"), name) for name in _names(section)},
            families=tuple(_family(families, name) for name in families.values),
        )

    def to_config(self) -> dict[str, Any]:
        """The section."""
        return {
            "format": FORMAT,
            "converter": self.converter,
            "tokenizer_sha256": self.tokenizer_sha256,
            "weights_sha256": dict(self.weights_sha256),
            "families": {each.name: {"offset": each.offset, "size": each.size} for each in self.families},
        }

    def check_families(self, vocab_size: int, source: str) -> None:
        """Raise CheckpointError for a family that does not fit the model's vocabulary."""
        for family in self.families:
            if family.range.stop > vocab_size:
                raise CheckpointError(
                    f"{source}: {KEY}: families: {family.name} ends at id {family.range.stop - 1}, but vocab_size is "
                    f"{vocab_size}: convert the checkpoint again"
                )


def families_of(space: TokenSpace) -> tuple[TokenFamily, ...]:
    """The families of audio codes that the record keeps."""
    return (space.glm, space.global_, space.semantic)


def _names(section: ConfigFile) -> list[str]:
    return list(section.section("weights_sha256").values)


def _family(families: ConfigFile, name: str) -> TokenFamily:
    entry = families.section(name)
    return TokenFamily(name, entry.integer("offset"), entry.integer("size"))


def _text(section: ConfigFile, name: str) -> str:
    value = section.values.get(name)
    if not isinstance(value, str) or not value:
        raise CheckpointError(f"{section.source}: {name} is {value!r}; expected text: convert the checkpoint again")
    return value
