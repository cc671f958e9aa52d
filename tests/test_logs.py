"""The log of a run: its table, its picture, and what a resumed run leaves of both."""

import matplotlib.pyplot as plt
import pytest
from supermix.training.logs import Log, _write_log, draw_log, read_log

ROWS = [{"epoch": e, "step": 10 * e, "lr": 0.1, "loss": 1 / e} for e in range(1, 6)]


def test_the_table_comes_back(tmp_path):
    rows = [*ROWS[:3], {**ROWS[3], "held_out": 91.25}]
    text = _write_log(tmp_path / "log.csv", rows).read_text().splitlines()
    assert text[0] == "epoch,step,lr,loss,held_out" and text[1] == "1,10,0.1,1.0," and text[4].endswith(",91.25")
    assert read_log(tmp_path / "log.csv") == rows


def test_a_resumed_log_has_no_row_twice(tmp_path):
    log = Log(tmp_path)
    for row in ROWS[:4]:
        log.add(**row)
    log.close()
    log = Log(tmp_path, ROWS[:2])  # its checkpoint was of the second epoch
    for row in ROWS[2:]:
        log.add(**row)
    log.close()
    assert read_log(tmp_path / "log.csv") == ROWS


def test_nothing_is_written_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = Log(None)
    log.add(**ROWS[0])
    log.close()
    assert log.rows == ROWS[:1] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("held", [False, True])
def test_the_picture_has_units_on_every_axis(held):
    figure = draw_log([{**row, **({"held_out": 50.0} if held else {})} for row in ROWS], "a run")
    axes = {ax.get_ylabel(): ax for ax in figure.axes}
    assert set(axes) == {"training loss (nats)", "learning rate", *(["held-out accuracy (%, dashed)"] if held else [])}
    assert list(axes["training loss (nats)"].lines[0].get_ydata()) == [row["loss"] for row in ROWS]
    plt.close(figure)
