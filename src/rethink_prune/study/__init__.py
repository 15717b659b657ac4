"""One study: what is planned, and how it runs. ``run.py`` is the page to read."""
