"""The room of a batch, with a memory that holds so many rows."""

from __future__ import annotations

from handler.engines.batch_room import BatchRoom


def failures(room: BatchRoom, *, fits: int, batches: int) -> int:
    """Fill a memory with so many batches of all rows that there is room for; how often it was too small."""
    count = 0
    for _ in range(batches):
        while room.rows > fits:
            count += 1
            room.shrink(room.rows)
        room.note_ended(room.rows)
    return count


def test_it_settles_at_what_fits_and_tries_more_less_and_less_often() -> None:
    room = BatchRoom(64)
    assert failures(room, fits=20, batches=200) <= 10
    assert room.rows == 20
    assert failures(room, fits=20, batches=2000) <= 40, "of a hundred batches not even two"
    assert failures(room, fits=64, batches=4000) == 0
    assert room.rows == 64, "there is memory again"


def test_a_row_that_fails_alone_takes_no_room_from_the_others() -> None:
    room = BatchRoom(64)
    failures(room, fits=20, batches=200)
    for _ in range(3):
        while room.rows > 1:
            room.shrink(room.rows)
        room.blame_one()
        assert room.rows in (20, 21), "as before it, and not as many as ever"
        room.note_ended(20)
    before = room.rows
    room.blame_one()
    assert room.rows == before, "another row that fails alone changes nothing"


def test_with_nothing_to_do_it_begins_anew() -> None:
    room = BatchRoom(8)
    room.shrink(8)
    assert room.rows == 4
    room.reset()
    assert room.rows == 8
    room.shrink(1)
    assert room.rows == 1
