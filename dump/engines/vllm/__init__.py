"""The vLLM engine: its requests, its connector inside the worker, its spool."""
