"""The GLM-4-Voice speech tokenizer: a Whisper encoder cut in the middle, pooled and vector-quantised."""
