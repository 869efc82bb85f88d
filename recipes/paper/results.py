"""What run.py measured, read and put together: imported by tables.py."""
import glob, json, lzma, os, re

CORE = ["transformer", "attention-alone", "gdn", "oryx-gdn", "mamba2", "oryx-mamba2", "oryx-mamba2-query-conv"]
TITLE = {"transformer": "Transformer", "attention-alone": "Attention alone in Oryx's layer", "gdn": "Gated DeltaNet", "mamba2": "Mamba-2", "oryx-gdn": "Oryx-GDN", "oryx-mamba2": "Oryx-Mamba-2", "oryx-mamba2-query-conv": "Oryx-Mamba-2 with query convolution",
         "inter-layer": "inter-layer hybrid (3 Gated DeltaNet : 1 attention)", "intra-layer": "intra-layer hybrid (mean of both)"}
BASELINE = {"oryx-gdn": "gdn", "oryx-mamba2": "mamba2", "oryx-mamba2-query-conv": "mamba2"}
LM = [("lambada", "acc"), ("hellaswag", "acc_norm"), ("piqa", "acc_norm"), ("arc_easy", "acc"), ("arc_challenge", "acc_norm"), ("openbookqa", "acc_norm"), ("winogrande", "acc"), ("boolq", "acc")]
MIXED_LM = "random(attention=0.1;chunk=64)"
RETRIEVAL_MODES = {m: ["linear", "question", "attention"] for m in BASELINE}


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


class Values(list):
    """A value a seed."""

    def __init__(self, of):  # {seed: value}
        super().__init__(of[s] for s in sorted(of))
        self.of = of


def pairs(*values):
    """Those of the seeds that all have."""
    return [[v.of[s] for v in values] for s in sorted(set.intersection(*(set(v.of) for v in values)))]


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
        out = {}
        for run in self.seeds(model):
            rows = [r[key] for r in self.rows(run, task, schedule) if where(r)]
            if rows:
                out[int(run.rsplit("-seed", 1)[1])] = sum(rows) / len(rows)
        return Values(out)


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


def percent(v, digits=1):
    return (shown(v, digits=digits, sign=True) + "%").replace(" (one seed)%", "% (one seed)")


def minus(a, b):
    return [x - y for x, y in pairs(a, b)]


def above(a, b):
    """In %, seed by seed: those of one seed have seen the same data."""
    return [100 * (x / y - 1) for x, y in pairs(a, b)]


def table(head, rows):
    return "\n".join(["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)] + ["| " + " | ".join(str(c) for c in r) + " |" for r in rows])


def modes(model):
    return ["linear", "attention"] if model.startswith("oryx") else ["attention" if model in ("transformer", "attention-alone") else "linear"]


def named(model, mode):
    name = TITLE.get(model, model)
    return name + ", " + {"linear": "linear", "attention": "attention", "question": "question in attention", "queries": "queries in attention", MIXED_LM: "10% attention"}[mode] if model.startswith("oryx") else name


def share(v):
    return "%.1f%%" % (100 * mean(v)) if v else "-"


def parameters(d):
    n = d.get("inspect", {}).get("parameters", {}).get("total")
    return "{:,}".format(n) if isinstance(n, int) else "-"


def human(n):
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            return "%.1f %s" % (n, unit)
        n /= 1024
