"""The pictures of README and docs/tour.md: the live view of finished runs, in headless Chromium.

python -m tcsae.train --multirun consistency=none,scale_free,shuffled training.tokens=800000
python scripts/pictures.py multirun/SWEEP
"""

from __future__ import annotations

import argparse
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from chrome import Page, chrome  # noqa: E402

from tcsae.live import server  # noqa: E402
from tcsae.live.sides import open_sides  # noqa: E402

PICTURES = ROOT / "docs" / "pictures"
LARGEST = 200_000
"""Bytes of a picture."""
TEXT = (
    "My lord, the messenger is come from France with letters from the queen, who prays you to "
    "return before the winter. We sailed three days upon the sea, and on the fourth the storm "
    "broke the mast, and the waves came over the deck; the sailors cried out and cut the ropes, "
    "but the wind did not abate till morning. Then we saw the shore, white cliffs and a harbour."
)


def take(page: Page, address: str) -> None:
    """strips.png and map.png."""
    page.size(1100)
    page.open(address)
    page.wait("document.body.dataset.ready")
    page.run("document.querySelector('#top').value = 1")
    page.type("#read-text", TEXT)
    page.click("#read")
    page.wait("document.body.dataset.read")
    page.part("#rows", PICTURES / "strips.png")
    page.part("#map", PICTURES / "map.png")
    for name in ("strips.png", "map.png"):
        size = (PICTURES / name).stat().st_size
        assert size < LARGEST, f"{name}: {size} bytes"
        print(f"docs/pictures/{name}: {size:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    given = parser.parse_args()
    PICTURES.mkdir(exist_ok=True)
    with server.listen(0) as listening, chrome() as page:
        assert page is not None, "no Chromium on PATH"
        running = server.server_of(open_sides(given.runs, print), "token")
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            take(page, f"http://{server.HOST}:{listening.getsockname()[1]}/token/")
        finally:
            running.should_exit = True
            thread.join()


if __name__ == "__main__":
    main()
