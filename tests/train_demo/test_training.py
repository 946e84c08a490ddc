"""Networks learn, and an interrupted training ends where an uninterrupted one does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from demo_training import training
from demo_training.corpus import Corpus
from demo_training.examples import Examples
from demo_training.generator import TrainingSnake
from demo_training.glm import train_glm
from demo_training.language_model import LanguageModel
from demo_training.lm import _Batch
from demo_training.recipe import Recipe
from demo_training.semantic import train_semantic
from demo_training.tokens import TokenCorpus
from demo_training.training import Optimization, cosine, one_cycle, train
from gpa_codecs.bicodec.generator import Snake
from gpa_codecs.prompts import Task
from gpa_codecs.vocabulary import TokenSpace
from gpa_engines.engine import SamplingParams
from gpa_engines.sampling import Sampler
from tests.train_demo.conftest import begun, no_report


class _Interrupted(Exception):
    pass


@pytest.mark.parametrize(("stage", "figure"), [(train_glm, "phonemes"), (train_semantic, "feature_phonemes")])
def test_losses_fall(tones: Corpus, tmp_path: Path, stage, figure: str) -> None:
    recipe = begun(tones, tmp_path / "run", scale=0.06)
    losses: list[float] = []
    stage(recipe, lambda done, total, figures: losses.append(figures[figure]))
    assert len(losses) == 3
    assert losses[2] < losses[1] < losses[0]
    assert losses[2] < 0.5 * losses[0]


@pytest.mark.parametrize("stage", [train_glm, train_semantic])
def test_goes_on_where_it_was_interrupted(
    tones: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage
) -> None:
    monkeypatch.setattr(training, "_SAVE_EVERY", 0.0)
    monkeypatch.setattr(training, "_REPORT_EVERY", 3)
    name = stage.__name__.removeprefix("train_")
    whole, broken = (begun(tones, tmp_path / run, scale=0.01) for run in ("whole", "broken"))
    stage(whole, no_report)
    steps: list[int] = []

    def interrupt(done: int, total: int, figures: dict[str, float]) -> None:
        steps.append(done)
        if done == 6 and steps.count(6) == 1:
            raise _Interrupted

    with pytest.raises(_Interrupted):
        stage(broken, interrupt)
    assert not broken.file(f"{name}.safetensors").exists()
    stage(broken, interrupt)
    assert steps[:3] == [3, 6, 6]
    expected, found = whole.load(name), broken.load(name)
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert torch.equal(tensor, found[key]), key


def test_only_what_asks_for_a_gradient_is_trained(recipe: Recipe) -> None:
    network = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
    network[0].requires_grad_(False)
    before = {name: value.clone() for name, value in network.state_dict().items()}

    def losses(step: int, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        inputs = torch.from_numpy(rng.normal(size=(8, 4)).astype(np.float32))
        return {"loss": (network(inputs) - 1).square().mean()}

    train(recipe, "toy", network, Optimization(5, 0.1, cosine), losses, no_report)
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"1.weight", "1.bias"}


@pytest.mark.parametrize("schedule", [one_cycle, cosine])
def test_schedules_rise_and_fall(schedule) -> None:
    rates = [schedule(step / 1000) for step in range(1000)]
    peak = int(np.argmax(rates))
    assert 0 < peak < 300
    assert rates[peak] == pytest.approx(1.0, abs=0.02)
    assert np.all(np.diff(rates[peak:]) <= 0)
    assert rates[-1] < 0.02


def test_the_snake_of_training_is_the_products() -> None:
    torch.manual_seed(0)
    snake = Snake(3)
    with torch.no_grad():
        snake.alpha.uniform_(0.5, 2.0)
    ours = TrainingSnake(snake).double()
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), snake.double()(x))
    assert torch.autograd.gradcheck(ours, x)
    assert torch.autograd.gradcheck(
        lambda alpha: torch.func.functional_call(ours, {"alpha": alpha}, (x.detach(),)), ours.alpha
    )


def test_the_penalty_of_training_is_the_engines(recipe: Recipe, tones: Corpus) -> None:
    space = TokenSpace.from_file(recipe.layout / "tokenizer.json")
    rng = np.random.default_rng(0)
    semantic = [rng.integers(64, size=20) for _ in range(len(tones))]
    glm = [rng.integers(128, size=5) for _ in range(len(tones))]
    examples = Examples(TokenCorpus(tones.texts, semantic, glm), rng.integers(4096, size=(4, 3, 32)), space, None)
    batch = _Batch.of(examples.batch("vc", 3, rng), space, rng)
    logits = torch.from_numpy(rng.normal(0.0, 3.0, (len(batch.targets), len(batch.vocabulary))).astype(np.float32))
    ours = batch.penalized(logits).softmax(-1).numpy()
    params = SamplingParams(temperature=1.0, top_k=0, repetition_penalty=1.2, seed=0)
    for at in range(0, len(logits), 7):
        row, position = int(batch.rows[at]), int(batch.positions[at])
        everything = np.full(space.vocab_size, -np.inf, np.float32)
        everything[batch.vocabulary] = logits[at]
        ids, probabilities = Sampler(params, batch.ids[row, : position + 1].tolist()).distribution(everything)
        expected = np.zeros(space.vocab_size)
        expected[ids] = probabilities
        np.testing.assert_allclose(ours[at], expected[batch.vocabulary], rtol=1e-4, atol=1e-7)
        assert batch.vocabulary[batch.targets[at]] == batch.ids[row, position + 1]


@pytest.mark.parametrize("task", ["stt", "vc"])
def test_a_share_of_what_is_listened_to_is_the_echo(recipe: Recipe, tones: Corpus, task: Task) -> None:
    space = TokenSpace.from_file(recipe.layout / "tokenizer.json")
    rng = np.random.default_rng(0)
    texts, rows = tones.texts, len(tones)
    recorded = TokenCorpus(texts, [np.full(20, 1) for _ in range(rows)], [np.full(5, 1) for _ in range(rows)])
    half = len(texts) // 2
    echo = TokenCorpus(texts[:half], [np.full(19, 2)] * half * 4, [np.full(5, 2)] * half * 4)
    examples = Examples(recorded, rng.integers(4096, size=(4, 3, 32)), space, echo)
    heard = []
    for _ in range(60):
        for example in examples.batch(task, 4, rng, echoed=0.3):
            codes = [id_ - space.semantic.offset for id_ in example.prompt if id_ in space.semantic.range]
            heard.append(codes.count(2) > codes.count(1))
            assert space.semantic.ids([2])[0] not in example.answer, "what is learned to say is the recording's"
    # 0.3 from the texts with an echo, and half of the rest; of these, four in five are heard as that.
    assert 0.42 < np.mean(heard) < 0.62


def test_the_language_model_starts_with_even_odds(recipe: Recipe) -> None:
    from demo_training.dimensions import Geometry

    torch.manual_seed(0)
    config = Geometry.read(recipe.layout).lm
    network = LanguageModel(config)
    logits = network.logits(network(torch.randint(4000, (1, 12))), torch.arange(config.vocab_size))
    assert logits.shape == (1, 12, config.vocab_size)
    assert float(logits.detach().std()) < 2.0
