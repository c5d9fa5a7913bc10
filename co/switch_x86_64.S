/* SPDX-License-Identifier: Apache-2.0 */
/* The switch for x86-64, System V ABI. See switch.h for the contract.
 *
 * A parked stack, from its pointer upwards: r15 r14 r13 r12 rbx rbp, return address. Both stacks
 * have this shape at the moment of the switch, so the unwind information holds through it.
 *
 * The end is `pop; jmp` and not `ret`: the processor predicts a `ret` from its own stack of calls,
 * which belongs to the context we leave, and would be wrong each time (2.3 ns against 11.6 ns). */
        .text

        .globl  co_switch
        .hidden co_switch
        .type   co_switch, @function
        .p2align 4
co_switch:
        .cfi_startproc
        pushq   %rbp
        .cfi_adjust_cfa_offset 8
        .cfi_rel_offset rbp, 0
        pushq   %rbx
        .cfi_adjust_cfa_offset 8
        .cfi_rel_offset rbx, 0
        pushq   %r12
        .cfi_adjust_cfa_offset 8
        .cfi_rel_offset r12, 0
        pushq   %r13
        .cfi_adjust_cfa_offset 8
        .cfi_rel_offset r13, 0
        pushq   %r14
        .cfi_adjust_cfa_offset 8
        .cfi_rel_offset r14, 0
        pushq   %r15
        .cfi_adjust_cfa_offset 8
        .cfi_rel_offset r15, 0

        movq    %rsp, (%rdi)
        movq    %rsi, %rsp

        popq    %r15
        .cfi_adjust_cfa_offset -8
        .cfi_restore r15
        popq    %r14
        .cfi_adjust_cfa_offset -8
        .cfi_restore r14
        popq    %r13
        .cfi_adjust_cfa_offset -8
        .cfi_restore r13
        popq    %r12
        .cfi_adjust_cfa_offset -8
        .cfi_restore r12
        popq    %rbx
        .cfi_adjust_cfa_offset -8
        .cfi_restore rbx
        popq    %rbp
        .cfi_adjust_cfa_offset -8
        .cfi_restore rbp
        popq    %rcx
        .cfi_adjust_cfa_offset -8
        .cfi_register rip, rcx
        jmpq    *%rcx
        .cfi_endproc
        .size   co_switch, . - co_switch

/* Where a new context begins, with arg in rbx and run in r12. Jumped to, so the top of the
 * processor's stack of calls is still the call of co_switch() that came here: when run() returns
 * without any switch in between, `ret` is right. */
        .type   begin, @function
        .p2align 4
begin:
        .cfi_startproc
        .cfi_undefined rip
        movq    %rbx, %rdi
        callq   *%r12
        movq    %rax, %rsp
        popq    %r15
        popq    %r14
        popq    %r13
        popq    %r12
        popq    %rbx
        popq    %rbp
        ret
        .cfi_endproc
        .size   begin, . - begin

/* void *co_switch_prepare(low, top, run, arg): the picture above, rbx = arg, r12 = run, the others
 * zero, begin as the return address. Above it a word that gives begin's call its alignment. */
        .globl  co_switch_prepare
        .hidden co_switch_prepare
        .type   co_switch_prepare, @function
        .p2align 4
co_switch_prepare:
        .cfi_startproc
        xorl    %r8d, %r8d
        leaq    begin(%rip), %r9
        leaq    -72(%rsi), %rax
        movq    %r8, (%rax)
        movq    %r8, 8(%rax)
        movq    %r8, 16(%rax)
        movq    %rdx, 24(%rax)
        movq    %rcx, 32(%rax)
        movq    %r8, 40(%rax)
        movq    %r9, 48(%rax)
        ret
        .cfi_endproc
        .size   co_switch_prepare, . - co_switch_prepare

        .section .rodata
        .globl  co_switch_name
        .hidden co_switch_name
        .type   co_switch_name, @object
co_switch_name:
        .string "x86_64"
        .size   co_switch_name, . - co_switch_name

        .section .note.GNU-stack, "", @progbits
