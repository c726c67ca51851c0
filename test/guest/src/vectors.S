# One stub for each interrupt vector: saves the registers, calls interrupt() in interrupts.c, restores them.

        .text
        .code64
        .balign 16
        .globl vector_stubs
vector_stubs:                                   # 16 bytes each; interrupts.c counts on it
        .set    vector, 0
        .rept   64
        .balign 16
        .if     (vector == 8) | ((vector >= 10) & (vector <= 14)) | (vector == 17) | (vector == 21)
        .else
        push    $0                              # in place of the error code
        .endif
        push    $vector
        jmp     common
        .set    vector, vector + 1
        .endr

common:
        push    %rax
        push    %rcx
        push    %rdx
        push    %rbx
        push    %rbp
        push    %rsi
        push    %rdi
        push    %r8
        push    %r9
        push    %r10
        push    %r11
        push    %r12
        push    %r13
        push    %r14
        push    %r15
        mov     %rsp, %rdi
        cld
        call    interrupt
        pop     %r15
        pop     %r14
        pop     %r13
        pop     %r12
        pop     %r11
        pop     %r10
        pop     %r9
        pop     %r8
        pop     %rdi
        pop     %rsi
        pop     %rbp
        pop     %rbx
        pop     %rdx
        pop     %rcx
        pop     %rax
        add     $16, %rsp
        iretq

        .section .note.GNU-stack, "", @progbits
