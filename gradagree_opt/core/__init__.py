"""The pipeline of an aggregation: measure, decide, apply."""
