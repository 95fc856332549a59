"""Both errors rising is noticed, reported once, and remembered over a restart."""

from itertools import pairwise

import pytest

from train.trainer.error_monitor import ENOUGH, WINDOW, ErrorMonitor


def line(step: int, winner: float | None, loser: float | None) -> dict:
    """A journal line in which the policy's errors are these multiples of the reference's."""
    reference = 0.1 + 0.01 * (step % 7)
    known = winner is not None
    return {
        "step": step,
        "policy_winner_error": reference * (winner if winner is not None else 1.0),
        "policy_loser_error": 2 * reference * (loser if loser is not None else 1.0),
        "reference_winner_error": reference if known else None,
        "reference_loser_error": 2 * reference if known else None,
    }


@pytest.mark.parametrize(
    ("winner", "loser", "both"),
    [(1.02, 1.03, True), (0.98, 1.03, False), (1.02, 0.98, False), (1.005, 1.5, False)],
)
def test_both_must_rise(winner: float, loser: float, both: bool):
    monitor = ErrorMonitor()
    rises = [monitor.add(line(step, winner, loser)) for step in range(WINDOW)]
    assert [f["both_rise"] for f in rises] == [False] * (ENOUGH - 1) + [both] * (
        WINDOW - ENOUGH + 1
    )
    assert rises[-1]["winner_rise"] == pytest.approx(winner - 1)
    assert rises[-1]["loser_rise"] == pytest.approx(loser - 1)


def test_old_lines_leave_the_window():
    monitor = ErrorMonitor()
    for step in range(WINDOW):
        monitor.add(line(step, 1.5, 1.5))
    rises = [monitor.add(line(step, 1.0, 1.0))["winner_rise"] for step in range(WINDOW)]
    assert all(later < earlier for earlier, later in pairwise(rises))
    assert rises[-1] == pytest.approx(0)


def test_it_is_said_once_also_over_a_restart():
    straight, words, journal = ErrorMonitor(), [], []
    for step in range(2 * WINDOW):
        entry = line(step, 1.05, 1.1)
        rises = straight.add(entry)
        words.append(straight.warning(rises))
        journal.append(entry | rises)
    assert [index for index, text in enumerate(words) if text] == [ENOUGH - 1]
    assert "winners 5.0% and losers 10.0% worse" in words[ENOUGH - 1]
    assert "objective=sdpo" in words[ENOUGH - 1]
    assert "train.samples.every" in words[ENOUGH - 1]  # errors alone do not tell of images

    again = ErrorMonitor()
    again.resume(journal[:30])
    for entry in journal[30:]:
        rises = again.add({key: entry[key] for key in line(0, 1, 1)})
        assert rises.items() <= entry.items()
        assert again.warning(rises) is None


def test_without_a_reference_nothing_is_compared():
    monitor = ErrorMonitor()
    rises = [monitor.add(line(step, None, None)) for step in range(WINDOW)]
    assert rises[-1] == {"winner_rise": None, "loser_rise": None, "both_rise": False}
