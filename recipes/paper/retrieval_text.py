#!/usr/bin/env python3
"""Training documents that ask for what stands in them: the share of retrieval in the data mix of recipes/paper.

    retrieval_text.py TEXT... --out FOLDER --megabytes 40 --seed 1 --jobs 16

TEXT: .jsonl files (field "text"; .xz and .zst too), whose passages serve as hay and as passages. Writes FOLDER/retrieval-NN.jsonl, the same for the same text,
seed and megabytes. Three kinds (a quarter, half and a quarter of the bytes):
  pairs    lists of keys and values in several notations, bare words among them, and some of the keys again with their values
  needles  a passage, or a few sentences over and over, in which 1 to 6 facts (a number, a word of hexadecimal digits, a name) are hidden, and questions about them
  cloze    a passage and questions made of its sentences: one span taken out and replaced by a question word, some words dropped
No wording, name or sentence is that of `oryx eval needle`; passages are training text. Needs nothing beyond Python's standard library (and zstd for .zst).
"""
import argparse, json, lzma, multiprocessing, os, random, re, subprocess

WORDS = """apple arrow autumn badge barrel basket beacon blanket bottle branch bucket button cabin candle canvas castle ceiling cherry circle cloud copper cotton
cradle crystal curtain dagger desert diamond doctor dragon eagle engine falcon feather ferry finger forest fountain garden garlic gate ghost glacier globe glove grain
guitar hammer hazel helmet honey horizon hunter island jacket jungle kingdom kitten ladder lemon library lizard magnet maple marble market mirror monkey mountain
needle nephew ocean onion orange oyster palace panther parade parrot pebble pencil pepper pilot planet pocket prince pumpkin puzzle rabbit ribbon river rocket
salmon scarf school sculptor shadow shelter signal sister smoke spider spring squirrel stable station storm summer sunset sword table temple thunder ticket tiger tower
trumpet turtle valley village walnut wallet window winter wizard yellow zebra""".split()
QUALITIES = """ancient broken calm clever cold cruel dark deep dry early eager empty fierce final foreign formal fresh giant grand green grey hidden huge iron
kind lazy left light lost loud lucky merry modern narrow noble old pale plain polite poor proud pure quick quiet rare red rich rough round royal sacred safe sharp
short shy silent small smooth soft solid sour steep strange strong sudden sweet swift tall tame thin tiny true upper vast warm weak wet wide wild wise young""".split()
FILLER = ["The grass was wet and the path was long.", "Nobody had seen the ship since the spring.", "It was warm in the kitchen that evening.",
          "They walked on until the light was gone.", "The clock on the wall had stopped again.", "A letter lay unopened on the desk.",
          "Far away someone was playing the piano.", "The river had risen over the old stones.", "He counted the coins and put them back.",
          "The market was nearly empty at noon."]
# (statement, question, answer's lead): {n} the name, {w} what, {v} the value
FACTS = [("The {w} for the {n} was set to {v}.", "Which {w} was set for the {n}?", "The {w} for the {n} was set to"),
         ("Remember that {n} has the {w} {v}.", "Which {w} does {n} have?", "{n} has the {w}"),
         ("Note: the {w} assigned to {n} is {v}.", "What {w} is assigned to {n}?", "the {w} assigned to {n} is"),
         ("In the register, {n} stands under {v}.", "Under what does {n} stand in the register?", "{n} stands under"),
         ("One of the hidden {w}s, that of {n}, reads {v}.", "How does the {w} of {n} read?", "the {w} of {n} reads"),
         ("To open the {n}, use {v}.", "What opens the {n}?", "To open the {n}, use"),
         ("My {w} of the {n} is {v}, do not forget it.", "What is my {w} of the {n}?", "My {w} of the {n} is")]
THINGS = ["code", "key", "password", "identifier", "serial", "reference", "token", "entry", "address", "label", "mark", "figure"]
SPAN = re.compile(r"\b\d[\d,.]*\d\b|\b\d\b|(?:[A-Z][a-z]+(?: (?:of|de|the) [A-Z][a-z]+| [A-Z][a-z]+)+)|(?<=[a-z,;] )[A-Z][a-z]{2,}\b")


def read(path):
    if path.endswith(".xz"):
        raw = lzma.open(path).read()
    elif path.endswith(".zst"):
        raw = subprocess.run(["zstd", "-dc", path], capture_output=True, check=True).stdout
    else:
        raw = open(path, "rb").read()
    return [json.loads(line)["text"] for line in raw.split(b"\n") if line]


def value(r):
    kind = r.random()
    if kind < 0.4:
        return str(r.randrange(10 ** (r.randrange(3, 9))))
    if kind < 0.7:
        digits = r.choice([4, 6, 8, 8, 8, 10])
        return "%0*x" % (digits, r.getrandbits(4 * digits))
    if kind < 0.9:
        return r.choice(WORDS)
    return r.choice(QUALITIES) + " " + r.choice(WORDS)


def name(r):
    kind = r.random()
    if kind < 0.6:
        return r.choice(QUALITIES) + " " + r.choice(WORDS)
    if kind < 0.8:
        return r.choice(WORDS)
    return r.choice(WORDS).capitalize() + " " + r.choice(WORDS).capitalize()


def pairs(r, common):
    """Many queries a document, so that nearly every second half is asked for."""
    n = min(int(2 ** r.uniform(2, 7)), 120)
    style = r.random()
    if style < 0.55:  # bare words, each a key or a value, perhaps with others between
        words = r.sample(common, min(len(common), 2 * n + 20))
        keys, rest = words[:n], words[n:]
        out, filler = [], r.random() < 0.4
        table = [(k, r.choice(rest)) for k in keys]
        for k, v in table:
            if filler:
                out += [r.choice(FILLER_WORDS) for _ in range(r.randrange(0, 6))]
            out += [k, v]
        for k, v in r.sample(table, min(n, r.randrange(4, 40))):
            out += [k, v]
        return " " + " ".join(out)
    form = r.choice(["{k}: {v}\n", "{k} = {v}\n", "{k} -> {v}; ", '"{k}": "{v}",\n', "{k} is {v}. ", "- {k}: {v}\n", "{k}\t{v}\n"])
    table = {}
    while len(table) < n:
        k = name(r) if n > 60 or r.random() < 0.8 else "%08x" % r.getrandbits(32)
        table[k] = value(r)
    table = list(table.items())
    text = "".join(form.format(k=k, v=v) for k, v in table)
    ask = r.sample(table, min(n, r.randrange(2, 24)))
    if r.random() < 0.5:
        return text + "\n" + "".join(form.format(k=k, v=v) for k, v in ask)
    form = r.choice(["\nKey: {k}\nValue: {v}\n", "\nQ: {k}?\nA: {v}\n", "\nLook up {k}. It is {v}."])
    return text + "".join(form.format(k=k, v=v) for k, v in ask)


FILLER_WORDS = ["the", "and", "with", "for", "that", "this", "from", "but", "not", "when", "then", "also", "here", "there"]


def sentences(text):
    return [s for s in re.split(r"(?<=[.?!]) |\n+", text) if s]


def hay(r, texts, length):
    if r.random() < 0.3:
        some = r.sample(FILLER, r.randrange(2, 6))
        out = []
        while sum(map(len, out)) < length:
            out += some
        return out
    text = r.choice(texts)
    start = r.randrange(max(1, len(text) - length))
    return sentences(text[start:start + length])[1:] or FILLER[:]


def needles(r, texts):
    out = hay(r, texts, int(2 ** r.uniform(7.5, 12.6)))
    facts = []
    for _ in range(r.choice([1, 1, 2, 3, 4, 6])):
        statement, question, lead = r.choice(FACTS)
        f = {"n": name(r), "w": r.choice(THINGS), "v": value(r)}
        facts.append((question.format(**f), lead.format(**f), f["v"]))
        out.insert(r.randrange(len(out) + 1), statement.format(**f))
    r.shuffle(facts)
    text = " ".join(out)
    for question, lead, v in facts:
        form = r.choice(["\n\nQuestion: {q}\nAnswer: {l} {v}.", "\n\nQ: {q}\nA: {l} {v}.", "\n\nQuestion: {q}\nAnswer: {v}", "\n\n{q} {l} {v}."])
        text += form.format(q=question, l=lead[0].upper() + lead[1:] if r.random() < 0.5 else lead, v=v)
    return text


def cloze(r, texts):
    text = r.choice(texts)
    length = int(2 ** r.uniform(9, 12))
    start = r.randrange(max(1, len(text) - length))
    passage = text[start:start + length]
    passage = passage[passage.find(" ") + 1:passage.rfind(" ")]
    asked = []
    candidates = [s for s in sentences(passage) if 40 < len(s) < 300]
    r.shuffle(candidates)
    for s in candidates[:r.choice([2, 3, 4, 6])]:
        spans = [m for m in SPAN.finditer(s) if m.start() > 0]
        if not spans:
            continue
        m = r.choice(spans)
        answer = m.group().strip(".,")
        if answer[0].isdigit():
            word = "when" if len(answer) == 4 and answer.isdigit() else r.choice(["how many", "what number", "how much"])
        else:
            word = r.choice(["who", "what", "which", "where"])
        before, after = s[:m.start()].split(), s[m.start() + len(m.group()):].split()
        keep = lambda ws: [w for w in ws if r.random() > 0.15]
        if r.random() < 0.5:
            q = [word] + keep(before) + keep(after)
        else:
            q = keep(before) + [word] + keep(after)
        asked.append((" ".join(q).rstrip(".!?:;,") + "?", answer))
    if not asked:
        return None
    form = r.choice(["\n\nQuestion: {q}\nAnswer: {a}\n", "\n\nQuestion: {q}\nAnswer: {a}\n", "\n\nQ: {q}\nA: {a}\n", "\n{q} {a}\n"])
    return passage + "".join(form.format(q=q[0].upper() + q[1:], a=a) for q, a in asked)


SHARES = {"pairs": 0.25, "needles": 0.5, "cloze": 0.25}  # of the bytes
DENSE = {"dense": 0.45, "pairs": 0.05, "needles": 0.35, "cloze": 0.15}


def dense(r, common):
    """Words said again, or pairs of which every one is asked for, up to three times: as much to recall as a document can hold."""
    if r.random() < 0.3:
        words = r.sample(common, r.randrange(8, 65))
        return " " + " ".join(words * r.randrange(2, 5))
    n = int(2 ** r.uniform(2, 6))
    words = r.sample(common, 2 * n)
    table = list(zip(words[:n], words[n:]))
    out = list(table)
    for _ in range(r.randrange(1, 4)):
        r.shuffle(table)
        out += table
    return " " + " ".join(k + " " + v for k, v in out)


def write(job):
    out, seed, number, budget, texts, common, shares = job
    r = random.Random(seed * 1000 + number)
    path = os.path.join(out, "retrieval-%02d.jsonl" % number)
    done = {kind: 0 for kind in shares}
    make = {"dense": lambda: dense(r, common), "pairs": lambda: pairs(r, common), "needles": lambda: needles(r, texts), "cloze": lambda: cloze(r, texts)}
    with open(path + ".part", "w", encoding="utf-8") as f:
        while sum(done.values()) < budget:
            kind = min(done, key=lambda k: done[k] / shares[k])
            text = make[kind]()
            if text is None:
                continue
            done[kind] += len(text.encode())
            f.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    os.replace(path + ".part", path)
    return done


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("text", nargs="+")
    a.add_argument("--out", required=True)
    a.add_argument("--megabytes", type=float, default=40)
    a.add_argument("--dense", action="store_true", help="nearly half of it lists of words in which every pair is asked for")
    a.add_argument("--seed", type=int, default=1)
    a.add_argument("--files", type=int, default=16, help="of the output: the text depends on it")
    a.add_argument("--jobs", type=int, default=os.cpu_count())
    o = a.parse_args()
    os.makedirs(o.out, exist_ok=True)
    texts = [t for path in o.text for t in read(path) if len(t) > 1000]
    counts = {}
    for t in texts[::7]:
        for w in re.findall(r"(?<= )[a-z]{3,}(?= )", t):
            counts[w] = counts.get(w, 0) + 1
    common = sorted(counts, key=lambda w: (-counts[w], w))[100:2600]
    jobs = [(o.out, o.seed, i, o.megabytes * 1e6 / o.files, texts, common, DENSE if o.dense else SHARES) for i in range(o.files)]
    if o.jobs > 1:
        global WORK
        WORK = jobs  # children inherit it
        with multiprocessing.get_context("fork").Pool(o.jobs) as pool:
            done = pool.map(run_job, range(len(jobs)))
    else:
        done = [write(j) for j in jobs]
    print({k: sum(d[k] for d in done) for k in done[0]}, "bytes in", o.out)


def run_job(i):
    return write(WORK[i])


if __name__ == "__main__":
    main()
