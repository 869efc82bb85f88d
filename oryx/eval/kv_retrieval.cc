// Key-value retrieval (Liu et al. 2023, arXiv 2307.03172): a JSON object of random identifiers, and the value of one key in what follows. Examples:
// {"ordered_kv_records": [[key, value], ...], "key", "value"}, in DATA/kv/kv_retrieval_75_keys and kv_retrieval_140_keys.
#include "oryx/eval/completion.h"

namespace oryx {

namespace {

class KeyValueRetrieval : public CompletionTask {
 public:
  KeyValueRetrieval() { max_new_tokens_ = 100; }  // of a value's 36 characters, few a token

  CompletionItem item(const Example& e) const override {
    const Json& records = e.at("ordered_kv_records");
    if (!records.is_array() || records.empty()) e.refuse("ordered_kv_records", records, "a list of pairs");
    std::string object = "{";
    for (const Json& pair : records) {
      if (!pair.is_array() || pair.size() != 2) e.refuse("ordered_kv_records", pair, "a key and a value");
      object += fmt::format("{}\"{}\": \"{}\"", object.size() > 1 ? ",\n " : "", e.text_of(pair[0], "ordered_kv_records"), e.text_of(pair[1], "ordered_kv_records"));
    }
    return {"Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n" + object + "}",
            fmt::format("\n\nKey: \"{}\"\nCorresponding value:", e.text("key")),
            {e.text("value")}};
  }

 protected:
  std::string folder() const override { return "kv"; }
  std::string file() const override { return fmt::format("kv_retrieval_{}_keys", keys_); }
  void describe_more(Fields& f) override { f.add("keys", keys_, "pairs of an object: names the file", at_least(1)); }

 private:
  int64_t keys_ = 75;
};

ORYX_EVAL_TASK(kv_retrieval, "retrieval: the value of a key among random identifiers", KeyValueRetrieval);

}  // namespace
}  // namespace oryx
