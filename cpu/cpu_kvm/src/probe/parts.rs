//! The parts of the probe: what a kernel does and a KVM without virtualization fails at, a few instructions each.
//!
//! Machine code, because there is no assembler here; the comments say what it is. Every part ends with OUT to port 0x80
//! (`E6 80`) and leaves its results at [`RESULTS`].

use guest_memory::GuestRam;
use hypervisor::VcpuState;
use x86_defs::control::*;
use x86_defs::{DescriptorTable, Segment, SegmentAttributes, msr};

/// RAM of the probe, from address 0.
pub const RAM_BYTES: u64 = 0x10000;
/// Where a part begins.
const CODE: u64 = 0x1000;
/// Where it leaves its results.
pub const RESULTS: u64 = 0x2000;
const PML4: u64 = 0x3000;
const PDPT: u64 = 0x4000;
const PD: u64 = 0x5000;
const GDT: u64 = 0x6000;
const IDT: u64 = 0x7000;
const TSS: u64 = 0x8000;
const STACK: u64 = 0xA000;
const PD32: u64 = 0xB000;
const PT32: u64 = 0xC000;
/// Linear address of the results under 32-bit paging.
const ALIAS: u64 = 0xF000;
/// Instructions in the loop.
pub const LOOP: u64 = 20_000;

/// The processor's mode when a part begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Real mode.
    Real,
    /// Protected mode with 32-bit paging.
    Paged32,
    /// Long mode, ring 0.
    Long,
}

/// One part.
#[derive(Clone, Copy)]
pub struct Part {
    /// For people.
    pub name: &'static str,
    /// How it begins.
    pub mode: Mode,
    /// Code by its offset from [`CODE`].
    pub code: &'static [(u64, &'static [u8])],
    /// Results by their offset from [`RESULTS`].
    pub results: &'static [(u64, u32)],
}

/// In real mode: CPUID leaves 7 and 1 into memory (compared with the model elsewhere), and a loop of [`LOOP`].
pub const FIRST: Part = Part {
    name: "a loop in real mode",
    mode: Mode::Real,
    code: &[(
        0,
        &[
            0x66, 0xB8, 7, 0, 0, 0, 0x66, 0x31, 0xC9, 0x0F, 0xA2, // mov eax,7; xor ecx,ecx; cpuid
            0x66, 0x89, 0x1E, 0x00, 0x20, 0x66, 0x89, 0x0E, 0x04,
            0x20, // mov [2000],ebx; mov [2004],ecx
            0x66, 0x89, 0x16, 0x08, 0x20, // mov [2008],edx
            0x66, 0xB8, 1, 0, 0, 0, 0x66, 0x31, 0xC9, 0x0F, 0xA2, // mov eax,1; xor ecx,ecx; cpuid
            0x66, 0x89, 0x0E, 0x0C, 0x20, 0x66, 0x89, 0x16, 0x10,
            0x20, // mov [200C],ecx; mov [2010],edx
            0xB9, 0x10, 0x27, 0x49, 0x75, 0xFD, 0xE6, 0x80, // mov cx,10000; dec cx; jnz; out
        ],
    )],
    results: &[],
};

/// What comes after it.
pub const PARTS: &[Part] = &[
    Part {
        name: "32-bit paging",
        mode: Mode::Paged32,
        code: &[(
            0,
            &[
                0x0F, 0x20, 0xD8, 0x0F, 0x22, 0xD8, // mov eax,cr3; mov cr3,eax
                0xC7, 0x05, 0x00, 0xF0, 0, 0, 0xFE, 0xCA, 0, 0, // mov dword [F000],CAFE
                0xE6, 0x80,
            ],
        )],
        results: &[(0, 0xCAFE)],
    },
    Part {
        name: "SSE in ring 0",
        mode: Mode::Long,
        code: &[(
            0,
            &[
                0xB8, 4, 3, 2, 1, 0x66, 0x0F, 0x6E, 0xC0, // mov eax,1020304; movd xmm0,eax
                0x66, 0x0F, 0x70, 0xC0, 0, 0x66, 0x0F, 0xFE,
                0xC0, // pshufd xmm0,xmm0,0; paddd xmm0,xmm0
                0x0F, 0x11, 0x04, 0x25, 0x00, 0x20, 0, 0, 0xE6, 0x80, // movups [2000],xmm0; out
            ],
        )],
        results: &[(0, 0x0204_0608), (12, 0x0204_0608)],
    },
    Part {
        name: "cmpxchg16b",
        mode: Mode::Long,
        code: &[(
            0,
            &[
                0x31, 0xC0, 0x31, 0xD2, // xor eax,eax; xor edx,edx
                0xBB, 1, 0, 0, 0, 0xB9, 2, 0, 0, 0, // mov ebx,1; mov ecx,2
                0xF0, 0x48, 0x0F, 0xC7, 0x0C, 0x25, 0x00, 0x20, 0, 0, // lock cmpxchg16b [2000]
                0x0F, 0x94, 0x04, 0x25, 0x10, 0x20, 0, 0, 0xE6, 0x80, // setz [2010]; out
            ],
        )],
        results: &[(0, 1), (8, 2), (16, 1)],
    },
    Part {
        name: "int3 through the IDT",
        mode: Mode::Long,
        code: &[
            (0, &[0xCC, 0xFF, 0x04, 0x25, 0x00, 0x20, 0, 0, 0xE6, 0x80]), // int3; inc dword [2000]; out
            (HANDLER, &[0xFF, 0x04, 0x25, 0x04, 0x20, 0, 0, 0x48, 0xCF]), // inc dword [2004]; iretq
        ],
        results: &[(0, 1), (4, 1)],
    },
    Part {
        name: "SYSCALL from ring 3 and back",
        mode: Mode::Long,
        code: &[
            // mov ecx,1200; mov r11d,2; sysretq
            (0, &[0xB9, 0x00, 0x12, 0, 0, 0x41, 0xBB, 2, 0, 0, 0, 0x48, 0x0F, 0x07]),
            // mov eax,7; syscall; mov eax,9; syscall
            (0x200, &[0xB8, 7, 0, 0, 0, 0x0F, 0x05, 0xB8, 9, 0, 0, 0, 0x0F, 0x05]),
            (
                KERNEL,
                &[
                    0x01, 0x04, 0x25, 0x00, 0x20, 0, 0, // add [2000],eax
                    0x83, 0xF8, 9, 0x74, 3, 0x48, 0x0F, 0x07, // cmp eax,9; je; sysretq
                    0xE6, 0x80,
                ],
            ),
        ],
        results: &[(0, 16)],
    },
];

/// Offset of the handler of int3.
const HANDLER: u64 = 0x100;
/// Offset of where SYSCALL leads.
const KERNEL: u64 = 0x300;

/// Writes tables and `part` into RAM.
pub fn load(part: &Part, ram: &GuestRam) {
    ram.store_bytes(CODE, &[0; (STACK - CODE) as usize]);
    for (offset, code) in part.code {
        ram.store_bytes(CODE + offset, code);
    }
    // All of it is the user's, too: the two paging forms map what is there to itself.
    for (at, entry) in [(PML4, PDPT | 7), (PDPT, PD | 7), (PD, 0x87)] {
        ram.store(at, entry);
    }
    ram.store(PD32, PT32 as u32 | 7);
    for page in 0..16u32 {
        ram.store(PT32 + 4 * u64::from(page), page << 12 | 7);
    }
    ram.store(PT32 + 4 * (ALIAS >> 12), RESULTS as u32 | 7);
    // Ring 0: code, data. Ring 3, as SYSRET wants them: 32-bit code, data, 64-bit code.
    let descriptors: [u64; 6] = [
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00cf_fb00_0000_ffff,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffff,
    ];
    for (at, descriptor) in (GDT..).step_by(8).zip(descriptors) {
        ram.store(at, descriptor);
    }
    ram.store(IDT + 3 * 16, (CODE + HANDLER) & 0xFFFF | 8 << 16 | 0x8E00 << 32);
}

/// Puts the processor where a part begins.
pub fn enter(mode: Mode, state: &mut VcpuState) {
    state.rip = CODE;
    if mode == Mode::Real {
        for segment in &mut state.segments {
            (segment.selector, segment.base) = (0, 0);
        }
        return;
    }
    let segment = |selector, attributes, limit| Segment {
        selector,
        attributes: SegmentAttributes(attributes),
        limit,
        base: 0,
        unusable: false,
    };
    let data = segment(0x10, 0xC93, u32::MAX);
    let code = segment(8, if mode == Mode::Long { 0xA9B } else { 0xC9B }, u32::MAX);
    state.segments = [data, code, data, data, data, data];
    state.ldtr = Segment { unusable: true, ..segment(0, 0x82, 0) };
    state.tr = Segment { base: TSS, ..segment(0x40, 0x8B, 0x67) };
    state.gdtr = DescriptorTable { base: GDT, limit: 0x2F };
    state.idtr = DescriptorTable { base: IDT, limit: 0x3F };
    (state.rflags, state.gpr[4]) = (2, STACK);
    state.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_PG;
    (state.cr3, state.cr4) = (PD32, 0);
    if mode == Mode::Long {
        (state.cr3, state.cr4) = (PML4, CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT);
        state.efer = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE;
        state.msrs.retain(|(number, _)| ![msr::STAR, msr::LSTAR].contains(number));
        state.msrs.extend([(msr::STAR, 0x18 << 48 | 8 << 32), (msr::LSTAR, CODE + KERNEL)]);
        state.msrs.sort_unstable();
    }
}
