#!/usr/bin/env python3
"""Writes tests/data/harness/: examples made here for each language-model task, and what the EleutherAI harness makes of them.

    python3 -m venv .deps/harness-venv && .deps/harness-venv/bin/pip install lm_eval==0.4.13 tokenizers
    .deps/harness-venv/bin/python tools/make_harness_fixtures.py

One file a task: `examples` (in the form that oryx eval reads), the `requests` (context, continuation) that the harness builds of each by the task's own
configuration, log-likelihoods drawn here for them (`log_p`, `greedy`), and the harness's metrics for each example and for all (`metrics`, `total`). pairs.json:
how its _encode_pair splits texts into tokens, with the tokenisers of tests/data/bpe. contains.json: its contains_score. No model runs, nothing is downloaded.
"""
import json, pathlib, random, re, sys, tempfile, types

# The harness imports torch where it is installed for models that are not used here.
import lm_eval.tasks
from lm_eval.api import metrics as harness_metrics
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

OUT = pathlib.Path(__file__).resolve().parent.parent / "tests/data/harness"

EXAMPLES = {
    "lambada_openai": ("lambada_openai", [
        {"text": "Mara hid the key below the third stone, and when the rain came she ran back to look for the key"},
        {"text": "“We sail at dawn,” said the captain. Nobody slept.\nAt dawn they went down to the harbour to sail"},
        {"text": "the old clock had stopped at noon, and the clockmaker's naïve son could not say why it stopped at noon."},
    ]),
    "hellaswag": ("hellaswag", [
        {"activity_label": "Baking bread", "ctx_a": "A woman kneads dough on a wooden table.", "ctx_b": "then she", "endings": [
            "throws the table into the sea.", "puts the dough into a tin and sets it aside to rise.", "paints the dough blue and sings.", "reads a book to the dough"], "label": 1},
        {"activity_label": "How to mend a net", "ctx_a": "[header] How to mend a net [title] Find the hole. [step] Hold the net against the light.", "ctx_b": "mark the  hole",
         "endings": ["[substeps] With a red thread, so that you find it again.", "with your teeth.", " and walk away [title] Go home.", "in a café, with naïve hope."], "label": "0"},
        {"activity_label": "Rowing", "ctx_a": "Two men sit in a boat.", "ctx_b": "", "endings": ["They row.", "They sing an opera.", "The boat is a [hat", "It snows."], "label": 2},
    ]),
    "piqa": ("piqa", [
        {"goal": "dry wet boots overnight", "sol1": "Stuff them with crumpled newspaper.", "sol2": "Stuff them with wet sand.", "label": 0},
        {"goal": "keep bread fresh", "sol1": "Leave it on the windowsill in the sun, cut side up, for as long as you like.", "sol2": "Wrap it in a cloth.", "label": 1},
    ]),
    "arc_easy": ("arc_easy", [
        {"id": "a1", "question": "Which of these melts first on a warm day?", "choices": {"text": ["ice", "iron", "glass", "a granite boulder"], "label": ["A", "B", "C", "D"]}, "answerKey": "A"},
        {"id": "a2", "question": "What do roots take from soil?", "choices": {"text": ["light", "water and minerals", "wind"], "label": ["1", "2", "3"]}, "answerKey": "2"},
    ]),
    "arc_challenge": ("arc_challenge", [
        {"id": "c1", "question": "A pendulum is made longer. What changes?", "choices": {"text": ["its period grows", "its mass doubles", "nothing", "it stops"], "label": ["A", "B", "C", "D"]}, "answerKey": "C"},
    ]),
    "openbookqa": ("openbookqa", [
        {"id": "o1", "question_stem": "A shadow is longest", "choices": {"text": ["at noon", "just before sunset", "under the sea", "in a room without light"], "label": ["A", "B", "C", "D"]}, "answerKey": "B"},
        {"id": "o2", "question_stem": "To see far stars one uses a", "choices": {"text": ["telescope", "spoon", "mirror of wood", "candle"], "label": ["A", "B", "C", "D"]}, "answerKey": " A"},
    ]),
    "boolq": ("boolq", [
        {"question": "do tin kettles float", "passage": "A sealed tin kettle holds air enough to float. An open one fills and sinks.", "answer": True},
        {"question": "is the moor dry in spring", "passage": "The moor is under water until June.", "answer": False},
    ]),
    "winogrande": ("winogrande", [
        {"sentence": "The chest would not fit on the cart because _ was too wide.", "option1": "the chest", "option2": "the cart", "answer": "1"},
        {"sentence": "Ana lent Rosa a coat since _  was freezing. ", "option1": "Ana", "option2": "Rosa", "answer": "2"},
    ]),
}

# Of the harness's data sets only these fields have another name or type.
def for_harness(task, e):
    e = dict(e)
    if task == "boolq":
        e["label"] = int(e.pop("answer"))
    return e


def harness_task(name, examples, folder):
    path = pathlib.Path(folder) / f"{name}.jsonl"
    path.write_text("".join(json.dumps(for_harness(name, e)) + "\n" for e in examples))
    configs = pathlib.Path(lm_eval.tasks.__file__).parent
    config = dict(load_yaml(next(p for p in sorted(configs.rglob("*.yaml")) if re.search(f"^task: {name}$", text := p.read_text(), re.M) and re.search("^(output_type|include):", text, re.M))))
    for key in ("tag", "training_split", "test_split", "validation_split", "dataset_name", "should_decontaminate", "doc_to_decontamination_query"):
        config.pop(key, None)
    config |= {"dataset_path": "json", "dataset_kwargs": {"data_files": {"validation": str(path)}}, "validation_split": "validation", "num_fewshot": 0}
    return ConfigurableTask(config=config)


def worked(name, examples, folder):
    task = harness_task(name, examples, folder)
    draw = random.Random(name)
    out = {"task": name, "examples": examples, "requests": [], "log_p": [], "greedy": [], "metrics": []}
    by_metric = {}
    for i, doc in enumerate(list(task.eval_docs) * 4):  # each example under four draws
        context = task.fewshot_context(doc, 0)
        instances = task.construct_requests(doc=doc, ctx=context, metadata=(name, i, 1))
        instances = instances if isinstance(instances, list) else [instances]
        args = [list(x.args) for x in instances]
        # Longer texts are less likely; the second example of each task has two equal ones, of which the first counts.
        log_p = [round(-0.9 * len(c) ** 0.8 * draw.uniform(0.5, 1.5), 4) for _, c in args]
        if i == 1 and len(log_p) > 1:
            log_p[1] = log_p[0] = max(log_p)
        greedy = [draw.random() < 0.5 for _ in args]
        results = list(zip(log_p, greedy))
        got = task.process_results(doc, results if task.OUTPUT_TYPE == "multiple_choice" else results[:1])
        plain = {k: float(v) for k, v in got.items()}
        if task.OUTPUT_TYPE == "multiple_choice":  # the harness reports it where it is asked to
            task._metric_fn_list["acc_bytes"] = task._metric_fn_list["acc"]
            plain["acc_bytes"] = float(task.process_results(doc, results)["acc_bytes"])
            del task._metric_fn_list["acc_bytes"]
        for k, v in plain.items():
            by_metric.setdefault(k, []).append(v)
        if i < len(examples):
            out["requests"].append(args)
        out["log_p"].append(log_p)
        out["greedy"].append(greedy)
        out["metrics"].append(plain)
    out["total"] = {}
    for k, v in by_metric.items():
        if k == "perplexity":
            out["total"][k] = harness_metrics.perplexity(v)
            continue
        out["total"][k] = harness_metrics.mean(v)
        if len(v) > 1:
            out["total"][k + "_stderr"] = harness_metrics.mean_stderr(v)
    return out


PAIRS = [("Question: where is the layer\nAnswer:", " it's read"), ("the state of ", "a token"), ("linear  ", "recurrent"), ("the attention", "linear"), ("don", "'t"),
         ("naïve", " größe façade"), ("日本", "語 東京"), ("x = 12", "345"), ("line\n", "next"), ("12 ", "345"), ("a", "b")]


def pairs():
    from tokenizers import Tokenizer
    out = []
    bpe = OUT.parent / "bpe"
    for name in ("gpt2", "llama3", "qwen"):
        tokenizer = Tokenizer.from_file(str(bpe / f"{name}.json"))
        lm = types.SimpleNamespace(backend="causal", tok_encode=lambda text, **_: tokenizer.encode(text, add_special_tokens=False).ids)
        for context, continuation in PAIRS:
            context_ids, continuation_ids = TemplateLM._encode_pair(lm, context, continuation)
            if continuation_ids:
                out.append({"tokenizer": name, "context": context, "continuation": continuation, "context_ids": context_ids, "continuation_ids": continuation_ids})
    return out


CONTAINS = [("The answer is Kettle Ember, I think", ["kettle ember"]), ("12.5", ["125"]), ("12.5", ["12.5"]), ("a+b (c)", ["A+B (C)"]), ("nothing", ["x", "thing"]), ("", ["x"]), ("ice", ["icebox"])]


def main():
    from lm_eval.tasks.squad_completion.task import contains_score
    OUT.mkdir(parents=True, exist_ok=True)
    write = lambda name, x: (OUT / f"{name}.json").write_text(json.dumps(x, indent=1, ensure_ascii=False) + "\n")
    with tempfile.TemporaryDirectory() as folder:
        for name, (_, examples) in EXAMPLES.items():
            # A column of examples has one type, as the data sets have.
            write(name, worked(name, [e | ({"label": int(e["label"])} if name == "hellaswag" else {}) for e in examples], folder))
    write("pairs", pairs())
    write("contains", [{"completion": c, "answers": a, "contains": bool(contains_score(c, a))} for c, a in CONTAINS])
    print(f"{OUT}: {len(list(OUT.glob('*.json')))} files", file=sys.stderr)


if __name__ == "__main__":
    main()
