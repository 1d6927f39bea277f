"""The study runner: from a question to a directory with every number, and a report of it."""
