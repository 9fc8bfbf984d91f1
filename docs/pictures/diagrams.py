"""Draws the diagrams of the documentation: python docs/pictures/diagrams.py"""

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from style import save

INK = "#1f2328"
PALE = {"f": "#dbe9ff", "solver": "#dcf3e6", "other": "#f3f4f6", "bad": "#fde7e4", "ask": "#fff4d6"}


class Sheet:
    """A drawing surface in character-like units, with boxes that are joined by arrows."""

    def __init__(self, width: float, height: float):
        self.figure = Figure(figsize=(width, height))
        self.axis = self.figure.add_axes((0, 0, 1, 1))
        self.axis.set(xlim=(0, width), ylim=(0, height))
        self.axis.set_axis_off()

    def box(self, x: float, y: float, text: str, kind: str = "other", width: float = 1.6) -> tuple:
        """A box centred at (x, y), in inches; returns its place for `arrow`."""
        height = 0.24 + 0.19 * (text.count("\n") + 1)
        self.axis.add_patch(rounded(x - width / 2, y - height / 2, width, height, PALE[kind]))
        self.axis.text(x, y, text, ha="center", va="center", color=INK, linespacing=1.25)
        return x, y, width, height

    def arrow(self, start: tuple, end: tuple, text: str = "", bend: float = 0.0) -> None:
        """From the border of one box to that of another, with a word beside it."""
        (x0, y0), (x1, y1) = edge(start, end), edge(end, start)
        style = {"arrowstyle": "-|>", "color": INK, "connectionstyle": f"arc3,rad={bend}"}
        self.axis.annotate("", (x1, y1), (x0, y0), arrowprops=style)
        if text:
            x, y = (x0 + x1) / 2 - bend * (y0 - y1) / 2, (y0 + y1) / 2 - bend * (x1 - x0) / 2
            self.axis.text(
                x, y, text, ha="center", va="center", color=INK, fontsize=9,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
            )  # fmt: skip

    def note(self, x: float, y: float, text: str, **style) -> None:
        self.axis.text(x, y, text, color="#57606a", fontsize=9, va="center", **style)


def rounded(x: float, y: float, width: float, height: float, colour: str):
    return FancyBboxPatch(
        (x + 0.05, y + 0.05), width - 0.1, height - 0.1,
        boxstyle="round,pad=0.05", facecolor=colour, edgecolor="#8c959f", linewidth=0.8,
    )  # fmt: skip


def edge(box: tuple, other: tuple) -> tuple[float, float]:
    """Where the line from the middle of one box to another leaves it."""
    x, y, width, height = box
    dx, dy = other[0] - x, other[1] - y
    scale = min(
        width / 2 / abs(dx) if dx else float("inf"), height / 2 / abs(dy) if dy else float("inf")
    )
    return x + dx * scale, y + dy * scale


def layer() -> None:
    sheet = Sheet(8.4, 2.9)
    inputs = sheet.box(0.9, 2.1, "inputs x\n(once)")
    f = sheet.box(3.3, 2.1, "f(z, x)\none evaluation a step", "f", 2.2)
    solver = sheet.box(3.3, 0.8, "solver\nAnderson, HyperSolver, ...", "solver", 2.4)
    answer = sheet.box(6.4, 2.1, "z* = f(z*, x)\nSolution: status, residual", width=2.2)
    backward = sheet.box(6.4, 0.8, "backward pass\nsees z* only", "other", 2.0)
    sheet.arrow(inputs, f)
    sheet.arrow(f, solver, bend=0.35)
    sheet.arrow(solver, f, bend=0.35)
    sheet.note(2.95, 1.45, "f(z)", ha="right")
    sheet.note(3.65, 1.45, "next z")
    sheet.arrow(f, answer)
    sheet.note(4.75, 2.5, "residual ≤ tol", ha="center")
    sheet.arrow(answer, backward, "gradient")
    sheet.note(6.4, 0.3, "u = v + J$^T$u", ha="center")
    save(sheet.figure, "layer.svg")


def statuses() -> None:
    sheet = Sheet(9.2, 6.3)
    start = sheet.box(4.6, 5.95, "solution.describe()", "ask", 2.0)
    good = sheet.box(1.1, 4.9, "CONVERGED\ndone", "solver", 1.5)
    limit = sheet.box(3.1, 4.9, "STEP_LIMIT", "bad", 1.5)
    stalled = sheet.box(5.1, 4.9, "STALLED", "bad", 1.5)
    diverged = sheet.box(6.8, 4.9, "DIVERGED", "bad", 1.4)
    finite = sheet.box(8.4, 4.9, "NON_FINITE", "bad", 1.4)
    for status in (good, limit, stalled, diverged, finite):
        sheet.arrow(start, status)
    falling = sheet.box(2.1, 3.7, "trace: still\nfalling?", "ask", 1.4)
    steps = sheet.box(1.1, 2.3, "more steps, looser tol,\nlarger memory,\nNewton-Krylov", width=2.0)
    sheet.arrow(limit, falling)
    sheet.arrow(falling, steps, "yes")
    floor = sheet.box(4.6, 3.7, "near the floor of\nthe dtype? (3e-7 fp32)", "ask", 2.1)
    sheet.arrow(stalled, floor)
    sheet.arrow(falling, floor, "no")
    loosen = sheet.box(3.1, 2.3, "loosen tol or\nwiden the dtype", width=1.6)
    sheet.arrow(floor, loosen, "yes")
    redrawn = sheet.box(5.1, 2.3, "f(z) twice: do the\ntwo differ?", "ask", 1.8)
    sheet.arrow(floor, redrawn, "no")
    masks = sheet.box(3.9, 0.8, "VariationalDropout;\nno batch statistics in f", width=2.2)
    sheet.arrow(redrawn, masks, "yes")
    remedies = "spectral_radius above 1:\nJacobian regulariser,\ndamping, Newton-Krylov"
    radius = sheet.box(6.6, 0.8, remedies, width=2.3)
    sheet.arrow(redrawn, radius, "no")
    sheet.arrow(diverged, radius)
    causes = "overflow in half\nprecision, log or\ndivision in f, or\nbad inputs"
    overflow = sheet.box(8.25, 2.6, causes, width=1.7)
    sheet.arrow(finite, overflow)
    sheet.note(0.15, 1.0, "z* = 0? then the relative residual\ncannot fall: relative=False")
    save(sheet.figure, "statuses.svg")


def polypdeq() -> None:
    sheet = Sheet(9.4, 3.6)
    image = sheet.box(0.75, 2.7, "image", width=1.0)
    stage = sheet.box(2.2, 2.7, "MiT stage 1\nonce: e", "other", 1.4)
    inject = sheet.box(4.0, 2.7, "inject\nz + e, or a block", "f", 1.6)
    encoder = sheet.box(5.75, 2.7, "MiT stages\n2, 3, 4", "f", 1.2)
    decoder = sheet.box(7.3, 2.7, "UNet\ndecoder", "f", 1.1)
    solver = sheet.box(5.7, 1.2, "solver: z from f(z, e)", "solver", 2.0)
    head = sheet.box(8.7, 1.2, "head on z*:\nmask", width=1.1)
    for first, second in ((image, stage), (stage, inject), (inject, encoder), (encoder, decoder)):
        sheet.arrow(first, second)
    sheet.arrow(decoder, solver, "f(z, e)", -0.2)
    sheet.arrow(solver, inject, "next z", -0.2)
    sheet.arrow(solver, head, "converged")
    sheet.note(5.7, 3.25, "f, the iterated part", ha="center")
    sheet.note(0.3, 1.2, "explicit: one evaluation from z = 0")
    save(sheet.figure, "polypdeq.svg")


def house() -> None:
    sheet = Sheet(9.4, 5.3)
    library = sheet.box(2.95, 5.0, "deqsolvers: needs torch alone", width=5.0)
    app = sheet.box(7.9, 5.0, "polypseg", width=2.4)
    sheet.arrow(app, library, "imports")
    user = sheet.box(2.2, 4.1, "DEQ, fixed_point, fit_hypersolver", "ask", 3.0)
    loop = sheet.box(2.2, 3.0, "fixed_point.py\nthe loop, written once", "f", 2.2)
    backward = sheet.box(4.9, 3.0, "backward/\na file a method", "solver", 1.6)
    solvers = sheet.box(0.8, 1.7, "solvers/\ninit, step", "solver", 1.2)
    state = sheet.box(2.5, 1.7, "state.py: nested\nstates as a matrix", width=1.8)
    progress = sheet.box(4.6, 1.7, "progress.py, solution.py\nstatuses, best iterates", width=2.2)
    learned = sheet.box(0.95, 0.5, "hypersolver/\nnetworks, losses", "solver", 1.5)
    for first, second in (
        (user, loop), (user, backward), (backward, loop), (loop, solvers), (loop, progress),
        (loop, state), (learned, solvers),
    ):  # fmt: skip
        sheet.arrow(first, second)
    commands = sheet.box(7.9, 4.1, "commands: cli.py", "ask", 1.9)
    rooms = sheet.box(7.9, 3.0, "train, evaluate, predict,\nreport", width=2.2)
    models = sheet.box(7.9, 1.7, "models/: plain modules\nwith a DEQ inside", "f", 2.2)
    sheet.box(7.9, 0.5, "data/, metrics.py,\ncheckpoint.py", width=2.0)
    for first, second in ((commands, rooms), (rooms, models)):
        sheet.arrow(first, second)
    save(sheet.figure, "house.svg")


if __name__ == "__main__":
    layer()
    statuses()
    polypdeq()
    house()
