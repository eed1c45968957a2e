//! An instruction of the guest taken apart into prefixes, opcode, ModRM and immediate, so that it can be
//! written again with other registers and another memory operand.

use crate::asm::{Asm, Rm, Vex};

/// Which fields name general registers.
#[derive(Clone, Copy, Debug)]
pub struct Roles {
    /// `reg` of ModRM.
    pub reg: bool,
    /// `rm` of ModRM, if it is a register.
    pub rm: bool,
    /// VEX.vvvv.
    pub v: bool,
}

/// See the module's header.
#[derive(Clone, Copy, Debug)]
pub struct Encoding {
    /// Which fields name general registers: all, unless somebody knows better.
    pub roles: Roles,
    lock: bool,
    operand_size: bool,
    /// F2 or F3; 0 if neither.
    repeat: u8,
    rex: Option<u8>,
    vex: Option<Vex>,
    /// Escape bytes and opcode.
    opcode: [u8; 3],
    opcode_len: u8,
    /// `reg` of ModRM with its extension.
    pub reg: u8,
    /// `rm` with its extension if it names a register.
    pub rm: Option<u8>,
    imm: [u8; 8],
    imm_len: u8,
}

impl Encoding {
    /// Takes `bytes` apart: exactly one valid instruction of 64-bit code (`long`) or 32-bit code. `None`: it has no ModRM,
    /// or something that is not worth an effort. What 32-bit code writes otherwise comes out as 64-bit code does.
    pub fn parse(bytes: &[u8], long: bool) -> Option<Self> {
        let mut e = Self {
            roles: Roles { reg: true, rm: true, v: true },
            lock: false,
            operand_size: false,
            repeat: 0,
            rex: None,
            vex: None,
            opcode: [0; 3],
            opcode_len: 0,
            reg: 0,
            rm: None,
            imm: [0; 8],
            imm_len: 0,
        };
        let mut at = e.prefixes(bytes, long)?;
        if !long && e.short(bytes.get(at..)?) {
            return Some(e);
        }
        at = e.opcode(bytes, at)?;
        let modrm = *bytes.get(at)?;
        at += 1;
        let rex = e.rex.unwrap_or(0);
        e.reg = (modrm >> 3 & 7) | (rex >> 2 & 1) << 3;
        if modrm >= 0xC0 {
            e.rm = Some((modrm & 7) | (rex & 1) << 3);
        } else {
            let sib = modrm & 7 == 4;
            let no_base = sib && *bytes.get(at)? & 7 == 5 || modrm & 7 == 5;
            at += usize::from(sib);
            at += match modrm >> 6 {
                0 if no_base => 4,
                0 => 0,
                1 => 1,
                _ => 4,
            };
        }
        let imm = bytes.get(at..)?;
        if imm.len() > 4 {
            return None;
        }
        e.imm[..imm.len()].copy_from_slice(imm);
        e.imm_len = imm.len() as u8;
        e.roles.reg = !e.reg_is_opcode();
        if !long {
            e.drop_ignored();
        }
        Some(e)
    }

    fn prefixes(&mut self, bytes: &[u8], long: bool) -> Option<usize> {
        let mut at = 0;
        loop {
            match *bytes.get(at)? {
                0xF0 => self.lock = true,
                0x66 => self.operand_size = true,
                p @ (0xF2 | 0xF3) if self.repeat == 0 => self.repeat = p,
                0x26 | 0x2E | 0x36 | 0x3E | 0x64 | 0x65 => {}
                // Two of one kind, or another address size.
                0xF2 | 0xF3 | 0x67 => return None,
                rex @ 0x40..=0x4F if long => {
                    self.rex = Some(rex);
                    return Some(at + 1);
                }
                _ => return Some(at),
            }
            at += 1;
        }
    }

    /// Instructions of 32-bit code without ModRM that become others with one: INC and DEC of a register, MOV between the
    /// accumulator and an address.
    fn short(&mut self, bytes: &[u8]) -> bool {
        let Some(&first) = bytes.first() else { return false };
        match first {
            0x40..=0x4F => {
                (self.opcode[0], self.reg, self.rm) = (0xFF, first >> 3 & 1, Some(first & 7));
                self.roles.reg = false;
            }
            0xA0 | 0xA1 => self.opcode[0] = first - 0xA0 + 0x8A,
            0xA2 | 0xA3 => self.opcode[0] = first - 0xA2 + 0x88,
            _ => return false,
        }
        self.opcode_len = 1;
        true
    }

    /// What 32-bit code has that processors ignore there (SDM vol. 2A, 2.3.5): extensions of registers in VEX.
    fn drop_ignored(&mut self) {
        self.rex = None;
        self.rm = self.rm.map(|r| r & 7);
        if self.opcode_len == 1 && self.vex.is_none() && self.opcode[0] == 0x82 {
            self.opcode[0] = 0x80;
        }
        if let Some(vex) = &mut self.vex {
            vex.v &= 7;
            if vex.map == 3 && matches!(self.opcode[0], 0x4A..=0x4C) {
                self.imm[0] &= 0x7F; // a register's number
            }
        }
    }

    /// VEX.W as 32-bit code has it in instructions on general registers.
    pub fn clear_w(&mut self) {
        if let Some(vex) = &mut self.vex {
            vex.w = false;
        }
    }

    fn opcode(&mut self, bytes: &[u8], at: usize) -> Option<usize> {
        let push = |e: &mut Self, byte: u8| {
            e.opcode[usize::from(e.opcode_len)] = byte;
            e.opcode_len += 1;
        };
        let first = *bytes.get(at)?;
        let next = |n: usize| bytes.get(at + n).copied();
        match first {
            0xC4 | 0xC5 if self.rex.is_none() => {
                let (one, two, used) = if first == 0xC5 {
                    (next(1)? & 0x80 | 0x61, next(1)? & 0x7F, 2)
                } else {
                    (next(1)?, next(2)?, 3)
                };
                self.rex = Some(0x40 | !one >> 5 & 7 | (two >> 7) << 3);
                self.vex = Some(Vex {
                    map: one & 31,
                    w: two >> 7 != 0,
                    v: !two >> 3 & 15,
                    l: two & 4 != 0,
                    pp: two & 3,
                });
                push(self, next(used)?);
                Some(at + used + 1)
            }
            0x0F => {
                push(self, 0x0F);
                let second = next(1)?;
                push(self, second);
                if matches!(second, 0x38 | 0x3A) {
                    push(self, next(2)?);
                    return Some(at + 3);
                }
                Some(at + 2)
            }
            _ => {
                push(self, first);
                has_modrm(first).then_some(at + 1)
            }
        }
    }

    /// The opcode's last byte.
    pub fn opcode_byte(&self) -> u8 {
        self.opcode[usize::from(self.opcode_len) - 1]
    }
    /// Opcode map: 0 one byte, 1 0F, 2 0F38, 3 0F3A.
    pub fn map(&self) -> u8 {
        match (self.vex, self.opcode_len, self.opcode[1]) {
            (Some(v), ..) => v.map,
            (None, 1, _) => 0,
            (None, 2, _) => 1,
            (None, _, 0x38) => 2,
            _ => 3,
        }
    }
    /// Register in VEX.vvvv.
    pub fn v(&self) -> Option<u8> {
        self.vex.map(|v| v.v)
    }
    /// Has an F2 or F3 prefix.
    pub fn has_repeat(&self) -> bool {
        self.repeat != 0
    }
    /// Has F3 as a prefix or in VEX.
    pub fn is_f3(&self) -> bool {
        self.repeat == 0xF3 || self.vex.is_some_and(|v| v.pp == 2)
    }
    /// Whether it is VEX-encoded.
    pub fn is_vex(&self) -> bool {
        self.vex.is_some()
    }

    /// Whether `reg` extends the opcode instead of naming a register.
    fn reg_is_opcode(&self) -> bool {
        let op = self.opcode_byte();
        match self.map() {
            0 => {
                matches!(op, 0x80..=0x83 | 0x8F | 0xC0 | 0xC1 | 0xC6 | 0xC7 | 0xD0..=0xD3 | 0xD8..=0xDF | 0xF6 | 0xF7 | 0xFE | 0xFF)
            }
            1 => matches!(op, 0x0D | 0x18..=0x1F | 0x71..=0x73 | 0xAE | 0xBA | 0xC7 | 0x90..=0x9F),
            2 => self.vex.is_some() && op == 0xF3,
            _ => false,
        }
    }

    /// Writes it again. `reg`, `v` and `rm` are host operands.
    pub fn emit(&self, a: &mut Asm, reg: u8, v: u8, rm: Rm) {
        if let Some(vex) = self.vex {
            a.vex(Vex { v, ..vex }, self.opcode_byte(), reg, rm);
        } else {
            let mut prefixes = [0; 3];
            let mut n = 0;
            for (on, byte) in [(self.lock, 0xF0), (self.operand_size, 0x66), (self.repeat != 0, self.repeat)]
            {
                if on {
                    prefixes[n] = byte;
                    n += 1;
                }
            }
            let w = self.rex.unwrap_or(0) & 8 != 0;
            let opcode = &self.opcode[..usize::from(self.opcode_len)];
            a.modrm(&prefixes[..n], w, self.rex.is_some(), opcode, reg, rm);
        }
        a.bytes(&self.imm[..usize::from(self.imm_len)]);
    }
}

/// Whether an opcode of the one-byte map that the translator writes again has a ModRM byte.
fn has_modrm(opcode: u8) -> bool {
    match opcode {
        0x00..=0x3F => opcode & 7 < 4,
        0x63 | 0x69 | 0x6B | 0x80..=0x8F | 0xC0 | 0xC1 | 0xC6 | 0xC7 | 0xD0..=0xD3 | 0xD8..=0xDF => true,
        0xF6 | 0xF7 | 0xFE | 0xFF => true,
        _ => false,
    }
}
