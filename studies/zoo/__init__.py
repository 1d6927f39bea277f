"""The zoo evaluated: tasks, measurements, intervals over documents and seeds, the report."""
