collect_ignore = ["site.py", "tour.py"]  # a hook of mkdocs, and what works when it is imported
