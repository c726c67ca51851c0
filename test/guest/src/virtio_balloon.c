/* The memory balloon (virtio 1.3, section 5.5): gives pages up, takes them back, reports them as free, as the host asks. */
#include "virtio.h"

#define F_STATS (1ul << 1)
#define F_DEFLATE_ON_OOM (1ul << 2)
#define F_REPORTING (1ul << 5)

#define CONFIG_NUM_PAGES 0
#define CONFIG_ACTUAL 4

enum { INFLATE = 0, DEFLATE = 1, STATS = 2, REPORTING = 3 };

#define BATCH 256            /* page numbers of a request */
#define RANGES 8             /* buffers of a report */
#define RANGE_SIZE 0x200000u /* bytes of each */
#define LOOK_MS 100

enum { S_MEMFREE = 4, S_MEMTOT = 5 };

struct stat {
  u16 tag;
  u64 val;
} __attribute__((packed));

static struct virtio balloon;
static struct stat *stats;
static u32 *numbers;
static u64 memory, count; /* the pages that are given up: where they are, and how many there are */
static u64 given;         /* how many are in the balloon now */
static u32 answers;

static const char *offer_stats(void) {
  stats[0] = (struct stat){S_MEMTOT, count * PAGE};
  stats[1] = (struct stat){S_MEMFREE, (count - given) * PAGE};
  if (!virtq_add(&balloon.queues[STATS], &(struct buffer){stats, 2 * sizeof *stats, false}, 1, 0)) return "no descriptors";
  virtq_kick(&balloon.queues[STATS]);
  return NULL;
}

/* Waits until the host wants so many pages, and answers its questions meanwhile. */
static const char *await(bool (*wanted)(u32 pages), u32 *pages) {
  for (u32 looks = 0; looks < VIRTIO_ANSWER_MS / LOOK_MS; looks++) {
    u32 seen = balloon.interrupts, length;
    u64 token;
    while (virtq_take(&balloon.queues[STATS], &token, &length)) {
      const char *error = offer_stats();
      if (error) return error;
      answers++;
      looks = 0;
    }
    *pages = virtio_config32(&balloon, CONFIG_NUM_PAGES);
    if (wanted(*pages)) return NULL;
    wait_for(&balloon.interrupts, seen + 1, LOOK_MS);
  }
  return "the host asks for nothing";
}

static bool many(u32 pages) { return pages > 1; }
static bool none(u32 pages) { return pages == 0; }
static bool one(u32 pages) { return pages == 1; }

/* The first half from the lowest page upwards, the second from the highest downwards. */
static u64 page_at(u64 index, u64 pages) { return index < pages / 2 ? index : pages - 1 - (index - pages / 2); }

static const char *move(u32 queue, u64 pages) {
  for (u64 done = 0; done < pages;) {
    u32 batch = 0, length;
    for (; batch < BATCH && done < pages; batch++, done++) numbers[batch] = (u32)(memory / PAGE + page_at(done, pages));
    const char *error =
        virtq_call(&balloon.queues[queue], &(struct buffer){numbers, batch * sizeof *numbers, false}, 1, &length);
    if (error) return error;
    if (length) return "wrong length returned";
  }
  given = queue == INFLATE ? pages : 0;
  virtio_config_write32(&balloon, CONFIG_ACTUAL, (u32)given);
  return NULL;
}

static const char *report(void) {
  for (u64 at = memory; at < memory + count * PAGE;) {
    struct buffer ranges[RANGES];
    u32 range = 0, length;
    for (; range < RANGES && at < memory + count * PAGE; range++, at += RANGE_SIZE)
      ranges[range] = (struct buffer){(void *)at, RANGE_SIZE, true};
    const char *error = virtq_call(&balloon.queues[REPORTING], ranges, range, &length);
    if (error) return error;
  }
  return NULL;
}

/* How many pages begin with zero, and with what was written to them; then writes to each. */
static void look(const char *name) {
  u64 zeros = 0, own = 0;
  for (u64 at = memory; at < memory + count * PAGE; at += PAGE) {
    volatile u64 *word = (volatile u64 *)at;
    if (*word == 0) zeros++;
    if (*word == at) own++;
    *word = at;
  }
  say("balloon %s %u pages zero %u own %u", name, count, zeros, own);
}

static const char *run(u64 size) {
  u32 pages = 0;
  const char *error = virtio_start(&balloon, F_STATS | F_DEFLATE_ON_OOM | F_REPORTING);
  say("balloon features %x", balloon.offered);
  for (u32 queue = INFLATE; queue <= REPORTING && !error; queue++) error = virtq_setup(&balloon, queue, 16);
  stats = heap_take(2 * sizeof *stats, 64);
  numbers = heap_take(BATCH * sizeof *numbers, 64);
  memory = (u64)heap_take(size, RANGE_SIZE);
  if (!error && (!stats || !numbers || !memory)) error = "no memory";
  if (!error) error = virtio_ready(&balloon);
  if (!error) error = offer_stats();
  if (error) return error;
  count = size / PAGE;
  given = answers = 0;
  look("before");
  if ((error = await(many, &pages))) return error;
  if (pages > count) return "the host asks for too much";
  if ((error = move(INFLATE, pages))) return error;
  say("balloon inflated %u pages", given);
  if ((error = await(none, &pages))) return error;
  if ((error = move(DEFLATE, given))) return error;
  look("deflated");
  say("balloon answers %u", U(answers));
  if ((error = await(one, &pages))) return error;
  if ((error = report())) return error;
  say("balloon reported %u pages", count);
  if ((error = await(none, &pages))) return error;
  look("after");
  return NULL;
}

/* ---- a device that fails ---------------------------------------------------------------------------------------- */

#define ENDURED 3 /* pages, of which the middle one is given up */

static const char *start(void) {
  const char *error = virtio_start(&balloon, 0);
  for (u32 queue = INFLATE; queue <= DEFLATE && !error; queue++) error = virtq_setup(&balloon, queue, 16);
  if (!error) error = virtio_ready(&balloon);
  numbers = heap_take(sizeof *numbers, 64);
  memory = (u64)heap_take(ENDURED * PAGE, PAGE);
  return error ? error : numbers && memory ? NULL : "no memory";
}

/* A place in each quarter of a page: whether it has the wanted word at all of them. */
static bool has(u64 page, u64 wanted) {
  for (u64 at = page; at < page + PAGE; at += PAGE / 4)
    if (*(volatile u64 *)at != wanted) return false;
  return true;
}

/* Gives a page up and takes it back: it is empty, and those beside it are as they were. */
static const char *give_and_take(u32 done, u32 attempt) {
  u64 page = memory + PAGE, mark = attempt + 1;
  for (u64 at = memory; at < memory + ENDURED * PAGE; at += PAGE / 4) *(volatile u64 *)at = mark;
  *numbers = (u32)(page / PAGE);
  const char *error = virtq_call(&balloon.queues[INFLATE], &(struct buffer){numbers, sizeof *numbers, false}, 1, NULL);
  if (!has(memory, mark) || !has(page + PAGE, mark)) return endure_wrong("another page");
  if (!has(page, 0) && !(error && has(page, mark))) return endure_wrong("not given up");
  if (error) return error;
  virtio_config_write32(&balloon, CONFIG_ACTUAL, 1);
  *(volatile u64 *)page = mark;
  error = virtq_call(&balloon.queues[DEFLATE], &(struct buffer){numbers, sizeof *numbers, false}, 1, NULL);
  if (*(volatile u64 *)page != mark) return endure_wrong("given up later on");
  if (error) return error;
  virtio_config_write32(&balloon, CONFIG_ACTUAL, 0);
  (void)done;
  return NULL;
}

/* "MIB": how much memory it has to give up; "endure[,REQUESTS]" */
bool virtio_balloon(const char *word) {
  const char *value = after_prefix(word, "balloon");
  if (!value || (*value && *value != '=')) return false;
  const char *many = after_prefix(value, "=endure");
  u64 size = 32;
  if (*value++ && !many) size = take_number(&value);
  if (!virtio_find(&balloon, VIRTIO_BALLOON, 0)) {
    say("balloon none");
    return true;
  }
  say("balloon device %x irq %u", balloon.base, U(balloon.irq));
  const char *error = many ? virtio_endure("balloon", &(struct endurance){&balloon, start, give_and_take}, endure_requests(many))
                           : run(size << 20);
  if (error) {
    virtio_fail(&balloon);
    say("balloon failed %s", error);
  } else {
    virtio_stop(&balloon);
    say("balloon ok");
  }
  return true;
}
