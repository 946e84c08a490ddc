"""The command: what it refuses, and that stages follow one another."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from demo_training.model_card import model_card
from demo_training.recipe import Recipe
from demo_training.stages import STAGES
from tests.train_demo.environment import RECIPE, environment

pytest.importorskip("pocketsphinx", reason="the recipe's judge is pocketsphinx")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(RECIPE / "run.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=240,
        check=False,
    )


def test_stages_come_after_what_they_need() -> None:
    names = list(STAGES)
    for place, stage in enumerate(STAGES.values()):
        assert all(names.index(need) < place for need in stage.needs)


def test_refuses_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    done = run("--out", tmp_path)
    assert done.returncode == 2
    assert "is not empty and holds no run" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "go on with --resume"),
        (("--resume", "--seed", 1), "seed is 0, not 1"),
        (("--resume", "--scale", 0.5), "scale is 0.002, not 0.5"),
        (("--stage", "cake", "--scale", 0.002), "there is no stage 'cake'"),
        (("--scale", 2), "--scale is 2; expected"),
        (("--device", "cuda:77", "--resume", "--scale", 0.002), "device 'cuda:77' is not there"),
    ],
)
def test_refuses_another_run_in_the_folder(recipe: Recipe, arguments: tuple[object, ...], message: str) -> None:
    (recipe.out / "run.json").write_text(json.dumps({"seed": 0, "scale": 0.002}))
    done = run("--out", recipe.out, *arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_runs_a_stage_and_refuses_one_that_comes_too_early(recipe: Recipe) -> None:
    (recipe.out / "run.json").write_text(json.dumps({"seed": 0, "scale": 0.002}))
    early = run("--out", recipe.out, "--scale", 0.002, "--stage", "voice")
    assert early.returncode == 2
    assert "stage 'voice' needs semantic" in early.stderr
    done = run("--out", recipe.out, "--scale", 0.002, "--stage", "semantic", "--stage", "voice")
    assert done.returncode == 0, done.stderr
    assert recipe.file("voice.safetensors").is_file()
    summary = json.loads((recipe.out / "logs" / "semantic.json").read_text())
    assert summary["figures"]["loss"] > 0
    assert summary["seconds"] > 0
    before = recipe.file("semantic.safetensors").stat().st_mtime_ns
    kept = run("--out", recipe.out, "--scale", 0.002, "--stage", "semantic", "--resume")
    assert kept.returncode == 0, kept.stderr
    assert recipe.file("semantic.safetensors").stat().st_mtime_ns == before
    again = run("--out", recipe.out, "--scale", 0.002, "--stage", "semantic")
    assert again.returncode == 0, again.stderr
    assert recipe.file("semantic.safetensors").stat().st_mtime_ns > before
    assert not recipe.file("voice.safetensors").exists()


def test_the_model_card_says_what_was_missed() -> None:
    pitch = {"en-us+m1": {"asked": 150.0, "median": 151.0, "within": 0.9}}
    measure = {"utterances": 240, "wer": 0.05, "interval": [0.04, 0.06], "pitch": pitch, "own_stt_wer": 0.01}
    measure["seconds_per_word"] = 0.3
    names = ("natural", "stt", "stt unseen voices", "codec", "tts-a written forms", "tts-a unseen voices")
    names += ("tts-a greedy", "tts-a sampled", "vc greedy", "vc sampled", "vc unseen sources")
    gates = {
        "seed": 3,
        "commits": ["abc"],
        "judge": "an ear",
        "voices": {"en-us+m1": 150.0},
        "reached": False,
        "gates": [
            {"gate": "word error rate of stt", "found": "5.0%", "limit": "1.5%", "reached": False},
            {"gate": "another", "found": "1.0%", "limit": "2.0%", "reached": True},
        ],
        "measures": dict.fromkeys(names, measure),
    }
    card = model_card(gates)
    assert "**Not reached:** word error rate of stt is 5.0% (limit 1.5%)." in card
    assert "another" not in card
    assert "| tts-a, greedy | 5.0% [4.0%, 6.0%] | 1.0% | 90% | 0.30 |" in card
    reached = model_card({**gates, "reached": True})
    assert "Every gate is reached." in reached
    assert "of gpa-engines at commit `abc`;" in reached
    resumed = model_card({**gates, "commits": ["a" * 40, "b" * 40]})
    assert "over the commits `aaaaaaa`, `bbbbbbb`, between which the run was resumed;" in resumed
