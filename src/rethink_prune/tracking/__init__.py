"""Curves and tables for the programs that show them.

:mod:`tensorboard` writes a study's event files, and :mod:`board` those of many studies, for ``rethink-prune-board``.
:mod:`trackers` has the other programs, each behind one protocol, and :mod:`sender` feeds them.
"""
