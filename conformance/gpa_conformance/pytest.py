"""pytest plugin: the cases of the suite as tests of one engine.

    pytest --gpa-backend torch --gpa-model DIR --pyargs gpa_conformance
    pytest --gpa-engine my_engine:create --gpa-model DIR --gpa-baseline BASE --gpa-cases logits,cache

One test per case, named by the case's id; `-k` selects among them. What the engine cannot do is a skip with its reason,
a case of the known-failures file is an expected failure. Without `--gpa-backend` or `--gpa-engine` the plugin does
nothing and imports nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

# Everything of the suite is imported when a target is named: pytest loads this module in every run, anyone's.
if TYPE_CHECKING:
    from gpa_conformance.baseline import Baseline
    from gpa_conformance.cases import Case
    from gpa_conformance.limits import Limits
    from gpa_conformance.results import CaseResult
    from gpa_conformance.session import Session
    from gpa_conformance.target import Target
    from gpa_engines.checkpoint import Checkpoint

OPTIONS = {
    "backend": ("NAME", "engine of gpa-engines to test"),
    "engine": ("MODULE:FACTORY", "anyone's engine to test: factory(model_dir, **options)"),
    "model": ("DIR", "checkpoint folder, hub id, demo or tiny-random"),
    "baseline": ("DIR", "what gpa-conformance baseline wrote (made first where torch is)"),
    "dtype": ("NAME", "given to the engine"),
    "device": ("NAME", "given to the engine"),
    "cases": ("A,B", "families or case ids"),
    "known-failures": ("FILE", "a case id and a reason per line: expected failures"),
    "limits-as": ("DTYPE", "use the limits of this dtype"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpa-conformance", "is this engine the same model?")
    for name, (metavar, words) in OPTIONS.items():
        group.addoption(f"--gpa-{name}", metavar=metavar, default=None, help=words)
    group.addoption("--gpa-option", metavar="KEY=VALUE", action="append", default=[], help="another option; repeat")
    group.addoption("--gpa-utterances", metavar="N", type=int, default=None, help="held-out recordings for speech")
    group.addoption("--gpa-case-timeout", metavar="SECONDS", type=float, default=None, help="time limit of every case")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    given = [
        name for name in (*OPTIONS, "option", "case-timeout", "utterances") if _option(config, name) not in (None, [])
    ]
    if not given:
        return
    if not {"backend", "engine"} & set(given):
        raise pytest.UsageError(f"--gpa-{given[0]} is given, but not what to test: --gpa-backend or --gpa-engine")
    from gpa_codecs.errors import GpaError

    try:
        suite = _prepare(config)
    except GpaError as error:
        raise pytest.UsageError(str(error)) from error
    items.extend(
        ConformanceSuite.from_parent(session, name="gpa-conformance", nodeid="gpa-conformance", suite=suite).collect()
    )


class ConformanceSuite(pytest.Collector):
    """Holds the engine from the first case to the last."""

    def __init__(self, *, suite: Suite, **named: Any) -> None:
        super().__init__(**named)
        self.suite = suite
        self._resources = ExitStack()

    def collect(self) -> Iterator[ConformanceCase]:
        for case in self.suite.cases:
            item = ConformanceCase.from_parent(self, name=case.id, case=case)
            if reason := self.suite.known.get(case.id):
                item.add_marker(pytest.mark.xfail(reason=reason, raises=CaseFailed, strict=False))
            yield item

    def setup(self) -> None:
        from gpa_codecs.errors import GpaError

        try:
            self._session, self._runner = self._open()
        except GpaError as error:
            self._resources.close()
            pytest.fail(str(error), pytrace=False)

    def teardown(self) -> None:
        self._resources.close()

    def carry_out(self, case: Case) -> CaseResult:
        return self._runner.run(self._session.run(case))

    def _open(self) -> tuple[Session, asyncio.Runner]:
        """The engine, and the event loop that it belongs to; a baseline is made first where none is given."""
        from gpa_conformance.preparation import baseline_folder
        from gpa_conformance.session import Session

        runner = self._resources.enter_context(asyncio.Runner())
        folder = self._resources.enter_context(baseline_folder(self.suite.given_baseline))
        session = Session(self.suite.setup(runner.run(self.suite.baseline(folder))))
        runner.run(session.__aenter__())
        self._resources.callback(lambda: runner.run(session.__aexit__(None, None, None)))
        return session, runner


class ConformanceCase(pytest.Item):
    """One case as a test."""

    parent: ConformanceSuite

    def __init__(self, *, case: Case, **named: Any) -> None:
        super().__init__(**named)
        self.case = case

    def runtest(self) -> None:
        result = self.parent.carry_out(self.case)
        self.user_properties.extend((check.metric, check.value) for check in result.checks)
        if result.status == "skipped":
            pytest.skip(f"{result.case}: {result.reason}")
        if result.failed:
            raise CaseFailed(result)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        if isinstance(excinfo.value, CaseFailed):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, self.name


class CaseFailed(Exception):
    """A case failed, or broke the engine; the message holds its checks."""

    def __init__(self, result: CaseResult) -> None:
        from gpa_conformance.report.facts import show_check

        checks = [
            f"  {'ok  ' if check.passed else 'FAIL'} {show_check(check)}  ({check.source})" for check in result.checks
        ]
        super().__init__("\n".join([f"{result.case}: {result.title}", result.reason, *checks]))


class Suite(NamedTuple):
    """What a run of the plugin works with, checked before anything is loaded."""

    target: Target
    checkpoint: Checkpoint
    problem: str
    cases: tuple[Case, ...]
    packaged: dict[str, Case]
    known: dict[str, str]
    limits: Limits
    limits_as: str | None
    case_timeout: float | None
    given_baseline: Path | None
    utterances: int

    async def baseline(self, folder: Path) -> Baseline:
        """The given baseline, or one of the chosen cases that is made in `folder`."""
        from gpa_conformance.baseline import Baseline
        from gpa_conformance.preparation import find_codec, make_baseline

        if self.given_baseline is None:
            open_codec, _ = find_codec(self.checkpoint, self.problem, None)
            return await make_baseline(self.checkpoint, folder, open_codec, self.cases, utterances=self.utterances)
        baseline = Baseline.open(folder)
        baseline.check_model(self.checkpoint)
        return baseline

    def setup(self, baseline: Baseline) -> Any:
        from gpa_conformance.preparation import find_codec
        from gpa_conformance.session import Setup
        from gpa_engines.checkpoint.speech_domain import find_speech_domain

        make_codec, no_codec = find_codec(self.checkpoint, self.problem, None)
        return Setup(
            target=self.target,
            baseline=baseline,
            limits=self.limits,
            cases=self.packaged,
            space=self.checkpoint.token_space(),
            make_codec=make_codec,
            no_codec=no_codec,
            limits_as=self.limits_as,
            case_timeout=self.case_timeout,
            domain=find_speech_domain(self.checkpoint.root),
            utterances=self.utterances,
        )


def _prepare(config: pytest.Config) -> Suite:
    """Read and check the options. Raises GpaError."""
    from gpa_codecs.errors import GpaError
    from gpa_conformance.cases import load_cases, select
    from gpa_conformance.known_failures import read_known_failures
    from gpa_conformance.limits import load_limits
    from gpa_conformance.preparation import check_reference, check_utterances, open_checkpoint
    from gpa_conformance.speech.material import UTTERANCES
    from gpa_conformance.target import make_target
    from gpa_engines.engine_options import parse_options

    model, baseline, timeout = (_option(config, name) for name in ("model", "baseline", "case-timeout"))
    utterances = _option(config, "utterances")
    if model is None:
        raise GpaError("--gpa-model is missing: a checkpoint folder, a hub id, demo or tiny-random")
    if timeout is not None and not timeout > 0:
        raise GpaError(f"--gpa-case-timeout is {timeout:g}; expected seconds above 0")
    if baseline is None:
        check_reference("without --gpa-baseline one is made first, which")
    packaged = load_cases()
    cases = select(packaged, _option(config, "cases"))
    file = _option(config, "known-failures")
    known = {} if file is None else read_known_failures(file, {case.id for case in packaged})
    limits, limits_as = load_limits(), _option(config, "limits-as")
    if limits_as is not None:
        limits.for_dtype(limits_as)
    checkpoint, problem = open_checkpoint(model)
    named = {name: value for name in ("dtype", "device") if (value := _option(config, name)) is not None}
    target = make_target(
        checkpoint.root,
        backend=_option(config, "backend"),
        engine=_option(config, "engine"),
        options=named | parse_options(_option(config, "option")),
    )
    return Suite(
        target,
        checkpoint,
        problem,
        tuple(cases),
        {case.id: case for case in packaged},
        known,
        limits,
        limits_as,
        timeout,
        Path(baseline) if baseline is not None else None,
        UTTERANCES if utterances is None else check_utterances("--gpa-utterances", utterances),
    )


def _option(config: pytest.Config, name: str) -> Any:
    return config.getoption(f"--gpa-{name}")
