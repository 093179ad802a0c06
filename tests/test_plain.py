"""Models of plain PyTorch, alone and in a LightningModule, do everything that Hugging Face models do."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import lightning
import pytest
import torch
import zoo
from peft import LoraConfig, get_peft_model
from plain_models import GPT, VOCAB, CausalSelfAttention, Encoder, RotaryAttention, SharingAttention, tokens
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

import surgery
from surgery.callbacks import AttentionTransfer, LogitDistillation, LoRAUnfreezing
from surgery.patchers.interface import converted_layers

surgery.patchers.register(CausalSelfAttention, heads="n_head", qkv="c_attn", o="c_proj")
surgery.patchers.register(
    RotaryAttention,
    heads=lambda module: module.settings["heads"],
    kv_heads=2,
    **{role: role for role in "qkvo"},
)

IDS = tokens(2, 30)
EXACT = surgery.load_recipe("control/window-lora").override({"mixer.window.size": 64})
"""A window longer than any row here: softmax by another name."""
MODELS = {
    "fused": GPT,
    "repeated": lambda: GPT(RotaryAttention),
    "shared": lambda: GPT(SharingAttention),
    "encoder": Encoder,
    "encoder, tokens first": lambda: Encoder(batch_first=False),
}


@pytest.fixture(params=MODELS)
def model(request) -> nn.Module:
    return MODELS[request.param]().eval()


def convert(model: nn.Module, recipe: str = "llama/logmass", **kwargs: Any) -> nn.Module:
    return zoo.convert(model, recipe, window=8, **kwargs)


def packed(documents: list[int]) -> Tensor:
    """[T, T] bool, causal within each document."""
    document = torch.arange(len(documents)).repeat_interleave(torch.tensor(documents))
    return (document[:, None] == document).tril()


@torch.no_grad()
def logits(model: nn.Module, *args: Any) -> Tensor:
    return model(*(args or (IDS,)))


def refusal(run: Any, *args: Any) -> str:
    with pytest.raises(surgery.SurgeryError) as caught:
        run(*args)
    return str(caught.value)


def test_a_window_as_long_as_the_row_is_softmax(model):
    before, names = logits(model), list(model.state_dict())
    shared = isinstance(model, GPT) and not isinstance(model.blocks[0], CausalSelfAttention)
    surgery.apply(model, EXACT)
    assert [each.surgery_shape.kv_heads for each in converted_layers(model).values()] == [2 if shared else 4] * 2
    assert zoo.relative(logits(model), before) < 1e-5
    assert list(model.state_dict()) == names
    surgery.revert(model)
    before = {name: p.grad for name, p in _graded(model).items()}
    after = {name: p.grad for name, p in _graded(surgery.apply(model, EXACT)).items()}
    assert all(zoo.relative(after[name], before[name]) < 1e-4 for name in before)


def _graded(model: nn.Module) -> dict[str, nn.Parameter]:
    model.zero_grad()
    functional.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten()).backward()
    return {name: p for name, p in model.named_parameters() if p.grad.abs().max() > 1e-6}


@pytest.mark.parametrize("recipe", ["llama/logmass", "llama/liger-gla", "llama/lizard", "llama/gated-deltanet"])
def test_teacher_transfer_and_revert_are_exact(model, recipe):
    before, names = logits(model), list(model.state_dict())
    classes = [type(module) for module in model.modules()]
    expected = surgery.inspect(model, recipe)
    convert(model, recipe)
    assert [layer.path for layer in model.surgery.report.layers] == [layer.path for layer in expected.layers]
    assert model.surgery.report.new_parameters == expected.new_parameters
    student = logits(model)
    assert zoo.relative(student, before) > 1e-3
    added = [name for name in model.state_dict() if name not in names]
    assert [name for name in model.state_dict() if name in names] == names and all(".mixer." in name for name in added)
    with surgery.mode(model, "teacher"):
        assert torch.equal(logits(model), before)
    with surgery.mode(model, "transfer") as switch:
        # with gradients torch takes another path through its own layers
        assert zoo.relative(model(IDS), before) < (1e-5 if isinstance(model, Encoder) else 1e-30)
        assert sorted(switch.losses) == [0, 1]
        loss = sum(switch.losses.values())
        if loss.requires_grad:
            loss.backward()
    assert all(".mixer." in name for name, p in model.named_parameters() if p.grad is not None)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), student)
        assert torch.equal(logits(surgery.revert(other)), before)
    surgery.revert(model)
    assert torch.equal(logits(model), before)
    assert [type(module) for module in model.modules()] == classes and list(model.state_dict()) == names
    assert not any(key.startswith("surgery") for module in model.modules() for key in module.__dict__)


def test_some_layers_and_what_was_trained(model):
    before = logits(model)
    convert(model, layers=[-1])
    assert list(converted_layers(model)) == [model.surgery.report.converted[0].path]
    weights = {name: x + 0.1 if ".mixer." in name else x for name, x in model.state_dict().items()}
    model.load_state_dict(weights)
    assert torch.equal(logits(surgery.revert(model)), before)
    convert(model)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if ".mixer." not in name).add_(1)
    with pytest.raises(surgery.SurgeryError, match="cannot revert: 1 base weights"):
        surgery.revert(model)


def test_causality(model):
    convert(model, "llama/liger-gla")
    changed = IDS.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % VOCAB
    assert zoo.relative(logits(model, changed)[:, :20], logits(model)[:, :20]) < 1e-6


def test_masks_and_modes_survive_compilation():
    model = convert(Encoder().eval(), "llama/liger-gla")
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(logits(compiled), logits(model))
    with surgery.mode(model, "teacher"):
        assert torch.equal(logits(compiled), logits(model))
    assert "is not causal" in refusal(lambda: compiled(IDS, mask=torch.zeros(30, 30)))


def test_own_attention_compiles_in_one_graph():
    model = convert(GPT(layers=1), "llama/liger-gla")
    assert torch.equal(logits(torch.compile(model, backend="eager", fullgraph=True)), logits(model))


@pytest.mark.parametrize("kind", ["bool", "float", "finite"])
@pytest.mark.parametrize("name", ["fused", "shared"])
def test_masks_tell_padding_and_documents(name, kind):
    def as_kind(mask: Tensor) -> Tensor:
        worst = float("-inf") if kind == "float" else torch.finfo(torch.float32).min
        return mask if kind == "bool" else torch.zeros(mask.shape).masked_fill(~mask, worst)

    model = convert(MODELS[name](), "llama/lizard")
    plain = logits(model)
    assert zoo.relative(logits(model, IDS, as_kind(packed([30]))), plain) < 1e-6
    split = logits(model, IDS, as_kind(packed([12, 18])))
    assert zoo.relative(split[:, :12], plain[:, :12]) < 1e-5 and zoo.relative(split[:, 12:], plain[:, 12:]) > 1e-3
    first, second = (logits(model, IDS, as_kind(packed([12, 18]) if row else packed([30])))[row] for row in (0, 1))
    mixed = logits(model, IDS, as_kind(torch.stack([packed([30]), packed([12, 18])])[:, None]))
    assert zoo.relative(mixed, torch.stack([first, second])) < 1e-5
    blocked = packed([30]).expand(2, 1, 30, 30).clone()
    blocked[0, :, :, 20:] = False
    if kind == "finite":
        other = IDS.clone()
        other[0, 20:] = 0
        right, changed = logits(model, IDS, as_kind(blocked)), logits(model, other, as_kind(blocked))
        assert zoo.relative(changed[:, :20], right[:, :20]) < 1e-6
        assert zoo.relative(right[1], plain[1]) < 1e-5


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_multihead_attention_honours_padding(batch_first, side):
    model = convert(Encoder(batch_first).eval(), "llama/lizard")
    ids, real = zoo.pad([IDS[:1], IDS[1:, :18]], side)
    output = logits(model, ids, real == 0)
    rows = slice(-18, None) if side == "left" else slice(0, 18)
    assert zoo.relative(output[1, rows], logits(model, IDS[1:, :18])[0]) < 1e-5
    assert zoo.relative(output[0], logits(model, IDS[:1])[0]) < 1e-5


class Task(lightning.LightningModule):
    """A user's own around any of these models."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return functional.cross_entropy(self.net(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=5e-2)


class Whole(GPT, lightning.LightningModule):
    """The model is the LightningModule."""

    training_step, configure_optimizers = Task.training_step, Task.configure_optimizers
    net = property(lambda self: self)


def fit(task: lightning.LightningModule, callbacks: list, steps: int) -> None:
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = lightning.Trainer(max_steps=steps, accelerator="cpu", callbacks=callbacks, **quiet)
    trainer.fit(task, DataLoader([IDS] * steps, batch_size=None))


def distance(model: nn.Module) -> float:
    with torch.no_grad(), surgery.mode(model, "transfer") as switch:
        model(IDS)
        return float(sum(switch.losses.values()))


@pytest.mark.parametrize("build", [lambda: Task(GPT()), lambda: Task(Encoder()), Whole])
def test_transfer_in_a_lightning_module(build):
    task = build()
    assert convert(task) is task
    assert task.surgery is task.net.surgery
    base = {name: p.clone() for name, p in task.named_parameters() if ".mixer." not in name}
    before = distance(task.net)
    fit(task, [AttentionTransfer(stop=30)], 30)
    assert distance(task.net) < 0.9 * before
    assert all(torch.equal(p, base[name]) for name, p in task.named_parameters() if ".mixer." not in name)
    surgery.revert(task)
    assert "surgery" not in task.__dict__ and "surgery" not in task.net.__dict__


@pytest.mark.parametrize("callback", [LogitDistillation(), LoRAUnfreezing(merge=True)])
def test_callbacks_that_need_logits_refuse(callback):
    with pytest.raises(surgery.SurgeryError, match="needs the logits of a Hugging Face model, and GPT is plain"):
        fit(Task(convert(GPT())), [callback], 1)


def test_a_module_is_found_inside_of_wrappers():
    task = Task(torch.compile(GPT(), backend="eager"))
    convert(task)
    original = task.net._orig_mod
    assert task.surgery is original.surgery
    with surgery.mode(nn.Sequential(task), "teacher") as switch:
        assert switch is original.surgery.switch
    two = nn.ModuleList([convert(GPT()), convert(GPT())])
    with pytest.raises(surgery.SurgeryError, match="does not hold one whole converted model"):
        surgery.revert(two)
    assert "is already wrapped by DataParallel" in refusal(convert, nn.DataParallel(GPT()))


def test_distributed_data_parallel(tmp_path):
    model = convert(GPT(), "llama/logmass")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        for name in ("student", "transfer"):
            model.zero_grad()
            with surgery.mode(wrapped, name) as switch:
                output = wrapped(IDS)
                (output.square().mean() if name == "student" else sum(switch.losses.values())).backward()
        assert all(p.grad is not None for p_name, p in model.named_parameters() if ".mixer." in p_name)
    finally:
        torch.distributed.destroy_process_group()


def test_lora():
    task = Task(convert(GPT()))
    with surgery.mode(task, "teacher"):
        before = logits(task.net)
    fit(task, [LoRAUnfreezing(rank=2)], 3)
    assert {path.split(".")[2] for path, _ in task.net.named_parameters() if "lora_A" in path} == {"c_attn", "c_proj"}
    with surgery.mode(task, "teacher"):
        assert torch.equal(logits(task.net), before)
    tuned = get_peft_model(GPT(), LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False))
    assert convert(tuned, "llama/lizard") is tuned  # reads what the adapted projection puts out
    assert logits(tuned).isfinite().all() and tuned.surgery.layers == (0, 1)
    with surgery.mode(tuned, "teacher"):
        assert torch.equal(logits(tuned), logits(GPT()))


def test_autocast():
    model = convert(GPT())
    full = logits(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert zoo.relative(logits(model).float(), full) < 0.1


# refusals


class Unregistered(CausalSelfAttention):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.num_heads, self.query, self.key = 2, nn.Linear(8, 8), nn.Linear(8, 8)


class Twice(CausalSelfAttention):
    def attend(self, q, k, v, mask):
        return super().attend(q, k, v, mask) - super().attend(q, k, v, mask)


class Cached(CausalSelfAttention):
    def attend(self, q, k, v, mask):
        return super().attend(q, torch.cat([k, k], 2), v, mask)


class Byhand(CausalSelfAttention):
    def attend(self, q, k, v, mask):
        return (q @ k.mT).softmax(-1) @ v


class Bidirectional(CausalSelfAttention):
    def attend(self, q, k, v, mask):
        return functional.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (Twice, "calls scaled_dot_product_attention twice in one forward"),
        (Cached, "attends to 60 keys by 30 queries, from a cache of its own"),
        (Byhand, "ran without torch.nn.functional.scaled_dot_product_attention"),
        (Bidirectional, "attends in both directions"),
    ],
)
def test_what_a_forward_must_not_do(attention, message):
    model = convert(GPT(attention))
    found = refusal(model, IDS)
    assert found.startswith(f"blocks.0 ({attention.__name__}) {message}") and "\n" not in found


def test_refused_masks_and_dropout():
    model = convert(GPT())
    causal = packed([30])
    for mask in (torch.ones_like(causal), causal & ~causal.tril(-5), causal.expand(4, 30, 30).clone().triu(-1)):
        assert "blocks.0 (CausalSelfAttention) was given a mask that is not causal" in refusal(model, IDS, mask)
    assert "adds a bias to its scores" in refusal(model, IDS, -causal.cumsum(-1).float().tril())
    differing = torch.stack([packed([30]), packed([10, 20])] * 2)
    assert "in all heads" in refusal(model, IDS, differing)
    model.blocks[1].dropout = 0.1
    assert logits(model.eval()).isfinite().all()
    assert refusal(model.train(), IDS) == (
        "blocks.1 (CausalSelfAttention) drops attention weights (dropout_p=0.1), which mixers do not have: set its "
        "dropout to 0, or call eval()"
    )


def test_refused_multihead_attention():
    model = convert(Encoder().train())
    assert "layers.layers.0.self_attn (MultiheadAttention) attends in both directions" in refusal(
        lambda: model(IDS, mask=None)
    )
    assert "is not causal" in refusal(lambda: model(IDS, mask=torch.zeros(30, 30)))
    alone = surgery.apply(nn.MultiheadAttention(8, 2, batch_first=True), EXACT)
    x, mask = torch.randn(1, 5, 8), ~packed([5])
    assert "call it with need_weights=False" in refusal(lambda: alone(x, x, x, attn_mask=mask))
    assert "only self-attention" in refusal(lambda: alone(x, x + 1, x, attn_mask=mask, need_weights=False))
    y, weights = alone(x, x, x, attn_mask=mask, need_weights=False)
    assert weights is None
    with surgery.mode(alone, "teacher"):
        assert zoo.relative(y, alone(x, x, x, attn_mask=mask, need_weights=False)[0]) < 1e-5
    assert "of another width" in refusal(surgery.apply, nn.MultiheadAttention(8, 2, kdim=4), EXACT)
    assert "adds a key of its own" in refusal(surgery.apply, nn.MultiheadAttention(8, 2, add_bias_kv=True), EXACT)


def test_cross_attention_stays():
    layer = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    x, memory, mask = torch.randn(1, 5, 8), torch.randn(1, 7, 8), nn.Transformer.generate_square_subsequent_mask(5)
    before = layer(x, memory, tgt_mask=mask)
    surgery.apply(layer, EXACT)
    assert list(converted_layers(layer)) == ["self_attn"]
    assert zoo.relative(layer(x, memory, tgt_mask=mask), before) < 1e-5


def test_what_to_register():
    found = refusal(surgery.apply, nn.Sequential(nn.LayerNorm(8), _Unknown()), EXACT)
    assert found.endswith(
        'surgery.patchers.register(\n    _Unknown,\n    heads="num_heads",\n    qkv="fused",\n    o="out",\n)'
    )
    namespace = {"surgery": surgery, "_Unknown": _Unknown}
    exec(found[found.index("surgery.patchers") :], namespace)
    assert surgery.inspect(nn.Sequential(_Unknown()), EXACT).layers[0].path == "0"
    with pytest.raises(surgery.SurgeryError, match="takes a class of torch modules"):
        surgery.patchers.register(_Unknown(), heads=2)
    surgery.patchers.register(_Unknown, heads="n_head", head_dim=4)
    assert "registered with heads='n_head', but" in refusal(surgery.apply, _Unknown(), EXACT)
    surgery.patchers.register(_Unknown, heads=2)
    assert "add head_dim= to surgery.patchers.register(_Unknown" in refusal(surgery.apply, _Unknown(), EXACT)
    surgery.patchers.register(_Unknown, heads=2, head_dim=4)
    assert "add qkv=, or q= and k=" in refusal(surgery.apply, _Unknown(), "llama/liger-gla")
    surgery.patchers.register(_Unknown, heads=3, kv_heads=2, head_dim=4)
    assert "which 2 do not divide" in refusal(surgery.apply, _Unknown(), EXACT)


class _Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.fused, self.out = 2, nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.fused(x).unflatten(-1, (3, 2, 4)).transpose(1, 3).unbind(2)
        return self.out(functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def test_wrong_sizes_and_twice():
    surgery.patchers.register(Twice, heads=2, head_dim=8)
    assert "was registered with 2 heads of 8, but has queries of shape (2, 4, 30, 8)" in refusal(
        surgery.apply(GPT(Twice), EXACT), IDS
    )
    surgery.patchers.register(Cached, heads=4, kv_heads=2, qkv="c_attn")
    assert "register kv_heads=4" in refusal(surgery.apply(GPT(_Grouped), EXACT), IDS)
    model = convert(GPT())
    assert "already converted" in refusal(surgery.apply, model, EXACT)


class _Grouped(Cached):
    attend = CausalSelfAttention.attend
