"""Which of several failures is the cause, and how ranks tell each other."""

from trainer.runs.failures import Failure, Failures, cause
from trainer.utils.errors import BadInput, RunFailed, StoppedByWatchdog

LOST = RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:35217")


def failure(rank: int, error: BaseException) -> Failure:
    return Failure.of(rank, error, str(error))


def test_the_cause_is_the_first_that_does_not_only_miss_a_peer() -> None:
    assert cause([]) is None
    one, lost, other = failure(1, ValueError("a")), failure(0, LOST), failure(2, ValueError("b"))
    for reports in ([one], [one, lost], [lost, one], [lost, one, other]):
        assert (cause(reports).rank, cause(reports).sentence) == (1, "rank 1: a")
    assert cause([other, one]).sentence == "rank 2: b"
    assert cause([lost]).sentence.startswith("rank 0: [../gloo")
    assert cause([lost]).lost_peer


def test_a_rank_is_named_unless_all_say_the_same() -> None:
    bad = BadInput("lora.targets: 'x' matches nothing")
    assert cause([failure(1, bad), failure(0, bad)]).sentence == "lora.targets: 'x' matches nothing"
    assert cause([failure(1, bad)]).sentence == "rank 1: lora.targets: 'x' matches nothing"
    assert cause([failure(1, bad)]).bad_input
    assert cause([failure(1, StoppedByWatchdog("collapse"))]).sentence == "collapse"
    assert not failure(1, RunFailed("the peer of the judge is gone")).lost_peer, "one of this program's own sentences"


def test_failures_are_seen_by_everybody_who_meets_at_the_store() -> None:
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    here = Failures(store)
    there = Failures(TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False))
    assert not here.exist()
    assert here.reports() == []
    first, second = Failure(3, "out of memory", details="error-3.txt"), Failure(0, "it", bad_input=True, lost_peer=True)
    there.report(first)
    assert here.exist()
    here.report(second)
    assert here.reports() == there.reports() == [first, second]
