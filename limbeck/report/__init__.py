"""Reports of runs: a page and a JSON file, written from a run's folders without loading a model."""
