"""Proof that every engine is the same model.

This package stands above the engines and measures them: today it holds the benchmarks (`gpa-bench`); the conformance
suite, which compares any engine's logits and behaviour with the torch CPU float32 baseline, is built here and works on
every object that satisfies the `Engine` protocol, in this repository or elsewhere. Nothing in it imports a backend.
"""
