"""What the tests of study files share."""

from pathlib import Path

from gradagree_opt.ablation.study import loading

SHIPPED = sorted(path.stem for path in (Path(loading.__file__).parents[1] / "studies").iterdir())


def edited(path: Path, old: str, new: str) -> Path:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    return path
