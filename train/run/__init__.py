"""A training run: set-up, folder, checkpoints, reports, memory."""
