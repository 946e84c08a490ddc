"""Child process: logits of one prompt from llama.cpp. Arguments: GGUF file, .npy of the prompt, .npy to write.

The prompt is int32[T], rows of the file's vocabulary, or float32[T, hidden], embeddings; the result float32[T, rows].
Keys and values are float32 and flash attention is off: what differs from the checkpoint is then the weights' rounding.
"""

from __future__ import annotations

import ctypes
import os
import sys

import llama_cpp.llama_cpp as llama  # pyright: ignore[reportMissingImports]
import numpy as np


@llama.llama_log_callback
def _print_errors(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    if level == 4:  # GGML_LOG_LEVEL_ERROR
        sys.stderr.write(text.decode("utf-8", errors="replace"))


def main(gguf_file: str, prompt_file: str, logits_file: str) -> None:
    """Exits with a message where llama.cpp fails."""
    llama.llama_log_set(_print_errors, ctypes.c_void_p(0))
    prompt = np.load(prompt_file)
    length = len(prompt)
    model_params = llama.llama_model_default_params()
    model_params.n_gpu_layers = 0
    # ggml's AMX path, compiled by GCC 12, crashes on Q8_0 when a batch has more than one token.
    model_params.use_extra_bufts = False
    model = llama.llama_model_load_from_file(gguf_file.encode(), model_params)
    if not model:
        sys.exit("llama.cpp does not load the file")
    params = llama.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = params.n_outputs_max = max(32, length)
    params.n_threads = params.n_threads_batch = os.cpu_count() or 1
    params.type_k = params.type_v = 0  # GGML_TYPE_F32
    params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama.llama_init_from_model(model, params)
    if not context:
        sys.exit("llama.cpp makes no context")
    if code := llama.llama_decode(context, _batch(prompt)):
        sys.exit(f"llama.cpp's decode failed with {code}")
    vocabulary = llama.llama_model_get_vocab(model)
    assert vocabulary is not None
    rows = llama.llama_vocab_n_tokens(vocabulary)
    logits = [np.ctypeslib.as_array(llama.llama_get_logits_ith(context, row), (rows,)) for row in range(length)]
    np.save(logits_file, np.stack(logits))


def _batch(prompt: np.ndarray) -> llama.llama_batch:
    length = len(prompt)
    width = prompt.shape[1] if prompt.ndim == 2 else 0
    batch = llama.llama_batch_init(length, width, 1)
    batch.n_tokens = length
    if width:
        ctypes.memmove(batch.embd, np.ascontiguousarray(prompt, np.float32).ctypes.data, 4 * prompt.size)
    else:
        ctypes.memmove(batch.token, np.ascontiguousarray(prompt, np.int32).ctypes.data, 4 * prompt.size)
    for position in range(length):
        batch.pos[position] = position
        batch.n_seq_id[position] = 1
        batch.seq_id[position][0] = 0
        batch.logits[position] = 1
    return batch


if __name__ == "__main__":
    main(*sys.argv[1:])
