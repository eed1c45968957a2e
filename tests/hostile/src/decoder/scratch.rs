//! One instruction after the other on a core without paging: every handler, with memory that never faults.
//!
//! What must hold of decoding: an instruction has 1 to 15 bytes, what follows it does not matter, and each part of it is
//! told apart from something else: more bytes are needed. Of running: no panic, a fault names its exception, and what is
//! derived of the state (mode key, segment bases) stays right.

use super::modes::Mode;
use super::{Random, Script};
use x86_decode::{Decoded, MAX_LENGTH, decode};
use x86_defs::cpuid::{Feature, FeatureSet};
use x86_defs::flags::STATUS;
use x86_emulate::core::PagingChange;
use x86_emulate::cpu::{PendingException, RIP};
use x86_emulate::lower::{LowerContext, lower, undefined};
use x86_emulate::system::interrupts;
use x86_emulate::{Core, Cpu, Fault, ModeKey, Step, Word};

/// Bytes of memory; addresses wrap.
const BYTES: u64 = 0x1_0000;
/// Instructions of one script.
const INSTRUCTIONS: usize = 256;

struct Scratch {
    cpu: Cpu,
    memory: Vec<u8>,
    features: FeatureSet,
    random: Random,
}

pub fn run(script: &Script<'_>) {
    let mut core = Scratch::new(script);
    let mut rest = script.code;
    for _ in 0..INSTRUCTIONS {
        if rest.is_empty() {
            break;
        }
        let decoded = checked_decode(rest, core.cpu.mode.bitness(), core.features);
        let length = core.step(rest, decoded, script.deliver);
        rest = &rest[length.min(rest.len())..];
    }
}

/// Decodes, and decodes anew what is cut behind the instruction and inside it.
fn checked_decode(bytes: &[u8], bitness: u32, features: FeatureSet) -> Decoded {
    let decoded = decode(bytes, bitness, 0, features);
    match decoded {
        Decoded::Instruction(insn) => {
            let length = insn.len();
            assert!((1..=MAX_LENGTH).contains(&length) && length <= bytes.len());
            assert_eq!(decode(&bytes[..length], bitness, 0, features), decoded, "what follows changed it");
            for cut in 0..length {
                // A prefix of it may be no instruction yet, but never a different one.
                let part = decode(&bytes[..cut], bitness, 0, features);
                assert_eq!(part, Decoded::NeedMore, "{cut} of {length} bytes of {:02x?}", &bytes[..length]);
            }
        }
        Decoded::NeedMore => assert!(bytes.len() < MAX_LENGTH),
        Decoded::TooLong => assert!(bytes.len() >= MAX_LENGTH),
        Decoded::Invalid => {}
    }
    decoded
}

impl Scratch {
    fn new(script: &Script<'_>) -> Self {
        let mut features = FeatureSet::of(Feature::ALL);
        for (i, feature) in Feature::ALL.iter().enumerate() {
            if script.without >> (i % 64) & 1 != 0 && script.without & 1 != 0 {
                features.remove(*feature);
            }
        }
        let mut memory = script.mode.memory();
        memory.resize(BYTES as usize, 0);
        let random = Random(script.seed | 1);
        let mut core = Self { cpu: cpu_of(script.mode), memory, features, random };
        core.disorder();
        core
    }

    fn disorder(&mut self) {
        for register in 0..16 {
            self.cpu.gpr[register] = self.random.value();
        }
    }

    /// Runs what was decoded; returns how many bytes it took.
    fn step(&mut self, bytes: &[u8], decoded: Decoded, deliver: bool) -> usize {
        let mode = self.cpu.mode;
        let ctx = LowerContext { mode, features: self.features, at: 0, live_flags: STATUS };
        let (op, length) = match decoded {
            Decoded::Instruction(insn) => (lower::<Self>(&insn, &ctx), insn.len()),
            _ => (undefined(1, &ctx), 1),
        };
        if op.len != 0 {
            assert_eq!(usize::from(op.len), length, "{:02x?}", &bytes[..length]);
        }
        self.cpu.exc = PendingException::default();
        if (op.run)(self, &op) == Step::Fault {
            let pending = core::mem::take(&mut self.cpu.exc);
            assert!(pending.vector.is_some(), "a fault without an exception: {:02x?}", &bytes[..length]);
            if deliver {
                let _ = interrupts::deliver_exception(self, pending);
            }
            self.disorder();
        }
        self.check(&bytes[..length]);
        length
    }

    fn check(&self, bytes: &[u8]) {
        let cpu = &self.cpu;
        assert_eq!(cpu.mode, ModeKey::of(cpu), "{bytes:02x?}");
        assert_eq!(cpu.gpr[17..], [0; 15], "{bytes:02x?}");
        for i in 0..6 {
            assert_eq!(cpu.seg_base[i], cpu.seg[i].base, "{bytes:02x?}");
        }
    }

    fn at(linear: u64) -> usize {
        (linear % BYTES) as usize
    }
    fn get(&self, linear: u64, bytes: u64) -> u64 {
        (0..bytes).fold(0, |v, i| v | u64::from(self.memory[Self::at(linear.wrapping_add(i))]) << (8 * i))
    }
    fn put(&mut self, linear: u64, bytes: &[u8]) {
        for (i, byte) in bytes.iter().enumerate() {
            self.memory[Self::at(linear.wrapping_add(i as u64))] = *byte;
        }
    }
}

fn cpu_of(mode: Mode) -> Cpu {
    let s = mode.state();
    let mut cpu = Cpu {
        cr0: s.cr0,
        cr3: s.cr3,
        cr4: s.cr4,
        efer: s.efer,
        xcr0: s.xcr0,
        seg: s.segments,
        tr: s.tr,
        gdtr: s.gdtr,
        idtr: s.idtr,
        pdpte: s.pdpte,
        cpl: if mode == Mode::V86 { 3 } else { (s.segments[1].attributes.0 >> 5 & 3) as u8 },
        ..Cpu::default()
    };
    cpu.gpr[RIP] = s.rip;
    cpu.x.x87.control = s.x87.control;
    cpu.set_rflags_all(s.rflags);
    cpu.refresh();
    cpu
}

impl Core for Scratch {
    fn cpu(&self) -> &Cpu {
        &self.cpu
    }
    fn cpu_mut(&mut self) -> &mut Cpu {
        &mut self.cpu
    }
    fn load<T: Word>(&mut self, linear: u64) -> Result<T, Fault> {
        Ok(T::from_u64(self.get(linear, T::BYTES.into())))
    }
    fn store<T: Word>(&mut self, linear: u64, value: T) -> Result<(), Fault> {
        self.put(linear, &value.zext().to_le_bytes()[..T::BYTES as usize]);
        Ok(())
    }
    fn modify<T: Word>(&mut self, linear: u64, f: impl FnOnce(T) -> T) -> Result<T, Fault> {
        let old = self.load(linear)?;
        self.store(linear, f(old))?;
        Ok(old)
    }
    fn modify_locked<T: Word>(&mut self, linear: u64, f: impl FnMut(T) -> T) -> Result<T, Fault> {
        self.modify(linear, f)
    }
    fn compare_exchange_16(&mut self, linear: u64, expected: u128, new: u128) -> Result<u128, Fault> {
        let old = u128::from(self.get(linear, 8)) | u128::from(self.get(linear.wrapping_add(8), 8)) << 64;
        let value = if old == expected { new } else { old };
        self.put(linear, &value.to_le_bytes());
        Ok(old)
    }
    fn load_bytes(&mut self, linear: u64, buf: &mut [u8]) -> Result<(), Fault> {
        assert!(buf.len() <= 4096);
        for (i, byte) in buf.iter_mut().enumerate() {
            *byte = self.memory[Self::at(linear.wrapping_add(i as u64))];
        }
        Ok(())
    }
    fn store_bytes(&mut self, linear: u64, buf: &[u8]) -> Result<(), Fault> {
        assert!(buf.len() <= 4096);
        self.put(linear, buf);
        Ok(())
    }
    fn probe(&mut self, _: u64, _: u64, _: bool) -> Result<(), Fault> {
        Ok(())
    }
    fn load_system<T: Word>(&mut self, linear: u64) -> Result<T, Fault> {
        self.load(linear)
    }
    fn store_system<T: Word>(&mut self, linear: u64, value: T) -> Result<(), Fault> {
        self.store(linear, value)
    }
    fn load_physical(&mut self, gpa: u64) -> u64 {
        self.get(gpa, 8)
    }
    fn copy(&mut self, to: u64, from: u64, len: u64) -> Result<u64, Fault> {
        assert!(to % 4096 + len <= 4096 && from % 4096 + len <= 4096, "a run leaves its page");
        for i in 0..len {
            let byte = self.memory[Self::at(from.wrapping_add(i))];
            self.put(to.wrapping_add(i), &[byte]);
        }
        Ok(len)
    }
    fn fill<T: Word>(&mut self, to: u64, value: T, len: u64) -> Result<u64, Fault> {
        assert!(to % 4096 + len <= 4096 && len.is_multiple_of(T::BYTES.into()), "a run leaves its page");
        for i in (0..len).step_by(T::BYTES as usize) {
            self.store(to.wrapping_add(i), value)?;
        }
        Ok(len)
    }
    fn port_in(&mut self, _: u16, bytes: u8) -> u32 {
        assert!(matches!(bytes, 1 | 2 | 4));
        self.random.next() as u32
    }
    fn port_out(&mut self, _: u16, bytes: u8, _: u32) {
        assert!(matches!(bytes, 1 | 2 | 4));
    }
    fn tsc(&mut self) -> u64 {
        self.random.next()
    }
    fn random(&mut self) -> u64 {
        self.random.next()
    }
    fn cpuid(&mut self, leaf: u32, subleaf: u32) -> [u32; 4] {
        [leaf, subleaf, 0, 0]
    }
    fn has_feature(&self, feature: Feature) -> bool {
        self.features.has(feature)
    }
    fn engine_msr_read(&mut self, _: u32) -> Option<Result<u64, Fault>> {
        None
    }
    fn engine_msr_write(&mut self, _: u32, _: u64) -> Option<Result<(), Fault>> {
        None
    }
    fn tpr(&mut self) -> u8 {
        0
    }
    fn set_tpr(&mut self, value: u8) {
        assert!(value < 16);
    }
    fn paging_changed(&mut self, _: PagingChange) {}
    fn invalidate_page(&mut self, _: u64) {}
    fn pause(&mut self) {}
}
