/* The memory device (virtio 1.3, section 5.15): plugs what the host asks for, uses it, and gives it back. */
#include "virtio.h"

#define F_UNPLUGGED_INACCESSIBLE (1ul << 1)

#define CONFIG_BLOCK_SIZE 0
#define CONFIG_ADDR 16
#define CONFIG_REGION_SIZE 24
#define CONFIG_PLUGGED_SIZE 40
#define CONFIG_REQUESTED_SIZE 48

enum { PLUG = 0, UNPLUG = 1, UNPLUG_ALL = 2, STATE = 3 };

#define WINDOW 0x100000000ul /* entry.S: page tables for 1 GiB here are free for us */
#define WINDOW_PAGE 0x200000ul
#define PAGE_FLAGS 0x87

extern u64 window_pd[];

struct request {
  u16 type, padding[3];
  u64 addr;
  u16 nb_blocks, padding2[3];
};

struct response {
  u16 type, padding[3], state;
} __attribute__((packed));

static struct virtio mem;
static struct request *request;
static struct response *response;
static u64 base, block;

/* One request; what the device answers, or why not. */
static const char *call(u16 type, u64 first, u64 count) {
  u32 length = 0;
  memset(request, 0, sizeof *request);
  memset(response, 0xee, sizeof *response);
  request->type = type;
  request->addr = base + first * block;
  request->nb_blocks = (u16)count;
  const char *error = virtq_call(
      &mem.queues[0], (struct buffer[]){{request, sizeof *request, false}, {response, sizeof *response, true}}, 2, &length);
  return error ? error : length == sizeof *response ? NULL : "wrong length returned";
}

/* Asks for it and says what came of it. */
static const char *ask(const char *name, u16 type, u64 first, u64 count) {
  const char *error = call(type, first, count);
  if (!error)
    say("mem %s %u blocks at %u answer %u state %u plugged %u MiB", name, count, first, U(response->type), U(response->state),
        virtio_config64(&mem, CONFIG_PLUGGED_SIZE) >> 20);
  return error;
}

/* A place of the region, through the window. */
static volatile u64 *at(u64 address) {
  window_pd[0] = (address & -WINDOW_PAGE) | PAGE_FLAGS;
  asm volatile("invlpg (%0)" ::"r"(WINDOW) : "memory");
  return (volatile u64 *)(WINDOW + (address & (WINDOW_PAGE - 1)));
}

/* How many pages of some blocks begin with the wanted word; written first where told to. */
static void look(const char *name, u64 first, u64 count, bool write) {
  u64 zeros = 0, ones = 0, own = 0, pages = 0;
  for (u64 address = base + first * block; address < base + (first + count) * block; address += PAGE, pages++) {
    volatile u64 *word = at(address);
    if (write) *word = address;
    u64 value = *word;
    if (value == 0) zeros++;
    if (value == ~0ul) ones++;
    if (value == address) own++;
  }
  say("mem %s %u pages zero %u ones %u own %u", name, pages, zeros, ones, own);
}

static const char *start(void) {
  const char *error = virtio_start(&mem, F_UNPLUGGED_INACCESSIBLE);
  if (!error) error = virtq_setup(&mem, 0, 8);
  if (!error) error = virtio_ready(&mem);
  request = heap_take(sizeof *request, 64);
  response = heap_take(sizeof *response, 64);
  base = virtio_config64(&mem, CONFIG_ADDR);
  block = virtio_config64(&mem, CONFIG_BLOCK_SIZE);
  return error ? error : request && response ? NULL : "no memory";
}

static const char *run(void) {
  const char *error = start();
  if (error) return error;
  say("mem region %x %u MiB in blocks of %u KiB", base, virtio_config64(&mem, CONFIG_REGION_SIZE) >> 20, block >> 10);
  /* The host asks when it likes. */
  if (virtio_config64(&mem, CONFIG_REQUESTED_SIZE) == 0) wait_for(&mem.config_changes, 1, VIRTIO_ANSWER_MS);
  u64 blocks = virtio_config64(&mem, CONFIG_REQUESTED_SIZE) / block;
  if (blocks < 2) return "the host asks for nothing";
  look("before", 0, 1, true);
  if ((error = ask("plug", PLUG, 0, blocks))) return error;
  if ((error = ask("plug", PLUG, blocks, 1))) return error;
  look("fresh", 0, blocks, false);
  look("written", 0, blocks, true);
  look("kept", 0, blocks, false);
  /* One page of the block behind: it takes an exit each. */
  say("mem behind %s", *at(base + blocks * block) == ~0ul ? "ones" : "bad");
  if ((error = ask("unplug", UNPLUG, 1, 1))) return error;
  say("mem gap %s", *at(base + block) == ~0ul ? "ones" : "bad");
  if ((error = ask("state", STATE, 0, blocks))) return error;
  look("neighbour", 0, 1, false);
  if ((error = ask("plug", PLUG, 1, 1))) return error;
  look("fresh", 1, 1, false);
  look("written", 1, 1, true);
  /* The host looks at what it has. */
  say("mem full");
  wait_for(&mem.config_changes, mem.config_changes + 1, VIRTIO_ANSWER_MS);
  say("mem requested %u MiB", virtio_config64(&mem, CONFIG_REQUESTED_SIZE) >> 20);
  if ((error = ask("unplug all", UNPLUG_ALL, 0, 0))) return error;
  look("after", 0, 1, true);
  return NULL;
}

/* ---- a device that fails ---------------------------------------------------------------------------------------- */

#define BLOCKS 4
enum { STATE_UNPLUGGED = 1, STATE_PLUGGED = 2 }; /* what a block may be */

static u8 possible[BLOCKS];
static u64 marks[BLOCKS]; /* what was written to a block that is plugged; 0: nothing that is known of */

static const char *change(u16 type, u32 index) {
  bool plug = type == PLUG;
  const char *error = call(type, index, 1);
  if (error)
    possible[index] = STATE_UNPLUGGED | STATE_PLUGGED; /* it was done, or it will never be */
  else if (response->type)
    return endure_wrong(plug ? "plug refused" : "unplug refused");
  else
    possible[index] = plug ? STATE_PLUGGED : STATE_UNPLUGGED;
  return error;
}

/* Plugs a block or unplugs it, by turns. What it holds is what was written, or nothing. */
static const char *plug_and_unplug(u32 done, u32 attempt) {
  u32 index = done % BLOCKS;
  u64 address = base + index * block;
  const char *error = call(STATE, index, 1);
  if (error) return error;
  bool plugged = response->state == 0, wanted = done / BLOCKS % 2 == 0;
  if (response->type || response->state > 1) return endure_wrong("no state");
  if (!(possible[index] & (plugged ? STATE_PLUGGED : STATE_UNPLUGGED))) return endure_wrong("another state");
  if (!plugged && *at(address) != ~0ul) return endure_wrong("not gone");
  if (plugged && *at(address) != marks[index] && *at(address)) return endure_wrong("another block's word");
  /* One that is as it is wanted was changed when the device failed. */
  if (plugged == wanted && (error = change(plugged ? UNPLUG : PLUG, index))) return error;
  if ((error = change(wanted ? PLUG : UNPLUG, index))) return error;
  marks[index] = 0;
  if (!wanted) return *at(address) == ~0ul ? NULL : endure_wrong("not gone");
  if (*at(address)) return endure_wrong("not empty");
  *at(address) = marks[index] = attempt + 1;
  return NULL;
}

/* The host has asked for all of them by then. */
static const char *endure(u32 requests) {
  for (u32 i = 0; i < BLOCKS; i++) possible[i] = STATE_UNPLUGGED;
  return virtio_endure("mem", &(struct endurance){&mem, start, plug_and_unplug}, requests);
}

bool virtio_mem(const char *word) {
  const char *many = after_prefix(word, "mem=endure");
  if (!many && !str_equal(word, "mem")) return false;
  if (!virtio_find(&mem, VIRTIO_MEM, 0)) {
    say("mem none");
    return true;
  }
  const char *error = many ? endure(endure_requests(many)) : run();
  if (error) {
    virtio_fail(&mem);
    say("mem failed %s", error);
  } else {
    virtio_stop(&mem);
    say("mem ok");
  }
  return true;
}
