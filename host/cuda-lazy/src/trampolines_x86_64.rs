//! Driver functions for x86-64: `lea r11, slot; jmp [r11]`.
//!
//! System V leaves `r11` to linkage code like this. `resolve` keeps what a call may carry in registers: the six
//! integer arguments, `rax` (vector count of a variadic call) and `xmm0` to `xmm7`.

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
            $(concat!(".Ltokenselect_slot_", stringify!($name), ": .quad .Ltokenselect_resolve"),)*
            ".size tokenselect_cuda_lazy_slots, . - tokenselect_cuda_lazy_slots",
            ".popsection",

            ".pushsection .text.tokenselect_cuda_lazy,\"ax\",@progbits",
            ".balign 16",
            ".Ltokenselect_resolve:",
            ".cfi_startproc",
            "push rbp",
            ".cfi_def_cfa_offset 16",
            ".cfi_offset rbp, -16",
            "mov rbp, rsp",
            ".cfi_def_cfa_register rbp",
            "push r11",
            "push rax",
            "push rdi",
            "push rsi",
            "push rdx",
            "push rcx",
            "push r8",
            "push r9",
            // Return address, rbp and eight registers: the stack is aligned to 16 here.
            "sub rsp, 128",
            "movaps [rsp], xmm0",
            "movaps [rsp + 16], xmm1",
            "movaps [rsp + 32], xmm2",
            "movaps [rsp + 48], xmm3",
            "movaps [rsp + 64], xmm4",
            "movaps [rsp + 80], xmm5",
            "movaps [rsp + 96], xmm6",
            "movaps [rsp + 112], xmm7",
            "call {resolve}",
            "movaps xmm0, [rsp]",
            "movaps xmm1, [rsp + 16]",
            "movaps xmm2, [rsp + 32]",
            "movaps xmm3, [rsp + 48]",
            "movaps xmm4, [rsp + 64]",
            "movaps xmm5, [rsp + 80]",
            "movaps xmm6, [rsp + 96]",
            "movaps xmm7, [rsp + 112]",
            "add rsp, 128",
            "pop r9",
            "pop r8",
            "pop rcx",
            "pop rdx",
            "pop rsi",
            "pop rdi",
            "pop rax",
            "pop r11",
            "pop rbp",
            ".cfi_def_cfa rsp, 8",
            "jmp qword ptr [r11]",
            ".cfi_endproc",
            $(concat!(
                ".globl ", stringify!($name), "\n",
                ".hidden ", stringify!($name), "\n",
                ".type ", stringify!($name), ",@function\n",
                stringify!($name), ":\n",
                "lea r11, [rip + .Ltokenselect_slot_", stringify!($name), "]\n",
                "jmp qword ptr [r11]\n",
                ".size ", stringify!($name), ", . - ", stringify!($name),
            ),)*
            ".popsection",
            resolve = sym resolve,
        );
    };
}

for_each_symbol!(trampolines);
