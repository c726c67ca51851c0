/* Writes to all of RAM and verifies it: every page must be memory of its own. */
#include "guest.h"

#define LOW_LIMIT 0x100000ul /* below: firmware's places, boot information, the trampoline */
#define LOW_END 0x100000000ul
#define WINDOW 0x100000000ul /* entry.S: page tables for 1 GiB here are free for us */
#define WINDOW_PAGE 0x200000ul
#define PAGE_FLAGS 0x87
#define PATTERN 0x5a5a5a5aa5a5a5a5ul

extern u64 window_pd[];
extern u8 image_start[], image_end[];

struct fill {
  u64 from, to, offset; /* where it lies for us, and the physical address of `from` less it */
  bool verify;
  u64 pages, bad;
  bool failed;
};

/* One word in each page: what it holds depends on its place. At CPL 0 or 3. */
static void fill_pages(void *argument) {
  struct fill *fill = argument;
  for (u64 at = fill->from; at < fill->to; at += PAGE) {
    u64 place = at + fill->offset;
    if (!fill->verify)
      *(volatile u64 *)at = place ^ PATTERN;
    else if (*(volatile u64 *)at != (place ^ PATTERN)) {
      fill->bad = place;
      fill->failed = true;
      return;
    }
    fill->pages++;
  }
}

static void run(struct fill *fill, bool user) {
  if (fill->failed || fill->from >= fill->to) return;
  if (user)
    user_call(fill_pages, fill);
  else
    fill_pages(fill);
}

/* [from, to) without the image, and above 4 GiB through the window. */
static void stretch(struct fill *fill, u64 from, u64 to, bool user) {
  u64 hole_from = (u64)image_start, hole_to = ((u64)image_end + PAGE - 1) & -PAGE;
  for (u64 at = from; at < to;) {
    u64 end = to;
    if (at < hole_from && end > hole_from) end = hole_from;
    if (at >= hole_from && at < hole_to) {
      at = hole_to;
      continue;
    }
    if (at < LOW_END) {
      if (end > LOW_END) end = LOW_END;
      fill->from = at;
      fill->to = end;
      fill->offset = 0;
    } else {
      u64 base = at & -WINDOW_PAGE;
      if (end > base + WINDOW_PAGE) end = base + WINDOW_PAGE;
      window_pd[0] = base | PAGE_FLAGS;
      asm volatile("invlpg (%0)" ::"r"(WINDOW) : "memory");
      fill->from = WINDOW + (at - base);
      fill->to = WINDOW + (end - base);
      fill->offset = base - WINDOW;
    }
    run(fill, user);
    at = end;
  }
}

static bool is_kept(u64 from, u64 to) { return boot.initrd_size && from < boot.initrd + boot.initrd_size && to > boot.initrd; }

static void pass(struct fill *fill, bool user) {
  fill->pages = 0;
  for (u32 i = 0; i < boot.range_count; i++) {
    const struct range *range = &boot.ranges[i];
    if (range->type != RANGE_RAM) continue;
    u64 from = (range->base + PAGE - 1) & -PAGE, to = (range->base + range->size) & -PAGE;
    if (from < LOW_LIMIT) from = LOW_LIMIT;
    if (from >= to) continue;
    if (is_kept(from, to)) { /* the initrd stays as it is: `initrd` may follow */
      stretch(fill, from, boot.initrd & -PAGE, user);
      stretch(fill, (boot.initrd + boot.initrd_size + PAGE - 1) & -PAGE, to, user);
    } else
      stretch(fill, from, to, user);
  }
}

void memory_fill(bool user) {
  struct fill fill = {0};
  pass(&fill, user);
  fill.verify = true;
  pass(&fill, user);
  if (fill.failed)
    say("fill bad at %x", fill.bad);
  else
    say("fill %u MiB %u pages ok", fill.pages >> 8, fill.pages);
}
