"""Random inputs for a given time: each module with `run(seconds, seed) -> list[str]` gives its failures, one a line."""
