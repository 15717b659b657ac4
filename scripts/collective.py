"""Sum a number over the processes of torchrun, with NCCL on CUDA or gloo: a part of check_gpu.py."""

import sys

import torch
import torch.distributed as dist


def main() -> None:
    """Take ``cuda`` or ``cpu``, and print the number of processes as their sum of ones."""
    device = sys.argv[1]
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    ones = torch.ones(1, device=device)
    dist.all_reduce(ones)
    print(f"sum {ones.item():g} of {dist.get_world_size()} with {dist.get_backend()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
