// The emulated GPU behind cuda_emulation.h: runs blocks as fibers, and the asynchronous work that they begin.
#include "cuda_emulation.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace autofocus::cuda {

namespace {

// The test sets these through autofocus_emulation_configure.
DeviceLimits limits{3, 227 * 1024, 90};
bool copies_are_late = true;
std::map<std::string, int> launches;  // by kernel name, since the last configuration
// The order in which threads go on, each until it waits: 0 ascending, 1 descending, others shuffled anew in every
// round. 10 and more: the same orders (modulo 10), but the first thread that can go on runs again and again, so it gets
// as far ahead of the others as it can.
unsigned int order_seed = 0;
constexpr unsigned int kUnfair = 10;

// If not null, runs kernels in place of this file. Its arguments: the address of a kernel; grid (three numbers),
// threads and bytes of shared memory; addresses of the parameters, their sizes, how many; 1000 bytes for an error
// message. It returns zero after an error.
using Runner = int (*)(const void*, const unsigned int*, const void* const*, const size_t*, int, char*);
Runner runner = nullptr;

const unsigned char* scratch_guard = nullptr;  // kScratchGuard bytes

constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kGuardBytes = 4096;
constexpr size_t kAlignment = 128;  // of shared memory
constexpr unsigned char kPoison = emulation::kPoison;

// An asynchronous copy; writes zeros if not `valid`.
struct Copy {
  unsigned char* to;
  const void* from;
  int bytes;
  bool valid;
  void run() const {
    if (valid)
      std::memcpy(to, from, bytes);
    else
      std::memset(to, 0, bytes);
  }
};

// A barrier that counts bulk copies.
struct Barrier {
  bool fenced = false;              // the thread that initialised it has called fence_proxies since
  unsigned int initialised_by = 0;  // thread
  bool arrived = false;             // in this phase
  int64_t expected = 0;             // bytes expected and not landed
  uint32_t phases = 0;              // phases that have ended
  std::vector<Copy> under_way;
};

struct Fiber {
  enum class State { kRunnable, kAtBarrier, kAtWarpInstruction, kAtCopies, kDone } state = State::kRunnable;
  unsigned int index = 0;
  bool started = false;
  ucontext_t context;
  jmp_buf jump;
  std::deque<std::vector<Copy>> groups;  // committed groups of late copies
  std::vector<Copy> open;                // late copies not committed yet
  bool unfenced = false;                 // its copies have landed, but warpgroup MMA may not see them yet
  std::vector<uint32_t> reads;           // rows of 16 bytes read by load_matrices since the last fence
  uint64_t* awaited = nullptr;           // the barrier that it waits for in kAtCopies
};

// A warp's part of a warpgroup MMA.
struct Product {
  float* d[32];              // by lane
  const uint32_t* rows[32];  // by lane; null if operand a is in shared memory
  int warp, tiles;
  uint64_t left, right;
  bool over_points, adds;
  emulation::Elements elements;
};

struct Warp {
  emulation::WarpFunction function = nullptr;
  void* operands[32];
  int arrived = 0;                            // lanes at the warp instruction
  std::vector<Product> open;                  // late products not committed yet
  std::deque<std::vector<Product>> products;  // committed groups under way
};

class Block {
 public:
  void run(const char* name, int threads, int shared_bytes, const std::function<void()>& kernel) {
    kernel_ = &kernel;
    threads_ = threads;
    shared_.assign(shared_bytes + kGuardBytes + kAlignment, kPoison);
    shared_bytes_ = shared_bytes;
    while (stacks_.size() < size_t(threads)) stacks_.push_back(std::make_unique<char[]>(kStackBytes));
    fibers_ = std::vector<Fiber>(threads);
    warps_.assign((threads + 31) / 32, Warp{});
    barriers_.clear();
    readers_.assign(shared_.size() / 16, 0);
    at_barrier_ = done_ = 0;
    std::vector<int> order(threads);
    std::iota(order.begin(), order.end(), 0);
    if (order_seed % kUnfair == 1) std::reverse(order.begin(), order.end());
    for (int i = 0; i < threads; ++i) {
      Fiber& fiber = fibers_[i];
      fiber.index = i;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = stacks_[i].get();
      fiber.context.uc_stack.ss_size = kStackBytes;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, &Block::enter, 0);
    }
    while (done_ < threads) {
      bool progress = false;
      if (order_seed % kUnfair > 1) std::shuffle(order.begin(), order.end(), random_);
      for (const int i : order) {
        if (fibers_[i].state != Fiber::State::kRunnable) continue;
        progress = true;
        resume(fibers_[i]);
        if (!error_.empty()) fail(name, error_);
        if (order_seed >= kUnfair) break;
      }
      if (!progress && !land_copies()) fail(name, "some threads wait where others never come");
    }
    for (const auto& entry : barriers_)
      if (!entry.second.under_way.empty()) fail(name, "a block ends while bulk copies are under way");
    for (size_t i = 0; i < kGuardBytes; ++i)
      if (shared()[shared_bytes + i] != kPoison) fail(name, "a thread wrote behind the block's shared memory");
  }

  unsigned char* shared() {
    const auto address = reinterpret_cast<uintptr_t>(shared_.data());
    return shared_.data() + (kAlignment - address % kAlignment) % kAlignment;
  }

  void barrier() {
    current_->state = Fiber::State::kAtBarrier;
    ++at_barrier_;
    release_barrier();
    if (current_->state != Fiber::State::kRunnable) yield();
  }

  void warp_instruction(emulation::WarpFunction function, void* operands) {
    Warp& warp = warps_[current_->index / 32];
    const int first = int(current_->index) / 32 * 32, lanes = std::min(32, threads_ - first);
    if (warp.arrived == 0) warp.function = function;
    if (warp.function != function) error_ = "lanes of a warp execute different warp instructions";
    warp.operands[current_->index % 32] = operands;
    if (++warp.arrived < lanes) {
      current_->state = Fiber::State::kAtWarpInstruction;
      yield();
      return;
    }
    warp.arrived = 0;
    if (lanes < 32)
      error_ = "a warp instruction in a warp of fewer than 32 lanes";
    else
      function(warp.operands);
    for (int i = first; i < first + lanes; ++i) fibers_[i].state = Fiber::State::kRunnable;
  }

  void init_barrier(uint64_t* at) {
    barriers_[at] = Barrier{};
    barriers_[at].initialised_by = current_->index;
  }
  void end_barrier(uint64_t* at) {
    if (!barrier_of(at).under_way.empty()) error_ = "the end of a barrier with copies under way";
    barriers_.erase(at);
  }
  void fence() {
    current_->unfenced = false;
    for (auto& entry : barriers_) entry.second.fenced |= entry.second.initialised_by == current_->index;
    for (const uint32_t row : current_->reads) --readers_[row];
    current_->reads.clear();
  }
  void note_read(uint32_t row) {
    current_->reads.push_back(row);
    ++readers_.at(row);
  }
  void expect_bytes(uint64_t* at, int bytes) { barrier_of(at).expected += bytes; }
  void arrive(uint64_t* at) {
    Barrier& barrier = barrier_of(at);
    if (barrier.arrived) error_ = "more than one arrival in a phase of a barrier";
    barrier.arrived = true;
    end_phase(barrier);
  }
  // A bulk copy, given as the copies of its lines. The barrier counts their bytes.
  void copy_bulk(uint64_t* at, const std::vector<Copy>& lines) {
    Barrier& barrier = barrier_of(at);
    if (!barrier.fenced) error_ = "a bulk copy whose barrier is not fenced for it";
    for (const Copy& line : lines)
      for (int64_t row = (line.to - shared()) / 16; row < (line.to - shared() + line.bytes) / 16; ++row)
        if (readers_.at(row) > 0) error_ = "a bulk copy to where a thread has read without fence_proxies";
    barrier.under_way.insert(barrier.under_way.end(), lines.begin(), lines.end());
    if (!copies_are_late) land(barrier);
  }
  void wait_for_copies(uint64_t* at, uint32_t phase) {
    // The current phase has number `phases`; the one asked for is this one or the one before.
    while (barrier_of(at).phases % 2 == phase % 2) {
      current_->state = Fiber::State::kAtCopies;
      current_->awaited = at;
      yield();
    }
  }

  Fiber& current() { return *current_; }
  Warp& current_warp() { return warps_[current_->index / 32]; }

  void start_product(Product product) {
    for (const Fiber& fiber : fibers_)
      if (fiber.unfenced) error_ = "warpgroup MMA after a copy without fence_proxies";
    product.warp = int(current_->index) / 32 % 4;
    if (copies_are_late)
      current_warp().open.push_back(product);
    else
      run_product(product);
  }

  void commit_products() {
    current_warp().products.push_back(std::move(current_warp().open));
    current_warp().open.clear();
  }

  void finish_products(int pending) {
    if (!current_warp().open.empty()) error_ = "warpgroup MMA is waited for that was not committed";
    auto& products = current_warp().products;
    for (; products.size() > size_t(pending); products.pop_front())
      for (const Product& product : products.front()) run_product(product);
  }

  // For errors in a fiber. An exception cannot leave it, so the scheduler throws one later.
  void report(const std::string& error) { error_ = error; }
  // For errors after which the fiber cannot go on.
  void give_up(const std::string& error) {
    report(error);
    if (is_running_) _longjmp(scheduler_, 1);
  }

 private:
  static void enter();

  Barrier& barrier_of(uint64_t* at) {
    if (barriers_.count(at) == 0) error_ = "a barrier that nobody initialised";
    return barriers_[at];
  }
  void land(Barrier& barrier) {
    for (const Copy& copy : barrier.under_way) {
      copy.run();
      barrier.expected -= copy.bytes;
    }
    barrier.under_way.clear();
    end_phase(barrier);
  }
  void end_phase(Barrier& barrier) {
    if (!barrier.arrived || barrier.expected != 0) return;
    barrier.arrived = false;
    ++barrier.phases;
    for (Fiber& fiber : fibers_)
      if (fiber.state == Fiber::State::kAtCopies) fiber.state = Fiber::State::kRunnable;
  }
  // Lands the bulk copies of barriers that a thread waits for. Returns whether a phase has ended.
  bool land_copies() {
    bool ended = false;
    for (const Fiber& fiber : fibers_) {
      if (fiber.state != Fiber::State::kAtCopies) continue;
      Barrier& barrier = barrier_of(fiber.awaited);
      const uint32_t before = barrier.phases;
      if (barrier.arrived) land(barrier);
      ended |= barrier.phases != before;
    }
    return ended;
  }

  // Reads block `row_block` of an operand in half `k_block` of k, from where its descriptor says.
  void decode_block(const Product& product, uint64_t operand, int row_block, int k_block, float (&block)[8][8]) {
    const int64_t start = operand & 0x3fff, along_k = operand >> 16 & 0x3fff, along_rows = operand >> 32 & 0x3fff;
    const int64_t at = (start + k_block * along_k + row_block * along_rows) * 16;
    if (at + 8 * 16 > shared_bytes_) {
      error_ = "an operand of warpgroup MMA lies behind the block's shared memory";
      std::memset(block, 0, sizeof(block));
      return;
    }
    for (int row = 0; row < 8; ++row) product.elements.decode(shared() + at + row * 16, block[row]);
  }

  // Computes the 16 rows of one warp.
  void run_product(const Product& product) {
    const int wide = product.elements.count, depth = 2 * wide;  // elements of a block's row; k
    float left[16][16], right[16][64], block[8][8];
    for (int k_block = 0; k_block < 2; ++k_block) {
      for (int half = 0; half < 2; ++half) {
        if (product.rows[0] == nullptr) {
          decode_block(product, product.left, 2 * product.warp + half, k_block, block);
          for (int row = 0; row < 8; ++row) std::memcpy(&left[8 * half + row][wide * k_block], block[row], 4 * wide);
          continue;
        }
        for (int row = 0; row < 8; ++row) {
          uint32_t words[4];
          for (int member = 0; member < 4; ++member) words[member] = product.rows[4 * row + member][half + 2 * k_block];
          product.elements.decode(reinterpret_cast<const unsigned char*>(words), &left[8 * half + row][wide * k_block]);
        }
      }
      for (int tile = 0; tile < product.tiles; ++tile) {
        decode_block(product, product.right, tile, k_block, block);
        for (int column = 0; column < 8; ++column)
          for (int k = 0; k < wide; ++k)  // over points, a row in memory is a k
            right[wide * k_block + k][8 * tile + column] = product.over_points ? block[k][column] : block[column][k];
      }
    }
    for (int row = 0; row < 16; ++row)
      for (int tile = 0; tile < product.tiles; ++tile) {
        float sums[8] = {};
        for (int k = 0; k < depth; ++k)
          for (int column = 0; column < 8; ++column) sums[column] += left[row][k] * right[k][8 * tile + column];
        for (int column = 0; column < 8; ++column) {
          float& d = product.d[row % 8 * 4 + column / 2][tile * 4 + row / 8 * 2 + column % 2];
          d = product.adds ? emulation::cut_sum(d, sums[column]) : sums[column];
        }
      }
  }

  void resume(Fiber& fiber) {
    current_ = &fiber;
    threadIdx = dim3(fiber.index, 0, 0);
    is_running_ = true;
    if (_setjmp(scheduler_) != 0) {
      is_running_ = false;
      return;
    }
    if (fiber.started) _longjmp(fiber.jump, 1);
    fiber.started = true;
    setcontext(&fiber.context);
  }

  void yield() {
    if (_setjmp(current_->jump) == 0) _longjmp(scheduler_, 1);
  }

  void finish() {
    current_->state = Fiber::State::kDone;
    ++done_;
    release_barrier();
    _longjmp(scheduler_, 1);
  }

  // A barrier of the block waits for every thread that has not returned.
  void release_barrier() {
    if (at_barrier_ == 0 || at_barrier_ + done_ < threads_) return;
    at_barrier_ = 0;
    for (Fiber& fiber : fibers_)
      if (fiber.state == Fiber::State::kAtBarrier) fiber.state = Fiber::State::kRunnable;
  }

  [[noreturn]] void fail(const char* name, const std::string& what) {
    const std::string message = std::string(name) + ": " + what;
    error_.clear();
    throw std::runtime_error(message);
  }

  const std::function<void()>* kernel_ = nullptr;
  int threads_ = 0, shared_bytes_ = 0, at_barrier_ = 0, done_ = 0;
  std::vector<unsigned char> shared_;
  std::vector<std::unique_ptr<char[]>> stacks_;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  std::map<uint64_t*, Barrier> barriers_;
  std::vector<int> readers_;  // by row of 16 bytes: threads that have read it and not fenced since
  Fiber* current_ = nullptr;
  bool is_running_ = false;  // a fiber, not the scheduler or the host's code
  jmp_buf scheduler_;
  std::string error_;
  std::mt19937 random_{order_seed};
};

Block block;

void Block::enter() {
  (*block.kernel_)();
  block.finish();
}

}  // namespace

namespace emulation {

bool run_elsewhere(const char* name, const void* kernel, dim3 grid, int threads, int shared_bytes,
                   const std::vector<const void*>& parameters, const std::vector<size_t>& sizes) {
  ++launches[name];
  if (runner == nullptr) return false;
  const unsigned int numbers[] = {grid.x, grid.y, grid.z, unsigned(threads), unsigned(shared_bytes)};
  char message[1000] = "";
  if (runner(kernel, numbers, parameters.data(), sizes.data(), int(sizes.size()), message) == 0)
    throw std::runtime_error(std::string(name) + ": " + message);
  return true;
}

void run_blocks(const char* name, dim3 grid, int threads, int shared_bytes, const std::function<void()>& kernel) {
  gridDim = grid;
  blockDim = dim3(threads);
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) block.run(name, threads, shared_bytes, kernel);
  if (scratch_guard == nullptr) return;
  const auto written = [](unsigned char byte) { return byte != kPoison; };
  if (!std::any_of(scratch_guard, scratch_guard + kScratchGuard, written)) return;
  scratch_guard = nullptr;
  throw std::runtime_error(std::string(name) + ": a thread wrote behind the call's scratch memory");
}

void guard_scratch(const void* memory, int64_t bytes) {
  scratch_guard = memory == nullptr ? nullptr : static_cast<const unsigned char*>(memory) + bytes;
}

unsigned char* shared_memory() { return block.shared(); }

void copy_async(unsigned char* to, const void* from, int bytes, bool valid) {
  const Copy copy{to, from, bytes, valid};
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0 || reinterpret_cast<uintptr_t>(from) % bytes != 0)
    return block.report("an asynchronous copy is not aligned to its size");
  if (copies_are_late)
    block.current().open.push_back(copy);
  else
    copy.run();
}

void copy_async_commit() {
  block.current().groups.push_back(std::move(block.current().open));
  block.current().open.clear();
}

void copy_async_wait(int pending) {
  auto& groups = block.current().groups;
  for (; groups.size() > size_t(pending); groups.pop_front())
    for (const Copy& copy : groups.front()) copy.run();
  block.current().unfenced = true;
}

void fence_proxies() { block.fence(); }

void init_barrier(uint64_t& barrier) { block.init_barrier(&barrier); }
void expect_bytes(uint64_t& barrier, int bytes) { block.expect_bytes(&barrier, bytes); }
void arrive(uint64_t& barrier) { block.arrive(&barrier); }
void end_barrier(uint64_t& barrier) { block.end_barrier(&barrier); }
void note_read(uint32_t row) { block.note_read(row); }
void wait_for_copies(uint64_t& barrier, uint32_t phase) { block.wait_for_copies(&barrier, phase); }

void copy_bulk(unsigned char* to, const void* from, int bytes, uint64_t& barrier) {
  if ((to - shared_memory()) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0 || bytes % 16 != 0 || bytes <= 0)
    return block.report("a bulk copy of other than multiples of 16 bytes");
  block.copy_bulk(&barrier, {{to, from, bytes, true}});
}

void warpgroup_mma(float* d, int tiles, const uint32_t* rows, uint64_t left, uint64_t right, bool over_points,
                   bool adds, const Elements& elements) {
  Product own{{d}, {rows}, 0, tiles, left, right, over_points, adds, elements};
  warp_instruction(
      [](void* const* lanes) {
        Product product = *static_cast<const Product*>(lanes[0]);
        for (int lane = 0; lane < 32; ++lane) {
          const Product& other = *static_cast<const Product*>(lanes[lane]);
          product.d[lane] = other.d[0];
          product.rows[lane] = other.rows[0];
          if (other.left != product.left || other.right != product.right || other.adds != product.adds)
            block.report("the lanes of a warp name different operands of warpgroup MMA");
        }
        block.start_product(product);
      },
      &own);
}

void warpgroup_commit() {
  warp_instruction([](void* const*) { block.commit_products(); }, nullptr);
}

void warpgroup_wait(int pending) {
  int count = pending;
  warp_instruction([](void* const* lanes) { block.finish_products(*static_cast<const int*>(lanes[0])); }, &count);
}

void warp_instruction(WarpFunction function, void* operands) { block.warp_instruction(function, operands); }

namespace {

float decode_half(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float magnitude;
  if (exponent == 31)
    magnitude = fraction ? NAN : INFINITY;
  else if (exponent == 0)
    magnitude = std::ldexp(float(fraction), -24);
  else
    magnitude = std::ldexp(float(fraction + 1024), exponent - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}

}  // namespace

const std::vector<float> half_values = [] {
  std::vector<float> values(65536);
  for (int i = 0; i < 65536; ++i) values[i] = decode_half(uint16_t(i));
  return values;
}();

uint16_t float_to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return sign | 0x7e00;
  if (magnitude >= 65520.0f) return sign | 0x7c00;  // rounds past the largest finite number, 65504
  // nearbyint rounds to even; numbers below the smallest normal one share its spacing.
  int exponent;
  std::frexp(std::max(magnitude, 6.103515625e-5f), &exponent);
  const float rounded = std::ldexp(std::nearbyint(std::ldexp(magnitude, 11 - exponent)), exponent - 11);
  if (rounded < 6.103515625e-5f) return sign | uint16_t(std::ldexp(rounded, 24));
  std::frexp(rounded, &exponent);
  return sign | uint16_t(((exponent + 14) << 10) + (int(std::ldexp(rounded, 11 - exponent)) - 1024));
}

void report_unrounded() { block.report("an operand was not rounded to TF32"); }

uint16_t float_to_bfloat16(float value) {
  if (std::isnan(value)) return 0x7fff;
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace emulation

PlaneMap plane_map(const void* points, int64_t volumes, int z, int y, int x, int columns, int rows) {
  if (reinterpret_cast<uintptr_t>(points) % 16 != 0 || volumes < 1 || z < 1 || y < 1 || x < 1 || columns < 1 ||
      4 * columns > 256 || rows < 1 || rows > 256)
    throw std::runtime_error("a plane that the copy engine does not take");
  return {static_cast<const unsigned char*>(points), volumes, z, y, x, columns, rows};
}

void copy_plane(unsigned char* to, const PlaneMap& map, int x, int y, int z, int volume, CopyBarrier& barrier) {
  if ((to - shared_memory()) % 128 != 0) return block.report("a bulk copy of a plane to no multiple of 128 bytes");
  const auto within = [](int at, int64_t size) { return at >= 0 && at < size; };
  std::vector<Copy> lines;
  for (int row = 0; row < map.rows; ++row)
    for (int column = 0; column < map.columns; ++column) {
      const bool there =
          within(volume, map.volumes) && within(z, map.z) && within(y + row, map.y) && within(x + column, map.x);
      const int64_t point = ((int64_t(volume) * map.z + z) * map.y + y + row) * map.x + x + column;
      lines.push_back({to + 16 * (row * map.columns + column), there ? map.points + 16 * point : nullptr, 16, there});
    }
  block.copy_bulk(&barrier, lines);
}

DeviceLimits device_limits() { return limits; }
bool has_bulk_copies() { return limits.capability >= 90; }
bool has_warpgroup_mma() { return limits.capability == 90; }

}  // namespace autofocus::cuda

void __syncthreads() { autofocus::cuda::block.barrier(); }

// What compilers call under -fsanitize=alignment before an access that is not aligned.
extern "C" void __ubsan_handle_type_mismatch_v1(void* where, void*) {
  struct Where {
    const char* file;
    uint32_t line;
  };
  const Where& at = *static_cast<const Where*>(where);
  autofocus::cuda::block.give_up("an access that is not aligned, at " + std::string(at.file) + ":" +
                                 std::to_string(at.line));
}

extern "C" void autofocus_emulation_configure(int multiprocessors, int shared_bytes, int capability, int late_copies,
                                              unsigned int order) {
  autofocus::cuda::limits = {multiprocessors, shared_bytes, capability};
  autofocus::cuda::copies_are_late = late_copies != 0;
  autofocus::cuda::order_seed = order;
  autofocus::cuda::launches.clear();
}

extern "C" void autofocus_emulation_run_by(autofocus::cuda::Runner runner) { autofocus::cuda::runner = runner; }

// How often a kernel was launched since the last configuration; null: all kernels.
extern "C" int autofocus_emulation_launches(const char* name) {
  if (name != nullptr) return autofocus::cuda::launches[name];
  int all = 0;
  for (const auto& launched : autofocus::cuda::launches) all += launched.second;
  return all;
}
