//! Driver functions for AArch64: load the slot through `x16`, branch through `x17`.
//!
//! The procedure call standard leaves `x16` and `x17` to linkage code like this. `resolve` keeps what a call may carry
//! in registers: `x0` to `x8` and `q0` to `q7`.

use std::arch::global_asm;

use crate::driver::resolve;

macro_rules! trampolines {
    ($($name:ident)*) => {
        global_asm!(
            ".pushsection .data.tokenselect_cuda_lazy,\"aw\",@progbits",
            ".balign 8",
            ".globl tokenselect_cuda_lazy_slots",
            ".hidden tokenselect_cuda_lazy_slots",
            ".type tokenselect_cuda_lazy_slots,@object",
            "tokenselect_cuda_lazy_slots:",
            $(concat!(".Ltokenselect_slot_", stringify!($name), ": .xword .Ltokenselect_resolve"),)*
            ".size tokenselect_cuda_lazy_slots, . - tokenselect_cuda_lazy_slots",
            ".popsection",

            ".pushsection .text.tokenselect_cuda_lazy,\"ax\",@progbits",
            ".balign 16",
            ".Ltokenselect_resolve:",
            ".cfi_startproc",
            "stp x29, x30, [sp, #-16]!",
            ".cfi_def_cfa_offset 16",
            ".cfi_offset x29, -16",
            ".cfi_offset x30, -8",
            "mov x29, sp",
            ".cfi_def_cfa x29, 16",
            "stp x0, x1, [sp, #-16]!",
            "stp x2, x3, [sp, #-16]!",
            "stp x4, x5, [sp, #-16]!",
            "stp x6, x7, [sp, #-16]!",
            "stp x8, x16, [sp, #-16]!",
            "stp q0, q1, [sp, #-32]!",
            "stp q2, q3, [sp, #-32]!",
            "stp q4, q5, [sp, #-32]!",
            "stp q6, q7, [sp, #-32]!",
            "bl {resolve}",
            "ldp q6, q7, [sp], #32",
            "ldp q4, q5, [sp], #32",
            "ldp q2, q3, [sp], #32",
            "ldp q0, q1, [sp], #32",
            "ldp x8, x16, [sp], #16",
            "ldp x6, x7, [sp], #16",
            "ldp x4, x5, [sp], #16",
            "ldp x2, x3, [sp], #16",
            "ldp x0, x1, [sp], #16",
            "ldp x29, x30, [sp], #16",
            ".cfi_def_cfa sp, 0",
            "ldr x17, [x16]",
            "br x17",
            ".cfi_endproc",
            $(concat!(
                ".globl ", stringify!($name), "\n",
                ".hidden ", stringify!($name), "\n",
                ".type ", stringify!($name), ",@function\n",
                stringify!($name), ":\n",
                "adrp x16, .Ltokenselect_slot_", stringify!($name), "\n",
                "add x16, x16, :lo12:.Ltokenselect_slot_", stringify!($name), "\n",
                "ldr x17, [x16]\n",
                "br x17\n",
                ".size ", stringify!($name), ", . - ", stringify!($name),
            ),)*
            ".popsection",
            resolve = sym resolve,
        );
    };
}

for_each_symbol!(trampolines);
