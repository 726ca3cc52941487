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


def main(page=PAGE):
    """Write the page with tables that are up to date; beside the old one, its pictures too."""

    def table(found):
        document = json.loads((PAGE.parent / found[2]).read_text(encoding="utf-8"))
        if page == PAGE:
            picture = (PAGE.parent / found[2]).with_suffix(".svg")
            picture.write_bytes(plot.picture(document, "svg"))
        return f"{found[1]}\n{report.markdown(document)}\n\n"

    page.write_text(TABLE.sub(table, PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
