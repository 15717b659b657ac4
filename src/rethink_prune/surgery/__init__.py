"""What may be taken out of a network, and taking it out. ``channels.py`` says what, ``cut.py`` does it."""
