/* A driver for the virtio entropy device over virtio-mmio, version 2 (virtio 1.2, sections 4.2 and 5.4). */
#include "guest.h"

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

#define MAGIC_VALUE 0x74726976
#define ENTROPY 4
#define ACKNOWLEDGE 1
#define DRIVER 2
#define DRIVER_OK 4
#define FEATURES_OK 8
#define FAILED 128
#define VERSION_1_HIGH 1 /* VIRTIO_F_VERSION_1, bit 32 */
#define DESC_WRITE 2

#define QUEUE_SIZE 8
#define REQUEST_MAX 4096
#define SHOWN 64
#define RESET_TRIES 100000
#define REPLY_MS 10000

struct desc {
  u64 addr;
  u32 len;
  u16 flags, next;
};
struct avail {
  u16 flags, idx, ring[QUEUE_SIZE], used_event;
};
struct used {
  u16 flags, idx;
  struct {
    u32 id, len;
  } ring[QUEUE_SIZE];
  u16 avail_event;
};

static struct desc desc[QUEUE_SIZE] __attribute__((aligned(16)));
static volatile struct avail avail __attribute__((aligned(2)));
static volatile struct used used __attribute__((aligned(4)));
static u8 buffer[REQUEST_MAX] __attribute__((aligned(16), section(".stacks,\"aw\",@nobits#")));

static u64 device;
static volatile u32 completions;

/* The status register may well be a page of memory that always shows the bit: the queue itself says what is new. */
static void on_interrupt(void) {
  u32 status = read32(device + INTERRUPT_STATUS);
  write32(device + INTERRUPT_ACK, status & 3);
  completions = used.idx;
}

static void set_address(u32 reg, const volatile void *at) {
  write32(device + reg, (u32)(u64)at);
  write32(device + reg + 4, (u32)((u64)at >> 32));
}

static const char *start(const struct virtio_place *place) {
  write32(device + STATUS, 0);
  for (u32 tries = 0; read32(device + STATUS) != 0; tries++)
    if (tries == RESET_TRIES) return "reset";
  write32(device + STATUS, ACKNOWLEDGE);
  write32(device + STATUS, ACKNOWLEDGE | DRIVER);
  write32(device + DEVICE_FEATURES_SEL, 0);
  u64 features = read32(device + DEVICE_FEATURES);
  write32(device + DEVICE_FEATURES_SEL, 1);
  features |= U(read32(device + DEVICE_FEATURES)) << 32;
  say("rng features %x", features);
  if (!(features >> 32 & VERSION_1_HIGH)) return "no VIRTIO_F_VERSION_1";
  write32(device + DRIVER_FEATURES_SEL, 0);
  write32(device + DRIVER_FEATURES, 0);
  write32(device + DRIVER_FEATURES_SEL, 1);
  write32(device + DRIVER_FEATURES, VERSION_1_HIGH);
  write32(device + STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
  if (!(read32(device + STATUS) & FEATURES_OK)) return "features refused";

  write32(device + QUEUE_SEL, 0);
  if (read32(device + QUEUE_READY)) return "queue in use";
  if (read32(device + QUEUE_NUM_MAX) < QUEUE_SIZE) return "queue too small";
  memset(desc, 0, sizeof desc);
  memset((void *)&avail, 0, sizeof avail);
  memset((void *)&used, 0, sizeof used);
  write32(device + QUEUE_NUM, QUEUE_SIZE);
  set_address(QUEUE_DESC, desc);
  set_address(QUEUE_DRIVER, &avail);
  set_address(QUEUE_DEVICE, &used);
  write32(device + QUEUE_READY, 1);
  interrupt_handler(VECTOR_VIRTIO, on_interrupt);
  if (!ioapic_route(place->irq, VECTOR_VIRTIO, place->level, place->active_low)) return "no interrupt line";
  write32(device + STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
  return NULL;
}

static const char *request(u32 number, u32 size) {
  u16 slot = (u16)(number % QUEUE_SIZE);
  memset(buffer, 0, size);
  desc[slot] = (struct desc){(u64)buffer, size, DESC_WRITE, 0};
  avail.ring[slot] = slot;
  barrier();
  avail.idx = (u16)(number + 1);
  barrier();
  write32(device + QUEUE_NOTIFY, 0);
  if (!wait_for(&completions, (number + 1) & 0xffff, REPLY_MS))
    return used.idx == (u16)(number + 1) ? "no interrupt" : "no answer";
  u32 id = used.ring[slot].id, length = used.ring[slot].len;
  if (id != slot) return "wrong descriptor returned";
  if (length == 0 || length > size) return "wrong length returned";
  print("troupe-guest: rng request %u %u bytes %u interrupts ", U(number), U(length),
        U(interrupt_count[VECTOR_VIRTIO]));
  for (u32 i = 0; i < length && i < SHOWN; i++) print("%b", U(buffer[i]));
  print("\r\n");
  return NULL;
}

void virtio_rng(u32 size, u32 requests) {
  const struct virtio_place *place = NULL;
  for (u32 i = 0; i < acpi.virtio_count && !place; i++) {
    u64 base = acpi.virtio[i].base;
    if (read32(base + MAGIC) == MAGIC_VALUE && read32(base + DEVICE_ID) == ENTROPY) place = &acpi.virtio[i];
  }
  if (!place) {
    say("rng none");
    return;
  }
  device = place->base;
  say("rng device %x irq %u", device, U(place->irq));
  if (size > REQUEST_MAX) size = REQUEST_MAX;
  interrupt_count[VECTOR_VIRTIO] = 0;
  completions = 0;
  const char *error = read32(device + VERSION) == 2 ? start(place) : "not version 2";
  for (u32 number = 0; number < requests && !error; number++) error = request(number, size);
  ioapic_mask(place->irq);
  if (error) {
    write32(device + STATUS, FAILED);
    say("rng failed %s", error);
  } else {
    write32(device + STATUS, 0);
    say("rng ok");
  }
}

void virtio_list(void) {
  for (u32 i = 0; i < acpi.virtio_count; i++) {
    u64 base = acpi.virtio[i].base;
    say("virtio %x magic %x version %u device %u vendor %x", base, U(read32(base + MAGIC)), U(read32(base + VERSION)),
        U(read32(base + DEVICE_ID)), U(read32(base + VENDOR_ID)));
  }
}
