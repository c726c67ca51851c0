/* Virtio over PCI with MSI-X (virtio 1.3, section 4.1): functions of bus 0, in the configuration pages that the MCFG names. */
#include "virtio.h"

#define VENDOR_VIRTIO 0x1af4
#define DEVICE_BASE 0x1040
#define NONE 0xffff

#define DEVICES 32
#define FUNCTIONS 8
#define MULTI_FUNCTION 0x80

/* Configuration space. */
#define COMMAND 0x04
#define COMMAND_MEMORY_AND_MASTER 6
#define PCI_STATUS 0x06
#define STATUS_CAPABILITIES 0x10
#define HEADER_TYPE 0x0e
#define BAR0 0x10
#define BAR_64 4
#define CAPABILITIES 0x34
#define CAPABILITIES_MAX 48
#define CAP_VENDOR 0x09
#define CAP_MSIX 0x11

/* Kinds of vendor capabilities. */
#define COMMON_CFG 1
#define NOTIFY_CFG 2
#define DEVICE_CFG 4

#define MSIX_ENABLE 0x8000
#define MSIX_ENTRY 16
#define MESSAGE_ADDRESS 0xfee00000u
#define ENTRY_CONFIG 0
#define ENTRY_QUEUES 1

/* The common configuration. */
#define FEATURE_SELECT 0x00
#define FEATURE 0x04
#define DRIVER_FEATURE_SELECT 0x08
#define DRIVER_FEATURE 0x0c
#define CONFIG_MSIX_VECTOR 0x10
#define DEVICE_STATUS 0x14
#define GENERATION 0x15
#define QUEUE_SELECT 0x16
#define QUEUE_SIZE 0x18
#define QUEUE_MSIX_VECTOR 0x1a
#define QUEUE_ENABLE 0x1c
#define QUEUE_NOTIFY_OFF 0x1e
#define QUEUE_DESC 0x20
#define QUEUE_DRIVER 0x28
#define QUEUE_DEVICE 0x30

static u32 status(const struct virtio *device) { return read8(device->common + DEVICE_STATUS); }
static void set_status(const struct virtio *device, u32 status) { write8(device->common + DEVICE_STATUS, (u8)status); }
static u32 generation(const struct virtio *device) { return read8(device->common + GENERATION); }

static u64 offered(const struct virtio *device) {
  write32(device->common + FEATURE_SELECT, 0);
  u64 features = read32(device->common + FEATURE);
  write32(device->common + FEATURE_SELECT, 1);
  return features | U(read32(device->common + FEATURE)) << 32;
}

static void accept(const struct virtio *device, u32 word, u32 bits) {
  write32(device->common + DRIVER_FEATURE_SELECT, word);
  write32(device->common + DRIVER_FEATURE, bits);
}

static void select_queue(const struct virtio *device, u32 queue) { write16(device->common + QUEUE_SELECT, (u16)queue); }

static u32 queue_max(const struct virtio *device, u32 queue) {
  select_queue(device, queue);
  return read16(device->common + QUEUE_SIZE);
}

static bool queue_ready(const struct virtio *device, u32 queue) {
  select_queue(device, queue);
  return read16(device->common + QUEUE_ENABLE) & 1;
}

/* There is no such thing: only a reset stops a queue. It is tried all the same. */
static void queue_stop(const struct virtio *device, u32 queue) {
  select_queue(device, queue);
  write16(device->common + QUEUE_ENABLE, 0);
}

static void set_address(const struct virtio *device, u32 reg, u64 address) {
  write32(device->common + reg, (u32)address);
  write32(device->common + reg + 4, (u32)(address >> 32));
}

static bool queue_set(const struct virtio *device, u32 queue, u32 size, u64 desc, u64 avail, u64 used) {
  select_queue(device, queue);
  write16(device->common + QUEUE_SIZE, (u16)size);
  set_address(device, QUEUE_DESC, desc);
  set_address(device, QUEUE_DRIVER, avail);
  set_address(device, QUEUE_DEVICE, used);
  write16(device->common + QUEUE_MSIX_VECTOR, ENTRY_QUEUES);
  if (read16(device->common + QUEUE_MSIX_VECTOR) != ENTRY_QUEUES) return false;
  write16(device->common + QUEUE_ENABLE, 1);
  return read16(device->common + QUEUE_ENABLE) & 1;
}

/* Where the doorbell of each queue is: the register would need the queue selected. */
static void kick(const struct virtio *device, u32 queue) {
  write16(device->notify + U(device->notify_offset[queue]) * device->notify_multiplier, (u16)queue);
}

static void set_entry(const struct virtio *device, u32 entry, u32 vector) {
  u64 at = device->msix + entry * MSIX_ENTRY;
  write32(at, MESSAGE_ADDRESS | lapic_id() << 12);
  write32(at + 4, 0);
  write32(at + 8, vector);
  write32(at + 12, vector ? 0 : 1);
}

static bool connect(struct virtio *device) {
  set_entry(device, ENTRY_CONFIG, device->config_vector);
  set_entry(device, ENTRY_QUEUES, device->vector);
  write16(device->base + device->msix_control, MSIX_ENABLE);
  write16(device->common + CONFIG_MSIX_VECTOR, ENTRY_CONFIG);
  for (u32 queue = 0; queue < VIRTIO_QUEUES; queue++) {
    select_queue(device, queue);
    device->notify_offset[queue] = read16(device->common + QUEUE_NOTIFY_OFF);
  }
  return read16(device->common + CONFIG_MSIX_VECTOR) == ENTRY_CONFIG;
}

static void disconnect(const struct virtio *device) {
  write32(device->msix + ENTRY_CONFIG * MSIX_ENTRY + 12, 1);
  write32(device->msix + ENTRY_QUEUES * MSIX_ENTRY + 12, 1);
}

/* A message tells by its vector. There is nothing to acknowledge. */
static u32 cause(const struct virtio *device, u32 vector) { return vector == device->config_vector ? 2 : 1; }

const struct virtio_transport virtio_pci = {status,     set_status, offered, accept,     queue_max, queue_ready, queue_set,
                                            queue_stop, kick,       generation, connect, disconnect, cause};

static u64 bar(u64 function, u32 index) {
  u32 low = read32(function + BAR0 + 4 * index);
  u64 high = low & BAR_64 ? read32(function + BAR0 + 4 * index + 4) : 0;
  return high << 32 | (low & ~15u);
}

/* Takes the places of the function's parts from its capabilities. False: some are missing. */
static bool read_capabilities(struct virtio *device, u64 function) {
  if (!(read16(function + PCI_STATUS) & STATUS_CAPABILITIES)) return false;
  u32 at = read8(function + CAPABILITIES);
  for (u32 left = CAPABILITIES_MAX; at && left; left--, at = read8(function + at + 1)) {
    u64 cap = function + at;
    if (read8(cap) == CAP_MSIX) {
      u32 table = read32(cap + 4);
      device->msix = bar(function, table & 7) + (table & ~7u);
      device->msix_control = at + 2;
    }
    if (read8(cap) != CAP_VENDOR) continue;
    u64 place = bar(function, read8(cap + 4)) + read32(cap + 8);
    switch (read8(cap + 3)) {
      case COMMON_CFG:
        device->common = place;
        break;
      case NOTIFY_CFG:
        device->notify = place;
        device->notify_multiplier = read32(cap + 16);
        break;
      case DEVICE_CFG:
        device->config = place;
        break;
    }
  }
  return device->common && device->notify && device->msix;
}

/* Calls `visit` with each virtio function of bus 0, until it says that it is content. */
static bool each_function(bool (*visit)(u64 function, void *argument), void *argument) {
  if (!acpi.ecam) return false;
  for (u32 number = 0; number < DEVICES * FUNCTIONS; number++) {
    u64 function = acpi.ecam + number * PAGE;
    u32 vendor = read16(function);
    if (vendor == VENDOR_VIRTIO && read16(function + 2) >= DEVICE_BASE && visit(function, argument)) return true;
    if (number % FUNCTIONS == 0 && (vendor == NONE || !(read8(function + HEADER_TYPE) & MULTI_FUNCTION)))
      number += FUNCTIONS - 1;
  }
  return false;
}

struct wanted {
  struct virtio *device;
  u32 id, *nth;
};

static bool is_wanted(u64 function, void *argument) {
  struct wanted *wanted = argument;
  if (read16(function + 2) != DEVICE_BASE + wanted->id) return false;
  if ((*wanted->nth)--) return false;
  wanted->device->transport = &virtio_pci;
  wanted->device->base = function;
  write16(function + COMMAND, COMMAND_MEMORY_AND_MASTER);
  return read_capabilities(wanted->device, function);
}

bool virtio_pci_find(struct virtio *device, u32 id, u32 *nth) {
  return each_function(is_wanted, &(struct wanted){device, id, nth});
}

static bool list(u64 function, void *argument) {
  (void)argument;
  say("virtio %x pci vendor %x device %u", function, U(read16(function)), U(read16(function + 2)) - DEVICE_BASE);
  return false;
}

void virtio_pci_list(void) { each_function(list, NULL); }
