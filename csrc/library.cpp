// Every op's schema. `groups` is CSR offsets (K + 1,), int32 or int64: group k owns the columns
// [groups[k], groups[k + 1]), the first of which is its "others".
#include "stable.h"

STABLE_TORCH_LIBRARY(oodk, m) {
  // MOS, Huang & Li, CVPR 2021.
  m.def("mos_score(Tensor logits, Tensor groups) -> Tensor");
  m.def(
      "mos_predict(Tensor logits, Tensor groups) -> "
      "(Tensor score, Tensor log_odds, Tensor label, Tensor group, Tensor prob)");
  m.def("mos_log_others(Tensor logits, Tensor groups) -> Tensor");
  m.def("mos_loss(Tensor logits, Tensor target, Tensor groups, int ignore_index=-100) -> Tensor");

  // mos_log_others and mos_loss are made of these; `stats` is (..., K, 2), see ops/mos.h.
  m.def("_mos_log_others(Tensor logits, Tensor groups) -> (Tensor log_others, Tensor stats)");
  m.def(
      "_mos_log_others_backward(Tensor grad, Tensor logits, Tensor groups, Tensor stats) -> "
      "Tensor");
  m.def(
      "_mos_loss(Tensor logits, Tensor target, Tensor groups, int ignore_index) -> "
      "(Tensor loss, Tensor stats)");
  m.def(
      "_mos_loss_backward(Tensor grad, Tensor logits, Tensor target, Tensor groups, Tensor stats, "
      "int ignore_index) -> Tensor");

  // The scores that need nothing but logits, from one read of them.
  m.def(
      "logit_scores(Tensor logits, float temperature=1.0) -> "
      "(Tensor msp, Tensor max_logit, Tensor energy, Tensor entropy, Tensor label)");

  // logsumexp of scale (z - bias) + bias for each of a row's scales (..., P): SCALE, LTS.
  m.def("scaled_energy(Tensor logits, Tensor scale, Tensor? bias=None) -> Tensor");

  // GEN, Liu et al., CVPR 2023, for each pair of gamma and m. Not one of logit_scores: as many
  // outputs as settings, and finding the m largest costs more than all that logit_scores does.
  m.def("gen_scores(Tensor logits, float[] gamma, int[] m) -> Tensor");

  // Norms of rows of features, and of each percentile the threshold and the sum above it.
  m.def(
      "feature_stats(Tensor features, Tensor percentiles, bool rectified=False) -> "
      "(Tensor l1, Tensor l2, Tensor sum, Tensor threshold, Tensor top_sum)");

  // Rows x (..., d) beside the rows of table (K, d) that index (..., m) names.
  m.def(
      "indexed_distances(Tensor x, Tensor table, Tensor index) -> "
      "(Tensor inner, Tensor l1, Tensor l2)");

  // Features as ReAct (clip), VRA, ASH, SCALE and OptFS shape them, in place.
  m.def(
      "shape_features_(Tensor(a!) features, str shape, float? percentile=None, Tensor? low=None, "
      "Tensor? high=None) -> ()");

  // Cross entropy of ID samples, uniform cross entropy where target is -1, and logsumexp: made of
  // the two below; `stats` is (..., 2), see ops/outlier.h.
  m.def("outlier_cross_entropy(Tensor logits, Tensor target) -> (Tensor loss, Tensor logsumexp)");
  m.def(
      "_outlier_cross_entropy(Tensor logits, Tensor target) -> "
      "(Tensor loss, Tensor logsumexp, Tensor stats)");
  m.def(
      "_outlier_cross_entropy_backward(Tensor grad_loss, Tensor grad_logsumexp, Tensor logits, "
      "Tensor target, Tensor stats) -> Tensor");

  // On CPU its weighted sum or mean with the gradient, in one read of the logits; `absent`: the
  // target of OOD samples is the last column.
  m.def(
      "_outlier_loss(Tensor logits, Tensor target, float weight, bool absent, bool mean) -> "
      "(Tensor loss, Tensor grad)");

  // Exact ROC figures, fields: oodkernels/ops/roc.py.
  m.def("roc_metrics(Tensor id_scores, Tensor ood_scores, float tpr=0.95) -> Tensor");

  // roc_metrics is made of these, see ops/roc.h: scores of any shape to sorted order-preserving
  // integers of their width, NaN last, and two sorted sides to exact sums.
  m.def("_roc_keys(Tensor scores) -> Tensor");
  m.def("_roc_counts(Tensor id_keys, Tensor ood_keys) -> (Tensor counts, Tensor areas)");

  // Streaming metrics: counts (rows, bins + atoms + 4), table (65536,), see ops/histogram.h.
  m.def(
      "roc_histogram_(Tensor(a!) counts, Tensor table, Tensor scores, int side, "
      "Tensor? rows=None, Tensor? atoms=None) -> ()");

  // On CPU, before scores are counted: bins where these are about to crowd, see
  // oodkernels/metrics/streaming/_sketch.py.
  m.def(
      "_steer_histogram_(Tensor(a!) counts, Tensor(b!) blocks, Tensor(c!) table, Tensor(d!) atoms, "
      "Tensor(e!) used, Tensor(f!) scale, Tensor(g!) adapted, Tensor scores, int side, "
      "Tensor? rows, bool first, bool half, float share) -> ()");

  // K-means, seeded and deterministic: x is (..., N, d); see ops/kmeans.h.
  m.def(
      "kmeans_init(Tensor x, int k, int n_init=1, int n_trials=0, int seed=0, "
      "bool normalize=True) -> Tensor");
  m.def(
      "kmeans(Tensor x, Tensor init, int max_iter=300, float tol=1e-4, bool normalize=True, "
      "bool renormalize=False) -> (Tensor centroids, Tensor labels, Tensor inertia, Tensor "
      "n_iter)");
  m.def(
      "nearest_centroid(Tensor x, Tensor centroids, bool normalize=False) -> "
      "(Tensor labels, Tensor distance)");

  // The k nearest rows of a bank (N, d), exact; see ops/neighbors.h.
  m.def(
      "nearest_neighbors(Tensor queries, Tensor bank, int k, bool normalize=False) -> "
      "(Tensor distances, Tensor indices)");

  // DOS, Jiang et al., ICLR 2024: see ops/dos.h.
  m.def("cluster_argmax(Tensor labels, Tensor scores, int k, int m=1) -> Tensor");
  m.def(
      "dos_select(Tensor features, Tensor scores, int k, int n_select, int n_init=5, "
      "int max_iter=300, float tol=1e-4, int seed=0, str mode=\"default\") -> "
      "(Tensor indices, Tensor labels, Tensor centroids, Tensor inertia)");
}
