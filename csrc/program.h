// A whole step of a model: from token ids to logits, layer after layer. Where an expert is not in memory that a layer wants, a ledger plans
// its reads, or the step pauses for a plan of Python's.
#pragma once
#include "attention.h"
#include "executor.h"
#include "ledger.h"
#include "widths.h"

#include <optional>

namespace d2moe {

struct ProgramShape {
  int64_t hidden, vocab, top_k, moe_layers, max_tokens;
};

class Program {
public:
  // ids and bits [moe_layers, max_tokens, top_k] receive the experts chosen in the step and their widths; the arrays of
  // dials [max_tokens] say what the tokens allow and are the caller's to fill before `start`.
  Program(Runtime& rt, const ProgramShape& shape, const Linear& embedding, const Linear& head, const float* final_norm,
          float eps, std::vector<float> inverse_frequency, float rope_scale, KvCache& kv, Executor& experts, int32_t* ids,
          int32_t* bits, const Dials& dials);
  ~Program();
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  // A layer without a router has a feed-forward block of its own; with one, the block is the shared expert, if any. Without a width
  // router its tokens take the least they allow.
  void add_layer(const AttentionShape& shape, const AttentionWeights& attention, const std::optional<RouterWeights>& router,
                 const std::optional<FeedForwardWeights>& feed_forward, const std::optional<WidthRouter>& widths);

  // rows [count], ascending: the tokens whose logits are wanted; `run` puts them in logits [count, vocab]. The others end with their
  // keys and values of the last layer.
  void start(const int32_t* ids, const TokenPlaces& places, int64_t tokens, int64_t sequences, const int32_t* rows, int64_t count,
             float* logits);
  // Goes on as far as it can: -1 at the end; kMore after a while, so that a caller may look up; else the MoE layer (counted among those)
  // whose experts are not all there, where no ledger plans. Its reads are to be started then, and run called again: it computes what
  // arrives.
  int64_t run();
  static constexpr int64_t kMore = -2;
  // From now on this ledger plans what is missing (null: run comes back).
  void plan_by(Ledger* ledger) { ledger_ = ledger; }
  // What it planned since the last call: layer calls, bytes that were missing, time until a layer's first wave's reads were started, and
  // planes to read, by the width that each makes.
  struct Planned {
    int64_t plans = 0, missing_bytes = 0, decide_ns = 0;
    WidthCounts read{};
  };
  int64_t planned() const { return planned_.plans; }
  Planned take_planned() { return std::exchange(planned_, {}); }
  // For a layer that does not fit at once: computes these experts of it; run computes the rest.
  void compute(const int32_t* experts, int64_t count);
  // Where run comes back: at layers whose experts are not all there; or at every MoE layer, to be watched or to be decided on.
  enum class Pause { missing, watch, decide };
  void pause(Pause when) { pause_ = when; }
  bool held() const { return held_; } // whether the layer that run came back at has all its experts, which was noted
  // For the layer that waits: other widths [tokens, top_k], 0 leaving an expert out, and other gates, unless null.
  void choose(const int32_t* widths, const float* gates);
  const float* gates() const { return gates_.data(); } // [waiting, top_k] of the layer that waits
  int64_t waiting() const { return routed_ ? tokens_ : 0; }
  // out [waiting, ahead, top_k]: experts that the routers of the next MoE layers choose for the input of the one that waits, by
  // falling weight; -1 past the last one, and where that sees fewer tokens.
  void forecast(int64_t ahead, int32_t* out);
  void abandon(); // forgets the step in progress

  // Layers in a row of one step that found all their experts in memory, so that nobody was asked about them.
  struct Note {
    int64_t first, layers, tokens;
    std::vector<int32_t> ids, bits; // [layers, tokens, top_k]
  };
  std::vector<Note> take_notes(); // all since the last call
  int64_t busy_ns() const { return busy_ns_; } // time spent in the calls above
  // Of each sequence of the step that ended last: (token, expert) pairs, and the sum of their widths.
  std::vector<std::pair<int64_t, int64_t>> taken() const;
  // (token, expert) pairs of all steps that came to their end, by their width.
  const WidthCounts& used() const { return used_; }
  // Planes that layer calls wanted so far of their experts, by the width that each makes (2 is the base): an expert's are those up to
  // the widest width that any token asked of it.
  WidthCounts planes_wanted() const;
  const ProgramShape& shape() const { return shape_; }

private:
  struct Layer {
    AttentionShape shape;
    AttentionWeights attention;
    std::optional<RouterWeights> router;
    std::optional<FeedForwardWeights> feed_forward;
    std::optional<WidthRouter> widths;
    int64_t moe_index;
  };
  int32_t* ids(int64_t moe_index) { return ids_ + moe_index * shape_.max_tokens * shape_.top_k; }
  int32_t* bits(int64_t moe_index) { return bits_ + moe_index * shape_.max_tokens * shape_.top_k; }
  void open(); // begins the waiting layer's experts and computes its shared one
  void bring(int64_t moe_index); // plans the waiting layer, starts its reads and computes all its waves but the last
  void send(const Wave& wave);
  void note(int64_t moe_index);
  void count_taken(int64_t moe_index);
  void turn(); // cosine and sine of the step's positions
  void keep_rows();

  Runtime& rt_;
  const ProgramShape shape_;
  const Linear embedding_, head_;
  const float* final_norm_;
  const float eps_;
  const std::vector<float> inverse_frequency_;
  const float rope_scale_;
  KvCache& kv_;
  Executor& experts_;
  Ledger* ledger_ = nullptr;
  Planned planned_;
  int32_t *const ids_, *const bits_;
  const Dials dials_;
  std::vector<Layer> layers_;
  std::vector<Note> notes_;
  bool noting_ = false; // whether the last note is of this step and of the layer before
  int64_t moe_count_ = 0;

  std::vector<float> x_, h_, gates_, cosine_, sine_;
  std::vector<int32_t> position_, sequence_, tables_, rows_;
  std::vector<int32_t> least_, most_; // dials of the tokens that are left, with their prices
  std::vector<float> price_;
  Pause pause_ = Pause::missing;
  bool held_ = false;
  int64_t tokens_ = 0, table_blocks_ = 0;
  float* logits_ = nullptr;
  size_t next_ = 0;     // the layer that comes next
  bool routed_ = false; // its attention and router have run, its experts have not
  int64_t busy_ns_ = 0;
  WidthCounts wanted_{}, used_{}; // wanted: experts by the widest width
  std::vector<WidthCounts> taken_; // of each sequence of the step
};

} // namespace d2moe
