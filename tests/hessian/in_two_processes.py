"""Run by torchrun, from the folder of the tests: writes what a process finds into the folder it is given."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from hessian_cases import ragged

from vitfast.hessian import HessianOperator

if __name__ == "__main__":
    dist.init_process_group("gloo")
    model, _, _, batches = ragged()
    operator = HessianOperator(model, F.cross_entropy, batches, weight_decay=0.1)
    found = {"dense": operator.to_dense(), "gradient": operator.gradient(), "loss": operator.loss()}
    torch.save(found, Path(sys.argv[1]) / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()
