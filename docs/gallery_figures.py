"""The figures of docs/gallery.md and README's, taken out of the built pages and made small; the repository holds them.

``python docs/gallery_figures.py`` from the checkout's root, after ``sphinx-build -W docs docs/_build``.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

DOCS = Path(__file__).parent
WIDTH = 1000
#: Where a figure goes, the page that it is of, and its number there, from 0.
FIGURES = {
    "front": ("numpyro_gallery", 0),
    "gallery/swiss_roll": ("tutorials/programs", 0),
    "gallery/heartbeat": ("tutorials/binary", 0),
    "gallery/posterior_digits": ("tutorials/images", 1),
    "gallery/regression": ("tutorials/conditional", 0),
    "gallery/missing_values": ("tutorials/missing", 0),
    "gallery/likelihood": ("tutorials/table", 1),
    "gallery/quasi_static": ("guides/likelihood", 0),
    "gallery/schedules": ("guides/symbols", 0),
    "gallery/composition_bias": ("guides/posteriors", 0),
    "gallery/simulation": ("tutorials/coming_from", 0),
}


def shrink(source: Path, target: Path) -> None:
    """At most ``WIDTH`` pixels wide, 128 colors."""
    from PIL import Image

    image = Image.open(source).convert("RGB")
    if image.width > WIDTH:
        image = image.resize((WIDTH, round(image.height * WIDTH / image.width)), Image.Resampling.LANCZOS)
    target.parent.mkdir(parents=True, exist_ok=True)
    image.quantize(128, dither=Image.Dither.NONE).save(target, optimize=True)
    print(f"{target.relative_to(DOCS)}: {target.stat().st_size / 1024:.0f} KiB")


def figure(built: Path, page: str, number: int) -> Path:
    """A figure that a notebook's cell drew."""
    text = (built / f"{page}.html").read_text()
    found = re.findall(r'<img[^>]*src="([^"]*_images/[0-9a-f]{32,}\.png)"', text)
    return (built / page).parent / found[number]


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS / "_build"
    for name, (page, number) in FIGURES.items():
        shrink(figure(folder, page, number), DOCS / "figures" / f"{name}.png")
