"""SPD: heads that draft one token at a time beside a pipeline of stages."""
