"""Which runs a study has, and where they lie."""
