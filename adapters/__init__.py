"""One thin module per framework; each imports its framework only when it is itself imported."""
