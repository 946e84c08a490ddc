"""From a checkpoint in the released layout to GGUF files for llama.cpp, without torch."""
