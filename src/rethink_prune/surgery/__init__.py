"""What may be removed from a network, and removing it.

``channels.py`` finds the channels that can go: it traces the network (``graph.py``), pushes channel ids through it
(``follow.py``, ``channel_ids.py``, ``function_rules.py``) and plans a cut. ``cut.py`` cuts, ``branches.py`` removes
residual branches, and ``architecture.py`` describes the result as data, with masks of single weights.
"""
