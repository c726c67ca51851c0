/* A driver that does nothing wrong, for any device; and a device that has it while something happens to another one. */
#include "virtio.h"

#define QUEUE_SIZE 8

static struct virtio other;
static u8 data[512] __attribute__((aligned(512)));

const char *correct_start(struct virtio *device, u32 last) {
  const char *error = virtio_start(device, ALL_FEATURES);
  for (u32 i = 0; i <= last && !error; i++) error = virtq_setup(device, i, QUEUE_SIZE);
  return error ? error : virtio_ready(device);
}

const char *correct_work(struct virtio *device) {
  static struct {
    u32 type, reserved;
    u64 sector;
  } header;
  static volatile u8 status;
  u32 written;
  const char *error;
  if (device->id == VIRTIO_ENTROPY) {
    error = virtq_call(&device->queues[0], &(struct buffer){data, 16, true}, 1, &written);
    return error ? error : written ? NULL : "nothing written";
  }
  if (device->id == VIRTIO_BLOCK) {
    struct buffer buffers[3] = {{&header, sizeof header, false}, {data, sizeof data, true}, {&status, 1, true}};
    status = 0xff;
    error = virtq_call(&device->queues[0], buffers, 3, NULL);
    return error ? error : status ? "status" : NULL;
  }
  return NULL;
}

bool other_start(u32 id) {
  return virtio_find(&other, id == VIRTIO_ENTROPY ? VIRTIO_BLOCK : VIRTIO_ENTROPY, 0) && !correct_start(&other, 0) &&
         !correct_work(&other);
}

u32 other_id(void) { return other.id; }
const char *other_work(void) { return correct_work(&other) ? "the other device failed" : NULL; }
void other_stop(void) { virtio_stop(&other); }
