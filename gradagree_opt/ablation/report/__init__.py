"""What comes out of a study."""
