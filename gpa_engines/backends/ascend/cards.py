"""Which NPUs: their names, and whether they are there."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

from gpa_codecs.errors import BackendError


def parse_cards(device: str, devices: str | Sequence[str] | None) -> tuple[int, ...]:
    """The numbers of the NPUs that are asked for. Raises BackendError for a malformed or repeated name."""
    if devices is None:
        return (_parse(device, "device"),)
    if device != "auto":
        raise BackendError(f"device is {device!r} and devices is {devices!r}; give one of the two")
    names = devices.split(",") if isinstance(devices, str) else list(devices)
    cards = tuple(_parse(name.strip() if isinstance(name, str) else name, "devices") for name in names)
    if not cards:
        raise BackendError("devices is empty; expected at least one name, such as npu:0,npu:1")
    for card in cards:
        if cards.count(card) > 1:
            raise BackendError(f"devices names npu:{card} twice; expected different NPUs, such as npu:0,npu:1")
    return cards


def check_cards(torch_npu: ModuleType, cards: Sequence[int]) -> None:
    """Raise BackendError for a card that torch_npu does not see."""
    npu = torch_npu.npu
    try:
        count = npu.device_count() if npu.is_available() else 0
    except RuntimeError as error:
        raise BackendError(f"torch_npu {torch_npu.__version__} cannot look for NPUs: {error}") from error
    if count == 0:
        raise BackendError(
            f"no NPU is visible: torch_npu {torch_npu.__version__} sees 0; look at `npu-smi info`, at "
            "ASCEND_RT_VISIBLE_DEVICES, and in a container at its --device /dev/davinci0 and the driver's mounts"
        )
    for card in cards:
        if card >= count:
            raise BackendError(
                f"device 'npu:{card}' is not available: torch_npu {torch_npu.__version__} sees {count}, "
                f"npu:0 to npu:{count - 1}"
            )


def _parse(name: object, option: str) -> int:
    if name in ("auto", "npu"):
        return 0
    kind, _, index = name.partition(":") if isinstance(name, str) else ("", "", "")
    if kind != "npu" or not (index.isascii() and index.isdecimal()):
        expected = "auto, npu or npu:N" if option == "device" else "npu:N, several of them as npu:0,npu:1"
        raise BackendError(f"{option} {name!r} is unknown; expected {expected}")
    return int(index)
