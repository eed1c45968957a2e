//! Accesses that the TLB does not serve: bytes that may cross pages, RAM where code is, devices, the local APIC's registers.
//!
//! Called by: the slow ways of `core.rs`.
//!
//! Invariant: both pages are translated before anything is read or written.

use crate::core::{SoftCore, words_of};
use crate::lockstep::what;
use crate::mmu::{Access, Target};
use crate::shared::attention;
use core::sync::atomic::Ordering::SeqCst;
use guest_memory::{Gpa, Track};
use x86_emulate::Fault;

impl SoftCore {
    /// Reads bytes that may cross pages: both are translated before anything is read.
    pub(crate) fn read_pieces(&mut self, index: u8, linear: u64, to: &mut [u8]) -> Result<(), Fault> {
        let first = ((4096 - (linear & 0xFFF)) as usize).min(to.len());
        let a = self.translate(index, linear, Access::Read)?;
        let second = if first < to.len() {
            Some(self.translate(index, self.wrap(linear.wrapping_add(first as u64)), Access::Read)?)
        } else {
            None
        };
        self.note_access(linear, to.len() as u64, false);
        let (head, tail) = to.split_at_mut(first);
        self.read_target(a, head);
        if let Some(b) = second {
            self.read_target(b, tail);
        }
        Ok(())
    }

    pub(crate) fn write_pieces(&mut self, index: u8, linear: u64, from: &[u8]) -> Result<(), Fault> {
        let first = ((4096 - (linear & 0xFFF)) as usize).min(from.len());
        let a = self.translate_write(index, linear)?;
        let second = if first < from.len() {
            Some(self.translate_write(index, self.wrap(linear.wrapping_add(first as u64)))?)
        } else {
            None
        };
        self.note_access(linear, from.len() as u64, true);
        self.write_target(a, &from[..first]);
        if let Some(b) = second {
            self.write_target(b, &from[first..]);
        }
        Ok(())
    }

    /// Linear addresses wrap at 4 GiB outside 64-bit code.
    pub(crate) fn wrap(&self, linear: u64) -> u64 {
        if self.cpu.mode.is_long() { linear } else { linear & 0xFFFF_FFFF }
    }

    pub(crate) fn read_target(&mut self, target: Target, to: &mut [u8]) {
        match target {
            Target::Ram(at) => match to.len() {
                1 => to.copy_from_slice(&self.ram.load::<u8>(at).to_le_bytes()),
                2 => to.copy_from_slice(&self.ram.load::<u16>(at).to_le_bytes()),
                4 => to.copy_from_slice(&self.ram.load::<u32>(at).to_le_bytes()),
                8 => to.copy_from_slice(&self.ram.load::<u64>(at).to_le_bytes()),
                16 => to.copy_from_slice(self.ram.load_16(at).map(u64::to_le_bytes).as_flattened()),
                _ => self.ram.load_bytes(at, to),
            },
            Target::Mmio(gpa) => {
                let mut at = gpa;
                for piece in to.chunks_mut(8) {
                    self.mmio_read(at, piece);
                    at += piece.len() as u64;
                }
            }
        }
    }

    pub(crate) fn write_target(&mut self, target: Target, from: &[u8]) {
        match target {
            Target::Ram(at) => {
                match <[u8; 16]>::try_from(from) {
                    Ok(raw) => self.ram.store_16(at, words_of(raw)),
                    Err(_) => self.ram.store_bytes(at, from),
                }
                self.code_page_written(at >> 12);
            }
            Target::Mmio(gpa) => {
                let mut at = gpa;
                for piece in from.chunks(8) {
                    self.mmio_write(at, piece);
                    at += piece.len() as u64;
                }
            }
        }
    }

    /// RAM page `page` was written by this vCPU: a log hears of it; cached code of it goes, here and elsewhere.
    pub(crate) fn code_page_written(&mut self, page: u64) {
        if self.ram.note_page(page) & Track::Code as u8 != 0 {
            self.shared.code_written(page, Some(self.id as usize));
            self.stale_code.push(page);
            self.me.attention.fetch_or(attention::CODE, SeqCst);
        }
    }

    pub(crate) fn mmio_read(&mut self, gpa: u64, data: &mut [u8]) {
        let len = data.len().min(8);
        let value = self.taped(what(7, gpa, len as u64), |core| {
            let mut raw = [0; 8];
            core.device_read(gpa, &mut raw[..len]);
            u64::from_le_bytes(raw)
        });
        data[..len].copy_from_slice(&value.to_le_bytes()[..len]);
    }

    pub(crate) fn mmio_write(&mut self, gpa: u64, data: &[u8]) {
        let value = data.iter().rev().fold(0, |v, b| v << 8 | u64::from(*b));
        self.taped(what(8, gpa, value), |core| {
            core.device_write(gpa, data);
            0
        });
    }

    fn device_read(&mut self, gpa: u64, data: &mut [u8]) {
        if self.apic.mmio_base() == Some(gpa & !0xFFF) {
            // Registers are 32 bits wide, 16 bytes apart.
            let value = self.apic.mmio_read((gpa & 0xFF0) as u32);
            let raw = u64::from(value) >> ((gpa & 0xF) * 8).min(63);
            let n = data.len().min(8);
            data[..n].copy_from_slice(&raw.to_le_bytes()[..n]);
        } else if let Some(io) = &self.io {
            io.mmio_read(Gpa(gpa), data);
        }
    }

    fn device_write(&mut self, gpa: u64, data: &[u8]) {
        if self.apic.mmio_base() == Some(gpa & !0xFFF) {
            if gpa & 0xF == 0 && data.len() >= 4 {
                let value = u32::from_le_bytes([data[0], data[1], data[2], data[3]]);
                let action = self.apic.mmio_write((gpa & 0xFF0) as u32, value);
                self.apic_action(action);
            }
        } else if let Some(io) = &self.io {
            io.mmio_write(Gpa(gpa), data);
        }
    }
}
