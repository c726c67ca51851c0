/* Boot information of both kinds (PVH's hvm_start_info, Linux's boot_params), brought to one form. */
#include "guest.h"

struct boot boot;

/* ---- PVH: include/xen/interface/hvm/start_info.h */

#define START_MAGIC 0x336ec578
struct start_info {
  u32 magic, version, flags, module_count;
  u64 modules, cmdline, rsdp;
  /* from version 1 */
  u64 memmap;
  u32 memmap_count, reserved;
};
struct start_module {
  u64 base, size, cmdline, reserved;
};
struct start_range {
  u64 base, size;
  u32 type, reserved;
};

/* ---- boot_params: offsets, Documentation/arch/x86/zero-page */

#define BP_RSDP 0x070
#define BP_EXT_RAMDISK_IMAGE 0x0c0
#define BP_EXT_RAMDISK_SIZE 0x0c4
#define BP_EXT_CMDLINE 0x0c8
#define BP_E820_COUNT 0x1e8
#define BP_RAMDISK_IMAGE 0x218
#define BP_RAMDISK_SIZE 0x21c
#define BP_CMDLINE 0x228
#define BP_E820 0x2d0
struct __attribute__((packed)) e820 {
  u64 base, size;
  u32 type;
};

static void copy_cmdline(u64 at) {
  if (!at) return;
  const char *from = (const char *)at;
  u32 length = 0;
  while (length < sizeof boot.cmdline - 1 && from[length]) {
    boot.cmdline[length] = from[length];
    length++;
  }
}

static void add_range(u64 base, u64 size, u32 type) {
  if (size && boot.range_count < MAX_RANGES) boot.ranges[boot.range_count++] = (struct range){base, size, type};
}

static void read_pvh(void) {
  const struct start_info *info = (const void *)entry_info;
  boot.entry = "pvh";
  if (info->magic != START_MAGIC) {
    say("start_info %x has magic %x, not %x", entry_info, U(info->magic), U(START_MAGIC));
    return;
  }
  copy_cmdline(info->cmdline);
  boot.rsdp = info->rsdp;
  boot.rsdp_from = "start_info";
  if (info->module_count) {
    const struct start_module *module = (const void *)info->modules;
    boot.initrd = module->base;
    boot.initrd_size = module->size;
  }
  if (info->version >= 1) {
    const struct start_range *ranges = (const void *)info->memmap;
    for (u32 i = 0; i < info->memmap_count; i++) add_range(ranges[i].base, ranges[i].size, ranges[i].type);
  }
}

static void read_linux64(void) {
  u64 zero_page = entry_info;
  boot.entry = "linux64";
  copy_cmdline(read32(zero_page + BP_CMDLINE) | (U(read32(zero_page + BP_EXT_CMDLINE)) << 32));
  boot.rsdp = read64(zero_page + BP_RSDP);
  boot.rsdp_from = "boot_params";
  boot.initrd = read32(zero_page + BP_RAMDISK_IMAGE) | (U(read32(zero_page + BP_EXT_RAMDISK_IMAGE)) << 32);
  boot.initrd_size = read32(zero_page + BP_RAMDISK_SIZE) | (U(read32(zero_page + BP_EXT_RAMDISK_SIZE)) << 32);
  const struct e820 *ranges = (const void *)(zero_page + BP_E820);
  u32 count = read8(zero_page + BP_E820_COUNT);
  for (u32 i = 0; i < count; i++) add_range(ranges[i].base, ranges[i].size, ranges[i].type);
}

void boot_read(void) {
  if (entry_kind == ENTRY_PVH)
    read_pvh();
  else
    read_linux64();
}

void boot_report(void) {
  static const char names[][12] = {"ram", "reserved", "acpi", "nvs", "unusable"};
  say("entry %s", boot.entry);
  say("cmdline %s", boot.cmdline);
  u64 total = 0;
  u32 count = 0;
  for (u32 i = 0; i < boot.range_count; i++)
    if (boot.ranges[i].type == RANGE_RAM) total += boot.ranges[i].size, count++;
  say("memory %u MiB in %u ranges", (total + (1 << 19)) >> 20, U(count));
  for (u32 i = 0; i < boot.range_count; i++) {
    const struct range *range = &boot.ranges[i];
    u64 last = range->base + range->size - 1;
    if (range->type >= 1 && range->type <= 5)
      say("range %p-%p %s", range->base, last, names[range->type - 1]);
    else
      say("range %p-%p type-%u", range->base, last, U(range->type));
  }
  if (boot.initrd_size) say("initrd %x %u bytes", boot.initrd, boot.initrd_size);
}

void initrd_sum(void) {
  if (!boot.initrd_size) {
    say("initrd none");
    return;
  }
  u32 sum = 0;
  const u8 *bytes = (const u8 *)boot.initrd;
  for (u64 i = 0; i < boot.initrd_size; i++) sum += bytes[i];
  say("initrd sum %x", U(sum));
}
