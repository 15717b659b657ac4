"""What can be done with a finished network: load it, take it along, test it elsewhere, measure it."""
