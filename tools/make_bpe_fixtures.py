#!/usr/bin/env python3
"""Writes what tests/data/bpe holds: small tokenizer.json files of the published kinds, and the ids that the `tokenizers` library gives.

    python3 -m venv .deps/tokenizers-venv && .deps/tokenizers-venv/bin/pip install tokenizers
    .deps/tokenizers-venv/bin/python tools/make_bpe_fixtures.py

    .deps/tokenizers-venv/bin/python tools/make_bpe_fixtures.py --of MODEL/tokenizer.json ... --out FOLDER

The second form takes given files instead of training its own; the tests then read FOLDER from ORYX_TOKENIZERS. A folder holds `texts.json` (a
list of texts) and, for each tokeniser, `NAME.json` (the tokenizer.json) and `NAME.ids` (a list of ids for each text, add_special_tokens=False).
All text is made here; the same script and version of `tokenizers` give the same files.
"""
import argparse, json, pathlib, random, tempfile

import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

GPT2_BYTES = pre_tokenizers.ByteLevel.alphabet()
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = ("the state of a token is read by each mixer and the layer's output isn't written twice they're don't we've I'm you'll he'd "
         "naïve größe façade Straße café 日本語 東京 漢字 こんにちは привет мир слово שלום مرحبا नमस्ते 안녕 def return import self x = 12 345 2026 0.5e-3 "
         "https://example.org/a?b=c {} [] () -> == 😀 👍 the attention attention linear linear recurrent recurrence").split(" ")


def corpus(lines=1500):
    draw = random.Random(1)
    for _ in range(lines):
        yield "".join(draw.choice(WORDS) + draw.choice([" "] * 14 + ["  ", "\n", ".\n\n", ", ", "\t", "    "]) for _ in range(24))


def texts():
    fixed = [
        "", " ", "  ", "      ", "\n", "\n\n\n", "\r\n", " \r\n \r\n", "\t", "\t\t\tx", "a", " a", "a ", "  a  ", " \n a \n\n b\n",
        "one  two   three    four", "line\r\nline\r\n\r\nline\rline", "trailing spaces   \n   leading", "\u00a0no-break\u00a0\u00a0space", "\u3000wide\u2003em\u2009thin",
        "\u200bzero\u200bwidth\ufeffmark", "next\u0085line", "line\u2028separator\u2029paragraph", "\u180emongolian\u180e separator", "\x0b\x0c\x1c\x1d\x1e\x1f controls \x00\x01\x02\x7f",
        "I'm you're we've he'll she'd it's don't", "I'M YOU'RE WE'VE HE'LL SHE'D IT'S DON'T", "'s 't 're 've 'm 'll 'd 'x ''s", "it\u2019s y\u017f'\u017f 'S'T", "'\u017f 'K \u212a",
        "0 1 12 123 1234 12345 123456789", "3.14159e-10 0x7fff 1,000,000", "٠١٢٣ ४५६ Ⅻ ½ ² ①②", "x1y22z333 2026-11-24T14:57:13Z", "1 000 000",
        "naïve größe façade café", "nai\u0308ve gro\u0308\u00dfe fac\u0327ade cafe\u0301", "a\u0301\u0323 a\u0323\u0301 \u1ea5", "e\u0301\u0301\u0301\u0301\u0301\u0301", "\u0301 alone",
        "\u212b \u00c5 A\u030a \ufb01 \u2126 \uf900", "\u1100\u1161\u11a8 \uac01 안녕하세요", "日本語のテキスト、東京。漢字かな交じり文", "中文没有空格，数字123和English混排", "नमस्ते दुनिया क्षत्रिय",
        "שלום עולם", "مرحبا بالعالم ١٢٣", "\u202eright to left\u202c \u200f\u200e", "ไทยไม่มีช่องว่าง", "Привет, мир! Ёлка",
        "😀😀 👍🏽 👩\u200d👩\u200d👧\u200d👦 🏳\ufe0f\u200d🌈 🇩🇪🇫🇷", "👩\u200d", "\u200d\u200d", "\ufffd \ufffe \uffff \U0010ffff", "\ue000 private \U000f0000",
        "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 𓀀 🂡", "Z\u0351\u036b\u0343\u036a\u0302a\u0353\u032el\u0348g\u0318o", "ǅ ǲ ß ẞ İ ı", "def f(x):\n    if x == 1:\n\treturn {'a': [1, 2]}\n", "<html><body class=\"x\">&amp;</body></html>",
        "!!!???...---___", "a/b\\c|d~e`f^g", "($%^&*) #!/bin/sh\n# comment\n", "http://example.org/path?q=1&r=2#frag", "C++20 std::vector<int> v{1,2,3};",
        "the attention of the attention's attention", "linear" * 12, "x" * 200, "ab" * 150, "ÄÖ" * 60, " " * 100 + "end", "\n" * 50 + " \n" * 20, "a\n" * 40,
        "<|endoftext|>", "text<|endoftext|>text", "<|endoftext|><|endoftext|>", " <|endoftext|> ", "<|endoftext|", "<|begin_of_text|>Hello<|end_of_text|>", "<|im_start|>user\nHi<|im_end|>\n",
        "<pad>", "x<mask>y", "x <mask> y", "x  \n<mask>\t y", "<mask><mask>", "<mask>  <mask>", "a <left> b", "a  \u00a0<left>", "a<left>b <left>", "a <right> b", "<right>  \n\u3000b", "<right><left> <right> <left>",
        "<a><a><b><b><a>", "<a <a>>", "cafe\u0301! caf\u00e9! CAFÉ", "x\u00e9 e\u0301", "multi word token multi word", "amulti word tokenb", "<keep>e\u0301<keep>", "\u00e9<keep>e\u0301",
    ]
    draw = random.Random(2)
    ranges = [(0x00, 0x7f)] * 6 + [(0x09, 0x0d), (0x20, 0x20), (0x80, 0xff), (0x100, 0x24f), (0x300, 0x36f), (0x391, 0x3c9), (0x410, 0x44f), (0x5d0, 0x5ea), (0x621, 0x63a),
                                   (0x904, 0x939), (0x2000, 0x200f), (0x2150, 0x2188), (0x3041, 0x3096), (0x4e00, 0x9fa5), (0xac00, 0xd7a3), (0x1f600, 0x1f64f)]
    for _ in range(60):
        fixed.append("".join(chr(draw.randint(*draw.choice(ranges))) for _ in range(draw.randint(1, 40))))
    return fixed


def train(pre_tokenizer, vocab_size=520, special=("<|endoftext|>",), normalizer=None, **model):
    t = Tokenizer(models.BPE(**model))
    t.pre_tokenizer = pre_tokenizer
    t.decoder = decoders.ByteLevel()
    if normalizer is not None:
        t.normalizer = normalizer
    t.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(special), initial_alphabet=GPT2_BYTES, show_progress=False))
    return t


def split(pattern, behavior="isolated", invert=False):
    return pre_tokenizers.Split(Regex(pattern), behavior=behavior, invert=invert)


def byte_level(**kw):
    return pre_tokenizers.ByteLevel(**{"add_prefix_space": False, "use_regex": False, **kw})


def without_merges(t, drop):
    """The vocabulary's word-like tokens stay, some of the merges that make them go: only ignore_merges then finds them."""
    j = json.loads(t.to_str())
    j["model"]["merges"] = [m for m in j["model"]["merges"] if "".join(m) not in drop]
    return Tokenizer.from_str(json.dumps(j))


def small_tokenizers():
    yield "gpt2", train(byte_level(use_regex=True))
    yield "prefix_space", train(byte_level(use_regex=True, add_prefix_space=True))

    llama = train(pre_tokenizers.Sequence([split(LLAMA3), byte_level()]), special=("<|begin_of_text|>", "<|end_of_text|>"), ignore_merges=True)
    bos = llama.token_to_id("<|begin_of_text|>")
    llama.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=True),
        processors.TemplateProcessing(single="<|begin_of_text|> $A", pair="<|begin_of_text|> $A <|begin_of_text|> $B", special_tokens=[("<|begin_of_text|>", bos)])])
    yield "llama3", without_merges(llama, {"Ġattention", "linear", "Ġthe"})

    yield "qwen", train(pre_tokenizers.Sequence([split(QWEN), byte_level()]), normalizer=normalizers.NFC(), special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"))

    added = train(byte_level(use_regex=True), normalizer=normalizers.NFC(), special=("<|endoftext|>", "<pad>"))
    added.add_special_tokens([AddedToken("<mask>", lstrip=True, rstrip=True)])
    added.add_tokens([AddedToken("<left>", lstrip=True), AddedToken("<right>", rstrip=True), AddedToken("<a>"), AddedToken("<a><b>"), "multi word token",
                      AddedToken("caf\u00e9", normalized=True), AddedToken("<keep>", normalized=False), AddedToken("\u00e9<keep>e", normalized=True)])
    yield "added", added

    yield "splits", train(pre_tokenizers.Sequence([
        split(r"[.!?]+", "merged_with_previous"), split(r"[(\[{#]", "merged_with_next"), split(r"\p{Han}|[^|]+", "isolated", invert=True), split("\u00a0", "removed"),
        pre_tokenizers.Split("::", behavior="isolated"), pre_tokenizers.Digits(individual_digits=True), byte_level(use_regex=True)]))
    yield "digits", train(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), byte_level(use_regex=True)]))


def main():
    here = pathlib.Path(__file__).resolve().parent.parent / "tests/data/bpe"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--of", nargs="+", type=pathlib.Path, metavar="FILE", help="tokenizer.json files to take instead of training small ones")
    parser.add_argument("--out", type=pathlib.Path, default=here)
    args = parser.parse_args()
    if args.of and args.out == here:
        parser.error("--of writes large files: give it an --out of its own")
    args.out.mkdir(parents=True, exist_ok=True)
    compact = {"ensure_ascii": True, "separators": (",", ":")}
    all_texts = texts()
    (args.out / "texts.json").write_text("[\n" + ",\n".join(json.dumps(t) for t in all_texts) + "\n]\n")
    chosen = [(f.resolve().parent.name, Tokenizer.from_file(str(f))) for f in args.of] if args.of else small_tokenizers()
    for name, t in chosen:
        (args.out / f"{name}.json").write_text(json.dumps(json.loads(t.to_str()), **compact) + "\n")
        ids = [t.encode(text, add_special_tokens=False).ids for text in all_texts]
        (args.out / f"{name}.ids").write_text("[\n" + ",\n".join(json.dumps(i, **compact) for i in ids) + "\n]\n")
        print(f"{name}: {t.get_vocab_size()} tokens, {len(all_texts)} texts, {sum(map(len, ids))} ids (tokenizers {tokenizers.__version__})")


if __name__ == "__main__":
    main()
