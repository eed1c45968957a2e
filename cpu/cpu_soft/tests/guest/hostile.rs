//! Guests that mean harm: random bytes as code in every mode, with random tables, control registers and
//! states. Nothing may panic, and a kick always brings the vCPU back.

use crate::harness::guest::{long_state, protected_state, to_user32, to_user64};
use crate::harness::images::*;
use crate::harness::*;
use hypervisor::{Kicker, VcpuIo, VcpuState};
use proptest::prelude::*;
use saved_state::{from_blob, to_blob};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;
use x86_defs::control::*;
use x86_defs::paging::*;
use x86_defs::{DescriptorTable, SegmentAttributes, flags};

/// Kicks a vCPU a little after it was told to.
fn kicks(kicker: Kicker) -> Sender<Duration> {
    let (to, from) = channel::<Duration>();
    std::thread::spawn(move || {
        for pause in from {
            std::thread::sleep(pause);
            kicker.kick();
        }
    });
    to
}

#[derive(Clone, Copy, Debug)]
enum Mode {
    Real,
    V86,
    Protected16,
    Protected32,
    User32,
    Pae,
    Long,
    User64,
    Compatibility,
}
const MODES: [Mode; 9] = [
    Mode::Real,
    Mode::V86,
    Mode::Protected16,
    Mode::Protected32,
    Mode::User32,
    Mode::Pae,
    Mode::Long,
    Mode::User64,
    Mode::Compatibility,
];

/// Bytes that look a little like code: prefixes and two-byte opcodes are more frequent than by chance.
fn code_bytes(r: &mut Random, bytes: &mut [u8]) {
    r.fill(bytes);
    const SPICE: [&[u8]; 22] = [
        &[0x0F],
        &[0xF0],
        &[0x66],
        &[0x67],
        &[0xF3],
        &[0xF2],
        &[0x48],
        &[0x0F, 0x01],
        &[0x0F, 0x22],
        &[0x0F, 0x30],
        &[0x0F, 0xAE],
        &[0x0F, 0xC7],
        &[0xC4, 0xE2],
        &[0xC5, 0xFD],
        &[0x8E],
        &[0xCF],
        &[0xCB],
        &[0x9D],
        &[0xCD],
        &[0xFF],
        &[0xEA],
        &[0xF3, 0xA4],
    ];
    let mut at = 0;
    while at + 2 < bytes.len() {
        let spice = r.pick(&SPICE);
        if r.one_in(3) {
            bytes[at..at + spice.len()].copy_from_slice(spice);
        }
        at += 1 + r.below(6) as usize;
    }
}

/// Fills a page-aligned table with entries that are often nearly right.
fn table_entries(r: &mut Random, g: &Guest, at: u64, count: u64) {
    for n in 0..count {
        let entry = match r.below(4) {
            0 => r.next(),
            1 => 0,
            _ => (r.below(RAM_BYTES >> 12) << 12) | r.next() & 0xFFF | PTE_P,
        };
        g.ram.store(at + n * 8, entry);
    }
}

fn random_descriptors(r: &mut Random, g: &Guest, table: u64, count: u64) {
    for n in 0..count {
        if r.one_in(3) {
            let attributes = r.next() as u16 & 0xFFF | if r.one_in(4) { 0 } else { 0x80 };
            let base = if r.one_in(3) { r.next() & 0xFFFF_FFFF } else { r.below(RAM_BYTES) };
            g.ram.store(table + n * 8, descriptor(base, r.next() as u32, attributes));
        }
    }
}

fn set_up(g: &mut Guest, r: &mut Random, mode: Mode) -> VcpuState {
    // Code everywhere that handlers, stacks and data may be; tables come back for each case.
    let fresh = guest::ram();
    let mut low = vec![0; 0x6000];
    fresh.load_bytes(0, &mut low);
    g.ram.store_bytes(0, &low);
    let mut bytes = vec![0; 0x3_0000];
    code_bytes(r, &mut bytes);
    g.ram.store_bytes(CODE, &bytes);
    g.ram.store_bytes(TABLES, &vec![0; 0x4_0000]);
    let mut tables = match mode {
        Mode::Pae => Tables::pae(&g.ram),
        Mode::Real | Mode::Protected16 | Mode::Protected32 | Mode::User32 | Mode::V86 => {
            Tables::legacy(&g.ram)
        }
        _ => Tables::long(&g.ram),
    };
    tables.identity(0x20_0000, PTE_P | PTE_W | PTE_U);
    let long = matches!(mode, Mode::Long | Mode::User64 | Mode::Compatibility);
    if long {
        g.idt64();
    } else {
        g.idt32();
    }
    // Some gates lead into the random bytes, some are nonsense.
    for vector in 0..64u64 {
        match r.below(4) {
            0 if long => g.ram.store(
                IDT + vector * 16,
                gate64(KCODE64, CODE + r.below(0x1_0000), 0xEE, r.below(4) as u8)[0],
            ),
            0 => g.ram.store(IDT + vector * 8, gate(KCODE32, CODE + r.below(0x1_0000), 0xEE)),
            1 if r.one_in(4) => g.ram.store(IDT + vector * 8, r.next()),
            _ => {}
        }
    }
    random_descriptors(r, g, GDT + 0x58, 20);
    if r.one_in(4) {
        random_descriptors(r, g, GDT, 12);
    }
    if r.one_in(4) {
        table_entries(r, g, tables.root, 8);
    }
    if r.one_in(4) {
        let below = g.get(tables.root) & PTE_ADDR & (RAM_BYTES - 1);
        table_entries(r, g, below, 64);
    }
    let mut s = if long { long_state(tables.root) } else { protected_state() };
    match mode {
        Mode::Real => {
            s = VcpuState::default();
            for segment in &mut s.segments {
                (segment.selector, segment.base) = (0x1000, 0x1_0000);
            }
            s.idtr = DescriptorTable { base: 0, limit: 0x3FF };
            for vector in 0..256u64 {
                g.ram.store::<u32>(vector * 4, 0x1000_0000 | r.below(0x1_0000) as u32);
            }
            s.rip = 0;
        }
        Mode::V86 => {
            for segment in &mut s.segments {
                *segment = hypervisor_segment(0x1000);
            }
            s.rflags |= flags::VM | if r.one_in(2) { flags::IOPL } else { 0 };
            s.rip = 0;
        }
        Mode::Protected16 => {
            s.segments[1] = segment(KCODE16, 0x1_0000, 0xFFFF, CODE16);
            s.rip = 0;
        }
        Mode::User32 => to_user32(&mut s),
        Mode::User64 => to_user64(&mut s),
        Mode::Compatibility => to_user32(&mut s),
        _ => {}
    }
    if matches!(mode, Mode::Pae) || !long && !matches!(mode, Mode::Real) && r.one_in(2) {
        s.cr0 |= CR0_PG;
        s.cr3 = tables.root;
        s.cr4 |= CR4_PSE;
        if matches!(mode, Mode::Pae) {
            s.cr4 |= CR4_PAE;
            s.pdpte = std::array::from_fn(|i| g.get(tables.root + i as u64 * 8));
        }
    }
    s.rip += r.below(0x8000);
    for register in &mut s.gpr {
        *register = match r.below(4) {
            0 => r.next(),
            1 => r.below(0x100),
            _ => CODE + r.below(0x2_0000),
        };
    }
    s.rflags |= r.next() & (flags::STATUS | flags::DF | flags::AC | flags::ID | flags::IF);
    if r.one_in(8) {
        s.rflags |= flags::TF;
    }
    for bit in [
        CR4_SMEP,
        CR4_SMAP,
        CR4_UMIP,
        CR4_TSD,
        CR4_DE,
        CR4_VME,
        CR4_PGE,
        CR4_OSFXSR,
        CR4_OSXSAVE,
        CR4_FSGSBASE,
    ] {
        s.cr4 |= if r.one_in(3) { bit } else { 0 };
    }
    for bit in [CR0_WP, CR0_AM, CR0_TS, CR0_EM, CR0_MP, CR0_NE] {
        s.cr0 ^= if r.one_in(6) { bit } else { 0 };
    }
    if r.one_in(6) {
        (s.dr[0], s.dr[1], s.dr[5]) = (CODE + r.below(0x1_0000), r.next(), r.next() & 0xFFFF_03FF);
    }
    (s.x87.control, s.x87.status, s.x87.in_use) = (r.next() as u16, r.next() as u16, r.next() as u8);
    s.sse.mxcsr = r.next() as u32 & 0xFFFF;
    s.sse.xmm = std::array::from_fn(|_| [r.next(), r.next()]);
    s
}

fn hypervisor_segment(selector: u16) -> x86_defs::Segment {
    segment(selector, u64::from(selector) << 4, 0xFFFF, 0xF3)
}

/// Runs `s` until it ends or is kicked, some times over.
fn run_a_while(g: &mut Guest, kicks: &Sender<Duration>, times: u32) {
    let io: Arc<dyn VcpuIo> = g.io.clone();
    for n in 0..times {
        kicks.send(Duration::from_micros(300)).unwrap();
        let exit = g.vcpu.run(&io);
        // The kick that was sent, if something else ended the run.
        while exit != hypervisor::VcpuExit::Kicked && g.vcpu.run(&io) != hypervisor::VcpuExit::Kicked {
            std::thread::yield_now();
        }
        if n == 0 {
            g.send_anything();
        }
        let state = g.state();
        if exit != hypervisor::VcpuExit::Kicked {
            return;
        }
        // What it came to can be saved and taken back.
        if let Ok(state) = from_blob::<VcpuState>(&to_blob(&state)) {
            g.vcpu.restore(&state).unwrap();
        }
    }
}

impl Guest {
    fn send_anything(&self) {
        for data in [0x41, apic::NMI, 0x4041, 5 << 8, 6 << 8 | 0x10, 7 << 8, 2 << 8] {
            self.send(data);
        }
        self.partition.irq_sink().pic_line_changed(true);
        self.partition.irq_sink().pic_line_changed(false);
    }
}

/// `n` cases per 256 of proptest's own number, which campaigns raise.
fn cases(n: u32) -> ProptestConfig {
    let default = ProptestConfig::default();
    ProptestConfig { cases: default.cases * n / 256, failure_persistence: None, ..default }
}

proptest! {
    #![proptest_config(cases(40))]

    #[test]
    fn random_code_in_every_mode(seed: u64) {
        let mut g = Guest::at_reset();
        let kicks = kicks(g.vcpu.kicker());
        let mut r = Random(seed);
        for mode in MODES {
            let state = set_up(&mut g, &mut r, mode);
            // The saved form knows which states are impossible.
            if let Ok(state) = from_blob::<VcpuState>(&to_blob(&state)) {
                g.vcpu.restore(&state).unwrap();
                run_a_while(&mut g, &kicks, 3);
            }
        }
    }

    #[test]
    fn random_states(seed: u64) {
        let mut g = Guest::at_reset();
        let kicks = kicks(g.vcpu.kicker());
        let mut r = Random(seed);
        for _ in 0..20 {
            let mode = r.pick(&MODES);
            let mut s = set_up(&mut g, &mut r, mode);
            for _ in 0..1 + r.below(4) {
                let wild = r.next();
                match r.below(12) {
                    0 => s.cr0 ^= wild & CR0_ALL,
                    1 => s.cr3 = wild & 0x3FFF_FFFF_FFFF,
                    2 => s.cr4 ^= 1 << (wild % 22),
                    3 => s.efer ^= 1 << (wild % 12),
                    4 => s.rflags ^= wild & flags::ALL,
                    5 => s.rip = wild,
                    6 => s.segments[(wild % 6) as usize].attributes = SegmentAttributes(wild as u16 & 0xFFF),
                    7 => s.segments[(wild % 6) as usize].base = r.next(),
                    8 => s.segments[(wild % 6) as usize].limit = r.next() as u32,
                    9 => s.gdtr.base = wild,
                    10 => s.idtr.base = wild,
                    _ => s.tr = segment(wild as u16, r.next(), r.next() as u32, r.next() as u16 & 0xFFF),
                }
            }
            if let Ok(state) = from_blob::<VcpuState>(&to_blob(&s)) {
                g.vcpu.restore(&state).unwrap();
                run_a_while(&mut g, &kicks, 2);
            }
        }
    }
}
