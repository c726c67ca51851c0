# The guest's entries (64-bit Linux boot protocol, PVH), its page tables, descriptors and stacks.

#define CODE64 0x08
#define DATA 0x10
#define USER_DATA 0x18
#define USER_CODE 0x20
#define TSS_SELECTOR 0x28
#define CODE32 0x38

# Present, writable, usable at CPL 3: that code of this same image measures there.
#define TABLE 0x07
#define PAGE_2M 0x87

# The same text in 32-bit and 64-bit mode: zeroes .bss (a bzImage's loader does not), and completes the page tables.
        .macro  clear_and_map
        mov     $bss_start, %edi
        mov     $bss_dwords, %ecx
        xor     %eax, %eax
        rep stosl
        movl    $pdpt + TABLE, pml4
        movl    $pd0 + TABLE, pdpt
        movl    $pd1 + TABLE, pdpt + 8
        movl    $pd2 + TABLE, pdpt + 16
        movl    $pd3 + TABLE, pdpt + 24
        movl    $window_pd + TABLE, pdpt + 32
        .endm

        .section .head, "ax"

# ---- offset 0 of the image: where a 32-bit boot loader enters a bzImage. Not supported.
        .code32
        .globl image_start
image_start:
        mov     $0xee, %al
        out     %al, $0x80
1:      cli
        hlt
        jmp     1b

# ---- offset 0x200: the 64-bit entry. RSI = boot_params; the loader's page tables and descriptors are in force.
        .org    0x200
        .code64
        .globl linux64_entry
linux64_entry:
        mov     $1, %al
        out     %al, $0x80
        cli
        cld
        lea     image_start(%rip), %rax
        mov     $image_start, %edi
        cmp     %rdi, %rax
        je      1f
        # A bzImage that was loaded elsewhere: go to where it was linked. Its load address is a multiple of 2 MiB (the
        # header's kernel_alignment) or 1 MiB, so the two places cannot overlap: the image is far smaller.
        mov     %rsi, %rdx
        mov     %rax, %rsi
        mov     $image_qwords, %ecx
        rep movsq
        mov     %rdx, %rsi
1:      mov     $in_place, %eax
        jmp     *%rax
in_place:
        mov     %rsi, %rbx
        clear_and_map
        mov     $pml4, %eax
        mov     %rax, %cr3
        mov     $0x20, %eax                     # PAE alone: no SMEP, SMAP or whatever the loader left
        mov     %rax, %cr4
        mov     $2, %ebp                        # ENTRY_LINUX64
        lgdt    gdt_pointer
        mov     $stack_top, %esp
        push    $CODE64
        push    $long_mode
        lretq

# ---- PVH: 32-bit protected mode without paging, EBX = hvm_start_info.
        .text
        .code32
        .globl pvh_entry
pvh_entry:
        mov     $1, %al
        out     %al, $0x80
        cli
        cld
        mov     $stack_top, %esp
        mov     $1, %ebp                        # ENTRY_PVH
        clear_and_map
        lgdt    gdt_pointer
        mov     $0x20, %eax                     # CR4.PAE
        mov     %eax, %cr4
        mov     $pml4, %eax
        mov     %eax, %cr3
        mov     $0xc0000080, %ecx               # EFER.LME
        rdmsr
        or      $0x100, %eax
        wrmsr
        mov     %cr0, %eax
        or      $0x80000001, %eax
        mov     %eax, %cr0
        ljmp    $CODE64, $long_mode

# ---- both, in 64-bit mode at the linked address: EBP = kind of entry, RBX = its boot information.
        .code64
long_mode:
        mov     $DATA, %eax
        mov     %eax, %ds
        mov     %eax, %es
        mov     %eax, %ss
        xor     %eax, %eax
        mov     %eax, %fs
        mov     %eax, %gs
        mov     $stack_top, %esp
        cmp     $1, %ebp
        jne     1f
        mov     %ebx, %ebx                      # PVH gives 32 bits; above them is anything
1:      mov     %ebp, entry_kind
        mov     %rbx, entry_info
        call    main
        .globl halt_forever
halt_forever:
        cli
        hlt
        jmp     halt_forever

# ---- further processors come here from trampoline.S, in 64-bit mode, with paging on.
        .globl ap_entry
ap_entry:
        mov     $DATA, %eax
        mov     %eax, %ds
        mov     %eax, %es
        mov     %eax, %ss
        lgdt    gdt_pointer
        mov     ap_stack, %rsp
        mov     ap_index, %edi
        call    ap_main
        jmp     halt_forever

# ---- descriptors
        .data
        .balign 16
        .globl gdt
gdt:    .quad   0
        .quad   0x00af9b000000ffff              # CODE64
        .quad   0x00cf93000000ffff              # DATA
        .quad   0x00cff3000000ffff              # USER_DATA
        .quad   0x00affb000000ffff              # USER_CODE
        .quad   0, 0                            # TSS_SELECTOR, filled in by interrupts.c
        .quad   0x00cf9b000000ffff              # CODE32, for trampoline.S
gdt_end:
        .globl gdt_pointer
gdt_pointer:
        .word   gdt_end - gdt - 1
        .quad   gdt

        .globl entry_kind, entry_info, ap_stack, ap_index
        .balign 8
entry_info:     .quad 0
ap_stack:       .quad 0
entry_kind:     .long 0
ap_index:       .long 0

# ---- page tables: the first 4 GiB by pages of 2 MiB, ready in the file because an emulated processor takes
# milliseconds to write them; the two levels above them are filled in by the entries. `window_pd` is for memory.c, at 4 GiB.
        .section .pages, "aw"
        .balign 4096
        .set    at, 0
        .irp    gib, 0, 1, 2, 3
pd\gib:
        .rept   512
        .quad   at + PAGE_2M
        .set    at, at + 0x200000
        .endr
        .endr

        .bss
        .balign 4096
        .globl pml4, window_pd
pml4:   .skip   4096
pdpt:   .skip   4096
window_pd:
        .skip   4096

# Not cleared at start, so that it costs nothing.
        .section .stacks, "aw", @nobits
        .balign 16
        .skip   16384
        .globl stack_top
stack_top:

# ---- the PVH note: where the 32-bit entry is.
        .section .note.pvh, "a", @note
        .balign 4
        .long   4                               # size of the name
        .long   4                               # size of the value
        .long   18                              # XEN_ELFNOTE_PHYS32_ENTRY
        .asciz  "Xen"
        .long   pvh_entry

        .section .note.GNU-stack, "", @progbits
