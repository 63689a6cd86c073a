"""From captured batches to parts on disk: filling, blocks of memory, the pipeline."""
