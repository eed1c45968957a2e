//! A writer of AML byte code and resource descriptors.
//!
//! Called by `dsdt`. AML is a prefix language and so is this writer: an operator method writes the
//! operator, its operands follow by further calls; what has a length (devices, methods, packages)
//! takes a closure for its body. Names come from our own tables, never from a guest.
//!
//! We do not use the crate `acpi_tables`: it has neither MADT overrides and NMI entries, nor HPET,
//! nor ISA interrupt descriptors, and its trees of borrowed trait objects make a DSDT longer than
//! this file. ACPI 6.3 sections 20.2 (AML grammar) and 6.4 (resources).

use alloc::vec::Vec;

/// AML text while it is written.
#[derive(Default)]
pub(super) struct Aml {
    bytes: Vec<u8>,
}

/// One field of an operation region.
pub(super) enum FieldUnit {
    /// A named field of so many bits.
    Named(&'static str, u8),
    /// Bits without a name.
    Skip(u32),
}

impl Aml {
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    fn push(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    /// `op`, then the length of what `body` writes, then that.
    fn sized(&mut self, op: &[u8], body: impl FnOnce(&mut Self)) -> &mut Self {
        let mut inner = Self::default();
        body(&mut inner);
        self.push(op).push(&package_length(inner.bytes.len())).push(&inner.bytes)
    }

    // --- Names and data -------------------------------------------------------------------

    /// A name or path as reference or as the name of a definition.
    pub fn path(&mut self, path: &str) -> &mut Self {
        let bare = path.trim_start_matches(['\\', '^']);
        self.push(&path.as_bytes()[..path.len() - bare.len()]);
        let segments = bare.split('.').filter(|segment| !segment.is_empty());
        match segments.clone().count() {
            0 => self.push(&[0x00]),
            1 => self,
            2 => self.push(&[0x2E]),
            count => self.push(&[0x2F, count as u8]),
        };
        for segment in segments {
            let mut padded = [b'_'; 4];
            for (to, from) in padded.iter_mut().zip(segment.bytes()) {
                *to = from;
            }
            self.push(&padded);
        }
        self
    }

    /// An integer constant in its shortest form.
    pub fn int(&mut self, value: u64) -> &mut Self {
        match value {
            0 | 1 => self.push(&[value as u8]),
            2..=0xFF => self.push(&[0x0A, value as u8]),
            0x100..=0xFFFF => self.push(&[0x0B]).push(&(value as u16).to_le_bytes()),
            0x1_0000..=0xFFFF_FFFF => self.push(&[0x0C]).push(&(value as u32).to_le_bytes()),
            _ => self.push(&[0x0E]).push(&value.to_le_bytes()),
        }
    }

    /// A string constant.
    pub fn string(&mut self, text: &str) -> &mut Self {
        self.push(&[0x0D]).push(text.as_bytes()).push(&[0])
    }

    /// A compressed identifier such as `PNP0A08`.
    pub fn eisa_id(&mut self, id: &[u8; 7]) -> &mut Self {
        let letter = |at: usize| u32::from(id[at] - b'@') & 0x1F;
        let digit = |at: usize| (id[at] as char).to_digit(16).unwrap_or(0);
        let vendor = letter(0) << 26 | letter(1) << 21 | letter(2) << 16;
        let product = digit(3) << 12 | digit(4) << 8 | digit(5) << 4 | digit(6);
        self.push(&[0x0C]).push(&(vendor | product).to_be_bytes())
    }

    /// A buffer of constant bytes.
    pub fn buffer(&mut self, bytes: &[u8]) -> &mut Self {
        self.sized(&[0x11], |buffer| {
            buffer.int(bytes.len() as u64).push(bytes);
        })
    }

    /// A package; `body` writes exactly `count` elements.
    pub fn package(&mut self, count: u8, body: impl FnOnce(&mut Self)) -> &mut Self {
        self.sized(&[0x12], |package| {
            package.push(&[count]);
            body(package);
        })
    }

    /// A resource template.
    pub fn resources(&mut self, body: impl FnOnce(&mut Resources) -> &mut Resources) -> &mut Self {
        let mut resources = Resources::default();
        body(&mut resources);
        resources.bytes.extend_from_slice(&[0x79, 0]);
        self.buffer(&resources.bytes)
    }

    // --- Definitions ----------------------------------------------------------------------

    /// `Name (path, …)`: the value follows.
    pub fn name(&mut self, path: &str) -> &mut Self {
        self.push(&[0x08]).path(path)
    }

    pub fn scope(&mut self, path: &str, body: impl FnOnce(&mut Self)) -> &mut Self {
        self.sized(&[0x10], |scope| body(scope.path(path)))
    }

    pub fn device(&mut self, path: &str, body: impl FnOnce(&mut Self)) -> &mut Self {
        self.sized(&[0x5B, 0x82], |device| body(device.path(path)))
    }

    pub fn method(&mut self, path: &str, args: u8, body: impl FnOnce(&mut Self)) -> &mut Self {
        self.method_with_flags(path, args & 7, body)
    }

    /// A method that creates names, and so must not run twice at a time.
    pub fn serialized_method(&mut self, path: &str, args: u8, body: impl FnOnce(&mut Self)) -> &mut Self {
        self.method_with_flags(path, (args & 7) | 8, body)
    }

    fn method_with_flags(&mut self, path: &str, flags: u8, body: impl FnOnce(&mut Self)) -> &mut Self {
        self.sized(&[0x14], |method| {
            body(method.path(path).push(&[flags]));
        })
    }

    /// `OperationRegion (path, PCI_Config, offset, length)`.
    pub fn pci_config_region(&mut self, path: &str, offset: u64, length: u64) -> &mut Self {
        self.push(&[0x5B, 0x80]).path(path).push(&[0x02]).int(offset).int(length)
    }

    /// `Field (region, ByteAcc, NoLock, Preserve)`.
    pub fn byte_fields(&mut self, region: &str, units: &[FieldUnit]) -> &mut Self {
        self.sized(&[0x5B, 0x81], |field| {
            field.path(region).push(&[0x01]);
            for unit in units {
                match unit {
                    FieldUnit::Named(name, bits) => field.path(name).push(&field_length((*bits).into())),
                    FieldUnit::Skip(bits) => field.push(&[0x00]).push(&field_length(*bits)),
                };
            }
        })
    }

    /// `CreateDWordField (buffer, byte index, name)`: the operands follow.
    pub fn create_dword_field(&mut self) -> &mut Self {
        self.push(&[0x8A])
    }

    // --- Expressions and statements: operands follow ----------------------------------------

    pub fn arg(&mut self, number: u8) -> &mut Self {
        self.push(&[0x68 + (number & 7)])
    }

    pub fn local(&mut self, number: u8) -> &mut Self {
        self.push(&[0x60 + (number & 7)])
    }

    /// No target: the result is only used.
    pub fn null(&mut self) -> &mut Self {
        self.push(&[0x00])
    }

    /// `Store (source, target)`.
    pub fn store(&mut self) -> &mut Self {
        self.push(&[0x70])
    }

    /// `And (left, right, target)`.
    pub fn and(&mut self) -> &mut Self {
        self.push(&[0x7B])
    }

    /// `Or (left, right, target)`.
    pub fn or(&mut self) -> &mut Self {
        self.push(&[0x7D])
    }

    /// `LEqual (left, right)`.
    pub fn equal(&mut self) -> &mut Self {
        self.push(&[0x93])
    }

    /// `LLess (left, right)`.
    pub fn less(&mut self) -> &mut Self {
        self.push(&[0x95])
    }

    /// `LNot (operand)`.
    pub fn not(&mut self) -> &mut Self {
        self.push(&[0x92])
    }

    /// `Return (value)`.
    pub fn ret(&mut self) -> &mut Self {
        self.push(&[0xA4])
    }

    /// `If`: `predicate` writes one expression, `body` the statements.
    pub fn when(
        &mut self,
        predicate: impl FnOnce(&mut Self) -> &mut Self,
        body: impl FnOnce(&mut Self) -> &mut Self,
    ) -> &mut Self {
        self.sized(&[0xA0], |then| {
            body(predicate(then));
        })
    }

    /// `Else` of the `If` before it.
    pub fn otherwise(&mut self, body: impl FnOnce(&mut Self) -> &mut Self) -> &mut Self {
        self.sized(&[0xA1], |other| {
            body(other);
        })
    }
}

/// Length of a package that includes its own length field (20.2.4).
fn package_length(body: usize) -> Vec<u8> {
    for extra in 0..4 {
        let total = body + 1 + extra;
        let limit = if extra == 0 { 1 << 6 } else { 1 << (4 + 8 * extra) };
        if total < limit {
            return encode_length(total, extra);
        }
    }
    encode_length(body + 4, 3)
}

/// Length of a field in bits: the same code, but it does not count itself.
fn field_length(bits: u32) -> Vec<u8> {
    let extra = match bits {
        0..=0x3F => 0,
        0x40..=0xFFF => 1,
        0x1000..=0xF_FFFF => 2,
        _ => 3,
    };
    encode_length(bits as usize, extra)
}

fn encode_length(value: usize, extra: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(extra + 1);
    if extra == 0 {
        bytes.push(value as u8);
        return bytes;
    }
    bytes.push(((extra as u8) << 6) | (value & 0xF) as u8);
    bytes.extend_from_slice(&(value >> 4).to_le_bytes()[..extra]);
    bytes
}

/// Resource descriptors of a template.
#[derive(Default)]
pub(super) struct Resources {
    bytes: Vec<u8>,
}

/// Kinds of address space descriptors, with their type-specific flags.
#[derive(Clone, Copy)]
pub(super) enum Space {
    /// Memory, not cacheable, writable.
    Memory,
    /// Memory, cacheable, writable.
    CacheableMemory,
    /// I/O ports of the whole range.
    Io,
    /// PCI bus numbers.
    Bus,
}

impl Resources {
    fn push(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    /// `IO (Decode16, base, base, 1, len)`.
    pub fn io(&mut self, base: u16, len: u8) -> &mut Self {
        self.push(&[0x47, 0x01]).push(&base.to_le_bytes()).push(&base.to_le_bytes()).push(&[1, len])
    }

    /// `IRQNoFlags () {irq}`: edge, active high, not shared.
    pub fn isa_irq(&mut self, irq: u8) -> &mut Self {
        self.push(&[0x22]).push(&(1u16 << (irq & 15)).to_le_bytes())
    }

    /// `Memory32Fixed (ReadWrite, base, len)`.
    pub fn memory32(&mut self, base: u32, len: u32) -> &mut Self {
        self.push(&[0x86, 9, 0, 1]).push(&base.to_le_bytes()).push(&len.to_le_bytes())
    }

    /// `Interrupt (ResourceConsumer, Level, ActiveLow, Shared) {choices}`.
    pub fn level_interrupt(&mut self, choices: &[u8]) -> &mut Self {
        let len = 2 + 4 * choices.len() as u16;
        self.push(&[0x89]).push(&len.to_le_bytes()).push(&[0x0D, choices.len() as u8]);
        for choice in choices {
            self.push(&u32::from(*choice).to_le_bytes());
        }
        self
    }

    /// A producer's range `first..=last`: a window that a bridge passes on.
    pub fn window16(&mut self, space: Space, first: u16, last: u16) -> &mut Self {
        self.window_head(0x88, 13, space);
        let len = last.wrapping_sub(first).wrapping_add(1);
        for value in [0, first, last, 0, len] {
            self.push(&value.to_le_bytes());
        }
        self
    }

    /// As [`Self::window16`], 32-bit.
    pub fn window32(&mut self, space: Space, first: u32, last: u32) -> &mut Self {
        self.window_head(0x87, 23, space);
        let len = last.wrapping_sub(first).wrapping_add(1);
        for value in [0, first, last, 0, len] {
            self.push(&value.to_le_bytes());
        }
        self
    }

    /// As [`Self::window16`], 64-bit.
    pub fn window64(&mut self, space: Space, first: u64, last: u64) -> &mut Self {
        self.window_head(0x8A, 43, space);
        let len = last.wrapping_sub(first).wrapping_add(1);
        for value in [0, first, last, 0, len] {
            self.push(&value.to_le_bytes());
        }
        self
    }

    /// Large item tag, length, resource type, general flags (producer, fixed at both ends,
    /// positive decode) and type flags.
    fn window_head(&mut self, tag: u8, len: u16, space: Space) {
        let (kind, flags) = match space {
            Space::Memory => (0, 0x01),
            Space::CacheableMemory => (0, 0x03),
            Space::Io => (1, 0x03),
            Space::Bus => (2, 0x00),
        };
        self.push(&[tag]).push(&len.to_le_bytes()).push(&[kind, 0x0C, flags]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    fn written(write: impl FnOnce(&mut Aml) -> &mut Aml) -> Vec<u8> {
        let mut aml = Aml::default();
        write(&mut aml);
        aml.into_bytes()
    }

    #[test]
    fn lengths_grow_with_the_body() {
        assert_eq!(package_length(62), vec![63]);
        assert_eq!(package_length(63), vec![0x41, 0x04]);
        assert_eq!(package_length(0xFFD), vec![0x4F, 0xFF]);
        assert_eq!(package_length(0xFFE), vec![0x81, 0x00, 0x01]);
        assert_eq!(field_length(8), vec![8]);
        assert_eq!(field_length(0x41), vec![0x41, 0x04]);
    }

    #[test]
    fn names_and_constants() {
        assert_eq!(written(|a| a.path("\\_SB.PCI0")), b"\\\x2E_SB_PCI0");
        assert_eq!(written(|a| a.path("_PRT")), b"_PRT");
        assert_eq!(written(|a| a.path("\\")), b"\\\0");
        assert_eq!(written(|a| a.path("A.B.C")), b"\x2F\x03A___B___C___");
        assert_eq!(written(|a| a.int(1).int(2).int(0x1234)), [1, 0x0A, 2, 0x0B, 0x34, 0x12]);
        assert_eq!(written(|a| a.eisa_id(b"PNP0A03")), [0x0C, 0x41, 0xD0, 0x0A, 0x03]);
    }
}
