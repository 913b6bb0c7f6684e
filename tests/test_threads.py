"""Crews of threads."""

import sys
from types import ModuleType

import pytest

from expo.threads import Crew, side_by_side


def test_a_thread_starts_while_another_one_imports_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", ModuleType("torch"))  # as far as it has come by then
    done: list[int] = []
    with Crew() as crew:
        crew.start(lambda: done.append(1))
        crew.wait(lambda: None)
    assert done == [1]
    assert list(side_by_side(lambda item: 2 * item, [1, 2, 3], 2)) == [2, 4, 6]
