/* The block device (virtio 1.3, section 5.2): requests at a chosen depth, checksums, and a bench. */
#include "virtio.h"

#define F_READ_ONLY (1ul << 5)
#define F_BLOCK_SIZE (1ul << 6)
#define F_FLUSH (1ul << 9)
#define F_DISCARD (1ul << 13)
#define F_WRITE_ZEROES (1ul << 14)

#define CONFIG_CAPACITY 0
#define CONFIG_BLOCK_SIZE 20
#define CONFIG_DISCARD_MAX 36
#define CONFIG_ZEROES_MAX 48

enum { READ = 0, WRITE = 1, FLUSH = 4, GET_ID = 8, DISCARD = 11, WRITE_ZEROES = 13 };

#define SECTOR 512u
#define ID_SIZE 20
#define DEPTH_MAX 256
#define STATUS_UNSET 0xff
#define UNMAP 1
#define BENCH_LIMIT_MS 60000
#define USER_DEPTH 8 /* from this depth on it pays to go to CPL 3 and back for a batch */

struct header {
  u32 type, reserved;
  u64 sector;
};

/* What a discard or write zeroes carries. */
struct range_request {
  u64 sector;
  u32 sectors, flags;
};

/* A request in flight; the header and the status are what the device sees. */
struct slot {
  struct header header;
  volatile u8 status;
  u8 *data;
};

struct job {
  u32 type, size; /* bytes of a request */
  u64 first, count; /* sectors; how many requests */
  u8 *data;        /* of all requests one after the other, or NULL: each slot's own */
  bool random;
};

static struct virtio disk;
static struct virtq *queue;
static struct slot *slots;
static u32 number, depth = 8;
static u64 capacity;

/* ---- start ------------------------------------------------------------------------------------------------------ */

static const char *start(void) {
  const char *error =
      virtio_start(&disk, F_READ_ONLY | F_BLOCK_SIZE | F_FLUSH | F_DISCARD | F_WRITE_ZEROES);
  if (!error) error = virtq_setup(&disk, 0, DEPTH_MAX);
  if (!error) error = virtio_ready(&disk);
  if (error) return error;
  queue = &disk.queues[0];
  capacity = virtio_config64(&disk, CONFIG_CAPACITY);
  slots = heap_take(sizeof *slots * DEPTH_MAX, 64);
  return slots ? NULL : "no memory";
}

/* ---- requests --------------------------------------------------------------------------------------------------- */

static void result(const char *what, u8 status) {
  if (status)
    say("blk %s failed status %u", what, U(status));
  else
    say("blk %s ok", what);
}

/* One request of any kind, whose status the device gives. */
static const char *simple(u32 type, u64 sector, void *data, u32 size, u8 *status) {
  slots->header = (struct header){type, 0, sector};
  slots->status = STATUS_UNSET;
  struct buffer buffers[3] = {{&slots->header, sizeof slots->header, false}};
  u32 count = 1;
  if (size) buffers[count++] = (struct buffer){data, size, type == READ || type == GET_ID};
  buffers[count++] = (struct buffer){&slots->status, 1, true};
  const char *error = virtq_call(queue, buffers, count, NULL);
  *status = slots->status;
  return error;
}

static const char *get_id(void) {
  char id[ID_SIZE + 1] __attribute__((aligned(16))) = {0};
  u8 status;
  const char *error = simple(GET_ID, 0, id, ID_SIZE, &status);
  if (error) return error;
  if (status) result("id", status);
  else say("blk id %s", id);
  return NULL;
}

/* `depth` requests at a time, in order, until all are done or one fails: the status of the first that failed. */
static const char *transfer(const struct job *job, u8 *status) {
  u64 begun = 0, done = 0;
  u32 written, free[DEPTH_MAX], free_count = 0;
  *status = 0;
  for (u32 i = 0; i < depth; i++) free[free_count++] = i;
  while (done < job->count && !(*status && done == begun)) {
    while (begun < job->count && free_count && !*status) {
      u32 index = free[--free_count];
      struct slot *slot = &slots[index];
      slot->header = (struct header){job->type, 0, job->first + begun * (job->size / SECTOR)};
      slot->status = STATUS_UNSET;
      struct buffer buffers[3] = {{&slot->header, sizeof slot->header, false},
                                  {job->data + begun * job->size, job->size, job->type == READ},
                                  {&slot->status, 1, true}};
      if (!virtq_add(queue, buffers, 3, index)) return "queue full";
      begun++;
    }
    virtq_kick(queue);
    const char *error = virtq_wait(queue, VIRTIO_ANSWER_MS);
    if (error) return error;
    u64 index;
    while (virtq_take(queue, &index, &written)) {
      done++;
      free[free_count++] = (u32)index;
      u8 got = slots[index].status;
      if (got && !*status) *status = got;
      if (!got && job->type == READ && written != job->size + 1) return "wrong length returned";
    }
  }
  return NULL;
}

/* ---- patterns and sums, at CPL 3: it is much data for an emulated kernel mode ----------------------------------- */

struct words {
  u32 *at, seed, sum, first;
  u64 count, bad;
};

/* What the pattern `seed` has in the disk's `index`th word. */
static u32 pattern(u32 seed, u32 index) { return (index + seed) * 2654435761u; }

static void fill_words(void *argument) {
  struct words *words = argument;
  for (u64 i = 0; i < words->count; i++) words->at[i] = pattern(words->seed, words->first + (u32)i);
}

static void sum_words(void *argument) {
  struct words *words = argument;
  for (u64 i = 0; i < words->count; i++) words->sum = (words->sum << 1 | words->sum >> 31) + words->at[i];
}

static void check_words(void *argument) {
  struct words *words = argument;
  for (words->bad = 0; words->bad < words->count; words->bad++)
    if (words->at[words->bad] != pattern(words->seed, words->first + (u32)words->bad)) return;
}

static const char *move(const char *what, u64 sector, u64 sectors, u32 seed, u32 size) {
  bool write = str_equal(what, "write"), verify = str_equal(what, "verify");
  u8 *data = heap_take(sectors * SECTOR, PAGE), status;
  if (!data || size % SECTOR || sectors * SECTOR % size) return data ? "wrong size" : "no memory";
  struct words words = {.at = (u32 *)data, .seed = seed, .first = (u32)(sector * SECTOR / 4), .count = sectors * SECTOR / 4};
  if (write) user_call(fill_words, &words);
  struct job job = {.type = write ? WRITE : READ, .size = size, .first = sector, .count = sectors * SECTOR / size, .data = data};
  const char *error = transfer(&job, &status);
  if (error) return error;
  if (status) {
    result(what, status);
    return NULL;
  }
  user_call(verify ? check_words : sum_words, &words);
  if (!verify)
    say("blk %s %u sectors sum %x", what, sectors, U(words.sum));
  else if (words.bad == words.count)
    say("blk verify %u sectors ok", sectors);
  else
    say("blk verify %u sectors bad at sector %u", sectors, sector + words.bad * 4 / SECTOR);
  return NULL;
}

static const char *on_range(const char *what, u32 type, u64 sector, u64 sectors, u32 flags) {
  struct range_request range = {sector, (u32)sectors, flags};
  u8 status;
  const char *error = simple(type, 0, &range, sizeof range, &status);
  if (!error) result(what, status);
  return error;
}

/* ---- a device that fails ---------------------------------------------------------------------------------------- */

static u32 *endured; /* a sector */

static const char *start_again(void) {
  const char *error = start();
  endured = heap_take(SECTOR, PAGE);
  return error ? error : endured ? NULL : "no memory";
}

/* Writes a sector and reads it again. */
static const char *write_and_read(u32 done, u32 attempt) {
  u64 sector = done % capacity;
  u32 wanted = pattern(attempt, done);
  u8 status;
  endured[0] = wanted;
  endured[SECTOR / 4 - 1] = ~wanted;
  const char *error = simple(WRITE, sector, endured, SECTOR, &status);
  if (error) return error;
  if (status) return endure_wrong("status");
  endured[0] = endured[SECTOR / 4 - 1] = 0;
  error = simple(READ, sector, endured, SECTOR, &status);
  if (error) return error;
  if (status) return endure_wrong("status");
  return endured[0] == wanted && endured[SECTOR / 4 - 1] == ~wanted ? NULL
                                                                    : endure_wrong("another sector's bytes, or older ones");
}

/* ---- bench ------------------------------------------------------------------------------------------------------ */

static u32 random_state;

/* A sector of a block that is anywhere on the disk (xorshift; the block by multiplication). */
static u64 random_sector(u64 blocks, u32 sectors) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 17;
  random_state ^= random_state << 5;
  return (random_state * blocks >> 32) * sectors;
}

/* Chains are made once and then made available again and again, at CPL 3 (in batches) where kernel mode is emulated: what is
 * measured is to be the device, not the guest. */
struct bench_state {
  const struct job *job;
  u64 blocks, begun, done, next, errors;
};

static u64 next_sector(struct bench_state *state) {
  u32 sectors = state->job->size / SECTOR;
  return state->job->random ? random_sector(state->blocks, sectors) : state->next++ % state->blocks * sectors;
}

/* Takes what is done, and makes as many requests of it. */
static void refill(void *argument) {
  struct bench_state *state = argument;
  u64 token;
  u32 head;
  while (virtq_take_kept(queue, &token, &head)) {
    struct slot *slot = &slots[token];
    if (slot->status) state->errors++;
    state->done++;
    if (state->begun == state->job->count) continue;
    state->begun++;
    slot->header.sector = next_sector(state);
    slot->status = STATUS_UNSET;
    virtq_add_kept(queue, head);
  }
}

static const char *bench_loop(struct bench_state *state) {
  const struct job *job = state->job;
  for (u32 i = 0; i < depth && state->begun < job->count; i++, state->begun++) {
    struct slot *slot = &slots[i];
    slot->header = (struct header){job->type, 0, next_sector(state)};
    slot->status = STATUS_UNSET;
    struct buffer buffers[3] = {
        {&slot->header, sizeof slot->header, false}, {slot->data, job->size, job->type == READ}, {&slot->status, 1, true}};
    if (!virtq_add(queue, buffers, 3, i)) return "queue full";
  }
  virtq_kick(queue);
  while (state->done < job->count) {
    if (depth >= USER_DEPTH)
      user_call(refill, state);
    else
      refill(state);
    virtq_kick(queue);
    virtq_arm(queue);
    while (state->done < job->count && !virtq_pending(queue)) {
      if (wait_over()) return "no answer";
      if (disk.config_changes && virtio_needs_reset(&disk)) return "needs a reset";
      sleep_until_interrupt();
    }
  }
  return NULL;
}

static const char *bench(const char *what, u64 count, u32 size) {
  struct job job = {.type = after_prefix(what, "rand-write") || after_prefix(what, "seq-write") ? WRITE : READ,
                    .size = size,
                    .count = count,
                    .random = after_prefix(what, "rand-")};
  if (size % SECTOR || capacity * SECTOR < size) return "wrong size";
  for (u32 i = 0; i < depth; i++)
    if (!(slots[i].data = heap_take(size, PAGE))) return "no memory";
  random_state = 0x9e3779b9;
  struct bench_state state = {.job = &job, .blocks = capacity * SECTOR / size};
  u32 interrupts = disk.interrupts;
  queue->kicks = 0;
  wait_begin(BENCH_LIMIT_MS);
  u64 begin = read_tsc(), clock = wait_left_ns();
  mark(MARK_BENCH_BEGIN);
  const char *error = bench_loop(&state);
  mark(MARK_BENCH_END);
  u64 tsc = read_tsc() - begin, ns = clock - wait_left_ns();
  wait_end();
  if (!error)
    say("blk bench %s depth %u bytes %u n=%u tsc=%u ns=%u kicks=%u interrupts=%u errors=%u", what, U(depth), U(size), count,
        tsc, ns, U(queue->kicks), U(disk.interrupts - interrupts), state.errors);
  return error;
}

/* ---- words ------------------------------------------------------------------------------------------------------ */

static u64 take_argument(const char **text, u64 otherwise) {
  if (**text != ',') return otherwise;
  (*text)++;
  return take_number(text);
}

/* A copy of `text` up to its first comma; `*rest` is left there. */
static const char *take_name(const char *text, const char **rest) {
  static char name[32];
  u32 i = 0;
  while (text[i] && text[i] != ',' && i + 1 < sizeof name) name[i] = text[i], i++;
  name[i] = 0;
  *rest = text + i;
  return name;
}

static const char *about(void) {
  say("blk features %x", disk.offered);
  say("blk capacity %u sectors%s", capacity, disk.features & F_READ_ONLY ? " read-only" : "");
  if (disk.features & F_BLOCK_SIZE) say("blk block-size %u", U(virtio_config32(&disk, CONFIG_BLOCK_SIZE)));
  if (disk.features & F_DISCARD) say("blk discard at most %u sectors", U(virtio_config32(&disk, CONFIG_DISCARD_MAX)));
  if (disk.features & F_WRITE_ZEROES) say("blk zero at most %u sectors", U(virtio_config32(&disk, CONFIG_ZEROES_MAX)));
  return get_id();
}

static const char *run(const char *what, const char *rest) {
  if (str_equal(what, "endure"))
    return virtio_endure("blk", &(struct endurance){&disk, start_again, write_and_read}, endure_requests(rest));
  const char *error = start();
  u8 status;
  if (error) return error;
  if (!*what) return about();
  if (str_equal(what, "id")) return get_id();
  if (str_equal(what, "flush")) {
    error = simple(FLUSH, 0, NULL, 0, &status);
    if (!error) result(what, status);
    return error;
  }
  if (after_prefix(what, "rand-") || after_prefix(what, "seq-")) {
    u64 count = take_argument(&rest, 1000), size = take_argument(&rest, after_prefix(what, "seq-") ? 1 << 20 : 4096);
    return bench(what, count, (u32)size);
  }
  u64 sector = take_argument(&rest, 0), sectors = take_argument(&rest, 8), third = take_argument(&rest, 0);
  if (str_equal(what, "discard")) return on_range(what, DISCARD, sector, sectors, 0);
  if (str_equal(what, "zero")) return on_range(what, WRITE_ZEROES, sector, sectors, third ? UNMAP : 0);
  if (str_equal(what, "read")) return move(what, sector, sectors, 0, third ? (u32)third : 4096);
  if (str_equal(what, "write") || str_equal(what, "verify"))
    return move(what, sector, sectors, (u32)third, (u32)take_argument(&rest, 4096));
  return "what?";
}

bool virtio_blk(const char *word) {
  const char *value = after_prefix(word, "disk="), *rest;
  if (value) {
    number = (u32)take_number(&value);
    return true;
  }
  if ((value = after_prefix(word, "depth="))) {
    depth = (u32)take_number(&value);
    if (depth < 1) depth = 1;
    if (depth > DEPTH_MAX) depth = DEPTH_MAX;
    return true;
  }
  value = after_prefix(word, "blk");
  if (!value || (*value && *value != '=')) return false;
  const char *what = take_name(*value ? value + 1 : value, &rest);
  if (!virtio_find(&disk, VIRTIO_BLOCK, number)) {
    say("blk none");
    return true;
  }
  if (!*what) say("blk device %x irq %u", disk.base, U(disk.irq));
  const char *error = run(what, rest);
  if (error) {
    virtio_fail(&disk);
    say("blk failed %s", error);
  } else if (!virtio_stop(&disk))
    say("blk failed reset");
  return true;
}
