"""What can be done with the network of a finished stage: load, export, evaluate, measure and scan it.

Everything that ``rethink_prune.export`` and ``rethink_prune.sensitivity`` do is here, one file for each thing.
"""
