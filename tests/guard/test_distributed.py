"""Distributed runs: each rank guards for itself and never waits; a watch makes one report."""

import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from tests import forks
from tests.launch import LIMIT, TORCHRUN, check, job, once, start
from tests.old_torch import RELEASE
from tests.rank_scenarios import SCENARIOS

HAS_FSDP2 = RELEASE >= (2, 7)  # before, fully_shard() takes a GPU
OF_PAIRS = [
    name for name in SCENARIOS if name not in ("sync_batch_norm", "two_ddp_groups") and (HAS_FSDP2 or name != "fsdp2")
]
OF_ALL = [
    "clean", "change_on_one", "forward_stopped_on_one", "own_error_on_one", "guards_and_the_store", "ddp_broadcast",
    "ddp_overwrites", "recalibrated",
]  # fmt: skip
OF_GPUS = [*OF_ALL, "warn_in_train_mode", "ddp_own_buffers", "sync_batch_norm", "watch_own_buffers", "fsdp2"]
OF_FOUR = [*OF_ALL, "two_ddp_groups"]


@pytest.fixture(scope="module")
def forked(tmp_path_factory):
    """Two ranks, forked from one process."""

    def run(folder):
        command = ["tests.forked_ranks", 2, "tests.rank_job", folder, *OF_PAIRS]
        check(folder, forks.run("-m", *command, timeout=LIMIT))

    return once(tmp_path_factory, "forked_ranks", run)


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory):
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


OF_TORCHRUN = pytest.param("torchrun", marks=pytest.mark.slow)


@pytest.fixture(params=["forked", OF_TORCHRUN])
def two(request):
    """Two ranks."""
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["forked", OF_TORCHRUN, pytest.param("four", marks=pytest.mark.slow), "two_gpus"])
def ranks(request):
    """Any number of them."""
    return request.getfixturevalue(request.param)


def of(ranks, name):
    """What each rank reports of a scenario."""
    return [rank[name] for rank in ranks]


def assert_silent(result):
    """Nothing was raised, noted or warned about."""
    assert (result["error"], result["notes"], result["warnings"]) == (None, [], [])


CHANGED = "running statistics of 1 layer changed inside frozen():"


def test_clean_ranks_stay_silent(ranks):
    """No rank reports anything."""
    for result in of(ranks, "clean"):
        assert_silent(result)


def test_a_change_raises_on_its_rank_alone(ranks):
    """The error names the rank; the statistics are restored, and no other rank hears of it."""
    for rank, result in enumerate(of(ranks, "change_on_one")):
        assert result["restored"]
        if rank == 1:
            assert result["error"] == "StatsChangedError"
            assert result["text"].startswith(f"[rank 1] {CHANGED}\n  1 (BatchNorm2d): running_mean")
        else:
            assert_silent(result)


def test_a_stopped_forward_raises_on_its_rank_alone(ranks):
    """With the line."""
    for rank, result in enumerate(of(ranks, "forward_stopped_on_one")):
        if rank == 1:
            assert result["error"] == "StatsChangedError"
            assert result["text"].startswith("[rank 1] 1 (BatchNorm2d) is in train mode inside frozen():")
            assert re.search(r"at tests/rank_scenarios\.py:\d+ in <lambda>", result["text"])
        else:
            assert_silent(result)


def test_an_error_of_its_own_concerns_no_other_rank(ranks):
    """It leaves the block as it is."""
    for rank, result in enumerate(of(ranks, "own_error_on_one")):
        if rank == 1:
            assert (result["error"], result["text"]) == ("RuntimeError", "out of memory, say\nand more")
            assert result["notes"] == result["warnings"] == []
        else:
            assert_silent(result)


def test_every_rank_warns_of_its_own_updates(two):
    """Once, at the line; the statistics are those of an unguarded twin."""
    for rank, result in enumerate(of(two, "warn_in_train_mode")):
        assert result["error"] is None
        (warning,) = result["warnings"]
        assert warning.startswith(f"[rank {rank}] 1 (BatchNorm2d) is in train mode inside frozen() and updates")
        assert result["twin"]


def test_recalibrate_pools_the_shares_of_all_ranks(ranks):
    """Every rank gets the same bits, which are those of one process with all of the data, up to rounding.

    The layer that has not run on any rank is named on each. Ranks that have selected different layers are refused, and
    so is a run in which nobody has data; the statistics stay.
    """
    for rank, result in enumerate(of(ranks, "recalibrated")):
        assert (result["error"], result["result"]) == (None, [["norm", "own"], ["spare"], 3])
        (warning,) = result["warnings"]
        assert warning.startswith(f"[rank {rank}] spare (BatchNorm2d) did not run in 3 batches")
        assert result["same_on_all_ranks"]
        assert result["pooled"]
        assert result["has_moved"]
        assert result["own_share"]
        assert result["refused"][0] == "BNGuardError"
        assert result["refused"][1].startswith("the ranks have selected different layers to recalibrate")
        assert result["empty"] == [
            "ValueError", "the loader is empty: it has yielded no batch. The statistics are unchanged"
        ]  # fmt: skip
        assert result["kept"]


def test_rank_0_validates_alone(two):
    """``if rank == 0: with frozen(ddp.module): validate(...)`` ends at once, and raises at once in train mode."""
    first, _ = of(two, "validation_on_rank_0")
    assert_silent(first["eval"])
    assert first["train"]["error"] == "StatsChangedError"
    assert first["eval"]["seconds"] < 2
    assert first["train"]["seconds"] < 2


def test_guards_leave_the_store_alone(ranks):
    """They exchange nothing."""
    for result in of(ranks, "guards_and_the_store"):
        assert_silent(result)
        assert result["more_keys"] == 0


@pytest.mark.parametrize("name", ["forked_worker", "destroyed_group"])
def test_blocks_elsewhere(two, name):
    """In a worker of a DataLoader, which is no rank, and across the end of the process group."""
    for result in of(two, name):
        assert_silent(result)
        assert result["seconds"] < 8


def test_rank_zero_of_ddps_group_broadcasts(four):
    """Two groups of two: ranks 1 and 3 get the statistics of ranks 0 and 2, and are warned; no rank raises."""
    for rank, result in enumerate(of(four, "two_ddp_groups")):
        assert result["error"] is None
        assert len(result["warnings"]) == (rank in (1, 3))


@pytest.mark.parametrize("name", ["ddp_broadcast", "ddp_own_buffers", "ddp_accumulation"])
def test_ddp_trains_as_without_a_guard(two, name):
    """Outputs, gradients, parameters and statistics are the twin's; a broadcast of equal statistics is no change."""
    for result in of(two, name):
        assert result["restore"]["twin"]
        assert_silent(result["restore"])
        assert result["warn"]["twin"]
        assert len(result["warn"]["warnings"]) == 1


def test_ddp_broadcast_with_four_ranks(four):
    """Outputs, gradients, parameters and statistics are the twin's."""
    assert all(result[policy]["twin"] for result in of(four, "ddp_broadcast") for policy in ("restore", "warn"))


def test_a_broadcast_is_a_warning(ranks):
    """Where DDP puts rank 0's statistics in the place of others, that rank is warned, under every policy."""
    first, *others = of(ranks, "ddp_overwrites")
    for policy in ("raise", "restore", "warn"):
        assert_silent(first[policy])
        assert first[policy]["changes"] == 0
        for rank, result in enumerate(others, 1):
            assert result[policy]["error"] is None
            (warning,) = result[policy]["warnings"]
            assert warning.startswith(f"[rank {rank}] ")
            assert "DDP" in warning
            assert "\n  1 (BatchNorm2d)\n" in warning
            assert result[policy]["restored"] is (policy != "warn")
            assert result[policy]["zeros"] is (policy == "warn")
            assert result[policy]["changes"] == 1


def test_budget_holds_under_ddp(two):
    """One update a step: DDP's broadcast before it is none, and the statistics are those without a guard."""
    for result in of(two, "budget_under_ddp"):
        for name, said in result.items():
            assert_silent(said)
            assert said["twin"], name


def test_budget_holds_in_join(two):
    """A rank with fewer batches gets the statistics of another one."""
    for result in of(two, "budget_in_join"):
        assert result["error"] is None


def test_budget_is_no_larger_under_ddp(two):
    """Two forwards of a step are one too many."""
    for result in of(two, "budget_is_kept_under_ddp"):
        assert result["error"] == "StatsChangedError"


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


def test_a_rank_that_fails_has_reported(two):
    """A watch that an exception leaves posts what it has recorded."""
    first, second = of(two, "watch_failure")
    assert first == {"updates": 1, "missing": []}
    assert second["updates"] == 1


def test_ranks_that_do_not_report_are_named(two):
    """Rank 0 waits for them, ten seconds in all unless told otherwise, and reports without them."""
    first, _ = of(two, "watch_on_rank_0")
    assert first["patience"] == 10
    assert 1 <= first["seconds"] < 5
    assert first["missing"] == [1]
    assert first["report"].startswith("no finding; 1 update of 1 layer on rank 0\n")
    assert "Rank 1 did not report in time" in first["report"]


def test_other_ranks_wait_for_nobody(two):
    """They post, and go on."""
    _, second = of(two, "watch_on_rank_1")
    assert_silent(second)
    assert second["seconds"] < 1


def test_records_of_several_watches_are_not_mixed_up(two):
    """Those of one line, one after the other; a forked process reports nothing."""
    first, second = of(two, "watch_again")
    assert first == [[[number, [0, 1]]] for number in (1, 2, 3)]
    assert second == [[[number, []]] for number in (1, 2, 3)]


def test_sync_batch_norm(two_gpus):
    """It is held, and warned about, as without several ranks."""
    for result in of(two_gpus, "sync_batch_norm"):
        assert result["restore"]["twin"]
        assert_silent(result["restore"])
        assert result["warn"]["twin"]
        assert len(result["warn"]["warnings"]) == 1


@pytest.mark.skipif(not HAS_FSDP2, reason="before torch 2.7 fully_shard() takes a GPU")
def test_fsdp2(two):
    """fully_shard is held and stopped like anything else, with mixed precision too."""
    for result in of(two, "fsdp2"):
        for precision in ("False", "True"):
            assert_silent(result[precision])
            assert result[precision]["twin"]
        assert "1 (BatchNorm2d) is in train mode inside frozen():" in result["raise"]["text"]


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


ABSENT = """\
import os, time
import torch.distributed as dist
dist.init_process_group("gloo")
import torch
from torch import nn
nn.Sequential(nn.BatchNorm1d(2))(torch.ones(3, 2))
if dist.get_rank() == 1:
    os._exit(0)  # without a report
"""


def test_run_names_a_rank_that_is_gone(tmp_path):
    """Rank 0 reports for itself after ten seconds, and says so."""
    (tmp_path / "train.py").write_text(ABSENT)
    began = time.monotonic()
    done = start([*TORCHRUN, "-m", "bnguard", "run", "train.py"], tmp_path)
    assert time.monotonic() - began > 10
    assert done.stdout.count("bnguard run train.py") == 1, done.stderr
    assert "1 update of 1 layer on rank 0\n" in done.stdout
    assert "Rank 1 did not report in time" in done.stdout
    assert "bnguard: waiting up to 10 seconds for what was recorded on rank 1\n" in done.stderr


RESTARTED = """\
import os, sys
import torch
import torch.distributed as dist
from torch import nn
import bnguard

attempt, rank, port = map(int, sys.argv[1:])
kept = dist.TCPStore("127.0.0.1", port, is_master=False)
# Gloo trips over its own keys of an earlier attempt, now and then: it gets others.
dist.init_process_group("gloo", store=dist.PrefixStore(str(attempt), kept), rank=rank, world_size=2)
dist.distributed_c10d._get_default_store = lambda: kept
net = nn.Sequential(nn.BatchNorm1d(3))
with bnguard.watch(net) as record:
    if attempt == 0 and rank == 0:
        os._exit(1)
    for _ in range(1 + 4 * (attempt == 0)):
        net(torch.ones(2, 3))
    if attempt == 1 and rank == 1:
        os._exit(0)
print([(update.count, update.ranks) for update in record.updates], record.missing_ranks)
"""


def test_a_post_of_an_earlier_attempt_is_ignored(tmp_path):
    """An elastic run may keep its store: what a rank posted there before a restart does not count."""
    script = tmp_path / "train.py"
    script.write_text(RESTARTED)
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    said = []
    for attempt in (0, 1):
        with ThreadPoolExecutor() as pool:
            commands = [[script, attempt, rank, server.port] for rank in (0, 1)]
            said.append([done.stdout for done in pool.map(start, commands)])
    assert said == [["", "[(5, ())] ()\n"], ["[(1, (0,))] (1,)\n", ""]]


ALONE = """\
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
import bnguard

{init}
net = nn.Sequential(nn.BatchNorm1d(3))
with bnguard.frozen(net, "restore"), bnguard.watch(net) as record:
    net(torch.ones(2, 3))
print(record.speaks, record.missing_ranks, net[0].num_batches_tracked.item())
"""


@pytest.mark.parametrize(
    "init",
    [
        'dist.init_process_group("fake", rank=0, world_size=4)',
        'dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())',
        'dist.init_process_group("fake", rank=0, world_size=4, store=dist.HashStore())',
        'dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())',
    ],
)
def test_process_without_others_is_alone(init):
    """A fake process group, and a group of one process."""
    done = start(["-c", ALONE.replace("{init}", init)])
    assert (done.returncode, done.stdout) == (0, "True () 0\n"), done.stderr
