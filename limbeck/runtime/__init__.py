"""This machine and the processes that stages run in."""
