// oryx export: a model's folder becomes a checkpoint that Hugging Face transformers loads.
#include "oryx/cli/command.h"
#include "oryx/cli/model_folder.h"
#include "oryx/common/interrupt.h"
#include "oryx/model/hf/convert.h"

namespace oryx::cli {

namespace {

struct ExportArguments {
  std::string folder, out;
};

void export_model(const ExportArguments& o) {
  catch_interrupts();
  const Conversion done = export_checkpoint(model_folder(o.folder), o.out);
  print("{}: {} of {} layers, {} parameters in {} tensors\n", o.out, done.family, done.config.num_layers, done.parameters, done.tensors);
}

ORYX_COMMAND(export, "write a model as a Hugging Face checkpoint", [](CLI::App& app) {
  auto o = std::make_shared<ExportArguments>();
  app.add_option("MODEL", o->folder, "folder of a model, or of a training run")->required();
  app.add_option("--out", o->out, "the folder to make")->required()->type_name("HF_DIR");
  app.callback([o] { export_model(*o); });
});

}  // namespace
}  // namespace oryx::cli
