"""Many processes, as in `ranks.py`: started once, by one command, for all tests here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from miracle_ban import distributed
from miracle_ban.errors import MiracleError

SCENARIOS = ["sharing:4", "fitting:2", "faulty:2", "dying:2", "resuming:2", "refining:1", "refining:2", "searching:1", "searching:2",
             "searching:4", "attending:2", "prepared:2", "hardening:2"]  # fmt: skip


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """What the processes of each scenario told, and how they ended."""
    command = [sys.executable, str(Path(__file__).parent / "ranks.py"), str(tmp_path_factory.mktemp("ranks")), *SCENARIOS]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    found = {line["asked"]: line for line in map(json.loads, result.stdout.splitlines())}
    for asked, line in found.items():
        assert line["status"] == ([0, -9] if asked.startswith("dying") else [0] * len(line["status"])), result.stderr
    return found


def alike(values: list[Any]) -> Any:
    """The one value that they all are."""
    assert all(v == values[0] for v in values), values
    return values[0]


def test_processes_with_one_loader_take_turns_and_see_every_example_once(told):
    ranks = told["sharing:4"]["told"]
    assert alike([r["examples"] for r in ranks]) == 70
    orders = []
    for turn in range(2):
        batches = [r["passes"][turn] for r in ranks]
        assert [len(b) for b in batches] == [1] * 4  # 7 batches: what 4 does not divide is left out
        seen = [x for own in batches for batch in own for x in batch]
        assert len(set(seen)) == len(seen) == 40
        orders.append(seen)
    assert orders[0] != orders[1]


@pytest.mark.parametrize("loader", ["plain", "sharded"])
def test_fit_gives_every_process_the_same_posteriors_from_noise_and_data_of_its_own(told, loader):
    ranks = [r[loader] for r in told["fitting:2"]["told"]]
    for key in ("digest", "history", "steps", "examples", "widths", "beta", "predicted"):
        alike([r[key] for r in ranks])
    assert ranks[0]["steps"] == 8 * 4  # half of 8 batches each, 8 passes
    assert ranks[0]["examples"] == 256
    assert ranks[0]["widths"]["1"] < 12  # units were dropped, the same ones
    assert ranks[0]["noise"] != ranks[1]["noise"]
    assert [r["seen"] for r in ranks] == [1280, 1280]  # two passes of narrowing and eight, half of the data each


@pytest.mark.parametrize("engine", ["fabric", "accelerate", "split", "dispatch"])
def test_a_loader_that_an_engine_prepared_gives_each_process_its_share(told, engine):
    ranks = [r[engine] for r in told["prepared:2"]["told"]]
    assert alike([r["sharded"] for r in ranks]) is True
    assert alike([r["examples"] for r in ranks]) == 256
    assert [r["seen"] for r in ranks] == [10 * 128] * 2  # of 10 passes, each its half
    alike([r["file"] for r in ranks])
    assert ranks[0]["bytes"] <= 200


@pytest.mark.parametrize("loader", ["plain", "sharded"])
def test_hardening_and_rescaling_give_every_process_the_same(told, loader):
    ranks = [r[loader] for r in told["hardening:2"]["told"]]
    for key in ("weights", "history", "steps", "rescaled"):
        alike([r[key] for r in ranks])
    assert ranks[0]["rescaled"][-1] > 0
    assert ranks[0]["steps"] == 6 * 4  # half of 8 batches each
    assert ranks[0]["history"][-1]["loss"] < ranks[0]["history"][0]["loss"]


def test_attention_trains_on_contexts_of_every_process_and_packages_for_one(told):
    ranks = told["attending:2"]["told"]
    for key in ("posteriors", "general", "file"):
        alike([r[key] for r in ranks])


def test_the_file_does_not_depend_on_the_number_of_processes(told):
    files = alike([r["files"] for n in (1, 2, 4) for r in told[f"searching:{n}"]["told"]])
    assert set(files) == {"gprs", "minimal-random", "trellis", "untrained"}
    alike([r["files"] for n in (1, 2) for r in told[f"refining:{n}"]["told"]])
    assert all(r["saved"] and r["size"] for n in (1, 2, 4) for r in told[f"searching:{n}"]["told"])


def test_refinement_on_shares_gives_every_process_the_same_file(told):
    ranks = told["refining:2"]["told"]
    alike([(r["sharded"], r["posteriors"]) for r in ranks])
    assert ranks[0]["sharded"] != told["refining:1"]["told"][0]["sharded"]


def test_the_fault_of_one_process_is_told_to_all(told):
    messages = alike(told["faulty:2"]["told"])
    assert "different networks" in messages["network"]
    assert "the loss became nan" in messages["nan"]
    assert "1 batch(es) for 2 processes" in messages["few"]
    assert "cannot write" in messages["folder"]


def test_the_death_of_a_process_is_an_error_for_the_others_and_the_work_resumes(told):
    survivor, dead = told["dying:2"]["told"]
    assert dead is None
    assert "a process has died" in survivor["error"]
    assert survivor["seconds"] < 60  # of the process group's own limit
    assert survivor["resumable"]
    for r in told["resuming:2"]["told"]:
        assert r["resumed"] == r["undisturbed"]
    alike([r["resumed"] for r in told["resuming:2"]["told"]])


def test_without_a_process_group_everything_is_done_here():
    assert (distributed.rank(), distributed.world_size(), distributed.own_seed(7)) == (0, 1, 7)
    assert distributed.spread(lambda x: x + 1, range(3)) == [1, 2, 3]
    assert distributed.gather("x") == ["x"]
    assert distributed.first(lambda: 5) == 5
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([p], 0.1)
    assert distributed.mean_gradients(optimizer, [1.5]) == [1.5]
    assert p.grad is None
    with pytest.raises(MiracleError, match="bad"):
        distributed.first(lambda: (_ for _ in ()).throw(MiracleError("bad")))
