//! What the loader handed over: Xen's `hvm_start_info` (xen/include/public/arch-x86/hvm/start_info.h), which QEMU fills
//! for `-kernel` and our UEFI loader builds itself.
//!
//! Called by: [`crate::start`]. All numbers are capped; physical memory is read through a function of the caller's, so
//! that this runs on any host.

use crate::memory::{MemoryKind, MemoryMap, MemoryRange};

const MAGIC: u32 = 0x336E_C578;
/// Most modules that are kept: the bundle is the first.
pub const MAX_MODULES: usize = 4;
const MAX_COMMAND_LINE: usize = 256;
const ENTRY_BYTES: u64 = 24;
const MODULE_BYTES: u64 = 32;

/// Why nothing can be made of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BootInfoError {
    /// Another structure, or none.
    #[error("the loader's structure does not start with the PVH magic number but with {0:#x}")]
    Magic(u32),
    /// A version without a memory map.
    #[error("the loader's structure has version {0}; the memory map needs 1")]
    Version(u32),
    /// Nothing usable in the map.
    #[error("the loader's memory map has no RAM")]
    NoRam,
}

/// A range of physical memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extent {
    /// First byte.
    pub start: u64,
    /// Length.
    pub bytes: u64,
}

/// See the module's header.
#[derive(Clone, Debug)]
pub struct BootInfo {
    /// Memory as firmware describes it.
    pub memory: MemoryMap,
    /// What was loaded beside the image.
    pub modules: [Option<Extent>; MAX_MODULES],
    /// Address of the ACPI root pointer; 0 if not told.
    pub rsdp: u64,
    command_line: [u8; MAX_COMMAND_LINE],
    command_line_bytes: usize,
}

/// Reads physical memory.
pub trait ReadPhysical {
    /// Copies from `at`.
    fn read(&self, at: u64, to: &mut [u8]);

    /// A 32-bit field.
    fn u32(&self, at: u64) -> u32 {
        let mut raw = [0; 4];
        self.read(at, &mut raw);
        u32::from_le_bytes(raw)
    }
    /// A 64-bit field.
    fn u64(&self, at: u64) -> u64 {
        let mut raw = [0; 8];
        self.read(at, &mut raw);
        u64::from_le_bytes(raw)
    }
}

impl BootInfo {
    /// Reads the structure at `at`.
    pub fn read(memory: &dyn ReadPhysical, at: u64) -> Result<Self, BootInfoError> {
        let magic = memory.u32(at);
        if magic != MAGIC {
            return Err(BootInfoError::Magic(magic));
        }
        let version = memory.u32(at + 4);
        if version < 1 {
            return Err(BootInfoError::Version(version));
        }
        let mut info = Self {
            memory: MemoryMap::default(),
            modules: [None; MAX_MODULES],
            rsdp: memory.u64(at + 32),
            command_line: [0; MAX_COMMAND_LINE],
            command_line_bytes: 0,
        };
        let (map, entries) = (memory.u64(at + 40), memory.u32(at + 48));
        for n in 0..u64::from(entries).min(MemoryMap::MAX_RANGES as u64) {
            let entry = map + n * ENTRY_BYTES;
            info.memory.add(MemoryRange {
                start: memory.u64(entry),
                bytes: memory.u64(entry + 8),
                kind: MemoryKind::from_e820(memory.u32(entry + 16)),
            });
        }
        if info.memory.usable_bytes() == 0 {
            return Err(BootInfoError::NoRam);
        }
        let (modules, count) = (memory.u64(at + 16), memory.u32(at + 12));
        for n in 0..(count as usize).min(MAX_MODULES) {
            let module = modules + n as u64 * MODULE_BYTES;
            info.modules[n] = Some(Extent { start: memory.u64(module), bytes: memory.u64(module + 8) });
        }
        info.read_command_line(memory, memory.u64(at + 24));
        Ok(info)
    }

    fn read_command_line(&mut self, memory: &dyn ReadPhysical, at: u64) {
        if at == 0 {
            return;
        }
        for (n, byte) in self.command_line.iter_mut().enumerate() {
            let mut raw = [0];
            memory.read(at + n as u64, &mut raw);
            if raw[0] == 0 {
                return;
            }
            *byte = raw[0];
            self.command_line_bytes = n + 1;
        }
    }

    /// The command line; what is no UTF-8 ends it.
    pub fn command_line(&self) -> &str {
        let bytes = &self.command_line[..self.command_line_bytes];
        match core::str::from_utf8(bytes) {
            Ok(text) => text,
            Err(error) => core::str::from_utf8(&bytes[..error.valid_up_to()]).unwrap_or_default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec;
    use std::vec::Vec;

    struct Bytes(Vec<u8>);

    impl ReadPhysical for Bytes {
        fn read(&self, at: u64, to: &mut [u8]) {
            for (n, byte) in to.iter_mut().enumerate() {
                *byte = self.0.get(at as usize + n).copied().unwrap_or(0xFF);
            }
        }
    }

    impl Bytes {
        fn put(&mut self, at: usize, bytes: &[u8]) {
            self.0[at..at + bytes.len()].copy_from_slice(bytes);
        }
        /// A structure at 0x100 with two ranges, one module and a command line.
        fn example() -> Self {
            let mut b = Self(vec![0; 0x400]);
            b.put(0x100, &MAGIC.to_le_bytes());
            b.put(0x104, &1u32.to_le_bytes());
            b.put(0x10C, &1u32.to_le_bytes());
            b.put(0x110, &0x200u64.to_le_bytes());
            b.put(0x118, &0x300u64.to_le_bytes());
            b.put(0x120, &0xE0000u64.to_le_bytes());
            b.put(0x128, &0x240u64.to_le_bytes());
            b.put(0x130, &2u32.to_le_bytes());
            b.put(0x200, &0x50_0000u64.to_le_bytes());
            b.put(0x208, &0x1234u64.to_le_bytes());
            for (n, (start, bytes, kind)) in
                [(0u64, 0x9_0000u64, 1u32), (0x10_0000, 0x100_0000, 1)].iter().enumerate()
            {
                b.put(0x240 + n * 24, &start.to_le_bytes());
                b.put(0x248 + n * 24, &bytes.to_le_bytes());
                b.put(0x250 + n * 24, &kind.to_le_bytes());
            }
            b.put(0x300, b"vms=2\0");
            b
        }
    }

    #[test]
    fn the_structure_is_read() {
        let info = BootInfo::read(&Bytes::example(), 0x100).unwrap();
        assert_eq!(info.memory.ranges().len(), 2);
        assert_eq!(info.memory.usable_bytes(), 0x109_0000);
        assert_eq!(info.modules[0], Some(Extent { start: 0x50_0000, bytes: 0x1234 }));
        assert_eq!(info.modules[1], None);
        assert_eq!((info.rsdp, info.command_line()), (0xE0000, "vms=2"));
    }

    #[test]
    fn others_are_refused_and_counts_are_capped() {
        let mut b = Bytes::example();
        assert_eq!(BootInfo::read(&b, 0).unwrap_err(), BootInfoError::Magic(0));
        b.put(0x130, &u32::MAX.to_le_bytes());
        b.put(0x10C, &u32::MAX.to_le_bytes());
        let info = BootInfo::read(&b, 0x100).unwrap();
        assert!(info.memory.ranges().len() <= MemoryMap::MAX_RANGES);
        b.put(0x130, &0u32.to_le_bytes());
        assert_eq!(BootInfo::read(&b, 0x100).unwrap_err(), BootInfoError::NoRam);
        b.put(0x104, &0u32.to_le_bytes());
        assert_eq!(BootInfo::read(&b, 0x100).unwrap_err(), BootInfoError::Version(0));
    }
}
