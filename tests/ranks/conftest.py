collect_ignore = ["programs.py"]  # what the ranks run, which takes arguments
