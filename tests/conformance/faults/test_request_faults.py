"""An engine that misunderstands requests or spoils answers is caught, in both dtypes."""

from __future__ import annotations

import pytest

from tests.conformance.faults.suite import DTYPES, Fault, Suite, expect_caught

FAULTS = [
    Fault("LastIdDropped", "cache/greedy,generate/tts", "regret_max", "not what the prefill"),
    Fault("FirstIdDoubled", "logits/ascend-1", "rel_l2"),
    Fault("SpecialIdStripped", "logits/tts-english", "rel_l2", "a seam between chunks or blocks, an id that is lost"),
    Fault("OneNaN", "logits/ascend-1,contract/vocabulary", "non_finite", "the first at 5"),
    Fault("DoubleRows", "contract/vocabulary,logits/ascend-1", "wrong_shape", "expected float32"),
    Fault("LastRowOnly", "contract/vocabulary,logits/ascend-1", "wrong_shape", "expected float32["),
    Fault("RowsOneLater", "contract/vocabulary,logits/ascend-1", "logits_at of"),
    Fault("AllowedIgnored", "contract/allowed,generate/tts", "stream_faults", "is not allowed"),
    Fault("AllowedReachesFurther", "contract/allowed", "stream_faults", "is not allowed"),
    Fault("OneTokenMore", "contract/max-new-tokens", "wrong_lengths", "18 ids, though max_new_tokens is 17"),
    Fault("OneTokenLess", "contract/max-new-tokens", "wrong_lengths", "asked for 17"),
    Fault("MinimumIgnored", "contract/min-new-tokens", "wrong_lengths", "min_new_tokens is 5"),
    Fault("StopIdEmitted", "contract/stop", "stream_faults", "1 ids and reason 'stop', expected 0"),
    Fault("OnlyFirstStopId", "contract/stop", "wrong_stops"),
    Fault("SeamRepeated", "contract/usage,cache/greedy", "stream_faults", "ids, though max_new_tokens is 16"),
    Fault("SeamRepeatedQuietly", "contract/usage,cache/greedy", "repeated_or_lost_ids", "again"),
    Fault("SeedIgnored", "contract/seed,batch/eight-sampled", "wrong_seeds", "twice"),
    Fault("SameSeedAlways", "contract/seed", "wrong_seeds", "give the same answer"),
    Fault("TemperatureIgnored", "sampling/temperature", "significance", "do not follow"),
    Fault("AlwaysGreedy", "contract/seed,sampling/plain", "wrong_seeds", "give the same answer"),
    Fault("DefaultTopK", "sampling/plain", "significance"),
    Fault("PenaltyIgnored", "sampling/penalty,generate/vc-penalty", "significance"),
    Fault("TopPIgnored", "sampling/top-p", "impossible_draws|significance"),
    Fault("MinPIgnored", "sampling/min-p", "impossible_draws|significance"),
    Fault("TopKOneMore", "sampling/top-k", "impossible_draws|significance"),
    Fault("IdsWrapped", "contract/out-of-range", "served_though_impossible", "was served"),
    Fault("PromptTruncated", "contract/too-long", "served_though_impossible", "was served"),
    Fault("EmptyPromptServed", "contract/empty-prompt", "served_though_impossible", "was served"),
    Fault("CloseDoesNothing", "contract/close", "served_though_impossible", "after close was served"),
    Fault("UsageMiscounted", "contract/usage", "stream_faults", "usage counts"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_faulty_request_is_caught(suite: Suite, fault: Fault, dtype: str) -> None:
    report = suite.run(suite.planted(f"altered_requests:{fault.name}", dtype), fault.caught_by)
    expect_caught(report, fault)
