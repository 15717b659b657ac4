"""What can be done with the network of a finished stage: load it, export it, evaluate it, measure it.

Everything that ``python -m rethink_prune.export`` does is here, one file for each thing.
"""
