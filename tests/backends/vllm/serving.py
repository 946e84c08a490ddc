"""A program that starts an engine and runs requests that do not end by themselves; its standard output is JSON lines.

First the processes that the engine has started, then, once every request has a token, "running"; when they have ended,
how; and what the next request gets.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import psutil

from gpa_engines.engine import Engine
from gpa_engines.registry import create_engine
from tests.backends.vllm.asking import answer, request

REQUESTS = 4


def say(**what: object) -> None:
    print(json.dumps(what), flush=True)


async def run(engine: Engine) -> None:
    begun = asyncio.Event()
    waiting = REQUESTS

    async def endless() -> str:
        nonlocal waiting
        try:
            first = True
            async for _ in engine.generate(request(max_new_tokens=30_000)):
                if first:
                    waiting -= 1
                    first = False
                if not waiting:
                    begun.set()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "ended"

    tasks = [asyncio.create_task(endless()) for _ in range(REQUESTS)]
    await begun.wait()
    say(running=True)
    say(outcomes=await asyncio.gather(*tasks))
    try:
        await answer(engine, request())
    except Exception as error:
        say(next=f"{type(error).__name__}: {error}")
    await engine.close()


def main() -> None:
    engine = create_engine("vllm", Path(sys.argv[1]), dtype="float32", max_context=32767, max_num_seqs=8)
    children = psutil.Process().children(recursive=True)
    say(processes={each.pid: " ".join(each.cmdline()) for each in children})
    asyncio.run(run(engine))


if __name__ == "__main__":
    main()
