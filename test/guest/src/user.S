# user_enter(run, argument): runs a function at CPL 3 with IOPL 3 and interrupts off.
#
# It comes back by an undefined instruction, whose exception every KVM delivers: `int n` and `syscall` are not there on a
# KVM that emulates kernel mode.

#define USER_DATA 0x1b
#define USER_CODE 0x23
#define RFLAGS_IOPL3 0x3002

        .text
        .code64
        .globl user_enter
user_enter:
        push    %rbx
        push    %rbp
        push    %r12
        push    %r13
        push    %r14
        push    %r15
        mov     %rsp, kernel_stack
        mov     %rdi, %rax
        mov     %rsi, %rdi
        push    $USER_DATA
        push    $user_stack_top
        push    $RFLAGS_IOPL3
        push    $USER_CODE
        push    $user_start
        iretq
user_start:
        call    *%rax
        .globl user_done
user_done:
        ud2

# interrupts.c comes here when it was user_done that faulted, on the stack that the TSS names.
        .globl user_return
user_return:
        mov     $0x10, %eax
        mov     %eax, %ss
        mov     kernel_stack, %rsp
        pop     %r15
        pop     %r14
        pop     %r13
        pop     %r12
        pop     %rbp
        pop     %rbx
        ret

        .bss
        .balign 16
kernel_stack:
        .skip   16
        .section .stacks, "aw", @nobits
        .balign 16
        .skip   4096
user_stack_top:
        .section .note.GNU-stack, "", @progbits
