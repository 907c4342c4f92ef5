collect_ignore = ["programs.py", "wrapped_programs.py", "lightning_programs.py"]
"""What the ranks run, which takes arguments."""
