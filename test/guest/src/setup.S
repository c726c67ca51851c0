# The front of troupe-guest.bzimage: two sectors with the Linux setup header (Documentation/arch/x86/boot, protocol 2.15).
# SYSSIZE, INIT_SIZE come from build.sh. What follows these 1024 bytes is the image as linked at PREF_ADDRESS.

#define PREF_ADDRESS 0x200000

        .code16
        .section .text
real_mode:                                      # a BIOS boot loader jumps here; not supported
1:      cli
        hlt
        jmp     1b
        .org    0x1f1
        .byte   1                               # setup_sects: one more sector after this first one
        .word   0                               # root_flags
        .long   SYSSIZE                         # in units of 16 bytes
        .word   0                               # ram_size
        .word   0xffff                          # vid_mode: normal
        .word   0                               # root_dev
        .word   0xaa55                          # boot_flag
        .byte   0xeb, header_end - 1f           # jump: its second byte also tells where the header ends
1:      .ascii  "HdrS"
        .word   0x020f                          # version 2.15
        .long   0                               # realmode_swtch
        .word   0                               # start_sys_seg
        .word   version - real_mode - 0x200     # kernel_version
        .byte   0                               # type_of_loader
        .byte   0x01                            # loadflags: LOADED_HIGH
        .word   0                               # setup_move_size
        .long   0x100000                        # code32_start
        .long   0                               # ramdisk_image
        .long   0                               # ramdisk_size
        .long   0                               # bootsect_kludge
        .word   0                               # heap_end_ptr
        .byte   0, 0                            # ext_loader_ver, ext_loader_type
        .long   0                               # cmd_line_ptr
        .long   0x7fffffff                      # initrd_addr_max
        .long   0x200000                        # kernel_alignment
        .byte   1                               # relocatable_kernel
        .byte   21                              # min_alignment: 2 MiB
        .word   0x0003                          # xloadflags: XLF_KERNEL_64, XLF_CAN_BE_LOADED_ABOVE_4G
        .long   4095                            # cmdline_size, without the zero at its end
        .long   0                               # hardware_subarch
        .quad   0                               # hardware_subarch_data
        .long   0                               # payload_offset: no compressed payload
        .long   0                               # payload_length
        .quad   0                               # setup_data
        .quad   PREF_ADDRESS                    # pref_address
        .long   INIT_SIZE                       # init_size
        .long   0                               # handover_offset
        .long   0                               # kernel_info_offset
header_end:
        jmp     real_mode
version:
        .asciz  "troupe-guest"
        .org    0x400
