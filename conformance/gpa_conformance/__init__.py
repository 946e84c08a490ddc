"""Proof that every engine is the same model.

This package stands above the engines and measures them. `gpa-conformance` compares any engine's logits and behaviour
with the torch CPU float32 baseline, `gpa-bench` measures speed and memory. Both know engines only through the `Engine`
protocol, in this repository or elsewhere; nothing here imports a backend.
"""
