"""One of the two processes by which `bpt-dist check` tries the network of this machine: `PORT TIMEOUT RANK`."""

from __future__ import annotations

import sys

RANKS = 2


def main(port: str, seconds: str, rank: str) -> None:
    """Add up the ranks over gloo; ends with an error where that fails or gives another sum."""
    import datetime

    import torch
    from torch import distributed

    timeout = datetime.timedelta(seconds=int(seconds))
    distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", timeout=timeout, rank=int(rank), world_size=RANKS)
    value = torch.tensor([float(rank) + 1])
    distributed.all_reduce(value)
    distributed.destroy_process_group()
    if value.item() != RANKS * (RANKS + 1) / 2:
        sys.exit(f"the sum is {value.item()}")


if __name__ == "__main__":
    main(*sys.argv[1:])
