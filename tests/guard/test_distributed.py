"""Ranks of a distributed run agree: all raise, one warns for all, or nothing happens, and nobody is left waiting."""

import re
import socket

import pytest
import torch

from tests.launch import TORCHRUN, job, once, start
from tests.rank_scenarios import SCENARIOS

OF_PAIRS = [name for name in SCENARIOS if name not in ("subgroup", "sync_batch_norm", "two_ddp_groups")]
OF_GPUS = [
    "clean", "change_on_one", "forward_stopped_on_one", "own_error_on_one", "warn_in_train_mode", "warn_of_another",
    "restore_of_another", "many_blocks", "ddp_broadcast", "ddp_own_buffers", "ddp_overwrites", "sync_batch_norm",
    "watch_own_buffers", "fsdp2",
]  # fmt: skip
OF_FOUR = [
    "clean", "change_on_one", "forward_stopped_on_one", "own_error_on_one", "warn_of_another", "restore_of_another",
    "subgroup", "many_blocks", "ddp_broadcast", "ddp_overwrites", "two_ddp_groups",
]  # fmt: skip


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two ranks, started with torchrun."""

    def run(folder):
        job(folder, *TORCHRUN, "-m", "tests.rank_job", folder, *OF_PAIRS)

    return once(tmp_path_factory, "two_ranks", run)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """Four ranks, started with torch.multiprocessing.spawn."""

    def run(folder):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        job(folder, "-m", "tests.rank_job", "--spawn", "4", port, folder, *OF_FOUR)

    return once(tmp_path_factory, "four_ranks", run)


@pytest.fixture(scope="module")
def two_gpus(tmp_path_factory):
    """Two ranks with a GPU each, and NCCL."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")

    def run(folder):
        job(folder, *TORCHRUN, "-m", "tests.rank_job", folder, *OF_GPUS, backend="nccl")

    return once(tmp_path_factory, "two_gpus", run)


@pytest.fixture(params=["two", "four", "two_gpus"])
def ranks(request):
    """Both."""
    return request.getfixturevalue(request.param)


def of(ranks, name):
    """What each rank reports of a scenario."""
    return [rank[name] for rank in ranks]


def assert_silent(result):
    """Nothing was raised, noted or warned about."""
    assert (result["error"], result["notes"], result["warnings"]) == (None, [], [])


CHANGED = "running statistics of 1 layer changed inside frozen():"


def test_clean_ranks_stay_silent(ranks):
    """Nothing on any."""
    for result in of(ranks, "clean"):
        assert_silent(result)


def test_a_change_on_one_rank_raises_on_all(ranks):
    """The error names rank and layer; the statistics are back."""
    first, second, *others = of(ranks, "change_on_one")
    assert second["error"] == "StatsChangedError"
    assert second["text"].startswith(f"{CHANGED}\n  1 (BatchNorm2d): running_mean")
    for result in (first, *others):
        assert result["error"] == "StatsChangedError"
        assert result["text"].startswith(f"on rank 1:\n  {CHANGED}\n    1 (BatchNorm2d): running_mean")
    assert all(result["restored"] for result in of(ranks, "change_on_one"))


def test_the_same_change_is_told_once(two):
    """With the ranks that share it."""
    for rank, result in enumerate(of(two, "same_change_on_all")):
        assert result["error"] == "StatsChangedError"
        assert result["text"].count(CHANGED) == 1
        assert result["text"].endswith(f"\nThe same on rank {1 - rank}.")


def test_other_changes_are_told_beside_ones_own(two):
    """Each rank has its own first."""
    for rank, result in enumerate(of(two, "other_change_on_another")):
        assert result["text"].startswith(f"{CHANGED}\n  {rank} (BatchNorm1d): running_var")
        assert f"\nOn rank {1 - rank}:\n  {CHANGED}\n    {1 - rank} (BatchNorm1d): running_var" in result["text"]


def test_a_forward_stopped_on_one_rank_raises_on_all(ranks):
    """There at once, on the others at the end of the block, with the line."""
    first, second, *others = of(ranks, "forward_stopped_on_one")
    assert second["error"] == "StatsChangedError"
    assert second["text"].startswith("1 (BatchNorm2d) is in train mode inside frozen():")
    for result in (first, *others):
        assert result["error"] == "StatsChangedError"
        assert result["text"].startswith("on rank 1:\n  1 (BatchNorm2d) is in train mode inside frozen():")
        assert re.search(r"at tests/rank_scenarios\.py:\d+ in <lambda>", result["text"])


def test_an_error_of_its_own_stops_nobody(ranks):
    """It goes its way; the first of the others says so, and they go on."""
    first, second, *others = of(ranks, "own_error_on_one")
    assert (second["error"], second["text"], second["notes"]) == ("RuntimeError", "out of memory, say\nand more", [])
    assert first["error"] is None
    assert first["warnings"] == ["on rank 1:\n  left the block with RuntimeError: out of memory, say"]
    for result in others:
        assert_silent(result)


def test_an_error_of_its_own_with_a_change(two):
    """The change is a note on the error there, and part of what the others hear."""
    first, second = of(two, "own_error_after_a_change")
    assert second["error"] == "KeyError"
    assert second["notes"][0].startswith(f"bnguard: {CHANGED}")
    assert first["error"] is None
    (warning,) = first["warnings"]
    assert warning.startswith(f"on rank 1:\n  left the block with KeyError: 'label'\n  {CHANGED}")


def test_waiting_for_an_absent_rank_ends(two):
    """With the timeout of the process group: the error names the rank, the block, and the way out."""
    first, _ = of(two, "absent_rank")
    assert first["error"] == "BNGuardError"
    expected = (
        r"rank 1 did not come to the end of frozen\(\) at tests/rank_scenarios\.py:\d+ in run\n"
        r"within 2 seconds, the timeout of the process group\.\n"
    )
    assert re.match(expected, first["text"])
    assert "needs group=False" in first["text"]
    first, _ = of(two, "absent_rank_and_a_change")
    assert first["error"] == "StatsChangedError"
    assert first["text"].startswith(CHANGED)
    assert first["warnings"][0].startswith("rank 1 did not come to the end of frozen()")


def test_without_a_group_each_rank_is_on_its_own(two):
    """group=False: nobody waits, one raises alone."""
    first, _ = of(two, "absent_rank_without_group")
    assert_silent(first)
    first, second = of(two, "change_on_one_without_group")
    assert_silent(first)
    assert second["error"] == "StatsChangedError"


def test_one_rank_warns_for_all(two):
    """Once, at the line; the statistics are those of an unguarded twin on each."""
    first, second = of(two, "warn_in_train_mode")
    assert first["error"] is None
    (warning,) = first["warnings"]
    assert warning.startswith("1 (BatchNorm2d) is in train mode inside frozen() and updates")
    assert_silent(second)
    assert first["twin"]
    assert second["twin"]


@pytest.mark.parametrize(("name", "end"), [("warn_of_another", "The changes stand."),
                                           ("restore_of_another", "The statistics of entry are back.")])  # fmt: skip
def test_one_rank_warns_of_another(ranks, name, end):
    """The first one, of what only the last has seen."""
    first, *others = of(ranks, name)
    (warning,) = first["warnings"]
    assert warning.startswith(f"on rank {len(ranks) - 1}:\n  {CHANGED}")
    assert warning.endswith(end)
    for result in others:
        assert_silent(result)
    assert all(result.get("restored", True) for result in of(ranks, name))


def test_check_agrees_as_well(two):
    """In the middle of a block."""
    first, second = of(two, "check_on_one")
    assert first["error"] == second["error"] == "StatsChangedError"
    assert first["text"].startswith("on rank 1:\n")


def test_many_blocks_leave_the_store_as_it_was(ranks):
    """Nested, decorated, again and again."""
    for result in of(ranks, "many_blocks"):
        assert_silent(result)
        assert result["more_keys"] == 0


@pytest.mark.parametrize("name", ["other_folders", "threads", "forked_worker", "destroyed_group", "copied_guard"])
def test_blocks_that_must_not_wait_do_not(two, name):
    """In other folders, in threads that meet in another order, in workers, after the group, and in copies."""
    for result in of(two, name):
        assert_silent(result)
        assert result["seconds"] < 8


def test_a_groups_own_timeout_counts(two):
    """And not that of the default group."""
    first, _ = of(two, "timeout_of_a_group")
    assert first["error"] == "BNGuardError"
    assert first["seconds"] < 8


def test_rank_zero_of_ddps_group_is_asked(four):
    """Two groups of two: each rank hears of its own rank 0, and nobody raises."""
    for rank, result in enumerate(of(four, "two_ddp_groups")):
        assert result["error"] is None
        assert len(result["warnings"]) == (rank in (1, 3))


def test_generators_end_quietly(two):
    """StopIteration is no error for the other ranks."""
    for result in of(two, "generator"):
        assert_silent(result)


def test_a_smaller_group_agrees_by_itself(four):
    """Ranks 0 and 1 raise; 2 and 3 are no part of it, and wait for nobody."""
    first, second, *others = of(four, "subgroup")
    assert first["error"] == second["error"] == "StatsChangedError"
    for result in others:
        assert_silent(result["alone"])


def test_wrong_group_is_refused(two):
    """With what it must be."""
    for result in of(two, "wrong_group"):
        assert result["error"] == "TypeError"
        assert result["text"].startswith("group must be a torch.distributed process group, None for the default group")


@pytest.mark.parametrize("name", ["ddp_broadcast", "ddp_own_buffers", "ddp_accumulation"])
def test_ddp_trains_as_without_a_guard(two, name):
    """Outputs, gradients, parameters and statistics are the twin's; equal statistics give nothing to report."""
    for rank, result in enumerate(of(two, name)):
        assert result["restore"]["twin"]
        assert_silent(result["restore"])
        assert result["warn"]["twin"]
        assert len(result["warn"]["warnings"]) == (rank == 0)


def test_ddp_broadcast_with_four_ranks(four):
    """The same."""
    assert all(result[policy]["twin"] for result in of(four, "ddp_broadcast") for policy in ("restore", "warn"))


def test_a_broadcast_is_told_and_not_accused(ranks):
    """Where DDP puts rank 0's statistics in the place of others, that rank hears so; nobody raises."""
    first, *others = of(ranks, "ddp_overwrites")
    for policy in ("raise", "restore", "warn"):
        assert_silent(first[policy])
        assert first[policy]["changes"] == 0
        for result in others:
            assert result[policy]["error"] is None
            (warning,) = result[policy]["warnings"]
            assert warning.startswith("DDP broadcast at forward: the statistics of rank 0 took the place of others")
            assert "\n  1 (BatchNorm2d)\n" in warning
            assert result[policy]["restored"] is (policy != "warn")
            assert result[policy]["zeros"] is (policy == "warn")
            assert result[policy]["changes"] == 1


def test_a_write_under_ddp_is_no_broadcast(two):
    """Other statistics than rank 0's are nobody else's doing."""
    first, second = of(two, "ddp_write")
    assert second["error"] == first["error"] == "StatsChangedError"
    assert second["text"].startswith(f"{CHANGED}\n  1 (BatchNorm2d): running_mean")
    assert first["text"].startswith("on rank 1:\n")
    assert second["warnings"] == []
    assert second["restored"]


def test_uneven_inputs(two):
    """join() with more batches on one rank: nothing moves, nothing hangs."""
    for result in of(two, "ddp_join"):
        assert_silent(result)
        assert result["restored"]


def test_a_watch_reports_for_all_ranks(two):
    """On the first one, equal records once with their ranks; what one rank alone did is told with that."""
    first, second = of(two, "watch_broadcast")
    assert (first["speaks"], first["rank"], first["missing"]) == (True, 0, [])
    assert (second["speaks"], second["rank"]) == (False, 1)
    (train, count, both), (alone, one, only) = first["updates"]
    assert (count, both, one, only) == (3, [0, 1], 1, [1])
    assert train != alone
    assert [(code, ranks) for code, _, ranks, _ in first["findings"]] == [("BN002", [1])]
    lines = first["report"].splitlines()
    assert lines[1] == "1 finding; 7 updates of 1 layer on ranks 0 and 1"
    assert lines[3].endswith(" in trained on rank 1")
    assert "  updates  layers  ranks  steps   mode            line" in lines
    assert [count for _, count, _ in second["updates"]] == [3, 1]
    assert "That is what rank 1 has recorded; the first rank has the report of all." in second["report"]


def test_ranks_with_statistics_of_their_own_are_a_finding(two):
    """With broadcast_buffers=False, and not with True: there those of rank 0 count."""
    first, second = of(two, "watch_own_buffers")
    found = {code: (layers, ranks, what) for code, layers, ranks, what in first["findings"]}
    assert found["BN015"] == (["1"], [], "1 layer (1) ended with other statistics on rank 1 than on rank 0")
    assert "BN015" not in [code for code, *_ in second["findings"]]


def test_a_watch_waits_for_no_rank_that_failed(two):
    """It has told what it recorded, all the same."""
    first, second = of(two, "watch_failure")
    assert first == {"updates": 1, "missing": []}
    assert second["updates"] == 1


def test_a_watch_can_be_alone(two):
    """group=False."""
    first, _ = of(two, "watch_alone")
    assert first["ranks"] == []
    assert first["report"].splitlines()[0] == "no finding; 1 update of 1 layer"


def test_sync_batch_norm(two_gpus):
    """It is held, and warned about, as without several ranks."""
    for rank, result in enumerate(of(two_gpus, "sync_batch_norm")):
        assert result["restore"]["twin"]
        assert_silent(result["restore"])
        assert result["warn"]["twin"]
        assert len(result["warn"]["warnings"]) == (rank == 0)


def test_fsdp2(two):
    """fully_shard is held and stopped like anything else, with mixed precision too."""
    for result in of(two, "fsdp2"):
        for precision in ("False", "True"):
            assert_silent(result[precision])
            assert result[precision]["twin"]
        assert result["raise"]["text"].startswith("1 (BatchNorm2d) is in train mode inside frozen():")


def test_fsdp1(two):
    """Also where it casts the buffers at its first forward."""
    for result in of(two, "fsdp1"):
        for name in ("plain", "buffers"):
            assert_silent(result[name])
            assert result[name]["restored"]
            assert result[name]["layers"] == 1


SCRIPT = """\
import os, sys, time
import torch
import torch.distributed as dist
from torch import nn

dist.init_process_group("gloo")
net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
model = nn.parallel.DistributedDataParallel(net)
for step in range(3):
    model(torch.randn(8, 3, 8, 8)).square().mean().backward()
    if sys.argv[1] == "fails" and step == 1:
        if dist.get_rank() == 1:
            raise RuntimeError("mine")
        time.sleep(120)
dist.destroy_process_group()
"""


def run_by_torchrun(folder, *args):
    """The script above under ``bnguard run``, with two ranks."""
    (folder / "train.py").write_text(SCRIPT)
    return start([*TORCHRUN, "-m", "bnguard", "run", "train.py", *args], folder)


def test_run_reports_once_for_all_ranks(tmp_path):
    """One report, with the updates of both."""
    done = run_by_torchrun(tmp_path, "ends")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("bnguard run train.py") == 1
    assert "no finding; 6 updates of 1 layer on ranks 0 and 1" in done.stdout


def test_run_reports_where_a_rank_fails(tmp_path):
    """Torchrun stops the first rank, which reports for both before it ends."""
    done = run_by_torchrun(tmp_path, "fails")
    assert done.returncode == 1
    assert "RuntimeError: mine" in done.stderr
    assert done.stdout.count("bnguard run train.py") == 1, done.stdout + done.stderr
    assert "no finding; 4 updates of 1 layer on ranks 0 and 1\n" in done.stdout
    assert "SIGTERM has ended the run" in done.stdout
