// oryx import: a published Hugging Face checkpoint becomes a model's folder.
#include "oryx/cli/command.h"
#include "oryx/common/interrupt.h"
#include "oryx/model/hf/convert.h"

namespace oryx::cli {

namespace {

struct ImportArguments {
  std::string folder, out;
};

void import_model(const ImportArguments& o) {
  catch_interrupts();
  const Conversion done = import_checkpoint(o.folder, o.out);
  print("{}: {} of {} layers, {} parameters in {} tensors\n", o.out, done.family, done.config.num_layers, done.parameters, done.tensors);
}

ORYX_COMMAND(import, "make a model's folder of a published Hugging Face checkpoint", [](CLI::App& app) {
  auto o = std::make_shared<ImportArguments>();
  app.add_option("HF_DIR", o->folder, "folder with config.json and model.safetensors, or shards with their index")->required();
  app.add_option("--out", o->out, "the model's folder to make")->required()->type_name("DIR");
  app.callback([o] { import_model(*o); });
});

}  // namespace
}  // namespace oryx::cli
