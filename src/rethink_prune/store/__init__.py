"""Finished and unfinished stages on disk.

``store.py`` is the folder of all stages, ``stage.py`` one stage and what may be done with it, ``ownership.py`` which
process works on it, ``listing.py`` what ``python -m rethink_prune.status`` shows.
"""
