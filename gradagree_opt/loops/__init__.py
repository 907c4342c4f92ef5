"""Measure and apply inside the user's own loop."""
