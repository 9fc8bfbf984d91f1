"""The paper's figures as they are printed, and where they stand."""

from dataclasses import replace

from polypseg.paper import CAVEAT, beside_the_paper
from polypseg.protocols import PROTOCOLS
from polypseg.scores import ImageRow, summarise

ROW = ImageRow(
    "a", "default", "polyp", 1, 0, 0, 1, 0.9, 0.8, 0.01, 1.0, 3, 4, 1e-3, "CONVERGED", 0.1
)


def test_own_figures_stand_above_the_papers():
    rows = [
        summarise(name, solver, [ROW])
        for name in ("Kvasir", "ETIS-LaribPolypDB", "Mine")
        for solver in ("explicit", "hyper")
    ]
    header, table = beside_the_paper(rows)
    assert header == ["", "Kvasir", "ETIS-LaribPolypDB"]
    assert table[0] == ["this run, explicit, protocol default", "90.0 / 80.0", "90.0 / 80.0"]
    assert table[-1] == ["paper, HyperPolypDEQ", "90.7 / 84.9", "67.6 / 59.7"]
    assert ["paper, SegFormer-B0", "89.7 / 83.9", "65.7 / 58.3"] in table


def test_what_the_paper_does_not_say_is_not_told_as_its_own():
    assert "says neither at which size nor at which threshold it scores" in CAVEAT
    assert "Our reading" in PROTOCOLS["paper"]


def test_neopolyp_has_a_column_a_class():
    rows = [
        summarise("NeoPolyp-Small", "hyper", [replace(ROW, target=target)])
        for target in ("polyp", "neoplastic", "non_neoplastic")
    ]
    header, table = beside_the_paper(rows)
    assert header[1:] == [
        "NeoPolyp-Small", "NeoPolyp-Small, neoplastic", "NeoPolyp-Small, non_neoplastic",
    ]  # fmt: skip
    assert table[-1] == ["paper, HyperPolypDEQ", "89.9 / 83.4", "82.8 / 79.1", "81.4 / 78.9"]
    assert ["paper, PolypDEQ-res, implicit", "–", "–", "–"] in table


def test_other_data_have_no_such_table():
    assert beside_the_paper([summarise("Mine", "hyper", [ROW])]) is None


def test_a_network_of_one_class_is_not_put_beside_those_trained_on_neopolyp():
    assert beside_the_paper([summarise("NeoPolyp-Small", "hyper", [ROW])]) is None
