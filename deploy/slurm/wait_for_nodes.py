"""Wait until N nodes have joined the Ray cluster at RAY_ADDRESS; `timeout` bounds it."""

from __future__ import annotations

import logging
import sys
import time

import ray


def main(count: int) -> None:
    """Return once the cluster is up and has `count` living nodes."""
    while not ray.is_initialized():
        try:
            ray.init(log_to_driver=False, logging_level=logging.CRITICAL)
        except ConnectionError:  # the head node is still starting
            time.sleep(1)
    while sum(node["Alive"] for node in ray.nodes()) < count:
        time.sleep(1)


if __name__ == "__main__":
    main(int(sys.argv[1]))
