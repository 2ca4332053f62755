"""What people review: queues of rows, verdicts, and how reviewers agree."""
