"""Make the small pretrained Llama that ships in surgery/demo: the corpus, the tokenizer, the training, the figures.

    python benchmarks/pretrain_demo.py corpus             # one CPU core, a minute or two, 1 GB of memory
    python benchmarks/pretrain_demo.py train              # one H100-class GPU, about two minutes
    python benchmarks/pretrain_demo.py evaluate           # the figures of the saved bf16 weights, in fp32; CPU or GPU

The corpus is Python's own standard library (the running interpreter's .py files; CPython 3.11 was used) and the
documentation sources of the same version: a folder of .rst files given by --docs (the Doc/ folder of a CPython source
tree, or the _sources of a built documentation), or, on Debian and Ubuntu, fetched by `apt-get download python3.11-doc`.
Whole files are held out by a hash of their path: `heldout` ships in surgery/demo, `dev` only watches the training.
"""

import argparse
import collections
import hashlib
import json
import math
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]
EOT = "<|endoftext|>"
VOCAB = 4096
LENGTH = 1024
HELD_CHARS = 125_000  # per domain, for heldout and again for dev
BUCKETS = ((1, 64), (65, 256), (257, 512), (513, LENGTH - 1))  # by number of preceding tokens in the window
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
    **SPECIAL,
}


# ---------------------------------------------------------------------------------------------------- corpus
def fetch_docs(work):
    """the documentation sources of this Python version from the distribution's package, unpacked, not installed"""
    name, dest = f"python{sys.version_info[0]}.{sys.version_info[1]}-doc", (work / "docs").resolve()
    if not dest.exists():
        try:
            subprocess.run(["apt-get", "download", name], cwd=work, check=True)
        except (OSError, subprocess.CalledProcessError):
            sys.exit(f"no documentation: give --docs a folder of .rst files (CPython's Doc/), {name} cannot be fetched")
        subprocess.run(["dpkg", "-x", str(next(work.glob(f"{name}_*.deb"))), str(dest)], check=True)
    return next(dest.rglob("_sources"))


def gather(docs):
    """{path: text} of every document, without duplicates, generated tables and files that are not utf-8"""
    stdlib, found, seen = Path(sysconfig.get_path("stdlib")), {}, set()
    skip = {"site-packages", "dist-packages", "__pycache__", "pydoc_data", "encodings", "data"}
    files = [
        (f"lib/{p.relative_to(stdlib).as_posix()}", p)
        for p in stdlib.rglob("*.py")
        if not (skip & set(p.parts[len(stdlib.parts) :]))
        and not p.name.startswith(("_sysconfigdata", "bad"))
        and "config-" not in str(p.relative_to(stdlib))
    ]
    files += [(f"doc/{p.relative_to(docs).as_posix().removesuffix('.txt')}", p) for p in docs.rglob("*.rst*")]
    for name, path in sorted(files):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if len(text) > 200 and text not in seen:
            seen.add(text)
            found[name] = text
    return found


def fraction(name):
    """a number in [0, 1) that only the document's path decides"""
    return int(hashlib.sha256(name.encode()).hexdigest()[:12], 16) / 16**12


def kind(name):
    return "docs" if name.startswith("doc/") else "tests" if re.search("/(test|tests|idle_test)/", name) else "library"


def split(found):
    """train, heldout and dev names: whole documents held out, in the order of their hash until the quota is full"""
    names = sorted(found, key=fraction)
    # a held-out document must not be half copied elsewhere: at most a fifth of its longer lines occur in another one
    lines = {n: {line.strip() for line in found[n].splitlines() if len(line.strip()) >= 30} for n in found}
    count = collections.Counter(line for n in found for line in lines[n])
    own = {n for n in found if sum(count[line] == 1 for line in lines[n]) >= 0.8 * len(lines[n])}
    parts = {"heldout": [], "dev": []}
    for domain in ("lib/", "doc/"):
        fit = iter([n for n in names if n.startswith(domain) and 3_000 <= len(found[n]) <= 30_000 and n in own])
        for part in parts.values():
            quota = HELD_CHARS
            while quota > 0:
                part.append(next(fit))
                quota -= len(found[part[-1]])
    held = set(parts["heldout"] + parts["dev"])
    return {"train": [n for n in names if n not in held], **parts}


def train_tokenizer(texts, out):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tok = Tokenizer(models.BPE())
    split, bytelevel = pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel
    tok.pre_tokenizer = pre_tokenizers.Sequence([split, bytelevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    bpe = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=[EOT], initial_alphabet=bytelevel.alphabet())
    tok.train_from_iterator(texts, bpe)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tok, bos_token=EOT, eos_token=EOT, pad_token=EOT, clean_up_tokenization_spaces=False
    ).save_pretrained(out)


def make_corpus(args):
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    found = gather(args.docs or fetch_docs(args.work))
    parts = split(found)
    train_tokenizer((found[n] for n in parts["train"]), args.out)
    tok = AutoTokenizer.from_pretrained(args.out)
    ids = {}
    for part in ("train", "dev"):  # in a fixed random order, every document followed by the end-of-text token
        order = sorted((fraction(n + part), n) for n in parts[part])
        ids[part] = np.concatenate([[*tok(found[n]).input_ids, 0] for _, n in order]).astype(np.uint16)
        np.save(args.work / f"{part}.npy", ids[part])
    with open(args.out / "heldout.jsonl", "w", encoding="utf-8") as f:
        for name in sorted(parts["heldout"]):
            row = {"text": found[name], "domain": "docs" if kind(name) == "docs" else "code", "source": name}
            f.write(json.dumps(row, ensure_ascii=False) + "\n")
    licence = Path(sysconfig.get_path("stdlib")) / "LICENSE.txt"
    if licence.exists():  # the held-out text is Python's: its licence goes with it
        shutil.copy(licence, args.out / "LICENSE.python.txt")
    stats = {
        "python": platform.python_version(),
        "train_tokens": len(ids["train"]),
        "dev_tokens": len(ids["dev"]),
        "train_sha256": hashlib.sha256(ids["train"].tobytes()).hexdigest(),
    }
    for part, names in parts.items():
        chars = collections.Counter({f"{k}_chars": 0 for k in ("docs", "library", "tests")})
        for name in names:
            chars[f"{kind(name)}_chars"] += len(found[name])
        stats[part] = {"documents": len(names), **chars}
    (args.work / "corpus.json").write_text(json.dumps(stats, indent=1))
    print(json.dumps(stats, indent=1))


# ------------------------------------------------------------------------------------------------- the model
def logits_of(model, ids, mask=None, drop=0.0):
    """the model's own layers under plain causal attention, or under a boolean mask; no mask tensor without need"""
    x = model.model.embed_tokens(ids)
    angles = model.model.rotary_emb(x, torch.arange(ids.shape[1], device=ids.device)[None])
    for layer in model.model.layers:
        y = layer(x, attention_mask=mask, position_embeddings=angles)
        x = x + F.dropout(y - x, drop) if drop else y  # training only
    return model.lm_head(model.model.norm(x))


def loss_of(model, rows, drop=0.0):
    return F.cross_entropy(logits_of(model, rows[:, :-1], drop=drop).flatten(0, 1).float(), rows[:, 1:].flatten())


def sliding(length, window, device):
    """each token sees itself and the window - 1 before it"""
    i = torch.arange(length, device=device)
    return ((i[:, None] >= i) & (i[:, None] - i < window))[None, None]


@torch.no_grad()
def token_nll(model, rows, window=None, batch=8):
    mask = sliding(rows.shape[1], window, rows.device) if window else None
    parts = []
    for part in rows.split(batch):
        logits = logits_of(model, part, mask)[:, :-1].float()
        parts.append(F.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none"))
    return torch.cat(parts).double().cpu()


def heldout_windows(folder, tok):
    """{domain: [n, LENGTH]}: a domain's documents in file order, each followed by end-of-text, cut without overlap"""
    ids = {}
    for line in (folder / "heldout.jsonl").read_text(encoding="utf-8").split("\n")[:-1]:
        row = json.loads(line)
        ids.setdefault(row["domain"], []).extend([*tok(row["text"]).input_ids, tok.eos_token_id])
    return {d: torch.tensor(x[: len(x) // LENGTH * LENGTH]).view(-1, LENGTH) for d, x in sorted(ids.items())}


def evaluate(folder, device):
    """all figures of a saved folder, computed in fp32"""
    torch.set_float32_matmul_precision("highest")
    tok = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    out = {}
    for domain, rows in heldout_windows(folder, tok).items():
        out[domain] = {"windows": len(rows)}
        # copy recall: end-of-text, 200 unseen tokens, the same 200 again
        piece = rows.flatten()[: rows.numel() // 200 * 200].view(-1, 200)
        twice = torch.cat([torch.full((len(piece), 1), tok.eos_token_id), piece, piece], 1)
        for attention, window in (("full", None), ("window64", 64)):
            nll = token_nll(model, rows.to(device), window)
            copy = token_nll(model, twice.to(device), window).mean(0)
            figures = {"nll": nll.mean(), "stderr": nll.mean(1).std() / len(nll) ** 0.5, "first_window": nll[0].mean()}
            figures |= {f"position_{a}-{b}": nll[:, a - 1 : b].mean() for a, b in BUCKETS}
            figures |= {"copy_200_first": copy[:200].mean(), "copy_200_second": copy[200:].mean()}
            out[domain][attention] = {name: round(value.item(), 4) for name, value in figures.items()}
    return out


def batches(ids, batch):
    """epochs without end: all windows of LENGTH + 1 tokens at a random offset, shuffled"""
    span = torch.arange(LENGTH + 1, device=ids.device)
    while True:
        starts = torch.arange(0, len(ids) - 2 * LENGTH - 1, LENGTH, device=ids.device)
        starts = starts[torch.randperm(len(starts), device=ids.device)] + torch.randint(LENGTH, (1,)).item()
        for part in starts[: len(starts) // batch * batch].split(batch):
            yield ids[part[:, None] + span]


def train(args):
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = {p: torch.from_numpy(np.load(args.work / f"{p}.npy").astype(np.int64)).to(device) for p in ("train", "dev")}
    dev = data["dev"][: len(data["dev"]) // LENGTH * LENGTH].view(-1, LENGTH)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation="sdpa")).to(device)
    weights = [p for p in model.parameters() if p.dim() > 1]  # fp32 master weights
    other = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": weights, "weight_decay": args.decay}, {"params": other, "weight_decay": 0.0}]
    opt = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=device == "cuda")
    step_loss = torch.compile(loss_of) if device == "cuda" else loss_of
    steps = args.steps or int(args.epochs * (len(data["train"]) // LENGTH) / args.batch)
    rows, curve, started = batches(data["train"], args.batch), [], time.time()
    for step in range(steps):
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        lr = args.lr * min(1.0, (step + 1) / args.warmup) * (0.01 + 0.99 * cosine)
        for group in opt.param_groups:
            group["lr"] = lr
        with torch.autocast(device, torch.bfloat16):
            loss = step_loss(model, next(rows), args.drop)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
        if step % max(1, steps // 15) == 0 or step == steps - 1:
            seen = {"step": step, "train": round(loss.item(), 4), "dev": round(token_nll(model, dev).mean().item(), 4)}
            curve.append({**seen, "lr": round(lr, 6), "seconds": round(time.time() - started, 1)})
            print(json.dumps(curve[-1]), flush=True)
            if not math.isfinite(loss.item()):
                sys.exit("the loss is not finite")
    model.generation_config = GenerationConfig(**SPECIAL)
    args.out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokens = steps * args.batch * LENGTH
    settings = {"steps": steps, "length": LENGTH, "tokens": tokens, "epochs": round(tokens / len(data["train"]), 2)}
    settings |= {k: getattr(args, k) for k in ("batch", "lr", "warmup", "decay", "drop", "seed")}
    record = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "corpus": json.loads((args.work / "corpus.json").read_text()),
        "settings": settings,
        "precision": "fp32 master weights, bf16 autocast",
        "seconds": curve[-1]["seconds"],
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": {m.__name__: str(m.__version__) for m in (torch, transformers)},
        "curve": curve,
    }
    report(args.out, record)


def report(folder, record):
    record["evaluation"] = evaluate(folder, "cuda" if torch.cuda.is_available() else "cpu")
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({k: v for k, v in record.items() if k != "curve"}, indent=1))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["corpus", "train", "evaluate"])
    p.add_argument("--out", type=Path, default=ROOT / "surgery/demo", help="the model folder")
    p.add_argument("--work", type=Path, default=ROOT / "build/demo", help="corpus tokens; not shipped")
    p.add_argument("--docs", type=Path, help="a folder of documentation sources (.rst or .rst.txt)")
    p.add_argument("--epochs", type=float, default=14)
    p.add_argument("--steps", type=int, default=0, help="a fixed number of steps instead")
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--lr", type=float, default=3e-3)
    p.add_argument("--warmup", type=int, default=300)
    p.add_argument("--decay", type=float, default=0.5)
    p.add_argument("--drop", type=float, default=0.1, help="dropout of whole layer updates, in training only")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    if args.what == "corpus":
        make_corpus(args)
    elif args.what == "train":
        train(args)
    else:
        report(args.out, json.loads((args.out / "training.json").read_text()))


if __name__ == "__main__":
    main()
