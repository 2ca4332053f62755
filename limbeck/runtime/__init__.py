"""This machine, its memory allocator, and the worker processes that stages run in."""
