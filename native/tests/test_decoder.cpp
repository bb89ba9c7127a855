// The two parts of a decoder layer, and whole layers with their caches or states, against plain loops in double, with
// weights of each kind, in buffers of exactly their size.

#include "regard_decoder.h"
#include "regard_recurrence.h"
#include "testing.h"

#include <algorithm>
#include <cmath>
#include <memory>

namespace {

// A weight and the values it stands for.
struct Weight {
  Weight(int64_t bits, int64_t n, int64_t k, bool offsets)
      : n(n), k(k), values(n * k), bias(numbers(n)), floats(numbers(n * k, -.2f, .2f)), input_scale(numbers(k, .5f, 2)) {
    const int64_t group = bits == 4 ? 32 : k, columns = bits == 4 ? (k + 31) / 32 * 32 : k, groups = columns / group;
    codes.resize(bits == 4 ? n * columns / 2 : n * columns);
    for (uint8_t& v : codes) v = static_cast<uint8_t>(128 * (uniform() + 1));
    const float step = bits == 4 ? .03f : .002f;
    scale.reset(new Tensor(numbers(n * groups, step / 2, step), true));
    offset.reset(new Tensor(numbers(n * groups, -step, step), true));
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < k; ++j) {
        const size_t at = i * groups + j / group;
        const uint8_t byte = codes[bits == 4 ? (i * columns + j) / 2 : i * columns + j];
        const int code = bits == 4 ? (j % 2 ? byte >> 4 : byte & 15) - 8 : static_cast<int8_t>(byte);
        values[i * k + j] = bits == 32 ? floats[i * k + j] : code * (*scale)[at] + (offsets && bits == 4 ? (*offset)[at] : 0);
        if (offsets) values[i * k + j] *= input_scale[j];
      }
    given.bits = bits;
    given.n = n;
    given.k = k;
    given.columns = columns;
    given.group = group;
    given.codes = bits == 32 ? static_cast<const void*>(floats.data()) : codes.data();
    given.scale = bits == 32 ? nullptr : static_cast<const uint16_t*>(scale->data());
    given.offset = offsets && bits == 4 ? static_cast<const uint16_t*>(offset->data()) : nullptr;
    given.bias = bias.data();
    given.input_scale = offsets ? input_scale.data() : nullptr;
    given.rounded = bits == 8 && !offsets;
  }
  Doubles operator()(Doubles x) const {
    const int64_t m = static_cast<int64_t>(x.size()) / k;
    for (int64_t t = 0; given.rounded && t < m; ++t) {
      double step = 0;
      for (int64_t j = 0; j < k; ++j) step = fmax(step, fabs(x[t * k + j]) / 127);
      for (int64_t j = 0; j < k; ++j) x[t * k + j] = rint(x[t * k + j] / step) * step;
    }
    Doubles y(m * n);
    for (int64_t t = 0; t < m; ++t)
      for (int64_t i = 0; i < n; ++i) {
        double found = bias[i];
        for (int64_t j = 0; j < k; ++j) found += values[i * k + j] * x[t * k + j];
        y[t * n + i] = found;
      }
    return y;
  }
  int64_t n, k;
  Doubles values;
  Floats bias, floats, input_scale;
  std::vector<uint8_t> codes;
  std::unique_ptr<Tensor> scale, offset;
  regard_weight given{};
};

Doubles normed(const Doubles& x, const Floats& weight, double eps) {
  const size_t width = weight.size();
  Doubles y(x.size());
  for (size_t t = 0; t * width < x.size(); ++t) {
    double squares = 0;
    for (size_t i = 0; i < width; ++i) squares += x[t * width + i] * x[t * width + i];
    const double factor = 1 / sqrt(squares / double(width) + eps);
    for (size_t i = 0; i < width; ++i) y[t * width + i] = x[t * width + i] * factor * weight[i];
  }
  return y;
}

Doubles turned(const Doubles& y, int64_t n, int64_t head, const Floats& cosine, const Floats& sine) {
  Doubles found(y.size());
  for (size_t j = 0; j < y.size(); ++j) {
    const size_t token = j / n, feature = j % head;
    const double other = feature < size_t(head / 2) ? -y[j + head / 2] : y[j - head / 2];
    found[j] = y[j] * cosine[token * head + feature] + other * sine[token * head + feature];
  }
  return found;
}

Doubles outputs_of(const Doubles& x, const Doubles& attended, const Weight& output, const Weight& gate, const Weight& up,
                   const Weight& down, const Floats& norm, double eps) {
  Doubles sum = output(attended);
  for (size_t i = 0; i < sum.size(); ++i) sum[i] += x[i];
  const Doubles h = normed(sum, norm, eps), values = up(h);
  Doubles gates = gate(h);
  for (size_t i = 0; i < gates.size(); ++i) gates[i] *= values[i] / (1 + exp(-gates[i]));
  Doubles found = down(gates);
  for (size_t i = 0; i < sum.size(); ++i) found[i] += sum[i];
  return found;
}

void check(int64_t bits, int64_t m, int64_t threads) {
  const int64_t width = 70, head = 10, hidden = 90;
  const bool offsets = m % 2;
  now("%d bits, %d tokens", int(bits), int(m));
  const Floats x = numbers(m * width), norm = numbers(width), cosine = numbers(m * head), sine = numbers(m * head);
  const Weight q(bits, 40, width, offsets), k(bits, 20, width, offsets), v(bits, 20, width, offsets);
  Floats found[3] = {unwritten(m * 40), unwritten(m * 20), unwritten(m * 20)};
  regard_decoder_inputs_args a{};
  a.size = sizeof a;
  a.threads = threads;
  a.m = m;
  a.width = width;
  a.head_width = head;
  a.eps = 1e-5f;
  a.x = x.data();
  a.norm = norm.data();
  a.cosine = cosine.data();
  a.sine = sine.data();
  const Weight* const projections[3] = {&q, &k, &v};
  for (int i = 0; i < 3; ++i) {
    a.projections[i] = projections[i]->given;
    a.outputs[i] = found[i].data();
  }
  Floats between = unwritten(m * width);
  a.normed = m == 1 ? between.data() : nullptr;
  must("inputs are taken", regard_decoder_inputs(&a));
  const Doubles u = normed(Doubles(x.begin(), x.end()), norm, a.eps);
  if (a.normed != nullptr) compare("a norm", Doubles(between.begin(), between.end()), u, 2e-6, 1);
  for (int i = 0; i < 3; ++i) {
    const Doubles y = (*projections[i])(u);
    const Doubles expected = i < 2 ? turned(y, projections[i]->n, head, cosine, sine) : y;
    compare("inputs", Doubles(found[i].begin(), found[i].end()), expected, 2e-6, 1);
  }

  const Weight output(bits, width, 40, offsets), gate(bits, hidden, width, offsets), up(bits, hidden, width, offsets);
  const Weight down(bits, width, hidden, offsets);
  const Floats attended = numbers(m * 40);
  Floats y = unwritten(m * width);
  regard_decoder_outputs_args b{};
  b.size = sizeof b;
  b.threads = threads;
  b.m = m;
  b.width = width;
  b.eps = 1e-5f;
  b.x = x.data();
  b.attended = attended.data();
  b.norm = norm.data();
  b.output = output.given;
  b.gate = gate.given;
  b.up = up.given;
  b.down = down.given;
  b.y = y.data();
  must("outputs are taken", regard_decoder_outputs(&b));
  const Doubles expected = outputs_of(Doubles(x.begin(), x.end()), Doubles(attended.begin(), attended.end()), output, gate,
                                      up, down, norm, b.eps);
  compare("outputs", Doubles(y.begin(), y.end()), expected, 2e-6, 1);
  b.down.n = width - 1;
  must("a weight of another size", regard_decoder_outputs(&b), REGARD_BAD_ARGUMENT);
  a.projections[1].n = 21;
  must("keys that are no heads", regard_decoder_inputs(&a), REGARD_BAD_ARGUMENT);
}

// Two norms, a cache of keys and one of values with `slots` slots for each of `kv` heads, and what softmax needs.
void set_layer(regard_decoder_layer& layer, const Floats* norms, Floats* caches, int64_t kv, int64_t slots, int64_t head,
               float scale, int64_t left) {
  for (int j = 0; j < 2; ++j) {
    layer.eps[j] = 1e-5f;
    layer.norms[j] = norms[j].data();
  }
  layer.scale = scale;
  layer.left = left;
  layer.keys = caches[0].data();
  layer.values = caches[1].data();
  for (int64_t* to : {layer.keys_strides, layer.values_strides}) {
    to[0] = kv * slots * head;
    to[1] = slots * head;
    to[2] = head;
  }
}

// NaN stands for slots that must not be written.
void compare_caches(const std::vector<Floats>& found, const std::vector<Doubles>& expected) {
  for (size_t i = 0; i < found.size(); ++i)
    for (size_t j = 0; j < found[i].size(); ++j) {
      const bool none = std::isnan(expected[i][j]);
      if (none != std::isnan(found[i][j]) || (!none && fabs(found[i][j] - expected[i][j]) > 1e-4)) {
        fail("a cache", found[i][j], expected[i][j]);
        return;
      }
    }
}

// Layers of 4 query heads and 2 key heads, after rows of different lengths, the second layer with a window; without
// pages and with few bits the first row begins with padding. Where the second layer has dropped tokens, its caches lack
// two; for a single token it has no window then, the token replaces another one, and the first layer reads its last page.
// Where it rotates `anew`, its keys are stored as they are, and each slot has angles.
void check_layers(int64_t bits, int64_t n, bool paged, int64_t threads, bool dropped = false, bool anew = false) {
  const int64_t batch = 2, width = 70, head = 10, hidden = 90, heads = 4, kv = 2, tokens = batch * n, page_size = 3, most = 3;
  const int64_t lengths[] = {5, 2}, lefts[] = {-1, dropped && n == 1 ? -1 : 3}, pages[] = {4, 0, 3, 1, 2, 5};
  const int64_t fewer[] = {0, dropped ? 2 : 0}, replaced[] = {-1, dropped && n == 1 ? 0 : -1};
  const bool few = dropped && n == 1;
  const int64_t slots = paged ? page_size : 9, places = paged ? 6 : batch, padding[] = {paged || bits == 32 ? 0 : 4, 0};
  now("layers, %d bits, %d tokens, %s", int(bits), int(n), paged ? "pages" : anew ? "rotated anew" : dropped ? "dropped tokens" : "rows");
  Floats x = numbers(tokens * width);
  const Floats cosine = numbers(tokens * head), sine = numbers(tokens * head);
  const int64_t held = std::max(lengths[0], lengths[1]) - fewer[1] + n;
  const Floats slot_cosine = numbers(held * head), slot_sine = numbers(held * head);
  Doubles expected(x.begin(), x.end());
  regard_decoder_layer layers[2]{};
  std::vector<std::unique_ptr<Weight>> weights;
  std::vector<Floats> norms, caches;
  for (int i = 0; i < 4; ++i) norms.push_back(numbers(width)), caches.push_back(unwritten(places * kv * slots * head));
  const auto slot = [&](int64_t b, int64_t t, int64_t h) {
    const int64_t place = paged ? pages[b * most + t / page_size] : b;
    return ((place * kv + h) * slots + (paged ? t % page_size : t)) * head;
  };
  std::vector<Doubles> written;
  for (int i = 0; i < 2; ++i) {
    const int64_t sizes[7][2] = {{heads * head, width}, {kv * head, width}, {kv * head, width}, {width, heads * head},
                                 {hidden, width}, {hidden, width}, {width, hidden}};
    const size_t first = weights.size();
    for (int j = 0; j < 7; ++j) {
      const int64_t mixed[] = {8, 4, 32}, kind = bits == 8 && i == 1 ? mixed[j % 3] : bits;
      weights.emplace_back(new Weight(kind, sizes[j][0], sizes[j][1], i == 1));
      layers[i].weights[j] = weights.back()->given;
    }
    const auto& own = [&](int j) -> const Weight& { return *weights[first + j]; };
    set_layer(layers[i], &norms[2 * i], &caches[2 * i], kv, slots, head, .3f, lefts[i]);
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t t = 0; t < lengths[b] - fewer[i] + (replaced[i] >= 0); ++t)
        for (int64_t h = 0; h < kv; ++h)
          for (int64_t d = 0; d < head; ++d)
            for (int j = 0; j < 2; ++j) caches[2 * i + j][slot(b, t, h) + d] = uniform();

    const Doubles u = normed(expected, norms[2 * i], layers[i].eps[0]);
    const bool by_slot = anew && i == 1;
    const auto rotated = [&](const Doubles& y, int64_t width) { return by_slot ? y : turned(y, width, head, cosine, sine); };
    const auto feature = [&](const Doubles& y, size_t at, int64_t slot, int64_t d) {
      if (!by_slot) return y[at + d];
      const double other = d < head / 2 ? -y[at + d + head / 2] : y[at + d - head / 2];
      return y[at + d] * slot_cosine[slot * head + d] + other * slot_sine[slot * head + d];
    };
    const Doubles q = rotated(own(0)(u), heads * head), k = rotated(own(1)(u), kv * head);
    const Doubles v = own(2)(u);
    Doubles cached[2];
    for (int j = 0; j < 2; ++j) {
      cached[j].assign(caches[2 * i + j].begin(), caches[2 * i + j].end());
      for (int64_t b = 0; b < batch; ++b)
        for (int64_t t = 0; t < n; ++t)
          for (int64_t h = 0; h < kv; ++h)
            for (int64_t d = 0; d < head; ++d)
              cached[j][slot(b, replaced[i] < 0 ? lengths[b] - fewer[i] + t : replaced[i], h) + d] = (j ? v : k)[((b * n + t) * kv + h) * head + d];
      written.push_back(cached[j]);
    }
    Doubles attended(tokens * heads * head);
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t t = 0; t < n; ++t)
        for (int64_t h = 0; h < heads; ++h) {
          const int64_t at = lengths[b] - fewer[i] + t, first = few && i == 0 ? at / page_size * page_size : padding[b];
          const int64_t from = lefts[i] < 0 ? first : std::max(first, at - lefts[i]);
          const size_t query = ((b * n + t) * heads + h) * head;
          double total = 0;
          for (int64_t j = from; j <= at; ++j) {
            const size_t key = slot(b, j, h / (heads / kv));
            double score = 0;
            const int64_t newest = replaced[i] < 0 ? at : replaced[i];
            for (int64_t d = 0; d < head; ++d) score += feature(q, query, newest, d) * feature(cached[0], key, j, d);
            const double weight = exp(.3f * score);
            total += weight;
            for (int64_t d = 0; d < head; ++d) attended[query + d] += weight * cached[1][key + d];
          }
          for (int64_t d = 0; d < head; ++d) attended[query + d] /= total;
        }
    expected = outputs_of(expected, attended, own(3), own(4), own(5), own(6), norms[2 * i + 1], layers[i].eps[1]);
  }
  regard_decoder_layers_args a{};
  a.size = sizeof a;
  a.threads = threads;
  a.batch = batch;
  a.n = n;
  a.width = width;
  a.head_width = head;
  a.count = 2;
  a.layers = layers;
  a.lengths = lengths;
  a.padding = padding[0] ? padding : nullptr;
  a.pages = paged ? pages : nullptr;
  a.pages_stride = most;
  a.page_size = page_size;
  const Floats bounds = unwritten(batch * kv * slots / page_size * head);  // not read, where no earlier page is chosen
  const regard_decoder_reading reading[2] = {{bounds.data(), bounds.data(), slots, page_size, 0, 1}, {}};
  if (dropped) {
    a.fewer = fewer;
    a.slots = replaced;
    a.reading = few ? reading : nullptr;
  }
  const regard_decoder_rotation rotations[2] = {{}, {slot_cosine.data(), slot_sine.data(), held}};
  a.rotations = anew ? rotations : nullptr;
  a.cosine = cosine.data();
  a.sine = sine.data();
  a.x = x.data();
  const Floats before = x, norm = numbers(width);
  if (paged) {
    a.eps = 1e-5f;
    a.norm = norm.data();
    expected = normed(expected, norm, a.eps);
    a.padding = padding;
    must("padding beside pages", regard_decoder_layers(&a), REGARD_BAD_ARGUMENT);
    a.padding = nullptr;
  }
  if (dropped) {
    const int64_t more[] = {0, 3}, beyond[] = {-1, 9};
    a.fewer = more;
    must("a cache that lacks more than there are", regard_decoder_layers(&a), REGARD_BAD_ARGUMENT);
    a.fewer = fewer;
    a.slots = beyond;
    must("a slot beyond the cache, or for several tokens", regard_decoder_layers(&a), REGARD_BAD_ARGUMENT);
    a.slots = replaced;
    const regard_decoder_reading longer[2] = {{bounds.data(), bounds.data(), 6, page_size, 0, 1}, {}};
    a.reading = longer;
    must("pages of a cache of another size, or for several tokens", regard_decoder_layers(&a), REGARD_BAD_ARGUMENT);
    a.reading = few ? reading : nullptr;
    std::vector<int64_t> ranks(static_cast<size_t>(batch * kv * slots));
    const regard_decoder_eviction beside[2] = {{nullptr, ranks.data(), slots, 9, 9}, {}}, small[2] = {{}, {nullptr, ranks.data(), 3, 9, 9}};
    for (const auto* evictions : {beside, small}) {
      a.evictions = evictions;
      must("a layer that chooses pages and drops tokens, a cache of another size, or several tokens",
           regard_decoder_layers(&a), REGARD_BAD_ARGUMENT);
    }
    a.evictions = nullptr;
    const regard_decoder_rotation fewer_slots[2] = {{}, {slot_cosine.data(), slot_sine.data(), held - 1}},
                                  other[2] = {few ? rotations[1] : fewer_slots[1], {}};
    for (const auto* wrong : {fewer_slots, other}) {
      a.rotations = wrong;
      must("angles for fewer slots, or beside chosen pages", regard_decoder_layers(&a), REGARD_BAD_ARGUMENT);
    }
    a.rotations = anew ? rotations : nullptr;
    a.padding = padding;
    must("padding of caches that have dropped tokens", regard_decoder_layers(&a), REGARD_BAD_ARGUMENT);
    a.padding = nullptr;
  }
  std::swap(layers[1].weights[5].n, layers[1].weights[5].k);
  must("a weight of another size", regard_decoder_layers(&a), REGARD_BAD_ARGUMENT);
  if (x != before) fail("something was written");
  std::swap(layers[1].weights[5].n, layers[1].weights[5].k);
  must("layers are taken", regard_decoder_layers(&a));
  compare("layers", Doubles(x.begin(), x.end()), expected, 1e-5, 1);
  compare_caches(caches, written);
}

// One token per row: a layer whose cache follows two blocks of tokens in 8 bits, and one that then drops tokens, of which
// the first row holds more than its capacity.
void check_scored(int64_t heads, int64_t head, bool kept, int64_t threads) {
  const int64_t batch = 2, width = 70, hidden = 50, kv = 2, slots = 9, group = heads / kv;
  const int64_t lengths[] = {5, 2}, sizes[] = {5, 39}, capacity = 4, kept_from = 3;
  now("layers with %d heads of %d, %s", int(heads), int(head), kept ? "sums of weights" : "the last weights");
  Floats x = numbers(batch * width);
  const Floats cosine = numbers(batch * head), sine = numbers(batch * head);
  std::vector<std::unique_ptr<Weight>> weights;
  std::vector<Floats> norms, caches, steps;
  std::vector<std::vector<int8_t>> codes;
  regard_decoder_layer layers[2]{};
  for (int i = 0; i < 4; ++i) norms.push_back(numbers(width)), caches.push_back(unwritten(batch * kv * slots * head));
  for (int64_t tokens : sizes)
    for (bool value : {false, true}) {
      codes.emplace_back(static_cast<size_t>(batch * kv * tokens * head));
      for (int8_t& code : codes.back()) code = static_cast<int8_t>(127 * uniform());
      steps.push_back(numbers(batch * kv * (value ? tokens : head), .002f, .02f));
    }
  regard_decoder_block blocks[2];
  for (int i = 0; i < 2; ++i)
    blocks[i] = {codes[2 * i].data(), codes[2 * i + 1].data(), steps[2 * i].data(), steps[2 * i + 1].data(), sizes[i]};
  Floats sums = numbers(batch * kv * slots, 0, 1);
  std::vector<int64_t> ranks;
  for (int64_t i = 0; i < batch * kv * slots; ++i) ranks.push_back(i % slots);
  Doubles expected(x.begin(), x.end()), worth(sums.begin(), sums.end());
  std::vector<Doubles> written;
  std::vector<int64_t> moved = ranks;
  const auto slot = [&](int64_t b, int64_t g, int64_t t) { return ((b * kv + g) * slots + t) * head; };
  for (int i = 0; i < 2; ++i) {
    const int64_t shapes[7][2] = {{heads * head, width}, {kv * head, width}, {kv * head, width}, {width, heads * head},
                                  {hidden, width}, {hidden, width}, {width, hidden}};
    const size_t first = weights.size();
    for (int j = 0; j < 7; ++j) {
      weights.emplace_back(new Weight(32, shapes[j][0], shapes[j][1], false));
      layers[i].weights[j] = weights.back()->given;
    }
    const auto& own = [&](int j) -> const Weight& { return *weights[first + j]; };
    set_layer(layers[i], &norms[2 * i], &caches[2 * i], kv, slots, head, .1f, -1);
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t g = 0; g < kv; ++g)
        for (int64_t d = 0; d < lengths[b] * head; ++d)
          for (int j = 0; j < 2; ++j) caches[2 * i + j][slot(b, g, 0) + d] = uniform();
    const Doubles u = normed(expected, norms[2 * i], layers[i].eps[0]);
    const Doubles q = turned(own(0)(u), heads * head, head, cosine, sine), k = turned(own(1)(u), kv * head, head, cosine, sine);
    const Doubles v = own(2)(u);
    Doubles cached[2];
    for (int j = 0; j < 2; ++j) {
      cached[j].assign(caches[2 * i + j].begin(), caches[2 * i + j].end());
      for (int64_t b = 0; b < batch; ++b)
        for (int64_t g = 0; g < kv; ++g)
          for (int64_t d = 0; d < head; ++d) cached[j][slot(b, g, lengths[b]) + d] = (j ? v : k)[(b * kv + g) * head + d];
    }
    Doubles attended(batch * heads * head), shares(batch * heads * slots);
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t pair = b * kv + h / group, query = (b * heads + h) * head, held = lengths[b] + 1;
        double total = 0;
        const auto see = [&](auto key, auto value) {
          double score = 0;
          for (int64_t d = 0; d < head; ++d) score += q[query + d] * key(d);
          const double weight = exp(.1f * score);
          total += weight;
          for (int64_t d = 0; d < head; ++d) attended[query + d] += weight * value(d);
          return weight;
        };
        for (int p = 0; i == 0 && p < 2; ++p)
          for (int64_t t = 0; t < sizes[p]; ++t)
            see([&](int64_t d) { return codes[2 * p][(pair * sizes[p] + t) * head + d] * steps[2 * p][pair * head + d]; },
                [&](int64_t d) { return codes[2 * p + 1][(pair * head + d) * sizes[p] + t] * steps[2 * p + 1][pair * sizes[p] + t]; });
        for (int64_t t = 0; t < held; ++t)
          shares[(b * heads + h) * slots + t] = see([&](int64_t d) { return cached[0][slot(b, h / group, t) + d]; },
                                                    [&](int64_t d) { return cached[1][slot(b, h / group, t) + d]; });
        for (int64_t d = 0; d < head; ++d) attended[query + d] /= total;
        for (int64_t t = 0; t < held; ++t) shares[(b * heads + h) * slots + t] /= total;
      }
    expected = outputs_of(expected, attended, own(3), own(4), own(5), own(6), norms[2 * i + 1], layers[i].eps[1]);
    for (int64_t b = 0; i == 1 && b < batch; ++b)
      for (int64_t g = 0; g < kv; ++g) {
        const int64_t held = lengths[b] + 1, last = held - 1, base = (b * kv + g) * slots;
        Doubles own_worth(slots);
        for (int64_t t = 0; t < held; ++t) {
          own_worth[t] = kept && t < last ? worth[base + t] : 0;
          for (int64_t h = kept ? g * group : 0; h < (kept ? (g + 1) * group : heads); ++h)
            own_worth[t] += shares[(b * heads + h) * slots + t];
          if (kept) worth[base + t] = own_worth[t];
        }
        if (held <= capacity) continue;
        int64_t dropped = 0;
        for (int64_t t = 0; t < kept_from; ++t)
          if (own_worth[t] < own_worth[dropped]) dropped = t;
        for (int j = 0; j < 2; ++j)
          for (int64_t d = 0; d < head; ++d) cached[j][slot(b, g, dropped) + d] = cached[j][slot(b, g, last) + d];
        moved[base + dropped] = last;
        if (kept) worth[base + dropped] = worth[base + last];
      }
    for (const Doubles& c : cached) written.push_back(c);
  }
  regard_decoder_layers_args a{};
  a.size = sizeof a;
  a.threads = threads;
  a.batch = batch;
  a.n = 1;
  a.width = width;
  a.head_width = head;
  a.count = 2;
  a.layers = layers;
  a.lengths = lengths;
  a.cosine = cosine.data();
  a.sine = sine.data();
  a.x = x.data();
  const regard_decoder_rounded rounded[2] = {{blocks, 2}, {}}, both[2] = {{}, {blocks, 2}};
  const regard_decoder_eviction evictions[2] = {{}, {kept ? sums.data() : nullptr, ranks.data(), slots, capacity, kept_from}};
  a.evictions = evictions;
  a.rounded = both;
  must("a layer that drops tokens after some in 8 bits", regard_decoder_layers(&a), REGARD_BAD_ARGUMENT);
  a.rounded = rounded;
  must("layers are taken", regard_decoder_layers(&a));
  compare("layers", Doubles(x.begin(), x.end()), expected, 1e-5, 1);
  if (kept) compare("sums of weights", Doubles(sums.begin(), sums.end()), worth, 1e-5, 1);
  if (ranks != moved) fail("ranks");
  compare_caches(caches, written);
}

enum Kind { OF_FEATURES, OF_HEADS, STEPS, FIXED, RATES, NORMALIZED, MAPPED, WINDOWED, KINDS };

// Layers of 4 query heads, with recurrences of 2 heads, of one kind and the next; windows of two rows, one of them not
// full yet.
void check_recurrences(int64_t bits, int64_t n, int kind, int64_t threads) {
  const int64_t batch = 2, width = 70, head = 10, hidden = 90, heads = 4, own = 2, tokens = batch * n, rank = 33;
  const int64_t lengths[] = {5, 1}, window = 3, slots = window + n + 1, mapped_to = 19;
  now("recurrences from %d, %d bits, %d tokens", kind, int(bits), int(n));
  Floats x = numbers(tokens * width);
  const Floats cosine = numbers(tokens * head), sine = numbers(tokens * head);
  Doubles expected(x.begin(), x.end());
  regard_decoder_layer layers[2]{};
  regard_decoder_recurrence recurrences[2]{};
  regard_decoder_state given_states[2]{};
  std::vector<std::unique_ptr<Weight>> kept;
  const auto weight = [&](int64_t rows, int64_t columns, bool offsets) -> const Weight& {
    kept.emplace_back(new Weight(bits, rows, columns, offsets));
    return *kept.back();
  };
  Floats norms[4], rates[2], gate_biases[2], before[2], after[2], maps[2][2], weights_of_windows[2], windows[2][2];
  Doubles states[2], written[2][2];
  for (int i = 0; i < 2; ++i) {
    const int here = (kind + i) % KINDS;
    const bool odd = i == 1;
    const Weight& wq = weight(heads * head, width, odd);
    const Weight &wk = weight(own * head, width, odd), &wv = weight(own * head, width, odd);
    const Weight &wo = weight(width, heads * head, odd), &gate = weight(hidden, width, odd), &up = weight(hidden, width, odd);
    const Weight &down = weight(width, hidden, odd), &low = weight(rank, width, odd), &high = weight(own * head, rank, odd);
    const Weight &of_heads = weight(own, width, odd), &beta = weight(own, width, odd);
    const Weight* const weights[] = {&wq, &wk, &wv, &wo, &gate, &up, &down};
    regard_decoder_layer& layer = layers[i];
    regard_decoder_recurrence& r = recurrences[i];
    for (int j = 0; j < 7; ++j) layer.weights[j] = weights[j]->given;
    for (int j = 0; j < 2; ++j) {
      norms[2 * i + j] = numbers(width);
      layer.eps[j] = 1e-5f;
      layer.norms[j] = norms[2 * i + j].data();
    }
    const bool normalized = here >= NORMALIZED, mapped = here >= MAPPED, windowed = here == WINDOWED;
    const int64_t features = mapped ? 2 * mapped_to : head, columns = head + normalized;
    const size_t size = batch * heads * features * columns;
    rates[i] = numbers(own);
    before[i] = normalized ? numbers(size, .5f, 2) : numbers(size);
    after[i] = unwritten(size);
    layer.scale = windowed ? 2 : 7;
    layer.recurrence = &r;
    given_states[i].before = before[i].data();
    given_states[i].after = after[i].data();
    r.scale = .3f;
    r.normalized = normalized;
    r.divisor = here == NORMALIZED ? .25f : 0;
    if (here == NORMALIZED) r.feature_map = REGARD_FEATURES_ELU;
    if (here == FIXED) r.feature_map = REGARD_FEATURES_SILU;
    for (int j = 0; mapped && j < 2; ++j) {
      maps[i][j] = numbers(heads * head * mapped_to, -.5f, .5f);
      r.maps[j] = maps[i][j].data();
      r.features = mapped_to;
    }
    if (windowed) {
      r.window = window;
      weights_of_windows[i] = numbers(heads);
      r.log_window_weights = weights_of_windows[i].data();
      given_states[i].lengths = lengths;
      for (int j = 0; j < 2; ++j) {
        windows[i][j] = unwritten(batch * heads * slots * head);
        for (int64_t row = 0; row < batch; ++row)
          for (int64_t h = 0; h < heads; ++h)
            for (int64_t s = std::max<int64_t>(0, window - lengths[row]); s < window; ++s)
              for (int64_t d = 0; d < head; ++d) windows[i][j][((row * heads + h) * slots + s) * head + d] = uniform();
        int64_t* const strides = j == 0 ? given_states[i].keys_strides : given_states[i].values_strides;
        strides[0] = heads * slots * head;
        strides[1] = slots * head;
        strides[2] = head;
      }
      given_states[i].keys = windows[i][0].data();
      given_states[i].values = windows[i][1].data();
    }
    r.eps[0] = r.eps[1] = -1;
    r.least = here == OF_FEATURES ? -.9f : -INFINITY;
    r.sign = here == STEPS ? 1 : -1;
    r.steps = here == STEPS;
    if (here == OF_FEATURES) r.gates[0] = low.given, r.gates[1] = high.given;
    if (here == OF_HEADS || here == STEPS) r.gates[0] = of_heads.given;
    if (here < RATES) r.log_rates = rates[i].data();
    gate_biases[i] = numbers(here == OF_FEATURES ? own * head : own);
    if (here <= OF_HEADS) r.gate_bias = gate_biases[i].data();
    if (here == RATES) r.beta = beta.given, r.most_beta = 2, r.eps[0] = 1e-3f, r.eps[1] = 1e-4f;

    const Doubles u = normed(expected, norms[2 * i], layer.eps[0]);
    Doubles q = turned(wq(u), heads * head, head, cosine, sine), k = turned(wk(u), own * head, head, cosine, sine), v = wv(u);
    Doubles z = here == OF_FEATURES ? high(low(u)) : of_heads(u);
    const Doubles b = beta(u);
    for (size_t j = 0; here <= OF_HEADS && j < z.size(); ++j) z[j] += gate_biases[i][j % gate_biases[i].size()];
    const int64_t each = here == OF_FEATURES ? head : 1;
    const auto unit = [&](Doubles& y, int64_t first, double eps) {
      double squares = 0;
      for (int64_t d = 0; d < head; ++d) squares += y[first + d] * y[first + d];
      for (int64_t d = 0; d < head; ++d) y[first + d] /= eps < 0 ? 1 : sqrt(squares + eps);
    };
    for (int64_t t = 0; t < tokens * heads; ++t) unit(q, t * head, r.eps[0]);
    for (int64_t t = 0; t < tokens * own; ++t) unit(k, t * head, r.eps[1]);
    const auto phi = [&](const Doubles& y, int64_t first, int64_t h, int which) {
      Doubles found(y.begin() + first, y.begin() + first + head);
      for (double& x : found) {
        if (r.feature_map == REGARD_FEATURES_ELU) x = x > 0 ? x + 1 : exp(x);
        if (r.feature_map == REGARD_FEATURES_SILU) x = x / (1 + exp(-x));
      }
      if (!mapped) return found;
      Doubles both(features);
      double sums[2] = {0, 0};
      for (int64_t f = 0; f < mapped_to; ++f) {
        double x = 0;
        for (int64_t d = 0; d < head; ++d) x += found[d] * maps[i][which][(h * head + d) * mapped_to + f];
        for (int j = 0; j < 2; ++j) sums[j] += both[j * mapped_to + f] = exp(j == 0 ? x : -x);
      }
      for (int64_t f = 0; f < features; ++f) both[f] /= sums[f / mapped_to];
      return both;
    };
    for (int j = 0; j < 2; ++j) {
      written[i][j].assign(windows[i][j].begin(), windows[i][j].end());
      for (int64_t row = 0; windowed && row < batch; ++row)
        for (int64_t t = 0; t < n; ++t)
          for (int64_t h = 0; h < heads; ++h)
            for (int64_t d = 0; d < head; ++d)
              written[i][j][((row * heads + h) * slots + window + t) * head + d] =
                  (j == 0 ? k : v)[((row * n + t) * own + h / (heads / own)) * head + d];
    }
    Doubles read(tokens * heads * head);
    states[i].assign(before[i].begin(), before[i].end());
    for (int64_t row = 0; row < batch; ++row)
      for (int64_t t = row * n; t < row * n + n; ++t)
        for (int64_t h = 0; h < heads; ++h) {
          const int64_t of = t * own + h / (heads / own), slot = ((row * heads + h) * slots + t - row * n) * head;
          double* const s = &states[i][(row * heads + h) * features * columns];
          const auto strength = [&](int64_t at) { return here == FIXED ? 1 : log1p(exp(r.sign * z[at])); };
          const Doubles query = phi(q, (t * heads + h) * head, h, 0);
          Doubles key = windowed ? phi(written[i][0], slot, h, 1) : phi(k, of * head, h, 1);
          Doubles values(v.begin() + of * head, v.begin() + (of + 1) * head);
          if (windowed) values.assign(written[i][1].begin() + slot, written[i][1].begin() + slot + head);
          for (double& value : values) value *= here == STEPS ? strength(of) : 1;
          if (normalized) values.push_back(1);
          if (windowed && lengths[row] + t - row * n < window) {  // nothing leaves the window
            std::fill(key.begin(), key.end(), 0);
            std::fill(values.begin(), values.end(), 0);
          }
          for (int64_t d = 0; d < features; ++d) {
            const double rate = here < RATES ? exp(double(rates[i][h / (heads / own)])) : 0;
            const double g = rate == 0 ? 0 : fmax(double(r.least), -rate * strength(each == 1 ? of : of * head + d));
            for (int64_t e = 0; e < columns; ++e) s[d * columns + e] *= exp(g);
          }
          for (int64_t e = 0; here == RATES && e < head; ++e) {
            double found = 0;
            for (int64_t d = 0; d < head; ++d) found += s[d * head + e] * key[d];
            values[e] = 2 / (1 + exp(-b[of])) * (values[e] - found);
          }
          Doubles sums(columns);
          for (int64_t d = 0; d < features; ++d)
            for (int64_t e = 0; e < columns; ++e) {
              s[d * columns + e] += key[d] * values[e];
              sums[e] += .3f * query[d] * s[d * columns + e];
            }
          double most_score = -INFINITY;
          const int64_t from = std::max<int64_t>(1, window - lengths[row] - (t - row * n));
          const auto score = [&](int64_t j) {
            double found = 0;
            for (int64_t d = 0; d < head; ++d) found += q[(t * heads + h) * head + d] * written[i][0][slot + j * head + d];
            return layer.scale * found;
          };
          for (int64_t j = from; windowed && j <= window; ++j) most_score = fmax(most_score, score(j));
          for (int64_t j = from; windowed && j <= window; ++j) {
            const double weight = exp(weights_of_windows[i][h] + score(j) - most_score);
            for (int64_t e = 0; e < head; ++e) sums[e] += weight * written[i][1][slot + j * head + e];
            sums[head] += weight;
          }
          for (int64_t e = 0; e < head; ++e)
            read[(t * heads + h) * head + e] = sums[e] / (normalized ? sums[head] + r.divisor : 1);
        }
    expected = outputs_of(expected, read, wo, gate, up, down, norms[2 * i + 1], layer.eps[1]);
  }
  regard_decoder_layers_args a{};
  a.size = sizeof a;
  a.threads = threads;
  a.batch = batch;
  a.n = n;
  a.width = width;
  a.head_width = head;
  a.count = 2;
  a.layers = layers;
  a.states = given_states;
  a.lengths = lengths;
  a.cosine = cosine.data();
  a.sine = sine.data();
  a.x = x.data();
  const Floats given = x;
  const auto refused = [&](const char* what, auto change) {
    const regard_decoder_recurrence recurrence = recurrences[1];
    change(recurrences[1]);
    must(what, regard_decoder_layers(&a), REGARD_BAD_ARGUMENT);
    a.states = given_states;
    recurrences[1] = recurrence;
    if (x != given) fail("something was written");
  };
  refused("no states", [&](auto&) { a.states = nullptr; });
  refused("gates of no heads", [&](auto& r) { r.gates[0] = kept[9]->given, r.gates[0].n = 3, r.gates[1].n = 0; });
  refused("gates without rates", [&](auto& r) { r.gates[0] = kept[9]->given, r.log_rates = nullptr; });
  refused("rates of other heads", [&](auto& r) { r.beta = kept[9]->given, r.beta.n = 3; });
  refused("a bias without gates", [&](auto& r) {
    r.gate_bias = norms[0].data();
    r.gates[0].n = r.gates[1].n = r.steps = 0;
  });
  refused("another feature map", [&](auto& r) { r.feature_map = 8; });
  refused("one map", [&](auto& r) { r.maps[1] = r.maps[0] == nullptr ? norms[0].data() : nullptr; });
  refused("a window without maps", [&](auto& r) { r.window = 2, r.maps[0] = r.maps[1] = nullptr; });
  refused("a window without a normaliser", [&](auto& r) { r.window = 2, r.normalized = 0; });
  must("recurrences are taken", regard_decoder_layers(&a));
  compare("recurrences", Doubles(x.begin(), x.end()), expected, 1e-5, 1);
  for (int i = 0; i < 2; ++i) {
    compare("a state", Doubles(after[i].begin(), after[i].end()), states[i], 1e-5, 1);
    if (Doubles(before[i].begin(), before[i].end()) == states[i]) fail("a state is as it was");
    for (int j = 0; j < 2; ++j) {
      Doubles found(windows[i][j].begin(), windows[i][j].end());
      for (size_t at = 0; at < found.size(); ++at)
        if (std::isnan(found[at]) && std::isnan(written[i][j][at])) found[at] = written[i][j][at] = 0;  // unused slots
      compare("a window", found, written[i][j], 1e-5, 1);
    }
  }
}

}  // namespace

int main() {
  return on_every_instruction_set([] {
    for (int64_t bits : {32, 8, 4})
      for (int64_t m : {1, 5}) {
        check(bits, m, m == 1 ? 1 : 3);
        check_layers(bits, m == 1 ? 1 : 4, m == 1, m == 1 ? 1 : 3);
      }
    for (int64_t n : {1, 4})
      for (bool anew : {false, true}) check_layers(32, n, false, n == 1 ? 1 : 3, true, anew);
    for (int64_t heads : {2, 4, 6, 10}) check_scored(heads, heads == 4 ? 10 : 40, heads != 6, heads == 2 ? 1 : 3);
    for (int kind = 0; kind < KINDS; ++kind)
      for (int64_t n : {1, 3}) check_recurrences(kind == RATES ? 8 : 32, n, kind, n == 1 ? 1 : 3);
  });
}
