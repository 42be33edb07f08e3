"""Devices and processes, as the machine, torchrun or SLURM give them."""

import pytest
import torch

from t5g2convert.adaptation.options import AdaptOptions, Hardware, LoopConfig
from t5g2convert.adaptation.train.distributed import check_attention, check_shard_size, early_rank, resolve
from t5g2convert.errors import UsageError


def test_devices_that_are_not_there_or_were_not_started_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert resolve(Hardware()) == ("cpu", 1, 1)
    with pytest.raises(UsageError, match="this machine has 0 CUDA"):
        resolve(Hardware(accelerator="cuda", devices=2))
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "RANK": "5"}.items():
        monkeypatch.setenv(name, value)
    assert resolve(Hardware()) == ("cpu", 4, 2)
    assert resolve(Hardware(accelerator="cpu", devices=4, nodes=2)) == ("cpu", 4, 2)
    with pytest.raises(UsageError, match=r"torchrun started 8 process\(es\), but --devices 3 and --nodes 2 need 6"):
        resolve(Hardware(accelerator="cpu", devices=3, nodes=2))


def test_devices_and_nodes_come_from_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_NTASKS": "6", "SLURM_NNODES": "3", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "x"}.items():
        monkeypatch.setenv(name, value)
    assert resolve(Hardware(accelerator="cpu")) == ("cpu", 2, 3)
    monkeypatch.setenv("SLURM_JOB_NAME", "bash")
    assert resolve(Hardware(accelerator="cpu")) == ("cpu", 1, 1)


def slurm(monkeypatch: pytest.MonkeyPatch, *, tasks: int, visible: int) -> None:
    names = {"SLURM_NTASKS": str(tasks), "SLURM_NNODES": "1", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "x"}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)


def test_an_sbatch_script_without_srun_gets_the_command_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm(monkeypatch, tasks=1, visible=8)
    with pytest.raises(UsageError, match="slurm started 1 process, but it sees 8 CUDA devices") as unnamed:
        resolve(Hardware())
    with pytest.raises(UsageError, match=r"slurm started 1 process\(es\), but --devices 8 and --nodes 1") as named:
        resolve(Hardware(devices=8))
    for raised in (unnamed, named):
        assert str(raised.value.hint).startswith("start it with srun --ntasks-per-node DEVICES")
    assert resolve(Hardware(devices=1)) == ("cuda", 1, 1)


def test_tasks_that_see_one_device_each_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm(monkeypatch, tasks=8, visible=1)
    with pytest.raises(
        UsageError, match=r"8 processes run on this machine, but each sees 1 CUDA device\(s\)"
    ) as raised:
        resolve(Hardware())
    assert raised.value.hint == "ask SLURM for gpus-per-node instead of gpus-per-task"
    slurm(monkeypatch, tasks=8, visible=8)
    assert resolve(Hardware()) == ("cuda", 8, 1)


def test_the_rank_comes_from_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    assert early_rank() == 0
    for name, value in {"SLURM_NTASKS": "6", "SLURM_PROCID": "3", "SLURM_JOB_NAME": "x", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert early_rank() == 3
    # In a SLURM shell, Fabric's child processes inherit the variables of the shell.
    monkeypatch.setenv("SLURM_JOB_NAME", "bash")
    assert early_rank() == 1
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "5"}.items():
        monkeypatch.setenv(name, value)
    assert early_rank() == 5


def test_groups_that_do_not_have_all_processes_are_refused() -> None:
    check_shard_size(Hardware(shard_size=4), 8)
    with pytest.raises(UsageError, match="--shard-size 3 does not divide the number of processes, 8"):
        check_shard_size(Hardware(shard_size=3), 8)


def test_attention_by_blocks_is_refused_on_the_cpu() -> None:
    check_attention(AdaptOptions(lr=1e-3, steps=1, attention="dense", accelerator="cpu"))
    with pytest.raises(UsageError, match="needs a GPU"):
        check_attention(AdaptOptions(lr=1e-3, steps=1, attention="blocks", accelerator="cpu"))


def test_the_older_spelling_of_no_recomputation_still_holds() -> None:
    assert LoopConfig().recomputed == "full"
    assert LoopConfig(recompute="selective").recomputed == "selective"
    assert LoopConfig(gradient_checkpointing=False).recomputed == "none"
