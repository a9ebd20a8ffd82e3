"""The size of the worker pool for clusters of literal sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager

from embedding.config import JobConfig
from embedding.errors import ConfigError
from embedding.run.placement import Placement, place_workers, this_machine

HEAD = {"CPU": 4.0}
GPU_NODE = {"CPU": 32.0, "GPU": 8.0}


def config(**options: Any) -> JobConfig:
    return JobConfig.build(input=("in",), output="out", **options)


def test_a_laptop_gets_one_worker_with_all_its_cores() -> None:
    assert place_workers(config(), [{"CPU": 3.0}]) == Placement(1, 1, 0.0, 2, fitting=1, precision="fp32")


@pytest.mark.parametrize(("cores", "workers", "each"), [(17, 1, 16), (18, 2, 8), (33, 2, 16), (64, 4, 15), (96, 6, 15), (192, 12, 15)])
def test_many_cores_are_shared_out_to_several_workers(cores: float, workers: int, each: int) -> None:
    assert place_workers(config(), [{"CPU": cores}]) == Placement(workers, workers, 0.0, each, fitting=workers, precision="fp32")


def test_every_gpu_gets_a_worker() -> None:
    assert place_workers(config(), [HEAD, GPU_NODE, GPU_NODE]) == Placement(16, 16, 1.0, 1, fitting=16, precision="bf16")
    assert place_workers(config(gpus_per_worker=0.5), [HEAD, GPU_NODE]).max_workers == 16
    assert place_workers(config(gpus_per_worker=0), [HEAD, GPU_NODE]).device == "cpu"


@pytest.mark.parametrize(
    ("kinds", "precision"), [(["H100", "A10G"], "bf16"), (["T4"], "fp16"), (["A100", "V100"], "fp16"), (["L4", "A100-40G"], "bf16")]
)
def test_gpus_compute_in_what_all_of_them_have(kinds: list[str], precision: str) -> None:
    nodes = [HEAD, *(GPU_NODE | {f"accelerator_type:{kind}": 1.0} for kind in kinds)]
    assert place_workers(config(), nodes).precision == precision
    assert place_workers(config(gpus_per_worker=0), nodes).precision == "fp32"


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("Tesla T4", "fp16"),
        ("NVIDIA T4G", "fp16"),
        ("Tesla V100-SXM2-16GB", "fp16"),
        ("Tesla V100S-PCIE-32GB", "fp16"),
        ("NVIDIA A10G", "bf16"),
        ("NVIDIA H100 80GB HBM3", "bf16"),
    ],
)
def test_this_machine_names_its_gpus_as_ray_does(monkeypatch: pytest.MonkeyPatch, name: str, precision: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: name)
    node = GPU_NODE | {f"accelerator_type:{NvidiaGPUAcceleratorManager._gpu_name_to_accelerator_type(name)}": 1.0}
    assert [place_workers(config(), [each]).precision for each in (this_machine(), node)] == [precision, precision]


def test_a_gpu_node_is_filled_by_what_runs_out_first() -> None:
    assert place_workers(config(cpus_per_worker=10), [HEAD, GPU_NODE]).max_workers == 3


def test_a_cluster_of_workers_keeps_half_a_cpu_for_reads() -> None:
    assert place_workers(config(cpus_per_worker=1), [{"CPU": 4.0}]).max_workers == 3
    assert place_workers(config(), [{"CPU": 8.0, "GPU": 8.0}]).max_workers == 7


def test_the_user_decides() -> None:
    assert place_workers(config(workers="1:64", gpus_per_worker=1), [HEAD]) == Placement(1, 64, 1.0, 1, fitting=0, precision="bf16")
    assert place_workers(config(workers="3"), [HEAD]) == Placement(3, 3, 0.0, 3, fitting=1, precision="fp32")


@pytest.mark.parametrize("options", [{"gpus_per_worker": 1}, {"cpus_per_worker": 64}])
def test_a_worker_that_fits_nowhere_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"no node of the cluster has .* lower --gpus-per-worker or --cpus-per-worker"):
        place_workers(config(**options), [HEAD])
