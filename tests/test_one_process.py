"""What several ranks train together is refused in one sentence, by two processes that are real."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import gradagree_opt as ga
from gradagree_opt.one_process import check_one_process

PROGRAM = """
import sys, warnings
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import gradagree_opt as ga
from torch.func import functional_call
from torch.utils._pytree import tree_map

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(0)
module = nn.Linear(2, 1)
ddp = DistributedDataParallel(nn.Linear(2, 1))
x = torch.rand(3, 4, 2)
tasks, agree = {"support": x, "query": x}, ga.GradientAgreement()

def loss_of(params, batch):
    return functional_call(module, params, (batch,)).square().mean()

def optimized(network):
    optimizer = ga.TaskOptimizer(torch.optim.SGD(network.parameters(), lr=0.1), agree)
    optimizer.step([network(task).square().mean() for task in x])

def torchopt_step():
    from gradagree_opt.adapters.torchopt import weighted_loss
    weighted_loss([module(task).square().mean() for task in x], module, agree)

def learn2learn_step():
    import learn2learn as l2l
    from gradagree_opt.adapters.learn2learn import meta_step
    loss = lambda learner, batch: learner(batch).square().mean()
    meta_step(l2l.algorithms.MAML(module, lr=0.1), loss, tasks, agree)

def sharded(call):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    mesh = init_device_mesh("cpu", (2,))
    call({n: distribute_tensor(p, mesh, [Shard(0)]) for n, p in params.items()})

def fully_sharded():
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:  # PyTorch 2.5
        from torch.distributed._composable.fsdp import fully_shard
    ga.TaskBatch(fully_shard(nn.Linear(2, 2)), agree)

params = {n: p.detach() for n, p in module.named_parameters()}
inner = ga.InnerSGD(0.1, 1)
stack = {n: torch.stack([p, 2 * p]) for n, p in params.items()}
CALLS = {
    "TaskBatch of DDP": lambda: ga.TaskBatch(ddp, agree),
    "TaskBatch of what DDP wraps": lambda: ga.TaskBatch(ddp.module, agree),
    "TaskOptimizer": lambda: optimized(ddp),
    "torchopt": torchopt_step,
    "aggregate_gradients": lambda: ga.aggregate_gradients(loss_of, params, x, agree),
    "MAML": lambda: ga.MAML(loss_of, inner).step(params, tasks, agree),
    "MetaSGD": lambda: ga.MetaSGD(loss_of, 1).step({"params": params, "lr": params}, tasks, agree),
    "Reptile": lambda: ga.Reptile(loss_of, inner).step(params, tasks, agree),
    "learn2learn": learn2learn_step,
    "FSDP2": fully_sharded,
    "DTensor": lambda: sharded(lambda params: ga.task_gradients(loss_of, params, x)),
    "DTensor, adapted": lambda: sharded(lambda params: ga.MAML(loss_of, inner).adapt(params, x[0])),
    "gathered": lambda: agree.aggregate(stack),
    "of one rank": lambda: ga.task_gradients(loss_of, params, x),
}
for name, call in CALLS.items():
    before = [p.clone() for p in [*module.parameters(), *ddp.parameters()]]
    try:
        call()
        said = "nothing"
    except ValueError as error:
        said = str(error).replace(chr(10), "NEWLINE")
    after = [*module.parameters(), *ddp.parameters()]
    same = all(map(torch.equal, before, after)) and all(p.grad is None for p in after)
    print(f"{name}|{same}|{said}", flush=True)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[str, str]]]:
    """By rank and call: whether all is as it was, and what it said."""
    store: Path = tmp_path_factory.mktemp("store") / "store"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(rank), str(store)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    answers = []
    for rank in ranks:
        out, err = rank.communicate(timeout=120)
        assert rank.returncode == 0, err
        lines = [line.split("|", 2) for line in out.splitlines() if line.count("|") >= 2]
        answers.append({name: (same, words) for name, same, words in lines})
    return answers


GROUP = "expected one process, found a process group of 2 ranks, whose replicas would drift apart; "
CALLS = {
    "TaskBatch of DDP": "expected a module that one process trains, found DistributedDataParallel",
    "TaskBatch of what DDP wraps": GROUP,
    "TaskOptimizer": GROUP,
    "torchopt": GROUP,
    "aggregate_gradients": GROUP,
    "MAML": GROUP,
    "MetaSGD": GROUP,
    "Reptile": GROUP,
    "learn2learn": GROUP,
    "FSDP2": "expected a module that one process trains, found FSDPLinear",
    "DTensor": "expected parameters that one process holds, found DTensor",
    "DTensor, adapted": "expected parameters that one process holds, found DTensor",
    "gathered": "nothing",
    "of one rank": "nothing",
}


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
def test_over_ranks_it_is_refused_in_one_sentence_and_nothing_has_changed(said, call):
    for rank in said:
        same, words = rank[call]
        assert words.startswith(CALLS[call])
        assert "NEWLINE" not in words
        assert same == "True"


def test_deepspeed_parameters_are_refused():
    parameter = nn.Parameter(torch.zeros(0))
    parameter.ds_id = 3
    with pytest.raises(ValueError, match="found Parameter, a part of which lies on every rank"):
        check_one_process([parameter])
    with pytest.raises(ValueError, match="a part of which lies on every rank"):
        ga.TaskBatch([parameter], ga.Mean())
