"""Reports of runs, written from their folders: no model is opened."""
