#!/usr/bin/env python3
"""Fills the tables of a results page from what run.py measured, and draws its pictures.

    tables.py RESULTS PAGE.md...             RESULTS: WORK/results of run.py, several as core=WORK/results,ablations=WORK2/results, or a file that --gather wrote
    tables.py RESULTS --gather FILE.json.xz  all results in one file, to be kept

In the page each pair of lines `<!-- table: NAME GROUP -->` and `<!-- end -->` holds one table (of the group `core` where none is named), which is replaced; the text around stays. GROUP+GROUP is a table of several.
Tables whose name begins with `sweep_` are of a file that `oryx sweep` wrote beside the page, FOLDER/GROUP.json.
Pictures are written where the page shows them (![...](FOLDER/GROUP-NAME.svg)). Figures are means over seeds, with half the distance from the least to the largest behind ±.
"""
import json, lzma, math, os, re, sys

sys.dont_write_bytecode = True
import pictures
import token_tables
from results import (BASELINE, CORE, LM, MIXED_LM, RETRIEVAL_MODES, TITLE, Results, Values, above, human, load, mean, minus, modes, named, pairs, parameters, percent, share, shown, table)


def t_models(r):
    rows = []
    for m in CORE + ["inter-layer", "intra-layer"]:
        for run in r.seeds(m)[:1]:
            d = r.runs[run]
            train = [x for x in d["metrics"] if x["kind"] == "train"]
            c = d["config"]
            tps = sorted(x["tokens_per_second"] for x in train)[len(train) // 2]
            rows.append([TITLE[m], c["model"]["intermediate_size"], parameters(d), "%.1fM" % (train[-1]["tokens"] / 1e6), "%.2fM" % (tps / 1e6), len(r.seeds(m))])
    return table(["model", "F", "parameters", "tokens trained", "tokens/s in training", "seeds"], rows)


def t_perplexity(r):
    """`linear` of a model with one mode is that mode (Results.rows)."""
    rows, control = [], r.values("attention-alone", "perplexity", "attention", "perplexity")
    for m in CORE:
        for s in modes(m) + (["random(attention=0.1;chunk=256)", "random(attention=0.25;chunk=256)"] if m.startswith("oryx") else []):
            v = r.values(m, "perplexity", s, "perplexity")
            if not v:
                continue
            base = r.values("transformer" if s == "attention" else BASELINE.get(m, m), "perplexity", s, "perplexity")
            against = ["-" if m in (*BASELINE.values(), "transformer") or not pairs(v, base) else percent(above(v, base))]
            if control:
                against.append(percent(above(v, control)) if m.startswith("oryx") and s == "attention" else "-")
            rows.append([TITLE[m] if len(modes(m)) == 1 else TITLE[m] + ", `" + s + "`", share(r.values(m, "perplexity", s, "attention_share")), shown(v, digits=2)] + against)
    return table(["model, schedule", "attention tokens", "test perplexity", "against its baseline"] + ["against attention alone in this layer"] * bool(control), rows)


def t_curves(r):
    """Held-out perplexity in the course of training: each mode against its baseline, at the same step of the same seed."""
    def curve(m):
        linear = {"gated_delta_net": "linear", "mamba2": "linear"}
        return {int(run.rsplit("-seed", 1)[1]): {(v["step"], linear.get(v["schedule"], v["schedule"])): v["perplexity"] for v in r.runs[run]["metrics"] if v["kind"] == "validation"}
                for run in r.seeds(m)}

    rows, steps = [], []
    for m in BASELINE:
        for mode, base in (("linear", BASELINE[m]), ("attention", "transformer"), ("attention", "attention-alone")):
            a, b = curve(m), curve(base)
            seeds = sorted(set(a) & set(b))
            if not seeds:
                continue
            steps = sorted({s for s, k in a[seeds[0]] if k == mode})[:8]
            of = lambda c, s: c[(s, mode)] if (s, mode) in c else c[(s, "linear")]
            rows.append([TITLE[m] + ", " + mode + ", against " + TITLE[base]] + [percent([100 * (of(a[n], s) / of(b[n], s) - 1) for n in seeds]) for s in steps])
    run = r.seeds("oryx-mamba2")[0]
    c = r.runs[run]["config"]
    return table(["held-out perplexity after"] + ["%.0fM tokens" % (s * c["batch_size"] * c["seq_len"] / 1e6) for s in steps], rows)


def t_lm(r):
    rows = []
    for m in CORE:
        for s in modes(m) + ([MIXED_LM] if m.startswith("oryx") else []):
            cells, each = [], []
            for task, key in LM:
                v = r.values(m, task, s, key)
                cells.append("%.1f" % (100 * mean(v)) if v else "-")
                each.append(v)
            if not all(each):
                continue
            average = Values({n: mean([v.of[n] for v in each]) for n in set.intersection(*(set(v.of) for v in each))})
            base = "transformer" if s == "attention" else BASELINE.get(m, m)
            b = [r.values(base, task, "linear", key) for task, key in LM]
            against = "-"
            if m.startswith("oryx") and all(b):
                against = shown(minus(average, Values({n: mean([v.of[n] for v in b]) for n in set.intersection(*(set(v.of) for v in b))})), 100, sign=True)
            rows.append([named(m, s), share(r.values(m, "hellaswag", s, "attention_share")), *cells, shown(average, 100), against])
    return table(["model, mode", "attention"] + [t for t, _ in LM] + ["mean", "against its baseline, points"], rows)


def short_needles(row):
    return row["length"] <= 2048


def long_needles(row):
    return row["length"] > 2048


def retrieval_columns(r, m, s):
    recall = "queries" if s == "question" else s
    real = [r.values(m, t, s, "contains") for t in ("squad", "nq")]
    both = Values({n: mean([v.of[n] for v in real]) for n in set(real[0].of) & set(real[1].of)})
    return {"squad": real[0], "nq": real[1], "real": both, "needle": r.values(m, "needle", s, "accuracy", short_needles),
            "long": r.values(m, "needle", s, "accuracy", long_needles), "recall": r.values(m, "recall", recall, "accuracy")}


def t_retrieval(r):
    rows, keys = [], ["squad", "nq", "real", "needle", "long", "recall"]
    for m in CORE:
        for s in RETRIEVAL_MODES.get(m, modes(m)):
            c = retrieval_columns(r, m, s)
            if any(c.values()):
                shares = [mean(v) for v in (r.values(m, t, s, "attention_share") for t in ("squad", "nq", "needle")) if v]
                rows.append([named(m, s), " / ".join("%.1f%%" % (100 * x) for x in shares)] + [shown(c[k], 100) for k in keys])
    return table(["model, mode", "attention tokens (SQuAD / NQ / needle)", "SQuAD", "NQ", "mean of both", "needle, to 2,048 tokens", "needle, 4,096", "recall"], rows)


def t_retrieval_gaps(r):
    rows, keys = [], ["real", "needle", "long", "recall"]
    for m in BASELINE:
        c = retrieval_columns(r, m, "question")
        b = retrieval_columns(r, BASELINE[m], "linear")
        if any(c.values()) and any(b.values()):
            rows.append([TITLE[m] + ", question in attention, minus " + TITLE[BASELINE[m]]] + [shown(minus(c[k], b[k]), 100, sign=True) for k in keys])
        for other in ("transformer", "attention-alone"):
            t = retrieval_columns(r, other, "attention")
            if any(c.values()) and any(t.values()):
                rows.append([TITLE[m] + ", question in attention, minus " + TITLE[other].replace("Attention", "attention")] + [shown(minus(c[k], t[k]), 100, sign=True) for k in keys])
    rows.append(["the paper, 1.4B: minus linear baseline", "at least +8.6", "at least +38.6", "", ""])
    return table(["points", "SQuAD and NQ", "needle, to 2,048 tokens", "needle, 4,096", "recall"], rows)


SETS = {"core": "first set", "retrieval": "second set", "third": "second set", "questions": "third set"}


def j_each_seed(groups):
    """Mixed inference minus what it is held against, every seed of several groups beside the others."""
    columns, rows = [], []
    for group, r in groups:
        columns += [(group, r, n) for n in sorted({int(run.rsplit("-seed", 1)[1]) for run in r.runs})]
    of = {}
    for group, r in groups:
        for m in CORE:
            for s in RETRIEVAL_MODES.get(m, modes(m)):
                of[group, m, s] = retrieval_columns(r, m, s)
    for key, title in (("needle", "needle, to 2,048 tokens"), ("real", "SQuAD and NQ"), ("recall", "recall")):
        for m in ("oryx-gdn", "oryx-mamba2"):
            others = [(BASELINE[m], "linear", TITLE[BASELINE[m]]), ("transformer", "attention", TITLE["transformer"]), ("attention-alone", "attention", "attention alone in this layer"), (m, "attention", "itself wholly in attention")]
            for other, mode, name in others:
                cells = []
                for group, _, n in columns:
                    a, b = of[group, m, "question"][key], of[group, other, mode][key]
                    cells.append(100 * (a.of[n] - b.of[n]) if n in a.of and n in b.of else None)
                have = [c for c in cells if c is not None]
                if have:
                    rows.append(["%s: %s minus %s" % (title, TITLE[m], name)] + ["-" if c is None else "%+.1f" % c for c in cells] + ["%d of %d" % (sum(c > 0 for c in have), len(have))])
    return table(["points"] + ["%s, seed %d" % (SETS[group], n) for group, _, n in columns] + ["above 0"], rows)


def t_needle(r):
    kinds = ["noise", "essay_number", "essay_word"]
    lengths = sorted({x["length"] for run in r.runs for x in r.rows(run, "needle")})
    rows = []
    for m in CORE:
        for s in RETRIEVAL_MODES.get(m, modes(m)):
            cells = [shown(r.values(m, "needle", s, "accuracy", lambda x, k=k, n=n: x["kind"] == k and x["length"] == n), 100, 0) for k in kinds for n in lengths]
            if any(c != "-" for c in cells):
                rows.append([named(m, s)] + [c.replace(" ± 0", "") for c in cells])
    return table(["model, mode"] + ["%s %d" % (k, n) for k in kinds for n in lengths], rows)


def t_depth(r):
    depths = sorted({x["depth"] for run in r.runs for x in r.rows(run, "needle")})
    rows = []
    for m in CORE:
        for s in RETRIEVAL_MODES.get(m, modes(m)):
            cells = [shown(r.values(m, "needle", s, "accuracy", lambda x, d=d: x["depth"] == d), 100, 0) for d in depths]
            if any(c != "-" for c in cells):
                rows.append([named(m, s)] + cells)
    return table(["model, mode"] + ["depth %g" % d for d in depths], rows)


def t_recall(r):
    cases = sorted({(x["pairs"], x["length"]) for run in r.runs for x in r.rows(run, "recall")})
    rows = []
    for m in CORE:
        for s in [("queries" if x == "question" else x) for x in RETRIEVAL_MODES.get(m, modes(m))]:
            cells = [shown(r.values(m, "recall", s, "accuracy", lambda x, c=c: (x["pairs"], x["length"]) == c), 100, 0) for c in cases]
            if any(c != "-" for c in cells):
                rows.append([named(m, s), share(r.values(m, "recall", s, "attention_share"))] + [c.replace(" ± 0", "") for c in cells])
    return table(["model, mode", "attention"] + ["%d pairs, %d tokens" % c for c in cases], rows)


def t_shared(r):
    rows = []
    for m in ("oryx-gdn", "oryx-mamba2"):
        for run in r.seeds(m)[:1]:
            for mode in r.runs[run].get("inspect", {}).get("parameters", {}).get("modes", []):
                rows.append([TITLE[m], mode["mode"], "{:,}".format(mode["parameters"]), "%.1f%%" % (100 * mode["shared_share"])])
    return table(["model", "mode", "parameters that it uses", "shared with the other"], rows)


def t_schedules(r):
    rows = []
    order = []
    for m in ("oryx-gdn", "oryx-mamba2"):
        for run in r.seeds(m):
            for x in r.rows(run, "perplexity"):
                if x["schedule"] not in order:
                    order.append(x["schedule"])
    for s in order:
        cells = []
        for m in ("oryx-gdn", "oryx-mamba2"):
            v = r.values(m, "perplexity", s, "perplexity")
            lin, att = r.values(m, "perplexity", "linear", "perplexity"), r.values(m, "perplexity", "attention", "perplexity")
            p = mean(r.values(m, "perplexity", s, "attention_share")) if v else 0
            between = [100 * (a / math.exp((1 - p) * math.log(l) + p * math.log(t)) - 1) for a, l, t in pairs(v, lin, att)]
            cells += [shown(v, digits=2), shown(between, digits=2, sign=True) + "%" if v else "-"]
        rows.append(["`" + s + "`", share(r.values("oryx-gdn", "perplexity", s, "attention_share"))] + cells)
    return table(["schedule", "attention tokens", "Oryx-GDN", "against its pure modes", "Oryx-Mamba-2", "against its pure modes"], rows)


ABLATIONS = ["oryx-gdn", "shared-query", "separate-kv", "query-conv", "no-conv", "no-conv-activation", "chunk-64", "chunk-1024", "ratio-1-1", "ratio-1-7", "inter-layer", "intra-layer"]
WHAT = {"oryx-gdn": "Oryx-GDN: own query a mode, shared keys and values, chunk 256, 1:3", "shared-query": "one query for both modes (`share_query`)", "separate-kv": "own keys and values (`share_kv=false`)",
        "query-conv": "the linear query convolved too (`query_conv`)", "no-conv": "no convolution", "no-conv-activation": "no activation behind it", "chunk-64": "chunk 64", "chunk-1024": "chunk 1024",
        "ratio-1-1": "attention:linear 1:1", "ratio-1-7": "attention:linear 1:7"}


def t_ablations(r):
    """The change beside the first row is taken seed by seed: both have the same order of data."""
    rows = []
    schedules = ["linear", "random(attention=0.25;chunk=256)", "attention"]
    for m in ABLATIONS:
        if not r.seeds(m):
            continue
        single = m in ("inter-layer", "intra-layer")
        cells = []
        for s in schedules[:1] if single else schedules:
            v, base = r.values(m, "perplexity", s, "perplexity"), r.values("oryx-gdn", "perplexity", s, "perplexity")
            cells.append(shown(v) if m == "oryx-gdn" or single else "%.1f (%s%%)" % (mean(v), shown(above(v, base), sign=True)))
        if single:
            cells = ["-", cells[0] + " (its only mode)", "-"]
        run = r.seeds(m)[0]
        rows.append([WHAT.get(m, TITLE.get(m, m)), r.runs[run]["config"]["model"]["intermediate_size"], parameters(r.runs[run])] + cells)
    return table(["%d seeds each" % len(r.seeds("oryx-gdn")), "F", "parameters", "test perplexity, linear", "25% attention", "attention"], rows)


def t_cost(r):
    lengths = sorted({x["tokens"] for name, b in r.data["bench"].items() if name.startswith("prefill-") for x in b["rows"]})
    rows = []
    for model in ["transformer", "gdn", "oryx-gdn", "oryx-gdn-drop", "mamba2", "oryx-mamba2"]:
        b = r.data["bench"].get("prefill-" + model)
        for s in sorted({round(x["attention_share"], 2) for x in b["rows"]}) if b else []:
            at = {x["tokens"]: x for x in b["rows"] if round(x["attention_share"], 2) == s}
            title = TITLE["oryx-gdn"] + ", `--kv drop`" if model.endswith("-drop") else TITLE[model]
            rows.append([title, "%.0f%%" % (100 * s)] + ["%.1f" % at[n]["ms"] if n in at else "-" for n in lengths] + [human(at[n]["state_bytes"]) for n in (lengths[0], lengths[-1])])
    return table(["model", "prompt tokens in attention"] + ["{:,} tokens, ms".format(n) for n in lengths] + ["state at {:,}".format(n) for n in (lengths[0], lengths[-1])], rows)


def t_decode(r):
    contexts = sorted({x["context"] for name, b in r.data["bench"].items() if name.startswith("decode-") for x in b["rows"]})
    rows = []
    for model in CORE:
        for mode in ("linear", "attention"):
            b = r.data["bench"].get("decode-%s-%s" % (model, mode))
            if b:
                at = {x["context"]: x for x in b["rows"]}
                last = at[contexts[-1]]
                rows.append([named(model, mode)] + ["%.2f" % at[n]["ms_per_token"] for n in contexts] + ["%.3f" % last["bound_ms"], human(last["measured_bytes"]), human(last["recurrent_bytes"])])
    return table(["model, mode"] + ["ms a token behind {:,}".format(n) for n in contexts] + ["bytes it reads / bandwidth, ms", "state at {:,}".format(contexts[-1]), "of it recurrent"], rows)


JOINT = {k[2:]: f for k, f in globals().items() if k.startswith("j_")}  # of several groups
TABLES = {k[2:]: f for module in (globals(), vars(token_tables)) for k, f in module.items() if k.startswith("t_")}


# ---- pages

def fill(page, groups):
    text = open(page).read()
    folder = re.sub(r"\.md$", "", page)

    def block(m):
        name, group = m.group(1), m.group(2) or "core"
        if name.startswith("sweep_"):
            known, source = token_tables.SWEEPS, os.path.join(folder, group + ".json")
            if name in known and os.path.exists(source):
                return "<!-- table: %s %s -->\n%s\n<!-- end -->" % (name, group, known[name](json.load(open(source))))
            sys.exit("%s: no table '%s' of %s; known: %s" % (page, name, source, ", ".join(known)))
        if "+" in group and name in JOINT and all(g in groups for g in group.split("+")):
            return "<!-- table: %s %s -->\n%s\n<!-- end -->" % (name, group, JOINT[name]([(g, groups[g]) for g in group.split("+")]))
        if name not in TABLES or group not in groups:
            sys.exit("%s: no table '%s' of '%s'; known: %s, of %s" % (page, name, group, ", ".join(sorted(TABLES)), ", ".join(groups)))
        made = TABLES[name](groups[group])
        if all(len(groups[group].seeds(run.rsplit("-seed", 1)[0])) == 1 for run in groups[group].runs):
            made = made.replace(" (one seed)", "")  # the page says so of the whole group
        return "<!-- table: %s -->\n%s\n<!-- end -->" % (name + (" " + m.group(2) if m.group(2) else ""), made)

    text = re.sub(r"<!-- table: (\w+)(?: ([\w+]+))? -->\n.*?<!-- end -->", block, text, flags=re.S)
    open(page, "w").write(text)
    drawn = {"%s-%s" % (group, name): svg for group, r in groups.items() for name, svg in pictures.pictures(r).items()}
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+\.svg)\)", text):
        name = os.path.basename(path)[:-4]
        to = os.path.join(os.path.dirname(page), path)
        if name in drawn:
            os.makedirs(os.path.dirname(to), exist_ok=True)
            open(to, "w").write(drawn[name])
        elif not os.path.exists(to):
            print("%s: no picture '%s' from these results; known: %s" % (page, name, ", ".join(drawn)))


def main():
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    data = load(sys.argv[1])
    if sys.argv[2] == "--gather":
        for run in (run for group in data.values() for run in group["runs"].values()):
            run["metrics"] = [m for k, m in enumerate(run["metrics"]) if m["kind"] != "train" or k % 8 == 0 or k + 12 > len(run["metrics"])]
        text = (json.dumps(data, separators=(",", ":")) + "\n").encode()
        open(sys.argv[3], "wb").write(lzma.compress(text, preset=9) if sys.argv[3].endswith(".xz") else text)
        return
    groups = {group: Results(d) for group, d in data.items()}
    for page in sys.argv[2:]:
        fill(page, groups)


if __name__ == "__main__":
    main()
