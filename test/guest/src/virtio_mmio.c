/* Virtio over memory-mapped registers, version 2 (virtio 1.3, section 4.2). */
#include "virtio.h"

#define MAGIC 0x000
#define VERSION 0x004
#define DEVICE_ID 0x008
#define VENDOR_ID 0x00c
#define DEVICE_FEATURES 0x010
#define DEVICE_FEATURES_SEL 0x014
#define DRIVER_FEATURES 0x020
#define DRIVER_FEATURES_SEL 0x024
#define QUEUE_SEL 0x030
#define QUEUE_NUM_MAX 0x034
#define QUEUE_NUM 0x038
#define QUEUE_READY 0x044
#define QUEUE_NOTIFY 0x050
#define INTERRUPT_STATUS 0x060
#define INTERRUPT_ACK 0x064
#define STATUS 0x070
#define QUEUE_DESC 0x080
#define QUEUE_DRIVER 0x090
#define QUEUE_DEVICE 0x0a0
#define CONFIG_GENERATION 0x0fc
#define CONFIG 0x100
#define MAGIC_VALUE 0x74726976

static u32 read_register(const struct virtio *device, u32 reg) { return read32(device->base + reg); }
static void write_register(const struct virtio *device, u32 reg, u32 value) { write32(device->base + reg, value); }

static u32 status(const struct virtio *device) { return read_register(device, STATUS); }
static void set_status(const struct virtio *device, u32 status) { write_register(device, STATUS, status); }
static u32 generation(const struct virtio *device) { return read_register(device, CONFIG_GENERATION); }
static void kick(const struct virtio *device, u32 queue) { write_register(device, QUEUE_NOTIFY, queue); }

static u64 offered(const struct virtio *device) {
  write_register(device, DEVICE_FEATURES_SEL, 0);
  u64 features = read_register(device, DEVICE_FEATURES);
  write_register(device, DEVICE_FEATURES_SEL, 1);
  return features | U(read_register(device, DEVICE_FEATURES)) << 32;
}

static void accept(const struct virtio *device, u32 word, u32 bits) {
  write_register(device, DRIVER_FEATURES_SEL, word);
  write_register(device, DRIVER_FEATURES, bits);
}

static u32 queue_max(const struct virtio *device, u32 queue) {
  write_register(device, QUEUE_SEL, queue);
  return read_register(device, QUEUE_NUM_MAX);
}

static bool queue_ready(const struct virtio *device, u32 queue) {
  write_register(device, QUEUE_SEL, queue);
  return read_register(device, QUEUE_READY) & 1;
}

static void queue_stop(const struct virtio *device, u32 queue) {
  write_register(device, QUEUE_SEL, queue);
  write_register(device, QUEUE_READY, 0);
}

static void set_address(const struct virtio *device, u32 reg, u64 address) {
  write_register(device, reg, (u32)address);
  write_register(device, reg + 4, (u32)(address >> 32));
}

static bool queue_set(const struct virtio *device, u32 queue, u32 size, u64 desc, u64 avail, u64 used) {
  write_register(device, QUEUE_SEL, queue);
  write_register(device, QUEUE_NUM, size);
  set_address(device, QUEUE_DESC, desc);
  set_address(device, QUEUE_DRIVER, avail);
  set_address(device, QUEUE_DEVICE, used);
  write_register(device, QUEUE_READY, 1);
  return read_register(device, QUEUE_READY) & 1;
}

static bool connect(struct virtio *device) {
  return ioapic_route(device->irq, device->vector, device->level, device->active_low);
}

static void disconnect(const struct virtio *device) { ioapic_mask(device->irq); }

static u32 cause(const struct virtio *device, u32 vector) {
  (void)vector;
  u32 cause = read_register(device, INTERRUPT_STATUS) & 3;
  if (cause) write_register(device, INTERRUPT_ACK, cause);
  return cause;
}

const struct virtio_transport virtio_mmio = {status,     set_status, offered, accept,     queue_max, queue_ready, queue_set,
                                             queue_stop, kick,       generation, connect, disconnect, cause};

bool virtio_mmio_find(struct virtio *device, u32 id, u32 *nth) {
  for (u32 i = 0; i < acpi.virtio_count; i++) {
    const struct virtio_place *place = &acpi.virtio[i];
    if (read32(place->base + MAGIC) != MAGIC_VALUE || read32(place->base + VERSION) != 2 ||
        read32(place->base + DEVICE_ID) != id)
      continue;
    if ((*nth)--) continue;
    device->transport = &virtio_mmio;
    device->base = place->base;
    device->config = place->base + CONFIG;
    device->irq = place->irq;
    device->level = place->level;
    device->active_low = place->active_low;
    return true;
  }
  return false;
}

void virtio_mmio_list(void) {
  for (u32 i = 0; i < acpi.virtio_count; i++) {
    u64 base = acpi.virtio[i].base;
    say("virtio %x magic %x version %u device %u vendor %x", base, U(read32(base + MAGIC)), U(read32(base + VERSION)),
        U(read32(base + DEVICE_ID)), U(read32(base + VENDOR_ID)));
  }
}
