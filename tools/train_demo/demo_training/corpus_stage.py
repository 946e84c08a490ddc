"""Stage `corpus`: the checkpoint's text files, and the recordings that the codec learns from."""

from __future__ import annotations

from demo_training.digits import training_texts
from demo_training.dimensions import write_text_files
from demo_training.narration import narrate
from demo_training.recipe import Recipe, Report

_TEXTS = 1000


def make_corpus(recipe: Recipe, report: Report) -> None:
    """Write the folder `stages/layout` and speak the codec's corpus."""
    write_text_files(recipe.layout)
    # Not fewer than what one batch of each kind of crop can be drawn from.
    texts = training_texts(max(150, recipe.steps(_TEXTS)), recipe.rng("corpus"))
    corpus = narrate(texts, progress=lambda done: report(done, len(texts), {}) if done % 20 == 0 else None)
    corpus.save(recipe.file("corpus.npz"))
    report(len(texts), len(texts), {})
