"""The start of the page's process."""

from __future__ import annotations

import gc

from demo.app import _without_garbage_collection


def test_garbage_is_not_looked_for_while_libraries_load_and_is_afterwards() -> None:
    try:
        with _without_garbage_collection():
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
