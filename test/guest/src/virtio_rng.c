/* The entropy device (virtio 1.3, section 5.4). */
#include "virtio.h"

#define REQUEST_MAX 4096
#define SHOWN 64

static struct virtio rng;

static const char *request(u8 *bytes, u32 number, u32 size) {
  u32 length = 0;
  memset(bytes, 0, size);
  const char *error = virtq_call(&rng.queues[0], &(struct buffer){bytes, size, true}, 1, &length);
  if (error) return error;
  /* What was done before the wait began needed no interrupt; it comes all the same. */
  if (!wait_for(&rng.interrupts, number + 1, VIRTIO_ANSWER_MS)) return "no interrupt";
  if (length == 0 || length > size) return "wrong length returned";
  print("troupe-guest: rng request %u %u bytes %u interrupts ", U(number), U(length), U(rng.interrupts));
  for (u32 i = 0; i < length && i < SHOWN; i++) print("%b", U(bytes[i]));
  print("\r\n");
  return NULL;
}

static const char *run(u32 size, u32 requests) {
  const char *error = virtio_start(&rng, 0);
  if (rng.offered) say("rng features %x", rng.offered);
  if (!error) error = virtq_setup(&rng, 0, 8);
  if (!error) error = virtio_ready(&rng);
  u8 *bytes = heap_take(size, PAGE);
  if (!error && !bytes) error = "no memory";
  for (u32 number = 0; number < requests && !error; number++) error = request(bytes, number, size);
  return error;
}

/* ---- a device that fails ---------------------------------------------------------------------------------------- */

static u8 *endured;

static const char *start(void) {
  const char *error = virtio_start(&rng, 0);
  if (!error) error = virtq_setup(&rng, 0, 8);
  if (!error) error = virtio_ready(&rng);
  endured = heap_take(64, 64);
  return error ? error : endured ? NULL : "no memory";
}

static const char *again(u32 done, u32 attempt) {
  (void)done, (void)attempt;
  u32 length;
  const char *error = virtq_call(&rng.queues[0], &(struct buffer){endured, 64, true}, 1, &length);
  return error ? error : length == 0 || length > 64 ? endure_wrong("wrong length returned") : NULL;
}

/* "BYTES[,REQUESTS]", or "endure[,REQUESTS]" */
static void rng_words(const char *text) {
  u32 size = 32, requests = 2;
  const char *many = after_prefix(text, "endure");
  if (!many && *text) size = (u32)take_number(&text);
  if (!many && *text == ',') {
    text++;
    requests = (u32)take_number(&text);
  }
  if (size > REQUEST_MAX) size = REQUEST_MAX;
  if (!virtio_find(&rng, VIRTIO_ENTROPY, 0)) {
    say("rng none");
    return;
  }
  say("rng device %x irq %u", rng.base, U(rng.irq));
  const char *error = many ? virtio_endure("rng", &(struct endurance){&rng, start, again}, endure_requests(many))
                           : run(size, requests);
  if (error) {
    virtio_fail(&rng);
    say("rng failed %s", error);
  } else {
    virtio_stop(&rng);
    say("rng ok");
  }
}

bool virtio_rng(const char *word) {
  const char *value = after_prefix(word, "rng");
  if (!value || (*value && *value != '=')) return false;
  rng_words(*value ? value + 1 : value);
  return true;
}
