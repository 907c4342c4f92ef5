"""A small folder in the form of mini-ImageNet."""

from pathlib import Path

from PIL import Image

LISTS = ("train.csv", "val.csv", "test.csv")


def write_photographs(root: Path) -> Path:
    """Two classes a split, n0 to n5 in the order of the lists, four images of one colour each."""
    root.mkdir(exist_ok=True)
    for place, name in enumerate(LISTS):
        labels = [f"n{2 * place}", f"n{2 * place + 1}"]
        lines = [f"{image}.jpg,{label}" for label in labels for image in range(4)]
        (root / name).write_text("\n".join(["filename,label", *lines]))
        for label in labels:
            (root / label).mkdir()
            for image in range(4):
                colour = (40 * int(label[1:]), 80 * image, 0)
                Image.new("RGB", (90, 84), colour).save(root / label / f"{image}.jpg")
    return root
