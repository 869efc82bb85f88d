"""The pictures of the results pages, as SVG."""
import math

import token_tables
from results import CORE, RETRIEVAL_MODES, TITLE, mean, modes, spread

COLOURS = {"transformer": "#3565a8", "attention-alone": "#7aa3d8", "gdn": "#c2571a", "oryx-gdn": "#2b8a4b", "mamba2": "#8a5a9e", "oryx-mamba2": "#a8892b", "oryx-mamba2-query-conv": "#d9c16a"}


def svg(title, x_label, y_label, series, log_x=False, width=720, height=380, zero=True):
    """series: (name, colour, [(x, y, spread, label)])"""
    points = [p for _, _, ps in series for p in ps]
    f = (lambda x: math.log10(x)) if log_x else (lambda x: x)
    xs, ys = [f(p[0]) for p in points], [p[1] for p in points]
    x0, x1 = min(xs), max(xs)
    pad = (x1 - x0) * 0.06 or 1
    x0, x1, y0, y1 = x0 - pad, x1 + pad, 0 if zero else min(ys) * 0.95, 1.08 * max(p[1] + p[2] for p in points) or 1
    X = lambda x: 60 + (f(x) - x0) / (x1 - x0) * (width - 90)
    legend, at, line = [], 66, 34  # one line or more, above the axes
    for name, colour, _ in series:
        if at + 14 + 6.4 * len(name) > width:
            at, line = 66, line + 18
        legend.append((at, line, name, colour))
        at += 34 + 6.4 * len(name)
    Y = lambda y: height - 50 - (y - y0) / (y1 - y0) * (height - 66 - line)
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
    for name, colour, ps in series:
        if len(ps) > 1:
            out.append('<path d="M%s" fill="none" stroke="%s" stroke-width="1.5"/>' % ("L".join("%.1f %.1f" % (X(p[0]), Y(p[1])) for p in ps), colour))
        for x, y, e, label in ps:
            out.append('<path d="M%.1f %.1fV%.1f" stroke="%s"/><circle cx="%.1f" cy="%.1f" r="4" fill="%s"><title>%s</title></circle>' % (X(x), Y(y - e), Y(y + e), colour, X(x), Y(y), colour, label))
            if label and len(ps) > 1:
                out.append('<text x="%.1f" y="%.1f" font-size="10">%s</text>' % (X(x) + 6, Y(y) - 6, label))
    for at, line, name, colour in legend:
        out.append('<circle cx="%d" cy="%d" r="4" fill="%s"/><text x="%d" y="%d">%s</text>' % (at, line, colour, at + 8, line + 4, name))
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
    for name, (title, x_label, y_label, series, log_x, zero) in token_tables.curves(r).items():
        out[name] = svg(title, x_label, y_label, series, log_x=log_x, zero=zero)
    return out
