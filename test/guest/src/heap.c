/* Memory for an action's rings and buffers: the RAM behind the image, given out from its start, given back all at once. */
#include "guest.h"

#define HEAP_START 0x400000ul /* the image ends far below */

static u64 next, end;

/* Up to the end of the range that holds the start, or to the initrd if that is there. */
static u64 find_end(void) {
  for (u32 i = 0; i < boot.range_count; i++) {
    const struct range *range = &boot.ranges[i];
    u64 range_end = range->base + range->size;
    if (range->type != RANGE_RAM || range->base > HEAP_START || range_end <= HEAP_START) continue;
    return boot.initrd > HEAP_START && boot.initrd < range_end ? boot.initrd : range_end;
  }
  return HEAP_START;
}

void heap_reset(void) {
  next = HEAP_START;
  end = find_end();
}

void *heap_take(u64 size, u64 alignment) {
  u64 at = (next + alignment - 1) & -alignment;
  if (at > end || size > end - at) return NULL;
  next = at + size;
  return (void *)at;
}

u64 heap_mark(void) { return next; }
void heap_back(u64 mark) { next = mark; }
u64 heap_left(void) { return end - next; }
