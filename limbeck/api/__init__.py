"""The interface for Python: `limbeck.run` executes a recipe, `limbeck.Run` reads what a run has made."""
