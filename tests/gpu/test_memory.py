"""Distillation through the LM head of a large vocabulary holds no logits, and gives what logits would give."""

from __future__ import annotations

from collections.abc import Callable

import lightning
import pytest
import torch
from gpu_cases import check
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig

import surgery
from surgery.callbacks import LogitDistillation
from surgery.training.distillation import distillation_loss
from surgery.training.head import Head

pytestmark = pytest.mark.gpu

TOKENS, WORDS, WIDTH, GIB = 8192, 128 * 1024, 2048, 2**30


def ours(student: Tensor, teacher: Tensor, weight: Tensor) -> tuple[Tensor]:
    return (distillation_loss(student, teacher, Head(weight)),)


def dense(student: Tensor, teacher: Tensor, weight: Tensor) -> tuple[Tensor]:
    """KL(teacher ‖ student) per token, from all logits at once."""
    wide = torch.float32 if weight.dtype == torch.bfloat16 else weight.dtype
    log_q = functional.linear(student, weight).to(wide).log_softmax(-1)
    log_p = functional.linear(teacher.detach(), weight.detach()).to(wide).log_softmax(-1)
    return (functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True),)


def draw(tokens: int, words: int, width: int, dtype: torch.dtype, device: str = "cuda") -> dict[str, Tensor]:
    student, noise, weight = (torch.randn(n, width, device=device) for n in (tokens, tokens, words))
    found = {"student": student, "teacher": student + 0.3 * noise, "weight": weight * width**-0.5}
    return {name: x.to(dtype) for name, x in found.items()}


def extra(run: Callable[[], object]) -> float:
    """GiB at the worst moment of `run` beyond what was held before, and what it returns is held."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    held = run()
    torch.cuda.synchronize()
    found = (torch.cuda.max_memory_allocated() - before) / GIB
    del held
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_logits(dtype):
    check(ours, dense, draw(1500, 9000, 256, dtype), dtype)  # more than a block of each


@pytest.mark.parametrize("learns", [False, True], ids=["head frozen", "head learns"])
def test_no_logits_are_held(learns):
    tensors = draw(TOKENS, WORDS, WIDTH, torch.bfloat16)
    tensors["student"].requires_grad_(True)
    tensors["weight"].requires_grad_(learns)
    wanted = [x for x in tensors.values() if x.requires_grad]
    few, many = (extra(lambda f=f: torch.autograd.grad(f(**tensors)[0], wanted)) for f in (ours, dense))
    assert few < 1 and many > 8, f"{few:.2f} GiB, and with all logits {many:.2f} GiB"


class Module(lightning.LightningModule):
    """Its own loss needs no logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.net = network

    def training_step(self, batch, index):
        return self.net.get_decoder()(batch)[0].float().square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def test_logit_distillation_holds_none():
    """What the callback adds to a step of a model of one layer, teacher included."""
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=256, num_hidden_layers=1, num_attention_heads=16
    )
    with torch.device("cuda"):
        network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    surgery.apply(network, "llama/logmass")
    network.get_output_embeddings().requires_grad_(False)
    batches = torch.randint(WORDS, (3, 1, TOKENS))

    def step(callbacks: list) -> float:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = lightning.Trainer(
            max_steps=3, callbacks=callbacks, accelerator="gpu", devices=1, enable_model_summary=False, **quiet
        )
        loader = torch.utils.data.DataLoader(batches, batch_size=None)
        return extra(lambda: trainer.fit(Module(network.train()), loader))

    step([])  # gradients and workspaces are there from now on
    alone = step([])
    added = step([LogitDistillation(replace=True)]) - alone
    assert added < 1, f"{added:.2f} GiB on top of {alone:.2f} GiB"
