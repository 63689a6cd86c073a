"""From stored samples to batches on the device: stream, rows, anchors, feed."""
