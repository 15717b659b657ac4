"""Paths that were documented go on working."""

from __future__ import annotations

from rethink_prune.pruning import surgery
from rethink_prune.surgery.architecture import Architecture
from rethink_prune.surgery.cut import reshape


def test_architecture_and_reshape_are_found_where_they_were_documented() -> None:
    assert surgery.Architecture is Architecture
    assert surgery.reshape is reshape
