#include "cuda/mos_kernel.cuh"

#include "runner.h"

using oodk::cuda::MosInput;
using runner::Run;

namespace {

MosInput input(Run& run) {
  return {run.logits(), run.dtype(), run.integer("rows"), run.integer("width"),
      run.integer("stride"), run.input("groups"), run.integer("wide_offsets") != 0,
      run.integer("groups"), nullptr};
}

void* per_row(Run& run, const char* name) {
  return run.output(name, run.integer("rows") * run.out_size());
}
int64_t* index_per_row(Run& run, const char* name) {
  return run.output<int64_t>(name, run.integer("rows") * sizeof(int64_t));
}
void* per_group(Run& run, const char* name, int values) {
  return run.output(name, run.integer("rows") * run.integer("groups") * values * run.out_size());
}
void* gradient(Run& run) {
  return run.output("grad_logits", run.integer("rows") * run.integer("width") * run.in_size());
}

void score(Run& run) {
  oodk::cuda::mos_score(input(run), per_row(run, "score"));
}
void predict(Run& run) {
  oodk::cuda::mos_predict(input(run), per_row(run, "score"), per_row(run, "log_odds"),
      index_per_row(run, "label"), index_per_row(run, "group"), per_row(run, "prob"));
}
void log_others(Run& run) {
  oodk::cuda::mos_log_others(
      input(run), per_group(run, "log_others", 1), per_group(run, "stats", 2));
}
void loss(Run& run) {
  oodk::cuda::mos_loss(input(run), run.input<int64_t>("target"), run.integer("ignore_index"),
      per_row(run, "loss"), per_group(run, "stats", 2));
}
void log_others_backward(Run& run) {
  oodk::cuda::mos_log_others_backward(
      input(run), run.input("grad"), run.input("stats"), gradient(run));
}
void loss_backward(Run& run) {
  oodk::cuda::mos_loss_backward(input(run), run.input<int64_t>("target"),
      run.integer("ignore_index"), run.input("grad"), run.input("stats"), gradient(run));
}

} // namespace

int main(int argc, char** argv) {
  return runner::run(argc, argv,
      {{"mos_score", score}, {"mos_predict", predict}, {"mos_log_others", log_others},
          {"mos_loss", loss}, {"mos_log_others_backward", log_others_backward},
          {"mos_loss_backward", loss_backward}});
}
