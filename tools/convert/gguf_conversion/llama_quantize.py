"""Child process: quantise a GGUF file with llama.cpp. Arguments: input, output, file type number, threads."""

from __future__ import annotations

import ctypes
import sys

import llama_cpp.llama_cpp as llama  # pyright: ignore[reportMissingImports]


@llama.llama_log_callback
def _print(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    sys.stdout.write(text.decode("utf-8", errors="replace"))
    sys.stdout.flush()


def main(source: str, target: str, file_type: str, threads: str) -> int:
    """0, or llama.cpp's error code."""
    llama.llama_log_set(_print, ctypes.c_void_p(0))
    params = llama.llama_model_quantize_default_params()
    params.ftype = int(file_type)
    params.nthread = int(threads)
    return llama.llama_model_quantize(source.encode(), target.encode(), ctypes.pointer(params))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
