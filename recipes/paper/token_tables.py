"""Tables and curves of which tokens deserve attention and whose keys and values are worth keeping: needles of run.py's models (tasks `policies` and `kv-*` of a plan), and files of `oryx sweep`."""
import re

from results import TITLE, mean, share, shown, spread, table

VARIANTS = ("oryx-gdn", "oryx-mamba2")
KINDS = ("noise", "essay_number", "essay_word")
# Schedules that differ in one number: the rule, how it is written, and the number's place.
RULES = [("last tokens", "linear,last(attention={}),attention@gen", "#3565a8"), ("random tokens", "linear,random(attention={};chunk=1),attention@gen", "#c2571a"),
         ("random chunks of 64", "linear,random(attention={};chunk=64),attention@gen", "#a8892b"), ("most surprising", "linear,surprise(attention={}),attention@gen", "#8a5a9e")]
KEPT = [("write", "rows that change the state most", "#2b8a4b"), ("surprise", "most surprising rows", "#8a5a9e"), ("random", "random rows", "#c2571a"), ("window", "last rows", "#3565a8")]


def numbers(r, template, task="policies"):
    """The numbers for which `template` was run, with the schedule of each."""
    pattern = re.compile(re.escape(template).replace(re.escape("{}"), r"([\d.]+)"))
    found = {}
    for m in VARIANTS:
        for run in r.seeds(m):
            for row in r.rows(run, task):
                hit = pattern.fullmatch(row["schedule"])
                if hit:
                    found[float(hit.group(1))] = row["schedule"]
    return dict(sorted(found.items()))


def t_policies(r):
    """Every schedule that is no point of a curve."""
    rows = []
    of_curves = {s for _, template, _ in RULES[1:] for s in numbers(r, template).values()}
    if numbers(r, RULES[1][1]):
        of_curves |= set(numbers(r, RULES[0][1]).values())
    for m in VARIANTS:
        for s in list(dict.fromkeys(x["schedule"] for run in r.seeds(m) for x in r.rows(run, "policies"))):
            if s in of_curves:
                continue
            v = r.values(m, "policies", s, "accuracy")
            rows.append([TITLE[m], "`" + s + "`", share(r.values(m, "policies", s, "attention_share"))]
                        + [shown(r.values(m, "policies", s, "accuracy", lambda x, k=k: x["kind"] == k), 100) for k in KINDS] + [shown(v, 100)])
    return table(["model", "schedule", "attention tokens", "noise", "essay_number", "essay_word", "mean"], rows)


def t_last(r):
    """Found by the number of last tokens of the prompt in attention (the answer is too)."""
    counts = numbers(r, RULES[0][1])
    none = "linear,attention@gen"
    rows = [[TITLE[m]] + [shown(r.values(m, "policies", s, "accuracy"), 100) for s in (none, *counts.values(), "attention")] for m in VARIANTS if r.seeds(m)]
    shares = ["tokens in attention"] + [share(r.values(VARIANTS[0], "policies", s, "attention_share")) for s in (none, *counts.values(), "attention")]
    return table(["last tokens in attention", "0"] + ["%d" % n for n in counts] + ["all"], [shares] + rows)


def t_shares(r):
    """Found by the share of tokens in attention, for rules that do not know where the question is."""
    all_shares = sorted({n for _, template, _ in RULES[1:] for n in numbers(r, template)})
    rows = []
    for m in VARIANTS:
        for rule, template, _ in RULES[1:]:
            at = numbers(r, template)
            if at and r.seeds(m):
                rows.append(["%s, %s" % (TITLE[m], rule)] + [shown(r.values(m, "policies", at[n], "accuracy"), 100) if n in at else "-" for n in all_shares])
    return table(["tokens in attention"] + ["%g%%" % (100 * n) for n in all_shares], rows)


def budgets(r, kind="kv"):
    return sorted({int(t.rsplit("-", 1)[1]) for run in r.runs.values() for t in run["tasks"] if re.fullmatch(kind + r"-write-\d+", t)})


def rows_kept(r, kind, budget):
    """Chosen rows, the first ones and the window together."""
    written = next(run["tasks"][t]["options"]["kv"] for run in r.runs.values() for t in run["tasks"] if t == "%s-write-%d" % (kind, budget))
    return sum(int(x) for x in re.fullmatch(r"write:budget=(\d+),first=(\d+),window=(\d+)", written).groups())


def kib(r, m, task):
    """KiB of keys and values: the state's bytes beyond those of a state that keeps none."""
    v, none = r.values(m, task, "", "state_bytes"), r.values(m, task.split("-")[0] + "-drop", "", "state_bytes")
    return (mean(v) - mean(none)) / 1024 if v and none else 0.0


def t_kv(r):
    """Found, and nats a token of the answer, by rows kept: with the last 8 tokens and the answer in attention."""
    sizes, rows = budgets(r), []

    def cell(m, task):
        found, nats = r.values(m, task, "", "accuracy"), r.values(m, task, "", "nats")
        return "%s%%, %s" % (shown(found, 100).replace(" (one seed)", ""), shown(nats, digits=2).replace(" (one seed)", "")) if found else "-"

    for m in VARIANTS:
        if not r.values(m, "kv-keep", "", "accuracy"):
            continue
        one = " (one seed)" if len(r.values(m, "kv-keep", "", "accuracy")) == 1 else ""
        rows.append(["%s%s: KiB of keys and values" % (TITLE[m], one), "0"] + ["{:,.0f}".format(kib(r, m, "kv-write-%d" % b)) for b in sizes] + ["{:,.0f}".format(kib(r, m, "kv-keep"))])
        for by, title, _ in KEPT:
            ends = [cell(m, t) for t in ("kv-drop", "kv-keep")] if by == KEPT[0][0] else ["", ""]
            rows.append([title, ends[0], *[cell(m, "kv-%s-%d" % (by, b)) for b in sizes], ends[1]])
    return table(["rows kept", "none (wholly linear)"] + ["%d" % rows_kept(r, "kv", b) for b in sizes] + ["all"], rows)


def t_text(r):
    """Perplexity of text wholly in attention, by rows kept."""
    sizes, rows = budgets(r, "text"), []
    cell = lambda m, task: shown(r.values(m, task, "", "perplexity"), digits=2)
    for m in VARIANTS:
        if not r.values(m, "text-keep", "", "perplexity"):
            continue
        rows.append(["%s: KiB of keys and values" % TITLE[m], "0"] + ["{:,.0f}".format(kib(r, m, "text-write-%d" % b)) for b in sizes] + ["{:,.0f}".format(kib(r, m, "text-keep"))])
        for by, title, _ in KEPT[::-1]:
            ends = [cell(m, t) for t in ("text-drop", "text-keep")] if by == KEPT[-1][0] else ["", ""]
            rows.append([title, ends[0], *[cell(m, "text-%s-%d" % (by, b)) for b in sizes], ends[1]])
    return table(["rows kept", "none (wholly linear)"] + ["%d" % rows_kept(r, "text", b) for b in sizes] + ["all"], rows)


def curves(r):
    """Pictures: name to title, labels of x and y, series, whether x is logarithmic and whether y begins at 0."""
    out = {}
    for m in VARIANTS:
        series = []
        for rule, template, colour in RULES:
            at = numbers(r, template)
            ps = [(100 * mean(r.values(m, "policies", s, "attention_share")), 100 * mean(r.values(m, "policies", s, "accuracy")), 100 * spread(r.values(m, "policies", s, "accuracy")), "")
                  for s in at.values() if r.values(m, "policies", s, "accuracy")]
            if len(ps) > 2:
                series.append((rule, colour, ps))
        for name, s, colour in (("question", "linear,part(attention=question),attention@gen", "#2b8a4b"), ("needle alone", "linear,part(attention=needle)", "#145a2d"), ("all", "attention", "#777")):
            v = r.values(m, "policies", s, "accuracy")
            if v and series:
                series.append((name, colour, [(100 * mean(r.values(m, "policies", s, "attention_share")), 100 * mean(v), 100 * spread(v), "")]))
        if series:
            out["shares-" + m] = ("%s: needles of 1,024 tokens by tokens in attention" % TITLE[m], "tokens in attention, %", "% found", series, True, True)
        for kind, key, what, y in (("kv", "nats", "needles of 1,024 tokens", "nats a token of the answer"), ("text", "perplexity", "text, wholly in attention,", "perplexity")):
            series = []
            for by, title, colour in KEPT:
                at = [("%s-%s-%d" % (kind, by, b), r.values(m, "%s-%s-%d" % (kind, by, b), "", key)) for b in budgets(r, kind)]
                ps = [(kib(r, m, task), mean(v), spread(v), "") for task, v in at if v]
                if ps:
                    series.append((title, colour, ps))
            for task, title, colour in (("-keep", "all rows", "#145a2d"), ("-drop", "none, wholly linear", "#888")):
                v = r.values(m, kind + task, "", key)
                if v and series:
                    series.append((title, colour, [(kib(r, m, kind + task), mean(v), spread(v), "")]))
            if series:
                out["%s-%s" % (kind, m)] = ("%s: %s by bytes of keys and values" % (TITLE[m], what), "KiB of keys and values of one sequence at its end", y, series, False, kind == "kv")
    return out


# ---- files of oryx sweep

def ranged(row, digits=1):
    scale = 1 if row["mean"] > 1 else 100
    if len(row["values"]) == 1:
        return "%.*f" % (digits, scale * row["mean"])
    return "%.*f (%.*f to %.*f)" % (digits, scale * row["mean"], digits, scale * row["least"], digits, scale * row["most"])


SWEEP_POINTS = ("wholly linear", "needle only (oracle)", "question only", "needle and question (oracle)", "wholly attention")
SWEEP_CURVES = {"share": ("last tokens", "random tokens", "most surprising"), "kv": ("last rows (bounded)", "random rows", "most surprising rows", "rows that change the state most")}


def sweep_points(sweep):
    at = {x["curve"]: x for x in sweep["rows"] if x["set"] == "share"}
    return table(["setting", "correct", "tokens in attention"], [[c, ranged(at[c]), share([at[c]["attention_share"]])] for c in SWEEP_POINTS])


def sweep_curve_rows(sweep, kind, digits=1):
    at = {(x["curve"], x["label"]): x for x in sweep["rows"] if x["set"] == kind}
    labels = list(dict.fromkeys(x["label"] for x in sweep["rows"] if x["set"] == kind and x["label"]))
    return at, labels, [[c] + [ranged(at[c, l], digits) for l in labels] for c in SWEEP_CURVES[kind]]


def sweep_shares(sweep):
    _, labels, rows = sweep_curve_rows(sweep, "share")
    return table(["tokens in attention"] + labels, rows)


def sweep_kv(sweep):
    at, labels, rows = sweep_curve_rows(sweep, "kv")
    sizes = ["KiB of keys and values"] + ["%.0f" % (at["random rows", l]["kv_bytes"] / 1024) for l in labels]
    return table(["rows"] + [l.split()[0] for l in labels], [sizes] + rows)


def sweep_switches(sweep):
    rows, draws = [], {}
    for x in sweep["rows"]:
        if x["set"] != "switches" or not x["label"]:
            continue
        if x["curve"] == "random switches":
            draws.setdefault(x["label"].split(",")[0].split()[1], []).append(x)
        else:
            rows.append(["%s: %s" % (x["curve"], x["label"]), ranged(x), share([x["attention_share"]])])
    drawn = []
    for chunk, xs in draws.items():
        values, shares = [v for x in xs for v in x["values"]], [100 * x["attention_share"] for x in xs]
        both = {"values": values, "mean": mean([x["mean"] for x in xs]), "least": min(values), "most": max(values)}
        drawn.append(["random, chunks of %s, %d draws a seed" % (chunk, len(xs)), ranged(both), "%.1f%% to %.1f%%" % (min(shares), max(shares))])
    return table(["switch points", "correct", "tokens in attention"], drawn + rows)


SWEEPS = {k: f for k, f in globals().items() if k in ("sweep_points", "sweep_shares", "sweep_kv", "sweep_switches")}
