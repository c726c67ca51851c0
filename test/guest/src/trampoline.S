# Where a further processor starts: smp.c copies this page to TRAMPOLINE, below 1 MiB, and names it in the SIPI.
# Real mode, then 32-bit protected mode, then long mode on the first processor's page tables.

#define TRAMPOLINE 0x8000
#define AT(label) (TRAMPOLINE + (label) - trampoline)

        .section .rodata
        .balign 16
        .globl trampoline, trampoline_end
        .code16
trampoline:
        cli
        xor     %ax, %ax
        mov     %ax, %ds
        lgdtl   AT(pointer)
        mov     %cr0, %eax
        or      $1, %eax
        mov     %eax, %cr0
        ljmpl   $0x38, $AT(protected)           # CODE32
        .code32
protected:
        mov     $0x10, %eax
        mov     %eax, %ds
        mov     %eax, %ss
        mov     $0x20, %eax                     # CR4.PAE
        mov     %eax, %cr4
        mov     $pml4, %eax
        mov     %eax, %cr3
        mov     $0xc0000080, %ecx               # EFER.LME
        rdmsr
        or      $0x100, %eax
        wrmsr
        mov     %cr0, %eax
        and     $0x9fffffff, %eax               # caches on: INIT left them off
        or      $0x80000001, %eax
        mov     %eax, %cr0
        ljmp    $0x08, $ap_entry                # CODE64
        .balign 4
pointer:
        .word   0x3f                            # eight descriptors
        .long   gdt
trampoline_end:
        .section .note.GNU-stack, "", @progbits
