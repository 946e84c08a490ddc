"""Which device, and which dtype on it."""

from __future__ import annotations

import mlx.core as mx

from gpa_codecs.errors import BackendError
from gpa_engines.backends.mlx.weights import WeightFolder

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
DEVICES = {"cpu": mx.cpu, "gpu": mx.gpu}


def choose_device(name: str) -> str:
    """ "auto" (gpu where there is one), "cpu" or "gpu"; BackendError for one that is not here."""
    present = mx.is_available(mx.gpu)
    if name == "auto":
        return "gpu" if present else "cpu"
    if name not in DEVICES:
        raise BackendError(f"device {name!r} is unknown; expected auto, cpu or gpu")
    if name == "gpu" and not present:
        raise BackendError("device 'gpu' is not available: MLX needs a Mac with Apple silicon for it; use cpu")
    return name


def choose_dtype(name: str, device: str, folder: WeightFolder) -> tuple[str, mx.Dtype]:
    """The engine's dtype as the limits of the conformance suite name it, and the type that it computes in.

    On a CPU quantised products are right only in float32: with bfloat16 activations MLX 0.32 was 13% off there.
    """
    if folder.quantization is not None:
        own = f"mlx-{folder.quantization.bits}bit"
        if name not in ("auto", own):
            raise BackendError(
                f"dtype is {name!r}, but {folder.path} holds weights of {folder.quantization.bits} bits: use auto or "
                f"{own}, or load the checkpoint that it was made of"
            )
        return own, mx.float32 if device == "cpu" else DTYPES[folder.float_dtype]
    if name == "auto":
        name = "float32" if device == "cpu" else folder.float_dtype if folder.record else "bfloat16"
    if name not in DTYPES:
        raise BackendError(
            f"dtype {name!r} is unknown for {folder.path}, whose weights are not quantised; expected auto, "
            f"{', '.join(DTYPES)} (tools/convert/to_mlx.py --bits 8 makes a quantised folder)"
        )
    return name, DTYPES[name]
