"""The corpus: rows, chat templates, loss masks, token samples."""
