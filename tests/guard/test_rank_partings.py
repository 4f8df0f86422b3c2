"""Ranks of a distributed run that part, with errors, elsewhere, in another order, hold up nobody and accuse nobody."""

import itertools
import os
import re
import subprocess
import sys
import time

import pytest
import torch.distributed as dist

from tests.launch import ROOT, TORCHRUN, job, once, start
from tests.rank_partings import PARTINGS

CHANGED = "running statistics of 1 layer changed inside "


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two ranks, started with torchrun."""
    return once(tmp_path_factory, "parting_ranks",
                lambda folder: job(folder, *TORCHRUN, "-m", "tests.rank_job", folder, *PARTINGS))  # fmt: skip


def of(two, name):
    """What each rank reports of a scenario; none of them has waited."""
    results = [rank[name] for rank in two]
    for result in results:
        assert result.get("seconds", 0) < 8, result
    return results


def said(result):
    """What was raised and warned of."""
    return result["error"], result["warnings"], result["notes"]


SILENCE = (None, [], [])


def test_guard_that_is_stopped_in_finally_waits_for_nobody(two):
    """The error comes out, and the others hear of it."""
    first, second = of(two, "stop_in_finally")
    assert (second["error"], second["text"]) == ("RuntimeError", "mine")
    assert said(first) == (None, ["on rank 1:\n  left the block with RuntimeError: mine"], [])


def test_error_that_was_there_before_the_guard_leads_nobody_out(two):
    """Ranks that retry in an ``except`` block agree as always."""
    for result in of(two, "stop_in_except"):
        assert result["error"] == "StatsChangedError"


def test_budget_holds_under_ddp(two):
    """updates=1 around each step: silence, and what an unguarded twin has, with and without broadcast."""
    for result in of(two, "budget_under_ddp"):
        for name in ("raise True", "restore True", "warn True", "raise False", "restore False", "warn False"):
            assert said(result[name]) == SILENCE, name
            assert result[name]["twin"], name


def test_budget_holds_in_join(two):
    """The rank with fewer batches gets the statistics of the other."""
    for result in of(two, "budget_in_join"):
        assert said(result) == SILENCE


def test_budget_is_no_less_under_ddp(two):
    """A second forward in a step is stopped on every rank."""
    for result in of(two, "budget_is_kept_under_ddp"):
        assert result["error"] == "StatsChangedError"
        assert result["text"].startswith("1 (BatchNorm2d) has updated once inside frozen(updates=1):")


@pytest.mark.parametrize("name", ["overwritten_and_left", "overwritten_and_failed", "overwritten_alone"])
def test_broadcast_accuses_nobody_where_nobody_can_be_asked(two, name):
    """Whether the one that asks has failed, or the one that would be asked, or each is on its own."""
    first, second = of(two, name)
    warning, *more = second["warnings"]
    left = ["on rank 0:\n  left the block with RuntimeError: mine"] if name == "overwritten_and_left" else []
    assert more == left
    assert warning.startswith("DDP broadcast at forward: the statistics of rank 0 took the place of others")
    assert second["error"] == ("RuntimeError" if name == "overwritten_and_failed" else None)
    assert second["notes"] == []
    assert first["error"] == ("RuntimeError" if name == "overwritten_and_left" else None)
    expected = ["on rank 1:\n  left the block with RuntimeError: mine"] if name == "overwritten_and_failed" else []
    assert first["warnings"] == expected
    assert first["restored"]
    assert second["restored"]


def test_generator_that_is_given_up_waits_for_nobody(two):
    """Nor does it keep the error that led to it."""
    first, second = of(two, "abandoned_generator")
    assert said(first) == SILENCE
    assert (second["error"], second["text"]) == ("RuntimeError", "mine")
    for result in of(two, "abandoned_strict_generator"):
        assert said(result) == SILENCE


def test_decorated_function_is_one_place(two):
    """From whichever line it is called."""
    first, second = of(two, "lines")
    assert first["text"].startswith(f"on rank 1:\n  {CHANGED}@bnguard.strict:")
    assert second["text"].startswith(f"{CHANGED}@bnguard.strict:")


def test_coroutines_meet_once_a_call(two):
    """However often they are resumed; asynchronous generators too."""
    for result in of(two, "coroutine"):
        assert said(result) == SILENCE


def test_finding_between_resumptions_is_heard_at_the_end(two):
    """The rank that has it raises at once."""
    for result in of(two, "finding_between_resumptions"):
        assert result["error"] == "StatsChangedError"


def test_failure_at_the_end_is_told(two):
    """The others need not wait for a rank whose block ends with an error of the guard's own."""
    first, second = of(two, "warning_as_error")
    assert second["text"].startswith("extra came into the model inside frozen()")
    assert first["text"].startswith("on rank 1:\n  left the block with BNGuardWarning: extra came into the model")


def test_rank_that_is_further_out_is_not_waited_for(two):
    """It will not come to the inner block any more."""
    first, second = of(two, "two_on_a_line")
    assert second["error"] == "ValueError"
    [warning] = first["warnings"]
    assert warning.startswith("on rank 1:\n  left the block with ValueError: include='nothing*' matches none")
    for result in of(two, "check_on_one_only"):
        assert said(result) == SILENCE


def test_exit_without_a_code_is_no_failure(two):
    """sys.exit()."""
    for result in of(two, "early_exit"):
        assert said(result) == SILENCE


def test_ranks_that_are_out_of_step_are_told_where_the_others_are(two):
    """Each of them."""
    for rank, result in enumerate([rank["out_of_step"] for rank in two]):
        assert result["error"] == "BNGuardError"
        place = r"the end of frozen\(\) at tests/rank_partings\.py:\d+ in run"
        assert re.match(rf"rank {1 - rank} did not come to {place}\nwithin 13 seconds", result["text"])
        assert re.search(rf"\n  rank {1 - rank} waits at {place}\n", result["text"])


def test_store_keeps_nothing_of_errors(two):
    """Whoever comes last deletes it."""
    assert [result["more_keys"] for result in of(two, "store_after_errors")] == [0, 0]


def test_guard_of_a_group_that_is_gone_is_on_its_own(two):
    """And so is a pickle of it, since groups are of their process."""
    for result in of(two, "groups_that_are_gone"):
        assert said(result) == SILENCE


def test_ranks_are_in_step_after_one_has_left_early(two):
    """What is inside of a block is counted within it."""
    for result in of(two, "skipped_inner_blocks"):
        assert result["error"] == "StatsChangedError"
    first, _ = of(two, "skipped_inner_blocks")
    assert first["warnings"] == ["on rank 1:\n  left the block with ValueError: bad batch"]
    first, second = of(two, "warning_as_error_between_resumptions")
    [warning] = first["warnings"]
    assert warning.startswith("on rank 1:\n  left the block with BNGuardWarning: extra came into the model")
    assert second["error"] is None
    for result in of(two, "strict_of_several_models"):
        assert said(result) == SILENCE


def test_first_rank_that_stays_speaks(two):
    """Where the first of all has left."""
    first, second = of(two, "first_speaker_has_left")
    assert first["error"] == "RuntimeError"
    assert second["warnings"][0] == "on rank 0:\n  left the block with RuntimeError: mine"
    assert second["warnings"][1].startswith(f"{CHANGED}frozen():")


EARLY = """\
import sys, time
from datetime import timedelta
import torch
import torch.distributed as dist
from torch import nn
import bnguard

dist.init_process_group("gloo", timeout=timedelta(seconds=20))
rank, who, inner = dist.get_rank(), int(sys.argv[1]), sys.argv[2]
net = nn.Sequential(nn.BatchNorm1d(3)).eval()
start = time.monotonic()
try:
    with bnguard.frozen(net) as guard:
        if rank == who:
            raise ValueError("mine")
        if inner == "check":
            guard.check()
        elif inner == "block":
            with bnguard.frozen(net):
                pass
        else:
            net[0].running_mean.data += rank == 2
except ValueError:
    print(rank, "left", time.monotonic() - start < 8)
except bnguard.StatsChangedError as error:
    print(rank, str(error)[:10], time.monotonic() - start < 8)
else:
    print(rank, "stayed", time.monotonic() - start < 8)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("inner", ["check", "block"])
def test_rank_that_fails_in_the_first_block_of_all_holds_up_nobody(who, inner, tmp_path):
    """Before the ranks have agreed on anything, whoever it is, and wherever the other one waits."""
    (tmp_path / "train.py").write_text(EARLY)
    done = start([*TORCHRUN, "train.py", who, inner], tmp_path)
    assert sorted(done.stdout.splitlines()) == sorted([f"{who} left True", f"{1 - who} stayed True"]), done.stderr


def test_finding_in_the_first_block_of_all_is_heard(tmp_path):
    """By those that are left where the first rank fails."""
    (tmp_path / "train.py").write_text(EARLY)
    launcher = [*TORCHRUN[:-1], "--nproc-per-node=3"]
    done = start([*launcher, "train.py", 0, "finding"], tmp_path)
    lines = sorted(done.stdout.splitlines())
    assert lines == ["0 left True", "1 on rank 2: True", "2 running st True"], done.stdout + done.stderr


RESTARTED = """\
import os, sys, time
from datetime import timedelta
import torch
import torch.distributed as dist
from torch import nn
import bnguard

attempt, rank, port = map(int, sys.argv[1:])
kept = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=20))
# Gloo trips over its own keys of an earlier attempt, now and then: it gets others.
dist.init_process_group("gloo", store=dist.PrefixStore(str(attempt), kept), rank=rank, world_size=2)
dist.distributed_c10d._get_default_store = lambda: kept
net = nn.Sequential(nn.BatchNorm1d(3)).eval()

start = time.monotonic()
with bnguard.watch(net) as record:
    for _ in range(1 + 4 * (attempt == 0)):
        net.train()(torch.ones(2, 3))
    net.eval()
for step in range(4):
    if rank == attempt:
        time.sleep(0.2)
    with bnguard.frozen(net):
        net(torch.ones(2, 3))
        if attempt == 0 and step == {step} and rank == 1:
            {then}
            time.sleep(1)
            os._exit(1)
print([(update.count, update.ranks) for update in record.updates], time.monotonic() - start < 10)
dist.barrier()
dist.destroy_process_group()
"""
CRASHES = "pass"
TELLS = "net[0].running_mean.data += 1; break"
FAILS = "raise KeyError('of another attempt')"  # before the other rank has come to a first block


@pytest.mark.parametrize(("step", "then"), [(0, CRASHES), (2, CRASHES), (0, TELLS), (2, TELLS), (0, FAILS)])
def test_attempt_hears_nothing_of_the_one_before(step, then, tmp_path):
    """An elastic run keeps its store: neither what ranks told there, nor that they were there, counts any more."""
    script = tmp_path / "train.py"
    script.write_text(RESTARTED.replace("{step}", str(step)).replace("{then}", then))
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def attempt(number):
        commands = [[sys.executable, script, str(number), str(rank), str(server.port)] for rank in (0, 1)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        ranks = [
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for command in map(list, commands)
        ]
        ended = next(rank for rank in itertools.cycle(ranks) if rank.poll() is not None or time.sleep(0.01))
        if ended.returncode:  # as torchrun does
            for rank in ranks:
                rank.kill()
        return [(*rank.communicate(timeout=60), rank.returncode) for rank in ranks]

    assert any(code for *_, code in attempt(0))
    (first, error, code), (second, other_error, other_code) = attempt(1)
    assert (code, other_code) == (0, 0), error + other_error
    assert (first, second) == ("[(1, (0, 1))] True\n", "[(1, ())] True\n")
    assert "of another attempt" not in error + other_error


FAKE = """\
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
import bnguard

{init}
net = nn.Sequential(nn.BatchNorm1d(3))
with bnguard.frozen(net, "restore"), bnguard.watch(net) as record:
    net(torch.ones(2, 3))
print(record.speaks, net[0].num_batches_tracked.item())
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
def test_process_without_others_is_alone(init, tmp_path):
    """One that only plays at a distributed run, and the only one of a run."""
    done = start(["-c", FAKE.replace("{init}", init)], tmp_path)
    assert (done.returncode, done.stdout) == (0, "True 0\n"), done.stderr
