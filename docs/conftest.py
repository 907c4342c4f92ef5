"""What pytest leaves alone here: a hook of mkdocs, and a tour that does its work when imported."""

collect_ignore = ["site.py", "tour.py"]
