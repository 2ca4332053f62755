"""The decoder that is used for training and sampling, its KV cache, and reading and writing its files."""
