"""Many runs: groups, statistics, verdicts, tables, pictures, and a page. ``__main__.py`` is the command."""
