// The first Linear with the mix hidden behind it, on Hopper: one persistent kernel mixes and multiplies at once.
//
//   Y[out(r), n] = act(sum over k of A[r, k] * W[n, k] + bias[n]),   Z the same before act, if asked for
//
// Rows r = b * T + t are flat, skipped tokens included (0.17 % waste for a CLS token), so that a block of A that is a
// tap is read by the copy engine where the layer lies; out(r) drops the skipped tokens in the store. Mixed blocks are
// written to a scratch F [rows, blocks * D] ahead of the products that read them, by the three warps per multiprocessor
// that neither copy nor multiply: a few rows at a time, claimed from a ticket in the order of the rows. Taps are
// multiplied first, since they need no mix.
//
// The mixers live by the number of bytes under way, 18 to 27 KB per multiprocessor: each lane copies the vectors that it
// will add itself to a ring in shared memory, 18 of 16 bytes before it waits for the first six. No registers hold them,
// no other lane needs them, and the ring goes on across layers, rows and claims.
//
// Every tile of 128 rows of F has a flag that counts its mixed groups of rows. The copy warp waits for it before the
// first box of F. Mixers never wait for anybody, and only a running mixer claims a group, so no launch depends on how
// many blocks are resident. F is written by ordinary stores and read by the copy engine: a proxy fence stands on both
// sides of the flag.
//
// Ticket and flags are zero at launch, without anybody clearing them: the cluster that is done last sets them back to
// zero. It sees that it is the last by a counter, to which every cluster adds when its mixers have made their last claim
// and its copy warps have waited for their last flag, so nobody can read or add afterwards. The next launch on the
// counters must come after this one. The host sees to that (gemm.py): counters belong to one stream, or to one launch in
// a graph, and two replays of a graph never overlap; a stream that is not torch's own, and may be destroyed while it
// works, brings counters of its own. A launch that the driver refuses has not touched them; one that fails while it runs
// takes the context, and with it all memory, along.
//
// Programmatic dependent launch would gain nothing: the kernels of torch and cuBLAS on both sides never let a dependent
// launch begin early.
//
// One or two images have too few tiles of 128 x 256 for all multiprocessors; their tiles are 192 columns wide.
//
// Floors per image (CLIP-L/336, IGVA, H 4096, bf16), modelled and not measured: 9.7 GFLOP of products, 12.2 us at 790
// TFLOP/s; beside them 24 layers are read, 28.4 MB, 9.8 us at the 2.9 TB/s that the mix kernel reaches on an H100 or 7.1
// us at the 4.3 TB/s of an H200, F is written and read in L2, 1.2 MB each way, and Y is written, 4.7 MB. Without mixed
// blocks (a concat of taps) the mixers leave at once: what is left is the product with its epilogue.
#include "weighted_mix/cuda/gemm_sm90.h"

#include "dense/cuda/activation.cuh"
#include "gemm/hopper.cuh"

namespace igva::cuda {

namespace {

__device__ int32_t own_counters[gemm_counters]; // zero when the module is loaded

constexpr int mixer_warps = 3;
constexpr int mix_loads = 3, mix_vectors = 2; // layers, and vectors of each, that a lane copies at a time: a unit
constexpr int mix_units = 3;                  // units under way

// Behind the ring of the products.
struct MixMemory {
  struct Warp {
    uint4 ring[mix_units][mix_loads][mix_vectors][32];
    const void* layer_rows[max_entries + mix_loads - 1]; // where the row that is being requested begins in each layer
  };
  Warp warps[mixer_warps];
  Layer layers[max_entries]; // in the order in which they are added
};
template <int N>
constexpr int shared_bytes = ring_bytes<N> + int(sizeof(MixMemory));
static_assert(shared_bytes<gemm_wide> <= 227 * 1024);

// One thread: boxes of A and of its half of W for every tile and step of K, the steps of F last.
template <int N>
__device__ void copy_boxes(const GemmParams& params, const Tiles<N>& tiles, const Ring<N>& ring, const int* counters) {
  const int steps_a_block = params.width / gemm_tile_k;
  Stage stage;
  for (int tile = tiles.first; tile < tiles.count(); tile += tiles.stride) {
    const int row = tiles.row(tile), column = tiles.column(tile);
    bool waited = false;
    for (int i = 0; i < params.num_blocks; ++i) {
      const GemmBlock& block = params.blocks[i];
      if (block.mixed && !waited) {
        const int* flag = counters + gemm_first_flag + row / gemm_tile_m;
        const int groups = (min(gemm_tile_m, params.rows - row) + gemm_mix_rows - 1) / gemm_mix_rows;
        while (ptx::load_relaxed(flag) < groups) ptx::sleep(64);
        ptx::load_acquire(flag);
        ptx::proxy_fence();
        waited = true;
      }
      for (int step = 0; step < steps_a_block; ++step, stage.next()) {
        ring.copy(stage, &params.a[block.map], block.offset + step * gemm_tile_k, row, &params.w,
                  block.position * params.width + step * gemm_tile_k, column, tiles.rank);
      }
    }
  }
}

// What a warp mixes, piece by piece: a piece is 512 elements of a row, and is requested in units. `whole`: no unit has
// fewer layers than others.
template <class T, bool whole>
struct Pieces {
  static constexpr int vector_step = 32 * 16, step = mix_vectors * vector_step; // bytes

  const GemmParams& params;
  const Layer* layers;
  MixMemory::Warp& memory;
  int* ticket;
  int lane, entries;
  int claimed = 0;         // in lane 0: the group after this one
  int row = 0, entry = 0;  // of the next unit
  int end;                 // bytes of a row
  int offset = 0;          // of this lane in the next unit, in bytes; `end` when no row is left
  int last;                // `end` for the second vector of a lane
  int requested = 0;       // the number of pieces
  int rows = 0;            // in lane i: the row of the last piece whose number is i modulo 32

  __device__ Pieces(const GemmParams& params, const Layer* layers, MixMemory::Warp& memory, int* ticket, int lane)
      : params(params), layers(layers), memory(memory), ticket(ticket), lane(lane),
        entries(params.mix.terms[params.mix.num_terms - 1].end), end(params.width * int(sizeof(T))),
        last(end - vector_step) {
    claim();
    next_row();
  }

  // The answer is needed one group later only.
  __device__ void claim() {
    if (lane == 0) claimed = ptx::next_ticket(ticket);
  }

  __device__ void next_row() {
    if (row % gemm_mix_rows == 0 || row >= params.rows) {
      row = __shfl_sync(0xffffffffu, claimed, 0) * gemm_mix_rows;
      if (row < params.rows) claim();
    }
    offset = row < params.rows ? lane * 16 : end;
    const int b = row / params.tokens, patch = row - b * params.tokens - params.skip;
    __syncwarp(); // until all lanes have read those of the row before
#pragma unroll 1
    for (int e = lane; e < entries; e += 32) {
      const Layer& layer = layers[e];
      memory.layer_rows[e] = static_cast<const T*>(layer.data) + b * layer.image_stride + patch * layer.token_stride;
    }
    __syncwarp();
    note();
  }

  __device__ void note() {
    if (lane == requested % 32) rows = row;
    ++requested;
  }

  // Requests the next unit, as a group of copies; when no row is left the group is empty. `ends` tells whether it may be
  // the last one of a piece.
  __device__ void request(uint4* to, bool ends) {
    const char* from[mix_loads];
#pragma unroll
    for (int i = 0; i < mix_loads; ++i) from[i] = static_cast<const char*>(memory.layer_rows[entry + i]) + uint32_t(offset);
    const bool inside[mix_vectors] = {offset < end, offset < last};
#pragma unroll
    for (int i = 0; i < mix_loads; ++i) {
      if (!whole && entry + i >= entries) continue;
      const uint4* vector = reinterpret_cast<const uint4*>(from[i]);
#pragma unroll
      for (int v = 0; v < mix_vectors; ++v) {
        if (inside[v]) copy_async(to + (i * mix_vectors + v) * 32, vector + v * 32);
      }
    }
    commit_copies();
    entry += mix_loads;
    if (ends && entry >= entries) next_piece();
  }

  __device__ void next_piece() {
    entry = 0;
    if (row >= params.rows) return;
    offset += step;
    if (offset - lane * 16 < end) return note();
    ++row;
    next_row();
  }
};

// The sums of a piece, on their way to F. Layers are added in the order of the plan, then scaled, then weighed by a fused
// multiply-add: the same bits as mix_vector.cuh.
template <class T>
struct Sums {
  static constexpr int V = vector_width<T>;
  float sum[mix_vectors][V], part[mix_vectors][V], block[mix_vectors][V];

  __device__ void clear(float (&values)[mix_vectors][V]) {
#pragma unroll
    for (int v = 0; v < mix_vectors; ++v) {
#pragma unroll
      for (int i = 0; i < V; ++i) values[v][i] = 0;
    }
  }

  __device__ void add(const uint4* loaded, bool first) {
#pragma unroll
    for (int v = 0; v < mix_vectors; ++v) {
      float value[V];
      widen<V>(*reinterpret_cast<const Vector<T, V>*>(loaded + v * 32), value);
#pragma unroll
      for (int i = 0; i < V; ++i) sum[v][i] = first ? value[i] : sum[v][i] + value[i];
    }
  }

  // part (zero where `whole`) + scale * sum.
  __device__ void scale(float by, bool whole) {
#pragma unroll
    for (int v = 0; v < mix_vectors; ++v) {
#pragma unroll
      for (int i = 0; i < V; ++i) part[v][i] = (whole ? 0.0f : part[v][i]) + by * sum[v][i];
    }
  }

  __device__ void weigh(float by) {
#pragma unroll
    for (int v = 0; v < mix_vectors; ++v) {
#pragma unroll
      for (int i = 0; i < V; ++i) block[v][i] += by * part[v][i];
    }
  }
};

// A warp mixes groups of rows until there are none left. `sixes`: every term is a part of its own and has six layers, as
// in IGVA's plan. How many it has is not asked then, and lane t keeps what term t needs.
template <class T, bool sixes>
__device__ void mix_rows(const GemmParams& params, MixMemory& memory, int* counters, int warp, int lane) {
  static_assert(!sixes || max_entries / 6 <= 32, "a lane keeps what one term needs");
  using Unit = uint4[mix_loads][mix_vectors][32];
  constexpr int V = vector_width<T>, piece_width = mix_vectors * 32 * V, units_a_term = 6 / mix_loads;
  const MixParams& mix = params.mix;
  Pieces<T, sixes> pieces(params, memory.layers, memory.warps[warp], counters, lane);
  uint4* const ring = memory.warps[warp].ring[0][0][0];
  int unit = lane; // where this lane's vectors of the oldest one lie in the ring
  const auto next_unit = [&](bool ends) {
    pieces.request(ring + unit, ends);
    constexpr int step = sizeof(Unit) / sizeof(uint4);
    unit = unit >= (mix_units - 1) * step ? lane : unit + step;
  };
  // With sixes every second unit ends a term, and may end a piece; the one that is requested is three units ahead.
  static_assert(units_a_term == 2 && mix_units % 2 == 1);
#pragma unroll
  for (int i = 0; i < mix_units; ++i) next_unit(!sixes || i % 2 == 1);

  const MixTerm& own_term = mix.terms[sixes ? min(lane, mix.num_terms - 1) : 0];
  const float own_scale = float(own_term.scale);
  // Which sum is kept at the end of a part, or -1, and whether its block ends too.
  const auto sum_and_end = [](const MixTerm& term) { return term.sum * 2 + term.ends_block; };
  constexpr int neither = -2;
  const int own_sum_and_end = sum_and_end(own_term);
  float own_weight = 1;
  Sums<T> sums;
  int column = lane * V, b = 0, patch = 0;
  T* row = nullptr; // in F, at the column
  for (int piece = 0;; ++piece) {
    const int r = __shfl_sync(0xffffffffu, pieces.rows, piece % 32);
    if (r >= params.rows) return;
    const bool inside[mix_vectors] = {column < params.width, column + 32 * V < params.width};
    const auto weight_of = [&](const MixTerm& term) {
      if (mix.weights.data == nullptr || term.column < 0) return 1.0f;
      const auto* weights = static_cast<const float*>(mix.weights.data);
      return weights[b * mix.weights.row_stride + term.column * mix.weights.column_stride];
    };
    if (column == lane * V) {
      b = r / params.tokens;
      patch = r - b * params.tokens - params.skip;
      row = static_cast<T*>(mix.rows) + int64_t(r) * mix.num_blocks * params.width + column;
      if (sixes) own_weight = weight_of(own_term);
    }
    T* to = row;
    row += piece_width;
    const auto put = [&](T* at, const float(&values)[mix_vectors][V]) {
#pragma unroll
      for (int v = 0; v < mix_vectors; ++v) {
        if (inside[v]) store<V>(at + v * 32 * V, values[v]);
      }
    };
    const auto finish_part = [&](float weight, int ends) {
      sums.weigh(weight);
      if (ends == neither) return;
      if (ends >= 0 && patch >= 0) {
        T* const kept = static_cast<T*>(mix.sums[ends >> 1]);
        put(kept + (int64_t(b) * mix.num_patches + patch) * params.width + column, sums.part);
      }
      if (!(ends & 1)) return;
      put(to, sums.block);
      to += params.width;
      sums.clear(sums.block);
    };
    sums.clear(sums.block);
    if (sixes) {
#pragma unroll 1
      for (int t = 0; t < mix.num_terms; ++t) {
#pragma unroll
        for (int u = 0; u < units_a_term; ++u) {
          wait_for_groups<mix_units - 1>();
#pragma unroll
          for (int i = 0; i < mix_loads; ++i) sums.add(ring + unit + i * mix_vectors * 32, u == 0 && i == 0);
          next_unit(u == 0);
        }
        sums.scale(__shfl_sync(0xffffffffu, own_scale, t), true);
        const float weight = __shfl_sync(0xffffffffu, own_weight, t);
        finish_part(weight, __shfl_sync(0xffffffffu, own_sum_and_end, t));
      }
    } else {
      sums.clear(sums.part);
      sums.clear(sums.sum);
      for (int t = 0, e = 0; t < mix.num_terms;) {
        wait_for_groups<mix_units - 1>();
#pragma unroll 1
        for (int i = 0; i < mix_loads && t < mix.num_terms; ++i) {
          sums.add(ring + unit + i * mix_vectors * 32, false);
          const MixTerm& term = mix.terms[t];
          if (++e < term.end) continue;
          sums.scale(float(term.scale), false);
          sums.clear(sums.sum);
          if (term.ends_part) {
            finish_part(weight_of(term), sum_and_end(term));
            sums.clear(sums.part);
          }
          ++t;
        }
        next_unit(true);
      }
    }
    column += piece_width;
    if (column - lane * V < params.width) continue;
    column = lane * V;
    if ((r + 1) % gemm_mix_rows != 0 && r + 1 < params.rows) continue;
    ptx::proxy_fence();
    __syncwarp();
    if (lane == 0) ptx::add_release(counters + gemm_first_flag + r / gemm_tile_m, 1);
  }
}

// What the accumulators of a tile begin with: the bias of its columns. The words are asked for here and opened later.
template <class T, int N>
struct Bias {
  uint32_t words[N / 8];
  __device__ Bias(const GemmParams& params, int column) {
    const int first = column + threadIdx.x % 4 * 2, count = params.bias == nullptr ? 0 : params.columns;
    const T* const from = static_cast<const T*>(params.bias) + first;
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      words[j] = first + 8 * j < count ? *reinterpret_cast<const uint32_t*>(from + 8 * j) : 0;
    }
  }
  __device__ void operator()(float (&d)[N / 2]) const {
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      float pair[2];
      widen<2>(reinterpret_cast<const Vector<T, 2>&>(words[j]), pair);
#pragma unroll
      for (int i = 0; i < 4; ++i) d[4 * j + i] = pair[i % 2];
    }
  }
};

template <class T>
__device__ inline uint32_t pack(float low, float high) {
  Vector<T, 2> pair = {{narrow<T>(low), narrow<T>(high)}};
  return reinterpret_cast<const uint32_t&>(pair);
}

// One warpgroup's 64 x N accumulators, in which the bias is already, through an activation to Y or Z. A quad exchanges
// its words so that every thread stores 16 bytes, a quad 64 of one row.
template <class T, Activation activation, int count>
__device__ void store_tile(const GemmParams& params, void* to, const float (&d)[count], int row, int column) {
  const int thread = threadIdx.x % 128, lane = thread % 32, first = column + lane % 4 * 8;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = row + thread / 32 * 16 + lane / 4 + 8 * h;
    const int b = r / params.tokens, patch = r - b * params.tokens - params.skip;
    const bool kept = r < params.rows && patch >= 0;
    T* at = static_cast<T*>(to) + (int64_t(b) * (params.tokens - params.skip) + patch) * params.columns + first;
#pragma unroll
    for (int j = 0; j < count / 4; j += 4) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float low = d[(j + i) * 4 + 2 * h], high = d[(j + i) * 4 + 2 * h + 1];
        words[i] = pack<T>(Formula<activation>::template value<T>(low), Formula<activation>::template value<T>(high));
      }
      transpose_quad(words, lane);
      if (!kept || first + 8 * j >= params.columns) continue;
      *reinterpret_cast<uint4*>(at + 8 * j) = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

// Every cluster when all of it is done: the last one sets back what the next launch needs to be zero.
__device__ void reset_counters(int* counters, int clusters, int count) {
  if (ptx::cluster_rank() != 0 || threadIdx.x >= 32) return;
  int before = 0;
  if (threadIdx.x == 0) before = ptx::add_acquire_release(counters + 1, 1);
  if (__shfl_sync(0xffffffffu, before, 0) + 1 < clusters) return;
  for (int i = threadIdx.x; i < count; i += 32) counters[i] = 0;
}

// Whether every term is a part of its own and has six layers.
bool has_sixes(const MixParams& mix) {
  for (int t = 0; t < mix.num_terms; ++t) {
    if (mix.terms[t].end != 6 * (t + 1) || !mix.terms[t].ends_part) return false;
  }
  return true;
}

} // namespace

template <class T, int N>
__global__ void __launch_bounds__(threads, 1)
    gemm_sm90_kernel(const __grid_constant__ GemmParams params, const bool sixes) {
  const Ring<N> ring = {static_cast<unsigned char*>(dynamic_shared())};
  MixMemory& memory = *reinterpret_cast<MixMemory*>(ring.memory + ring_bytes<N>);
  const Tiles<N> tiles(params.rows, params.columns, params.grid);
  const int terms = params.mix.num_terms;
  int* const counters = params.counters != nullptr ? params.counters : own_counters + params.first_counter;
  run_warpgroups(
      ring,
      [&] {
        if (terms == 0) return;
        for (int i = threadIdx.x; i < params.mix.terms[terms - 1].end; i += threads) {
          memory.layers[i] = params.mix.layers[params.mix.entries[i]];
        }
      },
      [&] {
        multiply<T>(
            tiles, ring, params.num_blocks * (params.width / gemm_tile_k),
            [&](int column) { return Bias<T, N>(params, column); },
            [&](const float(&d)[N / 2], int row, int column) {
              const bool none = params.activation == Activation::none;
              if (params.z != nullptr) store_tile<T, Activation::none>(params, params.z, d, row, column);
              if (none) store_tile<T, Activation::none>(params, params.y, d, row, column);
              else store_tile<T, Activation::gelu>(params, params.y, d, row, column);
            });
      },
      [&](int thread) {
        const int warp = thread / 32 - 1, lane = thread % 32;
        if (thread == 0) copy_boxes(params, tiles, ring, counters);
        else if (warp < 0 || terms == 0) return;
        else if (sixes) mix_rows<T, true>(params, memory, counters, warp, lane);
        else mix_rows<T, false>(params, memory, counters, warp, lane);
      });
  if (terms > 0) reset_counters(counters, params.grid / gemm_cluster, gemm_first_flag + tiles.down * gemm_cluster);
}

int gemm_sm90(const GemmParams& params, int tile_n, DType dtype, Stream stream) {
  const bool bf16 = dtype == DType::bf16, wide = tile_n == gemm_wide;
  const auto kernel = wide ? bf16 ? gemm_sm90_kernel<__nv_bfloat16, gemm_wide> : gemm_sm90_kernel<__half, gemm_wide>
                           : bf16 ? gemm_sm90_kernel<__nv_bfloat16, gemm_narrow> : gemm_sm90_kernel<__half, gemm_narrow>;
  return launch_clusters(kernel, gemm_cluster, dim3(params.grid), threads,
                         wide ? shared_bytes<gemm_wide> : shared_bytes<gemm_narrow>, stream, params,
                         has_sixes(params.mix));
}

} // namespace igva::cuda
