"""Speak strings in a process of its own: the library's flutter and pauses go on from one string to the next, so only a
new process speaks the same strings the same way again. Reads
{"texts": [...], "voices": [[name, variant, hertz], ...]} from standard input, writes the corpus to the file that its
argument names, and prints how many texts are done.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from demo_training.corpus import Narrator, SpeakerVoice, record
from gpa_codecs.errors import GpaError


def main() -> int:
    """Exit status: 0; 2 with a message where there is no synthesiser."""
    asked = json.load(sys.stdin)
    voices = [SpeakerVoice(*voice) for voice in asked["voices"]]
    try:
        corpus = record(Narrator(), asked["texts"], voices, lambda done: print(done, flush=True))
    except GpaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    corpus.save(Path(sys.argv[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
