"""espeak-ng through its C library: samples, and which phoneme is spoken when."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from gpa_codecs.errors import BackendError

# Names of speak_lib.h.
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_INITIALIZE_PHONEME_EVENTS = 1
_RATE, _PITCH, _RANGE = 1, 3, 4
_EVENT_LIST_TERMINATED, _EVENT_PHONEME = 0, 7
_POS_CHARACTER, _CHARS_UTF8 = 1, 1

_STRESS = "',"


class _EventId(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8))


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EventId),
    )


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


@dataclass(frozen=True, slots=True, eq=False)
class Utterance:
    """pcm: int16[N] at `sample_rate` Hz. phonemes: (start in ms, name without its stress; "" is silence), in order."""

    pcm: NDArray[np.int16]
    sample_rate: int
    phonemes: tuple[tuple[int, str], ...]


class Espeak:
    """The synthesiser. The library keeps global state, so a process has one of these, used from one thread."""

    def __init__(self) -> None:
        """Raises BackendError where espeak-ng, or its data, is not installed."""
        self._library, self.sample_rate = _library()
        self._chunks: list[NDArray[np.int16]] = []
        self._phonemes: list[tuple[int, str]] = []
        # ctypes does not keep the callback alive; C calls it until the process ends.
        self._callback = _Callback(self._receive)
        self._library.espeak_SetSynthCallback(self._callback)
        self._setting: tuple[str, int, int] | None = None

    def speak(self, text: str, voice: str, *, pitch: int, rate: int) -> Utterance:
        """Speak monotonously. voice: as "en-us+f1". pitch: 0 to 99, the library's own scale. rate: words per minute.

        Raises BackendError for a voice that espeak-ng does not have.
        """
        if self._setting != (voice, pitch, rate):
            if self._library.espeak_SetVoiceByName(voice.encode()):
                raise BackendError(f"espeak-ng has no voice {voice!r}: pip install --upgrade espeakng-loader")
            for parameter, value in ((_RATE, rate), (_PITCH, pitch), (_RANGE, 0)):
                self._library.espeak_SetParameter(parameter, value, 0)
            self._setting = voice, pitch, rate
        self._chunks.clear()
        self._phonemes.clear()
        # The breath of some voices is noise, which espeak-ng seeds by the clock.
        self._library.espeak_ng_SetRandSeed(0)
        data = text.encode() + b"\0"
        self._library.espeak_Synth(data, len(data), 0, _POS_CHARACTER, 0, _CHARS_UTF8, None, None)
        self._library.espeak_Synchronize()
        return Utterance(np.concatenate(self._chunks), self.sample_rate, tuple(self._phonemes))

    def _receive(self, samples: ctypes._Pointer, count: int, events: ctypes._Pointer) -> int:
        if count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        index = 0
        while events[index].type != _EVENT_LIST_TERMINATED:
            if events[index].type == _EVENT_PHONEME:
                name = bytes(events[index].id.string).split(b"\0")[0].decode("utf-8", "replace")
                self._phonemes.append((events[index].audio_position, name.lstrip(_STRESS)))
            index += 1
        return 0


@cache
def _library() -> tuple[ctypes.CDLL, int]:
    """The library, started once in a process, and the rate of its samples in Hz."""
    try:
        import espeakng_loader
    except ImportError as error:
        raise BackendError("speech is synthesised with espeak-ng: pip install espeakng-loader") from error
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    data = str(espeakng_loader.get_data_path()).encode()
    rate = library.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, 0, data, _INITIALIZE_PHONEME_EVENTS)
    if rate <= 0:
        raise BackendError("espeak-ng does not start, its data are missing: reinstall espeakng-loader")
    return library, rate
