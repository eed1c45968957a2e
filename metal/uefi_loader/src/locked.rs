//! For a test: locks Intel's virtualization off, as firmware's set-up can (SDM vol. 3C, 24.7), and goes on as
//! `bedplate-metal.efi`.
#![cfg_attr(target_os = "uefi", no_std, no_main)]

#[cfg(target_os = "uefi")]
mod firmware;

/// IA32_FEATURE_CONTROL, locked with nothing allowed.
#[cfg(target_os = "uefi")]
const FEATURE_CONTROL: (u32, u32) = (0x3A, 1);

#[cfg(target_os = "uefi")]
#[uefi::entry]
fn main() -> uefi::Status {
    let (number, value) = FEATURE_CONTROL;
    // SAFETY: firmware runs us at level 0; nothing uses virtualization yet.
    unsafe {
        core::arch::asm!("wrmsr", in("ecx") number, in("eax") value, in("edx") 0, options(nostack, nomem));
    }
    firmware::run()
}

#[cfg(not(target_os = "uefi"))]
fn main() {
    eprintln!("a test of `cargo xtask metal test` runs this on UEFI firmware");
    std::process::exit(2);
}
