"""Curves and tables for the programs that show them.

A tracker is a module with the same three parts as :mod:`tensorboard`: a class that takes one arm's rows as they come
(``write(rows)`` with all rows so far, ``close()``); ``write_study(...)``, which writes a study as one row; and, for
reports, ``write_seed_curves(...)``.
"""
