"""Family "speech": what an engine hears, speaks and converts, counted in words, pitch and seconds.

Only a trained checkpoint can be judged so: its `speech_domain.json` has held-out recordings with their text. Audio that
the engine speaks is heard by an independent recogniser and by the engine itself, and both are held against what they
hear in the recordings.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from gpa_conformance.cases import Case
from gpa_conformance.context import Context, Skip
from gpa_conformance.families.answers import Answer, answers, faults, fitting, request
from gpa_conformance.families.company import Pair, compare
from gpa_conformance.families.findings import Findings
from gpa_conformance.families.speech_verdict import Verdict
from gpa_conformance.prompts import Prompt
from gpa_conformance.results import CaseResult
from gpa_conformance.speech.material import NO_DOMAIN, SpeechMaterial, Spoken
from gpa_engines.engine import GenerationRequest

Words = tuple[str, ...]


async def run(context: Context, case: Case) -> CaseResult:
    """Kinds: "transcribe", "speak" (tasks tts-a and vc), "concurrent"."""
    material = context.speech
    if material is None:
        raise Skip(NO_DOMAIN)
    if context.make_codec is None:
        raise Skip(context.no_codec)
    if not any(item.trained for item in material.items):
        raise Skip("the checkpoint's speech_domain.json has no held-out utterance of a trained voice")
    found = Findings(case)
    match case.kind:
        case "transcribe":
            await _transcribe(context, case, material, found)
        case "speak":
            await _speak(context, case, material, found)
        case "concurrent":
            await _concurrent(context, case, material, found)
        case kind:
            raise ValueError(f"case {case.id} has the kind {kind!r}")
    return found.result()


async def _transcribe(context: Context, case: Case, material: SpeechMaterial, found: Findings) -> None:
    given = await _ask(context, case, material, case.spec["concurrency"])
    verdict = Verdict(context, case, material, found)
    texts = [material.words(each.ids) for each in given]
    natural = [await asyncio.to_thread(material.natural, item) for item in material.items]
    verdict.transcribed(texts, _recognised(material, natural))
    recorded = _recorded(context, case, material)
    theirs = [None if ids is None else material.words(ids) for ids in recorded]
    verdict.like_baseline(given, recorded, texts, theirs)
    verdict.close({"": texts})
    found.count("stream_faults", faults(given))


async def _speak(context: Context, case: Case, material: SpeechMaterial, found: Findings) -> None:
    given = await _ask(context, case, material, case.spec["concurrency"])
    verdict = Verdict(context, case, material, found)
    spoken = await _decoded(case, material, [each.ids for each in given])
    natural = [await asyncio.to_thread(material.natural, item) for item in material.items]
    own = await _hear_itself(context, case, material, spoken)
    own_natural = await _hear_itself(context, case, material, natural)
    recognised, recognised_natural = _recognised(material, spoken), _recognised(material, natural)
    if recognised is not None and recognised_natural is not None:
        verdict.understood("recogniser", recognised, recognised_natural)
    verdict.understood("itself", own, own_natural)
    verdict.right(own if recognised is None else recognised)
    verdict.pitched(spoken, natural)
    verdict.paced(spoken, natural)
    if not case.spec["sampling"].get("temperature"):
        recorded = _recorded(context, case, material)
        audio = await _decoded(case, material, recorded)
        theirs = _recognised(material, audio)
        if theirs is None:
            theirs = await _hear_itself(context, case, material, audio)
        heard = [None if ids is None else words for ids, words in zip(recorded, theirs, strict=True)]
        verdict.like_baseline(given, recorded, own if recognised is None else recognised, heard)
    listeners = {"itself": own} if recognised is None else {"recogniser": recognised, "itself": own}
    verdict.close(listeners, spoken)
    found.count("stream_faults", faults(given))


async def _concurrent(context: Context, case: Case, material: SpeechMaterial, found: Findings) -> None:
    """Each greedy answer among `concurrency` requests is the one given alone."""
    pairs: dict[str, Pair] = {}
    given: list[Answer] = []
    for name in case.spec["greedy"]:
        asked = context.cases[name]
        wanted = await _requests(context, asked, material)
        alone = await _ask(context, asked, material, 1)
        together = await _ask(context, asked, material, case.spec["concurrency"])
        given += [*alone, *together]
        for number, item in enumerate(material.items):
            name = f"{asked.spec['task']} {number + 1}, {item.utterance.text!r}"
            pairs[name] = Pair(wanted[number], alone[number], together[number])
    if "batch" not in context.engine.info.capabilities:
        found.note("no batch: the engine runs concurrent requests one after the other")
    found.metrics["answers"] = len(given) / 2
    await compare(context, found, "differing_answers", pairs)
    found.count("stream_faults", faults(given))


async def _ask(context: Context, case: Case, material: SpeechMaterial, concurrency: int) -> list[Answer]:
    """The answers to all items; greedy ones are asked for once in a run."""
    sampled = bool(case.spec["sampling"].get("temperature"))
    key = (case.id, concurrency)
    if sampled or key not in material.answers:
        wanted = await _requests(context, case, material)
        material.answers[key] = await answers(context.engine, wanted, concurrency)
    return material.answers[key]


async def _requests(context: Context, case: Case, material: SpeechMaterial) -> list[GenerationRequest]:
    """One request per item, as the engine can serve it; sampled ones have a seed each."""
    wanted = await asyncio.to_thread(material.requests, case.spec["task"], case.spec["sampling"])
    if case.spec["sampling"].get("temperature") and "seed" in context.engine.info.capabilities:
        first = case.spec["seed"] + context.seed
        wanted = [
            replace(each, sampling=replace(each.sampling, seed=first + index)) for index, each in enumerate(wanted)
        ]
    return [fitting(context, each) for each in wanted]


async def _decoded(case: Case, material: SpeechMaterial, given: Sequence[Sequence[int] | None]) -> list[Spoken | None]:
    """Answers as audio in the voices that they are to have."""
    voices = [item.voice(case.spec["task"]) for item in material.items]
    return [
        None if ids is None else await asyncio.to_thread(material.speak, ids, voice)
        for ids, voice in zip(given, voices, strict=True)
    ]


async def _hear_itself(
    context: Context, case: Case, material: SpeechMaterial, audio: Sequence[Spoken | None]
) -> list[Words]:
    """What the engine's own transcription makes of audio; no word of none."""
    length = material.new_tokens("stt")[0]
    prompts: dict[Spoken, Prompt] = {}
    for each in audio:
        if each is None or each in material.transcripts or each in prompts:
            continue
        prompt = await asyncio.to_thread(material.transcribe_prompt, each.pcm)
        if prompt is None:
            material.transcripts[each] = ()
        else:
            prompts[each] = prompt
    wanted = [fitting(context, request(prompt, length, stop=True)) for prompt in prompts.values()]
    given = await answers(context.engine, wanted, case.spec["concurrency"])
    for each, text in zip(prompts, given, strict=True):
        material.transcripts[each] = material.words(text.ids)
    return [() if each is None else material.transcripts[each] for each in audio]


def _recognised(material: SpeechMaterial, audio: Sequence[Spoken | None]) -> list[Words] | None:
    """What the independent recogniser hears, where there is one; no word of none."""
    if material.recogniser[0] is None:
        return None
    return [() if each is None else each.heard or () for each in audio]


def _recorded(context: Context, case: Case, material: SpeechMaterial) -> list[tuple[int, ...] | None]:
    """The baseline's answers, None for items that it does not have."""
    answered = context.baseline.spoken(case)
    return [answered.get(item.utterance.clip.path) for item in material.items]
