"""The paged cache gives back what was written, to its owner only, whoever comes and goes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gpa_engines.backends.onnx.paged_cache import PagedCache

LAYERS, KV, WIDTH, PAGE = 2, 3, 4, 8


def new_positions(random: np.random.Generator, count: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    keys = random.standard_normal((1, KV, LAYERS, WIDTH, count), np.float32)
    return keys, random.standard_normal((1, KV, LAYERS, count, WIDTH), np.float32)


def read(
    cache: PagedCache, slots: list[int], lengths: list[int], row: int, exclusive: bool
) -> list[NDArray[np.float32]]:
    """Keys and values [LAYERS, KV, length, WIDTH] of one row of a view, by what the view says is its own."""
    view = cache.view(slots, lengths, exclusive=exclusive)
    own = np.flatnonzero(view.ownership[row])
    assert (view.owner[own] == row).all()
    visible = view.mask[own].reshape(-1) == 0
    keys = [layer[own][:, :, 0].transpose(1, 0, 3, 2).reshape(KV, -1, WIDTH)[:, visible] for layer in view.keys]
    values = [layer[own][:, :, 0].transpose(1, 0, 2, 3).reshape(KV, -1, WIDTH)[:, visible] for layer in view.values]
    return [np.stack(keys), np.stack(values)]


def test_slots_come_and_go_and_each_keeps_its_own() -> None:
    random = np.random.default_rng(0)
    cache = PagedCache(LAYERS, KV, WIDTH, tokens=300, slots=6, page=PAGE)
    held: dict[int, list[NDArray[np.float32]]] = {}
    reserved: dict[int, int] = {}
    for _ in range(400):
        if held and random.random() < 0.15:
            slot = int(random.choice(list(held)))
            cache.release(slot)
            del held[slot], reserved[slot]
        wanted = int(random.integers(1, 90))
        slot = cache.allocate(wanted)
        assert (slot is None) == (len(held) == 6 or sum(reserved.values()) + wanted > 300)
        if slot is not None:
            reserved[slot] = wanted
            held[slot] = [np.empty((LAYERS, KV, 0, WIDTH), np.float32)] * 2
        for slot in held:
            start = held[slot][0].shape[2]
            count = min(int(random.integers(0, 12)), reserved[slot] - start)
            if count:
                keys, values = new_positions(random, count)
                cache.write([slot], [start], keys, values)
                added = [keys[0].transpose(1, 0, 3, 2), values[0].swapaxes(0, 1)]
                held[slot] = [np.concatenate(pair, axis=2) for pair in zip(held[slot], added, strict=True)]
        slots = list(held)
        lengths = [held[slot][0].shape[2] for slot in slots]
        for row, slot in enumerate(slots):
            exclusive = bool(random.integers(2))
            for found, expected in zip(read(cache, slots, lengths, row, exclusive), held[slot], strict=True):
                np.testing.assert_array_equal(found, expected)


def test_pages_in_use_are_the_first_ones_and_ascend() -> None:
    random = np.random.default_rng(1)
    cache = PagedCache(LAYERS, KV, WIDTH, tokens=200, slots=4, page=PAGE)
    slots = [cache.allocate(40) for _ in range(4)]
    for start in range(0, 40, PAGE):
        for slot in slots:
            assert slot is not None
            cache.write([slot], [start], *new_positions(random, PAGE))
    assert slots[0] is not None
    cache.release(slots[0])
    rest = [slot for slot in slots[1:] if slot is not None]
    view = cache.view(rest, [40] * 3, exclusive=False)
    assert view.ownership.sum(axis=0).tolist() == [1] * 15
    assert all(len(np.flatnonzero(row)) == 5 for row in view.ownership)


def test_a_view_is_memory_of_the_cache_and_an_exclusive_one_holds_no_foreign_page() -> None:
    random = np.random.default_rng(2)
    cache = PagedCache(LAYERS, KV, WIDTH, tokens=64, slots=2, page=PAGE)
    first, second = cache.allocate(32), cache.allocate(32)
    assert first is not None
    assert second is not None
    for start in range(0, 32, PAGE):
        for slot in (first, second):
            cache.write([slot], [start], *new_positions(random, PAGE))
    shared = cache.view([first], [32], exclusive=False)
    assert len(shared.owner) == 7
    assert np.isneginf(shared.mask[1::2]).all()
    assert all(layer.base is not None and layer.flags.c_contiguous for layer in shared.keys)
    assert len(cache.view([first], [32], exclusive=True).owner) == 4


def test_nothing_filled_is_one_masked_position() -> None:
    cache = PagedCache(LAYERS, KV, WIDTH, tokens=64, slots=2, page=PAGE)
    slot = cache.allocate(10)
    assert slot is not None
    view = cache.view([slot], [0], exclusive=False)
    assert view.keys[0].shape == (1, KV, 1, WIDTH, 1)
    assert view.values[0].shape == (1, KV, 1, 1, WIDTH)
    assert np.isneginf(view.mask).all()
    assert not view.ownership.any()
