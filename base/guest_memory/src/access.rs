//! Single-instruction accesses to memory that others write at the same time.

/// An integer of 1, 2, 4 or 8 bytes.
pub trait Word: Copy + Eq + core::fmt::Debug + Send + Sync + 'static {
    /// Width in bytes.
    const BYTES: u32;
    /// Width in bits.
    const BITS: u32 = Self::BYTES * 8;
    /// Truncates.
    fn from_u64(value: u64) -> Self;
    /// Zero-extends.
    fn zext(self) -> u64;
    /// Sign-extends.
    fn sext(self) -> u64;

    #[doc(hidden)]
    /// # Safety
    /// `at` is valid for reads of `BYTES` bytes.
    unsafe fn raw_load(at: *const u8) -> Self;
    #[doc(hidden)]
    /// # Safety
    /// `at` is valid for writes of `BYTES` bytes.
    unsafe fn raw_store(at: *mut u8, value: Self);
    #[doc(hidden)]
    /// Atomic, any alignment. Returns the old value.
    /// # Safety
    /// `at` is valid for reads and writes of `BYTES` bytes.
    unsafe fn raw_compare_exchange(at: *mut u8, expected: Self, new: Self) -> Self;
}

macro_rules! word {
    ($($u:ty, $i:ty, $n:literal, $reg:ident, $modifier:tt, $acc:tt;)*) => {$(
        impl Word for $u {
            const BYTES: u32 = $n;
            #[inline(always)]
            fn from_u64(value: u64) -> Self { value as $u }
            #[inline(always)]
            fn zext(self) -> u64 { self as u64 }
            #[inline(always)]
            fn sext(self) -> u64 { self as $i as i64 as u64 }

            #[cfg(target_arch = "x86_64")]
            #[inline(always)]
            unsafe fn raw_load(at: *const u8) -> Self {
                let value: $u;
                // SAFETY: the caller vouches for `at`; the instruction touches nothing else.
                unsafe {
                    core::arch::asm!(
                        concat!("mov {v", $modifier, "}, [{p}]"),
                        v = out($reg) value, p = in(reg) at,
                        options(nostack, preserves_flags, readonly)
                    );
                }
                value
            }
            #[cfg(target_arch = "x86_64")]
            #[inline(always)]
            unsafe fn raw_store(at: *mut u8, value: Self) {
                // SAFETY: as above.
                unsafe {
                    core::arch::asm!(
                        concat!("mov [{p}], {v", $modifier, "}"),
                        v = in($reg) value, p = in(reg) at,
                        options(nostack, preserves_flags)
                    );
                }
            }
            #[cfg(target_arch = "x86_64")]
            #[inline(always)]
            unsafe fn raw_compare_exchange(at: *mut u8, expected: Self, new: Self) -> Self {
                let old: $u;
                // SAFETY: as above; LOCK makes it atomic at any alignment.
                unsafe {
                    core::arch::asm!(
                        concat!("lock cmpxchg [{p}], {v", $modifier, "}"),
                        v = in($reg) new, p = in(reg) at, inout($acc) expected => old,
                        options(nostack)
                    );
                }
                old
            }

            #[cfg(not(target_arch = "x86_64"))]
            unsafe fn raw_load(at: *const u8) -> Self {
                // SAFETY: the caller vouches for `at`.
                unsafe { core::ptr::read_unaligned(at.cast()) }
            }
            #[cfg(not(target_arch = "x86_64"))]
            unsafe fn raw_store(at: *mut u8, value: Self) {
                // SAFETY: the caller vouches for `at`.
                unsafe { core::ptr::write_unaligned(at.cast(), value) }
            }
            #[cfg(not(target_arch = "x86_64"))]
            unsafe fn raw_compare_exchange(at: *mut u8, expected: Self, new: Self) -> Self {
                // Other hosts run one vCPU only: no second writer exists.
                // SAFETY: the caller vouches for `at`.
                unsafe {
                    let old = core::ptr::read_unaligned(at.cast());
                    if old == expected { core::ptr::write_unaligned(at.cast(), new); }
                    old
                }
            }
        }
    )*};
}
word! {
    u8, i8, 1, reg_byte, "", "al";
    u16, i16, 2, reg, ":x", "ax";
    u32, i32, 4, reg, ":e", "eax";
    u64, i64, 8, reg, ":r", "rax";
}

/// Atomic compare and exchange of 16 bytes.
/// # Safety
/// `at` is 16-byte aligned and valid for reads and writes.
#[cfg(target_arch = "x86_64")]
pub(crate) unsafe fn compare_exchange_16(at: *mut u8, expected: u128, new: u128) -> u128 {
    let (mut low, mut high) = (expected as u64, (expected >> 64) as u64);
    // SAFETY: the caller vouches for `at`. RBX is not available to inline assembly, so it is swapped in and
    // out around the instruction.
    unsafe {
        core::arch::asm!(
            "xchg {new_low}, rbx",
            "lock cmpxchg16b [{p}]",
            "mov rbx, {new_low}",
            p = in(reg) at,
            new_low = inout(reg) new as u64 => _,
            in("rcx") (new >> 64) as u64,
            inout("rax") low,
            inout("rdx") high,
            options(nostack)
        );
    }
    u128::from(low) | u128::from(high) << 64
}
#[cfg(not(target_arch = "x86_64"))]
pub(crate) unsafe fn compare_exchange_16(at: *mut u8, expected: u128, new: u128) -> u128 {
    // SAFETY: the caller vouches for `at`.
    unsafe {
        let old = core::ptr::read(at.cast());
        if old == expected {
            core::ptr::write(at.cast(), new);
        }
        old
    }
}

/// Reads 16 bytes by one aligned vector load, which processors with AVX make one access (SDM vol. 3, 9.1.1). Where
/// vector registers are not to be used, by two words.
/// # Safety
/// `at` is 16-byte aligned and valid for reads.
#[inline(always)]
pub(crate) unsafe fn load_16(at: *const u8) -> [u64; 2] {
    #[cfg(all(target_arch = "x86_64", target_feature = "sse2"))]
    {
        let value: core::arch::x86_64::__m128i;
        // SAFETY: the caller vouches for `at`; the instruction touches nothing else. Both types are 16 plain bytes.
        unsafe {
            core::arch::asm!("movdqa {v}, [{p}]", v = out(xmm_reg) value, p = in(reg) at,
                options(nostack, preserves_flags, readonly));
            core::mem::transmute(value)
        }
    }
    #[cfg(not(all(target_arch = "x86_64", target_feature = "sse2")))]
    // SAFETY: the caller vouches for `at`.
    unsafe {
        [u64::raw_load(at), u64::raw_load(at.add(8))]
    }
}

/// Writes 16 bytes, as [`load_16`] reads them.
/// # Safety
/// `at` is 16-byte aligned and valid for writes.
#[inline(always)]
pub(crate) unsafe fn store_16(at: *mut u8, value: [u64; 2]) {
    #[cfg(all(target_arch = "x86_64", target_feature = "sse2"))]
    // SAFETY: as above.
    unsafe {
        let value: core::arch::x86_64::__m128i = core::mem::transmute(value);
        core::arch::asm!("movdqa [{p}], {v}", v = in(xmm_reg) value, p = in(reg) at,
            options(nostack, preserves_flags));
    }
    #[cfg(not(all(target_arch = "x86_64", target_feature = "sse2")))]
    // SAFETY: the caller vouches for `at`.
    unsafe {
        u64::raw_store(at, value[0]);
        u64::raw_store(at.add(8), value[1]);
    }
}
