"""How many workers of what size and precision: the user's options and the cluster's resources to one answer. Knows no Ray."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from embedding.errors import ConfigError, count
from embedding.model.host import available_cpus
from embedding.names import Precision

if TYPE_CHECKING:
    from embedding.config import JobConfig

READ_CPUS = 0.5
"""CPUs a read holds: mostly it waits for the store. Differs from any worker's, so that Ray Data keeps the stages apart."""
_MOST_CORES = 16
"""Of a worker on CPUs, whose threads need Python's lock between operations: 24 get on, 48 hold each other up (benchmarks/lanes.py)."""
_ACCELERATOR = "accelerator_type:"
"""What Ray puts before the name of a node's GPUs, among its resources."""
_WITHOUT_BF16 = ("V100", "V100S", "T4", "T4G")
"""GPUs whose matrix units know fp16 alone."""


@dataclass(frozen=True, slots=True)
class Placement:
    """The size of the worker pool and of one worker, and in what it computes."""

    min_workers: int
    max_workers: int
    gpus: float
    cpus: int
    fitting: int
    """Workers that the nodes of now have room for."""
    precision: Precision
    """What `--precision auto` is for a new output: fp16 if a GPU that is there now has no bf16."""

    def __str__(self) -> str:
        number = f"{self.min_workers}" if self.min_workers == self.max_workers else f"{self.min_workers} to {self.max_workers}"
        gpus = f"{self.gpus:g} GPU and " if self.gpus else ""
        return f"{number} on {self.device}, {gpus}{count(self.cpus, 'CPU core')} each"

    @property
    def device(self) -> str:
        """Device type the encoder runs on."""
        return "cuda" if self.gpus else "cpu"

    @property
    def threads(self) -> int | None:
        """CPU threads of the encoder; None for a GPU worker, which leaves them to torch."""
        return None if self.gpus else self.cpus


def place_workers(config: JobConfig, nodes: Sequence[Mapping[str, float]]) -> Placement:
    """The worker pool for a cluster whose nodes have these Ray resources.

    On CPUs, workers take a node's cores but one, which is left to the reads. As few workers as can keep their cores busy: each holds a
    copy of the model.

    Raises:
        ConfigError: not even one worker fits any node, and the pool's size leaves no room for nodes that join later.
    """
    has_gpus = any(node.get("GPU", 0) > 0 for node in nodes)
    gpus = (1.0 if has_gpus else 0.0) if config.gpus_per_worker == "auto" else config.gpus_per_worker
    most_cpus = int(max((node.get("CPU", 0) for node in nodes), default=1))
    cpus = (1 if gpus else _share(max(1, most_cpus - 1))) if config.cpus_per_worker == "auto" else config.cpus_per_worker
    fitting = sum(_fit(node, gpus, cpus) for node in nodes)
    if sum(node.get("CPU", 0) for node in nodes) - fitting * cpus < READ_CPUS:
        fitting -= 1  # a cluster full of workers could not read
    asked = config.worker_range()
    if asked is None and fitting < 1:
        needed = f"{gpus:g} GPU and {count(cpus, 'CPU')}" if gpus else f"{count(cpus, 'CPU')} (and half a CPU for reading)"
        raise ConfigError(
            f"no node of the cluster has {needed} for a worker; lower --gpus-per-worker or --cpus-per-worker, "
            "or use --workers MIN:MAX if nodes join later"
        )
    low, high = asked or (fitting, fitting)
    return Placement(low, high, gpus, cpus, max(0, fitting), _precision(nodes) if gpus else "fp32")


def _precision(nodes: Sequence[Mapping[str, float]]) -> Precision:
    return "fp16" if any(_ACCELERATOR + name in node for node in nodes for name in _WITHOUT_BF16) else "bf16"


def _share(cores: int) -> int:
    """Of the cores for one worker: all, or a part where one process cannot use so many."""
    return cores // -(-cores // _MOST_CORES)


def _fit(node: Mapping[str, float], gpus: float, cpus: int) -> int:
    """Workers that fit a node."""
    by_cpu = int(node.get("CPU", 0) // cpus)
    return min(by_cpu, int(node.get("GPU", 0) / gpus + 1e-9)) if gpus else by_cpu


def this_machine() -> dict[str, float]:
    """The resources that Ray would find if it were started here; a CPU more than there is, as an embedded cluster has it."""
    import torch

    resources: dict[str, float] = {"CPU": available_cpus() + 1, "GPU": torch.cuda.device_count()}
    if resources["GPU"]:
        words = re.split(r"[ -]", torch.cuda.get_device_name(0))  # such as "Tesla V100-SXM2-16GB"
        resources |= {_ACCELERATOR + name: 1.0 for name in _WITHOUT_BF16 if name in words}
    return resources
