//! A small assembler: bytes of host instructions, for the forms that the translator emits.
//!
//! General instructions of the guest are re-encoded from their own bytes (`encoding.rs`); this knows how to
//! write prefixes, ModRM and displacements, and the few instructions of the translator's own.

/// Host registers by number.
#[allow(missing_docs)]
pub mod reg {
    pub const RAX: u8 = 0;
    pub const RCX: u8 = 1;
    pub const RDX: u8 = 2;
    pub const RBX: u8 = 3;
    pub const RSP: u8 = 4;
    pub const RBP: u8 = 5;
    pub const RSI: u8 = 6;
    pub const RDI: u8 = 7;
    pub const R12: u8 = 12;
    pub const R13: u8 = 13;
    pub const R14: u8 = 14;
    pub const R15: u8 = 15;
}

/// The condition codes that the translator's own code uses.
#[allow(missing_docs)]
pub mod cc {
    pub const BELOW: u8 = 2;
    pub const ABOVE_OR_EQUAL: u8 = 3;
    pub const EQUAL: u8 = 4;
    pub const NOT_EQUAL: u8 = 5;
    pub const BELOW_OR_EQUAL: u8 = 6;
    pub const ABOVE: u8 = 7;
    pub const SIGN: u8 = 8;
}

/// The host register that holds the address of the `SoftCore`.
pub const CONTEXT: u8 = 9;
/// Scratch registers.
pub const T0: u8 = 10;
/// See [`T0`].
pub const T1: u8 = 11;

/// A memory operand.
#[derive(Clone, Copy, Debug)]
pub struct Mem {
    /// Base register.
    pub base: u8,
    /// Index register and log2 of its scale.
    pub index: Option<(u8, u8)>,
    /// Displacement.
    pub disp: i32,
    /// Relative to the GS base, which is guest RAM's.
    pub ram: bool,
}

/// `[base + disp]`.
pub fn at(base: u8, disp: i32) -> Mem {
    Mem { base, index: None, disp, ram: false }
}
/// A field of the `SoftCore`.
pub fn field(offset: usize) -> Mem {
    at(CONTEXT, offset as i32)
}

/// What ModRM's `rm` names.
#[derive(Clone, Copy, Debug)]
pub enum Rm {
    /// A register.
    Reg(u8),
    /// Memory.
    Mem(Mem),
}
impl From<Mem> for Rm {
    fn from(m: Mem) -> Self {
        Rm::Mem(m)
    }
}
impl From<u8> for Rm {
    fn from(r: u8) -> Self {
        Rm::Reg(r)
    }
}

/// A VEX prefix but for its register bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vex {
    /// Opcode map: 1 is 0F, 2 is 0F38, 3 is 0F3A.
    pub map: u8,
    /// W.
    pub w: bool,
    /// Register in vvvv.
    pub v: u8,
    /// L: 256 bits.
    pub l: bool,
    /// Implied prefix.
    pub pp: u8,
}

/// Place of a 32-bit jump displacement that is still to be filled in.
#[derive(Clone, Copy, Debug)]
pub struct Patch(pub usize);

/// See the module's header.
pub struct Asm {
    /// What was emitted.
    pub code: Vec<u8>,
    base: u64,
}

impl Asm {
    /// Code that will lie at host address `base`.
    pub fn new(base: u64) -> Self {
        Self { code: Vec::with_capacity(1024), base }
    }
    /// Address of the next byte.
    pub fn here(&self) -> u64 {
        self.base + self.code.len() as u64
    }
    /// Raw bytes.
    pub fn bytes(&mut self, b: &[u8]) {
        self.code.extend_from_slice(b);
    }
    fn imm32(&mut self, v: u32) {
        self.bytes(&v.to_le_bytes());
    }

    /// An instruction with ModRM: `prefixes` are legacy ones, `opcode` includes escape bytes.
    pub fn modrm(&mut self, prefixes: &[u8], w: bool, rex: bool, opcode: &[u8], reg: u8, rm: Rm) {
        if matches!(rm, Rm::Mem(m) if m.ram) {
            self.code.push(0x65);
        }
        self.bytes(prefixes);
        let (x, b) = extension(rm);
        let byte = u8::from(w) << 3 | reg >> 3 << 2 | x << 1 | b;
        if byte != 0 || rex {
            self.code.push(0x40 | byte);
        }
        self.bytes(opcode);
        self.tail(reg, rm);
    }

    /// An instruction with a VEX prefix.
    pub fn vex(&mut self, vex: Vex, opcode: u8, reg: u8, rm: Rm) {
        if matches!(rm, Rm::Mem(m) if m.ram) {
            self.code.push(0x65);
        }
        let (x, b) = extension(rm);
        let v = (!vex.v & 15) << 3;
        let second = u8::from(vex.l) << 2 | vex.pp | v;
        if x == 0 && b == 0 && !vex.w && vex.map == 1 {
            self.bytes(&[0xC5, (!(reg >> 3) & 1) << 7 | second, opcode]);
        } else {
            let first = (!(reg >> 3) & 1) << 7 | (!x & 1) << 6 | (!b & 1) << 5 | vex.map;
            self.bytes(&[0xC4, first, u8::from(vex.w) << 7 | second, opcode]);
        }
        self.tail(reg, rm);
    }

    fn tail(&mut self, reg: u8, rm: Rm) {
        let reg = (reg & 7) << 3;
        let m = match rm {
            Rm::Reg(r) => return self.code.push(0xC0 | reg | r & 7),
            Rm::Mem(m) => m,
        };
        let short = i8::try_from(m.disp).is_ok();
        let mode = match (m.disp, short) {
            (0, _) if m.base & 7 != 5 => 0x00,
            (_, true) => 0x40,
            _ => 0x80,
        };
        match m.index {
            Some((index, scale)) => {
                self.code.push(mode | reg | 4);
                self.code.push(scale << 6 | (index & 7) << 3 | m.base & 7);
            }
            None if m.base & 7 == 4 => self.bytes(&[mode | reg | 4, 0x24]),
            None => self.code.push(mode | reg | m.base & 7),
        }
        match mode {
            0x40 => self.code.push(m.disp as u8),
            0x80 => self.imm32(m.disp as u32),
            _ => {}
        }
    }

    /// 64-bit `mov to, from`.
    pub fn mov(&mut self, to: u8, from: u8) {
        self.modrm(&[], true, false, &[0x89], from, to.into());
    }
    /// 64-bit load.
    pub fn load(&mut self, to: u8, from: Mem) {
        self.modrm(&[], true, false, &[0x8B], to, from.into());
    }
    /// 32-bit load.
    pub fn load32(&mut self, to: u8, from: Mem) {
        self.modrm(&[], false, false, &[0x8B], to, from.into());
    }
    /// 64-bit store.
    pub fn store(&mut self, to: Mem, from: u8) {
        self.modrm(&[], true, false, &[0x89], from, to.into());
    }
    /// 64-bit store of a sign-extended immediate.
    pub fn store_imm(&mut self, to: Mem, imm: i32) {
        self.modrm(&[], true, false, &[0xC7], 0, to.into());
        self.imm32(imm as u32);
    }
    /// Load of 8 bytes (`wide`) or of 4 with zeros above them.
    pub fn load_word(&mut self, wide: bool, to: u8, from: Mem) {
        self.modrm(&[], wide, false, &[0x8B], to, from.into());
    }
    /// Store of 8 bytes or 4.
    pub fn store_word(&mut self, wide: bool, to: Mem, from: u8) {
        self.modrm(&[], wide, false, &[0x89], from, to.into());
    }
    /// Store of an immediate, sign-extended to 8 bytes, or of 4 bytes.
    pub fn store_word_imm(&mut self, wide: bool, to: Mem, imm: i32) {
        self.modrm(&[], wide, false, &[0xC7], 0, to.into());
        self.imm32(imm as u32);
    }
    /// `lea to, [from]` with an address of 64 bits, or of 32.
    pub fn lea_word(&mut self, wide: bool, to: u8, from: Mem) {
        self.modrm(&[], wide, false, &[0x8D], to, from.into());
    }
    /// `lea to, [from]`.
    pub fn lea(&mut self, to: u8, from: Mem) {
        self.modrm(&[], true, false, &[0x8D], to, from.into());
    }
    /// `mov to, imm`, in its shortest form.
    pub fn mov_imm(&mut self, to: u8, imm: u64) {
        if let Ok(imm) = u32::try_from(imm) {
            self.mov_imm32(to, imm);
        } else if imm as i32 as i64 as u64 == imm {
            self.modrm(&[], true, false, &[0xC7], 0, to.into());
            self.imm32(imm as u32);
        } else {
            self.bytes(&[0x48 | to >> 3, 0xB8 | to & 7]);
            self.bytes(&imm.to_le_bytes());
        }
    }
    /// 32-bit `mov to, imm`.
    pub fn mov_imm32(&mut self, to: u8, imm: u32) {
        if to >= 8 {
            self.code.push(0x41);
        }
        self.code.push(0xB8 | to & 7);
        self.imm32(imm);
    }
    /// 64-bit ALU operation between register and memory or register: `opcode` as in `03` (ADD), `33` (XOR).
    pub fn alu(&mut self, opcode: u8, to: u8, from: impl Into<Rm>) {
        self.modrm(&[], true, false, &[opcode], to, from.into());
    }
    /// `cmp r64, imm`.
    pub fn cmp_imm(&mut self, r: u8, imm: u32) {
        self.modrm(&[], true, false, &[0x81], 7, r.into());
        self.imm32(imm);
    }
    /// `and r32, imm`.
    pub fn and_imm32(&mut self, r: u8, imm: u32) {
        self.modrm(&[], false, false, &[0x81], 4, r.into());
        self.imm32(imm);
    }
    /// `shr r64, n` or `shl r64, n`.
    pub fn shift(&mut self, left: bool, r: u8, n: u8) {
        self.modrm(&[], true, false, &[0xC1], if left { 4 } else { 5 }, r.into());
        self.code.push(n);
    }
    /// `push r64`.
    pub fn push(&mut self, r: u8) {
        self.plus(0x50, r);
    }
    /// `pop r64`.
    pub fn pop(&mut self, r: u8) {
        self.plus(0x58, r);
    }
    fn plus(&mut self, opcode: u8, r: u8) {
        if r >= 8 {
            self.code.push(0x41);
        }
        self.code.push(opcode | r & 7);
    }

    /// `jmp` to an address.
    pub fn jmp(&mut self, to: u64) {
        let p = self.jmp_later();
        self.resolve(p, to);
    }
    /// `jmp` to a place that is not known yet.
    pub fn jmp_later(&mut self) -> Patch {
        self.code.push(0xE9);
        self.imm32(0);
        Patch(self.code.len() - 4)
    }
    /// `jcc` to a place that is not known yet.
    pub fn jcc_later(&mut self, cc: u8) -> Patch {
        self.bytes(&[0x0F, 0x80 | cc]);
        self.imm32(0);
        Patch(self.code.len() - 4)
    }
    /// `call` of an address.
    pub fn call(&mut self, to: u64) {
        self.code.push(0xE8);
        self.imm32(0);
        let p = Patch(self.code.len() - 4);
        self.resolve(p, to);
    }
    /// Indirect jump or call through `rm`.
    pub fn indirect(&mut self, call: bool, rm: impl Into<Rm>) {
        self.modrm(&[], false, false, &[0xFF], if call { 2 } else { 4 }, rm.into());
    }
    /// Fills in a displacement: `to` is where it leads.
    pub fn resolve(&mut self, p: Patch, to: u64) {
        let from = self.base + p.0 as u64 + 4;
        let rel = to.wrapping_sub(from) as u32;
        self.code[p.0..p.0 + 4].copy_from_slice(&rel.to_le_bytes());
    }
    /// The place is here.
    pub fn bind(&mut self, p: Patch) {
        let here = self.here();
        self.resolve(p, here);
    }
}

/// REX.X and REX.B of an operand.
fn extension(rm: Rm) -> (u8, u8) {
    match rm {
        Rm::Reg(r) => (0, r >> 3),
        Rm::Mem(m) => (m.index.map_or(0, |(i, _)| i >> 3), m.base >> 3),
    }
}
