"""One decoder for training and sampling, its cache, and its way to and from the disk."""
