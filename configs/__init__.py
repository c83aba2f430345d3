"""One file a job; `get_config(arg)` returns an `ml_collections.ConfigDict` with every field set."""
