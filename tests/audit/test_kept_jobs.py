"""Audits that one process leaves to the next: whole or not at all, by one owner at a time, bounded."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from p2pinfer.audit import kept_jobs
from p2pinfer.audit.backlog import Backlog, Job
from p2pinfer.audit.kept_jobs import MAX_AGE_S, JobFolder, KeptJob, job_folder
from p2pinfer.models.span import BlockSpan
from p2pinfer.models.text.sampling_config import LogitsRules, SamplingConfig
from p2pinfer.node.protocol.draws import draw_of
from p2pinfer.node.protocol.messages import Step
from p2pinfer.routing.route import Hop
from p2pinfer.session.receipt_checks import PassedStep

REVISION = "r" * 32
HOPS = (Hop("a", BlockSpan(0, 3), ("/memory/a",)), Hop("b", BlockSpan(3, 8), ("/memory/b",)))


def job(closed_at: float = 1000.0, peer_id: str = "a", payload: bytes = b"sent") -> KeptJob:
    step = PassedStep(Step(0, 0, 0, 4, 1), HOPS, payload, b"got", (b"receipt of a", b"receipt of b"))
    return KeptJob(peer_id, closed_at, (step,))


def folder(path: Path, max_bytes: int = 1 << 20, revision: str = REVISION) -> JobFolder:
    return JobFolder(path, revision, max_bytes)


def test_what_a_process_leaves_the_next_one_does(tmp_path: Path) -> None:
    """With what the audited hop's audit needs, and no more: the hops' addresses, but others' tensors not."""
    first, second = folder(tmp_path), folder(tmp_path)
    first.keep(job(peer_id="a"))
    first.keep(job(peer_id="b"))
    assert second.take_over(1000.0) == []  # its owner lives
    first.close()
    found = [kept for _, kept in second.take_over(1010.0)]
    assert [kept.peer_id for kept in found] == ["a", "b"]
    (of_a,), (of_b,) = (kept.steps for kept in found)
    assert (of_a.sent, of_a.got, of_a.receipts) == (b"sent", b"", (b"receipt of a", b""))
    assert (of_b.sent, of_b.got, of_b.receipts) == (b"", b"got", (b"", b"receipt of b"))
    assert of_a.hops == HOPS
    assert of_a.hops[1].addrs == ("/memory/b",)
    assert folder(tmp_path).take_over(1010.0) == []  # they are the second one's now
    second.close()
    assert len(folder(tmp_path).take_over(1010.0)) == 2


async def test_the_terms_of_draws_are_left_with_their_steps(tmp_path: Path) -> None:
    """Or who draws other tokens would only have to hand out its evidence after its client has gone."""
    terms = draw_of(SamplingConfig(seed=7), LogitsRules(), prompt_tokens=4, max_ids=9, eos_ids=(2,))
    first, second = (Backlog(folder(tmp_path), lambda: 1000.0) for _ in range(2))
    await first.put(Job("b", job().steps, draw=terms))
    await first.close()
    await second.take_over()
    assert (await second.next_job()).draw == terms


def test_of_a_hop_that_took_over_its_own_steps_are_left(tmp_path: Path) -> None:
    """Nor is a step kept whose hops did not all sign for it: no audit looks at either."""
    (before,) = job(peer_id="a").steps
    hops = (HOPS[0], Hop("c", BlockSpan(3, 8), ("/memory/c",)))
    after = PassedStep(Step(1, 1, 4, 1, 1), hops, b"more", b"got", (b"receipt of a", b"receipt of c"))
    unsigned = PassedStep(Step(2, 1, 5, 1, 1), hops, b"more", b"got", (b"receipt of a",))
    first = folder(tmp_path)
    for peer_id in ("a", "c", "nobody"):
        first.keep(KeptJob(peer_id, 1000.0, (before, after, unsigned)))
    first.close()
    found = {kept.peer_id: kept.steps for _, kept in folder(tmp_path).take_over(1010.0)}
    assert [[step.step.number for step in found[peer_id]] for peer_id in ("a", "c", "nobody")] == [
        [0, 1],
        [1],
        [],
    ]


def test_whose_hop_was_slow_is_known_to_all_who_come_later(tmp_path: Path) -> None:
    first, second, third = (folder(tmp_path) for _ in range(3))
    kept = [first.keep(job(peer_id=name)) for name in "ab"]
    assert kept[0] is not None and kept[1] is not None
    marked = first.mark_slow(kept[0])
    assert first.mark_slow(marked) == marked
    first.close()
    for each in (second, third):
        assert {found.peer_id: found.was_slow for _, found in each.take_over(1000.0)} == {
            "a": True,
            "b": False,
        }
        each.close()
    kept[1].unlink(missing_ok=True)
    assert third.mark_slow(kept[1]).name.endswith("-slow.job")  # another process needed its room


def test_what_is_done_is_left_to_nobody(tmp_path: Path) -> None:
    first = folder(tmp_path)
    path = first.keep(job())
    assert path is not None
    assert path.stat().st_mode & 0o077 == 0 or sys.platform == "win32"
    first.drop(path)
    first.drop(path)
    first.close()
    first.close()
    assert list(tmp_path.iterdir()) == []


def test_what_is_to_be_forgotten_is(tmp_path: Path) -> None:
    first = folder(tmp_path)
    first.keep(job())
    first.close(forget=True)
    assert list(tmp_path.iterdir()) == []


def test_what_was_taken_over_is_not_forgotten_with_the_rest(tmp_path: Path) -> None:
    first, second = folder(tmp_path), folder(tmp_path)
    first.keep(job())
    first.close()
    ((path, _),) = second.take_over(1001.0)
    second.keep(job())
    second.close(forget=True)
    assert list(tmp_path.glob("*.job")) == [path]


def test_what_is_old_or_damaged_or_was_never_finished_goes(tmp_path: Path) -> None:
    first = folder(tmp_path)
    paths = [first.keep(job(closed_at)) for closed_at in (1000.0, 1000.0 - MAX_AGE_S, 2000.0, 1000.0, 1000.0)]
    assert all(paths)
    _, _, _, cut, other = (path for path in paths if path is not None)
    cut.write_bytes(cut.read_bytes()[:-3])
    other.write_bytes(b"garbage")
    other.with_suffix(".part").write_bytes(b"half")
    first.close()
    found = folder(tmp_path).take_over(1001.0)
    assert [kept.closed_at for _, kept in found] == [1000.0]
    assert len(list(tmp_path.glob("*.job"))) == 1
    assert not list(tmp_path.glob("*.part"))


def test_jobs_of_another_model_wait_for_a_client_of_that(tmp_path: Path) -> None:
    first = folder(tmp_path)
    first.keep(job())
    first.close()
    assert folder(tmp_path, revision="f" * 32).take_over(1000.0) == []
    assert len(folder(tmp_path).take_over(1000.0)) == 1


def test_the_oldest_go_where_there_is_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = folder(tmp_path, max_bytes=3000)
    assert first.keep(job(payload=bytes(4000))) is None
    for number in range(5):
        assert first.keep(job(1000.0 + number, payload=bytes(800))) is not None
    assert sum(path.stat().st_size for path in tmp_path.glob("*.job")) <= 3000
    first.close()
    assert [kept.closed_at for _, kept in folder(tmp_path).take_over(1010.0)] == [1002.0, 1003.0, 1004.0]
    monkeypatch.setattr(kept_jobs, "MAX_JOBS", 4)
    second = folder(tmp_path)
    for _ in range(9):
        second.keep(job())
    assert len(list(tmp_path.glob("*.job"))) == 4


def test_a_folder_is_wanted_only_with_a_place_and_room(tmp_path: Path) -> None:
    assert job_folder(None, REVISION, 1) is None
    assert job_folder(tmp_path, REVISION, 0) is None
    assert job_folder(tmp_path, REVISION, 1) is not None


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.slow
def test_a_killed_process_leaves_its_jobs(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from tests.audit.test_kept_jobs import folder, job\n"
        "kept = folder(Path(sys.argv[1]))\n"
        "kept.keep(job())\n"
        "print('kept', flush=True)\n"
        "time.sleep(600)\n"
    )
    root = Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=root, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"kept\n"
        assert folder(tmp_path).take_over(1000.0) == []
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(folder(tmp_path).take_over(1000.0)) == 1
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
