/* SPDX-License-Identifier: Apache-2.0 */
/* The switch for AArch64, AAPCS64. See switch.h for the contract.
 *
 * A parked stack, from its pointer upwards: x19 to x28, x29 (frame), x30 (return address), d8 to
 * d15 (the ABI keeps the low halves of v8 to v15): 160 bytes. Both stacks have this shape at the
 * moment of the switch, so the unwind information holds through it.
 *
 * The end is `br` and not `ret`, because the processor predicts a `ret` from its own stack of calls,
 * which belongs to the context we leave. */
        .text

        .macro  restore
        ldp     x19, x20, [sp, #0]
        ldp     x21, x22, [sp, #16]
        ldp     x23, x24, [sp, #32]
        ldp     x25, x26, [sp, #48]
        ldp     x27, x28, [sp, #64]
        ldp     x29, x30, [sp, #80]
        ldp     d8, d9, [sp, #96]
        ldp     d10, d11, [sp, #112]
        ldp     d12, d13, [sp, #128]
        ldp     d14, d15, [sp, #144]
        add     sp, sp, #160
        .endm

        .globl  co_switch
        .hidden co_switch
        .type   co_switch, %function
        .p2align 4
co_switch:
        .cfi_startproc
        sub     sp, sp, #160
        .cfi_adjust_cfa_offset 160
        stp     x19, x20, [sp, #0]
        stp     x21, x22, [sp, #16]
        stp     x23, x24, [sp, #32]
        stp     x25, x26, [sp, #48]
        stp     x27, x28, [sp, #64]
        stp     x29, x30, [sp, #80]
        stp     d8, d9, [sp, #96]
        stp     d10, d11, [sp, #112]
        stp     d12, d13, [sp, #128]
        stp     d14, d15, [sp, #144]
        .cfi_rel_offset x19, 0
        .cfi_rel_offset x20, 8
        .cfi_rel_offset x21, 16
        .cfi_rel_offset x22, 24
        .cfi_rel_offset x23, 32
        .cfi_rel_offset x24, 40
        .cfi_rel_offset x25, 48
        .cfi_rel_offset x26, 56
        .cfi_rel_offset x27, 64
        .cfi_rel_offset x28, 72
        .cfi_rel_offset x29, 80
        .cfi_rel_offset x30, 88

        mov     x9, sp
        str     x9, [x0]
        mov     sp, x1

        restore
        .cfi_adjust_cfa_offset -160
        .cfi_restore x19
        .cfi_restore x20
        .cfi_restore x21
        .cfi_restore x22
        .cfi_restore x23
        .cfi_restore x24
        .cfi_restore x25
        .cfi_restore x26
        .cfi_restore x27
        .cfi_restore x28
        .cfi_restore x29
        .cfi_restore x30
        br      x30
        .cfi_endproc
        .size   co_switch, . - co_switch

/* Where a new context begins, with arg in x19 and run in x20. Jumped to, so the top of the
 * processor's stack of calls is still the call of co_switch() that came here: when run() returns
 * without any switch in between, `ret` is right. x29 is 0: the end of the chain of frames. */
        .type   begin, %function
        .p2align 4
begin:
        .cfi_startproc
        .cfi_undefined x30
        mov     x0, x19
        blr     x20
        mov     sp, x0
        restore
        ret
        .cfi_endproc
        .size   begin, . - begin

/* void *co_switch_prepare(low, top, run, arg): the picture above, x19 = arg, x20 = run, x30 = begin,
 * the others zero. */
        .globl  co_switch_prepare
        .hidden co_switch_prepare
        .type   co_switch_prepare, %function
        .p2align 4
co_switch_prepare:
        .cfi_startproc
        sub     x0, x1, #160
        adr     x9, begin
        stp     x3, x2, [x0, #0]
        stp     xzr, xzr, [x0, #16]
        stp     xzr, xzr, [x0, #32]
        stp     xzr, xzr, [x0, #48]
        stp     xzr, xzr, [x0, #64]
        stp     xzr, x9, [x0, #80]
        stp     xzr, xzr, [x0, #96]
        stp     xzr, xzr, [x0, #112]
        stp     xzr, xzr, [x0, #128]
        stp     xzr, xzr, [x0, #144]
        ret
        .cfi_endproc
        .size   co_switch_prepare, . - co_switch_prepare

        .section .rodata
        .globl  co_switch_name
        .hidden co_switch_name
        .type   co_switch_name, %object
co_switch_name:
        .string "aarch64"
        .size   co_switch_name, . - co_switch_name

        .section .note.GNU-stack, "", %progbits
