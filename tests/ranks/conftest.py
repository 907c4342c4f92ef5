from pathlib import Path

collect_ignore = [
    "common.py",
    *(path.name for path in Path(__file__).parent.glob("*_programs.py")),
]
"""What the ranks run, which takes arguments."""
