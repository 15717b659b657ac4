"""What each operation does to the ids of its input's channels: one short function per kind of operation.

A rule takes the ids and a call, records what has to go together or must stay, and returns the flow of the result. Where
it does not know better it raises `NoRule`, and everything the call reads is left whole: a gap in the rules costs
pruning, never correctness.
"""
