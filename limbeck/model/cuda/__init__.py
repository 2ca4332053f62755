"""Triton kernels for NVIDIA cards: the operations of a decoder whose results do not depend on the batch."""
