"""Who is asked for which chunks."""

from __future__ import annotations

from p2pinfer.models.pieces.chunks import CHUNK_BYTES, ChunkList
from p2pinfer.node.weights.file_job import FAR_RUN, NEAR_RUN, STEAL_S, FileJob, Source


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def job_of(chunks: int) -> tuple[FileJob, Clock]:
    clock = Clock()
    listed = ChunkList(chunks * CHUNK_BYTES, bytes(32 * chunks))
    return FileJob(listed, set(range(chunks)), clock), clock


def test_runs_are_long_nearby_and_short_elsewhere_and_do_not_overlap() -> None:
    job, _ = job_of(NEAR_RUN + 3)
    near, far = Source("near", is_near=True), Source("far")
    assert job.take(near) == (0, NEAR_RUN)
    assert job.take(far) == (NEAR_RUN, FAR_RUN)
    assert job.take(near) == (NEAR_RUN + FAR_RUN, 1)
    assert job.take(far) is None


def test_a_run_ends_where_a_chunk_is_here_already() -> None:
    job, _ = job_of(6)
    one = Source("one", is_near=True)
    job.note_right(one, [2, 5])
    assert job.take(one) == (0, 2)
    assert job.take(one) == (3, 2)
    assert job.note_right(one, [0, 1, 3, 3, 4]) == 4 * CHUNK_BYTES
    assert job.done.is_set() and one.bytes == 6 * CHUNK_BYTES


def test_what_a_peer_leaves_behind_is_others_to_bring() -> None:
    job, _ = job_of(4)
    one, two = Source("one", is_near=True), Source("two", is_near=True)
    for each in (one, two):
        job.begin(each)
    assert job.take(one) == (0, 4)
    assert job.take(two) is None
    job.note_right(one, [0])
    job.end(one)
    assert job.take(two) == (1, 3)


def test_a_chunk_that_is_late_is_asked_of_another_peer_too() -> None:
    job, clock = job_of(2)
    one, two = Source("one"), Source("two")
    assert job.take(one) == (0, 2)
    clock.now = STEAL_S - 0.1
    assert job.take(two) is None
    clock.now = STEAL_S
    assert job.take(two) == (0, 1)
    assert job.take(one) is None
    assert job.note_right(two, [0]) == CHUNK_BYTES
    assert job.note_right(one, [0]) == 0  # it came twice, and counts once


def test_who_was_wrong_about_a_chunk_is_asked_for_it_again_only_where_nobody_else_is() -> None:
    job, _ = job_of(3)
    liar, other = Source("liar", is_near=True), Source("other", is_near=True)
    for each in (liar, other):
        job.begin(each)
    assert job.take(liar) == (0, 3)
    job.note_wrong(liar, 1)
    job.note_right(liar, [0, 2])
    assert job.take(liar) is None
    assert job.take(other) == (1, 1)
    job.end(other)
    assert job.take(liar) == (1, 1)
