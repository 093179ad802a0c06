"""What `Mixer` promises, for every mixer."""

from __future__ import annotations

import copy
import os
import pickle
from dataclasses import replace

import pytest
import torch
from mixer_cases import CONFIGS, SHAPE, WITHOUT_HISTORY, build, close, context, row, span
from torch._dynamo.utils import counters

from surgery import kernels
from surgery.kernels.state import split_state
from surgery.mixers import AttentionShape, Mixer

every_mixer = pytest.mark.parametrize("name", CONFIGS)
# compiling takes seconds: one of each kind, and all mixes of the linear one
every_graph = pytest.mark.parametrize(
    "name", sorted({(config["kind"], str(config.get("mix"))): name for name, config in CONFIGS.items()}.values())
)


@every_mixer
def test_backends_agree(name):
    mixer, call = build(name), context(75)
    found = mixer(call, return_state=True)
    with kernels.backend("reference"):
        assert close(found, mixer(call, return_state=True))


@every_mixer
def test_history_matters(name):
    """A dead state could not fail any test of equality."""
    mixer, call = build(name), context(40)
    with_history, _ = mixer(span(call, 30, 40), mixer(span(call, 0, 30), return_state=True)[1])
    assert not close(with_history, mixer(span(call, 30, 40))[0], 1e-2)
    if name in WITHOUT_HISTORY:
        return
    state = mixer(span(call, 0, 30), return_state=True)[1]
    without = state | {key: torch.zeros_like(x) for key, x in split_state(state)[1].items()}
    assert not close(with_history, mixer(span(call, 30, 40), without)[0], 1e-2)


@every_mixer
def test_token_by_token_is_one_call(name):
    mixer, call = build(name), context(90)
    whole, outputs, state = mixer(call, return_state=True), [], None
    edges = [0, 40, *range(41, 60), 62, 90]
    for start, stop in zip(edges, edges[1:], strict=False):
        y, state = mixer(span(call, start, stop), state, return_state=True)
        outputs.append(y)
    assert close((torch.cat(outputs, 1), state), whole)


@every_mixer
def test_state_is_as_announced(name):
    mixer, call = build(name, torch.float32), context(20, dtype=torch.bfloat16)
    empty = mixer.init_state(2, device="cpu", dtype=torch.bfloat16)
    kept = {key: x.clone() for key, x in empty.items()}
    found = mixer(call, empty, return_state=True)
    for state in (found[1], mixer(call, return_state=True)[1], mixer(span(call, 0, 1), found[1], return_state=True)[1]):
        assert {key: (x.shape, x.dtype) for key, x in state.items()} == {
            key: (x.shape, x.dtype) for key, x in empty.items()
        }
        assert list(state) == list(empty)
        assert all(x.dtype == torch.float32 for x in split_state(state)[1].values())
        allocated = sum(x.untyped_storage().nbytes() for x in state.values())
        assert allocated == mixer.state_bytes(torch.bfloat16, batch=2)
    assert all(torch.equal(empty[key], kept[key]) for key in empty), "the incoming state was written to"
    assert close(found, mixer(call, return_state=True), 1e-6)
    assert found[0].dtype == torch.bfloat16
    assert mixer(call)[1] is None


@every_mixer
def test_padding_and_neighbours_change_nothing(name):
    mixer = build(name)
    call = replace(context(70, batch=3), lengths=torch.tensor([70, 33, 0]))
    state = mixer(replace(context(9, batch=3, seed=1), lengths=torch.tensor([0, 9, 4])), return_state=True)[1]
    y, after = mixer(call, state, return_state=True)
    assert y.isfinite().all()
    for index, length in enumerate((70, 33, 0)):
        before = {key: x[index : index + 1] for key, x in state.items()}
        kept = {key: x[index : index + 1] for key, x in after.items()}
        if not length:
            assert close(kept, before)
            continue
        alone = replace(span(row(call, index), 0, length), lengths=None)
        assert close((y[index : index + 1, :length], kept), mixer(alone, before, return_state=True))


@every_mixer
def test_documents_do_not_meet(name):
    mixer, call = build(name), context(100, batch=1)
    state = mixer(context(11, batch=1, seed=1), return_state=True)[1]
    segments = torch.tensor([[0] * 30 + [1] * 3 + [2] * 67])
    y, after = mixer(replace(call, segments=segments), state, return_state=True)
    pieces = [mixer(span(call, 0, 30), state), mixer(span(call, 30, 33)), mixer(span(call, 33, 100), return_state=True)]
    assert close((y, after), (torch.cat([piece for piece, _ in pieces], 1), pieces[-1][1]))


@every_mixer
def test_gradcheck(name):
    shape = AttentionShape(heads=2, kv_heads=1, head_dim=8, hidden_size=8, layer=0, layers=1)
    mixer = build(name, shape=shape)
    call = context(13, batch=1, shape=shape)
    _, state = mixer(span(call, 0, 9), return_state=True)
    rest = span(call, 9, 13)
    floats = [key for key, x in state.items() if x.is_floating_point()]
    parameters = dict(mixer.named_parameters())
    names = ["q", "k", "v", "raw_q", "raw_k", "hidden_states"]

    def run(*inputs):
        fields = dict(zip(names, inputs, strict=False))
        carried = dict(zip(floats, inputs[6:], strict=False))
        values = dict(zip(parameters, inputs[6 + len(floats) :], strict=True))
        arguments = (replace(rest, **fields), {**state, **carried}, True)
        y, after = torch.func.functional_call(mixer, values, arguments)
        return y, *(x for x in after.values() if x.is_floating_point())

    inputs = [getattr(rest, field) for field in names] + [state[key] for key in floats] + list(parameters.values())
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    # a map that jumps, such as relu, is differentiable almost everywhere
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True, eps=1e-7, atol=1e-4)


@every_mixer
def test_every_parameter_learns(name):
    mixer, call = build(name), context(60).map(lambda x: x.requires_grad_())
    mixer(call)[0].square().sum().backward()
    assert all(getattr(call, field).grad.abs().max() > 0 for field in ("v", *mixer.needs))
    for parameter_name, parameter in mixer.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().max() > 0, parameter_name


@every_graph
def test_one_graph_for_training_and_decoding(name):
    torch._dynamo.reset()
    mixer = build(name, torch.float32)
    call = context(70, batch=1, dtype=torch.float32).map(lambda x: x.requires_grad_())
    # what autograd and mutations become takes several times as long to trace: of one
    backend = "aot_eager" if name == "logmass-head" else "eager"
    compiled = torch.compile(mixer, fullgraph=True, backend=backend)
    y, _ = compiled(call)
    expected, _ = mixer(call)
    assert close(y.detach(), expected.detach(), 1e-5)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    wanted = [call.v, *(p for p in mixer.parameters() if p.requires_grad)]
    found, exact = (torch.autograd.grad((x * weights).sum(), wanted) for x in (y, expected))
    assert all(close(x, z, 1e-4) for x, z in zip(found, exact, strict=True))
    with torch.no_grad():
        state = mixer(call, return_state=True)[1]
        token = context(1, batch=1, dtype=torch.float32, seed=5)
        graphs = []
        for _ in range(3):
            expected = mixer(token, state, True)
            y, state = compiled(token, state, True)
            assert close((y, state), expected, 1e-5)
            graphs.append(counters["stats"]["unique_graphs"])
    assert len(set(graphs)) == 1


@every_mixer
def test_low_precision_inputs(name):
    """bf16 inputs cost at most twice what rounding the result of exact mathematics costs."""
    mixer, call = build(name), context(80, dtype=torch.bfloat16)
    exact, _ = mixer(call.map(torch.Tensor.double))
    found, _ = mixer.float()(call)
    assert found.dtype == torch.bfloat16
    assert (found - exact).norm() <= 2 * (exact.bfloat16() - exact).norm()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mixer(call)[0], found)


@every_mixer
def test_mixed_precision_context(name):
    """Norms under autocast give fp32 queries and keys beside 16-bit values: what is kept must not round the keys."""
    mixer, call = build(name, torch.float32), context(30, dtype=torch.float32)
    call = replace(call, v=call.v.bfloat16())
    whole = mixer(call, return_state=True)
    first, state = mixer(span(call, 0, 20), return_state=True)
    second, state = mixer(span(call, 20, 30), state, return_state=True)
    assert close((torch.cat([first, second], 1), state), whole, 1e-5)


@every_mixer
def test_low_precision_parameters_are_used_in_fp32(name):
    """A model cast as a whole computes what the same rounded parameters give in fp32."""
    mixer, call = build(name, torch.bfloat16), context(40, dtype=torch.float32)
    assert torch.equal(mixer(call)[0], copy.deepcopy(mixer).float()(call)[0])


@every_mixer
def test_softcap_and_own_window_of_the_layer(name):
    call = context(50)
    plain, capped = build(name), build(name, shape=replace(SHAPE, softcap=0.5))
    windowed = plain.window is not None
    assert close(plain(call)[0], capped(call)[0], 1e-4) != windowed
    narrow = build(name, shape=replace(SHAPE, sliding_window=5))
    if not windowed:
        return
    size = 2 if narrow.window.layout == "terraced" else 5
    assert narrow.window == plain.window._replace(size=size)
    window = CONFIGS[name]["window"] | {"size": size}
    assert close(narrow(call)[0], build(name, window=window)(call)[0])
    assert build(name, shape=replace(SHAPE, sliding_window=4096)).window == plain.window


@every_mixer
def test_meta_to_empty_reset(name):
    expected = build(name, torch.float32).to("meta")
    torch.manual_seed(3)
    on_cpu = type(expected)(expected.config, SHAPE)
    with torch.device("meta"):
        mixer = type(expected)(expected.config, SHAPE)
    assert all(x.is_meta for x in mixer.state_dict().values())
    mixer = mixer.to_empty(device="cpu")
    for tensor in mixer.state_dict().values():
        tensor.fill_(float("nan"))
    for module in mixer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert mixer.state_dict().keys() == on_cpu.state_dict().keys()
    assert all(torch.equal(x, on_cpu.state_dict()[key]) for key, x in mixer.state_dict().items())


@every_mixer
def test_new_parameters_are_fp32_whatever_the_default(name):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        mixer = type(build(name))(build(name).config, SHAPE)
    finally:
        torch.set_default_dtype(before)
    assert all(x.dtype == torch.float32 for x in mixer.state_dict().values())


@every_mixer
def test_copies_and_pickles(name):
    mixer, call = build(name), context(20)
    expected, _ = mixer(call)
    for other in (copy.deepcopy(mixer), pickle.loads(pickle.dumps(mixer))):
        assert torch.equal(other(call)[0], expected)


@every_mixer
def test_asks_for_what_it_uses(name):
    mixer, call = build(name), context(20)
    unused = {"raw_q", "raw_k", "hidden_states"} - mixer.needs
    assert close(mixer(replace(call, **dict.fromkeys(unused)))[0], mixer(call)[0])
    for field in mixer.needs:
        changed = replace(call, **{field: getattr(call, field).roll(1, -1)})
        assert not close(mixer(changed)[0], mixer(call)[0], 1e-9)


@every_mixer
def test_a_step_is_a_call_in_place(name):
    mixer, call = build(name), context(24)
    state = mixer(span(call, 0, 20), return_state=True)[1]
    expected, state = state, {key: x.clone() for key, x in state.items()}
    places = {key: x.data_ptr() for key, x in state.items()}
    for t, lengths in ((20, None), (21, [0, 1]), (22, [1, 0]), (23, [1, 1])):
        token = replace(span(call, t, t + 1), lengths=None if lengths is None else torch.tensor(lengths))
        y = mixer.step(token, state)
        wanted, expected = mixer(token, expected, return_state=True)
        real = torch.tensor([1, 1] if lengths is None else lengths)[:, None, None, None]
        assert close((y * real, state), (wanted * real, expected))
        assert not y.requires_grad
    assert {key: x.data_ptr() for key, x in state.items()} == places


@every_mixer
def test_kernels_step_alike(name):
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("on the CPU kernels run in the interpreter")
    mixer, call = build(name, torch.float32), context(12, dtype=torch.float32)
    state = mixer(span(call, 0, 11), return_state=True)[1]
    token = span(call, 11, 12)
    expected = mixer(token, state, return_state=True)
    with kernels.backend("triton"):
        assert close((mixer.step(token, state), state), expected, 1e-5)


def test_a_mixer_without_operations_has_a_step():
    class Sum(Mixer):
        def forward(self, context, state=None, return_state=False):
            total = state["sum"] + context.v.sum(1)
            return total.unsqueeze(1), {"sum": total}

    call, state = context(1), {"sum": torch.ones(2, 2, 8, dtype=torch.float64)}
    kept = state["sum"]
    assert torch.equal(Sum(SHAPE).step(call, state)[:, 0], call.v[:, 0] + 1)
    assert state["sum"] is kept and torch.equal(kept, call.v[:, 0] + 1)
