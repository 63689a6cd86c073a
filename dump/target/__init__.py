"""The target before its weights are read: config, layers, presets, where its weights lie."""
