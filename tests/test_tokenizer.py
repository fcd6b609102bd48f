import io
import json
import random
import shutil
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from llava_jax.constants import IMAGE_TOKEN_INDEX
from llava_jax.inputs.detokenizer import IncrementalDetokenizer
from llava_jax.inputs.tokenizer import LlamaTokenizer, load_tokenizer, tokenizer_image_token

HERE = Path(__file__).parent / "golden"
GOLDEN = np.load(HERE / "tokens.npz")
INPUTS = json.loads(str(GOLDEN["inputs"]))
PROMPTS = [prompt for cases in json.loads(str(GOLDEN["prompts"])).values() for prompt in cases.values()]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
KINDS = {"slow_new": dict(legacy=False), "slow_legacy": dict(legacy=True), "fast": dict(legacy=False, fast=True)}
MODELS = ("llama", "mistral")


def tokenizer_of(model="llama", kind="slow_new", added=False):
    proto = (HERE / "tokenizers" / model / "tokenizer.model").read_bytes()
    tokenizer = LlamaTokenizer(proto, SPECIAL, **KINDS[kind]).add_tokens(SPECIAL.values())
    return tokenizer.add_tokens(["<im_patch>"]).add_tokens(["<im_start>", "<im_end>"]) if added else tokenizer


def recorded(key):
    return [row.tolist() for row in np.split(GOLDEN[f"{key}/ids"], GOLDEN[f"{key}/ends"][:-1])]


def checkpoint(directory, config=None, model="llama", **files):
    """A directory with a tokenizer.model and the JSON files given."""
    directory.mkdir(exist_ok=True)
    shutil.copy(HERE / "tokenizers" / model / "tokenizer.model", directory)
    if config is not None:
        files["tokenizer_config"] = config
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


# ---- the reference's ids and texts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", MODELS)
def test_ids_of_every_template(model, kind):
    tokenizer = tokenizer_of(model, kind)
    for prompt, want in zip(PROMPTS, recorded(f"{model}/{kind}/prompts"), strict=True):
        assert tokenizer_image_token(prompt, tokenizer) == want, prompt


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", MODELS)
def test_strings_and_decodes(model, kind, added):
    tokenizer, key = tokenizer_of(model, kind, added), f"{model}/{kind}{'_added' * added}"
    for text, want in zip(INPUTS["strings"], recorded(f"{key}/strings"), strict=True):
        assert tokenizer.encode(text) == want, repr(text)
    for name, skip in (("skip", True), ("keep", False)):
        for ids, want in zip(INPUTS["ids"], json.loads(str(GOLDEN[f"{key}/{name}"])), strict=True):
            assert tokenizer.decode(ids, skip_special_tokens=skip) == want, ids


def test_legacy_matters_after_eos():
    """The case that most reimplementations miss: 24 of the prompts differ by it."""
    assert tokenizer_of(kind="slow_new").encode("</s>USER")[1:] == [2, 11889]
    assert tokenizer_of(kind="slow_legacy").encode("</s>USER")[1:] == [2, 3148, 1001]
    assert tokenizer_of(kind="fast").encode("</s>USER")[1:] == [2, 3148, 1001]


def test_image_token_without_bos():
    tokenizer = LlamaTokenizer(tokenizer_of().model_proto, SPECIAL, add_bos_token=False, add_eos_token=True)
    chunk = tokenizer.encode("a")
    assert chunk[-1] == tokenizer.eos_token_id and chunk[0] != tokenizer.bos_token_id
    assert tokenizer_image_token("a<image>a", tokenizer) == [*chunk, IMAGE_TOKEN_INDEX, *chunk]


# ---- added tokens


def test_add_tokens_appends_and_keeps():
    base = tokenizer_of()
    more = base.add_tokens(["<im_patch>", "</s>", "<im_start>", "<im_patch>"])
    assert (len(base), len(more)) == (32000, 32002)
    assert more.encode("<im_patch></s><im_start>")[1:] == [32000, 2, 32001]
    assert more.decode([32000, 450, 32001]) == "The" and "<im_patch>" in more.decode([32000], skip_special_tokens=False)
    assert (more.bos_token_id, more.eos_token_id, more.pad_token_id) == (1, 2, 0)


def added(content, **flags):
    return {"content": content, "lstrip": False, "rstrip": False, "normalized": False, "special": True} | flags


@pytest.mark.parametrize("legacy", [True, False])
def test_lstrip_and_rstrip(tmp_path, legacy):
    tokens = {"32000": added("<L>", lstrip=True), "32001": added("<R>", rstrip=True), "32002": added("<L>x")}
    tokenizer = load_tokenizer(checkpoint(tmp_path, {"legacy": legacy, "added_tokens_decoder": tokens}))
    before = tokenizer.encode("a")[1:]
    after = before if legacy else [29874]  # without the dummy prefix
    assert tokenizer.encode("a  <L>a")[1:] == [*before, 32000, *after]
    assert tokenizer.encode("a<R> \n a")[1:] == [*before, 32001, *after]
    assert tokenizer.encode("a <L>xa")[1:] == [*before, 29871, 32002, *after]  # the longest token wins
    # not legacy: "▁" is a space from the start, so it is stripped; the dummy prefix stays, as <R> is no named token
    assert tokenizer.encode("<R>▁a")[1:] == ([32001, 29871, *before] if legacy else [29871, 32001, *after])


def test_leading_space_survives_a_model_that_removes_spaces():
    """SentencePiece's own default, unlike Llama's, strips them: hence the `<unk>` that the reference puts in front."""
    from sentencepiece import SentencePieceTrainer

    trained = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c", "b a c b"] * 9),
        model_writer=trained,
        vocab_size=270,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = LlamaTokenizer(trained.getvalue(), SPECIAL, legacy=False).add_tokens(SPECIAL.values())
    assert tokenizer.encode("</s> b") == [1, 2, *tokenizer.encode("b")[1:]]
    assert tokenizer.encode("</s>b") != tokenizer.encode("</s> b")


def test_ids_past_the_table_are_nothing_and_placeholders_are_refused():
    for kind in KINDS:
        tokenizer = tokenizer_of(kind=kind)
        assert tokenizer.decode([450, 32063, 4996]) == tokenizer.decode([450, 4996])
        with pytest.raises(ValueError, match="decode: -200 is not a token id"):
            tokenizer.decode([450, IMAGE_TOKEN_INDEX])


# ---- files


def test_which_tokenizer_a_directory_gives(tmp_path):
    bare = checkpoint(tmp_path / "bare")
    new = checkpoint(tmp_path / "new", {"legacy": False, "pad_token": "<unk>"})
    assert load_tokenizer(bare).legacy and not load_tokenizer(new).legacy and not load_tokenizer(new).fast
    assert load_tokenizer(bare).pad_token_id is None and load_tokenizer(new).pad_token_id == 0
    want = [2, 3148, 1001]
    assert load_tokenizer(new).encode("</s>USER")[1:] != want
    assert load_tokenizer(new, name="llava-v1.6-Mistral-7b").encode("</s>USER")[1:] == want
    assert load_tokenizer(new, reading="llava-hf").encode("</s>USER")[1:] == want


def test_older_files_name_the_added_tokens(tmp_path):
    directory = checkpoint(
        tmp_path,
        {"bos_token": {"__type": "AddedToken", **added("<s>")}, "eos_token": "</s>"},
        special_tokens_map={"pad_token": added("[PAD]"), "additional_special_tokens": ["<x>"]},
        added_tokens={"[PAD]": 32000, "<im_patch>": 32001},
    )
    tokenizer = load_tokenizer(directory)
    assert len(tokenizer) == 32003 and tokenizer.pad_token_id == 32000
    assert tokenizer.encode("<im_patch>[PAD]<x>") == [1, 32001, 32000, 32002]
    # <im_patch> is not special here: it stays in the text, apart from its neighbours
    assert tokenizer.decode([450, 32001, 32000, 450]) == "The <im_patch> The"


def test_directory_without_a_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path} has no tokenizer.*tokenizer.model and tokenizer.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("size", [0, 1000, 499722])
def test_truncated_model(tmp_path, size):
    path = checkpoint(tmp_path) / "tokenizer.model"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=rf"tokenizer.model \({size} bytes\) is not a SentencePiece model"):
        load_tokenizer(tmp_path)


def test_broken_json(tmp_path):
    (checkpoint(tmp_path) / "tokenizer_config.json").write_text('{"legacy": fal')
    with pytest.raises(ValueError, match=r"tokenizer_config.json: not JSON \(.*\); download it again"):
        load_tokenizer(tmp_path)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A tokenizer.json alone, of Llama 3's kind: byte-level BPE, its ids the bytes, BOS from the post-processor."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokenizer = Tokenizer(models.BPE({letter: byte for byte, letter in bytes_to_unicode().items()}, []))
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|eot_id|>"])
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing("<|begin_of_text|> $A", None, [("<|begin_of_text|>", 256)])
    directory = tmp_path_factory.mktemp("llama3")
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"clean_up_tokenization_spaces": False}))
    return load_tokenizer(directory)


def test_tokenizer_json_alone(byte_level):
    text = "Hi , 你 ! it 's"
    ids = byte_level.encode(text)
    assert ids[0] == byte_level.bos_token_id == 256 and byte_level.eos_token_id == 257 and len(byte_level) == 258
    assert byte_level.decode(ids, skip_special_tokens=True) == text
    chunks = [byte_level.encode(chunk)[1:] for chunk in ("Hi ", "!")]
    assert tokenizer_image_token("Hi <image>!", byte_level) == [256, *chunks[0], IMAGE_TOKEN_INDEX, *chunks[1]]


# ---- text as it comes


def streamed(tokenizer, ids, stop=()):
    stream = IncrementalDetokenizer(tokenizer, stop)
    pieces = [stream.push(i) for i in ids]
    return [*pieces, stream.flush()], stream


@pytest.fixture(scope="module")
def clean_up(tmp_path_factory):
    """A tokenizer.json alone, of letters, whose `decode` takes spaces out."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), *((letter, -1.0) for letter in "   ''nt.,?!smverab")], 0))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=True)


@pytest.fixture(params=[*((m, k) for m in (*MODELS, "small") for k in KINDS), "byte_level", "clean_up"])
def any_tokenizer(request):
    kind = request.param
    return request.getfixturevalue(kind) if isinstance(kind, str) else tokenizer_of(*kind, added=True)


def sequences(tokenizer, rng, count):
    """Random ids: any, or half of them bytes, so that broken characters come up, or whole characters of several bytes;
    and special tokens, spaces, and, where they are passed over, ids past the table."""
    vocabulary, size = tokenizer.get_vocab(), len(tokenizer)
    bytes_ = [vocabulary.get(f"<0x{i:02X}>", i % size) for i in range(256)]
    often = [vocabulary.get("▁", 0), 0, 1, 2, size - 1, size - 2]
    if isinstance(tokenizer, LlamaTokenizer):
        yield from (ids for ids in INPUTS["ids"] if max(ids, default=0) < size)
        often.append(size + 9)
    llama = [bytes_[byte] for byte in "🦙".encode()]
    for broken in range(6, 13):
        yield [bytes_[0x80]] * broken + llama
        yield [bytes_[0x80], *(llama[:3] * 5)[:broken], *llama]
    for _ in range(count):
        draws = [
            lambda: [rng.randrange(size)],
            lambda: [rng.choice(bytes_)],
            lambda: [rng.choice(bytes_[0x80:])],
            lambda: [bytes_[byte] for byte in rng.choice("é€🦙你a").encode()],
            lambda: [rng.choice(often)],
        ]
        chosen = rng.sample(draws, 2)
        yield [i for _ in range(rng.randint(1, 14)) for i in rng.choice(chosen)()]


def test_pieces_join_to_the_decoded_text_of_every_beginning(any_tokenizer):
    """Costs 5 s."""
    rng, decode = random.Random(0), partial(any_tokenizer.decode, skip_special_tokens=True)
    for ids in sequences(any_tokenizer, rng, 100):
        whole = decode(ids)
        stop = rng.choice([(), (whole[3:5], rng.choice(whole or "x") + "zz"), (whole[4:7],), (" ",), (whole[-2:],)])
        for length in range(len(ids) + 1):
            text = decode(ids[:length])
            pieces, stream = streamed(any_tokenizer, ids[:length], stop)
            found = [text.find(s) for s in stop if s and s in text]
            assert "".join(pieces) == text[: min(found, default=None)].strip(), (ids[:length], stop)
            assert found or not stream.stopped


def test_spaces_that_a_tokenizer_takes_out(clean_up):
    assert clean_up.decode(clean_up.encode("a , b n ' t v")) == "a, bn't v"
    for text in (" n ' t", "a ' ' ' s", "a  ' ve .", "s 's 're"):
        ids = clean_up.encode(text)
        assert "".join(streamed(clean_up, ids)[0]) == clean_up.decode(ids).strip(), text


def test_a_token_costs_as_much_after_many_as_after_few(any_tokenizer, monkeypatch):
    """By the ids that are decoded in all."""
    decoded, decode, rng = [], type(any_tokenizer).decode, random.Random(1)
    counted = lambda self, ids, *args, **options: decoded.append(len(ids)) or decode(self, ids, *args, **options)  # noqa: E731
    monkeypatch.setattr(type(any_tokenizer), "decode", counted)
    vocabulary, size, byte = any_tokenizer.get_vocab(), len(any_tokenizer), any_tokenizer.get_vocab().get("<0x80>", 128)
    for ids in (
        [rng.randrange(size) for _ in range(2000)],
        [1] * 2000,
        [byte % size] * 2000,  # no characters
        [vocabulary.get("a", 64)] * 2000,
    ):
        decoded.clear()
        streamed(any_tokenizer, ids)
        assert sum(decoded) < 40 * len(ids), ids[-1]


def test_pieces_come_early_and_whole():
    tokenizer = tokenizer_of()
    llama = [byte + 3 for byte in "🦙".encode()]
    pieces, _ = streamed(tokenizer, [29871, 450, *llama, 6635])
    assert pieces == ["", "The", "", "", "", "🦙", " cat", ""]
    assert streamed(tokenizer, [450, *llama[:2]])[0] == ["The", "", "", "��"]  # a broken character comes out at the end
    assert streamed(tokenizer, [450, 29871, 13])[0] == ["The", "", "", ""]


def test_stop_string_is_held_back_and_ends_the_text():
    tokenizer = tokenizer_of(kind="slow_legacy")
    ids = tokenizer.encode("A cat. ### Human: no")[1:]
    pieces, stream = streamed(tokenizer, ids, ["###", ""])
    assert "".join(pieces) == "A cat." and stream.stopped
    ids = tokenizer.encode("A # b")[1:]
    pieces, stream = streamed(tokenizer, ids, ["###"])
    assert pieces == ["A", "", " # b", ""] and not stream.stopped
    pieces, stream = streamed(tokenizer, ids[:-1], ["###"])
    assert pieces == ["A", "", " #"] and not stream.stopped


def test_the_earliest_stop_string_wins_even_if_it_ends_later():
    tokenizer = tokenizer_of()
    ids = [tokenizer.encode(f"</s>{letter}")[-1] for letter in "xabcdy"]
    pieces, stream = streamed(tokenizer, ids, ["c", "abcd"])
    assert pieces == ["x", "", "", "", "", "", ""] and stream.stopped
    pieces, stream = streamed(tokenizer, ids[:-2], ["c", "abcd"])
    assert "".join(pieces) == "xab" and not stream.stopped


def test_a_stop_string_costs_as_much_as_the_text_and_no_more():
    tokenizer = tokenizer_of(kind="slow_legacy")
    ids = tokenizer.encode("a" * 200)[1:]
    began = time.process_time()
    pieces, stream = streamed(tokenizer, ids, ["a" * 1_000_000, "b" * 1_000_000])
    assert "".join(pieces) == "a" * 200 and not stream.stopped
    assert time.process_time() - began < 5  # it was hours


def test_stop_strings_are_found_where_find_finds_them():
    tokenizer, rng = tokenizer_of(kind="slow_legacy"), random.Random(5)
    for _ in range(300):
        text = "x" + "".join(rng.choice("ab") for _ in range(rng.randint(1, 12)))
        stop = ["".join(rng.choice("ab") for _ in range(rng.randint(1, 5))) for _ in range(rng.randint(1, 3))]
        found = [text.find(s) for s in stop if s in text]
        pieces, stream = streamed(tokenizer, tokenizer.encode(text)[1:], stop)
        assert "".join(pieces) == text[: min(found, default=None)] and (found or not stream.stopped), (text, stop)
