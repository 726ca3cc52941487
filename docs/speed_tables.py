"""Write the tables of speed.md, and draw its pictures, from documents of ``cupycorr bench --json``.

Run as ``python docs/speed_tables.py``. A table stands between comments, which name its document.
"""

import json
import re
import sys
from pathlib import Path

from cupycorr.cli.bench import plot, report

PAGE = Path(__file__).with_name("speed.md")
TABLE = re.compile(r"(<!-- (measured/\w+\.json) -->\n).*?(?=<!-- end -->)", re.DOTALL)
PICTURE = re.compile(r"\]\((measured/\w+)\.svg\)")


def main(page=PAGE):
    """Write the page with tables that are up to date; in its own place, with its pictures."""
    text = PAGE.read_text(encoding="utf-8")
    page.write_text(TABLE.sub(table, text), encoding="utf-8")
    for picture in PICTURE.findall(text) if page == PAGE else ():
        drawn = plot.picture(read(f"{picture}.json"), "svg")
        Path(PAGE.parent, f"{picture}.svg").write_bytes(drawn)


def table(found):
    return f"{found[1]}\n{report.markdown(read(found[2]))}\n\n"


def read(document):
    return json.loads(Path(PAGE.parent, document).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
