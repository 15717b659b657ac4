"""The commands: their arguments, and sweeps of many studies."""
