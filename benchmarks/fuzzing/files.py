"""Files that a space names: data, weights, configuration and tokenizer of a model; and the rows of a sweep."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fuzzing.changes import WORDS, change_bytes, change_data, damaged, odd_value
from fuzzing.site import SWEEP, VOCABULARY, Case, Site, small_space

DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "C64", "X", "", "f32")
MODEL_TYPES = (
    "gpt2",
    "bert",
    "t5",
    "mamba",
    "mixtral",
    "opt",
    "qwen2",
    "gemma2",
    "clip",
    "nothing",
    "",
    "auto",
)
FLAWED_ROWS = ("short", "null row", "null inside", "large", "negative", "uint64", "floats", "nested", "text")


def data_case(chance: random.Random, site: Site, folder: Path) -> Case:
    """A file or folder of text or token rows in one of the places that take one."""
    path = _data_file(chance, site, folder)
    if chance.random() < 0.35 and path.is_file():
        path.write_bytes(damaged(chance, path.read_bytes()))
    if chance.random() < 0.1 and path.is_file():
        path = path.rename(path.with_suffix(chance.choice([".parquet", ".jsonl", ".txt", ".csv", ""])))
    space = small_space(site)
    section: dict[str, Any] = {"dataset": str(path)}
    place = chance.randrange(4)
    if place == 0:
        space["calibration"] |= section | {"sampling": chance.choice(["pack", "document"])}
    elif place == 1:
        space["evaluation"]["perplexity"][0] |= section | {"bos_each_window": chance.random() < 0.3}
    elif place == 2:
        space["validation"] |= section
    else:
        space["calibration"] |= section
        space["evaluation"]["perplexity"][0] |= section
    return _plan(space, folder)


def _data_file(chance: random.Random, site: Site, folder: Path) -> Path:
    kind = chance.choice(["text", "text", "rows", "rows", "jsonl", "jsonl", "txt", "folder", "masks"])
    path = folder / f"data.{kind if kind in ('jsonl', 'txt') else 'parquet'}"
    if kind == "text":
        _write_table(chance, path, _text_column(chance, site))
    elif kind == "rows":
        pq.write_table(pa.table({"input_ids": _row_column(chance)}), path)
    elif kind == "jsonl":
        path.write_text(
            "\n".join(_json_line(chance) for _ in range(chance.choice([1, 5, 80]))) + "\n", "utf-8"
        )
    elif kind == "txt":
        texts = ("", "\n\n", "a", "word " * 2000, "\x00" * 5000, "\u202e\U0001f600 x " * 900, "\ufeff" * 3000)
        path.write_text(chance.choice(texts), "utf-8")
    elif kind == "folder":
        path = folder / chance.choice(["data", "train", "x.parquet"])
        path.mkdir()
        for name in chance.sample(["train.parquet", "test.jsonl", "a.txt", ".hidden.parquet"], 2):
            shutil.copy(site.text, path / name)
    else:
        shutil.copy(site.masks, path)
    return path


def _write_table(chance: random.Random, path: Path, column: pa.Array) -> None:
    name = chance.choice(["text"] * 8 + ["Text", "content", "", "text "])
    names, columns = [name], [column]
    if chance.random() < 0.1:
        names, columns = [name, name], [column, column]
    pq.write_table(pa.Table.from_arrays(columns, names=names), path, row_group_size=chance.choice([7, 1000]))


def _text_column(chance: random.Random, site: Site) -> pa.Array:
    texts = pq.read_table(site.text)["text"].to_pylist()
    ways: list[Callable[[], pa.Array]] = [
        lambda: pa.array(texts),
        lambda: pa.array(texts, pa.large_string()),
        lambda: pa.array(texts).dictionary_encode(),
        lambda: pa.array(text.encode() for text in texts),
        lambda: pa.array([text if chance.random() < 0.5 else None for text in texts]),
        lambda: pa.array([None] * 9, pa.string()),
        lambda: pa.array([None] * 9),
        lambda: pa.array([], pa.string()),
        lambda: pa.array([[text] for text in texts]),
        lambda: pa.array([{"text": text} for text in texts]),
        lambda: pa.array(range(50)),
        lambda: pa.array([1.5, float("nan")] * 30),
        lambda: pa.array([" ", "\n", ""] * 30),
        lambda: pa.array([chance.choice(WORDS) for _ in range(400)]),
        lambda: pa.array([b"\xff\xfe\xed\xa0\x80" * 40] * 40).view(pa.string()),
    ]
    return chance.choice(ways)()


def _row_column(chance: random.Random) -> pa.Array:
    rows: list[Any] = [[chance.randrange(VOCABULARY) for _ in range(20)] for _ in range(12)]
    place, flaw = chance.randrange(12), chance.choice(["", "", *FLAWED_ROWS])
    if flaw == "short":
        rows[place] = rows[place][: chance.randrange(20)]
    elif flaw == "null row":
        rows[place] = None
    elif flaw == "null inside":
        rows[place][3] = None
    elif flaw in ("large", "negative"):
        rows[place][3] = chance.choice([VOCABULARY, 2**40, 2**63 - 1]) if flaw == "large" else -1
    elif flaw == "uint64":
        rows[place][3] = 2**64 - 1
        return pa.array(rows, pa.list_(pa.uint64()))
    elif flaw == "floats":
        return pa.array([[float(number) for number in row] for row in rows])
    elif flaw == "nested":
        return pa.array([[row] for row in rows])
    elif flaw == "text":
        return pa.array([[str(number) for number in row] for row in rows])
    kinds = [pa.list_(pa.int64()), pa.large_list(pa.int64())]
    if flaw == "" and chance.random() < 0.3:
        kinds = [pa.list_(pa.int32(), 20), pa.list_(pa.uint8()), pa.list_(pa.int16())]
    array: pa.Array = pa.array(rows, chance.choice(kinds))
    return array


def _json_line(chance: random.Random) -> str:
    good = json.dumps({"text": "some words that are read as text " * chance.randint(1, 20)})
    if chance.random() < 0.93:
        return good
    return chance.choice(
        [
            "",
            "null",
            "[]",
            "5",
            '"text"',
            "{}",
            '{"text": null}',
            '{"text": 5}',
            '{"text": ["a"]}',
            '{"text": "\\ud800 alone"}',
            '{"text": "a", "text": 3}',
            '{"text": NaN}',
            '{"Text": "a"}',
            "{",
            "[" * 100_000,
            '{"a":' * 100_000,
            '{"text": ' + "9" * 5000 + "}",
            "\x00",
            "\ufeff" + good,
        ]
    )


def weights_case(chance: random.Random, site: Site, folder: Path) -> Case:
    """A model folder whose safetensors, or list of them, are not what they say."""
    model = folder / "model"
    shutil.copytree(site.model, model)
    path = model / "model.safetensors"
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header, body = json.loads(content[8 : 8 + size]), content[8 + size :]
    how = chance.random()
    if how < 0.2:
        path.write_bytes(damaged(chance, content))
    elif how < 0.3:
        lie = chance.choice([0, 1, 7, size - 1, size + 1, len(content), 2**31, 2**63, 2**64 - 1])
        path.write_bytes(struct.pack("<Q", lie) + content[8:])
    elif how < 0.75:
        text = _changed_header(chance, header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    elif how < 0.95:
        _write_index(chance, model, [name for name in header if name != "__metadata__"])
    else:
        _misplaced(chance, model, path)
    return _plan(small_space(site) | {"model": {"path": str(model)}}, folder)


def _changed_header(chance: random.Random, header: dict[str, Any]) -> str:
    for _ in range(chance.choice([1, 1, 2])):
        name = chance.choice([name for name in header if name != "__metadata__"])
        entry, how = header[name], chance.randrange(9)
        if how == 0:
            entry["dtype"] = chance.choice(DTYPES)
        elif how == 1:
            entry["shape"] = entry["shape"][::-1] + chance.choice([[], [1], [0], [-1], [2**63]])
        elif how == 2:
            entry["shape"] = chance.choice([[], [0], [entry["shape"][0] * 2], [3, 5], [1.5], "x", None])
        elif how == 3:
            start, end = entry["data_offsets"]
            lies = [[end, start], [start, end + 4], [0, 4], [-4, 0], [start, 2**64], [start], [None, None]]
            entry["data_offsets"] = chance.choice(lies)
        elif how == 4:
            del header[name]
        elif how == 5:
            header[chance.choice(["x", "../x", "", name + ".x", "model." + name])] = header.pop(name)
        elif how == 6:
            header["__metadata__"] = chance.choice([{}, {"format": "tf"}, {"format": 5}, [], None, "x"])
        elif how == 7:
            change_data(chance, header, 1)
        else:
            return json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}"
    return json.dumps(header) + " " * chance.choice([0, 8, 1000])


def _write_index(chance: random.Random, model: Path, names: list[str]) -> None:
    file_name = "model-00001-of-00001.safetensors"
    (model / "model.safetensors").rename(model / file_name)
    index: dict[str, Any] = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, file_name)}
    odd = (
        "gone.safetensors",
        "../model/x",
        "/etc/passwd",
        "",
        ".",
        "..",
        "config.json",
        5,
        None,
        "a\0b",
        "x" * 5000,
    )
    how = chance.randrange(6)
    if how == 0:
        index["weight_map"][chance.choice(names)] = chance.choice(odd)
    elif how == 1:
        index["weight_map"].pop(chance.choice(names))
    elif how == 2:
        index["weight_map"]["not.there"] = file_name
    elif how == 3:
        change_data(chance, index, 2)
    elif how == 4:
        index["weight_map"] = odd_value(chance)
    text = json.dumps(index)
    if chance.random() < 0.2:
        text = chance.choice(["", "[]", "[" * 100_000, text[:-9], "null", text.replace(":", "", 1)])
    (model / "model.safetensors.index.json").write_text(text, "utf-8")


def _misplaced(chance: random.Random, model: Path, path: Path) -> None:
    """A pickle, a folder, a link to nowhere or nothing where weights are expected."""
    path.unlink()
    how = chance.randrange(4)
    if how == 0:
        (model / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.")
    elif how == 1:
        path.mkdir()
    elif how == 2:
        path.symlink_to(chance.choice(["nowhere", "model.safetensors", "/dev/null", "config.json"]))
    else:
        path.write_bytes(b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.")


CONFIGS: dict[str, tuple[Any, ...]] = {
    "model_type": MODEL_TYPES,
    "num_hidden_layers": (0, 1, 3, -1, 10**9, 2.0, "2", None),
    "hidden_size": (0, 1, 15, 32, -16, 10**9, 10**30, "16", None),
    "intermediate_size": (0, 33, -1, 10**9, [32, 32], None),
    "num_attention_heads": (0, 3, 16, -2, 10**9, 1.5, None),
    "num_key_value_heads": (0, 2, 3, -1, None, 10**9),
    "head_dim": (0, 8, 7, -8, None, 10**9),
    "vocab_size": (0, 1, 97, 10**10, -1, None),
    "max_position_embeddings": (0, 8, 10**12, -1, None, "64"),
    "rope_parameters": (None, {}, {"rope_type": "x"}, {"rope_type": "yarn"}, {"rope_theta": 0}, [], 5),
    "rope_scaling": ({"type": "linear"}, {"type": "yarn", "factor": -1}, {"rope_type": "llama3"}, 5),
    "hidden_act": ("gelu", "nothing", "", None, 5),
    "rms_norm_eps": (0, -1, 1e400, None, "1e-6"),
    "dtype": ("float16", "float99", "int8", 5, None),
    "torch_dtype": ("bfloat16", "float8", {}, []),
    "architectures": ([], ["Nothing"], ["BertForMaskedLM"], None, 5, "LlamaForCausalLM"),
    "auto_map": (
        {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
        {"AutoConfig": "a/b--c.D"},
        5,
    ),
    "quantization_config": ({"quant_method": "gptq"}, {"quant_method": "x"}, {}, 5),
    "layer_types": ([], ["full_attention"], ["sliding_attention"] * 2, ["x", "y"], 5),
    "attn_implementation": ("flash_attention_2", "nothing"),
    "tie_word_embeddings": (True, "x", None),
    "attention_bias": (True, 5),
    "pad_token_id": (10**9, -1, "x"),
    "is_encoder_decoder": (True,),
    "text_config": ({}, 5, {"hidden_size": 8}),
    "_attn_implementation": ("eager", "x"),
}
TOKENIZERS: dict[str, tuple[Any, ...]] = {
    "tokenizer_class": ("LlamaTokenizer", "GPT2Tokenizer", "Nothing", "", None, 5, "BertTokenizerFast"),
    "auto_map": ({"AutoTokenizer": ["evil.T", None]}, {"AutoTokenizer": "x"}, 5),
    "model_max_length": (0, -1, 10**30, "x", None),
    "bos_token": (None, 5, "nothing", {"content": "x"}, []),
    "add_bos_token": (True, False, "x"),
    "added_tokens_decoder": ({"5": {"content": "x"}}, {"x": {}}, {"10000000": {"content": "y"}}, []),
}


def config_case(chance: random.Random, site: Site, folder: Path) -> Case:
    """A model folder whose configuration or tokenizer is not what it should be."""
    model = folder / "model"
    shutil.copytree(site.model, model)
    (model / "evil.py").write_text("import pathlib\npathlib.Path('pwned').touch()\n", "utf-8")
    draw = chance.random()
    name = "config.json" if draw < 0.65 else "tokenizer.json" if draw < 0.8 else "tokenizer_config.json"
    path = model / name
    content = path.read_bytes()
    how = chance.random()
    if how < 0.15:
        path.write_bytes(damaged(chance, content))
    elif how < 0.2:
        path.write_text(chance.choice(["", "[]", "null", "5", '"x"', "{}", "[" * 100_000]), "utf-8")
    elif how < 0.25:
        path.unlink()
    else:
        fields = json.loads(content)
        known = {"config.json": CONFIGS, "tokenizer_config.json": TOKENIZERS}.get(name)
        for _ in range(chance.choice([1, 1, 2])):
            if known and chance.random() < 0.7:
                field = chance.choice(list(known))
                fields[field] = chance.choice(known[field])
            else:
                change_data(chance, fields, 1)
        path.write_text(json.dumps(fields), "utf-8")
    return _plan(small_space(site) | {"model": {"path": str(model)}}, folder)


def results_case(chance: random.Random, site: Site, folder: Path) -> Case:
    """A storage whose sweep has damaged or foreign files, and a command that reads it."""
    storage = folder / "storage"
    shutil.copytree(site.storage, storage)
    sweep = storage / SWEEP
    for _ in range(chance.choice([1, 1, 2, 3])):
        _disturb(chance, sweep)
    for name in ("pwned", "other"):
        if chance.random() < 0.1:
            (storage / name).mkdir()
    where = ["--storage", str(storage)]
    space = [str(site.space), *where]
    sort = chance.choice(["perplexity", "-sparsity", "criterion", "data", "started_at", "nothing", "-", ""])
    commands: list[list[str]] = [
        ["results", SWEEP, *where],
        ["results", *where, "--json"],
        ["results", SWEEP, *where, "--sort", sort],
        ["results", str(sweep)],
        ["status", *where],
        ["status", SWEEP, *where, "--json"],
        ["plan", *space],
        ["plan", *space, "--json"],
        ["launch", *space, "--in-process"],
        ["stop", SWEEP, *where],
        ["clean", SWEEP, *where],
    ]
    command = chance.choice(commands)
    return Case(command, may_write=sweep if command[0] == "clean" else None)


def _disturb(chance: random.Random, sweep: Path) -> None:
    part = chance.choice(["trials", "trials", "trials", "units", "status.json", "space.yaml", "launch.lock"])
    if part in ("trials", "units"):
        files = sorted(path for path in (sweep / part).glob("*.parquet") if path.is_file())
        if not files:
            return
        path = chance.choice(files)
        how = chance.random()
        if how < 0.3:
            path.write_bytes(damaged(chance, path.read_bytes()))
        elif how < 0.75:
            _rewrite_rows(chance, path)
        elif how < 0.8:
            shutil.rmtree(sweep / part)
            (sweep / part).write_text("no folder")
        elif how < 0.9:
            path.unlink()
            path.mkdir()
        else:
            name = chance.choice(["0123456789abcdef.parquet", "x.parquet", ".a.tmp"])
            path.with_name(name).write_bytes(path.read_bytes())
        return
    path = sweep / part
    old = path.read_bytes() if path.is_file() else b"{}"
    if part == "status.json" and chance.random() < 0.7:
        fields: dict[str, Any] = {}
        with suppress(ValueError, TypeError):  # damaged before
            fields = dict(json.loads(old))
        fields |= chance.choice([{}, {"state": "running"}, {"state": "running", "host": "elsewhere"}])
        path.write_text(json.dumps(change_data(chance, fields, 2)), "utf-8")
    elif path.is_dir():
        return
    else:
        path.write_bytes(chance.choice([damaged, lambda c, b: change_bytes(c, b, 3)])(chance, old))


def _rewrite_rows(chance: random.Random, path: Path) -> None:
    """A file as another program could write it: other columns, other types, other values, none or more rows."""
    try:
        rows = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError):  # damaged before
        return
    for _ in range(chance.choice([1, 1, 2, 5])):
        if not rows or not rows[0]:
            break
        name = chance.choice(list(rows[0]))
        how = chance.random()
        for row in rows:
            if how < 0.3:
                row[name] = None
            elif how < 0.5:
                row.pop(name, None)
            else:
                row[name] = chance.choice(
                    [
                        "x",
                        "",
                        "5",
                        5,
                        0,
                        -1,
                        2**62,
                        1.5,
                        float("nan"),
                        float("inf"),
                        True,
                        b"x",
                        [1],
                        {"a": 1},
                    ]
                )
    if chance.random() < 0.1:
        rows = rows + rows
    if chance.random() < 0.1:
        rows = rows[:0]
    try:
        table = pa.Table.from_pylist(rows)
    except (pa.ArrowException, TypeError):  # rows of several kinds
        return
    pq.write_table(table, path)


def _plan(space: dict[str, Any], folder: Path) -> Case:
    path = folder / "space.yaml"
    path.write_text(json.dumps(space), "utf-8")
    return Case(["plan", str(path), "--storage", str(folder / "results")])
