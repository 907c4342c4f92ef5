"""Helpers of the tests: references written from the paper, matrix samplers, configurations."""
