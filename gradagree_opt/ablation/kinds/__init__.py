"""The kinds of tasks that a study can be of."""
