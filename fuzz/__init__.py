"""Fuzzing: what outsiders can send, and what must not happen then (docs/fuzzing.md).

A *target* is a function from bytes to nothing. It returns, or raises one of its ALLOWED errors: those say what is
wrong with the input. Anything else (another exception, a hang, more than bounded memory, a broken promise) is a find.
"""
