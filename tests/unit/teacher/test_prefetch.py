"""What is made ahead comes in order, by several threads at once, and its errors come out where it is used."""

import threading

import pytest

from grace.teacher.prefetch import ahead, spare_threads


def test_order_holds_and_threads_work_at_once():
    meet = threading.Barrier(3, timeout=20)

    def work(item):
        if item < 3:
            meet.wait()  # passes only when three are at work
        return item * item

    assert list(ahead(work, range(20), depth=3, threads=3)) == [item * item for item in range(20)]


def test_an_error_comes_out_in_its_place():
    def work(item):
        if item == 2:
            raise ValueError("bad image")
        return item

    made = ahead(work, range(5), depth=3, threads=2)
    assert [next(made), next(made)] == [0, 1]
    with pytest.raises(ValueError, match="bad image"):
        next(made)


def test_threads_are_spared(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(16))
    assert [spare_threads(n) for n in (1, 2, 4, 8, 16)] == [4, 4, 3, 1, 1]
