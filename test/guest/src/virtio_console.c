/* The console device (virtio 1.3, section 5.3): sends back what it receives on each port, until it is told to stop. */
#include "virtio.h"

#define F_SIZE (1ul << 0)
#define F_MULTIPORT (1ul << 1)

#define CONFIG_COLS 0
#define CONFIG_ROWS 2
#define CONFIG_PORTS 4
#define CONFIG_EMERGENCY 8

enum { DEVICE_READY, DEVICE_ADD, DEVICE_REMOVE, PORT_READY, CONSOLE_PORT, RESIZE, PORT_OPEN, PORT_NAME };
enum { CONTROL_RX = 2, CONTROL_TX = 3 };

#define PORTS_MAX 3 /* of 8 queues */
#define BUFFERS 4
#define BUFFER_SIZE 512
#define NAME_MAX 64
#define IDLE_MS 60000

struct control {
  u32 id;
  u16 event, value;
};

static struct virtio con;
static u8 *buffers[PORTS_MAX][BUFFERS];
static u8 *messages[BUFFERS];
static struct control *answer;
static u64 bytes, chains, sum;
static bool over;

static u32 receive_queue(u32 port) { return port ? 2 + 2 * port : 0; }

static const char *give(u32 queue, u8 *buffer, u64 token) {
  if (!virtq_add(&con.queues[queue], &(struct buffer){buffer, BUFFER_SIZE, true}, 1, token)) return "no descriptors";
  virtq_kick(&con.queues[queue]);
  return NULL;
}

static const char *tell(u32 port, u16 event, u16 value) {
  u32 length;
  *answer = (struct control){port, event, value};
  return virtq_call(&con.queues[CONTROL_TX], &(struct buffer){answer, sizeof *answer, false}, 1, &length);
}

static const char *hear(const u8 *bytes, u32 length) {
  const struct control *message = (const struct control *)bytes;
  const u8 *rest = bytes + sizeof *message;
  char name[NAME_MAX + 1];
  u32 i, port = message->id;
  switch (message->event) {
    case DEVICE_ADD:
      say("console port %u added", U(port));
      return tell(port, PORT_READY, port < PORTS_MAX);
    case DEVICE_REMOVE:
      say("console port %u removed", U(port));
      return NULL;
    case CONSOLE_PORT:
      say("console port %u console", U(port));
      return tell(port, PORT_OPEN, 1);
    case RESIZE:
      say("console port %u size %u by %u", U(port), U(rest[0] | rest[1] << 8), U(rest[2] | rest[3] << 8));
      return NULL;
    case PORT_OPEN:
      say("console port %u host %s", U(port), message->value ? "open" : "closed");
      return message->value ? tell(port, PORT_OPEN, 1) : NULL;
    case PORT_NAME:
      for (i = 0; i < NAME_MAX && sizeof *message + i < length; i++) name[i] = (char)rest[i];
      name[i] = 0;
      say("console port %u name %s", U(port), name);
      return NULL;
  }
  return "an unknown message";
}

static const char *echo(u32 port, u8 *buffer, u32 length) {
  u32 written;
  bytes += length;
  chains++;
  for (u32 i = 0; i < length; i++) sum = ((sum << 1 | sum >> 31) + buffer[i]) & 0xffffffff;
  const char *error =
      virtq_call(&con.queues[receive_queue(port) + 1], &(struct buffer){buffer, length, false}, 1, &written);
  if (!error && length >= 4 && buffer[length - 4] == 'q' && buffer[length - 3] == 'u' && buffer[length - 2] == 'i' &&
      buffer[length - 1] == 't')
    over = true;
  return error;
}

static void show_size(void) {
  say("console size %u by %u", U(virtio_config16(&con, CONFIG_COLS)), U(virtio_config16(&con, CONFIG_ROWS)));
}

static const char *work(u32 ports, bool multiport) {
  const char *error;
  u64 token;
  u32 length, sizes = 0;
  while (!over) {
    u32 seen = con.interrupts, done = 0;
    while (multiport && virtq_take(&con.queues[CONTROL_RX], &token, &length)) {
      if ((error = hear(messages[token], length))) return error;
      if ((error = give(CONTROL_RX, messages[token], token))) return error;
      done++;
    }
    for (u32 port = 0; port < ports && !over; port++) {
      u32 queue = receive_queue(port);
      while (!over && virtq_take(&con.queues[queue], &token, &length)) {
        if ((error = echo(port, buffers[port][token], length))) return error;
        if ((error = give(queue, buffers[port][token], token))) return error;
        done++;
      }
    }
    if (!multiport && con.config_changes != sizes) {
      sizes = con.config_changes;
      show_size();
    }
    if (!done && !over && !wait_for(&con.interrupts, seen + 1, IDLE_MS)) return "nothing is received";
  }
  return NULL;
}

static const char *run(bool named) {
  /* A byte before anything is set up. */
  virtio_config_write32(&con, CONFIG_EMERGENCY, '!');
  const char *error = virtio_start(&con, F_SIZE | (named ? F_MULTIPORT : 0));
  say("console features %x", con.offered);
  bool multiport = con.features & F_MULTIPORT;
  u32 ports = multiport ? virtio_config32(&con, CONFIG_PORTS) : 1;
  if (ports > PORTS_MAX) ports = PORTS_MAX;
  u32 queues = multiport ? 2 + 2 * ports : 2;
  for (u32 queue = 0; queue < queues && !error; queue++) error = virtq_setup(&con, queue, 16);
  answer = heap_take(sizeof *answer, 64);
  if (!error && !answer) error = "no memory";
  if (!error) error = virtio_ready(&con);
  for (u32 i = 0; i < BUFFERS && !error; i++) {
    for (u32 port = 0; port < ports && !error; port++) {
      if (!(buffers[port][i] = heap_take(BUFFER_SIZE, 64))) return "no memory";
      error = give(receive_queue(port), buffers[port][i], i);
    }
    if (!multiport || error) continue;
    if (!(messages[i] = heap_take(BUFFER_SIZE, 64))) return "no memory";
    error = give(CONTROL_RX, messages[i], i);
  }
  if (error) return error;
  bytes = chains = sum = 0;
  over = false;
  if (!multiport) show_size();
  if (multiport) error = tell(0, DEVICE_READY, 1);
  if (!error) error = work(ports, multiport);
  if (!error) say("console echoed %u bytes in %u chains sum %x", bytes, chains, sum);
  return error;
}

/* ---- a device that fails ---------------------------------------------------------------------------------------- */

static struct note *sent, heard;
static u32 heard_bytes, heard_attempt; /* how much of the next note is there; behind the last one that was */
static bool heard_any;

/* The host sends back what it gets, as a stream that no reset takes anything of. */
static void hear_bytes(const u8 *from, u32 length) {
  for (u32 i = 0; i < length; i++) {
    ((u8 *)&heard)[heard_bytes++] = from[i];
    if (heard_bytes < NOTE_SIZE) continue;
    heard_bytes = 0;
    if (!note_good(&heard) || (heard_any && heard.attempt <= heard_attempt)) endure_wrong("wrong bytes");
    heard_any = true;
    heard_attempt = heard.attempt;
  }
}

static const char *hear_all(bool give_back) {
  u64 token;
  u32 length;
  while (virtq_take(&con.queues[0], &token, &length)) {
    hear_bytes(buffers[0][token], length);
    const char *error = give_back ? give(0, buffers[0][token], token) : NULL;
    if (error) return error;
  }
  return NULL;
}

static const char *start(void) {
  /* What was given to the driver before the device failed is the driver's. */
  if (con.queues[0].size) hear_all(false);
  const char *error = virtio_start(&con, F_SIZE);
  for (u32 queue = 0; queue < 2 && !error; queue++) error = virtq_setup(&con, queue, 16);
  if (!error) error = virtio_ready(&con);
  sent = heap_take(sizeof *sent, 64);
  if (!sent) return "no memory";
  for (u32 i = 0; i < BUFFERS; i++)
    if (!(buffers[0][i] = heap_take(BUFFER_SIZE, 64))) return "no memory";
  for (u32 i = 0; i < BUFFERS && !error; i++) error = give(0, buffers[0][i], i);
  return error;
}

/* A note there and back. */
static const char *converse(u32 done, u32 attempt) {
  u32 length;
  note_write(sent, done, attempt);
  const char *error = virtq_call(&con.queues[1], &(struct buffer){sent, sizeof *sent, false}, 1, &length);
  while (!error && !(heard_any && heard_attempt >= attempt)) {
    error = virtq_wait(&con.queues[0], VIRTIO_ANSWER_MS);
    if (!error) error = hear_all(true);
  }
  return error;
}

/* "ports": with further ports, where there are any; "endure[,REQUESTS]" */
bool virtio_console(const char *word) {
  bool named = str_equal(word, "console=ports");
  const char *many = after_prefix(word, "console=endure");
  if (!named && !many && !str_equal(word, "console")) return false;
  if (!virtio_find(&con, VIRTIO_CONSOLE, 0)) {
    say("console none");
    return true;
  }
  say("console device %x irq %u", con.base, U(con.irq));
  heard_any = false;
  heard_bytes = 0;
  const char *error = many ? virtio_endure("console", &(struct endurance){&con, start, converse}, endure_requests(many))
                           : run(named);
  if (error) {
    virtio_fail(&con);
    say("console failed %s", error);
  } else {
    virtio_stop(&con);
    say("console ok");
  }
  return true;
}
