// Preloaded into a test process. Every aligned allocation (kernel scratch, tensors) starts as NaN and ends
// at a page that must not be touched: using what was never written, and reading or writing past the end,
// cannot go unnoticed.
#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

#define PAGE ((size_t)4096)
#define ARENA ((size_t)1 << 38)  // addresses, not memory; never used twice

extern void __libc_free(void*);

static char* arena;
static size_t* pages_of;  // by page number of the arena: pages of the block that starts there
static size_t next = 0;

__attribute__((constructor)) static void reserve(void) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  pages_of = mmap(NULL, ARENA / PAGE * sizeof(size_t), PROT_READ | PROT_WRITE, flags, -1, 0);
  arena = mmap(NULL, ARENA, PROT_NONE, flags, -1, 0);
}

void* aligned_alloc(size_t alignment, size_t size) {
  const size_t rounded = (size + alignment - 1) / alignment * alignment;
  const size_t pages = (rounded + PAGE - 1) / PAGE;
  const size_t at = __sync_fetch_and_add(&next, (pages + 1) * PAGE);
  char* block = arena + at;
  if (at + (pages + 1) * PAGE > ARENA || mprotect(block, pages * PAGE, PROT_READ | PROT_WRITE) != 0) return NULL;
  memset(block, 0xff, pages * PAGE);
  char* result = block + pages * PAGE - rounded;
  pages_of[(result - arena) / PAGE] = pages;
  return result;
}

int posix_memalign(void** result, size_t alignment, size_t size) {
  *result = aligned_alloc(alignment, size);
  return *result == NULL ? ENOMEM : 0;
}

void free(void* block) {
  char* start = block;
  if (arena == NULL || start < arena || start >= arena + ARENA) {
    __libc_free(block);
    return;
  }
  const size_t page = (start - arena) / PAGE;
  // Not PROT_NONE alone: the memory goes back too.
  mmap(arena + page * PAGE, pages_of[page] * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED,
       -1, 0);
}
