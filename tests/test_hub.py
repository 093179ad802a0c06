"""Save, load, reload in a fresh process; nothing half-written is taken for whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import zoo
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

import surgery

FRESH = """
import sys, torch
{imports}
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **{kwargs})
{after}
ids = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save(model(ids, use_cache=False).logits, sys.argv[3])
"""


def fresh_process(
    folder: Path, ids: torch.Tensor, imports: str = "import surgery", after: str = "", **kwargs
) -> torch.Tensor:
    """Logits of a checkpoint as another process computes them."""
    torch.save(ids, folder.parent / "ids.pt")
    script = FRESH.format(imports=imports, kwargs=repr(kwargs), after=after)
    arguments = [str(folder), str(folder.parent / "ids.pt"), str(folder.parent / "logits.pt")]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return torch.load(folder.parent / "logits.pt")


def scrambled(family: str, recipe: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A converted model whose mixers are not at their initial values."""
    model = zoo.convert(zoo.build(family, dtype=dtype), recipe, window=8)
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mixer." in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise))
    return model


@torch.no_grad()
def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, use_cache=False).logits


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_round_trip_is_exact(family, tmp_path):
    ids = zoo.tokens(2, 30)
    for recipe in ("llama/lolcats", "llama/logmass"):
        model = scrambled(family, recipe)
        model.save_pretrained(tmp_path / recipe[6:])
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / recipe[6:])
        assert type(loaded) is type(model) and loaded.surgery.recipe == model.surgery.recipe
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert torch.equal(logits(loaded, ids), logits(model, ids))
        with surgery.mode(loaded, "teacher"), surgery.mode(model, "teacher"):
            assert torch.equal(logits(loaded, ids), logits(model, ids))
        surgery.revert(loaded)
        assert torch.equal(logits(loaded, ids), logits(zoo.build(family), ids))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_fresh_process_sharded_and_mapped(family, tmp_path):
    model, ids = scrambled(family, "llama/logmass"), zoo.tokens(2, 30)
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    expected = logits(model, ids)
    assert torch.equal(fresh_process(tmp_path / "model", ids), expected)
    names = ["embed_tokens", "norm", "rotary_emb", *(f"layers.{i}" for i in range(3))]
    devices = {"lm_head": "cpu", **{f"model.{name}": "disk" if name == "layers.1" else "cpu" for name in names}}
    offload = str(tmp_path / "offload")
    assert torch.equal(fresh_process(tmp_path / "model", ids, device_map=devices, offload_folder=offload), expected)


def test_fresh_process_bf16(tmp_path):
    model, ids = scrambled("llama", "llama/lolcats", torch.bfloat16), zoo.tokens(2, 30)
    assert {p.dtype for name, p in model.named_parameters() if ".mixer." in name} == {torch.float32}
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(fresh_process(tmp_path / "model", ids), logits(model, ids))
    for attention in zoo.attentions(model):
        attention.mixer.to(torch.bfloat16)
    model.save_pretrained(tmp_path / "all")
    assert torch.equal(fresh_process(tmp_path / "all", ids), logits(model, ids))


def test_fresh_process_with_lora_adapter(tmp_path):
    base, ids = scrambled("llama", "llama/lolcats"), zoo.tokens(2, 30)
    base.save_pretrained(tmp_path / "model")
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model, ids)
    attach = f"from peft import PeftModel; model = PeftModel.from_pretrained(model, {str(tmp_path / 'adapter')!r})"
    assert torch.equal(fresh_process(tmp_path / "model", ids, after=attach), expected)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(fresh_process(tmp_path / "merged", ids), logits(merged, ids))
    assert zoo.relative(logits(merged, ids), expected) <= 1e-5
    reloaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tmp_path / "adapter")
    assert torch.equal(logits(reloaded, ids), expected)


def test_without_surgery_loading_fails_clearly(tmp_path):
    scrambled("llama", "llama/lolcats").save_pretrained(tmp_path / "model")
    with pytest.raises(RuntimeError, match="surgery_llama"):
        fresh_process(tmp_path / "model", zoo.tokens(1, 4), imports="")


def test_convert_while_loading(tmp_path):
    ids = zoo.tokens(2, 30)
    for family in ("llama", "mixtral", "gpt2"):
        folder = tmp_path / family
        zoo.build(family).save_pretrained(folder)
        loaded = surgery.from_pretrained(folder, "llama/liger-gla", layers=[0, 2])
        expected = surgery.apply(AutoModelForCausalLM.from_pretrained(folder), "llama/liger-gla", layers=[0, 2])
        assert type(loaded) is type(expected)
        assert torch.equal(logits(loaded, ids), logits(expected, ids))
        surgery.revert(loaded)
        assert torch.equal(logits(loaded, ids), logits(zoo.build(family), ids))
        for recipe in ("llama/lolcats", "llama/logmass"):  # initial values are set, not left as found in memory
            loaded = surgery.from_pretrained(folder, recipe)
            expected = surgery.apply(AutoModelForCausalLM.from_pretrained(folder), recipe)
            assert torch.equal(logits(loaded, ids), logits(expected, ids))


MEASURE = """
import resource, sys, threading, time, torch, surgery
from transformers import LlamaForCausalLM
torch.set_num_threads(1)

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

surgery.from_pretrained(sys.argv[2], "llama/lolcats")
before, peak, done = anonymous(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
model = surgery.from_pretrained(sys.argv[1], "llama/lolcats")
done = True
thread.join()
weights = sum(p.numel() * p.element_size() for p in model.parameters())
print((max(peak, anonymous()) - before) / weights)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_converting_while_loading_holds_one_copy(tmp_path):
    zoo.build("llama").save_pretrained(tmp_path / "small")
    wide = dict(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=6,
        num_attention_heads=16,
        head_dim=64,
        vocab_size=4000,
    )
    model = zoo.build("llama", **wide, initializer_range=0.02, max_position_embeddings=128)
    model.save_pretrained(tmp_path / "large", max_shard_size="100MB")
    arguments = [str(tmp_path / "large"), str(tmp_path / "small")]
    ratio = float(
        subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True).stdout
    )
    assert ratio <= 1.1


def test_incomplete_checkpoints_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    model = scrambled("llama", "llama/lolcats")
    model.save_pretrained(tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if ".1.self_attn.mixer." not in name}
    assert len(kept) < len(weights)
    save_file(kept, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(surgery.SurgeryError, match=r"lacks \d+ mixer weights .*model.layers.1.self_attn.mixer"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(
        json.dumps({**config, "surgery": {**config["surgery"], "format": 99}})
    )
    with pytest.raises(surgery.SurgeryError, match="upgrade surgery"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "surgery"}))
    with pytest.raises(surgery.SurgeryError, match="no `surgery` block"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")


KILLED = """
import os, sys, time, torch
sys.path.insert(0, sys.argv[3])
import safetensors.torch, surgery, zoo
import transformers.modeling_utils as modeling

real, written = modeling.safe_save_file, []

def slow(*args, **kwargs):
    real(*args, **kwargs)
    written.append(1)
    if len(written) == 2:
        open(sys.argv[2], "w").close()
        time.sleep(60)

modeling.safe_save_file = slow
zoo.convert(zoo.build("llama", seed=1), "llama/lolcats", window=8).save_pretrained(sys.argv[1], max_shard_size="20KB")
"""


@pytest.mark.parametrize("existing", [False, True], ids=["new", "overwriting"])
def test_killed_while_saving(existing, tmp_path):
    target, marker = tmp_path / "model", tmp_path / "marker"
    before = scrambled("llama", "llama/lolcats")
    if existing:
        before.save_pretrained(target)
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, target, marker, Path(__file__).parent], stderr=subprocess.DEVNULL
    )
    for _ in range(600):
        if marker.exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    assert marker.exists(), "the save never got far enough to be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    if existing:
        ids = zoo.tokens(1, 9)
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(target), ids), logits(before, ids))
    else:
        assert not target.exists()
    before.save_pretrained(target, max_shard_size="20KB")
    loaded = AutoModelForCausalLM.from_pretrained(target)
    assert torch.equal(logits(loaded, zoo.tokens(1, 9)), logits(before, zoo.tokens(1, 9)))


def test_overwriting_is_never_loadable_halfway(tmp_path, monkeypatch):
    old, new = scrambled("llama", "llama/lolcats"), scrambled("llama", "llama/logmass")
    old.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    (tmp_path / "model" / "notes.txt").write_text("mine")
    real, steps = os.replace, []

    def stopping(source, target):
        steps.append(target)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return real(source, target)

    monkeypatch.setattr(os, "replace", stopping)
    with pytest.raises(KeyboardInterrupt):
        new.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    monkeypatch.undo()
    with pytest.raises(Exception, match="config.json|Unrecognized model"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    new.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(loaded, zoo.tokens(1, 9)), logits(new, zoo.tokens(1, 9)))


def test_config_alone_builds_the_same_model(tmp_path):
    model = scrambled("qwen3", "llama/logmass")
    model.config.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.model_type == "surgery_qwen3" and config.surgery["recipe"] == model.surgery.recipe.to_dict()
    again = AutoModelForCausalLM.from_config(config)
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again.eval(), zoo.tokens(1, 9)), logits(model, zoo.tokens(1, 9)))
    live = AutoModelForCausalLM.from_config(model.config).eval()
    with surgery.mode(live, "teacher"):
        assert logits(live, zoo.tokens(1, 9)).isfinite().all()
