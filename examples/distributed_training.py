"""Training in several processes with DistributedDataParallel: on CPUs over gloo, or one GPU for each over NCCL.

torchrun --standalone --nproc-per-node 2 examples/distributed_training.py [file for the weights]
"""

import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported: idle threads must sleep, not spin

import torch
from torch import Tensor, nn

import rnn_gpu


class RunningMean(nn.Module):
    """[T, B, 1] -> [T, B, 1]: what it is trained for is the mean of all inputs so far."""

    def __init__(self):
        super().__init__()
        self.layer = rnn_gpu.LSTM(1, 32)
        self.head = nn.Linear(32, 1)

    def forward(self, input: Tensor) -> Tensor:
        """See the class."""
        output, _ = self.layer(input)
        return self.head(output)


def train(device: torch.device) -> None:
    """Train for a hundred steps; rank 0 prints the loss of its part, and saves the weights if told where."""
    rank = torch.distributed.get_rank()
    model = RunningMean().to(device)  # DistributedDataParallel hands the weights of rank 0 to all
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.Adam(parallel.parameters(), lr=0.01)
    torch.manual_seed(rank)  # each its own data
    steps = torch.arange(1, 21, device=device).view(-1, 1, 1)
    for number in range(100):
        input = torch.rand(20, 32, 1, device=device)
        loss = (parallel(input) - input.cumsum(0) / steps).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0 and number % 33 == 0:
            print(f"step {number:3}: loss {loss.item():.5f}", flush=True)
    if rank == 0 and len(sys.argv) > 1:
        torch.save(model.state_dict(), sys.argv[1])


def main() -> None:
    """Join the group of processes, train, and leave it."""
    on_gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpus else torch.device("cpu")
    torch.distributed.init_process_group("nccl" if on_gpus else "gloo")
    train(device)
    # after the model is gone: with DistributedDataParallel still there, leaving over gloo was seen to hang
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
