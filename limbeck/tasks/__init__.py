"""Tasks: problems, the judging of completions, and the scores that rewards are made of."""
