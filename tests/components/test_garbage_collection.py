"""Cyclic garbage is collected at the configured steps, and the collector is restored afterwards."""

import gc
import weakref

import pytest

from components.garbage_collection import GarbageCollection, resume_after_imports

pytestmark = pytest.mark.quick


class Knot:
    """Garbage that only the collector finds."""

    def __init__(self) -> None:
        self.itself = self


def test_garbage_is_collected_at_the_interval_and_not_between():
    assert gc.isenabled()
    collection = GarbageCollection(10)
    try:
        collection.after_step(1)
        assert not gc.isenabled()
        assert gc.get_freeze_count() > 0
        knot = weakref.ref(Knot())
        for step in range(2, 10):
            collection.after_step(step)
            assert knot() is not None, step
        collection.after_step(10)
        assert knot() is None
    finally:
        collection.close()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_without_an_interval_nothing_is_touched():
    collection = GarbageCollection(None)
    for step in range(3):
        collection.after_step(step)
    collection.close()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_a_disabled_collector_is_enabled_and_skips_what_was_imported():
    resume_after_imports()
    assert gc.get_freeze_count() == 0, "it was enabled: a program that calls `main` keeps its own settings"
    gc.disable()
    try:
        resume_after_imports()
        assert gc.isenabled()
        assert gc.get_freeze_count() > 0
    finally:
        gc.enable()
        gc.unfreeze()
