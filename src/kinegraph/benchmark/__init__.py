"""How fast a model answers: every backend side by side, each in a process of its own.

settings   what was asked        plan      what is measured, and in which processes
facts      what the model is     machine   where it ran
worker     one process           processes the other end of its pipes
session    the measurement       report, table, plot   what came out
"""

from __future__ import annotations
