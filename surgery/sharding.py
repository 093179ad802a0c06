"""What is different when FSDP2 (`torch.distributed.fsdp.fully_shard`) shares out the parameters of a converted model.

FSDP gathers a module's parameters for its forward and, by hooks on its inputs and outputs, once more for its backward,
which also adds the gradients of all processes up. The losses of transfer mode pass no module's output: none of these
hooks would run, and the weights that the backward reads are freed. So the gradients of such a loss are taken at once,
while the weights are there, and handed on when the backward comes.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import SurgeryError

if TYPE_CHECKING:
    from torch.distributed import DeviceMesh
    from transformers import PreTrainedModel

Shards = dict[str, nn.Parameter]
"""Name -> parameter while it is sharded, which is another object than the gathered one."""


def units(module: nn.Module) -> dict[str, Any]:
    """The modules that `fully_shard` was called on, by path."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:  # nobody can have sharded anything without importing it
        return {}
    return {path: each for path, each in module.named_modules() if isinstance(each, fsdp.FSDPModule)}


def shard(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Share a model's layers out over the devices of `mesh`, each gathered only while it runs.

    Embeddings and the LM head stay whole on every device: they are often one tensor, and distillation reads the head
    apart from the model. Does nothing to a model that is shared out already.

    Raises:
        SurgeryError: the model does not say what its layers are.
    """
    from torch.distributed.fsdp import fully_shard

    if units(model):
        return
    kinds = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in kinds]
    if not layers:
        raise SurgeryError(
            f"{type(model).__name__} does not say which of its modules are layers (_no_split_modules), so it cannot be "
            "shared out: use DDP"
        )
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model.get_decoder(), mesh=mesh, ignored_params=set(model.get_input_embeddings().parameters()))


def unsharded(module: nn.Module) -> list[str]:
    """Names of the parameters that learn and belong to no sharded module, beside others that do.

    Nothing adds their gradients up over the processes.
    """
    found = units(module)
    for unit in found.values():
        unit.reshard()  # what is gathered looks like what is not sharded
    named = dict(module.named_parameters()) if found else {}
    return [name for name, p in named.items() if p.requires_grad and not _is_shard(p)]


def shards(model: nn.Module, modules: Mapping[int, nn.Module]) -> dict[int, Shards]:
    """The parameters of each of these modules inside `model`, not gathered; empty if the model is not sharded."""
    found = units(model)
    for unit in found.values():
        unit.reshard()
    return {key: dict(module.named_parameters()) for key, module in modules.items()} if found else {}


def differentiated(loss: Tensor, module: nn.Module, own: Shards) -> Tensor:
    """The same loss, its graph replaced by its gradients for the parameters `own` of `module`, which are gathered now.

    In the backward they are averaged over the processes and go to the shards. Other parameters get none.
    """
    named = {name: p for name, p in module.named_parameters() if name in own and p.requires_grad}
    if not (loss.requires_grad and named):
        return loss
    gradients = torch.autograd.grad(loss, list(named.values()), materialize_grads=True)
    return _Differentiated.apply(loss.detach(), gradients, *(own[name] for name in named))


class _Differentiated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: tuple[Tensor, ...], *parameters: Tensor) -> Tensor:
        ctx.gradients, ctx.parameters = gradients, parameters
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return None, None, *_averaged([grad * gradient for gradient in ctx.gradients], ctx.parameters)


def whole(tensor: Any) -> Tensor:
    """A tensor, gathered if it is sharded; all processes must ask for it."""
    return tensor.full_tensor() if _is_shard(tensor) else tensor


def placed(tensor: Tensor, like: Any) -> Tensor:
    """This process's part of a whole tensor, on the device of `like` and sharded as that is."""
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(like.device)
    return distribute_tensor(tensor, like.device_mesh, like.placements) if _is_shard(like) else tensor


def _averaged(gradients: list[Tensor], parameters: tuple[Any, ...]) -> list[Any]:
    """This process's parts of the means over the processes, laid out like the parameters, by one sum of all."""
    from torch.distributed import all_reduce
    from torch.distributed.tensor import distribute_tensor

    mesh = parameters[0].device_mesh
    sums = torch.cat([gradient.flatten().float() for gradient in gradients]) / mesh.size()  # gloo cannot average
    for dim in range(mesh.ndim):
        all_reduce(sums, group=mesh.get_group(dim))
    parts = sums.split([gradient.numel() for gradient in gradients])
    return [
        # all have it, so nothing is sent
        distribute_tensor(part.view(p.shape).to(p.dtype), mesh, p.placements, src_data_rank=None)
        for part, p in zip(parts, parameters, strict=True)
    ]


def _is_shard(tensor: Tensor) -> bool:
    return hasattr(tensor, "placements")
