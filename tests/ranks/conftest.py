from pathlib import Path

collect_ignore = [path.name for path in Path(__file__).parent.glob("*programs.py")]
"""What the ranks run, which takes arguments."""
