#!/usr/bin/env python3
"""Training documents that ask for what stands in them: the share of retrieval in the data mix of recipes/paper.

    retrieval_text.py TEXT... --out FOLDER --megabytes 40 --seed 1 --jobs 16

TEXT: .jsonl files (field "text"; .xz and .zst too), whose passages serve as hay and as passages. Writes FOLDER/retrieval-NN.jsonl, the same for the same text,
seed and megabytes. --mix says in which shares of the bytes (MIXES) the kinds stand:
  pairs    lists of keys and values in several notations, bare words among them, and some of the keys again with their values
  needles  a passage, or a few sentences over and over, in which 1 to 6 facts (a number, a word of hexadecimal digits, a name) are hidden, and questions about them
  dense    words said again, and lists of pairs in which every one is asked for
  cloze    a passage and questions made of its sentences: one span taken out and replaced by a question word, some words dropped
  questions  a passage and questions in the word order of questions, made of its sentences by rules: when, where, who, how many, what
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


SYNONYMS = dict(w.split(":") for w in """big:large large:big begin:start started:began began:started use:employ used:employed called:named many:numerous often:frequently made:produced
important:significant shows:displays help:aid important:key helps:aids near:close|to begin:start ended:finished quickly:rapidly people:persons result:outcome get:receive got:received
important:major small:little found:discovered created:made kinds:types type:kind parts:components increase:growth known:called needs:requires keep:retain large:great show:reveal
different:distinct usually:normally about:concerning""".split())
NUMBER = r"(?:\d[\d,.]*\d|\d|two|three|four|five|six|seven|eight|nine|ten|twelve|twenty|hundreds|thousands|millions)"
PROPER = r"(?:the )?[A-Z][\w'-]+(?: (?:of |the |de )?[A-Z][\w'-]+){0,3}"
CLAUSE = re.compile(r"^((?:In [^,]{3,30}, )?)((?:[A-Z][\w'-]*)(?: [\w'-]+){0,7}?) (is|was|are|were|has|have|had|can|could|will|would|may|must) ([^.!?]+)")
SUBJECT = re.compile(r"^((?:(?:The|A|An|This|Some|Most|Many|All|Each|Both) (?:[a-z'-]+ ){1,3}?)|(?:[A-Z][\w'-]+ ){1,3}?)([a-z]{2,}ed|contains|uses|makes|shows|gives|takes|holds|includes|requires|provides|produces|causes|allows|helps|forms|becomes|means|needs|leads|keeps|became|began|took|gave|made|led|wrote|held|found|fought|won|lost|built|came|went|saw|knew|grew|left) ([a-z][^.!?]{8,})")


def phrase(text, words=6):
    """The first words of a text, up to where a clause ends."""
    return " ".join(re.split(r"[,;:()]| (?:that|which|who|because|when|while|and|but|if|so|where|although) ", text)[0].split()[:words]).strip()


def lower_first(s):
    first = s.split(" ", 1)[0]
    return s[0].lower() + s[1:] if first in ("The", "A", "An", "This", "Some", "Most", "Many", "All", "Each", "Both", "These", "Those", "It", "They", "In") else s


def asked_of(r, s):
    """Questions that a sentence answers, in a question's word order, with the answers: by rules, so some are clumsy."""
    out = []
    m = CLAUSE.match(s)
    if m:
        when, subject, aux, rest = m.group(1).strip(" ,"), lower_first(m.group(2)), m.group(3), m.group(4)
        if when:
            out.append(("when %s %s %s" % (aux, subject, phrase(rest, 9)), when[3:]))
        for d in list(re.finditer(r"\b(?:in|on|since|until|by|from) ((?:[A-Z][a-z]+ )?(?:\d{1,2}, )?\d{4})\b", rest))[:1]:
            out.append((r.choice(["when", "in what year"]) + " %s %s %s" % (aux, subject, rest[:d.start()]), d.group(1)))
        for d in list(re.finditer(r"\b(" + NUMBER + r"(?: percent|%| million| billion)?)((?: [a-z]+){0,1} [a-z]+s)\b", rest))[:2]:
            out.append(("how many%s %s %s %s" % (d.group(2), aux, subject, rest[:d.start()]), d.group(1)))
        for d in list(re.finditer(r"\b(in|at|near|from|to) (" + PROPER + ")", rest))[:1]:
            out.append((r.choice(["where", d.group(1) + " what place"]) + " %s %s %s" % (aux, subject, rest[:d.start()]), d.group(2)))
        for d in list(re.finditer(r"\bby ((?:the |a |an )?[\w'-]+(?: [A-Z][\w'-]+)*)", rest))[:1]:
            out.append((r.choice(["by whom ", "by what "]) + "%s %s %s" % (aux, subject, rest[:d.start()]), d.group(1)))
        answer = phrase(rest)
        if answer:
            out.append(("what %s %s" % (aux, subject), answer))
            who = "who" if re.fullmatch(PROPER, m.group(2)) and r.random() < 0.6 else "what"
            out.append(("%s %s %s" % (who, aux, phrase(rest, 12)), subject))
    m = SUBJECT.match(s)
    if m:
        subject, verb, rest = m.group(1).strip(), m.group(2), m.group(3)
        who = "who" if re.fullmatch(PROPER, subject) and r.random() < 0.6 else "what"
        out.append(("%s %s %s" % (who, verb, phrase(rest, 12)), lower_first(subject)))
        d = re.match(r"((?:the |a |an |its |their )?[a-z'-]+(?: [a-z'-]+){0,3})", rest)
        if d and verb.endswith("s"):
            out.append(("what does %s %s" % (lower_first(subject), verb[:-1]), phrase(d.group(1), 5)))
    spans = [m for m in SPAN.finditer(s) if m.start() > 0]
    for m in r.sample(spans, min(1, len(spans))):
        answer, before, after = m.group().strip(".,"), s[:m.start()].split(), s[m.start() + len(m.group()):].split()
        if answer[:1].isdigit():
            word = r.choice(["when", "in what year"]) if len(answer) == 4 and answer.isdigit() else r.choice(["how many", "how many", "what number", "how much"])
            near = after[:2] + before + after[2:] if word.startswith("how") else before + after
        else:
            word, near = r.choice(["who", "what", "which", "where", "what name"]), before + after
        out.append((word + " " + " ".join(w.strip(",;:()") for w in near[:20]), answer))
    return [(q, a) for q, a in out if 3 < len(q.split()) < 32 and 0 < len(a) < 60 and a.lower() not in ("it", "they", "this", "he", "she", "there", "we", "you", "i", "that", "these", "those", "not")]


def questions(r, texts):
    """A passage, mostly a short one, and up to ten questions on it in the word order of questions, some words dropped or replaced."""
    text = r.choice(texts)
    length = int(2 ** r.uniform(8.2, 11.3))
    start = r.randrange(max(1, len(text) - length))
    passage = text[start:start + length]
    cut = re.search(r"[.?!]\s", passage)
    passage = passage[cut.end():] if cut and cut.end() < length // 2 else passage[passage.find(" ") + 1:]
    passage = " ".join(passage.split()) if r.random() < 0.5 else passage.strip()
    asked = [qa for s in sentences(passage)[:-1] if 30 < len(s) < 350 and not re.search(r"[?#“]|http|\[", s) for qa in asked_of(r, s)]
    if len(asked) < 2:
        return None
    r.shuffle(asked)
    drop, replace, small = r.choice([0, 0.05, 0.12]), r.choice([0, 0.3, 0.8]), r.random() < 0.35
    form = r.choice(["\n\nQuestion: {q}?\nAnswer: {a}"] * 4 + ["\n\nQ: {q}?\nA: {a}", "\n{q}? {a}."])
    out = ""
    if r.random() < 0.25:  # a heading, as many passages have one
        names = [m.group() for m in SPAN.finditer(passage) if m.group()[0].isalpha()]
        out = (r.choice(names) if names else " ".join(passage.split()[:3])) + "\n"
    out += passage
    for q, a in asked[:r.randrange(2, 11)]:
        words = q.split()
        words = [SYNONYMS[w].replace("|", " ") if w in SYNONYMS and r.random() < replace else w for k, w in enumerate(words) if k < 2 or r.random() >= drop]
        q = " ".join(words).rstrip(".!?:;, ")
        if r.random() < 0.5:
            a = re.sub(r"^(the|a|an) ", "", a)
        out += form.format(q=q.lower() if small else q[0].upper() + q[1:], a=a.strip(" .,;"))
    return out + "\n"


MIXES = {  # shares of the bytes
    "plain": {"pairs": 0.25, "needles": 0.5, "cloze": 0.25},
    "dense": {"dense": 0.45, "pairs": 0.05, "needles": 0.35, "cloze": 0.15},
    "questions": {"dense": 0.3, "pairs": 0.05, "needles": 0.25, "cloze": 0.05, "questions": 0.35},
}


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
    make = {"dense": lambda: dense(r, common), "pairs": lambda: pairs(r, common), "needles": lambda: needles(r, texts), "cloze": lambda: cloze(r, texts),
            "questions": lambda: questions(r, texts)}
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
    a.add_argument("--mix", choices=sorted(MIXES), default="plain")
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
    jobs = [(o.out, o.seed, i, o.megabytes * 1e6 / o.files, texts, common, MIXES[o.mix]) for i in range(o.files)]
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
