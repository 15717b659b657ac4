"""Finished and unfinished stages on disk. ``stages.py`` is the page to read."""
