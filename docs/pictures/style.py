"""How all pictures of the documentation look: one colour a solver, one size of text."""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams.update(
    {
        "svg.fonttype": "none",  # text stays text: small files, and a reader can search it
        "svg.hashsalt": "deqsolvers",  # the same picture is the same file
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
)

COLOURS = {
    "Picard": "#8c8c8c",
    "Anderson": "#1f6feb",
    "Broyden": "#d1730f",
    "Newton-Krylov": "#7b3fa0",
    "HyperSolver": "#1a7f4b",
    "explicit": "#b3261e",
}


def save(figure, name: str) -> None:
    """Write a picture beside this file, without the date that would change it every time."""
    path = Path(__file__).with_name(name)
    figure.savefig(path, metadata={"Date": None}, facecolor="white")
    # matplotlib leaves blanks at line ends, which version control would complain of.
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line.rstrip() for line in lines) + "\n")
    print(path)
