//! Memory operands of vector instructions.
//!
//! A value that stays within a page moves in pieces of up to 16 bytes: a fault shows before anything is written.
//! Values that cross a page go by `load_bytes` and `store_bytes`, which check both pages first.

use crate::core::{Core, Fault};
use crate::mode::ModeKey;
use crate::system::is_canonical;
use x86_defs::Exception;
use x86_host_ops::V;

/// Whether `bytes` at `linear` stay within a page.
#[inline(always)]
fn within_page(linear: u64, bytes: u64) -> bool {
    linear & 0xFFF <= 0x1000 - bytes
}

/// `linear`, or #GP(0) unless it is a multiple of `bytes` (a power of two).
#[inline(always)]
pub fn aligned<C: Core>(c: &mut C, linear: u64, bytes: u64) -> Result<u64, Fault> {
    if linear & (bytes - 1) != 0 { Err(c.gp(0)) } else { Ok(linear) }
}

/// #AC(0) where alignment checks are on and `linear` is no multiple of `alignment` (a power of two). Words
/// are checked by the core, what is wider here.
#[inline(always)]
pub fn check_alignment<C: Core>(c: &mut C, linear: u64, alignment: u64) -> Result<(), Fault> {
    // #GP for an address that is not canonical comes first; the access will raise it.
    if linear & (alignment - 1) != 0 && c.cpu().mode.has(ModeKey::ALIGN) && is_canonical(linear) {
        return Err(c.raise(Exception::AlignmentCheck, 0));
    }
    Ok(())
}

/// The alignment that is checked for an operand of `bytes` that is no word.
#[inline(always)]
fn alignment_of(bytes: u8) -> u64 {
    match bytes {
        16 | 32 => 16,
        10 => 8,
        _ => 1,
    }
}

/// Reads `bytes` (up to 8) without alignment check: a lane of a masked or gathered operand.
pub fn load_lane<C: Core>(c: &mut C, linear: u64, bytes: u8) -> Result<u64, Fault> {
    let mut buf = [0; 8];
    c.load_bytes(linear, &mut buf[..usize::from(bytes.min(8))])?;
    Ok(u64::from_le_bytes(buf))
}

/// Writes the low `bytes` (up to 8) without alignment check.
pub fn store_lane<C: Core>(c: &mut C, linear: u64, value: u64, bytes: u8) -> Result<(), Fault> {
    c.store_bytes(linear, &value.to_le_bytes()[..usize::from(bytes.min(8))])
}

/// Reads `bytes` (up to 32), the rest of the value zero.
#[inline(always)]
pub fn load<C: Core>(c: &mut C, linear: u64, bytes: u8) -> Result<V, Fault> {
    let mut v = [0; 4];
    check_alignment(c, linear, alignment_of(bytes))?;
    match bytes {
        4 => v[0] = u64::from(c.load::<u32>(linear)?),
        8 => v[0] = c.load(linear)?,
        16 if within_page(linear, 16) => [v[0], v[1]] = c.load_16(linear)?,
        32 if within_page(linear, 32) => {
            [v[0], v[1]] = c.load_16(linear)?;
            [v[2], v[3]] = c.load_16(linear.wrapping_add(16))?;
        }
        1 => v[0] = u64::from(c.load::<u8>(linear)?),
        2 => v[0] = u64::from(c.load::<u16>(linear)?),
        _ => return load_across(c, linear, bytes),
    }
    Ok(v)
}

#[cold]
fn load_across<C: Core>(c: &mut C, linear: u64, bytes: u8) -> Result<V, Fault> {
    let mut buf = [0; 32];
    c.load_bytes(linear, &mut buf[..usize::from(bytes.min(32))])?;
    Ok(from_bytes(&buf))
}

/// Writes the low `bytes` (up to 32) of `v`.
#[inline(always)]
pub fn store<C: Core>(c: &mut C, linear: u64, v: &V, bytes: u8) -> Result<(), Fault> {
    check_alignment(c, linear, alignment_of(bytes))?;
    match bytes {
        4 => c.store(linear, v[0] as u32),
        8 => c.store(linear, v[0]),
        16 if within_page(linear, 16) => c.store_16(linear, [v[0], v[1]]),
        32 if within_page(linear, 32) => {
            c.store_16(linear, [v[0], v[1]])?;
            c.store_16(linear.wrapping_add(16), [v[2], v[3]])
        }
        1 => c.store(linear, v[0] as u8),
        2 => c.store(linear, v[0] as u16),
        _ => c.store_bytes(linear, &to_bytes(v)[..usize::from(bytes.min(32))]),
    }
}

/// The 32 bytes of a register, lowest first.
pub fn to_bytes(v: &V) -> [u8; 32] {
    let mut bytes = [0; 32];
    for (chunk, word) in bytes.chunks_exact_mut(8).zip(v) {
        chunk.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

/// The reverse of [`to_bytes`].
pub fn from_bytes(bytes: &[u8; 32]) -> V {
    let mut v = [0; 4];
    for (word, chunk) in v.iter_mut().zip(bytes.chunks_exact(8)) {
        let mut b = [0; 8];
        b.copy_from_slice(chunk);
        *word = u64::from_le_bytes(b);
    }
    v
}
