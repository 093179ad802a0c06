"""Reading text and tokens: formats, domains, and one clear sentence for every mistake."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from surgery import SurgeryError
from surgery.training.data.sources import _load_dataset
from surgery.training.data.tokens import check_vocabulary, read_corpora, windows

EOS = 255


def make_tokenizer(**special) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{name: alphabet[at] for name, at in special.items()})


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(eos_token=EOS)


def encode(tokenizer, text: str) -> list[int]:
    return [*tokenizer(text).input_ids, EOS]


def npy(values) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.asarray(values))
    return stream.getvalue()


def lines(*rows) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def put(folder, name: str, data: bytes):
    pack = {".gz": gzip.compress, ".xz": lzma.compress}.get(name[-3:], bytes)
    path = folder / name
    path.write_bytes(pack(data))
    return path


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_every_format_plain_and_compressed(tmp_path, tokenizer, suffix):
    text = "two lines\r\nand caf\u00e9 \U0001f40d"
    paths = [
        put(tmp_path, f"notes.txt{suffix}", text.encode()),
        put(tmp_path, f"rows.jsonl{suffix}", lines({"text": text}, {"input_ids": [3, 4]}, {"input_ids": [5, EOS]})),
        put(tmp_path, f"books.val.u16{suffix}", np.array([7, 8, 9], "<u2").tobytes()),
        put(tmp_path, f"more.npy{suffix}", npy([1, 2])),
    ]
    corpora = read_corpora(paths, tokenizer)
    assert {name: ids.tolist() for name, ids in corpora.items()} == {
        "notes": encode(tokenizer, text),
        "rows": [*encode(tokenizer, text), 3, 4, EOS, 5, EOS],
        "books.val": [7, 8, 9],
        "more": [1, 2],
    }
    assert all(ids.ndim == 1 and np.issubdtype(ids.dtype, np.integer) for ids in corpora.values())


def test_equal_names_are_joined_and_a_line_can_name_its_domain(tmp_path, tokenizer):
    (tmp_path / "more").mkdir()
    rows = lines({"text": "a", "domain": "code"}, {"text": "b"}, {"text": ""}, {"text": "c", "domain": "code"})
    paths = [put(tmp_path, "wiki.jsonl", rows + b"\n"), put(tmp_path / "more", "wiki.txt.gz", b"d")]
    corpora = read_corpora(map(str, paths), tokenizer)
    assert corpora["code"].tolist() == encode(tokenizer, "a") + encode(tokenizer, "c")
    assert corpora["wiki"].tolist() == encode(tokenizer, "b") + encode(tokenizer, "d")


def test_more_documents_than_one_batch_keep_their_order(tmp_path, tokenizer):
    texts = [f"document {index}" for index in range(600)]
    path = put(tmp_path, "many.jsonl", lines(*({"text": text} for text in texts)))
    expected = sum((encode(tokenizer, text) for text in texts), [])
    assert read_corpora([path], tokenizer)["many"].tolist() == expected


def test_nothing_is_put_in_front(tmp_path):
    tokenizer = make_tokenizer(eos_token=EOS, bos_token=1)
    tokenizer.add_bos_token = True
    assert read_corpora([put(tmp_path, "a.txt", b"a")], tokenizer)["a"].tolist() == encode(make_tokenizer(), "a")


def test_tokens_need_no_tokenizer(tmp_path):
    paths = [put(tmp_path, "a.npy", npy([1, 2])), put(tmp_path, "b.jsonl", lines({"input_ids": [70_000]}))]
    assert [ids.tolist() for ids in read_corpora(paths, None).values()] == [[1, 2], [70_000]]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', ":2: not a JSON object"),
        ("a.jsonl", b'{"text": "x"}\n\n[1]\n', ":3: expected a JSON object, found list"),
        (
            "a.jsonl",
            b'{"body": "x", "id": 3}',
            ":1: has none of `input_ids`, `text`, `messages` and `instruction` with `output`, only `body`, `id`",
        ),
        (
            "a.jsonl",
            b"{}",
            ":1: has none of `input_ids`, `text`, `messages` and `instruction` with `output`, only no keys",
        ),
        ("a.jsonl", b'{"messages": "hi"}', ":1: `messages` must be a list of {role, content}, both of them strings"),
        (
            "a.jsonl",
            b'{"messages": [{"role": "user", "content": [1]}]}',
            ":1: `messages` must be a list of {role, content}",
        ),
        ("a.jsonl", b'{"instruction": "x", "output": null}', ":1: `output` must be a string, not NoneType"),
        ("a.jsonl", b'{"text": 3}', ":1: `text` must be a string, not int"),
        ("a.jsonl", b'{"input_ids": [1, 2.0]}', ":1: `input_ids` must be a list of integers"),
        ("a.jsonl", b'{"input_ids": [1], "domain": 3}', ":1: `domain` must be a name, not 3"),
        ("a.jsonl", b'{"input_ids": [1]}\n{"input_ids": [256]}', ":2: token 256 is outside the vocabulary of 256"),
        ("a.jsonl", b'{"input_ids": [-1]}', ":1: token -1 is negative"),
        ("a.jsonl", b'{"input_ids": [100000000000000000000]}', ":1: token 1" + "0" * 20 + " is outside"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}', ":2: not utf-8 text"),
        ("a.jsonl", b"\n", ": holds no text and no tokens"),
        ("a.txt", b"", ": holds no text and no tokens"),
        ("a.txt", b"fine\nfine\n\xff", ":3: not utf-8 text"),
        ("a.npy", npy([[1, 2]]), ": expected one dimension of integers, found int64 of shape [1, 2]"),
        ("a.npy", npy([1.0]), ": expected one dimension of integers, found float64 of shape [1]"),
        ("a.npy", npy(np.array([1, 300])), ": token 300 is outside the vocabulary of 256 tokens"),
        ("a.npy", b"no", ": cannot be read as .npy: "),
        ("a.npy", npy([]).replace(b"<f8", b"<i8"), ": holds no text and no tokens"),
        ("a.u16", b"abc", ": 3 bytes are no 16-bit integers"),
        ("a.zip", b"PK", ": cannot read a .zip file: plain text, .jsonl, .parquet, .npy and .u16 files are read"),
        ("a.json.gz", b"{}", ": cannot read a .json file: "),
    ],
)
def test_mistakes_name_file_and_line(tmp_path, tokenizer, name, data, message):
    path = put(tmp_path, name, data)
    with pytest.raises(SurgeryError) as error:
        read_corpora([path], tokenizer)
    assert str(error.value).startswith(f"{path}{message}")
    assert "\n" not in str(error.value)


def chatting(template: str) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer(eos_token=EOS)
    tokenizer.chat_template = template
    return tokenizer


def test_chats_are_rendered_by_the_tokenizers_template(tmp_path):
    tokenizer = chatting("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    path = put(tmp_path, "a.jsonl", lines({"messages": messages}, {"messages": messages[:1], "domain": "b"}))
    assert {name: ids.tolist() for name, ids in read_corpora([path], tokenizer).items()} == {
        "a": encode(tokenizer, "<user>2+2?<assistant>4"),
        "b": encode(tokenizer, "<user>2+2?"),
    }
    # one that ends with the eos itself gets no second one
    tokenizer.chat_template = "{{ messages[0].content }}{{ eos_token }}"
    path = put(tmp_path, "c.jsonl", lines({"messages": messages}))
    assert read_corpora([path], tokenizer)["c"].tolist() == encode(tokenizer, "2+2?")


def test_chats_that_cannot_be_rendered(tmp_path):
    path = put(tmp_path, "a.jsonl", lines({"text": "x"}, {"messages": [{"role": "judge", "content": "x"}]}))
    refusing = chatting("{{ raise_exception('no judges here') }}")
    with pytest.raises(SurgeryError, match=r"a.jsonl:2: the chat template refuses `messages`: no judges here"):
        read_corpora([path], refusing)
    for missing in (make_tokenizer(eos_token=EOS), None):
        path = put(tmp_path, "b.jsonl", lines({"messages": [{"role": "user", "content": "x"}]}))
        with pytest.raises(SurgeryError, match=r"b.jsonl:1: has `messages`, and the tokenizer has no chat template"):
            read_corpora([path], missing)


def test_instructions_become_prompt_and_answer(tmp_path, tokenizer):
    rows = lines(
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Greet.", "input": "", "output": "Hi", "domain": "b"},
        {"instruction": "Greet.", "output": "Hi", "domain": "c"},
    )
    found = read_corpora([put(tmp_path, "a.jsonl", rows)], tokenizer)
    assert tokenizer.decode(found["a"][:-1]) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n"
        "### Response:\n3"
    )
    plain = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nGreet.\n\n### Response:\nHi"
    )
    assert found["b"].tolist() == found["c"].tolist() == encode(tokenizer, plain)


def test_parquet(tmp_path, tokenizer, monkeypatch):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(SurgeryError, match=r"a.parquet: reading this needs pyarrow.*pip install 'surgery\[data\]'"):
            read_corpora([path], tokenizer)
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    with pytest.raises(SurgeryError, match=r"a.parquet: cannot be read as .parquet: "):
        read_corpora([path], tokenizer)
    texts = [f"row {index}" for index in range(1500)]  # several of its batches
    parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=400)
    assert read_corpora([path], tokenizer)["a"].tolist() == sum((encode(tokenizer, text) for text in texts), [])
    parquet.write_table(pyarrow.table({"text": ["x", None]}), path)
    with pytest.raises(SurgeryError, match=r"a.parquet:2: `text` must be a string, not NoneType"):
        read_corpora([path], tokenizer)


class HubRows(list):
    _fingerprint = "abc"


def test_data_sets_of_the_hub(tokenizer, monkeypatch):
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        if name == "org/absent":
            raise FileNotFoundError("Dataset 'org/absent' does not exist")
        return HubRows([{"text": "a"}, {"text": None}] if config == "broken" else [{"text": "a"}, {"text": "b"}])

    _load_dataset.cache_clear()
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    found = read_corpora(["hf:org/name", "hf:org/other/en:train[:1%]"], tokenizer)
    assert {name: ids.tolist() for name, ids in found.items()} == {
        name: encode(tokenizer, "a") + encode(tokenizer, "b") for name in ("name", "other/en")
    }
    assert asked == [("org/name", None, "train"), ("org/other", "en", "train[:1%]")]
    with pytest.raises(SurgeryError, match=r"hf:org/name/broken:2: `text` must be a string, not NoneType"):
        read_corpora(["hf:org/name/broken"], tokenizer)
    with pytest.raises(SurgeryError, match="cannot load a data set from 'org/absent': Dataset 'org/absent' does not"):
        read_corpora(["hf:org/absent"], tokenizer)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SurgeryError, match=r"hf:org/new: reading this needs datasets.*pip install 'surgery\[data\]'"):
        read_corpora(["hf:org/new"], tokenizer)


def test_files_that_cannot_be_read(tmp_path, tokenizer):
    for name in ("absent.txt", "a.xz", "a.gz", "cut.gz", "folder"):
        path = tmp_path / name
        if name == "folder":
            path.mkdir()
        elif name == "cut.gz":
            path.write_bytes(gzip.compress(bytes(1000))[:-9])
        elif name != "absent.txt":
            path.write_bytes(b"not compressed")
        with pytest.raises(SurgeryError, match=f"{name}: cannot be read: "):
            read_corpora([path], tokenizer)


def test_what_a_tokenizer_must_have(tmp_path):
    path = put(tmp_path, "a.txt", b"text")
    with pytest.raises(SurgeryError, match=r"a.txt: is text, and there is no tokenizer"):
        read_corpora([path], None)
    with pytest.raises(SurgeryError, match=r"a.txt: the tokenizer has no eos token"):
        read_corpora([path], make_tokenizer())
    with pytest.raises(SurgeryError, match="no data: name at least one file"):
        read_corpora([], make_tokenizer())


def test_the_vocabulary_of_the_model_counts(tmp_path, tokenizer):
    path = put(tmp_path, "a.npy", npy([1, 300]))
    assert len(read_corpora([path], tokenizer, vocab_size=301)["a"]) == 2
    with pytest.raises(SurgeryError, match="token 300 is outside the vocabulary of 300"):
        read_corpora([path], None, vocab_size=300)
    check_vocabulary({"a": np.array([1, 2])}, 3)
    with pytest.raises(SurgeryError, match="a: token 2 is outside the vocabulary of 2"):
        check_vocabulary({"a": np.array([1, 2])}, 2)


def test_windows_do_not_overlap_and_drop_the_rest():
    cut = windows(np.arange(11, dtype=np.uint16), 4)
    assert cut.dtype == torch.int64
    assert cut.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(SurgeryError, match="3 tokens hold no window of 4"):
        windows(np.arange(3), 4)
