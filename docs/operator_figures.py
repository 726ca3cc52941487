"""Draw the pictures of operator.md and lookup.md, from `Geometry` and `Lookup` themselves.

Run as ``python docs/operator_figures.py [FOLDER]``; writes patch.svg, taps.svg, lattice.svg and
lookup.svg.
"""

import sys
from itertools import product
from pathlib import Path

from cupycorr import Geometry, Lookup

CELL, MARGIN, TOP = 22, 24, 46
INK, LINE, MARK, SEEN, PALE = "#20242c", "#b9c0ca", "#ff7a00", "#3b7dd8", "#d7e5f8"


class Picture:
    """Grids of cells side by side, and marks on them."""

    def __init__(self):
        self.parts, self.left, self.bottom = [], MARGIN, 0

    def grid(self, title, height, width, cell=CELL, pad=0):
        """Draw a map of cells, with zeros around; return where its cell (0, 0) begins."""
        x, y = self.left + pad * cell, TOP + pad * cell
        self.text(self.left, TOP - 16, title)
        for row, column in product(range(-pad, height + pad), range(-pad, width + pad)):
            inside = 0 <= row < height and 0 <= column < width
            self.cell((x, y, cell), row, column, "white" if inside else "#f1f1f1")
        self.left += (width + 2 * pad) * cell + 2 * MARGIN
        self.bottom = max(self.bottom, TOP + (height + 2 * pad) * cell)
        return x, y, cell

    def cell(self, grid, row, column, colour):
        x, y, size = grid
        self.parts.append(
            f'<rect x="{x + column * size}" y="{y + row * size}" width="{size}" height="{size}" '
            f'fill="{colour}" stroke="{LINE}"/>'
        )

    def dot(self, grid, row, column, colour, radius=4):
        x, y, size = grid
        at = f'cx="{x + (column + 0.5) * size:g}" cy="{y + (row + 0.5) * size:g}"'
        self.parts.append(f'<circle {at} r="{radius}" fill="{colour}"/>')

    def label(self, grid, row, column, text):
        x, y, size = grid
        self.text(x + (column + 0.5) * size, y + (row + 0.5) * size + 3.5, text, 9.5, "middle")

    def text(self, x, y, text, size=14, anchor="start"):
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" '
            f'fill="{INK}">{text}</text>'
        )

    def svg(self, name):
        width, height = self.left - MARGIN, self.bottom + MARGIN
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" font-family="Helvetica, Arial, sans-serif">'
            f"<title>{name}</title>"
            f'<rect width="{width}" height="{height}" fill="white"/>'
        )
        return "\n".join([head, *self.parts, "</svg>", ""])


def patch():
    """Show which positions of fmap2 one position of fmap1 is compared with."""
    geometry, at = Geometry(patch_size=5, dilation_patch=2), (5, 5)
    picture = Picture()
    first = picture.grid("fmap1: one position", 11, 11)
    picture.cell(first, *at, MARK)
    second = picture.grid("fmap2: what it is compared with, p, q", 11, 11)
    for (p, dy), (q, dx) in product(*map(enumerate, geometry.displacements)):
        picture.cell(second, at[0] + dy, at[1] + dx, MARK if dy == dx == 0 else PALE)
        picture.label(second, at[0] + dy, at[1] + dx, f"{p},{q}")
    return picture


def taps():
    """Show what is summed for one displacement."""
    geometry, at, shift = Geometry(kernel_size=3, dilation=2, patch_size=5), (4, 4), (1, 2)
    picture = Picture()
    (dy, dx), spacing = shift, geometry.dilation
    for title, move in (
        ("fmap1: the taps of a position", (0, 0)),
        ("fmap2: the same, displaced", (dy, dx)),
    ):
        grid = picture.grid(title, 10, 11)
        reach = [(extent - 1) // 2 for extent in geometry.taps_extent]
        where = at[0] + move[0], at[1] + move[1]
        for i, j in product(range(geometry.kernel_size[0]), range(geometry.kernel_size[1])):
            row = where[0] - reach[0] + i * spacing[0]
            column = where[1] - reach[1] + j * spacing[1]
            picture.cell(grid, row, column, MARK if (row, column) == where else PALE)
            picture.label(grid, row, column, f"{i},{j}")
    return picture


def lattice():
    """Show where outputs lie."""
    size = 7, 9
    geometry = Geometry(kernel_size=3, padding=1, stride=2)
    picture = Picture()
    grid = picture.grid(
        "fmap1 with its padding; numbers: outputs y, x", *size, 26, geometry.padding[0]
    )
    for y, x in product(*map(range, geometry.output_size(*size))):
        row = y * geometry.stride[0] - geometry.padding[0]
        column = x * geometry.stride[1] - geometry.padding[1]
        middle = [(extent - 1) // 2 for extent in geometry.taps_extent]
        if (y, x) == (0, 0):  # the taps of the first output
            for i, j in product(*map(range, geometry.kernel_size)):
                picture.cell(grid, row + i, column + j, PALE)
        picture.label(grid, row + middle[0], column + middle[1], f"{y},{x}")
    return picture


def lookup():
    """Show where one position looks on two levels."""
    look, size, coords = Lookup(radius=2, levels=2), (12, 14), (7.4, 5.7)
    picture = Picture()
    for level, (height, width) in enumerate(look.level_sizes(*size)):
        cell = CELL * look.pool[0] ** level
        grid = picture.grid(f"level {level}: cells that are read, costs", height, width, cell)
        x, y = coords[0] / look.pool[1] ** level, coords[1] / look.pool[0] ** level
        columns, rows = look.displacements[1], look.displacements[0]
        read = product(range(rows[0], rows[-1] + 2), range(columns[0], columns[-1] + 2))
        for dy, dx in read:
            row, column = int(y // 1) + dy, int(x // 1) + dx
            if 0 <= row < height and 0 <= column < width:
                picture.cell(grid, row, column, PALE)
        for dy, dx in product(rows, columns):
            centre = dy == dx == 0
            picture.dot(grid, y + dy, x + dx, MARK if centre else SEEN, 5 if centre else 3)
    return picture


PICTURES = {one.__name__: one for one in (patch, taps, lattice, lookup)}


def main(folder):
    for name, draw in PICTURES.items():
        Path(folder, f"{name}.svg").write_text(draw().svg(draw.__doc__), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:] or [Path(__file__).parent])
