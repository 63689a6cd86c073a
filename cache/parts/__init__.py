"""Parts of a store: arrays as shard files, sealed records, and the index over all parts."""
