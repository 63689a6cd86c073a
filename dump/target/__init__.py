"""The target before its weights are read: config, layers, presets, and where its weights are."""
