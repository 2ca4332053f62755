"""Review of rows by people: queues, verdicts, edits, and the agreement of reviewers."""
