"""A piece of a job → bytes and sums: readers, workers, preparations, edits, the pipeline."""
