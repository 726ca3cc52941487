"""Check built pages: links, and what a browser shows, narrow and wide, light and dark.

    python .ci/browse.py FOLDER

The browser is Chromium, driven by Playwright; without it only links are checked, which is said.
"""

import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

WIDTHS, SCHEMES = (400, 1400), ("light", "dark")
LEAST_PIXELS, LEAST_CONTRAST = 11, 4.5
"""Of text; the contrast is that of WCAG 2.2, level AA."""
LOOK = """
([leastPixels, leastContrast]) => {
  const wrong = [];
  // Code and wide tables scroll by themselves; what is around them must not.
  for (const element of document.querySelectorAll("html, .content"))
    if (element.scrollWidth > element.clientWidth)
      wrong.push(`${element.localName} is ${element.scrollWidth} pixels wide`);
  for (const image of document.querySelectorAll("article img"))
    if (!image.naturalWidth) wrong.push(`${image.getAttribute("src")} is not shown`);
  const colour = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const c = colour(getComputedStyle(e).backgroundColor);
      if (c.length == 3 || c[3] == 1) return c;
    }
    return [255, 255, 255];
  };
  for (const element of document.querySelectorAll("article *")) {
    const own = [...element.childNodes].some(n => n.nodeType == 3 && n.textContent.trim());
    if (!own || !element.offsetParent || element.closest(".headerlink")) continue;
    const style = getComputedStyle(element), text = element.textContent.trim().slice(0, 40);
    if (parseFloat(style.fontSize) < leastPixels) wrong.push(`"${text}" is ${style.fontSize}`);
    const [a, b] = [light(colour(style.color)), light(behind(element))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < leastContrast) wrong.push(`"${text}" has a contrast of ${contrast.toFixed(1)}`);
  }
  return wrong;
}
"""


class Page(HTMLParser):
    """What a page links to and shows, and what others may link to."""

    def __init__(self, path):
        super().__init__()
        self.targets, self.names = [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        """Note the names and targets of a tag."""
        for name, value in attributes:
            if name == "id":
                self.names.add(value)
            elif name in ("href", "src") and tag in ("a", "img", "link", "script"):
                self.targets.append(value)


def dead_links(folder):
    """Return the links of all pages that lead nowhere; other servers are not asked."""
    pages = {path.resolve(): Page(path) for path in folder.rglob("*.html")}
    dead = []
    for path, page in pages.items():
        for target in page.targets:
            link = urlsplit(target)
            there = (path.parent / unquote(link.path)).resolve() if link.path else path
            if link.scheme or link.netloc:
                continue
            if not there.exists():
                dead.append(f"{path.name}: {target} is not there")
            elif link.fragment and there in pages and link.fragment not in pages[there].names:
                dead.append(f"{path.name}: {target} has no such place")
    return dead


def seen(folder, program):
    """Return what a browser shows wrong."""
    from playwright.sync_api import sync_playwright

    wrong = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for width in WIDTHS:
            for scheme in SCHEMES:
                page = browser.new_page(
                    viewport={"width": width, "height": 900}, color_scheme=scheme
                )
                said = []
                page.on("console", lambda one, said=said: said.append(one.text))
                page.on("pageerror", lambda one, said=said: said.append(str(one)))
                for path in sorted(folder.glob("*.html")):
                    said.clear()
                    page.goto(path.resolve().as_uri())
                    found = page.evaluate(LOOK, [LEAST_PIXELS, LEAST_CONTRAST])
                    where = f"{path.name}, {width} pixels, {scheme}"
                    wrong += [f"{where}: {text}" for text in (*found, *said)]
        browser.close()
    return wrong


def main(folder):
    """Print what is wrong with the pages of a folder; return whether anything is."""
    wrong = dead_links(folder)
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program:
        wrong += seen(folder, program)
    else:
        print("no Chromium is installed: only links were checked")
    print("\n".join(wrong) or f"{len([*folder.glob('*.html')])} pages are as they should be")
    return bool(wrong)


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
