from scgpt.counted import counted


def test_one_is_no_plural():
    assert counted(1, "cell") == "1 cell"
    assert counted(0, "cell") == "0 cells"
    assert counted(2500, "entry", "entries") == "2,500 entries"
    assert counted(1, "cell equals", "cells equal") == "1 cell equals"
