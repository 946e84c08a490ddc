"""How the cases of each family are carried out: `await FAMILIES[case.family](context, case) -> CaseResult`.

A family raises `Skip` where the engine or the checkpoint lacks something; whatever else it raises is an error of the
case. No family knows a backend: they use the Engine protocol, the baseline, the limits and the one sampling rule.
"""

from gpa_conformance.families import batch, cache, codec, contract, generate, logits, long, sampling, speech

FAMILIES = {
    "logits": logits.run,
    "cache": cache.run,
    "batch": batch.run,
    "generate": generate.run,
    "contract": contract.run,
    "sampling": sampling.run,
    "codec": codec.run,
    "long": long.run,
    "speech": speech.run,
}
"""The function of every family, by name."""

__all__ = ["FAMILIES"]
