"""Two processes on gloo save and load FSDP2 shards; run by test_checkpoints.py as a program."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sana.models.checkpoint import CheckpointError
from sana.training.checkpoints import Checkpoints


def shards(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}


def local(state: dict) -> list[torch.Tensor]:
    moments = [value for entry in state["optimizer"]["state"].values() for value in entry.values()]
    return [t.to_local().clone() if hasattr(t, "to_local") else t.clone() for t in [*state["model"].values(), *moments]]


def run(rank: int, root: Path) -> dict:
    dist.init_process_group("gloo", init_method=f"file://{root}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 3))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    for _ in range(2):
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
    state = shards(model, optimizer)
    checkpoints = Checkpoints(root / "run", rank=rank, world_size=2, timeout_s=60, asynchronous=True)
    checkpoints.save(7, shared={"step": 7}, per_rank={"rank": rank}, sharded=state)
    checkpoints.wait()
    dist.barrier()  # rank 0 has named the folder
    whole = {name: tensor.full_tensor() for name, tensor in state["model"].items()}
    if rank == 0:
        torch.save(whole, root / "expected.pt")
    before = local(state)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    path = checkpoints.latest()
    target = shards(model, optimizer)
    checkpoints.load_sharded(path, target)
    loaded = checkpoints.load(path)
    result = {
        "equal": all(torch.equal(a, b) for a, b in zip(before, local(target), strict=True)),
        "per_rank": loaded.per_rank, "all_ranks": loaded.all_ranks, "files": sorted(p.name for p in path.rglob("*")),
    }  # fmt: skip
    dist.barrier()
    if rank == 0:  # each rank checks a part of the files: both must hear of the damage
        broken = path / "sharded" / "__1_0.distcp"
        content = bytearray(broken.read_bytes())
        content[len(content) // 2] ^= 1
        (root / "intact").write_bytes(broken.read_bytes())
        broken.write_bytes(bytes(content))
    dist.barrier()
    try:
        checkpoints.load_sharded(path, target)
    except CheckpointError as error:
        result["damage"] = str(error)
    dist.barrier()
    if rank == 0:
        broken.write_bytes((root / "intact").read_bytes())
    dist.destroy_process_group()
    return result


def main() -> None:
    root = Path(sys.argv[1])
    children = []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            (root / f"result_{rank}.json").write_text(json.dumps(run(rank, root)))
            os._exit(0)
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    sys.exit(max(map(abs, codes)))


if __name__ == "__main__":
    main()
