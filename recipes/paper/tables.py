#!/usr/bin/env python3
"""Fills the tables of a results page from what run.py measured, and draws its pictures.

    tables.py RESULTS PAGE.md                RESULTS: WORK/results of run.py, several as core=WORK/results,ablations=WORK2/results, or a file that --gather wrote
    tables.py RESULTS --gather FILE.json.xz  all results in one file, to be kept

In the page each pair of lines `<!-- table: NAME GROUP -->` and `<!-- end -->` holds one table (of the group `core` where none is named), which is replaced; the text around stays.
Pictures are written where the page shows them (![...](FOLDER/GROUP-NAME.svg)). Figures are means over seeds, with half the distance from the least to the largest behind ±.
"""
import glob, json, lzma, math, os, re, sys

CORE = ["transformer", "gdn", "oryx-gdn", "mamba2", "oryx-mamba2"]
TITLE = {"transformer": "Transformer", "gdn": "Gated DeltaNet", "mamba2": "Mamba-2", "oryx-gdn": "Oryx-GDN", "oryx-mamba2": "Oryx-Mamba-2",
         "inter-layer": "inter-layer hybrid (3 Gated DeltaNet : 1 attention)", "intra-layer": "intra-layer hybrid (mean of both)"}
BASELINE = {"oryx-gdn": "gdn", "oryx-mamba2": "mamba2"}
LM = [("lambada", "acc"), ("hellaswag", "acc_norm"), ("piqa", "acc_norm"), ("arc_easy", "acc"), ("arc_challenge", "acc_norm"), ("openbookqa", "acc_norm"), ("winogrande", "acc"), ("boolq", "acc")]
MIXED_LM = "random(attention=0.1;chunk=64)"


# ---- results

def round_floats(x):
    if isinstance(x, float):
        return float("%.6g" % x)
    if isinstance(x, dict):
        return {k: round_floats(v) for k, v in x.items() if k not in ("seconds",)}
    if isinstance(x, list):
        return [round_floats(v) for v in x]
    return x


def load(path):
    if os.path.isfile(path):
        return json.load(lzma.open(path) if path.endswith(".xz") else open(path))
    groups = {}
    for entry in path.split(","):
        group, folder = entry.split("=", 1) if "=" in entry else ("core", entry)
        out = groups.setdefault(group, {"runs": {}, "bench": {}})
        for d in sorted(glob.glob(os.path.join(folder, "*-seed*"))):
            if not os.path.exists(os.path.join(d, "trained")):
                continue
            run = out["runs"].setdefault(os.path.basename(d), {"tasks": {}})
            run["seconds"] = float(open(os.path.join(d, "trained")).read())
            run["metrics"] = [json.loads(line) for line in open(os.path.join(d, "metrics.jsonl"))]
            for f in glob.glob(os.path.join(d, "*.json")):
                name = os.path.basename(f)[:-5]
                try:
                    j = json.load(open(f))
                except ValueError:
                    continue
                if name in ("config", "inspect"):
                    run[name] = j
                else:
                    run["tasks"][name] = {"options": j["options"], "rows": j["rows"]}
        for f in sorted(glob.glob(os.path.join(folder, "bench", "*.json"))):
            j = json.load(open(f))
            out["bench"][os.path.basename(f)[:-5]] = {k: j[k] for k in ("machine", "options", "rows")}
        f = os.path.join(folder, "dataset.json")
        if os.path.exists(f):
            out["dataset"] = json.load(open(f))
    return round_floats(groups)


class Results:
    def __init__(self, data):
        self.data = data
        self.runs = data["runs"]

    def seeds(self, model):
        return sorted(r for r in self.runs if re.fullmatch(re.escape(model) + r"-seed\d+", r))

    def rows(self, run, task, schedule=None):
        rows = self.runs[run]["tasks"].get(task, {}).get("rows", [])
        if schedule is None:
            return rows
        only = len({r["schedule"] for r in rows}) == 1
        return [r for r in rows if r["schedule"] == schedule or only]

    def values(self, model, task, schedule, key, where=lambda r: True):
        """A value a seed: the mean over the rows that are asked for."""
        out = []
        for run in self.seeds(model):
            rows = [r[key] for r in self.rows(run, task, schedule) if where(r)]
            if rows:
                out.append(sum(rows) / len(rows))
        return out


def mean(v):
    return sum(v) / len(v)


def spread(v):
    return (max(v) - min(v)) / 2


def shown(v, scale=1.0, digits=1, sign=False):
    if not v:
        return "-"
    v = [x * scale for x in v]
    text = "%+.*f" % (digits, mean(v)) if sign else "%.*f" % (digits, mean(v))
    return text + (" ± %.*f" % (digits, spread(v)) if len(v) > 1 else " (one seed)")


def minus(a, b):
    n = min(len(a), len(b))
    return [a[i] - b[i] for i in range(n)]


def table(head, rows):
    return "\n".join(["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)] + ["| " + " | ".join(str(c) for c in r) + " |" for r in rows])


def modes(model):
    return ["linear", "attention"] if model.startswith("oryx") else [{"transformer": "attention"}.get(model, "linear")]


def named(model, mode):
    name = TITLE.get(model, model)
    return name + ", " + {"linear": "linear", "attention": "attention", "question": "question in attention", "queries": "queries in attention", MIXED_LM: "10% attention"}[mode] if model.startswith("oryx") else name


def share(v):
    return "%.1f%%" % (100 * mean(v)) if v else "-"


# ---- tables

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


def parameters(d):
    n = d.get("inspect", {}).get("parameters", {}).get("total")
    return "{:,}".format(n) if isinstance(n, int) else "-"


def t_perplexity(r):
    rows = []
    for m in CORE:
        for s in modes(m) + (["random(attention=0.1;chunk=256)", "random(attention=0.25;chunk=256)"] if m.startswith("oryx") else []):
            v = r.values(m, "perplexity", s, "perplexity")
            if not v:
                continue
            base = r.values("transformer" if s == "attention" else BASELINE.get(m, m), "perplexity", s, "perplexity")
            against = "-" if not m.startswith("oryx") or not base else shown([100 * (a / b - 1) for a, b in zip(v, base)], sign=True) + "%"
            rows.append([TITLE[m] if len(modes(m)) == 1 else TITLE[m] + ", `" + s + "`", share(r.values(m, "perplexity", s, "attention_share")), shown(v, digits=2), against])
    return table(["model, schedule", "attention tokens", "test perplexity", "against its baseline"], rows)


def t_curves(r):
    """Held-out perplexity in the course of training: each mode against its baseline, at the same step of the same seed."""
    curve = lambda run: {(v["step"], {"gated_delta_net": "linear", "mamba2": "linear"}.get(v["schedule"], v["schedule"])): v["perplexity"] for v in r.runs[run]["metrics"] if v["kind"] == "validation"}
    tokens = lambda run: {v["step"]: v["tokens"] for v in r.runs[run]["metrics"] if v["kind"] == "train"}
    rows = []
    steps = []
    for m in ("oryx-gdn", "oryx-mamba2"):
        for mode in ("linear", "attention"):
            base = "transformer" if mode == "attention" else BASELINE[m]
            pairs = [(curve(a), curve(b)) for a, b in zip(r.seeds(m), r.seeds(base))]
            if not pairs:
                continue
            steps = sorted({s for s, k in pairs[0][0] if k == mode})[:8]
            rows.append([TITLE[m] + ", " + mode + ", against " + TITLE[base]] + [shown([100 * (a[(s, mode)] / b[(s, "linear")] - 1) for a, b in pairs], sign=True) + "%" for s in steps])
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
            n = min(len(v) for v in each)
            average = [mean([v[i] for v in each]) for i in range(n)]
            base = "transformer" if s == "attention" else BASELINE.get(m, m)
            b = [r.values(base, task, "linear", key) for task, key in LM]
            against = "-"
            if m.startswith("oryx") and all(b):
                against = shown([average[i] - mean([v[i] for v in b]) for i in range(min(n, min(len(v) for v in b)))], 100, sign=True)
            rows.append([named(m, s), share(r.values(m, "hellaswag", s, "attention_share")), *cells, shown(average, 100), against])
    return table(["model, mode", "attention"] + [t for t, _ in LM] + ["mean", "against its baseline, points"], rows)


RETRIEVAL_MODES = {"oryx-gdn": ["linear", "question", "attention"], "oryx-mamba2": ["linear", "question", "attention"]}


def short_needles(row):
    return row["length"] <= 2048


def long_needles(row):
    return row["length"] > 2048


def retrieval_columns(r, m, s):
    recall = "queries" if s == "question" else s
    real = [r.values(m, t, s, "contains") for t in ("squad", "nq")]
    n = min(len(v) for v in real)
    return {"squad": real[0], "nq": real[1], "real": [mean([v[i] for v in real]) for i in range(n)], "needle": r.values(m, "needle", s, "accuracy", short_needles),
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
    t = retrieval_columns(r, "transformer", "attention")
    for m in ("oryx-gdn", "oryx-mamba2"):
        c = retrieval_columns(r, m, "question")
        b = retrieval_columns(r, BASELINE[m], "linear")
        if any(c.values()):
            rows.append([TITLE[m] + ", question in attention, minus " + TITLE[BASELINE[m]]] + [shown(minus(c[k], b[k]), 100, sign=True) for k in keys])
            rows.append([TITLE[m] + ", question in attention, minus Transformer"] + [shown(minus(c[k], t[k]), 100, sign=True) for k in keys])
    rows.append(["the paper, 1.4B: minus linear baseline", "at least +8.6", "at least +38.6", "", ""])
    return table(["points", "SQuAD and NQ", "needle, to 2,048 tokens", "needle, 4,096", "recall"], rows)


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
            between = [100 * (a / math.exp((1 - p) * math.log(l) + p * math.log(t)) - 1) for a, l, t in zip(v, lin, att)]
            cells += [shown(v, digits=2), shown(between, digits=2, sign=True) + "%" if v else "-"]
        rows.append(["`" + s + "`", share(r.values("oryx-gdn", "perplexity", s, "attention_share"))] + cells)
    return table(["schedule", "attention tokens", "Oryx-GDN", "against its pure modes", "Oryx-Mamba-2", "against its pure modes"], rows)


ABLATIONS = ["oryx-gdn", "shared-query", "separate-kv", "query-conv", "no-conv", "no-conv-activation", "chunk-64", "chunk-1024", "ratio-1-1", "ratio-1-7", "inter-layer", "intra-layer"]
WHAT = {"oryx-gdn": "Oryx-GDN: own query a mode, shared keys and values, chunk 256, 1:3", "shared-query": "one query for both modes (`share_query`)", "separate-kv": "own keys and values (`share_kv=false`)",
        "query-conv": "the linear query convolved too (`query_conv`)", "no-conv": "no convolution", "no-conv-activation": "no activation behind it", "chunk-64": "chunk 64", "chunk-1024": "chunk 1024",
        "ratio-1-1": "attention:linear 1:1", "ratio-1-7": "attention:linear 1:7"}


def t_ablations(r):
    rows = []
    schedules = ["linear", "random(attention=0.25;chunk=256)", "attention"]
    for m in ABLATIONS:
        if not r.seeds(m):
            continue
        single = m in ("inter-layer", "intra-layer")
        cells = []
        for s in schedules[:1] if single else schedules:
            v, base = r.values(m, "perplexity", s, "perplexity"), r.values("oryx-gdn", "perplexity", s, "perplexity")
            cells.append("%.2f" % mean(v) + ("" if m == "oryx-gdn" or single else " (%+.1f%%)" % (100 * (mean(v) / mean(base) - 1))))
        if single:
            cells = ["-", cells[0] + " (its only mode)", "-"]
        run = r.seeds(m)[0]
        rows.append([WHAT.get(m, TITLE.get(m, m)), r.runs[run]["config"]["model"]["intermediate_size"], parameters(r.runs[run])] + cells)
    return table(["one seed each", "F", "parameters", "test perplexity, linear", "25% attention", "attention"], rows)


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


def t_policies(r):
    rows = []
    for m in ("oryx-gdn", "oryx-mamba2"):
        for s in list(dict.fromkeys(x["schedule"] for run in r.seeds(m) for x in r.rows(run, "policies"))):
            v = r.values(m, "policies", s, "accuracy")
            rows.append([TITLE[m], "`" + s + "`", share(r.values(m, "policies", s, "attention_share"))]
                        + [shown(r.values(m, "policies", s, "accuracy", lambda x, k=k: x["kind"] == k), 100) for k in ("noise", "essay_number", "essay_word")] + [shown(v, 100)])
    return table(["model", "schedule", "attention tokens", "noise", "essay_number", "essay_word", "mean"], rows)


def human(n):
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            return "%.1f %s" % (n, unit)
        n /= 1024


TABLES = {k[2:]: f for k, f in globals().items() if k.startswith("t_")}


# ---- pictures

COLOURS = {"transformer": "#3565a8", "gdn": "#c2571a", "oryx-gdn": "#2b8a4b", "mamba2": "#8a5a9e", "oryx-mamba2": "#a8892b"}


def svg(title, x_label, y_label, series, log_x=False, width=720, height=380, zero=True):
    """series: (name, colour, [(x, y, spread, label)])"""
    points = [p for _, _, ps in series for p in ps]
    f = (lambda x: math.log10(x)) if log_x else (lambda x: x)
    xs, ys = [f(p[0]) for p in points], [p[1] for p in points]
    x0, x1 = min(xs), max(xs)
    pad = (x1 - x0) * 0.06 or 1
    x0, x1, y0, y1 = x0 - pad, x1 + pad, 0 if zero else min(ys) * 0.95, 1.08 * max(p[1] + p[2] for p in points) or 1
    X = lambda x: 60 + (f(x) - x0) / (x1 - x0) * (width - 90)
    Y = lambda y: height - 50 - (y - y0) / (y1 - y0) * (height - 100)
    out = ['<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12">' % (width, height, width, height),
           "<style>svg{background:#fff}text{fill:#222}@media(prefers-color-scheme:dark){svg{background:#111}text{fill:#ddd}}</style>",
           '<text x="60" y="20" font-size="14">%s</text>' % title, '<text x="%d" y="%d" text-anchor="middle">%s</text>' % (width / 2, height - 10, x_label),
           '<text x="14" y="%d" transform="rotate(-90 14 %d)" text-anchor="middle">%s</text>' % (height / 2, height / 2, y_label)]
    step = 10 ** math.floor(math.log10((y1 - y0) / 4))
    step *= 5 if (y1 - y0) / step > 20 else 2 if (y1 - y0) / step > 8 else 1
    y = math.ceil(y0 / step) * step
    while y <= y1:
        out.append('<path d="M60 %.1fH%d" stroke="#999" stroke-opacity=".35"/><text x="54" y="%.1f" text-anchor="end">%g</text>' % (Y(y), width - 30, Y(y) + 4, y))
        y += step
    ticks = sorted({p[0] for p in points}) if log_x and len({p[0] for p in points}) < 7 else None
    if ticks is None:
        s = 10 ** math.floor(math.log10((x1 - x0) / 4)) if not log_x else 1
        s *= 5 if (x1 - x0) / s > 20 else 2 if (x1 - x0) / s > 8 else 1
        ticks, t = [], math.ceil(x0 / s) * s
        while t <= x1:
            ticks.append(10 ** t if log_x else t)
            t += s
    for t in ticks:
        out.append('<text x="%.1f" y="%d" text-anchor="middle">%s</text>' % (X(t), height - 32, "{:,.0f}".format(t) if t >= 100 else "%.3g" % t))
    for k, (name, colour, ps) in enumerate(series):
        if len(ps) > 1:
            out.append('<path d="M%s" fill="none" stroke="%s" stroke-width="1.5"/>' % ("L".join("%.1f %.1f" % (X(p[0]), Y(p[1])) for p in ps), colour))
        for x, y, e, label in ps:
            out.append('<path d="M%.1f %.1fV%.1f" stroke="%s"/><circle cx="%.1f" cy="%.1f" r="4" fill="%s"><title>%s</title></circle>' % (X(x), Y(y - e), Y(y + e), colour, X(x), Y(y), colour, label))
            if label and len(ps) > 1:
                out.append('<text x="%.1f" y="%.1f" font-size="10">%s</text>' % (X(x) + 6, Y(y) - 6, label))
        out.append('<circle cx="%d" cy="34" r="4" fill="%s"/><text x="%d" y="38">%s</text>' % (66 + 122 * k, colour, 74 + 122 * k, name))
    return "\n".join(out + ["</svg>\n"])


def points(r, task, y_key, x_key, where=lambda row: True):
    series = []
    for m in CORE:
        ps = []
        for s in RETRIEVAL_MODES.get(m, modes(m)):
            y, x = r.values(m, task, s, y_key, where), r.values(m, task, s, x_key, where)
            if y:
                ps.append((mean(x), 100 * mean(y), 100 * spread(y), s))
        if ps:
            series.append((TITLE[m], COLOURS[m], ps))
    return series


def pictures(r):
    flops = lambda series: [(n, c, [(x / 1e6, y, e, l) for x, y, e, l in ps]) for n, c, ps in series]
    mib = lambda series: [(n, c, [(x / 2 ** 20, y, e, l) for x, y, e, l in ps]) for n, c, ps in series]
    at2048 = lambda row: row["length"] == 2048
    out = {}
    for task, key, where, title in (("needle", "accuracy", at2048, "Needle, prompts of 2,048 tokens"), ("squad", "contains", lambda row: True, "SQuAD")):
        a, b = points(r, task, key, "flops_per_token", where), points(r, task, key, "state_bytes", where)
        if a:
            out["%s-flops" % task] = svg(title + ": accuracy against FLOPs", "forward MFLOPs a token", "% found", flops(a))
            out["%s-state" % task] = svg(title + ": accuracy against state", "MiB of state of one sequence at its end (recurrent and KV)", "% found", mib(b))
    lengths = []
    for m in CORE:
        for s in RETRIEVAL_MODES.get(m, modes(m)):
            ps = []
            for n in sorted({x["length"] for run in r.runs for x in r.rows(run, "needle")}):
                v = r.values(m, "needle", s, "accuracy", lambda x, n=n: x["length"] == n)
                if v:
                    ps.append((n, 100 * mean(v), 100 * spread(v), ""))
            if ps and (not m.startswith("oryx") or s == "question"):
                lengths.append((TITLE[m] + (", mixed" if m.startswith("oryx") else ""), COLOURS[m], ps))
    if lengths:
        out["needle-length"] = svg("Needle by length of the prompt (trained on 2,048)", "tokens", "% found", lengths, log_x=True, width=760)
    series = []
    for m in CORE:
        ps = []
        for s in ["linear"] + ["random(attention=%s;chunk=256)" % x for x in ("0.05", "0.1", "0.25", "0.5")] + ["attention"] if m.startswith("oryx") else modes(m):
            v = r.values(m, "perplexity", s, "perplexity")
            if v:
                a = mean(r.values(m, "perplexity", s, "attention_share"))
                ps.append((mean(r.values(m, "perplexity", s, "flops_per_token")) / 1e6, mean(v), spread(v), "%.0f%%" % (100 * a)))
        if ps:
            series.append((TITLE[m], COLOURS[m], ps))
    if series:
        out["perplexity-flops"] = svg("Test perplexity by share of tokens in attention", "forward MFLOPs a token (windows of 2,048)", "perplexity", series, zero=False)
    ms = []
    for name, b in sorted(r.data["bench"].items()):
        if name.startswith("prefill-"):
            model = name[8:]
            for share_ in sorted({round(x["attention_share"], 2) for x in b["rows"]}):
                ps = [(x["tokens"], 1e3 * x["ms"] / x["tokens"], 0, "") for x in b["rows"] if round(x["attention_share"], 2) == share_]
                if model in ("oryx-gdn", "transformer") and share_ in (0, 0.1, 1) or model == "transformer":
                    ms.append((("Oryx %d%%" % round(100 * share_)) if model == "oryx-gdn" else TITLE[model], ["#2b8a4b", "#7cc08f", "#145a2d", "#3565a8", "#c2571a"][len(ms) % 5], ps))
    if ms:
        out["prefill"] = svg("Reading a prompt: time a token", "tokens of the prompt", "microseconds a token", ms, log_x=True)
    return out


# ---- pages

def fill(page, r):
    text = open(page).read()

    def block(m):
        name, group = m.group(1), m.group(2) or "core"
        if name not in TABLES or group not in r:
            sys.exit("%s: no table '%s' of '%s'; known: %s, of %s" % (page, name, group, ", ".join(sorted(TABLES)), ", ".join(r)))
        return "<!-- table: %s -->\n%s\n<!-- end -->" % (name + (" " + m.group(2) if m.group(2) else ""), TABLES[name](r[group]))

    text = re.sub(r"<!-- table: (\w+)(?: (\w+))? -->\n.*?<!-- end -->", block, text, flags=re.S)
    open(page, "w").write(text)
    pics = {"%s-%s" % (group, name): svg for group, results in r.items() for name, svg in pictures(results).items()}
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+\.svg)\)", text):
        name = os.path.basename(path)[:-4]
        if name not in pics:
            print("%s: no picture '%s' from these results; known: %s" % (page, name, ", ".join(pics)))
            continue
        to = os.path.join(os.path.dirname(page), path)
        os.makedirs(os.path.dirname(to), exist_ok=True)
        open(to, "w").write(pics[name])


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
    fill(sys.argv[2], {group: Results(d) for group, d in data.items()})


if __name__ == "__main__":
    main()
