"""Tasks: sources of problems, the judging of completions, and the scores from which rewards are computed."""
