"""Curves and tables for the programs that show them.

A tracker is a module with the same two parts as :mod:`tensorboard`: a class that takes one arm's rows as they come
(``write(rows)`` with all rows so far, ``close()``), and ``write_study(...)``, which writes a study as one row.
:mod:`board` writes many studies at once, for ``rethink-prune-board``.
"""
